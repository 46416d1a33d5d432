"""Which questions a page shows, and the pictures beside them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from dataset.inputs.pictures import ImageSettings, load_images
from dataset.page import picture_uri, shown_pixels
from dataset.questions.answers import order_types
from dataset.questions.rows import stays_inside
from dataset.sunrgbd.frames import read_frame, read_rgb
from evaluation.comparison import Results
from utils import UserError, progress

CHANGES = {  # right before (baseline) and after (the compared system) -> its name, and how a filter calls it
    (False, True): ("mended", "{other} mended it"),
    (True, False): ("broken", "{other} broke it"),
    (True, True): ("both", "both right"),
    (False, False): ("none", "both wrong"),
}
PICTURE_WIDTH = 320  # pixels
N_QUESTIONS = 96
LONGEST_URI = 3_600_000 // (2 * N_QUESTIONS)  # characters of a picture: with all of them a page stays below 5 MB


def change_names(before: Results, after: Results) -> list[str]:
    """What became of each question between two systems: the first entries of `CHANGES`."""
    pairs = zip(before.correct(), after.correct(), strict=True)
    return [CHANGES[pair][0] for pair in pairs]


def sample_gallery(rows: Sequence[Mapping[str, str]], changes: Sequence[str], n: int, *, seed: int = 0) -> list[int]:
    """Positions of up to `n` questions: in turn of every change, type and sensor, about different pictures first.

    The same results give the same questions.
    """
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for position in np.random.default_rng(seed).permutation(len(rows)).tolist():
        row = rows[position]
        groups[row.get("sensor") or "", row["Question_Type"], changes[position]].append(position)
    types = order_types({kind for _, kind, _ in groups})
    names = [name for name, _ in CHANGES.values()]
    order = sorted(groups, key=lambda key: (key[0], types.index(key[1]), names.index(key[2])))
    chosen: list[int] = []
    seen: set[str] = set()
    for fresh in (True, False):  # then further questions about pictures that are there already
        queues = [list(groups[key]) for key in order]
        while len(chosen) < n and any(queues):
            for queue in queues:
                position = _next(queue, rows, seen, set(chosen), fresh=fresh)
                if position is not None and len(chosen) < n:
                    chosen.append(position)
                    seen.add(rows[position]["Image_Path"])
    return chosen


def _next(
    queue: list[int], rows: Sequence[Mapping[str, str]], seen: set[str], chosen: set[int], *, fresh: bool
) -> int | None:
    while queue:
        position = queue.pop(0)
        if position not in chosen and (rows[position]["Image_Path"] in seen) != fresh:
            return position
    return None


def image_settings(system: Mapping[str, Any]) -> ImageSettings | None:
    """What a system of metrics.json sees; None where it does not say."""
    names = [field.name for field in fields(ImageSettings)]
    return ImageSettings(**{name: system[name] for name in names}) if all(name in system for name in names) else None


def show_pictures(
    root: Path, rows: Sequence[Mapping[str, str]], seen_as: ImageSettings | None
) -> Iterator[dict[str, Any]]:
    """The pictures of some rows: URIs `rgb` and `depth`, and why one is not there.

    Args:
        root: folder that the paths are relative to.
        rows: with Image_Path and Depth_Path.
        seen_as: of the system through whose eyes depth is shown; None = no depth.

    Raises:
        UserError: a path leaves `root`.
    """
    for row in progress(rows, total=len(rows), label="pictures of the page"):
        for column in ("Image_Path", "Depth_Path"):
            if not stays_inside(row[column]):
                raise UserError(
                    f"predictions.csv: path {row[column]} leaves the data folder {root}; refusing to read it"
                )
        shown: dict[str, Any] = {"rgb": None, "depth": None, "missing": None}
        try:
            shown["rgb"] = _uri(read_rgb(root / row["Image_Path"]))
            if seen_as is not None:
                frame = read_frame(root, row["Image_Path"].rsplit("/", 2)[0])
                (depth,) = load_images(frame, [seen_as])
                shown["depth"] = _uri(shown_pixels(depth))
        except UserError as error:
            shown["missing"] = str(error)
        yield shown


def _uri(pixels: np.ndarray) -> str:
    return picture_uri(pixels, width=PICTURE_WIDTH, most=LONGEST_URI)
