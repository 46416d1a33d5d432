"""A teacher, and a base under adapters, whose language model is frozen in 4 bits (bitsandbytes' CPU code)."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distillation import models, teacher
from distillation.models import MINIATURE_STUDENT, MINIATURE_TEACHER, count_parameters, load_model, restore_student
from distillation.run.checkpoints import read_checkpoint
from evaluation.onevisionv3.sunrgbd import evaluate_onevision
from tests.helpers.training import distill, flags, train
from utils import UserError, load_script

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (requirements-optional.txt)"
)
LORA = ("--lora_rank", "2", "--lora_alpha", "4")


def packed(model: nn.Module) -> set[str]:
    """The parts of a model that have weights in 4 bits."""
    names = (name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit")
    return {name.split("layers.")[0].split("base_layer")[0].rstrip(".") for name in names}


@needs_bitsandbytes
def test_only_the_language_model_is_packed_and_its_values_stay_near():
    whole, four = load_model(MINIATURE_TEACHER), load_model(MINIATURE_TEACHER, bits=4)
    assert packed(four) == {"model.language_model"} and not packed(whole)
    assert count_parameters(four)[1] == count_parameters(whole)[1]
    eye = torch.eye(whole.config.text_config.hidden_size)
    for own, other in zip(four.model.language_model.layers, whole.model.language_model.layers, strict=True):
        seen, true = (layer.mlp.up_proj(eye).T for layer in (own, other))
        assert 0.01 < (seen - true).norm() / true.norm() < 0.12  # 16 levels per block of 64
    tower = four.model.vision_tower.state_dict()
    assert all(torch.equal(value, tower[name]) for name, value in whole.model.vision_tower.state_dict().items())


@needs_bitsandbytes
def test_a_teacher_in_four_bits_has_outputs_of_its_own(places, capsys):
    """Its accuracy stands beside that of the whole one as soon as that is known."""
    pair = (MINIATURE_STUDENT, MINIATURE_TEACHER, "--max_steps", "1")
    distill("logit", *pair, "--teacher_bits", "4", "--run_name", "first")
    assert "is known after --teacher_bits 16" in capsys.readouterr().out
    distill("logit", *pair, "--run_name", "whole")
    assert "has 4 bits" not in capsys.readouterr().out
    distill("logit", *pair, "--teacher_bits", "4", "--run_name", "again")
    assert "on val; in 16 it has 0." in capsys.readouterr().out
    assert len([folder for folder in (places / "teacher_outputs").iterdir() if folder.is_dir()]) == 2
    folder = places / "knowledge_distillation7b_logit_based/checkpoints"
    records = {
        name: read_checkpoint(folder / name / "last.ckpt")["hyper_parameters"] for name in ("first", "whole", "again")
    }
    assert [record["teacher_bits"] for record in records.values()] == [4, 16, 4]
    assert records["first"]["teacher_outputs"] == records["again"]["teacher_outputs"]
    assert records["first"]["teacher_weights"] != records["whole"]["teacher_weights"]


@needs_bitsandbytes
def test_adapters_on_four_bits_are_scored_exported_and_taught_from(places, tmp_path, capsys):
    """The record says so: evaluation and distillation take the same base; an export has whole weights."""
    export = ("--export", str(tmp_path / "export"))
    train("baseline_rgb7b", MINIATURE_TEACHER, *LORA, "--base_bits", "4", "--lr", "1e-2", *export)
    path = places / "baseline_rgb7b/checkpoints/t/last.ckpt"
    checkpoint = read_checkpoint(path)
    adapters = [value for name, value in checkpoint["state_dict"].items() if "lora_B" in name]
    assert adapters and all(value.abs().max() > 0 for value in adapters)
    restored = restore_student(checkpoint, origin=str(path))
    assert packed(restored) == {"base_model.model.model.language_model"}
    exported = load_model(str(tmp_path / "export"))
    assert not packed(exported) and exported.num_parameters() == count_parameters(load_model(MINIATURE_TEACHER))[1]
    argv = ["--ckpt_path", str(path), "--max_new_tokens", "4", "--output", str(tmp_path / "scores")]
    evaluate_onevision.main(evaluate_onevision.parse_args(argv))
    taught = flags(MINIATURE_STUDENT, "--max_steps", "1", "--teacher_checkpoint", "t")
    script = load_script("distillation/knowledge_distillation7b_logit_based/train_online_kd.py")
    script.main(script.parse_args([*taught, "--run_name", "taught"]))
    assert ".ckpt in 4 bits, tuned on 100 % of the labels; on val" in capsys.readouterr().out
    with pytest.raises(UserError, match="--teacher_bits 16: .*was tuned with 4; .*--base_bits 16"):
        script.main(script.parse_args([*taught, "--run_name", "refused", "--teacher_bits", "16"]))


@needs_bitsandbytes
def test_a_road_and_a_resumed_run_keep_the_bits_that_they_began_with(places):
    """With `auto`, whatever fits this machine; others are refused before the teacher has computed anything."""
    pair = (MINIATURE_STUDENT, MINIATURE_TEACHER)
    distill("phase2", *pair, "--from_stock", "--teacher_bits", "4", "--max_steps", "1")
    start = ("--load_checkpoint", "t", "--max_steps", "1", "--run_name", "after")
    with pytest.raises(UserError, match=r"another teacher \(dataset.* in 4 bits; here it is dataset.* in 16 bits\)"):
        distill("phase3", *pair, *start, "--teacher_bits", "16")
    with pytest.raises(UserError, match="was started with teacher_bits 4, now it is 16"):
        distill("phase2", *pair, "--from_stock", "--resume", "t", "--max_steps", "2", "--teacher_bits", "16")
    distill("phase3", *pair, *start)
    distill("phase2", *pair, "--from_stock", "--resume", "t", "--max_steps", "2")
    for phase, name, updates in (("phase2", "t", 2), ("phase3", "after", 1)):
        path = places / f"knowledge_distillation7b_double_trouble/{phase}/checkpoints/{name}/last.ckpt"
        checkpoint = read_checkpoint(path)
        assert (checkpoint["global_step"], checkpoint["hyper_parameters"]["teacher_bits"]) == (updates, 4)
    assert len([folder for folder in (places / "teacher_outputs").iterdir() if folder.is_dir()]) == 1


def test_four_bits_are_chosen_where_weights_do_not_fit(monkeypatch):
    """As they are loaded: in float32 on a GPU without bfloat16, they take twice as much."""
    weights = count_parameters(load_model(MINIATURE_TEACHER))[1]
    gpu = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))
    monkeypatch.setattr(teacher, "probe", lambda args: gpu)
    script = load_script("distillation/knowledge_distillation7b_logit_based/train_online_kd.py")
    for precision, bytes_each in (("bf16-mixed", 2), ("32-true", 4)):
        given = ("--teacher_name", MINIATURE_TEACHER, "--precision", precision)
        args = script.parse_args(flags(MINIATURE_STUDENT, *given))
        for share, bits in ((0.8, 16), (0.9, 4)):
            card = SimpleNamespace(total_memory=weights * bytes_each / share)
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
            assert teacher.named_teacher(args, {}).bits == bits


def test_four_bits_need_bitsandbytes_and_adapters(places, tiny_folder, monkeypatch, capsys):
    script = load_script("distillation/baseline_rgb7b/train2.py")
    for more in (("--lora_rank", "0", "--vision_lr", "1e-6"), (*LORA, "--strategy", "fsdp2")):
        with pytest.raises(SystemExit):
            script.parse_args(flags(tiny_folder, "--base_bits", "4", *more))
        assert "--base_bits 4: such weights train under LoRA only" in capsys.readouterr().err
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="4 bits need bitsandbytes, .* requirements-optional.txt"):
        train("baseline_rgb7b", tiny_folder, *LORA, "--base_bits", "4")
