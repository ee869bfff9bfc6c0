"""Stages alone, in folders, composed, and shared between pipelines."""

import inspect
import json

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)
from networks import save_index
from transformers import T5Config, T5EncoderModel

from diffusers_imagen import (
    EDMHeunScheduler,
    EfficientUNetModel,
    ImagenCascadePipeline,
    ImagenPipeline,
    ImagenSuperResolutionPipeline,
    ImagenUNetModel,
)
from diffusers_imagen.pipelines.stage_table import BASE, STAGES
from diffusers_imagen.pipelines.stages import missing_weights
from diffusers_imagen.text.encoder import keep_in_fp32


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def folders(tmp_path, base_unet, sr_unet):
    """Stage folders as training writes them: `unet/` and `scheduler/`."""
    for name, unet in (("base", base_unet), ("sr", sr_unet)):
        unet.save_pretrained(tmp_path / name / "unet")
        EDMHeunScheduler(clip_sample=True).save_pretrained(tmp_path / name / "scheduler")
    return tmp_path


def test_the_base_pipeline_is_the_base_stage(base_pipeline, cascade, run):
    out = run(base_pipeline, guidance_scale=3.0)
    assert list(out.stage_images) == [16]
    assert torch.equal(out.images, run(cascade, guidance_scale=3.0, output_resolution=16).images)
    assert run(base_pipeline, height=24, width=32).images.shape == (1, 3, 24, 32)


def test_the_super_resolution_pipeline_is_that_stage(sr_pipeline, cascade, run, picture):
    small = picture[..., ::2, ::2]
    assert torch.equal(run(sr_pipeline, image=small).images, run(cascade, image=small).images)
    assert run(sr_pipeline, image=picture[..., :20]).images.shape == (1, 3, 64, 40)  # twice its own size
    assert run(sr_pipeline, image=picture, height=32, width=48).images.shape == (1, 3, 32, 48)


def test_single_stages_survive_saving(base_pipeline, sr_pipeline, run, picture, tmp_path):
    for pipe, arguments in ((base_pipeline, {}), (sr_pipeline, {"image": picture})):
        expected = run(pipe, **arguments).images
        folder = tmp_path / type(pipe).__name__
        pipe.save_pretrained(folder)
        for loader in (type(pipe), DiffusionPipeline):
            loaded = quiet(loader.from_pretrained(folder))
            assert type(loaded) is type(pipe)
            assert torch.equal(run(loaded, **arguments).images, expected)
    assert loaded.config.scale_factor == 2


def test_auto_pipelines_know_the_tasks(base_pipeline, cascade, tmp_path):
    for pipe in (base_pipeline, cascade):
        folder = tmp_path / type(pipe).__name__
        pipe.save_pretrained(folder)
        for auto in (AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting):
            assert type(auto.from_pretrained(folder)) is type(pipe)
            assert type(auto.from_pipe(pipe)) is type(pipe)


def test_from_pipe_shares_every_component(cascade, base_pipeline):
    for pipe in (cascade, base_pipeline):
        other = type(pipe).from_pipe(pipe)
        assert other.components.keys() == pipe.components.keys()
        assert all(other.components[name] is component for name, component in pipe.components.items())


@pytest.mark.parametrize("indexed", [False, True])
def test_a_cascade_of_stage_folders(folders, cascade, tokenizer, text_encoder, run, indexed):
    if indexed:
        save_index(folders / "base")
        save_index(folders / "sr", scale_factor=2)
        assert type(DiffusionPipeline.from_pretrained(folders / "base")) is ImagenPipeline
        alone = ImagenSuperResolutionPipeline.from_pretrained(folders / "sr")
        assert type(alone.unet) is EfficientUNetModel and alone.config.scale_factor == 2
        assert not list(folders.rglob("*.partial"))
    pipe = ImagenCascadePipeline.from_stages(
        folders / "base", sr256=str(folders / "sr"), text_encoder=text_encoder, tokenizer=tokenizer
    )
    assert torch.equal(run(quiet(pipe)).images, run(cascade).images)
    assert pipe.sr1024_unet is None


