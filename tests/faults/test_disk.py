"""Disks that fill up or cannot be written, at 20 places: one line, exit code 2, and what was good stays good."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from distillation.run.checkpoints import read_checkpoint
from tests.helpers.processes import Started
from tests.helpers.training import BASELINES, STRATEGIES, flags

pytestmark = pytest.mark.faults

EVALUATION = "evaluation/onevisionv3/sunrgbd/evaluate_onevision.py"
TRAINING = BASELINES["baseline_depth"]


@contextmanager
def small_disk(folder: Path, kilobytes: int):
    """A disk of its own at `folder`, of that size; skips where this user may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, *, left_kb: int) -> None:
    """Write a file that leaves only so much room on the folder's disk."""
    fragment, blocks = os.statvfs(folder).f_frsize, os.statvfs(folder).f_bavail
    with suppress(OSError), open(folder / "filled", "wb", buffering=0) as handle:  # the script writes meanwhile
        handle.write(bytes(max(blocks * fragment - left_kb * 1024, 0)))


def ends_with_one_line(started: Started, *names: str) -> None:
    """Exit code 2 and one line that has all of these in it, besides those that say how far a job is."""
    assert started.ends() == 2, started.stderr
    lines = [line for line in started.stderr.splitlines() if "/s, " not in line and " ..." not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), started.stderr
    assert all(name in lines[0] for name in names), lines[0]


def good_checkpoints(folder: Path) -> int:
    """How many checkpoints are below a folder; fails when one is damaged or unfinished files lie there."""
    assert not list(folder.rglob("*.part"))
    return len([read_checkpoint(path) for path in folder.rglob("*.ckpt")])


@pytest.mark.parametrize("left_kb", [0, 4, 16, 100, 300, 450, 700, 820])
def test_the_disk_fills_up_in_training(places, tiny_folder, tmp_path, monkeypatch, fault_table, left_kb):
    """Logs, the first checkpoint, the last one, the best of the second epoch: whatever is written then."""
    with small_disk(tmp_path / "disk", 4096) as disk, fault_table.trial("disk full in training"):
        monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(disk / "out"))
        with Started(TRAINING, flags(tiny_folder), tmp_path / "process") as started:
            started.wait_until(lambda: list(disk.rglob("hparams.yaml")))
            fill(disk, left_kb=left_kb)
            ends_with_one_line(started, "No space left on device" if left_kb < 16 else ".ckpt", " free; make room")
        n_good = good_checkpoints(disk)
        assert n_good == (left_kb > 400) + (left_kb >= 820)
        if list(disk.rglob("last.ckpt")):
            (disk / "filled").unlink()
            with Started(TRAINING, flags(tiny_folder, "--resume", "auto"), tmp_path / "process") as again:
                assert again.ends() == 0, again.stderr


@pytest.mark.parametrize("limit", [20_000, 200_000, 390_000])
def test_files_may_not_be_larger(places, tiny_folder, tmp_path, fault_table, limit):
    """What a quota does, for those who may not mount a disk: files end at a size."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("this system cannot limit another process")
    with fault_table.trial("file size limit in training"):
        with Started(TRAINING, flags(tiny_folder), tmp_path / "process") as started:
            started.wait_until(lambda: list(places.rglob("hparams.yaml")))
            resource.prlimit(started.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
            ends_with_one_line(started, ".ckpt: not written", "needed", "free; make room")
        assert not good_checkpoints(places)


def test_the_disk_fills_up_while_a_teacher_answers(
    places, tiny_folder, tiny_teacher, tmp_path, monkeypatch, fault_table
):
    script = f"distillation/{STRATEGIES['logit']}/train_online_kd.py"
    argv = flags(tiny_folder, "--teacher_name", str(tiny_teacher))
    with small_disk(tmp_path / "disk", 4096) as disk, fault_table.trial("disk full at the teacher's outputs"):
        monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(disk / "out"))
        with Started(script, argv, tmp_path / "process") as started:
            started.wait_until(lambda: list(disk.rglob("teacher.json")))
            started.send(signal.SIGSTOP)
            fill(disk, left_kb=8)
            started.send(signal.SIGCONT)
            ends_with_one_line(started, " needed, ", " free; make")
        assert not good_checkpoints(disk)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_the_disk_fills_up_while_pictures_are_cached(places, tiny_folder, tmp_path, monkeypatch, fault_table, workers):
    argv = flags(tiny_folder, "--picture_cache", "--num_workers", workers)
    with small_disk(tmp_path / "disk", 12_000) as disk, fault_table.trial("disk full at the picture cache"):
        monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(disk / "out"))
        with Started(TRAINING, argv, tmp_path / "process") as started:
            started.wait_until(lambda: list(disk.rglob("hparams.yaml")))
            fill(disk, left_kb=500)
            ends_with_one_line(started, ".tensors: not written, No space left", "needed", " free; make room")
        assert not good_checkpoints(disk)


def test_no_room_is_said_before_anything_is_trained(places, tiny_folder, tmp_path, monkeypatch, fault_table):
    with small_disk(tmp_path / "disk", 900) as disk, fault_table.trial("no room for checkpoints"):
        monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(disk / "out"))
        with Started(TRAINING, flags(tiny_folder), tmp_path / "process") as started:
            ends_with_one_line(started, "checkpoints: no room in", " needed, ", " free; make some")
        assert not [path for path in disk.rglob("*") if path.is_file()]


@pytest.mark.parametrize("left_kb", [0, 4])
def test_the_disk_fills_up_in_an_evaluation(places, tiny_folder, tmp_path, fault_table, left_kb):
    argv = ["--model_id", str(tiny_folder), "--pixel_data_type", "depth", "--image_tokens", "one_tile"]
    argv += ["--batch_size", "1", "--max_new_tokens", "24"]
    with small_disk(tmp_path / "disk", 400) as disk, fault_table.trial("disk full in an evaluation"):
        argv += ["--output", str(disk / "results")]
        answers = disk / "results" / "answers.jsonl"
        with Started(EVALUATION, argv, tmp_path / "process") as started:
            started.wait_until(lambda: answers.is_file() and answers.read_bytes().count(b"\n") > 2)
            fill(disk, left_kb=left_kb)
            ends_with_one_line(started, str(disk / "results"), "No space left on device", " needed", " free; make room")
        kept = answers.read_bytes()
        (disk / "filled").unlink()
        with Started(EVALUATION, argv, tmp_path / "process") as again:
            assert again.ends() == 0, again.stderr
        assert answers.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1]) and kept.count(b"\n") > 2


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "out"


def system_folder(tmp_path: Path) -> Path:
    return Path("/proc/out") if Path("/proc/self").exists() else below_a_file(tmp_path)


@pytest.mark.parametrize("unwritable", [below_a_file, system_folder])
@pytest.mark.parametrize("flag", ["--output", "--export", "--save_final_pt", "MAIN_ROOT_DATA_DIR"])
def test_an_unwritable_place_is_said_within_seconds(
    places, tiny_folder, tmp_path, monkeypatch, fault_table, flag, unwritable
):
    place = unwritable(tmp_path)
    script, argv = (EVALUATION, ["--model_id", "nobody/nothing"]) if flag == "--output" else (TRAINING, flags("absent"))
    if flag.startswith("--"):
        argv = [*argv, flag, str(place / "x")]
    else:
        monkeypatch.setenv(flag, str(place))
    with fault_table.trial("unwritable place"):
        start = time.monotonic()
        with Started(script, argv, tmp_path / "process") as started:
            ends_with_one_line(started, "cannot write into", str(place), "choose another place")
        assert time.monotonic() - start < 30 and not list(places.rglob("*"))
