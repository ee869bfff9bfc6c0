"""A folder of eight small images, and a text encoder that only spells."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from text_sources import FunctionSource

from diffusers_imagen.training import TrainingConfig


SIDE = 32
STYLES = ["flat", "flat", "flat", "flat", "flat", "flat", "shaded", "shaded"]
SPLITS = ["train", "train", "train", "train", "train", "validation", "train", "test"]
COLOURS = [(30 * i, 255 - 30 * i, 128 if i % 2 else 0) for i in range(8)]
MAX_LETTERS = 16


def draw(i: int) -> np.ndarray:
    """A square of its own colour on nothing; the pixels of the first row fade out."""
    image = np.zeros((SIDE, SIDE, 4), dtype=np.uint8)
    image[8:24, 8:24] = (*COLOURS[i], 255)
    image[0, :, :3] = COLOURS[i]
    image[0, :, 3] = np.linspace(0, 255, SIDE).round()
    return image


def write_rows(folder: Path, rows: list[dict]) -> str:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def rows() -> list[dict]:
    return [
        {
            "file_name": f"images/{i}.png",
            "text": f"text {i}",
            "style": STYLES[i],
            "concept": f"concept {i // 2}",
            "split": SPLITS[i],
            "tags": [f"tag {i}", "b"],
        }
        for i in range(8)
    ]


@pytest.fixture
def imagefolder(tmp_path, monkeypatch, rows) -> str:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for i, row in enumerate(rows):
        Image.fromarray(draw(i)).save(folder / row["file_name"])
    return write_rows(folder, rows)


@pytest.fixture
def encode():
    """Captions to their letters: `(B, 16, 1)`, zero at padded positions, and the mask."""

    def encode(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        text = torch.zeros(len(captions), MAX_LETTERS, 1)
        for i, caption in enumerate(captions):
            text[i, : len(caption), 0] = torch.tensor([ord(letter) for letter in caption]).float()
        return text, text[..., 0] > 0

    return FunctionSource(encode, 1)


@pytest.fixture
def decode():
    """Letters back to captions."""

    def decode(text: torch.Tensor, mask: torch.Tensor) -> list[str]:
        return ["".join(chr(int(code)) for code in row[valid, 0]) for row, valid in zip(text, mask)]

    return decode


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps its state for the whole process."""
    yield
    tiny_runs.reset_accelerate()


@pytest.fixture
def make_config(imagefolder, tmp_path, fresh_accelerator):
    """A run of four steps on six images."""

    def make_config(**kwargs) -> TrainingConfig:
        return TrainingConfig(
            **tiny_runs.settings(imagefolder, kwargs.pop("output_dir", tmp_path / "stage"), **kwargs)
        )

    return make_config
