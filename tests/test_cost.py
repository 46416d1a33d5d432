"""The benchmark's fairness: all arms compute one loss with one gradient, both ways of scoring one set of answers."""

import pytest
import torch

from benchmarks import cost
from benchmarks.cost import Arm, Example, Width
from utils import UserError

PAIR = Width(vocabulary=400, vision=16, student=32, teacher=64)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    costs = cost.prepare(PAIR, folder, 2)
    assert costs["teacher_s"] > 0
    return torch.load(folder / "cache.pt", weights_only=True)


def test_every_arm_has_the_same_loss_and_gradient(stored):
    results = {}
    for name, step in cost.ARMS.items():
        arm = Arm(cost.build_student(PAIR), cost.build_teacher(PAIR), stored["head"])
        loss = step(arm, stored["examples"][1])
        gradients = {n: p.grad for n, p in arm.student.named_parameters() if p.grad is not None}
        results[name] = loss, gradients
    loss, gradients = results.pop("original")
    assert loss > 0.01 and len(gradients) > 20
    assert not any("vision_tower" in name for name in gradients)
    for name, (other, theirs) in results.items():
        assert other == pytest.approx(loss, rel=cost.LOSS_TOLERANCE), name
        assert theirs.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(theirs[key], gradient, atol=1e-5, rtol=1e-3)


def test_stored_arms_hold_no_teacher():
    """Their memory would not be what is claimed."""
    assert set(cost.WITH_TEACHER) < set(cost.ARMS)
    stored = {"example": None}
    for name in cost.ARMS.keys() - set(cost.WITH_TEACHER):
        with pytest.raises(TypeError):  # reaches the stored outputs, never the teacher
            cost.ARMS[name](Arm(torch.nn.Identity(), None, torch.zeros(2, 2)), stored)


def test_the_original_pays_for_loca_on_wrong_rows():
    """Where the teacher is wrong its target is LoCa's: the margin of the gold token is 1 - alpha."""
    from distillation.losses import forward_kl, loca_logits

    torch.manual_seed(0)
    student, teacher, labels = torch.randn(1, 6, 9), 3 * torch.randn(1, 6, 9), torch.randint(0, 9, (1, 6))
    ours, corrected = loca_logits(teacher_logits=teacher[0], targets=labels[0], alpha=cost.LOCA_ALPHA)
    assert corrected.any()
    expected = 6 * forward_kl(student_logits=student[0], teacher_logits=ours)
    torch.testing.assert_close(cost.original_loss(student, teacher, labels), expected, atol=1e-4, rtol=1e-4)


def test_both_ways_of_scoring_give_the_same_answers():
    model = cost.build_student(PAIR)
    examples = [cost.random_example(seed, PAIR.vocabulary) for seed in (3, 4)]
    answers = [score(model, examples) for score in cost.SCORING.values()]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 2 * cost.QUESTIONS and len({tuple(a) for a in answers[0]}) > 2


def test_unequal_losses_stop_the_run():
    equal, other = [{"loss": 1.0}], [{"loss": 1.001}]
    cost.check_equal_losses({"a": equal, "b": equal}, "pair")
    with pytest.raises(UserError, match="pair: the arms' losses differ"):
        cost.check_equal_losses({"a": equal, "b": other}, "pair")
    with pytest.raises(UserError, match="losses differ"):
        cost.check_equal_losses({"a": equal, "b": [{"loss": float("nan")}]}, "pair")


def test_examples_are_as_long_as_their_picture_says(stored):
    """268 image tokens: the model refuses another number of placeholders."""
    example = Example(*stored["examples"][0]["example"])
    model = cost.build_student(PAIR)
    features = model.get_image_features(**example.images, return_dict=True).pooler_output
    assert [len(tokens) for tokens in features] == [cost.IMAGE_TOKENS]
    assert cost.count_answer_tokens(example) == len(stored["examples"][0]["hidden"]) == 1 + 2 + 3 + 1


def test_operations_at_true_size():
    """5 tiles through 26 layers and the 7B over 2,956 tokens, both by hand; every lever only takes away."""
    teacher = cost._Counted(cost.meta_model("7b"))
    n, d, f, k, layers = 2956, 3584, 18944, 512, 28
    assert teacher.text(n) == pytest.approx(
        layers * (2 * n * (2 * d * d + 2 * d * k + 3 * d * f) + 4 * n * n * d) / 1e12
    )
    assert teacher.tower(5) == pytest.approx(5 * 0.6418, rel=1e-3)
    counted = list(cost.true_flops().values())
    assert counted == sorted(counted, reverse=True) and counted[0] / counted[-1] > 20
