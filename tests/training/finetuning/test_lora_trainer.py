"""Adapters that the loop trains, by what pipelines make of them."""

import json
from pathlib import Path

import pytest
import tiny_runs
import torch
from foreign_network import ConditionedUNet2D
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import are_equal, encode, losses, weights_of

from diffusers_imagen import (
    EDMHeunScheduler,
    EfficientUNetModel,
    ImagenCascadePipeline,
    ImagenPipeline,
    ImagenSuperResolutionPipeline,
    ImagenUNetModel,
)
from diffusers_imagen.training import LoraTrainer, LoraTrainingConfig, Trainer, parse_args
from diffusers_imagen.training.finetuning.lora_trainer import find_targets


FILE = "pytorch_lora_weights.safetensors"


def save_stage(unet, folder: Path, **scheduler) -> str:
    unet.save_pretrained(folder / "unet")
    EDMHeunScheduler(**scheduler).save_pretrained(folder / "scheduler")
    return str(folder)


def load(stage: str, network_class=ImagenUNetModel):
    return network_class.from_pretrained(stage, subfolder="unet")


@pytest.fixture
def stage(tmp_path) -> str:
    return save_stage(tiny_runs.make_unet(), tmp_path / "trained")


@pytest.fixture
def make_lora_config(imagefolder, tmp_path, stage, fresh_accelerator):
    """A run of five steps with an adapter of rank 2 whose alpha is not its rank."""

    def make_lora_config(**kwargs) -> LoraTrainingConfig:
        kwargs = {"pretrained_model_name_or_path": stage, "max_train_steps": 5, "rank": 2, "lora_alpha": 6, **kwargs}
        kwargs.setdefault("channels_last", False)  # in which convolutions round differently
        output_dir = kwargs.pop("output_dir", tmp_path / "lora")
        return LoraTrainingConfig(**tiny_runs.settings(imagefolder, output_dir, preset=None, **kwargs))

    return make_lora_config


def call(unet, low_res=None, side=16) -> torch.Tensor:
    """The network's output for fixed input."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, side, side, generator=generator)
    low_res_timestep = None if low_res is None else torch.zeros(2)
    with torch.no_grad():
        return unet.eval()(
            sample, torch.zeros(2), *encode(["text 1", "text 2"]), low_res, low_res_timestep, return_dict=False
        )[0]


def own_weights(unet) -> dict[str, torch.Tensor]:
    """The weights that are not an adapter's, by the names that they have without one."""
    state = {name.replace(".base_layer", ""): value for name, value in weights_of(unet).items()}
    return {name: value for name, value in state.items() if ".lora_" not in name}


def test_only_the_adapter_is_trained_and_a_pipeline_takes_it(make_lora_config, stage):
    config, unet = make_lora_config(use_ema=False), load(stage)
    before, plain = weights_of(unet), call(unet)
    trainer = LoraTrainer(config, unet, encode)
    trainer.train()

    assert are_equal(own_weights(unet), before)
    assert {name.split(".")[-3] for name in trainer.names} == {"lora_A", "lora_B"}
    adapted = call(unet)
    assert (adapted - plain).abs().max() > 1e-4

    pipe = ImagenPipeline(load(stage), EDMHeunScheduler(), None, None)
    pipe.load_lora_weights(config.output_dir)
    torch.testing.assert_close(call(pipe.unet), adapted, rtol=0, atol=0)
    assert pipe.unet.peft_config["default_0"].lora_alpha == 6
    assert pipe.unet.peft_config["default_0"].r == 2


def test_a_cascade_takes_it_for_its_base_stage(make_lora_config, stage, tokenizer, text_encoder):
    cascade = ImagenCascadePipeline(load(stage), EDMHeunScheduler(), tokenizer, text_encoder)
    cascade.save_pretrained(f"{stage}/cascade")
    config, unet = make_lora_config(use_ema=False, pretrained_model_name_or_path=f"{stage}/cascade"), load(stage)
    LoraTrainer(config, unet, encode).train()
    cascade.load_lora_weights(config.output_dir, component="base_unet")
    torch.testing.assert_close(call(cascade.base_unet), call(unet), rtol=0, atol=0)
    card = (Path(config.output_dir) / "README.md").read_text()
    assert 'pipe.load_lora_weights("lora", component="base_unet")\n' in card


