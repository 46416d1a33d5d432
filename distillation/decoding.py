"""Greedy answers to packed questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dataset.inputs.processor import ImageTextProcessor
from dataset.inputs.prompts import PADDING_SEGMENT, PREFIX_SEGMENT, answer_targets, pack_blocks, visible_segments
from distillation.forward import base_model, input_embeddings, states_at, true_columns

Text = Mapping[str, Tensor]


@dataclass(frozen=True)
class Answers:
    """Answers of a batch of packed prompts, all on the model's device."""

    tokens: list[list[list[int]]]  # per row and block: token ids, the end of the turn included when it was reached
    hidden: list[list[Tensor]]  # per row and block: (len(tokens), D), the last hidden states that predict these tokens


def spoken(processor: ImageTextProcessor) -> dict[str, Any]:
    """What a model may say: the tokenizer's tokens but the placeholders of images.

    Returns:
        `vocab_size` and `suppress_tokens`, as the functions below take them.
    """
    return {
        "vocab_size": len(processor.tokenizer),
        "suppress_tokens": (processor.image_token_id, processor.video_token_id),
    }


def end_of_answer(processor: ImageTextProcessor) -> int:
    """The token that ends an answer: the end of a turn, which not every tokenizer names as its end of a text."""
    return processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    text: Text,
    images: Mapping[str, Any],
    *,
    vocab_size: int,
    eos_token_id: int,
    max_new_tokens: int,
    suppress_tokens: Sequence[int] = (),
) -> Answers:
    """Greedy answers of all question blocks of a packed batch; the image prefix is computed once for all of them.

    A step computes blocks that are still open only: short answers do not wait for long ones at full cost. A block that
    has its answer already (labels) keeps it: its hidden states are those of teacher forcing.

    Args:
        model: student or teacher.
        text: a batch of `collate_prompts`, blocks without an answer end where the answer starts.
        images: see `answer_logits`.
        vocab_size: the tokenizer's length.
        eos_token_id: token that ends an answer.
        max_new_tokens: longest answer.
        suppress_tokens: tokens that are no words (image placeholders).
    """
    decoding = prefill(model, text, images)
    return _decode(model, decoding, vocab_size, eos_token_id, max_new_tokens, suppress_tokens)


def _decode(
    model: nn.Module,
    decoding: "Decoding",
    vocab_size: int,
    eos_token_id: int,
    max_new_tokens: int,
    suppress_tokens: Sequence[int],
) -> Answers:
    """Go on with open blocks until each has its answer. Arguments: see `greedy_answers`."""
    for step in range(max_new_tokens):
        logits = word_logits(model, decoding.newest, vocab_size=vocab_size, suppress_tokens=suppress_tokens)
        chosen = logits.argmax(-1)  # (B, open blocks)
        decoding.append(chosen)
        decoding.segments = torch.where(chosen == eos_token_id, PADDING_SEGMENT, decoding.segments)
        is_open = decoding.segments != PADDING_SEGMENT
        if step + 1 == max_new_tokens or not is_open.any():
            break
        decoding.advance(model, chosen, true_columns(is_open))
    return decoding.answers()


def word_logits(model: nn.Module, hidden: Tensor, *, vocab_size: int, suppress_tokens: Sequence[int] = ()) -> Tensor:
    """Last hidden states (..., D) -> next-token logits (..., vocab_size), -inf for tokens that are no words."""
    head = base_model(model).lm_head.weight[:vocab_size].to(hidden.dtype)
    suppressed = head.new_zeros(vocab_size)
    suppressed[list(suppress_tokens)] = -torch.inf
    return hidden @ head.T + suppressed


