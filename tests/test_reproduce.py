"""The study's statistics, its processes and the fairness of its arms; training is what the scripts' own tests are about."""

import json
import os
import subprocess
import sys

import pytest
import torch
from scipy import stats

from benchmarks import reproduce
from benchmarks.reproduce import Job
from distillation.models import MINIATURE_STUDENT, load_model
from evaluation.metrics import QUESTION_TYPES
from utils import UserError, write_json


def run(arm, seed, by_depth):
    scores = dict.fromkeys(["By depth", "Overall", *QUESTION_TYPES, "Val"], by_depth)
    return {"arm": arm, "fraction": 1.0, "seed": seed, "scores": scores}


def test_every_arm_takes_as_many_epochs():
    for stages in (reproduce.ARMS | reproduce.FULL_LABEL_ARMS).values():
        assert sum(stage.epochs for stage in stages) == reproduce.EPOCHS


def test_gains_are_paired_by_seed():
    """Seeds differ far more than arms do: only the differences within a seed show the gain."""
    runs = [run(reproduce.CONTROL, seed, 0.3 + 0.1 * seed) for seed in range(4)]
    runs += [run("other", seed, 0.4 + 0.1 * seed + 0.01 * (seed % 2)) for seed in range(4)]
    header, rule, control, other = reproduce.table(runs, 1.0)
    assert header.count("|") == rule.count("|") == control.count("|") == other.count("|")
    assert control.startswith("| label-only | 4 | 45.0 ± 12.9 |") and control.endswith("|  |  |")
    low, high = stats.ttest_1samp([10, 11, 10, 11], 0).confidence_interval()
    found = f"+10.5 [{low:+.1f}, {high:+.1f}]"
    assert other.endswith(f"| {found} | {found} |")
    assert reproduce.gain_table(runs, "other")[2:] == [f"| 100 % of the labels | {' | '.join([found] * 6)} |"]
    assert reproduce.table(runs, 0.1)[2:] == []


def test_findings_are_by_hand():
    """Blind .3, teacher .9: .6 and .63 are 50 and 55 % of the way; with few labels .5 is .1 and .12 over the control's."""
    runs = [run(reproduce.CONTROL, seed, value) for seed, value in enumerate((0.4, 0.38))]
    runs += [run("double trouble", seed, value) for seed, value in enumerate((0.6, 0.63))]
    runs += [run("double trouble", seed, 0.5) | {"fraction": 0.1} for seed in range(2)]
    gap, few = reproduce.findings({"runs": runs, "teacher": {"By depth": 0.9}, "blind": 0.3})
    assert "closes 52.5 [20.7, 84.3] % of the gap" in gap  # 52.5 ± 12.706 * 2.5
    assert few.startswith("- With 10 % of the labels, double trouble is +11.0 [-1.7, +23.7] points")


def test_a_start_differs_by_seed_and_comes_back(tmp_path):
    stock = load_model(MINIATURE_STUDENT).state_dict()
    starts = [load_model(str(reproduce.student_start(tmp_path, seed))).state_dict() for seed in (0, 1, 0)]
    for name, weight in stock.items():
        assert torch.equal(starts[0][name], starts[2][name])
        relative = (starts[0][name] - weight).norm() / weight.norm()
        assert relative == pytest.approx(reproduce.START_NOISE, rel=0.35) or weight.numel() < 200 or not weight.any()
    assert not torch.equal(starts[0]["lm_head.weight"], starts[1]["lm_head.weight"])


def test_every_command_line_is_one_that_its_script_takes():
    """Same batches, seed and labels in all stages that read labels; the control has no teacher."""
    for name, stages in (reproduce.ARMS | reproduce.FULL_LABEL_ARMS).items():
        for stage in stages:
            flags = reproduce.stage_flags(stage, Job(name, 0.1, 3))
            start = [] if "--from_stock" in flags else ["--load_checkpoint", "run"]
            args = reproduce.training_script(stage.script).parse_args(["--miniature", *flags, *start])
            assert (args.batch_size, args.accumulate_grad_batches, args.precision, args.seed) == (8, 1, "auto", 3)
            assert not stage.labels or args.label_fraction == 0.1
            assert hasattr(args, "teacher_checkpoint") == stage.taught
            if stage.taught:
                assert args.teacher_checkpoint is None  # few labels: a teacher that has read none
                assert "--teacher_checkpoint" in reproduce.stage_flags(stage, Job(name, 1.0, 3))


