"""CIFAR-10 as two uint8 tensors, decoded once.

FOLDER/train/CLASS/*.jpg, FOLDER/test/CLASS/*.jpg     (torchvision's ImageFolder layout; png too; or FILE.zip of it)
FOLDER/cifar-10-batches-py/                           (what torchvision.datasets.CIFAR10 downloads)
"""

import hashlib
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repr_det import UserError
from repr_det.runs.files import replacing

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NUMBERS = {"train": 50_000, "test": 10_000}
SIZE = 32
_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Images:
    """One part of the data.

    Attributes:
        pixels: (N, 32, 32, 3) uint8, RGB.
        classes: (N,) int64, index in CLASSES.
    """

    pixels: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def take(self, rows: Tensor) -> "Images":
        return Images(self.pixels[rows], self.classes[rows])

    def to(self, device: str) -> "Images":
        return Images(self.pixels.to(device), self.classes.to(device))


@dataclass(frozen=True)
class Cifar10:
    """Training and test images, and a digest of all of them that distinguishes JPEG copies from the original."""

    train: Images
    test: Images
    digest: str


def load(source: Path, cache: Path) -> Cifar10:
    """Reads the data at ``source``, decoded into a file in the folder ``cache`` unless it is there.

    Raises:
        UserError: there is no CIFAR-10 at ``source``, or a part of it is missing or broken.
    """
    if not source.exists():
        raise UserError(f"--data {source} does not exist: give a folder with train/ and test/, or cifar-10-batches-py")
    key = hashlib.sha256(repr((str(source.resolve()), source.stat().st_mtime_ns, NUMBERS)).encode()).hexdigest()[:12]
    file = cache / f"cifar10-{key}.pt"
    if not file.exists():
        read = _reader(source)
        parts = {part: read(part) for part in NUMBERS}
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(file, "wb") as whole:  # another run may be decoding the same
            torch.save({p: (i.pixels, i.classes) for p, i in parts.items()} | {"digest": _digest(parts)}, whole)
    held = torch.load(file, weights_only=True)
    return Cifar10(Images(*held["train"]), Images(*held["test"]), held["digest"])


def balanced(images: Images, number: int) -> Images:
    """The first ``number`` images with classes in turn, so that a subset has equally many of each (up to one)."""
    if number == len(images):
        return images
    order = torch.argsort(images.classes, stable=True)
    counts = torch.bincount(images.classes, minlength=len(CLASSES))
    rank = torch.empty_like(order)
    rank[order] = torch.cat([torch.arange(count) for count in counts.tolist()])
    return images.take(torch.argsort(rank * len(CLASSES) + images.classes)[:number])


def _reader(source: Path) -> Callable[[str], Images]:
    if (source / "cifar-10-batches-py").is_dir():
        return lambda part: _of_torchvision(source, part)
    root = zipfile.Path(source) if zipfile.is_zipfile(source) else source
    return lambda part: _of_folders(root / part)


def _of_torchvision(source: Path, part: str) -> Images:
    from torchvision.datasets import CIFAR10

    try:
        found = CIFAR10(source, train=part == "train")
    except RuntimeError as error:
        raise UserError(f"--data {source}: {error}") from None
    return Images(torch.from_numpy(found.data), torch.tensor(found.targets))


def _of_folders(folder: Path | zipfile.Path) -> Images:
    wanted = NUMBERS[folder.name] // len(CLASSES)
    pixels = np.empty((NUMBERS[folder.name], SIZE, SIZE, 3), np.uint8)
    for label, name in enumerate(CLASSES):
        entries = (folder / name).iterdir() if (folder / name).is_dir() else ()
        files = sorted((file for file in entries if file.name.lower().endswith(_SUFFIXES)), key=lambda file: file.name)
        if len(files) != wanted:
            raise UserError(f"{folder / name} must hold {wanted} images, got {len(files)}: unpack the data again")
        for index, file in enumerate(files):
            try:
                pixels[label * wanted + index] = Image.open(io.BytesIO(file.read_bytes())).convert("RGB")
            except (OSError, ValueError) as error:
                raise UserError(f"{file} cannot be read as an image of 32 x 32 pixels: {error}") from None
    return Images(torch.from_numpy(pixels), torch.arange(len(CLASSES)).repeat_interleave(wanted))


def _digest(parts: dict[str, Images]) -> str:
    found = hashlib.sha256()
    for images in parts.values():
        found.update(images.pixels.numpy().tobytes())
        found.update(images.classes.numpy().tobytes())
    return found.hexdigest()[:12]
