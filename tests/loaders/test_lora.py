"""LoRA adapters of a cascade, made by peft itself."""

import json

import numpy as np
import pytest
import torch
from foreign_network import ConditionedUNet2D
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_imagen import EDMHeunScheduler, ImagenCascadePipeline, ImagenPipeline


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
STAGES = ("base_unet", "sr256_unet")
FILE = "pytorch_lora_weights.safetensors"


def draw(pipe) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe("a red apple", num_inference_steps=2, generator=generator, output_type="np").images


def train(pipe, adapter="style", stages=STAGES, alpha=8, seed=0) -> None:
    """Adapters as training leaves them: both factors are away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for stage in stages:
        unet = getattr(pipe, stage)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=TARGETS), adapter)
        for name, parameter in unet.named_parameters():
            if f".{adapter}." in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def weights(pipe) -> dict[str, torch.Tensor]:
    return {f"{stage}.{k}": v.clone() for stage in STAGES for k, v in getattr(pipe, stage).state_dict().items()}


@pytest.fixture
def saved(cascade, tmp_path) -> tuple[np.ndarray, str]:
    """The images of a cascade with adapters, and the folder that they were saved in; the cascade has none any more."""
    train(cascade)
    images = draw(cascade)
    cascade.save_lora_adapter(tmp_path / "lora")
    cascade.unload_lora_weights()
    return images, str(tmp_path / "lora")


def test_a_pipeline_with_adapters_is_not_saved_in_a_form_that_cannot_be_loaded(cascade, tmp_path):
    train(cascade, stages=["sr256_unet"])
    images = draw(cascade)
    for fused in (False, True):
        if fused:
            cascade.fuse_lora()
        with pytest.raises(ValueError, match=r"`sr256_unet` has the LoRA adapters \['style'\], which cannot be saved"):
            cascade.save_pretrained(tmp_path / "whole")
        with pytest.raises(ValueError, match="which cannot be saved with it"):
            cascade.push_to_hub("me/whole")
        with pytest.raises(ValueError, match=r"`unet` has the LoRA adapters \['style'\], which cannot be saved"):
            cascade.sr256_unet.save_pretrained(tmp_path / "whole")
        assert not (tmp_path / "whole").exists()
    cascade.base_unet.save_pretrained(tmp_path / "base")
    cascade.unload_lora_weights()
    cascade.save_pretrained(tmp_path / "whole")
    again = ImagenCascadePipeline.from_pretrained(tmp_path / "whole")
    np.testing.assert_allclose(draw(again), images, atol=1e-3)


def test_adapters_survive_saving_with_their_alpha(cascade, saved):
    images, folder = saved
    plain = draw(cascade)
    assert np.abs(images - plain).max() > 0.01
    cascade.load_lora_weights(folder, adapter_name="style")
    assert cascade.get_list_adapters() == {"base_unet": ["style"], "sr256_unet": ["style"]}
    assert cascade.base_unet.peft_config["style"].lora_alpha == 8
    np.testing.assert_array_equal(draw(cascade), images)


def test_the_file_is_in_diffusers_form(saved):
    _, folder = saved
    keys = load_file(f"{folder}/{FILE}")
    assert {key.split(".")[0] for key in keys} == set(STAGES)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    with safe_open(f"{folder}/{FILE}", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["base_unet.lora_alpha"] == metadata["sr256_unet.lora_alpha"] == 8


def test_without_configuration_alpha_is_the_rank_and_a_warning_says_so(cascade, saved, caplog):
    images, folder = saved
    with caplog.at_level("WARNING", logger="diffusers_imagen"):
        cascade.load_lora_weights(load_file(f"{folder}/{FILE}"))
    assert "lora_alpha is taken to be the rank" in caplog.text
    assert cascade.base_unet.peft_config["default_0"].lora_alpha == 2
    # alpha is four times the rank
    cascade.set_adapters("default_0", 4.0)
    np.testing.assert_allclose(draw(cascade), images, atol=1e-5)


def test_unloading_restores_the_cascade_exactly(cascade, saved):
    before, plain = weights(cascade), draw(cascade)
    cascade.load_lora_weights(saved[1])
    cascade.unload_lora_weights()
    after = weights(cascade)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    np.testing.assert_array_equal(draw(cascade), plain)
    assert cascade.get_list_adapters() == {}


def test_fused_adapters_draw_the_same_and_come_out_again(cascade, saved):
    images, folder = saved
    plain = draw(cascade)
    cascade.load_lora_weights(folder, adapter_name="style")
    cascade.fuse_lora()
    assert cascade.num_fused_loras == 1
    np.testing.assert_allclose(draw(cascade), images, atol=1e-3)
    cascade.disable_lora()
    cascade.unfuse_lora()
    assert cascade.num_fused_loras == 0
    np.testing.assert_allclose(draw(cascade), plain, atol=1e-3)


def test_fusing_with_a_scale_is_taken_back_whatever_was_called_between(cascade):
    """In diffusers, adapters remain scaled, a second call corrupts the weights, and the scale is of the active ones."""
    train(cascade, "style")
    train(cascade, "line", seed=1)
    cascade.set_adapters(["style", "line"], [0.5, 1.5])
    before, images, layer = weights(cascade), draw(cascade), cascade.base_unet.mid_blocks[0].attention.to_q
    plain = layer.base_layer.weight.clone()
    scaling, style, line = dict(layer.scaling), layer.get_delta_weight("style"), layer.get_delta_weight("line")
    cascade.fuse_lora(adapter_names=["style"], lora_scale=0.5)
    torch.testing.assert_close(layer.base_layer.weight, plain + 0.5 * style)
    for _ in range(2):
        cascade.fuse_lora(lora_scale=0.25)
        torch.testing.assert_close(layer.base_layer.weight, plain + 0.5 * style + 0.25 * line)
    with pytest.raises(
        ValueError, match=r"`adapter_names` cannot be applied while adapters are fused, here {'base_unet': "
    ):
        cascade.set_adapters("style", 0.0)
    with pytest.raises(ValueError, match="`cross_attention_kwargs` cannot be applied while adapters are fused"):
        cascade("a", num_inference_steps=1, cross_attention_kwargs={"scale": 0.5})
    update = {"base_unet.conv_in.lora_A.weight": torch.zeros(1, 3, 3, 3)}
    update["base_unet.conv_in.lora_B.weight"] = torch.zeros(cascade.base_unet.conv_in.out_channels, 1, 1, 1)
    with pytest.raises(ValueError, match="`adapter_name` cannot be applied while adapters are fused"):
        cascade.load_lora_weights(update, "third")
    cascade.unfuse_lora()
    assert layer.scaling == scaling
    for key, value in weights(cascade).items():
        torch.testing.assert_close(value, before[key], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(draw(cascade), images, atol=1e-3)


def test_fusing_one_stage_is_adding_its_update_to_its_weights(cascade, saved):
    _, folder = saved
    lora, before = load_file(f"{folder}/{FILE}"), weights(cascade)
    layer = next(key for key in lora if key.startswith("base_unet.") and ".to_q." in key).split(".lora_")[0]
    cascade.load_lora_weights(folder)
    cascade.fuse_lora(components=["base_unet"])
    cascade.unload_lora_weights()
    after = weights(cascade)
    update = 8 / 2 * lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
    torch.testing.assert_close(after[f"{layer}.weight"], before[f"{layer}.weight"] + update)
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("sr256_unet."))


def test_weights_by_stage(cascade, saved, tmp_path):
    images, folder = saved
    plain = draw(cascade)
    cascade.load_lora_weights(folder, adapter_name="style")
    cascade.set_adapters("style", {"base_unet": 0.0, "sr256_unet": 0.0})
    np.testing.assert_array_equal(draw(cascade), plain)
    cascade.set_adapters("style", {"sr256_unet": 0.0})
    base_only = draw(cascade)
    cascade.sr256_unet.unload_lora()
    cascade.set_adapters("style")
    np.testing.assert_array_equal(draw(cascade), base_only)
    assert np.abs(base_only - images).max() > 1e-3 and np.abs(base_only - plain).max() > 1e-3


def test_two_adapters_are_one_with_both_updates(cascade, tmp_path):
    for seed, name in enumerate(("one", "two")):
        train(cascade, name, seed=seed)
        cascade.save_lora_adapter(tmp_path, name, weight_name=f"{name}.safetensors")
    cascade.unload_lora_weights()
    for name in ("one", "two"):
        cascade.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)

    by_stage = {"base_unet": 0.5, "sr256_unet": 0.25}
    cascade.set_adapters(["one", "two"], by_stage)
    together = draw(cascade)
    scales = [layer.scaling for layer in cascade.sr256_unet.modules() if hasattr(layer, "scaling")]
    assert scales and all(scale == {"one": 1.0, "two": 1.0} for scale in scales)  # 0.25 * alpha 8 / rank 2
    assert by_stage == {"base_unet": 0.5, "sr256_unet": 0.25}
    cascade.set_adapters(["one", "two"], [by_stage, {"base_unet": 0.0, "sr256_unet": 0.0}])
    one = draw(cascade)
    cascade.delete_adapters("two")
    cascade.set_adapters("one", by_stage)
    np.testing.assert_array_equal(draw(cascade), one)
    assert np.abs(together - one).max() > 1e-3


def test_adapters_of_different_stages_stay_apart(cascade, tmp_path):
    train(cascade, "base", ["base_unet"])
    train(cascade, "sharp", ["sr256_unet"], seed=1)
    both = draw(cascade)
    for name in ("base", "sharp"):
        cascade.save_lora_adapter(tmp_path / name, name)
    cascade.unload_lora_weights()
    cascade.load_lora_weights(tmp_path / "base", adapter_name="base")
    cascade.load_lora_weights(tmp_path / "sharp", adapter_name="sharp")
    assert cascade.get_list_adapters() == {"base_unet": ["base"], "sr256_unet": ["sharp"]}
    cascade.set_adapters(["base", "sharp"])
    np.testing.assert_array_equal(draw(cascade), both)


def test_the_adapter_of_a_single_stage_moves_into_a_cascade(cascade, tmp_path):
    train(cascade, stages=["base_unet"])
    images = draw(cascade)
    unet = cascade.base_unet
    ImagenCascadePipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet, adapter_name="style"),
        unet_lora_adapter_metadata=unet.peft_config["style"].to_dict(),
    )
    cascade.unload_lora_weights()
    with pytest.raises(ValueError, match="The LoRA weights are for .'unet'., but the components"):
        cascade.load_lora_weights(tmp_path)
    cascade.load_lora_weights(tmp_path, component="base_unet")
    np.testing.assert_array_equal(draw(cascade), images)


def test_hotswap_replaces_the_weights(cascade, tmp_path):
    train(cascade, "one")
    cascade.save_lora_adapter(tmp_path / "one")
    cascade.unload_lora_weights()
    train(cascade, "two", seed=1)
    images, trained = draw(cascade), {name.replace(".two.", ".a."): w for name, w in weights(cascade).items()}
    cascade.save_lora_adapter(tmp_path / "two")
    cascade.unload_lora_weights()
    cascade.load_lora_weights(tmp_path / "one", adapter_name="a")
    cascade.load_lora_weights(tmp_path / "two", adapter_name="a", hotswap=True)
    torch.testing.assert_close(weights(cascade), trained, atol=0, rtol=0)
    # torch 2.6 rounds the same products differently for tensors that were swapped
    np.testing.assert_allclose(draw(cascade), images, atol=1e-3)


def test_a_stage_that_is_absent_is_left_out_with_a_warning(cascade, saved, caplog):
    cascade.register_modules(sr256_unet=None, sr256_scheduler=None)
    with caplog.at_level("WARNING", logger="diffusers_imagen"):
        cascade.load_lora_weights(saved[1])
    assert "This pipeline has no sr256_unet" in caplog.text
    assert cascade.get_list_adapters() == {"base_unet": ["default_0"]}


def bad_loads(folder: str) -> dict:
    lora = load_file(f"{folder}/{FILE}")
    key = next(iter(lora))
    wide = {**lora, key: torch.cat([lora[key]] * 2, dim=1)}
    return {
        "taken": ({"source": folder, "adapter_name": "style"}, "`adapter_name` is 'style', which is taken"),
        "nothing to swap": ({"source": folder, "adapter_name": "x", "hotswap": True}, "`hotswap` cannot replace"),
        "foreign": ({"source": {"transformer.to_q.lora_A.weight": torch.ones(2, 8)}}, "are for ['transformer']"),
        "other network": ({"source": {"base_unet.x.lora_A.weight": torch.ones(2, 8)}}, "change base_unet.x, which"),
        "other width": ({"source": wide}, "but the layer has"),
        "no such component": ({"source": folder, "component": "unet"}, "`component` is 'unet', but should be one of"),
        "several stages": ({"source": folder, "component": "base_unet"}, "are for several"),
        "unknown option": ({"source": folder, "weights_name": "x"}, "`weights_name` is not an option"),
    }


def test_bad_weights_are_refused_and_nothing_changes(cascade, saved):
    _, folder = saved
    cascade.load_lora_weights(folder, adapter_name="style")
    before = draw(cascade)
    for arguments, message in bad_loads(folder).values():
        with pytest.raises(ValueError) as error:
            cascade.load_lora_weights(arguments.pop("source"), **arguments)
        assert message in str(error.value)
    assert cascade.get_list_adapters() == {"base_unet": ["style"], "sr256_unet": ["style"]}
    np.testing.assert_array_equal(draw(cascade), before)


def test_bad_arguments_of_the_other_methods(cascade, tmp_path):
    train(cascade)
    for call, message in (
        (lambda: cascade.set_adapters("style", {"unet": 1.0}), "`adapter_weights` names ['unet']"),
        (lambda: cascade.fuse_lora(["sr1024_unet"]), "`components` is ['sr1024_unet'], but should be among"),
        (lambda: cascade.unfuse_lora([]), "`components` is [], but should be among"),
        (lambda: cascade.fuse_lora(3), "`components` is 3, but should be a list"),
        (lambda: cascade.fuse_lora(lora_scale="a"), "`lora_scale` is 'a', but should be a number"),
        (lambda: cascade.load_lora_weights("a", component=["unet"]), "`component` is ['unet'], but should be one of"),
        (lambda: cascade.load_lora_weights("a", weight_name=3), "`weight_name` is '3', but should be a string"),
        (lambda: cascade.load_lora_weights("a", metadata=[1]), "`metadata` is of class list"),
        (lambda: cascade.save_lora_adapter(tmp_path, "other"), "`adapter_name` is 'other', but the adapters"),
        (lambda: cascade.save_lora_weights(tmp_path), "pass the weights as `unet_lora_layers`"),
        (
            lambda: cascade.save_lora_weights(tmp_path, transformer_lora_layers={}),
            "`transformer_lora_layers` is unknown",
        ),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def force_eager():
    """torch.compile wraps, and compiles nothing."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def test_every_method_reaches_the_networks_in_torch_compiles_wrapper(cascade, saved, tmp_path, force_eager):
    _, folder = saved
    plain = draw(cascade)
    inner = [cascade.base_unet, cascade.sr256_unet]
    cascade.load_lora_weights(folder, adapter_name="before")
    for stage, unet in zip(STAGES, inner):
        cascade.register_modules(**{stage: torch.compile(unet, backend="eager")})
    cascade.load_lora_weights(folder, adapter_name="style")
    assert cascade.get_list_adapters() == dict.fromkeys(STAGES, ["before", "style"])
    cascade.delete_adapters("before")
    cascade.set_adapters("style", {"base_unet": 0.5})
    assert cascade.get_active_adapters() == ["style"]
    assert inner[0].mid_blocks[0].attention.to_q.scaling == {"style": 2.0}
    assert inner[1].down_blocks[1].attention.to_q.scaling == {"style": 4.0}
    cascade.set_lora_device(["style"], "cpu")
    cascade.disable_lora()
    assert all(unet.down_blocks[1].attention.to_q.disable_adapters for unet in inner)
    cascade.enable_lora()
    cascade.fuse_lora()
    assert cascade.num_fused_loras == 1 and inner[0].mid_blocks[0].attention.to_q.merged
    cascade.unfuse_lora()
    assert cascade.num_fused_loras == 0 and not inner[0].mid_blocks[0].attention.to_q.merged
    cascade.save_lora_adapter(tmp_path / "again")
    again, first = (load_file(f"{path}/{FILE}") for path in (tmp_path / "again", folder))
    assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)
    cascade.unload_lora_weights()
    assert cascade.get_list_adapters() == {} and "lora" not in " ".join(inner[0].state_dict())
    for stage, unet in zip(STAGES, inner):
        cascade.register_modules(**{stage: unet})
    np.testing.assert_allclose(draw(cascade), plain, atol=1e-3)


