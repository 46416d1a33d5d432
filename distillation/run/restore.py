"""A run that goes on: what its checkpoint says about loops, optimizer and schedule is compared with its own first."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from distillation.run.record import difference
from distillation.run.signals import is_lost_rank
from utils import UserError, reason

# What Lightning and torch raise for a state of another shape.
MISFITS = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, MisconfigurationException)
NUMBER, SCORE = (int, float), (Tensor, type(None))
BOOKKEEPING = {  # of a ModelCheckpoint -> its types
    "best_model_path": str, "kth_best_model_path": str, "last_model_path": str, "best_model_score": SCORE,
    "current_score": SCORE, "kth_value": Tensor, "best_k_models": dict, "best_ce": NUMBER,
}  # fmt: skip


class RestoredState(Callback):
    """Refuses a checkpoint whose training state is not of the kind that this run has, before it is taken over.

    A run may go on with other micro-batches or on other devices: counts of micro-batches become those of its own.
    """

    def __init__(self, *, micro_batches: int, steps: int) -> None:
        """`micro_batches`: of an update on each rank; `steps`: micro-batches of an epoch on each rank."""
        self.micro_batches, self.steps = micro_batches, steps
        self.checkpoint: Mapping[str, Any] | None = None  # to go on from
        self.started = False

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at what the callbacks will be given; raises UserError that names what does not fit."""
        self.checkpoint = checkpoint
        self._count_as_here(checkpoint)
        for state in checkpoint["callbacks"].values():
            for name, kind in BOOKKEEPING.items():
                if not isinstance(state, dict) or (name in state and not isinstance(state[name], kind)):
                    raise self._misfit(trainer, f"callbacks.{name}")

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look at the rest, now that this run has its optimizers; raises UserError that names what does not fit."""
        if self.checkpoint is None:
            return
        own = {
            "loops": {"fit_loop": trainer.fit_loop.state_dict()},
            "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        }
        stored = {
            "loops": {"fit_loop": self.checkpoint["loops"].get("fit_loop")},
            "lr_schedulers": self.checkpoint["lr_schedulers"],
        }
        where = difference(stored, own, "its state") or self._other_moments(trainer)
        if where:
            raise self._misfit(trainer, where)
        self.checkpoint = None  # a memory-mapped file stays open as long as it is held

    def _count_as_here(self, checkpoint: dict[str, Any]) -> None:
        """Replace Lightning's counts of micro-batches by those of the same updates in this run."""
        steps = checkpoint["position"]["steps"]
        micro_batches = checkpoint["hyper_parameters"]["accumulate_grad_batches"]
        if (steps, micro_batches) == (self.steps, self.micro_batches):
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        epochs = (progress["total"]["ready"] - progress["current"]["ready"]) // steps  # those before this one
        in_epoch = progress["current"]["ready"]
        here = self.steps if in_epoch >= steps else in_epoch // micro_batches * self.micro_batches
        for name, added in (("current", here), ("total", here + epochs * self.steps)):
            counts = progress[name]
            added -= counts["ready"]
            progress[name] = {count: value + added for count, value in counts.items()}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take the rate from the schedule; from here on errors are not the checkpoint's.

        The checkpoint has the rate of a schedule that may have ended, while this run has more updates.
        """
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            groups = scheduler.optimizer.param_groups
            for group, base, share in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
                group["lr"] = base * share(scheduler.last_epoch)
        self.started = True

    def _other_moments(self, trainer: pl.Trainer) -> str | None:
        """Where an optimizer's settings, or the stored moments of a weight, are of another kind or shape."""
        if len(self.checkpoint["optimizer_states"]) != len(trainer.optimizers):
            return "optimizer_states"
        for stored, optimizer in zip(self.checkpoint["optimizer_states"], trainer.optimizers, strict=True):
            own = {"state": {}, "param_groups": _settings(optimizer.param_groups)}
            if not isinstance(stored, dict) or not isinstance(stored.get("state"), dict):
                return "optimizer_states.state"
            settings = {"state": {}, "param_groups": _settings(stored.get("param_groups"))}
            if where := difference(settings, own, "optimizer_states"):
                return where
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            for number, moments in stored["state"].items():
                if not _fit(moments, weights[number] if type(number) is int and 0 <= number < len(weights) else None):
                    return f"optimizer_states.state.{number!s:.40}"
        return None

    @staticmethod
    def _misfit(trainer: pl.Trainer, where: str) -> UserError:
        return UserError(
            f"--resume {trainer.ckpt_path}: {where} is not what this run has; the checkpoint was changed. Start from "
            "its weights instead: --load_checkpoint"
        )


def _settings(groups: Any) -> Any:
    """An optimizer's groups without their weights, which are numbers in a checkpoint; anything else as it is."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return groups
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def _fit(moments: Any, weight: Tensor | None) -> bool:
    """Whether all of an optimizer's tensors for one weight have its shape; counts have one value.

    Moments in 8 bits come with a table of 256 values, and with a scale for each block of 256 numbers.
    """
    if weight is None or not isinstance(moments, dict):
        return False
    inner = [part for part in moments.values() if isinstance(part, dict)]  # what bitsandbytes hides from FSDP
    values = [value for part in (moments, *inner) for value in part.values() if not isinstance(value, dict)]
    packed = any(isinstance(value, Tensor) and value.dtype == torch.uint8 for value in values)
    shapes = {tuple(weight.shape), *({(256,), (-(-weight.numel() // 256),)} if packed else ())}
    return all(
        isinstance(value, Tensor)
        and (value.is_floating_point() or value.dtype == torch.uint8)
        and (value.numel() == 1 or tuple(value.shape) in shapes)
        for value in values
        if type(value) is not int  # a count of steps
    )


def fit_from(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, path: Path | None) -> None:
    """`trainer.fit`, from a checkpoint or from the start.

    Raises:
        UserError: the checkpoint's state cannot be taken over.
    """
    (state,) = [callback for callback in trainer.callbacks if isinstance(callback, RestoredState)]
    try:
        trainer.fit(module, datamodule=data, ckpt_path=path)
    except MISFITS as error:
        if path is None or state.started or is_lost_rank(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"--resume {path}: its state cannot be taken over ({reason(error)}); start from its weights instead: "
            "--load_checkpoint"
        ) from error
