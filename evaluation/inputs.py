"""What an evaluation starts from, read and checked before a model is loaded: data, questions, checkpoint."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.miniature.world import ensure_world
from dataset.questions.daquar import match_frames, read_daquar
from dataset.questions.manifest import asked_questions
from dataset.questions.rows import (
    CAPTION_TYPE,
    QuestionRow,
    captions_file,
    csv_cells,
    questions_file,
    read_questions,
)
from distillation.run.checkpoints import read_checkpoint
from evaluation.hand_over import check_hand_over, robustness_of
from evaluation.system import checkpoint_of_flags, knows_miniature_only
from evaluation.wups import WordSimilarity, wordnet_similarity
from utils import ROOT, UserError, check_writable, data_root, outputs_root


@dataclass(frozen=True)
class Inputs:
    """What an evaluation starts from, read and checked."""

    path: Path | None  # the checkpoint; None = a stock model or an export
    checkpoint: dict[str, Any] | None
    root: Path
    rows: list[QuestionRow]
    train_rows: list[dict[str, str]]
    questions: dict[str, Any]  # see `asked_questions`
    robustness: dict[str, Any] | None
    similarity: WordSimilarity | None
    notes: dict[str, str]  # about the data, by what they are about


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Read and check all but the model.

    Raises:
        UserError: something is missing or damaged, or flags contradict it.
    """
    path, notes = checkpoint_of_flags(args), {}
    checkpoint = read_checkpoint(path) if path else None
    robustness = robustness_of(args.robustness, str(path or args.model_id))
    root = find_data(args, path, checkpoint)
    rows = load_questions(root, args, notes)
    return Inputs(
        path=path,
        checkpoint=checkpoint,
        root=root,
        rows=rows,
        train_rows=load_train_questions(root, args),
        questions=asked_questions(root, [row for row in rows if row.type != CAPTION_TYPE]),
        robustness=robustness,
        similarity=wordnet_similarity(notes) if args.dataset == "daquar" else None,
        notes=notes,
    )


def check_places(args: argparse.Namespace, path: Path | None) -> None:
    """Look at where results go, and what was scored; for one process, whose probes others would get in the way of.

    Args:
        args: flags of the evaluation script.
        path: the checkpoint that is scored; None = a model.

    Raises:
        UserError: one of them is not writable, or there would be nothing to hand over.
    """
    check_writable(args.output or outputs_root(ROOT / "evaluation") / "results", "--output")
    check_hand_over(args, path)


def find_data(args: argparse.Namespace, path: Path | None, checkpoint: dict[str, Any] | None) -> Path:
    """The folder with the data, rendered first where it is the built-in world.

    A checkpoint or export of the built-in world sets `args.miniature`.

    Raises:
        UserError: the data is not there, or DAQUAR is asked of a checkpoint of the built-in world.
    """
    args.miniature |= knows_miniature_only(args, checkpoint["hyper_parameters"] if checkpoint else {})
    if args.miniature and args.dataset == "daquar":
        raise UserError(
            f"--dataset daquar: {path or args.model_id} was trained on the built-in world, which is all it knows"
        )
    root = data_root(args.miniature)
    if args.miniature:
        ensure_world(root)
    return root


def load_questions(root: Path, args: argparse.Namespace, notes: dict[str, str]) -> list[QuestionRow]:
    """The questions to answer; how many of DAQUAR's have no picture is added to `notes`.

    Raises:
        UserError: a file is missing or malformed.
    """
    if args.dataset == "sunrgbd":
        rows = read_questions(questions_file(root, args.gts_type), root=root)
        rows += read_questions(captions_file(root, args.gts_type), root=root) if args.captions else []
        return rows
    asked = read_daquar(root, "test")
    rows, n_missing = match_frames(root, asked)
    if n_missing:
        left_out = len(asked) - len(rows)
        notes["frames"] = f"{n_missing} are not in {root}; {left_out} of {len(asked)} questions are left out"
    return rows


def load_train_questions(root: Path, args: argparse.Namespace) -> list[dict[str, str]]:
    """Training questions of the same data set, to fit the blind baselines on.

    Raises:
        UserError: the file is missing or malformed.
    """
    if args.dataset == "sunrgbd":
        return [csv_cells(row) for row in read_questions(questions_file(root, "train"))]
    columns = {"Questions": "question", "Answers": "answer", "Question_Type": "type"}
    return [
        {column: getattr(question, field) for column, field in columns.items()}
        for question in read_daquar(root, "train")
    ]
