"""COCO-format data: every kind of damage gets its one-line error; odd but sound data: test_coco_format_odd.py."""

import shutil

import numpy as np
import pytest
from coco_folder import SIZES, annotation, category, image, whole
from PIL import Image

from repr_det import datasets
from repr_det.datasets import image_files
from repr_det.method.errors import UserError


def test_a_sound_folder(folder):
    keypoint_gap = "annotation 1 has no 'keypoints', which COCO evaluation needs"
    assert folder.check() == datasets.CocoSummary(3, 4, ("cell", "plate"), (3, 7), keypoint_gap=keypoint_gap)


# ---- wrong content ----


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
    (annotation(1, id=...), "annotation number 1 must have an integer id (pycocotools needs it), got None"),
    (annotation(1, id=1), "annotation id 1 occurs twice"),
    (annotation(0, image_id=...), "annotation 1 has no image_id"),
    (annotation(0, category_id=...), "annotation 1 has no category_id"),
    (annotation(0, bbox=...), "annotation 1 has no bbox"),
    (annotation(2, image_id=9), "annotation 3 names image_id 9, which is not in 'images'"),
    (annotation(2, image_id=[2]), "annotation 3 names image_id [2], which is not in 'images'"),
    (annotation(2, category_id=0), "annotation 3 names category_id 0, which is not in 'categories' (3, 7)"),
    (
        annotation(2, bbox=[1, 2, 3]),
        "annotation 3 must have a bbox of four finite numbers [x, y, width, height], got [1,",
    ),
    (annotation(2, bbox=[]), "must have a bbox of four finite numbers"),
    (annotation(2, bbox=[1, 2, 3, "4"]), "must have a bbox of four finite numbers"),
    (annotation(2, bbox=[1, 2, None, 4]), "must have a bbox of four finite numbers"),
    (annotation(2, bbox=[1, 2, float("nan"), 4]), "must have a bbox of four finite numbers"),
    (annotation(2, bbox=[1, float("-inf"), 3, 4]), "must have a bbox of four finite numbers"),
    (
        annotation(2, bbox=[9, 9, -3, 4]),
        "annotation 3 has a bbox of negative size: [9, 9, -3, 4] is read as [x, y, wid",
    ),
    (annotation(2, bbox=[9, 9, 3, 0]), "annotation 3 has a bbox without area: [9, 9, 3, 0] is read as"),
    (annotation(2, bbox=[30, 0, 5, 5]), "annotation 3 has a bbox outside its image 2, which is 30x40: [30, 0, 5, 5]"),
    (annotation(2, bbox=[3, -9, 5, 9]), "annotation 3 has a bbox outside its image 2"),
    (annotation(2, iscrowd=2), "annotation 3 must have iscrowd 0 or 1, got 2"),
    (annotation(2, ignore=1), "annotation 3 has 'ignore' set, which Detectron2 does not support"),
    (annotation(2, segmentation=[1, 2, 3, 4, 5, 6]), "annotation 3 must have a segmentation of polygons"),
    (annotation(2, segmentation={"size": [4, 4]}), "annotation 3 must have a segmentation of polygons"),
    (
        annotation(2, segmentation=[[2, 3, 12, 15]]),
        "annotation 3 has a segmentation without a polygon of 3 points or m",
    ),
    (annotation(2, segmentation=[[]]), "annotation 3 has a segmentation without a polygon of 3 points or more ([[]])"),
    (annotation(2, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 3 has a segmentation without a polygon of 3 po"),
    (annotation(2, bbox=[1, 2, 10**400, 4]), "must have a bbox of four finite numbers"),
    (annotation(2, segmentation={"size": [10], "counts": "abc"}), "or RLE (size [height, width], counts a list of"),
    (annotation(2, segmentation={"size": ["30", "40"], "counts": "a"}), "or none; got {'size': ['30', '40'], 'counts'"),
    (annotation(2, segmentation={"size": [40, 30], "counts": 7}), "or none; got {'size': [40, 30], 'counts': 7}"),
    (
        annotation(2, segmentation={"size": [40, 30], "counts": [0, -1]}),
        "or none; got {'size': [40, 30], 'counts': [0, -",
    ),
    (
        annotation(2, segmentation={"size": [40, 30], "counts": [2**40]}),
        "or none; got {'size': [40, 30], 'counts': [10",
    ),
    (annotation(2, iscrowd="no"), "annotation 3 must have iscrowd 0 or 1, got 'no'"),
    (annotation(2, area=...), "1 annotations have no 'area', which COCO evaluation needs"),
    (annotation(2, area=None), "1 annotations have no 'area'"),
    (
        annotation(2, iscrowd=...),
        "1 annotations have no 'iscrowd', which COCO evaluation needs (0 for a single object); ",
    ),
    (lambda content: [a.update(iscrowd=1) for a in content["annotations"]], "all 4 annotations are crowd regions"),
    (image(0, file_name="no.jpg"), "1 of 3 image files are missing in "),
    (image(0, file_name="n\0.jpg"), "1 of 3 image files are missing in "),
    (
        image(0, width=30, height=40),
        "image 1 must have the file's width and height 40x30 (EXIF orientation applied), got 30x",
    ),
]


@pytest.mark.parametrize("change, message", WRONG, ids=[message[:60] for _, message in WRONG])
def test_wrong_content(folder, change, message):
    change(folder.content)
    with pytest.raises(UserError) as caught:
        folder.check(name="mine")
    text = str(caught.value)
    assert message in text and str(folder.json) in text and text.startswith("data set mine: ") and "\n" not in text


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "is not valid JSON (line 1, column 1: Expecting value)"),
        (
            b'{"images": [\n  {"id": 1, "fi',
            "is not valid JSON (line 2, column 13: Unterminated string starting at); it may be truncated",
        ),
        (b"<html>", "is not valid JSON (line 1, column 1: Expecting value)"),
        (b"[]", "must hold an object with images, annotations and categories, got a list"),
        (b"null", "must hold an object"),
        (b'{"images": "\xff"}', "is not UTF-8 text: invalid start byte at byte 12"),
        (
            b'\xef\xbb\xbf{"images": []}',
            "begins with a byte order mark, which Detectron2 cannot read: save it without",
        ),
        (b'{"images": ' + b"9" * 5000 + b"}", "is no COCO annotation file: Exceeds the limit"),
        (b'{"images": ' + b"[" * 100_000, "is no COCO annotation file: maximum recursion depth exceeded"),
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


