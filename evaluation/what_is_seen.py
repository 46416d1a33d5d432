"""A picture as a model sees it: its tiles as the vision tower gets them."""

import numpy as np
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from evaluation.student import Seen, Student


def draw_seen(student: Student, seen: Seen, beside: np.ndarray | None = None) -> Image.Image:
    """Overview tile and close-up tiles side by side, in the three channels that the tower reads; holes are black.

    Args:
        student: that has looked.
        seen: what it looked at.
        beside: (H, W, 3) uint8, a photograph of the same room for people, drawn on the left.
    """
    if seen.image is None:
        parts = [np.zeros((64, 64, 3), dtype=np.uint8)]
    else:
        overview, *close_ups = _tiles(student, seen.image)
        parts = [overview, *([_grid(student, seen.image, close_ups)] if close_ups else [])]
    height = max(part.shape[0] for part in parts)
    pictures = [Image.fromarray(part) for part in ([beside] if beside is not None else []) + parts]
    pictures = [picture.resize((round(picture.width * height / picture.height), height)) for picture in pictures]
    gap = 8
    sheet = Image.new("RGB", (sum(p.width for p in pictures) + gap * (len(pictures) - 1), height), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    return sheet


def _tiles(student: Student, image: np.ndarray) -> list[np.ndarray]:
    """The normalised tiles of the processor as (S, S, 3) uint8."""
    settings = student.processor.image_processor
    mean, std = (np.asarray(values, dtype=np.float32) for values in (settings.image_mean, settings.image_std))
    tiles = student.processor.tiles(image, image_tokens=student.images.image_tokens).numpy().transpose(0, 2, 3, 1)
    return list(np.clip(np.rint((tiles * std + mean) * 255), 0, 255).astype(np.uint8))


def _grid(student: Student, image: np.ndarray, tiles: list[np.ndarray]) -> np.ndarray:
    """Close-up tiles where they lie in the picture."""
    size = student.processor.shown_size(*image.shape[:2], image_tokens=student.images.image_tokens)
    _, width = select_best_resolution(size, student.processor.image_processor.image_grid_pinpoints)
    columns = width // tiles[0].shape[1]
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows)
