"""COCO-format data: every kind of damage gets its one-line error; odd but sound data: test_coco_format_odd.py."""

import gzip
import shutil
import unicodedata

import cv2
import numpy as np
import pytest
from coco_folder import SIZES, annotation, category, every, image, whole
from PIL import Image

from repr_det import datasets
from repr_det.datasets import image_files
from repr_det.method.errors import UserError


def test_a_sound_folder(folder, caplog):
    keypoint_gap = "annotation 1 has no 'keypoints', which COCO evaluation needs"
    assert folder.check() == datasets.CocoSummary(3, 4, ("cell", "plate"), (3, 7), keypoint_gap=keypoint_gap)
    assert not caplog.records


NOT_IN = "which is not in"
FOUR = "must have a bbox of four finite numbers [x, y, width, height], got "
POLYGONS = (
    "annotation 3 must have a segmentation of polygons [[x, y, ...], ...] or RLE (size [height, width], counts a "
)
LOST = "annotation 3 has a segmentation without a polygon of 3 points or more ("
FLAT = "annotation 3 must have keypoints as one flat list of numbers [x, y, visibility, ...], or none, got "
WRONG = [
    (whole(images=...), "has no 'images' (COCO format has images, annotations and categories, found: annotations, cat"),
    (whole(annotations=...), "has no 'annotations'"),
    (whole(categories=...), "has no 'categories'"),
    (whole(images=[]), "'images' is empty"),
    (whole(annotations=[]), "'annotations' is empty"),
    (whole(categories=[]), "'categories' is empty"),
    (whole(images={"1": {}}), "'images' must be a list of objects"),
    (whole(annotations=None), "'annotations' must be a list of objects"),
    (whole(categories=["cell"]), "'categories' must be a list of objects"),
    (image(1, id=...), "image number 1 must have an id (integer or string), got None"),
    (image(1, id=1.5), "image number 1 must have an id (integer or string), got 1.5"),
    (image(1, id=1), "image id 1 occurs twice"),
    (image(2, id="five"), "image ids must be all integers or all strings"),
    (image(0, file_name=...), "image 1 must have a file_name, got None"),
    (image(0, file_name=""), "image 1 must have a file_name, got ''"),
    (image(0, width=...), "image 1 ('1.jpg') must have a positive integer width, got None"),
    (image(0, height=0), "image 1 ('1.jpg') must have a positive integer height, got 0"),
    (image(0, height=-30), "must have a positive integer height, got -30"),
    (image(0, width=40.5), "must have a positive integer width, got 40.5"),
    (image(0, width=float("inf")), "must have a positive integer width, got inf"),
    (image(0, width=10**400), "must have a positive integer width, got 1000"),
    (image(0, width="40"), "must have a positive integer width, got '40'"),
    (image(0, width=True), "must have a positive integer width, got True"),
    (category(0, id=...), "category number 0 must have an integer id, got None"),
    (category(0, id="3"), "category number 0 must have an integer id, got '3'"),
    (category(1, id=3), "category id 3 occurs twice ('cell' and 'plate')"),
    (category(1, name=...), "category 7 must have a name, got None"),
    (category(1, name=" "), "category 7 must have a name, got ' '"),
    (annotation(1, id=...), "annotation number 1 must have an integer id (pycocotools needs it), got None"),
    (annotation(1, id=1), "annotation id 1 occurs twice"),
    (annotation(0, image_id=...), "annotation 1 must have an image_id that is one of 'images'"),
    (annotation(2, image_id=9), f"annotation 3 names image_id 9, {NOT_IN} 'images'"),
    (annotation(2, image_id="2"), f"annotation 3 names image_id '2', {NOT_IN} 'images' (whose ids are of type int)"),
    (
        annotation(2, image_id=[2]),
        "annotation 3 must have an image_id that is one of 'images' (an integer or a string)",
    ),
    (annotation(2, category_id=0), f"annotation 3 names category_id 0, {NOT_IN} 'categories' (3, 7)"),
    *[
        (annotation(2, category_id=value), f"must have an integer category_id that is one of 'categories', got {shown}")
        for value, shown in ((..., "None"), (3.0, "3.0"), ("3", "'3'"), (True, "True"), ([3], "[3]"))
    ],
    *[
        (annotation(2, bbox=box), FOUR + shown)
        for box, shown in (
            (..., "None"),
            ([1, 2, 3], "[1, 2, 3]"),
            ([], "[]"),
            ([1, 2, 3, "4"], "[1, 2, 3, '4']"),
            ([[1, 2, 3, 4]], "[[1, 2, 3, 4]]"),
            ([1, 2, None, 4], "[1, 2, None, 4]"),
            ([1, 2, 3, 4, 30], "[1, 2, 3, 4, 30]"),
            ([1, 2, float("nan"), 4], "[1, 2, nan, 4]"),
            ([1, float("-inf"), 3, 4], "[1, -inf, 3, 4]"),
            ([1, 2, 10**400, 4], "[1, 2, 1000"),
        )
    ],
    (
        annotation(2, bbox=[9, 9, -3, 4]),
        "annotation 3 has a bbox of negative size: [9, 9, -3, 4] is read as [x, y, wid",
    ),
    (annotation(2, bbox=[9, 9, 3, 0]), "annotation 3 has a bbox without area: [9, 9, 3, 0] is read as"),
    (annotation(2, bbox=[30, 0, 5, 5]), "annotation 3 has a bbox outside its image 2, which is 30x40: [30, 0, 5, 5]"),
    (annotation(2, bbox=[3, -9, 5, 9]), "annotation 3 has a bbox outside its image 2"),
    (annotation(2, iscrowd=2), "annotation 3 must have iscrowd 0 or 1, got 2"),
    (annotation(2, iscrowd="no"), "annotation 3 must have iscrowd 0 or 1, got 'no'"),
    (annotation(2, ignore=1), "annotation 3 has 'ignore' set, which Detectron2 does not support"),
    *[
        (annotation(2, segmentation=value), POLYGONS)
        for value in (
            [1, 2, 3, 4, 5, 6],
            {"size": [4, 4]},
            {"size": [10], "counts": "abc"},
            {"size": ["30", "40"], "counts": "a"},
            {"size": [40, 30], "counts": 7},
            {"size": [40, 30], "counts": [0, -1]},
            {"size": [40, 30], "counts": [2**40]},
        )
    ],
    *[
        (annotation(2, segmentation=value), LOST)
        for value in ([[2, 3, 12, 15]], [[]], [[1, 2, 3, 4, 5, 6, 7]], [[[1, 2, 3, 4, 5, 6]]])
    ],
    *[
        (annotation(2, keypoints=value), FLAT + shown)
        for value, shown in (
            ([[1, 2, 2]], "[[1, 2, 2]]"),
            (["1", "2", "2"], "['1', '2', '2']"),
            ([1, None, 2], "[1, None, 2]"),
            ("1 2 2", "'1 2 2'"),
            ([{"x": 1}], "[{'x': 1}]"),
        )
    ],
    (annotation(2, area=...), "1 annotations have no 'area', which COCO evaluation needs"),
    (annotation(2, area=None), "1 annotations have no 'area'"),
    (
        annotation(2, iscrowd=...),
        "1 annotations have no 'iscrowd', which COCO evaluation needs (0 for a single object); ",
    ),
    *[
        (
            annotation(2, area=value),
            f"annotation 3 must have a finite number as 'area': {shown} with the bbox [0, 0, 30,",
        )
        for value, shown in (("12", "'12'"), ([12], "[12]"), (float("nan"), "nan"), (True, "True"))
    ],
    *[
        (
            annotation(2, area=value),
            f"annotation 3 has an 'area' that COCO evaluation ignores: {value} with the bbox [0, ",
        )
        for value in (-1200, -0.5, 1.2e12)
    ],
    (every(lambda a: {"area": -a["area"]}), "(4 such of 4); give the object's area in pixels, or width * height"),
    (every(lambda a: {"iscrowd": 1}), "all 4 annotations are crowd regions"),
    (every(lambda a: {"bbox": [v / 64 for v in a["bbox"]]}), "(4 such boxes of 4): give boxes in pixels, not as fract"),
    (image(0, file_name="no.jpg"), "1 of 3 image files are missing in "),
    (image(0, file_name="n\0.jpg"), "1 of 3 image files are missing in "),
    (
        image(0, width=30, height=40),
        "image 1 must have the file's width and height 40x30 (EXIF orientation applied), go",
    ),
]


