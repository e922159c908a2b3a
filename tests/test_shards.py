"""Art larger than memory: shards of pictures and of tokens, read when they are wanted and always in the same order."""

from __future__ import annotations

import functools
import io
import itertools
import pickle
import tarfile
import threading
import tracemalloc
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from igpt.config import GPTConfig
from tests.painting import COLOURS, paint
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import LISTED, Crops, shuffled
from train.shards import ArtShards, Labelled, TokenShards, shard_file, shards_of, write_index, write_shard
from train.tokens import TokenWindows


def put(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    tar.addfile(about, io.BytesIO(content))


def png(seed: int, side: int, label: str) -> bytes:
    file = io.BytesIO()
    paint(seed, COLOURS[label], (side, side)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, first: int, pictures: int, side: int = 32) -> None:
    """Pictures of both labels in turns, as WebDataset keeps them: KEY.png with KEY.cls beside it."""
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + pictures):
            label = ("red", "blue")[i % 2]
            put(tar, f"{i:06d}.png", png(i, side, label))
            put(tar, f"{i:06d}.cls", label.encode())


def write_tars(folder: Path, counts: list[int]) -> str:
    """Shards of so many pictures, and the pattern that names them."""
    for shard, count in enumerate(counts):
        write_tar(folder / f"shard-{shard:04d}.tar", sum(counts[:shard]), count)
    return f"{folder}/shard-{{0000..{len(counts) - 1:04d}}}.tar"


def unit(art: ArtShards, shard: int) -> list[Labelled]:
    return [found for opened in art.unit(shard) if (found := opened()) is not None]


# Pictures


def test_a_pattern_names_shards_and_missing_or_short_ones_are_named(tmp_path: Path) -> None:
    pattern = write_tars(tmp_path, [2, 2, 2])
    assert shards_of(pattern) == shards_of(f"{tmp_path}/*.tar") and len(shards_of(pattern)) == 3
    with pytest.raises(UserError, match=r"shard-0003\.tar is missing"):
        shards_of(pattern.replace("0002", "0004"))
    whole = (tmp_path / "shard-0001.tar").read_bytes()
    for content, what in ((whole[:700], "short"), (b"no archive" * 100 + bytes(1024), r"no \.tar"), (b"", r"no \.tar")):
        (tmp_path / "shard-0001.tar").write_bytes(content)
        with pytest.raises(UserError, match=rf"shard-0001\.tar is {what}"):
            ArtShards(pattern)


def test_no_shard_is_looked_into_before_it_is_wanted(tmp_path: Path) -> None:
    pattern = write_tars(tmp_path, [40, 40])
    with tarfile.open(tmp_path / "shard-0001.tar", "w") as tar:
        put(tar, "notes.txt", b"no picture")
    art = ArtShards(pattern)
    with pytest.raises(UserError, match=r"no picture in the shard .*shard-0001\.tar"):
        for k in range(16):
            art.sample(k, [], 0)


def test_every_sample_is_a_pure_function_of_its_number_and_held_out_pictures_are_never_learned(tmp_path: Path) -> None:
    pattern = write_tars(tmp_path, [60, 60, 20])
    art, again = ArtShards(pattern), ArtShards(pattern)
    held_out = {item.picture.tobytes() for shard in range(3) for item in unit(art, shard) if item.held_out}
    seen = Counter(art.sample(k, [], 3).tobytes() for k in range(3000))
    backwards = Counter(again.sample(k, [], 3).tobytes() for k in reversed(range(3000)))
    assert seen == backwards and held_out and not held_out & seen.keys()
    assert len(seen) == 140 - len(held_out), "all others are"
    crops = [Crops(each, [], 16, 3, (1.0, 1.5), True) for each in (art, again)]
    assert torch.equal(crops[0][77], crops[1][77]) and crops[0][77].shape == (3, 16, 16)
    train, val = art.split()
    assert {art.picture(number).tobytes() for number in val} == held_out and 130 < len(train) < 150, "about"


def test_pictures_of_large_and_small_shards_are_seen_equally_often(tmp_path: Path) -> None:
    art = ArtShards(write_tars(tmp_path, [64, 8]))
    small = {item.picture.tobytes() for item in unit(art, 1)}
    visits = Counter(shard for shard, _, _ in art.visits)
    assert visits == {0: 8, 1: 1}
    shares = Counter(art.sample(k, [], 0).tobytes() in small for k in range(0, 9 * 1024 * 8, 16))
    assert 0.08 < shares[True] / shares.total() < 0.14


