"""prune_distill.py on tiny random models of five families, and on the committed tiny MLLM."""

import gc
import weakref

import pytest
import torch
from conftest import MODEL
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from prune_distill import distill_loss, find_decoder, layer_embeddings, prune_layers
from puma import PUMA

DEPTH, DEEPSTACK = 5, 2  # layers; of Qwen3-VL, the first layers that visual features enter
PAD, IMAGE, VIDEO, START, END = 1, 2, 3, 4, 5
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": DEPTH, "pad_token_id": PAD,
        "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def visual(**vision):
    """A vision-language model's config: a tower of two blocks whose patches are 4 x 4 pixels."""
    vision |= {"depth": 2, "num_heads": 2, "patch_size": 4, "in_channels": 3, "hidden_size": 32,
               "spatial_merge_size": 2, "temporal_patch_size": 2}
    return {"text_config": TEXT | {"rope_parameters": MROPE}, "vision_config": vision,
            "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
            "vision_end_token_id": END}


FAMILIES = {
    "qwen2_vl": visual(embed_dim=32, mlp_ratio=2),
    "qwen2_5_vl": visual(intermediate_size=48, out_hidden_size=32, window_size=16,
                         fullatt_block_indexes=[1]),
    "qwen3_vl": visual(intermediate_size=48, out_hidden_size=32, num_position_embeddings=16,
                       deepstack_visual_indexes=list(range(DEEPSTACK))),
    "qwen2": TEXT | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3},
    "llama": TEXT,
}
TWO_FAMILIES = pytest.mark.parametrize("family", ["qwen2_vl", "qwen2"])


def build(family):
    """A model whose weights are all random and large, so that no layer and no norm is a no-op."""
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if "vl" in family else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
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


# ---- cutting -------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
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


@TWO_FAMILIES
@pytest.mark.parametrize("keep, keep_last, indices", [
    ([0, 1, 3], False, [0, 1, 3]), ([0, 1, 3], True, [0, 1, 4]), ([2], False, [2]),
    (3, True, [0, 1, 4]), (DEPTH, True, [0, 1, 2, 3, 4]),
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


@TWO_FAMILIES
def test_config_layer_indices_and_parameters_follow_the_cut(family):
    model = build(family)
    full, dropped = model.num_parameters(), find_decoder(model).layers[2::2]
    prune_layers(model, [0, 1, 3])
    decoder = find_decoder(model)
    for part in (model, model.model, decoder):
        config = part.config.get_text_config()
        assert config.num_hidden_layers == len(decoder.layers) == 3
        if family == "qwen2":  # three full, then two sliding layers
            assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in decoder.layers] == [0, 1, 2]
    assert model.num_parameters() == full - sum(p.numel() for p in dropped.parameters())


def test_dropped_layers_are_freed():
    model = build("qwen2")
    run(model, inputs_for("qwen2"), output_hidden_states=True)  # installs transformers' own hooks
    layers = find_decoder(model).layers
    kept, dropped = weakref.ref(layers[1]), weakref.ref(layers[3].mlp.down_proj.weight)
    del layers
    prune_layers(model, 2)
    gc.collect()
    assert kept() is not None and dropped() is None


@TWO_FAMILIES
def test_a_saved_cut_model_loads_with_the_stock_class_and_gives_equal_bits(family, tmp_path):
    inputs, model = inputs_for(family), prune_layers(build(family), [0, 1, 3])
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected or mismatched
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)


@TWO_FAMILIES
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
    (0, r"1\.\.5, got 0"), (6, r"1\.\.5, got 6"), ([], r"0\.\.4, got \[\]"),
    ([2, 0], r"0\.\.4, got \[2, 0\]"), ([0, 1, 1], r"0\.\.4, got \[0, 1, 1\]"),
    ([0, 5], r"0\.\.4, got \[0, 5\]"), ([-1, 0], r"0\.\.4, got \[-1, 0\]"),
])
def test_an_impossible_choice_is_an_error_that_names_it_and_changes_nothing(keep, message):
    model = build("qwen2")
    for keep_last in (False, True):
        with pytest.raises(ValueError, match=message):
            prune_layers(model, keep, keep_last)
    assert len(model.model.layers) == model.config.num_hidden_layers == DEPTH


def test_qwen3_vl_refuses_to_drop_a_layer_that_visual_features_enter():
    model = build("qwen3_vl")
    for keep in (1, [0, 2], [1, 2, 3]):
        with pytest.raises(ValueError, match=r"deepstack .* first 2 layers: keep them all, got \["):
            prune_layers(model, keep)
    assert len(find_decoder(model).layers) == DEPTH


