"""Image files: checked before a run, and named when one cannot be read in the middle of it."""

import filecmp
import hashlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.data.detection_utils import SizeMismatchError, read_image
from PIL import Image

from repr_det.datasets.causes import kind_of, meant_file
from repr_det.datasets.findings import Findings
from repr_det.method.errors import UserError

MAX_HEADERS = 2000  # image files whose header is read, evenly spread over the data set; all are checked for existence
DECODED_BYTES = 50_000_000  # data sets with image files of no more than this are decoded: a second or two
LOOKED_AT = 32  # image files of a larger data set that are decoded, evenly spread
LOOKED_FOR = 1000  # images of a test set that are looked for among those of a training set
DARK = 64  # an image without a value of this or more is compared with what its file holds
BLACK = 16  # a data set without a value of this or more, of 255, is nearly black to the model
EXIF_ORIENTATION = 274
TRANSPOSED = (5, 6, 7, 8)  # orientations that swap width and height


class ImageFile(NamedTuple):
    """An image file as the file system knows it; ``identity`` is one number for all names of a file."""

    path: str
    size: int
    identity: tuple[int, int]


def check_image_files(
    images: list[dict], image_root: Path, decode: bool, max_headers: int, findings: Findings
) -> list[ImageFile]:
    """Image files are there and not empty, and those that are opened are what the json says as the model will see them.

    Args:
        images: the json's, with id, file_name, width and height.
        decode, max_headers: see ``coco_format.check_coco_format``.

    Raises:
        UserError: one line that names the file.
    """
    if not image_root.is_dir():
        what = "is not a folder" if image_root.exists() else "does not exist"
        raise UserError(f"{findings.prefix}image folder {image_root} {what}")
    files = _find_files(images, image_root, findings)
    small = sum(file.size for file in files) <= DECODED_BYTES
    _warn_of_repeats(images, files, small, findings)
    opened = min(len(images), max_headers)
    decoded, brightest = 0, 0
    for i in range(opened):
        number = i * len(images) // opened
        image, path = images[number], files[number].path
        try:
            size = _size_in_header(path, (image["width"], image["height"]))
            if decode or small or i % (opened // LOOKED_AT + 1) == 0:
                pixels = _as_the_model_sees(path)
                size, decoded, brightest = pixels.shape[1::-1], decoded + 1, max(brightest, int(pixels.max()))
        except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, DecompressionBombError, ...
            kind, text = kind_of(path), " ".join(str(error).split())
            reason = f"it {kind}" if kind else text or type(error).__name__
            raise UserError(f"{findings.prefix}{path} cannot be read as an image: {reason}") from error
        if size != (image["width"], image["height"]):
            findings.fail(
                f"image {image['id']!r} must have the file's width and height {size[0]}x{size[1]} (EXIF orientation "
                f"applied), got {image['width']}x{image['height']} for '{image['file_name']}'"
            )
    if decoded and brightest < BLACK:
        findings.warn(
            f"the model would see nearly black images, with values up to {brightest} of 255 in {decoded} of them (the "
            f"first is {files[0].path}): scale their pixels to 0..255"
        )
    return files


def _find_files(images: list[dict], image_root: Path, findings: Findings) -> list[ImageFile]:
    missing, empty, files = [], [], []
    for image in images:
        path = os.path.join(image_root, image["file_name"])
        try:
            state = os.stat(path)
        except (OSError, ValueError):
            missing.append(image["file_name"])
            continue
        files.append(ImageFile(path, state.st_size, (state.st_dev, state.st_ino)))
        if state.st_size == 0:
            empty.append(image["file_name"])
    for names, what in ((missing, "missing"), (empty, "empty (0 bytes)")):
        if names:
            share = f"{len(names)} of {len(images)} image files"
            hint = meant_file(image_root, names[0]) if names is missing else None
            findings.fail(
                f"{share} are {what} in {image_root}; the first is '{names[0]}'" + (f" ({hint})" if hint else "")
            )
    return files


def _warn_of_repeats(images: list[dict], files: list[ImageFile], by_content: bool, findings: Findings) -> None:
    """Says how many entries name an image that an earlier entry has, under this or another name."""
    sizes = Counter(file.size for file in files)
    first: dict[object, int] = {}
    repeats = []
    for number, file in enumerate(files):
        key: object = file.identity
        if by_content and sizes[file.size] > 1 and os.path.isfile(file.path):
            key = hashlib.sha256(Path(file.path).read_bytes()).digest()
        if first.setdefault(key, number) != number:
            repeats.append((first[key], number))
    if repeats:
        one, other = (images[number] for number in repeats[0])
        findings.warn(
            f"{len(repeats)} of {len(files)} entries of 'images' repeat the image of another one (the first: "
            f"{one['id']!r}, '{one['file_name']}', and {other['id']!r}, '{other['file_name']}'): each is trained on "
            "and evaluated with its own objects alone, so give an image one entry with all of its objects"
        )


def shared_images(train: list[ImageFile], test: list[ImageFile]) -> tuple[list[tuple[str, str]], int]:
    """Finds images of ``test`` that are in ``train`` too: the same file, or another one with the same content.

    Of a large ``test`` an evenly spread part is looked at, and not many more than MAX_HEADERS files are read.

    Returns:
        pairs of paths, in train and test; how many images of test were looked at
    """
    by_identity = {file.identity: file for file in train}
    by_size: dict[int, list[ImageFile]] = {}
    for file in train:
        by_size.setdefault(file.size, []).append(file)
    some = test[:: len(test) // LOOKED_FOR + 1]
    pairs, budget = [], MAX_HEADERS
    for file in some:
        twin = by_identity.get(file.identity)
        if twin is None:
            alike = by_size.get(file.size, [])[:budget]
            budget -= len(alike)
            twin = next((other for other in alike if filecmp.cmp(other.path, file.path, shallow=False)), None)
        if twin is not None:
            pairs.append((twin.path, file.path))
    return pairs, len(some)


def _as_the_model_sees(path: str) -> np.ndarray:
    """The pixels (H, W, 3) as Detectron2 decodes them.

    Raises:
        ValueError: the file holds more than eight bits a channel, and Detectron2 keeps none but zeros.
    """
    pixels = read_image(path, "RGB")
    if pixels.max() < DARK:
        stored = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        if stored is not None and stored.dtype.itemsize > 1:
            raise ValueError(
                f"its pixels have more than 8 bits, with values up to {stored.max()}, and Detectron2 keeps the upper 8 "
                f"of 16 bits: the model would see values up to {pixels.max()} of 255; convert it to 8 bits"
            )
    return pixels


def _size_in_header(path: str, expected: tuple[int, int]) -> tuple[int, int]:
    """(width, height) after the EXIF orientation.

    Raises:
        ValueError: the pixels have more than eight bits, and Detectron2 would clip them.
    """
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(
                f"its pixels have more than 8 bits (mode {image.mode}), which Detectron2 would clip to 0..255; convert "
                "it to 8 bits"
            )
        if image.format == "PNG" and "exif" not in image.info and image.size == expected:
            return image.size  # asking this file for EXIF data would decode it
        try:
            orientation = image.getexif().get(EXIF_ORIENTATION)
        except Exception:  # damaged EXIF data; Detectron2 ignores them too
            orientation = None
        return image.size[::-1] if orientation in TRANSPOSED else image.size


class NamingMapper:
    """A mapper of Detectron2 data sets whose errors name the image file.

    Args:
        mapper: for example a DatasetMapper.

    Raises:
        UserError: when called with a record whose image cannot be read.
    """

    def __init__(self, mapper: Callable[[dict], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: dict[str, Any]) -> Any:
        try:
            return self.mapper(record)
        except (OSError, SyntaxError, ValueError, cv2.error) as error:  # what Pillow, Detectron2 and OpenCV raise
            reason = " ".join(str(error).split()) or type(error).__name__
            name = record.get("file_name", f"image {record.get('image_id')}")
            if not isinstance(error, SizeMismatchError) and (size := _size_if_whole(name)):
                raise UserError(
                    f"{name} ({size}) can be read but not prepared for the model: {reason}; what is saved is "
                    "untouched: see INPUT, whose sizes may be too small for its shape, or leave it out"
                ) from error
            raise UserError(
                f"{name} cannot be read: {reason}; what is saved is untouched: repair the file, then --resume"
            ) from error


def _size_if_whole(file: str) -> str:
    """ "640x480" of an image that can be read, else ""."""
    try:
        height, width = read_image(file, "RGB").shape[:2]
    except Exception:  # the first error said what is wrong with it
        return ""
    return f"{width}x{height}"
