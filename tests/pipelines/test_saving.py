"""Folders of saved pipelines: the options of diffusers, and folders that were saved to before."""

import inspect

import pytest
import torch
from diffusers import ModelMixin

from diffusers_imagen import EfficientUNetModel, ImagenCascadePipeline, ImagenUNetModel


UNETS, MODELS = ("base_unet", "sr256_unet"), ("base_unet", "sr256_unet", "text_encoder")
SHARDED = {"max_shard_size": "1KB"}


def weights(folder) -> set[str]:
    return {file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")}


@pytest.mark.parametrize("network_class", [ImagenUNetModel, EfficientUNetModel])
def test_pipelines_find_the_options_of_a_network_in_its_signature(network_class):
    assert inspect.signature(network_class.save_pretrained) == inspect.signature(ModelMixin.save_pretrained)


def test_a_saved_pipeline_has_the_files_that_were_asked_for(cascade, tmp_path):
    cascade.save_pretrained(tmp_path / "variant", variant="fp16")
    cascade.save_pretrained(tmp_path / "shards", max_shard_size="1KB")
    cascade.save_pretrained(tmp_path / "torch", safe_serialization=False)
    for name in UNETS:
        assert weights(tmp_path / "variant" / name) == {"diffusion_pytorch_model.fp16.safetensors"}
        assert len(weights(tmp_path / "shards" / name)) > 2
        assert weights(tmp_path / "torch" / name) == {"diffusion_pytorch_model.bin"}


@pytest.mark.parametrize(
    "before, after",
    [
        ({}, SHARDED),
        (SHARDED, {}),
        (SHARDED, {"max_shard_size": "4KB"}),
        ({}, {"safe_serialization": False}),
        (SHARDED, {"safe_serialization": False}),
        ({"safe_serialization": False}, SHARDED),
        ({"variant": "a"}, {"variant": "a", **SHARDED}),
        ({"variant": "a", **SHARDED}, {"variant": "a"}),
    ],
)
def test_what_is_saved_last_is_loaded(before, after, cascade, tmp_path):
    cascade.save_pretrained(tmp_path, **before)
    expected = {}
    for name in MODELS:
        module = getattr(cascade, name)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.5)
        expected[name] = {key: value.clone() for key, value in module.state_dict().items()}
    cascade.save_pretrained(tmp_path, **after)
    loaded = ImagenCascadePipeline.from_pretrained(tmp_path, variant=after.get("variant"))
    for name in MODELS:
        found = getattr(loaded, name).state_dict()
        assert found.keys() == expected[name].keys()
        assert all(torch.equal(found[key], value) for key, value in expected[name].items()), name


def test_variants_are_kept_beside_each_other(cascade, tmp_path):
    for variant in (None, "a", "b"):
        cascade.save_pretrained(tmp_path, variant=variant)
    for name in UNETS:
        assert len(weights(tmp_path / name)) == 3


@pytest.mark.parametrize("folder, message", [("file", "which is a file"), ("", "not a valid"), (None, "is None")])
def test_folders_that_cannot_be_written_are_refused(folder, message, cascade, base_unet, tmp_path):
    (tmp_path / "file").write_text("")
    folder = folder and tmp_path / folder
    for component in (cascade, base_unet):
        with pytest.raises(ValueError, match=f"`save_directory` .*{message}"):
            component.save_pretrained(folder)


def test_a_file_in_the_place_of_a_component_is_found_before_anything_is_written(cascade, tmp_path):
    (tmp_path / "tokenizer").write_text("")
    with pytest.raises(ValueError, match="`save_directory` is '.*tokenizer', which is a file"):
        cascade.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer"]
