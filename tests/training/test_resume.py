import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    are_equal,
    encode,
    exported,
    interrupt_at,
    losses,
    make_unet,
    metrics,
    settings,
    start,
    weights_of,
)

from diffusers_imagen.training import Trainer, TrainingInterrupted, checkpoints, train
from diffusers_imagen.training.checkpoints import list_checkpoints
from diffusers_imagen.training.objective.weightings import WEIGHTINGS, LossWeighting


def wait_for(path: Path, lines: int) -> None:
    deadline = time.monotonic() + 300
    while not path.is_file() or path.read_text().count("\n") < lines:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def whole(make_config, tmp_path):
    """The run that nobody stopped."""
    config, unet = make_config(output_dir=tmp_path / "whole"), make_unet()
    train(config, unet, encode)
    return config.output_dir, weights_of(unet)


def test_a_resumed_run_is_the_run_that_was_not_stopped(make_config, whole, tmp_path, monkeypatch):
    config = make_config(resume_from_checkpoint="latest")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        interrupt_at(patch, step=3)
        train(config, make_unet(), encode)
    after_two = exported(config.output_dir)
    assert len(losses(config.output_dir)) == 3  # the third step will be done again
    resumed = make_unet(seed=1)  # what it starts from must not matter
    train(config, resumed, encode)
    assert losses(config.output_dir) == losses(whole[0])
    assert metrics(config.output_dir) == metrics(whole[0])
    assert are_equal(weights_of(resumed), whole[1])
    assert are_equal(exported(config.output_dir), exported(whole[0]))
    assert not are_equal(exported(config.output_dir), after_two)


class RunningMean(LossWeighting):
    """Divides losses by a running mean of them: a buffer, and nothing that is learned."""

    def __init__(self, config=None):
        super().__init__()
        self.mean = torch.nn.Buffer(torch.ones(()))

    def forward(self, losses: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        self.mean.lerp_(losses.detach().mean(), 0.5)
        return losses / self.mean


def test_a_weighting_with_buffers_alone_is_used_and_resumed(make_config, tmp_path, monkeypatch):
    plain, unet = make_config(output_dir=tmp_path / "plain"), make_unet()
    train(plain, unet, encode)
    monkeypatch.setitem(WEIGHTINGS, "uniform", RunningMean)
    whole, weighted = make_config(output_dir=tmp_path / "other"), make_unet()
    train(whole, weighted, encode)
    assert not are_equal(weights_of(weighted), weights_of(unet))
    config = make_config(resume_from_checkpoint="latest")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        interrupt_at(patch, step=2)
        train(config, make_unet(), encode)
    resumed = make_unet(seed=1)
    train(config, resumed, encode)
    assert are_equal(weights_of(resumed), weights_of(weighted))
    assert losses(config.output_dir) == losses(whole.output_dir)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_weighting": "uncertainty"},
        {"ema_type": "power"},
        {"streaming": True, "shuffle_buffer_size": 3},
        {"in_memory": False, "gradient_accumulation_steps": 2, "logging_steps": 4},
    ],
    ids=["weighting", "power", "stream", "loader"],
)
def test_what_there_is_beside_the_network_is_resumed(make_config, tmp_path, monkeypatch, options):
    whole, unet = make_config(output_dir=tmp_path / "other", **options), make_unet()
    train(whole, unet, encode)
    config = make_config(resume_from_checkpoint="latest", **options)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        interrupt_at(patch, step=2)
        train(config, make_unet(), encode)
    resumed = make_unet(seed=1)
    train(config, resumed, encode)
    assert are_equal(weights_of(resumed), weights_of(unet))
    assert are_equal(exported(config.output_dir), exported(whole.output_dir))
    assert metrics(config.output_dir) == metrics(whole.output_dir)
    for path in Path(whole.output_dir).glob("ema-snapshots/*"):
        assert are_equal(load_file(path), load_file(Path(config.output_dir) / "ema-snapshots" / path.name))


