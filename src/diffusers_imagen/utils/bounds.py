"""Bounds of what one call may ask for, beyond use and below what would run until it is killed, and of noise levels."""

MAX_STEPS = 10_000
MAX_NOISE_LEVEL = 1e6
MAX_GUIDANCE = 1e6
# of the width of an average of weights, as a share of the run: narrower than a step of any, and wider than the method has
MIN_STD, MAX_STD = 1e-6, 0.25
MIN_AUGMENTATION_SIGMA = 0.002  # NeMo's at inference; the conditioning value of 0 would be infinite
