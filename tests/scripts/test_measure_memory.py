import pytest
import torch
from script_modules import script_module
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Config, T5EncoderModel


@pytest.fixture(scope="module")
def script():
    with script_module("measure_memory") as module:
        yield module


def test_what_lives_at_once_is_counted(script):
    with FakeTensorMode():
        given = torch.zeros(100)  # 400 bytes, there before
        with script.LiveMemory() as memory:
            a = given + 1  # 400
            view = a[:50]
            b = torch.cat([a, a])  # 1200 alive
            del a
            b.mul_(2)
            assert memory.held == 1200  # the view keeps `a` alive
            del view
            assert memory.held == 800
            c = torch.empty(200, dtype=torch.float16)
            assert memory.held == 1200 and memory.peak == 1200
            d = b + 1
            assert memory.peak == 2000
            assert memory.needed == 1600  # `b` and `d`: nothing reads `c`
            del b, c, d
            assert memory.held == 0 and given.view(10, 10).shape == (10, 10) and memory.held == 0


def test_weights_of_t5_by_format(script):
    """Of two layers of width 8 and 4 heads of 4, with a feed-forward of 32: `wo` stays as it is when others shrink."""
    config = {"d_model": 8, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 10}
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**config, feed_forward_proj="gated-gelu"))
    wide = 2 * 8 * 32
    linear = 2 * (4 * 8 * 16 + 2 * 8 * 32)  # q, k, v, o; wi_0, wi_1
    rows = 2 * (3 * 16 + 8 + 2 * 32)
    rest = 10 * 8 + 4 * 32 + 2 * 2 * 8 + 8  # tokens, relative positions, norms
    assert script.text_encoder_bytes(model) == {
        "float32": 4 * (wide + linear + rest),
        "bfloat16": 2 * (wide + linear + rest),
        "float16": 4 * wide + 2 * (linear + rest),
        "8-bit": 4 * wide + linear + 4 * rows + 2 * rest,
        "4-bit": 4 * wide + linear / 2 + linear / 16 + 2 * rest,
    }


def test_networks_are_of_the_published_kind(script):
    from diffusers_imagen.conversion.deepfloyd import config_to_deepfloyd

    for network in script.NETWORKS:
        with torch.device("meta"):
            unet = script.ImagenUNetModel(**network.config)
        config_to_deepfloyd(unet.config)
        expected = {"I-M": 371_605_830, "I-L": 935_365_830, "I-XL": 4_304_695_110}.get(network.name)
        assert expected in (None, script.count(unet))
