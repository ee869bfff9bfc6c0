"""The cascade in checkpoints/imagen-emoji, and what the README and `make demo` do with it."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_imagen import EfficientUNetModel, ImagenCascadePipeline, ImagenUNetModel
from diffusers_imagen.utils.shipped import shipped_cascade


ROOT = Path(__file__).parents[1]
try:
    SHIPPED_MODEL = shipped_cascade()
except ValueError as missing:
    if (ROOT / "packages").is_dir():  # a clone
        raise
    pytest.skip(str(missing), allow_module_level=True)  # a source distribution
MIB = 2**20


@pytest.fixture(scope="module")
def pipe() -> ImagenCascadePipeline:
    pipe = ImagenCascadePipeline.from_pretrained(SHIPPED_MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt, seed=0, **kwargs) -> np.ndarray:
    arguments = {"output_resolution": 64, "num_inference_steps": 5, "output_type": "np", **kwargs}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **arguments).images


def test_files_are_small_enough():
    sizes = [path.stat().st_size for path in SHIPPED_MODEL.rglob("*") if path.is_file()]
    assert max(sizes) <= 16 * MIB and sum(sizes) <= 100 * MIB


def test_parts(pipe):
    assert type(pipe.base_unet) is ImagenUNetModel and pipe.base_unet.config.sample_size == 64
    assert type(pipe.sr256_unet) is EfficientUNetModel and pipe.sr256_unet.config.sample_size == 256
    for module in (pipe.base_unet, pipe.sr256_unet, pipe.text_encoder):
        assert module.dtype == torch.float32  # stored in half precision, computed in single
    card = (SHIPPED_MODEL / "README.md").read_text()
    notice = (SHIPPED_MODEL / "LICENSES" / "NOTICE.txt").read_text()
    assert "validation loss" in card and "Noto Emoji" in notice and "MiniLM" in notice


def test_colours_follow_the_prompt(pipe):
    """A heart is as large in every colour; the mean colour of what is not white must be the one asked for."""
    means = {}
    for colour in ("red", "green", "blue"):
        images = draw(pipe, f"a 3d render of a {colour} heart", num_images_per_prompt=4)
        means[colour] = images[images.min(axis=-1) < 0.7].mean(axis=0)
    for channel, colour in enumerate(means):
        assert means[colour].argmax() == channel, means


def test_super_resolution_keeps_the_picture(pipe):
    out = pipe(
        "a noto emoji of a red apple",
        num_inference_steps=[5, 2],
        guidance_scale=[4.0, 1.0],
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )
    reduced = torch.nn.functional.interpolate(out.images, (64, 64), mode="bicubic", antialias=True)
    error = (reduced - out.stage_images[64]).square().mean()
    assert error < 0.1 * out.stage_images[64].var()


def test_demo_writes_a_grid_and_an_image_for_every_stage(tmp_path, monkeypatch):
    arguments = ["--output_dir", str(tmp_path), "--prompt=a red heart $5 'quoted'", "--num_inference_steps", "2", "1"]
    monkeypatch.setattr("sys.argv", ["demo.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "demo.py"), run_name="__main__")
    assert not ended.value.code
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a-red-heart-5-quoted-256.png",
        "a-red-heart-5-quoted-64.png",
        "demo.png",
    ]
    assert Image.open(tmp_path / "a-red-heart-5-quoted-64.png").size == (64, 64)
    grid = Image.open(tmp_path / "demo.png")
    assert grid.width > 512 and grid.height > 256


def test_the_readme_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    code = code.replace("[18, 8]", "[2, 1]").replace('"checkpoints/', f'"{ROOT}/checkpoints/')
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert Image.open(tmp_path / "tiger.png").size == (256, 256)
