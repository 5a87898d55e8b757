"""Files that a run leaves in its folder."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from detectron2.config import CfgNode, get_cfg

from repr_det.commands.config_files import merge_config_file
from repr_det.detectron.config import add_repr_config, scale_to_world
from repr_det.method.errors import UserError
from repr_det.runs.files import EVENTS_FILE, METRICS_FILE
from repr_det.runs.record import CONFIG_FILE

Settings = dict[str, Any]  # a flat config
DETECTIONS_FILE = Path("inference") / "coco_instances_results.json"
_PROCESSES = re.compile(r"Rank of current process: \d+\. World size: (\d+)")


def read_json(path: Path) -> Any:
    """Reads a json file, and refuses one that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of one json object a line, without lines that a crash cut short; [] if there is no file."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def read_metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Iteration -> everything logged for it, in order. A resumed run repeats iterations: the later line counts."""
    rows: dict[int, dict[str, float]] = {}
    for line in read_json_lines(folder / METRICS_FILE):
        rows.setdefault(line["iteration"], {}).update(line)
    return dict(sorted(rows.items()))


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The transitions of a RePr run in order; [] for a baseline."""
    return read_json_lines(folder / EVENTS_FILE)


def read_detections(folder: Path) -> list[dict[str, Any]] | None:
    """The boxes of the last evaluation as COCO results; None if they were not saved."""
    path = folder / DETECTIONS_FILE
    return [one for one in read_json(path) if "bbox" in one] if path.is_file() else None


def read_config(folder: Path) -> CfgNode:
    """The config of a run as it was given; keys of REPR that came after its version have their defaults."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the OUTPUT_DIR of a run")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: {folder} does not hold a Detectron2 run")
    cfg = get_cfg()
    add_repr_config(cfg)
    merge_config_file(cfg, str(path))
    cfg.freeze()
    return cfg


def read_settings(folder: Path) -> Settings:
    """The config of a run, flat, scaled to its number of processes if SOLVER.REFERENCE_WORLD_SIZE asks for it."""
    cfg = read_config(folder)
    if not cfg.SOLVER.REFERENCE_WORLD_SIZE:
        return flatten(cfg)
    log = folder / "log.txt"
    sessions = _PROCESSES.findall(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else []
    if not sessions:
        raise UserError(
            f"{folder} was trained with SOLVER.REFERENCE_WORLD_SIZE {cfg.SOLVER.REFERENCE_WORLD_SIZE}, but no log.txt "
            "in it says by how many processes, on which its SOLVER.MAX_ITER depends"
        )
    return flatten(scale_to_world(cfg, int(sessions[-1])))


def flatten(cfg: CfgNode) -> Settings:
    """SOLVER.MAX_ITER -> its value, as it stands in a yaml file."""
    return pd.json_normalize(yaml.safe_load(cfg.dump())).to_dict("records")[0]
