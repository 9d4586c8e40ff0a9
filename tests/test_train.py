"""The training step, the schedule of the stages, resuming, and a miniature of the main job."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import MODEL, ROOT

import train
from data import Benchmark, TrainSet
from evaluate import Embedded, score
from mac_loss import mac_loss
from prune_distill import find_decoder
from puma import PUMA

SMALL = {"batch_size": 12, "stage1_steps": 3, "stage2_steps": 5, "workers": 0}


@pytest.fixture(scope="module")
def batch(glyph_beir):
    """(config, training batch of 12 pairs in chunks of 7 items)."""
    config = train.Config(**{**SMALL, "chunk_size": 7})
    pairs = TrainSet(Benchmark(glyph_beir), 12, 1)[0]
    return config, train.Batcher(PUMA.from_pretrained(MODEL, 2), config)(pairs)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("grad_cache", [False, True])
def test_row_16_gradcache_gives_the_gradients_of_the_big_batch(batch, stage, grad_cache):
    config, batch = batch
    teacher = PUMA.from_pretrained(MODEL).requires_grad_(False) if stage == 1 else None

    def losses_of(states, teacher_states):
        return train.stage_losses(states, teacher_states, batch, stage, 0.4, config)

    plain = PUMA.from_pretrained(MODEL, keep_layers=2)  # one graph from the weights to the loss
    states = torch.cat([plain(chunk) for chunk in batch["chunks"]])[batch["order"]]
    teacher_states = None
    if teacher is not None:
        teacher_states = torch.cat([teacher(chunk) for chunk in batch["chunks"]])[batch["order"]]
    loss = losses_of(states, teacher_states)["loss"]
    loss.backward()
    student = PUMA.from_pretrained(MODEL, keep_layers=2)
    losses = train.training_step(student, teacher, batch, losses_of, grad_cache)
    assert losses["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    found, expected = gradients(student), gradients(plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_gradcache_repeats_the_dropout_of_the_first_pass(batch):
    config, batch = batch
    found = []
    for grad_cache in (False, True):
        student = PUMA.from_pretrained(MODEL, keep_layers=2).train()
        for layer in student.backbone.language_model.layers:
            layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj, torch.nn.Dropout(0.5))
        torch.manual_seed(7)

        def losses_of(states, teacher_states):
            return train.stage_losses(states, teacher_states, batch, 2, 0.4, config)

        train.training_step(student, None, batch, losses_of, grad_cache)
        found.append(gradients(student))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-4, rtol=1e-4)


def test_row_7_distillation_compares_states_as_they_are_query_and_target_summed(batch):
    config, batch = batch
    student, teacher = torch.randn(24, 16), torch.randn(24, 16)
    found = [train.stage_losses(student, teacher, batch, 1, 0, options)["distill"].item()
             for options in (config, dataclasses.replace(config, distill_scale=0.05))]
    query, target = ((student - teacher) ** 2).chunk(2)
    expected = query.mean().item() + target.mean().item()
    assert found == pytest.approx([expected, 0.05 * expected])
    longer = train.stage_losses(2 * student, teacher, batch, 1, 0, config)["distill"].item()
    assert abs(longer - expected) > 0.1  # not normalised: the length of a state counts


def test_row_8_stage_1_weighs_infonce_and_distillation_and_leaves_the_teacher_alone(batch):
    config, batch = batch
    student = torch.randn(24, 16, requires_grad=True)
    teacher = torch.randn(24, 16, requires_grad=True)
    losses = train.stage_losses(student, teacher, batch, 1, 0.5, config)
    modality, duplicate = batch["modality"], batch["duplicate"]
    infonce = mac_loss(student[:12], student[12:], modality, 0.05, 0.05, duplicate=duplicate)
    query, target = (student - teacher).square().chunk(2)
    distill = query.mean() + target.mean()
    torch.testing.assert_close(losses["loss"], 0.9 * infonce + 0.1 * distill)
    losses["loss"].backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_row_3_progress_is_the_share_of_the_stages_steps(batch):
    config, batch = batch
    config = dataclasses.replace(config, temperature=0.03)
    states = torch.randn(24, 16)
    taus = [train.stage_losses(states, None, batch, 2, progress, config)["hard_temperature"]
            for progress in (0.0, 0.25, 0.5, 0.9)]
    assert taus[0] == 0.03 and taus[1] == pytest.approx(0.03 * 2.718281828 ** -0.25)
    assert taus[2] == taus[3] == pytest.approx(0.03 * 2.718281828 ** -0.5)
    infonce = dataclasses.replace(config, loss="infonce")
    assert train.stage_losses(states, None, batch, 2, 0.9, infonce)["hard_temperature"] == 0.03


def test_row_6_text_only_distillation_leaves_items_with_images_out(glyph_beir):
    config = train.Config(**SMALL, distill_modalities="text")
    pairs = TrainSet(Benchmark(glyph_beir), 12, 1)[0]
    batch = train.Batcher(PUMA.from_pretrained(MODEL, 1), config)(pairs)
    items = pairs["queries"] + pairs["targets"]
    assert batch["distilled"].tolist() == [item["image"] is None for item in items]
    student, teacher = torch.zeros(24, 4), torch.zeros(24, 4)
    student[~batch["distilled"]] = 100.0
    assert train.stage_losses(student, teacher, batch, 1, 0, config)["distill"] == 0


def test_row_9_visual_tokens_are_computed_once_for_teacher_and_student(batch, monkeypatch):
    config, batch = batch
    config = dataclasses.replace(config, model=str(MODEL))
    student = train.load_student(config, torch.device("cpu"))
    teacher = train.load_teacher(config, student, torch.device("cpu"))
    assert teacher.backbone.visual is student.backbone.visual
    calls = []
    student.backbone.visual.register_forward_hook(lambda *_: calls.append(1))

    def losses_of(states, teacher_states):
        return train.stage_losses(states, teacher_states, batch, 1, 0, config)

    train.training_step(student, teacher, batch, losses_of)
    assert len(calls) == sum("pixel_values" in chunk for chunk in batch["chunks"])
    assert all(p.grad is None for p in teacher.parameters())


def test_row_14_keep_last_keeps_the_first_layers_and_the_last_one():
    config = dataclasses.replace(train.Config(), model=str(MODEL), keep_layers=3, keep_last=True)
    student = train.load_student(config, torch.device("cpu"))
    kept, full = ([layer.mlp.down_proj.weight for layer in find_decoder(model).layers]
                  for model in (student, PUMA.from_pretrained(MODEL)))
    assert len(kept) == 3
    assert all(torch.equal(a, b) for a, b in zip(kept, [full[0], full[1], full[7]]))


def test_order_brings_states_back_to_queries_then_targets(glyph_beir):
    config = train.Config(**{**SMALL, "chunk_size": 5})
    pairs = TrainSet(Benchmark(glyph_beir), 12, 1)[0]
    model = PUMA.from_pretrained(MODEL, 1).eval()
    batch = train.Batcher(model, config)(pairs)
    with torch.no_grad():
        states = torch.cat([model(chunk) for chunk in batch["chunks"]])[batch["order"]]
    expected = model.encode(pairs["queries"] + pairs["targets"], normalize=False)
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)


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


@pytest.fixture(scope="module")
def uninterrupted(glyph_beir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        run_main(patch, *arguments(glyph_beir, folder))
    return folder


def test_a_run_folder_holds_what_it_promises(uninterrupted):
    rows = metrics(uninterrupted)
    assert [(r["stage"], r["step"]) for r in rows] == [
        (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (2, 4), (2, 5)]
    keys = {"loss", "contrastive", "distill", "hard_temperature", "grad_norm", "masked_duplicates"}
    assert all(keys <= set(row) for row in rows)
    assert json.loads((uninterrupted / "config.json").read_text())["batch_size"] == 12
    assert (uninterrupted / "curves.png").stat().st_size > 5_000
    assert PUMA.from_pretrained(uninterrupted / "model").encode(["a"]).shape == (1, 128)
    weights = list((uninterrupted / "checkpoints").glob("*/model.safetensors"))
    assert len(weights) == 2


def test_a_killed_run_resumes_with_the_losses_of_an_uninterrupted_one(
    glyph_beir, tmp_path, uninterrupted, monkeypatch
):
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train.py")]
    command += arguments(glyph_beir, folder, checkpoint_every=2)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    saved = folder / "checkpoints/stage2-step000002"
    deadline = time.time() + 120
    while not saved.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert saved.exists()
    for left in (folder / "checkpoints").glob("stage2-step00000[45]"):
        import shutil

        shutil.rmtree(left)  # if the kill came late: go back to step 2 all the same
    run_main(monkeypatch, "--resume", folder)
    assert metrics(folder) == metrics(uninterrupted)
    ours = (folder / "model/model.safetensors").read_bytes()
    assert ours == (uninterrupted / "model/model.safetensors").read_bytes()


def test_sigterm_saves_and_stops_and_the_run_can_be_continued(glyph_beir, tmp_path, monkeypatch,
                                                              uninterrupted, capsys):
    folder = tmp_path / "stopped"
    step = train.training_step

    def stop_in_the_second(*inputs):
        if len((folder / "metrics.jsonl").read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", stop_in_the_second)
        with pytest.raises(SystemExit) as stop:
            run_main(patch, *arguments(glyph_beir, folder))
    assert stop.value.code == 130
    assert f"--resume {folder}" in capsys.readouterr().err
    run_main(monkeypatch, "--resume", folder)
    assert metrics(folder) == metrics(uninterrupted)


def test_bad_input_gives_one_line_exit_status_2_and_no_folder(
    glyph_beir, tmp_path, monkeypatch, capsys
):
    taken = tmp_path / "taken"
    taken.mkdir()
    broken = tmp_path / "data"
    for name in ("query/union_train", "cand_pool/global", "instructions"):
        (broken / name).mkdir(parents=True)
    tsv = (glyph_beir / "instructions/query_instructions.tsv").read_text()
    (broken / "instructions/query_instructions.tsv").write_text(tsv)
    (broken / "query/union_train/x.jsonl").write_text('{"qid": "10:1", "query_txt": "a"}\n')
    out = tmp_path / "out"
    cases = [
        (arguments(glyph_beir, out, keep_layers=9), "--keep-layers must be in 1..8, got 9"),
        (arguments(glyph_beir, out, keep_layers=0), "--keep-layers must be in 1..8, got 0"),
        (arguments(tmp_path / "nowhere", out), "expected the folder"),
        (arguments(broken, out), "x.jsonl:1: expected a field 'pos_cand_list'"),
        (arguments(glyph_beir, taken), "taken exists: choose another"),
        (arguments(glyph_beir, out, model=tmp_path), "expected"),
        (arguments(glyph_beir, out, batch_size=0), "--batch-size must be greater than 0, got 0"),
        (arguments(glyph_beir, out, device="nonsense"), "--device nonsense: "),
        (["--resume", tmp_path], "config.json"),
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
    cells = [cell for cell in benchmark.cells("test", limit=60) if cell.name[-1] in "1467"]
    averages = []
    for model in (PUMA.from_pretrained(MODEL, 2), PUMA.from_pretrained(folder / "model")):
        embedded = Embedded(benchmark, cells, "test", model.encode)
        averages.append(score(cells, embedded.rank(cells))["average"]["local"]["hit_rate@5"])
    chance = 5 / 3189
    assert averages[1] > 50 * chance
    assert averages[1] > averages[0] + 0.05, averages


@pytest.mark.parametrize("keep_last", [False, True])
def test_the_evaluation_embeds_as_the_mllm_the_pruned_mllm_and_puma_would(
        keep_last, glyph_beir, monkeypatch):
    config = dataclasses.replace(train.Config(), model=str(MODEL), data=str(glyph_beir),
                                 keep_layers=3, keep_last=keep_last)
    student = PUMA.from_pretrained(MODEL, 2).train()
    image = next((glyph_beir / "mbeir_images").rglob("*.png"))
    items = ["a text", {"image": str(image)}, {"image": str(image), "text": "make it capital"}]

    class Embedded(Exception):
        def __init__(self, _benchmark, _cells, _split, encode):
            self.columns = encode(items)

    def raising(*args):
        raise Embedded(*args)

    monkeypatch.setattr(train.evaluate, "Embedded", raising)
    with pytest.raises(Embedded) as caught:
        train.compare(config, student, None, torch.device("cpu"))
    models = PUMA.from_pretrained(MODEL), train.load_student(config, torch.device("cpu")), student
    expected = torch.stack([model.encode(items, show_progress=False) for model in models])
    torch.testing.assert_close(caught.value.columns, expected, atol=1e-5, rtol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.01  # three different models
    assert (expected[1] - expected[2]).abs().max() > 0.01


def test_every_setting_is_an_option_with_a_reason(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--help")
    text = capsys.readouterr().out
    for field in dataclasses.fields(train.Config):
        assert f"--{field.name.replace('_', '-')}" in text
        assert len(field.metadata["help"]) > 10
    assert "--no-eval" in text


def test_copies_of_a_student_do_not_share_weights_with_the_teacher():
    config = dataclasses.replace(train.Config(), model=str(MODEL))
    student = train.load_student(config, torch.device("cpu"))
    teacher = train.load_teacher(config, student, torch.device("cpu"))
    before = copy.deepcopy(teacher.backbone.language_model.layers[0].state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 1
    after = teacher.backbone.language_model.layers[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
