"""Build the question files of a SUN RGB-D tree, from the official archives or from the unpacked data set.

Reads   ROOT_DATA_DIR/SUNRGBD (pictures and annotations) and the official split in ROOT_DATA_DIR/SUNRGBDtoolbox; without
        a toolbox, this repository's list of the official split
Writes  into ROOT_DATA_DIR/SUNRGBD/csv_data/
        {train,val,test}_dataset.csv    questions with labels
        train_unanswered.csv            further questions about the training frames, without labels, for a teacher
        {train,val,test}_captions.csv   a description of each frame
        questions.json                  how the questions were made
        manifest.json                   digests and settings: with figures, publish it

The test split is the official one. Validation is a tenth of the official training half, in whole rooms, see
`dataset.sunrgbd.frames.validation_tenth`. With --official_val, train and val are the toolbox's two halves of it.

    python dataset/prepare_sunrgbd.py                 # build the question files
    python dataset/prepare_sunrgbd.py --sunrgbd_zip SUNRGBD.zip --toolbox_zip SUNRGBDtoolbox.zip    # unpack, then build
    python dataset/prepare_sunrgbd.py --check         # build nothing, list every frame that cannot be used
    python dataset/prepare_sunrgbd.py --preview 20    # write a page with pictures, objects, questions and answers
    python dataset/prepare_sunrgbd.py --blind_check   # can the questions be answered without the image?
    python dataset/prepare_sunrgbd.py --verify FILE   # does this tree give the very questions of a published manifest?
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, at_least, data_root, printable, run_script, sha256

# isort: split
import argparse
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dataset.miniature.world import ensure_world
from dataset.questions.blind import blind_check
from dataset.questions.csv_data import (
    SPLITS,
    UNKNOWN_PRINTED,
    build_csv_data,
    by_collection,
    generate_questions,
    read_frames,
)
from dataset.questions.manifest import SETTINGS, changed_files, differences, read_manifest
from dataset.questions.preview import write_preview
from dataset.questions.rows import QuestionRow, csv_cells, questions_file, read_questions
from dataset.sunrgbd.extract import extract_archives
from dataset.sunrgbd.frames import find_frames, listed_split, missing_frames

BLIND_CHECK_LEAST = 200  # questions that a type must have to be judged; with fewer, chance alone exceeds the limits


def print_missing(collections: dict[str, int]) -> None:
    """Print how many frames of the official split the tree lacks, as happens when it was unpacked in part."""
    if collections:
        print(f"{sum(collections.values())} frames of the official split are not there ({_listed(collections)})")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(printable(f"{name} {n}") for name, n in counts.items())


def print_coverage(found: dict[str, Any]) -> None:
    """Print which share of the outlined objects the noun table knows; `found` is "noun_table" of `questions.json`."""
    if found["known_share_of_area"] is None:
        print("nouns: no object is outlined in any frame")
        return
    print(
        f"nouns: {found['known_share_of_outlines']:.1%} of the outlined objects and "
        f"{found['known_share_of_area']:.1%} of their area are in the noun table, "
        f"not counting {found['outlines'].get('structure', 0)} walls, floors and ceilings"
    )
    names = list(found["most_frequent_unknown_names"].items())[:UNKNOWN_PRINTED]
    if names:
        print("most frequent other names: " + _listed({name or "(none)": n for name, n in names}))


def check_tree(root: Path, *, workers: int | None = None, official_val: bool = False) -> None:
    """Print every frame that cannot be used, with its reason.

    Raises:
        UserError: there is one, or the official split is missing.
    """
    frames, unusable = find_frames(root)
    split = listed_split(root, frames, official_val=official_val)
    reports = zip(frames, read_frames(frames, seed=0, workers=workers), strict=True)
    unusable += [(frame.path, report.failure) for frame, report in reports if report.failure]
    for path, reason in sorted(unusable):
        print(printable(f"{path}: {reason}"))
    sensors = Counter(sorted(frame.sensor for frame in frames))
    sizes = Counter(sorted(split.names[frame.path] for frame in frames if frame.path in split.names))
    print(f"{len(frames)} frames ({_listed(sensors)}); split: {_listed(sizes) or 'none listed'}")
    print(split.rule)
    print_missing(by_collection(missing_frames(root, frames, split)))
    if unusable:
        raise UserError(f"{root / 'SUNRGBD'}: {len(unusable)} frames cannot be used, listed above with the reason")


def _rows_of_all_splits(root: Path) -> list[QuestionRow]:
    """The questions of all splits. With few frames a split may have none, but then not all of them."""
    paths = [questions_file(root, name) for name in SPLITS]
    filled = [path for path in paths if not path.is_file() or path.read_bytes().count(b"\n") > 1]
    return [row for path in filled or paths for row in read_questions(path, root=root)]


def check_blind(root: Path) -> None:
    """Fit models that see no image on the training questions and let them answer those of val and test.

    Raises:
        UserError: they do better than the distribution of answers allows, or no type has enough questions to judge.
    """
    train, *others = ([csv_cells(row) for row in read_questions(questions_file(root, name))] for name in SPLITS)
    violations, largest = [], {}
    for name, rows in zip(SPLITS[1:], others, strict=True):
        counts = Counter(sorted(row["Question_Type"] for row in rows))
        largest[name] = max(counts.values())
        print_judged(name, counts)
        judged = [row for row in rows if counts[row["Question_Type"]] >= BLIND_CHECK_LEAST]
        violations += [f"{name}: {found}" for found in blind_check(train, judged)] if judged else []
    for violation in violations:
        print(printable(violation))
    if violations:
        raise UserError(f"{root}: some questions can be answered without the image, see above")
    if max(largest.values()) < BLIND_CHECK_LEAST:
        found = ", ".join(f"{n} in {name}" for name, n in largest.items())
        raise UserError(
            f"{root}: too few questions to judge; the largest type has {found}, and {BLIND_CHECK_LEAST} are needed: "
            "prepare more frames, or more questions of each with --eval_per_frame"
        )
    print("no judged type can be answered without the image, beyond its most common answer")


def print_judged(name: str, counts: Mapping[str, int]) -> None:
    """Print which types of a split have enough questions for the blind check, and which do not."""
    judged = [kind for kind, n in counts.items() if n >= BLIND_CHECK_LEAST]
    print(f"{name}: judged, {BLIND_CHECK_LEAST} questions or more: {printable(', '.join(judged)) or 'no type'}")
    if few := {kind: n for kind, n in counts.items() if n < BLIND_CHECK_LEAST}:
        print(f"{name}: not judged, too few questions: {_listed(few)}")


def verify(root: Path, path: Path, *, workers: int | None = None) -> None:
    """Make the questions of a published manifest from this tree, with its settings, and say whether they are the same.

    Args:
        root: the data root; nothing is written there.
        path: the manifest.
        workers: processes that read frames.

    Raises:
        UserError: it is no manifest, or this tree gives other questions.
    """
    published = read_manifest(path)
    found = generate_questions(root, workers=workers, **published["settings"])
    if different := differences(published, found.manifest):
        for line in different:
            print(printable(line))
        print_missing(found.summary["missing_frames"])
        raise UserError(f"{root}: does not give the questions of {path}; {len(different)} files differ, listed above")
    print(f"{root}: gives the very questions of {path} (SHA-256 {sha256(path)}), in {len(published['files'])} files")
    folder = questions_file(root, "train").parent
    if changed := changed_files(published, folder):
        flags = " ".join(
            f"--{k} {v}" if type(v) is int else f"--{k}" for k, v in published["settings"].items() if v is not False
        )
        print(printable(f"but {folder} has no or other {', '.join(changed)}; make them with {flags}"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--root", type=Path, help="data folder, which contains SUNRGBD/ (default: ROOT_DATA_DIR of .env)")
    add(
        "--miniature",
        action="store_true",
        help="use the built-in miniature world; renders it first where it is missing",
    )
    add("--sunrgbd_zip", type=Path, metavar="FILE", help="SUNRGBD.zip, which is unpacked into the data folder first")
    add("--toolbox_zip", type=Path, metavar="FILE", help="SUNRGBDtoolbox.zip, which is unpacked there, too (optional)")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--check", action="store_true", help="write nothing; list the frames that cannot be used")
    instead("--preview", type=at_least(1), metavar="N", help="write only csv_data/preview.html, which shows N frames")
    instead("--blind_check", action="store_true", help="write nothing; test whether the questions need the image")
    instead(
        "--verify",
        type=Path,
        metavar="MANIFEST",
        help="write nothing; say whether this tree gives the questions of a manifest.json, with the settings in it",
    )
    add("--workers", type=at_least(1), help="number of processes that read frames (default: one per core)")
    add("--seed", type=at_least(0), default=0, help="random seed that decides which questions are kept")
    add("--train_per_frame", type=at_least(1), default=2, help="largest number of questions about a training frame")
    add(
        "--unanswered_per_frame",
        type=at_least(1),
        default=8,
        help="largest number of further questions about a training frame, without labels, for a teacher to answer",
    )
    add("--eval_per_frame", type=at_least(1), default=8, help="largest number of questions about a val or test frame")
    add("--official_val", action="store_true", help="use the toolbox's train and val: 2,666 and 2,619 frames")
    args = parser.parse_args(argv)
    _check_combinations(parser, args)
    return args


def _check_combinations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error when flags contradict each other."""
    if args.official_val and (args.preview or args.blind_check):
        parser.error(
            "--official_val decides how question files are made; --preview and --blind_check read what is there"
        )
    if args.verify and (given := [name for name in SETTINGS if getattr(args, name) != parser.get_default(name)]):
        parser.error(f"--{given[0]}: the manifest of --verify says it; leave it out")
    if args.root and args.miniature:
        parser.error("--root and --miniature name two data sets; give one")
    if args.miniature and (args.sunrgbd_zip or args.toolbox_zip):
        parser.error("--miniature renders its own world; leave out the archives")


