"""What a run finds in its folder: nothing of another run is deleted, and a killed run is the run that was not killed."""

import json
import os
import signal
import sys
from pathlib import Path

import kills
import pytest
import torch
from groups import exit_codes, make_process
from packaging.version import Version
from tiny_runs import are_equal, encode, exported, losses, make_unet, metrics, weights_of

from diffusers_imagen.training import Trainer, TrainingInterrupted, export, train
from diffusers_imagen.training.checkpoints import list_checkpoints
from diffusers_imagen.training.monitor import Records
from diffusers_imagen.utils.files import FolderHold


# with torch 2.6 on a CPU, equal steps differ by rounding: weights of up to 0.4 by up to 8e-9
ROUNDING = {"rtol": 0, "atol": 0 if Version(torch.__version__) >= Version("2.7") else 1e-7}
OPTIONS = {"checkpointing_steps": 1, "logging_steps": 2, "validation_prompts": ["text 1"]}


def names(folder) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }


def step_of_stage(folder: Path) -> int:
    return json.loads((folder / "training.json").read_text())["step"]


def interrupt_at(patch, step: int, signum: int = signal.SIGTERM) -> None:
    train_step = Trainer.train_step

    def signalled(self, this_step):
        if this_step == step:
            os.kill(os.getpid(), signum)
        train_step(self, this_step)

    patch.setattr(Trainer, "train_step", signalled)


def test_a_run_into_the_folder_of_another_is_refused_or_sets_it_aside(make_config, tmp_path):
    options, steps = {**OPTIONS, "ema_type": "power"}, 2
    train(make_config(**options), make_unet(), encode)
    folder = tmp_path / "stage"
    before = files_of(folder)
    again = {**options, "max_train_steps": steps}
    with pytest.raises(ValueError, match="`output_dir` is '.*stage', which has checkpoint-3, checkpoint-4, samples"):
        train(make_config(**again), make_unet(), encode)
    assert files_of(folder) == before
    train(make_config(**again, overwrite_output_dir=True), make_unet(), encode)
    aside = files_of(folder / "set-aside-1")
    assert aside == {name: content for name, content in before.items() if name != "run.json"}
    assert names(folder) == [f"checkpoint-{steps - 1}", f"checkpoint-{steps}"]
    assert len(list((folder / "samples").iterdir())) == steps
    train(make_config(max_train_steps=1, overwrite_output_dir=True), make_unet(), encode)
    assert (folder / "set-aside-2" / f"checkpoint-{steps}").is_dir() and names(folder) == ["checkpoint-1"]


def test_a_folder_inside_the_data_is_refused(make_config):
    """Sample grids and card images would be rows of the data when the run is resumed."""
    data = Path(make_config().train_data_dir)
    before = names(data)
    for place in (data, data / "runs" / "a", data / ".." / data.name / "b"):
        with pytest.raises(ValueError, match="`output_dir` is '.*', which is inside `train_data_dir`, but should be"):
            train(make_config(output_dir=place), make_unet(), encode)
    assert names(data) == before


def test_going_back_is_refused_or_sets_aside_what_lies_above(make_config, tmp_path):
    options = {**OPTIONS, "logging_steps": 1, "checkpoints_total_limit": 4}
    train(make_config(**options), make_unet(), encode)
    folder = tmp_path / "stage"
    before, curve = files_of(folder), metrics(folder)
    back = {**options, "resume_from_checkpoint": str(folder / "checkpoint-2"), "max_train_steps": 3}
    with pytest.raises(ValueError, match="of a run that continued after step 2. .* --overwrite_output_dir True"):
        train(make_config(**back), make_unet(), encode)
    assert files_of(folder) == before
    train(make_config(**back, overwrite_output_dir=True), make_unet(), encode)
    aside = files_of(folder / "set-aside-1")
    assert {name.split("/")[0] for name in aside} >= {"checkpoint-3", "checkpoint-4", "unet", "training.json"}
    assert all(before[name] == content for name, content in aside.items())
    assert names(folder) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"] and metrics(folder) == curve[:3]
    assert step_of_stage(folder) == 3


def test_what_was_just_written_is_never_deleted(make_config, tmp_path, monkeypatch):
    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 1, "resume_from_checkpoint": "latest"}
    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted) as stopped:
        interrupt_at(patch, 2)
        train(make_config(**options), make_unet(), encode)
    assert names(tmp_path / "stage") == ["checkpoint-3"]
    assert f"the state is saved in {tmp_path / 'stage' / 'checkpoint-3'}" in str(stopped.value)


def test_a_last_step_later_than_the_checkpoint_is_needed(make_config):
    train(make_config(), make_unet(), encode)
    with pytest.raises(ValueError, match="`max_train_steps` is 3, but .*checkpoint-4 is of step 4"):
        train(make_config(max_train_steps=3, resume_from_checkpoint="latest"), make_unet(), encode)


def test_a_stopped_run_that_is_resumed_at_its_step_exports_it(make_config, tmp_path, monkeypatch):
    """What a run of three steps leaves is what one leaves that was to have four, stopped after three."""
    options = {"validation_prompts": ["text 1"], "ema_type": "power", "logging_steps": 2}
    whole = make_config(**options, max_train_steps=3, output_dir=tmp_path / "whole" / "stage")
    train(whole, make_unet(), encode)
    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted):
        interrupt_at(patch, 2)
        train(make_config(**options), make_unet(), encode)
    assert step_of_stage(tmp_path / "stage") == 2
    for _ in range(2):
        last = make_config(**options, max_train_steps=3, resume_from_checkpoint="latest")
        train(last, make_unet(seed=1), encode)
        assert kills.results(tmp_path / "stage") == kills.results(tmp_path / "whole" / "stage")
    path = tmp_path / "stage" / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    train(last, make_unet(seed=1), encode)
    assert are_equal(exported(last.output_dir), exported(whole.output_dir))


