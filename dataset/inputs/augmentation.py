"""Training-time augmentation of registered RGB and depth pictures.

Geometry (crop, roll) is shared, so that the two stay registered; the intrinsics and the tilt are changed with it. Color
jitter is for RGB only, sensor noise and holes are for depth only. There is no flip: it would make every "left" a wrong
answer. The crop is weak, since a stronger one would cut off objects that a question counts.
"""

import numpy as np
from PIL import Image, ImageEnhance

from dataset.sunrgbd.sensor_noise import augment_depth

MIN_CROP_SHARE = 0.94  # of each side
MAX_ROLL_DEGREES = 3.0
JITTER = 0.2  # brightness, contrast and saturation factors are drawn from 1 - JITTER .. 1 + JITTER


def augment(
    rgb: np.ndarray | None,
    depth_m: np.ndarray | None,
    *,
    intrinsics: np.ndarray,
    tilt: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray, np.ndarray]:
    """Augment one frame.

    Args:
        rgb: (H, W, 3) uint8, or None.
        depth_m: (H, W) float32 metres, 0 = no measurement, or None.
        intrinsics: (3, 3) pixels.
        tilt: (3, 3) camera to gravity frame.
        rng: source of all randomness; the geometry is drawn first, so it is the same for RGB, depth or both.

    Returns:
        rgb, depth_m, intrinsics and tilt of the augmented frame.
    """
    height, width = (rgb if depth_m is None else depth_m).shape[:2]
    roll = np.deg2rad(rng.uniform(-MAX_ROLL_DEGREES, MAX_ROLL_DEGREES))
    share = rng.uniform(MIN_CROP_SHARE, 1, size=2)
    crop_h, crop_w = np.maximum(np.rint(share * (height, width)), 1).astype(int)
    top, left = rng.integers(0, (height - crop_h + 1, width - crop_w + 1))
    box = (left, top, left + crop_w, top + crop_h)
    color_rng, depth_rng = rng.spawn(2)
    if rgb is not None:
        rolled = _roll(Image.fromarray(rgb), roll, intrinsics, Image.Resampling.BILINEAR)
        rgb = np.asarray(_jitter(rolled.crop(box), color_rng))
    if depth_m is not None:
        rolled = _roll(Image.fromarray(depth_m), roll, intrinsics, Image.Resampling.NEAREST)
        depth_m = augment_depth(np.asarray(rolled.crop(box)), depth_rng)
    return rgb, depth_m, _cropped(intrinsics, left, top), tilt @ _rotation_z(-roll)


def _roll(image: Image.Image, angle: float, intrinsics: np.ndarray, resample: Image.Resampling) -> Image.Image:
    """Rotate about the principal point, as if the camera rolled by `angle` (radians); z-depth values do not change.

    This takes pixels to be square; in SUN RGB-D fx and fy differ by less than 0.1 %.
    """
    centre = (intrinsics[0, 2], intrinsics[1, 2])
    return image.rotate(-np.rad2deg(angle), resample=resample, center=centre, fillcolor=0)


def _rotation_z(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def _cropped(intrinsics: np.ndarray, left: int, top: int) -> np.ndarray:
    moved = intrinsics.copy()
    moved[0, 2] -= left
    moved[1, 2] -= top
    return moved


def _jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
    return image
