"""Fine-tuning without `text_encoder`: the one of the pretrained stage is used, as if it had been given."""

import json
import logging
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import are_equal, weights_of
from transformers import BertModel

from diffusers_imagen import EDMHeunScheduler, ImagenCascadePipeline, ImagenPipeline
from diffusers_imagen.text.encoder import TextEncoder
from diffusers_imagen.training import (
    DreamBoothTrainingConfig,
    LoraTrainer,
    LoraTrainingConfig,
    Trainer,
    TrainingConfig,
)
from diffusers_imagen.training.finetuning.dreambooth import make_trainer
from diffusers_imagen.training.network import make_unet
from diffusers_imagen.utils.references import REFERENCE


KINDS = {
    "all weights": (Trainer, TrainingConfig, {}),
    "LoRA": (LoraTrainer, LoraTrainingConfig, {}),
    "DreamBooth": (make_trainer, DreamBoothTrainingConfig, {"instance_prompt": "a red apple"}),
}


@pytest.fixture
def sources(tokenizer, text_encoder, imagefolder, tmp_path, fresh_accelerator) -> dict[str, str]:
    """A stage with the weights of its encoder, a cascade with them, and a stage that refers to the first's."""
    unet, parts = tiny_runs.make_unet(text_width=16), {"tokenizer": tokenizer, "text_encoder": text_encoder}
    places = {name: str(tmp_path / name) for name in ("own", "cascade", "reference", "none")}
    ImagenPipeline(unet, EDMHeunScheduler(), **parts).save_pretrained(places["own"])
    ImagenPipeline(unet, EDMHeunScheduler()).save_pretrained(places["none"])
    ImagenCascadePipeline(unet, EDMHeunScheduler(), **parts).save_pretrained(places["cascade"])
    ImagenPipeline(unet, EDMHeunScheduler()).save_pretrained(places["reference"])
    index = Path(places["reference"]) / "model_index.json"
    entries = TextEncoder.from_pretrained(places["own"]).parts().save(index.parent, index.parent)
    index.write_text(json.dumps({**json.loads(index.read_text()), **entries}))
    return places


def start_from(place: str) -> dict:
    return {"preset": None, "pretrained_model_name_or_path": place, "lr_warmup_steps": 0}


def make_trainer_of(kind: str, folder: str, output_dir: Path, **settings) -> Trainer:
    """Return the trainer of a run of two steps."""
    trainer_class, config_class, others = KINDS[kind]
    settings = {"max_train_steps": 2, **others, **settings}
    if kind == "DreamBooth":
        settings |= {"train_data_dir": None, "instance_data_dir": folder}
    tiny_runs.reset_accelerate()
    config = config_class(**{**tiny_runs.settings(folder, output_dir), **settings})
    return trainer_class(config, make_unet(config))


def test_the_text_encoder_of_the_stage_is_used_as_if_it_was_given(sources, imagefolder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    place, run = sources["reference"], tmp_path / "tuned"
    settings = {**start_from(place), "validation_prompts": ["a red apple"]}
    given = make_trainer_of("all weights", imagefolder, tmp_path / "given", **settings, text_encoder=place)
    given.train()
    assert "`text_encoder` is not given" not in caplog.text
    own = make_trainer_of("all weights", imagefolder, run, **settings)
    own.train()
    assert f"`text_encoder` is not given: that of the pretrained stage, '{place}', is used" in caplog.text
    assert are_equal(weights_of(own.unet), weights_of(given.unet))
    folders = (tmp_path / "given", run)
    records = [json.loads((folder / "training.json").read_text())["config"]["text_encoder"] for folder in folders]
    assert records == ["reference", "reference"]
    first, second = ((folder / "text_encoder" / REFERENCE).read_text() for folder in folders)
    assert first == second

    latest = {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    make_trainer_of("all weights", imagefolder, run, **settings, **latest, text_encoder=place).train()
    encoder = Path(sources["own"]) / "text_encoder"
    other = BertModel.from_pretrained(encoder)
    other.embeddings.word_embeddings.weight.data.mul_(2)
    other.save_pretrained(encoder)
    latest["max_train_steps"] = 4
    with pytest.raises(ValueError, match="was trained with another text encoder"):
        make_trainer_of(
            "all weights", imagefolder, run, **{**settings, **start_from(sources["own"])}, **latest
        ).train()


@pytest.mark.parametrize("kind, source", [("LoRA", "cascade"), ("DreamBooth", "own")])
def test_adapters_and_dreambooth_use_it_too(kind, source, sources, imagefolder, tmp_path):
    trainer = make_trainer_of(kind, imagefolder, tmp_path / "tuned", **start_from(sources[source]))
    trainer.prepare()
    assert trainer.config.text_encoder == trainer.encoder.reference.source == sources[source]


def test_it_is_not_used_beside_a_cache_or_without_text(sources, imagefolder, tmp_path):
    trainer = make_trainer_of(
        "all weights", imagefolder, tmp_path / "tuned", **start_from(sources["own"]), embedding_cache="a"
    )
    assert trainer.pretrained.text_encoder == sources["own"] and trainer.config.text_encoder is None
    tiny_runs.make_unet(text_width=None).save_pretrained(Path(sources["own"]) / "unet")
    trainer = make_trainer_of("all weights", imagefolder, tmp_path / "tuned", **start_from(sources["own"]))
    assert trainer.pretrained.text_encoder == sources["own"] and trainer.config.text_encoder is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_without_text_encoder_needs_one(kind, sources, imagefolder, tmp_path):
    with pytest.raises(ValueError, match="conditioned on text: pass `text_encoder` or `embedding_cache`"):
        make_trainer_of(kind, imagefolder, tmp_path / "tuned", **start_from(sources["none"]))
    assert not (tmp_path / "tuned").exists()
