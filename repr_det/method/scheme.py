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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repr_det.method.calibration import match_moments, measure_moments
from repr_det.method.criteria import Context, get_criterion
from repr_det.method.distributed import broadcast_, check_agreement, rank
from repr_det.method.errors import UserError
from repr_det.method.holding import HeldFilters, Transition, zero_optimizer_state_
from repr_det.method.layers import FROZEN, FilterLayer
from repr_det.method.orthogonality import inter_filter_orthogonality, overlap_of_kept
from repr_det.method.passes import TrainingPasses
from repr_det.method.returning import bring_back, check_reinit, remember, silence
from repr_det.method.selection import check_capacity, select_filters
from repr_det.method.slim import SlimNetwork


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
        self._held: HeldFilters | None = None
        self._old: dict[str, dict[str, Tensor]] = {}
        self._slim: SlimNetwork | None = None

    @property
    def is_sub(self) -> bool:
        """Whether filters are dropped now."""
        return self._held is not None

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> (J,) bool, True = dropped; empty where no filters are."""
        return {} if self._held is None else self._held.masks

    @property
    def num_dropped(self) -> int:
        return 0 if self._held is None else len(self._held)

    @torch.no_grad()
    def drop(self) -> Transition:
        """Scores all filters, drops the worst and remembers their values. Collective where there are several ranks."""
        if self._held is not None:
            raise RuntimeError("filters are dropped already: restore() comes before the next drop()")
        start = time.perf_counter()
        scores = self._scores()
        masks = select_filters(scores, self.drop_ratio, self.max_drop_per_layer)
        masks = {layer.name: masks[layer.name].to(layer.weight.device) for layer in self.layers}
        broadcast_(list(masks.values()))
        overlaps = scores if self.criterion_name == "ortho" else self._overlaps()
        overlaps_of_kept = [overlap_of_kept(x.weight, overlaps[x.name], masks[x.name]) for x in self.layers]

        held = self._held = HeldFilters(self.layers, masks, self.optimizer)
        moments = self._measure_moments(held)
        self._old = {x.name: remember(x, held.rows[x.name], moments.get(x.name)) for x in self.layers}
        held.zero_()
        self._check_agreement(held, "after the drop")
        self._go_slim()
        return Transition(
            event="drop",
            cycle=self.cycle,
            dropped=held.indices(),
            overlap_before=_mean(overlaps.values()),
            overlap_after=_mean(overlaps_of_kept),
            max_cosine={},
            seconds=time.perf_counter() - start,
            overlaps=_rounded(overlaps),
        )

    @torch.no_grad()
    def restore(self) -> Transition:
        """Brings the dropped filters back with the least overlap. Collective where there are several ranks."""
        if self._held is None:
            raise RuntimeError("no filters are dropped: drop() comes before restore()")
        start = time.perf_counter()
        held = self._held
        # Silencing a channel changes the filters that read it, so what they were and are is not found on the way.
        overlaps_of_kept = self._overlaps(held.masks) if self.readers else {}
        overlaps, cosines = {}, {}

        self._leave_slim()
        for number, layer in enumerate(self.layers):
            name = layer.name
            if layer in held:
                generator = self._generator(1, number)
                kept, overlaps[name], cosines[name] = bring_back(
                    layer, held.masks[name], self._old[name], self.scale, self.returns, generator
                )
                zero_optimizer_state_(self.optimizer, layer, held.rows[name])
                if layer.conv in self.readers:
                    silence(layer, held.rows[name], self.readers[layer.conv], self.optimizer)
            else:
                kept = overlaps[name] = inter_filter_orthogonality(layer.weight)
            overlaps_of_kept.setdefault(name, kept)
        broadcast_([tensor for layer in held.layers for tensor in _state(layer)])
        self._match_moments(held)
        self._check_agreement(held, "after the restore")
        if self.readers:
            overlaps = self._overlaps()

        transition = Transition(
            event="restore",
            cycle=self.cycle,
            dropped=held.indices(),
            overlap_before=_mean(overlaps_of_kept.values()),
            overlap_after=_mean(overlaps.values()),
            max_cosine=cosines,
            seconds=time.perf_counter() - start,
            overlaps=_rounded(overlaps),
        )
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
        masks = {layer.name: state["masks"][layer.name].to(layer.weight.device) for layer in self.layers}
        self._held = HeldFilters(self.layers, masks, self.optimizer)
        self._old = {name: {k: v.cpu() for k, v in old.items()} for name, old in state["old"].items()}
        if (name := self._held.not_zero()) is not None:
            raise UserError(
                f"the RePr state says that filters of {name} are dropped, but they are not zero in the "
                "model: weights and RePr state come from different checkpoints"
            )
        self._go_slim()

    def _scores(self) -> dict[str, Tensor]:
        context = Context(self._generator(0), self.passes, self.criterion_batches, self.cycle)
        return self.criterion.score(self.layers, context)

    def _overlaps(self, masks: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Layer name -> O_f of its filters, (J,), or with masks of those that stayed, (K,)."""
        return {
            x.name: inter_filter_orthogonality(x.weight if masks is None else x.weight[~masks[x.name]])
            for x in self.layers
        }

    def _generator(self, purpose: int, layer: int = 0) -> torch.Generator:
        """A stream of its own for every cycle, purpose and layer, so that nothing depends on what was drawn before."""
        generator = torch.Generator(self.layers[0].weight.device)
        mixed = (self.seed, self.cycle, purpose, layer)
        return generator.manual_seed(int.from_bytes(_digest(mixed), "little"))

    def _measure_moments(self, held: HeldFilters) -> dict[str, Tensor]:
        if not self.calibrated:
            return {}
        layers = [layer for layer in self.calibrated if layer in held]
        return measure_moments(layers, held.rows, self.passes, self.calibration_batches, self.cycle)

    def _match_moments(self, held: HeldFilters) -> None:
        if not self.calibrated:
            return
        layers = [layer for layer in self.calibrated if layer in held]
        wanted = {x.name: self._old[x.name]["moments"] for x in layers if "moments" in self._old[x.name]}
        match_moments(layers, held.rows, wanted, self.passes, self.calibration_batches, self.cycle)
        broadcast_([statistic for layer in layers for statistic in layer.running_statistics()])

    def _go_slim(self) -> None:
        if self.slim_model is not None:
            self._slim = SlimNetwork(self.slim_model, self.layers, self.masks)
            self._slim.install()

    def _leave_slim(self) -> None:
        if self._slim is not None:
            self._slim.remove()
            self._slim = None

    def _release(self) -> None:
        self._leave_slim()
        if self._held is not None:
            self._held.release()
        self._held, self._old = None, {}

    def _check_agreement(self, held: HeldFilters, when: str) -> None:
        check_agreement({x.name: [held.masks[x.name], *_state(x)] for x in self.layers}, f"RePr {when}, rank {rank()}")


def _state(layer: FilterLayer) -> list[Tensor]:
    # Running statistics of BN differ from rank to rank by design (only SyncBN shares them); frozen ones must not.
    return [*layer.tensors().values(), *(layer.running_statistics() if layer.kind == FROZEN else ())]


def _mean(overlaps: Iterable[Tensor]) -> float:
    return torch.cat([x.float().cpu() for x in overlaps]).mean().item()


def _rounded(overlaps: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: [round(value, 6) for value in overlap.tolist()] for name, overlap in overlaps.items()}


def _digest(numbers: tuple[int, ...]) -> bytes:
    return hashlib.sha256(repr(numbers).encode()).digest()[:7]
