"""Prediction files of other code: a row per question, with its type, its gold answer and the system's answer."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils import UserError, reason

NEEDED = ("Questions", "Question_Type", "Answers", "Model_Answer")


def read_predictions(path: Path) -> list[dict[str, str]]:
    """The rows of a UTF-8 CSV file with the columns `NEEDED`, and others that `evaluate_rows` uses where they are.

    Rows get a Question_Id where the file has none. Without an Image_Path each question counts as a picture of its own.

    Raises:
        UserError: it cannot be read, a column or a cell is missing, there is no row, or a Question_Id occurs twice.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            missing = [column for column in NEEDED if column not in (reader.fieldnames or ())]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--predictions {path}: not a readable UTF-8 CSV file ({reason(error)})") from error
    if missing:
        raise UserError(f"--predictions {path}: column {', '.join(missing)} is missing; needed are {', '.join(NEEDED)}")
    if not rows:
        raise UserError(f"--predictions {path}: has no rows")
    check_cells(rows, f"--predictions {path}")
    for number, row in enumerate(rows, 1):
        if not row["Question_Type"].strip():
            raise UserError(f"--predictions {path}: row {number} has no Question_Type")
        row.setdefault("Question_Id", str(number))
        row.setdefault("Image_Path", row["Question_Id"])
    check_ids(rows, f"--predictions {path}")
    return rows


def check_cells(rows: Sequence[Mapping[str, str]], named: str, advice: str = "") -> None:
    """Raise UserError, which calls the file `named`, for a row of `csv.DictReader` with too many or too few cells."""
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise UserError(f"{named}: row {number} has more or fewer cells than the header{advice}")


def check_ids(rows: Sequence[Mapping[str, str]], named: str) -> None:
    """Raise UserError, which calls the file `named`, for a Question_Id that occurs twice."""
    question_id, count = Counter(row["Question_Id"] for row in rows).most_common(1)[0]
    if count > 1:
        raise UserError(f"{named}: Question_Id {question_id} occurs {count} times; ids must be unique")
