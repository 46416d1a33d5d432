"""How a scored checkpoint was trained: its flags, and the curves of its run."""

import csv
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distillation.export import read_description, training_flags
from utils import UserError, printable, read_json, reason

CURVES = ("train/loss", "val/exact_match")
MOST_POINTS = 120  # of a curve; more cannot be told apart in a plot


def training_of(path: Path, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What results say about the training of a checkpoint.

    Args:
        path: the checkpoint; its run's logs are looked for where training scripts write them.
        recorded: its hyper-parameters.

    Returns:
        `script`, `git_commit`, `teacher`, `labels` (the share that was read; None = not known), `flags`, `curves` (by
        name, points of update and value) and `validation` (scores of this checkpoint, empty where no log is there).
    """
    folder = path.resolve().parent
    logs = folder.parent.parent / "tensorboard_logs" / folder.name
    return {
        "script": recorded["script"],
        "git_commit": recorded.get("git_commit"),
        "teacher": recorded.get("teacher_checkpoint") or recorded.get("teacher_name"),
        "labels": recorded["label_fraction"] or 0.0,  # None in phase 1, which reads none
        "flags": training_flags(recorded),
        "curves": read_curves(logs),
        "validation": validation_score(logs, path),
    }


def exported_training(name: str | None) -> dict[str, Any] | None:
    """The same of an export of ours, which has no curves; None for a stock model."""
    if name is None or (description := read_description(name)) is None:
        return None
    flags = description.get("flags")
    return {
        "script": description["trained_by"],
        "git_commit": (description.get("git_commit") or {}).get("training"),
        "teacher": description.get("teacher"),
        "labels": None if flags is None else flags.get("label_fraction", 0.0),  # exports had no flags at first
        "flags": flags or {},
        "curves": {},
        "validation": description.get("validation") or {},
    }


def read_curves(logs: Path) -> dict[str, list[list[float]]]:
    """The curves of a run's CSV files, oldest file first: of a run that was resumed there are several."""
    files = sorted(logs.glob("metrics.*.csv"), key=lambda file: file.stat().st_mtime)
    files += [logs / "metrics.csv"] if (logs / "metrics.csv").is_file() else []
    curves: dict[str, dict[int, float]] = {name: {} for name in CURVES}
    for file in files:
        for row in _rows(file):
            for name in CURVES:
                if row.get(name):
                    curves[name][int(row["step"])] = float(row[name])
    return {name: _thinned(sorted(points.items())) for name, points in curves.items() if points}


def _rows(file: Path) -> list[dict[str, str]]:
    """The lines of a log; none of a damaged one, since scores do not wait for it."""
    try:
        with open(file, encoding="utf-8", newline="") as handle:
            return [row for row in csv.DictReader(handle) if _is_finite(row)]
    except (OSError, ValueError, csv.Error) as error:
        print(printable(f"{file}: no curves from there ({reason(error)})"), file=sys.stderr)
        return []


def _is_finite(row: Mapping[str, str]) -> bool:
    """Steps of 16-mixed may overflow, and have no loss then. Raises ValueError where a cell is no number."""
    return all(math.isfinite(float(row[name])) for name in ("step", *CURVES) if row.get(name))


def _thinned(points: list[tuple[int, float]]) -> list[list[float]]:
    """At most `MOST_POINTS` points, evenly spread, the first and the last among them."""
    n = min(len(points), MOST_POINTS)
    chosen = [points[i * (len(points) - 1) // max(n - 1, 1)] for i in range(n)]
    return [[step, round(value, 5)] for step, value in chosen]


def validation_score(logs: Path, path: Path) -> dict[str, float]:
    """The validation score of a run's best checkpoint; empty for another one, and without the run's logs."""
    try:
        run = read_json(logs / "run.json")
    except UserError:  # a checkpoint that was moved away from its logs, or a damaged log
        return {}
    if Path(str(run.get("best"))).name != path.name:
        return {}
    return {name: value for name, value in run.items() if name.startswith("val/") and isinstance(value, float)}
