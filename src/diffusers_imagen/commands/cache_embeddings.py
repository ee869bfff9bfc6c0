"""`diffusers-imagen cache-embeddings`: write the text embeddings of a data set's captions to disk."""

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.arguments import shown
from ..utils.files import check_folder, refusing
from .common import check_device
from .model_arguments import DEVICE
from .parser import Parser


if TYPE_CHECKING:
    from accelerate import PartialState

    from ..text import TextEncoder
    from ..text.distinct_captions import DistinctCaptions
    from ..training.data.data_config import DataConfig

MANY = 2**16  # tokens, captions or MB: larger values are mistakes, and would need more memory than any machine has


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = (
        "Write the text embeddings of all distinct captions to disk, for --embedding_cache of the training commands. "
        "An interrupted run continues when it is started again. With several GPUs: accelerate launch -m "
        "diffusers_imagen cache-embeddings ..."
    )
    command.add_argument("output_dir", type=Path, help="folder of the cache")
    command.add_argument("--verify", action="store_true", help="only verify the checksums of a finished cache")
    command.add_argument("--text-encoder", help="folder or Hub id of the text encoder")
    command.add_number(
        "--tokenizer-max-length", int, 1, MANY, help="maximum tokens per caption; default: the tokenizer's limit"
    )
    command.add_argument("--variant", help="variant of the text encoder's files, such as fp16")
    command.add_argument(
        "--keep-padding",
        action="store_true",
        help="keep embeddings at padded positions, for networks that attend to them, such as DeepFloyd IF",
    )
    command.add_argument(
        "--clean-captions", action="store_true", help="clean captions before they are encoded, as for DeepFloyd IF"
    )
    add_data_arguments(command)
    command.add_argument(
        "--nemo-tars", nargs="+", type=Path, help="import embeddings from tar files with NeMo's pickles"
    )
    command.add_argument(
        "--nemo-key", default="t5_text", help="name of the encoder in these pickles; default: %(default)s"
    )
    command.add_argument(
        "--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="dtype of the cache; default: %(default)s"
    )
    command.add_number("--batch-size", int, 1, MANY, default=256, help="captions per batch; default: %(default)s")
    command.add_number("--shard-size-mb", float, 1e-6, MANY, default=128, help="size of a file; default: %(default)s")
    command.add_argument("--device", default=DEVICE, help="device of the text encoder; default: %(default)s")
    command.set_defaults(run=cache_embeddings)


def add_data_arguments(command: Parser) -> None:
    """Add the options that select the captions of a data set."""
    command.add_argument("--train-data-dir", help="folder with the data set")
    command.add_argument("--dataset-name", help="data set on the Hub")
    command.add_argument("--dataset-config-name", help="configuration of the data set on the Hub")
    command.add_argument("--cache-dir", help="download folder of `datasets`")
    command.add_argument("--caption-column", nargs="+", default=["text"], help="columns with captions; default: text")
    command.add_argument("--image-column", default="image", help="column with images; default: %(default)s")
    command.add_argument(
        "--streaming",
        action="store_true",
        help="read the data shard by shard, and write a cache in the order of the shards, for training with --streaming",
    )
    command.add_argument(
        "--splits", nargs="+", help="splits of the data set, or values of its split column; default: all"
    )
    command.add_argument(
        "--split-column",
        default="split",
        help="column whose values are the splits, if the data set has it; default: %(default)s",
    )


def cache_embeddings(args: argparse.Namespace) -> None:
    """Build or verify a cache, and print its size."""
    from ..utils.processes import refuse_several, shared_work

    if args.verify or args.nemo_tars:
        refuse_several("`verify`" if args.verify else "`nemo_tars`")
    if args.verify:
        verify(args.output_dir)
        report(args.output_dir, "verified")
        return
    check_sources(args)
    check_output_dir(args.output_dir, args.train_data_dir, args.streaming)
    args.shard_bytes = int(args.shard_size_mb * 2**20)
    start = time.perf_counter()
    if args.nemo_tars:
        added, is_main = import_nemo(args), True
    else:
        with shared_work(args.device) as (state, args.device):
            encode = encode_stream if args.streaming else encode_dataset
            added, is_main = encode(args, state), state.is_main_process
    if is_main:
        report(args.output_dir, f"{added} added, {added / (time.perf_counter() - start):.0f} captions/s")


