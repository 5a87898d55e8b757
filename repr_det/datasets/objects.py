"""Annotations that cannot be right: boxes, areas, masks, keypoints, objects listed twice."""

import itertools
import math
import re
import reprlib
from collections import defaultdict
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

MANY = 0.1  # share of odd objects that looks like a mistake of the file
FEW = 0.001  # share of faulty objects that passes: train2017 has 2 in 860,001
ONE_IN = 100  # objects of which one may be faulty
ENOUGH = 50  # boxes to say something of all
LARGEST_AREA = 1e10  # px: pycocotools ignores larger objects, and those of negative area
LEAST_AREA, SMALL_AREA = 0.001, 0.02  # shares of its box: no object, and only few, have less
LARGEST_SHARE = 1.1
ZERO = "has the id 0, which means 'no match' to pycocotools: start at 1"
RIGHT_AREA = "give the object's area in pixels"
FORM = "a bbox must be [x, y, width, height] in pixels"
NEEDED = "which COCO evaluation needs"
IGNORED = "is a crowd region (iscrowd 1), which training and AP leave out: give 0 to a single object"
LEFT_OUT = "and Detectron2 leaves it out"
RUN = "[P-o]{0,6}[0-O]"  # of COCO's compressed RLE: groups of five bits; the last lacks the sixth

# Which objects are odd (N,), by purpose how many of them pass, and what is wrong.
Row = tuple[np.ndarray, dict[str, float], str]


class Objects:
    """The annotations of a data set: boxes (N, 4) as given, number of the image (N,), its width and height (N, 2)."""

    def __init__(self, annotations: list[dict[str, Any]], images: dict[int | str, dict[str, Any]]) -> None:
        self.annotations = annotations
        numbers = {image_id: number for number, image_id in enumerate(images)}
        self.images = np.array([numbers[entry["image_id"]] for entry in annotations])
        self.sizes = np.array([(image["width"], image["height"]) for image in images.values()], float)[self.images]
        self.boxes = np.array([entry["bbox"] for entry in annotations], float)
        self.few = max(FEW * len(annotations), int(len(annotations) >= ONE_IN))
        self.many = MANY * len(annotations)

    def lacking(self, key: str) -> np.ndarray:
        return np.array([entry.get(key) is None for entry in self.annotations])

    def first(self, odd: np.ndarray, what: str) -> str:
        """Names the first of the annotations in ``odd`` (N,), and their number."""
        number = int(odd.argmax())
        entry = self.annotations[number]
        box = ", ".join(f"{value:.6g}" for value in entry["bbox"])
        area = reprlib.repr(entry.get("area"))
        width, height = self.sizes[number]
        return (
            f"annotation {entry['id']} {what} (bbox [{box}], area {area}, in image {entry['image_id']!r} of "
            f"{width:.0f}x{height:.0f}; {odd.sum()} such of {len(odd)})"
        )


def gaps_of(annotations: list[dict], images: dict[int | str, dict], some_repeat: bool) -> dict[str, list[str]]:
    """Lines that say what is wrong, by what it prevents; doubts are warnings. "polygons" are masks as polygons,
    "keypoints" the evaluation of keypoints, "visibility" any use of them. With ``some_repeat`` a few ids may repeat."""
    gaps = defaultdict(list)
    if not annotations:
        lacking = ["has no 'annotations', which training and AP need"]
        return gaps | {"objects": lacking, "evaluation doubts": lacking}
    objects = Objects(annotations, images)
    ids = np.array([entry["id"] for entry in annotations])
    repeated = {"training": objects.few * some_repeat, "doubts": 0}
    rows = [(_repeats(ids), repeated, "has the id of an earlier one"), (ids == 0, {"doubts": 0}, ZERO)]
    rows += [*_box_rows(objects), *_evaluation_rows(objects), *_mask_rows(objects), *_keypoint_rows(objects)]
    for odd, limits, what in rows:
        for purpose, limit in limits.items():
            if odd.sum() > limit:
                gaps[purpose].append(objects.first(odd, what))
                break
    return gaps


