"""Signals: a run leaves at once, saved at its last finished update, and goes on as if nothing had happened."""

import csv
import signal

import pytest
import torch

from distillation.run.checkpoints import read_checkpoint
from tests.helpers.training import interrupted, train

TRAINING, VALIDATION = "on_train_batch_start", "on_validation_batch_start"
WINDOWS = ("--batch_size", "2", "--accumulate_grad_batches", "5")  # 12 micro-batches an epoch: 5, 5 and 2


def assert_same_end(places, name):
    """The run `name` has ended as the run `t` has: weights, optimizer, counters, best checkpoint, validations."""
    folder = places / "baseline_depth/checkpoints"
    done, resumed = (read_checkpoint(folder / run / "last.ckpt") for run in ("t", name))
    assert all(torch.equal(value, resumed["state_dict"][key]) for key, value in done["state_dict"].items())
    moments, expected = resumed["optimizer_states"][0]["state"], done["optimizer_states"][0]["state"]
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert all(torch.equal(moments[i][key], expected[i][key]) for i in expected)
    for key in ("epoch", "global_step", "lr_schedulers", "position", "loops"):
        assert resumed[key] == done[key], key
    assert len({tuple(path.name for path in (folder / run).glob("best-*.ckpt")) for run in ("t", name)}) == 1
    assert validations(places, name) == validations(places, "t")


def validations(places, name):
    logs = (places / "baseline_depth/tensorboard_logs" / name).glob("metrics*.csv")
    rows = [row for path in logs for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())]
    return sorted((row["epoch"], row["step"], row["val/ce"]) for row in rows if row.get("val/ce"))


@pytest.mark.parametrize(
    ("hook", "stop_at", "number", "more"),
    [
        (TRAINING, 3, signal.SIGTERM, ()),  # in the first update of all: it starts anew
        (TRAINING, 8, signal.SIGUSR1, ()),  # inside the second one
        (TRAINING, 11, signal.SIGHUP, ("--num_workers", "1")),  # inside the short last one of an epoch
        (TRAINING, 12, signal.SIGTERM, ()),  # in the last micro-batch of an epoch, before its validation
        (TRAINING, 14, signal.SIGINT, ()),  # inside the first one of the second epoch
        (TRAINING, 9, signal.SIGTERM, ("--max_steps", "5")),
        (VALIDATION, 1, signal.SIGTERM, ("--num_workers", "1")),
        (VALIDATION, 3, signal.SIGUSR1, ()),  # after the last update
        (VALIDATION, 4, signal.SIGTERM, ()),  # the last batch of the last validation
        (VALIDATION, 1, signal.SIGTERM, ("--max_steps", "5")),
    ],
)
def test_a_signal_loses_no_finished_update(hook, stop_at, number, more, places, tiny_folder):
    train("baseline_depth", tiny_folder, *WINDOWS, *more)
    with interrupted(stop_at, hook=hook, number=number):
        train("baseline_depth", tiny_folder, *WINDOWS, *more, "--run_name", "cut")
    train("baseline_depth", tiny_folder, *WINDOWS, *more, "--run_name", "cut", "--resume", "auto")
    assert_same_end(places, "cut")