def check_sources(args: argparse.Namespace) -> None:
    """Raise ValueError for missing or incompatible arguments."""
    data = [name for name in ("train_data_dir", "dataset_name") if getattr(args, name) is not None]
    if not args.nemo_tars:
        if args.text_encoder is None:
            raise ValueError("`text_encoder` is not given, but is needed to encode captions.")
        if len(data) != 1:
            raise ValueError("Exactly one of `train_data_dir` and `dataset_name` should be given.")
        check_device(args.device)
        return
    own = ("text_encoder", "variant", "keep_padding", "clean_captions", "streaming")
    others = [name for name in own if getattr(args, name)]
    if data or others:
        name = [*data, *others][0]
        raise ValueError(
            f"`nemo_tars` and `{name}` are both given, but NeMo's tar files contain captions and embeddings."
        )
    if args.tokenizer_max_length is None:
        raise ValueError("`tokenizer_max_length` is not given: it should be NeMo's `encoding_lengths`, often 128.")
    for path in args.nemo_tars:
        if not path.is_file():
            raise ValueError(f"`nemo_tars` has '{path}', which is not a file.")


def check_output_dir(folder: Path, data: str | None, streaming: bool = False) -> None:
    """Raise ValueError for a folder in which a cache cannot be built, before anything is read."""
    from ..text.cache_files import MANIFEST
    from ..text.cache_files import check_folder as check_cache_folder
    from ..text.sharded_cache import is_sharded

    with refusing(folder, "output_dir"):
        if streaming and (folder / MANIFEST).exists() or not streaming and is_sharded(folder):
            kind = "without" if streaming else "with"
            raise ValueError(
                f"`output_dir` is '{folder}', a cache that was written {kind} `streaming`: choose another folder."
            )
        if not is_sharded(folder):
            check_cache_folder(folder)
    check_folder(folder, "output_dir")
    if data is not None and folder.resolve().is_relative_to(Path(data).resolve()):
        raise ValueError(
            f"`output_dir` is '{folder}', in `train_data_dir` '{data}', where its files would be read as data."
        )


def verify(folder: Path) -> None:
    """Raise ValueError with all problems of a cache, if there are any."""
    from ..text.cache_files import MEND, find_problems, read_manifest
    from ..text.sharded_cache import ShardedCache, is_sharded

    if is_sharded(folder):
        problems = ShardedCache(folder).verify()
    else:
        problems = find_problems(folder, read_manifest(folder, "output_dir"))
    if problems:
        raise ValueError(f"`output_dir` is '{folder}': {'; '.join(problems)}; {MEND}.")


def report(folder: Path, done: str) -> None:
    """Print the size of a cache."""
    from ..text.cache_files import read_manifest
    from ..text.sharded_cache import Layout, is_sharded

    parts = Layout.read(folder, "output_dir").parts() if is_sharded(folder) else [folder]
    shards = [shard for part in parts for shard in read_manifest(part, "output_dir")["shards"]]
    count, size, tokens = (sum(shard[name] for shard in shards) for name in ("captions", "bytes", "tokens"))
    print(
        f"{folder}: {count} captions, {tokens / max(1, count):.1f} tokens and "
        f"{size / max(1, count):.0f} bytes per caption" + (", " if done == "verified" else "; ") + done
    )


def encode_dataset(args: argparse.Namespace, state: "PartialState") -> int:
    """Encode the captions of the data set that the cache lacks; return their number. Called by all processes."""
    from ..text.cache_writer import CacheWriter, save_parts, write_cache
    from ..utils.processes import in_turn, on_main_process, shared_folder

    with shared_folder(state, args.output_dir, "output_dir"):
        captions = in_turn(state, lambda: read_captions(args))
        encoder = in_turn(state, lambda: load_encoder(args))
        writers: list[CacheWriter] = []  # one in the main process, which is not sent to the others

        def begin() -> None:
            writers.append(
                CacheWriter(args.output_dir, encoder.identity(), args.dtype, args.shard_bytes, is_held=True)
            )

        on_main_process(state, begin)
        added = write_cache(next(iter(writers), None), captions, encoder, args.batch_size, state)
        on_main_process(state, lambda: save_parts(args.output_dir, encoder))
        return added


