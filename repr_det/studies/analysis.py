"""What the filters of a checkpoint look like, without training: inter-filter orthogonality, overlapping pairs, filters
that training batches never bring into use, and what a criterion would drop.

Shape shorthand:
    J: filters of a layer        d: weights of one filter

A filter of a grouped conv is compared with those of its group. Weights alone do not say how many groups there are, so
layers that are chosen by pattern count as one.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repr_det.method.criteria import CRITERIA, Context, get_criterion
from repr_det.method.data_criteria import share_in_use
from repr_det.method.errors import UserError
from repr_det.method.layers import FilterLayer, find_filter_layers
from repr_det.method.orthogonality import by_group, expected_overlap, inter_filter_orthogonality, unit_filters
from repr_det.method.passes import TrainingPasses
from repr_det.method.redundancy import NEAR_DUPLICATE
from repr_det.method.selection import select_filters
from repr_det.runs.safe_pickle import load_checkpoint

# Transposed convs keep (C_in, C_out, kh, kw): their rows are no filters.
NOT_FILTERS = ("*deconv*",)
DEAD = 0.02  # a filter whose norm is below this share of the median of its layer


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        path: the file.
        weights: parameter name -> tensor on the CPU.
        iteration: of the training that wrote it, None where it does not say.
        dropped: filters that its RePr state says are dropped, None where it has no such state.
        converts: "Caffe2" or another author whose names have to be matched to a model's, None where they are a model's.
    """

    path: Path
    weights: dict[str, Tensor]
    iteration: int | None = None
    dropped: int | None = None
    converts: str | None = None


@dataclass
class LayerAnalysis:
    """One layer.

    Attributes:
        name: of the conv.
        filters, dimension: J and d.
        zero, not_finite: indices of filters that are exactly zero, or hold NaN or infinity.
        dead: indices of those whose norm is below DEAD of the median of the layer, without those of ``zero``.
        duplicates: indices of those with |cos| above NEAR_DUPLICATE to another filter of the layer.
        idle: indices of those that put out nothing above 0 and get no gradient on the training batches that were run,
            without those of ``zero``; empty where none were.
        overlap: (J,) O_f among the filters in use; 0 for those of ``zero``.
        expected: O_f of random directions, for the same number of filters in use.
        max_cosine: the largest |cos| of two filters.
        dropped: indices of the filters that the criterion drops.
    """

    name: str
    filters: int
    dimension: int
    zero: list[int]
    not_finite: list[int]
    dead: list[int]
    duplicates: list[int]
    idle: list[int]
    overlap: Tensor
    expected: float
    max_cosine: float
    dropped: list[int]

    @property
    def used(self) -> Tensor:
        """O_f of the filters that are not zero; a single 0 where all are."""
        keep = torch.ones(self.filters, dtype=torch.bool)
        keep[self.zero] = False
        return self.overlap[keep] if keep.any() else torch.zeros(1)


