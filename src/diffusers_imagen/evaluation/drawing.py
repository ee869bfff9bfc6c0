"""Images for captions, drawn by several processes, each caption with a seed of its own; a run that was ended goes on."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm import tqdm

from ..pipelines.stages import Stage
from ..utils.files import read_json_object, whole_file, write_json
from ..utils.processes import on_main_process
from .picture_sets import PictureFiles, PictureSet, reduced


RECORD = "settings.json"  # beside the images: what they were drawn with
SAMPLED_VALUES = 256  # of a tensor: as many tell weights from others


class Setting(NamedTuple):
    """How images are drawn: a value a stage that runs."""

    scheduler: str
    steps: tuple[int, ...]
    guidance: tuple[float, ...]

    @property
    def name(self) -> str:
        """Its name in reports and of its folder."""
        guidance, steps = ("-".join(f"{value:g}" for value in values) for values in (self.guidance, self.steps))
        return f"{self.scheduler}_steps-{steps}_guidance-{guidance}"


def network_calls(stages: list[Stage], setting: Setting) -> int:
    """Evaluations of the denoisers for an image; one with guidance takes two passes of the network and counts once."""
    calls = 0
    for stage, steps in zip(stages, setting.steps):
        scheduler = type(stage.scheduler).from_config(stage.scheduler.config)
        scheduler.set_timesteps(steps)
        calls += len(scheduler.timesteps)
    return calls


def digest_networks(pipe: DiffusionPipeline) -> str:
    """Return a digest of the networks of a pipeline: names, shapes and some values of all their weights, and configurations."""
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
    """Return the seed of a caption's noise: of the caption's number alone, whatever else is drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "big") >> 1


class Drawing(NamedTuple):
    """What is drawn of a setting.

    Attributes:
        captions ([`PictureSet`]): What to draw.
        indices (`list[int]`): Of which captions.
        folder (`Path`): Of the setting; each stage has a folder in it.
        setting ([`Setting`]): How.
        seed (`int`): Of all noise.
        model (`str`): The digest of the networks.
        resolution (`int`): Of the last stage that runs.
        batch_size (`int`): Images at once.
        upsampled (`int`, *optional*): Resolution to which images of the set are reduced, and upsampled from by the
            stages after the first, of which the setting has the values; without it the first stage draws.
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
        """Return what tells the images from others."""
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
    """Return a digest of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def draw(pipe: DiffusionPipeline, drawing: Drawing, state: PartialState) -> None:
    """Draw what is not there yet; all processes call this, and each draws its share.

    Batches are of captions that follow each other, whichever process draws them and whatever is there already: an image
    does not depend on the number of processes, nor on interruptions.

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


def prepare(drawing: Drawing) -> list[tuple[list[int], bool]]:
    """Return the batches, and whether their images are all there; the folder is made, and rid of what a killed run left."""
    record, path = drawing.record(), drawing.folder / RECORD
    if path.exists():
        found = read_json_object(path)
        different = [name for name in record if found.get(name) != record[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"`output-dir` has pictures in '{drawing.folder}' whose {name} is {found.get(name)!r}, not "
                f"{record[name]!r}: name another folder, or delete that one."
            )
    elif drawing.folder.exists() and any(drawing.folder.iterdir()):
        raise ValueError(f"`output-dir` has '{drawing.folder}', of which nothing says what is in it: delete it.")
    drawing.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    for leftover in drawing.folder.rglob(".*.partial"):
        leftover.unlink()
    size, there = drawing.batch_size, drawing.files(drawing.resolution)
    batches = [drawing.indices[start : start + size] for start in range(0, len(drawing.indices), size)]
    return [(batch, all(there.path(index).is_file() for index in batch)) for batch in batches]


def draw_batch(pipe: DiffusionPipeline, drawing: Drawing, batch: list[int]) -> None:
    """Draw and writes the images of some captions; those of the last stage, which say that all are there, come last."""
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