def test_a_calls_scale_is_the_adapters_weight_for_that_call(cascade):
    train(cascade)
    cascade.set_adapters("style", 0.8)
    images = draw(cascade)
    cascade.set_adapters("style", 0.2)
    expected = draw(cascade)
    cascade.set_adapters("style", 0.8)
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 2, "output_type": "np"}
    scaled = cascade("a red apple", generator=generator, cross_attention_kwargs={"scale": 0.25}, **arguments).images
    np.testing.assert_allclose(scaled, expected, atol=1e-5)
    np.testing.assert_array_equal(draw(cascade), images)
    for options in ({"scale": "a"}, {"scale": float("nan")}, {"gligen": 1}, [0.5]):
        with pytest.raises(ValueError, match="`cross_attention_kwargs` is"):
            cascade("a", cross_attention_kwargs=options, **arguments)


def test_weights_by_block(cascade):
    train(cascade)
    for layer in ("conv_in", "up_blocks.1.resnets.0.conv1"):
        cascade.base_unet.add_adapter(LoraConfig(r=1, lora_alpha=1, target_modules=[layer]), layer.replace(".", "-"))
    names = ["style", "conv_in", "up_blocks-1-resnets-0-conv1"]
    cascade.set_adapters(names, {"base_unet": {"down": 0.5, "up": {"block_1": 0.25}}})
    unet = cascade.base_unet
    scaling = lambda layer, name="style": unet.get_submodule(layer).scaling[name]  # noqa: E731
    assert scaling("down_blocks.1.attention.to_q") == 0.5 * 4
    assert scaling("mid_blocks.0.attention.to_q") == scaling("up_blocks.0.attention.to_q") == 4
    assert scaling("up_blocks.1.attention.to_q") == 0.25 * 4
    assert scaling("conv_in", "conv_in") == 1
    assert scaling("up_blocks.1.resnets.0.conv1", "up_blocks-1-resnets-0-conv1") == 0.25
    for weights, message in (
        ({"base_unet": {"sideways": 1}}, "`adapter_weights` has base_unet.sideways, but"),
        ({"base_unet": {1: 1}}, "`adapter_weights` has [1] in base_unet"),
        ({"base_unet": {"down": "a"}}, "`adapter_weights` has 'a' for base_unet.down_blocks"),
        ({"base_unet": float("nan")}, "`adapter_weights` has nan for base_unet"),
        (float("inf"), "`adapter_weights` has inf"),
    ):
        with pytest.raises(ValueError) as error:
            cascade.set_adapters("style", weights)
        assert message in str(error.value)


