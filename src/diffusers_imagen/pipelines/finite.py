"""Detection of values that are not finite: one check at the end of a stage, and the likely cause."""

import torch

from ..utils.modules import find_not_finite
from .planning import StagePlan
from .prompts import PromptEmbeds


class FiniteWatch:
    """Records whether the tensors of a stage are finite, before thresholding turns infinite values into finite ones.

    The results stay on the device until the end of the stage, to avoid synchronization in the loop.
    """

    def __init__(self, plan: StagePlan):
        self.plan, self.call = plan, 0
        self.answers: list[torch.Tensor] = []
        self.sources: list[tuple[int, str]] = []

    def see(self, source: str, tensor: torch.Tensor) -> None:
        """Record whether a tensor is finite; `source` names the tensor or its network."""
        self.answers.append(tensor.isfinite().all())
        self.sources.append((self.call, source))

    def raise_unless_finite(self, text: PromptEmbeds) -> None:
        """Check the recorded tensors.

        Raises:
            FloatingPointError: If any tensor was not finite; the message names the stage, the call and the likely
                cause.
        """
        if not self.answers or torch.stack(self.answers).all():
            return
        first = torch.stack(self.answers).tolist().index(False)
        call, source = self.sources[first]
        raise FloatingPointError(
            f"The stage `{self.plan.stage.name}` computes values that are not finite (NaN or infinite), first in call "
            f"{call} of {len(self.plan.calls)}: {self._cause(source, text)}"
        )

    def _cause(self, source: str, text: PromptEmbeds) -> str:
        """Describe the cause and its remedy."""
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