@pytest.mark.parametrize("change, message", WRONG, ids=[f"{n} {message[:50]}" for n, (_, message) in enumerate(WRONG)])
def test_wrong_content(folder, change, message):
    change(folder.content)
    with pytest.raises(UserError) as caught:
        folder.check(name="mine")
    text = str(caught.value)
    assert message in text and str(folder.json) in text and text.startswith("data set mine: ") and "\n" not in text
    assert len(text) < 450 + len(str(folder.json))


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "is not valid JSON (line 1, column 1: Expecting value)"),
        (b'{"images": [\n  {"id": 1, "fi', "(line 2, column 13: Unterminated string starting at); it may be truncated"),
        (b'{"id": 1}\n{"id": 2}\n', "(line 2, column 1: Extra data); COCO format is one object, not one a line"),
        (b"<html>", "is an HTML or XML page"),
        (b"[]", "must hold an object with images, annotations and categories, got a list"),
        (b"null", "must hold an object"),
        (b'{"images": "\xff"}', "is not UTF-8 text: invalid start byte at byte 12"),
        (b'\xef\xbb\xbf{"images": []}', "begins with a byte order mark, which Detectron2 cannot read: save it without"),
        ('{"images": []}'.encode("utf-16"), "is UTF-16 text, which Detectron2 cannot read: save it as UTF-8"),
        (b'{"images": ' + b"9" * 5000 + b"}", "is no COCO annotation file: Exceeds the limit"),
        (b'{"images": ' + b"[" * 100_000, "is no COCO annotation file: maximum recursion depth exceeded"),
        (
            gzip.compress(b"{}", mtime=0),
            "is compressed by gzip, which Detectron2 does not unpack: unpack it with 'gunzip'",
        ),
        (b"PK\x03\x04...", "is a zip archive: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, not the data: fetch"),
    ],
)
def test_files_that_are_no_coco_json(folder, text, message):
    folder.json.write_bytes(text)
    with pytest.raises(UserError) as caught:
        datasets.check_coco_format(folder.json, folder.images)
    assert message in str(caught.value) and str(folder.json) in str(caught.value) and "\n" not in str(caught.value)


