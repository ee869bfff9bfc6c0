"""Random permutations whose entries are computed one by one: of 400 million rows no list is kept."""

import math

import numpy as np


ROUNDS = 8


class Permutation:
    """A random permutation of `range(count)`, of which any part is computed without the rest.

    It is the generalized Feistel network of Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 4.3,
    on pairs below `a` and `b`, where `a * b` is `count` or a few more: an image above `count` is mapped on until one is
    below. The round function is a multiply-xorshift hash, which mixes well but keeps no secret.

    Args:
        count (`int`): Its length, 1 or more.
        key (`np.ndarray`): Integers that tell it from others, such as those of `slot_draws.philox_key`.
    """

    def __init__(self, count: int, key: np.ndarray):
        self.count = count
        a = math.isqrt(count - 1) + 1
        self.sides = (a, -(-count // a))
        self.keys = np.random.SeedSequence(key.tolist()).generate_state(ROUNDS, np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """The entries at `places`, any shape of int64 in `range(count)`."""
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
    """Hash of 64 bits: the finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators", figure 16)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
