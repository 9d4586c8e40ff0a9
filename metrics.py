"""Ranking metrics with confidence intervals, and what kind of wrong a wrong result is.

Of one query with the relevant candidates R and the first k results:

    hit rate @k = 1 if any of R is among them, else 0          (M-BEIR calls this recall)
    recall @k   = share of R that is among them                (what other tools call recall)
    MRR @10     = 1 / rank of the first of R, 0 beyond rank 10
    nDCG @10    = sum over hits of 1 / log2(rank + 1), over the most that could be reached

A cell (dataset and task) has the mean over its queries, an average the plain mean over cells, as in
M-BEIR's tables. M-BEIR's headline metric is hit rate @5, @10 for the cells of Fashion200K and
FashionIQ; it stands as `headline` beside the others.

Intervals are 95 % percentile bootstrap: queries are drawn again with replacement, cell by cell,
1,000 times. They say how much another sample of queries would move a number, not another training.
Shapes: Q queries, R results each, M metrics.
"""

import re

import torch

from data import TASKS, modality_class

SCHEMA = 2  # of results.json; 1 had hit rates only and no "schema"
CUTOFFS = (1, 5, 10)
DEPTH = max(CUTOFFS)  # results a query that metrics look at
KINDS = ("right item", "wrong item", "wrong modality")


def query_metrics(ranked, relevant, cutoffs=CUTOFFS):
    """{metric: (Q,) float64}, the value of each query.

    ranked: for each query ids, best first; relevant: for each query the set of right ids. MRR and
    nDCG look at the first max(cutoffs). Raises ValueError without queries, or if one of them has
    nothing relevant.
    """
    depth = max(cutoffs)
    hits = _hits(ranked, relevant, depth)
    counts = torch.tensor([len(right) for right in relevant], dtype=torch.float64)
    if not len(counts) or not counts.all():
        what = f"query {counts.tolist().index(0)} has no relevant candidate" if len(counts) else (
            "there are no queries")
        raise ValueError(f"cannot score: {what}")
    ranks = torch.arange(1, depth + 1, dtype=torch.float64)
    values = {f"hit_rate@{k}": hits[:, :k].amax(1) for k in cutoffs}
    values |= {f"recall@{k}": hits[:, :k].sum(1) / counts for k in cutoffs}
    values[f"mrr@{depth}"] = (hits / ranks).amax(1)
    gains = 1 / (ranks + 1).log2()
    ideal = gains.cumsum(0)[counts.clamp(max=depth).long() - 1]
    values[f"ndcg@{depth}"] = hits @ gains / ideal
    return values


def _hits(ranked, relevant, depth):
    """(Q, depth) float64: 1 where a relevant candidate stands. A small pool ranks fewer."""
    hits = torch.zeros(len(ranked), depth, dtype=torch.float64)
    for row, (ids, right) in enumerate(zip(ranked, relevant, strict=True)):
        for column, i in enumerate(ids[:depth]):
            hits[row, column] = i in right
    return hits


def headline_metric(cell_name):
    """The metric that M-BEIR reports for a cell: hit rate @5, or @10 for the fashion datasets."""
    return f"hit_rate@{10 if re.search('fashion200k|fashioniq', cell_name) else 5}"


