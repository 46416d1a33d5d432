"""Find the frames of a SUN RGB-D tree: image and depth files, sensor, camera, tilt, scene, official split.

The tree is `ROOT_DATA_DIR/SUNRGBD/<sensor>/<collection>/.../<frame>/`. `xtion/sun3ddata` is two levels deeper than the
other collections, so frames are recognised by their `image/` or `depth/` folder and not by their depth in the tree. The
official split is `ROOT_DATA_DIR/SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat` (Song et al., CVPR 2015);
`official_split.txt.xz` holds the same split for a tree without the toolbox.

Coordinates: the camera frame is x right, y down, z forward, in metres; the gravity frame is the camera frame with the
tilt removed, `p_gravity = tilt @ p_camera`.
"""

import hashlib
import lzma
import os
import re
from bisect import bisect
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.io import loadmat

from utils import UserError, atomic_path

OFFICIAL_LIST = Path(__file__).with_name("official_split.txt.xz")  # made by `write_official_list`
SENSORS = ("kv1", "kv2", "realsense", "xtion")
VAL_SHARE = 0.1  # of the official training half
B3DO_BLOCK = 25  # consecutive numbers that are taken to show one room
UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for a damaged picture
_DAY = re.compile(r"(\d{4})[-_](\d{2})[-_](\d{2})")
_ANCHOR = re.compile(r"(?:^|/)((?:kv1|kv2|realsense|xtion)/.*)$")


@dataclass(frozen=True, eq=False)
class Frame:
    """One RGB-D picture. Paths are relative to `root` (ROOT_DATA_DIR) and use `/`."""

    root: Path
    path: str  # SUNRGBD/kv1/b3dodata/img_0063
    image_path: str
    depth_path: str  # raw depth, 16-bit words
    depth_bfx_path: str | None  # depth with filled holes; 16-bit words as well, but with only some 250 distinct values
    intrinsics: np.ndarray  # (3, 3), pixels of the cropped image
    tilt: np.ndarray  # (3, 3) rotation, camera to gravity frame
    scene: str

    @property
    def sensor(self) -> str:
        """`kv1`, `kv2`, `realsense` or `xtion`."""
        return self.path.split("/")[1]

    @property
    def group(self) -> str:
        """The recording, see `frame_group`."""
        return frame_group(self.path)


def frame_group(path: str) -> str:
    """The recording that a frame belongs to.

    For xtion/sun3ddata this is place and scan, for the rest of xtion, kv2 and realsense the collection's day, for kv1
    the single frame. Frames of one recording may show the same room. Training and validation have no recording in
    common; with the toolbox's own validation frames (--official_val) they share 4 days of kinect2data. The official
    test half and the training half have 55 recordings in common, 44 of them SUN3D scans.
    """
    parts = path.split("/")
    collection, name = "/".join(parts[1:3]), parts[-1]
    if collection == "xtion/sun3ddata":
        return "/".join(parts[1:-1])
    if day := _DAY.search(name):
        return f"{collection}/{day.group(0)}"
    return f"{collection}/{name}"


def find_frames(root: Path) -> tuple[list[Frame], list[tuple[str, str]]]:
    """All usable frames below `root/SUNRGBD`, sorted by path, and the unusable ones with their reasons.

    Returns:
        frames, and `(frame path, reason)` for every folder that looks like a frame but cannot be used.

    Raises:
        UserError: there is no frame at all.
    """
    frames, unusable = [], []
    for folder in _frame_folders(root / "SUNRGBD"):
        path = folder.relative_to(root).as_posix()
        try:
            frames.append(read_frame(root, path))
        except UserError as error:
            unusable.append((path, str(error)))
    if not frames:
        raise UserError(f"no SUN RGB-D frame found below {root / 'SUNRGBD'} ({len(unusable)} unusable folders)")
    return frames, unusable


def _frame_folders(top: Path) -> list[Path]:
    """The folders with an `image/` or `depth/` folder, sorted, each listed once, however many links lead to it.

    Links, which may also form a circle, are followed last, so that a frame is listed under its own path and not under a
    link's.
    """
    found, tops, seen = [], [top], set()
    while tops:
        links = []
        for start in tops:
            for folder, subfolders, _ in os.walk(start):
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    subfolders.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                if not {"image", "depth"}.isdisjoint(subfolders):  # a frame; one that lacks either is unusable
                    subfolders.clear()
                    found.append(Path(folder))
                links += [path for name in subfolders if (path := Path(folder, name)).is_symlink()]
        tops = sorted(links)
    return sorted(found)


