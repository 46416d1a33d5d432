"""Learning rates for every system of the study, each by the same search on the validation split.

A system has up to three rates: of language model and projector (lr), of the vision tower (vision_lr), and of a map
between hidden states (map_lr). They are searched one after the other, from the defaults of the script: a rate is tried
at five values a factor of 2 apart while the others stay, and the best on the validation split is kept. Where that is
the lowest or highest value, further values are tried beyond it. Every search has one seed, all labels, as many epochs
as the study, and questions to the teacher where the system can ask them. Phases 2 and 3 start from the best run of the
phase before. Runs are compared by the metric that chooses their checkpoints: cosine of patches for phase 1, exact match
for all others.

Finished runs are kept: an interrupted call goes on where it was, and on another machine the file of unfinished records
is enough for that.

Writes  <output>/rates.json, every run with its flags, and the chosen rates, which reproduce.py reads
        <output>/rates.md, the tables
        <output>/rates_unfinished.json, the records so far while the search is not over
        <work>/rates/, a record per run; <work>/logs/, what each run printed

    python benchmarks/rates.py [--jobs N] [--work DIR] [--output benchmarks/reproduce]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import UserError, duration, git_commit, run_script, share, write_json  # first: loads .env

# isort: split
import argparse
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from typing import Any

from benchmarks import reproduce
from benchmarks.arms import ASK, ASKING_PHASES, FEATURES, JOINT, LABELS_ONLY, LOGITS, RGB_STUDENT, Stage
from benchmarks.processes import Task, run_side_by_side

SEED = 0
FACTOR = 2.0
STEPS = (-2, -1, 0, 1, 2)  # exponents of FACTOR: the values that every rate is tried at, relative to its start
MOST_EXTENSIONS = 4  # most values beyond these, per rate
UNFINISHED = "rates_unfinished.json"
DIVERGED = "gradient is not finite"  # part of the message of a run whose rate is too high
STAGES = {
    stage.system: stage
    for stage in (
        *ASKING_PHASES,  # first, because each phase waits for the one before
        LABELS_ONLY,
        RGB_STUDENT,
        *(stage.but(*ASK) for stage in (LOGITS, FEATURES, JOINT)),
    )
}
# Phase -> the phase that it starts from.
BEFORE = {second.system: first.system for first, second in zip(ASKING_PHASES, ASKING_PHASES[1:], strict=False)}

Rates = dict[str, float]
Scores = Mapping[tuple[float, ...], float]  # rates, in the order of the start -> score on val; -inf where it diverged


@dataclass(frozen=True)
class Line:
    """One rate, tried at several values while the others stay.

    Attributes:
        rate: name of the rate that varies.
        others: values of the other rates.
        values: tried values, rising.
        best: the value with the highest score.
        added: those of the values that extended the grid.
    """

    rate: str
    others: Rates
    values: tuple[float, ...]
    best: float
    added: tuple[float, ...]

    @property
    def at_end(self) -> bool:
        """Whether the best value is still the lowest or highest one, after all extensions."""
        return self.best in (self.values[0], self.values[-1])


def search(start: Rates, scores: Scores) -> tuple[list[Rates], list[Line]]:
    """Say what a coordinate-wise search has to run next, and which of its lines are finished.

    Args:
        start: rates to begin with, in the order in which they are searched.
        scores: of all runs so far.

    Returns:
        Rates to run now, none when the search is over; the finished lines.
    """
    rates, lines = dict(start), []
    for name in start:
        first, last = STEPS[0], STEPS[-1]
        while True:
            steps = range(first, last + 1)
            values = {step: start[name] * FACTOR**step for step in steps}
            tried = {step: rates | {name: value} for step, value in values.items()}
            if missing := [found for found in tried.values() if tuple(found.values()) not in scores]:
                return missing, lines
            # Of equal scores the value nearest to the start wins, so that the grid is extended for a better score only.
            best = max(steps, key=lambda step: (scores[tuple(tried[step].values())], -abs(step)))
            if first < best < last or len(steps) == len(STEPS) + MOST_EXTENSIONS:
                break
            first, last = first - (best == first), last + (best == last)
        others = {other: value for other, value in rates.items() if other != name}
        added = tuple(value for step, value in values.items() if step not in STEPS)
        lines.append(Line(name, others, tuple(values.values()), values[best], added))
        rates[name] = values[best]
    return [], lines


@cache
def start_of(stage: Stage) -> Rates:
    """The default learning rates of a stage's script, in the order in which they are searched."""
    flags = [*stage.flags, *(["--load_checkpoint", "run"] if stage.system in BEFORE else [])]
    own = vars(reproduce.training_script(stage.script).parse_args(["--miniature", *flags]))
    return {name: own[name] for name in stage.rates}


def rate_texts(rates: Rates) -> list[str]:
    """Rates as texts like `lr=0.00025`, which --rates takes."""
    return [f"{name}={value:g}" for name, value in rates.items()]


