"""Names of data sets, and their classes: compared and mapped by name, or refused naming both lists."""

import json
import logging

import pytest
import torch
from coco_folder import Folder, annotation, detections
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO

from repr_det.datasets import CocoEvaluator, registered
from repr_det.detectron.evaluators import build_evaluator
from repr_det.method.errors import UserError

CLASSES = {1: "cell", 2: "plate", 3: "drop"}
BOXES = [(1, "cell", [2, 3, 10, 12]), (1, "plate", [20, 1, 15, 20])]
FOUND = [*BOXES, (1, "drop", [3, 3, 9, 9]), (2, "drop", [0, 0, 20, 30]), (2, "drop", [5, 5, 9, 9])]
BOXES += [(2, "drop", [0, 0, 20, 30]), (2, "cell", [5, 5, 9, 9])]


def write(folder: Folder, categories: dict[int, str], name: str):
    """The same objects under other ids; those of a class that is not listed are left out. Returns the json's path."""
    ids = {name: i for i, name in categories.items()}
    annotations = [
        {"id": n, "image_id": i, "category_id": ids[c], "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (i, c, box) in enumerate(BOXES, 1)
        if c in ids
    ]
    classes = [{"id": i, "name": c} for i, c in categories.items()]
    path = folder.json.with_name(f"{name}.json")
    path.write_text(json.dumps(folder.content | {"categories": classes, "annotations": annotations}))
    return path


def register(folder: Folder, **data_sets: dict[int, str]) -> None:
    for name, categories in data_sets.items():
        registered.register_coco_format(name, write(folder, categories, name), folder.images)


def register_stock(path, folder: Folder) -> None:
    register_coco_instances("stock", {}, str(path), str(folder.images))
    DatasetCatalog.get("stock")


def classes_as_loaded(name: str) -> dict[int, list[int]]:
    return {r["image_id"]: [a["category_id"] for a in r["annotations"]] for r in DatasetCatalog.get(name)}


def evaluated(evaluator: COCOEvaluator, folder: Folder) -> dict[str, float]:
    """Of a model with the classes of CLASSES in this order."""
    order = list(CLASSES.values())
    evaluator.reset()
    for entry in folder.content["images"]:
        found = [(order.index(c), box) for i, c, box in FOUND if i == entry["id"]]
        output = detections(
            entry, [box for _, box in found], [c for c, _ in found], torch.linspace(0.9, 0.5, len(found))
        )
        evaluator.process([{"image_id": entry["id"]}], output)
    return evaluator.evaluate()["bbox"]


SUBSETS = [{1: "cell", 3: "drop"}, {4: "drop", 5: "cell"}, {2: "drop"}]


@pytest.mark.parametrize("ids", [CLASSES, {0: "drop", 7: "cell", 90: "plate"}, *SUBSETS])
def test_other_ids_and_a_subset_are_evaluated_as_stock_detectron2_does(folder, catalogs, tmp_path, ids):
    """The stock one gets the file that numbers the classes as the model does."""
    register(folder, t=CLASSES, v=ids)
    assert registered.agree_on_classes(("t",), ("v",)) == registered.class_names("v") == ("cell", "plate", "drop")
    assert registered.own_classes("v") == tuple(ids[i] for i in sorted(ids))
    register_stock(folder.json.with_name("t.json"), folder)
    stock = evaluated(COCOEvaluator("stock", ("bbox",), False), folder)
    found = evaluated(CocoEvaluator("v", ("bbox",), False, output_dir=str(tmp_path / "out")), folder)
    assert stock["AP-plate"] == pytest.approx(100) and stock["AP-cell"] < 60
    wanted = {f"AP-{c}": stock[f"AP-{c}"] for c in ids.values()}
    assert found["AP"] == pytest.approx(sum(wanted.values()) / len(wanted))
    if len(ids) > 1:  # Detectron2 leaves the one out
        assert {k: v for k, v in found.items() if "-" in k} == pytest.approx(wanted)
    if len(ids) == 3:
        assert classes_as_loaded("t") == classes_as_loaded("v") == {1: [0, 1], 2: [2, 0], 5: []}
        assert found == pytest.approx(stock, nan_ok=True)
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {d["category_id"] for d in written} == set(ids)  # in the ids of its own file


def test_training_sets_may_number_and_list_otherwise(folder, catalogs, caplog):
    caplog.set_level(logging.INFO, "repr_det")
    register(folder, a={1: "drop", 2: "cell"}, b=CLASSES, v={5: "plate", 9: "cell"})
    agree = registered.agree_on_classes
    assert agree(("a", "b"), ("v",)) == ("cell", "plate", "drop")  # those of the one that has most
    assert classes_as_loaded("a") == {1: [0], 2: [2, 0], 5: []}
    for _ in range(2):
        assert classes_as_loaded("v") == {1: [0, 1], 2: [0], 5: []}
    message = "data set v: its classes are mapped by name: plate (id 5) -> 1, cell (id 9) -> 0, of 3 classes"
    assert caplog.messages.count(message) == 1
    assert agree(("a",)) == ("drop", "cell")  # another run, in the same process
    assert classes_as_loaded("a") == {1: [1], 2: [0, 1], 5: []}
    assert agree(("b",), ("v",), ("plate", "drop", "cell")) == ("plate", "drop", "cell")
    assert classes_as_loaded("b") == {1: [2, 0], 2: [1, 2], 5: []}


def test_what_cannot_be_mapped_names_both_lists(folder, catalogs):
    register(folder, t={1: "cell", 2: "plate"}, v=CLASSES, w={3: "plate", 4: "cells"}, x={1: "Pla\u0308te", 2: "cell"})
    register_stock(write(folder, {2: "plate", 3: "cell"}, "m"), folder)
    lacks = "they cannot be mapped by name, since that lacks"
    for train, test, reference, message in (
        ("t", "v", None, f"v has the classes cell, plate, drop, and t has cell, plate: {lacks} 'drop'"),
        ("w", "w", ("cell",), f"w has the classes plate, cells, and the checkpoint has cell: {lacks} 'plate'"),
        ("x", "x", ("pläte",), rf"{lacks} 'Pla\u0308te' (but 'pl\xe4te', so spell both alike)"),
        ("t", "stock", None, "stock has the classes plate, cell, and t has cell, plate: register it with --register"),
    ):
        with pytest.raises(UserError) as error:
            registered.agree_on_classes((train,), (test,), reference)
        assert message in str(error.value)
    with pytest.raises(UserError, match=r"data sets must be a tuple of names, \('t',\), got 't'"):
        registered.any_mapped(("t", ("v",)))


def test_a_json_without_info_is_evaluated_by_every_pycocotools(folder, catalogs, monkeypatch):
    """2.0.9 and 2.0.10 read dataset["info"] in loadRes."""
    register(folder, t=CLASSES)
    register_stock(folder.json.with_name("t.json"), folder)
    load = COCO.loadRes
    monkeypatch.setattr(COCO, "loadRes", lambda self, found: self.dataset["info"] is None or load(self, found))
    for name in ("t", "stock"):
        assert evaluated(build_evaluator(name, str(folder.json.parent / "out")), folder)["AP"] > 0


def test_a_class_with_two_ids_is_one_class(folder, catalogs, caplog):
    register(folder, t=CLASSES)
    path = write(folder, CLASSES, "v")
    content = json.loads(path.read_text())
    content["categories"].insert(0, {"id": 0, "name": "cell"})
    content["annotations"][0]["category_id"] = 0
    path.write_text(json.dumps(content))
    registered.register_coco_format("v", path, folder.images)
    assert "categories 0 and 1 are both 'cell': taken for one class" in caplog.text
    assert registered.agree_on_classes(("t",), ("v",)) == ("cell", "plate", "drop")
    assert classes_as_loaded("v") == classes_as_loaded("t")
    found = evaluated(CocoEvaluator("v", ("bbox",), False), folder)
    assert found == pytest.approx(evaluated(CocoEvaluator("t", ("bbox",), False), folder), nan_ok=True)
    register_stock(path, folder)
    with pytest.raises(UserError, match=r"its categories \(cell, cell, plate, drop\), and their ids, must be"):
        registered.check_registered("stock")  # Detectron2 takes them for two


def test_registering_twice_and_with_other_files(folder, catalogs, tmp_path, monkeypatch):
    folder.check()
    register_coco_format, check_registered = registered.register_coco_format, registered.check_registered
    register_coco_format("mine", folder.json, folder.images)
    monkeypatch.chdir(folder.json.parent)
    register_coco_format("mine", "truth.json", "images")
    (tmp_path / "link").symlink_to(folder.json.parent)
    register_coco_format("mine", tmp_path / "link" / "truth.json", tmp_path / "link" / "images")
    other = Folder(tmp_path / "other")
    for name, json_file, images, message in (
        ("mine", other.json, folder.images, r"data set mine is already registered with .*truth\.json"),
        ("mine", folder.json, other.images, r"data set mine is already registered with .*truth\.json"),
        ("voc_2007_val", folder.json, folder.images, "voc_2007_val is already registered with other data"),
        ("", folder.json, folder.images, "must not be empty"),
    ):
        with pytest.raises(UserError, match=message):
            register_coco_format(name, json_file, images)
    assert registered.class_names("mine") == ("cell", "plate") and len(DatasetCatalog.get("mine")) == 3
    annotation(0, area=...)(folder)  # a changed json is checked again
    folder.check(for_evaluation=False)
    assert check_registered("mine", for_evaluation=False).gaps["evaluation"]
    with pytest.raises(UserError, match=r"data set mine: .*annotation 1 must have a finite number as 'area'"):
        check_registered("mine")
    folder.content["categories"][0]["name"] = "cells"
    folder.check(for_evaluation=False)
    for read in (lambda name: check_registered(name, for_evaluation=False), DatasetCatalog.get):
        with pytest.raises(
            UserError, match=r"its categories \(cells, plate\), and their ids, must be those registered"
        ):
            read("mine")


def test_wrong_data_are_not_registered(folder, catalogs):
    annotation(0, area="12")(folder)
    folder.check(for_evaluation=False)
    folder.images.rename(folder.images.with_name("moved"))
    with pytest.raises(UserError, match=r"data set mine: image folder .* does not exist"):
        registered.register_coco_format("mine", folder.json, folder.images)
    assert "mine" not in DatasetCatalog


def test_names_that_come_with_the_packages(catalogs, folder, tmp_path, monkeypatch):
    for check in (registered.check_registered, registered.class_names):
        for name, hint in (("coco_2017_trian", "did you mean coco_2017_train .*--reg"), ("zzz", "Register your own")):
            with pytest.raises(UserError, match=f"unknown data set '{name}': {hint}"):
                check(name)
    assert "zzz" not in MetadataCatalog.list()
    assert len(registered.class_names("coco_2017_val")) == 80
    assert registered.check_registered("voc_2007_val") is None
    folder.check()
    metadata = MetadataCatalog.get("coco_2017_val")
    for key, value in (("json_file", folder.json), ("image_root", folder.images)):
        monkeypatch.setitem(vars(metadata), key, str(value))
    with pytest.raises(UserError, match=r"its categories \(cell, plate\), and their ids, .* name \(person, bicycle"):
        registered.check_registered("coco_2017_val")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for _ in range(2):
        registered.register_builtin()
    with pytest.raises(UserError, match=rf"bccd_val: .*_val\.json does not .* DETECTRON2_DATASETS is '{tmp_path}'"):
        registered.check_registered("bccd_val")
