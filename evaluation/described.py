"""What results say about the system that they are of, looked at where it is read: it may be a stranger's."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dataset.inputs.degradations import LADDERS, LIGHT_LADDER, TRAINED
from utils import UserError

Check = Callable[[Any], bool]
LARGEST = 1e30  # of what can be drawn


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, type(None)))


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < LARGEST


def _is_curve(value: Any) -> bool:
    """Points of update and value."""
    return isinstance(value, list) and all(
        isinstance(p, list) and len(p) == 2 and all(map(_is_number, p)) for p in value
    )


def _is_map(value: Any, check: Check) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and check(own) for name, own in value.items())


TRAINING: dict[str, Check] = {
    "script": _is_text,
    "git_commit": _is_text,
    "teacher": _is_text,
    "labels": lambda value: value is None or _is_number(value),
    "flags": lambda value: _is_map(value, _is_plain),
    "curves": lambda value: _is_map(value, _is_curve),
    "validation": lambda value: _is_map(value, _is_number),
}
DESCRIBED: dict[str, Check] = {
    "system": lambda value: _is_map(value, _is_plain) and _is_text(value.get("name")),
    "date": _is_text,
    "questions": lambda value: value is None or (_is_map(value, _is_text) and isinstance(value.get("sha256"), str)),
    "training": lambda value: value is None or (isinstance(value, dict) and _fits(value, TRAINING)),
}


def _fits(value: Mapping[str, Any], checks: Mapping[str, Check]) -> bool:
    return all(check(value[name]) for name, check in checks.items() if name in value)


def check_described(metrics: Mapping[str, Any], path: Path) -> None:
    """Look at what metrics.json says besides scores.

    Raises:
        UserError: a part is not what an evaluation writes; names it.
    """
    for name, check in DESCRIBED.items():
        if name in metrics and not check(metrics[name]):
            raise UserError(f"{path}: {name} is not what an evaluation writes; evaluate the system again")


def _is_cell(value: Any) -> bool:
    """An accuracy with its interval."""
    ends = ("low", "high")
    return (
        isinstance(value, dict)
        and _is_number(value.get("value"))
        and all(end in value and (value[end] is None or _is_number(value[end])) for end in ends)
    )


def _is_rung(rung: Any, column: str, ladder: Mapping[str, Any]) -> bool:
    if not isinstance(rung, dict) or not _is_cell((rung.get("accuracy") or {}).get(column)):
        return False
    return rung.get("kind") == "clean" or rung.get("severity") in ladder.get(rung.get("kind"), ())


def _is_system(system: Any, column: str) -> bool:
    if not isinstance(system, dict) or not all(isinstance(system.get(n), str) for n in ("name", "model", "modality")):
        return False
    rungs, summary, ladder = system.get("rungs"), system.get("summary"), LADDERS.get(system["modality"])
    if ladder is None or not isinstance(rungs, list) or not isinstance(summary, dict) or not rungs:
        return False
    own = summary.get(column)
    sums = isinstance(own, dict) and _is_cell(own.get("clean")) and all(map(_is_cell, own.values()))
    return sums and rungs[0].get("kind") == "clean" and all(_is_rung(rung, column, ladder) for rung in rungs)


def check_ladder(record: Mapping[str, Any], path: Path) -> str:
    """Look at the content of a robustness.json, and return the column that it is about.

    Raises:
        UserError: it is not what robustness.py writes.
    """
    try:
        column = next(iter(record["systems"][0]["summary"]))
        asked = record["questions"]
        sound = (
            all(type(asked[name]) is int for name in ("n_questions", "n_images"))
            and isinstance(record["settings"]["split"], str)
            and _is_cell(record["blind"]["accuracy"][column])
            and all(_is_system(system, column) for system in record["systems"])
        )
    except (KeyError, TypeError, IndexError, AttributeError, StopIteration):
        sound = False
    if not sound:
        raise UserError(f"{path}: is not what robustness.py writes; score its systems again")
    return column


def is_counted(kind: str, severity: float) -> bool:
    """Whether a mean is over this rung: of a kind that students train for, or of light below that of the recording."""
    return kind in TRAINED or (kind in LIGHT_LADDER and severity < 1)


def counted_rungs(system: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rungs that the mean of a system is over."""
    return [rung for rung in system["rungs"] if is_counted(rung["kind"], rung["severity"])]
