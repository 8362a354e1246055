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
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; padding-bottom: .4rem; }
figure { margin: 1rem 0; } figcaption, .note { opacity: .75; font-size: .9rem; }
figure.plot img { max-width: 100%; background: #fff; border-radius: .4rem; }
.gallery { overflow-x: auto; } .gallery td, .gallery th { border: 0; padding: .2rem; text-align: center; }
.gallery img { width: 8.5rem; height: auto; border-radius: .3rem; display: block; }
.words { margin: .2rem 0; } .words b { display: inline-block; min-width: 8rem; } .words span { padding: 0 .15rem; }
code, pre { background: var(--soft); border-radius: .3rem; padding: .1rem .3rem; overflow-x: auto; }
"""


@dataclass
class Page:
    """Collects sections and writes them as one file."""

    title: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Add plain text."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """Add preformatted text."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str) -> None:
        """Add a table; the first column names the row."""
        head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in columns)
        body = "".join(
            f'<tr><th scope="row">{html.escape(row[0])}</th>'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in rows
        )
        self.parts.append(
            f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )

    def plot(self, svg: bytes, *, alt: str, caption: str) -> None:
        """Add a drawing given as SVG."""
        self.parts.append(
            f'<figure class="plot"><img src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" '
            f'alt="{html.escape(alt)}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        )

    def gallery(
        self, columns: Sequence[str], rows: Sequence[Sequence[tuple[np.ndarray, str]]], *, caption: str
    ) -> None:
        """Add rows of pictures, each uint8 RGB `(height, width, 3)` with its alternative text."""
        head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in columns)
        body = "".join(
            "<tr>"
            + "".join(f'<td><img src="{picture_uri(p)}" alt="{html.escape(alt)}"></td>' for p, alt in row)
            + "</tr>"
            for row in rows
        )
        self.parts.append(
            f'<div class="gallery"><table><caption>{html.escape(caption)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

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
        title = html.escape(self.title)
        text = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
            f"<style>{STYLE}</style></head><body><h1>{title}</h1>{''.join(self.parts)}</body></html>"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text.encode())


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


def curves_svg(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x_label: str, y_label: str) -> bytes:
    """Line plot of named (x, y) curves as SVG."""
    # imported here: only reports draw, and matplotlib takes a second
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name, linewidth=1.5)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()