@dataclass
class Analysis:
    """All layers, the pairs (layer, i, j, cosine) by falling |cosine|, the drop that was asked about, and how many
    training batches were run."""

    layers: list[LayerAnalysis]
    pairs: list[tuple[str, int, int, float]]
    criterion: str
    drop_ratio: float
    max_drop_per_layer: float
    num_batches: int


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint of Detectron2, an official ``.pkl``, or a plain state dict; nothing in it is executed.

    Raises:
        UserError: as ``safe_pickle.load_checkpoint``, or there are no weights in it.
    """
    path = Path(path)
    loaded = load_checkpoint(path)
    found, converts = loaded, None
    for key in ("model", "state_dict", "model_state", "blobs"):
        if isinstance(found.get(key), dict):
            found = found[key]
            break
    if path.suffix == ".pkl" and not ("model" in loaded and "__author__" in loaded):
        converts = "Caffe2"  # as Detectron2 reads such files
    elif loaded.get("matching_heuristics"):
        converts = str(loaded.get("__author__"))
    weights = {}
    for name, value in found.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(name, str) and torch.is_tensor(value) and not name.endswith("_momentum"):
            weights[name.removeprefix("module.")] = value
    if not weights:
        shown = ", ".join(map(str, list(loaded)[:5])) or "nothing"
        raise UserError(f"{path}: no weights found; it holds {shown}, where a state dict or a key 'model' was expected")
    iteration = loaded.get("iteration")
    return Checkpoint(
        path, weights, iteration if isinstance(iteration, int) else None, _dropped_by_state(loaded), converts
    )


def layers_by_pattern(
    checkpoint: Checkpoint, include: Sequence[str] = ("*",), exclude: Sequence[str] = NOT_FILTERS
) -> list[FilterLayer]:
    """The 4-D weights whose names (with or without ".weight") match ``include`` and not ``exclude``, in file order.

    Raises:
        UserError: there is none.
    """
    candidates = {
        name.removesuffix(".weight"): weight
        for name, weight in checkpoint.weights.items()
        if weight.dim() == 4 and weight.is_floating_point() and weight.numel()
    }

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(f"{name}.weight", p) for p in patterns)

    chosen = [name for name in candidates if matches(name, include) and not matches(name, exclude)]
    if not chosen:
        there = ", ".join(list(candidates)[:8]) + (f" and {len(candidates) - 8} more" if len(candidates) > 8 else "")
        raise UserError(
            f"{checkpoint.path}: no 4-D weight matches --include {' '.join(include)} less --exclude "
            f"{' '.join(exclude) or '(nothing)'}; there are: {there or 'none'}"
        )
    return [_stand_in(name, candidates[name]) for name in chosen]


def model_by_config(checkpoint: Checkpoint, cfg: Any) -> tuple[nn.Module, list[FilterLayer]]:
    """The model of a Detectron2 config on the CPU with the weights of the checkpoint, and its layers that REPR.LAYERS
    names. What else the checkpoint lacks (the heads, in ImageNet weights) is as the model begins.

    Raises:
        UserError: no layer is trainable, or the checkpoint lacks one or has it in another shape.
    """
    from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
    from detectron2.modeling import build_model

    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    layers = find_filter_layers(model, cfg.REPR.LAYERS.INCLUDE, cfg.REPR.LAYERS.EXCLUDE)
    weights, own = checkpoint.weights, model.state_dict()
    if checkpoint.converts:
        weights = align_and_update_state_dicts(own, dict(weights), c2_conversion=checkpoint.converts == "Caffe2")
    for layer in layers:
        weight = weights.get(f"{layer.name}.weight")
        if weight is None or weight.shape != layer.weight.shape:
            wanted = "x".join(map(str, layer.weight.shape))
            has = "absent" if weight is None else "x".join(map(str, weight.shape))
            raise UserError(
                f"{checkpoint.path}: {layer.name}.weight is {wanted} in the model of the config and {has} in the file: "
                "give the config of the run that wrote it"
            )
    fitting = {name: weight for name, weight in weights.items() if name in own and weight.shape == own[name].shape}
    model.load_state_dict(fitting, strict=False)
    return model, layers


def analyze(
    layers: Sequence[FilterLayer],
    criterion: str = "ortho",
    drop_ratio: float = 0.3,
    max_drop_per_layer: float = 0.5,
    num_pairs: int = 10,
    seed: int = 0,
    passes: TrainingPasses | None = None,
    num_batches: int = 0,
) -> Analysis:
    """Looks at the weights of ``layers``, and at what they do on training batches where there are ``passes``.

    Args:
        criterion: a name in CRITERIA; without ``passes`` one that does not look at data.
        drop_ratio, max_drop_per_layer: see ``selection.select_filters``.
        num_pairs: how many of the most overlapping pairs.
        seed: for the criterion "random".
        passes, num_batches: how to run training batches through the model of the layers, and how many.

    Raises:
        UserError: an argument is wrong.
    """
    if get_criterion(criterion, sum(layer.num_filters for layer in layers)).needs_data and passes is None:
        others = ", ".join(sorted(name for name in CRITERIA if not CRITERIA[name].needs_data))
        raise UserError(
            f"criterion {criterion!r} looks at training batches: give --config-file and --batches, or a criterion that "
            f"looks at the weights alone: {others}"
        )
    if num_pairs < 0:
        raise UserError(f"the number of pairs must be at least 0, got {num_pairs}")
    context = Context(torch.Generator().manual_seed(seed), passes, num_batches)
    scores = get_criterion(criterion).score(layers, context)
    in_use = share_in_use(layers, passes, num_batches, context.cycle) if passes else {}
    masks = select_filters(scores, drop_ratio, max_drop_per_layer)
    analyses, pairs = [], []
    for layer in layers:
        groups = layer.conv.groups
        cosines = _cosines(layer.weight, groups)
        pairs += _top_pairs(layer.name, cosines, num_pairs)
        rows = layer.weight.detach().flatten(1)
        zero = ~rows.count_nonzero(1).bool()
        norms = rows.norm(dim=1)
        dead = ~zero & (norms < DEAD * norms[~zero].nanmedian()) if not zero.all() else zero & False
        near = cosines.abs() > NEAR_DUPLICATE
        idle = (in_use[layer.name] == 0) & ~zero if passes else zero & False
        analyses.append(
            LayerAnalysis(
                name=layer.name,
                filters=len(rows),
                dimension=rows.shape[1],
                zero=zero.nonzero().flatten().tolist(),
                not_finite=(~torch.isfinite(rows).all(1)).nonzero().flatten().tolist(),
                dead=dead.nonzero().flatten().tolist(),
                duplicates=(near.any(0) | near.any(1)).nonzero().flatten().tolist(),
                idle=idle.nonzero().flatten().tolist(),
                overlap=by_group(_overlap_in_use, groups, rows, zero),
                expected=_expected(zero, groups, rows.shape[1]),
                max_cosine=cosines.abs().max().item(),
                dropped=masks[layer.name].nonzero().flatten().tolist(),
            )
        )
    pairs.sort(key=lambda pair: -abs(pair[3]))
    return Analysis(analyses, pairs[:num_pairs], criterion, drop_ratio, max_drop_per_layer, num_batches)


def _stand_in(name: str, weight: Tensor) -> FilterLayer:
    """A layer that has a weight and nothing else."""
    filters, inputs, height, width = weight.shape
    conv = nn.Conv2d(inputs, filters, (height, width), bias=False, device="meta")
    conv.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
    return FilterLayer(name, conv)


def _cosines(weight: Tensor, groups: int) -> Tensor:
    """(J, J) of every two filters of one group, above the diagonal; 0 elsewhere."""
    units = unit_filters(weight).chunk(groups)
    return torch.triu(torch.block_diag(*(unit @ unit.T for unit in units)), diagonal=1)


def _overlap_in_use(rows: Tensor, zero: Tensor) -> Tensor:
    """(J,) O_f among the filters that are not zero; 0 for the others."""
    overlap = torch.zeros(len(rows), dtype=rows.dtype)
    if not zero.all():
        overlap[~zero] = inter_filter_orthogonality(rows[~zero])
    return overlap


def _expected(zero: Tensor, groups: int, dimension: int) -> float:
    """Mean O_f of random directions for as many filters as each group has in use."""
    used = [int((~part).sum()) for part in zero.chunk(groups)]
    return sum(n * expected_overlap(max(1, n), dimension) for n in used) / max(1, sum(used))


def _top_pairs(name: str, cosines: Tensor, number: int) -> list[tuple[str, int, int, float]]:
    """The largest |entries| of an upper triangle (J, J) that are not 0."""
    size = len(cosines)
    _, flat = cosines.abs().flatten().topk(min(number, size * (size - 1) // 2))
    pairs = [(int(k) // size, int(k) % size) for k in flat]
    return [(name, i, j, cosines[i, j].item()) for i, j in pairs if cosines[i, j] != 0]


def _dropped_by_state(loaded: dict[str, Any]) -> int | None:
    """How many filters the RePr state of a training checkpoint says are dropped."""
    state: Any = loaded
    for key in ("trainer", "hooks", "RePrHook", "scheme", "masks"):
        state = state.get(key) if isinstance(state, dict) else None
    return None if not isinstance(state, dict) else sum(int(mask.sum()) for mask in state.values())
