"""Find the frames of a SUN RGB-D tree: image and depth files, sensor, camera, tilt, scene, official split.

The tree is `ROOT_DATA_DIR/SUNRGBD/<sensor>/<collection>/.../<frame>/`; `xtion/sun3ddata` is two levels deeper than the other
collections, so frames are recognised by their `image/` or `depth/` folder and not by their place in the tree. The official split is
`ROOT_DATA_DIR/SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat` (Song et al., CVPR 2015); `official_split.txt.xz` holds the same
split for a tree without the toolbox.

Coordinates: the camera frame is x right, y down, z forward, in metres; the gravity frame is the camera frame with the tilt
removed, `p_gravity = tilt @ p_camera`.
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
B3DO_BLOCK = 25  # consecutive numbers that are held to be of one room
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
    depth_bfx_path: str | None  # holes filled; 16-bit words as well, but of some 250 distinct levels
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
    """The recording of a frame: place and scan of sun3d, the day of the other xtion, kv2 and realsense, else the frame.

    Frames of one recording may show the same room. Training and validation share none, unless the toolbox's own
    validation frames are asked for: then 4 days of kinect2data. The official test half does share: 55 recordings, 44 of
    them SUN3D scans, have frames in it and in the training half.
    """
    parts = path.split("/")
    collection, name = "/".join(parts[1:3]), parts[-1]
    if collection == "xtion/sun3ddata":
        return "/".join(parts[1:-1])
    if day := _DAY.search(name):
        return f"{collection}/{day.group(0)}"
    return f"{collection}/{name}"


def find_frames(root: Path) -> tuple[list[Frame], list[tuple[str, str]]]:
    """All usable frames below `root/SUNRGBD`, sorted by path, and the unusable ones with the reason.

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
    """The folders that look like a frame, sorted; every real folder once, though links may lead to it or in a circle.

    Links are followed last, so that a frame has its name in the tree and not that of a link to it.
    """
    found, starts, seen = [], [top], set()
    while starts:
        links = []
        for start in starts:
            for folder, subfolders, _ in os.walk(start):
                place = os.stat(folder)
                if (place.st_dev, place.st_ino) in seen:
                    subfolders.clear()
                    continue
                seen.add((place.st_dev, place.st_ino))
                if not {"image", "depth"}.isdisjoint(subfolders):  # a frame; one that lacks either is unusable
                    subfolders.clear()
                    found.append(Path(folder))
                links += [path for name in subfolders if (path := Path(folder, name)).is_symlink()]
        starts = sorted(links)
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
    """Pixels of image and depth belong together by their place. Only the headers of the files are read."""
    image, *depths = (frame.root / path for path in (frame.image_path, frame.depth_path, frame.depth_bfx_path) if path)
    sizes = [_header_size(path) for path in (image, *depths)]
    for path, size in zip(depths, sizes[1:], strict=True):
        if size and sizes[0] and size != sizes[0]:
            found, expected = ("{}x{}".format(*pixels) for pixels in (size, sizes[0]))
            raise UserError(f"{path}: depth is {found} pixels and {image.name} {expected}; they must be registered")


def _header_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a picture; None for a damaged one, of which whoever reads its pixels complains."""
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
    """The rotation of the last extrinsics file, as the official reader takes it; upright when there is none."""
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    return _matrix(files[-1], 3, 4)[:, :3] if files else np.eye(3)


def _scene(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else "idk"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def official_split(root: Path, frames: list[Frame], *, official_val: bool = False) -> dict[str, str]:
    """`frame path -> train | val | test` of these frames by `listed_split`; frames it does not list are left out.

    Raises:
        UserError: as `listed_split`.
    """
    listed = listed_split(root, frames, official_val=official_val).names
    return {frame.path: listed[frame.path] for frame in frames if frame.path in listed}


class ListedSplit(NamedTuple):
    """A split of a whole data set, whatever is on this disk."""

    names: dict[str, str]  # frame path -> train | val | test
    rule: str  # how training and validation were told apart, in words


def listed_split(root: Path, frames: list[Frame], *, official_val: bool = False) -> ListedSplit:
    """The split of the data set that these frames are from.

    SUN RGB-D: test is the official half of the toolbox's allsplit.mat (5,050 frames), validation a tenth of the other
    half (5,285) that shares no room with the rest, see `validation_tenth`. A tree without allsplit.mat is split by the
    list that comes with this repository, which is the same one, provided that most of its frames are in the list. An
    allsplit.mat of other frames, such as the miniature world's, decides on validation itself by its `trainvalsplit`.

    Args:
        root: ROOT_DATA_DIR.
        frames: of this tree.
        official_val: train and val are the toolbox's `trainvalsplit` (2,666 and 2,619 frames) for SUN RGB-D as well.

    Raises:
        UserError: the file is unreadable, lacks a `trainvalsplit` that is asked for, or is missing from a tree of other
            frames.
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
    # Other data in this layout reuses names such as kv1/NYUdata/NYU0001, so a few that match prove nothing.
    if 2 * known < len(frames):
        raise UserError(
            f"{path} is missing, and the official split names only {known} of the {len(frames)} frames; "
            "unpack SUNRGBDtoolbox.zip there"
        )


