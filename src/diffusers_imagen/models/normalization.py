"""Group normalization with a fast backward pass for low precision on a CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` with a faster backward pass in bfloat16 and float16 on a CPU, in channels-last layout.

    In that case the backward pass of torch 2.13 takes two to three times as long, and more than a quarter of a
    training step: see docs/performance.md.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if _has_slow_backward(input) and self.weight is not None:
            return _GroupNorm.apply(input, self.weight, self.bias, self.num_groups, self.eps)
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _has_slow_backward(x: torch.Tensor) -> bool:
    return (
        torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()  # which generates its own backward pass
    )


class _GroupNorm(torch.autograd.Function):
    """Group normalization with torch's forward pass, and a backward pass on `(B, H W, C)` with sums in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> torch.Tensor:
        batch, channels, height, width = x.shape
        out, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, height * width, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of the input, the weight and the bias.

        With the mean m and the inverse standard deviation r of a group of n values, and sums over it,
        `dx = r w dy + b x + c`, where `b = r^3 (m sum(w dy) - sum(w x dy)) / n` and `c = -b m - r sum(w dy) / n`.
        """
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels, height, width = x.shape
        groups = mean.shape[1]
        x, grad = (t.permute(0, 2, 3, 1).reshape(batch, height * width, channels) for t in (x, grad))
        sum_grad = grad.sum(1, dtype=torch.float32).view(batch, groups, -1)  # (B, G, C / G)
        sum_product = (grad * x).sum(1, dtype=torch.float32).view(batch, groups, -1)
        mean, rstd = mean.float()[..., None], rstd.float()[..., None]  # (B, G, 1)
        scale = weight.float().view(1, groups, -1)

        count = height * width * (channels // groups)
        weighted = (scale * sum_grad).sum(2, keepdim=True)
        of_x = rstd**3 * (mean * weighted - (scale * sum_product).sum(2, keepdim=True)) / count
        constant = -of_x * mean - rstd * weighted / count
        factors = (
            t.expand_as(sum_grad).reshape(batch, 1, channels).to(x.dtype) for t in (rstd * scale, of_x, constant)
        )
        of_grad, of_x, constant = factors
        grad_x = torch.addcmul(torch.addcmul(constant, of_x, x), of_grad, grad)
        grad_weight = (rstd * (sum_product - mean * sum_grad)).sum(0).view(channels).to(weight.dtype)
        grad_bias = sum_grad.sum(0).view(channels).to(weight.dtype)
        return grad_x.view(batch, height, width, channels).permute(0, 3, 1, 2), grad_weight, grad_bias, None, None
