"""Between the stages: every picture is encoded once, in several views, so that GPT training never sees a pixel."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from igpt.checkpoint import Tokenizer
from igpt.sizes import Grids
from tokenizer_vq.images import fit_cover, to_tensor

from .folder import Run, use_bf16, weights_fingerprint
from .processes import agreed, companions, processes, shared_out, together
from .shards import ArtShards, Labelled, TokenShards, shard_file, write_index, write_shard
from .state import catch_interrupt, peek

PICTURES_A_SHARD = 128  # of a folder
LONGEST = 2.0  # a view shows at most this many times its short side
ZOOM = 1.12  # views beyond the first four come closer, up to this
CLOSEST = 1.35  # a free view shows at least the short side of a picture over this
SMALL = 64  # pixels: pictures of a shorter side are pixel art, and are enlarged to crisp squares first


def view_of(picture: Image.Image, view: int, grids: Grids, flip: bool) -> Tensor:
    """View number `view` of a picture, [3, H, W]: 0 at the native short side, 1 as a whole on its composition's grid,
    2 and 3 the same mirrored, then the same again from a little closer."""
    zoom = 1 + (ZOOM - 1) * ((view // 4) % 4) / 3
    if flip and (view // 2) % 2:
        picture = ImageOps.mirror(picture)
    width, height = picture.size
    if view % 2:
        h, w = grids.composition(width, height)
    else:
        side = grids.native[0] * zoom
        aspect = min(max(width / height, 1 / LONGEST), LONGEST)
        h, w = (round(side), round(side * aspect)) if aspect >= 1 else (round(side / aspect), round(side))
    return to_tensor(fit_cover(picture, w * grids.downsample, h * grids.downsample))


def free_view(picture: Image.Image, view: int, grids: Grids, flip: bool, rng: random.Random) -> Tensor:
    """View number `view` of many, [3, H, W]: even ones the whole picture on its composition's grid, frame and all, as
    it will be drawn (with `flip` every other mirrored); 1 its middle square, other odd ones squares from closer."""
    width, height = picture.size
    if (short := min(width, height)) < SMALL:
        factor = -(-4 * SMALL // short)
        width, height = width * factor, height * factor
        picture = picture.resize((width, height), Image.Resampling.NEAREST)
    h, w = grids.native if view % 2 else grids.composition(width, height)
    if view % 2 == 0 or view == 1:
        whole = ImageOps.mirror(picture) if flip and view % 4 == 2 else picture
        return to_tensor(fit_cover(whole, w * grids.downsample, h * grids.downsample))
    scale = min(width / w, height / h) / (1 + (CLOSEST - 1) * rng.random() ** 1.5)
    left, top = rng.uniform(0, width - w * scale), rng.uniform(0, height - h * scale)
    box = (left, top, min(width, left + w * scale), min(height, top + h * scale))
    crop = picture.resize((w * grids.downsample, h * grids.downsample), Image.Resampling.LANCZOS, box)
    return to_tensor(ImageOps.mirror(crop) if flip and rng.random() < 0.5 else crop)


def encode(run: Run, tokenizer: Tokenizer) -> TokenShards:
    """The tokens of all pictures to learn from and held out, made or completed in the folder of the run, every process
    its part of the shards. A shard that is on disk stays; Ctrl-C leaves the one that is not finished."""
    art, options, folder, here = run.art, run.options, run.work / "tokens", processes()
    grids = Grids(tokenizer.downsample, run.preset.cell, run.preset.cells)
    identity = f"{art.fingerprint}/{weights_fingerprint(tokenizer)}/{options.views}/{options.flip}/{grids}"
    pictures = len(run.train) + len(run.val)
    shards = len(art.shards) if isinstance(art, ArtShards) else -(-pictures // PICTURES_A_SHARD)
    tokenizer = tokenizer.to(here.device).eval()
    silent = options.quiet or not here.is_main_process
    bar = tqdm(shared_out(range(shards)), desc="encoding", unit="shard", disable=silent)

    def encode_mine() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for shard in bar:
            path = shard_file(folder, shard)
            if peek(path).get("identity") != identity and not interrupt.is_set():
                parts = _encoded(run, tokenizer, shard, interrupt)
                if not interrupt.is_set():
                    write_shard(path, parts, identity)

    with catch_interrupt() as interrupt, companions():
        together(encode_mine)
        if agreed(interrupt.is_set())[0] > 0:
            raise KeyboardInterrupt
        together(lambda: write_index(folder, shards, options.views, identity, art.labels), only_main=True)
    return TokenShards(folder)


@torch.inference_mode()
def _encoded(
    run: Run, tokenizer: Tokenizer, shard: int, interrupt: threading.Event
) -> tuple[list[tuple[list[Tensor], str]], ...]:
    """The tokens of a shard, of what is learned from and what is held out; not all where interrupted."""
    options, device = run.options, processes().device
    grids = Grids(tokenizer.downsample, run.preset.cell, run.preset.cells)
    parts: tuple[list[tuple[list[Tensor], str]], ...] = ([], [])
    for picture, label, held_out in _pictures(run, shard):
        images = [view_of(picture, view, grids, options.flip).unsqueeze(0) for view in range(options.views)]
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(options)):
            views = [tokenizer.encode(image_BCHW.to(device))[0].to("cpu", torch.uint16) for image_BCHW in images]
        parts[held_out].append((views, label))
        if interrupt.is_set():
            break
    return parts


def _pictures(run: Run, shard: int) -> Iterator[Labelled]:
    """The pictures of one token shard."""
    art, val = run.art, set(run.val)
    if isinstance(art, ArtShards):
        yield from art.unit(shard)
        return
    for i in sorted((*run.train, *run.val))[shard * PICTURES_A_SHARD : (shard + 1) * PICTURES_A_SHARD]:
        yield Labelled(art.picture(i), art.labels[art.label_of[i]], i in val)
