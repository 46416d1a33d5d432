"""What a training step or a pass of a model takes: operations, and memory by part, counted on shapes alone.

A script's own `main` is called with stand-ins for what needs weights, data or hours. What it builds makes two
optimizer updates on shapes (`distillation.shapes`), where PyTorch's memory tracker counts.
"""

import argparse
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaOnevisionConfig

from dataset.inputs.pictures import ImageSettings
from dataset.inputs.processor import ImageTextProcessor, load_processor
from dataset.inputs.prompts import IGNORE, collate_prompts, pack_questions
from dataset.questions.rows import group_by_image, questions_file, read_questions
from distillation.decoding import prefill
from distillation.forward import base_model
from distillation.models import STUDENT_NAME, TEACHER_NAME, count_parameters
from distillation.run.machine import half_dtype, probe, resolve_precision
from distillation.run.sharding import FSDP2, sharded_layers
from distillation.shapes import (
    Memory,
    StepMemory,
    model_of_shapes,
    peak,
    real_numbers,
    shapes_only,
    true_config,
    true_processor,
)
from distillation.teacher import TeacherConstants
from utils import ROOT, UserError, data_root, load_script, model_source

BUILT_IN = {STUDENT_NAME: "0.5b", TEACHER_NAME: "7b"}  # whose configurations are known without a download
FRAME = 530, 730  # height and width of most frames of SUN RGB-D, in pixels
# Frames of SUN RGB-D, and questions about one, where there is no question file to count them in.
FRAMES, ASKED = {"train": 4735, "val": 550, "test": 5050}, 7
QUESTION, ANSWER = "What is on the left of the brown chair?", "night stand"  # of usual length
VOCABULARY = 151648  # tokens of the true tokenizer
BITS8_SHARE = (1 + 4 / 256) / 4  # of moments in 8 bits, with a scale for each 256, of what those in 32 take
NF4_BYTES = 0.5 + 4 / 64  # of a weight: half a byte, and a scale of four bytes for each 64


@dataclass(frozen=True)
class Cost:
    """Of one micro-batch and of an optimizer update."""

    trainable: int
    parameters: int
    tokens: int  # in a row, image tokens included
    image_tokens: int
    memory: Memory
    tflop: float  # of a micro-batch, forward and backward


def configuration(name: str) -> tuple[LlavaOnevisionConfig, bool]:
    """The configuration of a model, and whether it is the built-in one, since the model was never downloaded.

    Raises:
        UserError: nobody knows the shapes of this model.
    """
    if name in BUILT_IN and not is_here(name):
        return true_config(BUILT_IN[name]), True
    try:
        return LlavaOnevisionConfig.from_pretrained(model_source(name)), False
    except Exception as error:  # of many types, where there is no internet and no folder
        raise UserError(
            f"{name}: no configuration is to be had, and its shapes are not built in (those of {', '.join(BUILT_IN)} "
            "are); give a folder with its config.json"
        ) from error


def is_here(name: str) -> bool:
    """Whether a model's configuration is on this machine."""
    return Path(model_source(name)).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)


def processor_of(name: str) -> ImageTextProcessor:
    """The processor of a model, or `true_processor` where none is here."""
    if is_here(name):
        with suppress(UserError):  # a folder with a config.json alone
            return load_processor(name)
    return true_processor()


def frames_of(miniature: bool, split: str, share: float = 1.0) -> tuple[int, float, bool]:
    """Images of a split, questions about each, and whether they were counted in the data set's own files."""
    root = data_root_or_none(miniature)
    path = root and questions_file(root, split)
    if path is None or not path.is_file():
        return round(FRAMES[split] * share), ASKED, False
    n_images, n_questions = questions_in(path)
    return round(n_images * share), n_questions / n_images, True


@cache
def questions_in(path: Path) -> tuple[int, int]:
    """Images and questions of a question file; a plan asks for them many times."""
    groups = group_by_image(read_questions(path))
    return len(groups), sum(len(group) for group in groups)


