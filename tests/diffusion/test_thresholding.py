import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_imagen.diffusion.thresholding import dynamic_threshold, static_threshold


def images(scale=(0.2, 1.0, 4.0), size=16, dtype=torch.float32):
    noise = torch.randn(len(scale), 3, size, size, generator=torch.Generator().manual_seed(0))
    return (noise * torch.tensor(scale).reshape(-1, 1, 1, 1)).to(dtype)


def test_static():
    x_0 = images()
    assert torch.equal(static_threshold(x_0), x_0.clamp(-1, 1))
    assert torch.equal(static_threshold(x_0, 0.5), x_0.clamp(-0.5, 0.5))


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.995, 0.99999, 1.0])
@pytest.mark.parametrize("max_value", [None, 1.0, 1.5])
def test_dynamic_is_that_of_diffusers(ratio, max_value):
    x_0 = images()
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=max_value)
    torch.testing.assert_close(dynamic_threshold(x_0, ratio, max_value), scheduler._threshold_sample(x_0))


def test_dynamic_is_per_image_and_leaves_tame_images_alone():
    x_0 = images()
    thresholded = dynamic_threshold(x_0)
    torch.testing.assert_close(thresholded[0], x_0[0].clamp(-1, 1))
    assert thresholded.abs().amax(dim=(1, 2, 3))[1:].tolist() == [1.0, 1.0]
    torch.testing.assert_close(dynamic_threshold(x_0[2:]), thresholded[2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dynamic_in_other_dtypes(dtype):
    x_0 = images(dtype=dtype)
    thresholded = dynamic_threshold(x_0)
    assert thresholded.dtype == dtype
    torch.testing.assert_close(thresholded.float(), dynamic_threshold(x_0.float()), rtol=1e-2, atol=1e-3)


def test_dynamic_beyond_sixteen_million_elements():
    x_0 = images(scale=(0.5, 1, 2, 3, 4, 5), size=1024, dtype=torch.float16)
    thresholded = dynamic_threshold(x_0)
    torch.testing.assert_close(thresholded[5], dynamic_threshold(x_0[5:])[0])
    # the 0.995 quantile of |Normal(0, 5^2)| is 2.807 times 5
    assert (x_0[5, :, :64, :64] / thresholded[5, :, :64, :64]).median().item() == pytest.approx(14.04, rel=0.01)


def test_small_and_odd_shapes():
    torch.testing.assert_close(dynamic_threshold(torch.tensor([[-4.0]])), torch.tensor([[-1.0]]))
    assert dynamic_threshold(torch.randn(2, 5)).shape == (2, 5)


@pytest.mark.parametrize("settings", [{"ratio": 0.0}, {"ratio": 1.5}, {"max_value": 0.5}])
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=f"is {list(settings.values())[0]}, but"):
        dynamic_threshold(torch.zeros(1, 3, 2, 2), **settings)
