"""The flags that training scripts share, checked where they are declared."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset.inputs.depth_encodings import ENCODINGS
from dataset.inputs.pictures import DEPTH_SOURCES
from dataset.inputs.processor import IMAGE_TOKENS
from distillation.models import TEACHER_NAME

MINIATURE_DEFAULTS = dict(
    batch_size=8,
    accumulate_grad_batches=1,
    max_epochs=3,
    image_tokens="one_tile",
    lr=2.5e-4,
    vision_lr=2.5e-4,
    num_workers=1,
)
# Ten times that of fine-tuning, for every student whose tower has seen colour pictures and now sees depth: a control that learns to
# see more slowly than its rivals would flatter them.
DEPTH_VISION_LR = 2e-5
LEAST = dict(  # smallest value that a flag takes
    batch_size=1,
    accumulate_grad_batches=1,
    max_epochs=1,
    num_nodes=1,
    questions_per_image=1,
    teacher_questions=0,
    num_workers=0,
    lr=0,
    vision_lr=0,
    map_lr=0,
    weight_decay=0,
    warmup_share=0,
    gradient_clip=0,
    seed=0,
    lora_rank=0,
    lora_alpha=1,
)


def add_common_args(parser: argparse.ArgumentParser, *, leave_out: Sequence[str] = ()) -> None:
    """The flags that every training script has, with the defaults for real SUN RGB-D, but those that it could not obey."""

    def add(flag: str, **options: Any) -> None:
        if flag not in leave_out:
            parser.add_argument(flag, **options)

    # data
    add("--miniature", action="store_true", help="the built-in world and tiny models, with sizes that suit them")
    add("--subset_percentage", type=float, default=1.0, help="share of the training images, in (0, 1]")
    add(
        "--label_fraction",
        type=float,
        default=1.0,
        help="share of the training questions with a gold answer, in (0, 1]",
    )
    add("--questions_per_image", type=int, default=None, help="at most so many questions of an image per step (all)")
    add(
        "--augmentation",
        action="store_true",
        help="colour jitter on RGB, noise and holes on depth, shared crop and roll",
    )
    add(
        "--picture_cache",
        action=argparse.BooleanOptionalAction,
        help="keep the student's pictures on disk, ready to use (with --miniature: yes, unless --augmentation)",
    )
    add(
        "--image_tokens",
        choices=IMAGE_TOKENS,
        default="anyres",
        help="tiles of a grid and an overview, one tile and an overview, or one",
    )
    add("--num_workers", type=int, default=4, help="data loading processes")
    # optimisation
    add("--batch_size", type=int, default=2, help="images per step and device")
    add("--accumulate_grad_batches", type=int, default=16, help="steps per optimizer update")
    add("--max_epochs", type=int, default=5, help="passes over the training images")
    add("--max_steps", type=int, default=-1, help="stop after so many optimizer updates (-1: --max_epochs decides)")
    add("--lr", type=float, default=1e-5, help="peak learning rate")
    add("--vision_lr", type=float, default=2e-6, help="peak learning rate of the vision tower")
    add("--weight_decay", type=float, default=0.0, help="AdamW's, on all weights that train")
    add("--warmup_share", type=float, default=0.03, help="share of the updates in which the rate rises")
    add("--gradient_clip", type=float, default=1.0, help="largest gradient norm; 0 = no clipping")
    add("--seed", type=int, default=0, help="of the order of the data, augmentation, adapters and dropout")
    # machine
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="keep less of the forward pass and compute it again: the same gradients in less memory, a third slower",
    )
    add("--precision", default="auto", help="a Lightning precision; auto = bf16-mixed where the GPU can, else 32-true")
    add("--accelerator", default="auto", help="a Lightning accelerator: auto, cpu, gpu, ...")
    add("--devices", default="auto", help="a Lightning device list or count, of each machine")
    add("--num_nodes", type=int, default=1, help="machines, with torchrun on each of them")
    add("--strategy", default="auto", help="a Lightning strategy: auto, ddp, fsdp (with --gradient_clip 0), ...")
    # where from, where to
    add(
        "--load_checkpoint",
        nargs="?",
        const="best",
        help="start from these weights: a path or a run's name; without one: the best of the phase before, else of this experiment",
    )
    add("--resume", help="continue an interrupted run exactly: auto (the newest, a new run if there is none) or a path")
    add("--run_name", help="name of the run's folders (the time it started)")
    add("--export", type=Path, help="write the best student as a Hugging Face folder")
    add(
        "--save_final_pt", type=Path, help="write the best student's weights as a plain state dict (LoRA: the adapters)"
    )
    add("--dry_run", action="store_true", help="say what would happen and what it costs; write nothing")


def add_depth_args(parser: argparse.ArgumentParser) -> None:
    """The flags of every script whose student sees depth; its tower's rate is higher, since depth is new to it."""
    if parser.get_default("vision_lr") is not None:  # where the tower trains
        parser.set_defaults(vision_lr=DEPTH_VISION_LR)
    parser.add_argument("--depth_encoding", choices=tuple(ENCODINGS), default="metric_log3", help="depth -> 3 channels")
    parser.add_argument("--depth_source", choices=DEPTH_SOURCES, default="raw", help="raw, or bfx = hole-filled")


