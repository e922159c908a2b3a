"""Odd inputs for `tests.fuzz`: how they are drawn, kind by kind, and what is done with them."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import os
import shutil
import struct
import sys
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

import igpt
from igpt.cli import main
from igpt.config import SamplingOptions
from igpt.image_gpt import ImageGPT
from igpt.lora import apply_lora, save_adapter
from igpt.recipe import EXIF_PREFIX, Recipe, read_recipe
from tests.painting import paint
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.images import open_picture
from tokenizer_vq.palette import PaletteTokenizer

FORMATS = "PNG JPEG GIF WEBP BMP DIB TIFF PPM TGA JPEG2000 AVIF MPO ICO PCX SGI DDS IM MSP QOI ICNS SPIDER XBM".split()
MODES = ("RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB")

# Bytes


def encoded(format: str, mode: str) -> bytes:
    """A small picture in that format, empty where Pillow cannot write it so."""
    file = io.BytesIO()
    try:
        paint(1, (200, 40, 40), (24, 20)).convert("L" if mode[0] in "IF" else mode).convert(mode).save(file, format)
    except (OSError, ValueError, KeyError, TypeError):
        return b""
    return file.getvalue()


@functools.cache
def pictures() -> list[bytes]:
    """Small pictures in all formats and modes that Pillow writes, and an animation."""
    found = [data for format in FORMATS for mode in MODES if (data := encoded(format, mode))]
    moving = io.BytesIO()
    frames = [paint(i, (40, 60, 200), (20, 20)) for i in range(3)]
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    return [*found, moving.getvalue()]


@st.composite
def spoilt(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """One of the originals with up to six changes, most of them near its beginning; now and then no change."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 6))):
        at = int(len(data) * draw(st.floats(0, 1)) ** 3)
        how = draw(st.sampled_from(("bit", "byte", "number", "cut", "insert", "repeat", "drop")))
        if how == "bit" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "byte":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif how == "number":
            order = draw(st.sampled_from((">", "<")))
            data[at : at + 4] = struct.pack(
                f"{order}I", draw(st.sampled_from((0, 1, 255, 65535, 2**31 - 1, 2**32 - 1)))
            )
        elif how == "cut":
            del data[at:]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=12))
        elif how == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            del data[at : at + draw(st.integers(1, 64))]
    return bytes(data)


def with_checksums(png: bytes) -> bytes:
    """A PNG with its checksums set right, so that changes get past them."""
    data, at = bytearray(png), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if at + 12 + length > len(data):
            break
        data[at + 8 + length : at + 12 + length] = struct.pack(">I", zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(data)


# JSON

NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    17,
    255,
    4096,
    65537,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e-9,
    1e308,
    float("nan"),
    float("inf"),
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.text(max_size=6)
    | st.sampled_from(("vq", "palette", "none")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def _places(record: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = list(record) if isinstance(record, dict) else range(len(record)) if isinstance(record, list) else ()
    return [place for key in keys for place in [(*above, key), *_places(record[key], (*above, key))]]


@st.composite
def other_json(draw: st.DrawFn, original: dict[str, Any]) -> str:
    """The record with up to three values replaced, taken out or put in."""
    record = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(0, 3))):
        if not (places := _places(record)):
            break
        *above, last = draw(st.sampled_from(places))
        owner = functools.reduce(lambda part, key: part[key], above, record)
        how = draw(st.sampled_from(("replace", "replace", "drop", "add")))
        if how == "drop":
            del owner[last]
        elif how == "add" and isinstance(owner, dict):
            owner[draw(st.text(max_size=6))] = draw(values)
        else:
            owner[last] = draw(values)
    return json.dumps(record)


# Pictures


def picture_cases() -> st.SearchStrategy[Any]:
    return st.tuples(spoilt(pictures()), st.booleans(), st.sampled_from(("picture", "folder", "vary", "complete")))


def use_picture(model: ImageGPT, case: Any) -> None:
    """Open it, as bytes and from a file, and learn or draw from it."""
    data, mended, how = case
    data = with_checksums(data) if mended and data.startswith(b"\x89PNG") else data
    path = Path("out") / "red" / "odd.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    try:
        if how == "picture":
            assert open_picture(path).mode == open_picture(data).mode == "RGB"
        elif how == "folder":
            paint(2, (40, 60, 200)).save(path.with_name("good.png"))
            art = ArtFolder("out")
            assert len(art) + len(art.skipped) == 2
        elif how == "vary":
            model.vary(path, 0.3, steps=1)
        else:
            model.complete(path, "left", steps=1)
    finally:
        shutil.rmtree("out")


# Archives


ODD_NAMES = ("red/0.png", "red/0.png", "../up.png", "/tmp/igpt-odd.png", "é" * 60 + "/1.png")


@functools.cache
def archives() -> list[bytes]:
    """A plain .tar in three dialects and a .zip, full of what a stranger might put into one."""
    packed, found = io.BytesIO(), []
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file_of_many, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the name that comes twice
        for i, name in enumerate(ODD_NAMES):
            file_of_many.writestr(name, pictures()[i])
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=format) as tar:
            for i, name in enumerate(ODD_NAMES):
                data = pictures()[i]
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
                member = tarfile.TarInfo("blue/link.png")
                member.type, member.linkname = kind, "/etc/passwd"
                tar.addfile(member)
        found.append(file.getvalue())
    return [*found, packed.getvalue()]


