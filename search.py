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
def search(queries, candidates, k, chunk_size=CHUNK, rows=None, device=None):
    """Exact search: queries (Q, D), candidates (N, D) -> scores (Q, k), indices (Q, k), best first.

    `rows` (n,): only these candidates, in this order; indices then count in it. Candidates may be a
    memory map of any size, in float16: `chunk_size` of them at a time become float32 on `device`
    (default: the queries'). k is cut at N; results come back to the CPU. Raises ValueError if the
    widths differ, the pool is empty, or an embedding is not finite.
    """
    count = len(candidates) if rows is None else len(rows)
    if queries.shape[1] != candidates.shape[1] or count == 0:
        shapes = f"{tuple(queries.shape)} and {(count, candidates.shape[1])}"
        raise ValueError(f"cannot search: queries and candidates have the shapes {shapes}")
    dtype = torch.promote_types(queries.dtype, torch.float32)
    queries = queries.to(device or queries.device, dtype)
    _refuse_nan(queries, "query", 0)
    best = queries.new_empty(len(queries), 0)
    found = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, count, chunk_size):
        part = slice(start, start + chunk_size)
        chunk = candidates[part if rows is None else rows[part]].to(queries.device, dtype)
        _refuse_nan(chunk, "candidate", start)
        parts = []
        for block in range(0, len(queries), BLOCK):
            values, columns = stable_topk(queries[block : block + BLOCK] @ chunk.T, k)
            # What was best so far stands left of the chunk, so that ties keep the pool's order.
            both = torch.cat([best[block : block + BLOCK], values], dim=1)
            indices = torch.cat([found[block : block + BLOCK], columns + start], dim=1)
            values, picked = stable_topk(both, k)
            parts.append((values, indices.gather(1, picked)))
        best, found = (torch.cat(tensors) for tensors in zip(*parts)) if parts else (best, found)
    return best.cpu(), found.cpu()


def _refuse_nan(vectors, what, first):
    if not vectors.sum().isfinite():  # one pass; NaN and infinity survive a sum
        bad = (~vectors.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"cannot search: the embedding of {what} {first + bad[0]} is NaN or "
                             "infinite")
