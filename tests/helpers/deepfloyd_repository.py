"""Small pipelines of DeepFloyd IF with random weights, and repositories of them with the files that IF's have."""

import functools
import io
import json
import shutil
import tempfile
from pathlib import Path

import sentencepiece
import torch
from deepfloyd_networks import STAGE_1, STAGE_2, TEXT_WIDTH
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker, IFWatermarker
from networks import randomize
from transformers import CLIPConfig, CLIPImageProcessor, T5Config, T5EncoderModel, T5Tokenizer


PIECES = 60  # of the tokenizer, with those for padding, end and unknown text
EXTRA_IDS = 100  # that T5's tokenizer adds
CLIP_SIZE = 8  # pixels that the safety checker looks at


def stage_1(**parts) -> IFPipeline:
    """A base stage of 16 px; `parts` take the place of its own, None leaves one out."""
    own = {**shared_parts(), "unet": network(STAGE_1, 0), "scheduler": schedule(1.5)}
    return IFPipeline(**{**own, **parts}, requires_safety_checker=False)


def stage_2(**parts) -> IFSuperResolutionPipeline:
    """A super-resolution stage of 32 px; `parts` take the place of its own, None leaves one out."""
    own = {**shared_parts(), "unet": network(STAGE_2, 1), "scheduler": schedule(1.0)}
    own["image_noising_scheduler"] = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return IFSuperResolutionPipeline(**{**own, **parts}, requires_safety_checker=False)


def network(config: dict, seed: int) -> UNet2DConditionModel:
    """Random weights, and an output so small that sampling magnifies no rounding."""
    torch.manual_seed(seed)
    unet = randomize(UNet2DConditionModel(**config)).eval()
    with torch.no_grad():
        for parameter in unet.conv_out.parameters():
            parameter.mul_(0.1)
    return unet


def schedule(sample_max_value: float) -> DDPMScheduler:
    """As diffusers' script for IF's checkpoints (scripts/convert_if.py) writes it."""
    options = {"variance_type": "learned_range", "thresholding": True, "dynamic_thresholding_ratio": 0.95}
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", sample_max_value=sample_max_value, **options)


def shared_parts() -> dict:
    """What both stages of IF have: T5, a safety checker that finds nothing, and the watermark."""
    return {
        "tokenizer": tokenizer(),
        "text_encoder": text_encoder(),
        "safety_checker": safety_checker(),
        "feature_extractor": CLIPImageProcessor(crop_size=CLIP_SIZE, size={"shortest_edge": CLIP_SIZE}),
        "watermarker": watermarker(),
    }


def text_encoder(width: int = TEXT_WIDTH) -> T5EncoderModel:
    torch.manual_seed(2)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    config = T5Config(vocab_size=PIECES + EXTRA_IDS, feed_forward_proj="gated-gelu", dropout_rate=0.0, **sizes)
    return T5EncoderModel(config).eval()


def tokenizer() -> T5Tokenizer:
    """T5's, of 512 tokens as in IF's repositories; IF's own pipelines cut texts to 77."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder, "tokenizer"))
        return T5Tokenizer.from_pretrained(Path(folder, "tokenizer"))


def write_tokenizer(folder: Path) -> None:
    """The files of a tokenizer in IF's repositories: sentencepiece's model, and no tokenizer.json."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(pieces())
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": EXTRA_IDS, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


@functools.cache
def pieces() -> bytes:
    """A sentencepiece model that splits text into about its letters."""
    texts = ["a red apple on a blue table", "the face of a tiger", "quick brown foxes jump over lazy dogs, vexing him"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20),
        model_writer=model,
        vocab_size=PIECES,
        hard_vocab_limit=False,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2},
    )
    return model.getvalue()


def safety_checker() -> IFSafetyChecker:
    """One that finds nothing, until a test moves `p_head.bias` or `w_head.bias`."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": CLIP_SIZE, "patch_size": 4}
    config = CLIPConfig(vision_config={**vision, "projection_dim": 8}, text_config=sizes, projection_dim=8)
    checker = IFSafetyChecker(config).eval()
    with torch.no_grad():
        for head in (checker.p_head, checker.w_head):
            head.weight.zero_()
            head.bias.fill_(-1.0)
    return checker


def watermarker() -> IFWatermarker:
    maker = IFWatermarker()
    generator = torch.Generator().manual_seed(4)
    maker.watermark_image = torch.randint(0, 256, (62, 62, 4), generator=generator).float()
    return maker


def write_repository(pipe: IFPipeline | IFSuperResolutionPipeline, folder: Path, variant: str | None = None) -> Path:
    """Saves a pipeline as its repository has it: the text encoder in shards, the tokenizer as sentencepiece's model.

    With `variant`, files of that variant alone, but for the watermark, of which there is none.
    """
    shards = {"max_shard_size": "10KB"}
    pipe.save_pretrained(folder, variant=variant)
    if pipe.text_encoder is not None:
        shutil.rmtree(folder / "text_encoder")
        pipe.text_encoder.save_pretrained(folder / "text_encoder", variant=variant, **shards)
    if pipe.tokenizer is not None:
        write_tokenizer(folder / "tokenizer")
    if pipe.watermarker is not None:
        shutil.rmtree(folder / "watermarker")
        pipe.watermarker.save_pretrained(folder / "watermarker")
    index = json.loads((folder / "model_index.json").read_text())
    if pipe.feature_extractor is not None:  # as those without torchvision are named otherwise
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
