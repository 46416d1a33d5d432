"""The plan of a run: from the configuration alone, equal to what a real step takes, for every script."""

import argparse
import re
from contextlib import nullcontext

import pytest
import torch

from dataset.inputs.pictures import ImageSettings
from distillation import cost, plan
from distillation.models import MINIATURE_STUDENT, MINIATURE_TEACHER, add_lora, load_model, set_trainable
from distillation.run.data import use_vision_cache
from distillation.run.sharding import sharded_layers
from distillation.shapes import StepMemory, peak
from evaluation.onevisionv3.sunrgbd import evaluate_onevision
from tests.helpers.training import data_module, flags, teacher_of
from tests.helpers.updates import SCRIPTS, argv_of, script_of
from utils import ROOT, UserError, load_script


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    """No data, and a folder for outputs in which nothing may appear."""
    monkeypatch.setenv("ROOT_DATA_DIR", str(tmp_path / "no_data"))
    monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(tmp_path / "out"))
    yield tmp_path
    assert not (tmp_path / "out").exists()


def planned(name, argv, capsys):
    script = load_script(script_of(name))
    with pytest.raises(SystemExit) as left:
        script.main(script.parse_args([*argv, "--dry_run"]))
    assert not left.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_a_plan_without_data_or_weights(name, nothing_here, tiny_folder, tiny_teacher, capsys):
    for folder in (tiny_folder, tiny_teacher):
        (nothing_here / folder.name).mkdir()
        for file in folder.iterdir():
            if file.suffix != ".safetensors":
                (nothing_here / folder.name / file.name).write_bytes(file.read_bytes())
    argv = argv_of(name, nothing_here / tiny_folder.name, nothing_here / tiny_teacher.name)
    said = planned(name, argv, capsys)
    trains, total = (
        int(n.replace(",", "")) for n in re.search(r"([\d,]+) of ([\d,]+) parameters train", said).groups()
    )
    model = load_model(str(tiny_folder))
    tower = sum(p.numel() for p in model.model.vision_tower.parameters() if p.requires_grad)
    expected = {"phase1": tower, "phase2": cost.count_parameters(model)[0] - tower}
    assert trains == expected.get(name, cost.count_parameters(model)[0]) and total == cost.count_parameters(model)[1]
    assert "assumed: no question file is here" in said and said.count(" GiB: fits with ") == 4
    assert ("the teacher in 4 bits, once: " in said) == ("--teacher_name" in argv)


def test_adapters_are_planned_on_a_frozen_base(nothing_here):
    """LoRA's own weights, gradients and moments are small; the base is in 16 bits, or in 4."""
    script = load_script("distillation/baseline_rgb7b/train2.py")
    given = ["--student_name", MINIATURE_TEACHER, "--image_tokens", "one_tile", "--batch_size", "1", "--dry_run"]
    whole, four = (
        cost.cost_of(script.parse_args([*given, *more]), ROOT / "distillation/baseline_rgb7b/train2.py")
        for more in ([], ["--base_bits", "4"])
    )
    model = add_lora(load_model(MINIATURE_TEACHER), rank=16, alpha=32)
    assert (whole.trainable, whole.parameters) == cost.count_parameters(model)
    layers = load_model(MINIATURE_TEACHER).model.language_model.layers
    packed = sum(m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear))
    assert whole.memory.weights - four.memory.weights == pytest.approx(packed * (2 - cost.NF4_BYTES), rel=1e-6)
    assert whole.memory.optimizer < 8.5 * whole.trainable
    frozen = whole.parameters - whole.trainable  # in bfloat16, as on a GPU, whatever this machine would choose
    assert whole.memory.weights == pytest.approx(2 * frozen + 4 * whole.trainable, rel=0.01)


