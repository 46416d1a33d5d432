"""The flags that training scripts share, checked where they are declared."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dataset.inputs.depth_encodings import ENCODINGS
from dataset.inputs.pictures import DEPTH_SOURCES
from dataset.inputs.processor import IMAGE_TOKENS
from distillation.export import DTYPES, read_description
from distillation.losses import DIVERGENCES
from distillation.models import MINIATURE_STUDENT, MINIATURE_TEACHER, TEACHER_NAME
from distillation.run.folders import MINIATURE
from distillation.run.sharding import FSDP2
from utils import at_least, positive, share, share_or_none

LONGEST_RUN_NAME = 100  # bytes: file systems take 255, and prefixes and suffixes come to it

# Learning rates here and in the scripts are those that a search on validation questions chose:
# benchmarks/reproduce/rates.md.
MINIATURE_DEFAULTS = dict(
    batch_size=8,
    accumulate_grad_batches=1,
    max_epochs=3,
    image_tokens="one_tile",
    lr=6.25e-5,
    vision_lr=1.5625e-5,
    num_workers=1,
    student_name=MINIATURE_STUDENT,
    teacher_name=MINIATURE_TEACHER,
)
# The search, of five epochs, chose lr=1.25e-4 here. The demo trains three: .481 on val with it, .496 with this one.
MINIATURE_DEPTH_RATES = dict(lr=2.5e-4, vision_lr=2.5e-4)
# Ten times that of fine-tuning, for every student whose tower was pretrained on color pictures and now sees depth: a
# control that learns to see more slowly than its rivals would flatter them.
DEPTH_VISION_LR = 2e-5


def add_common_args(parser: argparse.ArgumentParser, *, leave_out: Sequence[str] = ()) -> None:
    """The flags that every training script has, with the defaults for real SUN RGB-D, but those that it could not obey.

    Shared code reads some flags that not every script has: --teacher, --teacher_checkpoint, --teacher_questions,
    --any_teacher, --vision_cache, --depth_degradation, and what is left out. Where a script has none of these, its
    arguments hold None, False for a switch, or 0.

    Args:
        parser: of a training script.
        leave_out: flags that this script does not have.
    """
    parser.set_defaults(teacher=None, teacher_checkpoint=None, teacher_questions=None, any_teacher=False)
    parser.set_defaults(
        vision_cache=False, depth_degradation=0.0, **{flag.removeprefix("--"): None for flag in leave_out}
    )

    def add(flag: str, *, help: str, **options: Any) -> None:
        if flag not in leave_out:
            shown = "" if options.get("default") is None else " (%(default)s)"
            parser.add_argument(flag, help=help + shown, **options)

    for group in (_add_data_args, _add_optimization_args, _add_machine_args, _add_run_args):
        group(add)


def _add_data_args(add: Callable[..., None]) -> None:
    add("--miniature", action="store_true", help="use the built-in world and tiny models, with sizes that suit them")
    add("--subset_percentage", type=share, default=1.0, help="share of the training images to use, in (0, 1]")
    add("--label_fraction", type=share, default=1.0, help="share of the training questions with a label, in (0, 1]")
    add("--questions_per_image", type=at_least(1), help="limit on the questions of an image per step (default: all)")
    add(
        "--augmentation",
        action="store_true",
        help="color jitter on RGB, noise and holes on depth, the same random crop and roll on both",
    )
    add(
        "--picture_cache",
        action=argparse.BooleanOptionalAction,
        help="keep the student's preprocessed pictures on disk (default: with --miniature, unless they change)",
    )
    add(
        "--image_tokens",
        choices=IMAGE_TOKENS,
        default="anyres",
        help="a grid of tiles and an overview, one tile and an overview, or one tile alone",
    )
    add("--num_workers", type=at_least(0), default=4, help="number of data loading processes")


def _add_optimization_args(add: Callable[..., None]) -> None:
    add("--batch_size", type=at_least(1), default=2, help="images per step and device")
    add("--accumulate_grad_batches", type=at_least(1), default=16, help="steps per optimizer update")
    add("--max_epochs", type=at_least(1), default=5, help="passes over the training images")
    add("--max_steps", type=step_limit, default=-1, help="stop after so many optimizer updates; -1 = no limit")
    add("--lr", type=at_least(0.0), default=1e-5, help="peak learning rate of language model and projector")
    add("--vision_lr", type=at_least(0.0), default=2e-6, help="peak learning rate of the vision tower")
    add("--weight_decay", type=at_least(0.0), default=0.0, help="weight decay of AdamW, on all weights that train")
    add(
        "--warmup_share",
        type=at_least(0.0, below=1.0),
        default=0.03,
        help="share of the updates in which the learning rate rises",
    )
    add("--optimizer_bits", type=int, choices=(32, 8), default=32, help="of AdamW's moments; 8 needs bitsandbytes")
    add("--gradient_clip", type=at_least(0.0), default=1.0, help="largest gradient norm; 0 = no clipping")
    add("--seed", type=at_least(0), default=0, help="seed of data order, augmentation, adapters and dropout")


def _add_machine_args(add: Callable[..., None]) -> None:
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: the same gradients in less memory, a third slower",
    )
    add("--precision", default="auto", help="a Lightning precision; auto = bf16-mixed where the GPU can, else 32-true")
    add("--accelerator", default="auto", help="a Lightning accelerator: auto, cpu, gpu, ...")
    add("--devices", default="auto", help="number or list of devices of each machine, as Lightning takes it")
    add("--num_nodes", type=at_least(1), default=1, help="number of machines, with torchrun on each of them")
    add("--strategy", default="auto", help="a Lightning strategy: auto, ddp, ...; or fsdp2")


def _add_run_args(add: Callable[..., None]) -> None:
    add(
        "--load_checkpoint",
        nargs="?",
        const="best",
        help="start from these weights: a path or a run's name; without one: the best of the phase before, else of "
        "this experiment",
    )
    add(
        "--resume",
        help="continue an interrupted run exactly: a run's name, a path, or auto (the newest or that of --run_name, a "
        "new one if there is none)",
    )
    add("--run_name", type=run_name, help="name of the run's folders (default: the time it started)")
    add("--export", type=new_path, help="write the best student as a Hugging Face folder to this path")
    add(
        "--export_dtype",
        choices=tuple(DTYPES),
        help="number format of the exported weights (float32: the very answers of the checkpoint)",
    )
    add(
        "--save_final_pt",
        type=new_path,
        help="write the best student's weights as a plain state dict to this path (with LoRA: the adapters)",
    )
    add("--dry_run", action="store_true", help="say what a run would cost, without weights or data; write nothing")
    add("--measure", action="store_true", help="with --dry_run: make two real steps, too")


def step_limit(text: str) -> int:
    """An argparse type: at least 1, or -1 for no limit."""
    if text == "-1":
        return -1
    try:
        return at_least(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or -1 for no limit") from None


def run_name(text: str) -> str:
    """An argparse type: the name of a folder that stays where it belongs, and that a shell takes without quotes."""
    if text.startswith(MINIATURE):
        raise argparse.ArgumentTypeError(f"{text[:LONGEST_RUN_NAME]}: --miniature adds {MINIATURE}; leave that out")
    if text in ("auto", "best"):
        raise argparse.ArgumentTypeError(f"{text} means something else where runs are named; give another name")
    if not re.fullmatch(r"\w[\w.+=@-]*", text) or len(text.encode()) > LONGEST_RUN_NAME:
        raise argparse.ArgumentTypeError(
            f"{text[:LONGEST_RUN_NAME]!r} cannot name a folder of its own; give at most {LONGEST_RUN_NAME} letters, "
            "digits and _ . + = @ -, first a letter or a digit"
        )
    return text


def new_path(text: str) -> Path:
    """An argparse type: a path where nothing is yet."""
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} is there already; give a new path")
    return Path(text)


def add_depth_args(parser: argparse.ArgumentParser) -> None:
    """The flags of every script whose student sees depth; its tower's rate is higher, since depth is new to it."""
    if parser.get_default("vision_lr") is not None:  # where the tower trains
        parser.set_defaults(vision_lr=DEPTH_VISION_LR)
    add = parser.add_argument
    add(
        "--depth_encoding",
        choices=tuple(ENCODINGS),
        default="metric_log3",
        help="how depth becomes 3 channels (%(default)s)",
    )
    add(
        "--depth_source",
        choices=DEPTH_SOURCES,
        default="raw",
        help="depth as recorded, or bfx: with filled holes (%(default)s)",
    )
    add(
        "--depth_degradation",
        type=share_or_none,
        default=0.0,
        help="share of the training pictures, others in each epoch, that get holes, a coarser resolution or a shorter "
        "range at random, in [0, 1] (%(default)s)",
    )


