"""Art larger than memory: pictures from WebDataset shards, and token shards that are mapped into memory.

A shard is a .tar of pictures: `shard-{0000..0009}.tar`, `shards/*.tar`, `https://host/{00..99}.tar`. Notable choices:
- a shard is listed when one of its pictures is wanted and not before, a picture is decoded when it is learned from;
- training sample k is a pure function of (seed, k), so that a run goes on exactly, also with more or fewer processes;
- LANES shards are read at the same time and mixed, BLOCK samples of each before the next shard comes in; large
  shards have more visits, so that pictures are seen equally often whatever shard they lie in;
- held out are the pictures whose SHA-256 is low, as in a folder: exact copies share a side, wherever they lie.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from igpt.files import atomic_write
from tokenizer_vq.archives import Entry, files_in_archive
from tokenizer_vq.base import UserError, complaint
from tokenizer_vq.dataset import MIN_SIDE, VALIDATION_SHARE, ArtFolder, shuffled
from tokenizer_vq.images import PICTURE_SUFFIXES, UnreadablePicture, open_picture

from .state import peek

LANES = 8  # shards that are read at the same time
BLOCK = 1024  # samples in a row of a lane before its next shard
VISITS = 8  # of the largest shard in a pass over all
HELD_OUT_KEPT, LOOKED_AT = 96, 4096  # held-out pictures of a tokenizer, among so many
SIZED = 64  # pictures that tell the usual size
MAPPED = 256  # token files that are mapped at the same time
INDEX = ("views", "names", "counts")  # of token shards
LABEL_SUFFIX = ".cls"  # of the file beside a picture that names its label

# Pictures


class Labelled(NamedTuple):
    """A picture to encode."""

    picture: Image.Image
    label: str
    held_out: bool


def shards_of(pattern: str) -> list[str]:
    """The shards that a pattern with `*` or `{0000..0009}` names. Raises UserError where some are missing or short."""
    if numbers := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = numbers.groups()
        counted = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        return [shard for i in counted for shard in shards_of(pattern.replace(numbers[0], i, 1))]
    found = [pattern] if "://" in pattern else sorted(glob.glob(os.path.expanduser(pattern)))
    if not found:
        raise UserError(f"the shard {pattern} is missing")
    for shard in found:
        if "://" not in shard:
            _check_whole(Path(shard))
    return [shard if "://" in shard else os.path.abspath(shard) for shard in found]


def _check_whole(shard: Path) -> None:
    """Raises UserError for what does not begin with the header of a .tar, or does not end with two empty blocks of 512
    bytes as one does (POSIX pax)."""
    with complaint(f"the shard {shard} cannot be read", OSError), shard.open("rb") as file:
        begins = file.read(262).endswith(b"ustar")
        file.seek(-min(1024, shard.stat().st_size), os.SEEK_END)
        ends = file.read() == bytes(1024)
    if not (begins and ends):
        what = "short" if begins else "no .tar"
        raise UserError(f"the shard {shard} is {what}: a whole, uncompressed .tar is wanted")


def _on_disk(shard: str) -> Path:
    """Where a shard lies; one with an address is fetched first and stays in the cache."""
    if "://" not in shard:
        return Path(shard)
    try:
        from webdataset.cache import FileCache
    except ImportError:
        raise UserError(f"fetching {shard} wants webdataset: pip install 'igpt[cluster]'") from None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "igpt" / "shards"
    with complaint(f"the shard {shard} cannot be fetched", OSError, ValueError):
        fetched = Path(FileCache(str(folder)).get_file(shard))
    _check_whole(fetched)
    return fetched


@lru_cache(maxsize=2 * LANES)
def _listed(shard: str) -> tuple[list[Entry], dict[str, Entry]]:
    """The pictures of a shard in the order of their names, and the files that name their labels."""
    files, _ = files_in_archive(_on_disk(shard), None)
    pictures = [entry for entry in files if PurePosixPath(entry.name).suffix.lower() in PICTURE_SUFFIXES]
    if not pictures:
        raise UserError(f"there is no picture in the shard {shard}")
    return pictures, {entry.name: entry for entry in files if entry.name.endswith(LABEL_SUFFIX)}


def _opened(entry: Entry) -> tuple[Image.Image | None, bool]:
    """A picture, None where it cannot be used; and whether it is held out."""
    try:
        content = entry.read()
        picture = open_picture(content, entry.name)
    except UnreadablePicture:
        return None, False
    held_out = int(hashlib.sha256(content).hexdigest()[:16], 16) < VALIDATION_SHARE * 2**64
    return (picture if min(picture.size) >= MIN_SIDE else None), held_out


class ArtShards(ArtFolder):
    """Pictures in shards. Of ArtFolder it has what a training uses. A picture that cannot be used is passed
    over, and the next one is taken. The label is what the file `KEY.cls` beside `KEY.png` says, without one the folder
    of the key, without one the folder of the shards. Raises UserError where shards are missing or short."""

    def __init__(self, pattern: str):
        self.shards = shards_of(pattern)
        self.labels, self.skipped = [], []  # known when all pictures are encoded; not counted
        self.top = PurePosixPath(pattern).parent.name or "pictures"
        bytes_of = [0 if "://" in shard else os.path.getsize(shard) for shard in self.shards]
        visits = [max(1, round(VISITS * size / max(1, *bytes_of))) for size in bytes_of]
        self.visits = [(shard, visit, of) for shard, of in enumerate(visits) for visit in range(of)]
        self.identity = repr([*zip(self.shards, bytes_of, strict=True)])
        first, _ = _listed(self.shards[0])
        self.about = round(len(first) * len(self.visits) / visits[0])  # pictures in all, told from the first shard
        self.sizes = [picture.size for picture, _ in map(_opened, first[:SIZED]) if picture]

    @property
    def different(self) -> int:
        """About so many pictures there are, copies included."""
        return self.about

    @property
    def fingerprint(self) -> str:
        """A SHA-256 over the names and sizes of all shards."""
        return hashlib.sha256(self.identity.encode()).hexdigest()

    def split(self) -> tuple[Sequence[int], list[int]]:
        """A range as long as there are about pictures, and the numbers of some of the first that are held out; where
        none is, of the first few, which are also learned from."""
        shards = range(len(self.shards))
        numbers = (n * len(shards) + shard for shard in shards for n in range(len(_listed(self.shards[shard])[0])))
        held_out = (n for n in islice(numbers, LOOKED_AT) if _opened(self._entry(n))[1])
        return range(self.about), list(islice(held_out, HELD_OUT_KEPT)) or list(range(min(self.about, 8)))

    def _entry(self, number: int) -> Entry:
        place, shard = divmod(number, len(self.shards))
        pictures, _ = _listed(self.shards[shard])
        return pictures[place % len(pictures)]

    def picture(self, number: int, mode: str = "RGB") -> Image.Image:
        """The picture of a number: its place in its shard * shards + shard. Raises UnreadablePicture."""
        entry = self._entry(number)
        return open_picture(entry.read(), entry.name, mode)

    def sample(self, k: int, indices: Sequence[int], seed: int) -> Image.Image:
        """The picture of training sample k; indices do not matter. Raises UserError where a shard has none to learn
        from."""
        step, lane = divmod(k, LANES)
        block, place = step // BLOCK * LANES + lane, step % BLOCK
        shard, visit, of = self.visits[shuffled(len(self.visits), block, seed)]
        place += (block // len(self.visits) * of + visit) * BLOCK
        pictures, _ = _listed(self.shards[shard])
        chosen = shuffled(len(pictures), place, seed + shard)
        for i in range(len(pictures)):
            picture, held_out = _opened(pictures[(chosen + i) % len(pictures)])
            if picture is not None and not held_out:
                return picture
        raise UserError(f"the shard {self.shards[shard]} has no picture to learn from")

    def unit(self, shard: int) -> list[Callable[[], Labelled | None]]:
        """All pictures of a shard, to be opened; those that cannot be used are None then."""
        pictures, labels = _listed(self.shards[shard])
        return [partial(self._labelled, entry, labels) for entry in pictures]

    def _labelled(self, entry: Entry, labels: dict[str, Entry]) -> Labelled | None:
        picture, held_out = _opened(entry)
        if picture is None:
            return None
        label_file = labels.get(str(PurePosixPath(entry.name).with_suffix(LABEL_SUFFIX)))
        label = label_file.read().decode("utf-8", "replace").strip() if label_file else ""
        return Labelled(picture, label or entry.name.rpartition("/")[0] or self.top, held_out)


def open_art(art: str | Path, manifest: str | None = None, grid: int | None = None) -> ArtFolder:
    """What a training learns from: shards where `art` is a pattern or an address, else a folder or one .tar."""
    if os.path.exists(os.path.expanduser(art)) or not re.search(r"[*{]|://", str(art)):
        return ArtFolder(art, manifest=manifest, grid=grid)
    if manifest or grid:
        raise UserError("--manifest and --grid are for a folder or one archive, not for shards")
    return ArtShards(str(art))


# Tokens


class TokenShards:
    """The tokens of a collection of any size, in files that are mapped into memory: what is not used takes none.

    First come the pictures to learn from, then those that are held out, each in the order of the shards. Raises
    UserError where the folder holds no finished tokens.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        sentence = f"{folder} holds no readable tokens, delete it to encode again"
        with complaint(sentence, OSError, ValueError, KeyError, TypeError):
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            self.views, self.names, self.counts = (index[key] for key in INDEX)
        learned, held_out = zip(*self.counts, strict=True)
        self.ends = list(accumulate((*learned, *held_out)))
        self.train, self.val = range(sum(learned)), range(sum(learned), self.ends[-1])
        self._mapped = lru_cache(maxsize=MAPPED)(_mapped)  # its own: a file may be written anew for the next one

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenShards, (self.folder,)

    def __len__(self) -> int:
        return self.ends[-1]

    def _find(self, picture: int) -> tuple[Any, int]:
        """The file of a picture, and its place there."""
        part = bisect_right(self.ends, picture)
        held_out, shard = divmod(part, len(self.counts))
        place = picture - (self.ends[part - 1] if part else 0) + held_out * self.counts[shard][0]
        return self._mapped(shard_file(self.folder, shard)), place

    def label(self, picture: int) -> int:
        """The number of the label of a picture."""
        file, place = self._find(picture)
        return self.names.index(json.loads(file.metadata()["names"])[int(file.get_slice("labels")[place])])

    def grid(self, picture: int, view: int) -> Tensor:
        """Tokens [h, w] of one view of a picture, int64."""
        file, place = self._find(picture)
        start, h, w = file.get_slice("grids")[place * self.views + view].tolist()
        return file.get_slice("tokens")[start : start + h * w].long().view(h, w)


