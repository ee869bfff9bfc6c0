import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from diffusers_imagen import EDMHeunScheduler, EfficientUNetModel, ImagenUNetModel
from diffusers_imagen.training import TrainingConfig, loop, train


TINY = {"block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 4}
TEXT_WIDTH = 4
ONE_IMAGE = {"styles": ["shaded"], "p_mean": 1.0, "p_std": 0.5}  # at noise levels where it is easily learned


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its state for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def encode():
    """The caption's number as a position on a circle; a second token is padding."""

    def encode(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.tensor([int(caption.removeprefix("text ")) / 8 * 2 * math.pi for caption in captions])
        token = torch.stack([angles.sin(), angles.cos(), 0 * angles, 1 + 0 * angles], dim=-1)
        mask = torch.tensor([[True, False]]).expand(len(captions), 2)
        return torch.stack([token, 0 * token], dim=1), mask

    return encode


def make_unet(seed: int = 0) -> ImagenUNetModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ImagenUNetModel(
            sample_size=16, attention_resolutions=(8,), encoder_hid_dim=TEXT_WIDTH, cross_attention_dim=8, **TINY
        )


def make_sr_unet(seed: int = 0) -> EfficientUNetModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EfficientUNetModel(
            sample_size=32,
            attention_types=(None, "cross"),
            encoder_hid_dim=TEXT_WIDTH,
            low_res_noise_conditioning=True,
            **TINY,
        )


@pytest.fixture
def make_config(imagefolder, tmp_path):
    def make_config(**kwargs) -> TrainingConfig:
        return TrainingConfig(
            **{
                "train_data_dir": imagefolder,
                "output_dir": str(tmp_path / "stage"),
                "preset": "emoji_base_64",
                "resolution": 16,
                "train_batch_size": 4,
                "max_train_steps": 4,
                "learning_rate": 3e-3,
                "lr_warmup_steps": 3,
                "checkpointing_steps": 2,
                **kwargs,
            }
        )

    return make_config


@pytest.fixture
def losses_of_steps(monkeypatch) -> list[float]:
    """Losses of all steps from now on."""
    losses = []
    train_step = loop.train_step

    def recording(*args, **kwargs):
        losses.append(train_step(*args, **kwargs))
        return losses[-1]

    monkeypatch.setattr(loop, "train_step", recording)
    return losses


def interrupt_at(monkeypatch, step: int):
    """Training stops before this step, as when its process is ended."""
    train_step = loop.train_step

    def interrupted(*args):
        if args[-1] == step:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", interrupted)


def weights_of(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in unet.state_dict().items()}


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def exported(config: TrainingConfig, network_class=ImagenUNetModel) -> dict[str, torch.Tensor]:
    return network_class.from_pretrained(config.output_dir, subfolder="unet").state_dict()


def test_the_loss_falls(make_config, encode, losses_of_steps):
    config = make_config(
        **ONE_IMAGE,
        max_train_steps=100,
        checkpointing_steps=100,
        learning_rate=1e-2,
        text_drop_rate=0.0,
        lr_warmup_steps=5,
    )
    result = train(config, make_unet(), encode)
    assert len(losses_of_steps) == 100
    losses = torch.tensor(losses_of_steps)
    assert losses[-10:].mean() < 0.4 * losses[:10].mean()
    # the result is an average over about 100 steps, which began with the first
    assert min(losses_of_steps) < result["loss"] < max(losses_of_steps)


def test_a_super_resolution_stage_trains_on_aligned_crops(make_config, encode, losses_of_steps):
    config = make_config(
        resolution=32,
        low_resolution=8,
        crop_size=16,
        **ONE_IMAGE,
        max_train_steps=100,
        checkpointing_steps=100,
        learning_rate=1e-2,
        lr_warmup_steps=5,
    )
    unet = make_sr_unet()
    shapes = set()
    unet.register_forward_pre_hook(lambda module, args: shapes.add((args[0].shape, args[4].shape, args[5].shape)))
    train(config, unet, encode)
    assert shapes == {((4, 3, 16, 16), (4, 3, 4, 4), (4,))}
    losses = torch.tensor(losses_of_steps)
    assert losses[-10:].mean() < 0.4 * losses[:10].mean()
    stage = EfficientUNetModel.from_pretrained(config.output_dir, subfolder="unet")
    assert stage.config.low_res_noise_conditioning and stage.config.sample_size == 32


def test_a_network_without_text_trains(make_config):
    unet = ImagenUNetModel(sample_size=16, attention_resolutions=(8,), encoder_hid_dim=None, **TINY)
    before = weights_of(unet)
    assert math.isfinite(train(make_config(max_train_steps=2), unet)["loss"])
    assert not are_equal(weights_of(unet), before)


def test_the_stage_folder_opens(make_config, encode):
    config = make_config(sigma_data=0.4, text_drop_rate=0.2)
    result = train(config, make_unet(), encode)
    unet = ImagenUNetModel.from_pretrained(config.output_dir, subfolder="unet")
    assert unet.config.block_out_channels == [8, 16] and not unet.training
    scheduler = EDMHeunScheduler.from_pretrained(config.output_dir, subfolder="scheduler")
    assert scheduler.config.sigma_data == 0.4
    record = json.loads((Path(config.output_dir) / "training.json").read_text())
    assert record["step"] == 4 and record["loss"] == result["loss"]
    assert TrainingConfig(**record["config"]) == config
    lines = [json.loads(line) for line in (Path(config.output_dir) / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]


def test_the_averaged_weights_are_exported(make_config, encode, monkeypatch):
    """With the warm-up of diffusers' EMAModel at power 3/4: decay 0 at the first step, then 1 - (1 + n)^-0.75."""
    weights = []
    ema_step = loop.EMAModel.step
    monkeypatch.setattr(
        loop.EMAModel, "step", lambda ema, parameters: (weights.append(weights_of(unet)), ema_step(ema, parameters))
    )
    unet = make_unet()
    average = weights_of(unet)
    config = make_config(ema_decay=0.5)
    train(config, unet, encode)
    assert len(weights) == 4
    for n, current in enumerate(weights):
        decay = min(0.5, 1 - (1 + n) ** -0.75)
        average = {name: decay * average[name] + (1 - decay) * current[name] for name in average}
    actual = exported(config)
    for name in average:
        torch.testing.assert_close(actual[name], average[name], atol=1e-6, rtol=1e-5)
    assert not are_equal(actual, weights_of(unet))
    assert are_equal(weights_of(unet), weights[-1])  # exporting put the trained weights back


def test_a_resumed_run_is_the_run_that_was_not_stopped(make_config, encode, tmp_path, monkeypatch):
    straight, whole = make_unet(), make_config(output_dir=str(tmp_path / "whole"))
    train(whole, straight, encode)

    config = make_config(output_dir=str(tmp_path / "stopped"), resume_from_checkpoint="latest")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, step=2)
        train(config, make_unet(), encode)
    after_two = exported(config)
    resumed = make_unet(seed=1)  # what it starts from must not matter
    steps = []
    with monkeypatch.context() as patch:
        train_step = loop.train_step
        patch.setattr(loop, "train_step", lambda *args: (steps.append(args[-1]), train_step(*args))[1])
        train(config, resumed, encode)
    assert steps == [2, 3]
    assert are_equal(weights_of(resumed), weights_of(straight))
    assert are_equal(exported(config), exported(whole))
    assert not are_equal(exported(config), after_two)


def test_a_checkpoint_can_be_named(make_config, encode, tmp_path):
    config = make_config(output_dir=str(tmp_path / "whole"))
    straight = make_unet()
    train(config, straight, encode)
    checkpoint = str(Path(config.output_dir) / "checkpoint-2")
    resumed = make_unet(seed=1)
    train(make_config(output_dir=str(tmp_path / "branch"), resume_from_checkpoint=checkpoint), resumed, encode)
    assert are_equal(weights_of(resumed), weights_of(straight))
    with pytest.raises(ValueError, match="`resume_from_checkpoint` is '/nowhere/checkpoint-2', which is no folder"):
        train(make_config(resume_from_checkpoint="/nowhere/checkpoint-2"), make_unet(), encode)


def test_latest_without_a_checkpoint_starts_from_the_beginning(make_config, encode, tmp_path):
    fresh, resuming = make_unet(), make_unet()
    train(make_config(max_train_steps=2, output_dir=str(tmp_path / "a")), fresh, encode)
    config = make_config(max_train_steps=2, output_dir=str(tmp_path / "b"), resume_from_checkpoint="latest")
    train(config, resuming, encode)
    assert are_equal(weights_of(fresh), weights_of(resuming))


def test_the_seed_decides_the_run(make_config, encode, tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        unet = make_unet()
        train(make_config(max_train_steps=2, seed=seed, output_dir=str(tmp_path / name)), unet, encode)
        runs.append(weights_of(unet))
    assert are_equal(runs[0], runs[1]) and not are_equal(runs[0], runs[2])


def test_every_step_of_every_process_has_draws_of_its_own(make_config):
    def draw(seed: int, process: int, step: int) -> float:
        accelerator = SimpleNamespace(process_index=process)
        return torch.rand(1, generator=loop.step_generator(accelerator, make_config(seed=seed), step)).item()

    places = [(seed, process, step) for seed in range(3) for process in range(3) for step in (0, 1, 2, 9999)]
    places += [(0, 0, loop.VALIDATION_STEP)]
    assert len({draw(*place) for place in places}) == len(places)
    assert draw(1, 2, 3) == draw(1, 2, 3)


def test_a_checkpoint_is_whole_or_absent(make_config, encode, tmp_path, monkeypatch):
    whole, straight = make_config(output_dir=str(tmp_path / "whole")), make_unet()
    train(whole, straight, encode)

    config = make_config(resume_from_checkpoint="latest")
    save_state = Accelerator.save_state

    def save_half(self, folder):
        save_state(self, folder)
        if "checkpoint-4" in folder:
            for path in list(Path(folder).glob("*.safetensors")):
                path.write_bytes(path.read_bytes()[:100])
            raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Accelerator, "save_state", save_half)
        train(config, make_unet(), encode)
    assert [path.name for path in loop.checkpoints(config.output_dir)] == ["checkpoint-2"]
    resumed = make_unet(seed=1)
    train(config, resumed, encode)
    assert are_equal(weights_of(resumed), weights_of(straight))
    assert not list(Path(config.output_dir).glob("*.partial"))


def test_only_the_newest_checkpoints_are_kept(make_config, encode):
    config = make_config(max_train_steps=11, checkpointing_steps=1, checkpoints_total_limit=3)
    train(config, make_unet(), encode)
    # in the order of steps, not of letters
    names = [path.name for path in loop.checkpoints(config.output_dir)]
    assert names == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]
    assert sorted(path.name for path in Path(config.output_dir).glob("checkpoint-*")) == sorted(names)


def test_gradient_accumulation_is_one_step_over_all_batches(make_config, encode, monkeypatch):
    """Two batches a step: twice the draws, half the weight of each, one step of schedule and weights."""
    draws, rates, norms = [], [], []
    draw = loop.BatchStream.__next__
    monkeypatch.setattr(loop.BatchStream, "__next__", lambda stream: (draws.append(1), draw(stream))[1])
    train_step = loop.train_step

    def recording(accelerator, config, unet, batches, optimizer, lr_scheduler, step):
        loss = train_step(accelerator, config, unet, batches, optimizer, lr_scheduler, step)
        rates.append(lr_scheduler.get_last_lr()[0])
        return loss

    monkeypatch.setattr(loop, "train_step", recording)
    clip = Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args: norms.append(clip(*args)))
    config = make_config(gradient_accumulation_steps=2, max_train_steps=4, lr_warmup_steps=4)
    train(config, make_unet(), encode)
    assert len(draws) == 8 and len(norms) == 4
    assert rates == pytest.approx([3e-3 * n / 4 for n in (1, 2, 3, 4)])


