"""The figures of the report, and the pictures with detections, each an image as a data URI."""

import base64
import io
import math
import os
import warnings
from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from repr_det.method.orthogonality import inter_filter_orthogonality
from repr_det.runs.files import FINAL_CHECKPOINT
from repr_det.runs.safe_pickle import load_checkpoint
from repr_det.studies.comparison.runs import title
from repr_det.studies.comparison.table import Comparison

COLOURS = ("#2c6aa0", "#d5622a")  # of the reference and of the other arm, as in the page
SCORE_THRESHOLD = 0.5
_TRUTH_COLOUR = "#b58900"
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
    "axes.grid": True,
    "grid.color": "#dcdad4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "axes.prop_cycle": matplotlib.cycler(color=["#d5622a", "#7a3e9d", "#1f7a47", "#b58900", "#6c7076"]),
}


def all_figures(comparison: Comparison) -> dict[str, str]:
    """The figures "ap", "dropped" and "overlap"; "" if the runs left nothing to draw."""
    with matplotlib.rc_context(_STYLE):
        drawn = {"ap": _ap(comparison), "dropped": _dropped(comparison), "overlap": _overlap(comparison)}
        return {name: _data_uri(figure, "svg") if figure else "" for name, figure in drawn.items()}


def pictures(comparison: Comparison, number: int) -> dict[str, str]:
    """Ground truth and the detections of the first seed side by side, on ``number`` validation images with objects.

    They are spread evenly over the data set: chosen by place, not by result.

    Returns:
        Name of the image -> picture; {} if a run saved no detections.
    """
    dataset = comparison.results["dataset"]
    readings = [comparison.readings[arm][0] for arm in comparison.study.arms]
    if any(reading.detections is None for reading in readings):
        return {}
    metadata = MetadataCatalog.get(dataset)
    to_class = getattr(metadata, "thing_dataset_id_to_contiguous_id", {})
    images = [image for image in DatasetCatalog.get(dataset) if image.get("annotations")]
    drawn = {}
    for place in np.unique(np.linspace(0, len(images) - 1, min(number, len(images))).round().astype(int)):
        entry = images[place]
        truth = [(one["bbox"], one["bbox_mode"], one["category_id"], "") for one in entry["annotations"]]
        panels = [("ground truth", _TRUTH_COLOUR, truth)]
        for colour, reading in zip(COLOURS, readings, strict=True):
            found = []
            for one in reading.detections:
                if one["image_id"] == entry["image_id"] and one["score"] >= SCORE_THRESHOLD:
                    category = to_class.get(one["category_id"], one["category_id"])
                    found.append((one["bbox"], BoxMode.XYWH_ABS, category, f" {one['score']:.2f}"))
            panels.append((title(reading.run.arm), colour, found))
        picture = _picture(read_image(entry["file_name"], "RGB"), panels, metadata.thing_classes)
        drawn[os.path.basename(entry["file_name"])] = picture
    return drawn


