"""A compiled network in a pipeline has a graph for each batch size; test_gpu_compiled.py has all published kinds."""

import pytest
import torch


@pytest.mark.compile
def test_steps_prompts_and_seeds_lead_to_no_other_graph(base_pipeline, run):
    options = {"guidance_scale": 3.0, "guidance_interval": (0.1, 3.0), "num_inference_steps": 3}
    prompts = ["a red apple", "a tiger"]
    expected = run(base_pipeline, prompts, **options).images
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    base_pipeline.unet = torch.compile(base_pipeline.unet, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(base_pipeline, prompts, **options).images, expected, atol=1e-5, rtol=1e-5)
    # with guidance in the middle, and without in the first and the last steps
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(1)}
        run(base_pipeline, ["a blue face", "a red face of a tiger"], **{**options, **other})
        base_pipeline.enable_slicing(2)
        run(base_pipeline, [*prompts, *prompts], **options)
    torch._dynamo.reset()
