import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import (
    TINY,
    are_equal,
    encode,
    exported,
    losses,
    make_sr_unet,
    make_unet,
    metrics,
    weights_of,
)

from diffusers_imagen import ContinuousDDPMScheduler, EDMHeunScheduler, EfficientUNetModel, ImagenUNetModel
from diffusers_imagen.training import Trainer, TrainingConfig, train
from diffusers_imagen.training.monitor import MAX_SKIPPED_IN_ROW, Monitor, describe_time
from diffusers_imagen.training.validation.held_out_loss import ValidationLoss


ONE_IMAGE = {"styles": ["shaded"], "p_mean": 1.0, "p_std": 0.5}  # at noise levels where it is easily learned
LONG = {"max_train_steps": 100, "checkpointing_steps": 100, "learning_rate": 1e-2, "lr_warmup_steps": 5}

# Recorded with AVX512 and one thread. Without vector instructions, and with two threads, they are the same to 3e-7;
# another draw, weight or step moves them by 1e-2 and more.
# fmt: off
GOLDEN = [
    1.794073, 1.805778, 1.545215, 1.655158, 1.430815,
    1.360122, 1.261448, 1.275118, 1.346182, 1.275393,
    1.102899, 1.119139, 1.150082, 1.166126, 1.082308,
    1.101169, 1.125007, 1.080800, 1.074029, 0.920619,
]
# fmt: on


def test_twenty_steps_have_the_losses_that_they_had(make_config):
    config = make_config(max_train_steps=20, checkpointing_steps=20, lr_warmup_steps=5, stratified_noise=True)
    train(config, make_unet(), encode)
    assert losses(config.output_dir) == pytest.approx(GOLDEN, rel=1e-3)


def test_the_loss_falls(make_config):
    config = make_config(**ONE_IMAGE, **LONG, text_drop_rate=0.0, logging_steps=10)
    result = train(config, make_unet(), encode)
    curve = losses(config.output_dir)  # means of ten steps each
    assert len(curve) == 10
    assert curve[-1] < 0.4 * curve[0]
    # the result is an average over about 100 steps, which began with the first
    assert min(curve) < result["loss"] < max(curve)


def test_a_super_resolution_stage_trains_on_aligned_crops(make_config):
    config = make_config(resolution=32, low_resolution=8, crop_size=16, **ONE_IMAGE, **LONG, logging_steps=10)
    unet = make_sr_unet()
    shapes = set()
    unet.register_forward_pre_hook(lambda module, args: shapes.add((args[0].shape, args[4].shape, args[5].shape)))
    train(config, unet, encode)
    assert shapes == {((4, 3, 16, 16), (4, 3, 16, 16), (4,))}  # enlarged with the surroundings of the crop
    curve = losses(config.output_dir)
    assert curve[-1] < 0.4 * curve[0]
    stage = EfficientUNetModel.from_pretrained(config.output_dir, subfolder="unet")
    assert stage.config.low_res_noise_conditioning and stage.config.sample_size == 32
    index = json.loads((Path(config.output_dir) / "model_index.json").read_text())
    assert index["_class_name"] == "ImagenSuperResolutionPipeline" and index["scale_factor"] == 4


def test_a_network_without_text_trains(make_config):
    unet = ImagenUNetModel(sample_size=16, attention_resolutions=(8,), encoder_hid_dim=None, **TINY)
    before = weights_of(unet)
    assert math.isfinite(train(make_config(max_train_steps=2), unet)["loss"])
    assert not are_equal(weights_of(unet), before)


