"""The model card: what a trained model is, what it learned from, how good it is and how to make it again."""

from __future__ import annotations

from typing import Any

LOCKING = "`igpt lock` protects its files where they lie and on their way, not the manner: see `igpt audit`."
COPIED = 0.1  # share of copies among drawn pictures above which there is a warning
NO_MEASURE = {"batch", "step", "from", "command"}


def model_card(name: str, provenance: dict[str, Any], labels: list[str]) -> str:
    """Markdown, every number taken from the training's own measurements on held-out pictures."""
    parts = {"tokenizer": provenance["tokenizer"], "GPT": provenance["gpt"]}
    measures = "".join(
        f"| {part}: {measure} | {value:{',' if isinstance(value, int) else '.4g'}} |\n"
        for part, numbers in parts.items()
        for measure, value in numbers.items()
        if measure not in NO_MEASURE
    )
    body = f"""Samples and seconds of learning; then held-out pictures, through the codes and predicted token by token:

| measure | value |
| --- | --- |
{measures}"""
    commands = [part["command"] for part in (parts["tokenizer"], provenance) if "command" in part]
    return _card(name, "trained", commands, provenance, f"{body}\nLabels: {', '.join(labels) or 'none'}.")


def tuned_card(name: str, provenance: dict[str, Any], labels: list[str], new: list[str]) -> str:
    """The card of a fine-tuned model: what it was, what it learned since, what that gave."""
    how = f"{provenance['base']} ({provenance['base_hash'][:12]}), fine-tuned"
    sentences = "".join(f"- {sentence}\n" for sentence in summary(provenance["finetune"]))
    body = f"""{sentences}
New labels: {", ".join(new) or "none"}.
Labels of the base: {", ".join(label for label in labels if label not in new) or "none"}."""
    return _card(name, how, [provenance["command"]], provenance, body)


def _card(name: str, how: str, commands: list[str], provenance: dict[str, Any], body: str) -> str:
    """What both cards say."""
    lines = "\n".join(commands)
    return f"""# {name}

An igpt model, {how} {provenance["trained"]} on {provenance["pictures"]} pictures; {provenance["held_out"]} others \
were held out for validation.

```
{lines}
```

Machine: {provenance["machine"]}. Seed {provenance["options"]["seed"]}.

{body}

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
    if "copied" in facts:
        lines.append(f"{facts['copied']} of {facts['drawn']} drawn pictures are nearly the same as a training picture")
        if facts["copied"] > COPIED * facts["drawn"]:
            lines.append("warning: it repeats its training pictures; fewer --samples or more pictures help")
    if "minutes" in facts:
        lines.append(f"it took {facts['minutes']} minutes, and saw {facts['crops']:,} crops")
    return lines
