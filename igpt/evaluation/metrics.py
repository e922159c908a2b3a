"""How sets of pictures compare, by one feature vector a picture: pure functions of matrices [N, D], in float64.

What a function cannot work with (too few vectors, NaN) raises UserError, so that a report can skip it and go on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer_vq.base import UserError


def checked(features_ND: Tensor, least: int, name: str = "features") -> Tensor:
    """The same in float64. Raises UserError for fewer than `least` vectors, or where NaN or infinity is among them."""
    if features_ND.dim() != 2 or len(features_ND) < least:
        raise UserError(f"{len(features_ND)} pictures are too few; {least} or more are wanted ({name})")
    if bad := int((~features_ND.isfinite()).any(1).sum()):
        raise UserError(f"the features of {bad} of {len(features_ND)} pictures hold NaN or infinity ({name})")
    return features_ND.double()


def kid(real_ND: Tensor, drawn_MD: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> float:
    """Kernel distance: the unbiased estimate of squared MMD with the kernel (x.y / D + 1)^3, mean over random subsets
    of `size` vectors (one subset where that is all). It may be a little below 0. Needs 2 vectors a side.

    Binkowski et al. 2018 (arXiv 1801.01401, section 3, equation 4).
    """
    real_ND, drawn_MD = checked(real_ND, 2, "real"), checked(drawn_MD, 2, "drawn")
    generator, n, values = torch.Generator().manual_seed(seed), min(size, len(real_ND), len(drawn_MD)), []
    for _ in range(1 if n == len(real_ND) == len(drawn_MD) else subsets):
        x, y = (part[torch.randperm(len(part), generator=generator)[:n]] for part in (real_ND, drawn_MD))
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = sum(kernel.fill_diagonal_(0).sum() for kernel in (xx, yy)) / (n * (n - 1))
        values.append(within - 2 * xy.mean())
    return float(torch.stack(values).mean())


def neighbourhoods(real_ND: Tensor, drawn_MD: Tensor, k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, equation 2), density and coverage (Naeem et al.
    2020, arXiv 2002.09797, equations 3 and 4). The neighbourhood of a picture reaches to its k-th nearest of the same
    set, itself not counted. Needs k + 1 vectors a side, and 0.8 GB for the distances of 10,000 a side."""
    real_ND, drawn_MD = checked(real_ND, k + 1, "real"), checked(drawn_MD, k + 1, "drawn")
    real_radii_N, drawn_radii_M = (torch.cdist(x, x).kthvalue(k + 1, dim=1).values for x in (real_ND, drawn_MD))
    distance_MN = torch.cdist(drawn_MD, real_ND)
    within_real_MN, within_drawn_MN = distance_MN < real_radii_N, distance_MN < drawn_radii_M[:, None]
    return {
        "precision": float(within_real_MN.any(1).double().mean()),
        "recall": float(within_drawn_MN.any(0).double().mean()),
        "density": int(within_real_MN.sum()) / (k * len(drawn_MD)),
        "coverage": float((distance_MN.amin(0) < real_radii_N).double().mean()),
    }


def vendi(features_ND: Tensor) -> float:
    """How many different pictures the set is worth, 1 to N: exp of the entropy of the eigenvalues of K / N, where K
    holds the cosines of all pairs (Friedman and Dieng 2022, arXiv 2210.02410, equation 3). Needs 1 vector."""
    unit_ND = F.normalize(checked(features_ND, 1), dim=1)
    values = torch.linalg.svdvals(unit_ND).pow(2) / len(unit_ND)  # those of K are those of the smaller X'X
    return float(torch.special.entr(values).sum().exp())


def auc(positive_N: Tensor, negative_M: Tensor) -> float:
    """The chance that a positive is larger than a negative, ties counting half: the area under the ROC curve
    (Hanley and McNeil 1982). Needs one of each, and room for all pairs."""
    if not len(positive_N) or not len(negative_M):
        raise UserError(f"an AUC wants one of each kind or more; got {len(positive_N)} and {len(negative_M)}")
    difference_NM = positive_N.double()[:, None] - negative_M.double()
    if bool(difference_NM.isnan().any()):
        raise UserError("an AUC cannot rank NaN")
    return float((difference_NM.sign() + 1).mean() / 2)
