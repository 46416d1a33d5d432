"""Build the question files of a SUN RGB-D tree, from the official archives or from the unpacked data set.

Reads   ROOT_DATA_DIR/SUNRGBD (pictures and annotations) and the official split in ROOT_DATA_DIR/SUNRGBDtoolbox; without a
        toolbox, the list of the official split in this repository
Writes  ROOT_DATA_DIR/SUNRGBD/csv_data/{train,val,test}_dataset.csv; train_unanswered.csv, further questions about the training
        frames without their answers, for a teacher; {train,val,test}_captions.csv, a description of each frame; and
        questions.json, which says how they were made

The test split is the official one. A tenth of the official training half is for validation, whole rooms of it, see
`dataset.sunrgbd.validation_tenth`; with --official_val train and val are the toolbox's, half of it each.

    python dataset/prepare_sunrgbd.py            # build
    python dataset/prepare_sunrgbd.py --sunrgbd_zip SUNRGBD.zip --toolbox_zip SUNRGBDtoolbox.zip    # unpack there, then build
    python dataset/prepare_sunrgbd.py --check    # build nothing, list every frame that cannot be used
    python dataset/prepare_sunrgbd.py --preview 20    # a page with pictures, objects, questions and answers to look at
    python dataset/prepare_sunrgbd.py --blind_check    # can the questions be answered without an image?
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, data_root, progress, run_script, write_json

# isort: split
import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from dataset.annotations import Coverage, frame_nouns, frame_objects
from dataset.captions import frame_caption
from dataset.extract import extract_archives
from dataset.miniature.world import ensure_world
from dataset.preview import write_preview
from dataset.questions import (
    ANSWER_SHARE,
    GENERATOR_VERSION,
    MARGINS,
    Question,
    QuestionRow,
    captions_file,
    csv_cells,
    frame_candidates,
    question_rows,
    questions_file,
    read_questions,
    select_questions,
    select_unanswered,
    unanswered_file,
    write_questions,
)
from dataset.sunrgbd import Frame, find_frames, listed_split, missing_frames, read_rgb
from evaluation.blind import blind_check

SPLITS = ("train", "val", "test")
BLIND_CHECK_LEAST = 200  # questions of a type: with fewer, chance alone exceeds the limits
UNKNOWN_LISTED, UNKNOWN_PRINTED = 100, 10  # of the most frequent names that are not in the noun table
VOCABULARY_FRAMES = 1000  # frames whose nouns may be asked about when they are absent


class FrameReport(NamedTuple):
    """What one frame gave: its candidate questions, or why it cannot be used."""

    questions: list[Question]
    drops: Counter  # annotations that were left out, by reason
    coverage: Coverage  # what the noun table knows of the outlines
    failure: str  # empty when the frame can be used
    caption: Question | None = None  # None where nothing is shown


def build_csv_data(
    root: Path,
    *,
    seed: int = 0,
    workers: int | None = None,
    train_per_frame: int = 2,
    eval_per_frame: int = 8,
    unanswered_per_frame: int = 8,
    official_val: bool = False,
) -> dict[str, Any]:
    """Write the question files of all splits, and `questions.json` beside them.

    Args:
        root: ROOT_DATA_DIR.
        seed: decides which questions are kept; the number of workers does not.
        workers: processes; default: one per core.
        train_per_frame: questions per training frame at most; the published data set has one to two.
        eval_per_frame: the same for val and test.
        unanswered_per_frame: further questions per training frame at most, without answers.
        official_val: see `listed_split`.

    Returns:
        What `questions.json` holds: version, seed, margins, the split's rule; questions per split, type and sensor;
        what was left out and why.

    Raises:
        UserError: no frame, no official split, or not a single question.
    """
    frames, unusable = find_frames(root)
    whole = listed_split(root, frames, official_val=official_val)
    split = whole.names
    listed = [frame for frame in frames if frame.path in split]
    reports = list(read_frames(listed, seed=seed, workers=workers))
    usable = [(frame, report.questions) for frame, report in zip(listed, reports, strict=True) if not report.failure]
    unusable += [(frame.path, report.failure) for frame, report in zip(listed, reports, strict=True) if report.failure]
    captions = {name: [] for name in SPLITS}
    for frame, report in zip(listed, reports, strict=True):
        if report.caption:
            captions[split[frame.path]] += question_rows(frame, [report.caption])
    rows = {}
    for number, name in enumerate(SPLITS):
        candidates = [(frame, questions) for frame, questions in usable if split[frame.path] == name]
        per_frame = train_per_frame if name == "train" else eval_per_frame
        rows[name] = select_questions(candidates, seed=seed + number, per_frame=per_frame)
        if name == "train":
            gold = {row.id for row in rows[name]}
            unanswered = select_unanswered(candidates, gold=gold, seed=seed, per_frame=unanswered_per_frame)
    if not any(rows.values()):
        raise UserError(f"{root / 'SUNRGBD'}: no question can be asked about its {len(usable)} usable frames")
    summary = {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "per_frame": {
            "train": train_per_frame,
            "val": eval_per_frame,
            "test": eval_per_frame,
            "train_unanswered": unanswered_per_frame,
        },
        "margins": MARGINS,
        "largest_answer_share": ANSWER_SHARE,
        "split": {"rule": whole.rule, "listed_frames": dict(sorted(Counter(split.values()).items()))},
        "frames": dict(Counter(split[frame.path] for frame, _ in usable)),
        "frames_outside_the_official_split": len(frames) - len(listed),
        "missing_frames": _collections(missing_frames(root, frames, whole)),
        "recordings_in_two_splits": _shared_recordings(listed, split),
        "questions": {name: _counts(rows[name]) for name in SPLITS} | {"train_unanswered": _counts(unanswered)},
        "captions": {name: len(captions[name]) for name in SPLITS},
        "dropped_annotations": dict(sum((report.drops for report in reports), Counter()).most_common()),
        "noun_table": _coverage(sum((report.coverage for report in reports), Coverage())),
        "unusable_frames": dict(sorted(unusable)),
    }
    for name in SPLITS:
        write_questions(questions_file(root, name), rows[name])
        write_questions(captions_file(root, name), captions[name])
    write_questions(unanswered_file(root), unanswered)
    write_json(questions_file(root, "train").with_name("questions.json"), summary)
    return summary


def _collections(paths: Sequence[str]) -> dict[str, int]:
    """How many frame paths there are of each collection, such as `kv1/NYUdata`."""
    return dict(sorted(Counter("/".join(path.split("/")[1:3]) for path in paths).items()))


def _shared_recordings(frames: Sequence[Frame], split: dict[str, str]) -> dict[str, int]:
    """How many recordings (`Frame.group`) have frames in two splits: the official one separates frames, not always rooms."""
    groups = {name: {frame.group for frame in frames if split[frame.path] == name} for name in SPLITS}
    return {f"{one} {other}": len(groups[one] & groups[other]) for one, other in combinations(SPLITS, 2)}


def read_frames(frames: Sequence[Frame], *, seed: int, workers: int | None = None) -> Iterator[FrameReport]:
    """One report per frame, in their order; pictures are read in `workers` processes and dropped there."""
    read = partial(read_frame_questions, seed=seed, vocabulary=_vocabulary(frames))
    label = "reading annotations"
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        yield from progress(map(read, frames), total=len(frames), label=label)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from progress(pool.map(read, frames, chunksize=16), total=len(frames), label=label)


def _vocabulary(frames: Sequence[Frame]) -> list[str]:
    """The nouns of evenly spaced frames: to ask for what no room of the data set has would give the answer away."""
    sample = frames[:: max(1, len(frames) // VOCABULARY_FRAMES)]
    return sorted(set().union(*map(frame_nouns, sample)))


def read_frame_questions(frame: Frame, *, seed: int, vocabulary: Collection[str]) -> FrameReport:
    """Read a frame's annotations and pictures and ask what can be asked."""
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
    """What share of the outlined objects and of their area has a noun; walls, floors and ceilings are counted apart."""
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


