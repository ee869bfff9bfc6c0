"""Every setting of a training run is told to its users: a new one has to be listed."""

from collections.abc import Iterator
from dataclasses import fields, make_dataclass
from pathlib import Path
from types import ModuleType

import pytest
from script_modules import script_module

from diffusers_imagen.training import DreamBoothTrainingConfig, LoraTrainingConfig, TrainingConfig
from diffusers_imagen.training.data import DataConfig
from diffusers_imagen.training.data.data_config import arg
from diffusers_imagen.training.validation.metric_settings import MetricSettings


ROOT = Path(__file__).parents[1]
SETTINGS = (DataConfig, TrainingConfig, MetricSettings, LoraTrainingConfig, DreamBoothTrainingConfig)


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "training_flags.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def writer() -> Iterator[ModuleType]:
    with script_module("write_training_flags") as module:
        yield module


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_has_a_line_of_the_table(page, settings):
    assert [field.name for field in fields(settings) if f"\n| `{field.name}` |" not in page] == []


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_says_what_it_does(settings):
    assert [field.name for field in fields(settings) if not field.metadata.get("help", "").endswith(".")] == []


def test_the_table_is_up_to_date(page, writer):
    """Types, defaults, meanings, and what a resumed run may change, of which test_run_identity.py holds the list."""
    assert writer.write_page() == page, "docs/training_flags.md is not up to date: run `make docs`"


def test_a_setting_that_nobody_classified_is_named(writer):
    new = make_dataclass("Settings", [("sharpness", float, arg(1.0, "Of a test."))])
    with pytest.raises(ValueError, match="`sharpness` is in no class of training/run_identity.py, but should be in"):
        writer.describe(fields(new)[0], float)
