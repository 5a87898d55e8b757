"""A check of COCO-format data that finds what would stop Detectron2 in the middle of a run."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from repr_det.datasets.image_files import MAX_HEADERS, check_image_files
from repr_det.datasets.masks import is_polygon, is_segmentation, mask_gap
from repr_det.method.errors import UserError

MANY_BEYOND = 0.1  # share of boxes that reach beyond their image from which on it looks like a mistake
MAX_USELESS_BOXES = 0.001  # share of objects that Detectron2 drops (boxes without area or outside their image, broken
# polygons) that passes with a warning: COCO's own train2017 has 2 in 860,001
ONE_IN = 100  # in a data set of at least so many objects one such object passes too

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoSummary:
    """What a COCO-format data set holds; classes are sorted by category id, which is their order in Detectron2.

    Attributes:
        category_ids: of each class the (lowest) category id.
        evaluation_gap: why COCO evaluation would fail where training would not.
        aliases: (category id, lowest id of the same name), for the names that several ids have.
        mask_gap: why masks cannot be trained or evaluated where boxes can.
        keypoint_gap: why keypoints cannot be evaluated.
        crowds, crowd_masks: crowd regions among the boxes, and how many of these have a segmentation.
        masks, rle_masks, keypoints: objects, crowd regions aside, that have a segmentation, one in RLE, keypoints.
    """

    num_images: int
    num_boxes: int
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    evaluation_gap: str | None = None
    aliases: tuple[tuple[int, int], ...] = ()
    mask_gap: str | None = None
    keypoint_gap: str | None = None
    crowds: int = 0
    crowd_masks: int = 0
    masks: int = 0
    rle_masks: int = 0
    keypoints: int = 0


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
    prefix = f"data set {name}: " if name else ""

    def fail(problem: str) -> NoReturn:
        raise UserError(f"{prefix}{json_file}: {problem}")

    def warn(problem: str) -> None:
        logger.warning("%s%s: %s", prefix, json_file, problem)

    content = ({"annotations": []} if allow_no_boxes else {}) | _read_json(json_file, prefix)
    for key in ("images", "categories", "annotations"):
        if key not in content:
            fail(f"has no '{key}' (COCO format has images, annotations and categories, found: {listed(content)})")
        entries = content[key]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            fail(f"'{key}' must be a list of objects")
        if not entries and not (key == "annotations" and allow_no_boxes):
            fail(f"'{key}' is empty")
    classes = _check_categories(content["categories"], fail)
    sizes = _check_images(content["images"], fail)
    duplicates_known = "minival" in str(json_file)  # COCO's 2014 minival repeats ids, and Detectron2 lets it pass
    gap = _check_annotations(content["annotations"], sizes, classes, duplicates_known, fail, warn)
    if gap and for_evaluation:
        fail(gap)
    check_image_files(content["images"], image_root, decode, max_headers, prefix, json_file)
    first: dict[str, int] = {}  # class name -> its lowest category id
    aliases = tuple((i, first[name]) for i, name in sorted(classes.items()) if first.setdefault(name, i) != i)
    for other, lowest in aliases:
        warn(f"categories {lowest} and {other} are both '{classes[other]}': taken for one class")
    single = [a for a in content["annotations"] if not a.get("iscrowd", 0)]
    crowds = [a for a in content["annotations"] if a.get("iscrowd", 0)]
    return CocoSummary(
        num_images=len(sizes),
        num_boxes=len(content["annotations"]),
        class_names=tuple(first),
        category_ids=tuple(first.values()),
        evaluation_gap=gap,
        aliases=aliases,
        mask_gap=next(filter(None, (_mask_gap(a, sizes[a["image_id"]]) for a in content["annotations"])), None),
        keypoint_gap=next(filter(None, map(_keypoint_gap, content["annotations"])), None),
        crowds=len(crowds),
        crowd_masks=sum(bool(a.get("segmentation")) for a in crowds),
        masks=sum(bool(a.get("segmentation")) for a in single),
        rle_masks=sum(isinstance(a.get("segmentation"), dict) for a in single),
        keypoints=sum(bool(a.get("keypoints")) for a in single),
    )


def listed(names: Iterable, limit: int = 8) -> str:
    """The first of them, for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") or "nothing"


