"""Metrics of images that a stage generates for held-out captions, computed as by `diffusers-imagen evaluate`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, gather_object
from diffusers.utils import logging

from ...evaluation import Distances, Drawing, Features, Setting, choose, draw, load_clip, load_features
from ...evaluation.choices import DISTANCES, OF_FEATURES, least_pictures
from ...evaluation.drawing import digest_networks, find_other, network_calls
from ...evaluation.feature_networks import ClipScores, FeatureNetwork
from ...evaluation.figures import Figure, Row, clip_score, sample_warnings
from ...evaluation.nearest import find_nearest
from ...evaluation.picture_sets import PictureFiles
from ...evaluation.upscaling import METHODS, upscaling_figures
from ...pipelines.pipeline_output import ImagenPipelineOutput
from ...text.source import TextSource
from ...utils.files import remove
from ...utils.processes import OneProcess, in_turn, on_main_process
from ..config import TrainingConfig
from ..data.row_pictures import RowPictures, at_hand
from ..data.sources import open_rows
from ..monitor import VALIDATION, Records
from ..sampling import StagePipeline, prompt_arguments
from .metric_settings import MOST_IMAGES, MOST_REFERENCE, USED_BY


logger = logging.get_logger(__name__)

PICTURES, REAL = "validation", "real"  # in a run's folder: images of the last validation; and features of real images
STEP = re.compile(r"step-(\d+)")


class StageCall:
    """Wrapper of a single stage for `draw`, which calls cascades: one value per stage, captions instead of embeddings.

    Args:
        pipe (`StagePipeline`): The stage, without a text encoder.
        text (`TextSource`, *optional*): Source of the embeddings, for a stage that is conditioned on text.
    """

    def __init__(self, pipe: StagePipeline, text: TextSource | None):
        self.pipe, self.text = pipe, text

    def __call__(
        self,
        captions: list[str],
        generator: list,
        num_inference_steps: list[int],
        guidance_scale: list[float],
        output_resolution: int,
        image: list | None = None,
    ) -> ImagenPipelineOutput:
        options: dict[str, Any] = {
            "num_inference_steps": num_inference_steps[0],
            "guidance_scale": guidance_scale[0],
        }
        if image is not None:
            options["image"] = image
        if self.text is not None:
            options |= prompt_arguments(self.text, captions)
        elif image is None:
            options["num_images_per_prompt"] = len(captions)
        return self.pipe(**options, generator=generator)


class PictureMetrics:
    """Metrics of a stage's images, with the same captions, reference images and noise at every validation.

    Created before training data is read, so that unsupported metrics raise errors early. All processes call its
    methods.

    Args:
        config (`TrainingConfig`): Configuration of the run, with `validation_metrics`.
        text (`TextSource`, *optional*): Source of the captions' embeddings, for a stage that is conditioned on text.
        pipe (`StagePipeline`): The stage, for its call defaults.
        accelerator (`Accelerator`): The processes of the run.

    Raises:
        ValueError: If a feature network cannot be loaded, or there are too few rows.
    """

    def __init__(self, config: TrainingConfig, text: TextSource | None, pipe: StagePipeline, accelerator: Accelerator):
        self.config, self.state, self.device = config, PartialState(), accelerator.device
        # with sharded weights only the main process has the whole network
        self.draws_alone = accelerator.distributed_type == DistributedType.FSDP
        self.wanted = tuple(dict.fromkeys(config.validation_metrics or ()))
        self.folder = Path(config.output_dir) / PICTURES
        self.setting, self.calls = plan_setting(config, pipe, guides=text is not None)
        self.network, self.clip = self.load_networks()
        self.held_out = self.open_pictures(str(config.validation_split), "validation_split", text is not None)
        self.indices = self.choose_rows("validation_num_images", self.held_out, self.wanted, MOST_IMAGES)
        self.real = self.real_features()
        self.text = None if text is None else self.text_of_captions(text)
        self.distances = None
        if self.network is not None:
            figures = tuple(metric for metric in self.wanted if metric in (*DISTANCES, "is"))
            self.distances = Distances(figures, self.network.suffix, resamples=0)

    @property
    def needs_encoder(self) -> bool:
        """Whether captions are encoded while images are generated."""
        return self.text is not None and self.text.needs_encoder

    # ---- before the first step

    def load_networks(self) -> tuple[FeatureNetwork | None, ClipScores | None]:
        """Load the network for features and the one that compares images with captions, if needed, on the CPU."""
        config, features, clip = self.config, None, None
        if set(self.wanted) & set(OF_FEATURES):
            source = config.validation_features
            features = in_turn(self.state, lambda: load_features(source, "cpu", "validation_features"))
        if "clip" in self.wanted:
            model = config.validation_clip_model
            clip = in_turn(self.state, lambda: load_clip(model, "cpu", "validation_clip_model"))
        return features, clip

    def open_pictures(self, split: str, argument: str, with_text: bool) -> RowPictures:
        """Open the images of a split."""
        config, most = self.config, [self.config.validation_num_images or MOST_IMAGES]
        if set(self.wanted) & set(USED_BY["validation_num_reference"]):
            most.append(config.validation_num_reference or MOST_REFERENCE)
        rows = at_hand(open_rows(config, split, with_text), max(most))
        return RowPictures(rows, config, split, argument, with_text)

    def choose_rows(self, name: str, pictures: RowPictures, metrics: tuple[str, ...], most: int) -> list[int]:
        """Choose the rows to use: as many as configured, or all up to `most`."""
        count, least = len(pictures), least_pictures(metrics)
        if count < least:
            raise ValueError(
                f"`{pictures.argument}` has {count} images, but should have at least {least} for `validation_metrics` "
                f"{' '.join(metrics)}."
            )
        wanted = getattr(self.config, name)
        return choose(name, count, min(count, most) if wanted is None else wanted, self.config.seed)

    def real_features(self) -> dict[str, Features]:
        """Return the features of held-out and training images that metrics need."""
        found: dict[str, RowPictures] = {}
        if set(self.wanted) & set(DISTANCES):
            found["held out"] = self.held_out
        if "nearest" in self.wanted:
            found["training"] = self.open_pictures(self.config.train_split, "train_split", with_text=False)
        of = tuple(metric for metric in self.wanted if metric in DISTANCES) or ("nearest",)
        made = {}
        for name, pictures in found.items():
            indices = self.choose_rows("validation_num_reference", pictures, of, MOST_REFERENCE)
            assert self.network is not None
            made[name] = Features(self.folder / REAL, self.network, pictures, indices, self.config.resolution)
        return made

    def text_of_captions(self, text: TextSource) -> TextSource:
        """Return the source of embeddings for the captions to use."""
        captions = [self.held_out.caption(index) for index in self.indices]
        missing = next((caption for caption in captions if caption not in text), None)
        if missing is not None:
            raise ValueError(
                f"`validation_split` has the caption {missing!r}, which is not in the embedding cache: pass "
                "`text_encoder`, or write a cache of all splits."
            )
        return text.for_captions(captions)

    def prepare(self) -> None:
        """Compute missing features of real images."""
        if self.state.is_main_process and self.distances is not None and self.network is not None:
            reference = self.real.get("held out")
            real = len(self.indices if reference is None else reference.indices)
            for warning in sample_warnings(self.distances, len(self.indices), real, self.network.width):
                logger.warning(warning)
        with self.networks_in_place():
            for features in self.real.values():
                features.make(self.state)

    @contextmanager
    def networks_in_place(self) -> Iterator[None]:
        """Context manager in which the feature networks are on the device; otherwise they are on the CPU."""
        networks = [network for network in (self.network, self.clip) if network is not None]
        for network in networks:
            network.to(self.device)
        try:
            yield
        finally:
            for network in networks:
                network.to("cpu")

    # ---- at a step

    def __call__(self, pipe: StagePipeline, step: int, records: Records) -> dict[str, float]:
        """Generate images, compute the metrics, and append a line to the records; nothing if images are not finite.

        Returns:
            The metrics, by `validation/` and their labels.
        """
        drawing = self.drawing(pipe, step)
        if not self.draw(pipe, drawing):
            return {}
        files = drawing.files(self.config.resolution)
        made = self.features(files, drawing.folder / "features")
        with self.networks_in_place():
            for features in made.values():
                features.make(self.state)
        figures = self.measure_upscaling(files)
        row = on_main_process(self.state, lambda: self.finish(step, made, figures))
        if self.state.is_main_process:
            records.append(step, row.as_json())
            logger.info(
                f"Step {step}: " + ", ".join(f"{label} {value.text()}" for label, value in row.figures.items())
            )
        return {f"{VALIDATION}/{label}": figure.value for label, figure in row.figures.items()}

    def drawing(self, pipe: StagePipeline, step: int) -> Drawing:
        """Return the settings of a step's images, in their own folder."""
        config = self.config
        drawing = Drawing(
            captions=self.held_out,
            indices=self.indices,
            folder=self.folder / f"step-{step:06d}",
            setting=self.setting,
            seed=config.seed,
            model=on_main_process(self.state, lambda: digest_networks(pipe)),
            resolution=config.resolution,
            batch_size=config.validation_batch_size,
            enlarged=config.low_resolution,
        )

        def make_room() -> None:
            """
            Remove images of other weights; images that an interrupted run generated with the same weights are kept.
            """
            if find_other(drawing) is not None:
                remove(drawing.folder)

        on_main_process(self.state, make_room)
        return drawing

    def draw(self, pipe: StagePipeline, drawing: Drawing) -> bool:
        """Generate missing images; return whether all of them are finite."""
        failure, was_training = "", pipe.unet.training
        pipe.unet.eval()
        pipe.set_progress_bar_config(disable=True)
        try:
            if not self.draws_alone:
                draw(StageCall(pipe, self.text), drawing, self.state)
            elif self.state.is_main_process:
                draw(StageCall(pipe, self.text), drawing, OneProcess())
        except FloatingPointError as error:
            failure = str(error)
            if not self.draws_alone:
                self.state.wait_for_everyone()  # matches the end of `draw` in the other processes
        finally:
            pipe.unet.train(was_training)
        failures = [text for text in gather_object([failure]) if text]
        if failures and self.state.is_main_process:
            logger.warning(f"No `validation_metrics` of {drawing.folder.name}: {failures[0]}")
        return not failures

    def features(self, files: PictureFiles, cache: Path) -> dict[str, Features]:
        """Return the features of generated images."""
        networks = {"features": self.network, "clip": self.clip}
        return {
            name: Features(cache, network, files, self.indices, self.config.resolution)
            for name, network in networks.items()
            if network is not None
        }

    def measure_upscaling(self, files: PictureFiles) -> dict[str, Figure]:
        """Compare upscaled images, and bicubic interpolation, with the original images."""
        low = self.config.low_resolution
        if low is None or "super-resolution" not in self.wanted:
            return {}
        found = upscaling_figures(files, self.held_out, self.indices, low, self.config.resolution, self.state)
        own, bicubic = (found[method] for method in METHODS)
        return own | {f"bicubic, {label}": figure for label, figure in bicubic.items()}

    def finish(self, step: int, made: dict[str, Features], figures: dict[str, Figure]) -> Row:
        """Compute the metrics in the main process; remove images of earlier steps."""
        row = Row(f"step {step}", self.config.resolution, len(self.indices), {}, self.setting, self.calls)
        drawn = made["features"].load() if "features" in made else {}
        real = {name: features.load() for name, features in self.real.items()}
        if self.distances is not None:
            row.figures |= self.distances.measure(drawn, real.get("held out", {}))
        if "clip" in made:
            row.figures |= clip_score(made["clip"].load())
        if "training" in real:
            row.figures |= find_nearest(drawn["features"], real["training"]["features"]).figures()
        row.figures |= figures
        for folder in self.folder.iterdir():
            number = STEP.fullmatch(folder.name)
            if number is not None and int(number[1]) < step:
                remove(folder)
        return row


def plan_setting(config: TrainingConfig, pipe: StagePipeline, guides: bool) -> tuple[Setting, int]:
    """Return the settings of generated images, and the number of network calls per image.

    Raises:
        ValueError: If the stage's scheduler does not support this number of steps.
    """
    (stage,) = pipe.stages
    steps = config.validation_num_inference_steps or stage.defaults.num_inference_steps
    guidance = config.validation_guidance_scale
    if guidance is None:
        guidance = stage.defaults.guidance_scale if guides else 1.0
    setting = Setting("model", (steps,), (float(guidance),))
    try:
        return setting, network_calls([stage], setting)
    except ValueError as error:
        raise ValueError(
            f"`validation_num_inference_steps` is {steps}, which the stage's scheduler does not support: {error}"
        ) from error
