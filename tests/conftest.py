"""Fixtures shared by the tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import utils  # first of ours: loads .env before transformers reads it

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # read by torch, and by the commands that tests start
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(utils.available_cores()) // int(workers)))

# isort: split
from pathlib import Path

import pytest

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "samples"


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder with real SUN RGB-D frames; they may not be redistributed, so tests that need them skip without it."""
    if not SAMPLES.is_dir():
        pytest.skip("real SUN RGB-D samples are not on this machine")
    return SAMPLES


@pytest.fixture(scope="session")
def processor():
    """Processor of the miniature kind: byte-level tokenizer, real special tokens and chat template, 128 px."""
    from distillation.miniature.pretrain import build_processor

    return build_processor(["What color is the chair?", "red", "Where is the bed?", "in front", "one", "two"] * 3)


@pytest.fixture(scope="session")
def real_size(processor):
    """The true image settings (384 px, 36 grids, 729 tokens) around the small tokenizer."""
    from dataset.inputs.processor import FloatImageProcessor, ImageTextProcessor

    return ImageTextProcessor(
        image_processor=FloatImageProcessor(
            size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=processor.tokenizer,
        num_image_tokens=729,
        vision_feature_select_strategy="full",
        chat_template=processor.chat_template,
    )


@pytest.fixture(scope="session")
def tiny_folder(processor, tmp_path_factory) -> Path:
    """A random tiny LLaVA-OneVision, saved as a Hugging Face folder."""
    import torch

    from dataset.inputs.processor import save_processor
    from distillation.miniature.pretrain import Size, build_model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = build_model(Size(16, 1, 16, 2, 2), processor)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)  # far from the flat start of training: answers depend on the input
    model.save_pretrained(folder)
    save_processor(processor, folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A small miniature world with its question files: a data root like any other."""
    from dataset.miniature.world import ensure_world

    return ensure_world(tmp_path_factory.mktemp("data") / "world", train=24, val=8, test=8, workers=1)


@pytest.fixture(scope="session")
def tiny_teacher(processor, tmp_path_factory):
    """A random teacher: the student's tower and tokenizer, a wider language model."""
    import torch

    from dataset.inputs.processor import save_processor
    from distillation.miniature.pretrain import Size, build_model

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "teacher"
    model = build_model(Size(16, 1, 24, 2, 2), processor)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
        model.lm_head.weight[processor.tokenizer.eos_token_id] *= 2.5  # some of its answers end, some do not
    model.save_pretrained(folder)
    save_processor(processor, folder)
    return folder


@pytest.fixture
def places(world, tmp_path, monkeypatch):
    """ROOT_DATA_DIR and MAIN_ROOT_DATA_DIR as a user's .env would set them; what runs write is below the latter."""
    monkeypatch.setenv("ROOT_DATA_DIR", str(world))
    monkeypatch.setenv("MAIN_ROOT_DATA_DIR", str(tmp_path / "out"))
    return tmp_path / "out"
