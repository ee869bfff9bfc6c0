"""Loading of DeepFloyd IF's stages from diffusers' pipelines: from a folder, from the Hub, or already loaded.

The components are IF's own: the network is converted by renaming (`conversion/deepfloyd.py`) and shares its memory;
scheduler, text encoder, safety checker and watermarker are unchanged. `read_deepfloyd` checks the small files of a
repository before weights are downloaded.
"""

import copy
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from ...conversion.deepfloyd import BETA_SCHEDULE, config_from_deepfloyd, unet_from_deepfloyd
from ...diffusion.augmentation import augmentation_sigma
from ...diffusion.discrete_ddpm import DECLARED_LEVELS
from ...utils.arguments import as_number, bad_argument, shown
from ...utils.files import HUB_OPTIONS
from ...utils.modules import quiet_transformers, unwrapped
from ..origin import DEEPFLOYD
from ..schedules import has_levels
from ..stage_table import SAFETY_PARTS, TEXT_PARTS
from .folder_checks import CONFIGS, INDEX, KINDS, check_component, check_tensors, find_class, read_config
from .folders import DOWNLOAD_OPTIONS, SOURCE, download_index, is_hub_id, loading, refusal_of_hub


# diffusers' pipelines of IF, whose variants have the same components, and whether they upscale images
PIPELINES = {
    "IFPipeline": False,
    "IFImg2ImgPipeline": False,
    "IFInpaintingPipeline": False,
    "IFSuperResolutionPipeline": True,
    "IFImg2ImgSuperResolutionPipeline": True,
    "IFInpaintingSuperResolutionPipeline": True,
}
COMPONENTS = {
    "unet": UNet2DConditionModel,
    "scheduler": SchedulerMixin,
    "image_noising_scheduler": SchedulerMixin,
    **{name: KINDS[name] for name in (*TEXT_PARTS, *SAFETY_PARTS)},
}
MAX_TOKENS = 77  # as in the training of the networks; the tokenizer's own limit is 512
BASE_RESOLUTION = 64  # of the images that stage II was trained to upscale
MAX_BOUND = 100.0  # of thresholded images; IF has 1.5 and 1
NOISE_INDEX = 250  # noise level of the low-resolution image in IFSuperResolutionPipeline


def is_deepfloyd(class_name: Any) -> bool:
    """Return whether a `model_index.json` with this `_class_name` belongs to a pipeline of IF."""
    return isinstance(class_name, str) and class_name in PIPELINES


def call_defaults(upscales: bool) -> dict[str, float]:
    """Return the defaults of a call of IFPipeline or IFSuperResolutionPipeline."""
    if not upscales:
        return {"num_inference_steps": 100, "guidance_scale": 7.0}
    noise = augmentation_sigma(torch.tensor(NOISE_INDEX)).item()
    return {"num_inference_steps": 50, "guidance_scale": 4.0, "low_res_noise_level": noise}


