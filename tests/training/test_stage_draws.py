"""What training leaves opens with diffusers' own call and draws from words: the text encoder is loaded from where it is."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub.utils import filter_repo_objects
from networks import randomize
from PIL import Image
from transformers import BertModel

import diffusers_imagen
from diffusers_imagen import ImagenCascadePipeline, ImagenPipeline, ImagenSuperResolutionPipeline
from diffusers_imagen.commands import diagnostics
from diffusers_imagen.text import TextEncoder
from diffusers_imagen.text.cache_writer import CacheWriter, save_parts, write_cache
from diffusers_imagen.text.reference import ReferencedTextEncoder
from diffusers_imagen.training import DreamBoothTrainingConfig, export, train
from diffusers_imagen.training.ema.reconstruction import write_reconstructed
from diffusers_imagen.training.finetuning.dreambooth import make_trainer
from diffusers_imagen.training.network import make_unet
from diffusers_imagen.utils.references import REFERENCE


CALL = {"num_inference_steps": 2, "output_type": "np"}


@pytest.fixture
def encoder(tokenizer, text_encoder, tmp_path) -> str:
    """The folder of an encoder, of width 16."""
    tokenizer.save_pretrained(tmp_path / "encoder" / "tokenizer")
    text_encoder.save_pretrained(tmp_path / "encoder" / "text_encoder")
    return str(tmp_path / "encoder")


@pytest.fixture
def make_stage(make_config, encoder):
    """Trains a stage for a step, and returns its folder and its network."""

    def make_stage(make=tiny_runs.make_unet, **settings):
        settings = {"text_encoder": encoder, "max_train_steps": 1, "use_ema": False, **settings}
        settings = {"lr_warmup_steps": 0, "channels_last": False, **settings}
        config = make_config(**settings)
        unet = make(text_width=16)
        train(config, unet)
        return config.output_dir, unet

    return make_stage


@pytest.fixture(scope="module")
def trained() -> list[Path]:
    """The folder of a base stage, once one is trained."""
    return []


@pytest.fixture
def stage(make_stage, trained, tmp_path, tmp_path_factory) -> str:
    """The folder of a base stage, of the encoder of this test: a copy, but for the first that asks for it."""
    folder = tmp_path / "stage"
    if trained:
        shutil.copytree(trained[0], folder)
    else:
        make_stage()
        trained.append(Path(shutil.copytree(folder, tmp_path_factory.mktemp("trained") / "stage")))
    return str(folder)


def draw(pipe, *prompt, **options):
    pipe.set_progress_bar_config(disable=True)
    return pipe(*prompt, generator=torch.Generator().manual_seed(0), **{**CALL, **options}).images


def test_a_base_stage_draws_from_words(make_stage, tokenizer, text_encoder):
    out, unet = make_stage()
    pipe = DiffusionPipeline.from_pretrained(out)
    assert type(pipe) is ImagenPipeline and type(pipe.text_encoder) is BertModel
    assert not pipe.text_encoder.training and pipe.tokenizer.model_max_length == tokenizer.model_max_length
    own = ImagenPipeline(unet.eval(), pipe.scheduler, tokenizer, text_encoder)
    np.testing.assert_array_equal(draw(pipe, "a red apple"), draw(own, "a red apple"))
    assert not np.array_equal(draw(pipe, "a red apple"), draw(pipe, "a blue face"))
    # the stage has no weights of the encoder
    assert not list(Path(out, "text_encoder").glob("*.safetensors"))


def test_an_upscaler_reads_words(make_stage):
    out, _ = make_stage(tiny_runs.make_sr_unet, resolution=32, low_resolution=16)
    pipe = DiffusionPipeline.from_pretrained(out)
    assert type(pipe) is ImagenSuperResolutionPipeline
    assert draw(pipe, "a red apple", image=torch.rand(3, 16, 16)).shape == (1, 32, 32, 3)


def test_the_dtype_is_that_of_the_call(stage):
    pipe = DiffusionPipeline.from_pretrained(stage, dtype=torch.bfloat16)
    assert pipe.text_encoder.dtype == pipe.unet.dtype == torch.bfloat16


def test_an_encoder_that_is_given_wins(stage, encoder, text_encoder):
    shutil.rmtree(encoder)
    other = randomize(BertModel(text_encoder.config))
    for loader in (DiffusionPipeline, ImagenPipeline):
        assert loader.from_pretrained(stage, text_encoder=other).text_encoder is other
    pipe = DiffusionPipeline.from_pretrained(stage, text_encoder=None)
    assert pipe.text_encoder is None
    assert draw(pipe, prompt_embeds=torch.zeros(1, 2, 16), prompt_attention_mask=torch.ones(1, 2)).shape[1] == 16


def test_a_folder_that_is_gone_is_one_line(stage, encoder):
    shutil.rmtree(encoder)
    with pytest.raises(ValueError) as refused:
        DiffusionPipeline.from_pretrained(stage)
    message = str(refused.value)
    assert "\n" not in message and f"is not in '{encoder}'" in message
    assert "pass another one as `text_encoder`, or `text_encoder=None`" in message
    wrong = [finding.text for finding in diagnostics.examine_stage(Path(stage)) if finding.wrong]
    assert wrong == [f"unet: the text encoder is not in '{encoder}', where reference.json says"]


def test_stage_and_encoder_move_together(make_stage, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_stage(text_encoder="encoder", output_dir="runs/base")
    expected = draw(DiffusionPipeline.from_pretrained("runs/base"), "a red apple")
    (tmp_path / "new").mkdir()
    for name in ("runs", "encoder"):
        shutil.move(tmp_path / name, tmp_path / "new" / name)
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(
        draw(DiffusionPipeline.from_pretrained(tmp_path / "new" / "runs" / "base"), "a red apple"), expected
    )


def test_another_encoder_in_its_place_is_refused(stage, encoder, text_encoder):
    randomize(text_encoder)
    with torch.no_grad():
        for parameter in text_encoder.parameters():
            parameter.add_(0.1)
    text_encoder.save_pretrained(Path(encoder, "text_encoder"))
    with pytest.raises(ValueError, match="another text encoder than the one that it was trained with .other weights"):
        DiffusionPipeline.from_pretrained(stage)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"folder": "/etc"}, "which is not a relative path"),
        ({"folder": "\\\\host\\share"}, "which is not a relative path"),
        ({"hub": "https://example.com/a"}, "which is not a Hub id"),
        ({"hub": "a/b", "folder": "c"}, "one of `hub` and `folder`"),
        ({"hub": "a/b", "trust_remote_code": True}, "'trust_remote_code'"),
        ({"hub": 3}, "has 3 for 'hub'"),
        ({"folder": "..", "subfolder": "../x"}, "for `subfolder`"),
    ],
)
def test_a_reference_of_a_stranger_is_checked(stage, content, message):
    Path(stage, "text_encoder", REFERENCE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        DiffusionPipeline.from_pretrained(stage)


def test_a_saved_pipeline_has_its_encoder_in_full(stage, encoder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(stage)
    expected = draw(pipe, "a red apple")
    pipe.save_pretrained(tmp_path / "copy")
    shutil.rmtree(encoder)
    assert not (tmp_path / "copy" / "text_encoder" / REFERENCE).exists()
    np.testing.assert_array_equal(draw(DiffusionPipeline.from_pretrained(tmp_path / "copy"), "a red apple"), expected)


def test_stages_compose_and_share_the_encoder(stage, make_stage, tmp_path):
    sr, _ = make_stage(tiny_runs.make_sr_unet, resolution=32, low_resolution=16, output_dir=tmp_path / "sr")
    cascade = ImagenCascadePipeline.from_stages(stage, sr)
    assert draw(cascade, "a red apple").shape == (1, 32, 32, 3)


def test_a_stage_can_be_named_as_the_text_encoder_of_another(stage, make_stage, encoder, tmp_path):
    other, _ = make_stage(text_encoder=stage, output_dir=tmp_path / "deep" / "er" / "other")
    # the reference is to the encoder, not to the first stage
    shutil.rmtree(stage)
    assert draw(DiffusionPipeline.from_pretrained(other), "a red apple").shape == (1, 16, 16, 3)
    pipe = ImagenCascadePipeline.from_stages(other, text_encoder=other)
    assert type(pipe.text_encoder) is BertModel


def test_a_run_on_cached_embeddings_leaves_a_stage_that_draws(make_stage, encoder, tmp_path):
    source = TextEncoder.from_pretrained(encoder)
    with CacheWriter(tmp_path / "cached", source.identity()) as writer:
        write_cache(writer, [f"text {i}" for i in range(8)], source)
    save_parts(tmp_path / "cached", source)
    expected, _ = make_stage(text_encoder=encoder)
    out, _ = make_stage(text_encoder=None, embedding_cache=str(tmp_path / "cached"), output_dir=tmp_path / "by-cache")
    for name in ("text_encoder/config.json", f"text_encoder/{REFERENCE}"):
        assert Path(out, name).read_bytes() == Path(expected, name).read_bytes()
    assert draw(DiffusionPipeline.from_pretrained(out), "a red apple").shape == (1, 16, 16, 3)


def test_nothing_of_this_machine_is_in_the_stage(make_stage, tmp_path):
    out, _ = make_stage()
    for path in Path(out).rglob("*"):
        if (
            path.is_file()
            and path.suffix in (".json", ".md")
            and "checkpoint" not in str(path)
            and path.name != "run.json"
        ):
            assert str(tmp_path) not in path.read_text(), path


def test_the_class_is_one_that_diffusers_finds():
    assert diffusers_imagen.ReferencedTextEncoder is ReferencedTextEncoder


# ---- adapters and DreamBooth


@pytest.fixture
def cascade_folder(cascade, tmp_path) -> str:
    """A cascade of two stages with its encoder, a card and notices."""
    cascade.base_unet, cascade.sr256_unet = tiny_runs.make_unet(text_width=16), tiny_runs.make_sr_unet(text_width=16)
    for unet in (cascade.base_unet, cascade.sr256_unet):
        randomize(unet)
    cascade.save_pretrained(tmp_path / "cascade")
    (tmp_path / "cascade" / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Mine\n")
    (tmp_path / "cascade" / "LICENSES").mkdir()
    (tmp_path / "cascade" / "LICENSES" / "NOTICE.txt").write_text("made by many\n")
    return str(tmp_path / "cascade")


@pytest.fixture
def dreambooth(imagefolder, cascade_folder, tmp_path, fresh_accelerator):
    """Teaches the base stage of the cascade a subject, in a step."""

    def dreambooth(**kwargs):
        settings = tiny_runs.settings(f"{imagefolder}/images", tmp_path / "dog", preset=None, max_train_steps=1)
        settings |= {"train_data_dir": None, "instance_data_dir": settings["train_data_dir"], "channels_last": False}
        settings |= {"lr_warmup_steps": 0, "pretrained_model_name_or_path": cascade_folder, **kwargs}
        config = DreamBoothTrainingConfig(instance_prompt="a red face", text_encoder=cascade_folder, **settings)
        unet = make_unet(config)
        make_trainer(config, unet).train()
        return config.output_dir, unet.eval()

    return dreambooth


def test_an_adapter_draws_with_the_network_that_it_was_trained_on(dreambooth, cascade_folder):
    out, unet = dreambooth(rank=2, learning_rate=1e-1)
    pipe = DiffusionPipeline.from_pretrained(out)
    assert type(pipe) is ImagenPipeline and type(pipe.unet) is type(unet) and "default" in pipe.unet.peft_config
    assert not list(Path(out, "unet").glob("*.safetensors"))
    own = ImagenPipeline(unet, pipe.scheduler, pipe.tokenizer, pipe.text_encoder)
    np.testing.assert_array_equal(draw(pipe, "a red face"), draw(own, "a red face"))
    plain = ImagenPipeline.from_stage(
        ImagenPipeline(
            tiny_runs.ImagenUNetModel.from_pretrained(cascade_folder, subfolder="base_unet"), pipe.scheduler
        ),
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
    )
    assert not np.array_equal(draw(plain, "a red face"), draw(own, "a red face"))
    # the cascade takes it as ever
    cascade = ImagenCascadePipeline.from_pretrained(cascade_folder)
    cascade.load_lora_weights(out, component="base_unet")
    np.testing.assert_array_equal(draw(cascade, "a red face", output_resolution=16), draw(own, "a red face"))
    assert ImagenCascadePipeline.from_stages(out).base_unet.peft_config


def test_the_doctor_finds_nothing_wrong_with_an_adapter(dreambooth):
    out, unet = dreambooth(rank=2)
    findings = diagnostics.examine_stage(Path(out))
    assert not any(finding.wrong for finding in findings)
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert findings[0].text == f"unet: ImagenUNetModel: {count:,} weights, finite and trained"


def test_training_starts_from_an_adapter_only_if_it_is_merged(dreambooth, make_config, tmp_path):
    out, _ = dreambooth(rank=2)
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` is .*, whose network has a LoRA adapter"):
        make_unet(make_config(preset=None, pretrained_model_name_or_path=out))
    pipe = DiffusionPipeline.from_pretrained(out)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "merged")
    unet = make_unet(make_config(preset=None, pretrained_model_name_or_path=str(tmp_path / "merged")))
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in pipe.unet.state_dict().items())


def test_a_subject_draws_alone_and_in_its_cascade(dreambooth, cascade_folder):
    out, unet = dreambooth(learning_rate=1e-1)
    pipe = DiffusionPipeline.from_pretrained(out)
    first = draw(pipe, "a red face")
    assert first.shape == (1, 16, 16, 3)
    card = Path(out, "README.md").read_text()
    snippet = card[card.index("from diffusers import AutoModel\n") :].split("```")[0]
    found: dict = {}
    with contextlib.chdir(Path(out).parent):
        exec(snippet, found)
    cascade = found["cascade"]
    assert torch.equal(cascade.base_unet.conv_in.weight, unet.conv_in.weight)
    assert draw(cascade, "a red face").shape == (1, 32, 32, 3)
    np.testing.assert_array_equal(
        draw(ImagenPipeline(unet, cascade.base_scheduler, pipe.tokenizer, pipe.text_encoder), "a red face"),
        draw(cascade, "a red face", output_resolution=16),
    )


# ---- cards


def header_of(folder) -> dict:
    return yaml.safe_load(Path(folder, "README.md").read_text().split("---\n")[1])


@pytest.mark.parametrize("rank", [None, 2])
def test_the_card_has_what_the_hub_reads_and_its_python_runs(dreambooth, tmp_path, rank):
    out, _ = dreambooth(rank=rank, validation_prompts=["a red face", "a blue apple"], checkpointing_steps=1)
    header = header_of(out)
    assert header["license"] == "apache-2.0" and header["library_name"] == "diffusers"
    assert header["pipeline_tag"] == "text-to-image" and header["instance_prompt"] == "a red face"
    assert header["widget"][1] == {"text": "a blue apple", "output": {"url": "card_images/1.png"}}
    grid = Image.open(Path(out, "samples", "step-000001.png"))
    for number in range(2):
        picture = Image.open(Path(out, "card_images", f"{number}.png"))
        assert picture.tobytes() == grid.crop((16 * number, 0, 16 * number + 16, 16)).tobytes()
    assert Path(out, "LICENSES", "NOTICE.txt").read_text() == "made by many\n"
    snippet = Path(out, "README.md").read_text().split("```python\n")[1].split("```")[0]
    with contextlib.chdir(Path(out).parent):
        exec(snippet, {})
    assert Image.open(tmp_path / "image.png").size == (16, 16)


def test_the_python_of_an_upscalers_card_runs(make_stage, tmp_path):
    out, _ = make_stage(tiny_runs.make_sr_unet, resolution=32, low_resolution=16, license="cc0-1.0")
    header = header_of(out)
    assert header["pipeline_tag"] == "image-to-image" and header["license"] == "cc0-1.0"
    snippet = Path(out, "README.md").read_text().split("```python\n")[1].split("```")[0]
    with contextlib.chdir(Path(out).parent):
        exec(snippet, {})
    assert Image.open(tmp_path / "image.png").size == (32, 32)


def test_an_upload_has_a_local_encoder_in_full(make_stage, encoder, monkeypatch, tmp_path):
    uploads: list[dict[str, bytes]] = []

    def upload_folder(folder_path, allow_patterns=None, ignore_patterns=None, **kwargs):
        files = {
            path.relative_to(folder_path).as_posix(): path for path in Path(folder_path).rglob("*") if path.is_file()
        }
        names = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        uploads.append({name: files[name].read_bytes() for name in names})

    repository = type("Repository", (), {"repo_id": "me/stage"})
    monkeypatch.setattr(export, "create_repo", lambda name, **kwargs: repository)
    monkeypatch.setattr(export, "upload_folder", upload_folder)
    make_stage(push_to_hub=True, hub_model_id="stage", hub_token="hf_secret")
    for name, content in {**uploads[0], **uploads[1]}.items():
        path = tmp_path / "elsewhere" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        assert str(tmp_path).encode() not in content, name
    shutil.rmtree(encoder)
    assert draw(DiffusionPipeline.from_pretrained(tmp_path / "elsewhere"), "a red apple").shape == (1, 16, 16, 3)
    assert 'from_pretrained("me/stage")' in (tmp_path / "elsewhere" / "README.md").read_text()


def test_a_reconstructed_average_draws_too(make_stage, tmp_path):
    out, _ = make_stage(use_ema=True, ema_type="power", max_train_steps=2, checkpointing_steps=1)
    write_reconstructed(Path(out), {0.1: tmp_path / "deep" / "er" / "average"})
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "deep" / "er" / "average")
    assert draw(pipe, "a red apple").shape == (1, 16, 16, 3)
