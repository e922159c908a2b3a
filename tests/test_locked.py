"""Locked models: drawn with like open ones, opened by nobody else, and never laid open on a disk."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import igpt
from igpt import checkpoint, locked
from igpt.cli import main
from tests.painting import art_folder
from tokenizer_vq.base import UserError

pyrage = pytest.importorskip("pyrage", reason="pyrage is not installed, so no model can be locked")
needs_age = pytest.mark.skipif(shutil.which("age") is None, reason="the command age is not installed")

ROOT = Path(__file__).resolve().parent.parent
SECRET = "correct horse battery staple"
Capture = pytest.CaptureFixture[str]
Keys = tuple[str, Path]  # a public key, and the file with the secret one


@pytest.fixture(autouse=True)
def no_key_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the environment opens anything, unless a test says so; and no terminal is asked."""
    for name in (locked.PASSPHRASE, locked.IDENTITY):
        monkeypatch.setenv(name, "")  # so that what a command line sets is gone afterwards
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    identity = pyrage.x25519.Identity.generate()
    path = tmp_path_factory.mktemp("keys") / "key.txt"
    path.write_text(f"# created: today\n# public key: {identity.to_public()}\n{identity}\n")
    return str(identity.to_public()), path


@pytest.fixture(scope="module")
def for_key(keys: Keys, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, locked for the key; deriving a passphrase takes a second, and this takes none."""
    path = tmp_path_factory.mktemp("locked") / "tiny.age"
    files = checkpoint.read_files(tiny_folder) | {checkpoint.CARD: b"# tiny\n"}
    path.write_bytes(locked.lock(files, [locked.recipient(keys[0])]))
    return path


@pytest.fixture(scope="module")
def for_passphrase(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("locked") / "tiny.age"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(locked.PASSPHRASE, SECRET)
        path.write_bytes(locked.lock(checkpoint.read_files(tiny_folder), []))
    return path


def opening(keys: Keys) -> dict[str, str]:
    return {locked.IDENTITY: str(keys[1])}


def refusal(capsys: Capture, folder: Path, *argv: str) -> str:
    """The one sentence of a refused command line, after which the folder is as it was."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("igpt: ") and err.count("\n") == 1, err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return err


# Locked and used


def test_a_locked_model_draws_what_the_open_one_draws_and_only_with_the_key(
    for_key: Path, keys: Keys, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="locked for the owner of a key: --identity FILE or IGPT_IDENTITY is wanted"):
        igpt.load(for_key, "cpu")
    monkeypatch.setenv(locked.IDENTITY, str(keys[1]))
    closed, open_one = igpt.load(for_key, "cpu"), igpt.load(tiny_folder, "cpu")
    assert closed.weights_hash == open_one.weights_hash and closed.labels == open_one.labels
    pictures = [model.generate(size=24, label="red", seed=3, steps=4)[0].tobytes() for model in (closed, open_one)]
    assert pictures[0] == pictures[1]


def test_a_passphrase_in_the_environment_opens_it_and_another_one_does_not(
    for_passphrase: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(locked.PASSPHRASE, SECRET)
    assert checkpoint.load(for_passphrase).weights_hash == checkpoint.load(tiny_folder).weights_hash
    monkeypatch.setenv(locked.PASSPHRASE, SECRET + "s")
    with pytest.raises(UserError, match="another passphrase or key is wanted, or the file is cut or altered"):
        checkpoint.load(for_passphrase)
    monkeypatch.setenv(locked.PASSPHRASE, "")
    with pytest.raises(UserError, match="wants a passphrase: on a terminal, or in IGPT_PASSPHRASE"):
        checkpoint.load(for_passphrase)


def test_every_command_with_a_model_takes_a_locked_one(
    for_key: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    art = art_folder(tmp_path / "art", each=3)
    model = ["--model", str(for_key), "--identity", str(keys[1])]
    picture = str(art / "red" / "0.png")
    for words in (
        ["generate", "--size", "16", "--seed", "1", "--out", "a.png", *model],
        ["vary", picture, "--seed", "1", "--steps", "2", *model],
        ["replay", "a.png", *model],
        ["tokenize", picture, *model],
        ["surprise", picture, "--orders", "1", *model],
        ["info", str(for_key), *model[2:]],
        ["finetune", "art", "--out", "tuned", "--adapter", "--samples", "8", "--quiet", *model],
        ["generate", "--size", "16", "--seed", "1", "--adapter", "tuned/adapter.safetensors", *model],
        ["train", "art", "--out", "new", "--tokenizer", *model[1:], "--preset", "toy", "--gpt-samples", "16"],
    ):
        monkeypatch.setenv(locked.IDENTITY, "")
        assert main(words) == 0, words
    assert f"{for_key}" not in capsys.readouterr().out.splitlines()


def test_who_only_draws_never_finds_the_open_weights_on_the_disk(
    for_key: Path, keys: Keys, tiny_folder: Path, tmp_path: Path
) -> None:
    """Every file that is opened for writing is told by Python's own audit of what a process does."""
    code = """
import os, sys
written = []
def told(event, args):
    if event == "open" and (set(str(args[1])) & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
        written.append(str(args[0]))
sys.addaudithook(told)
from igpt.cli import main
assert main(sys.argv[1:]) == 0
print("written", [name for name in written if name != os.devnull and not name.endswith(".pyc")], file=sys.stderr)
"""
    words = ["generate", "--size", "16", "--seed", "1", "--label", "red", "--model", str(for_key), "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, *words],
        cwd=tmp_path,
        env=os.environ | opening(keys) | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("written ['out/.igpt-") and last.count("', '") == 0, "the picture, and nothing beside it"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["red-1.png"]


def test_learning_from_a_locked_model_says_that_what_it_writes_is_open_and_how_to_lock_it(
    for_key: Path, keys: Keys, tmp_path: Path, capsys: Capture
) -> None:
    art, more = art_folder(tmp_path / "art", each=3), ["--samples", "8", "--identity", str(keys[1])]
    assert main(["finetune", str(art), "--out", str(tmp_path / "tuned"), "--model", str(for_key), *more]) == 0
    assert "is locked, but the new model is written open" in capsys.readouterr().err
    words = ["train", str(art), "--out", str(tmp_path / "my model"), "--tokenizer", str(for_key), *more[2:]]
    assert main([*words, "--preset", "toy", "--gpt-samples", "16"]) == 0
    again = shlex.split(re.findall("`igpt (lock [^`]*)`", capsys.readouterr().err)[0])
    assert main([*again, "--recipient", keys[0]]) == 0 and (tmp_path / "my model.age").is_file()
    capsys.readouterr()
    more += ["--adapter"]
    assert main(["finetune", str(art), "--out", str(tmp_path / "adapter"), "--model", str(for_key), *more]) == 0
    assert "written open" not in capsys.readouterr().err


def test_the_state_of_a_training_for_an_adapter_holds_no_matrix_of_its_base(
    for_key: Path, keys: Keys, tiny_folder: Path, tmp_path: Path
) -> None:
    art, work = art_folder(tmp_path / "art", each=3), tmp_path / "out" / "training"
    words = ["finetune", str(art), "--out", str(tmp_path / "out"), "--adapter", "--model", str(for_key)]
    words += ["--identity", str(keys[1]), "--samples", "100000", "--save-minutes", "0", "--quiet"]
    command = [sys.executable, "-m", "igpt", *words]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True) as learning:
        while learning.poll() is None and not list(work.glob("*state.safetensors")):
            time.sleep(0.05)
        learning.kill()
    (state,) = work.glob("*state.safetensors")
    saved, gpt = state.read_bytes(), checkpoint.load(tiny_folder).gpt
    known = [value.detach() for name, value in gpt.named_parameters() if name != "labels.weight"]
    matrices = [value.numpy().tobytes() for value in known if value.dim() == 2 and value.any()]
    assert len(matrices) > 5 and not [matrix for matrix in matrices if matrix[:64] in saved]


def test_the_command_locks_and_unlocks_to_the_same_files_and_overwrites_nothing(
    tiny_folder: Path, keys: Keys, tmp_path: Path, capsys: Capture
) -> None:
    path, out = tmp_path / "tiny.age", tmp_path / "open"
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")
    (folder / "README.md").write_text("# tiny\n")
    for number in ("", "-2"):
        assert main(["lock", str(folder), "--out", str(path), "--recipient", keys[0]]) == 0
        assert capsys.readouterr().out == f"{tmp_path / f'tiny{number}.age'}\n"
    assert main(["unlock", str(path), "--out", str(out), "--identity", str(keys[1])]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    same = [{file.name: file.read_bytes() for file in place.iterdir()} for place in (folder, out)]
    assert same[0] == same[1] and set(same[0]) == {"config.json", "model.safetensors", "README.md"}
    said = refusal(capsys, tmp_path, "unlock", str(path), "--out", str(out), "--identity", str(keys[1]))
    assert "holds something already" in said


def test_a_model_can_be_locked_for_several_keys_and_each_opens_it(
    tiny_folder: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = pyrage.x25519.Identity.generate()
    recipients = ["--recipient", keys[0], "--recipient", str(other.to_public())]
    assert main(["lock", str(tiny_folder), "--out", str(tmp_path / "two.age"), *recipients]) == 0
    (tmp_path / "other.txt").write_text(f"{other}\n")
    for identity in (keys[1], tmp_path / "other.txt"):
        monkeypatch.setenv(locked.IDENTITY, str(identity))
        assert checkpoint.load(tmp_path / "two.age").labels == ["red", "blue"]


# Wrong keys, damaged files


def test_a_wrong_key_is_one_sentence_and_nothing_is_written(for_key: Path, tmp_path: Path, capsys: Capture) -> None:
    stranger = tmp_path / "stranger.txt"
    stranger.write_text(f"{pyrage.x25519.Identity.generate()}\n")
    opened = ["unlock", str(for_key), "--out", str(tmp_path / "open"), "--identity"]
    assert "cannot be unlocked" in refusal(capsys, tmp_path, *opened, str(stranger))
    (tmp_path / "empty.txt").touch()
    assert "cannot be unlocked" in refusal(capsys, tmp_path, *opened, str(tmp_path / "empty.txt"))
    (tmp_path / "wrong.txt").write_text("AGE-SECRET-KEY-1NONE\n")
    assert "cannot be unlocked" in refusal(capsys, tmp_path, *opened, str(tmp_path / "wrong.txt"))
    for missing in ("missing.txt", "~nobody-by-this-name/key.txt", "\0"):
        assert "there is no file with secret keys" in refusal(capsys, tmp_path, *opened, missing)
    for missing in ("missing.age", "\0", str(tmp_path)):
        words = ["unlock", missing, "--out", str(tmp_path / "open")]
        assert "there is no locked model" in refusal(capsys, tmp_path, *words)


def test_a_wrong_recipient_is_one_sentence_and_nothing_is_written(
    tiny_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    for wrong in ("age1foo", "", "me@example.org", "\udcff"):
        words = ["lock", str(tiny_folder), "--out", str(tmp_path / "tiny.age"), "--recipient", wrong]
        assert "is no public key of age" in refusal(capsys, tmp_path, *words)


def spoilings(data: bytes) -> list[bytes]:
    """The file cut at many places, and with one bit of many bytes turned over."""
    cuts = [data[:length] for length in (1, 21, 22, 60, 150, len(data) // 2, len(data) - 1)]
    places = (25, 40, 100, 160, 220, len(data) // 2, len(data) - 1)
    return [*cuts, *(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in places), data + b"\0"]


def test_a_cut_or_altered_file_is_refused_and_nothing_is_written(
    for_key: Path, keys: Keys, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "spoilt.age"
    for spoilt in spoilings(for_key.read_bytes()):
        path.write_bytes(spoilt)
        refusal(capsys, tmp_path, "unlock", str(path), "--out", str(tmp_path / "o"), "--identity", str(keys[1]))
        refusal(capsys, tmp_path, "info", str(path), "--identity", str(keys[1]))


def test_a_file_that_is_no_locked_model_is_never_looked_for_on_the_hub(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "model.age").write_bytes(b"age-encr")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert "neither a model folder nor a file" in refusal(capsys, tmp_path, "info", "some/model.age")


def test_an_honest_lock_around_something_else_is_refused(keys: Keys, tmp_path: Path, capsys: Capture) -> None:
    for content in (b"", b"no tar", b"\0" * 10240, b"config.json" + b"\0" * 501):
        path = tmp_path / "odd.age"
        path.write_bytes(pyrage.encrypt(content, [locked.recipient(keys[0])]))
        refusal(capsys, tmp_path, "info", str(path), "--identity", str(keys[1]))


def test_what_lies_in_a_locked_file_beside_a_model_is_not_unpacked(
    tiny_folder: Path, keys: Keys, tmp_path: Path
) -> None:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for name in ("config.json", "model.safetensors"):
            tar.add(tiny_folder / name, f"./{name}")
        for name in ("../escaped", "/tmp/escaped", "sub/config.json", "run.sh"):
            tar.add(tiny_folder / "config.json", name)
        link = tarfile.TarInfo("README.md")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    path, out = tmp_path / "odd.age", tmp_path / "deep" / "open"
    path.write_bytes(pyrage.encrypt(plain.getvalue(), [locked.recipient(keys[0])]))
    assert main(["unlock", str(path), "--out", str(out), "--identity", str(keys[1])]) == 0
    assert sorted(file.name for file in tmp_path.rglob("*") if not file.is_dir()) == [
        "config.json",
        "model.safetensors",
        "odd.age",
    ]


def test_a_file_that_asks_for_years_of_work_is_refused_at_once(for_passphrase: Path, tmp_path: Path) -> None:
    head, _, rest = for_passphrase.read_bytes().partition(b"\n---")
    stanza = head.split(b" ")
    path = tmp_path / "slow.age"
    path.write_bytes(b" ".join(stanza[:3]) + b" 40\n" + stanza[3].split(b"\n", 1)[1] + b"\n---" + rest)
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="Excessive work"):
        patch.setenv(locked.PASSPHRASE, SECRET)
        checkpoint.load(path)
    assert time.monotonic() - began < 5


def test_without_the_library_it_is_said_what_to_install(
    for_key: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "pyrage", None)
    for words in (
        ["lock", str(tiny_folder), "--out", str(tmp_path / "tiny.age")],
        ["unlock", str(for_key), "--out", str(tmp_path / "open")],
        ["generate", "--model", str(for_key)],
    ):
        assert "locked models want the package pyrage: pip install pyrage" in refusal(capsys, tmp_path, *words)


def test_a_locked_file_has_no_wider_permissions_than_any_new_file(
    tiny_folder: Path, keys: Keys, tmp_path: Path
) -> None:
    before = os.umask(0o077)
    try:
        assert main(["lock", str(tiny_folder), "--out", str(tmp_path / "a" / "x.age"), "--recipient", keys[0]]) == 0
        words = ["unlock", str(tmp_path / "a" / "x.age"), "--out", str(tmp_path / "b"), "--identity", str(keys[1])]
        assert main(words) == 0
    finally:
        os.umask(before)
    assert all(not path.stat().st_mode & 0o077 for path in tmp_path.rglob("*"))


# With the command age


@needs_age
def test_age_opens_what_igpt_locked_and_igpt_takes_what_age_locked(
    for_key: Path, keys: Keys, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = subprocess.run(["age", "--decrypt", "-i", keys[1], for_key], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        weights: Any = tar.extractfile("model.safetensors")
        assert weights.read() == (tiny_folder / "model.safetensors").read_bytes()
    packed = subprocess.run(["tar", "c", "-C", tiny_folder, "."], check=True, capture_output=True).stdout
    path = tmp_path / "by-age.age"
    subprocess.run(["age", "-r", keys[0], "-o", path], input=packed, check=True)
    monkeypatch.setenv(locked.IDENTITY, str(keys[1]))
    assert checkpoint.load(path).weights_hash == checkpoint.load(tiny_folder).weights_hash


def on_a_terminal(words: list[str], *answers: str) -> tuple[int, str]:
    """Run a command on a terminal of its own and answer every question; its exit status and all that was shown."""
    child, terminal = pty.fork()
    if child == 0:  # pragma: no cover
        os.execvpe(words[0], words, os.environ | {"PYTHONPATH": str(ROOT), locked.PASSPHRASE: ""})
    shown, waiting, deadline = b"", list(answers), time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                if not (part := os.read(terminal, 4096)):
                    break
            except OSError:  # the end of a terminal
                break
            shown += part
        elif waiting and shown.rstrip().endswith(b":"):
            time.sleep(0.2)  # until what is typed is no longer shown
            os.write(terminal, waiting.pop(0).encode() + b"\n")
            shown += b"\n"
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown.decode(errors="replace")


@pytest.fixture
def igpt_on_a_terminal() -> Callable[..., tuple[int, str]]:
    return lambda words, *answers: on_a_terminal([sys.executable, "-m", "igpt", *words], *answers)


@pytest.mark.slow
@needs_age
def test_a_passphrase_typed_on_a_terminal_locks_and_age_asks_for_the_same(
    tiny_folder: Path, tmp_path: Path, igpt_on_a_terminal: Callable[..., tuple[int, str]]
) -> None:
    path, plain = tmp_path / "tiny.age", tmp_path / "tiny.tar"
    status, shown = igpt_on_a_terminal(["lock", str(tiny_folder), "--out", str(path)], SECRET, SECRET)
    assert status == 0 and SECRET not in shown, shown
    status, shown = on_a_terminal(["age", "--decrypt", "-o", str(plain), str(path)], SECRET)
    assert status == 0, shown
    with tarfile.open(plain) as tar:
        assert "model.safetensors" in tar.getnames()
    status, shown = on_a_terminal(["age", "--passphrase", "-o", str(tmp_path / "x.age"), str(plain)], SECRET, SECRET)
    assert status == 0, shown
    status, shown = igpt_on_a_terminal(["info", str(tmp_path / "x.age")], SECRET)
    assert status == 0 and "2: red, blue" in shown and SECRET not in shown, shown


def test_two_different_passphrases_lock_nothing(
    tiny_folder: Path, tmp_path: Path, igpt_on_a_terminal: Callable[..., tuple[int, str]]
) -> None:
    status, shown = igpt_on_a_terminal(["lock", str(tiny_folder), "--out", str(tmp_path / "x.age")], "one", "two")
    assert status == 2 and "wants a passphrase, twice the same" in shown and not list(tmp_path.iterdir())


def test_a_model_in_the_box_can_be_locked(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["lock", "pixels", "--out", str(tmp_path / "pixels.age"), "--recipient", keys[0]]) == 0
    monkeypatch.setenv(locked.IDENTITY, str(keys[1]))
    assert torch.equal(igpt.load(tmp_path / "pixels.age", "cpu").gpt.query, igpt.load("pixels", "cpu").gpt.query)
