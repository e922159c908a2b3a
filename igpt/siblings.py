"""Reaches the packages `generate` and `train`, which lie next to `igpt`, without ever searching sys.path for them.

`train` and `generate` are the likeliest names of a user's own script or picture folder. A plain `from train import ...`
in here would find that script first.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

from tokenizer_vq.base import UserError


def sibling(name: str) -> ModuleType:
    """The package or module `name` ("generate", "train.gpt") of this installation, whatever the user's folder holds.

    It is registered under its plain name, so that its relative imports, its submodules and pickling work as usual.
    Raises UserError when it is not installed, or when a module of somebody else already holds the name.
    """
    package, here = name.partition(".")[0], Path(__file__).resolve().parent.parent
    if (module := sys.modules.get(package)) is None:
        spec = PathFinder.find_spec(package, [str(here)])
        if spec is None or spec.loader is None:
            raise UserError(f"igpt is not installed completely: the package {package!r} is missing in {here}")
        module = sys.modules[package] = module_from_spec(spec)  # before it runs: its own files may import it
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[package]
            raise
    if getattr(module, "PART_OF", None) != "igpt":
        origin = getattr(module, "__file__", None) or "another module"
        raise UserError(f"{origin} holds the name {package!r}, so igpt's own {package!r} cannot be loaded")
    return import_module(name)
