"""Run plumbing that the experiments share: flags, run folders, checkpoints, callbacks, the Trainer.

Models, losses, optimizer and schedule are not here: they are the experiment, and stand in its script.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.io import CheckpointIO

from dataset.datamodule import SUNRGBDDataModule
from dataset.depth import ENCODINGS
from dataset.miniature.world import ensure_world
from dataset.pictures import DEPTH_SOURCES, ImageSettings, PictureCache, picture_key
from dataset.processor import IMAGE_TOKENS, ImageTextProcessor
from distillation.models import (
    TEACHER_NAME,
    count_parameters,
    export_model,
    load_trained_state,
    student_state,
    tower_features,
    trained_state,
    vision_tower,
)
from utils import (
    ROOT,
    ProgressLine,
    UserError,
    atomic_path,
    checksum_path,
    checksummed_path,
    data_root,
    duration,
    git_commit,
    locked,
    matches_checksum,
    outputs_root,
    progress,
    write_json,
)

RUN_NAME_VARIABLE = "RUN_NAME_OF_FIRST_PROCESS"
OPEN_FILES = 2**16  # far more than an update of a thousand micro-batches needs
NAMED_RUNS = 5  # in the message about one that is not there
EXPERIMENTS = {  # --kd_model_type -> folder below distillation/
    "baseline_depth": "baseline_depth",
    "baseline_rgb05b": "baseline_rgb05b",
    "baseline_rgb7b": "baseline_rgb7b",
    "double_trouble": "knowledge_distillation7b_double_trouble/phase{phase}",
    "feature_based": "knowledge_distillation7b_feature_based",
    "logit_based": "knowledge_distillation7b_logit_based",
}
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


@dataclass(frozen=True)
class Run:
    """Where one run of an experiment writes."""

    experiment: Path  # <MAIN_ROOT_DATA_DIR>/<experiment>
    name: str
    record: dict[str, Any]  # plain scalars: what was run, with which settings; goes into every checkpoint
    resume_from: Path | None = None

    @property
    def checkpoints(self) -> Path:
        """`<experiment>/checkpoints/<run>`."""
        return self.experiment / "checkpoints" / self.name

    @property
    def logs(self) -> Path:
        """`<experiment>/tensorboard_logs/<run>`."""
        return self.experiment / "tensorboard_logs" / self.name


def start_run(args: argparse.Namespace, script: str, student: ImageSettings) -> Run:
    """Choose the folders of a new run, or find the one to continue. Nothing is written yet.

    Raises:
        UserError: there is no data, the run folder is in use, or there is nothing to resume.
    """
    data_root(args.miniature)  # before minutes are spent on loading a model
    probe(args)
    pl.seed_everything(args.seed, verbose=False)  # before adapters are initialised
    path = Path(script).resolve()
    experiment = outputs_root(path.parent)
    record = plain(vars(args)) | dataclasses.asdict(student)
    record |= {"script": path.relative_to(ROOT).as_posix(), "git_commit": git_commit()}
    if args.resume and (last := _resume_checkpoint(args, experiment)):
        return Run(experiment, last.parent.name, record, resume_from=last)
    # Lightning starts this script once more for each further device; those processes join the run of the first. A launcher's
    # know their rank among all machines.
    further = int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK", "0")) > 0
    joined = os.environ.get(RUN_NAME_VARIABLE) if further else None
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not joined
    if launched and not args.run_name:
        raise UserError("--run_name: give one; processes that a launcher starts side by side cannot agree on a name")
    name = args.run_name or joined or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    os.environ[RUN_NAME_VARIABLE] = name
    run = Run(experiment, f"miniature_{name}" if args.miniature else name, record)
    if run.checkpoints.exists() and not args.dry_run and not further:
        raise UserError(f"--run_name {name}: {run.checkpoints} is there already; give another name, or --resume auto")
    return run


def probe(args: argparse.Namespace) -> pl.Trainer:
    """A Trainer that tells the number of processes and this one's device.

    Raises:
        UserError: this machine cannot do what the flags ask for.
    """
    quieten()
    try:
        return pl.Trainer(
            precision=resolve_precision(args.precision, args.accelerator),
            accelerator=args.accelerator,
            devices=args.devices,
            num_nodes=args.num_nodes,
            strategy=args.strategy,
            logger=False,
            enable_checkpointing=False,
        )
    except Exception as error:  # Lightning raises many types for flags that it does not know or cannot combine
        raise UserError(
            f"--accelerator {args.accelerator} --devices {args.devices} --strategy {args.strategy} --precision "
            f"{args.precision}: not possible here ({error})"
        ) from error


def frozen_dtype(precision: str, accelerator: str = "auto") -> torch.dtype:
    """Of weights that stay frozen: that in which the step computes anyway, which may halve their memory."""
    return half_dtype(resolve_precision(precision, accelerator)) or torch.float32


def half_dtype(precision: str) -> torch.dtype | None:
    """What autocast computes in under a Lightning precision; None without autocast."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as str, int, float, bool or None: anything else would make a checkpoint unloadable with weights_only."""
    return {k: v if isinstance(v, (str, int, float, bool, type(None))) else str(v) for k, v in values.items()}


