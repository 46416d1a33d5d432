"""The ladder as a table: a row per rung, a column per system."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.comparison import aligned, markdown, short_type
from evaluation.ladder import exposure_name
from utils import printable

HEADINGS = {"depth": "Depth gets worse", "rgb": "The light fades"}
SUMMARY = {"clean": "clean", "mean": "mean of the ladder", "kept": "share kept"}


def as_text(record: Mapping[str, Any], column: str) -> str:
    """All tables for a terminal, without intervals."""
    return _document(record, column, lambda lines: aligned([[_bare(cell) for cell in line] for line in lines]))


def as_markdown(record: Mapping[str, Any], column: str) -> str:
    """All tables as Markdown."""
    return _document(record, column, markdown)


def _document(record: Mapping[str, Any], column: str, drawn) -> str:
    asked = record["questions"]
    parts = [
        f"Share of right answers in %, {short_type(column).lower()}, of {asked['n_questions']} questions about "
        f"{asked['n_images']} images of the {record['settings']['split']} split. Intervals (95 %) resample recordings. "
        "Mean of the ladder: over holes, resolution and range_cut as far as they are there; for light, over exposures "
        "below 1. Share kept: that mean over the accuracy on clean pictures.\n"
    ]
    for modality, heading in HEADINGS.items():
        systems = [system for system in record["systems"] if system["modality"] == modality]
        if systems:
            parts += [f"{heading}:\n", drawn(_lines(systems, record, column))]
    parts += [line + "\n" for line in map(_crossing, record["crossings"])]
    return "\n".join(parts)


def _lines(systems: Sequence[Mapping[str, Any]], record: Mapping[str, Any], column: str) -> list[list[str]]:
    compared = [system for system in systems if "difference" in system["rungs"][0]["accuracy"][column]]
    names = [printable(system["name"]) for system in systems]
    names += [printable(f"{system['name']} - {record['baseline']}") for system in compared]
    lines = [["", *names]]
    for name, title in SUMMARY.items():
        cells = [system["summary"][column].get(name) for system in systems]
        lines.append([title, *map(_accuracy, cells), *(_difference(s["summary"][column].get(name)) for s in compared)])
    for number, rung in enumerate(systems[0]["rungs"][1:], 1):
        own, differences = ([s["rungs"][number]["accuracy"][column] for s in group] for group in (systems, compared))
        severity = rung["severity"]
        written = exposure_name(severity) if systems[0]["modality"] == "rgb" else f"{severity:g}"
        title = f"{rung['kind']} {written}"
        lines.append([title, *map(_accuracy, own), *map(_difference, differences)])
    blind = record["blind"]
    return [
        *lines,
        [f"blind: {blind['name']}", *[_accuracy(blind["accuracy"][column])] * len(systems)] + [""] * len(compared),
    ]


def _accuracy(cell: Mapping[str, float | None] | None) -> str:
    if cell is None:
        return ""
    ends = "" if cell["low"] is None else f" [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
    return f"{100 * cell['value']:.1f}{ends}"


def _difference(cell: Mapping[str, Any] | None) -> str:
    if not (cell or {}).get("difference"):
        return ""
    value, *ends = cell["difference"]
    return f"{100 * value:+.1f}" + (
        " [{:+.1f}, {:+.1f}]".format(*(100 * e for e in ends)) if ends[0] is not None else ""
    )


def _bare(cell: str) -> str:
    """Without the interval."""
    return cell.split(" [")[0]


def _crossing(found: Mapping[str, Any]) -> str:
    names = {"light": "without gain", "light_gain": "with gain"}
    told = [f"{names[kind]} {_below(exposure)}" for kind, exposure in found["exposure"].items()]
    return printable(f"{found['depth']} answers more than {found['rgb']}: {', '.join(told)}.")


def _below(exposure: float | None) -> str:
    if exposure is None:
        return "at no exposure of the ladder"
    return "at every exposure of the ladder" if exposure >= 1 else f"below an exposure of {exposure_name(exposure)}"
