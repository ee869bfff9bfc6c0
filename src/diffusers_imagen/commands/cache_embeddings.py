"""`diffusers-imagen cache-embeddings`: text states of a data set's captions on disk."""

import argparse
import time
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "cache-embeddings",
        help="encode the captions of a data set once",
        description="Writes the text states of all captions, each once, for --embedding_cache of train_imagen.py. "
        "A run that was ended goes on where it was when it is started again.",
    )
    parser.add_argument("output_dir", type=Path, help="folder of the cache")
    parser.add_argument("--verify", action="store_true", help="check a finished cache by its checksums, and end")
    parser.add_argument("--text_encoder", help="folder or Hub id of the text encoder")
    parser.add_argument("--tokenizer_max_length", type=int, help="tokens of a caption; default: the tokenizer's limit")
    parser.add_argument("--train_data_dir", help="folder with the data set")
    parser.add_argument("--dataset_name", help="data set on the Hub")
    parser.add_argument("--dataset_config_name", help="configuration of that data set")
    parser.add_argument("--cache_dir", help="where `datasets` keeps what it downloads")
    parser.add_argument("--caption_column", nargs="+", default=["text"], help="default: text")
    parser.add_argument("--image_column", default="image", help="default: %(default)s")
    parser.add_argument("--splits", nargs="+", help="default: all")
    parser.add_argument(
        "--nemo_tars", nargs="+", type=Path, help="take the states that NeMo pickled in these tar files"
    )
    parser.add_argument("--nemo_key", default="t5_text", help="encoder's name in those pickles; default: %(default)s")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=256, help="captions encoded at once; default: %(default)s")
    parser.add_argument("--shard_size_mb", type=float, default=128, help="default: %(default)s")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.set_defaults(run=cache_embeddings)


def cache_embeddings(args: argparse.Namespace) -> None:
    """Builds or verifies a cache, and reports its size."""
    # torch and transformers take seconds to import; --help should not
    from ..training.embedding_cache import EmbeddingCache

    for name in ("batch_size", "shard_size_mb"):
        if getattr(args, name) <= 0:
            raise ValueError(f"`{name}` is {getattr(args, name)}, but should be above 0.")
    start = time.perf_counter()
    added = 0 if args.verify else (import_nemo(args) if args.nemo_tars else encode_dataset(args))
    seconds = time.perf_counter() - start
    cache = EmbeddingCache(args.output_dir)
    if args.verify:
        problems = cache.verify()
        if problems:
            raise ValueError(f"`{args.output_dir}`: {'; '.join(problems)}: delete those shards and run this again.")
    size = sum(shard["bytes"] for shard in cache.manifest["shards"])
    tokens = sum(shard["tokens"] for shard in cache.manifest["shards"])
    print(
        f"{args.output_dir}: {len(cache)} captions, {tokens / max(1, len(cache)):.1f} tokens and "
        f"{size / max(1, len(cache)):.0f} bytes a caption"
        + (", verified" if args.verify else f"; {added} added, {added / seconds:.0f} captions/s")
    )


def encode_dataset(args: argparse.Namespace) -> int:
    """Encodes what the cache lacks of the data set's captions."""
    import torch

    from ..training.data.captions import distinct_captions, iterate_captions
    from ..training.data.config import DataConfig
    from ..training.data.sources import check_columns, column_names, load_splits
    from ..training.embedding_cache import CacheWriter, write_cache
    from ..training.text import TextEncoder

    if args.text_encoder is None:
        raise ValueError("`text_encoder` is not given, but captions are encoded with one.")
    config = DataConfig(
        train_data_dir=args.train_data_dir,
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        cache_dir=args.cache_dir,
        caption_column=args.caption_column,
        image_column=args.image_column,
    )
    splits, _ = load_splits(config)
    missing = set(args.splits or []) - set(splits)
    if missing:
        raise ValueError(f"`splits` has {sorted(missing)}, but the data set has {sorted(map(str, splits))}.")
    splits = [splits[name] for name in args.splits or splits]
    for data in splits:
        check_columns(data, column_names(data, config), config, with_text=True)
    captions = distinct_captions(
        caption for data in splits for caption in iterate_captions(data, config.caption_column)
    )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # T5 overflows in float16
    encoder = TextEncoder(args.text_encoder, args.tokenizer_max_length, device, dtype)
    writer = CacheWriter(args.output_dir, encoder.identity(), args.dtype, int(args.shard_size_mb * 2**20))
    return write_cache(writer, captions, encoder, args.batch_size)


def import_nemo(args: argparse.Namespace) -> int:
    """Adds the states of NeMo's tar files; returns how many they were."""
    from tqdm.auto import tqdm

    from ..training.embedding_cache import CacheWriter
    from ..training.nemo_embeddings import read_tar

    if args.tokenizer_max_length is None:
        raise ValueError("`tokenizer_max_length` is not given: it is NeMo's `encoding_lengths`, often 128.")
    for path in args.nemo_tars:
        if not path.is_file():
            raise ValueError(f"`nemo_tars` has '{path}', which is no file.")
    writer, added = None, 0
    for path in tqdm(args.nemo_tars, desc="Reading tar files"):
        for caption, states in read_tar(path, args.nemo_key):
            states = states[: args.tokenizer_max_length]
            if writer is None:
                encoder = {"max_length": args.tokenizer_max_length, "width": states.shape[1]}
                writer = CacheWriter(args.output_dir, encoder, args.dtype, int(args.shard_size_mb * 2**20))
            if caption not in writer:
                writer.add(caption, states)
                added += 1
    if writer is None:
        raise ValueError("`nemo_tars` has no pickled states.")
    writer.flush()
    return added
