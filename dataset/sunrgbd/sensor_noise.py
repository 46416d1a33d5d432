"""Sensor noise and missing measurements on depth in metres, where 0 means "not measured".

Pure functions: each takes depth (H, W) float32 and returns a new array; random numbers come from the numpy Generator
that is passed in. Only `fill_holes` and `hole_filled` give a value to a pixel without measurement. Widths are shares of
the image width, so that frames of 128 and of 640 pixels lose equal shares.
"""

import numpy as np
from scipy import ndimage

JUMP = 0.06  # relative depth step between neighbouring pixels that counts as an object's edge; our choice
FOCAL_PER_WIDTH = 0.93  # focal length over image width of the four sensors, 0.92 to 0.95 in SUN RGB-D's intrinsics
BASELINE_M = 0.075  # between projector and camera of the Kinect v1


def axial_noise(depth_m: np.ndarray, rng: np.random.Generator, *, strength: float = 1.0) -> np.ndarray:
    """Gaussian noise that grows with the square of the distance, sigma = 0.0012 + 0.0019 (z - 0.4)^2 metres.

    Source: Nguyen, Izadi, Lovell 2012, "Modeling Kinect sensor noise", for the Kinect v1 seen head-on; the extra term
    for grazing angles is left out. `strength` scales sigma.
    """
    sigma = strength * (0.0012 + 0.0019 * (depth_m - 0.4) ** 2)
    return _keep_holes(depth_m, depth_m + sigma * rng.standard_normal(depth_m.shape, dtype=np.float32))


def constant_noise(depth_m: np.ndarray, rng: np.random.Generator, *, sigma_m: float) -> np.ndarray:
    """Gaussian noise of the same size at all distances: a first approximation of a time-of-flight camera."""
    return _keep_holes(depth_m, depth_m + np.float32(sigma_m) * rng.standard_normal(depth_m.shape, dtype=np.float32))


def disparity_quantise(depth_m: np.ndarray, rng: np.random.Generator, *, strength: float = 1.0) -> np.ndarray:
    """Whole steps of disparity, z = 351.3 m / round(351.3 m / z): depth steps of 3 mm at 1 m and 46 mm at 4 m.

    The disparity is jittered by 1/6 step before rounding, so that a slanted wall has no clean contour lines. `strength`
    makes the steps coarser.

    Source: the constant and the jitter of https://github.com/ankurhanda/simkinect (after Barron and Malik 2013).
    """
    steps = 351.3 / strength / np.where(depth_m > 0, depth_m, 1)
    steps = np.rint(steps + rng.normal(0, 1 / 6, depth_m.shape))
    return _keep_holes(depth_m, 351.3 / strength / np.maximum(steps, 1))


