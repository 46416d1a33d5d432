"""Fit, keep the best and the last checkpoint, write what was asked for.

Models, losses, optimizer and schedule are not here: they are the experiment, and stand in its script.
"""

import argparse
import math
import time
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from dataset.datamodule import SUNRGBDDataModule
from distillation.models import count_parameters
from distillation.run.callbacks import FiniteGuard, KeyedRandomness, Progress, StepTimer, UpdateLog
from distillation.run.checkpoints import (
    KEPT,
    BestCheckpoint,
    CheckpointContents,
    SafeCheckpointIO,
    check_room,
    checkpoint_bytes,
    put_starting_weights,
    resume_batch,
    write_outputs,
)
from distillation.run.data import use_vision_cache, usual_camera
from distillation.run.folders import Run, finished_run
from distillation.run.machine import (
    allow_open_files,
    own_checkpoints_only,
    peak_memory_gib,
    probe,
    quieten,
    resolve_precision,
)
from distillation.run.ranks import ending_together
from distillation.run.restore import RestoredState, fit_from
from distillation.run.samples import AnswerSamples
from distillation.run.sharding import shard_in, strategy_of
from distillation.run.signals import StopOnSignal, signals_given_back
from utils import amount, disk_errors, duration, is_first_process, printable, write_json

FEWEST_POINTS = 10  # of a curve: shorter runs log more often than every tenth update


def train(
    module: pl.LightningModule,
    data: SUNRGBDDataModule,
    run: Run,
    args: argparse.Namespace,
    *,
    monitor: str = "val/exact_match",
) -> None:
    """Fit, keep the best and the last checkpoint, write what --export and --save_final_pt ask for.

    Args:
        module: has the student as `student`.
        data: with the teacher's outputs where the module needs them.
        run: folders and record.
        args: of the common flags.
        monitor: logged in validation; the best checkpoint is where it is highest.

    Raises:
        UserError: bad input; the run's earlier checkpoints stay.
    """
    trainable, total = count_parameters(module.student)
    script = run.record["script"]
    print(f"{script}: {trainable:,} of {total:,} parameters train; {data.images_per_epoch} images per epoch")
    position = put_starting_weights(module.student, run, args)
    if (finished := finished_run(run, args)) is not None:
        if is_first_process():  # behind torchrun all ranks come here
            print(
                printable(f"{run.name} is finished ({finished['optimizer_steps']} updates); best: {finished['best']}")
            )
            best, validation = Path(finished["best"]), {monitor: finished[monitor]}
            write_outputs(module, data.processor, args, best=best, validation=validation)
        return
    if args.gradient_checkpointing:
        # Reentrant checkpointing would need an input with a gradient, which a frozen tower's does not have.
        module.student.activation_checkpointing_enable({"use_reentrant": False})
    if args.dry_run:
        dry_run(module, data, args)
        return
    run.record.update(usual_camera(data.train))  # for whoever uses the student on a picture of an unknown camera
    if is_first_process():
        check_room(module.student, run, args)
    if args.vision_cache:
        use_vision_cache(module.student, data, args)
    if position:
        data.resume_batch = resume_batch(position, run, args)
    start = time.monotonic()
    trainer = fit(module, data, run, args, monitor)
    finish(trainer, module, data, run, args, monitor, start=start)


def fit(
    module: pl.LightningModule, data: SUNRGBDDataModule, run: Run, args: argparse.Namespace, monitor: str
) -> pl.Trainer:
    """Train and validate."""
    allow_open_files()
    trainer = build_trainer(args, run, data, monitor)
    shard_in(module, args)
    if trainer.is_global_zero:
        write_json(run.logs / "run.json", run.record)
    with disk_errors(run.logs), ending_together(trainer), signals_given_back():  # checkpoints name themselves
        fit_from(trainer, module, data, run.resume_from)
    return trainer


def finish(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: SUNRGBDDataModule,
    run: Run,
    args: argparse.Namespace,
    monitor: str,
    *,
    start: float,
) -> None:
    """Note and say what came out since `start`, and write what --export and --save_final_pt ask for."""
    best, score = best_of_run(trainer, module, data, run, monitor)
    if not trainer.is_global_zero:
        return
    tensorboard, _ = trainer.loggers
    tensorboard.log_hyperparams(run.record, {f"best/{monitor.removeprefix('val/')}": score})  # its table of runs
    tensorboard.finalize("success")  # writes what is still in memory
    seconds = round(time.monotonic() - start, 1)
    steps, memory_gib = trainer.global_step, round(peak_memory_gib(), 2)
    summary = {"best": str(best), monitor: score, "optimizer_steps": steps, "seconds": seconds}
    write_json(run.logs / "run.json", run.record | summary | {"peak_memory_gib": memory_gib})
    print(f"{steps} updates in {duration(seconds)}, peak memory {memory_gib} GiB; best: {best} ({monitor} {score:.4f})")
    write_outputs(module, data.processor, args, best=best, validation={monitor: score})


