"""Metrics with uncertainties from image features: FID, KID and others, as in torchmetrics and torch-fidelity."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from .choices import INCEPTION_SPLITS, NEIGHBOURS
from .drawing import Setting


KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # the defaults of torch-fidelity and torchmetrics
CHUNK = 2048  # for precision and recall: number of images whose distances are computed at once
# of torchmetrics' classes: one process has all features, and does not wait for the others
ALONE: dict[str, Any] = {"sync_on_compute": False}
SEED = 2020  # torch-fidelity's seed of subsets and splits
CLIP_SCORE = "CLIP score"


class Figure(NamedTuple):
    """Value of a metric, its spread, and a description of the spread."""

    value: float
    spread: float | None = None
    of: str = ""  # description of the samples over which `spread` is the standard deviation

    def text(self) -> str:
        """Format the value for a report."""
        digits = 4 if abs(self.value) < 10 else 2
        spread = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        return f"{self.value:.{digits}f}{spread}"


@dataclass
class Row:
    """Metrics of a set of images at a resolution."""

    name: str
    resolution: int
    count: int
    figures: dict[str, Figure] = field(default_factory=dict)
    setting: Setting | None = None  # None for real images
    calls: int | None = None  # denoiser evaluations per image

    def as_json(self) -> dict[str, Any]:
        """Return the row for `results.json`."""
        setting = None if self.setting is None else self.setting._asdict()
        figures = {label: figure._asdict() for label, figure in self.figures.items()}
        return {
            "name": self.name,
            "resolution": self.resolution,
            "pictures": self.count,
            "setting": setting,
            "evaluations": self.calls,
            "figures": figures,
        }


def figure_of_mean(values: torch.Tensor) -> Figure:
    """Return the mean of one value per image, with its standard error."""
    mean = values.double().mean().item()
    if len(values) == 1:
        return Figure(mean)
    error = values.double().std().item() / math.sqrt(len(values))
    return Figure(mean, error, "standard error of the mean over images")


def clip_score(scores: dict[str, torch.Tensor]) -> dict[str, Figure]:
    """Return the mean of the results of `ClipScores`, by its label."""
    return {CLIP_SCORE: figure_of_mean(scores["features"][:, 0])}


class GivenFeatures(torch.nn.Module):
    """Identity module in place of the feature network of torchmetrics' classes, for precomputed features."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(features: torch.Tensor, reference: torch.Tensor, resamples: int = 0) -> Figure:
    """
    Compute the Frechet distance of Gaussians fitted to features (Heusel et al. 2017, arXiv 1706.08500) by
    torchmetrics.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Features of generated images.
        reference (`torch.Tensor` of shape `(M, D)`): Features of real images.
        resamples (`int`): Bootstrap samples of generated images, for the spread; each takes as long as the distance.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(GivenFeatures(features.shape[1]), reset_real_features=False, **ALONE)
    metric.set_dtype(torch.float64)
    metric.update(reference.double(), real=True)

    def distance(some: torch.Tensor) -> float:
        metric.reset()
        metric.update(some.double(), real=False)
        return metric.compute().item()

    generator = torch.Generator().manual_seed(SEED)
    draws = [torch.randint(len(features), (len(features),), generator=generator) for _ in range(resamples)]
    spread = torch.tensor([distance(features[draw]) for draw in draws]).std().item() if resamples > 1 else None
    of = "" if spread is None else f"standard deviation over {resamples} bootstrap samples"
    return Figure(distance(features), spread, of)


def kernel_distance(features: torch.Tensor, reference: torch.Tensor) -> Figure:
    """Compute the squared MMD of a cubic kernel (Binkowski et al. 2018, arXiv 1801.01401) by torchmetrics.

    Subsets have 1,000 images, or as many as there are; they are the same as in torch-fidelity's KID.
    """
    from torchmetrics.image.kid import poly_mmd

    size, draws = kid_subset_size(features, reference), np.random.RandomState(SEED)
    values = []
    for _ in range(KID_SUBSETS):
        drawn = features[draws.choice(len(features), size, replace=False)].double()
        real = reference[draws.choice(len(reference), size, replace=False)].double()
        values.append(poly_mmd(drawn, real))
    found = torch.stack(values)
    of = f"standard deviation over {KID_SUBSETS} subsets of {size} images"
    return Figure(found.mean().item(), found.std(correction=0).item(), of)


def kid_subset_size(features: torch.Tensor, reference: torch.Tensor) -> int:
    """Return the number of images per subset."""
    return min(KID_SUBSET_SIZE, len(features), len(reference))


def precision_recall(features: torch.Tensor, reference: torch.Tensor) -> tuple[Figure, Figure]:
    """Compute improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) by torch-fidelity."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": CHUNK, "save_cpu_ram": True, "verbose": False}
    found = prc_features_to_metric(features, reference, **options)
    precision, recall = (
        Figure(
            found[key], math.sqrt(found[key] * (1 - found[key]) / count), "standard error of a proportion of images"
        )
        for key, count in ((KEY_METRIC_PRECISION, len(features)), (KEY_METRIC_RECALL, len(reference)))
    )
    return precision, recall


