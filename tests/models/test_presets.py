import pytest
import torch

from diffusers_imagen import EfficientUNetModel, ImagenUNetModel
from diffusers_imagen.models.presets import PRESETS, create_unet


# Counted with the classes of NVIDIA NeMo v2.3.0 on its published configurations (shared/reference/README.md).
NEMO = {
    "500m_res_64": (ImagenUNetModel, 524_897_540),
    "2b_res_64": (ImagenUNetModel, 2_171_162_116),
    "400m_res_256": (ImagenUNetModel, 408_350_468),
    "600m_res_256": (EfficientUNetModel, 646_023_428),
    "400m_res_1024": (EfficientUNetModel, 287_789_828),
    "600m_res_1024": (EfficientUNetModel, 639_193_348),
}
SHIPPED = {
    "emoji_base_32": (ImagenUNetModel, 13_401_988),
    "emoji_base_64": (ImagenUNetModel, 13_555_588),
    "emoji_sr_256": (EfficientUNetModel, 4_448_275),
}


def count(unet: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in unet.parameters())


def create_on_meta(name: str, **overrides) -> torch.nn.Module:
    with torch.device("meta"):
        return create_unet(name, **overrides)


def test_the_table_has_every_preset():
    assert PRESETS.keys() == NEMO.keys() | SHIPPED.keys()


@pytest.mark.parametrize("name, network_class, expected", [(n, *row) for n, row in {**NEMO, **SHIPPED}.items()])
def test_parameter_counts(name, network_class, expected):
    unet = create_on_meta(name)
    assert type(unet) is network_class
    assert count(unet) == expected == PRESETS[name].num_parameters


# Published configurations that differ from a preset in one option, counted in the same way.
STACKED = {"attention_types": (None, None, None, "stacked", "stacked")}
VARIANTS = {
    "sr256-400m-edm without noise augmentation": (
        "400m_res_256",
        {"low_res_noise_conditioning": False},
        408_021_764,
    ),
    "sr256-600m-edm": ("600m_res_256", {**STACKED, "low_res_noise_conditioning": False}, 700_281_604),
    "sr256-600m-edm-noise": ("600m_res_256", STACKED, 700_610_308),
}


@pytest.mark.parametrize("name, overrides, expected", VARIANTS.values(), ids=VARIANTS)
def test_parameter_counts_of_variants(name, overrides, expected):
    assert count(create_on_meta(name, **overrides)) == expected


def test_overrides_replace_entries():
    unet = create_on_meta("emoji_base_64", encoder_hid_dim=None, sample_size=32)
    assert unet.config.encoder_hid_dim is None and unet.config.sample_size == 32
    assert tuple(unet.config.block_out_channels) == PRESETS["emoji_base_64"].config["block_out_channels"]
    assert PRESETS["emoji_base_64"].config["sample_size"] == 64


def test_an_unknown_preset_is_refused_with_the_choices():
    with pytest.raises(ValueError) as error:
        create_unet("emoji_base_46")
    assert all(part in str(error.value) for part in ("'emoji_base_46'", *PRESETS))
    with pytest.raises(ValueError, match=r"`preset` is \['a'\], but should be one of"):
        create_unet(["a"])
    with pytest.raises(
        ValueError, match="`channels` is not an entry of the configuration of 'emoji_base_64', which has sa"
    ):
        create_unet("emoji_base_64", channels=3)
