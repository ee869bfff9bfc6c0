"""Loading of stages from any source: described by small files, checked against each other, and then loaded.

Gigabytes are downloaded only for stages that fit their positions, the text encoder and the installed packages.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import AutoModel, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.quantizers import PipelineQuantizationConfig
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...conversion.deepfloyd import config_from_deepfloyd
from ...models.interface import StageNetwork
from ...text.identity import encoder_width
from ...utils.arguments import bad_argument, class_of, shown
from ...utils.modules import unwrapped
from ...utils.shipped import find_source
from ..stage_table import AS_BASE, AS_UPSCALER, SAFETY_PARTS, TEXT_PARTS
from ..stages import StageSource
from .deepfloyd_repository import MAX_TOKENS, is_deepfloyd, load_deepfloyd, parts_of_deepfloyd, read_deepfloyd
from .folder_checks import (
    CONFIGS,
    INDEX,
    SETTINGS,
    check_component,
    check_index,
    configured_class,
    describe_network,
    read_config,
)
from .folders import (
    SINGLE_STAGES,
    check_source,
    load_pipeline_folder,
    load_text_parts,
    loading,
    small_files,
    split_options,
)


SHARED_PARTS = (*TEXT_PARTS, *SAFETY_PARTS)  # components that a pipeline has once, for all stages
# components that are left out together with the component that needs them
TOGETHER = {"text_encoder": "tokenizer", "safety_checker": "feature_extractor"}


class DescribedStage(NamedTuple):
    """Description of a stage before it is loaded."""

    name: str  # of the argument
    source: StageSource
    class_name: str | None  # of the saved pipeline; None for only a network and its scheduler
    takes_low_res: bool
    text_width: int | None  # of the network's text embeddings
    encoder_width: int | None  # of the stage's own text encoder
    parts: frozenset[str]  # those of SHARED_PARTS that the stage has

    @property
    def shown(self) -> str:
        """Return the source as shown in a message."""
        is_path = isinstance(self.source, (str, os.PathLike))
        return f"'{self.source}'" if is_path else class_of(self.source)


# ---- several stages


def load_stages(
    sources: dict[str, StageSource], upscales: dict[str, bool], options: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Load the components of each stage, by argument name, and the components that all stages share.

    Args:
        sources: By argument name, in the order of the stages.
        upscales: By argument name, whether the argument is for a super-resolution stage.
        options: Those of `SHARED_PARTS` that the caller passed; `quantization_config` of the text encoder; and options
            of diffusers' `from_pretrained`, such as `dtype`, `variant`, `token` or `revision`.

    Raises:
        ValueError: If a source is not a stage, or does not fit its position, the text or the installed packages.
    """
    options = dict(options)
    given = {name: options.pop(name) for name in SHARED_PARTS if name in options}
    for name, other in TOGETHER.items():
        if name in given and given[name] is None:
            given.setdefault(other, None)
    if isinstance(given.get("text_encoder"), (str, os.PathLike)):
        given["text_encoder"] = find_source(given["text_encoder"])
    check_shared_parts(given)
    quantization = text_quantization(options.pop("quantization_config", None))
    hub, _ = split_options(options)
    for name, source in sources.items():  # before the first is loaded
        check_stage_source(name, source)
    if not any(isinstance(source, (str, os.PathLike)) for source in (*sources.values(), given.get("text_encoder"))):
        for name in (name for name, value in options.items() if value is not None):
            raise ValueError(
                f"`{name}` is {shown(options[name])}, but should not be given: everything that was passed is already "
                "loaded."
            )
    described, first = [], next(iter(sources))
    for name, source in sources.items():
        described.append(describe_stage(name, source, hub, [*given, *(TEXT_PARTS if name != first else ())]))
    check_places(described, upscales)
    check_text_widths(described, given, hub)
    providers = find_providers(described, given)
    check_quantization(quantization, described, providers, given)

    parts = {}
    for stage in described:
        left_out = [part for part in SHARED_PARTS if providers.get(part) != stage.name]
        own = {} if quantization is None or "text_encoder" in left_out else {"quantization_config": quantization}
        parts[stage.name] = load_described(stage, left_out, **options, **own)
    shared = {part: parts[name].get(part) for part, name in providers.items()}
    if isinstance(given.get("text_encoder"), (str, os.PathLike)):
        own = {} if quantization is None else {"quantization_config": quantization}
        text = load_text_parts(str(given.pop("text_encoder")), **options, **own)
        if is_deepfloyd(described[0].class_name):  # overrides the tokenizer's own limit
            text["tokenizer"].model_max_length = MAX_TOKENS
        given = {**text, **given}
    return parts, {**shared, **given}


