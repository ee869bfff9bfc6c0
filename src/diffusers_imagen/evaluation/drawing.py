"""Generation of images from captions by several processes, with one seed per caption; interrupted runs are resumed."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm import tqdm

from ..pipelines.stages import Stage
from ..utils.files import list_names, read_json_object, whole_file, write_json
from ..utils.processes import on_main_process
from .picture_sets import PictureFiles, PictureSet, reduced


RECORD = "settings.json"  # next to the images: the settings with which they were generated
SAMPLED_VALUES = 256  # per tensor: enough to distinguish weights


class Setting(NamedTuple):
    """Sampling settings of images, with one value per stage that runs."""

    scheduler: str
    steps: tuple[int, ...]
    guidance: tuple[float, ...]

    @property
    def name(self) -> str:
        """Name in reports and of its folder."""
        guidance, steps = ("-".join(f"{value:g}" for value in values) for values in (self.guidance, self.steps))
        return f"{self.scheduler}_steps-{steps}_guidance-{guidance}"


def network_calls(stages: list[Stage], setting: Setting) -> int:
    """Count denoiser evaluations per image; an evaluation with guidance takes two network passes and counts once."""
    calls = 0
    for stage, steps in zip(stages, setting.steps):
        scheduler = type(stage.scheduler).from_config(stage.scheduler.config)
        scheduler.set_timesteps(steps)
        calls += len(scheduler.timesteps)
    return calls


def digest_networks(pipe: DiffusionPipeline) -> str:
    """Return a digest of a pipeline's networks: configurations, and names, shapes and some values of all weights."""
    sha = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        config = getattr(part, "config", None)
        if config is not None and not isinstance(part, torch.nn.Module):
            public = {key: value for key, value in dict(config).items() if not key.startswith("_")}
            sha.update(json.dumps([name, public], sort_keys=True, default=str).encode())
        if isinstance(part, torch.nn.Module):
            sha.update(digest_weights(part).encode())
    return sha.hexdigest()[:16]


def digest_weights(network: torch.nn.Module) -> str:
    """Return a digest of a network's weights."""
    sha = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        flat = value.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLED_VALUES)].cpu().contiguous().view(torch.uint8)
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        sha.update(some.numpy().tobytes())
    return sha.hexdigest()[:16]


def seed_of(seed: int, index: int) -> int:
    """Return the seed of a caption's noise, which depends only on the caption's index."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "big") >> 1


class Drawing(NamedTuple):
    """Images to generate with a setting.

    Attributes:
        captions ([`PictureSet`]): Captions, with images or without.
        indices (`list[int]`): Indices of the captions to use.
        folder (`Path`): Folder of the setting, with one folder per stage.
        setting ([`Setting`]): Sampling settings.
        seed (`int`): Seed of all noise.
        model (`str`): Digest of the networks.
        resolution (`int`): Resolution of the last stage that runs.
        batch_size (`int`): Images per batch.
        enlarged (`int`, *optional*): Resolution to which images of the set are downsampled, as input of the stages
            after the first; the setting then has values for those only. Without it, all stages run.
    """

    captions: PictureSet
    indices: list[int]
    folder: Path
    setting: Setting
    seed: int
    model: str
    resolution: int
    batch_size: int
    enlarged: int | None = None

    def record(self) -> dict[str, Any]:
        """Return the settings that identify the images."""
        record = {
            "model": self.model,
            "captions": digest_json(self.captions.identity()),
            "seed": self.seed,
            "resolution": self.resolution,
            "enlarged from": self.enlarged,
            **self.setting._asdict(),
        }
        return json.loads(json.dumps(record))

    def files(self, resolution: int) -> PictureFiles:
        """Return the images of a stage."""
        return PictureFiles(self.folder / str(resolution), self.captions, self.record(), self.setting.name)


def digest_json(value: Any) -> str:
    """Return a digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def draw(pipe: DiffusionPipeline, drawing: Drawing, state: PartialState) -> None:
    """Generate missing images; all processes call this, and each generates its share.

    Batches consist of consecutive captions, independent of the process and of existing images: an image depends
    neither on the number of processes nor on interruptions.

    Raises:
        ValueError: If the folder has images of another model or other settings.
    """
    batches = on_main_process(state, lambda: prepare(drawing))
    todo = [batch for batch, is_done in batches if not is_done]
    own = todo[state.process_index :: state.num_processes]
    done = len(batches) - len(todo)
    with tqdm(
        total=len(batches),
        initial=done,
        unit="batch",
        desc=drawing.setting.name,
        disable=not state.is_main_process,
    ) as progress:
        for batch in own:
            draw_batch(pipe, drawing, batch)
            progress.update(min(state.num_processes, progress.total - progress.n))
    state.wait_for_everyone()


def find_other(drawing: Drawing) -> str | None:
    """Describe images in the folder with other settings; None if there are none."""
    record, path = drawing.record(), drawing.folder / RECORD
    if path.exists():
        found = read_json_object(path)
        for name in record:
            if found.get(name) != record[name]:
                return (
                    f"images in '{drawing.folder}' whose {name} is {found.get(name)!r}, not {record[name]!r}: use "
                    "another folder, or delete that one."
                )
    elif drawing.folder.exists() and any(drawing.folder.iterdir()):
        return f"'{drawing.folder}', which has no record of its settings: delete it."
    return None


def prepare(drawing: Drawing) -> list[tuple[list[int], bool]]:
    """Return the batches, and whether all of their images exist; create the folder, without files of a killed run."""
    other = find_other(drawing)
    if other is not None:
        raise ValueError(f"`output-dir` has {other}")
    drawing.folder.mkdir(parents=True, exist_ok=True)
    write_json(drawing.folder / RECORD, drawing.record())
    for leftover in drawing.folder.rglob(".*.partial"):
        leftover.unlink()
    size, there = drawing.batch_size, drawing.files(drawing.resolution)
    batches = [drawing.indices[start : start + size] for start in range(0, len(drawing.indices), size)]
    exist = list_names(there.folder)
    return [(batch, all(there.path(index).name in exist for index in batch)) for batch in batches]


def draw_batch(pipe: DiffusionPipeline, drawing: Drawing, batch: list[int]) -> None:
    """Generate and write the images of a batch; the last stage's are written last, and mark the batch as complete."""
    inputs: dict[str, Any] = {}
    if drawing.enlarged is not None:
        pictures = [drawing.captions.picture(index) for index in batch]
        inputs["image"] = [reduced(picture, drawing.resolution, drawing.enlarged) for picture in pictures]
    output = pipe(
        [drawing.captions.caption(index) for index in batch],
        generator=[torch.Generator().manual_seed(seed_of(drawing.seed, index)) for index in batch],
        num_inference_steps=list(drawing.setting.steps),
        guidance_scale=list(drawing.setting.guidance),
        output_resolution=drawing.resolution,
        **inputs,
    )
    for resolution, images in sorted(output.stage_images.items()):
        files = drawing.files(resolution)
        files.folder.mkdir(exist_ok=True)
        for index, image in zip(batch, images):
            with whole_file(files.path(index)) as partial:
                image.save(partial, format="PNG")
