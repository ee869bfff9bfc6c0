"""The safety checker and the watermarker of DeepFloyd IF in this package's pipelines, beside diffusers' own of IF."""

import json

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from deepfloyd_networks import STAGE_1, STAGE_2, TEXT_WIDTH, TOKENS
from diffusers import DDPMScheduler, DiffusionPipeline, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.deepfloyd_if import IFWatermarker, pipeline_if_superresolution
from diffusers.utils.torch_utils import randn_tensor
from filter_parts import filter_parts, flag_above, safety_checker
from networks import randomize

from diffusers_imagen import ImagenCascadePipeline, ImagenPipeline, ImagenSuperResolutionPipeline
from diffusers_imagen.conversion.deepfloyd import unet_from_deepfloyd
from diffusers_imagen.diffusion.continuous_ddpm import log_snr_to_sigma
from diffusers_imagen.diffusion.discrete_ddpm import trained_log_snrs
from diffusers_imagen.pipelines.content_filter import finish_images
from diffusers_imagen.pipelines.inputs import per_image_generators
from diffusers_imagen.pipelines.loading.folder_checks import check_encoder, check_pipeline_folder


NUMBER = 4  # of images
# Two levels each, at sizes that a watermark fits on
BASE = {**STAGE_1, "sample_size": 32, "block_out_channels": (32, 32), "layers_per_block": 1} | {
    "down_block_types": STAGE_1["down_block_types"][:2],
    "up_block_types": STAGE_1["up_block_types"][-2:],
}
UPSCALER = {**STAGE_2, "sample_size": 64, "block_out_channels": (32, 32), "layers_per_block": 1} | {
    "down_block_types": STAGE_2["down_block_types"][-2:],
    "up_block_types": STAGE_2["up_block_types"][:2],
}
SIGMA_250 = log_snr_to_sigma(trained_log_snrs(1000, "squaredcos_cap_v2", 0.0, 0.0)[250]).item()


def schedule() -> DDPMScheduler:
    options = {"variance_type": "learned_range", "thresholding": True, "dynamic_thresholding_ratio": 0.95}
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, sample_max_value=1.0, **options)


@pytest.fixture(scope="module")
def networks() -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    made = []
    for seed, config in enumerate((BASE, UPSCALER)):
        torch.manual_seed(seed)
        made.append(randomize(UNet2DConditionModel(**config)).eval())
    return tuple(made)


@pytest.fixture
def text() -> dict[str, torch.Tensor]:
    embeds, negative = torch.randn(2, NUMBER, TOKENS, TEXT_WIDTH, generator=seeded(5))
    return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours_of(networks, **parts) -> ImagenCascadePipeline:
    base, upscaler = map(unet_from_deepfloyd, networks)
    return quiet(
        ImagenCascadePipeline(
            base, schedule(), sr256_unet=upscaler, sr256_scheduler=schedule(), **{**filter_parts(), **parts}
        )
    )


def draw(pipe, text, **arguments):
    given = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": seeded(), **arguments}
    masks = {name.replace("embeds", "attention_mask"): torch.ones(NUMBER, TOKENS) for name in text}
    return pipe(**text, **masks, **given)


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def is_black(images) -> list[bool]:
    return [bool((np.asarray(image) == 0).all()) for image in images]


@pytest.fixture(scope="module")
def tensors(networks) -> dict[int, torch.Tensor]:
    """What both stages make, in [-1, 1]."""
    embeds, negative = torch.randn(2, NUMBER, TOKENS, TEXT_WIDTH, generator=seeded(5))
    pipe = ours_of(networks, safety_checker=None, watermarker=None)
    text = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    return draw(pipe, text, output_type="latent").stage_images


@pytest.fixture
def drawn(tensors) -> dict[int, list]:
    """The same as pictures."""
    process = VaeImageProcessor(vae_scale_factor=1).postprocess
    return {resolution: process(x, output_type="pil") for resolution, x in tensors.items()}


