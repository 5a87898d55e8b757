"""A check of COCO-format data that finds what would stop Detectron2 in the middle of a run, or spoil it in silence."""

import gc
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from repr_det.datasets.findings import Findings, listed, reason, spelled_alike
from repr_det.datasets.image_files import ImageFile, check_image_files
from repr_det.datasets.objects import Objects, gaps_of
from repr_det.datasets.schema import check_schema


@dataclass(frozen=True)
class CocoSummary:
    """Contents of a COCO-format data set.

    Attributes:
        classes: name -> (lowest) category id, sorted by id, which is the order in Detectron2.
        aliases: category id -> lowest id of the same name, for the others of the names that several ids have.
        gaps: what stands in the way of evaluation, masks and keypoints, see ``objects.gaps_of``.
        keypoint_numbers: the lengths of the objects' lists of keypoints, crowd regions aside, 0 for those without.
        files: the image files.
    """

    num_images: int
    num_boxes: int
    classes: dict[str, int]
    aliases: dict[int, int]
    gaps: dict[str, list[str]]
    keypoint_numbers: frozenset[int]
    files: list[ImageFile] = field(repr=False)

    def check_evaluation(self, findings: Findings) -> None:
        """Refuses data that COCO evaluation cannot use, and warns of what would mislead it."""
        for gap in self.gaps.get("evaluation", ()):
            findings.fail(gap)
        for doubt in self.gaps.get("area doubts", ())[:1]:
            findings.warn(doubt)


def check_coco_format(
    json_file: str | os.PathLike, image_root: str | os.PathLike, name: str | None = None
) -> CocoSummary:
    """Check the json and the image files of a detection data set in COCO format.

    Of a large data set some image files are decoded, evenly spread; the others are there and not empty.

    Args:
        name: the data set's name, for the messages

    Raises:
        UserError: one line that names the file, the first thing found wrong, and what would be right; what only
            evaluation, masks or keypoints need is in the summary
    """
    collects = gc.isenabled()
    gc.disable()  # a third of the time to read a large json is a search for cycles among objects that have none
    try:
        return _check(Findings(Path(json_file).expanduser(), name), Path(image_root).expanduser())
    finally:
        if collects:
            gc.enable()


def _check(findings: Findings, image_root: Path) -> CocoSummary:
    content = _read_json(findings)
    check_schema(content, findings)
    for key in ("images", "categories", "annotations"):
        if not content[key]:
            findings.fail(f"'{key}' is empty")
    classes = {i: entry["name"] for i, entry in _by_id(content, "categories", findings).items()}
    images = _by_id(content, "images", findings)
    if len({type(image_id) for image_id in images}) > 1:
        findings.fail("image ids must be all integers or all strings, found both")
    _check_references(content, images, classes, findings)
    aliases = _aliases(classes, findings)
    gaps = gaps_of(Objects(content["annotations"], images))
    for gap in gaps.get("training", ()):
        findings.fail(gap)
    for doubt in gaps.get("doubts", ()):
        findings.warn(doubt)
    single = [entry for entry in content["annotations"] if not entry.get("iscrowd")]
    return CocoSummary(
        num_images=len(images),
        num_boxes=len(content["annotations"]),
        classes={classes[i]: i for i in sorted(classes) if i not in aliases},
        aliases=aliases,
        gaps=gaps,
        keypoint_numbers=frozenset(len(entry.get("keypoints") or ()) for entry in single),
        files=check_image_files(content["images"], image_root, findings),
    )


def _read_json(findings: Findings) -> dict[str, Any]:
    if findings.json_file.exists() and not findings.json_file.is_file():
        findings.fail("is not a file")  # to read a pipe would wait for ever
    try:
        content = from_json(findings.json_file.read_bytes())
    except (OSError, ValueError) as error:
        findings.fail(f"cannot be read as JSON: {reason(error, findings.json_file)}")
    if not isinstance(content, dict):
        kind = type(content).__name__
        findings.fail(f"must hold an object with images, annotations and categories, got a {kind}")
    return content


def _by_id(content: dict[str, Any], section: str, findings: Findings) -> dict[Any, dict[str, Any]]:
    entries = {entry["id"]: entry for entry in content[section]}
    if len(entries) < len(content[section]):
        [(twice, _)] = Counter(entry["id"] for entry in content[section]).most_common(1)
        findings.fail(f"the id {twice!r} occurs twice in '{section}'")
    return entries


def _check_references(
    content: dict[str, Any], images: dict[Any, dict], classes: dict[int, str], findings: Findings
) -> None:
    """Every annotation has an id of its own, and its image and class are listed."""
    if "minival" not in str(findings.json_file):  # COCO's 2014 minival repeats ids; Detectron2 lets it pass
        _by_id(content, "annotations", findings)
    for entry in content["annotations"]:
        if entry["image_id"] not in images:
            some = listed(map(repr, images), 3)
            problem = f"image_id {entry['image_id']!r}, which is not in 'images' ({some})"
        elif entry["category_id"] not in classes:
            problem = f"category_id {entry['category_id']}, which is not in 'categories' ({listed(sorted(classes))})"
        else:
            continue
        findings.fail(f"annotation {entry['id']} names {problem}")
    if any(entry["id"] == 0 for entry in content["annotations"]):
        findings.warn("annotation id 0 means 'no match' to pycocotools, so that box never counts as found: start at 1")


def _aliases(classes: dict[int, str], findings: Findings) -> dict[int, int]:
    """Category id -> lowest id of the same name, for those that are not the lowest."""
    first: dict[str, int] = {}
    aliases = {i: first[classes[i]] for i in sorted(classes) if first.setdefault(classes[i], i) != i}
    for other, lowest in aliases.items():
        findings.warn(f"categories {lowest} and {other} are both '{classes[other]}': taken for one class")
    for name in first:
        other = spelled_alike(name, first)
        if other and first[other] > first[name]:
            findings.warn(f"{name!a} and {other!a} are one name in two spellings, and taken for two classes")
    return aliases
