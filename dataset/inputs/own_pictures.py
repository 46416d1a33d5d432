"""A user's own picture of a room: depth in a stated unit, or RGB, with camera and tilt where they are known.

Nothing is guessed in silence. A depth picture does not say its unit, and 2,000 may be two metres in millimetres or a
word of SUN RGB-D; so the unit is stated, and values that make no sense in it are an error that names the unit in which
they would.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.sunrgbd.depth import MAX_DEPTH_M
from dataset.sunrgbd.frames import UNREADABLE, read_rgb
from utils import UserError

DEPTH_UNITS = {  # --depth_format -> what a value is
    "sunrgbd": "16-bit words of SUN RGB-D: millimetres, rotated left by 3 bits",
    "mm": "millimetres",
    "m": "metres",
}
MOST_PIXELS = 50_000_000  # several times what any depth camera records; decoded as float64 they take 0.4 GB
ROOM_M = (0.2, 20.0)  # a room's surfaces are between these distances from a camera in it
FOCAL_SHARE = 0.73  # focal length over width of a Kinect v2 in SUN RGB-D: 529.5 of 730 pixels


@dataclass(frozen=True)
class Camera:
    """How a picture was taken."""

    intrinsics: np.ndarray  # (3, 3), pixels
    tilt: np.ndarray  # (3, 3) rotation, camera to gravity frame
    assumed: tuple[str, ...]  # what was not given, in words


def read_own_depth(path: Path, unit: str) -> np.ndarray:
    """A depth picture of PNG, TIFF or .npy.

    Args:
        path: of the file: one channel of 16 bits or more, or floats.
        unit: a key of `DEPTH_UNITS`.

    Returns:
        (H, W) float32 metres, at most `MAX_DEPTH_M`; 0 = no measurement (0, negative, nan or infinite in the file).

    Raises:
        UserError: unreadable, no depth picture, too large, without any measurement, or of another unit.
    """
    values = _depth_array(path) if path.suffix.lower() == ".npy" else _depth_picture(path)
    if unit == "sunrgbd" and values.dtype.kind not in "iu":
        raise UserError(f"{path}: holds fractions, and --depth_format sunrgbd means 16-bit words; give mm or m")
    depth_m = to_metres(values, unit)
    measured = depth_m[depth_m > 0]
    if not measured.size:
        raise UserError(f"{path}: no pixel has a measurement (all are zero, negative or not finite)")
    if problem := _nonsense(values, unit, measured):
        others = [other for other in DEPTH_UNITS if other != unit and _makes_sense(values, other)]
        advice = " or ".join(f"--depth_format {other}" for other in others)
        raise UserError(f"{path}: {problem}; " + (f"{advice} would fit" if others else "no unit would fit"))
    return np.minimum(depth_m, np.float32(MAX_DEPTH_M))


def to_metres(values: np.ndarray, unit: str) -> np.ndarray:
    """Stored values (H, W) -> float32 metres, 0 where nothing was measured."""
    if unit == "sunrgbd":
        words = values.astype(np.uint16)
        values, unit = (words >> 3) | (words << 13), "mm"
    depth_m = values.astype(np.float32) / np.float32(1000 if unit == "mm" else 1)
    return np.where(np.isfinite(depth_m) & (depth_m > 0), depth_m, np.float32(0))


def _makes_sense(values: np.ndarray, unit: str) -> bool:
    if unit == "sunrgbd" and (values.dtype.kind not in "iu" or values.max() > 65535):
        return False
    depth_m = to_metres(values, unit)
    return not _nonsense(values, unit, depth_m[depth_m > 0])


def _nonsense(values: np.ndarray, unit: str, measured: np.ndarray) -> str | None:
    """Why values cannot be of this unit; None where they can. `measured`: metres where there is a measurement."""
    median = float(np.median(measured))
    if not ROOM_M[0] <= median <= ROOM_M[1]:
        side = "nearer" if median < ROOM_M[0] else "farther"
        return (
            f"read as {DEPTH_UNITS[unit]}, half of its measurements are {side} than {median:,.4g} m, which is no room"
        )
    words = values[values > 0]
    if unit == "mm" and values.dtype.kind in "iu" and not (words % 8).any() and len(np.unique(words)) > 20:
        return (
            "all of its values are multiples of 8, as the words of SUN RGB-D are, and unlike any sensor's millimetres"
        )
    return None


def _depth_picture(path: Path) -> np.ndarray:
    try:
        with _opened(path) as picture:
            picture.load()
            mode, values = picture.mode, np.asarray(picture)
    except (*UNREADABLE, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from error
    if mode not in ("I;16", "I;16B", "I;16L", "I", "F"):
        kind = "an 8-bit" if mode in ("L", "P", "1") else "a color"
        raise UserError(f"{path}: is {kind} picture (mode {mode}); depth needs one channel of 16 bits or more")
    return values


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture of a size that is read; its pixels are not decoded yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_size` says the same as an error
        with Image.open(path) as picture:
            _check_size(path, *picture.size)
            yield picture


def _depth_array(path: Path) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        if values.ndim != 2 or values.dtype.kind not in "iuf":
            raise UserError(
                f"{path}: has shape {values.shape} and type {values.dtype}; depth is (height, width) numbers"
            )
        _check_size(path, values.shape[1], values.shape[0])
        return np.array(values)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as a NumPy array ({error})") from error


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{path}: has {width} x {height} pixels; {MOST_PIXELS:,} are the most that is read, make it smaller"
        )
    if min(width, height) < 8:
        raise UserError(f"{path}: has {width} x {height} pixels, too few to show a room")


def read_own_rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8. Raises UserError: unreadable, too large, or a depth picture."""
    try:
        with _opened(path) as picture:
            mode = picture.mode
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from error
    if mode.startswith(("I", "F")):
        raise UserError(
            f"{path}: is a picture of one 16-bit or float channel (mode {mode}); --rgb needs a color picture"
        )
    return read_rgb(path)


