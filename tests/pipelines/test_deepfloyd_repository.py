"""Stages of DeepFloyd IF from folders and loaded pipelines of diffusers, beside diffusers' own two calls."""

import json
import shutil
from pathlib import Path

import deepfloyd_repository
import pytest
import torch
from deepfloyd_repository import stage_1, stage_2, write_repository
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    IFImg2ImgPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
)
from diffusers.pipelines.deepfloyd_if import pipeline_if_superresolution
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, T5EncoderModel

from diffusers_imagen import ImagenCascadePipeline, ImagenPipeline, ImagenSuperResolutionPipeline
from diffusers_imagen.pipelines.inputs import per_image_generators
from diffusers_imagen.pipelines.loading import deepfloyd_repository as repository
from diffusers_imagen.text.pretrained import load_text


STEPS, PROMPT = 5, "a red apple"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Repositories of both stages as folders, which tests must not change."""
    path = tmp_path_factory.mktemp("repositories")
    return {
        "I": write_repository(stage_1(), path / "IF-I"),
        "II": write_repository(stage_2(), path / "IF-II"),
        "I fp16": write_repository(stage_1(), path / "IF-I-fp16", variant="fp16"),
    }


@pytest.fixture
def copied(folders, tmp_path):
    """Copies a repository, for a test that changes its files; without weights."""

    def copied(name: str) -> Path:
        folder = tmp_path / folders[name].name
        shutil.copytree(folders[name], folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        return folder

    return copied


def seeded() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(0)]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, steps: int = 2, **kwargs) -> torch.Tensor:
    return quiet(pipe)(PROMPT, generator=seeded(), output_type="pt", num_inference_steps=steps, **kwargs).images


def draw_as_diffusers(first: IFPipeline, second: IFSuperResolutionPipeline, monkeypatch) -> torch.Tensor:
    """Both calls of diffusers' pipelines, with the noise that our cascade draws, in [0, 1]."""
    generators = per_image_generators(seeded(), 1)
    settings = {"num_inference_steps": STEPS, "generator": generators, "output_type": "pt"}
    text = dict(zip(("prompt_embeds", "negative_prompt_embeds"), first.encode_prompt(PROMPT)))
    small = quiet(first)(**text, **settings, height=16, width=16).images
    drawn = []

    def ordered(shape, **kwargs):
        """As `randn_tensor`; the noise of the low-resolution image, asked for last, is drawn before the sample's."""
        if not drawn:
            drawn.extend([randn_tensor(shape, **kwargs), randn_tensor(shape, **kwargs)])
        return drawn.pop()

    monkeypatch.setattr(pipeline_if_superresolution, "randn_tensor", ordered)
    images = quiet(second)(**text, **settings, image=small, height=32, width=32).images
    assert not drawn
    return (images / 2 + 0.5).clamp(0, 1)


def test_a_cascade_draws_what_diffusers_two_calls_draw(folders, monkeypatch):
    first, second = (DiffusionPipeline.from_pretrained(folders[name]) for name in ("I", "II"))
    expected = draw_as_diffusers(first, second, monkeypatch)
    pipe = ImagenCascadePipeline.from_stages(folders["I"], folders["II"], watermarker=None)
    images = draw(pipe, STEPS)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1


def test_the_prompt_and_the_stages_matter_to_these_images(folders):
    """What the comparison with diffusers would not notice otherwise."""
    pipe = quiet(ImagenCascadePipeline.from_stages(folders["I"], folders["II"], watermarker=None))
    images = draw(pipe)
    settings = {"prompt": PROMPT, "output_type": "pt", "num_inference_steps": 2}
    for changed in ({"prompt": "tiger"}, {"low_res_noise_level": 0.1}, {"guidance_scale": 5.0}):
        assert (pipe(**{**settings, **changed}, generator=seeded()).images - images).abs().max() > 1e-3


# Where stages come from


def test_every_source_makes_the_same_cascade(folders):
    expected = draw(ImagenCascadePipeline.from_stages(folders["I"], folders["II"]))
    loaded = [DiffusionPipeline.from_pretrained(folders[name]) for name in ("I", "II")]
    for sources in (
        loaded,
        [ImagenPipeline.from_stage(folders["I"]), str(folders["II"])],
    ):
        pipe = ImagenCascadePipeline.from_stages(*sources)
        assert torch.equal(draw(pipe), expected)
    pipe = ImagenCascadePipeline.from_stages(folders["I fp16"], loaded[1], variant="fp16")
    assert torch.equal(draw(pipe), expected)
    assert loaded[0].tokenizer.model_max_length == 512 and pipe.tokenizer.model_max_length == 77


