"""What a call has where it does not say: of the stage, and saved with the pipeline."""

import json

import pytest
import torch

from diffusers_imagen import ImagenCascadePipeline, ImagenPipeline, ImagenSuperResolutionPipeline


GIVEN = {
    "base": {"num_inference_steps": 2, "guidance_scale": 7.0},
    "sr256": {"num_inference_steps": 3, "guidance_scale": 2.0, "low_res_noise_level": 0.4},
}


def draw(pipe, **arguments) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a red apple", generator=generator, output_type="latent", **arguments).images


@pytest.fixture
def parts(cascade) -> dict:
    return cascade.components


def test_a_call_without_settings_has_those_of_the_stages(parts):
    ours = ImagenCascadePipeline(**parts, call_defaults=GIVEN)
    expected = ImagenCascadePipeline(**parts)
    settings = {name: {stage: GIVEN[stage][name] for stage in GIVEN} for name in GIVEN["base"]}
    images = draw(expected, **settings, low_res_noise_level=0.4)
    assert torch.equal(draw(ours), images)
    assert not torch.equal(draw(expected), images)
    # what the call says goes first
    assert torch.equal(draw(ours, num_inference_steps=4, guidance_scale=1.0, low_res_noise_level=0.1),
                       draw(expected, num_inference_steps=4, guidance_scale=1.0))  # fmt: skip


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"num_inference_steps": {"base": 3}}, {"num_inference_steps": [3, 3]}),
        ({"num_inference_steps": {"sr256": 1}}, {"num_inference_steps": [2, 1]}),
        ({"guidance_scale": {"base": 1.5}}, {"guidance_scale": [1.5, 2.0]}),
        ({"guidance_scale": {"sr256": 4.0}}, {"guidance_scale": [7.0, 4.0]}),
        ({"low_res_noise_level": {"sr256": 0.2}}, {"low_res_noise_level": 0.2}),
        ({"guidance_interval": {"sr256": (0.1, 1.0)}}, {"guidance_interval": [None, (0.1, 1.0)]}),
        ({"guidance_rescale": {"sr256": 0.7}}, {"guidance_rescale": [0.0, 0.7]}),
        ({"sigmas": {"sr256": [80.0, 1.0]}}, {"sigmas": {"base": None, "sr256": [80.0, 1.0]}}),
        # of a stage that does not run
        ({"num_inference_steps": {"sr256": 9}, "output_resolution": 16}, {"output_resolution": 16}),
    ],
)
def test_stages_that_a_dict_does_not_name_have_their_default(parts, given, expected):
    pipe = ImagenCascadePipeline(**parts, call_defaults=GIVEN)
    images = draw(pipe, **given)
    assert torch.equal(images, draw(pipe, **expected)) and not torch.equal(images, draw(pipe))


def test_they_are_saved_with_the_pipeline(parts, tmp_path):
    pipe = ImagenCascadePipeline(**parts, call_defaults=GIVEN)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["call_defaults"] == GIVEN
    loaded = ImagenCascadePipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(loaded), draw(pipe))


def test_from_pipe_keeps_all_settings_and_components_has_none(parts):
    settings = {"call_defaults": GIVEN, "clean_caption": True, "origin": {"base": {"license": "karlo"}}}
    pipe = ImagenCascadePipeline(**parts, **settings)
    assert {name: ImagenCascadePipeline.from_pipe(pipe).config[name] for name in settings} == settings
    other = ImagenCascadePipeline.from_pipe(pipe, call_defaults=None)
    assert other.config.call_defaults is None and other.config.clean_caption
    # as in diffusers: the settings of a new pipeline are its arguments
    assert not settings.keys() & pipe.components.keys()
    config = ImagenCascadePipeline(**pipe.components).config
    assert [config[name] for name in settings] == [None, False, None]
    single = ImagenPipeline(parts["base_unet"], parts["base_scheduler"], call_defaults=GIVEN["base"])
    assert ImagenPipeline.from_pipe(single).config.call_defaults == GIVEN["base"]


def test_those_of_single_stages_are_flat(base_unet, sr_unet, parts):
    text = {name: parts[name] for name in ("tokenizer", "text_encoder")}
    for pipeline, unet, stage in (
        (ImagenPipeline, base_unet, "base"),
        (ImagenSuperResolutionPipeline, sr_unet, "sr256"),
    ):
        extra = {} if stage == "base" else {"scale_factor": 2}
        inputs = {} if stage == "base" else {"image": torch.rand(1, 3, 16, 16)}
        pipe = pipeline(unet, parts[f"{stage}_scheduler"], **text, **extra, call_defaults=GIVEN[stage])
        plain = pipeline(unet, parts[f"{stage}_scheduler"], **text, **extra)
        assert torch.equal(draw(pipe, **inputs), draw(plain, **inputs, **GIVEN[stage]))


def test_stages_without_text_are_not_guided_by_default(textless_pipeline):
    images = [
        textless_pipeline(generator=torch.Generator().manual_seed(0), output_type="pt", **given).images
        for given in ({}, {"guidance_scale": 1.0})
    ]
    assert torch.equal(*images)


@pytest.fixture
def textless_pipeline(base_unet) -> ImagenPipeline:
    from diffusers_imagen import EDMAdamsScheduler, ImagenUNetModel

    config = {**base_unet.config, "encoder_hid_dim": None}
    return ImagenPipeline(ImagenUNetModel.from_config(config), EDMAdamsScheduler())


@pytest.mark.parametrize(
    "given, message",
    [
        ({"base": {"steps": 3}}, "key of call_defaults of base` is 'steps'"),
        ({"base": {"guidance_scale": -1}}, "`guidance_scale` is -1"),
        ({"base": {"num_inference_steps": 1.5}}, "`num_inference_steps` is 1.5"),
        ({"sr256": {"low_res_noise_level": 0}}, "`low_res_noise_level` is 0"),
        (
            {"sr512": {}},
            r"`call_defaults` has \['sr512'\], but should have stage names among \['base', 'sr256', 'sr1024'\]",
        ),
        ({"base": 3}, "`call_defaults of base` is 3"),
        ([], r"`call_defaults` is \[\], but should be a dict by stage name"),
    ],
)
def test_what_no_call_has_is_refused(parts, given, message):
    with pytest.raises(ValueError, match=message):
        ImagenCascadePipeline(**parts, call_defaults=given)