def find_providers(described: list[DescribedStage], given: dict[str, Any]) -> dict[str, str]:
    """Return, for each component that was not passed, the stage that it is loaded from.

    All stages use the text encoder of the first stage, and the first safety checker that a stage has.
    """
    providers = {}
    for part in SHARED_PARTS:
        stages = described[:1] if part in TEXT_PARTS else described
        owner = next((stage.name for stage in stages if part in stage.parts), None)
        if owner is not None and part not in given:
            providers[part] = owner
    return providers


def check_shared_parts(given: dict[str, Any]) -> None:
    """Raise ValueError for an invalid text encoder or tokenizer, before anything is loaded."""
    text_encoder, tokenizer = given.get("text_encoder"), given.get("tokenizer")
    if isinstance(text_encoder, (str, os.PathLike)):
        check_source("text_encoder", text_encoder)
    elif text_encoder is not None and not isinstance(unwrapped(text_encoder), PreTrainedModel):
        raise ValueError(f"`text_encoder` is {shown(text_encoder)}, but should be a model, a folder or a Hub id.")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"`tokenizer` is {shown(tokenizer)}, but should be a tokenizer of transformers.")


def check_places(described: list[DescribedStage], upscales: dict[str, bool]) -> None:
    """Raise ValueError for a base stage where a super-resolution stage is needed, or the reverse."""
    for stage in described:
        if stage.takes_low_res and not upscales[stage.name]:
            raise ValueError(
                f"`{stage.name}` is {stage.shown}, a super-resolution stage, but should be a base stage: "
                f"{AS_UPSCALER}."
            )
        if upscales[stage.name] and not stage.takes_low_res:
            raise ValueError(
                f"`{stage.name}` is {stage.shown}, a base stage, but should be a super-resolution stage: {AS_BASE}."
            )


def check_text_widths(described: list[DescribedStage], given: dict[str, Any], hub: dict[str, Any]) -> None:
    """
    Raise ValueError for a stage whose text embeddings have another width than those of the encoder, if there is one.
    """
    encoder = given.get("text_encoder", described[0].encoder_width)
    owner = "the given text encoder" if "text_encoder" in given else f"the text encoder of `{described[0].name}`"
    if isinstance(encoder, (str, os.PathLike)):
        with loading("text_encoder", encoder):
            width = read_encoder_width(small_files(str(encoder), hub))
    else:
        width = encoder if encoder is None or isinstance(encoder, int) else encoder_width(unwrapped(encoder).config)
    for stage in described:
        if width is not None and stage.text_width not in (None, width):
            raise ValueError(
                f"`{stage.name}` is {stage.shown}, which is conditioned on text of width {stage.text_width}, but "
                f"{owner} has width {width}: all stages of a pipeline should have been trained with the same text "
                "encoder."
            )


# ---- quantization of the text encoder


