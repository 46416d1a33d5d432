"""The study's statistics and the fairness of its arms; the training itself is what the scripts' own tests are about."""

import pytest
import torch
from scipy import stats

from benchmarks import reproduce
from distillation.models import MINIATURE_STUDENT, load_model
from evaluation.metrics import QUESTION_TYPES


def run(arm, seed, by_depth):
    scores = dict.fromkeys(["By depth", "Overall", *QUESTION_TYPES, "Val"], by_depth)
    return {"arm": arm, "fraction": 1.0, "seed": seed, "scores": scores}


def test_every_arm_takes_as_many_epochs():
    for stages in (reproduce.ARMS | reproduce.FULL_LABEL_ARMS).values():
        assert sum(stage.epochs for stage in stages) == reproduce.EPOCHS


def test_gains_are_paired_by_seed():
    """Seeds differ far more than arms do: only the differences within a seed show the gain."""
    runs = [run(reproduce.CONTROL, seed, 0.3 + 0.1 * seed) for seed in range(4)]
    runs += [run("other", seed, 0.4 + 0.1 * seed + 0.01 * (seed % 2)) for seed in range(4)]
    header, rule, control, other = reproduce.table(runs, 1.0)
    assert header.count("|") == rule.count("|") == control.count("|") == other.count("|")
    assert control.startswith("| label-only | 45.0 ± 12.9 |") and control.endswith("|  |")
    low, high = stats.ttest_1samp([10, 11, 10, 11], 0).confidence_interval()
    assert other.endswith(f"| +10.5 [{low:+.1f}, {high:+.1f}] |")
    assert reproduce.table(runs, 0.1)[2:] == []


def test_a_start_differs_by_seed_and_comes_back(tmp_path):
    stock = load_model(MINIATURE_STUDENT).state_dict()
    starts = [load_model(str(reproduce.student_start(tmp_path, seed))).state_dict() for seed in (0, 1, 0)]
    for name, weight in stock.items():
        assert torch.equal(starts[0][name], starts[2][name])
        relative = (starts[0][name] - weight).norm() / weight.norm()
        assert relative == pytest.approx(reproduce.START_NOISE, rel=0.35) or weight.numel() < 200 or not weight.any()
    assert not torch.equal(starts[0]["lm_head.weight"], starts[1]["lm_head.weight"])
