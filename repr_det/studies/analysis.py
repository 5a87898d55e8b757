"""``repr-det analyze``: how much the filters of a checkpoint overlap, and which ones RePr would drop.

Filters are compared within their group; without a config every conv counts as ungrouped.
"""

import argparse
import fnmatch
import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from matplotlib.figure import Figure
from scipy import special
from tabulate import tabulate
from torch import Tensor, nn

from repr_det.commands.arguments import add_data_argument, build_config, refuse_below
from repr_det.commands.data import check_datasets
from repr_det.detectron.config import as_user_error, options_of_config
from repr_det.detectron.engine import Trainer
from repr_det.detectron.passes import training_passes
from repr_det.method.criteria import (
    NEAR_DUPLICATE,
    NEVER,
    Context,
    get_criterion,
    redundancy_by,
    select_filters,
    use_of_filters,
)
from repr_det.method.errors import UserError, spelling
from repr_det.method.layers import FilterLayer, find_filter_layers
from repr_det.method.options import DETECTRON2_LAYERS, RePrOptions
from repr_det.method.orthogonality import expected_overlap, unit_filters
from repr_det.method.participants import Participants
from repr_det.method.passes import TrainingPasses
from repr_det.network.state import undisturbed
from repr_det.runs.checkpoints import AtomicCheckpointer
from repr_det.runs.files import write_atomically
from repr_det.runs.record import CONFIG_FILE
from repr_det.runs.safe_pickle import load_checkpoint

logger = logging.getLogger(__name__)
# Rows of transposed convs are no filters. What predicts (names of Detectron2 and torchvision) keeps all its filters.
NOT_FILTERS = "*deconv* *logits* *anchor_deltas* *predictor* *cls_score* *bbox_pred* *bbox_reg* *ctrness*".split()
SMALL = 0.02  # of its layer's median norm: a filter below is small
# Columns of the table: keys of the json file, for lists of filters their number.
COUNTS = ("near_duplicates", "small", "zero", "idle", "redundant", "dropped")
COLUMNS = ("name", "filters", "dimension", "overlap_mean", "overlap_random", "near_random", *COUNTS)
Patterns = Sequence[str] | None


def layers_of_model(path: Path, cfg: CfgNode) -> tuple[nn.Module, list[FilterLayer], int | None]:
    """Loads a checkpoint as training does; returns model, layers and iteration."""
    model = build_model(cfg)
    layers = find_filter_layers(model, cfg.REPR.LAYERS.INCLUDE, cfg.REPR.LAYERS.EXCLUDE)
    participants = Participants(layers, model)
    try:
        with undisturbed(model, trains=False), torch.enable_grad():
            model([{"image": torch.full((3, 128, 128), 128.0)}])
    except Exception as error:  # a model that takes more than an image
        logger.warning(f"All convs of REPR.LAYERS are looked at: a pass of an image ended in {type(error).__name__}")
    else:
        layers = participants.required(participants.update())
    participants.watch.close()
    checkpointer = AtomicCheckpointer(model)
    loaded = checkpointer.load(str(path))
    for layer in layers:
        if f"{layer.name}.weight" in checkpointer.unfit:
            weight = f"{layer.name}.weight of {tuple(layer.weight.shape)}"
            raise UserError(f"{path} has no {weight}: give --config-file of its own run")
    return model, layers, loaded.get("iteration")


