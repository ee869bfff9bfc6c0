"""The files that `accelerate launch --config_file` takes."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from diffusers_imagen import ImagenUNetModel


FOLDER = Path(__file__).parents[1] / "configs" / "accelerate"


@pytest.mark.parametrize(
    ("name", "distributed_type", "processes", "mixed_precision"),
    [
        ("cpu", DistributedType.NO, 1, "no"),
        ("ddp", DistributedType.MULTI_GPU, 8, "bf16"),
        ("fsdp2", DistributedType.FSDP, 8, "bf16"),
        ("deepspeed", DistributedType.DEEPSPEED, 8, "bf16"),
    ],
)
def test_accelerate_reads_the_file(name, distributed_type, processes, mixed_precision):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # unknown keys raise
    assert config.distributed_type == distributed_type
    assert config.num_processes == processes and config.mixed_precision == mixed_precision


def test_the_blocks_that_fsdp_wraps_are_the_networks_own():
    config = load_config_from_file(str(FOLDER / "fsdp2.yaml"))
    assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] in ImagenUNetModel._no_split_modules
    assert config.fsdp_config["fsdp_version"] == 2
