"""COCO-format data: every kind of damage is refused or warned of in one line; what only looks odd passes."""

import gzip
import json
import os
import reprlib
import shutil

import cv2
import numpy as np
import pytest
from coco_folder import SIZES, Folder, annotation, ap_of_the_truth, category, change, every, image, many, put
from conftest import refused
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from repr_det.datasets import CocoEvaluator, image_files


def as_detectron2_reads_it(folder):
    """Stock loading and mapping of every image, without random resizing: width and height must fit."""
    register_coco_instances("folder", {}, str(folder.json), str(folder.images))
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (0,), "none"
    return [DatasetMapper(cfg, is_train=True)(record) for record in DatasetCatalog.get("folder")]


def test_a_sound_folder(folder, caplog):
    summary = folder.check()
    assert summary.classes == {3: "cell", 7: "plate"} and len(summary.files) == 3
    assert [purpose for purpose, lines in summary.gaps.items() if lines] == ["masks", "keypoints"]
    what = "annotation 1 has no segmentation (bbox [2, 3, 10, 12], area 120, in image 1 of 40x30; 4 such of 4)"
    assert summary.gaps["masks"] == [what]
    assert not caplog.records


NAN, INF, HUGE = float("nan"), float("inf"), 10**400
RUNS = [{"size": [40, 30], "counts": counts} for counts in (7, [0, -1], [2**40])]  # no masks in RLE
WRONG_TYPES = {
    ("images", "id"): [..., 1.5, 2**63],
    ("images", "file_name"): [..., ""],
    ("images", "width"): [..., 0, 40.5, INF, "40", True],
    ("images", "height"): [..., -30],
    ("categories", "id"): [..., "3", 2**63],
    ("categories", "name"): [..., " "],
    ("annotations", "id"): [..., "1", -(2**63) - 1],
    ("annotations", "image_id"): [..., [2]],
    ("annotations", "category_id"): [..., 3.0, True],
    ("annotations", "bbox"): [..., [1, 2, 3], [1, 2, 3, "4"], [1, 2, NAN, 4], [1, 2, HUGE, 4]],
    ("annotations", "iscrowd"): [2],
    ("annotations", "ignore"): [1],
    ("annotations", "segmentation"): [[1, 2, 3, 4, 5, 6], {"size": [4, 4]}, {"size": [10], "counts": "abc"}, *RUNS],
    ("annotations", "keypoints"): [[[1, 2, 2]], [1, None, 2], "1 2 2"],
}


@change
def given(folder, **attributes):
    vars(folder).update(attributes)


@change
def file(folder, number, content, suffix=".jpg"):
    """The image of this number in the json is this: bytes, or an array (H, W) or (H, W, 3)."""
    path = folder.images / f"{[*SIZES][number]}{suffix}"
    image(number, file_name=path.name)(folder)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content.ndim == 3:
        cv2.imwrite(str(path), content)
    else:
        Image.fromarray(content).save(path)


def noise(largest, kind=np.uint16, channels=(3,)):
    return np.random.default_rng(0).integers(0, largest + 1, (64, 64, *channels)).astype(kind)


def truncated(folder):
    file(2, noise(255, np.uint8))(folder)
    file(2, (folder.images / "5.jpg").read_bytes()[:2000])(folder)


@change
def renamed(folder, there, named):
    """The first image lies ``there`` and is ``named`` otherwise."""
    (folder.images / there).parent.mkdir(exist_ok=True)
    (folder.images / "1.jpg").rename(folder.images / there)
    image(0, file_name=named)(folder)


def pipe(folder):
    folder.content, folder.json = None, folder.images / "pipe.json"
    os.mkfifo(folder.json)


