"""NeMo's training sections in our names; the configurations are of the form that NeMo v2.3.0 ships."""

import copy
from dataclasses import fields

import pytest
import yaml

from diffusers_imagen import ImagenUNetModel
from diffusers_imagen.commands import main as cli
from diffusers_imagen.conversion.nemo_training import translate_training
from diffusers_imagen.training import TrainingConfig, parse_args
from diffusers_imagen.training.network import load_unet


BASE = """
allow_tf32: True
trainer:
  devices: 2
  num_nodes: 4
  max_steps: 250000
  precision: bf16
  gradient_clip_val: 1.0
  log_every_n_steps: 5
  benchmark: False
exp_manager:
  exp_dir: runs/imagen-base64
  create_tensorboard_logger: True
  checkpoint_callback_params: {every_n_train_steps: 1000, save_top_k: 5}
  ema: {enable: True, decay: 0.9999, every_n_steps: 1}
model:
  precision: ${trainer.precision}
  micro_batch_size: 16
  global_batch_size: 512
  inductor: False
  unet_type: base
  channels_last: True
  unet:
    embed_dim: 32
    image_size: 16
    channel_mult: [1, 2]
    num_res_blocks: 1
    attention_resolutions: [8]
    per_head_channels: 8
    cond_dim: 32
    gradient_checkpointing: True
  seed: 1234
  preconditioning_type: EDM
  preconditioning: {loss_type: l2, sigma_data: 0.4, p_mean: -1.1, p_std: 1.3}
  conditioning: {embed_dim: 32, token_length: 128, drop_rate: 0.15, precached_key: embeddings_t5_xxl}
  data:
    num_workers: 16
    train:
      dataset_path: [wdinfo.pkl]
      augmentations: {resize_smallest_side: 16, center_crop_h_w: "16, 16", horizontal_flip: False}
      filterings: null
    webdataset: {infinite_sampler: False}
  optim:
    name: fused_adam
    lr: 0.0001
    eps: 1e-8
    betas: [0.9, 0.999]
    weight_decay: 0.02
    sched: {name: WarmupPolicy, warmup_steps: 10000, warmup_ratio: null}
"""


PARSED = yaml.safe_load(BASE)


def with_entries(changes: dict) -> dict:
    """The configuration with entries changed, by dotted names."""
    config = copy.deepcopy(PARSED)
    for name, value in changes.items():
        *sections, last = name.split(".")
        section = config
        for part in sections:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[last] = value
    return config


SUPER_RESOLUTION = {
    "model.unet_type": "sr",
    "model.noise_cond_aug": True,
    "model.data.train.augmentations.resize_smallest_side": 1024,
    "model.data.train.augmentations.center_crop_h_w": "256, 256",
    "model.data.train.target_resolutions": [64, 256],
    "model.data.train.filterings.resolution.method": "larger",
    "model.data.train.filterings.resolution.value": 1024,
}


def test_every_setting_of_a_base_stage():
    settings, differences, left_out = translate_training(with_entries({}))
    assert settings == {
        "max_train_steps": 250000,
        "max_grad_norm": 1.0,
        "logging_steps": 5,
        "output_dir": "runs/imagen-base64",
        "checkpointing_steps": 1000,
        "allow_tf32": True,
        "seed": 1234,
        "torch_compile": False,
        "gradient_checkpointing": True,
        "tokenizer_max_length": 128,
        "text_drop_rate": 0.15,
        "dataloader_num_workers": 16,
        "random_flip": False,
        "channels_last": True,
        "preconditioning": "edm",
        "loss": "l2",
        "sigma_data": 0.4,
        "p_mean": -1.1,
        "p_std": 1.3,
        "learning_rate": 1e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_weight_decay": 0.02,
        "adam_epsilon": 1e-8,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 10000,
        "mixed_precision": "bf16",
        "train_batch_size": 16,
        "gradient_accumulation_steps": 4,  # 512 images on 8 devices of 16
        "use_ema": True,
        "ema_type": "constant",
        "ema_decay": 0.9999,
        "report_to": "tensorboard",
        "resolution": 16,
    }
    assert settings.keys() <= {f.name for f in fields(TrainingConfig)}
    assert differences == []
    assert sorted(left_out) == [
        "exp_manager.checkpoint_callback_params.save_top_k",
        "model.conditioning.embed_dim",
        "model.conditioning.precached_key",
        "model.data.train.dataset_path",
        "model.data.train.filterings",
        "model.data.webdataset.infinite_sampler",
        "trainer.benchmark",
    ]


