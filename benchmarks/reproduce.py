"""What the README claims about distillation, from nothing: train every arm over several seeds, write the tables.

All arms of a seed start from the same student and see as many images in as many optimizer steps, with the same precision, batch
size and schedule rules; they differ in the loss, in what they may read, and in learning rates, which were chosen on val
for each of them. A seed decides the order of the data, which labels
are kept, and the student's start (the shipped weights with 2 % of noise). Choices were made on the validation split; the tables
show the test split. What is finished is kept: an interrupted call goes on where it was.

Writes  <output>/runs.json, a record per arm, label fraction and seed; <output>/README.md, the tables

    make reproduce
    python benchmarks/reproduce.py [--seeds 5] [--work DIR] [--output benchmarks/reproduce]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, duration, git_commit, run_script, write_json  # first: loads .env

# isort: split
import argparse
import gc
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import t as student_t

from dataset.processor import load_processor, save_processor
from distillation.models import MINIATURE_STUDENT, load_model
from evaluation.metrics import QUESTION_TYPES

EPOCHS = 5  # of 5,000 images in batches of 8: 3,125 optimizer steps, whatever the arm
FRACTIONS = (1.0, 0.1, 0.05)
TROUBLE = "knowledge_distillation7b_double_trouble"
TUNED_TEACHER = [
    "--teacher_checkpoint",
    "miniature_teacher",
]  # where labels are scarce, the stock one: it has read none
ASK = ["--teacher_questions", "8"]
CONTROL, CONTROL_SCRIPT = "label-only", "baseline_depth"
START_NOISE = 0.02


@dataclass(frozen=True)
class Stage:
    """One training script of an arm."""

    script: str  # folder below distillation/
    epochs: int
    flags: tuple[str, ...] = ()
    labels: bool = True  # whether it reads gold answers; without them label fractions share it

    def but(self, *flags: str) -> "Stage":
        """The same with further flags."""
        return replace(self, flags=self.flags + flags)


THREE_PHASES = (
    Stage(f"{TROUBLE}/phase1", 2, labels=False),
    Stage(f"{TROUBLE}/phase2", 1, tuple(ASK)),
    Stage(f"{TROUBLE}/phase3", 2, tuple(ASK)),
)
ARMS = {  # name -> stages; the first is what all others are measured against
    CONTROL: (Stage(CONTROL_SCRIPT, EPOCHS),),
    "double trouble": THREE_PHASES,
}
JOINT = Stage(f"{TROUBLE}/phase3", EPOCHS, ("--from_stock", "--vision_lr", "2.5e-4"))  # the rates of the control
FULL_LABEL_ARMS = {  # with all labels only: each term added to those before it, the phases, the other strategies
    "CE + KL (logit-based, gold questions only)": (Stage("knowledge_distillation7b_logit_based", EPOCHS),),
    "CE + LoCa": (JOINT.but("--patch_weight", "0", "--contrastive_weight", "0"),),
    "CE + LoCa + InfoNCE": (JOINT.but("--patch_weight", "0"),),
    "CE + LoCa + InfoNCE + patches": (JOINT,),
    "the same with teacher questions": (JOINT.but(*ASK),),
    "double trouble, gold questions only": tuple(
        Stage(stage.script, stage.epochs, labels=stage.labels) for stage in THREE_PHASES
    ),
    "logit-based": (Stage("knowledge_distillation7b_logit_based", EPOCHS, tuple(ASK)),),
    "feature-based": (Stage("knowledge_distillation7b_feature_based", EPOCHS, tuple(ASK)),),
    "feature-based, gold questions only": (Stage("knowledge_distillation7b_feature_based", EPOCHS),),
}
FULL_LABEL_SEEDS = 1  # what they cost in all seeds would not fit into three hours


def load_script(path: str):
    """A training or evaluation script as a module: nothing runs at import."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_once(script: str, argv: Sequence[str], work: Path, *, name: str) -> Path:
    """Train unless this run is finished already; returns its checkpoints folder."""
    folder = work / script / "checkpoints" / f"miniature_{name}"
    record = logs_of(folder) / "run.json"
    if record.is_file() and "best" in json.loads(record.read_text(encoding="utf-8")):
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # a run is minutes: an unfinished one starts again
    (path,) = (ROOT / "distillation" / script).glob("train*.py")
    module = load_script(path.relative_to(ROOT).as_posix())
    print(f"--- {script} {name}", flush=True)
    module.main(module.parse_args(["--miniature", "--run_name", name, *argv]))
    gc.collect()
    return folder


def logs_of(checkpoints: Path) -> Path:
    """The folder with the logs of the run whose checkpoints are here."""
    return checkpoints.parents[1] / "tensorboard_logs" / checkpoints.name


