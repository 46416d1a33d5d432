"""One image and text processor for RGB and depth: the stock one of LLaVA-OneVision without video, with float images."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from dataset.inputs.model_folder import model_folder
from utils import UserError, read_json, reason, write_json

VIDEO_SETTINGS = (
    "size", "do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
    "do_convert_rgb",
)  # fmt: skip
IMAGE_TOKENS = ("anyres", "two_tile", "one_tile")
MOST_GRIDS, LARGEST_GRID = 100, 10  # ways to cut a picture, tiles per side; LLaVA-OneVision has 36 ways of up to 6


class FloatImageProcessor(LlavaOnevisionImageProcessorPil):
    """The stock image processor (PIL backend on every machine) that also resizes float images with holes.

    An 8-bit image takes the stock path. A float image holds values of 0..255 with nan for holes. It is resized channel
    by channel without mixing holes into depth values, and a target pixel that is mostly hole becomes 0.
    """

    def resize(self, image: np.ndarray, size, resample=None, **kwargs) -> np.ndarray:
        """(C, H, W) -> (C, h, w); see the class."""
        if image.dtype == np.uint8:
            return super().resize(image, size, resample, **kwargs)
        return np.stack([_resize_with_holes(channel, size.height, size.width) for channel in image])


def _resize_with_holes(channel: np.ndarray, height: int, width: int) -> np.ndarray:
    valid = np.isfinite(channel)
    if (height, width) == channel.shape:
        return np.where(valid, channel, np.float32(0))
    # Bilinear (an area average when shrinking) of values and of their validity, then their ratio. Not bicubic: its
    # negative lobes invent depth beside an edge.
    weight, values = (
        np.asarray(Image.fromarray(plane.astype(np.float32)).resize((width, height), PILImageResampling.BILINEAR))
        for plane in (valid, np.where(valid, channel, 0))
    )
    return np.where(weight > 0.5, values / np.maximum(weight, 1e-6), np.float32(0))


class ImageTextProcessor(LlavaOnevisionProcessor):
    """LlavaOnevisionProcessor without its video part, whose import check needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Names of the parts that are loaded and saved."""
        return ["image_processor", "tokenizer"]

    def pixels(self, images: list[np.ndarray], *, image_tokens: str) -> dict[str, torch.Tensor]:
        """The image arguments of the model for a batch with one image per sequence.

        Args:
            images: each (H, W, 3), uint8 RGB or float32 in [0, 1] with nan for holes.
            image_tokens: "anyres" = an overview tile and the tiles of the best-fitting grid; "two_tile" = the same with
                a grid of one tile, into which the picture is shrunk (the model needs no other setting for it);
                "one_tile" = only the image, padded to a square.

        Returns:
            pixel_values (B, tiles, 3, S, S) float32, image_sizes (B, 2) and batch_num_images, which tells the model how
            many tiles to expect.
        """
        tiles = [self.tiles(image, image_tokens=image_tokens) for image in images]
        sizes = [torch.tensor(self.shown_size(*image.shape[:2], image_tokens=image_tokens)) for image in images]
        return self.join(tiles, sizes, image_tokens=image_tokens)

    def tiles(self, image: np.ndarray, *, image_tokens: str) -> torch.Tensor:
        """(tiles, 3, S, S) float32 of one image, see `pixels`."""
        array = image if image.dtype == np.uint8 else image * np.float32(255)
        height, width = self.shown_size(*image.shape[:2], image_tokens=image_tokens)
        if (height, width) != image.shape[:2]:
            size, resample = SizeDict(height=height, width=width), self.image_processor.resample
            array = self.image_processor.resize(array.transpose(2, 0, 1), size, resample).transpose(1, 2, 0)
        # The stock processor makes one tile per image only where a sequence has several images, so it gets this one
        # twice.
        nested = [[array] * (2 if image_tokens == "one_tile" else 1)]
        out = self.image_processor(nested, return_tensors="pt", do_convert_rgb=False, input_data_format="channels_last")
        return out["pixel_values"][0]

    def join(
        self, tiles: list[torch.Tensor], sizes: list[torch.Tensor], *, image_tokens: str
    ) -> dict[str, torch.Tensor]:
        """What `pixels` returns, from the `tiles` and the (height, width) of each image.

        Images with fewer tiles than others are padded with tiles of 0.
        """
        n_images = [max(len(tiles), 2)] if image_tokens == "one_tile" else [1] * len(tiles)
        return {
            "pixel_values": torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True),
            "image_sizes": torch.stack(sizes),
            "batch_num_images": torch.tensor(n_images),
        }

    def shown_size(self, height: int, width: int, *, image_tokens: str) -> tuple[int, int]:
        """(height, width) that the model is told: the picture's own, for "two_tile" shrunk to fit into one tile."""
        if image_tokens != "two_tile":
            return height, width
        tile = self.image_processor.size
        scale = min(tile["height"] / height, tile["width"] / width, 1)
        return max(round(height * scale), 1), max(round(width * scale), 1)

    def count_image_tokens(self, height: int, width: int, *, image_tokens: str) -> int:
        """Placeholders that an image of this size takes in the sequence."""
        if image_tokens == "one_tile":
            return self.num_image_tokens + 1  # the newline
        size = self.image_processor.size
        shown = self.shown_size(height, width, image_tokens=image_tokens)
        return self._get_number_of_features(*shown, size["height"], size["width"])


