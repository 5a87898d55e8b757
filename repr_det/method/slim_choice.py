"""Which computes the sub-network at less cost: leaving out dropped channels (slim) or computing them as zeros (masked).

Both give the same numbers up to rounding, so whatever decides becomes part of the numbers. On a GPU, whose kernels
round differently from run to run anyway, a clock decides: the first training pass of the first sub-network phase finds
its own batch waiting, and forward and backward passes over it are timed both ways, in turn. They leave no trace: random
states, buffers, gradients and what modules keep are as before, and no optimizer steps. On a CPU, and under
``torch.use_deterministic_algorithms``, two runs of one seed are the same bit for bit, so no clock may decide: a count
does, of the operations that the first such pass saved and of the memory traffic that slicing cost.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from repr_det.method.distributed import broadcast_, mean_over_ranks
from repr_det.method.errors import UserError
from repr_det.method.passes import undisturbed
from repr_det.method.slim import Absent, SlimNetwork

logger = logging.getLogger("repr_det.slim")

# Operations that take as long as moving one byte: see docs/performance.md.
OPERATIONS_PER_BYTE = 11.0
_WARM_UP, _ROUNDS = 2, 5


def check_slim(value: Any) -> None:
    """Raises UserError where REPR.SLIM is none of auto, True and False."""
    if value is not True and value is not False and value != "auto":
        raise UserError(f"REPR.SLIM must be auto, True or False, got {value!r}")


@dataclass(frozen=True)
class Choice:
    """Which way was chosen, and by how much.

    Attributes:
        slim: the way.
        by: "clock", "count", or "default" where neither could tell.
        slim_cost, masked_cost: of a forward and backward pass, means over the ranks. By the clock seconds; by the
            count operations of the convs that leave out channels, and in operations what moving their bytes takes;
            else 0.
    """

    slim: bool
    by: str
    slim_cost: float = 0.0
    masked_cost: float = 0.0

    def __str__(self) -> str:
        name, other = ("slim", "masked") if self.slim else ("masked", "slim")
        if self.by == "default":
            return f"{name}: the two ways could not be compared"
        costs = {"slim": self.slim_cost, "masked": self.masked_cost}
        unit, scale = ("s", 1.0) if self.by == "clock" else ("G operations in the convs", 1e9)
        values = " against ".join(f"{costs[which] / scale:.4g}" for which in (name, other))
        share = costs[name] / costs[other]
        return f"{name} by {self.by}: {values} {unit} a step's passes, {share:.3f} of {other}"


class SlimChooser(Absent):
    """Decides in the first training pass of a model whose slim network is installed, then is gone.

    It is what calling the model does, as the parts of ``SlimNetwork`` are for their modules: not there in copies,
    scripts and exports. A model that somebody has compiled is never asked.

    Args:
        network: installed. Where masked is chosen it is removed; where a count decides not before the next pass, for
            the backward pass may run parts of the forward pass again (activation checkpointing).
        decided: told what was chosen.
        apart: where a framework logs during passes: a context in which it logs elsewhere.
    """

    def __init__(
        self,
        network: SlimNetwork,
        decided: Callable[[Choice], None],
        apart: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.network = network
        self.model = network.model
        self.decided = decided
        self.apart = apart
        self._choice: Choice | None = None
        if self.model._compiled_call_impl is None:
            self.model._compiled_call_impl = self

    def remove(self) -> None:
        """Decides no more; a second call changes nothing."""
        if self.model._compiled_call_impl is self:
            del self.model._compiled_call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._choice is not None:  # masked, by the count of the last pass
            self.remove()
            self.network.remove()
            return self.model(*args, **kwargs)
        trains = self.model.training and torch.is_grad_enabled()
        if not trains or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.model._call_impl(*args, **kwargs)
        if by_clock(self.network):
            choice = _choose("clock", time_both(self.network, args, kwargs, self.apart), self.network)
            self.remove()
            if not choice.slim:
                self.network.remove()
            self.decided(choice)
            return self.model(*args, **kwargs)
        output = self.model._call_impl(*args, **kwargs)
        slim, masked = (x.operations + OPERATIONS_PER_BYTE * x.bytes for x in self.network.count())
        choice = _choose("count", (slim, masked), self.network)
        if choice.slim:
            self.remove()
        else:
            self._choice = choice
        self.decided(choice)
        return output


def by_clock(network: SlimNetwork) -> bool:
    """Whether a clock may decide, or two runs of one seed have to be the same."""
    return network.layers[0].weight.is_cuda and not torch.are_deterministic_algorithms_enabled()


def _choose(by: str, costs: tuple[float, float], network: SlimNetwork) -> Choice:
    """What costs less over all ranks; ``costs``: of slim and masked, not finite or 0 where unknown."""
    found = mean_over_ranks(torch.tensor(costs, dtype=torch.float64, device=network.layers[0].weight.device))
    broadcast_([found])
    slim, masked = found.tolist()
    known = 0 < slim < float("inf") and 0 < masked < float("inf")
    choice = Choice(slim <= masked, by, slim, masked) if known else Choice(True, "default")
    logger.info("RePr: the sub-network is computed %s", choice)
    return choice


def time_both(
    network: SlimNetwork,
    args: tuple,
    kwargs: dict,
    apart: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[float, float]:
    """Median seconds of a forward and backward pass over a batch: slim, masked. ``network`` stays installed.

    Not a number where a pass fails (out of memory) or returns nothing that has gradients.
    """
    model = network.model
    parameters = [p for p in model.parameters() if p.requires_grad]

    def passes() -> None:
        own_args, own_kwargs = tree_map(lambda x: x.detach().clone() if torch.is_tensor(x) else x, (args, kwargs))
        # Not model(...), whose hooks are the caller's.
        loss = sum(x.float().sum() for x in _differentiable(model.forward(*own_args, **own_kwargs)))
        torch.autograd.grad(loss, parameters, allow_unused=True)

    seconds: dict[bool, list[float]] = {True: [], False: []}
    try:
        for number in range(_WARM_UP + _ROUNDS):
            for slim in (True, False) if number % 2 else (False, True):
                (network.install if slim else network.remove)()
                with undisturbed(model, own_modes=True), apart():
                    seconds[slim].append(seconds_of(passes, network.layers[0].weight.device))
    except (RuntimeError, AttributeError) as error:  # AttributeError: the "loss" of nothing
        logger.warning("RePr: slim and masked passes cannot be timed: %s", " ".join(str(error).split())[:200])
        return float("nan"), float("nan")
    finally:
        network.install()
    slim_time, masked_time = (statistics.median(seconds[slim][_WARM_UP:]) for slim in (True, False))
    return slim_time, masked_time


def seconds_of(function: Callable[[], Any], device: torch.device | str) -> float:
    """Seconds until ``device`` has done what ``function`` asks of it: between events on a GPU, else by the clock."""
    device = torch.device(device)
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def _differentiable(output: Any) -> Iterator[Tensor]:
    """Tensors with gradients in nested dicts, lists and tuples."""
    if torch.is_tensor(output):
        if output.requires_grad:
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _differentiable(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _differentiable(value)
