"""Exact search in a pool of any size: on a CPU or GPU, in memory that does not grow with the pool.

    scores, rows = search(queries, vectors, k=10)                            # best first

The pool is read once, in chunks, whatever the number of queries; it may be a memory map of float16
vectors (`vectors.py`), scores are float32. Ties go to the candidate that comes first in the pool.
Above some ten million vectors, put the embeddings into a vector index of your choice.
Shapes: Q queries, N candidates, D width, k results a query.
"""

import torch

CHUNK = 16_384  # candidates compared at a time: 100 MB as float32 at Qwen2-VL-2B's width
BLOCK = 1_024  # queries compared with them at a time: another 67 MB of scores


def stable_topk(scores, k):
    """The k best of each row, best first, among equals the lower column. -> (values, columns)."""
    k = min(k, scores.shape[1])
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    # topk picks any of several equals; rows where that matters are sorted in full, stably.
    unclear = values[:, k - 1] == values[:, -1] if values.shape[1] > k else None
    columns = columns[:, :k]
    if unclear is not None and unclear.any():
        columns[unclear] = scores[unclear].sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


@torch.no_grad()
def search(queries, candidates, k, chunk_size=CHUNK, rows=None, device=None, coarse=None):
    """Exact search: queries (Q, D), candidates (N, D) -> scores (Q, k), indices (Q, k), best first.

    `rows` (n,): only these candidates, in this order; indices then count in it. Candidates may be a
    memory map of any size, in float16: `chunk_size` of them at a time become float32 on `device`
    (default: the queries'). k is cut at N; results come back to the CPU. `coarse`: see `_filtered`;
    default: where the hardware multiplies bfloat16 faster. Raises ValueError if the widths differ,
    the pool is empty, or an embedding is not finite.
    """
    count = len(candidates) if rows is None else len(rows)
    if queries.shape[1] != candidates.shape[1] or count == 0:
        shapes = f"{tuple(queries.shape)} and {(count, candidates.shape[1])}"
        raise ValueError(f"cannot search: queries and candidates have the shapes {shapes}")
    dtype = torch.promote_types(queries.dtype, torch.float32)
    queries = queries.to(device or queries.device, dtype)
    _norms(queries, "query", 0)
    if coarse is None:
        coarse = _fast_bfloat16(queries.device)
    rank = _filtered if coarse and dtype == torch.float32 else _plain
    best = queries.new_empty(len(queries), 0)
    found = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, count, chunk_size):
        part = slice(start, start + chunk_size)
        chunk = candidates[part if rows is None else rows[part]].to(queries.device)
        chunk = chunk if rank is _filtered else chunk.to(dtype)
        half = chunk.bfloat16() if rank is _filtered else chunk
        norms = _norms(half, "candidate", start)
        parts = []
        for first in range(0, len(queries), BLOCK):
            block = slice(first, first + BLOCK)
            values, columns = rank(queries[block], chunk, half, norms, k, best[block])
            # What was best so far stands left of the chunk, so that ties keep the pool's order.
            both = torch.cat([best[block], values], dim=1)
            indices = torch.cat([found[block], columns + start], dim=1)
            values, picked = stable_topk(both, k)
            parts.append((values, indices.gather(1, picked)))
        best, found = (torch.cat(tensors) for tensors in zip(*parts)) if parts else (best, found)
    return best.cpu(), found.cpu()


def _plain(queries, chunk, _half, _norms, k, _best):
    """The k best of a chunk: all scores, then the largest. -> (values, columns)."""
    return stable_topk(queries @ chunk.to(queries.dtype).T, k)


def _filtered(queries, chunk, half, norms, k, best):
    """The same k best, or those of them that can still enter the `best` so far (Q, <= k).

    Products in bfloat16 take half the time of float32 ones where the hardware has them, and are off
    by less than e = |q| |c| 2^-7: rounding q, c and the result costs 2^-9 each, the rest is for the
    sums in between. So only candidates that come within 2 e of the k-th best need a score in
    float32, by one dot product each. `half`: the chunk in bfloat16, `norms` its lengths |c|.
    """
    scores = queries.bfloat16() @ half.T  # (Q, C)
    error = queries.norm(dim=1) * norms.max().float() * 2**-7
    if best.shape[1] < k:  # nothing to compare with yet: k have at least this score
        floor = scores.topk(min(k, len(chunk)), dim=1).values[:, -1].float() - 2 * error
    else:
        floor = best[:, k - 1] - error
    # Rounded down, as bfloat16 compares: one more candidate does no harm, one less does.
    floor = (floor - floor.abs() * 2**-8).bfloat16()
    rows, columns = (scores >= floor[:, None]).nonzero(as_tuple=True)  # row by row, columns rise
    if len(rows) > 64 * len(queries):  # hardly a filter
        return _plain(queries, chunk, half, norms, k, best)
    exact = torch.cat([(queries[r] * chunk[c].float()).sum(1) for r, c in
                       zip(rows.split(BLOCK), columns.split(BLOCK))])
    counts = torch.bincount(rows, minlength=len(queries))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    values = exact.new_full((len(queries), int(counts.max())), -torch.inf)
    indices = rows.new_zeros(values.shape)
    values[rows, place], indices[rows, place] = exact, columns
    return values, indices


def _fast_bfloat16(device):
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cuda" or device.type == "cpu" and supported()


def _norms(vectors, what, first):
    """The length of each vector. ValueError names the first that is not finite."""
    norms = vectors.norm(dim=1)
    if not norms.isfinite().all():
        bad = (~vectors.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"cannot search: the embedding of {what} {first + bad[0]} is NaN or "
                             "infinite")
    return norms