NEARLY = [("Bla\u0308schen.jpg", "Bläschen.jpg"), ("B (1).jpg", "b (1).JPG"), ("a b.jpg", "a b.jpg ")]
NEARLY += [("é/1.jpg", "e\u0301/1.jpg"), ("s/b.jpg", "C:\\b.jpg"), ("b.jpg", "https://x.org/b.jpg")]
LOST = "annotation 3 has no polygon of 3 points or more, and Detectron2 leaves it out"
ABSENT = "of 3 image files are missing or empty in "
UNREADABLE = "cannot be read as an image: "
DEEP = f"{UNREADABLE}its pixels have more than 8 bits"
LISTS = "truth.json: must hold lists of objects 'images', 'annotations' and 'categories': "
NOT_JSON = "truth.json: cannot be read as JSON: "
WRONG = [
    (given(content=b'{"images": [\n  {"id": 1, "fi'), f"{NOT_JSON}EOF while parsing a string at line 2 column 15"),
    (given(content=b"[]"), f"{LISTS}Input should be a valid dictionary"),
    (given(content=b'\xef\xbb\xbf{"images": []}'), "begins with a byte order mark, which Detectron2 cannot read: save"),
    (given(content='{"images": []}'.encode("utf-16")), "is UTF-16 text: save it as UTF-8"),
    (given(content=gzip.compress(b"{}")), "is compressed by gzip: unpack it with 'gunzip'"),
    (given(content=None), f"{NOT_JSON}[Errno 2] No such file or directory"),
    (pipe, "pipe.json: is not a file"),
    (image(1, width=0), "truth.json: entry 1 of 'images' (id 2) has a wrong 'width', 0: Input should be greater th"),
    (put(images=...), f"{LISTS}images: Field required"),
    *((put(**{key: []}), f"{LISTS}{key}: List should have") for key in ("images", "annotations", "categories")),
    (put(images={"1": {}}), f"{LISTS}images: Input should be a valid list"),
    (put(images=["cell"]), f"{LISTS}images: 0: Input should be a valid dictionary"),
    (image(1, id=1), "the id 1 occurs twice in 'images'"),
    (lambda folder: (string_image_ids(folder), image(2, id="5\0")(folder)), "image ids must not end in NUL, which"),
    (image(2, id="five"), "image ids must be all integers or all strings"),
    (category(1, id=3), "the id 3 occurs twice in 'categories'"),
    (annotation(1, id=1), "annotation 1 has the id of an earlier one (bbox [20.5, 1, 15, 20], area 300, in image 1"),
    (annotation(2, image_id=9), "annotation 3 names image_id 9, not in 'images' (1, 2, 5)"),
    (annotation(2, category_id=0), "annotation 3 names category_id 0, not in 'categories' (3, 7)"),
    (annotation(2, bbox=[9, 9, -3, 4]), "annotation 3 has a bbox of negative size: a bbox must be [x, y, width, "),
    (annotation(2, bbox=[9, 9, 3, 0]), "annotation 3 has a bbox without area, and Detectron2 leaves it out"),
    (annotation(2, bbox=[30, 0, 5, 5]), "(bbox [30, 0, 5, 5], area 1200, in image 2 of 30x40; 1 such of 4)"),
    (annotation(2, bbox=[3, -9, 5, 9]), "annotation 3 has a bbox outside its image"),
    (every(lambda a: {"bbox": [v / 64 for v in a["bbox"]]}), "a bbox of a pixel or less: give pixels"),
    *((annotation(2, segmentation=value), LOST) for value in ([[2, 3, 12, 15]], [[]], [[1, 2, 3, 4, 5, 6, 7]])),
    (every(lambda a: {"iscrowd": 1}), "annotation 1 is a crowd region (iscrowd 1), which training"),
    (annotation(2, area=...), "annotation 3 must have a finite number as 'area', which COCO evaluation needs: give"),
    (annotation(2, iscrowd=...), "annotation 3 has no 'iscrowd', which COCO evaluation needs: give 0 for a single"),
    *((annotation(2, area=value), f"area {reprlib.repr(value)}") for value in ("12", NAN, True, HUGE, 2**64, -9, 1e12)),
    (every(lambda a: {"area": -a["area"]}), "has an 'area' that COCO evaluation ignores: give the object's area in"),
    *((renamed(there, named), f"({there!a} is there: spell names alike") for there, named in NEARLY),
    *((image(0, file_name=name), f"1 {ABSENT}") for name in ("no.jpg", "n\0.jpg")),
    (lambda folder: [(folder.images / f"{i}.jpg").write_bytes(b"") for i in (2, 5)], f"2 {ABSENT}"),
    (renamed("x/1.jpg", "x"), f"1 {ABSENT}"),
    (lambda folder: vars(folder).update(images=folder.json), "truth.json does not exist, or is not a folder"),
    (image(0, width=30, height=40), "image 1 must have the width and height of '1.jpg', 40x30 (EXIF orientation "),
    (file(1, b"no image"), f"2.jpg {UNREADABLE}cannot identify image file"),
    (file(1, b"version https://git-lfs.github.com/spec/v1\n"), f"2.jpg {UNREADABLE}it is a Git LFS pointer"),
    (truncated, "image file is truncated"),
    *((file(2, noise(1023), suffix), DEEP) for suffix in (".png", ".tif", ".ppm")),
    *((file(2, noise(9, kind, ()), ".tif"), DEEP) for kind in (np.uint16, np.int32, np.float32)),
]
FAULTS = {1: [1, 2, 3, 4, 5, 6], 64.0: {"counts": "abc", "size": [64.0, 96.0]}, 9.0: {"counts": [9.0], "size": [1, 9]}}
for shown, value in FAULTS.items():
    WRONG.append((annotation(1, segmentation=value), f"a valid {'list' if shown == 1 else 'integer'}, got {shown}"))
