"""Runs the sub-network without computing its dropped channels: the masked network's numbers at a part of its FLOPs.

While filters are dropped their conv rows, biases and affine norm parameters are zero, so their channels are zero. Here
they are left out of every conv instead. Parameters stay as they are, and with them optimizer, DDP, checkpoints and
state-dict keys: every forward pass slices them, every backward pass scatters the gradients into full tensors.

What takes effect is bound to this model and to its weights being zero. A copy, a pickle, a trace, a script or an export
is the masked network with the weights that it holds, and so is the model itself while other weights are in it.

Shape shorthand:
    J: filters of a layer
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from repr_det.method.blocks import known_blocks
from repr_det.method.layers import FilterLayer
from repr_det.method.slices import Rows
from repr_det.method.slim_passes import (
    BlockForward,
    ConvForward,
    NormForward,
    SlimForward,
    Work,
    Zeros,
    is_channelwise,
    is_foldable,
    is_sliceable,
)

logger = logging.getLogger("repr_det.slim")

# Kept counts are rounded up to a multiple of this by channels that are dropped, which changes no number. oneDNN (AVX2)
# computes in blocks of 8 channels: R50's backbone took no longer with multiples of 8 or 16 than with odd counts, in
# spite of the additional FLOPs. The half-precision kernels of cuDNN want multiples of 8.
_MULTIPLE = 8

_traced_slim = False


@contextmanager
def traced_slim() -> Iterator[None]:
    """Inside, traces see the slim network, for tools that count its operations; they are of no other use."""
    global _traced_slim
    before, _traced_slim = _traced_slim, True
    try:
        yield
    finally:
        _traced_slim = before


class SlimNetwork:
    """Replaces the forward passes of a model's convs by ones that compute kept channels only, until ``remove``.

    Outputs, gradients and the running statistics of kept channels are the masked network's up to rounding, in training
    and in evaluation, under autocast too. Inside a block that ``blocks`` knows the kept channels flow on
    to the next conv, which leaves out the same input channels, and those of the last conv are added onto the shortcut;
    FrozenBN is folded into the sliced convs and into the shortcut's. Every other conv (FPN, plain nets, deformable
    blocks, and a conv before a grouped one) computes its kept rows and scatters them into zeros; before GN or a norm
    class of its own the zeros come first, for it may look at all channels. Grouped convs, padding modes other than
    zeros and convs whose forward pass is not in ``blocks.CONV_FORWARDS`` stay masked.

    Module calls are kept, so forward hooks fire; inside a block they see kept channels only. Under ``torch.compile``,
    ``torch.func`` and forward-mode differentiation dropped channels are computed, as zeros.

    Where dropped filters turn out not to be zero (weights that were loaded, an average that was swapped in), their
    block or conv computes all channels until they are zero again; a warning says so. That is looked at whenever weights
    are loaded, and on the CPU and in evaluation at every pass. While a GPU trains, values that are written by other
    means go unnoticed until the restore.

    Args:
        model: on its final device, wrapped in DistributedDataParallel or not.
        layers: those whose filters are dropped; every tensor of a dropped filter must be zero while installed.
        masks: layer name -> (J,) bool, True = dropped; a layer that is missing keeps all its filters.
        multiple: what kept counts are rounded up to; 1 computes kept channels only.

    Raises:
        ValueError: a mask has the wrong length or drops all filters of a layer.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[FilterLayer], masks: Mapping[str, Tensor], multiple: int = _MULTIPLE
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.masks = dict(masks)
        self.multiple = multiple
        self._replaced: list[nn.Module] = []
        self._handles: list[Any] = []
        self._zeros: dict[nn.Module, Zeros] = {}
        for layer in self.layers:
            mask = self.masks.get(layer.name)
            if mask is not None and (len(mask) != layer.num_filters or bool(mask.all())):
                raise ValueError(
                    f"the mask of {layer.name} must keep at least one of {layer.num_filters} filters, got "
                    f"{len(mask)} entries of which {int(mask.sum())} drop one"
                )

    @property
    def installed(self) -> bool:
        return bool(self._replaced)

    def install(self) -> None:
        """Takes effect with the next forward pass; a second call changes nothing."""
        if self.installed:
            return
        kept = {layer.conv: rows for layer in self.layers if (rows := self._kept(layer)) is not None}
        self._zeros = {x.conv: Zeros(x, self.masks[x.name], self._warn) for x in self.layers if x.conv in kept}
        for zeros in self._zeros.values():
            for module in {zeros.layer.conv, zeros.layer.norm} - {None}:
                self._handles.append(module.register_load_state_dict_post_hook(_OnLoad(zeros)))
        for block, chain in known_blocks(self.model):
            self._install_block(block, chain, kept)
        for conv, rows in kept.items():
            self._install_conv(conv, rows, None, scatter=True)

    def remove(self) -> None:
        """Back to the masked network; a second call changes nothing."""
        for module in self._replaced:
            del module._compiled_call_impl
        for handle in self._handles:
            handle.remove()
        self._replaced, self._handles, self._zeros = [], [], {}

    def count(self) -> tuple[Work, Work]:
        """What the last forward pass and its backward pass take in the convs that leave out channels: slim, masked."""
        forwards = [module._compiled_call_impl.forward for module in self._replaced]
        works = [forward.count() for forward in forwards if isinstance(forward, ConvForward)]
        return sum((slim for slim, _ in works), Work()), sum((masked for _, masked in works), Work())

    def __enter__(self) -> "SlimNetwork":
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _kept(self, layer: FilterLayer) -> Rows | None:
        """The rows to compute, or None where that is all of them or the conv has to stay masked."""
        mask = self.masks.get(layer.name)
        own_norm = getattr(layer.conv, "norm", None)
        if mask is None or not mask.any() or not is_sliceable(layer.conv) or own_norm not in (None, layer.norm):
            return None
        mask = mask.to(layer.weight.device)
        extra = mask.nonzero().flatten()[: -int((~mask).sum()) % self.multiple]
        chosen = ~mask
        chosen[extra] = True
        if chosen.all():
            return None
        index = chosen.nonzero().flatten()
        inverse = torch.full_like(mask, len(index), dtype=torch.long)
        inverse[index] = torch.arange(len(index), device=index.device)
        return Rows(index, inverse.masked_fill(mask, len(index)))

    def _install_block(self, block: nn.Module, chain: list[nn.Module], kept: dict[nn.Module, Rows]) -> None:
        given = None
        zeros = [self._zeros[conv] for conv in chain if conv in kept]
        for conv, follower in zip(chain, [*chain[1:], None], strict=True):
            rows = kept.pop(conv, None)
            flows_on = (
                rows is not None
                and getattr(conv, "activation", None) is None
                and (getattr(conv, "norm", None) is None or is_channelwise(conv.norm))
                and (follower is None or is_sliceable(follower))
            )
            if rows is not None or given is not None:
                installed = self._install_conv(conv, rows, given, scatter=not flows_on, zeros=zeros)
            given = rows if flows_on else None
        if given is not None:
            shortcut = block.shortcut
            if shortcut is not None and shortcut not in kept and is_sliceable(shortcut) and is_foldable(shortcut.norm):
                self._install_conv(shortcut, None, None, scatter=False)
            installed.block = BlockForward(block, chain, given, zeros)
            self._replace(block, installed.block)

    def _install_conv(
        self,
        conv: nn.Module,
        rows: Rows | None,
        columns: Rows | None,
        scatter: bool,
        zeros: Sequence[Zeros] | None = None,
    ) -> ConvForward:
        norm = getattr(conv, "norm", None)
        slices_norm = norm is not None and rows is not None and is_channelwise(norm)
        if zeros is None:
            zeros = [self._zeros[conv]] if rows is not None else []
        forward = ConvForward(conv, rows, columns, scatter and rows is not None, slices_norm, zeros)
        if slices_norm:
            self._replace(norm, NormForward(norm, rows))
        self._replace(conv, forward)
        return forward

    def _warn(self, name: str) -> None:
        if not any(zeros.broken for zeros in self._zeros.values()):  # one line for all layers of a checkpoint
            logger.warning(
                "RePr: dropped filters are not zero any more (first seen: %s): other weights were written into the "
                "model in its sub-network phase. Their channels are computed until they are zero again; a restore "
                "needs them zero",
                name,
            )

    def _replace(self, module: nn.Module, forward: SlimForward) -> None:
        # Not ``module.forward``: this attribute is what a module's call looks at, what torch leaves out of copies and
        # pickles, and what compilers and scripts pass by.
        module._compiled_call_impl = _SlimCall(module, forward)
        self._replaced.append(module)


