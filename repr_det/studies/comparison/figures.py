"""The three figures of the report, each an SVG image as a data URI."""

import base64
import io
import math
import os
import pickle
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from repr_det.method.orthogonality import inter_filter_orthogonality
from repr_det.runs.files import FINAL_CHECKPOINT
from repr_det.studies.comparison.records import read_overlaps
from repr_det.studies.comparison.results import Comparison
from repr_det.studies.comparison.runs import title
from repr_det.studies.comparison.table import sub_network_phases

COLOURS = ("#2c6aa0", "#d5622a")  # of the reference and of the other arm, as in the page
_MOMENTS = ("before the first drop", "after the last restore", "at the end")
_WIDTH = 7.2  # inches; the page shows them at about their size, so a phone shrinks them by a third at most
_STYLE = {
    "svg.fonttype": "path",
    "svg.hashsalt": "repr_det",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dcdad4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def ap_figure(comparison: Comparison) -> str:
    """The difference in AP of every seed with its interval, and the AP of both arms over training."""
    with matplotlib.rc_context(_STYLE):
        figure = _new_figure(2.9)
        left, right = figure.subplots(1, 2, width_ratios=(1, 3))
        _draw_difference(left, comparison.results)
        for colour, readings in zip(COLOURS, zip(*comparison.pairs, strict=True), strict=True):
            run = readings[0].run
            for start, stop in sub_network_phases(readings[0].events, run.max_iter):
                right.axvspan(start, stop, color=colour, alpha=0.13, linewidth=0)
            curves = pd.DataFrame([dict(reading.curve) for reading in readings]).T.sort_index()
            mean = curves.dropna().mean(axis=1)
            right.plot(curves, color=colour, linewidth=0.7, alpha=0.5)
            right.plot(mean, "o-", color=colour, linewidth=1.8, markersize=2.6, label=title(run.arm))
        right.set_title("validation AP")
        right.set_xlabel("iterations")
        right.set_xlim(0, 1.02 * comparison.study.runs[0].max_iter)
        right.grid(axis="y")
        figure.legend(loc="outside upper right", ncols=2)
        return _data_uri(figure)


def dropped_figure(comparison: Comparison) -> str:
    """The share of each layer that every drop took: mean over the seeds, and their range; "" without drops."""
    lines = []
    for reading in (reading for pair in comparison.pairs for reading in pair):
        counts = {layer: len(overlaps) for layer, overlaps in _first_overlap(reading.run.folder).items()}
        for event in (event for event in reading.events if event["event"] == "drop"):
            dropped = {layer: len(event["dropped"].get(layer, [])) for layer in counts}
            for layer, filters in counts.items():
                lines.append((reading.run.arm, event["cycle"], layer, 100 * dropped[layer] / filters))
    if not lines:
        return ""
    shares = pd.DataFrame(lines, columns=["arm", "cycle", "layer", "share"])
    layers = list(shares["layer"].unique())
    groups = shares.groupby(["arm", "cycle"])
    with matplotlib.rc_context(_STYLE):
        figure = _new_figure(0.9 + 0.17 * len(layers))
        ax = figure.subplots()
        for place, ((arm, cycle), group) in enumerate(groups):
            colour = COLOURS[comparison.study.arms.index(arm)]
            found = group.groupby("layer")["share"].agg(["mean", "min", "max"])
            rows = [layers.index(layer) + 0.7 * ((place + 0.5) / len(groups) - 0.5) for layer in found.index]
            alpha = 0.4 + 0.6 * (cycle + 1) / (shares["cycle"].max() + 1)
            ax.hlines(rows, found["min"], found["max"], color=colour, linewidth=1.2, alpha=alpha)
            marker = "os^Dv"[cycle % 5]
            ax.plot(found["mean"], rows, marker, color=colour, alpha=alpha, markersize=3.8, markeredgewidth=0)
            if arm == shares["arm"].iloc[0]:
                ax.plot([], [], marker, color="black", alpha=alpha, markersize=3.8, label=f"cycle {cycle + 1}")
        for colour, arm in zip(COLOURS, comparison.study.arms, strict=True):
            if arm in set(shares["arm"]):
                ax.plot([], [], color=colour, linewidth=2.8, label=title(arm))
        ax.set_xlim(left=-1)
        ax.set_xlabel("dropped share of the layer (%)")
        _layer_axis(ax, layers)
        figure.legend(loc="outside upper right", ncols=5 if shares["arm"].nunique() == 1 else 3)
        return _data_uri(figure)


def overlap_figure(comparison: Comparison) -> str:
    """O_f by layer at three moments: bar from the 5th to the 95th percentile of all seeds' filters, thick from the
    25th to the 75th, and the median; "" if no run left snapshots of it."""
    overlaps = _overlaps(comparison)
    if overlaps.empty:
        return ""
    layers = list(overlaps["layer"].unique())
    percentiles = overlaps.groupby(["moment", "arm", "layer"])["overlap"].quantile([0.05, 0.25, 0.5, 0.75, 0.95])
    table = percentiles.unstack().reset_index()
    moments = [moment for moment in _MOMENTS if moment in set(table["moment"])]
    with matplotlib.rc_context(_STYLE):
        figure = _new_figure(0.9 + 0.2 * len(layers))
        axes = figure.subplots(1, len(moments), sharex=True, sharey=True, squeeze=False)[0]
        for ax, moment in zip(axes, moments, strict=True):
            there = table[table["moment"] == moment]
            for colour, offset, arm in zip(COLOURS, (-0.18, 0.18), comparison.study.arms, strict=True):
                one = there[there["arm"] == arm]
                rows = [layers.index(layer) + (offset if there["arm"].nunique() > 1 else 0) for layer in one["layer"]]
                ax.hlines(rows, one[0.05], one[0.95], color=colour, linewidth=0.9)
                ax.hlines(rows, one[0.25], one[0.75], color=colour, linewidth=2.8, label=title(arm))
                ax.plot(one[0.5], rows, "|", color="black", markersize=4.5, markeredgewidth=1.1)
            ax.set_title(moment)
            ax.locator_params(axis="x", nbins=4)
            _layer_axis(ax, layers)
        axes[len(axes) // 2].set_xlabel("O_f, mean |cosine| to the other filters of the layer")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        return _data_uri(figure)


def _draw_difference(ax: Axes, results: dict[str, Any]) -> None:
    """A dot a seed, the mean with its interval, and a band of what these seeds could hardly have shown."""
    difference = results["metrics"]["AP"]["difference"]
    size = results["power"]["detectable"]
    if math.isfinite(size):
        ax.axhspan(-size, size, color="#efe9dd", linewidth=0)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.plot([0] * len(difference["values"]), difference["values"], "o", color="#6c7076", markersize=4)
    ax.vlines([1], [difference["low"]], [difference["high"]], color=COLOURS[1], linewidth=1.8)
    ax.plot([1], [difference["mean"]], "D", color=COLOURS[1], markersize=5)
    ax.set_title("difference in AP")
    ax.set_xticks([0, 1], ["seeds", "mean"])
    ax.set_xlim(-0.6, 1.6)
    ax.grid(axis="y")


def _layer_axis(ax: Axes, layers: list[str]) -> None:
    """Layers down, named without the modules that all of them share."""
    parts = [name.split(".") for name in layers]
    shared = len(os.path.commonprefix([p[:-1] for p in parts])) if len(parts) > 1 else 0  # noqa: RUF071 (of lists)
    ax.set_yticks(range(len(layers)), [".".join(p[shared:]) for p in parts])
    ax.set_ylim(len(layers) - 0.5, -0.5)
    ax.grid()


def _overlaps(comparison: Comparison) -> pd.DataFrame:
    """Moment, arm, layer and O_f, a line a filter."""
    folders = [(reading.run.arm, reading.run.folder) for pair in comparison.pairs for reading in pair]
    layers = list(dict.fromkeys(layer for _, folder in folders for layer in _first_overlap(folder)))
    lines = []
    for arm, folder in folders:
        snapshots = [(line.get("event"), line["overlap"]) for line in read_overlaps(folder)]
        drops = [overlap for event, overlap in snapshots if event == "drop"][:1]
        restores = [overlap for event, overlap in snapshots if event == "restore"][-1:]
        for moment, found in zip(_MOMENTS, (drops, restores, [_final_overlap(folder, layers)]), strict=True):
            lines += [(moment, arm, layer, values) for overlap in found for layer, values in overlap.items()]
    table = pd.DataFrame(lines, columns=["moment", "arm", "layer", "overlap"])
    return table.explode("overlap").astype({"overlap": float})


def _first_overlap(folder: Path) -> dict[str, list[float]]:
    """Layer -> O_f of its filters, in network order, of the layers that RePr applies to; {} without snapshots."""
    return next((line["overlap"] for line in read_overlaps(folder)), {})


def _final_overlap(folder: Path, layers: list[str]) -> dict[str, list[float]]:
    """{} for a run without model_final.pth, or with one that is damaged."""
    try:
        model = torch.load(folder / FINAL_CHECKPOINT, map_location="cpu", weights_only=True, mmap=True)["model"]
        weights = {layer: model[f"{layer}.weight"] for layer in layers if f"{layer}.weight" in model}
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError):
        return {}
    return {layer: inter_filter_orthogonality(weight.float()).tolist() for layer, weight in weights.items()}


def _new_figure(height: float) -> Figure:
    """No pyplot, so no global state and no display."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _data_uri(figure: Figure) -> str:
    text = io.BytesIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(text.getvalue()).decode()
