"""Data sets by name: their classes, mapped or refused naming both lists, and what they lack that a run needs."""

import json
import shutil

import pytest
import torch
from coco_folder import Folder, annotation, annotations_of, evaluate, put
from conftest import ROOT, SMALL, refused
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from PIL import Image
from pycocotools.coco import COCO

from repr_det.commands import checks
from repr_det.commands.arguments import build_config
from repr_det.commands.checks import check_run
from repr_det.commands.data import DATA_FILE, check_datasets
from repr_det.datasets import CocoEvaluator, check_registered, class_names, register_coco_format, registered

CONFIG = str(ROOT / "configs" / "baseline_r50_fpn.yaml")
CLASSES = {1: "cell", 2: "plate", 3: "drop"}
BOXES = [(1, "cell", [2, 3, 10, 12]), (1, "plate", [20, 1, 15, 20])]
FOUND = [*BOXES, (1, "drop", [3, 3, 9, 9]), (2, "drop", [0, 0, 20, 30]), (2, "drop", [5, 5, 9, 9])]
BOXES += [(2, "drop", [0, 0, 20, 30]), (2, "cell", [5, 5, 9, 9])]


def write(folder: Folder, categories: dict[int, str], name: str):
    """The same objects under other ids; those of a class that is not listed are left out. Returns the json's path."""
    ids = {name: i for i, name in categories.items()}
    annotations = annotations_of([(i, ids[c], box) for i, c, box in BOXES if c in ids])
    classes = [{"id": i, "name": c} for i, c in categories.items()]
    path = folder.json.with_name(f"{name}.json")
    path.write_text(json.dumps(folder.content | {"categories": classes, "annotations": annotations}))
    return path


def register(folder: Folder, **data_sets: dict[int, str]) -> None:
    for name, categories in data_sets.items():
        register_coco_format(name, write(folder, categories, name), folder.images)


def register_stock(path, folder: Folder) -> None:
    register_coco_instances("stock", {}, str(path), str(folder.images))
    DatasetCatalog.get("stock")


def classes_as_loaded(name: str) -> dict[int, list[int]]:
    return {r["image_id"]: [a["category_id"] for a in r["annotations"]] for r in DatasetCatalog.get(name)}


def evaluated(evaluator: COCOEvaluator, folder: Folder) -> dict[str, float]:
    """The evaluation of a model whose outputs are CLASSES, in this order."""
    order, found = list(CLASSES.values()), []
    for entry in folder.content["images"]:
        own = [(box, order.index(c)) for image_id, c, box in FOUND if image_id == entry["id"]]
        found.append((entry | {"image_id": entry["id"]}, [box for box, _ in own], [number for _, number in own]))
    return evaluate(evaluator, found)


SUBSETS = [{1: "cell", 3: "drop"}, {4: "drop", 5: "cell"}, {2: "drop"}]
SUBSETS += [{0: "pets-a1b2", 4: "drop", 5: "cell"}]  # Roboflow's first category has no objects


@pytest.mark.parametrize("ids", [CLASSES, {0: "drop", 7: "cell", 90: "plate"}, *SUBSETS])
def test_other_ids_and_a_subset_are_evaluated_as_stock_detectron2_does(folder, catalogs, tmp_path, monkeypatch, ids):
    """The stock one gets the file that numbers the classes as the model does."""
    register(folder, t=CLASSES, v=ids)
    assert registered.agree_on_classes(("t",), ("v",)) == class_names("v") == ("cell", "plate", "drop")
    assert registered.own_classes("v") == tuple(ids[i] for i in sorted(ids))
    register_stock(folder.json.with_name("t.json"), folder)
    ids = {i: c for i, c in ids.items() if c in class_names("v")}
    stock = evaluated(COCOEvaluator("stock", ("bbox",), False), folder)
    load = COCO.loadRes  # that of pycocotools 2.0.9 and 2.0.10 reads "info", which this json lacks
    monkeypatch.setattr(COCO, "loadRes", lambda self, found: self.dataset["info"] is None or load(self, found))
    found = evaluated(CocoEvaluator("v", ("bbox",), False, output_dir=str(tmp_path / "out")), folder)
    assert stock["AP-plate"] == pytest.approx(100) and stock["AP-cell"] < 60
    wanted = {f"AP-{c}": stock[f"AP-{c}"] for c in ids.values()}
    assert found["AP"] == pytest.approx(sum(wanted.values()) / len(wanted))
    if len(ids) > 1:  # Detectron2 leaves the one out
        assert {k: v for k, v in found.items() if "-" in k} == pytest.approx(wanted)
    if len(ids) == 3:
        assert classes_as_loaded("t") == classes_as_loaded("v") == {1: [0, 1], 2: [2, 0], 5: []}
        assert found == pytest.approx(stock, nan_ok=True)
        assert evaluated(CocoEvaluator("stock", ("bbox",), False), folder) == pytest.approx(stock, nan_ok=True)
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {d["category_id"] for d in written} == set(ids)  # in the ids of its own file


