"""Forward passes and greedy answers: several questions at once, features read back, what the projector reads."""

import numpy as np
import pytest
import torch

from dataset.inputs.pictures import ImageSettings
from dataset.inputs.processor import load_processor
from dataset.inputs.prompts import collate_prompts, pack_questions
from distillation.decoding import greedy_answers
from distillation.forward import answer_logits, image_features, overview_patches, tower_features
from distillation.models import load_model, set_trainable
from tests.helpers.training import data_module


@pytest.mark.parametrize("image_tokens", ["one_tile", "anyres"])
def test_features_read_back_give_the_same_loss_and_gradients(world, tiny_folder, image_tokens):
    model = load_model(str(tiny_folder))
    set_trainable(model, vision=False, projector=True, language=True)
    data = data_module(world, tiny_folder)
    data.student = ImageSettings("depth", image_tokens=image_tokens)
    data.train.student = data.student
    batch = data.collate([data.train[0, i] for i in range(3)])
    images = dict(batch["student_images"])
    pixels = images["pixel_values"]
    seen = {**images, "features": tower_features(model, pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])}
    del seen["pixel_values"]
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for shown in (images, seen):
        logits, targets = answer_logits(model, batch["text"], shown, vocab_size=len(data.processor.tokenizer))
        loss = torch.nn.functional.cross_entropy(logits, targets)
        results.append((loss, torch.autograd.grad(loss, trained, allow_unused=True)))
    (loss, gradients), (cached_loss, cached_gradients) = results
    torch.testing.assert_close(cached_loss, loss, atol=1e-6, rtol=1e-6)
    assert sum(g is not None for g in gradients) == sum(g is not None for g in cached_gradients) > 10
    for gradient, cached in zip(gradients, cached_gradients, strict=True):
        torch.testing.assert_close(cached, gradient, atol=1e-6, rtol=1e-4)


def test_greedy_answers_of_packed_blocks_equal_one_by_one(places, world, tiny_folder):
    """Some blocks have their answer already, rows have different numbers of blocks, answers different lengths."""
    processor, model = load_processor(str(tiny_folder)), load_model(str(tiny_folder)).eval()
    data = data_module(world, tiny_folder)
    groups = [rows for rows in data.val.images if len(rows) > 2][:3]
    groups = [rows[: 3 + i] for i, rows in enumerate(groups)]
    images = data.collate([data.val[0, data.val.images.index(_whole(data, g))] for g in groups])["student_images"]
    n = processor.num_image_tokens + 1
    options = dict(vocab_size=len(processor.tokenizer), eos_token_id=processor.tokenizer.eos_token_id, max_new_tokens=7)

    def ask(questions, answers, pictures):
        prompts = [pack_questions(processor, q, a, n_image_tokens=n) for q, a in zip(questions, answers, strict=True)]
        text = collate_prompts(prompts, pad_token_id=processor.tokenizer.pad_token_id)
        return greedy_answers(model, text, pictures, **options)

    questions = [[row.question for row in rows] for rows in groups]
    gold = [[row.answer if i == 1 else None for i, row in enumerate(rows)] for rows in groups]
    packed = ask(questions, gold, images)
    for i, rows in enumerate(groups):
        picture = {k: v[i : i + 1] if k != "batch_num_images" else v for k, v in images.items()}
        for k in range(len(rows)):
            alone = ask([[questions[i][k]]], [[gold[i][k]]], picture)
            assert packed.tokens[i][k] == alone.tokens[0][0]
            torch.testing.assert_close(packed.hidden[i][k], alone.hidden[0][0], atol=1e-4, rtol=1e-4)
    lengths = {len(tokens) for row in packed.tokens for tokens in row}
    assert len(lengths) > 1 and len({tuple(t) for row in packed.tokens for t in row}) > 3


def _whole(data, rows):
    (found,) = (group for group in data.val.images if group[0].image_path == rows[0].image_path)
    return found


def test_the_tensor_that_the_projector_reads(places, world, tiny_folder, processor):
    """In both ways of cutting a picture: the projected patches are the image tokens that the language model gets."""
    model = load_model(str(tiny_folder)).eval()
    rng = np.random.default_rng(0)
    pictures = [
        rng.integers(0, 255, (100, 180, 3), dtype=np.uint8),
        rng.integers(0, 255, (128, 128, 3), dtype=np.uint8),
    ]
    for mode in ("anyres", "one_tile"):
        images = processor.pixels(pictures, image_tokens=mode)
        features = image_features(model, images)
        patches = overview_patches(model, images, features)
        torch.testing.assert_close(patches, overview_patches(model, images))
        projected = model.model.multi_modal_projector(patches)
        for i in range(2):
            torch.testing.assert_close(projected[i], features.pooler_output[i][:64])