def test_a_loaded_pipeline_shares_its_memory(folders):
    loaded = IFPipeline.from_pretrained(folders["I"])
    pipe = ImagenPipeline.from_stage(loaded)
    theirs, ours = ({tensor.data_ptr() for tensor in unet.state_dict().values()} for unet in (loaded.unet, pipe.unet))
    assert ours == theirs
    for name in ("text_encoder", "scheduler", "safety_checker", "watermarker", "feature_extractor"):
        assert getattr(pipe, name) is getattr(loaded, name)


def test_from_pipe_makes_a_stage_of_a_pipeline_of_diffusers():
    theirs = stage_1()
    ours = ImagenPipeline.from_pipe(theirs)
    assert ours.config.call_defaults == repository.call_defaults(upscales=False) and ours.config.clean_caption
    assert torch.equal(draw(ours), draw(ImagenPipeline.from_stage(theirs)))
    assert ImagenPipeline.from_pipe(ours).unet is ours.unet
    with pytest.raises(ValueError, match="a base stage, but should be a super-resolution stage"):
        ImagenSuperResolutionPipeline.from_pipe(theirs)


def test_options_of_loading_are_refused_where_nothing_is_loaded(folders):
    first, second = stage_1(), stage_2()
    with pytest.raises(ValueError, match="`dtype` is torch.float16, but should not be given"):
        ImagenCascadePipeline.from_stages(first, second, dtype=torch.float16)
    with pytest.raises(ValueError, match="`variant` is 'fp16', but should not be given"):
        ImagenPipeline.from_stage(first, variant="fp16")
    mixed = ImagenCascadePipeline.from_stages(first, folders["II"], dtype=torch.float16)
    assert (mixed.base_unet.dtype, mixed.sr256_unet.dtype) == (torch.float32, torch.float16)


def test_one_stage_alone(folders):
    first = DiffusionPipeline.from_pretrained(folders["I"])
    images = {name: draw(open_stage(folders["I"])) for name, open_stage in (
        ("from_stage", ImagenPipeline.from_stage),
        ("from_pretrained", ImagenPipeline.from_pretrained),
        ("image to image", lambda folder: ImagenPipeline.from_stage(IFImg2ImgPipeline(**first.components))),
    )}  # fmt: skip
    assert torch.equal(images["from_stage"], images["from_pretrained"])
    assert torch.equal(images["from_stage"], images["image to image"])
    small = torch.rand(1, 3, 16, 16)
    enlarge = ImagenSuperResolutionPipeline.from_pretrained(folders["II"], scale_factor=2)
    assert enlarge.config.scale_factor == 2 and draw(enlarge, image=small).shape[-1] == 32
    assert ImagenSuperResolutionPipeline.from_stage(folders["II"]).config.scale_factor == 4


def test_stage_2_enlarges_four_times_at_its_published_size():
    assert [repository.scale_factor(resolution) for resolution in (256, 512, 32, 64)] == [4, 8, None, None]


def test_calls_have_the_defaults_of_diffusers(folders):
    pipe = ImagenCascadePipeline.from_stages(folders["I"], folders["II"])
    base, upscaler = (stage.defaults for stage in pipe.stages)
    assert base[:2] == (100, 7.0) and upscaler[:2] == (50, 4.0)
    alpha_squared = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod[250].double().item()
    assert upscaler.low_res_noise_level == pytest.approx(((1 - alpha_squared) / alpha_squared) ** 0.5, rel=1e-4)
    assert upscaler.low_res_noise_level == pytest.approx(0.42684, abs=1e-5)
    assert pipe.config.clean_caption is True
    assert pipe.config.origin == {"base": {"license": "deepfloyd"}, "sr256": {"license": "deepfloyd"}}
    assert pipe.base_unet.trained_beta_schedule == "squaredcos_cap_v2"


def test_the_origin_is_named_where_it_is_known(copied, folders):
    folder = copied("I")
    shutil.copytree(folders["I"], folder, dirs_exist_ok=True)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_name_or_path": "DeepFloyd/IF-I-M-v1.0"}))
    pipe = ImagenPipeline.from_stage(folder, text_encoder=None, safety_checker=None)
    assert pipe.config.origin == {"base_model": "DeepFloyd/IF-I-M-v1.0", "license": "deepfloyd"}


