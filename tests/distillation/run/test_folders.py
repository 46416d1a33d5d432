"""The folder of a run: who makes it, what is recorded there, how a checkpoint in it is found."""

import shutil
from pathlib import Path

import pytest

from dataset.inputs.pictures import ImageSettings
from distillation.run import folders
from distillation.run.folders import plain
from tests.helpers.training import BASELINES, flags, train
from utils import UserError, load_script


def test_plain_values_only():
    assert plain({"a": Path("x/y"), "b": 1.5, "c": None, "d": [1]}) == {"a": "x/y", "b": 1.5, "c": None, "d": "[1]"}


def test_processes_of_a_launcher_need_a_run_name(places, tiny_folder, monkeypatch):
    script = load_script(BASELINES["baseline_depth"])
    args = script.parse_args(flags(tiny_folder))
    args.run_name = None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv(folders.RUN_NAME_VARIABLE, raising=False)
    with pytest.raises(UserError, match="--run_name"):
        script.main(args)


def test_the_first_process_of_a_second_machine_joins_the_run(places, tiny_folder, monkeypatch):
    """It is the first on its machine: only its rank among all says that the run's folder may be there already."""
    script = BASELINES["baseline_depth"]
    args = load_script(script).parse_args(flags(tiny_folder, "--run_name", "t"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    run = folders.start_run(args, script, ImageSettings("depth"))
    run.checkpoints.mkdir(parents=True)
    with pytest.raises(UserError, match="is there already"):
        folders.start_run(args, script, ImageSettings("depth"))
    monkeypatch.setenv("RANK", "1")
    assert folders.start_run(args, script, ImageSettings("depth")).checkpoints == run.checkpoints


def test_checkpoints_are_found_by_run_name_and_path(tmp_path):
    run = tmp_path / "baseline_depth/checkpoints/demo"
    run.mkdir(parents=True)
    for name in ("best-epoch00-score0.5000.ckpt", "best-epoch02-score0.7000.ckpt", "last.ckpt"):
        (run / name).touch()
    best = run / "best-epoch02-score0.7000.ckpt"
    for name in ("demo", str(run), best.name, str(best)):
        assert folders.find_checkpoint(name, tmp_path) == best
    assert folders.find_checkpoint("last.ckpt", tmp_path) == run / "last.ckpt"
    shutil.copytree(run, tmp_path / "baseline_rgb05b/checkpoints/demo")
    assert folders.find_checkpoint("demo", tmp_path / "baseline_depth") == best
    with pytest.raises(UserError, match="several have this name"):
        folders.find_checkpoint("demo", tmp_path)
    with pytest.raises(UserError, match="no such run or checkpoint below .*; newest runs there: demo"):
        folders.find_checkpoint("absent", tmp_path)


def test_a_used_run_folder_and_missing_checkpoints(places, tiny_folder):
    with pytest.raises(UserError, match="make one with: python distillation/baseline_depth/train.py"):
        train("baseline_depth", tiny_folder, "--load_checkpoint")
    with pytest.raises(UserError, match="no such file"):
        train("baseline_depth", tiny_folder, "--resume", str(places / "absent.ckpt"))
    (places / "baseline_depth/checkpoints/t").mkdir(parents=True)
    with pytest.raises(UserError, match="--run_name t"):
        train("baseline_depth", tiny_folder)
