"""Tiles against the whole image."""

import pytest
import torch

from diffusers_imagen.pipelines.tiling import Tiling, blend, make_tiles


SIZES = [((64, 64), (64, 32)), ((40, 56), (16, 8)), ((48, 16), (32, 0)), ((100, 36), (24, 20)), ((16, 16), (64, 32))]


@pytest.mark.parametrize("size, tiling", SIZES)
def test_weights_are_a_partition_of_unity(size, tiling):
    tiles = make_tiles(*size, Tiling(*tiling), torch.device("cpu"))
    total = torch.zeros(size)
    for tile in tiles:
        assert total[tile.rows, tile.columns].shape == tile.weight.shape and (tile.weight > 0).all()
        assert tile.rows.stop <= size[0] and tile.columns.stop <= size[1]
        total[tile.rows, tile.columns] += tile.weight
    torch.testing.assert_close(total, torch.ones(size))
    assert (len(tiles) == 1) == (max(size) <= tiling[0])


def test_blending_the_parts_of_an_image_gives_the_image():
    image = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    tiles = make_tiles(40, 56, Tiling(16, 8), image.device)
    torch.testing.assert_close(blend((image[..., t.rows, t.columns] for t in tiles), tiles, image), image)


def test_one_tile_is_no_tile(sr_pipeline, run, picture):
    whole = run(sr_pipeline, image=picture, guidance_scale=3.0).images  # 64 px
    sr_pipeline.enable_tiling(tile_size=64, overlap=16)
    assert torch.equal(run(sr_pipeline, image=picture, guidance_scale=3.0).images, whole)
    sr_pipeline.disable_tiling()
    assert torch.equal(run(sr_pipeline, image=picture, guidance_scale=3.0).images, whole)


def test_tiles_bound_the_networks_input_and_show_no_seam(sr_pipeline, run, picture):
    shapes = set()
    sr_pipeline.unet.register_forward_pre_hook(lambda module, args: shapes.add(tuple(args[0].shape[-2:])))
    whole = run(sr_pipeline, image=picture, height=96, width=64).images
    assert shapes == {(96, 64)}
    shapes.clear()
    sr_pipeline.enable_tiling(tile_size=32, overlap=16)
    tiled = run(sr_pipeline, image=picture, height=96, width=64).images
    assert shapes == {(32, 32)} and tiled.shape == (1, 3, 96, 64)
    # the network's context ends at a tile's border, but the picture is the same
    assert (tiled - whole).abs().mean() < 0.1 * whole.std()
    # what tiling changes is as smooth across the tiles' borders (multiples of 16) as elsewhere
    for dim, side in ((-2, 96), (-1, 64)):
        steps = (tiled - whole).diff(dim=dim).abs().mean(dim=[0, 1, -3 - dim])
        borders = torch.tensor([(i + 1) % 16 == 0 for i in range(side - 1)])
        assert steps[borders].mean() < 1.5 * steps[~borders].mean()


def test_tiles_serve_guidance_and_slices(sr_pipeline, run, picture, count_calls):
    sr_pipeline.enable_tiling(tile_size=32, overlap=16)
    together = run(sr_pipeline, ["a red apple", "a tiger"], image=picture, guidance_scale=3.0).images
    sr_pipeline.enable_slicing()
    calls = count_calls(sr_pipeline.unet)
    sliced = run(sr_pipeline, ["a red apple", "a tiger"], image=picture, guidance_scale=3.0).images
    torch.testing.assert_close(sliced, together, atol=1e-4, rtol=0)
    assert calls == [2] * (3 * 2 * 9)  # calls, images, tiles


def test_the_base_stage_is_never_tiled(cascade, run):
    shapes = set()
    cascade.base_unet.register_forward_pre_hook(lambda module, args: shapes.add(tuple(args[0].shape[-2:])))
    cascade.enable_tiling(tile_size=8, overlap=4)
    run(cascade)
    assert shapes == {(16, 16)}


@pytest.mark.parametrize(
    "tile_size, overlap, message",
    [
        (31, 8, "`tile_size` is 31, but the network of the stage `sr256` takes multiples of 2"),
        (0, 0, "`tile_size` is 0"),
        (32, 7, "`overlap` is 7, but the network"),
        (32, 32, "`overlap` is 32, but should be below `tile_size`, 32"),
        (32.0, 0, "`tile_size` is 32.0"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(sr_pipeline, tile_size, overlap, message):
    with pytest.raises(ValueError) as error:
        sr_pipeline.enable_tiling(tile_size, overlap)
    assert message in str(error.value)
    assert sr_pipeline.tiling is None
