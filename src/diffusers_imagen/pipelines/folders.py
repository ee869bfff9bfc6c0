"""Stages and pipelines in folders and on the Hub: what is there is checked, loaded and indexed.

What diffusers and transformers raise for files that they cannot load becomes one line.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import AutoModel, DiffusionPipeline, SchedulerMixin
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..models.interface import StageNetwork
from ..schedulers import EDMHeunScheduler
from ..text.completeness import refuse_random_weights
from ..utils.arguments import shown
from ..utils.errors import is_out_of_memory, one_line
from ..utils.files import HUB_OPTIONS
from ..utils.modules import quiet_transformers, unwrapped
from .folder_checks import (
    CONFIGS,
    INDEX,
    check_component,
    check_encoder,
    check_index,
    check_pipeline_folder,
    find_class,
    read_config,
)
from .stages import StageSource


DOWNLOAD_OPTIONS = ("variant", "use_safetensors")  # which of a repository's files are loaded
SINGLE_STAGES = ("ImagenPipeline", "ImagenSuperResolutionPipeline")


# ---- options and errors


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of `from_pretrained` in two: where files come from, and how a network is loaded.

    Raises:
        ValueError: For an option that stages do not have.
    """
    for name, reason in (
        ("subfolder", "a stage is a folder or a repository of its own"),
        ("trust_remote_code", "no code of a repository is run"),
        ("custom_pipeline", "no code of a repository is run"),
    ):
        if options.get(name):
            raise ValueError(f"`{name}` is {options[name]!r}, but should not be given: {reason}.")
    hub = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    return hub, {name: value for name, value in options.items() if name not in HUB_OPTIONS}


@contextmanager
def loading(name: str, source: str | os.PathLike) -> Iterator[None]:
    """Turns whatever is raised inside for a source that cannot be loaded into a ValueError that names the argument.

    Libraries raise errors of every type for files that they do not understand.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            raise
        if isinstance(error, ValueError) and str(error).startswith(f"`{name}` is "):
            raise
        reason = one_line(error)
        if not isinstance(error, (ValueError, OSError)):
            reason = f"{type(error).__name__}: {reason}"
        if len(reason) > 400:
            reason = reason[:400] + "..."
        raise ValueError(f"`{name}` is '{source}', which cannot be loaded: {reason}") from error


def check_source(name: str, source: str | os.PathLike) -> None:
    """Raises ValueError for what is neither a folder nor the id of a repository, before anything is asked of the Hub."""
    if os.path.isdir(source):
        return
    try:
        is_id = isinstance(source, str) and source.count("/") == 1
        validate_repo_id(str(source))
    except HFValidationError:
        is_id = False
    if not is_id:
        raise ValueError(
            f"`{name}` is {shown(str(source))}, which is neither a folder nor a Hub id like 'name/repository'."
        )


def load_pipeline_folder(
    pipeline_class: type[DiffusionPipeline], source: str, class_names: tuple[str, ...], **kwargs
) -> DiffusionPipeline:
    """A pipeline of a folder, or of a repository that is downloaded, which are checked first.

    Args:
        pipeline_class: Whose `from_pretrained` loads it.
        source: The folder or Hub id.
        class_names: The pipelines that it may be of.
        kwargs: For `from_pretrained`.

    Raises:
        ValueError: If it holds no such pipeline, or a component cannot be loaded; names the component.
    """
    hub, networks = split_options(kwargs)
    if not os.path.isdir(source):
        check_index(read_config(download_index(source, hub)), class_names)
        chosen = {name: networks[name] for name in DOWNLOAD_OPTIONS if name in networks}
        source = DiffusionPipeline.download(source, **hub, **chosen)
    classes = check_pipeline_folder(source, class_names, networks.get("variant"))
    try:
        with quiet_transformers():
            return pipeline_class.from_pretrained(source, **networks)
    except Exception:
        for name, component_class in classes.items():  # which one is it?
            if name not in networks:
                with loading(name, Path(source, name)), quiet_transformers():
                    component_class.from_pretrained(Path(source, name))
        raise


def download_index(source: str, hub: dict[str, Any]) -> str:
    """The path of a repository's `model_index.json`."""
    return hf_hub_download(source, INDEX, **given(hub))


def given(hub: dict[str, Any]) -> dict[str, Any]:
    """The options that huggingface_hub takes: it has no proxies but those of the environment."""
    return {name: value for name, value in hub.items() if name != "proxies" and value is not None}


# ---- loading


def load_stage(name: str, source: StageSource, **kwargs) -> dict[str, Any]:
    """The components of a stage: `unet`, `scheduler`, and of a folder or pipeline its `scale_factor` and text parts.

    Args:
        name: The argument that named it, for the message.
        source: A single-stage pipeline, the pair of its network and scheduler, or the folder or Hub id of either a
            single-stage pipeline or of `unet/` and `scheduler/` alone.
        kwargs: For diffusers' `from_pretrained`, such as `dtype`, `variant`, `token` or `revision`.

    Raises:
        ValueError: If it is none of these.
    """
    check_stage_source(name, source)
    if isinstance(source, DiffusionPipeline):
        return parts_of(source)
    if isinstance(source, (str, os.PathLike)):
        with loading(name, source):
            return load_folder(str(source), **kwargs)
    return {"unet": source[0], "scheduler": source[1]}


