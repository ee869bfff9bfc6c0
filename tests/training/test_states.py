"""States that are not those of an optimizer are refused when they are loaded, not at the next step."""

import pytest
import torch

from diffusers_imagen.training.states import OptimizerState


def stepped(value: float) -> torch.optim.AdamW:
    parameter = torch.nn.Parameter(torch.full((2, 3), value))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.full((2, 3), value)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"exp_avg": {}}, "exp_avg is of class dict, but should be a tensor"),
        ({"exp_avg_sq": None}, "exp_avg_sq is of class NoneType"),
        ({"step": []}, "step is of class list"),
        ({"step": torch.zeros(2)}, "step has shape"),
        ({"exp_avg": torch.zeros(3, 2)}, "exp_avg has shape"),
        ({"more": torch.zeros(2, 3)}, "parameter 0 has .*'more'.*, but should have"),
        ({"exp_avg": ...}, r"parameter 0 has \['exp_avg_sq', 'step'\], but should have"),
    ],
)
def test_malformed_moments_are_refused(change, what):
    state = OptimizerState(stepped(2.0)).state_dict()
    moments = {name: value for name, value in {**state["moments"][0], **change}.items() if value is not ...}
    with pytest.raises(ValueError, match=what):
        OptimizerState(stepped(1.0)).load_state_dict({**state, "moments": {0: moments}})


def test_moments_are_loaded():
    optimizer = stepped(1.0)
    OptimizerState(optimizer).load_state_dict(OptimizerState(stepped(2.0)).state_dict())
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], torch.full((2, 3), 0.2))
