"""One page about compared systems: what was gained, how sure that is, where it fails; see `report.html.j2`."""

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dataset.page import render
from dataset.questions.answers import exact_match, normalise_answer, order_types
from distillation.card import flag_text, short_path
from evaluation.charts import Chart, Series, line_chart, line_style
from evaluation.comparison import DEPTH, OVERALL, Results, TableRow, one_line, short_type, table_columns
from evaluation.curves import TITLES
from evaluation.gallery import CHANGES, N_QUESTIONS, change_names, image_settings, sample_gallery, show_pictures
from evaluation.intervals import paired_difference, permutation_test
from evaluation.metrics import recordings
from utils import ROOT, atomic_path, git_commit

MOST_ANSWERS = 8  # rows and columns of a confusion table
OTHER = "(another)"
LONGEST = 200  # characters of a question or an answer
SCRIPT = ROOT / "evaluation" / "report.js"


@dataclass(frozen=True)
class Compared:
    """What a page is about."""

    results: Sequence[Results]
    table: Sequence[TableRow]
    baseline: Results
    other: Results | None  # the system that the page compares with the baseline; None where there is no other
    n_rivals: int  # how many it is the best of
    notes: str  # what the numbers mean


def compared(results: Sequence[Results], table: Sequence[TableRow], baseline: str | None, notes: str) -> Compared:
    """Choose what the headline is about: the best of those that see what the baseline sees, else the best of all."""
    base = next(result for result in results if result.name == (baseline or results[0].name))
    value = {row.name: row.accuracies[main_column(table)]["value"] for row in table}
    others = [result for result in results if result is not base]
    rivals = [result for result in others if _sees(result) == _sees(base)] or others
    other = max(rivals, key=lambda result: value[result.name], default=None)
    return Compared(results, table, base, other, len(rivals), notes)


def main_column(table: Sequence[TableRow]) -> str:
    """The column that headline and page are about: questions that depth can answer, where all rows know which."""
    return DEPTH if all(DEPTH in row.accuracies for row in table) else OVERALL


def _sees(result: Results) -> Any:
    return (result.metrics.get("system") or {}).get("modality")


def write_page(path: Path, found: Compared, root: Path, *, robustness: Mapping[str, Any] | None = None) -> None:
    """Write the page.

    Args:
        path: of the page.
        found: what it is about.
        root: folder that image paths are relative to; the page says so where pictures are missing.
        robustness: content of a robustness.json, where there is one.

    Raises:
        UserError: an image path leaves `root`, or the disk is full or not writable.
    """
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = render(
        "evaluation/report.html.j2",
        script=Markup(script),  # our own, and the only thing on the page that is not escaped
        script_digest=digest,
        made=f"{date.today()}, commit {git_commit()}",
        headline=headline(found),
        n_questions=len(found.baseline.rows),
        n_asked=len(asked_about(found, main_column(found.table))),
        n_images=len({row["Image_Path"] for row in found.baseline.rows}),
        systems=[describe(result, number) for number, result in enumerate(found.results)],
        columns=bars(found),
        differences=differences(found),
        data=data_shown(found),
        notes=" ".join(found.notes.split()),
        robustness=robustness_charts(robustness, [result.name for result in found.results]) if robustness else None,
        curves=training_charts(found.results),
        gallery=gallery(found, root),
        confusion=confusion(found.results),
        questions=next((q for r in found.results if (q := r.metrics.get("questions"))), None),
    )
    with atomic_path(path) as part:
        part.write_text(page, encoding="utf-8")


def headline(found: Compared) -> dict[str, Any]:
    """The one sentence that a reader takes home, and how sure it is."""
    column = main_column(found.table)
    rows = {row.name: row.accuracies[column]["value"] for row in found.table}
    base, other = found.baseline, found.other
    said = {
        "about": "that depth can answer" if column == DEPTH else "asked",
        "n_rivals": found.n_rivals,
        "base": base.name,
        "base_value": rows[base.name],
        "blind": max((row.accuracies[column]["value"] for row in found.table if row.blind), default=None),
        "other": other and other.name,
    }
    if other is None:
        return said
    points = difference_of(found, other, column)
    value, low, high = points["difference"]
    unsure = math.isnan(low) or low <= 0 <= high
    better = None if unsure else value > 0  # None = nobody can tell
    return said | points | {"other_value": rows[other.name], "better": better}