def _is_int(value: object) -> bool:
    return type(value) is int  # and not bool


def _is_number(value: object) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _is_flag(value: object) -> bool:
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def _is_length(value: object) -> bool:
    """A positive whole number, which some tools write as 640.0."""
    return _is_number(value) and value > 0 and value == int(value)


def _read_json(json_file: Path, prefix: str) -> dict:
    if not json_file.is_file():
        what = "is not a file" if json_file.exists() else "does not exist"
        raise UserError(f"{prefix}annotation file {json_file} {what}")
    try:
        with json_file.open(encoding="utf-8") as file:
            marked = file.read(1) == "\ufeff"
            file.seek(0)
            content = {} if marked else json.load(file)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{prefix}{json_file} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            "it may be truncated"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{prefix}{json_file} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, nested thousands deep
        reason = " ".join(str(error).split()).split(";")[0]
        raise UserError(f"{prefix}{json_file} is no COCO annotation file: {reason}") from error
    except OSError as error:
        raise UserError(f"{prefix}{json_file} cannot be read: {error.strerror}") from error
    if marked:
        raise UserError(
            f"{prefix}{json_file} begins with a byte order mark, which Detectron2 cannot read: save it without"
        )
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(
            f"{prefix}{json_file}: must hold an object with images, annotations and categories, got a {kind}"
        )
    return content


def _check_categories(categories: list[dict], fail: Callable[[str], NoReturn]) -> dict[int, str]:
    """Category id -> name."""
    classes: dict[int, str] = {}
    for number, category in enumerate(categories):
        category_id, name = category.get("id"), category.get("name")
        if not _is_int(category_id):
            fail(f"category number {number} must have an integer id, got {category_id!r}")
        if not isinstance(name, str) or not name:
            fail(f"category {category_id} must have a name, got {name!r}")
        if category_id in classes:
            fail(f"category id {category_id} occurs twice ('{classes[category_id]}' and '{name}')")
        classes[category_id] = name
    return classes


def _check_images(images: list[dict], fail: Callable[[str], NoReturn]) -> dict[int | str, tuple[int, int]]:
    """Image id -> (width, height)."""
    sizes: dict[int | str, tuple[int, int]] = {}
    for number, image in enumerate(images):
        image_id, file_name = image.get("id"), image.get("file_name")
        if not _is_int(image_id) and not isinstance(image_id, str):
            fail(f"image number {number} must have an id (integer or string), got {image_id!r}")
        if image_id in sizes:
            fail(f"image id {image_id!r} occurs twice")
        if not isinstance(file_name, str) or not file_name:
            fail(f"image {image_id!r} must have a file_name, got {file_name!r}")
        for key in ("width", "height"):
            if not _is_length(image.get(key)):
                fail(f"image {image_id!r} ('{file_name}') must have a positive integer {key}, got {image.get(key)!r}")
        sizes[image_id] = (int(image["width"]), int(image["height"]))
    if len({type(image_id) for image_id in sizes}) > 1:
        fail("image ids must be all integers or all strings, found both")
    return sizes


