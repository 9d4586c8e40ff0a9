"""support/report.py against slow versions written from the formulas, and against pytrec_eval."""

import math
from collections import Counter, namedtuple

import pytest
import torch

from support.report import (KINDS, comparison_table, confusion_table, depth_table, headline_metric,
                            linear_cka, metrics_table, modality_confusion, query_metrics, score,
                            write_trec)

Cell = namedtuple("Cell", "name qids items relevant query_modality target_modality")


def random_rankings(seed, queries=40, pool=25, results=10):
    """Ids ranked by scores with many ties, one to six relevant; -> scores, ranked, relevant."""
    torch.manual_seed(seed)
    scores = torch.randint(0, 4, (queries, pool)).float()
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :results]
    relevant = [set(torch.randperm(pool)[: 1 + i % 6].tolist()) for i in range(queries)]
    return scores.gather(1, order).tolist(), order.tolist(), relevant


def make_cells():
    """Three cells, one of them zero-shot, with rankings of both pools; two cells of one task."""
    cells, rankings = [], {}
    for seed, name in enumerate(("a_task0", "fashioniq_task0", "zero_a_task4")):
        scores, ranked, relevant = random_rankings(seed, queries=30 + seed)
        qids = [f"1:{i}" for i in range(len(ranked))]
        cells.append(Cell(name, qids, [{}] * len(ranked), relevant, "text", "image"))
        for which in ("local", "global"):
            rankings[name, which] = (scores, ranked)
    return cells, rankings


def slow_metrics(ids, right):
    """The formulas of the module's docstring, for one query."""
    out = {}
    for k in (1, 5, 10):
        found = [i for i in ids[:k] if i in right]
        out[f"hit_rate@{k}"] = 1.0 if found else 0.0
        out[f"recall@{k}"] = len(found) / len(right)
    out["mrr@10"] = 0.0
    for rank in range(10, 0, -1):
        if rank <= len(ids) and ids[rank - 1] in right:
            out["mrr@10"] = 1 / rank
    gain = sum(1 / math.log2(rank + 1) for rank, i in enumerate(ids[:10], 1) if i in right)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(right), 10) + 1))
    out["ndcg@10"] = gain / ideal
    return out


@pytest.mark.parametrize("pool, results", [(25, 10), (25, 20), (6, 6), (1, 1)])
def test_every_metric_equals_a_slow_one(pool, results):
    _, ranked, relevant = random_rankings(pool, pool=pool, results=results)
    fast = query_metrics(ranked, relevant)
    for row, (ids, right) in enumerate(zip(ranked, relevant)):
        values = {name: column[row].item() for name, column in fast.items()}
        assert values == pytest.approx(slow_metrics(ids, right), abs=1e-12)


def test_known_numbers():
    fast = query_metrics([[4, 2, 9], [1, 3, 5], [7, 8, 6]], [{9, 100}, {1, 3}, {0}])
    assert fast["hit_rate@1"].tolist() == [0, 1, 0] and fast["hit_rate@5"].tolist() == [1, 1, 0]
    assert fast["recall@5"].tolist() == [0.5, 1, 0]
    assert fast["mrr@10"].tolist() == pytest.approx([1 / 3, 1, 0])
    # one of two relevant at rank 3: (1 / log2 4) / (1 / log2 2 + 1 / log2 3)
    assert fast["ndcg@10"].tolist() == pytest.approx([0.5 / (1 + 1 / math.log2(3)), 1, 0])


def test_no_queries_and_nothing_relevant_are_errors():
    with pytest.raises(ValueError, match="query 1 has no relevant candidate"):
        query_metrics([[1], [2]], [{1}, set()])
    with pytest.raises(ValueError, match="longer"):
        query_metrics([[1]], [{1}, {2}])
    with pytest.raises(ValueError, match="cannot score .*: there is no query"):
        score([Cell("a_task0", [], [], [], "text", "text")], {("a_task0", "local"): ([], [])})


