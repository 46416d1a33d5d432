"""Two processes of a run: whichever fails, is killed, waits for ever or gets a signal, both end, nothing is lost."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.faulty import WAIT_3_S, faulty, in_rank, in_step, slow_steps, stuck_where
from tests.helpers.processes import Started
from tests.helpers.training import BASELINES, assert_same_end, flags
from utils import ROOT, STOP_SIGNALS

pytestmark = pytest.mark.faults

DEPTH = BASELINES["baseline_depth"]
TWO = ("--batch_size", "2", "--accumulate_grad_batches", "3", "--strategy", "ddp", "--devices", "2")
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def start(script, argv, folder, *, torchrun=False):
    if not torchrun:
        return Started(script, argv, folder)
    ranks = ("--standalone", "--nproc_per_node", "2")
    return Started(TORCHRUN, [*ranks, str(ROOT / script), *argv], folder, program="env")


def all_end(run_name, *, within_s=30):
    """Also those that torchrun has started, each in a process group of its own."""
    deadline = time.monotonic() + within_s
    while left := [row for row in processes() if f"--run_name {run_name}" in row]:
        assert time.monotonic() < deadline, f"still there after {within_s} s: {left}"
        time.sleep(0.2)


def processes():
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "stat=,args="], capture_output=True, text=True, check=True)
    return [row for row in listed.stdout.splitlines() if row[0] != "Z"]


def said_once(process):
    assert "Traceback" not in process.stderr, process.stderr
    assert process.stdout.count("parameters train") <= 1


@pytest.mark.parametrize("wait_s", [0.0, 1.0, 3.0, 5.0, 7.0])
def test_signals_while_ranks_start(wait_s, places, tiny_folder, tmp_path, fault_table):
    """Before and after they have found each other, to the first and to both."""
    for trial, number in enumerate(STOP_SIGNALS):
        for group in (False, True):
            name = f"cut{trial}{int(group)}"
            with fault_table.trial("signal while ranks start"):
                script = faulty(tmp_path, DEPTH, slow_steps(0.3))
                with Started(script, flags(tiny_folder, *TWO, "--run_name", name), tmp_path / name) as process:
                    process.wait_until(lambda process=process: "parameters train" in process.stdout)
                    time.sleep(wait_s)
                    process.send(number, group=group)
                    assert process.ends(within_s=20) == 128 + number, process.stderr
                    said_once(process)
                    assert process.stderr.count("stopped by") == 1, process.stderr
                    process.leaves_nothing()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed_before_they_have_found_each_other(rank, places, tiny_folder, tmp_path, fault_table):
    with fault_table.trial("SIGKILL before the ranks have found each other"):
        lines = "import torch, signal\n"
        lines += "torch.distributed.init_process_group = lambda *a, **o: os.kill(os.getpid(), signal.SIGKILL)"
        script = faulty(tmp_path, DEPTH, in_rank(rank, lines))
        with Started(script, flags(tiny_folder, *TWO), tmp_path / "out") as process:
            assert process.ends(within_s=60) != 0
            process.leaves_nothing(within_s=20)


@pytest.mark.parametrize("torchrun", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("early", [False, True])
def test_a_rank_that_fails_says_why_and_all_end(early, rank, torchrun, places, tiny_folder, tmp_path, fault_table):
    fails = "from utils import UserError\nraise UserError('a fault')"
    fault = in_step("training_step", 5, fails)
    if early:
        fault = "import distillation.run.training as t\ndef fit(*a, **o):\n    from utils import UserError\n"
        fault += "    raise UserError('a fault')\nt.fit = fit\n"
    with fault_table.trial("a rank fails"):
        script = faulty(tmp_path, DEPTH, in_rank(rank, fault))
        with start(script, flags(tiny_folder, *TWO), tmp_path / "out", torchrun=torchrun) as process:
            begun = time.monotonic()
            code = process.ends(within_s=90)
            print(early, rank, torchrun, code, time.monotonic() - begun, process.stderr)
            lines = [line for line in process.stderr.splitlines() if line.startswith("error:")]
            assert lines[0] == "error: a fault" and len(lines) == 1 + (rank == 1 and not (early and torchrun)), (
                process.stderr
            )
            if not torchrun:
                assert code == 2
                said_once(process)
            process.leaves_nothing()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("condition", ["len(self) < 10", "len(self) > 10 and key[0] == 1"])
@pytest.mark.parametrize("torchrun", [False, True])
def test_signals_while_data_do_not_come_to_one_rank(
    torchrun, condition, rank, places, tiny_folder, tmp_path, fault_table
):
    with Started(str(ROOT / DEPTH), flags(tiny_folder, *TWO), tmp_path / "t") as process:
        assert process.ends() == 0, process.stderr
    script = faulty(tmp_path, DEPTH, WAIT_3_S + in_rank(rank, stuck_where(condition)))
    for workers, group, number in (("0", True, signal.SIGTERM), ("1", False, signal.SIGUSR1)):
        name = f"{tmp_path.name}-cut{workers}"
        with fault_table.trial("signal while data do not come to one rank"):
            argv = flags(tiny_folder, *TWO, "--num_workers", workers, "--run_name", name)
            with start(script, argv, tmp_path / name, torchrun=torchrun) as process:
                process.wait_until(lambda process=process: "<stuck>" in process.stderr)
                time.sleep(2)
                process.send(number, group=group)
                code = process.ends(within_s=30)
                assert code == 128 + number or (torchrun and code in (1, -number)), (code, process.stderr)
                all_end(name)
                if not torchrun:
                    said_once(process)
                assert "saved" in process.stderr, process.stderr
            with start(DEPTH, [*argv, "--resume", "auto"], tmp_path / name, torchrun=torchrun) as process:
                assert process.ends() == 0, process.stderr
            assert_same_end(places, name)


@pytest.mark.parametrize("number", [*STOP_SIGNALS, signal.SIGKILL])
def test_a_signal_to_torchrun(number, places, tiny_folder, tmp_path, fault_table):
    with Started(str(ROOT / DEPTH), flags(tiny_folder, *TWO), tmp_path / "t") as process:
        assert process.ends() == 0, process.stderr
    script = faulty(tmp_path, DEPTH, slow_steps(0.3))
    for trial, moment in enumerate(("parameters train", "<training_step 2>", "<training_step 7>")):
        name = f"{tmp_path.name}-cut{trial}"
        with fault_table.trial("signal to torchrun"):
            argv = flags(tiny_folder, *TWO, "--num_workers", "1", "--run_name", name)
            with start(script, argv, tmp_path / name, torchrun=True) as process:
                process.wait_until(lambda process=process, moment=moment: moment in process.stderr + process.stdout)
                process.send(number)
                assert process.ends(within_s=30) in (1, -number), process.stderr
                all_end(name)
                assert "saved" in process.stderr or "7" not in moment, process.stderr
            with start(DEPTH, [*argv, "--resume", "auto"], tmp_path / name, torchrun=True) as process:
                assert process.ends() == 0, process.stderr
            assert_same_end(places, name)
