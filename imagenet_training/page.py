"""A page on its own: HTML with its style, its charts as inline SVG and its images inside; no script, no network.

Light or dark follows the reader's system. All text is escaped here, and the page's policy forbids it to load anything.
"""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

NUM_COLORS = 8
_WIDTH, _HEIGHT = 520, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 30
_MOST_DOTS = 60
_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --raised: #f5f6f8; --ink: #1b1f24; --faint: #5f6b7a;
  --line: #d9dee5;
  --c0: #2563c9; --c1: #d9541e; --c2: #0b8a68; --c3: #8b4fc6; --c4: #a87800; --c5: #c2327a; --c6: #4f7d12;
  --c7: #5b6472; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --raised: #1d2127; --ink: #e4e8ed; --faint: #98a4b3;
  --line: #343b45; --c0: #6ea8ff; --c1: #ff8d5e; --c2: #3fcfa4; --c3: #c39bff; --c4: #e6b422; --c5: #ff7ab6;
  --c6: #9ad04f; --c7: #aab4c2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1180px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 38px 0 10px; }
p { margin: 6px 0 12px; } .faint { color: var(--faint); }
code, .mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { background: var(--raised); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 22px; font-weight: 600; line-height: 1.35; }
.tile span { color: var(--faint); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(430px, 100%), 1fr)); gap: 22px 26px; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 0 16px; font-size: 13px; color: var(--faint); min-height: 20px; }
.legend svg { width: 26px; height: 10px; margin-right: 5px; } .legend b { color: var(--ink); font-weight: 600; }
svg.chart { width: 100%; height: auto; display: block; }
svg text { fill: var(--faint); font-size: 12px; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg path { fill: none; stroke-width: 2; stroke-linejoin: round; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; min-width: 50%; }
th { text-align: left; font-weight: 600; color: var(--faint); } td, th { vertical-align: top; }
td, th { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th { overflow-wrap: normal; }
details { margin: 14px 0; } summary { cursor: pointer; font-weight: 600; }
pre { background: var(--raised); border-radius: 8px; padding: 12px 14px; overflow-x: auto; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 16px; }
.sheet img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px; background: var(--raised); }
.sheet figcaption { font-weight: 400; font-size: 13px; line-height: 1.4; overflow-wrap: anywhere; }
.sheet b { display: block; font-weight: 600; }
footer { margin-top: 40px; color: var(--faint); font-size: 13px; }
""" + "".join(f".c{i} {{ stroke: var(--c{i}); }} .f{i} {{ fill: var(--c{i}); }}\n" for i in range(NUM_COLORS))


@dataclass(frozen=True)
class Series:
    """A line of a chart: points (x, y), one of `NUM_COLORS` colours, and a look: solid, dashed, or crosses."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    look: str = "solid"


def page(title: str, body: Iterable[str]) -> str:
    """A whole document: a title, which is escaped, and parts made by the functions here."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    return f'<p class="faint">{escape(text)}</p>'


def percent(share: float, decimals: int = 2) -> str:
    return f"{100 * share:.{decimals}f} %"


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """The few numbers that matter most: each a value and what it is."""
    cells = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(n)}</span></div>' for v, n in figures)
    return f'<div class="tiles">{cells}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Iterable[int] = ()) -> str:
    """A table of text; the columns in `numbers` are set to the right."""
    right = set(numbers)

    def row(cells: Sequence[object], tag: str) -> str:
        marks = (' class="number"' if column in right else "" for column in range(len(cells)))
        inner = "".join(f"<{tag}{m}>{escape(str(cell))}</{tag}>" for m, cell in zip(marks, cells, strict=True))
        return f"<tr>{inner}</tr>"

    head = f"<thead>{row(header, 'th')}</thead>" if header else ""
    return f'<div class="scroll"><table>{head}<tbody>{"".join(row(r, "td") for r in rows)}</tbody></table></div>'


def details(title: str, content: str) -> str:
    """Content, made by the functions here, that unfolds under its title."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def preformatted(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def image_sheet(images: Iterable[tuple[np.ndarray, str, str]]) -> str:
    """Images, uint8 RGB (H, W, 3), each with a line that stands out and one that does not, inside the page as JPEGs."""
    cells = (
        f'<figure><img src="{_data_url(image)}" alt="{escape(strong)}"><figcaption><b>{escape(strong)}</b>'
        f'<span class="faint">{escape(weak)}</span></figcaption></figure>'
        for image, strong, weak in images
    )
    return f'<div class="sheet">{"".join(cells)}</div>'


def _data_url(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    if min(picture.size) < 96:  # browsers blur what they enlarge
        factor = -(-96 // min(picture.size))
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def charts(figures: Iterable[str]) -> str:
    """Charts side by side, as many as fit."""
    return f'<div class="charts">{"".join(figures)}</div>'


def line_chart(title: str, series: Sequence[Series], *, kind: str = "number", from_zero: bool = False) -> str:
    """A chart of lines over the epochs finished; "" where none has a point.

    Parameters
    ----------
    title : str
    series : sequence of Series
        Values that are not finite are left out, and break their line.
    kind : {"number", "percent"}
        How values are shown; percents are given in [0, 1].
    from_zero : bool
        Whether the axis begins at 0.

    Returns
    -------
    str
        HTML. Points tell their values when pointed at.
    """
    finite = [(x, y) for one in series for x, y in one.points if math.isfinite(y)]
    if not finite:
        return ""
    xs, ys = zip(*finite, strict=True)
    x_ticks = _ticks(min(xs), max(xs), 7, whole=True)
    y_ticks = _ticks(min(0.0, *ys) if from_zero else min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        return _LEFT + across, _TOP + (y_high - y) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for y in y_ticks:
        top = at(x_low, y)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{top + 4:.1f}" text-anchor="end">{_shown(y, kind)}</text>')
    for x in x_ticks:
        if x_low <= x <= x_high:
            left = at(x, y_low)[0]
            parts.append(f'<text x="{left:.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{x:g}</text>')
    for one in series:
        parts += _drawn(one, at, kind)
    shown = [one for one in series if one.points]
    legend = "".join(_legend(one, kind, one.name if len(shown) > 1 else "last") for one in shown)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="legend">{legend}</div>'
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _drawn(one: Series, at, kind: str) -> list[str]:
    color, dash = one.color % NUM_COLORS, ' stroke-dasharray="5 4"' * (one.look == "dashed")
    parts, path, pen = [], "", "M"
    for x, y in one.points:
        if math.isfinite(y):
            path += "{}{:.1f} {:.1f}".format(pen, *at(x, y))
        pen = "L" if math.isfinite(y) else "M"
    if one.look == "crosses":
        parts.append(f'<path class="c{color}" stroke-dasharray="1 5" opacity="0.7" d="{path}"/>')
    else:
        parts.append(f'<path class="c{color}"{dash} d="{path}"/>')
    finite = [point for point in one.points if math.isfinite(point[1])]
    step = max(1, -(-len(finite) // _MOST_DOTS))
    for x, y in [*finite[:-1][::step], *finite[-1:]]:
        left, top = at(x, y)
        tip = f"<title>{escape(one.name)}, epoch {x:g}: {_shown(y, kind, exact=True)}</title>"
        if one.look == "crosses":
            cross = f"M{left - 4:.1f} {top - 4:.1f}l8 8m0 -8l-8 8"
            parts.append(f'<path class="c{color}" d="{cross}">{tip}</path>')
        else:
            parts.append(f'<circle class="f{color}" cx="{left:.1f}" cy="{top:.1f}" r="2.6">{tip}</circle>')
    return parts


def _legend(one: Series, kind: str, name: str) -> str:
    color, dash = one.color % NUM_COLORS, ' stroke-dasharray="5 4"' * (one.look == "dashed")
    mark = "M9 1l8 8m0 -8l-8 8" if one.look == "crosses" else "M0 5H26"
    last = next((y for _, y in reversed(one.points) if math.isfinite(y)), None)
    value = "" if last is None else f" <b>{_shown(last, kind, exact=True)}</b>"
    line = f'<svg viewBox="0 0 26 10"><path class="c{color}"{dash} d="{mark}"/></svg>'
    return f"<span>{line}{escape(name)}{value}</span>"


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `most` of them."""
    span = (high - low) or abs(high) or 1.0
    raw = span / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _shown(value: float, kind: str, *, exact: bool = False) -> str:
    if kind == "percent":
        return percent(value) if exact else f"{100 * value:.4g} %"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if exact else f"{value:.6g}"
