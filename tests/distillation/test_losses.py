"""Losses: equal to loops written here, safe in half precision, blind to what is masked; LoCa keeps its promises."""

import math

import pytest
import torch

from dataset.inputs.prompts import answer_targets
from distillation.losses import (
    answer_cross_entropy,
    entropy,
    forward_kl,
    hidden_state_loss,
    info_nce,
    jensen_shannon,
    loca_logits,
    patch_cosine,
    patch_smooth_l1,
    reverse_kl,
)

INF, NAN = math.inf, math.nan
WEIGHTS = torch.tensor([[1.0, 0.25, 0.0, 0.5, 1.0], [0.0, 0.7, 1.0, 0.1, 0.0]], dtype=torch.float64)


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def loss_and_gradient(call, student, teacher):
    student = student.clone().requires_grad_()
    loss = call(student, teacher)
    loss.backward()
    return loss.detach(), student.grad


DIVERGENCES = {
    "forward_kl": lambda s, t, **o: forward_kl(student_logits=s, teacher_logits=t, **o),
    "reverse_kl": lambda s, t, **o: reverse_kl(student_logits=s, teacher_logits=t, **o),
    "jensen_shannon": lambda s, t, **o: jensen_shannon(student_logits=s, teacher_logits=t, beta=0.3, **o),
}
PATCH_LOSSES = {
    "patch_cosine": lambda s, t, **o: patch_cosine(student=s, teacher=t, **o),
    "patch_smooth_l1": lambda s, t, **o: patch_smooth_l1(student=s, teacher=t, beta=0.5, **o),
}
TOKENS = {
    **DIVERGENCES,
    "entropy": lambda s, t: entropy(logits=s, temperature=2.0),
    "answer_cross_entropy": lambda s, t: answer_cross_entropy(logits=s, targets=t.argmax(-1)),
}
ALL = {
    **{name: (call, (4, 7)) for name, call in TOKENS.items()},
    **{name: (call, (2, 5, 4)) for name, call in PATCH_LOSSES.items()},
    "hidden_state_loss": (lambda s, t: hidden_state_loss(student=s, teacher=t), (4, 6)),
    "info_nce": (lambda s, t: info_nce(queries=s, memory_bank=t, positives=torch.arange(len(s)))[0], (4, 6)),
}
each_loss = pytest.mark.parametrize(("call", "shape"), ALL.values(), ids=ALL)
each_divergence = pytest.mark.parametrize("call", DIVERGENCES.values(), ids=DIVERGENCES)
each_patch_loss = pytest.mark.parametrize("call", PATCH_LOSSES.values(), ids=PATCH_LOSSES)


@each_loss
def test_the_gradient_is_that_of_the_value_and_reaches_the_student_only(call, shape):
    student, teacher = random(*shape).requires_grad_(), random(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: call(s, teacher), (student,))
    loss = call(student, teacher)
    loss.backward()
    assert loss.ndim == 0 and loss.dtype == torch.float64
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@each_loss
def test_half_precision_inputs_are_computed_in_float32_also_under_autocast(call, shape):
    student, teacher = random(*shape, scale=3.0).float(), random(*shape, seed=1, scale=3.0).float()
    half = student.bfloat16(), teacher.bfloat16()
    loss, gradient = loss_and_gradient(call, *half)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16 and gradient.isfinite().all()
    torch.testing.assert_close(loss.double(), call(*(x.double() for x in half)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, call(student, teacher), rtol=0.03, atol=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(*half), loss)


@each_loss
def test_items_add_up_however_they_are_cut(call, shape):
    """What makes an optimizer update independent of its micro-batches and ranks."""
    student, teacher = random(*shape), random(*shape, seed=1)
    if call is ALL["info_nce"][0]:  # the bank is common to all parts, queries are cut

        def call(s, t):
            rows = torch.tensor([int((row == student).all(1).nonzero()) for row in s.detach()])
            return info_nce(queries=s, memory_bank=teacher, positives=rows)[0]

    whole, gradient = loss_and_gradient(call, student, teacher)
    parts = [loss_and_gradient(call, student[rows], teacher[rows]) for rows in (slice(0, 1), slice(1, None))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), gradient)


