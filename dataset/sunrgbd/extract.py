"""Unpack the official archives, SUNRGBD.zip and SUNRGBDtoolbox.zip, into the data root.

An archive's table of contents is checked before anything is written: the names (none may lead out of the folder), the
kinds of entries, and the space on the disk. The files are then written into `<root>/.SUNRGBD.part/`, which is renamed
to `<root>/SUNRGBD/` after the last one. The same call continues an interrupted one: files with the right size and
checksum are kept.
"""

import fcntl
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from utils import UNPRINTABLE, UserError, printable, progress

BLOCK = 4096  # bytes: a file takes whole blocks of the disk, which matters when most files are small
CHUNK = 2**20  # bytes read at a time
MOST_FILES = 2_000_000  # far above the data set: 10,335 frames, each a folder of a few dozen files
MOST_LEVELS = 20  # folders in a name; the data set has 8
LONGEST_NAME, LONGEST_PATH = 255, 1000  # bytes of a folder or file, and of all of them: what disks and systems take
# Unpacked size by packed size. Deflate reaches 1,032 with zeros. Measured with zlib: pictures 1.0, the toolbox's small
# .mat files 1.1, annotations 8, on a dozen original frames and on 1,449 that were derived from NYUv2 at half size. Not
# measured: seg.mat, a map of labels. So a file that is small may be anything; many of them are held to the limit of a
# whole archive.
LARGEST_RATIO, SMALL = 100, 2**24
LARGEST_RATIO_IN_ALL, SMALL_IN_ALL = 20, 2**30
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Errors that zipfile raises for a damaged archive, besides OSError.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, LookupError, OverflowError, NotImplementedError,
)  # fmt: skip


def extract_archives(archives: Mapping[str, Path], root: Path) -> None:
    """Unpack zip archives into `root`, each whole or not at all.

    Args:
        archives: name of the folder inside an archive, which will appear in `root` -> path of the archive:
            `{"SUNRGBD": Path("SUNRGBD.zip"), "SUNRGBDtoolbox": Path("SUNRGBDtoolbox.zip")}`. Files outside of that
            folder are left out, as are empty folders and the files that macOS and Windows add (`__MACOSX`,
            `.DS_Store`).
        root: the data root, a folder that exists.

    Raises:
        UserError: a folder of that name exists already; a file is not a zip archive, lacks that folder, is damaged, or
            has an entry that is unsafe, a link, encrypted or there twice; the disk is too full; another process unpacks
            there.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; make it, or correct ROOT_DATA_DIR or --root")
    for top, path in archives.items():
        _refuse_existing(root / top, path)
    with ExitStack() as stack:
        stack.enter_context(_alone_in(root))
        opened = {top: stack.enter_context(_open(path)) for top, path in archives.items()}
        files = {top: _wanted_files(archive, top) for top, archive in opened.items()}
        _check_room(root, archives, files)
        for top, archive in opened.items():
            part = _part(root, top)
            try:
                _unpack(archive, files[top], part)
                os.sync()  # before the rename, so that a power cut cannot leave a complete folder with empty files
                part.rename(root / top)
            except OSError as error:
                raise UserError(f"{part}: {error}; what is unpacked is kept and the same command continues") from error


def _part(root: Path, top: str) -> Path:
    """Where the folder `top` is written until it is complete."""
    return root / f".{top}.part"


def _refuse_existing(target: Path, path: Path) -> None:
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(
            f"{target} is there already: leave out the flag for {path.name} to use it as it is, or move it away "
            "to unpack again"
        )


@contextmanager
def _alone_in(root: Path) -> Iterator[None]:
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{root}: another process is unpacking there; wait until it has finished") from error
        except OSError:
            pass  # some network disks have no locks
        yield
    finally:
        os.close(handle)


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror or error})") from error
    except DAMAGE as error:
        with open(path, "rb") as handle:
            begun = handle.read(4) == b"PK\x03\x04"
        reason = "was not downloaded to its end, or is damaged" if begun else "is not a zip archive"
        raise UserError(f"{path} {reason} ({error}); download it again") from error


def _wanted_files(archive: zipfile.ZipFile, top: str) -> dict[str, zipfile.ZipInfo]:
    """Path below the folder `top` -> entry, for all files to unpack.

    Raises:
        UserError: the archive is not safe to unpack, has no such folder, or holds a file twice.
    """
    files: dict[str, zipfile.ZipInfo] = {}
    beside: Counter = Counter()
    _refuse_bombs(archive)
    for entry in archive.infolist():
        parts = _safe_parts(entry, archive)
        if not parts or entry.is_dir() or _is_junk(parts):
            continue
        if parts[0] != top or len(parts) == 1:
            beside[parts[0]] += 1
            continue
        name = "/".join(parts[1:])
        if name in files:
            raise UserError(f"{archive.filename}: {entry.filename!r} is in it twice; nothing was unpacked")
        files[name] = entry
    if not files:
        found = ", ".join(sorted(beside)[:5]) or "nothing"
        raise UserError(f"{archive.filename}: has no folder {top} but {found}; give the official {top}.zip")
    if beside:
        left_out = ", ".join(sorted(beside)[:5])
        print(printable(f"{archive.filename}: {beside.total()} files beside {top} are left out ({left_out})"))
    if clash := files.keys() & _folders(files):
        raise UserError(f"{archive.filename}: {top}/{min(clash)} is both a file and a folder; nothing was unpacked")
    return files


def _refuse_bombs(archive: zipfile.ZipFile) -> None:
    """Raises UserError for an archive that would unpack to far more than what was packed."""
    entries = archive.infolist()
    packed = sum(entry.compress_size for entry in entries)
    if len(entries) > MOST_FILES:
        reason = f"it has {len(entries):,} files, and no archive of the data set more than {MOST_FILES:,}"
    elif packed > (size := Path(archive.filename).stat().st_size):
        reason = f"its files are said to be {_megabytes(packed)} packed, and the archive has {_megabytes(size)}"
    elif large := [e for e in entries if e.file_size > max(SMALL, LARGEST_RATIO * e.compress_size)]:
        unpacked, ratio = large[0].file_size, large[0].file_size // max(large[0].compress_size, 1)
        reason = (
            f"{large[0].filename!r:.200} would be {_megabytes(unpacked)} unpacked, {ratio} times its packed size; no "
            f"picture or annotation reaches {LARGEST_RATIO}"
        )
    elif (in_all := sum(entry.file_size for entry in entries)) > max(SMALL_IN_ALL, LARGEST_RATIO_IN_ALL * packed):
        reason = f"it would be {_megabytes(in_all)} unpacked, more than {LARGEST_RATIO_IN_ALL} times its size"
    else:
        return
    raise UserError(f"{archive.filename}: refused: {reason}; nothing was unpacked. Is this the official archive?")


def _folders(names: Iterable[str]) -> set[str]:
    """All folders above the files, at any depth."""
    folders: set[str] = set()
    for name in names:
        folder = name.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    return folders


def _safe_parts(entry: zipfile.ZipInfo, archive: zipfile.ZipFile) -> list[str]:
    """The folders and the name of an entry; raises UserError for an entry that is not safe to unpack."""
    name = entry.orig_filename  # `filename` ends at a zero byte
    parts = [part for part in name.split("/") if part not in ("", ".")]
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if name.startswith("/") or ".." in parts or set(name) & set("\\\0") or re.match("[A-Za-z]:", name):
        reason = "its name leads out of the folder"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        reason = "it is a link or a device, not a file"
    elif entry.flag_bits & 1 or entry.compress_type not in METHODS:
        reason = f"it is encrypted or packed with method {entry.compress_type}, which cannot be read"
    elif (
        len(parts) > MOST_LEVELS
        or max(_bytes(part) for part in ("", *parts)) > LONGEST_NAME
        or _bytes(name) > LONGEST_PATH
    ):
        reason = "its name is longer than a disk can take"
    elif UNPRINTABLE.search(name):
        reason = "its name has control characters"
    else:
        return parts
    raise UserError(
        f"{archive.filename}: {name!r:.200} is refused: {reason}; nothing was unpacked. Is this the official archive?"
    )


def _bytes(name: str) -> int:
    return len(name.encode(errors="surrogateescape"))


def _is_junk(parts: list[str]) -> bool:
    """What the file managers of macOS and Windows add; `._0001.jpg` would be a second picture in a frame's folder."""
    return "__MACOSX" in parts or parts[-1] in (".DS_Store", "Thumbs.db") or parts[-1].startswith("._")


