"""One evaluation and its files, searching with own words, and bad input."""

import json
import shutil

import pytest
import torch
from conftest import MODEL
from PIL import Image

import evaluate
from data import MODALITIES, did_key, did_text
from puma import PUMA
from vectors import Cache


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pruned, untrained model; (folder, model, cache)."""
    folder = tmp_path_factory.mktemp("model") / "model"
    PUMA.from_pretrained(MODEL, keep_layers=1).save_pretrained(folder)
    puma = PUMA.from_pretrained(folder)
    return folder, puma, Cache(puma, folder)


@pytest.fixture(scope="module")
def results(glyph_beir, model, tmp_path_factory):
    """One evaluation of it; (results, folder)."""
    out = tmp_path_factory.mktemp("out") / "evaluation"
    return evaluate.evaluate(model[1], glyph_beir, out=out, limit=20, cache=model[2]), out


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
    assert results["schema"] == 2
    assert "| zero_glyph_task8 | 20 |" in (out / "results.md").read_text()


def test_modality_confusion_agrees_with_the_run_files(results, glyph_beir):
    results, out = results
    pool = glyph_beir / "cand_pool/global/mbeir_union_test_cand_pool.jsonl"
    modality = {row["did"]: row["modality"] for row in map(json.loads, pool.open())}
    for task in (0, 6, 8):
        confusion = results["confusion"][f"task{task}"]
        right = {tuple(line.split()[0:3:2]) for line in
                 (out / f"glyph_task{task}.qrels").read_text().splitlines()}
        run = [line.split() for line in
               (out / f"glyph_task{task}.global.trec").read_text().splitlines()]
        hits = [(qid, did) in right for qid, _, did, *_ in run]
        wrong = [modality[row[2]] != confusion["target"] for row in run]
        assert confusion["target"] in MODALITIES and len(run) == 200
        assert confusion["top10"]["right item"] == pytest.approx(sum(hits) / 200)
        assert confusion["top10"]["wrong modality"] == pytest.approx(sum(wrong) / 200)
        first = results["cells"][f"glyph_task{task}"]["global"]["hit_rate@1"]
        assert confusion["top1"]["right item"] == pytest.approx(first)
    assert (out / "confusion.png").stat().st_size > 10_000


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


def test_row_17_the_popularity_penalty_subtracts_the_mean_similarity_to_all_queries(glyph_beir):
    torch.manual_seed(0)
    benchmark = evaluate.Benchmark(glyph_beir)
    cells = benchmark.cells("test", 6)[:2]
    embedded = evaluate.Embedded(benchmark, cells, "test", lambda items: torch.randn(len(items), 4))
    row_of = {key: row for row, key in enumerate(embedded.union.keys.tolist())}
    for penalty in (0.0, 0.2):
        rankings = embedded.rank(cells, popularity_penalty=penalty)
        for cell in cells:
            for which, path in (("local", cell.pool_path), ("global", embedded.global_path)):
                keys = embedded.pools[path].keys
                vectors = embedded.candidates[[row_of[key] for key in keys]]
                similarity = embedded.queries[cell.name] @ vectors.T
                expected = similarity - penalty * similarity.mean(0)
                scores, ranked = rankings[cell.name, which]
                best = expected.sort(dim=1, descending=True, stable=True)
                assert ranked == [[keys[i] for i in row[:10]] for row in best.indices.tolist()]
                torch.testing.assert_close(torch.tensor(scores), best.values[:, :10])


def run_cli(monkeypatch, capsys, *arguments):
    """evaluate.py's main -> (exit status, standard error)."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    return stop.value.code, capsys.readouterr().err