def encode_stream(args: argparse.Namespace, state: "PartialState") -> int:
    """
    Write the parts of a sharded cache that are missing; return their number of captions. Called by all processes, each of
    which writes every n-th part.
    """
    from ..text.cache_writer import save_parts
    from ..text.sharded_cache import Layout, is_sharded, write_part
    from ..training.data.captions import iterate_shard
    from ..utils.processes import gather, in_turn, on_main_process, shared_folder

    with shared_folder(state, args.output_dir, "output_dir"):
        splits = in_turn(state, lambda: load_chosen(args))
        encoder = in_turn(state, lambda: load_encoder(args))
        counts = {name: data.num_shards for name, data in splits.items()}
        layout = Layout(args.output_dir, counts, encoder.identity(), args.dtype)

        def begin() -> None:
            if is_sharded(args.output_dir):
                Layout.read(args.output_dir, "output_dir").check_same(layout)
            layout.write()

        on_main_process(state, begin)
        shards = [(name, shard) for name, count in counts.items() for shard in range(count)]
        added = 0
        for name, shard in shards[state.process_index :: state.num_processes]:
            folder = layout.part(name, shard)
            if not folder.exists():
                rows = splits[name].shard(num_shards=counts[name], index=shard)
                captions = iterate_shard(rows, args.caption_column, f"Shard {shard} of split {name!r}")
                added += write_part(folder, captions, encoder, args.dtype, args.shard_bytes, args.batch_size)
        added = sum(gather(state, added))
        on_main_process(state, lambda: save_parts(layout.parts()[0], encoder))
        return added


def load_encoder(args: argparse.Namespace) -> "TextEncoder":
    """Return the text encoder, whose network is loaded on first use."""
    import torch

    from ..text.encoder import TextEncoder

    device = torch.device(args.device)
    return TextEncoder.from_pretrained(
        args.text_encoder,
        args.tokenizer_max_length,
        device,
        torch.float32 if device.type == "cpu" else torch.bfloat16,  # T5 overflows in float16
        keeps_padding=args.keep_padding,
        cleans_captions=args.clean_captions,
        variant=args.variant,
    )


def load_chosen(args: argparse.Namespace) -> dict[str, Any]:
    """Load the chosen splits of the data set, whose caption columns are checked."""
    from ..training.data.data_config import DataConfig
    from ..training.data.sources import check_columns, column_names, is_split_by_column, load_splits

    config = DataConfig(
        train_data_dir=args.train_data_dir,
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        cache_dir=args.cache_dir,
        caption_column=args.caption_column,
        image_column=args.image_column,
        split_column=args.split_column,
        streaming=args.streaming,
    )
    splits, _ = load_splits(config)
    if args.splits and is_split_by_column(splits, column_names(next(iter(splits.values())), config), config):
        splits = split_by_column(splits, config, args.splits)
    missing = set(args.splits or []) - set(splits)
    if missing:
        raise ValueError(f"`splits` has {sorted(missing)}, but the data set has {sorted(map(str, splits))}.")
    chosen = {str(name): splits[name] for name in dict.fromkeys(args.splits or splits)}
    for data in chosen.values():
        check_columns(data, column_names(data, config), config, with_text=True)
    return chosen


def split_by_column(splits: dict[str, Any], config: "DataConfig", names: list[str]) -> dict[str, Any]:
    """Return the rows of some splits of a data set whose splits are the values of a column.

    Raises:
        ValueError: If no row has one of these splits, or for a stream.
    """
    from ..training.data.sources import iterate_cells, keep_rows

    if config.streaming:
        raise ValueError(
            f"`splits` is given, but the splits are the values of the column {config.split_column!r}: a cache for "
            "`streaming` has the captions of all rows."
        )
    (data,) = splits.values()
    known = {value for (value,) in iterate_cells(data, [config.split_column])}
    missing = set(names) - known
    if missing:
        raise ValueError(
            f"`splits` has {sorted(missing)}, but the column {config.split_column!r} has {shown(sorted(map(str, known)))}."
        )
    return {name: keep_rows(data, {config.split_column: [name]}, name) for name in names}


def read_captions(args: argparse.Namespace) -> "DistinctCaptions":
    """Index the distinct captions of the data set."""
    from ..training.data.captions import index_captions

    captions = index_captions(load_chosen(args).values(), args.caption_column)
    if not len(captions):
        raise ValueError("The data set has no captions.")
    return captions


def import_nemo(args: argparse.Namespace) -> int:
    """Add the embeddings in NeMo's tar files; return their number."""
    from tqdm.auto import tqdm

    from ..conversion.nemo_embeddings import read_tar
    from ..text.cache_writer import CacheWriter

    writer, added = None, 0
    with ExitStack() as stack:
        for path in tqdm(args.nemo_tars, desc="Reading tar files"):
            for caption, embeds in read_tar(path, args.nemo_key):
                embeds = embeds[: args.tokenizer_max_length]
                if writer is None:
                    encoder = {"max_length": args.tokenizer_max_length, "width": embeds.shape[1]}
                    writer = stack.enter_context(CacheWriter(args.output_dir, encoder, args.dtype, args.shard_bytes))
                if caption not in writer:
                    writer.add([caption], [embeds])
                    added += 1
        if writer is None:
            raise ValueError("`nemo_tars` has no pickled embeddings.")
        writer.flush()
    return added
