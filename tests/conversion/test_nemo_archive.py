"""Hostile, damaged and cut checkpoints of NeMo: each is refused in one line that names what is wrong, and nothing is run."""

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed
import yaml
from nemo_archives import (
    PREFIX,
    files_of,
    lightning_checkpoint,
    model_section,
    pack,
    read_case,
    saved,
    write_form,
    write_torch_dist,
    write_zarr,
)
from torch.multiprocessing.reductions import StorageWeakRef

from diffusers_imagen.commands import main as cli
from diffusers_imagen.conversion import load_nemo_stage, nemo_archive, nemo_weights
from diffusers_imagen.conversion.nemo_distributed import open_distributed
from diffusers_imagen.conversion.nemo_stage import converted, plan_stage
from diffusers_imagen.conversion.nemo_weights import Described, DictWeights, TorchFile


CASE = "sr_fused"


class Exploit:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.system, (f"touch {self.place}",)


@pytest.fixture(scope="module")
def case() -> tuple[dict, dict[str, torch.Tensor]]:
    config, weights, _ = read_case(CASE)
    return config, {key: value.half() for key, value in weights.items()}


@pytest.fixture(scope="module")
def files(case) -> dict[str, bytes]:
    config, weights = case
    return {"model_config.yaml": yaml.safe_dump(model_section(config)).encode(), "model_weights.ckpt": saved(weights)}


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def refuse(path: Path, tmp_path: Path, message: str) -> None:
    """Refused by the function and by the command, in one line, without a trace on the disk."""
    with pytest.raises(ValueError, match=message) as caught:
        load_nemo_stage(path)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1500
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["convert-nemo", str(path), "--output", str(tmp_path / "out")]) == 2
    assert sorted(tmp_path.rglob("*")) == before


MEMBERS = {
    "an absolute path": (
        member("/etc/model_weights.ckpt"),
        "has '/etc/model_weights.ckpt', a name that points outside",
    ),
    "a path upwards": (member("./../model_weights.ckpt"), "a name that points outside the folder"),
    "a symbolic link": (
        member("./model_weights.ckpt", tarfile.SYMTYPE, link="/etc/passwd"),
        "which is not a regular file",
    ),
    "a hard link": (member("./x.ckpt", tarfile.LNKTYPE, link="/etc/passwd"), "which is not a regular file"),
    "a device": (member("./x", tarfile.CHRTYPE), "which is not a regular file"),
    "a FIFO": (member("./x", tarfile.FIFOTYPE), "which is not a regular file"),
    "a bomb": (member("./model_weights.ckpt", size=2**50), "beyond the end of the file"),
    "a second configuration": (member("./model_config.yaml"), "has './model_config.yaml' twice"),
}


@pytest.mark.parametrize("info, message", MEMBERS.values(), ids=MEMBERS)
def test_members_that_no_archive_of_nemo_has(info, message, files, tmp_path):
    data = files["model_config.yaml"]
    first = member("./model_config.yaml", size=len(data)).tobuf() + data + bytes(-len(data) % 512)
    path = tmp_path / "base.nemo"
    path.write_bytes(first + info.tobuf() + bytes(1024))
    refuse(path, tmp_path, message)


def test_an_archive_of_zeros_that_unpacks_a_thousandfold(files, tmp_path):
    zeros = pack(tmp_path / "x.tar", {**files, "model_weights.ckpt": bytes(2**27)})
    path = tmp_path / "base.nemo"
    path.write_bytes(gzip.compress(zeros.read_bytes(), 6))
    zeros.unlink()
    refuse(path, tmp_path, "more than 50 times its compressed size")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.98])
def test_cut_archives(mode, share, files, tmp_path):
    path = pack(tmp_path / "base.nemo", files, mode)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refuse(path, tmp_path, r"'.*base.nemo'")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_cut_checkpoints(share, case, tmp_path):
    path = tmp_path / "x.ckpt"
    data = lightning_checkpoint(case[1], model_section(case[0]))
    path.write_bytes(data[: int(len(data) * share)])
    refuse(
        path, tmp_path, "`.*' ?, which cannot be read as weights: it is cut or damaged|which cannot be read as weights"
    )


