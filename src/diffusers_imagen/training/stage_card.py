"""Model card of a trained stage or adapter: metadata, example, data, losses, settings and samples."""

import json
import os
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image

from ..models.interface import StageNetwork
from ..pipelines.loading.folders import is_hub_id
from ..pipelines.origin import card_metadata, license_section, list_origins
from ..utils.files import whole_file
from .config import TrainingConfig
from .monitor import VALIDATION
from .pretrained_stage import PretrainedStage
from .sampling import SAMPLES, sample_name, sample_step


SECRET = ("hub_token",)
OF_THIS_START = ("resume_from_checkpoint", "overwrite_output_dir")  # not settings of the run
PICTURES = "card_images"  # folder of a stage, with the sample of each validation prompt

CARD = """---
{metadata}---

# {name}

{kind} of an Imagen cascade ([arXiv 2205.11487](https://arxiv.org/abs/2205.11487)), trained with diffusers-imagen.

```python
{usage}
```
{further}
## Data
{data}

## Training
{unet_class} with {parameters:,} {parameters_kind}, trained as {objective}: {steps:,} steps, {images:,} images seen.

{losses}
{samples}
## Configuration
Settings other than the defaults:

```yaml
{settings}
```
{license}"""

DRAW = """import torch
import diffusers_imagen  # lets diffusers find the classes
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")
image = pipe({call}generator=torch.Generator().manual_seed(0)).images[0]
image.save("image.png")"""

IN_CASCADE = """
In the cascade that it was trained from, it replaces the stage:

```python
from diffusers import AutoModel
from diffusers_imagen import ImagenCascadePipeline

cascade = ImagenCascadePipeline.from_pretrained("{cascade}", {part}=AutoModel.from_pretrained("{name}", subfolder="unet"))
```
"""
ADAPTER_USE = """
To load only the adapter, into a pipeline that is already loaded, such as a cascade:

```python
pipe = DiffusionPipeline.from_pretrained("{stage}")
pipe.load_lora_weights("{name}"{component})
```
"""


WITH_NETWORK = """import torch
import diffusers_imagen  # lets diffusers find the classes
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{stage}")
pipe.load_lora_weights("{name}"{component})
image = pipe({call}generator=torch.Generator().manual_seed(0)).images[0]
image.save("image.png")"""


class CardFacts(NamedTuple):
    """Origin and use of the weights, for a card."""

    pretrained: PretrainedStage
    usage: str  # Python example, with `{name}` for the folder
    further: str = ""  # further examples, with text
    adapter_of: str | None = None  # the unchanged stage, if only an adapter was trained


def model_card(
    unet: StageNetwork, config: TrainingConfig, step: int, results: dict[str, float], facts: CardFacts
) -> str:
    """Return the card of a trained stage or adapter.

    Args:
        unet (`StageNetwork`), config (`TrainingConfig`): The network and the configuration.
        step (`int`), results (`dict[str, float]`): Number of steps, and losses.
        facts (`CardFacts`): Origin and use of the weights.
    """
    is_base, adapter_of = config.low_resolution is None, facts.adapter_of
    images = step * results.get("images_per_step", config.train_batch_size * config.gradient_accumulation_steps)
    losses = {name: value for name, value in results.items() if "loss" in name or name.startswith(f"{VALIDATION}/")}
    sample = shown_sample(config, step)
    stage = (
        f"base stage, {config.resolution} px,"
        if is_base
        else f"super-resolution stage, {config.low_resolution} to {config.resolution} px,"
    )
    name, origins = card_name(config), list_origins(facts.pretrained.origin)
    return CARD.format(
        metadata=yaml.safe_dump(describe_metadata(config, step, facts), sort_keys=False, allow_unicode=True),
        name=name,
        kind=stage.capitalize() if adapter_of is None else f"LoRA adapter of `{adapter_of}`, {stage}",
        usage=facts.usage.format(name=name),
        further=facts.further.format(name=name),
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
        settings=changed_settings(config),
        license="\n" + license_section(origins) if origins else "",
    )


def card_name(config: TrainingConfig) -> str:
    """Return the name of the stage in the card and its example."""
    return config.hub_model_id or last_name(config.output_dir)


