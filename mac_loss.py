"""MAC-Loss: contrastive learning whose temperature depends on the negative's modality.

PUMA's Modality-Adaptive Contrastive Learning loss (arXiv 2507.08064). This file needs torch and
nothing else: copy it into your own training code.

    L_i    = -log  exp(s_ip / tau_ip) / sum_j exp(s_ij / tau_ij)      s_ij = cos(query_i, target_j)
    tau_ij = tau_hard(t)  if modality(j) == modality(p)  else  tau    p = the positive of query i
    tau_hard(t) = tau * exp(-lambda * min(1, 2t))                     t = training progress, 0..1

A negative of the positive's own modality (*intra-modality*) cannot be rejected by looking at the
modality, so it is hard; any other one (*inter-modality*) is easy. The derivative of the loss by a
similarity is p_ij / tau_ij, so a lower temperature pulls harder on hard negatives, twice over: the
factor 1 / tau_ij grows, and the softmax p_i concentrates on the most similar ones.

    python mac_loss.py

prints the loss of two queries and four targets as tau_hard falls, and which share of the gradient
falls on the intra-modality negatives. Shapes: B queries, N targets (N >= B), D width.
"""

import math

import torch
import torch.nn.functional as F


def hard_temperature(temperature, progress, decay=0.5, round_digits=None):
    """tau_hard(t) of the equation above, at training progress t; lambda is `decay` (paper: 0.5).

    Starts at `temperature` (plain InfoNCE), falls over the first half of training to
    `temperature * exp(-decay)` and stays there. `progress` in [0, 1] is steps done / all steps
    (official code: epochs, and rounded to three digits, 13 distinct values: `round_digits=3`
    reproduces that). Raises ValueError if an argument is out of range.
    """
    if temperature <= 0 or decay < 0:
        raise ValueError(f"need temperature > 0 and decay >= 0, got {temperature} and {decay}")
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    tau_hard = temperature * math.exp(-decay * min(1.0, 2 * progress))
    return tau_hard if round_digits is None else round(tau_hard, round_digits)


def mac_loss(query, target, modality, temperature, hard_temperature, *, positive=None,
             duplicate=None, positive_temperature="hard", intra_offset=0.0, reduction="mean"):
    """Contrastive loss with one temperature per kind of negative; see the module's docstring.

    query (B, D), target (N, D): embeddings of any scale, normalised here. Half precision is
    computed in float32, under autocast too; float64 stays. Differentiable in both.
    modality (N,) integers: the modality of each target; only equality counts.
    temperature, hard_temperature: tau and tau_hard, floats > 0. If equal, this is InfoNCE.
    positive (B,) integers: the column of each query's target; default 0..B-1. More columns than
    queries are extra negatives, or the targets of other ranks.
    duplicate (B, N) bool: columns to leave out, because they are right for that query as well; a
    query's own positive always counts. (Official code: none are left out.)
    positive_temperature: "hard" as in the official code, where the positive, having its own
    modality, gets tau_hard; "base" for the other reading of the formula, which gives it tau.
    intra_offset: m, added to intra-modality negatives' logits: e^m times the weight (not in paper).
    reduction: "mean", "sum" or "none" (one loss a query, (B,)).
    Returns the loss in nats. Raises ValueError that names the offending shape or value.
    """
    positive = _check(query, target, modality, temperature, hard_temperature, positive, duplicate)
    _check_choice("positive_temperature", positive_temperature, ("hard", "base"))
    _check_choice("reduction", reduction, ("mean", "sum", "none"))

    # No autocast: bfloat16 has 3 digits, and logits reach 1 / tau.
    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        query = F.normalize(query.to(dtype), dim=-1)
        target = F.normalize(target.to(dtype), dim=-1)
        losses = query.new_zeros(len(query))
        wanted = modality[positive]  # (B,) the modality that each query looks for
        # Queries that look for the same modality share one temperature per column. Group by group,
        # the targets can be divided instead of a (B, N) matrix: less memory, the same numbers.
        for kind in wanted.unique():
            intra = modality == kind
            tau = torch.full_like(target[:, :1], temperature)  # tau_ij of these rows, (N, 1)
            scaled = target / tau.masked_fill(intra[:, None], hard_temperature)
            # In blocks, so that of the (B, N) matrices only the softmax is ever there as a whole.
            for rows in (wanted == kind).nonzero().squeeze(1).split(512):
                logits = query[rows] @ scaled.T  # s_ij / tau_ij, (rows, N)
                own = positive[rows][:, None]  # (rows, 1) the positive's column
                if positive_temperature == "base":
                    ratio = torch.ones_like(logits).scatter(1, own, hard_temperature / temperature)
                    logits = logits * ratio
                if intra_offset:
                    offset = (intra.to(dtype) * intra_offset).expand_as(logits)
                    logits = logits + offset.scatter(1, own, 0.0)
                if duplicate is not None:
                    logits = logits.masked_fill(duplicate[rows].scatter(1, own, False), -math.inf)
                loss = F.cross_entropy(logits, own.squeeze(1), reduction="none")
                losses = losses.index_put((rows,), loss)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def _check(query, target, modality, temperature, hard_temperature, positive, duplicate):
    """Raise ValueError on bad input; return `positive` with its default filled in."""
    if query.ndim != 2 or target.ndim != 2 or query.shape[1] != target.shape[1]:
        shapes = f"{tuple(query.shape)} and {tuple(target.shape)}"
        raise ValueError(f"query (B, D) and target (N, D) do not fit: {shapes}")
    rows, columns = len(query), len(target)
    if modality.shape != (columns,) or modality.is_floating_point():
        got = f"{tuple(modality.shape)} {modality.dtype}"
        raise ValueError(f"modality must be {columns} integers, one a target, got {got}")
    if not (temperature > 0 and hard_temperature > 0):
        raise ValueError(f"temperatures must be > 0, got {temperature} and {hard_temperature}")
    if positive is None:
        if columns < rows:
            raise ValueError(f"{rows} queries but only {columns} targets: pass `positive`")
        positive = torch.arange(rows, device=target.device)
    if positive.shape != (rows,) or positive.is_floating_point():
        got = f"{tuple(positive.shape)} {positive.dtype}"
        raise ValueError(f"positive must be {rows} integers, one a query, got {got}")
    if rows and not (0 <= int(positive.min()) and int(positive.max()) < columns):
        got = f"{int(positive.min())}..{int(positive.max())}"
        raise ValueError(f"positive must be in 0..{columns - 1}, got {got}")
    fitting = (rows, columns), torch.bool
    if duplicate is not None and (duplicate.shape, duplicate.dtype) != fitting:
        got = f"{tuple(duplicate.shape)} {duplicate.dtype}"
        raise ValueError(f"duplicate must be ({rows}, {columns}) bool, got {got}")
    return positive


def main():
    torch.manual_seed(0)
    query = torch.randn(2, 8)
    target = torch.cat([query + torch.randn(2, 8), torch.randn(2, 8)]).requires_grad_()
    modality = torch.tensor([0, 0, 0, 1])  # text, text, text, image
    for progress in (0.0, 0.25, 0.5, 1.0):
        tau_hard = hard_temperature(0.3, progress)
        loss = mac_loss(query, target, modality, 0.3, tau_hard)
        (gradient,) = torch.autograd.grad(loss, target)
        mass = gradient[2:].norm(dim=1)  # the two targets that are nobody's positive
        print(f"progress {progress:.2f}  tau_hard {tau_hard:.3f}  loss {loss:.3f}  "
              f"gradient on the intra-modality negative {mass[0] / mass.sum():.0%}")


if __name__ == "__main__":
    main()
