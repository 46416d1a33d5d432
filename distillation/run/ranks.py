"""The processes of a run on several devices: none outlives the others, and what is the same for all is said once."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import pytorch_lightning as pl

from distillation.run.claim import release_claims
from distillation.run.signals import StopOnSignal, is_lost_rank, started_by_lightning
from utils import (
    STOP_SIGNALS,
    UserError,
    end_with_parent,
    is_first_process,
    let_first_say_errors,
    let_first_speak,
    reason,
)

FIRST_PROCESS_VARIABLE = "PID_OF_FIRST_PROCESS"
LOST = (
    "another process of this run has ended; if it has not said why, it was killed, perhaps for lack of memory. What is "
    "saved stays: continue with --resume auto"
)
HANDLERS_S = 5  # for the main thread to get to a handler of Python's
FIRST_LEAVES_S = 600  # for the first rank to save and leave
LOOK_EVERY_S = 0.5


@cache  # tests call several scripts in a process
def join_launcher() -> None:
    """Where torchrun or Lightning has started this process, end with it; one that is not the first says errors only.

    Until it trains, a signal ends one of torchrun's at once: while PyTorch waits for other processes, no handler of
    Python's runs. For those of Lightning's signals wait, see `_watched`.
    """
    if is_first_process():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_parent(_ask_to_stop)
        else:
            os.environ[FIRST_PROCESS_VARIABLE] = str(os.getpid())  # for those that Lightning starts
        return
    let_first_speak()
    let_first_say_errors()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(_ask_to_stop)
    else:  # without the first rank nothing can be saved
        by_lightning = "LOCAL_RANK" in os.environ
        end_with_parent(parent=int(os.environ[FIRST_PROCESS_VARIABLE]) if by_lightning else None)


def _ask_to_stop() -> None:
    """All ranks save and leave together, as after a signal."""
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def ending_together(trainer: pl.Trainer) -> Iterator[None]:
    """End what the trainer has started with the block: loading processes, and after an error the further ranks.

    Where a validation fails, Lightning ends the loading processes of the validation only.

    Raises:
        UserError: another rank has ended.
        SystemExit: the same after a signal, which has come while one of them waited for data.
    """
    (stop,) = [callback for callback in trainer.callbacks if isinstance(callback, StopOnSignal)]
    try:
        with _watched(trainer, stop):
            yield
    except BaseException as error:
        if not stop.agreed:
            _kill(stop.started)
        if stop.interrupted and started_by_lightning(trainer):
            threading.Event().wait(FIRST_LEAVES_S)  # the first one may be saving, and then ends this one
        if trainer.world_size == 1 or not is_lost_rank(error):
            raise
        if stop.received:
            raise SystemExit(128 + stop.received) from None
        raise UserError(f"{LOST} ({reason(error)})") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        trainer.fit_loop.teardown()


def _kill(started: list[subprocess.Popen]) -> None:
    for rank in started:
        rank.kill()
    for rank in started:
        with suppress(subprocess.TimeoutExpired):  # on a disk that does not answer
            rank.wait(5)


@contextmanager
def _watched(trainer: pl.Trainer, stop: StopOnSignal) -> Iterator[None]:
    """Let a thread of the first rank see signals and ranks that end: its main thread may wait inside PyTorch for ever.

    The ranks that Lightning starts inherit that signals wait. They get them when `stop` listens.
    """
    if trainer.world_size == 1 or not is_first_process():
        yield
        return
    seen, sent = socket.socketpair()
    seen.settimeout(LOOK_EVERY_S)
    sent.setblocking(False)
    left = threading.Event()
    threading.Thread(target=_watch, args=(seen, left, trainer, stop), daemon=True).start()
    before = signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        left.set()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        signal.set_wakeup_fd(before)
        sent.close()


def _watch(seen: socket.socket, left: threading.Event, trainer: pl.Trainer, stop: StopOnSignal) -> None:
    """Hand signals on to the ranks that this one has started: one of them may be the one that all wait for.

    Leave in the place of the main thread where it hangs: before all ranks are there, or because one has failed.
    """
    with seen:
        while (number := _next_signal(seen)) is not None:
            if launcher := trainer.strategy.launcher:
                while launcher.procs:  # Lightning would kill this process as soon as one fails, also while it saves
                    stop.started.append(launcher.procs.pop())
            if number in STOP_SIGNALS and stop.listens:
                for rank in stop.started:
                    rank.send_signal(number)
            elif number in STOP_SIGNALS:
                _leave_after(HANDLERS_S, left, stop, f"stopped by {signal.Signals(number).name}", 128 + number)
            elif any(rank.poll() for rank in stop.started):
                _leave_after(FIRST_LEAVES_S if stop.listens else 0, left, stop, f"error: {LOST}", 2)


def _next_signal(seen: socket.socket) -> int | None:
    """The number of the next signal; 0 where none comes for a while, None at the end of the run."""
    try:
        received = seen.recv(1)
    except TimeoutError:
        return 0
    return received[0] if received else None


def _leave_after(seconds: float, left: threading.Event, stop: StopOnSignal, said: str, code: int) -> None:
    """Leave, unless the main thread does so within this time."""
    if left.wait(seconds):
        return
    print(said, file=sys.stderr, flush=True)
    sys.stdout.flush()
    _kill(stop.started)
    release_claims()
    os._exit(code)
