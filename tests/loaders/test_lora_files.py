"""Files, folders and the Hub as places of LoRA weights: found, or refused before anything is fetched or run."""

import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_imagen import ImagenPipeline


WEIGHTS = {"unet.conv_in.lora_A.weight": torch.ones(2, 3, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1)}
FILE = "pytorch_lora_weights.safetensors"


def read(source, **kwargs):
    return ImagenPipeline.lora_state_dict(source, return_lora_metadata=True, **kwargs)


class Evil:
    """Writes a file when it is unpickled freely."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_of_torch_save_is_read_as_weights_only(tmp_path):
    ImagenPipeline.save_lora_weights(tmp_path, unet_lora_layers=drop("unet."), safe_serialization=False)
    found, metadata = read(tmp_path)
    assert found.keys() == WEIGHTS.keys() and metadata is None
    assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)
    for source in (tmp_path / "pytorch_lora_weights.bin", str(tmp_path)):
        assert read(source)[0].keys() == WEIGHTS.keys()
        with pytest.raises(ValueError, match="use_safetensors"):
            read(source, use_safetensors=True)


def drop(prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in WEIGHTS.items()}


def test_pickles_that_run_something_are_refused_unrun(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"unet.x.lora_A.weight": Evil(trap)}, tmp_path / "zip.bin")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil(trap)))
    torch.save({"a": Evil(trap)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save([WEIGHTS], tmp_path / "list.bin")
    with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    (tmp_path / "none.bin").write_bytes(b"")
    for name in ("zip.bin", "raw.pt", "old.pth", "bomb.bin", "none.bin"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read as weights of torch.save: .+"):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="holds an object of class list, but should hold weights"):
        read(tmp_path / "list.bin")
    assert not trap.exists()


def test_damaged_files_are_refused_by_name(tmp_path):
    save_file(WEIGHTS, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    faults = {"cut": whole[:-5], "short": whole[:4], "empty": b"", "huge header": b"\xff" * 16, "text": b"<html>" * 9}
    for name, content in faults.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.safetensors' cannot be read as a safetensors file"):
            read(file)
    for text, message in (("[]", "a JSON list"), ("{", "not JSON"), ("[" * 100_000, "not JSON"), ("1", "a JSON int")):
        save_file(WEIGHTS, tmp_path / "meta.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "meta.safetensors")


@pytest.mark.parametrize("text", ["[]", "", "{", "null", "\x00"])
def test_a_folder_of_peft_needs_its_configuration(tmp_path, text):
    save_file(WEIGHTS, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has no adapter_config.json next to it"):
        read(tmp_path)
    assert read(tmp_path, metadata={"r": 2})[1] == {"r": 2}
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="adapter_config.json'"):
        read(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert read(source)[1] == {"r": 2, "lora_alpha": 4}


def test_the_file_in_a_folder_is_the_known_one_or_the_only_one(tmp_path):
    with pytest.raises(ValueError, match="which has no file of LoRA weights"):
        read(tmp_path)
    for name in ("optimizer.safetensors", "scheduler.bin", "checkpoint-2.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="which has no file of LoRA weights"):
        read(tmp_path)
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    assert read(tmp_path)[0].keys() == WEIGHTS.keys()
    save_file(WEIGHTS, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="several files of weights.*choose one by `weight_name`"):
        read(tmp_path)
    assert read(tmp_path, weight_name="b.safetensors")[0].keys() == WEIGHTS.keys()
    with pytest.raises(ValueError, match="`weight_name` is 'c.safetensors', but"):
        read(tmp_path, weight_name="c.safetensors")
    save_file(drop("unet."), tmp_path / FILE)
    assert read(str(tmp_path))[0].keys() == drop("unet.").keys()


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "a/b/c", "../x", "", 7, None, ["a"], "no such name", "a" * 5000]
)
def test_what_is_no_place_is_refused_without_a_network(source, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("the network was asked"))
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path_or_dict` is "):
        read(source)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match="which is neither a file"):
        read(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match="has no file of LoRA weights"):
        read(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> dict[str, bytes]:
    """The files of the only repository."""
    files: dict[str, bytes] = {}

    def download(source, weights_name, **options):
        if weights_name not in files:
            raise OSError(f"{source} has no {weights_name}")
        path = tmp_path / "hub" / weights_name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(files[weights_name])
        return str(path)

    siblings = lambda source, **options: SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])  # noqa: E731
    monkeypatch.setattr("diffusers_imagen.loaders.lora_files._get_model_file", download)
    monkeypatch.setattr("diffusers_imagen.loaders.lora_files.model_info", siblings)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return files


def test_a_repository_of_peft_is_fetched_with_its_configuration(hub, tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    hub["adapter_model.safetensors"] = (tmp_path / "w.safetensors").read_bytes()
    with pytest.raises(OSError, match="has no adapter_config.json"):
        read("me/style")
    hub["adapter_config.json"] = b'{"r": 2, "lora_alpha": 4}'
    assert read("me/style")[1] == {"r": 2, "lora_alpha": 4}


def test_without_a_network_the_file_that_training_writes_is_looked_for(hub, tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise RuntimeError("Name or service not known")

    monkeypatch.setattr("diffusers_imagen.loaders.lora_files.model_info", unreachable)
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    for options in ({}, {"local_files_only": True}):
        hub.clear()
        with pytest.raises(OSError, match=f"has no {FILE}"):
            read("me/style", **options)
        hub[FILE] = (tmp_path / "w.safetensors").read_bytes()
        assert read("me/style", **options)[0].keys() == WEIGHTS.keys()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"safe_serialization": False, "unet_lora_adapter_metadata": {"r": 2}}, "`safe_serialization` is False, but"),
        ({"weight_name": "../x.safetensors"}, "`weight_name` is '../x.safetensors', but"),
        ({"weight_name": {"a": 1}}, "`weight_name` is"),
        ({"save_function": 7}, "`save_function` is of class int"),
        ({"text_encoder_lora_layers": {"a": torch.ones(1)}}, "`text_encoder_lora_layers` is unknown"),
        ({"unet_lora_layers": [1]}, "`unet_lora_layers` is of class list"),
        ({"unet_lora_layers": {"x.lora_A.weight": torch.full((1,), torch.nan)}}, "have NaN under 'x.lora_A.weight'"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError) as error:
        ImagenPipeline.save_lora_weights(tmp_path / "out", **{"unet_lora_layers": drop("unet."), **arguments})
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_arguments_of_diffusers_own_scripts(tmp_path):
    ImagenPipeline.save_lora_weights(
        save_directory=tmp_path,
        unet_lora_layers=drop("unet."),
        text_encoder_lora_layers=None,
        is_main_process=True,
        weight_name=None,
        save_function=None,
        safe_serialization=True,
        unet_lora_adapter_metadata={"r": 2, "lora_alpha": 8},
        text_encoder_lora_adapter_metadata=None,
    )
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    found, metadata = read(tmp_path, use_safetensors=True)
    assert found.keys() == WEIGHTS.keys() and metadata == {"unet.r": 2, "unet.lora_alpha": 8}
    written = {}
    ImagenPipeline.save_lora_weights(
        tmp_path / "own", unet_lora_layers=drop("unet."), save_function=lambda w, path: save_file(written | w, path)
    )
    assert load_file(tmp_path / "own" / FILE).keys() == WEIGHTS.keys()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`save_directory` is .*, but should be a folder"):
        ImagenPipeline.save_lora_weights(tmp_path / "file", unet_lora_layers=drop("unet."))
