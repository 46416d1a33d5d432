"""Operations at true size: the real configurations on the meta device, counted per answered question."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaOnevisionForConditionalGeneration

from distillation.forward import states_at, use_packed_attention
from distillation.shapes import true_config

QUESTIONS = 4  # per image


def meta_model(size: str) -> LlavaOnevisionForConditionalGeneration:
    """A model of true size without memory for its weights."""
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(true_config(size))
    model.tie_weights()
    return use_packed_attention(model)


def true_flops() -> dict[str, float]:
    """TFLOP per question of a training step at true size, for every variant of `benchmarks.cost`.

    The tower is frozen; an image has 5 tiles, 2,929 tokens and 4 questions. Counted on meta tensors, forward and
    backward. Attention counts as if it were not causal.
    """
    image, block, answer, tiles = 2929, 24, 3, 5
    alone = image + block + answer
    teacher, student = (_Counted(meta_model(size)) for size in ("7b", "0.5b"))
    teacher_vision = teacher.tower(tiles) + teacher.projector(tiles)
    student_tower, student_projector = student.tower(tiles), student.projector(tiles, backward=True)
    everywhere = teacher_vision + teacher.text(alone)
    everywhere += student_tower + student.text(alone, backward=True) + student_projector
    everywhere += teacher.head(alone) + student.head(alone, backward=True)

    def at_answers(questions: int) -> tuple[float, float]:
        """Teacher and student, without the student's tower, for an image with this number of questions."""
        size = dict(n_prefix=image, n_blocks=questions * (block + answer), n_answers=questions * answer)
        return teacher_vision + teacher.answers(**size), student.answers(**size, backward=True) + student_projector

    (teach, learn), packed = at_answers(1), at_answers(QUESTIONS)
    teach_packed, learn_packed = (part / QUESTIONS for part in packed)
    heads = teacher.head(answer) + student.head(answer, backward=True)
    return {
        "original": everywhere,
        "TRL": everywhere,
        "online": teach + student_tower + learn + heads,
        "online packed": teach_packed + student_tower / QUESTIONS + learn_packed + heads,
        "cached": student_tower + learn + heads,
        "packed": student_tower / QUESTIONS + learn_packed + heads,
        "cached vision": learn_packed + heads,
    }


class _Counted:
    """TFLOP of the parts of a model on meta tensors."""

    def __init__(self, model: LlavaOnevisionForConditionalGeneration) -> None:
        self.model, self.width = model, model.config.text_config.hidden_size

    def tower(self, tiles: int) -> float:
        pixels = torch.empty(tiles, 3, 384, 384, device="meta")
        return self._count(lambda: self.model.model.vision_tower(pixels), backward=False)

    def projector(self, tiles: int, *, backward: bool = False) -> float:
        features = torch.empty(tiles, 729, 1152, device="meta")
        return self._count(lambda: self.model.model.multi_modal_projector(features), backward=backward)

    def text(self, n_tokens: int, *, backward: bool = False) -> float:
        # The tokens need a gradient: it goes on into the projector.
        states = torch.empty(1, n_tokens, self.width, device="meta", requires_grad=backward)
        return self._count(lambda: self.model.model.language_model(inputs_embeds=states)[0], backward=backward)

    def answers(self, *, n_prefix: int, n_blocks: int, n_answers: int, backward: bool = False) -> float:
        with torch.device("meta"):
            states = torch.empty(1, n_prefix + n_blocks, self.width, requires_grad=backward)
            positions = torch.empty(1, n_answers, dtype=torch.long)
            text = {
                "position_ids": torch.empty(1, n_prefix + n_blocks, dtype=torch.long),
                "attention_mask": torch.empty(1, 1, n_blocks, n_prefix + n_blocks, dtype=torch.bool),
            }
        return self._count(lambda: states_at(self.model, states, text, positions), backward=backward)

    def head(self, n_tokens: int, *, backward: bool = False) -> float:
        states = torch.empty(1, n_tokens, self.width, device="meta", requires_grad=backward)
        return self._count(lambda: self.model.lm_head(states), backward=backward)

    def _count(self, forward: Callable[[], Any], *, backward: bool) -> float:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            out = forward()
            if backward:
                out.sum().backward()
        return counter.get_total_flops() / 1e12