@dataclass(frozen=True)
class Search:
    """The search for one system, with the records of its runs in the work folder.

    Attributes:
        stage: the system's training script with its flags.
        work: folder for checkpoints, records and logs.
        subset: share of the training images that the runs see.
    """

    stage: Stage
    work: Path
    subset: float

    @property
    def earlier(self) -> "Search | None":
        """The search of the phase before, whose best run this one's runs start from; None where there is none."""
        name = BEFORE.get(self.stage.system)
        return Search(STAGES[name], self.work, self.subset) if name else None

    @property
    def ready(self) -> bool:
        """Whether the runs can start: the search of the phase before is over."""
        return self.earlier is None or (self.earlier.ready and not self.earlier.progress()[0])

    def chosen(self) -> Rates:
        """The best rates so far."""
        return start_of(self.stage) | {line.rate: line.best for line in self.progress()[1]}

    def run_name(self, rates: Rates) -> str:
        """The name of the run with these rates, in file names."""
        return "_".join([f"rates_{reproduce.file_name(self.stage.system)}", *rate_texts(rates)])

    def best_run(self) -> str:
        """The name of the run with the best rates."""
        return self.run_name(self.chosen())

    def flags(self, rates: Rates) -> list[str]:
        """The command line without its student and the checkpoint that it starts from."""
        flags = reproduce.fixed_flags(self.stage, 1.0, SEED) + ["--subset_percentage", f"{self.subset:g}"]
        return flags + [text for name, value in rates.items() for text in (f"--{name}", f"{value:g}")]

    def record_path(self, rates: Rates) -> Path:
        """The file that the record of the run with these rates is written to when it is done."""
        return self.work / "rates" / f"{self.run_name(rates)}.json"

    def records(self) -> list[dict[str, Any]]:
        """Read the records of all finished runs.

        Raises:
            UserError: a run was made with other flags, or started from another run.
        """
        source, found = self.earlier and self.earlier.best_run(), []
        for path in sorted((self.work / "rates").glob(f"rates_{reproduce.file_name(self.stage.system)}_*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            if (record["flags"], record["from"]) != (self.flags(record["rates"]), source):
                raise UserError(f"{path}: was made with other flags; start over with another --work, or remove it")
            found.append(record)
        return found

    def progress(self) -> tuple[list[Rates], list[Line]]:
        """What `search` says about the finished runs."""
        scores = {tuple(r["rates"].values()): -math.inf if r["val"] is None else r["val"] for r in self.records()}
        return search(start_of(self.stage), scores)

    def tasks(self) -> list[Task]:
        """The commands of the runs that can start now.

        None while the search of the phase before is under way, and none when this search is over.
        """
        own = (__file__, "--work", str(self.work), "--subset_percentage", f"{self.subset:g}")
        return [
            Task(
                f"{self.stage.system}, {', '.join(rate_texts(rates))}",
                (*own, "--system", self.stage.system, "--rates", *rate_texts(rates)),
                self.work / "logs" / f"{self.run_name(rates)}.txt",
            )
            for rates in (self.progress()[0] if self.ready else [])
        ]

    def train(self, rates: Rates) -> Path:
        """Train with these rates unless that is done already, and return the checkpoints folder.

        The run of the phase before that it starts from is trained first, where it is missing.
        """
        argv = [*self.flags(rates), "--student_name", str(reproduce.student_start(self.work, SEED))]
        if self.earlier:
            argv += ["--load_checkpoint", str(self.earlier.train(self.earlier.chosen()))]
        return reproduce.run_once(self.stage.script, argv, self.work, name=self.run_name(rates))

    def run(self, rates: Rates) -> dict[str, Any]:
        """Train with these rates and return the record. That of a run that diverged has an error instead of a score."""
        started, source = time.monotonic(), self.earlier and self.earlier.best_run()
        record = {"system": self.stage.system, "rates": rates, "flags": self.flags(rates), "from": source}
        record |= {"metric": None, "val": None}
        try:
            folder = self.train(rates)
            ended = json.loads((reproduce.logs_of(folder) / "run.json").read_text(encoding="utf-8"))
            ((record["metric"], record["val"]),) = [item for item in ended.items() if item[0].startswith("val/")]
        except UserError as error:
            if DIVERGED not in str(error):
                raise
            record["error"] = str(error)
        return record | {"commit": git_commit(), "seconds": round(time.monotonic() - started, 1)}

    def result(self) -> dict[str, Any]:
        """What rates.json says about the system when its search is over."""
        lines, records = self.progress()[1], self.records()
        return {
            "chosen": self.chosen(),
            "start": start_of(self.stage),
            "metric": next(record["metric"] for record in records if record["metric"]),
            "lines": [asdict(line) | {"at_end": line.at_end} for line in lines],
            "runs": [{k: v for k, v in record.items() if k not in ("system", "metric")} for record in records],
        }


def line_table(line: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown rows: the values of one rate, and below them their scores in %; the best is bold."""
    scores = {tuple(sorted(run["rates"].items())): run["val"] for run in runs}
    head, cells = [], []
    for value in line["values"]:
        score = scores[tuple(sorted((line["others"] | {line["rate"]: value}).items()))]
        text = "diverged" if score is None else f"{100 * score:.1f}"
        best = value == line["best"]
        head.append(f"**{value:g}**" if best else f"{value:g}")
        head[-1] += " (added)" if value in line["added"] else ""
        cells.append(f"**{text}**" if best else text)
    others = f" ({', '.join(rate_texts(line['others']))})" if line["others"] else ""
    end = ["", f"The best {line['rate']} is still at an end of the grid."] if line["at_end"] else []
    return [
        f"| {line['rate']}{others} | {' | '.join(head)} |",
        "| --- |" + " ---: |" * len(head),
        f"| val | {' | '.join(cells)} |",
        *end,
        "",
    ]


def report(records: Mapping[str, Any]) -> str:
    """The tables with what they are about."""
    systems = records["systems"]
    runs = [run for system in systems.values() for run in system["runs"]]
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    spent = duration(sum(run["seconds"] for run in runs))
    text = [
        "# Learning rates",
        "",
        f"{records['date']}, commit {commits}: {len(runs)} runs on {100 * records['subset_percentage']:g} % of the "
        f"miniature's training images, {spent} in all, each in a process of its own. Score on the validation split in "
        "%; the best value is bold. Each rate in turn is tried at five values a factor of 2 apart, around the script's "
        "default, while the others stay. There is one seed, so differences of a point say little. Where the best value "
        "is the lowest or highest one, further values are tried (added). Every system had this search; the more rates "
        "it has, the more runs. `rates.json` has every run.",
        "",
    ]
    for name, system in systems.items():
        best, flags = ", ".join(rate_texts(system["chosen"])), " ".join(STAGES[name].flags)
        text += [
            f"## {name}",
            "",
            f"`{STAGES[name].script}{' ' + flags if flags else ''}`, {system['metric']}; chosen: {best}",
            "",
        ]
        for line in system["lines"]:
            text += line_table(line, system["runs"])
    return "\n".join(text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reproduce.add_study_args(parser)
    parser.add_argument(
        "--subset_percentage",
        type=share,
        default=1.0,
        help="share of the training images to use, in (0, 1] (%(default)s)",
    )
    parser.add_argument("--system", choices=tuple(STAGES), help="make a single run of this system, with --rates")
    parser.add_argument("--rates", nargs="+", metavar="NAME=VALUE", help="all learning rates of --system's run")
    args = parser.parse_args(argv)
    if (args.system is None) != (args.rates is None):
        parser.error("--system and --rates together name one run; give both")
    if args.system:
        try:
            args.rates = {name: float(value) for name, value in (text.split("=") for text in args.rates)}
        except ValueError:
            parser.error(f"--rates {' '.join(args.rates)}: give NAME=VALUE, as in lr=0.00025")
        if args.rates.keys() != (needed := start_of(STAGES[args.system])).keys():
            parser.error(f"--rates: {args.system} has {', '.join(needed)}; give each of them")
    return args


def restore_records(records: Sequence[Mapping[str, Any]], searches: Mapping[str, Search]) -> None:
    """Write the records of an unfinished search into the work folder.

    Records that are there already stay as they are; records of runs with other flags are left out.
    """
    for record in records:
        search = searches[record["system"]]
        path = search.record_path(record["rates"])
        if record["flags"] == search.flags(record["rates"]) and not path.is_file():
            write_json(path, record)


def main(args: argparse.Namespace) -> None:
    """Train the teacher, then all runs that are not finished yet, round by round, then write the tables."""
    os.environ["MAIN_ROOT_DATA_DIR"] = str(args.work)  # apart from the user's own runs
    reproduce.tuned_teacher(args.work)
    if args.system:
        one = Search(STAGES[args.system], args.work, args.subset_percentage)
        if not one.record_path(args.rates).is_file():
            write_json(one.record_path(args.rates), one.run(args.rates))
        return
    searches = {name: Search(stage, args.work, args.subset_percentage) for name, stage in STAGES.items()}
    unfinished = args.output / UNFINISHED
    if unfinished.is_file():
        restore_records(json.loads(unfinished.read_text(encoding="utf-8")), searches)
    try:
        while waiting := [[task] for one in searches.values() for task in one.tasks()]:
            run_side_by_side(waiting, args.jobs, finish_running=True)
    finally:
        with suppress(UserError):  # foreign records in the work folder have been reported already
            write_json(unfinished, [record for one in searches.values() for record in one.records()])
    records = {
        "date": str(date.today()),
        "subset_percentage": args.subset_percentage,
        "seed": SEED,
        "systems": {name: one.result() for name, one in searches.items()},
    }
    write_json(args.output / "rates.json", records)
    (args.output / "rates.md").write_text(report(records), encoding="utf-8")
    unfinished.unlink(missing_ok=True)
    print(report(records))


if __name__ == "__main__":
    run_script(main, parse_args)
