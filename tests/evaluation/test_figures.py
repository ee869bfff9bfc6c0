"""Distances against torch-fidelity's own figures, closed forms, and torchmetrics called directly on pictures."""

import numpy as np
import pytest
import torch
from accelerate import PartialState
from tiny_evaluation import WIDTH, save_encoder, save_pictures
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from diffusers_imagen.commands.evaluated_data import DataPictures
from diffusers_imagen.evaluation import Distances, Features, frechet_distance, inception_score, kernel_distance
from diffusers_imagen.evaluation.feature_networks import load_features
from diffusers_imagen.evaluation.figures import Figure, figure_of_mean, sample_warnings
from diffusers_imagen.evaluation.nearest import find_nearest


# what torch-fidelity 0.4.0 makes of `some_features`, with subsets of 60
FID, KID, KID_SPREAD = 1.8701151366361692, 0.44623717308044436, 0.14852654488985503


def some_features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(60, 8, generator=generator)
    return drawn, torch.randn(90, 8, generator=generator) * 1.2 + 0.3


def test_distances_are_those_of_torch_fidelity():
    drawn, real = some_features()
    assert frechet_distance(drawn, real).value == pytest.approx(FID, rel=1e-6)
    kernel = kernel_distance(drawn, real)
    assert (kernel.value, kernel.spread) == pytest.approx((KID, KID_SPREAD), rel=1e-6)


def test_the_frechet_distance_is_the_closed_form():
    """By symmetric matrices, as no library computes it: the trace of the root of S1^(1/2) S2 S1^(1/2)."""
    drawn, real = (features.double().numpy() for features in some_features())
    values, vectors = np.linalg.eigh(np.cov(drawn, rowvar=False))
    root = vectors * np.sqrt(values) @ vectors.T
    inner = root @ np.cov(real, rowvar=False) @ root
    traces = np.trace(np.cov(drawn, rowvar=False)) + np.trace(np.cov(real, rowvar=False))
    expected = ((drawn.mean(0) - real.mean(0)) ** 2).sum() + traces - 2 * np.sqrt(np.linalg.eigvalsh(inner)).sum()
    assert frechet_distance(*some_features()).value == pytest.approx(expected, rel=1e-9)


def test_real_pictures_against_themselves_are_the_floor():
    _, real = some_features()
    assert frechet_distance(real, real).value == pytest.approx(0, abs=1e-5)
    kernel = ((real.double() @ real.double().T) / 8 + 1) ** 3
    # of all pictures the same kernel, once without its diagonal and once with it
    expected = 2 * ((kernel.sum() - kernel.trace()) / (90 * 89) - kernel.mean())
    assert kernel_distance(real, real).value == pytest.approx(expected.item(), rel=1e-9)


def test_the_spread_is_that_of_bootstrap_samples():
    drawn, real = some_features()
    figure = frechet_distance(drawn, real, resamples=20)
    assert figure.value == pytest.approx(FID, rel=1e-6)
    assert 0.1 < figure.spread < 1
    assert frechet_distance(drawn, real, resamples=20) == figure
    assert frechet_distance(drawn, real)[1:] == (None, "")


def test_the_inception_score_is_that_of_classes():
    assert inception_score(torch.zeros(50, 7)).value == pytest.approx(1)
    certain = 100 * torch.eye(2).repeat(500, 1)  # two classes, in every split about half
    figure = inception_score(certain)
    assert figure.value == pytest.approx(2, abs=0.03)
    state = torch.random.get_rng_state()
    assert inception_score(certain) == figure
    assert torch.equal(torch.random.get_rng_state(), state)


def test_pictures_get_the_figures_of_torchmetrics_alone(tmp_path, monkeypatch):
    """Our chain of files, shards and features, and torchmetrics given the pictures and the network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("diffusers_imagen.evaluation.features.SHARD", 5)
    network = load_features(save_encoder(tmp_path / "encoder"))
    sets = [
        DataPictures("reference", save_pictures(tmp_path / name, count, seed, captions=False), "train", "image")
        for name, count, seed in (("drawn", 14, 0), ("real", 17, 1))
    ]
    made = [Features(tmp_path / "features", network, one, list(range(len(one))), 32) for one in sets]
    for features in made:
        features.make(PartialState(cpu=True))
    assert len(made[0].shards) == 3
    drawn, real = (features.load()["features"] for features in made)

    class Alone(torch.nn.Module):
        num_features = WIDTH

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return network.network((pixels / 255 - 0.5) / 0.5).pooler_output

    fid, kid = FrechetInceptionDistance(Alone()), KernelInceptionDistance(Alone(), subsets=2, subset_size=14)
    for one, is_real in zip(sets, (False, True)):
        pixels = torch.stack([torch.from_numpy(np.array(one.picture(i))).permute(2, 0, 1) for i in range(14)])
        kid.update(pixels, real=is_real)
        rest = [torch.from_numpy(np.array(one.picture(i))).permute(2, 0, 1)[None] for i in range(14, len(one))]
        fid.update(torch.cat([pixels, *rest]), real=is_real)
    assert frechet_distance(drawn, real).value == pytest.approx(fid.compute().item(), abs=1e-3, rel=1e-3)
    assert kernel_distance(drawn, real[:14]).value == pytest.approx(kid.compute()[0].item(), abs=1e-3)


def test_distances_are_named_for_their_features():
    assert [Distances((), None, 0).label(metric) for metric in ("fid", "kid")] == ["FID", "KID"]
    lite = Distances(("fid", "kid"), "EfficientNet-Lite0", 0)
    drawn, real = ({"features": features} for features in some_features())
    assert list(lite.measure(drawn, real)) == ["FD-EfficientNet-Lite0", "KD-EfficientNet-Lite0"]


def test_what_needs_no_real_pictures_is_measured_without():
    """As `--metrics is` or `nearest` alone."""
    classes = {"features": some_features()[0], "logits": torch.zeros(60, 7)}
    assert Distances(("is",), None, 0).measure(classes, {})["IS"].value == pytest.approx(1)
    assert Distances((), None, 0).measure(classes, {}) == {}


def test_too_few_pictures_are_said():
    distances = Distances(("fid", "kid"), None, 0)
    few = sample_warnings(distances, 500, 30_000, 2048)
    assert [text.split(" of ")[0] for text in few] == ["FID", "KID is from subsets"]
    assert "does not have full rank" in few[0] and "500 images" in few[1]
    assert "biased" in sample_warnings(distances, 5_000, 30_000, 2048)[0]
    assert sample_warnings(distances, 30_000, 30_000, 2048) == []


def test_means_have_their_standard_error():
    figure = figure_of_mean(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (figure.value, figure.spread) == pytest.approx((2.5, np.sqrt(5 / 3) / 2))
    assert figure_of_mean(torch.tensor([1.0])) == Figure(1.0)
    assert Figure(0.1234, 0.1).text() == "0.1234 ± 0.1000" and Figure(27.456).text() == "27.46"


def test_the_nearest_is_the_copy():
    drawn, real = some_features()
    nearest = find_nearest(torch.cat([real[[7, 3]], drawn]), real)
    assert nearest.places[:2].tolist() == [7, 3]
    assert nearest.cosines[:2].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert nearest.cosines[2:].max() < 0.99
