"""From a batch to vision features, hidden states and logits at answer positions.

The only file that knows where things are in the model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, rotate_half

from dataset.inputs.prompts import answer_targets
from utils import UserError

PACKED_ATTENTION = "packed_sdpa"


def use_packed_attention(model: LlavaOnevisionForConditionalGeneration) -> LlavaOnevisionForConditionalGeneration:
    """Let the language model take the masks of `dataset.inputs.prompts`.

    It still takes padding masks, and masks with a row per query.

    Raises:
        UserError: its language model is not a Qwen2, whose layers `states_at` knows.
    """
    if not isinstance(model.model.language_model, Qwen2Model):
        found = type(model.model.language_model).__name__
        raise UserError(f"{model.name_or_path}: its language model is a {found}; LLaVA-OneVision's is a Qwen2Model")
    model.set_attn_implementation({"text_config": PACKED_ATTENTION})
    return model


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it. A mask with fewer rows than queries is of the last ones; others are causal.

    The rows of an image prefix thus go through a kernel that computes no more than what is below the diagonal. Heads
    are repeated for it: left to itself, CUDA would fall back to the plain formula in float32 and on older cards, with
    all of its memory.

    Args:
        module: the attention layer.
        query: (B, heads, Q, D).
        key: (B, key heads, T, D).
        value: (B, key heads, T, D).
        attention_mask: (B, 1, at most Q, T) bool; None = all rows are causal.
        **options: dropout, scaling and what else transformers hands over.

    Returns:
        (B, Q, heads, D) and no weights.

    Raises:
        ValueError: queries are without a mask's row where keys of earlier calls are cached.
    """
    n_causal = 0 if attention_mask is None else query.shape[2] - attention_mask.shape[2]
    if n_causal == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"a mask of {attention_mask.shape[2]} rows for {query.shape[2]} queries and {key.shape[2]} keys"
        )
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    shared = {"dropout_p": options.get("dropout", 0.0), "scale": options.get("scaling")}
    first = (states[:, :, :n_causal] for states in (query, key, value))
    causal = F.scaled_dot_product_attention(*first, is_causal=True, **shared)
    masked = F.scaled_dot_product_attention(query[:, :, n_causal:], key, value, attn_mask=attention_mask, **shared)
    return torch.cat([causal, masked], dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)  # for whoever calls the model with a mask of padding


def vision_tower(model: nn.Module) -> nn.Module:
    """The SigLIP tower, with or without LoRA around the model."""
    return base_model(model).model.vision_tower


def base_model(model: nn.Module) -> LlavaOnevisionForConditionalGeneration:
    """The model itself, out of what LoRA may have put around it."""
    return model if isinstance(model, LlavaOnevisionForConditionalGeneration) else model.get_base_model()


def has_lora(model: nn.Module) -> bool:
    """Whether LoRA is around the model. Asked without peft, which takes a second to import beside bitsandbytes."""
    return base_model(model) is not model


