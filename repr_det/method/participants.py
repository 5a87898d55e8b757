"""The layers that take part: candidates by name, of which training passes show who can lose filters."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from repr_det.method.distributed import gathered
from repr_det.method.errors import OptionError, UserError
from repr_det.method.layers import FilterLayer, closest, what_attention_means
from repr_det.network.proof import Reader, Verdict, first_that_refuses
from repr_det.network.watch import NOT_RUN, Watch

logger = logging.getLogger("repr_det.layers")


class Participants:
    """Watches the passes of a model for who takes part.

    Args:
        candidates: in ranking order.
        model: holds them; its training passes decide. None: all candidates take part, with the norms that they have.
    """

    def __init__(self, candidates: Sequence[FilterLayer], model: nn.Module | None) -> None:
        self.candidates = list(candidates)
        self.modules = {} if model is None else dict(model.named_modules())
        self._model = model
        self._watch = None if model is None else Watch(model, [layer.name for layer in candidates])
        self._told: set[str] = set()

    @property
    def known(self) -> bool:
        """True once a training pass has been seen, or if none is needed."""
        return self._watch is None or self._watch.traced > 0

    @property
    def news(self) -> bool:
        """True if a pass has been seen since ``hear``."""
        return self._watch is not None and self._watch.news

    @property
    def trains(self) -> bool:
        """True if the model is in training mode while it trains."""
        return self._watch is None or self._watch.trains

    def watch_next(self) -> None:
        """Looks at the next training pass again."""
        if self._watch is not None:
            self._watch.trace_next()

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()

    def hear(self) -> list[FilterLayer]:
        """Who takes part by the passes that this process has seen; logs who does not. OptionError if nobody does."""
        if self._watch is None:
            return self.candidates
        self._watch.hear()
        found = self._proved(self._watch.verdicts)
        for sentence in self._watch.left_out():
            if sentence not in self._told:
                logger.info("RePr: all filters stay of %s", sentence)
            self._told.add(sentence)
        return found

    def agreed(self) -> list[FilterLayer]:
        """Who takes part by the passes of all ranks. Collective. UserError if nobody does, or none has been seen."""
        if self._watch is None:
            return self.candidates
        if not self._watch.traced:
            raise UserError(
                "RePr drops filters where a training pass has shown that this silences them, and no pass of this model "
                "has been seen: give RePr the module that you call, with gradients enabled"
            )
        device = self.candidates[0].weight.device
        return self._proved(first_that_refuses(gathered(self._watch.verdicts, device)))

    def _proved(self, verdicts: Mapping[str, Verdict]) -> list[FilterLayer]:
        found = []
        for layer in self.candidates:
            verdict = verdicts.get(layer.name, NOT_RUN)
            if not verdict.reason:
                found.append(self._layer(layer, verdict.norm, verdict.readers, verdict.rectified))
        if not found and self._watch is not None and self._model is not None:
            nearest = closest([layer.name for layer in self.candidates], self._watch.others())[:6]
            raise OptionError(
                f"no filter can be dropped of the convs that {{layers}} names: {'; '.join(self._watch.left_out())}"
                + (f"; these could: {', '.join(nearest)}" if nearest else "")
                + what_attention_means(self._model)
            )
        return found

    def _layer(self, candidate: FilterLayer, norm: str | None, readers: Any, rectified: bool) -> FilterLayer:
        module = None if norm is None else self.modules[norm]
        return FilterLayer(candidate.name, candidate.conv, module, norm, frozenset(readers), rectified)

    def state_dict(self, layers: Sequence[FilterLayer]) -> dict[str, Any]:
        """Returns the state of the layers that take part, in plain types."""
        return {
            "filters": {layer.name: layer.num_filters for layer in layers},
            "norms": {layer.name: layer.norm_name for layer in layers},
            "readers": {x.name: sorted([r.name, r.aligned, r.alone, r.span] for r in x.readers) for x in layers},
            "rectified": [layer.name for layer in layers if layer.rectified],
        }

    def of_state(self, state: Mapping[str, Any]) -> list[FilterLayer]:
        """The layers of ``state_dict``. OptionError if they are not candidates here."""
        mine = {layer.name: layer for layer in self.candidates}
        theirs = state["filters"]
        sizes = {name: layer.num_filters for name, layer in mine.items()}
        strange = sorted(set(theirs.items()) - set(sizes.items()))
        if strange or (self._watch is None and len(theirs) != len(mine)):
            first = strange[0] if strange else sorted(set(sizes.items()) - set(theirs.items()))[0]
            raise OptionError(
                f"the checkpoint's RePr state covers {len(theirs)} layers, this run has {len(mine)}; first difference "
                f"{first}: resume with the {{layers}} and the model of the run that wrote it"
            )
        if "norms" not in state or self._watch is None:  # 0.2.0 found norms by their place
            return [mine[name] for name in theirs]
        rectified = set(state["rectified"])
        return [
            self._layer(mine[name], norm, [Reader(*fields) for fields in state["readers"][name]], name in rectified)
            for name, norm in state["norms"].items()
        ]
