"""Whether what a stage computes is finite: found out once, at its end, and then why it is not."""

import torch

from ..utils.modules import find_not_finite
from .planning import StagePlan
from .prompts import PromptEmbeds


class FiniteWatch:
    """Watches the tensors of a stage's calls, before thresholding makes finite numbers of infinite ones.

    The answers stay on the device until the end of the stage, so that the loop never waits for it.
    """

    def __init__(self, plan: StagePlan):
        self.plan, self.call = plan, 0
        self.answers: list[torch.Tensor] = []
        self.sources: list[tuple[int, str]] = []

    def see(self, source: str, tensor: torch.Tensor) -> None:
        """Asks the device whether a tensor is finite; `source` says whose it is."""
        self.answers.append(tensor.isfinite().all())
        self.sources.append((self.call, source))

    def raise_unless_finite(self, text: PromptEmbeds) -> None:
        """
        Raises:
            FloatingPointError: If anything was not finite; names the stage, the call and the likely cause.
        """
        if not self.answers or torch.stack(self.answers).all():
            return
        first = torch.stack(self.answers).tolist().index(False)
        call, source = self.sources[first]
        raise FloatingPointError(
            f"The stage `{self.plan.stage.name}` makes values that are not finite (NaN or infinite), first in call "
            f"{call} of {len(self.plan.calls)}: {self._cause(source, text)}"
        )

    def _cause(self, source: str, text: PromptEmbeds) -> str:
        """What is to be mended."""
        if source not in ("unet", "guidance_unet"):
            return f"{source}."
        unet = getattr(self.plan.stage, source)
        weight = find_not_finite(unet)
        if weight is not None:
            return f"the weight `{weight}` of its network `{source}` is not finite. Load or train it again."
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            embeds = getattr(text, name)
            if embeds is not None and not embeds.isfinite().all():
                return f"`{name}`, the embeddings of the text, are not finite."
        narrow = "" if unet.dtype == torch.float32 else ": load it in torch.bfloat16 or torch.float32"
        return f"activations of its network `{source}`, whose weights are finite, overflow in {unet.dtype}{narrow}."
