"""The processor: token counts, the stock path for RGB, holes in depth, saving for stock transformers."""

import json

import numpy as np
import pytest
import torch
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from dataset.inputs.processor import IMAGE_TOKENS, FloatImageProcessor, load_processor
from utils import UserError


@pytest.mark.parametrize(
    ("width", "height", "anyres", "two_tile"),
    [
        (730, 530, 2929, 1261),
        (561, 427, 3039, 1317),
        (640, 480, 2929, 1317),
        (591, 441, 2929, 1317),
        (681, 531, 3039, 1317),
        (1920, 1080, 7269, 1149),
    ],
)
def test_token_counts_of_sun_rgbd_sizes(real_size, width, height, anyres, two_tile):
    """Those of the stock processor with its own grids, and with a grid of one tile."""
    assert real_size.count_image_tokens(height, width, image_tokens="anyres") == anyres
    assert real_size.count_image_tokens(height, width, image_tokens="two_tile") == two_tile
    assert real_size.count_image_tokens(height, width, image_tokens="one_tile") == 730


def test_rgb_takes_the_stock_path(real_size):
    image = np.random.default_rng(0).integers(0, 255, (53, 73, 3), dtype=np.uint8)
    stock = LlavaOnevisionImageProcessorPil(
        size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    expected = stock([[image]], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    assert torch.equal(real_size.pixels([image], image_tokens="anyres")["pixel_values"], expected)
    pair = stock([[image, image[::-1]]], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    assert torch.equal(real_size.pixels([image, image[::-1]], image_tokens="one_tile")["pixel_values"], pair)
    assert torch.equal(real_size.pixels([image], image_tokens="one_tile")["pixel_values"], pair[:1])


def test_two_tiles_are_what_a_grid_of_one_tile_shows(real_size):
    """The stock processor with that grid cuts the same tiles, up to one more resizing."""
    rows, columns = np.mgrid[0:427, 0:561] / 561
    image = np.stack([rows, columns, np.sin(9 * rows)], axis=-1)
    image = np.rint(127.5 + 127.5 * image.clip(-1, 1)).astype(np.uint8)
    stock = LlavaOnevisionImageProcessorPil(
        size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_grid_pinpoints=[[384, 384]]
    )
    expected = stock([[image]], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    ours = real_size.pixels([image], image_tokens="two_tile")
    assert ours["pixel_values"].shape == expected.shape == (1, 2, 3, 384, 384)
    difference = (ours["pixel_values"] - expected).abs()
    assert difference.mean() < 0.01 and difference.quantile(0.99) < 0.05
    assert ours["image_sizes"].tolist() == [[292, 384]]


@pytest.mark.parametrize("image_tokens", ["anyres", "two_tile", "one_tile"])
def test_float_image_agrees_with_eight_bit(real_size, image_tokens):
    """Without holes the float path shows the same picture as the stock one, up to bilinear against bicubic."""
    rows, columns = np.mgrid[0:106, 0:146] / 146
    image = np.stack([rows, columns, (rows + columns) / 2], axis=-1).astype(np.float32)
    stock = real_size.pixels([np.rint(image * 255).astype(np.uint8)], image_tokens=image_tokens)
    ours = real_size.pixels([image], image_tokens=image_tokens)
    assert ours["image_sizes"].tolist() == stock["image_sizes"].tolist()
    assert ours["pixel_values"].shape == stock["pixel_values"].shape
    difference = (ours["pixel_values"] - stock["pixel_values"]).abs()
    assert difference.median() < 0.01 and difference.quantile(0.95) < 0.03


def test_holes_do_not_bleed(real_size):
    """Every resized pixel is either the one true value or a hole; nothing in between."""
    image = np.full((53, 73, 3), 0.7, np.float32)
    image[np.random.default_rng(0).random((53, 73)) < 0.3] = np.nan
    out = real_size.pixels([image], image_tokens="one_tile")["pixel_values"][0, 0, 0]
    rows = slice((384 - 384 * 53 // 73) // 2 + 4, -((384 - 384 * 53 // 73) // 2) - 4)  # without the padding to square
    values = out[rows].unique()
    near = (values - (0.7 * 2 - 1)).abs() < 1e-4
    assert (near | (values == -1)).all() and near.any() and (values == -1).any()


def test_all_holes_stay_finite(real_size):
    image = np.full((53, 73, 3), np.nan, np.float32)
    for mode in IMAGE_TOKENS:
        assert torch.isfinite(real_size.pixels([image], image_tokens=mode)["pixel_values"]).all()


def test_save_and_load(processor, tiny_folder):
    loaded = load_processor(str(tiny_folder))
    assert isinstance(loaded.image_processor, FloatImageProcessor)
    image = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    for mode in IMAGE_TOKENS:
        ours, theirs = (p.pixels([image], image_tokens=mode)["pixel_values"] for p in (loaded, processor))
        assert torch.equal(ours, theirs)
    text = "Where is the bed?<|im_end|><image>"
    assert loaded.tokenizer(text).input_ids == processor.tokenizer(text).input_ids
    assert loaded.chat_template == processor.chat_template


def test_saved_names_are_the_stock_ones(tiny_folder):
    """With class names of ours, stock AutoProcessor would silently return a bare tokenizer."""
    stored = "".join(path.read_text() for path in tiny_folder.glob("*.json") if "processor" in path.name)
    assert "FloatImageProcessor" not in stored and "ImageTextProcessor" not in stored
    assert '"LlavaOnevisionProcessor"' in stored and '"LlavaOnevisionImageProcessor' in stored
    config = json.loads((tiny_folder / "tokenizer_config.json").read_text())
    assert config["processor_class"] == "LlavaOnevisionProcessor"


def test_folder_without_processor(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        load_processor(str(tmp_path))
