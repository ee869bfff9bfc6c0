"""The training commands: of `diffusers-imagen`, as programs of their own, and as the files in scripts/."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import *  # noqa: F403

from diffusers_imagen import ImagenPipeline
from diffusers_imagen.training import (
    DreamBoothTrainingConfig,
    LoraTrainer,
    LoraTrainingConfig,
    Trainer,
    TrainingConfig,
)
from diffusers_imagen.training import command as training_command
from diffusers_imagen.training.finetuning import dreambooth
from diffusers_imagen.utils.packages import MissingPackages, require_packages


SCRIPTS = Path(__file__).parents[2] / "scripts"
COMMANDS = {
    "train": ("train_imagen.py", TrainingConfig),
    "train-lora": ("train_imagen_lora.py", LoraTrainingConfig),
    "train-dreambooth": ("train_imagen_dreambooth.py", DreamBoothTrainingConfig),
}


@pytest.fixture
def start(monkeypatch, capsys):
    """Starts a program of a command in this process; returns its exit code and the lines of stderr."""

    def start(command: str, form: str, *flags: str):
        if form == "module":
            monkeypatch.setattr(sys, "argv", ["python", *flags])
            begin = {"run_name": "__main__", "alter_sys": True}
            name, run = f"diffusers_imagen.{command.replace('-', '_')}", runpy.run_module
            monkeypatch.delitem(sys.modules, name, raising=False)
        else:
            name = str(SCRIPTS / COMMANDS[command][0])
            monkeypatch.setattr(sys, "argv", [name, *flags])
            begin, run = {"run_name": "__main__"}, runpy.run_path
        with pytest.raises(SystemExit) as ended:
            run(name, **begin)
        return ended.value.code, capsys.readouterr().err.strip().splitlines()

    return start


@pytest.mark.parametrize("command", COMMANDS)
def test_every_form_has_the_same_options_and_says_what_is_wrong(run, start, command, monkeypatch):
    flags = ("--seed", "-1", "--instance_data_dir", "x", "--instance_prompt", "y")
    flags = flags[: len(flags) if command == "train-dreambooth" else 2]
    code, _, error = run(command, *flags, "--preset", "emoji_base_64")
    assert code == 2 and error[-1].startswith("diffusers-imagen: error: `seed` is -1")
    name = COMMANDS[command][0]
    program = f"{command.replace('-', '_')}.py"
    assert start(command, "script", *flags)[1][-1] == error[-1].replace("diffusers-imagen", name)
    code, lines = start(command, "module", *flags)
    assert code == 2 and lines[-1] == error[-1].replace("diffusers-imagen", program)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_options_of_the_configuration(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and out.startswith(f"usage: diffusers-imagen {command} ")
    config_class = COMMANDS[command][1]
    assert [
        name for name in (field.name for field in dataclasses.fields(config_class)) if f"--{name}" not in out
    ] == []
    assert f"accelerate launch -m diffusers_imagen.{command.replace('-', '_')}" in " ".join(out.split())


def test_a_stage_is_trained_as_from_python(run, imagefolder, cascade, tmp_path, fresh_accelerator):
    """In float32 on the CPU the same seed gives the same weights to the last bit, as from Python."""
    cascade.save_pretrained(tmp_path / "cascade")
    settings = {
        **{"train_data_dir": imagefolder, "cache_dir": tmp_path / "cache", "resolution": 16, "max_train_steps": 2},
        **{"pretrained_model_name_or_path": tmp_path / "cascade", "text_encoder": tmp_path / "cascade"},
        **{"train_batch_size": 2, "lr_warmup_steps": 0, "seed": 3},
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    code, _, error = run("train", *flags, "--output_dir", tmp_path / "stage")
    assert code == 0, error
    trained = ImagenPipeline.from_pretrained(tmp_path / "stage", text_encoder=None, tokenizer=None).unet.state_dict()
    tiny_runs.reset_accelerate()  # noqa: F405
    config = TrainingConfig(**{**settings, "output_dir": tmp_path / "same"})
    Trainer(config, tiny_runs.make_pretrained(config)).train()  # noqa: F405
    for name, value in load_file(tmp_path / "same" / "unet" / "diffusion_pytorch_model.safetensors").items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_makes_the_run_of_its_configuration(run, command, monkeypatch):
    started = []
    monkeypatch.setattr(training_command, "run_training", lambda *given: started.append(given) or 143)
    assert run(command, "--seed", "1")[0] == 143
    ((config_class, find_trainer, argv, program, _),) = started
    assert (config_class, argv, program) == (COMMANDS[command][1], ["--seed", "1"], f"diffusers-imagen {command}")
    makers = {"train": Trainer, "train-lora": LoraTrainer, "train-dreambooth": dreambooth.make_trainer}
    assert find_trainer() is makers[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_without_the_packages_of_training_a_line_names_the_extra(run, start, command, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("diffusers_imagen.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    line = "needs datasets( and peft)?: pip install 'diffusers-imagen\\[train\\]'"
    for code, *_, error in (run(command, "--help"), start(command, "script", "--help")):
        assert code == 2 and len(error) == 1 and re.search(line, error[0])


def test_packages_that_are_missing_are_named_with_their_extra():
    require_packages("this", "train", "json", "os")
    with pytest.raises(
        MissingPackages, match=r"^this needs nowhere_1 and nowhere_2: pip install 'diffusers-imagen\[x\]'$"
    ):
        require_packages("this", "x", "nowhere_1", "json", "nowhere_2")
    assert issubclass(MissingPackages, ImportError) and issubclass(MissingPackages, ValueError)
