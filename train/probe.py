"""The linear probe: how much of the labels can be read off the GPT's layers, against pixels and the tokenizer.

As in the image-GPT paper (Chen et al. 2020, Generative Pretraining from Pixels): features are averaged over all tokens,
and a logistic regression is trained on each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from igpt.image_gpt import ImageGPT
from igpt.model import cell_positions

from .creativity import LabelClassifier, faithfulness
from .features import FeatureCache, FeatureNet, OwnTokenizer, extract
from .originality import Pixels

if TYPE_CHECKING:
    from .examine import Examination

TAUGHT = 10_000  # training pictures at most
WIDTH, HEIGHT, BORDER = 560, 280, 48  # of the plot, pixels


class Layers(FeatureNet):
    """What every layer of the GPT holds when it reads a picture row by row, without its label: [B, layers * D]."""

    def __init__(self, model: ImageGPT, side: int):
        super().__init__()
        self.tokenizer, self.gpt = model.tokenizer, model.gpt
        self.name, self.side, self.identity = "layers of the GPT", side, model.weights_hash

    def forward(self, images_BCHW: Tensor) -> Tensor:
        tokens_Bhw = self.tokenizer.encode(images_BCHW)
        b, h, w = tokens_Bhw.shape
        positions_BL2 = cell_positions(h, w, self.gpt.config.centred).to(images_BCHW.device).expand(b, -1, -1)
        labels_B = torch.full((b,), self.gpt.null_label, device=images_BCHW.device)
        kept: list[Tensor] = []

        def keep(block: nn.Module, inputs: object, output_BLD: Tensor) -> None:
            kept.append(output_BLD.float().mean(1))

        blocks = [*self.gpt.content_blocks, *self.gpt.query_blocks]
        hooks = [block.register_forward_hook(keep) for block in blocks]
        try:
            self.gpt(tokens_Bhw.flatten(1), positions_BL2, labels_B)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(kept, dim=1)


def probe(examination: Examination) -> None:
    """Add a section and a plot to the report: the share of held-out pictures whose label is read off rightly."""
    model, side, report = examination.model, examination.side, examination.report
    part = report.section(
        "linear probe", "The share of held-out pictures whose label a logistic regression finds that was trained on "
        "training pictures: on what the GPT's layers hold, on small pixels, and on the tokenizer's features.",
        "held-out",
    )  # fmt: skip
    layers = model.gpt.config.layers
    nets: list[tuple[FeatureNet, list[str]]] = [
        (Layers(model, side), [f"layer {i + 1} of {layers}" for i in range(layers)]),
        (Pixels(), ["pixels"]),
        (OwnTokenizer(model.tokenizer, side, model.weights_hash), ["tokenizer"]),
    ]
    for net, names in nets:
        scores = report.attempt(f"linear probe on {names[0]}", _scores, examination, net.eval(), len(names))
        for name, score in zip(names, scores or [], strict=False):
            part.add(name, held_out=score)
    found = [values["held-out"] for measure, values in part.rows.items() if measure.startswith("layer")]
    if len(part.rows) == layers + 2:
        plot = draw_plot(found, {name: part.rows[name]["held-out"] for name in ("pixels", "tokenizer")})
        report.pictures.append(("Linear probe, layer by layer", plot))
        report.files["probe.png"] = plot


def _scores(examination: Examination, net: FeatureNet, pieces: int) -> list[float]:
    """Accuracy on held-out pictures of each of the equal pieces that the vectors of `net` are made of."""
    told = examination.told[:: -(-len(examination.told) // TAUGHT)]
    features, labels = [], []
    for indices in (told, examination.held_out):
        features.append(extract(
            net, examination.squares(indices), len(indices), device=examination.model.device,
            cache=FeatureCache.of(net), quiet=examination.quiet, what="probe",
        ))  # fmt: skip
        labels.append(torch.tensor([examination.art.label_of[i] for i in indices]))
    if not len(examination.held_out):
        return [faithfulness(features[1], labels[1])]  # says what is missing
    width, scores = features[0].shape[1] // pieces, []
    for piece in range(pieces):
        told_ND, held_out_ND = (part[:, piece * width : (piece + 1) * width] for part in features)
        classifier = LabelClassifier(told_ND, labels[0], len(examination.art.labels))
        scores.append(faithfulness(classifier.probabilities(held_out_ND), labels[1]))
    return scores


def draw_plot(layers: Sequence[float], others: dict[str, float]) -> Image.Image:
    """Accuracy over the layers, the best one marked, beside level lines of what it is compared with."""
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default()
    top = max(*layers, *others.values(), 1e-9) * 1.15

    def place(i: float, score: float) -> tuple[float, float]:
        x = BORDER + (WIDTH - 3 * BORDER) * i / max(1, len(layers) - 1)
        return x, HEIGHT - BORDER - (HEIGHT - 2 * BORDER) * score / top

    pen.line([place(0, 0), place(len(layers) - 1, 0)], fill="black")
    for name, score in others.items():
        pen.line([place(0, score), place(len(layers) - 1, score)], fill="#999999")
        x, y = place(len(layers) - 1, score)
        pen.text((x + 8, y - 6), f"{name} {score:.0%}", fill="#666666", font=font)
    points = [place(i, score) for i, score in enumerate(layers)]
    pen.line(points, fill="#84206b", width=2)
    best = max(range(len(layers)), key=lambda i: layers[i])
    for i, (x, y) in enumerate(points):
        r = 5 if i == best else 3
        pen.ellipse((x - r, y - r, x + r, y + r), fill="#e55c30" if i == best else "#84206b")
        pen.text((x - 3, HEIGHT - BORDER + 6), str(i + 1), fill="black", font=font)
    x, y = points[best]
    pen.text((x - 24, y - 20), f"{layers[best]:.1%}", fill="black", font=font)
    pen.text((BORDER, HEIGHT - 20), "layer of the GPT; share of held-out labels found", fill="black", font=font)
    return page
