"""The training scripts as their user runs them, on a small world with a tiny model: files, resume, faults."""

import csv
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import utils
from dataset.questions.rows import questions_file, read_questions
from distillation.models import add_lora, load_model
from distillation.run import callbacks, samples
from distillation.run.checkpoints import read_checkpoint
from tests.helpers.processes import Started
from tests.helpers.training import BASELINES, flags, interrupted, train
from utils import ROOT, UserError


@pytest.mark.parametrize("name", BASELINES)
def test_a_run_leaves_what_it_promises(name, places, tiny_folder):
    train(name, tiny_folder, "--save_final_pt", str(places / "final.pt"), "--export", str(places / "export"))
    folder, logs = places / name / "checkpoints" / "t", places / name / "tensorboard_logs" / "t"
    (best,) = folder.glob("best-epoch*-score*.ckpt")
    for path in (best, folder / "last.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert all(key.startswith("student.") for key in checkpoint["state_dict"])
        hparams = checkpoint["hyper_parameters"]
        assert {type(v) for v in hparams.values()} <= {str, int, float, bool, type(None)}
        assert hparams["script"] == BASELINES[name] and hparams["modality"] == ("depth" if "depth" in name else "rgb")
    assert list(logs.glob("events.out.tfevents*"))
    header, *rows = (logs / "metrics.csv").read_text().splitlines()
    assert "val/exact_match" in header and len(rows) >= 2
    record = json.loads((logs / "run.json").read_text())
    assert record["best"] == str(best) and record["optimizer_steps"] == 12
    saved = torch.load(places / "final.pt", weights_only=True)
    assert saved.keys() == {k.removeprefix("student.") for k in read_checkpoint(best)["state_dict"]}
    assert (places / "export" / "model.safetensors").is_file()
    if name == "baseline_rgb7b":
        assert all("lora" in key or "projector" in key for key in saved)


@pytest.mark.parametrize(
    ("name", "stop_at", "more"),
    [
        ("baseline_depth", 2, ()),
        ("baseline_depth", 6, ("--augmentation",)),  # the last batch of an epoch
        ("baseline_depth", 9, ("--accumulate_grad_batches", "2")),
        ("baseline_rgb7b", 8, ("--num_workers", "1")),  # LoRA
    ],
)
def test_an_interrupted_run_resumes_bit_exactly(places, tiny_folder, name, stop_at, more):
    """SIGTERM in batch `stop_at` of 12: exit code 143, and the resumed run ends with the very same bytes of weights."""
    train(name, tiny_folder, *more)
    done = read_checkpoint(places / name / "checkpoints/t/last.ckpt")
    with interrupted(stop_at):
        train(name, tiny_folder, *more, "--run_name", "cut")
    train(name, tiny_folder, *more, "--run_name", "cut", "--resume", "auto")
    resumed = read_checkpoint(places / name / "checkpoints/cut/last.ckpt")
    assert resumed["global_step"] == done["global_step"]
    for key, value in done["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
    moments, expected = resumed["optimizer_states"][0]["state"], done["optimizer_states"][0]["state"]
    assert all(torch.equal(moments[i]["exp_avg"], expected[i]["exp_avg"]) for i in expected)
    best = {run: {p.name for p in (places / name / "checkpoints" / run).glob("best*.ckpt")} for run in ("t", "cut")}
    assert best["cut"] == best["t"]
    logs = places / name / "tensorboard_logs/cut"
    validations = [value for path in logs.glob("metrics*.csv") for value in column(path, "val/exact_match") if value]
    assert len(validations) == 2  # those of before the interruption are kept
    with pytest.raises(UserError, match="was started with lr 0.001, now it is 0.5"):
        train(name, tiny_folder, *more, "--run_name", "cut", "--resume", "auto", "--lr", "0.5")


def column(path: Path, name: str) -> list[str]:
    with open(path, encoding="utf-8", newline="") as handle:
        return [row.get(name) for row in csv.DictReader(handle)]


def test_tensorboard_lists_a_run_with_its_flags_and_its_best_score(places, tiny_folder):
    """And with no other score: Lightning's own placeholder would be -1 for every run."""
    train("baseline_depth", tiny_folder)
    logs = places / "baseline_depth/tensorboard_logs/t"
    events = EventAccumulator(str(logs)).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    flags = HParamsPluginData.FromString(content).session_start_info.hparams
    assert flags["lr"].number_value == 1e-3 and flags["modality"].string_value == "depth"
    (best,) = events.Scalars("best/exact_match")
    assert best.value == json.loads((logs / "run.json").read_text())["val/exact_match"]
    assert "hp_metric" not in events.Tags()["scalars"]


@pytest.mark.parametrize("name", ["baseline_depth", "baseline_rgb05b"])
def test_tensorboard_shows_what_is_answered_about_the_same_frames(places, tiny_folder, name, monkeypatch):
    """A sheet after every validation: the pictures on it stay, the answers below them change."""
    asked = []

    def answer(found, tokenizer):
        texts = [[f"answer {len(asked)}" for _ in group] for group in found]
        asked.append(texts)
        return texts

    real = samples._decoded
    train(name, tiny_folder, "--max_epochs", "1", "--run_name", "real")
    monkeypatch.setattr(samples, "_decoded", answer)
    train(name, tiny_folder)
    monkeypatch.setattr(samples, "_decoded", real)
    events = EventAccumulator(str(places / name / "tensorboard_logs/t")).Reload()
    sheets = [np.asarray(Image.open(io.BytesIO(sheet.encoded_image_string))) for sheet in events.Images("val/answers")]
    assert len(sheets) == len(asked) == 2 and all(len(group) == 2 for group in asked[0]) and len(asked[0]) == 4
    first, second = sheets
    assert first.shape == second.shape and first.shape[1] == 4 * 264
    changed = np.flatnonzero((first != second).any(axis=(1, 2)))
    assert changed.min() > 256 and (first[:256] == second[:256]).all()  # below the square pictures
    assert np.unique(first[:256].reshape(-1, 3), axis=0).shape[0] > 500
    (step,) = EventAccumulator(str(places / name / "tensorboard_logs/real")).Reload().Images("val/answers")
    assert step.step == 6


def test_a_short_run_logs_its_loss(places, tiny_folder):
    """With the usual one point per ten updates, runs of fewer would have an empty curve."""
    train("baseline_depth", tiny_folder, "--max_steps", "5")
    logs = places / "baseline_depth/tensorboard_logs/t"
    assert len([value for value in column(logs / "metrics.csv", "train/loss") if value]) == 5
    assert len(EventAccumulator(str(logs)).Reload().Scalars("train/loss")) == 5


def test_resuming_a_finished_run_changes_nothing(places, tiny_folder, capsys):
    """Not a byte of its checkpoints, records and logs; what is asked for besides is still written."""
    train("baseline_depth", tiny_folder)
    before = {path: path.read_bytes() for path in places.rglob("*") if path.is_file()}
    for more in (
        (),
        ("--export", str(places / "export")),
        ("--max_epochs", "1"),
        ("--max_epochs", "9", "--max_steps", "12"),
    ):
        train("baseline_depth", tiny_folder, *more, "--resume", "auto")
    assert "is finished (12 updates)" in capsys.readouterr().out and (places / "export/config.json").is_file()
    shutil.rmtree(places / "export")
    assert before == {path: path.read_bytes() for path in places.rglob("*") if path.is_file()}


def test_a_finished_run_goes_on_with_the_rates_of_a_longer_one(places, tiny_folder, monkeypatch):
    """The checkpoint at its end has a rate of 0."""
    rates = []
    monkeypatch.setattr(
        callbacks.FiniteGuard, "on_before_optimizer_step", lambda *args: rates.append(rates_of(args[-1]))
    )
    for epochs, run_name in (("2", "t"), ("3", "t"), ("3", "longer")):
        train("baseline_depth", tiny_folder, "--max_epochs", epochs, "--run_name", run_name, "--resume", "auto")
    assert json.loads((places / "baseline_depth/tensorboard_logs/t/run.json").read_text())["optimizer_steps"] == 18
    short, more, longer = rates[:12], rates[12:18], rates[18:]
    assert len(longer) == 18 and more == longer[12:] and short != longer[:12] and all(map(all, more))


def rates_of(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def test_equal_scores_are_told_apart_by_cross_entropy(places, tiny_folder):
    """The tiny model answers nothing right; its cross-entropy falls: a later epoch is the best one."""
    train("baseline_depth", tiny_folder, "--max_epochs", "3")
    logs = places / "baseline_depth/tensorboard_logs/t"
    scores, ces = (
        [float(v) for v in column(logs / "metrics.csv", f"val/{name}") if v] for name in ("exact_match", "ce")
    )
    assert scores == [0, 0, 0] and ces[0] > min(ces)
    (best,) = (places / "baseline_depth/checkpoints/t").glob("best*.ckpt")
    assert best.name == f"best-epoch{ces.index(min(ces)):02d}-score0.0000.ckpt"


def test_weights_are_handed_over(places, tiny_folder):
    train("baseline_depth", tiny_folder)
    (best,) = (places / "baseline_depth/checkpoints/t").glob("best*.ckpt")
    train("baseline_depth", tiny_folder, "--run_name", "more", "--load_checkpoint", "--lr", "0", "--vision_lr", "0")
    before, after = (
        read_checkpoint(p)["state_dict"] for p in (best, places / "baseline_depth/checkpoints/more/last.ckpt")
    )
    assert all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(UserError, match="trained with modality depth, this run has rgb"):
        train("baseline_rgb05b", tiny_folder, "--load_checkpoint", str(best))


def test_a_diverging_run_stops_and_saves_no_nan(places, tiny_folder):
    with pytest.raises(UserError, match="not finite"):
        train("baseline_depth", tiny_folder, "--lr", "1e30", "--warmup_share", "0", "--gradient_clip", "0")
    assert not list(places.rglob("*.ckpt"))  # it diverged before the first validation


def test_weights_that_are_not_finite_are_never_saved(places, tiny_folder, monkeypatch):
    """The gradient was finite and the update was not: the checkpoint before it stays, no other is written."""
    train("baseline_depth", tiny_folder)
    before = {path: path.read_bytes() for path in places.rglob("*.ckpt")}
    monkeypatch.setattr(callbacks.FiniteGuard, "on_before_optimizer_step", lambda *args: None)
    with pytest.raises(UserError, match="not written, .* is not finite"):
        more = ("--run_name", "more", "--lr", "1e36", "--warmup_share", "0", "--gradient_clip", "0")
        train("baseline_depth", tiny_folder, "--load_checkpoint", "t", *more)
    assert before == {path: path.read_bytes() for path in places.rglob("*.ckpt")}


def test_dry_run_writes_nothing(places, tiny_folder, capsys):
    train("baseline_depth", tiny_folder, "--dry_run", "--measure")
    said = capsys.readouterr().out
    assert "image tokens: 65" in said and "peak memory" in said and "12 steps" in said
    assert not places.exists()


def test_lora_trains_float32_on_a_bfloat16_model(tiny_folder):
    """Half the memory of the frozen 7B; and the weights that train do not lose small updates."""
    model = add_lora(load_model(str(tiny_folder), dtype=torch.bfloat16), rank=4, alpha=8)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_picture_cache_changes_no_weight_and_needs_room(places, tiny_folder, monkeypatch, capsys):
    for run, more in (("t", ()), ("first", ("--picture_cache",)), ("again", ("--picture_cache", "--num_workers", "1"))):
        train("baseline_depth", tiny_folder, "--max_steps", "4", *more, "--run_name", run)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--picture_cache")]
    assert " 6.29 MB to write" in said[0] and " 1.57 MB to write" in said[1]
    plain_run, *cached = (
        read_checkpoint(places / "baseline_depth/checkpoints" / run / "last.ckpt")["state_dict"]
        for run in ("t", "first", "again")
    )
    assert all(torch.equal(state[key], value) for state in cached for key, value in plain_run.items())
    monkeypatch.setattr(utils.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="no room"):
        train("baseline_depth", tiny_folder, "--picture_cache", "--depth_encoding", "grey", "--run_name", "full")


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="this system cannot limit another process")
def test_a_disk_that_fills_up_costs_no_checkpoint(places, tiny_folder):
    """As a command, at the second epoch's best: one line with path, needed and free space, and the run goes on."""
    argv = flags(tiny_folder, "--max_epochs", "20")
    with Started(BASELINES["baseline_depth"], argv, places / "process") as started:
        started.wait_until(lambda: (places / "baseline_depth/checkpoints/t/last.ckpt.sha256").is_file())
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.prlimit(started.process.pid, resource.RLIMIT_FSIZE, (100_000, limits[1]))
        assert started.ends() == 2, started.stderr
    (line,) = [line for line in started.stderr.splitlines() if not line.startswith("training step")]
    assert re.search(r"^error: .*\.ckpt: not written, .*; 3.. kB needed, .* free; make room", line)
    assert len([read_checkpoint(path) for path in places.rglob("*.ckpt")]) == 2 and not list(places.rglob("*.part"))


def test_no_room_for_checkpoints_and_exports_is_said_before_training(places, tiny_folder, monkeypatch):
    for free, what in ((1_000_000, "checkpoints"), (1_160_000, "--export")):
        monkeypatch.setattr(utils.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with pytest.raises(UserError, match=f"{what}: no room in .* needed, .* free; make some"):
            train("baseline_depth", tiny_folder, "--export", str(places / "export"))
    assert not list(places.rglob("*.ckpt")) and not list(places.rglob("run.json"))


def test_places_that_cannot_be_written_are_said_before_anything_is_loaded(places, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for flag in ("--export", "--save_final_pt"):
        with pytest.raises(UserError, match=f"{flag} .*/file/x: cannot write into .*/file, "):
            train("baseline_depth", "absent", flag, str(tmp_path / "file" / "x"))
    monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(tmp_path / "file" / "x"))
    with pytest.raises(UserError, match="checkpoints and logs: cannot write into"):
        train("baseline_depth", "absent")
    assert not places.exists()


@pytest.mark.parametrize("name", ["baseline_depth", "baseline_rgb7b"])
def test_gradient_checkpointing_changes_no_weight_and_keeps_less(name, places, tiny_folder, monkeypatch):
    """The 7B has frozen parts and adapters, which is where checkpointing goes wrong silently."""
    kept, states = {}, {}
    for run, more in (("plain", ()), ("again", ("--gradient_checkpointing",))):
        kept[run] = 0

        def pack(tensor, run=run):
            kept[run] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            train(name, tiny_folder, "--max_steps", "3", *more, "--run_name", run)
        states[run] = read_checkpoint(places / name / "checkpoints" / run / "last.ckpt")["state_dict"]
    assert kept["again"] < 0.7 * kept["plain"]
    assert all(torch.equal(states["again"][key], value) for key, value in states["plain"].items())


def test_without_data_as_a_subprocess(tmp_path):
    """By path, from another folder, without any setting: one line that says what to do, exit code 2."""
    env = {k: v for k, v in os.environ.items() if k != "ROOT_DATA_DIR"} | {"ROOT_DATA_DIR": ""}
    command = [sys.executable, str(ROOT / BASELINES["baseline_depth"]), "--student_name", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ROOT_DATA_DIR is not set") and "--miniature" in line


def cut(depth: Path) -> Path:
    depth.write_bytes(depth.read_bytes()[:300])
    return depth


def shrink(depth: Path) -> Path:
    with Image.open(depth) as picture:
        small = picture.resize((96, 96), Image.Resampling.NEAREST)
    small.save(depth)
    return depth


def lose_focus(depth: Path) -> Path:
    camera = depth.parents[1] / "intrinsics.txt"
    camera.write_text("nan 0 64 0 nan 64 0 0 1")
    return camera


@pytest.mark.parametrize(
    ("damage", "workers", "complaint"),
    [
        (cut, "0", "cannot be read"),
        (cut, "1", "cannot be read"),
        (shrink, "1", "depth is 96x96 pixels"),  # a depth student does not open the image
        (lose_focus, "0", "nan or inf"),
    ],
)
def test_a_damaged_frame_as_a_subprocess(world, tiny_folder, tmp_path, damage, workers, complaint):
    """Found by a loading process in the middle of the first epoch: one line names the file, nothing is left behind."""
    shutil.copytree(world, tmp_path / "world")
    rows = read_questions(questions_file(tmp_path / "world", "train"))
    damaged = damage(tmp_path / "world" / rows[0].depth_path)
    env = os.environ | {"ROOT_DATA_DIR": str(tmp_path / "world"), "MAIN_ROOT_DATA_DIR": str(tmp_path / "out")}
    command = [sys.executable, str(ROOT / BASELINES["baseline_depth"]), *flags(tiny_folder, "--num_workers", workers)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and str(damaged) in line and complaint in line
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
