"""Names of data sets: which can be registered, and what is said of those that cannot be used."""

import os
from pathlib import Path

import pytest
from coco_folder import Folder, annotation
from detectron2.data import DatasetCatalog, MetadataCatalog

from repr_det import datasets
from repr_det.method.errors import UserError


def test_registering_twice_and_with_other_files(folder, catalogs, tmp_path, monkeypatch):
    folder.check()
    datasets.register_coco_format("mine", folder.json, folder.images)
    monkeypatch.chdir(folder.json.parent)
    datasets.register_coco_format("mine", "truth.json", "images")
    other = Folder(tmp_path / "other")
    other.check()
    for paths in ((other.json, other.images), (folder.json, other.images)):
        with pytest.raises(UserError, match=r"data set mine is already registered with .*truth\.json"):
            datasets.register_coco_format("mine", *paths)
    with pytest.raises(UserError, match="voc_2007_val is already registered with other data"):
        datasets.register_coco_format("voc_2007_val", folder.json, folder.images)
    with pytest.raises(UserError, match="must not be empty"):
        datasets.register_coco_format("", folder.json, folder.images)
    assert datasets.check_registered("mine").num_boxes == 4
    assert datasets.class_names("mine") == ("cell", "plate") and datasets.num_classes("mine") == 2
    assert len(DatasetCatalog.get("mine")) == 3 and MetadataCatalog.get("mine").evaluator_type == "coco"


def test_wrong_data_are_not_registered(folder, catalogs):
    annotation(0, bbox=[1, 2, 3])(folder.content)
    with pytest.raises(UserError):
        folder.check()
    with pytest.raises(UserError, match=r"data set mine: .*annotation 1 must have a bbox"):
        datasets.register_coco_format("mine", folder.json, folder.images)
    assert "mine" not in DatasetCatalog


def test_a_changed_json_is_checked_again(folder, catalogs):
    folder.check()
    datasets.register_coco_format("mine", folder.json, folder.images)
    annotation(0, area=...)(folder.content)
    with pytest.raises(UserError):
        folder.check()
    assert datasets.check_registered("mine", for_evaluation=False).evaluation_gap
    with pytest.raises(UserError, match=r"data set mine: .*1 annotations have no 'area'"):
        datasets.check_registered("mine")


def test_unknown_names(catalogs):
    for check in (datasets.check_registered, datasets.num_classes):
        with pytest.raises(
            UserError, match=r"unknown data set 'coco_2017_trian': did you mean coco_2017_train .*--register"
        ):
            check("coco_2017_trian")
        with pytest.raises(
            UserError, match="unknown data set 'zzz': Register your own with --register NAME JSON IMAGE"
        ):
            check("zzz")
    assert "zzz" not in MetadataCatalog.list()


def test_builtin_names(catalogs, folder, monkeypatch):
    assert datasets.num_classes("coco_2017_val") == 80 and datasets.class_names("coco_2017_val")[0] == "person"
    assert datasets.check_registered("voc_2007_val") is None
    folder.check()
    monkeypatch.setattr(
        MetadataCatalog.get("coco_2017_val"), "__dict__", MetadataCatalog.get("coco_2017_val").as_dict()
    )
    monkeypatch.setitem(MetadataCatalog.get("coco_2017_val").__dict__, "json_file", str(folder.json))
    monkeypatch.setitem(MetadataCatalog.get("coco_2017_val").__dict__, "image_root", str(folder.images))
    with pytest.raises(UserError, match=r"its categories \(cell, plate\) must be those registered .*\(person, bicycle"):
        datasets.check_registered("coco_2017_val")


def test_absent_bccd_says_where_it_is_looked_for(catalogs, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    datasets.register_bccd()
    datasets.register_bccd()
    with pytest.raises(
        UserError, match=r"bccd_val: .*instances_val\.json does not exist; DETECTRON2_DATASETS must .* bccd/"
    ):
        datasets.check_registered("bccd_val")


@pytest.mark.parametrize(
    "name, images, boxes, classes",
    [
        ("coco/annotations/instances_train2017.json coco/train2017", 92, 829, 80),
        ("coco/annotations/instances_val2017.json coco/val2017", 66, 560, 80),
        ("bccd/annotations/instances_train.json bccd/train", 205, 2804, 3),
        ("bccd/annotations/instances_val.json bccd/val", 87, 1137, 3),
    ],
)
def test_real_data(name, images, boxes, classes):
    json_file, image_root = (Path(os.getenv("DETECTRON2_DATASETS", "datasets")) / part for part in name.split())
    if not json_file.exists():
        pytest.skip(f"{json_file} is absent")
    summary = datasets.check_coco_format(json_file, image_root)
    if summary.num_images > 1000:
        pytest.skip(f"{json_file} is not the small excerpt whose counts are known")
    assert (summary.num_images, summary.num_boxes, len(summary.class_names)) == (images, boxes, classes)
