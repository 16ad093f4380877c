"""Random numbers that depend on what they are for, not on what was drawn before.

A step's noise comes from the seed and the step, an image's crop from the seed, the pass and the image. So a run that
is resumed at any step resumes bit-identically, and the number of worker processes that read images makes no
difference.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers; near ones give unrelated seeds."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes 63 bits


def seed_all(*numbers: int) -> None:
    """Seed Python, numpy and torch on every device."""
    seed = derive_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def isolated_rng(*numbers: int) -> Iterator[None]:
    """In the block, Python's, numpy's and torch's CPU generators are seeded; afterwards they are as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = derive_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
