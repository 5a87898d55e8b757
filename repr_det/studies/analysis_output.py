"""What was found in a checkpoint, told: the sentences, the table, the JSON file and the plot."""

import json
from pathlib import Path

import numpy as np
import torch

from repr_det.method.errors import UserError
from repr_det.method.redundancy import NEAR_DUPLICATE
from repr_det.runs.files import write_atomically
from repr_det.studies.analysis import DEAD, Analysis, Checkpoint

# O_f over its expectation for random directions, below which there is no overlap to speak of: 1.0 in networks trained
# from random weights on hundreds of images, 1.1 to 3.1 in the layers of one trained on ImageNet.
_AS_RANDOM = 1.1


def describe_state(checkpoint: Checkpoint, analysis: Analysis) -> str:
    """One line: whether these are the weights of a full network or of a sub-network."""
    zero = sum(len(layer.zero) for layer in analysis.layers)
    total = sum(layer.filters for layer in analysis.layers)
    when = "" if checkpoint.iteration is None else f"after iteration {checkpoint.iteration}, "
    if checkpoint.dropped:
        return (
            f"{when}sub-network phase of RePr: {zero} of {total} filters are dropped (zero) here and return when the "
            "run continues; O_f is that of the others"
        )
    if zero:
        return (
            f"{when}{zero} of {total} filters are exactly zero: written in the sub-network phase of RePr, or pruned; "
            "O_f is that of the others"
        )
    return f"{when}full network: {total} filters, none is zero"


def overlap_factor(analysis: Analysis) -> float:
    """Mean O_f of the filters in use over the mean of what random directions would have: 1 where nothing overlaps."""
    used = sum(layer.used.sum().item() for layer in analysis.layers)
    expected = sum(len(layer.used) * layer.expected for layer in analysis.layers)
    return used / expected if expected else 1.0


def verdict(analysis: Analysis) -> str:
    """One sentence: whether there is anything to remove."""
    filters = sum(layer.filters - len(layer.zero) for layer in analysis.layers)
    dead = sum(len(layer.dead) for layer in analysis.layers)
    duplicates = sum(len(layer.duplicates) for layer in analysis.layers)
    idle = sum(len(layer.idle) for layer in analysis.layers)
    factor = overlap_factor(analysis)
    found = (
        f"mean O_f is {factor:.2f} times that of random directions; of {filters} filters {duplicates} are "
        f"near-duplicates (|cos| > {NEAR_DUPLICATE:g}), {dead} dead (norm below {100 * DEAD:g} % of their "
        "layer's median)"
    )
    if analysis.num_batches:
        found += f", {idle} idle (no output above 0 and no gradient on {analysis.num_batches} training batches)"
    if factor >= _AS_RANDOM or duplicates or dead or idle:
        return f"There is something to remove: {found}."
    return (
        f"There is nothing to remove: {found}. What a drop takes here follows the layers' dimensions, not redundancy."
    )


def as_table(analysis: Analysis) -> str:
    """One row a layer, the pairs and the verdict below."""
    from tabulate import tabulate

    rows = [
        [
            layer.name,
            layer.filters,
            layer.dimension,
            len(layer.zero),
            *([len(layer.idle)] if analysis.num_batches else []),
            layer.used.mean().item(),
            layer.used.max().item(),
            layer.expected,
            layer.max_cosine,
            len(layer.dropped),
            f"{100 * len(layer.dropped) / layer.filters:.0f} %",
        ]
        for layer in analysis.layers
    ]
    filters = sum(layer.filters for layer in analysis.layers)
    used = torch.cat([layer.used for layer in analysis.layers])
    total = sum(len(layer.dropped) for layer in analysis.layers)
    counts = ["zero", "idle"] if analysis.num_batches else ["zero"]
    sums = [sum(row[column] for row in rows) for column in range(3, 3 + len(counts))]
    rows.append(["all", filters, "", *sums, used.mean().item(), used.max().item(), "", "", total])
    headers = ["layer", "J", "d", *counts, "mean O_f", "max O_f", "random", "max |cos|", "drop", "share"]
    formats = (*[""] * (3 + len(counts)), ".4f", ".4f", ".4f", ".4f", "", "")
    text = tabulate(rows, headers, floatfmt=formats, colalign=("left", *["right"] * (len(headers) - 1)))
    text += (
        "\n\nO_f: inter-filter orthogonality (random: its value for random directions). drop: what the criterion\n"
        f"{analysis.criterion} takes at drop ratio {analysis.drop_ratio:g}, cap {analysis.max_drop_per_layer:g}."
    )
    broken = [f"{layer.name} {layer.not_finite}" for layer in analysis.layers if layer.not_finite]
    if broken:
        text += f"\nNot finite: {', '.join(broken)}"
    if analysis.pairs:
        headers = ["most overlapping pairs: layer", "i", "j", "cosine"]
        text += "\n\n" + tabulate(analysis.pairs, headers, floatfmt=("", "", "", "+.4f"))
    return f"{text}\n\n{verdict(analysis)}"


