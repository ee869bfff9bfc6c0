"""The code of docs/extending.md does what the page says."""

import copy
import sys
from pathlib import Path
from types import ModuleType

import doc_blocks
import pytest
import torch
from doc_blocks import read_blocks
from networks import UNET, randomize

from diffusers_imagen import EDMAdamsScheduler, ImagenPipeline, ImagenUNetModel, training
from diffusers_imagen.text.encoder import TextEncoder


PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def run_block(start: str) -> dict:
    (block,) = [block for block in read_blocks(PAGE, "python") if start in block.text]
    names: dict = {"__name__": "extending"}
    doc_blocks.run_block(block, names)
    return names


def test_a_pipeline_reads_two_encoders(tokenizer, text_encoder):
    pipeline_class = run_block("TwoEncoderPipeline")["TwoEncoderPipeline"]
    width = text_encoder.config.hidden_size
    other = copy.deepcopy(text_encoder)
    for parameter in other.parameters():
        parameter.data *= 1.5
    torch.manual_seed(0)
    unet = randomize(ImagenUNetModel(**{**UNET, "encoder_hid_dim": 2 * width})).eval()
    pipe = pipeline_class(unet, EDMAdamsScheduler(clip_sample=True), tokenizer, text_encoder, tokenizer, other)
    pipe.set_progress_bar_config(disable=True)
    first, second = (TextEncoder(tokenizer, encoder).encode(["a red apple"]) for encoder in (text_encoder, other))
    embeds, mask, *_ = pipe.encode_prompt("a red apple")
    assert torch.equal(embeds, torch.cat([first.embeds, second.embeds], dim=-1)) and torch.equal(mask, first.mask)
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    given = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    images = pipe("a red apple", generator=torch.Generator().manual_seed(0), **arguments).images
    assert torch.equal(images, pipe(**given, generator=torch.Generator().manual_seed(0), **arguments).images)


def test_a_network_of_another_architecture_draws(tokenizer, text_encoder):
    torch.manual_seed(0)
    unet = run_block("class TextUNet(")["TextUNet"](16, text_encoder.config.hidden_size).eval()
    pipe = ImagenPipeline(unet, EDMAdamsScheduler(clip_sample=True), tokenizer, text_encoder)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    images = [
        pipe("a red apple", generator=torch.Generator().manual_seed(seed), **arguments).images for seed in (0, 0, 1)
    ]
    assert images[0].shape == (1, 3, 16, 16) and torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("saved", ["model_config_name_or_path", "pretrained_model_name_or_path"])
def test_a_script_of_ones_own_trains_it(monkeypatch, tmp_path, saved):
    network_class, runs = run_block("class TextUNet(")["TextUNet"], []

    class Run:
        def __init__(self, config, unet):
            runs.append(unet)

        def train(self):
            pass

    unet = network_class(64, 8)
    (unet.save_config if saved.startswith("model") else unet.save_pretrained)(tmp_path)
    monkeypatch.setitem(sys.modules, "my_networks", ModuleType("my_networks"))
    monkeypatch.setattr(training, "Trainer", Run)
    monkeypatch.setattr(sys, "argv", ["my_train.py", f"--{saved}", str(tmp_path), "--train_data_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        run_block("import my_networks")
    assert stopped.value.code == 0 and type(runs[0]) is network_class and runs[0].text_width == 8
