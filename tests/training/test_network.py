"""Which network a run starts from."""

import pytest
import tiny_runs
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models import attention_dispatch
from safetensors.torch import load_file, save_file
from tiny_runs import are_equal, encode, exported, make_sr_unet, make_unet, weights_of

from diffusers_imagen import EDMAdamsScheduler, EDMHeunScheduler, ImagenCascadePipeline, ImagenPipeline
from diffusers_imagen.training import TrainingConfig, train
from diffusers_imagen.training.compatibility import check_objective
from diffusers_imagen.training.network import choose_attention, find_network, load_unet
from diffusers_imagen.training.network import make_unet as make_network


COSINE = "squaredcos_cap_v2"


def test_a_network_without_all_its_weights_is_refused(tmp_path):
    unet = make_unet()
    unet.save_pretrained(tmp_path / "unet")
    weights = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(
        {key: weights[key] for key in weights if key != "conv_in.bias"},
        tmp_path / "unet" / "diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(ValueError, match="lacks 1 weights, such as conv_in.bias"):
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
    config = make_config(**of_cascade, low_resolution=16, resolution=32)
    assert are_equal(weights_of(make_network(config)), weights_of(sr))
    with pytest.raises(ValueError, match="`sigma_data` is 0.5, but .* was trained with 0.25"):
        check_objective(config)
    message = "`resolution` is 1024 and `low_resolution` 256, but should be .* of the cascade .*: 16 without one, 32 with one"
    with pytest.raises(ValueError, match=message):
        make_network(make_config(**of_cascade, low_resolution=256, resolution=1024))
    own = make_config(
        preset=None, pretrained_model_name_or_path=str(place / "sr256_unet"), sigma_data=0.25, resolution=32
    )
    check_objective(own)
    assert are_equal(weights_of(make_network(own)), weights_of(sr))


@pytest.mark.parametrize(
    "scheduler", [EDMAdamsScheduler(preconditioning="discrete"), DDPMScheduler(beta_schedule=COSINE)]
)
def test_a_stage_of_discrete_betas_is_trained_further_for_them(make_config, tmp_path, scheduler):
    ImagenPipeline(make_unet(), scheduler).save_pretrained(tmp_path)
    of_stage = {"preset": None, "pretrained_model_name_or_path": str(tmp_path)}
    check_objective(make_config(**of_stage, preconditioning="discrete"))
    with pytest.raises(
        ValueError, match="`preconditioning` is 'edm', but .* was trained with 'discrete': set it to this value"
    ):
        check_objective(make_config(**of_stage))
    with pytest.raises(
        ValueError, match="`beta_schedule` is 'linear', but .* with 'squaredcos_cap_v2': set it to this value"
    ):
        check_objective(make_config(**of_stage, preconditioning="discrete", beta_schedule="linear"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_train_timesteps": 500}, "`num_train_timesteps` of .* is 500, but should be 1000 for further training"),
        ({"prediction_type": "v_prediction"}, "`prediction_type` of .* is 'v_prediction', but should be 'epsilon'"),
        ({"trained_betas": [0.01] * 1000}, "`trained_betas` of .*, but should be None"),
        ({"beta_schedule": "linear", "beta_end": 0.05}, "`beta_end` of .* is 0.05, but should be 0.02"),
        ({"rescale_betas_zero_snr": True}, "whose scheduler cannot be read: `rescale_betas_zero_snr` is True"),
    ],
)
def test_other_discrete_betas_are_refused_by_name(make_config, tmp_path, options, message):
    ImagenPipeline(make_unet(), DDPMScheduler(**{"beta_schedule": COSINE, **options})).save_pretrained(tmp_path)
    config = make_config(preset=None, pretrained_model_name_or_path=str(tmp_path), preconditioning="discrete")
    with pytest.raises(ValueError, match=message) as caught:
        check_objective(config)
    assert "\n" not in str(caught.value)


def test_every_stage_of_a_cascade_of_other_sizes_is_trained_further(make_config, tmp_path, tokenizer, text_encoder):
    """32 and 128 px, in the places that are called `base` and `sr256`."""
    networks = {
        "base_unet": make_unet().at_resolution(32),
        "sr256_unet": make_sr_unet().at_resolution(128),
    }
    place = tmp_path / "cascade"
    schedulers = {"base_scheduler": EDMHeunScheduler(), "sr256_scheduler": EDMHeunScheduler()}
    ImagenCascadePipeline(**networks, tokenizer=tokenizer, text_encoder=text_encoder, **schedulers).save_pretrained(
        place
    )
    sizes = {"base_unet": {"resolution": 32}, "sr256_unet": {"resolution": 128, "low_resolution": 32}}
    for part, size in sizes.items():
        config = make_config(
            preset=None,
            pretrained_model_name_or_path=str(place),
            output_dir=tmp_path / part,
            max_train_steps=1,
            use_ema=False,
            lr_warmup_steps=0,
            **size,
        )
        unet = make_network(config)
        before = weights_of(unet)
        assert are_equal(before, weights_of(networks[part])) and unet.resolution == size["resolution"]
        train(config, unet, encode)
        saved = exported(config.output_dir, type(unet))
        assert are_equal(saved, weights_of(unet)) and not are_equal(saved, before)
        tiny_runs.reset_accelerate()


NO_NETWORKS = {
    "nowhere": "which has no config.json",
    "other": "whose network class is UNet2DModel, but should be ImagenUNetModel, EfficientUNetModel or a class passed",
}


def test_a_configuration_is_a_network_with_fresh_weights(make_config, tmp_path):
    unet = make_sr_unet()
    unet.save_config(tmp_path / "network")
    unet.save_config(tmp_path / "stage" / "unet")
    for place in ("network", "stage"):
        config = make_config(
            preset=None, model_config_name_or_path=str(tmp_path / place), resolution=32, low_resolution=16
        )
        made = make_network(config)
        assert type(made) is type(unet)
        assert [value.shape for value in weights_of(made).values()] == [w.shape for w in weights_of(unet).values()]
    for name, problem in NO_NETWORKS.items():
        if name == "other":
            UNet2DModel(
                sample_size=8,
                block_out_channels=(32,),
                down_block_types=("DownBlock2D",),
                up_block_types=("UpBlock2D",),
            ).save_config(tmp_path / name)
        with pytest.raises(ValueError, match=f"`model_config_name_or_path` is .*{name}', {problem}"):
            make_network(make_config(preset=None, model_config_name_or_path=str(tmp_path / name)))


@pytest.mark.parametrize(("change", "shown"), [({"grow": True}, "True"), ({"layers_per_block": [1, 2]}, r"\[1, 2\]")])
def test_only_an_imagen_unet_can_be_changed(make_config, tmp_path, change, shown):
    make_sr_unet().save_pretrained(tmp_path / "unet")
    config = make_config(preset=None, pretrained_model_name_or_path=str(tmp_path), **change)
    message = (
        f"`{next(iter(change))}` is {shown}, but only an ImagenUNetModel .* has a network of class EfficientUNetModel"
    )
    with pytest.raises(ValueError, match=message):
        make_network(config)


def test_the_attention_that_is_named_is_taken(make_config, monkeypatch):
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)  # of all models: put back
    unet = make_unet()
    choose_attention(unet, make_config(attention_backend="_native_math"))
    backends = {processor._attention_backend for processor in unet.attn_processors.values()}
    assert backends == {attention_dispatch.AttentionBackendName._NATIVE_MATH}
    with pytest.raises(ValueError, match="`attention_backend` is 'flashy': .*must be one of"):
        choose_attention(unet, make_config(attention_backend="flashy"))
    with pytest.raises(ValueError, match="`attention_backend` is 'flash': .*flash-attn"):
        choose_attention(unet, make_config(attention_backend="flash"))


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", ["", "[]", "7", "null", "{", "[" * 5000])
def test_a_stage_with_a_malformed_file_is_refused_by_name(tmp_path, file, content):
    make_unet().save_pretrained(tmp_path / "unet")
    EDMHeunScheduler().save_pretrained(tmp_path / "scheduler")
    config = TrainingConfig(pretrained_model_name_or_path=str(tmp_path), resolution=16)
    make_network(config)
    check_objective(config)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        make_network(config)
        check_objective(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["[]", "{", "{}", '{"_class_name": 7}', '{"_class_name": "UNet2DModel"}', '{"_class_name": "nonsense"}']
    + ['{"_class_name": "ImagenUNetModel", "block_out_channels": "ab"}'],
)
def test_a_configuration_of_no_network_is_refused_by_name(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    config = TrainingConfig(model_config_name_or_path=str(tmp_path), resolution=16)
    with pytest.raises(ValueError) as caught:
        make_network(config)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_no_network_of_this_package_is_refused(tmp_path, text_encoder):
    text_encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="whose network class is BertModel, but should be ImagenUNetModel"):
        make_network(TrainingConfig(pretrained_model_name_or_path=str(tmp_path)))


def test_an_upscaler_of_a_cascade_enlarges_what_the_stage_below_makes(cascade, tmp_path):
    """From 16 px to 32."""
    cascade.save_pretrained(tmp_path)
    sizes = {"pretrained_model_name_or_path": str(tmp_path), "resolution": 32}
    assert find_network(TrainingConfig(**sizes, low_resolution=16)) == "sr256_unet"
    message = "`low_resolution` is 8, but should be 16, the resolution of the stage before `sr256_unet` in the cascade"
    with pytest.raises(ValueError, match=message):
        find_network(TrainingConfig(**sizes, low_resolution=8))
