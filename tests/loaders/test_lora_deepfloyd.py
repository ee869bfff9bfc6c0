"""Adapters of DeepFloyd IF's networks: what diffusers' IFPipeline saves draws the same here, and the other way round."""

import json

import pytest
import torch
from deepfloyd_networks import STAGE_1, STAGE_2, TEXT_WIDTH, TOKENS
from diffusers import DDIMScheduler, IFPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import set_weights_and_activate_adapters
from networks import randomize, relative_error
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_imagen import EDMHeunScheduler, ImagenCascadePipeline, ImagenPipeline
from diffusers_imagen.conversion.deepfloyd import layer_names, unet_from_deepfloyd, weight_names
from diffusers_imagen.loaders.lora_names import diffusers_names
from diffusers_imagen.training.finetuning.finetuning_config import TARGET_MODULES
from diffusers_imagen.training.finetuning.lora_trainer import find_targets


FILE = "pytorch_lora_weights.safetensors"
STAGES = {"I": STAGE_1, "II": STAGE_2}
TARGETS = {
    "DreamBooth": {"target_modules": TARGET_MODULES, "lora_alpha": 4},
    "everywhere": {"target_modules": ["conv1", "conv_in", "time_emb_proj", "linear_1", "k_proj", "encoder_hid_proj"]},
    "patterns": {
        "target_modules": ["to_q", "add_k_proj", "conv2"],
        "lora_alpha": 8,
        "rank_pattern": {"to_q": 3, "^mid_block.resnets.0.conv2": 5},
        "alpha_pattern": {"down_blocks.*.add_k_proj": 1, "conv2": 3},
        "use_rslora": True,
    },
    "dora": {"target_modules": ["to_q", "add_v_proj", "conv_out"], "use_dora": True},
}


@pytest.fixture(params=STAGES)
def theirs(request) -> IFPipeline:
    parts = dict.fromkeys(("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker"))
    unet = randomize(UNet2DConditionModel(**STAGES[request.param]))
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    return IFPipeline(unet=unet, scheduler=scheduler, **parts, requires_safety_checker=False)


@pytest.fixture
def ours(theirs) -> ImagenPipeline:
    """The same network, with weights of its own, as fusing changes them."""
    state = {name: weight.clone() for name, weight in theirs.unet.state_dict().items()}
    return ImagenPipeline(unet_from_deepfloyd(state, dict(theirs.unet.config)), EDMHeunScheduler(), None, None)


@torch.no_grad()
def call(pipe, **kwargs) -> torch.Tensor:
    """The network's output for fixed input."""
    unet, generator = pipe.unet, torch.Generator().manual_seed(0)
    side = unet.config.sample_size
    sample, low_res = torch.randn(2, 2, 3, side, side, generator=generator)
    text = torch.randn(2, TOKENS, TEXT_WIDTH, generator=generator)
    level, low_res_level = torch.tensor([20.0, 700.0]), torch.tensor([250.0, 3.0])
    stage_2 = unet.config.class_embed_type is not None if isinstance(pipe, IFPipeline) else unet.takes_low_res
    if isinstance(pipe, IFPipeline):
        sample = torch.cat([sample, low_res], dim=1) if stage_2 else sample
        return unet(sample, level, text, class_labels=low_res_level if stage_2 else None, **kwargs).sample
    low = {"low_res_sample": low_res, "low_res_timestep": low_res_level} if stage_2 else {}
    return unet(sample, level, text, **low).sample


def adapt(unet, name="default", seed=0, **config) -> None:
    """An adapter as training leaves it: both factors are away from zero."""
    unet.add_adapter(LoraConfig(r=2, **config), name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in unet.named_parameters():
        if f".{name}." in key and "magnitude" not in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        elif f"magnitude_vector.{name}" in key:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)


def save_theirs(pipe, folder, name="default", metadata=True) -> str:
    """As diffusers' DreamBooth script for IF does it."""
    config = pipe.unet.peft_config[name].to_dict() if metadata else None
    layers = get_peft_model_state_dict(pipe.unet, adapter_name=name)
    IFPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
    return str(folder)


