"""The answers of an evaluation as they come, so that a killed one goes on where it was.

`answers.jsonl` in the results folder: its first line says what answers (`asked_of`), every other one is an answer. A
folder with the answers of something else is refused. Everything else in the folder is computed from the answers. Of
several processes each has a file, `answers.1.jsonl` the second one; in the end the first one takes them over.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from dataset.inputs.pictures import ImageSettings, picture_key
from dataset.inputs.processor import ImageTextProcessor
from dataset.questions.rows import QuestionRow, csv_cells
from distillation.run.data import check_disk, weights_digest
from distillation.run.machine import resolve_precision
from evaluation.ranks import ALONE, Ranks
from utils import ROOT, UserError, announced, atomic_path, disk_errors, source_digest

NAME, OF_OTHERS = "answers.jsonl", "answers.*.jsonl"
RESULTS = ("predictions.csv", "metrics.json")
BYTES_PER_TOKEN = 8  # more than an answer's token takes in a file
SHOWN = 12  # characters of a long value in a message


def asked_of(
    model: torch.nn.Module,
    processor: ImageTextProcessor,
    rows: Sequence[QuestionRow],
    images: ImageSettings,
    args: argparse.Namespace,
    *,
    root: Path,
    split: str,
) -> dict[str, str]:
    """All that decides the answers, as text: weights, what is seen, questions, settings, code.

    The number of images in a batch does not: neither neighbours nor padding change an answer.
    """
    with announced("digesting the weights", after_s=3):
        weights = weights_digest(model)
    code = [source_digest(ROOT / "distillation", subfolders=False), _digest(ROOT / "evaluation" / "system.py")]
    versions = [torch.__version__, transformers.__version__]
    seen = picture_key(processor, images) | {"code": code, "versions": versions}
    return {
        "weights": weights,
        "split": split,
        "questions": questions_digest(root, rows),
        **{name: str(value) for name, value in dataclasses.asdict(images).items()},
        "max_new_tokens": str(args.max_new_tokens),
        "precision": resolve_precision(args.precision),
        "device": next(model.parameters()).device.type,
        "code and libraries": hashlib.sha256(json.dumps(seen, sort_keys=True, default=str).encode()).hexdigest(),
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def questions_digest(root: Path, rows: Sequence[QuestionRow]) -> str:
    """Digest of questions and pictures, of these the names and sizes: their contents would be hours to read."""
    digest = hashlib.sha256()
    for row in rows:
        sizes = [(root / path).stat().st_size for path in (row.image_path, row.depth_path) if (root / path).is_file()]
        digest.update(json.dumps([row.id, row.question, row.image_path, row.depth_path, sizes]).encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True)
class Answer:
    """An answer to a question."""

    text: str
    probability: float  # of exactly these tokens, the end of the turn included


class AnswerLog:
    """The answers of one evaluation, by question id: those that its file held already and those that are added."""

    def __init__(
        self, folder: Path, asked: Mapping[str, str], rows: Sequence[QuestionRow], ranks: Ranks = ALONE
    ) -> None:
        """Open the file of answers or begin it.

        Args:
            folder: of the results.
            asked: see `asked_of`.
            rows: the questions.
            ranks: which process this is. Further ones make their log after the first one.

        Raises:
            UserError: the folder has results of something else, or the disk is full or not writable.
        """
        self.path, self.asked, self.ids, self.ranks = folder / NAME, dict(asked), {row.id for row in rows}, ranks
        self.answers: dict[str, Answer] = {}
        if not ranks.is_first:
            self.answers = self._read(self.path)
            self.path = folder / OF_OTHERS.replace("*", str(ranks.rank))
            self._begin()
            return
        if _has_answers(self.path):
            self.answers = self._read(self.path)
        else:
            refuse_unlogged(folder)
            self._begin()
        self.take_over_others()
        if self.answers:
            print(f"{self.path}: {len(self.answers)} of {len(self.ids)} questions are answered; ", end="")
            print("going on with the others" if len(self.answers) < len(self.ids) else "they are scored again")

    def _begin(self) -> None:
        with atomic_path(self.path) as part:
            part.write_text(_line({"asked": self.asked}), encoding="utf-8")

    def take_over_others(self) -> dict[str, Answer]:
        """Add what other processes have answered, also those of a start that was killed, and remove their files.

        Returns:
            Their answers.
        """
        taken: dict[str, Answer] = {}
        for path in sorted(self.path.parent.glob(OF_OTHERS)):
            found = self._read(path) if _has_answers(path) else {}
            self.add(found)
            path.unlink()
            taken |= found
        return taken

    def _read(self, path: Path) -> dict[str, Answer]:
        answers: dict[str, Answer] = {}
        with disk_errors(path), open(path, "rb+") as handle:
            self._check_header(path, handle.readline())
            good = handle.tell()
            for line in handle:
                found = _answer(line)
                if found is None:
                    break
                if found[0] not in self.ids or found[0] in answers:
                    raise UserError(
                        f"{path}: question {found[0]!r:.40} is not asked, or twice; give another --output, or delete it"
                    )
                answers[found[0]] = found[1]
                good += len(line)
            handle.truncate(good)  # a line that a kill cut off, and what may follow it
        return answers

    def _check_header(self, path: Path, line: bytes) -> None:
        try:
            before = json.loads(line)["asked"]
            differs = next((k for k in self.asked | before if self.asked.get(k) != before.get(k)), None)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path}: is not a file of answers; give another --output, or delete it") from None
        if differs:
            theirs, own = (f"{values.get(differs, 'none')!s:.{SHOWN}}" for values in (before, self.asked))
            raise UserError(
                f"{path}: holds answers of another evaluation, {differs} was {theirs!r} and is {own!r} now; give "
                "another --output, or delete it"
            )

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Append answers, those that are there already left out.

        Raises:
            UserError: the disk is full; all answers before are kept.
        """
        new = {name: answer for name, answer in answers.items() if name not in self.answers}
        lines = (_line({"id": name, "answer": a.text, "probability": a.probability}) for name, a in new.items())
        data = "".join(lines).encode()
        with disk_errors(self.path, size=len(data)), open(self.path, "ab", buffering=0) as handle:
            while data:
                data = data[handle.write(data) :]
        self.answers |= new


