"""Starts, claims and checkpoints under many faults; each of them once is in tests/distillation/run/test_start.py."""

import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from distillation.run.checkpoints import read_checkpoint
from tests.helpers.processes import Started
from tests.helpers.training import BASELINES, flags, interrupted, train
from utils import UserError, load_script

pytestmark = pytest.mark.faults
DEPTH = BASELINES["baseline_depth"]
EXPERIMENT = Path("baseline_depth/checkpoints")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in read_checkpoint(path)["state_dict"].items()}


def equal(path: Path, expected: dict[str, torch.Tensor]) -> bool:
    found = weights(path)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def start_to_first_checkpoint_s(places: Path, command: list[str], folder: Path) -> float:
    """Seconds from the claim of the folder to the first checkpoint in it."""
    with Started(DEPTH, command, folder) as run:
        run.wait_until(lambda: any(places.rglob("owner-1.json")))
        start = time.monotonic()
        run.wait_until(lambda: any(places.rglob("*.ckpt")))
        seconds = time.monotonic() - start
        assert run.ends() == 0
    return seconds


def test_a_killed_start_is_repeated_by_the_same_command(places, tiny_folder, tmp_path, fault_table):
    """kill -9 at 50 moments, from the claim to just after the first checkpoint; the end is that of a run in peace."""
    command = flags(tiny_folder, "--num_workers", "1", "--resume", "auto")
    seconds = start_to_first_checkpoint_s(places, command, tmp_path / "whole")
    expected = weights(places / EXPERIMENT / "t/last.ckpt")
    for trial in range(50):
        shutil.rmtree(places)
        with fault_table.trial("kill -9 before and around the first checkpoint, same command again"):
            with Started(DEPTH, command, tmp_path / f"killed{trial}") as killed:
                killed.wait_until(lambda: any(places.rglob("owner-1.json")))
                time.sleep(trial / 45 * seconds)
                killed.send(signal.SIGKILL)
                killed.ends()
            with Started(DEPTH, command, tmp_path / f"again{trial}") as again:
                assert again.ends() == 0, again.stderr
            assert equal(places / EXPERIMENT / "t/last.ckpt", expected)


def test_of_two_processes_one_writes(places, tiny_folder, tmp_path, fault_table):
    """20 pairs, 0 to 2 s apart: one ends its run as if it were alone, the other is refused within 2 s and by name."""
    train("baseline_depth", tiny_folder, "--run_name", "alone")
    expected = weights(places / EXPERIMENT / "alone/last.ckpt")
    for trial in range(20):
        command = flags(tiny_folder, "--run_name", f"pair{trial}")
        with fault_table.trial("two processes, one --run_name"), Started(DEPTH, command, tmp_path / f"a{trial}") as a:
            time.sleep(trial / 10)
            with Started(DEPTH, command, tmp_path / f"b{trial}") as b:
                both = (a, b)
                codes = [run.ends() for run in both]
                assert sorted(codes) == [0, 2], [run.stderr for run in both]
                winner, loser = (both[codes.index(code)] for code in (0, 2))
                (line,) = loser.stderr.splitlines()
                told = f"in use by process {winner.process.pid} on {socket.gethostname()}"
                assert line.startswith("error: ") and (told in line or "has checkpoints already" in line), line
            assert equal(places / EXPERIMENT / f"pair{trial}/last.ckpt", expected)


def test_a_second_process_is_refused_within_two_seconds(places, tiny_folder, tmp_path, fault_table):
    """Its imports do not count: they take as long as a start with a bad flag, which ends after them."""
    with Started(DEPTH, flags(tiny_folder, "--max_epochs", "100000"), tmp_path / "first") as first:
        first.wait_until(lambda: any(places.rglob("owner-1.json")))
        for trial in range(5):
            with fault_table.trial("refused within 2 s of its imports"):
                seconds = []
                for name, command in (("imports", ["--run_name", "../x"]), ("refused", flags(tiny_folder))):
                    start = time.monotonic()
                    with Started(DEPTH, command, tmp_path / f"{name}{trial}") as second:
                        assert second.ends() == 2
                    seconds.append(time.monotonic() - start)
                assert seconds[1] - seconds[0] < 2, seconds


