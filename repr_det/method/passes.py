"""Extra forward passes over training batches, for data-driven criteria and calibration."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from repr_det.method.errors import UserError
from repr_det.network.state import seed_of, seeded


class SharedLoaderError(UserError):
    """A loader can be iterated only once at a time."""


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
    afresh(loader, "loader=")

    def batches(number: int, cycle: int) -> list[Any]:
        with seeded(seed_of(seed, cycle), loader):
            return list(itertools.islice(afresh(loader, "loader="), number))

    return TrainingPasses(model, batches, loss)


def afresh(loader: Any, name: str) -> Iterable[Any]:
    """``loader``, to be iterated while training iterates it. Detectron2's grouping by shape gets buckets of its own.

    Raises:
        SharedLoaderError: the training would miss batches.
    """
    part, is_shared = loader, loader is None
    while part is not None:
        is_shared |= isinstance(part, Iterator) or getattr(part, "persistent_workers", False)
        part = None if getattr(part, "num_workers", 0) else getattr(part, "dataset", None)  # a worker has a copy
    if is_shared:
        raise SharedLoaderError(
            f"{name} must start again whenever it is iterated: give a list of batches, or a DataLoader without "
            "persistent_workers"
        )
    if hasattr(loader, "_buckets"):
        loader = copy.copy(loader)
        loader._buckets = [[] for _ in loader._buckets]
    return loader
