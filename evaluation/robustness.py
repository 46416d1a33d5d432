"""What a worse sensor costs: score systems rung by rung, on depth with holes, coarse depth, less reach, or less light.

Reads   SUNRGBD/csv_data/{train,val,test}_dataset.csv; checkpoints of our training scripts, exports or stock models
Writes  <output>/robustness.csv   a row per system, degradation, severity and question type, with 95 % intervals
        <output>/robustness.json  the same, with mean over the ladder, share of the clean accuracy kept, differences
        <output>/table.md         the summary
        <output>/curves.png       accuracy against severity, by kind of degradation
        <output>/light.png        with an RGB and a depth system: both as the light fades
        <output>/answers/         every answer as it comes: the same command goes on where it was

The ladder is fixed (dataset/inputs/degradations.py): depth for systems that see depth, light for those that see RGB.
All systems get the very same degraded pictures.

    python evaluation/robustness.py path/to/checkpoint.ckpt run_name my_student --names "labels only" distilled mine
    python evaluation/robustness.py run_name --kinds holes resolution range_cut --n_images 150
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import (  # first: loads .env before transformers reads it
    UserError,
    at_least,
    atomic_path,
    check_writable,
    data_root,
    duration,
    git_commit,
    outputs_root,
    printable,
    run_script,
    source_digest,
    write_json,
)

# isort: split
import argparse
import csv
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from dataset.inputs.degradations import DEPTH_LADDER, LADDERS, LIGHT_LADDER
from dataset.inputs.processor import IMAGE_TOKENS
from dataset.miniature.world import ensure_world
from dataset.questions.rows import QuestionRow, csv_cells, group_by_image, questions_file, read_questions
from distillation.run.claim import claim
from distillation.run.machine import peak_memory_gib, quieten
from evaluation.answer_log import AnswerLog, asked_of, check_results_room
from evaluation.curves import draw_curves, draw_light
from evaluation.ladder import (
    CLEAN,
    RECORD,
    Asked,
    Climb,
    best_blind,
    check_names,
    check_same_ladder,
    chosen_rungs,
    crossings,
    folder_name,
    read_climbs,
    record_of,
)
from evaluation.ladder_tables import as_markdown, as_text
from evaluation.student import Student, look_up
from evaluation.system import answer_questions

SEES = {"depth": "depth", "light": "rgb"}  # --ladder -> modality of the systems on it
# What nothing reads where no system is scored.
SCORING_FLAGS = ("ladder", "kinds", "image_tokens", "batch_size", "max_new_tokens", "num_workers", "precision")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_ladder_flags(parser)
    add_running_flags(parser)
    args = parser.parse_args(argv)
    if not (args.systems or args.earlier):
        parser.error("give a checkpoint, a run or an export to score, or --with an earlier call's folder")
    if args.names and len(args.names) != len(args.systems):
        parser.error(f"--names: {len(args.names)} names for {len(args.systems)} systems; give one for each")
    for name in SCORING_FLAGS if not args.systems else ():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name}: nothing is scored here; leave it out")
    args.output = args.output or outputs_root(ROOT / "evaluation") / "results" / f"robustness_{args.gts_type}"
    if args.output.resolve() in [folder.resolve() for folder in args.earlier]:
        parser.error(f"--with {args.output}: is the --output, too; give another --output")
    return args


def add_ladder_flags(parser: argparse.ArgumentParser) -> None:
    """Which systems, and what gets worse."""
    add = parser.add_argument
    add(
        "systems", nargs="*", metavar="CKPT", help="checkpoints, runs' folders or names, exports, or stock models (RGB)"
    )
    add("--names", nargs="+", default=[], help="names of these systems in tables and plots (experiment and run)")
    add(
        "--with",
        dest="earlier",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="--output folders of earlier calls whose systems go into the tables and plots, too",
    )
    add("--baseline", help="name of the system that others of its modality are compared with (none)")
    add("--ladder", choices=tuple(SEES), help="what gets worse (what each system sees)")
    add(
        "--kinds",
        nargs="+",
        choices=(*DEPTH_LADDER, *LIGHT_LADDER),
        metavar="KIND",
        help="only these kinds of degradation, each for the systems that it is about "
        f"({', '.join((*DEPTH_LADDER, *LIGHT_LADDER))})",
    )
    add("--gts_type", choices=("val", "test"), default="test", help="split to score (%(default)s)")
    add("--n_images", type=at_least(1), help="only so many images, evenly spread over the split (all)")
    add("--miniature", action="store_true", help="use the built-in world, also for stock models")


def add_running_flags(parser: argparse.ArgumentParser) -> None:
    """How systems are scored, and what is written."""
    add = parser.add_argument
    add("--image_tokens", choices=IMAGE_TOKENS, help="how a stock model's picture is cut (anyres; miniature one_tile)")
    add("--batch_size", type=at_least(1), help="images at a time, with all of their questions (1; miniature 8)")
    add("--max_new_tokens", type=at_least(1), default=32, help="length limit of an answer in tokens (%(default)s)")
    add("--num_workers", type=at_least(0), default=0, help="number of processes that load data (0 = none besides this)")
    add(
        "--precision",
        choices=("auto", "32-true", "bf16-mixed"),
        default="auto",
        help="number format of the computation; auto = bf16 on a GPU that has it",
    )
    add("--output", type=Path, help="folder for the results (evaluation/results/robustness_<split>)")


def main(args: argparse.Namespace) -> None:
    """Score every system on its ladder, write tables and plots."""
    started = time.monotonic()
    quieten()
    check_writable(args.output, "--output")
    claim(args.output, flag="--output")
    descriptions = [describe(system, args) for system in args.systems]
    names = args.names or [name for name, _ in descriptions]
    questions = Questions.read(args, miniature=one_world(args, descriptions))
    earlier = [climb for folder in args.earlier for climb in read_climbs(folder, questions.asked, questions.settings)]
    everyone = [*names, *(climb.name for climb in earlier)]
    check_names(everyone)
    if args.baseline and args.baseline not in everyone:
        raise UserError(f"--baseline {args.baseline}: no such system; there are {', '.join(everyone)}")
    args.batch_size = args.batch_size or (8 if questions.settings["miniature"] else 1)
    climbs = [climb_ladder(*system, questions, args) for system in zip(args.systems, names, strict=True)]
    write_results([*climbs, *earlier], questions, args)
    seconds, memory_gib = duration(time.monotonic() - started), round(peak_memory_gib(), 2)
    print(printable(f"took {seconds}, peak memory {memory_gib} GiB; wrote {args.output}"))


def describe(system: str, args: argparse.Namespace) -> tuple[str, bool | None]:
    """The default name of a system, and whether it is of the built-in world; None for a stock model.

    Raises:
        UserError: there is no such system, it sees nothing that could get worse, or not what --ladder or --kinds say.
    """
    images, record = look_up(system, miniature=args.miniature)
    check_rungs(system, images.modality, args)
    if "run" in record:
        name = f"{Path(record['script']).parent.relative_to('distillation')} {record['run']}"
    else:
        name = Path(system).name
    return name, bool(record["miniature"]) if record else None


def one_world(args: argparse.Namespace, descriptions: Sequence[tuple[str, bool | None]]) -> bool:
    """Whether the systems are scored on the built-in world. Raises UserError when they are not all of the same one."""
    worlds = {name: miniature for name, miniature in descriptions if miniature is not None}
    if len(set(worlds.values())) > 1 or (args.miniature and False in worlds.values()):
        own = [name for name, miniature in worlds.items() if miniature]
        other = [name for name, miniature in worlds.items() if not miniature]
        raise UserError(
            f"{other[0]}: is not of the built-in world, {own[0] if own else '--miniature'} is: their ladders would "
            "differ; score them apart"
        )
    return args.miniature or any(worlds.values())


@dataclass(frozen=True)
class Questions:
    """What all systems are asked."""

    root: Path
    settings: dict[str, Any]  # that decide which questions and pictures these are
    rows: list[QuestionRow]
    train_rows: list[dict[str, str]]  # to fit the baselines without an image on
    asked: Asked

    @classmethod
    def read(cls, args: argparse.Namespace, *, miniature: bool) -> "Questions":
        """The questions of the split, or of --n_images of its images. Raises UserError: the data is not there."""
        root = data_root(miniature)
        if miniature:
            ensure_world(root)
        groups = group_by_image(read_questions(questions_file(root, args.gts_type), root=root))
        n = min(args.n_images or len(groups), len(groups))
        rows = [row for i in range(n) for row in groups[i * len(groups) // n]]
        train_rows = [csv_cells(row) for row in read_questions(questions_file(root, "train"))]
        settings = {"miniature": miniature, "split": args.gts_type, "images": n}
        settings |= {"code of pictures": source_digest(ROOT / "dataset" / "inputs")[:16]}
        return cls(root, settings, rows, train_rows, Asked.of(rows, miniature=miniature))


def check_rungs(system: str, modality: str, args: argparse.Namespace) -> None:
    """Raise UserError when a system sees nothing that could get worse, or not what --ladder or --kinds are about."""
    if modality not in LADDERS:
        raise UserError(f"{system}: sees no picture, so nothing can get worse for it; leave it out")
    if args.ladder and SEES[args.ladder] != modality:
        raise UserError(f"--ladder {args.ladder}: {system} sees {modality}; leave one of the two out")
    if len(chosen_rungs(modality, args.kinds)) == 1:
        raise UserError(
            f"--kinds {' '.join(args.kinds)}: none of them is about {modality}, which {system} sees; choose of "
            f"{', '.join(LADDERS[modality])}"
        )


def climb_ladder(system: str, name: str, questions: Questions, args: argparse.Namespace) -> Climb:
    """Ask a system all questions on every rung; what it has answered already is read from the output folder."""
    image_tokens = args.image_tokens
    student = Student.load(
        system, precision=args.precision, image_tokens=image_tokens, miniature=questions.settings["miniature"]
    )
    rungs, rows, root = chosen_rungs(student.images.modality, args.kinds), questions.rows, questions.root
    folder = args.output / "answers" / folder_name(name)
    check_results_room(folder, rows * len(rungs), args.max_new_tokens)
    model, processor, images = student.model, student.processor, student.images
    asked = asked_of(model, processor, rows, images, args, root=root, split=args.gts_type)
    column = questions.asked.columns[questions.asked.main_column]
    right, started = {}, time.monotonic()
    for number, rung in enumerate(rungs, 1):
        log = AnswerLog(folder / str(rung).replace(" ", "_"), asked | {"degradation": str(rung)}, rows)
        degradation = None if rung == CLEAN else rung
        answers = answer_questions(model, processor, root, rows, images, args, log, degradation)
        right[rung] = questions.asked.right([answers[row.id].text for row in rows])
        left = duration((time.monotonic() - started) / number * (len(rungs) - number))
        share = right[rung][column].mean()
        print(printable(f"{name}, {rung}: {share:.3f}; rung {number} of {len(rungs)}, {left} left"), flush=True)
    return Climb(name, student.name, images.modality, right)


def write_results(climbs: Sequence[Climb], questions: Questions, args: argparse.Namespace) -> None:
    """Write tables and plots. Raises UserError when two systems that see the same stand on different rungs."""
    check_same_ladder(climbs)
    asked = questions.asked
    baseline = next((climb for climb in climbs if climb.name == args.baseline), None)
    blind = best_blind(asked, questions.rows, questions.train_rows)
    record = {
        "date": str(date.today()),
        "commit": git_commit(),
        "settings": questions.settings,
        "questions": {"digest": asked.digest, "n_questions": len(asked.answers), "n_images": asked.n_images},
        "ladders": LADDERS,
        "baseline": args.baseline,
        "blind": blind,
        "systems": [record_of(climb, asked, baseline_of(climb, baseline)) for climb in climbs],
        "crossings": light_crossings(climbs, asked),
    }
    write_json(args.output / RECORD, record)
    write_rows(args.output / "robustness.csv", record)
    with atomic_path(args.output / "table.md") as part:
        part.write_text(as_markdown(record, asked.main_column), encoding="utf-8")
    print(as_text(record, asked.main_column))
    level = blind["accuracy"][asked.main_column]["value"]
    draw_curves(climbs, asked, level, args.output / "curves.png")
    if record["crossings"]:
        draw_light(climbs, asked, level, args.output / "light.png")


def baseline_of(climb: Climb, baseline: Climb | None) -> Climb | None:
    """The system that this one is compared with: the baseline, where it sees the same."""
    return baseline if baseline is not None and baseline.modality == climb.modality else None


def light_crossings(climbs: Sequence[Climb], asked: Asked) -> list[dict[str, Any]]:
    """At which exposure each depth system overtakes each RGB system."""
    return [
        {"rgb": light.name, "depth": depth.name, "exposure": crossings(light, depth, asked, asked.main_column)}
        for light in climbs
        for depth in climbs
        if light.modality == "rgb" and depth.modality == "depth"
    ]


def write_rows(path: Path, record: Mapping[str, Any]) -> None:
    """robustness.csv: a row per system, degradation, severity and question type."""
    columns = "system modality degradation severity type accuracy low high difference difference_low difference_high"
    with atomic_path(path) as part, open(part, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(columns.split())
        for system in record["systems"]:
            for rung in system["rungs"]:
                for kind, cell in rung["accuracy"].items():
                    rest = cell.get("difference", ("", "", ""))
                    numbers = (cell["value"], cell["low"], cell["high"], *rest)
                    where = (system["name"], system["modality"], rung["kind"], f"{rung['severity']:g}", kind)
                    writer.writerow([*where, *("" if n in ("", None) else f"{n:.4f}" for n in numbers)])


if __name__ == "__main__":
    run_script(main, parse_args)
