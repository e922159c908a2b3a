"""Several processes that learn together: they see and learn what one would, and nobody is left waiting for the dead.

All are real processes that talk over the loopback. What goes wrong in one of them is brought about from outside: by a
signal, by a limit of the system, or by a task that reports what a full memory would.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from igpt.cli import main
from igpt.evaluation.perceptual import perceptual
from igpt.image_gpt import ImageGPT
from tests.painting import art_folder
from tests.test_fresh import fresh_task
from tests.test_training import QUIET, before_step, gpt_task, metrics_in, run_of, schedule
from tokenizer_vq.base import UserError
from tokenizer_vq.vq import VQTokenizer
from train.loop import Schedule, Task, run
from train.state import seeded
from train.tokenizer import TokenizerTask

pytestmark = pytest.mark.slow
STEPS = 8
OPTIONS = replace(QUIET, dropout=0.0, save_minutes=0.0, codes=32)


# What each process does


def task_of(kind: str, art: Path, folder: Path) -> Task[Any]:
    """Without dropout and without noise in the decoder, which every process draws for itself."""
    if kind == "gpt":
        return gpt_task(options=OPTIONS)  # grids of several sizes: parts of a batch ask for unequally many tokens
    if kind == "fresh":
        return fresh_task(art, folder / "work", OPTIONS)
    task = TokenizerTask(run_of(art, OPTIONS), perceptual("none"))
    model = task.modules["model"]
    assert isinstance(model, VQTokenizer)
    model.decoder.grains.requires_grad_(False)
    with seeded(0):  # where all that it paints is one grey, rounding decides which way an edge pulls
        torch.nn.init.normal_(model.decoder.head.weight)
    return task


def plan(steps: int = STEPS) -> Schedule:
    return replace(schedule(steps, log_every=1, evaluations=4), options=OPTIONS)


def wait_at(step: int, folder: Path, then: Callable[[], object]) -> Callable[[Task[Any]], Task[Any]]:
    """Changes a task so that something happens at a step, the first time that a training comes there."""

    def once() -> None:
        if not (folder / f"happened-{os.environ['RANK']}").exists():
            (folder / f"happened-{os.environ['RANK']}").touch()
            then()

    return lambda task: before_step(task, STEPS, step, once)


def out_of_memory() -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


def small_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def second_fails(graph: Any, inputs: Any) -> Any:
    """A compiler that the second process does not have."""
    if os.environ["RANK"] == "1":
        raise RuntimeError("no compiler here")
    return graph.forward


def act(fault: str, folder: Path) -> Callable[[Task[Any]], Task[Any]]:
    """What is to happen in this process."""
    kind, _, where = fault.partition("@")
    if where and int(where) != int(os.environ["RANK"]):
        return lambda task: task
    return {
        "": lambda task: task,
        "uncompiled": lambda task: task,
        "dies": wait_at(4, folder, lambda: os._exit(9)),
        "full": wait_at(4, folder, small_disk),
        "late": wait_at(4, folder, out_of_memory),
        "wait": wait_at(4, folder, lambda: time.sleep(3)),
    }[kind]


def work(kind: str, folder: Path, art: Path, fault: str = "") -> int:
    """A training in this process, to its end or to an exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        about = replace(plan(), compiler={"uncompiled@1": second_fails, "dies@1": "eager"}.get(fault))
        run(act(fault, folder)(task_of(kind, art, folder)), about, folder)
    except UserError as error:
        print(error)
        return 2
    except KeyboardInterrupt:
        print("stopped")
        return 130
    return 0


# Starting them


class Started(NamedTuple):
    """A process, and the file of what it says."""

    process: Any  # multiprocessing's, of a context
    words: Path

    def ended(self) -> tuple[int, str]:
        """Exit code and words, when it has ended."""
        self.process.join(120)
        return self.process.exitcode, self.words.read_text()


