"""Retrieval metrics, tables, TREC run files and qrels.

Of one query with the relevant candidates R and the first k results:

    hit rate @k = 1 if any of R is among them, else 0          (M-BEIR calls this recall)
    recall @k   = share of R that is among them                (what other tools call recall)
    MRR @10     = 1 / rank of the first of R, 0 beyond rank 10
    nDCG @10    = sum over hits of 1 / log2(rank + 1), over the most that could be reached

A cell (dataset and task) has the mean over its queries, an average the plain mean over cells. The
`headline` is the one that M-BEIR's tables show: hit rate @5, @10 for Fashion200K and FashionIQ.
"""

import re

import torch

from support.files import write_text
from support.items import MODALITIES

CUTOFFS = (1, 5, 10)
DEPTH = max(CUTOFFS)  # results a query that metrics look at
KINDS = ("right item", "wrong item", "wrong modality")
SHOWN = {"hit_rate@1": "hit@1", "hit_rate@5": "hit@5", "hit_rate@10": "hit@10",
         "recall@10": "rec@10", "mrr@10": "MRR", "ndcg@10": "nDCG"}


def query_metrics(ranked, relevant, name="these queries"):
    """{metric: (Q,) float64}, the value of each query.

    ranked: for each query ids, best first, none twice; relevant: for each query the set of right
    ids. Raises ValueError, naming the cell, if there is no query, or one has nothing relevant.
    """
    sizes = [len(right) for right in relevant]
    if not sizes or 0 in sizes:
        what = f"query {sizes.index(0)} has no relevant candidate" if sizes else "there is no query"
        raise ValueError(f"cannot score {name}: {what}")
    hits = torch.zeros(len(ranked), DEPTH, dtype=torch.float64)  # 1 where a relevant one stands
    for row, (ids, right) in enumerate(zip(ranked, relevant, strict=True)):
        for column, i in enumerate(ids[:DEPTH]):  # a small pool ranks fewer
            hits[row, column] = i in right
    counts = torch.tensor(sizes, dtype=torch.float64)
    ranks = torch.arange(1, DEPTH + 1, dtype=torch.float64)
    values = {f"hit_rate@{k}": hits[:, :k].amax(1) for k in CUTOFFS}
    values |= {f"recall@{k}": hits[:, :k].sum(1) / counts for k in CUTOFFS}
    values[f"mrr@{DEPTH}"] = (hits / ranks).amax(1)
    gains = 1 / (ranks + 1).log2()
    ideal = gains.cumsum(0)[counts.clamp(max=DEPTH).long() - 1]
    values[f"ndcg@{DEPTH}"] = hits @ gains / ideal
    return values


def headline_metric(cell_name):
    """The metric that M-BEIR reports for a cell: hit rate @5, or @10 for the fashion datasets."""
    return f"hit_rate@{10 if re.search('fashion200k|fashioniq', cell_name) else 5}"


def score(cells, rankings):
    """The part of results.json on quality: "cells", "average", "average_zero" (zero-shot cells').

    rankings: {(cell name, "local" or "global"): (scores, ids)}. An entry looks like

        {"queries": 500, "local": {"hit_rate@1": 0.4, ..., "headline": 0.6}, "global": {...}, ...}

    Raises ValueError if a cell has no queries.
    """
    entries = {}
    for cell in cells:
        metric = headline_metric(cell.name)
        entries[cell.name] = entry = {"queries": len(cell.items), "headline_metric": metric}
        for which in ("local", "global"):
            if (cell.name, which) in rankings:
                values = query_metrics(rankings[cell.name, which][1], cell.relevant, cell.name)
                values["headline"] = values[metric]
                entry[which] = {name: value.mean().item() for name, value in values.items()}

    def average(names):
        """Plain means over some cells."""
        out = {}
        for which in ("local", "global"):
            rows = [entries[name][which] for name in names if which in entries[name]]
            if rows:
                out[which] = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        return out

    zero = [name for name in entries if name.startswith("zero_")]
    seen = [name for name in entries if name not in zero] or zero
    return {"cells": entries, "average": average(seen), "average_zero": average(zero)}


def modality_confusion(cells, rankings, modality_of):
    """What stands first on the global pool, task by task: the right item; a wrong item of the right
    modality; or one of the wrong modality, which the query's instruction ruled out.

    `modality_of(id)` is a candidate's modality class. -> {task: {"query", "target", kind: share of
    first places}}, cells of one task averaged; {} without a global pool. Not in the paper.
    """
    tasks = {}
    for cell in cells:
        if (cell.name, "global") in rankings:
            zero, number = re.fullmatch(r"(zero_)?.*(task\d+)", cell.name).groups("")
            wanted = MODALITIES.index(cell.target_modality)
            kinds = [0 if ids[0] in right else 1 + (modality_of(ids[0]) != wanted) for ids, right
                     in zip(rankings[cell.name, "global"][1], cell.relevant)]
            task = tasks.setdefault(zero + number, {"shares": []})
            task |= {"query": cell.query_modality, "target": cell.target_modality}
            task["shares"].append([kinds.count(kind) / len(kinds) for kind in range(len(KINDS))])
    for task in tasks.values():
        columns = zip(*task.pop("shares"))
        task |= {kind: sum(shares) / len(shares) for kind, shares in zip(KINDS, columns)}
    return tasks


