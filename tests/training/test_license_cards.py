"""Cards of stages and adapters that were trained from weights under a license carry it on."""

import json
from pathlib import Path

import pytest
import tiny_runs
import yaml
from tiny_runs import encode, make_unet

from diffusers_imagen import EDMHeunScheduler, ImagenCascadePipeline, ImagenPipeline
from diffusers_imagen.training import LoraTrainer, LoraTrainingConfig, train


ORIGIN = {"base_model": "DeepFloyd/IF-I-M-v1.0", "license": "deepfloyd"}
NOTICE = "DeepFloyd is licensed under the DeepFloyd License, Copyright (c) Stability AI Ltd. All Rights Reserved."
FIELDS = {
    "base_model": "DeepFloyd/IF-I-M-v1.0",
    "license": "other",
    "license_name": "deepfloyd-if-license",
    "license_link": "https://huggingface.co/spaces/DeepFloyd/deepfloyd-if-license",
}


def read_card(folder) -> tuple[dict, str]:
    _, header, body = (Path(folder) / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), body


@pytest.fixture
def stage(tmp_path) -> str:
    """A base stage that was made from IF's weights, as far as its index says."""
    ImagenPipeline(make_unet(), EDMHeunScheduler(), origin=ORIGIN).save_pretrained(tmp_path / "stage-of-if")
    return str(tmp_path / "stage-of-if")


@pytest.fixture
def cascade_of_if(tmp_path) -> str:
    pipe = ImagenCascadePipeline(make_unet(), EDMHeunScheduler(), origin={"base": ORIGIN})
    pipe.save_pretrained(tmp_path / "cascade-of-if")
    return str(tmp_path / "cascade-of-if")


@pytest.mark.parametrize("source", ["stage", "cascade_of_if"])
def test_a_fine_tuned_stage_carries_the_license_on(make_config, source, request):
    place = request.getfixturevalue(source)
    config = make_config(preset=None, pretrained_model_name_or_path=place, max_train_steps=1)
    train(config, make_unet(), encode)
    folder = Path(config.output_dir)
    assert json.loads((folder / "model_index.json").read_text())["origin"] == ORIGIN
    header, body = read_card(folder)
    assert {name: header[name] for name in FIELDS} == FIELDS
    assert "diffusers-training" in header["tags"] and body.count(NOTICE) == 1
    # and so does what is trained from that
    again = make_config(
        preset=None, pretrained_model_name_or_path=str(folder), max_train_steps=1, output_dir=f"{folder}-2"
    )
    train(again, make_unet(), encode)
    assert NOTICE in read_card(again.output_dir)[1]


def test_an_adapter_carries_the_license_on(imagefolder, tmp_path, stage, fresh_accelerator):
    settings = {"pretrained_model_name_or_path": stage, "preset": None, "max_train_steps": 1, "rank": 2}
    config = LoraTrainingConfig(**tiny_runs.settings(imagefolder, tmp_path / "lora", **settings))
    LoraTrainer(config, make_unet(), encode).train()
    header, body = read_card(tmp_path / "lora")
    assert {name: header[name] for name in FIELDS} == FIELDS
    assert "lora" in header["tags"] and NOTICE in body


def test_weights_of_our_own_are_under_no_license_of_others(make_config):
    config = make_config(max_train_steps=1)
    train(config, make_unet(), encode)
    header, body = read_card(config.output_dir)
    assert set(header) == {"license", "library_name", "pipeline_tag", "tags"} and "License" not in body
    assert header["license"] == "unknown"


def test_an_unknown_license_is_refused_before_training(make_config, stage):
    index = Path(stage, "model_index.json")
    index.write_text(json.dumps({**json.loads(index.read_text()), "origin": {"license": "mine"}}))
    config = make_config(preset=None, pretrained_model_name_or_path=stage)
    with pytest.raises(
        ValueError, match="model_index.json is malformed: `license of origin` is 'mine', but should be"
    ):
        train(config, make_unet(), encode)
