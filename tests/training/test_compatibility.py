"""What a network cannot take is said before training."""

import pytest
from text_sources import FunctionSource

from diffusers_imagen import ImagenUNetModel
from diffusers_imagen.models.presets import create_unet
from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.compatibility import check_network, check_text


def config_of(**kwargs) -> TrainingConfig:
    return TrainingConfig(**{"train_data_dir": "a", "preset": "emoji_base_64"} | kwargs)


def source_of(width: int, keeps_padding: bool = False, known: bool = True) -> FunctionSource:
    """Nothing is encoded with it."""
    source = (FunctionSource if known else Unknowing)(lambda texts: None, width)
    source.keeps_padding = keeps_padding
    return source


class Unknowing(FunctionSource):
    """A source that takes no text."""

    def __contains__(self, text: str) -> bool:
        return False


TINY = {"block_out_channels": (16, 16, 16), "norm_num_groups": 4, "attention_head_dim": 8}
MISFITS = {
    "side": ({"resolution": 66}, True, "`resolution` gives images of 66x66, but .* multiples of 4, such as 64 or 68"),
    "bucket": ({"aspect_ratio_buckets": "64,64;32,90"}, True, "`aspect_ratio_buckets` gives images of 32x90"),
    "no text": ({}, False, "This network is conditioned on text: pass `text_encoder` or `embedding_cache`"),
    "low resolution": (
        {"low_resolution": 16},
        True,
        "`low_resolution` is 16, but this network is not conditioned on one",
    ),
}


@pytest.mark.parametrize("settings, with_text, message", MISFITS.values(), ids=MISFITS)
def test_misfits_of_a_base_network(settings, with_text, message):
    unet = create_unet("emoji_base_64", attention_resolutions=(16,), **TINY)
    check_network(config_of(), unet, True)
    with pytest.raises(ValueError, match=message):
        check_network(config_of(**settings), unet, with_text)
    check_text(unet, source_of(384))
    check_text(unet, None)
    with pytest.raises(ValueError, match="The text embeddings have width 512, but this network needs 384"):
        check_text(unet, source_of(512))


def test_misfits_of_a_super_resolution_network():
    conditioning = {"encoder_hid_dim": 384, "low_res_noise_conditioning": True}
    unet = create_unet(
        "emoji_sr_256", **TINY, **conditioning, attention_types=(None, None, "cross"), layers_per_block=1
    )
    check_network(config_of(resolution=256, low_resolution=64, crop_size=64), unet, True)
    with pytest.raises(ValueError, match="`crop_size` gives images of 6x6, but .* multiples of 4"):
        check_network(config_of(resolution=256, low_resolution=128, crop_size=6), unet, True)
    with pytest.raises(ValueError, match="`low_resolution` is None, but this network is conditioned on an image"):
        check_network(config_of(resolution=256), unet, True)
    textless = create_unet("emoji_base_64", attention_resolutions=(16,), **TINY, encoder_hid_dim=None)
    with pytest.raises(ValueError, match="is given, but this network was built without text"):
        check_network(config_of(), textless, True)
    check_network(config_of(), textless, False)


DISCRETE = {"preconditioning": "discrete"}
OTHER_OBJECTIVES = {
    "variance": (
        {"out_channels": 6},
        {},
        "`preconditioning` is 'edm', but this network also predicts a variance .*'discrete'",
    ),
    "channels": ({"out_channels": 5}, DISCRETE, "`out_channels` of the network is 5, but should be 3, or twice that"),
}


@pytest.mark.parametrize("options, settings, message", OTHER_OBJECTIVES.values(), ids=OTHER_OBJECTIVES)
def test_what_training_does_not_make_is_refused(options, settings, message):
    unet = create_unet("emoji_base_64", attention_resolutions=(16,), **TINY, **options)
    with pytest.raises(ValueError, match=message):
        check_network(config_of(**settings), unet, True)


def test_a_network_of_discrete_betas_is_trained_for_those():
    class Declared(ImagenUNetModel):
        trained_beta_schedule = "squaredcos_cap_v2"

    unet = Declared(attention_resolutions=(16,), **TINY)
    check_network(config_of(**DISCRETE), unet, True)
    with pytest.raises(
        ValueError, match="`preconditioning` is 'edm', but this network was trained with discrete betas"
    ):
        check_network(config_of(), unet, True)
    with pytest.raises(
        ValueError, match="`beta_schedule` is 'linear', but .* with 'squaredcos_cap_v2': set it to this value"
    ):
        check_network(config_of(**DISCRETE, beta_schedule="linear"), unet, True)


def test_an_augmentation_by_index_has_no_setting():
    unet = ImagenUNetModel(
        attention_resolutions=(16,),
        low_res_conditioning=True,
        low_res_noise_conditioning=True,
        low_res_augmentation="discrete",
        **TINY,
    )
    sizes = {"resolution": 64, "low_resolution": 16}
    check_network(config_of(**sizes), unet, True)
    with pytest.raises(ValueError, match="`noise_conditioning_augmentation` is 0.25, but .* an index.*: leave it out"):
        check_network(config_of(**sizes, noise_conditioning_augmentation=0.25), unet, True)


def test_padding_is_kept_where_the_network_attends_to_it():
    unet = create_unet("emoji_base_64", attention_resolutions=(16,), **TINY, attends_padding=True)
    check_text(unet, source_of(384, keeps_padding=True))
    with pytest.raises(ValueError, match="The text embeddings have `keeps_padding` False, but should have True"):
        check_text(unet, source_of(384))
    with pytest.raises(ValueError, match="`embedding_cache` lacks the empty text, which replaces dropped captions"):
        check_text(unet, source_of(384, keeps_padding=True, known=False))
