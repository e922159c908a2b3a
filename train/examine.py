"""`igpt evaluate`: what a model has learned from a collection, how good, how new and how much its own it draws.

Every number stands beside a yardstick measured in the same way: other real, reconstructed or held-out pictures.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from itertools import islice
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from igpt.config import SamplingOptions
from igpt.image_gpt import ImageGPT
from igpt.likelihood import bits_per_token
from igpt.sampling import generators, sample
from igpt.sheet import equal_sheet
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.images import fit_cover, open_picture, to_tensor

from . import features, fidelity
from .evaluate import reconstruction
from .features import FeatureCache, FeatureNet, extract
from .losses import perceptual
from .newness import judge
from .options import EvaluateOptions
from .report import Report, Section

BATCH = 8  # pictures encoded, decoded and judged at once: LPIPS keeps 50 MB for each
MEASURED = 1000  # pictures a side for reconstruction and likelihood, at most
FEW = 100  # held-out pictures, below which their first percentile is hardly one
SHOWN, ACROSS = 24, 8
TILE = 160  # pixels of a picture in the report


def evaluate_model(
    model: ImageGPT, art: str | Path, options: EvaluateOptions, sampling: SamplingOptions, *, quiet: bool = False
) -> Report:
    """Everything `igpt evaluate` reports. Raises UserError where ART or the options cannot be used at all; measures
    that only lack pictures are skipped and listed in the report."""
    options.check()
    sampling.check()
    examination = Examination(model, art, options, sampling, quiet)
    examination.measure_reconstruction()
    examination.measure_likelihood()
    examination.draw_samples()
    for net in examination.nets:
        examination.measure_fidelity(net)
    judge(examination)
    return examination.report


class Examination:
    """A model, a collection, and what is found out about them step by step."""

    def __init__(
        self, model: ImageGPT, art: str | Path, options: EvaluateOptions, sampling: SamplingOptions, quiet: bool
    ):
        self.model, self.options, self.sampling, self.quiet = model, options, sampling, quiet
        self.distance = perceptual(options.perceptual).to(model.device)
        self.grid, (self.side, _) = model.grids.native, model.grids.native_size
        self.nets = features.nets(options.features, model.tokenizer, self.side, model.weights_hash)
        self.art = ArtFolder(art, manifest=options.manifest)
        told, held_out = self.art.split()
        if not told:
            raise UserError(f"no picture of {art} is for training, so nothing can be compared; see the manifest")
        rng = random.Random(f"evaluate/{options.seed}")
        limit = options.limit or len(self.art)
        self.told = sorted(rng.sample(told, min(limit, len(told))))
        self.held_out = sorted(rng.sample(held_out, min(limit, len(held_out))))
        self.mixed = self.told + self.held_out
        rng.shuffle(self.mixed)
        self.report = Report(
            f"{model.name}, looked at beside {Path(art).name}",
            {
                "model": model.name, "weights_hash": model.weights_hash, "art_fingerprint": self.art.fingerprint,
                "made": date.today().isoformat(), "training": len(self.told), "held_out": len(self.held_out),
                "features": [net.name for net in self.nets], "side": self.side,
                "options": asdict(options), "sampling": asdict(sampling),
            },
        )  # fmt: skip
        self._note_what_does_not_match()
        self.samples: list[bytes] = []  # PNG

    def _note_what_does_not_match(self) -> None:
        notes, learned = self.report.notes, self.model.provenance.get("art_fingerprint")
        if learned != self.art.fingerprint:
            notes.append("the model did not learn from exactly this collection: \"training\" below means the training "
                         "part of ART, not what the model has seen")  # fmt: skip
        strangers = [label for label in self.art.labels if label not in self.model.labels]
        if self.model.labels and strangers:
            notes.append(f"{len(strangers)} of the {len(self.art.labels)} labels of ART are unknown to the model "
                         f"(the first: {strangers[0]!r}); their share is drawn without a label")  # fmt: skip
        if 0 < len(self.held_out) < FEW:
            notes.append(f"only {len(self.held_out)} pictures are held out: \"copied\" means nearer than the nearest "
                         "of them, and the membership AUC is rough")  # fmt: skip
        if self.options.limit:
            notes.append(f"only {len(self.told)} training and {len(self.held_out)} held-out pictures were looked at; "
                         "nearest training pictures among fewer are farther away")  # fmt: skip

    # Pictures

    def squares(self, indices: list[int]) -> Iterator[Image]:
        """Centre crops of the native size."""
        return (fit_cover(self.art.picture(i), self.side, self.side) for i in indices)

    def drawn(self) -> Iterator[Image]:
        return (open_picture(png) for png in self.samples)

    def batches(self, indices: list[int]) -> Iterator[Tensor]:
        """Centre crops as [B, 3, side, side]."""
        for first in range(0, len(indices), BATCH):
            images = [to_tensor(square) for square in self.squares(indices[first : first + BATCH])]
            yield torch.stack(images).to(self.model.device)

    def decoded(self, indices: list[int]) -> Iterator[Image]:
        """What the tokenizer makes of the pictures."""
        for images_BCHW in self.batches(indices):
            with torch.inference_mode():
                tokens_Bhw = self.model.tokenizer.encode(images_BCHW)
            yield from self.model.decode(tokens_Bhw)

    def label(self, picture: int) -> int:
        """The model's number for the label of a picture of ART; that of no label where the model does not know it."""
        name = self.art.labels[self.art.label_of[picture]]
        return self.model.labels.index(name) if name in self.model.labels else self.model.gpt.null_label

    def drawn_as(self) -> list[int]:
        """For every sample the picture of ART whose label it is drawn with: all of them in turn, in a random order."""
        return [self.mixed[i % len(self.mixed)] for i in range(self.options.samples)]

    # Measures

    def measure_reconstruction(self) -> None:
        judged = (self.held_out or self.told)[:MEASURED]
        part = self.report.section(
            "reconstruction", "What is left of pictures that the tokenizer has said in codes: how sharp a drawing can "
            "be at best.", "held-out" if self.held_out else "training",
        )  # fmt: skip

        def measure() -> None:
            found = reconstruction(self.model.tokenizer, self.batches(judged), self.distance)
            part.rows |= {name: {part.columns[0]: value} for name, value in found.items()}

        self.report.attempt("reconstruction", measure)
        shown = judged[:: max(1, len(judged) // ACROSS)][:ACROSS]
        rows = [[(picture, "") for picture in row] for row in (self.squares(shown), self.decoded(shown))]
        title = f"{part.columns[0].capitalize()} pictures, and what the tokenizer makes of them"
        self.report.pictures.append((title, equal_sheet(rows, TILE)))

    def measure_likelihood(self) -> None:
        """Also the membership AUC: whether a picture's likelihood gives away that it was learned from."""
        part = self.report.section(
            "likelihood", "Bits the model needs to say a picture, its label given: fewer is better, and far fewer on "
            "training than on held-out pictures is learning by heart. Membership AUC: how well that difference tells a "
            "training picture from an unseen one; 0.5 not at all, 1 always.", "training", "held-out",
        )  # fmt: skip
        rng = random.Random(f"likelihood/{self.options.seed}")
        sides = {"training": rng.sample(self.told, min(MEASURED, len(self.told), max(len(self.held_out), 16))),
                 "held-out": self.held_out[:MEASURED]}  # fmt: skip
        grids = {name: self._tokens(chosen) for name, chosen in sides.items() if chosen}
        pixels = self.model.downsample**2
        for order in ("random", "raster"):
            bits: dict[str, Tensor] = {}
            for name, tokens_Nhw in grids.items():
                labels_N = torch.tensor([self.label(i) for i in sides[name]])
                bits[name] = bits_per_token(
                    self.model.gpt, tokens_Nhw, labels_N, [self.options.seed], order
                ).mean((1, 2))
            means = {name: float(values.mean()) for name, values in bits.items()}
            part.rows[f"bits per token, {order} order"] = means
            part.rows[f"bits per pixel, {order} order"] = {name: value / pixels for name, value in means.items()}
            told, held_out = bits["training"], bits.get("held-out", torch.zeros(0))
            membership = self.report.attempt("membership AUC", fidelity.auc, -told, -held_out)
            if membership is not None:
                part.add(f"membership AUC, {order} order", training=membership)

    def _tokens(self, indices: list[int]) -> Tensor:
        with torch.inference_mode():
            return torch.cat([self.model.tokenizer.encode(images_BCHW).cpu() for images_BCHW in self.batches(indices)])

    def draw_samples(self) -> None:
        """Kept as PNG in memory, about 0.1 MB each: they are looked at several times."""
        labels, seed = [self.label(i) for i in self.drawn_as()], self.options.seed
        for first in features.watched(range(0, len(labels), BATCH), "drawing", self.quiet):
            labels_B = torch.tensor(labels[first : first + BATCH])
            seeds = generators(seed + first, len(labels_B))
            *_, last = sample(self.model.gpt, labels_B, self.grid, self.sampling, seeds)
            for picture in self.model.decode(last.tokens_Bhw):
                buffer = io.BytesIO()
                picture.save(buffer, "PNG", compress_level=1)
                self.samples.append(buffer.getvalue())
        names = [self.model.labels[label] if label < len(self.model.labels) else "" for label in labels[:SHOWN]]
        tiles = list(zip(islice(self.drawn(), SHOWN), names, strict=True))
        rows = [tiles[i : i + ACROSS] for i in range(0, len(tiles), ACROSS)]
        self.report.pictures.insert(0, ("Drawn pictures", equal_sheet(rows, TILE)))

    def measure_fidelity(self, net: FeatureNet) -> None:
        """Drawn pictures, reconstructions and other real pictures against the same real ones, at equal counts."""
        n = min(len(self.samples), len(self.mixed) // 2)
        part = self.report.section(
            f"fidelity and diversity, {net.name}, {n} pictures a side",
            "Drawn pictures against real ones, beside reconstructions and other real pictures against the same ones: "
            "the column \"real\" is as good as it gets with so few. Distances: lower is nearer. Only numbers of the "
            "same features and the same count can be compared.", "drawn", "reconstructed", "real",
        )  # fmt: skip
        others, reference = self.mixed[:n], self.mixed[n : 2 * n]
        cache = FeatureCache.of(net)

        def vectors(pictures: Iterator[Image], what: str, cache: FeatureCache | None) -> Tensor:
            return extract(net, pictures, n, device=self.model.device, cache=cache, quiet=self.quiet, what=what)

        if not n:
            self.report.skipped.append(f"{part.title}: 1 picture is too few; 2 or more are wanted")
            return
        reference_ND = vectors(self.squares(reference), "real", cache)
        sets = {
            "real": vectors(self.squares(others), "real", cache),
            "reconstructed": vectors(self.decoded(others), "reconstructed", None),
            "drawn": vectors(islice(self.drawn(), n), "drawn", None),
        }
        groups_N = torch.tensor([self.art.label_of[i] for i in others])
        for name, features_ND in sets.items():
            self._compare(part, name, reference_ND, features_ND, groups_N)

    def _compare(self, part: Section, name: str, real_ND: Tensor, features_ND: Tensor, groups_N: Tensor) -> None:
        attempt = self.report.attempt
        kid = attempt(f"{name}: KID", fidelity.kid, real_ND, features_ND, seed=self.options.seed)
        told = {
            "KID": kid and kid.mean,
            "Frechet distance": attempt(f"{name}: Frechet distance", fidelity.frechet, real_ND, features_ND),
            "Vendi score": attempt(f"{name}: Vendi score", fidelity.vendi, features_ND),
            "variety within a label": attempt(
                f"{name}: variety within a label", fidelity.spread_within, features_ND, groups_N
            ),
        }
        near = attempt(f"{name}: precision to coverage", fidelity.neighbourhoods, real_ND, features_ND)
        for measure, value in (told | (near._asdict() if near else {})).items():
            if value is not None:
                part.add(measure, **{name: value})