@pytest.mark.parametrize("part", ["unet", "training.json"])
def test_parts_that_were_being_moved_are_moved_by_the_next_run(make_config, tmp_path, monkeypatch, part):
    config = make_config(checkpointing_steps=1, max_train_steps=2, resume_from_checkpoint="latest")
    replace = os.replace

    def gone(source, target):
        if (Path(target).name, Path(target).parent.name) == (part, "stage") and "checkpoint-1" in names(
            tmp_path / "stage"
        ):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export.os, "replace", gone)
        train(config, make_unet(), encode)
    assert not (tmp_path / "stage" / "training.json").exists()  # nothing says which step the parts are of
    resumed = make_config(checkpointing_steps=1, max_train_steps=1, resume_from_checkpoint="latest")
    train(resumed, make_unet(), encode)
    assert step_of_stage(tmp_path / "stage") == 1
    assert not [path.name for path in (tmp_path / "stage").glob(".stage*")]


def test_a_run_killed_before_a_change_of_the_file_system_is_resumed_exactly(make_config, tmp_path):
    """One of the changes of the second step, whose number depends on the versions of dependencies; `kills` does any."""
    options = {**OPTIONS, "max_train_steps": 2, "checkpoints_total_limit": 1, "resume_from_checkpoint": "latest"}
    whole, config = make_config(output_dir=tmp_path / "whole" / "run", **options), make_config(**options)
    config.output_dir = str(tmp_path / "run")
    network, resumed = make_unet(), make_unet(seed=1)
    train(whole, network, encode)
    assert exit_codes([make_process(kills.run_until, vars(config), 32, "checkpoint-1")]) == [kills.EXIT]
    assert names(config.output_dir) == ["checkpoint-1"]
    train(config, resumed, encode)
    left, expected = kills.results(tmp_path / "run"), kills.results(tmp_path / "whole" / "run")
    for results in (left, expected):
        del results["unet/diffusion_pytorch_model.safetensors"]
    assert left == expected
    torch.testing.assert_close(exported(tmp_path / "run"), exported(tmp_path / "whole" / "run"), **ROUNDING)
    torch.testing.assert_close(weights_of(resumed), weights_of(network), **ROUNDING)


def test_a_folder_that_a_run_holds_is_refused_to_others(make_config, tmp_path):
    with FolderHold(tmp_path / "stage", "output_dir"):
        with pytest.raises(ValueError, match=f"`output_dir` is '.*stage', which process {os.getpid()} on"):
            train(make_config(), make_unet(), encode)
    train(make_config(), make_unet(), encode)


def test_a_run_before_its_first_checkpoint_goes_on_as_itself_only(make_config, tmp_path, monkeypatch):
    def gone(self, step):
        raise OSError("gone")

    options = {"resume_from_checkpoint": "latest"}
    train_step = Trainer.train_step
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        patch.setattr(Trainer, "train_step", lambda self, step: (gone if step else train_step)(self, step))
        train(make_config(**options), make_unet(), encode)
    assert len(losses(tmp_path / "stage")) == 1
    with pytest.raises(ValueError, match="was trained with seed 0, but this run has 1"):
        train(make_config(**options, seed=1), make_unet(), encode)
    with pytest.raises(ValueError, match="has metrics.jsonl of a run that started earlier"):
        train(make_config(), make_unet(), encode)
    train(make_config(**options), make_unet(), encode)
    assert len(losses(tmp_path / "stage")) == 4


def test_a_disk_that_fills_up_leaves_what_is_whole(make_config, tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")
    for module, name in (("checkpoints", "save_state"), ("export", "write_record"), ("sampling", "make_image_grid")):
        folder = tmp_path / name
        config = make_config(output_dir=folder, **OPTIONS, max_train_steps=3, resume_from_checkpoint="latest")
        place = f"diffusers_imagen.training.{module}.{name}"
        original = getattr(sys.modules[f"diffusers_imagen.training.{module}"], name)

        def fails(*args, **kwargs):
            if names(folder) == ["checkpoint-1"]:
                raise full
            return original(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(place, fails)
            train(config, make_unet(), encode)
        assert names(folder) == ["checkpoint-1"]
        assert step_of_stage(folder) == (2 if name == "save_state" else 1)
        assert not list(folder.rglob(".*.partial")) + list(folder.glob(".stage*"))
        train(config, make_unet(), encode)
        assert step_of_stage(folder) == 3


def test_weights_that_are_not_finite_are_neither_trained_nor_written(make_config, tmp_path, monkeypatch):
    unet = make_unet()
    with torch.no_grad():
        unet.conv_in.bias[0] = float("nan")
    with pytest.raises(ValueError, match="The network has 1 weights that are not finite, such as conv_in.bias"):
        train(make_config(), unet, encode)
    assert not (tmp_path / "stage").exists()

    train_step = Trainer.train_step

    def spoiled(self, step):
        train_step(self, step)
        if step == 3:
            with torch.no_grad():
                self.parameters[0].fill_(float("inf"))

    config = make_config(**OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="not finite after step 4.*point-3"):
        patch.setattr(Trainer, "train_step", spoiled)
        train(config, make_unet(), encode)
    assert names(config.output_dir) == ["checkpoint-2", "checkpoint-3"]
    assert step_of_stage(tmp_path / "stage") == 3


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_in_the_place_of_records_is_refused(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="metrics.jsonl' is not a file"):
        Records(tmp_path / "metrics.jsonl").append(1, {"loss": 0.5})
