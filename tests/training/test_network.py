"""Which network a run starts from."""

import pytest
from safetensors.torch import load_file, save_file
from tiny_runs import are_equal, make_sr_unet, make_unet, weights_of

from diffusers_imagen import EDMHeunScheduler, ImagenCascadePipeline
from diffusers_imagen.training.checks import check_objective
from diffusers_imagen.training.network import load_unet
from diffusers_imagen.training.network import make_unet as make_network


def test_a_network_without_all_its_weights_is_refused(tmp_path):
    unet = make_unet()
    unet.save_pretrained(tmp_path / "unet")
    weights = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(
        {key: weights[key] for key in weights if key != "conv_in.bias"},
        tmp_path / "unet" / "diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(ValueError, match="lacks 1 weights, conv_in.bias among them"):
        load_unet(str(tmp_path))


def test_the_stage_of_a_cascade_is_that_of_the_resolutions(make_config, tmp_path, tokenizer, text_encoder):
    base, sr = make_unet(), make_sr_unet()
    place = tmp_path / "cascade"
    schedulers = {"base_scheduler": EDMHeunScheduler(), "sr256_scheduler": EDMHeunScheduler(sigma_data=0.25)}
    ImagenCascadePipeline(
        base, tokenizer=tokenizer, text_encoder=text_encoder, sr256_unet=sr, **schedulers
    ).save_pretrained(place)
    of_cascade = {"preset": None, "pretrained_model_name_or_path": str(place)}
    config = make_config(**of_cascade)
    assert are_equal(weights_of(make_network(config)), weights_of(base))
    check_objective(config)
    config = make_config(**of_cascade, low_resolution=64, resolution=256)
    assert are_equal(weights_of(make_network(config)), weights_of(sr))
    with pytest.raises(ValueError, match="`sigma_data` is 0.5, but .* was trained with 0.25"):
        check_objective(config)
    with pytest.raises(ValueError, match=r"has no sr1024_unet among \['base_unet', 'sr256_unet'\]"):
        make_network(make_config(**of_cascade, low_resolution=256, resolution=1024))
    own = make_config(preset=None, pretrained_model_name_or_path=str(place / "sr256_unet"), sigma_data=0.25)
    check_objective(own)
    assert are_equal(weights_of(make_network(own)), weights_of(sr))
