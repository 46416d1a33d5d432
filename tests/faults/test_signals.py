"""Signals at many moments, of every kind, to the script and to its whole process group."""

import itertools
import os
import signal
import time

import pytest

from tests.helpers.faulty import faulty, slow_steps, stuck_where
from tests.helpers.processes import Started
from tests.helpers.training import BASELINES, STRATEGIES, assert_same_end, flags, train
from utils import ROOT, STOP_SIGNALS

pytestmark = pytest.mark.faults

WITHIN_S = 10
WINDOWS = ("--batch_size", "2", "--accumulate_grad_batches", "5")  # 12 micro-batches an epoch: 5, 5 and 2
DEPTH = BASELINES["baseline_depth"]
MOMENTS = [f"<training_step {n}>" for n in (1, 4, 5, 6, 8, 10, 11, 12, 13, 15, 17, 19, 22, 24)]
MOMENTS += [f"<validation_step {n}>" for n in (1, 2, 3, 4)]


def stopped(process, *numbers, group=False):
    """Send signals, one after the other: the script ends within ten seconds, with the exit code of one of them."""
    start = time.monotonic()
    for number in numbers:
        process.send(number, group=group)
        time.sleep(0.05)
    code = process.ends(within_s=WITHIN_S)
    assert code in {128 + number for number in numbers}, (code, process.stderr)
    assert "Traceback" not in process.stderr, process.stderr
    process.leaves_nothing()
    return time.monotonic() - start


@pytest.mark.parametrize(("workers", "group"), [("0", False), ("1", True), ("2", True)])
def test_signals_at_any_moment(workers, group, places, tiny_folder, tmp_path, fault_table):
    """Stopped, and continued by the same command: the very same end as without."""
    argv = flags(tiny_folder, *WINDOWS, "--num_workers", workers)
    train("baseline_depth", tiny_folder, *WINDOWS)
    script = faulty(tmp_path, DEPTH, slow_steps(0.3))
    for trial, (moment, number) in enumerate(zip(MOMENTS, itertools.cycle(STOP_SIGNALS), strict=False)):
        name = f"cut{trial}"
        where = "validation" if "validation" in moment else "training"
        with fault_table.trial(f"{signal.Signals(number).name} in {where}"):
            with Started(script, [*argv, "--run_name", name, "--resume", "auto"], tmp_path / name) as process:
                process.wait_until(lambda process=process, moment=moment: moment in process.stderr)
                stopped(process, number, group=group)
            train("baseline_depth", tiny_folder, *WINDOWS, "--run_name", name, "--resume", "auto")
            assert_same_end(places, name)


@pytest.mark.parametrize("workers", ["0", "1", "2"])
def test_signals_while_data_do_not_come(workers, places, tiny_folder, tmp_path, fault_table):
    train("baseline_depth", tiny_folder, *WINDOWS)
    in_validation, in_epoch_2, in_epoch_1 = (
        "len(self) < 10",
        "len(self) > 10 and key[0] == 1",
        "len(self) > 10 and key[1] == 3",
    )
    for trial, condition in enumerate((in_validation, in_epoch_2, in_epoch_1)):
        name = f"cut{trial}"
        with fault_table.trial("signal while data do not come"):
            argv = flags(tiny_folder, *WINDOWS, "--num_workers", workers, "--run_name", name)
            with Started(faulty(tmp_path, DEPTH, stuck_where(condition)), argv, tmp_path / name) as process:
                process.wait_until(lambda process=process: "<stuck>" in process.stderr)
                time.sleep(2)  # what came before is used up
                stopped(process, STOP_SIGNALS[trial], group=True)
            train("baseline_depth", tiny_folder, *WINDOWS, "--run_name", name, "--resume", "auto")
            assert_same_end(places, name)


def test_a_second_signal_changes_nothing(places, tiny_folder, tmp_path, fault_table):
    train("baseline_depth", tiny_folder, *WINDOWS)
    script = faulty(tmp_path, DEPTH, slow_steps(0.3))
    pairs = [(first, second) for first in (signal.SIGTERM, signal.SIGINT) for second in STOP_SIGNALS]
    for trial, pair in enumerate(pairs):
        name = f"cut{trial}"
        with fault_table.trial("two signals"):
            argv = flags(tiny_folder, *WINDOWS, "--num_workers", "1", "--run_name", name)
            with Started(script, argv, tmp_path / name) as process:
                process.wait_until(lambda process=process: "<training_step 9>" in process.stderr)
                stopped(process, *pair, *pair, group=True)
            train("baseline_depth", tiny_folder, *WINDOWS, "--run_name", name, "--resume", "auto")
            assert_same_end(places, name)


def test_signals_where_nothing_trains_yet(places, tiny_folder, tiny_teacher, tmp_path, fault_table):
    """While models load, and the teacher's outputs or vision features are computed: the same command starts again."""
    phase2 = f"distillation/{STRATEGIES['phase2']}/train_online_kd.py"
    argv = [*flags(tiny_folder, "--teacher_name", str(tiny_teacher)), "--from_stock", "--vision_cache"]
    argv += ["--num_workers", "1", "--resume", "auto"]
    moments = ("the teacher's outputs:", "--vision_cache:")
    for trial, (said, number) in enumerate(itertools.product(moments, STOP_SIGNALS)):
        with fault_table.trial("signal before training"):
            out = {"MAIN_ROOT_DATA_DIR": str(tmp_path / f"out{trial}")}  # nothing is stored there yet
            with Started(phase2, argv, tmp_path, env=out) as process:
                process.wait_until(lambda process=process, said=said: said in process.stdout)
                process.send(number, group=True)
                assert process.ends(within_s=WITHIN_S) in (-number, 128 + number), process.stderr
                assert "Traceback" not in process.stderr, process.stderr
                process.leaves_nothing()
            with Started(phase2, argv, tmp_path, env=out) as process:
                assert process.ends() == 0, process.stderr


