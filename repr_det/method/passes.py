"""Extra forward passes over training batches (data-driven criteria, calibration) that leave training undisturbed."""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repr_det.method.errors import UserError
from repr_det.method.hidden_state import HiddenState


@dataclass
class TrainingPasses:
    """How to run the model on training batches, outside the training loop.

    Attributes:
        model: the module, not wrapped in DistributedDataParallel.
        batches: (number, cycle) -> that many training batches, the same ones whenever the arguments are the same, from
            a loader of their own.
        loss: batch -> scalar loss of a forward pass in training mode.
        join: several batches -> one batch that holds all their images.
        trains: whether ``model`` is in training mode while it trains.
        calibration_batches: how many batches a calibration of frozen norms looks at where no option says it.
    """

    model: nn.Module
    batches: Callable[[int, int], Iterable[Any]]
    loss: Callable[[Any], Tensor]
    join: Callable[[list[Any]], Any]
    trains: bool = True
    calibration_batches: int = 4


def random_state() -> dict[str, Any]:
    """The state of every generator that training draws from: Python, NumPy, torch's of the CPU and of all CUDA devices.

    Holds only what ``torch.load(weights_only=True)`` takes.
    """
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what ``random_state`` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        saved = state["cuda"]
        if torch.is_tensor(saved):  # of version 0.2.0: the current device's alone
            torch.cuda.set_rng_state(saved.cpu())
        else:
            torch.cuda.set_rng_state_all([one.cpu() for one in saved[: torch.cuda.device_count()]])


@contextlib.contextmanager
def preserved_random_state(*holders: Any) -> Iterator[None]:
    """Every random state is afterwards as before, and so are the generators that ``holders`` keep "
    "(``generators_in``)."""
    state = random_state()
    own = [(generator, _get_state(generator)) for generator in generators_in(*holders)]
    try:
        yield
    finally:
        set_random_state(state)
        for generator, before in own:
            _set_state(generator, before)


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_MOST_OBJECTS = 2000  # that are looked at for generators


def generators_in(*holders: Any) -> list[Any]:
    """The random generators in attributes of ``holders`` (data loaders, data sets, augmentations), of the objects
    there, and so on; not those of objects in an array, nor beyond the first 2,000 objects."""
    found, seen, waiting = [], set(), list(holders)
    while waiting and len(seen) < _MOST_OBJECTS:
        one = waiting.pop(0)
        if id(one) in seen or isinstance(one, (str, bytes, int, float, Tensor, np.ndarray, nn.Module, type)):
            continue
        seen.add(id(one))
        if isinstance(one, _GENERATORS):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            waiting += one[:50]
        elif isinstance(one, dict):
            waiting += list(one.values())[:50]
        else:
            waiting += list(getattr(one, "__dict__", {}).values())
            waiting += [cell.cell_contents for cell in getattr(one, "__closure__", None) or () if _is_filled(cell)]
            waiting.append(getattr(one, "__self__", None))
    return found


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _get_state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


@contextlib.contextmanager
def undisturbed(model: nn.Module, own_modes: bool = False, trains: bool = True) -> Iterator[None]:
    """Training mode inside; afterwards every random state, buffer (BN statistics), gradient and mode is as before, and
    so is what modules keep in plain attributes (``hidden_state``), such as RetinaNet's loss normalizer.

    Args:
        own_modes: every module stays in its mode, as long as the model has that in which it trains (frozen BN stays
            frozen).
        trains: whether that is training mode.
    """
    buffers = [
        (module, dict(module._buffers), {key: _cloned(buffer) for key, buffer in module._buffers.items()})
        for module in model.modules()
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    hidden = HiddenState(model)
    for parameter, _ in gradients:
        parameter.grad = None
    with preserved_random_state():
        try:
            if not (own_modes and model.training == trains):
                model.train(trains)
            yield
        finally:
            for module, held, values in buffers:
                _put_back(module, held, values)
            hidden.put_back()
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, mode in modes:
                module.training = mode


def _cloned(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()


@torch.no_grad()
def _put_back(module: nn.Module, held: dict[str, Tensor | None], values: dict[str, Tensor | None]) -> None:
    """Also of buffers that were registered, replaced or resized. No public call replaces a buffer by the same "
    "tensor."""
    module._buffers.clear()
    module._buffers.update(held)
    for key, buffer in held.items():
        if buffer is None:
            continue
        if buffer.shape == values[key].shape:
            buffer.copy_(values[key])
        else:
            module._buffers[key] = values[key]


def passes_over(
    model: nn.Module, loader: Iterable[Any], loss: Callable[[Any], Tensor], seed: int = 0
) -> TrainingPasses:
    """Extra passes over the first batches of ``loader``, in an order that depends on ``seed`` and cycle only.

    Args:
        model: not wrapped in DistributedDataParallel.
        loader: can be iterated more than once; its iterator is not the one that training uses (no persistent workers).
            A batch is a tensor, a list of dicts (an example each), or a tuple or dict of fields: tensors, or lists with
            an entry an example.
        loss: batch -> scalar loss of a forward pass of ``model`` in training mode.

    Raises:
        UserError: ``loader`` is an iterator, or keeps its workers.
    """
    if isinstance(loader, Iterator) or getattr(loader, "persistent_workers", False):
        raise UserError(
            "loader= must start again whenever it is iterated, beside the training: give a DataLoader of its own "
            "without persistent_workers, or a list of batches"
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

    return TrainingPasses(model, batches, loss, _joined)


def _joined(batches: Sequence[Any]) -> Any:
    """One batch with all examples of several."""
    first = batches[0]
    if isinstance(first, Mapping):
        return {key: _end_to_end([batch[key] for batch in batches]) for key in first}
    if isinstance(first, (tuple, list)) and not any(isinstance(part, Mapping) for part in first):
        return tuple(_end_to_end(field) for field in zip(*batches, strict=True))
    return _end_to_end(batches)


def _end_to_end(parts: Sequence[Any]) -> Any:
    if not isinstance(parts[0], Tensor):
        return list(itertools.chain.from_iterable(parts))
    if len({part.shape[1:] for part in parts}) > 1:
        sizes = ", ".join(str(tuple(part.shape)) for part in parts[:3])
        raise UserError(
            f"loader= yields batches of different sizes ({sizes}, ...), which cannot be joined for the re-calibration "
            "of frozen norms: give batches of one size, or lists of images"
        )
    return torch.cat(list(parts))