def with_pickle(data: bytes, content: bytes) -> bytes:
    """A file of `torch.save` whose pickle is another."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, content if entry.filename.endswith("data.pkl") else source.read(entry))
    return target.getvalue()


@pytest.mark.parametrize("where", ["model_weights.ckpt", "lightning", "older"])
def test_a_pickle_that_runs_code_is_refused_by_name(where, case, files, tmp_path):
    place = tmp_path / "ran"
    content = {"state_dict": case[1], "hyper_parameters": Exploit(place)}
    if where == "older":
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=False)
        data = file.getvalue()
    else:
        data = saved(content)
    if where == "model_weights.ckpt":
        path = pack(tmp_path / "base.nemo", {**files, where: data})
    else:
        path = tmp_path / "x.ckpt"
        path.write_bytes(data)
    refuse(path, tmp_path, "asks for 'posix.system', which no weights need: no code was executed")
    assert not place.exists()


@pytest.mark.parametrize("name", ["builtins eval", "os system", "subprocess Popen", "torch load", "builtins getattr"])
def test_names_that_no_weights_need(name, case, tmp_path):
    path = tmp_path / "x.ckpt"
    code = f"c{name.replace(' ', chr(10))}\n".encode() + b"X\x01\x00\x00\x00a\x85R."
    path.write_bytes(with_pickle(lightning_checkpoint(case[1]), b"\x80\x02" + code))
    refuse(path, tmp_path, name.replace(" ", r"\."))


def test_compressed_entries_and_entries_of_one_name(files, tmp_path):
    source = zipfile.ZipFile(io.BytesIO(files["model_weights.ckpt"]))
    for kind, message in (
        (zipfile.ZIP_DEFLATED, "is compressed; torch's are not"),
        (zipfile.ZIP_STORED, "of one name"),
    ):
        path = tmp_path / "x.ckpt"
        with zipfile.ZipFile(path, "w", kind) as archive:
            for entry in source.infolist():
                archive.writestr(entry.filename, source.read(entry))
            if kind == zipfile.ZIP_STORED:
                with pytest.warns(UserWarning, match="Duplicate name"):
                    archive.writestr(source.infolist()[0].filename, b"")
        refuse(path, tmp_path, message)


CONFIGS = {
    "a tag": (b"unet: !!python/object/apply:os.system ['true']", "it has the tag"),
    "a bomb of aliases": (
        b"a: &a [1,1,1,1,1,1,1,1,1]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(ord("b"), ord("i"))),
        "more than 20,000 values",
    ),
    "no mapping": (b"- 1", "has no configuration with a section `unet`"),
    "no network": (b"unet: {embed_dim: 8}", "`unet_type` is None"),
    "a huge network": (
        b"unet_type: sr\nconditioning: {embed_dim: 96}\nunet: {embed_dim: 1024, image_size: 32, per_head_channels: 64}",
        "make a network of about 31 billion parameters, but 10 billion is the maximum",
    ),
    "a wrong number": (
        b"unet_type: sr\nconditioning: {embed_dim: 96}\nunet: {embed_dim: 9.5, image_size: 32}",
        "`embed_dim` is 9.5",
    ),
}


@pytest.mark.parametrize("text, message", CONFIGS.values(), ids=CONFIGS)
def test_configurations_that_are_none(text, message, files, tmp_path):
    refuse(pack(tmp_path / "base.nemo", {**files, "model_config.yaml": text}), tmp_path, message)


def test_what_is_no_checkpoint(files, tmp_path):
    path = tmp_path / "base.nemo"
    with pytest.raises(ValueError, match="`source` is '.*base.nemo', which does not exist"):
        load_nemo_stage(path)
    os.mkfifo(path)
    refuse(path, tmp_path, "is not a regular file")
    path.unlink()
    path.write_bytes(b"text")
    refuse(path, tmp_path, "cannot be read as a tar file")
    refuse(pack(path, {"model_config.yaml": files["model_config.yaml"]}), tmp_path, "has 0 files of weights")
    refuse(pack(path, {**files, "other.ckpt": b""}), tmp_path, "has 2 files of weights")
    refuse(
        pack(path, {**files, "model_weights.ckpt": saved([1, 2])}),
        tmp_path,
        "holds an object of class list, but should hold weights",
    )
    refuse(
        pack(path, {**files, "model_weights.ckpt": saved({"a": 1})}), tmp_path, "has 1 under 'a', but should have a"
    )


def test_weights_that_are_not_finite(case, tmp_path):
    config, weights = case
    key = f"{PREFIX}out.bias"
    broken = {**weights, key: weights[key] * float("nan")}
    refuse(write_form("tar", tmp_path, config, broken), tmp_path, f"not finite under '{key}': the training diverged")


# Distributed checkpoints


@pytest.fixture
def folder(case, tmp_path) -> Path:
    write_torch_dist(tmp_path / "weights", dict(list(case[1].items())[:3]))
    return tmp_path / "weights"


def test_parts_of_a_tensor_are_put_together(folder):
    """The metadata of a tensor whose rows several processes wrote."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    whole = torch.arange(24.0).view(4, 6)
    chunks, data = [], b""
    for at, part in ((0, whole[:1]), (1, whole[1:4, :2]), (1, whole[1:4, 2:])):
        offsets = torch.Size([at, 2 if part.shape[1] == 4 else 0])
        chunks.append(distributed.metadata.ChunkStorageMetadata(offsets, part.shape))
        content = saved(part.clone())
        info = distributed.filesystem._StorageInfo("__1_0.distcp", len(data), len(content))
        metadata.storage_data[distributed.metadata.MetadataIndex("split", offsets)] = info
        data += content
    properties = distributed.metadata.TensorProperties(torch.float32)
    described = distributed.metadata.TensorStorageMetadata(properties, whole.shape, chunks)
    metadata.state_dict_metadata["split"] = described
    (folder / "__1_0.distcp").write_bytes(data)
    path.write_bytes(pickle.dumps(metadata))
    weights = open_distributed(folder, "it")
    assert weights.tensors["split"] == Described((4, 6), torch.float32)
    ((_, found),) = weights.read(["split"])
    assert torch.equal(found, whole)
    assert weights.dropped == ["rng_state/shard_0_1.a"]
    chunks.pop()
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"the parts of 'split' do not cover \(4, 6\)"):
        open_distributed(folder, "it")
    chunks.append(chunks[1])
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="the parts of 'split' do not cover"):
        open_distributed(folder, "it")