def test_names_by_the_time_never_collide(places, tiny_folder, tmp_path, fault_table):
    command = [flag for flag in flags(tiny_folder, "--max_steps", "1") if flag not in ("--run_name", "t")]
    for trial in range(3):
        with fault_table.trial("four starts in one second without --run_name"):
            started = [Started(DEPTH, command, tmp_path / f"{trial}-{i}") for i in range(4)]
            assert [run.ends() for run in started] == [0] * 4, [run.stderr for run in started]
            assert len(list((places / EXPERIMENT).iterdir())) == 4 * (trial + 1)


def damages(path: Path):
    """40 ways to damage a file, as functions: cut, bits flipped, emptied, without its checksum, with a foreign one."""
    data, beside = path.read_bytes(), path.with_name(path.name + ".sha256")
    for i in range(18):
        yield lambda i=i: path.write_bytes(data[: len(data) * i // 18])
        place = len(data) * (2 * i + 1) // 36
        yield lambda place=place: path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    yield beside.unlink
    yield lambda: beside.write_text("0" * 64)
    yield lambda: beside.write_text("")
    yield lambda: path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")


def test_a_damaged_last_checkpoint_is_passed_over(places, tiny_folder, capsys, fault_table):
    train("baseline_depth", tiny_folder)
    expected = weights(places / EXPERIMENT / "t/last.ckpt")
    with interrupted(9):
        train("baseline_depth", tiny_folder, "--run_name", "cut")
    folder, kept = places / EXPERIMENT / "cut", places / "kept"
    logs = places / "baseline_depth/tensorboard_logs/cut"
    shutil.copytree(folder, kept / "run")
    shutil.copytree(logs, kept / "logs")
    for number in range(40):
        for source, target in ((kept / "run", folder), (kept / "logs", logs)):
            shutil.rmtree(target)
            shutil.copytree(source, target)
        with fault_table.trial("damaged last.ckpt, --resume auto goes on from the best"):
            list(damages(folder / "last.ckpt"))[number]()
            capsys.readouterr()
            train("baseline_depth", tiny_folder, "--run_name", "cut", "--resume", "auto")
            assert f"warning: passed over {folder / 'last.ckpt'}" in capsys.readouterr().err
            assert equal(folder / "last.ckpt", expected)


def test_a_kill_while_a_checkpoint_is_written_leaves_good_ones(places, tiny_folder, tmp_path, fault_table):
    """kill -9 at moments of a run that writes all the time: what lies there has its checksum, and is continued."""
    command = flags(tiny_folder, "--max_epochs", "100000", "--resume", "auto")
    for trial in range(20):
        with fault_table.trial("kill -9 while checkpoints are written"):
            with Started(DEPTH, command, tmp_path / str(trial)) as killed:
                killed.wait_until(lambda: "val/exact_match" in killed.stdout and any(places.rglob("*.ckpt")))
                time.sleep(0.05 * trial)
                killed.send(signal.SIGKILL)
                killed.ends()
            found = list(places.rglob("*.ckpt"))
            assert found
            for path in found:
                read_checkpoint(path, need_checksum=True)


NAMES = ("../x", "a/b", "/tmp/x", "..", ".", ".x", "-x", "x\n", "x y", "a\0b", "a\\b", "x;y", "$x", "~x", "", "x" * 300)


def test_names_that_leave_the_folder(places, tiny_folder, capsys, fault_table):
    for name in (*NAMES, "miniature_x", "auto", "best", "\N{LATIN SMALL LETTER U WITH DIAERESIS}" * 90):
        with fault_table.trial("run names that leave the folder or mean something else"):
            with pytest.raises(SystemExit) as refused:
                load_script(DEPTH).parse_args([*flags(tiny_folder), f"--run_name={name}"])
            assert refused.value.code == 2 and "--run_name" in capsys.readouterr().err.splitlines()[-1]


def test_copies_of_a_checkpoint(places, tiny_folder, tmp_path, fault_table):
    with interrupted(3):
        train("baseline_depth", tiny_folder)
    folder = places / EXPERIMENT / "t"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for copy in (tmp_path / "t", tmp_path / "u", folder.with_name("u"), places / "baseline_rgb05b/checkpoints/t"):
        shutil.copytree(folder, copy)
        with fault_table.trial("--resume of a copied checkpoint"):
            with pytest.raises(UserError, match=re.escape(f"is of run t, which writes into {folder}")):
                train("baseline_depth", tiny_folder, "--run_name", copy.name, "--resume", str(copy / "last.ckpt"))
            assert before == {path: path.read_bytes() for path in folder.iterdir()}
