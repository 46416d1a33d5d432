"""Runs of the training scripts through their own flags, on a small world with tiny models."""

import csv
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dataset.datamodule import SUNRGBDDataModule
from dataset.inputs.pictures import ImageSettings
from dataset.inputs.processor import load_processor
from distillation.run import callbacks
from distillation.run.checkpoints import read_checkpoint
from distillation.run.start import start_run
from distillation.teacher import open_teacher
from utils import STOP_SIGNALS, load_script

BASELINES = {
    "baseline_depth": "distillation/baseline_depth/train.py",
    "baseline_rgb05b": "distillation/baseline_rgb05b/train.py",
    "baseline_rgb7b": "distillation/baseline_rgb7b/train2.py",
}
TROUBLE = "knowledge_distillation7b_double_trouble"
STRATEGIES = {  # their folders below distillation/, and below what a run writes
    "phase1": f"{TROUBLE}/phase1",
    "phase2": f"{TROUBLE}/phase2",
    "phase3": f"{TROUBLE}/phase3",
    "feature": "knowledge_distillation7b_feature_based",
    "logit": "knowledge_distillation7b_logit_based",
}
# What every checkpoint of a depth student records.
RECORD = {
    **{"script": BASELINES["baseline_depth"], "student_name": "dataset/miniature/student", "miniature": True},
    **{"modality": "depth", "depth_encoding": "metric_log3", "depth_source": "raw", "image_tokens": "one_tile"},
    **{"seed": 0, "subset_percentage": 1.0, "label_fraction": 1.0, "load_checkpoint": None},
}


def flags(tiny_folder, *more: str) -> list[str]:
    return [
        *("--student_name", str(tiny_folder), "--image_tokens", "one_tile", "--num_workers", "0"),
        *("--batch_size", "4", "--accumulate_grad_batches", "1", "--max_epochs", "2", "--run_name", "t"),
        *("--lr", "1e-3", "--accelerator", "cpu", *more),
    ]


def train(name: str, tiny_folder, *more: str) -> None:
    script = load_script(BASELINES[name])
    script.main(script.parse_args(flags(tiny_folder, *more)))


def distill(name: str, tiny_folder, tiny_teacher, *more: str) -> None:
    script = load_script(f"distillation/{STRATEGIES[name]}/train_online_kd.py")
    argv = flags(tiny_folder, "--teacher_name", str(tiny_teacher), *more)
    if name == "phase1":  # it has no --lr, only the tower trains
        del argv[argv.index("--lr") : argv.index("--lr") + 2]
    script.main(script.parse_args(argv))


@contextmanager
def interrupted(stop_at: int, *, hook: str = "on_train_batch_start", number: int = signal.SIGTERM) -> Iterator[None]:
    """A signal arrives in the `stop_at`-th call of a hook; the run has to leave with the exit code of this signal."""
    calls, before = 0, getattr(callbacks.KeyedRandomness, hook)
    handlers = {each: signal.getsignal(each) for each in STOP_SIGNALS}

    def interrupt(self, *args):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            os.kill(os.getpid(), number)
        before(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(callbacks.KeyedRandomness, hook, interrupt)
        yield
    for each, handler in handlers.items():  # a process that leaves keeps the run's
        signal.signal(each, handler)
    assert stopped.value.code == 128 + number and calls == stop_at


def assert_same_end(places: Path, name: str, reference: str = "t") -> None:
    """Two runs have ended alike: weights, optimizer, counters, best checkpoint, validations."""
    folder = places / "baseline_depth/checkpoints"
    done, resumed = (read_checkpoint(folder / run / "last.ckpt") for run in (reference, name))
    assert all(torch.equal(value, resumed["state_dict"][key]) for key, value in done["state_dict"].items())
    moments, expected = resumed["optimizer_states"][0]["state"], done["optimizer_states"][0]["state"]
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert all(torch.equal(moments[i][key], expected[i][key]) for i in expected)
    for key in ("epoch", "global_step", "lr_schedulers", "position", "loops"):
        assert resumed[key] == done[key], key
    assert len({tuple(path.name for path in (folder / run).glob("best-*.ckpt")) for run in (reference, name)}) == 1
    assert validations(places, name) == validations(places, reference)


def validations(places: Path, name: str) -> list[tuple[str, ...]]:
    logs = (places / "baseline_depth/tensorboard_logs" / name).glob("metrics*.csv")
    rows = [row for path in logs for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())]
    return sorted((row["step"], row["val/ce"]) for row in rows if row.get("val/ce"))


def data_module(world, tiny_folder, **options) -> SUNRGBDDataModule:
    """A depth student's data, 4 images a batch."""
    data = SUNRGBDDataModule(
        root=world,
        processor=load_processor(str(tiny_folder)),
        student=ImageSettings("depth", image_tokens="one_tile"),
        batch_size=4,
        **options,
    )
    data.setup()
    return data


def teacher_of(data: SUNRGBDDataModule, tiny_folder, tiny_teacher, *more: str):
    """The teacher that the logit-based script opens for this data: `tiny_teacher`, or the one that `more` names."""
    script = load_script(f"distillation/{STRATEGIES['logit']}/train_online_kd.py")
    args = script.parse_args(flags(tiny_folder, *(more or ("--teacher_name", str(tiny_teacher)))))
    return open_teacher(args, data, start_run(args, script.__file__, data.student))
