"""Which images an optimizer update reads, and how many items of each kind it has.

    order of an epoch     i0 i1 i2 i3 i4 i5 i6 i7 i8 ...                 `ImageOrder`
    micro-batches         [i0 i1] [i2 i3] [i4 i5] [i6 i7] [i8 ...        `MicroBatchSampler`, batch_size 2
    on two ranks          rank 0    1       0       1       0
    updates               |------- one update ---------| |---- ...       `UpdateLoader`, 2 micro-batches per rank

Validation is shared out over ranks in the same way, with a `SharedLoader`.

An update reads batch_size x accumulate_grad_batches x ranks images (the last one of an epoch reads the rest), the same
ones however this product is split into its factors. Every loss term is a sum over its items, divided by their number in
the whole update, so the gradient does not depend on the split either. That number must be known before the first
backward pass, so `UpdateLoader` fetches all micro-batches of an update first.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler


class ImageOrder(Sampler):
    """The images of an epoch as (epoch, index), in an order that depends only on seed and epoch.

    With a `size` above `n` an epoch goes through the images several times, so that runs on fewer images take as many
    steps; the last pass may be incomplete. A repeated image gets an epoch number of its own, and with it other random
    choices.
    """

    def __init__(self, n: int, *, seed: int, shuffle: bool, size: int | None = None) -> None:
        self.n, self.seed, self.shuffle, self.size = n, seed, shuffle, size or n
        self.epoch = 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch, on `loader.batch_sampler.sampler`."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if not self.shuffle:  # validation: the same in every epoch
            yield from ((0, index) for index in range(self.size))
            return
        rng = np.random.default_rng((self.seed, 0, self.epoch))
        rounds = -(-self.size // self.n)
        order = np.concatenate([rng.permutation(self.n) for _ in range(rounds)])[: self.size]
        for position, index in enumerate(order.tolist()):
            yield self.epoch * rounds + position // self.n, index


class MicroBatchSampler(Sampler):
    """Micro-batches of an order; ranks take turns over them and all take the same number of steps.

    With `start` the next epoch begins at that step, so that an interrupted run goes on without reading an image twice.
    All ranks have to take part in a backward pass. A rank that has no micro-batch left in the last step therefore
    repeats an earlier one, which `is_spare`: it is computed, but counts nothing in the loss or the scores.
    """

    def __init__(self, sampler: ImageOrder, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.sampler, self.batch_size = sampler, batch_size
        self.rank, self.world_size = rank, world_size
        self.start = 0

    def __len__(self) -> int:  # constant even when resuming: Lightning ends the epoch by its own count of batches
        return -(-self._total // self.world_size)

    @property
    def _total(self) -> int:
        """Micro-batches of all ranks."""
        return -(-len(self.sampler) // self.batch_size)

    def is_spare(self, step: int) -> bool:
        """Whether this rank's micro-batch at a step of the epoch repeats one of another step."""
        return step * self.world_size + self.rank >= self._total

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(self.sampler)
        first, self.start = self.start, 0
        for step in range(first, len(self)):
            begin = (step * self.world_size + self.rank) % self._total * self.batch_size
            yield order[begin : begin + self.batch_size]


class SharedLoader(DataLoader):
    """A DataLoader over a `MicroBatchSampler` that adds to every batch whether it is `spare` and counts nothing."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start = self.batch_sampler.start  # first: a loader with processes begins to fetch at once, which resets it
        for step, batch in enumerate(super().__iter__(), start):
            yield batch | {"spare": self.batch_sampler.is_spare(step)}


class UpdateLoader(SharedLoader):
    """A loader that tells every micro-batch how many items its whole optimizer update has.

    It replaces the `counts` of a collated batch by

        update  the sums of the counts over all micro-batches of the update, on all ranks (1 instead of 0, since a sum
                over no items is 0 whatever it is divided by), and has_gold, whether the update has any gold answer

    Lightning neither stores nor restores its position: the sampler's `start` does that.
    """

    def __init__(
        self,
        *args: Any,
        micro_batches: int = 1,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> None:
        """`micro_batches`: per update on each rank; `sum_over_ranks`: adds up a float64 vector (None: one rank)."""
        if options.get("num_workers"):  # fetch a whole update while the one before it is computed
            options["prefetch_factor"] = max(2, -(-micro_batches // options["num_workers"]))
        super().__init__(*args, **options)
        self.micro_batches, self.sum_over_ranks = micro_batches, sum_over_ranks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = super().__iter__()
        while window := list(islice(batches, self.micro_batches)):
            update = self._totals([batch.pop("counts") for batch in window], [batch["spare"] for batch in window])
            while window:
                yield window.pop(0) | {"update": update}

    def _totals(self, counts: list[dict[str, float]], spare: list[bool]) -> dict[str, float]:
        counted = [found for found, is_spare in zip(counts, spare, strict=True) if not is_spare]
        sums = {name: float(sum(found[name] for found in counted)) for name in counts[0]}
        if self.sum_over_ranks is not None:
            total = self.sum_over_ranks(torch.tensor(list(sums.values()), dtype=torch.float64))
            sums = dict(zip(sums, total.tolist(), strict=True))
        return {name: value or 1.0 for name, value in sums.items()} | {"has_gold": sums["gold_tokens"] > 0}

    def state_dict(self) -> dict:
        """Empty: the position is in the checkpoint (see distillation.run.training)."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""
