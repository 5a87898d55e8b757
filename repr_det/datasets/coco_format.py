"""A check of COCO-format data that finds what would stop Detectron2 in the middle of a run, or spoil it in silence."""

import contextlib
import gc
import json
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repr_det.datasets.causes import kind_of
from repr_det.datasets.findings import Findings, listed, shown
from repr_det.datasets.image_files import MAX_HEADERS, ImageFile, check_image_files
from repr_det.datasets.masks import first_mask_gap, is_lost
from repr_det.datasets.numbers import Columns, area_doubt, check_boxes, columns, evaluation_gap, warn_of_twins
from repr_det.datasets.schema import check_schema
from repr_det.method.errors import UserError


@dataclass(frozen=True)
class CocoSummary:
    """Contents of a COCO-format data set; classes are sorted by category id, which is their order in Detectron2.

    Attributes:
        category_ids: of each class the (lowest) category id.
        evaluation_gap: why COCO evaluation would fail or mislead where training would not.
        area_doubt: why APs, APm and APl would mislead.
        aliases: (category id, lowest id of the same name), for the names that several ids have.
        mask_gap: why masks cannot be trained or evaluated where boxes can.
        keypoint_gap: why keypoints cannot be evaluated.
        crowds, crowd_masks: crowd regions among the boxes, and how many of these have a segmentation.
        masks, rle_masks, keypoints: objects, crowd regions aside, that have a segmentation, one in RLE, keypoints.
        keypoint_numbers: the lengths of these objects' lists of keypoints, 0 for those without.
        files: the image files.
    """

    num_images: int
    num_boxes: int
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    evaluation_gap: str | None = None
    area_doubt: str | None = None
    aliases: tuple[tuple[int, int], ...] = ()
    mask_gap: str | None = None
    keypoint_gap: str | None = None
    crowds: int = 0
    crowd_masks: int = 0
    masks: int = 0
    rle_masks: int = 0
    keypoints: int = 0
    keypoint_numbers: frozenset[int] = field(default=frozenset(), compare=False)
    files: list[ImageFile] = field(default_factory=list, compare=False, repr=False)


def check_coco_format(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    name: str | None = None,
    *,
    allow_no_boxes: bool = False,
    for_evaluation: bool = True,
    decode: bool = False,
    max_headers: int = MAX_HEADERS,
) -> CocoSummary:
    """Check the json and the image files of a detection data set in COCO format.

    Args:
        name: the data set's name, for the messages
        allow_no_boxes: accept a json without annotations
        for_evaluation: ask also for what only COCO evaluation needs (`area` and `iscrowd` of every annotation)
        decode: decode the image files instead of reading their headers, which also finds truncated ones; small data
            sets are always decoded
        max_headers: how many image files are opened, evenly spread; existence and emptiness are checked for all

    Raises:
        UserError: one line that names the file, the first thing found wrong, and what would be right
    """
    json_file, image_root = Path(json_file).expanduser(), Path(image_root).expanduser()
    findings = Findings(json_file, name)
    with _collecting_no_garbage():
        content = ({"annotations": []} if allow_no_boxes else {}) | _read_json(json_file, findings.prefix)
        check_schema(content, findings)
        for key in ("images", "categories", "annotations"):
            if not content[key] and not (key == "annotations" and allow_no_boxes):
                findings.fail(f"'{key}' is empty")
        classes, sizes = _classes(content["categories"], findings), _sizes(content["images"], findings)
        annotations = content["annotations"]
        _check_references(annotations, sizes, classes, findings)
        objects = columns(annotations, sizes)
        check_boxes(objects, findings)
        _check_polygons(annotations, findings)
        warn_of_twins(objects, findings)
        files = check_image_files(content["images"], image_root, decode, max_headers, findings)
        summary = _summary(objects, sizes, classes, files, findings)
    if for_evaluation:
        findings.say(summary.evaluation_gap, summary.area_doubt)
    return summary


