"""The shapes data set: same pixels everywhere, boxes against brute force, difficulty, the folder, the registration."""

import hashlib
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from coco_folder import detections
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from repr_det import datasets
from repr_det.datasets import check_registered, drawing, shapes
from repr_det.method.errors import UserError

PINNED = {
    "train": "5810b0c366d207ddbb5ced37ae3ac1f79d860162de5a1ceafbe30c0455f9de10",
    "val": "ccabf867feafa6411227f012d34cbdfd24226bc9b60d16a2e184ee1c535e76fb",
}


@pytest.fixture(scope="module")
def sample():
    """The first 60 validation images."""
    return list(shapes.generate_shapes(shapes.SPLITS["val"][0], 60))


def test_pixels_and_annotations_are_the_pinned_ones(sample):
    """They do not depend on how many are drawn, and the two splits share none."""
    train = list(shapes.generate_shapes(shapes.SPLITS["train"][0], 20))
    for split, drawn in (("train", train), ("val", sample[:20])):
        digest = hashlib.sha256()
        for image, objects in drawn:
            digest.update(repr(image.shape).encode() + image.tobytes() + json.dumps(objects, sort_keys=True).encode())
        assert digest.hexdigest() == PINNED[split]
    assert len({image.tobytes() for image, _ in train + sample}) == 80


def test_the_sine_table_is_far_from_rounding_ties():
    """So that another libm cannot round an entry the other way."""
    exact = [drawing.ONE * math.sin(math.radians(degree)) for degree in range(360)]
    assert min(abs(abs(value - math.floor(value)) - 0.5) for value in exact) > 1e-6
    assert drawing.SINE.tolist() == [round(value) for value in exact]


@pytest.mark.parametrize("degree", [0, 17, 211])
@pytest.mark.parametrize("radius", [6, 23, 80])
@pytest.mark.parametrize("name", shapes.CLASS_NAMES)
def test_stencil_against_even_odd_rule_in_float(name, radius, degree):
    loops, stretch, angle = drawing.OUTLINES[name], 85, math.radians(degree)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    mask = drawing.stencil(loops, radius, stretch, degree)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]].astype(float)
    inside, distance = np.zeros(mask.shape, bool), np.full(mask.shape, np.inf)
    for loop in loops:
        corners = np.array(loop) / drawing.ONE * (1, stretch / 100) @ turn.T * radius + radius + 1
        for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
            if ay != by:
                inside ^= ((ay <= y) != (by <= y)) & (x > ax + (y - ay) * (bx - ax) / (by - ay))
            t = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0, 1)
            distance = np.minimum(distance, np.hypot(x - ax - t * (bx - ax), y - ay - t * (by - ay)))
    assert mask.shape == (2 * radius + 3, 2 * radius + 3)
    clear = distance > 0.15  # px from the outline: corners lie on a grid of 1/16 px
    assert clear.mean() > 0.8 and np.array_equal(mask[clear], inside[clear])


def test_box_and_area_of_a_single_shape_are_those_of_the_pixels_it_changes(monkeypatch):
    monkeypatch.setattr(drawing, "TEXTURES", ("solid",))
    for key in ("CLUTTER", "OCCLUDERS", "NOISE", "PATCHES"):
        monkeypatch.setattr(shapes, key, (0, 0))
    for key in ("BLUR", "LOW_CONTRAST"):
        monkeypatch.setattr(shapes, key, 0)
    monkeypatch.setattr(shapes, "OBJECTS", (1, 1))
    drawn = list(shapes.generate_shapes(5, 60))
    monkeypatch.setattr(shapes, "OBJECTS", (0, 0))
    clipped = 0
    for (image, objects), (background, none) in zip(drawn, shapes.generate_shapes(5, 60), strict=True):
        assert none == []
        if not objects:
            continue
        changed = (image != background).any(2)
        rows, columns = np.nonzero(changed)
        x, y, w, h = objects[0]["bbox"]
        assert [x, y, x + w - 1, y + h - 1] == [columns.min(), rows.min(), columns.max(), rows.max()]
        assert objects[0]["area"] == changed.sum()
        clipped += x == 0 or y == 0 or x + w == image.shape[1] or y + h == image.shape[0]
    assert clipped > 5