def test_signals_while_the_end_of_max_steps_is_validated(places, tiny_folder, tmp_path, fault_table):
    more = (*WINDOWS, "--max_steps", "2")
    train("baseline_depth", tiny_folder, *more)
    script = faulty(tmp_path, DEPTH, slow_steps(0.3))
    for number in STOP_SIGNALS:
        name = f"cut{number}"
        with fault_table.trial("signal in the validation at the end"):
            argv = flags(tiny_folder, *more, "--num_workers", "1", "--run_name", name)
            with Started(script, argv, tmp_path / name) as process:
                process.wait_until(lambda process=process: "<validation_step 1>" in process.stderr)
                stopped(process, number, group=True)
            train("baseline_depth", tiny_folder, *more, "--run_name", name, "--resume", "auto")
            assert_same_end(places, name)


def test_micro_batches_of_seconds(places, tiny_folder, tmp_path, fault_table):
    """16 of them are one update: a scheduler that kills after 30 s has long got its checkpoint."""
    more = ("--batch_size", "1", "--accumulate_grad_batches", "16")
    train("baseline_depth", tiny_folder, *more)
    script = faulty(tmp_path, DEPTH, slow_steps(0.0) + slow_from(18, 4.0))
    with fault_table.trial("SIGTERM in micro-batches of 4 s"):
        argv = flags(tiny_folder, *more, "--num_workers", "1", "--run_name", "cut")
        with Started(script, argv, tmp_path / "cut") as process:
            process.wait_until(lambda: "<training_step 18>" in process.stderr)
            stopped(process, signal.SIGTERM, group=True)
        train("baseline_depth", tiny_folder, *more, "--run_name", "cut", "--resume", "auto")
        assert_same_end(places, "cut")


def slow_from(call, seconds):
    return f"""
fast = script.SupervisedStudent.training_step
def slow_later(self, batch, batch_idx):
    out = fast(self, batch, batch_idx)
    time.sleep({seconds} if batch_idx >= {call - 1} else 0)
    return out
script.SupervisedStudent.training_step = slow_later
"""


def test_nohup_goes_on(places, tiny_folder, tmp_path, fault_table):
    """Who starts a run with nohup does not want it to end with the terminal."""
    wrapper = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + slow_steps(0.1)
    with fault_table.trial("SIGHUP under nohup"):
        with Started(faulty(tmp_path, DEPTH, wrapper), flags(tiny_folder), tmp_path) as process:
            process.wait_until(lambda: "<training_step 3>" in process.stderr)
            process.send(signal.SIGHUP, group=True)
            assert process.ends() == 0, process.stderr


@pytest.mark.parametrize("moment", ["<training_step 2>", "<training_step 7>", "<validation_step 1>"])
def test_two_ranks_leave_together(moment, places, tiny_folder, tmp_path, fault_table):
    """The signal reaches one of them, both save and leave; a group signal reaches both."""
    more = (*WINDOWS, "--accumulate_grad_batches", "3", "--strategy", "ddp", "--devices", "2")
    script = faulty(tmp_path, DEPTH, slow_steps(0.3))
    plain = flags(tiny_folder, *more, "--run_name", "t")
    with Started(str(ROOT / DEPTH), plain, tmp_path / "t") as process:
        assert process.ends() == 0, process.stderr
    for group, number in ((False, signal.SIGTERM), (True, signal.SIGUSR1)):
        name = f"cut{int(group)}"
        with fault_table.trial("two ranks"):
            argv = flags(tiny_folder, *more, "--num_workers", "1", "--run_name", name)
            with Started(script, argv, tmp_path / name) as process:
                process.wait_until(lambda process=process: process.stderr.count(moment) == 2)
                stopped(process, number, group=group)
            with Started(str(ROOT / DEPTH), [*argv, "--resume", "auto"], tmp_path / name) as process:
                assert process.ends() == 0, process.stderr
            assert_same_end(places, name)


def test_slurm_leaves_its_checkpoints_alone(places, tiny_folder, tmp_path, fault_table):
    """None is written, and one that lies about is not read."""
    slurm = {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "1"}
    slurm |= dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    train("baseline_depth", tiny_folder, *WINDOWS)
    script = faulty(tmp_path, DEPTH, slow_steps(0.2))
    for number in STOP_SIGNALS:
        name = f"cut{number}"
        (tmp_path / name).mkdir()
        os.link(places / "baseline_depth/checkpoints/t/last.ckpt", tmp_path / name / "hpc_ckpt_1.ckpt")
        with fault_table.trial("signal under SLURM"):
            argv = flags(tiny_folder, *WINDOWS, "--num_workers", "1", "--run_name", name)
            with Started(script, argv, tmp_path / name, env=slurm) as process:
                process.wait_until(lambda process=process: "<training_step 8>" in process.stderr)
                stopped(process, number, group=True)
            with Started(str(ROOT / DEPTH), [*argv, "--resume", "auto"], tmp_path / name, env=slurm) as process:
                assert process.ends() == 0, process.stderr
            assert_same_end(places, name)
    assert len(list(tmp_path.rglob("hpc_*"))) == len(STOP_SIGNALS)  # those that lay there