@contextlib.contextmanager
def _collecting_no_garbage() -> Iterator[None]:
    """Half of the time to read a large json is Python's search for cycles among objects that have none."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _read_json(json_file: Path, prefix: str) -> dict[str, Any]:
    if not json_file.is_file():
        what = "is not a file" if json_file.exists() else "does not exist"
        raise UserError(f"{prefix}annotation file {json_file} {what}")
    try:
        with json_file.open(encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(f"{prefix}{json_file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{prefix}{json_file} {kind_of(json_file) or _fault(error)}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(
            f"{prefix}{json_file}: must hold an object with images, annotations and categories, got a {kind}"
        )
    return content


def _fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        hint = "it may be truncated"
        if error.msg == "Extra data":
            hint = "COCO format is one object, not one a line"
        return f"is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); {hint}"
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 text: {error.reason} at byte {error.start}"
    # an integer of thousands of digits, nested thousands deep
    return "is no COCO annotation file: " + " ".join(str(error).split()).split(";")[0]


def _classes(categories: list[dict], findings: Findings) -> dict[int, str]:
    """Category id -> name."""
    classes: dict[int, str] = {}
    for category in categories:
        number, name = category["id"], category["name"]
        if number in classes:
            findings.fail(f"category id {number} occurs twice ('{classes[number]}' and '{name}')")
        classes[number] = name
    return classes


def _sizes(images: list[dict], findings: Findings) -> dict[int | str, tuple[int, int]]:
    """Image id -> (width, height)."""
    sizes: dict[int | str, tuple[int, int]] = {}
    for image in images:
        if image["id"] in sizes:
            findings.fail(f"image id {image['id']!r} occurs twice")
        sizes[image["id"]] = (int(image["width"]), int(image["height"]))
    if len({type(image_id) for image_id in sizes}) > 1:
        findings.fail("image ids must be all integers or all strings, found both")
    return sizes


def _check_references(
    annotations: list[dict],
    sizes: dict[int | str, tuple[int, int]],
    classes: dict[int, str],
    findings: Findings,
) -> None:
    """Every annotation has an id of its own, and its image and class are listed."""
    seen: set[int] = set()
    repeats_known = "minival" in str(findings.json_file)  # COCO's 2014 minival repeats ids; Detectron2 lets it pass
    for annotation in annotations:
        label = f"annotation {annotation['id']}"
        if annotation["id"] in seen and not repeats_known:
            findings.fail(f"annotation id {annotation['id']} occurs twice")
        seen.add(annotation["id"])
        if annotation["image_id"] not in sizes:
            kind = type(next(iter(sizes))).__name__
            hint = "" if type(annotation["image_id"]).__name__ == kind else f" (whose ids are of type {kind})"
            findings.fail(f"{label} names image_id {annotation['image_id']!r}, which is not in 'images'{hint}")
        if annotation["category_id"] not in classes:
            known = listed(sorted(classes))
            findings.fail(
                f"{label} names category_id {annotation['category_id']}, which is not in 'categories' ({known})"
            )
    if 0 in seen:
        findings.warn("annotation id 0 means 'no match' to pycocotools, so that box never counts as found: start at 1")
    if annotations and all(annotation.get("iscrowd") for annotation in annotations):
        findings.fail(f"all {len(annotations)} annotations are crowd regions (iscrowd 1), none is one object")


def _check_polygons(annotations: list[dict], findings: Findings) -> None:
    """Few objects, at most, have polygons of which Detectron2 keeps none."""
    lost = [annotation for annotation in annotations if is_lost(annotation.get("segmentation"))]
    if lost:
        first = (
            f"annotation {lost[0]['id']} has a segmentation without a polygon of 3 points or more "
            f"({shown(lost[0]['segmentation'])}), and Detectron2 leaves such an object out, box and all, also with "
            "masks off: fix or remove it"
        )
        findings.leave_aside(len(lost), len(annotations), first, "objects")


def _keypoint_gap(annotations: list[dict]) -> str | None:
    """Name what COCO evaluation of keypoints lacks; it asks it of every annotation, crowd regions too."""
    for annotation in annotations:
        for key in ("keypoints", "num_keypoints"):
            if key not in annotation:
                return f"annotation {annotation['id']} has no '{key}', which COCO evaluation needs"
        if len(annotation["keypoints"] or ()) % 3:
            count = len(annotation["keypoints"])
            return f"annotation {annotation['id']} must have keypoints of three numbers each, got {count} numbers"
    return None


def _summary(
    objects: Columns,
    sizes: dict[int | str, tuple[int, int]],
    classes: dict[int, str],
    files: list[ImageFile],
    findings: Findings,
) -> CocoSummary:
    first: dict[str, int] = {}  # class name -> its lowest category id
    aliases = tuple((i, first[name]) for i, name in sorted(classes.items()) if first.setdefault(name, i) != i)
    for other, lowest in aliases:
        findings.warn(f"categories {lowest} and {other} are both '{classes[other]}': taken for one class")
    spellings: dict[str, str] = {}
    for name in first:
        other = spellings.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), name)
        if other != name:
            findings.warn(f"{other!a} and {name!a} are one name in two spellings, and taken for two classes")
    annotations = objects.annotations
    crowds = [annotation for annotation in annotations if annotation.get("iscrowd")]
    single = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    return CocoSummary(
        num_images=len(sizes),
        num_boxes=len(annotations),
        class_names=tuple(first),
        category_ids=tuple(first.values()),
        evaluation_gap=evaluation_gap(objects),
        area_doubt=area_doubt(objects),
        aliases=aliases,
        mask_gap=first_mask_gap(annotations, sizes),
        keypoint_gap=_keypoint_gap(annotations),
        crowds=len(crowds),
        crowd_masks=sum(bool(annotation.get("segmentation")) for annotation in crowds),
        masks=sum(bool(annotation.get("segmentation")) for annotation in single),
        rle_masks=sum(isinstance(annotation.get("segmentation"), dict) for annotation in single),
        keypoints=sum(bool(annotation.get("keypoints")) for annotation in single),
        keypoint_numbers=frozenset(len(annotation.get("keypoints") or ()) for annotation in single),
        files=files,
    )
