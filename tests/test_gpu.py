"""The script that measures a GPU runs here on the CPU, by the same code path, and checks itself."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from generate.run import Target, draw_files, shared_out
from igpt import device
from igpt.canvas import Batch
from igpt.files import plan_output
from igpt.image_gpt import ImageGPT

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu_and_passes_its_own_checks() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    for row in ("samples/s", "views/s", "grids/s", "of the product", "one graph", "pictures/s", "all checks passed"):
        assert row in done.stdout
    refused = subprocess.run(command[:-1], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and "--tiny shows" in refused.stderr


def test_the_plan_of_100000_pictures_is_made_as_it_is_drawn_and_shared_out_without_a_gap(
    tiny_model: ImageGPT, tmp_path: Path
) -> None:
    task, seen = tiny_model.new_picture(), []
    for process in range(3):
        plan = tiny_model.batches(task, 100_000, seed=5)
        assert iter(plan) is plan, "nothing of it is there yet"
        plan = islice(plan, 7)
        target = Target(plan_output(str(tmp_path), 100_000), "tiny")
        seen += [seed for batch in shared_out(plan, target, process, 3) for seed in batch.seeds]
    assert sorted(seen) == list(range(5, 5 + 7 * tiny_model.at_once))


def test_pictures_asked_for_otherwise_are_not_taken_for_those_on_disk(tiny_model: ImageGPT, tmp_path: Path) -> None:
    target = Target(plan_output(str(tmp_path), 2), "tiny", force=True)

    def missing(**options: int) -> list[Batch]:
        return list(shared_out(tiny_model.batches(tiny_model.new_picture(), 2, **options), target, 0, 1))

    assert len(draw_files(missing(steps=1), target)) == 2 and not missing(steps=1) and missing(steps=2)


def test_of_several_processes_on_a_machine_each_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "devices", lambda kind: 4 if kind == "cuda" else 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [str(device.pick_device(asked)) for asked in (None, "cuda", "cuda:1")] == ["cuda:2", "cuda:2", "cuda:1"]
    monkeypatch.delenv("LOCAL_RANK")
    assert str(device.pick_device()) == "cuda"
