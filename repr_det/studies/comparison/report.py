"""report.html: one self-contained page, verdict first; works without scripts and without a network."""

from pathlib import Path
from typing import Any

import detectron2
import jinja2
import torch

import repr_det
from repr_det.commands.data_checks import check_datasets
from repr_det.method.errors import UserError
from repr_det.runs.files import write_atomically
from repr_det.runs.record import CONFIG_FILE
from repr_det.studies.comparison.figures import SCORE_THRESHOLD, all_figures, pictures
from repr_det.studies.comparison.records import read_config, read_settings
from repr_det.studies.comparison.runs import FREE_WITHIN_REPR, differing_keys, title
from repr_det.studies.comparison.table import Comparison, heads, lines_of

REPORT_FILE = "report.html"


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
    titles = [title(arm) for arm in study.arms]
    page = environment.get_template("report.html.j2").render(
        pictures=_pictures(comparison, folders[0], images),  # first: it may add a note to the results
        results=results,
        settings=settings,
        titles=titles,
        versus=f"{titles[1]} against {titles[0]}",
        iterations=study.runs[0].max_iter,
        tables={"": lines_of(results["metrics"], study.arms), "AP by class": lines_of(results["classes"], study.arms)},
        heads=heads(study.arms),
        figures=all_figures(comparison),
        threshold=SCORE_THRESHOLD,
        differences={key: [config.get(key, "absent") for config in configs] for key in differing},
        configs=[(folder / CONFIG_FILE).read_text(encoding="utf-8") for folder in folders],
        versions=f"repr_det {repr_det.__version__}, Detectron2 {detectron2.__version__}, torch {torch.__version__}",
    )
    path = output / REPORT_FILE
    write_atomically(path, page)
    return path


def _pictures(comparison: Comparison, folder: Path, images: int) -> dict[str, str]:
    if not images:
        return {}
    try:
        check_datasets(read_config(folder), eval_only=True)
    except UserError as error:
        comparison.results["notes"].append(f"No pictures of detections: {error}.")
        return {}
    return pictures(comparison, images)
