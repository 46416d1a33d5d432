"""The study's statistics, its processes, and whether its variants are treated alike; training has tests of its own."""

import csv
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import arms, processes, reproduce
from benchmarks.answers import Answers
from benchmarks.processes import Task, run_side_by_side
from benchmarks.reproduce import CONTROL, Job, Study
from dataset.questions.blind import blind_predictions
from dataset.questions.rows import QUESTION_TYPES, csv_cells, questions_file, read_questions
from distillation.models import MINIATURE_STUDENT, load_model
from evaluation.ladder import chosen_rungs, pack
from evaluation.metrics import evaluate_rows
from tests.helpers.system import SAY_CORES, needs_affinity
from utils import ROOT, UserError, available_cores, core_shares, write_json

N_ROOMS = 200
COLUMNS = ("By depth", "Overall", *QUESTION_TYPES)


def study_of(right):
    """A study from (variant, fraction, seed) -> (N,) right answers, one question of each type about every room."""
    kinds = np.tile(QUESTION_TYPES, N_ROOMS)
    by_depth = kinds != "Color Identification"
    runs = []
    for (variant, fraction, seed), found in right.items():
        scores = {"By depth": found[by_depth].mean(), "Overall": found.mean(), "Val": 0.5}
        scores |= {kind: found[kinds == kind].mean() for kind in QUESTION_TYPES}
        runs.append({"variant": variant, "fraction": fraction, "seed": seed, "scores": scores, "corrected": None})
    rooms = np.repeat(np.arange(N_ROOMS), len(QUESTION_TYPES))
    answers = Answers("digest", rooms, kinds, by_depth, {Job(*key).name: found for key, found in right.items()})
    return Study({"runs": runs}, answers)


def answered(share, seed):
    """(N,) right answers, by and large this share of them."""
    return np.random.default_rng(seed).random(N_ROOMS * len(QUESTION_TYPES)) < share


def points(text):
    """The numbers of a table's cell."""
    return [float(number) for number in re.findall(r"[-+]?[0-9]+[.][0-9]", text)]


def test_every_variant_takes_as_many_epochs():
    for name, stages in arms.ALL_VARIANTS.items():
        assert sum(stage.epochs for stage in stages) == arms.EPOCHS * (2 if "twice as long" in name else 1)


def test_gains_are_paired_by_seed_and_by_room():
    """Seeds differ far more than variants do, whose answers differ in a tenth: the interval shows that tenth alone."""
    right = {}
    for seed in range(4):
        right[CONTROL, 1.0, seed] = answered(0.2 + 0.15 * seed, seed)
        right["other", 1.0, seed] = right[CONTROL, 1.0, seed] | answered(0.1, 10 + seed)
    study = study_of(right)
    header, rule, control, other = reproduce.table(study, 1.0)
    assert header.count("|") == rule.count("|") == control.count("|") == other.count("|")
    assert control.startswith("| label-only | 4 |") and control.endswith("|  |  |")
    value, low, high = points(other.split("|")[-2])
    gains = [100 * (right["other", 1.0, seed].mean() - right[CONTROL, 1.0, seed].mean()) for seed in range(4)]
    assert value == pytest.approx(np.mean(gains), abs=0.051)
    assert value - 2.5 < low < value - 0.5 and value + 0.5 < high < value + 2.5
    assert len(reproduce.gain_table(study, "other")) == 3 and reproduce.table(study, 0.1)[2:] == []


def test_intervals_vary_seeds_and_rooms():
    """With equal seeds rooms alone make the width; with equal rooms seeds do; with one seed rooms still do."""
    base = np.tile(np.arange(len(QUESTION_TYPES)) < 2, N_ROOMS)
    rooms = np.repeat(np.arange(N_ROOMS) % 4 == 0, len(QUESTION_TYPES))

    def width(*ours):
        study = study_of(
            {(CONTROL, 1.0, seed): base for seed in range(len(ours))}
            | {("other", 1.0, s): o for s, o in enumerate(ours)}
        )
        value, low, high = points(study.gain(("other", 1.0), (CONTROL, 1.0), "Overall"))
        return high - low

    several = [np.tile(np.arange(len(QUESTION_TYPES)) < n, N_ROOMS) for n in (2, 3, 4)]
    assert width(base, base, base) == 0
    assert width(*several) > 25  # of 16.7 points from seed to seed
    assert width(base | rooms) == pytest.approx(width(*[base | rooms] * 3), abs=0.5)
    assert 7 < width(base | rooms) < 9  # 3.92 * sqrt(.25 * .75 / 200) * 4 / 6 of the points


