"""`igpt studio` as a person meets it: in a real browser, on tiny models, with every address but 127.0.0.1 refused."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image

from igpt.cli import main
from igpt.image_gpt import ImageGPT
from igpt.lora import apply_lora, save_adapter, with_labels
from igpt.recipe import digest, recipe_of
from tests.painting import COLOURS, art_folder, paint
from tests.painting import drawn as painted

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None]
MISSING += [] if CHROMIUM else ["a Chromium"]
if not MISSING:  # the page needs Gradio
    from igpt.studio.engine import Engine, Wish
    from igpt.studio.tabs import ON_A_PAGE
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"the studio's tests want {' and '.join(MISSING)}"),
]
PATIENCE, SOON = 180_000, 5_000  # milliseconds: nothing here is about speed; and before something is tried again


class Studio:
    """A studio of its own process."""

    def __init__(self, folder: Path, *words: str):
        self.out, self.said, self.complaints = folder / "out", "", ""
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        command = [sys.executable, "-m", "igpt", "studio", "--out", str(self.out), "--port", str(port), *words]
        environment = {key: value for key, value in os.environ.items() if "DISPLAY" not in key}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "BROWSER": "false"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=folder)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        self.address = (re.findall(r"http://127\.0\.0\.1:\d+", self.said) or [""])[0]
        assert self.address, self.complaints

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.complaints += line

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *error: object) -> None:
        """As Ctrl-C in its terminal does."""
        self.process.send_signal(signal.SIGINT)
        try:
            assert self.process.wait(PATIENCE / 1000) == 0
        finally:
            self.process.kill()
        self._reader.join(10)
        assert "Traceback" not in self.complaints, self.complaints

    def pictures(self) -> list[Path]:
        return sorted(self.out.glob("*.png"), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def studio(tiny_folder: Path, tiny_pixels: ImageGPT, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """With the models `tiny`, `sprites` and `gone`, which is deleted as soon as it is on the list, and `mine.x`, an
    adapter of `tiny`."""
    folder = tmp_path_factory.mktemp("studio")
    tiny_pixels.save(folder / "sprites")
    shutil.copytree(tiny_folder, folder / "gone")
    tiny = ImageGPT.load(tiny_folder, "cpu")
    gpt = apply_lora(with_labels(tiny.gpt, 0), 4)
    for name, weight in gpt.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    save_adapter(folder / "mine.x.safetensors", gpt, tiny.labels, ("tiny", tiny.weights_hash), {})
    with Studio(folder, "--model", str(tiny_folder), "mine.x.safetensors", "sprites", "gone") as studio:
        shutil.rmtree(folder / "gone")
        yield studio


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@contextlib.contextmanager
def opened(browser: Any, address: str, width: int = 1280) -> Iterator[Any]:
    """A page that asks for nothing but this machine, and that has no complaint of its own."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    elsewhere: list[str] = []

    def only_here(route: Any) -> None:
        if route.request.url.startswith((f"{address}/", "data:", "blob:")):
            return route.continue_()
        elsewhere.append(route.request.url)
        return route.abort()

    page.route("**/*", only_here)
    page.set_default_timeout(PATIENCE)
    begin(page, address)
    yield page
    assert not elsewhere
    page.close()


@pytest.fixture
def page(browser: Any, studio: Studio) -> Iterator[Any]:
    with opened(browser, studio.address) as page:
        yield page


def begin(page: Any, address: str) -> None:
    page.goto(address)
    said(page, r".")
    label = page.get_by_label("Label", exact=True).first
    steadily(page, lambda: None, lambda: label.input_value() != "")  # what depends on the model has come


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True).locator("visible=true")


def wait_until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE / 1000
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def frames(page: Any) -> None:
    """A few frames later. Gradio gives the controls of a tab or fold their values only after it has put them on the
    page, just before they are painted: what a person does comes later, what a browser is made to do may come before."""
    page.evaluate("() => new Promise(d => { let n = 6; const f = () => --n ? requestAnimationFrame(f) : d(); f() })")


def steadily(page: Any, act: Any, taken: Any) -> None:
    """Act until the page has taken it, and has it a few frames later."""
    from playwright.sync_api import TimeoutError as Late

    end = time.monotonic() + PATIENCE / 1000
    while True:
        with contextlib.suppress(Late):  # as something moved in between
            act()
        frames(page)
        if taken():
            return
        assert time.monotonic() < end


