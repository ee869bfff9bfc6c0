"""Loading of pipelines and text encoders from folders and the Hub, after checks of their small files.

Errors of diffusers and transformers for files that cannot be loaded are reduced to one line.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ...text.pretrained import load_tokenizer_of_pipeline, load_where_it_is
from ...utils.arguments import shown
from ...utils.errors import is_out_of_memory, one_line
from ...utils.files import HUB_OPTIONS, for_huggingface_hub
from ...utils.modules import quiet_transformers
from .folder_checks import (
    INDEX,
    KINDS,
    check_encoder,
    check_index,
    check_pipeline_folder,
    read_config,
)


DOWNLOAD_OPTIONS = ("variant", "use_safetensors")  # which files of a repository are loaded
SOURCE = "pretrained_model_name_or_path"  # the argument of `from_pretrained`
SINGLE_STAGES = ("ImagenPipeline", "ImagenSuperResolutionPipeline")


# ---- options and errors


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments of `from_pretrained` into options for the location of files and for loading networks.

    Raises:
        ValueError: For an option that stages do not support.
    """
    for name, reason in (
        ("subfolder", "a stage is a separate folder or repository"),
        ("trust_remote_code", "code of repositories is not executed"),
        ("custom_pipeline", "code of repositories is not executed"),
    ):
        if options.get(name):
            raise ValueError(f"`{name}` is {options[name]!r}, but should not be given: {reason}.")
    if "requires_safety_checker" in options:  # of diffusers' pipelines of DeepFloyd IF
        raise ValueError(
            f"`requires_safety_checker` is {options['requires_safety_checker']!r}, but should not be given: "
            "`safety_checker=None` alone disables the safety checker."
        )
    hub = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    return hub, {name: value for name, value in options.items() if name not in HUB_OPTIONS}


@contextmanager
def loading(name: str, source: str | os.PathLike) -> Iterator[None]:
    """Convert any error raised inside, for a source that cannot be loaded, to a ValueError that names the argument.

    Libraries raise errors of many types for files that they cannot read.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            raise
        if isinstance(error, ValueError) and str(error).startswith(f"`{name}` is "):
            raise
        reason = refusal_of_hub(error, str(source)) or one_line(error)
        if not isinstance(error, (ValueError, OSError)):
            reason = f"{type(error).__name__}: {reason}"
        if len(reason) > 400:
            reason = reason[:400] + "..."
        raise ValueError(f"`{name}` is '{source}', which cannot be loaded: {reason}") from error


def refusal_of_hub(error: BaseException, source: str) -> str | None:
    """Return instructions if the Hub denied access to a repository; None for any other error."""
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        page = f"{constants.ENDPOINT}/{source}"
        if isinstance(cause, GatedRepoError):
            return (
                f"the repository is gated ({status}): accept its license on {page}, and log in with `hf auth login` "
                "or pass `token`."
            )
        if status in (401, 403):
            return (
                f"the Hub denied access ({status}): if {page} exists, accept its license there, and log in with `hf "
                "auth login` or pass `token`."
            )
        cause = cause.__cause__ or cause.__context__
    return None


def check_source(name: str, source: str | os.PathLike) -> None:
    """Raise ValueError for a value that is neither a folder nor a repository id, before any request to the Hub."""
    if not isinstance(source, str | os.PathLike) or not (os.path.isdir(source) or is_hub_id(source)):
        given = shown(str(source) if isinstance(source, os.PathLike) else source)
        raise ValueError(f"`{name}` is {given}, which is neither a folder nor a Hub id like 'name/repository'.")


def is_hub_id(source: Any) -> bool:
    """Return whether a value has the form of a repository id and does not exist in the file system."""
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        return False
    return isinstance(source, str) and source.count("/") == 1 and not os.path.exists(source)


def load_pipeline_folder(
    pipeline_class: type[DiffusionPipeline], source: str, class_names: tuple[str, ...], **kwargs
) -> DiffusionPipeline:
    """Load a pipeline from a folder or a repository, after checking its files.

    Args:
        pipeline_class: Class whose `from_pretrained` loads it; for DiffusionPipeline, the class in the index.
        source: The folder or Hub id.
        class_names: The accepted classes of the pipeline.
        kwargs: For `from_pretrained`.

    Raises:
        ValueError: If there is no such pipeline, or a component cannot be loaded; the message names the component.
    """
    hub, networks = split_options(kwargs)
    left_out = [name for name, value in networks.items() if name in KINDS and value is None]  # not downloaded
    index = os.path.join(source, INDEX) if os.path.isdir(source) else download_index(source, hub)
    if not os.path.isdir(source):
        check_index(read_config(index), class_names)
        chosen = {name: networks[name] for name in DOWNLOAD_OPTIONS if name in networks}
        source = owner_of(pipeline_class, index).download(source, **hub, **chosen, **dict.fromkeys(left_out))
    classes = check_pipeline_folder(source, class_names, networks.get("variant"), left_out)
    try:
        with quiet_transformers():
            return owner_of(pipeline_class, index).from_pretrained(source, **networks)
    except Exception:
        for name, component_class in classes.items():  # find the component that failed
            if name not in networks:
                with loading(name, Path(source, name)), quiet_transformers():
                    component_class.from_pretrained(Path(source, name))
        raise


def owner_of(pipeline_class: type[DiffusionPipeline], index: str) -> type[DiffusionPipeline]:
    """Return the class that loads: DiffusionPipeline itself would load optional components that are passed as None."""
    if pipeline_class is not DiffusionPipeline:
        return pipeline_class
    return getattr(diffusers, read_config(index)["_class_name"])


def download_index(source: str, hub: dict[str, Any]) -> str:
    """Return the local path of a repository's `model_index.json`."""
    return hf_hub_download(source, INDEX, **for_huggingface_hub(hub))


def small_files(source: str, hub: dict[str, Any]) -> Path:
    """Return a folder with all JSON files of a folder or repository; of a repository, only these are downloaded."""
    if os.path.isdir(source):
        return Path(source)
    return Path(snapshot_download(source, allow_patterns="*.json", **for_huggingface_hub(hub)))


# ---- text


def load_text_parts(source: str, **kwargs) -> dict[str, Any]:
    """Load the text encoder and the tokenizer in `text_encoder/` and `tokenizer/` of a folder or Hub repository.

    Raises:
        ValueError: If they do not exist, or the encoder lacks weights.
    """
    check_source("text_encoder", source)
    hub, networks = split_options(kwargs)
    quantization = networks.pop("quantization_config", None)
    if quantization is not None:  # that of a pipeline
        networks["quantization_config"] = quantization._resolve_quant_config(False, "text_encoder")
    with loading("text_encoder", source), quiet_transformers():
        if os.path.isdir(source):
            folder = Path(source, "text_encoder")
            check_encoder(folder, read_config(folder / "config.json"))
        encoder = load_where_it_is(f"`text_encoder` is '{source}'", source, "text_encoder", {**hub, **networks})
        tokenizer = load_tokenizer_of_pipeline(source, hub)
    return {"text_encoder": encoder.eval(), "tokenizer": tokenizer}
