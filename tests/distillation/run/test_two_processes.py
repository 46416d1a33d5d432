"""Two processes of one run: they end together, with one line, and lose nothing. `tests/faults` has all the moments."""

import signal
import time

from distillation.run.checkpoints import read_checkpoint
from tests.helpers.faulty import KILL_ITSELF, WAIT_3_S, faulty, in_rank, in_step, stuck_where
from tests.helpers.processes import Started
from tests.helpers.training import BASELINES, flags, train

DEPTH = BASELINES["baseline_depth"]
TWO = ("--strategy", "ddp", "--devices", "2")


def test_one_that_fails_says_why(places, tiny_folder, tmp_path):
    fault = in_step("training_step", 2, "from utils import UserError; raise UserError('a picture is damaged')")
    with Started(faulty(tmp_path, DEPTH, in_rank(1, fault)), flags(tiny_folder, *TWO), tmp_path / "out") as process:
        assert process.ends() == 2, process.stderr
        process.leaves_nothing()
    first, second = process.stderr.splitlines()[-2:]
    assert first == "error: a picture is damaged" and second.startswith("error: another process of this run has ended")
    assert "Traceback" not in process.stderr and process.stdout.count("parameters train") == 1


def test_one_that_waits_for_data_is_not_waited_for(places, tiny_folder, tmp_path):
    """It never gets the picture; the other one has got the signal, saves, and the run goes on in one process."""
    script = faulty(tmp_path, DEPTH, WAIT_3_S + in_rank(1, stuck_where("len(self) > 10 and key[0] == 1")))
    with Started(script, flags(tiny_folder, *TWO), tmp_path / "out") as process:
        process.wait_until(lambda: "<stuck>" in process.stderr)
        process.send(signal.SIGTERM)
        assert process.ends(within_s=30) == 128 + signal.SIGTERM, process.stderr
        process.leaves_nothing()
    last = places / "baseline_depth/checkpoints/t/last.ckpt"
    assert f"stopped by a signal; saved {last}" in process.stderr and "Traceback" not in process.stderr
    assert read_checkpoint(last)["global_step"] == 3  # updates of its one epoch
    train("baseline_depth", tiny_folder, "--accumulate_grad_batches", "2", "--resume", "auto")
    assert read_checkpoint(last)["global_step"] == 6


def test_a_signal_while_they_start(places, tiny_folder, tmp_path):
    """Ctrl-C, which reaches both: the second one is still being loaded."""
    with Started(DEPTH, flags(tiny_folder, *TWO), tmp_path / "out") as process:
        process.wait_until(lambda: "parameters train" in process.stdout)
        time.sleep(2)
        process.send(signal.SIGINT, group=True)
        assert process.ends(within_s=30) == 128 + signal.SIGINT, process.stderr
        process.leaves_nothing()
    assert process.stderr.splitlines() == ["stopped by SIGINT"]


def test_the_second_ends_with_the_first(places, tiny_folder, tmp_path):
    """Killed before they have found each other."""
    killed = f"import torch\ntorch.distributed.init_process_group = lambda *a, **o: exec({KILL_ITSELF!r})"
    with Started(faulty(tmp_path, DEPTH, in_rank(0, killed)), flags(tiny_folder, *TWO), tmp_path / "out") as process:
        assert process.ends() == -signal.SIGKILL
        process.leaves_nothing(within_s=30)
    assert "Traceback" not in process.stderr
