"""metrics.py against slow versions written from the formulas, and against pytrec_eval."""

import math
from collections import namedtuple

import pytest
import torch

from data import did_key
from metrics import (
    KINDS,
    headline_metric,
    modality_confusion,
    query_metrics,
    resampled_means,
    score,
)
from report import confusion_table, metrics_table, write_trec

Cell = namedtuple("Cell", "name qids items relevant pool_path")


def random_rankings(seed, queries=40, pool=25, results=10):
    """Ids ranked by scores with many ties, one to six relevant; -> scores, ranked, relevant."""
    torch.manual_seed(seed)
    scores = torch.randint(0, 4, (queries, pool)).float()
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :results]
    relevant = [set(torch.randperm(pool)[: 1 + i % 6].tolist()) for i in range(queries)]
    return scores.gather(1, order).tolist(), order.tolist(), relevant


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
        expected = slow_metrics(ids, right)
        assert set(fast) == set(expected)
        for name, value in expected.items():
            assert fast[name][row].item() == pytest.approx(value, abs=1e-12), (name, row)


def test_known_numbers():
    fast = query_metrics([[4, 2, 9], [1, 3, 5], [7, 8, 6]], [{9, 100}, {1, 3}, {0}])
    assert fast["hit_rate@1"].tolist() == [0, 1, 0] and fast["hit_rate@5"].tolist() == [1, 1, 0]
    assert fast["recall@5"].tolist() == [0.5, 1, 0]
    assert fast["mrr@10"].tolist() == pytest.approx([1 / 3, 1, 0])
    # one of two relevant at rank 3: (1 / log2 4) / (1 / log2 2 + 1 / log2 3)
    assert fast["ndcg@10"].tolist() == pytest.approx([0.5 / (1 + 1 / math.log2(3)), 1, 0])


def test_no_queries_and_nothing_relevant_are_errors():
    with pytest.raises(ValueError, match="there are no queries"):
        query_metrics([], [])
    with pytest.raises(ValueError, match="query 1 has no relevant candidate"):
        query_metrics([[1], [2]], [{1}, set()])
    with pytest.raises(ValueError, match="a_task0: cannot score: there are no queries"):
        score([Cell("a_task0", [], [], [], None)], {("a_task0", "local"): ([], [])})


def test_headline_metrics_are_those_of_m_beirs_tables():
    at_ten = {name for name in ("fashion200k_task0", "fashion200k_task3", "fashioniq_task7",
                                "mscoco_task0", "cirr_task7", "zero_glyph_task1")
              if headline_metric(name) == "hit_rate@10"}
    assert at_ten == {"fashion200k_task0", "fashion200k_task3", "fashioniq_task7"}


def test_resampled_means_equal_those_of_the_drawn_queries():
    torch.manual_seed(0)
    values = torch.rand(7, 3, dtype=torch.float64)
    means = resampled_means(values, torch.Generator().manual_seed(5), draws=20)
    picks = torch.randint(7, (20, 7), generator=torch.Generator().manual_seed(5)).tolist()
    for mean, rows in zip(means.tolist(), picks):
        for metric in range(3):
            expected = sum(values[row, metric].item() for row in rows) / 7
            assert mean[metric] == pytest.approx(expected)


def test_intervals_are_as_wide_as_the_central_limit_theorem_says():
    values = torch.cat([torch.ones(300, 1), torch.zeros(700, 1)]).double()
    means = resampled_means(values, torch.Generator().manual_seed(0), draws=4000)
    assert means.shape == (4000, 1)
    assert means.std().item() == pytest.approx(math.sqrt(0.3 * 0.7 / 1000), rel=0.05)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert low == pytest.approx(0.3 - 1.96 * 0.01449, abs=0.003)
    assert high == pytest.approx(0.3 + 1.96 * 0.01449, abs=0.003)


