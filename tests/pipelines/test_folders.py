"""Folders that anybody may have written: what cannot be loaded is refused in one line, and nothing in them is run."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusers_imagen import ImagenCascadePipeline, ImagenPipeline
from diffusers_imagen.commands.model_arguments import load_cascade
from diffusers_imagen.pipelines.loading.folders import load_text_parts, split_options


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saved") / "model"


@pytest.fixture
def folder(saved, request, tmp_path) -> Path:
    if not saved.exists():  # what others change is a copy
        request.getfixturevalue("cascade").save_pretrained(saved)
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def trap(tmp_path) -> Path:
    """A file that is there once anything hostile has been run."""
    return tmp_path / "executed"


def entry(file: str, **entries):
    """Changes entries of a JSON file; `...` removes one."""

    def change(folder: Path, trap: Path) -> None:
        values = {**json.loads((folder / file).read_text()), **entries}
        (folder / file).write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))

    return change


def content(file: str, data: bytes):
    return lambda folder, trap: (folder / file).write_bytes(data)


def gone(path: str):
    return lambda folder, trap: shutil.rmtree(folder / path) if "." not in path else os.unlink(folder / path)


def tensors(file: str, change):
    def change_tensors(folder: Path, trap: Path) -> None:
        weights = {name: value.clone() for name, value in load_file(folder / file).items()}
        change(weights)
        save_file(weights, folder / file, metadata={"format": "pt"})

    return change_tensors


class Payload:
    def __init__(self, trap: Path):
        self.trap = trap

    def __reduce__(self):
        return os.system, (f"touch '{self.trap}'",)


def pickled(old: str, new: str):
    def replace(folder: Path, trap: Path) -> None:
        (folder / old).unlink()
        (folder / new).write_bytes(pickle.dumps(Payload(trap)))

    return replace


def scripts(*changes):
    """Python files at every name that a loader might look for, and changes that point to them."""

    def write(folder: Path, trap: Path) -> None:
        code = f"import pathlib\npathlib.Path({str(trap)!r}).touch()\nclass Evil: pass\n"
        for name in ("pipeline", "evil", "base_unet/evil", "text_encoder/evil", "tokenizer/evil"):
            (folder / f"{name}.py").write_text(code)
        for change in changes:
            change(folder, trap)

    return write


INDEX, UNET, SCHEDULER = "model_index.json", "base_unet/config.json", "base_scheduler/scheduler_config.json"
WEIGHTS = "base_unet/diffusion_pytorch_model.safetensors"
ENCODER, ENCODER_WEIGHTS = "text_encoder/config.json", "text_encoder/model.safetensors"
QUERY = "encoder.layer.0.attention.self.query.weight"
NO_OBJECT = {"list": b"[]", "null": b"null", "cut": b'{"_cl', "binary": b"\x00\xff", "deep": b"[" * 100_000}
HOSTILE = {
    **{
        f"{file}: {name}": (content(file, data), file.rpartition("/")[2])
        for file in (INDEX, UNET, SCHEDULER, ENCODER)
        for name, data in NO_OBJECT.items()
    },
    "index of a string": (content(INDEX, b'"x"'), "holds a JSON str"),
    "huge index": (content(INDEX, b'{"a": "' + b"x" * 2**22 + b'"}'), "bytes, but should have at most 4194304"),
    "no class": (entry(INDEX, _class_name=...), "is of None, but should be of ImagenCascadePipeline"),
    "another pipeline": (entry(INDEX, _class_name="StableDiffusionPipeline"), "should be of ImagenCascadePipeline"),
    "a pipeline of its own": (scripts(entry(INDEX, _class_name=["pipeline", "Evil"])), "is of ['pipeline', 'Evil']"),
    "os.system": (entry(INDEX, base_unet=["os", "system"]), "has ['os', 'system'] for `base_unet`"),
    "Popen": (entry(INDEX, text_encoder=["subprocess", "Popen"]), "for `text_encoder`"),
    "a path": (entry(INDEX, tokenizer=["../evil", "X"]), "for `tokenizer`"),
    "an unknown component": (entry(INDEX, foo=["os", "system"]), "has 'foo', which is not a component"),
    "a network of its own": (scripts(entry(INDEX, base_unet=["evil", "Evil"])), "for `base_unet`"),
    "another network": (
        entry(INDEX, base_unet=["diffusers", "UNet2DModel"]),
        "should have a library and the name of its StageN",
    ),
    "no network": (entry(INDEX, base_unet=[None, None]), "has no `base_unet`, which every"),
    "no pair": (entry(INDEX, base_unet=["diffusers_imagen"]), "for `base_unet`"),
    "no folder": (gone("base_unet"), "no folder base_unet/"),
    "no weights": (gone(WEIGHTS), "base_unet"),
    "no tokenizer": (gone("tokenizer"), "no folder tokenizer/"),
    "remote code of the network": (
        scripts(entry(UNET, auto_map={"AutoModel": "evil.Evil"}, _class_name="Evil")),
        "'Evil'",
    ),
    "class of the network": (entry(UNET, _class_name="EfficientUNetModel"), "should be of ImagenUNetModel"),
    "class of the scheduler": (entry(SCHEDULER, _class_name="DDIMScheduler"), "should be of EDMHeunScheduler"),
    "no channels": (entry(UNET, block_out_channels=[]), "`block_out_channels` has 0 entries"),
    "sizes as text": (entry(UNET, block_out_channels=["8", "16"]), "should be a list of integers"),
    "no heads": (entry(UNET, attention_head_dim=0), "`attention_head_dim` is 0"),
    "a million layers": (entry(UNET, layers_per_block=1_000_000), "from 0 to 128"),
    "text without a place": (entry(UNET, encoder_hid_dim=None), "does not have: "),
    "cut weights": (lambda folder, trap: os.truncate(folder / WEIGHTS, 5000), "is not a complete safetensors file"),
    "empty weights": (content(WEIGHTS, b""), "is not a complete safetensors file"),
    "a huge header": (content(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"), "is not a complete safetensors file"),
    "a missing tensor": (tensors(WEIGHTS, lambda w: w.pop("conv_out.bias")), "lacks weights: conv_out.bias"),
    "an extra tensor": (tensors(WEIGHTS, lambda w: w.update(foo=torch.ones(2))), "does not have: foo"),
    "another shape": (tensors(WEIGHTS, lambda w: w.update({"conv_out.bias": torch.ones(2)})), "shapes than its"),
    "integers": (tensors(WEIGHTS, lambda w: w.update({"conv_out.bias": torch.ones(3).int()})), "floating point: conv"),
    "pickled network": (pickled(WEIGHTS, "base_unet/diffusion_pytorch_model.bin"), "base_unet"),
    "pickled encoder": (pickled(ENCODER_WEIGHTS, "text_encoder/pytorch_model.bin"), "text_encoder"),
    "shards": (content("base_unet/diffusion_pytorch_model.safetensors.index.json", b"[]"), "base_unet"),
    "an encoder that lacks a tensor": (tensors(ENCODER_WEIGHTS, lambda w: w.pop(QUERY)), f"lacks weights: {QUERY}"),
    "an encoder of integers": (tensors(ENCODER_WEIGHTS, lambda w: w.update({QUERY: w[QUERY].int()})), QUERY),
    "an encoder without end": (entry(ENCODER, num_hidden_layers=10**8), "at most 1000 layers"),
    "an encoder of another width": (entry(ENCODER, hidden_size=32), "text_encoder"),
    "vocabulary": (content("tokenizer/tokenizer.json", b"[]"), "tokenizer"),
}


@pytest.mark.parametrize("change, message", HOSTILE.values(), ids=HOSTILE)
def test_a_folder_that_makes_no_pipeline_is_refused_in_one_line(change, message, folder, trap):
    change(folder, trap)
    with pytest.raises(ValueError) as error:
        load_cascade(str(folder))
    line = str(error.value)
    assert line.startswith(f"`model` is '{folder}'") and message in line
    assert len(line.splitlines()) == 1 and len(line) < 1000
    assert not trap.exists()


FOUND_BEFORE_LOADING = [name for name in HOSTILE if name.startswith(("model_index", "base_unet", "base_scheduler"))]
FOUND_BEFORE_LOADING += ["another pipeline", "os.system", "no folder", "cut weights", "another shape", "sizes as text"]


@pytest.mark.parametrize("name", FOUND_BEFORE_LOADING)
def test_a_pipeline_class_refuses_such_a_folder_too(name, folder, trap):
    change, message = HOSTILE[name]
    change(folder, trap)
    with pytest.raises(ValueError) as error:
        ImagenCascadePipeline.from_pretrained(folder)
    line = str(error.value)
    assert line.startswith(f"`pretrained_model_name_or_path` is '{folder}'") and message in line
    assert len(line.splitlines()) == 1 and not trap.exists()


@pytest.mark.parametrize("source", ["", None, "nowhere", "/nowhere/at/all", 3])
def test_what_is_no_source_is_refused(source):
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` is .*, which is neither a folder nor a Hub"):
        ImagenCascadePipeline.from_pretrained(source)


def test_a_folder_of_another_pipeline_is_refused(base_pipeline, folder, tmp_path):
    base_pipeline.save_pretrained(tmp_path / "stage")
    with pytest.raises(ValueError, match="is of 'ImagenPipeline', but should be of ImagenCascadePipeline: "):
        ImagenCascadePipeline.from_pretrained(tmp_path / "stage")
    with pytest.raises(ValueError, match="is of 'ImagenCascadePipeline', but should be of ImagenPipeline: "):
        ImagenPipeline.from_pretrained(folder)


def test_scripts_in_a_folder_are_not_run(folder, trap, cascade, run):
    scripts()(folder, trap)
    assert torch.equal(run(load_cascade(str(folder))).images, run(cascade).images)
    assert not trap.exists()
    (folder / "base_unet" / "diffusers_imagen.py").write_text("raise SystemExit")  # as diffusers' custom components
    with pytest.raises(ValueError, match="has a diffusers_imagen.py, which would be executed"):
        load_cascade(str(folder))


def test_a_fifo_is_no_configuration(folder):
    os.unlink(folder / UNET)
    os.mkfifo(folder / UNET)
    with pytest.raises(ValueError, match="config.json' is not a regular file"):
        load_cascade(str(folder))


@pytest.mark.parametrize("name", ["", "nowhere", "a/b/c", "user/name/", "../up", "http://host/x", "a b/c"])
def test_a_name_that_no_repository_has_is_refused_before_the_hub_is_asked(name, monkeypatch):
    monkeypatch.setattr("diffusers_imagen.pipelines.loading.folders.hf_hub_download", None)
    with pytest.raises(ValueError, match="`model` is .*, which is neither a folder nor a Hub id"):
        load_cascade(name)
    for argument in ("base", "text_encoder"):
        sources = {"base": (torch.nn.Identity(), None), argument: name}
        with pytest.raises(ValueError, match=f"`{argument}` is .*, which is neither|`base` is "):
            ImagenCascadePipeline.from_stages(**sources)


# ---- weights that are missing without a word


@pytest.mark.parametrize("loader", [ImagenPipeline, "from_stages", "text parts"])
def test_an_encoder_that_lacks_weights_is_refused_wherever_it_is_loaded(loader, base_pipeline, tmp_path):
    base_pipeline.save_pretrained(tmp_path)
    tensors(ENCODER_WEIGHTS, lambda weights: weights.pop(QUERY))(tmp_path, tmp_path)
    load = {
        "from_stages": ImagenCascadePipeline.from_stages,
        "text parts": lambda folder: load_text_parts(str(folder)),
    }.get(loader, ImagenPipeline.from_pretrained)
    with pytest.raises(ValueError, match=f"lacks weights: {QUERY}. transformers initializes them randomly"):
        load(tmp_path)


def test_an_encoder_may_lack_what_its_states_do_not_depend_on(base_pipeline, run, tmp_path):
    base_pipeline.save_pretrained(tmp_path)
    tensors(ENCODER_WEIGHTS, lambda weights: weights.pop("pooler.dense.weight"))(tmp_path, tmp_path)
    assert torch.equal(run(ImagenPipeline.from_pretrained(tmp_path)).images, run(base_pipeline).images)


def test_an_encoder_that_lacks_weights_of_a_variant_is_refused(base_pipeline, tmp_path):
    base_pipeline.save_pretrained(tmp_path, variant="fp16")
    file = "text_encoder/model.fp16.safetensors"
    ImagenPipeline.from_pretrained(tmp_path, variant="fp16")
    tensors(file, lambda weights: weights.pop(QUERY))(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=f"lacks weights: {QUERY}"):
        ImagenPipeline.from_pretrained(tmp_path, variant="fp16")


def test_a_network_that_lacks_weights_is_refused_when_it_is_loaded(base_pipeline, tmp_path):
    base_pipeline.save_pretrained(tmp_path)
    tensors("unet/diffusion_pytorch_model.safetensors", lambda weights: weights.pop("conv_in.bias"))(
        tmp_path, tmp_path
    )
    with pytest.raises(ValueError, match="`unet`, loaded from .*, lacks weights: conv_in.bias"):
        DiffusionPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unet' lacks weights: conv_in.bias"):
        ImagenPipeline.from_pretrained(tmp_path)


# ---- options


def test_options_are_those_of_files_and_those_of_networks():
    hub = {"token": "t", "revision": "r", "cache_dir": "c", "local_files_only": True, "force_download": False}
    networks = {"dtype": torch.float16, "variant": "fp16"}
    assert split_options({**hub, **networks}) == (hub, networks)
    for name in ("subfolder", "trust_remote_code", "custom_pipeline"):
        with pytest.raises(ValueError, match=f"`{name}` is 'x', but should not be given"):
            split_options({name: "x"})
    with pytest.raises(
        ValueError, match="`requires_safety_checker` is False, but .*`safety_checker=None` alone disables"
    ):
        split_options({"requires_safety_checker": False})
