"""NeMo's checkpoints in every form that NeMo wrote, against what NeMo v2.3.0 computes with the same weights.

The vectors are those of test_nemo.py; the archives are packed here.
"""

import hashlib

import pytest
import torch
import yaml
from nemo_archives import CASES, FORMS, PREFIX, check_samples, model_section, pack, read_case, saved, write_form
from networks import relative_error
from safetensors.torch import load_file

from diffusers_imagen import ContinuousDDPMScheduler, EDMHeunScheduler, ImagenCascadePipeline
from diffusers_imagen.conversion import load_nemo_stage, load_nemo_unet
from diffusers_imagen.conversion.nemo_archive import open_nemo
from diffusers_imagen.conversion.nemo_export import export_nemo, nemo_config
from diffusers_imagen.conversion.nemo_keys import nemo_names
from diffusers_imagen.conversion.nemo_stage import (
    WEIGHTS_FILE,
    describe_stage,
    verify_nemo_stage,
    write_nemo_stage,
)
from diffusers_imagen.diffusion import edm


SMALL = "sr_fused"


def denoise(unet, vectors) -> torch.Tensor:
    """The EDM denoiser at NeMo's noise levels, of a network that is given its scaled image."""
    sigma = vectors["edm_sigma"]
    x = vectors["x"] * 3
    scalings = edm.scalings(sigma.double(), 0.5)
    c_in, c_skip, c_out = (
        part.float()[:, None, None, None] for part in (scalings.c_in, scalings.c_skip, scalings.c_out)
    )
    low_res = {"low_res_sample": vectors["x_low_res"]} if unet.takes_low_res else {}
    with torch.no_grad():
        out = unet(c_in * x, sigma.log() / 4, vectors["text_embed"], vectors["text_mask"], **low_res).sample
    return c_skip * x + c_out * out


# the forms differ by their files, not by the network in them
PAIRS = [(SMALL, form) for form in FORMS] + [(case, form) for case in CASES if case != SMALL for form in FORMS[:5:4]]


@pytest.mark.parametrize("case, form", PAIRS)
def test_every_form_gives_the_network_of_nemo(case, form, tmp_path):
    config, weights, vectors = read_case(case)
    stage = load_nemo_stage(write_form(form, tmp_path, config, weights))
    unet = stage.parts.unet
    expected = load_nemo_unet(config, weights).state_dict()
    found = unet.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    inputs = {"low_res_sample": vectors["x_low_res"]} if unet.takes_low_res else {}
    if unet.takes_low_res_noise_level:
        inputs["low_res_timestep"] = vectors["time_low_res"]
    with torch.no_grad():
        out = unet(vectors["x"], vectors["time"], vectors["text_embed"], vectors["text_mask"], **inputs).sample
    assert relative_error(out, vectors["output"]) < 1e-5
    if not unet.takes_low_res_noise_level:
        assert relative_error(denoise(unet, vectors), vectors["edm_denoised"]) < 1e-5
    assert stage.report.parameters == config["num_parameters"] == unet.num_parameters()
    assert stage.report.mapped + sum(key in weights for key in stage.report.dropped) == len(weights)
    assert unet.dtype == torch.float32 and all(parameter.requires_grad for parameter in unet.parameters())


def test_the_stage_knows_how_it_was_trained_and_is_called():
    config, _, _ = read_case("srunet_noiseaug")
    config["preconditioning"]["sigma_data"] = 0.25
    config["data"] = {"train": {"target_resolutions": [32, 256]}}
    parts = describe_stage(config)
    assert type(parts.scheduler) is EDMHeunScheduler and parts.scheduler.config.sigma_data == 0.25
    assert parts.scheduler.config.thresholding and parts.scheduler.config.dynamic_thresholding_ratio == 0.995
    assert (parts.scale_factor, parts.token_length) == (8, 10)
    assert parts.call_defaults == {"num_inference_steps": 20, "guidance_scale": 8.0, "low_res_noise_level": 0.002}
    del config["data"]
    assert describe_stage(config).scale_factor == 4
    config["data"] = {"train": {"corruption_aug": {"target_resolution": [128, 256]}}}
    assert describe_stage(config).scale_factor == 2


