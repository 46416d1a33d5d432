"""Runs of the training scripts through their own flags, on a small world with tiny models."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dataset.datamodule import SUNRGBDDataModule
from dataset.inputs.pictures import ImageSettings
from dataset.inputs.processor import load_processor
from distillation.run import callbacks
from distillation.run.folders import start_run
from distillation.teacher import open_teacher
from utils import load_script

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
def interrupted(stop_at: int) -> Iterator[None]:
    """SIGTERM arrives in the `stop_at`-th batch; the run has to leave with the exit code of a signal."""
    batches, start = 0, callbacks.KeyedRandomness.on_train_batch_start

    def interrupt(self, *args):
        nonlocal batches
        batches += 1
        if batches == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        start(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(callbacks.KeyedRandomness, "on_train_batch_start", interrupt)
        yield
    assert stopped.value.code == 143


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
