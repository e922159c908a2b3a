"""`igpt evaluate`: how good, how varied and how original the pictures are that a model draws.

Every number stands next to a baseline measured in the same way on other real, reconstructed or held-out pictures.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from PIL import ImageOps
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from igpt.bundle import Bundle
from igpt.config import EvaluateOptions, SamplingOptions
from igpt.likelihood import bits_per_token
from igpt.sampling import generators, sample
from igpt.sheet import sheet
from tokenizer_vq.images import fit_cover

from . import metrics
from .copies import Baseline, Split, metric_spaces, originality
from .features import BATCH, batches, feature_space
from .perceptual import perceptual, reconstruction
from .report import Report

MEASURED = 1000  # pictures a side for reconstruction and likelihood, at most
FEW = 100  # held-out pictures, below which their first percentile is hardly one
TILE, COLUMNS = (160, 160), 8  # pixels of a picture in the report, at most, and pictures in a row


class Evaluation:
    """A model, a collection, pictures that the model draws, and the report on them.

    Raises UserError where ART or the options cannot be used at all.
    """

    def __init__(
        self, model: Bundle, art: str | Path, options: EvaluateOptions, sampling: SamplingOptions, quiet: bool = False
    ):
        options.check()
        sampling.check()
        self.model, self.options, self.sampling, self.quiet = model, options, sampling, quiet
        self.distance = perceptual(options.perceptual).to(model.device)
        self.side, self.features = model.grids.native_size[0], feature_space(options.features, model)
        rng = random.Random(f"evaluate/{options.seed}")
        self.split = self.art, self.train, self.val = Split.load(art, options, rng)
        self.mixed = rng.sample(self.train + self.val, len(self.train + self.val))
        # Each sample takes the label of a picture: of all of them in turn, in a random order.
        self.prompts = [self.mixed[i % len(self.mixed)] for i in range(options.samples)]
        self.samples: list[Image] = []
        known, null_label = model.labels, model.gpt.null_label
        numbers = [known.index(label) if label in known else null_label for label in self.art.labels]
        self.label_A = torch.tensor(numbers)[self.art.label_of]  # of every picture of ART, as the model counts them
        info = {
            "model": model.name,
            "weights_hash": model.weights_hash,
            "art_fingerprint": self.art.fingerprint,
            "made": date.today().isoformat(),
            "training": len(self.train),
            "held_out": len(self.val),
            "side": self.side,
            "options": asdict(options),
            "sampling": asdict(sampling),
        }
        self.report = Report(f"{model.name}, evaluated on {Path(art).name}", info)

    def run(self) -> Report:
        """Everything `igpt evaluate` reports; measures that lack pictures are skipped and listed there."""
        self.add_notes()
        self.draw_samples()
        self.measure_reconstruction()
        self.measure_likelihood()
        self.measure_fidelity()
        self.measure_originality()
        return self.report

    def add_notes(self) -> None:
        """Where model and collection do not match, or the collection is too small for good numbers."""
        known, labels, notes = self.model.labels, self.art.labels, self.report.notes
        if self.model.provenance.get("art_fingerprint") != self.art.fingerprint:
            notes.append('the model did not learn from exactly this ART: "training" is only the training part of ART')
        if known and (unknown := [label for label in labels if label not in known]):
            number = f"{len(unknown)} of the {len(labels)} labels of ART (as {unknown[0]!r})"
            notes.append(f"the model does not know {number}: their share is drawn without a label")
        if 0 < len(self.val) < FEW:
            notes.append(f"only {len(self.val)} pictures are held out: copy rates and membership AUC are rough")

    # Pictures

    def squares(self, indices: list[int]) -> Iterator[Image]:
        """Centre crops of the native size."""
        return (fit_cover(self.art.picture(i), self.side, self.side) for i in indices)

    @torch.inference_mode()
    def tokens(self, indices: list[int]) -> Tensor:
        """The same in tokens, [N, h, w]."""
        stream = batches(self.squares(indices), self.side, self.model.device)
        return torch.cat([self.model.tokenizer.encode(images_BCHW).cpu() for images_BCHW in stream])

    def reconstructed(self, indices: list[int]) -> Iterator[Image]:
        """The same, decoded from their tokens."""
        for first in range(0, len(indices), BATCH):
            yield from self.model.decode(self.tokens(indices[first : first + BATCH]))

    def draw_samples(self) -> None:
        """One picture for each of `prompts`."""
        labels_N, names = self.label_A[self.prompts], [*self.model.labels, ""]
        for labels_B in tqdm(torch.split(labels_N, BATCH), desc="drawing", disable=self.quiet or None, leave=False):
            seeds = generators(self.options.seed + len(self.samples), len(labels_B))
            *_, last = sample(self.model.gpt, labels_B, self.model.grids.native, self.sampling, seeds)
            self.samples += self.model.decode(last.tokens_Bhw)
        tiles = [(picture, names[label]) for picture, label in zip(self.samples, labels_N.tolist(), strict=True)]
        self.add_sheet("drawn", "Drawn pictures", *(tiles[i : i + COLUMNS] for i in range(0, 3 * COLUMNS, COLUMNS)))

    def add_sheet(self, name: str, title: str, *rows: Iterable[tuple[Image, str]]) -> None:
        """Adds pictures with captions to the report."""
        tiles = [[(ImageOps.contain(picture, TILE), caption) for picture, caption in row] for row in rows]
        self.report.pictures[f"{name}.png"] = title, sheet([row for row in tiles if row])

    # Measures

    def measure_reconstruction(self) -> None:
        """What the tokenizer loses, on held-out pictures if there are any."""
        section = self.report.section("reconstruction", "Pictures decoded from their tokens: no drawing can be better.")
        indices, column = (self.val[:MEASURED], "held-out") if self.val else (self.train[:MEASURED], "training")
        stream = batches(self.squares(indices), self.side, self.model.device)
        section.add(column, reconstruction(self.model.tokenizer, stream, self.distance))
        examples = indices[:: max(1, len(indices) // COLUMNS)][:COLUMNS]
        rows = ([(picture, "") for picture in row] for row in (self.squares(examples), self.reconstructed(examples)))
        self.add_sheet("reconstructed", f"{column.capitalize()} pictures and their reconstructions", *rows)

    def measure_likelihood(self) -> None:
        """Bits per token, and whether they give away which pictures were learned from."""
        section = self.report.section(
            "likelihood",
            "Negative log likelihood of pictures in random orders, given their label: far lower on training than on "
            "held-out pictures is memorisation. Membership AUC: how well it tells these two apart; 0.5 not at all, "
            "1 always.",
        )
        rng, bits = random.Random(f"likelihood/{self.options.seed}"), {"held-out": torch.zeros(0)}
        train = rng.sample(self.train, min(MEASURED, len(self.train), max(len(self.val), 16)))
        for column, indices in (("training", train), ("held-out", self.val[:MEASURED])):
            if indices:
                tokens_Nhw, seeds = self.tokens(indices), [self.options.seed]
                bits_Nhw = bits_per_token(self.model.gpt, tokens_Nhw, self.label_A[indices], seeds)
                bits[column], mean = bits_Nhw.mean((1, 2)), float(bits_Nhw.mean())
                section.add(column, {"bits per token": mean, "bits per pixel": mean / self.model.downsample**2})
        with self.report.attempt("membership AUC"):
            section.add("training", {"membership AUC": metrics.auc(-bits["training"], -bits["held-out"])})

    def measure_fidelity(self) -> None:
        """Drawn pictures, reconstructions and other real pictures against the same real ones, at equal counts."""
        n = min(len(self.samples), len(self.mixed) // 2)
        section = self.report.section(
            f"fidelity and diversity, {self.features.name}, {n} pictures a side",
            'All against the same real pictures; "real" are others: no drawing can be better with so few. KID: '
            "lower is nearer. Only numbers of the same features and the same count can be compared.",
        )
        others, real = self.squares(self.mixed[:n]), self.squares(self.mixed[n : 2 * n])
        columns = {"drawn": self.samples[:n], "reconstructed": self.reconstructed(self.mixed[:n]), "real": others}
        real_ND = self.features.extract(real, n, self.quiet)
        for column, pictures in columns.items():
            x_ND = self.features.extract(pictures, n, self.quiet)
            with self.report.attempt(f"fidelity of {column} pictures"):
                section.add(column, {"Vendi score": metrics.vendi(x_ND)})
                section.add(column, {"KID": metrics.kid(real_ND, x_ND, seed=self.options.seed)})
                section.add(column, metrics.neighbourhoods(real_ND, x_ND))

    def measure_originality(self) -> None:
        """How near drawn pictures come to training pictures in every space."""
        section = self.report.section(
            "originality",
            "By the nearest training picture, over crops and mirror images. Copied: nearer than one in a hundred "
            "held-out pictures. Novelty: the median distance over that of held-out pictures (0 a copy, 1 as new as "
            "unseen art; above 1 unlike anything at hand, as blur and mistakes are too).",
        )
        for space in metric_spaces(self.model, self.features):
            with self.report.attempt(f"originality in {space.kind}"):
                baseline = Baseline(space, self.split, self.side, self.quiet)
                drawn = baseline.compare(self.samples, len(self.samples))
                closest = drawn.distance_QK[:, 0].argsort()[:COLUMNS].tolist()
                above = [(self.samples[i], f"drawn, {float(drawn.distance_QK[i, 0]):.3f}") for i in closest]
                below = [(self.art.picture(int(drawn.picture_QK[i, 0])), "training") for i in closest]
                title = f"The drawn pictures nearest to training pictures in {space.kind}, and those"
                self.add_sheet(f"nearest-in-{space.kind}", title, above, below)
                for column, distance_N in (("drawn", drawn.distance_QK[:, 0]), ("held-out", baseline.val_N)):
                    copied, novelty = originality(distance_N, baseline.val_N)
                    section.add(column, {f"copied, {space.kind}": copied, f"novelty, {space.kind}": novelty})
