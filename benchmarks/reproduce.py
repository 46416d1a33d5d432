"""The study behind the README's claims about distillation: train every variant over several seeds, write the tables.

A variant is a way to train a student, for instance label-only or double trouble. All variants of a seed start from the
same student and see as many images in as many optimizer steps, with the same precision, batch size and rules for the
schedule. They differ in the loss, in the labels that they may read, and in their learning rates. Rates come from
`reproduce/rates.json`, which `rates.py` writes after the same search on the validation split for every system; without
that file they are the defaults of the scripts. A seed decides the order of the data, which labels are kept, and the
student's start (the shipped weights with 2 % of noise). All choices were made on the validation split; the tables show
the test split. Their intervals resample seeds and recordings of test questions, both at once.

Finished runs are kept: an interrupted call goes on where it was. The models are tiny and leave most of a machine idle,
so runs go side by side, each on its own share of the cores.

Writes  <output>/runs.json      a record per run, which is a variant with a share of the labels and a seed
        <output>/answers.npz    which test questions each run answered right
        <output>/README.md      the tables
        <work>/logs/            what each run printed

    make reproduce
    python benchmarks/reproduce.py [--seeds 5] [--jobs N] [--work DIR] [--output benchmarks/reproduce]
    python benchmarks/reproduce.py --variant "double trouble" --fraction 0.1 --seed 3     # one run only
    python benchmarks/reproduce.py --tables     # the tables again, from runs.json and answers.npz alone
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import (  # first: loads .env
    UserError,
    at_least,
    available_cores,
    data_root,
    duration,
    git_commit,
    load_script,
    locked,
    run_script,
    write_json,
)

# isort: split
import argparse
import csv
import gc
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.util import find_spec
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from benchmarks.answers import Answers, digest
from benchmarks.arms import (
    ALL_VARIANTS,
    COMPARISONS,
    CONTROL,
    DEGRADATION,
    DEGRADED_VARIANTS,
    FEW_SEEDS,
    FOUR_BITS_VARIANTS,
    FRACTIONS,
    FULL_LABEL_VARIANTS,
    LONG_ON_LADDER,
    LONG_VARIANTS,
    ON_LADDER,
    TEACHERS,
    VARIANTS,
    Stage,
    ladder_kinds,
)
from benchmarks.ladder_report import ladder_tables, rung_name
from benchmarks.processes import Task, run_side_by_side
from dataset.inputs.degradations import DEPTH_LADDER, LADDERS, TRAINED, Degradation
from dataset.inputs.processor import load_processor, save_processor
from dataset.questions.answers import exact_match
from dataset.questions.blind import blind_predictions
from dataset.questions.rows import QUESTION_TYPES, csv_cells
from distillation.models import MINIATURE_STUDENT, MINIATURE_TEACHER, load_model
from evaluation.comparison import load_results, short_type
from evaluation.inputs import load_questions, load_train_questions
from evaluation.ladder import chosen_rungs, pack, unpack

RATES = ROOT / "benchmarks" / "reproduce" / "rates.json"  # the learning rates of every system, written by rates.py
EVALUATION = "evaluation/onevisionv3/sunrgbd/evaluate_onevision.py"
ROBUSTNESS = "evaluation/robustness.py"
START_NOISE = 0.02
# Seconds on one core of the machine of benchmarks/README.md: of an epoch, by system; more of one on degraded depth; of
# scoring; of a rung of the ladder.
EPOCH_SECONDS = {
    "label-only": 60,
    "RGB student": 55,
    "phase 1": 55,
    "phase 2": 75,
    "phase 3": 105,
    "joint": 75,
    "logit-based": 80,
    "feature-based": 75,
}
DEGRADED_SECONDS, SCORE_SECONDS, RUNG_SECONDS = 35, 25, 6
MOST_JOBS = 4  # default of --jobs on a machine with more cores: each run takes a GiB of memory


@dataclass(frozen=True)
class Job:
    """One run of the study: a variant with a share of the labels and a seed."""

    variant: str
    fraction: float
    seed: int

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of its variant, in their order."""
        return ALL_VARIANTS[self.variant]

    @property
    def name(self) -> str:
        """The run's name in file names."""
        return f"{file_name(self.variant)}_{self.fraction}_seed{self.seed}"

    def record_path(self, work: Path) -> Path:
        """The file that its record is written to when it is done."""
        return work / "results" / f"{self.name}.json"

    def task(self, work: Path) -> Task:
        """The command of this script that trains and scores this run alone."""
        flags = (
            "--variant",
            self.variant,
            "--fraction",
            str(self.fraction),
            "--seed",
            str(self.seed),
            "--work",
            str(work),
        )
        title = f"{self.variant}, {100 * self.fraction:g} % of the labels, seed {self.seed}"
        return Task(title, (__file__, *flags), work / "logs" / f"{self.name}.txt")


