import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from diffusers_imagen.diffusion.guidance import classifier_free_guidance, rescale_guidance


def predictions(dtype=torch.float32):
    return torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()


def test_scales_0_and_1_are_the_two_predictions():
    cond, uncond = predictions()
    torch.testing.assert_close(classifier_free_guidance(cond, uncond, 1.0), cond)
    assert torch.equal(classifier_free_guidance(cond, uncond, 0.0), uncond)


def test_one_scale_a_sample():
    cond, uncond = predictions()
    guided = classifier_free_guidance(cond, uncond, torch.tensor([1.0, 3.0, 7.5]))
    for index, scale in enumerate((1.0, 3.0, 7.5)):
        torch.testing.assert_close(guided[index], classifier_free_guidance(cond, uncond, scale)[index])
    cond, uncond = predictions(torch.bfloat16)
    assert classifier_free_guidance(cond, uncond, torch.tensor(3.0)).dtype == torch.bfloat16


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_is_that_of_diffusers(rescale):
    cond, uncond = predictions()
    guided = classifier_free_guidance(cond, uncond, 7.0)
    rescaled = rescale_guidance(guided, cond, rescale)
    torch.testing.assert_close(rescaled, rescale_noise_cfg(guided, cond, guidance_rescale=rescale))
    if rescale == 1.0:
        torch.testing.assert_close(rescaled.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))


def test_bad_arguments():
    cond, uncond = predictions()
    with pytest.raises(ValueError, match="`uncond` is of shape .* of that of `cond`"):
        classifier_free_guidance(cond, uncond[:1], 2.0)
    with pytest.raises(ValueError, match="3 samples"):
        classifier_free_guidance(cond, uncond, torch.ones(2))
    with pytest.raises(ValueError, match="`rescale` is 1.5, but"):
        rescale_guidance(cond, cond, 1.5)