def use_archive(model: ImageGPT, case: tuple[bytes, bool]) -> None:
    """Take pictures out of it, as it is or compressed."""
    path, (data, compressed), rest = Path("out") / "art.tar", case, Path("out").absolute() / "unpacked"
    rest.mkdir(parents=True)
    path.write_bytes(gzip.compress(data, 1) if compressed else data)
    tempfile.tempdir = str(rest)
    try:
        art = ArtFolder(path)
        for i in range(len(art)):
            assert art.picture(i).size == art.sizes[i]
        del art
        assert not any(rest.iterdir()), "what was unpacked goes with its owner"
    finally:
        tempfile.tempdir = None
        shutil.rmtree("out")


# Models


def model_cases(folder: Path) -> st.SearchStrategy[Any]:
    config = json.loads((folder / "config.json").read_text())
    config["provenance"] = {"sampling": {"steps": 2}, "default_labels": ["red"], "pictures": 3}
    weights = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    packed = st.builds(
        lambda text, more: struct.pack("<Q", len(text.encode()) + more) + text.encode() + weights[8 + length :],
        other_json(header),
        st.sampled_from((0, 0, 0, 1, -1, 2**40)),
    )
    scales = [name for name in header if name.endswith(".scale")]

    @st.composite
    def scaled(draw: st.DrawFn) -> bytes:
        data, (begin, end) = bytearray(weights), header[draw(st.sampled_from(scales))]["data_offsets"]
        at = 8 + length + begin + 4 * draw(st.integers(0, (end - begin) // 4 - 1))
        data[at : at + 4] = draw(st.binary(min_size=4, max_size=4))
        return bytes(data)

    configs = other_json(config).map(str.encode) | spoilt([json.dumps(config).encode()])
    return st.tuples(configs, st.just(weights)) | st.tuples(
        st.just(json.dumps(config).encode()), packed | spoilt([weights]) | scaled()
    )


def use_model(model: ImageGPT, case: tuple[bytes, bytes]) -> None:
    """Load it, tell about it and draw with it."""
    folder = Path("out") / "model"
    folder.mkdir(parents=True)
    for name, data in zip(("config.json", "model.safetensors"), case, strict=True):
        (folder / name).write_bytes(data)
    try:
        command("info", str(folder))
        found = igpt.load(folder, "cpu")
        found.generate(size=16, seed=1, options=SamplingOptions(steps=1))
        command("generate", "--model", str(folder), "--size", "16", "--seed", "1", "--out", "out/pictures")
    finally:
        shutil.rmtree("out")


# Adapters


def adapter_cases(folder: Path) -> st.SearchStrategy[Any]:
    model = igpt.load(folder, "cpu")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "adapter.safetensors"
        names = ("tiny", model.weights_hash)
        save_adapter(path, apply_lora(model.gpt, 2), model.labels, names, {"sampling": {"steps": 2}})
        whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    about = json.loads(header["__metadata__"]["igpt-adapter"])

    def packed(text: str) -> bytes:
        data = json.dumps(header | {"__metadata__": {"igpt-adapter": text}}).encode()
        return struct.pack("<Q", len(data)) + data + whole[8 + length :]

    return spoilt([whole]) | other_json(about).map(packed)


def use_adapter(model: ImageGPT, data: bytes) -> None:
    """Draw with it."""
    path = Path("out") / "adapter.safetensors"
    path.parent.mkdir()
    path.write_bytes(data)
    try:
        igpt.load("tiny", "cpu", adapter=path).generate(size=16, seed=1, steps=1)
    finally:
        shutil.rmtree("out")


# Recipes


def recipe_cases(folder: Path) -> st.SearchStrategy[Any]:
    model = igpt.load(folder, "cpu")
    recipe = Recipe(
        "tiny", model.weights_hash, "red", 1, (16, 16), SamplingOptions(steps=2), (4, 4), (3,) * 16, given=(True,) * 16
    )
    texts, sides = other_json(json.loads(recipe.to_json())) | st.text(max_size=40), st.sampled_from((16, 20))
    suffixes = st.sampled_from((".png", ".png", ".webp", ".jpg"))
    return st.tuples(texts, sides, suffixes) | st.tuples(texts, sides, suffixes, st.just("--from-tokens"))


def use_recipe(model: ImageGPT, case: Any) -> None:
    """Show it, draw from it again, and edit the picture that carries it."""
    text, side, suffix, *more = case
    path, chunks, exif = Path("out") / f"a{suffix}", PngInfo(), Image.Exif()
    path.parent.mkdir()
    chunks.add_text("igpt", text.encode("latin-1", "replace").decode("latin-1"))
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = EXIF_PREFIX + text.encode(errors="replace")
    how: dict[str, Any] = {"pnginfo": chunks} if suffix == ".png" else {"exif": exif}
    try:
        paint(1, (200, 40, 40), (side, side)).save(path, **how)
        with contextlib.suppress(UserError):
            command("show", str(path))
        read_recipe(path)
        model.vary(path, steps=1)
        command("vary", str(path), "--model", "tiny", "--out", "out/c.png", "--steps", "1", "--seed", "1")
        command("replay", str(path), "--model", "tiny", "--out", "out/b.png", *more)
    finally:
        shutil.rmtree("out")


# Palettes


def palette_cases() -> st.SearchStrategy[Any]:
    gimp = b"GIMP Palette\nName: x\nColumns: 4\n# comment\n  0   0   0 Black\n255 255 255\tWhite\n 17  34 51\n"
    lines = b"081820\n#346856\n88c070\r\n"
    fitting = st.tuples(st.just("a.gpl"), spoilt([gimp])) | st.tuples(st.just("a.hex"), spoilt([lines]))
    return fitting | st.tuples(st.sampled_from(("a.gpl", "a.hex", "a.GPL", "a.txt")), spoilt([gimp, lines]))


def use_palette(model: ImageGPT, case: tuple[str, bytes]) -> None:
    """Make a tokenizer of it and paint with that."""
    path = Path("out") / case[0]
    path.parent.mkdir()
    path.write_bytes(case[1])
    try:
        tokenizer = PaletteTokenizer.from_file(path)
        assert 1 <= tokenizer.vocab_size <= 4096
    finally:
        shutil.rmtree("out")


# Command lines

PICTURES = ("a.png", "b.png", "art/red/0.png")
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {  # with what usually comes as its arguments
    "generate": (),
    "complete": (PICTURES,),
    "inpaint": (PICTURES, PICTURES),
    "extend": (PICTURES,),
    "vary": (PICTURES,),
    "blend": (PICTURES, PICTURES),
    "replay": (PICTURES,),
    "show": (PICTURES,),
    "info": (("tiny", "pixels"),),
    "tokenize": (PICTURES, PICTURES),
    "evaluate": (("tiny",), ("art",)),
    "audit": (PICTURES, PICTURES),
    "surprise": (PICTURES,),
    "train": (("art",),),
    "finetune": (("art",),),
    "lock": (("tiny",),),
    "unlock": (("a.png",),),
    "": (),
    "no-such": (),
}
PLACES = ("tiny", "tiny/config.json", "art", "no-such", "", "-", "..", "/", "/etc/passwd", "/dev/null", "a.png/b", "\0")
FLAGS = {
    "--size": ("16", "24x16", "0", "-1", "x", "16x", "9999999", "8", "١٦", "16.0", "1e3"),
    "--seed": ("0", "1", "-1", str(2**63 - 1), str(2**63), "x", "1.5", ""),
    "-n": ("1", "2", "0", "-1", "x", "1e1"),
    "--label": ("red", "none", "any", "green", "", "-red", "\udcff", "r" * 3000),
    "--model": ("tiny", "tiny/", "no-such", "a.png", "art", "", "pixels/x", "../x", "\0", "x" * 5000),
    "--adapter": ("a.png", "no-such", "tiny/model.safetensors", "art", ""),
    "--out": ("out", "out/x.png", "out/x.jpg", "a.png/x", "out/\udcff", "out/" + "x" * 300 + ".png", "out/.png"),
    "--steps": ("1", "2", "0", "-1", "99999999999999999999", "nan"),
    "--temperature": ("0", "1", "-1", "inf", "1e300"),
    "--top-k": ("0", "1", "-1", "99999999999"),
    "--top-p": ("1", "0.1", "0", "2", "1e-300"),
    "--guidance": ("0", "5", "-1", "101", "nan"),
    "--order": ("raster", "random", "spiral"),
    "--keep": ("left", "0.5", "0", "1", "0.0001", "x", "nan", "inf"),
    "--anchor": ("left", "center", "x"),
    "--strength": ("0", "1", "0.5", "-1", "2", "nan"),
    "--mix": ("0", "1", "0.5", "2", "x"),
    "--timelapse": ("gif", "webp", "mp4", ""),
    "--device": ("cpu", "cuda", "mps", "toaster", "cpu:7", "meta", ""),
    "--against": ("art", "a.png", "no-such", ""),
    "--orders": ("1", "0", "1001", "x"),
    "--samples": ("1", "4", "0", "-1", "x"),
    "--recipient": ("age1x", "", "\udcff"),
    "--identity": ("a.png", "no-such", ""),
    "--preset": ("toy", "huge"),
    "--manifest": ("a.png", "no-such"),
}
SWITCHES = ("--tile", "--sheet", "--force", "--quiet", "--from-tokens", "--help", "--version", "--", "-x", "--no-flip")


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command, its arguments, mostly fitting ones, and up to six flags that it may have or not."""
    words = [draw(st.sampled_from(tuple(COMMANDS)))]
    odd = draw(st.booleans())
    words += [draw(st.sampled_from(PLACES if odd else usual)) for usual in COMMANDS[words[0]]]
    words += draw(st.lists(st.sampled_from(PLACES), max_size=2)) if odd else []
    for flag in draw(st.lists(st.sampled_from((*FLAGS, *SWITCHES)), max_size=6 if odd else 2)):
        words.append(flag)
        if flag in FLAGS and draw(st.integers(0, 19)):  # now and then the value is missing
            words.append(draw(st.sampled_from(FLAGS[flag])))
    return words


SMALL = {  # keeps what takes time short
    "generate": ["--size=16", "--steps=1"],
    "extend": ["--size=24x20", "--steps=1"],
    "evaluate": ["--samples=1"],
    "audit": ["--against=art"],
    "surprise": ["--orders=1"],
    "train": ["--preset=toy", "--quiet", "--tokenizer-crops=16", "--gpt-samples=16"],
    "finetune": ["--samples=4", "--quiet", "--minutes=0.05"],
}
DRAWN = ("generate", "complete", "inpaint", "extend", "vary", "blend", "tokenize", "audit", "surprise", "finetune")


def use_words(model: ImageGPT, words: list[str]) -> None:
    """Run it, with what takes time kept small, the tiny model and results in `out`; all but that may be overruled."""
    first = words[0]
    more = [*(["--model=tiny"] if first in DRAWN else []), *SMALL.get(first, [])]
    if first not in ("", "no-such", "show", "info"):
        more.append("--out=out")
    try:
        command(first, *more, *words[1:])
    finally:
        shutil.rmtree("out", ignore_errors=True)


def command(*words: str) -> None:
    """Run a command line: it must end with 0, or with 2 and one sentence. Raises UserError with that sentence."""
    began = len(sys.stderr.getvalue())  # type: ignore[attr-defined]
    try:
        status = main(words)
    except SystemExit as stopped:  # --help and --version
        status = stopped.code if isinstance(stopped.code, int) else 1
    said = sys.stderr.getvalue()[began:]  # type: ignore[attr-defined]
    if status == 2:
        *_, last = said.splitlines() or [""]
        assert last.startswith("igpt: ") and "Traceback" not in said, said
        raise UserError(last)
    assert status == 0, (status, said)


# Locked models


def locked_cases(folder: Path) -> st.SearchStrategy[Any]:
    import pyrage

    from igpt import checkpoint, locked

    key = pyrage.x25519.Identity.generate()
    whole = locked.lock(checkpoint.read_files(folder), [key.to_public()])
    other = pyrage.encrypt(whole, [key.to_public()])
    inside = spoilt([bytes(pyrage.decrypt(whole, [key]))]).map(lambda data: pyrage.encrypt(data, [key.to_public()]))
    return st.tuples(st.just(str(key)), spoilt([whole, other]) | inside)


def use_locked(model: ImageGPT, case: tuple[str, bytes]) -> None:
    """Load it with the right key."""
    Path("out").mkdir()
    path, key = Path("out") / "a.age", Path("out") / "key"
    path.write_bytes(case[1])
    key.write_text(case[0])
    os.environ["IGPT_IDENTITY"] = str(key)
    try:
        igpt.load(path, "cpu")
        command("unlock", str(path), "--out", "out/open")
    finally:
        del os.environ["IGPT_IDENTITY"]
        shutil.rmtree("out")


Kind = tuple[st.SearchStrategy[Any], Callable[[ImageGPT, Any], None]]
KINDS: dict[str, Callable[[Path], Kind]] = {
    "pictures": lambda folder: (picture_cases(), use_picture),
    "archives": lambda folder: (st.tuples(spoilt(archives()), st.booleans()), use_archive),
    "models": lambda folder: (model_cases(folder), use_model),
    "adapters": lambda folder: (adapter_cases(folder), use_adapter),
    "recipes": lambda folder: (recipe_cases(folder), use_recipe),
    "palettes": lambda folder: (palette_cases(), use_palette),
    "words": lambda folder: (command_lines(), use_words),
    "locked": lambda folder: (locked_cases(folder), use_locked),
}
