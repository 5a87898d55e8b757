"""A warning for whoever fine-tunes trained weights, with the figures that were measured."""

from repr_det.method.scheme import RePrScheme

SHORT = 16_000  # iterations: twenty times the shorter of the two that were measured; COCO's 1x schedule has 90,000
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


def fine_tuning_warning(weights: str, max_iter: int, scheme: RePrScheme) -> str | None:
    """One sentence for a run that takes filters out of a trained backbone and has few iterations to learn them again.

    Args:
        weights: that training starts from.
        max_iter: iterations of the training.
        scheme: of the run.

    Returns:
        None where training starts from random weights, lasts SHORT iterations or more, only parts that are new to
        the detector (FPN, RPN, heads) take part, or only redundant filters go and all return silently.
    """
    trained = [layer.name for layer in scheme.layers if not layer.name.startswith(_NEW_PARTS)]
    if not weights or max_iter >= SHORT or not trained:
        return None
    if scheme.criterion.spares and not set(trained) & set(scheme.loud):
        return None
    return (
        f"RePr: {max_iter} iterations from trained weights ({weights}), and every "
        f"drop takes up to {100 * scheme.options.drop_ratio:g} % of the filters of {len(trained)} trained convs. "
        f"{MEASURED}"
    )
