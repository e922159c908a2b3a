"""A folder or an archive of pictures as people have them: labels, split, and what is passed over instead of fatal."""

from __future__ import annotations

import gc
import io
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.painting import noise
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder, Skipped
from tokenizer_vq.images import UnreadablePicture


def paint(folder: Path, *names: str, side: int = 16) -> Path:
    """Different pictures under these names, each the same in every test."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(side, side, sum(name.encode()) * 1000 + len(name)).save(folder / name)
    return folder


def pack(archive: Path, folder: Path) -> Path:
    """A .tar, .tar.gz or .zip of a folder, by its name."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(folder.rglob("*")):
                packed.write(path, path.relative_to(folder))
        return archive
    with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as tar:
        tar.add(folder, ".")
    return archive


# Names and labels


def test_sub_folders_are_labels_nested_ones_too_and_the_top_has_the_name_of_the_folder(tmp_path: Path) -> None:
    paint(tmp_path / "my art", "top.png", "sea/a.png", "sea/calm/b.png", "hills/c.webp")
    art = ArtFolder(tmp_path / "my art")
    assert art.names == ["hills/c.webp", "sea/a.png", "sea/calm/b.png", "top.png"]
    assert art.labels == ["hills", "my art", "sea", "sea/calm"]
    assert [art.labels[label] for label in art.label_of] == ["hills", "sea", "sea/calm", "my art"]
    assert len(art) == 4 and art.picture(1).mode == "RGB"


def test_pictures_are_those_of_their_names(tmp_path: Path) -> None:
    paint(tmp_path, "b.png", "a/c.png", "a/b.png")
    for source in (tmp_path, pack(tmp_path / "all.tar", tmp_path)):
        art = ArtFolder(source)
        for i, name in enumerate(art.names):
            assert art.picture(i).tobytes() == Image.open(tmp_path / name).tobytes()


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
def test_an_archive_gives_the_same_as_the_folder_it_was_made_from(name: str, tmp_path: Path) -> None:
    paint(tmp_path / "art", "sea/a.png", "hills/b.png", "sea/.hidden.png", "sea/notes.txt.png")
    (tmp_path / "art" / "notes.txt").write_text("by me")
    folder, archive = ArtFolder(tmp_path / "art"), ArtFolder(str(pack(tmp_path / name, tmp_path / "art")))
    assert folder.names == ["hills/b.png", "sea/a.png", "sea/notes.txt.png"]
    assert (archive.names, archive.labels) == (folder.names, folder.labels)
    assert archive.fingerprint == folder.fingerprint and archive.split() == folder.split()


def test_pictures_at_the_top_of_a_tar_have_the_name_of_the_archive_as_label(tmp_path: Path) -> None:
    assert ArtFolder(pack(tmp_path / "tarot.tar", paint(tmp_path / "art", "a.png"))).labels == ["tarot"]


def test_of_two_members_with_one_name_the_last_counts_as_for_tar_itself(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "art.tar", "w") as tar:
        for seed in (1, 2):
            file = io.BytesIO()
            noise(16, 16, seed).save(file, "PNG")
            member = tarfile.TarInfo("sea/a.png")
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)
    art = ArtFolder(tmp_path / "art.tar")
    assert art.names == ["sea/a.png"] and art.picture(0).tobytes() == noise(16, 16, 2).tobytes()
    assert [(skip.name, "more than once" in skip.reason) for skip in art.skipped] == [("sea/a.png", True)]


def test_what_a_stranger_puts_into_an_archive_is_listed_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unpacked").mkdir()
    file = io.BytesIO()
    noise(16, 16).save(file, "PNG")
    with zipfile.ZipFile(tmp_path / "art.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in ("good.png", "../../out.png", "/etc/out.png", "sea/../../out.png"):
            packed.writestr(name, file.getvalue())
        packed.writestr("bomb.png", bytes(2**29 + 1))
        packed.writestr("notes.txt", "words")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "unpacked"))
    before = {path for path in tmp_path.parent.rglob("*")}
    art = ArtFolder(tmp_path / "art.zip")
    assert art.names == ["good.png"] and art.picture(0) == noise(16, 16)
    reasons = dict(art.skipped)
    assert all("outside" in reasons[name] for name in reasons if name != "bomb.png") and len(reasons) == 4
    assert "more than" in reasons["bomb.png"]
    (unpacked,) = {path for path in tmp_path.parent.rglob("*")} - before
    assert unpacked.parent == tmp_path / "unpacked" and unpacked.stat().st_size < 10_000
    del art
    gc.collect()
    assert not unpacked.exists()


