"""Extra forward passes over training batches (data-driven criteria, calibration) that leave training undisturbed."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
    """

    model: nn.Module
    batches: Callable[[int, int], Iterable[Any]]
    loss: Callable[[Any], Tensor]
    join: Callable[[list[Any]], Any]


def random_state() -> dict[str, Any]:
    """The state of every generator that training draws from: Python, NumPy, torch CPU and the current CUDA device.

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
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what ``random_state`` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextlib.contextmanager
def undisturbed(model: nn.Module, own_modes: bool = False) -> Iterator[None]:
    """Training mode inside; afterwards every random state, buffer (BN statistics), gradient and mode is as before, and
    so is what modules keep in plain attributes (``hidden_state``), such as RetinaNet's loss normalizer.

    Args:
        own_modes: modules that are in eval mode in a model that trains (frozen BN) stay in it.
    """
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    hidden = HiddenState(model)
    for parameter, _ in gradients:
        parameter.grad = None
    with preserved_random_state():
        try:
            if not (own_modes and model.training):
                model.train()
            yield
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
            hidden.put_back()
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, mode in modes:
                module.training = mode