def best_of_run(
    trainer: pl.Trainer, module: pl.LightningModule, data: SUNRGBDDataModule, run: Run, monitor: str
) -> tuple[Path, float]:
    """The best checkpoint and its score.

    --max_steps may end a run between two validations. Its last weights are validated here in that case.
    """
    kept = trainer.checkpoint_callback
    validated = [callback.validated_step for callback in trainer.callbacks if isinstance(callback, Progress)]
    if validated != [trainer.global_step]:
        epoch = trainer.fit_loop.epoch_progress.current.started - 1  # counted from 0
        with ending_together(trainer), signals_given_back():
            (metrics,) = trainer.validate(module, dataloaders=data.val_dataloader(), verbose=False)
        if kept.improves(metrics):
            name = f"best-epoch{epoch:02d}-score{metrics[monitor]:.4f}.ckpt"
            kept.keep(trainer, metrics, run.checkpoints / name)
        trainer.save_checkpoint(run.checkpoints / "last.ckpt")
    return Path(kept.best_model_path), float(kept.best_model_score)


def steps_of_epoch(data: SUNRGBDDataModule, args: argparse.Namespace) -> int:
    """How many micro-batches each device computes in an epoch."""
    return math.ceil(data.images_per_epoch / (args.batch_size * probe(args).world_size))


def updates_of_run(data: SUNRGBDDataModule, args: argparse.Namespace) -> int:
    """How many optimizer updates a run of these flags makes from its start to its end."""
    updates = math.ceil(steps_of_epoch(data, args) / args.accumulate_grad_batches) * args.max_epochs
    return min(updates, args.max_steps) if args.max_steps > 0 else updates


def build_trainer(args: argparse.Namespace, run: Run, data: SUNRGBDDataModule, monitor: str) -> pl.Trainer:
    """The Trainer of every experiment; a run of few updates logs them more often."""
    quieten()
    updates = updates_of_run(data, args)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    options, stop = own_checkpoints_only(), StopOnSignal(run.checkpoints / "last.ckpt")
    return pl.Trainer(
        max_epochs=args.max_epochs,
        max_steps=args.max_steps,
        accumulate_grad_batches=args.accumulate_grad_batches,
        gradient_clip_val=args.gradient_clip or None,
        precision=resolve_precision(args.precision, args.accelerator),
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=strategy_of(args),
        logger=build_loggers(run),
        callbacks=[
            *checkpoint_callbacks(run, monitor),
            RestoredState(micro_batches=args.accumulate_grad_batches, steps=steps_of_epoch(data, args)),
            CheckpointContents(run.record),
            KeyedRandomness(args.seed),
            FiniteGuard(),
            stop,
            UpdateLog(),
            AnswerSamples(data),
            Progress(),
        ],
        profiler=stop.fetching,
        default_root_dir=options["default_root_dir"],
        plugins=[SafeCheckpointIO(), *options.get("plugins", [])],
        use_distributed_sampler=False,  # MicroBatchSampler shares the batches out
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=max(1, min(10, updates // FEWEST_POINTS)),
    )


def build_loggers(run: Run) -> list[Logger]:
    """TensorBoard and a CSV file, with the run's record beside them; the CSV file of a run that is resumed stays."""
    metrics = run.logs / "metrics.csv"
    if is_first_process() and metrics.is_file():  # CSVLogger would delete it
        metrics.rename(run.logs / f"metrics.{len(list(run.logs.glob('metrics*.csv')))}.csv")
    where = dict(save_dir=run.logs.parent, name="", version=run.name)
    csv = CSVLogger(**where)
    csv.log_hyperparams(run.record)
    return [TensorBoardLogger(**where, default_hp_metric=False), csv]


def checkpoint_callbacks(run: Run, monitor: str) -> tuple[ModelCheckpoint, ModelCheckpoint]:
    """The best checkpoint and the last one. ModelCheckpoint(save_last=True) writes last.ckpt with a new best only."""
    best = BestCheckpoint(
        dirpath=run.checkpoints,
        filename=f"best-epoch{{epoch:02d}}-score{{{monitor}:.4f}}",
        auto_insert_metric_name=False,
        monitor=monitor,
        enable_version_counter=False,
        save_on_train_epoch_end=False,  # with the validation, before StopOnSignal may end the epoch
    )
    return best, ModelCheckpoint(dirpath=run.checkpoints, filename="last", enable_version_counter=False)


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
        callbacks=[timer := StepTimer()],
        **own_checkpoints_only(),
    )
    trainer.fit(module, train_dataloaders=data.train_dataloader())
    world_size = probe(args).world_size
    checkpoint = amount(checkpoint_bytes(module.student))
    batches = steps_of_epoch(data, args) * args.max_epochs
    if args.max_steps > 0:
        batches = min(batches, args.max_steps * args.accumulate_grad_batches)
    print(
        f"tokens in a row of a batch, padding included: {timer.tokens}; image tokens: {timer.image_tokens}\n"
        f"peak memory: {peak_memory_gib():.2f} GiB\n"
        f"one step of {args.batch_size} images: {timer.seconds:.2f} s; {batches} steps on {world_size} device(s): "
        f"{duration(batches * timer.seconds)}\n"
        f"disk: {KEPT + 1} checkpoints of at most {checkpoint}, one of them while it is written"
    )