def test_findings_are_by_hand():
    """Blind .3, teacher .9: .6 is half of the way; with few labels .5 is .1 over the control's."""
    place = np.repeat(np.random.default_rng(0).permutation(N_ROOMS) / N_ROOMS, len(QUESTION_TYPES))
    right = {(CONTROL, 1.0, seed): place < 0.4 for seed in range(2)}
    right |= {
        ("double trouble", fraction, seed): place < share
        for fraction, share in ((1.0, 0.6), (0.1, 0.5))
        for seed in (0, 1)
    }
    study = study_of(right)
    study.answers.right.update(teacher=place < 0.9, blind=place < 0.3)
    study.records["runs"].append(study.records["runs"][0] | {"variant": "CE + LoCa", "corrected": 0.065})
    gap, few, corrected = reproduce.findings(study)
    value, low, high = points(gap)
    assert value == 50.0 and 40 < low < 46 and 54 < high < 60
    assert few.startswith("- With 10 % of the labels, double trouble is +10.0 [+6")
    assert corrected == "- In CE + LoCa, LoCa corrected 6.5 % of the gold tokens."


def test_every_comparison_is_of_two_variants_that_differ_in_what_it_names():
    """Both are trained; but for what is compared, their command lines are the same, rates included."""
    variants = arms.ALL_VARIANTS
    for what, own, other in reproduce.COMPARISONS:
        assert variants[own] != variants[other], what
        if len(variants[own]) == len(variants[other]) == 1 and "RGB" not in what:
            (with_it,), (without,) = variants[own], variants[other]
            longer = 2 if what.startswith("twice as long") else 1
            assert (with_it.system, with_it.teacher) == (without.system, without.teacher)
            assert with_it.epochs == longer * without.epochs
    assert len({what for what, _, _ in reproduce.COMPARISONS}) == len(reproduce.COMPARISONS)
    for term in arms.OFF:  # each alone, and all but each
        assert sum(what.startswith(f"{term}, ") for what, _, _ in reproduce.COMPARISONS) >= 2


def test_answers_of_eighty_runs_are_a_small_file_that_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    kinds, rooms = rng.choice(QUESTION_TYPES, 4185), rng.integers(0, 600, 4185)
    right = {f"run {n}": rng.random(4185) < 0.6 for n in range(80)}
    answers = Answers("0123456789abcdef", rooms, kinds, kinds != "Color Identification", right)
    answers.save(tmp_path / "answers.npz")
    assert (tmp_path / "answers.npz").stat().st_size < 100_000
    again = Answers.load(tmp_path / "answers.npz")
    assert again.questions == answers.questions and list(again.right) == list(right)
    for name in right:
        assert np.array_equal(again.right[name], right[name])
    pair = [["run 0", "run 1"], ["run 2", "run 3"]]
    for column in COLUMNS:
        assert again.difference(*pair, column) == answers.difference(*pair, column)
    first = (tmp_path / "answers.npz").read_bytes()
    again.save(tmp_path / "answers.npz")
    assert (tmp_path / "answers.npz").read_bytes() == first


def test_records_before_answers_were_kept_are_named(tmp_path):
    """The study at commit 74fd584 has scores alone: no traceback, and a sentence that says what to do."""
    write_json(
        tmp_path / "runs.json", {"date": "2026-11-24", "teacher": {}, "stock_teacher": {}, "blind": 0.3, "runs": []}
    )
    with pytest.raises(UserError, match="answers.npz: is missing.*run the study again"):
        reproduce.main(reproduce.parse_args(["--tables", "--output", str(tmp_path)]))
    with pytest.raises(UserError, match="runs.json: is missing; run the study first"):
        reproduce.main(reproduce.parse_args(["--tables", "--output", str(tmp_path / "nothing")]))


def test_the_recorded_study_has_the_scores_of_its_tables():
    runs = json.loads((ROOT / "benchmarks/reproduce/runs.json").read_text(encoding="utf-8"))["runs"]
    tables = (
        (ROOT / "benchmarks/reproduce/README.md").read_text(encoding="utf-8").split("% of the labels | Seeds |")[1:]
    )
    for fraction, text in zip(reproduce.FRACTIONS, tables, strict=True):
        for variant in reproduce.VARIANTS:
            scores = list(reproduce.scores_of(runs, variant, fraction).values())
            cells = [reproduce.spread([100 * score[column] for score in scores]) for column in COLUMNS]
            assert len(scores) >= reproduce.FEW_SEEDS and f"| {variant} | {len(scores)} | {' | '.join(cells)} |" in text


