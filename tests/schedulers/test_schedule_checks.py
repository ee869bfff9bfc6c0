"""Single faults in what a scheduler is given: a ValueError that names it."""

import decimal
import inspect
import math

import numpy as np
import pytest
import torch

from diffusers_imagen import ContinuousDDPMScheduler, EDMAdamsScheduler, EDMHeunScheduler


SCHEDULERS = [EDMHeunScheduler, EDMAdamsScheduler, ContinuousDDPMScheduler]
NO_VALUES = [math.nan, -math.inf, -1, "3", b"3", [], {}, 2j, decimal.Decimal(3), 10**400, object(), [1], range(2)]
NO_VALUES += [np.float64("nan"), np.array([1, 2]), torch.tensor([1, 2])]
NO_LEVELS = [math.nan, "a", 3, [math.nan], ["80"], [[80.0]], [], [None], [True], [2.0, 2.0], [10**400], [2j]]
NO_LEVELS += [[80.0] * 20_000, np.array([[8.0]]), torch.tensor(3.0), torch.ones(1, device="meta"), {"a": 1}, object()]
IMAGES = torch.zeros(2, 3, 4, 4)
NO_IMAGES = [None, 3, "x", [], np.zeros((2, 3, 4, 4)), IMAGES.int(), IMAGES.bool(), IMAGES + 1j, IMAGES[:1]]
NO_IMAGES += [torch.zeros(()), IMAGES.to("meta")]
NO_TIMES = [None, "x", b"x", True, 2j, object(), 10**400, torch.zeros(0), torch.zeros(3), torch.tensor(1j)]
NO_TIMES += [torch.zeros(2, 2), torch.tensor(0.0, device="meta"), torch.tensor(True)]


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_faults_of_a_configuration_are_named(scheduler_class):
    for name in list(inspect.signature(scheduler_class).parameters):
        for value in NO_VALUES:
            with pytest.raises(ValueError, match=f"`{name}`"):
                scheduler_class(**{name: value})
    with pytest.raises(ValueError, match="`num_train_timesteps` is 1000000000, but should be an integer"):
        scheduler_class(num_train_timesteps=10**9)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_numbers_of_numpy_are_saved_as_numbers(scheduler_class, tmp_path):
    scheduler = scheduler_class(num_train_timesteps=np.int64(100), sigma_data=np.float32(0.25))
    scheduler.save_pretrained(tmp_path)
    loaded = scheduler_class.from_pretrained(tmp_path)
    assert loaded.config.num_train_timesteps == 100 and loaded.config.sigma_data == 0.25


@pytest.mark.parametrize("config", [{}, {"preconditioning": "discrete"}])
@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_faults_of_a_schedule_are_named(scheduler_class, config):
    scheduler = scheduler_class(**config)
    faults = {
        "num_inference_steps": NO_VALUES + [0, 0.5, True, 10**9, math.inf],
        "sigmas": NO_LEVELS + [[1e308, 1.0], [1.0, 80.0]],
        "timesteps": NO_LEVELS,
    }
    for name, values in faults.items():
        for value in values:
            with pytest.raises(ValueError, match=f"`{name}`"):
                scheduler.set_timesteps(**{name: value})
    for device in ("nonsense", "cuda:99", [], object()):
        with pytest.raises(ValueError, match="`device`"):
            scheduler.set_timesteps(3, device=device)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_faults_of_a_step_are_named(scheduler_class):
    scheduler = scheduler_class(**({"s_churn": 5.0} if scheduler_class is EDMHeunScheduler else {}))
    scheduler.set_timesteps(3)
    faults = {"model_output": NO_IMAGES, "sample": NO_IMAGES, "timestep": NO_TIMES}
    if scheduler_class is not EDMAdamsScheduler:
        faults["generator"] = ["seed", 0, [None], (torch.Generator(),), [torch.Generator()], np.random.default_rng(0)]
    for name, values in faults.items():
        for value in values:
            given = {"model_output": IMAGES, "timestep": scheduler.timesteps[0], "sample": IMAGES, name: value}
            with pytest.raises(ValueError, match=name):
                scheduler.step(**given)
    for index in (-1, 0.5, "0", None, True, 10**9, [0]):
        with pytest.raises(ValueError, match="`begin_index`"):
            scheduler.set_begin_index(index)


@pytest.mark.parametrize("config", [{}, {"preconditioning": "discrete"}])
@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_faults_of_noise_are_named(scheduler_class, config):
    given = {"original_samples": IMAGES, "noise": IMAGES, "timesteps": torch.tensor([0.5])}
    for name, values in {"original_samples": NO_IMAGES, "noise": NO_IMAGES, "timesteps": NO_TIMES}.items():
        for value in values:
            with pytest.raises(ValueError, match=f"`{name}"):
                scheduler_class(**config).add_noise(**{**given, name: value})
