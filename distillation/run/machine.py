"""What this machine can do: devices, precision, memory."""

import argparse
import logging
import os
import resource
import warnings
from contextlib import suppress
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from distillation.run.sharding import strategy_of
from utils import UserError, peak_memory

OPEN_FILES = 2**16  # far more than an update of a thousand micro-batches needs
OPEN_FILES_MACOS = 10240  # OPEN_MAX of its sys/syslimits.h: it names no limit and still refuses more


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
            strategy=strategy_of(args),
            logger=False,
            enable_checkpointing=False,
            **own_checkpoints_only(),
        )
    except Exception as error:  # Lightning raises many types for flags that it does not know or cannot combine
        raise UserError(
            f"--accelerator {args.accelerator} --devices {args.devices} --strategy {args.strategy} --precision "
            f"{args.precision}: not possible here ({error})"
        ) from error


def own_checkpoints_only() -> dict[str, Any]:
    """Options of every Trainer: under SLURM, Lightning neither writes nor reads its own checkpoints, hpc_ckpt_*.ckpt.

    It looks for them in its default folder, the working directory, and would take over any run's.
    """
    options: dict[str, Any] = {"default_root_dir": os.devnull}  # no folder, so nothing is found in it
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():  # Lightning's own order
        # In a job of one task, Lightning would wait for srun to start further ranks, and use one device of several.
        one_task = int(os.environ["SLURM_NTASKS"]) == 1
        options["plugins"] = [LightningEnvironment() if one_task else SLURMEnvironment(auto_requeue=False)]
    return options


def frozen_dtype(precision: str, accelerator: str = "auto") -> torch.dtype:
    """Of weights that stay frozen: that in which the step computes anyway, which may halve their memory."""
    return half_dtype(resolve_precision(precision, accelerator)) or torch.float32


def half_dtype(precision: str) -> torch.dtype | None:
    """What autocast computes in under a Lightning precision; None without autocast."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def quieten() -> None:
    """Leave out what libraries say about each other: hints, and deprecations that only they can mend."""
    for library in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for text in (
        ".*is_gradient_checkpointing.*",
        ".*data pointer of FakeTensor.*",  # peft copies a module of shapes alone
        ".*LeafSpec.*",
        ".*suggested max number of worker.*",  # waiting processes cost little
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*but have no `val_dataloader`.*",  # --dry_run trains only
        ".*could not find the monitored key.*",  # best_of_run validates what --max_steps ends
        ".*irectory .* exists and is not empty.*",  # two loggers share a folder, a resumed run its checkpoints
    ):
        warnings.filterwarnings("ignore", message=text)


def resolve_precision(name: str, accelerator: str = "auto") -> str:
    """`auto` -> bf16-mixed on a GPU that has bfloat16, else 32-true; never pure bf16, which rounds updates away."""
    if name != "auto":
        return name
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if fast and accelerator != "cpu" else "32-true"


def allow_open_files() -> None:
    """Raise the limit as far as this process may: the tensors of a whole update wait in shared memory, a file each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (OPEN_FILES, OPEN_FILES_MACOS):
        allowed = min(hard, wanted) if hard != resource.RLIM_INFINITY else wanted
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
            return


def peak_memory_gib() -> float:
    """The GPU's peak when there is one, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_memory() / 2**30
