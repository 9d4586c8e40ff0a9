"""Layer-pruned self-distillation: cut a decoder's upper layers, let them teach the lower ones.

From PUMA (arXiv 2507.08064). Works on `puma.PUMA` and on any transformers language or
vision-language model whose decoder is a list `.layers` followed by `.norm` (Qwen2-VL, Qwen2.5-VL,
Qwen3-VL, Qwen2, Llama, ...); needs torch only, so it can be copied into your own code:

    teacher = AutoModel.from_pretrained("Qwen/Qwen2-VL-2B-Instruct")
    student = prune_layers(copy.deepcopy(teacher), keep=12)
    loss = 0.9 * contrastive + 0.1 * distill_loss(student_state, teacher_state)      # stage 1

    python prune_distill.py toy/tiny-qwen2-vl                   # what each layer knows; which k

Cutting after layer k and keeping the final norm gives exactly the full model's hidden state k,
normed: nothing is approximated, the model is just read out early. What is lost is what layers
k+1..L would have added, and the full model, frozen, still knows it: its last state is the
regression target.

Shapes: B items, D width, L layers of the full model.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


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

    keep: how many of the first layers, or a list of layer indices (0-based).
    keep_last: the last of the kept layers is the model's last one (1..k-1 and L), which a comment
    of the official code recommends for small k.
    The config follows (`num_hidden_layers`, `layer_types`), and so do the layers' own indices,
    which the key-value cache uses: the result saves and loads as an ordinary transformers model.
    With `keep=k`, the output equals the full model's hidden state k with the final norm applied.
    Raises ValueError if a layer does not exist or the architecture forbids dropping it.
    """
    decoder = find_decoder(model)
    depth = len(decoder.layers)
    if isinstance(keep, int):
        if not 1 <= keep <= depth:
            raise ValueError(f"keep must be in 1..{depth}, got {keep}")
        indices = [*range(keep - 1), depth - 1 if keep_last else keep - 1]
    else:
        indices = list(keep)
        rising = indices and sorted(set(indices)) == indices
        if not rising or not 0 <= indices[0] <= indices[-1] < depth:
            raise ValueError(f"keep must be rising layer indices in 0..{depth - 1}, got {indices}")
        if keep_last:
            indices[-1] = depth - 1
    _refuse_deepstack(model, indices)

    decoder.layers = nn.ModuleList(decoder.layers[index] for index in indices)
    for new_index, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = new_index
    configs = [module.config.get_text_config() for module in model.modules()
               if hasattr(module, "config") and decoder in module.modules()]
    for config in {id(config): config for config in configs}.values():
        config.num_hidden_layers = len(indices)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[index] for index in indices]
    return model


def _refuse_deepstack(model, indices):
    """Qwen3-VL adds visual features to its first layers' outputs; those must stay in place."""
    for module in model.modules():
        vision = getattr(getattr(module, "config", None), "vision_config", None)
        needed = len(getattr(vision, "deepstack_visual_indexes", None) or [])
        if indices[:needed] != list(range(needed)):
            enter = f"deepstack visual features enter the first {needed} layers"
            raise ValueError(f"{enter}: keep them all, got {indices}")


def distill_loss(student_state, teacher_state):
    """L_distill = E || h_t - h_s ||^2 on un-normalised `[RET]` states (B, D), after the final norm.

    The mean is over items and dimensions, in float32; no gradient reaches the teacher. Zero if the
    student equals the teacher. Raises ValueError if the shapes differ.
    """
    if student_state.shape != teacher_state.shape:
        shapes = f"{tuple(student_state.shape)} and {tuple(teacher_state.shape)}"
        raise ValueError(f"student and teacher states differ in shape: {shapes}")
    dtype = torch.promote_types(student_state.dtype, torch.float32)
    return F.mse_loss(student_state.to(dtype), teacher_state.detach().to(dtype))


def layer_embeddings(model, batch, visual=None):
    """The last position's state after every depth, final norm applied: (L + 1, B, D), float32.

    Depth 0 is the token embedding itself. One forward pass: hooks keep one position a layer.
    `model` is a `puma.PUMA`, called with `batch` and, where they are known, its `visual` tokens, or
    a transformers model, called with `**batch`; either way the batch must be padded on the left, so
    that the last column is every row's last token.
    """
    decoder = find_decoder(model)
    states = []

    def before(_module, args, kwargs):
        states.append((args[0] if args else kwargs["hidden_states"])[:, -1])

    def after(_module, _args, output):
        states.append((output[0] if isinstance(output, tuple) else output)[:, -1])

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(
            _removing(decoder.layers[0].register_forward_pre_hook(before, with_kwargs=True))
        )
        for layer in decoder.layers:
            hooks.enter_context(_removing(layer.register_forward_hook(after)))
        if hasattr(model, "collate"):
            model(batch, visual)
        else:
            model(**batch)
    return torch.stack([decoder.norm(state).float() for state in states])


