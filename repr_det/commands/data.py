"""The data sets of a run: registered, their classes numbered alike, and checked."""

import contextlib
import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, BaseKeypointRCNNHead, GeneralizedRCNN, RetinaNet
from detectron2.utils.file_io import PathManager
from torch import nn

from repr_det.datasets import check_registered, class_names, register_builtin, register_coco_format
from repr_det.datasets.coco_format import CocoSummary
from repr_det.datasets.findings import listed
from repr_det.datasets.image_files import shared_images
from repr_det.datasets.registered import agree_on_classes, any_mapped, lacking, name_keypoints, own_classes
from repr_det.detectron.config import as_user_error
from repr_det.method.errors import UserError
from repr_det.runs.record import DATA_FILE
from repr_det.runs.safe_pickle import load_checkpoint

logger = logging.getLogger(__name__)
_READS_NUMBER = {GeneralizedRCNN: "ROI_HEADS", RetinaNet: "RETINANET"}  # their NUM_CLASSES
_SEMANTIC = ("PanopticFPN", "SemanticSegmentor", "PanopticDeepLab")


def prepare_data(
    register: Sequence[Sequence[str]], train: Sequence[str], test: Sequence[str], weights: str | None
) -> int:
    """Registers this package's data sets and those of --register, and numbers the classes of a run. Returns their
    number, 0 without --register. An evaluation has the ``weights`` of a file: it goes by the classes that this file or
    the record beside it names, else by those of the training set if these can be the model's. UserError if a data set
    is bad, or none of --register is used."""
    register_builtin()
    for entry in register:
        register_coco_format(*entry)
        name_keypoints(entry[0])
    _check_used({name for name, *_ in register}, train, test, train if weights is None else test)
    train, test = ([name for name in names if name in DatasetCatalog] for names in (train, test))
    if weights is None:
        classes = agree_on_classes(train, test) if any_mapped((train, test)) else ()
    else:
        classes = _classes_of_outputs(weights, train, test)
    return len(classes) if register else 0


def _classes_of_outputs(weights: str, train: Sequence[str], test: Sequence[str]) -> tuple[str, ...]:
    known, scores = None, []
    with contextlib.suppress(Exception):  # check_run says what is wrong with the file
        held = load_checkpoint(PathManager.get_local_path(weights.partition("?")[0]))
        known = held.get("thing_classes")
        scores = [value.shape for key, value in held.get("model", held).items() if key.endswith("cls_score.weight")]
    known = known or recorded_classes(Path(weights).parent)
    train = [] if known else [name for name in train if _may_be_of(scores, name, test)]
    classes = agree_on_classes(train, test, known)
    if len(classes) > 1 and not (known or train):
        logger.warning(
            f"nothing names the classes of the checkpoint: its outputs are taken for {listed(classes, 20)}, in this "
            "order; if it is another one, name the training set (DATASETS.TRAIN)"
        )
    return classes


def _may_be_of(scores: Sequence[Sequence[int]], name: str, test: Sequence[str]) -> bool:
    """Tells whether a data set has the classes of the test sets, and as many as weights of these shapes score. Those of
    boxes (linear) have one row more, for the background; those of RetinaNet (a conv) one for each class and anchor."""
    if not MetadataCatalog.get(name).get("thing_classes"):  # in a file that need not be there
        return False
    classes = own_classes(name)
    fits = (rows == len(classes) + 1 if len(rest) == 1 else rows % len(classes) == 0 for rows, *rest in scores)
    return all(fits) and not any(lacking(other, classes) for other in test)


def _check_used(names: set[str], train: Sequence[str], test: Sequence[str], needed: Sequence[str]) -> None:
    unused = sorted(names.difference(train, test))
    if unused:
        what = f"--register {unused[0]} is not used: training data are {listed(train)}, test data {listed(test)}"
        if names.isdisjoint(needed):
            raise UserError(f"{what}: name it in DATASETS.TRAIN or TEST (LazyConfig: dataloader.*.dataset.names)")
        logger.warning(what)


def recorded_classes(folder: str | Path) -> tuple[str, ...] | None:
    """The classes of the run in ``folder``, in the order of its outputs; None without a record."""
    lists = []
    with contextlib.suppress(OSError, TypeError, ValueError, KeyError, AttributeError):
        known = json.loads((Path(folder) / DATA_FILE).read_text(encoding="utf-8"))
        lists = [tuple(dict.fromkeys(entry["classes"])) for entry in known.values()]
    return max(lists, key=len, default=()) or None  # the record begins with the training sets


def check_same_classes(classes: Sequence[str], folder: str | Path) -> None:
    """Refuses other classes than those of the run in ``folder``, or another order."""
    recorded = recorded_classes(folder)
    if recorded not in (None, tuple(dict.fromkeys(classes))):
        raise UserError(
            f"the run in {folder} has the classes {listed(recorded, 20)}, in this order, and these data have "
            f"{listed(classes, 20)}: give its data sets, or another OUTPUT_DIR"
        )


