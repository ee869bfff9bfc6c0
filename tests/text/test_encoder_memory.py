"""Large text encoders: loaded, used and freed before the networks run; quantized; offloaded."""

import gc
import weakref

import pytest
import torch
from accelerate import cpu_offload
from deepfloyd_networks import STAGE_1
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.quantizers import PipelineQuantizationConfig
from networks import randomize
from tiny_t5 import CHARACTERS, save_text_parts, tiny_t5, tiny_tokenizer
from transformers import T5Config, T5EncoderModel

from diffusers_imagen import EDMHeunScheduler, ImagenPipeline
from diffusers_imagen.conversion.deepfloyd import unet_from_deepfloyd
from diffusers_imagen.text import TextEmbeddings, TextEncoder, reference
from diffusers_imagen.text.identity import identity_mismatch
from diffusers_imagen.utils.modules import find_not_finite, is_quantized, memory_of


PROMPTS = ["a red apple", "blue"]


def run(pipe, *args, **kwargs) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(*args, generator=generator, num_inference_steps=1, guidance_scale=3.0, output_type="pt", **kwargs)[0]


@pytest.fixture
def deepfloyd(monkeypatch) -> ImagenPipeline:
    monkeypatch.setattr("diffusers_imagen.text.cleanup.is_bs4_available", lambda: False)
    torch.manual_seed(0)
    unet = unet_from_deepfloyd(randomize(UNet2DConditionModel(**STAGE_1)))
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True, clip_sample=False
    )
    return ImagenPipeline(unet, scheduler, tiny_tokenizer(), tiny_t5(), clean_caption=True)


@pytest.fixture(params=["deepfloyd", "ours"])
def pipe(request, tokenizer, text_encoder, base_unet) -> ImagenPipeline:
    if request.param == "deepfloyd":
        return request.getfixturevalue("deepfloyd")
    return ImagenPipeline(base_unet, EDMHeunScheduler(clip_sample=True), tokenizer, text_encoder)


@pytest.mark.parametrize("negative", [None, "face"])
def test_pictures_are_those_of_the_pipeline_with_its_own_encoder(pipe, negative, tmp_path):
    expected = run(pipe, PROMPTS, negative_prompt=negative)
    pipe.save_pretrained(tmp_path)
    flags = {"keeps_padding": pipe.keeps_padding, "cleans_captions": pipe.config.clean_caption}

    text = TextEncoder.from_pretrained(str(tmp_path), **flags)
    prompt = text.encode_prompts(PROMPTS)
    nothing = text.no_text(prompt) if negative is None else text.encode_prompts([negative])
    model = weakref.ref(text.model)
    text.release()
    gc.collect()
    assert model() is None
    alone = type(pipe).from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert alone.text_encoder is None
    assert torch.equal(run(alone, **prompt.for_pipeline(nothing)), expected)


def test_negatives_are_one_for_all_or_one_for_each():
    prompt = TextEmbeddings(torch.rand(3, 2, 4), torch.ones(3, 2, dtype=torch.bool))
    negative = TextEmbeddings(torch.rand(1, 2, 4).half(), torch.ones(1, 2, dtype=torch.bool))
    arguments = prompt.for_pipeline(negative)
    assert arguments["negative_prompt_embeds"].shape == (3, 2, 4)
    assert arguments["negative_prompt_embeds"].dtype == torch.float32
    assert arguments["negative_prompt_attention_mask"].shape == (3, 2)
    assert prompt.for_pipeline().keys() == {"prompt_embeds", "prompt_attention_mask"}
    with pytest.raises(ValueError, match="`negative` has 2 texts, but should have 1 or as many as .* prompts, 3"):
        prompt.for_pipeline(negative.repeated(2))


def test_files_of_a_variant_are_loaded(tmp_path):
    save_text_parts(tmp_path)
    tiny_t5().half().save_pretrained(tmp_path / "text_encoder", variant="fp16")
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    half = TextEncoder.from_pretrained(str(tmp_path), variant="fp16", dtype=torch.float16)
    assert half.model.dtype == torch.float16
    assert half.model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert half.encode(PROMPTS).for_pipeline()["prompt_embeds"].dtype == torch.float32
    with pytest.raises(ValueError, match="whose encoder cannot be loaded"):
        TextEncoder.from_pretrained(str(tmp_path)).encode(PROMPTS)


# ---- quantized


def quantization_configs() -> dict:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    def torchao():
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())

    def four_bits():
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def eight_bits():
        return BitsAndBytesConfig(load_in_8bit=True)

    return {"bitsandbytes 8": eight_bits, "bitsandbytes 4": four_bits, "torchao 8": torchao}


