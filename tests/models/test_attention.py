import math
from typing import get_args

import pytest
import torch
from diffusers.models import attention_dispatch
from networks import NETWORKS, TEXT_WIDTH, TOKENS, inputs_for, make, randomize, relative_error, run

from diffusers_imagen.models.attention import (
    ATTENTION_TYPES,
    AttentionBlock,
    AttentionKind,
    AttentionType,
    ImagenAttention,
    ImagenAttnProcessor,
    StableImagenAttnProcessor,
    image_to_tokens,
    make_attention,
    tokens_to_image,
)
from diffusers_imagen.models.config_checks import CHOICES
from diffusers_imagen.models.embeddings import TextContext, TextKeyValue


@pytest.fixture(params=["self", "cross", "fused", "fused, one norm"])
def attention(request):
    attention_type, _, shared_norm = request.param.partition(", ")
    context_dim = None if attention_type == "self" else TEXT_WIDTH
    return randomize(ImagenAttention(16, 2, attention_type, context_dim, 4, bool(shared_norm)))


def image_and_context() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True] * TOKENS, [True, True, False, False, False]])
    return (
        torch.randn(2, 16, 2, 3, generator=generator),
        torch.randn(2, TOKENS, TEXT_WIDTH, generator=generator),
        mask,
    )


def test_tokens_are_the_pixels_row_by_row():
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    tokens = image_to_tokens(image)
    assert tokens.shape == (1, 12, 2)
    assert torch.equal(tokens[0, 5], image[0, :, 1, 1])
    assert torch.equal(tokens_to_image(tokens, like=image), image)


