"""The embedded detection data set: textured geometric shapes with scale variation, occlusion and clutter, COCO format.

Everything is drawn from a seed with integer NumPy arithmetic, so that pixels and boxes are the same on every machine;
OpenCV writes the PNG files, whose byte stream alone may depend on its zlib. Boxes are amodal (the full extent of a
shape, clipped to the image). At least MIN_VISIBLE percent of every shape can be seen: a later shape or occluder that
would hide more is not drawn.
"""

import fcntl
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from repr_det.datasets.drawing import Dice, bar, blob, distractor, far, mix, near, outline, stencil, texture_weights
from repr_det.method.errors import UserError

# What the data set is, and how hard. Any change makes another data set: folders built before are rebuilt on next use.
GENERATOR_VERSION = 2
# Every class has a colour of its own (blue, green, red) that OWN_COLOUR percent of its shapes have, more or less: a cue
# that is learnt in minutes, but neither clutter nor the other shapes respect it.
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
FIRST = {"train_75": ("train", 75)}  # a data set of the first images of a split, which can be overfitted in minutes
IMAGE_SIDES = (160, 184, 208)  # px; height and width are drawn independently
OBJECTS = (3, 6)  # shapes tried an image
SCALES = ((20, 42, 25), (45, 112, 60), (134, 180, 15))  # diameter in px: least, most, percent of the shapes
TURN = 15  # degrees, either way
STRETCH = (72, 100)  # percent: width of a shape across its axis, relative to its length
MIN_VISIBLE = 30  # percent of a shape (its part outside the image included) that nothing hides
LOW_CONTRAST = 15  # percent of the shapes that have nearly the background's colour
PATCHES = (0, 2)  # blobs of nearly the background's colour, behind everything
CLUTTER = (1, 5)  # class-less things behind the shapes: lines, blobs, half discs, long ellipses, L shapes, wedges
OCCLUDERS = (0, 1)  # class-less things in front of them
NOISE = (0, 8)  # amplitude of the pixel noise, in grey levels
BLUR = 25  # percent of the images that are blurred by the 1-2-1 kernel

SEEN_BEFORE_BORDER = 55  # percent of a shape that must lie inside the image
RIM = 35  # percent of the things that have a rim, one pixel wide, of another colour
TRIES = 6  # positions tried for a shape before it is given up
STAMP_NAME = "VERSION"
STAMP_OWNER = "repr_det shapes"
PNG_PARAMS = (cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT)


