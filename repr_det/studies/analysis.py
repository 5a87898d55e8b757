"""``repr-det analyze``: how much the filters of a checkpoint overlap, and which ones RePr would drop.

A filter of a grouped conv is compared with those of its group; without a config every conv counts as ungrouped.
"""

import argparse
import fnmatch
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn

from repr_det.commands.arguments import add_data_argument, build_config
from repr_det.commands.data_checks import check_datasets
from repr_det.detectron.config import add_repr_config
from repr_det.detectron.engine import Trainer
from repr_det.detectron.passes import training_passes
from repr_det.method.criteria import CRITERIA, Context, get_criterion
from repr_det.method.errors import UserError, spelling
from repr_det.method.layers import FilterLayer, find_filter_layers
from repr_det.method.orthogonality import expected_overlap, inter_filter_orthogonality, unit_filters
from repr_det.method.participants import Participants
from repr_det.method.passes import TrainingPasses
from repr_det.method.redundancy import NEAR_DUPLICATE
from repr_det.method.selection import select_filters
from repr_det.network.state import undisturbed
from repr_det.runs.checkpoints import AtomicCheckpointer
from repr_det.runs.files import write_atomically
from repr_det.runs.record import CONFIG_FILE
from repr_det.runs.safe_pickle import load_checkpoint

# Transposed convs keep (C_in, C_out, kh, kw): their rows are no filters. What predicts keeps all its filters.
NOT_FILTERS = ("*deconv*", "*objectness_logits*", "*anchor_deltas*", "*predictor*", "*cls_score*", "*bbox_pred*")
DEAD = 0.02  # a filter is dead if its norm is below this share of the median of its layer
# O_f over its expectation for random directions, below which nothing overlaps to speak of: 1.0 in networks trained from
# random weights on hundreds of images, 1.1 to 3.1 in the layers of one trained on ImageNet.
AS_RANDOM = 1.1
# The columns of the table are keys of the json file; of a list of filters it shows the number.
COUNTS = ("zero", "idle", "not_finite", "dropped")
COLUMNS = ("name", "filters", "dimension", "overlap_mean", "overlap_random", "max_cosine", *COUNTS)


def layers_of_model(path: Path, cfg: CfgNode) -> tuple[nn.Module, list[FilterLayer], int | None]:
    """Builds the model of a config, loads a checkpoint as training does, and finds the layers that RePr applies to.

    Returns:
        Model, layers, and the iteration of the training if the file has it.

    Raises:
        UserError: the checkpoint lacks a layer or has it in another shape.
    """
    model = build_model(cfg)
    layers = _participants(model, find_filter_layers(model, cfg.REPR.LAYERS.INCLUDE, cfg.REPR.LAYERS.EXCLUDE))
    for layer in layers:
        nn.init.constant_(layer.weight, math.nan)
    iteration = load_checkpoint(path).get("iteration")
    AtomicCheckpointer(model).load(str(path))
    for layer in layers:
        if layer.weight.isnan().all():
            shape = "x".join(map(str, layer.weight.shape))
            raise UserError(
                f"{path}: no {layer.name}.weight of {shape}, as in the model of the config: give the --config-file of "
                "the run that wrote it"
            )
    return model, layers, iteration


def _participants(model: nn.Module, candidates: Sequence[FilterLayer]) -> list[FilterLayer]:
    """The layers from which training would drop filters, as a prediction for a grey image shows."""
    participants = Participants(candidates, model)
    with undisturbed(model, trains=False), torch.enable_grad():
        model([{"image": torch.full((3, 128, 128), 128.0)}])
    found = participants.hear()
    participants.close()
    return found


