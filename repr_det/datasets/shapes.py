"""The embedded data set: textured geometric shapes with scale variation, occlusion and clutter, in COCO format.

Integer arithmetic: pixels and boxes are the same on every machine. Boxes are amodal: the full extent of a shape,
clipped to the image.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock

from repr_det.method.errors import UserError

# Any change below needs another STAMP: older folders are rebuilt on next use.
STAMP_OWNER = "repr_det shapes"
STAMP = f"{STAMP_OWNER} 2 1233e76b4287e1380e500d8f5e2d4ffead26a1a659603ead6704247e9bc723c3\n"
# Colours (BGR) of OWN_COLOUR percent of the shapes: a cue that is learnt in minutes, but others have them too.
CLASSES = {
    "circle": (40, 40, 220),
    "square": (60, 190, 40),
    "triangle": (220, 90, 40),
    "star": (30, 210, 230),
    "cross": (200, 40, 200),
    "ring": (210, 200, 40),
}
CLASS_NAMES = tuple(CLASSES)
OWN_COLOUR = 75
SPLITS = {"train": (1, 600), "val": (2, 150)}  # split seed, number of images
# Split and its first images; 75 are overfitted in minutes.
PARTS = {"train": ("train", 600), "train_75": ("train", 75), "val": ("val", 150)}
IMAGE_SIDES = (160, 184, 208)  # px
OBJECTS = (3, 6)  # shapes tried an image
SCALES = ((20, 42, 25), (45, 112, 60), (134, 180, 15))  # diameter in px, percent of the shapes
TURN = 15  # degrees, either way
STRETCH = (72, 100)  # percent: width of a shape relative to its length
MIN_VISIBLE = 30  # percent of a shape that nothing hides
LOW_CONTRAST = 15  # percent of the shapes, nearly of the background's colour
PATCHES = (0, 2)  # of nearly that colour, behind everything
CLUTTER = (1, 5)  # class-less things behind the shapes
OCCLUDERS = (0, 1)  # and in front of them
NOISE = (0, 8)  # amplitude of the noise, in grey levels
BLUR = 25  # percent of the images, by the 1-2-1 kernel
SEEN_BEFORE_BORDER = 55  # percent of a shape inside the image
RIM = 35  # percent of the things, one pixel wide
TRIES = 6  # positions for a shape

TEXTURES = ("solid", "solid", "stripes", "checker", "dots", "noise", "gradient")
ONE = 4096  # fixed point of the unit circle
SUBPIXELS = 16  # steps a pixel for corners of outlines
SINE = np.rint(ONE * np.sin(np.radians(np.arange(360)))).astype(np.int64)
QUARTER = np.array([[0, 1], [-1, 0]])  # a turn by 90 degrees
Loops = list[np.ndarray]  # closed outlines: corners (x, y) in the unit circle, in fixed point
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_PNG = (cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT)
Place = tuple[slice, slice]


class Dice:
    """Random integers from the raw stream of PCG64, which NumPy keeps fixed, unlike Generator's."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(list(key))

    def between(self, low: int, high: int) -> int:
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def chance(self, percent: int) -> bool:
        return self.between(0, 99) < percent

    def pick(self, options: Sequence) -> Any:
        return options[self.between(0, len(options) - 1)]

    def octets(self, *shape: int) -> np.ndarray:
        count = math.prod(shape)
        raw = self._bits.random_raw(-(-count // 8)).astype("<u8")
        return raw.view(np.uint8)[:count].reshape(shape).astype(np.int64)


def _polar(radius: int | np.ndarray, degrees: np.ndarray) -> np.ndarray:
    cosine, sine = SINE[(degrees + 90) % 360], SINE[degrees % 360]
    return np.stack([radius * cosine // ONE, radius * sine // ONE], 1)


def _regular(corners: int, radius: int | np.ndarray = ONE) -> np.ndarray:
    return _polar(radius, 360 * np.arange(corners) // corners)


def _cross() -> np.ndarray:
    half, tip = ONE * 3 // 10, ONE * 19 // 20
    arm = np.array([(tip, -half), (tip, half), (half, half)])
    return np.concatenate([arm @ np.linalg.matrix_power(QUARTER, turns) for turns in range(4)])


OUTLINES: dict[str, Loops] = {  # of the classes
    "circle": [_regular(60)],
    "square": [_regular(4)],
    "triangle": [_regular(3)],
    "star": [_regular(10, np.array([ONE, ONE * 2 // 5] * 5))],
    "cross": [_cross()],
    "ring": [_regular(60), _regular(60, ONE * 11 // 20)],
}


def blob(dice: Dice) -> Loops:
    corners = dice.between(7, 11)
    return [_regular(corners, np.array([dice.between(ONE * 2 // 5, ONE) for _ in range(corners)]))]


def distractor(dice: Dice) -> Loops:
    """The outline of something close to a class."""
    kind = dice.pick(("blob", "half disc", "ellipse", "L", "wedge"))
    if kind == "blob":
        return blob(dice)
    if kind == "half disc":
        return [_polar(ONE, 10 * np.arange(19))]
    if kind == "ellipse":
        return [_regular(48) * (5, 2) // 5]
    if kind == "wedge":
        return [np.array([(ONE, 0), (-ONE, ONE // 5), (-ONE, -ONE // 5)])]
    end = ONE * 7 // 10
    bend = dice.between(3, 8) * end // 10 - end
    return [np.array([(-end, -end), (bend, -end), (bend, -bend), (end, -bend), (end, end), (-end, end)])]


def stencil(loops: Loops, radius: int, stretch: int = 100, degree: int = 0) -> np.ndarray:
    """The loops, stretched (percent), turned and scaled: a centred (2 * radius + 3, 2 * radius + 3) bool array of the
    pixels whose centre is inside (even-odd rule). cv2.fillPoly differs between OpenCV 4.5, 4.8 and 4.12."""
    side = 2 * radius + 3
    sine, cosine = SINE[degree % 360], SINE[(degree + 90) % 360]
    toggles = np.zeros((side, side + 1), bool)  # where a line enters or leaves the shape
    for loop in loops:
        turned = loop * (100, stretch) // 100 @ np.array([[cosine, sine], [-sine, cosine]])
        corners = (turned * radius * SUBPIXELS // ONE**2 + (radius + 1) * SUBPIXELS).tolist()
        for start, end in zip(corners, corners[1:] + corners[:1], strict=True):
            (ax, ay), (bx, by) = (start, end) if start[1] <= end[1] else (end, start)
            rows = np.arange(-(-ay // SUBPIXELS), -(-by // SUBPIXELS))
            numerator = ax * (by - ay) + (rows * SUBPIXELS - ay) * (bx - ax)
            toggles[rows, -(-numerator // (max(1, by - ay) * SUBPIXELS))] ^= True
    return np.logical_xor.accumulate(toggles, axis=1)[:, :side]


def near(dice: Dice, colour: np.ndarray, low: int, high: int) -> np.ndarray:
    """The colour, each channel moved by `low` to `high` grey levels."""
    steps = [dice.between(low, high) * dice.pick((-1, 1)) for _ in range(3)]
    return np.clip(colour + np.array(steps), 0, 255)


def far(dice: Dice, colour: np.ndarray) -> np.ndarray:
    """A random colour at an L1 distance of at least 150."""
    other = dice.octets(3)
    while np.abs(other - colour).sum() < 150:
        other = dice.octets(3)
    return other


def texture(dice: Dice, height: int, width: int) -> np.ndarray:
    """(height, width) int64: the share of a second colour, 0 to 256."""
    kind = dice.pick(TEXTURES)
    period = dice.between(3, 9)
    y, x = np.ogrid[:height, :width]
    if kind == "stripes":
        across, down = dice.pick(((1, 0), (0, 1), (1, 1), (1, -1), (2, 1), (1, 2)))
        return ((across * x + down * y) // period & 1) * 256
    if kind == "checker":
        return ((x // period + y // period) & 1) * 256
    if kind == "dots":
        half = period // 2
        return ((x % period - half) ** 2 + (y % period - half) ** 2 <= (period // 3) ** 2) * 256
    if kind == "noise":
        block = dice.between(1, 3)
        coarse = dice.octets(-(-height // block), -(-width // block))
        return np.kron(coarse, np.ones((block, block), np.int64))[:height, :width]
    if kind == "gradient":
        across, down = dice.pick(((1, 0), (0, 1), (1, 1)))
        return (across * x + down * y) * 256 // (across * width + down * height)
    return np.zeros((height, width), np.int64)


def mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    return (first * (256 - share[..., None]) + second * share[..., None]) >> 8


class _Canvas:
    """The image under construction and, per pixel, the index of the shape on top (-1: none)."""

    def __init__(self, dice: Dice) -> None:
        self.dice = dice
        self.height, self.width = dice.pick(IMAGE_SIDES), dice.pick(IMAGE_SIDES)
        self.base = 64 + dice.octets(3) // 2
        self.top = np.full((self.height, self.width), -1)
        self.full_areas: list[int] = []
        self.objects: list[dict] = []
        shares = texture(dice, self.height, self.width)
        self.pixels = mix(self.base, near(dice, self.base, 0, 30), shares)
        for _ in range(dice.between(*PATCHES)):
            mask = stencil(blob(dice), dice.between(40, 90))
            self.paint(*self.place(mask), near(dice, self.base, 5, 45), rim=0)
        y, x = np.ogrid[: self.height, : self.width]
        light, right, down, both = (dice.between(-40, 40) for _ in range(4))  # it varies over the image
        self.pixels += (light + (right * x + down * y + both * (x + y) // 2) // 160)[..., None]

    def place(self, mask: np.ndarray) -> tuple[Place, np.ndarray]:
        """A random place of the stencil, and its part inside the image."""
        left = self.dice.between(0, self.width - 1) - mask.shape[1] // 2
        up = self.dice.between(0, self.height - 1) - mask.shape[0] // 2
        rows = slice(max(up, 0), min(up + mask.shape[0], self.height))
        columns = slice(max(left, 0), min(left + mask.shape[1], self.width))
        return (rows, columns), mask[rows.start - up : rows.stop - up, columns.start - left : columns.stop - left]

    def hides_too_much(self, where: Place, inside: np.ndarray) -> bool:
        left_over = self.top.copy()
        left_over[where][inside] = -1
        visible = np.bincount(left_over[left_over >= 0], minlength=len(self.full_areas))
        return bool((100 * visible < MIN_VISIBLE * np.array(self.full_areas)).any())

    def paint(self, where: Place, inside: np.ndarray, colour: np.ndarray, rim: int = RIM) -> None:
        dice = self.dice
        patch = self.pixels[where]
        other = near(dice, colour, *dice.pick(((15, 40), (40, 90))))
        patch[inside] = mix(colour, other, texture(dice, *inside.shape)[inside])
        if dice.chance(rim):
            core = cv2.erode(inside.astype(np.uint8), _CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=0)
            patch[inside & (core == 0)] = near(dice, colour, 30, 80)

    def colour(self) -> np.ndarray:
        return near(self.dice, self.base, 12, 40) if self.dice.chance(LOW_CONTRAST) else far(self.dice, self.base)

    def add_shape(self, diameter: int) -> None:
        dice = self.dice
        category = dice.between(1, len(CLASS_NAMES))
        name = CLASS_NAMES[category - 1]
        mask = stencil(OUTLINES[name], diameter // 2, dice.between(*STRETCH), dice.between(0, 2 * TURN) - TURN)
        for _ in range(TRIES):
            where, inside = self.place(mask)
            area = int(inside.sum())
            if 100 * area < SEEN_BEFORE_BORDER * mask.sum() or self.hides_too_much(where, inside):
                continue
            self.paint(where, inside, near(dice, CLASSES[name], 0, 30) if dice.chance(OWN_COLOUR) else self.colour())
            self.top[where][inside] = len(self.full_areas)
            self.full_areas.append(int(mask.sum()))
            x, y, width, height = cv2.boundingRect(inside.astype(np.uint8))
            box = [where[1].start + x, where[0].start + y, width, height]
            self.objects.append({"bbox": box, "category_id": category, "area": area, "iscrowd": 0})
            return

    def add_clutter(self) -> None:
        dice = self.dice
        if dice.chance(50):
            radius = dice.between(8, 90)
            half = ONE * dice.pick((1, 1, 2, 3, 5)) // (2 * radius)  # of its thickness
            bar = np.array([(ONE, half), (-ONE, half), (-ONE, -half), (ONE, -half)])
            mask = stencil([bar], radius, 100, dice.between(0, 359))
        else:
            mask = stencil(distractor(dice), dice.between(5, 32), dice.between(*STRETCH), dice.between(0, 359))
        where, inside = self.place(mask)
        if inside.any() and not self.hides_too_much(where, inside):
            self.paint(where, inside, self.colour())
            self.top[where][inside] = -1

    def finish(self) -> np.ndarray:
        pixels = self.pixels
        if self.dice.chance(BLUR):
            for _ in ("down", "across"):
                edged = np.pad(pixels, ((1, 1), (0, 0), (0, 0)), "edge")
                pixels = ((edged[:-2] + 2 * pixels + edged[2:] + 2) >> 2).swapaxes(0, 1)
        amplitude = self.dice.between(*NOISE)
        noise = self.dice.octets(*pixels.shape) * (2 * amplitude + 1) // 256 - amplitude
        return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def generate_shapes(split_seed: int, num_images: int) -> Iterator[tuple[np.ndarray, list[dict]]]:
    """Draw the first `num_images` images of the split.

    Yields:
        image: uint8 (H, W, 3), BGR
        objects: per shape {"bbox": [x, y, w, h] int px, "category_id": 1-based index into CLASS_NAMES, "area": int px
            inside the image, hidden ones included, "iscrowd": 0}
    """
    for index in range(num_images):
        dice = Dice(split_seed, index)
        canvas = _Canvas(dice)
        for _ in range(dice.between(*CLUTTER)):
            canvas.add_clutter()
        bands = [band for band in SCALES for _ in range(band[2])]
        diameters = [dice.between(*dice.pick(bands)[:2]) for _ in range(dice.between(*OBJECTS))]
        for diameter in sorted(diameters, key=lambda d: d < SCALES[-1][0]):  # the largest ones go to the back
            canvas.add_shape(diameter)
        for _ in range(dice.between(*OCCLUDERS)):
            canvas.add_clutter()
        yield canvas.finish(), canvas.objects


def annotation_file(root: Path, part: str) -> Path:
    return root / "annotations" / f"{part}.json"


def build_shapes(root: str | os.PathLike) -> Path:
    """Make sure that `root` holds the data set: train/*.png, val/*.png, annotations/*.json and VERSION.
    One of several processes draws it, as a whole or not at all, also in place of another version. UserError if `root`
    holds something else, or cannot be written."""
    root = Path(root).expanduser().resolve()
    if _is_finished(root):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f".{root.name}.lock")):
            if not _is_finished(root):  # meanwhile
                _build(root)
    except OSError as error:
        raise UserError(
            f"the shapes data set cannot be written to {root} ({error}): "
            "empty it, or set DETECTRON2_DATASETS to another folder"
        ) from error
    return root


def _stamp(root: Path) -> str:
    try:
        return (root / "VERSION").read_text(errors="replace")
    except OSError:
        return ""


def _is_finished(root: Path) -> bool:
    return _stamp(root) == STAMP and all(annotation_file(root, part).is_file() for part in PARTS)


def _build(root: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        fresh = Path(scratch) / "new"
        _write(fresh)
        if _stamp(root).startswith(STAMP_OWNER):
            root.rename(Path(scratch) / "outdated")
        fresh.rename(root)  # fails if other data are there
    print(f"shapes data set: drawn in {root}", file=sys.stderr)


def _write(root: Path) -> None:
    categories = [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASS_NAMES, 1)]
    (root / "annotations").mkdir(parents=True)
    for split, (seed, count) in SPLITS.items():
        (root / split).mkdir()
        images, annotations = [], []
        for image_id, (image, objects) in enumerate(generate_shapes(seed, count), 1):
            name = f"{image_id:06d}.png"
            (root / split / name).write_bytes(cv2.imencode(".png", image, _PNG)[1].tobytes())
            images.append({"id": image_id, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
            annotations += [{"id": len(annotations) + i, "image_id": image_id, **o} for i, o in enumerate(objects, 1)]
        info = {"description": f"repr_det shapes, version 2, {split}"}
        for part, (of, number) in PARTS.items():
            if of == split:
                some = [annotation for annotation in annotations if annotation["image_id"] <= number]
                content = {"info": info, "images": images[:number], "annotations": some, "categories": categories}
                annotation_file(root, part).write_text(json.dumps(content, sort_keys=True))
    (root / "VERSION").write_text(STAMP)
