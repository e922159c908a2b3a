"""Random square crops of a collection: sample number k is a pure function of (seed, k), so a training can resume."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .art_folder import ArtFolder
from .images import random_crop, to_tensor


def shuffled(n: int, k: int, seed: int) -> int:
    """Which of n items is sample k, when the items are shuffled anew for every pass over them."""
    epoch, place = divmod(k, n)
    key = (n, epoch, seed)
    if key not in _permutations:
        _permutations.clear()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        _permutations[key] = torch.randperm(n, generator=generator).tolist()
    return _permutations[key][place]


_permutations: dict[tuple[int, int, int], list[int]] = {}  # the last pass, remembered


class Crops(Dataset[Tensor]):
    """Endless crops [3, size, size] in [-1, 1], their scale drawn between `closest` and `widest`.

    A scale of 1 shows the whole short side of a picture; 2 shows half of it.
    """

    def __init__(
        self, art: ArtFolder, indices: list[int], size: int, seed: int, scales: tuple[float, float], flip: bool
    ):
        self.art, self.indices, self.size, self.seed, self.scales, self.flip = art, indices, size, seed, scales, flip

    def __getitem__(self, k: int) -> Tensor:
        rng = random.Random(f"crop/{self.seed}/{k}")
        picture = self.art.picture(self.indices[shuffled(len(self.indices), k, self.seed)])
        return to_tensor(random_crop(picture, self.size, rng.uniform(*self.scales), rng, flip=self.flip))
