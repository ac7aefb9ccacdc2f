"""The report's figures: inline SVG that takes its colours from the page, so that it reads in light and in dark.

Equal input gives equal bytes: no date, no random ids, no font outlines.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# matplotlib wants fixed colours: each of these stands for a variable of the page's style sheet and is replaced by it.
VARIABLES = ("ink", "muted", "line", "base", "sft", "ppo", "accent")
COLOURS = {name: f"#00000{place}" for place, name in enumerate(VARIABLES, 1)}  # not black, which SVG leaves unsaid
STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 10,
    "text.color": COLOURS["ink"], "axes.labelcolor": COLOURS["muted"], "axes.edgecolor": COLOURS["line"],
    "xtick.color": COLOURS["line"], "ytick.color": COLOURS["line"], "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["ink"], "axes.grid": True, "axes.axisbelow": True, "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "ytick.major.size": 0, "xtick.major.size": 0, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.facecolor": "none", "figure.facecolor": "none", "figure.constrained_layout.use": True,
}
WIDTH = 8.0  # inches; the page scales it
COLUMNS = 3  # of small multiples


class Bar(NamedTuple):
    """A labelled figure, with the ends of its interval where it has one. colour: a key of COLOURS."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: str = "accent"


class Curve(NamedTuple):
    """One training curve: (step, value) pairs, steps rising."""

    title: str
    points: list[tuple[int, float]]
    colour: str = "accent"


def read_curve(title: str, path: Path, colour: str = "accent") -> Curve:
    """Reads a DVCLive file: tab-separated, with the columns `step` and the file's name; values not finite are left out.

    Raises ValueError if the file is missing or is not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} (training curve '{title}') is not here; rerun the stage that trains")
    with path.open(encoding="utf-8", newline="") as file:
        try:
            pairs = [(int(row["step"]), float(row[path.stem])) for row in csv.DictReader(file, delimiter="\t")]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: must hold the tab-separated columns step and {path.stem}, a number in each row; "
                             "rerun the stage that trains") from None
    return Curve(title, [pair for pair in pairs if math.isfinite(pair[1])], colour)


def signless_zero(value: float, digits: str = "+.1f") -> str:
    """The figure as text; one that rounds to nothing has no sign: 0.0, not -0.0 or +0.0."""
    text = f"{value:{digits}}"
    return text.lstrip("+-") if float(text) == 0 else text


def bars(name: str, description: str, rows: Sequence[Bar], unit: str, digits: str = ".1f") -> Markup:
    """Horizontal bars from zero, whiskers over them for the intervals, the figures written beside them."""
    low = min([0.0] + [min(row.value, row.low if row.low is not None else row.value) for row in rows])
    high = max([0.0] + [max(row.value, row.high if row.high is not None else row.value) for row in rows])
    span = high - low or 1.0

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            colour, text, end = COLOURS[row.colour], signless_zero(row.value, digits), row.value
            axes.barh(place, row.value, height=0.55, color=colour, alpha=0.35)
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2)
                text = f"{text} ({signless_zero(row.low, digits)} to {signless_zero(row.high, digits)})"
                end = row.high
            axes.plot([row.value], [place], "o", color=colour, markersize=6)
            axes.annotate(text, (max(end, 0), place), (8, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.set_xlim(low - 0.04 * span * (low < 0), high + 0.3 * span)  # room for the written figures
        axes.axvline(0, color=COLOURS["muted"], linewidth=1)
        axes.set_xlabel(unit)
    return _svg(name, description, 0.75 + 0.34 * len(rows), draw)


def training_curves(name: str, description: str, curves: Sequence[Curve]) -> Markup:
    """Small multiples, three a row, each with its own scale: thin as logged, thick as a running mean."""
    def draw(figure: Figure) -> None:
        for axes, curve in zip(_grid(figure, len(curves)), curves, strict=True):
            steps, values = [point[0] for point in curve.points], [point[1] for point in curve.points]
            axes.plot(steps, values, color=COLOURS[curve.colour], linewidth=0.8, alpha=0.45)
            axes.plot(steps, _running_mean(values), color=COLOURS[curve.colour], linewidth=1.8,
                      marker="o" if len(values) == 1 else "")  # a line through one point draws nothing
            axes.set_xlabel("step", fontsize=8)
            axes.set_title(curve.title if values else f"{curve.title}: no finite value")
    return _svg(name, description, 2.0 * _rows(len(curves)), draw)


def histograms(name: str, description: str, panels: Sequence[tuple[str, Sequence[float], Sequence[int]]]) -> Markup:
    """Small multiples, three a row. panels: (title, the bins' edges, the bins' counts), one edge more than counts."""
    def draw(figure: Figure) -> None:
        for axes, (title, edges, counts) in zip(_grid(figure, len(panels)), panels, strict=True):
            axes.stairs(counts, edges, fill=True, color=COLOURS["accent"], alpha=0.7)
            axes.set_title(title)
            axes.grid(False, axis="x")
    return _svg(name, description, 1.6 * _rows(len(panels)), draw)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of about a tenth of the curve, narrower at its ends."""
    half = len(values) // 20
    windows = [values[max(0, i - half):i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _rows(panels: int) -> int:
    return math.ceil(panels / COLUMNS)


def _grid(figure: Figure, panels: int) -> list[Axes]:
    axes = [figure.add_subplot(_rows(panels), COLUMNS, place + 1) for place in range(panels)]
    for each in axes:
        each.locator_params(nbins=4)
        each.tick_params(labelsize=8, labelcolor=COLOURS["muted"])
    return axes


def _svg(name: str, description: str, height: float, draw: Callable[[Figure], None]) -> Markup:
    """The drawn figure as an <svg> element, its ids unlike other figures', with a text for who does not see it."""
    buffer = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a person's own matplotlibrc does not change the report
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": name})
        figure = Figure(figsize=(WIDTH, height))
        draw(figure)
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    for noise in (r"<metadata>.*?</metadata>", r"<style .*?</style>"):  # the style would hold for the whole page
        svg = re.sub(noise, "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;]*;", "", svg)  # the page's
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1, axes_1, …: alike in all figures, and nothing refers to them
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    view_box = re.search(r'viewBox="[^"]*"', svg).group()
    opening = f'<svg role="img" {view_box} aria-label="{escape(description)}">'
    return Markup(opening + svg[svg.index(">", svg.index("<svg")) + 1:])
