"""The notebook's figures: what a cell has computed, drawn. Nothing of the method is defined here.

    from docs import figures
    plt.rcParams.update(figures.STYLE)

Two of them move: `push_movie` and `circle_movie` return HTML with a slider that needs no widget
package and no network; for paper, and for viewers that run no scripts, each has a strip of stills.
"""

import base64
import io
import json
import math
import random
import re
import textwrap
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from IPython.display import HTML
from matplotlib import animation
from matplotlib import pyplot as plt
from PIL import Image

from mac_loss import hard_temperature, mac_loss
from support.items import load_video

STYLE = {"font.size": 14, "figure.figsize": (12, 4.4), "figure.dpi": 80, "axes.spines.top": False,
         "axes.spines.right": False, "figure.autolayout": True}
GREEN, ORANGE, BLUE = "#009E73", "#D55E00", "#0072B2"  # positive, intra-, inter-modality negative
SIX = torch.tensor([0.8, 0.7, 0.5, 0.6, 0.3, 0.0], dtype=torch.float64)  # cosines, positive first
COLOURS = [GREEN, ORANGE, ORANGE, BLUE, BLUE, BLUE]  # of the six


def slider(figure, draw, count):
    """HTML that shows `draw(0)` .. `draw(count - 1)` with a slider and buttons."""
    html = animation.FuncAnimation(figure, draw, frames=count).to_jshtml(4, default_mode="once")
    plt.close(figure)
    # Its icons would be fetched from a network; these are characters.
    icons = {"minus": "−", "plus": "+", "fast-backward": "⏮", "step-backward": "◂", "play": "▶",
             "play fa-flip-horizontal": "◀", "pause": "❚❚", "step-forward": "▸",
             "fast-forward": "⏭"}
    html = re.sub(r"<link[^>]*>", "", html)
    html = re.sub(r'<i class="fa fa-([a-z -]+)"></i>', lambda found: icons[found[1]], html)
    html = re.sub(r"(?<=base64,)[^\"]+", _small, html)
    assert "://" not in html and len(html) < 500_000
    return HTML(html)


