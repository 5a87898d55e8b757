"""RePr in one object for any PyTorch loop: built from model, optimizer and number of steps, told after every step.

    repr_training = RePr(model, optimizer, total_steps)
    for batch in batches:
        ...                                     # forward, backward
        optimizer.step()
        repr_training.step()

The pieces (``find_filter_layers``, ``RePrSchedule``, ``RePrScheme``) stay for those who want them apart.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repr_det.method.blocks import readers
from repr_det.method.errors import UserError
from repr_det.method.holding import Transition
from repr_det.method.layers import find_filter_layers
from repr_det.method.optimizers import around_step
from repr_det.method.passes import TrainingPasses, preserved_random_state
from repr_det.method.schedule import RePrSchedule
from repr_det.method.scheme import RePrScheme


class RePr:
    """RePr for a training loop of one's own, with the defaults of the configs.

    Args:
        model: with or without a DistributedDataParallel around it.
        optimizer: holds the parameters of the convs that take part; a list where several do.
        total_steps: optimizer steps of the whole training.
        layers, exclude: fnmatch patterns on names of Conv2d modules, see ``layers.find_filter_layers``. Convs that
            predict (class scores, boxes) have no filter to spare: those of known names are left out, leave out others.
        schedule: None derives it, ``num_cycles`` cycles in the first three quarters of the steps before
            ``first_lr_step`` (of all steps where that is None), S1 : S2 = 2 : 1.
        num_cycles, first_lr_step: see ``schedule``.
        loader, loss: training batches and ``loss(batch)`` -> scalar, for criteria that look at data and for FrozenBN,
            see ``passes_over``.
        passes: the same, for batches of another kind (``passes.TrainingPasses``).
        norms, sample: which norm follows which conv, where the order of the modules does not say it, see
            ``layers.find_filter_layers``.
        slim: True leaves dropped channels out of the computation, False computes them as zeros; "auto" finds out which
            costs less, see ``RePrScheme``.
        options: of ``RePrScheme``: criterion, drop_ratio, max_drop_per_layer, scale, frozen_norm, returns,
            criterion_batches, calibration_batches, seed.

    Attributes:
        schedule: the iterations of all drops and restores.
        scheme: what drops and restores; its ``masks`` say which filters are out.
        steps: optimizer steps so far.

    Raises:
        UserError: an option is wrong, no conv takes part, or the schedule does not fit into ``total_steps``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        total_steps: int,
        *,
        layers: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        schedule: RePrSchedule | None = None,
        num_cycles: int = 3,
        first_lr_step: int | None = None,
        loader: Iterable[Any] | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        passes: TrainingPasses | None = None,
        norms: Mapping[str, nn.Module | None] | None = None,
        sample: Any = None,
        slim: bool | str = "auto",
        **options: Any,
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise UserError(f"total_steps must be an integer of at least 1, got {total_steps!r}")
        if (loader is None) != (loss is None) or (loader is not None and passes is not None):
            raise UserError("give loader and loss together, or passes, or none of them")
        if unknown := sorted(set(options) - set(_OPTIONS)):
            raise UserError(f"RePr has no option {unknown[0]!r}: take one of {', '.join(_OPTIONS)}")
        model = _unwrapped(model)
        self.schedule = schedule or RePrSchedule.derive(total_steps, first_lr_step, num_cycles)
        self.schedule.check_fits(total_steps)
        if loader is not None and loss is not None:
            passes = passes_over(model, loader, loss, options.get("seed", 0))
        self.scheme = RePrScheme(
            find_filter_layers(model, layers, exclude, norms, sample),
            optimizer,
            readers=readers(model),
            passes=passes,
            slim_model=model,
            slim=slim,
            **options,
        )
        self.steps = 0

    @property
    def phase(self) -> str:
        """ "full" or "sub": the network that the next forward pass sees."""
        return "sub" if self.scheme.is_sub else "full"

    def step(self) -> Transition | None:
        """To be called after every step of the optimizer. Collective where there are several ranks.

        Returns:
            What a drop or restore did, in the iterations that have one.

        Raises:
            UserError: of ``RePrScheme.check``, ``drop`` and ``restore``.
        """
        iteration = self.steps
        self.steps += 1
        self.scheme.check()
        if iteration in self.schedule.drop_iters:
            return self.scheme.drop()
        if iteration in self.schedule.restore_iters:
            return self.scheme.restore()
        return None

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs; loads under ``torch.load(weights_only=True)``."""
        return {
            "steps": self.steps,
            "schedule": dataclasses.asdict(self.schedule),
            "scheme": self.scheme.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state``; load model and optimizer from the same checkpoint first.

        Raises:
            UserError: the state is of another schedule or other layers, or the model is not of this checkpoint.
        """
        if (saved := RePrSchedule(**state["schedule"])) != self.schedule:
            raise UserError(
                f"the checkpoint was trained with {saved}, this run has {self.schedule}: build RePr with the "
                "total_steps and schedule of the run that wrote it"
            )
        self.scheme.load_state_dict(state["scheme"])
        self.steps = state["steps"]