def asked_about(found: Compared, column: str) -> list[int]:
    """Positions of the questions of `Overall` or `By depth`."""
    rows = found.baseline.rows
    return [n for n, row in enumerate(rows) if column == OVERALL or row.get("depth_answerable") == "1"]


def difference_of(found: Compared, result: Results, column: str) -> dict[str, Any]:
    """The paired difference of a system from the baseline on a column's questions, with its p value."""
    asked = asked_about(found, column)
    clusters = recordings([found.baseline.rows[n] for n in asked])
    right, expected = ([correct[n] for n in asked] for correct in (result.correct(), found.baseline.correct()))
    points = paired_difference(right, expected, clusters)
    return {"difference": points, "p_value": permutation_test(right, expected, clusters)}


def differences(found: Compared) -> dict[str, Any]:
    """What every other system has above the baseline, by column; by depth where that is known of all."""
    columns = list(dict.fromkeys((main_column(found.table), OVERALL)))
    others = [result for result in found.results if result is not found.baseline]
    rows = [{"name": r.name, "cells": [difference_of(found, r, column) for column in columns]} for r in others]
    return {"columns": [short_type(column) for column in columns], "rows": rows}


def data_shown(found: Compared) -> str:
    """Whose questions these are, in words."""
    systems = [result.metrics.get("system") or {} for result in found.results]
    split = next((system["split"] for system in systems if system.get("split")), "")
    if any(system.get("miniature") for system in systems):
        return f"the built-in miniature world of rendered rooms, {split} split"
    return "DAQUAR" if split.startswith("daquar") else f"SUN RGB-D, {split} split" if split else "unknown origin"


def bars(found: Compared) -> list[dict[str, Any]]:
    """For each column of the table: every system's accuracy with its interval, and that of the best blind baseline."""
    columns = []
    for name in table_columns(found.table):
        blind = max(
            (r.accuracies[name]["value"] for r in found.table if r.blind and name in r.accuracies), default=None
        )
        rows = [(n, row) for n, row in enumerate(found.table) if not row.blind and name in row.accuracies]
        cells = [{"name": row.name, "number": n} | row.accuracies[name] for n, row in rows]
        columns.append({"name": short_type(name), "blind": blind, "rows": cells})
    return columns


def describe(result: Results, number: int) -> dict[str, Any]:
    """What a system is: for the legend and for those who want to make it again."""
    system, training = result.metrics.get("system") or {}, result.metrics.get("training") or {}
    seen = {"rgb": "RGB", "depth": "depth", "blind": "no picture"}.get(system.get("modality"), "not recorded")
    if system.get("modality") == "depth":
        seen += f" ({system.get('depth_encoding')}, {system.get('depth_source')})"
    labels = training.get("labels")
    facts = {
        "Sees": seen,
        "Checkpoint": short_path(system.get("checkpoint") or ""),
        "SHA-256": system.get("sha256"),
        "Model": short_path(system.get("model_id") or ""),
        "Answers of other code": short_path(system.get("predictions") or ""),
        "Trained by": training.get("script"),
        "Started from": short_path(str((training.get("flags") or {}).get("load_checkpoint", ""))),
        "Commit": training.get("git_commit"),
        "Teacher": short_path(training.get("teacher") or ("none" if training else "")),
        "Labels read": None if labels is None else f"{100 * labels:g} %" if labels else "none",
        "Flags": flag_text({k: v for k, v in (training.get("flags") or {}).items() if k != "load_checkpoint"}),
        "Scored": " ".join(filter(None, (system.get("split"), result.metrics.get("date"), system.get("git_commit")))),
    }
    return {"name": result.name, "facts": {k: str(v) for k, v in facts.items() if v}} | line_style(number)


