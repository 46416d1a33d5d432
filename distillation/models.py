"""Load student and teacher, choose what trains, LoRA, weights in and out."""

import importlib.util
import os
import sys
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from dataset.inputs.model_folder import check_weight_files, model_folder
from distillation.forward import base_model, has_lora, use_packed_attention, vision_tower
from utils import UserError, reason

STUDENT_NAME = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
TEACHER_NAME = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
MINIATURE_STUDENT = "dataset/miniature/student"
MINIATURE_TEACHER = "dataset/miniature/teacher"


def load_model(name: str, *, dtype: torch.dtype = torch.float32, bits: int = 16, shapes_alone: bool = False):
    """LlavaOnevisionForConditionalGeneration in train() mode, all parameters that take part trainable.

    The stock model, but for attention that takes the masks of packed prompts.

    Args:
        name: hub id or folder.
        dtype: of the weights. The checkpoints store float16, in which AdamW would round most updates away; bfloat16
            halves the memory of weights that stay frozen.
        bits: 4 = the language model's linear layers are frozen in 4 bits (see `four_bits`); 16 = nothing is.
        shapes_alone: no weights are read: all tensors are on the meta device, until another process gives theirs, which
            finds what is wrong with the files. Not with 4 bits.

    Raises:
        UserError: nothing loadable there (see `model_folder`), weights are missing, its language model is another one,
            or 4 bits are asked for without bitsandbytes.
    """
    quantized = four_bits(name, dtype) if bits == 4 else {}
    if not sys.stderr.isatty():
        disable_progress_bar()  # a log file would hold every redrawing of it
    folder = model_folder(name)
    check_weight_files(folder, name)
    if shapes_alone:
        with torch.device("meta"):
            return new_model(LlavaOnevisionConfig.from_pretrained(folder, attn_implementation="sdpa"), dtype)
    try:
        model, report = LlavaOnevisionForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **quantized,
        )
    except Exception as error:  # a stranger's files end in errors of any kind
        raise UserError(f"{name}: no LLaVA-OneVision model can be loaded from there ({reason(error)})") from error
    if report["missing_keys"]:
        raise UserError(
            f"{name}: {len(report['missing_keys'])} weights are missing, {sorted(report['missing_keys'])[0]}"
        )
    return prepared(model)


def prepared(model: LlavaOnevisionForConditionalGeneration) -> LlavaOnevisionForConditionalGeneration:
    """A model as all of this project takes it: for packed prompts, all parameters that take part trainable."""
    # The projector reads the tower before this layer: it never gets a gradient, which DDP would take for an error.
    model.model.vision_tower.post_layernorm.requires_grad_(False)
    return use_packed_attention(model).train()


def new_model(config: LlavaOnevisionConfig, dtype: torch.dtype = torch.float32):
    """A model with random weights, as `load_model` returns one with trained ones."""
    config = deepcopy(config)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype  # a part would take what its configuration was saved with
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlavaOnevisionForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    return prepared(model)