def add_teacher_args(parser: argparse.ArgumentParser, *, asks: bool = True) -> None:
    """The flags of every script that distills: which teacher and, where its answers count, its number of questions."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--teacher_name", default=TEACHER_NAME, help="hub id or folder of a stock teacher (%(default)s)")
    which.add_argument(
        "--teacher_checkpoint",
        nargs="?",
        const="best",
        help="a teacher fine-tuned by baseline_rgb7b: a path or a run's name; without one: the best",
    )
    parser.add_argument(
        "--teacher_bits",
        choices=("auto", "16", "4"),
        default="auto",
        help="bits of the teacher's language model; auto = those of its checkpoint, else 4 where 16 do not fit the GPU",
    )
    parser.add_argument(
        "--any_teacher",
        action="store_true",
        help="accept a teacher other than the phase before had, or one tuned on labels that the student may not see",
    )
    parser.add_argument(
        "--teacher",
        choices=("cached", "online"),
        default="cached",
        help="compute its outputs once and store them, or again in every step: the same loss, slow (%(default)s)",
    )
    if asks:
        parser.add_argument(
            "--teacher_questions",
            type=at_least(0),
            default=0,
            help="number of further questions per image and step that the teacher answers (%(default)s)",
        )


def add_vision_cache_arg(parser: argparse.ArgumentParser) -> None:
    """The flag of every script whose vision tower is frozen."""
    parser.add_argument(
        "--vision_cache", action="store_true", help="compute the frozen vision tower's features once and store them"
    )


def add_divergence_args(parser: argparse.ArgumentParser) -> None:
    """The flags of every script with a KL term."""
    add = parser.add_argument
    add(
        "--divergence",
        choices=tuple(DIVERGENCES),
        default="forward_kl",
        help="the KL term: KL(teacher || student), KL(student || teacher), or the mean of KL(teacher || m) and "
        "KL(student || m), m their average (%(default)s)",
    )
    add("--kl_weight", type=at_least(0.0), default=1.0, help="weight of the KL term (%(default)s)")
    add("--temperature", type=positive, default=1.0, help="temperature T that softens both distributions (%(default)s)")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None, **miniature_defaults: Any) -> argparse.Namespace:
    """Parse, and stop where flags contradict each other. What is given explicitly wins over all defaults.

    Args:
        parser: of a training script.
        argv: the command line; None = this process's.
        **miniature_defaults: with --miniature, instead of the defaults above or besides them; of both only those
            of flags that the script has a default for.
    """
    args = parser.parse_args(argv)
    if args.miniature:
        sees_depth = parser.get_default("depth_encoding") is not None
        defaults = MINIATURE_DEFAULTS | (MINIATURE_DEPTH_RATES if sees_depth else {}) | miniature_defaults
        parser.set_defaults(**{name: v for name, v in defaults.items() if parser.get_default(name) is not None})
        args = parser.parse_args(argv)
    args = see_as_exported(parser, args, argv)
    if args.export_dtype and not args.export:
        parser.error("--export_dtype goes with --export")
    args.export_dtype = args.export_dtype or "float32"
    if args.strategy.startswith("fsdp") and args.strategy != FSDP2:
        parser.error(f"--strategy {args.strategy}: cannot call parts of a model by themselves; use --strategy {FSDP2}")
    if args.optimizer_bits == 8 and args.strategy == FSDP2:
        parser.error(f"--optimizer_bits 8: such moments cannot be shared out; leave out --strategy {FSDP2}")
    if args.teacher == "online" and args.num_workers:
        parser.error("--teacher online computes its outputs where the student trains: add --num_workers 0")
    if args.resume not in (None, "auto") and args.load_checkpoint:
        parser.error("--resume continues a run with its own weights; leave out --load_checkpoint")
    if args.measure and not args.dry_run:
        parser.error("--measure goes with --dry_run")
    if args.resume and args.dry_run:
        parser.error("--dry_run says what a new run costs; leave out --resume")
    for name, given in (("picture_cache", args.picture_cache), ("vision_cache", args.vision_cache)):
        for flag in ("augmentation", "depth_degradation"):
            if given and getattr(args, flag):
                parser.error(f"--{flag} changes pictures in every epoch: leave out --{name}")
    if args.picture_cache is None:
        args.picture_cache = args.miniature and not (args.augmentation or args.depth_degradation)
    return args


def see_as_exported(
    parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Parse again with the image settings of an exported student or teacher; stop where a flag contradicts them.

    A student that was exported from another modality starts to learn this script's, with this script's settings.
    """
    sees_depth = "depth_encoding" in args
    for flag, modality in (("student_name", "depth" if sees_depth else "rgb"), ("teacher_name", "rgb")):
        name = getattr(args, flag, None)
        description = read_description(name) if name else None
        if description is None:
            continue
        if description["sees"]["modality"] != modality:
            if flag == "teacher_name":
                parser.error(f"--teacher_name {name}: sees {description['sees']['modality']}, a teacher sees RGB")
            continue
        shared = ("depth_encoding", "depth_source", "image_tokens") if flag == "student_name" else ("image_tokens",)
        settings = {setting: description["sees"][setting] for setting in shared if setting in vars(args)}
        parser.set_defaults(**settings)
        args = parser.parse_args(argv)
        for setting, value in settings.items():
            if getattr(args, setting) != value:
                parser.error(f"--{setting} {getattr(args, setting)}: {name} was trained with {value}; leave it out")
    return args


def need_checkpoint(parser: argparse.ArgumentParser, args: argparse.Namespace, experiment: str) -> None:
    """Stop unless it is said which checkpoint of `experiment` (a folder below distillation/) this phase starts from.

    --from_stock says that it starts from none.
    """
    if args.from_stock and args.load_checkpoint:
        parser.error("--from_stock leaves the phases before out; leave out --load_checkpoint")
    resumed = args.resume not in (None, "auto")  # auto may find nothing to continue
    if not (args.load_checkpoint or resumed or args.from_stock):
        same_flags = " --miniature" * args.miniature + " --teacher_checkpoint" * bool(args.teacher_checkpoint)
        parser.error(
            f"--load_checkpoint is needed: this script starts from a checkpoint of {experiment}; alone it takes the "
            f"best one. To make one: python distillation/{experiment}/train_online_kd.py{same_flags}"
        )
