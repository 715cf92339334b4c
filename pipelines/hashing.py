"""Our own counter-based random numbers: the same on every machine and in every NumPy version.

NumPy promises no stable streams across versions (NEP 19); a saved run must continue years later.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1

Word = ArrayLike
"""An integer, or an integer array that broadcasts against the others."""


def hash_words(*words: Word, after: NDArray[np.uint64] | None = None) -> NDArray[np.uint64]:
    """One 64-bit hash for each element of the broadcast of `words`; word order matters.

    Each word is absorbed through splitmix64's finaliser (Steele, Lea, Flood 2014, figure 12).

    Args:
        after: the hash of words that many hashes share and that come before these ones:
            `hash_words(b, after=hash_words(a))` is `hash_words(a, b)`.
    """
    state = np.zeros(1, dtype=np.uint64) if after is None else after
    for word in words:
        state = _mix((state ^ _as_uint64(word)) + _GOLDEN)
    return state


def uniform(*words: Word, after: NDArray[np.uint64] | None = None) -> NDArray[np.float64]:
    """Uniform in [0, 1), a multiple of 2^-53, for each element of the broadcast of `words`."""
    return (hash_words(*words, after=after) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))


def _as_uint64(word: Word) -> NDArray[np.uint64]:
    # Arrays of one element instead of scalars: scalars warn when they wrap around, as they must.
    if isinstance(word, int):
        return np.array([word & _MASK], dtype=np.uint64)
    return np.atleast_1d(np.asarray(word)).astype(np.uint64)
