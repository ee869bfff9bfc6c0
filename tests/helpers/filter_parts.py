"""Parts of DeepFloyd IF's filter at small sizes: a safety checker that can be told what to flag, and a watermark."""

import torch
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker, IFWatermarker
from transformers import CLIPConfig
from transformers.models.clip import CLIPImageProcessorPil


PIXELS = 8  # that the checker reads


def filter_parts(**changes) -> dict:
    """The three components, or others in their place."""
    return {
        "safety_checker": safety_checker(),
        "feature_extractor": CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=PIXELS),
        "watermarker": watermarker(),
        **changes,
    }


def safety_checker() -> IFSafetyChecker:
    """Random weights; its two heads look at different things. Biases are zero: see `flag_above`."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": PIXELS, "patch_size": 4, "projection_dim": 8}
    checker = IFSafetyChecker(CLIPConfig(vision_config=vision, text_config=sizes, projection_dim=8)).eval()
    generator = torch.Generator().manual_seed(3)  # what transformers draws before depends on its release
    with torch.no_grad():
        for _, parameter in sorted(checker.named_parameters()):
            parameter.normal_(0.0, 0.5, generator=generator)
        for head in (checker.p_head, checker.w_head):
            head.bias.zero_()
    return checker


def watermarker() -> IFWatermarker:
    marks = IFWatermarker()
    generator = torch.Generator().manual_seed(4)
    marks.watermark_image = torch.randint(0, 256, (62, 62, 4), generator=generator).float()
    return marks


def flag_above(pipe, images, head: str, number: int) -> None:
    """Sets the bias of a head of the pipeline's checker so that it flags the given number of these PIL images."""
    checker = pipe.safety_checker
    layer = getattr(checker, head)
    with torch.no_grad():
        layer.bias.zero_()
        pixels = pipe.feature_extractor(images, return_tensors="pt").pixel_values
        scores = layer(checker.vision_model(pixels.to(checker.dtype))[0]).flatten().float().sort(descending=True)[0]
        below = scores[number] if number < len(scores) else scores[-1] - 2
        layer.bias.fill_(0.5 - (scores[number - 1] + below).item() / 2 if number else -1e3)
