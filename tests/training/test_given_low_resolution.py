"""Low-resolution images that a data set has, in place of reductions."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffusers_imagen.diffusion.augmentation import upsample_low_res
from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.data import make_train_batches
from diffusers_imagen.training.data.pyramid import MARGIN
from diffusers_imagen.training.data.sources import open_rows
from diffusers_imagen.training.objective.losses import Conditioning, denoising_loss
from diffusers_imagen.training.objective.objectives import make_objective
from diffusers_imagen.training.objective.step_draws import StepDraws


NUMBER, SIDE, SMALL = 6, 32, 8


def pictures(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture that says its number and place, and a smaller one that is no reduction of it but says the same."""
    return tuple(
        np.stack(
            [np.full((side, side), 40 * number), *(255 - np.indices((side, side)) * (SIDE // side))], axis=-1
        ).astype(np.uint8)
        for side in (SIDE, SMALL)
    )


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(params=["parquet", "metadata"])
def folder(request, tmp_path) -> str:
    rows = [dict(zip(("image", "low"), map(png, pictures(number))), text="a") for number in range(NUMBER)]
    if request.param == "parquet":
        cells = [{**row, **{name: {"bytes": row[name], "path": None} for name in ("image", "low")}} for row in rows]
        pq.write_table(pa.Table.from_pylist(cells), tmp_path / "train.parquet")
        return str(tmp_path)
    lines = []
    for number, row in enumerate(rows):
        for name in ("image", "low"):
            (tmp_path / f"{name}{number}.png").write_bytes(row[name])
        lines.append(json.dumps({"file_name": f"image{number}.png", "low": f"low{number}.png", "text": "a"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path)


def make_config(folder: str, **kwargs) -> TrainingConfig:
    given = {"resolution": SIDE, "low_resolution": SMALL, "low_resolution_column": "low", "train_batch_size": 40}
    return TrainingConfig(
        preset="emoji_sr_256", train_data_dir=folder, noise_conditioning_augmentation=0, **{**given, **kwargs}
    )


@pytest.mark.parametrize("in_memory", [True, False])
def test_whole_pictures_come_with_theirs(folder, in_memory):
    batch = next(make_train_batches(make_config(folder, in_memory=in_memory)))
    assert batch.low_res.shape == (40, 3, SMALL, SMALL)
    images, low_res = ((x * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy() for x in batch[:2])
    numbers = {int(image[0, 0, 0]) // 40 for image in images}
    assert numbers == set(range(NUMBER))
    for image, low in zip(images, low_res):
        expected = pictures(int(image[0, 0, 0]) // 40)
        assert np.array_equal(image, expected[0]) and np.array_equal(low, expected[1])


@pytest.mark.parametrize("in_memory", [True, False])
def test_crops_are_of_the_same_place(folder, in_memory):
    batch = next(make_train_batches(make_config(folder, in_memory=in_memory, crop_size=16)))
    assert batch.low_res.shape == (40, 3, 4 + 2 * MARGIN, 4 + 2 * MARGIN)
    images, low_res = ((x * 127.5 + 127.5).round() for x in batch[:2])
    inner = low_res[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
    assert torch.equal(images[..., ::4, ::4], inner)  # both count their pixels on the grid of the picture
    assert len({tuple(image[:, 0, 0].tolist()) for image in images}) > 10


@pytest.mark.parametrize("crop, low_resolution", [(4, 8), (8, 16), (16, 8)])
def test_a_network_gets_the_crop_of_the_upsampled_image(folder, crop, low_resolution):
    """Crops too that their margin makes as large as their image, or larger."""
    config = make_config(
        folder, crop_size=crop, low_resolution=low_resolution, low_resolution_column=None, train_batch_size=6
    )
    whole = next(make_train_batches(replace(config, crop_size=None, train_batch_size=60)))
    upsampled = upsample_low_res(whole.low_res, (SIDE, SIDE))
    batch, seen = next(make_train_batches(config)), []

    class Network(torch.nn.Module):
        def forward(self, sample, timestep, text, mask, low_res, *rest, **options):
            seen.append(low_res)
            return (sample,)

    objective = make_objective(config)
    draws = StepDraws(objective, 0)
    draws.begin(0, 0, 6)
    denoising_loss(Network(), batch, draws(0, batch), objective, config, Conditioning(low_res_margin=MARGIN))
    assert seen[0].shape == (6, 3, crop, crop)
    for image, low_res in zip(batch.images, seen[0]):
        places = [
            (i, top, left)
            for i in range(len(whole.images))
            for top in range(0, SIDE - crop + 1, config.factor)
            for left in range(0, SIDE - crop + 1, config.factor)
            if torch.equal(whole.images[i, :, top : top + crop, left : left + crop], image)
        ]
        i, top, left = places[0]
        expected = upsampled[i, :, top : top + crop, left : left + crop]
        torch.testing.assert_close(low_res, expected, atol=2e-5, rtol=0)


def test_flips_turn_both(folder):
    batch = next(make_train_batches(make_config(folder, random_flip=True)))
    flipped = batch.images[:, 2, 0, 0] < batch.images[:, 2, 0, -1]
    assert 5 < flipped.sum() < 35
    assert torch.equal(flipped, batch.low_res[:, 2, 0, 0] < batch.low_res[:, 2, 0, -1])


def test_another_low_resolution_image_makes_another_run(folder):
    batches = make_train_batches(make_config(folder))
    assert open_rows(make_config(folder), "train").image_columns[1] == "low"
    same = make_train_batches(make_config(folder)).content
    assert batches.content == same
    name, pixels = "low0.png", pictures(3)[1]
    if (Path(folder) / name).exists():
        (Path(folder) / name).write_bytes(png(pixels))
    else:
        table = pq.read_table(Path(folder) / "train.parquet").to_pylist()
        table[0]["low"]["bytes"] = png(pixels)
        pq.write_table(pa.Table.from_pylist(table), Path(folder) / "train.parquet")
    assert make_train_batches(make_config(folder)).content != batches.content


def test_bad_columns_are_refused(folder):
    with pytest.raises(ValueError, match=r"The data set lacks the columns \['small'\]"):
        make_train_batches(make_config(folder, low_resolution_column="small"))
    with pytest.raises(ValueError, match="`low_resolution_column` is 'low', but there is no `low_resolution`"):
        make_config(folder, low_resolution=None)
