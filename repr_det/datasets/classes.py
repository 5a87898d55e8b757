"""One numbering of the classes for all data sets of a run: classes are compared, and mapped, by name."""

from collections.abc import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from repr_det.datasets.findings import listed, spelled_alike
from repr_det.datasets.registered import own_classes
from repr_det.method.errors import UserError


def agree_on_classes(
    train: Sequence[str], test: Sequence[str] = (), reference: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Gives all data sets of a run one numbering of the classes.

    A data set of `register_coco_format` that lists a subset of the classes, or numbers them otherwise, is mapped by
    name: its objects get the numbers of the reference when it is loaded, and it is evaluated on the classes that it
    lists (`CocoEvaluator`). Data registered by others must number them alike.

    Args:
        train, test: registered data sets, those of DATASETS.TRAIN and DATASETS.TEST; not both empty.
        reference: the classes in the order of the model's outputs, if a checkpoint settles them; otherwise those of
            the training set (without one, of the test set) that has most, the first of equals; it is returned.

    Raises:
        UserError: a data set has classes that the reference lacks, naming both lists, or cannot be mapped.
    """
    own = {name: own_classes(name) for name in (*train, *test)}
    source = "the checkpoint"
    if reference is None:
        source = max(train or test, key=lambda name: len(own[name]))
        reference = own[source]
    for name, classes in own.items():
        both = f"data set {name} has the classes {listed(classes, 20)}, and {source} has {listed(reference, 20)}"
        missing = [class_name for class_name in classes if class_name not in reference]
        if missing:
            other = spelled_alike(missing[0], reference)
            hint = f" (but {other!a}, so spell both alike)" if other else ""
            raise UserError(f"{both}: they cannot be mapped by name, since that lacks {missing[0]!a}{hint}")
        if MetadataCatalog.get(name).get("own_classes"):
            _number(name, reference)
        elif classes != tuple(reference):
            raise UserError(
                f"{both}: register it with --register (or repr_det.datasets.register_coco_format), which maps by name"
            )
    return tuple(reference)


def _number(name: str, reference: Sequence[str]) -> None:
    values = MetadataCatalog.pop(name).as_dict()  # a key of Metadata cannot be set to another value
    own = values["own_classes"]
    numbers = {own[class_name]: number for number, class_name in enumerate(reference) if class_name in own}
    values |= {"thing_classes": list(reference), "thing_dataset_id_to_contiguous_id": numbers}
    MetadataCatalog.get(name).set(**values)


def any_mapped(data_sets: Sequence[Sequence[str]]) -> bool:
    """Tell whether `register_coco_format` registered any of the names in these lists, so that it can be mapped.

    Raises:
        UserError: a name stands in place of a list of names.
    """
    for names in data_sets:
        if isinstance(names, str):
            raise UserError(f"data sets must be a tuple of names, ({names!r},), got {names!r}")
    registered = [name for names in data_sets for name in names if name in DatasetCatalog]
    return any(MetadataCatalog.get(name).get("own_classes") for name in registered)