def print_missing(collections: dict[str, int]) -> None:
    """Print how many frames of the official split the tree lacks, which happens when it was unpacked in part."""
    if collections:
        counts = ", ".join(f"{name} {n}" for name, n in collections.items())
        print(f"{sum(collections.values())} frames of the official split are not there ({counts})")


def print_coverage(found: dict[str, Any]) -> None:
    """Print which share of the outlines the noun table knows, as `questions.json` has it."""
    if found["known_share_of_area"] is None:
        print("nouns: no object is outlined in any frame")
        return
    names = list(found["most_frequent_unknown_names"].items())[:UNKNOWN_PRINTED]
    print(
        f"nouns: {found['known_share_of_outlines']:.1%} of the outlined objects and {found['known_share_of_area']:.1%} of their "
        f"area are in the noun table, not counting {found['outlines'].get('structure', 0)} walls, floors and ceilings"
    )
    if names:
        print("most frequent other names: " + ", ".join(f"{name or '(none)'} {n}" for name, n in names))


def check_tree(root: Path, *, workers: int | None = None, official_val: bool = False) -> None:
    """Print every frame that cannot be used, with its reason.

    Raises:
        UserError: there is one, or the official split is missing.
    """
    frames, unusable = find_frames(root)
    whole = listed_split(root, frames, official_val=official_val)
    reports = zip(frames, read_frames(frames, seed=0, workers=workers), strict=True)
    unusable += [(frame.path, report.failure) for frame, report in reports if report.failure]
    for path, reason in sorted(unusable):
        print(f"{path}: {reason}")
    sensors = Counter(frame.sensor for frame in frames)
    print(f"{len(frames)} frames ({', '.join(f'{name} {n}' for name, n in sorted(sensors.items()))}); split: ", end="")
    split = Counter(whole.names[frame.path] for frame in frames if frame.path in whole.names)
    print(", ".join(f"{name} {n}" for name, n in sorted(split.items())) or "none listed")
    print(whole.rule)
    print_missing(_collections(missing_frames(root, frames, whole)))
    if unusable:
        raise UserError(f"{root / 'SUNRGBD'}: {len(unusable)} frames cannot be used, listed above with the reason")


