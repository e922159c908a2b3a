"""A person's folder: taken as people have them, sorted once, and never the same picture on both sides of the split."""

from __future__ import annotations

import csv
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from tests.painting import COLOURS, art_folder, paint
from tokenizer_vq.base import UserError
from train.collection import Collection, are_near_duplicates, load_collection, thumbnails


def flat_folder(folder: Path, count: int = 12, size: tuple[int, int] = (64, 64)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        paint(i, (40, 160, 60), size).save(folder / f"{i:02}.png")
    return folder


def used(collection: Collection) -> dict[str, str]:
    """What became of each file."""
    names = collection.art.names
    return {
        **{names[i]: "train" for i in collection.train},
        **{names[i]: "val" for i in collection.val},
        **{skip.name: skip.reason for skip in collection.skipped},
    }


def test_a_folder_as_people_have_them_is_taken_and_every_file_accounted_for(tmp_path: Path) -> None:
    art = tmp_path / "Bücher & Bilder"
    (art / "tief" / "tiefer").mkdir(parents=True)
    colours = [paint(i, (60 + 10 * i, 120, 200 - 10 * i), (60 + 3 * i, 80)) for i in range(12)]
    for i, ending in enumerate(("jpg", "png", "webp", "gif", "bmp", "tiff")):
        colours[i].save(art / f"ä{i}.{ending}")
    colours[6].convert("CMYK").save(art / "cmyk.jpg")
    Image.radial_gradient("L").convert("I").point(lambda grey: grey * 257).convert("I;16").save(art / "deep.png")
    transparent = colours[8].convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    transparent.save(art / "tief" / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    colours[9].save(art / "tief" / "turned.jpg", exif=exif)
    colours[10].save(art / "tief" / "tiefer" / "日本.png")
    colours[11].save(tmp_path / "elsewhere.png")
    os.symlink(tmp_path / "elsewhere.png", art / "linked.png")
    os.symlink(tmp_path / "nowhere.png", art / "dangling.png")
    (art / ".DS_Store").write_bytes(b"\0")
    (art / "notes.txt").write_text("no picture")
    (art / "broken.jpg").write_bytes((art / "ä0.jpg").read_bytes()[:200])
    (art / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (art / "empty.png").touch()
    shutil.copy(art / "ä1.png", art / "ä1 copy.png")
    collection = load_collection(art)
    reasons = used(collection)
    assert len(collection.train) + len(collection.val) == 12 and collection.val
    assert "HEIC" in reasons["phone.heic"] and "broken" in reasons["broken.jpg"] and "empty" in reasons["empty.png"]
    assert "copy of" in reasons[max("ä1.png", "ä1 copy.png", key=lambda name: len(reasons[name]))]
    assert set(collection.art.labels) == {"Bücher & Bilder", "tief", "tief/tiefer"}
    collection.write(tmp_path / "pictures.csv")
    rows = list(csv.DictReader((tmp_path / "pictures.csv").open(encoding="utf-8")))
    assert {row["path"] for row in rows} == set(reasons) and ".DS_Store" not in reasons
    assert all(row["reason"] for row in rows if row["use"] == "skipped")
    assert len(collection.skipped) == 5


def test_the_listing_of_a_fine_tuning_is_a_manifest_of_its_split(tmp_path: Path) -> None:
    from tokenizer_vq.dataset import ArtFolder

    collection = load_collection(flat_folder(tmp_path / "art"))
    collection.write(tmp_path / "pictures.csv")
    again = ArtFolder(tmp_path / "art", manifest=tmp_path / "pictures.csv")
    assert again.split() == (collection.train, collection.val)


def test_near_duplicates_stay_on_one_side_whatever_was_done_to_them(tmp_path: Path) -> None:
    art = flat_folder(tmp_path / "art", 14, (96, 96))
    for i in range(14):
        picture = Image.open(art / f"{i:02}.png")
        picture.resize((61, 61)).save(art / f"{i:02}-small.jpg", quality=70)
        ImageEnhance.Brightness(picture).enhance(1.05).save(art / f"{i:02}-bright.png")
        ImageOps.mirror(picture).save(art / f"{i:02}-mirrored.webp")
    collection = load_collection(art)
    sides = [{collection.art.names[i][:2] for i in part} for part in (collection.train, collection.val)]
    assert not sides[0] & sides[1] and all(sides)
    assert len(collection.train) + len(collection.val) == 56


def test_different_pictures_of_one_shape_are_not_taken_for_duplicates() -> None:
    """Faces of one yellow, as emoji are: only the middle differs."""
    from PIL import ImageDraw

    pictures = []
    for i in (0, 1, 2, 3, 5):
        face = Image.new("RGB", (128, 128), "white")
        pen = ImageDraw.Draw(face)
        pen.ellipse((8, 8, 120, 120), fill=(250, 200, 50))
        pen.rectangle((30 + 8 * i, 30 + 10 * (i % 3), 60 + 8 * i, 60), fill=(90, 50, 10))
        pen.line((30, 70 + 6 * i, 98, 100 - 4 * i), fill=(120, 20, 20), width=9)
        pictures.append(face)
    small_NCHW = thumbnails(pictures)
    assert torch.equal(are_near_duplicates(small_NCHW, small_NCHW), torch.eye(5, dtype=torch.bool))


def test_pictures_without_any_gradient_are_near_duplicates_where_their_colours_agree() -> None:
    """Blank pages, fog."""
    small_NCHW = thumbnails(Image.new("RGB", (64, 64), colour) for colour in ("#c8c8c8", "#c9c9c9", "#6464c8"))
    assert are_near_duplicates(small_NCHW, small_NCHW).tolist() == [[True, True, False]] * 2 + [[False, False, True]]


def test_the_split_is_the_same_wherever_the_folder_lies_and_in_a_tar(tmp_path: Path) -> None:
    art = art_folder(tmp_path / "here", each=8)
    shutil.copytree(art, tmp_path / "there" / "here")
    with tarfile.open(tmp_path / "here.tar", "w") as tar:
        tar.add(art, ".")
    splits = [used(load_collection(path)) for path in (art, tmp_path / "there" / "here", tmp_path / "here.tar")]
    assert splits[0] == splits[1] == splits[2] and list(splits[0].values()).count("val") == 2


def test_every_label_with_enough_pictures_gives_one_for_validation(tmp_path: Path) -> None:
    collection = load_collection(art_folder(tmp_path / "art", each=10))
    assert {collection.art.label_of[i] for i in collection.val} == {0, 1}


def test_mirroring_is_unwise_where_all_pictures_lean_one_way(tmp_path: Path) -> None:
    for name, upright in (("leaning", False), ("any", True)):
        (tmp_path / name).mkdir()
        for i in range(16):
            picture = paint(i, (40, 160, 60))
            if not upright:
                picture.paste(Image.linear_gradient("L").rotate(90).resize((40, 64)), (24, 0))
            picture.save(tmp_path / name / f"{i}.png")
    assert not load_collection(tmp_path / "leaning").flip and load_collection(tmp_path / "any").flip


def test_what_cannot_be_learned_from_is_refused_with_what_was_found(tmp_path: Path, tiny_folder: Path) -> None:
    def refused(folder: Path, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            load_collection(folder)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no usable picture")
    refused(flat_folder(tmp_path / "one", 1), "1 usable different picture; 3 or more")
    same = flat_folder(tmp_path / "same", 1)
    for i in range(4):
        shutil.copy(same / "00.png", same / f"copy {i}.png")
    Image.open(same / "00.png").resize((50, 50)).save(same / "small.png")
    refused(same, r"1 usable different picture \(all 6 show the same\)")
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.png").write_text("no picture")
    refused(tmp_path / "broken", "no usable picture.*the first: 0.png is no picture")
    refused(tiny_folder, "is a model, not a folder of pictures")


def test_drawn_pictures_that_show_training_pictures_are_counted_as_copies(tmp_path: Path) -> None:
    collection = load_collection(flat_folder(tmp_path / "art"))
    again = [collection.art.picture(i) for i in collection.train[:3]]
    again[1], again[2] = ImageOps.mirror(again[1]), again[2].resize((48, 48))
    own = [paint(900 + i, colour) for i, colour in enumerate(COLOURS.values())]
    assert collection.copies(again + own) == 3
