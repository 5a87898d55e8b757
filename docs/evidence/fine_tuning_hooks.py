"""Detectron2 hooks for what the runs of fine_tuning_search.py do besides stock training and RePrHook."""

import fnmatch
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from torch import Tensor, nn

from repr_det import RePrHook
from repr_det.method.orthogonality import inter_filter_orthogonality


class Cycle(HookBase):
    """Removes rows of convs and linear layers for ``s2`` iterations after every ``s1``, ``n`` times; brings them back.

    Args (of ``options``):
        layers: fnmatch patterns on module names; linear layers too, which REPR.LAYERS does not reach.
        s1, s2, n: the cycles; s1 0: another removal after every s2 iterations; s2 0: back at once.
        ratio: share of the rows of every layer.
        criterion: random or ortho.
        returns: "old" as they were, "init" from a normal distribution with the layer's deviation at the start.
    """

    def __init__(self, options: dict[str, Any], seed: int) -> None:
        self.options = options
        self.generator = torch.Generator().manual_seed(77 + seed)
        self.rows: dict[str, Tensor] = {}
        self.old: dict[str, list[Tensor]] = {}

    def before_train(self) -> None:
        o = self.options
        self.optimizer = self.trainer._trainer.optimizer
        self.layers = {
            name: module
            for name, module in self.trainer.model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
            and module.weight.requires_grad
            and any(fnmatch.fnmatch(name, p) for p in o["layers"])
        }
        first = o["s1"] - 1
        self.drops = {first + cycle * (o["s1"] + o["s2"]) for cycle in range(o["n"])}
        self.restores = {iteration + o["s2"] for iteration in self.drops}
        self.spread = {name: module.weight.std().item() for name, module in self.layers.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        iteration = self.trainer.iter
        if iteration in self.restores:
            self._restore()
        if iteration in self.drops:
            self._drop()
        elif self.rows:  # momentum and weight decay have moved them
            for name, module in self.layers.items():
                for tensor in self._tensors(module):
                    tensor[self.rows[name]] = 0

    def _drop(self) -> None:
        for name, module in self.layers.items():
            number = int(self.options["ratio"] * len(module.weight) + 1e-9)
            rows = self.rows[name] = self._score(module.weight).sort(descending=True).indices[:number]
            self.old[name] = [tensor[rows].clone() for tensor in self._tensors(module)]
            for tensor in self._tensors(module):
                tensor[rows] = 0
            self._forget(module, rows)
        if not self.options["s2"]:
            self._restore()

    def _restore(self) -> None:
        for name, rows in self.rows.items():
            module = self.layers[name]
            for tensor, value in zip(self._tensors(module), self.old[name], strict=True):
                tensor[rows] = value
            self._renew(name, module, rows)
            self._forget(module, rows)
        self.rows = {}

    def _renew(self, name: str, module: nn.Module, rows: Tensor) -> None:
        if self.options["returns"] == "init":
            shape = module.weight[rows].shape
            module.weight[rows] = self.spread[name] * torch.randn(shape, generator=self.generator)
            if module.bias is not None:
                module.bias[rows] = 0

    def _score(self, weight: Tensor) -> Tensor:
        if self.options.get("criterion") == "ortho":
            return inter_filter_orthogonality(weight)
        return torch.rand(len(weight), generator=self.generator)

    def _forget(self, module: nn.Module, rows: Tensor) -> None:
        for tensor in self._tensors(module):
            momentum = self.optimizer.state.get(tensor, {}).get("momentum_buffer")
            if momentum is not None:
                momentum[rows] = 0

    @staticmethod
    def _tensors(module: nn.Module) -> list[Tensor]:
        norm = getattr(module, "norm", None)
        found = [module.weight, module.bias]
        return [t for t in (*found, *((norm.weight, norm.bias) if norm is not None else ())) if t is not None]


class AsTheyWere(HookBase):
    """Makes RePrHook, which is registered before, bring the filters back as they were."""

    def before_train(self) -> None:
        (scheme,) = (hook.scheme for hook in self.trainer._hooks if isinstance(hook, RePrHook))
        scheme.restore = functools.partial(scheme.restore, as_they_were=True)


class Distillation(HookBase):
    """Holds the network to a copy of itself: to the one of the latest of the iterations ``at``, until ``until``.

    Two losses are added: the squared distance of the FPN maps over the copy's mean square, mean of the levels, and the
    divergence KL(copy || network) of the class scores on the network's own proposals. Registered before a hook that
    drops at the same iteration, the copy is the network before the drop.

    Args (of ``options``):
        at: iterations after which the copy is made.
        until: iteration from which there is no copy.
        weight: of both losses.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.teacher: list[nn.Module] = []  # a list, so that the trainer's model does not see it
        self.features: dict[str, Tensor] = {}
        self.losses: dict[str, Tensor] = {}

    def before_train(self) -> None:
        model = self.trainer.model
        model.backbone.register_forward_hook(self._after_backbone)
        self.forward_box = model.roi_heads._forward_box
        model.roi_heads._forward_box = self._forward_box
        model.roi_heads.box_predictor.register_forward_hook(self._keep_scores)
        self.forward = model.forward
        model.forward = self._forward

    def after_step(self) -> None:
        if self.trainer.iter in self.options["at"]:
            state = self.trainer.model.state_dict()
            teacher = build_model(self.trainer.cfg)
            teacher.load_state_dict(state)
            self.teacher = [teacher.to(memory_format=torch.channels_last).eval()]
        if self.trainer.iter + 1 >= self.options["until"]:
            self.teacher = []

    def _after_backbone(self, module: nn.Module, inputs: tuple[Tensor], output: dict[str, Tensor]) -> None:
        if module.training and self.teacher:
            with torch.no_grad():
                self.features = self.teacher[0].backbone(*inputs)
            distances = [
                F.mse_loss(output[name].float(), aim.float()) / aim.float().square().mean()
                for name, aim in self.features.items()
            ]
            self.losses["loss_features"] = self.options["weight"] * torch.stack(distances).mean()

    def _forward_box(self, features: dict[str, Tensor], proposals: list) -> Any:
        found = self.forward_box(features, proposals)
        if self.trainer.model.training and self.teacher:
            heads = self.teacher[0].roi_heads
            with torch.no_grad():
                pooled = heads.box_pooler(
                    [self.features[f] for f in heads.box_in_features], [p.proposal_boxes for p in proposals]
                )
                aim = heads.box_predictor(heads.box_head(pooled))[0].float().log_softmax(1)
            distance = F.kl_div(self.scores.float().log_softmax(1), aim, reduction="batchmean", log_target=True)
            self.losses["loss_scores"] = self.options["weight"] * distance
        return found

    def _keep_scores(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self.scores = output[0]

    def _forward(self, batch: list[dict]) -> Any:
        found = self.forward(batch)
        if self.trainer.model.training:
            found.update(self.losses)
            self.losses = {}
        return found


class Average(HookBase):
    """Exponential (``decay``) or uniform (from ``start``, every ``every``) average of everything in the state dict."""

    def __init__(self, decay: float | None = None, start: int = 0, every: int = 1) -> None:
        self.decay, self.start, self.every = decay, start, every
        self.number, self.state = 0, {}

    @torch.no_grad()
    def after_step(self) -> None:
        iteration = self.trainer.iter
        if iteration < self.start or (iteration - self.start) % self.every:
            return
        self.number += 1
        share = 1 / self.number
        if self.decay is not None:
            share = 1 - min(self.decay, (1 + self.number) / (10 + self.number))
        for name, value in self.trainer.model.state_dict().items():
            if name not in self.state or not value.is_floating_point():
                self.state[name] = value.clone()
            else:
                self.state[name].lerp_(value, share)


class CosineRestarts(HookBase):
    """A cosine from the full rate to 0 between any two of ``bounds``, after 50 iterations of warm-up."""

    def __init__(self, bounds: list[int]) -> None:
        self.bounds = bounds

    def before_train(self) -> None:
        self._set(0)

    def after_step(self) -> None:
        self._set(min(self.trainer.iter + 1, self.bounds[-1] - 1))

    def _set(self, iteration: int) -> None:
        start = max(bound for bound in self.bounds[:-1] if bound <= iteration)
        end = self.bounds[self.bounds.index(start) + 1]
        factor = 0.5 * (1 + math.cos(math.pi * (iteration - start) / (end - start))) * min(1, (iteration + 1) / 50)
        for group in self.trainer._trainer.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