def test_headline_metrics_are_those_of_m_beirs_tables():
    at_ten = {name for name in ("fashion200k_task0", "fashion200k_task3", "fashioniq_task7",
                                "mscoco_task0", "cirr_task7", "zero_glyph_task1")
              if headline_metric(name) == "hit_rate@10"}
    assert at_ten == {"fashion200k_task0", "fashion200k_task3", "fashioniq_task7"}


def test_score_averages_over_cells_and_pools():
    cells, rankings = make_cells()
    results = score(cells, rankings)
    entries = results["cells"]
    for cell in cells:
        slow = [slow_metrics(ids, right) for ids, right
                in zip(rankings[cell.name, "local"][1], cell.relevant)]
        entry = entries[cell.name]
        assert entry["queries"] == len(cell.items)
        for name in slow[0]:
            assert entry["local"][name] == pytest.approx(sum(row[name] for row in slow) / len(slow))
        assert entry["local"]["headline"] == entry["local"][headline_metric(cell.name)]
    both = (entries["a_task0"]["global"]["hit_rate@5"]
            + entries["fashioniq_task0"]["global"]["hit_rate@10"]) / 2
    assert results["average"]["global"]["headline"] == pytest.approx(both)
    assert results["average_zero"]["local"] == entries["zero_a_task4"]["local"]
    zero = score(cells[2:], rankings)
    assert zero["average"] == zero["average_zero"], "where there are only zero-shot cells"


def test_tables_show_the_numbers_in_percent_and_leave_out_a_pool_that_is_not_there():
    cells, rankings = make_cells()
    cost = {"efficiency": {"parameters": 1234567, "gflops_per_item": 0.5, "items_per_s": 1999.7}}
    both = score(cells, rankings) | cost
    local = score(cells, {key: value for key, value in rankings.items() if key[1] == "local"})
    lines = comparison_table({"A": local | cost, "PUMA": both}).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    rates = [f"{100 * both['average'][pool]['hit_rate@5']:.1f}" for pool in ("local", "global")]
    assert lines[5].split() == ["average", rates[0], "-", *rates]
    assert lines[7].split() == ["parameters", "1,234,567", "1,234,567"]
    entry = both["cells"]["fashioniq_task0"]["global"]
    values = [entry[f"hit_rate@{k}"] for k in (1, 5, 10)] + [
        entry[name] for name in ("recall@10", "mrr@10", "ndcg@10", "hit_rate@10")]
    assert metrics_table(both, "global").splitlines()[2].split() == [
        "fashioniq_task0", *(f"{100 * value:.1f}" for value in values)]
    assert metrics_table(local, "global") == ""


def test_modality_confusion_equals_a_slow_one():
    torch.manual_seed(1)
    modality = torch.randint(0, 3, (25,)).tolist()  # text, image, image+text
    cells, rankings = make_cells()
    confusion = modality_confusion(cells, rankings, lambda i: modality[i])
    assert list(confusion) == ["task0", "zero_task4"]
    means = dict.fromkeys(KINDS, 0)
    for cell in cells[:2]:
        counts = Counter()
        for (first, *_), right in zip(rankings[cell.name, "global"][1], cell.relevant):
            wrong = "wrong item" if modality[first] == 1 else "wrong modality"  # image wanted
            counts["right item" if first in right else wrong] += 1
        for kind in KINDS:
            means[kind] += counts[kind] / counts.total() / 2
    shares = {kind: confusion["task0"].pop(kind) for kind in KINDS}
    assert shares == pytest.approx(means)
    assert confusion["task0"] == {"query": "text", "target": "image"}
    confusion["task0"] |= shares
    line = confusion_table(confusion).splitlines()[1]
    assert line.split() == ["task0:", "text", "->", "image",
                            *(f"{100 * means[kind]:.1f}" for kind in KINDS)]
    local = {key: value for key, value in rankings.items() if key[1] == "local"}
    assert modality_confusion(cells, local, lambda i: 0) == {} and confusion_table({}) == ""