def read_frame(root: Path, path: str) -> Frame:
    """The frame in folder `path` (relative to `root`).

    Raises:
        UserError: a file is missing, ambiguous or malformed, or depth has another size than the image; names it.
    """
    folder = root / path
    bfx = folder / "depth_bfx"
    frame = Frame(
        root=root,
        path=path,
        image_path=_only_file(root, folder / "image", (".jpg", ".jpeg", ".png")),
        depth_path=_only_file(root, folder / "depth", (".png",)),
        depth_bfx_path=_only_file(root, bfx, (".png",)) if bfx.is_dir() else None,
        intrinsics=_intrinsics(folder / "intrinsics.txt"),
        tilt=_tilt(folder / "extrinsics"),
        scene=_scene(folder / "scene.txt"),
    )
    _check_sizes(frame)
    return frame


def _check_sizes(frame: Frame) -> None:
    """Image and depth must have the same size, since their pixels correspond. Reads only the headers of the files."""
    image, *depths = (frame.root / path for path in (frame.image_path, frame.depth_path, frame.depth_bfx_path) if path)
    sizes = [picture_size(path) for path in (image, *depths)]
    for path, size in zip(depths, sizes[1:], strict=True):
        if size and sizes[0] and size != sizes[0]:
            found, expected = ("{}x{}".format(*pixels) for pixels in (size, sizes[0]))
            raise UserError(f"{path}: depth is {found} pixels and {image.name} {expected}; they must be registered")


