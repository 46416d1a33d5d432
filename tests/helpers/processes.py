"""Scripts as processes of their own, as users and schedulers start them, so that they can be killed and starved."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from utils import ROOT


class Started:
    """A script that runs in a process group of its own, with its output in files of a folder.

    Leave it through a `with` block: then nothing of it goes on running after the test.
    """

    def __init__(
        self,
        script: str | Path,
        argv: list[str],
        folder: Path,
        *,
        env: Mapping[str, str] | None = None,
        program: str = sys.executable,
    ) -> None:
        """`script`: its path in this repository or a whole one; `env`: variables besides those of this process."""
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / "stdout.txt", folder / "stderr.txt"]
        with open(self.files[0], "wb") as out, open(self.files[1], "wb") as err:
            self.process = subprocess.Popen(
                [program, str(ROOT / script), *argv],
                cwd=folder,
                env=os.environ | {"PYTHONFAULTHANDLER": "1"} | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def stdout(self) -> str:
        return self.files[0].read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        return self.files[1].read_text(encoding="utf-8", errors="replace")

    def wait_until(self, condition: Callable[[], bool], *, within_s: float = 120) -> None:
        """Return as soon as the condition holds; fail when the process ends or the time is over before."""
        deadline = time.monotonic() + within_s

        def holds() -> bool:
            with suppress(FileNotFoundError):  # a folder that the process has removed while it was looked through
                return condition()
            return False

        while not holds():
            assert self.process.poll() is None, f"ended with {self.process.returncode} too early:\n{self.stderr}"
            assert time.monotonic() < deadline, f"nothing happened within {within_s} s:\n{self._stacks()}"
            time.sleep(0.005)

    def send(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the script, or to it and all that it has started."""
        (os.killpg if group else os.kill)(self.process.pid, number)

    def ends(self, *, within_s: float = 120) -> int:
        """The exit code. A process that does not end within the time fails the test as hanging."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs, no end within {within_s} s:\n{self._stacks()}") from None

    def _stacks(self) -> str:
        """All that was said, and where all threads are, of it and of all below it: they are asked by killing them."""
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
        parents = dict(map(int, line.split()) for line in listed.stdout.splitlines())
        found = {self.process.pid}
        while below := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= below
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
        time.sleep(1)
        return f"{self.stdout}\n{self.stderr}"

    def leaves_nothing(self, *, within_s: float = 5) -> None:
        """After its end: what it has started ends too, within the time."""
        deadline = time.monotonic() + within_s
        while left := self._alive():
            assert time.monotonic() < deadline, f"still there after {within_s} s: {left}"
            time.sleep(0.2)

    def _alive(self) -> list[str]:
        """Lines of `ps` about processes of its group, without those that only wait to be noticed (zombies)."""
        listed = subprocess.run(
            ["ps", "-A", "-o", "pgid=,stat=,pid=,args="], capture_output=True, text=True, check=True
        )
        rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
        return [rest for group, state, rest in rows if int(group) == self.process.pid and state[0] != "Z"]
