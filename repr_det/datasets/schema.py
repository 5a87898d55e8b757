"""The schema of a COCO json: the types that Detectron2 and pycocotools rely on.

Numbers within the right type are left to ``objects``, image files to ``image_files``.
"""

from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from repr_det.datasets.findings import Findings, listed, shown

Finite = Annotated[float, Field(allow_inf_nan=False)]
Length = Annotated[Finite, Field(gt=0, multiple_of=1)]  # some tools write 640.0
Name = Annotated[str, Field(pattern=r"\S")]
Count = Annotated[int, Field(ge=0, lt=2**32)]


class Image(TypedDict):
    id: int | str
    file_name: Name
    width: Length
    height: Length


class Category(TypedDict):
    id: int
    name: Name


class RunLengths(TypedDict):
    size: Annotated[list[Count], Field(min_length=2, max_length=2)]
    counts: str | list[Count]


class Annotation(TypedDict):
    id: int
    image_id: int | str
    category_id: int
    bbox: Annotated[list[Finite], Field(min_length=4, max_length=4)]
    iscrowd: NotRequired[Literal[0, 1, False, True]]
    ignore: NotRequired[Literal[0, False]]
    segmentation: NotRequired[list[list] | RunLengths | Literal[""] | None]
    keypoints: NotRequired[list[Finite] | None]


class Content(TypedDict):
    categories: Annotated[list[Category], FailFast()]
    images: Annotated[list[Image], FailFast()]
    annotations: Annotated[list[Annotation], FailFast()]


_CONTENT = TypeAdapter(Content)


def check_schema(content: dict[str, Any], findings: Findings) -> None:
    """Refuses content whose types are not those of the schema, naming the first faulty entry and what is right.

    Raises:
        UserError: see above.
    """
    try:
        _CONTENT.validate_python(content, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    else:
        return
    section, *where = fault["loc"]
    if section not in content:
        findings.fail(
            f"has no '{section}' (COCO format has images, annotations and categories, found: {listed(content)})"
        )
    if len(where) < 2:
        findings.fail(f"'{section}' must be a list of objects")
    number, key = where[:2]
    entry = content[section][number]
    name = f" (id {entry['id']!r})" if key != "id" else ""
    findings.fail(f"entry {number} of '{section}'{name} has a wrong '{key}', {shown(entry.get(key))}: {fault['msg']}")