def four_bits(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Options of `from_pretrained`: NF4 for the linear layers of the language model, but not its output layer.

    Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3. Vision tower and projector are small, and
    their features are what a student learns from.

    Args:
        name: of the model, for the message.
        dtype: in which a layer computes, after its weights are widened.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    need_bitsandbytes(f"{name}: 4 bits need")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def need_bitsandbytes(what: str) -> None:
    """Raise UserError where this optional package is not installed; `what` needs it, the verb included."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what} bitsandbytes, which is not installed; see requirements-optional.txt")


def add_lora(model: nn.Module, *, rank: int, alpha: int) -> nn.Module:
    """Freeze the model and put trainable low-rank adapters on every linear layer of its language model.

    The projector is trained in full: it is small, and it is where the pictures enter the language model. What trains is
    float32, whatever the frozen weights are.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; adapters on all linear layers follow Dettmers et al. 2023,
    https://arxiv.org/abs/2305.14314, section 4.

    Raises:
        UserError: a rank beyond the language model's width, at which adapters can express every update already.
    """
    from peft import LoraConfig, get_peft_model  # not at the top: see has_lora

    width = model.config.text_config.hidden_size
    if rank > width:
        raise UserError(f"lora_rank {rank}: the language model is {width} wide, a rank beyond that adds nothing")
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
    """Choose what trains: the tower (up to what the projector reads), projector and newline, the language model."""
    base = base_model(model).model
    base.vision_tower.requires_grad_(vision)
    base.vision_tower.post_layernorm.requires_grad_(False)
    base.multi_modal_projector.requires_grad_(projector)
    base.image_newline.requires_grad_(projector)
    base.language_model.requires_grad_(language)
    base_model(model).lm_head.requires_grad_(language)


def parameter_groups(
    model: nn.Module, *, lr: float | None = None, vision_lr: float | None = None
) -> list[dict[str, Any]]:
    """For an optimizer: the trainable parameters of the vision tower, and all other trainable ones, with their rates.

    Args:
        model: every trainable parameter is in exactly one group; a part that does not train has none.
        lr: of language model and projector; None where they do not train.
        vision_lr: of the vision tower; None where it does not train.

    Raises:
        ValueError: a part trains and has no rate.
    """
    vision = {id(p) for p in vision_tower(model).parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    parts = {
        "vision_lr": [p for p in trainable if id(p) in vision],
        "lr": [p for p in trainable if id(p) not in vision],
    }
    rates = {"vision_lr": vision_lr, "lr": lr}
    groups = [{"params": part, "lr": rates[name]} for name, part in parts.items() if part]
    for name, part in parts.items():
        if part and rates[name] is None:
            raise ValueError(f"{name}: {len(part)} of the weights that train have no learning rate")
    return groups


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; tied ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(map(_count, parameters))


def _count(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)  # of weights in 4 bits, two in a byte
    return parameter.numel() if packed is None else packed.shape.numel()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint has to hold: everything, or with LoRA the adapters and the other trained weights only."""
    state = model.state_dict()
    if not has_lora(model):
        return state
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in state.items() if name in trained}


def load_trained_state(model: nn.Module, state: Mapping[str, Tensor], *, origin: str) -> None:
    """Put the weights of `trained_state` into a model built with the same settings.

    One of shapes alone stays as it is, after the same checks.

    Raises:
        UserError: the checkpoint has too few, too many or differently shaped weights.
    """
    own = model.state_dict()
    for name, value in state.items():
        if name in own and value.shape != own[name].shape:
            raise UserError(
                f"{origin}: the weights do not fit the model; {name} is {tuple(value.shape)} there and "
                f"{tuple(own[name].shape)} here"
            )
    missing, unknown = trained_state(model).keys() - state.keys(), state.keys() - own.keys()
    # A tied output layer is one tensor under two names and may be stored under either.
    missing -= {"lm_head.weight"} if base_model(model).config.tie_word_embeddings else set()
    if missing or unknown:
        raise UserError(f"{origin}: the weights are of another model ({len(missing)} missing, {len(unknown)} unknown)")
    if any(weight.is_meta for weight in own.values()):
        return
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"{origin}: the weights do not fit the model ({reason(error)})") from error


def restore_student(
    checkpoint: Mapping[str, Any], *, origin: str, dtype: torch.dtype = torch.float32, bits: int | None = None
):
    """The model of a checkpoint of ours: pretrained weights (in `dtype`), LoRA where it was used, and what was trained.

    Args:
        checkpoint: content of the file.
        origin: its path, for messages.
        dtype: of the pretrained weights.
        bits: of the pretrained weights, see `load_model`; None = as it was trained.

    Raises:
        UserError: the pretrained model cannot be loaded or the weights do not fit it; names the checkpoint.
    """
    recorded = checkpoint["hyper_parameters"]
    try:
        model = load_model(recorded["student_name"], dtype=dtype, bits=bits or recorded.get("base_bits", 16))
        if recorded.get("lora_rank"):
            model = add_lora(model, rank=recorded["lora_rank"], alpha=recorded["lora_alpha"])
    except UserError as error:
        raise UserError(f"{origin}: its model cannot be made: {error}") from error
    load_trained_state(model, student_state(checkpoint), origin=origin)
    return model


def student_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The student's weights out of a training checkpoint."""
    state = checkpoint["state_dict"]
    return {name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")}
