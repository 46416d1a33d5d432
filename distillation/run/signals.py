"""Signals that ask a run to stop: what is saved then, and where it goes on."""

import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.profilers import Profiler
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import distributed

from distillation.run.callbacks import ends_update
from utils import STOP_SIGNALS, end_children

WAIT_FOR_DATA_S = 20  # of a rank, after a signal: torchrun kills 30 s after one, and a checkpoint takes its time
LOST_RANK = ("gloo/", "Connection closed by peer", "Connection reset by peer")  # what gloo says to the others


@contextmanager
def signals_given_back() -> Iterator[None]:
    """Put the handlers of before in place again after the block, which may set others.

    A block that leaves the process keeps its own: a second signal must not disturb that.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    except SystemExit:
        raise
    except BaseException:
        _put(before)
        raise
    _put(before)


def _put(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


class StopOnSignal(Callback):
    """On a signal: save last.ckpt as of the last finished update, exit with 128 + signal, so that a scheduler requeues.

    Whether one has come is asked after every micro-batch of training and of validation. The resumed run does the
    micro-batches of an unfinished update again, with the same random numbers (see `KeyedRandomness`), and a whole
    validation. With several ranks each question costs a sum over one number.

    A single process leaves while it waits for data too, which a disk may never deliver. One of several ranks does so
    after `WAIT_FOR_DATA_S` seconds; the first one, if it is another, then hears from gloo that this one has ended.
    """

    def __init__(self, last: Path) -> None:
        self.last, self.received, self.received_at = last, 0, math.inf
        self.fetching = Fetching()  # for the Trainer
        self.alone, self.listens = True, False  # until `setup`
        self.agreed = False  # all ranks leave
        self.interrupted = False  # while it waited for data
        self.started: list[subprocess.Popen] = []  # further ranks, by this one
        self.finished: dict[str, Any] | None = None  # Lightning's counters at the end of the last finished update
        self.finished_updates = 0  # at that time
        self.saved: dict[str, Any] | None = None  # those that the checkpoint gets instead of the present ones

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Listen from here on, the loading of a checkpoint included."""
        self.alone = trainer.world_size == 1
        # Lightning's own handler of SIGTERM talks to other ranks at any time, in the middle of what they do together.
        trainer._signal_connector.register_signal_handlers = lambda: None
        self._listen()

    def _listen(self) -> None:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self._receive)
        signal.signal(signal.SIGALRM, lambda *_: self._leave_waiting(WAIT_FOR_DATA_S))
        self.listens = True
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # which a rank may have been started with

    def _receive(self, number: int, stack: Any) -> None:
        self.received = number  # only a flag: saving here could interrupt a save
        self.received_at = min(self.received_at, time.monotonic())
        if self.alone:
            self._leave_waiting(0)
        else:
            signal.setitimer(signal.ITIMER_REAL, 1, 1)

    def _leave_waiting(self, seconds: float) -> None:
        """Leave where a batch has not come for so long since the signal."""
        if not self.interrupted and time.monotonic() - max(self.fetching.since, self.received_at) >= seconds:
            self.interrupted = True
            raise SystemExit(128 + self.received)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Save where no batch has come, here or in another rank; wait for no loading process, whatever has happened."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        lost = not self.alone and is_lost_rank(exception)
        if trainer.state.fn == TrainerFn.FITTING and (self.interrupted or (self.received and lost)):
            self._save_alone(trainer)
        end_children()

    def _save_alone(self, trainer: pl.Trainer) -> None:
        """Save without the other ranks, who may be anywhere: also between an update and its count."""
        if distributed.is_initialized():
            distributed.destroy_process_group()  # from here on nothing waits for the others
        counted = trainer.validating or trainer.global_step == self.finished_updates
        if counted and not isinstance(trainer.strategy, ModelParallelStrategy):
            ahead = validation_ahead(trainer.fit_loop.state_dict()) if trainer.validating else self.finished
            self._save(trainer, ahead)
        elif trainer.is_global_zero:
            said = "stopped by a signal while a process waited for data; what was saved before stays"
            print(said, file=sys.stderr, flush=True)

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A resumed run's last finished update is that of its checkpoint."""
        self.finished, self.finished_updates = checkpoint["loops"]["fit_loop"], checkpoint["global_step"]

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the counters of the last finished update; weights and optimizer are still as they were then."""
        if self.saved:
            checkpoint["loops"]["fit_loop"] = self.saved
            checkpoint["epoch"] = self.saved["epoch_progress"]["current"]["completed"]
            checkpoint["position"]["batch"] = self.saved["epoch_loop.batch_progress"]["current"]["ready"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave; after an epoch's last update the validation does that."""
        if batch_idx + 1 == trainer.num_training_batches:
            return
        if ends_update(trainer, batch_idx):
            self.finished, self.finished_updates = trainer.fit_loop.state_dict(), trainer.global_step
        if self._asked(trainer):
            self._leave(trainer, self.finished)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Leave before the validation."""
        if trainer.state.fn == TrainerFn.FITTING:
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()  # see `validation_ahead`
        self._leave_validation(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *more: Any
    ) -> None:
        """Leave inside the validation; after its last batch what it gives is kept."""
        if batch_idx + 1 < trainer.num_val_batches[0]:
            self._leave_validation(trainer)

    def _leave_validation(self, trainer: pl.Trainer) -> None:
        if not self._asked(trainer):
            return
        if trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer, validation_ahead(trainer.fit_loop.state_dict()))
        self._exit(trainer)  # that of what --max_steps has ended is not part of the fit, and all is saved

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Leave with the epoch validated and its best checkpoint written."""
        self.finished, self.finished_updates = trainer.fit_loop.state_dict(), trainer.global_step
        if self._asked(trainer):
            self._leave(trainer, None)

    def _asked(self, trainer: pl.Trainer) -> bool:
        # All ranks leave together: one that went on alone would wait for the others for ever.
        return trainer.strategy.reduce_boolean_decision(bool(self.received), all=False)

    def _leave(self, trainer: pl.Trainer, counters: dict[str, Any] | None) -> None:
        self._save(trainer, counters)
        self._exit(trainer)

    def _save(self, trainer: pl.Trainer, counters: dict[str, Any] | None) -> None:
        """Save with these counters, None: the present ones; in the first update of a new run there is nothing to."""
        said = "stopped by a signal before the first update; nothing to save, start it again"
        if trainer.global_step:
            self.saved = counters
            trainer.save_checkpoint(self.last)
            said = f"stopped by a signal; saved {self.last}; continue with --resume auto"
        if trainer.is_global_zero:
            print(said, file=sys.stderr, flush=True)

    def _exit(self, trainer: pl.Trainer) -> None:
        self.agreed = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        number = torch.tensor(self.received, device=trainer.strategy.root_device)  # which not all ranks have received
        code = 128 + int(trainer.strategy.reduce(number, reduce_op="max"))
        # Lightning would kill the first process for any other code.
        raise SystemExit(0 if started_by_lightning(trainer) else code)