def test_labels_come_from_beside_the_picture_else_from_its_folder_else_from_the_shards(tmp_path: Path) -> None:
    (tmp_path / "art").mkdir()
    with tarfile.open(tmp_path / "art" / "a.tar", "w") as tar:
        for name in ("1.png", "blue/2.png", "3.png"):
            put(tar, name, png(1, 32, "red"))
        put(tar, "1.cls", b"red\n")
        put(tar, "4.png", b"broken")
        put(tar, "5.png", png(1, 8, "red"))  # too small
    labels = [item.label for item in unit(ArtShards(f"{tmp_path}/art/*.tar"), 0)]
    assert labels == ["red", "art", "blue"]


def test_shards_are_fetched_from_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local = write_tars(tmp_path, [10, 10])
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        far = ArtShards(address + Path(local).name)
        assert far.shards[1] == f"{address}shard-0001.tar"
        pictures = [[item.picture.tobytes() for item in unit(art, 1)] for art in (far, ArtShards(local))]
        assert pictures[0] == pictures[1]
        with pytest.raises(UserError, match=r"other\.tar cannot be fetched"):
            ArtShards(f"{address}other.tar")
        server.shutdown()


# Tokens


def token_shards(folder: Path, counts: list[tuple[int, int]], side: int = 4) -> TokenShards:
    """Grids that say which picture they are of: all tokens of picture i of the collection are i, its label is i % 2."""
    number = 0
    for shard, pair in enumerate(counts):
        parts: list[list[tuple[list[torch.Tensor], str]]] = []
        for count in pair:
            numbers = range(number, number := number + count)
            parts.append(
                [([torch.full((side, side * wide), i) for wide in (1, 2)], ("blue", "red")[i % 2]) for i in numbers]
            )
        write_shard(shard_file(folder, shard), parts, "these")
    write_index(folder, len(counts), 2)
    return TokenShards(folder)


def test_tokens_come_back_from_shards_those_to_learn_from_first(tmp_path: Path) -> None:
    tokens = token_shards(tmp_path, [(3, 1), (0, 2), (2, 0)])
    assert (len(tokens), tokens.train, tokens.val) == (8, range(5), range(5, 8))
    assert [int(tokens.grid(i, 1)[0, 0]) for i in range(8)] == [0, 1, 2, 6, 7, 3, 4, 5]
    assert [tokens.label(i) for i in range(8)] == [0, 1, 0, 0, 1, 1, 0, 1]
    assert tokens.grid(3, 0).shape == (4, 4) and tokens.grid(3, 1).shape == (4, 8) and tokens.names == ["blue", "red"]
    sent = pickle.loads(pickle.dumps(tokens))
    assert torch.equal(sent.grid(6, 1), tokens.grid(6, 1)) and len(pickle.dumps(tokens)) < 1000


def test_samples_of_token_shards_are_ready_to_be_batched(tmp_path: Path) -> None:
    tokens = token_shards(tmp_path, [(3, 1), (2, 0)])
    windows = TokenWindows(tokens, tokens.train, GPTConfig(64, 2, cells=4), 0, label_dropout=0.5)
    batch = torch.utils.data.default_collate([windows[k] for k in range(16)])
    assert batch["cells"].shape == (16, 4, 4) and batch["label"].dtype == torch.int64


def test_tokens_take_no_memory_before_they_are_used(tmp_path: Path) -> None:
    token_shards(tmp_path, [(2000, 100), (2000, 100)], side=8)
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    tracemalloc.start()
    try:
        tokens = TokenShards(tmp_path)
        for k in range(0, 4000, 7):
            tokens.grid(shuffled(4000, k, 0), 0)
        assert tracemalloc.get_traced_memory()[1] < 300_000 < on_disk / 3
    finally:
        tracemalloc.stop()


def test_broken_tokens_are_named(tmp_path: Path) -> None:
    token_shards(tmp_path, [(3, 1)])
    shard_file(tmp_path, 0).write_bytes(b"\x08" + bytes(7) + b"no-json!")
    with pytest.raises(UserError, match="tokens-000000"):
        TokenShards(tmp_path).grid(0, 0)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UserError, match="no readable tokens"):
        TokenShards(tmp_path)


def test_more_items_than_a_list_should_hold_are_shuffled_without_one() -> None:
    n = LISTED + 1000
    first, second = ([shuffled(n, epoch * n + i, seed=1) for i in range(n)] for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(n))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10
    assert 0.3 < sum(abs(a - b) for a, b in itertools.pairwise(first)) / n**2 < 0.37, "neighbours lie apart"
    assert shuffled(10**9, 10**12 + 7, 0) < 10**9
