"""DAQUAR: questions that people wrote about NYUv2 pictures, an external test of what was learned on SUN RGB-D.

The files are `ROOT_DATA_DIR/DAQUAR/qa.894.raw.{train,test}.txt`: a line with a question, then a line with its answers,
joined by ", ". The picture is named at the end of the question ("what is on the desk in the image3 ?"); imageN is the
NYUv2 frame that is `SUNRGBD/kv1/NYUdata/NYU000N` in SUN RGB-D. DAQUAR's training questions are about 794 of the 1449
frames, all in the training half of SUN RGB-D's official split; its test questions are about 653 others, all in the test
half. A model that was trained on SUN RGB-D's training half has therefore not seen DAQUAR's test pictures.

Source: Malinowski and Fritz, A Multi-World Approach to Question Answering about Real-World Scenes based on Uncertain
Input, NIPS 2014, https://arxiv.org/abs/1410.0210.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.questions.rows import CONTROL_TOKENS, QuestionRow
from dataset.sunrgbd.frames import Frame, official_split, read_frame
from utils import UserError

SPLITS = ("train", "test")
LAST_IMAGE = 1449
PAGE = (
    "https://www.mpi-inf.mpg.de/departments/computer-vision-and-machine-learning/research/vision-and-language/"
    "visual-turing-challenge/"
)
_QUESTION = re.compile(r"(?P<text>.*\S)\s*image\s?(?P<number>\d{1,9})\s*\?")
# The "in the" before "imageN" at the end of a question. It stays where the question needs it: "what object is in the".
_TAIL = re.compile(r"(?<!\bis)(?<!\bare)(?<!\bthe)(?<!\bin)\s+in( the| this)?$")
_COUNT = re.compile(r"how (many|any|man|manu)\b")  # with the file's typing errors
_COLOR_NAMES = "black blue brown gray green maroon orange pink purple red saffron sandal silver white yellow".split()
# "the color of the bed" asks for a color; "the blue color object" and "red in color" only point at something.
_COLOR = re.compile(
    rf"(?<!\bin )({''.join(rf'(?<!{name} )' for name in _COLOR_NAMES)})\bcolou?rs?\b(?! (object|thing))"
)
_NEEDS_COLOR = re.compile(r"\bcolou?r")


@dataclass(frozen=True, slots=True)
class DaquarQuestion:
    """A question and its answers as in DAQUAR's file, but without the number of the picture in the text."""

    id: str  # daquar_test_17: the 17th question of the test file
    question: str
    answer: str  # one or several things, joined by ", "; words of one thing by "_"
    type: str  # Count, Color Identification, or Object Identification for everything else
    depth_answerable: bool  # False for questions with the word color; one that only names a color ("the red cup") stays
    image: int  # 1 to LAST_IMAGE

    @property
    def frame_path(self) -> str:
        """Folder of the picture, relative to ROOT_DATA_DIR."""
        return f"SUNRGBD/kv1/NYUdata/NYU{self.image:04d}"


def read_daquar(root: Path, split: str) -> list[DaquarQuestion]:
    """The questions of DAQUAR's `train` or `test` split in the order of its file; no picture is opened.

    Args:
        root: the data root, with the folder DAQUAR in it.
        split: one of SPLITS.

    Raises:
        UserError: the file is missing or unreadable, a line is malformed, or a picture's number is impossible; names
            file and line.
    """
    path = root / "DAQUAR" / f"qa.894.raw.{split}.txt"
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: missing; download DAQUAR (Malinowski and Fritz, NIPS 2014) from its page at MPI Informatics, "
            f"{PAGE}, and put qa.894.raw.train.txt and qa.894.raw.test.txt into {path.parent}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); download it again") from error
    if not lines:
        raise UserError(f"{path}: holds no questions; download it again")
    if len(lines) % 2:
        raise UserError(
            f"{path}:{len(lines)}: a question without an answer; lines must alternate, download the file again"
        )
    return [
        _parse(lines[i], lines[i + 1], number=i // 2 + 1, split=split, where=f"{path}:{i + 1}")
        for i in range(0, len(lines), 2)
    ]


def _parse(question: str, answer: str, *, number: int, split: str, where: str) -> DaquarQuestion:
    match = _QUESTION.fullmatch(question.strip())
    if match is None:
        raise UserError(f'{where}: a question must end with "... in the imageN ?", got {question!r}')
    if not 1 <= int(match["number"]) <= LAST_IMAGE:
        raise UserError(f"{where}: there is no image{match['number']}; NYUv2 has image1 to image{LAST_IMAGE}")
    things = [thing.strip() for thing in answer.split(",")]
    if not all(things):
        raise UserError(f"{where}: its answer in the next line is empty or has an empty part, got {answer!r}")
    if found := [token for token in CONTROL_TOKENS if token in question + answer]:
        raise UserError(f"{where}: contains {found[0]}, a control token of the model; take it out")
    return DaquarQuestion(
        id=f"daquar_{split}_{number}",
        question=_without_number(match["text"]),
        answer=", ".join(things),
        type=_question_type(question),
        depth_answerable=not _NEEDS_COLOR.search(question),
        image=int(match["number"]),
    )


def _without_number(text: str) -> str:
    """A question up to its last "imageN" -> a question without "in the imageN", or with "image" where it is needed."""
    shortened = _TAIL.sub("", text)
    kept = shortened if shortened != text else f"{text} image"
    kept = re.sub(r"\b(in|of|on) image\b", r"\1 the image", re.sub(r"image\s?\d+", "image", kept))
    return f"{kept[0].upper()}{kept[1:]}?"


def _question_type(question: str) -> str:
    if _COUNT.match(question):
        return "Count"
    return "Color Identification" if _COLOR.search(question) else "Object Identification"


def match_frames(root: Path, questions: Sequence[DaquarQuestion]) -> tuple[list[QuestionRow], int]:
    """Find the pictures of DAQUAR's test questions in the tree.

    Args:
        root: the data root.
        questions: of DAQUAR's test split.

    Returns:
        Rows in the order of the questions, without those about missing frames, and the number of missing frames.

    Raises:
        UserError: all frames are missing, one is damaged, or the official split has one for training or validation.
    """
    paths = sorted({question.frame_path for question in questions})
    frames = {path: read_frame(root, path) for path in paths if (root / path).is_dir()}
    if not frames:
        raise UserError(
            f"{root / paths[0]}: missing, as are all {len(paths)} NYUv2 frames that DAQUAR asks about; "
            "unpack SUNRGBD.zip whole"
        )
    split = official_split(root, list(frames.values()))
    if leaked := [path for path in frames if split.get(path, "test") != "test"]:
        raise UserError(
            f"{leaked[0]}: allsplit.mat puts this frame of DAQUAR's test questions into {split[leaked[0]]} "
            f"({len(leaked)} such frames); what was trained on it cannot be tested on it: "
            "restore the official SUNRGBDtoolbox"
        )

    rows = [_row(question, frames[question.frame_path]) for question in questions if question.frame_path in frames]
    return rows, len(paths) - len(frames)


def _row(question: DaquarQuestion, frame: Frame) -> QuestionRow:
    return QuestionRow(
        id=question.id,
        question=question.question,
        answer=question.answer,
        image_path=frame.image_path,
        depth_path=frame.depth_path,
        type=question.type,
        depth_answerable=question.depth_answerable,
        sensor=frame.sensor,
        scene=frame.scene,
    )
