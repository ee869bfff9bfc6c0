import pytest
import torch

from diffusers_imagen import EfficientUNetModel, ImagenUNetModel
from diffusers_imagen.presets import PRESETS, create_unet


PARAMETERS = {"emoji_base_32": 13_401_988, "emoji_base_64": 13_555_588, "emoji_sr_256": 5_348_372}


def test_the_table_has_every_preset():
    assert PRESETS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name, count", PARAMETERS.items(), ids=PARAMETERS)
def test_parameter_counts_of_the_presets(name, count):
    with torch.device("meta"):
        unet = create_unet(name)
    assert type(unet) is PRESETS[name][0]
    assert sum(parameter.numel() for parameter in unet.parameters()) == count


# Counted with the classes of NVIDIA NeMo v2.3.0 on its published configurations (shared/reference/README.md).
BASE_2B = {"block_out_channels": (512, 1024, 1536, 2048), "cross_attention_dim": 2048}
SR_400M = {
    "sample_size": 256,
    "block_out_channels": (128, 256, 512, 768, 768),
    "layers_per_block": (2, 2, 3, 4, 3),
    "attention_resolutions": (32, 16),
    "low_res_conditioning": True,
}
STACKED = {"attention_types": (None, None, None, "stacked", "stacked")}
NOISE = {"low_res_noise_conditioning": True}
PUBLISHED = {
    "500m_res_64": (ImagenUNetModel, {}, 524_897_540),
    "2b_res_64": (ImagenUNetModel, BASE_2B, 2_171_162_116),
    "400m_res_256": (ImagenUNetModel, {**SR_400M, **NOISE}, 408_350_468),
    "400m_res_256 without noise": (ImagenUNetModel, SR_400M, 408_021_764),
    "600m_res_256": (EfficientUNetModel, NOISE, 646_023_428),
    "600m_res_1024": (
        EfficientUNetModel,
        {"attention_types": (None, None, None, "cross", "cross"), **NOISE},
        639_193_348,
    ),
    "sr256-600m-edm": (EfficientUNetModel, STACKED, 700_281_604),
    "sr256-600m-edm with noise": (EfficientUNetModel, {**STACKED, **NOISE}, 700_610_308),
}


@pytest.mark.parametrize("network_class, config, count", PUBLISHED.values(), ids=PUBLISHED)
def test_parameter_counts_of_nvidias_configurations(network_class, config, count):
    with torch.device("meta"):
        unet = network_class(**config)
    assert sum(parameter.numel() for parameter in unet.parameters()) == count


def test_overrides_replace_entries():
    with torch.device("meta"):
        unet = create_unet("emoji_base_64", encoder_hid_dim=None, sample_size=32)
    assert unet.config.encoder_hid_dim is None and unet.config.sample_size == 32
    assert tuple(unet.config.block_out_channels) == PRESETS["emoji_base_64"][1]["block_out_channels"]
    assert PRESETS["emoji_base_64"][1]["sample_size"] == 64


def test_an_unknown_preset_is_refused_with_the_choices():
    with pytest.raises(ValueError) as error:
        create_unet("emoji_base_46")
    assert all(part in str(error.value) for part in ("'emoji_base_46'", *PRESETS))
