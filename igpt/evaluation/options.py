"""What `igpt evaluate` and `igpt audit` can be told. Every default is written here, once; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenizer_vq.base import UserError


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class AuditOptions:
    """Flags of `igpt audit`; each field is one."""

    features: str | None = _option(None, "folder with feature nets (default: the model's own tokenizer)")
    manifest: str | None = _option(None, "CSV with columns id and split (train, val): the held-out pictures")
    limit: int | None = _option(None, "look at so many training and so many held-out pictures at most (default: all)")

    def check(self) -> None:
        """Raises UserError, with the value received, on options that cannot be meant."""
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit} is too few; 1 or more is wanted")


@dataclass(frozen=True)
class EvaluateOptions(AuditOptions):
    """Flags of `igpt evaluate`; each field is one, with those of `igpt audit`."""

    samples: int = _option(200, "how many pictures to draw; a Frechet distance wants thousands, KID works with 200")
    seed: int = _option(0, "every random draw of the evaluation follows from it")
    perceptual: str | None = _option(None, "folder with LPIPS weights; without it a weight-free distance is used")

    def check(self) -> None:
        super().check()
        if not 1 <= self.samples <= 100_000:
            raise UserError(f"--samples {self.samples} cannot be; 1 to 100000 pictures are wanted")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed {self.seed} is out of reach; 0 to 2**31 - 1 is wanted")
