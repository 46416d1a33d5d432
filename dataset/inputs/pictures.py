"""A frame's files -> a model's input: decoded, encoded, cut into tiles, normalised and, if wanted, cached on disk."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from dataset.inputs.augmentation import augment
from dataset.inputs.degradations import LIGHT_LADDER, Degradation, degrade_depth, degrade_rgb, rng_of
from dataset.inputs.depth_encodings import encode_depth
from dataset.inputs.digests import DIGESTS, PictureDigests
from dataset.inputs.processor import ImageTextProcessor
from dataset.inputs.store import TensorStore
from dataset.sunrgbd.depth import read_depth
from dataset.sunrgbd.frames import Frame, read_rgb
from utils import ROOT, UserError, source_digest

MODALITIES = ("rgb", "depth", "blind")
DEPTH_SOURCES = ("raw", "bfx")
# Files of dataset/sunrgbd/ that no picture depends on: after a change in them, stored pictures and teacher outputs are
# still valid.
OTHER_CODE = ("annotations.py", "build_nouns.py", "extract.py", "nouns.py", "nouns.json", "official_split.txt.xz")


@dataclass(frozen=True)
class ImageSettings:
    """Which input a model gets from a frame. Every checkpoint stores it, so that evaluation uses the same input."""

    modality: str  # one of MODALITIES
    depth_encoding: str = "metric_log3"
    depth_source: str = "raw"  # "raw" with holes, or "bfx", hole-filled (see `Frame`)
    image_tokens: str = "anyres"


@dataclass(frozen=True)
class View:
    """What the sensors gave of one frame."""

    rgb: np.ndarray | None  # (H, W, 3) uint8
    depth_m: np.ndarray | None  # (H, W) float32 metres, 0 = no measurement
    intrinsics: np.ndarray  # (3, 3) pixels
    tilt: np.ndarray  # (3, 3) rotation from the camera to the gravity frame


def load_images(
    frame: Frame, wanted: list[ImageSettings], *, degradation: Degradation | None = None
) -> list[np.ndarray | None]:
    """The pictures of one frame as the models see them.

    Args:
        frame: where the pictures and the camera are.
        wanted: one entry per model (student, teacher).
        degradation: of a worse sensor, the same in every call; None = as recorded.

    Returns:
        Per entry: (H, W, 3) uint8 RGB, float32 encoded depth in [1/255, 1] with nan holes, or None for a blind model.
    """
    view = read_view(frame, wanted)
    if degradation is not None:
        view = degrade(view, degradation, rng_of(frame.path, degradation))
    return [encode_view(view, settings) for settings in wanted]


def read_view(frame: Frame, wanted: list[ImageSettings], *, augment_rng: np.random.Generator | None = None) -> View:
    """Read those pictures of a frame that models with these settings see; `augment_rng`: augment them with it."""
    modalities = {settings.modality for settings in wanted}
    sources = {settings.depth_source for settings in wanted if settings.modality == "depth"}
    rgb = read_rgb(frame.root / frame.image_path) if "rgb" in modalities else None
    depth_m = read_depth(frame.root / _depth_file(frame, sources.pop())) if sources else None
    view = View(rgb, depth_m, frame.intrinsics, frame.tilt)
    if augment_rng is None or modalities == {"blind"}:
        return view
    return View(*augment(rgb, depth_m, intrinsics=frame.intrinsics, tilt=frame.tilt, rng=augment_rng))


def degrade(view: View, degradation: Degradation, rng: np.random.Generator) -> View:
    """What a worse sensor, or one in less light, would have given; pictures that it is not about stay."""
    if degradation.kind in LIGHT_LADDER:
        return view if view.rgb is None else replace(view, rgb=degrade_rgb(view.rgb, degradation, rng))
    if view.depth_m is None:
        return view
    depth_m, tilt = degrade_depth(view.depth_m, view.tilt, degradation, rng)
    return replace(view, depth_m=depth_m, tilt=tilt)


def encode_view(view: View, settings: ImageSettings) -> np.ndarray | None:
    """The picture of one model, as `load_images` returns it."""
    if settings.modality == "depth":
        return encode_depth(view.depth_m, encoding=settings.depth_encoding, intrinsics=view.intrinsics, tilt=view.tilt)
    return view.rgb if settings.modality == "rgb" else None


def _depth_file(frame: Frame, source: str) -> str:
    if source == "raw":
        return frame.depth_path
    if frame.depth_bfx_path is None:
        raise UserError(f"{frame.path}: no depth_bfx picture; use --depth_source raw")
    return frame.depth_bfx_path


def source_path(frame: Frame, settings: ImageSettings) -> str:
    """The picture file that a model with these settings sees, relative to the frame's root."""
    return frame.image_path if settings.modality == "rgb" else _depth_file(frame, settings.depth_source)


