"""Chat prompts, the answer mask, and several questions of one image in one sequence.

A packed sequence is one image prefix followed by K question/answer blocks. A block sees the prefix and itself, never
another block, and its position ids continue from the prefix, so that every block computes exactly what it would compute
as a sequence of its own (tests/dataset/inputs/test_prompts.py compares loss and gradients).

    segment   0 0 0 0 0 0 | 1 1 1 1 2 2 2 2 2         -1 = padding, 0 = image prefix, k = block k
    position  0 1 2 3 4 5 | 6 7 8 9 6 7 8 9 10

    segment   0 0 0 0 -1 -1 | 1 1 1 1 1 -1 -1 -1 -1    another row of the same batch
    position  0 1 2 3  0  0 | 4 5 6 7 8  0  0  0  0

In a batch the prefixes are right-padded to one length, and so are the parts with the blocks, so that all blocks start
at the same column. The prefix, which is nearly the whole sequence, then needs only the causal mask that attention
kernels have built in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dataset.inputs.processor import ImageTextProcessor

IGNORE = -100  # label of a position that is no training target
PADDING_SEGMENT, PREFIX_SEGMENT = -1, 0


@dataclass(frozen=True)
class PackedPrompt:
    """Token ids, labels and segments of one image with its questions, each a list of the same length T."""

    input_ids: list[int]
    labels: list[int]  # the token itself at answer and end-of-turn tokens, IGNORE elsewhere; not shifted
    segments: list[int]
    positions: list[int]


def render_question(processor: ImageTextProcessor, question: str, *, with_image: bool) -> tuple[str, str]:
    """The chat template's text before and after the image placeholder, up to where the answer starts.

    Without an image (a blind model) the first part is what comes before the question.
    """
    content = [{"type": "image"}] * with_image + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    marker = processor.image_token if with_image else question
    head, _, tail = text.partition(marker)
    return (head, tail) if with_image else (head, question + tail)


@lru_cache(maxsize=100_000)
def _tokens(processor: ImageTextProcessor, text: str) -> list[int]:
    """Token ids of a text. Cached, since a question comes in every epoch, and often for several images."""
    return processor.tokenizer(text, add_special_tokens=False).input_ids


@lru_cache(maxsize=100_000)
def question_tokens(processor: ImageTextProcessor, question: str, *, with_image: bool) -> tuple[list[int], list[int]]:
    """Token ids before and after the image placeholders, see `render_question`. Cached, as `_tokens`."""
    head, tail = render_question(processor, question, with_image=with_image)
    return _tokens(processor, head), _tokens(processor, tail)


def pack_questions(
    processor: ImageTextProcessor,
    questions: Sequence[str],
    answers: Sequence[str | Sequence[int] | None] | None,
    *,
    n_image_tokens: int,
) -> PackedPrompt:
    """Token ids and labels of one image prefix with K question/answer blocks behind it.

    Args:
        processor: renders the chat template and tokenizes.
        questions: K >= 1 questions about the image.
        answers: K answers, each a text, token ids (the end of the turn included), or None: a prompt that ends where the
            answer starts; None instead of a list = none of them has an answer.
        n_image_tokens: image placeholders in the prefix; 0 = the model sees no image.
    """
    parts = [question_tokens(processor, question, with_image=n_image_tokens > 0) for question in questions]
    prefix = [*parts[0][0], *[processor.image_token_id] * n_image_tokens]
    eos_token_id = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    blocks = []
    for k, (_, prompt) in enumerate(parts):
        # The answer is tokenized apart from its prompt: no token spans both, as none does when the model generates.
        answer = [] if answers is None or answers[k] is None else answers[k]
        answer = [*_tokens(processor, answer), eos_token_id] if isinstance(answer, str) else list(answer)
        blocks.append((prompt, answer))
    return pack_blocks(prefix, blocks)


def pack_blocks(prefix: Sequence[int], blocks: Sequence[tuple[list[int], list[int]]]) -> PackedPrompt:
    """An image prefix with blocks behind it, each (tokens of a question, tokens of its answer, which may be empty)."""
    ids, labels = list(prefix), [IGNORE] * len(prefix)
    segments, positions = [PREFIX_SEGMENT] * len(prefix), list(range(len(prefix)))
    for k, (prompt, answer) in enumerate(blocks, 1):
        ids += prompt + answer
        labels += [IGNORE] * len(prompt) + answer
        segments += [k] * (len(prompt) + len(answer))
        positions += range(len(prefix), len(prefix) + len(prompt) + len(answer))
    return PackedPrompt(ids, labels, segments, positions)


def collate_prompts(prompts: Sequence[PackedPrompt], *, pad_token_id: int) -> dict[str, Tensor]:
    """Right-pad the prefixes of packed prompts to one length, and the parts with the blocks to another.

    Returns:
        input_ids, position_ids, labels, segments: (B, T) int64; attention_mask: (B, 1, Q, T) bool, True where one of
        the Q columns with blocks may attend to one of all T columns: see `packed_attention_mask`.
    """
    lengths = [prompt.segments.count(PREFIX_SEGMENT) for prompt in prompts]  # of the prefixes
    n_prefix, n_block = max(lengths), max(len(p.input_ids) - n for p, n in zip(prompts, lengths, strict=True))

    def padded(name: str, fill: int) -> Tensor:
        rows = []
        for prompt, length in zip(prompts, lengths, strict=True):
            row = list(getattr(prompt, name))
            prefix, blocks = row[:length], row[length:]
            rows.append(prefix + [fill] * (n_prefix - len(prefix)) + blocks + [fill] * (n_block - len(blocks)))
        return torch.tensor(rows, dtype=torch.long)

    segments = padded("segments", PADDING_SEGMENT)
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "position_ids": padded("positions", 0),
        "labels": padded("labels", IGNORE),
        "segments": segments,
        "attention_mask": packed_attention_mask(segments, n_prefix=n_prefix),
    }


def packed_attention_mask(segments: Tensor, *, n_prefix: int) -> Tensor:
    """Causal within each block; a block sees the prefix; padding sees padding only.

    The mask has no rows for the prefix, which is causal (see `distillation.forward.packed_attention`). The padding of
    the prefix comes after it, so the causal mask hides it from the prefix, and this mask hides it from the blocks.
    Padding behind the blocks sees itself, because in some kernels softmax returns nan for a row that may attend to
    nothing.

    Args:
        segments: (B, T) int64, see the module's drawing.
        n_prefix: columns of the prefix and its padding.

    Returns:
        (B, 1, T - n_prefix, T) bool, True = may attend. For models after `distillation.forward.use_packed_attention`.
    """
    T = segments.shape[1]
    causal = torch.ones(T - n_prefix, T, dtype=torch.bool, device=segments.device).tril(n_prefix)
    return (visible_segments(segments[:, n_prefix:], segments) & causal)[:, None]


def visible_segments(own: Tensor, other: Tensor) -> Tensor:
    """(B, Q), (B, K) segments -> (B, Q, K) bool: a token sees its own block and the prefix, padding sees padding."""
    own, other = own[:, :, None], other[:, None, :]
    return (own == other) | ((other == PREFIX_SEGMENT) & (own != PADDING_SEGMENT))


def answer_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the logits that predict answer tokens are, and what they should predict: labels are shifted here only.

    Args:
        labels: (B, T), IGNORE outside of answers.

    Returns:
        keep (B, T) bool, True at positions whose next token is an answer token; targets (n,) int64, those tokens in
        row-major order. The first token of a block is never an answer token, so no target crosses blocks.
    """
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    keep = shifted != IGNORE
    return keep, shifted[keep]