def check(actual: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor) -> None:
    assert (expected - plain).abs().max() > 0.01
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("targets", TARGETS)
def test_files_of_diffusers_draw_the_same_and_return(theirs, ours, targets, tmp_path):
    plain = call(theirs)
    adapt(theirs.unet, **TARGETS[targets])
    expected = call(theirs)
    ours.load_lora_weights(save_theirs(theirs, tmp_path / "theirs"))
    check(call(ours), expected, plain)

    ours.save_lora_adapter(tmp_path / "ours")
    assert load_file(tmp_path / "ours" / FILE).keys() == load_file(tmp_path / "theirs" / FILE).keys()
    theirs.unload_lora_weights()
    theirs.load_lora_weights(tmp_path / "ours")
    check(call(theirs), expected, plain)
    ours.unload_lora_weights()
    assert relative_error(call(ours), plain) < 1e-5


@pytest.mark.parametrize("metadata", [True, False])
def test_adapters_of_ours_draw_the_same_in_diffusers(theirs, ours, metadata, tmp_path):
    plain = call(ours)
    # two blocks of one name that diffusers has for another block
    layers = ["down_blocks.1.resnets.0.conv1", "up_blocks.2.resnets.0.conv2", "to_k"]
    adapt(ours.unet, target_modules=layers, rank_pattern={"to_k": 3}, lora_alpha=7 if metadata else 2)
    if not metadata:
        ours.unet.set_adapters("default", 1.0)
        for layer in ours.unet.modules():
            if hasattr(layer, "lora_alpha"):
                layer.scaling["default"] = 1.0  # alpha is the rank
    expected = call(ours)
    ImagenPipeline.save_lora_weights(
        tmp_path,
        unet=ours.unet,
        unet_lora_layers=get_peft_model_state_dict(ours.unet),
        unet_lora_adapter_metadata=ours.unet.peft_config["default"].to_dict() if metadata else None,
    )
    theirs.load_lora_weights(tmp_path)
    check(call(theirs), expected, plain)
    for name in ("unloaded", "loaded"):
        ours.unload_lora_weights()
        ours.load_lora_weights(tmp_path, adapter_name=name)
        check(call(ours), expected, plain)


def test_scales_of_several_adapters_and_fusing_are_those_of_diffusers(theirs, ours, tmp_path):
    plain = call(theirs)
    for seed, (name, targets) in enumerate({"one": ["to_q", "add_v_proj"], "two": ["to_q", "conv2"]}.items()):
        adapt(theirs.unet, name, seed, target_modules=targets, lora_alpha=5)
        ours.load_lora_weights(save_theirs(theirs, tmp_path / name, name), adapter_name=name)
    weights = ["one", "two"], [0.5, -0.25]
    set_weights_and_activate_adapters(theirs.unet, *weights)  # `set_adapters` of diffusers fails for stage II
    ours.set_adapters(*weights)
    expected = call(theirs)
    check(call(ours), expected, plain)
    scaled = call(theirs, cross_attention_kwargs={"scale": 0.5})
    with ours.scaled_adapters({"scale": 0.5}):
        check(call(ours), scaled, expected)
    for pipe in (theirs, ours):
        pipe.fuse_lora(components=["unet"], lora_scale=0.7)
    fused = call(theirs)
    check(call(ours), fused, expected)
    ours.unfuse_lora(components=["unet"])  # diffusers' adapters would remain scaled by 0.7
    check(call(ours), expected, fused)


def test_a_cascade_takes_a_file_for_the_stage_that_is_named(theirs, ours, tokenizer, text_encoder, tmp_path):
    adapt(theirs.unet, target_modules=TARGET_MODULES)
    expected, folder = call(theirs), save_theirs(theirs, tmp_path / "theirs")
    if ours.unet.takes_low_res:
        parts, component = {"sr256_unet": ours.unet, "sr256_scheduler": EDMHeunScheduler()}, "sr256_unet"
        base = unet_from_deepfloyd(randomize(UNet2DConditionModel(**STAGE_1)))
    else:
        parts, component, base = {}, "base_unet", ours.unet
    for unet in (base, *(parts[name] for name in parts if name.endswith("unet"))):
        unet.register_to_config(encoder_hid_dim=TEXT_WIDTH)
    cascade = ImagenCascadePipeline(base, EDMHeunScheduler(), None, None, **parts)
    with pytest.raises(ValueError, match="are for .'unet'., but"):
        cascade.load_lora_weights(folder)
    cascade.load_lora_weights(folder, component=component)
    assert relative_error(call(ours), expected) < 1e-5
    cascade.save_lora_adapter(tmp_path / "cascade")
    keys = {key.removeprefix(component) for key in load_file(tmp_path / "cascade" / FILE)}
    assert keys == {key.removeprefix("unet") for key in load_file(f"{folder}/{FILE}")}
    theirs.unload_lora_weights()
    ImagenPipeline(getattr(cascade, component), EDMHeunScheduler()).save_lora_adapter(tmp_path / "stage")
    theirs.load_lora_weights(tmp_path / "stage")
    assert relative_error(call(theirs), expected) < 1e-5


