"""Questions about pictures of noise as batches, and what a model makes of them."""

import numpy as np

from dataset.inputs.prompts import collate_prompts, pack_questions
from distillation.forward import answer_logits
from distillation.losses import answer_cross_entropy

QUESTIONS = ["What color is the chair?", "Where is the bed relative to the table?", "How many beds are there?"]
ANSWERS = ["red", "in front", "two"]


def picture(seed: int, *, width: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (128, width, 3), dtype=np.uint8)


def batch(processor, groups, *, image_tokens="one_tile"):
    """groups: list of (picture, questions, answers)."""
    images = processor.pixels([g[0] for g in groups], image_tokens=image_tokens)
    counts = [processor.count_image_tokens(*g[0].shape[:2], image_tokens=image_tokens) for g in groups]
    prompts = [pack_questions(processor, q, a, n_image_tokens=n) for (_, q, a), n in zip(groups, counts, strict=True)]
    return collate_prompts(prompts, pad_token_id=processor.tokenizer.pad_token_id), images


def loss_and_gradients(model, processor, groups, **options):
    text, images = batch(processor, groups, **options)
    logits, targets = answer_logits(model, text, images, vocab_size=len(processor.tokenizer))
    model.zero_grad()
    loss = answer_cross_entropy(logits=logits, targets=targets) / len(targets)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, logits
