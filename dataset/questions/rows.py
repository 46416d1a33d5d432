"""Questions and their files: one row per question, checked on reading; rows by image, subsets, withheld labels."""

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from dataset.sunrgbd.frames import Frame
from utils import UserError, atomic_path

GENERATOR_VERSION = 1
QUESTION_TYPES = (
    "Object Identification", "Color Identification", "Count", "Direction", "Proximity", "Yes/No",
)  # fmt: skip
CAPTION_TYPE = "Caption"  # type of descriptions, which have files of their own and are not scored as right or wrong


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one frame with its answer: one or two words, lower case, no article."""

    text: str
    answer: str
    type: str  # one of QUESTION_TYPES
    template: str  # the text without its nouns
    nouns: tuple[str, ...] = ()  # in the order of the text
    depth_answerable: bool = True  # False when only RGB shows the answer
    pair: str = ""  # equal for a question and its twin with the roles swapped
    # Pixel box x0, y0, x1, y1 of the object that the question is about; x1 and y1 are exclusive.
    target_box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """One line of a question file."""

    id: str
    question: str
    answer: str
    image_path: str  # relative to the data root, as depth_path
    depth_path: str
    type: str
    depth_answerable: bool = True
    sensor: str = ""
    scene: str = ""
    pair_id: str = ""  # empty unless the twin is in the file too
    target_box: tuple[int, int, int, int] | None = None


# Question file column -> field of QuestionRow; the first six are required and come in this order.
COLUMNS = {
    "Question_Id": "id", "Questions": "question", "Answers": "answer",
    "Image_Path": "image_path", "Depth_Path": "depth_path", "Question_Type": "type",
    "depth_answerable": "depth_answerable", "sensor": "sensor", "scene": "scene", "pair_id": "pair_id",
    "target_box": "target_box",
}  # fmt: skip
MOST_COLUMNS = 1000
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # but tab and line ends
REQUIRED_COLUMNS = tuple(COLUMNS)[:6]
# The control tokens of LLaVA-OneVision's tokenizer. In a question's text they would add an image or start another turn.
CONTROL_TOKENS = ("<image>", "<video>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")


def question_rows(frame: Frame, questions: Sequence[Question]) -> Iterator[QuestionRow]:
    """Questions about a frame as lines of a question file."""
    pairs = Counter(question.pair for question in questions)
    for question in questions:
        yield QuestionRow(
            id=_hash(frame.path, question.text),
            question=question.text,
            answer=question.answer,
            image_path=frame.image_path,
            depth_path=frame.depth_path,
            type=question.type,
            depth_answerable=question.depth_answerable,
            sensor=frame.sensor,
            scene=frame.scene,
            pair_id=_hash(frame.path, question.pair) if question.pair and pairs[question.pair] > 1 else "",
            target_box=question.target_box,
        )


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join((str(GENERATOR_VERSION), *parts)).encode()).hexdigest()[:16]


def questions_file(root: Path, split: str) -> Path:
    """`csv_data/{train,val,test}_dataset.csv` below the data root."""
    return root / "SUNRGBD" / "csv_data" / f"{split}_dataset.csv"


def captions_file(root: Path, split: str) -> Path:
    """`csv_data/{train,val,test}_captions.csv`: a description of each frame, for caption metrics only."""
    return root / "SUNRGBD" / "csv_data" / f"{split}_captions.csv"


def unanswered_file(root: Path) -> Path:
    """`csv_data/train_unanswered.csv`: questions about training images with empty Answers, for a teacher."""
    return root / "SUNRGBD" / "csv_data" / "train_unanswered.csv"


def write_questions(path: Path, rows: Sequence[QuestionRow]) -> None:
    """Write a question file, atomically."""
    with atomic_path(path) as part:
        part.write_text(question_text(rows), encoding="utf-8", newline="")


def question_text(rows: Iterable[QuestionRow]) -> str:
    """The content of a question file."""
    return cells_text(map(csv_cells, rows))


def cells_text(rows: Iterable[Mapping[str, str]]) -> str:
    """The content of a question file, from its cells by column name; other columns are left out."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([cells.get(column, "") for column in COLUMNS] for cells in rows)
    return text.getvalue()


def csv_cells(row: QuestionRow) -> dict[str, str]:
    """A row as the cells of a question file, by column name."""
    return {column: _cell(getattr(row, field)) for column, field in COLUMNS.items()}


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def read_questions(path: Path, *, root: Path | None = None, labelled: bool = True) -> list[QuestionRow]:
    """Read a question file; columns after the required six may be missing.

    Args:
        path: a CSV file as `write_questions` makes it; a byte order mark and CRLF line ends are accepted.
        root: the data root. If given, every picture of the file must exist below it, in the folders of one frame.
        labelled: True: every row must have an answer. False: no row may have one, as in `unanswered_file`.

    Raises:
        UserError: a required column or value is missing, an id occurs twice, a question or an answer contains a control
            token, a cell a control character, a row more cells than columns; a picture is missing, belongs to another
            frame, or its path leaves the data root; names file and line.
    """
    rows, lines = [], {}
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path}: question file cannot be read (it is no file)")
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            if len(reader.fieldnames or ()) > MOST_COLUMNS:
                raise UserError(f"{path}:1: has {len(reader.fieldnames):,} columns, {MOST_COLUMNS} at most are read")
            missing = [column for column in REQUIRED_COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path}:1: required column {', '.join(missing)} is missing")
            for cells in reader:
                row = _parse(cells, where=f"{path}:{reader.line_num}", labelled=labelled)
                if row.id in lines:
                    raise UserError(
                        f"{path}:{reader.line_num}: Question_Id {row.id} is already in line {lines[row.id]}"
                    )
                lines[row.id] = reader.line_num
                rows.append(row)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such question file; run python dataset/prepare_sunrgbd.py first") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: question file cannot be read ({error})") from error
    if not rows:
        raise UserError(f"{path}: the question file has no rows")
    if root is not None:
        _check_pictures(path, rows, lines, root)
    return rows