def child(rank: int, environment: dict[str, str], words: Path, target: Callable[..., int], arguments: Any) -> None:
    """In the new process."""
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(words, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    try:
        code = target(*arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def started(target: Callable[..., int], *arguments: Sequence[object]) -> Iterator[list[Started]]:
    """A process for each list of arguments, as a launcher starts those of one training; none outlives the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = str(len(arguments))
    about = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    about |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # as torchrun sets it
    context = multiprocessing.get_context("forkserver")  # which loads torch once for all of them
    context.set_forkserver_preload(["train.run", "igpt.cli", "tests.test_processes"])
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank, own in enumerate(arguments):
            words = Path(folder) / str(rank)
            process = context.Process(target=child, args=(rank, about, words, target, own))
            process.start()
            processes.append(Started(process, words))
        try:
            yield processes
        finally:
            for process, _ in processes:
                process.kill()
                process.join()


def training(count: int, kind: str, folder: Path, art: Path, fault: str = "") -> list[tuple[int, str]]:
    """A training by so many processes."""
    with started(work, *[(kind, folder, art, fault)] * count) as processes:
        return [each.ended() for each in processes]


def curve(folder: Path) -> list[dict[str, float]]:
    """Of every step, the last time that it was learned."""
    lines = {(line["step"], "score" in line): line for line in metrics_in(folder)}
    return [{key: value for key, value in lines[place].items() if key != "time"} for place in sorted(lines)]


def same_curve(folder: Path, other: Path) -> None:
    for ours, theirs in zip(curve(folder), curve(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"stage"}:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=2e-5), (ours["step"], name)


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return art_folder(tmp_path_factory.mktemp("art"))


@pytest.fixture(scope="module")
def undisturbed(art: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training by two processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert training(2, "gpt", folder, art) == [(0, ""), (0, "")]
    return folder


# They learn what one would


@pytest.mark.parametrize(("kind", "count"), [("gpt", 2), ("gpt", 3), ("fresh", 3), ("tokenizer", 3)])
def test_several_processes_learn_what_one_learns(kind: str, count: int, art: Path, tmp_path: Path) -> None:
    """Three do not divide a batch of eight. The tokenizer starts and revives its codes from the inputs of all, and of
    fresh views each process encodes some for all."""
    run(task_of(kind, art, tmp_path / "one"), plan(), tmp_path / "one")
    assert training(count, kind, tmp_path / "several", art) == [(0, "")] * count
    same_curve(tmp_path / "several", tmp_path / "one")
    states = (next((tmp_path / name).glob("*-state.safetensors")) for name in ("one", "several"))
    one, several = map(load_file, states)
    for name, value in one.items():
        assert torch.allclose(value.float(), several[name].float(), atol=3e-3), name


# They end together and go on


@pytest.mark.parametrize(
    ("number", "ranks"), [(signal.SIGINT, (0, 1)), (signal.SIGINT, (1,)), (signal.SIGTERM, (0,))], ids=str
)
def test_a_signal_to_any_process_stops_all_and_the_same_command_goes_on_to_the_same_weights(
    number: signal.Signals, ranks: tuple[int, ...], art: Path, tmp_path: Path, undisturbed: Path
) -> None:
    with started(work, *[("gpt", tmp_path, art, "wait")] * 2) as processes:
        wait_for(tmp_path, processes)
        for rank in ranks:
            os.kill(processes[rank].process.pid, number)
        assert [each.ended() for each in processes] == [(130, "stopped\n")] * 2
    assert training(2, "gpt", tmp_path, art) == [(0, ""), (0, "")]
    goes_on_to(tmp_path, undisturbed)


def wait_for(folder: Path, processes: list[Started]) -> None:
    """Until all have come to where something happens."""
    while not all((folder / f"happened-{rank}").exists() for rank in range(len(processes))):
        assert all(each.process.is_alive() for each in processes)
        time.sleep(0.05)


def goes_on_to(folder: Path, undisturbed: Path) -> None:
    """The same bits as without a disturbance."""
    ours, theirs = (load_file(each / "gpt-state.safetensors") for each in (folder, undisturbed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert curve(folder) == curve(undisturbed)


def test_a_process_that_is_killed_ends_the_others_and_the_same_command_goes_on(
    art: Path, tmp_path: Path, undisturbed: Path
) -> None:
    with started(work, *[("gpt", tmp_path, art, "wait")] * 2) as processes:
        wait_for(tmp_path, processes)
        processes[1].process.kill()
        (left, words), (killed, _) = (each.ended() for each in processes)
    assert (left, killed) == (2, -signal.SIGKILL) and "another process of this training has ended" in words
    assert training(2, "gpt", tmp_path, art) == [(0, ""), (0, "")]
    goes_on_to(tmp_path, undisturbed)


def test_memory_that_runs_out_later_is_no_matter_of_the_others(art: Path, tmp_path: Path, undisturbed: Path) -> None:
    """One process takes its part of the batch in halves from there on; the others do not even notice."""
    assert training(2, "gpt", tmp_path, art, "late@1") == [
        (0, ""),
        (0, "out of memory: going on with 2 samples at once\n"),
    ]
    same_curve(tmp_path, undisturbed)


@pytest.mark.parametrize("kind", ["gpt", "tokenizer"])
def test_what_one_process_alone_cannot_compile_is_no_matter_of_the_others(kind: str, art: Path, tmp_path: Path) -> None:
    (first, nothing), (second, said) = training(2, kind, tmp_path, art, "uncompiled@1")
    assert (first, second, nothing) == (0, 0, "") and "so it learns more slowly: no compiler here" in said


def test_the_death_of_another_process_is_not_taken_for_a_fault_of_the_compiler(art: Path, tmp_path: Path) -> None:
    """It is noticed inside a step, where the codebook learns from the inputs of all."""
    (first, heard), (second, _) = training(2, "tokenizer", tmp_path, art, "dies@1")
    assert (first, second) == (2, 9) and "another process of this training has ended" in heard


def test_a_full_disk_is_told_to_all_and_the_same_command_goes_on(art: Path, tmp_path: Path, undisturbed: Path) -> None:
    found = training(2, "gpt", tmp_path, art, "full@0")
    assert [code for code, _ in found] == [2, 2] and all("cannot be written" in words for _, words in found)
    assert not list(tmp_path.glob("*.part"))
    assert training(2, "gpt", tmp_path, art) == [(0, ""), (0, "")]
    goes_on_to(tmp_path, undisturbed)


def test_another_number_of_processes_goes_on_with_the_same_samples(
    art: Path, tmp_path: Path, undisturbed: Path
) -> None:
    training(2, "gpt", tmp_path, art, "full@0")
    run(task_of("gpt", art, tmp_path), plan(), tmp_path)
    same_curve(tmp_path, undisturbed)


# They start together


SAMPLES = "--tokenizer-crops 48 --decoder-crops 16 --gpt-samples 64"
TOY = f"--preset toy {SAMPLES} --views 1 --perceptual none --adversarial 0"


def cli(*words: object) -> int:
    """`igpt train` in this process."""
    return main(["train", *map(str, words), *TOY.split()])


def test_processes_started_differently_are_told_before_the_first_step(art: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "model", art_folder(tmp_path / "other", each=5)
    for words, sentence in (
        (
            (art, "--out", out, "--seed", "5"),
            "process 1 was started with seed 5, process 0 with 0; the same are wanted",
        ),
        ((other, "--out", out), "process 1 was started with art"),
    ):
        with started(cli, (art, "--out", out), words) as processes:
            found = [each.ended() for each in processes]
        assert [(code, sentence in words) for code, words in found] == [(2, True)] * 2, found
    assert not out.exists()


def test_a_folder_in_which_another_trains_is_said_by_all(art: Path, tmp_path: Path) -> None:
    (tmp_path / "model" / "training").mkdir(parents=True)
    with FileLock(tmp_path / "model" / "training" / "lock"):
        with started(cli, *[(art, "--out", tmp_path / "model")] * 2) as processes:
            found = [each.ended() for each in processes]
    assert [(code, "is being trained by process" in words) for code, words in found] == [(2, True)] * 2, found


def test_two_processes_make_a_model_and_share_out_its_encoding(art: Path, tmp_path: Path) -> None:
    scores = []
    for count in (1, 2):
        out = tmp_path / str(count)
        with started(cli, *[(art, "--out", out)] * count) as processes:
            found = [each.ended() for each in processes]
        assert [code for code, _ in found] == [0] * count, found
        scores.append([line["score"] for line in metrics_in(out / "training") if "score" in line])
        assert ImageGPT.load(out, "cpu").labels == ["blue", "red"]
    assert scores[0] == pytest.approx(scores[1], rel=0.02)


def tune(model: Path, art: Path, out: Path) -> int:
    """`igpt finetune` in this process."""
    return main(["finetune", str(art), "--model", str(model), "--out", str(out), "--quiet"])


def test_fine_tuning_says_that_it_takes_one_process(tiny_folder: Path, art: Path, tmp_path: Path) -> None:
    with started(tune, *[(tiny_folder, art, tmp_path / "mine")] * 2) as processes:
        found = [each.ended() for each in processes]
    assert [(code, "learns in one process" in words) for code, words in found] == [(2, True)] * 2, found
    assert not (tmp_path / "mine").exists()


# They draw together


def draw(model: Path, out: Path) -> int:
    """Forty pictures by `igpt generate`."""
    how = ["--size", "16", "--steps", "2", "--seed", "3", "-n", "40"]
    return main(["generate", "--model", str(model), "--out", str(out), *how])


def test_processes_share_out_the_pictures_and_go_on_where_they_were_stopped(tiny_folder: Path, tmp_path: Path) -> None:
    out, alone = tmp_path / "shared", tmp_path / "alone"
    for _ in range(2):
        with started(draw, *[(tiny_folder, out)] * 3) as processes:
            found = [each.ended() for each in processes]
        assert [code for code, _ in found] == [0] * 3, found
        paths = sorted(out.glob("*.png"))
        assert len(paths) == 40 and sorted(int(path.stem.split("-")[1]) for path in paths) == list(range(3, 43))
        paths[5].unlink()  # its batch is drawn again
    assert draw(tiny_folder, alone) == 0
    assert all((alone / path.name).read_bytes() == path.read_bytes() for path in paths if path.exists())


def test_without_a_seed_they_would_draw_pictures_that_do_not_fit_together(tiny_folder: Path, tmp_path: Path) -> None:
    with started(cli_generate, *[(tiny_folder, tmp_path)] * 2) as processes:
        found = [each.ended() for each in processes]
    assert [(code, "draw from one --seed" in words) for code, words in found] == [(2, True)] * 2


def cli_generate(model: Path, out: Path) -> int:
    """Without a seed."""
    return main(["generate", "--model", str(model), "--out", str(out)])