def training_script(folder: str):
    """Import the training script of a folder below distillation/."""
    (path,) = (ROOT / "distillation" / folder).glob("train*.py")
    return load_script(path.relative_to(ROOT).as_posix())


def run_once(script: str, argv: Sequence[str], work: Path, *, name: str) -> Path:
    """Train unless this run is finished already, and return its checkpoints folder.

    Processes that need the same run, for instance a first phase, wait for each other.
    """
    folder = work / script / "checkpoints" / f"miniature_{name}"
    record = logs_of(folder) / "run.json"
    with locked(work / "locks" / script / name):
        if record.is_file() and "best" in json.loads(record.read_text(encoding="utf-8")):
            return folder
        shutil.rmtree(folder, ignore_errors=True)  # a run takes minutes: an unfinished one starts again
        module = training_script(script)
        print(f"--- {script} {name}", flush=True)
        module.main(module.parse_args(["--miniature", "--run_name", name, *argv]))
        gc.collect()
    return folder


def tuned_teacher(work: Path, name: str = "teacher") -> Path:
    """Train one of `TEACHERS` unless that is done already, and return its checkpoints folder."""
    return run_once("baseline_rgb7b", TEACHERS[name], work, name=name)


def logs_of(checkpoints: Path) -> Path:
    """The folder with a run's logs, by the folder with its checkpoints."""
    return checkpoints.parents[1] / "tensorboard_logs" / checkpoints.name


def evaluate(system: Sequence[str], output: Path) -> dict[str, Any]:
    """Score a system on the test split unless that is done already.

    Args:
        system: the flags of the evaluation script that name it.
        output: results folder.

    Returns:
        The content of its `metrics.json`.
    """
    if not (output / "metrics.json").is_file():
        script = load_script(EVALUATION)
        script.main(script.parse_args(["--miniature", *system, "--output", str(output)]))
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))


def scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy by depth, overall and per type."""
    cells = {"By depth": metrics["depth_answerable"], "Overall": metrics["overall"]} | metrics["per_type"]
    return {name: cell["exact_match"]["value"] for name, cell in cells.items()}


def student_start(work: Path, seed: int) -> Path:
    """Save the shipped student with noise on every weight, another start for every seed, and return its folder."""
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


def rate_flags(system: str) -> list[str]:
    """The learning rates that were chosen for a system, as flags; none before the search: the script has defaults."""
    if not RATES.is_file():
        return []
    chosen = json.loads(RATES.read_text(encoding="utf-8"))["systems"][system]["chosen"]
    return [text for name, value in chosen.items() for text in (f"--{name}", f"{value:g}")]


def fixed_flags(stage: Stage, fraction: float, seed: int) -> list[str]:
    """A stage's command line without its learning rates, its student and the checkpoint that it starts from."""
    # A run may have one core only: there a loading process would slow the training down.
    flags = ["--max_epochs", str(stage.epochs), "--seed", str(seed), "--num_workers", "0", *stage.flags]
    flags += ["--label_fraction", str(fraction)] * stage.labels
    tuned = stage.teacher and fraction == 1
    return flags + (["--teacher_checkpoint", f"miniature_{stage.teacher}"] if tuned else [])


def stage_flags(stage: Stage, job: Job) -> list[str]:
    """A stage's command line without its student and the checkpoint that it starts from."""
    return fixed_flags(stage, job.fraction, job.seed) + rate_flags(stage.system)


def file_name(name: str) -> str:
    """A variant's or system's name, as a part of file names."""
    return "".join(c if c.isalnum() or c in "-+" else "_" for c in name)