for (section, key), values in WRONG_TYPES.items():
    for value in values:
        shown = reprlib.repr(None if value is ... else value)
        WRONG.append((put(section, 1, **{key: value}), f" has a wrong '{key}', {shown}: "))


@pytest.mark.parametrize("edit, message", WRONG, ids=[f"{n} {message[:50]}" for n, (_, message) in enumerate(WRONG)])
def test_wrong_data(folder, edit, message):
    edit(folder)
    text = refused(folder.check, "mine")
    assert message in text and text.startswith("data set mine: ") and len(text) < 500 + 2 * len(str(folder.json))


@change
def boxes(folder, form):
    """The boxes in another form, with areas that fit."""
    for entry in folder.content["annotations"]:
        box = entry["bbox"] = form(*entry["bbox"])
        entry["area"] = box[2] * box[3]


def areas(factor):
    return every(lambda a: {"area": a["area"] * factor})


@change
def repeat(folder, shift=0, count=60, **values):
    for a in folder.content["annotations"][:count]:
        copy = a | {"id": a["id"] + 1000, "bbox": [v + shift for v in a["bbox"]]} | values
        folder.content["annotations"].append(copy)


def percent(folder):
    """Boxes that end at 100, in images that are larger."""
    for entry in folder.content["images"]:
        entry["width"] = entry["height"] = 120
        Image.new("RGB", (120, 120), (9, 80, 120 + entry["id"])).save(folder.images / entry["file_name"])
    boxes(lambda x, y, *_: [x, y, 100 - x, 100 - y])(folder)


DOUBTFUL = [
    (boxes(lambda x, y, w, h: [x, y, x + w, y + h]), "; read as two corners [x1, y1, x2, y2], 60 of 60 boxes fit"),
    (boxes(lambda x, y, w, h: [x + w / 2, y + h / 2, w, h]), "; read as [centre x, centre y, width, height], 60 of 60"),
    (boxes(lambda *box: [v * 0.5 for v in box]), "ends, as all do, within 60% of its image, like one of an image of"),
    (percent, "annotation 1 ends, as all do, at 100 or before, like a part of 100"),
    (areas(0), "annotation 1 has an 'area' that does not fit its bbox, and APs, APm and APl go by it: give "),
    (areas(1 / 80), "60 such of 60)"),
    (areas(9), "60 such of 60)"),
    (repeat(), "annotation 1001 has class and box of another object of its image: list it once (bbox ["),
    (lambda folder: (boxes(lambda *box: np.ceil(box).tolist())(folder), repeat(-0.001)(folder)), "60 such of 120)"),
    (every(lambda a: {"iscrowd": int(a["id"] <= 7)}), "and AP leave out: give 0 to a single object (bbox ["),
    (annotation(0, id=0), "annotation 0 has the id 0, which means 'no match' to pycocotools: start at 1 ("),
    (category(1, name="Cell"), "'cell' and 'Cell', one name in two spellings, are taken for two classes"),
]
SOUND = [
    boxes(lambda x, y, w, h: [x, y, w + 1, h + 1]),
    areas(0.3),
    every(lambda a: {"iscrowd": int(a["id"] <= 6)}),
    every(lambda a: {"area": (a["bbox"][2] + 1) * (a["bbox"][3] + 1)}),  # counted in whole pixels
    repeat(category_id=7),
    lambda folder: (many(folder, 120), repeat(count=1)(folder)),
]


