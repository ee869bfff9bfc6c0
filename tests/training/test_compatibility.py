"""What a network cannot take is said before training."""

import pytest

from diffusers_imagen.models.presets import create_unet
from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.compatibility import check_network, check_width


def config_of(**kwargs) -> TrainingConfig:
    return TrainingConfig(**{"train_data_dir": "a", "preset": "emoji_base_64"} | kwargs)


TINY = {"block_out_channels": (16, 16, 16), "norm_num_groups": 4, "attention_head_dim": 8}
MISFITS = {
    "side": ({"resolution": 66}, True, "`resolution` gives images of 66x66, but .* multiples of 4, such as 64 or 68"),
    "bucket": ({"aspect_ratio_buckets": "64,64;32,90"}, True, "`aspect_ratio_buckets` gives images of 32x90"),
    "no text": ({}, False, "This network reads text: give `text_encoder` or `embedding_cache`"),
    "low resolution": ({"low_resolution": 16}, True, "`low_resolution` is 16, but this network takes none"),
}


@pytest.mark.parametrize("settings, with_text, message", MISFITS.values(), ids=MISFITS)
def test_misfits_of_a_base_network(settings, with_text, message):
    unet = create_unet("emoji_base_64", attention_resolutions=(16,), **TINY)
    check_network(config_of(), unet, True)
    with pytest.raises(ValueError, match=message):
        check_network(config_of(**settings), unet, with_text)
    check_width(unet, 384)
    check_width(unet, None)
    with pytest.raises(ValueError, match="The text embeddings are 512 wide, but this network reads 384"):
        check_width(unet, 512)


def test_misfits_of_a_super_resolution_network():
    unet = create_unet("emoji_sr_256", **TINY, attention_types=(None, None, "cross"), layers_per_block=1)
    check_network(config_of(resolution=256, low_resolution=64, crop_size=64), unet, True)
    with pytest.raises(ValueError, match="`crop_size` gives images of 6x6, but .* multiples of 4"):
        check_network(config_of(resolution=256, low_resolution=128, crop_size=6), unet, True)
    with pytest.raises(ValueError, match="`low_resolution` is None, but this network is conditioned on one"):
        check_network(config_of(resolution=256), unet, True)
    textless = create_unet("emoji_base_64", attention_resolutions=(16,), **TINY, encoder_hid_dim=None)
    with pytest.raises(ValueError, match="is given, but this network was built without text"):
        check_network(config_of(), textless, True)
    check_network(config_of(), textless, False)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"attends_padding": True},
            "`attends_padding` of the network is True, but should be False to be trained here",
        ),
        ({"out_channels": 6}, "`out_channels` of the network is 6, but should be 3 to be trained here"),
    ],
)
def test_what_training_does_not_make_is_refused(options, message):
    unet = create_unet("emoji_base_64", attention_resolutions=(16,), **TINY, **options)
    with pytest.raises(ValueError, match=message):
        check_network(config_of(), unet, True)
