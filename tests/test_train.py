"""Settings, the two training steps, LoRA, resuming, and a miniature of the main job."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import fields, replace

import pytest
import torch
from conftest import MODEL, ROOT

import settings
import train
from data import Benchmark, TrainSet
from evaluate import Embedded
from mac_loss import mac_loss
from prune_distill import find_decoder
from puma import PUMA
from support.lora import add_lora, set_dropout
from support.report import score
from support.run import Run

CPU = torch.device("cpu")
SMALL = {"batch_size": 12, "stage1_steps": 3, "stage2_steps": 5, "workers": 0}


@pytest.fixture(scope="module")
def pairs(glyph_beir):
    return TrainSet(Benchmark(glyph_beir), 12, 1)[0]


@pytest.fixture(scope="module")
def batch(pairs):
    """(config, training batch of 12 pairs in chunks of 7 items)."""
    config = train.Config(**SMALL, model=str(MODEL), chunk_size=7)
    return config, train.Batcher(PUMA.from_pretrained(MODEL, 2), config)(pairs)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm(), name


# ---- settings ------------------------------------------------------------------------------------

def test_row_20_a_preset_has_the_scripts_values_and_any_field_overrides_it():
    chosen = settings.parse(["--preset", "paper-7b", "--keep-layers", "8"])
    assert chosen.model == "Qwen/Qwen2-VL-7B-Instruct" and chosen.keep_layers == 8
    paper = {"batch_size": 600, "stage1_batch_size": 288, "lr": 3e-4, "stage1_lr": 2e-4,
             "lora_rank": 128, "lora_alpha": 256, "lora_dropout": 0.1, "stage1_lora_dropout": 0.05,
             "stage1_temperature": 0.05, "temperature": 0.03, "decay": 0.5, "warmup": 0.03,
             "weight_decay": 0, "max_visual_tokens": 300, "max_text_tokens": 450,
             "distill_weight": 0.1}
    assert {name: getattr(chosen, name) for name in paper} == paper
    assert settings.parse([]) == train.Config()
    # Stage 1 has its own values where they are given.
    assert [chosen.of_stage(stage, "batch_size") for stage in (1, 2)] == [288, 600]
    assert [train.Config(lr=1e-3).of_stage(stage, "lr") for stage in (1, 2)] == [1e-3, 1e-3]


def test_help_shows_every_setting_with_its_reason_and_every_preset(capsys):
    with pytest.raises(SystemExit):
        settings.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(train.Config):
        assert f"--{field.name.replace('_', '-')}" in text and len(field.metadata["help"]) > 10
    for name, preset in settings.PRESETS.items():
        assert f"{name}:" in text
        assert all(f"{key}={value}" in text for key, value in preset.items())


@pytest.mark.parametrize("field, value", [
    ("batch_size", 1), ("lr", -1.0), ("temperature", 0.0), ("stage1_steps", -3), ("labels", 1),
    ("temperature", float("nan")), ("lr", float("inf")), ("warmup", 1.5), ("distill_weight", 2.0),
    ("lora_dropout", 1.0), ("keep_checkpoints", 0), ("workers", 10**9), ("decay", 1e9),
    ("stage2_steps", 10**6), ("model", ""), ("data", 3), ("loss", "nonsense"), ("eval", 1),
    ("stage1_lr", "3"), ("keep_layers", None), ("keep_layers", True)])
def test_a_setting_out_of_range_is_named_with_its_value(field, value):
    with pytest.raises(ValueError) as error:
        train.Config(**{field: value}).check()
    assert re.match(f"--{field.replace('_', '-')}.* must be", str(error.value))
    assert str(value) in str(error.value).replace(",", "")
    train.Config(warmup=1, distill_weight=1, stage1_steps=0, lora_dropout=0).check()


# ---- losses and steps ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("chunk_size", [0, 7])
def test_row_16_gradcache_gives_the_losses_and_gradients_of_the_plain_step(
        batch, stage, chunk_size):
    config, batch = batch
    teacher = PUMA.from_pretrained(MODEL).requires_grad_(False) if stage == 1 else None
    # The slow reference: one graph from the weights to the loss, no visual tokens shared.
    slow = PUMA.from_pretrained(MODEL, keep_layers=2)
    states = [None if model is None else torch.cat(
        [model(chunk) for chunk in batch["chunks"]])[batch["order"]] for model in (slow, teacher)]
    losses = [train.stage_losses(*states, batch, stage, 0.4, config)]
    losses[0]["loss"].backward()
    for step in (train.plain_step, train.large_batch_step):
        student = PUMA.from_pretrained(MODEL, keep_layers=2)
        options = replace(config, chunk_size=chunk_size)
        losses.append(step(student, teacher, batch, stage, 0.4, options))
        assert_equal_gradients(gradients(student), gradients(slow))
    slow, plain, large = ({name: float(torch.as_tensor(value).detach()) for name, value in
                           found.items() if value is not None} for found in losses)
    assert slow == pytest.approx(plain, rel=1e-6) and slow == pytest.approx(large, rel=1e-6)
    assert ("distill" in slow) == (stage == 1)


def test_gradcache_repeats_the_dropout_of_the_first_pass(batch):
    config, batch = batch
    found = []
    for step in (train.plain_step, train.large_batch_step):
        student = PUMA.from_pretrained(MODEL, keep_layers=2).train()
        for layer in find_decoder(student).layers:
            layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj, torch.nn.Dropout(0.5))
        torch.manual_seed(7)
        step(student, None, batch, 2, 0.4, config)
        found.append((gradients(student), torch.rand(1)))
    assert_equal_gradients(found[1][0], found[0][0])
    assert found[0][1] == found[1][1]  # the next step's dropout is the plain step's as well


def test_gradcache_keeps_the_graph_of_one_chunk_at_a_time(batch):
    config, batch = batch
    student = PUMA.from_pretrained(MODEL, keep_layers=2)
    running, most = [0], [0]  # outputs of an inner module that are alive

    def forward(_module, _inputs, output):
        running[0] += 1
        most[0] = max(most[0], running[0])
        weakref.finalize(output, lambda: running.__setitem__(0, running[0] - 1))

    find_decoder(student).layers[0].mlp.gate_proj.register_forward_hook(forward)
    peaks = []
    for step in (train.large_batch_step, train.plain_step):
        most[0] = 0
        step(student, None, batch, 2, 0.4, config)
        peaks.append(most[0])
    assert len(batch["chunks"]) == 4 and peaks[0] < peaks[1]


def test_bfloat16_products_leave_loss_and_gradients_but_for_roundings_and_attention_in_float32(
        batch, monkeypatch):
    config, batch = batch
    student, seen = train.load_student(config, CPU), []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda query, *rest, **named: (
                            seen.append(query.dtype), attention(query, *rest, **named))[1])
    losses, found = [], []
    for enabled in (False, True):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(train.plain_step(student, None, batch, 2, 0.0, config)["loss"].item())
        found.append(torch.cat([gradient.flatten() for gradient in gradients(student).values()]))
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)  # it is really on
    assert torch.cosine_similarity(*found, dim=0) > 0.99
    assert set(seen) == {torch.float32}


def test_row_7_distillation_compares_states_as_they_are_query_and_target_summed(batch):
    config, batch = batch
    student, teacher = torch.randn(24, 16), torch.randn(24, 16)

    def found(states, scale):
        own = replace(config, distill_scale=scale)
        return train.stage_losses(states, teacher, batch, 1, 0, own)["distill"].item()

    query, target = ((student - teacher) ** 2).chunk(2)
    expected = query.mean().item() + target.mean().item()
    assert found(student, 1.0) == pytest.approx(expected)
    assert found(student, 0.05) == pytest.approx(0.05 * expected)
    # not normalised: the length of a state counts
    assert abs(found(2 * student, 1.0) - expected) > 0.1


def test_row_8_stage_1_weighs_infonce_and_distillation_and_leaves_the_teacher_alone(batch):
    config, batch = batch
    student = torch.randn(24, 16, requires_grad=True)
    teacher = torch.randn(24, 16, requires_grad=True)
    losses = train.stage_losses(student, teacher, batch, 1, 0.5, config)
    modality, duplicate = batch["modality"], batch["duplicate"]
    infonce = mac_loss(student[:12], student[12:], modality, 0.05, 0.05, duplicate=duplicate)
    query, target = (student - teacher).square().chunk(2)
    distill = query.mean() + target.mean()
    assert config.distill_scale == 10
    torch.testing.assert_close(losses["loss"], 0.9 * infonce + 0.1 * 10 * distill)
    losses["loss"].backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_row_3_progress_is_the_share_of_the_stages_steps(batch):
    config, batch = batch
    config = replace(config, temperature=0.03)
    states = torch.randn(24, 16)
    taus = [train.stage_losses(states, None, batch, 2, progress, config)["hard_temperature"]
            for progress in (0.0, 0.25, 0.5, 0.9)]
    assert taus[0] == 0.03 and taus[1] == pytest.approx(0.03 * 2.718281828 ** -0.25)
    assert taus[2] == taus[3] == pytest.approx(0.03 * 2.718281828 ** -0.5)
    infonce = replace(config, loss="infonce")
    assert train.stage_losses(states, None, batch, 2, 0.9, infonce)["hard_temperature"] == 0.03


def test_row_6_text_only_distillation_leaves_items_with_images_out(pairs):
    config = train.Config(**SMALL, distill_modalities="text")
    batch = train.Batcher(PUMA.from_pretrained(MODEL, 1), config)(pairs)
    items = pairs["queries"] + pairs["targets"]
    assert batch["distilled"].tolist() == [item["image"] is None for item in items]
    student, teacher = torch.zeros(24, 4), torch.zeros(24, 4)
    student[~batch["distilled"]] = 100.0
    assert train.stage_losses(student, teacher, batch, 1, 0, config)["distill"] == 0


def test_row_9_visual_tokens_are_computed_once_for_teacher_and_student(batch):
    config, batch = batch
    student = train.load_student(config, CPU)
    teacher = train.load_teacher(config, student, CPU)
    calls = []
    student.backbone.visual.register_forward_hook(lambda *_: calls.append(1))
    teacher.backbone.visual.register_forward_hook(lambda *_: calls.append(1))
    before = [weight.clone() for weight in find_decoder(teacher).layers.parameters()]
    for step in (train.plain_step, train.large_batch_step):
        calls.clear()
        step(student, teacher, batch, 1, 0, config)
        towers = 2 if teacher.backbone.visual is student.backbone.visual else 1  # both hooks ran
        assert len(calls) == towers * sum("pixel_values" in chunk for chunk in batch["chunks"])
    assert all(p.grad is None for p in teacher.parameters())
    with torch.no_grad():  # what is trained is not shared
        for weight in student.parameters():
            weight += weight.requires_grad
    assert all(map(torch.equal, find_decoder(teacher).layers.parameters(), before))


def test_row_14_keep_last_keeps_the_first_layers_and_the_last_one():
    config = train.Config(model=str(MODEL), keep_layers=3, keep_last=True)
    kept, full = ([layer.mlp.down_proj.weight for layer in find_decoder(model).layers]
                  for model in (train.load_student(config, CPU), PUMA.from_pretrained(MODEL)))
    assert len(kept) == 3
    assert all(map(torch.equal, kept, [full[0], full[1], full[7]]))


def test_order_brings_states_back_to_queries_then_targets(pairs):
    model = PUMA.from_pretrained(MODEL, 1).eval()
    batch = train.Batcher(model, train.Config(**SMALL, chunk_size=5))(pairs)
    with torch.no_grad():
        states = torch.cat([model(chunk) for chunk in batch["chunks"]])[batch["order"]]
    expected = model.encode(pairs["queries"] + pairs["targets"], normalize=False)
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)


# ---- LoRA ----------------------------------------------------------------------------------------

def test_merged_lora_is_an_ordinary_model_with_the_same_embeddings(tmp_path):
    pytest.importorskip("peft")
    student, names = PUMA.from_pretrained(MODEL, 2), ["latin small letter a", "black star"]
    ordinary, plain = dict(student.named_parameters()), student.encode(names)
    adapters = add_lora(find_decoder(student), rank=4, alpha=8, dropout=0.1)
    torch.testing.assert_close(student.encode(names), plain)  # it starts as the model itself
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    linears = {re.search(r"layers\.(\d)\.\w+\.(\w+)\.lora_[AB]", name).groups()
               for name in trained - {"ret_embedding"}}
    assert "ret_embedding" in trained and linears == {
        (layer, f"{part}_proj") for layer in "01" for part in ("q", "k", "v", "o", "gate", "up",
                                                              "down")}
    set_dropout(find_decoder(student), 0.05)
    assert {m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)} == {0.05}
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    expected = student.encode(names)
    assert (expected - plain).abs().max() > 0.01
    adapters.merge_and_unload()
    student.save_pretrained(tmp_path / "model")
    loaded = PUMA.from_pretrained(tmp_path / "model")
    assert dict(loaded.named_parameters()).keys() == ordinary.keys()
    torch.testing.assert_close(loaded.encode(names), expected, atol=1e-5, rtol=1e-5)


def test_adapters_are_trained_in_float32_whatever_the_models_dtype():
    pytest.importorskip("peft")
    decoder = find_decoder(PUMA.from_pretrained(MODEL, 1, dtype=torch.bfloat16))
    add_lora(decoder, rank=4, alpha=8)
    assert {p.dtype for p in decoder.parameters() if p.requires_grad} == {torch.float32}


def test_without_peft_or_with_too_high_a_rank_lora_says_so(monkeypatch):
    decoder = find_decoder(PUMA.from_pretrained(MODEL, 1))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(ValueError, match="pip install peft"):
            add_lora(decoder, rank=4, alpha=8)
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"--lora-rank must be in 1\.\.64, .* got 65"):
        add_lora(decoder, rank=65, alpha=8)


# ---- the plan ------------------------------------------------------------------------------------

@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_plan_counts_what_loading_then_shows(lora_rank, monkeypatch, capsys):
    if lora_rank:
        pytest.importorskip("peft")
    config = train.Config(model=str(MODEL), keep_layers=3, lora_rank=lora_rank)
    student, full = train.load_student(config, CPU), PUMA.from_pretrained(MODEL)
    kept = student.backbone.num_parameters()
    layers = sum(p.numel() for p in find_decoder(full).layers.parameters())
    train.prepare_training(config, student)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    layers += full.backbone.get_input_embeddings().weight.numel()
    # On a GPU frozen weights take 2 bytes, trained ones 4; gradient 4, AdamW 8, the teacher 2.
    weights = 2 * kept + 4 * trained if lora_rank else 4 * kept
    total = weights + 12 * trained + 2 * layers
    gpu = type("", (), {"total_memory": total})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    train.print_plan(config, torch.device("cuda"))
    assert (f"{kept:,} kept, {full.backbone.num_parameters() - kept:,} dropped, "
            f"{trained:,} trainable") in capsys.readouterr().out
    gpu.total_memory = total - 1
    with pytest.raises(ValueError, match="GiB are more than the .* GiB of cuda: try --lora-rank"):
        train.print_plan(config, torch.device("cuda"))
    train.print_plan(config, CPU)


# ---- whole runs ----------------------------------------------------------------------------------

def arguments(data, out, **settings):
    settings = {**SMALL, "model": MODEL, "data": data, "eval": False, **settings}
    settings |= {"out": out} if out else {}
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]


def run_main(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, argv)])
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        train.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("samples_per_s")
    return rows


LORA = {"lora_rank": 4, "lora_dropout": 0.3, "stage1_lora_dropout": 0.2, "keep_layers": 2,
        "batch_size": 4, "chunk_size": 3}


@pytest.fixture(scope="module")
def uninterrupted(glyph_beir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        run_main(patch, *arguments(glyph_beir, folder))
    return folder


@pytest.mark.parametrize("hardware", [False, True])
def test_steps_use_bfloat16_products_where_the_processor_has_them(
        hardware, glyph_beir, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: hardware)
    forward, seen = PUMA.forward, set()

    def spy(model, *arguments):
        if model.training:
            seen.add(torch.is_autocast_enabled("cpu"))
        return forward(model, *arguments)

    monkeypatch.setattr(PUMA, "forward", spy)
    run_main(monkeypatch, *arguments(glyph_beir, tmp_path / "run", stage1_steps=0, stage2_steps=1,
                                     device="cpu"))
    assert seen == {hardware}


def test_compiled_layers_learn_the_same(uninterrupted, glyph_beir, tmp_path, monkeypatch):
    compiled, compile_it = [], torch.compile

    def record(function, **options):  # "eager": traced and called as traced, not translated
        compiled.append(function.__self__)
        return compile_it(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", record)
    run_main(monkeypatch, *arguments(glyph_beir, tmp_path / "run", compile=True))
    vision, student, mllm = 2, 4 - 1, 8 - 1  # all but the last of the decoder's layers
    assert len(compiled) == 2 * vision + student + mllm
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(uninterrupted), strict=True):
        numbers = ([row[name] for name in ("loss", "grad_norm")] for row in (ours, theirs))
        assert next(numbers) == pytest.approx(next(numbers), rel=1e-3)


def test_a_machine_without_a_compiler_is_told_so(glyph_beir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, *arguments(glyph_beir, tmp_path / "run", compile=True))
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err == (
        "error: --compile needs a C compiler, such as gcc, on the PATH\n")


def test_a_run_folder_holds_what_it_promises(uninterrupted):
    rows = metrics(uninterrupted)
    assert [(r["stage"], r["step"]) for r in rows] == [
        (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (2, 4), (2, 5)]
    keys = {"loss", "contrastive", "distill", "hard_temperature", "grad_norm", "masked_duplicates"}
    assert all(keys <= set(row) for row in rows)
    assert json.loads((uninterrupted / "config.json").read_text())["batch_size"] == 12
    assert (uninterrupted / "curves.png").stat().st_size > 5_000
    assert PUMA.from_pretrained(uninterrupted / "model").encode(["a"]).shape == (1, 128)
    assert len(list((uninterrupted / "checkpoints").glob("*/model.safetensors"))) == 2


@pytest.mark.parametrize("options", [{}, LORA], ids=["all weights", "LoRA with dropout"])
def test_a_killed_run_ends_as_an_uninterrupted_one_bit_by_bit(
        options, glyph_beir, tmp_path, uninterrupted, monkeypatch):
    if options:
        pytest.importorskip("peft")
        uninterrupted = tmp_path / "whole"
        run_main(monkeypatch, *arguments(glyph_beir, uninterrupted, **options))
        assert PUMA.from_pretrained(uninterrupted / "model").encode("a").shape == (128,)
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train.py"), *arguments(
        glyph_beir, folder, checkpoint_every=2, keep_checkpoints=9, **options)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    saved = folder / "checkpoints/stage2-step000002"
    deadline = time.time() + 300
    while not saved.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert saved.exists()
    for name in ("curves.png", "model", "checkpoints/stage2-step000004",
                 "checkpoints/stage2-step000005"):  # if the kill came late
        shutil.rmtree(folder / name, ignore_errors=True)
    between = tmp_path / "between the stages"
    shutil.copytree(folder, between)
    shutil.rmtree(between / "checkpoints/stage2-step000002")
    for resumed in (folder, between):
        run_main(monkeypatch, "--resume", resumed)
        assert metrics(resumed) == metrics(uninterrupted)
        ours = (resumed / "model/model.safetensors").read_bytes()
        assert ours == (uninterrupted / "model/model.safetensors").read_bytes()


def test_a_run_stopped_in_its_evaluation_goes_on_with_it_and_is_then_finished(
        glyph_beir, tmp_path, monkeypatch, capsys):
    folder, models = tmp_path / "run", {}

    def stopped(*_args, **_options):
        raise KeyboardInterrupt

    def evaluate_models(given, name, data, out, settings):
        models.update(given)
        (out / "results.json").write_text("{}")

    monkeypatch.setattr(train.evaluate, "evaluate_models", stopped)
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *arguments(glyph_beir, folder, eval=True, keep_layers=3, device="cpu",
                                         keep_last=True, stage1_steps=0, stage2_steps=1))
    weights = (folder / "model/model.safetensors").stat()
    monkeypatch.setattr(train.evaluate, "evaluate_models", evaluate_models)
    run_main(monkeypatch, "--resume", folder, "--device", "cpu")
    assert (folder / "model/model.safetensors").stat() == weights
    pruned = train.load_student(train.Config(model=str(MODEL), keep_layers=3, keep_last=True), CPU)
    expected = [PUMA.from_pretrained(MODEL), pruned, PUMA.from_pretrained(folder / "model")]
    items = ["a text", {"image": next((glyph_beir / "mbeir_images").rglob("*.png"))}]
    vectors = [model.encode(items) for model in expected]
    for model, vector in zip(models.values(), vectors, strict=True):
        torch.testing.assert_close(model.encode(items), vector, atol=1e-5, rtol=1e-4)
    assert min((vectors[0] - vectors[1]).abs().max(), (vectors[1] - vectors[2]).abs().max()) > 1e-3
    capsys.readouterr()
    monkeypatch.setattr(train.evaluate, "evaluate_models", stopped)
    run_main(monkeypatch, "--resume", folder)
    assert capsys.readouterr().out.startswith(f"{folder} is finished")


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("harm, message", [
    (lambda run, last: (last / "state.pt").write_bytes((last / "state.pt").read_bytes()[:-1]),
     "stage2-step000005 is damaged: delete"),
    (lambda run, last: (last / "model.safetensors").write_bytes(
        (last.parent / "stage1-step000003/model.safetensors").read_bytes()), "is damaged: delete"),
    (lambda run, last: (last / "model.safetensors").unlink(), "model.safetensors"),
    (lambda run, last: edit_json(last / "checkpoint.json", settings=[]), "trained with another"),
    (lambda run, last: edit_json(run / "config.json", seed=7),
     "stage2-step000005 was trained with another seed: 0, now 7"),
    (lambda run, last: edit_json(run / "config.json", batchsize=7), "argument 'batchsize'"),
    (lambda run, last: edit_json(run / "config.json", batch_size="7"), "--batch-size must be in"),
    (lambda run, last: (run / "config.json").write_text("[]"), "expected a JSON object, got []"),
    (lambda run, last: (run / "config.json").write_text("[" * 9999), "expected a JSON object"),
    (lambda run, last: ((run / "config.json").unlink(), os.mkfifo(run / "config.json")),
     "config.json: expected a regular file"),
    (lambda run, last: (run / "metrics.jsonl").write_text("{}\n"),
     "metrics.jsonl:1: expected a field 'stage'"),
])
def test_a_damaged_or_foreign_run_is_refused_in_one_line(harm, message, uninterrupted, tmp_path,
                                                         monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "model")
    harm(folder, folder / "checkpoints/stage2-step000005")
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, "--resume", folder)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0], lines


def test_the_same_command_goes_on_and_another_one_is_refused(uninterrupted, glyph_beir, tmp_path,
                                                             monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "model")
    run_main(monkeypatch, *arguments(glyph_beir, folder))
    ours = (folder / "model/model.safetensors").read_bytes()
    assert ours == (uninterrupted / "model/model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *arguments(glyph_beir, folder, lr=1e-3))
    assert "exists with another lr: 0.003, now 0.001; choose" in capsys.readouterr().err


def test_two_runs_at_once_get_folders_of_their_own_and_never_share_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    first, second = Run("", {"a": 1}, {"a": 1}), Run("", {"a": 1}, {"a": 1})
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)
    assert [str(run.folder) for run in (first, second)] == ["runs/puma-1", "runs/puma-2"]
    with pytest.raises(ValueError, match="runs/puma-1 is in use by another process"):
        Run("runs/puma-1", {"a": 1}, {"a": 1})
    with first, second:
        pass


def test_a_loss_that_is_not_finite_stops_the_run_before_the_optimizer(
    glyph_beir, tmp_path, monkeypatch, capsys
):
    folder, step = tmp_path / "run", train.plain_step

    def spoilt(*inputs):
        losses = step(*inputs)
        return {**losses, "loss": losses["loss"] * float("inf" if inputs[4] else 1)}

    monkeypatch.setattr(train, "plain_step", spoilt)
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, *arguments(glyph_beir, folder, stage1_steps=0))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "stage 2, step 2: loss inf, gradient " in error, error
    rows = [json.loads(line) for line in (glyph_beir / "query/union_train").glob("*.jsonl")
            .__next__().open()]
    qids = re.findall(r"1[01]:\d+", error)
    assert len(qids) == 12 and set(qids) <= {row["qid"] for row in rows}
    assert re.search(r"the batch: dataset 1[01], [a-z,]+ -> [a-z,]+; ", error)
    assert not (folder / "model").exists() and len(metrics(folder)) == 1


def test_bad_data_in_a_worker_is_named_with_file_and_line(glyph_beir, tmp_path, monkeypatch,
                                                          capsys):
    broken = tmp_path / "data"
    shutil.copytree(glyph_beir, broken, copy_function=os.link)
    (path,) = broken.glob("query/union_train/*.jsonl")
    rows = [json.loads(line) for line in path.open()]
    path.unlink()
    for row in rows:
        if row["query_img_path"]:
            row["query_img_path"] = "mbeir_images/missing.png"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for workers in (0, 1):
        with pytest.raises(SystemExit):
            run_main(monkeypatch, *arguments(broken, tmp_path / "run", workers=workers,
                                             tasks_per_batch=8, stage1_steps=0))
        error = capsys.readouterr().err.strip().splitlines()[-1]
        number = int(re.match(rf"error: {path}:(\d+): cannot read image ", error)[1])
        assert rows[number - 1]["query_img_path"] and not (tmp_path / "run").exists(), error
        assert not multiprocessing.active_children(), "Python would wait for them at its exit"


def test_a_worker_that_is_killed_ends_the_run_with_a_checkpoint(glyph_beir, tmp_path, monkeypatch,
                                                                uninterrupted, capsys):
    folder, step = tmp_path / "run", train.plain_step

    def kill_in_the_second(*inputs):
        if (folder / "metrics.jsonl").exists():  # the first is done
            for child in multiprocessing.active_children():
                child.kill()
        return step(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "plain_step", kill_in_the_second)
        with pytest.raises(SystemExit) as stop:
            run_main(patch, *arguments(glyph_beir, folder, workers=1))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and f"--resume {folder}" in error, error
    assert list((folder / "checkpoints").iterdir())
    run_main(monkeypatch, "--resume", folder)
    assert metrics(folder) == metrics(uninterrupted)


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with Run(tmp_path / "run", {}, {}) as run:
        run.save(model, optimizer, schedule, 1, 1)
        full = os.open("/dev/full", os.O_WRONLY)
        monkeypatch.setattr(torch, "save", lambda *_: os.write(full, b"x"))
        with pytest.raises(OSError, match="cannot write .*step000002: .*No space left"):
            run.save(model, optimizer, schedule, 1, 2)
        assert run.position() == (1, 1)
        assert [path.name for path in run.checkpoints.iterdir()] == ["stage1-step000001"]


@pytest.mark.parametrize("group", [False, True], ids=["one process", "its whole group"])
def test_sigterm_saves_and_stops_and_the_run_can_be_continued(group, glyph_beir, tmp_path,
                                                              monkeypatch, uninterrupted):
    folder = tmp_path / "stopped"
    command = [sys.executable, str(ROOT / "train.py"), *arguments(glyph_beir, folder, workers=1)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
    last = process.communicate(timeout=300)[1].strip().splitlines()[-1]
    assert process.returncode == 130
    assert last == f"stopped; continue with: python train.py --resume {folder}"
    assert list((folder / "checkpoints").glob("stage*"))
    run_main(monkeypatch, "--resume", folder)
    assert metrics(folder) == metrics(uninterrupted)


def test_bad_input_gives_one_line_exit_status_2_and_no_folder(
    glyph_beir, tmp_path, monkeypatch, capsys
):
    taken = tmp_path / "taken"
    (taken / "something").mkdir(parents=True)
    broken = tmp_path / "data"
    for name in ("query/union_train", "cand_pool/global", "instructions"):
        (broken / name).mkdir(parents=True)
    tsv = (glyph_beir / "instructions/query_instructions.tsv").read_text()
    (broken / "instructions/query_instructions.tsv").write_text(tsv)
    (broken / "query/union_train/x.jsonl").write_text('{"qid": "10:1", "query_txt": "a"}\n')
    mistyped, out = tmp_path / "mistyped", tmp_path / "out"
    mistyped.mkdir()
    (mistyped / "config.json").write_text('{"batchsize": 3}')
    cases = [
        (arguments(glyph_beir, out, keep_layers=9), "--keep-layers must be in 1..8, got 9"),
        (arguments(glyph_beir, out, keep_layers=0), "--keep-layers must be in 1..1,000,000"),
        (arguments(tmp_path / "nowhere", out), "expected the folder"),
        (arguments(broken, out), "x.jsonl:1: expected a field 'pos_cand_list'"),
        (arguments(glyph_beir, taken), "taken exists and is no run: choose another"),
        (arguments(glyph_beir, out, model=tmp_path), "expected"),
        (arguments(glyph_beir, out, batch_size=0), "--batch-size must be in 2..1,000,000, got 0"),
        (arguments(glyph_beir, out, device="nonsense"), "--device nonsense: "),
        (["--resume", tmp_path], "config.json"),
        (["--resume", mistyped], "cannot read its config.json: "),
        (["--nonsense", "3"], "unrecognized arguments: --nonsense 3"),
    ]
    for argv, message in cases:
        with pytest.raises(SystemExit) as stop:
            run_main(monkeypatch, *argv)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and message in error, (argv, error)
        assert not out.exists()


def test_a_miniature_of_the_main_job_beats_chance_by_far(glyph_beir, tmp_path, monkeypatch):
    """Both stages, 40 steps: the local hit rate rises well above the untrained pruned model's."""
    folder = tmp_path / "run"
    run_main(monkeypatch, *arguments(glyph_beir, folder, batch_size=64, stage1_steps=10,
                                     stage2_steps=30, keep_layers=2))
    benchmark = Benchmark(glyph_beir)
    cells = benchmark.cells("test", limit=60)
    cells = [cell for cell in cells if cell.name[-1] in "136"]  # to texts: fast to embed
    averages = []
    for model in (PUMA.from_pretrained(MODEL, 2), PUMA.from_pretrained(folder / "model")):
        embedded = Embedded(benchmark, cells, "test",
                            lambda items, model=model: model.encode(items))
        averages.append(score(cells, embedded.rank(cells))["average"]["local"]["hit_rate@5"])
    chance = 5 / 3189
    assert averages[1] > 50 * chance
    assert averages[1] > averages[0] + 0.03, averages