def contour_shadows(depth_m: np.ndarray) -> np.ndarray:
    """Drop what the projector of a structured-light sensor cannot reach: background just left of a nearer object.

    A pixel lies in shadow when, for some k, the disparity k columns to its right is at least k pixels larger. This
    holds for any projector beside a camera; in the Kinect v1 the shadow is on the left.
    """
    width = depth_m.shape[1]
    disparity = FOCAL_PER_WIDTH * width * BASELINE_M / np.where(depth_m > 0, depth_m, np.inf)
    shadow = np.zeros(depth_m.shape, bool)
    for k in range(1, max(2, width // 16)):
        shadow[:, :-k] |= disparity[:, k:] - disparity[:, :-k] >= k - 0.5
    return np.where(shadow, 0, depth_m).astype(np.float32)


def edge_holes(
    depth_m: np.ndarray, rng: np.random.Generator, *, width: float = 0.008, share: float = 0.5
) -> np.ndarray:
    """Drop a `share` of the pixels closer than `width` (of the image width) to a depth edge."""
    edges = depth_edges(depth_m)
    if not edges.any():  # without edges there is no distance to them
        return depth_m.copy()
    distance = ndimage.distance_transform_edt(~edges)
    lost = (distance <= width * depth_m.shape[1]) & (rng.random(depth_m.shape) < share)
    return np.where(lost, 0, depth_m).astype(np.float32)


def flying_pixels(depth_m: np.ndarray, rng: np.random.Generator, *, share: float = 0.5) -> np.ndarray:
    """Mix fore- and background depth on a `share` of the edge pixels, where a time-of-flight pixel receives both."""
    nearest = ndimage.minimum_filter(np.where(depth_m > 0, depth_m, np.inf), size=3)
    farthest = ndimage.maximum_filter(depth_m, size=3)
    flying = depth_edges(depth_m) & (depth_m > 0) & (rng.random(depth_m.shape) < share)
    mixture = rng.random(depth_m.shape, dtype=np.float32)
    mixed = np.where(flying, nearest, 0) * (1 - mixture) + farthest * mixture
    return np.where(flying, mixed, depth_m).astype(np.float32)


def blob_holes(depth_m: np.ndarray, rng: np.random.Generator, *, share: float, radius: float = 0.03) -> np.ndarray:
    """Drop patches that cover a `share` of the image, as dark or shiny surfaces do; `radius` in image widths."""
    if share <= 0:
        return depth_m.copy()
    field = ndimage.gaussian_filter(rng.standard_normal(depth_m.shape, dtype=np.float32), radius * depth_m.shape[1])
    return np.where(field < np.quantile(field, share), 0, depth_m).astype(np.float32)


def border_holes(depth_m: np.ndarray, rng: np.random.Generator, *, width: float = 0.04) -> np.ndarray:
    """Drop ragged bands of up to `width` (of the image width) at the left, the right and the top."""
    rows, columns = depth_m.shape
    column, row = np.arange(columns)[None], np.arange(rows)[:, None]

    def ragged(length: int) -> np.ndarray:
        return width * columns * rng.random() + rng.normal(0, 0.2 * width * columns, length)

    lost = (
        (column < ragged(rows)[:, None])
        | (columns - 1 - column < ragged(rows)[:, None])
        | (row < ragged(columns)[None])
    )
    return np.where(lost, 0, depth_m).astype(np.float32)


def range_cut(depth_m: np.ndarray, *, min_m: float, max_m: float) -> np.ndarray:
    """Drop what is nearer or farther than the sensor can measure."""
    return np.where((depth_m >= min_m) & (depth_m <= max_m), depth_m, 0).astype(np.float32)


def depth_edges(depth_m: np.ndarray) -> np.ndarray:
    """Pixels on either side of a depth step of more than `JUMP`; holes make no edges. (H, W) bool."""
    edges = np.zeros(depth_m.shape, bool)
    for axis in (0, 1):
        ahead, behind = np.s_[1:, :] if axis == 0 else np.s_[:, 1:], np.s_[:-1, :] if axis == 0 else np.s_[:, :-1]
        a, b = depth_m[ahead], depth_m[behind]
        step = (np.abs(a - b) > JUMP * np.minimum(a, b)) & (a > 0) & (b > 0)
        edges[ahead] |= step
        edges[behind] |= step
    return edges


def sensor_noise(depth_m: np.ndarray, sensor: str, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """What one of the four SUN RGB-D sensors would have measured.

    kv1 and xtion project a pattern: noise and quantisation grow with z^2, and objects cast shadows. kv2 measures
    time of flight: nearly constant noise, and flying pixels at edges. realsense loses large areas and everything
    beyond about 4.5 m. The formulas are those cited at the functions. The shares and widths are our choice: kv1 and
    kv2 lose 10 to 30 % of the pixels with them, close to the real frames (13 to 38 %).

    Args:
        depth_m: (H, W) float32 exact depth.
        sensor: `kv1`, `kv2`, `realsense` or `xtion`.
        rng: source of all randomness.
        strength: scales noise and the area of holes; at 0 the sensor's range, its shadows and its quantisation remain.

    Raises:
        ValueError: unknown sensor.
    """
    if sensor in ("kv1", "xtion"):
        depth_m = contour_shadows(range_cut(depth_m, min_m=0.5, max_m=8.0))
        depth_m = disparity_quantise(axial_noise(depth_m, rng, strength=strength), rng, strength=max(strength, 1.0))
        depth_m = edge_holes(depth_m, rng, share=min(0.5 * strength, 1.0))
        depth_m = blob_holes(depth_m, rng, share=min(strength * rng.uniform(0.02, 0.12), 0.9))
        return border_holes(depth_m, rng, width=strength * (0.06 if sensor == "kv1" else 0.04))
    if sensor == "kv2":
        depth_m = flying_pixels(range_cut(depth_m, min_m=0.5, max_m=8.0), rng, share=min(0.4 * strength, 1.0))
        depth_m = constant_noise(depth_m, rng, sigma_m=0.006 * strength)
        depth_m = edge_holes(depth_m, rng, share=min(0.4 * strength, 1.0))
        depth_m = blob_holes(depth_m, rng, share=min(strength * rng.uniform(0.02, 0.10), 0.9))
        return border_holes(depth_m, rng, width=0.05 * strength)
    if sensor == "realsense":
        depth_m = range_cut(depth_m, min_m=0.3, max_m=4.5)
        depth_m = axial_noise(depth_m, rng, strength=1.5 * strength)
        depth_m = edge_holes(depth_m, rng, width=0.012, share=min(0.5 * strength, 1.0))
        return blob_holes(depth_m, rng, share=min(strength * rng.uniform(0.06, 0.15), 0.9), radius=0.045)
    raise ValueError(f"unknown sensor {sensor!r}: expected kv1, kv2, realsense or xtion")


def augment_depth(depth_m: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Weak noise and small holes of random strength for training, in addition to those of the sensor."""
    depth_m = axial_noise(depth_m, rng, strength=rng.uniform(0, 1))
    depth_m = edge_holes(depth_m, rng, share=rng.uniform(0, 0.4))
    return blob_holes(depth_m, rng, share=rng.uniform(0, 0.08))


def fill_holes(depth_m: np.ndarray) -> np.ndarray:
    """Give every hole the value of the nearest measured pixel.

    Raises:
        ValueError: nothing was measured at all.
    """
    holes = depth_m == 0
    if holes.all():
        raise ValueError("depth without a single measurement cannot be filled")
    nearest = ndimage.distance_transform_edt(holes, return_distances=False, return_indices=True)
    return depth_m[tuple(nearest)]


def hole_filled(depth_m: np.ndarray) -> np.ndarray:
    """The `depth_bfx` picture: holes filled, then 256 equal steps between the frame's nearest and farthest depth.

    The real pictures have 242 to 246 distinct values. Their holes were filled by a cross-bilateral filter; here each
    gets the value of its nearest neighbour.
    """
    filled = fill_holes(depth_m)
    low = filled.min()
    step = max((filled.max() - low) / 255, 1e-4)
    return (low + np.rint((filled - low) / step) * step).astype(np.float32)


def _keep_holes(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    # A measured pixel must not become a hole: 1 mm is the smallest depth above 0 that the 16-bit files can store.
    return np.where(before > 0, np.maximum(after, 0.001), 0).astype(np.float32)
