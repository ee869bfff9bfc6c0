import json
import sys

import pytest
import torch
from diffusers.models import attention_dispatch
from PIL import Image
from script_modules import script_module
from transformers import T5Config


TINY = (
    "sample_size=8 block_out_channels=(8,16) layers_per_block=1 attention_resolutions=(4,) attention_head_dim=8 "
    "encoder_hid_dim=16 cross_attention_dim=8 norm_num_groups=4 time_embedding_dim=16"
).split()


@pytest.fixture(scope="module")
def benchmark():
    with script_module("benchmark") as module:
        yield module


@pytest.fixture
def measures(benchmark):
    return sys.modules["benchmark_measures"]


@pytest.fixture
def unets(benchmark):
    return sys.modules["benchmark_unet"]


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleeping(self, seconds: float):
        def call():
            self.now += seconds

        return call


def group(measures, name: str, cases: dict, flops: int = 0, weights: int = 0):
    made = [measures.Case(system, lambda call=call: call, 10**9) for system, call in cases.items()]
    return measures.Group("step", name, 2, lambda: made, flops, weights)


def test_two_systems_on_a_tiny_preset(benchmark, tmp_path, capsys):
    options = (
        "--what step training stage --steps 2 2 --systems ours plain --presets emoji_base_64 --tokens 4 --repeats 3"
    )
    benchmark.main([*options.split(), "--device", "cpu", "--output_dir", str(tmp_path / "out"), "--override", *TINY])
    record = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    found = [(row["what"], row["system"]) for row in record["rows"]]
    step = [("step", name) for name in ("ours", "ours, text every call", "plain")]
    assert sorted(found) == sorted([*step, ("training", "ours"), ("training", "plain"), ("stage", "ours")])
    assert record["machine"]["matrix_tflop_per_s"] > 0 and record["machine"]["torch"] == torch.__version__
    for row in record["rows"]:
        assert row["error"] is row["left_out"] is None and row["rounds"] == 3
        assert 0 < row["low_ms"] <= row["ms"] <= row["high_ms"]
        assert row["images_per_s"] == pytest.approx(1000 / row["ms"])
        assert row["tflop_per_s"] == pytest.approx(row["gflop"] / row["ms"])
    gflop = {(row["what"], row["system"]): row["gflop"] for row in record["rows"]}
    assert gflop["stage", "ours"] == pytest.approx(3 * gflop["step", "ours"])  # two steps of Heun's method
    table = (tmp_path / "out" / "benchmark.md").read_text()
    assert capsys.readouterr().out == table and table.count("\n| step |") == 3 and table.count("\n| training |") == 2
    with Image.open(tmp_path / "out" / "benchmark.png") as plot:
        assert plot.format == "PNG" and plot.width == 900


def predict(unets, preset, settings) -> dict[str, torch.Tensor]:
    """Return the prediction of each system, with weights none of which is zero."""
    torch.manual_seed(0)
    networks = unets.Networks(preset, settings, 2)
    with torch.no_grad():
        for parameter in networks.unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return {case.system: case.build()() for case in networks.cases("predict")}


def test_systems_with_the_same_weights_predict_the_same(unets, benchmark):
    settings = benchmark.Settings(
        torch.device("cpu"),
        torch.float32,
        systems=("ours", "plain"),
        memory_formats=("channels_last", "contiguous"),
        attention_backends=("_native_math",),
        tokens=4,
        overrides=benchmark.read_overrides(TINY),
    )
    predictions = predict(unets, "emoji_base_64", settings)
    active, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    assert active == attention_dispatch.AttentionBackendName.NATIVE  # with which the other systems are measured
    expected = predictions.pop("ours")
    assert set(predictions) == {"ours, contiguous", "ours, text every call", "ours, _native_math", "plain"}
    for given in predictions.values():
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)


def test_deepfloyd_predicts_the_same(unets, benchmark):
    overrides = {"sample_size": 16, "block_out_channels": (32, 64, 64, 64), "layers_per_block": 1}
    overrides |= {"attention_head_dim": 8, "encoder_hid_dim": 64}
    systems = ("ours", "plain", "deepfloyd")
    settings = benchmark.Settings(torch.device("cpu"), torch.float32, systems, tokens=4, overrides=overrides)
    predictions = predict(unets, "IF-I-M", settings)
    expected = predictions.pop("ours")
    assert set(predictions) == {"ours, text every call", "plain", "deepfloyd"} and expected.std() > 0.01
    for given in predictions.values():
        torch.testing.assert_close(given, expected, atol=1e-3, rtol=1e-3)
    pipelines = sys.modules["benchmark_pipelines"]
    settings.steps = (1, 1)
    stages = {case.system: case.build()() for case in pipelines.Sampler(("IF-I-M",), settings, 2).cases()}
    assert set(stages) == {"ours", "deepfloyd"}
    assert all(stage.images.shape == (2, 3, 16, 16) for stage in stages.values())