def test_a_cascade_of_pipelines_and_pairs(base_pipeline, sr_unet, cascade, run):
    pipe = ImagenCascadePipeline.from_stages(base_pipeline, sr256=(sr_unet, EDMHeunScheduler(clip_sample=True)))
    assert pipe.text_encoder is base_pipeline.text_encoder and pipe.base_unet is base_pipeline.unet
    assert torch.equal(run(quiet(pipe)).images, run(cascade).images)


def test_an_index_names_the_text_parts_that_are_there(folders, tokenizer, text_encoder, run, base_pipeline):
    tokenizer.save_pretrained(folders / "base" / "tokenizer")
    text_encoder.save_pretrained(folders / "base" / "text_encoder")
    save_index(folders / "base", tokenizer=tokenizer, text_encoder=text_encoder)
    loaded = quiet(ImagenPipeline.from_pretrained(folders / "base"))
    assert torch.equal(run(loaded).images, run(base_pipeline).images)
    composed = ImagenCascadePipeline.from_stages(folders / "base", text_encoder=str(folders / "base"))
    assert type(composed.text_encoder) is type(text_encoder) and composed.tokenizer is not None
    # diffusers itself writes the same
    by_hand = json.loads((folders / "base" / "model_index.json").read_text())
    loaded.save_pretrained(folders / "again")
    saved = json.loads((folders / "again" / "model_index.json").read_text())
    assert by_hand == {key: value for key, value in saved.items() if not key.startswith("_name")}


def test_stages_that_do_not_fit_are_refused(base_unet, sr_unet, tmp_path):
    scheduler = EDMHeunScheduler()
    with pytest.raises(
        ValueError, match="`base` is of class tuple, a super-resolution stage, but should be a base stage"
    ):
        ImagenCascadePipeline.from_stages((sr_unet, scheduler))
    with pytest.raises(
        ValueError, match="`sr256` is of class tuple, a base stage, but should be a super-resolution stage"
    ):
        ImagenCascadePipeline.from_stages((base_unet, scheduler), (base_unet.at_resolution(32), scheduler))
    with pytest.raises(ValueError, match="`sr1024` is for 32 px, which is not a multiple of the 32 px of `sr256`"):
        base_unet.at_resolution(16)
        ImagenCascadePipeline.from_stages((base_unet, scheduler), (sr_unet, scheduler), (sr_unet, scheduler))
    for source in (3, (base_unet,), (base_unet, base_unet), scheduler):
        with pytest.raises(ValueError, match="but should be a folder, a Hub id, a single-stage pipeline"):
            ImagenCascadePipeline.from_stages(source)
    with pytest.raises(ValueError, match="neither a model_index.json nor a network in unet/"):
        ImagenCascadePipeline.from_stages(tmp_path)


def test_untrained_stages_are_refused(base_pipeline, sr_pipeline, run, picture, tmp_path, caplog):
    for name, pipe in (("base", base_pipeline), ("sr256", sr_pipeline)):
        untrained = type(pipe.unet).from_config(pipe.unet.config)
        untrained.save_pretrained(tmp_path / name)
        loaded = type(untrained).from_pretrained(tmp_path / name)
        stages = {"base": (base_pipeline.unet, base_pipeline.scheduler), name: (loaded, pipe.scheduler)}
        with pytest.raises(ValueError, match=f"stage `{name}`, loaded from .*is untrained"):
            ImagenCascadePipeline.from_stages(**stages)
        stages[name] = (untrained, pipe.scheduler)  # built here: the caller's to judge
        ImagenCascadePipeline.from_stages(**stages)


