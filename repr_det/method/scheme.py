"""RePr, algorithm 1, without a trainer; rank 0 finds masks and new directions for all, on the CPU."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repr_det.method.averages import Averages
from repr_det.method.calibration import FrozenNorms
from repr_det.method.criteria import Context, check_capacity, get_criterion, select_filters
from repr_det.method.distributed import of_rank_0, rank
from repr_det.method.errors import OptionError, UserError
from repr_det.method.holding import HeldFilters, ReturnedFilters, Transition, check_values, claim
from repr_det.method.layers import FilterLayer, Values, on_devices, values_of
from repr_det.method.optimizers import check_optimizer_state, check_optimizers, restart_optimizer_state_
from repr_det.method.options import CONFIG_KEYS, RePrOptions, check_resumed
from repr_det.method.orthogonality import overlap_of_kept
from repr_det.method.participants import Learning, Participants
from repr_det.method.passes import TrainingPasses
from repr_det.method.returning import can_be_silent, new_filters, prepare_readers, put_back
from repr_det.network.norms import restart_averaging
from repr_det.network.state import generator_of
from repr_det.network.steps import with_inner

logger = logging.getLogger("repr_det.scheme")


class RePrScheme:
    """The state machine full -> drop -> sub-network -> restore -> full.

    Dropped filters, their gradients and optimizer state are exactly 0.

    Args:
        layers: the candidates, in ranking order. Those that do not learn at a drop lose no filter.
        optimizer: one, or a list, that holds their parameters.
        model: holds the layers, not wrapped. Its first training pass shows which participate, with which norm; None:
            all do, as they are given.
        passes: training batches, for criteria that look at data and for frozen norms.
        averages: as for ``RePr``.
        seed: all randomness comes from it and the cycle; the same on every rank.
        chosen: all options in one object; else ``options`` are keywords of ``RePrOptions``.

    Attributes:
        layers: those that participate; the candidates until that is known.
        cycle: number of restores so far.
        num_returned: filters that came back at the last of them.

    Raises:
        UserError: an option is wrong, an optimizer is missing, or the model has a RePrScheme already.
    """

    def __init__(
        self,
        layers: Sequence[FilterLayer],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        model: nn.Module | None = None,
        passes: TrainingPasses | None = None,
        averages: Sequence[Any] = (),
        seed: int = 0,
        chosen: RePrOptions | None = None,
        **options: Any,
    ) -> None:
        self.options = chosen or RePrOptions.of(options)
        self.layers = list(layers)
        self.optimizers = with_inner(optimizer)
        if not self.optimizers:
            raise UserError(f"optimizer= must be a torch.optim.Optimizer, or hold one, got {type(optimizer).__name__}")
        if averages and model is None:
            raise UserError("averages= needs model= too")
        self.model = model
        self.passes = passes
        self.seed = seed
        self.criterion = get_criterion(self.options.criterion)
        self._check([FilterLayer(layer.name, layer.conv) for layer in self.layers])
        if passes is None and self.criterion.needs_data:
            name = self.options.resumed()[CONFIG_KEYS["criterion"]]
            raise OptionError(f"{{criterion}} {name!r} looks at training batches: give loader= and loss=, or passes=")
        self.averages = Averages(averages, model) if model is not None else None
        self.cycle = self.num_returned = 0
        self.is_closed = False
        self._held: HeldFilters | None = None
        self._old: Values = {}
        self._returned: ReturnedFilters | None = None
        if model is not None:
            claim(self, self.layers)
        self._learning = Learning(self.layers, self.optimizers)
        self.participants = Participants(self.layers, model)
        self._norms = FrozenNorms(self.options, self.participants, model, passes)
        if model is None:
            self._check_participants()

    @property
    def is_sub(self) -> bool:
        """True while filters are dropped."""
        return self._held is not None

    @property
    def needs_batches(self) -> bool:
        """True if transitions look at training batches."""
        return self.criterion.needs_data or self._norms.need_batches(self.layers)

    @property
    def not_silent(self) -> list[str]:
        """The layers whose filters change the network's output as they return."""
        silent = self.options.returns == "function_preserving"
        modules, moved = self.participants.modules, self._learning.moved()
        return [x.name for x in self.layers if not (silent and can_be_silent(x, modules, moved))]

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> (J,) bool, True = dropped; empty where no filters are."""
        return {} if self._held is None else self._held.masks

    @property
    def num_dropped(self) -> int:
        """The number of filters that are out now."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    def check(self) -> None:
        """Looks at the last step of the optimizer.

        Raises:
            UserError: nothing participates, a dropped channel or filter is not 0, or one that returned is gone.
        """
        if self.participants.watch.has_news:
            self._update_layers()
        elif self._learning.seen:
            self.participants.check_known()
        returned, self._returned = self._returned, None
        if returned is not None:
            returned.check(self.cycle)
        if self._held is not None:
            self._held.check_step(self.cycle + 1)

    @torch.no_grad()
    def drop(self) -> Transition:
        """Scores all filters, drops the worst and remembers their values. Collective.

        Raises:
            UserError: nothing participates, weights are not finite, or an optimizer is not understood.
        """
        if self._held is not None:
            raise RuntimeError("filters are dropped already: restore() comes before the next drop()")
        start = time.perf_counter()
        self.layers = self.participants.agreed()
        self._check_participants()
        check_optimizer_state(self.layers, self.optimizers)
        values = self._checked_values("drop")
        masks = self._select(values)
        overlaps = self._overlaps(values, {})
        kept = self._overlaps(values, masks)
        held = HeldFilters(self.layers, masks, self.optimizers)
        moments = self._norms.before_drop(held, self.layers, values, self.cycle)
        for layer in held.layers:
            mask, own = masks[layer.name], values[layer.name]
            old = {name: value[mask].clone() for name, value in own.items()}
            self._old[layer.name] = old | moments.get(layer.name, {})
        held.zero_()
        held.hold()
        self._held = held
        self.participants.watch.trace_next()
        if self.averages is not None:
            self.averages.note_others(held.masks)
        return self._record("drop", held, overlaps, kept, start, {})

    @torch.no_grad()
    def restore(self, as_they_were: bool = False) -> Transition:
        """Brings the dropped filters back with the least overlap. Collective.

        Args:
            as_they_were: with their values before the drop, which layers frozen meanwhile get anyway.

        Raises:
            UserError: dropped filters are not zero any more, or weights are not finite.
        """
        if self._held is None:
            raise RuntimeError("no filters are dropped: drop() comes before restore()")
        start = time.perf_counter()
        held = self._held
        if self.averages is not None:
            self.averages.warn_of_others(held.masks)
        held.place()
        self.participants.note_readers(held.layers)
        values = self._checked_values("restore")
        fixed = self._learning.frozen(self.layers)
        learning = [] if as_they_were else [layer for layer in held.layers if layer.name not in fixed]
        renewed = self._norms.can_renew(learning)
        new, cosines = self._new_filters(renewed, values)
        kept = self._overlaps(values, held.masks)
        del values  # on the CPU no copy: it changes from now on
        back = dict(self._old)
        for layer in renewed:
            # FrozenBN keeps its affine; its statistics follow the new filter.
            keeps_norm = layer.name in self._norms.at_drop
            own = {name: x for name, x in back[layer.name].items() if keeps_norm and name.startswith("norm.")}
            back[layer.name] = own | {"weight": new[layer.name]}
        back = on_devices(back, held.layers)
        for layer in held.layers:
            put_back(layer, held.rows[layer.name], back[layer.name])
            for parameter in layer.parameters():
                restart_optimizer_state_(self.optimizers, parameter, held.rows[layer.name], held.kept[layer.name])
        modules, moved = self.participants.modules, self._learning.moved()
        silent = self.options.returns == "function_preserving"
        for layer in renewed:
            prepare_readers(layer, modules, held, self.optimizers, silent, moved)
        for layer in renewed:
            # Again: it may lie in kernels that have just been silenced (what reads it keeps it silent itself), and its
            # gamma may have been.
            layer.weight.index_copy_(0, held.rows[layer.name], back[layer.name]["weight"])
            for parameter in layer.parameters():
                restart_optimizer_state_(self.optimizers, parameter, held.rows[layer.name], held.kept[layer.name])
        self._norms.after_return(held, renewed, self._old, self.cycle)
        done = self._record("restore", held, self._overlaps(values_of(self.layers), {}), kept, start, cosines)
        if self.averages is not None and held.layers:
            self.averages.begin_again()
        self.num_returned = sum(len(held.rows[layer.name]) for layer in renewed)
        self._release()
        self._returned = ReturnedFilters(held, new) if new else None
        self.cycle += 1
        return done

    def close(self) -> None:
        """Lets go of the model, for another RePrScheme. Filters that are out stay zero."""
        self._release()
        self.participants.watch.close()
        self._learning.close()
        self.is_closed = True

    def state_dict(self) -> dict[str, Any]:
        """Loads under ``torch.load(weights_only=True)``."""
        return {
            "cycle": self.cycle,
            "returned": self.num_returned,
            "seed": self.seed,
            "masks": dict(self.masks),
            "old": self._old,
            **self.participants.state_dict(self.layers),
            "learned": sorted(self._learning.seen),
            "frozen_at_drop": sorted(self._norms.at_drop),
            "options": self.options.resumed(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state``; load model and optimizer of the same checkpoint first.

        Raises:
            UserError: other options, layers or another model wrote it.
        """
        check_resumed(state.get("options", {}), self.options.resumed())
        layers = self.participants.load_state_dict(state)
        self._learning.seen.update(state.get("learned", ()))
        self._release()
        self.layers = layers
        self.cycle = state["cycle"]
        self.num_returned = state.get("returned", self.cycle)  # 0.1.0 had no criterion that spares filters
        self.seed = state["seed"]
        if self.passes is not None:
            self.passes.seed = self.seed
        if not state["masks"]:
            return
        held = HeldFilters(layers, {x.name: state["masks"][x.name].cpu() for x in layers}, self.optimizers)
        self._old = {name: {k: v.cpu() for k, v in old.items()} for name, old in state["old"].items()}
        # 0.2.0 kept the values of frozen norms only, without statistics, which stayed in the model.
        norms = [name for name, old in self._old.items() if "norm.weight" in old]
        self._norms.at_drop = set(state.get("frozen_at_drop", norms))
        for layer in held.layers:
            if layer.name in self._norms.at_drop:
                for key, tensor in layer.running_statistics().items():
                    self._old[layer.name].setdefault(key, tensor[held.rows[layer.name]].cpu())
        held.hold()
        self._held = held
        held.check_zero("in the model, which is not of this state's checkpoint")

    def __deepcopy__(self, memo: dict) -> Any:
        raise UserError(
            "RePr cannot be copied: build one for the copies of model and optimizer, and load this state_dict"
        )

    @property
    def _device(self) -> torch.device:
        return self.layers[0].weight.device

    def _check(self, layers: Sequence[FilterLayer]) -> None:
        sizes = {layer.name: layer.num_filters for layer in layers}
        check_capacity(sizes, self.options.drop_ratio, self.options.max_drop_per_layer)
        check_optimizers(layers, self.optimizers)

    def _check_participants(self) -> None:
        self._check(self.layers)
        self._norms.check(self.layers)

    def _update_layers(self) -> None:
        """Looks who participates, until the first drop settles it."""
        held = [] if self._held is None else [layer.name for layer in self._held.layers]
        found = self.participants.update(held)
        if self._held is not None or self.cycle:
            return
        self.layers = self.participants.required(found)
        self._check_participants()
        if self.options.returns == "function_preserving" and (layers := self.not_silent):
            named = ", ".join(layers)
            logger.warning("RePr: filters of %s cannot return without changing the network's output", named)

    def _checked_values(self, event: str) -> Values:
        values = values_of(self.layers)
        when = f"at the {event} of cycle {self.cycle + 1}"
        if self._held is not None:
            self._held.check_zero(when)
        check_values(values, when, self._device)
        return values

    def _overlaps(self, values: Values, out: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer name -> O_f of the filters that are not ``out`` (K,)."""
        found = {}
        for layer in self.layers:
            dropped = out.get(layer.name, torch.zeros(layer.num_filters, dtype=torch.bool, device="cpu"))
            found[layer.name] = overlap_of_kept(values[layer.name]["weight"], dropped, layer.conv.groups)
        return found

    def _record(
        self,
        event: str,
        held: HeldFilters,
        overlaps: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        start: float,
        cosines: dict[str, float],
    ) -> Transition:
        """O_f by layer name: ``overlaps`` of all filters (J,), ``kept`` of those that stay (K,)."""
        if held.layers:
            restart_averaging([layer.norm for layer in self.layers] if self.model is None else self.model.modules())
        means = [torch.cat([x.double() for x in found.values()]).mean().item() for found in (overlaps, kept)]
        before, after = means if event == "drop" else reversed(means)
        rounded = {name: [round(value, 6) for value in overlap.tolist()] for name, overlap in overlaps.items()}
        dropped = {layer.name: held.masks[layer.name].nonzero().flatten().tolist() for layer in held.layers}
        seconds = time.perf_counter() - start
        return Transition(event, self.cycle, dropped, before, after, cosines, seconds, rounded)

    def _scores(self) -> dict[str, Tensor]:
        generator, number = generator_of(self.seed, self.cycle, 0, 0), self.options.criterion_batches
        context = Context(generator, self.passes, number, self.cycle, self.participants.watch.trains)
        return self.criterion.score(self.layers, context)

    def _select(self, values: Values) -> dict[str, Tensor]:
        """Layer name -> (J,) bool, True = drop, of rank 0. Zero filters go first; layers that do not learn keep all."""
        frozen = self._learning.without(self.layers)
        listed = [f"{name} ({why})" for name, why in frozen.items()]
        if len(frozen) == len(self.layers):
            raise UserError(f"no layer learns, such as {listed[0]}")
        if frozen:
            logger.warning("RePr: no filter is dropped of %s", ", ".join(listed))
        ranked, masks, scores = {}, {}, self._scores()
        for layer in self.layers:
            zero = values[layer.name]["weight"].flatten(1).abs().amax(1) == 0
            masks[layer.name] = torch.zeros_like(zero)
            if layer.name not in frozen:
                ranked[layer.name] = scores[layer.name].cpu().double().masked_fill(zero, float("inf"))
        masks |= select_filters(ranked, self.options.drop_ratio, self.options.max_drop_per_layer)
        return of_rank_0(masks, self._device)

    def _new_filters(self, layers: Sequence[FilterLayer], values: Values) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Layer name -> new filters (M, ...) of rank 0, and their largest |cos| to others."""
        found, cosines = {}, {}
        for number, layer in enumerate(self.layers if rank() == 0 else ()):
            if layer in layers:
                weight, old = values[layer.name]["weight"], self._old[layer.name]["weight"]
                generator = generator_of(self.seed, self.cycle, 1, number)
                found[layer.name], cosines[layer.name] = new_filters(
                    weight, old, self.masks[layer.name], layer.conv.groups, self.options.scale, generator
                )
        return of_rank_0((found, cosines), self._device)

    def _release(self) -> None:
        if self._held is not None:
            self._held.release()
        self._held, self._returned, self._old, self._norms.at_drop = None, None, {}, set()