def put(page: Any, label: str, value: object) -> None:
    """Type a value into a box."""
    box = page.get_by_label(label).locator("visible=true").first

    def act() -> None:
        box.fill(str(value))
        page.keyboard.press("Tab")

    steadily(page, act, lambda: box.input_value() == str(value))


def tick(page: Any, label: str, ticked: bool = True) -> None:
    """Tick a box, or choose what has one choice of many."""
    box = page.get_by_label(label, exact=True).locator("visible=true").first
    steadily(page, lambda: box.set_checked(ticked, timeout=SOON), lambda: box.is_checked() == ticked)


def choose(page: Any, label: str, option: str) -> None:
    """Choose one of a list."""
    box = page.get_by_label(label, exact=True).locator("visible=true").first

    def act() -> None:
        if box.input_value() != option:
            box.click(timeout=SOON)
            page.get_by_role("option", name=option, exact=True).click(timeout=SOON)

    steadily(page, act, lambda: box.input_value() == option)


def give(page: Any, box: str, *paths: Path) -> None:
    """Drop files into a box."""
    page.locator(f"#{box} input[type=file]").set_input_files(paths)
    for path in paths:
        page.locator(f"#{box} td[aria-label='{path.name}']").wait_for(state="attached")


def tab(page: Any, name: str) -> None:
    one = page.get_by_role("tab", name=name, exact=True).locator("visible=true")
    steadily(page, lambda: one.click(timeout=SOON), lambda: one.get_attribute("aria-selected") == "true")


def said(page: Any, pattern: str) -> str:
    """What the status line says once it matches."""
    page.wait_for_function(
        "pattern => new RegExp(pattern, 's').test(document.querySelector('#status')?.innerText ?? '')", arg=pattern
    )
    return str(page.locator("#status").inner_text())


def warned(page: Any, pattern: str) -> None:
    """A sentence that appears in a corner; it is closed then, unless it is gone already."""
    from playwright.sync_api import TimeoutError as Late

    toast = page.locator(".toast-body").filter(has_text=re.compile(pattern, re.DOTALL)).first
    toast.wait_for()
    with contextlib.suppress(Late):
        toast.locator("button").first.click(timeout=SOON)


def settings(page: Any, model: str = "tiny", seed: int | None = 7) -> None:
    """Choose a model, and a seed that stays."""
    choose(page, "Model", model)
    tick(page, "A new seed each time", seed is None)
    if seed is not None:
        put(page, "Seed of the first", seed)


def draw(page: Any, size: str = "") -> None:
    tab(page, "Draw")
    put(page, "Size in pixels", size)
    button(page, "Draw").click()


def drawn(page: Any, studio: Studio, before: int, more: int = 1) -> list[Path]:
    """The new pictures, once they are there and on the page."""
    end = time.monotonic() + PATIENCE / 1000
    while len(studio.pictures()) < before + more and time.monotonic() < end:
        page.wait_for_timeout(50)
    found = studio.pictures()[before:]
    assert len(found) == more
    said(page, "drawn, in")
    page.locator(f"#easel img[src$='{found[-1].name}']").first.wait_for()
    return found


def pick(page: Any, path: Path) -> None:
    """Press a picture on the wall."""
    page.locator("#wall").get_by_role("img", name=path.stem, exact=True).click()
    page.locator("#recipe").get_by_text(path.name).wait_for()


def download(page: Any) -> Any:
    with page.expect_download() as found:
        page.locator("button:visible, a:visible").filter(has_text="Download").last.click()
    return found.value


# The first picture