def test_super_resolution_trains_on_crops_and_says_what_differs():
    settings, differences, _ = translate_training(with_entries(SUPER_RESOLUTION))
    names = ("resolution", "low_resolution", "crop_size", "min_resolution", "noise_conditioning_augmentation")
    assert [settings[name] for name in names] == [1024, 256, 256, 1024, 0.5]
    assert [text.split(":")[0] for text in differences] == ["crop_size", "noise_conditioning_augmentation"]
    TrainingConfig(preset="emoji_sr_256", **settings)

    whole = {
        **SUPER_RESOLUTION,
        "model.data.train.augmentations.resize_smallest_side": 256,
        "model.noise_cond_aug": False,
    }
    settings, differences, _ = translate_training(with_entries(whole))
    assert [settings.get(name) for name in names] == [256, 64, None, 1024, 0.0]
    assert differences == []


def test_ddpm_and_what_nemo_takes_for_granted():
    config = with_entries(
        {
            "model.preconditioning": {"loss_type": "huber", "pred_objective": "x_start", "noise_schedule": "linear"},
            "model.preconditioning_type": "DDPM",
            "model.optim": {"name": "fused_adam", "lr": 2e-4},
            "exp_manager.ema.enable": False,
            "trainer.precision": 32,
            "trainer.gradient_clip_val": None,
        }
    )
    settings = translate_training(config).settings
    expected = {
        "preconditioning": "variance_preserving",
        "loss": "huber",
        "prediction_type": "sample",
        "beta_schedule": "linear",
        "adam_weight_decay": 0.0,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "use_ema": False,
        "mixed_precision": "no",
        "max_grad_norm": 0.0,
    }
    assert {name: settings[name] for name in expected} == expected
    TrainingConfig(preset="emoji_base_64", **settings)


