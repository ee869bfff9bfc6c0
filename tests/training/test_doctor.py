"""What `diffusers-imagen doctor` finds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_imagen import cli
from diffusers_imagen.models import ImagenUNetModel
from diffusers_imagen.training.doctor import examine_losses
from diffusers_imagen.training.embedding_cache import CacheWriter


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def run(capsys, *arguments) -> tuple[int, list[str], str]:
    code = cli.main(["doctor", *map(str, arguments)])
    lines = capsys.readouterr().out.splitlines()
    return code, [line for line in lines if line.startswith("WRONG")], "\n".join(lines)


def write_data(folder: Path, images: dict[str, np.ndarray], captions: list[str]) -> Path:
    folder.mkdir()
    rows = []
    for (name, pixels), caption in zip(images.items(), captions):
        Image.fromarray(pixels).save(folder / name)
        rows.append({"file_name": name, "text": caption, "split": "train"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def noise(seed: int, side: int = 16, spread: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, spread, (side, side, 3), dtype=np.uint8)


def test_a_sound_data_set(tmp_path, capsys):
    folder = write_data(tmp_path / "d", {f"{i}.png": noise(i) for i in range(8)}, [f"caption {i}" for i in range(8)])
    code, wrong, text = run(capsys, folder, "--resolution", 16, "--sigma_data", 0.58)
    assert (code, wrong) == (0, [])
    # uniform bytes: 2 / sqrt(12)
    assert "measured sigma_data 0.57" in text or "measured sigma_data 0.58" in text
    assert "8 rows, of which 8 images are opened" in text and "modes: RGB 8" in text


def test_everything_that_is_wrong_is_said(tmp_path, capsys, tokenizer):
    tokenizer.save_pretrained(tmp_path / "te" / "tokenizer")
    images = {f"{i}.png": noise(i) for i in range(6)} | {"copy.png": noise(0), "small.png": noise(9, side=8)}
    captions = ["a"] * 3 + ["red " * 20, " ", "blue", "apple", "a red apple"]
    folder = write_data(tmp_path / "d", images, captions)
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:200])
    code, wrong, _ = run(capsys, folder, "--resolution", 16, "--sigma_data", 0.25, "--text_encoder", tmp_path / "te")
    assert code == 1
    for part in (
        "1 of 8 images cannot be read and are skipped in training: 5.png: ",
        "configured 0.25: give `sigma_data` 0.5",
        "1 of 8 images are smaller than 16 px and are enlarged: small.png (8x8)",
        "1 of 8 images are pixel for pixel copies: copy.png of 0.png",
        "1 of 8 captions are empty",
        "3 times the same: 'a'",
        "1 of 8 captions (12.5%) are cut at 8 tokens; the longest has 22: 'red red",
    ):
        assert any(part in line for line in wrong), part
    assert len(wrong) == 7


def test_images_in_the_wrong_range(tmp_path, capsys):
    folder = write_data(tmp_path / "d", {f"{i}.png": noise(i, spread=2) for i in range(3)}, ["a", "b", "c"])
    _, wrong, _ = run(capsys, folder, "--resolution", 16)
    assert any("pixels from 0 to 1 of 255: nearly uniform" in line for line in wrong)


def make_unet() -> ImagenUNetModel:
    return ImagenUNetModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_resolutions=(4,),
        attention_head_dim=8,
        norm_num_groups=4,
        encoder_hid_dim=8,
        cross_attention_dim=8,
    )


def test_stages(tmp_path, capsys, text_encoder):
    unet = make_unet()
    unet.save_pretrained(tmp_path / "unet")
    code, wrong, _ = run(capsys, tmp_path)
    assert code == 1 and "this network was never trained" in wrong[0]
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.01)
    unet.save_pretrained(tmp_path / "unet")
    text_encoder.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "losses.jsonl").write_text("".join(f'{{"step": {i}, "loss": {1 / i}}}\n' for i in range(1, 5)))
    width = text_encoder.config.hidden_size
    code, wrong, text = run(capsys, tmp_path)
    if width == 8:
        assert (code, wrong) == (0, []) and "as the network reads them" in text
    else:
        assert code == 1 and f"states are {width} wide, but the network reads 8" in wrong[0]
    assert "loss 1.0000 at first, 0.2500 at its lowest, 0.2500 at last" in text
    with torch.no_grad():
        next(unet.parameters()).fill_(float("nan"))
    unet.save_pretrained(tmp_path / "unet")
    assert "are not finite, such as" in run(capsys, tmp_path)[1][0]


@pytest.mark.parametrize(
    "losses, wrong, word",
    [([1, 0.5, 0.4, 0.41], False, "0.4100 at last"), ([1, 0.5, 0.9, 1.4], True, "rises"), ([1], False, "too few")]
    + [([1, float("nan"), 1], True, "nan at step 1")],
)
def test_curves(losses, wrong, word):
    (finding,) = examine_losses([{"step": i, "loss": loss} for i, loss in enumerate(losses)])
    assert finding.wrong is wrong and word in finding.text


def test_cascades(cascade, tmp_path, capsys):
    cascade.save_pretrained(tmp_path / "cascade")
    assert cli.main(["doctor", str(tmp_path / "cascade")]) == 0
    said = capsys.readouterr().out
    assert "base_unet: ImagenUNetModel" in said and "sr256_unet: EfficientUNetModel" in said
    cascade.sr256_unet = type(cascade.sr256_unet).from_config(cascade.sr256_unet.config)
    cascade.save_pretrained(tmp_path / "half")
    assert cli.main(["doctor", str(tmp_path / "half")]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert len(wrong) == 1 and "sr256_unet" in wrong[0]


def test_caches(tmp_path, capsys):
    writer = CacheWriter(tmp_path / "c", {"class": "T5EncoderModel", "width": 4, "max_length": 3})
    writer.add("a", torch.ones(2, 4))
    writer.flush()
    code, wrong, text = run(capsys, tmp_path / "c")
    assert (code, wrong) == (0, []) and "1 captions, width 4, up to 3 tokens, bfloat16, made by T5EncoderModel" in text
    path = tmp_path / "c" / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    code, wrong, _ = run(capsys, tmp_path / "c")
    assert code == 1 and "another checksum" in wrong[0]


def test_bad_arguments_are_one_line(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path), "--num_images", "0"]) == 2
    assert "`num_images` is 0" in capsys.readouterr().err
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert "which cannot be opened" in capsys.readouterr().err