def test_the_first_picture_is_drawn_downloaded_and_replayed_to_the_same_pixels(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the model in the box."""
    monkeypatch.chdir(tmp_path)
    with Studio(tmp_path) as studio, opened(browser, studio.address) as page:
        choose(page, "Label", "claude_monet")
        page.locator("#strip img").wait_for()  # what that label looks like
        button(page, "Draw").click()
        page.locator("#easel img").first.wait_for()
        (path,) = drawn(page, studio, 0)
        found = download(page)
        found.save_as(tmp_path / found.suggested_filename)
        assert path.name == found.suggested_filename
        recipe = recipe_of(tmp_path / path.name)
        shown_seed = int(page.get_by_label("Seed of the first").input_value())
        assert (recipe.label, recipe.seed) == ("claude_monet", shown_seed)
        tab(page, "Gallery")
        pick(page, path)
        button(page, "Replay").click()
        said(page, "the same pixels")
    assert main(["replay", path.name, "--out", "again.png"]) == 0
    assert digest(Image.open("again.png")) == digest(Image.open(studio.out / path.name)) == recipe.pixels


# Drawing


def test_pictures_appear_step_by_step_and_keep_their_seeds(page: Any, studio: Studio) -> None:
    before = len(studio.pictures())
    settings(page, seed=21)
    put(page, "number input for How many", 3)
    page.get_by_text("Sampling", exact=True).click()
    put(page, "number input for Steps", 8)
    draw(page, "64")
    found = drawn(page, studio, before, 3)
    assert [recipe_of(path).seed for path in found] == [21, 22, 23]
    assert {recipe_of(path).options.steps for path in found} == {8}
    assert page.locator("#easel .caption-label").count() == 3


def test_stop_stops_and_what_was_asked_for_next_is_drawn(page: Any, studio: Studio) -> None:
    before = len(studio.pictures())
    settings(page)
    draw(page, "768")
    said(page, r"[1-9]%")
    page.locator("#easel img[src$='/image.png']").wait_for()  # a preview
    draw(page, "32")
    said(page, "1 more waiting")
    button(page, "Stop").click()
    (path,) = drawn(page, studio, before)
    assert Image.open(path).size == (32, 32)


def test_pressing_again_and_again_draws_one_after_another(page: Any, studio: Studio) -> None:
    before = len(studio.pictures())
    settings(page, seed=None)
    draw(page, "64")
    for _ in range(3):
        button(page, "Draw").click()
    assert len({recipe_of(path).seed for path in drawn(page, studio, before, 4)}) == 4


def test_two_tabs_draw_in_turn(browser: Any, page: Any, studio: Studio) -> None:
    before = len(studio.pictures())
    with opened(browser, studio.address) as other:
        settings(page, seed=31)
        settings(other, "sprites", seed=32)
        draw(page, "64")
        draw(other, "16")
        found = drawn(page, studio, before, 2)
        said(other, "1 drawn, in")
    assert [recipe_of(path).model for path in found] == ["tiny", "sprites"]


def test_a_reload_in_the_middle_finds_the_drawing_again(page: Any, studio: Studio) -> None:
    before = len(studio.pictures())
    settings(page)
    draw(page, "768")
    button(page, "Draw").click()
    said(page, "%; 1 more waiting")
    draw(page, "64")
    begin(page, studio.address)
    said(page, "1 new by tiny: [0-9]+%; 2 more waiting")
    for waiting in "1 more waiting", "":
        button(page, "Stop").click()
        said(page, waiting)
    drawn(page, studio, before)


def by_keyboard(page: Any, name: str, role: str | None = None) -> None:
    """Go to a button, or to what has another role, with the Tab key, and press it."""
    focus = "[document.activeElement.innerText, document.activeElement.getAttribute('role')]"
    for _ in range(100):
        page.keyboard.press("Tab")
        if page.evaluate(focus) == [name, role]:
            return page.keyboard.press("Enter")
    raise AssertionError(f"no press of Tab reaches {name}")


def test_the_keyboard_alone_is_enough(page: Any, studio: Studio) -> None:
    before = len(studio.pictures())
    by_keyboard(page, "Draw")
    drawn(page, studio, before)


@pytest.mark.parametrize(
    ("name", "main", "sentence"),
    [
        ("Edit", "Draw the painted part anew", "there is no picture to edit"),
        ("Gallery", "Replay", "no picture is chosen"),
        ("Learn", "Learn", "there are no pictures to learn from"),
        ("Know", "Surprise", "there is no picture to look at"),
    ],
)
def test_every_tab_and_its_main_button_are_reached_by_keyboard(page: Any, name: str, main: str, sentence: str) -> None:
    by_keyboard(page, name, "tab")
    frames(page)
    by_keyboard(page, main)
    warned(page, sentence)


def test_sprites_are_shown_without_smoothing(page: Any, studio: Studio) -> None:
    before = len(studio.pictures())
    settings(page, "sprites", seed=5)
    draw(page)
    drawn(page, studio, before)
    page.wait_for_function(
        "() => [...document.querySelectorAll('#easel img')].some(image =>"
        " image.clientWidth > 100 && getComputedStyle(image).imageRendering === 'pixelated')"
    )


def test_sprites_are_enlarged_in_another_palette_and_downloaded_as_an_atlas(
    page: Any, studio: Studio, tmp_path: Path
) -> None:
    before = len(studio.pictures())
    (tmp_path / "two.hex").write_text("102030\nf0e0d0\n")
    settings(page, "sprites", seed=40)
    put(page, "number input for How many", 3)
    page.get_by_text("Sprites", exact=True).click()
    put(page, "number input for Pixels a side", 4)
    tick(page, "All of them on one atlas, too")
    give(page, "palette", tmp_path / "two.hex")
    draw(page)
    *sprites, atlas = drawn(page, studio, before, 4)
    assert {Image.open(path).size for path in sprites} == {(64, 64)}
    colours = Image.open(sprites[0]).convert("RGB").getcolors() or []
    assert {colour for _, colour in colours} == {(16, 32, 48), (240, 224, 208)}
    page.locator("#easel .caption-label").get_by_text("atlas").wait_for()
    with ZipFile(download(page).path()) as both:
        frames = json.loads(both.read(f"{atlas.stem}.json"))["frames"]
    assert [frame["seed"] for frame in frames.values()] == [40, 41, 42]


def test_an_adapter_draws_and_replays_and_says_that_it_cannot_learn_more(page: Any, studio: Studio) -> None:
    before = len(studio.pictures())
    for model in "tiny", "mine.x":
        settings(page, model, seed=61)
        draw(page, "64")
        drawn(page, studio, before + (model != "tiny"))
    plain, adapted = studio.pictures()[before:]
    assert (recipe_of(plain).model, recipe_of(adapted).model) == ("tiny", "mine.x")
    assert recipe_of(plain).tokens != recipe_of(adapted).tokens
    tab(page, "Gallery")
    pick(page, adapted)
    button(page, "Replay").click()
    said(page, "the same pixels")
    tab(page, "Learn")
    put(page, "or the path of a folder", studio.out)
    button(page, "Learn").click()
    warned(page, "mine.x is an adapter, which cannot learn more")


# Editing


MAGENTA = (255, 0, 170)  # of the brush


def sees(canvas: Any, colour: Any) -> bool:
    """Whether much of it has about that colour."""
    shown = np.asarray(Image.open(BytesIO(canvas.screenshot())).convert("RGB")).astype(int)
    return bool((np.abs(shown - np.asarray(colour)).max(2) < 90).sum() > 100)


def test_a_mask_painted_with_the_mouse_is_drawn_anew_and_no_more(page: Any, studio: Studio, tmp_path: Path) -> None:
    before = len(studio.pictures())
    source = paint(3, COLOURS["red"], (128, 128))
    source.save(tmp_path / "source.png")
    settings(page)
    tab(page, "Edit")
    button(page, "Draw the painted part anew").click()
    warned(page, "there is no picture to edit")
    give(page, "source", tmp_path / "source.png")
    canvas = page.locator("#canvas canvas").first
    canvas.wait_for()
    steadily(page, lambda: None, lambda: sees(canvas, np.median(np.asarray(source), (0, 1))))
    button(page, "Draw the painted part anew").click()
    warned(page, "nothing is painted")
    page.locator("#canvas button[title*=rush], #canvas button[aria-label*=rush]").first.click()

    def stroke() -> None:
        box = canvas.bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(*middle)
        page.mouse.down()
        page.mouse.move(middle[0] + 15, middle[1], steps=5)
        page.mouse.up()

    steadily(page, stroke, lambda: sees(canvas, MAGENTA))
    button(page, "Draw the painted part anew").click()
    (path,) = drawn(page, studio, before)
    changed = np.any(np.asarray(Image.open(path)) != np.asarray(source), axis=2)
    rows, columns = np.nonzero(changed)
    assert len(rows) > 20, "something was drawn"
    assert rows.min() > 20 and rows.max() < 108 and columns.min() > 20 and columns.max() < 118, "only in the middle"
    assert recipe_of(path).command == "inpaint"
    page.locator("#easel .caption-label").get_by_text("before").wait_for()


def test_the_other_edits_keep_what_they_should(page: Any, studio: Studio, tmp_path: Path) -> None:
    before = len(studio.pictures())
    source, other = paint(4, COLOURS["blue"]), paint(5, COLOURS["red"])
    source.save(tmp_path / "one.png")
    other.save(tmp_path / "two.png")
    settings(page)
    tab(page, "Edit")
    give(page, "source", tmp_path / "one.png")
    page.locator("#canvas canvas").first.wait_for()
    tab(page, "Half")
    tick(page, "left")
    button(page, "Draw the other half").click()
    (half,) = drawn(page, studio, before)
    kept = (0, 0, 32, 64)
    assert Image.open(half).crop(kept).tobytes() == source.crop(kept).tobytes()
    tab(page, "Frame")
    put(page, "Size of the frame", "96x64")
    button(page, "Draw around it").click()
    (frame,) = drawn(page, studio, before + 1)
    assert Image.open(frame).crop((16, 0, 80, 64)).tobytes() == source.tobytes()
    tab(page, "Vary")
    button(page, "Vary").click()
    drawn(page, studio, before + 2)
    tab(page, "Blend")
    button(page, "Blend").click()
    warned(page, "there is no second picture")
    give(page, "other", tmp_path / "two.png")
    button(page, "Blend").click()
    (blend,) = drawn(page, studio, before + 3)
    assert recipe_of(blend).command == "blend"


# The gallery


def test_a_picture_of_the_gallery_tells_how_it_was_made_and_is_drawn_on(page: Any, studio: Studio) -> None:
    before = len(studio.pictures())
    settings(page, seed=77)
    draw(page, "64")
    (path,) = drawn(page, studio, before)
    tab(page, "Gallery")
    pick(page, path)
    assert "label blue, seed 77, size 64x64" in page.locator("#recipe").inner_text().replace("red", "blue")
    button(page, "As tile").click()
    (tile,) = drawn(page, studio, before + 1)
    assert recipe_of(tile).tile
    page.locator("#wall").get_by_role("img", name=tile.stem).wait_for()  # on the wall, too
    button(page, "Large").click()
    (large,) = drawn(page, studio, before + 2)
    assert Image.open(large).size == (128, 128)
    button(page, "Vary").click()
    (varied,) = drawn(page, studio, before + 3)
    assert varied.name.startswith(f"{path.stem}-vary")
    button(page, "Edit").click()
    page.locator("#canvas canvas").first.wait_for()


def test_a_picture_is_deleted_when_it_is_asked_for_twice(page: Any, studio: Studio) -> None:
    before = len(studio.pictures())
    settings(page)
    draw(page)
    (path,) = drawn(page, studio, before)
    tab(page, "Gallery")
    pick(page, path)
    button(page, "Delete").click()
    button(page, "Really delete").wait_for()
    assert path.exists()
    button(page, "Really delete").click()
    page.get_by_text("Deleted.").wait_for()
    assert not path.exists() and len(studio.pictures()) == before


def test_a_gallery_of_many_pictures_has_pages(page: Any, studio: Studio) -> None:
    old = [studio.out / f"old-{i}.png" for i in range(ON_A_PAGE + 1)]
    for i, path in enumerate(old):
        paint(i, COLOURS["red"], (8, 8)).save(path)
        os.utime(path, (1_000_000 + i, 1_000_000 + i))
    others = len(studio.pictures()) - len(old)
    tab(page, "Gallery")
    wall = page.locator("#wall img")
    steadily(page, lambda: None, lambda: wall.count() == ON_A_PAGE)
    choose(page, "Page", "2")
    steadily(page, lambda: None, lambda: wall.count() == min(others + 1, ON_A_PAGE))
    choose(page, "Page", str(2 + others // ON_A_PAGE))
    pick(page, old[0])  # the oldest is the last
    assert wall.last.get_attribute("alt") == "old-0"
    for path in old[1:]:
        path.unlink()
    button(page, "Delete").click()
    button(page, "Really delete").click()
    page.get_by_text("Deleted.").wait_for()
    steadily(page, lambda: None, lambda: wall.count() == min(others, ON_A_PAGE))  # of the last page that is left


# Learning and knowing


def test_a_model_learns_dropped_pictures_while_drawing_waits_and_stop_keeps_it(
    page: Any, studio: Studio, tmp_path: Path
) -> None:
    before = len(studio.pictures())
    art = sorted(art_folder(tmp_path / "art", 6).rglob("*.png"))
    for i, path in enumerate(art):
        path.rename(tmp_path / f"{i}.png")
    (tmp_path / "letter.png").write_text("Dear model,")
    (tmp_path / "diary.txt").write_text("Dear diary,")
    settings(page)
    tab(page, "Learn")
    put(page, "Name of the new model", "my own")
    give(page, "art", *sorted(tmp_path.glob("*.???")))
    button(page, "Learn").click()
    said(page, "looking through")
    draw(page, "32")
    said(page, "learned [0-9]+ %.*left; 1 more waiting until it is done")
    log = page.locator("#log textarea").input_value()
    assert "to learn from" in log and "9 minutes in all" in log
    table = page.locator("#files").inner_text()
    for name in r"letter-\w+\.png", r"diary-\w+\.txt":
        assert re.search(name + r"\s+skipped\s+is no picture", table)
    assert "learned from" in table
    page.locator("#easel img[src*='/training/finetune-']").first.wait_for()  # a sheet of what it draws by now
    button(page, "Stop").click()
    drawn(page, studio, before)
    settings(page, "my-own")
    draw(page, "32")
    (path,) = drawn(page, studio, before + 1)
    assert recipe_of(path).model == "my-own"


def test_a_picture_is_audited_and_mapped_and_a_model_shows_its_card(page: Any, studio: Studio, tmp_path: Path) -> None:
    art_folder(tmp_path / "art", 6)
    settings(page)
    tab(page, "Know")
    button(page, "Surprise").click()
    warned(page, "there is no picture to look at")
    give(page, "looked-at", tmp_path / "art" / "red" / "0.png")
    button(page, "Surprise").click()
    said(page, "bits per token on average")
    button(page, "Audit").click()
    warned(page, "its path is wanted")
    put(page, "Path of the folder that", tmp_path / "art")
    button(page, "Audit").click()
    said(page, "this is red/0.png")
    page.locator("#easel img").wait_for()
    settings(page, "pixels")
    button(page, "Card").click()
    page.get_by_text("Sprites of 32x32 pixels").wait_for()


FINETUNE = """#!{python}
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: (work.parent.joinpath("config.json").touch(), os._exit(130)))
work = pathlib.Path(sys.argv[sys.argv.index("--out") + 1], "training")
work.mkdir(parents=True)
listing = "path,split,use,reason\\na.png,train,learned from,\\nb.txt,test,skipped,is odd"
(work.parent / "pictures.csv").write_text(listing)
print("9 minutes in all", file=sys.stderr)
for i, step in enumerate((5, 100)):
    (work / f"finetune-{{step:07d}}.png").touch()
    os.utime(work / f"finetune-{{step:07d}}.png", (i, i))
