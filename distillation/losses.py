"""Loss primitives: pure, keyword-only functions that compute in float32 and return a scalar.

Axes: n answer tokens of a batch (rows kept by `dataset.prompts.answer_targets`), V vocabulary.
"""

import torch
from torch import Tensor


def answer_cross_entropy(*, logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the gold answer tokens.

    Args:
        logits: (n, V), any float dtype, at the positions that predict answer tokens.
        targets: (n,) int64, the tokens they should predict.

    Returns:
        Scalar, nats, mean over the answer tokens of the batch; 0 with a gradient path if there is none.

    Raises:
        ValueError: the numbers of rows differ.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits (n, V) and targets (n,), got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return losses / max(len(targets), 1)