def test_every_object_stays_visible_and_many_are_partly_hidden(monkeypatch):
    canvases = []

    class Recorder(shapes._Canvas):
        def __init__(self, dice):
            canvases.append(self)
            self.masks = []  # and the number of objects before each, in painting order
            super().__init__(dice)

        def paint(self, where, inside, colour, **options):
            mask = np.zeros((self.height, self.width), bool)
            mask[where] = inside
            self.masks.append((mask, len(getattr(self, "objects", []))))
            super().paint(where, inside, colour, **options)

    monkeypatch.setattr(shapes, "_Canvas", Recorder)
    list(shapes.generate_shapes(2, 40))
    shares = []
    for canvas in canvases:
        covered, after = np.zeros((canvas.height, canvas.width), bool), len(canvas.objects)
        for mask, before in reversed(canvas.masks):
            if after > before:
                visible = (mask & ~covered).sum()
                assert visible >= shapes.MIN_VISIBLE / 100 * canvas.full_areas[before]
                shares.append(visible / mask.sum())
            covered, after = covered | mask, before
    assert len(shares) > 100 and 0.15 < (np.array(shares) < 0.9).mean() < 0.8


def test_images_and_objects_have_the_documented_form_and_every_scale_and_class(sample):
    for image, objects in sample:
        assert image.dtype == np.uint8 and {*image.shape[:2]} <= {*shapes.IMAGE_SIDES}
        assert 1 <= len(objects) <= shapes.OBJECTS[1]
        for thing in objects:
            x, y, w, h = thing["bbox"]
            assert x >= 0 and y >= 0 and x + w <= image.shape[1] and y + h <= image.shape[0]
            assert 0 < thing["area"] <= w * h
    objects = [thing for _, things in sample for thing in things]
    areas = np.array([thing["area"] for thing in objects])
    shares = [(areas < 32**2).mean(), ((areas >= 32**2) & (areas <= 96**2)).mean(), (areas > 96**2).mean()]
    assert shares[0] > 0.2 and shares[1] > 0.4 and shares[2] > 0.02
    counts = np.bincount([thing["category_id"] for thing in objects])[1:]
    assert len(counts) == len(shapes.CLASS_NAMES) and counts.min() > 0.05 * len(objects) and sum(counts) == len(objects)


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": (1, 4), "val": (2, 3)})
    monkeypatch.setitem(shapes.PARTS, "train_75", ("train", 2))


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def put(before, root):
    if before == "empty":
        root.mkdir()
    elif before == "outdated":
        shapes.build_shapes(root)
        (root / "VERSION").write_text("repr_det shapes 0 abc\n")
        (root / "train" / "old.png").write_bytes(b"old")


def test_the_folder_holds_what_is_generated_and_is_reused_silently(few_images, tmp_path, capsys):
    root = shapes.build_shapes(tmp_path / "a folder" / "shäpes")
    assert capsys.readouterr().err.count("\n") == 1
    for split, (seed, count) in shapes.SPLITS.items():
        truth = json.loads((root / "annotations" / f"{split}.json").read_text())
        assert [c["name"] for c in truth["categories"]] == list(shapes.CLASS_NAMES)
        assert [a["id"] for a in truth["annotations"]] == list(range(1, len(truth["annotations"]) + 1))
        assert len(list((root / split).iterdir())) == len(truth["images"]) == count
        for entry, (image, objects) in zip(truth["images"], shapes.generate_shapes(seed, count), strict=True):
            stored = cv2.imdecode(np.fromfile(root / split / entry["file_name"], np.uint8), cv2.IMREAD_COLOR)
            assert np.array_equal(stored, image) and image.shape[:2] == (entry["height"], entry["width"])
            mine = [a for a in truth["annotations"] if a["image_id"] == entry["id"]]
            assert [{k: v for k, v in a.items() if k not in ("id", "image_id")} for a in mine] == objects
    assert [path.name for path in root.parent.iterdir()] == ["shäpes"]  # no temporary folder stays
    wanted = contents(root)
    (root / "train" / "000001.png").write_bytes(b"mark")
    shapes.build_shapes(root)
    assert (root / "train" / "000001.png").read_bytes() == b"mark" and capsys.readouterr().err == ""
    shapes.annotation_file(root, "train_75").unlink()  # as version 0.1.0 left it
    shapes.build_shapes(root, "val")
    assert (root / "train" / "000001.png").read_bytes() == b"mark"
    shapes.build_shapes(root, "train_75")
    assert contents(root) == wanted


