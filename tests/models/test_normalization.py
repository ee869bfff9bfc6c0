"""The backward pass of group normalization in low precision, against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F

from diffusers_imagen.models.normalization import GroupNorm


def gradients(function, x, weight, bias, grad):
    x, weight, bias = (t.clone().requires_grad_() for t in (x, weight, bias))
    function(x, weight, bias).backward(grad)
    return x.grad, weight.grad, bias.grad


def run(norm):
    def function(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    return function


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32 parameters", "parameters of that dtype"])
def test_gradients_are_those_of_torch(dtype, tolerance, parameters):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(3, 24, 10, 6, generator=generator).mul(2).add(0.5) for _ in range(2))
    x, grad = (t.to(dtype).to(memory_format=torch.channels_last) for t in (x, grad))
    weight, bias = (torch.randn(24, generator=generator).to(parameters or dtype) for _ in range(2))
    norm = GroupNorm(4, 24)
    expected = gradients(
        lambda x, weight, bias: F.group_norm(x, 4, weight, bias), *(t.double() for t in (x, weight, bias, grad))
    )
    actual = gradients(run(norm), x, weight, bias, grad)
    assert norm(x.requires_grad_()).grad_fn.name() == "_GroupNormBackward"
    for own, true in zip(actual, expected):
        assert own.dtype in (dtype, weight.dtype)
        assert (own.double() - true).abs().max() <= tolerance * true.abs().max()
    assert actual[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elsewhere_it_is_the_norm_of_torch(dtype):
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    norm = GroupNorm(2, 8).to(dtype)
    assert norm(x).grad_fn.name() == "NativeGroupNormBackward0"
    expected = torch.nn.GroupNorm(2, 8).to(dtype)(x)
    torch.testing.assert_close(norm(x), expected, atol=0, rtol=0)
    with torch.no_grad():
        layout = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(norm(layout), F.group_norm(layout, 2, norm.weight, norm.bias), atol=0, rtol=0)