@contextlib.contextmanager
def _removing(handle):
    try:
        yield
    finally:
        handle.remove()


def depth_costs(model, batch):
    """For each depth 0..L: (parameters, floating-point operations of one forward pass of `batch`).

    Operations are counted by torch on the real pass (a multiply-add is 2). `puma.PUMA` computes
    most of its last layer for the last position only, and a model cut at depth d does so in layer
    d: it costs layers 1..d-1 and what the last layer costs here. `model` and `batch` as in
    `layer_embeddings`.
    """
    decoder = find_decoder(model)
    rest = sum(p.numel() for p in model.parameters())
    rest -= sum(p.numel() for p in decoder.layers.parameters())
    name = next(name for name, module in model.named_modules() if module is decoder)
    # Plain attention, because torch does not count the fused one of a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        layer_embeddings(model, batch)
    counts = counter.get_flop_counts()
    prefix = ".".join(filter(None, (type(model).__name__, name, "layers")))
    layers = [sum(counts[f"{prefix}.{i}"].values()) for i in range(len(decoder.layers))]
    flops = sum(counts["Global"].values()) - sum(layers)  # vision tower, LM head
    costs = [(rest, flops)]
    for depth, layer in enumerate(decoder.layers):
        rest += sum(p.numel() for p in layer.parameters())
        costs.append((rest, flops + sum(layers[:depth]) + layers[-1]))
    return costs


def linear_cka(x, y):
    """Likeness of two (N, D) representations, 1 if one is the other rotated and scaled (Kornblith
    et al., 2019): ||Y'X||^2 / (||X'X|| ||Y'Y||) of the centred ones."""
    x, y = (part - part.mean(0) for part in (x, y))
    return ((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()).clamp(1e-30)).item()


def _states(model, items, batch_size, keep_last):
    """(L + 1, N, D): items read out at every depth; `keep_last`: layers 1..d-1 and the last."""
    options = {"show_progress": False, "forward": lambda batch: layer_embeddings(model, batch)}
    states, decoder = model.encode(items, batch_size, **options), find_decoder(model)
    layers = decoder.layers
    for depth in range(1, len(layers) if keep_last else 0):
        decoder.layers = nn.ModuleList([*layers[: depth - 1], layers[-1]])
        states[depth] = model.encode(items, batch_size, **options)[-1]
    decoder.layers = layers
    return states


@torch.inference_mode()
def layer_report(model, queries, candidates, positives, k=5, batch_size=64, keep_last=False):
    """What each layer knows: read an untrained PUMA model out at every depth (not in the paper).

    queries, candidates: items; positives: for each query the set of right candidate indices.
    Returns one dict a depth 0..L: `depth`, `hit_rate@k` of exact search, `cosine` (mean) and linear
    `cka` of all embeddings to those of the last layer, `parameters`, `flops` an item. One forward
    pass an item; `keep_last` (layers 1..d-1 and the last at depth d) takes one more a depth.
    """
    states = _states(model, [*queries, *candidates], batch_size, keep_last)  # (L + 1, Q + N, D)
    sample = queries[:batch_size]
    batch = {key: v.to(model.device) for key, v in model.collate(sample).items()}
    costs = depth_costs(model, batch)
    right = torch.zeros(len(queries), len(candidates), dtype=torch.bool)
    for row, columns in enumerate(positives):
        right[row, list(columns)] = True
    report = []
    for depth, state in enumerate(states):
        query, candidate = state.split([len(queries), len(candidates)])
        top = (query @ candidate.T).topk(min(k, len(candidates))).indices
        report.append({
            "depth": depth,
            f"hit_rate@{k}": right.gather(1, top).any(1).float().mean().item(),
            "cosine": (state * states[-1]).sum(-1).mean().item(),
            "cka": linear_cka(state, states[-1]),
            "parameters": costs[depth][0],
            "flops": costs[depth][1] / len(sample),
        })
    return report


if __name__ == "__main__":  # python prune_distill.py MODEL --data DIR: which depth to keep
    from layer_choice import main

    main()
