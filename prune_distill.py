"""Layer-pruned self-distillation: cut a decoder's upper layers, let them teach the lower ones.

From PUMA (arXiv 2507.08064). Works on `puma.PUMA` and on any transformers language or
vision-language model whose decoder is a list `.layers` followed by `.norm` (Qwen2-VL, Qwen2.5-VL,
Qwen3-VL, Qwen2, Llama, ...); needs torch only, so it can be copied into your own code:

    teacher = AutoModel.from_pretrained("Qwen/Qwen2-VL-2B-Instruct")
    student = prune_layers(copy.deepcopy(teacher), keep=12)
    loss = 0.9 * contrastive + 0.1 * distill_loss(student_state, teacher_state)      # stage 1

    python evaluate.py toy/tiny-qwen2-vl --depths all     # what each layer knows, what it costs

Cutting after layer k and keeping the final norm gives exactly the full model's hidden state k,
normed: nothing is approximated, it is just read out early. B items, D width, L layers in all.
"""

import torch
import torch.nn.functional as F
from torch import nn


def find_decoder(model):
    """The submodule with a ModuleList `.layers` and a final `.norm`; ValueError if not just one."""
    found = [module for module in model.modules() if hasattr(module, "norm")
             and isinstance(getattr(module, "layers", None), nn.ModuleList)]
    if len(found) != 1:
        name = type(model).__name__
        raise ValueError(f"{name} has {len(found)} decoders with .layers and .norm, not 1")
    return found[0]


def prune_layers(model, keep, keep_last=False):
    """Keep some decoder layers of `model`, in place, and return it. The rest is freed.

    keep: how many of the first layers, or a rising list of layer indices (0-based).
    keep_last: the last of them is the model's last one (official code, a comment: for small k).
    The layers' indices and the config follow: the result saves and loads like any other model.
    Raises ValueError if a layer does not exist or the architecture forbids dropping it.
    """
    decoder = find_decoder(model)
    depth = len(decoder.layers)
    if isinstance(keep, int):
        if not 1 <= keep <= depth:
            raise ValueError(f"keep must be in 1..{depth}, got {keep}")
        indices = list(range(keep))
    else:
        indices = list(keep)
        if not indices or indices != sorted(set(indices).intersection(range(depth))):
            raise ValueError(f"keep must be rising layer indices in 0..{depth - 1}, got {indices}")
    if keep_last:
        indices[-1] = depth - 1
    _refuse_deepstack(model, indices)

    # The pruning itself is this one line: every layer adds to one stream of states (B, tokens, D),
    # so any layer fits after any other. The old list held the dropped ones' only reference.
    decoder.layers = nn.ModuleList(decoder.layers[index] for index in indices)

    # A layer finds its keys and values in the cache by its index: no gaps may stay.
    for new_index, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = new_index
    # The decoder and every model around it have a config, often one object: change each once, or
    # the second turn would pick layer types from a list that is already cut.
    configs = [module.config.get_text_config() for module in model.modules()
               if hasattr(module, "config") and decoder in module.modules()]
    for config in {id(config): config for config in configs}.values():
        config.num_hidden_layers = len(indices)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[index] for index in indices]
    return model


def _refuse_deepstack(model, indices):
    """Qwen3-VL adds visual features to its first layers' outputs; those must stay in place."""
    # The features of the vision tower's n-th listed block go to the n-th layer's output.
    for module in model.modules():
        vision = getattr(getattr(module, "config", None), "vision_config", None)
        needed = len(getattr(vision, "deepstack_visual_indexes", None) or [])
        if indices[:needed] != list(range(needed)):
            enter = f"deepstack visual features enter the first {needed} layers"
            raise ValueError(f"{enter}: keep them all, got {indices}")


def distill_loss(student_state, teacher_state):
    """L_distill = E || h_t - h_s ||^2 on un-normalised `[RET]` states (B, D), after the final norm.

    The mean is over items and dimensions, in float32; no gradient reaches the teacher. Zero if the
    student equals the teacher, or if B is 0. Raises ValueError if the shapes differ.
    """
    if student_state.shape != teacher_state.shape:
        shapes = f"{tuple(student_state.shape)} and {tuple(teacher_state.shape)}"
        raise ValueError(f"student and teacher states differ in shape: {shapes}")
    # What layers k+1..L would have added is lost to the student; the full model still knows it, so
    # its last state is the regression target. The teacher stays as it is: no gradient (detach).
    # In float32: half precision has too few digits for a small difference of large numbers.
    dtype = torch.promote_types(student_state.dtype, torch.float32)
    student, teacher = student_state.to(dtype), teacher_state.detach().to(dtype)
    if student.numel() == 0:
        return student.sum()  # the mean of nothing would be NaN
    # Squared error, not cosine: the length of a state carries what the teacher knows as well.
    return F.mse_loss(student, teacher)


def layer_embeddings(model, batch, visual=None):
    """The last position's state after every depth, final norm applied: (L + 1, B, D), float32.

    Depth 0 is the token embedding itself. `model` is a `puma.PUMA`, called with `batch` and, where
    they are known, its `visual` tokens, or a transformers model, called with `**batch`; the batch
    must be padded on the left, so that the last column is every row's last token.
    """
    decoder = find_decoder(model)
    states = []

    # Hooks: `output_hidden_states` would keep all positions. What enters layer 1 is depth 0.
    def before(_module, args, kwargs):
        states.append((args[0] if args else kwargs["hidden_states"])[:, -1])

    # What leaves layer k is depth k. Some architectures return a tuple that begins with the state.
    def after(_module, _args, output):
        states.append((output[0] if isinstance(output, tuple) else output)[:, -1])

    handles = [decoder.layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(after) for layer in decoder.layers]
    try:
        if hasattr(model, "collate"):
            model(batch, visual)
        else:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    # What a model cut at this depth would return: the state, then the norm that it keeps.
    return torch.stack([decoder.norm(state).float() for state in states])
