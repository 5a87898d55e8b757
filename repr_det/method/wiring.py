"""Which norm a conv's output runs through, seen in a forward pass by the graph that autograd builds.

A conv marks the node of its output. From the input of a norm one walks back to that mark, through what works channel by
channel (a ReLU between them, say). Passes without gradients tell nothing.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repr_det.method.errors import UserError
from repr_det.method.passes import undisturbed

logger = logging.getLogger("repr_det.wiring")

_MARK = "repr_det.conv"
_MIXES_CHANNELS = ("View", "Transpose", "Permute", "Unfold", "Shuffle", "Convolution")
_MOST_NODES = 64


@torch.enable_grad()
def norms_in_a_pass(
    model: nn.Module, sample: Any, convs: Mapping[str, nn.Module], norms: list[nn.Module]
) -> dict[str, nn.Module | None]:
    """Conv name -> the first of ``norms`` that its output goes into, alone; None where it goes into none.

    Convs that the pass does not run, or whose output has no gradient, are missing. The model is left as it was.

    Args:
        model: on its final device.
        sample: what it is called with: one argument, or a tuple of them.
        convs: conv name -> module.
    """
    found: dict[str, nn.Module | None] = {}

    def ran(name: str, output: Tensor) -> None:
        if _mark(name, output):
            found.setdefault(name, None)

    def runs(norm: nn.Module, value: Tensor) -> None:
        name = _source(value)
        if name is not None and found[name] is None:
            found[name] = norm

    with undisturbed(model, own_modes=True), _watched(convs, ran, norms, runs):
        model(*sample if isinstance(sample, tuple) else (sample,))
    return found


class WiringWatch:
    """Compares the norms of layers with the first training pass that shows them, then gets out of the way.

    Copies and pickles of the model made meanwhile are not watched.

    Args:
        pairs: name of a conv -> conv and the norm taken for its own, None where none was.
        others: name -> norm that was taken for that of no conv.
        together: whether a conv and one of ``others``, by name, run in the forward pass of one module. Then the conv
            is refused, otherwise a warning tells.
    """

    def __init__(
        self,
        pairs: Mapping[str, tuple[nn.Module, nn.Module | None]],
        others: Mapping[str, nn.Module],
        together: Callable[[str, str], bool],
    ) -> None:
        self._names = list(pairs)
        self._together = together
        self._wrong: dict[str, str] = {}
        self._ran: set[str] = set()
        self._undecided = {name for name, (_, norm) in pairs.items() if norm is not None}
        self._unseen = set(others)
        self._handles = []
        for name, (conv, norm) in pairs.items():
            self._handles.append(conv.register_forward_hook(_Hook(self._see_conv, name)))
            if norm is not None:
                self._handles.append(norm.register_forward_pre_hook(_Hook(self._see_norm, name)))
        for name, norm in others.items():
            self._handles.append(norm.register_forward_pre_hook(_Hook(self._see_other, name)))

    def check(self) -> None:
        """Raises UserError where a conv's output has been seen to go elsewhere."""
        for name in filter(self._wrong.__contains__, self._names):
            raise UserError(
                f"REPR: {self._wrong[name]}: name it, find_filter_layers(..., norms={{{name!r}: norm}}), give a "
                "sample, find_filter_layers(..., sample=images), or exclude that layer"
            )

    def has_seen(self, name: str) -> bool:
        """Whether the norm is known to be the conv's: seen in a pass, or not one to be watched."""
        return name not in self._undecided and name not in self._wrong

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _see_conv(self, name: str, output: Any) -> None:
        self._ran.add(name)
        _mark(name, output)

    def _see_norm(self, name: str, inputs: tuple) -> None:
        if name not in self._undecided or not _tells(inputs):
            return
        feeding = _feeding(inputs[0])
        if name not in self._ran:
            reason = "the norm runs before the conv"
        elif name not in feeding and feeding:
            reason = f"the norm follows {' and '.join(sorted(feeding))}"
        elif name not in feeding:
            return  # nothing can be said of this pass
        else:
            reason = ""
        if reason:
            self._wrong[name] = (
                f"the norm that stands behind {name} in its parent module is not the one that its output goes through "
                f"({reason})"
            )
        self._undecided.discard(name)
        self._stop_if_all_is_seen()

    def _see_other(self, norm: str, inputs: tuple) -> None:
        if norm not in self._unseen or not _tells(inputs):
            return
        name = _source(inputs[0])
        if name in self._names:
            what = f"the output of {name} goes through {norm}, which was not taken for its norm"
            if self._together(name, norm):
                self._wrong.setdefault(name, f"{what}, and makes something of dropped filters")
            else:
                logger.warning(
                    "RePr: %s and puts out a constant for dropped filters: name it, give a sample "
                    "(find_filter_layers) or exclude that layer",
                    what,
                )
        self._unseen.discard(norm)
        self._stop_if_all_is_seen()

    def _stop_if_all_is_seen(self) -> None:
        if not self._undecided and not self._unseen:
            self.stop()


def _tells(inputs: tuple) -> bool:
    return torch.is_grad_enabled() and bool(inputs) and torch.is_tensor(inputs[0])


class _Hook:
    """A forward hook or forward pre-hook of the watch, which does not go with copies of the module that carries it."""

    def __init__(self, see: Callable[[str, Any], None], name: str) -> None:
        self.see = see
        self.name = name

    def __call__(self, module: nn.Module, inputs: tuple, *output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.see(self.name, output[0] if output else inputs)

    def __reduce__(self) -> tuple:
        return _Nothing, ()

    def __deepcopy__(self, memo: dict) -> "_Nothing":
        return _Nothing()


class _Nothing:
    def __call__(self, *arguments: Any) -> None:
        pass


def _mark(name: str, output: Any) -> bool:
    node = output.grad_fn if torch.is_tensor(output) else None
    if node is None:
        return False
    node.metadata[_MARK] = name
    return True


def _source(value: Tensor) -> str | None:
    """Name of the conv whose output this is, or has become channel by channel with nothing else in it."""
    node = value.grad_fn
    for _ in range(_MOST_NODES):
        if node is None:
            return None
        if _MARK in node.metadata:
            return node.metadata[_MARK]
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if len(parents) != 1 or any(word in node.name() for word in _MIXES_CHANNELS):
            return None
        node = parents[0]
    return None


def _feeding(value: Tensor) -> set[str]:
    """Names of the marked convs from which this comes without another conv between."""
    names: set[str] = set()
    waiting, known = [value.grad_fn], set()
    while waiting and len(known) < _MOST_NODES:
        node = waiting.pop(0)
        if node is None or node in known:
            continue
        known.add(node)
        if _MARK in node.metadata:
            names.add(node.metadata[_MARK])
        elif "Convolution" not in node.name():
            waiting.extend(parent for parent, _ in node.next_functions)
    return names


@contextmanager
def _watched(
    convs: Mapping[str, nn.Module],
    ran: Callable[[str, Tensor], None],
    norms: list[nn.Module],
    runs: Callable[[nn.Module, Tensor], None],
) -> Iterator[None]:
    handles = [
        conv.register_forward_hook(lambda _, inputs, output, name=name: ran(name, output))
        for name, conv in convs.items()
    ]
    handles += [norm.register_forward_pre_hook(lambda norm, inputs: runs(norm, inputs[0])) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
