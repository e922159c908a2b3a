"""Ctrl-C, pressed by tests."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def press_ctrl_c() -> None:
    """Once."""
    os.kill(os.getpid(), signal.SIGINT)


def press_ctrl_c_once_there_is(path: Path) -> None:
    """Once, when a file appears, from another thread."""

    def press() -> None:
        while not path.exists():
            time.sleep(0.005)
        press_ctrl_c()

    threading.Thread(target=press, daemon=True).start()


@contextmanager
def ctrl_c_once_there_is(path: Path) -> Iterator[None]:
    """A block that ends with the KeyboardInterrupt that it gets when a file appears."""
    press_ctrl_c_once_there_is(path)
    with pytest.raises(KeyboardInterrupt):
        yield
        time.sleep(5)  # should it come at the very end
