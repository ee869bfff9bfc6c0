import math

import pytest
import torch

from diffusers_imagen.diffusion import augment_low_res, edm


def low_res_and_noise(dtype=torch.float32):
    return torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()


def test_values():
    low_res, noise = low_res_and_noise()
    augmented, conditioning = augment_low_res(low_res, 0.002, noise)
    torch.testing.assert_close(augmented, (low_res + 0.002 * noise) / math.sqrt(0.002**2 + 0.25))
    assert conditioning.tolist() == pytest.approx([math.log(0.002) / 4] * 2)


def test_one_noise_level_a_sample():
    low_res, noise = low_res_and_noise()
    sigma = torch.tensor([0.01, 1.0])
    augmented, conditioning = augment_low_res(low_res, sigma, noise, sigma_data=0.7)
    for index in range(2):
        expected, _ = augment_low_res(low_res, sigma[index], noise, sigma_data=0.7)
        torch.testing.assert_close(augmented[index], expected[index])
    torch.testing.assert_close(conditioning, edm.c_noise(sigma))


def test_images_of_standard_deviation_sigma_data_get_unit_variance():
    generator = torch.Generator().manual_seed(0)
    low_res, noise = torch.randn(2, 4, 3, 64, 64, generator=generator).unbind()
    for sigma in (0.01, 0.5, 4.0):
        assert augment_low_res(0.5 * low_res, sigma, noise)[0].std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images(dtype):
    low_res, noise = low_res_and_noise(dtype)
    augmented, conditioning = augment_low_res(low_res, 0.3, noise)
    assert augmented.dtype == dtype and conditioning.dtype == torch.float32
    torch.testing.assert_close(
        augmented.float(), augment_low_res(low_res.float(), 0.3, noise.float())[0], rtol=0, atol=0.05
    )


def test_bad_arguments():
    low_res, noise = low_res_and_noise()
    with pytest.raises(ValueError, match="`sigma` is 0, but should be above 0"):
        augment_low_res(low_res, 0, noise)
    with pytest.raises(ValueError, match="`noise` is of shape .* of that of `low_res`"):
        augment_low_res(low_res, 0.1, noise[:1])
    with pytest.raises(ValueError, match="2 samples"):
        augment_low_res(low_res, torch.ones(3), noise)