def test_a_killed_run_resumes_to_the_last_digit(imagefolder, tmp_path):
    """SIGKILL at moments that the clock chooses, between and within steps and while checkpoints are written."""
    options = {"max_train_steps": 12, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    whole = start(settings(imagefolder, tmp_path / "whole", **options))
    whole.join()
    killed = settings(imagefolder, tmp_path / "killed", **options)
    for lines, seed in ((2, 0), (7, 1)):
        process = start(killed, seed=seed)
        wait_for(tmp_path / "killed" / "metrics.jsonl", lines)
        time.sleep(0.01 * (seed + 1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    last = start(killed, seed=3)
    last.join()
    assert whole.exitcode == last.exitcode == 0
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert are_equal(torch.load(tmp_path / "killed" / "weights.pt"), torch.load(tmp_path / "whole" / "weights.pt"))
    assert not list((tmp_path / "killed").glob("*.partial"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(make_config, whole, monkeypatch, signum):
    config = make_config(resume_from_checkpoint="latest")
    before = signal.getsignal(signum)
    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted) as stopped:
        train_step = Trainer.train_step

        def signalled(self, step):
            if step == 2:
                os.kill(os.getpid(), signum)
            train_step(self, step)

        patch.setattr(Trainer, "train_step", signalled)
        train(config, make_unet(), encode)
    assert stopped.value.signum == signum
    assert str(stopped.value).startswith(f"Stopped by {signal.Signals(signum).name}; the state is saved in ")
    assert signal.getsignal(signum) == before
    assert [path.name for path in list_checkpoints(config.output_dir)] == ["checkpoint-2", "checkpoint-3"]
    train(config, make_unet(seed=1), encode)
    assert losses(config.output_dir) == losses(whole[0])


def test_a_checkpoint_can_be_named(make_config, whole, tmp_path):
    checkpoint = str(Path(whole[0]) / "checkpoint-2")
    resumed = make_unet(seed=1)
    train(make_config(output_dir=tmp_path / "branch", resume_from_checkpoint=checkpoint), resumed, encode)
    assert are_equal(weights_of(resumed), whole[1])
    # by its name in output_dir, as in diffusers' scripts
    train(make_config(output_dir=whole[0], resume_from_checkpoint="checkpoint-4"), again := make_unet(seed=1), encode)
    assert are_equal(weights_of(again), whole[1])
    for name in ("/nowhere/checkpoint-2", "checkpoint-9", str(whole[0]), ""):
        with pytest.raises(ValueError, match=f"`resume_from_checkpoint` is '{name}', but should be 'latest' or the f"):
            train(make_config(resume_from_checkpoint=name), make_unet(), encode)


def test_a_finished_run_has_nothing_left_to_do(make_config, whole):
    result = train(make_config(output_dir=whole[0], resume_from_checkpoint="latest"), make_unet(seed=1), encode)
    assert result["loss"] == metrics(whole[0])[-1]["loss_average"]
    assert len(metrics(whole[0])) == 4


def test_latest_without_a_checkpoint_starts_from_the_beginning(make_config, whole):
    config = make_config(resume_from_checkpoint="latest")
    train(config, make_unet(), encode)
    assert losses(config.output_dir) == losses(whole[0])


def test_a_run_goes_on_with_another_learning_rate_if_it_is_told_one(make_config, whole):
    config = make_config(output_dir=whole[0], resume_from_checkpoint="latest", max_train_steps=5, learning_rate=1e-3)
    train(config, make_unet(), encode)
    assert metrics(whole[0])[-1]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"preconditioning": "variance_preserving"},
            "was trained with preconditioning 'edm', but this run has 'variance_preserving'",
        ),
        ({"sigma_data": 0.4}, "was trained with sigma_data 0.5, but this run has 0.4"),
        ({"ema_type": "constant"}, "was trained with ema_type 'warmup', but this run has 'constant'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(make_config, whole, options, message):
    with pytest.raises(ValueError, match=message):
        train(make_config(output_dir=whole[0], resume_from_checkpoint="latest", **options), make_unet(), encode)


def test_a_checkpoint_of_another_network_is_refused(make_config, whole):
    other = type(make_unet())(**{**make_unet().config, "layers_per_block": 2})
    with pytest.raises(ValueError, match="was trained with unet layers_per_block 1, but this run has 2"):
        train(make_config(output_dir=whole[0], resume_from_checkpoint="latest"), other, encode)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(make_config, whole):
    path = Path(whole[0]) / "checkpoint-4" / "model.safetensors"
    before = losses(whole[0])
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"is damaged: model.safetensors has {size - 1} bytes, not {size}"):
        train(make_config(resume_from_checkpoint=str(path.parent)), make_unet(), encode)
    resumed = make_unet(seed=1)
    train(make_config(output_dir=whole[0], resume_from_checkpoint="latest"), resumed, encode)
    assert are_equal(weights_of(resumed), whole[1]) and losses(whole[0]) == before
    (path.parent / "checkpoint.json").unlink()
    (path.parents[1] / "checkpoint-2" / "checkpoint.json").unlink()
    fresh = make_config(output_dir=whole[0], resume_from_checkpoint="latest", max_train_steps=1)
    train(fresh, make_unet(), encode)
    assert losses(whole[0]) == before[:1]


def test_a_checkpoint_is_whole_or_absent(make_config, whole, monkeypatch):
    config = make_config(resume_from_checkpoint="latest")
    save_state = checkpoints.save_state

    def save_half(path, state):
        save_state(path, state)
        if "checkpoint-4" in str(path):
            path.write_bytes(path.read_bytes()[:100])
            raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(checkpoints, "save_state", save_half)
        train(config, make_unet(), encode)
    assert [path.name for path in list_checkpoints(config.output_dir)] == ["checkpoint-2"]
    resumed = make_unet(seed=1)
    train(config, resumed, encode)
    assert are_equal(weights_of(resumed), whole[1])
    assert not list(Path(config.output_dir).glob("*.partial")) + list(Path(config.output_dir).glob(".*.partial"))


def test_only_the_newest_checkpoints_are_kept(make_config):
    config = make_config(max_train_steps=11, checkpointing_steps=1, checkpoints_total_limit=3)
    train(config, make_unet(), encode)
    # in the order of steps, not of letters
    names = [path.name for path in list_checkpoints(config.output_dir)]
    assert names == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]
    assert sorted(path.name for path in Path(config.output_dir).glob("checkpoint-*")) == sorted(names)
    lines = [json.loads(line) for line in (Path(config.output_dir) / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 12))