def test_the_stage_folder_opens(make_config):
    config = make_config(sigma_data=0.4, text_drop_rate=0.2)
    result = train(config, make_unet(), encode)
    folder = Path(config.output_dir)
    unet = ImagenUNetModel.from_pretrained(folder, subfolder="unet")
    assert list(unet.config.block_out_channels) == [8, 16] and not unet.training
    scheduler = EDMHeunScheduler.from_pretrained(folder, subfolder="scheduler")
    assert scheduler.config.sigma_data == 0.4
    record = json.loads((folder / "training.json").read_text())
    assert record["step"] == 4 and record["loss"] == result["loss"]
    places = {
        "train_data_dir": "data",
        "cache_dir": "cache",
        "output_dir": "stage",
    }  # not where they are on this machine
    assert TrainingConfig(**record["config"]) == replace(config, **places)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "ImagenPipeline"
    assert index["unet"] == ["diffusers_imagen", "ImagenUNetModel"]
    assert index["scheduler"] == ["diffusers_imagen", "EDMHeunScheduler"]
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    card = (folder / "README.md").read_text()
    assert (
        "4 steps, 16 images seen" in card and f"| loss | {result['loss']:.4f} |" in card and "sigma_data: 0.4" in card
    )
    assert str(folder) not in card and "p_mean" not in card  # neither paths nor defaults
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_stage_is_replaced_as_a_whole_or_not_at_all(make_config, monkeypatch):
    config = make_config(checkpointing_steps=1)
    save = ModelMixin.save_pretrained
    calls = []

    def fail_at_the_third(self, folder, **kwargs):
        calls.append(folder)
        save(self, folder, **kwargs)
        if len(calls) == 3:
            raise OSError("No space left on device")

    monkeypatch.setattr(ModelMixin, "save_pretrained", fail_at_the_third)
    with pytest.raises(OSError, match="No space left"):
        train(config, make_unet(), encode)
    folder = Path(config.output_dir)
    assert json.loads((folder / "training.json").read_text())["step"] == 2
    ImagenUNetModel.from_pretrained(folder, subfolder="unet")
    train(make_config(resume_from_checkpoint="latest"), make_unet(), encode)
    assert json.loads((folder / "training.json").read_text())["step"] == 4
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_variance_preserving_network_is_exported_with_its_scheduler(make_config, prediction_type):
    config = make_config(
        preconditioning="variance_preserving",
        prediction_type=prediction_type,
        loss_weighting="min_snr",
        loss="huber",
    )
    assert math.isfinite(train(config, make_unet(), encode)["loss"])
    scheduler = ContinuousDDPMScheduler.from_pretrained(config.output_dir, subfolder="scheduler")
    assert scheduler.config.prediction_type == prediction_type
    index = json.loads((Path(config.output_dir) / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_imagen", "ContinuousDDPMScheduler"]


@pytest.mark.parametrize("setting", ["text_encoder", "embedding_cache"])
def test_a_run_opens_its_text_when_it_is_prepared(make_config, tmp_path, setting):
    config = make_config(**{setting: str(tmp_path / "nowhere")})
    trainer = Trainer(config, make_unet())
    with pytest.raises(ValueError, match=f"`{setting}`.*nowhere"):
        trainer.prepare()
    textless = ImagenUNetModel.from_config({**make_unet().config, "encoder_hid_dim": None})
    with pytest.raises(ValueError, match="is given, but this network was built without text"):
        Trainer(config, textless)


def test_the_learned_weighting_is_kept_with_the_run_and_not_with_the_stage(make_config, tmp_path):
    config = make_config(loss_weighting="uncertainty", max_train_steps=4, lr_warmup_steps=0)
    train(config, make_unet(), encode)
    saved = load_file(Path(config.output_dir) / "checkpoint-4" / "model_1.safetensors")
    assert saved["linear.weight"].abs().max() > 0
    assert exported(config.output_dir).keys() == make_unet().state_dict().keys()
    plain = make_config(output_dir=tmp_path / "plain", lr_warmup_steps=0)
    train(plain, make_unet(), encode)
    # it starts as no weighting, and then changes the steps
    assert losses(plain.output_dir)[0] == losses(config.output_dir)[0]
    assert losses(plain.output_dir)[-1] != losses(config.output_dir)[-1]


def test_the_seed_decides_the_run(make_config, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        unet = make_unet()
        train(make_config(max_train_steps=2, seed=seed, output_dir=tmp_path / name), unet, encode)
        runs.append(weights_of(unet))
    assert are_equal(runs[0], runs[1]) and not are_equal(runs[0], runs[2])


def test_gradient_accumulation_is_one_step_of_schedule_and_weights(make_config, monkeypatch):
    norms = []
    clip = Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args: norms.append(clip(*args)) or norms[-1])
    config = make_config(gradient_accumulation_steps=2, max_train_steps=4, lr_warmup_steps=4)
    train(config, make_unet(), encode)
    record = metrics(config.output_dir)
    assert [line["lr"] for line in record] == pytest.approx([3e-3 * n / 4 for n in (1, 2, 3, 4)])
    assert [line["grad_norm"] for line in record] == [norm.item() for norm in norms]


@pytest.mark.parametrize("option", ["gradient_checkpointing", "torch_compile"])
def test_an_option_for_speed_or_memory_changes_no_weights(make_config, tmp_path, monkeypatch, option):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module)))
    plain, other = make_unet(), make_unet()
    train(make_config(max_train_steps=2, output_dir=tmp_path / "a"), plain, encode)
    train(make_config(max_train_steps=2, output_dir=tmp_path / "b", **{option: True}), other, encode)
    assert other.gradient_checkpointing == (option == "gradient_checkpointing")
    assert compiled == ([ImagenUNetModel] if option == "torch_compile" else [])
    assert are_equal(weights_of(plain), weights_of(other))


