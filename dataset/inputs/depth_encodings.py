"""Depth in metres -> the three channels that a vision tower reads."""

from collections.abc import Callable

import numpy as np
from matplotlib import colormaps
from scipy import ndimage

from dataset.sunrgbd.depth import MAX_DEPTH_M, MIN_DEPTH_M, unproject
from utils import UserError

HEIGHT_RANGE_M = 2.0  # heights are encoded from this far below the camera to this far above it
GRADIENT_SCALE = 0.05  # relative depth change per pixel at which the `seed` encoding's tanh starts to saturate


def encode_depth(depth_m: np.ndarray, *, encoding: str, intrinsics: np.ndarray, tilt: np.ndarray) -> np.ndarray:
    """Three channels for a vision tower that was pretrained on RGB.

    Every encoding has a fixed range in metres and never scales by an image's own minimum and maximum, so that a wall
    three metres away has the same values in every frame.

    Args:
        depth_m: (H, W) float32 metres, 0 = no measurement.
        encoding: a key of `ENCODINGS`.
        intrinsics: (3, 3) of the same image, pixels.
        tilt: (3, 3) rotation from the camera to the gravity frame.

    Returns:
        (H, W, 3) float32 in [1/255, 1]; nan = no measurement. The holes stay nan until the image has been resized (see
        `dataset.inputs.processor`), so that no interpolation mixes them with depth. Then they become 0, a value that no
        measured pixel has in any channel.

    Raises:
        UserError: unknown encoding.
    """
    if encoding not in ENCODINGS:
        raise UserError(f"--depth_encoding {encoding}: choose one of {', '.join(ENCODINGS)}")
    holes = depth_m == 0
    if holes.all():
        return np.full((*depth_m.shape, 3), np.nan, np.float32)
    clipped = np.clip(np.where(holes, np.nan, depth_m), MIN_DEPTH_M, MAX_DEPTH_M)
    channels = (1 + 254 * ENCODINGS[encoding](clipped, intrinsics, tilt).astype(np.float32)) / 255  # 0 is for holes
    channels[holes] = np.nan
    return channels


def surface_normals(points: np.ndarray) -> np.ndarray:
    """(H, W, 3) unit normals of a point image, turned towards the camera.

    Where a neighbour is missing, the normal is the camera's own axis.
    """
    across = _central_difference(points, axis=1)
    down = _central_difference(points, axis=0)
    normals = np.cross(across, down)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        normals = normals / length
    normals = np.where(np.isfinite(normals), normals, np.array([0.0, 0.0, -1.0]))
    return np.where(normals[..., 2:] > 0, -normals, normals)


def _central_difference(values: np.ndarray, *, axis: int) -> np.ndarray:
    pad = [(0, 0)] * values.ndim
    pad[axis] = (1, 1)
    padded = np.pad(values, pad, mode="edge")
    ahead, behind = [slice(None)] * values.ndim, [slice(None)] * values.ndim
    ahead[axis], behind[axis] = slice(2, None), slice(None, -2)
    return padded[tuple(ahead)] - padded[tuple(behind)]


def _log(depth_m: np.ndarray) -> np.ndarray:
    return np.log(depth_m / MIN_DEPTH_M) / np.log(MAX_DEPTH_M / MIN_DEPTH_M)


def _inverse(depth_m: np.ndarray) -> np.ndarray:
    return (1 / depth_m - 1 / MAX_DEPTH_M) / (1 / MIN_DEPTH_M - 1 / MAX_DEPTH_M)


def _repeated(channel: np.ndarray) -> np.ndarray:
    return np.repeat(channel[..., None], 3, axis=-1)


def _metric_log3(depth_m: np.ndarray, intrinsics: np.ndarray, tilt: np.ndarray) -> np.ndarray:
    """Log depth (equal relative resolution), inverse depth (detail nearby), height relative to the camera (floor)."""
    y_down = unproject(depth_m, intrinsics) @ tilt[1].astype(np.float32)
    height = 0.5 - np.clip(y_down / HEIGHT_RANGE_M, -1, 1) / 2
    return np.stack([_log(depth_m), _inverse(depth_m), height], axis=-1)


def _grey(depth_m: np.ndarray, intrinsics: np.ndarray, tilt: np.ndarray) -> np.ndarray:
    return _repeated(depth_m / MAX_DEPTH_M)


def _inverse3(depth_m: np.ndarray, intrinsics: np.ndarray, tilt: np.ndarray) -> np.ndarray:
    return _repeated(_inverse(depth_m))


def _turbo(depth_m: np.ndarray, intrinsics: np.ndarray, tilt: np.ndarray) -> np.ndarray:
    return colormaps["turbo"](_log(depth_m))[..., :3]


def _normals(depth_m: np.ndarray, intrinsics: np.ndarray, tilt: np.ndarray) -> np.ndarray:
    return surface_normals(unproject(depth_m, intrinsics)) / 2 + 0.5


def _hha(depth_m: np.ndarray, intrinsics: np.ndarray, tilt: np.ndarray) -> np.ndarray:
    """Horizontal disparity, height above the lowest surface, angle between normal and gravity (Gupta et al. 2014)."""
    points = unproject(depth_m, intrinsics)
    y_down = points @ tilt[1].astype(np.float32)
    floor = np.nanpercentile(y_down, 99)  # the maximum would be one noisy pixel
    height = np.clip((floor - y_down) / (2 * HEIGHT_RANGE_M), 0, 1)
    upwards = -(surface_normals(points) @ tilt[1])
    return np.stack([_inverse(depth_m), height, np.arccos(np.clip(upwards, -1, 1)) / np.pi], axis=-1)


def _seed(depth_m: np.ndarray, intrinsics: np.ndarray, tilt: np.ndarray) -> np.ndarray:
    """Log depth and the x and y components of its Prewitt gradient.

    The gradient's length is compressed to tanh(length / GRADIENT_SCALE). A channel for its angle would jump at +-pi and
    be undefined where the gradient is zero. Pixels beside a hole have no gradient.
    """
    log_depth = np.log(depth_m)
    gradient = np.stack([ndimage.prewitt(log_depth, axis=a) for a in (1, 0)], axis=-1) / 6  # per pixel
    gradient = np.where(np.isfinite(gradient), gradient, 0)
    length = np.linalg.norm(gradient, axis=-1, keepdims=True)
    vector = gradient / np.maximum(length, 1e-12) * np.tanh(length / GRADIENT_SCALE)
    return np.concatenate([_log(depth_m)[..., None], vector / 2 + 0.5], axis=-1)


ENCODINGS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "metric_log3": _metric_log3,
    "grey": _grey,
    "inverse": _inverse3,
    "turbo": _turbo,
    "normals": _normals,
    "hha": _hha,
    "seed": _seed,
}
