"""`--strategy fsdp2`: weights, gradients and optimizer states shared out over the ranks (PyTorch's FSDP2).

Every rank computes its own images with whole layers, which it puts together from all ranks for as long as it needs
them. So a rank holds 1/N of weights, gradients and moments of N ranks. Whole it holds one layer at a time, and through
a step all that is no such layer: embedding, output layer, the last decoder layer, the projector. The first rank reads
the whole student into main memory. The others build it of shapes alone, and get a layer at a time, each to be shared
out before the next one comes.

Checkpoints are those of one process, also in their order: runs go on with another strategy.
"""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from distillation.forward import base_model
from utils import UserError, is_first_process

FSDP2 = "fsdp2"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2, with the optimizer's state in a checkpoint as one process writes it."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Every rank has images of its own: Lightning would share out over machines only."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning calls `load_optimizer_state_dict`."""
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on the first rank, weights numbered in the order of the optimizer's groups."""
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = get_optimizer_state_dict(self.model, optimizer, options=WHOLE)
        if not state:  # not the first rank
            return state
        numbers = {name: number for number, name in enumerate(n for g in state["param_groups"] for n in g["params"])}
        groups = [group | {"params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
        moments = {numbers[name]: found for name, found in state["state"].items()}
        return {"state": moments, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it on every rank, as one process does."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give every rank its part of all weights that train, those outside of the student included."""
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every rank its part of the state."""
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = get_optimizer_state_dict(self.model, optimizer)["param_groups"]  # for the names of its weights
            names = [name for group in own for name in group["params"]]
            groups = [
                group | {"params": mine["params"]} for group, mine in zip(stored["param_groups"], own, strict=True)
            ]
            moments = {names[number]: found for number, found in stored["state"].items()}
            state = {"state": moments, "param_groups": groups}
            set_optimizer_state_dict(self.model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def strategy_of(args: argparse.Namespace) -> Strategy | str:
    """What a Trainer takes for --strategy."""
    return ShardedStrategy() if args.strategy == FSDP2 else args.strategy


def shard_in(module: pl.LightningModule, args: argparse.Namespace) -> None:
    """Let Lightning shard the module where --strategy asks for it, as soon as it knows the devices."""
    if args.strategy == FSDP2:
        module.configure_model = partial(shard, module, from_first_rank=first_rank_reads(args))


def first_rank_reads(args: argparse.Namespace) -> bool:
    """Whether the first rank alone reads the student's weights. Each needs them for tower features and a trial step."""
    return args.strategy == FSDP2 and not (args.vision_cache or args.dry_run)


def comes_later(args: argparse.Namespace) -> bool:
    """Whether this process gets the student's weights from the first rank, when Lightning has the module sharded."""
    return first_rank_reads(args) and not is_first_process()


def sharded_layers(student: nn.Module) -> tuple[nn.Module, ...]:
    """The layers that are put together only for as long as they compute.

    The last decoder layer belongs to the rest: `distillation.forward.states_at` calls its parts one by one.
    """
    core = base_model(student).model
    return (*core.language_model.layers[:-1], *core.vision_tower.encoder.layers)


def shard(module: pl.LightningModule, *, from_first_rank: bool) -> None:
    """Share out a script's module: every layer that is called as a whole, and all the rest together.

    Args:
        module: has the student as `student`.
        from_first_rank: only that one has the student's weights.
    """
    if isinstance(module, FSDPModule):  # a validation after training
        return
    mesh = module.device_mesh["data_parallel"]
    for part in (*sharded_layers(module.student), module):
        if from_first_rank:
            fetch_weights(part, module.trainer.strategy.root_device)
        fully_shard(part, mesh=mesh)
    for step in ("training_step", "validation_step"):
        register_fsdp_forward_method(module, step)


def fetch_weights(module: nn.Module, device: torch.device) -> None:
    """Give all ranks the first one's weights and buffers of a module, but for what is sharded by now.

    Which weights are one tensor under several names, and of what type, is as on the first rank: its weights were read
    from files, which may differ from their configuration.

    Args:
        module: has values on the first rank; on the others it may have shapes alone.
        device: that the ranks exchange tensors on; weights that had no values are there afterwards.

    Raises:
        UserError: the first rank has no values, since it took itself for another one.
    """
    own = {
        name: tensor
        for found in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        for name, tensor in found
        if not isinstance(tensor, DTensor)
    }
    is_first = distributed.get_rank() == 0
    if is_first and any(tensor.is_meta for tensor in own.values()):
        raise UserError(
            f"--strategy {FSDP2}: the first process has no weights, since RANK, LOCAL_RANK or SLURM_PROCID in its "
            "environment names it another one; unset what is left there of another start"
        )
    described = [described_tensors(own) if is_first else None]
    distributed.broadcast_object_list(described, src=0, device=device)
    for names, shape, dtype in described[0]:
        tensor = own[names[0]]
        values = torch.empty(shape, dtype=dtype, device=device) if tensor.is_meta else tensor.detach().to(device)
        distributed.broadcast(values, src=0)
        if not tensor.is_meta:
            tensor.detach().copy_(values)
            continue
        if isinstance(tensor, nn.Parameter):
            values = nn.Parameter(values, requires_grad=tensor.requires_grad)
        for name in names:
            place, _, last = name.rpartition(".")
            setattr(module.get_submodule(place), last, values)


def described_tensors(own: Mapping[str, Tensor]) -> list[tuple[list[str], torch.Size, torch.dtype]]:
    """Of each tensor its names, of which a tied output layer has two, its shape and its type."""
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    return [(same, own[same[0]].shape, own[same[0]].dtype) for same in names.values()]


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Put together what a sharded module calls past its steps, on all ranks at once; its layers do that themselves."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
