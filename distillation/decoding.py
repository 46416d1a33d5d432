"""Greedy answers to packed questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dataset.inputs.prompts import PADDING_SEGMENT, answer_targets, visible_segments
from distillation.forward import base_model, input_embeddings, states_at, true_columns


@dataclass(frozen=True)
class Answers:
    """Answers of a batch of packed prompts, all on the model's device."""

    tokens: list[list[list[int]]]  # per row and block: token ids, the end of the turn included when it was reached
    hidden: list[list[Tensor]]  # per row and block: (len(tokens), D), the last hidden states that predict these tokens


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    text: Mapping[str, Tensor],
    images: Mapping[str, Any],
    *,
    vocab_size: int,
    end_of_turn: int,
    max_new_tokens: int,
    forbidden: Sequence[int] = (),
) -> Answers:
    """Greedy answers of all question blocks of a packed batch at once; the image prefix is computed once for all of them.

    A step computes only blocks that are still open: short answers do not wait for long ones at full cost. A block that already has its answer (labels) keeps it: its hidden states are those of teacher forcing.

    Args:
        model: student or teacher.
        text: a batch of `collate_prompts`, blocks without an answer end where the answer starts.
        images: see `answer_logits`.
        vocab_size: the tokenizer's length.
        end_of_turn: token that ends an answer.
        max_new_tokens: longest answer.
        forbidden: tokens that are no words (image placeholders).
    """
    base = base_model(model)
    head = base.lm_head.weight[:vocab_size]
    barred = torch.zeros(vocab_size, device=head.device)
    barred[list(forbidden)] = -torch.inf

    cache = DynamicCache(config=base.config.text_config)
    cached, (keep, targets) = text["segments"], answer_targets(text["labels"])
    n_rows, n_blocks = len(cached), int(cached.max())
    # One open position per block: the last of a prompt, later the token that was chosen last.
    blocks = torch.arange(1, n_blocks + 1, device=cached.device)
    places = torch.arange(cached.shape[1], device=cached.device)
    own = cached[:, None] == blocks[:, None]  # (B, blocks, T)
    last = torch.where(own, places, -1).amax(-1)  # (B, blocks)
    answered = (own & keep[:, None]).any(-1)
    segments = torch.where((last < 0) | answered, PADDING_SEGMENT, blocks)
    ends = (places == torch.where(segments == PADDING_SEGMENT, -1, last)[..., None]).any(1)  # of open blocks
    rows, asked = torch.arange(n_rows, device=cached.device)[:, None], true_columns(keep | ends)
    found = states_at(model, input_embeddings(model, text["input_ids"], images), text, asked, cache)
    hidden = found.new_zeros(*keep.shape, found.shape[-1])
    hidden[rows, asked] = found
    tokens = [[[] for _ in range(int(row.max()))] for row in cached]
    states = [[[] for _ in row] for row in tokens]
    for (row, place), token in zip(keep.nonzero().tolist(), targets.tolist(), strict=True):
        block = int(cached[row, place]) - 1
        tokens[row][block].append(token)
        states[row][block].append(hidden[row, place])
    newest = hidden[rows, last.clamp(min=0)]  # (B, blocks, D)
    positions = text["position_ids"].gather(1, last.clamp(min=0))
    for step in range(max_new_tokens):
        chosen = (newest @ head.to(newest.dtype).T + barred.to(newest.dtype)).argmax(-1)  # (B, open blocks)
        for row, (ids, owners) in enumerate(zip(chosen.tolist(), segments.tolist(), strict=True)):
            for column, (token, segment) in enumerate(zip(ids, owners, strict=True)):
                if segment != PADDING_SEGMENT:
                    tokens[row][segment - 1].append(token)
                    states[row][segment - 1].append(newest[row, column])
        segments = torch.where(chosen == end_of_turn, PADDING_SEGMENT, segments)
        is_open = segments != PADDING_SEGMENT
        if step + 1 == max_new_tokens or not is_open.any():
            break
        open_first = true_columns(is_open)
        chosen, segments, positions = (values.gather(1, open_first) for values in (chosen, segments, positions + 1))
        cached = torch.cat([cached, segments], dim=1)
        step_text = {"position_ids": positions, "attention_mask": visible_segments(segments, cached)[:, None]}
        everywhere = torch.arange(chosen.shape[1], device=cached.device).expand(n_rows, -1)
        newest = states_at(model, input_embeddings(model, chosen, {}), step_text, everywhere, cache)
    return Answers(tokens, [[torch.stack(block) for block in row] for row in states])
