"""The shipped cascade by its name: in a clone, in an installed package of weights, and nowhere."""

import sys
from importlib.metadata import entry_points

import pytest

from diffusers_imagen import ImagenCascadePipeline, ImagenPipeline, shipped_cascade
from diffusers_imagen.commands.main import main
from diffusers_imagen.text.encoder import TextEncoder
from diffusers_imagen.text.pretrained import load_text
from diffusers_imagen.training import DreamBoothTrainingConfig, TrainingConfig
from diffusers_imagen.utils import shipped
from diffusers_imagen.utils.shipped import find_source


MISSING = r"'imagen-emoji'.* is not installed: pip install 'diffusers-imagen\[emoji-weights\]', or .*\(--model\)"


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """As in an empty folder with the package installed, and no weights."""
    monkeypatch.setattr(shipped, "IN_A_CLONE", tmp_path / "checkpoints" / "imagen-emoji")
    monkeypatch.setattr(shipped, "entry_points", lambda **chosen: ())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def installed(outside, cascade, monkeypatch):
    """As with a package of weights: its files and its entry point."""
    folder = outside / "site-packages" / "weights" / "imagen-emoji"
    cascade.save_pretrained(folder)
    (outside / "weights.py").write_text(f"FOLDER = {str(folder)!r}\n")
    metadata = outside / "weights-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: weights\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[diffusers_imagen.models]\nimagen-emoji = weights:FOLDER\n")
    monkeypatch.syspath_prepend(outside)
    monkeypatch.delitem(sys.modules, "weights", raising=False)
    monkeypatch.setattr(shipped, "entry_points", entry_points)
    return str(folder)


def test_in_a_clone_it_is_the_folder_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "IN_A_CLONE", tmp_path)
    monkeypatch.setattr(shipped, "entry_points", None)
    (tmp_path / "model_index.json").touch()
    assert shipped_cascade() == tmp_path and find_source("imagen-emoji") == str(tmp_path)


def test_an_installed_package_names_it(installed, cascade):
    assert str(shipped_cascade()) == find_source("imagen-emoji") == installed
    assert find_source("someone/imagen-emoji") == "someone/imagen-emoji"
    pipe = ImagenCascadePipeline.from_pretrained("imagen-emoji")
    assert pipe.base_unet.config.sample_size == cascade.base_unet.config.sample_size
    assert TextEncoder.from_pretrained("imagen-emoji").width == cascade.text_encoder.config.hidden_size


def test_commands_and_training_know_the_name(installed):
    for config_class, more in (
        (TrainingConfig, {"train_data_dir": "data"}),
        (DreamBoothTrainingConfig, {"instance_data_dir": "data", "instance_prompt": "a sks dog"}),
    ):
        config = config_class(pretrained_model_name_or_path="imagen-emoji", text_encoder="imagen-emoji", **more)
        assert config.pretrained_model_name_or_path == config.text_encoder == installed


def test_composed_stages_take_its_text_encoder(installed, base_unet, cascade):
    pair = (base_unet, cascade.base_scheduler)
    for pipe in (
        ImagenCascadePipeline.from_stages(pair, text_encoder="imagen-emoji"),
        ImagenPipeline.from_stage(pair, text_encoder="imagen-emoji"),
    ):
        assert pipe.text_encoder.config.hidden_size == cascade.text_encoder.config.hidden_size
    assert load_text("imagen-emoji").keys() == {"text_encoder", "tokenizer"}


def test_doctor_examines_it(installed, capsys):
    assert main(["doctor", "imagen-emoji", "--text-encoder", "imagen-emoji"]) == 0
    assert "the text encoder's embeddings have width" in capsys.readouterr().out


def test_a_folder_of_that_name_comes_first(installed, outside):
    (outside / "imagen-emoji").mkdir()
    assert find_source("imagen-emoji") == "imagen-emoji"
    assert str(shipped_cascade()) == installed  # what no one named


@pytest.mark.parametrize(
    "find",
    [
        shipped_cascade,
        lambda: find_source("imagen-emoji"),
        lambda: ImagenCascadePipeline.from_pretrained("imagen-emoji"),
        lambda: TextEncoder.from_pretrained("imagen-emoji"),
        lambda: TrainingConfig(preset="emoji_base_64", train_data_dir="data", text_encoder="imagen-emoji"),
    ],
)
def test_without_it_one_line_says_what_to_install(outside, find):
    with pytest.raises(ValueError, match=MISSING):
        find()


def test_a_package_that_lost_its_files_is_named(installed, outside):
    (outside / "site-packages" / "weights" / "imagen-emoji" / "model_index.json").unlink()
    with pytest.raises(ValueError, match="weights/imagen-emoji' has no model_index.json: install it again with pip"):
        shipped_cascade()
