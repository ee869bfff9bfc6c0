"""Pipelines to the Hub and back, against a server of our own. Each step is a process, and a reader begins with an
empty cache."""

import json
import re
from pathlib import Path

import hub_server
import numpy as np
import pytest
import tiny_runs
import torch
import yaml
from deepfloyd_repository import stage_2, write_repository
from hub_client import Client
from PIL import Image
from safetensors.torch import load
from tiny_t5 import save_text_parts, tiny_t5, tiny_tokenizer

from diffusers_imagen import ImagenPipeline
from diffusers_imagen.conversion.deepfloyd import unet_from_deepfloyd
from diffusers_imagen.text import TextEncoder


PUSH = """
from diffusers_imagen import ImagenCascadePipeline

pipe = ImagenCascadePipeline.from_pretrained("model")
"""

PULL = """
import json, numpy, torch
import diffusers_imagen
from diffusers import AutoModel, AutoPipelineForText2Image, DiffusionPipeline
from huggingface_hub import list_repo_files, model_info

def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a red apple", num_inference_steps=2, generator=generator, output_type="np").images

for name, loader in (("any", DiffusionPipeline), ("auto", AutoPipelineForText2Image)):
    pipe = loader.from_pretrained("user/cascade")
    assert type(pipe) is diffusers_imagen.ImagenCascadePipeline
    numpy.save(name, draw(pipe))
unet = AutoModel.from_pretrained("user/cascade", subfolder="base_unet")
assert type(unet) is diffusers_imagen.ImagenUNetModel
torch.save(unet.state_dict(), "unet.pt")
info = model_info("user/cascade")
print(json.dumps([list_repo_files("user/cascade"), info.library_name, info.pipeline_tag, info.tags]))
"""

ENCODE = """
import os
del os.environ["HF_TOKEN"]
import torch
from diffusers_imagen.text import TextEncoder

hub = {"token": TOKEN, "revision": "first"}
for name in ("pipeline", "encoder"):
    for where in ({}, {"local_files_only": True}):
        text = TextEncoder.from_pretrained(f"user/{name}", 77, keeps_padding=True, **hub, **where)
        torch.save(text.encode(["a red apple"]).embeds, f"{name}-{len(where)}.pt")
try:
    TextEncoder.from_pretrained("user/other", 77)
except ValueError as error:
    print(error)
"""


@pytest.fixture
def hub():
    with hub_server.Hub() as hub:
        yield hub
    assert hub.unknown == []


@pytest.fixture
def client(hub, cascade, tmp_path) -> Client:
    cascade.save_pretrained(tmp_path / "model")
    return Client(tmp_path)


def files_below(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def read_weights(data: bytes) -> dict[str, torch.Tensor]:
    """Tensors by name; transformers 5.4 saves BERT's normalization under its first names."""
    first = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    return {re.sub("|".join(first), lambda name: first[name[0]], key): value for key, value in load(data).items()}


def test_round_trip(hub, client, cascade, tmp_path):
    client.run(PUSH + 'pipe.push_to_hub("user/cascade")')
    saved, pushed = files_below(tmp_path / "model"), hub.repos["user/cascade"][-1]
    assert set(pushed) == {*saved, "README.md"}
    weights = [path for path in saved if path.endswith(".safetensors")]
    assert len(weights) == 3
    for path in weights:
        torch.testing.assert_close(read_weights(pushed[path]), read_weights(saved[path]), atol=0, rtol=0)

    listed, library, pipeline_tag, tags = json.loads(client.run(PULL))
    assert set(listed) == set(pushed)
    assert library == "diffusers" and pipeline_tag == "text-to-image"
    assert sorted(tags) == ["diffusers", "diffusers-imagen", "text-to-image"]
    generator = torch.Generator().manual_seed(0)
    expected = cascade("a red apple", num_inference_steps=2, generator=generator, output_type="np").images
    for name in ("any", "auto"):
        # torch 2.6 rounds differently with weights that are mapped from a file
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected, atol=1e-3)
    unet = torch.load(tmp_path / "unet.pt")
    assert unet.keys() == cascade.base_unet.state_dict().keys()
    assert all(torch.equal(unet[key], value) for key, value in cascade.base_unet.state_dict().items())

    card = pushed["README.md"].decode()
    millions = sum(value.numel() for value in unet.values()) / 1e6
    assert f"| `base_unet` | ImagenUNetModel | {millions:.1f} M |" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    client.run(snippet)
    assert Image.open(tmp_path / "image.png").size == (32, 32)


CARD = """\
---
license: cc0-1.0
tags:
- emoji
- diffusers
---

# Mine

Made by hand.
"""


def test_a_card_that_is_there_is_completed_and_kept(hub, client, tmp_path):
    folder = tmp_path / "carded"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    client.run(PUSH + 'pipe.save_pretrained("carded", push_to_hub=True)\npipe.push_to_hub("carded")')
    # one commit: the second push, with the card of the repository, changed no file
    _, files = hub.repos["user/carded"]
    assert files["README.md"] == (folder / "README.md").read_bytes()
    _, header, body = files["README.md"].decode().split("---\n", 2)
    assert body == CARD.split("---\n", 2)[2]
    assert yaml.safe_load(header) == {
        "license": "cc0-1.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["emoji", "diffusers", "text-to-image", "diffusers-imagen"],
    }


