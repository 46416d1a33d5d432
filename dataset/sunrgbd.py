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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

from utils import UserError, atomic_path

OFFICIAL_LIST = Path(__file__).with_name("official_split.txt.xz")  # made by `write_official_list`
SENSORS = ("kv1", "kv2", "realsense", "xtion")
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
        """Frames of one group may show the same room; a split never separates them."""
        return frame_group(self.path)


def frame_group(path: str) -> str:
    """The room or recording that a frame belongs to: place and scan of sun3d, the day of kv2 and realsense, else the frame."""
    parts = path.split("/")
    collection, name = "/".join(parts[1:3]), parts[-1]
    if collection == "xtion/sun3ddata":
        return "/".join(parts[1:-1])
    if day := re.search(r"(\d{4})[-_](\d{2})[-_](\d{2})", name):
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


def _frame_folders(top: Path) -> Iterator[Path]:
    for folder, subfolders, _ in os.walk(top, followlinks=True):
        if "image" in subfolders or "depth" in subfolders:  # without one of them it is a frame, but an unusable one
            subfolders.clear()
            yield Path(folder)
        else:
            subfolders.sort()


def read_frame(root: Path, path: str) -> Frame:
    """The frame in folder `path` (relative to `root`).

    Raises:
        UserError: a file is missing, ambiguous or malformed; names it.
    """
    folder = root / path
    bfx = folder / "depth_bfx"
    return Frame(
        root=root,
        path=path,
        image_path=_only_file(root, folder / "image", (".jpg", ".jpeg", ".png")),
        depth_path=_only_file(root, folder / "depth", (".png",)),
        depth_bfx_path=_only_file(root, bfx, (".png",)) if bfx.is_dir() else None,
        intrinsics=_matrix(folder / "intrinsics.txt", 3, 3),
        tilt=_tilt(folder / "extrinsics"),
        scene=_scene(folder / "scene.txt"),
    )


def read_rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8. Raises UserError that names the file when it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: image cannot be read ({error})") from error


def _only_file(root: Path, folder: Path, endings: tuple[str, ...]) -> str:
    # RGB and depth stems differ in b3dodata and sun3ddata, so files are never matched by name.
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in endings) if folder.is_dir() else []
    if len(found) != 1:
        raise UserError(f"{folder}: expected one {'/'.join(endings)} file, found {len(found)}")
    return found[0].relative_to(root).as_posix()


def _matrix(path: Path, rows: int, columns: int) -> np.ndarray:
    try:
        values = np.array(path.read_text(encoding="utf-8").split(), dtype=np.float64)
        return values.reshape(rows, columns)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected {rows}x{columns} numbers ({error})") from error


def _tilt(folder: Path) -> np.ndarray:
    """The rotation of the last extrinsics file, as the official reader takes it; upright when there is none."""
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    return _matrix(files[-1], 3, 4)[:, :3] if files else np.eye(3)


def _scene(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else "idk"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def official_split(root: Path, frames: list[Frame], *, val_share: float = 0.1) -> dict[str, str]:
    """`frame path -> train | val | test` by the toolbox's allsplit.mat; frames it does not list are left out.

    Train and val are its `trainvalsplit`. Without that variable, a `val_share` of the training groups is cut off by a hash
    of the group's name, so that a room is never in both. A tree without allsplit.mat is split by the list that comes with this
    repository, which is the same one, provided that it is SUN RGB-D: most of its frames have to be in the list.

    Raises:
        UserError: the file is unreadable, or missing from a tree of other frames.
    """
    listed = _listed_split(root, frames, val_share)
    return {frame.path: listed[frame.path] for frame in frames if frame.path in listed}


def missing_frames(root: Path, frames: list[Frame]) -> list[str]:
    """Paths that the official split lists and the tree of these frames does not have, not even as an unusable folder.

    Raises:
        UserError: as `official_split`.
    """
    listed = _listed_split(root, frames, val_share=0.1)
    return sorted(path for path in listed.keys() - {frame.path for frame in frames} if not (root / path).is_dir())


def _listed_split(root: Path, frames: list[Frame], val_share: float) -> dict[str, str]:
    """`frame path -> train | val | test` of all frames that the split of this tree lists."""
    path = root / "SUNRGBDtoolbox" / "traintestSUNRGBD" / "allsplit.mat"
    if path.exists():
        listed = _toolbox_split(path, val_share)
    else:
        listed = read_official_list()
        known = sum(frame.path.removeprefix("SUNRGBD/") in listed for frame in frames)
        # Other data in this layout reuses names such as kv1/NYUdata/NYU0001, so a few that match prove nothing.
        if 2 * known < len(frames):
            raise UserError(
                f"{path} is missing, and the official split names only {known} of the {len(frames)} frames; "
                "unpack SUNRGBDtoolbox.zip there"
            )
    return {f"SUNRGBD/{name}": split for name, split in listed.items()}


def _toolbox_split(path: Path, val_share: float) -> dict[str, str]:
    """`kv1/b3dodata/img_0063 -> train | val | test` of an allsplit.mat."""
    try:
        mat = loadmat(path, squeeze_me=True)
        train, test = (_split_paths(mat[key]) for key in ("alltrain", "alltest"))
        val = _split_paths(mat["trainvalsplit"]["val"].item()) if "trainvalsplit" in mat else None
    except Exception as error:  # a damaged file can end in any error of the parser: zlib's, numpy's, MatReadError
        raise UserError(
            f"{path}: the official split cannot be read ({error}); unpack SUNRGBDtoolbox.zip there"
        ) from error
    if val is None:
        val = {name for name in train if _hash_share(frame_group(f"SUNRGBD/{name}")) < val_share}
    return {name: "val" if name in val else "train" for name in train} | dict.fromkeys(test, "test")


def read_official_list() -> dict[str, str]:
    """The official split of all 10,335 frames: `kv1/b3dodata/img_0063 -> train | val | test`."""
    lines = lzma.decompress(OFFICIAL_LIST.read_bytes()).decode().splitlines()
    return {name: split for split, name in (line.split(" ", 1) for line in lines)}


def write_official_list(allsplit: Path | str, path: Path = OFFICIAL_LIST) -> None:
    """Make the list that comes with this repository from the toolbox's allsplit.mat (Song et al., CVPR 2015).

    One line per frame, such as `train kv1/NYUdata/NYU0003`, sorted and compressed: 44 KB. From the root of the repository:

        python -c "from dataset.sunrgbd import write_official_list; write_official_list('path/to/allsplit.mat')"
    """
    lines = sorted(f"{split} {name}\n" for name, split in _toolbox_split(Path(allsplit), val_share=0).items())
    with atomic_path(path) as part:
        part.write_bytes(lzma.compress("".join(lines).encode(), preset=9))


def _split_paths(cells: np.ndarray) -> set[str]:
    """`/data1/SUNRGBD/kv1//b3dodata/img_0063` -> `kv1/b3dodata/img_0063`, whatever stands in front."""
    paths = (re.sub(r"/+", "/", str(cell)).rstrip("/") for cell in np.atleast_1d(cells))
    return {match.group(1) for path in paths if (match := _ANCHOR.search(path))}


def _hash_share(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
