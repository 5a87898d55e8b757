"""A warning for whoever fine-tunes trained weights, with the figures that were measured."""

from repr_det.method.scheme import RePrScheme

SHORT = 16_000  # iterations: twenty times the shorter of the two that were measured; COCO's 1x schedule has 90,000
SHORT_EPOCHS = 2.0  # the same part of that schedule, which has 12: a small batch makes many iterations of few images
# By Detectron2's names: parts that ImageNet weights do not reach.
_NEW_PARTS = (
    "backbone.fpn",
    "backbone.top_block.",
    "proposal_generator.",
    "roi_heads.box_",
    "roi_heads.mask_",
    "roi_heads.keypoint_",
    "sem_seg_head.",
    "head.",
)
MEASURED = (
    "In runs of 800 iterations on two small data sets that lost 8 and 17 AP against the same runs without RePr, in "
    "runs of 2,400 it lost 1 (and collapsed on one seed of five) and 8, and no form of it gained (docs/method.md): "
    "take repr_r50_fpn_redundant.yaml, which lost nothing there that seven seeds could tell, train the baseline beside "
    "it (repr-det compare), or set REPR.ENABLED False"
)


def fine_tuning_warning(weights: str, max_iter: int, epochs: float | None, scheme: RePrScheme) -> str | None:
    """One sentence for a run that takes filters out of a trained backbone and has few iterations to learn them again.

    Args:
        weights: that training starts from.
        max_iter: iterations of the training.
        epochs: those of the training; None if they are not known.
        scheme: of the run.

    Returns:
        None if training starts from random weights or lasts SHORT iterations and SHORT_EPOCHS or more, if only parts
        that are new to the detector (FPN, RPN, heads) take part, or only redundant filters go and all return silently.
    """
    trained = [layer.name for layer in scheme.layers if not layer.name.startswith(_NEW_PARTS)]
    is_short = max_iter < SHORT or (epochs is not None and epochs < SHORT_EPOCHS)
    if not weights or not is_short or not trained:
        return None
    if scheme.criterion.spares and not set(trained) & set(scheme.loud):
        return None
    length = f"{max_iter} iterations" if epochs is None else f"{max_iter} iterations ({epochs:.3g} epochs)"
    return (
        f"RePr: {length} from trained weights ({weights}), and every "
        f"drop takes up to {100 * scheme.options.drop_ratio:g} % of the filters of {len(trained)} trained convs. "
        f"{MEASURED}"
    )
