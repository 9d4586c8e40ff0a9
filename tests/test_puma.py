"""The model: what it reads, where it reads it, and that the stock classes agree."""

import contextlib
import copy
import json
import shutil

import pytest
import torch
from conftest import MODEL
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

import support.run
from puma import PUMA, RET, _add_ret_token


def picture(seed=0, size=(56, 56)):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


ITEMS = [
    "latin small letter a",
    picture(0),
    {"image": picture(1), "text": "make it capital"},
    {"text": "greek small letter alpha with psili and varia", "instruction": "Find the name."},
    {"image": picture(2), "instruction": "Which one is the same character?"},
]


def stock_inputs(batch, config, kinds="image"):
    """A batch of ours as the stock class takes it, which then computes positions by itself.

    `kinds`: "image", or the kind of each visual."""
    batch = {key: value for key, value in batch.items() if key != "position_ids"}
    pixels, grids = batch.pop("pixel_values"), batch.pop("grid_thw")
    parts = pixels.split(grids.prod(-1).tolist())
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        own = [i for i in range(len(grids)) if kind in (kinds, kinds[i])]
        if own:
            batch |= {name: torch.cat([parts[i] for i in own]), f"{kind}_grid_thw": grids[own]}
    ids = batch["input_ids"]
    batch["mm_token_type_ids"] = ((ids == config.image_token_id).int()
                                  + 2 * (ids == config.video_token_id).int())
    return batch


@pytest.mark.parametrize("keep", [1, 4, 8])
def test_pruned_output_is_the_stock_models_hidden_state_k_with_the_final_norm(keep):
    stock = Qwen2VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    pruned = PUMA.from_pretrained(MODEL, keep_layers=keep).eval()
    batch = pruned.collate(ITEMS)
    with torch.no_grad():
        states = stock.model(**stock_inputs(batch, stock.config), output_hidden_states=True)
        hidden = states.hidden_states[keep][:, -1]
        expected = hidden if keep == 8 else stock.model.language_model.norm(hidden)
        torch.testing.assert_close(pruned(batch), expected, atol=1e-5, rtol=1e-5)


def test_every_row_ends_in_ret_and_padding_does_not_change_its_state(puma):
    batch = puma.collate(ITEMS)
    assert (batch["input_ids"][:, -1] == puma.ret_id).all()
    assert (batch["input_ids"] == puma.ret_id).sum() == len(ITEMS)
    assert batch["attention_mask"].sum(1).unique().numel() > 1, "the items must differ in length"
    with torch.no_grad():
        alone = torch.cat([puma(puma.collate([item])) for item in ITEMS])
        torch.testing.assert_close(puma(batch), alone, atol=1e-5, rtol=1e-5)


def test_row_11_a_row_that_does_not_end_in_ret_is_an_error(puma):
    batch = puma.collate(["a"])
    cut = {key: value[..., :-1] for key, value in batch.items()}
    with pytest.raises(ValueError, match=r"must end in \[RET\]"):
        puma(cut)


def test_row_12_nothing_follows_ret_and_the_prompt_names_what_is_there(puma):
    rows = puma.collate(ITEMS)["input_ids"]
    texts = [puma.tokenizer.decode(row).split("<|im_start|>user\n")[1] for row in rows]
    kinds = ["sentence", "image", "image and sentence", "sentence", "image and sentence"]
    for text, kind in zip(texts, kinds):
        end = f"\nSummarize above {kind} in one word: <|im_end|>\n<|im_start|>assistant\n[RET]"
        assert text.endswith(end), text
    instruction, text = texts[3].split("\n")[:2]
    assert (instruction, text) == ("Find the name.", ITEMS[3]["text"])


