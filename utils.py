"""Plumbing that every script shares: the .env file, user errors, progress lines, atomic files, number flags, cores.

Import this module before pytorch_lightning or transformers: huggingface_hub reads its environment variables once, when
it is first imported, and this module puts the variables of `.env` in place.
"""

import os
from pathlib import Path

from dotenv import load_dotenv

ROOT = Path(__file__).resolve().parent
load_dotenv(ROOT / ".env")  # variables that the shell has already set win
# The image processor is the PIL one by choice; this keeps transformers from advertising the torchvision one.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# isort: split
import argparse
import fcntl
import hashlib
import importlib.util
import json
import math
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")
SOURCES = (".py", ".json", ".csv", ".txt", ".xz")  # code and tables
# Control characters (C0, delete, C1), marks and overrides of the writing direction, line separators, and the halves of
# characters that stand for bytes of a file's name that are no text.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_MESSAGE = 2000  # characters; a stranger's file may quote itself at any length
# What libraries advise where they refuse to run a stranger's code: to let it run.
UNSAFE_ADVICE = re.compile("weights_only|trust_remote_code|safe_globals|safe_load|upgrade", re.IGNORECASE)


class UserError(Exception):
    """Bad input: a file, row or flag. `run_script` prints the message as one line and exits with 2."""


def run_script(main: Callable[[Any], None], parse_args: Callable[[], Any]) -> None:
    """Run a script's `main(parse_args())`; a `UserError` becomes one clear line on stderr and exit code 2."""
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(_fail(error))


def load_script(path: str) -> ModuleType:
    """A script, by its path in this repository, as a module with `parse_args` and `main`; nothing runs at import."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fail(error: UserError) -> int:
    # A data loading process hands its error over inside a traceback; the user's words stand at its end.
    message = " ".join(str(error).rsplit("utils.UserError: ", 1)[-1].split())
    message = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} ..."
    print(f"error: {printable(message)}", file=sys.stderr)
    return 2


def printable(text: object) -> str:
    """Text for a terminal, a table or a page: what could move a cursor, color it or turn lines around is escaped.

    Names come from strangers' files. All other characters, of whatever script, stay as they are.
    """
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def reason(error: BaseException) -> str:
    """A library's error in one line for the user, but for advice to let a stranger's code run."""
    line = next(iter(str(error).strip().splitlines()), "")[:300]
    kind = type(error).__name__
    if not line or UNSAFE_ADVICE.search(line):
        return kind
    return printable(f"{kind}: {line}" if isinstance(error, KeyError) else line)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, is no JSON, is nested too deeply, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({reason(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__} where an object {{...}} belongs")
    return value


def data_root(miniature: bool, *, unpacked: bool = True) -> Path:
    """The folder that contains `SUNRGBD/`: ROOT_DATA_DIR of `.env`, or the miniature world's.

    Raises:
        UserError: ROOT_DATA_DIR is not set or, when the data set should be `unpacked` there, has no `SUNRGBD/` folder.
    """
    if miniature:
        return outputs_root(ROOT / "dataset" / "miniature") / "world"
    value = os.environ.get("ROOT_DATA_DIR", "").strip()
    if not value:
        raise UserError(
            f"ROOT_DATA_DIR is not set. Write ROOT_DATA_DIR=/folder/that/contains/SUNRGBD into {ROOT / '.env'} "
            "(see .env.example), or add --miniature to run on the built-in world."
        )
    root = Path(value).expanduser()
    if unpacked and not (root / "SUNRGBD").is_dir():
        raise UserError(f"ROOT_DATA_DIR={root} has no folder SUNRGBD; correct the line in {ROOT / '.env'}.")
    return root.resolve()


def outputs_root(script_folder: Path) -> Path:
    """Where a script writes: its own folder, or the same relative folder below MAIN_ROOT_DATA_DIR when that is set."""
    value = os.environ.get("MAIN_ROOT_DATA_DIR", "").strip()
    if not value:
        return script_folder
    relative = script_folder.resolve().relative_to(ROOT)
    parts = relative.parts[1:] if relative.parts[0] in ("distillation", "dataset") else relative.parts
    return Path(value).expanduser().resolve().joinpath(*parts)


def model_source(name: str) -> str:
    """Where to load a model from: a folder of this repository from wherever the script runs, else `name` as it is.

    Checkpoints record the models that come with the repository by their place in it, so that they load on any machine.
    """
    return str(ROOT / name) if os.path.isdir(ROOT / name) else name  # no error for a name that no file can have


def hf_token() -> str | None:
    """The Hugging Face token of `.env`, for hub calls only: it is never a flag, a hyper-parameter or a log line."""
    return os.environ.get("hf_token") or None


class ProgressLine:
    """Says how far a long job is and how long it will take.

    A terminal gets one line that is redrawn; anything else (a log file, a pipe) gets a plain line every `every_s`
    seconds.
    """

    def __init__(self, label: str, *, total: int, done: int = 0, every_s: float = 10.0) -> None:
        self.label, self.total, self.first = printable(label), total, done
        self.live = sys.stderr.isatty()
        self.every_s = 0.2 if self.live else every_s
        self.start = self.last = time.monotonic()

    def update(self, done: int, extra: Callable[[], str] | None = None) -> None:
        """`done` of `total` items are finished; what `extra` returns is shown behind the time left.

        It is called only when a line is written: reading a loss makes a GPU wait.
        """
        now = time.monotonic()
        if done != self.total and now - self.last < self.every_s:
            return
        self.last = now
        rate = max(done - self.first, 1) / max(now - self.start, 1e-9)
        left = duration(max(self.total - done, 0) / rate)
        line = f"{self.label}: {done}/{self.total} ({rate:.1f}/s, {left} left){extra() if extra else ''}"
        end = "\n" if not self.live or done == self.total else ""
        print(f"\r{line}\x1b[K" if self.live else line, end=end, file=sys.stderr, flush=True)


def progress(items: Iterable[T], *, total: int, label: str) -> Iterator[T]:
    """Pass `items` through and report on a `ProgressLine`."""
    line = ProgressLine(label, total=total)
    for done, item in enumerate(items, 1):
        yield item
        line.update(done)


@contextmanager
def announced(what: str, *, after_s: float = 1.0) -> Iterator[None]:
    """Say on stderr what is going on when the block takes longer than `after_s` seconds."""
    timer = threading.Timer(after_s, partial(print, f"{printable(what)} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def duration(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    minutes, secs = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it to `path` when the block succeeds; nothing half-written stays.

    A `durable` file survives a power cut right after. That costs milliseconds, which many files that can be made again
    need not pay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        if durable:
            with open(part, "rb+") as handle:
                os.fsync(handle.fileno())
        os.replace(part, path)
        if not durable:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the rename itself durable
        finally:
            os.close(folder)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def source_digest(folder: Path, *, without: Collection[str] = (), subfolders: bool = True) -> str:
    """Digest of the code in a folder: the names and bytes of its Python files and tables.

    Files that this code makes and keeps have the digest in their names, so that changed code does not use them. It
    covers whole folders, because a list of files would miss those that are split off later.

    Args:
        folder: its subfolders count when there are Python files in them. Models and rendered worlds have none and are
            not read.
        without: names of files that the kept files do not depend on.
        subfolders: False for the files of this folder alone.
    """
    digest, waiting = hashlib.sha256(), [folder]
    while waiting:
        entries = sorted(waiting.pop(0).iterdir())
        if not any(entry.suffix == ".py" for entry in entries):
            continue
        for entry in entries:
            if entry.suffix in SOURCES and entry.name not in without:
                digest.update(f"{entry.relative_to(folder)} {sha256(entry)}\n".encode())
        waiting += [entry for entry in entries if subfolders and entry.is_dir()]
    return digest.hexdigest()


def checksum_path(path: Path) -> Path:
    """Where the checksum of a file lies: beside it."""
    return path.with_name(f"{path.name}.sha256")


@contextmanager
def checksummed_path(path: Path) -> Iterator[Path]:
    """`atomic_path` that leaves the file's checksum beside it."""
    with atomic_path(path) as part:
        yield part
        digest = sha256(part)
        # Removed before the rename: killed in between, the old digest beside the new file would call it damaged.
        checksum_path(path).unlink(missing_ok=True)
    with atomic_path(checksum_path(path)) as part:
        part.write_text(digest + "\n", encoding="utf-8")