def refuse_unlogged(folder: Path) -> None:
    """Raise UserError where a folder has results and no answers that they were computed from."""
    for name in RESULTS:
        if (folder / name).exists():
            raise UserError(
                f"{folder / name}: is of an evaluation that kept no {NAME}; give another --output, or delete it"
            )


def _has_answers(path: Path) -> bool:
    """Whether there is an answer to keep; the first line says what is asked."""
    return path.exists() and path.read_bytes().count(b"\n") > 1


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _answer(line: bytes) -> tuple[str, Answer] | None:
    """Question id and answer of a whole line."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
        name, text, probability = value["id"], value["answer"], value["probability"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    sound = isinstance(name, str) and isinstance(text, str) and isinstance(probability, float)
    return (name, Answer(text, probability)) if sound and 0 <= probability <= 1 else None


def check_results_room(folder: Path, rows: Sequence[QuestionRow], max_new_tokens: int) -> None:
    """Raise UserError when the disk has no room for answers and predictions."""
    cells = sum(len(str(value)) for row in rows for value in csv_cells(row).values())
    check_disk("results", folder, 2 * (cells + len(rows) * BYTES_PER_TOKEN * max_new_tokens), 1)


def remove_results(folder: Path) -> None:
    """Remove what an evaluation has written, so that another one may write there."""
    for path in (*(folder / name for name in (*RESULTS, NAME)), *folder.glob(OF_OTHERS)):
        path.unlink(missing_ok=True)
