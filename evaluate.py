"""Evaluate a PUMA model on M-BEIR: embed, search, score, time, show.

    python evaluate.py runs/puma-1/model                                   # GlyphBEIR's test split
    python evaluate.py runs/puma-1/model --query "leftwards arrow with hook"
    python evaluate.py runs/puma-1/model --image my_glyph.png --query "make it capital"

The first prints hit rates for each cell (dataset and task) on its local pool (its own candidates) and on
the global pool (all cells' candidates together, where the modality must be right as well), and writes
results.json, TREC run files and qrels, and gallery.png. The others search the global pool.

Hit rate @k is 1 if any relevant candidate is among the first k. M-BEIR calls it recall. Search is
exact, in chunks of the pool, so memory does not grow with it; ties go to the candidate that comes first
in the pool. Above some ten million vectors, put the embeddings into a vector index of your choice.
"""

import argparse
import json
import os
import sys
import textwrap
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import MODALITIES, Benchmark, did_key
from prune_distill import depth_costs
from puma import PUMA, load_image, to_device

DEFAULT_DATA = "data/glyph_beir"
CUTOFFS = (1, 5, 10)


def stable_topk(scores, k):
    """The k best of each row, best first; among equals the lower column first. -> (values, columns)."""
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
    """Exact search: queries (Q, D), candidates (N, D) -> (scores (Q, k), indices (Q, k)), best first.

    k is cut at N. Only `chunk_size` candidates are compared at a time. Raises ValueError if the widths
    differ, the pool is empty, or an embedding is not finite.
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

    def __init__(self, benchmark, cells, split, encode, which=("local", "global")):
        paths = {"local": {cell.pool_path for cell in cells} if "local" in which else set(),
                 "global": {benchmark.global_pool_path(split)} - {None} if "global" in which else set()}  # fmt: skip
        self.global_path = next(iter(paths["global"]), None)
        self.pools = {
            path: benchmark.pool(path) for path in sorted(paths["global"] | paths["local"])
        }
        self.source, self.rows = [], {}  # row -> (pool, index in it); did key -> row
        for pool in self.pools.values():
            for index, key in enumerate(pool.keys):
                if key not in self.rows:
                    self.rows[key] = len(self.source)
                    self.source.append((pool, index))
        items = [item for cell in cells for item in cell.items]
        items += [pool[index] for pool, index in self.source]
        embeddings = encode(items)
        counts = [len(cell.items) for cell in cells] + [len(self.source)]
        *queries, self.candidates = embeddings.split(counts, dim=-2)
        self.queries = {cell.name: part for cell, part in zip(cells, queries)}

    def pool_for(self, cell, which):
        return self.pools.get(cell.pool_path if which == "local" else self.global_path)

    def rank(self, cell, which, k=max(CUTOFFS), depth=(), popularity_penalty=0.0):
        """(scores, did keys) of the k best candidates for each query of a cell, as lists.

        `popularity_penalty` p subtracts p * (the candidate's mean similarity to all queries of the
        cell), as the official code does with 0.2: it looks at all test queries, so it is off.
        """
        pool = self.pool_for(cell, which)
        rows = torch.tensor([self.rows[key] for key in pool.keys])
        queries = self.queries[cell.name][depth]
        queries = queries - popularity_penalty * queries.mean(
            0
        )  # (q - p mean(q)) . c, the same thing
        scores, indices = search(queries, self.candidates[depth][rows], k)
        keys = torch.tensor(pool.keys)
        return scores.tolist(), keys[indices].tolist()


def score(embedded, cells, depth=(), popularity_penalty=0.0):
    """{"cells": ..., "average": ..., "average_zero": ...}: the part of results.json about quality."""
    results = {}
    for cell in cells:
        entry = {"queries": len(cell.items)}
        for which in ("local", "global"):
            if embedded.pool_for(cell, which) is not None:
                _, ranked = embedded.rank(
                    cell, which, depth=depth, popularity_penalty=popularity_penalty
                )
                entry[which] = hit_rates(ranked, cell.relevant)
        results[cell.name] = entry
    zero = [entry for name, entry in results.items() if name.startswith("zero_")]
    seen = [entry for name, entry in results.items() if not name.startswith("zero_")]
    return {"cells": results, "average": _average(seen or zero), "average_zero": _average(zero)}


def _average(entries):
    """The plain mean over cells, as M-BEIR's tables have it."""
    return {
        which: {metric: sum(e[which][metric] for e in entries) / len(entries) for metric in entries[0][which]}
        for which in ("local", "global")
        if entries and which in entries[0]
    }  # fmt: skip


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
    """{heading: score(...)} -> the text table: per cell hit rate @5 (local, global) of each model."""
    first = next(iter(columns.values()))
    width = max(map(len, [*first["cells"], "average (zero-shot)"])) + 2
    lines = [" " * width + "".join(f"{heading:>20}" for heading in columns)]
    lines.append(f"{'hit rate @5, %':<{width}}" + f"{'local':>11}{'global':>9}" * len(columns))

    def line(name, pick):
        cells = []
        for results in columns.values():
            entry = pick(results)
            values = [
                entry[w]["hit_rate@5"] if w in entry else float("nan") for w in ("local", "global")
            ]
            cells.append(f"{100 * values[0]:>11.1f}{100 * values[1]:>9.1f}")
        lines.append(f"{name:<{width}}" + "".join(cells))

    for name in first["cells"]:
        line(name, lambda results, name=name: results["cells"][name])
    line("average", lambda results: results["average"])
    if first["average_zero"]:
        line("average (zero-shot)", lambda results: results["average_zero"])
    return "\n".join(lines)


