"""Adapters in the forms of others: what they add to the weights is computed by hand here; what is not whole is refused."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffusers_imagen import EDMHeunScheduler, ImagenPipeline
from diffusers_imagen.loaders.lora_conversion import matching, patterns


QUERY, CONV, POINT = "down_blocks.1.attention.to_q", "conv_in", "down_blocks.1.resnets.0.conv_shortcut"
LAYERS = (QUERY, CONV, POINT)
ALPHA = 0.5


@pytest.fixture
def pipe(base_unet) -> ImagenPipeline:
    return ImagenPipeline(base_unet, EDMHeunScheduler(), None, None)


def factors(unet, layers=LAYERS, rank=2) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Down and up of linear layers and of convolutions."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator) * 0.1  # noqa: E731
    made = {}
    for layer in layers:
        out, *rest = unet.get_submodule(layer).weight.shape
        made[layer] = (draw(rank, *rest), draw(out, rank, *([1, 1] if len(rest) > 1 else [])))
    return made


def update(down: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
    return scaling * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def merged(pipe, name="unet") -> dict[str, torch.Tensor]:
    """What adapters add to the weights, by layer."""
    unet = getattr(pipe, name)
    plain = lambda: {key.replace(".base_layer", ""): value.clone() for key, value in unet.state_dict().items()}  # noqa: E731
    before = plain()
    pipe.fuse_lora()
    after = plain()
    pipe.unfuse_lora()
    return {
        key.removesuffix(".weight"): after[key] - before[key]
        for key in before
        if ".lora_" not in key and not torch.equal(after[key], before[key])
    }


def check(pipe, made, scaling, name="unet") -> None:
    found = merged(pipe, name)
    assert found.keys() == made.keys()
    for layer, (down, up) in made.items():
        torch.testing.assert_close(found[layer], update(down, up, scaling), atol=1e-6, rtol=1e-4)


FORMS = {
    "diffusers": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "a network's": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "an adapter's name": ("unet.{}.lora_A.default.weight", "unet.{}.lora_B.default.weight"),
    "lora.down": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "lora_down": ("unet.{}.lora_down.weight", "unet.{}.lora_up.weight"),
    "no weight": ("unet.{}.lora_down", "unet.{}.lora_up"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "compiled": ("unet._orig_mod.{}.lora_A.weight", "unet._orig_mod.{}.lora_B.weight"),
    "compiled alone": ("_orig_mod.{}.lora_A.weight", "_orig_mod.{}.lora_B.weight"),
}


@pytest.mark.parametrize("form", FORMS)
def test_alpha_keys_scale_the_update(pipe, form):
    down_key, up_key = FORMS[form]
    made, weights = factors(pipe.unet), {}
    for layer, (down, up) in made.items():
        weights |= {down_key.format(layer): down, up_key.format(layer): up}
        weights[down_key.format(layer).partition(".lora")[0] + ".alpha"] = torch.tensor(ALPHA)
    pipe.load_lora_weights(weights)
    check(pipe, made, ALPHA / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kohyas_files_load_by_the_networks_own_names(pipe, cascade, tmp_path, dtype):
    made, weights = factors(pipe.unet), {}
    for layer, (down, up) in made.items():
        key = f"lora_unet_{layer.replace('.', '_')}"
        weights |= {f"{key}.lora_down.weight": down.to(dtype), f"{key}.lora_up.weight": up.to(dtype)}
        weights[f"{key}.alpha"] = torch.tensor(ALPHA, dtype=dtype)
    save_file(weights, tmp_path / "kohya.safetensors", {"ss_network_dim": "2"})
    rounded = {layer: [factor.to(dtype).float() for factor in pair] for layer, pair in made.items()}
    pipe.load_lora_weights(str(tmp_path / "kohya.safetensors"))
    check(pipe, rounded, ALPHA / 2)
    with pytest.raises(ValueError, match="do not say which network .* Set `component` to"):
        cascade.load_lora_weights(tmp_path)
    pipe.unload_lora_weights()
    cascade.load_lora_weights(tmp_path, component="base_unet")
    check(cascade, rounded, ALPHA / 2, "base_unet")


def test_windows_of_one_pixel_may_be_flat_and_linear_layers_may_have_windows(pipe):
    made = factors(pipe.unet, (QUERY, POINT))
    (down, up), (point_down, point_up) = made.values()
    pipe.load_lora_weights(
        {
            f"unet.{QUERY}.lora_down.weight": down[..., None, None],
            f"unet.{QUERY}.lora_up.weight": up[..., None, None],
            f"unet.{POINT}.lora_down.weight": point_down.flatten(1),
            f"unet.{POINT}.lora_up.weight": point_up.flatten(1),
        }
    )
    check(pipe, made, 1.0)


def test_weights_of_diffusers_first_format(pipe):
    layers = (QUERY, "down_blocks.1.attention.to_out.0")
    made, block = factors(pipe.unet, layers), "unet.down_blocks.1.attention.processor"
    weights = {}
    for layer, name in zip(layers, ("to_q_lora", "to_out_lora")):
        weights |= {f"{block}.{name}.down.weight": made[layer][0], f"{block}.{name}.up.weight": made[layer][1]}
    pipe.load_lora_weights(weights)
    check(pipe, made, 1.0)


@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns", "dora", "bias"])
def test_a_folder_of_peft_draws_what_peft_does(pipe, base_unet, tmp_path, kind):
    options = {
        "plain": {},
        "rslora": {"use_rslora": True},
        "patterns": {"rank_pattern": {"attention.to_k": 3}, "alpha_pattern": {r"up_blocks\.1\..*to_[qv]": 5}},
        "dora": {"use_dora": True},
        "bias": {"lora_bias": True},
    }[kind]
    state = plain_weights_of(base_unet)
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["to_q", "to_k", "conv_in"], init_lora_weights=False, **options
    )
    model = get_peft_model(base_unet, config)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # magnitudes and biases are not what they begin as
            parameter.data += 0.05
    model.save_pretrained(tmp_path / "peft")
    expected = plain_weights_of(model.merge_and_unload())
    pipe.unet = type(base_unet).from_config(base_unet.config).eval()
    pipe.unet.load_state_dict(state)
    pipe.load_lora_weights(tmp_path / "peft")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    found = plain_weights_of(pipe.unet)
    assert found.keys() == expected.keys()
    assert sum(not torch.equal(found[key], state[key]) for key in found) >= 9
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-6, rtol=1e-5)


def plain_weights_of(unet) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in unet.state_dict().items()}


def test_layers_of_unlike_ranks_and_alphas_survive_saving(pipe, tmp_path):
    made = factors(pipe.unet, (QUERY,)) | factors(pipe.unet, (CONV,), rank=4)
    weights = {f"unet.{QUERY}.alpha": torch.tensor(1.0), f"unet.{CONV}.alpha": torch.tensor(8.0)}
    for layer, (down, up) in made.items():
        weights |= {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    pipe.load_lora_weights(weights)
    expected = {QUERY: update(*made[QUERY], 0.5), CONV: update(*made[CONV], 2.0)}
    for _ in range(2):
        found = merged(pipe)
        for layer in made:
            torch.testing.assert_close(found[layer], expected[layer], atol=1e-6, rtol=1e-4)
        pipe.save_lora_adapter(tmp_path)
        pipe.unload_lora_weights()
        pipe.load_lora_weights(tmp_path)


@pytest.mark.parametrize("target_rank", [None, 6])
def test_hotswap_of_another_rank_and_alpha_weighs_and_saves_what_it_draws(pipe, tmp_path, target_rank):
    if target_rank is not None:
        pipe.enable_lora_hotswap(target_rank=target_rank)
    first, second = factors(pipe.unet, rank=2), factors(pipe.unet, rank=4)
    for made, hotswap in ((first, False), (second, True)):
        weights = {f"unet.{layer}.alpha": torch.tensor(3.0) for layer in made}
        for layer, (down, up) in made.items():
            weights |= {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
        pipe.load_lora_weights(weights, adapter_name="a", hotswap=hotswap)
    check(pipe, second, 3 / 4)
    pipe.set_adapters("a", 0.5)
    check(pipe, second, 3 / 8)
    pipe.save_lora_adapter(tmp_path)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path)
    check(pipe, second, 3 / 4)


def good(unet) -> dict[str, torch.Tensor]:
    weights = {}
    for layer, (down, up) in factors(unet).items():
        weights |= {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    return weights


A, B = f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}.lora_B.weight"
FAULTS = {
    "NaN": (lambda w: {A: w[A] * float("nan")}, f"have NaN under '{A}'"),
    "infinity": (lambda w: {B: w[B] / 0}, f"have infinity under '{B}'"),
    "too large for float32": (lambda w: {B: w[B].double() * 1e300}, f"have infinity under '{B}'"),
    "unlike ranks": (lambda w: {B: torch.cat([w[B]] * 2, dim=1)}, "factors of ranks 2 and 4"),
    "integers": (lambda w: {A: w[A].long()}, f"torch.int64 under '{A}'"),
    "complex": (lambda w: {A: w[A] * 1j}, f"torch.complex64 under '{A}'"),
    "no rank": (lambda w: {A: w[A][:0], B: w[B][:, :0]}, "have the shape (0, 16)"),
    "huge rank": (lambda w: {A: w[A][:1].expand(10**7, -1), B: w[B][:, :1].expand(-1, 10**7)}, "have rank 10000000"),
    "one dimension": (lambda w: {A: w[A].flatten()}, "have the shape"),
    "wide": (lambda w: {A: torch.cat([w[A]] * 2, dim=1)}, "but the layer has"),
    "window": (lambda w: {"unet.conv_in.lora_A.weight": torch.ones(2, 3, 5, 5)}, "windows of (5, 5)"),
    "meta": (lambda w: {A: w[A].to("meta")}, "tensor on meta"),
    "sparse": (lambda w: {A: w[A].to_sparse()}, "layout torch.sparse_coo"),
    "no tensor": (lambda w: {A: [[1.0]]}, f"have a list under '{A}'"),
    "no string": (lambda w: {7: w[A]}, "have the key 7"),
    "alpha NaN": (lambda w: {f"unet.{QUERY}.alpha": torch.tensor(float("nan"))}, "have NaN under"),
    "alpha of two": (lambda w: {f"unet.{QUERY}.alpha": torch.ones(2)}, "not a number"),
    "alpha alone": (lambda w: {"unet.conv_out.alpha": torch.tensor(1.0)}, "lack the factor down"),
    "one factor": (lambda w: {"unet.conv_out.lora_A.weight": torch.ones(2, 8, 3, 3)}, "lack the factor up"),
    "no layer": (lambda w: {"unet.conv_what.lora_A.weight": torch.ones(2, 8)}, "change unet.conv_what, which"),
    "a norm": (lambda w: {"unet.norm_out.lora_A.weight": torch.ones(2, 8)}, "change unet.norm_out, which"),
    "LoHa": (lambda w: {f"unet.{QUERY}.hada_w1_a": torch.ones(2, 2)}, "which is of LoHa"),
    "LoKr": (lambda w: {f"lora_unet_{QUERY.replace('.', '_')}.lokr_w1": torch.ones(2, 2)}, "which is of LoKr"),
    "LyCORIS's DoRA": (lambda w: {f"unet.{QUERY}.dora_scale": torch.ones(8, 1)}, "which is of LyCORIS's DoRA"),
    "LoCon": (lambda w: {f"unet.{CONV}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "Tucker-decomposed LoCon"),
    "differences": (lambda w: {f"unet.{QUERY}.diff": torch.ones(8, 8)}, "full differences"),
    "a text encoder": (lambda w: {"lora_te_text_model_x.lora_down.weight": torch.ones(2, 8)}, "a text encoder"),
    "text_encoder": (lambda w: {"text_encoder.x.lora_A.weight": torch.ones(2, 8)}, "adapts a text encoder"),
    "base weights": (lambda w: {f"unet.{QUERY}.base_layer.weight": torch.ones(8, 8)}, "the network's own weights"),
    "something else": (lambda w: {"unet.conv_in.weight": torch.ones(8, 3, 3, 3)}, "which is not a LoRA key"),
    "two adapters": (lambda w: {A.replace(".weight", ".two.weight"): w[A]}, "only one of which can be loaded"),
    "twice": (lambda w: {f"lora_unet_{QUERY.replace('.', '_')}.lora_down.weight": w[A]}, "do not say|are for"),
    "some magnitudes": (lambda w: {f"unet.{QUERY}.lora_magnitude_vector": torch.ones(16)}, "in 1 of 3 layers"),
    "some biases": (lambda w: {f"unet.{QUERY}.lora_B.bias": torch.ones(16)}, "in 1 of 3 layers"),
    "a bias of the other": (lambda w: {f"unet.{QUERY}.lora_A.bias": torch.ones(2)}, "is not a LoRA key"),
}


def state_of(pipe) -> tuple:
    unet = pipe.unet
    layers = {name: (type(module), id(module)) for name, module in unet.named_modules()}
    trainable = {name: (parameter.requires_grad, id(parameter)) for name, parameter in unet.named_parameters()}
    return layers, trainable, pipe.get_list_adapters(), pipe.get_active_adapters(), hasattr(unet, "peft_config")


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_by_name_and_change_nothing(pipe, fault):
    change, message = FAULTS[fault]
    before = state_of(pipe)
    weights = good(pipe.unet)
    with pytest.raises(ValueError) as error:
        pipe.load_lora_weights(weights | change(weights))
    assert any(part in str(error.value) for part in message.split("|")) and "\n" not in str(error.value)
    assert state_of(pipe) == before


CONFIGS = {
    "another method": ({"peft_type": "LOHA"}, "`peft_type`"),
    "another rank": ({"r": 3}, "have rank 2, but their configuration says 3"),
    "a word for a number": ({"lora_alpha": "8"}, "`lora_alpha`"),
    "NaN": ({"lora_alpha": float("nan")}, "`lora_alpha`"),
    "too large": ({"lora_alpha": 10**400}, "`lora_alpha`"),
    "a bool": ({"r": True}, "`r`"),
    "a word for a bool": ({"use_rslora": "no"}, "`use_rslora`"),
    "biases": ({"bias": "all"}, "`bias`"),
    "whole layers": ({"modules_to_save": ["conv_out"]}, "`modules_to_save`"),
    "other weights": ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights`"),
    "a list of patterns": ({"alpha_pattern": [1]}, "`alpha_pattern`"),
    "a broken pattern": ({"alpha_pattern": {"(": 1}}, "`alpha_pattern`"),
    "an endless pattern": ({"rank_pattern": {"(a+)+b": 1}}, "`rank_pattern`"),
    "DoRA without magnitudes": ({"use_dora": True}, "`magnitude` in 0 of 3 layers"),
    "dropout": ({"lora_dropout": 2}, "`lora_dropout`"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_configurations_that_do_not_fit_are_refused(pipe, fault):
    config, message = CONFIGS[fault]
    before = state_of(pipe)
    with pytest.raises(ValueError) as error:
        pipe.load_lora_weights(good(pipe.unet), metadata={"r": 2, "lora_alpha": 4, **config})
    assert message in str(error.value)
    assert state_of(pipe) == before


def test_alpha_in_key_and_configuration_must_agree(pipe):
    weights = good(pipe.unet) | {f"unet.{QUERY}.alpha": torch.tensor(3.0)}
    with pytest.raises(ValueError, match="have 3.0 under .*, but their configuration says 4"):
        pipe.load_lora_weights(weights, metadata={"unet.r": 2, "unet.lora_alpha": 4})


def test_what_a_configuration_names_is_neither_imported_nor_fetched(pipe, base_unet, tmp_path):
    made = factors(pipe.unet)
    weights = {f"base_model.model.{k.removeprefix('unet.')}": v for k, v in good(pipe.unet).items()}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"},
        "base_model_name_or_path": "https://example.invalid/none",
        "megatron_core": "antigravity",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    pipe.load_lora_weights(tmp_path)
    check(pipe, made, 2.0)
    kept = pipe.unet.peft_config["default_0"]
    assert kept.auto_mapping is None and kept.base_model_name_or_path is None and "antigravity" != kept.megatron_core


def test_a_failure_in_the_second_stage_takes_the_first_back(cascade, monkeypatch):
    weights = {}
    for stage in ("base_unet", "sr256_unet"):
        for layer, (down, up) in factors(getattr(cascade, stage), ("conv_in",)).items():
            weights |= {f"{stage}.{layer}.lora_A.weight": down, f"{stage}.{layer}.lora_B.weight": up}
    cascade.load_lora_weights(weights, adapter_name="old")
    cascade.set_adapters("old", 0.5)
    unet = cascade.base_unet
    before = {name: id(module) for name, module in unet.named_modules()}
    trainable = {name: p.requires_grad for name, p in unet.named_parameters()}

    def fail(*args, **kwargs):
        raise MemoryError("full")

    monkeypatch.setattr(cascade.sr256_unet, "load_lora_adapter", fail)
    more = weights | {
        "base_unet.conv_out.lora_A.weight": torch.ones(1, 8, 3, 3),
        "base_unet.conv_out.lora_B.weight": torch.ones(3, 1, 1, 1),
    }
    with pytest.raises(MemoryError):
        cascade.load_lora_weights(more, adapter_name="new")
    assert {name: id(module) for name, module in unet.named_modules()} == before
    assert {name: p.requires_grad for name, p in unet.named_parameters()} == trainable
    assert cascade.get_list_adapters() == {"base_unet": ["old"], "sr256_unet": ["old"]}
    assert cascade.get_active_adapters() == ["old"]
    assert unet.conv_in.scaling == {"old": 0.5} and unet.conv_in.r == {"old": 2}


def test_keys_without_layers_load_nothing_and_nothing_at_all_is_refused(pipe, caplog):
    with caplog.at_level("WARNING", logger="diffusers_imagen"):
        pipe.load_lora_weights({"lora_foo": torch.tensor(2.0)})
    assert "nothing is loaded" in caplog.text and pipe.get_list_adapters() == {}
    with pytest.raises(ValueError, match="has no weights"):
        pipe.load_lora_weights({})


def test_patterns_match_as_pefts_do():
    found = patterns({"p": {"to_q": 1, "^conv": 2, r"up_blocks\.\d\.x": 3}}, "p", "unet")
    names = ("a.to_q", "to_q", "into_q", "conv", "a.conv", "up_blocks.1.x", "up_blocks.10.x")
    assert [matching(found, name, 0) for name in names] == [1, 1, 0, 2, 0, 3, 0]


def test_saved_keys_know_nothing_of_torch_compile(pipe, tmp_path):
    weights = good(pipe.unet)
    pipe.load_lora_weights(weights, adapter_name="default")
    compiled = torch.compile(pipe.unet, backend="eager")
    layers = {f"_orig_mod.{key}": value for key, value in get_peft_model_state_dict(compiled).items()}
    ImagenPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict()
    )
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert saved.keys() == weights.keys()
