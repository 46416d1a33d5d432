"""The models at true size: their parameters, what LoRA trains of them, and their operations, counted by hand."""

import pytest

from benchmarks.flops import _Counted, meta_model, true_flops
from distillation.models import add_lora, count_parameters, parameter_groups


def test_true_sizes():
    """893,675,552 parameters are the 1.787 GB of the published float16 file; without the tower 495,927,808 train."""
    model = meta_model("0.5b")
    assert count_parameters(model) == (893_675_552, 893_675_552)
    vision, others = (group["params"] for group in parameter_groups(model, lr=1e-5, vision_lr=2e-6))
    assert sum(p.numel() for p in vision) == 397_747_744
    assert sum(p.numel() for p in others) == 495_927_808
    assert count_parameters(meta_model("7b"))[1] == 8_030_807_584


def test_lora_trains_adapters_and_projector_only():
    rank = 16
    model = add_lora(meta_model("0.5b"), rank=rank, alpha=32)
    width, kv, ffn, layers = 896, 128, 4864, 24
    per_layer = rank * (2 * (width + width) + 2 * (width + kv) + 3 * (width + ffn))
    assert count_parameters(model)[0] == layers * per_layer + 1_836_800
    (others,) = parameter_groups(model, lr=1e-4)  # no group for a tower that does not train
    assert sum(p.numel() for p in others["params"]) == layers * per_layer + 1_836_800


def test_operations_at_true_size():
    """5 tiles through 26 layers and the 7B over 2,956 tokens, both by hand; every lever only takes away."""
    teacher = _Counted(meta_model("7b"))
    n, d, f, k, layers = 2956, 3584, 18944, 512, 28
    assert teacher.text(n) == pytest.approx(
        layers * (2 * n * (2 * d * d + 2 * d * k + 3 * d * f) + 4 * n * n * d) / 1e12
    )
    prefix, blocks, answers = 2929, 27, 3  # the last layer: keys and values everywhere, all else at the answers
    square = prefix * prefix + blocks * n
    whole = (layers - 1) * (2 * n * (2 * d * d + 2 * d * k + 3 * d * f) + 4 * d * square)
    last = 2 * n * 2 * d * k + answers * (2 * (2 * d * d + 3 * d * f) + 4 * n * d)
    counted = teacher.answers(n_prefix=prefix, n_blocks=blocks, n_answers=answers)
    assert counted == pytest.approx((whole + last) / 1e12)
    assert teacher.tower(5) == pytest.approx(5 * 0.6418, rel=1e-3)
    counted = true_flops()
    assert counted["original"] > counted["online"] > counted["online packed"] > counted["packed"]
    assert counted["online"] > counted["cached"] > counted["packed"] > counted["cached vision"]
    assert counted["original"] / counted["cached vision"] > 20