def test_a_model_without_one_decoder_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="Linear has 0 decoders"):
        prune_layers(torch.nn.Linear(2, 2), 1)
    two = torch.nn.ModuleList([build("qwen2"), build("qwen2")])
    with pytest.raises(ValueError, match="ModuleList has 2 decoders"):
        find_decoder(two)


# ---- distilling ----------------------------------------------------------------------------------

def test_distillation_loss_equals_a_double_loop_and_leaves_the_teacher_alone():
    torch.manual_seed(0)
    student, teacher = (torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
                        for _ in range(2))
    slow = sum((student[i, d] - teacher[i, d]) ** 2 for i in range(4) for d in range(7)) / (4 * 7)
    fast = distill_loss(student, teacher)
    assert fast.dtype == torch.float64
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (fast, slow)))
    distill_loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("items", [3, 0])
def test_distillation_loss_is_zero_if_the_student_equals_the_teacher_or_without_items(items):
    student = torch.randn(items, 5, requires_grad=True)
    loss = distill_loss(student, student.detach().clone())
    loss.backward()
    assert loss == 0 and student.grad.eq(0).all()


def test_distillation_loss_of_half_precision_states_is_computed_in_float32():
    student, teacher = torch.randn(3, 5).bfloat16(), torch.randn(3, 5)
    loss = distill_loss(student, teacher)
    torch.testing.assert_close(loss, (student.float() - teacher).square().mean())


def test_distillation_of_unequal_shapes_is_an_error_that_names_them():
    with pytest.raises(ValueError, match=r"\(3, 5\) and \(1, 5\)"):  # would broadcast silently
        distill_loss(torch.randn(3, 5), torch.randn(1, 5))


# ---- reading out every depth ---------------------------------------------------------------------

@pytest.fixture
def batch(puma):
    """Two texts of unequal length, an image, an image with a text."""
    image = Image.effect_noise((56, 56), 50)
    return puma.collate(["snowman", "latin small letter a", {"image": image},
                         {"image": image, "text": "make it capital"}])


@torch.no_grad()
def test_layer_embeddings_equal_models_cut_at_every_depth(puma, batch):
    states = layer_embeddings(puma, batch)
    depth = len(find_decoder(puma).layers)
    assert states.shape == (depth + 1, 4, 128) and states.dtype == torch.float32
    embedding = find_decoder(puma).norm(puma.ret_embedding)  # every row ends in [RET]
    torch.testing.assert_close(states[0], embedding.expand(4, -1))
    for keep in (1, 3, depth):
        cut = PUMA.from_pretrained(MODEL, keep_layers=keep).eval()
        torch.testing.assert_close(states[keep], cut(batch), rtol=1e-4, atol=1e-4)
        assert (states[keep] - states[keep - 1]).abs().max() > 0.01
    known = torch.zeros_like(puma.visual_tokens(batch))  # visual tokens that are given are used
    assert torch.equal(layer_embeddings(puma, batch, known)[-1], puma(batch, known))


@TWO_FAMILIES
@torch.no_grad()
def test_layer_embeddings_work_on_a_plain_transformers_model_in_any_precision(family):
    inputs, model = inputs_for(family), build(family)
    hidden = run(model, inputs, output_hidden_states=True).hidden_states
    states = layer_embeddings(model, inputs)
    norm = find_decoder(model).norm
    for depth in range(DEPTH):
        torch.testing.assert_close(states[depth], norm(hidden[depth][:, -1]))
    torch.testing.assert_close(states[DEPTH], hidden[DEPTH][:, -1])
    assert layer_embeddings(model.bfloat16(), inputs).dtype == torch.float32


class Doubling(torch.nn.Module):
    """A layer that doubles what it reads and returns it, as Chameleon's do, in a tuple."""

    def forward(self, hidden_states):
        return 2 * hidden_states, None


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Doubling() for _ in range(3)])
        self.norm = torch.nn.Identity()

    def forward(self, states):
        for layer in self.layers:
            states, _ = layer(hidden_states=states)


def test_layer_embeddings_read_layers_that_return_a_tuple():
    states = torch.rand(2, 5, 4)  # (B, tokens, D)
    expected = torch.stack([2 ** depth * states[:, -1] for depth in range(4)])
    assert torch.equal(layer_embeddings(Decoder(), {"states": states}), expected)


def test_hooks_are_removed_afterwards_even_after_an_error(puma, batch):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in puma.modules())

    before = hooks()
    layer_embeddings(puma, batch)
    assert hooks() == before
    wrong = batch | {"input_ids": batch["input_ids"].flip(1)}
    with pytest.raises(ValueError, match="RET"):
        layer_embeddings(puma, wrong)
    assert hooks() == before


def test_layer_embeddings_leave_the_gradient_to_the_caller(puma, batch):
    states = layer_embeddings(puma, batch)
    states[-1].sum().backward()
    assert puma.ret_embedding.grad.abs().max() > 0
