"""A run in Weights & Biases."""

import importlib
import uuid
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from repr_det.method.errors import UserError
from repr_det.runs.files import EVENTS_FILE, OVERLAPS_FILE, read_json_lines, write_atomically

_ID_FILE = "wandb_id.txt"
_SENT_FILE = "wandb_sent.txt"  # iteration of the last transition in the run


class WandbWriter(EventWriter):
    """Logs config, scalars, and every drop and restore once, with a histogram of the filters' overlap.

    Unlike ``sync_tensorboard`` it loses no transition of a killed run and repeats none of a resumed one. A resumed run
    resumes that of its OUTPUT_DIR. Add the writer in ``build_writers``.

    Args:
        window_size: smoothed scalars are the median of so many.
        options: of ``wandb.init``: project, name, mode="offline", ...

    Raises:
        UserError: wandb is not installed, or cannot begin, such as without a login.
    """

    def __init__(self, cfg: CfgNode, window_size: int = 20, **options: Any) -> None:
        self._wandb = wandb = wandb_module()
        self._folder = Path(cfg.OUTPUT_DIR)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._window_size = window_size
        self._last_write = -1
        run_id = self._read(_ID_FILE) or uuid.uuid4().hex
        write_atomically(self._folder / _ID_FILE, run_id)
        options |= {"id": run_id, "resume": "allow", "config": yaml.safe_load(cfg.dump()), "dir": cfg.OUTPUT_DIR}
        try:
            self._run = wandb.init(**options)
        except wandb.Error as error:  # not logged in, no connection, no such project
            raise UserError(f"Weights & Biases: {error} WANDB_MODE=offline keeps everything on disk.") from error

    def write(self) -> None:
        storage = get_event_storage()
        latest = storage.latest_with_smoothing_hint(self._window_size)
        scalars = {name: value for name, (value, iteration) in latest.items() if iteration > self._last_write}
        self._last_write = max((iteration for _, iteration in latest.values()), default=self._last_write)
        sent = int(self._read(_SENT_FILE) or -1)
        events, overlaps = (read_json_lines(self._folder / name) for name in (EVENTS_FILE, OVERLAPS_FILE))
        for event, overlap in zip(events, overlaps, strict=False):
            if event["iteration"] > sent:
                self._log_transition(event, overlap["overlap"])
        if scalars:
            self._run.log(scalars, step=storage.iter)

    def _log_transition(self, event: dict[str, Any], overlap: dict[str, list[float]]) -> None:
        values = {
            "iteration": event["iteration"],
            "filters": sum(map(len, event["dropped"].values())),
            "overlap_before": event["overlap_before"],
            "overlap_after": event["overlap_after"],
            "overlap": self._wandb.Histogram(list(chain(*overlap.values()))),
        }
        named = {f"repr/{event['event']}_{name}": value for name, value in values.items()}
        self._run.log(named, step=event["iteration"])
        write_atomically(self._folder / _SENT_FILE, str(event["iteration"]))

    def close(self) -> None:
        self._run.finish()

    def _read(self, name: str) -> str:
        file = self._folder / name
        return file.read_text() if file.exists() else ""


def wandb_module() -> ModuleType:
    """Imports wandb; raises UserError if it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError("Weights & Biases needs wandb: pip install 'repr_det[wandb]'") from error
