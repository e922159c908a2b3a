"""How two sets of pictures compare, told from one feature vector a picture: pure functions of matrices [N, D].

All in float64. Distances are taken block by block, so that 50,000 vectors need no matrix of all pairs.
What a function cannot work with (too few vectors, NaN) raises UserError, so that a report can skip it and go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tokenizer_vq.base import UserError

BLOCK = 512  # rows of a distance matrix in memory at once


class Kid(NamedTuple):
    mean: float  # may be a little below 0, as the estimate is unbiased
    std: float  # over the subsets; 0 where there is only one


class Neighbourhoods(NamedTuple):
    precision: float  # share of drawn pictures that lie within the real ones
    recall: float  # share of real pictures that lie within the drawn ones
    density: float  # how crowded with real pictures the places are where drawn ones lie; about 1 for real ones
    coverage: float  # share of real pictures that have a drawn one among their neighbours


def checked(features_ND: Tensor, least: int, name: str = "features") -> Tensor:
    """The same in float64. Raises UserError for fewer than `least` vectors, or where NaN or infinity is among them."""
    if features_ND.dim() != 2 or len(features_ND) < least:
        raise UserError(f"{len(features_ND)} pictures are too few; {least} or more are wanted ({name})")
    bad = int((~features_ND.isfinite()).any(1).sum())
    if bad:
        raise UserError(f"the features of {bad} of {len(features_ND)} pictures hold NaN or infinity ({name})")
    return features_ND.double()


def distances(a_MD: Tensor, b_ND: Tensor) -> Iterator[Tensor]:
    """Euclidean distances in blocks [BLOCK, N] of the rows of `a`, both float64."""
    for first in range(0, len(a_MD), BLOCK):
        yield torch.cdist(a_MD[first : first + BLOCK], b_ND, compute_mode="use_mm_for_euclid_dist_if_necessary")


# Two sets


def kid(real_ND: Tensor, drawn_MD: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> Kid:
    """Kernel distance: the unbiased estimate of squared MMD with the kernel (x.y / D + 1)^3, mean over random subsets.

    Binkowski et al. 2018 (arXiv 1801.01401, section 3, equation 4). Where `size` takes in both sets whole, one subset
    is all there is. Needs 2 vectors a side.
    """
    real_ND, drawn_MD = checked(real_ND, 2, "real"), checked(drawn_MD, 2, "drawn")
    generator = torch.Generator().manual_seed(seed)
    n = min(size, len(real_ND), len(drawn_MD))
    rounds = 1 if n == len(real_ND) == len(drawn_MD) else subsets
    values = []
    for _ in range(rounds):
        x, y = (part[torch.randperm(len(part), generator=generator)[:n]] for part in (real_ND, drawn_MD))
        within = sum(_kernel(part, part).fill_diagonal_(0).sum() for part in (x, y)) / (n * (n - 1))
        values.append(float(within - 2 * _kernel(x, y).mean()))
    told = torch.tensor(values, dtype=torch.float64)
    return Kid(float(told.mean()), float(told.std(correction=0)))


def _kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3


def frechet(real_ND: Tensor, drawn_ND: Tensor) -> float:
    """Frechet distance of the two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Heusel et al. 2017 (arXiv 1706.08500, equation 6). It falls with the number of pictures, so equal counts are asked
    for; only numbers with the same count and the same features may be compared. Needs 2 vectors a side.
    """
    if len(real_ND) != len(drawn_ND):
        raise UserError(f"a Frechet distance wants equal counts; got {len(real_ND)} and {len(drawn_ND)} pictures")
    real_ND, drawn_ND = checked(real_ND, 2, "real"), checked(drawn_ND, 2, "drawn")
    n, means, roots = len(real_ND), [], []
    for features_ND in (real_ND, drawn_ND):
        means.append(features_ND.mean(0))
        # R of the QR decomposition is the smallest matrix with R'R = (n - 1) C.
        roots.append(torch.linalg.qr(features_ND - means[-1], mode="r").R / (n - 1) ** 0.5)
    # The eigenvalues of C1 C2 are the squared singular values of R1 R2': no root of a matrix has to be taken.
    mixed = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    spread = sum(root.pow(2).sum() for root in roots) - 2 * mixed
    return max(0.0, float((means[0] - means[1]).pow(2).sum() + spread))


def neighbourhoods(real_ND: Tensor, drawn_MD: Tensor, k: int = 5) -> Neighbourhoods:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, equation 2), density and coverage (Naeem et al.
    2020, arXiv 2002.09797, equations 3 and 4). The neighbourhood of a picture reaches to its k-th nearest of the same
    set, itself not counted. Needs k + 1 vectors a side.
    """
    real_ND, drawn_MD = checked(real_ND, k + 1, "real"), checked(drawn_MD, k + 1, "drawn")
    real_radii_N, drawn_radii_M = _radii(real_ND, k), _radii(drawn_MD, k)
    recalled_N = torch.zeros_like(real_radii_N, dtype=torch.bool)
    nearest_N = torch.full_like(real_radii_N, torch.inf)
    precise, crowd, first = 0, 0, 0
    for block_BN in distances(drawn_MD, real_ND):
        inside_BN = block_BN < real_radii_N
        precise += int(inside_BN.any(1).sum())
        crowd += int(inside_BN.sum())
        recalled_N |= (block_BN < drawn_radii_M[first : first + BLOCK, None]).any(0)
        nearest_N = torch.minimum(nearest_N, block_BN.amin(0))
        first += len(block_BN)
    m = len(drawn_MD)
    covered = float((nearest_N < real_radii_N).double().mean())
    return Neighbourhoods(precise / m, float(recalled_N.double().mean()), crowd / (k * m), covered)


