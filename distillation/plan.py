"""What a run would cost, said before anything is downloaded or computed: `--dry_run` of every script.

What a step takes is counted (`distillation.cost`); hours follow from a rate that is assumed for a card.
"""

import argparse
import math
import operator
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from dataset.inputs.pictures import ImageSettings
from distillation.cost import (
    Cost,
    configuration,
    cost_of,
    frames_of,
    precision_of,
    questions_of_image,
    ranks_of,
    reading_cost,
)
from distillation.run.checkpoints import CHECKPOINT_SHARE, KEPT
from distillation.run.machine import half_dtype, quieten
from distillation.run.sharding import FSDP2
from distillation.shapes import Memory
from utils import ROOT, amount, duration

CONTEXT_GIB = 0.6  # that CUDA itself takes
SLACK = 1.05  # what an allocator takes, in units of live tensors
# GiB of a card -> TFLOP/s that are assumed: about 40 % of the dense bfloat16 rate of usual cards of that size.
CARDS = {16: 30, 24: 60, 40: 120, 80: 300}
NAMES = {  # of the parts of `Memory`, as they are printed
    "weights": "weights",
    "buffers": "of the teacher",
    "gradients": "gradients",
    "optimizer": "Adam's moments",
    "activations": "activations",
    "logits": "logits",
}
ANSWER_TOKENS = 4  # of an answer that is stored, its end included


def teacher_costs(args: argparse.Namespace, questions: int) -> dict[int, Cost]:
    """Of a pass of the teacher over the images of one batch, each with its labels and its own answers.

    Args:
        args: of a script that distills.
        questions: about an image.

    Returns:
        See `reading_cost`; without the bits that the flags rule out.
    """
    images, half = ImageSettings("rgb", image_tokens=args.image_tokens), half_dtype(precision_of(args))
    costs = reading_cost(args.teacher_name, images, half, batch_size=2 * args.batch_size, questions=2 * questions)
    return {bits: cost for bits, cost in costs.items() if args.teacher_bits in ("auto", str(bits))}


def say_scoring_plan(
    name: str, images: ImageSettings, half: torch.dtype | None, bits: int, args: argparse.Namespace
) -> None:
    """Print what scoring a model would take; arguments as of `evaluation.system.planned_system`.

    Raises:
        UserError: nobody knows the shapes of the model.
    """
    quieten()
    n_images, questions, counted = frames_of(args.miniature, args.gts_type)
    cost = reading_cost(name, images, half, batch_size=args.batch_size, questions=round(questions))[bits]
    total = cost.tflop * n_images
    print(f"plan of scoring {name}: {cost.parameters:,} parameters")
    print(
        f"{n_images:,} images with {questions:.1f} questions each, {'counted' if counted else 'assumed'}; a row has "
        f"{cost.tokens:,} tokens, {cost.image_tokens:,} of them of the picture; {total / 1e6:.3g} EFLOP"
    )
    print(f"peak memory in {half or torch.float32}, GiB: {_by_part(cost.memory)}".replace("torch.", ""))
    for gib, rate in sorted(CARDS.items(), reverse=True):
        needed = needed_gib(cost.memory)
        print(f"{gib} GiB: {'fits' if needed <= gib else 'does not fit'}, {needed:.1f} needed; {_hours(total, rate)}")


def say_plan(args: argparse.Namespace, script: Path) -> None:
    """Print what a run of these flags would take, and what would make it fit each card.

    Raises:
        UserError: nobody knows the shapes of a model.
    """
    quieten()
    n_images, questions, counted = frames_of(args.miniature, "train", args.subset_percentage)
    ranks = ranks_of(args)
    known = " (built in: it is not on this machine)" if configuration(args.student_name)[1] else ""
    print(f"plan of {script.relative_to(ROOT)}, {args.student_name}{known}")
    print(
        f"{n_images:,} training images with {questions:.1f} questions each, "
        + ("counted in the question file" if counted else "assumed: no question file is here")
        + (f", and {args.teacher_questions} further ones to the teacher" if args.teacher_questions else "")
    )
    print(f"with {questions_of_image(args, questions)} in a row of training, on {ranks} device(s)")
    cost = cost_of(args, script)
    updates, images = updates_of(args, n_images, ranks)
    total = cost.tflop / args.batch_size * images
    print(f"{cost.trainable:,} of {cost.parameters:,} parameters train")
    print(
        f"a row has {cost.tokens:,} tokens, {cost.image_tokens:,} of them of the picture; a micro-batch of "
        f"{args.batch_size} takes {cost.tflop:.3g} TFLOP, {updates:,} updates in {images / n_images:.3g} epochs "
        f"{total / 1e6:.3g} EFLOP"
    )
    print(f"peak memory of a device in {precision_of(args)}, GiB: {_by_part(cost.memory)}")
    asked = round(questions) + (args.teacher_questions or 0)
    teachers = teacher_costs(args, asked) if getattr(args, "teacher_name", None) else {}
    for bits, teacher in teachers.items():
        print(
            f"the teacher in {bits} bits, once: {teacher.parameters:,} parameters, "
            f"{teacher.tflop * n_images / 1e6:.3g} EFLOP; peak memory, GiB: {_by_part(teacher.memory)}"
        )
    taught = max((teacher.tflop * n_images for teacher in teachers.values()), default=0.0)
    print("\n".join(_disk(args, cost, n_images, asked)))
    for gib, verdict in verdicts(args, script, cost):
        bits = next((bits for bits, teacher in teachers.items() if needed_gib(teacher.memory) <= gib), None)
        with_teacher = f", the teacher in {bits} bits" if bits else ", the teacher does not" if teachers else ""
        print(f"{gib} GiB: {verdict}{with_teacher}; {_hours(total + taught, CARDS[gib], ranks)}")


