"""Metrics on features: against independent implementations, and on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import prdc
import pytest
import scipy.linalg
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from igpt.evaluation.metrics import auc, checked, frechet, kid, neighbourhoods, vendi
from tokenizer_vq.base import UserError


def gaussian(n: int, width: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * scale + mean


class Itself(nn.Module):
    """What torchmetrics takes for a feature net: the vectors are the pictures."""

    num_features = 12

    def forward(self, features: Tensor) -> Tensor:
        return features


def torchmetrics_says(metric: FrechetInceptionDistance | KernelInceptionDistance, real: Tensor, drawn: Tensor) -> float:
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    value = metric.compute()
    return float(value[0] if isinstance(value, tuple) else value)


REAL, DRAWN = gaussian(200, 12, 1), gaussian(200, 12, 2, mean=0.3, scale=1.2)


def test_kid_is_that_of_torchmetrics() -> None:
    wanted = torchmetrics_says(KernelInceptionDistance(feature=Itself(), subsets=1, subset_size=200), REAL, DRAWN)
    assert kid(REAL, DRAWN) == pytest.approx(wanted, rel=1e-4)


def test_the_frechet_distance_is_that_of_torchmetrics_and_of_the_formula() -> None:
    metric = FrechetInceptionDistance(feature=Itself()).set_dtype(torch.float64)
    assert frechet(REAL, DRAWN) == pytest.approx(torchmetrics_says(metric, REAL, DRAWN), rel=1e-4)
    few, fewer = REAL[:8].double().numpy(), DRAWN[:8].double().numpy()  # fewer vectors than dimensions
    covariances = np.cov(few.T), np.cov(fewer.T)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1] + 1e-12 * np.eye(12)).real
    wanted = ((few.mean(0) - fewer.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet(REAL[:8], DRAWN[:8]) == pytest.approx(wanted, rel=1e-4)


def test_neighbourhoods_are_those_of_prdc() -> None:
    wanted = prdc.compute_prdc(REAL.double().numpy(), DRAWN[:150].double().numpy(), nearest_k=5)
    assert neighbourhoods(REAL, DRAWN[:150], k=5) == pytest.approx(wanted)


def test_the_auc_is_that_of_scikit_learn_with_ties_too() -> None:
    positive = gaussian(60, 1, 3, mean=0.5)[:, 0].round(decimals=1)
    negative = gaussian(90, 1, 4)[:, 0].round(decimals=1)
    truth = [1] * 60 + [0] * 90
    assert auc(positive, negative) == pytest.approx(roc_auc_score(truth, torch.cat([positive, negative]).numpy()))
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1
    assert auc(torch.ones(3), torch.ones(4)) == 0.5


def test_the_frechet_distance_of_fresh_gaussians_is_the_exact_one() -> None:
    """A Gaussian of mean m and covariance A A' against the unit one: |m|^2 + the sum of (singular value of A - 1)^2,
    which is tr(I + C2 - 2 C2^(1/2))."""
    mix = torch.tensor([[2.0, 0.0, 0.0], [1.5, 1.0, 0.0], [0.0, 0.5, 0.3]])
    exact = 3 * 0.5**2 + float((torch.linalg.svdvals(mix) - 1).pow(2).sum())
    assert frechet(gaussian(20_000, 3, 7), gaussian(20_000, 3, 8) @ mix.T + 0.5) == pytest.approx(exact, rel=0.03)


def test_a_copied_set_is_at_no_distance_and_lies_within_itself() -> None:
    assert frechet(REAL, REAL.clone()) == pytest.approx(0, abs=1e-9)
    assert kid(REAL, REAL.clone()) < 0, "the estimate is unbiased: copies are nearer than fresh draws would be"
    found = neighbourhoods(REAL, REAL.clone())
    assert [found[name] for name in ("precision", "recall", "coverage")] == [1, 1, 1]


def test_kid_of_two_fresh_draws_is_about_nothing_and_of_moved_ones_is_not() -> None:
    same, other = (kid(gaussian(600, 8, 9), gaussian(600, 8, 10, mean=mean), size=200) for mean in (0.0, 1.0))
    assert abs(same) < 0.05 < 1 < other
    assert kid(gaussian(600, 8, 9), gaussian(600, 8, 10), size=200) == same, "the same seed, the same subsets"
    assert kid(gaussian(600, 8, 9), gaussian(600, 8, 10), size=200, seed=1) != same


def test_far_away_pictures_have_no_precision_and_one_repeated_picture_no_recall() -> None:
    assert set(neighbourhoods(REAL, REAL + 100).values()) == {0}
    found = neighbourhoods(REAL, REAL[:1].expand(50, -1))
    assert found["precision"] == 1 and found["recall"] == 0 and found["coverage"] < 0.2


def test_the_vendi_score_counts_different_pictures() -> None:
    assert vendi(torch.eye(7)) == pytest.approx(7)
    assert vendi(torch.eye(7).repeat(3, 1)) == pytest.approx(7), "repeating adds nothing"
    assert vendi(torch.ones(5, 3)) == pytest.approx(1)
    unit = torch.nn.functional.normalize(REAL[:30].double(), dim=1).numpy()
    values = scipy.linalg.eigvalsh(unit @ unit.T / 30)
    values = values[values > 1e-12]
    assert vendi(REAL[:30]) == pytest.approx(float(np.exp(-(values * np.log(values)).sum())))


def test_too_few_pictures_and_spoilt_features_are_said() -> None:
    with pytest.raises(UserError, match="5 pictures are too few; 6"):
        neighbourhoods(REAL[:5], DRAWN)
    with pytest.raises(UserError, match="1 pictures are too few; 2"):
        kid(REAL[:1], DRAWN)
    with pytest.raises(UserError, match="equal counts; got 10 and 11"):
        frechet(REAL[:10], DRAWN[:11])
    with pytest.raises(UserError, match="0 and 3"):
        auc(torch.zeros(0), torch.ones(3))
    spoilt = REAL.clone()
    spoilt[[3, 8], 0] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(UserError, match="2 of 200"):
        checked(spoilt, 2)
