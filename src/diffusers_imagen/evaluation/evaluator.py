"""Evaluation: generates images, computes features and metrics, and writes the report; see `Evaluation.run`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from ..utils.arguments import bad_argument
from ..utils.files import write_text
from .choices import DISTANCES, METRICS, OF_PAIRS, least_pictures
from .drawing import Drawing, Setting, draw, network_calls
from .feature_networks import ClipScores, FeatureNetwork, check_package
from .features import Features
from .figures import SEED, Distances, Figure, Row, clip_score, sample_warnings
from .nearest import Nearest, find_nearest
from .picture_sets import PictureSet
from .reports import Report
from .upscaling import consistency, upscaling_figures


logger = logging.get_logger(__name__)

PACKAGES = {
    "fid": "torchmetrics",
    "kid": "torchmetrics",
    "is": "torchmetrics",
    "super-resolution": "torchmetrics",
    "precision-recall": "torch_fidelity",
}
REAL, FLOOR = "real images of the captions", "reference, split in two"
SIZES_LOOKED_AT = 64
INDEX = "captions.txt"

Upscaling = tuple[str, int, int, dict[str, Figure]]  # the arguments of `Report.add_upscaling`


@dataclass
class Evaluation:
    """Evaluation settings: the images to generate, and the metrics.

    Attributes:
        captions ([`PictureSet`]): Captions, with their real images or without.
        indices (`list[int]`): Indices of the captions to use.
        settings (`list[Setting]`): Sampling settings; images of all captions are generated for each.
        resolutions (`list[int]`): Resolutions of the stages that run, in pixels.
        folder (`Path`): Output folder.
        metrics (`tuple[str, ...]`): Entries of `METRICS`.
        reference ([`PictureSet`], *optional*): Real images, for distances.
        reference_indices (`list[int]`): Indices of the reference images to use.
        network ([`FeatureNetwork`], *optional*): Feature network.
        clip ([`ClipScores`], *optional*): CLIP scores of images and captions.
        seed (`int`): Seed of all noise.
        batch_size (`int`): Images per batch.
        resamples (`int`): Bootstrap samples of the Frechet distance.
        source (`str`): The model, for the report.
        model (`str`): Identity of its weights: `digest_networks` of the pipeline as loaded.
    """

    captions: PictureSet
    indices: list[int]
    settings: list[Setting]
    resolutions: list[int]
    folder: Path
    metrics: tuple[str, ...]
    reference: PictureSet | None = None
    reference_indices: list[int] = field(default_factory=list)
    network: FeatureNetwork | None = None
    clip: ClipScores | None = None
    seed: int = 0
    batch_size: int = 16
    resamples: int = 5
    source: str = "the model"
    model: str = ""

    def __post_init__(self) -> None:
        self.metrics = tuple(metric for metric in METRICS if metric in self.metrics)
        check_inputs(self)

    def run(self, pipe: DiffusionPipeline, use: Callable[[str], Any], state: PartialState) -> None:
        """Generate missing images, and write `report.html` and `results.json`; all processes call this.

        Args:
            pipe ([`ImagenCascadePipeline`]): The pipeline.
            use (`Callable`): Called with the scheduler of each setting before its images are generated.
            state ([`~accelerate.PartialState`]): The processes.
        """
        calls = {}
        if state.is_main_process:
            for warning in self.warnings():
                logger.warning(warning)
        pipe.set_progress_bar_config(disable=True)
        for setting in self.settings:
            use(setting.scheduler)
            calls[setting] = network_calls(pipe.stages, setting)
            draw(pipe, self.drawing(setting), state)
            if "super-resolution" in self.metrics:
                draw(pipe, self.drawing(setting, enlarges=True), state)
        made = self.features()
        for features in made.values():
            features.make(state)
        upscaling = self.measure_upscaling(state)
        if state.is_main_process:
            self.report(calls, made, upscaling)

    def drawing(self, setting: Setting, enlarges: bool = False) -> Drawing:
        """
        Return the images to generate: with all stages, or from downsampled real images with those after the first.
        """
        enlarged = self.resolutions[0] if enlarges else None
        if enlarges:  # shared by settings that differ only in the first stage
            setting = Setting(setting.scheduler, setting.steps[1:], setting.guidance[1:])
        folder = self.folder / ("enlarged" if enlarges else "images") / setting.name
        return Drawing(
            self.captions,
            self.indices,
            folder,
            setting,
            self.seed,
            self.model,
            self.resolutions[-1],
            self.batch_size,
            enlarged,
        )

    # ---- features

    def features(self) -> dict[tuple[str, str, int], Features]:
        """Return all features for the metrics, by network, image set and resolution."""
        found = {}
        for resolution in self.resolutions:
            sets: dict[str, tuple[PictureSet, list[int]]] = {
                setting.name: (self.drawing(setting).files(resolution), self.indices) for setting in self.settings
            }
            if self.captions.has_pictures:
                sets[REAL] = (self.captions, self.indices)
            if self.clip is not None:
                for name, (pictures, indices) in sets.items():
                    found["clip", name, resolution] = self.of(self.clip, pictures, indices, resolution)
            if self.network is not None:
                if self.reference is not None:
                    sets[FLOOR] = (self.reference, self.reference_indices)
                for name, (pictures, indices) in sets.items():
                    found["features", name, resolution] = self.of(self.network, pictures, indices, resolution)
        return found

    def of(self, network: FeatureNetwork, pictures: PictureSet, indices: list[int], resolution: int) -> Features:
        """Return the features of a set of images."""
        return Features(self.folder / "cache", network, pictures, indices, resolution)

    # ---- figures

    def report(self, calls: dict[Setting, int], made: dict, upscaling: list[Upscaling]) -> None:
        """Compute metrics and write the report; only the main process calls this."""
        write_text(
            self.folder / INDEX, "".join(f"{i:08d} {one_line(self.captions.caption(i))}\n" for i in self.indices)
        )
        report = Report(self.folder, self.facts(), warnings=self.warnings())
        for resolution in self.resolutions:
            reference = self.load(made, "features", FLOOR, resolution)
            for setting in self.settings:
                row = self.row(made, setting.name, resolution, reference, report)
                row.setting, row.calls = setting, calls[setting]
                report.rows.append(row)
            if self.captions.has_pictures:
                report.rows.append(self.row(made, REAL, resolution, reference, report))
            if reference is not None and self.distances is not None:
                report.rows.append(self.floor(reference, resolution))
        for setting in self.settings:
            pictures = self.drawing(setting).files(self.resolutions[-1])
            report.add_contact_sheet(pictures, self.indices, self.resolutions[-1])
        for measured in upscaling:
            report.add_upscaling(*measured)
        if self.captions.has_pictures:
            report.add_contact_sheet(self.captions, self.indices, self.resolutions[-1])
        report.write()

    def row(
        self, made: dict, name: str, resolution: int, reference: dict[str, torch.Tensor] | None, report: Report
    ) -> Row:
        """Compute the metrics of a set of images."""
        row = Row(name, resolution, len(self.indices))
        features = self.load(made, "features", name, resolution)
        if features is not None and self.distances is not None:
            row.figures |= self.distances.measure(features, reference or {})
        scores = self.load(made, "clip", name, resolution)
        if scores is not None:
            row.figures |= clip_score(scores)
        if "nearest" in self.metrics and features is not None and reference is not None:
            nearest = find_nearest(features["features"], reference["features"])
            row.figures |= nearest.figures()
            if name != REAL:
                self.show_nearest(report, made["features", name, resolution].pictures, nearest)
        return row

    def floor(self, reference: dict[str, torch.Tensor], resolution: int) -> Row:
        """Compute the metrics of reference images, as many as were generated or half of them, against the others."""
        count = len(self.reference_indices)
        size = min(len(self.indices), count // 2)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED))
        one, other = ({key: value[part] for key, value in reference.items()} for part in (order[:size], order[size:]))
        row = Row(f"{FLOOR}: {size:,} against {count - size:,}", resolution, size)
        assert self.distances is not None
        distances = self.distances._replace(metrics=tuple(m for m in self.distances.metrics if m != "is"))
        row.figures = distances.measure(one, other) if size >= least_pictures(distances.metrics) else {}
        return row

    def load(self, made: dict, kind: str, name: str, resolution: int) -> dict[str, torch.Tensor] | None:
        """Load features; None if there are none."""
        features = made.get((kind, name, resolution))
        return None if features is None else features.load()

    @property
    def distances(self) -> Distances | None:
        """Return the metrics to compute from features."""
        if self.network is None:
            return None
        metrics = tuple(metric for metric in self.metrics if metric in (*DISTANCES, "is"))
        return Distances(metrics, self.network.suffix, self.resamples)

    def show_nearest(self, report: Report, drawn: PictureSet, nearest: Nearest) -> None:
        """Add the generated images that are nearest to real ones to the report."""
        assert self.reference is not None
        order = nearest.cosines.argsort(descending=True).tolist()
        places = [(self.indices[i], self.reference_indices[int(nearest.places[i])], i) for i in order[:8]]
        report.add_nearest(drawn, self.reference, [(a, b, nearest.cosines[i].item()) for a, b, i in places])

    def measure_upscaling(self, state: PartialState) -> list[Upscaling]:
        """Measure the consistency of a cascade's stages, and super-resolution of real images against bicubic
        upsampling; called by all processes."""
        measured: list[Upscaling] = []
        first, *upscaled = self.resolutions
        for below, resolution in zip(self.resolutions, upscaled):
            for setting in self.settings:
                drawing = self.drawing(setting)
                agreement = consistency(drawing.files(resolution), drawing.files(below), self.indices, below, state)
                measured.append((f"{setting.name}, drawn", below, resolution, {"consistency (dB)": agreement}))
        if "super-resolution" not in self.metrics:
            return measured
        drawings = {drawing.folder: drawing for drawing in (self.drawing(one, enlarges=True) for one in self.settings)}
        for drawing in drawings.values():
            for resolution in upscaled:
                drawn = drawing.files(resolution)
                found = upscaling_figures(drawn, self.captions, self.indices, first, resolution, state)
                for method, figures in found.items():
                    measured.append((f"{drawing.setting.name}, {method}", first, resolution, figures))
        return measured

    # ---- report content besides the metrics

    def facts(self) -> dict[str, Any]:
        """Return the settings of the evaluation for the report."""
        facts: dict[str, Any] = {
            "model": f"{self.source} ({self.model})",
            "stages (px)": ", ".join(map(str, self.resolutions)),
            "captions": f"{len(self.indices):,} of {len(self.captions):,} of {self.captions.name}",
            "seed": self.seed,
        }
        if self.reference is not None:
            facts["reference"] = f"{len(self.reference_indices):,} of {len(self.reference):,} of {self.reference.name}"
            facts["reference, sizes (px)"] = ", ".join(sorted(self.reference_sizes()))
            facts["size of both"] = "the largest square at the centre, resized bicubically to the stage's resolution"
        if self.network is not None:
            facts["features"] = (
                f"{self.network.suffix or 'Inception'}, {self.network.width:,}: {self.network.protocol}"
            )
        if self.clip is not None:
            facts["CLIP"] = f"{self.clip.source}: {self.clip.protocol}"
        return facts

    def reference_sizes(self) -> set[str]:
        """Return the sizes of some images of the reference."""
        assert self.reference is not None
        some = self.reference_indices[:: max(1, len(self.reference_indices) // SIZES_LOOKED_AT)]
        return {"{}x{}".format(*self.reference.picture(index).size) for index in some}

    def warnings(self) -> list[str]:
        """Return warnings about comparing the metrics with others."""
        warnings = []
        if self.distances is not None and self.network is not None:
            real = len(self.reference_indices) if self.reference is not None else len(self.indices)
            warnings += sample_warnings(self.distances, len(self.indices), real, self.network.width)
        if self.reference is not None:
            sizes = sorted(
                self.reference_sizes() - {f"{resolution}x{resolution}" for resolution in self.resolutions[-1:]}
            )
            if sizes:
                warnings.append(
                    f"The reference has images of {', '.join(sizes[:3])} px; they are resized to each stage's "
                    "resolution."
                )
            if self.reference.identity() == self.captions.identity():
                warnings.append(
                    "Captions and reference are the same rows: the metrics of real images are meaningless."
                )
        return warnings


def one_line(text: str) -> str:
    """Return a text without line breaks."""
    return " ".join(text.split())


def check_installed(metrics: Iterable[str], argument: str = "metrics") -> None:
    """Raise ValueError, naming the argument, for a metric whose package cannot be imported."""
    for metric in metrics:
        if metric in PACKAGES:
            check_package(PACKAGES[metric], argument, metric)


def check_inputs(evaluation: Evaluation) -> None:
    """Raise a ValueError that names the argument for metrics that need other inputs."""
    metrics, count = evaluation.metrics, len(evaluation.indices)
    if not evaluation.settings or not metrics:
        raise bad_argument("metrics", list(metrics), f"some of {', '.join(METRICS)}")
    needs_reference = [metric for metric in metrics if metric in (*DISTANCES, "nearest")]
    if needs_reference and evaluation.reference is None:
        raise ValueError(f"`metrics` has {needs_reference[0]!r}, which needs real images: set --reference.")
    needs_pairs = [metric for metric in metrics if metric in OF_PAIRS]
    if needs_pairs and not evaluation.captions.has_pictures:
        raise ValueError(
            f"`metrics` has {needs_pairs[0]!r}, which needs the images of the captions, but `captions` is "
            f"'{evaluation.captions.name}', which has none: use a data set."
        )
    if needs_pairs and len(evaluation.resolutions) < 2:
        raise ValueError(f"`metrics` has {needs_pairs[0]!r}, but no super-resolution stage runs.")
    least = least_pictures(metrics)
    if count < least:
        raise ValueError(f"`captions` has {count} captions to use, but the metrics need at least {least}.")
    least = least_pictures(needs_reference)
    if needs_reference and len(evaluation.reference_indices) < least:
        raise ValueError(
            f"`reference` has {len(evaluation.reference_indices)} images, but should have at least {least}."
        )
    if "is" in metrics and getattr(evaluation.network, "suffix", None) is not None:
        raise ValueError("`metrics` has 'is', which uses Inception's classes, but `features` is another network.")