@torch.no_grad()
def answer_probabilities(
    model: nn.Module, found: Answers, *, vocab_size: int, suppress_tokens: Sequence[int] = ()
) -> list[list[float]]:
    """How probable the model takes its answers to be, by row and block: the product over an answer's tokens.

    Arguments: see `greedy_answers`.
    """
    probabilities = []
    for tokens, hidden in zip(found.tokens, found.hidden, strict=True):
        logits = word_logits(model, torch.cat(hidden), vocab_size=vocab_size, suppress_tokens=suppress_tokens).float()
        chosen = torch.tensor([token for block in tokens for token in block], device=logits.device)
        of_tokens = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
        blocks = of_tokens.cpu().double().split([len(block) for block in tokens])
        probabilities.append([float(block.sum().exp()) for block in blocks])
    return probabilities


@dataclass(frozen=True)
class ImagePrefix:
    """An image that was read once, for any number of questions."""

    cache: DynamicCache  # keys and values of the prefix
    length: int  # of the prefix, in tokens


@torch.no_grad()
def read_prefix(model: nn.Module, input_ids: Tensor, images: Mapping[str, Any]) -> ImagePrefix:
    """Read an image prefix: (1, P) token ids, and the images as for `answer_states`."""
    length = input_ids.shape[1]
    positions = torch.arange(length, device=input_ids.device)[None]
    text = {"position_ids": positions, "attention_mask": positions.new_ones(1, 1, 1, length, dtype=torch.bool)}
    cache = DynamicCache(config=base_model(model).config.text_config)
    states_at(model, input_embeddings(model, input_ids, images), text, positions[:, -1:], cache)
    return ImagePrefix(cache, length)


@torch.no_grad()
def answers_behind(
    model: nn.Module,
    prefix: ImagePrefix,
    blocks: Sequence[list[int]],
    *,
    vocab_size: int,
    eos_token_id: int,
    max_new_tokens: int,
    suppress_tokens: Sequence[int] = (),
) -> Answers:
    """Greedy answers to question blocks behind an image that was read before; the prefix stays as it was.

    Args:
        model: that read the prefix.
        prefix: of `read_prefix`.
        blocks: token ids of each question, up to where its answer starts or somewhere inside the answer.
        vocab_size: as for `greedy_answers`, and the following ones, too.
        eos_token_id: token that ends an answer.
        max_new_tokens: longest answer.
        suppress_tokens: tokens that are no words.

    Returns:
        One row, with a block for each of `blocks`.
    """
    try:
        decoding = _read_blocks(model, prefix, blocks)
        return _decode(model, decoding, vocab_size, eos_token_id, max_new_tokens, suppress_tokens)
    finally:
        prefix.cache.crop(prefix.length - prefix.cache.get_seq_length())


def _read_blocks(model: nn.Module, prefix: ImagePrefix, blocks: Sequence[list[int]]) -> "Decoding":
    packed = pack_blocks([], [(block, []) for block in blocks])
    device = base_model(model).device
    ids, own, positions = (
        torch.tensor(values, device=device)[None] for values in (packed.input_ids, packed.segments, packed.positions)
    )
    segments = torch.cat([own.new_full((1, prefix.length), PREFIX_SEGMENT), own], dim=1)
    causal = own.new_ones(own.shape[1], segments.shape[1], dtype=torch.bool).tril(prefix.length)
    text = {
        "position_ids": positions + prefix.length,
        "attention_mask": (visible_segments(own, segments) & causal)[:, None],
    }
    ends = torch.tensor([len(block) for block in blocks], device=device).cumsum(0)[None] - 1
    newest = states_at(model, input_embeddings(model, ids, {}), text, ends, prefix.cache)
    numbers = torch.arange(1, len(blocks) + 1, device=device)[None]
    return Decoding(
        prefix.cache,
        segments,
        numbers,
        text["position_ids"].gather(1, ends),
        newest,
        [[[] for _ in blocks]],
        [[[] for _ in blocks]],
    )