def check_datasets(cfg: CfgNode, eval_only: bool = False) -> dict[str, CocoSummary | None]:
    """Refuses data sets that are absent or malformed, or lack what the model needs or its classes. Returns what is
    known of each; None if it is not in COCO format."""
    train, test = (() if eval_only else cfg.DATASETS.TRAIN), cfg.DATASETS.TEST
    any_mapped((train, test))  # refuses a name in place of names
    key, needed = ("TEST", test) if eval_only else ("TRAIN", train)
    if not needed:
        raise UserError(f"DATASETS.{key} is empty: name at least one registered data set")
    names = dict.fromkeys((*train, *test))
    summaries = {x: check_registered(x, for_evaluation=x in test, for_objects=x in train) for x in names}
    if not eval_only:  # prepare_data has mapped those to the classes of the checkpoint
        agree_on_classes(train, test)
    for name, summary in summaries.items():
        _check_number(cfg, name)
        if summary and cfg.MODEL.MASK_ON:
            _check_masks(cfg, name, summary, name in train, name in test)
        if summary and cfg.MODEL.KEYPOINT_ON:
            _check_keypoints(name, summary, name in train, name in test)
        if summary and name in train and cfg.MODEL.META_ARCHITECTURE in _SEMANTIC:
            raise UserError(
                f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} learns from semantic segmentation, which "
                f"{name} (COCO format) does not have: use register_coco_panoptic_separated"
            )
    if cfg.MODEL.LOAD_PROPOSALS:
        for which in ("TEST",) if eval_only else ("TRAIN", "TEST"):
            _check_proposals(f"PROPOSAL_FILES_{which}", cfg.DATASETS, len(cfg.DATASETS[which]))
    files = {name: summary.files for name, summary in summaries.items() if summary}
    for trained, tested in itertools.product(train, test):
        pairs, compared = shared_images(files.get(trained, []), files.get(tested, []))
        if pairs:
            logger.warning(
                f"{len(pairs)} of {compared} images of {tested} (DATASETS.TEST) that were compared are in {trained} "
                f"(DATASETS.TRAIN) too, such as {pairs[0][1]}: AP of trained images says nothing about new ones"
            )
    return summaries


def _check_number(cfg: CfgNode, name: str) -> None:
    architecture = dict(META_ARCH_REGISTRY).get(cfg.MODEL.META_ARCHITECTURE)
    for base, head in _READS_NUMBER.items():
        number, classes = cfg.MODEL[head].NUM_CLASSES, class_names(name)
        if base in getattr(architecture, "__mro__", ()) and len(classes) != number:
            what = "no thing_classes in MetadataCatalog"
            if classes:
                what = (
                    f"{len(classes)} classes, its own or those it is mapped to ({listed(classes, 3)}): set it to that"
                )
            raise UserError(f"MODEL.{head}.NUM_CLASSES is {number}, but {name} has {what}")


def _check_masks(cfg: CfgNode, name: str, summary: CocoSummary, train: bool, test: bool) -> None:
    gaps = summary.gaps["masks"] + (summary.gaps["crowd masks"] if test else [])
    _report("MODEL.MASK_ON", name, gaps, summary.gaps["mask doubts"])
    if train and summary.gaps["polygons"] and cfg.INPUT.MASK_FORMAT == "polygon":
        gap = summary.gaps["polygons"][0]
        raise UserError(f"INPUT.MASK_FORMAT is 'polygon', but in {name} {gap}: set it to bitmask")


def _check_keypoints(name: str, summary: CocoSummary, train: bool, test: bool) -> None:
    metadata = MetadataCatalog.get(name)
    gaps = summary.gaps["visibility"] + (summary.gaps["keypoints"] if test else [])
    doubts, flips = list(summary.gaps["keypoint doubts"]), metadata.get("keypoint_flip_map")
    if train and (not metadata.get("keypoint_names") or flips is None):
        gaps = ["MetadataCatalog has no keypoint_names and keypoint_flip_map, nor has the json one list for all"]
    elif train and not flips:
        doubts.append("a flip exchanges no keypoints: none have names with left and right")
    _report("MODEL.KEYPOINT_ON", name, gaps, doubts)


def check_number_of_keypoints(cfg: CfgNode, model: nn.Module, summaries: dict[str, CocoSummary | None]) -> None:
    """Refuses data, keypoint_names, keypoint head and OKS sigmas of a run that differ in it."""
    heads = [module for module in model.modules() if isinstance(module, BaseKeypointRCNNHead)]
    numbers = [(head.num_keypoints, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS") for head in heads]
    if cfg.DATASETS.TEST:
        numbers.append((len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17, "TEST.KEYPOINT_OKS_SIGMAS"))  # COCO's 17
    for name, summary in summaries.items():
        if summary:
            numbers += [(number / 3, f"objects of {name}") for number in sorted(summary.keypoint_numbers)]
        if names := MetadataCatalog.get(name).get("keypoint_names"):
            numbers.append((len(names), f"keypoint_names of {name}"))
    if len({number for number, _ in numbers}) > 1:
        found = ", ".join(f"{number:g} in {place}" for number, place in numbers)
        what = f"{found}; give all that of the data, and zeros to an object without"
        raise UserError(f"MODEL.KEYPOINT_ON is True, but numbers of keypoints differ: {what}")


def _report(key: str, name: str, gaps: Sequence[str], doubts: Sequence[str]) -> None:
    if gaps:
        raise UserError(f"{key} is True, but in {name} {gaps[0]}: fix it, or set {key} to False")
    for doubt in doubts:
        logger.warning(f"{key} is True, but in {name} {doubt}")


def _check_proposals(key: str, datasets: CfgNode, number: int) -> None:
    if len(datasets[key]) != number:
        raise UserError(f"DATASETS.{key} must name a file for each of {number} data sets, got {datasets[key]}")
    for path in datasets[key]:
        with as_user_error(f"DATASETS.{key} {path!r} cannot be read"):
            open(PathManager.get_local_path(path), "rb").close()
