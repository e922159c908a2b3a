"""What an evaluation found, from one record: tables for a terminal, Markdown with pictures, JSON to compute with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from igpt.files import atomic_write
from tokenizer_vq.base import UserError


@dataclass
class Section:
    """Numbers that belong together."""

    title: str
    about: str  # how to read them
    columns: tuple[str, ...]
    rows: dict[str, dict[str, float]] = field(default_factory=dict)  # by measure, then by column

    def add(self, measure: str, column: str, value: float) -> None:
        self.rows.setdefault(measure, {})[column] = value

    def table(self) -> str:
        """Markdown that is a table to the eye, too."""
        lines = [["", *self.columns]]
        for measure, values in self.rows.items():
            lines.append([measure, *(_number(values.get(column)) for column in self.columns)])
        widths = [max(3, *map(len, cells)) for cells in zip(*lines, strict=True)]
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        padded = ([f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(line)] for line in lines)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


@dataclass
class Report:
    """Everything that was found out about a model."""

    title: str
    facts: dict[str, Any]
    sections: list[Section] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a reader must know
    skipped: list[str] = field(default_factory=list)  # what could not be measured, and why
    pictures: dict[str, tuple[str, Image.Image]] = field(default_factory=dict)  # by file name: title, picture

    def section(self, title: str, about: str, *columns: str) -> Section:
        self.sections.append(Section(title, about, columns))
        return self.sections[-1]

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Where the block says what is missing, that is noted and the rest goes on."""
        try:
            yield
        except UserError as error:
            self.skipped.append(f"{what}: {error}")

    def to_json(self) -> str:
        """Facts and numbers, without pictures. What is not finite (the PSNR of equal pictures) becomes null."""
        measures = {section.title: section.rows for section in self.sections}
        record = {**self.facts, "measures": measures, "notes": self.notes, "skipped": self.skipped}
        record = json.loads(json.dumps(record), parse_constant=lambda infinite: None)
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self, brief: bool = False) -> str:
        """All there is; `brief` is for a terminal: numbers, notes and what was skipped."""
        parts = [] if brief else [f"# {escape(self.title)}"]
        for section in self.sections:
            if section.rows:
                parts += [f"## {section.title}", *([] if brief else [section.about]), section.table()]
        remarks = [f"- note: {note}" for note in self.notes] + [f"- skipped: {what}" for what in self.skipped]
        parts += ["\n".join(remarks if brief else map(escape, remarks))] if remarks else []
        if not brief:
            parts += [f"## {title}\n\n![{title}]({file})" for file, (title, _) in self.pictures.items()]
            parts.append(f"## How it was made\n\n```json\n{json.dumps(self.facts, indent=2, ensure_ascii=False)}\n```")
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> Path:
        """report.md, its pictures and report.json in `folder`, or in one with a new number where there is one already.

        Returns the path of report.md. Raises UserError where the disk refuses.
        """
        names = (folder if number == 1 else folder.with_name(f"{folder.name}-{number}") for number in count(1))
        folder = next(name for name in names if not (name / "report.json").exists())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, (_, picture) in self.pictures.items():
                with atomic_write(folder / file) as tmp:
                    picture.save(tmp, "PNG")
            for file, text in (("report.md", self.to_markdown()), ("report.json", self.to_json())):
                with atomic_write(folder / file) as tmp:
                    tmp.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"the report cannot be written to {folder}: {error.strerror}") from error
        return folder / "report.md"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if math.isfinite(value) and value == round(value) and abs(value) >= 10 else f"{value:.4g}"