def resampled_means(values, generator, draws=1000):
    """(Q, M) values -> (draws, M): means of Q queries drawn with replacement, again and again."""
    size = len(values)
    means = []
    for start in range(0, draws, block := max(1, 2**22 // size)):  # at most 4 M numbers at a time
        picks = torch.randint(size, (min(block, draws - start), size), generator=generator)
        counts = torch.zeros(picks.shape, dtype=values.dtype)
        counts.scatter_add_(1, picks, torch.ones_like(counts))  # how often each query was drawn
        means.append(counts @ values / size)
    return torch.cat(means)


def score(cells, rankings, draws=1000, seed=0):
    """The part of results.json on quality: "schema", "cells", "tasks", "average", "average_zero".

    rankings: {(cell name, "local" or "global"): (scores, ids)}. An entry looks like

        {"queries": 500, "local": {"hit_rate@1": 0.4, ..., "ndcg@10": 0.5, "headline": 0.6},
         "global": {...}, "intervals": {"local": {"hit_rate@1": [0.36, 0.44], ...}, ...}}

    Zero-shot cells, named zero_..., have their own tasks and average. Raises ValueError if a cell
    has no queries.
    """
    generator = torch.Generator().manual_seed(seed)
    entries, samples = {}, {}
    for cell in cells:
        entry = {"queries": len(cell.items), "headline_metric": headline_metric(cell.name)}
        entries[cell.name], samples[cell.name] = entry, {}
        for which in ("local", "global"):
            if (cell.name, which) in rankings:
                try:
                    metrics = query_metrics(rankings[cell.name, which][1], cell.relevant)
                except ValueError as error:
                    raise ValueError(f"{cell.name}: {error}") from error
                metrics["headline"] = metrics[entry["headline_metric"]]
                values = torch.stack(list(metrics.values()), dim=1)
                entry[which] = dict(zip(metrics, values.mean(0).tolist()))
                samples[cell.name][which] = resampled_means(values, generator, draws)
        entry["intervals"] = _intervals(samples[cell.name], entry)

    def average(names):
        return _average([entries[name] for name in names], [samples[name] for name in names])

    zero = [name for name in entries if name.startswith("zero_")]
    seen = [name for name in entries if not name.startswith("zero_")]
    groups = {}
    for name in entries:
        groups.setdefault(task_name(name), []).append(name)
    tasks = {task: {"cells": names, **average(names)} for task, names in groups.items()}
    return {"schema": SCHEMA, "cells": entries, "tasks": tasks,
            "average": average(seen or zero), "average_zero": average(zero)}


def _average(entries, samples):
    """The plain mean over cells, as in M-BEIR's tables; {} without cells."""
    average, drawn = {}, {}
    for which in ("local", "global"):
        if entries and which in entries[0]:
            average[which] = {metric: sum(entry[which][metric] for entry in entries) / len(entries)
                              for metric in entries[0][which]}
            drawn[which] = torch.stack([sample[which] for sample in samples]).mean(0)
    return {**average, "intervals": _intervals(drawn, average)} if average else {}


def _intervals(samples, entry):
    """{pool: (draws, M)} -> {pool: {metric: [2.5 %, 97.5 %]}}."""
    limits = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {which: dict(zip(entry[which], drawn.quantile(limits, dim=0).T.tolist()))
            for which, drawn in samples.items()}


def task_name(cell_name):
    """`zero_glyph_task7` -> `zero_task7`."""
    zero = "zero_" if cell_name.startswith("zero_") else ""
    return zero + re.search(r"task\d+$", cell_name)[0]


def modality_confusion(cells, rankings, modality_of):
    """What stands first, and among the first ten, of the global pool, task by task.

    A result is the right item; or a wrong item of the right modality; or of the wrong modality,
    which the query's instruction ruled out. `modality_of(id)` is a candidate's modality class.
    -> {task: {"query", "target", "top1": {kind: share of results}, "top10": {...}}}, cells of one
    task averaged; {} without a global pool. Not in the paper, whose tables have local pools: it
    shows what MAC-Loss pays for weighing inter-modality negatives less.
    """
    shares = {}  # task -> one (cutoffs, kinds) tensor a cell
    for cell in cells:
        if (cell.name, "global") not in rankings:
            continue
        task = task_name(cell.name)
        wanted = modality_class(TASKS[int(task.split("task")[1])][1])
        ranked = rankings[cell.name, "global"][1]
        kinds = torch.tensor([[0 if i in right else 1 + (modality_of(i) != wanted)
                               for i in ids[:DEPTH]] for ids, right in zip(ranked, cell.relevant)])
        counts = [torch.bincount(kinds[:, :k].flatten(), minlength=3) for k in (1, DEPTH)]
        shares.setdefault(task, []).append(torch.stack([n.double() / n.sum() for n in counts]))
    out = {}
    for task, parts in shares.items():
        query, target = TASKS[int(task.split("task")[1])]
        first, ten = torch.stack(parts).mean(0).tolist()
        out[task] = {"query": query, "target": target, "top1": dict(zip(KINDS, first)),
                     f"top{DEPTH}": dict(zip(KINDS, ten))}
    return out
