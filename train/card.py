"""The model card: what a trained model is, what it learned from, how good it is and how to make it again."""

from __future__ import annotations

from typing import Any

LOCKING = "`igpt lock` protects its files where they lie and on their way, not the manner: see `igpt audit`."
COPIED = 0.1  # share of copies among drawn pictures above which there is a warning
NO_MEASURE = {"samples", "decoder_samples", "batch", "seconds", "step", "from", "command"}


def model_card(name: str, provenance: dict[str, Any], labels: list[str]) -> str:
    """Markdown, every number taken from the training's own measurements on held-out pictures."""
    tokenizer, gpt = provenance["tokenizer"], provenance["gpt"]
    stages = tokenizer, provenance.get("decoder", {}), provenance  # all but the last may have been trained before
    commands = "\n".join(stage["command"] for stage in stages if "command" in stage)
    measures = "".join(
        f"| {part}: {measure} | {value:.4g} |\n"
        for part, numbers in (("tokenizer", tokenizer), ("GPT", gpt))
        for measure, value in numbers.items()
        if measure not in NO_MEASURE
    )
    card = f"""# {name}

An igpt model, trained {provenance["trained"]} on {provenance["pictures"]} pictures; {provenance["held_out"]} others \
were held out for the numbers below.

```
{commands}
```

Machine: {provenance["machine"]}. Seed {provenance["options"]["seed"]}.

| | tokenizer | GPT |
| --- | --- | --- |
| samples seen | {_count(tokenizer, "samples")} | {_count(gpt, "samples")} |
| and by the decoder alone | {_count(tokenizer, "decoder_samples")} | |
| time | {_minutes(tokenizer)} | {_minutes(gpt)} |

Held-out pictures, reconstructed through the codes and predicted token by token:

| measure | value |
| --- | --- |
{measures}"""
    return f"{card}\n" + (f"Labels: {', '.join(labels)}.\n\n" if labels else "") + f"{LOCKING}\n"


def tuned_card(name: str, provenance: dict[str, Any], labels: list[str], new: list[str]) -> str:
    """The card of a fine-tuned model: what it was, what it learned since, what that gave."""
    gpt = provenance.get("gpt", {})
    sentences = "".join(f"- {sentence}\n" for sentence in summary(provenance["finetune"]))
    return f"""# {name}

An igpt model: {provenance["base"]} ({provenance["base_hash"][:12]}), fine-tuned {provenance["trained"]} on \
{provenance["pictures"]} pictures; {provenance["held_out"]} others were held out for validation.

```
{provenance["command"]}
```

Machine: {provenance["machine"]}. {_count(gpt, "samples")} crops seen, {_minutes(gpt)} of learning.

{sentences}
New labels: {", ".join(new) or "none"}.
Labels of the base: {", ".join(label for label in labels if label not in new) or "none"}.

{LOCKING}
"""


def summary(facts: dict[str, Any]) -> list[str]:
    """What a fine-tuning has measured so far, each number with what it compares to, and warnings."""
    lines = []
    if "bits" in facts:
        lines.append(
            f"a token of pictures held out for validation costs {facts['bits']:.2f} bits; the base, with the label "
            f"nearest to them ({facts['nearest']}), needed {facts['base_bits']:.2f}"
        )
    if "decoder" in facts:
        lines.append(facts["decoder"])
    if "copied" in facts:
        lines.append(f"{facts['copied']} of {facts['drawn']} drawn pictures are nearly the same as a training picture")
        if facts["copied"] > COPIED * facts["drawn"]:
            lines.append("warning: it repeats its training pictures; fewer --samples or more pictures help")
    if "minutes" in facts:
        memory = f" and {facts['peak_memory_gb']} GB of memory at most" if facts["peak_memory_gb"] else ""
        lines.append(f"it took {facts['minutes']} minutes{memory}")
    return lines


def _count(numbers: dict[str, Any], key: str) -> str:
    return f"{numbers[key]:,}" if key in numbers else "unknown"


def _minutes(numbers: dict[str, Any]) -> str:
    return f"{numbers['seconds'] / 60:.0f} min" if "seconds" in numbers else "unknown"