def _picture(image: np.ndarray, panels: Sequence[tuple[str, str, list]], classes: Sequence[str]) -> str:
    """The image once a panel (title, colour, boxes); a box is (coordinates, BoxMode, class, score in words)."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a class name
        height = _WIDTH / len(panels) * image.shape[0] / image.shape[1] + 0.25
        figure = Figure(figsize=(_WIDTH, height), layout="constrained", dpi=150, facecolor="#fdfcfa")
        for ax, (name, colour, boxes) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            ax.imshow(image)
            ax.set_axis_off()
            ax.set_title(name, color=colour)
            shade = {"facecolor": colour, "edgecolor": "none", "pad": 0.5}
            for box, mode, category, score in boxes:
                x0, y0, x1, y1 = BoxMode.convert(box, mode, BoxMode.XYXY_ABS)
                ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour))
                ax.text(x0, y0, classes[category] + score, color="white", fontsize=6, bbox=shade, clip_on=True)
        return _data_uri(figure, "jpeg")


def _ap(comparison: Comparison) -> Figure:
    """The difference in AP of every seed with its interval, and the AP of both arms over training."""
    figure = Figure(figsize=(_WIDTH, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 3))
    difference = comparison.results["metrics"]["AP"]["difference"]
    size = comparison.results["power"]["detectable"]
    if math.isfinite(size):
        left.axhspan(-size, size, color="#efe9dd", linewidth=0)
    left.axhline(0, color="black", linewidth=0.8)
    left.plot([0] * len(difference["values"]), difference["values"], "o", color="#6c7076", markersize=4)
    left.vlines([1], [difference["low"]], [difference["high"]], color=COLOURS[1], linewidth=1.8)
    left.plot([1], [difference["mean"]], "D", color=COLOURS[1], markersize=5)
    left.set_title("difference in AP")
    left.set_xticks([0, 1], ["seeds", "mean"])
    left.set_xlim(-0.6, 1.6)
    for colour, arm in zip(COLOURS, comparison.study.arms, strict=True):
        readings = comparison.readings[arm]
        for start, stop in readings[0].phases:
            right.axvspan(start, stop, color=colour, alpha=0.13, linewidth=0)
        curves = pd.DataFrame([reading.curve for reading in readings]).T.sort_index()
        mean = curves.dropna().mean(axis=1)
        right.plot(curves, color=colour, linewidth=0.7, alpha=0.5)
        right.plot(mean, "o-", color=colour, linewidth=1.8, markersize=2.6, label=title(arm))
    right.set_title("validation AP")
    right.set_xlabel("iterations")
    right.set_xlim(0, 1.02 * comparison.study.runs[0].max_iter)
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def _dropped(comparison: Comparison) -> Figure | None:
    """The share of each layer that every drop took, mean over the seeds."""
    lines = []
    for arm, readings in comparison.readings.items():
        counts = {layer: len(overlaps) for layer, overlaps in readings[0].first_overlap.items()}
        for event in [event for reading in readings for event in reading.events if event["event"] == "drop"]:
            for layer, filters in counts.items():
                share = 100 * len(event["dropped"].get(layer, [])) / filters
                lines.append((title(arm), f"cycle {event['cycle'] + 1}", layer, share))
    if not lines:
        return None
    shares = pd.DataFrame(lines, columns=["arm", "cycle", "layer", "share"])
    layers, arms = list(shares["layer"].unique()), list(shares["arm"].unique())
    figure, axes = _layer_panels(layers, arms)
    for ax, arm in zip(axes, arms, strict=True):
        means = shares[shares["arm"] == arm].pivot_table(index="layer", columns="cycle", values="share")
        for number, cycle in enumerate(means):
            rows = np.arange(len(layers)) + 0.25 * (number - (means.shape[1] - 1) / 2)
            ax.plot(means[cycle].reindex(layers), rows, "os^Dv"[number % 5], markersize=3.5, label=cycle)
    figure.supxlabel("dropped share of the layer (%)", fontsize=8.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=5)
    return figure


def _overlap(comparison: Comparison) -> Figure | None:
    """O_f by layer at three moments: from the 5th to the 95th percentile of all seeds' filters, and the median."""
    lines = []
    layers = list(dict.fromkeys(x for arm in comparison.study.arms for x in comparison.readings[arm][0].first_overlap))
    for arm in comparison.study.arms:
        for reading in comparison.readings[arm]:
            restores = [line["overlap"] for line in reading.overlaps if line["event"] == "restore"]
            final = _final_overlap(reading.run.folder / FINAL_CHECKPOINT, layers)
            moments = ([reading.first_overlap], restores[-1:], [final])
            for moment, found in zip(_MOMENTS, moments, strict=True):
                lines += [(moment, arm, layer, values) for one in found for layer, values in one.items()]
    if not lines:
        return None
    overlaps = pd.DataFrame(lines, columns=["moment", "arm", "layer", "overlap"]).explode("overlap")
    moments = [moment for moment in _MOMENTS if moment in set(overlaps["moment"])]
    figure, axes = _layer_panels(layers, moments)
    for ax, moment in zip(axes, moments, strict=True):
        for colour, offset, arm in zip(COLOURS, (-0.18, 0.18), comparison.study.arms, strict=True):
            there = overlaps[(overlaps["moment"] == moment) & (overlaps["arm"] == arm)]
            found = there.astype({"overlap": float}).groupby("layer")["overlap"].quantile([0.05, 0.5, 0.95]).unstack()
            found = found.reindex(layers, columns=[0.05, 0.5, 0.95])
            rows = np.arange(len(layers)) + offset
            ax.hlines(rows, found[0.05], found[0.95], color=colour, linewidth=1.8, label=title(arm))
            ax.plot(found[0.5], rows, "|", color="black", markersize=4.5, markeredgewidth=1.1)
        ax.locator_params(axis="x", nbins=4)
    figure.supxlabel("O_f, mean |cosine| to the other filters of the layer", fontsize=8.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _layer_panels(layers: Sequence[str], titles: Sequence[str]) -> tuple[Figure, Sequence[Axes]]:
    """Panels that share their layers, which go down and are named without the modules that all of them share."""
    titles = list(titles)
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.18 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(titles), sharex=True, sharey=True, squeeze=False)[0]
    shared = os.path.commonprefix(layers).rpartition(".")[0] if len(layers) > 1 else ""  # noqa: RUF071 (dots)
    axes[0].set_yticks(range(len(layers)), [name.removeprefix(f"{shared}.") for name in layers])
    axes[0].set_ylim(len(layers) - 0.5, -0.5)
    for ax, name in zip(axes, titles, strict=True):
        ax.set_title(name)
    return figure, axes


def _final_overlap(path: os.PathLike, layers: Sequence[str]) -> dict[str, list[float]]:
    if not layers or not os.path.isfile(path):
        return {}
    model = load_checkpoint(path)["model"]
    weights = {layer: model[f"{layer}.weight"] for layer in layers if f"{layer}.weight" in model}
    return {layer: inter_filter_orthogonality(weight.float()).tolist() for layer, weight in weights.items()}


def _data_uri(figure: Figure, kind: str) -> str:
    content = io.BytesIO()
    figure.savefig(content, format=kind, transparent=kind == "svg", metadata={"Date": None} if kind == "svg" else None)
    mime = "svg+xml" if kind == "svg" else kind
    return f"data:image/{mime};base64," + base64.b64encode(content.getvalue()).decode()