def test_a_super_resolution_stage_is_adapted_too(make_lora_config, tmp_path):
    stage = save_stage(tiny_runs.make_sr_unet(), tmp_path / "sr")
    config = make_lora_config(
        pretrained_model_name_or_path=stage, resolution=32, low_resolution=16, use_ema=False, max_train_steps=2
    )
    low_res = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    unet = load(stage, EfficientUNetModel)
    before, plain = weights_of(unet), call(unet, low_res, 32)
    LoraTrainer(config, unet, encode).train()
    assert are_equal(own_weights(unet), before)
    assert (call(unet, low_res, 32) - plain).abs().max() > 1e-5
    pipe = ImagenSuperResolutionPipeline(load(stage, EfficientUNetModel), EDMHeunScheduler(), None, None)
    pipe.load_lora_weights(config.output_dir)
    torch.testing.assert_close(call(pipe.unet, low_res, 32), call(unet, low_res, 32), rtol=0, atol=0)


def test_the_average_of_the_adapter_is_exported(make_lora_config, stage):
    config = make_lora_config(ema_type="constant", ema_decay=0.5, max_train_steps=2, checkpointing_steps=1)
    trainer = LoraTrainer(config, load(stage), encode)
    expected = [p.detach().clone() for p in trainer.parameters]
    train_step = trainer.train_step

    def averaged(step):
        train_step(step)
        decay = 0.5 if step else 0.0  # diffusers' EMAModel begins with the weights after the first step
        for average, p in zip(expected, trainer.parameters):
            average.lerp_(p.detach(), 1 - decay)

    trainer.train_step = averaged
    trainer.train()
    saved = load_file(Path(config.output_dir) / FILE)
    assert len(saved) == len(expected) == len(trainer.names)
    for name, value in zip(trainer.names, expected):
        torch.testing.assert_close(saved["unet." + name.replace(".default.", ".")], value)