def test_damaged_image_files(folder):
    for number in (2, 5):
        (folder.images / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 3 image files are empty \(0 bytes\) in .*; the first is '2\.jpg'"):
        folder.check()
    (folder.images / "2.jpg").write_bytes(b"no image")
    shutil.copy(folder.images / "1.jpg", folder.images / "5.jpg")
    with pytest.raises(UserError, match=r"2\.jpg cannot be read as an image"):
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
    with pytest.raises(UserError, match=r"5\.jpg cannot be read as an image: .*truncated"):
        folder.check()
    monkeypatch.setattr(image_files, "DECODED_BYTES", 0)  # as in a large data set
    folder.check()
    with pytest.raises(UserError, match=r"5\.jpg cannot be read as an image: .*truncated"):
        folder.check(decode=True)


@pytest.mark.parametrize("bits", [np.uint16, np.int32, np.float32])
def test_pixels_of_more_than_8_bits_are_refused(folder, bits):
    Image.fromarray(np.ones(SIZES[5][::-1], bits)).save(folder.images / "5.tif")
    folder.content["images"][2]["file_name"] = "5.tif"
    with pytest.raises(UserError, match=r"5\.tif cannot be read as an image: its pixels have more than 8 bits"):
        folder.check()


def test_headers_are_read_of_evenly_spread_images(folder, monkeypatch):
    folder.content["images"] = [{"id": i, "file_name": "5.jpg", "width": 64, "height": 64} for i in range(1, 101)]
    folder.content["annotations"] = [a | {"bbox": [1, 1, 9, 9]} for a in folder.content["annotations"]]
    opened, open_image = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: (opened.append(path), open_image(path))[1])
    assert folder.check(max_headers=7).num_images == 100 and len(opened) == 7
    folder.content["images"][1]["width"] = 63
    folder.check(max_headers=7)
    with pytest.raises(UserError, match="image 2 must have"):
        folder.check()