def load_processor(name: str) -> ImageTextProcessor:
    """The processor of a hub model or a folder.

    Raises:
        UserError: nothing loadable there (see `model_folder`), or the stored settings do not fit LLaVA-OneVision.
    """
    folder = model_folder(name)
    try:
        processor = ImageTextProcessor.from_pretrained(folder, trust_remote_code=False, use_fast=False)
        settings = processor.image_processor.to_dict()
        settings = {key: value for key, value in settings.items() if not key.endswith("_type")}
        processor.image_processor = FloatImageProcessor(**settings)
    except Exception as error:  # a stranger's files end in errors of any kind
        raise UserError(f"{name}: no LLaVA-OneVision processor can be loaded from there ({reason(error)})") from error
    if not processor.num_image_tokens or not processor.chat_template:
        raise UserError(f"{name}: processor_config lacks num_image_tokens or the chat template is missing")
    config = read_json(folder / "config.json")
    for what, fits in (("tokenizer and chat template do", _text_fits), ("image processor does", _tiles_fit)):
        try:
            with np.errstate(all="ignore"):
                if not fits(processor, config):
                    raise ValueError("other sizes")
        except Exception as error:  # of any kind, as above
            raise UserError(f"{name}: its {what} not fit the model of its config.json ({reason(error)})") from error
    return processor


def _text_fits(processor: ImageTextProcessor, config: Mapping[str, Any]) -> bool:
    """Whether the model has all tokens of the tokenizer, and the template a place for the picture."""
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return len(processor.tokenizer) <= config["text_config"]["vocab_size"] and text.count(processor.image_token) == 1


def _tiles_fit(processor: ImageTextProcessor, config: Mapping[str, Any]) -> bool:
    """Whether tiles have the size that the vision tower takes, grids one that fits in memory, and pixels are finite."""
    settings, vision = processor.image_processor, config["vision_config"]
    grids, sizes, side = settings.image_grid_pinpoints, settings.size, vision["image_size"]
    return (
        (sizes["height"], sizes["width"]) == (side, side)
        and processor.num_image_tokens == (side // vision["patch_size"]) ** 2
        and 0 < len(grids) <= MOST_GRIDS
        and all(0 < height <= LARGEST_GRID * side and 0 < width <= LARGEST_GRID * side for height, width in grids)
        and bool(torch.isfinite(processor.tiles(np.zeros((8, 8, 3), np.uint8), image_tokens="one_tile")).all())
    )


def save_processor(processor: ImageTextProcessor, folder: Path) -> None:
    """Write tokenizer, chat template and settings so that stock transformers (and `load_processor`) read them.

    The stored class names are the stock ones: with the names of this module, AutoProcessor would return only the
    tokenizer, without an error.
    """
    processor.save_pretrained(folder)
    for path in folder.glob("*processor_config.json"):
        text = path.read_text(encoding="utf-8")
        text = text.replace("FloatImageProcessor", "LlavaOnevisionImageProcessor")
        text = text.replace("ImageTextProcessor", "LlavaOnevisionProcessor")
        write_json(path, json.loads(text))
    # AutoProcessor asks for this file too (and for torchvision); a video's frames are treated as pictures are.
    settings = processor.image_processor.to_dict()
    video = {name: settings[name] for name in VIDEO_SETTINGS if settings.get(name) is not None}
    video["video_processor_type"] = "LlavaOnevisionVideoProcessor"
    write_json(folder / "video_preprocessor_config.json", video | {"processor_class": "LlavaOnevisionProcessor"})
    path = folder / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"processor_class": "LlavaOnevisionProcessor"})
