"""Scripts as processes of their own in which something goes wrong at a certain moment."""

from pathlib import Path

from utils import ROOT

RUNNER = """\
import sys

sys.path.insert(0, {root!r})
from utils import load_script, run_script

script = load_script({script!r})
{fault}
run_script(script.main, script.parse_args)
"""
KILL_NEWEST_LOADER = """\
import multiprocessing, time
max(multiprocessing.active_children(), key=lambda child: child.pid).kill()
time.sleep(1)
"""
WAIT_3_S = "import distillation.run.signals as signals\nsignals.WAIT_FOR_DATA_S = 3\n"
KILL_ITSELF = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def faulty(folder: Path, script: str, fault: str) -> str:
    """The path of a script that does what `script` (a path in this repository) does, after the lines of `fault`.

    They find its module as `script` and may replace parts of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "faulty.py"
    path.write_text(RUNNER.format(root=str(ROOT), script=script, fault=fault), encoding="utf-8")
    return str(path)


def in_step(step: str, call: int, lines: str) -> str:
    """Lines that run in the `call`-th call (from 1) of a baseline's `training_step` or `validation_step`, before it."""
    return f"""
calls, step = 0, script.SupervisedStudent.{step}
def with_fault(self, batch, batch_idx):
    global calls
    calls += 1
    if calls == {call}:
{_indented(lines)}
    return step(self, batch, batch_idx)
script.SupervisedStudent.{step} = with_fault
"""


def slow_steps(seconds: float) -> str:
    """Lines that make each step of a baseline say `<training_step 3>` on stderr and wait, with room for a signal."""
    return f"""
import time
def slowed(name):
    calls, step = 0, getattr(script.SupervisedStudent, name)
    def slow(self, batch, batch_idx):
        nonlocal calls
        calls += 1
        print(f"<{{name}} {{calls}}>", file=sys.stderr, flush=True)
        time.sleep({seconds})
        return step(self, batch, batch_idx)
    setattr(script.SupervisedStudent, name, slow)
slowed("training_step")
slowed("validation_step")
"""


def in_loading(picture: int, lines: str) -> str:
    """Lines that run in a loading process, before it opens its `picture`-th picture (from 1)."""
    return f"""
import multiprocessing
from PIL import Image
opened, open_picture = 0, Image.open
def with_fault(*args, **options):
    global opened
    opened += multiprocessing.parent_process() is not None
    if opened == {picture}:
{_indented(lines)}
    return open_picture(*args, **options)
Image.open = with_fault
"""


def in_rank(rank: int, lines: str) -> str:
    """Lines that run in one of the processes that Lightning or torchrun has started on this machine."""
    body = "".join(f"    {line}\n" for line in lines.strip("\n").splitlines())
    return f'import os\nif os.environ.get("LOCAL_RANK", "0") == "{rank}":\n{body}'


def stuck_where(condition: str) -> str:
    """Pictures that never come, as from a network disk that is gone: `self` is their data set, `key` (epoch, index)."""
    return f"""
import time
from dataset.datamodule import SUNRGBDDataset
get = SUNRGBDDataset.__getitem__
def get_or_wait(self, key):
    if {condition}:
        print("<stuck>", file=sys.stderr, flush=True)
        time.sleep(1000)
    return get(self, key)
SUNRGBDDataset.__getitem__ = get_or_wait
"""


def _indented(lines: str) -> str:
    return "\n".join(f"        {line}" for line in lines.splitlines())