@each_loss
def test_nothing_to_add_up_gives_zero_that_can_be_differentiated(call, shape):
    teacher = random(*shape) if call is ALL["info_nce"][0] else random(*shape)[:0]
    loss, gradient = loss_and_gradient(call, random(*shape)[:0], teacher)
    assert loss == 0 and gradient.shape[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", TOKENS.values(), ids=TOKENS)
def test_extreme_logits_stay_finite(call, dtype):
    teacher = torch.tensor([[1e4, -1e4, 0, 30], [-1e4, 1e4, 1e4, 0], [0, 0, 0, -1e4], [80, 0, 0, 0]], dtype=dtype)
    for student in (teacher, teacher.flip(0), teacher.flip(1)):
        loss, gradient = loss_and_gradient(call, student, teacher)
        assert loss.isfinite() and gradient.isfinite().all()


def probabilities(logits, temperature):
    powers = [math.exp(z / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def naive_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def naive_divergence(name, q, p):
    mixture = [0.3 * a + 0.7 * b for a, b in zip(p, q, strict=True)]
    return {
        "forward_kl": naive_kl(p, q),
        "reverse_kl": naive_kl(q, p),
        "jensen_shannon": 0.3 * naive_kl(p, mixture) + 0.7 * naive_kl(q, mixture),
    }[name]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_equal_a_loop(name, temperature):
    student, teacher = random(6, 9, scale=2.0), random(6, 9, seed=1, scale=2.0)
    rows = [
        naive_divergence(name, probabilities(s, temperature), probabilities(t, temperature))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    loss = DIVERGENCES[name](student, teacher, temperature=temperature).item()
    assert loss == pytest.approx(temperature**2 * sum(rows), rel=1e-12)


@each_divergence
def test_the_teacher_itself_is_the_minimum(call):
    teacher = random(5, 8, scale=4.0)
    loss, gradient = loss_and_gradient(call, teacher, teacher)
    assert abs(loss) < 1e-15 and gradient.abs().max() < 1e-15
    uniform, _ = loss_and_gradient(call, torch.zeros_like(teacher), teacher)
    assert uniform > 0.1  # probabilities passed for log-probabilities would prefer the uniform student
    assert all(call(random(1, 8, seed=seed), teacher[:1]) > 0 for seed in range(30))


@each_divergence
def test_a_constant_added_to_a_row_of_logits_changes_nothing(call):
    student, teacher, shift = random(5, 8), random(5, 8, seed=1), random(5, 1, seed=2, scale=50.0)
    torch.testing.assert_close(call(student + shift, teacher - 2 * shift), call(student, teacher), rtol=1e-10, atol=0)


@each_divergence
def test_masked_rows_poison_neither_value_nor_gradient(call):
    student, teacher = random(5, 8), random(5, 8, seed=1)
    mask = torch.tensor([True, False, True, False, True])
    clean, clean_gradient = loss_and_gradient(call, student[mask], teacher[mask])
    for junk in (NAN, INF, -INF):
        spoilt = [torch.where(mask[:, None], x, junk) for x in (student, teacher)]
        loss, gradient = loss_and_gradient(lambda s, t: call(s, t, mask=mask), *spoilt)
        assert torch.equal(loss, clean) and torch.equal(gradient[mask], clean_gradient)
        assert not gradient[~mask].any()
    loss, gradient = loss_and_gradient(lambda s, t: call(s, t, mask=mask & False), *spoilt)
    assert loss == 0 and gradient.shape == student.shape and not gradient.any()


def test_the_temperature_keeps_the_size_of_the_gradient():
    """T**2 * d KL / d student tends to (student - teacher, each centred) / V per row; without T**2 it would vanish."""
    student, teacher = random(3, 6), random(3, 6, seed=1)
    difference = student - teacher
    limit = (difference - difference.mean(-1, keepdim=True)) / difference.shape[1]
    errors = []
    for temperature in (1.0, 10.0, 1000.0):
        _, gradient = loss_and_gradient(
            lambda s, t, T=temperature: forward_kl(student_logits=s, teacher_logits=t, temperature=T), student, teacher
        )
        assert 0.3 < gradient.norm() / limit.norm() < 3
        errors.append((gradient - limit).norm() / limit.norm())
    assert errors[2] < 1e-2 * errors[0] and errors[1] < errors[0] and errors[2] < 2e-3


def test_jensen_shannon_lies_between_the_two_kl():
    student, teacher = random(4, 6), random(4, 6, seed=1)
    logits = {"student_logits": student, "teacher_logits": teacher}
    for beta, limit in ((1e-5, forward_kl(**logits)), (1 - 1e-5, reverse_kl(**logits))):
        scaled = jensen_shannon(**logits, beta=beta) / min(beta, 1 - beta)
        torch.testing.assert_close(scaled, limit, rtol=1e-3, atol=0)
    opposite = jensen_shannon(student_logits=torch.tensor([[1e4, 0.0]]), teacher_logits=torch.tensor([[0.0, 1e4]]))
    assert opposite.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("labels", [[[-100, 5, 2]], [[-100, -100, 5]], [[-100, 5, 2], [-100, -100, 3]]])
def test_the_causal_shift_pairs_each_answer_token_with_the_logits_before_it(labels):
    labels = torch.tensor(labels)
    keep, targets = answer_targets(labels)
    ahead = torch.zeros(*labels.shape, 8).scatter(2, labels.roll(-1, dims=1).clamp(min=0)[..., None], 50.0)
    behind = ahead.roll(1, dims=1)  # a model that repeats its input would look perfect without the shift
    assert len(targets) == (labels != -100).sum()
    for logits, wrong in ((ahead, False), (behind, True)):
        rows = logits[keep]
        assert (answer_cross_entropy(logits=rows, targets=targets) > 1) == wrong
        assert (forward_kl(student_logits=rows, teacher_logits=ahead[keep]) > 1) == wrong
        assert loca_logits(teacher_logits=rows, targets=targets)[1].any() == wrong


def loca_rows(n=300, classes=11):
    """Teacher logits and targets with wrong, unsure and confident rows; the correction's probabilities vary widely."""
    targets = torch.arange(n) % classes
    logits = random(n, classes, scale=2.0)
    logits[torch.arange(0, n, 3), targets[::3]] += 4
    return logits, targets


def naive_loca(row, target, alpha, temperature):
    p = probabilities(row, temperature)
    best = max(range(len(p)), key=p.__getitem__)
    if best == target:
        return p
    s = alpha / (1 - p[target] + p[best])
    return [1 - s * (1 - p[target]) if i == target else s * p[i] for i in range(len(p))]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.8, 0.9, 0.95])
def test_loca_equals_a_loop_and_keeps_its_promises(alpha, temperature):
    logits, targets = loca_rows()
    calibrated, corrected = loca_logits(teacher_logits=logits, targets=targets, alpha=alpha, temperature=temperature)
    before, after = (logits / temperature).softmax(-1), (calibrated / temperature).softmax(-1)
    expected = [
        naive_loca(row, t, alpha, temperature) for row, t in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    torch.testing.assert_close(after, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-14)
    assert torch.equal(corrected, logits.argmax(-1) != targets) and 0.3 < corrected.double().mean() < 0.9
    assert torch.equal(calibrated[~corrected], logits[~corrected])
    assert torch.equal(after.argmax(-1), targets)
    torch.testing.assert_close(after.sum(-1), torch.ones(len(after), dtype=torch.float64))
    wrong, column = after[corrected], targets[corrected, None]
    rivals = wrong.scatter(1, column, 0).amax(1)
    torch.testing.assert_close(wrong.gather(1, column)[:, 0] - rivals, torch.full_like(rivals, 1 - alpha))
    assert (wrong.gather(1, column) >= 1 - alpha).all()
    ratios = wrong / before[corrected]  # one factor s < 1 for every class but the target
    torch.testing.assert_close(
        ratios.scatter(1, column, 0).amax(1), ratios.scatter(1, column, INF).amin(1), rtol=1e-10, atol=0
    )
    assert (ratios.scatter(1, column, 0) < 1).all()


def test_wrong_rows_equal_minifinetuning():
    """An independent derivation: mix in the one-hot target just enough for a margin of tau = 1 - alpha.

    Source: Minifinetuning, https://arxiv.org/abs/2506.15702, its rule for rows that the teacher gets wrong.
    """
    logits, targets = loca_rows()
    calibrated, corrected = loca_logits(teacher_logits=logits, targets=targets, alpha=0.85, temperature=2.0)
    p = (logits[corrected] / 2.0).softmax(-1)
    onehot = torch.nn.functional.one_hot(targets[corrected], p.shape[1]).double()
    best, gold = p.amax(1, keepdim=True), (p * onehot).sum(1, keepdim=True)
    mix = (best - gold + 0.15) / (1 + best - gold)
    torch.testing.assert_close((calibrated[corrected] / 2.0).softmax(-1), (1 - mix) * p + mix * onehot)


def test_which_rows_are_corrected_does_not_depend_on_the_temperature():
    logits, targets = loca_rows()
    first, *others = (loca_logits(teacher_logits=logits, targets=targets, temperature=T)[1] for T in (0.5, 1, 4, 100))
    assert first.any() and all(torch.equal(first, other) for other in others)


def test_unsure_rows_get_the_margin_if_asked_for():
    logits, targets = loca_rows()
    plain, wrong = loca_logits(teacher_logits=logits, targets=targets)
    calibrated, corrected = loca_logits(teacher_logits=logits, targets=targets, calibrate_unsure=True)

    def margins(z):
        p, column = z.softmax(-1), targets[:, None]
        return p.gather(1, column)[:, 0] - p.scatter(1, column, 0).amax(1)

    torch.testing.assert_close(margins(calibrated), margins(plain).clamp(min=0.1))
    assert torch.equal(corrected, margins(logits) < 0.1)
    assert torch.equal(calibrated[wrong], plain[wrong]) and torch.equal(calibrated[~corrected], logits[~corrected])
    assert (corrected & ~wrong).any() and (~corrected).any()


def test_loca_leaves_confident_rows_alone_and_lifts_the_target_above_the_best_class():
    """Two failures of calibrating every row against the second class: .999 became .47, and a wrong .6 stayed on top."""
    logits = torch.tensor([[0.999, 0.0007, 0.0003], [0.3, 0.6, 0.1]]).log()
    calibrated, corrected = loca_logits(teacher_logits=logits, targets=torch.tensor([0, 0]), alpha=0.8)
    assert corrected.tolist() == [False, True] and torch.equal(calibrated[0], logits[0])
    s = 0.8 / 1.3
    torch.testing.assert_close(calibrated[1].softmax(-1), torch.tensor([1 - s * 0.7, s * 0.6, s * 0.1]))


def test_a_target_that_ties_with_the_best_class_is_right():
    logits = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [2.0, 2.0, 0.0]]).bfloat16()
    calibrated, corrected = loca_logits(teacher_logits=logits, targets=torch.tensor([0, 1, 2]))
    assert corrected.tolist() == [False, False, True] and torch.equal(calibrated[:2], logits[:2].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loca_survives_underflow_of_the_targets_probability(dtype):
    logits = torch.tensor([[1000.0, 0.0, -1000.0], [20.0, 19.0, -1e4], [1e4, 0.0, 0.0]], dtype=dtype).requires_grad_()
    calibrated, corrected = loca_logits(teacher_logits=logits, targets=torch.tensor([2, 2, 0]))
    assert calibrated.dtype == torch.float32 and not calibrated.requires_grad
    assert corrected.tolist() == [True, True, False] and torch.equal(calibrated[2], logits[2].float())
    after = calibrated.softmax(-1)
    margins = after[:2, 2] - after[:2, :2].amax(1)
    torch.testing.assert_close(margins, torch.tensor([0.1, 0.1]), rtol=0, atol=2e-4)


def test_loca_of_no_rows():
    calibrated, corrected = loca_logits(teacher_logits=torch.zeros(0, 5), targets=torch.zeros(0, dtype=torch.long))
    assert calibrated.shape == (0, 5) and corrected.shape == (0,) and corrected.dtype == torch.bool


def test_info_nce_equals_a_loop():
    queries, bank, positives = random(3, 5), random(7, 5, seed=1), [4, 0, 4]
    excluded = random(3, 7, seed=2) > 0.8
    excluded[range(3), positives] = False
    total, hits = 0.0, 0
    for query, positive, forbidden in zip(queries, positives, excluded, strict=True):
        cosines = [(query @ row / (query.norm() * row.norm())).item() for row in bank]
        scores = {j: cosine / 0.07 for j, cosine in enumerate(cosines) if not forbidden[j]}
        total += math.log(sum(math.exp(score) for score in scores.values())) - scores[positive]
        hits += max(scores, key=scores.get) == positive
    loss, found, candidates = info_nce(
        queries=queries, memory_bank=bank, positives=torch.tensor(positives), excluded=excluded
    )
    assert loss.item() == pytest.approx(total, rel=1e-10) and found.item() == hits
    assert candidates.tolist() == (~excluded).sum(1).tolist() and excluded.any()


def test_excluded_rows_are_as_good_as_absent():
    queries, bank, positives = random(3, 5), random(9, 5, seed=1), torch.tensor([0, 1, 2])
    excluded = (torch.arange(9) >= 6).expand(3, 9)
    with_mask, _, candidates = info_nce(queries=queries, memory_bank=bank, positives=positives, excluded=excluded)
    without, _, fewer = info_nce(queries=queries, memory_bank=bank[:6], positives=positives)
    torch.testing.assert_close(with_mask, without)
    assert (
        torch.equal(candidates, fewer)
        and with_mask < info_nce(queries=queries, memory_bank=bank, positives=positives)[0]
    )


def test_info_nce_of_aligned_and_of_unrelated_features():
    bank, positives = random(256, 64), torch.arange(256).flip(0)
    loss, hits, _ = info_nce(queries=3 * bank[positives], memory_bank=bank, positives=positives)
    assert hits == 256 and loss < 0.05 * 256
    loss, hits, _ = info_nce(queries=random(256, 64, seed=1), memory_bank=bank, positives=positives, temperature=1.0)
    assert loss.item() / 256 == pytest.approx(math.log(256), abs=0.05) and hits < 0.05 * 256


def test_info_nce_refuses_unfair_questions():
    queries, bank, positives = random(2, 4), random(3, 4), torch.tensor([0, 1])
    nobody = torch.zeros(2, 3, dtype=torch.bool)

    def fails(match, **changes):
        with pytest.raises(ValueError, match=match):
            info_nce(**{"queries": queries, "memory_bank": bank, "positives": positives, "excluded": nobody, **changes})

    fails("among its excluded", excluded=torch.tensor([[False, True, False], [False, True, False]]))
    fails("2 candidates", excluded=torch.tensor([[False, True, True], [False] * 3]))
    fails("2 candidates", memory_bank=bank[:1], positives=positives * 0, excluded=None)
    fails("rows of the memory bank", positives=torch.tensor([0, 3]))
    fails("rows of the memory bank", positives=torch.tensor([-1, 0]))
    fails("excluded", excluded=nobody[:1])
    fails("bank", memory_bank=bank[:, :3])


def naive_patch_loss(name, student, teacher, weights):
    def cosine(a, b):
        return (a @ b / (a.norm() * b.norm())).item()

    def huber(d):
        return d * d if abs(d) < 0.5 else abs(d) - 0.25  # beta = 0.5

    pairs = []  # (weight, value)
    for s, t, w in zip(student, teacher, weights.tolist(), strict=True):
        for i in range(len(w)):
            if name == "patch_cosine":
                pairs.append((w[i], 1 - cosine(s[i], t[i])))
            else:
                pairs.append((w[i], sum(map(huber, (s[i] - t[i]).tolist())) / s.shape[1]))
    return sum(w * value for w, value in pairs)


@pytest.mark.parametrize(
    "weights", [None, WEIGHTS, WEIGHTS > 0, WEIGHTS.bfloat16()], ids=["all", "fractional", "bool", "half"]
)
@pytest.mark.parametrize("name", PATCH_LOSSES)
def test_patch_losses_equal_a_loop(name, weights):
    student, teacher = random(2, 5, 4), random(2, 5, 4, seed=1)
    expected = naive_patch_loss(name, student, teacher, torch.ones(2, 5) if weights is None else weights.double())
    assert PATCH_LOSSES[name](student, teacher, weights=weights).item() == pytest.approx(expected, rel=1e-6)


@each_patch_loss
def test_patches_of_weight_zero_poison_neither_value_nor_gradient(call):
    student, teacher, measured = random(2, 5, 4), random(2, 5, 4, seed=1), (WEIGHTS > 0)[..., None]
    clean, clean_gradient = loss_and_gradient(lambda s, t: call(s, t, weights=WEIGHTS), student, teacher)
    for junk in (0.0, NAN, INF):
        spoilt = [torch.where(measured, x, junk) for x in (student, teacher)]
        loss, gradient = loss_and_gradient(lambda s, t: call(s, t, weights=WEIGHTS), *spoilt)
        torch.testing.assert_close(loss, clean)
        torch.testing.assert_close(gradient, clean_gradient)
        assert not gradient[WEIGHTS == 0].any()
    loss, gradient = loss_and_gradient(lambda s, t: call(s, t, weights=0 * WEIGHTS), *spoilt)
    assert loss == 0 and gradient.shape == student.shape and not gradient.any()


@each_patch_loss
def test_patch_losses_compare_place_by_place(call):
    student, teacher = random(2, 5, 4), random(2, 5, 4, seed=1)
    order = torch.tensor([3, 1, 0, 4, 2])
    assert abs(call(teacher, teacher)) < 1e-12
    assert call(teacher[:, order], teacher) > 0.1
    torch.testing.assert_close(call(student[:, order], teacher[:, order]), call(student, teacher))
    both, alone = call(student, teacher), [call(student[i : i + 1], teacher[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(both, sum(alone))  # images do not mix


def test_angles_ignore_length():
    student, teacher, lengths = random(2, 5, 4), random(2, 5, 4, seed=1), random(2, 5, 1, seed=2).exp()
    call = PATCH_LOSSES["patch_cosine"]
    torch.testing.assert_close(call(student * lengths, teacher), call(student, teacher))


def test_hidden_states_equal_a_loop_and_ignore_scale_and_offset():
    student, teacher = random(4, 6), random(4, 6, seed=1)
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(student, teacher, strict=True)]
    loss = hidden_state_loss(student=student, teacher=teacher)
    assert loss.item() == pytest.approx(2 * 4 - 2 * sum(correlations), rel=1e-6)
    torch.testing.assert_close(
        hidden_state_loss(student=100 * student + 7, teacher=50 * teacher - 3), loss, rtol=1e-6, atol=0
    )
    constant, gradient = loss_and_gradient(
        lambda s, t: hidden_state_loss(student=s, teacher=t), torch.ones(4, 6), teacher.float()
    )
    assert constant.isfinite() and gradient.isfinite().all()


def test_entropy_equals_a_loop():
    logits = random(5, 7, scale=2.0)
    rows = [-sum(p * math.log(p) for p in probabilities(row, 1.5)) for row in logits.tolist()]
    assert entropy(logits=logits, temperature=1.5).item() == pytest.approx(sum(rows), rel=1e-12)
    assert entropy(logits=torch.zeros(2, 9)).item() == pytest.approx(2 * math.log(9))
    assert entropy(logits=torch.tensor([[1e4, 0.0]])) == 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, INF])
def test_a_temperature_must_be_positive(temperature):
    z, row = random(3, 4), torch.zeros(3, dtype=torch.long)
    calls = [lambda T, call=call: call(z, z, temperature=T) for call in DIVERGENCES.values()] + [
        lambda T: loca_logits(teacher_logits=z, targets=row, temperature=T),
        lambda T: entropy(logits=z, temperature=T),
        lambda T: info_nce(queries=z, memory_bank=z, positives=row, temperature=T),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"temperature must be positive and finite, got {temperature}"):
            call(temperature)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, NAN])
