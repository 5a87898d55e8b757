"""COCO-format data that are odd but sound pass here and in Detectron2; what is of no use is told and left out."""

import logging

import numpy as np
import pytest
from coco_folder import SIZES, Folder, annotation, detections, every, image, whole
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.evaluation import COCOEvaluator
from PIL import Image
from pycocotools import mask as mask_utils

from repr_det.datasets import image_files, masks
from repr_det.method.errors import UserError


def as_detectron2_reads_it(folder, name="repr_det_test_folder"):
    """Stock loading and mapping of every image, without random resizing: width and height must fit."""
    register_coco_instances(name, {}, str(folder.json), str(folder.images))
    try:
        cfg = get_cfg()
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (0,), "none"
        mapper = DatasetMapper(cfg, is_train=True)
        return [mapper(record) for record in DatasetCatalog.get(name)]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def picture(mode="RGB", suffix="jpg", turned=False, **options):
    """Saves image 1 anew, turned by a quarter where the EXIF orientation turns it back."""

    def change(folder):
        Image.new(mode, SIZES[1][:: -1 if turned else 1]).save(folder.images / f"1.{suffix}", **options)
        image(0, file_name=f"1.{suffix}")(folder.content)

    return change


def orientation(number):
    exif = Image.Exif()
    exif[274] = number
    return exif


def content(*changes):
    return lambda folder: [change(folder.content) for change in changes]


def unicode_subfolder(folder):
    (folder.images / "große Bilder 細胞").mkdir()
    (folder.images / "1.jpg").rename(folder.images / "große Bilder 細胞" / "ein s.jpg")
    image(0, file_name="große Bilder 細胞/ein s.jpg")(folder.content)


def string_image_ids(folder):
    for entry in folder.content["images"]:
        entry["id"] = str(entry["id"])
    every(lambda a: {"image_id": str(a["image_id"])})(folder.content)


def lengths_of_other_tools(folder):
    for entry in folder.content["images"]:
        entry["width"], entry["height"] = float(entry["width"]), float(entry["height"])


