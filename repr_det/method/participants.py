"""The layers that participate: candidates that, as training passes show, can lose filters and learn."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from repr_det.method.distributed import gathered
from repr_det.method.errors import OptionError, UserError
from repr_det.method.layers import FilterLayer, closest, what_attention_means
from repr_det.network.proof import Reader, Verdict, first_that_refuses
from repr_det.network.steps import learning_rates
from repr_det.network.watch import NOT_RUN, Watch, by_reason

logger = logging.getLogger("repr_det.layers")


class Participants:
    """Watches the training passes of a model for the layers that can lose filters; without a model all can."""

    def __init__(self, candidates: Sequence[FilterLayer], model: nn.Module | None) -> None:
        self.candidates = list(candidates)
        self.modules = {} if model is None else dict(model.named_modules())
        self.watch = Watch(nn.Module(), []) if model is None else Watch(model, [layer.name for layer in candidates])
        self._logged: dict[str, str] = {}

    @property
    def known(self) -> bool:
        """True once a training pass has been seen, or if none is needed."""
        return not self.modules or self.watch.traced > 0

    @property
    def all_have_run(self) -> bool:
        """True once training passes have shown all candidates, or if none is needed."""
        return not self.modules or all(self.watch.verdicts.get(x.name, NOT_RUN).ran for x in self.candidates)

    def update(self, out: Collection[str] = ()) -> list[FilterLayer]:
        """Returns who participates by the passes of this process, and logs the others; filters of ``out`` are out."""
        self.watch.update()
        self._log_others(out)
        return self._proved(self.watch.current())

    def agreed(self) -> list[FilterLayer]:
        """Returns who participates by the passes of all ranks. Collective. UserError without a pass or a layer."""
        self.check_known()
        self._log_others()
        return self.required(self._seen_by_all())

    def _log_others(self, out: Collection[str] = ()) -> None:
        """Names the convs that have come to stay out, once for each reason."""
        known, self._logged = self._logged, self.watch.reasons()
        new = {name: reason for name, reason in self._logged.items() if known.get(name) != reason}
        for sentence in by_reason({name: reason for name, reason in new.items() if name not in out}):
            logger.info("RePr: all filters stay of %s", sentence)
        for sentence in by_reason({name: reason for name, reason in new.items() if name in out}):
            logger.warning("RePr: filters are out of %s: exclude these convs", sentence)

    def check_known(self) -> None:
        """Raises UserError if no training pass has been seen, and one is needed."""
        if not self.known:
            raise UserError(
                "a training pass shows what can be dropped, and no pass of this model has been seen: give RePr the "
                "module that you call, with gradients enabled, or a sample= if it was compiled and run before"
            )

    def note_readers(self, layers: Iterable[FilterLayer]) -> None:
        """Tells layers what else has read them, in the passes of all ranks. Collective."""
        found = {layer.name: layer for layer in self._seen_by_all()}
        for layer in layers:
            if layer.name in found:
                layer.readers, layer.rectified = found[layer.name].readers, found[layer.name].rectified

    def _seen_by_all(self) -> list[FilterLayer]:
        if not self.modules:
            return self.candidates
        everyone = gathered(self.watch.current(), self.candidates[0].weight.device)
        return self._proved(first_that_refuses(everyone))

    def _proved(self, verdicts: Mapping[str, Verdict]) -> list[FilterLayer]:
        found = []
        for layer in self.candidates:
            verdict = verdicts.get(layer.name, NOT_RUN)
            if not verdict.reason:
                found.append(self._layer(layer, verdict.norm, verdict.readers, verdict.rectified))
        return found

    def required(self, found: list[FilterLayer]) -> list[FilterLayer]:
        """Returns the layers it is given; OptionError if there are none."""
        if found:
            return found
        nearest = ", ".join(closest([layer.name for layer in self.candidates], self.watch.others())[:6])
        raise OptionError(
            f"no filter can be dropped of the convs that {{layers}} names: {'; '.join(by_reason(self.watch.reasons()))}"
            + (f"; these could: {nearest}" if nearest else "")
            + what_attention_means(self.watch.model)
        )

    def _layer(self, layer: FilterLayer, norm: str | None, readers: Iterable[Reader], rectified: bool) -> FilterLayer:
        module = None if norm is None else self.modules[norm]
        return FilterLayer(layer.name, layer.conv, module, norm, frozenset(readers), rectified)

    def state_dict(self, layers: Sequence[FilterLayer]) -> dict[str, Any]:
        state = {
            "filters": {layer.name: layer.num_filters for layer in layers},
            "norms": {layer.name: layer.norm_name for layer in layers},
            "readers": {x.name: sorted([r.name, r.aligned, r.alone, r.span] for r in x.readers) for x in layers},
            "rectified": [layer.name for layer in layers if layer.rectified],
        }
        return state | self.watch.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> list[FilterLayer]:
        """Goes on where it was written; returns its layers. OptionError if they are not candidates here."""
        mine = {layer.name: layer for layer in self.candidates}
        theirs = set(state["filters"].items())
        sizes = {(layer.name, layer.num_filters) for layer in self.candidates}
        different = sorted(theirs - sizes) + ([] if self.modules else sorted(sizes - theirs))
        if different:
            raise OptionError(
                f"the checkpoint's RePr state covers {len(theirs)} layers, this run has {len(mine)}; first difference "
                f"{different[0]}: resume with the {{layers}} and the model of the run that wrote it"
            )
        self.watch.load_state_dict(state)
        if "norms" not in state or not self.modules:  # 0.2.0 found norms by their place
            return [mine[name] for name in state["filters"]]
        rectified = set(state["rectified"])
        return [
            self._layer(mine[name], norm, [Reader(*fields) for fields in state["readers"][name]], name in rectified)
            for name, norm in state["norms"].items()
        ]


def trains(parameter: Tensor, stepped: Collection[Tensor] = ()) -> bool:
    """Tells whether it requires a gradient, or had one in this step and is fixed for the rest of it, as in a GAN."""
    return parameter.requires_grad or parameter.grad is not None or parameter in stepped


class Learning:
    """The layers that learn: a dropped filter of another could never come back as a new one."""

    def __init__(self, layers: Sequence[FilterLayer], optimizers: Sequence[Optimizer]) -> None:
        self.seen: set[str] = set()  # names of those that have had a gradient
        self._layers = layers
        self._optimizers = optimizers
        self._stepped: set[Tensor] = set()  # had a gradient in the last step of their optimizer
        note = torch.compiler.disable(self._note)
        self._handles = [optimizer.register_step_post_hook(note) for optimizer in optimizers]

    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        self._stepped = self._stepped - held | {parameter for parameter in held if parameter.grad is not None}
        self.seen.update(layer.name for layer in self._layers if layer.weight in self._stepped)

    def moved(self) -> set[Tensor]:
        """The parameters that the optimizers move now; where every rate is 0, as in a warm-up's first step, all."""
        held = learning_rates(self._optimizers)
        all_rest = not any(held.values())
        return {one for one, rate in held.items() if trains(one, self._stepped) and (rate or all_rest)}

    def frozen(self, layers: Sequence[FilterLayer]) -> dict[str, str]:
        """Layer name -> why it cannot learn now."""
        held = learning_rates(self._optimizers)
        rates = {layer.name: held.get(layer.weight, 0.0) for layer in layers}
        still = [name for name, rate in rates.items() if not rate and any(rates.values())]
        fixed = [layer.name for layer in layers if not trains(layer.weight, self._stepped)]
        return dict.fromkeys(still, "its learning rate is 0") | dict.fromkeys(fixed, "it does not require a gradient")

    def without(self, layers: Sequence[FilterLayer]) -> dict[str, str]:
        """Adds to ``frozen`` the layers that have had no gradient, if others have."""
        missing = [layer.name for layer in layers if self.seen and layer.name not in self.seen]
        return dict.fromkeys(missing, "it has had no gradient") | self.frozen(layers)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
