"""The plots: training curves, test queries with results, kinds of wrong results, layers, costs."""

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


def draw_confusion(path, confusion):
    """Stacked bars of `metrics.modality_confusion`, one a task: the first and the first ten."""
    tasks = list(confusion)
    names = [f"{task.replace('_', ' ')}: {confusion[task]['query']} → {confusion[task]['target']}"
             for task in tasks]
    tops = [key for key in confusion[tasks[0]] if key.startswith("top")]
    colours = {"right item": "tab:green", "wrong item": "0.75", "wrong modality": "tab:red"}
    figure, axes = plt.subplots(1, len(tops), sharey=True, figsize=(11, 1.5 + 0.32 * len(tasks)))
    for axis, top in zip(axes, tops):
        left = [0.0] * len(tasks)
        for kind, colour in colours.items():
            shares = [100 * confusion[task][top][kind] for task in tasks]
            bars = axis.barh(names, shares, left=left, color=colour, label=kind)
            labels = [f"{share:.0f}" if share >= 6 else "" for share in shares]
            axis.bar_label(bars, labels, label_type="center", fontsize=8)
            left = [a + b for a, b in zip(left, shares)]
        axis.set(xlim=(0, 100), xlabel="share of the results, %")
        axis.set_title(f"global pool, top {top[3:]}")
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=90)
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


def draw_layers(path, rows, variant=None):
    """What each depth knows: hit rate (thin: each cell) and likeness to the last layer."""
    depths = [row["depth"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for cell in rows[0]["cells"]:
        left.plot(depths, [100 * row["cells"][cell] for row in rows], color="0.8", linewidth=0.8)
    left.plot(depths, [100 * row["hit_rate@5"] for row in rows], "o-", color="tab:blue",
              label="first k layers (grey: each cell)")
    right.plot(depths, [row["cosine"] for row in rows], "o-", color="tab:green", label="cosine")
    right.plot(depths, [row["cka"] for row in rows], "s-", color="tab:purple", label="linear CKA")
    if variant:
        left.plot(depths[1:], [100 * row["hit_rate@5"] for row in variant[1:]], "o--",
                  color="tab:orange", label="first k-1 layers and the last")
        for key, marker, colour in (("cosine", "o--", "tab:green"), ("cka", "s--", "tab:purple")):
            right.plot(depths[1:], [row[key] for row in variant[1:]], marker, color=colour,
                       alpha=0.5, label=f"{'CKA' if key == 'cka' else key}, last layer kept")
    left.set(ylabel="hit rate @5, %, sampled local pools", ylim=(0, 100))
    right.set(ylabel="likeness to the last layer", ylim=(None, 1.02))
    for axis in (left, right):
        axis.set(xlabel="depth k, decoder layers", xticks=depths[:: max(1, len(depths) // 14)])
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle("the untrained model read out at every depth, final norm applied", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_costs(path, rows):
    """Quality against cost: one dot a depth, over operations an item and over items a second."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    quality = [100 * row["hit_rate@5"] for row in rows]
    cost = (("GFLOP an item", [row["gflops_per_item"] for row in rows]),
            ("items a second", [row["items_per_s"] for row in rows]))
    for axis, (label, values) in zip(axes, cost):
        axis.plot(values, quality, "o-", color="tab:blue")
        for row, x, y in zip(rows, values, quality):
            axis.annotate(f" k = {row['depth']}", (x, y), fontsize=9, va="top")
        axis.set(xlabel=label, ylabel="hit rate @5, %, sampled local pools", ylim=(0, None))
        axis.set_xlim(0, 1.15 * max(values))
        axis.grid(alpha=0.3)
    names = [f"k = {row['depth']}" for row in rows]
    left = [0.0] * len(rows)
    for key, colour in (("vision", "tab:green"), ("decoder", "tab:blue"), ("reading", "0.75")):
        values = [row["latency_ms"][key] for row in rows]
        axes[2].barh(names, values, left=left, color=colour, label=key)
        left = [a + b for a, b in zip(left, values)]
    axes[2].set(xlabel="latency at batch 1, ms", xlim=(0, 1.1 * max(left)))
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
