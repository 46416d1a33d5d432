"""Checkpoints: read, written, handed over, turned into what --export and --save_final_pt ask for."""

import argparse
import math
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.plugins.io import CheckpointIO
from torch.distributed.fsdp import FSDPModule

from dataset.inputs.processor import ImageTextProcessor
from distillation.export import DTYPES, describe_student, export_model
from distillation.models import count_parameters, load_trained_state, restore_student, student_state, trained_state
from distillation.run.data import check_disk
from distillation.run.folders import Run, chosen_checkpoint
from distillation.run.machine import frozen_dtype, probe
from distillation.run.record import check_record, check_resumable, check_weights
from utils import (
    ROOT,
    UserError,
    atomic_path,
    checksum_path,
    checksummed_path,
    existing_folder,
    is_first_process,
    matches_checksum,
    outputs_root,
    printable,
    reason,
)

KEPT = 2  # checkpoints: the best one and the last one
CHECKPOINT_SHARE = 3  # times the weights that train: they and two Adam moments
# What runs did that are older than a flag.
ADDED_FLAGS = {
    "depth_degradation": 0.0,
    "divergence": "forward_kl",
    "base_bits": 16,
    "teacher_bits": 16,
    "optimizer_bits": 32,
}


def read_checkpoint(path: Path, *, need_checksum: bool = False) -> dict[str, Any]:
    """A checkpoint of ours, verified against its checksum, without running any code that it might contain.

    Args:
        path: the file.
        need_checksum: refuse a file without a checksum beside it. Otherwise that is said, and the file read.

    Raises:
        UserError: missing, damaged, not a checkpoint that our scripts wrote, or one that was changed since.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    whole = matches_checksum(path)
    if whole is False:
        raise UserError(f"{path}: damaged, its contents do not match its checksum; use another checkpoint")
    if whole is None:
        unverified = f"{path}: has no checksum beside it ({checksum_path(path).name}), so damage would go unnoticed"
        if need_checksum:
            raise UserError(unverified)
        if is_first_process():
            print(printable(f"warning: {unverified}"), file=sys.stderr)
    try:
        # Memory-mapped: an evaluation reads the weights and leaves the optimizer's moments on disk.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:  # torch advises to let the code run
        raise UserError(
            f"{path}: not a readable checkpoint; it is damaged, or holds objects that could run code. Only tensors and "
            "plain values are read"
        ) from error
    except Exception as error:  # torch raises a dozen types for damaged and foreign files
        raise UserError(f"{path}: not a readable checkpoint ({reason(error)})") from error
    recorded = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(recorded, dict) or "script" not in recorded:
        raise UserError(
            f"{path}: not a checkpoint of this project's training scripts (no hyper_parameters.script in it)"
        )
    check_record(recorded, path)
    check_weights(checkpoint.get("state_dict"), path)
    return checkpoint


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in nested mappings and sequences: nearly the size of a checkpoint with them."""
    if isinstance(values, torch.Tensor):
        return values.nbytes
    if isinstance(values, Mapping):
        values = list(values.values())
    return sum(map(tensor_bytes, values)) if isinstance(values, (list, tuple)) else 0


class SafeCheckpointIO(CheckpointIO):
    """Writes beside the target and renames, with a checksum; a full disk or a kill never costs the previous file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises UserError when weights are not finite, or the disk is full or not writable."""
        path = Path(path)
        for name, value in checkpoint["state_dict"].items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise UserError(f"{path}: not written, {name} is not finite; lower --lr or use another --precision")
        with checksummed_path(path, size=tensor_bytes(checkpoint)) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `read_checkpoint`."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the checkpoint and its checksum."""
        Path(path).unlink(missing_ok=True)
        checksum_path(Path(path)).unlink(missing_ok=True)


