"""Names of metrics, and of the networks that compute features of images."""

from collections.abc import Iterable


DISTANCES = ("fid", "kid", "precision-recall")  # from the features of the reference
OF_FEATURES = (*DISTANCES, "is", "nearest")
OF_PAIRS = ("super-resolution",)  # from captions with images
METRICS = (*OF_FEATURES, "clip", *OF_PAIRS)

CLIP = "openai/clip-vit-large-patch14"
NAMED = ("inception", "dinov2", "clip", "efficientnet-lite0")

INCEPTION_SPLITS = 10
NEIGHBOURS = 3  # of precision and recall
LEAST = {"is": INCEPTION_SPLITS, "precision-recall": NEIGHBOURS + 1}  # minimum number of images; 2 for other metrics


def least_pictures(metrics: Iterable[str]) -> int:
    """Return the minimum number of images for these metrics."""
    return max((LEAST.get(metric, 2) for metric in metrics), default=2)
