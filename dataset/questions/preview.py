"""An HTML page that shows frames with their objects drawn, their depth, and every question with its answer."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dataset.page import render
from dataset.questions.captions import frame_caption
from dataset.questions.rows import QuestionRow
from dataset.sunrgbd.annotations import Instance, frame_objects
from dataset.sunrgbd.depth import read_depth
from dataset.sunrgbd.frames import Frame, read_frame, read_rgb
from utils import atomic_path, progress


def write_preview(path: Path, root: Path, rows: Sequence[QuestionRow], *, n_frames: int) -> None:
    """Write one self-contained HTML page.

    Args:
        path: of the page.
        root: ROOT_DATA_DIR.
        rows: the lines of the question files.
        n_frames: frames to show, evenly spaced over those that have questions.

    Raises:
        UserError: a frame's files cannot be read.
    """
    by_frame: dict[str, list[QuestionRow]] = {}
    for row in rows:
        by_frame.setdefault(row.image_path.rsplit("/", 2)[0], []).append(row)
    names = sorted(by_frame)
    chosen = sorted({names[i] for i in np.linspace(0, len(names) - 1, n_frames).round().astype(int)})
    frames = [
        _frame(read_frame(root, name), by_frame[name]) for name in progress(chosen, total=len(chosen), label="frames")
    ]
    page = render("dataset/questions/preview.html.j2", frames=frames)
    with atomic_path(path) as part:
        part.write_text(page, encoding="utf-8")


def _frame(frame: Frame, rows: Sequence[QuestionRow]) -> dict[str, Any]:
    """What the page shows of a frame."""
    instances, unsure = frame_objects(frame)
    picture = base64.b64encode(draw_frame(frame, instances)).decode()
    caption = frame_caption(instances, scene=frame.scene, unsure=unsure)
    notes = [caption.answer] if caption else []
    notes += [f"Perhaps more than drawn: {', '.join(sorted(unsure))}."] if unsure else []
    return {
        "path": frame.path,
        "scene": frame.scene,
        "picture": f"data:image/png;base64,{picture}",
        "notes": " ".join(notes),
        "rows": sorted(rows, key=lambda row: row.type),
    }


def draw_frame(frame: Frame, instances: Sequence[Instance]) -> bytes:
    """PNG of the RGB picture with outlined objects, each with its noun and depth, beside the depth in metres."""
    rgb, depth_m = read_rgb(frame.root / frame.image_path), read_depth(frame.root / frame.depth_path)
    figure = Figure(figsize=(14, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(rgb)
    for number, thing in enumerate(instances):
        color = colormaps["tab10"](number % 10)
        left.contour(thing.mask, levels=[0.5], colors=[color], linewidths=2)
        row, column = (int(np.median(indices)) for indices in np.nonzero(thing.mask))
        label = f"{thing.noun} {thing.depth_m:.2f} m" if np.isfinite(thing.depth_m) else thing.noun
        side = "left" if column < 0.15 * rgb.shape[1] else "right" if column > 0.85 * rgb.shape[1] else "center"
        box = {"facecolor": "black", "alpha": 0.6, "pad": 2, "edgecolor": color}
        left.text(column, row, label, color="white", size=9, ha=side, va="center", bbox=box)
    colors = colormaps["viridis"].with_extremes(bad="#B0B0B0")
    shown = right.imshow(np.ma.masked_equal(depth_m, 0), cmap=colors, vmin=0, interpolation="nearest")
    figure.colorbar(shown, ax=right, label="Distance (m); grey: no measurement", fraction=0.04, pad=0.02)
    for axis in (left, right):
        axis.set_axis_off()
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()
