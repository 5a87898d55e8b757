"""Data sets by their registered names: COCO-format data is registered, checked once, and asked for its classes."""

import difflib
import logging
import os
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

from repr_det.datasets.coco_format import CocoSummary, check_coco_format
from repr_det.datasets.findings import Findings, listed
from repr_det.datasets.shapes import build_part
from repr_det.method.errors import UserError

logger = logging.getLogger(__name__)
_summaries: dict[tuple, CocoSummary] = {}
_logged: dict[str, str] = {}  # data set -> the mapping of its classes that the log tells


def _check_once(json_file: str, image_root: str, name: str, allow_no_boxes: bool) -> CocoSummary:
    """`check_coco_format`, remembered for as long as the json does not change."""
    path = Path(json_file)
    state = (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
    key = (json_file, image_root, allow_no_boxes, state)
    if key not in _summaries:
        options = {"allow_no_boxes": allow_no_boxes, "for_evaluation": False}
        _summaries[key] = check_coco_format(json_file, image_root, name, **options)
    return _summaries[key]


def register_coco_format(name: str, json_file: str | os.PathLike, image_root: str | os.PathLike) -> None:
    """Check a COCO-format data set and register it with Detectron2 under `name`; again with the same files: no effect.

    Raises:
        UserError: the name is registered with other files, or what `check_coco_format` finds (what only evaluation
            needs is left to `check_registered`)
    """
    if not name:
        raise UserError("the name of a data set must not be empty")
    json_file, image_root = (os.path.abspath(os.path.expanduser(path)) for path in (json_file, image_root))
    metadata = MetadataCatalog.get(name) if name in DatasetCatalog else None
    if metadata is not None:
        before, root = metadata.get("json_file"), metadata.get("image_root")
        if not before or not root or not (_same(before, json_file) and _same(root, image_root)):
            raise UserError(f"data set {name} is already registered with {before or 'other data'}, not {json_file}")
        return
    summary = _check_once(json_file, image_root, name, False)
    DatasetCatalog.register(name, partial(_load, name, json_file, image_root))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=list(summary.class_names),
        thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(summary.category_ids)},
        own_classes=dict(zip(summary.class_names, summary.category_ids, strict=True)),
    )


def _same(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def _load(name: str, json_file: str, image_root: str) -> list[dict]:
    """Detectron2's dicts, each object's class found by its name among the ``thing_classes`` of the data set."""
    log_mapping(name)
    summary = _check_once(json_file, image_root, name, False)
    target = {c: i for i, c in enumerate(MetadataCatalog.get(name).thing_classes)}
    index = {c: target[n] for c, n in zip(summary.category_ids, summary.class_names, strict=True)}
    index |= {alias: index[lowest] for alias, lowest in summary.aliases}
    records = load_coco_json(json_file, image_root)
    for record in records:
        record["width"], record["height"] = int(record["width"]), int(record["height"])
        for annotation in record["annotations"]:
            annotation["category_id"] = index[annotation["category_id"]]
    return records


def log_mapping(name: str) -> None:
    """Logs, once, how the classes of a data set are mapped to those of the run, if they are numbered otherwise."""
    metadata = MetadataCatalog.get(name)
    own = metadata.get("own_classes") or {}
    if not own or [*own] == metadata.thing_classes:
        return
    numbers = metadata.thing_dataset_id_to_contiguous_id
    pairs = [f"{class_name} (id {i}) -> {numbers[i]}" for class_name, i in own.items()]
    mapping = f"{listed(pairs, 100)}, of {len(metadata.thing_classes)} classes"
    if logger.isEnabledFor(logging.INFO) and _logged.get(name) != mapping:
        _logged[name] = mapping
        logger.info("data set %s: its classes are mapped by name: %s", name, mapping)


def register_bccd() -> None:
    """Register `bccd_train` and `bccd_val` (blood cells) at $DETECTRON2_DATASETS/bccd; again: no effect."""
    root = os.path.abspath(os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "bccd"))
    for split in ("train", "val"):
        if f"bccd_{split}" not in DatasetCatalog:
            json_file = os.path.join(root, "annotations", f"instances_{split}.json")
            register_coco_instances(f"bccd_{split}", {}, json_file, os.path.join(root, split))