def test_a_plan_follows_the_flags_that_change_a_run(nothing_here, tiny_folder, capsys):
    """Devices that are not here, a limit on updates, questions of an image, few labels; phase 1 has no labels."""
    argv = ["--student_name", str(tiny_folder), "--image_tokens", "one_tile", "--batch_size", "2"]
    argv += ["--accumulate_grad_batches", "2", "--max_epochs", "3"]
    for more, *expected in (
        ([], "with 7 in a row of training, on 1 device(s)", f"{3 * 1184:,} updates in 3 epochs"),
        (
            ["--devices", "8", "--num_nodes", "2"],
            "on 16 device(s)",
            f"{3 * 74:,} updates in 3 epochs",
            "at 16 x 300 TFLOP/s",
        ),
        (["--devices", "0,1"], "on 2 device(s)"),
        (["--max_steps", "100"], "100 updates in 0.0845 epochs"),
        (["--questions_per_image", "2"], "with 2 in a row"),
        (["--label_fraction", "0.1"], "with 1 in a row"),
    ):
        said = planned("baseline_depth", [*argv, *more], capsys)
        assert [text for text in expected if text not in said] == [], more
    distilled = ["--teacher_name", str(tiny_folder), "--label_fraction", "0.1", "--teacher_questions", "4"]
    assert "with 11 in a row" in planned("logit", [*argv, *distilled], capsys)


def test_ranks_share_what_layers_do_not_need_whole(nothing_here):
    """With FSDP2: of 512 ranks each holds its two layers at work and what is in no layer; activations stay its own."""
    script = load_script(script_of("baseline_depth"))
    argv = ["--student_name", MINIATURE_STUDENT, "--image_tokens", "one_tile", "--batch_size", "1", "--dry_run"]
    alone, shared = (
        cost.cost_of(script.parse_args([*argv, *more]), ROOT / script_of("baseline_depth")).memory
        for more in ([], ["--strategy", "fsdp2", "--devices", "512"])
    )
    model = load_model(MINIATURE_STUDENT)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in sharded_layers(model)]
    root = sum(p.numel() for p in model.parameters()) - sum(layers)
    assert shared.weights - alone.weights // 512 == 4 * (root + 2 * max(layers)) < alone.weights
    assert shared.optimizer == alone.optimizer // 512
    assert (shared.activations, shared.logits) == (alone.activations, alone.logits)


def test_a_plan_finds_the_flags_that_fit_a_card(nothing_here, monkeypatch, capsys):
    """The base in 4 bits before the picture is cut down; with FSDP2 neither that nor moments in 8 bits."""
    script = load_script(script_of("baseline_rgb7b"))
    argv = ["--student_name", MINIATURE_STUDENT, "--batch_size", "2"]
    args = script.parse_args([*argv, "--dry_run"])
    needed = dict(plan.cheaper(args, ROOT / script_of("baseline_rgb7b")))
    (name,) = [flags for flags in needed if "--base_bits 4" in flags and "--image_tokens" not in flags]
    assert "--accumulate_grad_batches 32" in name and needed[name] < min(list(needed.values())[:3])
    monkeypatch.setattr(plan, "CARDS", {needed[name]: 1})
    assert f"GiB: fits with {needed[name]:.1f} and {name}; " in planned("baseline_rgb7b", argv, capsys)
    saved = list(plan.savings(script.parse_args([*argv, "--strategy", "fsdp2"])))[-1]
    assert saved == {"batch_size": 1, "gradient_checkpointing": True, "image_tokens": "one_tile"}


def test_a_plan_says_nothing_that_only_libraries_can_mend(nothing_here, recwarn, capsys):
    """With adapters, peft copies a module that has shapes alone, and asks transformers for an old name."""
    given = ["--student_name", MINIATURE_TEACHER, "--image_tokens", "one_tile", "--batch_size", "1"]
    assert "131,328 of 1,565,312 parameters train" in planned("baseline_rgb7b", given, capsys)
    assert not [str(warning.message) for warning in recwarn]


def leaves(batch, name=""):
    """Name -> what a step sees of each part of a batch that does not depend on which images and questions it has."""
    if isinstance(batch, dict):
        return {key: kind for part in sorted(batch) for key, kind in leaves(batch[part], f"{name}/{part}").items()}
    if not torch.is_tensor(batch):
        return {name: type(batch)}
    # (B, T) of texts and the number of answer tokens depend on the questions; all other sizes do not
    free = batch.ndim if "/text/" in name else 1 if name in ("/teacher/hidden", "/teacher/gold") else 0
    return {name: (batch.dtype, batch.ndim, tuple(batch.shape[free:]))}