class Absent:
    """Not there in deep copies and pickles: its place holds None, or what ``absent`` says."""

    @staticmethod
    def absent() -> Any:
        return None

    def __deepcopy__(self, memo: dict) -> Any:
        return self.absent()

    def __reduce__(self) -> tuple:
        return type(self).absent, ()


class _OnLoad(Absent):
    """Looks after weights have been loaded into a conv or its norm."""

    def __init__(self, zeros: Zeros) -> None:
        self.zeros = zeros

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        self.zeros.look()

    @staticmethod
    def absent() -> Any:
        return _nothing_on_load


def _nothing_on_load(module: nn.Module, incompatible_keys: Any) -> None:
    pass


class _SlimCall(Absent):
    """What calling a module does: its hooks as ever, and between them the slim forward pass where it applies."""

    def __init__(self, module: nn.Module, forward: SlimForward) -> None:
        self.module = module
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held = self.module.__dict__
        if (
            kwargs
            or len(args) != 1
            or "forward" in held
            or not _is_computed(args[0])
            or not self.forward.takes(args[0])
        ):
            return self.module._call_impl(*args, **kwargs)
        held["forward"] = self.forward
        try:
            return self.module._call_impl(*args)
        finally:
            held.pop("forward", None)


def _is_computed(x: Any) -> bool:
    """Whether nothing but autograd follows a pass: no tracer, compiler or exporter, which make a graph for later, nor
    torch.func and forward-mode differentiation, which know torch's own operations only."""
    if not torch.is_tensor(x) or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad.unpack_dual(x).tangent is not None:
        return False
    return _traced_slim or not torch.jit.is_tracing()
