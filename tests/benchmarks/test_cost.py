"""The benchmark is fair: all variants compute the same loss and gradient, both ways of scoring the same answers."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import cost, flops
from benchmarks.cost import Example, Models, Width
from distillation.losses import forward_kl, loca_logits
from utils import UserError, peak_memory

PAIR = Width(vocabulary=400, vision=16, student=32, teacher=64)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    costs = cost.prepare(PAIR, folder, 2)
    assert costs["teacher_s"] > 0
    return torch.load(folder / "cache.pt", weights_only=True)


@pytest.fixture(scope="module")
def examples(stored):
    return [Example(*example) for example in stored["examples"]]


def test_every_variant_has_the_same_loss_and_gradient(stored, examples):
    results = {}
    for name, step in cost.VARIANTS.items():
        models = Models(cost.build_student(PAIR), cost.build_teacher(PAIR), stored["head"])
        loss = step(models, examples)
        gradients = {n: p.grad for n, p in models.student.named_parameters() if p.grad is not None}
        results[name] = loss, gradients
    loss, gradients = results.pop("original")
    assert loss > 0.01 and len(gradients) > 20
    assert not any("vision_tower" in name for name in gradients)
    for name, (other, theirs) in results.items():
        assert other == pytest.approx(loss, rel=cost.LOSS_TOLERANCE), name
        assert theirs.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(theirs[key], gradient, atol=1e-5, rtol=1e-3)


def test_stored_variants_need_no_teacher(stored, examples):
    """Their memory would not be what is claimed."""
    for name in cost.VARIANTS.keys() - set(cost.WITH_TEACHER):
        assert cost.VARIANTS[name](Models(cost.build_student(PAIR), None, stored["head"]), examples) > 0


def test_the_original_pays_for_loca_on_wrong_rows():
    """Where the teacher is wrong its target is LoCa's, on the positions before the answer tokens and nowhere else."""
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(1, 7, 9), 3 * torch.randn(1, 7, 9), torch.randint(0, 9, (1, 7))
    labels[0, :3] = -100
    rows, targets = slice(2, 6), labels[0, 3:]
    ours, corrected = loca_logits(teacher_logits=teacher[0, rows], targets=targets, alpha=cost.LOCA_ALPHA)
    assert corrected.any()
    ce = torch.nn.functional.cross_entropy(student[0, rows], targets)
    outputs = SimpleNamespace(logits=student, loss=ce), SimpleNamespace(logits=teacher)
    expected = forward_kl(student_logits=student[0, rows], teacher_logits=ours) + 4 * ce
    torch.testing.assert_close(cost.original_loss(*outputs, labels), expected, atol=1e-4, rtol=1e-4)


def test_both_ways_of_scoring_give_the_same_answers():
    model = cost.build_student(PAIR)
    examples = [cost.random_example(seed, PAIR.vocabulary) for seed in (3, 4)]
    answers = [score(model, examples) for score in cost.SCORING.values()]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 2 * flops.QUESTIONS and len({tuple(a) for a in answers[0]}) > 2


def test_unequal_losses_stop_the_run():
    equal, other = [{"loss": 1.0}], [{"loss": 1.001}]
    cost.check_equal_losses({"a": equal, "b": equal}, "pair")
    with pytest.raises(UserError, match="pair: the variants' losses differ"):
        cost.check_equal_losses({"a": equal, "b": other}, "pair")
    with pytest.raises(UserError, match="losses differ"):
        cost.check_equal_losses({"a": equal, "b": [{"loss": float("nan")}]}, "pair")


def test_memory_without_proc(tmp_path, monkeypatch):
    """macOS: growth is then counted from the peak so far."""
    assert 0 < cost.resident_mib() < 1.01 * peak_memory() / 2**20  # the kernel counts the two in different ways
    monkeypatch.setattr(cost, "STATM", tmp_path / "statm")
    assert cost.resident_mib() == pytest.approx(peak_memory() / 2**20, rel=0.01)


def test_examples_are_as_long_as_their_picture_says(examples):
    """268 image tokens: the model refuses another number of placeholders."""
    features = cost.build_student(PAIR).get_image_features(**examples[0].images, return_dict=True).pooler_output
    assert [len(tokens) for tokens in features] == [cost.IMAGE_TOKENS]
    assert cost.count_answer_tokens(examples) == sum(len(e.hidden) for e in examples) == 2 * (1 + 2 + 3 + 1)
