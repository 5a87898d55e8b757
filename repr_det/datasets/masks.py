"""Faults of the mask of an annotation: polygons, and run-length encodings (RLE) of COCO.

RLE holds the lengths of runs of 0 and 1 in turn, column by column: as a list, or as a string in which every length
takes groups of five bits, lowest first (``rleFrString`` of pycocotools, which does not look where a string ends).
"""

import math

import numpy as np

from repr_det.datasets.findings import as_float, shown


def is_lost(segmentation: object) -> bool:
    """Polygons of which Detectron2 keeps none, so that it leaves the object out."""
    polygons = segmentation if isinstance(segmentation, list) else []
    return bool(polygons) and not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons)


def first_mask_gap(annotations: list[dict], sizes: dict[int | str, tuple[int, int]]) -> str | None:
    """The first mask that cannot be trained or evaluated, and why; what ``schema`` refuses is not looked for.

    Args:
        sizes: image id -> (width, height).
    """
    for annotation in annotations:
        gap = mask_gap(annotation.get("segmentation") or [], sizes[annotation["image_id"]])
        if gap:
            return f"annotation {annotation['id']} has {gap}"
    return None


def mask_gap(value: dict | list, size: tuple[int, int]) -> str | None:
    """Name the reason why polygons or RLE are no mask of an image of ``size`` (width, height), if there is one."""
    if isinstance(value, list):
        for polygon in value:
            if not _all_finite(polygon):
                wrong = next(number for number in polygon if not math.isfinite(as_float(number)))
                return f"a polygon with the coordinate {shown(wrong)}"
        return None
    wanted = [size[1], size[0]]
    if value["size"] != wanted:
        return f"RLE that must have the size [height, width] of its image, {wanted}, got {value['size']!r}"
    counts = value["counts"]
    lengths = _lengths(counts) if isinstance(counts, str) else np.array(counts)
    if lengths is None or (lengths < 0).any():
        return f"RLE whose counts are not of COCO's compressed form: {str(counts)[:40]!r}"
    if lengths.sum() != size[0] * size[1]:
        return f"RLE whose counts add up to {lengths.sum()}, not to the {size[0] * size[1]} pixels of its image"
    return None


def _all_finite(polygon: list) -> bool:
    """Fast, since it is asked of every polygon of a data set."""
    try:
        return all(map(math.isfinite, polygon))
    except (TypeError, OverflowError):  # no number, or an integer beyond the range of floats
        return False


def _lengths(text: str) -> np.ndarray | None:
    """The lengths (N,) of the runs, None where ``text`` is no such string."""
    codes = np.frombuffer(text.encode("latin-1", "replace"), np.uint8).astype(np.int64) - 48
    last = (codes & 32) == 0  # of its group of characters
    if len(codes) and (codes.min() < 0 or codes.max() > 63 or not last[-1]):
        return None
    ends = last.nonzero()[0]
    starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
    place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if len(codes) and place.max() > 6:  # 35 bits: more than any image has pixels
        return None
    values = np.add.reduceat((codes & 31) << (5 * place), starts) if len(codes) else codes
    values = values - np.where(codes[ends] & 16, 1 << (5 * (place[ends] + 1)), 0)
    for first in (1, 2):  # from the fourth on, each is the difference to the one before the last
        values[first::2] = values[first::2].cumsum()
    return values