def shard_file(folder: Path, shard: int) -> Path:
    """Where the tokens of a shard lie."""
    return folder / f"tokens-{shard:06d}.safetensors"


def _mapped(path: Path) -> Any:
    with complaint(f"the tokens {path} cannot be read, delete them to encode again", OSError, SafetensorError):
        return safe_open(path, framework="pt")


def write_shard(path: Path, parts: Sequence[Sequence[tuple[list[Tensor], str]]], identity: str) -> None:
    """The views [h, w] and the label of each picture, of those to learn from and of those held out. Raises UserError
    where the disk refuses."""
    pictures = [picture for part in parts for picture in part]
    names = sorted({label for _, label in pictures})
    grids, rows, start = [torch.zeros(0, dtype=torch.uint16)], [], 0
    for grid_hw in (grid_hw for views, _ in pictures for grid_hw in views):
        rows.append((start, *grid_hw.shape))
        grids.append(grid_hw.flatten().to(torch.uint16))
        start += grid_hw.numel()
    tensors = {
        "tokens": torch.cat(grids),
        "grids": torch.tensor(rows, dtype=torch.int64).view(-1, 3),  # of each view: its first token, h, w
        "labels": torch.tensor([names.index(label) for _, label in pictures], dtype=torch.int32),
    }
    notes = {"identity": identity, "names": json.dumps(names), "counts": json.dumps([len(part) for part in parts])}
    with atomic_write(path) as file:
        save_file(tensors, file, notes)


def write_index(folder: Path, shards: int, views: int, names: Sequence[str] = ()) -> None:
    """What all shards have together: how many pictures each holds, and the names of labels (default: all that occur).
    Raises UserError where the disk refuses."""
    notes = [peek(shard_file(folder, shard)) for shard in range(shards)]
    names = list(names) or sorted({name for note in notes for name in json.loads(note["names"])})
    counts = [json.loads(note["counts"]) for note in notes]
    with atomic_write(folder / "index.json") as file:
        file.write_text(json.dumps(dict(zip(INDEX, (views, names, counts), strict=True))))
