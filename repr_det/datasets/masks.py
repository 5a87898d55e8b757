"""What may be wrong with the mask of an annotation: polygons, and run-length encodings (RLE) of COCO.

RLE holds the lengths of runs of 0 and 1 in turn, column by column: as a list, or as a string in which every length
takes groups of five bits, lowest first (``rleFrString`` of pycocotools, which does not look where a string ends).
"""

import numpy as np


def is_segmentation(value: object) -> bool:
    """Whether Detectron2 and pycocotools can read ``value`` as polygons or RLE, whatever these say."""
    if isinstance(value, dict):
        size, counts = value.get("size"), value.get("counts")
        whole = isinstance(size, list) and len(size) == 2 and all(map(_is_count, size))
        return whole and (isinstance(counts, str) or (isinstance(counts, list) and all(map(_is_count, counts))))
    return not value or (isinstance(value, list) and all(isinstance(polygon, list) for polygon in value))


def is_polygon(value: list) -> bool:
    """Which polygons Detectron2 keeps."""
    return len(value) >= 6 and len(value) % 2 == 0


def mask_gap(value: dict | list, size: tuple[int, int]) -> str | None:
    """Why what ``is_segmentation`` is no mask of an image of ``size`` (width, height)."""
    if isinstance(value, list):
        wrong = (number for polygon in value for number in polygon if not _is_number(number))
        return next((f"a polygon with the coordinate {number!r}" for number in wrong), None)
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


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and bool(np.isfinite(value))