def test_a_call_warns_of_untrained_networks(base_pipeline, run, tmp_path, monkeypatch):
    type(base_pipeline.unet).from_config(base_pipeline.unet.config).save_pretrained(tmp_path)
    warnings = []
    monkeypatch.setattr("diffusers_imagen.pipelines.stages.logger.warning", warnings.append)
    run(base_pipeline)
    assert warnings == []
    base_pipeline.unet = type(base_pipeline.unet).from_pretrained(tmp_path)
    run(base_pipeline)
    assert len(warnings) == 1 and "is untrained" in warnings[0]


def test_missing_weights_are_refused(base_pipeline, run, tmp_path):
    base_pipeline.unet.save_pretrained(tmp_path)
    unet = ImagenUNetModel.from_pretrained(tmp_path)
    unet.mid_blocks[0].to("meta")
    base_pipeline.unet = unet
    with pytest.raises(ValueError, match="lacks weights: mid_blocks.0"):
        run(base_pipeline)


def test_an_image_is_needed_to_enlarge(sr_pipeline, run):
    with pytest.raises(ValueError, match="`image` is None"):
        run(sr_pipeline)
    with pytest.raises(ValueError, match=r"images of the sizes \[\(8, 8\), \(16, 16\)\]: pass `height`"):
        run(sr_pipeline, ["a", "red"], image=[torch.rand(3, 8, 8), torch.rand(3, 16, 16)])
    sr_pipeline.register_to_config(scale_factor=3)
    with pytest.raises(ValueError, match="`scale_factor` is 3, which does not divide the network's 32 px"):
        run(sr_pipeline, image=torch.rand(3, 8, 8))