CROWD = {"counts": [0, 600, 600], "size": [30, 40]}
UNSORTED = [{"id": 7, "name": "plate"}, {"id": 90, "name": "none"}, {"id": 3, "name": "cell"}]
ODD = {
    "RLE crowd": content(annotation(0, iscrowd=1, segmentation=CROWD)),
    "flags of other tools": content(every(lambda a: {"iscrowd": False})),
    "lengths of other tools": lengths_of_other_tools,
    "greyscale": picture("L"),
    "CMYK": picture("CMYK"),
    "palette": picture("P", "png"),
    "EXIF, rotated": picture(turned=True, exif=orientation(6)),
    "EXIF, rotated png": picture(suffix="png", turned=True, exif=orientation(8)),
    "EXIF, upside down": picture(exif=orientation(3)),
    "damaged EXIF": picture(exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "unicode subfolder": unicode_subfolder,
    "a box sticks out": content(annotation(0, bbox=[-2, -2.5, 50, 60])),
    "unsorted sparse categories": content(whole(categories=UNSORTED)),
    "string image ids": string_image_ids,
    "polygons and extras": content(
        annotation(0, segmentation=[[2, 3, 12, 3, 12, 15]], score=0.3), annotation(1, segmentation=[]), whole(info={})
    ),
    "keypoints": content(annotation(0, keypoints=[1, 2, 2] * 17), annotation(1, keypoints=None)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_but_sound_data_pass_here_and_in_detectron2(tmp_path, name):
    folder = Folder(tmp_path / "a folder with späces")
    ODD[name](folder)
    summary = folder.check()
    assert summary.num_images == 3 and summary.num_boxes == 4 and set(summary.class_names) >= {"cell", "plate"}
    assert folder.check(decode=True) == summary
    records = as_detectron2_reads_it(folder)
    assert [len(record["instances"]) for record in records] == ([1, 2, 0] if name == "RLE crowd" else [2, 2, 0])
    assert [tuple(record["image"].shape[:0:-1]) for record in records] == list(SIZES.values())
    ids = {name: summary.class_names.index(name) for name in ("cell", "plate")}
    assert records[1]["instances"].gt_classes.tolist() == [ids["cell"], ids["plate"]]


@pytest.mark.parametrize("size", [SIZES[1], SIZES[1][::-1]])
def test_exif_rotation_decides_which_size_is_right(folder, size):
    ODD["EXIF, rotated"](folder)
    image(0, width=size[0], height=size[1])(folder.content)
    if size == SIZES[1]:
        folder.check()
    else:
        with pytest.raises(UserError, match="width and height 40x30"):
            folder.check()


def test_no_boxes_where_they_are_not_needed(folder):
    for change in (whole(annotations=[]), whole(annotations=...)):
        change(folder.content)
        assert folder.check(allow_no_boxes=True).num_boxes == 0


def test_a_few_useless_boxes_pass_with_a_warning_as_in_coco_train2017(folder, caplog):
    first = folder.content["annotations"][0]
    folder.content["annotations"] = [first | {"id": i} for i in range(1, 2001)]
    annotation(9, bbox=[296.65, 388.33, 1.03, 0.0])(folder.content)
    annotation(10, bbox=[2, 3, 4, 0])(folder.content)
    with caplog.at_level(logging.WARNING):
        folder.check()
    assert "annotation 10 has a bbox without area" in caplog.text and "2 such boxes of 2000" in caplog.text
    annotation(11, bbox=[40, 30, 4, 4])(folder.content)
    with pytest.raises(UserError, match=r"annotation 10 has a bbox without area.* \(3 such boxes\)"):
        folder.check()


@pytest.mark.parametrize(
    "damage", [dict(bbox=[2, 3, 0, 4]), dict(segmentation=[[2, 3, 12, 15]]), dict(segmentation=[[]])]
)
def test_one_useless_object_among_many_is_left_out_and_told(folder, catalogs, caplog, damage):
    first = folder.content["annotations"][0]
    folder.content["annotations"] = [first | {"id": i} for i in range(1, 146)]
    annotation(9, **damage)(folder.content)
    with caplog.at_level(logging.WARNING):
        folder.check()
    assert (
        "annotation 10 has a " in caplog.text and "1 such " in caplog.text and " of 145 are left aside" in caplog.text
    )
    assert sum(len(record["instances"]) for record in as_detectron2_reads_it(folder)) == 144
    annotation(10, **damage)(folder.content)
    with pytest.raises(UserError, match=r"annotation 10 has a .* \(2 such "):
        folder.check()


@pytest.mark.parametrize(
    "segmentation, gap",
    [
        (
            {"size": [30, 40], "counts": "x"},
            "annotation 3 has RLE that must have the size [height, width] of its image, [40, 30], got [30, 40]",
        ),
        ([[1, 2, 3, "4", 5, 6]], "annotation 3 has a polygon with the coordinate '4'"),
        ([[1, 2, 3, float("nan"), 5, 6]], "annotation 3 has a polygon with the coordinate nan"),
    ],
)
def test_boxes_can_be_trained_beside_masks_that_cannot(folder, segmentation, gap):
    annotation(2, segmentation=segmentation)(folder.content)
    assert folder.check().mask_gap == gap


def test_every_string_of_pycocotools_is_read(tmp_path):
    generator = np.random.default_rng(0)
    for width, height in ((1, 1), (40, 30), (640, 480), (3000, 2000)):
        for share in (0, 0.001, 0.5, 1):
            pixels = np.asfortranarray((generator.random((height, width)) < share).astype(np.uint8))
            text = mask_utils.encode(pixels)["counts"].decode()
            assert masks.mask_gap({"size": [height, width], "counts": text}, (width, height)) is None
            flat = pixels.ravel("F")
            changes = (np.diff(flat, prepend=0) != 0).nonzero()[0]
            runs = np.diff(np.concatenate([[0], changes, [flat.size]]))
            np.testing.assert_array_equal(masks._lengths(text), runs)
            for damaged in (text[:-1], text + "z", "!" + text):
                gap = masks.mask_gap({"size": [height, width], "counts": damaged}, (width, height))
                assert gap.startswith("RLE whose counts")


def test_training_needs_less_than_evaluation(folder):
    annotation(2, area=...)(folder.content)
    assert "'area'" in folder.check(for_evaluation=False).evaluation_gap
    assert len(as_detectron2_reads_it(folder)) == 3


def ap_of_the_truth(folder, name):
    """Stock COCO evaluation of the true boxes."""
    load_coco_json(str(folder.json), str(folder.images), name)
    MetadataCatalog.get(name).json_file = str(folder.json)
    evaluator = COCOEvaluator(name, ("bbox",), distributed=False)
    evaluator.reset()
    classes = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    for entry in folder.content["images"]:
        truth = [a for a in folder.content["annotations"] if a["image_id"] == entry["id"]]
        found = detections(entry, [a["bbox"] for a in truth], [classes[a["category_id"]] for a in truth])
        evaluator.process([{"image_id": entry["id"]}], found)
    return evaluator.evaluate()["bbox"]["AP"]


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_what_is_called_an_evaluation_gap_breaks_coco_evaluation(folder, catalogs, key):
    folder.check()
    assert ap_of_the_truth(folder, "sound") == pytest.approx(100)
    annotation(2, **{key: ...})(folder.content)
    assert folder.check(for_evaluation=False).evaluation_gap
    with pytest.raises(KeyError, match=key):
        ap_of_the_truth(folder, "gap")


@pytest.mark.parametrize("area", [-1, 1.1e10])
def test_areas_that_are_refused_are_those_that_stock_evaluation_ignores(folder, catalogs, area):
    for within in (0, 1e10):
        every(lambda a, within=within: {"area": within})(folder.content)
        folder.check()
        assert ap_of_the_truth(folder, f"within_{within}") == pytest.approx(100)
    every(lambda a: {"area": area})(folder.content)
    with pytest.raises(UserError, match="'area' that COCO evaluation ignores"):
        folder.check()
    assert np.isnan(ap_of_the_truth(folder, "ignored"))


def test_annotation_id_zero_is_warned_of_since_pycocotools_never_matches_it(folder, catalogs, caplog):
    annotation(0, id=0)(folder.content)
    with caplog.at_level(logging.WARNING):
        folder.check()
    assert "annotation id 0 means 'no match' to pycocotools" in caplog.text
    assert ap_of_the_truth(folder, "zero") < 90


# ---- numbers that cannot be, and things that are there twice ----


def many(content, count=60):
    """Boxes everywhere in the images, larger and smaller ones."""
    generator = np.random.default_rng(0)
    content["annotations"] = []
    for number in range(1, count + 1):
        image_id = [*SIZES][number % 3]
        extent = generator.uniform(0.1, 0.9, 2) * SIZES[image_id]
        start = generator.uniform(0, 1, 2) * (SIZES[image_id] - extent)
        box = [float(v) for v in (*start, *extent)]
        entry = {"id": number, "image_id": image_id, "category_id": 3, "bbox": box, "area": box[2] * box[3]}
        content["annotations"].append(entry | {"iscrowd": 0})


def boxes(form):
    return every(lambda a: {"bbox": form(*a["bbox"])})


def areas(factor, share=1):
    return every(lambda a: {"area": a["area"] * factor} if a["id"] <= 60 * share else {})


def repeat(shift=0, count=60):
    def change(content):
        copies = [a | {"id": a["id"] + 60, "bbox": [v + shift for v in a["bbox"]]} for a in content["annotations"]]
        content["annotations"] += copies[:count]

    return change


def percent(content):
    for entry in content["images"]:
        entry["width"], entry["height"] = 4 * entry["width"], 4 * entry["height"]


FORM = "boxes reach beyond their image (the first is annotation "
READ_AS = "60 of 60 boxes fit their images: a bbox must be [x, y, width, height]"
DOUBTFUL = [
    (boxes(lambda x, y, w, h: [x, y, x + w, y + h]), [FORM, f"; read as two corners [x1, y1, x2, y2], {READ_AS}"]),
    (boxes(lambda x, y, w, h: [x + w / 2, y + h / 2, w, h]), [FORM, "; read as [centre x, centre y, width, heig"]),
    (boxes(lambda *box: [v * 0.5 for v in box]), ["none of 60 boxes reaches beyond 50% of the width and 50% of the"]),
    (boxes(lambda *box: [v / 4 for v in box]), ["they look like boxes for images of another size"]),
    (areas(0), ["annotation 1 has an 'area' that cannot be that of its bbox, and APs, APm and APl go by it: 0.0 with"]),
    (areas(1 / 1200), ["(60 such of 60); give the object's area in pixels, or width * height"]),
    (areas(1 / 80), ["(60 such of 60); give the object's area"]),
    (areas(9, 1 / 2), ["(30 such of 60); give the object's area"]),
    (repeat(), ["60 of 120 objects are there twice", "(the first: annotations 1 and 61, ["]),
    (repeat(0.001), [" of 120 objects are there twice"]),
    (repeat(count=7), ["7 of 67 objects are there twice"]),
]


@pytest.mark.parametrize("change, fragments", DOUBTFUL)
def test_what_is_doubtful_is_one_warning_that_names_the_first_entry(folder, caplog, change, fragments):
    many(folder.content)
    folder.check()
    assert not caplog.records
    change(folder.content)
    if "area" not in str(fragments):
        every(lambda a: {"area": a["bbox"][2] * a["bbox"][3]})(folder.content)
    folder.check(name="cells")
    (record,) = caplog.records
    told = record.getMessage()
    assert told.startswith(f"data set cells: {folder.json}: ") and all(fragment in told for fragment in fragments)


SOUND = {
    "by a pixel": boxes(lambda x, y, w, h: [x, y, w + 1, h + 1]),
    "areas of masks": areas(0.3),
    "areas counted in whole pixels": every(lambda a: {"area": (a["bbox"][2] + 1) * (a["bbox"][3] + 1)}),
    "one object of two classes": lambda content: [
        content["annotations"].append(a | {"id": a["id"] + 120, "category_id": 7}) for a in [*content["annotations"]]
    ],
    "one of them twice among a hundred": lambda content: content["annotations"].append(
        content["annotations"][0] | {"id": 121}
    ),
}


@pytest.mark.parametrize("change", SOUND.values(), ids=SOUND)
def test_what_only_looks_odd_is_not_told(folder, caplog, change):
    many(folder.content, 120)
    change(folder.content)
    folder.check()
    assert not caplog.records


def test_parts_of_a_hundred_are_told(folder, caplog):
    for image_id, (width, height) in SIZES.items():
        Image.new("RGB", (4 * width, 4 * height), (9, 80, 120 + image_id)).save(folder.images / f"{image_id}.jpg")
    percent(folder.content)
    many(folder.content)
    width = {i: size for i, size in SIZES.items()}
    for entry in folder.content["annotations"]:
        w, h = width[entry["image_id"]]
        x, y, bw, bh = entry["bbox"]
        entry["bbox"] = [100 * x / w, 100 * y / h, 100 * bw / w, 100 * bh / h]
        entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    folder.check()
    assert "all 60 boxes end at 100 or before in images of any size" in caplog.text


def test_classes_in_two_spellings_are_told(folder, caplog):
    whole(categories=[{"id": 3, "name": "Bläschen"}, {"id": 7, "name": "Bla\u0308schen"}])(folder.content)
    folder.check()
    assert r"'Bl\xe4schen' and 'Bla\u0308schen' are one name in two spellings, and taken for two classes" in caplog.text


@pytest.mark.parametrize("same", ["name", "path", "link", "content"])
def test_one_image_under_several_ids_is_told(folder, caplog, same):
    """One entry an object, as some tools export; frames of several videos under one name."""
    other = {"name": "1.jpg", "path": "./../images/1.jpg", "link": "link.jpg", "content": "copy.jpg"}[same]
    if same == "link":
        (folder.images / other).symlink_to(folder.images / "1.jpg")
    elif same == "content":
        (folder.images / other).write_bytes((folder.images / "1.jpg").read_bytes())
    folder.content["images"].append({"id": 9, "file_name": other, "width": 40, "height": 30})
    folder.check()
    (record,) = caplog.records
    assert f"1 of 4 entries of 'images' repeat the image of another one (the first: 1, '1.jpg', and 9, '{other}')" in (
        record.getMessage()
    )


def test_an_image_that_can_be_read_is_not_called_broken(tmp_path):
    """A strip of 5000x3 becomes 0 pixels high at INPUT.MAX_SIZE_TRAIN 160."""
    path = tmp_path / "strip.png"
    Image.new("RGB", (5000, 3)).save(path)
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96,), 160
    mapper = image_files.NamingMapper(DatasetMapper(cfg, True))
    with pytest.raises(UserError) as error:
        mapper({"file_name": str(path), "width": 5000, "height": 3})
    assert str(error.value).startswith(f"{path} (5000x3) can be read but not prepared for the model: ")
    assert "see INPUT" in str(error.value) and "repair" not in str(error.value)
