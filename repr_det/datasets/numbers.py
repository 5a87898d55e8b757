"""Numbers of annotations that cannot be: boxes beside their images or twice, areas that are not those of boxes."""

from typing import Any, NamedTuple

import numpy as np

from repr_det.datasets.findings import MANY, Findings, allowed, as_float, shown

ENOUGH = 50  # boxes from which on one says something of all of them
LARGEST_AREA = 1e10  # in px: pycocotools ignores larger objects, and those of negative area
LEAST_AREA, SMALL_AREA = 0.001, 0.02  # shares of its box that no object, and only few objects, have less of
LARGEST_SHARE = 1.1  # of its box, that no object has more of
RIGHT_AREA = "the object's area in pixels, or width * height"


class Columns(NamedTuple):
    """Annotations as arrays.

    Attributes:
        boxes: (N, 4), as they are given.
        sizes: width and height of each annotation's image (N, 2).
        areas: (N,), NaN for an object without one.
    """

    annotations: list[dict[str, Any]]
    boxes: np.ndarray
    sizes: np.ndarray
    areas: np.ndarray


def columns(annotations: list[dict[str, Any]], image_sizes: dict[int | str, tuple[int, int]]) -> Columns:
    """Puts the numbers of annotations, which have the types of ``schema``, into arrays."""
    boxes = np.array([annotation["bbox"] for annotation in annotations], float).reshape(-1, 4)
    sizes = np.array([image_sizes[annotation["image_id"]] for annotation in annotations], float).reshape(-1, 2)
    return Columns(annotations, boxes, sizes, np.array([as_float(a.get("area")) for a in annotations], float))


def check_boxes(objects: Columns, findings: Findings) -> None:
    """Looks at boxes as the model and the evaluator will: [x, y, width, height] in pixels of their images.

    Raises:
        UserError: boxes that cannot be used; what may be meant is a warning.
    """
    annotations, boxes, sizes, _ = objects
    total = len(boxes)
    if not total:
        return
    negative, flat, outside, beyond = _misfits(boxes, sizes)
    useless, fractions = flat | outside, ~flat & (boxes <= 1.001).all(1) & (sizes > 2).all(1)
    hint = _other_form(boxes, sizes)

    def first_of(which: np.ndarray) -> tuple[str, str, str]:
        number = int(which.argmax())
        annotation, size = annotations[number], "{:.0f}x{:.0f}".format(*sizes[number])
        image = f"image {annotation['image_id']!r}, which is {size}"
        return f"annotation {annotation['id']}", _short(annotation["bbox"]), image

    if negative.any():
        label, box, _ = first_of(negative)
        findings.fail(f"{label} has a bbox of negative size: {box} is read as [x, y, width, height]")
    label, box, image = first_of(useless)
    what = f"{label} has a bbox without area: {box} is read as [x, y, width, height]"
    if outside[useless.argmax()]:
        what = f"{label} has a bbox outside its {image}: {box}{hint}"
    findings.leave_aside(int(useless.sum()), total, what, "boxes")
    if fractions.sum() > allowed(total):
        label, box, image = first_of(fractions)
        report = findings.fail if fractions.sum() > MANY * total else findings.warn
        report(
            f"{label} has a bbox of a pixel or less, {box}, in {image} ({fractions.sum()} such boxes of {total}): give "
            "boxes in pixels, not as fractions of the image"
        )
    if beyond.sum() > MANY * total or (beyond.any() and hint):
        label, box, _ = first_of(beyond)
        findings.warn(
            f"{beyond.sum()} of {total} boxes reach beyond their image (the first is {label}: {box}), and Detectron2 "
            f"clips them{hint or ': a bbox must be [x, y, width, height], not two corners'}"
        )
    elif total >= ENOUGH:
        _warn_of_another_scale(boxes[:, :2] + boxes[:, 2:], sizes, findings)