def test_a_compiled_network_is_saved_under_its_own_names(make_config, monkeypatch):
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: original(module, backend="eager"))
    config = make_config(max_train_steps=1, torch_compile=True)
    train(config, make_unet(), encode)
    names = make_unet().state_dict().keys()
    assert exported(config.output_dir).keys() == names
    assert load_file(Path(config.output_dir) / "checkpoint-1" / "model.safetensors").keys() == names


def spoil_gradients(unet: torch.nn.Module, steps: set[int]) -> list[int]:
    """Makes the gradients of some steps infinite; returns the steps so far."""
    seen = []

    def spoil(grad):
        seen.append(len(seen))
        return grad * math.inf if seen[-1] in steps else grad

    unet.conv_out.bias.register_hook(spoil)
    return seen


def test_a_step_that_is_not_finite_is_skipped_and_counted(make_config, monkeypatch):
    unet = make_unet()
    spoil_gradients(unet, {1})
    weights, states = [], []
    train_step = Trainer.train_step

    def recording(trainer, step):
        train_step(trainer, step)
        weights.append(weights_of(unet))
        states.append([state["exp_avg"].clone() for state in trainer.optimizer.state.values()])
        assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {step + 1 - (step >= 1)}

    monkeypatch.setattr(Trainer, "train_step", recording)
    config = make_config(lr_warmup_steps=0)
    result = train(config, unet, encode)
    assert are_equal(weights[0], weights[1]) and not are_equal(weights[1], weights[2])
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1]))
    record = metrics(config.output_dir)
    assert [line["skipped_steps"] for line in record] == [0, 1, 1, 1]
    assert "loss" not in record[1] and math.isfinite(result["loss"])


def test_a_run_whose_steps_are_all_skipped_stops(make_config):
    unet = make_unet()
    before = weights_of(unet)
    seen = spoil_gradients(unet, set(range(1000)))
    with pytest.raises(FloatingPointError, match=f"not finite in {MAX_SKIPPED_IN_ROW} consecutive steps: lower"):
        train(make_config(max_train_steps=100, checkpointing_steps=100), unet, encode)
    assert len(seen) == MAX_SKIPPED_IN_ROW and are_equal(weights_of(unet), before)


def test_the_validation_loss_is_of_the_averaged_weights_and_changes_nothing(make_config, tmp_path, monkeypatch):
    plain, validated = make_unet(), make_unet()
    train(make_config(output_dir=tmp_path / "a"), plain, encode)
    config = make_config(output_dir=tmp_path / "b", validation_split="validation", train_batch_size=4)
    measured = []
    call = ValidationLoss.__call__

    def twice(self, accelerator, unet):
        assert len(self.batches) == 1  # the split has one image
        assert not all(torch.equal(a, b) for a, b in zip(unet.parameters(), raw[0]))  # these are averages
        values = [call(self, accelerator, unet) for _ in range(2)]
        assert values[0] == values[1]  # the same rows and the same noise
        assert unet.training
        measured.append(values[0])
        return values[0]

    raw = []
    validate = Trainer.validate
    monkeypatch.setattr(ValidationLoss, "__call__", twice)
    monkeypatch.setattr(
        Trainer, "validate", lambda t, done: (raw.insert(0, [p.clone() for p in t.parameters]), validate(t, done))
    )
    result = train(config, validated, encode)
    assert are_equal(weights_of(validated), weights_of(plain))
    assert len(measured) == 2 and result["validation_loss"] == measured[1]["validation_loss"]
    assert measured[0]["validation_loss"] != measured[1]["validation_loss"]
    levels = [value for name, value in measured[1].items() if name.startswith("validation_loss/sigma")]
    assert len(levels) >= 3 and min(levels) < result["validation_loss"] < max(levels)
    record = json.loads((Path(config.output_dir) / "training.json").read_text())
    assert record["validation_loss"] == result["validation_loss"]


