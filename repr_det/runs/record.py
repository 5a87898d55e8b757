"""The record of a run: config.yaml, the data that it was trained on, and the number of its processes."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm

from repr_det.network.state import preserved_random_state

logger = logging.getLogger("repr_det.resume")
CONFIG_FILE = "config.yaml"
DATA_FILE = "data_sets.json"
PROCESSES_FILE = "processes.json"


@dataclass(eq=False)
class RunRecord(HookBase):
    """Writes the record in ``before_train``; registered last, after every check.

    If a resumed run has another record than before, the old files stay under the last iteration of which they tell,
    such as config_until_0000999.yaml.
    """

    write_config: Callable[[Path], None]  # writes config.yaml, and other files, into a folder

    def before_train(self) -> None:
        cfg, start = self.trainer.cfg, self.trainer.start_iter
        if not comm.is_main_process():
            return
        with tempfile.TemporaryDirectory(dir=cfg.OUTPUT_DIR, prefix=".record-") as new, preserved_random_state():
            self.write_config(Path(new))
            data = {name: describe_data_set(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}
            (Path(new) / DATA_FILE).write_text(json.dumps(data, indent=1), "utf-8")
            (Path(new) / PROCESSES_FILE).write_text(f"{comm.get_world_size()}\n", "utf-8")
            files = {file: Path(cfg.OUTPUT_DIR) / file.name for file in sorted(Path(new).iterdir())}
            there = [(file, place) for file, place in files.items() if start > 0 and place.exists()]
            changed = [place.name for file, place in there if place.read_bytes() != file.read_bytes()]
            if changed:
                what = ", ".join(changed)
                logger.warning("The run so far had another %s: its record is kept as *_until_%07d.*", what, start - 1)
            for file, place in files.items():
                kept = place.with_stem(f"{place.stem}_until_{start - 1:07d}")
                if changed and place.exists() and not kept.exists():  # else what is in place led to no checkpoint
                    os.replace(place, kept)
                os.chmod(file, 0o644)
                os.replace(file, place)


def describe_data_set(name: str) -> dict[str, Any]:
    """File, SHA-256 of its content, folder of images, classes (as the outputs) and number of images of a registered
    data set; None for what is unknown."""
    metadata = MetadataCatalog.get(name)
    path = metadata.get("json_file")
    found = {"file": path, "sha256": None, "image_root": metadata.get("image_root")}
    if path is None or not os.path.isfile(path):
        images = len(DatasetCatalog.get(name))
        return found | {"classes": list(metadata.get("thing_classes", ())), "images": images}
    content = Path(path).read_bytes()
    found["sha256"] = hashlib.sha256(content).hexdigest()
    known = json.loads(content)
    in_file = [category.get("name") for category in sorted(known.get("categories", ()), key=lambda c: c["id"])]
    # LVIS has neither the names of its file nor their order.
    return found | {"classes": list(metadata.get("thing_classes", in_file)), "images": len(known.get("images", ()))}