def test_diffusers_reads_the_ranks_and_alphas_that_are_saved(theirs, ours, tmp_path):
    adapt(ours.unet, target_modules=["to_q", "conv1"], lora_alpha=6, rank_pattern={"mid_blocks.0.attention.to_q": 3})
    ours.save_lora_adapter(tmp_path)
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    assert metadata["unet.r"] == 2 and metadata["unet.lora_alpha"] == 6
    assert metadata["unet.rank_pattern"] == {"^mid_block.attentions.0.to_q": 3}
    theirs.load_lora_weights(tmp_path)
    assert theirs.unet.mid_block.attentions[0].to_q.scaling == {"default_0": 2.0}
    assert theirs.unet.down_blocks[1].resnets[0].conv1.scaling == {"default_0": 3.0}


FORMS = {
    "without a prefix": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "lora.down": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    "processors": ("unet.{}_lora.down.weight", "unet.{}_lora.up.weight"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layers", [("to_q", "to_out.0"), ("add_k_proj", "add_v_proj")])
def test_other_forms_of_files(theirs, ours, form, layers, tmp_path):
    """What diffusers loads of old files and kohya's, it does for `to_q` and kin only: the plain form is the oracle."""
    adapt(theirs.unet, target_modules=[f"mid_block.attentions.0.{layer}" for layer in layers], lora_alpha=2)
    expected, keys, weights = call(theirs), FORMS[form], {}
    for key, weight in get_peft_model_state_dict(theirs.unet).items():
        layer, part = key.removesuffix(".weight").rsplit(".", 1)
        if form == "kohya":
            layer = layer.replace(".", "_")
            weights[f"lora_unet_{layer}.alpha"] = torch.tensor(2.0)
        if form == "processors":
            layer = layer.replace("to_out.0", "to_out").replace("attentions.0.", "attentions.0.processor.")
        weights[keys[part == "lora_B"].format(layer)] = weight
    save_file(weights, tmp_path / "w.safetensors")
    ours.load_lora_weights(tmp_path, metadata={"r": 2, "lora_alpha": 2} if form != "kohya" else None)
    assert relative_error(call(ours), expected) < 1e-5
    if layers[0] == "to_q" and form in ("kohya", "processors", "lora.down"):  # diffusers' own reading of the same file
        theirs.unload_lora_weights()
        theirs.load_lora_weights(tmp_path)
        assert relative_error(call(theirs), expected) < 1e-5


def test_processors_of_layers_that_do_nothing_are_left_out(theirs, ours, caplog):
    """Files before diffusers 0.18 adapt keys and values of the image where only the text is attended to."""
    attention = theirs.unet.mid_block.attentions[0]
    weights = {}
    for name in ("to_q", "to_k", "to_v", "add_k_proj"):
        layer = getattr(attention, name) or attention.to_q
        block = f"unet.mid_block.attentions.0.processor.{name}_lora"
        weights |= {f"{block}.down.weight": torch.ones(2, layer.in_features) * 0.1}
        weights |= {f"{block}.up.weight": torch.ones(layer.out_features, 2) * 0.1}
    with caplog.at_level("WARNING", logger="diffusers_imagen"):
        ours.load_lora_weights(weights)
    adapted = {name for name, module in ours.unet.named_modules() if hasattr(module, "base_layer")}
    idle = ours.unet.takes_low_res
    expected = ("to_q", "to_k") if idle else ("to_q", "to_k", "to_v", "add_k_proj")
    assert adapted == {f"mid_blocks.0.attention.{name}" for name in expected}
    assert ("for 2 layers as mid_block.attentions.0.to_k are left out" in caplog.text) == idle


def test_names_of_both_are_taken_for_diffusers_with_a_warning(theirs, ours, caplog, tmp_path):
    adapt(theirs.unet, target_modules=["down_blocks.3.resnets.0.conv2"])
    expected = call(theirs)
    with caplog.at_level("WARNING", logger="diffusers_imagen"):
        ours.load_lora_weights(save_theirs(theirs, tmp_path))
    assert relative_error(call(ours), expected) < 1e-5
    place = diffusers_names(ours.unet)["down_blocks.3.resnets.0.conv2"]
    assert place != "down_blocks.3.resnets.0.conv2"
    assert f"is taken for diffusers', which is {place} here" in caplog.text


def test_the_networks_own_names_still_load(ours, caplog):
    adapt(ours.unet, target_modules=["to_q", "conv1"], lora_alpha=2)
    expected, layers = call(ours), get_peft_model_state_dict(ours.unet)
    ours.unload_lora_weights()
    with caplog.at_level("WARNING", logger="diffusers_imagen"):
        ours.load_lora_weights({f"unet.{key}": weight for key, weight in layers.items()})
    assert torch.equal(call(ours), expected) and "taken for" not in caplog.text


def bad_files(weights: dict[str, torch.Tensor]) -> dict[str, dict]:
    """By what is said of them."""
    key = next(iter(weights))
    stranger = key.replace("attentions.0", "attentions.9")
    return {
        "have width .*, but the layer has": {**weights, key: torch.cat([weights[key]] * 2, dim=1)},
        r"change unet\.mid_block\.attentions\.9\.to_q, which": {**weights, stranger: weights[key]},
        "which adapts a text encoder": {**weights, "text_encoder.q.lora_A.weight": torch.ones(2, 2)},
        "lack the factor": {name: weight for name, weight in weights.items() if name != key},
    }


def test_refused_files_change_nothing(theirs, ours):
    adapt(theirs.unet, target_modules=["mid_block.attentions.0.to_q"])
    weights = {f"unet.{key}": value for key, value in get_peft_model_state_dict(theirs.unet).items()}
    before = [name for name, _ in ours.unet.named_modules()]
    for message, bad in bad_files(weights).items():
        with pytest.raises(ValueError, match=message):
            ours.load_lora_weights(bad)
    assert [name for name, _ in ours.unet.named_modules()] == before and not hasattr(ours.unet, "peft_config")


def test_layers_outside_the_network_are_not_saved(ours, tmp_path):
    with pytest.raises(ValueError, match="change unet.nowhere, which"):
        ImagenPipeline.save_lora_weights(
            tmp_path / "out", unet=ours.unet, unet_lora_layers={"nowhere.lora_A.weight": torch.ones(2, 2)}
        )
    with pytest.raises(ValueError, match="`unet` is 'unet', but should be a network"):
        ImagenPipeline.save_lora_weights(
            tmp_path / "out", unet="unet", unet_lora_layers={"x.lora_A.weight": torch.ones(2, 2)}
        )
    assert not (tmp_path / "out").exists()


def test_the_default_targets_are_the_layers_that_diffusers_script_adapts(theirs, ours):
    adapt(theirs.unet, target_modules=TARGET_MODULES)
    adapted = {name for name, module in theirs.unet.named_modules() if hasattr(module, "base_layer")}
    names = diffusers_names(ours.unet)
    adapt(ours.unet, target_modules=find_targets(ours.unet, TARGET_MODULES))
    found = {name for name, module in ours.unet.named_modules() if hasattr(module, "base_layer")}
    assert found == {names[name] for name in adapted}
    text = find_targets(ours.unet, ["add_k_proj"])
    expected = ["add_k_proj"] if not ours.unet.takes_low_res else [n for n in found if n.endswith("to_k")]
    assert sorted(text) == sorted(expected)
    assert find_targets(ours.unet, ["mid_block.attentions.0.to_q"]) == ["mid_blocks.0.attention.to_q"]
    with pytest.raises(ValueError, match="has .'to_x'., but no layer"):
        find_targets(ours.unet, ["to_x"])


def test_layers_have_one_name_each(theirs, ours, base_unet):
    names = layer_names(ours.unet.config)
    assert len(set(names.values())) == len(names)
    weights = weight_names(dict(theirs.unet.config))
    assert {name.rpartition(".")[0] for name in weights} == names.keys()
    assert diffusers_names(base_unet) == {}