def describe_metadata(config: TrainingConfig, step: int, facts: CardFacts) -> dict[str, Any]:
    """Return the metadata of a card, by the Hub's names."""
    task = "text-to-image" if config.low_resolution is None else "image-to-image"
    found = card_metadata(list_origins(facts.pretrained.origin))
    models = found.pop("base_model", [])
    models = [models] if isinstance(models, str) else models
    pretrained = config.pretrained_model_name_or_path
    if is_hub_id(pretrained):
        models = [str(pretrained), *(model for model in models if model != pretrained)]
    if not found:
        found = {"license": config.license} if config.license else facts.pretrained.license or {"license": "unknown"}
    prompt = getattr(config, "instance_prompt", None)
    pictures = [
        {"text": text, "output": {"url": f"{PICTURES}/{number}.png"}}
        for number, text in enumerate(config.validation_prompts or [])
        if shown_sample(config, step) is not None
    ]
    return {
        **found,
        "library_name": "diffusers",
        "pipeline_tag": task,
        **({"base_model": models[0] if len(models) == 1 else models} if models else {}),
        **({"instance_prompt": prompt} if prompt else {}),
        "tags": [task, "diffusers", "diffusers-training", "diffusers-imagen", *config.tags()],
        **({"widget": pictures} if pictures else {}),
    }


def drawn_prompt(config: TrainingConfig) -> str:
    """Return the prompt of a card's example: a validation prompt or caption of the run."""
    prompts = config.validation_prompts or []
    prompt = prompts[0] if prompts else config.caption or "a red circle"
    return json.dumps(prompt, ensure_ascii=False).replace("{", "{{").replace("}", "}}")


def changed_settings(config: TrainingConfig) -> str:
    """Return settings other than the defaults as YAML, without secrets and paths."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config)}
    hidden = {*OF_THIS_START, *(name for name, place in places(config).items() if place == "local")}
    settings = {name: value for name, value in public_settings(config).items() if name not in hidden}
    shown = {name: value for name, value in settings.items() if value != defaults[name]}
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in shown.items())


# ---- images


def shown_sample(config: TrainingConfig, step: int) -> str | None:
    """Return the newest samples up to a step, for its card; None if there are none."""
    folder = Path(config.output_dir) / SAMPLES
    steps = [sample_step(path.name) for path in folder.glob("*.png")] if folder.is_dir() else []
    newest = max((number for number in steps if number is not None and number <= step), default=None)
    return None if newest is None else f"{SAMPLES}/{sample_name(newest)}"


def write_pictures(folder: Path, config: TrainingConfig, step: int) -> None:
    """Write the first image of each validation prompt next to a card; nothing if there are none."""
    sample, prompts = shown_sample(config, step), config.validation_prompts or []
    if sample is None or not prompts:
        return
    (folder / PICTURES).mkdir()
    with Image.open(Path(config.output_dir) / sample) as grid:
        width = grid.width // len(prompts)
        for number in range(len(prompts)):
            column = grid.crop((number * width, 0, (number + 1) * width, min(width, grid.height)))
            with whole_file(folder / PICTURES / f"{number}.png") as partial:
                column.save(partial, "PNG")


# ---- published settings


def public_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings without secrets, and with only the last part of local paths."""
    settings = {name: value for name, value in asdict(config).items() if name not in SECRET}
    for name, place in places(config).items():
        reduce = last_name if place == "local" else public_name
        value = settings[name]
        settings[name] = [reduce(part) for part in value] if isinstance(value, list) else reduce(value)
    return settings


def places(config: TrainingConfig) -> dict[str, str]:
    """Return the settings that can be local paths, with their `place` in `arg`."""
    return {f.name: f.metadata["place"] for f in fields(config) if "place" in f.metadata}


def last_name(path: Any) -> Any:
    """Return the last part of a path."""
    return os.path.basename(os.path.abspath(path)) if isinstance(path, str) else path


def public_name(name: Any) -> Any:
    """Return a Hub id unchanged, and only the last part of a local path."""
    if not isinstance(name, str):
        return name
    is_local = name.startswith((".", "~", "/")) or "\\" in name or os.path.isabs(name) or os.path.exists(name)
    return last_name(name) if is_local or name.count("/") > 1 else name


def describe_data(config: TrainingConfig) -> str:
    """Describe the data in a sentence."""
    name = public_name(config.dataset_name) or last_name(config.train_data_dir)
    columns = ", ".join(f"`{column}`" for column in config.caption_column)
    captions = f"captions from {columns}" if config.caption is None else f'all captioned "{config.caption}"'
    return f"`{name}`, split `{config.train_split}`, {captions}."
