"""Build the question files of a SUN RGB-D tree, from the official archives or from the unpacked data set.

Reads   ROOT_DATA_DIR/SUNRGBD (pictures and annotations) and the official split in ROOT_DATA_DIR/SUNRGBDtoolbox; without a
        toolbox, the list of the official split in this repository
Writes  ROOT_DATA_DIR/SUNRGBD/csv_data/{train,val,test}_dataset.csv; train_unanswered.csv, further questions about the training
        frames without their answers, for a teacher; {train,val,test}_captions.csv, a description of each frame; and
        questions.json, which says how they were made

The test split is the official one. A tenth of the official training half is for validation, whole rooms of it, see
`dataset.sunrgbd.frames.validation_tenth`; with --official_val train and val are the toolbox's, half of it each.

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

from utils import UserError, data_root, run_script

# isort: split
import argparse
from collections import Counter
from typing import Any

from dataset.miniature.world import ensure_world
from dataset.questions.blind import blind_check
from dataset.questions.csv_data import SPLITS, UNKNOWN_PRINTED, build_csv_data, by_collection, read_frames
from dataset.questions.preview import write_preview
from dataset.questions.rows import QuestionRow, csv_cells, questions_file, read_questions
from dataset.sunrgbd.extract import extract_archives
from dataset.sunrgbd.frames import find_frames, listed_split, missing_frames

BLIND_CHECK_LEAST = 200  # questions of a type: with fewer, chance alone exceeds the limits


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
    print_missing(by_collection(missing_frames(root, frames, whole)))
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
