"""Charts over the epochs of a run, drawn by Matplotlib: as SVG in a page, and as the PNG of a run's curve.

Matplotlib is imported when the first chart is drawn.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ffcv_ops.files import replacing
from imagenet_training.reports.metrics import METRICS, ExpectedAccuracy, Records, best_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE_COLORS = ("#2563c9", "#d9541e", "#0b8a68", "#8b4fc6", "#a87800", "#c2327a", "#4f7d12", "#5b6472")
# In an SVG, each colour becomes a variable of the page's style sheet, which has other colours in dark mode.
COLORS = {"faint": "#5f6b7a", "line": "#d9dee5"} | {f"c{number}": color for number, color in enumerate(LINE_COLORS)}
STYLES: dict[str, dict[str, Any]] = {
    "solid": {"linestyle": "-", "marker": "o", "markersize": 3},
    "dashed": {"linestyle": (0, (3.5, 2.5)), "marker": "o", "markersize": 3},
    "crosses": {"linestyle": (0, (0.8, 3)), "marker": "x", "markersize": 6, "alpha": 0.75},
}
MAX_DOTS = 60
SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Line:
    """A line of a chart: points (epochs finished, value), the number of a colour, and a key of `STYLES`.

    A value that is not finite interrupts the line.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    style: str = "solid"

    @property
    def finite(self) -> list[int]:
        """The numbers of the points that are shown."""
        return [number for number, (_, value) in enumerate(self.points) if math.isfinite(value)]

    @property
    def dots(self) -> list[int]:
        """The numbers of the points that have a dot: the last one, and about `MAX_DOTS` others."""
        return [*self.finite[: -1 : -(-len(self.finite) // MAX_DOTS)], self.finite[-1]]


@dataclass(frozen=True)
class Chart:
    """Lines over the epochs. If `is_share`, the values are in [0, 1] and shown as percent."""

    title: str
    lines: Sequence[Line]
    is_share: bool = False
    from_zero: bool = False

    @property
    def shown(self) -> list[Line]:
        """The lines that have a finite value."""
        return [line for line in self.lines if line.finite]

    def show(self, value: float) -> str:
        """Return a value as text."""
        if self.is_share:
            return f"{100 * value:.2f} %"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def draw_charts(runs: Mapping[str, Records], expected_accuracy: ExpectedAccuracy) -> list[Chart]:
    """Return the charts that have points. Each of several runs has a colour, and its name before the names of lines."""
    charts = [*_metric_charts(runs, expected_accuracy), *_rate_charts(runs)]
    return [chart for chart in charts if chart.shown]


def _metric_charts(runs: Mapping[str, Records], expected_accuracy: ExpectedAccuracy) -> Iterator[Chart]:
    is_alone = len(runs) == 1
    for metric, title in METRICS.items():
        lines = []
        for number, (run, records) in enumerate(runs.items()):
            for split, style in (("val", "solid"), ("train", "dashed")):
                if is_alone or split == "val" or metric == "loss":
                    color = int(split == "train") if is_alone else number
                    lines.append(Line(f"{run} {split}".strip(), _points(records, f"{split}/{metric}"), color, style))
        for color, split in enumerate(("val", "train")):
            expected = expected_accuracy.get(f"{split}/{metric}", {})
            points = [(epochs, percent / 100) for epochs, percent in expected.items()]
            lines.append(Line(f"{split}, expected", points, color, "crosses"))
        yield Chart(title.capitalize(), lines, is_share=metric != "loss")


def _rate_charts(runs: Mapping[str, Records]) -> Iterator[Chart]:
    for title, key in (
        ("Learning rate", "lr"),
        ("Images per second, training", "images_per_s"),
        ("Share of the time waiting for data", "data_wait"),
        ("Resolution (px)", "resolution"),
    ):
        if key != "resolution" or len({record.get(key) for records in runs.values() for record in records}) > 1:
            lines = [Line(run or "last", _points(r, key), number) for number, (run, r) in enumerate(runs.items())]
            yield Chart(title, lines, is_share=key == "data_wait", from_zero=True)


def _points(records: Records, key: str) -> list[tuple[float, float]]:
    return [(record["epoch"] + 1, record[key]) for record in records if key in record]


def _plot(axes: "Axes", chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, line in enumerate(chart.shown):
        color = LINE_COLORS[line.color % len(LINE_COLORS)]
        look = {"color": color, "linewidth": 1.8, "markevery": line.dots, "clip_on": False, **STYLES[line.style]}
        axes.plot(*zip(*line.points, strict=True), label=line.name, gid=f"line{number}", **look)
    if chart.from_zero:
        axes.set_ylim(bottom=min(0.0, axes.dataLim.ymin))
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if chart.is_share:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g} %")
    axes.grid(axis="y", color=COLORS["line"], linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=6, labelcolor=COLORS["faint"], labelsize=9)
    axes.yaxis.get_offset_text().set(color=COLORS["faint"], size=9)


def draw_svg(chart: Chart) -> str:
    """Return a chart, without title and legend, as an SVG element whose dots have their values as tips.

    Equal charts give equal text. The colours are variables of the page's style sheet.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure, file = Figure(figsize=(5.2, 2.4)), io.StringIO()
    _plot(figure.add_axes((0.12, 0.11, 0.86, 0.84)), chart)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "chart"}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    text = file.getvalue()
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    ElementTree.register_namespace("", SVG[1:-1])
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(text)
    groups = {group.attrib.pop("id", ""): group for group in root.iter(f"{SVG}g")}
    for number, line in enumerate(chart.shown):
        for point, dot in zip(line.dots, groups[f"line{number}"].iter(f"{SVG}use"), strict=True):
            epoch, value = line.points[point]
            ElementTree.SubElement(dot, f"{SVG}title").text = f"{line.name}, epoch {epoch:g}: {chart.show(value)}"
    return ElementTree.tostring(root, encoding="unicode")


def draw_curve(records: Records, path: Path, expected_accuracy: ExpectedAccuracy) -> None:
    """Draw loss and accuracies over the epochs into a PNG. An earlier one is replaced whole."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axes, chart in zip(
        figure.subplots(1, len(METRICS)), _metric_charts({"": records}, expected_accuracy), strict=True
    ):
        _plot(axes, chart)
        axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("epochs finished", color=COLORS["faint"])
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    if best := best_record(records):
        figure.suptitle(f"best val top-1 {best['val/acc1']:.2%} after {best['epoch'] + 1} epochs")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