def data_root_or_none(miniature: bool) -> Path | None:
    """The data set's folder; None where there is none."""
    try:
        return data_root(miniature)
    except UserError:
        return None


def questions_of_image(args: argparse.Namespace, counted: float) -> int:
    """Questions in an image's row, of `counted` with an answer in the question file.

    A teacher answers those whose label is withheld; without one they are left out.
    """
    kept = 1.0 if getattr(args, "teacher_name", None) else args.label_fraction or 1.0
    own = max(1, round(counted * kept))
    return min(own, args.questions_per_image or own) + (args.teacher_questions or 0)


def ranks_of(args: argparse.Namespace) -> int:
    """Devices of a run, on all machines: as many as the flags name, whether they are here or not; auto = those here."""
    each = str(args.devices)
    if "," in each:  # their numbers, as Lightning takes them
        each = str(sum(bool(number.strip()) for number in each.split(",")))
    return int(each) * args.num_nodes if each.isdigit() else probe(args).world_size


@dataclass
class TeacherShapes:
    """What a script asks of a `TeacherCache`, in shapes."""

    config: LlavaOnevisionConfig
    vocabulary: int
    n_images: int
    dtype: torch.dtype  # of what is stored

    def constants(self, **wanted: bool) -> TeacherConstants:
        """See `TeacherCache.constants`."""
        options = {"output_layer": False, "patches": False, "memory_bank": False}
        return TeacherConstants(self, **(options | wanted))

    def head(self) -> Tensor:
        """(V, H)."""
        return torch.rand(self.vocabulary, self.config.text_config.hidden_size, dtype=self.dtype)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation, (Dv,) each."""
        width = self.config.vision_config.hidden_size
        return torch.rand(width), torch.rand(width)

    def memory_bank(self) -> Tensor:
        """(N, Dv)."""
        return torch.rand(self.n_images, self.config.vision_config.hidden_size)

    def recordings(self) -> Tensor:
        """(N,), each image one of its own."""
        return torch.arange(self.n_images)


def batch_of_shapes(
    args: argparse.Namespace,
    student: ImageSettings,
    config: LlavaOnevisionConfig,
    processor: ImageTextProcessor,
    teacher: TeacherShapes | None,
    questions: int,
) -> dict[str, Any]:
    """A batch of `args.batch_size` usual frames with as many questions each, as the data module makes it."""
    size, n = config.vision_config.image_size, args.batch_size
    height, width = FRAME if size == 384 else (size, size)
    image_tokens = processor.count_image_tokens(height, width, image_tokens=student.image_tokens)
    prompt = pack_questions(processor, [QUESTION] * questions, [ANSWER] * questions, n_image_tokens=image_tokens)
    text = collate_prompts([prompt] * n, pad_token_id=processor.tokenizer.pad_token_id)
    text["input_ids"][text["input_ids"] == processor.image_token_id] = config.image_token_id
    n_answers = int((text["labels"] != IGNORE).sum())
    one = processor.pixels([np.zeros((height, width, 3), np.uint8)], image_tokens=student.image_tokens)
    pixel = one["pixel_values"][0, :, :, :1, :1]  # of each tile
    images = processor.join([pixel] * n, [one["image_sizes"][0]] * n, image_tokens=student.image_tokens)
    shape = images.pop("pixel_values").shape[:2]
    patches = (size // config.vision_config.patch_size) ** 2
    if args.vision_cache:
        images["features"] = torch.rand(*shape, patches, config.vision_config.hidden_size)
    else:
        images["pixel_values"] = torch.rand(*shape, 3, size, size)
    update = {"gold_tokens": float(n_answers), "answer_tokens": float(n_answers), "images": float(n), "has_gold": True}
    batch = {"text": text, "student_images": images, "spare": False, "update": update}
    batch["image_paths"] = [""] * n
    if teacher:
        update["patches"] = float(n * patches)
        with real_numbers():  # which patches count decides a shape
            valid_share = torch.ones(n, patches)
        batch["teacher"] = {
            "hidden": torch.rand(n_answers, teacher.config.text_config.hidden_size, dtype=teacher.dtype),
            "gold": torch.ones(n_answers, dtype=torch.bool),
            "patches": torch.rand(n, patches, teacher.config.vision_config.hidden_size, dtype=teacher.dtype),
            "valid_share": valid_share,
            "memory_bank_rows": torch.arange(n),
        }
    return batch


@dataclass
class Built:
    """What a script makes before it trains, with a batch for its steps."""

    module: pl.LightningModule
    optimizer: torch.optim.Optimizer
    batch: dict[str, Any]
    vocabularies: set[int]  # widths of logits


def build(args: argparse.Namespace, script: Path, load: Callable[..., nn.Module]) -> Built:
    """Call a script's `main` with stand-ins for what needs weights, data or time.

    Args:
        args: of the script.
        script: its path.
        load: in place of `load_model`, given the name, and dtype and bits where the script names them.

    Raises:
        UserError: nobody knows the shapes of a model.
    """
    code, made = load_script(script.relative_to(ROOT).as_posix()), {}
    args = argparse.Namespace(**(vars(args) | {"precision": precision_of(args)}))  # frozen weights follow it
    n_images, questions, _ = frames_of(args.miniature, "train", args.subset_percentage)
    asked = questions_of_image(args, questions)
    processor = processor_of(args.student_name)
    vocabulary = len(processor.tokenizer) if processor.num_image_tokens != 729 else VOCABULARY
    teacher = None
    if getattr(args, "teacher_name", None):
        dtype = half_dtype(precision_of(args)) or torch.float32
        teacher = TeacherShapes(configuration(args.teacher_name)[0], vocabulary, n_images, dtype)
    code.start_run = lambda args, file, images, **options: made.update(images=images)
    code.load_model = lambda name, *, shapes_alone, **how: load(name, **how)  # of one process
    code.adamw = lambda bits: torch.optim.AdamW
    code.load_processor = lambda name: SimpleNamespace(tokenizer=range(vocabulary))
    code.build_data = lambda *given, **options: None
    code.open_teacher = lambda *given: teacher
    code.train = lambda module, *given, **options: made.update(module=module)
    code.main(args)
    module = made["module"]
    batch = batch_of_shapes(args, made["images"], module.student.config, processor, teacher, asked)
    module._trainer = SimpleNamespace(
        estimated_stepping_batches=100, accumulate_grad_batches=args.accumulate_grad_batches, world_size=1
    )
    if args.gradient_checkpointing:
        module.student.activation_checkpointing_enable({"use_reentrant": False})
    (optimizer,), _ = module.configure_optimizers()
    return Built(module, optimizer, batch, {module.student.config.text_config.vocab_size, vocabulary})


def cost_of(args: argparse.Namespace, script: Path) -> Cost:
    """What a script's steps take with these flags.

    Raises:
        UserError: nobody knows the shapes of a model.
    """

    def load(name: str, *, dtype: torch.dtype = torch.float32, bits: int = 16) -> nn.Module:
        return model_of_shapes(configuration(name)[0], dtype)

    with shapes_only():
        return _counted(args, build(args, script, load))


def _counted(args: argparse.Namespace, built: Built) -> Cost:
    """Two micro-batches and updates: the operations of the first one, the memory of the second one.

    One at a time: the counter of operations holds on to what a checkpointed layer would let go.
    """
    student, optimizer, half = built.module.student, built.optimizer, half_dtype(precision_of(args))

    def micro_batch() -> None:
        with torch.autocast("cpu", half, enabled=half is not None):
            loss = built.module.training_step(built.batch, 0)["loss"]
        loss.backward()

    with FlopCounterMode(display=False) as counter:
        micro_batch()
    optimizer.step()  # from here on there are moments
    if args.accumulate_grad_batches == 1:
        optimizer.zero_grad()
    tracker = StepMemory(built.vocabularies)
    tracker.track_external(built.module, optimizer)
    with tracker:
        micro_batch()  # with accumulation, beside the gradients of the one before
        optimizer.step()
    memory = peak(tracker)
    saved = saved_by_bits(student, getattr(args, "base_bits", 16))
    moments = memory.optimizer if args.optimizer_bits == 32 else round(memory.optimizer * BITS8_SHARE)
    memory = replace(memory, weights=round(memory.weights - saved), optimizer=moments)
    if args.strategy == FSDP2:
        memory = shared_out(memory, student, ranks_of(args))
    trainable, total = count_parameters(student)
    ids = built.batch["text"]["input_ids"]
    return Cost(
        trainable=trainable,
        parameters=total,
        tokens=ids.shape[1],
        image_tokens=int((ids[0] == student.config.image_token_id).sum()),
        memory=memory,
        tflop=counter.get_total_flops() / 1e12,
    )


def shared_out(memory: Memory, student: nn.Module, ranks: int) -> Memory:
    """About the same peak on one of several ranks with `--strategy fsdp2`.

    A rank holds its share of all, and whole what it computes with: two layers, and all that is in no layer of its own,
    from the forward to the backward pass, with the gradients of it.
    """

    def size(weights: Iterable[Tensor]) -> int:
        return sum(weight.numel() * weight.element_size() for weight in weights)

    layers = [list(layer.parameters()) for layer in sharded_layers(student)]
    within = {id(weight) for layer in layers for weight in layer}
    root = [weight for weight in student.parameters() if id(weight) not in within]
    whole = size(root) + 2 * max(map(size, layers))
    return replace(
        memory,
        weights=memory.weights // ranks + whole,
        gradients=memory.gradients // ranks + size(weight for weight in root if weight.requires_grad),
        optimizer=memory.optimizer // ranks,
    )


def precision_of(args: argparse.Namespace) -> str:
    """The precision that is planned for: `auto` is what a GPU with bfloat16 takes."""
    return "bf16-mixed" if args.precision == "auto" and args.accelerator != "cpu" else resolve_precision(args.precision)


def reading_cost(
    name: str, images: ImageSettings, half: torch.dtype | None, *, batch_size: int, questions: int
) -> dict[int, Cost]:
    """Of a model that reads pictures with questions, without a backward pass; its operations are per picture.

    Args:
        name: hub id or folder.
        images: what it sees.
        half: precision of weights and computation; None = float32.
        batch_size: pictures at a time.
        questions: about each.

    Returns:
        By the bits of its language model, 16 and 4.
    """
    config, _ = configuration(name)
    processor = processor_of(name)
    with shapes_only(), torch.no_grad(), torch.autocast("cpu", half, enabled=half is not None):
        model = model_of_shapes(config, half or torch.float32).eval().requires_grad_(False)
        flags = argparse.Namespace(batch_size=batch_size, vision_cache=False)
        batch = batch_of_shapes(flags, images, config, processor, None, questions)
        tracker = StepMemory(set())
        tracker.track_external(model)
        with tracker, FlopCounterMode(display=False) as counter:
            prefill(model, batch["text"], batch["student_images"])  # before answers are told from each other
    memory = peak(tracker)
    ids = batch["text"]["input_ids"]
    n_image_tokens = int((ids[0] == config.image_token_id).sum())
    flop = counter.get_total_flops() / 1e12 / batch_size
    cost = Cost(0, count_parameters(model)[1], ids.shape[1], n_image_tokens, memory, flop)
    packed = replace(memory, weights=round(memory.weights - saved_by_bits(model, 4)))
    return {16: cost, 4: replace(cost, memory=packed)}


def saved_by_bits(model: nn.Module, bits: int) -> float:
    """Bytes that a language model in 4 bits takes less, see `distillation.models.four_bits`."""
    if bits == 16:
        return 0.0
    layers = base_model(model).model.language_model.layers
    weights = [m.weight for m in layers.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    return sum(weight.numel() * (weight.element_size() - NF4_BYTES) for weight in weights)
