"""Stages of DeepFloyd IF's kind trained further, beside diffusers' formulas, encoders and pipelines of IF."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from deepfloyd_networks import STAGE_1, STAGE_2, TEXT_WIDTH, TOKENS
from deepfloyd_repository import network, schedule, stage_1, stage_2, write_repository
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from tiny_runs import are_equal, losses, weights_of
from torch.nn import functional

from diffusers_imagen import (
    EDMAdamsScheduler,
    ImagenCascadePipeline,
    ImagenPipeline,
    ImagenSuperResolutionPipeline,
    ImagenUNetModel,
)
from diffusers_imagen.conversion.deepfloyd import unet_from_deepfloyd, unet_to_deepfloyd, weight_names
from diffusers_imagen.pipelines.inputs import per_image_generators
from diffusers_imagen.text.cache_writer import CacheWriter, write_cache
from diffusers_imagen.text.encoder import TextEncoder
from diffusers_imagen.training import (
    DreamBoothTrainingConfig,
    LoraTrainer,
    LoraTrainingConfig,
    Trainer,
    TrainingConfig,
)
from diffusers_imagen.training.command import run_training
from diffusers_imagen.training.data import Batch
from diffusers_imagen.training.finetuning.dreambooth import make_trainer
from diffusers_imagen.training.network import make_unet
from diffusers_imagen.training.objective.losses import Conditioning, denoising_loss, to_device
from diffusers_imagen.training.objective.objectives import make_objective
from diffusers_imagen.training.objective.step_draws import StepDraws
from diffusers_imagen.training.pretrained_stage import find_pretrained
from diffusers_imagen.utils.errors import run_program


DISCRETE = {"preconditioning": "discrete"}
LINEAR = DDPMScheduler(beta_schedule="linear")
COSINE = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
FEW = {"num_inference_steps": 2, "guidance_scale": 3.0}  # of calls in tests


@pytest.fixture(scope="session")
def repositories(tmp_path_factory) -> dict[str, Path]:
    """Stage I and II as their repositories have them, without safety parts."""
    safety = {"safety_checker": None, "feature_extractor": None, "watermarker": None}
    place = tmp_path_factory.mktemp("deepfloyd")
    return {
        "stage 1": write_repository(stage_1(**safety), place / "if-i"),
        "stage 2": write_repository(stage_2(**safety), place / "if-ii"),
    }


@pytest.fixture(scope="session")
def converted(repositories, tmp_path_factory) -> dict[str, str]:
    """The same in this package's format, called with few steps."""
    place = tmp_path_factory.mktemp("converted")
    settings = {
        "call_defaults": FEW,
        "clean_caption": True,
        "origin": {"base_model": "DeepFloyd/IF-I-M-v1.0", "license": "deepfloyd"},
    }
    for name, kind, more in (
        ("stage 1", ImagenPipeline, {}),
        ("stage 2", ImagenSuperResolutionPipeline, {"scale_factor": 2}),
    ):
        unet = UNet2DConditionModel.from_pretrained(repositories[name], subfolder="unet")
        scheduler = DDPMScheduler.from_pretrained(repositories[name], subfolder="scheduler")
        kind(unet_from_deepfloyd(unet), scheduler, **more, **settings).save_pretrained(place / name)
    return {name: str(place / name) for name in repositories}


@pytest.fixture
def settings_of(imagefolder, tmp_path, repositories, fresh_accelerator):
    """The settings of a run of two steps on a stage of a repository, or of this package's format."""

    def settings_of(name: str, place: str | None = None, **kwargs) -> dict:
        sizes = {"stage 1": {"resolution": 16}, "stage 2": {"resolution": 32, "low_resolution": 16}}[name]
        given = {
            "preset": None,
            "pretrained_model_name_or_path": str(place or repositories[name]),
            "text_encoder": str(repositories["stage 1"]),
            "preconditioning": "discrete",
            "max_train_steps": 2,
            "train_batch_size": 2,
            "text_drop_rate": 0.5,
            **sizes,
        }
        output_dir = kwargs.pop("output_dir", tmp_path / "out")
        return tiny_runs.settings(imagefolder, output_dir, **{**given, **kwargs})

    return settings_of


def trained(settings: dict, trainer_class=Trainer, config_class=TrainingConfig) -> Trainer:
    tiny_runs.reset_accelerate()
    config = config_class(**settings)
    trainer = trainer_class(config, make_unet(config))
    trainer.train()
    return trainer


