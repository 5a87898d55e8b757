"""A check of COCO-format data that finds what would stop Detectron2 in the middle of a run, or spoil it in silence."""

import gc
import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from repr_det.datasets.findings import Findings, listed, reason, spelled_alike
from repr_det.datasets.image_files import ImageFile, check_image_files
from repr_det.datasets.objects import Objects, area_doubt, check_objects, evaluation_gap, keypoint_gap, mask_gap
from repr_det.datasets.schema import check_schema


@dataclass(frozen=True)
class CocoSummary:
    """Contents of a COCO-format data set; classes are sorted by category id, which is their order in Detectron2.

    Attributes:
        category_ids: of each class the (lowest) category id.
        aliases: (category id, lowest id of the same name), for the names that several ids have.
        evaluation_gap: why COCO evaluation would fail or mislead where training would not.
        area_doubt: why APs, APm and APl would mislead.
        mask_gap, crowd_mask_gap: why masks of objects, and of crowd regions, cannot be trained or evaluated.
        polygon_gap: why masks are not all polygons.
        keypoint_gap: why keypoints cannot be evaluated.
        keypoint_numbers: the lengths of the objects' lists of keypoints, crowd regions aside, 0 for those without.
        files: the image files.
    """

    num_images: int
    num_boxes: int
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    aliases: tuple[tuple[int, int], ...] = ()
    evaluation_gap: str | None = None
    area_doubt: str | None = None
    mask_gap: str | None = None
    crowd_mask_gap: str | None = None
    polygon_gap: str | None = None
    keypoint_gap: str | None = None
    keypoint_numbers: frozenset[int] = frozenset()
    files: list[ImageFile] = field(default_factory=list, compare=False, repr=False)


def check_coco_format(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    name: str | None = None,
    *,
    allow_no_boxes: bool = False,
    for_evaluation: bool = True,
    decode: bool = False,
) -> CocoSummary:
    """Check the json and the image files of a detection data set in COCO format.

    Args:
        name: the data set's name, for the messages
        allow_no_boxes: accept a json without annotations
        for_evaluation: ask also for what only COCO evaluation needs (`area` and `iscrowd` of every annotation)
        decode: decode all image files; of a large data set only some are, evenly spread, and the others are looked at
            for existence and emptiness

    Raises:
        UserError: one line that names the file, the first thing found wrong, and what would be right
    """
    json_file, image_root = Path(json_file).expanduser(), Path(image_root).expanduser()
    findings = Findings(json_file, name)
    collects = gc.isenabled()
    gc.disable()  # a third of the time to read a large json is a search for cycles among objects that have none
    try:
        summary = _check(findings, image_root, allow_no_boxes, decode)
    finally:
        if collects:
            gc.enable()
    if for_evaluation:
        check_evaluation(summary, findings)
    return summary


def _check(findings: Findings, image_root: Path, allow_no_boxes: bool, decode: bool) -> CocoSummary:
    content = ({"annotations": []} if allow_no_boxes else {}) | _read_json(findings)
    check_schema(content, findings)
    for key in ("images", "categories", "annotations"):
        if not content[key] and not (key == "annotations" and allow_no_boxes):
            findings.fail(f"'{key}' is empty")
    classes = {i: entry["name"] for i, entry in _by_id(content, "categories", findings).items()}
    images = _by_id(content, "images", findings)
    if len({type(image_id) for image_id in images}) > 1:
        findings.fail("image ids must be all integers or all strings, found both")
    _check_references(content, images, classes, findings)
    objects = Objects(content["annotations"], images)
    if objects.crowd.all() and len(objects.crowd):
        findings.fail(f"all {len(objects.crowd)} annotations are crowd regions (iscrowd 1), none is one object")
    check_objects(objects, findings)
    files = check_image_files(content["images"], image_root, decode, findings)
    return _summary(objects, images, classes, files, findings)


def check_evaluation(summary: CocoSummary, findings: Findings) -> None:
    """Refuses data that COCO evaluation cannot use, and warns of what would mislead it."""
    if summary.evaluation_gap:
        findings.fail(summary.evaluation_gap)
    if summary.area_doubt:
        findings.warn(summary.area_doubt)


def _read_json(findings: Findings) -> dict[str, Any]:
    try:
        content = from_json(findings.json_file.read_bytes())
    except (OSError, ValueError) as error:
        findings.fail(f"cannot be read as JSON: {reason(error, findings.json_file)}")
    if not isinstance(content, dict):
        kind = type(content).__name__
        findings.fail(f"must hold an object with images, annotations and categories, got a {kind}")
    return content


def _by_id(content: dict[str, Any], section: str, findings: Findings) -> dict[Any, dict[str, Any]]:
    entries = {entry["id"]: entry for entry in content[section]}
    if len(entries) < len(content[section]):
        [(twice, _)] = Counter(entry["id"] for entry in content[section]).most_common(1)
        findings.fail(f"the id {twice!r} occurs twice in '{section}'")
    return entries


def _check_references(
    content: dict[str, Any], images: dict[Any, dict], classes: dict[int, str], findings: Findings
) -> None:
    """Every annotation has an id of its own, and its image and class are listed."""
    if "minival" not in str(findings.json_file):  # COCO's 2014 minival repeats ids; Detectron2 lets it pass
        _by_id(content, "annotations", findings)
    for entry in content["annotations"]:
        if entry["image_id"] not in images:
            some = listed(map(repr, images), 3)
            problem = f"image_id {entry['image_id']!r}, which is not in 'images' ({some})"
        elif entry["category_id"] not in classes:
            problem = f"category_id {entry['category_id']}, which is not in 'categories' ({listed(sorted(classes))})"
        else:
            continue
        findings.fail(f"annotation {entry['id']} names {problem}")
    if any(entry["id"] == 0 for entry in content["annotations"]):
        findings.warn("annotation id 0 means 'no match' to pycocotools, so that box never counts as found: start at 1")


def _summary(
    objects: Objects, images: dict[Any, dict], classes: dict[int, str], files: list[ImageFile], findings: Findings
) -> CocoSummary:
    first: dict[str, int] = {}  # class name -> its lowest category id
    aliases = tuple((i, first[name]) for i, name in sorted(classes.items()) if first.setdefault(name, i) != i)
    for other, lowest in aliases:
        findings.warn(f"categories {lowest} and {other} are both '{classes[other]}': taken for one class")
    for name in first:
        other = spelled_alike(name, first)
        if other and first[other] > first[name]:
            findings.warn(f"{name!a} and {other!a} are one name in two spellings, and taken for two classes")
    single = ~objects.crowd
    rle = single & objects.where(lambda entry: isinstance(entry.get("segmentation"), dict))
    numbers = [len(entry.get("keypoints") or ()) for entry in compress(objects.annotations, single)]
    return CocoSummary(
        num_images=len(images),
        num_boxes=len(objects.annotations),
        class_names=tuple(first),
        category_ids=tuple(first.values()),
        aliases=aliases,
        evaluation_gap=evaluation_gap(objects),
        area_doubt=area_doubt(objects),
        mask_gap=mask_gap(objects, single),
        crowd_mask_gap=mask_gap(objects, objects.crowd),
        polygon_gap=objects.first(rle, "has an RLE mask") if rle.any() else None,
        keypoint_gap=keypoint_gap(objects),
        keypoint_numbers=frozenset(numbers),
        files=files,
    )
