"""Evaluate a PUMA model on M-BEIR: embed, search, score, time, show.

    python evaluate.py runs/puma-1/model                               # GlyphBEIR's test split
    python evaluate.py runs/puma-1/model --query "leftwards arrow with hook"
    python evaluate.py runs/puma-1/model --image a.png --query "make it capital" --modality image
    python evaluate.py runs/puma-1/model --query "a dog" --pool ~/Pictures
    python evaluate.py toy/tiny-qwen2-vl --efficiency 2,4,6            # quality against cost
    torchrun --nproc_per_node=4 evaluate.py runs/puma-1/model --data /data/M-BEIR

The first scores each cell (dataset and task) on its local pool (its own candidates) and on the
global pool (all cells' candidates together, so that the modality must be right as well), says what
kind of wrong the wrong results are, and writes results.json, results.md, TREC run files and qrels,
gallery.png and confusion.png. `metrics.py` has the formulas. The others search the global pool, or
a folder of images and .txt files.

Embeddings are kept as float16 in the model's folder (`vectors.py`): a second run or query does not
compute them again, a killed run continues. Search is exact, in memory that does not grow with the
pool (`search.py`).
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import distributed
from data import MODALITIES, Benchmark, modality_class
from metrics import DEPTH, modality_confusion, score
from pools import Folder, Union
from prune_distill import depth_costs
from puma import PUMA, to_device
from report import confusion_table, metrics_table, table, write_json, write_markdown, write_trec
from search import search
from thumbnails import draw_search
from vectors import Cache

__all__ = ["Embedded", "efficiency", "evaluate", "gallery_rows", "score", "split_cells", "table",
           "write_json", "write_trec"]
DEFAULT_DATA = "data/glyph_beir"


class Embedded:
    """All queries and candidates of some cells, each embedded once.

    `queries[cell name]` (..., Q, D); `candidates` (..., N, D), the rows of `union`. The leading
    axes are whatever `encode(items)` returns in front: several depths, for example. It may return
    a memory map.
    """

    def __init__(self, benchmark, cells, split, encode):
        self.global_path = benchmark.global_pool_path(split)
        paths = {cell.pool_path for cell in cells} | ({self.global_path} - {None})
        self.pools = {path: benchmark.pool(path) for path in sorted(paths)}
        self.union = Union(self.pools.values())
        queries = encode([item for cell in cells for item in cell.items])
        parts = queries.split([len(cell.items) for cell in cells], dim=-2)
        self.queries = {cell.name: part for cell, part in zip(cells, parts)}
        self.candidates = encode(self.union)

    def candidate(self, key):
        """The item with a did key."""
        return self.union[int(self.union.rows([key])[0])]

    def modality(self, key):
        """Its modality class."""
        return int(self.union.modality[self.union.rows([key])[0]])

    def rank(self, cells, depth=(), popularity_penalty=0.0, device=None):
        """{(cell name, "local" or "global"): (scores, did keys)}, the best ten for each query.

        `popularity_penalty` p subtracts p times the candidate's mean similarity to all queries of
        the cell, as the official code does with 0.2. It looks at all test queries, so it is off.
        """
        searches = {}  # pool -> what is searched there, all at once: a large pool is read once
        for cell in cells:
            queries = self.queries[cell.name][depth].float()
            queries = queries - popularity_penalty * queries.mean(0)  # (q - p mean q) . c
            for which, path in (("local", cell.pool_path), ("global", self.global_path)):
                if path is not None:
                    searches.setdefault(path, []).append(((cell.name, which), queries))
        rankings = {}
        for path, parts in searches.items():
            keys = torch.tensor(self.pools[path].keys)
            rows = torch.from_numpy(self.union.rows(keys.numpy()))
            queries = torch.cat([queries for _, queries in parts])
            found = search(queries, self.candidates[depth], DEPTH, rows=rows, device=device)
            sizes = [len(queries) for _, queries in parts]
            for (name, _), scores, indices in zip(parts, *(part.split(sizes) for part in found)):
                rankings[name] = scores.tolist(), keys[indices].tolist()
        return rankings


def split_cells(benchmark, split, limit=None):
    """The cells of a split; `test` brings the zero-shot split along where the data has one."""
    cells = benchmark.cells(split, limit)
    if split == "test" and (benchmark.root / "query/zero").is_dir():
        cells += benchmark.cells("zero", limit)
    return cells


def efficiency(model, items, batch_size=64, runs=3):
    """Parameters, operations an item (counted by torch) and items a second, measured on `items`.

    The median of several timed `encode` calls, image reading included.
    """
    batch = to_device(model.collate(items[:batch_size]), model.device)
    parameters, flops = depth_costs(model, batch)[-1]
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        model.encode(items, batch_size, show_progress=False)
        seconds.append(time.perf_counter() - started)
    return {
        "parameters": parameters,
        "gflops_per_item": flops / len(batch["input_ids"]) / 1e9,
        "items_per_s": len(items) / sorted(seconds)[runs // 2],
    }


def gallery_rows(embedded, cells, rankings):
    """Each cell's first query with the best of its local pool; without the zero-shot cells."""
    rows = []
    for cell in [c for c in cells if not c.name.startswith("zero_")] or cells:
        scores, ranked = rankings[cell.name, "local"]
        found = [(value, embedded.candidate(key), key in cell.relevant[0])
                 for value, key in zip(scores[0], ranked[0])]
        rows.append((f"{cell.name}: query", cell.items[0], found))
    return rows


