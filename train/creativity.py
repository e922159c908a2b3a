"""Labels and looks: does a drawn picture look like its label, and how undecided is its style?"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer_vq.base import UserError

from .fidelity import checked

PENALTY = 1e-2  # L2, on weights of standardised features, beside the mean cross-entropy
ROUNDS = 200  # of L-BFGS at most


class LabelClassifier:
    """Multinomial logistic regression on standardised features, fitted by L-BFGS from zero, so without any chance."""

    def __init__(self, features_ND: Tensor, labels_N: Tensor, labels: int, penalty: float = PENALTY):
        """`labels_N` are numbers below `labels`. Raises UserError unless two of them occur, and for NaN features."""
        x_ND = checked(features_ND, 2, "label classifier")
        if len(set(labels_N.tolist())) < 2:
            raise UserError("a label classifier wants training pictures of two labels or more")
        self.labels, self.mean_D = labels, x_ND.mean(0)
        self.std_D = x_ND.std(0, correction=0).clamp(min=1e-6)
        x_ND = (x_ND - self.mean_D) / self.std_D
        self.weight_KD = torch.zeros(labels, x_ND.shape[1], dtype=torch.float64, requires_grad=True)
        self.bias_K = torch.zeros(labels, dtype=torch.float64, requires_grad=True)
        fit = torch.optim.LBFGS([self.weight_KD, self.bias_K], max_iter=ROUNDS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            fit.zero_grad()
            value = F.cross_entropy(F.linear(x_ND, self.weight_KD, self.bias_K), labels_N)
            value = value + penalty / 2 * self.weight_KD.pow(2).sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        fit.step(loss)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def probabilities(self, features_ND: Tensor) -> Tensor:
        """[N, K], each row adds up to 1."""
        x_ND = (checked(features_ND, 1, "label classifier") - self.mean_D) / self.std_D
        return F.linear(x_ND, self.weight_KD, self.bias_K).softmax(1)


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