def train_stages(job: Job, work: Path) -> Path:
    """Train the stages of a run one after the other, and return the checkpoints folder of the last one."""
    checkpoints = None
    for stage in job.stages:
        if stage.teacher:
            tuned_teacher(work, stage.teacher)
        argv = [*stage_flags(stage, job), "--student_name", str(student_start(work, job.seed))]
        argv += ["--load_checkpoint", str(checkpoints)] if checkpoints else []
        checkpoints = run_once(stage.script, argv, work, name=job.name if stage.labels else shared_name(stage, job))
    return checkpoints


def shared_name(stage: Stage, job: Job) -> str:
    """The name of a run that reads no labels: the same for all variants and shares of labels that need it."""
    teacher = stage.teacher if job.fraction == 1 else "stock_teacher"
    return file_name(" ".join([f"{teacher}_seed{job.seed}_{stage.epochs}_epochs", *stage.flags]))


def score_run(job: Job, checkpoints: Path, work: Path) -> tuple[dict[str, float], Path, Path]:
    """Score the best checkpoint of a run on the test split: its accuracies, its results folder and the checkpoint."""
    folder = work / "results" / job.name / "best"
    (best,) = checkpoints.glob("best-*.ckpt")
    found = scores(evaluate(["--ckpt_path", str(best)], folder))
    if job.variant.startswith(CONTROL):  # in its favor: its last checkpoint is scored, too, and the better one counts
        last = checkpoints / "last.ckpt"
        also = scores(evaluate(["--ckpt_path", str(last)], folder.with_name("last")))
        if also["By depth"] > found["By depth"]:
            return also, folder.with_name("last"), last
    return found, folder, best


def climb(checkpoint: Path, name: str, work: Path, kinds: Sequence[str]) -> dict[str, str]:
    """What a checkpoint answers right on every rung of these kinds, packed, by the rung's name."""
    output = work / "results" / name / "ladder"
    script = load_script(ROBUSTNESS)
    script.main(script.parse_args([str(checkpoint), "--names", name, "--kinds", *kinds, "--output", str(output)]))
    (system,) = json.loads((output / "robustness.json").read_text(encoding="utf-8"))["systems"]
    return {str(Degradation(rung["kind"], rung["severity"])): rung["right"] for rung in system["rungs"]}


def run_job(job: Job, work: Path) -> dict[str, Any]:
    """Train a run and score it on the test split: its record."""
    started = time.monotonic()
    checkpoints = train_stages(job, work)
    found, folder, checkpoint = score_run(job, checkpoints, work)
    answers = load_results(folder)
    run = json.loads((logs_of(checkpoints) / "run.json").read_text(encoding="utf-8"))
    kinds = ladder_kinds(job.variant, job.fraction)
    return {
        "variant": job.variant,
        "fraction": job.fraction,
        "seed": job.seed,
        "flags": [stage_flags(stage, job) for stage in job.stages],
        "commit": git_commit(),
        "seconds": time.monotonic() - started,
        "threads": torch.get_num_threads(),
        "corrected": corrected_share(logs_of(checkpoints) / "metrics.csv"),
        "scores": found | {"Val": run["val/exact_match"]},
        "questions": digest(answers),
        "right": pack(answers.correct()),
        "ladder": climb(checkpoint, job.name, work, kinds) if kinds else {},
    }


def corrected_share(metrics: Path) -> float | None:
    """Mean share of gold tokens that LoCa corrected in the logged steps of the last stage; None without LoCa."""
    if not metrics.is_file():
        return None
    with open(metrics, encoding="utf-8", newline="") as handle:
        logged = [row.get("train/corrected") for row in csv.DictReader(handle)]
    return mean(map(float, found)) if (found := [value for value in logged if value]) else None


def scores_of(runs: Sequence[Mapping[str, Any]], variant: str, fraction: float) -> dict[int, dict[str, float]]:
    """A variant's accuracies by seed."""
    return {run["seed"]: run["scores"] for run in runs if (run["variant"], run["fraction"]) == (variant, fraction)}