def test_a_start_differs_by_seed_and_comes_back(tmp_path):
    stock = load_model(MINIATURE_STUDENT).state_dict()
    starts = [load_model(str(reproduce.student_start(tmp_path, seed))).state_dict() for seed in (0, 1, 0)]
    for name, weight in stock.items():
        assert torch.equal(starts[0][name], starts[2][name])
        relative = (starts[0][name] - weight).norm() / weight.norm()
        assert relative == pytest.approx(reproduce.START_NOISE, rel=0.35) or weight.numel() < 200 or not weight.any()
    assert not torch.equal(starts[0]["lm_head.weight"], starts[1]["lm_head.weight"])


def test_the_plan_says_all_variants_and_the_hours(monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "find_spec", lambda package: object())
    jobs = reproduce.study(5)
    reproduce.print_plan(jobs, jobs[:2], 2)
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == len(arms.ALL_VARIANTS) and lines[0].startswith("label-only: 100 % of the labels 5 times, 10 %")
    assert last.startswith(f"2 of {len(jobs)} runs to do, 2 at a time: about 0.")
    assert reproduce.EPOCH_SECONDS.keys() == {s.system for stages in arms.ALL_VARIANTS.values() for s in stages}


def test_a_teacher_in_four_bits_is_studied_where_its_package_is(monkeypatch):
    """One seed, beside a twin that differs in the teacher alone; everything else does not need bitsandbytes."""
    studies = {}
    for installed in (None, object()):
        monkeypatch.setattr(reproduce, "find_spec", lambda package, installed=installed: installed)
        studies[bool(installed)] = reproduce.study(5)
    (job,) = set(studies[True]) - set(studies[False])
    assert job == Job("double trouble, teacher in 4 bits", 1.0, 0) and studies[False] == studies[True][:-1]
    twin = [replace(stage, teacher="teacher") for stage in job.stages]
    assert tuple(twin) == arms.VARIANTS["double trouble"]
    script = reproduce.training_script("baseline_rgb7b")
    assert script.parse_args([*arms.TEACHERS[job.stages[0].teacher]]).base_bits == 4


def test_phases_without_labels_are_shared_unless_their_flags_or_teachers_differ(tmp_path, monkeypatch):
    trained = []

    def train(script, argv, work, *, name):
        trained.append((script, name))
        return work / name

    monkeypatch.setattr(reproduce, "run_once", train)
    monkeypatch.setattr(reproduce, "student_start", lambda work, seed: work)
    first, *rest = arms.ASKING_PHASES
    monkeypatch.setitem(arms.ALL_VARIANTS, "other", (first.but("--lr", "1"), *rest))
    monkeypatch.setitem(arms.ALL_VARIANTS, "longer", (replace(first, epochs=4), *rest))
    for variant in ("double trouble", "double trouble, degraded depth", "other", "longer", *arms.FOUR_BITS_VARIANTS):
        reproduce.train_stages(Job(variant, 1.0, 0), tmp_path)
    names = [name for script, name in trained if script.endswith("phase1")]
    assert names[0] == names[1] == "teacher_seed0_2_epochs" and len(set(names)) == 4


def test_every_command_line_is_one_that_its_script_takes():
    """Same batches, seed and labels in all stages that read labels; the control has no teacher."""
    for name, stages in arms.ALL_VARIANTS.items():
        for stage in stages:
            flags = reproduce.stage_flags(stage, Job(name, 0.1, 3))
            start = [] if "--from_stock" in flags else ["--load_checkpoint", "run"]
            args = reproduce.training_script(stage.script).parse_args(["--miniature", *flags, *start])
            assert (args.batch_size, args.accumulate_grad_batches, args.precision, args.seed) == (8, 1, "auto", 3)
            assert not stage.labels or args.label_fraction == 0.1
            assert (args.teacher is not None) == bool(stage.teacher)
            if stage.teacher:
                assert args.teacher_checkpoint is None  # few labels: a teacher that has read none
                assert "--teacher_checkpoint" in reproduce.stage_flags(stage, Job(name, 1.0, 3))