@pytest.mark.parametrize("foreign", ["photo.jpg", "VERSION"])
def test_what_is_in_the_way_is_left_alone(few_images, tmp_path, foreign):
    (tmp_path / foreign).write_bytes(b"\xffmine")
    for root, message in (
        (tmp_path, "holds other data"),
        (tmp_path / foreign, "holds other data"),
        (tmp_path / foreign / "inside", r"cannot be written.*DETECTRON2_DATASETS"),
    ):
        with pytest.raises(UserError, match=message):
            shapes.build_shapes(root)
    assert contents(tmp_path) == {foreign: b"\xffmine"}


@pytest.mark.parametrize("before", ["absent", "empty", "outdated"])
def test_an_interrupted_build_changes_nothing(few_images, tmp_path, monkeypatch, before):
    root = tmp_path / "shapes"
    put(before, root)
    wanted, calls, encode = contents(root), [], cv2.imencode

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cv2, "imencode", interrupted)
        shapes.build_shapes(root)
    assert contents(root) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ([] if before == "absent" else ["shapes"])


@pytest.mark.parametrize("before", ["absent", "empty", "outdated"])
def test_of_builders_at_the_same_time_one_draws(few_images, tmp_path, monkeypatch, before):
    wanted = contents(shapes.build_shapes(tmp_path / "reference" / "shapes"))
    root, write, writes, start = tmp_path / "shapes", shapes._write, [], threading.Barrier(4, timeout=60)
    put(before, root)
    monkeypatch.setattr(shapes, "_write", lambda *args: (writes.append(args), write(*args)))
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(lambda: (start.wait(), shapes.build_shapes(root))) for _ in range(4)]:
            assert done.result()[1] == root
    assert contents(root) == wanted and len(writes) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference", "shapes"]


def test_registration_is_lazy_and_may_be_repeated(few_images, catalogs, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    for _ in range(2):
        datasets.register_builtin()
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()
    check_registered("shapes_train_75")  # before anything is loaded, as the commands do
    records = DatasetCatalog.get("shapes_train")
    truth = json.loads((tmp_path / "data" / "shapes" / "annotations" / "train.json").read_text())
    assert [(r["image_id"], len(r["annotations"])) for r in records] == [
        (i["id"], sum(a["image_id"] == i["id"] for a in truth["annotations"])) for i in truth["images"]
    ]
    assert {o["category_id"] for r in records for o in r["annotations"]} <= set(range(len(shapes.CLASS_NAMES)))
    assert MetadataCatalog.get("shapes_val").thing_classes == list(shapes.CLASS_NAMES)
    assert DatasetCatalog.get("shapes_train_75") == records[:2] and len(records) == 4

    evaluator = COCOEvaluator("shapes_val", ("bbox",), distributed=False)
    for shift, expected in ((0, 100), (200, 0)):
        evaluator.reset()
        for record in DatasetCatalog.get("shapes_val"):
            objects = record["annotations"]
            boxes = [[v + shift for v in o["bbox"][:2]] + o["bbox"][2:] for o in objects]
            evaluator.process([record], detections(record, boxes, [o["category_id"] for o in objects]))
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(expected, abs=0.01)