@dataclass(frozen=True)
class Study:
    """Everything the tables are made of."""

    records: Mapping[str, Any]  # runs.json
    answers: Answers

    @property
    def runs(self) -> list[Mapping[str, Any]]:
        """The records of all runs: one per variant, share of labels and seed."""
        return self.records["runs"]

    def gain(self, own: tuple[str, float], other: tuple[str, float], column: str) -> str:
        """Points by which one variant is above another, with the interval; empty where they share no seed.

        Args:
            own: name of the variant, share of its labels.
            other: the same of the variant that it is compared with.
            column: as in `Answers.means`.
        """
        seeds = [seed for seed in scores_of(self.runs, *own) if seed in scores_of(self.runs, *other)]
        names = ([Job(*which, seed).name for seed in seeds] for which in (own, other))
        return interval(self.answers.difference(*names, column)) if seeds else ""


def table(study: Study, fraction: float) -> list[str]:
    """Markdown rows of all variants with this share of labels.

    Each has mean and standard deviation over seeds, and the paired difference from the control with its 95 % interval.
    """
    columns = ["By depth", "Overall", *QUESTION_TYPES, "Val"]
    lines = [
        f"| {100 * fraction:g} % of the labels | Seeds | {' | '.join(map(short_type, columns))} | "
        "Gain by depth | Gain overall |",
        "| --- |" + " ---: |" * (len(columns) + 3),
    ]
    for variant in dict.fromkeys(run["variant"] for run in study.runs if run["fraction"] == fraction):
        own = scores_of(study.runs, variant, fraction)
        cells = [spread([100 * found[column] for found in own.values()]) for column in columns]
        versus = ((variant, fraction), (CONTROL, fraction))
        gains = [study.gain(*versus, column) if variant != CONTROL else "" for column in ("By depth", "Overall")]
        lines.append(f"| {variant} | {len(own)} | {' | '.join([*cells, *gains])} |")
    return lines


def gain_table(study: Study, variant: str) -> list[str]:
    """Markdown rows: a variant's gain for every type of question and share of labels."""
    lines = [
        f"| Gain | {' | '.join(map(short_type, QUESTION_TYPES))} |",
        "| --- |" + " ---: |" * len(QUESTION_TYPES),
    ]
    for fraction in FRACTIONS:
        if scores_of(study.runs, variant, fraction):
            cells = [study.gain((variant, fraction), (CONTROL, fraction), kind) for kind in QUESTION_TYPES]
            lines.append(f"| {100 * fraction:g} % of the labels | {' | '.join(cells)} |")
    return lines


def comparison_table(study: Study) -> list[str]:
    """Markdown rows: what each term gains, as the difference of two variants that differ in that term alone."""
    lines = ["| What | With it | Without it | By depth | Overall |", "| --- | --- | --- | ---: | ---: |"]
    for what, own, other in COMPARISONS:
        gains = [study.gain((own, 1.0), (other, 1.0), column) for column in ("By depth", "Overall")]
        lines += [f"| {what} | {own} | {other} | {' | '.join(gains)} |"] * bool(gains[0])
    return lines


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def interval(ends: Sequence[float], *, sign: str = "+") -> str:
    """A value with its interval."""
    return "{:{sign}.1f} [{:{sign}.1f}, {:{sign}.1f}]".format(*ends, sign=sign)


def findings(study: Study) -> list[str]:
    """What no cell of a table says: how near distillation is to the teacher, and how many tokens LoCa corrected."""
    variant = "double trouble"
    whole = [Job(variant, 1.0, seed).name for seed in scores_of(study.runs, variant, 1.0)]
    way = study.answers.share_of_way(whole, "blind", "teacher", "By depth")
    lines = [
        f"- With all labels, {variant} closes {interval(way, sign='')} % of the gap between the best blind baseline "
        "and the RGB teacher, by depth."
    ]
    for fraction in FRACTIONS[1:]:
        if few := study.gain((variant, fraction), (CONTROL, 1.0), "By depth"):
            lines.append(
                f"- With {100 * fraction:g} % of the labels, {variant} is {few} points by depth from {CONTROL} with "
                "all of them."
            )
    for name in ("CE + LoCa", "CE + LoCa, weak teacher"):
        shares = [run["corrected"] for run in study.runs if run["variant"] == name and run["corrected"] is not None]
        lines += [f"- In {name}, LoCa corrected {100 * mean(shares):.1f} % of the gold tokens."] if shares else []
    return lines


