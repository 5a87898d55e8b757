"""Data sets by their registered names: registered, checked once, their classes numbered alike."""

import difflib
import logging
import os
from collections.abc import Collection, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.utils.logger import log_first_n

from repr_det.datasets.coco_format import CocoSummary, check_coco_format
from repr_det.datasets.findings import Findings, folded, listed
from repr_det.datasets.shapes import CLASS_NAMES, PARTS, annotation_file, build_shapes
from repr_det.method.errors import UserError


def _check_once(json_file: str, image_root: str, name: str) -> CocoSummary:
    """`check_coco_format`, remembered until the json changes."""
    path = Path(json_file)
    state = (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
    return _check(json_file, image_root, name, state)


@lru_cache
def _check(json_file: str, image_root: str, name: str, state: object) -> CocoSummary:  # state: for the cache
    return check_coco_format(json_file, image_root, name)


def register_coco_format(name: str, json_file: str | os.PathLike, image_root: str | os.PathLike) -> None:
    """Check a COCO-format data set and register it with Detectron2; again with the same files: no effect. UserError if
    the name is registered with other files, or for what `check_coco_format` finds."""
    if not name:
        raise UserError("the name of a data set must not be empty")
    json_file, image_root = (os.path.abspath(os.path.expanduser(path)) for path in (json_file, image_root))
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        before = metadata.get("json_file", ""), metadata.get("image_root", "")
        if [*map(os.path.realpath, before)] != [*map(os.path.realpath, (json_file, image_root))]:
            raise UserError(f"data set {name} is already registered with {before[0] or 'other data'}, not {json_file}")
        return
    _register(name, json_file, image_root, _check_once(json_file, image_root, name).classes)


def name_keypoints(name: str) -> None:
    """Takes keypoint_names of the categories, and keypoint_flip_map of left and right in them, if none are given."""
    metadata, summary = MetadataCatalog.get(name), check_registered(name, for_evaluation=False)
    if summary and summary.keypoint_names and not metadata.get("keypoint_names"):
        names = summary.keypoint_names
        sides = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"))
        mirrored = [(x, x.replace(*side)) for x in names for side in sides]
        pairs = [(x, other) for x, other in mirrored if other != x and other in names]
        metadata.set(keypoint_names=names, keypoint_flip_map=pairs)


def _register(name: str, json_file: str, image_root: str, classes: dict[int, str], **more: str) -> None:
    DatasetCatalog.register(name, partial(_load, name))
    own = {"json_file": json_file, "image_root": image_root, "own_classes": classes}
    MetadataCatalog.get(name).set(evaluator_type="coco", **own, **more)
    _number(name, list(dict.fromkeys(classes.values())))


def _number(name: str, reference: Sequence[str]) -> None:
    metadata = MetadataCatalog.get(name)
    numbers = {i: reference.index(c) for i, c in metadata.own_classes.items() if c in reference}
    # A key of Metadata cannot be set to another value.
    vars(metadata).update(thing_classes=list(reference), thing_dataset_id_to_contiguous_id=numbers)


def _load(name: str) -> list[dict]:
    """Detectron2's dicts, the classes numbered by the metadata."""
    check_registered(name, for_evaluation=False)  # draws shapes; a file may have changed
    metadata = MetadataCatalog.get(name)
    own, numbers = metadata.own_classes, metadata.thing_dataset_id_to_contiguous_id
    if list(dict.fromkeys(own.values())) != metadata.thing_classes:
        mapping = listed((f"{c} (id {i}) -> {numbers.get(i, 'none, it has no objects')}" for i, c in own.items()), 100)
        what = f"data set {name}: its classes are mapped by name: {mapping}, of {len(metadata.thing_classes)} classes"
        log_first_n(logging.INFO, what, key="message")
    records = load_coco_json(metadata.json_file, metadata.image_root)
    for record in records:
        record["width"], record["height"] = int(record["width"]), int(record["height"])
        for annotation in record["annotations"]:
            annotation["category_id"] = numbers[annotation["category_id"]]
    return records


def register_builtin() -> None:
    """Register shapes_train, shapes_train_75, shapes_val, bccd_train and bccd_val (blood cells) of $DETECTRON2_DATASETS
    (datasets/); shapes are drawn when first loaded."""
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser().absolute()
    shapes = root / "shapes"
    for part, (split, _) in PARTS.items():
        if f"shapes_{part}" not in DatasetCatalog:
            files = str(annotation_file(shapes, part)), str(shapes / split)
            _register(f"shapes_{part}", *files, dict(enumerate(CLASS_NAMES, 1)), shapes_root=str(shapes))
    for split in ("train", "val"):
        if f"bccd_{split}" not in DatasetCatalog:
            json_file = root / "bccd" / "annotations" / f"instances_{split}.json"
            register_coco_instances(f"bccd_{split}", {}, str(json_file), str(root / "bccd" / split))


def _metadata(name: str) -> Any:
    if name not in DatasetCatalog:
        close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(f"unknown data set '{name}': {hint}Register your own with --register NAME JSON IMAGE_ROOT")
    return MetadataCatalog.get(name)


def check_registered(name: str, *, for_evaluation: bool = True, for_objects: bool = False) -> CocoSummary | None:
    """Check a data set by its registered name (shapes are drawn if absent); None if it is not in COCO format. UserError
    if the name is unknown, the classes are not those registered, or for what `check_coco_format` finds."""
    metadata = _metadata(name)
    if metadata.get("shapes_root"):
        build_shapes(metadata.shapes_root)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if json_file is None or image_root is None or metadata.get("evaluator_type") != "coco":
        return None
    if not os.path.exists(json_file):
        folder = os.getenv("DETECTRON2_DATASETS", "datasets")
        raise UserError(f"data set {name}: {json_file} does not exist; DETECTRON2_DATASETS is '{folder}'")
    summary = _check_once(json_file, image_root, name)
    findings = Findings(Path(json_file), name)
    if for_objects:
        findings.report(summary.gaps["objects"], [])
    if for_evaluation:
        findings.report(summary.gaps["evaluation"], summary.gaps["evaluation doubts"])
    names, ids, own = list(summary.classes.values()), list(summary.classes), metadata.get("own_classes")
    known = own.values() if own else metadata.get("thing_classes", names)
    known_ids = own or metadata.get("thing_dataset_id_to_contiguous_id", ids)
    if list(known) != names or list(known_ids) != ids or (len(set(names)) < len(names) and not own):
        findings.fail(
            f"its categories ({listed(names)}), and their ids, must be those registered under this name "
            f"({listed(known)}); register other data under another name"
        )
    return summary


def class_names(name: str) -> tuple[str, ...]:
    """The classes of a registered data set, in the order of their contiguous ids; () if it has no things."""
    names = _metadata(name).get("thing_classes")
    if names is None:
        summary = check_registered(name, for_evaluation=False)
        names = summary.classes.values() if summary else ()
    return tuple(names)


def own_classes(name: str) -> tuple[str, ...]:
    """The classes that a data set lists itself, whatever it is mapped to."""
    own = _metadata(name).get("own_classes")
    return tuple(dict.fromkeys(own.values())) if own else class_names(name)


def lacking(name: str, reference: Collection[str]) -> list[str]:
    """The classes of a data set that the reference lacks. If it can be mapped, those without objects do not count."""
    missing = [class_name for class_name in own_classes(name) if class_name not in reference]
    if missing and MetadataCatalog.get(name).get("own_classes"):
        summary = check_registered(name, for_evaluation=False)
        missing = [class_name for class_name in missing if summary and class_name in summary.seen]
    return missing


def any_mapped(data_sets: Sequence[Sequence[str]]) -> bool:
    """Tells whether any of these can be mapped; UserError for a string in place of names."""
    for names in data_sets:
        if isinstance(names, str):
            raise UserError(f"data sets must be a tuple of names, ({names!r},), got {names!r}")
    registered = [name for names in data_sets for name in names if name in DatasetCatalog]
    return any(MetadataCatalog.get(name).get("own_classes") for name in registered)


def agree_on_classes(
    train: Sequence[str], test: Sequence[str] = (), reference: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Gives all data sets of a run one numbering of the classes, and returns the classes in its order.

    A data set of `register_coco_format` is mapped by name when it is loaded; others with things must number them alike.

    Args:
        train, test: registered names, not both empty.
        reference: the classes in the order of the outputs; default those of the training (or else test) set that has
            most, the first of equals.

    Raises:
        UserError: a data set has objects of classes that the reference lacks, or cannot be mapped.
    """
    own = {name: classes for name in (*train, *test) if (classes := own_classes(name))}
    source = "the checkpoint"
    if reference is None and own:
        source = max([name for name in train if name in own] or own, key=lambda name: len(own[name]))
        reference = own[source]
    for name, classes in own.items():
        both = f"data set {name} has the classes {listed(classes, 20)}, and {source} has {listed(reference, 20)}"
        if missing := lacking(name, reference):
            alike = [other for other in reference if folded(other) == folded(missing[0])]
            hint = f" (but {alike[0]!a}, so spell both alike)" if alike else ""
            raise UserError(f"{both}: they cannot be mapped by name, since that lacks {missing[0]!a}{hint}")
        if MetadataCatalog.get(name).get("own_classes"):
            _number(name, reference)
        elif classes != tuple(reference):
            raise UserError(f"{both}: register it with --register, which maps by name")
    return tuple(reference or ())
