"""The whole road on a real SUN RGB-D frame: index, questions, one training step, one answer, true token counts."""

import shutil

import pytest
import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from dataset.datamodule import SUNRGBDDataModule
from dataset.inputs.pictures import ImageSettings, load_images
from dataset.questions.csv_data import build_csv_data
from dataset.questions.rows import read_questions
from dataset.sunrgbd.frames import read_frame
from distillation.forward import answer_logits, image_features, use_packed_attention
from distillation.losses import answer_cross_entropy

KV1 = "SUNRGBD/kv1/b3dodata/img_0063"
KV2 = "SUNRGBD/kv2/align_kv2/2014-12-18_11-31-54_260595134347"
NARROW = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)


@pytest.fixture(scope="module")
def root(samples, tmp_path_factory):
    """A data root of its own with the annotated frame and the official split, and its question files."""
    root = tmp_path_factory.mktemp("real")
    for folder in (KV1, "SUNRGBDtoolbox"):
        shutil.copytree(samples / folder, root / folder)
    build_csv_data(root, workers=1, train_per_frame=8)
    return root


@pytest.fixture(scope="module")
def narrow_model(processor):
    """The true 0.5B configuration (grids, tiles, 729 tokens) but for widths, depths and vocabulary."""
    config = LlavaOnevisionConfig(  # its default grids are the published ones
        vision_config=SiglipVisionConfig(
            **NARROW, num_hidden_layers=1, image_size=384, patch_size=14, vision_use_head=False
        ),
        text_config=Qwen2Config(
            **NARROW,
            num_hidden_layers=2,
            num_key_value_heads=1,
            vocab_size=len(processor.tokenizer),
            tie_word_embeddings=True,
        ),
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return use_packed_attention(LlavaOnevisionForConditionalGeneration(config)).train()


def test_questions_of_the_real_frame(root):
    rows = read_questions(root / "SUNRGBD/csv_data/train_dataset.csv", root=root)
    assert len(rows) >= 3 and {row.image_path for row in rows} == {f"{KV1}/image/img_0063.jpg"}
    assert all(row.depth_path == f"{KV1}/depth/img_0063_abs.png" and row.sensor == "kv1" for row in rows)


@pytest.mark.parametrize(("image_tokens", "count"), [("anyres", 3039), ("one_tile", 730)])
def test_a_training_step_on_the_real_frame(root, real_size, narrow_model, image_tokens, count):
    settings = ImageSettings("depth", image_tokens=image_tokens)
    data = SUNRGBDDataModule(root=root, processor=real_size, student=settings, batch_size=2)
    data.val = ()  # the frame is in the official training split
    data.train = data._dataset(data.rows("train"))
    (batch,) = data.train_dataloader()
    assert int((batch["text"]["input_ids"] == real_size.image_token_id).sum()) == count
    logits, targets = answer_logits(
        narrow_model, batch["text"], batch["student_images"], vocab_size=len(real_size.tokenizer)
    )
    loss = answer_cross_entropy(logits=logits, targets=targets)
    loss.backward()
    gradient = narrow_model.model.vision_tower.embeddings.patch_embedding.weight.grad
    assert torch.isfinite(loss) and gradient.abs().sum() > 0


@pytest.mark.parametrize(("path", "count"), [(KV1, 3039), (KV2, 2929)])
def test_model_and_prompt_agree_on_the_tokens(samples, real_size, narrow_model, path, count):
    """What the model makes of the pixels is as long as what the prompt leaves room for, for RGB and depth."""
    for modality in ("rgb", "depth"):
        (picture,) = load_images(read_frame(samples, path), [ImageSettings(modality)])
        assert real_size.count_image_tokens(*picture.shape[:2], image_tokens="anyres") == count
        with torch.no_grad():
            features = image_features(narrow_model, real_size.pixels([picture], image_tokens="anyres"))
        assert [len(tokens) for tokens in features.pooler_output] == [count]
