"""CIFAR-10 as two uint8 tensors, decoded once: from class folders of images, a zip of them, or torchvision's files.

FOLDER/train/CLASS/*.jpg, FOLDER/test/CLASS/*.jpg     (torchvision's ImageFolder layout; png too; or FILE.zip of it)
FOLDER/cifar-10-batches-py/, or that folder itself    (what torchvision.datasets.CIFAR10 downloads)
"""

import hashlib
import io
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repr_det import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NUMBERS = {"train": 50_000, "test": 10_000}
SIZE = 32
_SUFFIXES = (".jpg", ".jpeg", ".png")
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


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
    """Training and test images, and a digest of all of them that tells JPEG copies from the original."""

    train: Images
    test: Images
    digest: str


def load(source: Path, cache: Path, numbers: dict[str, int] | None = None) -> Cifar10:
    """The data at ``source``, decoded into a file in the folder ``cache`` unless it is there.

    Args:
        numbers: images that "train" and "test" must have, the same number of every class; CIFAR-10's by default.

    Raises:
        UserError: there is no CIFAR-10 at ``source``, or a part of it is missing or broken.
    """
    numbers = numbers or NUMBERS
    if not source.exists():
        raise UserError(f"--data {source} does not exist: give a folder with train/ and test/, or cifar-10-batches-py")
    read = _reader(source)
    key = hashlib.sha256(repr((str(source.resolve()), _newest(source), numbers)).encode()).hexdigest()[:12]
    file = cache / f"cifar10-{key}.pt"
    if not file.exists():
        parts = {part: read(part) for part in numbers}
        for part, images in parts.items():
            _check_numbers(images, numbers[part], f"{source} {part}")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, prefix=".cifar10-", delete=False) as temporary:
            torch.save({p: (i.pixels, i.classes) for p, i in parts.items()} | {"digest": _digest(parts)}, temporary)
        Path(temporary.name).replace(file)
    try:
        held = torch.load(file, weights_only=True)
        return Cifar10(Images(*held["train"]), Images(*held["test"]), held["digest"])
    except Exception as error:  # torch raises whatever the broken bytes lead to
        raise UserError(f"{file} is not a whole cache file ({type(error).__name__}): delete it") from None


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
    for folder in (source, source / "cifar-10-batches-py"):
        if any((folder / name).exists() for names in _BATCHES.values() for name in names):
            return lambda part: _read_batches(folder, _BATCHES[part])
    if source.is_file():
        if not zipfile.is_zipfile(source):
            raise UserError(f"--data {source} is neither a folder nor a zip file")
        return lambda part: _read_zip(source, part)
    missing = [part for part in NUMBERS if not (source / part).is_dir()]
    if missing:
        raise UserError(
            f"--data {source} has no folder {missing[0]}/: it must hold train/CLASS/*.jpg and test/CLASS/*.jpg, or "
            "torchvision's cifar-10-batches-py"
        )
    return lambda part: _read_folder(source / part)


def _newest(source: Path) -> int:
    """Changes when files come or go: the latest modification of the file or of the folders down to the classes."""
    folders = [source, *source.glob("*"), *source.glob("*/*/")] if source.is_dir() else [source]
    return max(path.stat().st_mtime_ns for path in folders)


def _read_batches(folder: Path, names: Sequence[str]) -> Images:
    pixels, classes = [], []
    for name in names:
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing: unpack cifar-10-python.tar.gz again")
        try:
            batch = _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="bytes").load()
            pixels.append(np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, SIZE, SIZE))
            classes += batch[b"labels"]
        except Exception as error:  # a broken pickle raises nearly anything
            raise UserError(f"{file} is not a batch of CIFAR-10 ({type(error).__name__}): unpack it again") from None
    return Images(torch.from_numpy(np.concatenate(pixels)).permute(0, 2, 3, 1).contiguous(), torch.tensor(classes))


class _ArraysOnly(pickle.Unpickler):
    """A pickle can run any code; CIFAR-10's batches need the parts of NumPy arrays only."""

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _read_folder(folder: Path) -> Images:
    files = []
    for name in CLASSES:
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name} is missing: {folder} must have a folder for each of {', '.join(CLASSES)}")
        files.append(sorted(p for p in (folder / name).iterdir() if _is_image(p.name)))
    return _decode([[(str(file), file.read_bytes) for file in of_class] for of_class in files])


def _read_zip(source: Path, part: str) -> Images:
    with zipfile.ZipFile(source) as archive:
        names = sorted(n for n in archive.namelist() if _is_image(n.split("/")[-1]))
        files = [[n for n in names if n.split("/")[-3:-1] == [part, name]] for name in CLASSES]
        for name, found in zip(CLASSES, files, strict=True):
            if not found:
                raise UserError(f"{source} has no {part}/{name}/: it must hold {part}/CLASS/*.jpg for every class")
        return _decode([[(n, lambda n=n: archive.read(n)) for n in of_class] for of_class in files])


def _is_image(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")


def _decode(files: list[list[tuple[str, Callable[[], bytes]]]]) -> Images:
    from PIL import Image

    pixels = np.empty((sum(map(len, files)), SIZE, SIZE, 3), np.uint8)
    classes = []
    for label, of_class in enumerate(files):
        for name, read in of_class:
            try:
                image = np.asarray(Image.open(io.BytesIO(read())).convert("RGB"))
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{name} cannot be read as an image: {error}") from None
            if image.shape != (SIZE, SIZE, 3):
                raise UserError(f"{name} must be {SIZE} x {SIZE} pixels, got {image.shape[1]} x {image.shape[0]}")
            pixels[len(classes)] = image
            classes.append(label)
    return Images(torch.from_numpy(pixels), torch.tensor(classes, dtype=torch.int64))


def _check_numbers(images: Images, number: int, where: str) -> None:
    wanted = number // len(CLASSES)
    for label, found in enumerate(torch.bincount(images.classes, minlength=len(CLASSES)).tolist()):
        if found != wanted:
            raise UserError(
                f"{where} must have {wanted} images of class {CLASSES[label]}, got {found}: unpack it again"
            )


def _digest(parts: dict[str, Images]) -> str:
    found = hashlib.sha256()
    for images in parts.values():
        found.update(images.pixels.numpy().tobytes())
        found.update(images.classes.numpy().tobytes())
    return found.hexdigest()[:12]