def _box_rows(objects: Objects) -> list[Row]:
    boxes, sizes, few, many = objects.boxes, objects.sizes, objects.few, objects.many
    negative, flat, outside, beyond = _misfits(boxes, sizes)
    fractions = ~flat & (boxes <= 1.001).all(1) & (sizes > 2).all(1)
    first, second = boxes[:, :2], boxes[:, 2:]
    readings = {
        "as given": boxes,
        "two corners [x1, y1, x2, y2]": np.hstack([first, second - first]),
        "[centre x, centre y, width, height]": np.hstack([first - second / 2, second]),
        "[y, x, height, width]": boxes[:, [1, 0, 3, 2]],
    }
    odd = {form: np.any(_misfits(read, sizes), axis=0) for form, read in readings.items()}
    form, scale = _other_form(odd, f"boxes fit their images: {FORM}"), _other_scale(boxes, sizes)
    some = {"training": few, "doubts": 0}
    return [
        (negative, {"training": 0}, f"has a bbox of negative size: {FORM}"),
        (flat, some, f"has a bbox without area, {LEFT_OUT}"),
        (outside, some, f"has a bbox outside its image{form}"),
        (fractions, {"training": many, "doubts": few}, "has a bbox of a pixel or less: give pixels"),
        (beyond, {"doubts": 0 if form else many}, f"has a bbox that reaches beyond its image{form or f': {FORM}'}"),
        (np.full(len(boxes), bool(scale)), {"doubts": 0}, f"{scale}: {FORM}"),
        (_twins(objects), {"doubts": few}, "has class and box of another object of its image: list it once"),
    ]


def _evaluation_rows(objects: Objects) -> list[Row]:
    given = [entry.get("area") for entry in objects.annotations]
    areas = np.array([area if type(area) in (int, float) and abs(area) < 1e300 else math.nan for area in given], float)
    extents = objects.boxes[:, 2:]
    share = areas / extents.prod(1).clip(1e-9)
    impossible = (share < LEAST_AREA) | (areas > LARGEST_SHARE * (extents + 1).prod(1))
    ignored = (areas < 0) | (areas > LARGEST_AREA)
    doubtful = f"has an 'area' that does not fit its bbox, and APs, APm and APl go by it: {RIGHT_AREA}"
    return [
        (np.isnan(areas), {"evaluation": 0}, f"must have a finite number as 'area', {NEEDED}: {RIGHT_AREA}"),
        (objects.lacking("iscrowd"), {"evaluation": 0}, f"has no 'iscrowd', {NEEDED}: give 0 for a single object"),
        (ignored, {"evaluation": objects.few}, f"has an 'area' that COCO evaluation ignores: {RIGHT_AREA}"),
        (impossible, {"evaluation doubts": objects.few}, doubtful),
        (~impossible & (share < SMALL_AREA), {"evaluation doubts": objects.many}, doubtful),
    ]