def layers_of_file(
    path: Path, include: Sequence[str] = (), exclude: Sequence[str] = NOT_FILTERS
) -> tuple[list[FilterLayer], int | None]:
    """Reads a checkpoint, official ``.pkl`` or state dict, and chooses 4-D weights by fnmatch patterns on their names.

    Args:
        include: by default those of REPR.LAYERS.INCLUDE, or everything in files with other names.

    Returns:
        The layers, and the iteration of the training if the file has it.
    """
    loaded = load_checkpoint(path)
    keys = ("model", "state_dict", "model_state", "blobs")
    found = next((loaded[key] for key in keys if isinstance(loaded.get(key), dict)), loaded)
    weights = {}
    for name, value in found.items():
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
        if torch.is_tensor(tensor) and tensor.dim() == 4 and tensor.is_floating_point() and tensor.numel():
            weights[str(name).removeprefix("module.").removesuffix(".weight")] = tensor.float()
    if not weights:
        shown = ", ".join(map(str, list(loaded)[:5])) or "nothing"
        raise UserError(f"{path}: no 4-D weights found; it holds {shown}, where a state dict or 'model' was expected")

    def matching(patterns: Sequence[str]) -> list[str]:
        return [x for x in weights if any(fnmatch.fnmatch(x, pattern.removesuffix(".weight")) for pattern in patterns)]

    defaults = default_config().REPR.LAYERS.INCLUDE
    include = include or (defaults if matching(defaults) else ["*"])
    excluded = matching([*exclude, "*_momentum"])
    layers = []
    for name in matching(include):
        if name not in excluded:
            filters, inputs, *kernel = weights[name].shape
            conv = nn.Conv2d(inputs, filters, tuple(kernel), bias=False, device="meta")
            conv.weight = nn.Parameter(weights[name])
            layers.append(FilterLayer(name, conv))
    if not layers:
        raise UserError(
            f"{path}: no 4-D weight matches --include {' '.join(include)} less --exclude {' '.join(exclude)}; there "
            f"are: {', '.join(list(weights)[:8])}"
        )
    return layers, loaded.get("iteration")


def analyze(
    layers: Sequence[FilterLayer],
    criterion: str = "ortho",
    drop_ratio: float = 0.3,
    max_drop_per_layer: float = 0.5,
    passes: TrainingPasses | None = None,
    num_batches: int = 0,
) -> list[dict[str, Any]]:
    """Describes layers by their weights, by their outputs on training batches (if ``passes``), and by the drop."""
    if get_criterion(criterion).needs_data and passes is None:
        raise UserError(f"criterion {criterion!r} looks at training batches: give --config-file and --batches")
    context = Context(torch.Generator().manual_seed(0), passes, num_batches)
    scores = get_criterion(criterion).score(layers, context)
    idle: dict[str, Tensor] = {}
    if passes is not None:
        redundancy = scores if criterion == "redundant" else CRITERIA["redundant"].score(layers, context)
        idle = {name: score == math.inf for name, score in redundancy.items()}
    # As in a drop, filters that are zero go first.
    zero = {layer.name: ~layer.weight.detach().flatten(1).any(1) for layer in layers}
    ranked = {name: score.masked_fill(zero[name], math.inf) for name, score in scores.items()}
    dropped = select_filters(ranked, drop_ratio, max_drop_per_layer)
    return [_layer(x, zero[x.name], idle.get(x.name), dropped[x.name]) for x in layers]


def _layer(layer: FilterLayer, zero: Tensor, idle: Tensor | None, dropped: Tensor) -> dict[str, Any]:
    """One layer as the json file has it; filters are named by their index."""
    rows, used = layer.weight.detach().flatten(1), ~zero
    norms = rows.norm(dim=1)
    near = cosines(layer).abs() > NEAR_DUPLICATE
    size = len(rows) // layer.conv.groups
    counts = used.view(-1, size).sum(1)
    # O_f among the filters in use: zero filters overlap with nothing, but O_f divides by their number too.
    overlap = inter_filter_orthogonality(rows, layer.conv.groups) * (size / counts.clamp(min=1)).repeat_interleave(size)
    expected = [number * expected_overlap(number, rows.shape[1]) for number in counts.tolist() if number]
    return {
        "name": layer.name,
        "filters": len(rows),
        "dimension": rows.shape[1],
        "zero": _indices(zero),
        "not_finite": _indices(~rows.isfinite().all(1)),
        "dead": _indices(used & (norms < DEAD * norms[used].nanmedian())) if used.any() else [],
        "near_duplicates": _indices(near.any(0) | near.any(1)),
        "idle": None if idle is None else _indices(idle & used),
        "overlap": [round(value, 7) for value in overlap.tolist()],
        "overlap_mean": overlap.sum().item() / max(1, int(used.sum())),
        "overlap_random": sum(expected) / max(1, int(used.sum())),
        "max_cosine": cosines(layer).abs().max().item(),
        "dropped": _indices(dropped),
    }


def cosines(layer: FilterLayer) -> Tensor:
    """(J, J) cosines of two filters of one group, above the diagonal; 0 elsewhere."""
    units = unit_filters(layer.weight).chunk(layer.conv.groups)
    return torch.block_diag(*(unit @ unit.T for unit in units)).triu(diagonal=1)


