"""report.html: one self-contained page, verdict first; works without scripts and without a network."""

import importlib
import os
import platform
from pathlib import Path
from typing import Any

import jinja2
import torch

from repr_det.commands.data_checks import check_datasets
from repr_det.method.errors import UserError
from repr_det.runs.files import write_atomically
from repr_det.runs.record import CONFIG_FILE
from repr_det.studies.comparison.figures import COLOURS, SCORE_THRESHOLD, all_figures, pictures
from repr_det.studies.comparison.records import read_config, read_settings
from repr_det.studies.comparison.runs import FREE_WITHIN_REPR, differing_keys, title
from repr_det.studies.comparison.table import Comparison, heads, lines_of

REPORT_FILE = "report.html"
_TABLES = {"": "metrics", "During training": "training", "AP by class": "classes"}
_PACKAGES = ("repr_det", "torch", "detectron2", "numpy", "scipy", "pandas", "matplotlib")


def write_report(comparison: Comparison, settings: dict[str, Any], output: Path, images: int) -> Path:
    """Writes report.html in ``output``, and returns its path.

    Args:
        settings: how the comparison was asked for, see ``command``.
        images: validation images with detections.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("repr_det.studies.comparison", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    study, results = comparison.study, comparison.results
    folders = [comparison.readings[arm][0].run.folder for arm in study.arms]
    configs = [read_settings(folder) for folder in folders]
    differing = differing_keys(*configs, free=FREE_WITHIN_REPR)
    page = environment.get_template("report.html.j2").render(
        pictures=_pictures(comparison, folders[0], images),  # first: it may add a note to the results
        results=results,
        settings=settings,
        arms=study.arms,
        titles=[title(arm) for arm in study.arms],
        versus=f"{title(study.arms[1])} against {title(study.arms[0])}",
        colours=COLOURS,
        iterations=study.runs[0].max_iter,
        tables={heading: lines_of(results[key], study.arms) for heading, key in _TABLES.items()},
        heads=heads(study.arms),
        figures=all_figures(comparison),
        threshold=SCORE_THRESHOLD,
        differences={key: [config.get(key, "absent") for config in configs] for key in differing},
        configs=[(folder / CONFIG_FILE).read_text(encoding="utf-8") for folder in folders],
        versions=_versions(),
    )
    path = output / REPORT_FILE
    write_atomically(path, page)
    return path


def _pictures(comparison: Comparison, folder: Path, images: int) -> dict[str, str]:
    try:
        if images:
            check_datasets(read_config(folder), eval_only=True)
            return pictures(comparison, images)
    except UserError as error:
        comparison.results["notes"].append(f"No pictures of detections: {error}.")
    return {}


def _versions() -> str:
    versions = [f"{package} {importlib.import_module(package).__version__}" for package in _PACKAGES]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = [f"Python {platform.python_version()}", platform.platform(), f"{os.cpu_count()} cores"]
    return ", ".join([*versions, *machine, *(gpus or ["no GPU"])])
