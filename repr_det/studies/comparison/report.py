"""report.html: one self-contained page, verdict first; works without scripts and without a network."""

import html
import math
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import repr_det
from repr_det.runs.files import write_atomically
from repr_det.studies.comparison import figures
from repr_det.studies.comparison.gallery import SCORE_THRESHOLD, gallery
from repr_det.studies.comparison.matches import METRICS
from repr_det.studies.comparison.overlaps import Moment, filter_counts, overlap_moments
from repr_det.studies.comparison.records import read_settings
from repr_det.studies.comparison.results import Comparison
from repr_det.studies.comparison.runner import available_cores
from repr_det.studies.comparison.runs import ARM_NAMES, BASELINE, REPR
from repr_det.studies.comparison.statistics import BETTER, OPEN, WORSE
from repr_det.studies.comparison.timing import PHASES, TRANSITIONS, sub_network_phases

REPORT_FILE = "report.html"
_SETTINGS = (
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.BASE_LR",
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.OPTIMIZER",
    "INPUT.MIN_SIZE_TRAIN",
    "INPUT.MIN_SIZE_TEST",
    "MODEL.META_ARCHITECTURE",
    "MODEL.BACKBONE.NAME",
    "MODEL.RESNETS.DEPTH",
    "MODEL.RESNETS.NORM",
    "MODEL.BACKBONE.FREEZE_AT",
    "MODEL.WEIGHTS",
    "TEST.EVAL_PERIOD",
)
_PACKAGES = ("torch", "torchvision", "detectron2", "numpy", "scipy", "pycocotools", "opencv-python", "matplotlib")
_TRAINING_ROWS = {
    "final": "Validation AP at the end",
    "best": "Best validation AP over training",
    "lost": "Best minus final",
    "train": "AP on training images",
    "gap": "Train/val gap (AP)",
    "final_loss": "Training loss at the end",
}


def write_report(comparison: Comparison, settings: dict[str, Any], output: Path, images: int) -> Path:
    """Renders report.html in ``output``.

    Args:
        settings: how the comparison was asked for, see ``command``.
        images: validation images in the gallery.

    Returns:
        The file.
    """
    path = output / REPORT_FILE
    write_atomically(path, render(comparison, settings, images))
    return path


def render(comparison: Comparison, settings: dict[str, Any], images: int) -> str:
    """The page as text, see ``write_report``."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("repr_det.studies.comparison", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(number=_number, signed=_signed, interval=_interval, minus=_minus, duration=_duration)
    first, other = comparison.pairs[0]
    config = read_settings(first.run.folder)
    repr_config = read_settings(other.run.folder)
    results = comparison.results
    counts = filter_counts(comparison.pairs)
    moments = overlap_moments(comparison.pairs, list(counts))
    page = environment.get_template("report.html.j2").render(
        results=results,
        settings=settings,
        title=Path(settings["config_file"]).stem if settings.get("config_file") else results["dataset"],
        verdict=results["metrics"]["AP"]["difference"]["verdict"],
        verdict_class={BETTER: "better", WORSE: "worse", OPEN: "open"}.get(
            results["metrics"]["AP"]["difference"]["verdict"], "open"
        ),
        metrics=METRICS,
        arms=ARM_NAMES,
        baseline=BASELINE,
        repr=REPR,
        iterations=first.run.max_iter,
        training_rows={key: title for key, title in _TRAINING_ROWS.items() if key in results["training"]},
        phases=PHASES,
        transitions=TRANSITIONS,
        events=other.events,
        sub_phases=sub_network_phases(other.events, other.run.max_iter),
        figures={name: Markup(svg) for name, svg in _figures(comparison, counts, moments).items()},
        pictures=_gallery(comparison, images),
        threshold=SCORE_THRESHOLD,
        moment_titles=[moment.title for moment in moments],
        baseline_checkpoint=next((m.iterations[BASELINE] for m in moments if BASELINE in m.iterations), None),
        common={key: config[key] for key in _SETTINGS if key in config},
        repr_settings={key: value for key, value in repr_config.items() if key.startswith("REPR.")},
        versions=_versions(),
    )
    return re.sub(r"\n\s*\n+", "\n", page) + "\n"


def _figures(comparison: Comparison, counts: dict[str, int], moments: list[Moment]) -> dict[str, str]:
    pairs, results = comparison.pairs, comparison.results
    found = {
        "differences": figures.differences(results["metrics"]),
        "curves": figures.curves(pairs),
        "time": figures.wall_clock(results["time"]),
    }
    if counts and any(event["event"] == "drop" for event in pairs[0][1].events):
        found["on_off"] = figures.on_off_map(pairs[0][1], counts)
        found["share"] = figures.dropped_share(pairs, counts)
    if moments:
        found["overlap"] = figures.overlap_distributions(list(counts), moments)
    return found


def _gallery(comparison: Comparison, images: int) -> list[Any]:
    base, other = comparison.pairs[0]
    if comparison.truth is None or base.detections is None or other.detections is None or not images:
        return []
    arms = [(ARM_NAMES[BASELINE], base.detections), (ARM_NAMES[REPR], other.detections)]
    return gallery(comparison.truth, comparison.results["dataset"], arms, images)


def _versions() -> dict[str, str]:
    found = {"repr_det": repr_det.__version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            module = __import__(package) if package == "detectron2" else None
            if module is not None:
                found[package] = module.__version__
    found["machine"] = f"{_processor()}, {available_cores()} of {os.cpu_count()} cores, {platform.system()}"
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([names[0] if names else platform.machine(), *dict.fromkeys(gpus)])


def _number(value: float | None, digits: int = 1) -> Markup:
    if value is None or not math.isfinite(value):
        return Markup('<span class="na">n/a</span>')
    return Markup(_minus(f"{value:.{digits}f}"))


def _signed(value: float | None, digits: int = 1) -> Markup:
    if value is None or not math.isfinite(value):
        return Markup('<span class="na">n/a</span>')
    return Markup(_minus(f"{value:+.{digits}f}"))


def _interval(difference: dict[str, Any] | None, digits: int = 1) -> Markup:
    if not difference or difference["low"] is None or not math.isfinite(difference["low"]):
        return Markup('<span class="na">n/a</span>')
    return Markup(_minus(f"{difference['low']:+.{digits}f} .. {difference['high']:+.{digits}f}"))


def _minus(text: str) -> str:
    """Hyphens before digits become minus signs. Escapes nothing."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return html.escape(f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s")