def _check_room(root: Path, archives: Mapping[str, Path], files: Mapping[str, Mapping[str, zipfile.ZipInfo]]) -> None:
    """Print how much space each archive needs; raises UserError when the disk cannot hold all of them."""
    missing = 0
    for top, entries in files.items():
        part = _part(root, top)
        here = sum(_on_disk(entry) for name, entry in entries.items() if _has_size(part / name, entry.file_size))
        total = sum(map(_on_disk, entries.values()))
        missing += total - here
        before = f", {_megabytes(here)} of them unpacked before" if here else ""
        print(printable(f"{archives[top]}: {len(entries):,} files, {_megabytes(total)}{before}"))
    free = shutil.disk_usage(root).free
    if missing > free:
        raise UserError(
            f"{root}: {_megabytes(missing)} are needed and {_megabytes(free)} free; make room or use another disk"
        )


def _on_disk(entry: zipfile.ZipInfo) -> int:
    return -(-entry.file_size // BLOCK) * BLOCK


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def _has_size(path: Path, size: int) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def _unpack(archive: zipfile.ZipFile, files: Mapping[str, zipfile.ZipInfo], part: Path) -> None:
    if part.is_symlink() or (part.exists() and not part.is_dir()):
        raise UserError(f"{part}: in the way of unpacking; remove it")
    part.mkdir(exist_ok=True)
    _remove_others(part, files)
    label = f"unpacking {Path(archive.filename).name}, files"
    for name, entry in progress(files.items(), total=len(files), label=label):
        path = part / name
        if not (_has_size(path, entry.file_size) and _crc32(path) == entry.CRC):
            _write(archive, entry, path)


def _remove_others(part: Path, files: Mapping[str, zipfile.ZipInfo]) -> None:
    """Remove files that this archive does not hold: an earlier call with another archive may have written them."""
    for folder, subfolders, names in os.walk(part):
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        for name in names + links:
            path = Path(folder, name)
            if path.is_symlink() or path.relative_to(part).as_posix() not in files:
                path.unlink()


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as handle:
        while chunk := handle.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    """Unpack one file. zipfile reads at most the declared size and checks the checksum at the end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(entry) as packed, open(path, "wb") as target:
            shutil.copyfileobj(packed, target, CHUNK)
            size = target.tell()
        if size != entry.file_size:
            raise EOFError(f"{size} bytes instead of {entry.file_size}")
    except DAMAGE as error:
        raise UserError(
            f"{archive.filename}: {entry.filename} is damaged ({error or 'it ends too early'}); download the archive "
            "again. What is unpacked is kept"
        ) from error
