"""How a run starts: its name, its folder, the checkpoint it goes on from, and who may write there."""

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch

from dataset.inputs.pictures import ImageSettings
from distillation.run import claim, start
from distillation.run.checkpoints import read_checkpoint
from distillation.run.start import plain
from tests.helpers.processes import Started
from tests.helpers.training import BASELINES, flags, interrupted, train
from utils import UserError, load_script

DEPTH = BASELINES["baseline_depth"]


def test_plain_values_only():
    assert plain({"a": Path("x/y"), "b": 1.5, "c": None, "d": [1]}) == {"a": "x/y", "b": 1.5, "c": None, "d": "[1]"}


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", ".x", "-x", "x\n", "", "miniature_x", "x" * 300, "auto"])
def test_a_run_name_that_leaves_the_folder_is_refused_before_anything_is_loaded(name, places, tiny_folder, capsys):
    with pytest.raises(SystemExit) as refused:
        load_script(DEPTH).parse_args([*flags(tiny_folder), f"--run_name={name}"])
    assert refused.value.code == 2 and "--run_name" in capsys.readouterr().err
    assert not places.exists()


def test_processes_of_a_launcher_need_a_run_name(places, tiny_folder, monkeypatch):
    script = load_script(DEPTH)
    args = script.parse_args(flags(tiny_folder))
    args.run_name = None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv(start.RUN_NAME_VARIABLE, raising=False)
    with pytest.raises(UserError, match="--run_name"):
        script.main(args)


