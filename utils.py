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
import errno
import fcntl
import hashlib
import importlib.util
import json
import logging
import math
import multiprocessing
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SOURCES = (".py", ".json", ".csv", ".txt", ".xz")  # code and tables
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_WRITABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.ELOOP,
}  # fmt: skip
# A failed write of torch's, Pillow's and safetensors' own writers; only the last one says why.
FAILED_WRITE = re.compile(
    r"PytorchStreamWriter failed|unexpected pos \d+ vs|iostream error|encoder error -2|\(os error (\d+)\)"
)
FIRST_SAYS_IT_S = 3
_wait_before_error_s = 0
ABANDONED_S = 24 * 3600  # no write of one file pauses for so long
# Control characters (C0, delete, C1), marks and overrides of the writing direction, line separators, and the halves of
# characters that stand for bytes of a file's name that are no text.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_MESSAGE = 2000  # characters; a stranger's file may quote itself at any length
# What libraries advise where they refuse to run a stranger's code: to let it run.
UNSAFE_ADVICE = re.compile("weights_only|trust_remote_code|safe_globals|safe_load|upgrade", re.IGNORECASE)

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # advises further packages, wherever peft finds it installed


class UserError(Exception):
    """Bad input: a file, row or flag. `run_script` prints the message as one line and exits with 2."""


def run_script(main: Callable[[Any], None], parse_args: Callable[[], Any]) -> None:
    """Run a script's `main(parse_args())`, and leave no process behind.

    A `UserError`, or a disk that is full or not writable, becomes one clear line on stderr and exit code 2, too little
    memory one and exit code 1. A signal that asks to stop ends it with 128 + signal, and what it holds is let go and
    cleaned up on the way.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not where nohup ignores it
            signal.signal(number, _leave)
    threading.excepthook = _thread_failed
    try:
        with disk_errors(None):
            main(parse_args())
    except UserError as error:
        sys.exit(_fail(str(error)))
    except Exception as error:
        if (advice := _memory_advice(error)) is None:
            raise
        sys.exit(_fail(advice, code=1))
    finally:
        end_children()


def _leave(number: int, stack: Any = None) -> None:
    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    # TensorBoard writes in a thread of its own; the thread that logs gets this error too, and the user reads it there.
    if _failed_write(failure.exc_value) is None:
        threading.__excepthook__(failure)


def load_script(path: str) -> ModuleType:
    """A script, by its path in this repository, as a module with `parse_args` and `main`; nothing runs at import."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fail(message: str, *, code: int = 2) -> int:
    time.sleep(_wait_before_error_s)
    # A data loading process hands its error over inside a traceback; the user's words stand at its end.
    message = " ".join(message.rsplit("utils.UserError: ", 1)[-1].split())
    message = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} ..."
    print(f"error: {printable(message)}", file=sys.stderr)
    return code


def let_first_speak() -> None:
    """In a process that is not the first: print nothing but errors, and end at a signal without a word."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def let_first_say_errors() -> None:
    """From now on wait before saying an error: where the first process fails alike, it says so, and ends this one."""
    global _wait_before_error_s
    _wait_before_error_s = FIRST_SAYS_IT_S


def _memory_advice(error: Exception) -> str | None:
    """What to do about an error that too little memory has caused; None for any other error."""
    text = str(error)
    if killed := re.search(r"DataLoader worker \(pid\S* [\d, ]+\).*", text):  # PyTorch's words for it
        return (
            f"a data loading process was killed ({killed[0].strip()}), probably for lack of memory; lower --num_workers"
            " (0 = none besides this), or make /dev/shm larger"
        )
    # Looked at by name, since not every script loads PyTorch.
    of_device = type(error).__name__ == "OutOfMemoryError"
    if of_device or isinstance(error, MemoryError) or "can't allocate memory" in text or "ALLOC_FAILED" in text:
        return (
            f"out of memory ({text.splitlines()[0] if text else 'none left'}); lower --batch_size, and raise "
            "--accumulate_grad_batches by as much for the same updates; --gradient_checkpointing, and --image_tokens "
            "two_tile or one_tile, need less; for memory of the machine, also a lower --num_workers"
        )
    return None


def end_children() -> None:
    """Kill what multiprocessing has started: it would be waited for, and loading processes ignore its SIGTERM."""
    if not (children := multiprocessing.active_children()):
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises when a loading process is killed
    for child in children:
        child.kill()
    for child in children:
        child.join(1)
    signal.signal(signal.SIGCHLD, handler)


def is_first_process() -> bool:
    """Whether no other process of this run comes before this one. Those of torchrun and srun know their rank."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return int(next(filter(None, ranks), 0)) == 0