def test_the_license_of_weights_is_added_to_the_card_of_the_repository(hub, client, tmp_path):
    folder = tmp_path / "carded"
    folder.mkdir()
    (folder / "README.md").write_text(CARD.replace("license: cc0-1.0\n", ""))
    origin = {"base": {"base_model": "DeepFloyd/IF-I-M-v1.0", "license": "deepfloyd"}}
    client.run(
        PUSH + 'pipe.save_pretrained("carded", push_to_hub=True)\n'
        f'pipe = ImagenCascadePipeline.from_pretrained("model", origin={origin})\n'
        'pipe.push_to_hub("carded")\npipe.push_to_hub("carded", subfolder="copy")'
    )
    _, first, second, third = hub.repos["user/carded"]
    assert set(second) == set(first) and set(third) == {*second, *(f"copy/{path}" for path in second)}
    _, header, body = second["README.md"].decode().split("---\n", 2)
    assert body.startswith(CARD.split("---\n", 2)[2] + "\n## License\n")
    assert yaml.safe_load(header) == {
        "base_model": "DeepFloyd/IF-I-M-v1.0",
        "license": "other",
        "license_name": "deepfloyd-if-license",
        "license_link": "https://huggingface.co/spaces/DeepFloyd/deepfloyd-if-license",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["emoji", "diffusers", "text-to-image", "diffusers-imagen"],
    }
    notice = "Copyright (c) Stability AI Ltd. All Rights Reserved."
    assert notice in body and notice in third["copy/README.md"].decode()
    assert third["README.md"] == second["README.md"]


def test_the_card_of_a_cascade_without_text_encoder_gives_text_states(cascade):
    cascade.register_modules(tokenizer=None, text_encoder=None)
    snippet = "pipe(prompt_embeds=torch.zeros(1, 1, 16), prompt_attention_mask=torch.ones(1, 1), generator"
    assert snippet in cascade.describe("user/cascade")


def test_saving_over_a_file_is_refused(cascade, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="a file, but should be a folder"):
        cascade.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


COMPOSE = """
import os, numpy, torch
for name in ("HF_TOKEN", "HF_HOME"):
    os.environ.pop(name)
from diffusers_imagen import ImagenCascadePipeline

options = {"token": TOKEN, "revision": "first", "cache_dir": "cache"}
for number, source in enumerate(("user/folder", "user/pipeline")):
    text = {"text_encoder": "user/folder"} if number == 0 else {}
    for more in ({}, {"local_files_only": True}):
        pipe = ImagenCascadePipeline.from_stages(source, **text, **options, **more)
    generator = torch.Generator().manual_seed(0)
    numpy.save(str(number), pipe("a red apple", num_inference_steps=2, generator=generator, output_type="np").images)
try:
    ImagenCascadePipeline.from_stages("user/folder", cache_dir="other", token=False)
except ValueError as error:
    assert str(error).startswith("`base` is 'user/folder', which cannot be loaded: ") and "401" in str(error), error
else:
    raise AssertionError
"""


def test_a_stage_is_read_with_the_token_and_of_the_revision_that_were_given(hub, client, base_unet, cascade, tmp_path):
    """Scheduler, tokenizer and text encoder like the network; the newest commit is another one, and broken."""
    pipe = ImagenPipeline(base_unet, cascade.base_scheduler, cascade.tokenizer, cascade.text_encoder)
    pipe.save_pretrained(tmp_path / "stage")
    files = files_below(tmp_path / "stage")
    broken = dict.fromkeys(files, b"[]")
    hub.fill("user/pipeline", files, broken)
    hub.fill("user/folder", {path: data for path, data in files.items() if path != "model_index.json"}, broken)
    hub.private = True
    client.run(COMPOSE.replace("TOKEN,", f"{hub_server.TOKEN!r},"))
    generator = torch.Generator().manual_seed(0)
    expected = pipe("a red apple", num_inference_steps=2, generator=generator, output_type="np").images
    for number in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"{number}.npy"), expected, atol=1e-3)  # of torch 2.6, as above
    resolved = {request.split("/resolve/")[1] for request in hub.requests if "/resolve/" in request}
    commits = {hub_server.commit_sha(f"user/{name}", 0) for name in ("pipeline", "folder")}
    assert {path.partition("/")[0] for path in resolved} - {"main"} <= {"first", *commits}
    newest = {path for path in resolved if path.startswith("main")}  # refused: no token
    # transformers 5.4 asks for an adapter without the revision
    assert {path for path in newest if not path.endswith("adapter_config.json")} <= {"main/model_index.json"}


TRAIN = """
import torch
from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.network import make_unet
from diffusers_imagen.training.pretrained_stage import find_pretrained

sizes = {"resolution": 32, "low_resolution": 16}
config = TrainingConfig(pretrained_model_name_or_path="user/if-ii", preconditioning="discrete", **sizes)
stage = find_pretrained(config)
assert stage.origin == {"base_model": "user/if-ii", "license": "deepfloyd"}, stage
assert stage.scheduler["sample_max_value"] == 1.0 and stage.max_length == 77
torch.save(make_unet(config).state_dict(), "unet.pt")
"""