def damage(folder: Path, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index, info = next((index, info) for index, info in metadata.storage_data.items() if index.fqn.startswith(PREFIX))
    change(folder, metadata, index, info)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


DAMAGE = {
    "runs code": (
        lambda folder, metadata, *_: metadata.state_dict_metadata.update(x=Exploit(folder / "ran")),
        "it asks for 'posix.system'",
    ),
    "leads out": (lambda f, m, i, info: setattr(info, "relative_path", "../x.distcp"), "for a file of the folder"),
    "is absolute": (lambda f, m, i, info: setattr(info, "relative_path", "/etc/passwd"), "for a file of the folder"),
    "is cut": (lambda f, m, i, info: setattr(info, "length", 2**40), "is missing or cut"),
    "is negative": (lambda f, m, i, info: setattr(info, "offset", -1), "has an invalid location"),
    "is nowhere": (lambda f, m, index, _: m.storage_data.pop(index), "has no location for"),
    "is encrypted": (
        lambda f, m, i, info: setattr(info, "transform_descriptors", ["x"]),
        "is compressed or encrypted",
    ),
    "is a link": (
        lambda folder, *_: ((folder / "__0_0.distcp").unlink(), (folder / "__0_0.distcp").symlink_to("/etc/passwd")),
        "is missing or cut",
    ),
}


@pytest.mark.parametrize("change, message", DAMAGE.values(), ids=DAMAGE)
def test_metadata_that_leads_elsewhere(change, message, folder):
    damage(folder, change)
    with pytest.raises(ValueError, match=f"it has a .metadata that cannot be read safely: .*{message}"):
        open_distributed(folder, "it")
    assert not (folder / "ran").exists()


def test_a_part_that_runs_code(folder):
    key = next(iter(open_distributed(folder, "it").tensors))

    def change(folder, metadata, index, info):
        content = saved(Exploit(folder / "ran"))
        (folder / "x.distcp").write_bytes(content)
        info.relative_path, info.offset, info.length = "x.distcp", 0, len(content)

    damage(folder, change)
    with pytest.raises(ValueError, match="it has a part of '.*' in 'x.distcp' that asks for 'posix.system'"):
        list(open_distributed(folder, "it").read([key, *open_distributed(folder, "it").tensors]))
    assert not (folder / "ran").exists()


def test_zarr_arrays_that_are_compressed_or_incomplete(case, tmp_path):
    folder = tmp_path / "weights"
    key = f"{PREFIX}init_conv.weight"
    weights = {key: case[1][key].float(), f"{PREFIX}odd": torch.arange(5.0)}
    write_zarr(folder, weights)
    opened = open_distributed(folder, "it")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in opened.read(list(weights)))
    (folder / key / "0.0.0.0").rename(folder / key / "9.0.0.0")
    with pytest.raises(ValueError, match="it lacks the chunk '0.0.0.0' of"):
        list(open_distributed(folder, "it").read([key]))
    settings = json.loads((folder / key / ".zarray").read_text())
    for change, message in (
        ({"compressor": {"id": "blosc"}}, "as a compressed or unknown kind of array, which is not read"),
        ({"shape": [-1, 2, 3, 4]}, "with an invalid shape"),
        ({"shape": 3}, "unknown kind of array"),
        ({"chunks": [1]}, "unknown kind of array"),
    ):
        (folder / key / ".zarray").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=message):
            open_distributed(folder, "it")