def test_saving_writes_our_format_and_loading_needs_nothing_else(folders, tmp_path):
    pipe = ImagenCascadePipeline.from_stages(folders["I"], folders["II"])
    pipe.save_pretrained(tmp_path / "cascade")
    alone = ImagenPipeline.from_stage(folders["I"])
    alone.save_pretrained(tmp_path / "alone")
    expected = draw(pipe)
    for loader in (ImagenCascadePipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(str(tmp_path / "cascade"))
        assert type(loaded) is ImagenCascadePipeline
        assert torch.equal(draw(loaded), expected)
        for name in ("call_defaults", "clean_caption", "origin"):
            assert loaded.config[name] == pipe.config[name]
    for name, component in pipe.components.items():
        assert (loaded.components[name] is None) == (component is None)
    assert loaded.tokenizer.model_max_length == 77
    again = ImagenCascadePipeline.from_stages(tmp_path / "alone", folders["II"])
    assert torch.equal(draw(again), expected)


# What is loaded


def test_what_is_given_as_none_is_left_out(folders, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", refuse)
    parts = {"text_encoder": None, "safety_checker": None, "watermarker": None}
    for pipe in (
        ImagenCascadePipeline.from_stages(folders["I"], folders["II"], **parts),
        ImagenPipeline.from_pretrained(folders["I"], **parts),
    ):
        for name in (*parts, "tokenizer", "feature_extractor"):
            assert getattr(pipe, name) is None
    assert pipe.config.clean_caption is True


def test_a_saved_stage_is_loaded_without_the_text_encoder_that_is_left_out(folders, tmp_path, monkeypatch):
    ImagenPipeline.from_stage(folders["I"]).save_pretrained(tmp_path)
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", None)
    pipe = ImagenCascadePipeline.from_stages(tmp_path, text_encoder=None)
    assert pipe.text_encoder is None and pipe.base_unet is not None


def test_safety_parts_are_those_of_the_first_stage_that_has_them(folders, base_unet):
    theirs = [DiffusionPipeline.from_pretrained(folders[name]) for name in ("I", "II")]
    pipe = ImagenCascadePipeline.from_stages(*theirs)
    assert pipe.safety_checker is theirs[0].safety_checker and pipe.watermarker is theirs[0].watermarker
    base_unet.register_to_config(trained_beta_schedule=None)
    pipe = ImagenCascadePipeline.from_stages((base_unet, DDPMScheduler()), theirs[1], text_encoder=None)
    assert pipe.safety_checker is theirs[1].safety_checker and pipe.watermarker is theirs[1].watermarker
    assert pipe.config.call_defaults.keys() == {"sr256"} and pipe.config.clean_caption is False


def test_given_parts_take_the_place_of_the_repositories(folders):
    encoder, checker = deepfloyd_repository.text_encoder(), deepfloyd_repository.safety_checker()
    pipe = ImagenPipeline.from_stage(folders["I"], text_encoder=encoder, safety_checker=checker)
    assert pipe.text_encoder is encoder and pipe.safety_checker is checker
    assert pipe.tokenizer.model_max_length == 77 and pipe.feature_extractor is not None
    cascade = ImagenCascadePipeline.from_stages(folders["I"], text_encoder=folders["II"])
    assert Path(cascade.text_encoder.name_or_path) == folders["II"] and cascade.tokenizer.model_max_length == 77


def test_options_of_loading_arrive(folders):
    pipe = ImagenCascadePipeline.from_stages(folders["I"], folders["II"], dtype=torch.bfloat16)
    models = (pipe.base_unet, pipe.sr256_unet, pipe.text_encoder, pipe.safety_checker)
    assert {model.dtype for model in models} == {torch.bfloat16}
    with pytest.raises(ValueError, match="`device_map` is 'balanced', but should be None for DeepFloyd IF"):
        ImagenPipeline.from_stage(folders["I"], device_map="balanced")


def test_quantization_is_the_text_encoders(folders, monkeypatch):
    """It arrives where transformers quantizes; the networks, which are converted, see nothing of it."""
    asked = []
    load = T5EncoderModel.from_pretrained

    def from_pretrained(*args, quantization_config=None, **kwargs):
        asked.append(quantization_config)
        return load(*args, **kwargs)

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", from_pretrained)
    config = BitsAndBytesConfig(load_in_8bit=True)
    of_pipeline = PipelineQuantizationConfig(quant_mapping={"text_encoder": config})
    for quantization in (config, of_pipeline):
        ImagenCascadePipeline.from_stages(folders["I"], folders["II"], quantization_config=quantization)
        ImagenPipeline.from_stage(folders["I"], text_encoder=folders["II"], quantization_config=quantization)
    assert asked == [config] * 4


def test_quantization_of_anything_else_is_refused(folders):
    config = BitsAndBytesConfig(load_in_8bit=True)
    for quantization, message in (
        (PipelineQuantizationConfig(quant_mapping={"unet": config, "text_encoder": config}), "is for unet, but"),
        (PipelineQuantizationConfig("bitsandbytes_8bit", {"load_in_8bit": True}), "is for every component, but"),
        (8, "is 8, but should be a PipelineQuantizationConfig"),
    ):
        with pytest.raises(ValueError, match=f"`quantization_config` {message}"):
            ImagenPipeline.from_stage(folders["I"], quantization_config=quantization)
    for text_encoder in (None, deepfloyd_repository.text_encoder()):
        with pytest.raises(ValueError, match="but no text encoder is loaded from a folder or the Hub"):
            ImagenPipeline.from_stage(folders["I"], text_encoder=text_encoder, quantization_config=config)


# Bad input, all of which is found in small files: these folders have no weights


def change(folder: Path, file: str, **values) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **values}))