def test_layers_that_float16_is_too_narrow_for_stay_in_float32(base_pipeline):
    config = T5Config(
        vocab_size=12, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    encoder = base_pipeline.text_encoder = T5EncoderModel(config)
    base_pipeline.to(torch.float16)
    dtypes = {name.split(".")[-2]: parameter.dtype for name, parameter in encoder.named_parameters()}
    assert dtypes["wo"] == torch.float32 and dtypes["wi_0"] == dtypes["q"] == torch.float16
    encoder.to(torch.bfloat16)
    keep_in_fp32(encoder)
    assert all(parameter.dtype == torch.bfloat16 for parameter in encoder.parameters())
    states, mask, *_ = base_pipeline.to(torch.float16).encode_prompt("a red apple")
    assert states.dtype == torch.float16 and states.isfinite().all() and mask.sum() > 0


def test_encoding_first_and_freeing_the_encoder(cascade, run):
    """The recipe of docs/memory.md."""
    expected = run(cascade, negative_prompt="face").images
    text = cascade.encode_prompt("a red apple", "face")
    cascade.text_encoder = cascade.tokenizer = None
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    assert torch.equal(run(cascade, None, **dict(zip(names, text))).images, expected)


def test_memory_report_counts_the_weights(cascade):
    report = cascade.memory_report()
    sizes = [4 * sum(p.numel() for p in m.parameters()) / 2**20 for m in (cascade.base_unet, cascade.sr256_unet)]
    lines = {line.split()[0]: line for line in report.splitlines()}
    assert f"{sizes[0]:.1f} MiB" in lines["base_unet"] and "torch.float32" in lines["sr256_unet"]
    assert lines.keys() == {"text_encoder", "base_unet", "sr256_unet", "all"}


def test_group_offloading_by_leaves_gives_the_same_images(cascade, run):
    expected = run(cascade, guidance_scale=3.0).images
    cascade.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(run(cascade, guidance_scale=3.0).images, expected)


@pytest.mark.compile
def test_compiled_networks_are_networks(cascade, base_unet, run, tmp_path):
    expected = run(cascade, output_resolution=16).images
    compiled = torch.compile(base_unet, backend="eager")
    pipe = ImagenCascadePipeline.from_stages(
        (compiled, cascade.base_scheduler), text_encoder=cascade.text_encoder, tokenizer=cascade.tokenizer
    )
    assert pipe.base_unet is compiled
    torch.testing.assert_close(run(quiet(pipe)).images, expected, atol=1e-5, rtol=1e-5)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(run(quiet(ImagenCascadePipeline.from_pretrained(tmp_path))).images, expected)
    assert not missing_weights(compiled) and not compiled.is_untrained()
    base_unet.register_to_config(_name_or_path="somewhere")
    base_unet.conv_out.to("meta")
    with pytest.raises(ValueError, match="the stage `base`, loaded from 'somewhere', lacks weights: conv_out.weight"):
        run(pipe)


def test_stages_are_composed_by_what_they_were_trained_for(base_pipeline, sr_pipeline):
    assert sr_pipeline.config.scale_factor == 2
    other = ImagenSuperResolutionPipeline(sr_pipeline.unet, sr_pipeline.scheduler, scale_factor=4)
    with pytest.raises(ValueError, match="`sr256` was trained to upscale images of 8 px, but those of `base`.* 16 px"):
        ImagenCascadePipeline.from_stages(base_pipeline, other)
    with pytest.raises(ValueError, match="`sr256` is given by name, but `upscalers` has it too"):
        ImagenCascadePipeline.from_stages(base_pipeline, sr_pipeline, sr256=sr_pipeline)
    with pytest.raises(ValueError, match="`upscalers` has 3 stages, but should have at most 2"):
        ImagenCascadePipeline.from_stages(base_pipeline, sr_pipeline, sr_pipeline, sr_pipeline)


def test_the_constructor_has_the_components_of_every_stage():
    names = set(inspect.signature(ImagenCascadePipeline).parameters)
    assert {name for kind in STAGES for name in (kind.unet, kind.scheduler)} <= names
    settings = {"call_defaults", "clean_caption", "origin"}
    assert set(ImagenCascadePipeline._optional_components) == names - settings - {BASE.unet, BASE.scheduler}


def test_an_overridden_encode_prompt_is_what_a_call_uses(base_pipeline, run):
    class Halved(ImagenPipeline):
        def encode_prompt(self, *args, **kwargs):
            embeds, *others = super().encode_prompt(*args, **kwargs)
            return embeds / 2, *others

    embeds, mask, negative, negative_mask = base_pipeline.encode_prompt("a red apple")
    given = {"prompt_embeds": embeds / 2, "prompt_attention_mask": mask}
    expected = run(base_pipeline, prompt=None, **given).images
    halved = quiet(Halved(**base_pipeline.components))
    assert torch.equal(run(halved).images, expected)
    assert not torch.equal(run(base_pipeline).images, expected)


def test_a_cascade_without_its_base_stage_says_so(cascade, run):
    cascade.base_unet = None
    with pytest.raises(
        ValueError, match="The first stage is `sr256`, a super-resolution stage, but there is no base stage"
    ):
        run(cascade)


def test_networks_in_the_wrong_place_are_named_first(base_unet, sr_unet, tokenizer, text_encoder, run, picture):
    wrong = ImagenPipeline(sr_unet, EDMHeunScheduler(), tokenizer, text_encoder)
    with pytest.raises(
        ValueError, match="stage `base` has `low_res_conditioning=True`: it is one for super-resolution"
    ):
        run(wrong)
    wrong = ImagenSuperResolutionPipeline(base_unet, EDMHeunScheduler(), tokenizer, text_encoder, scale_factor=2)
    with pytest.raises(ValueError, match="stage `sr256` has `low_res_conditioning=False`: it is one for a base"):
        run(wrong, image=picture, low_res_noise_level=[0.1])


def test_latents_say_the_size(base_pipeline, run):
    latents = torch.randn(1, 3, 16, 16)
    expected = run(base_pipeline, latents=latents).images
    assert torch.equal(run(base_pipeline, latents=latents, height=16.0).images, expected)
