"""`igpt audit`: the training pictures that given pictures come nearest to, and whether that is nearer than usual."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from igpt.bundle import Bundle
from igpt.sheet import equal_sheet
from tokenizer_vq.images import fit_cover, open_picture

from .copies import SAME, Baseline, Compared, SplitArt, copied, metric_spaces
from .features import Extractor, nets
from .options import AuditOptions

NAMED = 3  # nearest training pictures in each space
Found = list[tuple[Baseline, Compared]]  # what each space says of all pictures


class Verdict(NamedTuple):
    source: Path
    lines: list[str]  # a plain sentence, then the nearest pictures in every space
    sheet: Image.Image


def audit(
    model: Bundle, sources: Sequence[Path], art: str | Path, options: AuditOptions, *, quiet: bool = False
) -> list[Verdict]:
    """One verdict for each picture, on its middle square. Raises UserError where a picture or ART cannot be used."""
    side, extract = model.grids.native_size[0], Extractor(model.device, quiet)
    squares = [fit_cover(open_picture(source), side, side) for source in sources]
    spaces = metric_spaces(model, nets(options.features, model)[0])
    split = SplitArt.of(art, options, random.Random("audit/0"))
    baselines = [Baseline(space, split, side, extract) for space in spaces]
    found = [(baseline, baseline.compare(squares, len(squares), NAMED)) for baseline in baselines]
    return [_verdict(i, source, squares[i], found) for i, source in enumerate(sources)]


def _verdict(i: int, source: Path, square: Image.Image, found: Found) -> Verdict:
    lines, rows = [f"{source}: {_sentence(i, found)}"], []
    for baseline, near in found:
        words, tiles = [], [(square, source.name)]
        for crop, distance in zip(near.crop_QK[i].tolist(), near.distance_QK[i].tolist(), strict=True):
            words.append(f"{_name(baseline, crop)} ({distance:.3f})")
            tiles.append((baseline.crop(crop), f"{baseline.space.kind} {distance:.3f}"))
        lines.append(f"  nearest in {baseline.space.name}: {', '.join(words)}")
        rows.append(tiles)
    return Verdict(source, lines, equal_sheet(rows, 192))


def _sentence(i: int, found: Found) -> str:
    """What it comes to, in plain words.

    The copy score is 1 - distance / (median distance of held-out pictures), not below 0, in the space where the picture
    looks most like a copy: where the fewest held-out pictures lie nearer.
    """
    scores, suspicions, count = [], [], len(found[0][0].val_N)
    for baseline, near in found:
        distance, val_N, kind = float(near.distance_QK[i, 0]), baseline.val_N, baseline.space.kind
        name = _name(baseline, int(near.crop_QK[i, 0]))
        if kind == "pixels" and distance <= SAME:
            return f"this is {name}, whole, cropped or mirrored; copy score 1.00"
        if count:
            usual = float(val_N.median())
            score = max(0.0, 1 - distance / usual) if usual > SAME else float(distance <= SAME)
            scores.append((float((val_N < distance - SAME).double().mean()), -score))
            if bool(copied(near.distance_QK[i, :1], val_N)):
                suspicions.append(f"nearer to {name} than unseen art comes to anything in {kind}: look closely")
    if not count:
        return "no picture is held out, so nothing says whether the nearest ones are too near"
    verdict = suspicions[0] if suspicions else "no copy: as far from the training pictures as unseen art is"
    nearer, score = min(scores)
    return f"{verdict}; copy score {-score:.2f}, {nearer:.0%} of the {count} held-out pictures are nearer"


def _name(baseline: Baseline, crop: int) -> str:
    return baseline.art.names[baseline.crops[crop][0]]