def matches_checksum(path: Path) -> bool | None:
    """Whether a file is as it was written; None without a checksum beside it."""
    digest = checksum_path(path)
    return digest.read_text(encoding="utf-8").strip() == sha256(path) if digest.is_file() else None


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock on a folder: processes that need the same files in it wait for each other and make them only once.

    Any number of processes may hold a `shared` lock at a time; one that is not shared waits for all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(handle, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is at work in {folder}", file=sys.stderr, flush=True)
            fcntl.flock(handle, mode)
        yield
    finally:
        os.close(handle)


def at_least(minimum: int | float, *, below: float = math.inf) -> Callable[[str], int | float]:
    """An argparse type: a number of at least `minimum` and less than `below`; a whole one where `minimum` is an int."""

    def number(text: str) -> int | float:
        value = _number(text, type(minimum))
        if not minimum <= value < below:  # nan is neither
            limit = f" and less than {below:g}" if below < math.inf or value == below else ""
            raise argparse.ArgumentTypeError(f"{text}: give at least {minimum:g}{limit}")
        return value

    return number


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    if not 0 < (value := _number(text, float)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a finite number above 0")
    return value


def share(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    if not 0 < (value := _number(text, float)) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give a share above 0 and at most 1")
    return value


def fraction(text: str) -> float:
    """An argparse type: a number above 0 and below 1."""
    if not 0 < (value := _number(text, float)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0 and below 1")
    return value


def _number(text: str, kind: type) -> int | float:
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None


def available_cores() -> list[int]:
    """The numbers of the cores that this process may use; all cores where the system cannot restrict them (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def use_cores(cores: Collection[int]) -> None:
    """Restrict this process, and those that it starts, to these cores, where the system can (not on macOS)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def core_shares(n: int) -> list[list[int]]:
    """The cores that this process may use, shared out to `n` jobs; where there are too few, jobs share one.

    Small models leave most of a machine idle, so jobs run side by side; two that both use all cores would slow each
    other down.
    """
    cores = available_cores()
    return [cores[i::n] or [cores[i % len(cores)]] for i in range(n)]


def peak_memory(who: int = resource.RUSAGE_SELF) -> int:
    """The most bytes that this process has ever held; RUSAGE_CHILDREN: the largest one that it has waited for."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return unit * resource.getrusage(who).ru_maxrss


def git_commit() -> str:
    """The commit of this checkout, with `-dirty` at its end when files differ from it; `unknown` outside a checkout."""
    with suppress(OSError, subprocess.CalledProcessError):
        describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    return "unknown"