def introduction(study: Study) -> str:
    """What the tables show, what their intervals vary, and what all variants share."""
    records, runs = study.records, study.runs
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    spent, threads = duration(sum(run["seconds"] for run in runs)), max(run["threads"] for run in runs)
    teacher, stock_teacher = (100 * records[name]["By depth"] for name in ("teacher", "stock_teacher"))
    rates = "[rates.md](rates.md)" if records["rates"] else "the defaults of the scripts, not searched"
    return (
        f"{records['date']}, commit {commits}; all runs took {spent} in all, each in a process with {threads} CPU "
        "thread(s). Share of right answers in % on the test split, mean ± standard deviation over seeds; gain: paired "
        f"difference from {CONTROL} of the same seed and labels. Its 95 % interval resamples seeds and recordings of "
        "test questions at once (here each picture is a recording); with one seed, recordings only. Teachers, worlds "
        "and the choice of learning rates are the same in all runs, so the interval does not include how they vary. "
        "All variants of a table see as many images in as many optimizer steps, those twice as long twice as many. By "
        "depth: all questions but those "
        "about color. Val: overall, on the validation split, where choices were made. The RGB teacher was tuned on all "
        f"labels of the training set and has {teacher:.1f} by depth, the best blind baseline "
        f"{100 * records['blind']:.1f}. With 10 % of the labels or less the stock teacher teaches, which has read none "
        f"of this data set's and has {stock_teacher:.1f}. One teacher serves all seeds; the weak one was tuned on a "
        "twentieth of the images at ten times the learning rate. Questions to the teacher are made from the true "
        f"scenes with the templates of the test questions. Learning rates: {rates}."
    )


def ladder_section(study: Study, variants: Sequence[str], *, others: Sequence[str] = ()) -> list[str]:
    """The tables about worse depth, empty without the runs.

    Args:
        study: with the answers on the ladder.
        variants: labels only, distilled, and both trained with degraded depth.
        others: kinds that nothing was trained for and that the variants were scored with.
    """
    seeds = set.intersection(*(set(scores_of(study.runs, variant, 1.0)) for variant in variants))
    if not seeds:
        return []
    systems = {variant: [Job(variant, 1.0, seed).name for seed in sorted(seeds)] for variant in variants}
    control, distilled, control_degraded, distilled_degraded = variants
    pairs = [(distilled_degraded, distilled), (distilled_degraded, control_degraded), (control_degraded, control)]
    return [*ladder_tables(study.answers, systems, [*pairs, (distilled, control)], others=others), ""]


def report(study: Study) -> str:
    """The tables with what they are about."""
    text = ["# Distillation on the miniature world", "", introduction(study), ""]
    for fraction in FRACTIONS:
        text += [*table(study, fraction), ""]
    text += [
        "What each term gains, with all labels: pairs of variants that differ in that term alone. The variants of CE, "
        "KL, LoCa, InfoNCE and patches all have the learning rates that are best for `joint`, which has all of these "
        "terms; phases and the RGB student have rates of their own.",
        "",
        *comparison_table(study),
        "",
    ]
    text += ["Double trouble against label-only training, type by type:", "", *gain_table(study, "double trouble"), ""]
    if section := ladder_section(study, ON_LADDER, others=[k for k in DEPTH_LADDER if k not in (*TRAINED, "no_depth")]):
        text += [
            "## Depth gets worse",
            "",
            "The ladder of [robustness.py](../../evaluation/README.md#worse-depth-less-light), with all labels. "
            f"Degraded depth: with {' '.join(DEGRADATION)}, in double trouble from phase 2 on. Mean: of the nine rungs "
            "shown. Share kept: that mean over clean.",
            "",
            *section,
            *ladder_section(study, LONG_ON_LADDER),
        ]
    return "\n".join([*text, *findings(study), ""])