def find_pipeline(source: str | os.PathLike, options: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return the folder or repository if it is a pipeline of IF, else None, and the options for `from_pretrained`.

    A repository's `model_index.json` is the first file that diffusers would download too; the options then contain its
    commit, so that later requests are consistent and cached.

    Raises:
        ValueError: For a repository without access, and a folder with a damaged `model_index.json`.
    """
    if os.path.isdir(source):
        path = os.path.join(source, INDEX)
        with loading(SOURCE, source):
            is_theirs = os.path.isfile(path) and is_deepfloyd(read_config(path).get("_class_name"))
        return (str(source) if is_theirs else None), options
    if not is_hub_id(source):
        return None, options
    try:
        index = download_index(str(source), {name: options[name] for name in HUB_OPTIONS if name in options})
        class_name = read_config(index).get("_class_name")
    except Exception as error:
        reason = refusal_of_hub(error, str(source))
        if reason is not None:
            raise ValueError(f"`{SOURCE}` is '{source}', which cannot be loaded: {reason}") from error
        return None, options  # diffusers raises its own error
    if is_deepfloyd(class_name):
        return str(source), options
    return None, {**options, "revision": Path(index).parent.name}


# ---- configurations


def read_deepfloyd(folder: Path, index: dict[str, Any], left_out: Collection[str]) -> dict[str, Any]:
    """Return the configuration of the `ImagenUNetModel` for a repository's network, after checking all small files.

    Args:
        folder: Folder with at least the repository's JSON files.
        index: Its `model_index.json`, of a pipeline of IF.
        left_out: Components that will not be loaded.

    Raises:
        ValueError: For anything that is not like IF's published models, and for a tokenizer whose packages are
            missing.
    """
    classes = {}
    for name, entry in index.items():
        if name.startswith("_") or name == "requires_safety_checker" or name in left_out or entry == [None, None]:
            continue
        if name not in COMPONENTS:
            raise ValueError(f"its {INDEX} has {shown(name)}, which is not a component of {index['_class_name']}.")
        classes[name] = find_class(name, entry, COMPONENTS[name])
    for name in ("unet", "scheduler"):
        if name not in classes:
            raise ValueError(f"its {INDEX} has no `{name}`, which every {index['_class_name']} needs.")
    for name, component_class in classes.items():
        check_component(folder, name, component_class)
    config = config_from_deepfloyd(read_config(folder / "unet" / CONFIGS["unet"]))
    upscales = PIPELINES[index["_class_name"]]
    if config["low_res_conditioning"] != upscales:
        raise ValueError(
            f"its {INDEX} is of {index['_class_name']}, but its network is one "
            + ("for a base stage." if upscales else "for super-resolution.")
        )
    for name, component_class in classes.items():
        if issubclass(component_class, SchedulerMixin):
            check_scheduler(name, component_class, read_config(folder / name / CONFIGS["scheduler"]))
    if "tokenizer" in classes:
        check_tokenizer_packages(folder / "tokenizer")
    return config


def check_scheduler(name: str, scheduler_class: Any, config: Mapping[str, Any]) -> None:
    """Raise ValueError for the configuration of a scheduler that does not fit IF's networks."""
    count = config.get("num_train_timesteps", DECLARED_LEVELS)
    if count != DECLARED_LEVELS:  # checked before as many betas are computed
        raise bad_argument(f"num_train_timesteps of {name}", count, f"{DECLARED_LEVELS}, as in training")
    config = scheduler_class.from_config(dict(config)).config
    if not has_levels(config, BETA_SCHEDULE):
        raise bad_argument(
            f"beta_schedule of {name}",
            config.get("beta_schedule"),
            f"{BETA_SCHEDULE!r}, without other entries that change the betas that DeepFloyd IF was trained with",
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise bad_argument(f"prediction_type of {name}", prediction, "'epsilon', because DeepFloyd IF predicts noise")
    if config.get("thresholding"):  # diffusers accepts any number, which can result in white or black images
        as_number(f"sample_max_value of {name}", config.get("sample_max_value"), 1.0, MAX_BOUND)
        as_number(f"dynamic_thresholding_ratio of {name}", config.get("dynamic_thresholding_ratio"), 0.0, 1.0)


def check_tokenizer_packages(folder: Path) -> None:
    """Raise ValueError for a tokenizer with only a sentencepiece model, if the packages for it are missing."""
    if (folder / "tokenizer.json").is_file() or (is_sentencepiece_available() and is_protobuf_available()):
        return
    raise ValueError(
        "its T5 tokenizer needs sentencepiece and protobuf, which are not installed: "
        "`pip install 'diffusers-imagen[t5]'`."
    )


# ---- loading


def load_deepfloyd(
    source: str, class_name: str, left_out: Collection[str], hub: dict[str, Any], networks: dict[str, Any]
) -> dict[str, Any]:
    """Load the components of a stage from a folder or repository that `read_deepfloyd` accepted.

    Args:
        source: Folder or Hub id.
        class_name: The class of its pipeline.
        left_out: Components that are neither downloaded nor loaded.
        hub, networks: Options of `from_pretrained`, as returned by `split_options`.
    """
    if networks.get("device_map") is not None:
        raise bad_argument(
            "device_map", networks["device_map"], "None for DeepFloyd IF: load it, then move it by `to`"
        )
    absent: dict[str, Any] = dict.fromkeys(left_out)
    base_model: Any = source
    if not os.path.isdir(source):
        chosen = {name: networks[name] for name in DOWNLOAD_OPTIONS if name in networks}
        source = str(DiffusionPipeline.download(source, **hub, **chosen, **absent))
    else:
        base_model = read_config(Path(source, INDEX)).get("_name_or_path")
    check_weights(Path(source), left_out, networks.get("variant"))
    with quiet_transformers():
        pipe = getattr(diffusers, class_name).from_pretrained(
            source, **networks, **absent, requires_safety_checker=False
        )
    return parts_of_deepfloyd(pipe, base_model)


def check_weights(folder: Path, left_out: Collection[str], variant: str | None) -> None:
    """Raise ValueError for networks whose files do not match their configurations; reads only headers.

    diffusers would ignore unexpected weights, and use a watermark of zeros if the watermark is missing.
    """
    for name in ("unet", "watermarker"):
        path = folder / name
        if name in left_out or not path.is_dir():
            continue
        if not any(file.suffix in (".safetensors", ".bin") for file in path.iterdir()):
            raise ValueError(f"'{path}' has no weights.")
        with torch.device("meta"):
            network = COMPONENTS[name].from_config(read_config(path / CONFIGS[name]))
        check_tensors(path, network, variant)


def parts_of_deepfloyd(pipe: DiffusionPipeline, base_model: Any = None) -> dict[str, Any]:
    """Return the components of a stage from a loaded pipeline of IF, which is not changed.

    Args:
        pipe: The pipeline, whose network's weights are shared.
        base_model: The Hub id of the pipeline, if known.

    Raises:
        ValueError: If the network or the scheduler is not like those of IF.
    """
    theirs = unwrapped(pipe.unet)
    unet = unet_from_deepfloyd(theirs)
    for name in ("scheduler", "image_noising_scheduler"):
        scheduler = pipe.components.get(name)
        if scheduler is not None:
            check_scheduler(name, type(scheduler), scheduler.config)
    unet.register_to_config(_name_or_path=theirs.config.get("_name_or_path"))  # loaded networks are checked further
    tokenizer = copy.deepcopy(pipe.components.get("tokenizer"))
    if tokenizer is not None:
        tokenizer.model_max_length = MAX_TOKENS
    return {
        **{name: pipe.components.get(name) for name in ("scheduler", "text_encoder", *SAFETY_PARTS)},
        "unet": unet,
        "tokenizer": tokenizer,
        "scale_factor": scale_factor(unet.resolution) if unet.takes_low_res else None,
        "call_defaults": call_defaults(unet.takes_low_res),
        "clean_caption": True,
        "origin": {**({"base_model": base_model} if is_hub_id(base_model) else {}), "license": DEEPFLOYD},
    }


def scale_factor(resolution: int) -> int | None:
    """Return the factor by which stage II was trained to upscale images: 4, at 256 px.

    Its configuration does not contain the factor, and the network receives the image already upsampled. None for sizes
    other than IF's.
    """
    factor, rest = divmod(resolution, BASE_RESOLUTION)
    return factor if factor > 1 and not rest else None