def test_absent_files_and_folders(folder, tmp_path):
    with pytest.raises(UserError, match=r"annotation file .*truth\.json does not exist"):
        datasets.check_coco_format(folder.json, folder.images)
    with pytest.raises(UserError, match="images is not a file"):
        datasets.check_coco_format(folder.images, folder.images)
    folder.check()
    with pytest.raises(UserError, match=r"image folder .*nowhere does not exist"):
        datasets.check_coco_format(folder.json, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"image folder .*truth\.json is not a folder"):
        datasets.check_coco_format(folder.json, folder.json)


# ---- image files ----

ACCENT = "Bläschen.jpg"


@pytest.mark.parametrize(
    "there, named, hint",
    [
        (unicodedata.normalize("NFD", ACCENT), ACCENT, r"'Bla\u0308schen.jpg' is there, the same name in another Uni"),
        (ACCENT, unicodedata.normalize("NFD", ACCENT), r"'Bl\xe4schen.jpg' is there, the same name in another Unicod"),
        ("B (1).jpg", "b (1).JPG", "'B (1).jpg' is there, the same name in upper or lower case"),
        ("a b.jpg", "a b.jpg ", "'a b.jpg' is there, the same name with other blanks"),
        ("é/1.jpg", "e\u0301/1.jpg", r"'\xe9' is there, the same name in another Unicode form"),
        ("s/b.jpg", "s\\b.jpg", "'s/b.jpg' is there: with / for \\"),
        ("b.jpg", "C:\\data\\b.jpg", "'b.jpg' is there: file_name must be relative to the image folder"),
        ("b.jpg", "https://example.org/b.jpg", "'b.jpg' is there: file_name must be relative to the image folder"),
    ],
)
def test_a_file_of_nearly_that_name_is_told(folder, there, named, hint):
    (folder.images / there).parent.mkdir(exist_ok=True)
    (folder.images / "1.jpg").rename(folder.images / there)
    image(0, file_name=named)(folder.content)
    with pytest.raises(UserError) as caught:
        folder.check()
    assert hint in str(caught.value) and "1 of 3 image files are missing" in str(caught.value)


