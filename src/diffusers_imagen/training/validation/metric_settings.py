"""Settings of validation metrics, checked before anything is read."""

from dataclasses import dataclass, field
from inspect import get_annotations
from typing import TYPE_CHECKING

from ...evaluation.choices import CLIP, DISTANCES, METRICS, NAMED, OF_FEATURES, least_pictures
from ...utils.arguments import bad_argument, check_choice
from ..data.data_config import DataConfig, arg
from ..settings import check_unused


if TYPE_CHECKING:
    from ...models.interface import StageNetwork

MOST_IMAGES, MOST_REFERENCE = 256, 10_000  # default limits
# settings that only some metrics use
USED_BY = {
    "validation_features": OF_FEATURES,
    "validation_clip_model": ("clip",),
    "validation_num_reference": (*DISTANCES, "nearest"),
}


@dataclass
class MetricSettings(DataConfig):
    """
    Settings for metrics of images that a stage generates from held-out captions, or by upscaling held-out images.
    """

    validation_metrics: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Metrics of images generated from captions of validation_split: {', '.join(METRICS)}, as in "
            "`diffusers-imagen evaluate`; super-resolution stages upscale downsampled images of this split."
        },
    )
    validation_features: str = arg(
        "inception",
        f"Features for distances: {', '.join(NAMED)}, or the folder of an image encoder.",
        place="local_or_hub",
    )
    validation_clip_model: str = arg(CLIP, "Model for the metric clip: folder or Hub id.", place="local_or_hub")
    validation_num_images: int | None = arg(
        None, f"Number of images for metrics, chosen at random; by default all rows up to {MOST_IMAGES}."
    )
    validation_num_reference: int | None = arg(
        None,
        "Number of real images to compare with, chosen at random from validation_split, and for the metric nearest "
        f"from train_split; by default all rows up to {MOST_REFERENCE:,}.",
    )
    validation_batch_size: int = arg(16, "Images per device that are generated at a time for metrics.")
    validation_num_inference_steps: int | None = arg(
        None, "Number of steps for these images; by default that of the stage."
    )
    validation_guidance_scale: float | None = arg(
        None, "Guidance scale for these images; by default that of the stage."
    )

    def __post_init__(self):
        super().__post_init__()
        metrics = self.validation_metrics
        if metrics is not None:
            if not metrics:
                raise bad_argument("validation_metrics", metrics, f"some of {', '.join(METRICS)}")
            for metric in metrics:
                check_choice("validation_metrics", metric, METRICS)
        check_unused(self)
        if metrics is not None:
            self._check_pictures(metrics)

    def unused(self) -> dict[str, str]:
        """Return the settings that have no effect beside the others, with the reason; see `check_unused`."""
        metrics = self.validation_metrics
        if metrics is None:
            return dict.fromkeys(BESIDE, "is only used with `validation_metrics`")
        return {
            name: f"`validation_metrics` has no {' or '.join(map(repr, uses))} to use it"
            for name, uses in USED_BY.items()
            if not set(uses) & set(metrics)
        }

    def _check_pictures(self, metrics: list[str]) -> None:
        """Raise ValueError for metrics without images, or with too few."""
        if self.validation_split is None:
            raise ValueError(
                f"`validation_metrics` has {metrics[0]!r}, but there are no held-out images: set `validation_split`."
            )
        if "super-resolution" in metrics and self.low_resolution is None:
            raise ValueError(
                "`validation_metrics` has 'super-resolution', but this is not a super-resolution stage: it has no "
                "`low_resolution`."
            )
        if "is" in metrics and self.validation_features != "inception":
            raise ValueError(
                "`validation_metrics` has 'is', which uses Inception's classes, but `validation_features` is "
                f"{self.validation_features!r}."
            )
        for name, of in (("validation_num_images", metrics), ("validation_num_reference", DISTANCES)):
            count, least = getattr(self, name), least_pictures(metric for metric in metrics if metric in of)
            if count is not None and count < least:
                raise bad_argument(name, count, f"at least {least} for `validation_metrics` {' '.join(metrics)}")


BESIDE = [name for name in get_annotations(MetricSettings) if name != "validation_metrics"]


def check_metrics(config: MetricSettings, unet: "StageNetwork") -> None:
    """Check that the metrics can be computed on this machine and for this network.

    Raises:
        ValueError: If a package or a folder is missing, or the network is not conditioned on text that a metric or
            setting needs.
    """
    # torch and transformers take seconds to import; --help should not
    from ...evaluation.evaluator import check_installed
    from ...evaluation.feature_networks import check_packages

    if config.validation_metrics is None:
        return
    check_installed(config.validation_metrics, "validation_metrics")
    if set(config.validation_metrics) & set(OF_FEATURES):
        check_packages(config.validation_features, "validation_features")
    if unet.text_width is not None:
        return
    if "clip" in config.validation_metrics:
        raise ValueError(
            "`validation_metrics` has 'clip', which needs captions, but this network is not conditioned on text."
        )
    if config.validation_guidance_scale is not None:
        raise ValueError(
            f"`validation_guidance_scale` is {config.validation_guidance_scale}, but this network is not conditioned "
            "on text, which guidance requires."
        )