def test_entries_that_deepfloyd_does_not_have(unets):
    with pytest.raises(ValueError, match="`attention_resolutions` is not an entry of the configuration of IF-I-M"):
        unets.create_deepfloyd("IF-I-M", {"attention_resolutions": (8,)})


def test_importing_imagen_pytorch_downloads_nothing(unets):
    original = T5Config.from_pretrained
    with unets.offline_t5():
        assert T5Config.from_pretrained("google/t5-v1_1-base").d_model == T5Config().d_model
    assert T5Config.from_pretrained == original


def test_rows_are_written_as_they_come(benchmark, measures, tmp_path):
    machine = {"device": "a", "threads": 1, "torch": "2", "date": "today", "clock": "wall", "dtype": "float32"}
    report = benchmark.Report(tmp_path / "out", "benchmark.py", {**machine, "matrix_tflop_per_s": 1.0})
    for name in ("first", "second"):
        report.add(measures.Row("step", name, 1, "ours", error="no kernel"))
        rows = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
        assert rows[-1]["preset"] == name and len(rows) == len(report.rows)
        assert f"- step, {name}, batch 1, ours: no kernel" in (tmp_path / "out" / "benchmark.md").read_text()


def test_the_plot_has_a_bar_for_each_system(benchmark, measures, tmp_path):
    plot = sys.modules["benchmark_plot"]
    failed = measures.Row("step", "a", 1, "ours", error="no kernel")
    assert not plot.draw_plot(tmp_path / "none.png", [failed]) and not (tmp_path / "none.png").exists()
    times = {"ms": 2.0, "low_ms": 1.5, "high_ms": 3.0}
    rows = [measures.Row("step", name, 1, system, **times) for name in "ab" for system in ("ours", "plain")]
    assert plot.draw_plot(tmp_path / "plot.png", [failed, *rows])
    with Image.open(tmp_path / "plot.png") as image:
        assert image.height == round(100 * 2 * (plot.PANEL_HEIGHT + 2 * plot.ROW_HEIGHT))
    assert plot.label(rows[0]) == "2 ms"


def test_the_matrix_rate_is_of_the_clock(measures):
    ticks = iter(range(100))
    rate = measures.matrix_rate(torch.device("cpu"), torch.float32, size=8, clock=lambda: float(next(ticks)))
    assert rate == 2 * 8**3  # a second for each product


def test_flops_are_those_of_the_formula(measures):
    batch, tokens, width, heads = 3, 5, 8, 2
    linear = torch.nn.Linear(width, 7, device="meta")
    conv = torch.nn.Conv2d(4, 6, 3, padding=1, device="meta")
    query = torch.zeros(batch, heads, tokens, width, device="meta")
    assert measures.count_flops(lambda: linear(torch.zeros(batch, width, device="meta"))) == 2 * batch * width * 7
    assert measures.count_flops(lambda: conv(torch.zeros(2, 4, 8, 8, device="meta"))) == 2 * 2 * 64 * 4 * 9 * 6
    attention = torch.nn.functional.scaled_dot_product_attention
    count = measures.count_flops(lambda: attention(query, query, query))
    assert count == 2 * (2 * batch * heads * tokens * tokens * width)  # scores, and sums of values


def test_the_plain_form_counts_the_text_twice_and_training_both_passes(unets, benchmark):
    settings = benchmark.Settings(
        torch.device("cpu"), torch.float32, tokens=4, overrides=benchmark.read_overrides(TINY)
    )
    networks = unets.Networks("emoji_base_64", settings, 1)
    guided, training = networks.count("predict"), networks.count("train")
    every_call = networks.count("predict", unets.TextEveryCall)
    plain = networks.count("predict", unets.Plain, unets.weightless(networks.meta()))
    assert guided < every_call == plain
    assert 2.5 * every_call / 2 < training < 3.5 * every_call / 2


@pytest.mark.parametrize("flops", [1, 16, 20, 21, 64, 70, 110, 144, 999])
def test_the_share_of_the_widths_with_the_nearest_flops(unets, flops):
    expected = min(range(4, 13), key=lambda eighths: abs(eighths**2 - flops))
    assert unets.nearest_share(lambda eighths: eighths**2, flops) == expected


