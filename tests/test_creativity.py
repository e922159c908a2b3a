"""Labels and looks: the classifier against scikit-learn, and measures with known answers."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tokenizer_vq.base import UserError
from train.creativity import PENALTY, LabelClassifier, ambiguity, faithfulness


def test_the_label_classifier_is_the_logistic_regression_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (120,), generator=generator)
    features = torch.randn(120, 5, generator=generator) * torch.tensor([1, 2, 3, 4, 5]) + labels[:, None]
    fresh = torch.randn(10, 5, generator=generator) * 3
    ours = LabelClassifier(features, labels, 3).probabilities(fresh)
    mean, std = features.double().mean(0), features.double().std(0, correction=0)
    theirs = LogisticRegression(C=1 / (120 * PENALTY), tol=1e-8, max_iter=1000)
    theirs.fit(((features - mean) / std).numpy(), labels.numpy())
    wanted = theirs.predict_proba(((fresh - mean) / std).numpy())
    assert torch.allclose(ours, torch.from_numpy(wanted), atol=1e-3)


def test_a_label_that_no_picture_has_is_hardly_ever_guessed() -> None:
    features = torch.eye(4).repeat(5, 1)
    chances = LabelClassifier(features, torch.arange(4).repeat(5), labels=6).probabilities(features)
    assert chances.shape == (20, 6) and float(chances[:, 4:].max()) < 0.05
    assert faithfulness(chances, torch.arange(4).repeat(5)) == 1


def test_a_blind_guess_is_all_ambiguity_and_a_certain_one_none() -> None:
    assert ambiguity(torch.full((3, 4), 0.25)) == pytest.approx(1)
    assert ambiguity(torch.eye(4)) == 0
    assert ambiguity(torch.tensor([[0.5, 0.5, 0.0, 0.0]])) == pytest.approx(0.5)


def test_faithfulness_is_the_share_of_pictures_taken_for_what_they_are() -> None:
    assert faithfulness(torch.eye(4), torch.tensor([0, 1, 0, 0])) == 0.5
    with pytest.raises(UserError, match="no picture has a label"):
        faithfulness(torch.zeros(0, 4), torch.zeros(0))


def test_one_label_or_spoilt_features_teach_nothing() -> None:
    with pytest.raises(UserError, match="two labels"):
        LabelClassifier(torch.eye(3), torch.zeros(3, dtype=torch.long), 2)
    with pytest.raises(UserError, match="1 of 3 pictures hold NaN"):
        LabelClassifier(torch.tensor([[0.0], [1.0], [torch.nan]]), torch.tensor([0, 1, 1]), 2)