def parts_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The components of a single-stage pipeline, and by how much it enlarges images."""
    return {**pipe.components, "scale_factor": pipe.config.get("scale_factor")}


def check_stage_source(name: str, source: Any) -> None:
    """Raises ValueError for what is no stage, as far as can be said before anything is loaded."""
    if isinstance(source, (str, os.PathLike)):
        check_source(name, source)
        folder = Path(source)
        if folder.is_dir() and not (folder / INDEX).is_file() and not (folder / "unet" / "config.json").is_file():
            raise ValueError(f"`{name}` is '{source}', a folder with neither a {INDEX} nor a network in unet/.")
        return
    pair = source
    if isinstance(source, DiffusionPipeline):
        pair = source.components.get("unet"), source.components.get("scheduler")
    unet, scheduler = pair if isinstance(pair, (tuple, list)) and len(pair) == 2 else (None, None)
    if not isinstance(unwrapped(unet), StageNetwork) or not isinstance(scheduler, SchedulerMixin):
        raise ValueError(
            f"`{name}` is {shown(source)}, but should be a folder, a Hub id, a single-stage pipeline, or a network and "
            "its scheduler."
        )


def check_text_parts(text_encoder: Any, tokenizer: Any) -> None:
    """Raises ValueError for what is no text encoder or no tokenizer, before anything is loaded."""
    if isinstance(text_encoder, (str, os.PathLike)):
        check_source("text_encoder", text_encoder)
    elif text_encoder is not None and not isinstance(unwrapped(text_encoder), PreTrainedModel):
        raise ValueError(f"`text_encoder` is {shown(text_encoder)}, but should be a model, a folder or a Hub id.")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"`tokenizer` is {shown(tokenizer)}, but should be a tokenizer of transformers.")


def load_folder(source: str, **kwargs) -> dict[str, Any]:
    """The components in a folder or Hub repository: of its pipeline, or else of `unet/` and `scheduler/`."""
    hub, networks = split_options(kwargs)
    if has_index(source, hub):
        return parts_of(load_pipeline_folder(DiffusionPipeline, source, SINGLE_STAGES, **kwargs))
    for name in ("text_encoder", "tokenizer"):  # which only a pipeline has
        networks.pop(name, None)
    if os.path.isdir(source):
        config = read_config(Path(source, "scheduler", CONFIGS["scheduler"]))
    else:
        config = EDMHeunScheduler.load_config(source, subfolder="scheduler", **hub)  # of any scheduler
    scheduler_class = find_class("scheduler", ["diffusers", config.get("_class_name")], SchedulerMixin)
    if os.path.isdir(source):
        config = read_config(Path(source, "unet", "config.json"))
        unet_class = find_class("unet", ["diffusers", config.get("_class_name")], StageNetwork)
        check_component(Path(source), "unet", unet_class, networks.get("variant"))
    parts = {
        "unet": AutoModel.from_pretrained(source, subfolder="unet", trust_remote_code=False, **hub, **networks),
        "scheduler": scheduler_class.from_pretrained(source, subfolder="scheduler", **hub),
    }
    check_stage_source("stage", tuple(parts.values()))
    return parts


def has_index(source: str, hub: dict[str, Any]) -> bool:
    """Whether a folder or repository is of a whole pipeline."""
    if os.path.isdir(source):
        return os.path.isfile(os.path.join(source, INDEX))
    try:
        return bool(download_index(source, hub))
    except EntryNotFoundError:
        return False


def load_text_parts(source: str, **kwargs) -> dict[str, Any]:
    """The text encoder and the tokenizer in `text_encoder/` and `tokenizer/` of a folder or Hub repository.

    Raises:
        ValueError: If there are none, or the encoder lacks weights.
    """
    check_source("text_encoder", source)
    hub, networks = split_options(kwargs)
    with loading("text_encoder", source), quiet_transformers():
        if os.path.isdir(source):
            folder = Path(source, "text_encoder")
            check_encoder(folder, read_config(folder / "config.json"))
        encoder, found = AutoModelForTextEncoding.from_pretrained(
            source, subfolder="text_encoder", output_loading_info=True, trust_remote_code=False, **hub, **networks
        )
        refuse_random_weights(f"The text encoder of '{source}'", found["missing_keys"])
        # AutoTokenizer looks for more than there is, and offline takes that for an error
        if not os.path.isdir(source):
            source = snapshot_download(source, allow_patterns="tokenizer/*", **given(hub))
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer", trust_remote_code=False)
    return {"text_encoder": encoder.eval(), "tokenizer": tokenizer}
