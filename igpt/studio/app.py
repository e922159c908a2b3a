"""The page as a whole, and the server behind it: on this machine only, with nothing from the net."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gradio as gr

from tokenizer_vq.base import UserError

from . import tabs
from .engine import Engine
from .page import QUIET, WATCHING, Page

TABS = {"Draw": tabs.draw, "Edit": tabs.edit, "Gallery": tabs.gallery, "Learn": tabs.learn, "Know": tabs.know}
HOST, PORTS_TRIED = "127.0.0.1", 100
LARGEST_UPLOAD = "500mb"
CSS = """
#easel .grid-wrap, #wall .grid-wrap { max-height: none; height: auto; min-height: 0; }
#card:has(h1) { max-height: 480px; overflow: auto; border: 1px solid var(--border-color-primary); padding: 12px; }
#easel { min-height: 300px; }
#easel .thumbnail-item { aspect-ratio: auto; height: auto; }
#easel .grid-container, #wall .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)); }
#log textarea { font-family: monospace; font-size: 12px; }
input[role=combobox] { text-overflow: ellipsis; padding-right: 16px !important; }
.caption-label { white-space: normal !important; font-size: 11px; }
.tick { min-width: 150px !important; align-content: center; }
@media (max-width: 500px) {
  .tab-container button { padding: 0 7px; }
  #wall .grid-container { --grid-cols: 3 !important; }
  #easel .grid-container[style*="cols: 4"] { --grid-cols: 2 !important; }
  #wall .caption-label { display: none; }
}
footer { display: none !important; }
"""
# Pictures as small as sprites are shown without smoothing, wherever they appear.
SCRIPT = """() => document.addEventListener("load", event => { const image = event.target; if (image.tagName === "IMG")
image.style.imageRendering = Math.max(image.naturalWidth, image.naturalHeight) <= 128 ? "pixelated" : "auto" }, true)"""


def build(engine: Engine) -> Any:
    """The page, not served yet."""
    page = Page(engine)
    with gr.Blocks(title="igpt studio", analytics_enabled=False) as blocks:
        page.settings()
        with gr.Row():
            left, right = gr.Column(min_width=340), gr.Column(min_width=340)
        with right:  # first, as all tabs draw on it
            page.easel()
        with left, gr.Tabs() as page.tabs:
            for name, tab in TABS.items():
                with gr.Tab(name, id=name) as page.tab:
                    tab(page)
        blocks.load(page.for_model, page.model, page.of_model, **QUIET)
        blocks.load(page.watch, None, page.views, **WATCHING)
    return blocks


def serve(engine: Engine, port: int) -> tuple[str, Callable[[], None]]:
    """Serve the page at `port`, or the next one that is free; its address, and what ends it."""
    fonts = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")], [gr.themes.Font("monospace")]
    gr.set_static_paths([engine.out])
    blocks = build(engine)
    blocks.queue(default_concurrency_limit=None)
    how: dict[str, Any] = {"quiet": True, "prevent_thread_lock": True, "share": False, "ssr_mode": False}
    how |= {"footer_links": [], "max_file_size": LARGEST_UPLOAD, "css": CSS, "js": SCRIPT}
    how["theme"] = gr.themes.Default(font=fonts[0], font_mono=fonts[1])
    for free in range(port, min(port + PORTS_TRIED, 65536)):
        with suppress(OSError):  # it is in use
            blocks.launch(server_name=HOST, server_port=free, **how)
            break
    else:
        raise UserError(f"no port from {port} on is free; --port names another")
    if free != port:
        print(f"igpt: port {port} is in use, {free} is free", file=sys.stderr)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a browser that leaves early is no error

    def close() -> None:
        engine.close()
        blocks.close(verbose=False)

    return f"http://{HOST}:{free}", close