@pytest.fixture
def ours(networks, drawn) -> ImagenCascadePipeline:
    """A pipeline that flags an image of the last stage as unfit and one as marked."""
    pipe = ours_of(networks)
    flag_above(pipe, drawn[64], "p_head", 1)
    flag_above(pipe, drawn[64], "w_head", 1)
    return pipe


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_stage_1_is_that_of_diffusers(networks, text, drawn, output_type):
    parts = filter_parts()
    pipe = quiet(ImagenPipeline(unet_from_deepfloyd(networks[0]), schedule(), **parts))
    flag_above(pipe, drawn[32], "p_head", 1)
    flag_above(pipe, drawn[32], "w_head", 2)
    others = {"tokenizer": None, "text_encoder": None}
    theirs = quiet(IFPipeline(unet=networks[0], scheduler=schedule(), **others, **parts))
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": output_type}
    generators = per_image_generators(seeded(), NUMBER)
    expected = theirs(**text, **settings, height=32, width=32, generator=generators)
    out = draw(pipe, text, output_type=output_type)
    assert (out.nsfw_detected, out.watermark_detected) == (expected.nsfw_detected, expected.watermark_detected)
    if output_type == "pt":
        torch.testing.assert_close(out.images * 2 - 1, expected.images, atol=1e-4, rtol=0)
        assert out.nsfw_detected is None
        return
    assert (sum(out.nsfw_detected), sum(out.watermark_detected)) == (1, 2)
    images, references = (pixels(x).astype(float) for x in (out.images, expected.images))
    np.testing.assert_allclose(images, references, rtol=0, atol=1 if output_type == "pil" else 1e-4)
    assert (images != references).mean() < 0.01 or output_type == "np"  # of rounding
    flagged = [a or b for a, b in zip(out.nsfw_detected, out.watermark_detected)]
    if output_type == "np":
        assert is_black(out.images) == flagged
    else:
        marks = theirs.watermarker.apply_watermark([x.copy() for x in drawn[32]], 32)
        kept = [index for index, found in enumerate(flagged) if not found]
        assert kept and all(np.array_equal(out.images[index], marks[index]) for index in kept)
        assert not np.array_equal(marks[kept[0]], drawn[32][kept[0]])


def test_stage_2_is_that_of_diffusers(networks, text, monkeypatch):
    noise = torch.randn(NUMBER, 3, 64, 64, generator=seeded(9))
    low_res = torch.rand(NUMBER, 3, 32, 32, generator=seeded(8)) * 2 - 1
    parts = filter_parts()
    pipe = quiet(ImagenSuperResolutionPipeline(unet_from_deepfloyd(networks[1]), schedule(), scale_factor=2, **parts))
    arguments = {"image": low_res, "latents": noise, "low_res_noise_level": SIGMA_250}
    plain = quiet(ImagenSuperResolutionPipeline(pipe.unet, schedule(), scale_factor=2))
    flag_above(pipe, draw(plain, text, **arguments).images, "p_head", 2)
    theirs = IFSuperResolutionPipeline(
        unet=networks[1],
        scheduler=schedule(),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=None,
        text_encoder=None,
        **parts,
    )
    given = iter([noise])  # the first that diffusers draws is the sample's
    monkeypatch.setattr(
        pipeline_if_superresolution,
        "randn_tensor",
        lambda *a, **kw: found if (found := next(given, None)) is not None else randn_tensor(*a, **kw),
    )
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "noise_level": 250, "height": 64, "width": 64}
    generators = per_image_generators(seeded(), NUMBER)
    expected = quiet(theirs)(image=low_res, **text, **settings, generator=generators)
    out = draw(pipe, text, **arguments)
    assert (out.nsfw_detected, out.watermark_detected) == (expected.nsfw_detected, expected.watermark_detected)
    assert sum(out.nsfw_detected) == 2
    images, references = pixels(out.images).astype(int), pixels(expected.images).astype(int)
    np.testing.assert_allclose(images, references, rtol=0, atol=1)
    assert (images != references).mean() < 0.01


def test_an_image_that_is_flagged_at_a_stage_is_black_at_all(ours, networks, text, drawn):
    for head in ("p_head", "w_head"):
        flag_above(ours, drawn[32] + drawn[64], head, 1)  # one image at one stage, whatever the scores are
    flags = {}
    for resolution, pictures in drawn.items():
        clip = ours.feature_extractor(pictures, return_tensors="pt").pixel_values
        arrays = pixels(pictures).astype(np.float32) / 255
        flags[resolution] = np.array(ours.safety_checker(images=arrays, clip_input=clip)[1:])
    expected = np.any(list(flags.values()), axis=0)
    assert not np.array_equal(*flags.values()) and not expected.any(0).all()  # else nothing is tested
    out = draw(ours, text, output_type="np")
    assert [out.nsfw_detected, out.watermark_detected] == expected.tolist()
    assert is_black(out.images) == is_black(out.stage_images[32]) == expected.any(0).tolist()
    as_tuple = draw(ours, text, output_type="np", return_dict=False)
    assert np.array_equal(as_tuple[0], out.images) and as_tuple[2:] == (out.nsfw_detected, out.watermark_detected)


def test_the_watermark_has_the_size_of_the_stage(ours, tensors, drawn):
    ours.safety_checker = None
    finished = finish_images(ours, tensors, "pil")
    assert finished[1:] == (None, None)
    for resolution, pictures in drawn.items():
        marked = ours.watermarker.apply_watermark([picture.copy() for picture in pictures], resolution)
        assert np.array_equal(pixels(finished.images[resolution]), pixels(marked))
        assert not np.array_equal(pixels(pictures), pixels(marked))
    for resolution, size in ((16, 64), (64, 32)):  # pictures of another size than the network's
        marked = ours.watermarker.apply_watermark([picture.copy() for picture in drawn[size]], resolution)
        found = finish_images(ours, {resolution: tensors[size]}, "pil").images[resolution]
        assert np.array_equal(pixels(found), pixels(marked))