def test_names_of_adapters_are_checked(cascade, tmp_path):
    train(cascade)
    for call in (cascade.set_adapters, cascade.delete_adapters, lambda names: cascade.set_lora_device(names, "cpu")):
        for names in ("other", ["style", "other"], [], [7], None):
            with pytest.raises(ValueError, match="`adapter_names` "):
                call(names)
    for name in ("a.b", "", 7):
        with pytest.raises(ValueError, match="`adapter_name` is .*, but should be a name without dots"):
            cascade.load_lora_weights("me/style", adapter_name=name)
    assert cascade.get_list_adapters() == {"base_unet": ["style"], "sr256_unet": ["style"]}


def test_fusing_what_diffusers_names_fuses_what_is_there(cascade):
    train(cascade)
    cascade.fuse_lora(components=cascade._lora_loadable_modules)
    assert cascade.fused_loras == {"style"}
    cascade.unfuse_lora(components=cascade._lora_loadable_modules)
    assert cascade.fused_loras == set()


def test_a_network_that_can_have_no_adapters_is_refused_by_name():
    pipe = ImagenPipeline(ConditionedUNet2D(), EDMHeunScheduler(), None, None)
    assert pipe.get_list_adapters() == {} and pipe.get_active_adapters() == []
    for call in (
        lambda: pipe.load_lora_weights({"unet.to_q.lora_A.weight": torch.zeros(2, 2)}),
        lambda: pipe.set_adapters("style"),
        lambda: pipe.delete_adapters("style"),
        pipe.fuse_lora,
        pipe.unfuse_lora,
        pipe.unload_lora_weights,
        pipe.disable_lora,
        pipe.enable_lora,
    ):
        with pytest.raises(ValueError, match="`unet` is of class ConditionedUNet2D, but should be .*PeftAdapterMixin"):
            call()


