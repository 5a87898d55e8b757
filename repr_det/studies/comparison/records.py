"""Files that a run leaves in its folder: metrics.json, repr_events.jsonl, repr_overlaps.jsonl, log.txt, config.yaml."""

import functools
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg

from repr_det.commands.config_files import merge_config_file
from repr_det.detectron.config import add_repr_config, scale_to_world
from repr_det.method.errors import UserError
from repr_det.runs.files import EVENTS_FILE, METRICS_FILE, OVERLAPS_FILE

Settings = dict[str, Any]  # a flat config
_STAMPED = re.compile(r"\[(\d\d/\d\d \d\d:\d\d:\d\d)\](.*)")
_YEAR = 366 * 86400.0  # of 2000, since stamps name no year
_SESSION = re.compile(r"Rank of current process: \d+\. World size: (\d+)")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one json object a line; lines that a crash cut short are left out, no file is []."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read_metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Iteration -> everything logged for it, in order. A resumed run repeats iterations: the later line counts."""
    rows: dict[int, dict[str, float]] = {}
    for line in read_json_lines(folder / METRICS_FILE):
        if isinstance(line.get("iteration"), int):
            rows.setdefault(line["iteration"], {}).update(line)
    return dict(sorted(rows.items()))


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The transitions of a RePr run in order; [] for a baseline."""
    return read_json_lines(folder / EVENTS_FILE)


def read_overlaps(folder: Path) -> list[dict[str, Any]]:
    """The O_f snapshots of a RePr run, one before each drop and after each restore: {"iteration", "event", "cycle",
    "overlap": {layer: [O_f of every filter]}}; [] for runs of older versions."""
    return [line for line in read_json_lines(folder / OVERLAPS_FILE) if isinstance(line.get("overlap"), dict)]


def read_config(folder: Path) -> CfgNode:
    """The config of a run as it was given; keys of REPR that came after its version have their defaults."""
    path = folder / "config.yaml"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the OUTPUT_DIR of a run")
    if not path.is_file():
        raise UserError(f"{path} is missing: {folder} does not hold a Detectron2 run")
    return _read_config(str(path), path.stat().st_mtime_ns)


def read_settings(folder: Path) -> Settings:
    """The config of a run, flat, scaled to its number of processes if SOLVER.REFERENCE_WORLD_SIZE asks for it."""
    cfg = read_config(folder)
    if not cfg.SOLVER.REFERENCE_WORLD_SIZE:
        return flatten(cfg)
    sessions = _SESSION.findall(_read_log(folder))
    if not sessions:
        raise UserError(
            f"{folder} was trained with SOLVER.REFERENCE_WORLD_SIZE {cfg.SOLVER.REFERENCE_WORLD_SIZE}, but no log.txt "
            "in it says by how many processes, on which its SOLVER.MAX_ITER depends"
        )
    return flatten(scale_to_world(cfg, int(sessions[-1])))


def flatten(cfg: CfgNode) -> Settings:
    """SOLVER.MAX_ITER -> its value, as it stands in a yaml file."""
    flat = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat.update({f"{key}.{below}": one for below, one in flatten(value).items()})
        else:
            flat[key] = _without_tuples(value)
    return flat


def read_wall_clock(folder: Path) -> tuple[float, float]:
    """Seconds of all sessions of a run and of its evaluations, by the stamps of log.txt; 0 without a log."""
    total = evaluation = 0.0
    last, evaluates = None, False
    for date, message in _STAMPED.findall(_read_log(folder)):
        stamp = datetime.strptime(f"2000/{date}", "%Y/%m/%d %H:%M:%S")
        begins = _SESSION.search(message) is not None
        if last is not None and not begins:
            passed = (stamp - last).total_seconds() % _YEAR
            total += passed
            evaluation += passed if evaluates else 0.0
        if begins or "copypaste: AP" in message:
            evaluates = False
        elif "Start inference on" in message:
            evaluates = True
        last = stamp
    return total, evaluation


@functools.lru_cache(maxsize=256)
def _read_config(path: str, written: int) -> CfgNode:
    """The frozen config in a file that was ``written`` last at that time."""
    cfg = get_cfg()
    add_repr_config(cfg)
    merge_config_file(cfg, path)
    cfg.freeze()
    return cfg


def _without_tuples(value: Any) -> Any:
    return [_without_tuples(one) for one in value] if isinstance(value, (list, tuple)) else value


def _read_log(folder: Path) -> str:
    path = folder / "log.txt"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