def run_script(monkeypatch, settings: dict, config_class=TrainingConfig, trainer=Trainer) -> int:
    """The exit code of a training script with these flags."""
    flags = []
    for name, value in settings.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, values)]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    tiny_runs.reset_accelerate()
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: run_training(config_class, lambda: trainer))
    return ended.value.code


# ---- the loss


def batch_of(side: int, low_side: int | None) -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(4, 3, side, side, generator=generator) * 2 - 1
    low_res = None if low_side is None else torch.rand(4, 3, low_side, low_side, generator=generator) * 2 - 1
    text = torch.randn(4, TOKENS, TEXT_WIDTH, generator=generator)
    return Batch(images, low_res, text, torch.arange(TOKENS).expand(4, -1) < 3)


@pytest.mark.parametrize("stage", ["stage 1", "stage 2"])
def test_loss_and_gradient_are_those_of_diffusers(stage):
    """DDPM's noise, the MSE of the first half of the channels, and for stage II IF's own augmentation; same draws."""
    theirs = network({"stage 1": STAGE_1, "stage 2": STAGE_2}[stage], 0).train()
    ours = unet_from_deepfloyd(theirs)
    batch = batch_of(16, None) if stage == "stage 1" else batch_of(32, 16)
    config = TrainingConfig(preset="emoji_base_64", text_drop_rate=0.5, **DISCRETE)
    objective = make_objective(config)
    no_text = torch.randn(1, TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(4))
    conditioning = Conditioning.of(ours, no_text=no_text)
    given = to_device(batch, torch.device("cpu"), conditioning=conditioning)
    draws = StepDraws(objective, seed=0)
    draws.begin(0, 0, 4)
    draws = draws(0, given)
    loss = denoising_loss(ours, given, draws, objective, config, conditioning)
    loss.mean().backward()

    index = objective.example(batch.images, draws.noise, draws.log_snr).timestep
    assert torch.equal(index, index.round()) and len(index.unique()) == 4
    dropped = draws.text < 0.5
    assert dropped.any() and not dropped.all()
    x = COSINE.add_noise(batch.images, draws.noise, index.long())
    labels = None
    if stage == "stage 2":
        labels = (draws.augmentation * 1000).long()
        upsampled = functional.interpolate(batch.low_res, 32, mode="bilinear", align_corners=True)
        x = torch.cat([x, COSINE.add_noise(upsampled, draws.low_res_noise, labels)], dim=1)
    text = torch.where(dropped[:, None, None], no_text, batch.text)
    output = theirs(x, index.long(), text, class_labels=labels).sample
    assert output.shape[1] == 6
    expected = functional.mse_loss(output[:, :3], draws.noise, reduction="none").mean(dim=(1, 2, 3))
    expected.mean().backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    ours_by_name, names = dict(ours.named_parameters()), weight_names(dict(theirs.config))
    pairs = [(p.grad, ours_by_name[names[name]].grad) for name, p in theirs.named_parameters() if p.grad is not None]
    flat = [torch.cat([grad.flatten() for grad in grads]) for grads in zip(*pairs)]
    assert (flat[0] - flat[1]).norm() < 1e-5 * flat[0].norm()
    variance = ours.conv_out.weight.grad[3:]
    assert not variance.any()  # neither trained nor punished


def test_indices_are_uniform_and_stratified():
    objective = make_objective(TrainingConfig(preset="emoji_base_64", **DISCRETE))

    def indices(count: int, stratified: bool) -> torch.Tensor:
        log_snr = objective.draw_log_snr(count, torch.Generator().manual_seed(0), stratified)
        image = torch.zeros(count, 1)
        return objective.example(image, image, log_snr).timestep

    drawn = indices(100_000, False)
    assert torch.equal(drawn, drawn.round()) and drawn.min() == 0 and drawn.max() == 999
    counts = drawn.long().bincount(minlength=1000)
    assert counts.min() > 50 and counts.max() < 150  # 100 of each, within five standard deviations
    assert sorted(indices(1000, True).tolist()) == list(range(1000))


def test_the_levels_are_those_of_the_betas():
    for name in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"):
        objective = make_objective(TrainingConfig(preset="emoji_base_64", beta_schedule=name, **DISCRETE))
        log_snr = objective.log_snrs[[0, 250, 999]].float()
        example = objective.example(torch.ones(3, 1), torch.zeros(3, 1), log_snr)
        assert example.timestep.tolist() == [0, 250, 999]
        alphas = DDPMScheduler(beta_schedule=name).alphas_cumprod[[0, 250, 999]].sqrt()
        torch.testing.assert_close(example.model_input.flatten(), alphas, rtol=1e-4, atol=1e-7)


