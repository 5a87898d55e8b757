"""Whether runs were trained and evaluated on the same data: what their records say, and what is registered here."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog

from repr_det.method.errors import UserError
from repr_det.runs.record import DATA_FILE, describe_data_sets


def check_same_data(folders: Iterable[Path]) -> None:
    """A name stands for one content in all runs, also in the part of a run before it was resumed with other data, and
    in this process. Runs of versions that kept no record are taken as they are.

    Raises:
        UserError: naming both files.
    """
    first: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        for name, entry in _records(folder):
            other, known = first.setdefault(name, (folder, entry))
            if _content(entry) != _content(known):
                raise UserError(
                    f"{other} and {folder} cannot be compared: {name} was {known.get('file')} in the first and "
                    f"{entry.get('file')}, with other content, in the second"
                )
    registered = [name for name in first if name in DatasetCatalog]
    for name, here in describe_data_sets(registered).items():
        folder, known = first[name]
        if _content(here) != _content(known):
            raise UserError(
                f"{name} is {here['file']} here and was {known.get('file')}, with other content, for {folder}: give "
                "--register the file of the runs"
            )


def _records(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(name, description) of what the run was trained on at any time; a record that is damaged tells nothing."""
    found = []
    for path in sorted(folder.glob(f"{Path(DATA_FILE).stem}*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            found += [(name, entry) for name, entry in record.items() if isinstance(entry, dict)]
    return found


def _content(entry: dict[str, Any]) -> Any:
    return entry.get("sha256") or (entry.get("classes"), entry.get("images"))
