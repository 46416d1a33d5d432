"""How users name checkpoints."""

import shutil

import pytest

from distillation.run import folders
from tests.helpers.training import train
from utils import UserError


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
    (tmp_path / "baseline_depth/checkpoints/miniature_small").mkdir()
    (tmp_path / "baseline_depth/checkpoints/miniature_small/best-epoch00-score0.1000.ckpt").touch()
    small = tmp_path / "baseline_depth/checkpoints/miniature_small/best-epoch00-score0.1000.ckpt"
    shutil.copytree(small.parent, tmp_path / "baseline_depth/checkpoints/miniature_demo")
    for name in ("small", "miniature_small"):  # nobody has to type the prefix
        assert folders.find_checkpoint(name, tmp_path) == small
    for miniature, found in ((False, best), (True, small.parents[1] / "miniature_demo" / small.name)):
        assert folders.find_checkpoint("demo", tmp_path / "baseline_depth", miniature=miniature) == found
    with pytest.raises(UserError, match="no such run or checkpoint below .*; newest runs there: .*demo"):
        folders.find_checkpoint("absent", tmp_path)


def test_a_used_run_folder_and_missing_checkpoints(places, tiny_folder):
    with pytest.raises(UserError, match="make one with: python distillation/baseline_depth/train.py"):
        train("baseline_depth", tiny_folder, "--load_checkpoint")
    with pytest.raises(UserError, match="no such file"):
        train("baseline_depth", tiny_folder, "--resume", str(places / "absent.ckpt"))
    train("baseline_depth", tiny_folder, "--max_steps", "1")
    with pytest.raises(UserError, match="--run_name t: .* has checkpoints already; .*--resume auto"):
        train("baseline_depth", tiny_folder)
