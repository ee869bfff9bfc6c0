"""A cascade of a few thousand parameters, with a real tokenizer and a random text encoder."""

import gc
import os

import pytest
import torch
from diffusers.models import attention_dispatch
from networks import randomize
from transformers import BertConfig, BertModel, BertTokenizerFast

from diffusers_imagen import EDMHeunScheduler, EfficientUNetModel, ImagenCascadePipeline, ImagenUNetModel


# On some CPUs MKL rounds by where a tensor happens to lie in memory; what is compared bit for bit must not depend on it.
# MKL reads this at its first call.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
# One thread in every process, of workers of pytest-xdist and of those that tests start: how many there are decides how
# sums are rounded.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"


def pytest_collection_finish():
    """Leave what the imports made out of garbage collection: each run of training collects once, and with these objects
    that takes longer than its steps."""
    gc.freeze()


@pytest.fixture
def active_backend(monkeypatch):
    """`set_attention_backend` sets the backend of all models: put it back after the test."""
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "apple", "face", "of", "tiger"]
TEXT_WIDTH = 16


def mild(unet: torch.nn.Module) -> torch.nn.Module:
    """Random weights, and an output small enough that sampling does not end in black and white."""
    unet = randomize(unet)
    with torch.no_grad():
        for parameter in unet.conv_out.parameters():
            parameter.mul_(0.1)
    return unet


@pytest.fixture
def base_unet() -> ImagenUNetModel:
    return mild(
        ImagenUNetModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            attention_resolutions=(8,),
            attention_head_dim=8,
            encoder_hid_dim=TEXT_WIDTH,
            cross_attention_dim=8,
            norm_num_groups=4,
        )
    )


@pytest.fixture
def sr_unet() -> EfficientUNetModel:
    return mild(
        EfficientUNetModel(
            sample_size=32,
            block_out_channels=(8, 16),
            layers_per_block=1,
            attention_types=(None, "cross"),
            attention_head_dim=8,
            encoder_hid_dim=TEXT_WIDTH,
            norm_num_groups=4,
            low_res_noise_conditioning=True,
        )
    )


@pytest.fixture
def tokenizer() -> BertTokenizerFast:
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=8)


@pytest.fixture
def text_encoder() -> BertModel:
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    return randomize(BertModel(config))


@pytest.fixture
def cascade(base_unet, sr_unet, tokenizer, text_encoder) -> ImagenCascadePipeline:
    pipe = ImagenCascadePipeline(
        base_unet=base_unet,
        base_scheduler=EDMHeunScheduler(clip_sample=True),
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        sr256_unet=sr_unet,
        sr256_scheduler=EDMHeunScheduler(clip_sample=True),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
