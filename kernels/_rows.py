"""Device code shared by the kernels: the rows of a program.

A program owns a *segment*: up to ``ROWS`` rows of one class, or more if the classes of a small batch are uneven. Rows with a label
out of range form an additional last class. There are three ways to find a segment:

- ``NATURAL``: no labels; segment t is a block of consecutive rows.
- ``SCANNED``: the program reads all labels, at most ``SCANNED_ROWS``, and selects its rows by their rank in the class.
- ``SORTED``: rows are sorted by class. Class boundaries and multiples of ``ROWS`` cut the sorted rows into segments, so segment t
  lies in the last class c with ``offsets[c] // ROWS + c <= t``.
"""

import triton
import triton.language as tl

NATURAL: tl.constexpr = tl.constexpr(0)
SCANNED: tl.constexpr = tl.constexpr(1)
SORTED: tl.constexpr = tl.constexpr(2)

# Maximum rows whose labels every program reads, and the rows that it reads at once.
SCANNED_ROWS = 512
SCAN: tl.constexpr = tl.constexpr(16)


@triton.jit
def _in_class(index_ptr, start, c, N, C):
    """Which of the ``SCAN`` rows from ``start`` belong to class c."""
    n = start + tl.arange(0, SCAN)
    label = tl.load(index_ptr + n, mask=n < N, other=0)
    stray = (label < 0) | (label >= C)
    return (((label == c) | (stray & (c == C))) & (n < N)).to(tl.int32)


@triton.jit
def first_segment(c, grouping, offsets_ptr, N, C, P, ROWS):
    """The first segment of class c; that of class c + 1 is one past its last."""
    first = c.to(tl.int64) * tl.cdiv(N, ROWS)
    if grouping == SCANNED:
        first = c.to(tl.int64) * P
    if grouping == SORTED:
        first = tl.load(offsets_ptr + c) // ROWS + c
    return first


@triton.jit
def find_segment(t, grouping, index_ptr, offsets_ptr, N, C, P, ROWS):
    """Returns the class of segment t and the ranks ``[begin, end)`` of its rows."""
    t = t.to(tl.int64)
    c = t * 0
    begin = t * ROWS
    end = tl.minimum(begin + ROWS, N.to(tl.int64))
    if grouping == SCANNED:
        c = t // P
        members = tl.zeros([SCAN], tl.int32)
        for start in range(0, N, SCAN):
            members += _in_class(index_ptr, start, c, N, C)
        count = tl.sum(members, 0).to(tl.int64)
        length = tl.cdiv(count, P)
        begin = (t % P) * length
        end = tl.minimum(begin + length, count)
    if grouping == SORTED:
        high = c + C
        while c < high:
            middle = (c + high + 1) // 2
            starts_later = tl.load(offsets_ptr + middle) // ROWS + middle > t
            c = tl.where(starts_later, c, middle)
            high = tl.where(starts_later, middle - 1, high)
        begin = tl.maximum(tl.load(offsets_ptr + c), (t - c) * ROWS)
        end = tl.minimum(tl.load(offsets_ptr + c + 1), (t - c + 1) * ROWS)
    return c, begin, end


@triton.jit
def store_size(t, c, begin, end, sizes_ptr, segments, grouping, offsets_ptr, N, C, P, ROWS):
    """Stores the number of a segment's rows with a class, and, from the first segment without a class, that segment's rows."""
    size = tl.maximum(end - begin, 0)
    tl.store(sizes_ptr + t, tl.where(c < C, size, 0))
    if grouping == NATURAL:
        tl.store(sizes_ptr + segments, begin * 0, mask=t == 0)
    elif c == C:
        first = first_segment(c, grouping, offsets_ptr, N, C, P, ROWS)
        tl.store(sizes_ptr + segments, size, mask=t == first)


@triton.jit
def rows_of(rank, valid, c, grouping, index_ptr, N, C):
    """The rows with the given ranks, int32; 0 where not valid."""
    row = tl.where(valid, rank, 0)
    if grouping == SCANNED:
        found = tl.zeros([1], tl.int32)
        row *= 0
        for start in range(0, N, SCAN):
            member = _in_class(index_ptr, start, c, N, C)
            position = found + tl.cumsum(member, 0) - 1
            hit = (member[None, :] > 0) & (position[None, :] == rank[:, None])
            row += tl.sum(tl.where(hit, (start + tl.arange(0, SCAN))[None, :], 0), 1)
            found += tl.sum(member, 0)
    if grouping == SORTED:
        row = tl.load(index_ptr + rank, mask=valid, other=0).to(tl.int32)
    return row


@triton.jit
def only_if(condition, mask):
    """The mask if a scalar condition holds, else all False. Triton 3.9's interpreter converts ``mask & condition`` to integers."""
    return tl.where(condition, mask, False)


@triton.jit
def load_tile(x_ptr, stride, row, valid, d, inside, dtype: tl.constexpr):
    """Rows of x, converted to the dtype of the parameters."""
    mask = valid[:, None] & inside[None, :]
    return tl.load(x_ptr + row.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0).to(dtype)
