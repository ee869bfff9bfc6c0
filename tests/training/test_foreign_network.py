"""A network of another family is trained as this package's own are."""

import pytest
import torch
from foreign_network import ConditionedUNet2D

import diffusers_imagen
from diffusers_imagen import EDMHeunScheduler, ImagenPipeline, ImagenSuperResolutionPipeline
from diffusers_imagen.pipelines.loading.folder_checks import describe_network
from diffusers_imagen.training import TrainingConfig, train
from diffusers_imagen.training.network import make_unet


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


def test_the_message_about_a_class_that_is_not_registered_says_how_to(tmp_path):
    class Unregistered(ConditionedUNet2D):
        pass

    ImagenPipeline(Unregistered(), EDMHeunScheduler(), None, None).save_pretrained(tmp_path)
    for argument, place in (
        ("model_config_name_or_path", tmp_path),
        ("pretrained_model_name_or_path", tmp_path),
        ("pretrained_model_name_or_path", tmp_path / "unet"),
    ):
        with pytest.raises(
            ValueError, match="network class is Unregistered, .* class passed to `register_network`"
        ) as caught:
            make_unet(TrainingConfig(resolution=16, **{argument: str(place)}))
        assert "trust_remote_code" not in str(caught.value)
    with pytest.raises(ValueError, match="'Unregistered'.* class passed to `register_network`"):
        describe_network({"_class_name": "Unregistered"})
