"""The five distillation scripts, on a small world with tiny models: what trains, handing over, caches, resuming."""

import csv
import json
import math

import pytest
import torch

from distillation import teacher as teacher_module
from distillation.models import load_model, set_trainable
from distillation.run.callbacks import UpdateLog
from distillation.run.checkpoints import SafeCheckpointIO, read_checkpoint
from tests.helpers.training import STRATEGIES, TROUBLE, distill, interrupted, train
from utils import UserError


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (dict(vision=True, projector=False, language=False), {"vision_tower"}),
        (
            dict(vision=False, projector=True, language=True),
            {"multi_modal_projector", "image_newline", "language_model"},
        ),
    ],
)
def test_trainable_parts(tiny_folder, parts, expected):
    model = load_model(str(tiny_folder))
    set_trainable(model, **parts)
    trains = {name.removeprefix("model.").split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trains == expected
    assert not any("post_layernorm" in name for name, p in model.named_parameters() if p.requires_grad)


def test_the_three_phases_hand_over_and_move_only_their_parts(places, tiny_folder, tiny_teacher, capsys):
    stock = load_model(str(tiny_folder)).state_dict()
    weights = {}
    further = ("--load_checkpoint", "--teacher_questions", "2")
    for name, more in (("phase1", ()), ("phase2", further), ("phase3", further)):
        distill(name, tiny_folder, tiny_teacher, *more)
        (best,) = (places / STRATEGIES[name] / "checkpoints/t").glob("best*.ckpt")
        state = read_checkpoint(best)["state_dict"]
        assert all(key.startswith("student.") for key in state)
        weights[name] = {key.removeprefix("student."): value for key, value in state.items()}

    def moved(before, after):
        changed = {key for key in after if not torch.equal(before[key], after[key])}
        return {key.removeprefix("model.").split(".")[0] for key in changed} - {"lm_head"}

    assert moved(stock, weights["phase1"]) == {"vision_tower"}
    assert moved(weights["phase1"], weights["phase2"]) == {"multi_modal_projector", "image_newline", "language_model"}
    assert moved(weights["phase2"], weights["phase3"]) >= {"vision_tower", "multi_modal_projector", "language_model"}
    logged = (places / STRATEGIES["phase3"] / "tensorboard_logs/t/metrics.csv").read_text().splitlines()[0]
    for term in ("ce", "kl", "patch", "contrastive", "contrastive_accuracy", "contrastive_chance", "corrected"):
        assert f"train/{term}" in logged.split(",")
    for term in ("student_entropy", "teacher_entropy", "teacher_ce"):
        assert f"train/{term}" in logged.split(",")
    assert "starting from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "more"), [("logit", ()), ("phase2", ("--from_stock",)), ("phase3", ("--from_stock",))]
)
def test_the_divergence_is_the_one_of_the_flag(places, tiny_folder, tiny_teacher, monkeypatch, name, more):
    """The KL term of the first step, of one student: each divergence has its own value, the mixture's the least."""
    terms, log = [], UpdateLog.on_train_batch_end

    def keep(self, trainer, module, outputs, *args):
        terms.append({term: float(value.detach()) for term, value in outputs["terms"].items()})
        log(self, trainer, module, outputs, *args)

    monkeypatch.setattr(UpdateLog, "on_train_batch_end", keep)
    found = {}
    for divergence in ("forward_kl", "reverse_kl", "jensen_shannon"):
        terms.clear()
        flags = ("--divergence", divergence, "--max_steps", "1", "--run_name", divergence)
        distill(name, tiny_folder, tiny_teacher, *more, *flags)
        found[divergence], ce = terms[0]["kl"], terms[0]["ce"]
        assert terms[0]["loss"] == pytest.approx(
            ce + found[divergence] + 0.5 * terms[0].get("patch", 0) + 0.1 * terms[0].get("contrastive", 0), rel=1e-5
        )
    forward, reverse, middle = found.values()
    assert forward > 0 and reverse > 0 and abs(forward - reverse) > 0.01 * forward
    # KL is convex: at most a quarter of the symmetric divergence; and never above ln 2.
    assert 0 < middle <= min((forward + reverse) / 4, math.log(2))


@pytest.mark.parametrize("name", ["feature", "logit"])
def test_single_stage_strategies(places, tiny_folder, tiny_teacher, name):
    distill(name, tiny_folder, tiny_teacher, "--export", str(places / "export"), "--label_fraction", "0.5")
    (best,) = (places / STRATEGIES[name] / "checkpoints/t").glob("best*.ckpt")
    others = {key for key in read_checkpoint(best)["state_dict"] if not key.startswith("student.")}
    assert others == ({"hidden_map.weight", "hidden_map.bias"} if name == "feature" else set())
    exported = load_model(str(places / "export")).state_dict()  # the map is not part of the student
    assert exported.keys() == load_model(str(tiny_folder)).state_dict().keys()