@dataclass
class Decoding:
    """How far the answers of a batch are. A step reads one token per open block; closed ones are padding.

    Attributes:
        cache: keys and values of all that was read.
        cached_segments: (B, T) the block of every cached position.
        segments: (B, n) the block of every open column; PADDING_SEGMENT = none.
        positions: (B, n) the position id that was read last in each column.
        newest: (B, n, D) last hidden states, which predict each column's next token.
        tokens: per row and block, as in `Answers`.
        hidden: per row and block, the state (D,) that predicts each token.
    """

    cache: DynamicCache
    cached_segments: Tensor
    segments: Tensor
    positions: Tensor
    newest: Tensor
    tokens: list[list[list[int]]]
    hidden: list[list[list[Tensor]]]

    def append(self, chosen: Tensor) -> None:
        """Take up the next token (B, n) of each open block, and the state that predicts it."""
        for row, (ids, segments) in enumerate(zip(chosen.tolist(), self.segments.tolist(), strict=True)):
            for column, (token, segment) in enumerate(zip(ids, segments, strict=True)):
                if segment != PADDING_SEGMENT:
                    self.tokens[row][segment - 1].append(token)
                    self.hidden[row][segment - 1].append(self.newest[row, column])

    def advance(self, model: nn.Module, chosen: Tensor, columns: Tensor) -> None:
        """Read the chosen tokens (B, n) of some columns (B, m), those of open blocks first; the others are dropped."""
        chosen = chosen.gather(1, columns)
        self.segments, self.positions = self.segments.gather(1, columns), self.positions.gather(1, columns) + 1
        self.cached_segments = torch.cat([self.cached_segments, self.segments], dim=1)
        mask = visible_segments(self.segments, self.cached_segments)[:, None]
        text = {"position_ids": self.positions, "attention_mask": mask}
        everywhere = torch.arange(chosen.shape[1], device=chosen.device).expand(len(chosen), -1)
        self.newest = states_at(model, input_embeddings(model, chosen, {}), text, everywhere, self.cache)

    def answers(self) -> Answers:
        """What was decoded."""
        return Answers(self.tokens, [[torch.stack(block) for block in row] for row in self.hidden])


def prefill(model: nn.Module, text: Text, images: Mapping[str, Any]) -> Decoding:
    """Read images and questions. Blocks with labels have their answers already, all others are open."""
    segments, (keep, targets) = text["segments"], answer_targets(text["labels"])
    blocks, last, is_open = open_blocks(segments, keep)
    ends = torch.zeros_like(segments).scatter_add(1, last.clamp(min=0), is_open.long())  # 1 where an open block ends
    asked = true_columns(keep | ends.bool())
    cache = DynamicCache(config=base_model(model).config.text_config)
    found = states_at(model, input_embeddings(model, text["input_ids"], images), text, asked, cache)
    rows = torch.arange(len(segments), device=segments.device)[:, None]
    hidden = found.new_zeros(*keep.shape, found.shape[-1])  # (B, T, D)
    hidden[rows, asked] = found
    decoding = Decoding(
        cache,
        segments,
        torch.where(is_open, blocks, PADDING_SEGMENT),
        text["position_ids"].gather(1, last.clamp(min=0)),
        hidden[rows, last.clamp(min=0)],
        [[[] for _ in range(int(row.max()))] for row in segments],
        [[[] for _ in range(int(row.max()))] for row in segments],
    )
    for (row, position), token in zip(keep.nonzero().tolist(), targets.tolist(), strict=True):
        block = int(segments[row, position]) - 1
        decoding.tokens[row][block].append(token)
        decoding.hidden[row][block].append(hidden[row, position])
    return decoding


def open_blocks(segments: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which blocks still need an answer.

    Args:
        segments: (B, T) the block of every position, from 1.
        keep: (B, T) bool, positions that predict the tokens of answers that are there.

    Returns:
        Numbers of the blocks (n,), from 1; the last position (B, n) of each, -1 where a row has no such block; and
        whether it is open (B, n) bool.
    """
    blocks = torch.arange(1, int(segments.max()) + 1, device=segments.device)
    positions = torch.arange(segments.shape[1], device=segments.device)
    own = segments[:, None] == blocks[:, None]  # (B, n, T)
    last = torch.where(own, positions, -1).amax(-1)
    answered = (own & keep[:, None]).any(-1)
    return blocks, last, (last >= 0) & ~answered
