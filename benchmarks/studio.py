"""How soon the studio is there: `python -m benchmarks.studio` (wants the extra `[studio]`, playwright and a Chromium).

First page: from the moment at which torch is imported to a page whose Draw button can be pressed and whose labels have
come. First step: from the press of Draw to the first preview on the easel, counted in the browser; the first press of a
fresh studio, and the second. Medians of --rounds, on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

START = """
import sys, time, torch
print(time.time(), flush=True)
from igpt.cli import main
sys.exit(main(["studio", *sys.argv[1:]]))
"""
READY = """() => document.querySelector("input[aria-label='Label']")?.value
  && [...document.querySelectorAll("button.primary")].some(button => button.innerText.trim() === "Draw")"""
PRESS = """() => new Promise(done => {
  const images = () => [...document.querySelectorAll("#easel img")], old = new Set(images().map(image => image.src))
  const look = () => images().some(image => !old.has(image.src) && image.complete && image.naturalWidth)
    ? done((performance.now() - start) / 1000) : requestAnimationFrame(look)
  const start = performance.now()
  ;[...document.querySelectorAll("button.primary")].find(button => button.innerText.trim() === "Draw").click()
  look()
})"""


def measure(browser: Any, model: str, folder: Path) -> dict[str, float]:
    """Seconds, of a studio of its own."""
    words = ["--model", model, "--out", str(folder / "out"), "--port", "7960"]
    process = subprocess.Popen([sys.executable, "-c", START, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        torch_there = float(process.stdout.readline())
        address = next(word for word in process.stdout.readline().split() if word.startswith("http"))
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(address)
        page.wait_for_function(READY)
        times = {"first page": time.time() - torch_there}
        for name in ("first step, first press", "first step, second press"):
            times[name] = page.evaluate(PRESS)
            page.wait_for_function("() => /drawn, in/.test(document.querySelector('#status').innerText)")
        page.close()
        return times
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def main() -> None:
    """The table."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["paintings", "pixels"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        browser.new_page().goto("about:blank")
        for model in args.models:
            found = defaultdict(list)
            for _ in range(args.rounds):
                for name, took in measure(browser, model, Path(folder)).items():
                    found[name].append(took)
            for name, seconds in found.items():
                print(
                    f"{model}, {name}: {median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})", flush=True
                )


if __name__ == "__main__":
    main()