def text_quantization(config: Any) -> PipelineQuantizationConfig | None:
    """Return the argument `config` as the quantization of a pipeline that quantizes the text encoder.

    Raises:
        ValueError: For other types, and for quantization of other components: networks are converted, or trained
            further.
    """
    if isinstance(config, QuantizationConfigMixin):
        return PipelineQuantizationConfig(quant_mapping={"text_encoder": config})
    if config is None:
        return None
    if not isinstance(config, PipelineQuantizationConfig):
        raise bad_argument(
            "quantization_config",
            config,
            "a PipelineQuantizationConfig, or a quantization configuration of transformers",
        )
    names = list(config.quant_mapping or config.components_to_quantize or ["every component"])
    others = [name for name in names if name != "text_encoder"]
    if others:
        raise ValueError(
            f"`quantization_config` is for {', '.join(others)}, but only the text encoder of stages can be "
            "quantized: pass "
            '`components_to_quantize=["text_encoder"]`, or a `quant_mapping` for it.'
        )
    return config


def check_quantization(
    config: PipelineQuantizationConfig | None,
    described: list[DescribedStage],
    providers: dict[str, str],
    given: dict[str, Any],
) -> None:
    """Raise ValueError for a quantization if no text encoder is loaded from files."""
    if config is None or isinstance(given.get("text_encoder"), (str, os.PathLike)):
        return
    owner = next((stage for stage in described if stage.name == providers.get("text_encoder")), None)
    if owner is None or not isinstance(owner.source, (str, os.PathLike)):
        raise ValueError("`quantization_config` is given, but no text encoder is loaded from a folder or the Hub.")


# ---- one stage


def load_stage(name: str, source: StageSource, **kwargs) -> dict[str, Any]:
    """Load the components of a stage: `unet`, `scheduler`, and others that its folder or pipeline has.

    These are `scale_factor` (None if unknown), `tokenizer`, `text_encoder`, `guidance_unet`, `safety_checker`,
    `feature_extractor`, `watermarker`, and the settings `call_defaults`, `clean_caption` and `origin`.

    Args:
        name: The name of the argument, for messages.
        source: A single-stage pipeline of this package or of DeepFloyd IF; a pair of a network and its scheduler; or
            the folder or Hub id of such a pipeline, or of only `unet/` and `scheduler/`.
        kwargs: For diffusers' `from_pretrained`, such as `dtype`, `variant`, `token` or `revision`.

    Raises:
        ValueError: If it is not one of these.
    """
    check_stage_source(name, source)
    hub, _ = split_options(kwargs)
    return load_described(describe_stage(name, source, hub, ()), (), **kwargs)


def check_stage_source(name: str, source: Any) -> None:
    """Raise ValueError for a source that is not a stage, as far as this can be determined before loading."""
    if isinstance(source, (str, os.PathLike)):
        check_source(name, source)
        folder = Path(source)
        if folder.is_dir() and not (folder / INDEX).is_file() and not (folder / "unet" / "config.json").is_file():
            raise ValueError(f"`{name}` is '{source}', a folder with neither a {INDEX} nor a network in unet/.")
        return
    pair = source
    network_class: type = StageNetwork
    if isinstance(source, DiffusionPipeline):
        pair = source.components.get("unet"), source.components.get("scheduler")
        network_class = UNet2DConditionModel if is_deepfloyd(type(source).__name__) else StageNetwork
    unet, scheduler = pair if isinstance(pair, (tuple, list)) and len(pair) == 2 else (None, None)
    if not isinstance(unwrapped(unet), network_class) or not isinstance(scheduler, SchedulerMixin):
        raise ValueError(
            f"`{name}` is {shown(source)}, but should be a folder, a Hub id, a single-stage pipeline, or a network "
            "and its scheduler."
        )


def describe_stage(name: str, source: StageSource, hub: dict[str, Any], left_out: Collection[str]) -> DescribedStage:
    """Describe a stage without its weights; of a repository, the small files are downloaded.

    Raises:
        ValueError: For files that cannot be loaded, except for components in `left_out`.
    """
    if isinstance(source, (str, os.PathLike)):
        with loading(name, source):
            return describe_files(name, str(source), hub, left_out)
    if isinstance(source, DiffusionPipeline):
        parts = {part for part in SHARED_PARTS if source.components.get(part) is not None}
        encoder = source.components.get("text_encoder")
        width = None if encoder is None else encoder_width(unwrapped(encoder).config)
        if is_deepfloyd(type(source).__name__):
            try:
                config = config_from_deepfloyd(unwrapped(source.unet).config)
            except ValueError as error:
                raise ValueError(f"`{name}` is {class_of(source)}, which is not supported: {error}") from error
            kind = config["low_res_conditioning"], config["encoder_hid_dim"]
        else:
            kind = source.unet.takes_low_res, source.unet.text_width
        return DescribedStage(name, source, type(source).__name__, *kind, width, frozenset(parts))
    unet = unwrapped(source[0])
    return DescribedStage(name, source, None, unet.takes_low_res, unet.text_width, None, frozenset())


