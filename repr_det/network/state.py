"""State that training draws from and keeps, put back as it was after passes that are not part of it."""

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repr_det.network.hidden_state import HiddenState


def generator_of(*numbers: int) -> torch.Generator:
    """A generator of the CPU whose stream depends on ``numbers`` alone, not on what was drawn before."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


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
    """Every random state is afterwards as before, and so are the generators in ``holders`` (``generators_in``)."""
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


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel or torch.compile."""
    inner: Any = model
    while isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    return inner


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
    """Also of buffers that were registered, replaced or resized: no public call puts the same tensor back."""
    module._buffers.clear()
    module._buffers.update(held)
    for key, buffer in held.items():
        if buffer is None:
            continue
        if buffer.shape == values[key].shape:
            buffer.copy_(values[key])
        else:
            module._buffers[key] = values[key]