def _mask_rows(objects: Objects) -> list[Row]:
    masks = [entry.get("segmentation") or None for entry in objects.annotations]
    sizes = objects.sizes.astype(int).tolist()
    faults = [_mask_fault(mask, *size) for mask, size in zip(masks, sizes, strict=True)]
    faulty = np.array([bool(fault) for fault in faults])
    crowd = np.array([bool(entry.get("iscrowd")) for entry in objects.annotations])
    rle = np.array([isinstance(mask, dict) for mask in masks])
    outlines = [outline(mask, fault) for mask, fault in zip(masks, faults, strict=True)]
    lost = ~rle & [bool(mask) and not kept for mask, kept in zip(masks, outlines, strict=True)]
    outlines = [[] if fault else kept for kept, fault in zip(outlines, faults, strict=True)]
    points = np.fromiter(itertools.chain.from_iterable(itertools.chain.from_iterable(outlines)), float).reshape(-1, 2)
    spans = _spans(points, np.array([sum(map(len, kept)) // 2 for kept in outlines]))
    return [
        (lost, {"training": objects.few, "doubts": 0}, f"has no polygon of 3 points or more, {LEFT_OUT}"),
        (crowd, {"training": len(crowd) - 1, "doubts": objects.many}, IGNORED),
        (faulty & ~crowd, {"masks": 0}, f"has {faults[(faulty & ~crowd).argmax()]}"),
        (faulty & crowd, {"crowd masks": 0}, f"has {faults[(faulty & crowd).argmax()]}"),
        (rle & ~crowd, {"polygons": 0}, "has an RLE mask"),
        _misfit_row(objects, spans, "mask doubts", "has a segmentation more outside than in its bbox"),
    ]


def _keypoint_rows(objects: Objects) -> list[Row]:
    lists = [entry.get("keypoints") or [] for entry in objects.annotations]
    uneven = np.array([*map(len, lists)]) % 3 > 0
    triples = [[] if odd else keypoints for keypoints, odd in zip(lists, uneven.tolist(), strict=True)]
    counts = np.array([*map(len, triples)]) // 3
    points = np.fromiter(itertools.chain.from_iterable(triples), float).reshape(-1, 3)
    wrong = np.array([not {*keypoints[2::3]} <= {0, 1, 2} for keypoints in triples])
    points[points[:, 2] <= 0] = np.nan
    spans = _spans(points[:, :2], counts)
    unseen = (counts > 0) & np.isnan(spans[:, 0])
    return [
        (objects.lacking("keypoints"), {"keypoints": 0}, f"has no 'keypoints', {NEEDED}"),
        (objects.lacking("num_keypoints"), {"keypoints": 0}, f"has no 'num_keypoints', {NEEDED}"),
        (uneven, {"keypoints": 0}, "must have keypoints of three numbers each"),
        (wrong, {"visibility": 0}, "has a keypoint [x, y, visibility] whose visibility is not 0, 1 or 2"),
        (unseen, {"keypoint doubts": len(lists) - 1}, "has only keypoints of visibility 0, as all have"),
        _misfit_row(objects, spans, "keypoint doubts", "has keypoints more outside than in its bbox"),
    ]


def _spans(points: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The boxes (N, 4) around the first ``counts[0]`` of the points (M, 2), the next, ...; NaN around none."""
    spans = np.full((len(counts), 4), np.nan)
    starts = (np.cumsum(counts) - counts)[counts > 0]
    low, high = (bound.reduceat(points, starts).clip(-1e9, 1e9) for bound in (np.fmin, np.fmax))
    spans[counts > 0] = np.hstack([low, high - low])
    return spans


def _misfit_row(objects: Objects, spans: np.ndarray, purpose: str, what: str) -> Row:
    odd = ~np.isnan(spans[:, 0])
    spans, boxes, sizes = spans[odd], objects.boxes[odd], objects.sizes[odd]
    limit = MANY * len(spans)
    odd[odd] = _outside(spans, boxes)
    if odd.sum() > limit:
        readings = {"as given": spans, "y before x": spans[:, [1, 0, 3, 2]], "fractions": spans * np.tile(sizes, 2)}
        scale = _other_scale(spans, sizes)
        form = _other_form({form: _outside(read, boxes) for form, read in readings.items()}, "fit their boxes")
        what += form or (scale and f", and {scale}")
    return odd, {purpose: limit}, what


def _outside(spans: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Tells which spans, widened by a pixel, have less than half of their area in their box."""
    low = np.maximum(spans[:, :2], boxes[:, :2]) - 1
    high = np.minimum(spans[:, :2] + spans[:, 2:], boxes[:, :2] + boxes[:, 2:]) + 1
    return (high - low).clip(0).prod(1) < 0.5 * (spans[:, 2:] + 2).prod(1)


def _misfits(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Boxes of negative size, without area, outside their image, and beyond it by more than a pixel."""
    starts, extents = boxes[:, :2], boxes[:, 2:]
    ends = starts + extents
    negative = (extents < 0).any(1)
    flat = (extents == 0).any(1)
    outside = ~flat & ((starts >= sizes) | (ends <= 0)).any(1)
    beyond = ~(negative | flat | outside) & ((starts < -1) | (ends > sizes + 1)).any(1)
    return negative, flat, outside, beyond


def _other_form(odd: dict[str, np.ndarray], fit: str) -> str:
    """Names another reading of the numbers by which far fewer are odd (N,) than as given; ``fit`` ends the sentence."""
    misfits = {form: int(which.sum()) for form, which in odd.items()}
    form, number = min(misfits, key=misfits.__getitem__), len(odd["as given"])
    if misfits["as given"] < max(2, 0.02 * number) or misfits[form] > misfits["as given"] / 10:
        return ""
    return f"; read as {form}, {number - misfits[form]} of {number} {fit}"


def _other_scale(boxes: np.ndarray, sizes: np.ndarray) -> str:
    if len(boxes) < ENOUGH:
        return ""
    ends = boxes[:, :2] + boxes[:, 2:]
    last = ends.max(0)
    for base in (100, 1000):
        if (last <= base * 1.001).all() and (last > 0.95 * base).all() and (sizes > 1.05 * base).all():
            return f"ends, as all do, at {base} or before, like a part of {base}"
    if ((ends / sizes).max(0) < 0.6).all():
        return "ends, as all do, within 60% of its image, like one of an image of another size"
    return ""


def _twins(objects: Objects) -> np.ndarray:
    """Objects of the class and, to a pixel, the box of an earlier one of their image (N,)."""
    offset = 0.3717  # keeps halves and quarters from where rounding is noise
    boxes = np.floor(objects.boxes.clip(-1e15, 1e15) + offset).astype(int)
    classes = [entry["category_id"] for entry in objects.annotations]
    weights = np.random.default_rng(0).integers(2**62, size=6) | 1
    keys = np.column_stack([objects.images, classes, boxes]) @ weights  # one 64-bit hash a row
    return _repeats(keys)


def _repeats(values: np.ndarray) -> np.ndarray:
    """Tells which values (N,) an earlier one equals."""
    return np.isin(np.arange(len(values)), np.unique(values, return_index=True)[1], invert=True)


def outline(segmentation: list | dict | None, fault: str | None = None) -> list[list[float]]:
    """Lists of x, y, x, y, ...: the polygons that Detectron2 keeps, or two corners of a sound RLE."""
    if not isinstance(segmentation, dict):
        return [polygon for polygon in segmentation or [] if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if fault:
        return []
    rle = segmentation if isinstance(segmentation["counts"], str) else mask_utils.frPyObjects(segmentation, 0, 0)
    x, y, width, height = mask_utils.toBbox(rle).tolist()
    return [[x, y, x + width, y + height]]


def _mask_fault(segmentation: list | dict | None, width: int, height: int) -> str | None:
    if not segmentation:
        return "no segmentation"
    if isinstance(segmentation, list):
        try:
            if math.isfinite(sum(itertools.chain(*segmentation), 0.0)):
                return None
        except (TypeError, OverflowError):  # no number, or an integer beyond the range of floats
            pass
        return f"a polygon with a coordinate that is no finite number: {reprlib.repr(segmentation)}"
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        return f"RLE of the size {size}, which must be [height, width], {[height, width]}"
    if isinstance(counts, str) and not re.fullmatch(f"({RUN})*", counts):
        return f"RLE whose counts are not of COCO's compressed form: {reprlib.repr(counts)}"
    runs = _runs(counts) if isinstance(counts, str) else counts
    if min(runs, default=0) < 0 or sum(runs) != width * height:
        return f"RLE whose counts add up to {sum(runs)}, not to {width * height} pixels"
    return None


def _runs(counts: str) -> list[int]:
    """The lengths of the runs, as pycocotools' ``rleFrString`` reads them."""
    runs = []
    for characters in re.findall(RUN, counts):
        run = sum((ord(character) - 48 & 31) << 5 * place for place, character in enumerate(characters))
        if ord(characters[-1]) - 48 & 16:  # negative
            run -= 1 << 5 * len(characters)
        runs.append(run + runs[-2] if len(runs) > 2 else run)
    return runs
