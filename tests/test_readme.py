"""What the README shows, done as it says, in an empty folder with the model in the box."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from igpt.cli import main
from tests.imports import FILES, ROOT
from tests.painting import art_folder
from train.finetune import FACTS
from train.folder import WORK

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = {  # what a test can wait for
    "train": "--preset toy --tokenizer-crops 64 --gpt-samples 64 --adversarial 0 --quiet",
    "finetune": "--samples 96 --minutes 1 --quiet",
    **dict.fromkeys(("generate", "complete", "extend", "vary"), "--steps 2"),
    "surprise": "--orders 1",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block.replace("seed=7)", "seed=7, steps=2)"), "README.md", "exec"), {})
    assert (tmp_path / "monet.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the installation, which .ci/run does. Trainings and drawings are cut short; even so the model in the box
    finds twelve new pictures likelier than before, in the memory that a laptop has."""
    monkeypatch.chdir(tmp_path)
    art_folder(tmp_path / "my-art", each=6, size=(128, 128))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    lines = [line for line in "".join(blocks("sh")).splitlines() if line.startswith("igpt ")]
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    assert len(commands) > 5
    for words in commands:
        words += SHORT.get(words[0], "").split()
        if words[0] == "finetune":  # a process of its own, whose memory is measured
            subprocess.run([sys.executable, "-m", "igpt", *words], env=environment, check=True)
        else:
            assert main(words) == 0, words
    facts = json.loads((tmp_path / "my-style" / WORK / FACTS).read_text())
    assert facts["bits"] < 0.95 * facts["base_bits"], facts
    assert len(list((tmp_path / "ukiyo").glob("*.png"))) == 9
    assert (tmp_path / "again.png").is_file() and (tmp_path / "my-model" / "model.safetensors").is_file()


def test_the_table_of_files_lists_every_file_and_no_other() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([a-z_/]+\.py)` \|", table, re.MULTILINE))
    there = {path.relative_to(ROOT).as_posix() for path in FILES}
    bare = {f"{room}/__init__.py" for room in ("tokenizer_vq", "generate", "train", "igpt/evaluation", "igpt/studio")}
    assert listed == there - bare


def test_everything_the_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
