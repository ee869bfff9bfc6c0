"""Images and masks of a caller: arrays, tensors and pictures in [0, 1] or [-1, 1]."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_imagen.pipelines import image_inputs
from diffusers_imagen.pipelines.image_inputs import read_given, read_images, read_masks


RAMP = np.linspace(0, 1, 16).reshape(4, 4)  # what every form below shows


def unit(dtype: str, white: int = 1) -> np.ndarray:
    return (RAMP * white).round().astype(dtype) if white > 1 else RAMP.astype(dtype)


FORMS = {
    "uint8": unit("uint8", 255),
    "uint16": unit("uint16", 65535),
    "uint16 of the other byte order": unit("uint16", 65535).astype(">u2"),
    "int32 of a 16-bit picture": unit("int32", 65535),
    "int64 of bytes": unit("int64", 255),
    "float16": unit("float16"),
    "float32": unit("float32"),
    "float64": unit("float64"),
    "longdouble": unit("longdouble"),
    "signed": RAMP * 2 - 1,
    "with a channel": unit("float32")[..., None],
    "with three channels": np.repeat(unit("uint16", 65535)[..., None], 3, axis=-1),
    "a tensor": torch.from_numpy(RAMP)[None],
    "a tensor of two dimensions": torch.from_numpy(RAMP),
    "bfloat16": torch.from_numpy(RAMP).bfloat16(),
    "a tensor of 16 bits": torch.from_numpy(unit("uint16", 65535)),
    "a tensor with a gradient": torch.from_numpy(RAMP).requires_grad_(),
    "I;16": Image.fromarray(unit("uint16", 65535)),
    "F": Image.fromarray(unit("float32")),
    "L": Image.fromarray(unit("uint8", 255)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_an_image_is_read_alike(form):
    (pixels,) = read_images(form)
    assert pixels.shape == (3, 4, 4) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, torch.from_numpy(RAMP * 2 - 1).float().expand(3, -1, -1), atol=9e-3, rtol=0)


@pytest.mark.parametrize("form", [form for name, form in FORMS.items() if name != "signed"])
def test_every_form_of_a_mask_is_read_alike(form):
    (mask,) = read_masks(form)
    assert mask.shape == (1, 4, 4) and torch.equal(mask[0], torch.from_numpy(RAMP >= 0.5).float())


def test_truth_values_are_black_and_white():
    (pixels,), (mask,) = read_images(np.eye(3, 4, dtype=bool)), read_masks(torch.eye(3, 4).bool())
    assert torch.equal(pixels[0], torch.eye(3, 4) * 2 - 1) and torch.equal(mask[0], torch.eye(3, 4))
    assert torch.equal(read_masks(torch.eye(3, 4).long())[0][0], torch.eye(3, 4))


def test_the_range_is_decided_for_each_image():
    signed, plain = torch.full((3, 4, 4), -0.5), torch.full((3, 4, 4), 0.5)
    picture = Image.new("RGB", (4, 4), (255, 255, 255))
    for images in ([signed, plain, picture], [picture, plain, signed]):
        means = sorted(pixels.mean().item() for pixels in read_images(images))
        assert means == [-0.5, 0, 1]
    assert [pixels.mean().item() for pixels in read_images(torch.stack([plain, signed]))] == [0, -0.5]
    assert [p.mean().item() for p in read_images(torch.stack([plain, signed]).permute(0, 2, 3, 1).numpy())] == [
        0,
        -0.5,
    ]


def three_masks() -> torch.Tensor:
    masks = torch.zeros(3, 4, 6)
    for i in range(3):
        masks[i, :, i] = 1
    return masks


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("form", ["tensor", "array", "list", "with channels"])
def test_masks_without_channels_are_a_batch(count, form):
    masks = torch.cat([three_masks(), three_masks()])[:count]
    forms = {"tensor": masks, "array": masks.numpy(), "list": list(masks), "with channels": masks[:, None]}
    given = read_given(torch.rand(3, 4, 6), forms[form], num_prompts=count)
    assert [tuple(mask.shape) for mask in given.repainted] == [(1, 4, 6)] * count
    assert torch.equal(torch.cat(given.repainted), masks)


def test_a_mask_in_rgb_is_one_where_there_are_not_three_prompts():
    rgb = torch.zeros(3, 4, 6)
    rgb[:, :, 2:] = 1
    for count in (1, 2):
        (mask,) = read_given(torch.rand(3, 4, 6), rgb, num_prompts=count).repainted
        assert torch.equal(mask, rgb[:1])
    (mask,) = read_given(torch.rand(3, 4, 6), rgb[None], num_prompts=3).repainted
    assert torch.equal(mask, rgb[:1])


BAD_IMAGES = {
    "objects": (np.array([[None]]), "`image` is an array of object"),
    "text": (np.array([["a"]]), "`image` is an array of <U1"),
    "complex numbers": (np.eye(4) * 1j, "`image` is an array of complex128"),
    "a complex tensor": (torch.eye(4) * 1j, "`image` is a tensor of .*complex64"),
    "no values": (torch.zeros(3, 4, 4, device="meta"), r"`image` is a tensor without values \(on the meta device\)"),
    "a sparse tensor": (torch.eye(4).to_sparse(), "`image` is a tensor of torch.sparse_coo"),
    "a number": (np.array(1.0), r"`image` has shape \(1,\)"),
    "a row": (np.zeros(3), r"`image` has shape \(1, 3\)"),
    "five dimensions": (np.zeros((1, 1, 3, 4, 4)), "`image` has shape"),
    "an empty batch": (np.zeros((0, 4, 4, 3)), r"`image` has shape \(0, 4, 4, 3\), which is an empty batch"),
    "no pixels": (Image.new("RGB", (0, 4)), "`image` "),
    "opacity": (np.zeros((4, 4, 4), np.uint8), r"`image` has shape \(4, 4, 4\)"),
    "NaN": (np.full((4, 4), np.nan), "`image` has values that are not finite"),
    "NaN in a picture": (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "`image` cannot be used: 16 of its 16"),
    "32 bits": (np.full((4, 4), 70000), "`image` cannot be used: it has integers from 70000"),
    "an empty list": ([], "`image` is an empty list"),
    "a list of names": (["a.png"], "`image` is of class str"),
    "a list of nothing": ([None], "`image` is of class NoneType"),
}


@pytest.mark.parametrize("image, message", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_what_is_no_image_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        read_images(image)


@pytest.mark.parametrize("read, name", [(read_images, "image"), (read_masks, "mask_image")])
def test_a_picture_that_would_fill_the_memory_is_refused_before_it_is_converted(read, name, monkeypatch):
    """The arrays and tensors here take no memory: all their values are one."""
    for image in (np.broadcast_to(np.uint8(0), (20000, 20000, 3)), torch.zeros(1).expand(3, 20000, 20000)):
        with pytest.raises(ValueError, match=rf"`{name}` has shape .*20000, 20000.* at most 134217728 pixels"):
            read(image)
    monkeypatch.setattr(image_inputs, "MAX_PIXELS", 6)
    assert read(Image.new("L", (3, 2)))[0].shape[-2:] == (2, 3)
    with pytest.raises(ValueError, match=rf"`{name}` has shape \(2, 4\), but should have at most 6 pixels"):
        read([Image.new("L", (3, 2)), Image.new("L", (4, 2))])


def test_a_damaged_picture_is_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match="`mask_image` cannot be used: OSError: image file is truncated"):
        read_masks(Image.open(tmp_path / "a.png"))