def test_names_in_any_script_come_out_in_one_spelling(tmp_path: Path) -> None:
    paint(tmp_path, "浮世絵/北斎.png", "Ge\u0301rome/e\u0301tude.png")  # as macOS hands out accents: decomposed
    art = ArtFolder(tmp_path)
    assert art.names == ["G\u00e9rome/\u00e9tude.png", "浮世絵/北斎.png"] and art.labels == ["G\u00e9rome", "浮世絵"]
    assert art.picture(0).size == (16, 16)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a file name be any bytes")
def test_a_file_name_that_is_no_utf8_is_read_as_latin1_and_can_be_printed(tmp_path: Path) -> None:
    os.rename(
        os.fsencode(paint(tmp_path, "\u7d75/a.png") / "\u7d75/a.png"),
        os.fsencode(tmp_path / "\u7d75") + b"/caf\xe9\x9b.png",
    )
    art = ArtFolder(tmp_path)
    assert art.names == ["\u7d75/caf\u00e9\ufffd.png"] and art.picture(0).size == (16, 16)


def test_a_capital_extension_is_one_too(tmp_path: Path) -> None:
    assert ArtFolder(paint(tmp_path, "IMG_1.JPG")).names == ["IMG_1.JPG"]


# What is passed over


def test_hidden_files_and_files_of_other_kinds_are_passed_over(tmp_path: Path) -> None:
    paint(tmp_path, "a.png", ".b.png", "._a.png", ".cache/c.png", "__MACOSX/d.png")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"\x00\x01")
    for name in ("readme.txt", "drawing.svg", "no extension"):
        (tmp_path / name).write_text("words")
    art = ArtFolder(tmp_path)
    assert (art.names, art.skipped) == (["a.png"], [])


def test_broken_and_tiny_pictures_are_skipped_and_listed_with_a_reason(tmp_path: Path) -> None:
    paint(tmp_path, "good.png")
    paint(tmp_path, "tiny.png", side=15)
    (tmp_path / "text.jpg").write_text("Dear diary")
    paint(tmp_path, "cut.png", side=64)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:5000])
    art = ArtFolder(tmp_path)
    assert art.names == ["good.png"]
    cut, text, tiny = art.skipped
    assert (cut.name, text.name) == ("cut.png", "text.jpg")
    assert cut.reason.startswith("is broken") and text.reason.startswith("is no picture")
    assert tiny == Skipped("tiny.png", "is too small: 15x15 pixels, wanted at least 16 a side")