def _misfits(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Boxes of negative size, without area, outside their image, and reaching beyond it by more than a pixel."""
    starts, extents = boxes[:, :2], boxes[:, 2:]
    ends = starts + extents
    negative = (extents < 0).any(1)
    flat = (extents == 0).any(1)
    outside = ~flat & ((starts >= sizes) | (ends <= 0)).any(1)
    beyond = ~(negative | flat | outside) & ((starts < -1) | (ends > sizes + 1)).any(1)
    return negative, flat, outside, beyond


def _short(box: list[float]) -> str:
    return f"[{', '.join(f'{value:.6g}' for value in box)}]"


def _other_form(boxes: np.ndarray, sizes: np.ndarray) -> str:
    """Names another reading of the four numbers under which the boxes fit their images much better, if there is one."""
    as_given = _number_of_misfits(boxes, sizes)
    if as_given < max(2, 0.02 * len(boxes)):
        return ""
    first, second = boxes[:, :2], boxes[:, 2:]
    readings = {
        "two corners [x1, y1, x2, y2]": np.hstack([first, second - first]),
        "[centre x, centre y, width, height]": np.hstack([first - second / 2, second]),
        "[y, x, height, width]": boxes[:, [1, 0, 3, 2]],
    }
    misfits = {form: _number_of_misfits(read, sizes) for form, read in readings.items()}
    form = min(misfits, key=misfits.__getitem__)
    if misfits[form] > as_given / 10:
        return ""
    fit = f"{len(boxes) - misfits[form]} of {len(boxes)}"
    return f"; read as {form}, {fit} boxes fit their images: a bbox must be [x, y, width, height]"


def _number_of_misfits(boxes: np.ndarray, sizes: np.ndarray) -> int:
    return int(np.any(_misfits(boxes, sizes), axis=0).sum())


def _warn_of_another_scale(ends: np.ndarray, sizes: np.ndarray, findings: Findings) -> None:
    """Says that no box comes near the far sides of its image, or that all end at a round number."""
    reach, last = (ends / sizes).max(0), ends.max(0)
    for base in (100, 1000):
        if (last <= base * 1.001).all() and (last > 0.95 * base).all() and (sizes > 1.05 * base).all():
            findings.warn(
                f"all {len(ends)} boxes end at {base} or before in images of any size: they look like parts of {base}, "
                "and must be in pixels"
            )
            return
    if (reach < 0.6).all():
        findings.warn(
            f"none of {len(ends)} boxes reaches beyond {reach[0]:.0%} of the width and {reach[1]:.0%} of the height "
            "of its image: they look like boxes for images of another size"
        )


def warn_of_twins(objects: Columns, findings: Findings) -> None:
    """Says how many objects have the class and, to a pixel, the box of another one of their image."""
    annotations = objects.annotations
    offset = 0.3717  # so that coordinates as halves and quarters do not lie where rounding is a matter of noise
    numbers: dict[int | str, int] = {}
    keys = np.empty((len(annotations), 6), np.int64)
    keys[:, 0] = [numbers.setdefault(annotation["image_id"], len(numbers)) for annotation in annotations]
    keys[:, 1] = [annotation["category_id"] % 2**62 for annotation in annotations]
    keys[:, 2:] = np.floor(objects.boxes.clip(-1e15, 1e15) + offset)
    weights = np.random.default_rng(0).integers(1, 2**62, 6) | 1
    _, first, group = np.unique((keys * weights).sum(1), return_index=True, return_inverse=True)
    twins = np.arange(len(keys)) != first[group]
    if twins.sum() > allowed(len(keys)):
        number = int(twins.argmax())
        one, other = annotations[first[group[number]]], annotations[number]
        findings.warn(
            f"{twins.sum()} of {len(keys)} objects are there twice, with the class and the box of another one of their "
            f"image (the first: annotations {one['id']} and {other['id']}, {_short(one['bbox'])} in image "
            f"{one['image_id']!r}): training and evaluation count each, so list an object once"
        )


def evaluation_gap(objects: Columns) -> str | None:
    """Names what keeps COCO evaluation, but not training, from working: iscrowd or area absent, areas that cannot be.

    COCO evaluation ignores objects of negative or enormous area.
    """
    for key, right in (("area", RIGHT_AREA), ("iscrowd", "0 for a single object")):
        absent = [entry["id"] for entry in objects.annotations if entry.get(key) is None]
        if absent:
            return (
                f"{len(absent)} annotations have no '{key}', which COCO evaluation needs ({right}); the first is "
                f"{absent[0]}"
            )
    areas = objects.areas
    for which, limit, what in (
        (np.isnan(areas), 0, "must have a finite number as 'area'"),
        ((areas < 0) | (areas > LARGEST_AREA), allowed(len(areas)), "has an 'area' that COCO evaluation ignores"),
    ):
        if which.sum() > limit:
            return _first_area(objects, which, what)
    return None


def area_doubt(objects: Columns) -> str | None:
    """Names areas that cannot be those of their boxes: COCO evaluation goes by them what is small, medium and large."""
    areas, extents = objects.areas, objects.boxes[:, 2:]
    share = areas / extents.prod(1).clip(1e-9)
    impossible = (share < LEAST_AREA) | (areas > LARGEST_SHARE * (extents + 1).prod(1))
    for odd, limit in ((impossible, allowed(len(areas))), (impossible | (share < SMALL_AREA), MANY * len(areas))):
        if odd.sum() > limit:
            what = "has an 'area' that cannot be that of its bbox, and APs, APm and APl go by it"
            return _first_area(objects, odd, what)
    return None


def _first_area(objects: Columns, which: np.ndarray, what: str) -> str:
    first = objects.annotations[int(which.argmax())]
    return (
        f"annotation {first['id']} {what}: {shown(first['area'])} with the bbox {_short(first['bbox'])} ({which.sum()} "
        f"such of {len(which)}); give {RIGHT_AREA}"
    )