def stands_inside_epoch(trainer: pl.Trainer) -> bool:
    """Whether some of an epoch's micro-batches have been read, and not all of them."""
    return 0 < trainer.fit_loop.epoch_loop.batch_progress.current.ready < trainer.num_training_batches


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
        checkpoint["position"] = {
            "batch": trainer.fit_loop.epoch_loop.batch_progress.current.ready,
            "steps": trainer.num_training_batches,
            "world_size": trainer.world_size,
        }
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        if stands_inside_epoch(trainer) and epochs["current"]["processed"] == epochs["current"]["started"]:
            # --max_steps has ended the run inside this epoch, and Lightning counts it as done: the rest would never be
            # read.
            for counts in (epochs["current"], epochs["total"]):
                counts["processed"] -= 1
                counts["completed"] = min(counts["completed"], counts["processed"])
            checkpoint["epoch"] -= 1


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the highest score, of equal scores the one with the lowest val/ce."""

    TIE_BREAKER = "val/ce"

    def __init__(self, **options: Any) -> None:
        super().__init__(mode="max", **options)
        self.best_ce = math.inf
        self.goes_on_here = False

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
        # The path before may be a stranger's, out of a checkpoint: nothing outside of this run's folder is removed.
        if before and before != str(path) and Path(before).resolve().parent == Path(self.dirpath).resolve():
            trainer.strategy.remove_checkpoint(before)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save; and where a better one was saved, remove the one that the run goes on from, which Lightning keeps."""
        super().on_validation_end(trainer, module)
        resumed = Path(trainer.ckpt_path or "")
        ours = resumed.name.startswith("best-") and resumed.resolve().parent == Path(self.dirpath).resolve()
        if (
            ours
            and self.goes_on_here
            and self.best_model_path
            and resumed.resolve() != Path(self.best_model_path).resolve()
        ):
            trainer.strategy.remove_checkpoint(resumed)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and the cross-entropy."""
        return super().state_dict() | {"best_ce": self.best_ce}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of `state_dict`."""
        super().load_state_dict(state)
        self.best_ce = state["best_ce"]
        self.goes_on_here = state.get("dirpath") == self.dirpath  # in a folder that was moved Lightning knows no score


def resume_batch(position: Mapping[str, int], run: Run, args: argparse.Namespace) -> int:
    """The micro-batch of its epoch with which an interrupted run goes on.

    It may go on with another number of devices or other micro-batches: what counts is how many images of the epoch's
    order have been read.

    Args:
        position: of `put_starting_weights`.
        run: that goes on.
        args: its flags now.

    Raises:
        UserError: it has more epochs already than it should have, or the place lies between two micro-batches.
    """
    if position["epoch"] > args.max_epochs:
        raise UserError(
            f"--max_epochs {args.max_epochs}: {run.resume_from} has {position['epoch']} already; give at least as many"
        )
    if position["batch"] >= position["steps"]:  # at the end of an epoch
        return 0
    images = position["batch"] * position["batch_size"] * position["world_size"]
    batch, rest = divmod(images, args.batch_size * probe(args).world_size)
    if rest:
        raise UserError(
            f"--resume {run.resume_from}: stands behind image {images} of its epoch, which no micro-batch ends with "
            "here; give the --batch_size and number of devices that it was started with"
        )
    return batch


def starting_checkpoint(run: Run, args: argparse.Namespace) -> Path | None:
    """The checkpoint that a run starts from: the resumed run's, or that of --load_checkpoint; None = stock weights.

    Raises:
        UserError: there is none, or several fit.
    """
    if run.resume_from or not args.load_checkpoint:
        return run.resume_from
    source = outputs_root(ROOT / "distillation" / run.builds_on) if run.builds_on else run.experiment
    return chosen_checkpoint(args.load_checkpoint, source, miniature=args.miniature)


