"""docs/migrating-from-nemo.md: its example runs, with small networks, and every key of NeMo's files has its place there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from doc_blocks import commands_of, read_blocks
from nemo_archives import lightning_checkpoint, pack, saved
from PIL import Image

from diffusers_imagen import ImagenCascadePipeline, ImagenPipeline, ImagenSuperResolutionPipeline
from diffusers_imagen.commands import main as cli
from diffusers_imagen.conversion import load_nemo_stage
from diffusers_imagen.conversion.nemo import unet_from_nemo_config
from diffusers_imagen.conversion.nemo_keys import FIRST_CONVOLUTION, PREFIX, TWIN, nemo_names, nemo_shape
from diffusers_imagen.training import Trainer, parse_args
from diffusers_imagen.training.network import make_unet


PATH = Path(__file__).parents[1] / "docs" / "migrating-from-nemo.md"
PAGE = PATH.read_text(encoding="utf-8")

UNET = {
    "embed_dim": 32,
    "image_size": 16,
    "channel_mult": [1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [8],
    "per_head_channels": 32,
    "cond_dim": 32,
    "learned_sinu_pos_emb_dim": 0,
    "stable_attention": False,
}
MODEL = {
    "unet_type": "base",
    "unet": UNET,
    "micro_batch_size": 2,
    "global_batch_size": 2,
    "preconditioning_type": "EDM",
    "preconditioning": {"loss_type": "l2", "sigma_data": 0.4, "p_mean": -1.1, "p_std": 1.3},
    "conditioning": {"embed_dim": 16, "token_length": 6, "drop_rate": 0.25, "out_key": "t5_text"},
    "data": {"num_workers": 0, "train": {"augmentations": {"resize_smallest_side": 16, "horizontal_flip": False}}},
    "optim": {"name": "fused_adam", "lr": 1e-3, "sched": {"name": "WarmupPolicy", "warmup_steps": 0}},
}
TRAINER = {"max_steps": 2, "precision": 32, "log_every_n_steps": 1, "devices": 1, "num_nodes": 1}
SUPER_RESOLUTION = {
    **MODEL,
    "unet_type": "sr-unet",
    "unet": {**UNET, "image_size": 64, "attention_resolutions": [], "low_res_cond": True},
    "noise_cond_aug": True,
}


def nemo_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Small random weights under NeMo's names."""
    with torch.device("meta"):
        unet = unet_from_nemo_config(config)
    shapes = {name: list(value.shape) for name, value in unet.state_dict().items()}
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, ours in nemo_names(unet).items():
        shape = [len(ours) * shapes[ours[0]][0], *shapes[ours[0]][1:]]
        weights[PREFIX + name] = torch.randn(nemo_shape(name, shape), generator=generator) * 0.05
    for name in ("weight", "bias"):
        weights[PREFIX + TWIN + name] = weights[PREFIX + FIRST_CONVOLUTION + name]
    return weights


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer, text_encoder) -> Path:
    """The files that the example names."""
    monkeypatch.chdir(tmp_path)
    section = yaml.safe_dump(MODEL).encode()
    weights = saved(nemo_weights(MODEL, 0))
    pack(tmp_path / "base64.nemo", {"model_config.yaml": section, "model_weights.ckpt": weights})
    (tmp_path / "sr256.ckpt").write_bytes(lightning_checkpoint(nemo_weights(SUPER_RESOLUTION, 1)))
    (tmp_path / "sr256-edm.yaml").write_text(yaml.safe_dump({"model": SUPER_RESOLUTION, "trainer": TRAINER}))
    (tmp_path / "base64-edm.yaml").write_text(yaml.safe_dump({"model": MODEL, "trainer": TRAINER}))
    tokenizer.save_pretrained("t5-11b")
    text_encoder.save_pretrained("t5-11b")
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("a red apple")
    return tmp_path


def example() -> list[list[str]]:
    """The commands of the page's example."""
    (block,) = [block for block in read_blocks(PATH) if block.not_run == "tests/test_migrating.py"]
    return commands_of(block)


def test_the_example_runs_from_start_to_end(folder, capsys):
    for program, *arguments in example():
        if program == "diffusers-imagen":
            arguments += ["--steps", "2"] if arguments[0] == "generate" else []  # of 98 calls of the networks
            assert cli.main(arguments) == 0, (arguments, capsys.readouterr().err)
        else:
            assert (program, arguments[0]) == ("python", "scripts/train_imagen.py")
            config = parse_args(arguments[1:])
            unet = make_unet(config)
            start = load_nemo_stage("base64.nemo").parts.unet.state_dict()
            assert all(torch.equal(value, start[name]) for name, value in unet.state_dict().items())
            Trainer(config, unet).train()
    out = capsys.readouterr().out
    assert "Optimizer and schedule were not converted" in out and "tensors equal those of the checkpoint" in out
    pipe = ImagenCascadePipeline.from_pretrained("imagen-nemo")
    assert pipe.tokenizer.model_max_length == 6
    assert [stage.scheduler.config.sigma_data for stage in pipe.stages] == [0.4, 0.4]
    assert pipe.stages[1].defaults.low_res_noise_level == 0.002
    assert Image.open("apple.png").size == (64, 64)
    settings = yaml.safe_load(Path("run.yaml").read_text())
    assert (settings["p_mean"], settings["text_drop_rate"], settings["tokenizer_max_length"]) == (-1.1, 0.25, 6)

    trained = ImagenPipeline.from_pretrained("runs/base-64").unet.state_dict()
    start = pipe.base_unet.state_dict()
    assert trained.keys() == start.keys() and any(not torch.equal(trained[name], start[name]) for name in start)
    largest = max((trained[name] - start[name]).abs().max().item() for name in start)
    assert 0 < largest < 0.01  # two steps at a rate of 1e-3, from the converted weights and not from others
    back = load_nemo_stage("base64-further.nemo")
    assert all(torch.equal(value, trained[name]) for name, value in back.parts.unet.state_dict().items())
    assert back.parts.scheduler.config.sigma_data == 0.4


