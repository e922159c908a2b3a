"""The model card: what a trained model is, what it learned from, how good it is and how to make it again."""

from __future__ import annotations

from typing import Any


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
    return "\n".join(lines) + "\n"


def tuned_card(name: str, provenance: dict[str, Any], labels: list[str], new: list[str]) -> str:
    """The card of a fine-tuned model: what it was, what it learned since, what that gave."""
    facts, gpt = provenance["finetune"], provenance.get("gpt", {})
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
        f"Machine: {provenance['machine']}. {_count(gpt, 'samples')} samples seen, {_minutes(gpt)} of learning.",
        "",
        "| measure | value |",
        "| --- | --- |",
    ]
    names = {
        "base_bits": "bits a token of validation pictures, the base at its best", "bits": "the same, now",
        "bits_training": "the same of training pictures, now",
        "forgetting_before": "bits a token of the art of the base, before", "forgetting_after": "the same, now",
        "decoder_psnr_before": "PSNR of validation pictures through the codes, before", "decoder_psnr_after": "now",
        "copied": f"copies among {facts.get('drawn', 0)} drawn pictures",
    }  # fmt: skip
    lines += [f"| {text} | {facts[key]:.4g} |" for key, text in names.items() if key in facts]
    known = [label for label in labels if label not in new]
    lines += ["", f"New labels: {', '.join(new) or 'none'}.", f"Labels of the base: {', '.join(known) or 'none'}."]
    return "\n".join(lines) + "\n"


def _count(numbers: dict[str, Any], key: str) -> str:
    return f"{numbers[key]:,}" if key in numbers else "unknown"


def _minutes(numbers: dict[str, Any]) -> str:
    return f"{numbers['seconds'] / 60:.0f} min" if "seconds" in numbers else "unknown"