@pytest.mark.parametrize("objective, prediction", [("noise", "epsilon"), ("x_start", "sample"), (None, "epsilon")])
def test_ddpm_stages(objective, prediction):
    config, _, _ = read_case("base_default_small")
    config |= {"preconditioning_type": "DDPM", "preconditioning": {"loss_type": "l1", "noise_schedule": "linear"}}
    if objective is not None:
        config["preconditioning"]["pred_objective"] = objective
    scheduler = describe_stage(config).scheduler
    assert type(scheduler) is ContinuousDDPMScheduler
    found = scheduler.config
    assert (found.prediction_type, found.beta_schedule, found.thresholding) == (prediction, "linear", True)
    assert describe_stage(config).call_defaults == {"num_inference_steps": 250, "guidance_scale": 7.5}
    with pytest.raises(ValueError, match="`noise_cond_aug` is True, but should be false with DDPM"):
        describe_stage({**read_case("srunet_noiseaug")[0], "preconditioning_type": "DDPM", "preconditioning": {}})


def test_a_converted_cascade_samples_like_nemo_without_being_told_how(tmp_path):
    config, weights, vectors = read_case("base_default_small")
    pipe = ImagenCascadePipeline.from_nemo(write_form("tar", tmp_path, config, weights))
    pipe.set_progress_bar_config(disable=True)
    check_samples(pipe, vectors)


def test_a_ddpm_network_predicts_what_nemo_predicts(tmp_path):
    config, weights, vectors = read_case("base_default_small")
    config |= {"preconditioning_type": "DDPM", "preconditioning": {"loss_type": "l2", "pred_objective": "noise"}}
    parts = load_nemo_stage(write_form("gzip", tmp_path, config, weights)).parts
    timesteps = parts.scheduler.conditioning((vectors["ddpm_t"] * 1000).round().long())
    with torch.no_grad():
        out = parts.unet(vectors["x"], timesteps, vectors["text_embed"], vectors["text_mask"]).sample
    assert relative_error(out, vectors["ddpm_pred"]) < 1e-5


def test_files_of_torch_before_its_zip_format(tmp_path):
    config, weights, _ = read_case(SMALL)
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=False)
    stage = load_nemo_stage(path, config=model_section(config))
    assert torch.equal(stage.parts.unet.conv_in.weight, weights[f"{PREFIX}init_conv.weight"])


PREFIXES = [
    "",
    "model.",
    "model.unet.",
    "module.model.unet.",
    PREFIX,
    f"{PREFIX}_orig_mod.",
    "state_dict.model.model.unet.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_prefixes_and_types_are_kept_to_the_bit(prefix, dtype, tmp_path):
    config, weights, _ = read_case(SMALL)
    weights = {prefix + key.removeprefix(PREFIX): value.to(dtype) for key, value in weights.items()}
    path = write_form("tar", tmp_path, config, weights)
    stage = load_nemo_stage(path)
    assert stage.parts.unet.dtype == dtype and stage.report.dtypes == stage.report.written == [str(dtype)]
    state = stage.parts.unet.state_dict()
    expected = weights[f"{prefix}init_conv.weight"]
    assert torch.equal(state["conv_in.weight"], expected) and state["conv_in.weight"].dtype == dtype
    converted = load_nemo_stage(path, dtype=torch.float32).parts.unet.state_dict()["conv_in.weight"]
    assert torch.equal(converted, expected.float())


def test_what_is_left_out_on_purpose_is_reported_with_its_reason(tmp_path):
    config, weights, _ = read_case("base_default_small")
    weights["text_encoder.model.shared.weight"] = torch.zeros(2, 2).long()
    report = load_nemo_stage(write_form("tar", tmp_path, config, weights)).report
    assert set(report.dropped) == {
        "text_encoder.model.shared.weight",
        f"{PREFIX}init_conv.0.weight",
        f"{PREFIX}init_conv.0.bias",
    }
    assert "text encoder" in report.dropped["text_encoder.model.shared.weight"]
    weights["model.extra.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"Unexpected keys: \['model.extra.weight'\]"):
        load_nemo_stage(write_form("tar", tmp_path / "other", config, weights))


def test_averages_are_those_of_the_companion(tmp_path):
    config, weights, _ = read_case(SMALL)
    averages = {key: value / 2 for key, value in weights.items()}
    path = write_form("lightning", tmp_path, config, weights)
    with pytest.raises(
        ValueError, match="`ema` is given, but `source` is '.*', next to which there is no '.*-EMA.ckpt'"
    ):
        load_nemo_stage(path, ema=True)
    other = write_form("lightning", tmp_path / "ema", config, averages)
    companion = path.with_name(f"{path.stem}-EMA.ckpt")
    other.rename(companion)
    for source in (path, companion):
        stage = load_nemo_stage(source, ema=True)
        assert torch.equal(stage.parts.unet.conv_in.weight, averages[f"{PREFIX}init_conv.weight"])
        assert stage.report.source == companion.name
    assert torch.equal(load_nemo_stage(path).parts.unet.conv_in.weight, weights[f"{PREFIX}init_conv.weight"])


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"model": c, "trainer": {}}, lambda c: {"cfg": c}])
def test_a_configuration_may_be_given(wrap, tmp_path):
    config, weights, _ = read_case(SMALL)
    path = write_form("lightning, hparams.yaml", tmp_path, config, weights)
    (tmp_path / "hparams.yaml").unlink()
    with pytest.raises(ValueError, match="has no configuration with a section `unet`: specify NeMo's YAML"):
        load_nemo_stage(path)
    given = wrap(model_section(config))
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(given))
    for source in (given, tmp_path / "given.yaml"):
        assert load_nemo_stage(path, config=source).report.config == model_section(config)
    with pytest.raises(ValueError, match="`source_config` is {'unet_type': 'sr'}, but should be a configuration"):
        load_nemo_stage(path, config={"unet_type": "sr"})


