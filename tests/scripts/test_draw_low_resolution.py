"""Pairs of images and low-resolution images for super-resolution, of which a part is drawn by a base stage."""

import io
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from script_modules import script_module

from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.data import make_train_batches
from diffusers_imagen.training.data.sources import open_rows


@pytest.fixture(scope="module")
def script():
    with script_module("draw_low_resolution") as module:
        yield module


@pytest.fixture
def folder(cascade, tmp_path, monkeypatch):
    """Three images in one style, of which two are trained on, and one in another; and a cascade of 16 and 32 px."""
    cascade.save_pretrained(tmp_path / "cascade")
    (tmp_path / "data").mkdir()
    rows = []
    for number, (style, split) in enumerate([("a", "train"), ("a", "test"), ("a", "train"), ("b", "train")]):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number}.png")
        rows.append(
            {"file_name": f"{number}.png", "text": "a red apple", "style": style, "split": split, "number": number}
        )
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(script, monkeypatch):
    def run(**changes) -> None:
        given = {"pretrained_model_name_or_path": "cascade", "train_data_dir": "data", "resolution": 32}
        given |= {"num_drawn": 5, "batch_size": 2, "output_dir": "pairs", **changes}
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["draw_low_resolution.py", *words])
        script.main()

    return run


def test_the_trainer_reads_the_pairs(folder, run):
    run(styles="a")
    sizes = {"resolution": 32, "low_resolution": 16, "low_resolution_column": "low_res"}
    config = TrainingConfig(preset="emoji_sr_256", train_data_dir="pairs", train_batch_size=60, **sizes)
    rows = open_rows(config, "train").data
    assert len(rows) == 2 + 5 and len(open_rows(config, "test").data) == 1
    batch = next(make_train_batches(config))
    plain = next(make_train_batches(TrainingConfig(**{**vars(config), "low_resolution_column": None})))
    assert torch.equal(batch.images, plain.images)
    apart = (batch.low_res - plain.low_res).abs().amax(dim=(1, 2, 3))
    # reductions by Pillow are rounded to whole values; what was drawn is another image
    given = apart < 2.1 / 127.5
    assert 5 < given.sum() < 40 and (apart[~given] > 0.05).all()


def test_the_same_seed_draws_the_same(folder, run):
    for name in ("pairs", "again"):
        run(output_dir=name)
    assert all((folder / "pairs" / name).read_bytes() == (folder / "again" / name).read_bytes()
               for name in ("given.parquet", "drawn.parquet"))  # fmt: skip
    run(output_dir="none", num_drawn=0)
    assert [path.name for path in (folder / "none").iterdir()] == ["given.parquet"]


def test_the_batch_size_does_not_change_what_is_drawn(folder, run):
    """Strength and noise are those of a row: kernels that sum a batch in another order move a pixel by one at most."""
    images = []
    for batch_size in (1, 2, 5):
        run(output_dir=f"of-{batch_size}", batch_size=batch_size, num_drawn=7)
        rows = pq.read_table(folder / f"of-{batch_size}" / "drawn.parquet").to_pylist()
        assert len(rows) == 7
        images.append([(row["number"], row["low_res"]["bytes"]) for row in rows])
    for row, *others in zip(*images):
        for number, low_res in others:
            assert number == row[0]
            apart = np.int16(Image.open(io.BytesIO(low_res))) - np.int16(Image.open(io.BytesIO(row[1])))
            assert np.abs(apart).max() <= 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"styles": "c"}, r"`train_split` is 'train', which has no rows of `styles` \['c'\]"),
        ({"train_split": "nowhere"}, "`train_split` is 'nowhere', which has no rows"),
        ({"num_inference_steps": 4}, "`num_inference_steps` is 4, but should be from 5 to"),
        ({"batch_size": 0}, "`batch_size` is 0, but should be from 1 to"),
        ({"train_data_dir": "cascade"}, "`train_data_dir` is 'cascade', which has no metadata.jsonl"),
        ({"pretrained_model_name_or_path": "data"}, "`model` is 'data'"),
        ({"output_dir": "data"}, "`output_dir` is 'data', which is not empty"),
    ],
)
def test_bad_arguments_leave_nothing(folder, run, changes, message):
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert sorted(folder.rglob("*")) == before
