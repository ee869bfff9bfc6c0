"""Importing the package is quick and silent, and its classes are found whatever is imported first."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import diffusers_imagen
from diffusers_imagen import conversion, diffusion, evaluation, pipelines, schedulers, training
from diffusers_imagen._register import add_names
from diffusers_imagen.training import data
from diffusers_imagen.utils.imports import FINDER, AwaitedModules, after_import, lazy_names


LAZY = (diffusers_imagen, conversion, data, diffusion, evaluation, pipelines, schedulers, training)
SLOW = ("accelerate", "datasets", "diffusers", "peft", "torch", "transformers")


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_importing_the_package_imports_no_other_that_is_slow():
    code = "import json, sys; import diffusers_imagen; dir(diffusers_imagen); print(json.dumps(list(sys.modules)))"
    done = run(code)
    assert done.returncode == 0 and done.stderr == ""
    modules = set(json.loads(done.stdout))
    assert modules & set(SLOW) == set() and "diffusers_imagen" in modules and len(modules) < 300


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_names_are_those_that_type_checkers_see(package):
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    typed = {name.name: f"{package.__name__}.{node.module}" for node in block.body for name in node.names}
    assert set(package.__all__) - {"register_network"} == set(typed)
    for name, module in typed.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_subpackages_are_attributes():
    folder = Path(diffusers_imagen.__file__).parent
    for name in (path.parent.name for path in folder.glob("*/__init__.py")):
        assert name in dir(diffusers_imagen)
        assert getattr(diffusers_imagen, name) is importlib.import_module(f"diffusers_imagen.{name}")


ALL_MODULES = """
import datasets, importlib, os, pkgutil, socket, sys

def refuse(*args):
    raise AssertionError("network")

socket.socket.connect = refuse
before = dict(os.environ)
said, out, error = os.open(folder + "/said", os.O_CREAT | os.O_WRONLY), os.dup(1), os.dup(2)
os.dup2(said, 1), os.dup2(said, 2)
import diffusers_imagen
for module in pkgutil.walk_packages(diffusers_imagen.__path__, "diffusers_imagen."):
    if module.name != "diffusers_imagen.commands.webdemo":  # which imports gradio
        importlib.import_module(module.name)
sys.stdout.flush()
os.dup2(out, 1), os.dup2(error, 2)
assert os.path.getsize(folder + "/said") == 0, open(folder + "/said").read()
assert dict(os.environ) == before
# diffusers' AutoPipelines report three classes of transformers that need torchvision; no module imports them
assert "diffusers.pipelines.auto_pipeline" not in sys.modules
found = diffusers_imagen.ImagenCascadePipeline
"""
# What a user may import and call, in this order, each in a process of its own: `folder` is a saved cascade.
ORDERS = {
    "every module, in silence and offline": ALL_MODULES,
    "the package, then diffusers": """
import diffusers_imagen
from diffusers import AutoModel, DiffusionPipeline
found = type(DiffusionPipeline.from_pretrained(folder))
network = AutoModel.from_pretrained(folder, subfolder="base_unet")
assert type(network) is type(AutoModel.from_pretrained(folder + "/base_unet")) is diffusers_imagen.ImagenUNetModel
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image
pipe = AutoPipelineForText2Image.from_pretrained(folder)
assert type(pipe) is type(AutoPipelineForImage2Image.from_pipe(pipe)) is found
""",
    "diffusers, then the package": """
import json
from diffusers import AutoPipelineForInpainting, DiffusionPipeline
import diffusers_imagen
pipe = DiffusionPipeline.from_pretrained(folder)
found = type(pipe)
assert type(AutoPipelineForInpainting.from_pipe(pipe)) is type(found.from_pipe(pipe)) is found
pipe.save_pretrained(folder + "/again")
index = json.load(open(folder + "/again/model_index.json"))
assert index["base_unet"] == ["diffusers_imagen", "ImagenUNetModel"], index
assert index["base_scheduler"][0] == "diffusers_imagen", index
""",
    "a pickle, then diffusers": """