@torch.no_grad()
def test_attention_is_softmax_over_image_and_text(attention):
    """Against the formula, head by head, with masked tokens left out instead of masked."""
    image, context, mask = image_and_context()
    text = attention.project_text(TextContext(context, mask)) if attention.reads_text else None
    output = attention(image, text)
    query = attention.to_q(attention.norm(image).flatten(2).transpose(1, 2))
    for b in range(2):
        keys, values = [], []
        if attention.reads_image:
            norm = attention.norm if attention.norm_kv is None else attention.norm_kv
            tokens = norm(image)[b].flatten(1).T
            keys, values = [attention.to_k(tokens)], [attention.to_v(tokens)]
        if attention.reads_text:
            normed = attention.norm_context(context.transpose(1, 2)).transpose(1, 2)[b, mask[b]]
            keys.append((attention.add_k_proj or attention.to_k)(normed))
            values.append((attention.add_v_proj or attention.to_v)(normed))
        heads = [
            (q @ k.T / math.sqrt(8)).softmax(dim=-1) @ v
            for q, k, v in zip(*(x.split(8, dim=-1) for x in (query[b], torch.cat(keys), torch.cat(values))))
        ]
        expected = image[b] + attention.to_out[0](torch.cat(heads, dim=-1)).T.reshape(16, 2, 3)
        torch.testing.assert_close(output[b], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention_type", ["cross", "fused"])
@torch.no_grad()
def test_keys_and_values_of_masked_tokens_change_nothing(attention_type):
    attention = randomize(ImagenAttention(16, 2, attention_type, TEXT_WIDTH, norm_num_groups=4))
    image, context, mask = image_and_context()
    text = attention.project_text(TextContext(context, mask))
    expected = attention(image, text)
    masked, valid = (~mask)[..., None], mask[..., None]
    changed = TextKeyValue(text.key + 7 * masked, text.value - 9 * masked, text.mask)
    assert torch.equal(attention(image, changed), expected)
    changed = TextKeyValue(text.key, text.value - 9 * valid, text.mask)
    assert relative_error(attention(image, changed), expected) > 0.1


@torch.no_grad()
def test_cross_attention_without_a_valid_token_adds_nothing():
    attention = randomize(ImagenAttention(16, 2, "cross", TEXT_WIDTH, norm_num_groups=4))
    image, context, mask = image_and_context()
    mask[1] = False
    output = attention(image, attention.project_text(TextContext(context, mask)))
    # all that is left of the branch is the bias of its last layer
    torch.testing.assert_close(output[1], image[1] + attention.to_out[0].bias[:, None, None])
    expected = attention(image, attention.project_text(TextContext(context, None)))
    torch.testing.assert_close(output[0], expected[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output[1], expected[1], atol=1e-2)


@torch.no_grad()
def test_fused_attention_without_a_valid_token_is_attention_to_the_image():
    attention = randomize(ImagenAttention(16, 2, "fused", TEXT_WIDTH, norm_num_groups=4))
    image, context, mask = image_and_context()
    mask[1] = False
    output = attention(image, attention.project_text(TextContext(context, mask)))
    image_only = attention(image, None)
    torch.testing.assert_close(output[1], image_only[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output[0], image_only[0], atol=1e-2)


@torch.no_grad()
def test_padded_tokens_count_in_the_norm_of_the_context():
    """As in NeMo, whose checkpoints are trained so: the statistics run over every token, valid or not."""
    attention = randomize(ImagenAttention(16, 2, "cross", TEXT_WIDTH, norm_num_groups=4))
    _, context, mask = image_and_context()
    text = attention.project_text(TextContext(context, mask))
    grouped = context[1].reshape(TOKENS, 4, TEXT_WIDTH // 4)
    variance, mean = torch.var_mean(grouped, dim=(0, 2), correction=0, keepdim=True)
    normed = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(TOKENS, TEXT_WIDTH)
    normed = normed * attention.norm_context.weight + attention.norm_context.bias
    torch.testing.assert_close(text.key[1], attention.to_k(normed), atol=1e-5, rtol=1e-5)


@pytest.mark.attention
def test_processors_can_be_listed_and_replaced(unet):
    inputs = inputs_for(unet)
    expected = run(unet, inputs)
    names = [name for name, module in unet.named_modules() if isinstance(module, ImagenAttention)]
    assert set(unet.attn_processors) == {f"{name}.processor" for name in names}
    unet.set_attn_processor({f"{name}.processor": ImagenAttnProcessor() for name in names})
    assert torch.equal(run(unet, inputs), expected)

    class Identity(ImagenAttnProcessor):
        def __call__(self, attn, hidden_states, text=None):
            return hidden_states

    unet.set_attn_processor(Identity())
    assert relative_error(run(unet, inputs), expected) > 1e-3


@pytest.mark.attention
def test_attention_backends_agree(unet, active_backend):
    inputs = inputs_for(unet, masked=False)
    expected = run(unet, inputs)
    unet.set_attention_backend("_native_math")
    backends = {processor._attention_backend for processor in unet.attn_processors.values()}
    assert backends == {attention_dispatch.AttentionBackendName._NATIVE_MATH}
    torch.testing.assert_close(run(unet, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.attention
@pytest.mark.parametrize("name", ["unet-fused", "unet-stacked-resnet", "efficient-cross"])
def test_attention_backends_agree_under_a_mask(name, active_backend):
    unet = make(name)
    inputs = inputs_for(unet)
    expected = run(unet, inputs)
    unet.set_attention_backend("_native_math")
    torch.testing.assert_close(run(unet, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.attention
@torch.no_grad()
def test_a_mask_of_prompts_is_never_taken_for_one_of_pixels():
    """As many prompts as pixels: a mask `(B, M)` would also fit as one of queries and keys."""
    attention = randomize(ImagenAttention(16, 2, "fused", TEXT_WIDTH, norm_num_groups=4))
    image = torch.randn(4, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    context = torch.randn(4, TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(TOKENS) < torch.tensor([[5], [3], [2], [1]])
    text = attention.project_text(TextContext(context, mask))
    expected = attention(image, text)
    attention.processor._attention_backend = attention_dispatch.AttentionBackendName._NATIVE_MATH
    torch.testing.assert_close(attention(image, text), expected, atol=1e-5, rtol=1e-5)


# Stable attention


def gradients(attention: ImagenAttention, image: torch.Tensor, text, seed: torch.Tensor) -> dict[str, torch.Tensor]:
    attention.zero_grad()
    image = image.clone().requires_grad_()
    (attention(image, text) * seed).sum().backward()
    return {
        "image": image.grad,
        **{name: p.grad.clone() for name, p in attention.named_parameters() if p.grad is not None},
    }


@pytest.mark.attention
@pytest.mark.parametrize("masked", [False, True])
def test_stable_attention_is_attention(attention, masked):
    image, context, mask = image_and_context()
    seed = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))

    def text():
        return attention.project_text(TextContext(context, mask if masked else None)) if attention.reads_text else None

    with torch.no_grad():
        expected = attention(image, text())
    expected_gradients = gradients(attention, image, text(), seed)
    attention.set_processor(StableImagenAttnProcessor())
    with torch.no_grad():
        torch.testing.assert_close(attention(image, text()), expected, atol=1e-6, rtol=1e-5)
    for name, gradient in gradients(attention, image, text(), seed).items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-5, msg=name)


class PlainProcessor:
    """The formula as it stands, with autograd's derivatives in the network's dtype."""

    def __call__(self, attn, hidden_states, text=None):
        query, key, value, _ = attn.project(hidden_states, text)
        weights = torch.einsum("bnhd,bmhd->bhnm", query, key).div(query.shape[-1] ** 0.5).softmax(dim=-1)
        return attn.merge(torch.einsum("bhnm,bmhd->bnhd", weights, value), hidden_states)


@pytest.mark.attention
def test_stable_attention_keeps_gradients_that_float16_would_lose():
    """A thousand keys share a gradient of 1e-5: each one's share lies below what float16 resolves, their sum above."""
    attention = randomize(ImagenAttention(16, 2, "self", norm_num_groups=4))
    image = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    seed = 3e-5 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    exact = gradients(attention, image, None, seed)["to_q.weight"]
    errors = {}
    for processor in (PlainProcessor(), StableImagenAttnProcessor()):
        attention.half().set_processor(processor)
        gradient = gradients(attention, image.half(), None, seed.half())["to_q.weight"]
        errors[type(processor)] = relative_error(gradient, exact)
    assert errors[StableImagenAttnProcessor] < 0.01
    assert errors[PlainProcessor] > 0.1


@torch.no_grad()
def test_a_block_may_make_keys_and_values_itself(attention):
    image, context, mask = image_and_context()
    if attention.reads_text:
        text = TextContext(context, mask)
        assert torch.equal(attention(image, text), attention(image, attention.project_text(text)))


class NoAttention(AttentionBlock):
    """Adds nothing; reads text in name."""

    reads_text = True

    def project_text(self, text):
        return TextKeyValue(text.tokens, text.tokens, text.mask)

    def forward(self, hidden_states, text=None):
        return hidden_states


@pytest.mark.parametrize("name", ["unet-fused", "efficient-stacked"])
def test_one_entry_adds_a_type(name, monkeypatch):
    network_class, config = NETWORKS[name]
    option, value = ("attention_type", "none") if name == "unet-fused" else ("attention_types", (None, "none"))
    config = {**config, option: value}
    with pytest.raises(ValueError, match=f"`{option}` is 'none'"):
        network_class(**config)
    monkeypatch.setitem(ATTENTION_TYPES, "none", AttentionKind(lambda *sizes: NoAttention(), reads_text=True))
    monkeypatch.setitem(CHOICES, "attention_type", tuple(ATTENTION_TYPES))  # made when the module is imported
    unet = network_class(**config)
    assert {type(block.attention) for block in unet.text_blocks()} == {NoAttention}
    text, sample = torch.randn(1, 3, TEXT_WIDTH), torch.randn(1, 3, 16, 16)
    assert torch.equal(*(unet(sample, 0.5, read).sample for read in (text, unet.encode_text(text))))


def test_every_type_has_an_entry():
    assert tuple(ATTENTION_TYPES) == get_args(AttentionType)
    for name, kind in ATTENTION_TYPES.items():
        for context_dim in (TEXT_WIDTH, None):
            reads = make_attention(name, 8, 2, context_dim, 4).reads_text
            assert reads == (kind.reads_text and context_dim is not None)