def test_a_repository_of_deepfloyd_if_is_trained_further(hub, client, tmp_path):
    """Nothing is downloaded but the network and small files."""
    pipe = stage_2(safety_checker=None, feature_extractor=None, watermarker=None)
    hub.fill("user/if-ii", files_below(write_repository(pipe, tmp_path / "if-ii")))
    client.run(TRAIN)
    ours = unet_from_deepfloyd(pipe.unet).state_dict()
    found = torch.load(tmp_path / "unet.pt")
    assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in ours)
    assert not any("text_encoder" in request for request in hub.requests)


def test_a_text_encoder_is_read_alone_and_again_offline(hub, client, tmp_path):
    """Of a repository of DeepFloyd IF's layout, and of one with the encoder alone, as T5's are."""
    save_text_parts(tmp_path / "if")
    files = files_below(tmp_path / "if")
    alone = {path.partition("/")[2]: data for path, data in files.items()}
    for name, commit in (("pipeline", files), ("encoder", alone)):
        hub.fill(f"user/{name}", commit, dict.fromkeys(commit, b"[]"))
    hub.private = True
    message = client.run(ENCODE.replace("TOKEN,", f"{hub_server.TOKEN!r},"))
    assert "`text_encoder` is 'user/other', whose tokenizer cannot be loaded" in message
    assert message.count("\n") == 1
    expected = TextEncoder(tiny_tokenizer(), tiny_t5(), keeps_padding=True).encode(["a red apple"]).embeds
    for name in ("pipeline-0", "pipeline-1", "encoder-0", "encoder-1"):
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), expected, atol=1e-6, rtol=0)


PUSH_LICENSED = """
import diffusers_imagen
from diffusers import DiffusionPipeline
from diffusers_imagen import ImagenCascadePipeline

ImagenCascadePipeline.from_pretrained("model").push_to_hub("user/first")
DiffusionPipeline.from_pretrained("user/first").push_to_hub("user/second")
"""

TRAIN_OF_SETTINGS = """
import json
from diffusers_imagen.training import TrainingConfig, train
from diffusers_imagen.training.network import make_unet

config = TrainingConfig(**json.load(open("settings.json")))
train(config, make_unet(config))
"""

DRAW = """
import torch
import diffusers_imagen
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("stage")
pipe("a red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
print(type(pipe.text_encoder).__name__)
"""


def test_card_licenses_and_notices_of_a_pushed_cascade_travel_on(hub, client, tmp_path):
    (tmp_path / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Mine\n")
    (tmp_path / "model" / "LICENSES").mkdir()
    (tmp_path / "model" / "LICENSES" / "NOTICE.txt").write_text("made by many\n")
    client.run(PUSH_LICENSED)
    first, second = hub.repos["user/first"][-1], hub.repos["user/second"][-1]
    assert (
        set(first) == set(second)
        and first["LICENSES/NOTICE.txt"] == second["LICENSES/NOTICE.txt"] == b"made by many\n"
    )
    for card in (first["README.md"].decode(), second["README.md"].decode()):
        assert "license: apache-2.0" in card and card.endswith("# Mine\n") and str(tmp_path) not in card


def test_a_stage_names_the_commit_of_its_encoder_and_draws_offline(hub, client, tmp_path):
    """Its encoder is on the Hub, at a commit that is not the last any more; with the stage, it is uploaded by reference."""
    commit = hub_server.commit_sha("user/cascade", 1)  # after that in which the repository is made
    for number in range(4):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(tmp_path / "data" / f"{number}.png")
        (tmp_path / "data" / f"{number}.txt").write_text("a red apple")
    settings = tiny_runs.settings("data", "stage", preset=None, pretrained_model_name_or_path="user/cascade")
    settings |= {"text_encoder": "user/cascade", "revision": commit, "max_train_steps": 1, "resolution": 16}
    settings |= {"push_to_hub": True, "hub_model_id": "user/stage", "hub_token": hub_server.TOKEN}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    client.run(PUSH + 'pipe.push_to_hub("user/cascade")')
    hub.repos["user/cascade"].append({"README.md": b"nothing else"})
    home = client.new_home()
    client.run(TRAIN_OF_SETTINGS, home)
    reference = json.loads((tmp_path / "stage" / "text_encoder" / "reference.json").read_text())
    assert reference["hub"] == "user/cascade" and reference["revision"] == commit
    assert client.run_offline(DRAW, home).strip() == "BertModel"
    pushed = hub.repos["user/stage"][-1]
    assert json.loads(pushed["text_encoder/reference.json"]) == reference
    assert not any(name.startswith("text_encoder/") and name.endswith(".safetensors") for name in pushed)
    assert client.run(DRAW.replace('"stage"', '"user/stage"')).strip() == "BertModel"
    header = yaml.safe_load(pushed["README.md"].decode().split("---\n")[1])
    assert header["base_model"] == "user/cascade" and 'from_pretrained("user/stage")' in pushed["README.md"].decode()