REFUSED = {
    "no steps": ({"trainer.max_steps": -1}, "`trainer.max_steps` is -1, but should be a number of steps"),
    "text for a number": ({"model.optim.lr": "fast"}, "`model.optim.lr` is 'fast', but should be of type float"),
    "no rate": ({"model.optim.lr": None}, "lacks `model.optim.lr`"),
    "weight inside": (
        {"model.preconditioning.loss_type": "l1"},
        "`model.preconditioning.loss_type` is 'l1', whose EDM",
    ),
    "formulation": ({"model.preconditioning_type": "VE"}, "`model.preconditioning_type` is 'VE', but"),
    "optimizer": ({"model.optim.name": "sgd"}, "`model.optim.name` is 'sgd', but training has AdamW only"),
    "schedule": ({"model.optim.sched.name": "NoamAnnealing"}, "`model.optim.sched.name` is 'NoamAnnealing', but"),
    "floor": ({"model.optim.sched": {"name": "CosineAnnealing", "min_lr": 1e-6}}, "ends at 0"),
    "devices": ({"trainer.devices": -1}, "`trainer.devices` is -1, but should be their number"),
    "batches": ({"model.global_batch_size": 500}, "`model.global_batch_size` is 500, but should be a multiple of 16"),
    "precision": ({"trainer.precision": "fp8"}, "`trainer.precision` is 'fp8', but should be one of"),
    "averages": ({"exp_manager.ema.every_n_steps": 10}, "take `decay` 0.99999"),
    "no images": ({"model.data.synthetic_data": True}, "`model.data.synthetic_data` is True"),
    "crop": ({"model.data.train.augmentations.center_crop_h_w": "8, 8"}, "a base stage trains on whole images"),
    "no pyramid": ({"model.unet_type": "sr"}, "lacks `model.data.train.target_resolutions`"),
    "pyramid": ({**SUPER_RESOLUTION, "model.data.train.target_resolutions": [64, 512]}, "divides 256, and 256"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_would_train_something_else_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        translate_training(with_entries(changes))
    assert message in str(error.value)


def test_the_command_writes_a_file_that_training_reads(tmp_path, capsys):
    nemo, run, network = tmp_path / "nemo.yaml", tmp_path / "new" / "run.yaml", tmp_path / "network"
    nemo.write_text(BASE)
    assert cli.main(["convert-config", str(nemo), "--output", str(run), "--network", str(network)]) == 0
    output = capsys.readouterr().out
    assert "No counterpart, left out:\n" in output and "\n  model.data.train.dataset_path\n" in output
    assert "Still required:\n  train_data_dir or dataset_name\n" in output
    config = parse_args(["--config", str(run)])
    assert (config.adam_epsilon, config.p_std, config.pretrained_model_name_or_path) == (1e-8, 1.3, str(network))
    unet = load_unet(str(network))
    assert isinstance(unet, ImagenUNetModel)
    assert unet.config.block_out_channels == [32, 64] and unet.config.encoder_hid_dim == 32
    assert [path.name for path in run.parent.iterdir()] == ["run.yaml"]


def test_a_refused_file_writes_nothing(tmp_path, capsys):
    nemo, run = tmp_path / "nemo.yaml", tmp_path / "run.yaml"
    for text, message in (("model: [", "cannot be read"), ("name: imagen", "no section `model`"), ("3", "no section")):
        nemo.write_text(text)
        assert cli.main(["convert-config", str(nemo), "--output", str(run)]) == 2
        assert message in capsys.readouterr().err
    assert not run.exists()


# Single faults: every entry and section, one at a time

WRONG = [
    None,
    [],
    {},
    "x",
    -1,
    0,
    0.5,
    float("nan"),
    float("inf"),
    10**30,
    10**5000,
    True,
    [1, 2, 3],
    [None],
    {"a": 1},
    "${x}",
]


def names_of(section: dict, prefix: str = "") -> list[str]:
    names = []
    for key, value in section.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, dict):
            names += names_of(value, f"{prefix}{key}.")
    return names


@pytest.mark.parametrize("kind", [{}, SUPER_RESOLUTION], ids=["base", "super-resolution"])
def test_a_fault_is_refused_by_name_or_what_is_left_can_be_trained(kind):
    count = 0
    for name in names_of(with_entries(kind)):
        *_, last = name.split(".")
        for value in [*WRONG, "gone"]:
            config = with_entries({**kind, name: value})
            if value == "gone":
                section = config
                for part in name.split(".")[:-1]:
                    section = section[part]
                del section[last]
            try:
                settings = translate_training(config).settings
            except ValueError as error:
                assert "`" in str(error) and len(str(error)) < 500, (name, value, error)
            else:
                TrainingConfig(preset="emoji_base_64", **settings)
            count += 1
    assert count > 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": 5}, "`trainer` is 5, but should be a section"),
        ({"exp_manager.ema": [1]}, "`exp_manager.ema` is [1], but should be a section"),
        ({"model.optim.lr": {"a": 1}}, "`model.optim.lr` is a section, but should be of type float from 0 to 1"),
        ({"model.optim.betas": [0.9, "x"]}, "`model.optim.betas` is 'x', but should be of type float from 0 to 1"),
        ({"model.optim.betas": [0.9]}, "`model.optim.betas` is [0.9], but should be two numbers"),
        ({"model.seed": True}, "`model.seed` is True, but should be of type int"),
        ({"model.seed": 1.5}, "`model.seed` is 1.5, but should be of type int"),
        ({"trainer.max_steps": float("inf")}, "`trainer.max_steps` is inf, but should be a number of steps"),
        ({"model.conditioning.drop_rate": float("nan")}, "`model.conditioning.drop_rate` is nan, but"),
        ({"exp_manager.exp_dir": "${oc.env:HOME}/run"}, "`exp_manager.exp_dir` is '${oc.env:HOME}/run', but"),
        ({"model.data.train.augmentations.center_crop_h_w": "-16"}, "center_crop_h_w` is '-16', but"),
        ({**SUPER_RESOLUTION, "model.data.train.target_resolutions": [0, 256]}, "target_resolutions` is 0, but"),
        ({**SUPER_RESOLUTION, "model.data.train.target_resolutions": 64}, "target_resolutions` is 64, but"),
        ({"model": None}, "no section `model`"),
    ],
)
def test_an_entry_of_another_type_or_range_is_refused_by_name(changes, message):
    with pytest.raises(ValueError) as error:
        translate_training(with_entries(changes))
    assert message in str(error.value)