def test_a_phase_needs_the_checkpoint_of_the_phase_before(places, tiny_folder, tiny_teacher, capsys):
    with pytest.raises(SystemExit):
        distill("phase2", tiny_folder, tiny_teacher)
    assert f"distillation/{TROUBLE}/phase1/train_online_kd.py" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"make one with: python distillation/{TROUBLE}/phase1/train_online_kd.py"):
        distill("phase2", tiny_folder, tiny_teacher, "--load_checkpoint")
    train("baseline_depth", tiny_folder, "--max_steps", "1")
    with pytest.raises(UserError, match=f"is of baseline_depth; this script builds on {TROUBLE}/phase1"):
        distill("phase2", tiny_folder, tiny_teacher, "--load_checkpoint", str(places / "baseline_depth/checkpoints/t"))
    distill("phase1", tiny_folder, tiny_teacher, "--depth_encoding", "grey", "--max_steps", "1")
    with pytest.raises(UserError, match="depth_encoding grey, this run has metric_log3"):
        distill("phase2", tiny_folder, tiny_teacher, "--load_checkpoint")


def test_phases_of_one_road_see_the_same_labels(places, tiny_folder, tiny_teacher):
    """A phase 3 with few labels may not start from a phase 2 that has read all of them, nor from other few ones."""
    short = ("--max_steps", "1")
    distill("phase2", tiny_folder, tiny_teacher, "--from_stock", *short)
    with pytest.raises(UserError, match="label_fraction 1.0, this run has 0.5"):
        distill("phase3", tiny_folder, tiny_teacher, "--load_checkpoint", *short, "--label_fraction", "0.5")
    half = ("--label_fraction", "0.5", *short)
    distill("phase2", tiny_folder, tiny_teacher, "--from_stock", *half, "--run_name", "half")
    from_half = ("--load_checkpoint", "half", *half, "--run_name", "p3")
    with pytest.raises(UserError, match="seed 0, this run has 1"):
        distill("phase3", tiny_folder, tiny_teacher, *from_half, "--seed", "1")
    distill("phase3", tiny_folder, tiny_teacher, *from_half)


def test_a_requeued_phase_starts_from_the_phase_before(places, tiny_folder, tiny_teacher, capsys, monkeypatch):
    """--resume auto with nothing to resume: the phase before is loaded all the same; without it there is no start."""
    with pytest.raises(SystemExit):
        distill("phase3", tiny_folder, tiny_teacher, "--resume", "auto")
    distill("phase2", tiny_folder, tiny_teacher, "--from_stock", "--max_steps", "2")
    capsys.readouterr()
    again = ("--resume", "auto", "--load_checkpoint")
    with interrupted(3):
        distill("phase3", tiny_folder, tiny_teacher, *again)
    said = capsys.readouterr().out
    assert "starting a new run" in said and "starting from" in said
    # Newer code is no reason to start over, but one to ask the teacher again.
    outputs = list((places / "teacher_outputs").iterdir())
    monkeypatch.setattr(teacher_module, "source_digest", lambda *args, **options: "newer")
    distill("phase3", tiny_folder, tiny_teacher, *again)
    assert len(list((places / "teacher_outputs").iterdir())) == len(outputs) + 1
    said = capsys.readouterr().out
    assert "continuing" in said and "starting from" not in said
    record = json.loads((places / STRATEGIES["phase3"] / "tensorboard_logs/t/run.json").read_text())
    assert record["load_checkpoint"].endswith(".ckpt") and len(record["teacher_outputs"]) == 16


def test_a_phase_can_start_from_the_stock_student(places, tiny_folder, tiny_teacher, capsys):
    """Without its weight a term leaves no trace: with cross-entropy alone phase 3 is the baseline, weight by weight."""
    alone = ("--kl_weight", "0", "--patch_weight", "0", "--contrastive_weight", "0", "--max_steps", "3")
    distill("phase3", tiny_folder, tiny_teacher, "--from_stock", *alone)
    assert "starting from" not in capsys.readouterr().out
    train("baseline_depth", tiny_folder, "--max_steps", "3")
    ours, baseline = (
        read_checkpoint(places / name / "checkpoints/t/last.ckpt")["state_dict"]
        for name in (STRATEGIES["phase3"], "baseline_depth")
    )
    for key, value in baseline.items():
        assert torch.equal(ours[key], value), key
    with pytest.raises(SystemExit):
        distill("phase3", tiny_folder, tiny_teacher, "--from_stock", "--load_checkpoint")
    assert "leave out --load_checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["phase3", "feature"])
