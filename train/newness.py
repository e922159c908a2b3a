"""The part of an evaluation that asks for originality and creativity: copies, novelty, style, labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from igpt.image_gpt import ImageGPT
from igpt.sheet import equal_sheet
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.images import open_picture

from . import originality
from .creativity import LabelClassifier, ambiguity, faithfulness
from .features import FeatureCache

if TYPE_CHECKING:
    from .examine import Examination

TAUGHT = 10_000  # pictures the label classifier learns from at most: it keeps them in float64
CLOSEST = 8  # drawn pictures shown above their nearest training pictures
TILE = 160


class Yardsticks(NamedTuple):
    """Drawn, held-out and training pictures in one space. Vectors are those of the pictures as they are, unmirrored."""

    drawn: originality.Nearest
    held_out_N: Tensor  # distances
    drawn_ND: Tensor
    held_out_ND: Tensor
    training: originality.References


def judge(examination: Examination) -> None:
    """Add the sections originality and creativity to the report, and the drawn pictures nearest to training ones."""
    report = examination.report
    part = report.section(
        "originality", "How near drawn pictures come to their nearest training picture, over crops and mirror images, "
        "beside pictures the model has never seen. Copied: nearer than one in a hundred of those.",
        "drawn", "held-out",
    )  # fmt: skip
    model, found = examination.model, {}
    for space in originality.spaces(model.tokenizer, examination.side, model.weights_hash, examination.nets[0]):
        sticks = report.attempt(f"originality in {space.key}", _yardsticks, examination, space)
        if sticks is None:
            continue
        found[space.key] = sticks.drawn
        drawn_N, held_out_N = sticks.drawn.distance_QK[:, 0], sticks.held_out_N
        part.add(f"median distance, {space.key}", drawn=float(drawn_N.median()))
        if len(held_out_N):
            part.add(f"median distance, {space.key}", held_out=float(held_out_N.median()))
        for name, distance_N in (("drawn", drawn_N), ("held_out", held_out_N)):
            copies = report.attempt(f"copy rate of {name} in {space.key}", originality.copied, distance_N, held_out_N)
            if copies is not None:
                part.add(f"copied, {space.key}", **{name: float(copies.double().mean())})
        if space.key == "features":
            _judge_creativity(examination, sticks)
    _show_nearest(examination, found)


def _yardsticks(examination: Examination, space: originality.Space) -> Yardsticks:
    """Everything in one space; training and held-out vectors are kept for next time."""
    device, quiet = examination.model.device, examination.quiet
    art, side = examination.art, examination.side
    training = originality.references(space, art, examination.told, side, device=device, quiet=quiet)
    drawn = originality.both_ways(
        space, examination.drawn(), len(examination.samples), side, device=device, quiet=quiet, what="drawn"
    )
    held_out = originality.both_ways(
        space, examination.squares(examination.held_out), len(examination.held_out), side, device=device,
        cache=FeatureCache.of(space.net), quiet=quiet, what="held-out",
    )  # fmt: skip
    near, distance_N = originality.nearest(space, drawn, training, k=1), torch.zeros(0, dtype=torch.float64)
    if len(held_out):
        distance_N = originality.nearest(space, held_out, training, k=1).distance_QK[:, 0]
    return Yardsticks(near, distance_N, drawn[:, 0], held_out[:, 0], training)


def _judge_creativity(examination: Examination, sticks: Yardsticks) -> None:
    report, art = examination.report, examination.art
    part = report.section(
        "creativity", "Novelty: distance to the nearest training picture in units of that of unseen art (0 a copy, 1 "
        "as new as unseen art; above 1 unlike anything at hand, as blur and mistakes are too). Style ambiguity: how "
        "undecided a label classifier is (0 decided, 1 a blind guess). Label faithfulness: how often it finds the "
        "label that a picture was drawn for. All on "
        f"{examination.nets[0].name}.", "drawn", "held-out",
    )  # fmt: skip
    drawn_N = sticks.drawn.distance_QK[:, 0]
    novelty = report.attempt("novelty", originality.novelty, drawn_N, sticks.held_out_N)
    if novelty is not None:
        part.add("novelty", drawn=novelty, held_out=1.0)
    middle = (sticks.training.crop_N == 0).nonzero().squeeze(1)
    middle = middle[:: -(-len(middle) // TAUGHT)]  # labels follow one another, so every so many is a fair part
    classifier = report.attempt(
        "style ambiguity and label faithfulness", LabelClassifier, sticks.training.vectors_ND[middle],
        torch.tensor([art.label_of[i] for i in sticks.training.picture_N[middle].tolist()]), len(art.labels),
    )  # fmt: skip
    if classifier is None:
        return
    # A picture drawn without its label, because the model does not know it, cannot be faithful to it.
    known = {i for i, label in enumerate(art.labels) if label in examination.model.labels}
    labels = {
        "drawn": [art.label_of[i] for i in examination.drawn_as()],
        "held_out": [art.label_of[i] for i in examination.held_out],
    }
    for name, features_ND in (("drawn", sticks.drawn_ND), ("held_out", sticks.held_out_ND)):
        chances = report.attempt(f"style of {name}", classifier.probabilities, features_ND)
        if chances is None:
            continue
        part.add("style ambiguity", **{name: ambiguity(chances)})
        labels_N = torch.tensor(labels[name])
        counts = torch.tensor([name == "held_out" or label in known for label in labels[name]])
        faithful = report.attempt(f"label faithfulness of {name}", faithfulness, chances[counts], labels_N[counts])
        if faithful is not None:
            part.add("label faithfulness", **{name: faithful})


def _show_nearest(examination: Examination, found: dict[str, originality.Nearest]) -> None:
    """For every space the drawn pictures that come nearest to a training picture in it, above those."""
    for key, near in found.items():
        closest = near.distance_QK[:, 0].argsort()[:CLOSEST].tolist()
        drawn = [(open_picture(examination.samples[i]), f"drawn, {float(near.distance_QK[i, 0]):.3f}") for i in closest]
        told = [(_crop(examination, near, i), "training") for i in closest]
        title = f"The drawn pictures that come nearest to training pictures in {key}, above those"
        examination.report.pictures.append((title, equal_sheet([drawn, told], TILE)))


def _crop(examination: Examination, near: originality.Nearest, row: int) -> Image:
    """The crop of a training picture that is nearest to a drawn one."""
    picture = examination.art.picture(int(near.picture_QK[row, 0]))
    return originality.crops(picture, examination.side)[int(near.crop_QK[row, 0])]


def copies(
    model: ImageGPT, drawn: list[Image], art: ArtFolder, told: list[int], held_out: list[int], identity: str
) -> int:
    """How many drawn pictures come nearer to a training picture than held-out ones do, in tokens and in pixels both.

    `identity` names the tokenizer's weights, for the cache of what it saw.
    """
    device = model.device
    side = drawn[0].width
    verdicts = []
    for space in originality.spaces(model.tokenizer, side, identity, originality.Pixels())[:2]:
        training = originality.references(space, art, told, side, device=device, quiet=True)
        ours = originality.both_ways(space, drawn, len(drawn), side, device=device, quiet=True)
        others = originality.both_ways(
            space, (art.picture(i) for i in held_out), len(held_out), side, device=device, quiet=True
        )
        near, usual = (originality.nearest(space, x, training, k=1).distance_QK[:, 0] for x in (ours, others))
        verdicts.append(originality.copied(near, usual))
    return int((verdicts[0] & verdicts[1]).sum())