print("finetune:  30%|###  | 3/10 [00:10<00:20, 3 it/s]", end="\\r", file=sys.stderr, flush=True)
print("still there", file=sys.stderr, flush=True)
time.sleep(600)
"""


def test_a_training_shows_its_newest_sheet_and_stop_leaves_a_model(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something that writes what `igpt finetune` writes stands in for it."""
    stand_in = tmp_path / "python"
    stand_in.write_text(FINETUNE.format(python=sys.executable))
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    engine = Engine([str(tiny_folder)], tmp_path)
    engine.learn("tiny", "art", "new one")
    wait_until(lambda: engine.now.lines[1:] == ["still there"])
    job, out = engine.now, tmp_path / "models" / "new-one"
    assert job.state == "learned 30 %, 00:20 left" and job.lines[0] == "9 minutes in all"
    assert job.table == [["b.txt", "skipped", "is odd"], ["a.png", "learned from", ""]]
    assert job.pictures == [(out / "training" / "finetune-0000100.png", "drawn at step 100")]
    engine.stop()
    engine.stop()  # an impatient press more
    wait_until(lambda: engine.idle)
    assert "new-one" in job.state and "new-one" in engine.places
    engine.close()


@pytest.mark.parametrize("command", ["audit", "surprise", "replay", "draw"])
def test_stop_ends_whatever_is_done(command: str, tmp_path: Path, tiny_model: ImageGPT, tiny_folder: Path) -> None:
    """It comes as the work has just begun."""
    (path,) = painted(tiny_model, tmp_path)
    engine = Engine([str(tiny_folder)], tmp_path / "out")
    how = {"audit": ("tiny", str(path), str(art_folder(tmp_path / "art"))), "surprise": ("tiny", None, str(path))}
    submit, begun = engine.submit, threading.Event()

    def stopped_at_once(title: str, work: Any) -> None:
        submit(title, lambda job: (begun.set(), engine.stop(), work(job)))

    engine.submit = stopped_at_once  # type: ignore[method-assign]
    wish = Wish("tiny", 1, {"seed": 0, "label": None}, {})
    getattr(engine, command)(*how.get(command, (str(path),) if command == "replay" else (wish,)))
    wait_until(lambda: begun.is_set() and engine.idle)
    assert engine.now.state == "stopped" and not list(engine.out.glob("*"))
    engine.close()


