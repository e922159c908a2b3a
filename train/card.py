"""The model card: what a trained model is, what it learned from, how good it is and how to make it again."""

from __future__ import annotations

from typing import Any

LOCKING = "`igpt lock` protects its files where they lie and on their way, not the manner: see `igpt audit`."
COPIED = 0.1  # share of copies among drawn pictures at which a person is warned


def model_card(name: str, provenance: dict[str, Any], labels: list[str]) -> str:
    """Markdown, every number taken from the training's own measurements on held-out pictures."""
    tokenizer, gpt = provenance["tokenizer"], provenance["gpt"]
    lines = [
        f"# {name}",
        "",
        f"An igpt model, trained {provenance['trained']} on {provenance['pictures']} pictures; "
        f"{provenance['held_out']} others were held out for the numbers below.",
        "",
        "```",
        *([tokenizer["command"]] if "command" in tokenizer else []),  # where the tokenizer was trained before
        *([provenance["decoder"]["command"]] if "decoder" in provenance else []),
        provenance["command"],
        "```",
        "",
        f"Machine: {provenance['machine']}. Seed {provenance['options']['seed']}.",
        "",
        "| | tokenizer | GPT |",
        "| --- | --- | --- |",
        f"| samples seen | {_count(tokenizer, 'samples')} | {_count(gpt, 'samples')} |",
        f"| and by the decoder alone | {_count(tokenizer, 'decoder_samples')} | |",
        f"| time | {_minutes(tokenizer)} | {_minutes(gpt)} |",
        "",
        "Held-out pictures, reconstructed through the codes and predicted token by token:",
        "",
        "| measure | value |",
        "| --- | --- |",
    ]
    skipped = {"samples", "decoder_samples", "batch", "seconds", "step", "from", "command"}
    for part, numbers in (("tokenizer", tokenizer), ("GPT", gpt)):
        lines += [f"| {part}: {k} | {v:.4g} |" for k, v in numbers.items() if k not in skipped]
    if labels:
        lines += ["", f"Labels: {', '.join(labels)}."]
    lines += ["", LOCKING]
    return "\n".join(lines) + "\n"


def tuned_card(name: str, provenance: dict[str, Any], labels: list[str], new: list[str]) -> str:
    """The card of a fine-tuned model: what it was, what it learned since, what that gave."""
    gpt = provenance.get("gpt", {})
    lines = [
        f"# {name}",
        "",
        f"An igpt model: {provenance['base']} ({provenance['base_hash'][:12]}), fine-tuned {provenance['trained']} on "
        f"{provenance['pictures']} pictures; {provenance['held_out']} others were kept for validation.",
        "",
        "```",
        provenance["command"],
        "```",
        "",
        f"Machine: {provenance['machine']}. {_count(gpt, 'samples')} crops seen, {_minutes(gpt)} of learning.",
        "",
        *(f"- {sentence}" for sentence in summary(provenance["finetune"])),
        "",
        f"New labels: {', '.join(new) or 'none'}.",
        f"Labels of the base: {', '.join(label for label in labels if label not in new) or 'none'}.",
        "",
        LOCKING,
    ]
    return "\n".join(lines) + "\n"


def summary(facts: dict[str, Any]) -> list[str]:
    """What a fine-tuning has measured so far, each number beside its yardstick, and warnings."""
    told = []
    if "bits" in facts:
        told.append(
            f"a token of pictures kept for validation costs {facts['bits']:.2f} bits; the base, with the label nearest "
            f"to them ({facts['nearest']}), needed {facts['base_bits']:.2f}"
        )
    if "decoder" in facts:
        told.append(facts["decoder"])
    if "copied" in facts:
        told.append(f"{facts['copied']} of {facts['drawn']} drawn pictures are nearly the same as a training picture")
        if facts["copied"] > COPIED * facts["drawn"]:
            told.append("warning: it repeats its training pictures; fewer --samples or more pictures help")
    if "minutes" in facts:
        memory = f" and {facts['peak_memory_gb']} GB of memory at most" if facts["peak_memory_gb"] else ""
        told.append(f"it took {facts['minutes']} minutes{memory}")
    return told


def _count(numbers: dict[str, Any], key: str) -> str:
    return f"{numbers[key]:,}" if key in numbers else "unknown"


def _minutes(numbers: dict[str, Any]) -> str:
    return f"{numbers['seconds'] / 60:.0f} min" if "seconds" in numbers else "unknown"