def layers_of_file(path: Path, include: Patterns, exclude: Patterns) -> tuple[list[FilterLayer], int | None]:
    """Chooses 4-D weights by name, default Detectron2's backbone, else all; returns the iteration too."""
    loaded = load_checkpoint(path)
    weights, dicts = {}, [loaded]
    for one in dicts:  # outer ones first, each once: a pickle may hold a dict that holds itself
        weights = weights or {k: x for k, x in one.items() if getattr(x, "ndim", 0) == 4 and all(x.shape)}
        dicts += [x for x in one.values() if isinstance(x, dict) and not any(x is known for known in dicts)]
    convs = {}
    for name, value in weights.items():
        filters, inputs, *kernel = value.shape
        conv = nn.Conv2d(inputs, filters, tuple(kernel), bias=False, device="meta")
        conv.weight = nn.Parameter(torch.as_tensor(value).float())
        convs[str(name).removeprefix("module.").removesuffix(".weight")] = conv

    def matching(patterns: Sequence[str]) -> list[str]:
        return [x for x in convs if any(fnmatch.fnmatch(x, pattern.removesuffix(".weight")) for pattern in patterns)]

    include = include or (DETECTRON2_LAYERS if matching(DETECTRON2_LAYERS) else ["*"])
    exclude = exclude or NOT_FILTERS
    excluded = matching([*exclude, "*_momentum"])
    layers = [FilterLayer(name, convs[name]) for name in matching(include) if name not in excluded]
    if not layers:
        names = ", ".join(map(str, list(convs or loaded)[:8])) or "nothing"
        left = f" and not --exclude {' '.join(exclude)}" if matching(include) else ""
        raise UserError(f"{path}: no 4-D weight matches --include {' '.join(include)}{left}; it holds {names}")
    return layers, loaded.get("iteration")