def test_an_unknown_form_is_refused_with_what_to_do(files, tmp_path):
    description = {"model_weights/metadata.json": b'{"sharded_backend": "tensorstore"}'}
    path = pack(tmp_path / "base.nemo", {"model_config.yaml": files["model_config.yaml"], **description})
    refuse(
        path,
        tmp_path,
        "has weights in the format 'tensorstore', but should have torch_dist or zarr. Write it as a plain state dict",
    )


def test_a_lightning_folder_of_a_distributed_checkpoint(case, tmp_path):
    config, weights = case
    write_torch_dist(tmp_path / "checkpoints" / "step=10", weights)
    (tmp_path / "hparams.yaml").write_text(yaml.safe_dump({"cfg": model_section(config)}))
    stage = load_nemo_stage(tmp_path / "checkpoints" / "step=10")
    assert torch.equal(stage.parts.unet.conv_in.weight, weights[f"{PREFIX}init_conv.weight"])
    assert "optimizer.state.exp_avg.x" in stage.report.dropped


# Memory


def test_a_file_is_opened_anew_as_it_is_read(case, tmp_path, monkeypatch):
    """Pages that were read of a mapped file count as memory until it is closed."""
    path = tmp_path / "x.ckpt"
    path.write_bytes(saved(case[1]))
    weights = TorchFile(path, "it")
    total = sum(value.nbytes for value in case[1].values())
    monkeypatch.setattr(nemo_weights, "MAPPED_BYTES", total // 10)
    opened, load = [], weights.load
    monkeypatch.setattr(weights, "load", lambda: opened.append(1) or load())
    found = list(weights.read(list(case[1])))
    assert 5 <= len(opened) <= 11
    assert [name for name, _ in found] == list(case[1])
    assert all(torch.equal(value, case[1][name]) for name, value in found)


def test_no_more_than_two_weights_are_in_memory(case, tmp_path):
    """That which is written, and that which is read next."""
    config, weights = case
    refs: list = []

    class Counted(DictWeights):
        def read(self, keys):
            for key in keys:
                tensor = self.state_dict[key].clone()
                refs.append(StorageWeakRef(tensor.untyped_storage()))
                yield key, tensor

    checkpoint = nemo_archive.NemoCheckpoint("x", model_section(config), Counted(weights), {})
    parts, plan = plan_stage(checkpoint)

    def count() -> int:
        return sum(not ref.expired() for ref in refs)

    counts = [count() for _ in converted(checkpoint, parts.unet, plan, torch.float32)]
    assert len(counts) > 100 and max(counts) <= 2


def test_temporary_files_are_gone_after_success_and_failure(files, case, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    load_nemo_stage(pack(tmp_path / "base.nemo", files))
    assert list(scratch.iterdir()) == []
    with pytest.raises(ValueError):
        load_nemo_stage(pack(tmp_path / "base.nemo", {**files, "model_config.yaml": b"unet: []"}))
    assert list(scratch.iterdir()) == []


def test_an_unpacked_archive_is_read_where_it_is(case, tmp_path):
    path = write_form("unpacked", tmp_path, *case)
    before = files_of(path, "")
    load_nemo_stage(path)
    assert files_of(path, "") == before
    shutil.rmtree(path)
