"""A network of another family is trained as this package's own are."""

import pytest
import torch
from foreign_network import ConditionedUNet2D

import diffusers_imagen
from diffusers_imagen import ImagenPipeline, ImagenSuperResolutionPipeline
from diffusers_imagen.training import train


@pytest.mark.parametrize("low_resolution", [None, 16])
def test_it_is_trained_and_exported(make_config, encode, low_resolution, tmp_path):
    diffusers_imagen.register_network(ConditionedUNet2D)
    torch.manual_seed(0)
    unet = ConditionedUNet2D(resolution=32, text_width=1, takes_low_res=low_resolution is not None)
    before = [parameter.clone() for parameter in unet.parameters()]
    config = make_config(
        resolution=32,
        low_resolution=low_resolution,
        noise_conditioning_augmentation=0,
        max_train_steps=3,
        learning_rate=1e-3,
        use_ema=False,
        output_dir=str(tmp_path / "run"),
    )
    train(config, unet, encode)
    changed = [not torch.equal(a, b) for a, b in zip(before, unet.parameters())]
    assert sum(changed) > 0.9 * len(changed)
    pipeline_class = ImagenPipeline if low_resolution is None else ImagenSuperResolutionPipeline
    loaded = pipeline_class.from_pretrained(tmp_path / "run").unet
    assert type(loaded) is ConditionedUNet2D
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), unet.parameters()))
