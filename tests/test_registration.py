"""Names of data sets: which can be registered, and what is said of those that cannot be used."""

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
    (tmp_path / "link").symlink_to(folder.json.parent)
    datasets.register_coco_format("mine", tmp_path / "link" / "truth.json", tmp_path / "link" / "images")
    other = Folder(tmp_path / "other")
    for name, paths, message in (
        ("mine", (other.json, other.images), r"data set mine is already registered with .*truth\.json"),
        ("mine", (folder.json, other.images), r"data set mine is already registered with .*truth\.json"),
        ("voc_2007_val", (folder.json, folder.images), "voc_2007_val is already registered with other data"),
        ("", (folder.json, folder.images), "must not be empty"),
    ):
        with pytest.raises(UserError, match=message):
            datasets.register_coco_format(name, *paths)
    assert datasets.check_registered("mine").num_boxes == 4
    assert datasets.class_names("mine") == ("cell", "plate")
    assert len(DatasetCatalog.get("mine")) == 3 and MetadataCatalog.get("mine").evaluator_type == "coco"
    annotation(0, area=...)(folder)  # a changed json is checked again
    folder.check(for_evaluation=False)
    assert "evaluation" in datasets.check_registered("mine", for_evaluation=False).gaps
    with pytest.raises(UserError, match=r"data set mine: .*annotation 1 has no 'area'"):
        datasets.check_registered("mine")
    folder.content["categories"][0]["name"] = "cells"
    folder.check(for_evaluation=False)
    with pytest.raises(UserError, match=r"its categories \(cells, plate\), and their ids, must be those registered"):
        datasets.check_registered("mine", for_evaluation=False)


def test_wrong_data_are_not_registered(folder, catalogs):
    annotation(0, area="12")(folder)
    folder.check(for_evaluation=False)
    folder.images.rename(folder.images.with_name("moved"))
    with pytest.raises(UserError, match=r"data set mine: image folder .* does not exist"):
        datasets.register_coco_format("mine", folder.json, folder.images)
    assert "mine" not in DatasetCatalog


def test_names_that_come_with_the_packages(catalogs, folder, tmp_path, monkeypatch):
    for check in (datasets.check_registered, datasets.class_names):
        for name, hint in (
            ("coco_2017_trian", "did you mean coco_2017_train .*--register"),
            ("zzz", "Register your own"),
        ):
            with pytest.raises(UserError, match=f"unknown data set '{name}': {hint}"):
                check(name)
    assert "zzz" not in MetadataCatalog.list()
    assert len(datasets.class_names("coco_2017_val")) == 80 and datasets.class_names("coco_2017_val")[0] == "person"
    assert datasets.check_registered("voc_2007_val") is None
    folder.check()
    registered = MetadataCatalog.get("coco_2017_val")
    monkeypatch.setattr(registered, "__dict__", registered.as_dict())
    monkeypatch.setitem(registered.__dict__, "json_file", str(folder.json))
    monkeypatch.setitem(registered.__dict__, "image_root", str(folder.images))
    with pytest.raises(UserError, match=r"its categories \(cell, plate\), and their ids, .* name \(person, bicycle"):
        datasets.check_registered("coco_2017_val")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for _ in range(2):
        datasets.register_builtin()
    with pytest.raises(
        UserError, match=rf"bccd_val: .*_val\.json does not exist; .* DETECTRON2_DATASETS, .*{tmp_path}"
    ):
        datasets.check_registered("bccd_val")
