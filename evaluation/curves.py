"""Plots of a ladder: accuracy against severity, and RGB against depth as the light fades."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.figures import BLIND_COLOR, COLORS, MARKERS, save_figure
from evaluation.ladder import CLEAN, Asked, Climb, crossings, exposure_name
from utils import printable

TITLES = {  # kind -> title of its panel, how a severity is written
    "holes": ("Round holes", lambda s: f"{100 * s:.0f} %"),
    "resolution": ("Resolution", lambda s: f"{s:g} px"),
    "range_cut": ("Range", lambda s: f"{s:g} m"),
    "edge_holes": ("Holes at edges", lambda s: f"{100 * s:.0f} %"),
    "border_holes": ("Holes from the border", lambda s: f"{100 * s:.0f} %"),
    "pixel_holes": ("Single pixels lost", lambda s: f"{100 * s:.0f} %"),
    "quantisation": ("Quantisation", lambda s: f"{s:g} bit"),
    "disparity_steps": ("Steps of disparity", lambda s: f"x {s:g}"),
    "noise": ("Noise", lambda s: f"x {s:g}"),
    "edge_jitter": ("Jitter of pixels", lambda s: f"{100 * s:.1f} %"),
    "tilt": ("Tilt misjudged", lambda s: f"{s:g} deg"),
    "scale": ("Scale misjudged", lambda s: f"{100 * s:.0f} %"),
    "no_depth": ("No depth at all", lambda s: "none"),
    "light": ("Less light", exposure_name),
    "light_gain": ("Less light, with gain", exposure_name),
}
PANELS_PER_ROW = 4


def draw_curves(climbs: Sequence[Climb], asked: Asked, blind: float, path: Path) -> None:
    """A panel per kind of degradation: each system's accuracy from clean pictures to the worst, with intervals.

    Systems that this kind does not touch, since they see something else, are horizontal lines.

    Args:
        climbs: the systems.
        asked: the questions; the plot is about their main column.
        blind: accuracy of the best baseline without an image.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(kind for climb in climbs for kind in climb.kinds()))
    columns = min(PANELS_PER_ROW, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(1.2 + 3.1 * columns, 1.3 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, kind in zip(panels.flat, kinds, strict=False):
        _panel(axes, kind, climbs, asked, blind)
    for axes in panels.flat[len(kinds) :]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_ylabel(f"Right answers (%), {asked.main_column.lower()}")
    _legend(figure, panels.flat, columns=3)
    save_figure(FigureCanvasAgg(figure), path)


def _panel(axes: Any, kind: str, climbs: Sequence[Climb], asked: Asked, blind: float) -> None:
    title, written = TITLES[kind]
    severities = next(climb.kinds()[kind] for climb in climbs if kind in climb.kinds())
    ticks = ["clean", *(written(rung.severity) for rung in severities)]
    for number, climb in enumerate(climbs):
        rungs = [CLEAN, *climb.kinds().get(kind, [])]
        if len(rungs) == 1:
            rungs *= len(ticks)
        _line(axes, range(len(ticks)), climb, rungs, number, asked)
    axes.axhline(100 * blind, color=BLIND_COLOR, linestyle=":", label="best without an image")
    axes.set_xticks(range(len(ticks)), ticks, rotation=45 if len(ticks) > 5 else 0)
    axes.set_title(title, fontsize=10)
    _tidy(axes)


def _line(
    axes: Any,
    positions: Sequence[float],
    climb: Climb,
    rungs: Sequence[Any],
    number: int,
    asked: Asked,
    *,
    label: str | None = None,
    linestyle: str | None = None,
) -> None:
    """One system's accuracies; a dashed line where nothing changes for it."""
    cells = [asked.accuracy(climb.right[rung], asked.main_column) for rung in rungs]
    values = 100 * np.array([cell["value"] for cell in cells])
    color, constant = COLORS[number % len(COLORS)], len(set(rungs)) == 1
    axes.plot(
        positions,
        values,
        color=color,
        linestyle=linestyle or ("--" if constant else "-"),
        marker="" if constant else MARKERS[number % len(MARKERS)],
        markersize=4.5,
        label=printable(label or climb.name).replace("$", r"\$"),
    )
    ends = 100 * np.array([[cell["low"], cell["high"]] for cell in cells], dtype=float)
    axes.fill_between(positions, *ends.T, color=color, alpha=0.15, linewidth=0)


def draw_light(climbs: Sequence[Climb], asked: Asked, blind: float, path: Path) -> None:
    """RGB against depth as the light fades: what RGB systems answer at each exposure, and depth systems in any light.

    Arguments: see `draw_curves`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    rungs = next(rungs for climb in climbs if climb.modality == "rgb" for rungs in climb.kinds().values())
    stops = [-np.log2(rung.severity) for rung in rungs]
    styles, names = {"light": ":", "light_gain": "-"}, {"light": "no gain", "light_gain": "gain"}
    for number, climb in enumerate(climbs):
        if climb.modality == "depth":
            _line(axes, stops, climb, [CLEAN] * len(stops), number, asked, label=f"{climb.name} (needs no light)")
        for kind, own in climb.kinds().items() if climb.modality == "rgb" else ():
            label = f"{climb.name}, {names[kind]}"
            _line(axes, stops, climb, own, number, asked, label=label, linestyle=styles[kind])
    axes.axhline(100 * blind, color=BLIND_COLOR, linestyle=(0, (1, 3)), label="best without an image")
    _mark_crossings(axes, climbs, asked)
    axes.set_xticks(stops, [exposure_name(rung.severity) for rung in rungs])
    axes.set(
        xlabel="Exposure",
        ylabel=f"Right answers (%), {asked.main_column.lower()}",
        xlim=(stops[0] - 0.3, stops[-1] + 0.3),
    )
    axes.set_title("As the light fades")
    _tidy(axes)
    _legend(figure, [axes], columns=2)
    save_figure(FigureCanvasAgg(figure), path)


def _mark_crossings(axes: Any, climbs: Sequence[Climb], asked: Asked) -> None:
    """A circle where the line of an RGB system crosses that of a depth system, with the exposure beside it.

    Where systems are so alike that two numbers would lie on each other, the second one is left out.
    """
    named: list[tuple[int, float, float]] = []
    for number, exposure, value in _crossing_points(climbs, asked):
        side, stop, percent = number % 2, -np.log2(exposure), 100 * value
        axes.plot(stop, percent, marker="o", markersize=11, mfc="none", mec="black", mew=1.3)
        if any(side == s and abs(stop - x) < 1 and abs(percent - y) < 5 for s, x, y in named):
            continue
        named.append((side, stop, percent))
        place = {"xytext": (-8, -14), "ha": "right"} if side else {"xytext": (8, 6)}
        axes.annotate(exposure_name(exposure), (stop, percent), textcoords="offset points", **place)


def _crossing_points(climbs: Sequence[Climb], asked: Asked) -> list[tuple[int, float, float]]:
    """Where the line of an RGB system crosses that of a depth system: the RGB system's number, exposure, accuracy."""
    lights = [climb for climb in climbs if climb.modality == "rgb"]
    depths = [climb for climb in climbs if climb.modality == "depth"]
    column = asked.main_column
    return [
        (number, exposure, float(depth.right[CLEAN][asked.columns[column]].mean()))
        for number, light in enumerate(lights)
        for depth in depths
        for exposure in crossings(light, depth, asked, column).values()
        if exposure is not None and exposure < 1
    ]


def _tidy(axes: Any) -> None:
    axes.grid(axis="y", color="#D9D9D9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_ylim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, panels: Sequence[Any], columns: int) -> None:
    """One legend of all panels; a system that stands still in some has the line of a panel where it moves."""
    shown: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in shown or (handle.get_marker() and not shown[label].get_marker()):
                shown[label] = handle
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=columns, frameon=False)
