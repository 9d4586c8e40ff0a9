"""What an evaluation leaves behind: tables, results.json, results.md, TREC run files and qrels."""

import json
import os

from data import did_text
from metrics import DEPTH, KINDS

SHOWN = {"hit_rate@1": "hit@1", "hit_rate@5": "hit@5", "hit_rate@10": "hit@10",
         "recall@10": "rec@10", "mrr@10": "MRR", "ndcg@10": "nDCG"}


def table(columns):
    """{heading: results} -> a text table: hit rate @5 on local and global pools, and the cost."""
    rows = [(name, [pick(results, name) for results in columns.values()])
            for name, pick in _rows(next(iter(columns.values())))]
    lines = [f"{'':<24}" + "".join(f"{heading:>20}" for heading in columns)]
    lines.append(f"{'hit rate @5, %':<24}" + f"{'local':>11}{'global':>9}" * len(columns))
    for name, entries in rows:
        lines.append(f"{name:<24}")
        for entry in entries:
            local, union = (f"{100 * entry[which]['hit_rate@5']:.1f}" if which in entry else "-"
                            for which in ("local", "global"))
            lines[-1] += f"{local:>11}{union:>9}"
    costs = {"parameters": ",", "gflops_per_item": ".4f", "items_per_s": ",.0f"}
    for key, form in costs.items():
        values = [results["efficiency"][key] for results in columns.values()]
        lines.append(f"{key:<24}" + "".join(f"{value:>20{form}}" for value in values))
    return "\n".join(lines)


def _rows(results):
    """(name, function of results and name that picks the entry) of each row of a table."""
    rows = [(name, lambda results, name: results["cells"][name]) for name in results["cells"]]
    rows.append(("average", lambda results, _: results["average"]))
    if results["average_zero"]:
        rows.append(("average, zero-shot", lambda results, _: results["average_zero"]))
    return rows


def metrics_table(results, which):
    """One pool's metrics of every cell in percent; the headline with its 95 % interval."""
    lines = [f"{which + ' pool, %':<20}" + "".join(f"{short:>7}" for short in SHOWN.values())
             + "   headline [95 % interval]"]
    for name, pick in _rows(results):
        entry = pick(results, name)
        if which in entry:
            lines.append(f"{name:<20}" + "".join(f"{100 * entry[which][metric]:>7.1f}"
                                                 for metric in SHOWN)
                         + f"   {headline(entry, which)}")
    return "\n".join(lines) if len(lines) > 1 else ""


def headline(entry, which):
    """`71.4 [67.2, 75.2] hit@5`."""
    low, high = entry["intervals"][which]["headline"]
    metric = SHOWN.get(entry.get("headline_metric"), "")  # an average has several
    value = entry[which]["headline"]
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}] {metric}".strip()


def confusion_table(confusion):
    """What stands first and among the first ten of the global pool, in percent."""
    lines = [f"{'global pool, %':<38}{'of the first':^26}{f'of the first {DEPTH}':^26}",
             f"{'':<38}" + f"{'right':>8}{'wrong':>8}{'wrong':>10}" * 2,
             f"{'task':<38}" + f"{'item':>8}{'item':>8}{'modality':>10}" * 2]
    for task, part in confusion.items():
        name = f"{task}: {part['query']} -> {part['target']}"
        shares = [part[top][kind] for top in ("top1", f"top{DEPTH}") for kind in KINDS]
        lines.append(f"{name:<38}" + "".join(f"{100 * share:>{width}.1f}" for share, width
                                             in zip(shares, (8, 8, 10) * 2)))
    return "\n".join(lines)


def write_markdown(path, results):
    """results.md: the same numbers, for people who were not there."""
    settings = ", ".join(f"{key} {value}" for key, value in results["settings"].items())
    cost = ", ".join(f"{key} {value:,.4g}" for key, value in results["efficiency"].items())
    lines = ["# Evaluation", "", settings + ".", "", cost + ".", "",
             "Means over queries in percent; `headline` is the metric of M-BEIR's tables, with its "
             "95 % bootstrap interval over queries. `average` is the plain mean over cells."]
    for which in ("local", "global"):
        rows = [(name, pick(results, name)) for name, pick in _rows(results)]
        rows = [(name, entry) for name, entry in rows if which in entry]
        if rows:
            names = results["average"][which]
            lines += ["", f"## {which.capitalize()} pool", "",
                      "| cell | queries | " + " | ".join(names) + " |",
                      "|---" * (2 + len(names)) + "|"]
            lines += [f"| {name} | {entry.get('queries', '')} | "
                      + " | ".join(f"{100 * entry[which][m]:.1f}" if m != "headline"
                                   else headline(entry, which) for m in names) + " |"
                      for name, entry in rows]
    if results.get("confusion"):
        lines += ["", "## What kind of wrong: the global pool", "", "```",
                  confusion_table(results["confusion"]), "```"]
    write_text(path, "\n".join(lines) + "\n")


def write_json(path, value):
    """Write beside, then rename: a reader never sees half a file."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_trec(folder, cells, rankings):
    """`<cell>.<pool>.trec` (qid Q0 did rank score run) and `<cell>.qrels` (qid 0 did relevance).

    trec_eval sorts by score itself, and ties by did: so equal scores are written 0.000001 apart, in
    the order of our ranking, and other tools see the ranking that our metrics saw.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        pairs = [(qid, key) for qid, keys in zip(cell.qids, cell.relevant) for key in sorted(keys)]
        qrels = "".join(f"{qid} 0 {did_text(key)} 1\n" for qid, key in pairs)
        write_text(folder / f"{cell.name}.qrels", qrels)
    queries = {cell.name: cell.qids for cell in cells}
    for (name, which), (scores, ranked) in rankings.items():
        lines = [
            f"{qid} Q0 {did_text(key)} {rank} {value:.6f} puma\n"
            for qid, values, keys in zip(queries[name], scores, ranked)
            for rank, (value, key) in enumerate(zip(_falling(values), keys), 1)
        ]
        write_text(folder / f"{name}.{which}.trec", "".join(lines))


def _falling(values):
    """Scores as millionths, each lower than the one before."""
    last = float("inf")
    for value in values:
        last = min(round(1e6 * value), last - 1)
        yield last / 1e6
