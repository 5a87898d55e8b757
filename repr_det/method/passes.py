"""Extra forward passes over training batches, for data-driven criteria and calibration."""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repr_det.method.errors import UserError
from repr_det.network.state import generators_in, preserved_random_state


@dataclass
class TrainingPasses:
    """Passes of the model over training batches outside the training loop.

    Attributes:
        model: not wrapped in DistributedDataParallel.
        batches: (number, cycle) -> that many training batches, always the same.
        loss: batch -> scalar loss of a forward pass in training mode.
        trains: whether ``model`` is in training mode while it trains.
        calibration_batches: for frozen norms, where no option says it.
    """

    model: nn.Module
    batches: Callable[[int, int], Iterable[Any]]
    loss: Callable[[Any], Tensor]
    join: Any = None  # without effect since version 0.3.0
    trains: bool = True
    calibration_batches: int = 4


def passes_over(
    model: nn.Module, loader: Iterable[Any], loss: Callable[[Any], Tensor], seed: int = 0
) -> TrainingPasses:
    """Passes over the first batches of ``loader``, in an order that depends on ``seed`` and cycle only.

    Raises:
        UserError: ``loader`` is an iterator, or keeps its workers.
    """
    if isinstance(loader, Iterator) or getattr(loader, "persistent_workers", False):
        raise UserError(
            "loader= must start again whenever it is iterated: give a list of batches, or a DataLoader without "
            "persistent_workers"
        )

    def batches(number: int, cycle: int) -> list[Any]:
        own = [generator for generator in generators_in(loader) if isinstance(generator, torch.Generator)]
        with preserved_random_state(loader):
            mixed = seed * 1_000_003 + cycle
            random.seed(mixed)
            np.random.seed(mixed % 2**32)
            for generator in own:
                generator.manual_seed(mixed)
            torch.manual_seed(mixed)
            return list(itertools.islice(iter(loader), number))

    return TrainingPasses(model, batches, loss)
