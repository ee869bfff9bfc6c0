"""The folder that the pages are run in, with few steps, and with what their readers have at hand."""

import json
from pathlib import Path

import pytest
import torch
from deepfloyd_repository import stage_1, stage_2, write_repository
from doc_blocks import ROOT
from networks import randomize
from PIL import Image, ImageDraw

from diffusers_imagen import ImagenCascadePipeline
from diffusers_imagen.models.presets import PRESETS
from diffusers_imagen.pipelines import planning


SHIPPED = ROOT / "checkpoints" / "imagen-emoji"
NARROW = {"attention_head_dim": 8, "norm_num_groups": 4, "layers_per_block": 1}


def draw_picture(size: int) -> Image.Image:
    """A red disc on white."""
    picture = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(picture).ellipse((size // 4, size // 4, 3 * size // 4, 3 * size // 4), "red")
    return picture


def draw_mask(size: int) -> Image.Image:
    """White on the right, where a picture is to be painted."""
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).rectangle((size // 2, 0, size, size), "white")
    return mask


def write_data(folder: Path) -> None:
    """The sets that the pages train on: captions in files, a table of captions, and pictures of a subject."""
    for name in ("style", "emoji", "my-headphone"):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            draw_picture(256).save(folder / name / f"{number}.png")
    for number in range(4):
        (folder / "style" / f"{number}.txt").write_text("a red ball")
    columns = {"text": "a 3d render of a red ball", "style": "3d", "concept": "red ball", "split": "train"}
    rows = [{"file_name": f"{number}.png", **columns} for number in range(4)]
    (folder / "emoji" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def narrow_cascade(tmp_path_factory) -> Path:
    """The shipped cascade with few channels and random weights: the same sizes, components and defaults."""
    pipe = ImagenCascadePipeline.from_pretrained(SHIPPED)
    for name in ("base_unet", "sr256_unet"):
        network = getattr(pipe, name)
        narrow = {**NARROW, "block_out_channels": (8,) * len(network.config.block_out_channels)}
        torch.manual_seed(0)
        network = randomize(type(network).from_config({**network.config, **narrow}))
        with torch.no_grad():
            network.conv_out.weight.mul_(0.1)
        setattr(pipe, name, network)
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("checkpoints"))
    return folder


@pytest.fixture
def few_steps(monkeypatch):
    """Every call makes two steps at most, in super-resolution one."""
    set_schedule = planning.set_schedule

    def set_short(scheduler, name, settings, device):
        steps = min(settings.num_inference_steps, 2 if name == "base" else 1)
        set_schedule(scheduler, name, settings._replace(num_inference_steps=steps), device)

    monkeypatch.setattr(planning, "set_schedule", set_short)


@pytest.fixture
def workplace(request, tmp_path, monkeypatch, few_steps, narrow_cascade) -> Path:
    """A clone of the repository, with pictures, prompts and a style to train on; the working folder of a test.

    Its cascade is narrow, unless the parameter of the fixture asks for the shipped one.
    """
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / SHIPPED.name).symlink_to(SHIPPED if request.param else narrow_cascade)
    draw_picture(64).save(tmp_path / "small.png")
    draw_picture(64).save(tmp_path / "picture.png")
    draw_mask(64).save(tmp_path / "mask.png")
    (tmp_path / "prompts.txt").write_text("a red apple\na blue fish\n")
    write_data(tmp_path / "data")
    (tmp_path / "run.yaml").write_text(
        "train_data_dir: data/style\npreset: emoji_base_64\ntext_encoder: checkpoints/imagen-emoji\n"
    )
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".datasets")
    for name in ("emoji_base_64", "emoji_sr_256"):
        preset = PRESETS[name]
        narrow = {**NARROW, "block_out_channels": (8,) * len(preset.config["block_out_channels"])}
        monkeypatch.setitem(PRESETS, name, preset._replace(config={**preset.config, **narrow}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def deepfloyd(workplace) -> None:
    """Small repositories of DeepFloyd IF, as folders under the names that they have on the Hub."""
    for name, make in (("IF-I-M-v1.0", stage_1), ("IF-II-M-v1.0", stage_2)):
        write_repository(make(), workplace / "DeepFloyd" / name, variant="fp16")
