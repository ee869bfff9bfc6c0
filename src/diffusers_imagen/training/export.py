"""A trained network as a stage folder that opens as a pipeline, with a card and what it was trained with."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import create_repo, upload_folder

from ..models.interface import StageNetwork
from ..pipelines.origin import card_metadata, license_section
from ..utils.errors import NETWORK, one_line
from ..utils.files import read_json_object, remove, sha256, whole_folder, write_json
from .config import TrainingConfig
from .monitor import VALIDATION
from .sampling import SAMPLES, StagePipeline, sample_name, sample_step


UPCOMING, REPLACED = ".stage.new", ".stage.replaced"
RECORD, CARD_FILE = "training.json", "README.md"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
STAGE_PARTS = ("unet", "scheduler", "model_index.json", ADAPTER_FILE, CARD_FILE, RECORD)
# of what a run writes, and of what else is in its folder, this is for others
UPLOADED = (
    *("unet/config.json", "unet/*.safetensors", "unet/*.safetensors.index.json", "scheduler/scheduler_config.json"),
    *("model_index.json", ADAPTER_FILE, CARD_FILE, RECORD),
)
SECRET = ("hub_token",)
OF_THIS_START = ("resume_from_checkpoint", "overwrite_output_dir")  # not of the run

CARD = """---
library_name: diffusers
{metadata}tags:
- {task}
- diffusers
- diffusers-training
- diffusers-imagen{tags}
---

# {name}

