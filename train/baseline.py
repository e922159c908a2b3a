"""What the base already knows of a folder: the known labels nearest to it, and the bits it needs for its pictures."""

from __future__ import annotations

from typing import Any

from igpt.model import GPT
from igpt.token_cache import TokenCache

from .collection import Collection
from .tune import bits_of, ranked_labels, whole_and_square

ALL = 96  # windows of validation pictures for the numbers that are reported
CANDIDATES = 2  # labels of the base that are measured on all of these
ASKED = 4  # pictures that say which known label is nearest to a new one, all new ones together; but one of each


def look(gpt: GPT, known: list[str], cache: TokenCache, collection: Collection, seed: int) -> dict[str, Any]:
    """For every label of the folder the known one nearest to it ("starts"), and the fewest bits that the base needs for
    a token of the validation pictures: with any one label, with none, or with the nearest to each ("facts")."""
    art, names = collection.art, [*known, "no label"]
    starts, asked = [], max(1, ASKED // len(art.labels))
    for number, name in enumerate(art.labels):
        if name in known:
            starts.append(known.index(name))
            continue
        own = [i for i in collection.train if art.label_of[i] == number] or collection.train
        ranked = ranked_labels(gpt, whole_and_square(cache, own[:: max(1, len(own) // asked)][:asked]), seed)
        # The null label is a start only where there is no other.
        starts.append(next((label for _, label in ranked if label != gpt.null_label), gpt.null_label))
    kept = collection.validation
    plain = whole_and_square(cache, kept, [starts[art.label_of[i]] for i in kept])
    candidates = [(bits_of(gpt, plain, seed, ALL), "the nearest to each")]
    for _, label in [*ranked_labels(gpt, plain, seed)[:CANDIDATES], (0.0, gpt.null_label)]:
        same = TokenCache(1, [label] * len(plain), plain.shapes, plain.grids)
        candidates.append((bits_of(gpt, same, seed, ALL), names[label]))
    bits, label_name = min(candidates)
    nearest = {name: names[start] for name, start in zip(art.labels, starts, strict=True)}
    facts = {"base_bits": bits, "base_label": label_name, "base_bits_no_label": candidates[-1][0], "nearest": nearest}
    return {"starts": starts, "facts": facts}
