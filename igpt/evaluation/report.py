"""The report of an evaluation: tables for a terminal, Markdown with pictures, JSON to compute with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from igpt.files import write_file, write_picture
from tokenizer_vq.base import UserError


@dataclass
class Section:
    """Numbers that belong together, by measure and column, and how to read them."""

    about: str
    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, column: str, values: Mapping[str, float]) -> None:
        """Sets measures of one column."""
        for measure, value in values.items():
            self.rows.setdefault(measure, {})[column] = value

    def table(self) -> str:
        """Markdown, padded so that it can be read as it is."""
        columns = dict.fromkeys(column for row in self.rows.values() for column in row)
        lines = [["", *columns]]
        for measure, row in self.rows.items():
            lines.append([measure, *(f"{row[column]:.4g}" if column in row else "" for column in columns)])
        widths = [max(3, *map(len, cells)) for cells in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


@dataclass
class Report:
    """Everything that was found out about a model."""

    title: str
    info: dict[str, Any]  # how it was made
    sections: dict[str, Section] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # what could not be measured, and why
    pictures: dict[str, tuple[str, Image.Image]] = field(default_factory=dict)  # by file name: title, picture

    def section(self, title: str, about: str) -> Section:
        """A new section."""
        return self.sections.setdefault(title, Section(about))

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A UserError inside the block is listed as skipped, and the rest goes on."""
        try:
            yield
        except UserError as error:
            self.skipped.append(f"{what}: {error}")

    def to_json(self) -> str:
        """All but the pictures. What is not finite (the PSNR of equal pictures) becomes null."""
        measures = {title: section.rows for title, section in self.sections.items()}
        record = {**self.info, "measures": measures, "notes": self.notes, "skipped": self.skipped}
        finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
        return json.dumps(finite, indent=2, ensure_ascii=False) + "\n"

    def to_text(self) -> str:
        """Tables, how to read them, notes and what was skipped, in Markdown that can be read as it is."""
        measured = {title: section for title, section in self.sections.items() if section.rows}
        parts = [f"## {title}\n\n{section.about}\n\n{section.table()}" for title, section in measured.items()]
        remarks = [*(f"- note: {note}" for note in self.notes), *(f"- skipped: {what}" for what in self.skipped)]
        return "\n\n".join([*parts, "\n".join(remarks)]).strip() + "\n"

    def to_markdown(self) -> str:
        """The same between the title and the pictures, and how all was made."""
        pictures = "".join(f"## {title}\n\n![{title}]({file})\n\n" for file, (title, _) in self.pictures.items())
        info = json.dumps(self.info, indent=2, ensure_ascii=False)
        text = escape(f"# {self.title}\n\n{self.to_text()}", quote=False)
        return f"{text}\n{pictures}## How it was made\n\n```json\n{info}\n```\n"

    def write(self, folder: Path) -> Path:
        """Writes report.md, its pictures and report.json into `folder`, or into a folder with a new number where there
        is a report already. Returns the path of report.md. Raises UserError where the disk refuses."""
        names = (folder if number == 1 else folder.with_name(f"{folder.name}-{number}") for number in count(1))
        folder = next(name for name in names if not (name / "report.json").exists())
        for file, (_, picture) in self.pictures.items():
            write_picture(picture, folder / file, force=True)
        page = write_file(self.to_markdown().encode(errors="replace"), folder / "report.md", force=True)
        write_file(self.to_json().encode(errors="replace"), folder / "report.json", force=True)
        return page