def test_training_sets_may_number_and_list_otherwise(folder, catalogs, caplog):
    caplog.set_level("INFO", "repr_det")
    register(folder, a={1: "drop", 2: "cell"}, b=CLASSES, v={0: "pets-a1b2", 5: "plate", 9: "cell"})
    agree = registered.agree_on_classes
    assert agree(("a", "b"), ("v",)) == ("cell", "plate", "drop")  # those of the one that has most
    assert classes_as_loaded("a") == {1: [0], 2: [2, 0], 5: []}
    for _ in range(2):
        assert classes_as_loaded("v") == {1: [0, 1], 2: [0], 5: []}
    message = "pets-a1b2 (id 0) -> none, it has no objects, plate (id 5) -> 1, cell (id 9) -> 0, of 3 classes"
    assert caplog.messages.count(f"data set v: its classes are mapped by name: {message}") == 1
    assert agree(("a",)) == ("drop", "cell")  # another run, in the same process
    assert classes_as_loaded("a") == {1: [1], 2: [0, 1], 5: []}
    assert agree(("b",), ("v",), ("plate", "drop", "cell")) == ("plate", "drop", "cell")
    assert classes_as_loaded("b") == {1: [2, 0], 2: [1, 2], 5: []}


def test_what_cannot_be_mapped_names_both_lists(folder, catalogs):
    register(folder, t={1: "cell", 2: "plate"}, v=CLASSES, w={3: "plate", 4: "cells"}, x={1: "plate", 2: "cell"})
    register_stock(write(folder, {2: "plate", 3: "cell"}, "m"), folder)
    lacks = "they cannot be mapped by name, since that lacks"
    for train, test, reference, message in (
        ("t", "v", None, f"v has the classes cell, plate, drop, and t has cell, plate: {lacks} 'drop'"),
        ("w", "w", ("cell",), f"w has the classes plate, cells, and the checkpoint has cell: {lacks} 'plate'"),
        ("x", "x", ("\uff50late",), rf"{lacks} 'plate' (but '\uff50late', so spell both alike)"),
        ("t", "stock", None, "stock has the classes plate, cell, and t has cell, plate: register it with --register"),
    ):
        assert message in refused(registered.agree_on_classes, (train,), (test,), reference)
    message = "data sets must be a tuple of names, ('t',), got 't'"
    assert message in refused(registered.any_mapped, ("t", ("v",)))


def test_a_class_with_two_ids_is_one_class(folder, catalogs, caplog):
    register(folder, t=CLASSES)
    path = write(folder, CLASSES, "v")
    content = json.loads(path.read_text())
    content["categories"].insert(0, {"id": 0, "name": "cell"})
    content["annotations"][0]["category_id"] = 0
    path.write_text(json.dumps(content))
    register_coco_format("v", path, folder.images)
    assert "categories 0 and 1 are both 'cell': taken for one class" in caplog.text
    assert registered.agree_on_classes(("t",), ("v",)) == ("cell", "plate", "drop")
    assert classes_as_loaded("v") == classes_as_loaded("t")
    found = evaluated(CocoEvaluator("v", ("bbox",), False), folder)
    assert found == pytest.approx(evaluated(CocoEvaluator("t", ("bbox",), False), folder), nan_ok=True)
    register_stock(path, folder)
    # Detectron2 takes them for two.
    assert "categories (cell, cell, plate, drop), and their ids, must be" in refused(check_registered, "stock")


def test_registering_twice_and_with_other_files(folder, catalogs, tmp_path, monkeypatch):
    folder.check()
    register_coco_format("mine", folder.json, folder.images)
    monkeypatch.chdir(folder.json.parent)
    register_coco_format("mine", "truth.json", "images")
    (tmp_path / "link").symlink_to(folder.json.parent)
    register_coco_format("mine", tmp_path / "link" / "truth.json", tmp_path / "link" / "images")
    other = Folder(tmp_path / "other")
    for name, json_file, images, message in (
        ("mine", other.json, folder.images, f"data set mine is already registered with {folder.json}"),
        ("mine", folder.json, other.images, f"data set mine is already registered with {folder.json}"),
        ("voc_2007_val", folder.json, folder.images, "voc_2007_val is already registered with other data"),
        ("", folder.json, folder.images, "must not be empty"),
        ("new", folder.json, "moved", "data set new: image folder "),
    ):
        assert message in refused(register_coco_format, name, json_file, images)
    assert "new" not in DatasetCatalog
    assert class_names("mine") == ("cell", "plate") and len(DatasetCatalog.get("mine")) == 3
    annotation(0, area=...)(folder)  # a changed json is checked again
    folder.check(for_evaluation=False)
    assert check_registered("mine", for_evaluation=False).gaps["evaluation"]
    assert "annotation 1 must have a finite number as 'area'" in refused(check_registered, "mine")
    folder.content["categories"][0]["name"] = "cells"
    folder.check(for_evaluation=False)
    message = "its categories (cells, plate), and their ids, must be those registered"
    assert message in refused(check_registered, "mine", for_evaluation=False)
    assert message in refused(DatasetCatalog.get, "mine")


