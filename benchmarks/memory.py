"""How memory grows with the number of pictures: synthetic shards, read, encoded and learned from in fresh processes.

For each number of pictures (PNGs of 16x16 pixels, SIZE a shard) one process takes crops of it and one encodes it, both
with a tiny tokenizer, and one takes a few steps of a tiny GPT on the tokens. Numbers beyond --encoded are not drawn and
encoded: their token shards are made directly, of random tokens, 32x32 a picture. Printed is the peak of memory that is
a process's own (RssAnon) above what it had after loading its libraries; mapped files that the system may drop at any
time are not in it. Not a test: no times.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import default_collate

from igpt.config import GPTConfig
from igpt.model import GPT
from tokenizer_vq.dataset import Crops
from tokenizer_vq.vq import VQConfig, VQTokenizer
from train.folder import Run
from train.options import PRESETS, TrainOptions
from train.shards import ArtShards, TokenShards, shard_file, write_index, write_shard
from train.tokens import TokenWindows, encode

SIZE = 1000  # pictures a shard
SAMPLES = 4000


def own_memory() -> float:
    """MB of this process alone, without mapped files."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


def draw_shards(folder: Path, pictures: int) -> str:
    """Pictures of one colour each, and the pattern that names their shards."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-pictures // SIZE)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard * SIZE, min(pictures, (shard + 1) * SIZE)):
                file = io.BytesIO()
                Image.new("RGB", (16, 16), (i % 256, i // 256 % 256, i // 65536)).save(file, "PNG")
                about = tarfile.TarInfo(f"{i:08d}.png")
                about.size = len(file.getvalue())
                tar.addfile(about, io.BytesIO(file.getvalue()))
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def draw_tokens(folder: Path, pictures: int) -> None:
    """Token shards of random tokens, 32x32 a picture, one view."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-pictures // (10 * SIZE))
    for shard in range(shards):
        count = min(pictures, (shard + 1) * 10 * SIZE) - shard * 10 * SIZE
        grids = torch.randint(4096, (count, 32, 32), generator=torch.Generator().manual_seed(shard)).to(torch.uint16)
        rows = [([grid_hw], "art") for grid_hw in grids]
        write_shard(shard_file(folder, shard), (rows[: count * 19 // 20], rows[count * 19 // 20 :]), "made directly")
    write_index(folder, shards, 1)


def most_memory(work: Callable[[], object]) -> float:
    """The most memory that it takes, in MB, looked at a hundred times a second."""
    before, seen, done = own_memory(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            seen.append(own_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen)


def take_crops(pattern: str) -> None:
    crops = Crops(ArtShards(pattern), [], 16, 0, (1.0, 1.0), flip=True)
    for k in range(SAMPLES):
        crops[k]


def encode_all(pattern: str, work: Path) -> None:
    """With a tiny tokenizer."""
    art, options = ArtShards(pattern), TrainOptions(quiet=True, perceptual="none", views=1)
    tokenizer = VQTokenizer(VQConfig(channels=(32,), codes=64, encoder_blocks=1, decoder_blocks=1))
    encode(Run(art, *art.split(), options, work, PRESETS["toy"]), tokenizer)


def learn(folder: Path) -> None:
    """Samples of tokens, through a tiny GPT."""
    tokens, config = TokenShards(folder), GPTConfig(4096, 1, layers=2, width=32, heads=2, cells=16)
    windows, gpt = TokenWindows(tokens, tokens.train, config, 0), GPT(config)
    for k in range(0, SAMPLES, 16):
        batch = default_collate([windows[i] for i in range(k, k + 16)])
        gpt(batch["cells"], batch["positions"], batch["label"]).mean().backward()


def measured(name: str, place: str, work: Path) -> float:
    """The most memory of one act, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--act", name, place, str(work)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--encoded", type=int, default=100_000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--act", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.act:
        name, place, work = args.act
        acts = {
            "crops": lambda: take_crops(place),
            "encode": lambda: encode_all(place, Path(work)),
            "learn": lambda: learn(Path(place)),
        }
        print(most_memory(acts[name]))
        return
    print("pictures | crops, MB | encoding, MB | learning, MB | tokens on disk, MB", flush=True)
    for pictures in args.pictures:
        with tempfile.TemporaryDirectory() as folder:
            work, row = Path(folder) / "work", [f"{pictures:,}"]
            if pictures <= args.encoded:
                pattern = draw_shards(Path(folder) / "art", pictures)
                row += [f"{measured(name, pattern, work):.0f}" for name in ("crops", "encode")]
            else:
                draw_tokens(work / "tokens", pictures)
                row += ["-", "-"]
            row.append(f"{measured('learn', str(work / 'tokens'), work):.0f}")
            tokens = sum(path.stat().st_size for path in (work / "tokens").iterdir()) / 1e6
            assert sum(map(sum, json.loads((work / "tokens" / "index.json").read_text())["counts"])) == pictures
            print(" | ".join((*row, f"{tokens:.0f}")), flush=True)


if __name__ == "__main__":
    main()