def put_starting_weights(student: torch.nn.Module, run: Run, args: argparse.Namespace) -> dict[str, int] | None:
    """Give the student the weights that the run starts from: the resumed run's, a checkpoint's, or the stock ones.

    The one place that decides it, before anything reads the weights. Lightning restores a resumed run's once more,
    with the optimizer.

    Returns:
        The position of a resumed run, with its epoch and batch size, for `resume_batch`; None where the run is new.

    Raises:
        UserError: the checkpoint does not fit, or the resumed run had other settings.
    """
    path = starting_checkpoint(run, args)
    if run.resume_from:
        checkpoint = read_checkpoint(path)
        check_resumable(checkpoint, run.resume_from)
        recorded = checkpoint["hyper_parameters"]
        check_same_run(recorded, run)
        check_same_updates(recorded, checkpoint["position"]["world_size"], run, args)
        run.record["load_checkpoint"] = recorded["load_checkpoint"]
        load_trained_state(student, student_state(checkpoint), origin=str(run.resume_from))
        return checkpoint["position"] | {"epoch": checkpoint["epoch"], "batch_size": recorded["batch_size"]}
    if path:
        load_student(student, path, run)
        run.record["load_checkpoint"] = str(path)
    return None


def check_same_run(recorded: Mapping[str, Any], run: Run) -> None:
    """Refuse to continue a run with other settings than it was started with; how it runs and how long may change.

    Raises:
        UserError: names the first setting that differs.
    """
    free = {"resume", "run", "run_name", "git_commit", "export", "export_dtype", "save_final_pt", "num_workers"}
    free |= {"max_epochs", "max_steps", "accelerator", "devices", "strategy", "load_checkpoint"}
    free |= {"picture_cache", "vision_cache", "measure"}
    free |= {"gradient_checkpointing", "num_nodes", "teacher", "any_teacher"}
    free |= {"batch_size", "accumulate_grad_batches"}  # see `check_same_updates`
    free |= {"teacher_val_exact_match"}  # follows from the teacher
    for name in sorted(run.record.keys() - free):
        theirs = recorded.get(name, ADDED_FLAGS.get(name))
        if theirs != run.record[name]:
            raise UserError(
                f"--resume {run.resume_from}: was started with {name} {theirs}, now it is {run.record[name]}; "
                "give the same, or start a new run with --load_checkpoint"
            )


def check_same_updates(recorded: Mapping[str, Any], world_size: int, run: Run, args: argparse.Namespace) -> None:
    """Refuse to continue a run with updates of another size; how an update is shared out may change.

    Args:
        recorded: hyper-parameters of its checkpoint.
        world_size: number of devices that it ran on.
        run: that goes on.
        args: its flags now.

    Raises:
        UserError: says with which flags an update reads as many images as before.
    """
    images = recorded["batch_size"] * recorded["accumulate_grad_batches"] * world_size
    now = probe(args).world_size
    if args.batch_size * args.accumulate_grad_batches * now == images:
        return
    per_device, rest = divmod(images, now)
    batch_size = math.gcd(per_device, args.batch_size)
    raise UserError(
        f"--resume {run.resume_from}: an update of it reads {images} images, here it would read "
        f"{args.batch_size * args.accumulate_grad_batches * now} on {now} device(s); "
        + (
            f"use a number of devices that divides {images}"
            if rest
            else f"give --batch_size {batch_size} --accumulate_grad_batches {per_device // batch_size}"
        )
    )


