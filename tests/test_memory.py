"""Presets, LoRA, gradient checkpointing, and the plan of what a run takes."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import MODEL, ROOT

import memory
import settings
import train
from data import Benchmark, TrainSet
from puma import PUMA

CPU = torch.device("cpu")


def config(**options):
    return train.Config(model=str(MODEL), batch_size=12, workers=0, **options)


# ---- settings ------------------------------------------------------------------------------------

def test_a_preset_changes_defaults_and_any_field_overrides_it():
    chosen = settings.parse(["--preset", "paper-7b", "--keep-layers", "8"])
    assert chosen.model == "Qwen/Qwen2-VL-7B-Instruct" and chosen.keep_layers == 8
    paper = {"batch_size": 600, "stage1_batch_size": 288, "lr": 3e-4, "stage1_lr": 2e-4,
             "lora_rank": 128, "lora_alpha": 256, "lora_dropout": 0.1, "stage1_lora_dropout": 0.05,
             "stage1_temperature": 0.05, "temperature": 0.03, "decay": 0.5, "warmup": 0.03,
             "weight_decay": 0, "max_visual_tokens": 300, "max_text_tokens": 450,
             "distill_weight": 0.1}
    assert {name: getattr(chosen, name) for name in paper} == paper
    assert settings.parse([]) == train.Config()


def test_stage_1_has_its_own_settings_where_they_are_given():
    chosen = settings.parse(["--preset", "paper-2b"])
    assert [chosen.of_stage(stage, "batch_size") for stage in (1, 2)] == [288, 600]
    assert [chosen.of_stage(stage, "lora_dropout") for stage in (1, 2)] == [0.05, 0.1]
    both = settings.Config(lr=1e-3)
    assert [both.of_stage(stage, "lr") for stage in (1, 2)] == [1e-3, 1e-3]


def test_every_preset_is_shown_by_help(capsys):
    with pytest.raises(SystemExit):
        settings.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, preset in settings.PRESETS.items():
        assert f"{name}:" in text
        assert all(f"{key}={value}" in text for key, value in preset.items())


@pytest.mark.parametrize("field, value", [
    ("batch_size", 0), ("lr", -1.0), ("temperature", 0.0), ("stage1_steps", -3),
    ("temperature", float("nan")), ("warmup", 1.5), ("distill_weight", 2.0),
    ("keep_checkpoints", 0)])
def test_a_setting_out_of_range_is_named_with_its_value(field, value):
    with pytest.raises(ValueError) as error:
        train.Config(**{field: value}).check()
    assert f"--{field.replace('_', '-')} must be" in str(error.value)
    assert str(value) in str(error.value)


# ---- LoRA ----------------------------------------------------------------------------------------

@pytest.fixture
def student():
    pytest.importorskip("peft")
    return PUMA.from_pretrained(MODEL, keep_layers=2)


def test_lora_starts_as_the_model_itself_and_trains_adapters_and_ret_row_only(student):
    plain = student.encode(["latin small letter a"])
    memory.add_lora(student, rank=4, alpha=8)
    torch.testing.assert_close(student.encode(["latin small letter a"]), plain)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert "ret_embedding" in trained
    assert all("lora_" in name for name in trained - {"ret_embedding"})
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for layer in (0, 1):
        for linear in linears:
            assert any(f"layers.{layer}." in n and f".{linear}." in n for n in trained), linear


def test_merged_lora_is_an_ordinary_model_with_the_same_embeddings(student, tmp_path):
    adapters = memory.add_lora(student, rank=4, alpha=8)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    names = ["latin small letter a", "black star"]
    expected = student.encode(names)
    plain = PUMA.from_pretrained(MODEL, keep_layers=2).encode(names)
    assert (expected - plain).abs().max() > 0.01
    adapters.merge_and_unload()
    student.save_pretrained(tmp_path / "model")
    loaded = PUMA.from_pretrained(tmp_path / "model")
    weights = {name for name, _ in loaded.named_parameters()}
    assert weights == {name for name, _ in PUMA.from_pretrained(MODEL, 2).named_parameters()}
    torch.testing.assert_close(loaded.encode(names), expected, atol=1e-5, rtol=1e-5)


def test_lora_dropout_is_set_for_each_stage(student):
    memory.add_lora(student, rank=4, alpha=8, dropout=0.1)
    memory.set_dropout(student, 0.05)
    found = {m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)}
    assert found == {0.05}


def test_without_peft_the_message_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="pip install peft"):
        memory.add_lora(None, rank=4, alpha=8)


def test_a_lora_run_ends_in_an_ordinary_model_folder(glyph_beir, tmp_path):
    pytest.importorskip("peft")
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(glyph_beir), "--out", "run",
               "--model", str(MODEL), "--lora-rank=4", "--batch-size=8", "--stage1-steps=1",
               "--stage2-steps=2", "--workers=0", "--no-eval", "--gradient-checkpointing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [row["stage"] for row in rows] == [1, 2, 2]
    assert PUMA.from_pretrained(tmp_path / "run/model").encode(["a"]).shape == (1, 128)
    assert "trainable" in done.stdout and "GiB" in done.stdout


# ---- gradient checkpointing ----------------------------------------------------------------------

def test_gradient_checkpointing_changes_no_gradient(glyph_beir):
    pairs = TrainSet(Benchmark(glyph_beir), 6, 1)[0]
    found = []
    for checkpointing in (False, True):
        options = config(gradient_checkpointing=checkpointing)
        student = PUMA.from_pretrained(MODEL, keep_layers=3).train()
        train.prepare_training(options, student)
        batch = train.Batcher(student, options)(pairs)
        calls = []
        student.backbone.language_model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1))

        def losses_of(states, teacher_states, batch=batch, options=options):
            return train.stage_losses(states, teacher_states, batch, 2, 0.4, options)

        train.training_step(student, None, batch, losses_of)
        found.append(({n: p.grad for n, p in student.named_parameters() if p.grad is not None},
                      len(calls)))
    (plain, once), (recomputed, twice) = found
    assert twice == 2 * once
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)


# ---- the plan ------------------------------------------------------------------------------------

@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_plan_counts_what_loading_then_shows(lora_rank):
    if lora_rank:
        pytest.importorskip("peft")
    options = config(keep_layers=3, lora_rank=lora_rank)
    counts = memory.plan(options, CPU)
    student = train.load_student(options, CPU)
    frozen = sum(p.numel() for p in student.backbone.parameters())
    assert counts["kept"] == frozen
    assert counts["dropped"] == sum(p.numel() for p in PUMA.from_pretrained(MODEL).parameters()
                                    ) - sum(p.numel() for p in student.parameters())
    train.prepare_training(options, student)
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert counts["trainable"] == trainable
    weights = sum(p.numel() * p.element_size() for p in student.backbone.parameters())
    assert counts["weights"] == weights
    assert counts["gradients"] == 4 * trainable and counts["optimizer"] == 8 * trainable


def test_a_plan_that_exceeds_the_gpu_is_refused_in_one_line(monkeypatch, capsys):
    class Small:
        total_memory = 10_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Small)
    with pytest.raises(ValueError) as error:
        memory.report(config(), torch.device("cuda"))
    assert "--lora-rank" in str(error.value) and "\n" not in str(error.value)
    assert "kept" in capsys.readouterr().out
    memory.report(config(), CPU)
