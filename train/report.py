"""What an evaluation found: a table to read, JSON to compute with, an HTML page to show, all from one record."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from itertools import count
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from PIL import Image

from igpt.files import atomic_write
from tokenizer_vq.base import UserError

Given = ParamSpec("Given")
Result = TypeVar("Result")

STYLE = """
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222; }
table { border-collapse: collapse; margin: .5rem 0 1rem; }
td, th { padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd; }
td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
.about { color: #666; max-width: 50rem; }
"""


@dataclass
class Section:
    """Numbers that belong together: rows of measures, columns of what was measured."""

    title: str
    about: str  # how to read them
    columns: tuple[str, ...]
    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, measure: str, **values: float) -> None:
        """A row; columns may be missing. Underscores in names of columns stand for spaces and hyphens."""
        by_name = {column.replace(" ", "_").replace("-", "_"): column for column in self.columns}
        self.rows.setdefault(measure, {}).update({by_name[key]: float(value) for key, value in values.items()})


@dataclass
class Report:
    """Everything that was found out about a model."""

    title: str
    facts: dict[str, Any]
    sections: list[Section] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a reader must know
    skipped: list[str] = field(default_factory=list)  # what could not be measured, and why
    pictures: list[tuple[str, Image.Image]] = field(default_factory=list)
    files: dict[str, Image.Image] = field(default_factory=dict)  # pictures that are also written by themselves, as PNG

    def section(self, title: str, about: str, *columns: str) -> Section:
        self.sections.append(Section(title, about, columns))
        return self.sections[-1]

    def attempt(
        self, what: str, compute: Callable[Given, Result], *args: Given.args, **more: Given.kwargs
    ) -> Result | None:
        """The result of `compute(*args, **more)`; where it says what is missing, that is noted and the rest goes on."""
        try:
            return compute(*args, **more)
        except UserError as error:
            self.skipped.append(f"{what}: {error}")
            return None

    def table(self) -> str:
        """All sections as text."""
        lines = []
        measures = [measure for section in self.sections for measure in section.rows]
        indent = max((len(measure) for measure in measures), default=0) + 4
        for section in self.sections:
            if not section.rows:
                continue
            widths = [max(12, len(column) + 2) for column in section.columns]
            head = "".join(f"{column:>{width}}" for column, width in zip(section.columns, widths, strict=True))
            lines += [section.title, f"{'':{indent}}{head}"]
            for measure, values in section.rows.items():
                cells = (_number(values.get(column)) for column in section.columns)
                lines.append(f"  {measure:{indent - 2}}" + "".join(
                    f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))  # fmt: skip
            lines.append("")
        lines += [f"note: {sentence}" for sentence in self.notes]
        lines += [f"skipped: {sentence}" for sentence in self.skipped]
        return "\n".join(lines).rstrip()

    def to_json(self) -> str:
        """Facts and numbers, without pictures. What is not finite (the PSNR of equal pictures) becomes null."""
        measures = {
            section.title: {
                measure: {column: value if math.isfinite(value) else None for column, value in values.items()}
                for measure, values in section.rows.items()
            }
            for section in self.sections
        }
        told = {**self.facts, "measures": measures, "notes": self.notes, "skipped": self.skipped}
        return json.dumps(told, indent=2, ensure_ascii=False) + "\n"

    def to_html(self) -> str:
        """One page that needs no other file and no network."""
        parts = [f"<h1>{escape(self.title)}</h1>", _listed(self.notes)]
        for section in self.sections:
            if section.rows:
                parts += [f"<h2>{escape(section.title)}</h2>", f'<p class="about">{escape(section.about)}</p>']
                parts.append(_html_table(section))
        if self.skipped:
            parts += ["<h2>Skipped</h2>", _listed(self.skipped)]
        for caption, picture in self.pictures:
            parts.append(f'<h2>{escape(caption)}</h2><img alt="{escape(caption)}" src="{_address(picture)}">')
        facts = escape(json.dumps(self.facts, indent=2, ensure_ascii=False))
        parts.append(f"<details><summary>How it was made</summary><pre>{facts}</pre></details>")
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
        )

    def write(self, folder: Path) -> Path:
        """report.json, report.html and `files` in `folder`, or in one with a new number where there is one already.

        Returns the folder. Raises UserError where the disk refuses.
        """
        names = (folder if number == 1 else folder.with_name(f"{folder.name}-{number}") for number in count(1))
        folder = next(name for name in names if not (name / "report.json").exists())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in (("report.html", self.to_html()), ("report.json", self.to_json())):
                with atomic_write(folder / name) as beside:
                    beside.write_text(text, encoding="utf-8")
            for name, picture in self.files.items():
                with atomic_write(folder / name) as beside:
                    picture.save(beside, "PNG")
        except OSError as error:
            raise UserError(f"the report cannot be written to {folder}: {error.strerror}") from error
        return folder


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if math.isfinite(value) and value == round(value) and abs(value) >= 10 else f"{value:.4g}"


def _listed(sentences: list[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _html_table(section: Section) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in ("", *section.columns))
    body = "".join(
        f"<tr><th>{escape(measure)}</th>"
        + "".join(f"<td>{_number(values.get(column))}</td>" for column in section.columns) + "</tr>"
        for measure, values in section.rows.items()
    )  # fmt: skip
    return f"<table><tr>{head}</tr>{body}</table>"


def _address(picture: Image.Image) -> str:
    """The picture as an address that holds it, for a page that needs no other file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
