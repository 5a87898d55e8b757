"""report.html: one self-contained page, verdict first, without scripts and network."""

import base64
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from repr_det.commands.checks import model_of_shapes
from repr_det.datasets import check_registered
from repr_det.detectron.engine import Trainer
from repr_det.method.errors import UserError
from repr_det.method.orthogonality import inter_filter_orthogonality
from repr_det.runs.files import EVENTS_FILE, FINAL_CHECKPOINT, OVERLAPS_FILE, read_json_lines, write_atomically
from repr_det.runs.safe_pickle import load_checkpoint
from repr_det.studies.comparison.records import (
    FREE_WITHIN_ARM,
    Comparison,
    Run,
    Study,
    differing_keys,
    lines_of,
    read_config,
    read_json,
    read_settings,
    title,
)

_COLOURS = ("#2c6aa0", "#d5622a")  # of the reference and of the other arm, as in the page
_SCORE_THRESHOLD = 0.5
_DROPPED = "Share of each layer that a drop took, in percent, over all drops and seeds"
_OVERLAP = "Inter-filter orthogonality O_f in the final models: 0 for filters orthogonal to all others"
_WIDTH = 7.2  # inches
_STYLE = {
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dcdad4",
    "legend.frameon": False,
}


def write_report(comparison: Comparison, settings: dict[str, Any], output: Path, images: int) -> Path:
    """Writes report.html with pictures of some ``images``; ``settings`` are the request."""
    study, results = comparison.study, comparison.results
    firsts = [study.of(arm)[0] for arm in study.arms]
    configs = [read_settings(run.folder) for run in firsts]
    differing = differing_keys(*configs, free=FREE_WITHIN_ARM)
    classes = {f"AP of {name}": row for name, row in results["classes"].items()}
    loader = jinja2.PackageLoader("repr_det.studies.comparison", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    filters = filter_values(study, results["notes"])
    with matplotlib.rc_context(_STYLE):
        pictures = _pictures(firsts, results, images)  # may add a note to the results
        page = environment.get_template("report.html.j2").render(
            pictures=pictures,
            results=results,
            settings=settings,
            titles=[title(arm) for arm in study.arms],
            iterations=study.runs[0].max_iter,
            lines=lines_of(results["metrics"] | classes, study.arms),
            ap=_ap(comparison),
            filters={caption: _by_layer(study.arms, lines) for caption, lines in filters.items()},
            differences={key: [config.get(key, "absent") for config in configs] for key in differing},
        )
    write_atomically(output / "report.html", page)
    return output / "report.html"


def _pictures(runs: Sequence[Run], results: dict[str, Any], number: int) -> list[tuple[str, str]]:
    """Names with truth and detections, on images spread evenly over the data set."""
    files = [run.folder / "inference" / "coco_instances_results.json" for run in runs]
    if not number or not all(file.is_file() for file in files):
        return []
    try:
        check_registered(results["dataset"], for_evaluation=False)
    except UserError as error:
        results["notes"].append(f"No pictures of detections: {error}.")
        return []
    metadata = MetadataCatalog.get(results["dataset"])
    to_class = getattr(metadata, "thing_dataset_id_to_contiguous_id", {})
    detections = [_detections(file, to_class) for file in files]
    images = [image for image in DatasetCatalog.get(results["dataset"]) if image.get("annotations")]
    places = np.linspace(0, len(images) - 1, min(number, len(images))).round().astype(int)
    drawn = []
    for entry in [images[place] for place in np.unique(places)]:
        panels = {"ground truth": entry["annotations"]}
        for run, found in zip(runs, detections, strict=True):
            panels[f"{title(run.arm)}, score ≥ {_SCORE_THRESHOLD}"] = found.get(entry["image_id"], [])
        path = entry["file_name"]
        drawn.append((os.path.basename(path), _picture(path, panels, metadata.thing_classes)))
    return drawn


def _detections(file: Path, to_class: dict[int, int]) -> dict[int, list[dict[str, Any]]]:
    found = {}
    for one in read_json(file):
        if one["score"] >= _SCORE_THRESHOLD:
            category = to_class.get(one["category_id"], one["category_id"])
            box = {"bbox": one["bbox"], "bbox_mode": BoxMode.XYWH_ABS, "category_id": category}
            found.setdefault(one["image_id"], []).append(box)
    return found


def _picture(path: str, panels: dict[str, list[dict[str, Any]]], classes: Sequence[str]) -> str:
    image = read_image(path, "RGB")
    height = _WIDTH / len(panels) * image.shape[0] / image.shape[1] + 0.25
    figure = Figure(figsize=(_WIDTH, height), layout="constrained", dpi=150, facecolor="#fdfcfa")
    axes = figure.subplots(1, len(panels))
    for ax, colour, (name, boxes) in zip(axes, ("#b58900", *_COLOURS), panels.items(), strict=True):
        ax.imshow(image)
        ax.set_axis_off()
        ax.set_title(name, color=colour)
        for box in boxes:
            x0, y0, x1, y1 = BoxMode.convert(box["bbox"], box["bbox_mode"], BoxMode.XYXY_ABS)
            ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour))
            shade = {"facecolor": colour, "edgecolor": "none", "pad": 0.5}
            ax.text(x0, y0, classes[box["category_id"]], color="white", fontsize=6, bbox=shade, clip_on=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a class name
        return _data_uri(figure, "jpeg")


def _ap(comparison: Comparison) -> str:
    figure = Figure(figsize=(_WIDTH, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 3))
    difference = comparison.results["metrics"]["AP"]["difference"]
    if size := comparison.results["power"]["detectable"]:
        left.axhspan(-size, size, color="#efe9dd", linewidth=0)
    left.axhline(0, color="black", linewidth=0.8)
    left.plot([0] * len(difference["values"]), difference["values"], "o", color="#6c7076")
    left.vlines([1], [difference["low"]], [difference["high"]], color=_COLOURS[1])
    left.plot([1], [difference["mean"]], "D", color=_COLOURS[1])
    left.set_title("difference in AP")
    left.set_xticks([0, 1], ["seeds", "mean"])
    left.set_xlim(-0.6, 1.6)
    for colour, arm in zip(_COLOURS, comparison.study.arms, strict=True):
        first = comparison.study.of(arm)[0]
        for start, stop in phases(read_json_lines(first.folder / EVENTS_FILE), first.max_iter):
            right.axvspan(start, stop, color=colour, alpha=0.13, linewidth=0)
        curves = comparison.curves[arm]
        right.plot(curves, color=colour, linewidth=0.7, alpha=0.5)
        right.plot(curves.dropna().mean(axis=1), "o-", color=colour, markersize=3, label=title(arm))
    right.set_title("validation AP")
    right.set_xlabel("iterations")
    right.set_xlim(left=0)
    figure.legend(loc="outside upper right", ncols=2)
    return _data_uri(figure, "svg")


def phases(events: Sequence[dict[str, Any]], max_iter: int) -> list[tuple[int, int]]:
    """[first, end) iterations of the sub-network, one a cycle."""
    starts = [event["iteration"] + 1 for event in events if event["event"] == "drop"]
    ends = [event["iteration"] + 1 for event in events if event["event"] == "restore"]
    return list(zip(starts, [*ends, max_iter], strict=False))


def filter_values(study: Study, notes: list[str]) -> dict[str, list[tuple[str, str, float]]]:
    """Caption -> lines (arm, layer, value); what cannot be found is added to the notes."""
    sizes = {}  # run -> layer -> its filters
    for run in study.runs:
        overlaps = read_json_lines(run.folder / OVERLAPS_FILE)
        sizes[run] = {layer: len(values) for layer, values in overlaps[0]["overlap"].items()} if overlaps else {}
    layers = list(dict.fromkeys(layer for found in sizes.values() for layer in found))
    groups = {arm: {} for arm in study.arms}  # arm -> layer -> groups of its conv
    for run in (study.of(arm)[0] for arm in study.arms if layers):
        try:
            modules = model_of_shapes(read_config(run.folder), Trainer, eval_only=True).named_modules()
            groups[run.arm] = {name: module.groups for name, module in modules if isinstance(module, nn.Conv2d)}
        except UserError as error:  # a model of the user's own code
            notes.append(f"No O_f of {title(run.arm)}: {error}.")
    dropped, overlap = [], []
    for run in study.runs:
        events = read_json_lines(run.folder / EVENTS_FILE)
        drops = [event["dropped"] for event in events if event["event"] == "drop"]
        for layer, size in sizes[run].items():
            dropped += [(run.arm, layer, 100 * len(drop.get(layer, ())) / size) for drop in drops]
        path = run.folder / FINAL_CHECKPOINT
        model = load_checkpoint(path)["model"] if groups[run.arm] and path.is_file() else {}
        for layer in layers:
            if layer in groups[run.arm] and f"{layer}.weight" in model:
                found = inter_filter_orthogonality(model[f"{layer}.weight"].float(), groups[run.arm][layer])
                overlap += [(run.arm, layer, value) for value in found.tolist()]
    return {_DROPPED: dropped, _OVERLAP: overlap}


def _by_layer(arms: Sequence[str], lines: Sequence[tuple[str, str, float]]) -> str:
    """Draws the 5th to the 95th percentile and the median of lines (arm, layer, value)."""
    if not lines:
        return ""
    values = pd.DataFrame(lines, columns=["arm", "layer", "value"])
    layers = list(values["layer"].unique())
    shared = os.path.commonprefix(layers).rpartition(".")[0] if len(layers) > 1 else ""  # noqa: RUF071 (dots)
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.18 * len(layers)), layout="constrained")
    ax = figure.subplots()
    for colour, offset, arm in zip(_COLOURS, (-0.18, 0.18), arms, strict=True):
        of_arm = values[values["arm"] == arm]
        if len(of_arm):
            found = of_arm.groupby("layer")["value"].quantile([0.05, 0.5, 0.95]).unstack().reindex(layers)
            rows = np.arange(len(layers)) + offset
            ax.hlines(rows, found[0.05], found[0.95], color=colour, label=title(arm))
            ax.plot(found[0.5], rows, "|", color=colour, markersize=7)
    ax.set_yticks(range(len(layers)), [name.removeprefix(f"{shared}.") for name in layers])
    ax.set_ylim(len(layers) - 0.5, -0.5)
    figure.legend(loc="outside upper right", ncols=2)
    return _data_uri(figure, "svg")


def _data_uri(figure: Figure, kind: str) -> str:
    content = io.BytesIO()
    figure.savefig(content, format=kind, transparent=kind == "svg")
    mime = "svg+xml" if kind == "svg" else kind
    return f"data:image/{mime};base64," + base64.b64encode(content.getvalue()).decode()
