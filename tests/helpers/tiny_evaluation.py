"""A small evaluation: an image encoder of a few parameters, pictures, and a run that processes share."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer, ViTConfig, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


SIDE, WIDTH = 32, 8
CAPTIONS = [
    f"a {colour} {thing} of a tiger {i}" for i in range(3) for colour in ("red", "blue") for thing in ("apple", "face")
]


def save_encoder(folder: Path) -> str:
    """An image encoder of transformers with random weights, and its processor, which changes no size."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    ViTModel(ViTConfig(**sizes, image_size=SIDE, patch_size=8)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return str(folder)


def save_clip(folder: Path) -> str:
    """A CLIP model with random weights that reads letters."""
    folder.mkdir()
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 40, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**sizes, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessorPil(size=square, crop_size=square)
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return str(folder)


def save_pictures(folder: Path, count: int = 12, seed: int = 0, side: int = SIDE, captions: bool = True) -> str:
    """A folder of pictures, with a metadata.jsonl if they have captions."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(seed)
    for i in range(count):
        low = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(low).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    if captions:
        rows = [{"file_name": f"{i}.png", "text": CAPTIONS[i % len(CAPTIONS)]} for i in range(count)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)