def test_no_watermark_where_it_is_below_a_pixel(base_pipeline, run):
    expected = run(base_pipeline, output_type="pil").images
    base_pipeline.watermarker = filter_parts()["watermarker"]
    assert np.array_equal(pixels(run(base_pipeline, output_type="pil").images), pixels(expected))


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_tensors_are_not_filtered(ours, tensors, output_type):
    finished = finish_images(ours, tensors, output_type)
    for resolution, x in tensors.items():
        expected = x if output_type == "latent" else x * 0.5 + 0.5
        assert torch.equal(finished.images[resolution], expected)
    assert finished[1:] == (None, None)


def test_without_parts_nothing_is_copied(ours, tensors):
    ours.safety_checker = ours.watermarker = None
    assert all(x is finish_images(ours, tensors, "latent").images[size] for size, x in tensors.items())


def test_the_checker_works_in_slices(ours, tensors):
    expected = finish_images(ours, tensors, "pil")
    batches = []
    ours.safety_checker.vision_model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    ours.enable_slicing(3)
    finished = finish_images(ours, tensors, "pil")
    assert batches == [3, 1, 3, 1]
    assert finished[1:] == expected[1:] and any(expected.nsfw_detected)
    assert all(np.array_equal(pixels(x), pixels(expected.images[size])) for size, x in finished.images.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_checker_reads_its_own_dtype(ours, tensors, dtype):
    expected = finish_images(ours, tensors, "np")
    ours.safety_checker.to(dtype)
    seen = []
    ours.safety_checker.vision_model.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert finish_images(ours, tensors, "np")[1:] == expected[1:]
    assert seen == [dtype, dtype]


def test_it_goes_where_the_pipeline_goes(ours, tensors):
    expected = finish_images(ours, tensors, "np")
    ours.to(torch.bfloat16)
    assert ours.safety_checker.dtype == ours.watermarker.dtype == torch.bfloat16
    assert "watermarker" in ours.memory_report()
    ours.to(torch.float32)
    cpu_offload(ours.safety_checker, torch.device("cpu"))
    assert ours.safety_checker.device.type == "meta"  # where its inputs would be lost
    assert finish_images(ours, tensors, "np")[1:] == expected[1:]
    for pipeline in (ImagenPipeline, ImagenSuperResolutionPipeline, ImagenCascadePipeline):
        assert pipeline.model_cpu_offload_seq.endswith("->safety_checker")
        assert pipeline._exclude_from_cpu_offload == ["watermarker"]


def test_round_trip(ours, tensors, tmp_path):
    ours.save_pretrained(tmp_path)
    expected = finish_images(ours, tensors, "pil")
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["safety_checker"] == ["deepfloyd_if", "IFSafetyChecker"]
    for loaded in (DiffusionPipeline.from_pretrained(tmp_path), ImagenCascadePipeline.from_pipe(ours)):
        finished = finish_images(loaded, tensors, "pil")
        assert np.array_equal(pixels(finished.images[64]), pixels(expected.images[64]))
        assert finished[1:] == expected[1:] and any(expected.nsfw_detected)
    left_out = ImagenCascadePipeline.from_pretrained(tmp_path, safety_checker=None, watermarker=None)
    assert left_out.safety_checker is None and left_out.watermarker is None
    assert finish_images(left_out, tensors, "pil")[1:] == (None, None)
    assert check_pipeline_folder(tmp_path, ("ImagenCascadePipeline",))["watermarker"] is IFWatermarker


def test_a_folder_with_more_layers_than_anybody_waits_for_is_refused(tmp_path):
    ours = filter_parts()["safety_checker"]
    config = json.loads(ours.config.to_json_string(use_diff=False))
    check_encoder(tmp_path, config)
    config["vision_config"]["num_hidden_layers"] = 10**6
    with pytest.raises(ValueError, match="has `num_hidden_layers` 1000000, but should have at most 1000 layers"):
        check_encoder(tmp_path, config)


BAD = {
    "no extractor": (lambda: filter_parts(feature_extractor=None), "`feature_extractor` is None, but should be the image"),
    "no checker": (lambda: filter_parts(safety_checker=torch.nn.Linear(1, 1)), "`safety_checker` is Linear.* should be an IF"),
    "an extractor of another kind": (lambda: filter_parts(feature_extractor=len), "`feature_extractor` is <built-in"),
    "no watermarker": (lambda: filter_parts(watermarker=safety_checker()), "but should be an IFWatermarker"),
}  # fmt: skip


@pytest.mark.parametrize("parts, message", BAD.values(), ids=BAD)
def test_bad_parts(base_unet, parts, message):
    with pytest.raises(ValueError, match=message):
        ImagenPipeline(base_unet, schedule(), **parts())


def test_a_checker_without_an_extractor_is_told_of_before_a_network_runs(ours, text):
    ours.feature_extractor = None
    ours.base_unet.forward = None
    with pytest.raises(ValueError, match="`feature_extractor` is None"):
        draw(ours, text)
