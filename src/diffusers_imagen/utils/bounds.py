"""Bounds of arguments, beyond all useful values, so that a typo does not start an endless run; and of noise levels."""

MAX_STEPS = 10_000
MAX_NOISE_LEVEL = 1e6
MAX_GUIDANCE = 1e6
# width of an average of weights as a fraction of the run: from less than a step to more than the method supports
MIN_STD, MAX_STD = 1e-6, 0.25
MIN_AUGMENTATION_SIGMA = 0.002  # NeMo's at inference; the conditioning value of 0 would be infinite