def _indices(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def overlapping_pairs(layers: Sequence[FilterLayer], number: int) -> list[dict[str, Any]]:
    """The ``number`` pairs of filters of one layer with the largest |cosine|."""
    pairs = []
    for layer in layers:
        matrix = cosines(layer)
        largest = matrix.abs().flatten().topk(min(number, int(matrix.count_nonzero()))).indices
        for i, j in torch.stack(torch.unravel_index(largest, matrix.shape), 1).tolist():
            pairs.append({"layer": layer.name, "i": i, "j": j, "cosine": matrix[i, j].item()})
    return sorted(pairs, key=lambda pair: -abs(pair["cosine"]))[:number]


def total(layers: Sequence[dict], kind: str) -> int:
    """The number of filters in all layers: "overlap" has all of them, "zero", "dead", ... some."""
    return sum(len(layer[kind] or ()) for layer in layers)


def overlap_factor(layers: Sequence[dict]) -> float:
    """Mean O_f of the filters that are not zero over that of random directions: 1 if nothing overlaps."""
    expected = sum((layer["filters"] - len(layer["zero"])) * layer["overlap_random"] for layer in layers)
    return sum(sum(layer["overlap"]) for layer in layers) / expected if expected else 1.0


def verdict(layers: Sequence[dict], num_batches: int) -> str:
    """Says in one sentence whether there is anything to remove."""
    factor, filters = overlap_factor(layers), total(layers, "overlap") - total(layers, "zero")
    duplicates, dead, idle = (total(layers, kind) for kind in ("near_duplicates", "dead", "idle"))
    found = (
        f"mean O_f is {factor:.2f} times that of random directions; of {filters} filters {duplicates} are near-"
        f"duplicates (|cos| > {NEAR_DUPLICATE:g}), {dead} dead (norm below {100 * DEAD:g} % of their layer's median)"
    )
    if num_batches:
        found += f", {idle} idle (no output above 0 and no gradient on {num_batches} training batches)"
    if factor >= AS_RANDOM or duplicates or dead or idle:
        return f"There is something to remove: {found}."
    return f"There is nothing to remove: {found}. A drop then follows the layers' dimensions, not redundancy."


def as_table(found: Mapping[str, Any]) -> str:
    """A row for every layer, and the pairs."""
    layers = found["layers"]
    rows = [[len(layer[key]) if isinstance(layer[key], list) else layer[key] for key in COLUMNS] for layer in layers]
    sums = {key: total(layers, key) for key in COUNTS if layers[0][key] is not None}
    sums |= {"name": "all", "filters": found["filters"]}
    rows.append([sums.get(key) for key in COLUMNS])
    pairs = tabulate(found["pairs"], {"layer": "most overlap"}, floatfmt="+.4f") if found["pairs"] else ""
    return (
        f"{tabulate(rows, COLUMNS, floatfmt='.4f')}\n\noverlap: inter-filter orthogonality O_f (random: its value for "
        f"random directions). dropped: what the criterion\n{found['criterion']} takes at drop ratio "
        f"{found['drop_ratio']:g}, cap {found['max_drop_per_layer']:g}.\n\n{pairs}"
    ).rstrip()


def plot(path: Path, found: Mapping[str, Any]) -> None:
    """Draws O_f of the filters of every layer, with that of random directions, over the share that would be dropped."""
    layers, positions = found["layers"], range(len(found["layers"]))
    figure = Figure(figsize=(4 + 0.19 * len(layers), 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.2])
    used = [np.delete(layer["overlap"], layer["zero"]) for layer in layers]
    upper.boxplot(used, positions=positions, whis=(0, 100))
    upper.plot(positions, [layer["overlap_random"] for layer in layers], "x", label="random directions")
    upper.set_ylabel("inter-filter orthogonality $O_f$")
    upper.legend()
    lower.bar(positions, [100 * len(layer["dropped"]) / layer["filters"] for layer in layers])
    lower.set_ylabel(f"% dropped by {found['criterion']}")
    lower.set_xticks(positions, [layer["name"] for layer in layers], rotation=90, fontsize=7)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:  # matplotlib lists the formats that it knows
        raise UserError(f"--plot {path}: {error}") from error


def argument_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Shows how much the filters of a checkpoint overlap, and which ones RePr would drop. With a config "
        "the layers are those of REPR.LAYERS in its model; --batches then finds idle filters on DATASETS.TRAIN."
    )
    parser.add_argument("checkpoint", type=Path, help=".pth of a training, or .pkl weights of Detectron2")
    parser.add_argument("--config-file", help=f"of the run that wrote it (default: {CONFIG_FILE} beside it, if any)")
    parser.add_argument("--include", nargs="+", metavar="PATTERN", help="go by names of weights, without a config")
    parser.add_argument("--exclude", nargs="+", metavar="PATTERN", help=f"default {' '.join(NOT_FILTERS)}")
    add_data_argument(parser)
    parser.add_argument("--batches", type=int, default=0, help="how many training batches to run (0: only the weights)")
    parser.add_argument("--criterion", help="default REPR.CRITERION, or ortho; some need --batches")
    parser.add_argument("--drop-ratio", type=float, help="default REPR.DROP_RATIO, or 0.3")
    parser.add_argument("--max-drop-per-layer", type=float, help="default REPR.MAX_DROP_PER_LAYER, or 0.5")
    parser.add_argument("--pairs", type=int, default=10, help="how many of the most overlapping pairs (10)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--plot", type=Path, help="write the plot to this .svg or .png file")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config options, after -- behind a list")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses arguments, then reads the checkpoint and shows it."""
    args = argument_parser().parse_intermixed_args(argv)
    for name, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{name} {path}: the folder {path.parent} does not exist")
    for name in ("batches", "pairs"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} must be at least 0, got {getattr(args, name)}")
    config_file = args.config_file or (None if args.include or args.exclude else config_beside(args.checkpoint))
    if config_file:
        if args.include or args.exclude:
            raise UserError("--include and --exclude go without --config-file; set REPR.LAYERS.INCLUDE, EXCLUDE")
        # Nothing is evaluated, and what would be need not be there.
        cfg = build_config(config_file, [*args.opts, "MODEL.DEVICE", "cpu", "DATASETS.TEST", "()"], args.register)
        if args.batches:
            check_datasets(cfg)
        model, layers, iteration = layers_of_model(args.checkpoint, cfg)
    else:
        for flag, values in (("--batches", args.batches), ("--register", args.register), ("KEY VALUE", args.opts)):
            if values:
                raise UserError(f"{flag} {values} needs --config-file")
        cfg = default_config()
        layers, iteration = layers_of_file(args.checkpoint, args.include or (), args.exclude or NOT_FILTERS)
    passes = None
    if args.batches:
        source = SimpleNamespace(cfg=cfg, build_train_loader=Trainer.build_train_loader)
        passes = training_passes(
            model, source, cfg.SEED, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.ASPECT_RATIO_GROUPING
        )
    criterion = args.criterion or (cfg.REPR.CRITERION if args.config_file or args.batches else "ortho")
    ratio = cfg.REPR.DROP_RATIO if args.drop_ratio is None else args.drop_ratio
    cap = cfg.REPR.MAX_DROP_PER_LAYER if args.max_drop_per_layer is None else args.max_drop_per_layer
    with spelling({name: f"--{name.replace('_', '-')}" for name in ("criterion", "drop_ratio", "max_drop_per_layer")}):
        analyzed = analyze(layers, criterion, ratio, cap, passes, args.batches)
    zero, filters = total(analyzed, "zero"), total(analyzed, "overlap")
    state = f"full network: {filters} filters, none is zero"
    if zero:
        state = f"sub-network: {zero} of {filters} filters are exactly zero (RePr's sub-network phase, or pruned)"
    found = {
        "checkpoint": str(args.checkpoint),
        "iteration": iteration,
        "state": state if iteration is None else f"after iteration {iteration}, {state}",
        "sub_network": zero > 0,
        "overlap_factor": overlap_factor(analyzed),
        "verdict": verdict(analyzed, args.batches),
        "criterion": criterion,
        "drop_ratio": ratio,
        "max_drop_per_layer": cap,
        "filters": filters,
        "layers": analyzed,
        "pairs": overlapping_pairs(layers, args.pairs),
    }
    source = f"{args.checkpoint}, layers of {config_file}" if config_file else args.checkpoint
    print(f"{found['verdict']}\n\n{source}: {found['state']}\n\n{as_table(found)}")
    if args.json:
        write_atomically(args.json, json.dumps(found, indent=1) + "\n")
    if args.plot:
        plot(args.plot, found)


def default_config() -> CfgNode:
    """Detectron2's config with the node REPR."""
    cfg = get_cfg()
    add_repr_config(cfg)
    return cfg


def config_beside(checkpoint: Path) -> str | None:
    """The config.yaml of the run that wrote a checkpoint; None if there is none, or that of a LazyConfig."""
    path = checkpoint.parent / CONFIG_FILE
    is_yacs = path.is_file() and re.search(r"^MODEL:", path.read_text(encoding="utf-8"), re.MULTILINE)
    return str(path) if is_yacs else None