@pytest.mark.parametrize("size", [(56, 56), (140, 56), (56, 84), (300, 200)])
def test_row_10_positions_are_the_stock_mrope_for_any_image_shape(puma, size):
    puma.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 300 * 28 * 28}
    batch = puma.collate([{"image": picture(size=size), "text": "what is it?"}, "short"])
    ids, (_, height, width) = batch["input_ids"], batch["grid_thw"][0].tolist()
    expected, start = [], len(puma.before_ids) + 1  # + <|vision_start|>
    expected += [(i, i, i) for i in range(start)]
    expected += [(start, start + row, start + column)
                 for row in range(height // 2) for column in range(width // 2)]
    after = start + max(height, width) // 2
    expected += [(after + i,) * 3 for i in range(ids.shape[1] - len(expected))]
    assert batch["position_ids"][:, 0].T.tolist() == [list(position) for position in expected]
    length = batch["attention_mask"][1].sum()  # a text counts from 0, after its padding
    assert torch.equal(batch["position_ids"][:, 1, -length:], torch.arange(length).expand(3, -1))


def test_a_video_fills_both_halves_of_a_patch_with_successive_frames(puma):
    frames = [picture(seed) for seed in range(4)]
    video = puma.collate([{"video": frames, "text": "what moves?"}])
    stills = puma.collate(frames)
    assert video["grid_thw"].tolist() == [[2, 4, 4]]
    halves = video["pixel_values"].view(2, 16, 3, 2, -1)  # pair, patch, colour, half, pixel
    still = stills["pixel_values"].view(4, 16, 3, 2, -1)
    for frame in range(4):
        assert torch.equal(halves[frame // 2, :, :, frame % 2], still[frame, :, :, 0])
    types = (video["input_ids"] == puma.backbone.config.video_token_id).int() * 2
    expected, _ = puma.backbone.get_rope_index(
        video["input_ids"], types, video_grid_thw=video["grid_thw"])
    assert torch.equal(video["position_ids"], expected)
    assert puma.encode([{"video": frames}], show_progress=False).isfinite().all()


def test_a_clip_is_packed_as_a_written_out_loop_packs_it(puma):
    frames = [picture(seed, (84, 56)) for seed in range(4)]  # 4 x 6 patches at 14 pixels
    processor = puma.image_processor
    one = processor(images=frames, return_tensors="pt")["image_grid_thw"][0].tolist()
    mean, std = (torch.tensor(values)[:, None, None]
                 for values in (processor.image_mean, processor.image_std))
    shape = one[2] * 14, one[1] * 14  # of the processor's budget of pixels
    pixels = [(torch.frombuffer(bytearray(frame.resize(shape, Image.Resampling.BICUBIC).tobytes()),
                                dtype=torch.uint8)
               .view(shape[1], shape[0], 3).permute(2, 0, 1) / 255 - mean) / std
              for frame in frames]
    expected = []
    for pair in range(2):
        for y in range(0, one[1], 2):
            for x in range(0, one[2], 2):
                for row, column in ((y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1)):
                    patch = [pixels[2 * pair + half][colour, row * 14 : (row + 1) * 14,
                                                     column * 14 : (column + 1) * 14].flatten()
                             for colour in range(3) for half in range(2)]
                    expected.append(torch.cat(patch))
    found, grids = puma.patches([{"video": frames}])
    assert grids.tolist() == [[2, *one[1:]]]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_a_clip_is_packed_as_the_stock_video_processor_packs_it(puma):
    pytest.importorskip("torchvision")
    from transformers import Qwen2VLVideoProcessor

    frames = [picture(seed) for seed in range(6)]
    stock = Qwen2VLVideoProcessor(size=puma.image_processor.size, do_sample_frames=False)(
        videos=[frames], return_tensors="pt")
    found, grids = puma.patches([{"video": frames}])
    assert torch.equal(grids, stock["video_grid_thw"])
    torch.testing.assert_close(found, stock["pixel_values_videos"])


def test_clips_and_stills_in_a_batch_give_the_states_of_the_stock_model(puma, tmp_path):
    frames = [picture(seed) for seed in range(5)]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    items = [{"video": str(tmp_path / "clip.webp"), "text": "what moves?"}, picture(7), "a text",
             {"video": frames[:1]}, {"image": picture(8), "text": "what is it?"},
             {"video": frames[:4], "instruction": "Describe it."}]
    stock = Qwen2VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    batch = puma.collate(items)
    assert batch["grid_thw"][:, 0].tolist() == [3, 1, 1, 1, 2]  # a frame without a partner: twice
    kinds = ["video", "image", "video", "image", "video"]
    with torch.no_grad():
        hidden = stock.model(**stock_inputs(batch, stock.config, kinds)).last_hidden_state[:, -1]
        torch.testing.assert_close(puma(batch), hidden, atol=1e-5, rtol=1e-5)
        alone = torch.cat([puma(puma.collate([item])) for item in items])
        torch.testing.assert_close(puma(batch), alone, atol=1e-5, rtol=1e-5)
    parts = batch["pixel_values"].split(batch["grid_thw"].prod(-1).tolist())
    halves = parts[0].view(3, 16, 3, 2, -1)  # pair, patch, colour, half, pixel
    still = puma.collate(frames)["pixel_values"].view(5, 16, 3, 2, -1)
    for pair in range(3):
        for half in range(2):
            assert torch.equal(halves[pair, :, :, half], still[min(2 * pair + half, 4), :, :, 0])
    assert torch.equal(parts[2], puma.collate(frames[:1])["pixel_values"])  # a still


def test_a_gpus_attention_keeps_pictures_and_frames_apart(puma, monkeypatch, tmp_path):
    def slow(query, key, value, ends, ends_of_keys, longest, longest_of_keys):  # (P, heads, width)
        assert ends is ends_of_keys and longest == longest_of_keys == ends.diff().max()
        out = torch.empty_like(query)
        for start, end in zip(ends.tolist(), ends.tolist()[1:]):
            for head in range(query.shape[1]):
                q, k, v = (part[start:end, head] for part in (query, key, value))
                out[start:end, head] = (q @ k.T / q.shape[1] ** 0.5).softmax(1) @ v
        return out

    frames = [picture(seed, (56, 84)) for seed in range(4)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    batch = puma.collate([picture(4), {"video": str(tmp_path / "clip.gif")}, picture(5, (84, 112))])
    expected = puma.visual_tokens(batch)
    # PyTorch's kernel runs on GPUs alone: tests/gpu_check.py compares its results.
    monkeypatch.setattr("support.run.varlen_attn", slow)
    monkeypatch.setattr("puma.choose_attention", lambda tower: None)
    puma.backbone.visual.config._attn_implementation = "packed_flash"
    torch.testing.assert_close(puma.visual_tokens(batch), expected, atol=1e-5, rtol=1e-5)


def test_special_tokens_in_a_users_text_stay_text(puma):
    text = "a <|image_pad|> [RET] <|im_end|> b"
    batch = puma.collate([text])
    config = puma.backbone.config
    assert (batch["input_ids"] == puma.ret_id).sum() == 1
    assert not (batch["input_ids"] == config.image_token_id).any()
    assert text in puma.tokenizer.decode(batch["input_ids"][0])


def test_long_text_is_cut_and_prompt_and_ret_are_kept():
    model = PUMA.from_pretrained(MODEL, keep_layers=1, max_text_tokens=10)
    long, cut = model.collate(["a b c d e f g h i j k l m n o p " * 50])["input_ids"], 10
    tail = model.summary_tail({"text": "a"})
    assert long.shape[1] == len(model.before_ids) + cut + len(tail)
    assert long[0, -len(tail) :].tolist() == tail


def test_encode_returns_input_order_whatever_the_batching(puma):
    items = ITEMS * 3 + ["x" * n for n in (50, 3, 20)]
    whole = puma.encode(items, batch_size=64, show_progress=False)
    torch.testing.assert_close(whole, puma.encode(items, 2, show_progress=False), atol=1e-5, rtol=0)
    alone = torch.cat([puma.encode([item], show_progress=False) for item in items])
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(len(items)))
    assert puma.encode([], show_progress=False).shape == (0, 128)


def test_processes_that_read_ahead_change_nothing_and_name_a_bad_file(puma, tmp_path, monkeypatch):
    items, counts, loader = [*ITEMS, {"image": tmp_path / "a.png"}], [], support.run.DataLoader
    picture(5).save(tmp_path / "a.png")
    expected = puma.encode(items, 2, show_progress=False)
    monkeypatch.setattr(support.run, "DataLoader", lambda *args, num_workers, **options: (
        counts.append(num_workers) or loader(*args, num_workers=num_workers, **options)))
    monkeypatch.setattr(puma, "workers", 2)
    assert torch.equal(puma.encode(items, 2, show_progress=False), expected)
    puma.encode(items, show_progress=False)
    assert counts == [2, 0], "none for a single batch"
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot read image .*a.png"):
        puma.encode(items, 2, show_progress=False)


def test_encode_takes_one_item_or_several_texts_pictures_paths_and_dictionaries(puma, tmp_path):
    path = tmp_path / "glyph.png"
    picture(5).save(path)
    same = [picture(5), path, {"image": path}, {"image": str(path)}, {"image": picture(5)}]
    vectors = puma.encode(same, show_progress=False)
    torch.testing.assert_close(vectors, vectors[:1].expand(5, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(puma.encode(path), vectors[0], atol=1e-5, rtol=0)  # one item: (D,)
    assert puma.encode("a red square").shape == puma.encode({"text": "a"}).shape == (128,)
    with pytest.raises(ValueError, match="empty item"):
        puma.encode([""])


def test_only_decoder_layers_final_norm_and_the_ret_row_are_trained(puma):
    trained = {name for name, p in puma.named_parameters() if p.requires_grad}
    prefixes = ("backbone.language_model.layers.", "backbone.language_model.norm.", "ret_embedding")
    assert all(name.startswith(prefixes) for name in trained)
    puma(puma.collate(ITEMS)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0
               for n, p in puma.named_parameters() if n in trained)
    assert all(p.grad is None for n, p in puma.named_parameters() if n not in trained)


def test_ret_only_last_layer_gives_the_plain_states_and_gradients(puma, monkeypatch):
    batch = puma.collate(ITEMS)
    fast = puma(batch)
    gradient = torch.autograd.grad(fast.square().sum(), puma.ret_embedding)[0]
    monkeypatch.setattr("puma._last_token_only", contextlib.nullcontext)
    plain = puma(batch)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    expected = torch.autograd.grad(plain.square().sum(), puma.ret_embedding)[0]
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


def test_row_13_a_saved_model_loads_with_the_stock_class_and_gives_the_same_state(puma, tmp_path):
    pruned = PUMA.from_pretrained(MODEL, keep_layers=3).eval()
    with torch.no_grad():
        pruned.ret_embedding += 0.1  # as if trained
    pruned.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["text_config"][
        "num_hidden_layers"] == 3
    assert (tmp_path / "model/README.md").exists()
    assert not list((tmp_path / "model").glob("*.bin"))
    batch = pruned.collate(ITEMS)
    again = PUMA.from_pretrained(tmp_path / "model").eval()
    stock = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(again(batch), pruned(batch))
        hidden = stock.model(**stock_inputs(batch, stock.config)).last_hidden_state[:, -1]
        torch.testing.assert_close(hidden, pruned(batch), atol=1e-5, rtol=1e-5)


def test_a_saved_model_is_loaded_with_the_limits_it_was_trained_with(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(MODEL, base)
    processor = json.loads((base / "preprocessor_config.json").read_text())
    processor["size"] = {"shortest_edge": 56 * 56, "longest_edge": 10**6}
    (base / "preprocessor_config.json").write_text(json.dumps(processor))
    items = [picture(size=(900, 900)), "a b c d e f g h i j k l m n o p q r s t u v w x y z",
             {"video": [picture()] * 10}]

    def tokens(model):  # visual ones of the picture, all of the text, pairs of frames
        batch = model.collate(items)
        visual = (batch["input_ids"][0] == model.backbone.config.image_token_id).sum().item()
        return visual, batch["attention_mask"][1].sum().item(), batch["grid_thw"][1, 0].item()

    trained = PUMA.from_pretrained(base, 1, max_visual_tokens=500, max_text_tokens=20, max_frames=6)
    trained.save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "model/config.json").read_text())
    assert saved["puma"] == {"max_visual_tokens": 500, "max_text_tokens": 20, "max_frames": 6}
    again = PUMA.from_pretrained(tmp_path / "model")
    assert tokens(again) == tokens(trained) and 300 < tokens(again)[0] <= 500
    torch.testing.assert_close(again.encode(items), trained.encode(items), atol=1e-5, rtol=1e-5)
    paper = tokens(PUMA.from_pretrained(base, 1))  # nothing was trained: 300, 450 and 8
    assert 200 < paper[0] <= 300 and paper[1] > tokens(again)[1] and tokens(again)[2] == 3
    assert paper[2] == 4
    smaller = PUMA.from_pretrained(tmp_path / "model", max_visual_tokens=9, max_frames=2)
    assert tokens(smaller)[0] <= 9 and smaller.max_text_tokens == 20 and tokens(smaller)[2] == 1


def test_saving_never_overwrites_a_folder_and_a_failed_save_leaves_nothing(
        puma, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    with pytest.raises(FileExistsError, match="old exists: choose another folder"):
        puma.save_pretrained(tmp_path / "old")
    monkeypatch.setattr(puma.tokenizer, "save_pretrained", lambda folder: 1 / 0)  # a full disk
    with pytest.raises(ZeroDivisionError):
        puma.save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_weights_that_are_not_the_configs_are_refused_by_name(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp.up_proj" in name)
    renamed = {key if key != name else "odd.weight": value for key, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"not those of its config\.json: 2 .*layers\.1"):
        PUMA.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"cannot load .*model: "):
        PUMA.from_pretrained(folder)


def test_keep_layers_out_of_range_and_incomplete_folders_are_named(tmp_path):
    for bad in (0, 9, -1):
        with pytest.raises(ValueError, match=rf"keep_layers must be in 1\.\.8, got {bad}"):
            PUMA.from_pretrained(MODEL, keep_layers=bad)
    with pytest.raises(ValueError, match="does not exist"):
        PUMA.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text((MODEL / "config.json").read_text())
    with pytest.raises(ValueError, match=r"expected .*tokenizer\.json"):
        PUMA.from_pretrained(tmp_path)
    (tmp_path / "model").mkdir()  # a run folder: the model is one deeper
    with pytest.raises(ValueError, match="did you mean .*model"):
        PUMA.from_pretrained(tmp_path)


def test_ret_is_added_to_a_tokenizer_without_it_and_its_row_is_usable():
    base = PUMA.from_pretrained(MODEL, keep_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] != RET]
    tokenizer.backend_tokenizer.__setstate__(json.dumps(state).encode())
    assert RET not in tokenizer.get_vocab()
    with pytest.raises(ValueError, match=r"no \[RET\] token"):
        PUMA(copy.deepcopy(base.backbone), tokenizer, base.image_processor)
    backbone = copy.deepcopy(base.backbone)
    rows = backbone.get_input_embeddings().num_embeddings
    _add_ret_token(tokenizer, backbone)
    model = PUMA(backbone, tokenizer, base.image_processor)
    assert model.ret_id < backbone.get_input_embeddings().num_embeddings <= rows + 1
    assert model.encode(["a"], show_progress=False).isfinite().all()


def test_remembered_images_give_the_same_embeddings_and_are_not_opened_again(puma, tmp_path):
    frames = [Image.effect_noise((56, 56), 50 + n) for n in range(4)]
    frames[0].save(tmp_path / "clip.png", save_all=True, append_images=frames[1:])
    for n, size in enumerate([(56, 56), (84, 56), (56, 56)]):
        Image.effect_noise(size, 60).save(tmp_path / f"{n}.png")
    items = ["a text", {"video": str(tmp_path / "clip.png")}, *(
        {"image": str(tmp_path / f"{n}.png"), "text": "x" * n} for n in (0, 1, 2, 0))]
    expected = puma.encode(items)
    need = sum(4 * puma.ret_embedding.numel() * n for n in (8, 4, 2, 4))
    puma.remember(items, need - 1, chunk=2)
    assert not puma.remembered, "too many for the memory"
    puma.remember(items, need, chunk=2)
    assert len(puma.remembered) == 4
    for path in tmp_path.iterdir():
        path.unlink()
    torch.testing.assert_close(puma.encode(items), expected, atol=1e-5, rtol=1e-4)
    Image.effect_noise((56, 56), 60).save(tmp_path / "new.png")
    with pytest.raises(ValueError, match="0.png"):  # of a batch with an unknown image, all are read
        puma.encode([{"image": str(tmp_path / "new.png")}, items[2]])


@pytest.mark.parametrize("limits", [[1], "x", 5, {"max_frames": "8"}, {"max_text_tokens": 0}])
def test_saved_limits_that_are_none_are_refused_in_one_line(limits, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"puma": limits}))
    with pytest.raises(ValueError, match="cannot load|must be in 1"):
        PUMA.from_pretrained(tmp_path / "model")