def _parse(cells: dict[str, str | None], *, where: str, labelled: bool) -> QuestionRow:
    if None in cells:
        raise UserError(f"{where}: has more cells than the first line has columns")
    for column, value in cells.items():
        if found := CONTROL.search(value or ""):
            raise UserError(f"{where}: {column} contains the control character {found[0]!r}; take it out")
    values = {field: (cells.get(column) or "").strip() for column, field in COLUMNS.items()}
    for column in REQUIRED_COLUMNS:
        if not values[COLUMNS[column]] and (labelled or column != "Answers"):
            raise UserError(f"{where}: {column} is empty")
    if values["answer"] and not labelled:
        raise UserError(f"{where}: Answers must be empty in a file of unlabelled questions, got {values['answer']!r}")
    for column in ("Questions", "Answers"):
        found = [token for token in CONTROL_TOKENS if token in values[COLUMNS[column]]]
        if found:
            raise UserError(f"{where}: {column} contains {found[0]}, a control token of the model; take it out")
    for column in ("Image_Path", "Depth_Path"):
        if not stays_inside(values[COLUMNS[column]]):
            raise UserError(
                f"{where}: {column} must be relative to ROOT_DATA_DIR and stay inside, got {cells[column]!r}"
            )
    answerable = values.pop("depth_answerable") or str(int(values["type"] != "Color Identification"))
    box = values.pop("target_box").split()
    if answerable not in ("0", "1"):
        raise UserError(f"{where}: depth_answerable must be 0 or 1, got {answerable!r}")
    if len(box) not in (0, 4) or not all(number.isdecimal() and len(number) < 10 for number in box):
        raise UserError(f"{where}: target_box must be four whole numbers, got {' '.join(box)!r}")
    return QuestionRow(**values, depth_answerable=answerable == "1", target_box=tuple(map(int, box)) or None)


def stays_inside(path: str) -> bool:
    """Whether a path of a stranger's file names a place below the data root.

    Links in the tree are followed wherever they lead: the tree is the user's own, who may keep a collection on another
    disk. An archive's links are refused when it is unpacked.
    """
    return not path.startswith("/") and ".." not in path.split("/") and not set(path) & set("\\:")


def _check_pictures(path: Path, rows: Sequence[QuestionRow], lines: dict[str, int], root: Path) -> None:
    seen = set()
    for row in rows:
        if (row.image_path, row.depth_path) in seen:
            continue
        image, depth = PurePosixPath(row.image_path), PurePosixPath(row.depth_path)
        # Pictures are read from these two folders, which hold one file each; a row must not name any other file.
        if image.parent.name != "image" or depth.parent != image.parent.with_name("depth"):
            raise UserError(
                f"{path}:{lines[row.id]}: Image_Path and Depth_Path must lie in image/ and depth/ of one frame, "
                f"got {image} and {depth}; hole-filled depth is chosen with --depth_source bfx"
            )
        seen.add((row.image_path, row.depth_path))
        for picture in (row.image_path, row.depth_path):
            if not (root / picture).is_file():
                raise UserError(f"{path}:{lines[row.id]}: {picture} does not exist below {root}")


def frame_path(row: QuestionRow) -> str:
    """The frame's folder: two levels above its picture."""
    return row.image_path.rsplit("/", 2)[0]


def group_by_image(rows: list[QuestionRow]) -> list[list[QuestionRow]]:
    """Rows of the same image together, images in order of first appearance."""
    groups: dict[str, list[QuestionRow]] = {}
    for row in rows:
        groups.setdefault(row.image_path, []).append(row)
    return list(groups.values())


def subset_of_images(rows: list[QuestionRow], share: float, *, seed: int) -> list[QuestionRow]:
    """The rows of a random `share` of the images. With the same seed, a larger share contains a smaller one.

    Raises:
        UserError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(
            f"--subset_percentage {share}: give a share above 0 and at most 1 (0.1 = a tenth of the images)"
        )
    images = group_by_image(rows)
    order = np.random.default_rng((seed, 1)).permutation(len(images))
    kept = sorted(order[: max(1, round(share * len(images)))])
    return [row for i in kept for row in images[i]]


def withhold_labels(rows: list[QuestionRow], share: float, *, seed: int) -> list[QuestionRow]:
    """All rows, of which a random `share` keeps its labels. With the same seed, a larger share contains a smaller one.

    Raises:
        UserError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(
            f"--label_fraction {share}: give a share above 0 and at most 1 (0.1 = a tenth of the questions)"
        )
    order = np.random.default_rng((seed, 2)).permutation(len(rows))
    kept = set(order[: max(1, round(share * len(rows)))].tolist())
    return [row if i in kept else replace(row, answer="") for i, row in enumerate(rows)]
