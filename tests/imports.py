"""The import graph of the product code: `python -m tests.imports` prints who imports whom, package by package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("tokenizer_vq", "igpt", "generate", "train")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    """As it is imported: "igpt.cli.draw", "igpt.cli" for its __init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def room(module: str) -> str:
    """The room a module lies in: "igpt.cli", "igpt.evaluation" and "igpt.studio" are rooms of their own."""
    parts = module.split(".")
    inner = ".".join(parts[:2])
    return inner if inner in ("igpt.cli", "igpt.evaluation", "igpt.studio") else parts[0]


def imports_of(module: str) -> set[str]:
    """The modules of this project that a module imports, lazily or for types alone too, and those that it reaches by
    `sibling("...")`."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return {name for name in _imports(ast.parse(path.read_text(encoding="utf-8")), package) if name != module}


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (_known(alias.name) for alias in node.names if _known(alias.name))
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                if found := _known(f"{base}.{alias.name}") or _known(base):
                    yield found
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "sibling":
            if isinstance(node.args[0], ast.Constant) and (found := _known(str(node.args[0].value))):
                yield found


def _known(name: str) -> str:
    """The module of this project that a dotted name is or lies in; "" if none."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def main() -> None:
    for module in MODULES:
        print(f"{module}: {', '.join(sorted(imports_of(module))) or '-'}")
    rooms = {(room(a), room(b)) for a in MODULES for b in imports_of(a) if room(a) != room(b)}
    print("\nrooms: " + ", ".join(f"{a} -> {b}" for a, b in sorted(rooms)))


if __name__ == "__main__":
    main()
