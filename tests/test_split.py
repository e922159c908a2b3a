"""Which pictures a model is never trained on: by content, so that it stays so, or as a manifest says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.painting import noise
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder


def paint(folder: Path, seeds: dict[str, int]) -> Path:
    """One picture of noise for each name; equal seeds make equal files."""
    for name, seed in seeds.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(16, 16, seed).save(folder / name)
    return folder


def validation_names(art: ArtFolder) -> set[str]:
    train, val = art.split()
    assert sorted(train + val) == list(range(len(art)))
    return {art.names[i] for i in val}


# By content


def test_about_a_twentieth_goes_to_validation_and_added_pictures_do_not_move_the_others(tmp_path: Path) -> None:
    before = validation_names(ArtFolder(paint(tmp_path, {f"{i:03}.png": i for i in range(200)})))
    after = validation_names(ArtFolder(paint(tmp_path, {f"new/{i:03}.png": i for i in range(200, 300)})))
    assert 4 <= len(before) <= 20 and len(after) > len(before)
    assert before == {name for name in after if not name.startswith("new/")}


def test_duplicates_stay_on_one_side_whatever_their_names(tmp_path: Path) -> None:
    art = ArtFolder(paint(tmp_path, {f"{copy}/{i:02}.png": i for i in range(40) for copy in "abc"}))
    chosen = validation_names(art)
    assert chosen and chosen == {f"{copy}/{name[2:]}" for name in chosen for copy in "abc"}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_small_collection_has_at_least_one_picture_on_each_side(tmp_path: Path, count: int) -> None:
    assert 1 <= len(validation_names(ArtFolder(paint(tmp_path, {f"{i}.png": i for i in range(count)})))) < count


def test_one_picture_and_its_copies_are_all_for_training(tmp_path: Path) -> None:
    assert validation_names(ArtFolder(paint(tmp_path, {"a.png": 1, "b.png": 1, "c/d.png": 1}))) == set()


# By manifest


def split_by(tmp_path: Path, manifest: str, encoding: str = "utf-8") -> tuple[list[str], list[str]]:
    paint(tmp_path / "art", {"sea/a.png": 1, "sea/b.png": 2, "hills/c.png": 3, "hills/é.png": 4})
    (tmp_path / "manifest.csv").write_text(manifest, encoding=encoding)
    art = ArtFolder(tmp_path / "art", manifest=tmp_path / "manifest.csv")
    train, val = art.split()
    return [art.names[i] for i in train], [art.names[i] for i in val]


@pytest.mark.parametrize(
    "manifest",
    [
        "collection,label,id,split\nx,sea,a,val\nx,hills,c,train\nx,hills,é,test\ny,elsewhere,z,val\n",
        "split,path\nval,sea/a.png\ntrain,./hills/c.png\n",
        "name,split\nsea\\a.png,val\nc.png,train\n",
        "name,split\nsea/a,val\n\nhills/c,train\n",
    ],
)
def test_a_manifest_decides_and_pictures_it_does_not_name_are_left_out(tmp_path: Path, manifest: str) -> None:
    assert split_by(tmp_path, manifest) == (["hills/c.png"], ["sea/a.png"])


def test_a_manifest_from_a_spreadsheet_with_decomposed_accents_is_understood(tmp_path: Path) -> None:
    manifest = "id,split\r\na,train\r\ne\u0301,val\r\n"
    assert split_by(tmp_path, manifest, "utf-8-sig") == (["sea/a.png"], ["hills/é.png"])


@pytest.mark.parametrize(
    ("manifest", "complaint"),
    [
        ("", "names none of the 4 pictures"),
        ("id,split\nx,train\n", "names none of the 4 pictures"),
        ("id,split\na,train\nb,vall\n", "line 3 of .* says 'b' and 'vall'"),
        ("id,label\na,sea\n", "line 2 of .* says 'a' and None"),
        ("title,split\nSea,train\n", "line 2 of .* says None and 'train'"),
        ("id,split\na,train\na,val\n", "puts a into train and into val"),
    ],
)
def test_a_manifest_with_a_mistake_is_refused(tmp_path: Path, manifest: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        split_by(tmp_path, manifest)


def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    art = paint(tmp_path, {"a.png": 1})
    (tmp_path / "latin.csv").write_bytes("id,split\né,val\n".encode("latin-1"))
    for name in ("none.csv", "latin.csv", "."):
        with pytest.raises(UserError, match=r"the manifest .* cannot be read"):
            ArtFolder(art, manifest=tmp_path / name)