# ---- from diffusers' format


def test_the_stage_of_a_repository_says_how_it_is_trained_and_called(repositories, settings_of):
    config = TrainingConfig(**settings_of("stage 2"))
    found = find_pretrained(config)
    assert found.call_defaults == {
        "num_inference_steps": 50,
        "guidance_scale": 4.0,
        "low_res_noise_level": pytest.approx(0.42684, rel=1e-5),
    }
    assert (found.clean_caption, found.max_length, found.preconditioning) == (True, 77, "discrete")
    theirs = UNet2DConditionModel.from_pretrained(repositories["stage 2"], subfolder="unet")
    assert are_equal(weights_of(make_unet(config)), weights_of(unet_from_deepfloyd(theirs)))
    alone = TrainingConfig(**settings_of("stage 1", str(repositories["stage 1"] / "unet")))
    found = find_pretrained(alone)
    assert found.call_defaults == {"num_inference_steps": 100, "guidance_scale": 7.0}
    assert found.scheduler["thresholding"] and found.origin == {"license": "deepfloyd"}
    assert make_unet(alone).attends_padding


def test_text_is_that_of_their_pipeline(repositories, settings_of):
    trainer = trained(settings_of("stage 1", max_train_steps=1))
    theirs = IFPipeline.from_pretrained(repositories["stage 1"])
    prompt, negative = theirs.encode_prompt(["a red apple"])
    torch.testing.assert_close(trainer.conditioning.no_text, negative, rtol=1e-5, atol=1e-5)
    text = trainer.text.encode([" A Red APPLE "])
    torch.testing.assert_close(text.embeds, prompt, rtol=1e-5, atol=1e-5)
    assert text.embeds[~text.mask].abs().min() > 0 and text.embeds.shape[1] == 77


def test_stage_1_by_the_script_opens_here_and_in_diffusers(monkeypatch, repositories, settings_of):
    settings = settings_of("stage 1")
    assert run_script(monkeypatch, settings) == 0
    pipe = ImagenPipeline.from_pretrained(settings["output_dir"])
    assert pipe.config.call_defaults == {"num_inference_steps": 31, "guidance_scale": 7.0}
    assert pipe.config.clean_caption and pipe.config.origin == {"license": "deepfloyd"}
    assert isinstance(pipe.scheduler, EDMAdamsScheduler) and pipe.scheduler.config.thresholding
    assert (pipe.scheduler.config.dynamic_thresholding_ratio, pipe.scheduler.config.sample_max_value) == (0.95, 1.5)
    assert "variance_type" not in pipe.scheduler.config
    before = unet_from_deepfloyd(UNet2DConditionModel.from_pretrained(repositories["stage 1"], subfolder="unet"))
    assert not are_equal(weights_of(pipe.unet), weights_of(before))
    assert_draws_alike(pipe.unet)
    images = pipe(**embeddings(), num_inference_steps=3, output_type="pt", generator=torch.Generator()).images
    assert images.isfinite().all()


def fixed_small() -> DDPMScheduler:
    """The scheduler that diffusers' pipelines of IF take for a network whose variance is not trained."""
    return DDPMScheduler.from_config(schedule(1.5).config, variance_type="fixed_small")


def embeddings() -> dict[str, torch.Tensor]:
    prompt, negative = torch.randn(2, 1, TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(5))
    masks = {f"{name}_attention_mask": torch.ones(1, TOKENS) for name in ("prompt", "negative_prompt")}
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative, **masks}


