"""A self-contained HTML page: tables, figures and galleries that open from disk, without network or script files."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from engine.files import atomic_write

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --grey: #666; --accent: #0b57d0; }
@media (prefers-color-scheme: dark) { :root { --grey: #a2a2a2; --accent: #8ab4f8; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
nav a { display: inline-block; margin-right: 1rem; } a { color: var(--accent); }
.wide { overflow-x: auto; margin: 1rem 0; } .wide table { min-width: min-content; }
table { border-collapse: collapse; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td { white-space: nowrap; } td.long { white-space: normal; min-width: 12rem; }
th.text, td.text, td.long { text-align: left; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; padding-bottom: .4rem; max-width: calc(min(62rem, 100vw) - 3rem); }
figure { margin: 1rem 0; } figcaption, caption, .note { color: var(--grey); font-size: .9rem; }
.grey, td.grey, tr.grey th, tr.grey td { color: var(--grey); font-style: italic; font-weight: normal; }
figure.plot img { max-width: 100%; background: #fff; border-radius: .4rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 0 1.5rem; }
.plots figure { margin: .5rem 0; display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.plots figure.plot img { width: 100%; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.2rem; padding: 0; list-style: none; font-size: .9rem; }
.legend i { display: inline-block; width: 1.6rem; margin-right: .4rem; vertical-align: middle; }
@media (prefers-color-scheme: dark) { figure.plot img, .legend i { filter: invert(.9) hue-rotate(180deg); } }
th[scope=row] { position: sticky; left: 0; background: Canvas; }
.gallery td, .gallery th { border: 0; padding: .2rem; text-align: center; max-width: 9rem; overflow-wrap: anywhere; }
.gallery img { width: 8.5rem; height: auto; border-radius: .3rem; display: block; }
.gallery small { color: var(--grey); }
.blend { display: block; width: fit-content; margin: auto; position: relative; cursor: pointer; border-radius: .3rem; }
.blend { background: var(--under) center / 100% 100% no-repeat; }
.blend img { transition: opacity .25s; }
.blend input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: pointer; }
.blend:hover img, .blend input:focus-visible + img, .blend input:checked + img { opacity: .15; }
.blend:focus-within, .wide:focus-visible, a:focus-visible, summary:focus-visible { outline: 3px solid var(--accent); }
@media (prefers-reduced-motion: reduce) { .blend img { transition: none; } }
@media (max-width: 40rem) {
  body { margin: 1rem auto; } th, td { padding: .3rem .5rem; } .gallery img { width: 6.5rem; }
}
.words { margin: .2rem 0; } .words b { display: inline-block; min-width: 8rem; } .words span { padding: 0 .15rem; }
code, pre { background: var(--soft); border-radius: .3rem; padding: .1rem .3rem; overflow-x: auto; }
"""


LONG = 40  # characters of a cell that may be broken into lines
COLOURS = ("1f77b4", "ff7f0e", "2ca02c", "d62728", "9467bd", "8c564b", "e377c2", "7f7f7f", "bcbd22", "17becf")
LineStyle = tuple[str, str]  # colour and kind of a line, by names that CSS and matplotlib share


class Grey(str):
    """Text of a cell that is not ours, such as a published value: shown in grey italics."""


@dataclass(frozen=True)
class Picture:
    """One picture of a gallery.

    Attributes:
        pixels: uint8 RGB `(height, width, 3)`.
        alt: alternative text.
        note: small print under it.
    """

    pixels: np.ndarray
    alt: str
    note: str = ""