def _small(found):
    """A frame of 32 colours: a quarter of the bytes."""
    image = Image.open(io.BytesIO(base64.b64decode(found[0].replace("\\", ""))))
    image.convert("RGB").quantize(32, dither=Image.Dither.NONE).save(
        small := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


# ---- items, layers -------------------------------------------------------------------------------


def tasks(cells):
    """Framed items; cells: (name, query's modality, query, target's modality, target) of each."""
    _, axes = plt.subplots(5, 4, figsize=(12, 12.5))
    sides = [side for name, asks, query, wants, target in cells for side in (
        (query, f"{name.partition('_')[2]}: {asks}", BLUE), (target, wants, GREEN))]
    for axis, (item, title, colour) in zip(axes.flat, sides):
        axis.set(xticks=[], yticks=[])
        axis.set_title(title.replace(",", " + "), fontsize=14, color=colour)
        axis.spines[:].set(visible=True, color=colour, linewidth=2)
        text = textwrap.fill(item["text"] or "", 24)
        picture = plt.imread(item["image"]) if item["image"] else None
        if item.get("video"):
            picture = np.hstack([np.pad(np.asarray(frame.convert("L")), 1, constant_values=160)
                                 for frame in load_video(item["video"])])
        if picture is not None:
            inset = axis.inset_axes([0.25, 0.5, 0.5, 0.48] if text else [0.02, 0.05, 0.96, 0.9])
            inset.imshow(picture, cmap="gray")
            inset.axis("off")
        axis.text(0.5, 0.5 if picture is None else 0.25, text, ha="center", va="center",
                  fontsize=12)


def words(titles, panels):
    """Probable next words; panels: ([word], [probability]) for each item."""
    _, axes = plt.subplots(1, 2)
    for axis, title, (labels, shares) in zip(axes, titles, panels):
        axis.barh(labels, shares, color="0.5")
        axis.invert_yaxis()
        axis.set(xlabel="probability of the next word at [RET]", xlim=(0, 0.5))
        axis.set_title(title, fontsize=14)


def word_strip(words_of, shares):
    """Probable next words after each layer, a small panel a depth; both (L + 1, words)."""
    _, axes = plt.subplots(1, len(words_of), figsize=(2 * len(words_of), 2.6))
    for depth, (axis, labels, row) in enumerate(zip(axes, words_of, shares)):
        axis.barh(range(len(row)), row, color="0.75")
        for place, label in enumerate(labels):
            axis.text(0.01, place, label, va="center", fontsize=13)
        axis.set(xlim=(0, 0.4), yticks=[], xlabel="probability")
        axis.set_title(f"layer {depth}" if depth else "no layer", fontsize=13)
        axis.invert_yaxis()


def trained_depths(path):
    """{steps: {layers: % local}} of the runs on depth in toy/evidence.py's JSON file; {} if absent.
    """
    groups = defaultdict(lambda: defaultdict(list))
    for run in json.loads(Path(path).read_text())["runs"] if Path(path).exists() else []:
        about = dict(part.split("=", 1) for part in run["id"].split() if "=" in part)
        layers, steps = (int(about.pop(key, usual)) for key, usual in (
            ("keep_layers", 4), ("stage2_steps", 240)))  # what an id leaves out
        groups[frozenset(about.items())][steps, layers].append(100 * run["local"])
    found = defaultdict(dict)
    runs = max(groups.values(), key=lambda runs: len({k for _, k in runs}), default={})
    for (steps, layers), values in sorted(runs.items()):
        found[steps][layers] = sum(values) / len(values)
    return {steps: curve for steps, curve in found.items() if len(curve) > 2}


def by_depth(rates, cosine, cka, trained):
    """Hit rates {pool: [% by depth]}; likeness to the last state; `trained`: the file of
    `trained_depths`, which are drawn and returned."""
    curves = trained_depths(trained)
    _, axes = plt.subplots(1, 2 + bool(curves), figsize=(12 if not curves else 16, 4.4))
    for which, style in (("local", "o-k"), ("global", "s--k")):
        axes[0].plot(rates[which], style, label=f"{which} pools")
    axes[0].set(ylabel="hit rate @5, %, untrained", ylim=(0, 100))
    axes[0].legend(loc="upper left")
    for values, style, label in ((cosine, "o-k", "cosine"), (cka, "s--k", "CKA")):
        axes[1].plot(values, style, label=label)
    axes[1].set(ylabel="likeness to the last state", ylim=(-0.1, 1.05))
    axes[1].legend(loc="lower right")
    for number, (steps, curve) in enumerate(curves.items()):
        grey = str(0.7 - 0.7 * number / max(1, len(curves) - 1))
        axes[2].plot(list(curve), list(curve.values()), "o-", color=grey, label=f"{steps} steps")
    if curves:
        axes[2].set(ylabel="local hit rate @5, %, trained", ylim=(0, 100))
        axes[2].legend(loc="lower right")
    for axis in axes:
        axis.set(xlabel="layers used", xticks=range(len(cosine)))
    return curves


def taught(own, teacher, away, curves, items=24):
    """A student before and after against its teacher; {name: [distance by step]}.

    own: {name: states (N, D)}, of which the first two are drawn; away: their distances.
    """
    _, axes = plt.subplots(1, 3, figsize=(15, 4.8))
    for axis, (name, states) in zip(axes[:2], own.items()):
        axis.scatter(teacher[:items], states[:items], color="black", s=4, alpha=0.3)
        axis.axline((0, 0), slope=1, color="0.5", linestyle=":", linewidth=2)
        axis.set(xlabel="teacher's coordinates", ylabel="student's coordinates",
                 xlim=(-8, 8), ylim=(-8, 8))
        axis.set_title(f"{name}: distance {away[name]:.2f}", fontsize=14)
    for (name, values), style in zip(curves.items(), ("k-", "k--")):
        axes[2].plot(range(1, len(values) + 1), values, style, label=name)
    axes[2].set(xlabel="step", ylabel="distance, training batch", ylim=(0, None))
    axes[2].legend(loc="lower left")


# ---- the loss on a few vectors -------------------------------------------------------------------


def vectors(names, query, targets):
    """A query and three targets, unit vectors in the plane (2,) and (3, 2), and their cosines."""
    _, (left, right) = plt.subplots(1, 2)
    for name, vector, colour in zip(["query", *names], [query, *targets],
                                    ["k", GREEN, ORANGE, BLUE]):
        left.annotate("", vector.tolist(), (0, 0), arrowprops={"color": colour, "width": 2})
        left.text(*(1.04 * vector).tolist(), name, color=colour)
    left.set(xlim=(0, 1.9), ylim=(-0.1, 1.1), xticks=[0, 0.5, 1], aspect=1, xlabel="x", ylabel="y")
    right.barh(["positive", "intra", "inter"], targets @ query, color=[GREEN, ORANGE, BLUE])
    right.set(xlabel="cosine with the query", xlim=(0, 1))
    right.invert_yaxis()


def pushes(tau, tau_hard):
    """Softmax weights (6,) and pushes (5,) of the six targets, of which the first is right."""
    wanted = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)  # positive and intra-modality
    tau_of = torch.where(wanted, SIX.new_tensor(tau_hard), SIX.new_tensor(tau))  # tau_ij
    share = (SIX / tau_of).softmax(0)
    return share, (share / tau_of)[1:]