def test_an_online_teacher_gives_the_same_training(places, tiny_folder, tiny_teacher, name):
    """All of the teacher's outputs are used: hidden states, own answers, patches, statistics and the bank."""
    more = ("--teacher_questions", "2", *(("--from_stock",) if name == "phase3" else ()))
    for teacher in ("cached", "online"):
        distill(name, tiny_folder, tiny_teacher, *more, "--teacher", teacher, "--run_name", teacher)
    runs = places / STRATEGIES[name] / "checkpoints"
    cached, online = (read_checkpoint(runs / teacher / "last.ckpt")["state_dict"] for teacher in ("cached", "online"))
    for key, value in cached.items():
        torch.testing.assert_close(online[key], value, atol=2e-4, rtol=1e-3)
    losses = [
        [float(row["train/loss"]) for row in csv.DictReader(open(path, encoding="utf-8")) if row.get("train/loss")]
        for path in (places / STRATEGIES[name] / "tensorboard_logs" / t / "metrics.csv" for t in ("cached", "online"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0]
    with pytest.raises(SystemExit):
        distill(name, tiny_folder, tiny_teacher, *more, "--teacher", "online", "--num_workers", "2")


def test_a_vision_cache_changes_no_weight(places, tiny_folder, tiny_teacher, capsys):
    """Phase 2 from pixels, from features made now, and from those found on disk; a damaged one is made anew."""
    more = ("--from_stock", "--teacher_questions", "1")
    distill("phase2", tiny_folder, tiny_teacher, *more, "--run_name", "pixels")
    for run in ("made", "found"):
        distill("phase2", tiny_folder, tiny_teacher, *more, "--vision_cache", "--run_name", run)
        files = sorted((places / "vision_cache").rglob("*.tensors"))
        if run == "made":  # it is found where it is read, since a start opens none of them
            files[0].write_bytes(files[0].read_bytes()[:-1])
            with pytest.raises(UserError, match="features are damaged; start again, and they are made anew"):
                distill("phase2", tiny_folder, tiny_teacher, *more, "--vision_cache", "--run_name", "stops")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--vision_cache")]
    assert len(files) == 32 and len(said) == 3  # training images, validation images, the damaged one
    runs = places / STRATEGIES["phase2"] / "checkpoints"
    pixels, *cached = (read_checkpoint(runs / run / "last.ckpt")["state_dict"] for run in ("pixels", "made", "found"))
    for key, value in pixels.items():
        assert torch.equal(cached[0][key], cached[1][key])
        torch.testing.assert_close(cached[0][key], value, atol=2e-4, rtol=1e-3)
    with pytest.raises(SystemExit):
        distill("phase2", tiny_folder, tiny_teacher, *more, "--vision_cache", "--augmentation")
    assert "--vision_cache" in capsys.readouterr().err


def test_a_resumed_run_reads_the_features_of_its_own_tower(places, tiny_folder, tiny_teacher):
    """Phase 2 on an aligned tower, one epoch and then another: with features from disk as from pixels."""
    distill("phase1", tiny_folder, tiny_teacher, "--vision_lr", "1e-2")
    for run, more in (("pixels", ()), ("cached", ("--vision_cache",))):
        start = ("--load_checkpoint", "--run_name", run, *more)
        distill("phase2", tiny_folder, tiny_teacher, *start, "--max_epochs", "1")
        distill("phase2", tiny_folder, tiny_teacher, *start, "--max_epochs", "2", "--resume", "auto")
    runs = places / STRATEGIES["phase2"] / "checkpoints"
    pixels, cached = (read_checkpoint(runs / run / "last.ckpt")["state_dict"] for run in ("pixels", "cached"))
    for key, value in pixels.items():
        torch.testing.assert_close(cached[key], value, atol=2e-4, rtol=1e-3)


def test_a_run_older_than_a_flag_goes_on_with_what_it_did(places, tiny_folder, tiny_teacher):
    with interrupted(8):
        distill("logit", tiny_folder, tiny_teacher)
    path = places / STRATEGIES["logit"] / "checkpoints/t/last.ckpt"
    checkpoint = read_checkpoint(path)
    del checkpoint["hyper_parameters"]["divergence"]
    SafeCheckpointIO().save_checkpoint(checkpoint, path)
    with pytest.raises(UserError, match="was started with divergence forward_kl, now it is reverse_kl"):
        distill("logit", tiny_folder, tiny_teacher, "--resume", "auto", "--divergence", "reverse_kl")
    distill("logit", tiny_folder, tiny_teacher, "--resume", "auto")
    assert read_checkpoint(path)["global_step"] == 12


def test_an_interrupted_distillation_resumes_bit_exactly(places, tiny_folder, tiny_teacher):
    """Further questions are drawn anew for every image and epoch; the feature-based script has weights of its own."""
    more = ("--teacher_questions", "1", "--label_fraction", "0.5")
    distill("feature", tiny_folder, tiny_teacher, *more)
    with interrupted(8):
        distill("feature", tiny_folder, tiny_teacher, *more, "--run_name", "cut")
    distill("feature", tiny_folder, tiny_teacher, *more, "--run_name", "cut", "--resume", "auto")
    runs = places / STRATEGIES["feature"] / "checkpoints"
    done, resumed = (read_checkpoint(runs / run / "last.ckpt")["state_dict"] for run in ("t", "cut"))
    assert done.keys() == resumed.keys() and all(torch.equal(done[key], resumed[key]) for key in done)
    with pytest.raises(UserError, match="label_fraction"):
        distill("feature", tiny_folder, tiny_teacher, *more[:2], "--run_name", "cut", "--resume", "auto")


def test_dry_run_of_a_distillation_writes_nothing(places, tiny_folder, tiny_teacher, capsys):
    distill("logit", tiny_folder, tiny_teacher, "--dry_run", "--measure", "--teacher_questions", "2")
    assert "peak memory" in capsys.readouterr().out
    assert not places.exists()
