"""A worse sensor, or less light: what a picture loses, by kind and severity.

`DEPTH_LADDER` and `LIGHT_LADDER` are the fixed severities of `evaluation/robustness.py`. Students train with random
severities of the `TRAINED` kinds only (`--depth_degradation`), so the other kinds tell what training for a few of them
is worth for the rest. Random numbers come from the numpy Generator that is passed in. Sizes never change. Widths are
shares of the picture's width, so that pictures of 128 and of 640 pixels lose equal parts.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from dataset.sunrgbd.depth import MAX_DEPTH_M
from dataset.sunrgbd.sensor_noise import axial_noise, blob_holes, depth_edges, disparity_quantise, range_cut

DEPTH_LADDER: dict[str, tuple[float, ...]] = {  # kind -> severities, the mildest first
    "holes": (0.15, 0.30, 0.60),  # share of the picture under round holes, as dark and shiny surfaces leave them
    "resolution": (32, 16, 8),  # measurements across and down the picture
    "range_cut": (5.0, 4.0, 3.0),  # metres that the sensor reaches
    "edge_holes": (0.15, 0.30, 0.60),  # share of the picture, the pixels nearest to depth edges, where there are any
    "border_holes": (0.15, 0.30, 0.60),  # share of the picture, from its left, right and top inwards
    "pixel_holes": (0.15, 0.30, 0.60),  # share of the pixels, each by itself
    "quantisation": (8, 6, 4),  # bits for 8 metres
    "disparity_steps": (4, 8, 16),  # steps of disparity, times those of the Kinect v1
    "noise": (4, 8, 16),  # noise that grows with the squared distance, times that of the Kinect v1
    "edge_jitter": (0.008, 0.016, 0.024),  # of the width: how far pixels are displaced (standard deviation)
    "tilt": (5, 10, 20),  # degrees by which the camera's tilt is misjudged, up or down
    "scale": (0.05, 0.10, 0.20),  # of the distance: how much all distances are too long or too short
    "no_depth": (1,),  # nothing was measured at all
}
EXPOSURES = (1, 1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 1024, 1 / 4096)  # as shares of the right one
LIGHT_LADDER: dict[str, tuple[float, ...]] = {
    "light": EXPOSURES,  # the picture gets dark
    "light_gain": EXPOSURES,  # it is amplified until it is bright again
}
LADDERS = {"depth": DEPTH_LADDER, "rgb": LIGHT_LADDER}  # by what a system sees
TRAINED = ("holes", "resolution", "range_cut")
# Bounds of the random severities in training; those of the ladder lie inside.
HOLE_SHARES, RESOLUTIONS, RANGES_M = (0.05, 0.65), (6, 48), (2.5, 6.0)

# Sony IMX477 of the Raspberry Pi High Quality Camera: saturation and read noise in electrons, the latter by analog
# gain, largest measured gain, bits, black level. Noise is that of a pixel of the picture: there is no mosaic of colors
# and no white balance. Measured in "Pi HQ Cam Sensor Performance", https://www.strollswithmydog.com/tag/level.
FULL_WELL, READ_NOISE, MOST_GAIN, ADC_BITS, BLACK_LEVEL = 8180, {1: 3.0, 16: 1.5}, 16, 12, 256


@dataclass(frozen=True)
class Degradation:
    """What happens to a picture."""

    kind: str  # a key of one of `LADDERS`
    severity: float

    def __str__(self) -> str:
        return f"{self.kind} {self.severity:.3g}" if self.severity else self.kind


def draw_degradation(share: float, rng: np.random.Generator) -> Degradation | None:
    """For training: with probability `share` a degradation of a `TRAINED` kind and of random severity, else None."""
    if rng.random() >= share:
        return None
    kind = TRAINED[rng.integers(len(TRAINED))]
    if kind == "holes":
        return Degradation(kind, rng.uniform(*HOLE_SHARES))
    if kind == "resolution":  # equal steps of the logarithm: from 12 to 6 is as far as from 48 to 24
        return Degradation(kind, round(np.exp(rng.uniform(*np.log(RESOLUTIONS)))))
    return Degradation(kind, rng.uniform(*RANGES_M))


def rng_of(picture: str, degradation: Degradation) -> np.random.Generator:
    """The generator of a picture on the ladder.

    It is the same for every system and for all severities of a kind, so that larger holes contain smaller ones.
    """
    digest = hashlib.sha256(f"{picture} {degradation.kind}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def degrade_depth(
    depth_m: np.ndarray, tilt: np.ndarray, degradation: Degradation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A depth picture of a worse sensor, and the tilt that its camera is thought to have.

    Args:
        depth_m: (H, W) float32 metres, 0 = no measurement.
        tilt: (3, 3) rotation from the camera to the gravity frame.
        degradation: of a kind in `DEPTH_LADDER`.
        rng: source of all randomness.

    Returns:
        Both as they came in, float32 and (3, 3). `resolution` and `edge_jitter` show pixels what lies beside them, so
        small holes may close; all other kinds keep holes. A tilt is read by encodings with height or gravity only.
    """
    if degradation.kind == "tilt":
        return depth_m, tilt @ _pitch(np.radians(degradation.severity) * rng.choice((-1, 1)))
    degraded = DEPTH_KINDS[degradation.kind](depth_m, degradation.severity, rng)
    return degraded.astype(np.float32), tilt


def degrade_rgb(rgb: np.ndarray, degradation: Degradation, rng: np.random.Generator) -> np.ndarray:
    """A photograph taken with less light. (H, W, 3) uint8 -> the same; `degradation` is of a kind in `LIGHT_LADDER`."""
    return _expose(rgb, degradation.severity, rng, gain=degradation.kind == "light_gain")