def inception_score(logits: torch.Tensor) -> Figure:
    """Compute the inception score (Salimans et al. 2016, arXiv 1606.03498) by torchmetrics."""
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore(GivenFeatures(logits.shape[1]), splits=INCEPTION_SPLITS, **ALONE)
    metric.update(logits.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # torchmetrics draws the splits from torch's global generator
        mean, spread = metric.compute()
    return Figure(mean.item(), spread.item(), f"standard deviation over {INCEPTION_SPLITS} splits")


class Distances(NamedTuple):
    """Metrics computed from features.

    Attributes:
        metrics (`tuple[str, ...]`): Some of "fid", "kid", "precision-recall" and "is".
        suffix (`str`, *optional*): Name of the features; None for Inception's.
        resamples (`int`): Bootstrap samples of the Frechet distance.
    """

    metrics: tuple[str, ...]
    suffix: str | None
    resamples: int

    def label(self, metric: str) -> str:
        """Return the label of a distance: FID and KID only for Inception features."""
        short = {"fid": "FD", "kid": "KD"}[metric]
        return metric.upper() if self.suffix is None else f"{short}-{self.suffix}"

    def measure(self, features: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, Figure]:
        """Compute the metrics of images against real ones, by label; the inception score needs no real images."""
        found: dict[str, Figure] = {}
        if "is" in self.metrics:
            found["IS"] = inception_score(features["logits"])
        if not set(self.metrics) - {"is"}:
            return found
        drawn, real = features["features"], reference["features"]
        if "fid" in self.metrics:
            found[self.label("fid")] = frechet_distance(drawn, real, self.resamples)
        if "kid" in self.metrics:
            found[self.label("kid")] = kernel_distance(drawn, real)
        if "precision-recall" in self.metrics:
            found["precision"], found["recall"] = precision_recall(drawn, real)
        return found


def sample_warnings(distances: Distances, drawn: int, real: int, width: int) -> list[str]:
    """Return warnings about metrics from too few images."""
    warnings = []
    few = min(drawn, real)
    if "fid" in distances.metrics:
        label = distances.label("fid")
        if few <= width:
            warnings.append(
                f"{label} of {few:,} images and {width:,} features: the covariance does not have full rank, and the "
                "value is far too large; compare it only with values from the same number of images."
            )
        elif few < 10_000:
            warnings.append(
                f"{label} of {few:,} images is biased upwards: published values are from 10,000 to 50,000."
            )
    if "kid" in distances.metrics and few < KID_SUBSET_SIZE:
        warnings.append(
            f"{distances.label('kid')} is from subsets of {few:,} images instead of {KID_SUBSET_SIZE:,}, because "
            "there are no more: its ± does not measure the variation over images."
        )
    if "is" in distances.metrics and drawn < 5_000:
        warnings.append(f"IS of {drawn:,} images is biased downwards: published values are from 30,000 to 50,000.")
    return warnings
