"""Which batch sizes decode graphs are captured for, and how a smaller batch is padded to one. Pure.

A padding row computes token 0 at position 0 into scratch block 0, with a context of one and without experts:
it costs less than a row of an empty sequence, and touches nothing of anybody's. Shape letters: B rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from replicas.rank.batch import Draw, FlatStep, Ints
from replicas.rank.sampler import row_key

STRIDE = 8
"""Beyond this size, buckets are this far apart: at most 7 rows of padding."""
TOKEN, POSITION, SLOT, ROW, KEY, TEMPERATURE = range(6)
"""The words of a row. KEY is two int32 halves, TEMPERATURE the bits of a float64."""
NUM_WORDS = 6


def bucket_sizes(most_rows: int) -> tuple[int, ...]:
    """Ascending, the last is `most_rows`. Powers of two up to 8, then every eighth number."""
    sizes = {1, 2, 4, STRIDE, *range(2 * STRIDE, most_rows, STRIDE), most_rows}
    return tuple(sorted(size for size in sizes if size <= most_rows))


def chunk_sizes(most_tokens: int) -> tuple[int, ...]:
    """Prompt chunks to warm up with, ascending: kernels are compiled for ranges of sizes, which begin and end
    at powers of two. One that is first met while serving would keep every stream waiting for seconds.

    >>> chunk_sizes(20)
    (2, 4, 8, 16, 20)
    """
    powers = (1 << power for power in range(1, max(1, most_tokens).bit_length()))
    return (*(size for size in powers if size < most_tokens), most_tokens)


def bucket_of(num_rows: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds `num_rows`."""
    assert 0 < num_rows <= sizes[-1], (num_rows, sizes)
    return sizes[bisect_left(sizes, num_rows)]


def decode_words(flat: FlatStep, *, size: int, padding_row: int) -> Ints:
    """int64 [6, B]: a step of decode rows alone, padded to `size` rows."""
    num_rows = flat.num_decodes
    assert num_rows == len(flat.ordered) <= size, (num_rows, len(flat.ordered), size)
    words_6B: Ints = np.zeros((NUM_WORDS, size), dtype=np.int64)
    words_6B[TOKEN, :num_rows] = flat.token_ids_T
    words_6B[POSITION, :num_rows] = flat.positions_T
    words_6B[SLOT, :num_rows] = flat.slots_T
    words_6B[ROW, :num_rows] = flat.rows_T
    words_6B[ROW, num_rows:] = padding_row
    _write_noise(words_6B, flat.sampled, flat.draws)
    return words_6B


def _write_noise(words_6B: Ints, sampled: Sequence[int], draws: Sequence[Draw]) -> None:
    """Greedy rows have temperature 0, and no use for a key."""
    temperatures: npt.NDArray[np.float64] = words_6B[TEMPERATURE].view(np.float64)
    keys: npt.NDArray[np.uint64] = words_6B[KEY].view(np.uint64)
    for index, draw in zip(sampled, draws, strict=True):
        if not draw.sampling.is_greedy:
            temperatures[index] = draw.sampling.temperature
            keys[index] = row_key(draw.sampling.seed, draw.position)