def _rows_of_all_splits(root: Path) -> list[QuestionRow]:
    """A tree of a few frames may have a split without questions, but not three."""
    paths = [questions_file(root, name) for name in SPLITS]
    filled = [path for path in paths if not path.is_file() or path.read_bytes().count(b"\n") > 1]
    return [row for path in filled or paths for row in read_questions(path, root=root)]


def check_blind(root: Path) -> None:
    """Fit models that see no image on the training questions and let them answer those of val and test.

    Raises:
        UserError: they do better than the distribution of answers allows, or no type has enough questions to judge.
    """
    train, *others = ([csv_cells(row) for row in read_questions(questions_file(root, name))] for name in SPLITS)
    violations, most = [], {}
    for name, rows in zip(SPLITS[1:], others, strict=True):
        counts = Counter(row["Question_Type"] for row in rows)
        enough = [row for row in rows if counts[row["Question_Type"]] >= BLIND_CHECK_LEAST]
        judged = sorted({row["Question_Type"] for row in enough})
        few = [f"{kind} {n}" for kind, n in sorted(counts.items()) if kind not in judged]
        most[name] = max(counts.values())
        print(f"{name}: judged, {BLIND_CHECK_LEAST} questions or more: {', '.join(judged) or 'no type'}")
        if few:
            print(f"{name}: not judged, too few questions: {', '.join(few)}")
        if not enough:
            continue
        violations += [f"{name}: {found}" for found in blind_check(train, enough)]
    for violation in violations:
        print(violation)
    if violations:
        raise UserError(f"{root}: some questions can be answered without looking, see above")
    if max(most.values()) < BLIND_CHECK_LEAST:
        found = ", ".join(f"{n} in {name}" for name, n in most.items())
        raise UserError(
            f"{root}: too few questions to judge; the largest type has {found}, and {BLIND_CHECK_LEAST} are needed: "
            "prepare more frames, or more questions of each with --eval_per_frame"
        )
    print("none of them can be answered without looking, beyond its most common answer")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--root", type=Path, default=None, help="folder that contains SUNRGBD (default: ROOT_DATA_DIR of .env)")
    add("--miniature", action="store_true", help="use the built-in world; builds it where it is missing")
    add("--sunrgbd_zip", type=Path, default=None, help="SUNRGBD.zip, to be unpacked into that folder first")
    add("--toolbox_zip", type=Path, default=None, help="SUNRGBDtoolbox.zip, the same; can be done without")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="only list the frames that cannot be used")
    instead.add_argument("--preview", type=int, metavar="N", help="only write csv_data/preview.html with N frames")
    instead.add_argument("--blind_check", action="store_true", help="only say whether the questions need the image")
    add("--workers", type=int, default=None, help="processes (default: one per core)")
    add("--seed", type=int, default=0, help="decides which questions are kept")
    add("--train_per_frame", type=int, default=2, help="questions per training frame at most")
    add(
        "--unanswered_per_frame",
        type=int,
        default=8,
        help="further questions per training frame, for a teacher to answer",
    )
    add("--eval_per_frame", type=int, default=8, help="questions per val or test frame at most")
    add("--official_val", action="store_true", help="train and val as in the toolbox: 2,666 and 2,619 frames")
    args = parser.parse_args(argv)
    if args.official_val and (args.preview or args.blind_check):
        parser.error(
            "--official_val decides how question files are made; --preview and --blind_check read what is there"
        )
    if args.root and args.miniature:
        parser.error("--root and --miniature name two data sets; give one")
    if args.miniature and (args.sunrgbd_zip or args.toolbox_zip):
        parser.error("--miniature renders its own world; leave out the archives")
    for flag in ("preview", "workers", "train_per_frame", "eval_per_frame", "unanswered_per_frame"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: give at least 1")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: give 0 or more")
    return args