def test_arms_run_side_by_side_on_cores_of_their_own(tmp_path, monkeypatch):
    """Every arm once, no more than asked for at a time, each on its share of the cores; a failure names its log."""
    tasks, cores = [job.task(tmp_path) for job in reproduce.study(2)], sorted(os.sched_getaffinity(0))
    running, most, seen = set(), 0, []

    class Process:
        returncode = None

        def __init__(self, task, share):
            nonlocal most
            running.add(task)
            most, self.task = max(most, len(running)), task
            seen.append((task, tuple(share)))

        def poll(self):
            self.returncode = int(self.task == failing)
            running.discard(self.task)
            return self.returncode

    monkeypatch.setattr(reproduce, "start_process", Process)
    monkeypatch.setattr(reproduce.time, "sleep", lambda seconds: None)
    failing = None
    reproduce.run_side_by_side(tasks, 3)
    assert most == 3 and not running
    assert [task for task, _ in seen] == tasks
    assert {core for _, share in seen for core in share} == set(cores)
    failing, seen[:] = tasks[4], []
    with pytest.raises(UserError, match=rf"{tasks[4].title}: training failed, see {tasks[4].log}"):
        reproduce.run_side_by_side(tasks, 3)
    assert not running and len(seen) < len(tasks)


def test_the_process_of_an_arm_is_pinned_before_it_counts_its_cores(tmp_path, monkeypatch):
    """The real process, its output in the arm's file: here of a stand-in that prints its cores and command line."""
    script = tmp_path / "arm.py"
    script.write_text("import os, sys; print(sorted(os.sched_getaffinity(0)), sys.argv[1:])", encoding="utf-8")
    monkeypatch.setattr(reproduce, "__file__", str(script))
    task = Job(reproduce.CONTROL, 0.1, 3).task(tmp_path)
    core = max(os.sched_getaffinity(0))
    assert reproduce.start_process(task, [core]).wait() == 0
    printed = task.log.read_text(encoding="utf-8")
    assert printed.startswith(f"[{core}] ['--arm', 'label-only', '--fraction', '0.1', '--seed', '3', '--work'")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--jobs", "0"], "--jobs 0: give at least 1"),
        (["--seed", "2"], "name it with --arm"),
        (["--arm", "CE + LoCa", "--fraction", "0.1"], "with all labels only"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(argv, message):
    script = [sys.executable, "benchmarks/reproduce.py", *argv]
    found = subprocess.run(script, cwd=reproduce.ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and message in found.stderr


def test_finished_arms_are_kept_and_other_flags_are_refused(tmp_path, monkeypatch):
    """A second call trains nothing; records of another study are not mixed in."""
    trained = []

    def train(script, argv, work, *, name):
        folder = work / script / "checkpoints" / name
        if not folder.is_dir():
            trained.append((script, name))
            folder.mkdir(parents=True)
            (folder / "best-epoch00-score0.5.ckpt").touch()
            write_json(reproduce.logs_of(folder) / "run.json", {"best": "", "val/exact_match": 0.5})
        return folder

    def evaluate(system, output):
        known = {"teacher": (0.9, 0.3), "stock_teacher": (0.8, 0.3)}
        cells = [{"exact_match": {"value": value}} for value in known.get(output.name, (0.6, 0.6))]
        system, blind = (
            {"overall": cell, "depth_answerable": cell, "per_type": dict.fromkeys(QUESTION_TYPES, cell)}
            for cell in cells
        )
        return system | {"blind": {"majority": blind}}

    def run_here(tasks, jobs):
        for task in tasks:
            reproduce.main(reproduce.parse_args(task.command[1:]))

    monkeypatch.setattr(reproduce, "run_once", train)
    monkeypatch.setattr(reproduce, "evaluate", evaluate)
    monkeypatch.setattr(reproduce, "run_side_by_side", run_here)
    monkeypatch.setattr(reproduce, "student_start", lambda work, seed: work)
    monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(tmp_path))
    args = reproduce.parse_args(["--seeds", "2", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")])
    reproduce.main(args)
    first = len(trained)
    assert first == len(set(trained)) > 20
    written = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "closes 50.0 [50.0, 50.0] % of the gap" in written  # 0.6 between 0.3 and 0.9
    assert "all labels of the training set and has 90.0 by depth" in written and "and has 80.0. One" in written
    reproduce.main(args)
    assert len(trained) == first and (tmp_path / "out/README.md").read_text(encoding="utf-8") == written
    records = json.loads((tmp_path / "out/runs.json").read_text(encoding="utf-8"))["runs"]
    assert [(run["arm"], run["fraction"], run["seed"]) for run in records] == [
        (job.arm, job.fraction, job.seed) for job in reproduce.study(2)
    ]
    monkeypatch.setattr(reproduce, "TUNED_TEACHER", ["--teacher_name", "other"])
    with pytest.raises(UserError, match="made with other flags"):
        reproduce.main(args)
