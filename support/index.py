"""Embed once into a file, then search it exactly, in memory that does not grow with the pool.

    path = stored_path("runs/puma-1/model", pool)
    vectors = embed_to_file(path, pool, encode, width)          # (N, D) float16, a memory map
    scores, rows = search(queries, vectors, k=10)               # best first

The first call embeds chunk by chunk into `runs/puma-1/model/cache/<key>.npy`; a call after a kill
continues, the next one only opens the file. The key is a hash of names, sizes and times of change
of the files: the model's, the pool's, the code's. (An image that changes under its name goes
unnoticed: delete `cache` then; it may go at any time.) Under torchrun each of W processes of one
machine embeds every W-th chunk. Above some ten million vectors, put the .npy file into a vector
index of your choice. Shapes: Q queries, N candidates, D width, k results a query.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import cached_file

from support import distributed

CHUNK = 16_384  # candidates compared at a time: 100 MB as float32 at Qwen2-VL-2B's width
BLOCK = 1_024  # queries compared with them at a time: another 67 MB of scores


def stable_topk(scores, k):
    """The k best of each row, best first, among equals the lower column. -> (values, columns)."""
    k = min(k, scores.shape[1])
    values, columns = scores.topk(k, dim=1)
    # Of equals around place k, topk picks any: sort the rows where that matters.
    unclear = (scores >= values[:, -1:]).sum(1) > k
    columns[unclear] = scores[unclear].sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


@torch.no_grad()
def search(queries, candidates, k, chunk_size=CHUNK, rows=None, device=None):
    """Exact search: queries (Q, D), candidates (N, D) -> scores (Q, k), indices (Q, k), best first.

    `rows` (n,): only these candidates, in this order; indices then count in it. Candidates may be a
    float16 memory map: `chunk_size` of them at a time become float32 on `device` (default: the
    queries'). Ties go to the candidate that comes first, k is cut at N, results come back to the
    CPU. Raises ValueError if the widths differ, the pool is empty, or an embedding is not finite.
    """
    count = len(candidates) if rows is None else len(rows)
    if queries.shape[1] != candidates.shape[1] or count == 0:
        shapes = tuple(queries.shape), (count, candidates.shape[1])
        raise ValueError(f"cannot search: the shapes of queries and candidates are {shapes}")
    dtype = torch.promote_types(queries.dtype, torch.float32)
    queries = queries.to(device, dtype)
    scores, found = queries[:, :0], queries[:, :0].long()  # of the chunks so far
    for start in range(0, count, chunk_size):
        part = slice(start, start + chunk_size)
        chunk = candidates[part if rows is None else rows[part]].to(queries.device, dtype)
        for what, first, vectors in (("query", 0, queries), ("candidate", start, chunk)):
            if not (good := vectors.isfinite().all(1)).all():
                row = first + int(good.int().argmin())
                raise ValueError(f"the embedding of {what} {row} is NaN or infinite")
        parts = [stable_topk(block @ chunk.T, k) for block in queries.split(BLOCK)]
        values, columns = map(torch.cat, zip(*parts))
        # What was best so far stands left of the chunk, so that ties keep the pool's order.
        scores, picked = stable_topk(torch.cat([scores, values], dim=1), k)
        found = torch.cat([found, columns + start], dim=1).gather(1, picked)
    return scores.cpu(), found.cpu()


def fingerprint(parts):
    """A key of 16 hex digits. Of a part that is a Path count name, size and time of last change."""
    facts = [(part.name, part.stat().st_size, part.stat().st_mtime_ns)
             if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def stored_path(name, items, *settings):
    """The file for a model's embeddings of these items, in `cache` in the model's own folder, or,
    for a hub id or a folder that cannot be written, in `results/<name>`.

    A pool is known by its `files`, other items by what they are. `settings`: what else counts.
    """
    home = Path(name) if Path(name).is_dir() else Path(cached_file(name, "config.json")).parent
    code = [Path(__file__).parent / file for file in ("index.py", "items.py", "../puma.py")]
    parts = [path for path in sorted(home.iterdir()) if path.is_file()] + code
    key = fingerprint([*parts, *getattr(items, "files", items), len(items), *settings])
    folder = home / "cache"
    if not (Path(name).is_dir() and os.access(home, os.W_OK)):
        folder = Path("results") / "-".join(Path(name).parts[-2:]) / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder / f"{key}.npy"


def embed_to_file(path, items, encode, width, skip_bad=False, chunk_size=1_024):
    """Embed items into a (N, D) float16 .npy file, a memory map; continue what a killed run began.

    encode(list of items) -> (n, `width`) float32. skip_bad: an item that cannot be read gets a row
    of NaN instead of ending the run. Raises ValueError for an empty pool, an embedding that is not
    finite, a file of another shape; OSError for a full disk.
    """
    path, shape, rank = Path(path), (len(items), width), distributed.rank()
    starts = range(0, len(items), chunk_size)
    if not starts:
        raise ValueError("cannot embed: the pool is empty")
    if rank == 0 and not path.exists():
        _create(path, shape, len(starts))
    distributed.gather_objects(None)
    with path.open("r+b") as file:
        try:
            vectors = np.load(path, mmap_mode="r+")
            end = file.seek(vectors.offset + vectors.nbytes)
            done = file.read()  # a byte a chunk
            found, expected = (vectors.shape, len(done)), (shape, len(starts))
            if found != expected:
                raise ValueError(f"shape and chunks are {found}, expected {expected}")
        except (ValueError, EOFError) as error:
            raise ValueError(f"cannot use the embeddings {path}: {error}; delete it") from error
        todo = [i for i in range(rank, len(starts), distributed.world_size()) if not done[i]]
        if rank == 0 and todo:
            todo = tqdm(todo, "encode", unit="chunk", leave=False)
        for i in todo:
            rows = range(len(items))[starts[i] : starts[i] + chunk_size]
            part = _encode(items, rows, encode, width, skip_bad)
            # Through the file, not the map: a full disk is then an error and not a SIGBUS.
            file.seek(vectors.offset + 2 * width * rows.start)
            file.write(part.half().numpy())
            file.flush()  # first the vectors, then the note that they are there
            file.seek(end + i)
            file.write(b"\1")
            file.flush()
    distributed.gather_objects(None)
    return torch.from_numpy(vectors)


def _create(path, shape, chunks):
    """Zeros for the vectors and, behind them, a byte for each chunk: 1 when it is done."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
        with temporary.open("ab") as file:
            file.write(bytes(chunks))
        os.replace(temporary, path)  # whoever finds it finds it whole
    finally:
        temporary.unlink(missing_ok=True)


def _encode(items, rows, encode, width, skip_bad):
    """Embeddings (rows, width); with `skip_bad`, NaN for an item that `encode` refuses."""
    try:
        out = encode([items[i] for i in rows])
    except ValueError:
        if not skip_bad:
            raise
        if len(rows) > 1:  # which of them?
            return torch.cat([_encode(items, [i], encode, width, skip_bad) for i in rows])
        return torch.full((1, width), torch.nan)
    if not (good := out.isfinite().all(1)).all():
        bad = items[rows[int(good.int().argmin())]]
        raise ValueError(f"the model's embedding of {bad} is NaN or infinite")
    return out
