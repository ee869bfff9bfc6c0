"""Checks of a pipeline's folder before any of it is loaded.

Folders are untrusted. The index may only name classes of a pipeline's components, and the files must fit together;
only small files and the headers of large ones are read.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import SchedulerMixin
from diffusers.pipelines import deepfloyd_if
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker, IFWatermarker
from safetensors import SafetensorError, safe_open
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ...models.interface import StageNetwork
from ...utils.arguments import shown
from ...utils.errors import one_line
from ...utils.files import read_json_object
from ...utils.modules import first_names
from ..stage_table import AS_STAGES, BASE


INDEX = "model_index.json"
CONFIGS = {
    "unet": "config.json",
    "scheduler": "scheduler_config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "safety_checker": "config.json",
    "feature_extractor": "preprocessor_config.json",
    "watermarker": "config.json",
}
# libraries and base classes of a pipeline's components, by the end of a component's name
LIBRARIES = {
    "diffusers_imagen": diffusers,
    "diffusers": diffusers,
    "transformers": transformers,
    "deepfloyd_if": deepfloyd_if,
}
KINDS = {
    "unet": StageNetwork,
    "scheduler": SchedulerMixin,
    "text_encoder": PreTrainedModel,
    "tokenizer": PreTrainedTokenizerBase,
    "safety_checker": IFSafetyChecker,
    "feature_extractor": BaseImageProcessor,
    "watermarker": IFWatermarker,
}
SETTINGS = ("scale_factor", "call_defaults", "clean_caption", "origin")  # of a pipeline, besides its components
REQUIRED = {
    "ImagenCascadePipeline": (BASE.unet, BASE.scheduler),
    "ImagenPipeline": ("unet", "scheduler"),
    "ImagenSuperResolutionPipeline": ("unet", "scheduler"),
}
MAX_CONFIG_BYTES = 2**22  # of a JSON file other than a tokenizer's
MAX_ENCODER_LAYERS = 1000


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """Read the object in a configuration file.

    Raises:
        ValueError: If there is none; the message names the file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"'{path}' is not a regular file.")  # reading a pipe would never end
    if os.path.exists(path) and os.path.getsize(path) > MAX_CONFIG_BYTES:
        raise ValueError(f"'{path}' has {os.path.getsize(path)} bytes, but should have at most {MAX_CONFIG_BYTES}.")
    return read_json_object(path)


def check_index(index: dict[str, Any], class_names: tuple[str, ...]) -> dict[str, Any]:
    """Return the classes of a pipeline's components by name, without absent components.

    Args:
        index: The content of `model_index.json`.
        class_names: The accepted classes of the pipeline.

    Raises:
        ValueError: If it is of another pipeline, or names a class that is not a component of it.
    """
    class_name = index.get("_class_name")
    if not isinstance(class_name, str) or class_name not in class_names:
        raise ValueError(
            f"its {INDEX} is of {shown(class_name)}, but should be of {' or '.join(class_names)}: {AS_STAGES}."
        )
    classes = {}
    for name, entry in index.items():
        if name.startswith("_") or name in SETTINGS or entry == [None, None]:
            continue
        kind = next((kind for end, kind in KINDS.items() if name.endswith(end)), None)
        if kind is None:
            raise ValueError(f"its {INDEX} has {shown(name)}, which is not a component of {class_name}.")
        classes[name] = find_class(name, entry, kind)
    missing = [name for name in REQUIRED[class_name] if name not in classes]
    if missing:
        raise ValueError(f"its {INDEX} has no `{missing[0]}`, which every {class_name} needs.")
    return classes


def find_class(name: str, entry: Any, kind: type) -> Any:
    """Return the class that an entry of a `model_index.json` names, if it is of the right kind."""
    is_pair = isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    found: Any = getattr(LIBRARIES.get(entry[0], diffusers), entry[1], None) if is_pair else None
    # a class passed to `register_network` is saved with its module
    is_known = isinstance(found, type) and (entry[0] in LIBRARIES or entry[0] == found.__module__)
    if not is_known or not issubclass(found, kind):
        registered = ", or a class passed to `register_network`" if kind is StageNetwork else ""
        raise ValueError(
            f"its {INDEX} has {shown(entry)} for `{name}`, but should have a library and the name of its "
            f"{kind.__name__}{registered}."
        )
    return found


def configured_class(name: str, config: dict[str, Any]) -> Any:
    """Return the class that the configuration of a stage's `unet` or `scheduler` names, if it is of the right kind."""
    return find_class(name, ["diffusers", config.get("_class_name")], KINDS[name])