class _Canvas:
    """The image under construction and, per pixel, the index of the shape that is on top there (-1: none)."""

    def __init__(self, dice: Dice) -> None:
        self.dice = dice
        self.height, self.width = dice.pick(IMAGE_SIDES), dice.pick(IMAGE_SIDES)
        self.base = 64 + dice.octets(3).astype(np.int64) // 2
        self.pixels = np.empty((self.height, self.width, 3), np.int64)
        self.top = np.full((self.height, self.width), -1, np.int64)
        self.full_areas: list[int] = []
        self.objects: list[dict] = []
        weights = texture_weights(dice, self.height, self.width)
        self.pixels[:] = mix(self.base, near(dice, self.base, 0, 30), weights)
        for _ in range(dice.between(*PATCHES)):
            mask = stencil(blob(dice), dice.between(40, 90))
            self.paint(*self.place(mask, self.somewhere()), near(dice, self.base, 5, 45), rim=0)
        y, x = np.ogrid[: self.height, : self.width]
        lights = np.array([dice.between(-40, 40) for _ in range(4)])  # a light that varies over the image
        self.pixels += (lights[0] + (lights[1] * x + lights[2] * y + lights[3] * (x + y) // 2) // 160)[..., None]

    def place(self, mask: np.ndarray, centre: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray]:
        """Return the place of the stencil in the image, and the part of it that is inside."""
        left, up = centre[0] - mask.shape[1] // 2, centre[1] - mask.shape[0] // 2
        x0, y0 = max(left, 0), max(up, 0)
        x1, y1 = min(left + mask.shape[1], self.width), min(up + mask.shape[0], self.height)
        if x1 <= x0 or y1 <= y0:
            return (slice(0, 1), slice(0, 1)), np.zeros((1, 1), bool)
        return (slice(y0, y1), slice(x0, x1)), mask[y0 - up : y1 - up, x0 - left : x1 - left]

    def hides_too_much(self, where: tuple[slice, slice], inside: np.ndarray) -> bool:
        left_over = self.top.copy()
        left_over[where][inside] = -1
        visible = np.bincount(left_over[left_over >= 0], minlength=len(self.full_areas))
        return any(100 * int(v) < MIN_VISIBLE * full for v, full in zip(visible, self.full_areas, strict=True))

    def somewhere(self) -> tuple[int, int]:
        return self.dice.between(0, self.width - 1), self.dice.between(0, self.height - 1)

    def paint(self, where: tuple[slice, slice], inside: np.ndarray, colour: np.ndarray, rim: int = RIM) -> None:
        dice = self.dice
        contrast = dice.pick(((15, 40), (40, 90)))
        patch = self.pixels[where]
        patch[inside] = mix(colour, near(dice, colour, *contrast), texture_weights(dice, *inside.shape)[inside])
        if dice.chance(rim):
            padded = np.pad(inside, 1)
            core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
            patch[inside & ~core] = near(dice, colour, 30, 80)

    def colour(self) -> np.ndarray:
        return near(self.dice, self.base, 12, 40) if self.dice.chance(LOW_CONTRAST) else far(self.dice, self.base)

    def add_shape(self, diameter: int) -> None:
        dice = self.dice
        category = dice.between(1, len(CLASS_NAMES))
        loops = outline(CLASS_NAMES[category - 1])
        mask = stencil(loops, diameter // 2, dice.between(*STRETCH), dice.between(0, 2 * TURN) - TURN)
        full_area = int(mask.sum())
        for _ in range(TRIES):
            where, inside = self.place(mask, self.somewhere())
            area = int(inside.sum())
            if 100 * area < SEEN_BEFORE_BORDER * full_area or self.hides_too_much(where, inside):
                continue
            own = dice.chance(OWN_COLOUR)
            colour = np.array(CLASSES[CLASS_NAMES[category - 1]])
            self.paint(where, inside, near(dice, colour, 0, 30) if own else self.colour())
            self.top[where][inside] = len(self.full_areas)
            self.full_areas.append(full_area)
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            box = [
                where[1].start + int(columns[0]),
                where[0].start + int(rows[0]),
                int(columns[-1] - columns[0]) + 1,
                int(rows[-1] - rows[0]) + 1,
            ]
            self.objects.append({"bbox": box, "category_id": category, "area": area, "iscrowd": 0})
            return

    def add_clutter(self) -> None:
        dice = self.dice
        if dice.chance(50):
            radius = dice.between(8, 90)
            mask = stencil(bar(2 * radius, dice.pick((1, 1, 2, 3, 5))), radius, 100, dice.between(0, 359))
        else:
            mask = stencil(distractor(dice), dice.between(5, 32), dice.between(*STRETCH), dice.between(0, 359))
        where, inside = self.place(mask, self.somewhere())
        if inside.any() and not self.hides_too_much(where, inside):
            self.paint(where, inside, self.colour())
            self.top[where][inside] = -1

    def finish(self) -> np.ndarray:
        pixels = self.pixels
        if self.dice.chance(BLUR):
            for axis in (0, 1):
                edged = np.pad(pixels, [(1, 1) if a == axis else (0, 0) for a in range(3)], "edge")
                before, after = np.delete(edged, (-1, -2), axis), np.delete(edged, (0, 1), axis)
                pixels = (before + 2 * pixels + after + 2) >> 2
        amplitude = self.dice.between(*NOISE)
        noise = self.dice.octets(*pixels.shape).astype(np.int64) * (2 * amplitude + 1) // 256 - amplitude
        return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def _draw(dice: Dice) -> tuple[np.ndarray, list[dict]]:
    canvas = _Canvas(dice)
    for _ in range(dice.between(*CLUTTER)):
        canvas.add_clutter()
    bands = [band for band in SCALES for _ in range(band[2])]
    diameters = [dice.between(*dice.pick(bands)[:2]) for _ in range(dice.between(*OBJECTS))]
    for diameter in sorted(diameters, key=lambda d: d < SCALES[-1][0]):  # the largest ones go to the back
        canvas.add_shape(diameter)
    for _ in range(dice.between(*OCCLUDERS)):
        canvas.add_clutter()
    return canvas.finish(), canvas.objects


def generate_shapes(split_seed: int, num_images: int) -> Iterator[tuple[np.ndarray, list[dict]]]:
    """Draw the first `num_images` images of the split.

    Yields:
        image: uint8 (H, W, 3), BGR, H and W from IMAGE_SIDES
        objects: per shape, in drawing order, {"bbox": [x, y, w, h] int px (amodal, inside the image),
            "category_id": 1-based index into CLASS_NAMES, "area": int px of the shape inside the image,
            hidden ones included, "iscrowd": 0}
    """
    for index in range(num_images):
        yield _draw(Dice(split_seed, index))


# ---- the folder ----


@lru_cache(maxsize=1)
def _stamp() -> str:
    """The content of STAMP_NAME in a finished folder: whose it is, and a digest of what this generator draws."""
    digest = hashlib.sha256(repr(SPLITS).encode())
    for seed, _ in SPLITS.values():
        for image, objects in generate_shapes(seed, 3):
            digest.update(image.tobytes() + json.dumps(objects, sort_keys=True).encode())
    return f"{STAMP_OWNER} {GENERATOR_VERSION} {digest.hexdigest()}\n"


def _is_finished(root: Path) -> bool:
    """Tell whether the folder is that of this generator.

    Raises:
        UserError: it is a file, or holds something else.
    """
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file: the shapes data set needs a folder of its own")
    stamp = root / STAMP_NAME
    text = stamp.read_text(errors="replace") if stamp.is_file() else ""
    if root.is_dir() and any(root.iterdir()) and not text.startswith(STAMP_OWNER):
        raise UserError(f"{root} holds other files: the shapes data set needs an empty or absent folder of its own")
    return text == _stamp()


def _write(folder: Path, progress: bool) -> None:
    start = time.perf_counter()
    (folder / "annotations").mkdir(parents=True)
    categories = [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASS_NAMES, 1)]
    for split, (seed, count) in SPLITS.items():
        (folder / split).mkdir()
        images, annotations = [], []
        for image_id, (image, objects) in enumerate(generate_shapes(seed, count), 1):
            name = f"{image_id:06d}.png"
            (folder / split / name).write_bytes(cv2.imencode(".png", image, PNG_PARAMS)[1].tobytes())
            images.append({"id": image_id, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
            annotations += [{"id": len(annotations) + i, "image_id": image_id, **o} for i, o in enumerate(objects, 1)]
        info = {"description": f"repr_det shapes, version {GENERATOR_VERSION}, {split}"}
        content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content, sort_keys=True))
    (folder / STAMP_NAME).write_text(_stamp())
    if progress:
        total = sum(count for _, count in SPLITS.values())
        print(f"shapes data set: drew {total} images in {time.perf_counter() - start:.0f} s", file=sys.stderr)


_ATTEMPTS = 10  # to take the place of a folder that other processes replace too


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One builder at a time, where the file system can lock a folder (NFS may not)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _swap_in(fresh: Path, root: Path, scratch: Path) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            fresh.rename(root)  # where root is absent or an empty folder
            return
        except OSError:
            if _is_finished(root):  # another process, not locked out, was faster
                return
            with suppress(FileNotFoundError):  # or it is just taking the outdated one away
                root.rename(scratch / f"outdated{attempt}")
    fresh.rename(root)


def build_shapes(root: str | os.PathLike, progress: bool = True) -> Path:
    """Make sure that `root` holds the data set: train/*.png, val/*.png, annotations/{train,val}.json and VERSION.

    It is built in a temporary sibling folder and renamed, so that it is there as a whole or not at all; of several
    processes one builds it and the others wait. A finished folder is reused; one that another version of the
    generator made is replaced.

    Args:
        progress: one line on stderr when it is drawn (in about ten seconds)

    Returns:
        the folder

    Raises:
        UserError: `root` is a file or holds something else, or cannot be written
    """
    root = Path(root).expanduser().resolve()
    try:
        if _is_finished(root):
            return root
        root.parent.mkdir(parents=True, exist_ok=True)
        with _lock(root.parent):
            if not _is_finished(root):
                with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
                    _write(Path(scratch) / "new", progress)
                    _swap_in(Path(scratch) / "new", root, Path(scratch))
    except OSError as error:
        raise UserError(
            f"the shapes data set cannot be written to {root} ({error}): "
            "set DETECTRON2_DATASETS to a folder that can be written"
        ) from error
    return root


def build_part(root: Path, part: str) -> Path:
    """``build_shapes``, and the annotations of a part in FIRST; returns the annotation file."""
    file = build_shapes(root) / "annotations" / f"{part}.json"
    if file.exists():
        return file
    split, number = FIRST[part]
    content = json.loads(file.with_name(f"{split}.json").read_text(encoding="utf-8"))
    content["images"] = content["images"][:number]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in ids]
    with tempfile.TemporaryDirectory(prefix=".", dir=file.parent) as scratch:  # as a whole or not at all
        fresh = Path(scratch) / file.name
        fresh.write_text(json.dumps(content), encoding="utf-8")
        fresh.replace(file)
    return file


# ---- Detectron2 ----


def _load(name: str, root: Path, part: str) -> list[dict]:
    file = build_part(root, part)
    return load_coco_json(str(file), MetadataCatalog.get(name).image_root, name)


def register_shapes(root: str | os.PathLike | None = None) -> None:
    """Register `shapes_train`, its first 75 images as `shapes_train_75`, and `shapes_val` with Detectron2.

    They are drawn when they are first loaded.

    Args:
        root: the data set's folder; by default $DETECTRON2_DATASETS/shapes, or datasets/shapes without that variable.
            Registering again is harmless: without a root the first registration stays.

    Raises:
        UserError: the names are taken, or registered with another root
    """
    given = root
    root = Path(root or os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "shapes")).expanduser().absolute()
    for part in (*SPLITS, *FIRST):
        name = f"shapes_{part}"
        metadata = MetadataCatalog.get(name)
        if name in DatasetCatalog:
            before = metadata.get("shapes_root")
            if before is None or (given is not None and before != str(root)):
                raise UserError(f"data set {name} is already registered with {before or 'other data'}, not with {root}")
            continue
        DatasetCatalog.register(name, partial(_load, name, root, part))
        metadata.set(
            json_file=str(root / "annotations" / f"{part}.json"),
            image_root=str(root / FIRST.get(part, (part,))[0]),
            shapes_root=str(root),
            shapes_part=part,
            evaluator_type="coco",
            thing_classes=list(CLASS_NAMES),
            thing_dataset_id_to_contiguous_id={i: i - 1 for i in range(1, len(CLASS_NAMES) + 1)},
        )