def picture_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a picture; None for a damaged one, which is reported when its pixels are read."""
    with suppress(*UNREADABLE), Image.open(path) as picture:
        return picture.size
    return None


def read_rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8. Raises UserError that names the file when it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except UNREADABLE as error:
        raise UserError(f"{path}: image cannot be read ({error})") from error


def _only_file(root: Path, folder: Path, endings: tuple[str, ...]) -> str:
    # RGB and depth stems differ in b3dodata and sun3ddata, so files are never matched by name.
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in endings) if folder.is_dir() else []
    if len(found) != 1:
        raise UserError(f"{folder}: expected one {'/'.join(endings)} file, found {len(found)}")
    return found[0].relative_to(root).as_posix()


def _matrix(path: Path, rows: int, columns: int) -> np.ndarray:
    try:
        values = np.array(path.read_text(encoding="utf-8").split(), dtype=np.float64).reshape(rows, columns)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected {rows}x{columns} numbers ({error})") from error
    if not np.isfinite(values).all():
        raise UserError(f"{path}: expected {rows}x{columns} numbers, found nan or inf among them")
    return values


def _intrinsics(path: Path) -> np.ndarray:
    intrinsics = _matrix(path, 3, 3)
    if min(intrinsics[0, 0], intrinsics[1, 1]) <= 0:
        raise UserError(f"{path}: focal lengths {intrinsics[0, 0]:g} and {intrinsics[1, 1]:g}; they must be positive")
    return intrinsics


def _tilt(folder: Path) -> np.ndarray:
    """The rotation of the last extrinsics file, which the official reader takes, too; the identity without a file."""
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    return _matrix(files[-1], 3, 4)[:, :3] if files else np.eye(3)


def _scene(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else "idk"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def official_split(root: Path, frames: list[Frame], *, official_val: bool = False) -> dict[str, str]:
    """`frame path -> train | val | test` by `listed_split`, for those of these frames that it lists.

    Raises:
        UserError: as `listed_split`.
    """
    listed = listed_split(root, frames, official_val=official_val).names
    return {frame.path: listed[frame.path] for frame in frames if frame.path in listed}


class ListedSplit(NamedTuple):
    """A split of a whole data set, with frames that may be missing from this disk."""

    names: dict[str, str]  # frame path -> train | val | test
    rule: str  # how training and validation were separated, in words


def listed_split(root: Path, frames: list[Frame], *, official_val: bool = False) -> ListedSplit:
    """The split of the data set that these frames are from.

    SUN RGB-D: test is the official half of the toolbox's allsplit.mat (5,050 frames). Validation is a tenth of the
    other half (5,285) that shares no room with the rest, see `validation_tenth`. Without allsplit.mat the same split is
    read from this repository's list, provided that at least half of the frames are in it. An allsplit.mat of other
    frames, such as the miniature world's, decides on validation itself by its `trainvalsplit`.

    Args:
        root: ROOT_DATA_DIR.
        frames: the frames of this tree.
        official_val: take the toolbox's `trainvalsplit` (2,666 and 2,619 frames) as train and val of SUN RGB-D, too.

    Raises:
        UserError: the file is unreadable, lacks the `trainvalsplit` that `official_val` needs, or is missing from a
            tree of other frames.
    """
    path = root / "SUNRGBDtoolbox" / "traintestSUNRGBD" / "allsplit.mat"
    official = read_official_list()
    if path.exists():
        names = _toolbox_split(path)
    else:
        names = official
        _check_known(path, frames, official)
    toolbox_val = "val" in names.values()
    if official_val and not toolbox_val:
        raise UserError(f"{path}: no trainvalsplit in it, which --official_val asks for; leave that flag out")
    if official_val or (toolbox_val and names.keys() != official.keys()):
        rule = "train and val are those of the toolbox's trainvalsplit"
    else:
        val = validation_tenth([name for name, split in names.items() if split != "test"])
        names = {name: split if split == "test" else "val" if name in val else "train" for name, split in names.items()}
        rule = "val is a tenth of the training half, in whole recordings and rooms"
    return ListedSplit({f"SUNRGBD/{name}": split for name, split in names.items()}, rule)


def _check_known(path: Path, frames: list[Frame], official: dict[str, str]) -> None:
    known = sum(frame.path.removeprefix("SUNRGBD/") in official for frame in frames)
    # Other data sets in this layout reuse names such as kv1/NYUdata/NYU0001, so a few known names prove nothing.
    if 2 * known < len(frames):
        raise UserError(
            f"{path} is missing, and the official split names only {known} of the {len(frames)} frames; "
            "unpack SUNRGBDtoolbox.zip there"
        )


def missing_frames(root: Path, frames: list[Frame], listed: ListedSplit) -> list[str]:
    """Paths of listed frames that are not in the tree, not even as an unusable folder."""
    absent = listed.names.keys() - {frame.path for frame in frames}
    return sorted(path for path in absent if not (root / path).is_dir())


def validation_tenth(training: Collection[str]) -> set[str]:
    """The frames to validate on: whole rooms (`frame_rooms`), as near to a tenth of each sensor as its rooms allow.

    Rooms are tried in the order of a hash of their names. First, every collection takes each room that still fits into
    its tenth. Then every sensor does the same, since some collections have no room that is small enough, and takes one
    more room when that brings it nearer to its tenth. Rooms that several sensors recorded are never taken. The result
    depends only on `training`.

    Args:
        training: all names of the training half, such as `kv1/b3dodata/img_0063`, also of frames that are not on disk.
    """
    rooms: dict[str, list[str]] = defaultdict(list)
    for name, room in frame_rooms(training).items():
        rooms[room].append(name)
    ordered = [rooms[room] for room in sorted(rooms, key=_hash_share)]
    val: set[str] = set()
    for depth in (2, 1):  # collections, then sensors
        for part in sorted({tuple(name.split("/")[:depth]) for name in training}):
            here = {name for name in training if tuple(name.split("/")[:depth]) == part}
            wanted = VAL_SHARE * len(here) - len(here & val)
            free = [room for room in ordered if here.issuperset(room) and val.isdisjoint(room)]
            for room in free:
                if len(room) <= wanted:
                    val.update(room)
                    wanted -= len(room)
            left = [room for room in free if val.isdisjoint(room)]
            nearest = min(left, key=lambda room: abs(wanted - len(room)), default=[])
            if depth == 1 and abs(wanted - len(nearest)) < wanted:
                val.update(nearest)
    return val


def frame_rooms(training: Collection[str]) -> dict[str, str]:
    """`name -> room` of the training half; frames with the same entry may show one room.

    The data set does not say which room a frame shows (scene.txt has only the kind of room). These groups stand for
    rooms; none of them divides a recording (`frame_group`):

    - xtion/sun3ddata: the place, with all of its scans.
    - Frames named by a date (kv2, realsense, xtion_align_data): the day, in all collections. On 2014-12-18 align_kv2,
      xtion_align_data and realsense/shr were recorded side by side.
    - kv1/NYUdata: consecutive numbers of the training half. NYUv2 is numbered scene by scene and was divided into
      training and test by scene (Silberman et al., ECCV 2012), so the numbers between two test frames are whole scenes.
    - kv1/b3dodata: `B3DO_BLOCK` consecutive numbers. Its rooms are not known; neighbouring frames probably show one.
    """
    nyu = {number for name in training if (number := _number(name, "kv1/NYUdata/NYU")) is not None}
    firsts, rooms = sorted(number for number in nyu if number - 1 not in nyu), {}
    for name in sorted(training):
        folder = "/".join(name.split("/")[:3])
        if folder.startswith("xtion/sun3ddata/"):
            rooms[name] = folder
        elif day := _DAY.search(name.rsplit("/", 1)[-1]):
            rooms[name] = "-".join(day.groups())
        elif (number := _number(name, "kv1/NYUdata/NYU")) is not None:
            rooms[name] = f"kv1/NYUdata/{firsts[bisect(firsts, number) - 1]}"
        elif (number := _number(name, "kv1/b3dodata/img_")) is not None:
            rooms[name] = f"kv1/b3dodata/{number // B3DO_BLOCK}"
        else:
            rooms[name] = frame_group(f"SUNRGBD/{name}")
    return rooms


def _number(name: str, prefix: str) -> int | None:
    digits = name.removeprefix(prefix)
    return int(digits) if name.startswith(prefix) and digits.isdecimal() else None


def _toolbox_split(path: Path) -> dict[str, str]:
    """`kv1/b3dodata/img_0063 -> train | val | test` of an allsplit.mat; without a `trainvalsplit` no frame is val."""
    try:
        mat = loadmat(path, squeeze_me=True)
        train, test = (_split_paths(mat[key]) for key in ("alltrain", "alltest"))
        val = _split_paths(mat["trainvalsplit"]["val"].item()) if "trainvalsplit" in mat else set()
    except Exception as error:  # the parser raises many kinds for a damaged file: zlib's, numpy's, MatReadError
        raise UserError(
            f"{path}: the official split cannot be read ({error}); unpack SUNRGBDtoolbox.zip there"
        ) from error
    return {name: "val" if name in val else "train" for name in train} | dict.fromkeys(test, "test")


def read_official_list() -> dict[str, str]:
    """The toolbox's split of all 10,335 frames: `kv1/b3dodata/img_0063 -> train | val | test`, by `trainvalsplit`."""
    lines = lzma.decompress(OFFICIAL_LIST.read_bytes()).decode().splitlines()
    return {name: split for split, name in (line.split(" ", 1) for line in lines)}


def write_official_list(allsplit: Path | str, path: Path = OFFICIAL_LIST) -> None:
    """Make this repository's list from the toolbox's allsplit.mat (Song et al., CVPR 2015).

    One line per frame, such as `train kv1/NYUdata/NYU0003`, sorted and compressed: 44 KB. From the root of the
    repository:

        python -c "from dataset.sunrgbd.frames import write_official_list as w; w('path/to/allsplit.mat')"
    """
    lines = sorted(f"{split} {name}\n" for name, split in _toolbox_split(Path(allsplit)).items())
    with atomic_path(path) as part:
        part.write_bytes(lzma.compress("".join(lines).encode(), preset=9))


def _split_paths(cells: np.ndarray) -> set[str]:
    """`/data1/SUNRGBD/kv1//b3dodata/img_0063` -> `kv1/b3dodata/img_0063`, whatever stands in front."""
    paths = (re.sub(r"/+", "/", str(cell)).rstrip("/") for cell in np.atleast_1d(cells))
    return {match.group(1) for path in paths if (match := _ANCHOR.search(path))}


def _hash_share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
