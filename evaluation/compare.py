"""Put evaluated systems side by side: accuracies with intervals, paired differences, a plot and a contact sheet.

Reads   results folders of the evaluation script (predictions.csv, metrics.json), all on the same questions
Writes  table.txt, table.md, accuracy.png, contact_sheet.png

    python evaluation/compare.py RESULTS_DIR [RESULTS_DIR ...] --output DIR [--baseline NAME]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, atomic_path, data_root, run_script  # first: loads .env before transformers reads it

# isort: split
import argparse
import csv
import json
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from dataset.depth import read_depth
from dataset.questions import CAPTION_TYPE
from dataset.sunrgbd import read_rgb
from evaluation.intervals import paired_difference, permutation_test
from evaluation.metrics import evaluate_rows, exact_match, group_by, normalise_answer, order_types, recordings

REQUIRED_COLUMNS = ("Question_Id", "Questions", "Question_Type", "Answers", "Model_Answer", "Image_Path", "Depth_Path")
QUESTION_COLUMNS = ("Question_Id", "Questions", "Question_Type", "Answers")
OVERALL = "Overall"
DEPTH = "By depth"  # questions that depth can answer

# Okabe and Ito's colours, which stay apart for colour-blind readers; the marker repeats the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BLIND_COLOUR = "#767676"
RIGHT_COLOUR, WRONG_COLOUR = "#00664B", "#B34700"  # the green and the vermilion, darkened to read well as text


@dataclass(frozen=True)
class Results:
    """One evaluated system: its name, its prediction rows without captions, and its metrics.json."""

    name: str
    rows: Sequence[Mapping[str, str]]
    metrics: Mapping[str, Any]

    def correct(self) -> list[bool]:
        """Whether each row is right, by normalised exact match."""
        return [exact_match(row["Model_Answer"], row["Answers"]) for row in self.rows]


@dataclass(frozen=True)
class TableRow:
    """One line of the comparison.

    Attributes:
        name: system or blind baseline.
        blind: whether it is a baseline that sees no image.
        accuracies: `Overall` and each question type -> `{"value", "low", "high"}`, shares.
        difference: accuracy minus the baseline system's with its 95 % interval, shares; None where it cannot be paired.
        p_value: permutation test over recordings against the baseline system.
    """

    name: str
    blind: bool
    accuracies: Mapping[str, Mapping[str, float | None]]
    difference: tuple[float, float, float] | None = None
    p_value: float | None = None


def load_results(folder: Path) -> Results:
    """Read one results folder.

    Raises:
        UserError: a file is missing or damaged, lacks a column, has no questions, or repeats a Question_Id.
    """
    predictions, metrics_path = folder / "predictions.csv", folder / "metrics.json"
    for path in (predictions, metrics_path):
        if not path.is_file():
            raise UserError(f"{path}: missing; {folder} is no results folder, or its evaluation did not finish")
    try:
        metrics = json.loads(metrics_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{metrics_path}: not valid JSON ({error}); evaluate the system again") from error
    rows = [row for row in _read_predictions(predictions) if row["Question_Type"] != CAPTION_TYPE]
    if not rows:
        raise UserError(f"{predictions}: holds no questions")
    question_id, count = Counter(row["Question_Id"] for row in rows).most_common(1)[0]
    if count > 1:
        raise UserError(f"{predictions}: Question_Id {question_id} occurs {count} times; ids must be unique")
    return Results(metrics.get("system", {}).get("name") or folder.resolve().name, rows, metrics)


def _read_predictions(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            missing = [column for column in REQUIRED_COLUMNS if column not in (reader.fieldnames or ())]
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a UTF-8 CSV file ({error}); evaluate the system again") from error
    if missing:
        raise UserError(f"{path}: column {', '.join(missing)} is missing; evaluate the system again")
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError(f"{path}: row {number} has more or fewer cells than the header; evaluate the system again")
    return rows


def align(results: Sequence[Results]) -> list[Results]:
    """Put every system's rows in the order of the first one's.

    Raises:
        UserError: no results, two systems of the same name, or systems that answered different questions.
    """
    if not results:
        raise UserError("compare: no results folder given")
    name, count = Counter(result.name for result in results).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"compare: {count} results are named {name}; give them different names, or leave all but one out"
        )
    first = results[0]
    aligned = [first]
    for other in results[1:]:
        by_id = {row["Question_Id"]: row for row in other.rows}
        only_first = [row["Question_Id"] for row in first.rows if row["Question_Id"] not in by_id]
        if only_first or len(by_id) != len(first.rows):
            raise UserError(
                f"{other.name}: answers {len(by_id)} questions and {first.name} {len(first.rows)}, of which "
                f"{len(first.rows) - len(only_first)} are the same; evaluate both on the same split"
            )
        rows = [by_id[row["Question_Id"]] for row in first.rows]
        for ours, theirs in zip(first.rows, rows, strict=True):
            differing = [column for column in QUESTION_COLUMNS if ours[column] != theirs[column]]
            if differing:
                column = differing[0]
                raise UserError(
                    f"{other.name}: question {ours['Question_Id']} has {column} {theirs[column]!r}, in {first.name} "
                    f"{ours[column]!r}; evaluate both on the same version of the questions"
                )
        aligned.append(replace(other, rows=rows))
    return aligned


def comparison_table(results: Sequence[Results], baseline: str | None = None) -> list[TableRow]:
    """Accuracies of every system and blind baseline, and each system's paired difference from `baseline`.

    Args:
        results: systems that answered the same questions.
        baseline: name of the system that the others are compared with; the first one without it.

    Raises:
        UserError: as `align`; or no system is named `baseline`; or the systems' blind baselines disagree.
    """
    results = align(results)
    by_name = {result.name: result for result in results}
    reference = by_name.get(baseline or results[0].name)
    if reference is None:
        raise UserError(f"--baseline {baseline}: no such system; there are {', '.join(by_name)}")
    clusters = recordings(reference.rows)
    expected = reference.correct()
    table = []
    for result in results:
        row = TableRow(result.name, False, _accuracies(evaluate_rows(result.rows)))
        if result is not reference:
            correct = result.correct()
            difference = paired_difference(correct, expected, clusters)
            row = replace(row, difference=difference, p_value=permutation_test(correct, expected, clusters))
        table.append(row)
    blind = _blind_metrics(results)
    return table + [TableRow(f"blind: {name}", True, _accuracies(metrics)) for name, metrics in blind.items()]


def _accuracies(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, float | None]]:
    cells = {OVERALL: metrics["overall"]}
    if "depth_answerable" in metrics and metrics["depth_answerable"] != metrics["overall"]:
        cells[DEPTH] = metrics["depth_answerable"]
    cells |= metrics["per_type"]
    return {name: cell["exact_match"] for name, cell in cells.items()}


def _blind_metrics(results: Sequence[Results]) -> Mapping[str, Any]:
    """The blind baselines that the evaluation stored; they depend on the questions only, so all systems must agree."""
    stored = [result for result in results if result.metrics.get("blind")]
    for other in stored[1:]:
        first, second = ({k: _accuracies(m) for k, m in r.metrics["blind"].items()} for r in (stored[0], other))
        if first != second:
            raise UserError(
                f"{other.name}: its blind baselines differ from those of {stored[0].name}, so they were fitted on "
                "other training questions; evaluate both again with the same csv_data"
            )
    return stored[0].metrics["blind"] if stored else {}


def collapses(results: Sequence[Results], *, share: float = 0.9, excess: float = 0.2) -> list[str]:
    """Say which systems answer a question type with (almost) one constant, although the right answers vary."""
    found = []
    for result in results:
        for kind, rows in group_by(result.rows, "Question_Type").items():
            answers, gold = (Counter(normalise_answer(row[c]) for row in rows) for c in ("Model_Answer", "Answers"))
            answer, count = answers.most_common(1)[0]
            if count / len(rows) >= share and count / len(rows) - max(gold.values()) / len(rows) >= excess:
                shown = _one_line(answer, 40)
                found.append(f"{result.name} answers {shown!r} to {100 * count / len(rows):.0f} % of {kind}.")
    return found


def text_table(table: Sequence[TableRow]) -> str:
    """The comparison in aligned columns; the second line of a system holds its intervals."""
    lines: list[list[str]] = [_header(table)]
    for row in table:
        cells = [row.accuracies.get(column) for column in _columns(table)]
        difference = row.difference
        values = [row.name, *(_percent(cell, "value") for cell in cells)]
        values += [f"{100 * difference[0]:+.1f}" if difference else "", _p_text(row.p_value)]
        ranges = ["", *(f"{_percent(cell, 'low')}-{_percent(cell, 'high')}" if cell else "" for cell in cells)]
        ranges += [f"{100 * difference[1]:+.1f} to {100 * difference[2]:+.1f}" if difference else "", ""]
        lines += [values, ranges]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    padded.insert(1, "-" * len(padded[0]))
    return "\n".join(line.rstrip() for line in padded) + "\n"


def markdown_table(table: Sequence[TableRow]) -> str:
    """The comparison as a Markdown table."""
    header = _header(table)
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in table:
        cells = [row.accuracies.get(column) for column in _columns(table)]
        line = [row.name.replace("|", "\\|")]
        line += [f"{_percent(c, 'value')} [{_percent(c, 'low')}, {_percent(c, 'high')}]" if c else "" for c in cells]
        difference = row.difference
        line.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * part for part in difference)) if difference else "")
        lines.append([*line, _p_text(row.p_value)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def explanation(results: Sequence[Results], baseline: str | None = None) -> str:
    """What the numbers of the table are, and what to be wary of."""
    rows = results[0].rows
    text = (
        f"Share of right answers in % (normalised exact match) to {len(rows)} questions about "
        f"{len({row['Image_Path'] for row in rows})} images of {len(set(recordings(rows)))} recordings, with 95 % intervals that "
        f"resample recordings. Difference: points above {baseline or results[0].name} on the same questions; p: permutation test "
        "that exchanges the two systems' answers to whole recordings. "
        "By depth: questions that depth can answer. Blind baselines see no image. Depth shows no color: that column measures "
        "guessing from priors."
    )
    return "\n".join([*textwrap.wrap(text, 110), *(f"Note: {line}" for line in collapses(results))]) + "\n"


def _columns(table: Sequence[TableRow]) -> list[str]:
    return list(table[0].accuracies)


def _short(column: str) -> str:
    return column.removesuffix(" Identification")


def _header(table: Sequence[TableRow]) -> list[str]:
    return ["System", *map(_short, _columns(table)), "Difference", "p"]


def _percent(cell: Mapping[str, float | None] | None, part: str) -> str:
    value = cell[part] if cell else None
    return "" if value is None else f"{100 * value:.1f}"


def _p_text(p_value: float | None) -> str:
    if p_value is None:
        return ""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def draw_accuracies(table: Sequence[TableRow], path: Path, *, title: str) -> None:
    """Plot one dot with its interval per system and question type, as a PNG; blind baselines are grey and hollow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = _columns(table)
    figure = Figure(figsize=(max(9.0, 1.1 + len(columns) * max(1.2, 0.16 * len(table))), 5.2), layout="constrained")
    axes = figure.add_subplot()
    seen = {False: 0, True: 0}
    for place, row in enumerate(table):
        style = MARKERS[seen[row.blind] % len(MARKERS)]
        colour = BLIND_COLOUR if row.blind else COLOURS[seen[row.blind] % len(COLOURS)]
        seen[row.blind] += 1
        points = [(x, row.accuracies[column]) for x, column in enumerate(columns) if column in row.accuracies]
        offset = (place - (len(table) - 1) / 2) * 0.8 / len(table)
        values = np.array([cell["value"] for _, cell in points])
        ends = np.array([[_or(cell["low"], cell["value"]), _or(cell["high"], cell["value"])] for _, cell in points])
        axes.errorbar(
            [x + offset for x, _ in points],
            100 * values,
            yerr=100 * np.abs(ends.T - values),
            fmt=style,
            color=colour,
            markerfacecolor="white" if row.blind else colour,
            markersize=5.5,
            elinewidth=1.3,
            capsize=2,
            label=row.name.replace("$", r"\$"),
        )
    for x in range(0, len(columns), 2):
        axes.axvspan(x - 0.5, x + 0.5, color="#F2F2F2", zorder=0)
    axes.set_xticks(range(len(columns)), [_short(column) for column in columns])
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-2, 102), xlabel="Question type", ylabel="Right answers (%)")
    axes.set_title(title)
    axes.grid(axis="y", color="#D9D9D9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(4, len(table)), frameon=False)
    _save(FigureCanvasAgg(figure), path)


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _save(canvas: Any, path: Path) -> None:
    with atomic_path(path) as part:
        canvas.figure.savefig(part, format="png", dpi=150)


def sample_questions(results: Sequence[Results], n: int, *, seed: int = 0) -> list[int]:
    """Positions of up to `n` questions about different images, of all types, right and wrong ones in turn.

    A question counts as right when at least half of the systems answer it correctly. The same results
    give the same questions.
    """
    rows = results[0].rows
    mostly_right = np.mean([result.correct() for result in results], axis=0) >= 0.5
    groups: dict[tuple[bool, str], list[int]] = defaultdict(list)
    for place in np.random.default_rng(seed).permutation(len(rows)):
        groups[bool(mostly_right[place]), rows[place]["Question_Type"]].append(int(place))
    types = order_types({kind for _, kind in groups})
    # A right one of the first type, a wrong one of the second, and so on; then the other way round; then again.
    turns = [((number % 2 == 0) == first, kind) for first in (True, False) for number, kind in enumerate(types)]
    queues = [iter(groups[turn]) for turn in turns]
    chosen: dict[str, int] = {}
    before = -1
    while before < len(chosen) < n:
        before = len(chosen)
        for queue in queues:
            place = next((place for place in queue if rows[place]["Image_Path"] not in chosen), None)
            if place is not None and len(chosen) < n:
                chosen[rows[place]["Image_Path"]] = place
    return list(chosen.values())


def draw_contact_sheet(results: Sequence[Results], path: Path, root: Path, *, n_frames: int = 8) -> None:
    """Draw sampled frames as a PNG: the RGB image, its depth, the question, and every system's answer, right or wrong.

    Args:
        results: aligned systems.
        path: PNG to write.
        root: folder that Image_Path and Depth_Path are relative to.
        n_frames: most frames to show.

    Raises:
        UserError: an image is missing or damaged, or its path leaves `root`.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = sample_questions(results, n_frames)
    frames = [_read_frame(root, results[0].rows[place]) for place in places]
    farthest_m = math.ceil(max(np.quantile(depth_m[depth_m > 0], 0.99) for _, depth_m in frames))
    row_height = max(2.0, 0.75 + 0.24 * (len(results) + 1))  # inches: the question's lines and one line per answer
    figure = Figure(figsize=(13, row_height * len(places) + 1.0), layout="constrained")
    axes = figure.subplots(len(places), 3, squeeze=False, width_ratios=(1, 1, 2))
    colours = colormaps["viridis"].with_extremes(bad="#B0B0B0")
    for (left, middle, right), place, (rgb, depth_m) in zip(axes, places, frames, strict=True):
        left.imshow(rgb)
        shown = middle.imshow(
            np.ma.masked_equal(depth_m, 0), cmap=colours, vmin=0, vmax=farthest_m, interpolation="nearest"
        )
        for axis in (left, middle, right):
            axis.set_axis_off()
        _write_answers(right, results, place, line_height=0.22 / row_height)
    axes[0, 0].set_title("RGB")
    axes[0, 1].set_title("Depth (grey: no measurement)")
    axes[0, 2].set_title("Question, right answer, and answers", loc="left")
    figure.colorbar(shown, ax=axes[-1, 1], location="bottom", label="Distance (m)", fraction=0.06, pad=0.04)
    _save(FigureCanvasAgg(figure), path)


def _read_frame(root: Path, row: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """RGB thumbnail (h, w, 3) uint8 and depth (H, W) in metres."""
    image_path, depth_path = (_inside(root, row[column]) for column in ("Image_Path", "Depth_Path"))
    rgb = Image.fromarray(read_rgb(image_path))
    rgb.thumbnail((640, 640))
    return np.asarray(rgb), read_depth(depth_path)


def _inside(root: Path, relative: str) -> Path:
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()):
        raise UserError(f"predictions.csv: path {relative} leaves the data folder {root}; refusing to read it")
    return path


def _write_answers(axis: Any, results: Sequence[Results], place: int, *, line_height: float) -> None:
    row = results[0].rows[place]
    lines = [(line, "black", "bold") for line in textwrap.wrap(_one_line(row["Questions"], 160), 68)]
    lines.append((f"{row['Question_Type']}. Right answer: {_one_line(row['Answers'], 40)}", "black", "normal"))
    for result in results:
        answer = result.rows[place]["Model_Answer"]
        right = exact_match(answer, row["Answers"])
        text = f"{'✓' if right else '✗'} {result.name}: {_one_line(answer, 60) or '(empty)'}"
        lines.append((text, RIGHT_COLOUR if right else WRONG_COLOUR, "normal"))
    for number, (text, colour, weight) in enumerate(lines):
        height = 0.98 - number * line_height
        axis.text(0, height, text, color=colour, weight=weight, va="top", transform=axis.transAxes, parse_math=False)


def _one_line(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def write_report(results: Sequence[Results], output: Path, root: Path, *, baseline: str | None = None) -> str:
    """Write table.txt, table.md, accuracy.png and contact_sheet.png into `output`.

    Args:
        results: systems that answered the same questions.
        output: folder to write into; made when missing.
        root: folder that the image paths are relative to.
        baseline: as in `comparison_table`.

    Returns:
        The content of table.txt.

    Raises:
        UserError: as `comparison_table` and `draw_contact_sheet`.
    """
    results = align(results)
    table = comparison_table(results, baseline)
    notes = explanation(results, baseline)
    text = f"{text_table(table)}\n{notes}"
    for name, content in (("table.txt", text), ("table.md", f"{markdown_table(table)}\n{notes}")):
        with atomic_path(output / name) as part:
            part.write_text(content, encoding="utf-8")
    n_images = len({row["Image_Path"] for row in results[0].rows})
    title = f"Accuracy on {len(results[0].rows)} questions about {n_images} images, with 95 % intervals"
    draw_accuracies(table, output / "accuracy.png", title=title)
    draw_contact_sheet(results, output / "contact_sheet.png", root)
    return text


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS_DIR", help="folders of the evaluation script")
    parser.add_argument("--output", type=Path, required=True, help="folder for tables and pictures")
    parser.add_argument("--baseline", help="name of the system to compare with; default: the first one")
    parser.add_argument(
        "--data_root", type=Path, help="folder that image paths are relative to; default: ROOT_DATA_DIR"
    )
    parser.add_argument("--miniature", action="store_true", help="the images are those of the built-in world")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Compare the folders, print the table and say where the files are."""
    results = [load_results(folder) for folder in args.results]
    root = args.data_root or data_root(args.miniature)
    print(write_report(results, args.output, root, baseline=args.baseline))
    print(f"written: {args.output}/ table.txt, table.md, accuracy.png, contact_sheet.png")


if __name__ == "__main__":
    run_script(main, parse_args)