import pickle
found = pickle.loads(b"cdiffusers_imagen.pipelines.pipeline_imagen_cascade\\nImagenCascadePipeline\\n.")
from diffusers import DiffusionPipeline
assert type(DiffusionPipeline.from_pretrained(folder)) is found
""",
    "a module of the package, then diffusers": """
import diffusers_imagen.diffusion.edm
import diffusers
found = diffusers.pipelines.ImagenCascadePipeline
assert found is diffusers.ImagenCascadePipeline and diffusers.EDMHeunScheduler is diffusers_imagen.EDMHeunScheduler
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker
assert IFSafetyChecker.all_tied_weights_keys == {}
""",
}
# what they have in common is imported once
PRELUDE = """
import json, os, sys, traceback
import torch, transformers, accelerate, peft
from transformers import AutoModelForTextEncoding, CLIPVisionModelWithProjection, T5EncoderModel
assert not any(name.partition(".")[0] in ("diffusers", "diffusers_imagen") for name in sys.modules)
folder, orders = sys.argv[1], json.loads(sys.argv[2])
for name, code in orders.items():
    child = os.fork()
    if child == 0:
        found = None
        try:
            scope = {"folder": folder}
            exec(code, scope)
            found = scope["found"].__name__
        except BaseException:
            traceback.print_exc()
        print(json.dumps([name, found]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_every_order_of_imports_finds_the_classes(cascade, tmp_path):
    cascade.save_pretrained(tmp_path)
    done = run(PRELUDE, str(tmp_path), json.dumps(ORDERS))
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert found == dict.fromkeys(ORDERS, "ImagenCascadePipeline"), done.stderr


def test_names_that_diffusers_has_are_its_own(monkeypatch):
    module = ModuleType("a_module")
    monkeypatch.setitem(sys.modules, "a_module", module)
    module.ImagenPipeline, module.__all__ = 1, ["EDMHeunScheduler"]  # one that is imported, and one that will be
    add_names(module, ("ImagenPipeline", "EDMHeunScheduler", "EDMAdamsScheduler"))
    assert module.ImagenPipeline == 1 and module.EDMAdamsScheduler is diffusers_imagen.EDMAdamsScheduler
    for name in ("EDMHeunScheduler", "nothing"):
        with pytest.raises(AttributeError, match=f"module 'a_module' has no attribute '{name}'"):
            getattr(module, name)
    module.__getattr__ = {"theirs": 2}.__getitem__  # of another package that does the same
    add_names(module, ("ImagenUNetModel",))
    assert module.theirs == 2 and module.ImagenUNetModel is diffusers_imagen.ImagenUNetModel


# The mechanism


def test_a_function_waits_for_a_module(tmp_path, monkeypatch):
    (tmp_path / "awaited_module.py").write_text('"""Doc."""\nvalue = 1\n')
    (tmp_path / "broken_module.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    for name in ("awaited_module", "broken_module"):
        after_import(name, lambda module: seen.append((module.__name__, module.value)))
    assert sys.meta_path.count(FINDER) == 1
    assert importlib.util.find_spec("awaited_module") is not None and seen == []  # to look is not to import
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
            importlib.import_module("broken_module")
    module = importlib.import_module("awaited_module")
    assert seen == [("awaited_module", 1)]
    assert type(module.__loader__) is type(module.__spec__.loader) is type(importlib.util.find_spec("json").loader)
    importlib.import_module("awaited_module")
    after_import("awaited_module", lambda module: seen.append("now"))
    assert seen[1:] == ["now"]
    del sys.modules["awaited_module"], FINDER.waiting["awaited_module"], FINDER.waiting["broken_module"]


def test_other_modules_are_none_of_its_concern():
    assert AwaitedModules().find_spec("json") is None


def test_a_lazy_name_is_looked_up_once(monkeypatch):
    module = ModuleType("a_package")
    monkeypatch.setitem(sys.modules, "a_package", module)
    get, names = lazy_names("a_package", {"json": ("dumps", "missing")})
    assert get("dumps") is json.dumps is module.dumps
    assert {"dumps", "missing"} <= set(names())
    with pytest.raises(AttributeError, match="module 'json' has no attribute 'missing'"):
        get("missing")