# relative error of the embeddings of random weights: 1.5 %, 12 %, 1.2 %
@pytest.mark.parametrize("kind, bound", [("bitsandbytes 8", 0.03), ("bitsandbytes 4", 0.25), ("torchao 8", 0.03)])
def test_quantized_encoders_do_the_same_work(kind, bound, tmp_path):
    pytest.importorskip(kind.split()[0])
    torch.manual_seed(0)
    sizes = {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4}
    model = T5EncoderModel(T5Config(vocab_size=4 + len(CHARACTERS), **sizes, feed_forward_proj="gated-gelu"))
    model.save_pretrained(tmp_path / "text_encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    plain = TextEncoder.from_pretrained(str(tmp_path))
    config = quantization_configs()[kind]()
    quantized = TextEncoder.from_pretrained(str(tmp_path), quantization_config=config)
    expected, found = plain.encode(PROMPTS).embeds, quantized.encode(PROMPTS).embeds
    assert 1e-4 < (found - expected).norm() / expected.norm() < bound
    size = sum(map(memory_of, quantized.model.parameters()))
    assert size < 0.6 * sum(map(memory_of, plain.model.parameters()))
    assert find_not_finite(quantized.model) is None
    assert identity_mismatch(plain.identity(), quantized.identity()) is None
    model = weakref.ref(quantized.model)
    quantized.release()
    gc.collect()
    assert model() is None and torch.equal(quantized.encode(PROMPTS).embeds, found)


@pytest.mark.parametrize("kind", ["bitsandbytes 8", "torchao 8"])
def test_a_pipeline_quantizes_its_text_encoder_as_it_is_loaded(kind, base_unet, tmp_path):
    pytest.importorskip(kind.split()[0])
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    encoder = randomize(T5EncoderModel(T5Config(vocab_size=4 + len(CHARACTERS), **sizes)))
    pipe = ImagenPipeline(base_unet, EDMHeunScheduler(clip_sample=True), tiny_tokenizer(), encoder)
    pipe.save_pretrained(tmp_path)
    expected = run(pipe, PROMPTS)
    config = PipelineQuantizationConfig(quant_mapping={"text_encoder": quantization_configs()[kind]()})
    quantized = ImagenPipeline.from_pretrained(tmp_path, quantization_config=config)
    assert is_quantized(quantized.text_encoder) and not is_quantized(quantized.unet)
    made = run(quantized, PROMPTS)
    assert made.isfinite().all() and 0 < (made - expected).abs().mean() < 0.05


class Quantized(torch.Tensor):
    """As torchao's weights: a float by its dtype, of which hardly any operation is known."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.float, torch.Tensor.isfinite):
            raise NotImplementedError
        if function is torch.Tensor.detach:  # which a parameter asks to keep the kind
            return super().__torch_function__(function, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    def __tensor_flatten__(self):
        return ["data_in_bytes"], None


def test_an_encoder_that_cannot_be_moved_or_examined(tmp_path, monkeypatch):
    """What quantization asks of the code around it, without a library for it."""
    load, given = reference.AutoModelForTextEncoding.from_pretrained, {}

    def load_quantized(*args, quantization_config=None, device_map=None, **kwargs):
        given.update(quantization_config=quantization_config, device_map=device_map)
        model, info = load(*args, **kwargs)
        model.hf_quantizer = object()
        model.to = None  # bitsandbytes raises
        layer = model.encoder.block[0].layer[0].SelfAttention.q
        weight = torch.nn.Parameter(layer.weight.data.as_subclass(Quantized), requires_grad=False)
        weight.data_in_bytes = torch.zeros(weight.shape, dtype=torch.int8)
        layer.weight = weight
        return model, info

    folder = save_text_parts(tmp_path)
    plain = TextEncoder.from_pretrained(folder)
    monkeypatch.setattr(reference.AutoModelForTextEncoding, "from_pretrained", load_quantized)
    quantized = TextEncoder.from_pretrained(folder, quantization_config="a configuration")
    assert quantized.encode(PROMPTS).embeds.shape == (2, 77, 24)
    assert given == {"quantization_config": "a configuration", "device_map": {"": "cpu"}}
    assert "weights" not in quantized.identity() and "parameters" not in quantized.identity()
    assert identity_mismatch(plain.identity(), quantized.identity()) is None
    weight = quantized.model.encoder.block[0].layer[0].SelfAttention.q.weight
    assert memory_of(weight) == weight.numel() and memory_of(torch.zeros(3)) == 12
    with torch.no_grad():
        quantized.model.shared.weight.fill_(float("nan"))
    assert "shared" in find_not_finite(quantized.model)


# ---- offloaded


def offload_by_model(pipe) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def offload_by_layer(pipe) -> None:
    # enable_sequential_cpu_offload would name the device cpu:0, which accelerate takes for another than cpu
    for module in (pipe.text_encoder, pipe.unet):
        cpu_offload(module, torch.device("cpu"))
    assert pipe.text_encoder.device.type == "meta"


def offload_by_leaf(pipe) -> None:
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def offload_by_block(pipe) -> None:
    pipe.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


@pytest.mark.parametrize("offload", [offload_by_model, offload_by_layer, offload_by_leaf, offload_by_block])
def test_an_offloaded_t5_gives_the_same_pictures(deepfloyd, offload):
    expected = run(deepfloyd, PROMPTS)
    offload(deepfloyd)
    assert torch.equal(run(deepfloyd, PROMPTS), expected)


def test_embeddings_may_come_back_on_another_device(text_encoder, tokenizer, monkeypatch):
    """As under offloading, whose hooks bring an encoder and its inputs to a device after it was asked where it is."""
    encoder = TextEncoder(tokenizer, text_encoder, keeps_padding=True)
    text_encoder.register_forward_hook(
        lambda module, args, output: output.__class__(last_hidden_state=output.last_hidden_state.to("meta"))
    )
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda tensor: torch.ones(1))  # a meta tensor cannot say
    text = encoder.encode(PROMPTS)
    assert text.embeds.device.type == text.mask.device.type == "meta"
