"""Pictures of a comparison: accuracies per type, and a sheet of frames with the systems' answers."""

import math
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.page import RIGHT_COLOR, WRONG_COLOR
from dataset.questions.answers import exact_match, order_types
from dataset.questions.rows import stays_inside
from dataset.sunrgbd.depth import read_depth
from dataset.sunrgbd.frames import read_rgb
from evaluation.comparison import Results, TableRow, one_line, short_type, table_columns
from utils import UserError, atomic_path, printable

# Okabe and Ito's colors, which color-blind readers can tell apart; the markers differ too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BLIND_COLOR = "#767676"


def draw_accuracies(table: Sequence[TableRow], path: Path, *, title: str) -> None:
    """Plot one dot with its interval per system and question type, as a PNG; blind baselines are grey and hollow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = table_columns(table)
    figure = Figure(figsize=(max(9.0, 1.1 + len(columns) * max(1.2, 0.16 * len(table))), 5.2), layout="constrained")
    axes = figure.add_subplot()
    seen = {False: 0, True: 0}
    for position, row in enumerate(table):
        style = MARKERS[seen[row.blind] % len(MARKERS)]
        color = BLIND_COLOR if row.blind else COLORS[seen[row.blind] % len(COLORS)]
        seen[row.blind] += 1
        points = [(x, row.accuracies[column]) for x, column in enumerate(columns) if column in row.accuracies]
        offset = (position - (len(table) - 1) / 2) * 0.8 / len(table)
        values = np.array([cell["value"] for _, cell in points])
        ends = np.array([[_or(cell["low"], cell["value"]), _or(cell["high"], cell["value"])] for _, cell in points])
        axes.errorbar(
            [x + offset for x, _ in points],
            100 * values,
            yerr=100 * np.abs(ends.T - values),
            fmt=style,
            color=color,
            markerfacecolor="white" if row.blind else color,
            markersize=5.5,
            elinewidth=1.3,
            capsize=2,
            label=row.name.replace("$", r"\$"),
        )
    for x in range(0, len(columns), 2):
        axes.axvspan(x - 0.5, x + 0.5, color="#F2F2F2", zorder=0)
    axes.set_xticks(range(len(columns)), [short_type(column).replace("$", r"\$") for column in columns])
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-2, 102), xlabel="Question type", ylabel="Right answers (%)")
    axes.set_title(title)
    axes.grid(axis="y", color="#D9D9D9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(4, len(table)), frameon=False)
    save_figure(FigureCanvasAgg(figure), path)


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def save_figure(canvas: Any, path: Path) -> None:
    """Write a figure as a PNG, atomically."""
    with atomic_path(path) as part, warnings.catch_warnings():
        # A name in a script that the plot's font lacks is drawn as boxes; nobody can do anything about it.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from font")
        canvas.figure.savefig(part, format="png", dpi=150)


def sample_questions(results: Sequence[Results], n: int, *, seed: int = 0) -> list[int]:
    """Positions of up to `n` questions about different images, of all types, right and wrong ones in turn.

    A question counts as right when at least half of the systems answer it correctly. The same results
    give the same questions.
    """
    rows = results[0].rows
    mostly_right = np.mean([result.correct() for result in results], axis=0) >= 0.5
    groups: dict[tuple[bool, str], list[int]] = defaultdict(list)
    for position in np.random.default_rng(seed).permutation(len(rows)):
        groups[bool(mostly_right[position]), rows[position]["Question_Type"]].append(int(position))
    types = order_types({kind for _, kind in groups})
    # A question answered right of the first type, one answered wrong of the second, and so on; then right and wrong
    # change positions; then all over again.
    turns = [((number % 2 == 0) == first, kind) for first in (True, False) for number, kind in enumerate(types)]
    queues = [iter(groups[turn]) for turn in turns]
    chosen: dict[str, int] = {}
    before = -1
    while before < len(chosen) < n:
        before = len(chosen)
        for queue in queues:
            position = next((position for position in queue if rows[position]["Image_Path"] not in chosen), None)
            if position is not None and len(chosen) < n:
                chosen[rows[position]["Image_Path"]] = position
    return list(chosen.values())


class PictureMissing(UserError):
    """A picture that a sheet would show is missing or damaged."""


def draw_contact_sheet(results: Sequence[Results], path: Path, root: Path, *, n_frames: int = 8) -> None:
    """Draw sampled frames as a PNG: the RGB image, its depth, the question, and every system's answer, right or wrong.

    Args:
        results: aligned systems.
        path: PNG to write.
        root: folder that Image_Path and Depth_Path are relative to.
        n_frames: most frames to show.

    Raises:
        PictureMissing: an image is missing or damaged.
        UserError: its path leaves `root`.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    positions = sample_questions(results, n_frames)
    frames = [_read_frame(root, results[0].rows[position]) for position in positions]
    farthest_m = math.ceil(max(np.quantile(depth_m[depth_m > 0], 0.99) for _, depth_m in frames))
    row_height = max(2.0, 0.75 + 0.24 * (len(results) + 1))  # inches: the question's lines and one line per answer
    figure = Figure(figsize=(13, row_height * len(positions) + 1.0), layout="constrained")
    axes = figure.subplots(len(positions), 3, squeeze=False, width_ratios=(1, 1, 2))
    colors = colormaps["viridis"].with_extremes(bad="#B0B0B0")
    for (left, middle, right), position, (rgb, depth_m) in zip(axes, positions, frames, strict=True):
        left.imshow(rgb)
        shown = middle.imshow(
            np.ma.masked_equal(depth_m, 0), cmap=colors, vmin=0, vmax=farthest_m, interpolation="nearest"
        )
        for axis in (left, middle, right):
            axis.set_axis_off()
        _write_answers(right, results, position, line_height=0.22 / row_height)
    axes[0, 0].set_title("RGB")
    axes[0, 1].set_title("Depth (grey: no measurement)")
    axes[0, 2].set_title("Question, right answer, and answers", loc="left")
    figure.colorbar(shown, ax=axes[-1, 1], location="bottom", label="Distance (m)", fraction=0.06, pad=0.04)
    save_figure(FigureCanvasAgg(figure), path)


