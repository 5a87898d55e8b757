"""One numbering of the classes for all data sets of a run: classes are compared, and mapped, by name."""

import itertools
from collections.abc import Iterable, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from repr_det.datasets.causes import other_spelling
from repr_det.datasets.findings import listed
from repr_det.datasets.registered import log_mapping, own_classes
from repr_det.method.errors import UserError


def agree_on_classes(
    train: Sequence[str], test: Sequence[str] = (), reference: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Gives all data sets of a run one numbering of the classes.

    A data set that lists a subset of the classes, or numbers them otherwise, is mapped by name: its objects get the
    numbers of the reference when it is loaded, and it is evaluated on the classes that it lists (`CocoEvaluator`). That
    is possible where `register_coco_format` registered it; data registered by others must number them alike.

    Args:
        train, test: registered data sets, those of DATASETS.TRAIN and DATASETS.TEST; not both empty.
        reference: the classes in the order of the model's outputs, where a checkpoint settles them; otherwise those of
            the training set that has most, the first of equals (without training sets, of the test sets).

    Returns:
        the reference.

    Raises:
        UserError: a data set has classes that the reference lacks, naming both lists, or cannot be mapped.
    """
    own = {name: own_classes(name) for name in (*train, *test)}
    source = "those of the checkpoint"
    if reference is None:
        largest = max(train or test, key=lambda name: len(own[name]))
        source, reference = f"those of {largest}", own[largest]
    reference = tuple(reference)
    for name, classes in own.items():
        missing = [class_name for class_name in classes if class_name not in reference]
        if missing:
            hint = other_spelling(missing[0], reference)
            raise UserError(
                f"data set {name} has the classes {listed(classes, 20)}, which cannot be mapped by name to {source}, "
                f"{listed(reference, 20)}: {listed(map(repr, missing))} is missing there"
                + (f" ({hint})" if hint else "")
            )
        metadata = MetadataCatalog.get(name)
        if metadata.get("own_classes"):
            _number(name, reference)
        elif classes != reference:
            raise UserError(
                f"data set {name} numbers the classes {listed(classes, 20)}, and {source} are {listed(reference, 20)}: "
                "register it with --register (or repr_det.datasets.register_coco_format), which maps them by name"
            )
    return reference


def _number(name: str, reference: tuple[str, ...]) -> None:
    if tuple(MetadataCatalog.get(name).thing_classes) == reference:
        log_mapping(name)
        return
    values = MetadataCatalog.pop(name).as_dict()  # a key of Metadata cannot be set to another value
    numbers = {values["own_classes"][c]: i for i, c in enumerate(reference) if c in values["own_classes"]}
    values |= {"thing_classes": list(reference), "thing_dataset_id_to_contiguous_id": numbers}
    MetadataCatalog.get(name).set(**values)
    log_mapping(name)


def any_mapped(data_sets: Iterable[Sequence[str]]) -> bool:
    """Tell whether `register_coco_format` registered any of the names in these lists, so that it can be mapped.

    Raises:
        UserError: a name stands in place of a list of names.
    """
    data_sets = [*data_sets]
    for names in data_sets:
        if isinstance(names, str):
            raise UserError(f"data sets must be a tuple of names, ({names!r},), got {names!r}")
    names = itertools.chain.from_iterable(data_sets)
    return any(MetadataCatalog.get(name).get("own_classes") for name in names if name in DatasetCatalog)
