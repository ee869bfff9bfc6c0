"""How a training script ends: exit code, and one line of what was wrong."""

import errno
import logging
import signal
import sys
from pathlib import Path

import pytest
from huggingface_hub import errors as hub_errors
from tiny_runs import encode, make_unet

from diffusers_imagen.training import DreamBoothTrainingConfig, Trainer, TrainingConfig, export
from diffusers_imagen.training.command import run_training
from diffusers_imagen.training.interruption import TrainingInterrupted
from diffusers_imagen.utils.errors import run_program


def ends(monkeypatch, capsys, flags: str, make_trainer=Trainer, config_class=TrainingConfig) -> tuple[int, str]:
    """Exit code, and what stderr says."""
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: run_training(config_class, lambda: make_trainer))
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "Exactly one of `preset`, `model_config_name_or_path`"),
        ("--preset nonsense", "nonsense"),
        ("--preset emoji_base_64 --lr_scheduler piecewise_constant", "invalid choice: 'piecewise_constant'"),
        ("--preset emoji_base_64 --report_to nonsense", "argument --report_to"),
        ("--preset emoji_base_64 --push_to_hub --hub_token hf_a --hub_model_id a/b/c", "`hub_model_id` is 'a/b/c'"),
        ("--config nowhere.yaml", "`config` is 'nowhere.yaml', which cannot be read: there is no such file"),
        ("--pretrained_model_name_or_path /nowhere --layers_per_block 1000000", "`layers_per_block` is [1000000]"),
        ("--preset emoji_base_64 --seed -1", "`seed` is -1, but should be at least 0 and at most 4294967295"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(monkeypatch, capsys, flags, message):
    code, said = ends(monkeypatch, capsys, flags, make_trainer=None)
    assert code == 2 and said.startswith("train.py: error: ") and said.count("\n") == 1 and message in said


def test_a_script_of_dreambooth_ends_so_too(monkeypatch, capsys):
    code, said = ends(monkeypatch, capsys, "--instance_prompt a", config_class=DreamBoothTrainingConfig)
    assert code == 2 and "Exactly one of `instance_data_dir`, `dataset_name`" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (TrainingInterrupted(signal.SIGTERM, "runs/a/checkpoint-3"), 143, "Stopped by SIGTERM"),
        (FloatingPointError("no finite gradient"), 2, "train.py: error: no finite gradient"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "train.py: error: no space left on the device"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_run_that_stops_says_why(monkeypatch, capsys, error, code, message):
    class Stopping:
        def __init__(self, config, unet):
            pass

        def train(self):
            raise error

    monkeypatch.setattr("diffusers_imagen.training.network.make_unet", lambda config: None)
    ended, said = ends(monkeypatch, capsys, "--preset emoji_base_64", Stopping)
    assert ended == code and said.startswith(message) and said.count("\n") <= 1


def test_a_run_that_ends_has_exit_code_0(monkeypatch, capsys):
    monkeypatch.setattr("diffusers_imagen.training.network.make_unet", lambda config: None)
    ended = type("Ended", (), {"__init__": lambda self, *args: None, "train": lambda self: {}})
    assert ends(monkeypatch, capsys, "--preset emoji_base_64", ended) == (0, "")


@pytest.mark.parametrize("name", ["create_repo", "upload_folder"])
@pytest.mark.parametrize(
    "error",
    [
        getattr(hub_errors, "HTTPError", ConnectionError)("Name or service not known"),
        hub_errors.OfflineModeIsEnabled("Cannot reach the Hub: offline mode is enabled."),
        ConnectionResetError(104, "Connection reset by peer"),
        hub_errors.HFValidationError("Repo id must be"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_hub_and_the_network_refuse_names_the_argument(make_config, monkeypatch, name, error):
    def refuse(*args, **kwargs):
        raise error

    config = make_config(push_to_hub=True, hub_model_id="me/stage", hub_token="hf_a")
    monkeypatch.setattr(export, name, refuse)
    if name == "create_repo":
        with pytest.raises(
            ValueError, match="`push_to_hub` is True, but 'me/stage' cannot be created on the Hub .*`hub_token`"
        ):
            Trainer(config, make_unet(), encode).train()
        assert not Path(config.output_dir, "metrics.jsonl").exists()  # before any step
    else:
        with pytest.raises(ValueError, match="The run is complete in '.*', but was not uploaded to 'me/stage': "):
            export.upload_stage("me/stage", config, 4)


def test_requests_to_the_hub_are_not_in_the_log(monkeypatch, capsys):
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name in ("httpx", "httpx2")]
    monkeypatch.setattr(root, "level", logging.INFO)
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.NOTSET)
    ends(monkeypatch, capsys, "--preset nonsense")
    assert [logger.getEffectiveLevel() for logger in loggers] == [logging.WARNING] * 2
