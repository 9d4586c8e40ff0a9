"""The plots: training curves, queries with results, depths. A `$` in a caption is a `$`."""

import textwrap

import matplotlib
import numpy as np
from PIL import Image, ImageOps

from support.files import printable
from support.items import load_image, load_video

matplotlib.use("Agg")  # draws into files; no window, so it works on a server

from matplotlib import pyplot as plt  # noqa: E402


def _save(figure, path, dpi=90):
    figure.tight_layout()
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def draw_curves(path, rows):
    """Losses and hard temperature over the steps of both stages; rows as in metrics.jsonl."""
    labels = {"contrastive": "contrastive loss (nats)", "hard_temperature": "hard temperature",
              "distill": "distillation (squared distance)"}
    panels = {key: points for key in labels if (points := [
        (step, row[key]) for step, row in enumerate(rows, 1) if row[key] is not None])}
    first = sum(row["stage"] == 1 for row in rows)
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6))
    for axis, (key, points) in zip(axes, panels.items()):
        axis.plot(*zip(*points), color="black", linewidth=1)
        axis.set(xlabel="step", ylabel=labels[key], ylim=(0, None))
        if key == "distill":
            axis.set_title("stage 1", fontsize="medium")
        elif 0 < first < len(rows):  # the stages' names stand above the axis, clear of the lines
            axis.axvline(first + 0.5, color="0.6", linestyle=":")
            axis.text(first, 1.02, "stage 1 | ", ha="right", transform=axis.get_xaxis_transform())
            axis.text(first, 1.02, "stage 2", ha="left", transform=axis.get_xaxis_transform())
    _save(figure, path)


def draw_gallery(path, rows, columns=5):
    """Search results: rows of (heading, query item, [(title, candidate item, is right or None)]).

    Each row shows the query in blue and the best candidates; a right one has a thick green frame.
    "query" instead of `is right`: another query.
    """
    frames = {True: ("tab:green", 4), "query": ("tab:blue", 1.5)}
    size = (2 * columns + 2.4, 1.9 * len(rows) + 0.2)
    figure, axes = plt.subplots(len(rows), columns + 1, figsize=size, squeeze=False)
    for line, (heading, query, found) in zip(axes, rows):
        _draw_item(line[0], query, heading, *frames["query"])
        for axis, (title, item, right) in zip(line[1:], found):
            _draw_item(axis, item, title, *frames.get(right, ("0.8", 1)))
        for axis in line[1 + len(found) :]:
            axis.axis("off")
    _save(figure, path, dpi=80)


def _film_strip(video):
    """The frames that `load_video` gives of a video as one picture, in two rows if over two."""
    frames = [np.asarray(ImageOps.expand(ImageOps.contain(frame, (112, 112)), 1, "grey"))
              for frame in load_video(video)]
    columns = max(2, len(frames) // 2)  # their number is even
    rows = [np.hstack(frames[i : i + columns]) for i in range(0, len(frames), columns)]
    return Image.fromarray(np.vstack(rows))


def _draw_item(axis, item, title, colour, width):
    """One framed item: its image or video above its text, as much of it as fits."""
    axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
    axis.set_title(printable(title), fontsize=9, parse_math=False)
    for spine in axis.spines.values():
        spine.set(edgecolor=colour, linewidth=width)
    image, text = None, item.get("text") or ""
    try:
        image = (load_image(item["image"]) if item.get("image") else
                 _film_strip(item["video"]) if item.get("video") else None)
    except ValueError as error:  # embeddings are kept: its file may have changed or gone since
        text = str(error)
    lines = textwrap.wrap(printable(text), 27, max_lines=3 if image else 7, placeholder=" ...")
    if image:
        inset = axis.inset_axes([0.04, 0.4, 0.92, 0.57] if text else [0.04, 0.1, 0.92, 0.8])
        inset.imshow(image)
        inset.axis("off")
    axis.text(0.5, 0.2 if image else 0.5, "\n".join(lines), ha="center", va="center",
              fontsize=7.5, parse_math=False)


def draw_depths(path, rows):
    """Hit rate and likeness to the last layer by depth, hit rate by cost; of `compare_depths`."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.8))
    depths, cost = ([row[key] for row in rows] for key in ("depth", "gflops_per_item"))
    left.plot(depths, [list(row["cells"].values()) for row in rows], color="0.85")
    left.plot([], [], color="0.85", label="local pool of each cell")
    for axis, key, colour, label in (
            (left, "local", "tab:blue", "local pools"), (middle, "cosine", "tab:green", "cosine"),
            (left, "global", "tab:orange", "global pool"), (middle, "cka", "tab:purple", "CKA")):
        for kind, style, kept in (("", "o-", ""), ("last_", "s:", ", last layer kept")):
            if kind + key in rows[0]:
                values = [row[kind + key] for row in rows]
                axis.plot(depths, values, style, color=colour, label=label + kept)
                if axis is left and not kept:
                    right.plot(cost, values, style, color=colour, label=label)
    for row in rows:
        right.annotate(row["depth"], (row["gflops_per_item"], row["local"]), (0, 6), fontsize=8,
                       textcoords="offset points", ha="center")
    for axis in (left, middle, right):
        axis.set(xlabel="decoder layers k", ylabel="hit rate @5, sampled pools", ylim=(0, 1.06))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    left.set_xticks(depths), middle.set_xticks(depths)
    middle.set_ylabel("likeness to the last layer")
    right.set_xlabel("operations, GFLOP an item (at the points: k)")
    _save(figure, path)