def answer_states(model: nn.Module, text: Mapping[str, Tensor], images: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Last hidden states at the positions that predict answer tokens, and those tokens.

    Args:
        model: student or teacher.
        text: input_ids, position_ids, labels (B, T) and attention_mask of a batch, see `collate_prompts`.
        images: pixel_values, image_sizes, batch_num_images; or features of a frozen tower instead of the pixel_values;
            or image_features alone, what `image_features(...)` returned for them; empty for a blind model.

    Returns:
        hidden (n, H) in the model's dtype and targets (n,) int64.
    """
    keep, targets = answer_targets(text["labels"])
    positions = true_columns(keep)
    states = states_at(model, input_embeddings(model, text["input_ids"], images), text, positions)
    return states[keep.gather(1, positions)], targets


def true_columns(wanted: Tensor) -> Tensor:
    """(B, T) bool -> (B, n) columns in which a row is True, in order; n is the largest number of them in a row.

    A row that has fewer gets columns in which it is False behind them, so that all rows are of one length.
    """
    n = max(int(wanted.sum(1).max()), 1)
    return wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n]


def input_embeddings(model: nn.Module, input_ids: Tensor, images: Mapping[str, Any]) -> Tensor:
    """(B, T) token ids -> (B, T, D) what the language model reads, image tokens in place of their placeholders.

    Only words go through the embedding: its backward pass walks through the tokens one by one, on a CPU at least, and
    nearly all of them are placeholders.

    Args:
        model: student or teacher.
        input_ids: (B, T) with a placeholder for every image token.
        images: see `answer_states`.

    Raises:
        ValueError: there are more or fewer placeholders than image tokens.
    """
    if not images:
        return _embed_words(model, input_ids)
    if "image_features" in images:
        features = images["image_features"]
    else:
        features = project_features(model, images) if "features" in images else image_features(model, images)
    is_picture = input_ids == base_model(model).config.image_token_id
    words, pictures = _embed_words(model, input_ids[~is_picture]), torch.cat(features.pooler_output)
    if int(is_picture.sum()) != len(pictures):
        raise ValueError(f"{int(is_picture.sum())} placeholders in the prompts for {len(pictures)} image tokens")
    embeds = words.new_zeros(*input_ids.shape, words.shape[-1])
    embeds[~is_picture], embeds[is_picture] = words, pictures.to(words.dtype)
    return embeds


def _embed_words(model: nn.Module, ids: Tensor) -> Tensor:
    """Token ids of any shape -> (..., D).

    Where the output layer is the same weight, that weight has a dense gradient already. The embedding's is sparse then
    and is added to it: two dense gradients would take 0.5 GB more for the 0.5B model. FSDP shards the weight, it is no
    leaf any more, and needs dense gradients.
    """
    base = base_model(model)
    embedding = base.get_input_embeddings()
    weight = embedding.weight
    if weight.requires_grad and weight.is_leaf and weight is base.lm_head.weight:
        return F.embedding(ids, weight, padding_idx=embedding.padding_idx, sparse=True)
    return embedding(ids)


def states_at(
    model: nn.Module, embeds: Tensor, text: Mapping[str, Tensor], positions: Tensor, cache: DynamicCache | None = None
) -> Tensor:
    """The language model's last hidden states at some positions.

    The last layer computes keys and values everywhere, and all that comes after them at these positions only.

    Args:
        model: student or teacher, after `use_packed_attention`.
        embeds: (B, T, D) of `input_embeddings`.
        text: position_ids (B, T) and attention_mask.
        positions: (B, n) columns of question blocks. Rows may be padded with columns of the prefix; the output there is
            undefined.
        cache: takes up keys and values, for `greedy_answers`.

    Returns:
        (B, n, D).

    Raises:
        ValueError: the model would misread the mask.
    """
    language = base_model(model).model.language_model
    if language.config._attn_implementation != PACKED_ATTENTION:
        raise ValueError("this model does not take the masks of packed prompts; call use_packed_attention")
    mask, rotary = text["attention_mask"], language.rotary_emb(embeds, text["position_ids"])
    hidden = embeds
    for layer in language.layers[:-1]:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
    return language.norm(_layer_at(language.layers[-1], hidden, positions, mask, rotary, cache))


def _layer_at(
    layer: nn.Module,
    hidden: Tensor,
    positions: Tensor,
    mask: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: DynamicCache | None,
) -> Tensor:
    """A decoder layer's output (B, n, D) at positions (B, n) of its input (B, T, D)."""

    def chosen(values: Tensor) -> Tensor:
        return values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))

    def heads(values: Tensor) -> Tensor:
        return values.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def rotate(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return values * cos[:, None] + rotate_half(values) * sin[:, None]

    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    key, value = rotate(heads(attention.k_proj(normed)), *rotary), heads(attention.v_proj(normed))
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    query = rotate(heads(attention.q_proj(chosen(normed))), *(chosen(part) for part in rotary))
    rows = (positions - (hidden.shape[1] - mask.shape[2])).clamp(min=0)  # a mask has rows for blocks only
    rows = rows[:, None, :, None].expand(-1, -1, -1, mask.shape[3])
    mixed, _ = sdpa_attention_forward(
        attention,
        query,
        key,
        value,
        mask.gather(2, rows),
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
    )
    hidden = chosen(hidden) + attention.o_proj(mixed.flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def output_logits(model: nn.Module, hidden: Tensor, *, vocab_size: int) -> Tensor:
    """(n, H) last hidden states -> (n, vocab_size) next-token logits.

    Vocabularies are cropped to the tokenizer's length: the padding rows behind it differ between the 0.5B (152,000) and
    the 7B (152,128) and mean nothing.
    """
    return base_model(model).lm_head(hidden)[:, :vocab_size]


def answer_logits(
    model: nn.Module, text: Mapping[str, Tensor], images: Mapping[str, Any], *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Next-token logits (n, vocab_size) at the positions that predict answer tokens, and those tokens (n,).

    Only these n of B*T rows go through the output layer. Arguments: see `answer_states` and `output_logits`.
    """
    hidden, targets = answer_states(model, text, images)
    return output_logits(model, hidden, vocab_size=vocab_size), targets


def image_features(model: nn.Module, images: Mapping[str, Tensor]):
    """The vision tower's output for a batch; `pooler_output` is a list with the (N, D) image tokens of each picture."""
    return base_model(model).get_image_features(**images, return_dict=True)


def tower_features(model: nn.Module, tiles: Tensor) -> Tensor:
    """(N, 3, S, S) tiles -> (N, P, D) vision features, the tensor that the projector reads."""
    layer = base_model(model).config.vision_feature_layer
    return vision_tower(model)(tiles, output_hidden_states=True).hidden_states[layer]


def project_features(model: nn.Module, images: Mapping[str, Tensor]) -> BaseModelOutputWithPooling:
    """What `image_features` returns, from vision features of a frozen tower: its second half, projector and newlines.

    Args:
        model: whose projector reads them.
        images: features (B, tiles, P, D) of `tower_features`, image_sizes, batch_num_images.
    """
    core = base_model(model).model
    counts = [_count_tiles(model, size, images) for size in images["image_sizes"].tolist()]
    tiles = torch.cat([features[:n] for features, n in zip(images["features"], counts, strict=True)])
    packed, _ = core.pack_image_features(
        torch.split(core.multi_modal_projector(tiles), counts),
        images["image_sizes"],
        image_newline=core.image_newline,
        vision_aspect_ratio=core.config.vision_aspect_ratio,
    )
    return BaseModelOutputWithPooling(pooler_output=packed)


def overview_patches(model: nn.Module, images: Mapping[str, Tensor], features=None) -> Tensor:
    """(B, P, D) vision features of each picture's first tile, which shows the whole picture.

    "Vision features" are the tensor that the projector reads. The converted checkpoints have dropped the last SigLIP
    layer, so that is the last of the hidden states, before the tower's final layer norm, which the language model never
    gets.

    Args:
        model: whose tower computes them.
        images: pixel_values (B, tiles, 3, S, S), image_sizes, batch_num_images.
        features: `image_features` of these images where they are there already; None = only the first tiles are
            computed.
    """
    if features is None:
        return tower_features(model, images["pixel_values"][:, 0])
    layer = base_model(model).config.vision_feature_layer
    counts = torch.tensor([_count_tiles(model, size, images) for size in images["image_sizes"].tolist()])
    tiles = features.hidden_states[layer]
    return tiles[(counts.cumsum(0) - counts).to(tiles.device)]


def _count_tiles(model: nn.Module, size: list[int], images: Mapping[str, Tensor]) -> int:
    if int(images["batch_num_images"][0]) > 1:
        return 1  # several images in one sequence: one tile each
    config = base_model(model).config
    return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)


def exact_matches(logits: Tensor, text: Mapping[str, Tensor]) -> Tensor:
    """Per question: are all of its answer tokens the most likely ones, the end of the turn included?

    Since the model is fed the gold answer, this is exactly when greedy decoding would produce that answer.

    Args:
        logits: (n, V) of `answer_logits`.
        text: the batch's text.

    Returns:
        (number of questions,) bool.
    """
    keep, targets = answer_targets(text["labels"])
    first = keep & ~F.pad(keep[:, :-1], (1, 0), value=False)  # answers never touch each other
    question = first.flatten().cumsum(0)[keep.flatten()] - 1
    right = torch.ones(int(first.sum()), dtype=torch.int8, device=logits.device)
    hits = (logits.argmax(-1) == targets).to(torch.int8)
    return right.scatter_reduce(0, question, hits, reduce="amin").bool()
