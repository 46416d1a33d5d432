"""Loss primitives: pure, keyword-only functions of student and teacher tensors. The weighted sum stays in each script.

Axes
    n  answer tokens of a batch, the rows that `dataset.inputs.prompts.answer_targets` keeps (it does the causal shift)
    V  vocabulary, cropped to the tokenizer's length by `distillation.forward.answer_logits`
    B  images of a batch
    P  patches (image tokens) of an image
    D  width of a feature
    N  rows of the memory bank of teacher features

Everything is computed in float32, also under autocast; float64 stays float64. Inputs must be finite, except in rows and
patches that a mask or a weight of 0 leaves out: those may hold anything. The teacher is a constant: no gradient flows
into it. A sum over nothing is 0, with a gradient path, so that a batch without answers or valid depth can be stepped.

Every loss is a sum over items. A script divides it by the number of these items in the whole optimizer update (the
`update` of a batch, see `dataset.inputs.sampler`): means over micro-batches would depend on how the update is cut,
since an item in a small one would weigh more.

A loss softened by a temperature T is multiplied by T**2, which keeps the size of its gradient about constant in T
(Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def answer_cross_entropy(*, logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the gold answer tokens.

    Args:
        logits: (n, V), any float dtype, at the positions that predict answer tokens.
        targets: (n,) int64, the tokens they should predict.

    Returns:
        Scalar, nats, sum over the answer tokens; 0 with a gradient path if there is none.

    Raises:
        ValueError: the numbers of rows differ.
    """
    _check_targets(logits, targets)
    return F.cross_entropy(_wide(logits), targets, reduction="sum")