def test_links_are_followed_and_loops_and_broken_ones_are_not_fatal(tmp_path: Path) -> None:
    paint(tmp_path / "elsewhere", "x.png", "deep/y.png")
    root = paint(tmp_path / "art", "sea/a.png", "top.png")
    try:
        (root / "sea" / "link.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    except OSError:
        pytest.skip("links are not allowed here")
    (root / "a linked folder").symlink_to(tmp_path / "elsewhere" / "deep")
    (root / "sea" / "up").symlink_to(root)
    (root / "sea" / "broken.png").symlink_to(tmp_path / "gone.png")
    (root / "sea" / "self.png").symlink_to(root / "sea" / "self.png")
    art = ArtFolder(root)
    assert art.names == ["a linked folder/y.png", "sea/a.png", "sea/link.png", "top.png"]
    assert [skipped.name for skipped in art.skipped] == ["sea/broken.png", "sea/self.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_with_the_name_of_a_picture_is_skipped_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(paint(tmp_path, "a.png") / "pipe.png")
    art = ArtFolder(tmp_path)
    assert art.names == ["a.png"] and [skipped.name for skipped in art.skipped] == ["pipe.png"]


def test_links_inside_an_archive_are_not_followed_out_of_it(tmp_path: Path) -> None:
    outside = paint(tmp_path, "secret.png") / "secret.png"
    with tarfile.open(tmp_path / "art.tar", "w") as tar:
        tar.add(outside, "sea/a.png")
        link = tarfile.TarInfo("sea/b.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        tar.addfile(link)
    assert ArtFolder(tmp_path / "art.tar").names == ["sea/a.png"]


# What is fatal


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sketches is neither a folder nor a readable archive"):
        ArtFolder(tmp_path / "sketches")


def test_a_folder_without_a_usable_picture_says_how_many_files_were_looked_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no usable picture in .*, 0 files looked at$"):
        ArtFolder(tmp_path)
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "text.jpg").write_text("words")
    with pytest.raises(UserError, match=r"2 files looked at; the first: text\.jpg is no picture"):
        ArtFolder(tmp_path)


def test_a_file_that_is_no_whole_archive_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "art", "a.png", "b.png", side=64)
    whole = pack(tmp_path / "whole.tar", tmp_path / "art").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.tar").write_bytes(b"")
    for name in ("packed.tar.gz", "packed.zip"):
        packed = pack(tmp_path / name, tmp_path / "art").read_bytes()
        (tmp_path / f"cut.{name}").write_bytes(packed[: len(packed) // 2])
    for name in ("cut.tar", "empty.tar", "cut.packed.tar.gz", "cut.packed.zip", "art/a.png"):
        with pytest.raises(UserError, match=r"whole \.tar, \.tar\.gz or \.zip is wanted") as caught:
            ArtFolder(tmp_path / name)
        assert name in str(caught.value)


def test_a_zip_with_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "art.zip", "w") as archive:
        archive.writestr("é.png", b"")  # a name that the archive says is UTF-8
    data = (tmp_path / "art.zip").read_bytes().replace("é".encode(), b"\xc3(")
    (tmp_path / "art.zip").write_bytes(data)
    with pytest.raises(UserError, match="codec can't decode"):
        ArtFolder(tmp_path / "art.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_zip_that_is_damaged_inside_is_one_sentence(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "art.zip", "w", method) as packed:
        packed.writestr("a.png", b"art" * 1000)
    data = (tmp_path / "art.zip").read_bytes()
    (tmp_path / "art.zip").write_bytes(data[:48] + b"\xff" * 9 + data[57:])  # the header has 35 bytes
    with pytest.raises(UserError, match=r"whole \.tar, \.tar\.gz or \.zip is wanted"):
        ArtFolder(tmp_path / "art.zip")


def test_a_picture_that_vanishes_later_is_one_sentence(tmp_path: Path) -> None:
    art = ArtFolder(paint(tmp_path, "a.png"))
    (tmp_path / "a.png").unlink()
    with pytest.raises(UnreadablePicture, match=r"a\.png is not there"):
        art.picture(0)


# Travelling


def test_an_art_folder_travels_to_another_process_and_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tmp_path / "art.tar", paint(tmp_path / "art", "sea/a.png", "b.png"))
    monkeypatch.chdir(tmp_path)
    collections = [ArtFolder("art"), ArtFolder("art.tar")]
    monkeypatch.chdir("/")
    for art in collections:
        copy = pickle.loads(pickle.dumps(art))
        assert (copy.names, copy.labels, copy.split()) == (art.names, art.labels, art.split())
        assert copy.picture(1).tobytes() == Image.open(tmp_path / "art" / "sea" / "a.png").tobytes()


def test_the_label_of_the_folder_one_stands_in_is_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(paint(tmp_path / "sketches", "a.png"))
    assert ArtFolder(".").labels == ["sketches"]


def test_the_fingerprint_is_that_of_the_art_and_not_of_its_place(tmp_path: Path) -> None:
    first = ArtFolder(paint(tmp_path / "one", "sea/a.png", "hills/b.png")).fingerprint
    assert ArtFolder(paint(tmp_path / "two", "sea/a.png", "hills/b.png")).fingerprint == first
    assert len(first) == 64
    noise(16, 16, 12345).save(tmp_path / "two" / "sea" / "a.png")  # the same name, another picture
    assert ArtFolder(tmp_path / "two").fingerprint != first
    (tmp_path / "one" / "sea").rename(tmp_path / "one" / "lake")
    assert ArtFolder(tmp_path / "one").fingerprint != first