def _refuse_unknown(name: str) -> None:
    if name not in DatasetCatalog:
        close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(f"unknown data set '{name}': {hint}Register your own with --register NAME JSON IMAGE_ROOT")


def check_registered(name: str, *, for_evaluation: bool = True, allow_no_boxes: bool = False) -> CocoSummary | None:
    """Check a data set by its registered name; the shapes data set is drawn first where it is absent.

    Returns:
        the summary, or None for a data set that is not in COCO format, about which nothing is known

    Raises:
        UserError: the name is unknown, or what `check_coco_format` finds, or the classes of the json are not those
            that Detectron2 has registered under this name
    """
    _refuse_unknown(name)
    metadata = MetadataCatalog.get(name)
    if metadata.get("shapes_root"):
        build_part(Path(metadata.shapes_root), metadata.shapes_part)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if json_file is None or image_root is None or metadata.get("evaluator_type") != "coco":
        return None
    _refuse_absent(name, json_file)
    summary = _check_once(json_file, image_root, name, allow_no_boxes)
    findings = Findings(Path(json_file), name)
    if for_evaluation:
        findings.say(summary.evaluation_gap, summary.area_doubt)
    if (own := metadata.get("own_classes")) is not None:
        if (*own.items(),) != (*zip(summary.class_names, summary.category_ids, strict=True),):
            findings.fail("its categories changed since it was registered")
        return summary
    if tuple(metadata.get("thing_classes", summary.class_names)) != summary.class_names or summary.aliases:
        findings.fail(
            f"its categories ({listed(summary.class_names)}) must be those registered under this name "
            f"({listed(metadata.thing_classes)}); register your own data under another name"
        )
    if tuple(metadata.get("thing_dataset_id_to_contiguous_id", summary.category_ids)) != summary.category_ids:
        findings.fail("its category ids are not those registered under this name")
    return summary


def _refuse_absent(name: str, json_file: str) -> None:
    """Say how Detectron2's root folder is set if data below it are absent."""
    root = os.getenv("DETECTRON2_DATASETS", "datasets")
    inside = os.path.relpath(json_file, os.path.expanduser(root))
    if not os.path.exists(json_file) and not inside.startswith(os.pardir):
        setting = f"it is '{root}'" if "DETECTRON2_DATASETS" in os.environ else "it is not set: 'datasets' is used"
        raise UserError(
            f"data set {name}: annotation file {json_file} does not exist; DETECTRON2_DATASETS must name the folder "
            f"that holds {inside.split(os.sep)[0]}/ ({setting})"
        )


def class_names(name: str) -> tuple[str, ...]:
    """The classes of a registered data set, in the order of their contiguous ids.

    Raises:
        UserError: the name is unknown, or the data set must be read to know its classes and is wrong
    """
    _refuse_unknown(name)
    names = MetadataCatalog.get(name).get("thing_classes")
    if names is None:
        summary = check_registered(name, for_evaluation=False, allow_no_boxes=True)
        if summary is None:
            raise UserError(f"data set {name} has no thing_classes in its metadata and is not in COCO format")
        return summary.class_names
    return tuple(names)


def own_classes(name: str) -> tuple[str, ...]:
    """The classes that a data set lists itself, where `class_names` may be those that it was mapped to."""
    own = MetadataCatalog.get(name).get("own_classes") if name in DatasetCatalog else None
    return class_names(name) if own is None else tuple(own)


def num_classes(name: str) -> int:
    """The number of classes of a registered data set: what MODEL.ROI_HEADS.NUM_CLASSES must be. See `class_names`."""
    return len(class_names(name))