def end_with_parent(end: Callable[[], None] | None = None, *, parent: int | None = None) -> None:
    """End as soon as the process that has started this one is gone, also where this one hangs.

    Args:
        end: what a thread does then; None = leave at once.
        parent: number of that process, which may be gone already; None = by the system, at this time.
    """
    threading.Thread(target=_follow, args=(parent or os.getppid(), end), daemon=True).start()


def _follow(parent: int, end: Callable[[], None]) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1) if end is None else end()


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
    """The Hugging Face token of `.env`, for hub calls only: it is never a flag, a hyper-parameter or a log line.

    Raises:
        UserError: it holds characters that no token has; a library would show it in its error.
    """
    token = os.environ.get("hf_token", "").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", token):
        raise UserError(f"hf_token in {ROOT / '.env'}: holds spaces or other characters that no token has; correct it")
    return token or None


class ProgressLine:
    """Says how far a long job is and how long it will take; of several processes, the first one.

    A terminal gets one line that is redrawn; anything else (a log file, a pipe) gets a plain line every `every_s`
    seconds.
    """

    def __init__(self, label: str, *, total: int, done: int = 0, every_s: float = 10.0) -> None:
        self.label, self.total, self.first = printable(label), total, done
        self.silent = not is_first_process()
        self.live = sys.stderr.isatty()
        self.every_s = 0.2 if self.live else every_s
        self.start = self.last = time.monotonic()

    def update(self, done: int, extra: Callable[[], str] | None = None) -> None:
        """`done` of `total` items are finished; what `extra` returns is shown behind the time left.

        It is called only when a line is written: reading a loss makes a GPU wait.
        """
        now = time.monotonic()
        if self.silent or (done != self.total and now - self.last < self.every_s):
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
    if not is_first_process():
        yield
        return
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
def atomic_path(path: Path, *, durable: bool = True, size: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it to `path` when the block succeeds; nothing half-written stays.

    What dead processes have left in the folder is removed first.

    Args:
        path: the file to write.
        durable: the file survives a power cut right after. That costs milliseconds, which many files that can be made
            again need not pay.
        size: bytes of the file where they are known before, for the message about a full disk.

    Raises:
        UserError: the disk is full or the folder is not writable.
    """
    part = part_path(path)
    try:
        with disk_errors(path, part=part, size=size):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            yield part
            _put_in_place(part, path, durable=durable)
    finally:
        _remove(part)


def _put_in_place(part: Path, path: Path, *, durable: bool) -> None:
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


def part_path(path: Path) -> Path:
    """Where this process writes `path` until it is whole; the name says whose it is."""
    return path.with_name(f".{path.name}.{os.getpid()}-{machine()}.part")


@cache
def machine() -> str:
    """The machine that this process's number belongs to; in a container, whose numbers are its own, the container."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", platform.node())[:32]
    with suppress(OSError):  # Linux only
        name += f"-{os.stat('/proc/self/ns/pid').st_ino}"
    return name


def process_start(pid: int | None = None) -> str | None:
    """When a process of this machine started, in the system's own terms; None where it does not run.

    Args:
        pid: None = this process.
    """
    pid = os.getpid() if pid is None else pid
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]  # a zombie writes nothing; see man 5 proc
    said = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return said.stdout.strip() or None


