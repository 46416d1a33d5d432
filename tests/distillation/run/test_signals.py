"""Signals: a run leaves at once, saved at its last finished update, and goes on as if nothing had happened."""

import os
import re
import shutil
import signal
import sys

import pytest

from dataset.questions.rows import questions_file, read_questions
from tests.helpers.faulty import KILL_NEWEST_LOADER, faulty, in_step, slow_steps
from tests.helpers.processes import Started
from tests.helpers.training import BASELINES, assert_same_end, flags, interrupted, train
from utils import ROOT

TRAINING, VALIDATION = "on_train_batch_start", "on_validation_batch_start"
WINDOWS = ("--batch_size", "2", "--accumulate_grad_batches", "5")  # 12 micro-batches an epoch: 5, 5 and 2


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


def job_script() -> str:
    """The one in the README."""
    text = (ROOT / "distillation/README.md").read_text(encoding="utf-8")
    return re.search(r"^```\n(#!/bin/bash\n.*?)^```", text, re.S | re.M).group(1)


def command(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


def test_the_slurm_job_of_the_readme_requeues_itself(places, tiny_folder, tmp_path):
    """With a stand-in for scontrol, and tiny models in the place of the real ones. No hpc_ckpt is read or written."""
    train("baseline_depth", tiny_folder, *WINDOWS)
    script = faulty(tmp_path, BASELINES["baseline_depth"], slow_steps(0.1))
    more = " ".join([*flags(tiny_folder, *WINDOWS), "--run_name", "depth", "--num_workers", "1"])
    command(tmp_path / "bin/python", f'shift; exec {sys.executable} {script} "$@" {more}')
    command(tmp_path / "bin/scontrol", f'echo "$@" >> {tmp_path / "queue.txt"}')
    (tmp_path / "job.sh").write_text(job_script(), encoding="utf-8")
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another run")
    slurm = {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "depth", "SLURM_NNODES": "1"}
    slurm |= dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    env = slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    with Started(tmp_path / "job.sh", [], tmp_path, env=env, program="bash") as job:
        job.wait_until(lambda: "<training_step 14>" in job.stderr)
        job.send(signal.SIGUSR1)  # to the shell alone, as --signal=B: does
        assert job.ends(within_s=30) == 138, job.stderr
    assert (tmp_path / "queue.txt").read_text(encoding="utf-8") == "requeue 1234\n"
    with Started(tmp_path / "job.sh", [], tmp_path, env=env, program="bash") as job:
        assert job.ends() == 0, job.stderr
    assert len((tmp_path / "queue.txt").read_text(encoding="utf-8").splitlines()) == 1
    assert_same_end(places, "depth")
    assert [path.parent for path in tmp_path.rglob("hpc_*")] == [tmp_path]


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (None, 2, "cannot be read"),  # a cut picture of the validation
        (in_step("validation_step", 1, KILL_NEWEST_LOADER), 1, "a data loading process was killed"),
    ],
)
def test_nothing_hangs_when_a_validation_fails(fault, code, says, world, tiny_folder, tmp_path, places, monkeypatch):
    script = BASELINES["baseline_depth"]
    if fault is None:
        shutil.copytree(world, tmp_path / "world")
        row = read_questions(questions_file(tmp_path / "world", "val"))[0]
        os.truncate(tmp_path / "world" / row.depth_path, 300)
        monkeypatch.setenv("ROOT_DATA_DIR", str(tmp_path / "world"))
    else:
        script = faulty(tmp_path, script, fault)
    with Started(script, flags(tiny_folder, "--num_workers", "1"), tmp_path) as process:
        assert process.ends(within_s=60) == code, process.stderr
        assert re.search(f"^error: .*{says}", process.stderr.splitlines()[-1]) and "Traceback" not in process.stderr
        process.leaves_nothing()
