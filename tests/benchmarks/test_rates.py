"""The search for learning rates: where it ends, that every system has the same one, what it leaves behind."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from benchmarks import arms, rates, reproduce
from benchmarks.rates import STAGES, Search, search, start_of
from distillation.run.callbacks import FiniteGuard
from utils import UserError, write_json


def search_to_the_end(start, score):
    """All runs of a search whose scores are known, and its lines."""
    scores = {}
    while missing := search(start, scores)[0]:
        for tried in missing:
            assert tuple(tried.values()) not in scores
            scores[tuple(tried.values())] = score(**tried)
    return scores, search(start, scores)[1]


def peak(**best):
    """A score that falls with the distance, in octaves, from these rates."""
    return lambda **tried: -sum(abs(math.log2(tried[name] / best[name])) for name in best)


@pytest.mark.parametrize(
    ("best", "n_runs"),
    [
        ({"lr": 1.0, "vision_lr": 1.0}, 9),
        ({"lr": 2.0, "vision_lr": 0.5}, 9),
        ({"lr": 4.0, "vision_lr": 1.0}, 10),  # at the end: one value beyond it
        ({"lr": 1 / 16, "vision_lr": 8.0}, 14),
    ],
)
def test_the_best_rates_are_found_inside_the_grid(best, n_runs):
    scores, lines = search_to_the_end({"lr": 1.0, "vision_lr": 1.0}, peak(**best))
    assert len(scores) == n_runs
    assert {line.rate: line.best for line in lines} == best
    for line in lines:
        assert not line.at_end and len(line.values) - len(line.added) == 5
        assert all(high == 2 * low for low, high in zip(line.values, line.values[1:], strict=False))


def test_an_end_that_is_only_as_good_extends_nothing():
    scores, lines = search_to_the_end({"lr": 1.0, "map_lr": 3.0}, lambda **tried: 0.5)
    assert len(scores) == 9 and [line.best for line in lines] == [1.0, 3.0]


def test_a_search_that_never_turns_ends_and_says_so():
    scores, (line,) = search_to_the_end({"lr": 1.0}, lambda lr: lr)
    assert len(scores) == 5 + rates.MOST_EXTENSIONS and line.at_end and line.best == line.values[-1] == 64


def test_rates_that_diverge_are_worse_than_any_other():
    _, (line,) = search_to_the_end({"lr": 1.0}, lambda lr: -math.inf if lr > 1 else lr)
    assert line.best == 1.0 and not line.at_end


def test_the_message_of_a_run_that_diverged_is_known():
    module = torch.nn.Linear(1, 1)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    trainer = SimpleNamespace(precision="32-true", global_step=3, current_epoch=0)
    with pytest.raises(UserError, match=rates.DIVERGED):
        FiniteGuard().on_before_optimizer_step(trainer, module, None)


def test_every_system_is_searched_from_its_own_rates_on_command_lines_that_its_script_takes(tmp_path):
    used = {stage.system for stages in arms.ALL_VARIANTS.values() for stage in stages}
    assert used == STAGES.keys()
    assert start_of(STAGES["feature-based"]) == {"lr": 2.5e-4, "vision_lr": 5e-4, "map_lr": 1e-3}
    assert start_of(STAGES["phase 1"]) == {"vision_lr": 4e-3} and start_of(STAGES["phase 2"]) == {"lr": 5e-4}
    for name, stage in STAGES.items():
        tried = {rate: 2 * value for rate, value in start_of(stage).items()}
        flags = Search(stage, tmp_path, 0.5).flags(tried)
        source = ["--load_checkpoint", "run"] if name in rates.BEFORE else []
        args = reproduce.training_script(stage.script).parse_args(["--miniature", *flags, *source])
        assert {rate: getattr(args, rate) for rate in tried} == tried
        assert (args.seed, args.subset_percentage, args.max_epochs) == (0, 0.5, stage.epochs)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """`rates.main` with trainings that take no time, whose scores follow from the rates: what was trained, a call."""
    best = {"lr": 5e-4, "vision_lr": 1e-3, "map_lr": 2.5e-4}
    trained = []

    def train(script, argv, work, *, name):
        folder = work / script / "checkpoints" / f"miniature_{name}"
        if (reproduce.logs_of(folder) / "run.json").is_file():
            return folder
        trained.append((script, name, argv))
        if name != "teacher":
            args = reproduce.training_script(script).parse_args(["--miniature", *argv])
            (stage,) = (
                stage for stage in STAGES.values() if name.startswith(f"rates_{reproduce.file_name(stage.system)}_")
            )
            tried = {rate: getattr(args, rate) for rate in stage.rates}
            if tried.get("lr", 0) > 8e-4:
                raise UserError(f"the {rates.DIVERGED} at step 7")
            metric = "val/patch_cosine" if script.endswith("phase1") else "val/exact_match"
            score = 0.6 + 0.01 * peak(**{rate: best[rate] for rate in tried})(**tried)
            write_json(reproduce.logs_of(folder) / "run.json", {"lr": 1, "best": "", metric: score})
        return folder

    def run_here(chains, jobs, *, finish_running):
        for (task,) in chains:
            rates.main(rates.parse_args(task.command[1:]))

    def call(*flags):
        rates.main(rates.parse_args(["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out"), *flags]))
        return json.loads((tmp_path / "out/rates.json").read_text(encoding="utf-8"))

    monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(reproduce, "run_once", train)
    monkeypatch.setattr(rates, "run_side_by_side", run_here)
    monkeypatch.setattr(reproduce, "student_start", lambda work, seed: work)
    return SimpleNamespace(trained=trained, call=call, out=tmp_path / "out", work=tmp_path / "work")


def test_the_whole_search(study, monkeypatch):
    """Rates are found for all systems, phases build on the best ones before, a second call trains nothing."""
    found = study.call()["systems"]
    assert found.keys() == STAGES.keys()
    assert found["feature-based"]["chosen"] == {"lr": 5e-4, "vision_lr": 1e-3, "map_lr": 2.5e-4}
    assert found["phase 1"]["chosen"] == {"vision_lr": 1e-3} and found["phase 1"]["metric"] == "val/patch_cosine"
    runs = [run for run in study.trained if run[1] != "teacher"]
    assert len(runs) == len({name for _, name, _ in runs}) == sum(len(one["runs"]) for one in found.values())
    for before, after, chosen in (("phase1", "phase_2", "vision_lr=0.001"), ("phase2", "phase_3", "lr=0.0005")):
        commands = [argv for _, name, argv in runs if name.startswith(f"rates_{after}")]
        (source,) = {argv[argv.index("--load_checkpoint") + 1] for argv in commands}
        assert f"{before}/checkpoints/miniature_rates_" in source and source.endswith(f"_{chosen}")
    diverged = [run for run in found["label-only"]["runs"] if run["val"] is None]
    assert [run["rates"]["lr"] for run in diverged] == [1e-3]
    assert all({"flags", "commit", "seconds"} <= run.keys() for one in found.values() for run in one["runs"])
    table = (study.out / "rates.md").read_text(encoding="utf-8")
    assert "| lr (vision_lr=0.00025) | 6.25e-05 | 0.000125 | 0.00025 | **0.0005** | 0.001 |" in table
    assert "| val | 55.0 | 56.0 | 57.0 | **58.0** | diverged |" in table and "| 0.002 (added) |" in table

    before = len(study.trained)
    assert study.call()["systems"] == found
    assert {name for _, name, _ in study.trained[before:]} == {"teacher"}

    monkeypatch.setattr(reproduce, "RATES", study.out / "rates.json")
    assert reproduce.rate_flags("joint") == ["--lr", "0.0005", "--vision_lr", "0.001"]
    assert reproduce.stage_flags(arms.JOINT, reproduce.Job("CE + LoCa", 1.0, 0))[-4:] == reproduce.rate_flags("joint")


def test_an_interrupted_search_goes_on_elsewhere(study, monkeypatch):
    """With the unfinished records alone: what has one is not trained again, except what later phases start from."""
    run_all, done = rates.run_side_by_side, []

    def run_some(chains, jobs, *, finish_running):
        for chain in chains:
            if len(done) == 60:
                raise KeyboardInterrupt
            done.append(chain[0].title)
            run_all([chain], jobs, finish_running=finish_running)

    monkeypatch.setattr(rates, "run_side_by_side", run_some)
    with pytest.raises(KeyboardInterrupt):
        study.call()
    assert len(json.loads((study.out / rates.UNFINISHED).read_text(encoding="utf-8"))) == 60
    shutil.rmtree(study.work)
    monkeypatch.setattr(rates, "run_side_by_side", run_all)
    before = {name for _, name, _ in study.trained}
    del study.trained[:]
    systems = study.call()["systems"]
    again = {name for _, name, _ in study.trained} & before - {"teacher"}
    assert again == {"rates_phase_1_vision_lr=0.001", "rates_phase_2_lr=0.0005"}
    assert systems["feature-based"]["chosen"] == {"lr": 5e-4, "vision_lr": 1e-3, "map_lr": 2.5e-4}
    assert not (study.out / rates.UNFINISHED).exists()


def test_records_of_another_search_are_refused(study):
    study.call()
    with pytest.raises(UserError, match="was made with other flags"):
        study.call("--subset_percentage", "0.5")
    # Without its best run, phase 1 has another one: what phase 2 has done started from the wrong weights.
    path = study.work / "rates/rates_phase_1_vision_lr=0.001.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, record | {"val": 0.0})
    with pytest.raises(UserError, match="rates_phase_2.*was made with other flags"):
        study.call()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--jobs", "0"], "argument --jobs: 0: give at least 1"),
        (["--subset_percentage", "1.5"], "argument --subset_percentage: 1.5: give a share above 0 and at most 1"),
        (["--system", "joint"], "give both"),
        (["--system", "joint", "--rates", "lr=1e-3"], "joint has lr, vision_lr; give each"),
        (["--system", "phase 1", "--rates", "vision_lr"], "give NAME=VALUE"),
    ],
)
def test_flags_that_name_no_run_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        rates.parse_args(argv)
    assert message in capsys.readouterr().err