def _resume_checkpoint(args: argparse.Namespace, experiment: Path) -> Path | None:
    if args.resume != "auto":
        if not Path(args.resume).is_file():
            raise UserError(f"--resume {args.resume}: no such file")
        return Path(args.resume).resolve()
    runs = _runs(experiment, miniature=args.miniature)
    if args.run_name:
        runs = [run for run in runs if run.name.removeprefix("miniature_") == args.run_name]
    found = [run / "last.ckpt" for run in runs if (run / "last.ckpt").is_file()]
    print("--resume auto: " + (f"continuing {found[-1]}" if found else "no checkpoint to continue, starting a new run"))
    return found[-1] if found else None


def _runs(experiment: Path, *, miniature: bool) -> list[Path]:
    """Checkpoint folders of an experiment, oldest first; miniature and real runs are never mixed."""
    folders = [p for p in (experiment / "checkpoints").glob("*") if p.name.startswith("miniature_") == miniature]
    return _oldest_first(folders)


def _oldest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted((p for p in folders if p.is_dir()), key=lambda p: p.stat().st_mtime)


def experiment_folder(name: str, phase: int | None = None) -> Path:
    """Where the experiment `--kd_model_type name` (and `--phase_no phase`) writes."""
    return outputs_root(ROOT / "distillation" / EXPERIMENTS[name].format(phase=phase or 3))


def find_checkpoint(name: str, folder: Path) -> Path:
    """The checkpoint that a user's flag means: a path, a run's folder or bare name (its best one), or a bare file name.

    Args:
        name: what was given.
        folder: bare names are looked up in the checkpoints folders below.

    Raises:
        UserError: nothing fits, or several do.
    """
    path = Path(name)
    if path.name == name and not path.is_file():
        found = sorted(folder.rglob(f"checkpoints/{name}")) + sorted(folder.rglob(f"checkpoints/*/{name}"))
        found = found or [path] * path.is_dir()
        if not found:
            runs = _oldest_first(folder.rglob("checkpoints/*"))[-NAMED_RUNS:]
            newest = ", ".join(dict.fromkeys(run.name for run in reversed(runs))) or "none"
            raise UserError(
                f"{name}: no such file, and no such run or checkpoint below {folder}; newest runs there: {newest}"
            )
        if len(found) > 1:
            raise UserError(f"{name}: several have this name; give the path: {', '.join(map(str, found))}")
        path = found[0]
    if not path.is_dir():
        return path  # read_checkpoint says what is wrong with it
    best = sorted(path.glob("best-*.ckpt"))
    if not best:
        raise UserError(f"{path}: no best-*.ckpt in this folder; give a checkpoint or the folder of a run")
    return max(best, key=lambda checkpoint: (_score(checkpoint), checkpoint.stat().st_mtime))


def _score(checkpoint: Path) -> float:
    return float(checkpoint.stem.rsplit("score", 1)[1])


def best_checkpoint(experiment: Path, *, miniature: bool) -> Path:
    """The checkpoint with the highest validation score among all runs of an experiment.

    Raises:
        UserError: there is none; names the command that makes one.
    """
    found = [p for run in _runs(experiment, miniature=miniature) for p in run.glob("best-*.ckpt")]
    if not found:
        scripts = sorted(
            (ROOT / "distillation" / experiment.relative_to(outputs_root(ROOT / "distillation"))).glob("*.py")
        )
        command = f"python {scripts[0].relative_to(ROOT)}" if scripts else "a training script"
        raise UserError(
            f"no checkpoint below {experiment / 'checkpoints'}; make one with: {command}{' --miniature' * miniature}"
        )
    return max(found, key=lambda p: (_score(p), p.stat().st_mtime))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, verified against its checksum, without running any code that it might contain.

    Raises:
        UserError: missing, damaged, or not a checkpoint that our scripts wrote.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    if matches_checksum(path) is False:
        raise UserError(f"{path}: damaged, its contents do not match its checksum; use another checkpoint")
    try:
        # Memory-mapped: an evaluation reads the weights and leaves the optimizer's moments on disk.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a dozen types for damaged and foreign files
        raise UserError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(checkpoint, dict) or "script" not in checkpoint.get("hyper_parameters", {}):
        raise UserError(
            f"{path}: not a checkpoint of this project's training scripts (no hyper_parameters.script in it)"
        )
    return checkpoint


