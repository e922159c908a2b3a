"""The command that opens the studio, a page in the browser."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from igpt.config import DEFAULT_MODEL
from igpt.files import check_writable
from tokenizer_vq.base import UserError

from .flags import add_command, number

PORT, FOLDER = 7860, "studio"


def add_to(commands: Any) -> None:
    """`igpt studio`."""
    parser = add_command(commands, "studio", _studio, "draw, edit and fine-tune in a browser, on this machine only")
    models = f"names, folders and adapters to begin with, beside those in the box (default: {DEFAULT_MODEL})"
    parser.add_argument("--model", nargs="+", default=[DEFAULT_MODEL], metavar="MODEL", help=models)
    parser.add_argument("--out", default=FOLDER, metavar="FOLDER", help=f"for pictures and models (default: {FOLDER})")
    parser.add_argument("--port", type=number(int), default=PORT, metavar="N", help=f"of 127.0.0.1 (default: {PORT})")
    parser.add_argument("--open", action="store_true", help="also open the page in the browser")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")


def _studio(args: argparse.Namespace) -> None:
    if find_spec("gradio") is None:
        raise UserError("igpt studio is a page made with Gradio, which is missing: pip install 'igpt[studio]'")
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port {args.port} cannot be; 1 to 65535 are wanted")
    check_writable(args.out)
    with tempfile.TemporaryDirectory(prefix="igpt-studio-") as cache:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": cache}  # before Gradio is imported
        import webbrowser  # only here, as every command pays for what is imported above

        from igpt.studio.app import serve
        from igpt.studio.engine import Engine

        engine = Engine(args.model, Path(args.out), args.device)
        engine.model(next(iter(engine.places)))  # complains here, before there is a page
        address, close = serve(engine, args.port)
        print(f"igpt studio is at {address} (Ctrl-C ends it)", flush=True)
        if args.open and not webbrowser.open(address):
            print("igpt: no browser can be opened here; open the address in one", file=sys.stderr)
        ended = threading.Event()
        for handler in (lambda *_: ended.set()), signal.SIG_IGN:  # the second Ctrl-C has nothing more to end
            for end in signal.SIGINT, signal.SIGTERM:
                signal.signal(end, handler)
            while not ended.wait(1):  # without a limit it would not be heard on Windows
                pass
        if not engine.idle:
            print("igpt: ending; a training writes the best so far", file=sys.stderr, flush=True)
        close()
