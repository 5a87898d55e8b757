"""Image files: checked before a run, and named when one cannot be read during it."""

import difflib
import hashlib
import itertools
import ntpath
import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image

from repr_det.datasets.findings import Findings, folded, reason
from repr_det.method.errors import UserError

DECODED_BYTES = 50_000_000  # up to this, all images are decoded
DECODED = 250  # of larger data sets, evenly spread
READ_BYTES = 500_000_000  # up to this, files of one size are compared by content
LOOKED_FOR = 1000  # test images looked for among those of training
LOOKED_THROUGH = 100_000  # files, for one of nearly the right name
DARK = 64  # below this value, an image's depth is looked at
BLACK = 16  # below this value, a data set is nearly black


class ImageFile(NamedTuple):
    """An image file; ``identity`` is the same for all its names."""

    path: str
    size: int
    identity: tuple[int, int]


def check_image_files(images: list[dict], image_root: Path, findings: Findings) -> list[ImageFile]:
    """Refuses absent and empty files, and decoded ones that are unreadable or of another size than in the json."""
    if not image_root.is_dir():
        raise UserError(f"{findings.prefix}image folder {image_root} does not exist, or is not a folder")
    files = _find_files(images, image_root, findings)
    if repeats := repeated_images(files):
        one, other = (f"{images[number]['id']!r}, '{images[number]['file_name']}'" for number in repeats[0])
        findings.warn(
            f"{len(repeats)} of {len(files)} entries of 'images' repeat the image of another one (the first: {one}, "
            f"and {other}): give an image one entry"
        )
    small = sum(file.size for file in files) <= DECODED_BYTES
    brightest = 0
    for number in range(0, len(files), 1 if small else len(files) // DECODED + 1):
        image, path = images[number], files[number].path
        try:
            pixels = _as_the_model_sees(path)
        except Exception as error:  # Pillow raises many kinds
            raise UserError(f"{findings.prefix}{path} cannot be read as an image: {reason(error, path)}") from error
        height, width = pixels.shape[:2]
        if (width, height) != (image["width"], image["height"]):
            findings.fail(
                f"image {image['id']!r} must have the width and height of '{image['file_name']}', {width}x{height} "
                f"(EXIF orientation applied), got {image['width']}x{image['height']}"
            )
        brightest = max(brightest, int(pixels.max()))
    if brightest < BLACK:
        findings.warn(
            f"the model would see nearly black images, with values up to {brightest} (the first: {files[0].path}): "
            "scale their pixels to 0..255"
        )
    return files


def _find_files(images: list[dict], image_root: Path, findings: Findings) -> list[ImageFile]:
    absent, files = [], []
    for image in images:
        path = os.path.join(image_root, image["file_name"])
        try:
            state = os.stat(path)
        except (OSError, ValueError):
            state = None
        if state and stat.S_ISREG(state.st_mode) and state.st_size:
            files.append(ImageFile(path, state.st_size, (state.st_dev, state.st_ino)))
        else:
            absent.append(image["file_name"])
    if absent:
        alike = _files_alike(image_root, absent[0])
        hint = f" ({alike[0]!a} is there: spell names alike)" if alike else ""
        share = f"{len(absent)} of {len(images)} image files are missing or empty in {image_root}"
        findings.fail(f"{share}; the first is '{absent[0]}'{hint}")
    return files


def _files_alike(root: Path, name: str) -> list[str]:
    """A file of another spelling, or in another folder."""
    wanted = folded(ntpath.basename(name))
    some = itertools.islice(root.rglob("*"), LOOKED_THROUGH)
    alike = [path for path in some if folded(path.name) == wanted and path.is_file() and path.stat().st_size]
    return difflib.get_close_matches(name, [path.relative_to(root).as_posix() for path in alike], n=1, cutoff=0)


def repeated_images(files: list[ImageFile]) -> list[tuple[int, int]]:
    """Pairs of numbers (earlier, later) of one image: the same file, or equal content."""
    sizes = Counter(file.size for file in files)
    alike = sum(file.size for file in files if sizes[file.size] > 1)
    first: dict[object, int] = {}
    pairs = []
    for number, file in enumerate(files):
        key: object = file.identity
        if sizes[file.size] > 1 and alike <= READ_BYTES:
            key = hashlib.sha256(Path(file.path).read_bytes()).digest()
        if first.setdefault(key, number) != number:
            pairs.append((first[key], number))
    return pairs


def shared_images(train: list[ImageFile], test: list[ImageFile]) -> tuple[list[tuple[str, str]], int]:
    """Pairs of paths of one image in ``train`` and ``test``, and how many of test were looked at."""
    some = test[:: len(test) // LOOKED_FOR + 1]
    sizes = {file.size for file in some}
    candidates = [file for file in train if file.size in sizes]
    files = candidates + some
    pairs = [(files[i].path, files[j].path) for i, j in repeated_images(files) if i < len(candidates) <= j]
    return pairs, len(some)


def _as_the_model_sees(path: str) -> np.ndarray:
    """The pixels (H, W, 3); ValueError for more than 8 bits a channel."""
    with Image.open(path) as image:
        deep = image.mode.startswith(("I", "F"))  # one channel of 16 or 32 bits
    if not deep:
        pixels = read_image(path, "RGB")
        if pixels.max() >= DARK:
            return pixels
        stored = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        deep = stored is not None and stored.dtype.itemsize > 1
    if deep:
        raise ValueError("its pixels have more than 8 bits, which Detectron2 clips or drops: convert it to 8")
    return pixels


class NamingMapper:
    """A mapper (such as DatasetMapper) whose errors are a UserError that names the image file."""

    def __init__(self, mapper: Callable[[dict], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: dict[str, Any]) -> Any:
        try:
            return self.mapper(record)
        except (OSError, SyntaxError, ValueError, cv2.error) as error:
            name = record.get("file_name", f"image {record.get('image_id')}")
            raise UserError(
                f"{name} cannot be read and prepared for the model: {reason(error, name)}; repair the file, or "
                "see INPUT for its sizes, then --resume"
            ) from error