class SafeCheckpointIO(CheckpointIO):
    """Writes beside the target and renames, with a checksum; a full disk or a kill never costs the previous file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises UserError when weights are not finite, OSError when the disk is full or not writable."""
        path = Path(path)
        for name, value in checkpoint["state_dict"].items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise UserError(f"{path}: not written, {name} is not finite; lower --lr or use another --precision")
        with checksummed_path(path) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `read_checkpoint`."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the checkpoint and its checksum."""
        Path(path).unlink(missing_ok=True)
        checksum_path(Path(path)).unlink(missing_ok=True)


class CheckpointContents(Callback):
    """Student only, the run's record as hyper-parameters, and the position for an exact resume."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace what Lightning would store."""
        kept = {f"student.{name}" for name in trained_state(module.student)}
        others = {k for k in checkpoint["state_dict"] if not k.startswith(("student.", "teacher."))}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept | others}
        checkpoint["hyper_parameters"] = dict(checkpoint.get("hyper_parameters", {})) | self.record
        ready, steps = trainer.fit_loop.epoch_loop.batch_progress.current.ready, trainer.num_training_batches
        checkpoint["position"] = {"batch": ready, "steps": steps, "world_size": trainer.world_size}
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        if 0 < ready < steps and epochs["current"]["processed"] == epochs["current"]["started"]:
            # --max_steps has ended the run inside this epoch, and Lightning counts it as done: the rest would never be read.
            for counts in (epochs["current"], epochs["total"]):
                counts["processed"] -= 1
                counts["completed"] = min(counts["completed"], counts["processed"])
            checkpoint["epoch"] -= 1


class KeyedRandomness(Callback):
    """Seeds every step by (seed, epoch, batch), so that a resumed run draws the same dropout masks without stored state."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the global generators of all devices."""
        key = np.random.SeedSequence((self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))


