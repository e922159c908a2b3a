"""What surrounds a command: streams, signals, other processes, and a caller's own settings of torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import igpt
from tests.painting import art_folder
from tokenizer_vq.base import UserError
from train.folder import claimed, work_folder

ROOT = Path(__file__).resolve().parent.parent
SHORT = "--preset toy --tokenizer-crops 64 --decoder-crops 0 --adversarial 0 --perceptual none --quiet".split()


def command(*words: str | Path, **how: Any) -> subprocess.Popen[bytes]:
    """An igpt of its own; streams are pipes unless `how` says otherwise."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **how.pop("env", {})}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.Popen([sys.executable, "-m", "igpt", *map(str, words)], env=environment, **how)


def test_a_label_that_the_terminal_cannot_show_is_escaped(tiny_folder: Path, tmp_path: Path) -> None:
    model = igpt.load(tiny_folder)
    model.labels = ["日本 絵", "red"]
    model.save(tmp_path / "model")
    process = command("info", tmp_path / "model", env={"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate()
    assert process.returncode == 0 and b"\\u65e5" in out, err


def test_a_closed_output_changes_nothing_but_what_is_seen(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["generate", "--model", tiny_folder, "--size", 16, "--seed", 3, "--out", tmp_path / "c.png"]
    line = " ".join([f"exec {sys.executable} -m igpt", *map(str, words), ">&-"])
    done = subprocess.run(["sh", "-c", line], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0 and not done.stderr and (tmp_path / "c.png").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_output_is_one_sentence(tiny_folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        process = command("info", tiny_folder, stdout=full)
        _, err = process.communicate()
    assert process.returncode == 2 and err.startswith(b"igpt: the output cannot") and b"Traceback" not in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_sigterm_ends_a_training_as_ctrl_c_does(tmp_path: Path) -> None:
    art = art_folder(tmp_path / "art", each=3)
    process = command("train", art, "--out", tmp_path / "out", "--gpt-samples", 10**6, *SHORT)
    work = tmp_path / "out" / "training"
    while not (work / "metrics.jsonl").is_file() or "gpt" not in (work / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 130 and (work / "gpt-state.safetensors").is_file(), err


def test_a_folder_that_another_process_trains_in_is_refused_by_its_number(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from train.folder import claimed
with claimed(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {holder.pid}"), claimed(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with claimed(tmp_path):
        assert (tmp_path / "process").read_text() == str(os.getpid())
    assert not (tmp_path / "process").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a file name be any bytes")
def test_a_training_is_not_begun_where_its_states_could_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no UTF-8"):
        work_folder(tmp_path / "caf\udce9")


@pytest.mark.parametrize("setting", ["float64", "float16", "meta", "autocast"])
def test_a_callers_own_defaults_of_torch_change_no_pixel(setting: str, tiny_folder: Path, tmp_path: Path) -> None:
    def pictures() -> list[bytes]:
        model = igpt.load(tiny_folder)
        (drawn,) = model.generate(size=48, label="red", seed=5)
        (edited,) = model.complete(igpt.save(drawn, tmp_path / "drawn.png"), "left", seed=2)
        *_, (streamed,) = model.stream(size=32, label="red", seed=5)
        return [drawn.tobytes(), edited.tobytes(), streamed.tobytes()]

    before = pictures()
    try:
        if setting == "meta":
            torch.set_default_device("meta")
        elif setting != "autocast":
            torch.set_default_dtype(getattr(torch, setting))
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
            changed = pictures()
        dtype = getattr(torch, setting, torch.float32)
        assert torch.get_default_dtype() == (dtype if isinstance(dtype, torch.dtype) else torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert changed == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_what_is_forked_after_drawing_draws_as_well(tiny_folder: Path) -> None:
    """Threads of OpenMP do not live on in a child, which waited for them for ever."""
    code = f"""
import hashlib, os, sys, torch, igpt
torch.set_num_threads(2)
model = igpt.load({str(tiny_folder)!r}, "cpu")
def draw():
    (picture,) = model.generate(size=64, seed=5)
    print(hashlib.sha256(picture.tobytes()).hexdigest(), flush=True)
draw()
child = os.fork()
if child:
    sys.exit(os.waitpid(child, 0)[1])
draw()
os._exit(0)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    first, second = ended.stdout.split()
    assert ended.returncode == 0 and first == second, ended.stderr
