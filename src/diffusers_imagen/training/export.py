"""Export of a trained network as a stage folder that opens as a pipeline, with a model card and training settings."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import create_repo, upload_folder

from ..pipelines.card_files import CARD_FILE, LICENSES, NOTICES, copy_card
from ..text.reference import EncoderParts, load_reference
from ..utils.errors import NETWORK, one_line
from ..utils.files import read_json_object, remove, sha256, whole_folder, write_json
from ..utils.references import REFERENCE, read_reference
from .config import TrainingConfig
from .pretrained_stage import PretrainedStage
from .sampling import StagePipeline
from .stage_card import (
    DRAW,
    IN_CASCADE,
    OF_THIS_START,
    PICTURES,
    CardFacts,
    drawn_prompt,
    last_name,
    model_card,
    public_name,
    public_settings,
    shown_sample,
    write_pictures,
)


UPCOMING, REPLACED = ".stage.new", ".stage.replaced"
RECORD = "training.json"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
INDEX = "model_index.json"
ENCODER_PARTS = ("tokenizer", "text_encoder")
STAGE_PARTS = (
    *("unet", "scheduler", *ENCODER_PARTS, INDEX, ADAPTER_FILE, CARD_FILE, RECORD),
    *(PICTURES, LICENSES),
)
# the files of a run's folder to upload
UPLOADED = (
    *(
        "unet/config.json",
        f"unet/{REFERENCE}",
        "unet/*.safetensors",
        "unet/*.safetensors.index.json",
        "scheduler/scheduler_config.json",
    ),
    *("tokenizer/*", "text_encoder/*.json", INDEX, ADAPTER_FILE, CARD_FILE, RECORD, f"{PICTURES}/*.png", *NOTICES),
)


@contextmanager
def parts_of(config: TrainingConfig) -> Iterator[Path]:
    """Context manager for a temporary folder, whose files are moved to `config.output_dir` at the end, one by one.

    If the process is killed while it moves them, the rest stays in a separate folder, from which `finish_move`
    continues.
    """
    folder = Path(config.output_dir)
    with whole_folder(folder / UPCOMING) as partial:
        yield partial
    finish_move(folder)


def finish_move(folder: Path) -> None:
    """Move the content of a folder's `.stage.new`, which is complete, to the folder; does nothing if there is none.

    The old training.json is removed first and the new one is moved last, so that it never describes parts of another
    step. An old part exists until the new one replaces it, except for the time between two renames.
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
    """Return the SHA-256 of a stage's or adapter's files, by name, except the model card, which users may edit."""
    parts = [folder / name for name in STAGE_PARTS if name not in (CARD_FILE, PICTURES, LICENSES)]
    files = [path for part in parts for path in (part, *sorted(part.rglob("*"))) if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def save_stage(
    pipe: StagePipeline,
    config: TrainingConfig,
    step: int,
    results: dict[str, float],
    pretrained: PretrainedStage = PretrainedStage(),
    encoder: EncoderParts | None = None,
) -> None:
    """Write the stage to `config.output_dir`: first to a temporary folder, and then moved part by part.

    Args:
        pipe (`StagePipeline`): The stage, without its text encoder.
        config (`TrainingConfig`), step (`int`), results (`dict[str, float]`): Settings and results of the training.
        pretrained (`PretrainedStage`): The stage that training started from.
        encoder (`EncoderParts`, *optional*): Its text encoder, which is saved by reference.
    """
    unet = pipe.unet
    with parts_of(config) as partial:
        unet.save_pretrained(partial / "unet")
        save_parts(pipe, config, encoder, partial)
        call = pipe.model_card_call(None if encoder is None else drawn_prompt(config))
        facts = CardFacts(pretrained, DRAW.replace("{call}", call), in_cascade(config, pretrained))
        write_record(partial, config, step, results)
        write_card(partial, config, step, facts, model_card(unet, config, step, results, facts))


def in_cascade(config: TrainingConfig, pretrained: PretrainedStage) -> str:
    """Return the section of a card about the cascade that a stage was made from and fits; empty if there is none."""
    if pretrained.part in (None, "unet") or config.grow or pretrained.preconditioning != config.preconditioning:
        return ""
    cascade = str(public_name(config.pretrained_model_name_or_path))
    return IN_CASCADE.replace("{cascade}", cascade).replace("{part}", str(pretrained.part))


def write_card(folder: Path, config: TrainingConfig, step: int, facts: CardFacts, text: str) -> None:
    """Write a card with its images, and the notices of the pretrained weights."""
    write_pictures(folder, config, step)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
    if facts.pretrained.folder is not None:
        copy_card(facts.pretrained.folder, folder, with_card=False)


def save_parts(pipe: StagePipeline, config: TrainingConfig, encoder: EncoderParts | None, folder: Path) -> None:
    """Write the small files of a stage, the tokenizer, and the reference to the text encoder."""
    pipe.unet.save_config(folder / "unet")
    hide_place(folder / "unet" / "config.json")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.save_config(folder)
    if encoder is not None:
        entries = encoder.save(folder, Path(config.output_dir))
        write_json(folder / INDEX, {**read_json_object(folder / INDEX), **entries})


def hide_place(path: Path) -> None:
    """Remove the path of the folder that a network was loaded from from its configuration."""
    settings = read_json_object(path)
    if "_name_or_path" in settings:
        write_json(path, {**settings, "_name_or_path": public_name(settings["_name_or_path"])})


def write_record(folder: Path, config: TrainingConfig, step: int, results: dict[str, float]) -> None:
    """Write the settings and results of training, as JSON."""
    settings = {name: value for name, value in public_settings(config).items() if name not in OF_THIS_START}
    write_json(folder / RECORD, {"step": step, **results, "config": settings})


def make_repository(config: TrainingConfig) -> str | None:
    """Return the repository to upload to, created if it does not exist; None without `push_to_hub`."""
    if not config.push_to_hub:
        return None
    name = config.hub_model_id or last_name(config.output_dir)
    with hub_errors(f"`push_to_hub` is True, but '{name}' cannot be created on the Hub (`hub_model_id`, `hub_token`)"):
        return create_repo(name, exist_ok=True, token=config.hub_token).repo_id


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Context manager that converts errors of the network and the Hub to ValueErrors that begin with `what`."""
    try:
        yield
    except (*NETWORK, ValueError) as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


def upload_stage(repository: str, config: TrainingConfig, step: int, encoder: EncoderParts | None = None) -> None:
    """Upload only the stage and the images of its card.

    A text encoder in a local folder is uploaded completely, so that the stage works on other machines.
    """
    sample = shown_sample(config, step)
    is_local = encoder is not None and encoder.reference.is_local
    left_out = [INDEX, "text_encoder/*"] if is_local else []
    network = Path(config.output_dir, "unet")
    if (network / REFERENCE).is_file() and read_reference(network).is_local:  # only the adapter
        left_out, is_local = [INDEX, *(f"{part}/*" for part in ("unet", "scheduler", *ENCODER_PARTS))], False
    upload = functools.partial(
        upload_folder, repo_id=repository, token=config.hub_token, commit_message=f"Stage after {step} steps"
    )
    with hub_errors(f"The run is complete in '{config.output_dir}', but was not uploaded to '{repository}'"):
        upload(
            folder_path=config.output_dir,
            allow_patterns=[*UPLOADED, *([] if sample is None else [sample])],
            ignore_patterns=["checkpoint-*", f"{config.logging_dir.rstrip('/')}/*", *left_out],
        )
        if encoder is not None and is_local:  # the index that names it is uploaded last
            with TemporaryDirectory() as folder:
                save_whole_encoder(encoder, Path(config.output_dir), Path(folder))
                upload(folder_path=folder)


def save_whole_encoder(encoder: EncoderParts, stage: Path, folder: Path) -> None:
    """Write a text encoder, and the index of a stage with it, to a folder."""
    model = load_reference(encoder.reference, dtype="auto")
    model.save_pretrained(folder / "text_encoder")
    entry = {"text_encoder": ["transformers", type(model).__name__]}
    write_json(folder / INDEX, {**read_json_object(stage / INDEX), **entry})