def evaluate(checkpoint: Path, output: Path) -> dict[str, Any]:
    """Test accuracies of a checkpoint: `metrics.json` of the evaluation script."""
    if not (output / "metrics.json").is_file():
        script = load_script("evaluation/onevisionv3/sunrgbd/evaluate_onevision.py")
        script.main(script.parse_args(["--miniature", "--ckpt_path", str(checkpoint), "--output", str(output)]))
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))


def scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy by depth, overall and per type."""
    cells = {"By depth": metrics["depth_answerable"], "Overall": metrics["overall"]} | metrics["per_type"]
    return {name: cell["exact_match"]["value"] for name, cell in cells.items()}


def student_start(work: Path, seed: int) -> Path:
    """The shipped student with noise on every weight: another start for every seed."""
    folder = work / "students" / f"seed{seed}"
    if not (folder / "model.safetensors").is_file():
        model = load_model(MINIATURE_STUDENT)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 1 + START_NOISE * torch.randn(weight.shape, generator=generator)
        model.save_pretrained(folder)
        save_processor(load_processor(MINIATURE_STUDENT), folder)
    return folder


def stage_flags(stage: Stage, *, fraction: float, seed: int) -> list[str]:
    """A stage's command line but for its student and the checkpoint that it starts from."""
    flags = ["--max_epochs", str(stage.epochs), "--seed", str(seed), *stage.flags]
    flags += ["--label_fraction", str(fraction)] * stage.labels
    return flags + (TUNED_TEACHER if stage.script != CONTROL_SCRIPT and fraction == 1 else [])


def file_name(arm: str) -> str:
    """An arm's name as a part of file names."""
    return "".join(c if c.isalnum() or c in "-+" else "_" for c in arm)


def run_arm(name: str, stages: Sequence[Stage], *, fraction: float, seed: int, work: Path) -> dict[str, Any]:
    """Train the stages of an arm one after the other and score its end on the test split."""
    start, seconds = None, time.monotonic()
    for stage in stages:
        shared = f"all_seed{seed}" if fraction == 1 else f"stock_teacher_seed{seed}"
        run_name = f"{file_name(name)}_{fraction}_seed{seed}" if stage.labels else shared
        argv = stage_flags(stage, fraction=fraction, seed=seed) + ["--student_name", str(student_start(work, seed))]
        argv += ["--load_checkpoint", str(start)] if start else []
        start = run_once(stage.script, argv, work, name=run_name)
    results = work / "results" / f"{file_name(name)}_{fraction}_seed{seed}"
    (best,) = start.glob("best-*.ckpt")
    found = scores(evaluate(best, results / "best"))
    if name == CONTROL:  # early stopping or not, whichever turns out better for it
        found = max(found, scores(evaluate(start / "last.ckpt", results / "last")), key=lambda s: s["By depth"])
    found["Val"] = json.loads((logs_of(start) / "run.json").read_text(encoding="utf-8"))["val/exact_match"]
    return {
        "arm": name,
        "fraction": fraction,
        "seed": seed,
        "flags": [stage_flags(stage, fraction=fraction, seed=seed) for stage in stages],
        "commit": git_commit(),
        "seconds": time.monotonic() - seconds,
        "scores": found,
    }


def table(runs: Sequence[Mapping[str, Any]], fraction: float) -> list[str]:
    """Markdown rows: mean and standard deviation over seeds, paired difference from the control with its 95 % interval."""
    columns = ["By depth", "Overall", *QUESTION_TYPES, "Val"]
    lines = [
        f"| {100 * fraction:g} % of the labels | {' | '.join(c.removesuffix(' Identification') for c in columns)} | "
        "Gain by depth | Gain overall |",
        "| --- |" + " ---: |" * (len(columns) + 2),
    ]
    chosen = [run for run in runs if run["fraction"] == fraction]
    control = {run["seed"]: run["scores"] for run in chosen if run["arm"] == CONTROL}
    for arm in dict.fromkeys(run["arm"] for run in chosen):
        own = {run["seed"]: run["scores"] for run in chosen if run["arm"] == arm}
        cells = [spread([100 * found[column] for found in own.values()]) for column in columns]
        gains = [interval(gain(own, control, column)) if arm != CONTROL else "" for column in ("By depth", "Overall")]
        lines.append(f"| {arm} | {' | '.join([*cells, *gains])} |")
    return lines


def gain(
    own: Mapping[int, Mapping[str, float]], control: Mapping[int, Mapping[str, float]], column: str
) -> list[float]:
    """What an arm has more than the control, in points, seed by seed."""
    return [100 * (own[seed][column] - control[seed][column]) for seed in own if seed in control]


