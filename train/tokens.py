"""Between the stages: every picture is encoded once, in several views, so that GPT training never sees a pixel."""

from __future__ import annotations

import random
import time

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from igpt.checkpoint import Tokenizer
from igpt.device import pick_device
from igpt.sizes import Grids
from igpt.token_cache import TokenCache
from tokenizer_vq.images import fit_cover, to_tensor

from .folder import Run, use_bf16, weights_fingerprint
from .state import catch_interrupt

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


@torch.inference_mode()
def encode(run: Run, tokenizer: Tokenizer) -> tuple[TokenCache, str]:
    """The tokens of all pictures, made or completed in the folder of the run, and what names them: these pictures, this
    tokenizer, these views. Ctrl-C saves first."""
    art, options, path, device = run.art, run.options, run.work / "tokens.safetensors", pick_device()
    grids = Grids(tokenizer.downsample, run.preset.cell, run.preset.cells)
    identity = f"{art.fingerprint}/{weights_fingerprint(tokenizer)}/{options.views}/{options.flip}/{grids}"
    cache, notes = TokenCache.load(path) if path.is_file() else (None, {})
    if cache is None or notes.get("identity") != identity:
        cache = TokenCache(options.views, [], [], [])
    tokenizer, saved_at = tokenizer.to(device).eval(), time.monotonic()
    bar = tqdm(desc="encoding", total=len(art), initial=len(cache), disable=options.quiet, mininterval=1)
    with catch_interrupt() as interrupt, bar, torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(options)):
        for i in range(len(cache), len(art)):
            picture = art.picture(i)
            for view in range(options.views):
                image_CHW = view_of(picture, view, grids, options.flip)
                tokens_hw = tokenizer.encode(image_CHW.unsqueeze(0).to(device))[0].cpu()
                cache.shapes.append((tokens_hw.shape[0], tokens_hw.shape[1]))
                cache.grids.append(tokens_hw.flatten().to(torch.uint16))
            cache.labels.append(art.label_of[i])
            bar.update()
            if i + 1 == len(art) or interrupt.is_set() or time.monotonic() > saved_at + 60 * options.save_minutes:
                cache.save(path, {"identity": identity})
                saved_at = time.monotonic()
            if interrupt.is_set():
                raise KeyboardInterrupt
    return cache, identity
