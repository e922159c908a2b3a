"""Layout: imports flow one way, importing does nothing, and a user's own train.py or generate.py does no harm."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from igpt.siblings import sibling
from tests.imports import FILES, ROOT
from tokenizer_vq.base import UserError

MAY_IMPORT = {
    "tokenizer_vq": {"tokenizer_vq"},
    "igpt": {"tokenizer_vq", "igpt"},
    "generate": {"tokenizer_vq", "igpt", "generate"},
    "train": {"tokenizer_vq", "igpt", "train"},
}


def python(code: str, cwd: Path, *arguments: str) -> str:
    """What a Python of its own prints, run in `cwd` with this checkout on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(tree: ast.AST) -> Iterator[str]:
    """The first word of every absolute import; dots for one that leaves its package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield (node.module or "").partition(".")[0]
            elif node.level > 1:
                yield "." * node.level


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_flow_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    names = set(imported(ast.parse(path.read_text(encoding="utf-8"))))
    assert not any(name.startswith(".") for name in names), "relative imports stay inside the package"
    assert names & set(MAY_IMPORT) <= MAY_IMPORT[package]


def test_what_measures_and_the_command_line_stand_above_the_rest_of_igpt() -> None:
    """Modules directly in igpt import none of them; what measures does not import the command line, the studio neither,
    and nothing but the command line imports the studio."""
    above = {"igpt": {"evaluation", "studio", "cli"}, "evaluation": {"studio", "cli"}, "studio": {"cli"}}
    for path in [path for path in (ROOT / "igpt").rglob("*.py") if path.name != "__main__.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                words = set(re.findall(r"\w+", ast.unparse(node)))
                assert not words & above.get(path.parent.name, set()), f"{path}: {ast.unparse(node)}"


def test_only_siblings_imports_by_a_computed_name() -> None:
    """A literal, as in import_module(".image_gpt", __name__), is fine where it stays inside its package."""
    found = set()
    for path in FILES:
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        for call in calls:
            if ast.unparse(call.func).endswith(("import_module", "__import__")):
                name = call.args[0]
                if not (isinstance(name, ast.Constant) and str(name.value).startswith(".")):
                    found.add(path.name)
    assert found == {"siblings.py"}


def test_the_two_packages_with_common_names_are_marked() -> None:
    assert sibling("generate").PART_OF == sibling("train").PART_OF == "igpt"
    assert sibling("train.options").__name__ == "train.options"
    assert Path(str(sibling("train.options").__file__)) == ROOT / "train" / "options.py"


def test_importing_igpt_loads_nothing_heavy_that_drawing_does_not_need(tiny_folder: Path, tmp_path: Path) -> None:
    code = """
import json, sys, igpt
assert "torch" not in sys.modules
import torch
before = set(sys.modules)
igpt.load(sys.argv[1]).generate(n=1, size=16, label="red", seed=1)
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = set(json.loads(python(code, tmp_path, str(tiny_folder))))
    assert "igpt.image_gpt" in loaded
    assert not loaded & {"torchvision", "accelerate", "transformers", "huggingface_hub", "train", "generate"}
    assert not loaded & {"torch._dynamo", "sympy"}, "torch's compiler, two seconds, comes with random numbers on meta"


def test_importing_any_module_only_defines_things(tmp_path: Path) -> None:
    """All but those that import Gradio, which does more than that."""
    files = [path for path in FILES if "gradio" not in set(imported(ast.parse(path.read_text(encoding="utf-8"))))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    code = """
import os, random, sys, threading, warnings
import torch, accelerate
def state():
    return [
        dict(os.environ), os.getcwd(), os.listdir(), random.getstate(), torch.get_rng_state().tolist(),
        torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype(), threading.active_count(),
        list(warnings.filters), torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(),
    ]
before = state()
for name in sys.argv[1:]:
    __import__(name)
assert all(old == new for old, new in zip(before, state())), [p for p in zip(before, state()) if p[0] != p[1]]
"""
    assert python(code, tmp_path, *names) == ""
    assert list(tmp_path.iterdir()) == []


# Hostile neighbours


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """The folder of a user who has a script or a folder of pictures under every name that igpt uses inside."""
    for name in ("train.py", "generate.py"):
        (tmp_path / name).write_text(f"open('{name} was run', 'w').close()\nMINE = True\n")
    for name in ("train", "generate"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "picture.png").write_bytes(b"")
    return tmp_path


@pytest.mark.slow
def test_the_command_does_not_see_the_users_scripts(hostile: Path, tiny_folder: Path) -> None:
    code = """
import sys
sys.path.insert(0, "")
from igpt.cli import main
for words in (["generate", "--size", "16", "--seed", "1"], ["replay", "red-1.png"]):
    assert main([*words, "--model", sys.argv[1]]) == 0
main(["train", "--help"])
"""
    said = python(code, hostile, str(tiny_folder))
    assert said.startswith("red-1.png\nred-1-replay.png\n") and "--preset" in said
    assert not list(hostile.glob("*was run"))


@pytest.mark.slow
def test_the_module_run_as_a_command_does_not_see_them_either(hostile: Path, tiny_folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "igpt", "generate", "--size", "16", "--seed", "1", "--model", str(tiny_folder)]
    done = subprocess.run(command, cwd=hostile, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "red-1.png\n", "")
    assert not list(hostile.glob("*was run"))


@pytest.mark.slow
def test_the_library_leaves_the_users_own_modules_alone(hostile: Path, tiny_folder: Path) -> None:
    code = """
import sys
sys.path.insert(0, "")
import igpt
igpt.load(sys.argv[1]).generate(size=16)
import generate, train
print(generate.__file__, train.__file__)
"""
    (hostile / "train").rename(hostile / "pictures")  # a package would win over a script, in Python's own order
    (hostile / "generate").rename(hostile / "more")
    words = python(code, hostile, str(tiny_folder)).split()
    assert [Path(word).name for word in words] == ["generate.py", "train.py"]
    assert sorted(path.name for path in hostile.glob("*was run")) == ["generate.py was run", "train.py was run"]


def test_a_name_that_somebody_else_holds_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    impostor = type(sys)("train")
    impostor.__file__ = "/home/me/train.py"
    monkeypatch.setitem(sys.modules, "train", impostor)
    with pytest.raises(UserError, match=r"/home/me/train\.py holds the name 'train'"):
        sibling("train.options")


def test_a_package_that_is_missing_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import igpt.siblings

    monkeypatch.setattr(igpt.siblings, "__file__", str(tmp_path / "igpt" / "siblings.py"))
    monkeypatch.delitem(sys.modules, "train", raising=False)
    with pytest.raises(UserError, match="the package 'train' is missing"):
        sibling("train")


def test_a_package_that_fails_to_load_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import igpt.siblings

    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "__init__.py").write_text("raise OSError('broken')")
    monkeypatch.setattr(igpt.siblings, "__file__", str(tmp_path / "igpt" / "siblings.py"))
    monkeypatch.delitem(sys.modules, "train", raising=False)
    with pytest.raises(OSError, match="broken"):
        sibling("train")
    assert "train" not in sys.modules