def linear_cka(x, y):
    """Likeness of two (N, D) representations, 1 if one is the other rotated and scaled (Kornblith
    et al., 2019): ||Y'X||^2 / (||X'X|| ||Y'Y||) of the centred ones."""
    x, y = (part - part.mean(0) for part in (x, y))
    return ((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()).clamp(1e-30)).item()


def align(lines):
    """Lists of strings, one a line, as text in columns, the first one's aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
                     for line in lines)


def _rows(results):
    """(name, entry) of each row of a table: the cells, then the averages."""
    rows = [*results["cells"].items(), ("average", results["average"])]
    return rows + [("average, zero-shot", results["average_zero"])] * bool(results["average_zero"])


def comparison_table(columns):
    """{heading: results} -> a text table: hit rate @5 on local and global pools, and the cost."""
    lines = [["", *(text for heading in columns for text in ("", heading))],
             ["hit rate @5, %", *("local", "global") * len(columns)]]
    for row in zip(*map(_rows, columns.values())):
        lines.append([row[0][0]])
        for _, entry in row:
            lines[-1] += [f"{100 * entry[which]['hit_rate@5']:.1f}" if which in entry else "-"
                          for which in ("local", "global")]
    for key, form in {"parameters": ",", "gflops_per_item": ".4f", "items_per_s": ",.0f"}.items():
        lines.append([key])
        for results in columns.values():
            lines[-1] += ["", f"{results['efficiency'][key]:{form}}"]
    return align(lines)


def metrics_table(results, which):
    """One pool's metrics of every cell in percent."""
    lines = [[f"{which} pool, %", *SHOWN.values(), "headline"]]
    for name, entry in _rows(results):
        if which in entry:
            values = [entry[which][key] for key in [*SHOWN, "headline"]]
            lines.append([name, *(f"{100 * value:.1f}" for value in values)])
    return align(lines) if len(lines) > 1 else ""


def confusion_table(confusion):
    """What stands first on the global pool, in percent."""
    lines = [["first on the global pool, %", *KINDS]]
    for task, part in confusion.items():
        shares = (f"{100 * part[kind]:.1f}" for kind in KINDS)
        lines.append([f"{task}: {part['query']} -> {part['target']}", *shares])
    return align(lines) if confusion else ""


def depth_table(rows):
    """One line a depth; rows as `evaluate.compare_depths` returns."""
    forms = {"depth": "d", "local": ".1%", "global": ".1%", "cosine": ".3f", "cka": ".3f",
             "last_local": ".1%", "last_global": ".1%", "last_cosine": ".3f", "last_cka": ".3f",
             "parameters": ",", "gflops_per_item": ".4f", "latency_ms": ".1f",
             "items_per_s": ",.0f"}
    keys = [key for key in forms if key in rows[0]]
    lines = [keys, *([f"{row[key]:{forms[key]}}" for key in keys] for row in rows)]
    title = "untrained: hit rate @5 on sampled pools, likeness to the last layer, cost"
    return f"{title}\n{align(lines)}"


def write_trec(folder, cells, rankings, id_text=str):
    """`<cell>.<pool>.trec` (qid Q0 did rank score run) and `<cell>.qrels` (qid 0 did relevance).

    trec_eval sorts by score itself, and ties by did: so equal scores are written 0.000001 apart, in
    the order of our ranking. It refuses a query that stands there twice: the last is written."""
    for cell in cells:
        pairs = {(qid, key) for qid, keys in zip(cell.qids, cell.relevant) for key in keys}
        qrels = "".join(f"{qid} 0 {id_text(key)} 1\n" for qid, key in sorted(pairs))
        write_text(folder / f"{cell.name}.qrels", qrels)
    qids = {cell.name: cell.qids for cell in cells}
    for (name, which), (scores, ranked) in rankings.items():
        lines = []
        for qid, (values, keys) in dict(zip(qids[name], zip(scores, ranked))).items():
            last = float("inf")
            for rank, (value, key) in enumerate(zip(values, keys), 1):
                last = min(round(1e6 * value), last - 1)  # millionths, each below the one before
                lines.append(f"{qid} Q0 {id_text(key)} {rank} {last / 1e6:.6f} puma\n")
        write_text(folder / f"{name}.{which}.trec", "".join(lines))
