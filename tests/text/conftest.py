"""The fixtures of training, and a pipeline."""

from training_fixtures import *  # noqa: F403