def valid_share(depth: np.ndarray, *, grid: int, image_tokens: str) -> np.ndarray:
    """Share of each patch of the overview tile that has a depth measurement: 0 in holes and in padding.

    Args:
        depth: (H, W, C) encoded depth, nan = no measurement; or RGB, which has values everywhere.
        grid: patches per side of the tile.
        image_tokens: "one_tile" pads the picture to a square, the others stretch it.

    Returns:
        (grid * grid,) float32 in [0, 1], row by row.
    """
    valid = np.isfinite(depth[..., 0]).astype(np.float32)
    if image_tokens == "one_tile":
        height, width = valid.shape
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        valid = np.pad(valid, ((top, side - height - top), (left, side - width - left)))
    return np.asarray(Image.fromarray(valid).resize((grid, grid), Image.Resampling.BOX)).reshape(-1)


@dataclass(frozen=True)
class Picture:
    """One frame as the input of a model."""

    tiles: Tensor  # (tiles, 3, S, S) float32 pixels, or (tiles, P, D) vision features of a frozen tower
    size: Tensor  # (2,) int64, height and width that the model is told
    valid_share: Tensor  # (P,) float32 in [0, 1], see the function `valid_share`; ones for RGB


def make_picture(
    image: np.ndarray, processor: ImageTextProcessor, image_tokens: str, *, recorded: np.ndarray | None = None
) -> Picture:
    """An image of `load_images` -> the picture, cut into tiles.

    Args:
        image: what the model sees.
        processor: of the model.
        image_tokens: see `ImageTextProcessor.pixels`.
        recorded: (H, W, 1) with nan where the frame has no depth measurement, where `image` has lost further ones; None
            = `image` tells it.
    """
    grid = math.isqrt(processor.num_image_tokens)
    recorded = image if recorded is None else recorded
    return Picture(
        tiles=processor.tiles(image, image_tokens=image_tokens),
        size=torch.tensor(processor.shown_size(*image.shape[:2], image_tokens=image_tokens)),
        valid_share=torch.tensor(valid_share(recorded, grid=grid, image_tokens=image_tokens)),
    )


def picture_key(processor: ImageTextProcessor, settings: ImageSettings) -> dict[str, Any]:
    """Everything that decides the tiles besides the frame itself."""
    return {
        "settings": asdict(settings),
        "processor": processor.image_processor.to_dict(),
        "image_tokens": processor.num_image_tokens,
        "libraries": [transformers.__version__, Image.__version__, np.__version__],
        "sources": [
            source_digest(ROOT / "dataset" / "inputs"),
            source_digest(ROOT / "dataset" / "sunrgbd", without=OTHER_CODE),
        ],
    }


class PictureCache:
    """Pictures on disk, shared by all processes: the first one that needs a picture computes it.

    A picture's name is a digest of the bytes of the frame's file, of its camera and of everything that turns them into
    tiles.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], settings: ImageSettings) -> None:
        """`key` names all that turns frames into pictures, see `picture_key`; each key has a folder of its own."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self.store, self.settings = TensorStore(folder / digest[:16]), settings
        self.digests = PictureDigests(folder / DIGESTS)

    def get(self, frame: Frame, make: Callable[[], Picture]) -> Picture:
        """The picture of a frame; `make` computes it where it is missing or damaged."""
        picture = self.find(frame)
        if picture is None:
            picture = make()
            self.put(frame, picture)
        return picture

    def find(self, frame: Frame) -> Picture | None:
        """The picture of a frame; None when it is missing or damaged."""
        tensors = self.store.get(self.name(frame))
        return Picture(**tensors) if tensors else None

    def put(self, frame: Frame, picture: Picture) -> None:
        """Store the picture of a frame."""
        self.store.put(self.name(frame), vars(picture))

    def name(self, frame: Frame) -> str:
        """The name of a frame's picture in the store."""
        digest = hashlib.sha256(self.digests.of(frame.root / source_path(frame, self.settings)).encode())
        digest.update(frame.intrinsics.tobytes() + frame.tilt.tobytes())
        return digest.hexdigest()[:32]
