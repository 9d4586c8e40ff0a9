"""layer_choice.py and cost.py: which depth to keep, and what it costs."""

import json

import pytest
import torch
from conftest import MODEL

import cost
import layer_choice
from data import Benchmark
from prune_distill import depth_costs
from puma import PUMA


@pytest.fixture(scope="module")
def samples(glyph_beir):
    return layer_choice.sample_cells(Benchmark(glyph_beir), "test", queries=6, candidates=30)


def test_samples_hold_every_positive_and_other_candidates_of_the_local_pool(glyph_beir, samples):
    benchmark = Benchmark(glyph_beir)
    cells = benchmark.cells("test", 6)
    assert [name for name, *_ in samples] == [cell.name for cell in cells]
    for cell, (_, queries, candidates, positives) in zip(cells, samples):
        assert queries == cell.items and len(candidates) == 30
        pool = benchmark.pool(cell.pool_path)
        item = {key: pool[i] for i, key in enumerate(pool.keys) if key in set.union(*cell.relevant)}
        assert len({str(candidate) for candidate in candidates}) == 30, "each once"
        for keys, columns in zip(cell.relevant, positives):
            assert sorted(str(item[key]) for key in keys) == sorted(
                str(candidates[column]) for column in columns)
    again = layer_choice.sample_cells(benchmark, "test", queries=6, candidates=30)
    assert again == samples, "the seed decides"


def test_reports_are_averaged_over_cells(puma, samples):
    rows = layer_choice.report_layers(puma, samples[:2])
    parts = [layer_choice.layer_report(puma, *sample[1:]) for sample in samples[:2]]
    for depth, row in enumerate(rows):
        assert row["depth"] == depth and row["parameters"] == parts[0][depth]["parameters"]
        for key in ("hit_rate@5", "cosine", "cka", "flops"):
            assert row[key] == pytest.approx((parts[0][depth][key] + parts[1][depth][key]) / 2)
        assert list(row["cells"].values()) == [part[depth]["hit_rate@5"] for part in parts]


def test_the_suggestion_is_the_first_depth_that_keeps_nine_tenths():
    hits = (0.0, 0.2, 0.5, 0.73, 0.8)
    rows = [{"depth": i, "hit_rate@5": hit, "flops": 10 + 10 * i} for i, hit in enumerate(hits)]
    line = layer_choice.suggest(rows)
    assert line.startswith("k = 3 of 4") and "73.0 of 80.0 %" in line
    assert "at 80% of its operations" in line and "k = 2 keeps 62% at 60%" in line
    assert layer_choice.suggest(rows, share=0.1).startswith("k = 1 of 4")
    assert "\n" not in line


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr("sys.argv", ["x", *map(str, arguments)])
    module.main()


def test_the_command_prints_a_line_a_depth_and_draws_them(monkeypatch, capsys, tmp_path,
                                                          glyph_beir):
    folder = tmp_path / "model"
    PUMA.from_pretrained(MODEL, keep_layers=2).save_pretrained(folder)
    out = tmp_path / "out"
    run(monkeypatch, layer_choice, folder, "--data", glyph_beir, "--limit", 3, "--candidates", 9,
        "--keep-last", "--out", out)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
    assert lines[4].startswith("k = ") and len(lines) == 6
    saved = json.loads((out / "layers.json").read_text())
    assert len(saved["rows"]) == len(saved["keep_last"]) == 3
    assert (out / "layers.png").stat().st_size > 10_000
    for arguments, message in ((("--limit", 0), "at least 1, got 0"),
                               (("--split", "nonsense"), "expected files mbeir_")):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, layer_choice, folder, "--data", glyph_beir, *arguments)
        error = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and error.startswith("error: ") and message in error


def test_costs_add_up_and_equal_those_of_depth_costs(samples):
    items = [item for _, queries, _, _ in samples for item in queries][::4]
    whole = PUMA.from_pretrained(MODEL).eval()
    expected = depth_costs(whole, whole.collate(items))
    for depth in (2, 8):
        found = cost.count(PUMA.from_pretrained(MODEL, keep_layers=depth).eval(), items)
        assert found["parameters"] == expected[depth][0] == sum(found["parameters_split"].values())
        assert found["gflops_per_item"] * 12e9 == pytest.approx(expected[depth][1])
        assert found["gflops_split"]["vision"] > 0.001
        assert sum(found["gflops_split"].values()) == pytest.approx(found["gflops_per_item"])


def test_peak_memory_sees_an_allocation_and_forgets_it():
    device = torch.device("cpu")
    cost.reset_peak(device)
    before = cost.peak_bytes(device)
    block = torch.ones(50_000_000)  # 200 MB
    assert cost.peak_bytes(device) - before > 150_000_000
    del block
    cost.reset_peak(device)
    assert cost.peak_bytes(device) - before < 150_000_000


def test_efficiency_compares_depths_and_refuses_those_that_do_not_exist(
        monkeypatch, capsys, tmp_path, glyph_beir):
    monkeypatch.setattr(cost, "throughput", lambda model, items: (100.0, 4, 10**6))
    rows = cost.measure(MODEL, glyph_beir, [2], limit=2, candidates=5, out=tmp_path / "out")
    assert [row["depth"] for row in rows] == [2, 8]
    assert all(0 <= row["hit_rate@5"] <= 1 and row["latency_ms"]["total"] > 0 for row in rows)
    assert rows[0]["parameters"] < rows[1]["parameters"]
    assert (tmp_path / "out/costs.png").stat().st_size > 10_000
    assert "items a second" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--efficiency: a depth must be in 1..8, got 9"):
        cost.measure(MODEL, glyph_beir, [9])
