"""What happens around training steps: randomness, guards, logging, progress."""

import time
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from utils import ProgressLine, UserError


class KeyedRandomness(Callback):
    """Seeds every step by (seed, epoch, batch): a resumed run draws the same dropout masks without stored state."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the global generators of all devices."""
        key = np.random.SeedSequence((self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))


class FiniteGuard(Callback):
    """Stops before an update with a gradient that is not finite; what was saved before stays good."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        """Raises UserError that names the step and the flags to change."""
        if trainer.precision == "16-mixed":
            return  # the gradient scaler skips such steps on purpose
        norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            raise UserError(
                f"the gradient is not finite at step {trainer.global_step} (epoch {trainer.current_epoch}); nothing "
                "was updated. Start again with a lower --lr or another --precision, from --load_checkpoint if one was "
                "saved."
            )


def ends_update(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps after this micro-batch: an epoch's last update may have fewer of them."""
    done = batch_idx + 1
    return done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches


class UpdateLog(Callback):
    """Logs the terms of each optimizer update, added up over its micro-batches and ranks.

    `training_step` returns every micro-batch's part of them as `terms`.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up, and log when the update is complete."""
        for name, part in outputs["terms"].items():
            self.sums[name] = self.sums.get(name, 0.0) + part.detach() * (not batch["spare"])
        if ends_update(trainer, batch_idx):
            totals = trainer.strategy.reduce(torch.stack(list(self.sums.values())), reduce_op="sum")
            module.log_dict({f"train/{name}": total for name, total in zip(self.sums, totals, strict=True)})
            self.sums = {}


class Progress(Callback):
    """One line with step, loss, images per second and time left; plain lines when the output is not a terminal."""

    def __init__(self) -> None:
        self.validated_step = -1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start counting; a resumed run starts where it is."""
        per_epoch = trainer.num_training_batches
        total = per_epoch * trainer.max_epochs if trainer.max_epochs > 0 else 10**9
        if trainer.max_steps > 0:
            total = min(total, trainer.max_steps * trainer.accumulate_grad_batches)
        self.done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self.line = ProgressLine("training step", total=total, done=self.done)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Report."""
        self.done += 1
        loss = trainer.callback_metrics.get("train/loss")  # None before the first update

        def said() -> str:
            return f", epoch {trainer.current_epoch + 1}" + ("" if loss is None else f", loss {float(loss):.3f}")

        if trainer.is_global_zero:
            self.line.update(self.done, said)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """One line per validation."""
        self.validated_step = trainer.global_step
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        values = ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))
        if trainer.is_global_zero:
            print(f"epoch {trainer.fit_loop.epoch_progress.current.started}: {values}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        """A run that was stopped after its last validation does not validate once more."""
        return {"validated_step": self.validated_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of `state_dict`."""
        self.validated_step = state["validated_step"]


class StepTimer(Callback):
    """Length of a row and seconds of the last step, for --dry_run."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        ids = batch["text"]["input_ids"]
        self.tokens = ids.shape[1]
        self.image_tokens = int((ids[0] == module.student.config.image_token_id).sum())
        self.start = time.monotonic()

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop it when the device is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the GPU computes on while Python is done
        self.seconds = time.monotonic() - self.start  # the second step's: the first one warms up