def write_json(path: str | Path, checkpoint: Checkpoint, analysis: Analysis) -> None:
    """Everything in numbers; ``overlap`` holds O_f of every filter."""
    result = {
        "checkpoint": str(checkpoint.path),
        "iteration": checkpoint.iteration,
        "state": describe_state(checkpoint, analysis),
        "sub_network": bool(checkpoint.dropped) or any(layer.zero for layer in analysis.layers),
        "overlap_factor": overlap_factor(analysis),
        "verdict": verdict(analysis),
        "criterion": analysis.criterion,
        "drop_ratio": analysis.drop_ratio,
        "max_drop_per_layer": analysis.max_drop_per_layer,
        "filters": sum(layer.filters for layer in analysis.layers),
        "layers": [
            {
                "name": layer.name,
                "filters": layer.filters,
                "dimension": layer.dimension,
                "zero": layer.zero,
                "not_finite": layer.not_finite,
                "dead": layer.dead,
                "near_duplicates": layer.duplicates,
                "idle": layer.idle if analysis.num_batches else None,
                "overlap": [round(x, 7) for x in layer.overlap.tolist()],
                "overlap_mean": layer.used.mean().item(),
                "overlap_random": layer.expected,
                "max_cosine": layer.max_cosine,
                "dropped": layer.dropped,
            }
            for layer in analysis.layers
        ],
        "pairs": [{"layer": n, "i": i, "j": j, "cosine": cosine} for n, i, j, cosine in analysis.pairs],
    }
    write_atomically(path, json.dumps(result, indent=1) + "\n")


def plot(path: str | Path, checkpoint: Checkpoint, analysis: Analysis) -> None:
    """O_f per layer (range, middle half, median, random directions) beside the share that would be dropped.

    Args:
        path: its suffix, such as .svg or .png, decides the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = analysis.layers
    positions = range(len(layers))
    figure = Figure(figsize=(9.5, 1.6 + 0.19 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1.2])
    for y, layer in zip(positions, layers, strict=True):
        low, first, median, third, high = np.percentile(layer.used.numpy(), [0, 25, 50, 75, 100])
        left.plot([low, high], [y, y], color="#9bb4d0", linewidth=1.2, solid_capstyle="butt")
        left.plot([first, third], [y, y], color="#2f6aa8", linewidth=5, solid_capstyle="butt")
        left.plot([median], [y], "|", color="white", markersize=5)
    left.plot([layer.expected for layer in layers], positions, "x", color="#c8501e", markersize=4, label="random")
    left.set_yticks(positions, [layer.name for layer in layers], fontsize=7)
    left.set_ylim(len(layers) - 0.5, -0.5)
    left.set_xlim(left=0)
    left.set_xlabel("inter-filter orthogonality $O_f$: range, middle half, median", fontsize=8)
    left.legend(fontsize=7, frameon=False, loc="lower right")
    right.barh(positions, [100 * len(layer.dropped) / layer.filters for layer in layers], color="#7a7a7a", height=0.7)
    right.axvline(100 * analysis.max_drop_per_layer, color="#c8501e", linewidth=0.8, linestyle="--")
    right.set_xlim(0, 100)
    right.set_xlabel(f"% dropped by {analysis.criterion} at {analysis.drop_ratio:g}\n(dashed: cap)", fontsize=8)
    for axes in (left, right):
        axes.grid(axis="x", linewidth=0.4, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    figure.suptitle(checkpoint.path.name, fontsize=9)
    try:
        figure.savefig(path, dpi=150, metadata={"Date": None} if str(path).endswith(".svg") else None)
    except ValueError as error:  # matplotlib lists the formats that it knows
        raise UserError(f"--plot {path}: {error}") from error