def forward_kl(
    *, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T**2 * KL(teacher || student): the student has to cover everything that the teacher holds possible.

    Args:
        student_logits: (n, V), any float dtype.
        teacher_logits: (n, V).
        temperature: T > 0, divides both logits.
        mask: (n,) bool, the rows that count; None = all.

    Returns:
        Scalar, nats, sum over V and over the rows that count.

    Raises:
        ValueError: shapes or vocabularies differ, or the temperature is not positive.

    Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2.
    """
    student, teacher = _log_probs(student_logits, teacher_logits, temperature, mask)
    return temperature**2 * _summed_kl(teacher, student)


def reverse_kl(
    *, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T**2 * KL(student || teacher): the student may keep to one of the teacher's modes.

    Arguments, reduction and errors are those of `forward_kl`.

    Source: Gu et al. 2024 (MiniLLM), https://arxiv.org/abs/2306.08543, section 2.1. Differs: on gold answers, not on
    sequences that the student sampled.
    """
    student, teacher = _log_probs(student_logits, teacher_logits, temperature, mask)
    return temperature**2 * _summed_kl(student, teacher)


def jensen_shannon(
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    beta: float = 0.5,
    mask: Tensor | None = None,
) -> Tensor:
    """T**2 * (beta KL(teacher || m) + (1 - beta) KL(student || m)), where m = beta teacher + (1 - beta) student.

    Bounded by T**2 * ln 2 at beta = 0.5. Divided by beta it tends to the forward KL for beta -> 0, divided by 1 - beta
    to the reverse KL for beta -> 1.

    Args:
        student_logits: (n, V), any float dtype.
        teacher_logits: (n, V).
        temperature: T > 0, divides both logits.
        beta: the teacher's share of the mixture, in (0, 1).
        mask: (n,) bool, the rows that count; None = all.

    Returns:
        Scalar, nats, sum over V and over the rows that count.

    Raises:
        ValueError: as `forward_kl`, or beta outside (0, 1).

    Source: Agarwal et al. 2024 (GKD), https://arxiv.org/abs/2306.13649, generalised Jensen-Shannon divergence.
    Differs: times T**2.
    """
    _check_fraction("beta", beta)
    student, teacher = _log_probs(student_logits, teacher_logits, temperature, mask)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return temperature**2 * (beta * _summed_kl(teacher, mixture) + (1 - beta) * _summed_kl(student, mixture))


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jensen_shannon": jensen_shannon}


def loca_logits(
    *,
    teacher_logits: Tensor,
    targets: Tensor,
    alpha: float = 0.9,
    temperature: float = 1.0,
    calibrate_unsure: bool = False,
) -> tuple[Tensor, Tensor]:
    """LoCa: teacher logits whose most likely class is the gold token, all else in proportion. Feed them to a KL at T.

    In a row whose best class k is not the target, every non-target probability is scaled by s = alpha / (1 - p_gt +
    p_k) and the target gets the mass set free, which puts it ahead of k by exactly 1 - alpha. In logits only the
    target's moves. Rows that are right stay as they are: the same formula would lower a target that is already ahead by
    more.

    Args:
        teacher_logits: (n, V), any float dtype.
        targets: (n,) int64, gold tokens. A target that ties with the best class counts as right.
        alpha: in (0, 1); 1 - alpha is the margin.
        temperature: T > 0 of the KL that follows; the probabilities above are those at T.
        calibrate_unsure: also give right rows whose margin at T is below 1 - alpha that margin (an extension, s <= 1).

    Returns:
        Calibrated logits (n, V), float32 and without gradient, rows that are not calibrated bit-identical; and
        corrected (n,) bool, the calibrated rows. Without `calibrate_unsure` these do not depend on T.

    Raises:
        ValueError: shapes do not fit, alpha outside (0, 1), or the temperature is not positive.

    Source: Yang et al. 2024, https://arxiv.org/abs/2409.04778. Differs: written as a shift of one logit, which needs no
    probability of the target and so survives its underflow. The paper does not say whether it calibrates before or
    after the temperature; here after, so that its guarantees hold for the distribution that is distilled.
    """
    _check_targets(teacher_logits, targets)
    _check_fraction("alpha", alpha)
    _check_positive("temperature", temperature)
    logits = _wide(teacher_logits.detach())
    column = targets[:, None]
    target_logit = logits.gather(1, column)
    rival_logit = logits.scatter(1, column, -math.inf).amax(dim=1, keepdim=True)
    log_z = (logits / temperature).logsumexp(dim=1, keepdim=True)
    p_target = (target_logit / temperature - log_z).exp()
    p_rival = (rival_logit / temperature - log_z).exp()
    corrected = target_logit < rival_logit
    if calibrate_unsure:
        corrected |= p_target - p_rival < 1 - alpha
    log_s = math.log(alpha) - torch.log1p(p_rival - p_target)
    # Over s, because the other logits stay: softmax then divides the row by sum exp(z / T) / s.
    shifted = temperature * (torch.log((1 - alpha) + log_s.exp() * p_rival) - log_s + log_z)
    return logits.scatter(1, column, torch.where(corrected, shifted, target_logit)), corrected.squeeze(1)


def entropy(*, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the next-token distribution: near ln V nothing is known, near 0 there is nothing left to soften.

    Args:
        logits: (n, V), any float dtype.
        temperature: T > 0, divides the logits.

    Returns:
        Scalar, nats, sum over rows.

    Raises:
        ValueError: logits are not (n, V), or the temperature is not positive.
    """
    _check_positive("temperature", temperature)
    if logits.ndim != 2:
        raise ValueError(f"expected logits (n, V), got {tuple(logits.shape)}")
    log_probs = F.log_softmax(_wide(logits) / temperature, dim=-1)
    return -(log_probs.exp() * log_probs).sum()


def info_nce(
    *,
    queries: Tensor,
    memory_bank: Tensor,
    positives: Tensor,
    excluded: Tensor | None = None,
    temperature: float = 0.07,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tell the teacher's feature of the same image from those of other images, by cosine similarity.

    Student to teacher is the only direction: the memory bank's rows are constants of a frozen teacher, so they never
    age, and any batch size is compared with all N. The other direction would need student features of N images.

    Args:
        queries: (B, D) student features, any float dtype and length.
        memory_bank: (N, D) teacher features, any length.
        positives: (B,) int64, the memory bank's row of each query's own image.
        excluded: (B, N) bool, rows that are no fair negatives (same scene); never the positive. None = none.
        temperature: > 0, divides the cosines. The loss is not multiplied by its square: it softens no target.

    Returns:
        Loss: scalar, nats, sum over queries; chance is the log of candidates, summed.
        Hits: scalar without gradient, the number of queries whose nearest candidate is the positive.
        Candidates: (B,) int64, rows that a query is compared with, the positive included.

    Raises:
        ValueError: shapes do not fit, the temperature is not positive, a positive is excluded or no row of the memory
            bank, or a query has fewer than 2 candidates, which would make its loss 0 whatever the student does.

    Source: van den Oord et al. 2018, https://arxiv.org/abs/1807.03748, equation 4; a memory bank of negatives as in He
    et al. 2020 (MoCo), https://arxiv.org/abs/1911.05722, equation 1, and Tian et al. 2020 (CRD),
    https://arxiv.org/abs/1910.10699. Differs: no queue, no momentum encoder, no sampling of negatives.
    """
    _check_positive("temperature", temperature)
    if (
        queries.ndim != 2
        or memory_bank.ndim != 2
        or queries.shape[1] != memory_bank.shape[1]
        or positives.shape != queries.shape[:1]
    ):
        raise ValueError(
            "expected queries (B, D), memory_bank (N, D) and positives (B,), got "
            f"{tuple(queries.shape)}, {tuple(memory_bank.shape)} and {tuple(positives.shape)}"
        )
    shape = (len(queries), len(memory_bank))
    excluded = torch.zeros(shape, dtype=torch.bool, device=queries.device) if excluded is None else excluded
    if excluded.shape != shape or excluded.dtype != torch.bool:
        raise ValueError(f"expected excluded {shape} bool, got {tuple(excluded.shape)} {excluded.dtype}")
    if ((positives < 0) | (positives >= len(memory_bank))).any():
        raise ValueError(
            f"positives must be rows of the memory bank, 0 to {len(memory_bank) - 1}, got {positives.tolist()}"
        )
    if excluded.gather(1, positives[:, None]).any():
        raise ValueError("a query's positive is among its excluded rows")
    candidates = (~excluded).sum(dim=1)
    if (candidates < 2).any():
        raise ValueError(f"every query needs 2 candidates or more, got {candidates.tolist()}")
    similarities = (_cosines(queries, memory_bank.detach()) / temperature).masked_fill(excluded, -math.inf)
    loss = F.cross_entropy(similarities, positives, reduction="sum")
    hits = similarities.detach().argmax(dim=1) == positives
    return loss, hits.to(loss.dtype).sum(), candidates


def patch_cosine(*, student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 - cosine similarity of the features at the same place in the depth and in the RGB picture.

    Args:
        student: (B, P, D), any float dtype.
        teacher: (B, P, D).
        weights: (B, P) in [0, 1], share of a patch with valid depth: 0 = padding or a hole. None = all 1.

    Returns:
        Scalar, in [0, 2] per patch, sum over patches by weight; its items are the weights.

    Raises:
        ValueError: shapes differ, or a weight outside [0, 1].

    Source: Gupta et al. 2016, https://arxiv.org/abs/1507.00448, supervise depth by the RGB network's features of the
    paired image. Differs: by angle instead of squared distance, on tokens, weighted by what the sensor saw.
    """
    student, teacher, weights = _valid_patches(student, teacher, weights)
    return ((1 - (_unit(student) * _unit(teacher)).sum(dim=-1)) * weights).sum()


def patch_smooth_l1(*, student: Tensor, teacher: Tensor, weights: Tensor | None = None, beta: float = 1.0) -> Tensor:
    """Smooth L1 distance of the features at the same place: squared (over 2 beta) below beta, absolute above.

    Args:
        student: (B, P, D), any float dtype.
        teacher: (B, P, D).
        weights: (B, P) in [0, 1], see `patch_cosine`.
        beta: > 0, in units of the feature; the few huge channels of a transformer pull no more than linearly.

    Returns:
        Scalar, mean over D, sum over patches by weight; its items are the weights.

    Raises:
        ValueError: shapes differ, a weight outside [0, 1], or beta is not positive.

    Source: Girshick 2015, https://arxiv.org/abs/1504.08083, equation 3 (there beta = 1).
    """
    _check_positive("beta", beta)
    student, teacher, weights = _valid_patches(student, teacher, weights)
    return (F.smooth_l1_loss(student, teacher, beta=beta, reduction="none").mean(dim=-1) * weights).sum()


def hidden_state_loss(*, student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of hidden states, each row first brought to mean 0 and variance 1.

    What reads a hidden state normalises it first, so its scale means nothing; unnormalised, the few rows and layers
    with huge activations would be the whole loss. Equals 2 - 2 * Pearson correlation of the two rows.

    Args:
        student: (n, D), any float dtype, after the caller's learned map to the teacher's width.
        teacher: (n, D).

    Returns:
        Scalar, in [0, 4] per row, mean over D, sum over rows.

    Raises:
        ValueError: shapes differ.

    Source: Jiao et al. 2020 (TinyBERT), https://arxiv.org/abs/1909.10351, hidden-state loss. Differs: normalised rows.
    """
    _check_same_shape(student, teacher, "n, D")
    student, teacher = (
        F.layer_norm(_wide(x), x.shape[1:], eps=1e-8)  # small against any state, enough for a constant row
        for x in (student, teacher.detach())
    )
    return (student - teacher).square().mean(dim=1).sum()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_wide(x), dim=-1, eps=1e-6)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every row of a with every row of b; autocast would round the products to half precision."""
    with torch.autocast(a.device.type, enabled=False):
        a, b = _unit(a), _wide(b)
        # Lengths are divided out last: a copy of the memory bank in unit length costs more than the product.
        lengths = b.norm(dim=-1).clamp(min=1e-6)
        return (a @ b.to(a.dtype).mT) / lengths.to(a.dtype)[..., None, :]


def _log_probs(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities at a temperature, of the rows that count."""
    _check_positive("temperature", temperature)
    if student.ndim == teacher.ndim == 2 and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the vocabularies of student ({student.shape[1]}) and teacher ({teacher.shape[1]}) differ; "
            "crop both to the tokenizer's length"
        )
    _check_same_shape(student, teacher, "n, V")
    if mask is not None:
        if mask.shape != student.shape[:1] or mask.dtype != torch.bool:
            raise ValueError(f"expected mask ({len(student)},) bool, got {tuple(mask.shape)} {mask.dtype}")
        student, teacher = student[mask], teacher[mask]  # selected, not multiplied: 0 * nan is nan
    return tuple(F.log_softmax(_wide(x) / temperature, dim=-1) for x in (student, teacher.detach()))


def _summed_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), summed over classes and rows."""
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _valid_patches(student: Tensor, teacher: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The m patches of a batch with a weight above 0: (m, D), (m, D) and (m,)."""
    _check_same_shape(student, teacher, "B, P, D")
    weights = _patch_weights(student, weights)
    keep = weights > 0
    return _wide(student[keep]), _wide(teacher.detach()[keep]), weights[keep]


