"""The code path of the scripts that measure, small and on a CPU; no time is compared."""

import re
import sys

import benchmark
import gpu_check
import pytest
import torch

from puma import RET


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, arguments)])
    gpu_check.main()


def rows_of(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in text.splitlines() if re.match(r"\| \d", line)]


def test_the_script_runs_through_with_lora_and_writes_its_table(monkeypatch, tmp_path, capsys):
    pytest.importorskip("peft", reason="the step with LoRA needs peft")
    out = tmp_path / "table.md"
    run(monkeypatch, "--device", "cpu", "--shape", "tiny", "--steps", 1, "--pairs", 4, "--out", out)
    text = out.read_text()
    assert text in capsys.readouterr().out
    rows = rows_of(text)
    assert [int(row[0]) for row in rows] == [2, 4]
    assert all(len(row) == 11 for row in rows) and text.splitlines()[5].count("|") == 12
    assert all([i for i, cell in enumerate(row) if cell == "-"] == [5, 8] for row in rows)  # GPU's
    assert float(rows[0][10]) > 1.5 and float(rows[1][10]) == float(rows[1][9]) == 1
    assert "embeddings within 0.0e+00, gradients within 0.0e+00" in text  # a CPU and itself
    assert "LoRA rank 4, 10 pairs" in text and "loss nan" not in text and "not measured" not in text


def test_without_peft_it_measures_the_rest_and_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    monkeypatch.setitem(gpu_check.SHAPES, "7b", gpu_check.SHAPES["tiny"])
    monkeypatch.setitem(gpu_check.SIDE, "7b", gpu_check.SIDE["tiny"])
    out = tmp_path / "table.md"
    given = ("--device", "cpu", "--steps", 1, "--pairs", 2, "--layers", 2, "--out", out)
    run(monkeypatch, *given, "--shape", "tiny")
    (row,) = rows_of(out.read_text())  # all weights are trained
    assert row.count("-") == 2
    assert "10 pairs, chunks of 8 items: not measured" in out.read_text()
    run(monkeypatch, *given, "--shape", "7b")
    (row,) = rows_of(out.read_text())
    assert row[2:6] == ["-"] * 4 and row.count("-") == 5
    assert "Training is not measured: LoRA needs peft: pip install peft." in out.read_text()


def test_without_a_gpu_or_with_layers_that_do_not_exist_it_says_so_in_one_line(
    monkeypatch, tmp_path, capsys
):
    bad = [("--device", "cpu", "--shape", "tiny", "--layers", 2, 5)]
    bad += [()] if not torch.cuda.is_available() else []
    for arguments in bad:
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *arguments, "--out", tmp_path / "table.md")
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: --") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape, parameters", [("2b", 2_208_985_600), ("7b", 7_746_378_240)])
def test_the_big_shapes_are_qwen2_vls(shape, parameters, monkeypatch):
    monkeypatch.setattr(gpu_check.PUMA, "to", lambda model, device: model)
    model = gpu_check.build(gpu_check.SHAPES[shape], 28, torch.device("meta"), torch.bfloat16)
    assert model.tokenizer.convert_tokens_to_ids(RET) == model.ret_id
    assert sum(p.numel() for p in model.backbone.parameters()) == parameters


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells how much memory was taken")
def test_the_benchmarks_parts_run_and_print_a_line_each(tmp_path, capsys):
    shape = gpu_check.SHAPES["tiny"]
    model = gpu_check.build(shape, 4, benchmark.DEVICE, torch.float32).eval()
    benchmark.bench_loss(rows=64, width=8)
    benchmark.bench_prune(model, keep=2)
    benchmark.bench_sort(model)
    benchmark.bench_last_layer(model, keep=2)
    benchmark.bench_stage1(model, keep=2)
    benchmark.bench_search(rows=300, width=8, queries=4, k=3)
    benchmark.bench_scale(tmp_path / "data", queries=40, candidates=90, steps=9)
    gpu_check.free_for_real(1 << 25)  # or all later tests would be slower
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 13 and all(line.count("|") == 4 for line in lines)
    assert not re.search(r"\bnan\b|\binf\b", "".join(lines))
    assert "40 queries, 90 candidates: start-up, batch of 600" in lines[-2]
