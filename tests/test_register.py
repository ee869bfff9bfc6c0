"""diffusers' tables are not a documented interface: these tests say when a new release has moved them."""

import diffusers
import pytest
from diffusers import AutoModel
from foreign_network import ConditionedUNet2D

import diffusers_imagen


def test_every_route_loads_a_saved_component(cascade, tmp_path):
    tmp_path = str(tmp_path)  # diffusers 0.42.1 takes no Path here
    cascade.save_pretrained(tmp_path)
    for name in ("base_unet", "sr256_unet"):
        expected = type(getattr(cascade, name))
        assert type(AutoModel.from_pretrained(tmp_path, subfolder=name)) is expected
        assert type(AutoModel.from_pretrained(f"{tmp_path}/{name}")) is expected
        assert type(AutoModel.from_config(f"{tmp_path}/{name}")) is expected
    assert type(diffusers.EDMHeunScheduler.from_pretrained(tmp_path, subfolder="base_scheduler")) is (
        diffusers_imagen.EDMHeunScheduler
    )


def test_names_of_diffusers_are_not_replaced():
    assert diffusers.UNet2DConditionModel.__module__.startswith("diffusers.")
    for name in ("ImagenUNetModel", "EfficientUNetModel", "ImagenCascadePipeline"):
        assert getattr(diffusers, name) is getattr(diffusers_imagen, name)


def test_a_network_may_be_defined_again(monkeypatch):
    def define(qualname: str) -> type:
        class Network(ConditionedUNet2D):
            pass

        Network.__qualname__ = qualname
        return Network

    first, again, other = define("Network"), define("Network"), define("elsewhere.Network")
    monkeypatch.setattr(diffusers, "Network", first, raising=False)
    diffusers_imagen.register_network(again)
    assert diffusers.Network is again
    with pytest.raises(ValueError, match="`network_class` is Network, but diffusers has another class of that name"):
        diffusers_imagen.register_network(other)
    assert diffusers.Network is again
