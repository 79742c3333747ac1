"""The demo's result as one HTML page without outside parts: frames, answers, rows per layer."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Page:
    """What the page shows. frames: uint8 [F, H, W, 3]; plain, fused: rows entering each layer."""

    frames: npt.NDArray[np.uint8]
    rows: Sequence[tuple[str, str, str, str, str]]  # kind, question, truth, answer, fused answer
    plain: Sequence[int]
    fused: Sequence[int]
    cost: float
    text: tuple[str, str] | None


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff }
img { width: 100%; border-radius: 6px } table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd }
.yes { color: #0a7a33; font-weight: 600 } .no { color: #b3261e; font-weight: 600 }
figcaption { color: #555; font-size: 13px }
"""


def contact_sheet(frames: npt.NDArray[np.uint8], columns: int = 8, side: int = 112) -> bytes:
    """All frames in one PNG, row by row."""
    from PIL import Image

    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for n, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((side - 4, side - 4))
        sheet.paste(picture, ((n % columns) * side + 2, (n // columns) * side + 2))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def layer_chart(plain: Sequence[int], fused: Sequence[int]) -> str:
    """Bars of rows per layer, reduced in front of unreduced, as SVG."""
    width, height, left = 880, 220, 48
    step = (width - left) / max(1, len(plain))
    top = max(plain, default=1)
    parts = []
    for n, (a, b) in enumerate(zip(plain, fused, strict=True)):
        for value, color in ((a, "#d5d9e0"), (b, "#2f6fdb")):
            tall = (height - 40) * value / top
            parts.append(
                f'<rect x="{left + n * step + 2:.1f}" y="{height - 20 - tall:.1f}" '
                f'width="{step - 4:.1f}" height="{tall:.1f}" fill="{color}"><title>layer {n}: '
                f"{value} rows</title></rect>"
            )
        parts.append(
            f'<text x="{left + (n + 0.5) * step:.1f}" y="{height - 5}" font-size="11" '
            f'text-anchor="middle">{n}</text>'
        )
    parts.append(f'<text x="0" y="24" font-size="11">{top} rows</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def write_page(path: Path, page: Page) -> Path:
    """Writes the page and returns its path."""

    def cell(answer: str, truth: str) -> str:
        mark = "yes" if answer.strip().lower() == truth.strip().lower() else "no"
        return f'<td class="{mark}">{html.escape(answer)}</td>'

    body = "".join(
        f"<tr><td>{html.escape(kind)}</td><td>{html.escape(question)}</td>"
        f"<td>{html.escape(truth)}</td>{cell(plain, truth)}{cell(fused, truth)}</tr>"
        for kind, question, truth, plain, fused in page.rows
    )
    image = base64.b64encode(contact_sheet(page.frames)).decode()
    said = ""
    if page.text is not None:
        question, answer = (html.escape(part) for part in page.text)
        said = f"<h2>A real language model</h2><p><b>{question}</b></p><p>{answer}</p>"
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Framequilt demo</title>"
        f"<style>{STYLE}</style><h1>Framequilt demo</h1>"
        f'<figure><img alt="the clip" src="data:image/png;base64,{image}">'
        f"<figcaption>The clip, {len(page.frames)} frames</figcaption></figure>"
        "<h2>Questions</h2><table><tr><th>kind<th>question<th>true<th>all tokens"
        f"<th>FrameFusion, cost {page.cost}</tr>{body}</table>"
        f"<h2>Rows that enter each layer</h2><figure>{layer_chart(page.plain, page.fused)}"
        "<figcaption>grey: all tokens, blue: with FrameFusion (first question)</figcaption>"
        f"</figure>{said}</html>",
        encoding="utf-8",
    )
    return path