@pytest.mark.parametrize("vision_cache", [False, True])
def test_a_planned_batch_is_one_of_the_loader(vision_cache, places, world, tiny_folder, tiny_teacher):
    """All that the data module puts into a batch, in the same types and sizes."""
    data = data_module(world, tiny_folder, teacher_questions=2)
    data.use_teacher(teacher_of(data, tiny_folder, tiny_teacher))
    if vision_cache:
        student = load_model(str(tiny_folder))
        set_trainable(student, vision=False, projector=True, language=True)
        script = load_script(script_of("phase2"))
        use_vision_cache(student, data, script.parse_args(flags(tiny_folder, "--from_stock", "--vision_cache")))
    batch = next(iter(data.train_dataloader()))
    config, _ = cost.configuration(str(tiny_folder))
    teacher, _ = cost.configuration(str(tiny_teacher))
    shapes = cost.TeacherShapes(teacher, len(data.processor.tokenizer), 24, torch.float32)
    args = argparse.Namespace(batch_size=data.batch_size, vision_cache=vision_cache)
    planned = cost.batch_of_shapes(args, data.student, config, cost.processor_of(str(tiny_folder)), shapes, 3)
    del batch["question_ids"]  # for the answers of a validation
    assert leaves(planned) == leaves(batch)


def test_shapes_take_the_memory_of_real_tensors(nothing_here):
    """The same tracker on the miniature's real weights: accumulating or not, in both precisions, checkpointed."""
    script = load_script("distillation/baseline_depth/train.py")
    for more in (
        ["--accumulate_grad_batches", "1"],
        ["--accumulate_grad_batches", "4"],
        ["--precision", "bf16-mixed"],
        ["--gradient_checkpointing"],
    ):
        argv = ["--miniature", "--image_tokens", "one_tile", "--batch_size", "4", "--precision", "32-true", *more]
        args = script.parse_args([*argv, "--dry_run"])
        planned = cost.cost_of(args, ROOT / "distillation/baseline_depth/train.py")
        assert planned.memory.total == pytest.approx(really_taken(script, args), rel=0.02)


def really_taken(script, args: argparse.Namespace) -> int:
    """Bytes at the peak of two micro-batches with an update between them, all tensors real."""
    student = load_model(MINIATURE_STUDENT)
    processor = cost.processor_of(MINIATURE_STUDENT)
    images = ImageSettings("depth", image_tokens="one_tile")
    batch = cost.batch_of_shapes(args, images, student.config, processor, None, cost.ASKED)
    module = script.SupervisedStudent(args, vocab_size=len(processor.tokenizer))
    module._trainer = argparse.Namespace(
        estimated_stepping_batches=9, accumulate_grad_batches=args.accumulate_grad_batches, world_size=1
    )
    (optimizer,), _ = module.configure_optimizers()
    if args.gradient_checkpointing:
        module.student.activation_checkpointing_enable({"use_reentrant": False})
    tracker = StepMemory({len(processor.tokenizer)})
    half = args.precision == "bf16-mixed"
    for counting in (nullcontext(), tracker):
        tracker.track_external(module, optimizer)
        with counting:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = module.training_step(batch, 0)["loss"]
            loss.backward()
            optimizer.step()
            if args.accumulate_grad_batches == 1:
                optimizer.zero_grad()
            del loss
    return peak(tracker).total


def test_the_true_pair_is_planned_from_built_in_shapes(nothing_here, capsys):
    """The published sizes; everything but the tower trains in phase 2, which a card of 16 GiB has room for."""
    said = planned("phase2", ["--from_stock", "--batch_size", "1", "--image_tokens", "one_tile"], capsys)
    assert (
        "(built in: it is not on this machine)" in said and "the teacher in 16 bits, once: 8,030,807,584 param" in said
    )
    assert "495,927,808 of 893,675,552 parameters train" in said
    assert re.search(r"16 GiB: fits with \d+\.\d, the teacher in 4 bits; .* at 30 TFLOP/s", said)


def test_no_plan_for_what_nobody_knows(nothing_here, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = load_script("distillation/baseline_depth/train.py")
    with pytest.raises(UserError, match="nobody/knows: no configuration is to be had, .* give a folder"):
        script.main(script.parse_args(["--student_name", "nobody/knows", "--dry_run"]))
    with pytest.raises(SystemExit):
        script.parse_args(["--measure"])


def test_scoring_has_a_plan(nothing_here, capsys):
    evaluate_onevision.main(evaluate_onevision.parse_args(["--dry_run", "--pixel_data_type", "depth"]))
    said = capsys.readouterr().out
    assert "893,675,552 parameters" in said and "5,050 images" in said and said.count("GiB: fits, ") == 4
    assert "3,121 tokens, 2,929 of them" in said
