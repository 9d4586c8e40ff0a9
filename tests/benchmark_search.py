"""Exact search in a million vectors, against FAISS IndexFlatIP if it is installed.

    python tests/benchmark_search.py                             # 1,000 queries, a minute or two
    python tests/benchmark_search.py --rows 100000 --threads 1

Writes 1 M x 1536 random float16 vectors (3 GB) to a temporary .npy file, then searches it as
evaluate.py does, from the memory map in chunks. FAISS needs them as float32 in memory (6 GB); its
time is given without that conversion. Both run in this process, in turn; the best of `--runs`.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from search import search  # noqa: E402

DEFAULTS = {"rows": 1_000_000, "width": 1536, "queries": 1000, "k": 10, "runs": 2}


def write_pool(path, rows, width):
    """Random unit vectors, in float16."""
    pool = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, width))
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, 50_000):
        part = torch.randn(min(50_000, rows - start), width, generator=generator)
        pool[start : start + 50_000] = torch.nn.functional.normalize(part, dim=-1).half().numpy()
    pool.flush()


def best(runs, function):
    """(result, seconds of the fastest run)."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - started)
    return result, min(seconds)


def compare(rows, width, queries, k, runs, threads):
    """Print the time of either search and how far their results agree."""
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    probes = torch.nn.functional.normalize(torch.randn(queries, width), dim=-1)
    work = 2 * rows * width * queries
    print(f"{rows:,} x {width} float16, {queries:,} queries, top {k}, {threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.npy"
        write_pool(path, rows, width)
        pool = torch.from_numpy(np.load(path, mmap_mode="c"))
        (scores, found), seconds = best(runs, lambda: search(probes, pool, k))
        print(f"search.py, memory map   {seconds:>7.2f} s {work / seconds / 1e9:>8.0f} GFLOP/s")
        try:
            import faiss
        except ImportError:
            print("faiss is not installed: pip install faiss-cpu")
            return
        faiss.omp_set_num_threads(threads)
        index = faiss.IndexFlatIP(width)
        for start in range(0, rows, 50_000):
            index.add(pool[start : start + 50_000].float().numpy())
        (theirs, same), seconds = best(runs, lambda: index.search(probes.numpy(), k))
        print(f"{'faiss ' + faiss.__version__ + ', in memory':<23} {seconds:>7.2f} s "
              f"{work / seconds / 1e9:>8.0f} GFLOP/s")
        worst = np.abs(scores.numpy() - theirs).max()
        print(f"same candidates in the same order: {(found.numpy() == same).mean():.2%}; "
              f"scores differ by {worst:.0e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in {**DEFAULTS, "threads": torch.get_num_threads()}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    compare(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