def assert_draws_alike(unet: ImagenUNetModel) -> None:
    """A base stage draws the same pictures in diffusers' pipeline of IF, with the scheduler that belongs there."""
    parts = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    theirs = IFPipeline(unet=unet_to_deepfloyd(unet), scheduler=fixed_small(), **parts, requires_safety_checker=False)
    ours = ImagenPipeline(unet, fixed_small())
    text = {name: value for name, value in embeddings().items() if name.endswith("embeds")}
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    generator = per_image_generators([torch.Generator().manual_seed(0)], 1)
    expected = theirs(**text, **options, height=16, width=16, generator=generator).images
    images = ours(**embeddings(), **options, generator=[torch.Generator().manual_seed(0)]).images
    torch.testing.assert_close(images * 2 - 1, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1


def test_stage_2_by_the_script_with_validation(monkeypatch, converted, imagefolder, settings_of):
    """Samples and held-out loss, crops, and what the stage is called with goes on to the trained one."""
    pictures = {"validation_prompts": ["text 1"], "validation_images": [f"{imagefolder}/images/1.png"]}
    settings = settings_of(
        "stage 2", converted["stage 2"], validation_split="test", crop_size=16, ema_decay=0.5, **pictures
    )
    assert run_script(monkeypatch, settings) == 0
    out = Path(settings["output_dir"])
    assert (out / "samples" / "step-000002.png").is_file()
    assert json.loads((out / "losses.jsonl").read_text().splitlines()[-1])["validation_loss"] > 0
    pipe = ImagenSuperResolutionPipeline.from_pretrained(out)
    assert pipe.config.call_defaults == FEW and pipe.config.scale_factor == 2
    assert pipe.config.origin == {"base_model": "DeepFloyd/IF-I-M-v1.0", "license": "deepfloyd"}
    assert pipe.scheduler.config.sample_max_value == 1.0
    images = pipe(**embeddings(), image=torch.rand(1, 3, 16, 16), output_type="pt").images
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()
    theirs = unet_to_deepfloyd(pipe.unet)
    generator = torch.Generator().manual_seed(1)
    x, low_res = torch.randn(2, 1, 3, 32, 32, generator=generator)
    index, text = torch.tensor([250]), embeddings()["prompt_embeds"]
    with torch.no_grad():
        expected = theirs.eval()(torch.cat([x, low_res], 1), 400, text, class_labels=index).sample
        output = pipe.unet(x, 400, text, low_res_sample=low_res, low_res_timestep=index).sample
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


# ---- what else a run does


def test_a_stopped_run_goes_on_as_one_that_was_not(monkeypatch, converted, settings_of, tmp_path):
    settings = settings_of("stage 1", converted["stage 1"], max_train_steps=3, checkpointing_steps=1)
    trained({**settings, "output_dir": str(tmp_path / "whole")})
    with monkeypatch.context() as patched:
        tiny_runs.interrupt_at(patched, 2)
        with pytest.raises(OSError, match="gone"):
            trained(settings)
    trained({**settings, "resume_from_checkpoint": "latest"})
    assert losses(settings["output_dir"]) == losses(tmp_path / "whole")
    other = {**settings, "resume_from_checkpoint": "latest", "text_drop_rate": 0.1}
    with pytest.raises(ValueError, match="was trained with text_drop_rate 0.5, but this run has 0.1"):
        trained(other)


def test_two_processes_train_as_one(converted, settings_of, tmp_path):
    settings = settings_of("stage 2", converted["stage 2"], channels_last=False)
    one = {**settings, "output_dir": str(tmp_path / "one"), "gradient_accumulation_steps": 2}
    trained(one)
    tiny_runs.run_in_processes({**settings, "output_dir": str(tmp_path / "two")}, 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_an_adapter_is_trained_and_taken(monkeypatch, converted, settings_of):
    settings = settings_of("stage 1", converted["stage 1"], rank=2, learning_rate=1e-2)
    assert run_script(monkeypatch, settings, LoraTrainingConfig, LoraTrainer) == 0
    pipe = ImagenPipeline.from_pretrained(converted["stage 1"])
    before = pipe(**embeddings(), generator=torch.Generator(), output_type="pt").images
    pipe.load_lora_weights(settings["output_dir"])
    after = pipe(**embeddings(), generator=torch.Generator(), output_type="pt").images
    assert not torch.equal(before, after)


@pytest.mark.parametrize("rank", [None, 2])
def test_dreambooth_draws_the_class_with_the_stage(monkeypatch, converted, imagefolder, settings_of, tmp_path, rank):
    settings = settings_of("stage 1", converted["stage 1"], rank=rank, train_data_dir=None)
    settings |= {
        **{
            "instance_data_dir": f"{imagefolder}/images",
            "instance_prompt": "a sks apple",
            "with_prior_preservation": True,
        },
        **{"class_data_dir": str(tmp_path / "class"), "class_prompt": "an apple", "num_class_images": 2},
    }
    assert run_script(monkeypatch, settings, DreamBoothTrainingConfig, make_trainer) == 0
    assert len(list((tmp_path / "class").glob("*.png"))) == 2
    result = "unet/config.json" if rank is None else "pytorch_lora_weights.safetensors"
    assert (Path(settings["output_dir"]) / result).is_file()


def test_a_call_of_a_variance_preserving_stage_has_its_steps(make_config, tmp_path):
    tiny_runs.run(dict(vars(make_config(preconditioning="variance_preserving", max_train_steps=1))))
    assert ImagenPipeline.from_pretrained(tmp_path / "stage").config.call_defaults == {"num_inference_steps": 100}
    tiny_runs.run(dict(vars(make_config(max_train_steps=1, output_dir=tmp_path / "edm"))))
    assert ImagenPipeline.from_pretrained(tmp_path / "edm").config.call_defaults is None


def test_settings_of_another_objective_do_not_go_on():
    stage = find_pretrained(TrainingConfig(preset="emoji_base_64"))._replace(
        scheduler={"preconditioning": "edm"}, call_defaults={"num_inference_steps": 7}
    )
    assert stage.settings("edm", {}, False)["call_defaults"] == {"num_inference_steps": 7}
    assert stage.settings("discrete", {}, False)["call_defaults"] is None


def test_captions_of_a_cache_are_trained_on_alone(settings_of, repositories, tmp_path):
    """The cache has the states at padded positions, and the empty text, which dropped captions become."""
    kind = {"keeps_padding": True, "cleans_captions": True}
    encoder = TextEncoder.from_pretrained(str(repositories["stage 1"]), 77, **kind)
    cache = str(tmp_path / "cache-77")
    with CacheWriter(cache, encoder.identity(), "float16") as writer:
        write_cache(writer, [f"text {i}" for i in range(8)], encoder)
    given = settings_of("stage 1", text_drop_rate=0.5, output_dir=tmp_path / "cached")
    cached = trained({**given, "text_encoder": None, "embedding_cache": cache})
    torch.testing.assert_close(cached.conditioning.no_text, encoder.encode([""]).embeds, atol=2e-3, rtol=0)
    trained({**given, "output_dir": str(tmp_path / "encoded")})
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "encoded"), rel=1e-3)


