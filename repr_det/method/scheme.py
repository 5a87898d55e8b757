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

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from repr_det.method.calibration import match_moments, measure_moments
from repr_det.method.criteria import Context, get_criterion
from repr_det.method.distributed import broadcast_, check_agreement, rank
from repr_det.method.errors import UserError
from repr_det.method.holding import HeldFilters, Transition
from repr_det.method.layers import FROZEN, FilterLayer, watched
from repr_det.method.learning import LearningLayers
from repr_det.method.optimizers import (
    check_optimizer_state,
    check_optimizers,
    raise_squares_of_inputs_,
    restart_optimizer_state_,
    with_inner,
)
from repr_det.method.orthogonality import inter_filter_orthogonality, overlap_of_kept
from repr_det.method.passes import TrainingPasses, undisturbed
from repr_det.method.returning import bring_back, can_be_silent, check_reinit, remember, silence
from repr_det.method.selection import check_capacity, select_filters
from repr_det.method.slim import SlimNetwork
from repr_det.method.slim_choice import Choice, SlimChooser, check_slim

logger = logging.getLogger("repr_det.scheme")


class RePrScheme:
    """The state machine full -> drop -> sub-network -> restore -> full.

    Invariants while filters are dropped: every entry of ``FilterLayer.tensors()`` of a dropped filter is exactly 0, its
    gradient is 0 as soon as it is computed (before DDP, clipping and the optimizer see it), and its optimizer state is
    0: no optimizer whose step is zero for a zero parameter, gradient and state moves it. The restore makes sure that
    nothing else did.

    Args:
        layers: the layers that take part, in ranking order. Those that do not learn at a drop (learning rate 0, no
            gradient so far) lose no filter then.
        optimizer: holds their parameters; a list where several do.
        criterion: a name in ``criteria.CRITERIA``.
        drop_ratio, max_drop_per_layer: see ``selection.select_filters``.
        scale: norm of a new filter: "kept" the mean norm of the filters that stayed, "old" its own before the drop,
            "unit" 1.
        frozen_norm: what statistics of FrozenBN, and of BN in eval mode, do at a restore: "recalibrate" to the
            channel's old moments (where ``readers`` knows that a ReLU follows and it never opened, to those of channels
            that open), or "keep".
        returns: how loud a filter returns behind BN and GN. "as_published": gamma 1. "median_gamma": the median of the
            kept filters of its layer. "function_preserving": where ``readers`` knows the conv, the restore changes
            no output of the network (of eval mode too; but GN's groups change with their members): the reader's kernels
            for the returning channels become 0, or gamma where the channels are added to a shortcut; elsewhere, where
            there is no gamma to learn (FrozenBN, no norm) on a shortcut, and where all channels that a filter of a
            grouped reader sees return at once, as published: the log names them.
        readers: conv -> the only conv that reads its channels, through a ReLU; None for a shortcut's sum
            (``blocks.readers``). Helps "function_preserving", "recalibrate", and Adam on the kernels for returning
            channels.
        criterion_batches, calibration_batches: training batches that they may look at.
        seed: all randomness comes from it and the cycle; the same on every rank.
        passes: how to run training batches; needed by data-driven criteria and by "recalibrate".
        slim_model: the model that holds the layers, to leave dropped channels out of its computation
            (``slim.SlimNetwork``); None computes them as zeros.
        slim: with ``slim_model``: True; False, as if it were None; or "auto", which finds out in the first training
            pass of a sub-network which of the two costs less, and keeps to that (``slim_choice``).
        apart: a context for the extra passes of "auto", see ``slim_choice.SlimChooser``.

    Attributes:
        cycle: how many restores there have been.
        num_returned: how many filters came back at the last of them; 0 before the first.
        slim_choice: what "auto" found out in this sub-network phase, and on which grounds; else None.

    Raises:
        UserError: an option is out of range, a trainable member of a filter is in no optimizer, or an optimizer keeps
            another state than momentum and moments.
    """

    def __init__(
        self,
        layers: Sequence[FilterLayer],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
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
        slim: bool | str = "auto",
        apart: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        check_reinit(scale, frozen_norm, returns)
        check_slim(slim)
        self.layers = list(layers)
        check_capacity({layer.name: layer.num_filters for layer in self.layers}, drop_ratio, max_drop_per_layer)
        self.optimizers = with_inner(optimizer if isinstance(optimizer, Sequence) else [optimizer])
        check_optimizers(self.layers, self.optimizers)
        self.optimizer = self.optimizers[0]
        self.criterion_name = criterion
        self.criterion = get_criterion(criterion, sum(layer.num_filters for layer in self.layers))
        self.drop_ratio = drop_ratio
        self.max_drop_per_layer = max_drop_per_layer
        self.scale = scale
        self.returns = returns
        self._all_readers = dict(readers or {})
        self.readers = self._all_readers if returns == "function_preserving" else {}
        self.frozen_norm = frozen_norm
        self.criterion_batches = criterion_batches
        self.calibration_batches = calibration_batches
        self.seed = seed
        self.passes = passes
        self.slim_model = slim_model
        self.slim = slim
        self.apart = apart
        self.slim_choice: Choice | None = None
        if passes is None and self.criterion.needs_data:
            raise UserError(
                f"REPR: criterion {criterion!r} looks at training batches: give RePrScheme(passes=...) or choose "
                "another"
            )
        self._check_calibration()
        self._log_what_returns_loud()
        self._learning = LearningLayers(self.layers, self.optimizers)
        self._wiring = watched(self.layers, slim_model)
        self.cycle = self.num_returned = 0
        self._held: HeldFilters | None = None
        self._unchecked = False  # no step has been seen since the drop
        self._old: dict[str, dict[str, Tensor]] = {}
        self._slim: SlimNetwork | None = None
        self._chooser: SlimChooser | None = None
        # What "auto" has chosen, also in a run that this one continues.
        self._chosen: bool | None = None if slim == "auto" else bool(slim)

    @property
    def is_sub(self) -> bool:
        """Whether filters are dropped now."""
        return self._held is not None

    @property
    def needs_batches(self) -> bool:
        """Whether transitions look at training batches."""
        return self.criterion.needs_data or (self.frozen_norm != "keep" and bool(self._frozen_norms()))

    @property
    def loud(self) -> list[str]:
        """Names of the layers whose filters change the network's output when they return."""
        return [
            layer.name
            for layer in self.layers
            if layer.conv not in self.readers or not can_be_silent(layer, self.readers[layer.conv])
        ]

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> (J,) bool, True = dropped; empty where no filters are."""
        return {} if self._held is None else self._held.masks

    @property
    def num_dropped(self) -> int:
        """How many filters are out now, over all layers."""
        return 0 if self._held is None else len(self._held)

    def check(self) -> None:
        """To be called after steps of the optimizer, so that a mistake shows now and not at the next transition.

        Raises:
            UserError: a layer's norm has been seen to be another one, or the first step since a drop has moved dropped
                filters.
        """
        self._wiring.check()
        if self._unchecked and self._held is not None:
            self._check_zero(self._held, "one step after the drop")
        self._unchecked = False

    @torch.no_grad()
    def drop(self) -> Transition:
        """Scores all filters, drops the worst and remembers their values. Collective where there are several ranks.

        Raises:
            UserError: weights are not finite, an optimizer keeps a state that RePr cannot take a filter out of, or a
                layer's norm has been seen to be another one; nothing is changed then.
        """
        if self._held is not None:
            raise RuntimeError("filters are dropped already: restore() comes before the next drop()")
        start = time.perf_counter()
        self._check_before_drop()
        scores = self._scores()
        masks = self._select(scores, self._learning.frozen())
        overlaps = scores if self.criterion_name == "ortho" else self._overlaps()
        overlaps_of_kept = [
            overlap_of_kept(x.weight, overlaps[x.name], masks[x.name], x.conv.groups) for x in self.layers
        ]

        held = HeldFilters(self.layers, masks, self.optimizers, self._wiring.has_seen)
        frozen = self._frozen_norms()
        moments = self._measure_moments(held, frozen)
        self._old = {x.name: remember(x, held.rows[x.name], x in frozen, moments.get(x.name)) for x in self.layers}
        self._held = held
        held.zero_()
        held.hold()
        self._begin_averages_anew()
        self._unchecked = True
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
        """Brings the dropped filters back with the least overlap. Collective where there are several ranks.

        Raises:
            UserError: dropped filters are not zero any more, or weights are not finite; nothing is changed then.
        """
        if self._held is None:
            raise RuntimeError("no filters are dropped: drop() comes before restore()")
        start = time.perf_counter()
        held = self._held
        self._check_before_restore(held)
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
                self._prepare_reader(layer, held.masks[name])
                for parameter in layer.parameters():
                    restart_optimizer_state_(self.optimizers, parameter, held.masks[name])
            else:
                kept = overlaps[name] = self._overlap(layer)
            overlaps_of_kept.setdefault(name, kept)
        broadcast_([tensor for layer in held.layers for tensor in _state(layer)])
        self._begin_averages_anew()
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
            slim=None if self.slim_choice is None else dataclasses.asdict(self.slim_choice),
        )
        self.slim_choice = None
        self.num_returned = len(held)
        self._wiring.stop()  # what has not run in a whole cycle does not train
        self._release()
        self.cycle += 1
        return transition

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs; loads under ``torch.load(weights_only=True)``."""
        return {
            "cycle": self.cycle,
            "returned": self.num_returned,
            "seed": self.seed,
            "masks": {name: mask.cpu() for name, mask in self.masks.items()},
            "old": self._old,
            "filters": {layer.name: layer.num_filters for layer in self.layers},
            "learning": self._learning.state_dict(),
            "slim": self._chosen,
            "slim_choice": None if self.slim_choice is None else dataclasses.asdict(self.slim_choice),
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
        self.num_returned = state.get("returned", self.cycle)  # 0.1.0 had no criterion that spares filters
        self.seed = state["seed"]
        if self.slim == "auto":
            self._chosen = state.get("slim", True)  # slim was the default before there was a choice
            choice = state.get("slim_choice")
            self.slim_choice = None if choice is None else Choice(**choice)
        self._learning.load_state_dict(state.get("learning", {"seen": mine, "zeros": {}}))  # 0.1.0 did not look
        if not state["masks"]:
            return
        masks = {layer.name: state["masks"][layer.name].to(layer.weight.device) for layer in self.layers}
        self._held = HeldFilters(self.layers, masks, self.optimizers, self._wiring.has_seen)
        self._held.hold()
        self._old = {name: {k: v.cpu() for k, v in old.items()} for name, old in state["old"].items()}
        if (found := self._held.not_zero()) is not None:
            raise UserError(
                f"the RePr state says that filters of {found[0]} are dropped, but they are not zero in the "
                "model: weights and RePr state come from different checkpoints"
            )
        self._go_slim()

    def _check_before_drop(self) -> None:
        self._wiring.check()
        self._check_calibration()
        self._check_finite("drop")
        check_optimizer_state(self.layers, self.optimizers)

    def _check_before_restore(self, held: HeldFilters) -> None:
        self._wiring.check()
        self._check_finite("restore")
        self._check_zero(held, "at the restore")

    def _check_zero(self, held: HeldFilters, when: str) -> None:
        if (found := held.not_zero()) is not None:
            raise UserError(
                f"REPR: dropped filters of {found[0]} are not zero any more {when} of cycle {self.cycle + 1} "
                f"(their {found[1]}). "
                "Something besides the optimizers that RePrScheme knows has written to them: weights loaded into the "
                "model, an average swapped in and not out again, or a norm that is not the one behind that conv"
            )

    def _check_calibration(self) -> None:
        frozen = self._frozen_norms()
        if frozen and self.passes is None and self.frozen_norm == "recalibrate":
            raise UserError(
                f"REPR: {'FrozenBN' if frozen[0].kind == FROZEN else 'BN in eval mode:'} re-calibration looks at "
                f"training batches (the norm of {frozen[0].name} keeps its statistics): give RePrScheme(passes=...) or "
                "choose frozen_norm='keep'"
            )

    def _check_finite(self, transition: str) -> None:
        for layer in self.layers:
            for name, tensor in layer.tensors().items():
                # The sum is finite only if all entries are, and looks at them once; it may overflow by itself.
                if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                    raise UserError(
                        f"REPR: the {name} of {layer.name} is not finite at the {transition} of cycle "
                        f"{self.cycle + 1}: training has diverged; lower the learning rate or clip gradients, and go "
                        "on from a checkpoint before that"
                    )

    def _prepare_reader(self, layer: FilterLayer, returned: Tensor) -> None:
        """Of the conv that reads the layer: silent for the returned channels where that is asked for, and no longer
        without squared gradients on them."""
        if layer.conv in self.readers:
            loud = silence(layer, returned, self.readers[layer.conv], self.optimizers)
            if loud and can_be_silent(layer, self.readers[layer.conv]):
                logger.warning("RePr: %d filters of %s return as published: all channels of a group", loud, layer.name)
        elif isinstance(reader := self._all_readers.get(layer.conv), nn.Conv2d) and reader.groups == 1:
            raise_squares_of_inputs_(self.optimizers, reader.weight, returned)

    def _log_what_returns_loud(self) -> None:
        if self.returns == "function_preserving" and (loud := self.loud):
            logger.warning(
                "RePr: filters of %s cannot return without changing the network's output (no gamma to learn on a "
                "shortcut, a depthwise reader, or a reader that is not known) and return as published",
                ", ".join(loud),
            )

    def _begin_averages_anew(self) -> None:
        """Of BN that averages its statistics over all batches so far (momentum None): those saw another network."""
        norms = (x.norm for x in self.layers) if self.slim_model is None else self.slim_model.modules()
        averaging = (x for x in norms if isinstance(x, nn.modules.batchnorm._BatchNorm) and x.momentum is None)
        for norm in averaging:
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.zero_()

    def _scores(self) -> dict[str, Tensor]:
        context = Context(self._generator(0), self.passes, self.criterion_batches, self.cycle)
        return self.criterion.score(self.layers, context)

    def _select(self, scores: dict[str, Tensor], frozen: Mapping[str, str]) -> dict[str, Tensor]:
        """Layer name -> (J,) bool, True = drop, the same on every rank. Filters that are zero, which no criterion can
        tell from good ones, go first; layers that do not learn lose none."""
        if len(frozen) == len(self.layers):
            raise UserError(f"REPR: no layer learns (of {next(iter(frozen))}: {next(iter(frozen.values()))})")
        if frozen:
            logger.warning("RePr: no filter is dropped of %s", ", ".join(f"{n} ({why})" for n, why in frozen.items()))
        dead = {x.name: x.weight.flatten(1).abs().amax(1) == 0 for x in self.layers}
        ranked = {n: score.masked_fill(dead[n], float("inf")) for n, score in scores.items() if n not in frozen}
        masks = select_filters(ranked, self.drop_ratio, self.max_drop_per_layer)
        masks = {
            x.name: masks[x.name].to(x.weight.device) if x.name in masks else torch.zeros_like(dead[x.name])
            for x in self.layers
        }
        broadcast_(list(masks.values()))
        return masks

    def _overlaps(self, masks: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Layer name -> O_f of its filters, (J,), or with masks of those that stayed, (K,)."""
        return {x.name: self._overlap(x, None if masks is None else ~masks[x.name]) for x in self.layers}

    @staticmethod
    def _overlap(layer: FilterLayer, stayed: Tensor | None = None) -> Tensor:
        if stayed is None:
            return inter_filter_orthogonality(layer.weight, layer.conv.groups)
        parts = [layer.of_group(group) for group in range(layer.conv.groups)]
        return torch.cat([inter_filter_orthogonality(layer.weight[part][stayed[part]]) for part in parts])

    def _generator(self, purpose: int, layer: int = 0) -> torch.Generator:
        """A stream of its own for every cycle, purpose and layer, so that nothing depends on what was drawn before."""
        generator = torch.Generator(self.layers[0].weight.device)
        mixed = (self.seed, self.cycle, purpose, layer)
        return generator.manual_seed(int.from_bytes(_digest(mixed), "little"))

    def _frozen_norms(self) -> list[FilterLayer]:
        """The layers whose norm keeps its statistics in training, also where the caller is evaluating now."""
        if self.passes is None or self.passes.model.training:
            return [layer for layer in self.layers if layer.is_frozen]
        with undisturbed(self.passes.model):
            return [layer for layer in self.layers if layer.is_frozen]

    def _measure_moments(self, held: HeldFilters, frozen: list[FilterLayer]) -> dict[str, Tensor]:
        layers = [layer for layer in held.layers if layer in frozen]
        if not layers or self.passes is None or self.frozen_norm == "keep":
            return {}
        rectified = [layer for layer in layers if self._all_readers.get(layer.conv) is not None]
        return measure_moments(layers, held.rows, self.passes, self.calibration_batches, self.cycle, rectified)

    def _match_moments(self, held: HeldFilters) -> None:
        wanted = {name: old["moments"] for name, old in self._old.items() if "moments" in old}
        if not wanted or self.passes is None:
            return
        layers = [layer for layer in held.layers if layer.name in wanted]
        match_moments(layers, held.rows, wanted, self.passes, self.calibration_batches, self.cycle)
        broadcast_([statistic for layer in layers for statistic in layer.running_statistics() or ()])

    def _go_slim(self) -> None:
        if self.slim_model is None or self._chosen is False or not self.num_dropped:
            return
        self._slim = SlimNetwork(self.slim_model, self.layers, self.masks)
        self._slim.install()
        if self._chosen is None:
            self._chooser = SlimChooser(self._slim, self._choose, self.apart)

    def _choose(self, choice: Choice) -> None:
        self._chosen, self.slim_choice = choice.slim, choice

    def _leave_slim(self) -> None:
        if self._chooser is not None:
            self._chooser.remove()
        if self._slim is not None:
            self._slim.remove()
        self._slim = self._chooser = None

    def _release(self) -> None:
        self._leave_slim()
        if self._held is not None:
            self._held.release()
        self._held, self._old = None, {}

    def _check_agreement(self, held: HeldFilters, when: str) -> None:
        check_agreement({x.name: [held.masks[x.name], *_state(x)] for x in self.layers}, f"RePr {when}, rank {rank()}")


def _state(layer: FilterLayer) -> list[Tensor]:
    # Running statistics of BN differ from rank to rank by design (only SyncBN shares them); frozen ones must not.
    return [*layer.tensors().values(), *((layer.kind == FROZEN and layer.running_statistics()) or ())]


def _mean(overlaps: Iterable[Tensor]) -> float:
    return torch.cat([x.float().cpu() for x in overlaps]).mean().item()


def _rounded(overlaps: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: [round(value, 6) for value in overlap.tolist()] for name, overlap in overlaps.items()}


def _digest(numbers: tuple[int, ...]) -> bytes:
    return hashlib.sha256(repr(numbers).encode()).digest()[:7]