def _pitch(angle: float) -> np.ndarray:
    """Rotation about the horizontal axis of the picture, radians."""
    sine, cosine = np.sin(angle), np.cos(angle)
    return np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])


def _holes(depth_m: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    return blob_holes(depth_m, rng, share=share)


def _resolution(depth_m: np.ndarray, cells: float, rng: np.random.Generator) -> np.ndarray:
    """One measurement per cell, the mean of its pixels; none where less than half of the cell was measured."""
    height, width = depth_m.shape
    grid = min(int(cells), width), min(int(cells), height)
    measured = _box(np.asarray(depth_m > 0, np.float32), grid)
    mean = _box(depth_m, grid) / np.maximum(measured, 1e-6)
    coarse = Image.fromarray(np.where(measured >= 0.5, mean, 0).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.NEAREST))


def _box(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Means over the cells of a grid."""
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX))


def _range_cut(depth_m: np.ndarray, reach_m: float, rng: np.random.Generator) -> np.ndarray:
    return range_cut(depth_m, min_m=0.0, max_m=reach_m)


def _edge_holes(depth_m: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    edges = depth_edges(depth_m)
    if not edges.any():  # without edges there is no distance to them
        return depth_m
    return _drop_lowest(depth_m, ndimage.distance_transform_edt(~edges) + rng.random(depth_m.shape), share)


def _border_holes(depth_m: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    height, width = depth_m.shape
    columns, rows = np.arange(width)[None], np.arange(height)[:, None]
    ragged = ndimage.gaussian_filter(rng.standard_normal(depth_m.shape), width / 32)
    inwards = np.minimum(np.minimum(columns, width - 1 - columns), rows).astype(float)
    return _drop_lowest(depth_m, inwards + width / 16 * ragged / ragged.std(), share)


def _pixel_holes(depth_m: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    return _drop_lowest(depth_m, rng.random(depth_m.shape), share)


def _drop_lowest(depth_m: np.ndarray, order: np.ndarray, share: float) -> np.ndarray:
    """Lose the share of all pixels where `order` (H, W) is lowest."""
    return np.where(order <= np.quantile(order, share), 0, depth_m)


def _quantisation(depth_m: np.ndarray, bits: float, rng: np.random.Generator) -> np.ndarray:
    step = MAX_DEPTH_M / 2**bits
    return np.where(depth_m > 0, np.maximum(np.rint(depth_m / step), 1) * step, 0)


def _disparity_steps(depth_m: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return disparity_quantise(depth_m, rng, strength=strength)


def _noise(depth_m: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return axial_noise(depth_m, rng, strength=strength)


def _edge_jitter(depth_m: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Every pixel shows what lies a little beside it; only edges look different then."""
    height, width = depth_m.shape
    rows, columns = np.indices(depth_m.shape) + np.rint(share * width * rng.standard_normal((2, height, width)))
    return depth_m[rows.clip(0, height - 1).astype(int), columns.clip(0, width - 1).astype(int)]


def _scale(depth_m: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    return depth_m * np.float32(1 + share * rng.choice((-1, 1)))


def _no_depth(depth_m: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    return np.zeros_like(depth_m)


DEPTH_KINDS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "holes": _holes,
    "resolution": _resolution,
    "range_cut": _range_cut,
    "edge_holes": _edge_holes,
    "border_holes": _border_holes,
    "pixel_holes": _pixel_holes,
    "quantisation": _quantisation,
    "disparity_steps": _disparity_steps,
    "noise": _noise,
    "edge_jitter": _edge_jitter,
    "scale": _scale,
    "no_depth": _no_depth,
}


def read_noise(gain: float) -> float:
    """Read noise in electrons at an analog gain: one part before the amplifier, one behind it, which gain divides."""
    at_one, at_most = READ_NOISE[1] ** 2, READ_NOISE[MOST_GAIN] ** 2
    behind = (at_one - at_most) / (1 - 1 / MOST_GAIN**2)
    return float(np.sqrt(at_one - behind + behind / gain**2))


def _expose(rgb: np.ndarray, exposure: float, rng: np.random.Generator, *, gain: bool) -> np.ndarray:
    """Photons that arrive at random, read noise and whole numbers of the converter, in linear light.

    Without gain the picture gets darker. With gain it is amplified by 1 / exposure: before the converter as far as the
    sensor can, the rest afterwards.

    Source of the model: EMVA Standard 1288, release 3.1, section 2 (https://www.emva.org/standards-technology/emva-1288/).
    """
    analog = min(1 / exposure, MOST_GAIN) if gain else 1.0
    digital = 1 / exposure / analog if gain else 1.0
    white = 2**ADC_BITS - 1 - BLACK_LEVEL  # counted from the black level, below which noise can go
    electrons = rng.poisson(_linear(rgb / 255) * exposure * FULL_WELL) + read_noise(analog) * rng.standard_normal(
        rgb.shape
    )
    codes = np.clip(np.rint(electrons * analog / FULL_WELL * white), -BLACK_LEVEL, white)
    return np.rint(255 * _srgb(np.clip(codes / white * digital, 0, 1))).astype(np.uint8)


def _linear(srgb: np.ndarray) -> np.ndarray:
    """From sRGB values in [0, 1] to light (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _srgb(light: np.ndarray) -> np.ndarray:
    """From light in [0, 1] to sRGB values (IEC 61966-2-1)."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