def _radii(features_ND: Tensor, k: int) -> Tensor:
    """Distance of each vector to its k-th nearest neighbour, [N]."""
    blocks = [block.kthvalue(k + 1, dim=1).values for block in distances(features_ND, features_ND)]
    return torch.cat(blocks)


# One set


def vendi(features_ND: Tensor) -> float:
    """How many different pictures the set is worth, 1 to N: exp of the entropy of the eigenvalues of K / N, where K
    holds the cosines of all pairs (Friedman and Dieng 2022, arXiv 2210.02410, equation 3). Needs 1 vector.
    """
    unit_ND = torch.nn.functional.normalize(checked(features_ND, 1), dim=1)
    values = torch.linalg.svdvals(unit_ND).pow(2) / len(unit_ND)  # those of K are those of the smaller X'X
    return float(torch.special.entr(values.clamp(min=0)).sum().exp())


def spread_within(features_ND: Tensor, groups_N: Tensor) -> float:
    """Mean cosine distance of two different vectors of the same group, over the groups that have two or more.

    Raises UserError if there is none.
    """
    unit_ND = torch.nn.functional.normalize(checked(features_ND, 2), dim=1)
    spreads = []
    for group in sorted(set(groups_N.tolist())):
        members = unit_ND[groups_N == group]
        n = len(members)
        if n > 1:  # the sum of all cosines is the squared length of the sum of the vectors
            spreads.append(float((n - members.sum(0).pow(2).sum() / n) / (n - 1)))
    if not spreads:
        raise UserError("no label has two pictures, so nothing can be said of the variety within a label")
    return sum(spreads) / len(spreads)


# Two lists of numbers


def auc(positive_N: Tensor, negative_M: Tensor) -> float:
    """The chance that a positive is larger than a negative, ties counting half: the area under the ROC curve
    (Hanley and McNeil 1982; the Mann-Whitney statistic over N M). Needs one of each.
    """
    if not len(positive_N) or not len(negative_M):
        raise UserError(f"an AUC wants one of each kind or more; got {len(positive_N)} and {len(negative_M)}")
    ordered, wanted = negative_M.double().sort().values.contiguous(), positive_N.double().contiguous()
    if bool(ordered.isnan().any() or wanted.isnan().any()):
        raise UserError("an AUC cannot rank NaN")
    below, up_to = (torch.searchsorted(ordered, wanted, right=right).double() for right in (False, True))
    return float((below + up_to).sum() / 2 / (len(ordered) * len(wanted)))