def test_the_first_process_of_a_second_machine_joins_the_run(places, tiny_folder, monkeypatch):
    """It is the first on its machine: only its rank among all says that it may not claim the folder, but has to join.

    One of another start, whose first process was refused, finds no claim of its own and writes nothing.
    """
    args = load_script(DEPTH).parse_args(flags(tiny_folder))
    monkeypatch.delenv(claim.TOKEN_VARIABLE, raising=False)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    run = start.start_run(args, DEPTH, ImageSettings("depth"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv(claim.TOKEN_VARIABLE)  # torchrun's processes do not inherit from the first
    assert start.start_run(args, DEPTH, ImageSettings("depth")).checkpoints == run.checkpoints
    monkeypatch.setenv("MASTER_PORT", "29501")
    monkeypatch.setattr(claim, "WAIT_FOR_FIRST_S", 0.3)
    with pytest.raises(UserError, match="the first process of this run has not claimed it in .*RANK, LOCAL_RANK"):
        start.start_run(args, DEPTH, ImageSettings("depth"))


def test_runs_that_start_in_the_same_second_get_names_of_their_own(places, tiny_folder, monkeypatch):
    class Now:
        @staticmethod
        def strftime(pattern: str) -> str:
            return "2026-01-01_00-00-00"

    class Clock:
        now = staticmethod(lambda: Now)

    monkeypatch.setattr(start, "datetime", Clock)
    args = load_script(DEPTH).parse_args(flags(tiny_folder))
    args.run_name = None
    runs = [start.start_run(args, DEPTH, ImageSettings("depth")) for _ in range(4)]
    names = ["2026-01-01_00-00-00", *(f"2026-01-01_00-00-00-{i}" for i in (2, 3, 4))]
    assert [run.name for run in runs] == names == [run.record["run"] for run in runs]


def test_one_run_one_folder(places, tiny_folder, tmp_path):
    """While a process writes, the next one is refused and told by whom; once it is killed, its folder is taken over."""
    command = flags(tiny_folder, "--max_epochs", "1000", "--resume", "auto")
    with Started(DEPTH, command, tmp_path / "first") as first:
        first.wait_until(lambda: any(places.rglob("owner-1.json")))
        with Started(DEPTH, flags(tiny_folder), tmp_path / "second") as second:
            assert second.ends() == 2
        (line,) = second.stderr.splitlines()
        assert f"in use by process {first.process.pid} on {socket.gethostname()}" in line and "--run_name" in line
        assert first.process.poll() is None
        first.send(signal.SIGKILL)
        first.ends()
    folder = places / "baseline_depth/checkpoints/t"
    epochs = 1 + read_checkpoint(folder / "last.ckpt")["epoch"] if (folder / "last.ckpt").is_file() else 0
    if epochs > 2:
        with pytest.raises(UserError, match="--max_epochs 1: .*give at least as many"):
            train("baseline_depth", tiny_folder, "--resume", "auto", "--max_epochs", "1")
    train("baseline_depth", tiny_folder, "--resume", "auto", "--max_epochs", str(epochs + 1))
    assert read_checkpoint(folder / "last.ckpt")["epoch"] == epochs
    assert [path.name for path in folder.glob("owner*")] == ["owner-2.json"]


def test_a_start_that_was_killed_before_its_first_checkpoint_can_be_repeated(places, tiny_folder, tmp_path):
    command = flags(tiny_folder, "--resume", "auto")
    with Started(DEPTH, command, tmp_path / "killed") as killed:
        killed.wait_until(lambda: any(places.rglob("run.json")))
        killed.send(signal.SIGKILL)
        killed.ends()
    assert not any(places.rglob("*.ckpt"))
    with Started(DEPTH, command, tmp_path / "repeated") as repeated:
        assert repeated.ends() == 0, repeated.stderr
    assert (places / "baseline_depth/checkpoints/t/last.ckpt").is_file()


def test_a_signal_before_training_starts_lets_the_folder_go(places, tiny_folder, tmp_path):
    """Another machine of a cluster, which cannot look this process up, may then repeat the command."""
    with Started(DEPTH, flags(tiny_folder), tmp_path / "stopped") as stopped:
        stopped.wait_until(lambda: any(places.rglob("owner-1.json")))
        stopped.send(signal.SIGTERM)
        assert stopped.ends() == 143
    assert "Traceback" not in stopped.stderr and not any(places.rglob("owner-*.json"))


def test_a_claim_of_another_machine_names_the_file_to_delete(places, tiny_folder):
    """Whether a process of another machine still runs cannot be looked up."""
    folder = places / "baseline_depth/checkpoints/t"
    folder.mkdir(parents=True)
    theirs = {
        "host": "elsewhere",
        "pid": os.getpid(),
        "process_start": claim.process_start(),
        "token": "x",
        "since": "x",
    }
    (folder / "owner-7.json").write_text(json.dumps(theirs))
    with pytest.raises(UserError, match=f"on elsewhere.*delete {folder / 'owner-7.json'}"):
        train("baseline_depth", tiny_folder)
    (folder / "owner-7.json").write_text("{")
    with pytest.raises(UserError, match=f"{folder / 'owner-7.json'}: does not say.*delete it"):
        train("baseline_depth", tiny_folder)
    (folder / "owner-7.json").unlink()
    train("baseline_depth", tiny_folder)
    assert (folder / "last.ckpt").is_file()


def test_another_process_with_the_number_of_a_dead_one_does_not_keep_a_folder(places, tiny_folder):
    folder = places / "baseline_depth/checkpoints/t"
    folder.mkdir(parents=True)
    theirs = {"host": socket.gethostname(), "pid": os.getppid(), "process_start": "1", "token": "x", "since": "x"}
    (folder / "owner-1.json").write_text(json.dumps(theirs))
    train("baseline_depth", tiny_folder)
    assert [path.name for path in folder.glob("owner*")] == ["owner-2.json"]


def test_a_run_that_fails_removes_what_it_made_and_nothing_else(places, tiny_folder, tmp_path):
    command = flags(tiny_folder, "--lr", "1e30", "--warmup_share", "0", "--gradient_clip", "0")
    with Started(DEPTH, command, tmp_path / "new") as failing:
        assert failing.ends() == 2 and "not finite" in failing.stderr
    assert not [path for path in places.rglob("*") if path.is_file()]
    notes = places / "baseline_depth/tensorboard_logs/t/notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with Started(DEPTH, command, tmp_path / "used") as failing:
        assert failing.ends() == 2 and "not finite" in failing.stderr
    assert notes.read_text() == "mine"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_checksum(path: Path) -> None:
    path.with_name(path.name + ".sha256").unlink()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [(cut, "do not match its checksum"), (flip, "do not match its checksum"), (lose_checksum, "has no checksum")],
)
def test_resume_auto_falls_back_to_the_best_checkpoint(places, tiny_folder, capsys, damage, complaint):
    """And says which one it passed over; the run ends with the same weights as one that was never damaged."""
    train("baseline_depth", tiny_folder)
    done = read_checkpoint(places / "baseline_depth/checkpoints/t/last.ckpt")["state_dict"]
    with interrupted(9):
        train("baseline_depth", tiny_folder, "--run_name", "cut")
    folder = places / "baseline_depth/checkpoints/cut"
    damage(folder / "last.ckpt")
    capsys.readouterr()
    train("baseline_depth", tiny_folder, "--run_name", "cut", "--resume", "auto")
    said = capsys.readouterr()
    assert f"warning: passed over {folder / 'last.ckpt'}" in said.err and complaint in said.err
    assert f"continuing {folder}/best-epoch00" in said.out
    resumed = read_checkpoint(folder / "last.ckpt")["state_dict"]
    assert all(torch.equal(resumed[name], weights) for name, weights in done.items())
    assert [path.name[:12] for path in folder.glob("best-*.ckpt")] == ["best-epoch01"]  # a better one
    for path in folder.glob("*.ckpt"):
        damage(path)
    with pytest.raises(UserError, match=f"no good checkpoint in {folder}: .*last.ckpt.*best-epoch.*{complaint}"):
        train("baseline_depth", tiny_folder, "--run_name", "cut", "--max_epochs", "3", "--resume", "auto")


def test_a_checkpoint_is_continued_where_it_belongs_only(places, tiny_folder, tmp_path):
    """A copy elsewhere, or under another name: its run would be written over, or another one that bears that name."""
    with interrupted(3):
        train("baseline_depth", tiny_folder)
    folder = places / "baseline_depth/checkpoints/t"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for copy in (tmp_path / "elsewhere/t", folder.with_name("other")):
        shutil.copytree(folder, copy)
        with pytest.raises(UserError, match=f"is of run t, which writes into {folder}.*--load_checkpoint"):
            train("baseline_depth", tiny_folder, "--run_name", copy.name, "--resume", str(copy / "last.ckpt"))
    with pytest.raises(UserError, match=f"is of {DEPTH}; continue it with that script"):
        train("baseline_rgb05b", tiny_folder, "--resume", str(folder / "last.ckpt"))
    with pytest.raises(UserError, match="--run_name u: .* is of run t"):
        train("baseline_depth", tiny_folder, "--run_name", "u", "--resume", str(folder / "last.ckpt"))
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder.with_name("other"))
    train("baseline_depth", tiny_folder, "--resume", "t")  # a bare name, as for every other flag
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 12