def test_linear_cka_equals_a_slow_one_and_ignores_rotation_scale_and_shift():
    torch.manual_seed(0)
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)

    def slow(x, y):  # Hilbert-Schmidt independence of the centred Gram matrices
        def gram(z):
            centred = [[v - sum(column) / 9 for v in column] for column in zip(*z)]
            return [[sum(c[i] * c[j] for c in centred) for j in range(9)] for i in range(9)]

        def hsic(a, b):
            return sum(a[i][j] * b[i][j] for i in range(9) for j in range(9))

        a, b = gram(x.tolist()), gram(y.tolist())
        return hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b))

    assert linear_cka(x, y) == pytest.approx(slow(x, y))
    assert linear_cka(x, x) == pytest.approx(1)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert linear_cka(1e-3 * x, 1e-3 * x) == pytest.approx(1)
    assert linear_cka(x, 0 * y) == 0, "all alike: no division by zero"


def test_the_table_of_depths_has_a_line_a_depth():
    rows = [{"depth": i, "local": hit, "parameters": 10 ** i, "gflops_per_item": 1.0 + i}
            for i, hit in enumerate((0.5, 0.8), 1)]
    assert [line.split() for line in depth_table(rows).splitlines()[1:3]] == [
        ["depth", "local", "parameters", "gflops_per_item"], ["1", "50.0%", "10", "2.0000"]]


def test_trec_files_hold_our_ranking_strictly_falling_and_no_id_twice(tmp_path):
    cell = Cell("a_task0", ["1:1", "1:2", "1:1"], [{}] * 3, [{7}, {8, 9}, {7}], "text", "text")
    ranking = [[0.5, 0.5, 0.5, 0.2], [0.9], [0.5, 0.5, 0.5, 0.2]], [[3, 1, 2, 7], [8], [3, 1, 2, 7]]
    write_trec(tmp_path, [cell], {("a_task0", "local"): ranking}, lambda key: f"d:{key}")
    run = [line.split() for line in (tmp_path / "a_task0.local.trec").read_text().splitlines()]
    assert [row[:4] for row in run] == [
        ["1:1", "Q0", "d:3", "1"], ["1:1", "Q0", "d:1", "2"], ["1:1", "Q0", "d:2", "3"],
        ["1:1", "Q0", "d:7", "4"], ["1:2", "Q0", "d:8", "1"]]
    assert [row[4] for row in run] == ["0.500000", "0.499999", "0.499998", "0.200000", "0.900000"]
    assert (tmp_path / "a_task0.qrels").read_text() == (
        "1:1 0 d:7 1\n1:2 0 d:8 1\n1:2 0 d:9 1\n")


def test_trec_files_give_pytrec_eval_the_same_numbers_ties_included(tmp_path):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    cells, rankings = make_cells()
    results = score(cells, rankings)
    write_trec(tmp_path, cells, rankings, lambda i: f"1:{(7 * i) % 25}")  # ties: ordered by did
    names = {"hit_rate@1": "success_1", "hit_rate@5": "success_5", "hit_rate@10": "success_10",
             "recall@5": "recall_5", "recall@10": "recall_10", "mrr@10": "recip_rank",
             "ndcg@10": "ndcg_cut_10"}
    for cell in cells:
        with open(tmp_path / f"{cell.name}.qrels") as qrels:
            judge = pytrec_eval.RelevanceEvaluator(
                pytrec_eval.parse_qrel(qrels), {"success", "recall", "recip_rank", "ndcg_cut"})
        with open(tmp_path / f"{cell.name}.local.trec") as run:
            theirs = judge.evaluate(pytrec_eval.parse_run(run)).values()
        for ours, name in names.items():
            mean = sum(query[name] for query in theirs) / len(theirs)
            assert results["cells"][cell.name]["local"][ours] == pytest.approx(mean), ours
