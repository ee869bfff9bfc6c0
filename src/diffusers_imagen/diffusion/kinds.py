"""The kinds of networks and noise levels, by the names that configurations give them."""

from typing import Literal


PredictionType = Literal["epsilon", "sample", "v_prediction"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
NetworkPreconditioning = Literal["edm", "variance_preserving", "discrete"]
