"""Load student and teacher, LoRA, logits at answer positions. The only file that knows where things are in the model."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import DynamicCache, LlavaOnevisionForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches
from transformers.utils.logging import disable_progress_bar

from dataset.processor import ImageTextProcessor, save_processor
from dataset.prompts import PADDING_SEGMENT, answer_targets, visible_segments
from utils import UserError, hf_token, model_source

STUDENT_NAME = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
TEACHER_NAME = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
MINIATURE_STUDENT = "dataset/miniature/student"
MINIATURE_TEACHER = "dataset/miniature/teacher"


def load_model(name: str, *, dtype: torch.dtype = torch.float32):
    """The stock LlavaOnevisionForConditionalGeneration in train() mode, all parameters that take part trainable.

    Args:
        name: hub id or folder.
        dtype: of the weights. The checkpoints store float16, in which AdamW would round most updates away; bfloat16 halves
            the memory of weights that stay frozen.

    Raises:
        UserError: nothing loadable there, or weights are missing.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()  # a log file would hold every redrawing of it
    try:
        model, report = LlavaOnevisionForConditionalGeneration.from_pretrained(
            model_source(name),
            dtype=dtype,
            attn_implementation="sdpa",  # the packed mask is boolean, which eager attention would misread
            token=hf_token(),
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{name}: no LLaVA-OneVision model can be loaded from there ({error})") from error
    if report["missing_keys"]:
        raise UserError(
            f"{name}: {len(report['missing_keys'])} weights are missing, {sorted(report['missing_keys'])[0]}"
        )
    # The projector reads the tower before this layer: it never gets a gradient, which DDP would take for an error.
    model.model.vision_tower.post_layernorm.requires_grad_(False)
    return model.train()


def vision_tower(model: nn.Module) -> nn.Module:
    """The SigLIP tower, with or without LoRA around the model."""
    return _base(model).model.vision_tower


def _base(model: nn.Module) -> LlavaOnevisionForConditionalGeneration:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def add_lora(model: nn.Module, *, rank: int, alpha: int) -> PeftModel:
    """Freeze the model and put trainable low-rank adapters on every linear layer of its language model.

    The projector is trained in full: it is small, and it is where the pictures enter the language model. What trains is
    float32, whatever the frozen weights are.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; adapters on all linear layers follow Dettmers et al. 2023,
    https://arxiv.org/abs/2305.14314, section 4.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],
    )
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # where the frozen weights are bfloat16, updates must not round away
            parameter.data = parameter.data.float()
    return model


def set_trainable(model: nn.Module, *, vision: bool, projector: bool, language: bool) -> None:
    """Choose which parts train: the tower up to what the projector reads; the projector with the newline; the language model."""
    base = _base(model).model
    base.vision_tower.requires_grad_(vision)
    base.vision_tower.post_layernorm.requires_grad_(False)
    base.multi_modal_projector.requires_grad_(projector)
    base.image_newline.requires_grad_(projector)
    base.language_model.requires_grad_(language)
    _base(model).lm_head.requires_grad_(language)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters of the vision tower, and all other trainable ones; every parameter in exactly one list."""
    vision = {id(p) for p in vision_tower(model).parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trainable if id(p) in vision], [p for p in trainable if id(p) not in vision]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; tied ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def answer_states(model: nn.Module, text: Mapping[str, Tensor], images: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Last hidden states at the positions that predict answer tokens, and those tokens.

    Args:
        model: student or teacher.
        text: input_ids, position_ids, labels (B, T) and attention_mask (B, 1, T, T) of a batch.
        images: pixel_values, image_sizes, batch_num_images; or features of a frozen tower instead of the pixel_values; or
            mm_encoder_outputs = {"image": image_features(...)}; empty for a blind model.

    Returns:
        hidden (n, H) in the model's dtype and targets (n,) int64.
    """
    keep, targets = answer_targets(text["labels"])
    if "features" in images:
        images = {"mm_encoder_outputs": {"image": project_features(model, images)}}
    states = _base(model).model(
        input_ids=text["input_ids"],
        position_ids=text["position_ids"],
        attention_mask=text["attention_mask"],
        use_cache=False,
        **images,
    )
    return states.last_hidden_state[keep], targets


def output_logits(model: nn.Module, hidden: Tensor, *, vocab_size: int) -> Tensor:
    """(n, H) last hidden states -> (n, vocab_size) next-token logits.

    Vocabularies are cropped to the tokenizer's length: the padding rows behind it differ between the 0.5B (152,000) and the
    7B (152,128) and mean nothing.
    """
    return _base(model).lm_head(hidden)[:, :vocab_size]


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
    return _base(model).get_image_features(**images, return_dict=True)


def tower_features(model: nn.Module, tiles: Tensor) -> Tensor:
    """(N, 3, S, S) tiles -> (N, P, D) vision features, the tensor that the projector reads."""
    layer = _base(model).config.vision_feature_layer
    return vision_tower(model)(tiles, output_hidden_states=True).hidden_states[layer]


def project_features(model: nn.Module, images: Mapping[str, Tensor]) -> BaseModelOutputWithPooling:
    """What `image_features` returns, from the vision features of a frozen tower: its second half, projector and newlines.

    Args:
        model: whose projector reads them.
        images: features (B, tiles, P, D) of `tower_features`, image_sizes, batch_num_images.
    """
    core = _base(model).model
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

    "Vision features" are the tensor that the projector reads. The converted checkpoints have dropped the last SigLIP layer,
    so that is the last of the hidden states, before the tower's final layer norm, which the language model never sees.

    Args:
        model: whose tower looks.
        images: pixel_values (B, tiles, 3, S, S), image_sizes, batch_num_images.
        features: `image_features` of these images where they are there already; None = only the first tiles are computed.
    """
    if features is None:
        return tower_features(model, images["pixel_values"][:, 0])
    layer = _base(model).config.vision_feature_layer
    counts = torch.tensor([_count_tiles(model, size, images) for size in images["image_sizes"].tolist()])
    tiles = features.hidden_states[layer]
    return tiles[(counts.cumsum(0) - counts).to(tiles.device)]


def _count_tiles(model: nn.Module, size: list[int], images: Mapping[str, Tensor]) -> int:
    if int(images["batch_num_images"][0]) > 1:
        return 1  # several images in one sequence: one tile each
    config = _base(model).config
    return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)


def answers_right(logits: Tensor, text: Mapping[str, Tensor]) -> Tensor:
    """Per question: are all of its answer tokens the most likely ones, the end of the turn included?

    Since the model is fed the gold answer, this is exactly when greedy decoding would produce that answer.

    Args:
        logits: (n, V) of `answer_logits`.
        text: the batch's text.

    Returns:
        (number of questions,) bool.
    """
    keep, targets = answer_targets(text["labels"])
    first = keep & ~torch.nn.functional.pad(keep[:, :-1], (1, 0), value=False)  # answers never touch each other
    question = first.flatten().cumsum(0)[keep.flatten()] - 1
    right = torch.ones(int(first.sum()), dtype=torch.int8, device=logits.device)
    hits = (logits.argmax(-1) == targets).to(torch.int8)
    return right.scatter_reduce(0, question, hits, reduce="amin").bool()


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
    base = _base(model)
    head = base.lm_head.weight[:vocab_size]
    barred = torch.zeros(vocab_size, device=head.device)
    barred[list(forbidden)] = -torch.inf

    def run(**inputs: Any) -> Tensor:
        return base.model(past_key_values=cache, use_cache=True, **inputs).last_hidden_state

    cache = DynamicCache(config=base.config.text_config)
    hidden = run(
        input_ids=text["input_ids"],
        position_ids=text["position_ids"],
        attention_mask=text["attention_mask"],
        **images,
    )
    cached, (keep, targets) = text["segments"], answer_targets(text["labels"])
    n_rows, n_blocks = len(cached), int(cached.max())
    tokens = [[[] for _ in range(int(row.max()))] for row in cached]
    states = [[[] for _ in row] for row in tokens]
    for (row, place), token in zip(keep.nonzero().tolist(), targets.tolist(), strict=True):
        block = int(cached[row, place]) - 1
        tokens[row][block].append(token)
        states[row][block].append(hidden[row, place])
    # One open position per block: the last of a prompt, later the token that was chosen last.
    blocks = torch.arange(1, n_blocks + 1, device=cached.device)
    places = torch.arange(cached.shape[1], device=cached.device)
    last = torch.where(cached[:, None] == blocks[:, None], places, -1).amax(-1)  # (B, blocks)
    answered = torch.tensor(
        [[bool(t) for t in row] + [True] * (n_blocks - len(row)) for row in tokens], device=cached.device
    )
    segments = torch.where((last < 0) | answered, PADDING_SEGMENT, blocks)
    rows = torch.arange(n_rows, device=cached.device)[:, None]
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
        width = int((segments != PADDING_SEGMENT).sum(1).max())
        if step + 1 == max_new_tokens or width == 0:
            break
        open_first = (segments == PADDING_SEGMENT).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        chosen, segments, positions = (values.gather(1, open_first) for values in (chosen, segments, positions + 1))
        cached = torch.cat([cached, segments], dim=1)
        mask = visible_segments(segments, cached)
        newest = run(input_ids=chosen, position_ids=positions, attention_mask=mask[:, None])
    return Answers(tokens, [[torch.stack(block) for block in row] for row in states])


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint has to hold: everything, or with LoRA the adapters and the other trained weights only."""
    state = model.state_dict()
    if not isinstance(model, PeftModel):
        return state
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in state.items() if name in trained}


def load_trained_state(model: nn.Module, state: Mapping[str, Tensor], *, origin: str) -> None:
    """Put the weights of `trained_state` into a model built with the same settings.

    Raises:
        UserError: the checkpoint has too few, too many or differently shaped weights.
    """
    try:
        report = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"{origin}: the weights do not fit the model ({error})") from error
    missing = set(report.missing_keys) & set(trained_state(model))
    # A tied output layer is one tensor under two names and may be stored under either.
    missing -= {"lm_head.weight"} if _base(model).config.tie_word_embeddings else set()
    if missing or report.unexpected_keys:
        raise UserError(
            f"{origin}: the weights are of another model ({len(missing)} missing, {len(report.unexpected_keys)} unknown)"
        )


def restore_student(checkpoint: Mapping[str, Any], *, origin: str, dtype: torch.dtype = torch.float32):
    """The model of a checkpoint of ours: its pretrained weights (in `dtype`), LoRA where it was used, and what was trained.

    Raises:
        UserError: the pretrained model cannot be loaded or the weights do not fit it.
    """
    recorded = checkpoint["hyper_parameters"]
    model = load_model(recorded["student_name"], dtype=dtype)
    if recorded.get("lora_rank"):
        model = add_lora(model, rank=recorded["lora_rank"], alpha=recorded["lora_alpha"])
    load_trained_state(model, student_state(checkpoint), origin=origin)
    return model


def student_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The student's weights out of a training checkpoint."""
    state = checkpoint["state_dict"]
    return {name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")}


def export_model(model: nn.Module, processor: ImageTextProcessor, folder: Path, *, dtype: torch.dtype = torch.float16):
    """Write a Hugging Face folder that stock transformers loads; LoRA adapters are merged into the weights.

    The model's weights are converted in place; call it when training is over. An interrupted export leaves no folder.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        model.to(dtype).save_pretrained(part)
        save_processor(processor, part)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