{kind} of an Imagen cascade ([arXiv 2205.11487](https://arxiv.org/abs/2205.11487)), trained with diffusers-imagen.

```python
{usage}
```

## Data
{data}

## Training
{unet_class} with {parameters:,} {parameters_kind}, trained as {objective}: {steps:,} steps, {images:,} images seen.

{losses}
{samples}
## Configuration
What is not the default:

```yaml
{settings}
```
{license}"""


USAGE = """import diffusers_imagen
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")"""


@contextmanager
def parts_of(config: TrainingConfig) -> Iterator[Path]:
    """A folder beside the parts of `config.output_dir`; what is in it at the end is moved into place, part by part.

    A process that is killed while it moves them leaves the rest in a folder of its own, and `finish_move` goes on.
    """
    folder = Path(config.output_dir)
    with whole_folder(folder / UPCOMING) as partial:
        yield partial
    finish_move(folder)


def finish_move(folder: Path) -> None:
    """Moves what is in a folder's `.stage.new`, which is whole, into place; nothing where there is none.

    training.json goes first and comes last, so that it is never beside parts of another step. A part that is replaced
    is there until the new one is, but for the moment between two renames.
    """
    upcoming, replaced = folder / UPCOMING, folder / REPLACED
    if upcoming.is_dir():
        replaced.mkdir(exist_ok=True)
        if (upcoming / RECORD).exists() and (folder / RECORD).exists():
            os.replace(folder / RECORD, replaced / RECORD)
        for part in sorted(upcoming.iterdir(), key=lambda part: (part.name == RECORD, part.name)):
            if (folder / part.name).exists():
                remove(replaced / part.name)
                os.replace(folder / part.name, replaced / part.name)
            os.replace(part, folder / part.name)
        upcoming.rmdir()
    remove(replaced)


def digest_stage(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a stage or an adapter, by name, but for the card, which a user may complete."""
    parts = [folder / name for name in STAGE_PARTS if name != CARD_FILE]
    files = [path for part in parts for path in (part, *sorted(part.rglob("*"))) if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def save_stage(pipe: StagePipeline, config: TrainingConfig, step: int, results: dict[str, float]) -> None:
    """Writes the stage to `config.output_dir`: all of it beside its place first, then part by part into it."""
    unet = pipe.unet
    with parts_of(config) as partial:
        unet.save_pretrained(partial / "unet")
        hide_place(partial / "unet" / "config.json")
        pipe.scheduler.save_pretrained(partial / "scheduler")
        pipe.save_config(partial)
        write_record(partial, config, step, results)
        (partial / CARD_FILE).write_text(model_card(unet, config, step, results, pipe.origins), encoding="utf-8")


def hide_place(path: Path) -> None:
    """Takes the folder that a network was loaded from out of its configuration."""
    settings = read_json_object(path)
    if "_name_or_path" in settings:
        write_json(path, {**settings, "_name_or_path": public_name(settings["_name_or_path"])})


def write_record(folder: Path, config: TrainingConfig, step: int, results: dict[str, float]) -> None:
    """Writes what was trained how, as JSON."""
    settings = {name: value for name, value in public_settings(config).items() if name not in OF_THIS_START}
    write_json(folder / RECORD, {"step": step, **results, "config": settings})


def public_settings(config: TrainingConfig) -> dict[str, Any]:
    """The settings without secrets, and without places on this machine: of those their last name."""
    settings = {name: value for name, value in asdict(config).items() if name not in SECRET}
    for name, place in places(config).items():
        reduce = last_name if place == "local" else public_name
        value = settings[name]
        settings[name] = [reduce(part) for part in value] if isinstance(value, list) else reduce(value)
    return settings


def places(config: TrainingConfig) -> dict[str, str]:
    """The settings that can be places on this machine, with what `arg` says of each."""
    return {f.name: f.metadata["place"] for f in fields(config) if "place" in f.metadata}


def last_name(path: Any) -> Any:
    """The last name of a path."""
    return os.path.basename(os.path.abspath(path)) if isinstance(path, str) else path


def public_name(name: Any) -> Any:
    """A Hub id as it is, and of a place on this machine its last name."""
    if not isinstance(name, str):
        return name
    is_local = name.startswith((".", "~", "/")) or "\\" in name or os.path.isabs(name) or os.path.exists(name)
    return last_name(name) if is_local or name.count("/") > 1 else name


def model_card(
    unet: StageNetwork,
    config: TrainingConfig,
    step: int,
    results: dict[str, float],
    origins: list[dict[str, str]],
    usage: str = USAGE,
    adapter_of: str | None = None,
) -> str:
    """Data, configuration, steps, losses and sample images of a stage, and the license of what it was made from.

    Args:
        unet (`StageNetwork`), config (`TrainingConfig`): What was trained, and how.
        step (`int`), results (`dict[str, float]`): How long, and with which losses.
        origins (`list`): Where the weights that training began with are from, see `pipelines/origin.py`.
        usage (`str`): Python that uses it, with `{name}` for its folder.
        adapter_of (`str`, *optional*): The stage that was left as it is, if only an adapter was trained.
    """
    is_base = config.low_resolution is None
    images = step * results.get("images_per_step", config.train_batch_size * config.gradient_accumulation_steps)
    losses = {name: value for name, value in results.items() if "loss" in name or name.startswith(f"{VALIDATION}/")}
    sample = shown_sample(config, step)
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config)}
    hidden = {*OF_THIS_START, *(name for name, place in places(config).items() if place == "local")}
    settings = {name: value for name, value in public_settings(config).items() if name not in hidden}
    shown = {name: value for name, value in settings.items() if value != defaults[name]}
    name = config.hub_model_id or last_name(config.output_dir)
    stage = (
        f"base stage, {config.resolution} px,"
        if is_base
        else f"super-resolution stage, {config.low_resolution} to {config.resolution} px,"
    )
    return CARD.format(
        task="text-to-image" if is_base else "image-to-image",
        tags="".join(f"\n- {tag}" for tag in config.tags()),
        name=name,
        kind=stage.capitalize() if adapter_of is None else f"LoRA adapter of `{adapter_of}`, {stage}",
        usage=usage.format(name=name),
        data=describe_data(config),
        unet_class=type(unet).__name__,
        parameters=unet.num_parameters(only_trainable=adapter_of is not None),
        parameters_kind="parameters" if adapter_of is None else "parameters in its adapter",
        objective="an EDM denoiser" if config.preconditioning == "edm" else f"a {config.prediction_type} predictor",
        steps=step,
        images=images,
        losses="\n".join(
            ["| loss | |", "|---|---|", *(f"| {name} | {value:.4f} |" for name, value in losses.items())]
        ),
        samples="" if sample is None else f"\n![{'; '.join(config.validation_prompts or [])}]({sample})\n",
        settings="\n".join(f"{name}: {json.dumps(value)}" for name, value in shown.items()),
        metadata=yaml.safe_dump(metadata, sort_keys=False) if (metadata := card_metadata(origins)) else "",
        license="\n" + license_section(origins) if origins else "",
    )


def shown_sample(config: TrainingConfig, step: int) -> str | None:
    """The pictures that the card of a step shows, the newest of them; None if there are none."""
    folder = Path(config.output_dir) / SAMPLES
    steps = [sample_step(path.name) for path in folder.glob("*.png")] if folder.is_dir() else []
    newest = max((number for number in steps if number is not None and number <= step), default=None)
    return None if newest is None else f"{SAMPLES}/{sample_name(newest)}"


def describe_data(config: TrainingConfig) -> str:
    """Where the images came from, in a sentence."""
    name = public_name(config.dataset_name) or last_name(config.train_data_dir)
    columns = ", ".join(f"`{column}`" for column in config.caption_column)
    captions = f"captions from {columns}" if config.caption is None else f'all captioned "{config.caption}"'
    return f"`{name}`, split `{config.train_split}`, {captions}."


def make_repository(config: TrainingConfig) -> str | None:
    """The repository to upload to, made if there is none yet; None without `push_to_hub`."""
    if not config.push_to_hub:
        return None
    name = config.hub_model_id or last_name(config.output_dir)
    with hub_errors(f"`push_to_hub` is True, but '{name}' cannot be made on the Hub (`hub_model_id`, `hub_token`)"):
        return create_repo(name, exist_ok=True, token=config.hub_token).repo_id


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Inside, errors of the network and of the Hub are ValueErrors that begin with what failed."""
    try:
        yield
    except (*NETWORK, ValueError) as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


def upload_stage(repository: str, config: TrainingConfig, step: int) -> None:
    """Uploads the stage and the pictures that its card shows: nothing else that is in the folder."""
    sample = shown_sample(config, step)
    with hub_errors(f"The run is whole in '{config.output_dir}', but was not uploaded to '{repository}'"):
        upload_folder(
            repo_id=repository,
            folder_path=config.output_dir,
            commit_message=f"Stage after {step} steps",
            allow_patterns=[*UPLOADED, *([] if sample is None else [sample])],
            ignore_patterns=["checkpoint-*", f"{config.logging_dir.rstrip('/')}/*"],
            token=config.hub_token,
        )