def _read_frame(root: Path, row: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """RGB thumbnail (h, w, 3) uint8 and depth (H, W) in metres."""
    image_path, depth_path = (_inside(root, row[column]) for column in ("Image_Path", "Depth_Path"))
    try:
        rgb = Image.fromarray(read_rgb(image_path))
        rgb.thumbnail((640, 640))
        return np.asarray(rgb), read_depth(depth_path)
    except UserError as error:
        raise PictureMissing(str(error)) from error


def _inside(root: Path, relative: str) -> Path:
    if not stays_inside(relative):
        raise UserError(f"predictions.csv: path {relative} leaves the data folder {root}; refusing to read it")
    return root / relative


def _write_answers(axis: Any, results: Sequence[Results], position: int, *, line_height: float) -> None:
    row = results[0].rows[position]
    lines = [(line, "black", "bold") for line in textwrap.wrap(one_line(row["Questions"], 160), 68)]
    lines.append(
        (f"{printable(row['Question_Type'])}. Right answer: {one_line(row['Answers'], 40)}", "black", "normal")
    )
    for result in results:
        answer = result.rows[position]["Model_Answer"]
        right = exact_match(answer, row["Answers"])
        text = f"{'✓' if right else '✗'} {result.name}: {one_line(answer, 60) or '(empty)'}"
        lines.append((text, RIGHT_COLOR if right else WRONG_COLOR, "normal"))
    for number, (text, color, weight) in enumerate(lines):
        height = 0.98 - number * line_height
        axis.text(0, height, text, color=color, weight=weight, va="top", transform=axis.transAxes, parse_math=False)
