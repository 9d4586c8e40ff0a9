"""Search, metrics and result files against slow versions."""

import json

import pytest
import torch
from conftest import MODEL

import evaluate
from data import did_text
from puma import PUMA


def slow_ranking(scores, k):
    """Indices by falling score; among equals the lower index first."""
    return [sorted(range(len(row)), key=lambda j: (-row[j], j))[:k] for row in scores]


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_search_agrees_with_a_full_sort_ties_included(levels, chunk_size):
    torch.manual_seed(levels)
    queries = torch.randint(0, levels, (20, 3)).float()
    candidates = torch.randint(0, levels, (31, 3)).float()
    for k in (1, 5, 31, 50):
        scores, indices = evaluate.search(queries, candidates, k, chunk_size)
        expected = slow_ranking((queries @ candidates.T).tolist(), k)
        assert indices.tolist() == expected
        assert torch.equal(scores, (queries @ candidates.T).gather(1, indices))


def test_hit_rate_is_one_if_any_relevant_candidate_is_in_the_first_k():
    ranked = [[4, 2, 9], [1, 3, 5], [7, 8, 6]]
    relevant = [{9, 100}, {1, 3}, {0}]
    rates = evaluate.hit_rates(ranked, relevant, cutoffs=(1, 2, 3))
    assert rates == {"hit_rate@1": 1 / 3, "hit_rate@2": 1 / 3, "hit_rate@3": 2 / 3}


def test_hit_rates_agree_with_a_slow_version_on_random_scores_with_ties():
    torch.manual_seed(0)
    scores = torch.randint(0, 4, (40, 25)).float()
    relevant = [set(torch.randperm(25)[: 1 + i % 3].tolist()) for i in range(40)]
    _, ranked = evaluate.stable_topk(scores, 10)
    fast = evaluate.hit_rates(ranked.tolist(), relevant)
    for k in (1, 5, 10):
        hits = 0
        for row, right in zip(scores.tolist(), relevant):
            # rank of the best relevant one: all with a higher score, or equal and earlier, precede
            first = min(sum((s, -j) > (row[r], -r) for j, s in enumerate(row)) for r in right)
            hits += first < k
        assert fast[f"hit_rate@{k}"] == hits / 40


def test_search_refuses_empty_pools_other_widths_and_numbers_that_are_none():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(0, 3\)"):
        evaluate.search(torch.zeros(2, 3), torch.zeros(0, 3), 1)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(5, 4\)"):
        evaluate.search(torch.zeros(2, 3), torch.zeros(5, 4), 1)
    with pytest.raises(ValueError, match="NaN"):
        evaluate.search(torch.zeros(2, 3), torch.full((5, 3), float("nan")), 1)


@pytest.fixture(scope="module")
def results(glyph_beir, tmp_path_factory):
    """One evaluation of the pruned, untrained model; (results, folder)."""
    out = tmp_path_factory.mktemp("out") / "evaluation"
    model = PUMA.from_pretrained(MODEL, keep_layers=1)
    return evaluate.evaluate(model, glyph_beir, out=out, limit=20), out


def test_results_hold_every_cell_on_both_pools(results):
    results, out = results
    assert json.loads((out / "results.json").read_text()) == results
    names = {f"{zero}glyph_task{t}" for zero in ("", "zero_") for t in (0, 1, 2, 3, 4, 6, 7, 8)}
    assert set(results["cells"]) == names
    for cell in results["cells"].values():
        assert cell["queries"] == 20
        for pool in ("local", "global"):
            rates = [cell[pool][f"hit_rate@{k}"] for k in (1, 5, 10)]
            assert 0 <= rates[0] <= rates[1] <= rates[2] <= 1
    seen = [cell["local"]["hit_rate@5"] for name, cell in results["cells"].items()
            if not name.startswith("zero")]
    assert results["average"]["local"]["hit_rate@5"] == pytest.approx(sum(seen) / 8)
    assert results["efficiency"]["parameters"] < 2_583_296


def test_trec_files_have_six_and_four_columns_and_give_the_same_hit_rate(results):
    results, out = results
    for name, cell in results["cells"].items():
        qrels = [line.split() for line in (out / f"{name}.qrels").read_text().splitlines()]
        assert all(len(row) == 4 for row in qrels)
        right = {(qid, did) for qid, _, did, _ in qrels}
        for pool in ("local", "global"):
            run = [r.split() for r in (out / f"{name}.{pool}.trec").read_text().splitlines()]
            assert all(len(row) == 6 for row in run)
            hits = {row[0] for row in run if int(row[3]) <= 5 and (row[0], row[2]) in right}
            assert len(hits) / cell["queries"] == pytest.approx(cell[pool]["hit_rate@5"])
    assert (out / "gallery.png").stat().st_size > 10_000


def test_row_17_the_popularity_penalty_subtracts_the_mean_similarity_to_all_queries():
    torch.manual_seed(0)
    queries, candidates = torch.randn(6, 4), torch.randn(9, 4)
    embedded = evaluate.Embedded.__new__(evaluate.Embedded)
    keys = list(range(9))
    cell = type("Cell", (), {"name": "c", "pool_path": "p"})
    embedded.queries, embedded.candidates, embedded.global_path = {"c": queries}, candidates, None
    embedded.rows = {key: key for key in keys}
    embedded.pools = {"p": type("Pool", (), {"keys": keys})}
    similarity = queries @ candidates.T
    for penalty in (0.0, 0.2):
        scores, ranked = embedded.rank([cell], popularity_penalty=penalty)["c", "local"]
        expected = similarity - penalty * similarity.mean(0)
        assert ranked == slow_ranking(expected.tolist(), 10)
        best = expected[0].sort(descending=True).values.tolist()
        assert scores[0] == pytest.approx(best, rel=1e-4)


def run_cli(monkeypatch, capsys, *arguments):
    """evaluate.py's main -> (exit status, standard error)."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    return stop.value.code, capsys.readouterr().err


def test_bad_input_gives_one_line_and_exit_status_2(monkeypatch, capsys, tmp_path, glyph_beir):
    model = ("--data", glyph_beir, MODEL)
    missing = tmp_path / "missing"
    cases = [
        (("--data", tmp_path, MODEL), "is no M-BEIR directory: expected the folder"),
        (("--data", glyph_beir, missing), "does not exist"),
        ((*model, "--split", "nonsense"), "expected files mbeir_"),
        ((*model, "--image", missing, "--out", tmp_path / "a"), f"cannot read image {missing}"),
        ((*model, "--out", tmp_path), "exists: choose another"),
    ]
    for arguments, message in cases:
        status, error = run_cli(monkeypatch, capsys, *arguments)
        lines = [line for line in error.splitlines() if line.startswith("error")]
        assert status == 2 and len(lines) == 1 and message in lines[0], (arguments, error)
        assert "Traceback" not in error
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


def test_a_search_prints_ten_candidates_and_draws_them(monkeypatch, capsys, tmp_path, glyph_beir):
    model = PUMA.from_pretrained(MODEL, keep_layers=1)
    query = {"text": "latin small letter a", "image": None}
    evaluate.show(model, glyph_beir, query, tmp_path / "s")
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines[:10]] == list(range(1, 11))
    assert (tmp_path / "s/search.png").stat().st_size > 5_000
    evaluate.show(model, glyph_beir, {"text": "a", "image": None}, tmp_path / "s", modality="image")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[:10]] == ["image"] * 10


def test_dids_survive_the_way_through_keys():
    from data import did_key

    assert did_text(did_key("10:123456789012")) == "10:123456789012"