@needs_affinity
def test_variants_run_side_by_side_on_cores_of_their_own(tmp_path, monkeypatch, capfd):
    """Every variant once, no more than asked for at a time, each on its share of the cores; a failure names its log."""
    tasks, cores = [job.task(tmp_path) for job in reproduce.study(2)], set(available_cores())
    running, most, seen = set(), 0, []
    together = threading.Barrier(3)  # the first three wait for each other

    class Process:
        stdout = None
        returncode = None

        def __init__(self, task):
            nonlocal most
            running.add(task)
            most, self.task = max(most, len(running)), task
            seen.append((task, tuple(available_cores())))

        def wait(self):
            if self.task in tasks[:3]:
                together.wait(timeout=30)
            elif self.task != failing:
                time.sleep(0.02)
            self.returncode = int(self.task == failing)
            running.discard(self.task)

    monkeypatch.setattr(processes, "start_process", Process)
    failing = None
    run_side_by_side([[task] for task in tasks], 3, finish_running=True)
    assert most == 3 and not running
    assert len(seen) == len(tasks) and {task for task, _ in seen} == set(tasks)
    assert {core for _, share in seen for core in share} == cores
    assert {share for _, share in seen} == set(map(tuple, core_shares(3)))
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == len(tasks) and re.search(
        rf"done; {len(tasks)} of {len(tasks)} in 0:0\d, about 0:00 left", lines[-1]
    )
    failing, seen[:] = tasks[4], []
    with pytest.raises(
        UserError, match=rf"{tasks[4].title} failed with exit code 1: see {tasks[4].log}; what is finished"
    ):
        run_side_by_side([[task] for task in tasks], 3, finish_running=True)
    assert not running and len(seen) < len(tasks)
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == len(seen) and [f"{tasks[4].title}: FAILED" in line for line in lines].count(True) == 1


def test_a_failure_in_the_study_lets_what_runs_come_to_its_end(tmp_path):
    """Real processes: the second ends after the first has failed, the third never starts."""
    codes = {
        "breaks": "import pathlib, sys, time\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.05)\nraise SystemExit(3)",
        "goes_on": "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(2); print('whole')",
        "never": "print('ran')",
    }
    tasks = []
    for name, code in codes.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        command = (str(tmp_path / f"{name}.py"), str(tmp_path / "started"))
        tasks.append(Task(name, command, tmp_path / "logs" / f"{name}.txt"))
    with pytest.raises(UserError, match="breaks failed with exit code 3: see .*breaks.txt"):
        run_side_by_side([[task] for task in tasks], 2, finish_running=True)
    assert tasks[1].log.read_text(encoding="utf-8") == "whole\n" and not tasks[2].log.exists()


