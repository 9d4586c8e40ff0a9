"""toy/pretrain.py: what the tiny MLLM is trained on, its labels, its schedule, and resuming.

That it sees nothing held out is tested with GlyphBEIR's files, in test_glyph_beir.py.
"""

import argparse
import math
import random

import pytest
import torch
from conftest import MODEL

from puma import PUMA
from toy import pretrain


@pytest.fixture(scope="module")
def corpus(glyph_beir):
    return pretrain.Corpus(glyph_beir)


def test_summaries_are_of_candidates_and_of_as_many_plain_queries_as_asked_for(corpus):
    prompts = {prompt + ".": task for task, prompts in pretrain.INSTRUCTIONS.items()
               for prompt in prompts}
    rng = random.Random(0)
    pairs = [corpus.sample_summary(rng, 0.0) for _ in range(1000)]
    assert not any("instruction" in item for item, _ in pairs)
    pictures = sum(bool(item["image"]) and not item["text"] for item, _ in pairs)
    assert 420 < pictures < 540  # 3 of 5 without the clips: seeing is what takes longest to learn
    moving = [name.endswith(tuple(pretrain.VERBS.values())) for _, name in pairs]
    assert 150 < sum(moving) < 250 and 120 < sum(bool(item["video"]) for item, _ in pairs) < 200
    items = [corpus.sample_summary(rng, 0.2)[0] for _ in range(1000)]
    tasks = [prompts[item["instruction"]] for item in items if "instruction" in item]
    assert 150 < len(tasks) < 250 and set(tasks) == {*pretrain.PLAIN_TASKS, *pretrain.CLIP_TASKS}
    clips = [item for item, _ in (corpus.sample_answer(rng) for _ in range(1000)) if item["video"]]
    assert 150 < len(clips) < 250 and {item["text"] for item in clips} == {pretrain.DESCRIBE_IT}


def test_the_label_of_a_summary_gives_each_word_of_the_name_the_same_share():
    puma = PUMA.from_pretrained(MODEL, keep_layers=1)
    label = pretrain.word_distribution(puma, "latin small letter a with acute")
    assert sum(label.values()) == pytest.approx(1)
    tokens = puma.tokenize([" latin"])[0]
    assert sum(label[token] for token in tokens) == pytest.approx(1 / 6)


def test_the_loss_of_stills_and_clips_together_is_that_of_the_stock_model(corpus, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    puma = PUMA.from_pretrained(MODEL)
    model = pretrain.Qwen2VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32)
    rng, config = random.Random(3), model.config
    still, clip = rng.choice(corpus.candidates["image"])[0], corpus.candidates["video"][0][0]
    total = 0
    with torch.no_grad():
        batch = puma.collate([still, clip])
        last = torch.full((2,), batch["input_ids"].shape[1] - 1)
        labels = torch.eye(pretrain.VOCABULARY)[:2]
        for row, (item, kind) in enumerate(((still, "image"), (clip, "video"))):
            inputs = puma.collate([item])
            ids, grid = inputs["input_ids"], inputs["grid_thw"]
            pixels = {"image": "pixel_values", "video": "pixel_values_videos"}[kind]
            token = config.image_token_id if kind == "image" else config.video_token_id
            logits = model(**{"input_ids": ids, pixels: inputs["pixel_values"],
                              f"{kind}_grid_thw": grid, "mm_token_type_ids":
                              (ids == token).int() * (1 + (kind == "video"))}).logits[0, -1]
            total -= logits.log_softmax(-1)[row] / 2
        loss = pretrain.loss_of(model, batch, (torch.arange(2), last), labels)
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)


def test_each_predicting_state_stands_just_before_its_answers_token(corpus):
    puma = PUMA.from_pretrained(MODEL, keep_layers=1)
    batch, (rows, columns), labels = pretrain.answer_batch(puma, corpus, random.Random(1), 5)
    assert set(rows.tolist()) == set(range(5))
    answers = labels.argmax(1)
    assert torch.equal(batch["input_ids"][rows, columns + 1], answers)
    end = puma.tokenizer.convert_tokens_to_ids("<|im_end|>")
    last = columns == batch["input_ids"].shape[1] - 2
    assert last.sum() == 5 and (answers[last] == end).all()


def test_the_learning_rate_warms_up_and_ends_at_a_fiftieth():
    rates = [pretrain.learning_rate(step, 2000, 1e-3) for step in range(2000)]
    assert rates[0] == pytest.approx(1e-3 / 300, rel=1e-3)
    assert max(rates) == rates[299] and rates[299] == pytest.approx(1e-3, rel=0.06)
    assert rates[-1] == pytest.approx(1e-3 / 50, rel=1e-3)
    assert rates[1150] == pytest.approx(
        1e-3 * (0.02 + 0.49 * (1 + math.cos(math.pi * 1150 / 2000))))


@pytest.mark.parametrize("option, message", [
    ("--steps=0", "--steps must be in 1..1,000,000, got 0"), ("--lr=nan", "--lr must be in"),
    ("--batch-size=1", "--batch-size must be in 2.."), ("--work=", "--work must be a text"),
    ("--lr=inf", "--lr must be in"), ("--measure=nowhere", "nowhere does not exist"),
    ("--out=taken", "--out taken exists: choose another folder")])
def test_bad_options_are_named_before_any_work_and_nothing_is_touched(
    option, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/precious").write_text("mine")
    monkeypatch.setattr("sys.argv", ["pretrain.py", option])
    with pytest.raises(SystemExit) as stop:
        pretrain.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and message in error
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "precious"]


def test_a_resumed_pre_training_ends_with_the_weights_of_an_uninterrupted_one(
    corpus, tmp_path, monkeypatch
):
    def run(folder, stop_after=None):
        tokenizer = pretrain.make_tokenizer(corpus)
        model = pretrain.make_model(tokenizer, seed=0)
        size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
        processor = pretrain.Qwen2VLImageProcessorPil(size=size)
        puma = pretrain.CachedPUMA(model.model, tokenizer, processor)
        args = argparse.Namespace(work=folder, steps=stop_after or 4, batch_size=16, lr=1e-3,
                                  seed=0)
        pretrain.train(corpus, puma, model, args)
        return torch.load(folder / "checkpoint.pt", weights_only=True)

    monkeypatch.setattr(pretrain, "learning_rate", lambda step, steps, peak: peak)
    whole = run(tmp_path / "whole")
    cut = run(tmp_path / "cut", stop_after=2)
    with pytest.raises(ValueError, match="is of the settings .*choose another --work"):
        run(tmp_path / "cut")  # else the new recipe's card would stand over the old weights
    cut["settings"]["steps"] = 4
    torch.save(cut, tmp_path / "cut/checkpoint.pt")
    resumed = run(tmp_path / "cut")
    assert whole["step"] == resumed["step"] == 4
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name