def print_plan(jobs: Sequence[Job], waiting: Sequence[Job], processes: int) -> None:
    """Say which runs there are, by variant, and how long those that wait will take."""
    for variant in dict.fromkeys(job.variant for job in jobs):
        own = [job for job in jobs if job.variant == variant]
        shares = ", ".join(
            f"{100 * fraction:g} % of the labels {sum(job.fraction == fraction for job in own)} times"
            for fraction in dict.fromkeys(job.fraction for job in own)
        )
        missing = [job for job in own if job in waiting]
        print(f"{variant}: {shares}; {len(missing)} to do, about {sum(map(minutes, missing)):.0f} minutes of one core")
    total = sum(map(minutes, waiting)) / processes
    print(f"{len(waiting)} of {len(jobs)} runs to do, {processes} at a time: about {total / 60:.1f} hours", flush=True)


def minutes(job: Job) -> float:
    """About how long a run takes on one core of the machine of benchmarks/README.md."""
    trained = sum(stage.epochs * EPOCH_SECONDS[stage.system] for stage in job.stages)
    more = sum(DEGRADED_SECONDS * stage.epochs for stage in job.stages if DEGRADATION[0] in stage.flags)
    kinds = ladder_kinds(job.variant, job.fraction) or ()
    rungs = sum(len(severities) for ladder in LADDERS.values() for kind, severities in ladder.items() if kind in kinds)
    return (trained + more + SCORE_SECONDS + rungs * RUNG_SECONDS) / 60


def add_study_args(parser: argparse.ArgumentParser) -> None:
    """The flags of every study: how many processes, and where they write."""
    cores = 1 if torch.cuda.is_available() else len(available_cores())
    folder = ROOT / "benchmarks" / "reproduce"
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=min(cores, MOST_JOBS),
        help="number of runs at a time, each on its share of the cores (default: %(default)s)",
    )
    parser.add_argument(
        "--work",
        type=lambda text: Path(text).resolve(),
        default=folder.with_suffix(".work"),
        help="folder for checkpoints, results and logs (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, default=folder, help="folder for the tables (default: %(default)s)")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--seeds", type=at_least(1), default=5, help="number of seeds that every variant is repeated with (%(default)s)"
    )
    add_study_args(parser)
    add("--variant", choices=list(ALL_VARIANTS), help="train and score one run of this variant only")
    add(
        "--fraction",
        type=float,
        choices=FRACTIONS,
        default=1.0,
        help="share of the labels of --variant's run (%(default)s)",
    )
    add("--seed", type=at_least(0), default=0, help="seed of --variant's run (%(default)s)")
    add("--tables", action="store_true", help="train nothing; write the tables again from the records in --output")
    args = parser.parse_args(argv)
    if args.variant is None and (args.fraction, args.seed) != (1.0, 0):
        parser.error("--fraction and --seed are of one run; name its variant with --variant")
    if args.variant and args.variant not in VARIANTS and args.fraction != 1:
        parser.error(f"--fraction {args.fraction}: {args.variant} is trained with all labels only")
    return args


def study(seeds: int) -> list[Job]:
    """All runs, the main comparison first: a study that is cut short then has it complete for some seeds."""
    few = min(seeds, FEW_SEEDS)
    main = [(variant, 1.0, seed) for seed in range(seeds) for variant in VARIANTS | DEGRADED_VARIANTS]
    labels = [(variant, fraction, seed) for seed in range(few) for fraction in FRACTIONS[1:] for variant in VARIANTS]
    further = [(variant, 1.0, seed) for seed in range(few) for variant in FULL_LABEL_VARIANTS | LONG_VARIANTS]
    optional = [(variant, 1.0, 0) for variant in FOUR_BITS_VARIANTS if find_spec("bitsandbytes")]
    return [Job(*run) for run in main + labels + further + optional]


def read_record(job: Job, work: Path) -> dict[str, Any] | None:
    """The record of a finished run; None while it is not finished.

    Raises:
        UserError: it was made with other flags, or by a version of this script whose records lack something.
    """
    path = job.record_path(work)
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    flags = [stage_flags(stage, job) for stage in job.stages]
    rungs = expected_rungs(job)
    if record["flags"] != flags or not {"variant", "right"} <= record.keys() or list(record.get("ladder", ())) != rungs:
        raise UserError(
            f"{path}: was made with other flags or by an older version; start over with another --work, or "
            f"remove {work}"
        )
    return record