def _check_annotations(
    annotations: list[dict],
    sizes: dict[int | str, tuple[int, int]],
    classes: dict[int, str],
    duplicates_known: bool,
    fail: Callable[[str], NoReturn],
    warn: Callable[[str], None],
) -> str | None:
    """What keeps COCO evaluation, but not training, from working."""
    seen: set[int] = set()
    useless: list[str] = []
    lost: list[str] = []
    beyond: list[str] = []
    lacking: dict[str, list[int]] = {"area": [], "iscrowd": []}
    crowds = 0
    for number, annotation in enumerate(annotations):
        annotation_id = annotation.get("id")
        if not _is_int(annotation_id):
            fail(f"annotation number {number} must have an integer id (pycocotools needs it), got {annotation_id!r}")
        label = f"annotation {annotation_id}"
        if annotation_id in seen and not duplicates_known:
            fail(f"annotation id {annotation_id} occurs twice")
        seen.add(annotation_id)
        for key in ("image_id", "category_id", "bbox"):
            if key not in annotation:
                fail(f"{label} has no {key}")
        image_id, category_id, box = annotation["image_id"], annotation["category_id"], annotation["bbox"]
        if not isinstance(image_id, (int, str)) or image_id not in sizes:
            fail(f"{label} names image_id {image_id!r}, which is not in 'images'")
        if not _is_int(category_id) or category_id not in classes:
            fail(f"{label} names category_id {category_id!r}, which is not in 'categories' ({listed(sorted(classes))})")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            fail(f"{label} must have a bbox of four finite numbers [x, y, width, height], got {box!r}")
        x, y, width, height = box
        if width < 0 or height < 0:
            fail(f"{label} has a bbox of negative size: {box} is read as [x, y, width, height]")
        if width == 0 or height == 0:
            useless.append(f"{label} has a bbox without area: {box} is read as [x, y, width, height]")
        elif x >= sizes[image_id][0] or y >= sizes[image_id][1] or x + width <= 0 or y + height <= 0:
            size = "{}x{}".format(*sizes[image_id])
            useless.append(f"{label} has a bbox outside its image {image_id!r}, which is {size}: {box}")
        elif min(x, y) < -1 or x + width > sizes[image_id][0] + 1 or y + height > sizes[image_id][1] + 1:
            beyond.append(f"{label}: {box}")
        crowd = annotation.get("iscrowd", 0)
        if not _is_flag(crowd):
            fail(f"{label} must have iscrowd 0 or 1, got {crowd!r}")
        crowds += crowd
        if annotation.get("ignore", 0) != 0:
            fail(f"{label} has 'ignore' set, which Detectron2 does not support: remove it or set iscrowd to 1")
        segmentation = annotation.get("segmentation")
        if not is_segmentation(segmentation):
            fail(
                f"{label} must have a segmentation of polygons [[x, y, ...], ...] or RLE (size [height, width], counts "
                f"a list of lengths or a string), or none; got {str(segmentation)[:60]}"
            )
        if segmentation and isinstance(segmentation, list) and not any(map(is_polygon, segmentation)):
            lost.append(
                f"{label} has a segmentation without a polygon of 3 points or more ({str(segmentation)[:60]}), and "
                "Detectron2 leaves such an object out, box and all, also with masks off: mend or remove it"
            )
        if not _is_flag(annotation.get("iscrowd")):
            lacking["iscrowd"].append(annotation_id)
        if not _is_number(annotation.get("area")):
            lacking["area"].append(annotation_id)
    allowed = max(MAX_USELESS_BOXES * len(annotations), int(len(annotations) >= ONE_IN))
    for found, what in ((useless, "boxes"), (lost, "objects")):
        if len(found) > allowed:
            fail(found[0] + (f" ({len(found)} such {what})" if len(found) > 1 else ""))
        if found:
            warn(f"{found[0]}; {len(found)} such {what} of {len(annotations)} are left aside")
    if len(beyond) > MANY_BEYOND * len(annotations):
        warn(
            f"{len(beyond)} of {len(annotations)} boxes reach beyond their image (the first is {beyond[0]}), and "
            "Detectron2 clips them: a bbox must be [x, y, width, height], not two corners"
        )
    if annotations and crowds == len(annotations):
        fail(f"all {crowds} annotations are crowd regions (iscrowd 1), none is an object to train on")
    if 0 in seen:
        warn("annotation id 0 means 'no match' to pycocotools, so that box never counts as found: start at 1")
    for key, ids in lacking.items():
        if ids:
            rule = {"area": "the object's area in pixels, or width * height", "iscrowd": "0 for a single object"}[key]
            return (
                f"{len(ids)} annotations have no '{key}', which COCO evaluation needs ({rule}); the first is {ids[0]}"
            )
    return None


def _mask_gap(annotation: dict, size: tuple[int, int]) -> str | None:
    gap = mask_gap(annotation.get("segmentation") or [], size)
    return gap and f"annotation {annotation['id']} has {gap}"


def _keypoint_gap(annotation: dict) -> str | None:
    """What COCO evaluation of keypoints asks of every annotation, crowd regions too."""
    missing = [key for key in ("keypoints", "num_keypoints") if key not in annotation]
    return f"annotation {annotation['id']} has no '{missing[0]}', which COCO evaluation needs" if missing else None