def updates_of(args: argparse.Namespace, n_images: int, ranks: int) -> tuple[int, int]:
    """Updates of a run, and the images that it reads in them."""
    in_update = args.batch_size * args.accumulate_grad_batches * ranks
    updates = math.ceil(n_images / in_update) * args.max_epochs
    if 0 < args.max_steps < updates:
        return args.max_steps, min(args.max_steps * in_update, n_images * args.max_epochs)
    return updates, n_images * args.max_epochs


def _by_part(memory: Memory) -> str:
    parts = {name: size / 2**30 for name, size in vars(memory).items() if size / 2**30 >= 0.005}
    named = ", ".join(f"{NAMES[name]} {size:.2f}" for name, size in parts.items())
    return f"{memory.total / 2**30:.2f}, of it {named}"


def _disk(args: argparse.Namespace, cost: Cost, n_images: int, asked: int) -> list[str]:
    """What a run writes, a line each."""
    checkpoint = 4 * cost.trainable * CHECKPOINT_SHARE
    lines = [f"disk: {KEPT + 1} checkpoints of at most {amount(checkpoint)}, one of them while it is written"]
    if getattr(args, "teacher_name", None):
        config, _ = configuration(args.teacher_name)
        vision, width = config.vision_config, config.text_config.hidden_size
        patches = (vision.image_size // vision.patch_size) ** 2 * vision.hidden_size
        each = 2 * (patches + 2 * asked * ANSWER_TOKENS * width)
        lines.append(f"disk: the teacher's outputs {amount(each)} an image, {amount(each * n_images)} in all")
    return lines


def needed_gib(memory: Memory) -> float:
    """What a card must have for this peak."""
    return SLACK * memory.total / 2**30 + CONTEXT_GIB


def savings(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Flags that save memory, each with those before it, in the order in which they cost something."""
    steps: list[dict[str, Any]] = [{"batch_size": 1}, {"gradient_checkpointing": True}]
    if args.strategy != FSDP2:  # which takes neither
        steps.append({"optimizer_bits": 8})
        steps += [{"base_bits": 4}] if getattr(args, "lora_rank", 0) else []
    return accumulate([*steps, {"image_tokens": "two_tile"}, {"image_tokens": "one_tile"}], operator.or_)


def cheaper(args: argparse.Namespace, script: Path) -> Iterator[tuple[str, float]]:
    """Flags that leave an update as it is, or change weights or input at last, and the GiB that a card needs then."""
    for saving in savings(args):
        changed = argparse.Namespace(**(vars(args) | saving))
        changed.accumulate_grad_batches = args.accumulate_grad_batches * args.batch_size
        given = {name: value for name, value in saving.items() if getattr(args, name) != value}
        if args.batch_size > 1:
            given["accumulate_grad_batches"] = changed.accumulate_grad_batches
        if given:
            flags = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items())
            yield flags, needed_gib(cost_of(changed, script).memory)


def verdicts(args: argparse.Namespace, script: Path, cost: Cost) -> Iterator[tuple[int, str]]:
    """GiB of a card, and whether a step fits it, or with which flags it does."""
    tried, more = [("", needed_gib(cost.memory))], cheaper(args, script)
    for gib in sorted(CARDS, reverse=True):
        while tried[-1][1] > gib and (following := next(more, None)):
            tried.append(following)
        flags, needed = next((one for one in tried if one[1] <= gib), ("", 0.0))
        if not needed:
            yield gib, f"does not fit, {min(needed for _, needed in tried):.1f} are needed at least"
        else:
            yield gib, f"fits with {needed:.1f}" + (f" and {flags}" if flags else "")


def _hours(tflop: float, rate: float, ranks: int = 1) -> str:
    times = "" if ranks == 1 else f"{ranks} x "
    return f"{duration(tflop / rate / ranks)} at {times}{rate} TFLOP/s"