def test_beside_a_network_that_can_have_no_adapters_the_others_keep_theirs(cascade, saved):
    _, folder = saved
    width = cascade.text_encoder.config.hidden_size
    resolution = cascade.sr256_unet.resolution
    of_base = {key: value for key, value in load_file(f"{folder}/{FILE}").items() if key.startswith("base_unet")}
    cascade.register_modules(sr256_unet=ConditionedUNet2D(resolution, text_width=width, takes_low_res=True).eval())
    plain = draw(cascade)
    cascade.load_lora_weights(of_base, "style")
    cascade.set_adapters("style", {"base_unet": 1.0})
    adapted = draw(cascade)
    assert cascade.get_list_adapters() == {"base_unet": ["style"]} and cascade.get_active_adapters() == ["style"]
    assert np.abs(adapted - plain).max() > 0.03
    cascade.disable_lora()
    np.testing.assert_array_equal(draw(cascade), plain)
    cascade.enable_lora()
    cascade.fuse_lora()
    np.testing.assert_allclose(draw(cascade), adapted, atol=3e-3)
    cascade.unfuse_lora()
    for call in (
        lambda: cascade.load_lora_weights(folder),
        lambda: cascade.load_lora_weights(of_base, component="sr256_unet"),
        lambda: cascade.set_adapters("style", {"sr256_unet": 0.5}),
        lambda: cascade.fuse_lora(["sr256_unet"]),
    ):
        with pytest.raises(ValueError, match="`sr256_unet` is of class ConditionedUNet2D"):
            call()
    cascade.unload_lora_weights()
    np.testing.assert_allclose(draw(cascade), plain, atol=3e-3)