def test_names_that_come_with_the_packages(catalogs, folder, tmp_path, monkeypatch):
    for check in (check_registered, class_names):
        assert "did you mean coco_2017_train" in refused(check, "coco_2017_trian")
        assert "unknown data set 'zzz': Register your own with --register NAME" in refused(check, "zzz")
    assert "zzz" not in MetadataCatalog.list()
    assert len(class_names("coco_2017_val")) == 80
    assert check_registered("voc_2007_val") is None
    folder.check()
    metadata = vars(MetadataCatalog.get("coco_2017_val"))
    monkeypatch.setitem(metadata, "json_file", str(folder.json))
    monkeypatch.setitem(metadata, "image_root", str(folder.images))
    assert "must be those registered under this name (person, bicycle" in refused(check_registered, "coco_2017_val")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for _ in range(2):
        registered.register_builtin()
    assert f"does not exist; DETECTRON2_DATASETS is '{tmp_path}'" in refused(check_registered, "bccd_val")


def test_images_without_annotations_are_evaluated_as_in_detectron2(mine, folder, tmp_path, caplog):
    """COCO's test-dev has none: the detections are written, for a server."""
    cfg = mine(edit=put(annotations=...))
    check_datasets(cfg, eval_only=True)
    assert caplog.messages == [f"data set mine: {folder.json}: has no 'annotations', which training and AP need"]
    assert refused(check_run, cfg) == caplog.messages[0]
    found = [(entry | {"image_id": entry["id"]}, [[2, 3, 9, 9]], [1]) for entry in folder.content["images"]]
    for kind in (COCOEvaluator, CocoEvaluator):
        assert evaluate(kind("mine", ("bbox",), False, output_dir=str(tmp_path / kind.__name__)), found) == {}
    stock, own = (next(tmp_path.glob(f"{name}/*.json")).read_text() for name in ("COCOEvaluator", "CocoEvaluator"))
    assert stock == own != "[]"


def two_files(folder: Folder, val_ids: dict[int, str]) -> list[list[str]]:
    """--register of t and v, which lists other classes."""
    files = {"t": {3: "cell", 7: "plate"}, "v": val_ids}
    return [[name, str(write(folder, ids, name)), str(folder.images)] for name, ids in files.items()]


def config(register, *opts, **options):
    own = [*SMALL, "DATASETS.TRAIN", "('t',)", "DATASETS.TEST", "('v',)", *map(str, opts)]
    at = own.index("MODEL.ROI_HEADS.NUM_CLASSES")
    del own[at : at + 2]
    return build_config(CONFIG, own, register, **options)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("SemanticSegmentor", "ade20k_sem_seg"),
        ("SemanticSegmentor", "cityscapes_fine_sem_seg"),
        ("ProposalNetwork", "tiny"),
    ],
)
def test_a_number_of_classes_is_asked_of_models_that_read_it(tiny_cfg, kind, data):
    """Models without heads read none; ADE20k has no things."""
    names = ["DATASETS.TRAIN", f"('{data}_train',)", "DATASETS.TEST", f"('{data}_val',)"]
    opts = [*names, "MODEL.ROI_HEADS.NUM_CLASSES", 80]
    check_datasets(tiny_cfg(*opts, "MODEL.META_ARCHITECTURE", kind))
    assert f"MODEL.ROI_HEADS.NUM_CLASSES is 80, but {data}_train has " in refused(check_datasets, tiny_cfg(*opts))


def test_a_registered_data_set_that_no_key_names(folder, catalogs, mine, caplog):
    config(two_files(folder, {9: "cell"}), "DATASETS.TEST", "()")
    assert "--register v is not used: training data are t, test data " in caplog.text
    config(two_files(folder, {9: "cell"}), "DATASETS.TRAIN", "('shapes_train',)", eval_only=True)
    others = ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)"]
    message = "--register mine is not used: training data are shapes_train, test data shapes_val"
    assert message in refused(mine, *others)


