"""All question files of a data root, and what `questions.json` and `manifest.json` say about them."""

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.questions.balance import ANSWER_SHARE, select_questions, select_unlabelled
from dataset.questions.captions import frame_caption
from dataset.questions.generate import MARGINS, frame_candidates
from dataset.questions.manifest import describe_files, manifest_path
from dataset.questions.rows import (
    GENERATOR_VERSION,
    Question,
    QuestionRow,
    captions_file,
    question_rows,
    questions_file,
    unanswered_file,
    write_questions,
)
from dataset.sunrgbd.annotations import Coverage, frame_nouns, frame_objects
from dataset.sunrgbd.frames import Frame, ListedSplit, find_frames, listed_split, missing_frames, read_rgb
from utils import UserError, progress, write_json

SPLITS = ("train", "val", "test")
UNLABELLED = "train_unanswered"  # further questions about training frames, without labels; named like their file
UNKNOWN_LISTED, UNKNOWN_PRINTED = 100, 10  # most frequent names that are not in the noun table
VOCABULARY_FRAMES = 1000  # frames whose nouns may be asked about when they are absent


class FrameReport(NamedTuple):
    """What was read from one frame: its candidate questions, or why it cannot be used."""

    questions: list[Question]
    drops: Counter  # annotations that were left out, by reason
    coverage: Coverage  # which outlined objects the noun table knows
    failure: str  # why the frame cannot be used; empty when it can
    caption: Question | None = None  # None for a frame without objects


Reports = Sequence[tuple[Frame, FrameReport]]


@dataclass(frozen=True)
class QuestionFiles:
    """All question files of a data root before they are written."""

    rows: dict[Path, list[QuestionRow]]  # path -> rows
    manifest: dict[str, Any]  # what they are, see `manifest.describe_files`
    summary: dict[str, Any]  # what `questions.json` says: how they were made, what was left out and why


def build_csv_data(root: Path, **options: Any) -> dict[str, Any]:
    """Write the question files of all splits, with `questions.json` and `manifest.json` beside them.

    Arguments and errors: see `generate_questions`.

    Returns:
        The contents of `questions.json`: version, seed, margins, the split's rule; questions per split, type and
        sensor; what was left out and why.
    """
    found = generate_questions(root, **options)
    for path, rows in found.rows.items():
        write_questions(path, rows)
    write_json(questions_file(root, "train").with_name("questions.json"), found.summary)
    write_json(manifest_path(root), found.manifest)
    return found.summary


def generate_questions(
    root: Path,
    *,
    seed: int = 0,
    workers: int | None = None,
    train_per_frame: int = 2,
    eval_per_frame: int = 8,
    unanswered_per_frame: int = 8,
    official_val: bool = False,
) -> QuestionFiles:
    """Make the questions and captions of all splits.

    Args:
        root: ROOT_DATA_DIR.
        seed: decides which questions are kept; the number of workers does not.
        workers: processes; default: one per core.
        train_per_frame: most questions per training frame; the published data set has one to two.
        eval_per_frame: most questions per val or test frame.
        unanswered_per_frame: most further questions per training frame, without labels.
        official_val: see `listed_split`.

    Raises:
        UserError: no frame, no official split, or not a single question.
    """
    settings = {
        "seed": seed,
        "train_per_frame": train_per_frame,
        "eval_per_frame": eval_per_frame,
        "unanswered_per_frame": unanswered_per_frame,
        "official_val": official_val,
    }
    frames, unusable = find_frames(root)
    split = listed_split(root, frames, official_val=official_val)
    listed = [frame for frame in frames if frame.path in split.names]
    reports = list(zip(listed, read_frames(listed, seed=seed, workers=workers), strict=True))
    unusable += [(frame.path, report.failure) for frame, report in reports if report.failure]
    per_frame = {"train": train_per_frame, "val": eval_per_frame, "test": eval_per_frame}
    per_frame[UNLABELLED] = unanswered_per_frame
    rows = _select_rows(reports, split.names, seed=seed, per_frame=per_frame)
    if not any(rows[name] for name in SPLITS):
        usable = sum(not report.failure for _, report in reports)
        raise UserError(f"{root / 'SUNRGBD'}: no question can be asked about its {usable} usable frames")
    captions = _caption_rows(reports, split.names)
    files = {questions_file(root, name): rows[name] for name in SPLITS}
    files |= {unanswered_file(root): rows[UNLABELLED]} | {captions_file(root, name): captions[name] for name in SPLITS}
    summary = {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "per_frame": per_frame,
        **_split_summary(root, frames, reports, split),
        **_questions_summary(rows, captions, reports),
        "unusable_frames": dict(sorted(unusable)),
    }
    return QuestionFiles(files, describe_files(files, settings), summary)


def _questions_summary(
    rows: dict[str, list[QuestionRow]], captions: dict[str, list[QuestionRow]], reports: Reports
) -> dict[str, Any]:
    """The part of `questions.json` about the questions: rules, numbers, annotations that were left out."""
    return {
        "margins": MARGINS,
        "largest_answer_share": ANSWER_SHARE,
        "questions": {name: _counts(found) for name, found in rows.items()},
        "captions": {name: len(captions[name]) for name in SPLITS},
        "dropped_annotations": dict(sum((report.drops for _, report in reports), Counter()).most_common()),
        "noun_table": _coverage(sum((report.coverage for _, report in reports), Coverage())),
    }