def started_by_lightning(trainer: pl.Trainer) -> bool:
    """Whether this is a further process, which Lightning has started."""
    return trainer.local_rank > 0 and isinstance(trainer.strategy.cluster_environment, LightningEnvironment)


def is_lost_rank(error: BaseException) -> bool:
    """Whether PyTorch says by this error that another rank has ended."""
    if isinstance(error, (distributed.DistBackendError, distributed.DistNetworkError, distributed.DistStoreError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in LOST_RANK)


class Fetching(Profiler):
    """Tells since when Lightning waits for a batch: it reports that to its profiler, in training and validation."""

    since = math.inf  # by `time.monotonic`; it does not wait

    def start(self, action_name: str) -> None:
        """A `..._next` fetches a batch."""
        if action_name.endswith("_next"):
            self.since = time.monotonic()

    def stop(self, action_name: str) -> None:
        """It has come, or failed to."""
        if action_name.endswith("_next"):
            self.since = math.inf


def validation_ahead(counters: dict[str, Any]) -> dict[str, Any]:
    """Lightning's counters inside a validation -> those with which a resumed run validates from its first batch on.

    Lightning looks at the counts of all validation batches: one that was begun and not ended makes it validate, where
    it would otherwise go on with the next epoch. The present counts say with which batch. `on_validation_start` resets
    the former, so that later checkpoints do not say the same.
    """
    progress = counters["epoch_loop.val_loop.batch_progress"]
    progress["total"] = dict.fromkeys(progress["total"], 0) | {"ready": 1, "started": 1}
    progress["current"] = dict.fromkeys(progress["current"], 0)
    return counters | {"epoch_loop.val_loop.batch_progress": progress | {"is_last_batch": False}}
