"""A trained network as a stage folder, which opens as a pipeline: `unet/`, `scheduler/`, a card, and what it was
trained with."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Optional

from diffusers import SchedulerMixin
from huggingface_hub import create_repo, upload_folder

from ..models.unet_base import ConditionalUNet
from ..pipelines.folders import write_model_index
from .config import TrainingConfig
from .sampling import SAMPLES


PARTIAL, REPLACED = ".stage.partial", ".stage.replaced"
NOT_UPLOADED = ["checkpoint-*", "logs/*", "ema-snapshots/*", "*.partial*", ".stage.*", "metrics.jsonl"]
SECRET = ("hub_token",)
OF_THIS_MACHINE = (
    *("train_data_dir", "instance_data_dir", "class_data_dir", "cache_dir", "embedding_cache"),
    *("output_dir", "resume_from_checkpoint"),
)

CARD = """---
library_name: diffusers
tags:
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
"""


USAGE = """import diffusers_imagen
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")"""


@contextmanager
def parts_of(config: TrainingConfig) -> Iterator[Path]:
    """A folder beside the parts of `config.output_dir`; what is in it at the end is moved into place, part by part."""
    folder = Path(config.output_dir)
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    move_into_place(partial, folder)


def save_stage(
    unet: ConditionalUNet, scheduler: SchedulerMixin, config: TrainingConfig, step: int, results: dict[str, float]
) -> None:
    """Writes the stage to `config.output_dir`: all of it beside its place first, then part by part into it."""
    with parts_of(config) as partial:
        unet.save_pretrained(partial / "unet")
        scheduler.save_pretrained(partial / "scheduler")
        write_model_index(partial, scale_factor=None if config.low_resolution is None else config.factor)
        write_record(partial, config, step, results)
        (partial / "README.md").write_text(model_card(unet, config, step, results))


def write_record(folder: Path, config: TrainingConfig, step: int, results: dict[str, float]) -> None:
    """Writes what was trained how, as JSON."""
    settings = {name: value for name, value in asdict(config).items() if name not in SECRET}
    write_json(folder / "training.json", {"step": step, **results, "config": settings})


def move_into_place(source: Path, folder: Path) -> None:
    """Replaces parts of a folder by those in `source`, which goes. A part that is replaced is there until the new one
    is, but for the moment between two renames, after which the next call puts it back."""
    replaced = folder / REPLACED
    replaced.mkdir(exist_ok=True)
    for old in replaced.iterdir():
        if not (folder / old.name).exists():
            os.replace(old, folder / old.name)
    shutil.rmtree(replaced)
    replaced.mkdir()
    for part in sorted(source.iterdir()):
        if (folder / part.name).exists():
            os.replace(folder / part.name, replaced / part.name)
        os.replace(part, folder / part.name)
    shutil.rmtree(replaced)
    source.rmdir()


def model_card(
    unet: ConditionalUNet,
    config: TrainingConfig,
    step: int,
    results: dict[str, float],
    usage: str = USAGE,
    adapter_of: Optional[str] = None,
) -> str:
    """Data, configuration, steps, losses and sample images of a stage.

    Args:
        unet (`ConditionalUNet`), config (`TrainingConfig`): What was trained, and how.
        step (`int`), results (`dict[str, float]`): How long, and with which losses.
        usage (`str`): Python that uses it, with `{name}` for its folder.
        adapter_of (`str`, *optional*): The stage that was left as it is, if only an adapter was trained.
    """
    is_base = config.low_resolution is None
    images = step * results.get("images_per_step", config.train_batch_size * config.gradient_accumulation_steps)
    losses = {name: value for name, value in results.items() if "loss" in name}
    samples = sorted((Path(config.output_dir) / SAMPLES).glob("*.png"))
    defaults = {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(config)}
    settings = {name: value for name, value in asdict(config).items() if name not in SECRET + OF_THIS_MACHINE}
    shown = {name: value for name, value in settings.items() if value != defaults[name]}
    name = config.hub_model_id or Path(config.output_dir).name
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
        samples=f"\n![{'; '.join(config.validation_prompts or [])}]({SAMPLES}/{samples[-1].name})\n"
        if samples
        else "",
        settings="\n".join(f"{name}: {json.dumps(value)}" for name, value in shown.items()),
    )


def describe_data(config: TrainingConfig) -> str:
    """Where the images came from, in a sentence."""
    name = config.dataset_name or Path(config.train_data_dir or "").name
    columns = ", ".join(f"`{column}`" for column in config.caption_column)
    captions = f"captions from {columns}" if config.caption is None else f'all captioned "{config.caption}"'
    return f"`{name}`, split `{config.train_split}`, {captions}."


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def make_repository(config: TrainingConfig) -> Optional[str]:
    """The repository to upload to, made if there is none yet; None without `push_to_hub`."""
    if not config.push_to_hub:
        return None
    name = config.hub_model_id or Path(config.output_dir).name
    return create_repo(name, exist_ok=True, token=config.hub_token).repo_id


def upload_stage(repository: str, config: TrainingConfig, step: int) -> None:
    """Uploads the stage, without checkpoints and logs."""
    upload_folder(
        repo_id=repository,
        folder_path=config.output_dir,
        commit_message=f"Stage after {step} steps",
        ignore_patterns=NOT_UPLOADED,
        token=config.hub_token,
    )
