"""Runs shared by two processes, through gloo on the CPU."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_evaluation import save_encoder
from tiny_runs import are_equal, encode, exported, losses, make_unet, run_in_processes, settings, weights_of

from diffusers_imagen.training import TrainingConfig, train


@pytest.fixture
def one_process(imagefolder, tmp_path, fresh_accelerator):
    """Weights and losses of one process with batches of 8."""
    output_dir, unet = tmp_path / "one", make_unet()
    config = TrainingConfig(**settings(imagefolder, output_dir, **OPTIONS, train_batch_size=8))
    train(config, unet, encode)
    return weights_of(unet), losses(output_dir)


OPTIONS = {"max_train_steps": 3, "checkpointing_steps": 3, "text_drop_rate": 0.3, "stratified_noise": True}


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "ImagenBlock",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


@pytest.mark.parametrize(
    ("processes", "batch_size", "accumulation"), [(2, 4, 1), (2, 2, 2), (1, 4, 2)], ids=["2x4", "2x2x2", "4x2"]
)
def test_a_shared_step_is_the_step_of_one_process(
    one_process, imagefolder, tmp_path, processes, batch_size, accumulation
):
    """The same images, noise, levels and dropped captions, whoever draws them; sums differ in their order alone."""
    weights, curve = one_process
    output_dir = tmp_path / "shared"
    options = {**OPTIONS, "train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    shared = settings(imagefolder, output_dir, **options, validation_split="validation")
    run_in_processes(shared, processes)
    assert losses(output_dir) == pytest.approx(curve, rel=1e-5)
    for name, value in torch.load(output_dir / "weights.pt").items():
        torch.testing.assert_close(value, weights[name], atol=2e-5, rtol=1e-4)
    assert not are_equal(weights, weights_of(make_unet()))
    assert exported(output_dir).keys() == weights.keys()


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 on CPUs, which only this test uses, needs torch 2.7"
)
def test_a_network_that_is_spread_over_processes_is_trained_as_one(imagefolder, tmp_path, fresh_accelerator):
    """FSDP2: weights, gradients, optimizer and averages in parts; checkpoint, samples and stage of the whole."""
    options = {
        **OPTIONS,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "validation_split": "train",
        "validation_prompts": ["text 1"],
        "validation_metrics": ["kid"],
        "validation_features": save_encoder(tmp_path / "encoder"),
        "validation_num_inference_steps": 2,
        "ema_type": "power",
    }
    train(
        TrainingConfig(**settings(imagefolder, tmp_path / "one", **options, train_batch_size=4)), make_unet(), encode
    )
    shared = settings(imagefolder, tmp_path / "shared", **options, train_batch_size=2)
    run_in_processes({**shared, "max_train_steps": 2}, 2, **FSDP2)
    run_in_processes({**shared, "resume_from_checkpoint": "latest"}, 2, **FSDP2)
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, whole = (exported(tmp_path / name) for name in ("one", "shared"))
    for name, value in whole.items():
        torch.testing.assert_close(value, one[name], atol=2e-5, rtol=1e-4)
    samples = [np.array(Image.open(tmp_path / name / "samples" / "step-000004.png")) for name in ("one", "shared")]
    assert np.abs(samples[0].astype(int) - samples[1]).max() <= 1
    lines = [(tmp_path / name / "validation.jsonl").read_text().splitlines() for name in ("one", "shared")]
    for own, other in zip(*([json.loads(line) for line in some] for some in lines), strict=True):
        figures = [record["figures"]["KD-encoder"]["value"] for record in (own, other)]
        assert figures[1] == pytest.approx(figures[0], rel=1e-2) and own["step"] == other["step"]
    snapshots = [load_file(next((tmp_path / name / "ema-snapshots").glob("*4-0.1000*"))) for name in ("one", "shared")]
    for name, value in snapshots[0].items():
        torch.testing.assert_close(snapshots[1][name], value, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("adapter", [False, True], ids=["all-weights", "adapter"])
def test_two_processes_resume_exactly(imagefolder, tmp_path, adapter):
    options = {"train_batch_size": 2, "loss_weighting": "uncertainty"}
    if adapter:
        make_unet().save_pretrained(tmp_path / "stage" / "unet")
        options |= {"rank": 2, "preset": None, "pretrained_model_name_or_path": str(tmp_path / "stage")}
    whole, stopped = (settings(imagefolder, tmp_path / name, **options) for name in ("whole", "stopped"))
    run_in_processes(whole, 2)
    run_in_processes({**stopped, "max_train_steps": 2}, 2)
    run_in_processes({**stopped, "resume_from_checkpoint": "latest"}, 2)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert are_equal(torch.load(tmp_path / "stopped" / "weights.pt"), torch.load(tmp_path / "whole" / "weights.pt"))
