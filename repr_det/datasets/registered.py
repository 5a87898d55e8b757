"""Data sets by their registered names: registered, checked once, and asked for their classes."""

import difflib
import logging
import os
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.utils.logger import log_first_n

from repr_det.datasets.coco_format import CocoSummary, check_coco_format
from repr_det.datasets.findings import Findings, listed
from repr_det.datasets.shapes import CLASS_NAMES, PARTS, annotation_file, build_shapes
from repr_det.method.errors import UserError


def _check_once(json_file: str, image_root: str, name: str) -> CocoSummary:
    """`check_coco_format`, remembered for as long as the json does not change."""
    path = Path(json_file)
    state = (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
    return _check(json_file, image_root, name, state)


@lru_cache
def _check(json_file: str, image_root: str, name: str, state: object) -> CocoSummary:  # state: part of the cache's key
    return check_coco_format(json_file, image_root, name)


def register_coco_format(name: str, json_file: str | os.PathLike, image_root: str | os.PathLike) -> None:
    """Check a COCO-format data set and register it with Detectron2 under `name`; again with the same files: no effect.

    Raises:
        UserError: the name is registered with other files, or what `check_coco_format` finds (what only evaluation
            needs is left to `check_registered`)
    """
    if not name:
        raise UserError("the name of a data set must not be empty")
    json_file, image_root = (os.path.abspath(os.path.expanduser(path)) for path in (json_file, image_root))
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        before, root = metadata.get("json_file", ""), metadata.get("image_root", "")
        if not _same(before, json_file) or not _same(root, image_root):
            raise UserError(f"data set {name} is already registered with {before or 'other data'}, not {json_file}")
        return
    summary = _check_once(json_file, image_root, name)
    DatasetCatalog.register(name, partial(_load, name, json_file, image_root))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=list(summary.classes),
        thing_dataset_id_to_contiguous_id={i: number for number, i in enumerate(summary.classes.values())},
        own_classes=summary.classes,
    )


def _same(path: str, other: str) -> bool:
    return bool(path) and os.path.realpath(path) == os.path.realpath(other)


def _load(name: str, json_file: str, image_root: str) -> list[dict]:
    """Detectron2's dicts, each object's class found by its name among the ``thing_classes`` of the data set."""
    summary = _check_once(json_file, image_root, name)
    classes = MetadataCatalog.get(name).thing_classes
    index = {i: classes.index(class_name) for class_name, i in summary.classes.items()}
    if [*summary.classes] != classes:
        mapping = listed((f"{class_name} (id {i}) -> {index[i]}" for class_name, i in summary.classes.items()), 100)
        told = f"data set {name}: its classes are mapped by name: {mapping}, of {len(classes)} classes"
        log_first_n(logging.INFO, told, key="message")
    index |= {alias: index[lowest] for alias, lowest in summary.aliases.items()}
    records = load_coco_json(json_file, image_root)
    for record in records:
        record["width"], record["height"] = int(record["width"]), int(record["height"])
        for annotation in record["annotations"]:
            annotation["category_id"] = index[annotation["category_id"]]
    return records


def register_builtin() -> None:
    """Register shapes_train, its first 75 images as shapes_train_75, shapes_val, bccd_train and bccd_val (blood cells).

    They lie in shapes/ and bccd/ of $DETECTRON2_DATASETS, or of datasets/; the shapes are drawn when they are first
    loaded. What is registered already stays.
    """
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser().absolute()
    for part, (split, _) in PARTS.items():
        name = f"shapes_{part}"
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, partial(_load_shapes, name))
            MetadataCatalog.get(name).set(
                json_file=str(annotation_file(root / "shapes", part)),
                image_root=str(root / "shapes" / split),
                shapes_root=str(root / "shapes"),
                evaluator_type="coco",
                thing_classes=list(CLASS_NAMES),
                thing_dataset_id_to_contiguous_id={i: i - 1 for i in range(1, len(CLASS_NAMES) + 1)},
            )
    for split in ("train", "val"):
        if f"bccd_{split}" not in DatasetCatalog:
            json_file = root / "bccd" / "annotations" / f"instances_{split}.json"
            register_coco_instances(f"bccd_{split}", {}, str(json_file), str(root / "bccd" / split))


def _load_shapes(name: str) -> list[dict]:
    metadata = MetadataCatalog.get(name)
    build_shapes(metadata.shapes_root, name.removeprefix("shapes_"))
    return load_coco_json(metadata.json_file, metadata.image_root, name)


def check_registered(name: str, *, for_evaluation: bool = True) -> CocoSummary | None:
    """Check a data set by its registered name; the shapes data set is drawn first if it is absent.

    Returns:
        the summary, or None for a data set that is not in COCO format, about which nothing is known

    Raises:
        UserError: the name is unknown, or what `check_coco_format` finds, or the classes of the json are not those
            that Detectron2 has registered under this name
    """
    metadata = _metadata(name)
    if metadata.get("shapes_root"):
        build_shapes(metadata.shapes_root, name.removeprefix("shapes_"))
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if json_file is None or image_root is None or metadata.get("evaluator_type") != "coco":
        return None
    if not os.path.exists(json_file):
        raise UserError(
            f"data set {name}: annotation file {json_file} does not exist; data sets of known names lie in the folder "
            f"DETECTRON2_DATASETS, which is '{os.getenv('DETECTRON2_DATASETS', 'datasets')}'"
        )
    summary = _check_once(json_file, image_root, name)
    findings = Findings(Path(json_file), name)
    if for_evaluation:
        summary.check_evaluation(findings)
    names, ids, own = [*summary.classes], [*summary.classes.values()], metadata.get("own_classes")
    known = own or metadata.get("thing_classes", names)
    known_ids = own.values() if own else metadata.get("thing_dataset_id_to_contiguous_id", ids)
    if [*known] != names or [*known_ids] != ids or (summary.aliases and not own):
        findings.fail(
            f"its categories ({listed(names)}), and their ids, must be those registered under this name "
            f"({listed(known)}); register other data under another name"
        )
    return summary


def _metadata(name: str) -> Any:
    if name not in DatasetCatalog:
        close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(f"unknown data set '{name}': {hint}Register your own with --register NAME JSON IMAGE_ROOT")
    return MetadataCatalog.get(name)


def class_names(name: str) -> tuple[str, ...]:
    """The classes of a registered data set, in the order of their contiguous ids.

    Raises:
        UserError: the name is unknown, or the data set must be read to know its classes and is wrong
    """
    names = _metadata(name).get("thing_classes")
    if names is None:
        summary = check_registered(name, for_evaluation=False)
        if summary is None:
            raise UserError(f"data set {name} has no thing_classes in its metadata and is not in COCO format")
        names = summary.classes
    return tuple(names)


def own_classes(name: str) -> tuple[str, ...]:
    """The classes that a data set lists itself, if `class_names` may be those that it was mapped to."""
    return tuple(_metadata(name).get("own_classes") or class_names(name))
