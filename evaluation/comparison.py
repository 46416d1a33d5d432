"""Systems side by side: their results, paired differences, and the tables of both."""

import csv
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset.page import escaped_markdown
from dataset.questions.answers import exact_match, group_by, normalise_answer
from dataset.questions.manifest import cells_digest
from dataset.questions.rows import CAPTION_TYPE
from evaluation.described import check_described
from evaluation.intervals import paired_difference, permutation_test
from evaluation.metrics import evaluate_rows, recordings
from evaluation.predictions import check_cells, check_ids
from utils import UserError, printable, read_json, reason

REQUIRED_COLUMNS = ("Question_Id", "Questions", "Question_Type", "Answers", "Model_Answer", "Image_Path", "Depth_Path")
QUESTION_COLUMNS = ("Question_Id", "Questions", "Question_Type", "Answers")
OVERALL = "Overall"
DEPTH = "By depth"  # questions that depth can answer


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
    metrics = read_json(metrics_path)
    rows = [row for row in _read_predictions(predictions) if row["Question_Type"] != CAPTION_TYPE]
    if not rows:
        raise UserError(f"{predictions}: holds no questions")
    check_ids(rows, str(predictions))
    check_described(metrics, metrics_path)
    _check_digest(rows, metrics, predictions)
    name = (metrics.get("system") or {}).get("name") or folder.resolve().name
    return Results(printable(name), rows, metrics)


def _check_digest(rows: Sequence[Mapping[str, str]], metrics: Mapping[str, Any], path: Path) -> None:
    """Raise UserError where the questions are not those whose digest metrics.json has; older results have none."""
    digest = _questions_digest(metrics)
    if digest is not None and digest != cells_digest(rows):
        raise UserError(f"{path}: holds other questions than metrics.json names; it was changed, evaluate again")


def _questions_digest(metrics: Mapping[str, Any]) -> str | None:
    return (metrics.get("questions") or {}).get("sha256")


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
    check_cells(rows, str(path), "; evaluate the system again")
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
            f"compare: {count} results are named {name}; evaluate one of them again with another --name, which asks "
            "nothing again, or leave it out"
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
        digests = [_questions_digest(result.metrics) for result in (first, other)]
        if None not in digests and digests[0] != digests[1]:
            raise UserError(
                f"{other.name}: answered other questions than {first.name} (their SHA-256 is {digests[1]:.12}, there "
                f"{digests[0]:.12}); evaluate both on the same version of the questions"
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
    reference = by_name.get(results[0].name if baseline is None else baseline)
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
    try:
        blind = _blind_metrics(results)
        return table + [TableRow(f"blind: {name}", True, _accuracies(metrics)) for name, metrics in blind.items()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f'metrics.json: "blind" is not what an evaluation writes ({reason(error)})') from error


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
                shown = one_line(answer, 40)
                found.append(
                    f"{result.name} answers {shown!r} to {100 * count / len(rows):.0f} % of {printable(kind)}."
                )
    return found


def text_table(table: Sequence[TableRow]) -> str:
    """The comparison in aligned columns; the second line of a system holds its intervals."""
    lines: list[list[str]] = [_header(table)]
    for row in table:
        cells = [row.accuracies.get(column) for column in table_columns(table)]
        difference = row.difference
        values = [row.name, *(_percent(cell, "value") for cell in cells)]
        values += [f"{100 * difference[0]:+.1f}" if difference else "", _p_text(row.p_value)]
        ranges = ["", *(f"{_percent(cell, 'low')}-{_percent(cell, 'high')}" if cell else "" for cell in cells)]
        ranges += [f"{100 * difference[1]:+.1f} to {100 * difference[2]:+.1f}" if difference else "", ""]
        lines += [values, ranges]
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns of equal width, with a rule below the first row, the header."""
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
    lines = [header]
    for row in table:
        cells = [row.accuracies.get(column) for column in table_columns(table)]
        line = [row.name]
        line += [f"{_percent(c, 'value')} [{_percent(c, 'low')}, {_percent(c, 'high')}]" if c else "" for c in cells]
        difference = row.difference
        line.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * part for part in difference)) if difference else "")
        lines.append([*line, _p_text(row.p_value)])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table, the first one its header; nothing in a cell of words is markup."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    rows = [[escaped_markdown(cell) for cell in lines[0]], rule]
    rows += [[escaped_markdown(line[0]), *line[1:]] for line in lines[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def explanation(results: Sequence[Results], baseline: str | None = None) -> str:
    """What the numbers of the table mean, and which systems answer a question type with a constant."""
    rows = results[0].rows
    n_images, n_recordings = len({row["Image_Path"] for row in rows}), len(set(recordings(rows)))
    text = (
        f"Share of right answers in % (normalised exact match) to {len(rows)} questions about {n_images} images of "
        f"{n_recordings} recordings, with 95 % intervals that resample recordings. Difference: points above "
        f"{baseline or results[0].name} on the same questions; p: permutation test that exchanges the two systems' "
        "answers to whole recordings. By depth: questions that depth can answer. Blind baselines see no image. Depth "
        "shows no color: that column measures guessing from priors."
    )
    return "\n".join([*textwrap.wrap(text, 110), *(f"Note: {line}" for line in collapses(results))]) + "\n"


def table_columns(table: Sequence[TableRow]) -> list[str]:
    """Overall and the types, in the order of the table."""
    return list(table[0].accuracies)


def short_type(column: str) -> str:
    """A column's name as it stands in tables and plots."""
    return printable(column.removesuffix(" Identification"))


def _header(table: Sequence[TableRow]) -> list[str]:
    return ["System", *map(short_type, table_columns(table)), "Difference", "p"]


def _percent(cell: Mapping[str, float | None] | None, part: str) -> str:
    value = cell[part] if cell else None
    return "" if value is None else f"{100 * value:.1f}"


def _p_text(p_value: float | None) -> str:
    if p_value is None:
        return ""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def one_line(text: str, limit: int) -> str:
    """White space folded, control characters escaped, cut to `limit` characters."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"
