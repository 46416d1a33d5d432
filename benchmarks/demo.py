"""From rendered pictures to compared systems on the built-in world, in minutes on a laptop: what `make demo` runs.

Renders the world and trains the teacher; then trains the baselines and, beside them, the three phases of the
distillation, each on its share of the cores; scores all systems on the test split and compares them; shows what worse
depth and less light do to them. Every command is printed before it runs: each of them can be given by hand.

Writes  <output>/ with the table, pictures and a folder per system; the runs below distillation/ as always

    make demo
    python benchmarks/demo.py [--output demo]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import duration, run_script  # first: loads .env

# isort: split
import argparse
import shutil
import time
from collections.abc import Sequence
from datetime import datetime

from benchmarks.processes import Task, run_side_by_side
from distillation.run.folders import experiment_folder
from evaluation.answer_log import remove_results

ROBUSTNESS = "evaluation/robustness.py"
TROUBLE = "knowledge_distillation7b_double_trouble"
EVALUATE = "evaluation/onevisionv3/sunrgbd/evaluate_onevision.py"
SYSTEMS = {  # name in the tables -> results folder, and whose checkpoint
    "RGB teacher": ("rgb_teacher", "baseline_rgb7b"),
    "RGB student": ("rgb_student", "baseline_rgb05b"),
    "depth student, distilled": ("distilled", "double_trouble"),
    "depth student, labels only": ("depth_student", "baseline_depth"),
}
CONTROL = "depth student, labels only"
LADDERS = {"depth": ("holes", "resolution", "range_cut"), "RGB": ("light_gain",)}  # part of a system's name -> kinds
LADDER_IMAGES = 150


def training(title: str, script: str, *flags: str) -> Task:
    """Train by a script of distillation/."""
    return Task(title, (f"distillation/{script}", *flags))


def evaluation(name: str, run: str, output: Path) -> Task:
    """Score a system's run on the test split."""
    folder, experiment = SYSTEMS[name]
    phase = ("--phase_no", "3") * (experiment == "double_trouble")
    flags = (
        "--miniature",
        "--kd_model_type",
        experiment,
        *phase,
        "--ckpt_path",
        run,
        "--name",
        name,
        "--output",
        str(output / folder),
    )
    return Task(f"score the {name}", (EVALUATE, *flags))


def comparison(output: Path) -> Task:
    """Put all scored systems side by side."""
    folders = [str(output / folder) for folder, _ in SYSTEMS.values()]
    flags = ("--baseline", CONTROL, "--robustness", str(output / "ladder"), "--miniature", "--output", str(output))
    return Task("comparison", ("evaluation/compare.py", *folders, *flags))


def ladders(run: str, output: Path) -> tuple[list[list[Task]], Task]:
    """Worse depth for the depth systems and less light for the RGB ones, side by side; then all in one plot."""
    folders = {kind: output / "ladder" / kind for kind in LADDERS}
    flags = ("--n_images", str(LADDER_IMAGES), "--miniature")
    climbs = []
    for kind, kinds in LADDERS.items():
        names = [name for name in SYSTEMS if name.startswith(kind)]
        runs = [str(experiment_folder(SYSTEMS[name][1]) / "checkpoints" / f"miniature_{run}") for name in names]
        rest = ("--names", *names, "--kinds", *kinds, *flags, "--output", str(folders[kind]))
        climbs.append([Task(f"{kind} gets worse", (ROBUSTNESS, *runs, *rest))])
    rest = ("--with", *map(str, folders.values()), "--baseline", CONTROL, *flags, "--output", str(output / "ladder"))
    return climbs, Task("all on the ladder", (ROBUSTNESS, *rest))


def chains(run: str, output: Path) -> tuple[list[Task], list[Task], list[Task]]:
    """Three chains of steps: one that both others need, the baselines, and the phases of the distillation."""
    miniature = ("--miniature", "--run_name", run)
    taught = (*miniature, "--max_epochs", "1", "--teacher_checkpoint", run)
    further = (*taught, "--teacher_questions", "8", "--load_checkpoint", run)
    half = ("--max_epochs", "1", "--subset_percentage", "0.5")
    first = [
        Task("world", ("dataset/miniature/world.py",)),
        training("RGB teacher", "baseline_rgb7b/train2.py", *miniature),
    ]
    baselines = [
        training("labels only", "baseline_depth/train.py", *miniature, "--max_epochs", "3"),
        training("RGB student", "baseline_rgb05b/train.py", *miniature, *half),
        *(evaluation(name, run, output) for name in (CONTROL, "RGB student", "RGB teacher")),
    ]
    phases = [
        training("phase 1", f"{TROUBLE}/phase1/train_online_kd.py", *taught),
        training("phase 2", f"{TROUBLE}/phase2/train_online_kd.py", *further),
        training("phase 3", f"{TROUBLE}/phase3/train_online_kd.py", *further),
        evaluation("depth student, distilled", run, output),
    ]
    return first, baselines, phases


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "demo", help="folder for tables and pictures (demo/)")
    args = parser.parse_args(argv)
    args.output = args.output.resolve()
    return args


def main(args: argparse.Namespace) -> None:
    """Run all steps of the demo, and say how long they took."""
    started = time.monotonic()
    for folder, _ in SYSTEMS.values():  # of an earlier demo
        remove_results(args.output / folder)
    for kind in LADDERS:  # answers of the models of an earlier demo
        shutil.rmtree(args.output / "ladder" / kind / "answers", ignore_errors=True)
    run = f"demo_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    first, baselines, phases = chains(run, args.output)
    climbs, together = ladders(run, args.output)
    run_side_by_side([first], 1)
    run_side_by_side([baselines, phases], 2)
    run_side_by_side(climbs, 2)
    run_side_by_side([[together, comparison(args.output)]], 1)
    print(f"the demo took {duration(time.monotonic() - started)}")


if __name__ == "__main__":
    run_script(main, parse_args)