def test_shares_must_lie_between_zero_and_one(share):
    z = random(3, 4)
    with pytest.raises(ValueError, match=f"alpha must be in .*got {share}"):
        loca_logits(teacher_logits=z, targets=torch.zeros(3, dtype=torch.long), alpha=share)
    with pytest.raises(ValueError, match=f"beta must be in .*got {share}"):
        jensen_shannon(student_logits=z, teacher_logits=z, beta=share)


@each_divergence
def test_vocabularies_and_rows_must_match(call):
    with pytest.raises(ValueError, match=r"student \(7\) and teacher \(8\).*tokenizer's length"):
        call(random(3, 7), random(3, 8))
    with pytest.raises(ValueError, match=r"\(3, 7\) and \(4, 7\)"):
        call(random(3, 7), random(4, 7))
    for mask in (torch.ones(4, dtype=torch.bool), torch.ones(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="mask"):
            call(random(3, 7), random(3, 7), mask=mask)


@each_patch_loss
def test_patches_and_weights_must_match(call):
    features = random(2, 5, 4)
    for wrong in (features[:1], features[:, :4], features[0]):
        with pytest.raises(ValueError, match=r"\(2, 5, 4\)"):
            call(features, wrong)
    for weights in (WEIGHTS[:, :4], WEIGHTS - 0.1, WEIGHTS + 0.1, WEIGHTS * NAN):
        with pytest.raises(ValueError, match="weights"):
            call(features, features, weights=weights)


def test_widths_and_targets_must_match():
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(2, 5\)"):
        hidden_state_loss(student=random(2, 4), teacher=random(2, 5))
    with pytest.raises(ValueError, match=r"\(2, 5, 4\)"):
        patch_cosine(student=random(2, 5, 3), teacher=random(2, 5, 4))
    with pytest.raises(ValueError, match="beta"):
        patch_smooth_l1(student=random(2, 5, 4), teacher=random(2, 5, 4), beta=0.0)
    for call in (
        lambda z, y: answer_cross_entropy(logits=z, targets=y),
        lambda z, y: loca_logits(teacher_logits=z, targets=y),
    ):
        with pytest.raises(ValueError, match=r"\(3, 4\) and \(2,\)"):
            call(random(3, 4), torch.zeros(2, dtype=torch.long))