def main(args: argparse.Namespace) -> None:
    """Unpack the archives that are given; check the tree, or build the question files and say what came out."""
    archives = {"SUNRGBD": args.sunrgbd_zip, "SUNRGBDtoolbox": args.toolbox_zip}
    archives = {folder: path for folder, path in archives.items() if path}
    root = (
        args.root.expanduser().resolve() if args.root else data_root(args.miniature, unpacked="SUNRGBD" not in archives)
    )
    if archives:
        extract_archives(archives, root)
    if args.miniature:
        ensure_world(root, workers=args.workers)
    if args.check:
        check_tree(root, workers=args.workers, official_val=args.official_val)
        return
    if args.preview:
        path = questions_file(root, "train").with_name("preview.html")
        write_preview(path, root, _rows_of_all_splits(root), n_frames=args.preview)
        print(f"wrote {path}")
        return
    if args.blind_check:
        check_blind(root)
        return
    summary = build_csv_data(
        root,
        seed=args.seed,
        workers=args.workers,
        train_per_frame=args.train_per_frame,
        eval_per_frame=args.eval_per_frame,
        unanswered_per_frame=args.unanswered_per_frame,
        official_val=args.official_val,
    )
    print(summary["split"]["rule"])
    for name, counts in summary["questions"].items():
        types = ", ".join(f"{kind} {n}" for kind, n in counts["types"].items())
        print(f"{name}: {counts['all']} questions about {counts['images']} images ({types})")
    print_coverage(summary["noun_table"])
    print_missing(summary["missing_frames"])
    if summary["unusable_frames"]:
        print(f"{len(summary['unusable_frames'])} frames cannot be used; --check lists them")


if __name__ == "__main__":
    run_script(main, parse_args)
