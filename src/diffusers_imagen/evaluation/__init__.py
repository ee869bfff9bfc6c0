"""Evaluation: image generation from captions, features, metrics and reports."""

from typing import TYPE_CHECKING

from ..utils.imports import lazy_names


if TYPE_CHECKING:
    from .choices import METRICS
    from .drawing import Drawing, Setting, draw
    from .evaluator import Evaluation
    from .feature_networks import FeatureNetwork, load_clip, load_features
    from .features import Features
    from .figures import Distances, Figure, frechet_distance, inception_score, kernel_distance, precision_recall
    from .picture_sets import CaptionList, PictureFiles, PictureSet, choose

__all__ = [
    "METRICS",
    "CaptionList",
    "Distances",
    "Drawing",
    "Evaluation",
    "FeatureNetwork",
    "Features",
    "Figure",
    "PictureFiles",
    "PictureSet",
    "Setting",
    "choose",
    "draw",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_clip",
    "load_features",
    "precision_recall",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".drawing": ("Drawing", "Setting", "draw"),
        ".choices": ("METRICS",),
        ".evaluator": ("Evaluation",),
        ".feature_networks": ("FeatureNetwork", "load_clip", "load_features"),
        ".features": ("Features",),
        ".figures": (
            "Distances",
            "Figure",
            "frechet_distance",
            "inception_score",
            "kernel_distance",
            "precision_recall",
        ),
        ".picture_sets": ("CaptionList", "PictureFiles", "PictureSet", "choose"),
    },
)