def write_json(path, value):
    """Write beside, then rename: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_trec(folder, embedded, cells, popularity_penalty=0.0):
    """`<cell>.<pool>.trec` (qid Q0 did rank score run) and `<cell>.qrels` (qid 0 did relevance)."""
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        qrels = [
            f"{qid} 0 {did_text(key)} 1\n"
            for qid, keys in zip(cell.qids, cell.relevant)
            for key in sorted(keys)
        ]
        (folder / f"{cell.name}.qrels").write_text("".join(qrels))
        for which in ("local", "global"):
            if embedded.pool_for(cell, which) is None:
                continue
            scores, ranked = embedded.rank(cell, which, popularity_penalty=popularity_penalty)
            lines = [
                f"{qid} Q0 {did_text(key)} {rank} {value:.6f} puma\n"
                for qid, values, keys in zip(cell.qids, scores, ranked)
                for rank, (value, key) in enumerate(zip(values, keys), 1)
            ]
            (folder / f"{cell.name}.{which}.trec").write_text("".join(lines))


def did_text(key):
    return f"{key >> 40}:{key & (1 << 40) - 1}"


def draw_gallery(path, rows, columns=5):
    """rows of (query item, [(score, candidate item, is_right or None)]) -> a picture of the results.

    The right candidates have a thick green frame, the others a thin grey one.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(rows), columns + 1, figsize=(2 * columns + 2.4, 1.9 * len(rows) + 0.4), squeeze=False
    )
    for line, (query, found) in zip(axes, rows):
        cells = [("query", query, None)] + [
            (f"{s:.3f}", item, right) for s, item, right in found[:columns]
        ]
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
        for axis, (title, item, right) in zip(line, cells):
            axis.set_xlim(0, 1)
            axis.set_ylim(0, 1)
            text = textwrap.fill(item.get("text") or "", 22)
            if item.get("image"):
                inset = axis.inset_axes([0.2, 0.36, 0.6, 0.6] if text else [0.12, 0.12, 0.76, 0.76])
                inset.imshow(load_image(item["image"]))
                inset.axis("off")
            axis.text(
                0.5,
                0.17 if item.get("image") else 0.5,
                text,
                ha="center",
                va="center",
                fontsize=7.5,
            )
            axis.set_title(title, fontsize=9, color="tab:blue" if title == "query" else "black")
            for spine in axis.spines.values():
                spine.set_edgecolor(
                    "tab:green" if right else "tab:blue" if title == "query" else "0.8"
                )
                spine.set_linewidth(3 if right else 1)
        for axis in line[len(cells) :]:
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def gallery_rows(embedded, cells, which="global"):
    """For each seen cell its first query with the five best candidates of the global (else local) pool."""
    rows = []
    for cell in cells:
        if cell.name.startswith("zero_") and len(cells) > 8:
            continue
        scope = which if embedded.pool_for(cell, which) is not None else "local"
        scores, ranked = embedded.rank(cell, scope, k=5)
        found = []
        for value, key in zip(scores[0], ranked[0]):
            pool, index = embedded.source[embedded.rows[key]]
            found.append((value, pool[index], key in cell.relevant[0]))
        rows.append((cell.items[0], found))
    return rows


