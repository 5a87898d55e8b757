"""RePrScheme: drops filters, holds them at zero, brings them back (RePr, algorithm 1); knows no trainer.

In a plain loop:

    scheme = RePrScheme(find_filter_layers(model, ["*conv*"]), optimizer)
    for i, batch in enumerate(batches):
        train_step(batch)                       # forward, backward, optimizer.step()
        if i in schedule.drop_iters:
            scheme.drop()
        elif i in schedule.restore_iters:
            scheme.restore()
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repr_det.calibration import match_moments, measure_moments
from repr_det.criteria import Context, get_criterion
from repr_det.distributed import broadcast_, check_agreement, rank
from repr_det.errors import UserError
from repr_det.layers import BATCH, FROZEN, GROUP, NONE, FilterLayer, zero_rows_
from repr_det.orthogonality import (
    inter_filter_orthogonality,
    least_overlap_rows,
    overlap_of_kept,
    overlap_of_unit_rows,
    overlap_with_returned,
    unit_filters,
)
from repr_det.passes import TrainingPasses
from repr_det.selection import check_capacity, select_filters

SCALES = ("kept", "old", "unit")
FROZEN_NORM_MODES = ("recalibrate", "keep")
RETURNS = ("as_published", "median_gamma", "function_preserving")


@dataclass
class Transition:
    """What a drop or a restore did.

    Attributes:
        event: "drop" or "restore".
        cycle: index of the cycle, from 0.
        dropped: layer name -> indices of the filters that left or came back.
        overlap_before, overlap_after: mean O_f over the filters in use before and after.
        max_cosine: layer name -> largest |cos| of a new filter to the kept and old ones (restores only).
        seconds: wall-clock time.
        overlaps: layer -> O_f of every filter, before a drop and after a restore.
    """

    event: str
    cycle: int
    dropped: dict[str, list[int]]
    overlap_before: float
    overlap_after: float
    max_cosine: dict[str, float]
    seconds: float
    overlaps: dict[str, list[float]]


def check_reinit(scale: str, frozen_norm: str, returns: str) -> None:
    """Raises UserError for a mode that does not exist."""
    for key, value, choices in (
        ("SCALE", scale, SCALES),
        ("FROZEN_NORM", frozen_norm, FROZEN_NORM_MODES),
        ("RETURN", returns, RETURNS),
    ):
        if value not in choices:
            raise UserError(f"REPR.REINIT.{key} must be one of {', '.join(choices)}, got {value!r}")


class RePrScheme:
    """The state machine full -> drop -> sub-network -> restore -> full.

    Invariants while filters are dropped: every entry of ``FilterLayer.tensors()`` of a dropped filter is exactly 0, its
    gradient is 0 as soon as it is computed (before DDP, clipping and the optimizer see it), and its optimizer state is
    0: no optimizer whose step is zero for a zero parameter, gradient and state moves it.

    Args:
        layers: the layers that take part, in ranking order.
        optimizer: holds their parameters.
        criterion: a name in ``criteria.CRITERIA``.
        drop_ratio, max_drop_per_layer: see ``selection.select_filters``.
        scale: norm of a new filter: "kept" the mean norm of the filters that stayed, "old" its own before the drop,
            "unit" 1.
        frozen_norm: what FrozenBN statistics do at a restore: "recalibrate" to the channel's old moments, or "keep".
        returns: how loud a filter returns behind BN and GN. "as_published": gamma 1. "median_gamma": the median of the
            kept filters of its layer. "function_preserving": where ``readers`` knows the conv, the restore changes
            no output of the network (of eval mode too; but GN's groups change with their members): the reader's kernels
            for the returning channels become 0, or gamma where the channels are added to a shortcut; elsewhere, and
            where there is no gamma to learn (FrozenBN, no norm) on a shortcut, as published.
        readers: conv -> the only conv that reads its channels, None for a shortcut's sum (``blocks.readers``).
        criterion_batches, calibration_batches: training batches that they may look at.
        seed: all randomness comes from it and the cycle; the same on every rank.
        passes: how to run training batches; needed by data-driven criteria and by "recalibrate".
        slim_model: the model that holds the layers, to leave dropped channels out of its computation
            (``slim.SlimNetwork``); None computes them as zeros.

    Raises:
        UserError: an option is out of range, or a layer's weight is not in the optimizer.
    """

    def __init__(
        self,
        layers: Sequence[FilterLayer],
        optimizer: torch.optim.Optimizer,
        *,
        criterion: str = "ortho",
        drop_ratio: float = 0.3,
        max_drop_per_layer: float = 0.5,
        scale: str = "kept",
        frozen_norm: str = "recalibrate",
        returns: str = "as_published",
        readers: Mapping[nn.Module, nn.Module | None] | None = None,
        criterion_batches: int = 8,
        calibration_batches: int = 4,
        seed: int = 0,
        passes: TrainingPasses | None = None,
        slim_model: nn.Module | None = None,
    ) -> None:
        check_reinit(scale, frozen_norm, returns)
        self.layers = list(layers)
        check_capacity({layer.name: layer.num_filters for layer in self.layers}, drop_ratio, max_drop_per_layer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for layer in self.layers:
            if id(layer.weight) not in held:
                raise UserError(f"REPR: the optimizer does not hold the weight of {layer.name}; exclude that layer")
        self.optimizer = optimizer
        self.criterion_name = criterion
        self.criterion = get_criterion(criterion, sum(layer.num_filters for layer in self.layers))
        self.drop_ratio = drop_ratio
        self.max_drop_per_layer = max_drop_per_layer
        self.scale = scale
        self.returns = returns
        self.readers = dict(readers or {}) if returns == "function_preserving" else {}
        self.calibrated = [x for x in self.layers if x.kind == FROZEN] if frozen_norm == "recalibrate" else []
        self.criterion_batches = criterion_batches
        self.calibration_batches = calibration_batches
        self.seed = seed
        self.passes = passes
        self.slim_model = slim_model
        if passes is None and (self.criterion.needs_data or self.calibrated):
            reason = f"criterion {criterion!r}" if self.criterion.needs_data else "FrozenBN re-calibration"
            raise UserError(f"REPR: {reason} looks at training batches: give RePrScheme(passes=...) or choose another")
        self.cycle = 0
        self.masks: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        self._old: dict[str, dict[str, Tensor]] = {}
        self._handles: list[Any] = []
        self._slim: Any = None

    @property
    def is_sub(self) -> bool:
        """Whether filters are dropped now."""
        return bool(self.masks)

    @property
    def num_dropped(self) -> int:
        return sum(len(rows) for rows in self._rows.values())

    @torch.no_grad()
    def drop(self) -> Transition:
        """Scores all filters, drops the worst and remembers their values. Collective where there are several ranks."""
        if self.is_sub:
            raise RuntimeError("filters are dropped already: restore() comes before the next drop()")
        start = time.perf_counter()
        scores = self._scores()
        masks = select_filters(scores, self.drop_ratio, self.max_drop_per_layer)
        masks = {layer.name: masks[layer.name].to(layer.weight.device) for layer in self.layers}
        broadcast_(list(masks.values()))
        overlaps = scores if self.criterion_name == "ortho" else self._overlaps()
        before = _mean(overlaps.values())
        after = _mean([overlap_of_kept(x.weight, overlaps[x.name], masks[x.name]) for x in self.layers])
        self._hold(masks)
        moments: dict[str, Tensor] = {}
        if self.calibrated:
            moments = measure_moments(
                self._dropping(self.calibrated), self._rows, self.passes, self.calibration_batches, self.cycle
            )
        self._old = {}
        for layer in self.layers:
            rows = self._rows[layer.name]
            old = {"weight": layer.weight[rows].cpu()}
            if layer.kind == FROZEN:
                old["norm.weight"] = layer.norm.weight[rows].cpu()
                old["norm.bias"] = layer.norm.bias[rows].cpu()
            if layer.name in moments:
                old["moments"] = moments[layer.name]
            self._old[layer.name] = old
            zero_rows_(layer.tensors().values(), rows)
            self._zero_optimizer_state(layer)
        self._check_agreement("after the drop")
        self._go_slim()
        return self._transition("drop", before, after, {}, overlaps, start)

    @torch.no_grad()
    def restore(self) -> Transition:
        """Brings the dropped filters back with the least overlap. Collective where there are several ranks."""
        if not self.is_sub:
            raise RuntimeError("no filters are dropped: drop() comes before restore()")
        start = time.perf_counter()
        # Silencing a channel changes the filters that read it, so what they were and are is not found on the way.
        kept = self._overlaps(kept_only=True) if self.readers else {}
        overlaps, cosines = {}, {}
        self._leave_slim()
        dropping = self._dropping(self.layers)
        for number, layer in enumerate(self.layers):
            name = layer.name
            if layer in dropping:
                was, overlaps[name], cosines[name] = self._restore_layer(layer, self._generator(1, number))
            else:
                was = overlaps[name] = inter_filter_orthogonality(layer.weight)
            kept.setdefault(name, was)
        broadcast_([tensor for layer in dropping for tensor in _state(layer)])
        if self.calibrated:
            wanted = {x.name: self._old[x.name]["moments"] for x in self.calibrated if "moments" in self._old[x.name]}
            match_moments(
                self._dropping(self.calibrated), self._rows, wanted, self.passes, self.calibration_batches, self.cycle
            )
            broadcast_([s for layer in self._dropping(self.calibrated) for s in layer.running_statistics()])
        self._check_agreement("after the restore")
        if self.readers:
            overlaps = self._overlaps()
        before, after = _mean(kept.values()), _mean(overlaps.values())
        transition = self._transition("restore", before, after, cosines, overlaps, start)
        self._release()
        self.cycle += 1
        return transition

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs; loads under ``torch.load(weights_only=True)``."""
        return {
            "cycle": self.cycle,
            "seed": self.seed,
            "masks": {name: mask.cpu() for name, mask in self.masks.items()},
            "old": self._old,
            "filters": {layer.name: layer.num_filters for layer in self.layers},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state``; model and optimizer must have been loaded from the same checkpoint.

        Raises:
            UserError: the state is of other layers, or dropped filters are not zero in the model.
        """
        mine = {layer.name: layer.num_filters for layer in self.layers}
        if state["filters"] != mine:
            differing = sorted(set(state["filters"].items()) ^ set(mine.items()))
            raise UserError(
                f"the checkpoint's RePr state covers {len(state['filters'])} layers and this run {len(mine)}; first "
                f"difference {differing[0]}: resume with the REPR.LAYERS and MODEL of the run that wrote it"
            )
        self._release()
        self.cycle = state["cycle"]
        self.seed = state["seed"]
        if not state["masks"]:
            return
        self._hold({layer.name: state["masks"][layer.name].to(layer.weight.device) for layer in self.layers})
        self._old = {name: {k: v.cpu() for k, v in old.items()} for name, old in state["old"].items()}
        for layer in self.layers:
            if any(tensor[self._rows[layer.name]].count_nonzero() for tensor in layer.tensors().values()):
                raise UserError(
                    f"the RePr state says that filters of {layer.name} are dropped, but they are not zero in the "
                    "model: weights and RePr state come from different checkpoints"
                )
        self._go_slim()

    def _scores(self) -> dict[str, Tensor]:
        context = Context(self._generator(0), self.passes, self.criterion_batches, self.cycle)
        return self.criterion.score(self.layers, context)

    def _generator(self, purpose: int, layer: int = 0) -> torch.Generator:
        """A stream of its own for every cycle, purpose and layer, so that nothing depends on what was drawn before."""
        generator = torch.Generator(self.layers[0].weight.device)
        mixed = (self.seed, self.cycle, purpose, layer)
        return generator.manual_seed(int.from_bytes(_digest(mixed), "little"))

    def _hold(self, masks: dict[str, Tensor]) -> None:
        self.masks = masks
        self._rows = {name: mask.nonzero().flatten() for name, mask in masks.items()}
        for layer in self._dropping(self.layers):
            for parameter in layer.moving_parameters():
                rows = self._rows[layer.name]
                self._handles.append(parameter.register_hook(lambda grad, rows=rows: grad.index_fill(0, rows, 0)))

    def _go_slim(self) -> None:
        if self.slim_model is not None:
            from repr_det.slim import SlimNetwork  # knows Detectron2's blocks, so it imports Detectron2

            self._slim = SlimNetwork(self.slim_model, self.layers, self.masks)
            self._slim.install()

    def _leave_slim(self) -> None:
        if self._slim is not None:
            self._slim.remove()
            self._slim = None

    def _release(self) -> None:
        self._leave_slim()
        self.masks, self._rows, self._old = {}, {}, {}
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _dropping(self, layers: list[FilterLayer]) -> list[FilterLayer]:
        return [layer for layer in layers if len(self._rows[layer.name])]

    def _restore_layer(self, layer: FilterLayer, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
        """Returns O_f of the kept filters (K,) and of all as they are now (J,), and the largest cosine of a new filter
        to a kept or old one."""
        rows, mask = self._rows[layer.name], self.masks[layer.name]
        old = self._old[layer.name]["weight"].to(layer.weight)
        kept = layer.weight[~mask]
        unit = unit_filters(torch.cat([kept, old]))
        overlap_kept = overlap_of_unit_rows(unit[: len(kept)])
        new = least_overlap_rows(unit, len(old), generator)
        found = unit @ new.T
        worst = found.abs().max().item()
        overlap = overlap_with_returned(overlap_kept, new, found[: len(kept)], mask)
        new = new.to(old).view_as(old)
        shape = (-1, *[1] * (new.dim() - 1))
        if self.scale == "kept":
            norms = kept.flatten(1).norm(dim=1)
            new = new * norms[torch.isfinite(norms)].mean().nan_to_num(1.0)
        elif self.scale == "old":
            new = new * old.flatten(1).norm(dim=1).nan_to_num(1.0, 1.0).view(shape)
        layer.weight[rows] = new
        if layer.conv.bias is not None:
            layer.conv.bias[rows] = 0
        if layer.kind == FROZEN:
            layer.norm.weight[rows] = self._old[layer.name]["norm.weight"].to(layer.norm.weight)
            layer.norm.bias[rows] = self._old[layer.name]["norm.bias"].to(layer.norm.bias)
        elif layer.kind != NONE:
            layer.norm.weight[rows] = layer.norm.weight[~mask].median() if self.returns == "median_gamma" else 1
            if layer.norm.bias is not None:
                layer.norm.bias[rows] = 0
        if layer.kind == BATCH and layer.running_statistics() is not None:
            layer.norm.running_mean[rows] = 0
            layer.norm.running_var[rows] = 1
        self._zero_optimizer_state(layer)
        if layer.conv in self.readers:
            self._silence(layer, self.readers[layer.conv])
        return overlap_kept, overlap, worst

    def _silence(self, layer: FilterLayer, reader: nn.Module | None) -> None:
        """Keeps the returned channels of ``layer`` from changing what comes after them, until they are learnt."""
        rows = self._rows[layer.name]
        if reader is None:
            if layer.kind in (BATCH, GROUP):
                layer.norm.weight[rows] = 0
        elif reader.groups == 1:
            for tensor in (reader.weight, *self._optimizer_state(reader.weight)):
                tensor.index_fill_(1, rows, 0)

    def _zero_optimizer_state(self, layer: FilterLayer) -> None:
        rows = self._rows[layer.name]
        for parameter in layer.parameters():
            zero_rows_(self._optimizer_state(parameter), rows)

    def _optimizer_state(self, parameter: Tensor) -> list[Tensor]:
        """Momentum and moments: what the optimizer keeps for every entry of ``parameter``."""
        state = self.optimizer.state.get(parameter, {})
        return [t for t in state.values() if torch.is_tensor(t) and t.shape == parameter.shape]

    def _overlaps(self, kept_only: bool = False) -> dict[str, Tensor]:
        return {
            x.name: inter_filter_orthogonality(x.weight[~self.masks[x.name]] if kept_only else x.weight)
            for x in self.layers
        }

    def _check_agreement(self, when: str) -> None:
        check_agreement({x.name: [self.masks[x.name], *_state(x)] for x in self.layers}, f"RePr {when}, rank {rank()}")

    def _transition(
        self, event: str, before: float, after: float, cosines: dict, overlaps: dict[str, Tensor], start: float
    ) -> Transition:
        dropped = {name: rows.tolist() for name, rows in self._rows.items() if len(rows)}
        values = {name: [round(v, 6) for v in overlap.tolist()] for name, overlap in overlaps.items()}
        return Transition(event, self.cycle, dropped, before, after, cosines, time.perf_counter() - start, values)


def _state(layer: FilterLayer) -> list[Tensor]:
    # Running statistics of BN differ from rank to rank by design (only SyncBN shares them); frozen ones must not.
    return [*layer.tensors().values(), *(layer.running_statistics() if layer.kind == FROZEN else ())]


def _mean(overlaps: Any) -> float:
    return torch.cat([x.float().cpu() for x in overlaps]).mean().item()


def _digest(numbers: tuple[int, ...]) -> bytes:
    return hashlib.sha256(repr(numbers).encode()).digest()[:7]