def gain_table(runs: Sequence[Mapping[str, Any]], arm: str) -> list[str]:
    """Markdown rows: an arm's gain for every type of question and share of labels."""
    lines = [
        "| Gain | " + " | ".join(kind.removesuffix(" Identification") for kind in QUESTION_TYPES) + " |",
        "| --- |" + " ---: |" * len(QUESTION_TYPES),
    ]
    for fraction in FRACTIONS:
        scores_of = {
            name: {r["seed"]: r["scores"] for r in runs if r["arm"] == name and r["fraction"] == fraction}
            for name in (arm, CONTROL)
        }
        if scores_of[arm]:
            cells = [interval(gain(scores_of[arm], scores_of[CONTROL], kind)) for kind in QUESTION_TYPES]
            lines.append(f"| {100 * fraction:g} % of the labels | {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def interval(values: Sequence[float]) -> str:
    """Mean with the 95 % interval of Student's t over seeds."""
    if len(values) < 2:
        return f"{mean(values):+.1f}"
    half = student_t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):+.1f} [{mean(values) - half:+.1f}, {mean(values) + half:+.1f}]"


def write_tables(output: Path, runs: Sequence[Mapping[str, Any]], teacher: Mapping[str, Any], seconds: float) -> None:
    """The tables with what they are about; and runs.json, from which they can be made again."""
    blind = max(scores(found)["By depth"] for found in teacher["blind"].values())
    ceiling = scores(teacher)["By depth"]
    text = [
        "# Distillation on the miniature world",
        "",
        f"{date.today()}, commit {', '.join(sorted({run['commit'] for run in runs}))}, {torch.get_num_threads()} CPU threads, {duration(seconds)} in all. Share of right answers "
        f"in % on the test split, mean ± standard deviation over seeds; gain: paired difference from {CONTROL} of the same seed and "
        f"labels, with the 95 % interval over seeds. All arms of a table see as many images in as many optimizer steps. By depth: all "
        f"questions but those about colour; val: overall, on the split on which choices were made. The RGB teacher was tuned on all labels of the training set and has {100 * ceiling:.1f} by depth, "
        f"the best blind baseline {100 * blind:.1f}. Where labels are scarce the stock teacher teaches, which has read none of "
        f"this data set's. One teacher serves all seeds. Questions to the teacher are about the true scenes and use the "
        f"templates of the test questions.",
        "",
    ]
    for fraction in FRACTIONS:
        text += [*table(runs, fraction), ""]
    text += ["Double trouble against label-only training, type by type:", "", *gain_table(runs, "double trouble"), ""]
    done = [run["scores"]["By depth"] for run in runs if run["arm"] == "double trouble" and run["fraction"] == 1.0]
    share = 100 * (mean(done) - blind) / (ceiling - blind)
    text += [f"With all labels, double trouble closes {share:.0f} % of the gap between blind and the RGB teacher.", ""]
    (output / "README.md").write_text("\n".join(text), encoding="utf-8")
    write_json(output / "runs.json", {"runs": list(runs), "teacher": scores(teacher), "blind": blind})


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="repetitions of every arm")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "benchmarks" / "reproduce.work", help="checkpoints and results"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "reproduce", help="tables")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: give at least 1")
    return args


def main(args: argparse.Namespace) -> None:
    """Seed by seed, so that an interrupted study has whole comparisons."""
    started, work = time.monotonic(), args.work.resolve()
    os.environ["MAIN_ROOT_DATA_DIR"] = str(work)  # apart from the user's own runs
    folder = run_once("baseline_rgb7b", [], work, name="teacher")
    (best,) = folder.glob("best-*.ckpt")
    teacher = evaluate(best, work / "results" / "teacher")
    runs = []
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        jobs = [(name, stages, fraction) for fraction in FRACTIONS for name, stages in ARMS.items()]
        jobs += [(name, stages, 1.0) for name, stages in FULL_LABEL_ARMS.items()] * (seed < FULL_LABEL_SEEDS)
        for name, stages, fraction in jobs:
            path = work / "results" / f"{file_name(name)}_{fraction}_seed{seed}.json"
            if not path.is_file():
                write_json(path, run_arm(name, stages, fraction=fraction, seed=seed, work=work))
            runs.append(json.loads(path.read_text(encoding="utf-8")))
            if runs[-1]["flags"] != [stage_flags(stage, fraction=fraction, seed=seed) for stage in stages]:
                raise UserError(f"{path}: was made with other flags; start over with another --work, or remove {work}")
        seconds = sum(run["seconds"] for run in runs)
        write_tables(args.output, runs, teacher, seconds)
        print(f"seed {seed}: {len(jobs)} arms done, {duration(time.monotonic() - started)} so far", flush=True)
    print((args.output / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_script(main, parse_args)
