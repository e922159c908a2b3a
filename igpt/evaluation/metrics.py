"""How sets of pictures compare, told from one feature vector a picture: pure functions of matrices [N, D], in float64.

What a function cannot work with (too few vectors, NaN) raises UserError, so that a report can skip it and go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer_vq.base import UserError

PENALTY = 1e-2  # of the label classifier: L2, on weights of standardised features, beside the mean cross-entropy


def checked(features_ND: Tensor, least: int, name: str = "features") -> Tensor:
    """The same in float64. Raises UserError for fewer than `least` vectors, or where NaN or infinity is among them."""
    if features_ND.dim() != 2 or len(features_ND) < least:
        raise UserError(f"{len(features_ND)} pictures are too few; {least} or more are wanted ({name})")
    bad = int((~features_ND.isfinite()).any(1).sum())
    if bad:
        raise UserError(f"the features of {bad} of {len(features_ND)} pictures hold NaN or infinity ({name})")
    return features_ND.double()


# Two sets


def kid(real_ND: Tensor, drawn_MD: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> float:
    """Kernel distance: the unbiased estimate of squared MMD with the kernel (x.y / D + 1)^3, mean over random subsets.
    It may be a little below 0.

    Binkowski et al. 2018 (arXiv 1801.01401, section 3, equation 4). Where `size` takes in both sets whole, one subset
    is all there is. Needs 2 vectors a side.
    """
    real_ND, drawn_MD = checked(real_ND, 2, "real"), checked(drawn_MD, 2, "drawn")
    generator = torch.Generator().manual_seed(seed)
    n = min(size, len(real_ND), len(drawn_MD))
    values = []
    for _ in range(1 if n == len(real_ND) == len(drawn_MD) else subsets):
        x, y = (part[torch.randperm(len(part), generator=generator)[:n]] for part in (real_ND, drawn_MD))
        within = sum(_kernel(part, part).fill_diagonal_(0).sum() for part in (x, y)) / (n * (n - 1))
        values.append(float(within - 2 * _kernel(x, y).mean()))
    return float(torch.tensor(values, dtype=torch.float64).mean())


def _kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3


def frechet(real_ND: Tensor, drawn_ND: Tensor) -> float:
    """Frechet distance of the two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Heusel et al. 2017 (arXiv 1706.08500, equation 6). It falls with the number of pictures, so equal counts are asked
    for; only numbers with the same count and the same features may be compared. Needs 2 vectors a side.
    """
    if len(real_ND) != len(drawn_ND):
        raise UserError(f"a Frechet distance wants equal counts; got {len(real_ND)} and {len(drawn_ND)} pictures")
    n, means, roots = len(real_ND), [], []
    for features_ND in (checked(real_ND, 2, "real"), checked(drawn_ND, 2, "drawn")):
        means.append(features_ND.mean(0))
        # R of the QR decomposition is the smallest matrix with R'R = (n - 1) C.
        roots.append(torch.linalg.qr(features_ND - means[-1], mode="r").R / (n - 1) ** 0.5)
    # The eigenvalues of C1 C2 are the squared singular values of R1 R2': no root of a matrix has to be taken.
    mixed = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    spread = sum(root.pow(2).sum() for root in roots) - 2 * mixed
    return max(0.0, float((means[0] - means[1]).pow(2).sum() + spread))


def neighbourhoods(real_ND: Tensor, drawn_MD: Tensor, k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, equation 2): the share of drawn pictures that
    lie within the real ones, and of real ones within the drawn. Density and coverage (Naeem et al. 2020, arXiv
    2002.09797, equations 3 and 4): how crowded with real pictures the places of drawn ones are, about 1 for real ones,
    and the share of real pictures with a drawn one among their neighbours.

    The neighbourhood of a picture reaches to its k-th nearest of the same set, itself not counted. Needs k + 1 vectors
    a side, and room for the distances of all pairs: 0.8 GB for 10,000 a side.
    """
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


# One set


def vendi(features_ND: Tensor) -> float:
    """How many different pictures the set is worth, 1 to N: exp of the entropy of the eigenvalues of K / N, where K
    holds the cosines of all pairs (Friedman and Dieng 2022, arXiv 2210.02410, equation 3). Needs 1 vector.
    """
    unit_ND = F.normalize(checked(features_ND, 1), dim=1)
    values = torch.linalg.svdvals(unit_ND).pow(2) / len(unit_ND)  # those of K are those of the smaller X'X
    return float(torch.special.entr(values.clamp(min=0)).sum().exp())


def spread_within(features_ND: Tensor, groups_N: Tensor) -> float:
    """Mean cosine distance of two different vectors of the same group, over the groups that have two or more.

    Raises UserError if there is none.
    """
    unit_ND = F.normalize(checked(features_ND, 2), dim=1)
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


# Labels


def label_classifier(features_ND: Tensor, labels_N: Tensor, labels: int) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression on standardised features, fitted by L-BFGS from zero, so without any chance: a
    function that gives the probabilities [M, labels] of other features.

    `labels_N` are numbers below `labels`. Raises UserError unless two of them occur, and for NaN features.
    """
    x_ND = checked(features_ND, 2, "label classifier")
    if len(set(labels_N.tolist())) < 2:
        raise UserError("a label classifier wants training pictures of two labels or more")
    mean_D, std_D = x_ND.mean(0), x_ND.std(0, correction=0).clamp(min=1e-6)
    x_ND = (x_ND - mean_D) / std_D
    weight_KD = torch.zeros(labels, x_ND.shape[1], dtype=torch.float64, requires_grad=True)
    bias_K = torch.zeros(labels, dtype=torch.float64, requires_grad=True)
    fit = torch.optim.LBFGS([weight_KD, bias_K], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        fit.zero_grad()
        value = F.cross_entropy(F.linear(x_ND, weight_KD, bias_K), labels_N)
        value = value + PENALTY / 2 * weight_KD.pow(2).sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    @torch.no_grad()
    def probabilities(features_MD: Tensor) -> Tensor:
        x_MD = (checked(features_MD, 1, "label classifier") - mean_D) / std_D
        return F.linear(x_MD, weight_KD, bias_K).softmax(1)

    fit.step(loss)  # type: ignore[no-untyped-call]
    return probabilities


def ambiguity(probabilities_NK: Tensor) -> float:
    """Mean entropy of the label of a picture, as a share of that of a blind guess: 0 decided, 1 any style at all.

    The quantity that Creative Adversarial Networks raise (Elgammal et al. 2017, arXiv 1706.07068, section 3.2).
    """
    entropy_N = torch.special.entr(probabilities_NK).sum(1)
    return float(entropy_N.mean()) / math.log(probabilities_NK.shape[1])


def faithfulness(probabilities_NK: Tensor, labels_N: Tensor) -> float:
    """The share of pictures whose likeliest label is their own. Raises UserError without pictures."""
    if not len(labels_N):
        raise UserError("no picture has a label that both the model and the collection know")
    return float((probabilities_NK.argmax(1) == labels_N).double().mean())
