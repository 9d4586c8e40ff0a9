"""The GPU script's code path, on a CPU; nothing here is timed."""

import re
import sys

import gpu_check
import pytest
import torch

from puma import RET


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, arguments)])
    gpu_check.main()


def test_the_script_runs_through_and_writes_its_table(monkeypatch, tmp_path, capsys):
    out = tmp_path / "table.md"
    run(monkeypatch, "--device", "cpu", "--shape", "tiny", "--steps", 1, "--pairs", 4, "--out", out)
    text = out.read_text()
    assert text in capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| \d", line)]
    assert [int(row[0]) for row in rows] == [2, 4]
    assert all(len(row) == 11 for row in rows) and text.splitlines()[5].count("|") == 12
    assert float(rows[0][10]) > 1.5 and float(rows[1][10]) == float(rows[1][9]) == 1
    assert "embeddings within 0.0e+00, gradients within 0.0e+00" in text  # a CPU and itself
    assert "LoRA rank 4, 10 pairs" in text and "loss nan" not in text


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
    model = gpu_check.build(shape, 28, torch.device("meta"), torch.bfloat16)
    assert model.tokenizer.convert_tokens_to_ids(RET) == model.ret_id
    assert sum(p.numel() for p in model.backbone.parameters()) == parameters