def test_the_settings_of_a_stage_of_a_cascade_are_found(repositories, settings_of, tmp_path):
    parts = {}
    for name, place in zip(("base", "sr256"), repositories.values()):
        unet = UNet2DConditionModel.from_pretrained(place, subfolder="unet")
        parts |= {f"{name}_unet": unet_from_deepfloyd(unet), f"{name}_scheduler": schedule(1.5)}
    origin = {"base": {"license": "deepfloyd"}, "sr256": {"license": "karlo"}}
    settings = {"call_defaults": {"sr256": FEW}, "clean_caption": True, "origin": origin}
    ImagenCascadePipeline(**parts, **settings).save_pretrained(tmp_path / "cascade")
    base, upscaler = (
        find_pretrained(TrainingConfig(**settings_of(name, str(tmp_path / "cascade")))) for name in repositories
    )
    assert (base.call_defaults, base.origin, base.clean_caption) == (None, origin["base"], True)
    assert (upscaler.call_defaults, upscaler.origin, upscaler.clean_caption) == (FEW, origin["sr256"], True)


def test_a_new_network_is_trained_for_discrete_betas(make_config, tmp_path):
    config = make_config(
        preconditioning="discrete", beta_schedule="linear", max_train_steps=1, loss_weighting="min_snr"
    )
    tiny_runs.run(dict(vars(config)))
    scheduler = ImagenPipeline.from_pretrained(tmp_path / "stage").scheduler
    assert (scheduler.config.preconditioning, scheduler.config.beta_schedule) == ("discrete", "linear")
    assert scheduler.timestep_to_sigma(torch.tensor([999])).item() == pytest.approx(
        ((1 - LINEAR.alphas_cumprod[999]) / LINEAR.alphas_cumprod[999]).sqrt().item(), rel=1e-4
    )


# ---- bad input