# What goes wrong


def test_a_file_that_is_no_picture_is_said_to_be_none(page: Any, studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear model,")
    tab(page, "Edit")
    page.locator("#source input[type=file]").set_input_files(tmp_path / "letter.txt")
    warned(page, "letter.txt")


def test_a_picture_of_thirty_megapixels_is_shown_and_looked_at(page: Any, studio: Studio, tmp_path: Path) -> None:
    paint(6, COLOURS["red"], (600, 500)).resize((6000, 5000)).save(tmp_path / "huge.jpg")
    settings(page)
    tab(page, "Edit")
    give(page, "source", tmp_path / "huge.jpg")
    page.locator("#canvas canvas").first.wait_for()
    tab(page, "Know")
    give(page, "looked-at", tmp_path / "huge.jpg")
    button(page, "Surprise").click()
    said(page, "huge.jpg: .*bits per token on average")


def test_a_model_that_was_deleted_meanwhile_is_said_to_be_gone(page: Any, studio: Studio) -> None:
    choose(page, "Model", "gone")
    warned(page, "there is no model.*gone")
    button(page, "Draw").click()
    said(page, "there is no model.*gone")
    wait_until(lambda: "there is no model" in studio.complaints)
    before = len(studio.pictures())
    settings(page)
    draw(page)
    drawn(page, studio, before)


def test_an_output_folder_that_cannot_be_written_is_said_on_the_page_and_in_the_terminal(
    browser: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    with Studio(tmp_path, "--model", str(tiny_folder)) as studio, opened(browser, studio.address) as page:
        studio.out.write_text("a file, of all things")
        draw(page, "32")
        said(page, r"\.png cannot be written: ")
        wait_until(lambda: ".png cannot be written: " in studio.complaints)


def test_what_cannot_be_drawn_is_said(page: Any, studio: Studio) -> None:
    settings(page)
    draw(page, "as large as a house")
    said(page, "as large as a house.* is neither one number of pixels")
    wait_until(lambda: "as large as a house" in studio.complaints)


STICKS_OUT = """() => [...document.querySelectorAll("button, input, label")].filter(part => part.checkVisibility()).map(
part => [part.outerHTML, part.getBoundingClientRect()]).filter(([_, box]) =>
box.width > 0 && (box.left < 0 || box.right > innerWidth)).map(([text, _]) => text)"""


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_sticks_out_of_the_window(browser: Any, studio: Studio, width: int) -> None:
    with opened(browser, studio.address, width) as page:
        for name in ("Draw", "Edit", "Gallery", "Learn", "Know"):
            tab(page, name)
            sticks_out = [*page.evaluate(STICKS_OUT)]
            assert not sticks_out and page.evaluate("document.documentElement.scrollWidth") <= width


# The command


def test_ctrl_c_pressed_again_and_again_ends_cleanly(browser: Any, tiny_folder: Path, tmp_path: Path) -> None:
    with Studio(tmp_path, "--model", str(tiny_folder)) as studio, opened(browser, studio.address) as page:
        draw(page, "768")
        said(page, r"[1-9]%")

        def pressed_to_the_end() -> bool:
            studio.process.send_signal(signal.SIGINT)
            return studio.process.poll() is not None

        wait_until(pressed_to_the_end)
    assert studio.process.returncode == 0
    assert studio.complaints == "igpt: ending; a training writes the best so far\n"


def test_a_port_in_use_and_a_missing_browser_are_said(studio: Studio, tmp_path: Path, tiny_folder: Path) -> None:
    port = studio.address.rpartition(":")[2]
    with Studio(tmp_path, "--model", str(tiny_folder), "--open", "--port", port) as other:
        assert other.address != studio.address
        wait_until(lambda: f"port {port} is in use" in other.complaints)
        wait_until(lambda: "no browser can be opened" in other.complaints)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "no-such-model"], "there is no model 'no-such-model'"),
        (["--port", "70000"], "--port 70000 cannot be"),
        (["--out", "a-file/pictures"], "a-file is a file, not a folder"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    monkeypatch.setattr("os.environ", dict(os.environ))
    assert main(["studio", *words]) == 2
    assert sentence in capsys.readouterr().err
