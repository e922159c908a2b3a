"""The `igpt` command. Parsing and all cheap checks come before torch loads; errors are one sentence and exit code 2."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

import igpt
from igpt.locked import IDENTITY
from tokenizer_vq.base import UserError, reason

from . import draw, know, learn, lock, studio
from .flags import Parser


def build_parser() -> Parser:
    """The whole command line. Loads no torch."""
    parser = Parser(prog="igpt", description="Learns from a folder of art and makes new pictures in its manner.")
    parser.add_argument("--version", action="version", version=f"igpt {igpt.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for room in (draw, learn, know, studio, lock):
        room.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns the exit status: 0, 2 for what the user can put right, 130 when interrupted."""
    # Before torch loads: threads that wait for another which a busy machine has put aside sleep instead of spinning,
    # or two busy cores are four times slower than one.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _prepare_process()
    try:
        parser = build_parser()
        args = parser.parse_args(argv)
        if "run" not in args:
            parser.print_help()
            return 0
        if getattr(args, "threads", None):
            os.environ["OMP_NUM_THREADS"] = str(args.threads)
        if identity := getattr(args, "identity", None):
            if not Path(identity).is_file():
                raise UserError(f"there is no file with secret keys at {identity!r}")
            os.environ[IDENTITY] = identity
        args.run(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"igpt: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("igpt: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, as in `igpt show x.png | head -3`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a disk that became full, or an output that nobody can write to
        print(f"igpt: {error.filename or 'the output'} cannot be read or written: {reason(error)}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be written would fail again
        return 2
    return 0


def _prepare_process() -> None:
    """Closed streams swallow what is printed, narrow ones escape what they cannot say, and SIGTERM is as Ctrl-C."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream := getattr(sys, name), TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # on damaged files, of which it names none