# What NeMo published: `unet_type`, `noise_cond_aug`, `unet:` but for what all have, and the parameters that NeMo's own
# classes have (shared/reference/README.md).
SHARED = {"channels": 3, "feature_pooling_type": "attention", "learned_sinu_pos_emb_dim": 0, "per_head_channels": 64}
BASE = {
    "image_size": 64,
    "num_res_blocks": 3,
    "channel_mult": [1, 2, 3, 4],
    "attention_type": "fused",
    "dropout": False,
}
SR = {"image_size": 256, "embed_dim": 128, "num_res_blocks": [2, 2, 3, 4, 3], "channel_mult": [1, 2, 4, 6, 6]}
SR |= {"attention_resolutions": [32, 16], "low_res_cond": True, "resblock_updown": False, "resample_with_conv": True}
EFFICIENT = {"embed_dim": 128, "channel_mult": [1, 2, 4, 8, 8], "num_resblocks": [2, 4, 8, 8, 8], "stride": 2}
EFFICIENT |= {"atnn_enabled_at": [0, 0, 0, 1, 1], "skip_connection_scaling": True, "image_size": 256}
PUBLISHED = {
    "base64-500m": ("base", False, {**BASE, "embed_dim": 256, "cond_dim": 512}, 524_897_540),
    "base64-2b": ("base", False, {**BASE, "embed_dim": 512, "cond_dim": 2048}, 2_171_162_116),
    "sr256-400m": ("sr-unet", True, {**SR, "attention_type": "fused"}, 408_350_468),
    "sr256-400m-edm": ("sr-unet", False, {**SR, "attention_type": "fused"}, 408_021_764),
    "sr256-450m-edm": ("sr-unet", False, {**SR, "attention_type": "stacked"}, 568_675_844),
    "sr256-600m": ("sr", True, {**EFFICIENT, "attention_type": "fused"}, 646_023_428),
    "sr256-600m-edm": ("sr", False, {**EFFICIENT, "attention_type": "stacked"}, 700_281_604),
    "sr256-600m-edm-noise": ("sr", True, {**EFFICIENT, "attention_type": "stacked"}, 700_610_308),
    "sr1024-600m": ("sr", True, {**EFFICIENT, "attention_type": "cross", "image_size": 1024}, 639_193_348),
}


