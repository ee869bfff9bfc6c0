"""The text encoder of a training run."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import make_unet
from transformers import T5Config, T5Model

from diffusers_imagen.text.encoder import TextEncoder
from diffusers_imagen.training import Trainer, TrainingConfig
from diffusers_imagen.training.data import make_train_batches


CAPTIONS = ["a red apple", "blue"]


def test_states_are_those_of_the_pipelines(folder, tokenizer, text_encoder):
    with torch.no_grad():
        expected, mask = TextEncoder(tokenizer, text_encoder.eval()).encode(CAPTIONS)
    text, text_mask = TextEncoder.from_pretrained(folder).encode(CAPTIONS)
    assert torch.equal(text, expected) and torch.equal(text_mask, mask) and not text.requires_grad
    for states, row, valid in zip(TextEncoder.from_pretrained(folder).unpadded(CAPTIONS), expected, mask):
        torch.testing.assert_close(states, row[valid], atol=1e-5, rtol=1e-5)
    short = TextEncoder.from_pretrained(folder, max_length=4)
    assert short.encode(CAPTIONS)[0].shape[1] == 4 and short.count_tokens(CAPTIONS) == [5, 3]


def test_of_t5_only_the_encoder_is_loaded(tokenizer, tmp_path):
    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_decoder_layers=1, num_heads=2)
    whole = T5Model(config).eval()
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = TextEncoder.from_pretrained(str(tmp_path))  # not in subfolders, as T5 is on the Hub
    assert type(encoder.model).__name__ == "T5EncoderModel"
    assert not any("decoder" in name for name, _ in encoder.model.named_parameters())
    tokens = tokenizer(CAPTIONS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        expected = whole.encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    text, mask = encoder.encode(CAPTIONS)
    torch.testing.assert_close(text[mask], expected[mask], atol=1e-6, rtol=1e-5)
    assert encoder.identity()["width"] == 8


def test_the_encoder_leaves_memory_and_comes_back(folder, imagefolder):
    encoder = TextEncoder.from_pretrained(folder)
    config = TrainingConfig(train_data_dir=imagefolder, preset="emoji_base_64", resolution=8)
    batches = make_train_batches(config, encoder)
    assert not batches.needs_encoder  # all captions are encoded by now
    model = weakref.ref(encoder.model)
    encoder.release()
    gc.collect()
    assert model() is None
    assert next(batches).text.shape[0] == 16 and encoder.encode(CAPTIONS)[0].shape[0] == 2


def test_captions_too_many_to_keep_are_encoded_when_they_are_drawn(folder, imagefolder, monkeypatch):
    encoder = TextEncoder.from_pretrained(folder)
    config = TrainingConfig(train_data_dir=imagefolder, preset="emoji_base_64", resolution=8)
    kept = next(make_train_batches(config, encoder))
    monkeypatch.setattr("diffusers_imagen.text.source.MEMORY_LIMIT", 100)
    batches = make_train_batches(config, encoder)
    assert batches.needs_encoder
    online = next(batches)
    torch.testing.assert_close(online.text, kept.text, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("memory", [100, 10**9])
def test_a_run_keeps_the_encoder_only_where_it_encodes_each_batch(folder, make_config, monkeypatch, memory):
    monkeypatch.setattr("diffusers_imagen.text.source.MEMORY_LIMIT", memory)
    encoder = TextEncoder.from_pretrained(folder)
    Trainer(make_config(), make_unet(text_width=16), encoder).prepare()
    assert (encoder._model is None) == (memory > 100)


def test_what_is_no_encoder_is_named(folder, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=f"`text_encoder` is '{tmp_path}', whose tokenizer cannot be loaded"):
        TextEncoder.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="`tokenizer_max_length` is 9, but the tokenizer of .* has the limit 8"):
        TextEncoder.from_pretrained(folder, max_length=9)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path / "endless" / "tokenizer")
    with pytest.raises(ValueError, match="has no maximum length: set `tokenizer_max_length`"):
        TextEncoder.from_pretrained(str(tmp_path / "endless"))
    endless = TextEncoder.from_pretrained(str(tmp_path / "endless"), max_length=8)
    with pytest.raises(ValueError, match="whose encoder cannot be loaded"):
        endless.encode(CAPTIONS)


def change_weights(folder: str, change) -> None:
    path = f"{folder}/text_encoder/model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


WORDS = "embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(WORDS), f"lacks weights: {WORDS}"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]], "lacks weights: .* and others"),
        (lambda tensors: tensors[WORDS].fill_(float("nan")), f"weights that are not finite, such as {WORDS}"),
        (lambda tensors: tensors.update({WORDS: torch.zeros(3, 3)}), "whose encoder cannot be loaded"),
    ],
)
def test_an_encoder_without_its_weights_is_refused(folder, change, message):
    change_weights(folder, change)
    encoder = TextEncoder.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"`text_encoder` is '{folder}', .*{message}"):
        encoder.encode(CAPTIONS)


def test_weights_that_no_state_depends_on_may_be_missing(folder, tokenizer, text_encoder):
    with torch.no_grad():
        expected, _ = TextEncoder(tokenizer, text_encoder.eval()).encode(CAPTIONS)
    change_weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("pooler.")])
    assert torch.equal(TextEncoder.from_pretrained(folder).encode(CAPTIONS)[0], expected)


def test_a_tokenizer_with_more_tokens_than_the_encoder_knows_is_refused(folder, tokenizer):
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(f"{folder}/tokenizer")
    with pytest.raises(ValueError, match="whose tokenizer has 13 tokens, but its encoder 12"):
        TextEncoder.from_pretrained(folder).encode(CAPTIONS)


FILES = ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "text_encoder/config.json")
CONTENTS = (
    "", "[]", "{}", "{", "7", "null", '"a"', '{"model_type": 5}', '{"model_type": "bert", "hidden_size": "a"}', "[" * 5000,
    '{"model_max_length": "many", "tokenizer_class": "BertTokenizer"}', '{"model_max_length": -1}', '{"version": "9", "model": {}}',
    '{"auto_map": {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", null], "AutoConfig": "evil.Evil"}, "model_type": "evil"}',
)  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_malformed_is_one_line_and_runs_nothing(folder, file):
    path = Path(folder) / file
    (path.parent / "evil.py").write_text("raise SystemExit('executed')")
    for content in CONTENTS:
        path.write_text(content)
        try:
            TextEncoder.from_pretrained(folder, max_length=8).encode(CAPTIONS)
        except ValueError as error:
            assert folder in str(error) and "\n" not in str(error)


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file, but should be a folder or a Hub id"):
        TextEncoder.from_pretrained(str(tmp_path / "file"))
