"""A warning for whoever fine-tunes trained weights."""

from repr_det.method.scheme import RePrScheme

SHORT = 16_000  # iterations: COCO's 1x schedule has 90,000
SHORT_EPOCHS = 2.0  # the same part of that schedule, which has 12: a small batch makes many iterations of few images
# By Detectron2's names: what ImageNet weights reach.
_TRAINED = ("backbone.bottom_up.", "backbone.stem.", "backbone.res", "roi_heads.res5.")
ADVICE = (
    "Such runs lost AP against the same runs without RePr (docs/method.md has the figures): take "
    "repr_r50_fpn_redundant.yaml, which did not, train the baseline beside it (repr-det compare), or set REPR.ENABLED "
    "False"
)


def fine_tuning_warning(weights: str, max_iter: int, epochs: float | None, scheme: RePrScheme) -> str | None:
    """One sentence for a run that drops filters of a trained backbone and has few iterations to relearn them.

    Args:
        weights: that training starts from; "" for random ones.
        epochs: those of the training; None if they are not known.

    Returns:
        None if the run is none of these, or only redundant filters go and all return silently.
    """
    trained = [layer.name for layer in scheme.layers if layer.name.startswith(_TRAINED)]
    is_short = max_iter < SHORT or (epochs is not None and epochs < SHORT_EPOCHS)
    if not weights or not is_short or not trained:
        return None
    if scheme.criterion.spares and not set(trained) & set(scheme.loud):
        return None
    length = f"{max_iter} iterations" if epochs is None else f"{max_iter} iterations ({epochs:.3g} epochs)"
    return (
        f"RePr: {length} from trained weights ({weights}), and every drop takes up to "
        f"{100 * scheme.options.drop_ratio:g} % of the filters of {len(trained)} trained convs. {ADVICE}"
    )
