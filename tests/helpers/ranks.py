"""Training scripts on several ranks, as torchrun starts them: one start for many, since each takes seconds."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Of the test's own process, which may have trained before: those of a start are not to join its runs.
OF_FIRST_PROCESS = ("RUN_NAME_OF_FIRST_PROCESS", "TOKEN_OF_FIRST_PROCESS")


@dataclass(frozen=True)
class Command:
    """A call of a script."""

    script: str  # its path
    argv: list[str]  # without --devices
    stop_at: int | None = None  # the first rank gets a signal in this micro-batch, counted from 1
    seen: str | None = None  # file to which each rank writes the images that it trained on, with `.<rank>` behind it


def on_ranks(folder: Path, commands: Sequence[Command], *, n_ranks: int = 2, code: int = 0) -> str:
    """Call the main functions of scripts one after the other on some ranks.

    Args:
        folder: for a file with the commands.
        commands: in their order.
        n_ranks: number of processes.
        code: that they are to end with.

    Returns:
        What they wrote to stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "commands.json"
    calls = [asdict(command) | {"argv": [*command.argv, "--devices", str(n_ranks)]} for command in commands]
    path.write_text(json.dumps(calls), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_ranks)]
    env = {name: value for name, value in os.environ.items() if name not in OF_FIRST_PROCESS}
    env["OMP_NUM_THREADS"] = "1"  # all ranks together take no more than a small machine has
    done = subprocess.run([*torchrun, __file__, str(path)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    return done.stderr


def images_seen(seen: Path, n_ranks: int = 2) -> list[str]:
    """The images that all ranks trained on, not in the order of the update."""
    return [image for rank in range(n_ranks) for image in json.loads(Path(f"{seen}.{rank}").read_text("utf-8"))]


def models_read(folder: Path, n_ranks: int = 2) -> list[int]:
    """How often each rank has read the weights of a model, of what `on_ranks` was given this folder for."""
    return [int((folder / f"read.{rank}").read_text("utf-8")) for rank in range(n_ranks)]


def call(command: Command, rank: int) -> None:
    """What a rank does with a command."""
    import pytest

    from tests.helpers.training import interrupted
    from tests.helpers.updates import images_of, recorded_batches
    from utils import load_script

    script, seen = load_script(command.script), {}
    with ExitStack() as stack:
        if command.seen:
            stack.enter_context(recorded_batches(script, seen))
        if command.stop_at:
            stopped = interrupted(command.stop_at) if rank == 0 else pytest.raises(SystemExit)
            stack.enter_context(stopped)
        script.main(script.parse_args(command.argv))
    for number in (signal.SIGTERM, signal.SIGINT):  # a process that leaves keeps the run's handlers
        signal.signal(number, signal.SIG_DFL)
    if command.seen:
        Path(f"{command.seen}.{rank}").write_text(json.dumps(images_of(seen)), encoding="utf-8")


def main(path: Path, rank: int) -> None:
    """Do all commands of a file, and write beside it how often this rank has read the weights of a model."""
    from unittest import mock

    from transformers import LlavaOnevisionForConditionalGeneration as Model

    with mock.patch.object(Model, "from_pretrained", side_effect=Model.from_pretrained) as read:
        for fields in json.loads(path.read_text(encoding="utf-8")):
            call(Command(**fields), rank)
    path.with_name(f"read.{rank}").write_text(str(read.call_count), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(Path(sys.argv[1]), int(os.environ["RANK"]))