@pytest.mark.parametrize("unet_type, noise, unet, parameters", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configurations_have_the_parameters_that_nemo_counts(unet_type, noise, unet, parameters):
    config = {
        "unet_type": unet_type,
        "noise_cond_aug": noise,
        "unet": {**SHARED, **unet},
        "preconditioning_type": "EDM",
    }
    config |= {"preconditioning": {"loss_type": "l2"}, "conditioning": {"embed_dim": 1024, "token_length": 128}}
    parts = describe_stage(config)
    assert parts.unet.num_parameters() == parameters and parts.token_length == 128
    assert parts.unet.takes_low_res == (unet_type != "base") and parts.unet.takes_low_res_noise_level == noise
    # and every weight has a place among NeMo's, and the way back leads to the same network
    assert len({ours for group in nemo_names(parts.unet).values() for ours in group}) == len(parts.unet.state_dict())
    assert nemo_config(parts.unet, parts.scheduler)["unet"]["embed_dim"] == unet["embed_dim"]


def test_configurations_have_numbers_for_keys(tmp_path):
    """`kernel_radius_dict` of sr256-450m-edm.yaml."""
    config, weights, _ = read_case(SMALL)
    config["data"] = {
        "train": {"corruption_aug": {"kernel_radius_dict": {8: 1, 16: 2}, "target_resolution": [64, 256]}}
    }
    stage = load_nemo_stage(write_form("tar", tmp_path, config, weights))
    assert stage.report.config["data"]["train"]["corruption_aug"]["kernel_radius_dict"] == {"8": 1, "16": 2}


# Written folders


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_written_network_is_the_one_that_is_loaded(case, dtype, tmp_path):
    config, weights, _ = read_case(case)
    path = write_form("tar", tmp_path, config, weights)
    expected = load_nemo_stage(path, dtype=dtype).parts.unet
    with open_nemo(path) as checkpoint:
        parts, report = write_nemo_stage(checkpoint, tmp_path / "unet", dtype)
        tensors = verify_nemo_stage(checkpoint, tmp_path / "unet", dtype)
    assert report == load_nemo_stage(path, dtype=dtype).report
    found = load_file(tmp_path / "unet" / WEIGHTS_FILE)
    state = expected.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert {tensor.dtype for tensor in found.values()} == {dtype or torch.float32}
    loaded = type(expected).from_pretrained(tmp_path / "unet")
    assert torch.equal(loaded.state_dict()["conv_in.weight"].float(), state["conv_in.weight"].float())
    # the checksums are those of anybody who reads the checkpoint
    assert tensors.keys() == {key for key in weights if "init_conv.0" not in key}
    for key, found in tensors.items():
        value = weights[key].to(dtype or torch.float32).flatten().view(torch.uint8).numpy().tobytes()
        assert found == {"sha256": hashlib.sha256(value).hexdigest(), "compared": "cast" if dtype else "file"}


def test_verification_finds_a_single_changed_bit(tmp_path):
    config, weights, _ = read_case(SMALL)
    with open_nemo(write_form("tar", tmp_path, config, weights)) as checkpoint:
        write_nemo_stage(checkpoint, tmp_path / "unet")
        file = tmp_path / "unet" / WEIGHTS_FILE
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        last = list(weights)[-1]
        with pytest.raises(ValueError, match=f"differs from the checkpoint: .*{last}"):
            verify_nemo_stage(checkpoint, tmp_path / "unet")


def test_numbers_beyond_half_precision_are_refused(tmp_path):
    config, weights, _ = read_case(SMALL)
    key = f"{PREFIX}out.bias"
    weights[key] = weights[key] + 1e6
    with pytest.raises(ValueError, match=f"`dtype` is torch.float16, but '{key}' has values out of its range"):
        load_nemo_stage(write_form("tar", tmp_path, config, weights), dtype=torch.float16)


# The way back


@pytest.mark.parametrize("with_record", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_way_back_changes_no_bit(case, with_record, tmp_path):
    config, weights, _ = read_case(case)
    weights = {key: value.half() for key, value in weights.items()}
    stage = load_nemo_stage(write_form("tar", tmp_path, config, weights))
    unet = stage.parts.unet
    recorded = stage.report.config if with_record else None
    export_nemo(
        unet, unet.state_dict(), nemo_config(unet, stage.parts.scheduler, 10, recorded), tmp_path / "back.nemo"
    )
    with open_nemo(tmp_path / "back.nemo") as checkpoint:
        found = {key: tensor.clone() for key, tensor in checkpoint.weights.read(list(weights))}
        assert checkpoint.weights.tensors.keys() == weights.keys()
    for key, expected in weights.items():
        assert found[key].dtype == torch.float16 and torch.equal(found[key], expected), key
    if with_record:
        assert checkpoint.config == model_section(config)
    again = load_nemo_stage(tmp_path / "back.nemo")
    assert dict(again.parts.unet.config) == dict(unet.config)


def test_networks_that_nemo_does_not_have_are_refused_by_the_entry():
    config, _, _ = read_case("base_default_small")
    parts = describe_stage(config)
    parts.unet.register_to_config(norm_num_groups=16, act_fn="gelu")
    with pytest.raises(ValueError, match="NeMo has no network like this one: it differs in norm_num_groups, act_fn"):
        nemo_config(parts.unet, parts.scheduler)
    scheduler = ContinuousDDPMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="`scheduler` is 'variance_preserving, v_prediction, squaredcos_cap_v2', but"):
        nemo_config(describe_stage(config).unet, scheduler)


def test_ranks_that_differ_are_refused_by_the_key(tmp_path):
    config, weights, _ = read_case(SMALL)
    section = {"model_config.yaml": yaml.safe_dump(model_section(config)).encode()}
    key = f"{PREFIX}out.bias"
    for changed in (weights[key] + 1, weights[key][:1]):
        ranks = {
            f"mp_rank_0{i}/model_weights.ckpt": saved({**weights, **w}) for i, w in ((0, {}), (1, {key: changed}))
        }
        path = pack(tmp_path / "base.nemo", {**section, **ranks})
        with pytest.raises(
            ValueError, match=f"has '{key}' in several ranks, but mp_rank_01 has another than mp_rank_00"
        ):
            load_nemo_stage(path)
