"""Image files: checked before a run, and named when one cannot be read in the middle of it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
from detectron2.data.detection_utils import SizeMismatchError, read_image
from PIL import Image

from repr_det.method.errors import UserError

MAX_HEADERS = 2000  # image files whose header is read, evenly spread over the data set; all are checked for existence
DECODED_BYTES = 50_000_000  # data sets with image files of no more than this are decoded: a second or two
EXIF_ORIENTATION = 274
TRANSPOSED = (5, 6, 7, 8)  # orientations that swap width and height


def check_image_files(
    images: list[dict], image_root: Path, decode: bool, max_headers: int, prefix: str, json_file: Path
) -> None:
    """Image files are there and not empty, and those that are opened can be read and have the size that the json says.

    Args:
        images: the json's, with id, file_name, width and height.
        decode, max_headers: see ``coco_format.check_coco_format``.
        prefix, json_file: for the messages.

    Raises:
        UserError: one line that names the file.
    """
    if not image_root.is_dir():
        what = "is not a folder" if image_root.exists() else "does not exist"
        raise UserError(f"{prefix}image folder {image_root} {what}")
    missing, empty, num_bytes = [], [], 0
    for image in images:
        path = os.path.join(image_root, image["file_name"])
        try:
            length = os.stat(path).st_size
        except (OSError, ValueError):
            missing.append(image["file_name"])
            continue
        num_bytes += length
        if length == 0:
            empty.append(image["file_name"])
    for names, what in ((missing, "missing"), (empty, "empty (0 bytes)")):
        if names:
            share = f"{len(names)} of {len(images)} image files"
            raise UserError(f"{prefix}{json_file}: {share} are {what} in {image_root}; the first is '{names[0]}'")
    decode = decode or num_bytes <= DECODED_BYTES
    opened = min(len(images), max_headers)
    for i in range(opened):
        image = images[i * len(images) // opened]
        path, expected = image_root / image["file_name"], (image["width"], image["height"])
        try:
            size = _size_as_read(path, expected, decode)
        except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, DecompressionBombError, ...
            reason = str(error).replace("\n", " ") or type(error).__name__
            raise UserError(f"{prefix}{path} cannot be read as an image: {reason}") from error
        if size != expected:
            found, wanted = "{}x{}".format(*size), "{}x{}".format(*expected)
            raise UserError(
                f"{prefix}{json_file}: image {image['id']!r} must have the file's width and height {found} "
                f"(EXIF orientation applied), got {wanted} for '{image['file_name']}'"
            )


def _size_as_read(path: Path, expected: tuple[int, int], decode: bool) -> tuple[int, int]:
    """(width, height) as Detectron2's `read_image` returns it, with the EXIF orientation applied."""
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(
                f"its pixels have more than 8 bits (mode {image.mode}), which Detectron2 would clip to 0..255; convert "
                "it to 8 bits"
            )
        if decode:
            image.load()
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
    except Exception:  # whatever is wrong with it, the first error told it
        return ""
    return f"{width}x{height}"
