"""The state that optimizers keep for single filters: known by its name, else refused at a drop."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from repr_det.method.errors import OptionError, UserError
from repr_det.method.layers import FilterLayer, zero_rows_
from repr_det.network.tracing import tensors_in

# A filter that begins to train again has momentum 0 ...
_MOMENTA = (
    "momentum_buffer exp_avg grad_avg acc_delta exp_avg_diff neg_pre_grad previous_grad pre_grad last_grad prev_grad "
    "prev velocity exp_avg_slow exp_avg_fast s momentum"
).split()
# ... squared gradients and steps of the others ...
_SCALES = (
    "exp_avg_sq max_exp_avg_sq square_avg exp_inf sum step_size exp_avg_var max_exp_avg_var grad_sum_sq sum_square "
    "exp_hessian_diag exp_avg_nest_sq max_square_avg exp_hessian_diag_sq"
).split()
# ... and a second set of weights like the first.
_WEIGHTS = (
    "z ax x0 p0 slow_param slow_params slow_buffer lookahead_slow_buff old_p master master_param master_weight "
    "master_weights fp32_param param_copy backup"
).split()


def check_optimizers(layers: Sequence[FilterLayer], optimizers: Sequence[Optimizer]) -> None:
    """Raises UserError if no optimizer holds a trainable member of a filter, or one has eps 0."""
    groups = [(type(optimizer).__name__, group) for optimizer in optimizers for group in optimizer.param_groups]
    held = {id(parameter) for _, group in groups for parameter in group["params"]}
    for layer in layers:
        for name, tensor in layer.tensors().items():
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad and id(tensor) not in held:
                raise OptionError(
                    f"the optimizer does not hold the {name} of {layer.name}: give all optimizers (a list), switch off "
                    f"its requires_grad, or add {layer.name!r} to {{exclude}}"
                )
    for name, group in groups:
        if any(group.get(key) == 0 for key in ("eps", "eps1", "eps2")):
            raise UserError(f"the optimizer {name} has eps 0: its step of a dropped filter is 0 / 0; give it 1e-8")


def check_optimizer_state(layers: Sequence[FilterLayer], optimizers: Sequence[Optimizer]) -> None:
    """Raises UserError if an optimizer keeps something unknown for a layer."""
    owners = {parameter: layer.name for layer in layers for parameter in layer.parameters()}
    for kind, parameter, key, tensor in _all_state(optimizers):
        owner = f"filters of {owners[parameter]}" if parameter in owners else ""
        if tensor.numel() > parameter.numel() > 1:
            owner = "all weights together"
        elif tensor.dim() == 0 or tensor.numel() <= 1 < parameter.numel():
            continue  # a counter
        elif key in (*_MOMENTA, *_SCALES, *_WEIGHTS) and tensor.shape == parameter.shape and tensor.is_floating_point():
            continue
        if owner:
            raise UserError(
                f"the optimizer {kind} keeps {key!r} for {owner}, which RePr does not know how to take a filter out "
                "of: take one that keeps momentum or moments only, such as AdamW"
            )


def _all_state(optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Tensor, str, Tensor]]:
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items() if torch.is_tensor(parameter) else ():
                for tensor in tensors_in(value, depth=1):
                    yield type(optimizer).__name__, parameter, key, tensor


def optimizer_state(optimizers: Sequence[Optimizer], parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that optimizers keep for ``parameter``, of its shape, by their keys."""
    for optimizer in optimizers:
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                yield key, value


@torch.no_grad()
def zero_optimizer_state_(optimizers: Sequence[Optimizer], layer: FilterLayer, rows: Tensor) -> None:
    for parameter in layer.parameters():
        zero_rows_((tensor for _, tensor in optimizer_state(optimizers, parameter)), rows)


@torch.no_grad()
def restart_optimizer_state_(
    optimizers: Sequence[Optimizer],
    parameter: Tensor,
    rows: Tensor,
    others: Tensor,
    dim: int = 0,
    within: slice = slice(None),
) -> None:
    """Restarts entries that train again: ``rows`` along ``dim`` among the filters ``within``.

    With squared gradients of 0 Adam's first steps would be several times the learning rate.
    """
    for key, whole in optimizer_state(optimizers, parameter):
        tensor = whole[within]
        old = tensor.index_select(dim, rows)
        if key in _WEIGHTS:
            old = parameter[within].index_select(dim, rows).to(tensor.dtype)
        elif key in _SCALES and len(others):
            old = _mean(tensor, others, dim).expand_as(old)
        else:
            old = torch.zeros_like(old)
        tensor.index_copy_(dim, rows, old)


@torch.no_grad()
def raise_squares_of_inputs_(
    optimizers: Sequence[Optimizer], weight: Tensor, rows: Tensor, others: Tensor, within: slice
) -> None:
    """Raises the squared gradients of kernels on input channels that return: they have decayed."""
    for key, whole in optimizer_state(optimizers, weight):
        tensor = whole[within]
        if key in _SCALES and len(others):
            raised = torch.maximum(tensor.index_select(1, rows), _mean(tensor, others, 1))
            tensor.index_copy_(1, rows, raised)


def _mean(tensor: Tensor, others: Tensor, dim: int) -> Tensor:
    return tensor.index_select(dim, others).float().mean().to(tensor.dtype)