def describe_files(name: str, source: str, hub: dict[str, Any], left_out: Collection[str]) -> DescribedStage:
    """Describe a stage by the small files of its folder or repository."""
    folder = small_files(source, hub)
    index = read_config(folder / INDEX) if (folder / INDEX).is_file() else {}
    class_name = index.get("_class_name")
    if is_deepfloyd(class_name):
        config = read_deepfloyd(folder, index, left_out)
        kind = config["low_res_conditioning"], config["encoder_hid_dim"]
    else:
        if index:
            check_index(index, SINGLE_STAGES)
        network = describe_network(read_config(folder / "unet" / CONFIGS["unet"]))
        kind = network.takes_low_res, network.text_width
    parts = {part for part in SHARED_PARTS if index.get(part, [None, None]) != [None, None]}
    width = read_encoder_width(folder) if "text_encoder" in parts - set(left_out) else None
    return DescribedStage(name, source, class_name, *kind, width, frozenset(parts))


def read_encoder_width(folder: Path) -> int | None:
    """Return the width of the embeddings of the text encoder in a folder; None if it cannot be determined."""
    try:
        return encoder_width(AutoConfig.from_pretrained(folder / "text_encoder", trust_remote_code=False))
    except (OSError, ValueError, KeyError):  # unreadable configurations are rejected when they are loaded
        return None


def load_described(stage: DescribedStage, left_out: Collection[str], **kwargs) -> dict[str, Any]:
    """Load the components of a stage, except those in `left_out`; see `load_stage`."""
    source = stage.source
    if isinstance(source, DiffusionPipeline):
        if is_deepfloyd(stage.class_name):
            with loading(stage.name, type(source).__name__):
                return parts_of_deepfloyd(source, source.config.get("_name_or_path"))
        return parts_of(source)
    if not isinstance(source, (str, os.PathLike)):
        return {"unet": source[0], "scheduler": source[1]}
    with loading(stage.name, source):
        hub, networks = split_options(kwargs)
        if is_deepfloyd(stage.class_name):
            return load_deepfloyd(str(source), str(stage.class_name), left_out, hub, networks)
        if stage.class_name is not None:
            absent = dict.fromkeys(left_out)
            return parts_of(load_pipeline_folder(DiffusionPipeline, str(source), SINGLE_STAGES, **kwargs, **absent))
        return load_network_and_scheduler(str(source), hub, networks)


def parts_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the components and the settings of a single-stage pipeline."""
    return {**pipe.components, **{name: pipe.config.get(name) for name in SETTINGS}}


def load_network_and_scheduler(source: str, hub: dict[str, Any], networks: dict[str, Any]) -> dict[str, Any]:
    """Load the components in `unet/` and `scheduler/` of a folder or Hub repository."""
    folder = small_files(source, hub)
    config = read_config(folder / "scheduler" / CONFIGS["scheduler"])
    scheduler_class = configured_class("scheduler", config)
    if os.path.isdir(source):
        unet_class = configured_class("unet", read_config(Path(source, "unet", CONFIGS["unet"])))
        check_component(Path(source), "unet", unet_class, networks.get("variant"))
    parts = {
        "unet": AutoModel.from_pretrained(source, subfolder="unet", trust_remote_code=False, **hub, **networks),
        "scheduler": scheduler_class.from_pretrained(source, subfolder="scheduler", **hub),
    }
    check_stage_source("stage", tuple(parts.values()))
    return parts
