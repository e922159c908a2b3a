"""Crops that are cut from pictures that lie on the device as bytes, which feeds a GPU.

A sample is five numbers, which picture and where, that the CPU draws as for any other crop; pixels are looked up
between their four neighbours by all crops of a batch at once. No loader, no copy of pictures from the host.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenizer_vq.dataset import ArtFolder, Crops, shuffled
from tokenizer_vq.images import from_uint8, random_box

from .shards import ArtShards

DEVICE_SHARE = 0.3  # of the free memory of a GPU: more pictures than fit into it come through the loader


class Boxes(Crops):
    """Crops as numbers [5]: of which picture of `indices`, and left, top, right and bottom as shares of its sides; left
    and right are exchanged where it is mirrored."""

    def __getitem__(self, k: int) -> Tensor:
        rng, place = random.Random(f"crop/{self.seed}/{k}"), shuffled(len(self.indices), k, self.seed)
        width, height = self.art.sizes[self.indices[place]]
        left, top, right, bottom = random_box(width, height, self.size, rng.uniform(*self.scales), rng)
        if self.flip and rng.random() < 0.5:
            left, right = right, left
        return torch.tensor([place, left / width, top / height, right / width, bottom / height])


class DevicePictures:
    """Pictures of these sizes (width and height), as bytes on a device."""

    def __init__(self, art: ArtFolder, indices: Sequence[int], sizes: list[tuple[int, int]], device: torch.device):
        self.sizes_N2 = torch.tensor(sizes, device=device)
        ends = list(accumulate(width * height for width, height in sizes))
        self.starts_N = torch.tensor([0, *ends[:-1]], device=device)
        self.pixels_P3 = torch.empty(ends[-1], 3, dtype=torch.uint8, device=device)

        def place(number: int) -> None:
            size = sizes[number]
            picture = art.picture(indices[number]).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
            pixels = torch.from_numpy(np.array(picture)).view(-1, 3)
            self.pixels_P3[ends[number] - len(pixels) : ends[number]] = pixels.to(device)

        with ThreadPoolExecutor() as pool:
            list(pool.map(place, range(len(sizes))))

    def cut(self, boxes_B5: Tensor, height: int, width: int) -> Tensor:
        """The parts of pictures in boxes as those of `Boxes`, [B, 3, height, width] in channels_last, by bilinear
        interpolation."""
        picture_B, (left, top, right, bottom) = boxes_B5[:, 0].long(), boxes_B5[:, 1:, None].unbind(1)
        width_B1, height_B1 = self.sizes_N2[picture_B].unsqueeze(-1).unbind(1)
        left_BW, right_BW, x_BW = _neighbours(left, right, width, width_B1)
        above_BH, below_BH, y_BH = _neighbours(top, bottom, height, height_B1)

        def pixels(y_BH: Tensor, x_BW: Tensor) -> Tensor:
            place_BHW = self.starts_N[picture_B, None, None] + y_BH[:, :, None] * width_B1[:, None] + x_BW[:, None]
            return from_uint8(self.pixels_P3[place_BHW])

        across = x_BW[:, None, :, None]
        above = torch.lerp(pixels(above_BH, left_BW), pixels(above_BH, right_BW), across)
        below = torch.lerp(pixels(below_BH, left_BW), pixels(below_BH, right_BW), across)
        return torch.lerp(above, below, y_BH[:, :, None, None]).permute(0, 3, 1, 2)


def _neighbours(start_B1: Tensor, end_B1: Tensor, count: int, side_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `count` places between shares of a side, the pixels before and after, and how far on from the first they are,
    0 to 1."""
    ahead_S = (torch.arange(count, device=side_B1.device) + 0.5) / count
    place_BS = ((start_B1 + (end_B1 - start_B1) * ahead_S) * side_B1 - 0.5).clamp(min=0).minimum(side_B1 - 1)
    before_BS = place_BS.long()
    return before_BS, (before_BS + 1).minimum(side_B1 - 1), place_BS - before_BS


def sizes_on(
    device: torch.device, art: ArtFolder, indices: Sequence[int], short: int, room: float | None = None
) -> list[tuple[int, int]] | None:
    """Width and height at which pictures would lie on a device, those with a longer short side scaled down to `short`;
    None where they take more bytes than `room` (default: a share of the free memory of a GPU; nothing on a CPU)."""
    if room is None:
        torch.cuda.empty_cache()  # of an earlier stage, whose memory counts as taken; does nothing without CUDA
        room = DEVICE_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    if isinstance(art, ArtShards) or not room:
        return None
    sides = [(*art.sizes[i], min(1.0, short / min(art.sizes[i]))) for i in indices]
    sizes = [(round(width * scale), round(height * scale)) for width, height, scale in sides]
    return sizes if 3 * sum(width * height for width, height in sizes) <= room else None