def test_bad_input_gives_one_line_and_exit_status_2(monkeypatch, capsys, tmp_path, glyph_beir,
                                                    model, tmp_path_factory):
    folder, model = model[0], ("--data", glyph_beir, model[0])
    missing, empty = tmp_path / "missing", tmp_path_factory.mktemp("empty")
    monkeypatch.chdir(tmp_path)
    cases = [
        (("--data", tmp_path, folder), "is no M-BEIR directory: expected the folder"),
        (("--data", glyph_beir, missing), "does not exist"),
        ((*model, "--split", "nonsense"), "expected files mbeir_"),
        ((*model, "--image", missing, "--out", tmp_path / "a"), f"cannot read image {missing}"),
        ((*model, "--out", tmp_path), "exists: choose another"),
        ((*model, "--limit", "0"), "--limit must be at least 1, got 0"),
        ((*model, "--pool", glyph_beir), "give --query or --image"),
        ((*model, "--query", "a", "--pool", missing), f"--pool {missing}: no such folder"),
        ((*model, "--query", "a", "--pool", empty), f"--pool {empty} is empty"),
        ((*model, "--query", "a", "--k", "0"), "--k must be at least 1, got 0"),
    ]
    for arguments, message in cases:
        status, error = run_cli(monkeypatch, capsys, *arguments)
        lines = [line for line in error.splitlines() if line.startswith("error")]
        assert status == 2 and len(lines) == 1 and message in lines[0], (arguments, error)
        assert "Traceback" not in error
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


@pytest.mark.parametrize("file, expected", [
    ("cand_pool/local/mbeir_glyph_task1_cand_pool.jsonl", "a candidate"),
    ("cand_pool/global/mbeir_union_test_cand_pool.jsonl", "a candidate"),
    ("query/test/mbeir_glyph_task1_test.jsonl", "a query"),
])
def test_an_empty_pool_and_a_cell_without_queries_are_named(file, expected, monkeypatch, capsys,
                                                            tmp_path, glyph_beir, model):
    for part in ("cand_pool", "query", "instructions", "qrels"):
        shutil.copytree(glyph_beir / part, tmp_path / "data" / part)
    (tmp_path / "data" / file).write_text("")
    status, error = run_cli(monkeypatch, capsys, model[0], "--data", tmp_path / "data",
                            "--out", tmp_path / "out")
    assert status == 2 and "Traceback" not in error
    assert f"{file}: expected {expected}" in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_search_prints_ten_candidates_and_draws_them(capsys, tmp_path, glyph_beir, model,
                                                       results):
    _, puma, cache = model
    query = {"text": "latin small letter a", "image": None}
    before = {path: path.stat().st_mtime_ns for path in cache.folder.glob("*.npy")}
    evaluate.show(puma, glyph_beir, query, tmp_path / "s", cache=cache)
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines[:10]] == list(range(1, 11))
    assert (tmp_path / "s/search.png").stat().st_size > 5_000
    evaluate.show(puma, glyph_beir, query, tmp_path / "s", modality="image", k=3, cache=cache)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[:3]] == ["image"] * 3 and len(lines) == 4
    after = {path: path.stat().st_mtime_ns for path in cache.folder.glob("*.npy")}
    assert after == before, "the search used the evaluation's embeddings of the pool"


def test_a_folder_of_files_is_a_pool_and_bad_files_are_skipped_only_when_asked(
        monkeypatch, capsys, tmp_path, model):
    pool = tmp_path / "pool"
    pool.mkdir()
    for i, name in enumerate(("red", "green", "blue")):
        Image.new("RGB", (56, 56), name).save(pool / f"{name}.png")
        (pool / f"{i}.txt").write_text(f"the colour {name}")
    (pool / "broken.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    arguments = [model[0], "--query", "the colour red", "--pool", pool]
    status, error = run_cli(monkeypatch, capsys, *arguments)
    assert status == 2 and f"cannot read image {pool / 'broken.png'}" in error.splitlines()[-1]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments), "--skip-bad", "--k", "9"])
    evaluate.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "skipped 1 of 7 files that cannot be read, first broken.png"
    assert lines[1].split()[1:4] == ["1.000", "text", "0.txt"]  # the same words
    assert {line.split()[3] for line in lines[1:7]} == {
        *(f"{i}.txt" for i in range(3)), "red.png", "green.png", "blue.png"}
    assert lines[7].startswith("wrote ") and len(lines) == 8, "k is cut to what there is"


def test_dids_survive_the_way_through_keys():
    assert did_text(did_key("10:123456789012")) == "10:123456789012"