BAD_FILES = {
    "another kind of network": ("unet/config.json", {"act_fn": "silu"}, "`act_fn` is 'silu', but should be 'gelu'"),
    "other betas": (
        "scheduler/scheduler_config.json",
        {"beta_schedule": "linear"},
        "`beta_schedule of scheduler` is 'linear', but should be 'squaredcos_cap_v2'",
    ),
    "fewer steps": (
        "scheduler/scheduler_config.json",
        {"num_train_timesteps": 10**12},
        "`num_train_timesteps of scheduler` is 1000000000000, but should be 1000",
    ),
    "another prediction": (
        "scheduler/scheduler_config.json",
        {"prediction_type": "v_prediction"},
        "`prediction_type of scheduler` is 'v_prediction', but should be 'epsilon'",
    ),
    "a bound of nothing": (
        "scheduler/scheduler_config.json",
        {"sample_max_value": -3},
        "`sample_max_value of scheduler` is -3, but should be a finite number of at least 1",
    ),
    "a quantile of nothing": (
        "scheduler/scheduler_config.json",
        {"dynamic_thresholding_ratio": "a"},
        "`dynamic_thresholding_ratio of scheduler` is 'a'",
    ),
    "a component of others": ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "has 'vae', which is no"),
    "code": ("model_index.json", {"unet": ["pipeline", "UNet2DConditionModel"]}, r"has \['pipeline', 'UNet2D"),
    "another pipeline": (
        "model_index.json",
        {"_class_name": "IFSuperResolutionPipeline"},
        "is of IFSuperResolutionPipeline, but its network is one for a base stage",
    ),
    "no scheduler": ("model_index.json", {"scheduler": [None, None]}, "has no `scheduler`, which every IFPipeline"),
}