def make_cells():
    """Three cells, one of them zero-shot, with rankings of both pools."""
    cells, rankings = [], {}
    for seed, name in enumerate(("a_task0", "fashioniq_task0", "zero_a_task4")):
        scores, ranked, relevant = random_rankings(seed, queries=30 + seed)
        qids = [f"1:{i}" for i in range(len(ranked))]
        cells.append(Cell(name, qids, [{}] * len(ranked), relevant, None))
        for which in ("local", "global"):
            rankings[name, which] = (scores, ranked)
    return cells, rankings


def test_score_averages_over_cells_tasks_and_pools():
    cells, rankings = make_cells()
    results = score(cells, rankings)
    assert results["schema"] == 2
    entries = results["cells"]
    for cell in cells:
        slow = [slow_metrics(ids, right) for ids, right
                in zip(rankings[cell.name, "local"][1], cell.relevant)]
        entry = entries[cell.name]
        for name in slow[0]:
            mean = sum(row[name] for row in slow) / len(slow)
            assert entry["local"][name] == pytest.approx(mean)
            low, high = entry["intervals"]["local"][name]
            assert low <= mean <= high and high - low < 0.5
        assert entry["local"]["headline"] == entry["local"][headline_metric(cell.name)]
    both = (entries["a_task0"]["global"]["hit_rate@5"]
            + entries["fashioniq_task0"]["global"]["hit_rate@10"]) / 2
    assert results["average"]["global"]["headline"] == pytest.approx(both)
    assert results["tasks"]["task0"]["cells"] == ["a_task0", "fashioniq_task0"]
    assert results["tasks"]["task0"]["global"] == results["average"]["global"]
    assert results["average_zero"]["local"] == entries["zero_a_task4"]["local"]
    # the average of independent cells is known better than each of them
    widths = [high - low for low, high in (entry["intervals"]["local"]["ndcg@10"] for entry in
              (results["average"], entries["a_task0"], entries["fashioniq_task0"]))]
    assert widths[0] < min(widths[1:])
    assert score(cells, rankings) == results, "the same seed draws the same queries"
    assert "headline" in metrics_table(results, "local")


def test_modality_confusion_equals_a_slow_one():
    torch.manual_seed(1)
    modality = torch.randint(0, 3, (25,)).tolist()  # text, image, image+text
    cells, rankings = make_cells()
    confusion = modality_confusion(cells, rankings, lambda i: modality[i])
    assert list(confusion) == ["task0", "zero_task4"]
    for top, k in (("top1", 1), ("top10", 10)):
        means = {kind: [] for kind in KINDS}
        for cell in cells[:2]:
            counts = dict.fromkeys(KINDS, 0)
            for ids, right in zip(rankings[cell.name, "global"][1], cell.relevant):
                for i in ids[:k]:
                    if i in right:
                        counts["right item"] += 1
                    elif modality[i] == 1:  # task 0 asks for an image
                        counts["wrong item"] += 1
                    else:
                        counts["wrong modality"] += 1
            for kind, count in counts.items():
                means[kind].append(count / sum(counts.values()))
        expected = {kind: sum(shares) / 2 for kind, shares in means.items()}
        assert confusion["task0"][top] == pytest.approx(expected, rel=1e-12)  # float64
        assert sum(confusion["task0"][top].values()) == pytest.approx(1)
    assert confusion["task0"]["target"] == "image"
    assert len(confusion_table(confusion).splitlines()) == 5
    local = {key: value for key, value in rankings.items() if key[1] == "local"}
    assert modality_confusion(cells, local, lambda i: 0) == {}


def test_trec_files_give_pytrec_eval_the_same_numbers_ties_included(tmp_path):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    cells, rankings = make_cells()
    ids = {i: did_key(f"1:{(7 * i) % 25}") for i in range(25)}  # trec_eval orders ties by did
    cells = [cell._replace(relevant=[{ids[i] for i in right} for right in cell.relevant])
             for cell in cells]
    rankings = {name: (scores, [[ids[i] for i in row] for row in ranked])
                for name, (scores, ranked) in rankings.items()}
    results = score(cells, rankings)
    write_trec(tmp_path, cells, rankings)
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