def training_charts(results: Sequence[Results]) -> list[dict[str, Any]]:
    """Validation score and training loss of every system whose results have them."""
    found = []
    for number, result in enumerate(results):
        curves = (result.metrics.get("training") or {}).get("curves") or {}
        charts = [_curve(name, points, number, result.name) for name, points in curves.items() if len(points) > 1]
        if charts:
            flags = result.metrics["training"].get("flags") or {}
            before = short_path(str(flags.get("load_checkpoint", "")))
            found.append({"name": result.name, "charts": charts, "before": before})
    return found


def _curve(name: str, points: Sequence[Sequence[float]], number: int, system: str) -> Chart:
    x, y = zip(*points, strict=True)
    y = [100 * value for value in y] if name == "val/exact_match" else list(y)
    title = {"val/exact_match": "Right on validation", "train/loss": "Training loss"}.get(name, name)
    y_range = (0, 100) if name == "val/exact_match" else (min(0, *y), max(y) or 1)
    ticks = [(x[0], f"{x[0]:g}"), (x[-1], f"{x[-1]:g} updates")]
    said = f"{title} of {system}: {y[0]:.3g} at update {x[0]:g}, {y[-1]:.3g} at update {x[-1]:g}."
    label = "%" if name == "val/exact_match" else ""
    return line_chart(
        [Series(number, x, y)], title=title, y_label=label, x_ticks=ticks, y_range=y_range, description=said
    )


def robustness_charts(record: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, Any]:
    """A chart per kind of degradation, with all systems; those that it does not touch are level lines.

    Args:
        record: content of robustness.json.
        names: of the systems of the page, which have the same colors here.
    """
    systems = record["systems"]
    everyone = list(dict.fromkeys([*names, *(system["name"] for system in systems)]))
    numbers = [everyone.index(system["name"]) for system in systems]
    column = next(iter(systems[0]["summary"]))
    level = 100 * record["blind"]["accuracy"][column]["value"]
    kinds = list(dict.fromkeys(rung["kind"] for system in systems for rung in system["rungs"][1:]))
    return {
        "column": short_type(column).lower(),
        "n_questions": record["questions"]["n_questions"],
        "n_images": record["questions"]["n_images"],
        "split": record["settings"]["split"],
        "blind": level,
        "systems": [{"name": s["name"]} | line_style(n) for n, s in zip(numbers, systems, strict=True)],
        "charts": [_ladder_chart(kind, dict(zip(numbers, systems, strict=True)), column, level) for kind in kinds],
        "summaries": [{"name": s["name"]} | s["summary"][column] for s in systems],
    }


def _ladder_chart(kind: str, systems: Mapping[int, Mapping[str, Any]], column: str, level: float) -> Chart:
    title, written = TITLES[kind]
    rungs = next(own for s in systems.values() if (own := [rung for rung in s["rungs"] if rung["kind"] == kind]))
    ticks = [(0.0, "clean"), *((n, written(rung["severity"])) for n, rung in enumerate(rungs, 1))]
    series, said = [], []
    for number, system in systems.items():
        clean, own = system["rungs"][0], [rung for rung in system["rungs"] if rung["kind"] == kind]
        cells = [rung["accuracy"][column] for rung in (clean, *(own or [clean] * len(rungs)))]
        values, low, high = ([_percent(cell[end]) for cell in cells] for end in ("value", "low", "high"))
        series.append(Series(number, range(len(ticks)), values, low, high))
        said.append(f"{system['name']}: {', '.join(f'{value:.0f}' for value in values)}.")
    described = f"{title} ({', '.join(text for _, text in ticks)}), right answers in %. {' '.join(said)}"
    if len(ticks) > 6:  # only every other one has room
        ticks = [(x, text if n % 2 == 0 else "") for n, (x, text) in enumerate(ticks)]
    return line_chart(
        series, title=title, y_label="%", x_ticks=ticks, y_range=(0, 100), level=level, description=described
    )


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def gallery(found: Compared, root: Path) -> dict[str, Any]:
    """Sampled questions with pictures and every system's answer."""
    rows = found.baseline.rows
    other = found.other or found.baseline
    changes = change_names(found.baseline, other)
    chosen = sample_gallery(rows, changes, N_QUESTIONS)
    eyes = next((s for r in (other, *found.results) if (s := _depth_settings(r)) is not None), None)
    pictures: dict[str, dict[str, Any]] = {}
    first = {rows[position]["Image_Path"]: rows[position] for position in reversed(chosen)}
    for image, shown in zip(first, show_pictures(root, list(first.values()), eyes), strict=True):
        pictures[image] = shown
    by_picture: dict[str, list[int]] = {}
    for position in chosen:
        by_picture.setdefault(rows[position]["Image_Path"], []).append(position)
    cards = [
        {"picture": pictures[image], "questions": [_asked(found, position, changes[position]) for position in own]}
        for image, own in by_picture.items()
    ]
    missing = [shown["missing"] for shown in pictures.values() if shown["missing"]]
    return {
        "cards": cards,
        "n": len(chosen),
        "encoding": eyes.depth_encoding if eyes else None,
        "missing": {"n": len(missing), "of": len(pictures), "first": missing[0]} if missing else None,
        "changes": [(name, text.format(other=other.name)) for name, text in CHANGES.values()] if found.other else [],
        "types": order_types({row["Question_Type"] for row in (rows[p] for p in chosen)}),
        "sensors": sorted({row.get("sensor") or "" for row in (rows[p] for p in chosen)} - {""}),
        "counts": Counter(changes),
    }


