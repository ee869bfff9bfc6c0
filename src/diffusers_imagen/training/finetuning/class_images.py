"""Class images of DreamBooth: images of the subject's class, generated before fine-tuning."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image
from tqdm.auto import tqdm

from ...text.source import TextSource
from ...utils.errors import describe_fault
from ...utils.files import whole_file
from ...utils.processes import shared_folder
from ..data.image_folders import find_pictures, list_files
from ..sampling import StagePipeline, prompt_arguments
from .finetuning_config import DreamBoothTrainingConfig


logger = logging.get_logger(__name__)

CLASS_SEED = 32  # a word after the run's seed, different from those of its data and steps
FLAGS = (
    "nsfw_detected",
    "watermark_detected",
    "nsfw_content_detected",
)  # one value per image, in the outputs of diffusers' pipelines
ATTEMPTS = 4  # to generate an image that the safety checker does not flag
Draw = Callable[[list[torch.Generator]], list[Image.Image | None]]  # None for flagged, black images


def draw_class_images(
    config: DreamBoothTrainingConfig,
    accelerator: Accelerator,
    pipe: StagePipeline,
    text: TextSource | None,
) -> None:
    """Generate the images that `config.class_data_dir` lacks, distributed over the processes.

    Each image has a number, and its own noise, which depends only on the number and the run's seed. Existing images,
    including those of an interrupted run, are kept.

    Raises:
        ValueError: If images are missing and cannot be generated, or another run is generating them.
    """
    folder = Path(str(config.class_data_dir))
    complete = not missing_images(folder, config.num_class_images)
    accelerator.wait_for_everyone()  # so that no process counts images that another has just generated
    if complete:
        return
    draw = make_draw(config, accelerator, pipe, text)
    with shared_folder(accelerator, folder, "class_data_dir"):
        wanted = missing_images(folder, config.num_class_images)  # another run may have written some in the meantime
        accelerator.wait_for_everyone()
        logger.info(f"Generating {len(wanted)} class images of {config.class_prompt!r} in {folder}")
        mine = wanted[accelerator.process_index :: accelerator.num_processes]
        with tqdm(total=len(mine), desc="Class images", disable=not accelerator.is_local_main_process) as progress:
            for start in range(0, len(mine), config.sample_batch_size):
                for path, image in draw_unflagged(draw, config.seed, mine[start : start + config.sample_batch_size]):
                    with whole_file(path) as partial:
                        image.save(partial, "PNG")
                    progress.update()
        accelerator.wait_for_everyone()


def draw_unflagged(draw: Draw, seed: int, paths: list[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """Generate the images of paths; flagged ones are generated again with other noise, and finally left out."""
    for attempt in range(ATTEMPTS):
        images = draw([make_generator(seed, path, attempt) for path in paths])
        yield from ((path, image) for path, image in zip(paths, images) if image is not None)
        paths = [path for path, image in zip(paths, images) if image is None]
        if not paths:
            return
    names = ", ".join(path.name for path in paths)
    logger.warning(f"The safety checker flagged {names} in {ATTEMPTS} attempts: these class images are left out.")


def missing_images(folder: Path, count: int) -> list[Path]:
    """Return paths for the images that a folder lacks of `count` images, of any names and formats."""
    there = {folder / path for path in find_pictures(list_files(str(folder)))} if folder.is_dir() else set()
    paths = [folder / f"class-{number:05d}.png" for number in range(count)]
    return [path for path in paths if path not in there][: max(0, count - len(there))]


def make_generator(seed: int, path: Path, attempt: int = 0) -> torch.Generator:
    """Return the generator of a class image, seeded by the number in its name and the attempt."""
    key = (CLASS_SEED, int(path.stem.split("-")[1]), *([attempt] if attempt else []))
    words = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))


def make_draw(config, accelerator, pipe, text) -> Draw:
    """Return a function that generates class images: with the configured pipeline, or with the stage to be trained."""
    if config.class_model is not None:
        return draw_by_pipeline(config, accelerator)
    if config.low_resolution is not None:
        raise ValueError(
            f"`class_data_dir` has fewer than {config.num_class_images} images, and a super-resolution stage cannot "
            "generate them from text: add images, or set `class_model` to a pipeline."
        )
    return draw_by_stage(config, accelerator, pipe, text)


def draw_by_pipeline(config, accelerator: Accelerator) -> Draw:
    """Return a function that generates images with a pipeline, which is freed with the function.

    Raises:
        ValueError: If it cannot be loaded, or, on the first call, if it does not generate images from text.
    """
    what = f"`class_model` is {config.class_model!r}"
    try:
        pipe = DiffusionPipeline.from_pretrained(config.class_model).to(accelerator.device)
    except Exception as error:  # for any content of its folder
        raise ValueError(f"{what}, which cannot be loaded: {describe_fault(error)}") from error
    pipe.set_progress_bar_config(disable=True)

    def draw(generators: list[torch.Generator]) -> list[Image.Image | None]:
        try:
            output = pipe([config.class_prompt] * len(generators), generator=generators)
            images = output.images
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what}, which cannot draw `class_prompt`: {describe_fault(error)}") from error
        if len(images) != len(generators) or not all(isinstance(image, Image.Image) for image in images):
            raise ValueError(f"{what}, which does not return images.")
        flags = [flags for name in FLAGS if (flags := getattr(output, name, None))]
        return [None if any(found[i] for found in flags) else image for i, image in enumerate(images)]

    return draw


def draw_by_stage(config, accelerator, pipe, text) -> Draw:
    """Return a function that generates images with the weights before training."""
    prompt = prompt_arguments(text, [config.class_prompt])
    pipe.unet.eval().to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)

    def draw(generators: list[torch.Generator]) -> list[Image.Image | None]:
        with accelerator.autocast():
            return pipe(**prompt, num_images_per_prompt=len(generators), generator=generators).images

    return draw
