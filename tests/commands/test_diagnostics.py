"""What `diffusers-imagen doctor` finds."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_imagen.commands import main as cli
from diffusers_imagen.commands.diagnostics import examine_losses
from diffusers_imagen.models import ImagenUNetModel
from diffusers_imagen.text.cache_writer import CacheWriter


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


def noise(seed: int, resolution: int = 16, spread: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, spread, (resolution, resolution, 3), dtype=np.uint8)


def test_a_sound_data_set(tmp_path, capsys):
    folder = write_data(tmp_path / "d", {f"{i}.png": noise(i) for i in range(8)}, [f"caption {i}" for i in range(8)])
    code, wrong, text = run(capsys, folder, "--resolution", 16, "--sigma_data", 0.58)
    assert (code, wrong) == (0, [])
    # uniform bytes: 2 / sqrt(12)
    assert "measured sigma_data 0.57" in text or "measured sigma_data 0.58" in text
    assert "8 rows, of which 8 images are opened" in text and "modes: RGB 8" in text


def test_images_that_are_reduced(tmp_path, capsys):
    images = {f"{i}.png": np.kron(noise(i), np.ones((3, 3, 1), dtype=np.uint8)) for i in range(4)}
    images |= {"wide.png": noise(4)[:8].repeat(4, axis=0), "copy.png": images["0.png"]}
    folder = write_data(tmp_path / "d", images, [f"caption {i}" for i in range(6)])
    code, wrong, text = run(capsys, folder, "--resolution", 16, "--sigma_data", 0.58)
    assert code == 1 and wrong == ["WRONG  1 of 6 images are exact copies of others: copy.png of 0.png"], text


def test_everything_that_is_wrong_is_said(tmp_path, capsys, tokenizer):
    tokenizer.save_pretrained(tmp_path / "te" / "tokenizer")
    images = {f"{i}.png": noise(i) for i in range(6)} | {"copy.png": noise(0), "small.png": noise(9, resolution=8)}
    captions = ["a"] * 3 + ["red " * 20, " ", "blue", "apple", "a red apple"]
    folder = write_data(tmp_path / "d", images, captions)
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:200])
    code, wrong, _ = run(capsys, folder, "--resolution", 16, "--sigma_data", 0.25, "--text_encoder", tmp_path / "te")
    assert code == 1
    for part in (
        "1 of 8 images cannot be read and are skipped in training: 5.png: ",
        "configured 0.25: set `sigma_data` to 0.5",
        "1 of 8 images are smaller than 16 px and are upscaled: small.png (8x8)",
        "1 of 8 images are exact copies of others: copy.png of 0.png",
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
    assert code == 1 and "it is untrained" in wrong[0]
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.01)
    unet.save_pretrained(tmp_path / "unet")
    text_encoder.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "losses.jsonl").write_text("".join(f'{{"step": {i}, "loss": {1 / i}}}\n' for i in range(1, 5)))
    width = text_encoder.config.hidden_size
    code, wrong, text = run(capsys, tmp_path)
    if width == 8:
        assert (code, wrong) == (0, []) and "as the network needs" in text
    else:
        assert code == 1 and f"embeddings have width {width}, but the network needs width 8" in wrong[0]
    assert "loss: first 1.0000, lowest 0.2500, last 0.2500" in text
    with torch.no_grad():
        next(unet.parameters()).fill_(float("nan"))
    unet.save_pretrained(tmp_path / "unet")
    assert "are not finite, such as" in run(capsys, tmp_path)[1][0]


@pytest.mark.parametrize(
    "losses, wrong, word",
    [
        ([1, 0.5, 0.4, 0.41], False, "last 0.4100"),
        ([1, 0.5, 0.9, 1.4], True, "it increases; lower `learning_rate`"),
        ([1], False, "too few"),
    ]
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
    writer.add(["a"], [torch.ones(2, 4)])
    writer.flush()
    code, wrong, text = run(capsys, tmp_path / "c")
    assert (code, wrong) == (
        0,
        [],
    ) and "1 captions, width 4, up to 3 tokens, bfloat16, encoded by T5EncoderModel" in text
    path = tmp_path / "c" / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    code, wrong, _ = run(capsys, tmp_path / "c")
    assert code == 1 and "a different checksum" in wrong[0]


def test_bad_arguments_are_one_line(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path), "--num_images", "0"]) == 2
    assert "`num-images` is 0" in capsys.readouterr().err
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert "which cannot be opened" in capsys.readouterr().err


@pytest.fixture
def stage(tmp_path, text_encoder) -> Path:
    """A trained stage that reads the text encoder's embeddings."""
    unet = ImagenUNetModel.from_config({**make_unet().config, "encoder_hid_dim": text_encoder.config.hidden_size})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.01)
    unet.save_pretrained(tmp_path / "stage" / "unet")
    text_encoder.save_pretrained(tmp_path / "stage" / "text_encoder")
    (tmp_path / "stage" / "losses.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    return tmp_path / "stage"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


WEIGHTS = "diffusion_pytorch_model.safetensors"
FAULTS = {
    "no weights": (lambda stage: (stage / "unet" / WEIGHTS).unlink(), "unet: the network cannot be read: "),
    "weights that are cut": (lambda stage: cut(stage / "unet" / WEIGHTS), "unet: the network cannot be read: "),
    "a list": (lambda stage: (stage / "unet" / "config.json").write_text("[]"), "unet: the network cannot be read: "),
    "half": (lambda stage: (stage / "unet" / "config.json").write_text("{"), "unet: the network cannot be read: "),
    "no class": (lambda stage: (stage / "unet" / "config.json").write_text("{}"), "unet: the network cannot be read: "),
    "text encoder": (
        lambda stage: (stage / "text_encoder" / "config.json").write_text("7"),
        "unet: the text encoder cannot be read: ",
    ),
    "index": (lambda stage: (stage / "model_index.json").write_text("[]"), "model_index.json cannot be read: "),
    "losses": (
        lambda stage: (stage / "losses.jsonl").write_text('{"loss": 1}\n{"loss"\n'),
        "losses.jsonl cannot be read: line 2 is not a record with a `loss`: '{\"loss\"'",
    ),
    "a list of losses": (lambda stage: (stage / "losses.jsonl").write_text("[1]\n"), "losses.jsonl cannot be read: line 1"),
    "a word": (lambda stage: (stage / "losses.jsonl").write_text('{"loss": "low"}'), "losses.jsonl cannot be read: line 1"),
    "bytes": (lambda stage: (stage / "losses.jsonl").write_bytes(b"\xff"), "losses.jsonl cannot be read: "),
    "diverged": (lambda stage: (stage / "losses.jsonl").write_text('{"loss": NaN}'), "the loss is nan at step None"),
    "fifo": (lambda stage: os.mkfifo(stage / "unet" / "fifo"), "unet/fifo is not a regular file"),
    "broken link": (lambda stage: (stage / "a").symlink_to("nowhere"), "a is not a regular file"),
    "manifest": (lambda stage: (stage / "manifest.json").write_text("[]"), "the embedding cache cannot be read: "),
    "manifest of another": (lambda stage: (stage / "manifest.json").write_text("{}"), "the embedding cache cannot be read: "),
}  # fmt: skip


@pytest.mark.parametrize("fault, message", FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_read_is_a_finding(stage, capsys, fault, message):
    assert run(capsys, stage)[:2] == (0, [])
    fault(stage)
    code, wrong, _ = run(capsys, stage)
    assert code == 1 and len(wrong) == 1 and wrong[0].startswith(f"WRONG  {message}")


def test_a_folder_with_only_a_config_is_a_finding(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"_class_name": "ImagenUNetModel"}')
    code, wrong, _ = run(capsys, tmp_path)
    assert code == 1 and "the network cannot be read: " in wrong[0]


def test_a_network_that_lacks_weights_is_a_finding(stage, capsys):
    tensors = load_file(stage / "unet" / WEIGHTS)
    del tensors["conv_in.weight"]
    save_file(tensors, stage / "unet" / WEIGHTS, metadata={"format": "pt"})
    code, wrong, _ = run(capsys, stage)
    assert code == 1 and "1 weights are missing, such as conv_in.weight" in wrong[0]


@pytest.mark.parametrize(
    ("option", "value"),
    [("sigma_data", value) for value in ("0", "-1", "nan", "inf")]
    + [("resolution", value) for value in ("0", "-1", "1000000")]
    + [("num_images", value) for value in ("0", "-3")]
    + [("tokenizer_max_length", "0")],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_read(stage, capsys, option, value):
    assert cli.main(["doctor", str(stage), f"--{option}", value]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith(f"diffusers-imagen: error: `{option.replace('_', '-')}` is {value}")
        and error.count("\n") == 1
    )


@pytest.mark.parametrize("name", ["fifo", "nowhere/at/all", "./nowhere", "no where"])
def test_what_is_no_folder_is_refused_without_asking_the_hub(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    assert cli.main(["doctor", name]) == 2
    assert f"`path` is '{Path(name)}', " in capsys.readouterr().err


def test_one_colour_has_no_deviation(tmp_path, capsys):
    images = {f"{i}.png": np.full((16, 16, 3), 77, np.uint8) for i in range(2)}
    code, wrong, text = run(capsys, write_data(tmp_path / "d", images, ["a", "b"]), "--resolution", 16)
    assert code == 1 and "measured sigma_data 0.000" in text and "set `sigma_data`" not in text