def _depth_settings(result: Results):
    settings = image_settings(result.metrics.get("system") or {})
    return settings if settings is not None and settings.modality == "depth" else None


def _asked(found: Compared, position: int, change: str) -> dict[str, Any]:
    row, answers = found.baseline.rows[position], []
    for result in found.results:
        own = result.rows[position]
        answers.append(
            {
                "name": result.name,
                "text": one_line(own["Model_Answer"], LONGEST),
                "right": exact_match(own["Model_Answer"], row["Answers"]),
                "probability": _two_digits(own.get("Probability")),
            }
        )
    return {
        "type": row["Question_Type"],
        "sensor": row.get("sensor") or "",
        "change": change,
        "question": one_line(row["Questions"], LONGEST),
        "gold": one_line(row["Answers"], LONGEST),
        "answers": answers,
    }


def _two_digits(probability: str | None) -> str:
    """A probability of predictions.csv; empty where there is none, or something else."""
    try:
        value = float(probability or "")
    except ValueError:
        return ""
    return f"{value:.2f}" if 0 <= value <= 1 else ""


def confusion(results: Sequence[Results]) -> list[dict[str, Any]]:
    """For each type of question and system: how often each right answer got which answer."""
    found = []
    for kind in order_types({row["Question_Type"] for row in results[0].rows}):
        tables = [
            {"name": r.name} | _confusion([row for row in r.rows if row["Question_Type"] == kind]) for r in results
        ]
        found.append({"type": kind, "tables": tables})
    return found


def _confusion(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    pairs: Counter[tuple[str, str]] = Counter()
    for row in rows:
        right, given = normalise_answer(row["Answers"]), normalise_answer(row["Model_Answer"])
        is_right = exact_match(row["Model_Answer"], row["Answers"])  # also where a list comes in another order
        pairs[right, right if is_right else given] += 1
    gold = Counter()
    for (right, _), n in pairs.items():
        gold[right] += n
    names = [name for name, _ in sorted(gold.items(), key=lambda item: (-item[1], item[0]))[:MOST_ANSWERS]]
    columns = [*names, OTHER]
    counts: Counter[tuple[str, str]] = Counter()
    for (right, given), n in pairs.items():
        if right in names:
            counts[right, given if given in names else OTHER] += n
    lines = [
        {
            "name": one_line(name, 40),
            "total": gold[name],
            "cells": [(counts[name, c], counts[name, c] / gold[name]) for c in columns],
        }
        for name in names
    ]
    return {
        "columns": [one_line(name, 40) for name in columns],
        "lines": lines,
        "left_out": sum(gold.values()) - sum(gold[n] for n in names),
    }
