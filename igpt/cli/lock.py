"""Commands that lock a model into one encrypted file, and open it again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from igpt import locked
from igpt.files import check_writable, write_file
from tokenizer_vq.base import UserError

from .flags import add_command, add_shared


def add_to(commands: Any) -> None:
    """All commands of this file."""
    lock = add_command(commands, "lock", _lock, "encrypt a model into one file, which all commands take as a model")
    lock.epilog = "It protects the file where it lies and on its way. Who can draw with a model can copy its manner."
    lock.add_argument("model", metavar="MODEL", help="name or folder of a model")
    lock.add_argument("--out", required=True, metavar="FILE", help="the locked file, as my-style.age")
    keys = f"public key of one who may open it, as age1... (default: a passphrase, asked or in {locked.PASSPHRASE})"
    lock.add_argument("--recipient", action="append", default=[], metavar="KEY", help=keys)
    unlock = add_command(commands, "unlock", _unlock, "write a locked model as the open folder that it was")
    unlock.add_argument("model", metavar="FILE", help="a locked model")
    unlock.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    add_shared(unlock, "--identity")


def _lock(args: argparse.Namespace) -> None:
    from igpt import checkpoint  # loads torch

    out, recipients = Path(args.out).expanduser(), [locked.recipient(key) for key in args.recipient]
    check_writable(out.parent)
    checkpoint.load(args.model)  # a damaged model is told while its open folder is still there
    print(write_file(locked.lock(checkpoint.read_files(checkpoint.find(args.model)), recipients), out))


def _unlock(args: argparse.Namespace) -> None:
    from igpt import checkpoint  # loads torch

    check_writable(out := Path(args.out).expanduser())
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds something already; a new or empty folder is wanted")
    files = locked.unlock(Path(args.model).expanduser())
    for name in sorted(files.keys() & checkpoint.FILES, reverse=True):  # the config last: without it, it is no model
        write_file(files[name], out / name)
    print(out)
