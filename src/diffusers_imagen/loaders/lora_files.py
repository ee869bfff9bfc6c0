"""Reading of LoRA weights from a file, a folder or the Hub, without executing code."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import _get_model_file
from huggingface_hub import constants, model_info
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open

from ..utils.arguments import class_of
from ..utils.errors import describe_fault
from ..utils.files import read_json_object


StateDict = dict[str, torch.Tensor]
Metadata = dict[str, Any] | None

SOURCE = "pretrained_model_name_or_path_or_dict"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLED = (".bin", ".pt", ".pth")
NO_ADAPTER = ("scheduler", "optimizer", "checkpoint")  # substrings of file names that diffusers excludes


def read_source(
    source: str, weight_name: str | None, use_safetensors: bool | None, has_metadata: bool = False, **hub: Any
) -> tuple[StateDict, Metadata]:
    """Read the weights, and their configuration: in the file, or next to it in peft's format."""
    path = Path(source)
    if os.path.isfile(source):  # False for invalid paths too
        file, config = path, path.with_name(PEFT_CONFIG)
    elif os.path.isdir(source):
        folder = path / (hub.get("subfolder") or "")
        names = [name.name for name in sorted(folder.iterdir()) if name.is_file()] if folder.is_dir() else []
        file = folder / (weight_name or choose_name(names, use_safetensors, str(folder)))
        config = file.with_name(PEFT_CONFIG)
        if not file.is_file():
            raise ValueError(f"`weight_name` is {weight_name!r}, but '{folder}' has no such file.")
    else:
        file, config = download(source, weight_name, use_safetensors, hub)
    if file.suffix in PICKLED and use_safetensors:
        raise ValueError(f"`use_safetensors` is True, but '{file}' is not a safetensors file.")
    state_dict, metadata = read_pickle(file) if file.suffix in PICKLED else read_safetensors(file)
    if has_metadata:
        return state_dict, metadata
    if metadata is None and config.is_file():
        metadata = read_json_object(config)
    if metadata is None and file.stem == Path(PEFT_WEIGHTS).stem:
        raise ValueError(f"'{file}' has no {PEFT_CONFIG} next to it, which has the scaling of the weights.")
    return state_dict, metadata


def choose_name(names: list[str], use_safetensors: bool | None, place: str) -> str:
    """Return the name of the single file that has an adapter's weights."""
    allowed = (".safetensors",) if use_safetensors else PICKLED if use_safetensors is False else None
    for suffixes, known in (
        ((".safetensors",), (LORA_WEIGHT_NAME_SAFE, PEFT_WEIGHTS)),
        (PICKLED, (LORA_WEIGHT_NAME,)),
    ):
        found = [name for name in names if name.endswith(suffixes) and not any(part in name for part in NO_ADAPTER)]
        chosen = [name for name in known if name in found] or found
        if not chosen or allowed not in (None, suffixes):
            continue
        if len(chosen) > 1 and chosen[0] not in known:
            raise ValueError(f"'{place}' has several files of weights, {chosen[:5]}: choose one by `weight_name`.")
        return chosen[0]
    kind = "" if use_safetensors is None else f" with `use_safetensors={use_safetensors}`"
    raise ValueError(f"`{SOURCE}` is '{place}', which has no file of LoRA weights{kind}.")


def download(
    source: str, weight_name: str | None, use_safetensors: bool | None, hub: dict[str, Any]
) -> tuple[Path, Path]:
    """Download the weights and peft's configuration, if there is one, from the Hub or its cache."""
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise ValueError(
            f"`{SOURCE}` is '{source[:200]}', which is neither a file, nor a folder, nor a Hub id."
        ) from error
    if os.path.exists(source):
        raise ValueError(f"`{SOURCE}` is '{source}', which is not a regular file.")
    if weight_name is None:
        weight_name = guess_name(source, use_safetensors, hub)
    fetch = lambda name: Path(_get_model_file(source, weights_name=name, **hub))  # noqa: E731
    file = fetch(weight_name)
    config = file.with_name(PEFT_CONFIG)
    if file.name.startswith("adapter_model"):
        config = fetch(str(Path(weight_name).with_name(PEFT_CONFIG)))
    return file, config


def guess_name(source: str, use_safetensors: bool | None, hub: dict[str, Any]) -> str:
    """Return the name of the weights file in a repository, or without a connection the one that training writes."""
    if hub.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return LORA_WEIGHT_NAME if use_safetensors is False else LORA_WEIGHT_NAME_SAFE
    try:
        info = model_info(source, revision=hub.get("revision"), token=hub.get("token"))
    except (ValueError, OSError):
        raise  # the repository does not exist
    except Exception:  # without a connection, errors of several types: try the cache
        return LORA_WEIGHT_NAME if use_safetensors is False else LORA_WEIGHT_NAME_SAFE
    folder = f"{hub['subfolder']}/" if hub.get("subfolder") else ""
    names = [file.rfilename for file in info.siblings or () if file.rfilename.startswith(folder)]
    names = [name.removeprefix(folder) for name in names]
    return choose_name([name for name in names if "/" not in name], use_safetensors, source)


def read_safetensors(file: Path) -> tuple[StateDict, Metadata]:
    """Read weights and configuration of a safetensors file; raise ValueError if it is damaged."""
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            state_dict = {key: opened.get_tensor(key) for key in opened.keys()}
    except (SafetensorError, RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"'{file}' cannot be read as a safetensors file: {describe_fault(error)}") from error
    if LORA_ADAPTER_METADATA_KEY not in header:
        return state_dict, None
    try:
        metadata = json.loads(header[LORA_ADAPTER_METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{file}' has a configuration that is not JSON: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(
            f"'{file}' has a JSON {type(metadata).__name__} as its configuration, but should have an object."
        )
    return state_dict, metadata


def read_pickle(file: Path) -> tuple[StateDict, None]:
    """Read weights of a file of torch.save with torch's weights-only unpickler, which executes no code."""
    try:
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
        state_dict = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise errors of any type
        raise ValueError(f"'{file}' cannot be read as weights of torch.save: {describe_fault(error)}") from error
    if not isinstance(state_dict, dict):
        raise ValueError(f"'{file}' holds an object {class_of(state_dict)}, but should hold weights by key.")
    return state_dict, None
