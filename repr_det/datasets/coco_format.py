"""A check of COCO-format data for what would stop Detectron2 during a run, or spoil it in silence."""

import gc
import os
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, TypeAdapter, ValidationError
from pydantic_core import from_json
from typing_extensions import NotRequired, TypedDict

from repr_det.datasets.findings import Findings, folded, listed, reason
from repr_det.datasets.image_files import ImageFile, check_image_files
from repr_det.datasets.objects import gaps_of

# The types that Detectron2 and pycocotools rely on; ``objects`` looks at the numbers.
Finite = Annotated[float, Field(allow_inf_nan=False)]
Length = Annotated[Finite, Field(gt=0, multiple_of=1)]  # some tools write 640.0
Name = Annotated[str, Field(pattern=r"\S")]
Id = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]  # NumPy mixes wider ones into floats
Count = Annotated[int, Field(ge=0, lt=2**32)]


class Image(TypedDict):
    id: Id | str
    file_name: Name
    width: Length
    height: Length


class Category(TypedDict):
    id: Id
    name: Name
    keypoints: NotRequired[list | None]


class RunLengths(TypedDict):
    size: Annotated[list[Count], Field(min_length=2, max_length=2)]
    counts: str | list[Count]


class Annotation(TypedDict):
    id: Id
    image_id: int | str  # must be one of 'images'
    category_id: int
    bbox: Annotated[list[Finite], Field(min_length=4, max_length=4)]
    iscrowd: NotRequired[Literal[0, 1, False, True]]
    ignore: NotRequired[Literal[0, False]]
    segmentation: NotRequired[list[list] | RunLengths | Literal[""] | Annotated[dict, Field(max_length=0)] | None]
    keypoints: NotRequired[list[Finite] | None]


class Content(TypedDict):
    categories: Annotated[list[Category], FailFast(), Field(min_length=1)]
    images: Annotated[list[Image], FailFast(), Field(min_length=1)]
    annotations: NotRequired[Annotated[list[Annotation], FailFast(), Field(min_length=1)]]  # COCO's test-dev has none


_CONTENT = TypeAdapter(Content)


@dataclass(frozen=True)
class CocoSummary:
    """The findings about a data set."""

    classes: dict[int, str]  # by ascending id
    keypoint_names: list[str]  # of the categories, if all have the same
    seen: frozenset[str]  # classes with objects
    gaps: dict[str, list[str]]  # of ``objects.gaps_of``
    keypoint_numbers: frozenset[int]  # lengths of the keypoint lists of single objects, 0 for none
    files: list[ImageFile] = field(repr=False)


def check_coco_format(
    json_file: str | os.PathLike, image_root: str | os.PathLike, name: str | None = None
) -> CocoSummary:
    """Check the json and the image files (of a large data set, some are decoded) of a COCO-format data set. UserError
    for the first thing found wrong; what only some uses of the data need is in the summary."""
    collects = gc.isenabled()
    gc.disable()  # or looking for cycles takes three times as long as the rest
    try:
        return _check(Findings(Path(json_file).expanduser(), name), Path(image_root).expanduser())
    finally:
        if collects:
            gc.enable()


def _check(findings: Findings, image_root: Path) -> CocoSummary:
    content = _read(findings)
    images = _by_id(content, "images", findings)
    if len({type(image_id) for image_id in images}) > 1:
        findings.fail("image ids must be all integers or all strings, found both")
    if any(str(image_id).endswith("\0") for image_id in images):
        findings.fail("image ids must not end in NUL, which NumPy leaves out")
    categories = _by_id(content, "categories", findings)
    classes = {i: categories[i]["name"] for i in sorted(categories)}
    _check_names(classes, findings)
    annotations = content.get("annotations", [])
    for entry in annotations:
        for key, known, section in (("image_id", images, "images"), ("category_id", classes, "categories")):
            if entry[key] not in known:
                some = listed(map(repr, known), 3)
                findings.fail(f"annotation {entry['id']} names {key} {entry[key]!r}, not in '{section}' ({some})")
    gaps = gaps_of(annotations, images, "minival" in str(findings.json_file))  # Detectron2 lets ids of its 2014 repeat
    findings.report(gaps["training"], gaps["doubts"])
    numbers = frozenset(len(entry.get("keypoints") or ()) for entry in annotations if not entry.get("iscrowd"))
    files = check_image_files(content["images"], image_root, findings)
    seen = frozenset(classes[entry["category_id"]] for entry in annotations)
    named = [list(map(str, entry["keypoints"])) for entry in categories.values() if entry.get("keypoints")]
    names = named[0] if named and max(named) == min(named) else []
    return CocoSummary(classes, names, seen, gaps, numbers, files)


def _read(findings: Findings) -> dict[str, Any]:
    path = findings.json_file
    if path.exists() and not path.is_file():
        findings.fail("is not a file")  # to read a pipe would wait for ever
    try:
        content = from_json(path.read_bytes())
        _CONTENT.validate_python(content, strict=True)
        return content
    except ValidationError as error:
        faults = error.errors(include_url=False)
        alike = [fault for fault in faults if fault["loc"][:3] == faults[0]["loc"][:3]]
        fault = max(alike, key=lambda fault: len(fault["loc"]))  # in a union, of the form that fits furthest
    except (OSError, ValueError) as error:
        findings.fail(f"cannot be read as JSON: {reason(error, path)}")
    if len(fault["loc"]) < 3:
        place = "".join(f"{part}: " for part in fault["loc"])
        findings.fail(f"must hold lists of objects 'images', 'annotations' and 'categories': {place}{fault['msg']}")
    section, number, key = fault["loc"][:3]
    entry = content[section][number]
    name = f" (id {entry['id']!r})" if key != "id" else ""
    value, part = entry.get(key), fault["input"]
    what = fault["msg"] + (f", got {reprlib.repr(part)}" if len(fault["loc"]) > 3 and part is not value else "")
    findings.fail(f"entry {number} of '{section}'{name} has a wrong '{key}', {reprlib.repr(value)}: {what}")


def _by_id(content: dict[str, Any], section: str, findings: Findings) -> dict[Any, dict[str, Any]]:
    entries = {}
    for entry in content[section]:
        if entries.setdefault(entry["id"], entry) is not entry:
            findings.fail(f"the id {entry['id']!r} occurs twice in '{section}'")
    return entries


def _check_names(classes: dict[int, str], findings: Findings) -> None:
    lowest = lowest_ids(classes)
    for i, name in classes.items():
        if lowest[name] != i:
            findings.warn(f"categories {lowest[name]} and {i} are both '{name}': taken for one class")
    spellings = {}
    for name in lowest:
        other = spellings.setdefault(folded(name), name)
        if other != name:
            findings.warn(f"{other!a} and {name!a}, one name in two spellings, are taken for two classes")


def lowest_ids(classes: dict[int, str]) -> dict[str, int]:
    """Name -> its lowest category id, in ascending order."""
    lowest = {}
    for i in sorted(classes):
        lowest.setdefault(classes[i], i)
    return lowest