@needs_affinity
def test_the_process_of_a_variant_is_pinned_before_it_counts_its_cores(tmp_path, monkeypatch):
    """The real process, its output in the variant's file: here of a stand-in that prints its cores and command line."""
    script = tmp_path / "variant.py"
    script.write_text(SAY_CORES, encoding="utf-8")
    monkeypatch.setattr(reproduce, "__file__", str(script))
    task = Job(reproduce.CONTROL, 0.1, 3).task(tmp_path)
    core = available_cores()[-1]
    monkeypatch.setattr(processes, "core_shares", lambda n: [[core]])
    run_side_by_side([[task]], 1)
    printed = task.log.read_text(encoding="utf-8")
    assert printed.startswith(f"[{core}] ['--variant', 'label-only', '--fraction', '0.1', '--seed', '3', '--work'")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--jobs", "0"], "argument --jobs: 0: give at least 1"),
        (["--seeds", "0"], "argument --seeds: 0: give at least 1"),
        (["--seed", "-1"], "argument --seed: -1: give at least 0"),
        (["--variant", "CE + LoCa", "--fraction", "0.1"], "with all labels only"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as left:
        reproduce.parse_args(argv)
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_the_command_refuses_a_seed_of_no_variant():
    script = [sys.executable, "benchmarks/reproduce.py", "--seed", "2"]
    found = subprocess.run(script, cwd=reproduce.ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and "name its variant with --variant" in found.stderr


def test_finished_variants_are_kept_and_other_flags_are_refused(tmp_path, monkeypatch):
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

    rooms = {"teacher": 9, "stock_teacher": 8}

    def evaluate(system, output):
        """Of ten rooms with a question of each type, the first six are right; of a teacher, more."""
        right = rooms.get(output.name, 6)
        rows = [
            {
                "Question_Id": f"{room} {kind}",
                "Questions": "?",
                "Question_Type": kind,
                "Answers": "yes",
                "Depth_Path": "",
            }
            | {"Model_Answer": "yes" if room < right else "no", "Image_Path": f"{room}.png", "depth_answerable": "1"}
            for room in range(10)
            for kind in QUESTION_TYPES
        ]
        output.mkdir(parents=True, exist_ok=True)
        with open(output / "predictions.csv", "w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        metrics = evaluate_rows(rows)
        write_json(output / "metrics.json", metrics)
        return metrics

    def run_here(chains, jobs, *, finish_running):
        for (task,) in chains:
            reproduce.main(reproduce.parse_args(task.command[1:]))

    monkeypatch.setattr(reproduce, "run_once", train)
    climbed = []

    def climb(checkpoint, name, work, kinds):
        """Of ten rooms the first six are right on clean pictures, five on all other rungs; six with degraded depth."""
        climbed.append(name)
        rungs = [str(rung) for rung in chosen_rungs("depth" if "light_gain" not in kinds else "rgb", kinds)]
        right = {rung: 6 if rung == "clean" or "degraded" in name else 5 for rung in rungs}
        return {rung: pack(np.arange(60) < 6 * n) for rung, n in right.items()}

    monkeypatch.setattr(reproduce, "climb", climb)
    monkeypatch.setattr(reproduce, "evaluate", evaluate)
    monkeypatch.setattr(reproduce, "best_blind", lambda metrics: (0.3, [n < 18 for n in range(60)]))
    monkeypatch.setattr(reproduce, "run_side_by_side", run_here)
    monkeypatch.setattr(reproduce, "student_start", lambda work, seed: work)
    monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(tmp_path))
    args = reproduce.parse_args(["--seeds", "2", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")])
    reproduce.main(args)
    first = len(trained)
    assert first == len(set(trained)) > 20
    written = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "closes 50.0 [" in written and "+0.0 [+0.0, +0.0]" in written  # 0.6 between 0.3 and 0.9, as the control
    assert "all labels of the training set and has 90.0 by depth" in written and "and has 80.0. One" in written
    assert len(climbed) == len(set(climbed)) == 19  # nine variants with two seeds each, the teacher
    assert "| mean | +10.0 [" in written and "| double trouble, degraded depth | 60.0 | 60.0 | 100.0 [" in written
    reproduce.main(args)
    assert len(trained) == first and (tmp_path / "out/README.md").read_text(encoding="utf-8") == written
    records = json.loads((tmp_path / "out/runs.json").read_text(encoding="utf-8"))["runs"]
    assert [(run["variant"], run["fraction"], run["seed"]) for run in records] == [
        (job.variant, job.fraction, job.seed) for job in reproduce.study(2)
    ]
    (tmp_path / "out/README.md").unlink()
    reproduce.main(reproduce.parse_args(["--tables", "--output", str(tmp_path / "out")]))
    assert (tmp_path / "out/README.md").read_text(encoding="utf-8") == written
    path = reproduce.study(2)[0].record_path(tmp_path / "work")
    record = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {"arm" if key == "variant" else key: value for key, value in record.items()})
    with pytest.raises(UserError, match=f"{path.name}: was made with other flags or by an older version"):
        reproduce.main(args)
    write_json(path, record | {"ladder": {}})
    with pytest.raises(UserError, match="was made with other flags or by an older version"):
        reproduce.main(args)
    write_json(path, record)
    monkeypatch.setattr(reproduce, "rate_flags", lambda system: ["--lr", "1e-3"])
    with pytest.raises(UserError, match="was made with other flags"):
        reproduce.main(args)


def test_the_best_blind_baseline_is_read_from_the_questions(world, monkeypatch):
    """Its right answers, question by question, make up the score that its metrics have."""
    train, asked = (
        [csv_cells(row) for row in read_questions(questions_file(world, name))] for name in ("train", "test")
    )
    silent = [row | {"Model_Answer": ""} for row in asked]
    metrics = evaluate_rows(silent, blind=blind_predictions(train, asked))
    monkeypatch.setattr(reproduce, "data_root", lambda miniature: world)
    score, right = reproduce.best_blind(metrics)
    by_depth = [hit for hit, row in zip(right, asked, strict=True) if row["depth_answerable"] == "1"]
    assert score == pytest.approx(sum(by_depth) / len(by_depth)) and 0 < score < 1
