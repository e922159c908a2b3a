"""The flags of the commands that measure. Every default is written here, once; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from igpt.config import Options, option


@dataclass(frozen=True)
class AuditOptions(Options):
    """Flags of `igpt audit`; each field is one."""

    features: str | None = option(None, "folder with the feature net (default: the model's own tokenizer)")
    manifest: str | None = option(None, "CSV with columns id and split (train, val): the held-out pictures")
    limit: int | None = option(None, "training and held-out pictures compared, at most (default: all)", low=1)


@dataclass(frozen=True)
class EvaluateOptions(AuditOptions):
    """Flags of `igpt evaluate`; each field is one, with those of `igpt audit`."""

    samples: int = option(200, "how many pictures to draw", low=1, high=100_000)
    seed: int = option(0, "every random draw of the evaluation follows from it", low=0, high=2**31 - 1)
    perceptual: str | None = option(None, "folder with LPIPS weights; without it a weight-free distance is used")


@dataclass(frozen=True)
class SurpriseOptions(Options):
    """Flags of `igpt surprise`; each field is one."""

    orders: int = option(8, "mean over so many random drawing orders", low=1, high=1000)
    seed: int = option(0, "of those orders", low=0, high=2**31 - 1)