def check_component(folder: Path, name: str, component_class: type, variant: str | None = None) -> None:
    """Raise ValueError for the folder of a component that lacks files, or whose files contradict the index."""
    path = folder / name
    if not path.is_dir():
        raise ValueError(f"its {INDEX} names `{name}`, but it has no folder {name}/.")
    scripts = [library for library in LIBRARIES if (path / f"{library}.py").exists()]
    if scripts:
        raise ValueError(f"{name}/ has a {scripts[0]}.py, which would be executed; code of models is not supported.")
    config_file = path / CONFIGS[next(end for end in CONFIGS if name.endswith(end))]
    if issubclass(component_class, PreTrainedTokenizerBase):
        if not config_file.is_file() and not (path / "tokenizer.json").is_file():
            raise ValueError(f"{name}/ has neither a {config_file.name} nor a tokenizer.json.")
        if config_file.is_file():
            read_json_object(config_file)  # without a size limit: some contain thousands of added tokens
        return
    config = read_config(config_file)
    if issubclass(component_class, PreTrainedModel):
        check_encoder(path, config)
        return
    if issubclass(component_class, BaseImageProcessor):
        return
    if getattr(component_class, "names_another", False):  # by reference: the configuration is that of the network
        component_class = configured_class("unet", config)
    if config.get("_class_name") != component_class.__name__:
        raise ValueError(
            f"'{config_file}' is of {shown(config.get('_class_name'))}, but should be of {component_class.__name__}."
        )
    if issubclass(component_class, StageNetwork):
        check_tensors(path, describe_network(config), variant)


def check_tensors(folder: Path, network: torch.nn.Module, variant: str | None) -> None:
    """Raise ValueError unless a network's files contain exactly its tensors, with parameters in floating point.

    Only headers are read.

    Args:
        folder: Folder with the files.
        network: The network of the configuration, on any device.
        variant: Variant of the files.
    """
    expected = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    found = read_headers(folder, variant)
    if not found:
        return  # weights in another format, which diffusers reads or rejects
    missing = [name for name in expected if name not in found]
    others = [name for name in found if name not in expected]
    shapes = [name for name in expected if name in found and found[name][1] != expected[name]]
    parameters = dict(network.named_parameters())  # a buffer, such as a watermark, may have integers
    integers = [name for name, (dtype, _) in found.items() if name in parameters and not dtype.startswith(("F", "BF"))]
    for names, reason in (
        (missing, "lacks weights"),
        (others, "has weights that its configuration does not have"),
        (shapes, "has weights of other shapes than its configuration"),
        (integers, "has weights that are not in floating point"),
    ):
        if names:
            raise ValueError(f"'{folder}' {reason}: {first_names(names)}.")


def describe_network(config: dict[str, Any]) -> StageNetwork:
    """Build the network of a configuration without weights: on the meta device, where it takes no memory.

    Raises:
        ValueError: If the configuration is not that of a network.
    """
    unet_class = configured_class("unet", config)
    with torch.device("meta"):
        return unet_class.from_config(config)


def read_headers(folder: Path, variant: str | None = None) -> dict[str, tuple[str, list[int]]]:
    """Read dtype and shape of each tensor in the safetensors files of a folder, by name."""
    files: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        name = re.fullmatch(r"(?:diffusion_pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors", path.name)
        if name is not None:
            files.setdefault(name.group(1), []).append(path)
    found = {}
    for path in files.get(variant) or files.get(None, []):
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                found.update({name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()})
        except (OSError, SafetensorError) as error:
            raise ValueError(f"'{path}' is not a complete safetensors file: {one_line(error)}") from error
    return found


def check_encoder(folder: Path, config: dict[str, Any]) -> None:
    """
    Raise ValueError for an excessive number of layers, which transformers creates one by one, or for integer weights.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]  # CLIP has one for each tower
    for name, value in (entry for part in parts for entry in part.items()):
        if "layers" in name and isinstance(value, (int, float)) and value > MAX_ENCODER_LAYERS:
            raise ValueError(
                f"'{folder}' has `{name}` {shown(value)}, but should have at most {MAX_ENCODER_LAYERS} layers."
            )
    if "quantization_config" in config:
        return
    for name, (dtype, _) in read_headers(folder).items():
        if name.endswith((".weight", ".bias")) and not dtype.startswith(("F", "BF")):
            raise ValueError(f"'{folder}' has weights that are not in floating point: {name}.")


def check_pipeline_folder(
    folder: str | os.PathLike,
    class_names: tuple[str, ...],
    variant: str | None = None,
    left_out: Collection[str] = (),
) -> dict[str, Any]:
    """Return the classes of a pipeline's components by name, without those in `left_out`.

    Raises:
        ValueError: For a folder without a pipeline of these classes, or whose files do not fit together, as far as
            this can be determined without reading weights.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise ValueError(f"a folder without a {INDEX}, which is not a pipeline.")
    classes = check_index(read_config(folder / INDEX), class_names)
    classes = {name: component_class for name, component_class in classes.items() if name not in left_out}
    for name, component_class in classes.items():
        check_component(folder, name, component_class, variant)
    return classes