@pytest.mark.parametrize("edit, message", [*DOUBTFUL, *((edit, None) for edit in SOUND)])
def test_what_is_doubtful_is_one_warning_that_names_the_first_entry(folder, caplog, edit, message):
    many(folder)
    folder.check()
    assert not caplog.records
    edit(folder)
    folder.check(name="cells")
    assert len(caplog.messages) == (message is not None)
    assert all(line.startswith(f"data set cells: {folder.json}: ") and message in line for line in caplog.messages)


@pytest.mark.parametrize(
    "damage", [{"bbox": [2, 3, 0, 4]}, {"bbox": [40, 30, 4, 4]}, {"segmentation": [[2, 3, 12, 15]]}, {"id": 2}]
)
@pytest.mark.parametrize("total, allowed", [(145, 1), (2000, 2)])
def test_a_few_useless_objects_are_left_out_and_told(folder, catalogs, caplog, damage, total, allowed):
    """COCO's own train2017 has 2 of 860,001; Detectron2 lets the ids of its 2014 minival repeat."""
    folder.json = folder.json.with_name("minival.json")
    first = folder.content["annotations"][0]
    folder.content["annotations"] = [first | {"id": i} for i in range(1, total + 1)]
    for number in range(9, 9 + allowed):
        annotation(number, **damage)(folder)
    folder.check()
    assert f"annotation {damage.get('id', 10)} has " in caplog.text and f"{allowed} such of {total})" in caplog.text
    if "leaves it out" in caplog.text:
        assert len(as_detectron2_reads_it(folder)[0]["instances"]) == total - allowed
        assert len(CocoEvaluator("folder", ("bbox",), False)._coco_api.getAnnIds(imgIds=[1])) == total - allowed
    annotation(30, **damage)(folder)
    assert f"{allowed + 1} such of {total})" in refused(folder.check)


@pytest.mark.parametrize(("compared", "make"), [(0, os.symlink), (image_files.READ_BYTES, shutil.copy)])
def test_one_image_under_several_ids_is_told(folder, caplog, monkeypatch, compared, make):
    """One file under several names, or equal content if that is not too much to read."""
    monkeypatch.setattr(image_files, "READ_BYTES", compared)
    make(folder.images / "1.jpg", folder.images / "same.jpg")
    folder.content["images"].append({"id": 9, "file_name": "same.jpg", "width": 40, "height": 30})
    folder.check()
    (line,) = caplog.messages
    assert "1 of 4 entries of 'images' repeat the image of another one (the first: 1, '1.jpg', and 9, 's" in line


def test_few_images_of_a_large_data_set_are_decoded(folder, monkeypatch):
    truncated(folder)
    monkeypatch.setattr(image_files, "DECODED_BYTES", 0)
    monkeypatch.setattr(image_files, "DECODED", 1)
    folder.check()


def test_dark_images_are_warned_of(folder, caplog):
    """Fractions saved as whole numbers, or masks in place of pictures."""
    for number, (width, height) in enumerate(SIZES.values()):
        file(number, np.full((height, width), number + 1, np.uint8), ".png")(folder)
    folder.check()
    assert "would see nearly black images, with values up to 3 (" in caplog.text