def missing_frames(root: Path, frames: list[Frame], listed: ListedSplit) -> list[str]:
    """Paths that the split lists and the tree of these frames does not have, not even as an unusable folder."""
    absent = listed.names.keys() - {frame.path for frame in frames}
    return sorted(path for path in absent if not (root / path).is_dir())


def validation_tenth(training: Collection[str]) -> set[str]:
    """The frames to validate on: whole rooms (`frame_rooms`), as near to a tenth of each sensor as its rooms allow.

    Rooms are taken in the order of a hash of their names: first, in every collection, each that still fits into its
    tenth; then the same for sensors, whose collections may have no room that is small enough, and one more room when
    that brings a sensor nearer to its tenth. A room that several sensors saw is never taken. The result depends on
    nothing but `training`.

    Args:
        training: all names of the training half, such as `kv1/b3dodata/img_0063`, whether they are on this disk or not.
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
    """`name -> room` of the training half: what frames that may show one room have in common.

    The data set names few rooms (scene.txt has their kinds). What counts as one, never narrower than `frame_group`:

    - xtion/sun3ddata: the place, with all of its scans.
    - Frames named by a date (kv2, realsense, xtion_align_data): the day, in all collections. On 2014-12-18 align_kv2,
      xtion_align_data and realsense/shr were recorded side by side.
    - kv1/NYUdata: a run of numbers without a gap in the training half. NYUv2 is numbered scene by scene and was divided
      by scene (Silberman et al., ECCV 2012), so that a run between two test frames holds whole scenes.
    - kv1/b3dodata: `B3DO_BLOCK` consecutive numbers. Its rooms are not known; neighbours are likely to show one.
    """
    nyu = {number for name in training if (number := _number(name, "kv1/NYUdata/NYU")) is not None}
    starts, rooms = sorted(number for number in nyu if number - 1 not in nyu), {}
    for name in sorted(training):
        place = "/".join(name.split("/")[:3])
        if place.startswith("xtion/sun3ddata/"):
            rooms[name] = place
        elif day := _DAY.search(name.rsplit("/", 1)[-1]):
            rooms[name] = "-".join(day.groups())
        elif (number := _number(name, "kv1/NYUdata/NYU")) is not None:
            rooms[name] = f"kv1/NYUdata/{starts[bisect(starts, number) - 1]}"
        elif (number := _number(name, "kv1/b3dodata/img_")) is not None:
            rooms[name] = f"kv1/b3dodata/{number // B3DO_BLOCK}"
        else:
            rooms[name] = frame_group(f"SUNRGBD/{name}")
    return rooms


def _number(name: str, prefix: str) -> int | None:
    digits = name.removeprefix(prefix)
    return int(digits) if name.startswith(prefix) and digits.isdecimal() else None


def _toolbox_split(path: Path) -> dict[str, str]:
    """`kv1/b3dodata/img_0063 -> train | val | test` of an allsplit.mat; without a `trainvalsplit` nothing is val."""
    try:
        mat = loadmat(path, squeeze_me=True)
        train, test = (_split_paths(mat[key]) for key in ("alltrain", "alltest"))
        val = _split_paths(mat["trainvalsplit"]["val"].item()) if "trainvalsplit" in mat else set()
    except Exception as error:  # a damaged file can end in any error of the parser: zlib's, numpy's, MatReadError
        raise UserError(
            f"{path}: the official split cannot be read ({error}); unpack SUNRGBDtoolbox.zip there"
        ) from error
    return {name: "val" if name in val else "train" for name in train} | dict.fromkeys(test, "test")


def read_official_list() -> dict[str, str]:
    """The toolbox's split of all 10,335 frames: `kv1/b3dodata/img_0063 -> train | val | test`, by `trainvalsplit`."""
    lines = lzma.decompress(OFFICIAL_LIST.read_bytes()).decode().splitlines()
    return {name: split for split, name in (line.split(" ", 1) for line in lines)}


def write_official_list(allsplit: Path | str, path: Path = OFFICIAL_LIST) -> None:
    """Make the list that comes with this repository from the toolbox's allsplit.mat (Song et al., CVPR 2015).

    One line per frame, such as `train kv1/NYUdata/NYU0003`, sorted and compressed: 44 KB. From the root of the repository:

        python -c "from dataset.sunrgbd import write_official_list; write_official_list('path/to/allsplit.mat')"
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