def refuse(monkeypatch, capfd, settings: dict, message: str, **kwargs) -> None:
    """One line, exit code 2, and nothing written."""
    assert run_script(monkeypatch, settings, **kwargs) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert message in lines[-1], lines[-1]
    assert not Path(settings["output_dir"]).exists()


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("stage 1", {"preconditioning": None}, "`preconditioning` is 'edm', but this network"),
        ("stage 1", {"beta_schedule": "linear"}, "'squaredcos_cap_v2': set it to this value"),
        ("stage 1", {"beta_schedule": "quadratic"}, "invalid choice: 'quadratic'"),
        (
            "stage 1",
            {"prediction_type": "sample"},
            "`prediction_type` is 'sample', but is not used with `preconditioning` 'discrete'",
        ),
        ("stage 1", {"low_resolution": 8}, "`low_resolution` is 8, but this network is not conditioned on one"),
        ("stage 2", {"low_resolution": None}, "is conditioned on an image: set `low_resolution`"),
        ("stage 2", {"noise_conditioning_augmentation": 0.3}, "an index, which is drawn among all 1000: leave it out"),
        ("stage 1", {"grow": True}, "`resample_type` is 'resnet_nearest', but only networks with 'conv' can be grown"),
    ],
)
def test_what_does_not_fit_is_one_line(monkeypatch, capfd, settings_of, name, change, message):
    refuse(monkeypatch, capfd, settings_of(name, **change), message)


def test_a_stage_without_text_encoder_needs_one(monkeypatch, capfd, settings_of, converted):
    settings = settings_of("stage 1", converted["stage 1"], text_encoder=None)
    refuse(monkeypatch, capfd, settings, "This network is conditioned on text: pass `text_encoder`")


@pytest.mark.parametrize(
    "file, change, message",
    [
        (
            "unet/config.json",
            {"act_fn": "silu"},
            "`act_fn` is 'silu', but should be 'gelu' in a network of DeepFloyd IF",
        ),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 100}, "`num_train_timesteps` of the scheduler of"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "`prediction_type` of the scheduler of"),
    ],
)
def test_a_repository_of_another_kind_is_one_line(
    monkeypatch, capfd, repositories, settings_of, tmp_path, file, change, message
):
    place = shutil.copytree(repositories["stage 1"], tmp_path / "other")
    content = json.loads((place / file).read_text())
    (place / file).write_text(json.dumps({**content, **change}))
    refuse(monkeypatch, capfd, settings_of("stage 1", str(place)), message)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"call_defaults": 7}, "`call_defaults` is 7, but should be an object"),
        ({"call_defaults": {"steps": 7}}, "`key of call_defaults` is 'steps'"),
        ({"origin": {"license": 7}}, "`license of origin` is 7, but should be one of 'deepfloyd', 'karlo'"),
        ({"clean_caption": "yes"}, "`clean_caption` is 'yes', but should be true or false"),
    ],
)
def test_an_index_with_other_settings_is_one_line(
    monkeypatch, capfd, converted, settings_of, tmp_path, settings, message
):
    place = shutil.copytree(converted["stage 1"], tmp_path / "other")
    file = place / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    refuse(monkeypatch, capfd, settings_of("stage 1", str(place)), message)


@pytest.mark.parametrize("name, targets", [("stage 1", None), ("stage 2", ["add_k_proj", "to_q"])])
def test_diffusers_loads_the_adapter_that_is_trained(settings_of, repositories, name, targets):
    more = {} if targets is None else {"lora_target_modules": targets}
    settings = settings_of(name, rank=2, lora_alpha=6, use_ema=False, learning_rate=1e-2, **more)
    ours = trained(settings, LoraTrainer, LoraTrainingConfig).unet.eval()
    theirs = UNet2DConditionModel.from_pretrained(repositories[name], subfolder="unet")
    second, generator = ours.takes_low_res, torch.Generator().manual_seed(0)
    sample, low_res = torch.randn(2, 1, 3, ours.resolution, ours.resolution, generator=generator)
    text, level = torch.randn(1, TOKENS, ours.text_width, generator=generator), torch.tensor([400.0])

    @torch.no_grad()
    def call() -> torch.Tensor:
        both = torch.cat([sample, low_res], dim=1) if second else sample
        return theirs(both, level, text, class_labels=level if second else None).sample

    low = {"low_res_sample": low_res, "low_res_timestep": level} if second else {}
    with torch.no_grad():
        expected = ours(sample, level, text, **low).sample
    assert (expected - call()).abs().max() > 1e-3
    parts = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    pipe = IFPipeline(unet=theirs, scheduler=COSINE, **parts, requires_safety_checker=False)
    pipe.load_lora_weights(settings["output_dir"])
    torch.testing.assert_close(call(), expected, atol=2e-5, rtol=1e-5)
