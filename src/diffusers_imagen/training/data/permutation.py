"""Random permutations whose entries are computed on demand, without a list, for hundreds of millions of rows."""

import math

import numpy as np


ROUNDS = 8


class Permutation:
    """A random permutation of `range(count)`, any entry of which is computed without the others.

    It is the generalized Feistel network of Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section
    4.3, on pairs below `a` and `b`, where `a * b` is `count` or slightly larger: values of `count` or more are mapped
    again until they are smaller. The round function is a multiply-xorshift hash, which is not cryptographic.

    Args:
        count (`int`): Its length, 1 or more.
        key (`np.ndarray`): Integers that determine the permutation, such as those of `slot_draws.philox_key`.
    """

    def __init__(self, count: int, key: np.ndarray):
        self.count = count
        a = math.isqrt(count - 1) + 1
        self.sides = (a, -(-count // a))
        self.keys = np.random.SeedSequence(key.tolist()).generate_state(ROUNDS, np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Return the entries at `places`, any shape of int64 in `range(count)`."""
        entries = self._step(places)
        while (outside := entries >= self.count).any():
            entries[outside] = self._step(entries[outside])
        return entries

    def _step(self, values: np.ndarray) -> np.ndarray:
        a, b = map(np.uint64, self.sides)
        left, right = np.divmod(values.astype(np.uint64), b)
        for i, key in enumerate(self.keys):
            if i % 2:
                right = (right + mix(left ^ key) % b) % b
            else:
                left = (left + mix(right ^ key) % a) % a
        return (left * b + right).astype(np.int64)


def mix(values: np.ndarray) -> np.ndarray:
    """Hash 64-bit integers by the finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
    number generators", figure 16)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