def evaluate(
    model, data, split="test", out=None, *, batch_size=64, limit=None, popularity_penalty=0.0
):
    """Evaluate on all cells of a split; print the table, write everything to folder `out`; -> results."""
    benchmark = Benchmark(data)
    cells = split_cells(benchmark, split, limit)
    embedded = Embedded(benchmark, cells, split, lambda items: model.encode(items, batch_size))
    results = score(embedded, cells, popularity_penalty=popularity_penalty)
    results["efficiency"] = efficiency(model, [i for cell in cells for i in cell.items[:64]])
    results["settings"] = {"data": str(data), "split": split, "limit": limit,
                           "popularity_penalty": popularity_penalty}  # fmt: skip
    print(table({"hit rates": results}))
    if popularity_penalty:
        print(f"popularity penalty {popularity_penalty}: the scores use all test queries at once")
    if out is not None:
        out = Path(out)
        write_trec(out, embedded, cells, popularity_penalty)
        draw_gallery(out / "gallery.png", gallery_rows(embedded, cells))
        write_json(out / "results.json", results)
        print(f"wrote {out / 'results.json'} and {out / 'gallery.png'}")
    return results


def show(model, data, query, out, batch_size=64, k=10):
    """Search the global test pool for an item, print the k best, draw them."""
    benchmark = Benchmark(data)
    path = benchmark.global_pool_path("test")
    if path is None:
        raise ValueError(f"{data} has no global test pool to search")
    pool = benchmark.pool(path)
    (vector,) = model.encode([query], show_progress=False)  # first: a bad image should fail at once
    vectors = model.encode([pool[i] for i in range(len(pool))], batch_size)
    scores, indices = search(vector[None], vectors, k)
    found = [(s, pool[i], None) for s, i in zip(scores[0].tolist(), indices[0].tolist())]
    for rank, (value, item, _) in enumerate(found, 1):
        kind = MODALITIES[pool.modality[indices[0][rank - 1]]]
        print(f"{rank:>3}  {value:.3f}  {kind:<10}  {item['text'] or ''}  {item['image'] or ''}")
    Path(out).mkdir(parents=True, exist_ok=True)
    draw_gallery(Path(out) / "search.png", [(query, found[:5]), (query, found[5:])])
    print(f"wrote {Path(out) / 'search.png'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="model folder or hub id")
    parser.add_argument(
        "--data", default=DEFAULT_DATA, help="M-BEIR directory; GlyphBEIR is written if absent"
    )
    parser.add_argument("--split", default="test", help="test brings the zero-shot split along")
    parser.add_argument("--out", help="folder for results; default: results/<model>")
    parser.add_argument("--query", help="search for this text instead of evaluating")
    parser.add_argument("--image", help="search for this image (with --query: image and text)")
    parser.add_argument("--batch-size", type=int, default=64, help="items embedded at a time")
    parser.add_argument("--limit", type=int, help="only the first queries of each cell")
    parser.add_argument(
        "--popularity-penalty", type=float, default=0.0, help="0.2: as the official code"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device"
    )
    args = parser.parse_args()
    try:
        if args.out and Path(args.out).exists():
            raise ValueError(f"--out {args.out} exists: remove it, or choose another folder")
        out = args.out or "results/" + "-".join(Path(args.model).resolve().parts[-2:])
        ensure_data(args.data)
        model = PUMA.from_pretrained(args.model, device=args.device)
        if args.query or args.image:
            show(model, args.data, {"text": args.query, "image": args.image}, out, args.batch_size)
        else:
            evaluate(model, args.data, args.split, out, batch_size=args.batch_size, limit=args.limit,
                     popularity_penalty=args.popularity_penalty)  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def ensure_data(folder):
    """Have the default benchmark written when its folder is absent."""
    if str(folder) == DEFAULT_DATA and not Path(folder).exists():
        from toy.glyph_beir import build

        print(f"writing GlyphBEIR to {folder} ...", flush=True)
        print(build(folder))


if __name__ == "__main__":
    main()