def expected_rungs(job: Job) -> list[str]:
    """The names of the rungs that a run is scored on, the lowest first; none for most runs."""
    kinds = ladder_kinds(job.variant, job.fraction)
    modality = "rgb" if job.variant.startswith("RGB") else "depth"
    return [str(rung) for rung in chosen_rungs(modality, kinds)] if kinds else []


def best_blind(metrics: Mapping[str, Any]) -> tuple[float, list[bool]]:
    """The score by depth of the best blind baseline, and for each test question whether it is right."""
    args, root = load_script(EVALUATION).parse_args(["--miniature"]), data_root(True)
    cells = [csv_cells(row) for row in load_questions(root, args, {})]
    by_name = {name: scores(found)["By depth"] for name, found in metrics["blind"].items()}
    name = max(by_name, key=by_name.get)
    predicted = blind_predictions(load_train_questions(root, args), cells)[name]
    return by_name[name], [exact_match(p, row["Answers"]) for p, row in zip(predicted, cells, strict=True)]


def unpacked(name: str, ladder: Mapping[str, str], n: int) -> dict[str, np.ndarray]:
    """The answers of a run on every rung, by `rung_name`."""
    return {rung_name(name, rung): unpack(text, n) for rung, text in ladder.items()}


def collect(jobs: Sequence[Job], work: Path) -> Study:
    """The records of finished runs with those of the teachers and the best blind baseline.

    Raises:
        UserError: a run was scored on other questions than the teacher.
    """
    (best,) = tuned_teacher(work).glob("best-*.ckpt")
    teacher = evaluate(["--ckpt_path", str(best)], work / "results" / "teacher")
    stock_teacher = evaluate(["--model_id", MINIATURE_TEACHER], work / "results" / "stock_teacher")
    blind, blind_right = best_blind(teacher)
    results = load_results(work / "results" / "teacher")
    asked = Answers.of(results)
    right = {"teacher": np.array(results.correct()), "blind": np.array(blind_right)}
    right |= unpacked("teacher", climb(best, "teacher", work, ["light_gain"]), len(blind_right))
    runs = []
    for job in jobs:
        record = read_record(job, work)
        if record.pop("questions") != asked.questions:
            raise UserError(
                f"{job.record_path(work)}: was scored on other questions than the teacher; remove it and "
                f"{work / 'results' / job.name}"
            )
        right[job.name] = unpack(record.pop("right"), len(blind_right))
        right |= unpacked(job.name, record.pop("ladder"), len(blind_right))
        runs.append(record)
    records = {
        "date": str(date.today()),
        "teacher": scores(teacher),
        "stock_teacher": scores(stock_teacher),
        "blind": blind,
        "rates": RATES.is_file(),
        "runs": runs,
    }
    return Study(records, replace(asked, right=right))


def write_tables(output: Path) -> None:
    """Write the study's README.md from its records, and print it.

    Raises:
        UserError: there are no records, or they are of a study that kept no answers.
    """
    path = output / "runs.json"
    if not path.is_file():
        raise UserError(f"{path}: is missing; run the study first, or give its --output")
    answers = Answers.load(output / "answers.npz")
    text = report(Study(json.loads(path.read_text(encoding="utf-8")), answers))
    (output / "README.md").write_text(text, encoding="utf-8")
    print(text)


def main(args: argparse.Namespace) -> None:
    """Say the plan, train the teacher, then all runs that are not finished yet, then write the tables."""
    os.environ["MAIN_ROOT_DATA_DIR"] = str(args.work)  # apart from the user's own runs
    if args.tables:
        write_tables(args.output)
        return
    if args.variant:
        job = Job(args.variant, args.fraction, args.seed)
        if read_record(job, args.work) is None:
            write_json(job.record_path(args.work), run_job(job, args.work))
        return
    jobs = study(args.seeds)
    waiting = [job for job in jobs if read_record(job, args.work) is None]
    print_plan(jobs, waiting, args.jobs)
    tuned_teacher(args.work)
    run_side_by_side([[job.task(args.work)] for job in waiting], args.jobs, finish_running=True)
    found = collect(jobs, args.work)
    found.answers.save(args.output / "answers.npz")
    write_json(args.output / "runs.json", found.records)
    write_tables(args.output)


if __name__ == "__main__":
    run_script(main, parse_args)
