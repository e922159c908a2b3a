"""`igpt evaluate`: what a model has learned from a collection, how good, how new and how much its own it draws.

Every number stands beside a yardstick measured in the same way: other real, reconstructed or held-out pictures.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from igpt.bundle import Bundle
from igpt.config import SamplingOptions
from igpt.likelihood import bits_per_token
from igpt.sampling import generators, sample
from igpt.sheet import equal_sheet
from tokenizer_vq.images import fit_cover, to_tensor

from . import metrics
from .copies import Baseline, Compared, SplitArt, copied, metric_spaces, novelty
from .features import Extractor, MetricSpace, nets
from .options import EvaluateOptions
from .perceptual import perceptual, reconstruction
from .report import Report

BATCH = 8  # pictures encoded, decoded and compared at once: LPIPS keeps 50 MB for each
MEASURED = 1000  # pictures a side for reconstruction and likelihood, at most
FITTED = 10_000  # pictures the label classifier learns from, at most: it keeps them in float64
FEW = 100  # held-out pictures, below which their first percentile is hardly one
TILE, COLUMNS = 160, 8  # pixels a side of a picture in the report, and how many stand beside one another


class Evaluation:
    """A model, a collection, what the model draws, and what is found out about them step by step."""

    def __init__(
        self, model: Bundle, art: str | Path, options: EvaluateOptions, sampling: SamplingOptions, quiet: bool = False
    ):
        """Raises UserError where ART or the options cannot be used at all."""
        options.check()
        sampling.check()
        self.model, self.options, self.sampling, self.extract = model, options, sampling, Extractor(model.device, quiet)
        self.distance = perceptual(options.perceptual).to(model.device)
        self.side, self.nets = model.grids.native_size[0], nets(options.features, model)
        rng = random.Random(f"evaluate/{options.seed}")
        self.split = self.art, self.train, self.val = SplitArt.of(art, options, rng)
        self.mixed = self.train + self.val
        rng.shuffle(self.mixed)
        # For every sample the picture whose label it is drawn with: all of them in turn, in a random order.
        self.drawn_as = [self.mixed[i % len(self.mixed)] for i in range(options.samples)]
        self.samples: list[Image] = []
        facts = {
            "model": model.name,
            "weights_hash": model.weights_hash,
            "art_fingerprint": self.art.fingerprint,
            "made": date.today().isoformat(),
            "training": len(self.train),
            "held_out": len(self.val),
            "features": [net.name for net in self.nets],
            "side": self.side,
            "options": asdict(options),
            "sampling": asdict(sampling),
        }
        self.report = Report(f"{model.name}, looked at beside {Path(art).name}", facts)

    def run(self) -> Report:
        """Everything `igpt evaluate` reports; measures that only lack pictures are skipped and listed there."""
        self.note_what_does_not_match()
        self.draw_samples()
        self.measure_reconstruction()
        self.measure_likelihood()
        for net in self.nets:
            self.measure_fidelity(net)
        self.measure_originality()
        return self.report

    def note_what_does_not_match(self) -> None:
        """Model and collection, or the collection and what good numbers want."""
        notes, labels = self.report.notes, self.art.labels
        if self.model.provenance.get("art_fingerprint") != self.art.fingerprint:
            notes.append(
                'the model did not learn from exactly this collection: "training" below means the training '
                "part of ART, not what the model has seen"
            )
        strangers = [label for label in labels if label not in self.model.labels]
        if self.model.labels and strangers:
            notes.append(
                f"{len(strangers)} of the {len(labels)} labels of ART are unknown to the model (the first: "
                f"{strangers[0]!r}); their share is drawn without a label"
            )
        if 0 < len(self.val) < FEW:
            notes.append(
                f'only {len(self.val)} pictures are held out: "copied" means nearer than the nearest '
                "of them, and the membership AUC is rough"
            )
        if self.options.limit:
            notes.append(
                f"only {len(self.train)} training and {len(self.val)} held-out pictures were looked at; "
                "nearest training pictures among fewer are farther away"
            )

    # Pictures

    def squares(self, indices: list[int]) -> Iterator[Image]:
        """Centre crops of the native size."""
        return (fit_cover(self.art.picture(i), self.side, self.side) for i in indices)

    def batches(self, indices: list[int]) -> Iterator[Tensor]:
        """The same as [B, 3, side, side]."""
        for first in range(0, len(indices), BATCH):
            images = [to_tensor(square) for square in self.squares(indices[first : first + BATCH])]
            yield torch.stack(images).to(self.model.device)

    @torch.inference_mode()
    def tokens(self, indices: list[int]) -> Tensor:
        """The same in tokens, [N, h, w]."""
        return torch.cat([self.model.tokenizer.encode(images_BCHW).cpu() for images_BCHW in self.batches(indices)])

    def reconstructed(self, indices: list[int]) -> Iterator[Image]:
        """What the tokenizer makes of them."""
        for first in range(0, len(indices), BATCH):
            yield from self.model.decode(self.tokens(indices[first : first + BATCH]))

    def label(self, picture: int) -> int:
        """The model's number for the label of a picture of ART; that of no label where the model does not know it."""
        name = self.art.labels[self.art.label_of[picture]]
        return self.model.labels.index(name) if name in self.model.labels else self.model.gpt.null_label

    def draw_samples(self) -> None:
        """One picture for each of `drawn_as`."""
        labels, names, quiet = [self.label(i) for i in self.drawn_as], [*self.model.labels, ""], self.extract.quiet
        for first in tqdm(range(0, len(labels), BATCH), desc="drawing", disable=quiet or None, leave=False):
            labels_B = torch.tensor(labels[first : first + BATCH])
            seeds = generators(self.options.seed + first, len(labels_B))
            *_, last = sample(self.model.gpt, labels_B, self.model.grids.native, self.sampling, seeds)
            self.samples += self.model.decode(last.tokens_Bhw)
        tiles = [(picture, names[label]) for picture, label in zip(self.samples, labels, strict=True)]
        self.show("drawn", "Drawn pictures", *(tiles[i : i + COLUMNS] for i in range(0, 3 * COLUMNS, COLUMNS)))

    def show(self, name: str, title: str, *rows: Iterable[tuple[Image, str]]) -> None:
        """Pictures and their captions in the report."""
        self.report.pictures[f"{name}.png"] = title, equal_sheet([row for row in map(list, rows) if row], TILE)

    # Measures

    def measure_reconstruction(self) -> None:
        indices, column = (self.val, "held-out") if self.val else (self.train, "training")
        part = self.report.section(
            "reconstruction", "What is left of pictures in tokens: how sharp a drawing can be at best.", column
        )
        indices = indices[:MEASURED]
        for name, value in reconstruction(self.model.tokenizer, self.batches(indices), self.distance).items():
            part.add(name, column, value)
        shown = indices[:: max(1, len(indices) // COLUMNS)][:COLUMNS]
        rows = ([(picture, "") for picture in row] for row in (self.squares(shown), self.reconstructed(shown)))
        self.show("reconstructed", f"{column.capitalize()} pictures, and what the tokenizer makes of them", *rows)

    def measure_likelihood(self) -> None:
        """Also the membership AUC: whether a picture's likelihood gives away that it was learned from."""
        part = self.report.section(
            "likelihood",
            "Bits the model needs to say a picture, its label given: fewer is better, and far fewer on "
            "training than on held-out pictures is learning by heart. Membership AUC: how well that difference tells a "
            "training picture from an unseen one; 0.5 not at all, 1 always.",
            "training",
            "held-out",
        )
        rng, seed = random.Random(f"likelihood/{self.options.seed}"), self.options.seed
        train = rng.sample(self.train, min(MEASURED, len(self.train), max(len(self.val), 16)))
        sides = {"training": train, "held-out": self.val[:MEASURED]}
        tokens = {column: self.tokens(indices) for column, indices in sides.items() if indices}
        for order in ("random", "raster"):
            bits = {column: torch.zeros(0) for column in sides}
            for column, tokens_Nhw in tokens.items():
                labels_N = torch.tensor([self.label(i) for i in sides[column]])
                bits[column] = bits_per_token(self.model.gpt, tokens_Nhw, labels_N, [seed], order).mean((1, 2))
                mean = float(bits[column].mean())
                part.add(f"bits per token, {order} order", column, mean)
                part.add(f"bits per pixel, {order} order", column, mean / self.model.downsample**2)
            with self.report.attempt("membership AUC"):
                auc = metrics.auc(-bits["training"], -bits["held-out"])
                part.add(f"membership AUC, {order} order", "training", auc)

    def measure_fidelity(self, net: MetricSpace) -> None:
        """Drawn pictures, reconstructions and other real pictures against the same real ones, at equal counts."""
        n, attempt = min(len(self.samples), len(self.mixed) // 2), self.report.attempt
        part = self.report.section(
            f"fidelity and diversity, {net.name}, {n} pictures a side",
            'All against the same real pictures; "real" are others: as good as it gets with so few. Distances: lower '
            "is nearer. Only numbers of the same features and the same count can be compared.",
            "drawn",
            "reconstructed",
            "real",
        )
        others, reference = self.mixed[:n], self.mixed[n : 2 * n]
        real_ND, others_ND = (
            self.extract(net, self.squares(some), n, "real", self.split.key(some, f"squares of {self.side}"))
            for some in (reference, others)
        )
        groups_N = torch.tensor([self.art.label_of[i] for i in others])
        reconstructed_ND = self.extract(net, self.reconstructed(others), n, "reconstructed")
        drawn_ND = self.extract(net, self.samples, n, "drawn")
        for column, x_ND in (("real", others_ND), ("reconstructed", reconstructed_ND), ("drawn", drawn_ND)):
            with attempt(f"{column}: KID"):
                part.add("KID", column, metrics.kid(real_ND, x_ND, seed=self.options.seed))
            with attempt(f"{column}: Frechet distance"):
                part.add("Frechet distance", column, metrics.frechet(real_ND, x_ND))
            with attempt(f"{column}: Vendi score"):
                part.add("Vendi score", column, metrics.vendi(x_ND))
            with attempt(f"{column}: variety within a label"):
                part.add("variety within a label", column, metrics.spread_within(x_ND, groups_N))
            with attempt(f"{column}: precision to coverage"):
                for name, value in metrics.neighbourhoods(real_ND, x_ND).items():
                    part.add(name, column, value)

    def measure_originality(self) -> None:
        """Copies in every space, and in that of the features also what makes them creative."""
        part = self.report.section(
            "originality",
            "How near drawn pictures come to their nearest training picture, over crops and mirror "
            "images, beside pictures the model has never seen. Copied: nearer than one in a hundred of those.",
            "drawn",
            "held-out",
        )
        for space in metric_spaces(self.model, self.nets[0]):
            with self.report.attempt(f"originality in {space.kind}"):
                baseline = Baseline(space, self.split, self.side, self.extract)
                drawn = baseline.compare(self.samples, len(self.samples), what="drawn")
                for column, distance_N in (("drawn", drawn.distance_QK[:, 0]), ("held-out", baseline.val_N)):
                    if len(distance_N):
                        part.add(f"median distance, {space.kind}", column, float(distance_N.median()))
                    with self.report.attempt(f"copy rate of {column} pictures in {space.kind}"):
                        share = copied(distance_N, baseline.val_N).double().mean()
                        part.add(f"copied, {space.kind}", column, float(share))
                self.show_nearest(baseline, drawn)
                if space.kind == "features":
                    self.measure_creativity(baseline, drawn)

    def show_nearest(self, baseline: Baseline, drawn: Compared) -> None:
        """The drawn pictures that come nearest to a training picture, above those."""
        closest, kind = drawn.distance_QK[:, 0].argsort()[:COLUMNS].tolist(), baseline.space.kind
        above = [(self.samples[i], f"drawn, {float(drawn.distance_QK[i, 0]):.3f}") for i in closest]
        below = [(baseline.crop(int(drawn.crop_QK[i, 0])), "training") for i in closest]
        title = f"The drawn pictures that come nearest to training pictures in {kind}, above those"
        self.show(f"nearest-in-{kind}", title, above, below)

    def measure_creativity(self, baseline: Baseline, drawn: Compared) -> None:
        """Novelty, and what a classifier of the training labels says of drawn and of held-out pictures."""
        attempt, art = self.report.attempt, self.art
        part = self.report.section(
            "creativity",
            "Novelty: distance to the nearest training picture in units of that of unseen art (0 a copy, "
            "1 as new as unseen art; above 1 unlike anything at hand, as blur and mistakes are too). Style ambiguity: "
            "how undecided a label classifier is (0 decided, 1 a blind guess). Label faithfulness: how often it finds "
            f"the label that a picture was drawn for. All on {self.nets[0].name}.",
            "drawn",
            "held-out",
        )
        with attempt("novelty"):
            part.add("novelty", "drawn", novelty(drawn.distance_QK[:, 0], baseline.val_N))
            part.add("novelty", "held-out", 1.0)
        middle = [row for row, (_, crop) in enumerate(baseline.crops) if crop == 0]
        middle = middle[:: -(-len(middle) // FITTED)]  # labels follow one another, so every so many is a fair part
        labels_N = torch.tensor([art.label_of[baseline.crops[row][0]] for row in middle])
        with attempt("style ambiguity and label faithfulness"):
            probabilities = metrics.label_classifier(baseline.train_ND[middle], labels_N, len(art.labels))
            for column, compared, pictures in (("drawn", drawn, self.drawn_as), ("held-out", baseline.val, self.val)):
                with attempt(f"style and labels of {column} pictures"):
                    chances_NK = probabilities(compared.vectors_QD)
                    part.add("style ambiguity", column, metrics.ambiguity(chances_NK))
                    # A picture drawn without its label, as the model does not know it, cannot be faithful to it.
                    unknown = self.model.gpt.null_label if column == "drawn" else None
                    known = torch.tensor([self.label(i) != unknown for i in pictures], dtype=torch.bool)
                    labels_N = torch.tensor([art.label_of[i] for i in pictures])
                    faithful = metrics.faithfulness(chances_NK[known], labels_N[known])
                    part.add("label faithfulness", column, faithful)