def test_a_failing_system_is_a_row(measures):
    calls = 0

    def breaks_later():
        nonlocal calls
        calls += 1
        if calls > 2:
            raise RuntimeError("no\nkernel")

    def breaks_at_once():
        raise ImportError("not installed")

    meter = measures.Meter(torch.device("cpu"), 1e12, repeats=3)
    cases = {"ours": lambda: None, "later": breaks_later, "at once": breaks_at_once}
    rows = meter.run([group(measures, "a", cases)], measures.Budget(60), lambda row: None)
    by_system = {row.system: row for row in rows}
    assert by_system["ours"].rounds == 3 and by_system["ours"].error is None
    assert by_system["later"].error == "RuntimeError: no kernel"
    assert by_system["at once"].error == "ImportError: not installed"
    text = measures.to_markdown(rows)
    assert "| step | a | 2 | ours |" in text and "| later |" not in text
    assert "- step, a, batch 2, at once: ImportError: not installed\n" in text


def test_what_does_not_fit_into_the_budget_is_listed(measures):
    clock = Clock()
    meter = measures.Meter(torch.device("cpu"), 1e9, repeats=100, clock=clock)
    budget = measures.Budget(60, clock)
    large = group(measures, "large", {"ours": clock.sleeping(1)}, flops=10**12)
    assert budget.reason_against(large, 1e9, None) == "it takes 8000 s at least, and 60 s were left"
    groups = [
        group(measures, "first", {"ours": clock.sleeping(1), "slow": clock.sleeping(2)}),
        group(measures, "second", {"ours": clock.sleeping(10), "other": clock.sleeping(1)}, flops=10),
        group(measures, "third", {"ours": clock.sleeping(1)}, flops=20),
    ]
    rows = meter.run(groups, budget, lambda row: None)
    first = [row for row in rows if row.preset == "first"]
    # a third of 60 s: 3 s for the warm-up, and rounds of 3 s until one ends after it
    assert [(row.system, row.rounds, row.ms) for row in first] == [("ours", 6, 1000.0), ("slow", 6, 2000.0)]
    assert {(row.preset, row.system) for row in rows if row.left_out} == {("third", "all")}
    assert "Left out:\n\n- step, third, batch 2, all: no time was left\n" in measures.to_markdown(rows)


def test_weights_that_do_not_fit_into_memory_are_not_begun(measures):
    budget, entry = measures.Budget(60), group(measures, "a", {}, weights=3 * 2**30)
    assert budget.reason_against(entry, 1e12, 2**31) == "its weights take 3.0 GiB, and 2.0 GiB are free"
    assert budget.reason_against(entry, 1e12, 2**32) is budget.reason_against(entry, 1e12, None) is None


def test_peak_memory_of_a_call(measures):
    def call():
        a = torch.ones(2**18)  # 1 MiB
        return a + a

    assert measures.peak_memory(call, torch.device("cpu")) == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "-1"], "`minutes` is -1"),
        (["--override", "layers_per_block"], "`override` is 'layers_per_block'"),
        (["--override", "layers_per_block=print(1)"], "`override` is 'layers_per_block=print\\(1\\)'"),
    ],
)
def test_bad_options(benchmark, options, message):
    with pytest.raises(ValueError, match=message):
        benchmark.main(["--device", "cpu", *options])


def test_parts_are_measured_by_themselves(benchmark):
    kernels = sys.modules["benchmark_kernels"]
    settings = benchmark.Settings(torch.device("cpu"), torch.bfloat16)
    ours, plain = (case.build() for case in kernels.normalization_cases((2, 16, 4, 4), settings))
    ours(), plain()
    cases = kernels.decoding_cases(128, 16)
    assert [case.system for case in cases] == ["ours", "full decode"]
    assert [image.shape for image in cases[0].build()()] == [(16, 16, 3)] * kernels.FILES
    assert float(cases[0].note.split()[1]) > 35


def test_every_image_of_the_data_is_read(benchmark, monkeypatch):
    import benchmark_data as data

    monkeypatch.setattr(data, "ROWS", 8)
    monkeypatch.setattr(data, "BATCH", 4)
    monkeypatch.setattr(data, "WIDTH", 8)
    monkeypatch.setitem(data.TASKS, "64 -> 64", {"source": 32, "resolution": 16})
    cases = data.data_cases("64 -> 64")
    assert [case.system for case in cases] == ["files", "tar", "parquet", "files, text", "tar, text"]
    for case in cases:
        read = case.build()
        read()
        assert read.stream.images_seen == 8 and read.stream.device.type == "meta"
