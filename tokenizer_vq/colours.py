"""Colours of palettes: how different two colours look (CIELAB), and one palette's colours exchanged for another's.

P, K and M are numbers of colours; a colour is three 8-bit sRGB values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import UserError

# CIE 1976 L*a*b* of sRGB (IEC 61966-2-1) under D65: linear light to XYZ, relative to white.
_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))


def to_lab(colours_P3: Tensor) -> Tensor:
    """8-bit sRGB to CIELAB [P, 3], float64: L* from 0 to 100. Euclidean distance is CIE76's measure of difference."""
    srgb_P3 = colours_P3.double() / 255
    linear_P3 = torch.where(srgb_P3 <= 0.04045, srgb_P3 / 12.92, ((srgb_P3 + 0.055) / 1.055) ** 2.4)
    matrix_33 = torch.tensor(_TO_XYZ, dtype=torch.float64)
    xyz_P3 = linear_P3 @ matrix_33.T / matrix_33.sum(1)
    delta = 6 / 29
    f_P3 = torch.where(xyz_P3 > delta**3, xyz_P3.clamp(min=1e-12) ** (1 / 3), xyz_P3 / (3 * delta**2) + 4 / 29)
    x, y, z = f_P3.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def match_palette(colours_K3: Tensor, palette_M3: Tensor) -> list[int]:
    """For each colour the index of the one that it becomes in another palette: the nearest in CIELAB.

    Where the palette has at least as many colours, no two colours become one: the closest pairs are joined first.
    Raises UserError for a palette of fewer than two colours, in which nothing could be seen.
    """
    if len(palette_M3) < 2:
        raise UserError(f"got a palette of {len(palette_M3)} colours to draw in, wanted 2 or more")
    distance_KM = torch.cdist(to_lab(colours_K3), to_lab(palette_M3))
    nearest = distance_KM.argmin(1).tolist()
    if len(palette_M3) < len(colours_K3):
        return nearest
    chosen: dict[int, int] = {}
    free = set(range(len(palette_M3)))
    for pair in distance_KM.flatten().argsort(stable=True).tolist():
        colour, other = divmod(pair, len(palette_M3))
        if colour not in chosen and other in free:
            chosen[colour] = other
            free.remove(other)
            if len(chosen) == len(colours_K3):
                break
    return [chosen[colour] for colour in range(len(colours_K3))]