def test_gradient_checkpointing_changes_nothing(make_config, encode, tmp_path):
    plain, checkpointed = make_unet(), make_unet()
    train(make_config(max_train_steps=2, output_dir=str(tmp_path / "a")), plain, encode)
    config = make_config(max_train_steps=2, output_dir=str(tmp_path / "b"), gradient_checkpointing=True)
    train(config, checkpointed, encode)
    assert checkpointed.gradient_checkpointing
    assert are_equal(weights_of(plain), weights_of(checkpointed))


def test_the_validation_loss_is_of_the_averaged_weights_and_changes_nothing(
    make_config, encode, tmp_path, monkeypatch
):
    plain, validated = make_unet(), make_unet()
    train(make_config(output_dir=str(tmp_path / "a")), plain, encode)
    config = make_config(output_dir=str(tmp_path / "b"), validation_split="validation", train_batch_size=4)
    measured = []
    validation_loss = loop.validation_loss

    def twice(accelerator, config, unet, ema, batches):
        assert len(batches) == 1  # the split has one image
        with torch.no_grad():
            raw = [parameter.clone() for parameter in unet.parameters()]
            values = [validation_loss(accelerator, config, unet, ema, batches) for _ in range(2)]
            assert values[0] == values[1]  # the same rows and the same noise
            assert all(torch.equal(a, b) for a, b in zip(raw, unet.parameters()))
            assert unet.training
            ema.copy_to(unet.parameters())
            assert validation_loss(accelerator, config, unet, ema, batches) == values[0]
            for parameter, value in zip(unet.parameters(), raw):
                parameter.copy_(value)
        measured.append(values[0])
        return values[0]

    monkeypatch.setattr(loop, "validation_loss", twice)
    result = train(config, validated, encode)
    assert are_equal(weights_of(validated), weights_of(plain))
    assert len(measured) == 2 and result["validation_loss"] == measured[1] != measured[0]
    record = json.loads((Path(config.output_dir) / "training.json").read_text())
    assert record["validation_loss"] == measured[1]
