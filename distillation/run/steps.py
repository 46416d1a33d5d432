"""What the training and validation steps of all scripts have in common."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import get_cosine_schedule_with_warmup

from distillation.forward import exact_matches
from distillation.losses import answer_cross_entropy
from distillation.models import need_bitsandbytes


def undo_averaging(trainer: pl.Trainer, batch: Mapping[str, Any]) -> float:
    """What a micro-batch's part of an update's loss is multiplied by before Lightning gets it.

    Lightning divides every loss by accumulate_grad_batches, also where an epoch's last update has fewer micro-batches,
    and DDP and FSDP average gradients over ranks. Our parts are sums over the number of items in the whole update: they
    are to be added up, and nothing else. A spare micro-batch (see `dataset.inputs.sampler`) counts nothing.
    """
    return 0.0 if batch["spare"] else float(trainer.accumulate_grad_batches * trainer.world_size)


def log_answer_scores(module: pl.LightningModule, batch: Mapping[str, Any], logits: Tensor, targets: Tensor) -> None:
    """Log a validation batch: val/exact_match, share of questions answered right, and val/ce, mean over tokens in nats.

    Args:
        module: whose validation step this is.
        batch: of the data module.
        logits: (n, V) at the positions that predict answer tokens.
        targets: (n,) int64, those tokens.
    """
    right = exact_matches(logits, batch["text"])
    ce = answer_cross_entropy(logits=logits, targets=targets) / len(targets)
    # Lightning divides the number of items by that of ranks, and rounds down: so each counts once per rank.
    weight = 0 if batch["spare"] else module.trainer.world_size
    module.log("val/ce", ce, batch_size=weight * len(targets), sync_dist=True)
    module.log("val/exact_match", right.float().mean(), batch_size=weight * len(right), sync_dist=True)


def adamw(bits: int) -> type[Optimizer]:
    """The class of AdamW whose moments have 32 or 8 bits.

    Source of the latter: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861. Weights of fewer than 4,096 numbers
    keep 32 bits.

    Raises:
        UserError: 8 bits without bitsandbytes.
    """
    if bits == 32:
        return torch.optim.AdamW
    need_bitsandbytes("--optimizer_bits 8: needs")
    from bitsandbytes.optim import AdamW8bit  # an optional package

    return AdamW8bit


def cosine_with_warmup(
    trainer: pl.Trainer, optimizer: Optimizer, warmup_share: float
) -> tuple[list[Optimizer], list[dict[str, Any]]]:
    """For `configure_optimizers`: all rates rise for a share of the run's updates, then fall to 0 as a cosine."""
    updates = trainer.estimated_stepping_batches
    schedule = get_cosine_schedule_with_warmup(optimizer, round(warmup_share * updates), updates)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]