def taking_part(push):
    """How many negatives share the push: e to the entropy of their shares."""
    return torch.special.entr(push / push.sum()).sum().exp().item()


def _bars(axis, values, first, label, top):
    names = [f"{value:.1f}" for value in SIX[first:].tolist()]
    axis.bar(range(len(names)), values, color=COLOURS[first:], tick_label=names)
    axis.set(xlabel=f"cosine of the {'negative' if first else 'target'}", ylabel=label,
             ylim=(0, top))


def draw_push(tau, tau_hard):
    """Draw weights and pushes of the six; -> the pushes (5,)."""
    share, push = pushes(tau, tau_hard)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.6))
    _bars(left, share, 0, "softmax weight", 1)
    _bars(right, push, 1, "push", max(3, 1.1 * push.max().item()))
    figure.suptitle(f"tau = {tau:.2f}, hard temperature = {tau_hard:.2f}")
    return push


def push_movie(taus):
    """Weights and pushes of the six at each temperature, one for all, under a slider."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), dpi=60)

    def draw(number):
        share, push = pushes(taus[number], taus[number])
        left.clear(), right.clear()
        _bars(left, share, 0, "softmax weight", 1)
        _bars(right, push, 1, "push", 3)
        left.set_title(f"temperature {taus[number]:.3f}")
        right.set_title(f"{taking_part(push):.1f} negatives take part")

    return slider(figure, draw, len(taus))


def push_strip(taus):
    """The same at a few temperatures, on paper: the pushes."""
    _, axes = plt.subplots(1, len(taus), figsize=(12, 3.4), sharey=True)
    for axis, tau in zip(axes, taus):
        push = pushes(tau, tau)[1]
        _bars(axis, push, 1, "push" if axis is axes[0] else "", 3)
        axis.set_title(f"temperature {tau}\n{taking_part(push):.1f} take part", fontsize=14)
        axis.tick_params(labelsize=12)
        axis.set_xlabel("cosine", fontsize=12)


def schedule(decays, crossing, tau=0.05):
    """tau_hard over progress; the push on a text at cosine 1 by the cosine of the positive."""
    _, (left, right) = plt.subplots(1, 2)
    progress = torch.linspace(0, 1, 101).tolist()
    for decay, style in zip(decays, ("k:", "k-", "k--")):
        left.plot(progress, [hard_temperature(tau, t, decay) for t in progress], style,
                  label=f"$\\lambda$ = {decay}")
    left.set(xlabel="progress t", ylabel="hard temperature", ylim=(0, 1.08 * tau))
    left.legend(loc="lower left")
    positive = torch.linspace(0.3, 1, 141)
    for tau_hard, style, label in ((tau, "--", "InfoNCE"), (tau * crossing, "-", "MAC-Loss")):
        push = torch.sigmoid(1 / tau - positive / tau_hard) / tau  # softmax of two
        right.plot(positive, push, style, color=BLUE, linewidth=2, label=label)
    right.axvline(crossing, color="0.6", linestyle=":")
    right.set(xlabel="cosine of the positive", ylabel="push on a text at cosine 1")
    right.legend(loc=(0.02, 0.25), fontsize=12, handlelength=1.5)


# ---- a batch -------------------------------------------------------------------------------------


def matrix(cosines, order, groups):
    """Cosines (B, B) by kind, rows and columns in `order`; groups: {kind: its mask (B, B)}."""
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    looks = {"inter": ("Blues", BLUE), "intra": ("Oranges", ORANGE), "positive": ("Greens", GREEN)}
    for name, (colour_map, colour) in looks.items():
        shown = torch.where(groups[name], cosines, torch.nan)[order][:, order]
        left.imshow(shown, cmap=colour_map, vmin=-0.3, vmax=1)
        right.hist(cosines[groups[name]].numpy(), torch.linspace(-0.5, 1, 31).tolist(),
                   density=True, histtype="step", linewidth=2.5, color=colour, label=name)
    left.set(xlabel="target: text, image, both, video", ylabel="query")
    right.set(xlabel="cosine", ylabel="density")
    right.legend(loc="upper left")


def group_pushes(panels):
    """Mean push on a negative of each kind; panels: {title: ((intra, inter), inter's share)}."""
    _, axes = plt.subplots(1, 2, sharey=True)
    for axis, (title, (mean, share)) in zip(axes, panels.items()):
        bars = axis.bar(["intra-modality", "inter-modality"], mean, color=[ORANGE, BLUE])
        axis.bar_label(bars, [f"{value:.3f}" for value in mean], fontsize=16)
        axis.set_title(f"{title}\nof all push, inter-modality: {share:.1%}", fontsize=14)
        axis.margins(y=0.12)
    axes[0].set_ylabel("push on a negative, mean")


# ---- twelve points on a circle -------------------------------------------------------------------

PICTURE = torch.tensor([1, 0] * 6)  # the modality of the twelve: picture, name, picture, ...


def circle_start(seed):
    """Twelve angles (12,) close together, as the states of an untrained model are."""
    draw = random.Random(seed)
    return torch.tensor([math.radians(draw.gauss(90, 25)) for _ in range(12)], dtype=torch.float64)


def train_circle(angles, temperature, tau_hard, steps=400, lr=0.2):
    """Gradient descent on the loss of twelve points, by their angles; -> (steps + 1, 12) angles.

    Each point is a query and, at once, that query's right target: as after a training in which the
    positives have been pulled all the way, so that only pushes move the points.
    """
    angles, history = angles.clone().requires_grad_(), [angles]
    for _ in range(steps):
        points = torch.stack([angles.cos(), angles.sin()], dim=1)  # (12, 2)
        loss = mac_loss(points, points, PICTURE, temperature, tau_hard)
        (gradient,) = torch.autograd.grad(loss, angles)
        angles = (angles.detach() - lr * gradient).requires_grad_()
        history.append(angles.detach())
    return torch.stack(history)


def gap(angles):
    """The modality gap: how far apart the means of the pictures and of the names are, 0 to 2."""
    points = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return (points[PICTURE == 1].mean(0) - points[PICTURE == 0].mean(0)).norm().item()


def neighbour_angles(angles):
    """Degrees from each point to the next one on the circle (12,)."""
    rising = torch.rad2deg(angles).remainder(360).sort()[0]
    return (rising.roll(-1) - rising).remainder(360)


def _circle(axis, angles, title):
    axis.add_patch(plt.Circle((0, 0), 1, fill=False, color="0.8"))
    for picture, marker, name, face in ((1, "s", "picture", "k"), (0, "o", "name", "w")):
        chosen = angles[PICTURE == picture]
        axis.plot(chosen.cos(), chosen.sin(), marker, color="k", markerfacecolor=face,
                  markersize=11, markeredgewidth=2, alpha=0.75, label=name)
    axis.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect=1, xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_title(f"{title}\ngap {gap(angles):.2f}", fontsize=14)


def circle_movie(histories, count=24):
    """{loss: (steps + 1, 12) angles}, side by side, under a slider that is finer at the start."""
    figure, axes = plt.subplots(1, len(histories), figsize=(11, 4.4), dpi=60)
    last = len(next(iter(histories.values()))) - 1

    def draw(number):
        step = round(last * (number / (count - 1)) ** 2)
        for axis, (name, history) in zip(axes, histories.items()):
            axis.clear()
            _circle(axis, history[step], name)
        axes[0].set_xlabel(f"step {step}")

    return slider(figure, draw, count)


def circle_strip(histories):
    """Start and ends on paper."""
    _, axes = plt.subplots(1, len(histories) + 1, figsize=(12, 3.9))
    _circle(axes[0], next(iter(histories.values()))[0], "start of all")
    for axis, (name, history) in zip(axes[1:], histories.items()):
        _circle(axis, history[-1], name)
    axes[0].legend(loc="center", fontsize=12)


# ---- results -------------------------------------------------------------------------------------


FILLS = {"InfoNCE": "k", "MAC-Loss": "w"}  # of the markers of trained models
MARKERS = {"two tasks": "o", "all tasks": "s"}


def four_points(average):
    """Local against global hit rate of the runs (loss, mix), arrows from InfoNCE to MAC-Loss."""
    _, axis = plt.subplots(figsize=(9, 5.6))
    for mix, marker in MARKERS.items():
        ends = []
        for loss, fill in FILLS.items():
            ends.append((average[loss, mix]["local"], average[loss, mix]["global"]))
            axis.plot(*ends[-1], marker, color="k", markerfacecolor=fill, markersize=13,
                      markeredgewidth=2, linestyle="", label=f"{loss}, {mix}")
        axis.annotate("", ends[1], ends[0], arrowprops={
            "arrowstyle": "->", "color": "0.5", "linewidth": 2, "shrinkA": 10, "shrinkB": 10})
    axis.margins(0.15)
    axis.set(xlabel="local pools: hit rate @5, %", ylabel="global pool: hit rate @5, %")
    axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


def prices(costs, local, average, keep):
    """Parameters by depth; local hit rate by operations, with the trained models' points."""
    _, (left, right) = plt.subplots(1, 2)
    work = {k: cost["gflops_per_item"] for k, cost in costs.items()}
    left.plot(list(costs), [cost["parameters"] / 1e6 for cost in costs.values()], "o-k")
    left.set(xlabel="layers kept", ylabel="million parameters", ylim=(0, 2.8))
    right.plot(list(work.values()), [local[k] for k in work], "o-", color="0.5",
               label="untrained, 1 to 8 layers")
    for loss, fill in FILLS.items():
        right.plot(work[keep], average[loss, "all tasks"]["local"], "s", color="k",
                   markerfacecolor=fill, markersize=11, markeredgewidth=2, linestyle="",
                   label=f"{keep} layers, {loss}")
    right.set(xlabel="GFLOP an item", ylabel="local hit rate @5, %", ylim=(0, 100))
    right.legend(fontsize=12, loc="lower right")
