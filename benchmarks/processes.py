"""The machine's cores: commands of this repository side by side, each on its own share of them."""

import argparse
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from utils import ROOT, UserError, available_cores, core_shares, duration, use_cores


@dataclass(frozen=True)
class Task:
    """One command.

    Attributes:
        title: what messages call it.
        command: what stands behind `python`.
        log: file that gets all its output. Without one the terminal shows the output, each line behind the title.
    """

    title: str
    command: tuple[str, ...]
    log: Path | None = None


def check_cores(parser: argparse.ArgumentParser, cores: int) -> None:
    """End with an error when --cores asks for more cores than there are."""
    if cores > (n := len(available_cores())):
        parser.error(f"--cores {cores}: this machine has {n}")


def run_side_by_side(chains: Sequence[Sequence[Task]], jobs: int, *, finish_running: bool = False) -> None:
    """Run chains of tasks, `jobs` chains at a time, each on its own share of this machine's cores.

    The tasks of a chain run one after the other. After a failure no further task starts. Ctrl-C and SIGTERM stop all
    processes that were started here.

    Args:
        chains: at least one task each.
        jobs: largest number of processes at a time.
        finish_running: whether tasks that are running when another one fails may come to their end; else they are
            stopped.

    Raises:
        UserError: a task failed. Names its log.
    """
    runner, shares, failed = _Runner(sum(map(len, chains)), finish_running), core_shares(jobs), None
    # Every thread of the pool takes one share, and the processes that it starts inherit it.
    with _sigterm_exits(), ThreadPoolExecutor(jobs, initializer=lambda: use_cores(shares.pop(0))) as pool:
        try:
            for ended in as_completed([pool.submit(runner.run_chain, chain) for chain in chains]):
                failed = failed or ended.exception()
        except BaseException:  # Ctrl-C, SIGTERM
            runner.stop(terminate=True)
            raise
    if failed:
        raise failed


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM raises SystemExit in the block, as Ctrl-C raises KeyboardInterrupt; by default it ends Python at once."""

    def leave(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Runner:
    """The processes of several threads: starts them, tells how far they are, stops them."""

    n_tasks: int
    finish_running: bool
    n_done: int = 0
    started: float = field(default_factory=time.monotonic)
    running: list[subprocess.Popen] = field(default_factory=list)
    stopped: bool = False  # nothing new starts
    terminated: bool = False  # what was running has been stopped too
    lock: threading.RLock = field(default_factory=threading.RLock)

    def run_chain(self, chain: Sequence[Task]) -> None:
        """Run one task after the other on the cores of this thread. When one fails, stop the others and raise."""
        try:
            for task in chain:
                self.run(task)
        except BaseException:
            self.stop(terminate=not self.finish_running)
            raise

    def run(self, task: Task) -> None:
        """Run a task to its end, unless everything has been stopped. Raises UserError when it fails."""
        started, process = time.monotonic(), self.start(task)
        if process is None:
            return
        for line in process.stdout or ():
            self.say(f"[{task.title}] {line.rstrip()}")
        process.wait()
        with self.lock:
            self.running.remove(process)
            if self.terminated:  # its exit code says nothing about the task
                return
            self.n_done += 1
            self.report(task, failed=process.returncode != 0, seconds=time.monotonic() - started)
        if process.returncode:
            where = f"see {task.log}; what is finished is kept" if task.log else "its output is above"
            raise UserError(f"{task.title} failed with exit code {process.returncode}: {where}")

    def start(self, task: Task) -> subprocess.Popen | None:
        """The task's process; None when nothing is to start any more."""
        with self.lock:
            if self.stopped:
                return None
            if task.log is None:
                self.say(f"[{task.title}] {subprocess.list2cmdline(['python', *task.command])}")
            process = start_process(task)
            self.running.append(process)
        return process

    def report(self, task: Task, *, failed: bool, seconds: float) -> None:
        """Say that a task has ended; where the terminal does not show its output, also how far all tasks are."""
        if task.log is None:
            self.say(f"[{task.title}] {'FAILED after' if failed else 'took'} {duration(seconds)}")
            return
        spent = time.monotonic() - self.started
        left = duration(spent / self.n_done * (self.n_tasks - self.n_done))
        progress = f"{self.n_done} of {self.n_tasks} in {duration(spent)}, about {left} left"
        self.say(f"{task.title}: {'FAILED' if failed else 'done'}; {progress}")

    def say(self, text: str) -> None:
        """Print one line that no other thread's line runs into."""
        with self.lock:
            print(text, flush=True)

    def stop(self, *, terminate: bool) -> None:
        """Start nothing new; with `terminate` also stop what is running."""
        with self.lock:
            self.stopped = True
            if terminate:
                self.terminated = True
                for process in self.running:
                    process.terminate()


def start_process(task: Task) -> subprocess.Popen:
    """Start a task on the cores of the calling thread; its output goes into its log or, without one, into a pipe."""
    command, options = [sys.executable, *task.command], {"cwd": ROOT, "stderr": subprocess.STDOUT}
    if task.log is None:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with open(task.log, "w", encoding="utf-8") as output:
        return subprocess.Popen(command, stdout=output, **options)