def test_damaged_image_files(folder, monkeypatch):
    for number in (2, 5):
        (folder.images / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 3 image files are empty \(0 bytes\) in .*; the first is '2\.jpg'"):
        folder.check()
    shutil.copy(folder.images / "1.jpg", folder.images / "5.jpg")
    for content, message in (
        (b"no image", "cannot be read as an image: "),
        (b"version https://git-lfs.github.com/spec/v1\n", "cannot be read as an image: it is a Git LFS pointer"),
    ):
        (folder.images / "2.jpg").write_bytes(content)
        with pytest.raises(UserError, match=rf"2\.jpg {message}"):
            folder.check()
    (folder.images / "2.jpg").unlink()
    (folder.images / "2.jpg").mkdir()
    with pytest.raises(UserError, match=r"2\.jpg cannot be read as an image: .*directory"):
        folder.check()


def test_a_truncated_image_is_found_by_decoding(folder, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder.images / "5.jpg")
    data = (folder.images / "5.jpg").read_bytes()
    (folder.images / "5.jpg").write_bytes(data[: len(data) // 2])
    for as_in_a_large_data_set in (False, True):
        with pytest.raises(UserError, match=r"5\.jpg cannot be read as an image: .*truncated"):
            folder.check(decode=as_in_a_large_data_set)
        monkeypatch.setattr(image_files, "DECODED_BYTES", 0)
        monkeypatch.setattr(image_files, "LOOKED_AT", 1)
    folder.check()  # the headers are fine, and one image alone is decoded


@pytest.mark.parametrize("bits", [np.uint16, np.int32, np.float32])
def test_one_channel_of_more_than_8_bits_is_refused(folder, bits):
    Image.fromarray(np.ones(SIZES[5][::-1], bits)).save(folder.images / "5.tif")
    folder.content["images"][2]["file_name"] = "5.tif"
    with pytest.raises(UserError, match=r"5\.tif cannot be read as an image: its pixels have more than 8 bits"):
        folder.check()


def sixteen_bits(folder, largest, suffix=".png"):
    width, height = SIZES[5]
    values = np.random.default_rng(0).integers(0, largest + 1, (height, width, 3)).astype(np.uint16)
    cv2.imwrite(str(folder.images / f"5{suffix}"), values)
    folder.content["images"][2]["file_name"] = f"5{suffix}"


@pytest.mark.parametrize("suffix", [".png", ".tif", ".ppm"])
@pytest.mark.parametrize("largest", [1023, 4095])
def test_colours_of_which_the_model_would_see_next_to_nothing_are_refused(folder, suffix, largest):
    sixteen_bits(folder, largest, suffix)
    with pytest.raises(UserError, match=rf"up to {largest}, .* would see values up to \d+ of 255; convert it to 8"):
        folder.check()


def test_colours_of_16_bits_that_use_them_pass(folder, caplog):
    sixteen_bits(folder, 65535)
    folder.check()
    assert not caplog.records


def test_images_that_are_nearly_black_to_the_model_are_warned_of(folder, caplog):
    """Fractions saved as whole numbers, or masks in place of pictures."""
    for image_id, size in SIZES.items():
        Image.new("L", size, image_id).save(folder.images / f"{image_id}.png")
        folder.content["images"][[*SIZES].index(image_id)]["file_name"] = f"{image_id}.png"
    folder.check()
    assert "would see nearly black images, with values up to 5 of 255 in 3 of them" in caplog.text


def test_headers_are_read_of_evenly_spread_images(folder, monkeypatch):
    folder.content["images"] = [{"id": i, "file_name": "5.jpg", "width": 64, "height": 64} for i in range(1, 101)]
    every(lambda a: {"bbox": [1, 1, 9, 9]})(folder.content)
    opened, size_in_header = [], image_files._size_in_header
    monkeypatch.setattr(image_files, "_size_in_header", lambda *a: (opened.append(a), size_in_header(*a))[1])
    assert folder.check(max_headers=7).num_images == 100 and len(opened) == 7
    folder.content["images"][1]["width"] = 63
    folder.check(max_headers=7)
    with pytest.raises(UserError, match="image 2 must have"):
        folder.check()
