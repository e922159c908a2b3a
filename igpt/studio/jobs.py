"""One thing after another: jobs that draw or learn, done in turn by one thread, so that the two never meet."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Queue

from PIL import Image

from tokenizer_vq.base import UserError

Pictures = Sequence[tuple[Image.Image | Path, str]]  # pictures or their files, and what stands below each


class Stopped(Exception):
    """Somebody pressed Stop."""


class Job:
    """One thing to do, and how far it is. Pages look at it meanwhile."""

    def __init__(self, title: str, work: Callable[[Job], None]):
        self.title, self.work, self.state, self.stopped = title, work, "", False
        self.pictures: Pictures = []
        self.lines: list[str] = []  # what else there is to read
        self.table: list[list[str]] = []  # and rows of a table
        self.on_stop: Callable[[], None] = lambda: None

    def check(self) -> None:
        """Raises Stopped where nobody wants more of it."""
        if self.stopped:
            raise Stopped

    def show(self, state: str, pictures: Pictures | None = None) -> None:
        """Tell how far it is. Raises Stopped, too."""
        self.state, self.pictures = state, self.pictures if pictures is None else pictures
        self.check()


class Jobs:
    """The jobs that wait, the one that is done now or was the last (`now`), and the thread that does them."""

    def __init__(self) -> None:
        self.waiting: Queue[Job | None] = Queue()
        self.now, self.busy = Job("ready", lambda job: None), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, title: str, work: Callable[[Job], None]) -> None:
        """Have something done as soon as all before it is done."""
        self.waiting.put(Job(title, work))

    @property
    def idle(self) -> bool:
        """Whether nothing is done and nothing waits."""
        return self.waiting.unfinished_tasks == 0

    def stop(self) -> None:
        """Stop what is being done, once; what waits begins then."""
        if self.busy and not self.now.stopped:
            self.now.stopped = True
            self.now.on_stop()

    def close(self) -> None:
        """Stop everything and wait for its end: a training writes the best so far."""
        while not self.waiting.empty():
            self.waiting.get()
        self.waiting.put(None)
        self.stop()
        self._thread.join(60)

    def _run(self) -> None:
        while (job := self.waiting.get()) is not None:
            self.busy, self.now = True, job
            try:
                job.check()
                job.work(job)
            except Stopped:
                job.state = "stopped"
            except UserError as error:
                job.state = f"**{error}**"
                print(f"igpt: {error}", file=sys.stderr, flush=True)
            except Exception as error:
                job.state = f"**this went wrong: {str(error) or type(error).__name__}; the terminal has the details**"
                traceback.print_exc()
            self.busy = False
            self.waiting.task_done()
