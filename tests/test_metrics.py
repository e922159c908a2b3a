"""Metrics on features: against independent implementations, and on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import prdc
import pytest
import scipy.linalg
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from igpt.evaluation.metrics import auc, checked, kid, neighbourhoods, vendi
from tokenizer_vq.base import UserError


def gaussian(n: int, width: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * scale + mean


class Itself(nn.Module):
    """What torchmetrics takes for a feature net: the vectors are the pictures."""

    num_features = 12

    def forward(self, features: Tensor) -> Tensor:
        return features


REAL, DRAWN = gaussian(200, 12, 1), gaussian(200, 12, 2, mean=0.3, scale=1.2)


def test_kid_is_that_of_torchmetrics() -> None:
    metric = KernelInceptionDistance(feature=Itself(), subsets=1, subset_size=200)
    metric.update(REAL, real=True)
    metric.update(DRAWN, real=False)
    assert kid(REAL, DRAWN) == pytest.approx(float(metric.compute()[0]), rel=1e-4)


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


def test_a_copied_set_lies_within_itself() -> None:
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
    with pytest.raises(UserError, match="0 and 3"):
        auc(torch.zeros(0), torch.ones(3))
    spoilt = REAL.clone()
    spoilt[[3, 8], 0] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(UserError, match="2 of 200"):
        checked(spoilt, 2)
