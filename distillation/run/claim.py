"""One folder, one process that writes into it: a file says whose it is.

The files are `owner-1.json`, `owner-2.json`, ...; the highest number counts. An owner marks its file as released when
it ends. The next one writes a file with the next number, which only one process can do, and then removes older files.
The newest file stays, so nobody can take a folder on the word of a file that has been replaced meanwhile. No file
system locks are used: disks that several machines share may not pass them on.
"""

import atexit
import json
import os
import shutil
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from utils import UserError, process_start, write_json

TOKEN_VARIABLE = "TOKEN_OF_FIRST_PROCESS"
# What torchrun, or else Slurm's srun, tells all processes of one start, and no other start's.
LAUNCH_VARIABLES = (("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"), ("SLURM_JOB_ID", "SLURM_STEP_ID"))
WAIT_FOR_FIRST_S = 300  # its start may be slow where many processes read the same disk
_held: list[tuple[Path, "Owner", tuple[Path, ...]]] = []  # by this process


@dataclass(frozen=True)
class Owner:
    """Who writes into a folder."""

    host: str
    pid: int
    process_start: str  # as the system tells it: a later process with the same number has another one
    token: str  # the processes of one run share it
    since: str
    released: bool = False

    def is_this_process(self) -> bool:
        """Whether this process wrote it."""
        return (self.host, self.pid, self.process_start) == (socket.gethostname(), os.getpid(), process_start())


def claim(folder: Path, *, flag: str, made: tuple[Path, ...] = ()) -> None:
    """Make this process the only one that writes into a folder, until it ends.

    A claim of a process of this machine that no longer runs is taken over.

    Args:
        folder: made if it is not there.
        flag: that chooses another folder, for the message.
        made: folders that this process makes for its run. They are removed when it ends with no checkpoint in `folder`.

    Raises:
        UserError: another process holds it; names the process, and the file to delete where that cannot be looked up.
    """
    me = Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        process_start=process_start(),
        token=_token_of_launcher() or uuid.uuid4().hex,
        since=datetime.now().isoformat(sep=" ", timespec="seconds"),
    )
    while True:
        path, owner = refuse_claimed(folder, flag=flag)
        if owner and owner.is_this_process() and not owner.released:
            return
        path = folder / f"owner-{_number(path) + 1 if path else 1}.json"
        if _write_once(path, me) and newest_owner(folder)[0] == path:
            break
    os.environ[TOKEN_VARIABLE] = me.token  # for the processes that Lightning starts for further devices
    for older in folder.glob("owner-*.json"):
        if _number(older) < _number(path):
            older.unlink(missing_ok=True)
    _held.append((path, me, made))


def refuse_claimed(folder: Path, *, flag: str) -> tuple[Path | None, Owner | None]:
    """Raise UserError where another process holds the folder; return the newest file and owner, as `newest_owner`."""
    path, owner = newest_owner(folder)
    if owner is None or owner.released or owner.is_this_process():
        return path, owner
    whose = f"in use by process {owner.pid} on {owner.host}, since {owner.since}"
    if owner.host != socket.gethostname():
        raise UserError(
            f"{folder}: {whose}; wait for it, or give another {flag}. If that process no longer runs, delete {path}"
        )
    if process_start(owner.pid) == owner.process_start:
        raise UserError(f"{folder}: {whose}; wait for it, or give another {flag}")
    return path, owner


def join(folder: Path) -> None:
    """Wait until the first process of this run has claimed the folder.

    Raises:
        UserError: it has not within `WAIT_FOR_FIRST_S` seconds.
    """
    # Torchrun may have been started by a process that had a run of its own, and inherits that one's token.
    inherited = None if "TORCHELASTIC_RUN_ID" in os.environ else os.environ.get(TOKEN_VARIABLE)
    token, deadline = inherited or _token_of_launcher(), time.monotonic() + WAIT_FOR_FIRST_S
    while True:
        _, owner = newest_owner(folder)
        if owner and owner.token == token:
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder}: the first process of this run has not claimed it in {WAIT_FOR_FIRST_S} s; where this "
                "process is the only one, RANK, LOCAL_RANK and SLURM_PROCID must not be set"
            )
        time.sleep(0.1)


def newest_owner(folder: Path) -> tuple[Path | None, Owner | None]:
    """The file that counts and what it says; None and None where no process ever claimed the folder.

    Raises:
        UserError: the file cannot be read.
    """
    while found := sorted(folder.glob("owner-*.json"), key=_number):
        try:
            return found[-1], Owner(**json.loads(found[-1].read_text(encoding="utf-8")))
        except FileNotFoundError:
            continue  # its run has failed and removed the folder meanwhile
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{found[-1]}: does not say which process writes into this folder ({error}); if none does, delete it"
            ) from error
    return None, None


def _number(path: Path) -> int:
    number = path.stem.removeprefix("owner-")
    return int(number) if number.isdecimal() else 0


def _write_once(path: Path, owner: Owner) -> bool:
    """Write a file that appears whole, unless it is there: then False. Of several processes, one succeeds."""
    whole = path.with_name(f".{path.name}.{owner.host}.{owner.pid}")
    write_json(whole, asdict(owner))
    try:
        os.link(whole, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        with suppress(FileExistsError), open(path, "x", encoding="utf-8") as handle:
            handle.write(whole.read_text(encoding="utf-8"))
            return True
        return False
    finally:
        whole.unlink(missing_ok=True)
    return True


@atexit.register
def release_claims() -> None:
    """Let go of all that this process has claimed, which happens at its end anyway."""
    while _held:
        _release(*_held.pop())


def _release(path: Path, owner: Owner, made: tuple[Path, ...]) -> None:
    """Remove what the owner made if there is no checkpoint in it, and let go of the rest."""
    if os.getpid() != owner.pid or not path.is_file():  # a forked process; a folder that the user has deleted
        return
    with suppress(OSError, UserError):  # a full disk: the claim of a process that is gone can be taken over anyway
        if made and not any(path.parent.glob("*.ckpt")):
            for folder in sorted(made, key=lambda made_folder: made_folder == path.parent):  # the claimed one last
                shutil.rmtree(folder, ignore_errors=True)
        else:
            write_json(path, asdict(replace(owner, released=True)))


def _token_of_launcher() -> str | None:
    for names in LAUNCH_VARIABLES:
        if any(values := [os.environ.get(name, "") for name in names]):
            return "|".join(values)
    return None
