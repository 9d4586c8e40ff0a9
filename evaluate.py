"""Evaluate a PUMA model on M-BEIR: embed, search, score, time, show.

    python evaluate.py runs/puma-1/model                               # GlyphBEIR's test split
    python evaluate.py runs/puma-1/model --query "leftwards arrow with hook"
    python evaluate.py runs/puma-1/model --image a.png --query "make it capital" --modality image

The first prints hit rates for each cell (dataset and task), on its local pool (its own candidates)
and on the global pool (all cells' candidates together, so that the modality must be right as well),
and writes results.json, TREC run files, qrels and gallery.png. The others search the global pool.

Hit rate @k is 1 if any relevant candidate is among the first k; M-BEIR calls it recall. Search is
exact, in chunks of the pool, so memory does not grow with it; ties go to the candidate that comes
first in the pool. Above some ten million vectors, put the embeddings into a vector index.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from data import MODALITIES, Benchmark, did_text, modality_class
from pictures import draw_gallery
from prune_distill import depth_costs
from puma import PUMA, to_device
from run import pick_device

DEFAULT_DATA = "data/glyph_beir"
CUTOFFS = (1, 5, 10)


def stable_topk(scores, k):
    """The k best of each row, best first, among equals the lower column. -> (values, columns)."""
    k = min(k, scores.shape[1])
    values, columns = scores.topk(k, dim=1)
    # topk picks any of several equals; rows where that mattered are sorted in full, stably.
    unclear = (scores >= values[:, -1:]).sum(1) > k
    if unclear.any():
        columns[unclear] = scores[unclear].sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def search(queries, candidates, k, chunk_size=65_536):
    """Exact search: queries (Q, D), candidates (N, D) -> scores (Q, k), indices (Q, k), best first.

    k is cut at N. Only `chunk_size` candidates are compared at a time. Raises ValueError if the
    widths differ, the pool is empty, or an embedding is not finite.
    """
    if queries.shape[1] != candidates.shape[1] or len(candidates) == 0:
        shapes = f"{tuple(queries.shape)} and {tuple(candidates.shape)}"
        raise ValueError(f"cannot search: queries and candidates have the shapes {shapes}")
    if not (queries.isfinite().all() and candidates.isfinite().all()):
        raise ValueError("cannot search: some embeddings are NaN or infinite")
    scores = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.long)
    for start in range(0, len(candidates), chunk_size):
        chunk = candidates[start : start + chunk_size]
        columns = torch.arange(start, start + len(chunk)).expand(len(queries), -1)
        # What was best so far stands left of the chunk, so that ties keep the order of the pool.
        scores, picked = stable_topk(torch.cat([scores, queries @ chunk.T], dim=1), k)
        indices = torch.cat([indices, columns], dim=1).gather(1, picked)
    return scores, indices


def hit_rates(ranked, relevant, cutoffs=CUTOFFS):
    """{"hit_rate@k": share of queries with a relevant id among the first k}.

    ranked: for each query ids, best first; relevant: for each query the set of right ids.
    """
    ranks = []  # of the first hit, from 1
    for ids, right in zip(ranked, relevant, strict=True):
        ranks.append(next((rank for rank, i in enumerate(ids, 1) if i in right), float("inf")))
    return {f"hit_rate@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in cutoffs}


class Embedded:
    """All queries and candidates of some cells, each embedded once.

    `queries[cell name]` (..., Q, D); `candidates` (..., N, D) with `rows[did key]`; `pools[path]`.
    The leading axes are whatever `encode(items)` returns in front: several depths, for example.
    """

    def __init__(self, benchmark, cells, split, encode):
        self.global_path = benchmark.global_pool_path(split)
        paths = {cell.pool_path for cell in cells} | ({self.global_path} - {None})
        self.pools = {path: benchmark.pool(path) for path in sorted(paths)}
        self.source, self.rows = [], {}  # row -> (pool, index in it); did key -> row
        for pool in self.pools.values():
            for index, key in enumerate(pool.keys):
                if key not in self.rows:
                    self.rows[key] = len(self.source)
                    self.source.append((pool, index))
        items = [item for cell in cells for item in cell.items]
        items += [pool[index] for pool, index in self.source]
        counts = [len(cell.items) for cell in cells] + [len(self.source)]
        *queries, self.candidates = encode(items).split(counts, dim=-2)
        self.queries = {cell.name: part for cell, part in zip(cells, queries)}

    def candidate(self, key):
        pool, index = self.source[self.rows[key]]
        return pool[index]

    def rank(self, cells, depth=(), popularity_penalty=0.0):
        """{(cell name, "local" or "global"): (scores, did keys)}, the best ten for each query.

        `popularity_penalty` p subtracts p times the candidate's mean similarity to all queries of
        the cell, as the official code does with 0.2. It looks at all test queries, so it is off.
        """
        rankings = {}
        for cell in cells:
            queries = self.queries[cell.name][depth]
            queries = queries - popularity_penalty * queries.mean(0)  # (q - p mean q) . c
            for which, path in (("local", cell.pool_path), ("global", self.global_path)):
                if path is not None:
                    keys = torch.tensor(self.pools[path].keys)
                    rows = torch.tensor([self.rows[key] for key in keys.tolist()])
                    scores, found = search(queries, self.candidates[depth][rows], max(CUTOFFS))
                    rankings[cell.name, which] = (scores.tolist(), keys[found].tolist())
        return rankings


def score(cells, rankings):
    """{"cells": ..., "average": ..., "average_zero": ...}: the part of results.json on quality."""
    results = {}
    for cell in cells:
        results[cell.name] = {"queries": len(cell.items)}
        for which in ("local", "global"):
            if (cell.name, which) in rankings:
                ranked = rankings[cell.name, which][1]
                results[cell.name][which] = hit_rates(ranked, cell.relevant)
    zero = [entry for name, entry in results.items() if name.startswith("zero_")]
    seen = [entry for name, entry in results.items() if not name.startswith("zero_")]
    return {"cells": results, "average": _average(seen or zero), "average_zero": _average(zero)}


def _average(entries):
    """The plain mean over cells, as in M-BEIR's tables."""
    average = {}
    for which in ("local", "global"):
        if entries and which in entries[0]:
            average[which] = {metric: sum(entry[which][metric] for entry in entries) / len(entries)
                              for metric in entries[0][which]}
    return average


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


