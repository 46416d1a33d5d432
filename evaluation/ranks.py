"""An evaluation on several devices: a process for each, started by torchrun or by --devices, with its share of images.

The first process does all that one alone does; the others only answer. They speak with each other where the first has
checked something that the others would find wrong, too, and where all have come to the same point.
"""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from utils import UserError, available_cores, end_with_parent, let_first_speak

LONGEST_WAIT = timedelta(days=7)  # of a process that has answered for the slowest one


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it does more than to answer."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """What it computes on."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first process enters the block alone; the others follow, or leave without a word where it has failed."""
        if self.world_size == 1:
            yield
            return
        if not self.is_first:
            self._hear_of_first()
        try:
            yield
        except BaseException:
            if self.is_first:
                self._tell_others(False)
            raise
        if self.is_first:
            self._tell_others(True)

    @contextmanager
    def one_error(self) -> Iterator[None]:
        """All processes do the same in the block. Where it fails with a UserError, that is raised in the first alone.

        The others leave without a word.
        """
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        said = [None] * self.world_size
        if self.world_size > 1:
            with _others_may_fail():
                distributed.all_gather_object(said, error and str(error))
        if not self.is_first and any(said):
            raise SystemExit(2)
        if error or any(said):
            raise error or UserError(next(filter(None, said)))

    def wait_for_all(self) -> None:
        """Return when all processes have come here."""
        if self.world_size > 1:
            with _others_may_fail():
                distributed.barrier()

    def _tell_others(self, succeeded: bool) -> None:
        with _others_may_fail():
            distributed.broadcast_object_list([succeeded], src=0)

    def _hear_of_first(self) -> None:
        told = [None]
        with _others_may_fail():
            distributed.broadcast_object_list(told, src=0)
        if not told[0]:
            raise SystemExit(2)


@contextmanager
def _others_may_fail() -> Iterator[None]:
    """Leave without a word where another process has ended: it has said why."""
    try:
        yield
    except RuntimeError:
        raise SystemExit(2) from None


ALONE = Ranks()


def start_processes(devices: int | None) -> bool:
    """Run this command as one process per device; False where there is nothing to start.

    Raises:
        UserError: there are fewer devices.
        SystemExit: a process has failed, with its exit code; it has said why.
    """
    launched = os.environ.get("LOCAL_WORLD_SIZE")
    if launched and devices not in (None, int(launched)):
        raise UserError(f"--devices {devices}: torchrun has started {launched} processes here; leave it out")
    if launched or devices in (None, 1):
        return False
    there = torch.cuda.device_count() if torch.cuda.is_available() else len(available_cores())
    if devices > there:
        what = "GPU(s)" if torch.cuda.is_available() else "CPU core(s)"
        raise UserError(f"--devices {devices}: there are {there} {what} here; give at most as many")
    logging.disable(logging.ERROR)  # the processes themselves say what is wrong
    here = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid())}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=devices, max_restarts=0, **here)
    if not torch.cuda.is_available():  # as torchrun does it: each would use all cores
        os.environ.setdefault("OMP_NUM_THREADS", str(there // devices))
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except SignalException as stopped:  # by which the first process was, too, and has said so
        raise SystemExit(128 + stopped.sigval) from None
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if -signal.SIGKILL in codes:
            raise UserError(f"--devices {devices}: a process was killed; memory may be short, give fewer") from None
        raise SystemExit(max(codes)) from None
    return True


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """This process among those of its start; alone where no launcher has started it."""
    world_size, rank = (int(os.environ.get(name) or default) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    if world_size == 1 or "MASTER_ADDR" not in os.environ:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    end_with_parent()  # nobody else would, and it would hold its device for hours
    if rank > 0:
        let_first_speak()
    distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield Ranks(rank, world_size)
    finally:
        distributed.destroy_process_group()
