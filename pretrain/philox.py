"""Counter-based random numbers in numpy: many keys at once, no state.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): a block of four 32-bit words is
a function of a 128-bit counter and a 64-bit key alone. numpy's own Philox makes one generator per key, which for a few
dozen numbers costs more than decoding a small image.
"""

import numpy as np

ROUNDS = 10
# Rows of the state are handled in pairs: word 0 with word 2, word 1 with word 3.
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)[:, None]
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)[:, None]
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counters: np.ndarray, *, key: int) -> np.ndarray:
    """Random words.

    Args:
        counters: integers in [0, 2**32), `(4, ...)`; the first row is the lowest word.
        key: its lowest 64 bits count.

    Returns:
        uint64 in [0, 2**32), `(4, ...)`, the block of each counter.
    """
    shape, state = counters.shape, counters.astype(np.uint64).reshape(4, -1)
    keys = np.array([[key & 0xFFFFFFFF], [key >> 32 & 0xFFFFFFFF]], dtype=np.uint64)
    even, odd = state[0::2], state[1::2]
    for _ in range(ROUNDS):
        product = even * _MULTIPLIERS
        even = (product >> _HALF)[::-1] ^ odd ^ keys
        odd = (product & _LOW)[::-1]
        keys = (keys + _KEY_STEPS) & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]]).reshape(shape)


def uniforms(counters: np.ndarray, *, key: int) -> np.ndarray:
    """float64 in [0, 1), steps of 2**-32, `(4, ...)`; see `philox`."""
    return philox(counters, key=key) * 2.0**-32