def test_what_is_written(make_lora_config, stage):
    config = make_lora_config(max_train_steps=2)
    trainer = LoraTrainer(config, load(stage), encode)
    trainer.train()
    folder = Path(config.output_dir)
    with safe_open(folder / FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.lora_alpha"] == 6 and metadata["unet.r"] == 2
    # the frozen weights are in no checkpoint
    checkpoint = folder / "checkpoint-2"
    assert set(load_file(checkpoint / "adapter.safetensors")) == set(trainer.names)
    assert not list(checkpoint.glob("model*"))
    assert sorted(path.name for path in (folder / "unet").iterdir()) == ["config.json", "reference.json"]
    assert json.loads((folder / "training.json").read_text())["config"]["rank"] == 2
    card = (folder / "README.md").read_text()
    count = sum(p.numel() for p in trainer.parameters)
    assert f"{count:,} parameters in its adapter" in card
    assert 'pipe.load_lora_weights("lora")\n' in card and 'DiffusionPipeline.from_pretrained("lora")\n' in card
    assert "- lora\n" in card


def test_a_resumed_run_is_the_run_that_was_not_stopped(make_lora_config, stage, tmp_path, monkeypatch):
    whole, unet = make_lora_config(output_dir=tmp_path / "whole", loss_weighting="uncertainty"), load(stage)
    LoraTrainer(whole, unet, encode).train()
    config = make_lora_config(resume_from_checkpoint="latest", loss_weighting="uncertainty")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        tiny_runs.interrupt_at(patch, step=3)
        LoraTrainer(config, load(stage), encode).train()
    resumed = load(stage)
    LoraTrainer(config, resumed, encode).train()
    assert losses(config.output_dir) == losses(whole.output_dir)
    assert are_equal(weights_of(resumed), weights_of(unet))
    assert are_equal(load_file(f"{config.output_dir}/{FILE}"), load_file(f"{whole.output_dir}/{FILE}"))

    with pytest.raises(ValueError, match="base weights"):
        LoraTrainer(config, tiny_runs.make_unet(seed=1), encode).prepare()
    with pytest.raises(ValueError, match="was trained with rank 2, but this run has 3"):
        config = make_lora_config(resume_from_checkpoint="latest", loss_weighting="uncertainty", rank=3)
        LoraTrainer(config, load(stage), encode).prepare()


def test_the_adapter_depends_on_the_seed_and_leaves_the_global_generator_alone(make_lora_config, stage):
    state = torch.get_rng_state()
    first, again, other = (
        LoraTrainer(make_lora_config(seed=seed), load(stage), encode).parameters[0].detach() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "`rank` is 0, but should be at least 1"),
        ({"lora_alpha": 0}, "`lora_alpha` is 0, but should be above 0"),
        ({"lora_target_modules": []}, "`lora_target_modules` is empty"),
        ({"ema_type": "power"}, "only averages of whole networks"),
        ({"grow": True}, "without `grow` and `layers_per_block`"),
        ({"layers_per_block": [1, 1]}, "without `grow` and `layers_per_block`"),
    ],
)
def test_settings_that_are_refused(make_lora_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_lora_config(**options)


def test_stages_and_layers_that_are_refused(make_lora_config, stage, tmp_path):
    with pytest.raises(ValueError, match=r"`lora_target_modules` has \['to_x'\], but no layer"):
        LoraTrainer(make_lora_config(lora_target_modules=["to_q", "to_x"]), load(stage), encode)
    with pytest.raises(ValueError, match="`preconditioning` is 'variance_preserving', but .* was trained with 'edm'"):
        LoraTrainer(make_lora_config(preconditioning="variance_preserving"), load(stage), encode)
    other = save_stage(load(stage), tmp_path / "other", sigma_data=0.25)
    for name in (other, f"{other}/unet"):
        config = make_lora_config(pretrained_model_name_or_path=name)
        with pytest.raises(ValueError, match="`sigma_data` is 0.5, but .* was trained with 0.25"):
            LoraTrainer(config, load(stage), encode)
    assert not (tmp_path / "lora").exists()


def test_flags_and_file_have_the_options_of_adapters(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("rank: 16\nlora_target_modules: [to_q, to_v]\npretrained_model_name_or_path: stage\n")
    config = parse_args(["--config", str(file), "--lora_alpha", "8"], config_class=LoraTrainingConfig)
    assert (config.rank, config.lora_alpha, config.lora_target_modules) == (16, 8.0, ["to_q", "to_v"])
    with pytest.raises(ValueError, match="which are not options"):
        parse_args(["--config", str(file)])


@pytest.fixture
def force_eager():
    """torch.compile wraps, and compiles nothing."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("trainer_class", [LoraTrainer, Trainer])
def test_a_run_under_accelerates_dynamo_writes_and_resumes_the_names_of_one_without(
    make_lora_config, stage, tmp_path, monkeypatch, force_eager, trainer_class
):
    def run(folder: str) -> tuple[LoraTrainingConfig, Trainer]:
        config = make_lora_config(max_train_steps=2, output_dir=tmp_path / folder, use_ema=False)
        trainer = trainer_class(config, load(stage), encode)
        trainer.train()
        tiny_runs.reset_accelerate()
        return config, trainer

    eager, _ = run("eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    config, trainer = run("dynamo")
    file = FILE if trainer_class is LoraTrainer else "unet/diffusion_pytorch_model.safetensors"
    assert are_equal(load_file(f"{config.output_dir}/{file}"), load_file(f"{eager.output_dir}/{file}"))
    config.resume_from_checkpoint, config.max_train_steps = "latest", 3
    resumed = trainer_class(config, load(stage), encode)
    resumed.prepare()
    assert hasattr(resumed.unet, "_orig_mod")
    assert resumed.start() == 2
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, trainer.parameters))


@pytest.mark.parametrize("targets", [[""], ["to_q", ""], ["to_k", "nothing"]])
def test_names_of_no_layer_are_refused(targets):
    with pytest.raises(
        ValueError, match=f"`lora_target_modules` has .*'{targets[-1]}'.*, but no layer of the network"
    ):
        find_targets(tiny_runs.make_unet(), targets)


def test_a_network_that_can_have_no_adapter_is_refused_by_name(make_lora_config):
    unet = ConditionedUNet2D(resolution=16, text_width=1)
    with pytest.raises(ValueError, match="`unet` is of class ConditionedUNet2D, but should be .*PeftAdapterMixin"):
        LoraTrainer(make_lora_config(), unet, encode)