def test_images_of_training_in_the_test_set_are_told(folder, catalogs, tmp_path, caplog):
    register = two_files(folder, {3: "cell", 7: "plate"})
    register[1][2] = shutil.copytree(folder.images, tmp_path / "copied")
    Image.new("RGB", (64, 64), (200, 1, 1)).save(tmp_path / "copied" / "5.jpg")  # one of its own
    cfg = config(register, "OUTPUT_DIR", tmp_path / "run")
    check_datasets(cfg)
    (told,) = caplog.messages
    shared = "2 of 3 images of v (DATASETS.TEST) that were compared are in t (DATASETS.TRAIN) too, such as "
    assert told.startswith(f"{shared}{tmp_path / 'copied' / '1.jpg'}")
    caplog.clear()
    check_datasets(cfg, eval_only=True)
    assert not caplog.records


def test_the_classes_of_the_checkpoint_hold(folder, catalogs, tmp_path, monkeypatch):
    """Same number of classes, other names or another order."""
    monkeypatch.setattr(checks, "_check_weights", lambda *args: None)
    (tmp_path / "model_0000003.pth").touch()
    register = two_files(folder, {9: "cell"})
    given = ["DATASETS.TRAIN", "('t',)", "DATASETS.TEST", "('v',)", "MODEL.ROI_HEADS.NUM_CLASSES", "9"]
    assert build_config(CONFIG, given, register).MODEL.ROI_HEADS.NUM_CLASSES == 9
    cfg = config(register, "OUTPUT_DIR", tmp_path)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    for classes in (["plate", "cell"], ["cell", "plates"], ["cell", "plate"]):
        (tmp_path / DATA_FILE).write_text(json.dumps({"t": {"classes": classes}, "v": {"classes": ["plate"]}}))
        if classes != ["cell", "plate"]:
            message = f"has the classes {classes[0]}, {classes[1]}, in this order, and these data have cell"
            assert message in refused(check_run, cfg, resume=True)
    check_run(cfg, resume=True)


@pytest.mark.parametrize("tells", ["checkpoint", "record", "training set", None])
def test_evaluation_follows_the_classes_of_the_checkpoint(folder, catalogs, tmp_path, caplog, tells):
    """--eval-only with the validation set alone: its own order of the classes says nothing of the model's."""
    order = ["cell", "drop", "plate"]
    register(folder, trained=dict(enumerate(order if tells in ("training set", None) else reversed(order))))
    number = len(order) if tells else 2
    shapes = {"roi_heads.box_predictor": (number + 1, 8), "head": (9 * number, 8, 3, 3)}  # and RetinaNet's
    weights = {"model": {f"{head}.cls_score.weight": torch.zeros(shape) for head, shape in shapes.items()}}
    torch.save(weights | ({"thing_classes": order} if tells == "checkpoint" else {}), tmp_path / "moved.pth")
    record = {"checkpoint": ["plate", "cell", "drop"], "record": order}.get(tells, [])
    (tmp_path / DATA_FILE).write_text(json.dumps({"t": {"classes": record}}))
    opts = ["MODEL.WEIGHTS", tmp_path / "moved.pth", "DATASETS.TRAIN", "('trained',)"]
    mapped = two_files(folder, {1: "plate", 2: "cell"})[1:]
    cfg = config(mapped, *opts, eval_only=True)
    check_datasets(cfg, eval_only=True)
    assert class_names("v") == (tuple(order) if tells else ("plate", "cell"))
    assert len(class_names("v")) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    told = "nothing names the classes of the checkpoint: its outputs are taken for plate, cell, in this order; if"
    assert [told in message for message in caplog.messages] == [True] * (not tells)
    register_stock(mapped[0][1], folder)
    stock = [*opts, "DATASETS.TEST", "('stock',)", *([] if tells == "training set" else ["DATASETS.TRAIN", "()"])]
    if not tells:
        config([], *stock, eval_only=True)
        return
    assert "stock has the classes plate, cell, and " in refused(config, [], *stock, eval_only=True)
    wrong = config(mapped, *opts, "MODEL.ROI_HEADS.NUM_CLASSES", 2, eval_only=True)
    message = "is 2, but v has 3 classes, its own or those it is mapped to (cell, drop, plate): set it to that"
    assert message in refused(check_datasets, wrong, eval_only=True)
    torch.save({"thing_classes": ["cell", "plates"]}, tmp_path / "moved.pth")
    assert "the checkpoint has cell, plates: " in refused(config, mapped, *opts, eval_only=True)
