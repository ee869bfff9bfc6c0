"""`convert-config`: outputs are looked at first, and written both or not at all."""

import os

import pytest
import yaml

from diffusers_imagen.commands import convert_config
from diffusers_imagen.conversion import nemo


CONFIG = {
    "trainer": {"max_steps": 10},
    "model": {
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "unet_type": "base",
        "unet": {
            "embed_dim": 32,
            "image_size": 16,
            "channel_mult": [1],
            "num_res_blocks": 1,
            "attention_resolutions": [],
            "per_head_channels": 32,
        },
        "conditioning": {"embed_dim": 8},
        "data": {"train": {"augmentations": {"resize_smallest_side": 16}}},
        "optim": {"name": "adamw", "lr": 1e-4},
    },
}


@pytest.fixture
def convert(run, folder):
    """Runs the command on `nemo.yaml`."""
    (folder / "nemo.yaml").write_text(yaml.safe_dump(CONFIG))

    def convert(*arguments):
        return run("convert-config", "nemo.yaml", *arguments)

    return convert


def assert_refused(convert, folder, arguments, message):
    before = sorted(map(str, folder.rglob("*")))
    code, out, error = convert(*arguments)
    assert code == 2 and out == "" and len(error) == 1 and message in error[0], error
    assert sorted(map(str, folder.rglob("*"))) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "folder.png"], "`output` is 'folder.png', which is a folder"),
        (["--output", "file/run.yaml"], "needs the folder"),
        (["--output", "x" * 300], "File name too long"),
        (["--output", "/proc/run.yaml"], "cannot be written"),
        (["--output", "./nemo.yaml"], "which is the configuration to translate"),
        (["--output", "run.yaml", "--network", "file"], "`network` is 'file/unet', which needs the folder"),
        (["--output", "run", "--network", "run"], "would overwrite it"),
        (["--output", "run", "--network", "run/network"], "would overwrite it"),
        (["--output", "run/unet/run.yaml", "--network", "run"], "would overwrite it"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_the_file_is_read(
    convert, folder, monkeypatch, arguments, message
):
    (folder / "nemo.yaml").write_text("[")
    assert_refused(convert, folder, arguments, message)


def test_a_network_that_is_there_stays(convert, folder):
    (folder / "network" / "unet").mkdir(parents=True)
    assert_refused(convert, folder, ["--output", "run.yaml", "--network", "network"], "which already has a network")


def test_settings_and_network_are_written_both_or_not_at_all(convert, folder, monkeypatch):
    arguments = ["--output", "new/run.yaml", "--network", "network"]
    with monkeypatch.context() as patch:
        patch.setattr(convert_config, "write_settings", lambda *args: (_ for _ in ()).throw(OSError(28, "full")))
        code, _, error = convert(*arguments)
        assert code == 2 and "no space left" in error[-1]
    assert not list(folder.rglob("run.yaml")) and not list(folder.rglob("*.safetensors"))
    assert convert(*arguments)[0] == 0
    assert sorted(os.listdir(folder / "network" / "unet")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert yaml.safe_load((folder / "new" / "run.yaml").read_text())["pretrained_model_name_or_path"] == "network"


def test_a_network_that_is_none_is_refused(convert, folder, monkeypatch):
    def fail(config):
        raise TypeError("'<' not supported")

    monkeypatch.setattr(nemo, "unet_from_nemo_config", fail)
    assert_refused(
        convert, folder, ["--output", "r.yaml", "--network", "n"], "`model.unet` is not a valid network: TypeError"
    )


def test_a_network_larger_than_the_machine_is_refused_before_memory_is_taken(convert, folder, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 512)
    assert_refused(convert, folder, ["--output", "r.yaml", "--network", "n"], "of this machine's memory")


def test_an_alias_bomb_is_refused(convert, folder):
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (folder / "nemo.yaml").write_text("\n".join(["a0: &a0 [x]", *levels, yaml.safe_dump(CONFIG)]))
    assert_refused(convert, folder, ["--output", "run.yaml"], "`NEMO.yaml` is 'nemo.yaml', which cannot be read")
