"""NeMo's files as NeMo wrote them, packed by the tests: archives of every form, Lightning's checkpoints."""

import io
import json
import sys
import tarfile
import types
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as distributed
import yaml
from safetensors.torch import load_file


FOLDER = Path(__file__).parents[1] / "fixtures" / "nemo"
CASES = sorted(path.stem for path in FOLDER.glob("*.json"))
PREFIX = "model.model.unet."


def read_case(name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Configuration, weights, and NeMo's inputs and outputs."""
    config = json.loads((FOLDER / f"{name}.json").read_text())
    weights = load_file(FOLDER / f"{name}.nemo_weights.safetensors")
    weights = {key: value.float() for key, value in weights.items()}
    return config, weights, load_file(FOLDER / f"{name}.io.safetensors")


def model_section(config: dict) -> dict:
    """What NeMo had, without what the vectors say beside."""
    return {name: value for name, value in config.items() if name != "num_parameters"}


def saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def pack(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    """A tar of these files, with the names and the order of NeMo's: a folder `.` first."""
    with tarfile.open(path, mode) as tar:
        root = tarfile.TarInfo(".")
        root.type = tarfile.DIRTYPE
        tar.addfile(root)
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def files_of(folder: Path, prefix: str) -> dict[str, bytes]:
    return {
        f"{prefix}/{path.relative_to(folder)}": path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_torch_dist(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """As Megatron Core writes it, with an optimizer's tensors and objects beside the weights."""
    state = {**weights, "optimizer.state.exp_avg.x": torch.zeros(2), "rng_state/shard_0_1": {"a": [1]}}
    distributed.save(state, checkpoint_id=folder)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


def write_zarr(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Uncompressed arrays of two chunks along the first dimension, the second of which may reach beyond the array."""
    for key, tensor in weights.items():
        (folder / key).mkdir(parents=True)
        grid = [-(-tensor.shape[0] // 2), *tensor.shape[1:]]
        settings = {"zarr_format": 2, "shape": list(tensor.shape), "chunks": grid, "order": "C", "filters": None}
        settings |= {"compressor": None, "fill_value": None, "dtype": "<f4"}
        (folder / key / ".zarray").write_text(json.dumps(settings))
        for number, part in enumerate(tensor.split(grid[0])):
            chunk = torch.zeros(grid)
            chunk[: len(part)] = part
            name = ".".join(map(str, [number, *[0] * (tensor.ndim - 1)]))
            (folder / key / name).write_bytes(chunk.numpy().tobytes())
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')


@contextmanager
def omegaconf_classes():
    """Modules of the names of omegaconf's, whose objects Lightning pickles with a checkpoint; gone afterwards."""
    names = {"dictconfig": "DictConfig", "listconfig": "ListConfig", "nodes": "AnyNode"}
    modules = {"omegaconf": types.ModuleType("omegaconf")}
    for module, name in names.items():
        modules[f"omegaconf.{module}"] = types.ModuleType(f"omegaconf.{module}")
        made = type(name, (), {"__module__": f"omegaconf.{module}"})
        setattr(modules[f"omegaconf.{module}"], name, made)
    sys.modules.update(modules)
    try:
        yield {name: getattr(modules[f"omegaconf.{module}"], name) for module, name in names.items()}
    finally:
        for name in modules:
            del sys.modules[name]


def lightning_checkpoint(weights: dict[str, torch.Tensor], config: dict | None = None) -> bytes:
    """A `.ckpt` of Lightning, with the configuration as an object of omegaconf among its hyper-parameters."""
    content = {
        "epoch": 0,
        "global_step": 10,
        "pytorch-lightning_version": "2.0.7",
        "state_dict": weights,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "callbacks": {"ModelCheckpoint{}": {"dirpath": Path("/runs/imagen")}},
    }
    with omegaconf_classes() as classes:

        def node(value):
            if isinstance(value, dict):
                made = classes["DictConfig"]()
                made.__dict__["_content"] = {key: node(part) for key, part in value.items()}
            elif isinstance(value, list):
                made = classes["ListConfig"]()
                made.__dict__["_content"] = [node(part) for part in value]
            else:
                made = classes["AnyNode"]()
                made.__dict__["_val"] = value
            return made

        if config is not None:
            content["hyper_parameters"] = node({"cfg": config})
        return saved(content)


def write_form(form: str, folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> Path:
    """A checkpoint in one of `FORMS`."""
    folder.mkdir(parents=True, exist_ok=True)
    section = {"model_config.yaml": yaml.safe_dump(model_section(config)).encode()}
    plain = {**section, "model_weights.ckpt": saved(weights)}
    path = folder / "base.nemo"
    if form in ("tar", "gzip"):
        return pack(path, plain, "w" if form == "tar" else "w:gz")
    if form == "ranks":
        return pack(path, {**section, **{f"mp_rank_0{i}/model_weights.ckpt": saved(weights) for i in range(2)}})
    if form == "pipeline ranks":
        halves = [dict(list(weights.items())[i::2]) for i in range(2)]
        names = [f"tp_rank_00_pp_rank_00{i}/model_weights.ckpt" for i in range(2)]
        return pack(path, {**section, **dict(zip(names, map(saved, halves)))})
    if form in ("torch_dist", "zarr"):
        (write_torch_dist if form == "torch_dist" else write_zarr)(folder / form, weights)
        return pack(path, {**section, **files_of(folder / form, "model_weights")})
    if form == "unpacked":
        target = folder / "unpacked"
        target.mkdir()
        for name, data in plain.items():
            (target / name).write_bytes(data)
        return target
    path = folder / "checkpoints" / "imagen--loss=0.1-step=10.ckpt"
    path.parent.mkdir()
    path.write_bytes(lightning_checkpoint(weights, model_section(config) if form == "lightning" else None))
    if form == "lightning, hparams.yaml":
        (folder / "hparams.yaml").write_text(yaml.safe_dump({"cfg": model_section(config)}))
    return path


FORMS = [
    *("tar", "gzip", "ranks", "pipeline ranks", "torch_dist", "zarr", "unpacked"),
    *("lightning", "lightning, hparams.yaml"),
]


def check_samples(pipe, vectors: dict[str, torch.Tensor]) -> None:
    """A pipeline draws what NeMo v2.3.0's own sampler does: 6 steps, guidance 2, dynamic thresholding."""
    images = pipe(
        prompt_embeds=vectors["text_embed"],
        prompt_attention_mask=vectors["text_mask"],
        latents=vectors["edm_noise"],
        num_inference_steps=6,
        guidance_scale=2.0,
        output_type="latent",
    ).images
    # the pipeline clamps what a stage hands on; NeMo does not
    expected = vectors["edm_sample_6steps_cfg2_dynamic"].clamp(-1, 1)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