def table(columns):
    """{heading: results} -> a text table: hit rate @5 on local and global pools, and the cost."""
    first = next(iter(columns.values()))
    rows = [(name, lambda results, name=name: results["cells"][name]) for name in first["cells"]]
    rows.append(("average", lambda results: results["average"]))
    if first["average_zero"]:
        rows.append(("average, zero-shot", lambda results: results["average_zero"]))
    lines = [f"{'':<24}" + "".join(f"{heading:>20}" for heading in columns)]
    lines.append(f"{'hit rate @5, %':<24}" + f"{'local':>11}{'global':>9}" * len(columns))
    for name, pick in rows:
        lines.append(f"{name:<24}")
        for results in columns.values():
            entry = pick(results)
            local, union = (f"{100 * entry[which]['hit_rate@5']:.1f}" if which in entry else "-"
                            for which in ("local", "global"))
            lines[-1] += f"{local:>11}{union:>9}"
    costs = {"parameters": ",", "gflops_per_item": ".4f", "items_per_s": ",.0f"}
    for key, form in costs.items():
        values = [results["efficiency"][key] for results in columns.values()]
        lines.append(f"{key:<24}" + "".join(f"{value:>20{form}}" for value in values))
    return "\n".join(lines)


def write_json(path, value):
    """Write beside, then rename: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_trec(folder, cells, rankings):
    """`<cell>.<pool>.trec` (qid Q0 did rank score run) and `<cell>.qrels` (qid 0 did relevance)."""
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        pairs = [(qid, key) for qid, keys in zip(cell.qids, cell.relevant) for key in sorted(keys)]
        qrels = "".join(f"{qid} 0 {did_text(key)} 1\n" for qid, key in pairs)
        (folder / f"{cell.name}.qrels").write_text(qrels)
    queries = {cell.name: cell.qids for cell in cells}
    for (name, which), (scores, ranked) in rankings.items():
        lines = [
            f"{qid} Q0 {did_text(key)} {rank} {value:.6f} puma\n"
            for qid, values, keys in zip(queries[name], scores, ranked)
            for rank, (value, key) in enumerate(zip(values, keys), 1)
        ]
        (folder / f"{name}.{which}.trec").write_text("".join(lines))


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
             popularity_penalty=0.0):
    """Evaluate on all cells of a split, print the table, write all to folder `out`; -> results."""
    benchmark = Benchmark(data)
    cells = split_cells(benchmark, split, limit)
    embedded = Embedded(benchmark, cells, split, lambda items: model.encode(items, batch_size))
    rankings = embedded.rank(cells, popularity_penalty=popularity_penalty)
    results = score(cells, rankings)
    sample = [item for cell in cells for item in cell.items[:24]]
    results["efficiency"] = efficiency(model, sample, batch_size)
    results["settings"] = {"data": str(data), "split": split, "limit": limit,
                           "popularity_penalty": popularity_penalty}
    print(table({"": results}))
    if popularity_penalty:
        print(f"popularity penalty {popularity_penalty}: each score depends on all test queries")
    if out is not None:
        out = Path(out)
        write_trec(out, cells, rankings)
        draw_gallery(out / "gallery.png", gallery_rows(embedded, cells, rankings))
        write_json(out / "results.json", results)
        print(f"wrote {out / 'results.json'} and {out / 'gallery.png'}")
    return results


def show(model, data, query, out, batch_size=64, modality=None, k=10):
    """Search the global test pool for an item; print the k best, draw the first five.

    `modality`: only its candidates; the query then gets the benchmark's instruction for that task.
    """
    benchmark = Benchmark(data)
    path = benchmark.global_pool_path("test")
    if path is None:
        raise ValueError(f"{data}: expected cand_pool/global/mbeir_union_test_cand_pool.jsonl")
    pool = benchmark.pool(path)
    rows = list(range(len(pool)))
    if modality:
        wanted = modality_class(modality)
        rows = [i for i in rows if pool.modality[i] == wanted]
        own = modality_class(",".join(kind for kind in ("image", "text") if query[kind]))
        prompts = [texts for key, texts in benchmark.prompts.items() if key[:2] == (own, wanted)]
        query = {**query, "instruction": prompts[0][0] if prompts else None}
    vector = model.encode([query], show_progress=False)  # first, as a bad image should fail at once
    vectors = model.encode([pool[i] for i in rows], batch_size)
    scores, found = search(vector, vectors, k)
    found = [(value, pool[rows[i]], MODALITIES[pool.modality[rows[i]]])
             for value, i in zip(scores[0].tolist(), found[0].tolist())]
    for rank, (value, item, kind) in enumerate(found, 1):
        print(f"{rank:>3}  {value:.3f}  {kind:<10}  {item['text'] or ''}  {item['image'] or ''}")
    out.mkdir(parents=True, exist_ok=True)
    draw_gallery(out / "search.png", [("query", query, [(v, item, False) for v, item, _ in found])])
    print(f"wrote {out / 'search.png'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("model", help="model folder or hub id")
    option("--data", default=DEFAULT_DATA, help="M-BEIR directory; GlyphBEIR is written if absent")
    option("--split", default="test", help="test brings the zero-shot split along")
    option("--out", help="folder for the results, must not exist; default: results/<model>")
    option("--query", help="search for this text instead of evaluating")
    option("--image", help="search for this image; with --query for both together")
    option("--modality", choices=MODALITIES, help="search only candidates of this modality")
    option("--batch-size", type=int, default=64, help="items embedded at a time")
    option("--limit", type=int, help="only the first queries of each cell")
    option("--popularity-penalty", type=float, default=0.0, help="0.2: as in the official code")
    option("--device", default="", help="torch device; default: cuda if there is one")
    args = parser.parse_args()
    try:
        if args.out and Path(args.out).exists():
            raise ValueError(f"--out {args.out} exists: choose another folder")
        out = Path(args.out or "results/" + "-".join(Path(args.model).resolve().parts[-2:]))
        ensure_data(args.data)
        model = PUMA.from_pretrained(args.model, device=pick_device(args.device))
        if args.query or args.image:
            query = {"text": args.query, "image": args.image}
            show(model, args.data, query, out, args.batch_size, args.modality)
        else:
            evaluate(model, args.data, args.split, out, args.batch_size, args.limit,
                     args.popularity_penalty)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


def ensure_data(folder):
    """Have the default benchmark written when its folder is absent."""
    if str(folder) == DEFAULT_DATA and not Path(folder).exists():
        from toy.glyph_beir import build

        print(f"writing GlyphBEIR to {folder} ...", flush=True)
        print(build(folder))


if __name__ == "__main__":
    main()