def analyze(
    layers: Sequence[FilterLayer],
    criterion: str = "ortho",
    drop_ratio: float = 0.3,
    max_drop_per_layer: float = 0.5,
    passes: TrainingPasses | None = None,
    num_batches: int = 0,
    num_pairs: int = 10,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Describes layers, with filters by index; and the pairs of filters with the largest |cosine|."""
    for layer in layers:
        if number := int((~layer.weight.isfinite()).flatten(1).any(1).sum()):
            found = f"{number} of {layer.num_filters} filters of {layer.name} hold NaN or infinity"
            raise UserError(f"{found}: give a checkpoint from before its training diverged")
    chosen = get_criterion(criterion)
    if chosen.needs_data and passes is None:
        raise UserError(f"criterion {criterion!r} looks at training batches: give --config-file and --batches")
    context = Context(torch.Generator().manual_seed(0), passes, num_batches)
    scores = chosen.score(layers, context)
    if passes is not None:
        use = use_of_filters(layers, context)
    else:  # no filter is idle, and thresholds are equal
        zeros = {layer.name: torch.zeros(layer.num_filters, device="cpu") for layer in layers}
        use = {name: (none.bool(), none) for name, none in zeros.items()}
    redundancy = redundancy_by(layers, use)
    # As in a drop, zero filters go first.
    used = {layer.name: layer.weight.detach().flatten(1).any(1) for layer in layers}
    ranked = {name: score.masked_fill(~used[name], math.inf) for name, score in scores.items()}
    dropped = select_filters(ranked, drop_ratio, max_drop_per_layer)
    found, pairs = [], []
    for layer in layers:
        there, cosines = used[layer.name], _cosines(layer)
        norms = layer.weight.detach().flatten(1).norm(dim=1)
        near = (cosines.abs() > NEAR_DUPLICATE).any(1)
        masks = {"zero": ~there, "dropped": dropped[layer.name], "near_duplicates": near}
        masks["small"] = there & (norms < SMALL * norms[there].nanmedian())
        masks["idle"] = there & use[layer.name][0]
        masks["redundant"] = there & (redundancy[layer.name] > NEVER)
        lists = {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}
        found.append(_overlap(layer, cosines, there) | lists)
        upper = cosines.triu()
        largest = upper.abs().flatten().topk(min(num_pairs, int(upper.count_nonzero()))).indices
        for i, j in torch.stack(torch.unravel_index(largest, upper.shape), 1).tolist():
            pairs.append({"layer": layer.name, "i": i, "j": j, "cosine": upper[i, j].item()})
    return found, sorted(pairs, key=lambda pair: -abs(pair["cosine"]))[:num_pairs]


def _cosines(layer: FilterLayer) -> Tensor:
    """(J, J) cosines within groups, else 0, as on the diagonal."""
    units = unit_filters(layer.weight).chunk(layer.conv.groups)
    return torch.block_diag(*(unit @ unit.T for unit in units)).fill_diagonal_(0)


def _overlap(layer: FilterLayer, cosines: Tensor, used: Tensor) -> dict[str, Any]:
    groups, dimension = layer.conv.groups, layer.weight[0].numel()
    # O_f among the filters that are not zero.
    counts = used.view(groups, -1).sum(1).clamp(min=1)
    overlap = cosines.abs().sum(1) / counts.repeat_interleave(len(used) // groups)
    expected = sum(number * expected_overlap(number, dimension) for number in counts.tolist())
    number_used = max(1, int(used.sum()))
    return {
        "name": layer.name,
        "filters": len(used),
        "dimension": dimension,
        "overlap": [round(value, 7) for value in overlap.tolist()],
        "overlap_mean": overlap.sum().item() / number_used,
        "overlap_random": expected / number_used,
        "near_random": sum(expected_near_duplicates(number, dimension) for number in counts.tolist()),
    }


def expected_near_duplicates(num_filters: int, dimension: int) -> float:
    """The number of them among random directions; the squared cosine of two is Beta(1 / 2, (d - 1) / 2) distributed."""
    near = special.betainc((dimension - 1) / 2, 0.5, 1 - NEAR_DUPLICATE**2) if dimension > 1 else 1.0
    return num_filters * (1 - (1 - near) ** (num_filters - 1))


def summary(layers: Sequence[dict[str, Any]], num_batches: int) -> dict[str, Any]:
    counts = {key: sum(len(layer[key]) for layer in layers) for key in COUNTS}
    counts["filters"] = sum(layer["filters"] for layer in layers)
    used = counts["filters"] - counts["zero"]
    expected = sum(layer["overlap_random"] * (layer["filters"] - len(layer["zero"])) for layer in layers)
    counts["near_random"] = sum(layer["near_random"] for layer in layers)
    factor = sum(sum(layer["overlap"]) for layer in layers) / expected if expected else 1.0
    copies = counts["redundant"] - counts["idle"]
    verdict = f"{counts['redundant']} of {used} filters are redundant ({counts['redundant'] / max(1, used):.1%}): "
    verdict += f"{copies} near-duplicates of a filter that stays, "
    if num_batches:
        verdict += f"{counts['idle']} idle (no output above 0 and no gradient on {num_batches} training batches). "
    else:
        verdict += "idle ones not looked for (--batches). "
    verdict += (
        f"{counts['near_duplicates']} have |cos| > {NEAR_DUPLICATE:g} with another (random directions: "
        f"{counts['near_random']:.0f}), {counts['small']} a norm below {SMALL:.0%} of the median. "
        f"Mean O_f is {factor:.2f} times that of random directions."
    )
    return {"verdict": verdict, "overlap_factor": factor, **counts}


def as_text(found: dict[str, Any]) -> str:
    rows = []
    for layer in [*found["layers"], {"name": "all", **found}]:
        cells = [layer.get(key) for key in COLUMNS]
        rows.append([len(cell) if isinstance(cell, list) else cell for cell in cells])
    iteration = "unknown" if found["iteration"] is None else found["iteration"]
    parts = [
        found["verdict"],
        f"{found['checkpoint']}, iteration {iteration}, layers by {found['config'] or 'name'}",
        tabulate(rows, COLUMNS, floatfmt=".4f"),
        "overlap: inter-filter orthogonality O_f (random: of random directions, also for near-duplicates); dropped: by "
        f"{found['criterion']} at drop ratio {found['drop_ratio']:g}, cap {found['max_drop_per_layer']:g}",
    ]
    if found["pairs"]:
        parts.append(tabulate(found["pairs"], {"layer": "most overlap"}, floatfmt="+.4f"))
    return "\n\n".join(parts)


def plot(path: Path, layers: Sequence[dict[str, Any]]) -> None:
    figure = Figure(figsize=(4 + 0.19 * len(layers), 5), layout="constrained")
    ax = figure.subplots()
    names = [layer["name"] for layer in layers]
    ax.boxplot([np.delete(layer["overlap"], layer["zero"]) for layer in layers], positions=range(len(names)))
    ax.plot([layer["overlap_random"] for layer in layers], "x", label="random directions")
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    ax.set_ylabel("inter-filter orthogonality $O_f$")
    ax.legend()
    with as_user_error(f"--plot {path}"):  # matplotlib lists the formats that it knows
        figure.savefig(path)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="How much the filters of a checkpoint overlap, and which ones RePr would drop. With a config, "
        "--batches finds idle filters on DATASETS.TRAIN."
    )
    parser.add_argument("checkpoint", help=".pth of a training, .pkl of Detectron2, or an address as in MODEL.WEIGHTS")
    parser.add_argument("--config-file", help=f"of its run (default: {CONFIG_FILE} beside it)")
    parser.add_argument("--include", nargs="+", metavar="PATTERN", help="names of weights, without a config")
    parser.add_argument("--exclude", nargs="+", metavar="PATTERN", help=f"default {' '.join(NOT_FILTERS)}")
    add_data_argument(parser)
    parser.add_argument("--batches", type=int, default=0, help="training batches to run (default 0)")
    parser.add_argument("--criterion", help="default REPR.CRITERION; some need --batches")
    parser.add_argument("--drop-ratio", type=float, help="default REPR.DROP_RATIO")
    parser.add_argument("--max-drop-per-layer", type=float, help="default REPR.MAX_DROP_PER_LAYER")
    parser.add_argument("--pairs", type=int, default=10, help="most overlapping pairs to show (default 10)")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--plot", type=Path, help="file for a plot, .svg or .png")
    parser.add_argument("opts", nargs="*", metavar="[KEY VALUE]", help="config options, after -- behind a list")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = argument_parser().parse_intermixed_args(argv)
    for path in filter(None, (args.json, args.plot)):
        if not path.absolute().parent.is_dir():
            raise UserError(f"{path}: the folder {path.parent} does not exist")
        if path.is_dir():
            raise UserError(f"{path} is a folder: give a file")
    refuse_below(args, batches=0, pairs=0)
    config_file = args.config_file
    if args.include or args.exclude:
        if config_file:
            raise UserError("--include and --exclude go without --config-file: set REPR.LAYERS")
    elif not config_file:
        beside = Path(args.checkpoint).parent / CONFIG_FILE
        # That of a LazyConfig has no MODEL.
        if beside.is_file() and re.search(r"^MODEL:", beside.read_text(encoding="utf-8"), re.MULTILINE):
            config_file = str(beside)
    passes = None
    with as_user_error(args.checkpoint):
        file = Path(PathManager.get_local_path(args.checkpoint))
    if config_file:
        # Test data need not be there.
        cfg = build_config(config_file, [*args.opts, "MODEL.DEVICE", "cpu", "DATASETS.TEST", "()"], args.register)
        model, layers, iteration = layers_of_model(file, cfg)
        defaults = options_of_config(cfg)
        if args.batches:
            check_datasets(cfg)
            source = SimpleNamespace(cfg=cfg, build_train_loader=Trainer.build_train_loader)
            passes = training_passes(model, source, cfg.SEED, cfg.SOLVER.IMS_PER_BATCH)
    else:
        for flag, values in (("--batches", args.batches), ("--register", args.register), ("KEY VALUE", args.opts)):
            if values:
                raise UserError(f"{flag} {values} needs --config-file")
        layers, iteration = layers_of_file(file, args.include, args.exclude)
        defaults = RePrOptions()
    names = ("criterion", "drop_ratio", "max_drop_per_layer")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = {name: getattr(defaults, name) for name in names} | given
    if args.criterion is None and get_criterion(options["criterion"]).needs_data and not args.batches:
        options["criterion"] = "ortho"
    with spelling({name: f"--{name.replace('_', '-')}" for name in options}):
        analyzed, pairs = analyze(layers, **options, passes=passes, num_batches=args.batches, num_pairs=args.pairs)
    found = {
        "checkpoint": args.checkpoint,
        "config": config_file,
        "iteration": iteration,
        **summary(analyzed, args.batches),
        **options,
        "layers": analyzed,
        "pairs": pairs,
    }
    print(as_text(found))
    if args.json:
        write_atomically(args.json, json.dumps(found, indent=1, default=int) + "\n")
    if args.plot:
        plot(args.plot, analyzed)