def test_an_error_in_the_middle_of_a_run_names_the_image(tmp_path):
    """A strip of 5000x3 becomes 0 pixels high at INPUT.MAX_SIZE_TRAIN 160."""
    path = tmp_path / "strip.png"
    Image.new("RGB", (5000, 3)).save(path)
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96,), 160
    mapper = image_files.NamingMapper(DatasetMapper(cfg, True))
    text = refused(mapper, {"file_name": str(path), "width": 5000, "height": 3})
    assert text.startswith(f"{path} cannot be read and prepared for the model: ") and "see INPUT" in text


@change
def picture(folder, mode="RGB", suffix="jpg", turned=False, **options):
    """Saves image 1 anew, turned by a quarter where the EXIF orientation turns it back."""
    Image.new(mode, SIZES[1][:: -1 if turned else 1]).save(folder.images / f"1.{suffix}", **options)
    image(0, file_name=f"1.{suffix}")(folder)


def string_image_ids(folder):
    for entry in folder.content["images"]:
        entry["id"] = str(entry["id"])
    every(lambda a: {"image_id": str(a["image_id"])})(folder)


EXIF = Image.Exif()
EXIF[274] = 6  # orientation: turned by a quarter
ODD = {
    "RLE crowd": annotation(0, iscrowd=1, segmentation={"counts": [0, 600, 600], "size": [30, 40]}),
    "no segmentation": annotation(0, segmentation={}),
    "flags of other tools": every(lambda a: {"iscrowd": False}),
    "lengths of other tools": image(0, width=40.0, height=30.0),
    "palette": picture("P", "png"),
    "EXIF, rotated": picture(turned=True, exif=EXIF),
    "damaged EXIF": picture(exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "unicode subfolder": renamed("große Bilder 細胞/ein s.jpg", "große Bilder 細胞/ein s.jpg"),
    "a box sticks out": annotation(0, bbox=[-2, -2.5, 50, 60]),
    "unsorted sparse categories": put(categories=[{"id": 7, "name": "plate"}, {"id": 3, "name": "cell"}]),
    "colours that use 16 bits": file(2, noise(65535), ".png"),
    "string image ids": string_image_ids,
    "ids of 64 bits": every(lambda a: {"id": 2**63 - a["id"]}),
    "extras": annotation(0, segmentation=[[2, 3, 12, 3, 12, 15]], score=0.3, info={}, keypoints=[1, 2, 2] * 17),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_but_sound_data_pass_here_and_in_detectron2(tmp_path, catalogs, name):
    folder = Folder(tmp_path / "a folder with späces" / name)
    ODD[name](folder)
    summary = folder.check()
    records = as_detectron2_reads_it(folder)
    assert [len(record["instances"]) for record in records] == ([1, 2, 0] if name == "RLE crowd" else [2, 2, 0])
    assert [tuple(record["image"].shape[:0:-1]) for record in records] == list(SIZES.values())
    names = [*summary.classes.values()]
    assert records[1]["instances"].gt_classes.tolist() == [names.index("cell"), names.index("plate")]
    assert not summary.gaps["polygons"]


def test_what_is_said_of_evaluation_is_true_of_the_stock_one(folder, catalogs):
    def ap_after(*edits):
        for edit in edits:
            edit(folder)
        folder.json.write_text(json.dumps(folder.content))
        name = f"data set {len(DatasetCatalog.list())}"
        register_coco_instances(name, {}, str(folder.json), str(folder.images))
        return ap_of_the_truth(name)

    put(info={})(folder)
    for area, ap in ((0, 100), (1e10, 100), (-1, NAN), (1.1e10, NAN)):
        assert ap_after(every(lambda a, area=area: {"area": area})) == pytest.approx(ap, nan_ok=True)
        if ap == 100:
            folder.check()
    assert ap_after(every(lambda a: {"area": 100}), annotation(0, id=0)) < 90
    for key in ("area", "iscrowd"):
        with pytest.raises(KeyError, match=key):
            ap_after(annotation(2, **{key: ...}))
        assert f"'{key}'" in folder.check(for_evaluation=False).gaps["evaluation"][0]
        annotation(2, area=100)(folder)
