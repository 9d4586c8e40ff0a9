"""MAC-Loss: contrastive learning whose temperature depends on the negative's modality.

PUMA's Modality-Adaptive Contrastive Learning loss (arXiv 2507.08064). This file needs torch and
nothing else: copy it into your own training code.

    L_i    = -log  exp(s_ip / tau_ip) / sum_j exp(s_ij / tau_ij)      s_ij = cos(query_i, target_j)
    tau_ij = tau_hard(t)  if modality(j) == modality(p)  else  tau    p = the positive of query i
    tau_hard(t) = tau * exp(-lambda * min(1, 2t))                     t = training progress, 0..1

Negatives of the positive's modality (*intra-modality*) are presumed hard, others (*inter-*) easy.
`python mac_loss.py` prints how loss and gradient move as tau_hard falls. B queries, N targets.
"""

import math

import torch
import torch.nn.functional as F


def hard_temperature(temperature, progress, decay=0.5, round_digits=None):
    """tau_hard(t) of the equation above, a float; `decay` is lambda (paper: 0.5).

    progress: t in [0, 1], steps done / all steps (official code: epochs). round_digits=3 reproduces
    the official code's rounding. Raises ValueError if an argument is out of range.
    """
    if not (0 < temperature < math.inf and 0 <= decay < math.inf):
        raise ValueError(f"need temperature > 0 and decay >= 0, got {temperature} and {decay}")
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    # From tau (plain InfoNCE) down to tau * exp(-lambda) at half of training, then it stays there.
    tau_hard = temperature * math.exp(-decay * min(1.0, 2 * progress))
    # Three digits are few: between 0.03 and 0.0182, the paper's ends, they leave 13 values.
    return tau_hard if round_digits is None else round(tau_hard, round_digits)


def mac_loss(query, target, modality, temperature, tau_hard, *, positive=None,
             duplicate=None, positive_temperature="hard", intra_offset=0.0, reduction="mean"):
    """Contrastive loss with one temperature per kind of negative; see the module's docstring.

    query (B, D), target (N, D): embeddings of any scale and precision. Differentiable in both.
    modality (N,) integers: the modality of each target; only equality counts.
    temperature, tau_hard: > 0; if they are equal, this is InfoNCE.
    positive (B,) integers: the column of each query's target; default 0..B-1. Others are negatives.
    duplicate (B, N) bool: columns to leave out, right for that query as well (official code: none);
    a query's own positive always counts.
    positive_temperature: "hard" or "base", what the positive gets: tau_hard (official code) or tau.
    intra_offset: m, added to intra-modality negatives' logits: e^m times the weight (not in paper).
    reduction: "mean", "sum" or "none" (one loss a query, (B,)), in nats.
    Raises ValueError that names the offending shape or value."""
    if positive is None:
        positive = torch.arange(len(query), device=target.device)
    _check(query, target, modality, temperature, tau_hard, positive, duplicate)
    _check_choice("positive_temperature", positive_temperature, ("hard", "base"))
    _check_choice("reduction", reduction, ("mean", "sum", "none"))
    positive = positive.long()  # other integers cannot index, or index as a mask

    # In float32 at least, under autocast too: bfloat16 has 3 digits, and logits reach 1 / tau.
    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.promote_types(query.dtype, torch.float32)
        query = F.normalize(query.to(dtype), dim=1)
        target = F.normalize(target.to(dtype), dim=1)

        # own_ip: column p is the positive of row i. It is no negative, whatever else holds.
        own = positive[:, None] == torch.arange(len(target), device=target.device)  # (B, N)
        # intra_ij: target j has the modality that query i looks for (so own lies within intra).
        # Such a negative cannot be rejected by looking at the modality; the others can.
        intra = modality[positive][:, None] == modality
        # tau_ij, the heart of the loss. Its derivative by a negative's s_ij is p_ij / tau_ij, with
        # the softmax p_i of row i. So a lower temperature pushes hard negatives harder, twice over:
        # 1 / tau_ij grows, and p_i concentrates on the most similar ones. (new_tensor: plain
        # numbers would be rounded to float32.)
        tau = torch.where(intra, query.new_tensor(tau_hard), query.new_tensor(temperature))
        # The positive has its own modality, hence tau_hard; another reading of the formula is tau.
        if positive_temperature == "base":
            tau = tau.masked_fill(own, temperature)
        logits = query @ target.T / tau  # s_ij / tau_ij
        if intra_offset:
            logits = torch.where(intra & ~own, logits + intra_offset, logits)
        if duplicate is not None:
            logits = logits.masked_fill(duplicate & ~own, -math.inf)
        if reduction == "mean" and not len(query):  # the mean of nothing would be NaN
            reduction = "sum"
        return F.cross_entropy(logits, positive, reduction=reduction)  # -log softmax at column p


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check(query, target, modality, temperature, tau_hard, positive, duplicate):
    """Raise ValueError on bad input: a wrong shape would broadcast and train on nonsense."""
    if query.ndim != 2 or target.ndim != 2 or query.shape[1] != target.shape[1]:
        shapes = f"{tuple(query.shape)} and {tuple(target.shape)}"
        raise ValueError(f"query (B, D) and target (N, D) do not fit: {shapes}")
    if not (0 < temperature < math.inf and 0 < tau_hard < math.inf):
        raise ValueError(f"temperatures must be finite and > 0, got {temperature} and {tau_hard}")
    rows, columns = len(query), len(target)
    for name, labels, size in (("modality", modality, columns), ("positive", positive, rows)):
        if labels.shape != (size,) or labels.is_floating_point():
            got = f"{tuple(labels.shape)} {labels.dtype}"
            raise ValueError(f"{name} must be {size} integers, got {got}")
    if rows and not (0 <= int(positive.min()) and int(positive.max()) < columns):
        got = f"{int(positive.min())}..{int(positive.max())}"
        raise ValueError(f"positive must be in 0..{columns - 1}, the targets' columns, got {got}")
    if duplicate is not None and (tuple(duplicate.shape), duplicate.dtype) != (
            (rows, columns), torch.bool):
        got = f"{tuple(duplicate.shape)} {duplicate.dtype}"
        raise ValueError(f"duplicate must be ({rows}, {columns}) bool, got {got}")


def main():
    torch.manual_seed(0)
    query = torch.randn(2, 8)
    target = torch.cat([query + torch.randn(2, 8), torch.randn(2, 8)]).requires_grad_()
    modality = torch.tensor([0, 0, 0, 1])  # text, text, text, image
    for progress in (0.0, 0.25, 0.5, 1.0):
        tau_hard = hard_temperature(0.3, progress)
        loss = mac_loss(query, target, modality, 0.3, tau_hard)
        (gradient,) = torch.autograd.grad(loss, target)
        push = gradient[2:].norm(dim=1)  # on the two targets that are nobody's positive
        print(f"progress {progress:.2f}  tau_hard {tau_hard:.3f}  loss {loss:.3f}  "
              f"gradient on the intra-modality negative {push[0] / push.sum():.0%}")


if __name__ == "__main__":
    main()