@cache  # once per folder and process: caches write thousands of files
def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files in a folder whose processes are dead; those of other machines stay."""
    pattern = re.compile(rf"\..+\.(\d{{1,8}})-{re.escape(machine())}\.part")
    with suppress(OSError):  # not there yet, or not ours: whoever writes into it is told
        for part in [entry for entry in os.scandir(folder) if entry.name.endswith(".part")]:
            owner = pattern.fullmatch(part.name)
            abandoned = time.time() - part.stat(follow_symlinks=False).st_mtime > ABANDONED_S
            # The number of a dead process may belong to another one by now.
            if owner and (abandoned or process_start(int(owner[1])) is None):
                _remove(Path(part.path))


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def disk_errors(path: Path | None, *, part: Path | None = None, size: int | None = None) -> Iterator[None]:
    """Turn the errors of a full disk or an unwritable folder into a `UserError` that names the file and the space.

    Args:
        path: what the block writes, named where the error names nothing; None = many files.
        part: where it writes that at first.
        size: bytes that it needs in all, where that is known.
    """
    try:
        yield
    except Exception as error:
        if (number := _failed_write(error)) is None:
            raise
        own = getattr(error, "filename", None)
        named = path if not own or Path(own) == part else Path(own)
        what, advice = "cannot be used", "change that, or choose another place"
        if number in NO_ROOM | {0}:
            what, advice = "not written", _room(named or Path.cwd(), part, size)
        reason = os.strerror(number) if number else "the disk is full or files may not be so large"
        raise UserError(f"{named or 'a file'}: {what}, {reason}; {advice}") from error


def _failed_write(error: BaseException | None) -> int | None:
    """The number of an error of a full disk or an unwritable folder; 0 = of a failed write; None for all others."""
    number = getattr(error, "errno", None)
    if number is None and (found := FAILED_WRITE.search(str(error))):
        number = int(found[1] or 0)
    return number if number in NO_ROOM | NOT_WRITABLE | {0} else None


def _room(path: Path, part: Path | None, size: int | None) -> str:
    free = free_space(path)
    with suppress(OSError, AttributeError):
        free += part.stat().st_size  # it will be removed
    needed = f"{amount(size)} needed, {amount(free)} free" if size else f"more needed than the {amount(free)} free"
    return f"{needed}; make room, or write elsewhere"


def existing_folder(path: Path) -> Path:
    """The folder itself where it is there, else the nearest one above it that is."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def free_space(path: Path) -> int:
    """Bytes that may still be written where this path is or would be."""
    return shutil.disk_usage(existing_folder(path)).free


def amount(n_bytes: float) -> str:
    """Bytes as `1.25 GB`, `1.25 MB` or `1 kB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:,.2f} {name}"
    return f"{max(n_bytes, 0) / 1e3:.0f} kB"


def check_writable(folder: Path, what: str) -> None:
    """Write a small file into a folder, made when missing, and remove all of it again.

    Raises:
        UserError: that fails. Names `what`, the flag or the files that are to go there.
    """
    probe, made = part_path(folder / "probe"), []
    try:
        made = [above for above in (folder, *folder.parents) if not above.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
    except OSError as error:
        raise UserError(
            f"{what}: cannot write into {folder}, {error.strerror}; change that, or choose another place"
        ) from error
    finally:
        _remove(probe)
        for above in made:
            with suppress(OSError):  # not made, or another process uses it by now
                above.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    _write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
def checksummed_path(path: Path, *, size: int | None = None) -> Iterator[Path]:
    """`atomic_path` that leaves the file's checksum beside it, in the format of sha256sum.

    Killed at any moment, the file has its checksum: both the old and the new one stand beside it while it is replaced.
    """
    beside = checksum_path(path)
    old = beside.read_text(encoding="utf-8") if path.is_file() and beside.is_file() else ""
    with atomic_path(path, size=size) as part:
        yield part
        new = f"{sha256(part)}  {path.name}\n"
        _write_text(beside, new + old)
    _write_text(beside, new)


def matches_checksum(path: Path) -> bool | None:
    """Whether a file is as it was written; None without a checksum beside it."""
    beside = checksum_path(path)
    if not beside.is_file():
        return None
    lines = beside.read_text(encoding="utf-8", errors="replace").splitlines()
    return sha256(path) in {line.split(maxsplit=1)[0] for line in lines if line.strip()}


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


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


def share_or_none(text: str) -> float:
    """An argparse type: a number of at least 0 and at most 1."""
    if not 0 <= (value := _number(text, float)) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give a share of at least 0 and at most 1")
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


def peak_memory(usage: resource.struct_rusage | None = None) -> int:
    """The most bytes that a process has ever held: this one, or that whose usage `os.wait4` has given."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return unit * (usage or resource.getrusage(resource.RUSAGE_SELF)).ru_maxrss


def git_commit() -> str:
    """The commit of this checkout, with `-dirty` at its end when files differ from it; `unknown` outside a checkout."""
    with suppress(OSError, subprocess.CalledProcessError):
        describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    return "unknown"
