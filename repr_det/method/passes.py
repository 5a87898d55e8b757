"""Extra forward passes over training batches, for data-driven criteria and calibration."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from repr_det.method.errors import UserError
from repr_det.network.state import preserved_random_state, seed_of


class SharedLoaderError(UserError):
    """A loader can be iterated only once at a time."""


@dataclass
class TrainingPasses:
    """Passes of the model over training batches outside the training loop.

    Attributes:
        model: not wrapped in DistributedDataParallel.
        batches: (number, cycle) -> that many training batches, always the same.
        loss: batch -> scalar loss of a forward pass in training mode.
        calibration_batches: for frozen norms, where no option says it.
        seed: of ``passes_over``; a resumed run has that of its state.
    """

    model: nn.Module
    batches: Callable[[int, int], Iterable[Any]]
    loss: Callable[[Any], Tensor]
    join: Any = None  # without effect since version 0.3.0
    calibration_batches: int = 4
    seed: int = 0


def passes_over(
    model: nn.Module, loader: Iterable[Any], loss: Callable[[Any], Tensor], seed: int = 0
) -> TrainingPasses:
    """Passes over the first batches of ``loader``, in an order that depends on ``seed`` and cycle only.

    Raises:
        UserError: ``loader`` is an iterator, or keeps its workers.
    """
    afresh(loader, "loader=")

    def batches(number: int, cycle: int) -> list[Any]:
        with preserved_random_state(loader, seed=seed_of(passes.seed, cycle)):
            return list(itertools.islice(afresh(loader, "loader="), number))

    passes = TrainingPasses(model, batches, loss, seed=seed)
    return passes


def parts_of(loader: Any) -> Iterator[Any]:
    """Yields ``loader`` and, from the outside in, the loaders and data sets in it."""
    while loader is not None:
        yield loader
        loader = getattr(loader, "dataset", None)


def afresh(loader: Any, name: str) -> Iterable[Any]:
    """``loader``, to be iterated while training iterates it. Detectron2's grouping by shape gets buckets of its own.

    Raises:
        SharedLoaderError: the training would miss batches.
    """
    is_shared = loader is None
    for part in parts_of(loader):
        is_shared |= isinstance(part, Iterator) or getattr(part, "persistent_workers", False)
        if getattr(part, "num_workers", 0):  # each has a data set of its own
            break
    if is_shared:
        told = "must start again whenever it is iterated: give a list, or a DataLoader without persistent_workers"
        raise SharedLoaderError(f"{name} {told}")
    if hasattr(loader, "_buckets"):
        loader = copy.copy(loader)
        loader._buckets = [[] for _ in loader._buckets]
    return loader