def main(args: argparse.Namespace) -> None:
    """Get the tree ready; then check it, show its questions, test them, or build them."""
    root = ready_tree(args)
    if args.check:
        check_tree(root, workers=args.workers, official_val=args.official_val)
    elif args.preview:
        path = questions_file(root, "train").with_name("preview.html")
        write_preview(path, root, _rows_of_all_splits(root), n_frames=args.preview)
        print(f"wrote {path}")
    elif args.blind_check:
        check_blind(root)
    elif args.verify:
        verify(root, args.verify, workers=args.workers)
    else:
        summary = build_csv_data(
            root,
            seed=args.seed,
            workers=args.workers,
            train_per_frame=args.train_per_frame,
            eval_per_frame=args.eval_per_frame,
            unanswered_per_frame=args.unanswered_per_frame,
            official_val=args.official_val,
        )
        print_summary(summary)


def ready_tree(args: argparse.Namespace) -> Path:
    """The data root, after unpacking the archives that were given and rendering the miniature world if it is used."""
    archives = {"SUNRGBD": args.sunrgbd_zip, "SUNRGBDtoolbox": args.toolbox_zip}
    archives = {folder: path for folder, path in archives.items() if path}
    if args.root:
        root = args.root.expanduser().resolve()
    else:
        root = data_root(args.miniature, unpacked="SUNRGBD" not in archives)
    if archives:
        extract_archives(archives, root)
    if args.miniature:
        ensure_world(root, workers=args.workers)
    return root


def print_summary(summary: dict[str, Any]) -> None:
    """Print what was built; `summary` is what `questions.json` holds."""
    print(summary["split"]["rule"])
    for name, counts in summary["questions"].items():
        print(f"{name}: {counts['all']} questions about {counts['images']} images ({_listed(counts['types'])})")
    print_coverage(summary["noun_table"])
    print_missing(summary["missing_frames"])
    if summary["unusable_frames"]:
        print(f"{len(summary['unusable_frames'])} frames cannot be used; --check lists them")


if __name__ == "__main__":
    run_script(main, parse_args)