class FiniteGuard(Callback):
    """Stops before an update with a gradient that is not finite; what was saved before stays good."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        """Raises UserError that names the step and the flags to change."""
        if trainer.precision == "16-mixed":
            return  # the gradient scaler skips such steps on purpose
        norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            raise UserError(
                f"the gradient is not finite at step {trainer.global_step} (epoch {trainer.current_epoch}); nothing was "
                "updated. Start again with a lower --lr or another --precision, from --load_checkpoint if one was saved."
            )


class StopOnSignal(Callback):
    """On SIGTERM or Ctrl-C: finish the step, save last.ckpt, exit with 128 + signal, so that a scheduler requeues."""

    def __init__(self, last: Path) -> None:
        self.last, self.received = last, 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Only a flag is set in the handler: saving inside it could interrupt a save."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, stack: Any) -> None:
        self.received = number

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave after an update (gradients that were only gathered are not stored), but not before a validation."""
        done = batch_idx + 1
        if done % trainer.accumulate_grad_batches == 0 and done < trainer.num_training_batches:
            self._leave_if_asked(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Leave with the epoch validated and its best checkpoint written."""
        self._leave_if_asked(trainer)

    def _leave_if_asked(self, trainer: pl.Trainer) -> None:
        # All ranks leave together: one that went on alone would wait for the others for ever.
        if trainer.strategy.reduce_boolean_decision(bool(self.received), all=False):
            trainer.save_checkpoint(self.last)
            print(f"stopped by a signal; saved {self.last}; continue with --resume auto", file=sys.stderr)
            raise SystemExit(128 + (self.received or signal.SIGTERM))


def undo_averaging(trainer: pl.Trainer, batch: Mapping[str, Any]) -> float:
    """What a micro-batch's part of an update's loss is multiplied by before Lightning gets it.

    Lightning divides every loss by accumulate_grad_batches, also where an epoch's last update has fewer micro-batches, and DDP and
    FSDP average gradients over ranks. Our parts are sums over the number of items in the whole update: they are to be added up, and
    nothing else. A spare micro-batch (see `dataset.sampler`) counts nothing.
    """
    return 0.0 if batch["spare"] else float(trainer.accumulate_grad_batches * trainer.world_size)


class UpdateLog(Callback):
    """Logs the terms of each optimizer update, added up over its micro-batches and ranks.

    `training_step` returns every micro-batch's part of them as `terms`.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up, and log when the update is complete."""
        for name, part in outputs["terms"].items():
            part = part.detach() * (0.0 if batch["spare"] else 1.0)
            self.sums[name] = self.sums[name] + part if name in self.sums else part
        done = batch_idx + 1
        if done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches:
            totals = trainer.strategy.reduce(torch.stack(list(self.sums.values())), reduce_op="sum")
            module.log_dict({f"train/{name}": total for name, total in zip(self.sums, totals, strict=True)})
            self.sums = {}


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the highest score, of equal scores the one with the lowest val/ce."""

    TIE_BREAKER = "val/ce"

    def __init__(self, **options: Any) -> None:
        super().__init__(mode="max", **options)
        self.best_ce = math.inf

    def improves(self, metrics: Mapping[str, Any]) -> bool:
        """Whether these metrics of a validation are better than those of the best checkpoint so far."""
        if self.best_model_score is None:
            return True
        score, best = float(metrics[self.monitor]), float(self.best_model_score)
        return score > best or (score == best and float(metrics[self.TIE_BREAKER]) < self.best_ce)

    def check_monitor_top_k(self, trainer: pl.Trainer, current: torch.Tensor | None = None) -> bool:
        """Lightning asks here whether to save."""
        better = current is not None and self.improves(trainer.callback_metrics)
        if not trainer.strategy.reduce_boolean_decision(better):  # the same on all ranks
            return False
        self.best_ce = float(trainer.callback_metrics[self.TIE_BREAKER])
        return True

    def keep(self, trainer: pl.Trainer, metrics: Mapping[str, Any], path: Path) -> None:
        """Save what the trainer holds as the best, in place of the one before."""
        before, score = self.best_model_path, torch.tensor(float(metrics[self.monitor]))
        self.best_model_path = self.kth_best_model_path = str(path)
        self.best_model_score = self.kth_value = self.current_score = score
        self.best_k_models, self.best_ce = {str(path): score}, float(metrics[self.TIE_BREAKER])
        trainer.save_checkpoint(path)
        if before and before != str(path):
            trainer.strategy.remove_checkpoint(before)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and the cross-entropy."""
        return super().state_dict() | {"best_ce": self.best_ce}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of `state_dict`."""
        super().load_state_dict(state)
        self.best_ce = state["best_ce"]


class Progress(Callback):
    """One line with step, loss, images per second and time left; plain lines when the output is not a terminal."""

    def __init__(self) -> None:
        self.validated_step = -1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start counting; a resumed run starts where it is."""
        per_epoch = trainer.num_training_batches
        total = per_epoch * trainer.max_epochs if trainer.max_epochs > 0 else 10**9
        if trainer.max_steps > 0:
            total = min(total, trainer.max_steps * trainer.accumulate_grad_batches)
        self.done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self.line = ProgressLine("training step", total=total, done=self.done)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Report."""
        self.done += 1
        loss = trainer.callback_metrics.get("train/loss")  # None before the first update

        def said() -> str:
            return f", epoch {trainer.current_epoch + 1}" + ("" if loss is None else f", loss {float(loss):.3f}")

        if trainer.is_global_zero:
            self.line.update(self.done, said)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """One line per validation."""
        self.validated_step = trainer.global_step
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        values = ", ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))
        if trainer.is_global_zero:
            print(f"epoch {trainer.current_epoch + 1}: {values}", flush=True)


def build_data(
    args: argparse.Namespace,
    processor: ImageTextProcessor,
    student: ImageSettings,
) -> SUNRGBDDataModule:
    """The data module of a script's flags, read and checked. The miniature world is rendered on first use."""
    root = data_root(args.miniature)
    if args.miniature and args.dry_run and not root.is_dir():
        raise UserError("--dry_run writes nothing; make the miniature world first: python dataset/miniature/world.py")
    if args.miniature:
        ensure_world(root)
    cache = None
    if args.picture_cache and not args.dry_run:
        folder = outputs_root(ROOT / "distillation" / "picture_cache")
        cache = PictureCache(folder, picture_key(processor, student), student)
    data = SUNRGBDDataModule(
        root=root,
        processor=processor,
        student=student,
        batch_size=args.batch_size,
        accumulate_grad_batches=args.accumulate_grad_batches,
        questions_per_image=getattr(args, "questions_per_image", None),  # phase 1 has no flags about questions
        teacher_questions=getattr(args, "teacher_questions", 0),
        subset_percentage=args.subset_percentage,
        label_fraction=getattr(args, "label_fraction", 1.0),
        augmentation=args.augmentation,
        cache=cache,
        num_workers=args.num_workers,
        seed=args.seed,
    )
    data.setup()
    if cache:
        missing = data.images_per_epoch + len(data.val) - len(cache.store)
        check_disk("--picture_cache", cache.store.folder, data.train[0, 0]["picture"].tiles.nbytes, missing)
    return data


def check_disk(what: str, folder: Path, bytes_each: float, n: int) -> None:
    """Say how much will be written for `n` images of this size. Raises UserError when there is no room."""
    needed = max(n, 0) * bytes_each
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    print(f"{what}: {needed / 1e9:.2f} GB to write into {folder}, {free / 1e9:.0f} GB free")
    if needed > free:
        raise UserError(
            f"{what}: no room in {folder} for {needed / 1e9:.2f} GB; make some, or choose another MAIN_ROOT_DATA_DIR"
        )


def use_vision_cache(student: torch.nn.Module, data: SUNRGBDDataModule, args: argparse.Namespace) -> None:
    """Let a frozen vision tower see every picture once, and train on what it saw, read from disk.

    Exact but for the order of float additions. Features are keyed by the tower's weights, the pictures and the precision; what
    another run has stored is used.

    Raises:
        UserError: the tower trains, or the disk has no room.
    """
    tower = vision_tower(student)
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise UserError("--vision_cache: the vision tower trains here, what it sees changes; leave it out")
    digest = hashlib.sha256()
    for name, weight in sorted(tower.state_dict().items()):
        digest.update(name.encode() + weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    precision = resolve_precision(args.precision, args.accelerator)
    key = picture_key(data.processor, data.student) | {"tower": digest.hexdigest(), "precision": precision}
    cache = PictureCache(outputs_root(ROOT / "distillation" / "vision_cache"), key, data.student)
    device, half = probe(args).strategy.root_device, half_dtype(precision)
    with locked(cache.store.folder), torch.no_grad(), torch.autocast(device.type, half, enabled=half is not None):
        for dataset in (data.train, data.val):
            missing = [i for i in range(len(dataset)) if cache.find(dataset.frame(i)) is None]
            loader = torch.utils.data.DataLoader(
                dataset,
                sampler=[(0, i) for i in missing],
                batch_size=2 * args.batch_size,
                collate_fn=list,
                num_workers=args.num_workers,
            )
            batches = progress(loader, total=len(loader), label="the frozen tower looks, batch")
            places = iter(missing)
            for items in batches:
                pictures = [item["picture"] for item in items]
                tiles = torch.cat([picture.tiles for picture in pictures]).to(device)
                features = (
                    tower_features(student.to(device), tiles).cpu().contiguous().split([len(p.tiles) for p in pictures])
                )
                for picture, seen in zip(pictures, features, strict=True):
                    place = next(places)
                    if place == missing[0]:
                        check_disk("--vision_cache", cache.store.folder, seen.nbytes, len(missing))
                    cache.put(dataset.frame(place), replace(picture, tiles=seen))
    data.use_features(cache)


def train(
    module: pl.LightningModule,
    data: SUNRGBDDataModule,
    run: Run,
    args: argparse.Namespace,
    *,
    monitor: str = "val/exact_match",
    builds_on: str | None = None,
) -> None:
    """Fit, keep the best and the last checkpoint, write what --export and --save_final_pt ask for.

    Args:
        module: has the student as `student`.
        data: with the teacher's outputs where the module needs them.
        run: folders and record.
        args: of the common flags.
        monitor: logged in validation; the best checkpoint is where it is highest.
        builds_on: experiment whose checkpoint this one starts from (a folder below distillation/); None = its own, if any.

    Raises:
        UserError: bad input; the run's earlier checkpoints stay.
    """
    trainable, total = count_parameters(module.student)
    print(
        f"{run.record['script']}: {trainable:,} of {total:,} parameters train; {data.images_per_epoch} images per epoch"
    )
    put_starting_weights(module.student, run, args, builds_on=builds_on)
    if (finished := finished_run(run, args)) is not None:
        if int(os.environ.get("RANK", "0")) == 0:  # behind torchrun all ranks come here
            print(f"{run.name} is finished ({finished['optimizer_steps']} updates); best: {finished['best']}")
            write_outputs(module, data.processor, Path(finished["best"]), args)
        return
    if args.gradient_checkpointing:
        # Reentrant checkpointing would need an input with a gradient, which a frozen tower's does not have.
        module.student.activation_checkpointing_enable({"use_reentrant": False})
    if args.dry_run:
        dry_run(module, data, args)
        return
    if getattr(args, "vision_cache", False):
        use_vision_cache(module.student, data, args)
    allow_open_files()
    start = time.monotonic()
    if run.resume_from:
        data.resume_batch = resume_batch(run.resume_from, args)
    try:
        trainer = build_trainer(args, run, monitor)
        if trainer.is_global_zero:
            write_json(run.logs / "run.json", run.record)
        trainer.fit(module, datamodule=data, ckpt_path=run.resume_from)
    except BaseException:
        if (
            not any(run.checkpoints.glob("*.ckpt")) and not run.resume_from
        ):  # a run that failed before it had anything to keep leaves no trace
            shutil.rmtree(run.checkpoints, ignore_errors=True)
            shutil.rmtree(run.logs, ignore_errors=True)
        raise
    best, score = best_of_run(trainer, module, data, run, monitor)
    summary = {
        "best": str(best),
        monitor: score,
        "optimizer_steps": trainer.global_step,
        "seconds": round(time.monotonic() - start, 1),
        "peak_memory_gib": round(peak_memory_gib(), 2),
    }
    if trainer.is_global_zero:
        write_json(run.logs / "run.json", run.record | summary)
        print(
            f"{trainer.global_step} updates in {duration(summary['seconds'])}, peak memory {summary['peak_memory_gib']} GiB; "
            f"best: {best} ({monitor} {score:.4f})"
        )
        write_outputs(module, data.processor, best, args)


def resume_batch(path: Path, args: argparse.Namespace) -> int:
    """The micro-batch of its epoch with which an interrupted run goes on.

    Raises:
        UserError: it was interrupted inside an epoch on another number of devices, whose micro-batches are others.
    """
    position = read_checkpoint(path)["position"]
    if position["batch"] >= position["steps"]:  # at the end of an epoch
        return 0
    if position["world_size"] != (now := probe(args).world_size):
        raise UserError(
            f"--resume {path}: was interrupted inside an epoch on {position['world_size']} device(s), now there are {now}; go on with as "
            "many until the epoch is done"
        )
    return position["batch"]


def finished_run(run: Run, args: argparse.Namespace) -> dict[str, Any] | None:
    """What run.json says of a resumed run that is finished already; None where there is something left to do."""
    path = run.logs / "run.json"
    if not run.resume_from or not path.is_file():
        return None
    recorded = json.loads(path.read_text(encoding="utf-8"))
    if "best" not in recorded:
        return None
    updates = recorded["optimizer_steps"]
    ended_by_steps = 0 < recorded["max_steps"] <= updates
    enough_epochs = args.max_epochs <= recorded["max_epochs"] and not ended_by_steps
    return recorded if enough_epochs or 0 < args.max_steps <= updates else None


def put_starting_weights(
    student: torch.nn.Module, run: Run, args: argparse.Namespace, *, builds_on: str | None = None
) -> None:
    """Give the student the weights that the run starts from: the resumed run's, a checkpoint's, or the stock ones that it has.

    The one place that decides it, before anything looks at the weights. Lightning restores a resumed run's once more, with the
    optimizer.

    Raises:
        UserError: the checkpoint does not fit, or the resumed run had other settings.
    """
    if run.resume_from:
        checkpoint = read_checkpoint(run.resume_from)
        check_same_run(checkpoint["hyper_parameters"], run)
        run.record["load_checkpoint"] = checkpoint["hyper_parameters"]["load_checkpoint"]
        load_trained_state(student, student_state(checkpoint), origin=str(run.resume_from))
    elif args.load_checkpoint:
        source = outputs_root(ROOT / "distillation" / builds_on) if builds_on else run.experiment
        best = args.load_checkpoint == "best"
        path = (
            best_checkpoint(source, miniature=args.miniature) if best else find_checkpoint(args.load_checkpoint, source)
        )
        load_student(student, path, run.record, builds_on=builds_on)
        run.record["load_checkpoint"] = str(path)


def check_same_run(recorded: Mapping[str, Any], run: Run) -> None:
    """Refuse to continue a run with other settings than it was started with; how it runs and how long may change.

    Raises:
        UserError: names the first setting that differs.
    """
    free = {"resume", "run_name", "git_commit", "export", "save_final_pt", "num_workers", "max_epochs", "max_steps"}
    free |= {"accelerator", "devices", "strategy", "load_checkpoint", "picture_cache", "vision_cache", "teacher"}
    free |= {"gradient_checkpointing", "num_nodes", "any_teacher"}
    free |= {"teacher_val_exact_match"}  # follows from the teacher
    for name in sorted(run.record.keys() - free):
        if recorded.get(name) != run.record[name]:
            raise UserError(
                f"--resume {run.resume_from}: was started with {name} {recorded.get(name)}, now it is {run.record[name]}; "
                "give the same, or start a new run with --load_checkpoint"
            )


def best_of_run(
    trainer: pl.Trainer, module: pl.LightningModule, data: SUNRGBDDataModule, run: Run, monitor: str
) -> tuple[Path, float]:
    """The best checkpoint and its score.

    --max_steps may end a run inside an epoch, after the last validation; then what it ended with is validated now.
    """
    kept = trainer.checkpoint_callback
    validated = [callback.validated_step for callback in trainer.callbacks if isinstance(callback, Progress)]
    if validated != [trainer.global_step]:
        ended_inside = 0 < trainer.fit_loop.epoch_loop.batch_progress.current.ready < trainer.num_training_batches
        epoch = trainer.current_epoch - ended_inside  # which Lightning counts as done
        (metrics,) = trainer.validate(module, dataloaders=data.val_dataloader(), verbose=False)
        if kept.improves(metrics):
            name = f"best-epoch{epoch:02d}-score{metrics[monitor]:.4f}.ckpt"
            kept.keep(trainer, metrics, run.checkpoints / name)
        trainer.save_checkpoint(run.checkpoints / "last.ckpt")
    return Path(kept.best_model_path), float(kept.best_model_score)


def load_student(
    student: torch.nn.Module, path: Path, record: Mapping[str, Any], *, builds_on: str | None = None
) -> None:
    """Put a checkpoint's weights into the student.

    Raises:
        UserError: it is of another student, of other image settings, or not of the experiment that this one builds on.
    """
    checkpoint = read_checkpoint(path)
    theirs = checkpoint["hyper_parameters"]
    origin = Path(theirs["script"]).parent.relative_to("distillation").as_posix()
    if builds_on and origin != builds_on:
        raise UserError(f"--load_checkpoint {path}: is of {origin}; this script builds on {builds_on}")
    for name in (
        "student_name", "lora_rank", "lora_alpha", "modality", "depth_encoding", "depth_source", "image_tokens",
    ):  # fmt: skip
        if theirs.get(name) != record.get(name):
            raise UserError(
                f"--load_checkpoint {path}: trained with {name} {theirs.get(name)}, this run has {record.get(name)}"
            )
    # Another share or another seed has other gold answers: together they would be more than either run may see.
    kept = ("label_fraction", "subset_percentage", "seed")
    if builds_on and min(theirs.get("label_fraction", 1), record.get("label_fraction", 1)) < 1:
        for name in kept if "label_fraction" in theirs else ():
            if theirs[name] != record[name]:
                raise UserError(
                    f"--load_checkpoint {path}: trained with {name} {theirs[name]}, this run has {record[name]}; give the path of "
                    "one that was trained on the same labels"
                )
    if builds_on and theirs.get("teacher_weights") != record["teacher_weights"] and not record["any_teacher"]:
        raise UserError(
            f"--load_checkpoint {path}: was trained with another teacher ({theirs['teacher_checkpoint'] or theirs['teacher_name']}); "
            "give the same one, or add --any_teacher if it is meant"
        )
    load_trained_state(student, student_state(checkpoint), origin=str(path))
    print(f"starting from {path}")


def build_trainer(args: argparse.Namespace, run: Run, monitor: str) -> pl.Trainer:
    """Loggers, checkpoints and callbacks, the same for every experiment."""
    quieten()
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    best = BestCheckpoint(
        dirpath=run.checkpoints,
        filename=f"best-epoch{{epoch:02d}}-score{{{monitor}:.4f}}",
        auto_insert_metric_name=False,
        monitor=monitor,
        enable_version_counter=False,
        save_on_train_epoch_end=False,  # with the validation, before StopOnSignal may end the epoch
    )
    # ModelCheckpoint(save_last=True) writes last.ckpt only when there is a new best one.
    last = ModelCheckpoint(dirpath=run.checkpoints, filename="last", enable_version_counter=False)
    where = dict(save_dir=run.logs.parent, name="", version=run.name)
    metrics = run.logs / "metrics.csv"
    if metrics.is_file():  # of the run that is resumed; CSVLogger would delete it
        metrics.rename(run.logs / f"metrics.{len(list(run.logs.glob('metrics*.csv')))}.csv")
    return pl.Trainer(
        max_epochs=args.max_epochs,
        max_steps=args.max_steps,
        accumulate_grad_batches=args.accumulate_grad_batches,
        gradient_clip_val=args.gradient_clip or None,
        precision=resolve_precision(args.precision, args.accelerator),
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=args.strategy,
        logger=[TensorBoardLogger(**where), CSVLogger(**where)],
        callbacks=[
            best,
            last,
            CheckpointContents(run.record),
            KeyedRandomness(args.seed),
            FiniteGuard(),
            StopOnSignal(run.checkpoints / "last.ckpt"),
            UpdateLog(),
            Progress(),
        ],
        plugins=[SafeCheckpointIO()],
        use_distributed_sampler=False,  # MicroBatchSampler shares the batches out
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )


def quieten() -> None:
    """Leave out what libraries say about each other: hints, and deprecations that only they can mend."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for text in (
        ".*is_gradient_checkpointing.*",
        ".*LeafSpec.*",
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*but have no `val_dataloader`.*",  # --dry_run trains only
        ".*could not find the monitored key.*",  # best_of_run validates what --max_steps ends
        ".*irectory .* exists and is not empty.*",  # two loggers share a folder, a resumed run its checkpoints
    ):
        warnings.filterwarnings("ignore", message=text)


def resolve_precision(name: str, accelerator: str = "auto") -> str:
    """`auto` -> bf16-mixed on a GPU that has bfloat16, else 32-true: never pure bf16, which rounds small updates away."""
    if name != "auto":
        return name
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if fast and accelerator != "cpu" else "32-true"


def write_outputs(
    module: pl.LightningModule, processor: ImageTextProcessor, best: Path, args: argparse.Namespace
) -> None:
    """--save_final_pt and --export, both of the best checkpoint."""
    if not (args.save_final_pt or args.export):
        return
    state = student_state(read_checkpoint(best))
    load_trained_state(module.student, state, origin=str(best))
    if args.save_final_pt:
        with atomic_path(args.save_final_pt) as part:
            torch.save(state, part)
        print(f"wrote {args.save_final_pt}")
    if args.export:
        export_model(module.student, processor, args.export)
        print(f"wrote {args.export}")


def dry_run(module: pl.LightningModule, data: SUNRGBDDataModule, args: argparse.Namespace) -> None:
    """Two real steps on the real device without writing anything; prints sizes, memory, times and disk needs."""
    data.accumulate_grad_batches = 1  # a step is a micro-batch here
    trainer = pl.Trainer(
        max_steps=2,
        precision=resolve_precision(args.precision, args.accelerator),
        accelerator=args.accelerator,
        devices=1,  # what one of them will do
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[timer := _StepTimer()],
    )
    trainer.fit(module, train_dataloaders=data.train_dataloader())
    state = trained_state(module.student)
    checkpoint_gib = (
        sum(v.numel() * v.element_size() for v in state.values()) / 2**30 * 3
    )  # weights and two Adam moments
    world_size = probe(args).world_size
    batches = math.ceil(data.images_per_epoch / (args.batch_size * world_size)) * args.max_epochs
    if args.max_steps > 0:
        batches = min(batches, args.max_steps * args.accumulate_grad_batches)
    print(
        f"tokens in a row of a batch, padding included: {timer.tokens}; image tokens: {timer.image_tokens}\n"
        f"peak memory: {peak_memory_gib():.2f} GiB\n"
        f"one step of {args.batch_size} images: {timer.seconds:.2f} s; {batches} steps on {world_size} device(s): "
        f"{duration(batches * timer.seconds)}\n"
        f"disk: 2 checkpoints of at most {checkpoint_gib:.2f} GiB"
    )


class _StepTimer(Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        ids = batch["text"]["input_ids"]
        self.tokens = ids.shape[1]
        self.image_tokens = int((ids[0] == module.student.config.image_token_id).sum())
        self.start = time.monotonic()

    def on_train_batch_end(self, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the GPU computes on while Python is done
        self.seconds = time.monotonic() - self.start  # the second step's: the first one warms up


def allow_open_files() -> None:
    """As many as this process may have: batches of a whole update wait in shared memory, a file for every tensor of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, OPEN_FILES) if hard != resource.RLIM_INFINITY else OPEN_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def peak_memory_gib() -> float:
    """The GPU's peak when there is one, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