_OPTIONS = (
    "criterion",
    "drop_ratio",
    "max_drop_per_layer",
    "scale",
    "frozen_norm",
    "returns",
    "criterion_batches",
    "calibration_batches",
    "seed",
)


def apply_repr(model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int, **options: Any) -> RePr:
    """``RePr`` for a loop that one cannot edit: every step of ``optimizer`` counts by itself.

    Args:
        options: of ``RePr``.

    Returns:
        The object, whose state belongs into checkpoints; do not call its ``step``.
    """
    repr_training = RePr(model, optimizer, total_steps, **options)

    around_step(optimizer, after=repr_training.step)
    return repr_training


def passes_over(
    model: nn.Module, loader: Iterable[Any], loss: Callable[[Any], Tensor], seed: int = 0
) -> TrainingPasses:
    """Extra passes over the first batches of ``loader``, in an order that depends on ``seed`` and cycle only.

    Args:
        model: with or without a DistributedDataParallel around it.
        loader: can be iterated more than once; its iterator is not the one that training uses (no persistent workers).
            A batch is a tensor, a list of dicts (an example each), or a tuple or dict of fields: tensors, or lists with
            an entry an example.
        loss: batch -> scalar loss of a forward pass of ``model`` in training mode.

    Raises:
        UserError: ``loader`` is an iterator, or keeps its workers.
    """
    if isinstance(loader, Iterator) or getattr(loader, "persistent_workers", False):
        raise UserError(
            "loader must start anew whenever it is iterated, beside the training: give a DataLoader of its own "
            "without persistent_workers, or a list of batches"
        )

    def batches(number: int, cycle: int) -> list[Any]:
        with _seeded(loader, seed * 1_000_003 + cycle):
            return list(itertools.islice(iter(loader), number))

    return TrainingPasses(_unwrapped(model), batches, loss, _joined)


def _joined(batches: Sequence[Any]) -> Any:
    """One batch with all examples of several."""
    first = batches[0]
    if isinstance(first, Mapping):
        return {key: _end_to_end([batch[key] for batch in batches]) for key in first}
    if isinstance(first, (tuple, list)) and not any(isinstance(part, Mapping) for part in first):
        return tuple(_end_to_end(field) for field in zip(*batches, strict=True))
    return _end_to_end(batches)


def _end_to_end(parts: Sequence[Any]) -> Any:
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else list(itertools.chain.from_iterable(parts))


@contextmanager
def _seeded(loader: Any, seed: int) -> Iterator[None]:
    """All that a loader draws from, seeded; afterwards as it was."""
    parts = (loader, getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    own = {id(g): g for part in parts if isinstance(g := getattr(part, "generator", None), torch.Generator)}.values()
    states = [(generator, generator.get_state()) for generator in own]
    with preserved_random_state():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        for generator, _ in states:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)


def _unwrapped(model: nn.Module) -> nn.Module:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return model.module if isinstance(model, wrappers) else model