def _patch_weights(features: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return torch.ones(features.shape[:2], device=features.device)
    if weights.shape != features.shape[:2]:
        raise ValueError(f"expected weights {tuple(features.shape[:2])}, got {tuple(weights.shape)}")
    weights = _wide(weights.detach())
    if not ((weights >= 0) & (weights <= 1)).all():
        raise ValueError(f"weights must be in [0, 1], got {weights.min().item()} to {weights.max().item()}")
    return weights


def _check_same_shape(student: Tensor, teacher: Tensor, axes: str) -> None:
    if student.shape != teacher.shape or student.ndim != len(axes.split(", ")):
        raise ValueError(
            f"expected student and teacher of one shape ({axes}), got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def _check_targets(logits: Tensor, targets: Tensor) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits (n, V) and targets (n,), got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value}")


@torch.no_grad()
def answer_diagnostics(
    *, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, gold: Tensor, update: Mapping[str, float]
) -> dict[str, Tensor]:
    """Explains most failures of a distillation: how sure both models are, how well the teacher knows gold answers.

    Args:
        student_logits: (n, V).
        teacher_logits: (n, V).
        targets: (n,) int64.
        gold: (n,) bool, tokens of gold answers.
        update: the numbers of items of the whole optimizer update, see `dataset.inputs.sampler`.

    Returns:
        Scalars to log, nats: sums over the batch by the update's number of tokens. The teacher's cross-entropy only
        where the update has a gold answer.
    """
    found = {
        "student_entropy": entropy(logits=student_logits) / update["answer_tokens"],
        "teacher_entropy": entropy(logits=teacher_logits) / update["answer_tokens"],
    }
    if update["has_gold"]:
        teacher_ce = answer_cross_entropy(logits=teacher_logits[gold], targets=targets[gold])
        found["teacher_ce"] = teacher_ce / update["gold_tokens"]
    return found