def add_teacher_args(parser: argparse.ArgumentParser, *, asks: bool = True) -> None:
    """The flags of every script that distils: which teacher and, where its answers count, what it is asked."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--teacher_name", default=TEACHER_NAME, help="hub id or folder of a stock teacher")
    which.add_argument(
        "--teacher_checkpoint",
        nargs="?",
        const="best",
        help="a teacher fine-tuned by baseline_rgb7b: a path or a run's name; without one: the best",
    )
    parser.add_argument(
        "--any_teacher",
        action="store_true",
        help="accept a teacher that the phase before did not have, or that was tuned on labels which the student may not see",
    )
    parser.add_argument(
        "--teacher",
        choices=("cached", "online"),
        default="cached",
        help="look at every image once and store it, or look again in every step: the same loss, slow (--num_workers 0)",
    )
    if asks:
        parser.add_argument(
            "--teacher_questions",
            type=int,
            default=0,
            help="per image and step so many further questions, answered by the teacher",
        )


def add_vision_cache_arg(parser: argparse.ArgumentParser) -> None:
    """The flag of every script whose vision tower is frozen."""
    parser.add_argument(
        "--vision_cache", action="store_true", help="let the frozen vision tower see every picture once (on disk)"
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None, **miniature_defaults: Any) -> argparse.Namespace:
    """Parse and check; --miniature changes the defaults, and what is given explicitly still wins."""
    args = parser.parse_args(argv)
    if args.miniature:
        parser.set_defaults(**MINIATURE_DEFAULTS | miniature_defaults)
        args = parser.parse_args(argv)
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        if value is not None and not value >= least:  # nan is no value either
            parser.error(f"--{name} {value}: give at least {least}")
    if args.max_steps != -1 and args.max_steps < 1:
        parser.error(f"--max_steps {args.max_steps}: give at least 1, or -1 for no limit")
    for name in ("subset_percentage", "label_fraction"):
        if not 0 < getattr(args, name, 1.0) <= 1:
            parser.error(f"--{name} {getattr(args, name)}: give a share above 0 and at most 1")
    if not args.warmup_share < 1:
        parser.error(f"--warmup_share {args.warmup_share}: give a share below 1")
    if args.strategy.startswith("fsdp") and args.gradient_clip:
        parser.error(
            "--strategy fsdp cannot clip the norm of gradients that are spread over devices: --gradient_clip 0"
        )
    if getattr(args, "teacher", "cached") == "online" and args.num_workers:
        parser.error("--teacher online is asked where the student trains: add --num_workers 0")
    if args.resume not in (None, "auto") and args.load_checkpoint:
        parser.error("--resume continues a run with its own weights; leave out --load_checkpoint")
    if args.resume and args.dry_run:
        parser.error("--dry_run says what a new run costs; leave out --resume")
    for name in ("picture_cache", "vision_cache"):
        if getattr(args, name, False) and args.augmentation:
            parser.error(f"--augmentation makes every picture anew: leave out --{name}")
    if args.picture_cache is None:
        args.picture_cache = args.miniature and not args.augmentation
    for name in ("export", "save_final_pt"):
        path = getattr(args, name)
        if path is not None and path.exists():
            parser.error(f"--{name} {path}: is there already; give a new path")
    return args


def need_checkpoint(parser: argparse.ArgumentParser, args: argparse.Namespace, experiment: str) -> None:
    """Stop unless it is said which checkpoint of `experiment` (a folder below distillation/) this phase starts from.

    --from_stock says that it starts from none.
    """
    if args.from_stock and args.load_checkpoint:
        parser.error("--from_stock leaves the phases before out; leave out --load_checkpoint")
    resumed = args.resume not in (None, "auto")  # auto may find nothing to continue
    if not (args.load_checkpoint or resumed or args.from_stock):
        parser.error(
            f"--load_checkpoint is needed: this script starts from a checkpoint of {experiment}; alone it takes the best one. "
            f"To make one: python distillation/{experiment}/train_online_kd.py{' --miniature' * args.miniature}"
            f"{' --teacher_checkpoint' * bool(args.teacher_checkpoint)}"
        )