def check_start(path: Path, theirs: Mapping[str, Any], run: Run) -> None:
    """Refuse to start from a checkpoint that this run cannot build on.

    Args:
        path: of the checkpoint.
        theirs: its hyper-parameters.
        run: that starts from it; where it has a teacher, that is in its record.

    Raises:
        UserError: it is not of the experiment that this one builds on, or is of another student, of other image
            settings, labels or teacher.
    """
    record, builds_on = run.record, run.builds_on
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
    # With another share or seed the phase before read other labels: both phases together would use more than allowed.
    both_read_labels = None not in (theirs.get("label_fraction"), record.get("label_fraction"))
    if builds_on and both_read_labels and min(theirs["label_fraction"], record["label_fraction"]) < 1:
        for name in ("label_fraction", "subset_percentage", "seed"):
            if theirs[name] != record[name]:
                raise UserError(
                    f"--load_checkpoint {path}: trained with {name} {theirs[name]}, this run has {record[name]}; give "
                    "the path of one that was trained on the same labels"
                )
    if builds_on and theirs.get("teacher_weights") != record["teacher_weights"] and not record["any_teacher"]:
        their_teacher, own = (
            f"{known.get('teacher_checkpoint') or known.get('teacher_name')} in {known.get('teacher_bits', 16)} bits"
            for known in (theirs, record)
        )
        raise UserError(
            f"--load_checkpoint {path}: was trained with another teacher ({their_teacher}; here it is {own}); give the "
            "same one, or add --any_teacher if it is meant"
        )


def load_student(student: torch.nn.Module, path: Path, run: Run) -> None:
    """Put a checkpoint's weights into the student.

    Raises:
        UserError: see `check_start`.
    """
    checkpoint = read_checkpoint(path)
    check_start(path, checkpoint["hyper_parameters"], run)
    load_trained_state(student, student_state(checkpoint), origin=str(path))
    print(printable(f"starting from {path}"))


def checkpoint_bytes(student: torch.nn.Module) -> int:
    """At most how large a checkpoint is: weights that train, and two Adam moments of each."""
    return CHECKPOINT_SHARE * tensor_bytes(trained_state(student))


def check_room(student: torch.nn.Module, run: Run, args: argparse.Namespace) -> None:
    """Say how much the run will write: its checkpoints, and what --export and --save_final_pt ask for.

    There are the best checkpoint, the last one and the one being written.

    Raises:
        UserError: a disk has no room for what goes onto it.
    """
    missing = max(KEPT + 1 - len(list(run.checkpoints.glob("*.ckpt"))), 1)
    wanted = [("checkpoints", run.checkpoints, missing * checkpoint_bytes(student))]
    if args.save_final_pt:
        wanted.append(("--save_final_pt", args.save_final_pt.parent, tensor_bytes(trained_state(student))))
    if args.export:
        bytes_each = DTYPES[args.export_dtype].itemsize
        wanted.append(("--export", args.export.parent, bytes_each * count_parameters(student)[1]))
    disks: dict[int, float] = {}
    for what, folder, needed in wanted:
        disk = existing_folder(folder).stat().st_dev
        check_disk(what, folder, needed, 1, others=disks.get(disk, 0))
        disks[disk] = disks.get(disk, 0) + needed


def write_outputs(
    module: pl.LightningModule,
    processor: ImageTextProcessor,
    args: argparse.Namespace,
    *,
    best: Path,
    validation: Mapping[str, float],
) -> None:
    """--save_final_pt and --export, both of the best checkpoint; `validation`: name and value of its score."""
    if not (args.save_final_pt or args.export):
        return
    checkpoint = read_checkpoint(best)
    state, record = student_state(checkpoint), checkpoint["hyper_parameters"]
    student = module.student
    if isinstance(module, FSDPModule) or record.get("base_bits") == 4:  # no rank has all of it, or it is packed
        dtype = frozen_dtype(args.precision, args.accelerator) if record.get("lora_rank") else torch.float32
        student = restore_student(checkpoint, origin=str(best), dtype=dtype, bits=16)
    else:
        load_trained_state(student, state, origin=str(best))
    if args.save_final_pt:
        with atomic_path(args.save_final_pt, size=tensor_bytes(state)) as part:
            torch.save(state, part)
        print(printable(f"wrote {args.save_final_pt}"))
    if args.export:
        description = describe_student(record, processor, checkpoint=best, validation=validation)
        export_model(student, processor, args.export, description, dtype=DTYPES[args.export_dtype])
        print(printable(f"wrote {args.export}"))
