"""Evaluation: image generation from captions, features, metrics and reports."""

from .drawing import Drawing, Setting, draw
from .evaluator import METRICS, Evaluation
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