def evaluate(model, data, split="test", out=None, batch_size=64, limit=None,
             popularity_penalty=0.0, cache=None):
    """Evaluate on all cells of a split, print the tables, write all to folder `out`; -> results.

    `cache`, a `vectors.Cache` of the model, keeps the embeddings in files; without one they stay in
    memory. Under torchrun each process embeds a part, the first scores. Raises ValueError on bad
    data.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}: every cell needs a query")
    benchmark = Benchmark(data)
    cells = split_cells(benchmark, split, limit)

    def encode(items):
        if cache is None:
            return model.encode(items, batch_size)
        what = "candidates" if isinstance(items, Union) else "queries"
        return cache.embed(items, f"{what} of {Path(data).resolve()}, {split}", batch_size)

    embedded = Embedded(benchmark, cells, split, encode)
    if distributed.rank():
        return None  # the embeddings are there; one process scores them
    rankings = embedded.rank(cells, (), popularity_penalty, model.device)
    results = score(cells, rankings)
    results["confusion"] = modality_confusion(cells, rankings, embedded.modality)
    sample = [item for cell in cells for item in cell.items[:24]]
    results["efficiency"] = efficiency(model, sample, batch_size)
    results["settings"] = {"model": cache and cache.name, "data": str(data), "split": split,
                           "limit": limit, "popularity_penalty": popularity_penalty}
    report(results, out, embedded, cells, rankings)
    return results


def report(results, out, embedded, cells, rankings):
    """Print the tables; write them, run files, qrels and pictures to the folder `out`."""
    parts = [metrics_table(results, which) for which in ("local", "global")]
    if results["confusion"]:
        parts.append(confusion_table(results["confusion"]))
    parts.append("\n".join(f"{key:<20}{value:>14,.10g}" if isinstance(value, int) else
                           f"{key:<20}{value:>14,.4g}"
                           for key, value in results["efficiency"].items()))
    print("\n\n".join(filter(None, parts)))
    if penalty := results["settings"]["popularity_penalty"]:
        print(f"popularity penalty {penalty}: each score depends on all test queries")
    if out is None:
        return
    from pictures import draw_confusion, draw_gallery  # matplotlib: not for those who only search

    out = Path(out)
    write_trec(out, cells, rankings)
    draw_gallery(out / "gallery.png", gallery_rows(embedded, cells, rankings))
    if results["confusion"]:
        draw_confusion(out / "confusion.png", results["confusion"])
    write_markdown(out / "results.md", results)
    write_json(out / "results.json", results)
    print(f"wrote {out / 'results.json'} and {out / 'gallery.png'}")


def open_pool(path, data):
    """What to search: a folder of files, or the global test pool of an M-BEIR directory.

    -> (pool, its name, benchmark or None). Raises ValueError if there is nothing to search.
    """
    root = Path(path or data)
    if path and not (root / "cand_pool").is_dir():
        return Folder(root), f"files in {root.resolve()}", None
    benchmark = Benchmark(root)
    file = benchmark.global_pool_path("test")
    if file is None:
        raise ValueError(f"{root}: expected cand_pool/global/mbeir_union_test_cand_pool.jsonl")
    return Union([benchmark.pool(file)]), f"candidates of {root.resolve()}, test", benchmark


def show(model, data, query, out, batch_size=64, modality=None, k=10, *, pool=None, cache=None,
         skip_bad=False):
    """Search for an item; print the k best, draw them into `out`/search.png.

    `pool`: a folder or an M-BEIR directory, default `data`. `modality`: only its candidates; a
    query without instruction then gets the benchmark's for that task. `skip_bad`: leave files out
    that cannot be read. Raises ValueError on bad input, a query that cannot be read first.
    """
    if k < 1:
        raise ValueError(f"--k must be at least 1, got {k}")
    items, name, benchmark = open_pool(pool, data)
    if modality and benchmark and not query.get("instruction"):
        wanted = modality_class(modality)
        own = modality_class(",".join(kind for kind in ("image", "text") if query.get(kind)))
        prompts = [texts for key, texts in benchmark.prompts.items() if key[:2] == (own, wanted)]
        query = {**query, "instruction": prompts[0][0] if prompts else None}
    vector = model.encode([query], show_progress=False)  # first, as a bad image should fail at once
    if cache is None:
        vectors = model.encode(items, batch_size)
    else:
        vectors = cache.embed(items, name, batch_size, skip_bad)
    if distributed.rank():
        return
    rows = searchable(items, vectors, modality)
    scores, found = search(vector, vectors, k, rows=rows, device=model.device)
    found = [(value, items[i], MODALITIES[items.modality[i]], items.name(i))
             for value, i in zip(scores[0].tolist(), rows[found[0]].tolist())]
    for rank, (value, item, kind, name) in enumerate(found, 1):
        content = " ".join((item["text"] or item["image"]).split())
        print(f"{rank:>3}  {value:.3f}  {kind:<10}  {name:<24}  {content[:70]}")
    out.mkdir(parents=True, exist_ok=True)
    draw_search(out / "search.png", query, found)
    print(f"wrote {out / 'search.png'}")


def searchable(items, vectors, modality):
    """Rows of the candidates that could be read and have the modality; says how many could not."""
    good = ~vectors[:, 0].isnan()
    if not good.all():
        bad = (~good).nonzero().flatten().tolist()
        print(f"skipped {len(bad)} of {len(items)} files that cannot be read, first "
              f"{items.name(bad[0])}")
    if modality:
        good &= torch.from_numpy(items.modality == modality_class(modality))
    if not good.any():
        raise ValueError(f"nothing to search: of {len(items)} candidates none is readable"
                         + (f" and of the modality {modality}" if modality else ""))
    return good.nonzero().flatten()


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("model", help="model folder or hub id")
    option("--data", default=DEFAULT_DATA, help="M-BEIR directory; GlyphBEIR is written if absent")
    option("--split", default="test", help="test brings the zero-shot split along")
    option("--out", help="folder for the results, must not exist; default: results/<model>")
    option("--query", help="search for this text instead of evaluating")
    option("--image", help="search for this image; with --query for both together")
    option("--instruction", help="what to look for, in front of the query's text")
    option("--pool", help="search this folder of images and .txt files, or M-BEIR directory")
    option("--modality", choices=MODALITIES, help="search only candidates of this modality")
    option("--k", type=int, default=10, help="how many results a search shows")
    option("--skip-bad", action="store_true", help="search without the files that cannot be read")
    option("--efficiency", metavar="K,K", help="instead: cost and quality at depths like 2,4")
    option("--batch-size", type=int, default=64, help="items embedded at a time")
    option("--limit", type=int, help="only the first queries of each cell")
    option("--popularity-penalty", type=float, default=0.0, help="0.2: as in the official code")
    option("--device", default="", help="torch device; default: cuda if there is one")
    return parser.parse_args()


def run(args):
    """What the arguments ask for. Raises ValueError or OSError on bad input."""
    if args.out and Path(args.out).exists():
        raise ValueError(f"--out {args.out} exists: choose another folder")
    searching = args.query or args.image
    if (args.pool or args.instruction) and not searching:
        raise ValueError("--pool and --instruction belong to a search: give --query or --image")
    device, out = distributed.start(args.device), Path(args.out or result_folder(args.model))
    if not args.pool and distributed.rank() == 0:
        ensure_data(args.data)
    distributed.barrier()
    if args.efficiency:
        from cost import measure

        depths = [int(k) if k.isdigit() else 0 for k in args.efficiency.split(",")]
        measure(args.model, args.data, depths, args.split, args.limit or 200,
                device=args.device, out=out)
        return
    model = PUMA.from_pretrained(args.model, device=device)
    cache = Cache(model, args.model)
    if searching:
        query = {"text": args.query, "image": args.image, "instruction": args.instruction}
        show(model, args.data, query, out, args.batch_size, args.modality, args.k,
             pool=args.pool, cache=cache, skip_bad=args.skip_bad)
    else:
        evaluate(model, args.data, args.split, out, args.batch_size, args.limit,
                 args.popularity_penalty, cache)


def result_folder(model):
    """Where results go by default: results/<the last two parts of the model's path>."""
    return "results/" + "-".join(Path(model).resolve().parts[-2:])


def main():
    args = parse_arguments()
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    finally:
        distributed.stop()


def ensure_data(folder):
    """Have the default benchmark written when its folder is absent."""
    if str(folder) == DEFAULT_DATA and not Path(folder).exists():
        from toy.glyph_beir import build

        print(f"writing GlyphBEIR to {folder} ...", flush=True)
        print(build(folder))


if __name__ == "__main__":
    main()
