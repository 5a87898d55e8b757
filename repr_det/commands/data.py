"""The data sets of a run: those of --register, and one numbering of the classes for all of them."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog

from repr_det.datasets import register_builtin, register_coco_format
from repr_det.datasets.findings import listed
from repr_det.datasets.registered import agree_on_classes, any_mapped, own_classes
from repr_det.method.errors import UserError
from repr_det.runs.record import DATA_FILE

logger = logging.getLogger(__name__)


def register_data(
    register: Sequence[Sequence[str]], train: Sequence[str], test: Sequence[str], eval_only: bool = False
) -> None:
    """Registers the data sets that come with this package, and NAME, JSON, IMAGE_ROOT of --register.

    Raises:
        UserError: a data set is bad, or other data than those of --register would be used.
    """
    register_builtin()
    for entry in register:
        register_coco_format(*entry)
    names = {name for name, *_ in register}
    unused = sorted(names - {*train, *test})
    if unused:
        what = f"--register {unused[0]}: no key names it, the run trains on {listed(train)} and tests on {listed(test)}"
        if names.isdisjoint(test if eval_only else train):
            keys = "DATASETS.TRAIN or DATASETS.TEST (of a LazyConfig dataloader.train or .test, dataset.names)"
            raise UserError(f"{what}: name it in {keys}")
        logger.warning(what)


def classes_of_run(
    train: Sequence[str], test: Sequence[str], eval_only: bool = False, folder: str | Path | None = None
) -> tuple[str, ...] | None:
    """Gives the data sets of a run one numbering of the classes, see ``datasets.agree_on_classes``.

    Args:
        train, test: DATASETS.TRAIN and DATASETS.TEST; unknown names are left to ``data_checks.check_datasets``.
        eval_only: nothing is trained: the classes are those of the checkpoint in ``folder``, as far as they are known.

    Returns:
        the classes in the order of the model's outputs; None if no data set can be mapped.
    """
    train, test = ([name for name in names if name in DatasetCatalog] for names in (train, test))
    if not any_mapped((train, test)):
        return None
    recorded = recorded_classes(folder) if eval_only else None
    if eval_only:
        trained = max(map(own_classes, train), key=len, default=())
        if recorded or not all(set(own_classes(name)) <= set(trained) for name in test):
            train = []
    return agree_on_classes(train, test, recorded) if train or test else None


def recorded_classes(folder: str | Path | None) -> tuple[str, ...] | None:
    """The classes of the run in ``folder`` in the order of its model's outputs; None if it left no record."""
    try:
        known = json.loads((Path(folder) / DATA_FILE).read_text(encoding="utf-8"))
        lists = [tuple(dict.fromkeys(entry["classes"])) for entry in known.values()]
    except (OSError, TypeError, ValueError, KeyError, AttributeError):
        return None
    return max(lists, key=len, default=()) or None  # the record begins with the training sets


def check_same_classes(classes: Sequence[str], folder: str | Path) -> None:
    """Refuses other classes than those of the run in ``folder``, or these in another order."""
    recorded = recorded_classes(folder)
    if recorded not in (None, tuple(classes)):
        raise UserError(
            f"the run in {folder} was trained on the classes {listed(recorded, 20)}, in this order, and the data of "
            f"this one have {listed(classes, 20)}: give the data sets of that run, or another OUTPUT_DIR"
        )