def own_camera(
    width: int,
    height: int,
    *,
    intrinsics: str | None = None,
    tilt: str | None = None,
    focal_share: float | None = None,
    tilt_degrees: float | None = None,
) -> Camera:
    """The camera of a picture of this size.

    Args:
        width: of the picture in pixels.
        height: the same.
        intrinsics: `fx,fy,cx,cy` in pixels, or a file with the nine numbers of the matrix, as SUN RGB-D's
            intrinsics.txt; None = centred, with `focal_share`.
        tilt: degrees by which the camera looks down, or a file with the numbers of the rotation to the gravity frame,
            as SUN RGB-D's extrinsics/*.txt; None = `tilt_degrees`.
        focal_share: focal length over width where `intrinsics` is None; None = `FOCAL_SHARE`.
        tilt_degrees: where `tilt` is None; None = level.

    Raises:
        UserError: malformed.
    """
    assumed = []
    if intrinsics is None:
        share = FOCAL_SHARE if focal_share is None else focal_share
        matrix = np.array([[share * width, 0, width / 2], [0, share * width, height / 2], [0, 0, 1]])
        assumed.append(f"--intrinsics {share * width:.4g},{share * width:.4g},{width / 2:g},{height / 2:g}")
    else:
        matrix = _parse_intrinsics(intrinsics, width, height)
    if tilt is None:
        tilt = f"{tilt_degrees or 0:g}"
        assumed.append(f"--tilt {tilt}")
    rotation = _parse_tilt(tilt)
    return Camera(matrix, rotation, tuple(assumed))


def _parse_intrinsics(text: str, width: int, height: int) -> np.ndarray:
    numbers = _numbers("--intrinsics", text, (4, 9))
    if len(numbers) == 4:
        fx, fy, cx, cy = numbers
        numbers = [fx, 0, cx, 0, fy, cy, 0, 0, 1]
    matrix = np.array(numbers).reshape(3, 3)
    if min(matrix[0, 0], matrix[1, 1]) <= 0 or not 0 < matrix[0, 2] < width or not 0 < matrix[1, 2] < height:
        raise UserError(
            f"--intrinsics {text}: focal lengths {matrix[0, 0]:g} and {matrix[1, 1]:g} must be positive, and the "
            f"center ({matrix[0, 2]:g}, {matrix[1, 2]:g}) inside of the picture of {width} x {height} pixels"
        )
    return matrix


def _parse_tilt(text: str) -> np.ndarray:
    numbers = _numbers("--tilt", text, (1, 9, 12))
    if len(numbers) == 1:
        if abs(numbers[0]) > 90:
            raise UserError(f"--tilt {text}: give between -90 and 90 degrees, above 0 where the camera looks down")
        sine, cosine = np.sin(np.radians(numbers[0])), np.cos(np.radians(numbers[0]))
        return np.array([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]])
    rotation = np.array(numbers).reshape(3, -1)[:, :3]
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=0.01):
        raise UserError(f"--tilt {text}: is no rotation")
    return rotation


def _numbers(flag: str, text: str, counts: tuple[int, ...]) -> list[float]:
    """The numbers in a flag's text, or in the file that it names."""
    try:
        path = Path(text)
        content = path.read_text(encoding="utf-8") if path.is_file() else text
        numbers = [float(number) for number in content.replace(",", " ").split()]
    except (OSError, ValueError):
        numbers = []
    if len(numbers) not in counts or not np.isfinite(numbers).all():
        expected = " or ".join(map(str, counts))
        raise UserError(f"{flag} {text}: expected {expected} numbers, or a file with them")
    return numbers
