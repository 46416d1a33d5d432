"""Nothing hangs: whatever goes wrong beside loading processes, a script ends soon, and so do they."""

import os
import re
import shutil
import signal

import pytest

from dataset.questions.rows import questions_file, read_questions
from tests.helpers.faulty import KILL_ITSELF, KILL_NEWEST_LOADER, faulty, in_loading, in_step
from tests.helpers.processes import Started
from tests.helpers.training import BASELINES, flags

pytestmark = pytest.mark.faults

WITHIN_S = 60
EVALUATION = "evaluation/onevisionv3/sunrgbd/evaluate_onevision.py"
OUT_OF_MEMORY = "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')"
FULL_DISK = """
import errno, torch
def save(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")
torch.save = save
"""
STUCK = in_loading(36, "import time; time.sleep(1000)")  # as on a network disk that is gone
KILLED = "error: a data loading process was killed .*--num_workers"
IN_TRAINING = {  # fault -> lines, what the last line of stderr says
    "full disk in the first checkpoint": (FULL_DISK, "No space left"),
    "GPU memory in training": (in_step("training_step", 4, OUT_OF_MEMORY), "out of memory .*--batch_size"),
    "GPU memory in validation": (in_step("validation_step", 1, OUT_OF_MEMORY), "out of memory .*--image_tokens"),
    "memory in validation": (in_step("validation_step", 2, "raise MemoryError"), "out of memory .*--num_workers"),
    "memory in a loading process": (in_loading(9, "raise MemoryError"), "out of memory .*--num_workers"),
    "a mistake in training": (in_step("training_step", 4, "raise ValueError('mistake')"), "ValueError: mistake"),
    "a mistake in validation": (in_step("validation_step", 1, "raise ValueError('mistake')"), "ValueError: mistake"),
    "a mistake, and a stuck loading process": (
        STUCK + in_step("training_step", 2, "import time; time.sleep(2); raise ValueError('mistake')"),
        "ValueError: mistake",
    ),
    "killed loading process in training": (in_loading(9, KILL_ITSELF), KILLED),
    "killed loading process in validation": (in_step("validation_step", 1, KILL_NEWEST_LOADER), KILLED),
}


def ends_with(process, says, *, code=None):
    """The script ends in time with a line at the end that says why, and nothing of it goes on."""
    found = process.ends(within_s=WITHIN_S)
    assert found == code if code else found > 0, (found, process.stderr)
    last = process.stderr.strip().splitlines()[-1]
    assert re.search(says, last), last
    assert last.startswith("error: ") == ("Traceback" not in process.stderr), process.stderr
    process.leaves_nothing()


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("fault", IN_TRAINING)
def test_training_ends(fault, workers, places, tiny_folder, tmp_path, fault_table):
    lines, says = IN_TRAINING[fault]
    script = faulty(tmp_path, BASELINES["baseline_depth"], lines)
    with fault_table.trial(fault), Started(script, flags(tiny_folder, "--num_workers", workers), tmp_path) as process:
        ends_with(process, says)


def damaged_world(world, folder, split, column):
    """A copy of a small world with one cut picture, and the picture."""
    shutil.copytree(world, folder)
    row = read_questions(questions_file(folder, split))[0]
    os.truncate(folder / getattr(row, column), 300)
    return folder / getattr(row, column)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("name", ["baseline_depth", "baseline_rgb7b"])
def test_a_cut_validation_picture(name, workers, world, places, tiny_folder, tmp_path, monkeypatch, fault_table):
    """In the validation, and where the 7B's vision features are stored."""
    column, more = ("depth_path", ()) if name == "baseline_depth" else ("image_path", ("--vision_cache",))
    picture = damaged_world(world, tmp_path / "world", "val", column)
    monkeypatch.setenv("ROOT_DATA_DIR", str(tmp_path / "world"))
    argv = flags(tiny_folder, "--num_workers", workers, "--no-picture_cache", *more)
    with fault_table.trial("cut validation picture"), Started(BASELINES[name], argv, tmp_path) as process:
        ends_with(process, f"error: {picture}: .* cannot be read", code=2)


def test_other_scripts_end(world, places, tiny_folder, tmp_path, monkeypatch, fault_table):
    """The evaluation and the storing of vision features have loading processes too."""
    argv = flags(tiny_folder, "--num_workers", "2", "--vision_cache")
    script = faulty(tmp_path, BASELINES["baseline_rgb7b"], in_loading(3, KILL_ITSELF))
    with fault_table.trial("killed loading process, vision features"), Started(script, argv, tmp_path) as process:
        ends_with(process, KILLED)
    asked = ["--model_id", str(tiny_folder), "--pixel_data_type", "depth", "--num_workers", "2", "--batch_size", "1"]
    for fault, lines, says in (
        ("killed loading process, evaluation", in_loading(3, KILL_ITSELF), KILLED),
        ("memory in a loading process, evaluation", in_loading(3, "raise MemoryError"), "out of memory .*--batch_size"),
    ):
        script = faulty(tmp_path, EVALUATION, lines)
        with fault_table.trial(fault), Started(script, asked, tmp_path) as process:
            ends_with(process, says)
    picture = damaged_world(world, tmp_path / "world", "test", "depth_path")
    monkeypatch.setenv("ROOT_DATA_DIR", str(tmp_path / "world"))
    with fault_table.trial("cut picture, evaluation"), Started(EVALUATION, asked, tmp_path) as process:
        ends_with(process, f"error: {picture}: .* cannot be read", code=2)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_a_rank_that_fails_takes_the_other_one_along(step, rank, places, tiny_folder, tmp_path, fault_table):
    """Without a word, where the other one comes first: it is killed, or says that the connection is gone."""
    lines = in_step(step, 2, f"if self.trainer.global_rank == {rank}: raise ValueError('mistake')")
    argv = flags(tiny_folder, "--num_workers", "1", "--strategy", "ddp", "--devices", "2")
    script = faulty(tmp_path, BASELINES["baseline_depth"], lines)
    with fault_table.trial("a mistake in one of two ranks"), Started(script, argv, tmp_path) as process:
        assert process.ends(within_s=WITHIN_S) != 0 and "mistake" in process.stderr, process.stderr
        process.leaves_nothing()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_loading_processes_do_not_outlive_a_killed_script(workers, places, tiny_folder, tmp_path, fault_table):
    argv = flags(tiny_folder, "--num_workers", workers, "--max_epochs", "500")
    for fault in ("kill -9 of the script", "the same, with a full pipe"):
        more = ("--accumulate_grad_batches", "200", "--run_name", "full") if fault != "kill -9 of the script" else ()
        with fault_table.trial(fault), Started(BASELINES["baseline_depth"], [*argv, *more], tmp_path) as process:
            process.wait_until(lambda process=process: "training step" in process.stderr or "epoch 1" in process.stdout)
            process.send(signal.SIGKILL)
            assert process.ends() == -signal.SIGKILL
            process.leaves_nothing()