def test_a_cascade_in_memory_is_that_of_the_folder(folder):
    arguments = {"sr256": "sr256.ckpt", "configs": {"sr256": "sr256-edm.yaml"}, "text_encoder": "t5-11b"}
    pipe = ImagenCascadePipeline.from_nemo("base64.nemo", **arguments)
    assert (
        cli.main(shlex.split("convert-nemo base64.nemo --sr256 sr256.ckpt --sr256-config sr256-edm.yaml --output out"))
        == 0
    )
    written = ImagenCascadePipeline.from_pretrained("out", tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    assert dict(pipe.config.call_defaults) == dict(written.config.call_defaults)
    images = []
    for one in (pipe, written):
        one.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(one("a red apple", num_inference_steps=2, generator=generator, output_type="pt").images)
    assert torch.equal(*images) and images[0].std() > 0.01


def test_a_super_resolution_stage_alone(folder):
    (folder / "sr.nemo").write_bytes(b"")
    section = yaml.safe_dump({**SUPER_RESOLUTION, "data": {"train": {"target_resolutions": [32, 64]}}}).encode()
    weights = saved(nemo_weights(SUPER_RESOLUTION, 1))
    pack(folder / "sr.nemo", {"model_config.yaml": section, "model_weights.ckpt": weights})
    assert cli.main(["convert-nemo", "sr.nemo", "--output", "out", "--dtype", "bfloat16"]) == 0
    pipe = ImagenSuperResolutionPipeline.from_pretrained("out", dtype=torch.bfloat16)
    assert (pipe.config.scale_factor, pipe.low_resolution, pipe.unet.dtype) == (2, 32, torch.bfloat16)


WRONG = {
    "--sr256 base64.nemo": "`sr256` is 'base64.nemo', which is a base stage",
    "--sr256 nowhere.nemo": "`sr256` is 'nowhere.nemo', which does not exist",
    "--sr256 sr256.ckpt": "has no configuration with a section `unet`",
    "--base-config nowhere.yaml": "`base-config` is 'nowhere.yaml', which cannot be read: there is no such file",
    "--ema": "next to which there is no 'base64-EMA.nemo'",
    "--text-encoder data": "`text-encoder` is 'data', whose tokenizer cannot be loaded",
    "--output data": "`output` is 'data', which is not empty",
}


@pytest.mark.parametrize("arguments, message", WRONG.items(), ids=WRONG)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(arguments, message, folder, capsys):
    before = sorted(folder.rglob("*"))
    output = [] if "--output" in arguments else ["--output", "out"]
    assert cli.main(["convert-nemo", "base64.nemo", *output, *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


# Keys of the configurations of NeMo v2.3.0: base64-*.yaml, sr256-*.yaml, sr1024-*.yaml, inference_pipeline.yaml and
# imagen_fid_images.yaml.
KEYS = """
name allow_tf32 trainer.devices num_nodes max_epochs max_steps logger precision accelerator log_every_n_steps
resume_from_checkpoint num_sanity_val_steps enable_checkpointing gradient_clip_val benchmark enable_model_summary
accumulate_grad_batches exp_dir create_wandb_logger wandb_logger_kwargs create_tensorboard_logger
create_checkpoint_callback monitor save_top_k every_n_epochs every_n_train_steps filename resume_if_exists
resume_ignore_no_checkpoint exp_manager.ema validate_original_weights every_n_steps cpu_offload micro_batch_size
global_batch_size inductor inductor_cudagraphs unet_type channels_last embed_dim image_size channels channel_mult
num_res_blocks num_resblocks num_attn_heads per_head_channels cond_dim attention_type atnn_enabled_at
feature_pooling_type stride learned_sinu_pos_emb_dim attention_resolutions dropout use_null_token
init_conv_kernel_size gradient_checkpointing scale_shift_norm stable_attention flash_attention resblock_updown
resample_with_conv low_res_cond skip_connection_scaling seed apex_transformer_log_level gradient_as_bucket_view
ddp_overlap noise_cond_aug preconditioning_type loss_type sigma_data p_mean p_std pred_objective noise_schedule
timesteps token_length drop_rate precached_key out_key online_encoding encoder_path num_workers dataset_path
resize_smallest_side center_crop_h_w horizontal_flip filterings.resolution estimated_portion target_resolutions
corruption_aug use_webdataset object_store infinite_sampler local_root_path verbose pbss_checkpoint_saving
synthetic_data_length optim.name lr betas weight_decay eps optim.sched
num_images_per_promt model_name run_ema_model base_ckpt base_cfg sr256_ckpt sr256_cfg sr1024_ckpt sr1024_cfg
target_resolution inference_precision thresholding_method texts output_path record_time samplings[].step cfg part
classifier_free_guidance nnodes_per_cfg ntasks_per_node local_task_id num_images_to_eval coco_captions_path
coco_images_path save_path ncaptions_per_batch save_all_res save_text restore_from_path
""".split()


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_nemo_has_a_place_on_the_page(key):
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    cells = [row.split(" | ")[0] for row in rows]  # what is NeMo's
    assert any(re.search(rf"(?<!\w){re.escape(key)}(?!\w)", cell) for cell in cells)
