"""What a run leaves in its folder: metrics.json, repr_events.jsonl, log.txt, config.yaml, checkpoints."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from repr_det.detectron.config import add_repr_config, as_user_error, scale_to_world
from repr_det.method.errors import UserError
from repr_det.runs.files import EVENTS_FILE, METRICS_FILE, OVERLAPS_FILE


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one json object a line; lines that a crash cut short are left out, no file is []."""
    if not path.is_file():
        return []
    found = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
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


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml as nested dicts.

    Raises:
        UserError: it is missing or not a mapping.
    """
    path = folder / "config.yaml"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the OUTPUT_DIR of a run")
    if not path.is_file():
        raise UserError(f"{path} is missing: {folder} does not hold a Detectron2 run")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds {type(config).__name__}, not the keys of a config")
    return config


def read_settings(folder: Path, as_given: bool = False) -> dict[str, Any]:
    """``read_config``, flat; keys of REPR that came after the version that trained the run have their defaults.

    Args:
        as_given: not scaled to the number of processes where SOLVER.REFERENCE_WORLD_SIZE asks for it.

    Raises:
        UserError: see ``read_config``, or no log says how many processes trained the run.
    """
    defaults = CfgNode()
    add_repr_config(defaults)
    settings = flatten(defaults) | flatten(read_config(folder))
    reference = settings.get("SOLVER.REFERENCE_WORLD_SIZE") or 0
    if as_given or not reference:
        return settings
    if (processes := read_world_size(folder)) is None:
        raise UserError(
            f"{folder} was trained with SOLVER.REFERENCE_WORLD_SIZE {reference}, but no log.txt in it says by how many "
            "processes, on which its SOLVER.MAX_ITER depends"
        )
    cfg = get_cfg()
    add_repr_config(cfg)
    with as_user_error(f"{folder}/config.yaml"):
        cfg.merge_from_other_cfg(CfgNode(read_config(folder)))
    cfg.freeze()
    return settings | flatten(yaml.safe_load(scale_to_world(cfg, processes).dump()))


def read_world_size(folder: Path) -> int | None:
    """The processes that trained the run last, by its log.txt; None where it does not say."""
    path = folder / "log.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.findall(r"Rank of current process: \d+\. World size: (\d+)", text)
    return int(found[-1]) if found else None


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"SOLVER": {"MAX_ITER": 1}} -> {"SOLVER.MAX_ITER": 1}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def checkpoints(folder: Path) -> dict[int, Path]:
    """Iterations trained -> checkpoint; model_final.pth is not among them."""
    found = {}
    for path in folder.glob("model_*.pth"):
        if match := re.fullmatch(r"model_(\d+)\.pth", path.name):
            found[int(match.group(1)) + 1] = path
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class WallClock:
    """Seconds of a run by its log: all of it (interruptions left out), and the evaluations."""

    total: float
    evaluation: float


def read_wall_clock(folder: Path) -> WallClock | None:
    """None where log.txt is missing or has no time stamps. Its stamps are whole seconds."""
    total = evaluation = 0.0
    first = last = began = None
    for stamp, text in _log_lines(folder / "log.txt"):
        if "Rank of current process" in text and first is not None:
            total += (last - first).total_seconds()
            first = began = None
        first = first or stamp
        last = stamp
        if "Start inference on" in text:
            began = stamp
        elif began is not None and "copypaste: AP" in text:
            evaluation += (stamp - began).total_seconds()
            began = None
    if first is None:
        return None
    return WallClock(total + (last - first).total_seconds(), evaluation)


def _log_lines(path: Path) -> Iterator[tuple[datetime, str]]:
    """Time and text of the lines that carry a stamp like [11/24 21:58:45]; the year is that of the file."""
    if not path.is_file():
        return
    written = datetime.fromtimestamp(path.stat().st_mtime)
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            match = re.match(r"\[(\d\d/\d\d \d\d:\d\d:\d\d)\]", line)
            if not match:
                continue
            try:
                stamp = datetime.strptime(f"{written.year}/{match.group(1)}", "%Y/%m/%d %H:%M:%S")
                if stamp > written + timedelta(days=1):
                    stamp = stamp.replace(year=written.year - 1)
            except ValueError:
                continue
            yield stamp, line[match.end() :]
