"""The pictures: training curves and galleries of search results."""

import textwrap

import matplotlib

from items import load_image

matplotlib.use("Agg")  # draws into files; no window, so it works on a server

from matplotlib import pyplot as plt  # noqa: E402


def draw_curves(path, rows):
    """Losses and hard temperature over the steps of both stages; rows as in metrics.jsonl."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    kinds = (("contrastive", "contrastive (nats)", "tab:blue"),
             ("distill", "distillation (squared distance)", "tab:orange"))
    for key, label, colour in kinds:
        points = [(step, row[key]) for step, row in enumerate(rows, 1) if row[key] is not None]
        if points:
            left.plot(*zip(*points), color=colour, label=label, linewidth=1)
    right.plot(range(1, len(rows) + 1), [row["hard_temperature"] for row in rows], color="tab:red",
               label="hard temperature")
    first = sum(row["stage"] == 1 for row in rows)
    for axis in (left, right):
        if 0 < first < len(rows):
            axis.axvline(first + 0.5, color="0.6", linestyle=":", label="stage 2 begins")
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.legend()
    left.set_ylabel("loss")
    right.set_ylabel("temperature")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_gallery(path, rows, columns=5):
    """Search results: rows of (heading, query item, [(score, candidate item, is_right)]).

    Each row shows the query in blue and the best candidates; a right one has a thick green frame.
    """
    size = (2 * columns + 2.4, 1.9 * len(rows) + 0.2)
    figure, axes = plt.subplots(len(rows), columns + 1, figsize=size, squeeze=False)
    for line, (heading, query, found) in zip(axes, rows):
        _draw_item(line[0], query, heading, "tab:blue", width=1.5)
        for axis, (score, item, right) in zip(line[1:], found):
            colour, width = ("tab:green", 4) if right else ("0.8", 1)
            _draw_item(axis, item, f"{score:.3f}", colour, width)
        for axis in line[1 + len(found) :]:
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_item(axis, item, title, colour, width):
    """One framed item: its image above its text, as much of it as fits."""
    axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
    axis.set_title(title, fontsize=9)
    for spine in axis.spines.values():
        spine.set(edgecolor=colour, linewidth=width)
    image, text = item.get("image"), item.get("text") or ""
    lines = textwrap.wrap(text, 27, max_lines=3 if image else 7, placeholder=" ...")
    if image:
        inset = axis.inset_axes([0.2, 0.4, 0.6, 0.57] if text else [0.1, 0.1, 0.8, 0.8])
        inset.imshow(load_image(image))
        inset.axis("off")
    axis.text(0.5, 0.2 if image else 0.5, "\n".join(lines), ha="center", va="center", fontsize=7.5)