def _select_rows(
    reports: Reports, split: dict[str, str], *, seed: int, per_frame: dict[str, int]
) -> dict[str, list[QuestionRow]]:
    """The questions of each split in SPLITS, and those without labels under UNLABELLED."""
    rows, candidates = {}, {}
    for number, name in enumerate(SPLITS):
        usable = [(frame, report) for frame, report in reports if not report.failure and split[frame.path] == name]
        candidates[name] = [(frame, report.questions) for frame, report in usable]
        rows[name] = select_questions(candidates[name], seed=seed + number, per_frame=per_frame[name])
    gold = {row.id for row in rows["train"]}
    rows[UNLABELLED] = select_unlabelled(candidates["train"], gold=gold, seed=seed, per_frame=per_frame[UNLABELLED])
    return rows


def _caption_rows(reports: Reports, split: dict[str, str]) -> dict[str, list[QuestionRow]]:
    """The captions of each split; frames without one are left out."""
    captions = {name: [] for name in SPLITS}
    for frame, report in reports:
        if report.caption:
            captions[split[frame.path]] += question_rows(frame, [report.caption])
    return captions


def _split_summary(root: Path, frames: Sequence[Frame], reports: Reports, split: ListedSplit) -> dict[str, Any]:
    """The part of `questions.json` about the split: its rule, its frames, missing ones, recordings in two splits."""
    names = split.names
    return {
        "split": {"rule": split.rule, "listed_frames": dict(sorted(Counter(names.values()).items()))},
        "frames": dict(Counter(names[frame.path] for frame, report in reports if not report.failure)),
        "frames_outside_the_official_split": len(frames) - len(reports),
        "missing_frames": by_collection(missing_frames(root, frames, split)),
        "recordings_in_two_splits": _shared_recordings([frame for frame, _ in reports], names),
    }


def by_collection(paths: Sequence[str]) -> dict[str, int]:
    """How many of these frame paths each collection has, such as `kv1/NYUdata`."""
    return dict(sorted(Counter("/".join(path.split("/")[1:3]) for path in paths).items()))


def _shared_recordings(frames: Sequence[Frame], split: dict[str, str]) -> dict[str, int]:
    """How many recordings (`Frame.group`) have frames in two splits, which the official split does not rule out."""
    groups = {name: {frame.group for frame in frames if split[frame.path] == name} for name in SPLITS}
    return {f"{one} {other}": len(groups[one] & groups[other]) for one, other in combinations(SPLITS, 2)}


def read_frames(frames: Sequence[Frame], *, seed: int, workers: int | None = None) -> Iterator[FrameReport]:
    """One report per frame, in their order. `workers` processes read the pictures, which do not leave them."""
    read = partial(read_frame_questions, seed=seed, vocabulary=_vocabulary(frames))
    label = "reading annotations"
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        yield from progress(map(read, frames), total=len(frames), label=label)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from progress(pool.map(read, frames, chunksize=16), total=len(frames), label=label)


def _vocabulary(frames: Sequence[Frame]) -> list[str]:
    """The nouns of evenly spaced frames, to ask about when absent. Other nouns would always have the answer "no"."""
    sample = frames[:: max(1, len(frames) // VOCABULARY_FRAMES)]
    return sorted(set().union(*map(frame_nouns, sample)))


def read_frame_questions(frame: Frame, *, seed: int, vocabulary: Collection[str]) -> FrameReport:
    """Read a frame's annotations and RGB picture and generate its candidate questions and caption."""
    drops, coverage = Counter(), Coverage()
    digest = hashlib.sha256(frame.path.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])  # independent of the other frames
    try:
        instances, unsure = frame_objects(frame, drops, coverage)
        rgb = read_rgb(frame.root / frame.image_path)
    except UserError as error:
        return FrameReport([], drops, coverage, str(error))
    questions = frame_candidates(instances, rgb=rgb, rng=rng, unsure=unsure, vocabulary=vocabulary)
    return FrameReport(questions, drops, coverage, "", frame_caption(instances, scene=frame.scene, unsure=unsure))


def _coverage(coverage: Coverage) -> dict[str, Any]:
    """The share of outlined objects, and of their area, that has a noun; walls, floors and ceilings do not count."""
    objects = {key: count for key, count in coverage.outlines.items() if key != "structure"}
    area = {key: share for key, share in coverage.area.items() if key != "structure"}
    return {
        "known_share_of_outlines": _share(objects),
        "known_share_of_area": _share(area),
        "outlines": dict(sorted(coverage.outlines.items())),
        "area_in_pictures": {kind: round(share, 3) for kind, share in sorted(coverage.area.items())},
        "most_frequent_unknown_names": dict(coverage.unknown_names.most_common(UNKNOWN_LISTED)),
    }


def _share(parts: dict[str, float]) -> float | None:
    total = sum(parts.values())
    return round(parts.get("known", 0) / total, 4) if total else None


def _counts(rows: Sequence[QuestionRow]) -> dict[str, Any]:
    """Number of questions, and how they spread over types, sensors and both."""
    return {
        "all": len(rows),
        "images": len({row.image_path for row in rows}),
        "types": dict(Counter(row.type for row in rows).most_common()),
        "sensors": dict(Counter(row.sensor for row in rows).most_common()),
        "types_by_sensor": dict(sorted(Counter(f"{row.sensor} {row.type}" for row in rows).items())),
    }
