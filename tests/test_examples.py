"""examples/minimal.py: training and sampling on the lower layers alone."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_imagen import EfficientUNetModel
from diffusers_imagen.diffusion import edm
from diffusers_imagen.diffusion.training_examples import edm_example


EXAMPLE = Path(__file__).parents[1] / "examples" / "minimal.py"


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(minimal):
    """A network, its losses, and an image of each prompt; twice, from the same seeds."""

    def run():
        torch.manual_seed(0)
        unet = EfficientUNetModel(
            16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            attention_head_dim=8,
            attention_types=(None, "fused"),
            encoder_hid_dim=8,
            norm_num_groups=4,
            low_res_conditioning=False,
        )
        generator = torch.Generator().manual_seed(0)
        losses = minimal.train(unet, 100, generator, batch_size=16)
        return losses, minimal.sample(unet, generator, steps=4)

    return run(), run()


def test_it_is_short_and_builds_on_the_lower_layers():
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    imports = {node.module: node.names for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in imports if name.startswith("diffusers_imagen")}
    assert ours == {"diffusers_imagen", "diffusers_imagen.diffusion", "diffusers_imagen.diffusion.training_examples"}
    assert {alias.name for alias in imports["diffusers_imagen"]} == {"EDMAdamsScheduler", "EfficientUNetModel"}


def test_a_drawn_shape_has_its_color_on_white(minimal):
    image = minimal.draw("red", "square", torch.Generator().manual_seed(0))
    assert image.shape == (3, 16, 16)
    assert torch.equal(image[:, 0, 0], torch.ones(3)) and torch.equal(image[:, 8, 8], torch.tensor([1.0, -1.0, -1.0]))


def test_it_learns_more_than_a_constant_knows(trained, minimal):
    """The least loss of a constant output is the variance of the target, here 1.1, since its weight is 1."""
    generator = torch.Generator().manual_seed(1)
    x_0 = torch.stack([minimal.draw(*prompt, generator) for prompt in minimal.PROMPTS])
    sigma = edm.draw_sigma(len(x_0), generator=generator)
    example = edm_example(x_0, torch.randn(x_0.shape, generator=generator), sigma, minimal.SIGMA_DATA)
    torch.testing.assert_close(example.weight, torch.ones_like(example.weight))
    losses, _ = trained[0]
    assert sum(losses[-10:]) / 10 < 0.85 * example.target.var()


def test_its_samples_are_finite_and_follow_the_seed(trained, minimal):
    (losses, images), again = trained
    assert images.shape == (len(minimal.PROMPTS), 3, 16, 16) and images.isfinite().all()
    assert losses == again[0] and torch.equal(images, again[1])


def test_it_writes_a_picture(minimal, tmp_path):
    minimal.main(str(tmp_path / "minimal.png"), steps=2)
    assert Image.open(tmp_path / "minimal.png").size == (12 * 64, 4 * 64)
