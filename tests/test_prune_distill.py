"""prune_distill.py on tiny random models of five families, and on the committed tiny MLLM."""

import copy
import gc
import math
import weakref

import pytest
import torch
from conftest import MODEL
from PIL import Image, ImageDraw
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from prune_distill import (
    depth_costs,
    distill_loss,
    find_decoder,
    layer_embeddings,
    layer_report,
    linear_cka,
    prune_layers,
)
from puma import PUMA

DEPTH, DEEPSTACK = 5, 2  # layers; of Qwen3-VL, the first layers that visual features enter
PAD, IMAGE, VIDEO, START, END = 1, 2, 3, 4, 5
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": DEPTH, "max_position_embeddings": 64,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
          "vision_end_token_id": END}
VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "in_channels": 3, "spatial_merge_size": 2,
          "temporal_patch_size": 2, "hidden_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
VL_TEXT = TEXT | {"rope_parameters": MROPE}
FAMILIES = {
    "qwen2_vl": lambda: Qwen2VLForConditionalGeneration(Qwen2VLConfig(
        text_config=VL_TEXT, vision_config=VISION | {"embed_dim": 32, "mlp_ratio": 2}, **TOKENS)),
    "qwen2_5_vl": lambda: Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=VL_TEXT, **TOKENS, vision_config=VISION | {
            "intermediate_size": 48, "out_hidden_size": 32, "window_size": 16,
            "fullatt_block_indexes": [1]})),
    "qwen3_vl": lambda: Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=VL_TEXT | {"head_dim": 16}, **TOKENS, vision_config=VISION | {
            "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16,
            "deepstack_visual_indexes": list(range(DEEPSTACK))})),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(  # two kinds: 3 full, then 2 sliding layers
        **TEXT, use_sliding_window=True, sliding_window=3, max_window_layers=3)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def build(family):
    """A model whose every weight is random and large, so that no layer and no norm is a no-op."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return model


def inputs_for(family):
    """Two rows, the first with an image of 2 x 2 visual tokens if it can, the second padded."""
    image = [START, IMAGE, IMAGE, IMAGE, IMAGE, END] if "vl" in family else [20, 21, 22, 23, 24, 25]
    ids = torch.tensor([[10, *image, 11, 12, 13], [PAD, PAD, PAD, 14, 15, 16, 17, 18, 19, 9]])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if "vl" in family:
        random = torch.Generator().manual_seed(1)
        inputs["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=random)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return inputs


@torch.no_grad()
def run(model, inputs, **options):
    return model.model(**inputs, **options)  # without the LM head: states


@torch.no_grad()
def slow_states(model, inputs, indices):
    """The output of the whole model with all layers but `indices` made to do nothing."""
    def skip(_module, args, kwargs, _output):
        return args[0] if args else kwargs["hidden_states"]

    layers = find_decoder(model).layers
    handles = [layer.register_forward_hook(skip, with_kwargs=True)
               for index, layer in enumerate(layers) if index not in indices]
    states = run(model, inputs).last_hidden_state
    for handle in handles:
        handle.remove()
    return states


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- cutting -------------------------------------------------------------------------------------

@EVERY_FAMILY
def test_a_model_cut_at_k_gives_the_full_models_hidden_state_k_normed(family):
    inputs, full = inputs_for(family), build(family)
    hidden = run(full, inputs, output_hidden_states=True).hidden_states
    assert len(hidden) == DEPTH + 1
    normed = [find_decoder(full).norm(state) for state in hidden[:-1]] + [hidden[-1]]
    real = inputs["attention_mask"].bool()
    previous = None
    for keep in range(DEEPSTACK if family == "qwen3_vl" else 1, DEPTH + 1):
        states = run(prune_layers(build(family), keep), inputs).last_hidden_state
        compared = real
        if family == "qwen3_vl" and keep == DEEPSTACK:
            # transformers records hidden state 2 before visual features are added to it; the model
            # adds them. At [RET], a text position, there is no difference. (The test below.)
            compared = real & (inputs["input_ids"] != IMAGE)
        torch.testing.assert_close(states[compared], normed[keep][compared], rtol=0, atol=1e-5)
        assert previous is None or (states - previous)[compared].abs().max() > 0.1
        previous = states


def test_qwen3_vl_cut_at_its_deepstack_layers_gives_what_the_next_layer_would_read():
    inputs, full = inputs_for("qwen3_vl"), build("qwen3_vl")
    read = []
    handle = find_decoder(full).layers[DEEPSTACK].register_forward_pre_hook(
        lambda _module, args: read.append(args[0]))
    run(full, inputs)
    handle.remove()
    states = run(prune_layers(build("qwen3_vl"), DEEPSTACK), inputs).last_hidden_state
    torch.testing.assert_close(states, find_decoder(full).norm(read[0]), rtol=0, atol=1e-5)


@EVERY_FAMILY
@pytest.mark.parametrize("keep, keep_last, indices", [
    ([0, 1, 3], False, [0, 1, 3]),
    ([0, 1, 3], True, [0, 1, 4]),
    (3, True, [0, 1, 4]),
    (3, False, [0, 1, 2]),
    (DEPTH, True, [0, 1, 2, 3, 4]),
])
def test_any_choice_of_layers_equals_the_full_model_with_the_others_skipped(
        family, keep, keep_last, indices):
    inputs, full = inputs_for(family), build(family)
    expected = slow_states(full, inputs, indices)
    layers = list(find_decoder(full).layers)
    pruned = prune_layers(full, keep, keep_last)
    assert pruned is full  # in place
    assert list(find_decoder(pruned).layers) == [layers[index] for index in indices]
    real = inputs["attention_mask"].bool()
    states = run(pruned, inputs).last_hidden_state
    torch.testing.assert_close(states[real], expected[real], rtol=0, atol=1e-5)


@EVERY_FAMILY
def test_config_and_layer_indices_follow_the_cut(family):
    model = build(family)
    types = getattr(model.config.get_text_config(), "layer_types", None)
    prune_layers(model, [0, 1, 3])
    decoder = find_decoder(model)
    for config in (model.config.get_text_config(), model.model.config.get_text_config(),
                   decoder.config):
        assert config.num_hidden_layers == len(decoder.layers) == 3
        if types:
            assert config.layer_types == [types[0], types[1], types[3]]
    assert [layer.self_attn.layer_idx for layer in decoder.layers] == [0, 1, 2]
    if family == "qwen2":
        assert config.layer_types == ["full_attention", "full_attention", "sliding_attention"]


@EVERY_FAMILY
def test_the_cut_model_has_the_parameters_of_the_full_one_less_the_dropped_blocks(family):
    model = build(family)
    full, dropped = parameters(model), parameters(find_decoder(model).layers[2:])
    assert dropped > 0
    assert parameters(prune_layers(model, 2)) == full - dropped


@EVERY_FAMILY
def test_dropped_layers_are_freed(family):
    model = build(family)
    run(model, inputs_for(family), output_hidden_states=True)  # installs transformers' own hooks
    layers = find_decoder(model).layers
    kept, dropped = weakref.ref(layers[1]), weakref.ref(layers[3])
    weight = weakref.ref(layers[3].mlp.down_proj.weight)
    del layers
    prune_layers(model, 2)
    gc.collect()
    assert kept() is not None and dropped() is None and weight() is None


@EVERY_FAMILY
def test_a_saved_cut_model_loads_with_the_stock_class_and_gives_equal_bits(family, tmp_path):
    inputs, model = inputs_for(family), prune_layers(build(family), [0, 1, 3])
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected or mismatched
    assert parameters(loaded) == parameters(model)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_generation_with_a_cache_works_after_a_list_prune(family):
    inputs, model = inputs_for(family), prune_layers(build(family), [0, 2])
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert len(cached.past_key_values.layers) == 2
    assert all(layer.keys is not None for layer in cached.past_key_values.layers)
    assert cached.sequences.shape == (2, 16)
    plain = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, plain)


@pytest.mark.parametrize("keep, message", [
    (0, r"1\.\.5, got 0"), (-1, r"1\.\.5, got -1"), (6, r"1\.\.5, got 6"),
    ([], r"0\.\.4, got \[\]"), ([2, 0], r"0\.\.4, got \[2, 0\]"),
    ([0, 1, 1], r"0\.\.4, got \[0, 1, 1\]"), ([0, 5], r"0\.\.4, got \[0, 5\]"),
    ([-1, 0], r"0\.\.4, got \[-1, 0\]"),
])
@pytest.mark.parametrize("keep_last", [False, True])
def test_an_impossible_choice_is_an_error_that_names_it_and_changes_nothing(
        keep, message, keep_last):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        prune_layers(model, keep, keep_last)
    assert len(model.model.layers) == model.config.num_hidden_layers == DEPTH


@pytest.mark.parametrize("keep", [1, [0, 2], [1, 2, 3], [0, 2, 3, 4]])
def test_qwen3_vl_refuses_to_drop_a_layer_that_visual_features_enter(keep):
    model = build("qwen3_vl")
    with pytest.raises(ValueError, match=r"deepstack .* first 2 layers: keep them all, got \["):
        prune_layers(model, keep)
    assert len(find_decoder(model).layers) == DEPTH
    assert len(find_decoder(prune_layers(model, DEEPSTACK)).layers) == DEEPSTACK


def test_a_model_without_one_decoder_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="Linear has 0 decoders"):
        prune_layers(torch.nn.Linear(2, 2), 1)
    two = torch.nn.ModuleList([build("llama"), build("qwen2")])
    with pytest.raises(ValueError, match="ModuleList has 2 decoders"):
        find_decoder(two)


def test_teacher_and_student_part_ways_after_a_deepcopy():
    """The module docstring's recipe: the teacher keeps its layers, the student's are its own."""
    inputs, teacher = inputs_for("llama"), build("llama")
    before = run(teacher, inputs).last_hidden_state
    student = prune_layers(copy.deepcopy(teacher), keep=2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(run(teacher, inputs).last_hidden_state, before)
    assert teacher.config.num_hidden_layers == DEPTH and student.config.num_hidden_layers == 2


# ---- distilling ----------------------------------------------------------------------------------

def test_distillation_loss_equals_a_double_loop_in_values_and_gradients():
    torch.manual_seed(0)
    student = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 7, dtype=torch.float64)
    slow = sum((student[i, d] - teacher[i, d]) ** 2 for i in range(4) for d in range(7)) / (4 * 7)
    fast = distill_loss(student, teacher)
    assert fast.dtype == torch.float64
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (fast, slow)))


def test_distillation_loss_is_zero_if_the_student_equals_the_teacher():
    state = torch.randn(3, 5)
    assert distill_loss(state, state.clone()) == 0
    assert distill_loss(state, state + 0.5) > 0


def test_no_gradient_reaches_the_teacher():
    student, teacher = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    distill_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().min() > 0


def test_distillation_loss_of_half_precision_states_is_computed_in_float32():
    student, teacher = torch.randn(3, 5).bfloat16(), torch.randn(3, 5)
    loss = distill_loss(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (student.float() - teacher).square().mean())


def test_distillation_of_unequal_shapes_is_an_error_that_names_them():
    with pytest.raises(ValueError, match=r"\(3, 5\) and \(1, 5\)"):  # would broadcast silently
        distill_loss(torch.randn(3, 5), torch.randn(1, 5))


# ---- reading out every depth ---------------------------------------------------------------------

def picture(number):
    image = Image.new("RGB", (56, 56), "white")
    ImageDraw.Draw(image).rectangle([4 * number, 6, 4 * number + 9, 30 + number], fill="black")
    return image


NAMES = ["latin small letter a", "latin capital letter a", "greek small letter beta", "snowman",
         "leftwards arrow with hook", "black chess knight", "white chess knight", "digit seven"]
ITEMS = [*NAMES, *({"image": picture(n)} for n in range(8)),
         *({"image": picture(n), "text": "make it capital"} for n in range(4))]


@pytest.fixture
def batch(puma):
    return puma.collate([ITEMS[0], ITEMS[4], ITEMS[9], ITEMS[17]])


@torch.no_grad()
def test_layer_embeddings_equal_models_cut_at_every_depth(puma, batch):
    states = layer_embeddings(puma, batch)
    depth = len(find_decoder(puma).layers)
    assert states.shape == (depth + 1, 4, 128) and states.dtype == torch.float32
    assert torch.equal(states[-1], puma(batch))
    for keep in range(1, depth):
        cut = PUMA.from_pretrained(MODEL, keep_layers=keep).eval()
        torch.testing.assert_close(states[keep], cut(batch), rtol=1e-4, atol=1e-4)
        assert (states[keep] - states[keep + 1]).abs().max() > 0.01


@torch.no_grad()
def test_layer_embeddings_at_depth_zero_are_the_normed_token_embedding(puma, batch):
    states = layer_embeddings(puma, batch)
    embedding = find_decoder(puma).norm(puma.ret_embedding)  # every row ends in [RET]
    torch.testing.assert_close(states[0], embedding.expand(4, -1))


@EVERY_FAMILY
@torch.no_grad()
def test_layer_embeddings_work_on_a_plain_transformers_model(family):
    inputs, model = inputs_for(family), build(family)
    hidden = run(model, inputs, output_hidden_states=True).hidden_states
    states = layer_embeddings(model, inputs)
    norm = find_decoder(model).norm
    for depth in range(DEPTH):
        torch.testing.assert_close(states[depth], norm(hidden[depth][:, -1]))
    torch.testing.assert_close(states[DEPTH], hidden[DEPTH][:, -1])


def test_hooks_are_removed_afterwards_even_after_an_error(puma, batch):
    before = hooks(puma)
    layer_embeddings(puma, batch)
    assert hooks(puma) == before
    depth_costs(puma, batch)
    assert hooks(puma) == before
    wrong = batch | {"input_ids": batch["input_ids"].flip(1)}
    with pytest.raises(ValueError, match="RET"):
        layer_embeddings(puma, wrong)
    assert hooks(puma) == before


def test_layer_embeddings_leave_the_gradient_to_the_caller(puma, batch):
    states = layer_embeddings(puma, batch)
    states[-1].sum().backward()
    assert puma.ret_embedding.grad.abs().max() > 0
    with torch.no_grad():
        assert not layer_embeddings(puma, batch).requires_grad


def test_depth_costs_equal_those_of_models_cut_at_that_depth(puma, batch):
    costs = depth_costs(puma, batch)
    depth = len(find_decoder(puma).layers)
    assert len(costs) == depth + 1
    for keep in (1, 3, depth):
        cut = PUMA.from_pretrained(MODEL, keep_layers=keep).eval()
        assert costs[keep][0] == parameters(cut)
        assert costs[keep] == depth_costs(cut, batch)[keep]
    assert costs[0][0] == parameters(puma) - parameters(find_decoder(puma).layers)


def test_operations_grow_by_equal_steps_that_a_hand_count_confirms(puma):
    batch = puma.collate(NAMES)  # texts only: no vision tower
    costs = depth_costs(puma, batch)
    steps = [after[1] - before[1] for before, after in zip(costs[1:], costs[2:])]
    assert len(set(steps)) == 1
    config = puma.backbone.config.get_text_config()
    rows, length = batch["input_ids"].shape
    linear = sum(module.weight.numel() for module in find_decoder(puma).layers[0].modules()
                 if isinstance(module, torch.nn.Linear))  # multiply-adds a token
    attention = 2 * length * config.hidden_size  # query x key and probability x value, a token
    assert steps[0] == 2 * rows * length * (linear + attention)
    # The last layer: keys, values, queries everywhere; output projection and MLP for [RET] only.
    layer = find_decoder(puma).layers[0]
    ret_only = sum(part.weight.numel() for part in (
        layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj))
    assert costs[0][1] == 0
    assert costs[1][1] == 2 * rows * (length * (linear - ret_only + attention) + ret_only)


def test_the_vision_tower_is_paid_at_every_depth(puma, batch):
    assert depth_costs(puma, batch)[0][1] > 0


# ---- the report ----------------------------------------------------------------------------------

def slow_hit_rate(model, queries, candidates, positives, k):
    """Items embedded one at a time, similarities sorted in Python."""
    def embed(item):
        state = model(model.collate([item]))[0].double().tolist()
        length = math.sqrt(sum(x * x for x in state))
        return [x / length for x in state]

    with torch.no_grad():
        query_states, candidate_states = ([embed(i) for i in items] for items in
                                          (queries, candidates))
    hits = 0
    for query, right in zip(query_states, positives):
        scores = [sum(a * b for a, b in zip(query, candidate)) for candidate in candidate_states]
        top = sorted(range(len(scores)), key=lambda j: -scores[j])[:k]
        hits += any(j in right for j in top)
    return hits / len(queries)


def test_layer_report_equals_a_slow_one(puma):
    queries, candidates = ITEMS[:8], ITEMS[8:]
    positives = [{i, (3 * i + 1) % 12} for i in range(8)]
    report = layer_report(puma, queries, candidates, positives, k=3, batch_size=5)
    depth = len(find_decoder(puma).layers)
    assert [row["depth"] for row in report] == list(range(depth + 1))
    assert all(set(row) == {"depth", "hit_rate@3", "cosine", "cka", "parameters", "flops"}
               for row in report)
    for before, after in zip(report, report[1:]):
        assert before["parameters"] < after["parameters"] and before["flops"] < after["flops"]
    assert report[-1]["parameters"] == parameters(puma)
    assert all(0 <= row["hit_rate@3"] <= 1 and -1 <= row["cosine"] <= 1 + 1e-6 for row in report)
    for likeness in ("cosine", "cka"):
        assert report[-1][likeness] == pytest.approx(1, abs=1e-5) and report[1][likeness] < 0.999
    for keep in (2, depth):
        cut = PUMA.from_pretrained(MODEL, keep_layers=keep).eval()
        expected = slow_hit_rate(cut, queries, candidates, positives, 3)
        assert report[keep]["hit_rate@3"] == pytest.approx(expected)


def test_the_keep_last_report_equals_models_that_are_pruned_so(puma):
    queries, candidates = ITEMS[:8], ITEMS[8:]
    positives = [{i, (3 * i + 1) % 12} for i in range(8)]
    depth = len(find_decoder(puma).layers)
    plain = layer_report(puma, queries, candidates, positives, k=3)
    report = layer_report(puma, queries, candidates, positives, k=3, keep_last=True)
    assert len(find_decoder(puma).layers) == depth, "the model is whole again"
    assert report[0] == plain[0] and report[-1] == plain[-1]
    for keep in (1, 3):
        cut = prune_layers(copy.deepcopy(puma), keep, keep_last=True)
        expected = slow_hit_rate(cut, queries, candidates, positives, 3)
        assert report[keep]["hit_rate@3"] == pytest.approx(expected)
        likeness = (cut.encode(ITEMS) * puma.encode(ITEMS)).sum(-1).mean().item()
        assert report[keep]["cosine"] == pytest.approx(likeness, abs=1e-5)
        assert report[keep]["cosine"] != pytest.approx(plain[keep]["cosine"], abs=1e-3)


def test_linear_cka_equals_a_slow_one_and_ignores_rotation_scale_and_shift():
    torch.manual_seed(0)
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)

    def slow(x, y):  # Hilbert-Schmidt independence of the centred Gram matrices
        n = len(x)
        def gram(z):
            mean = [sum(row[d] for row in z) / n for d in range(len(z[0]))]
            z = [[v - m for v, m in zip(row, mean)] for row in z]
            return [[sum(a * b for a, b in zip(p, q)) for q in z] for p in z]
        def hsic(a, b):
            return sum(a[i][j] * b[i][j] for i in range(n) for j in range(n))
        a, b = gram(x.tolist()), gram(y.tolist())
        return hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b))

    assert linear_cka(x, y) == pytest.approx(slow(x, y))
    assert linear_cka(x, x) == pytest.approx(1)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)


def test_layer_report_finds_every_query_that_is_its_own_candidate(puma):
    report = layer_report(puma, ITEMS, ITEMS, [{i} for i in range(20)], k=1, batch_size=7)
    assert report[-1]["hit_rate@1"] == 1
    everything = layer_report(puma, ITEMS[:4], ITEMS[:6], [{5}] * 4, k=99)
    assert all(row["hit_rate@99"] == 1 for row in everything)  # k is cut to the pool
    nothing = layer_report(puma, ITEMS[:4], ITEMS[:6], [set()] * 4, k=99)
    assert all(row["hit_rate@99"] == 0 for row in nothing)


def test_flops_of_the_report_are_those_of_one_item(puma):
    report = layer_report(puma, NAMES, NAMES, [{i} for i in range(8)])
    costs = depth_costs(puma, puma.collate(NAMES))
    assert [row["flops"] * len(NAMES) for row in report] == [flops for _, flops in costs]