@pytest.mark.parametrize("file, values, message", BAD_FILES.values(), ids=BAD_FILES)
def test_what_a_repository_says_is_checked_before_its_weights_are_read(copied, file, values, message):
    folder = copied("I")
    change(folder, file, **values)
    for open_stage in (ImagenPipeline.from_pretrained, ImagenCascadePipeline.from_stages):
        with pytest.raises(ValueError, match=message) as error:
            open_stage(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_other_betas_of_the_augmentation_are_refused(copied):
    folder = copied("II")
    change(folder, "image_noising_scheduler/scheduler_config.json", beta_schedule="linear")
    with pytest.raises(ValueError, match="`beta_schedule of image_noising_scheduler` is 'linear'"):
        ImagenSuperResolutionPipeline.from_stage(folder)


def test_stages_in_each_others_places_are_refused(copied):
    first, second = copied("I"), copied("II")
    with pytest.raises(ValueError, match="`base` is '.*IF-II', a super-resolution stage, but should be a base stage"):
        ImagenCascadePipeline.from_stages(second)
    with pytest.raises(ValueError, match="`sr256` is '.*IF-I', a base stage, but should be a super-resolution stage"):
        ImagenCascadePipeline.from_stages(first, first)
    with pytest.raises(ValueError, match="open it with ImagenSuperResolutionPipeline"):
        ImagenPipeline.from_pretrained(second)
    with pytest.raises(ValueError, match="open it with ImagenPipeline"):
        ImagenSuperResolutionPipeline.from_pretrained(first)
    with pytest.raises(ValueError, match="ImagenCascadePipeline.from_stages for a cascade"):
        ImagenCascadePipeline.from_pretrained(first)


def test_stages_of_another_text_are_refused(copied, folders, text_encoder):
    first, second = copied("I"), copied("II")
    change(first, "text_encoder/config.json", d_model=32)
    with pytest.raises(
        ValueError, match="`base` is .*, which is conditioned on text of width 24, but the text encoder of .* has"
    ):
        ImagenCascadePipeline.from_stages(first, second)
    with pytest.raises(ValueError, match="width 24, but the given text encoder has width 16"):
        ImagenCascadePipeline.from_stages(folders["I"], second, text_encoder=text_encoder)


def test_a_tokenizer_without_its_packages_is_refused(copied, monkeypatch):
    monkeypatch.setattr(repository, "is_sentencepiece_available", lambda: False)
    first = copied("I")
    with pytest.raises(
        ValueError, match=r"needs sentencepiece and protobuf.*: `pip install 'diffusers-imagen\[t5\]'`"
    ):
        ImagenPipeline.from_pretrained(first)


def test_loaded_pipelines_of_another_kind_are_refused():
    other = stage_1(scheduler=DDPMScheduler())
    with pytest.raises(ValueError, match="`base` is 'IFPipeline', .*`beta_schedule of scheduler` is 'linear'"):
        ImagenCascadePipeline.from_stages(other)
    other = stage_1(scheduler=DPMSolverMultistepScheduler.from_config(deepfloyd_repository.schedule(1.5).config))
    assert ImagenPipeline.from_stage(other).scheduler is other.scheduler
    other.unet.register_to_config(act_fn="silu")
    with pytest.raises(
        ValueError, match="`source` is of class IFPipeline, which is not supported: `act_fn` is 'silu'"
    ):
        ImagenPipeline.from_stage(other)


UNET, WATERMARK = "unet/diffusion_pytorch_model.safetensors", "watermarker/diffusion_pytorch_model.safetensors"
DAMAGE = {
    "weights are missing": (UNET, lambda weights: weights.pop("conv_out.bias"), "unet' lacks weights: conv_out.bias"),
    "weights of no layer": (
        UNET,
        lambda weights: weights.update({"extra.weight": torch.zeros(2)}),
        "unet' has weights that its configuration does not have: extra.weight",
    ),
    "other shapes": (
        UNET,
        lambda weights: weights.update({"conv_out.bias": torch.zeros(3)}),
        "unet' has weights of other shapes than its configuration: conv_out.bias",
    ),
    "integers": (
        UNET,
        lambda weights: weights.update({"conv_out.bias": torch.zeros(6, dtype=torch.int32)}),
        "unet' has weights that are not in floating point: conv_out.bias",
    ),
    "no watermark": (
        WATERMARK,
        lambda weights: weights.update({"other": weights.pop("watermark_image")}),
        "watermarker' lacks weights: watermark_image",
    ),
    "a checker that finds nothing": (
        "safety_checker/model.safetensors",
        lambda weights: weights["p_head.bias"].fill_(float("nan")),
        "`safety_checker` has weights that are not finite, such as p_head.bias",
    ),
}


@pytest.mark.parametrize("file, damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_weights_are_refused(copied, folders, file, damage, message):
    folder = copied("I")
    shutil.copytree(folders["I"], folder, dirs_exist_ok=True)
    weights = load_file(folder / file)
    damage(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        ImagenPipeline.from_stage(folder)


def test_files_that_are_cut_off_or_missing_are_named(copied, folders):
    folder = copied("I")
    with pytest.raises(ValueError, match="unet' has no weights"):
        ImagenPipeline.from_stage(folder)
    shutil.copytree(folders["I"], folder, dirs_exist_ok=True)
    (folder / UNET).write_bytes((folders["I"] / UNET).read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors' is not a complete safetensors file"):
        ImagenPipeline.from_stage(folder)


def test_a_watermark_may_be_in_bytes(copied, folders):
    folder = copied("I")
    shutil.copytree(folders["I"], folder, dirs_exist_ok=True)
    save_file({"watermark_image": load_file(folder / WATERMARK)["watermark_image"].byte()}, folder / WATERMARK)
    watermarks = (ImagenPipeline.from_stage(source).watermarker.watermark_image for source in (folder, folders["I"]))
    assert torch.equal(*watermarks)


def test_a_tokenizer_without_its_vocabulary_is_refused(copied, folders):
    """To transformers' T5Tokenizer all words are one then, and all prompts one picture."""
    folder = copied("I")
    shutil.copytree(folders["I"], folder, dirs_exist_ok=True)
    (folder / "tokenizer" / "spiece.model").unlink()
    message = "tokenizer.* has no vocabulary except special tokens"
    for load in (
        lambda: ImagenPipeline.from_stage(folder),
        lambda: ImagenPipeline.from_stage(folders["I"], text_encoder=folder),
        lambda: load_text(str(folder)),
    ):
        with pytest.raises(ValueError, match=message):
            load()
