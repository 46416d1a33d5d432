"""Depth pictures of SUN RGB-D: 16-bit words <-> metres, and metres -> points."""

from pathlib import Path

import numpy as np
from PIL import Image

from dataset.sunrgbd.frames import UNREADABLE
from utils import UserError

MIN_DEPTH_M, MAX_DEPTH_M = 0.3, 8.0  # range of every encoding; the toolbox clips at 8 m as well


def decode_depth(raw: np.ndarray) -> np.ndarray:
    """SUN RGB-D depth words -> metres. The millimetres are rotated left by 3 bits within 16; 0 means "not measured".

    Args:
        raw: (H, W) uint16, as stored in the PNG.

    Returns:
        (H, W) float32 metres, at most `MAX_DEPTH_M`; 0 = no measurement.

    Source: SUNRGBDtoolbox read3dPoints.m. A plain `>> 3` is wrong beyond 8.191 m, where the top bits wrap around.
    """
    if raw.dtype != np.uint16:
        raise ValueError(f"depth words must be uint16, got {raw.dtype}")
    millimetres = (raw >> 3) | (raw << 13)
    return np.minimum(millimetres.astype(np.float32) / 1000, np.float32(MAX_DEPTH_M))


def encode_sunrgbd(depth_m: np.ndarray) -> np.ndarray:
    """Metres -> SUN RGB-D depth words, the inverse of `decode_depth` below 65.535 m. (H, W) -> (H, W) uint16."""
    millimetres = np.clip(np.rint(depth_m * 1000), 0, 65535).astype(np.uint16)
    return (millimetres << 3) | (millimetres >> 13)


def read_depth(path: Path) -> np.ndarray:
    """Read and decode a SUN RGB-D depth PNG. Returns (H, W) float32 metres, 0 = no measurement.

    Raises:
        UserError: missing, damaged, not 16-bit, or without a single measurement.
    """
    try:
        with Image.open(path) as image:
            image.load()
            mode, raw = image.mode, np.asarray(image)
    except UNREADABLE as error:
        raise UserError(f"{path}: depth image cannot be read ({error})") from error
    # Pillow opens 16-bit grey PNGs as I;16 (older versions as I). A file in another mode holds no 16-bit depth any
    # more.
    if mode not in ("I;16", "I;16B", "I"):
        raise UserError(f"{path}: expected a 16-bit depth PNG, found mode {mode} ({8 * raw.dtype.itemsize}-bit)")
    depth_m = decode_depth(raw.astype(np.uint16))
    if not depth_m.any():
        raise UserError(f"{path}: all depth pixels are zero (no measurement)")
    return depth_m


def unproject(depth_m: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """(H, W) depth -> (H, W, 3) points in the camera frame, metres; nan stays nan."""
    rows, columns = np.indices(depth_m.shape, dtype=np.float32)
    x = (columns - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (rows - intrinsics[1, 2]) / intrinsics[1, 1]
    return np.stack([x * depth_m, y * depth_m, depth_m], axis=-1)
