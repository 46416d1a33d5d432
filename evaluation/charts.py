"""Line charts as coordinates, for `charts.html.j2` to draw: everything a template cannot compute."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 320, 200  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 42, 18, 10, 40  # margins
# Each is told from white, and from its neighbours by its dashes, too.
LINE_COLORS = ("#0072b2", "#c24f00", "#00795a", "#a3437c", "#7a5b00", "#5b3fa0")
DASHES = ("none", "7 3", "10 3 3 3", "4 2", "12 4", "9 3 2 3 2 3")


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    number: int  # of its system, for color and dashes
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] = ()  # ends of the interval of each y
    high: Sequence[float | None] = ()


@dataclass
class Chart:
    """A chart with numbers that are placed already."""

    title: str
    y_label: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    level: float | None = None  # height of a horizontal line
    description: str = ""


def line_style(number: int) -> dict[str, str]:
    """Color and dashes of a system's lines."""
    rounds, color = divmod(number, len(LINE_COLORS))  # with other dashes in each round of the colors
    return {"color": LINE_COLORS[color], "dash": DASHES[(color + rounds) % len(DASHES)]}


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]],
    y_range: tuple[float, float],
    level: float | None = None,
    description: str = "",
) -> Chart:
    """Place lines in a chart.

    Args:
        series: the lines; x values within those of `x_ticks`.
        title: of the chart.
        y_label: what is on the vertical axis.
        x_ticks: value and text of each tick, ascending.
        y_range: lowest and highest value.
        level: a value that a horizontal line marks.
        description: the same in words, for those who do not see it.
    """
    first, last = x_ticks[0][0], x_ticks[-1][0]
    bottom, top = y_range

    def across(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (x - first) / ((last - first) or 1), 1)

    def up(y: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - bottom) / ((top - bottom) or 1), 1)

    chart = Chart(title, y_label, description=description, level=None if level is None else up(level))
    for one in series:
        style = line_style(one.number) if len(series) > 1 else line_style(one.number) | {"dash": "none"}
        points = [(across(x), up(y)) for x, y in zip(one.x, one.y, strict=True)]
        ends = [(across(x), end) for x, end in zip(one.x, one.high, strict=False) if end is not None]
        ends += [(across(x), end) for x, end in zip(one.x, one.low, strict=False) if end is not None][::-1]
        band = _text([(x, up(end)) for x, end in ends])
        chart.lines.append({"points": _text(points), "band": band, "dots": points if len(points) < 13 else []} | style)
    chart.x_ticks = [(across(x), text) for x, text in x_ticks]
    chart.y_ticks = [(up(y), f"{y:g}") for y in _round_steps(bottom, top)]
    return chart


def _text(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _round_steps(low: float, high: float, *, about: int = 4) -> list[float]:
    """Some round numbers from `low` to `high`."""
    rough = (high - low) / about or 1.0
    size = 10 ** math.floor(math.log10(rough))
    step = min((size * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(step - rough))
    first = math.ceil(low / step - 1e-9)
    return [round(step * n, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]