@dataclass
class Page:
    """Collects sections and writes them as one file."""

    title: str
    parts: list[str] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self.sections.append(text)
        self.parts.append(f'<h2 id="section-{len(self.sections)}">{html.escape(text)}</h2>')

    def paragraph(self, text: str) -> None:
        """Add plain text."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def note(self, text: str) -> None:
        """Add small print that is not ours, in grey."""
        self.parts.append(f'<p class="grey">{html.escape(text)}</p>')

    def code(self, text: str) -> None:
        """Add preformatted text."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def folded(self, title: str, text: str) -> None:
        """Add preformatted text that opens when its title is chosen."""
        self.parts.append(
            f"<details><summary>{html.escape(title)}</summary>"
            f'<pre tabindex="0" role="region" aria-label="{html.escape(title)}">{html.escape(text)}</pre></details>'
        )

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> None:
        """Add a table; the first column names the row. `Grey` cells are shown in grey, a row led by one as a whole."""
        text = [any(len(cell) > LONG for cell in column) for column in zip(*rows, strict=True)] or [False] * len(
            columns
        )
        head = "".join(f'<th scope="col"{_class(c, t)}>{_heading(c)}</th>' for c, t in zip(columns, text, strict=True))
        body = "".join(
            f'<tr{_class(row[0])}><th scope="row">{html.escape(row[0])}</th>'
            + "".join(f"<td{_class(c, t)}>{html.escape(c)}</td>" for c, t in zip(row[1:], text[1:], strict=True))
            + "</tr>"
            for row in rows
        )
        self.parts.append(_wide(f"<table>{_caption(caption, head)}<tbody>{body}</tbody></table>", label=caption))

    def plot(self, svg: bytes, *, alt: str, caption: str) -> None:
        """Add a drawing given as SVG."""
        self.parts.append(
            f'<figure class="plot"><img src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" '
            f'alt="{html.escape(alt)}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        )

    def plots(
        self, drawings: Sequence[tuple[bytes, str, str]], *, legend: Mapping[str, LineStyle], folded: str = ""
    ) -> None:
        """Add small drawings (SVG, alternative text, caption) under the legend they share; `folded`: behind a title."""
        names = "".join(
            f'<li><i style="border-top: 3px {kind} {colour}"></i>{html.escape(label)}</li>'
            for label, (colour, kind) in legend.items()
        )
        before, after = (f"<details><summary>{html.escape(folded)}</summary>", "</details>") if folded else ("", "")
        self.parts.append(f'{before}<ul class="legend">{names}</ul><div class="plots">')
        for svg, alt, caption in drawings:
            self.plot(svg, alt=alt, caption=caption)
        self.parts.append(f"</div>{after}")

    def gallery(
        self, columns: Sequence[str], rows: Sequence[Sequence[tuple[np.ndarray, str]]], *, caption: str
    ) -> None:
        """Add rows of pictures, each uint8 RGB `(height, width, 3)` with its alternative text."""
        body = "".join(
            "<tr>"
            + "".join(f'<td><img src="{picture_uri(p)}" alt="{html.escape(alt)}"></td>' for p, alt in row)
            + "</tr>"
            for row in rows
        )
        self._gallery(columns, body, caption)

    def blending_gallery(self, columns: Sequence[str], rows: Sequence[Sequence[Picture]], *, caption: str) -> None:
        """Add rows of pictures of one shape; the first of a row shines through another one that is pointed at.

        By mouse, by a tap, or by the keyboard: each such picture is a check box without a script.
        """
        self._gallery(columns, "".join(blending_row(row) for row in rows), caption)

    def _gallery(self, columns: Sequence[str], body: str, caption: str) -> None:
        head = "".join(f'<th scope="col">{_heading(column)}</th>' for column in columns)
        table = f'<table class="gallery">{_caption(caption, head)}<tbody>{body}</tbody></table>'
        self.parts.append(_wide(table, label=caption))

    def words(self, words: Sequence[str], weights: Sequence[float], *, label: str) -> None:
        """Add a line of words, each shaded by its weight relative to the largest, and with it as its title."""
        top = max(max(weights, default=0.0), 1e-12)
        shaded = " ".join(
            f'<span style="background: rgb(242 140 40 / {0.85 * weight / top:.2f})" title="{weight:.3f}">'
            f"{html.escape(word)}</span>"
            for word, weight in zip(words, weights, strict=True)
        )
        self.parts.append(f'<p class="words"><b>{html.escape(label)}</b> {shaded}</p>')

    def write(self, path: Path) -> None:
        """Write the page atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, self.text().encode())

    def text(self) -> str:
        """The whole page as HTML."""
        title = html.escape(self.title)
        links = "".join(f'<a href="#section-{i}">{html.escape(s)}</a>' for i, s in enumerate(self.sections, start=1))
        contents = f'<nav aria-label="Sections">{links}</nav>' if len(self.sections) > 2 else ""
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
            f"<style>{STYLE}</style></head>"
            f"<body><main><h1>{title}</h1>{contents}{''.join(self.parts)}</main></body></html>"
        )


def blending_row(row: Sequence[Picture]) -> str:
    """One row of `Page.blending_gallery` as HTML; its length is what it adds to the page."""
    first = picture_uri(row[0].pixels)
    cells = [f'<td><img src="{first}" alt="{html.escape(row[0].alt)}">{_small(row[0].note)}</td>']
    for one in row[1:]:
        label = html.escape(f"show the image under: {one.alt}")
        cells.append(
            f'<td><label class="blend"><input type="checkbox" aria-label="{label}">'
            f'<img src="{picture_uri(one.pixels)}" alt="{html.escape(one.alt)}"></label>{_small(one.note)}</td>'
        )
    return f'<tr style="--under: url({first})">{"".join(cells)}</tr>'


def _small(note: str) -> str:
    return f"<small>{html.escape(note)}</small>" if note else ""


def _class(text: str, in_text: bool = False) -> str:
    """Class of a cell; `in_text`: its column holds long texts, which stand on the left."""
    if isinstance(text, Grey):
        return ' class="grey"'
    if len(text) > LONG:
        return ' class="long"'
    return ' class="text"' if in_text else ""


def _heading(text: str) -> str:
    """A column's heading, which may be broken behind a plus."""
    return html.escape(text).replace("+", "+<wbr>")


def _caption(caption: str, head: str) -> str:
    return f"<caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>"


def _wide(table: str, *, label: str) -> str:
    """A table in a box that scrolls on its own, also by the keyboard."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{html.escape(label[:80])}">{table}</div>'


def picture_uri(picture: np.ndarray) -> str:
    """JPEG of an RGB picture as a data URI."""
    done, data = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    assert done
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"


def overlay(image: np.ndarray, density: np.ndarray, *, strength: float = 0.6) -> np.ndarray:
    """Draw a map over an image as heat, its maximum the brightest.

    Args:
        image: uint8 RGB `(height, width, 3)`.
        density: `(rows, columns)`, any scale, at least 0.
    """
    height, width = image.shape[:2]
    fine = cv2.resize(density.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    share = np.clip(fine / max(float(fine.max()), 1e-12), 0, 1)
    heat = cv2.applyColorMap((255 * share).astype(np.uint8), cv2.COLORMAP_INFERNO)[:, :, ::-1]
    weight = strength * (0.35 + 0.65 * share[..., None])
    return (image * (1 - weight) + heat * weight).astype(np.uint8)


def line_styles(labels: Sequence[str]) -> dict[str, LineStyle]:
    """A line for each label, so that it looks the same in every drawing of a page; the 31st has the first one's."""
    kinds = ("solid", "dashed", "dotted")
    styles = [(f"#{colour}", kind) for kind in kinds for colour in COLOURS]
    return {label: styles[number % len(styles)] for number, label in enumerate(labels)}


def curves_svg(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    styles: Mapping[str, LineStyle] | None = None,
) -> bytes:
    """Line plot of named (x, y) curves as SVG; with `styles`, a small one whose legend stands elsewhere."""
    # imported here: only reports draw, and matplotlib takes a second
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    if styles is None:
        figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    else:  # fixed margins, as a page has many of these: a layout that fits takes as long as the drawing
        margins = {"left": 0.15, "right": 0.97, "bottom": 0.19, "top": 0.97}
        figure, axes = pyplot.subplots(figsize=(4.6, 2.6), gridspec_kw=margins)
    for name, (x, y) in curves.items():
        colour, kind = styles[name] if styles else (None, "solid")
        axes.plot(x, y, label=name, linewidth=1.5, color=colour, linestyle=kind, marker="o" if len(x) < 2 else None)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if all(float(each).is_integer() for x, _ in curves.values() for each in x):
        axes.xaxis.set_major_locator(MaxNLocator("auto" if styles is None else 5, integer=True, steps=[1, 2, 5, 10]))
    if curves and styles is None:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()