def test_samples_and_scalars_are_written(make_config):
    config = make_config(
        validation_prompts=["text 1", "text 5"], report_to="tensorboard", max_train_steps=2, checkpointing_steps=1
    )
    train(config, make_unet(), encode)
    folder = Path(config.output_dir)
    names = [path.name for path in sorted((folder / "samples").iterdir())]
    assert names == ["step-000001.png", "step-000002.png"]
    grids = [Image.open(folder / "samples" / name) for name in names]
    assert grids[0].size == (32, 16) and grids[0].tobytes() != grids[1].tobytes()
    assert "![text 1; text 5](samples/step-000002.png)" in (folder / "README.md").read_text()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = [EventAccumulator(str(path), {"images": 0}).Reload() for path in (folder / "logs").rglob("events*")]
    (events,) = [run for run in runs if run.Tags()["scalars"]]  # another has the settings
    scalars = set(events.Tags()["scalars"])
    assert {"loss", "loss_average", "grad_norm", "lr", "images_per_second", "memory_gib", "skipped_steps"} <= scalars
    assert events.Tags()["images"]
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx(losses(config.output_dir), rel=1e-6)


def test_samples_of_a_super_resolution_stage_enlarge_the_given_images(make_config, tmp_path):
    Image.new("RGB", (20, 20), (200, 30, 30)).save(tmp_path / "red.png")
    config = make_config(
        resolution=32,
        low_resolution=8,
        crop_size=16,
        max_train_steps=1,
        validation_prompts=["text 1"],
        validation_images=[str(tmp_path / "red.png")],
    )
    train(config, make_sr_unet(), encode)
    assert Image.open(Path(config.output_dir) / "samples" / "step-000001.png").size == (32, 32)


@pytest.mark.parametrize(
    ("make", "options", "with_text", "message"),
    [
        (
            make_unet,
            {"resolution": 15},
            True,
            "`resolution` gives images of 15x15, but this network needs multiples of 2, such as 14 or 16",
        ),
        (make_unet, {"low_resolution": 8}, True, "`low_resolution` is 8, but this network is not conditioned on one"),
        (make_sr_unet, {}, True, "`low_resolution` is None, but this network is conditioned on an image"),
        (
            make_sr_unet,
            {"low_resolution": 8, "noise_conditioning_augmentation": 0},
            True,
            "`noise_conditioning_augmentation` is 0, but this network is conditioned on the noise level",
        ),
        (make_unet, {}, False, "This network is conditioned on text: pass `text_encoder` or `embedding_cache`"),
        (make_unet, {"use_8bit_adam": True}, True, "`use_8bit_adam` needs bitsandbytes: pip install bitsandbytes"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(make_config, tmp_path, make, options, with_text, message):
    with pytest.raises(ValueError, match=message):
        train(make_config(**options), make(), encode if with_text else None)
    assert not (tmp_path / "stage").exists()


def test_the_stage_is_uploaded_without_checkpoints_and_secrets(make_config, monkeypatch):
    from diffusers_imagen.training import export

    calls = {}
    repository = type("Repository", (), {"repo_id": "me/stage"})
    monkeypatch.setattr(export, "create_repo", lambda name, **kwargs: calls.update(name=name) or repository)
    monkeypatch.setattr(export, "upload_folder", lambda **kwargs: calls.update(kwargs))
    config = make_config(max_train_steps=1, push_to_hub=True, hub_model_id="me/stage", hub_token="hf_secret")
    train(config, make_unet(), encode)
    assert calls["name"] == calls["repo_id"] == "me/stage" and calls["folder_path"] == config.output_dir
    assert "checkpoint-*" in calls["ignore_patterns"]
    for path in Path(config.output_dir).rglob("*"):
        if path.is_file() and "checkpoint" not in str(path):
            assert b"hf_secret" not in path.read_bytes()


def test_the_running_loss_is_an_average_of_a_hundred_steps():
    monitor, expected = Monitor(), None
    for step in range(20):
        value = 1.0 + step
        monitor.add(torch.tensor([value - 0.5, value + 0.5]), torch.tensor([0.05, 2.0]), share=1.0)
        monitor.end_step(torch.tensor(1.0))
        expected = value if expected is None else expected + 0.01 * (value - expected)
    assert monitor.values[3].item() == pytest.approx(expected, rel=1e-5)
    means = monitor.noise_levels.means(monitor.noise_levels.sums)
    assert means == pytest.approx({"sigma_0_to_0.1": 10.0, "sigma_1_to_3": 11.0})
    assert monitor.state_dict().keys() == {"values", "levels"}  # as checkpoints have them


def test_the_run_says_how_much_time_was_lost():
    text = describe_time(steps=10, images=160, seconds=20.0, compute=19.0, between=3.0)
    assert text.startswith(
        "10 steps in 20.0 s (8.0 images/s), 5.0% of it outside forward, backward and optimizer; 3.0 s"
    )
