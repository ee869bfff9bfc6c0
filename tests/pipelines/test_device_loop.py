"""The denoising loop on a simulated accelerator: what it copies between the devices, and where the CPU waits for it."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_imagen import ContinuousDDPMScheduler, EDMAdamsScheduler, EDMHeunScheduler
from diffusers_imagen.pipelines.image_inputs import GivenImages
from diffusers_imagen.pipelines.runner import Runner


DEVICE = torch.device("lazy:0")  # not the CPU; torch can index its tensors without data on any machine
SCHEDULERS = {
    "heun": EDMHeunScheduler(s_churn=10.0),
    "adams": EDMAdamsScheduler(thresholding=True),
    "ddpm": ContinuousDDPMScheduler(thresholding=True),
    "discrete": EDMAdamsScheduler(preconditioning="discrete"),
}
# operations whose results the CPU reads, or whose sizes depend on values
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}


class Log(TorchDispatchMode):
    """Logs operations that wait for the device or use tensors of the CPU, between the calls of networks."""

    def __init__(self):
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.events.append(name)
        if name in ("_local_scalar_dense", "is_nonzero"):
            return True  # the value of a tensor without data
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        if any(tensor.device != DEVICE for tensor in tensors):
            self.events.append(f"{name} on the CPU")
        return result


@pytest.fixture
def simulated(monkeypatch):
    """Lays out the stages of a call on the CPU, as ever, and runs them on the simulated device; returns the log."""

    def run(self: Runner) -> list[str]:
        request, text = self.plan(), self.encode_text()
        monkeypatch.setattr(type(self.pipe), "_execution_device", DEVICE)
        weights = [
            (module, name, weight.data)
            for plan in request.plans
            for unet in plan.stage.unets
            for module in unet.modules()
            for name, weight in module.named_parameters(recurse=False)
        ]
        with FakeTensorMode() as mode, Log() as log:

            def on_device(tensor):
                return None if tensor is None else mode.from_tensor(tensor).to(DEVICE)

            for plan in request.plans:
                plan.scheduler.timesteps = on_device(plan.scheduler.timesteps)
                for unet in plan.stage.unets:
                    unet.register_forward_pre_hook(lambda *_: log.events.append("network"))
            for module, name, weight in weights:
                module._parameters[name] = torch.nn.Parameter(on_device(weight), False)
            text.update({name: on_device(tensor) for name, tensor in text.tensors().items()})
            if request.given is not None:
                request = request._replace(given=GivenImages([mode.from_tensor(x) for x in request.given.pixels]))
            log.events.clear()
            self.run_stages(request, text)
        return log.events

    def simulated(pipe, **kwargs) -> list[str]:
        monkeypatch.setattr(Runner, "run", run)
        return pipe(**kwargs)

    return simulated


def check(events: list[str]) -> None:
    """Nothing from the first call of a network to the last; and afterwards, once, whether all of it was finite."""
    calls = [place for place, event in enumerate(events) if event == "network"]
    assert len(calls) > 1
    assert events[calls[0] :] == ["network"] * len(calls) + ["_local_scalar_dense"]


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_step_neither_waits_nor_copies(simulated, base_pipeline, scheduler):
    base_pipeline.scheduler = scheduler
    interval = {"guidance_interval": (0.1, 3.0), "guidance_rescale": 0.5, "guidance_scale": 3.0}
    check(simulated(base_pipeline, prompt=["a red apple", "a tiger"], num_inference_steps=3, **interval))


def test_tiles_and_slices_neither_wait_nor_copy(simulated, sr_pipeline, picture):
    sr_pipeline.enable_tiling(32, 16)
    sr_pipeline.enable_slicing()
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 48}
    check(simulated(sr_pipeline, prompt=["a red apple", "a tiger"], image=picture, **options))


def test_a_network_that_guides_neither_waits_nor_copies(simulated, cascade):
    cascade.base_guidance_unet = copy.deepcopy(cascade.base_unet)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "guidance_interval": (0.1, 3.0)}
    check(simulated(cascade, prompt="a red apple", output_resolution=16, **options))
