"""The README's three diagrams, written as SVG, its clip, and three rows of its gallery:

    python docs/draw.py

Plain text with nothing random in it, so the same bytes whenever it runs (tests/test_docs.py). All
three are 800 pixels wide, the width of a README page, and no text is smaller than 12 of them.
"""

import sys
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
from mac_loss import hard_temperature  # noqa: E402
from toy.glyph_beir import TEST_QUERY_FACES, draw_clip  # noqa: E402

GREEN, ORANGE, BLUE = "#009E73", "#D55E00", "#0072B2"  # of targets, as in the notebook
GREY, PURPLE = "#6b6b6b", "#7b4fa3"
PALE = {GREEN: "#d9f0e8", ORANGE: "#fbe3d6", BLUE: "#d9e8f4", GREY: "#f0f0f0", PURPLE: "#ebe3f3"}


def write(x, y, text, size=13, colour="#111", anchor="middle", weight="normal", style="normal"):
    """One or several lines of text, the middle of their block at y."""
    lines = text.split("\n")
    top = y + 0.35 * size - 0.6 * size * (len(lines) - 1)
    looks = (f'font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}" '
             f'font-style="{style}"')
    return "\n".join(f'<text x="{x:g}" y="{top + 1.2 * size * row:g}" {looks}>{escape(line)}</text>'
                     for row, line in enumerate(lines))


def box(x, y, width, height, text="", colour=GREY, faded=False, **looks):
    """A frame with text in its middle; a faded one is dashed: what is there no more."""
    fill, line = ("#fff", "#aaa") if faded else (PALE[colour], colour)
    dash = ' stroke-dasharray="5 4"' if faded else ""
    frame = (f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" '
             f'fill="{fill}" stroke="{line}" stroke-width="1.5"{dash}/>')
    looks = {"colour": "#8a8a8a" if faded else "#111", **looks}
    return frame + ("\n" + write(x + width / 2, y + height / 2, text, **looks) if text else "")


def arrow(*points, colour="#333", dashed=False, head=True):
    """A line through the points with a head at its end."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    mark = f' marker-end="url(#head{colour[1:]})"' if head else ""
    return (f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}'
            f'{mark}/>')


def page(height, title, *parts):
    """An SVG file on white, so that it is legible on a dark page, too."""
    heads = "".join(
        f'<marker id="head{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
        for colour in ("#333", GREEN, ORANGE, BLUE))
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" width="800" '
        f'height="{height}" font-family="DejaVu Sans, Verdana, Arial, sans-serif">',
        f"<title>{escape(title)}</title>", f"<defs>{heads}</defs>",
        f'<rect width="800" height="{height}" rx="6" fill="#fff"/>', *parts, "</svg>", ""])


def tokens(x, y, count, colour):
    return "\n".join(box(x + 18 * n, y, 14, 14, colour=colour) for n in range(count))


def way():
    """An item's way to `[RET]`."""
    grid = "".join(f'<path d="M{22 + 14 * n},34 v56 M22,{34 + 14 * n} h56" stroke="#999"/>'
                   for n in range(5))
    parts = [
        grid, write(50, 60, "é", size=44), write(50, 18, "image", weight="bold"),
        write(50, 104, "16 patches", size=12, colour=GREY),
        arrow((84, 62), (118, 62)), box(122, 34, 84, 56, "vision\ntower,\nfrozen", PURPLE),
        write(318, 18, "instruction + text", weight="bold"),
        box(222, 34, 192, 56, "Find a picture of the\nchanged character.\nmake it capital",
            size=12),
        write(526, 18, "one-word prompt", weight="bold"),
        box(430, 34, 192, 56, "Summarize above image\nand sentence in one word:"),
        write(666, 18, "last", weight="bold"), box(638, 34, 56, 56, "[RET]", GREEN),
        # tokens
        arrow((164, 94), (164, 138)), arrow((318, 94), (318, 138)), arrow((526, 94), (526, 138)),
        arrow((666, 94), (666, 138)),
        tokens(130, 142, 4, PURPLE), tokens(222, 142, 10, GREY), tokens(430, 142, 10, GREY),
        box(656, 139, 20, 20, colour=GREEN),
        write(118, 149, "visual tokens", anchor="end"),
    ]
    rows = [("decoder layer 1", False), ("…", False), ("layer k", False),
            ("layer k + 1", True), ("…", True), ("layer L", True)]
    for row, (name, faded) in enumerate(rows):
        parts.append(box(122, 186 + 30 * row + 28 * faded, 572, 24, name, faded=faded))
    parts += [
        *(arrow((x, 160), (x, 183)) for x in (164, 318, 526, 666)),
        *(box(656, 188 + 30 * row, 20, 20, colour=GREEN) for row in range(3)),
        *(arrow((666, y), (666, y + 10), colour=GREEN, head=False) for y in (208, 238)),
        write(68, 228, "kept", weight="bold"), write(68, 346, "dropped", colour="#8a8a8a"),
        arrow((676, 258), (746, 258), (746, 216), colour=GREEN),
        box(708, 190, 76, 22, "final norm", size=12), arrow((746, 188), (746, 166), colour=GREEN),
        write(746, 152, "embedding", weight="bold", colour=GREEN),
        write(746, 282, "state at [RET]", size=12, colour=GREEN),
        write(408, 285, "Attention is causal: only the last token, [RET], sees the whole item.",
              size=12),
    ]
    return page(400, "An item's way to its embedding, the state at [RET]", *parts)


def stack(x, names, kept=3, teaches=False):
    """Decoder layers from above; those after `kept` are faded, or coloured where they teach."""
    return [box(x, 60 + 28 * row, 120, 22, name, PURPLE if row >= kept else GREY,
                faded=row >= kept and not teaches, size=12) for row, name in enumerate(names)]


def teach():
    """Cut and teach: both stages."""
    names = ["layer 1", "…", "layer k", "layer k + 1", "…", "layer L"]
    parts = [
        box(10, 10, 514, 374, colour=GREY, size=1).replace(PALE[GREY], "#fff"),
        write(24, 28, "Stage 1: self-distillation", weight="bold", anchor="start", size=14),
        write(100, 50, "teacher, frozen", size=12), *stack(40, names, teaches=True),
        write(365, 50, "student: the first k layers", size=12), *stack(305, names),
        arrow((164, 99), (301, 99)), write(232, 88, "copy", size=12),
        write(296, 183, "dropped", size=12, colour="#8a8a8a", anchor="end"),
        # the states at [RET]
        box(40, 240, 120, 22, "final norm", size=12), arrow((100, 222), (100, 238)),
        arrow((100, 262), (100, 280)), write(100, 292, "hₜ at [RET]", weight="bold"),
        arrow((429, 127), (459, 127), (459, 238)), box(404, 240, 110, 22, "final norm", size=12),
        arrow((459, 262), (459, 280)), write(459, 292, "hₛ at [RET]", weight="bold"),
        arrow((150, 292), (176, 292)), arrow((410, 292), (384, 292)),
        box(180, 271, 200, 42, "distillation:\nL_distill = E ‖hₜ − hₛ‖²", PURPLE),
        arrow((459, 302), (459, 338), (384, 338)),
        box(180, 326, 200, 24, "InfoNCE, one temperature", size=12),
        write(280, 368, "L₁ = 0.9 L_InfoNCE + 0.1 L_distill", weight="bold"),
        box(538, 10, 252, 374, colour=GREY, size=1).replace(PALE[GREY], "#fff"),
        write(552, 28, "Stage 2: MAC-Loss", weight="bold", anchor="start", size=14),
        write(664, 50, "student, no teacher", size=12), *stack(604, names[:3]),
        box(604, 152, 120, 22, "final norm", size=12), arrow((664, 138), (664, 150)),
        arrow((664, 174), (664, 190)),
        write(664, 206, "states at [RET] of a\nbatch's queries and targets", size=12),
        arrow((664, 224), (664, 244)),
        box(552, 248, 224, 66),
        write(664, 281, "MAC-Loss\nτ_hard(t) for intra-modality,\nτ for inter-modality negatives"),
        write(664, 340, "t: training progress, from 0 to 1;\nat t = 0, MAC-Loss is InfoNCE",
              size=12),
    ]
    return page(394, "Cut the decoder, let the dropped layers teach; then MAC-Loss", *parts)


def temperatures():
    """Which temperature meets which target."""
    rows = [("image", "á", "positive", "τ_hard(t)", GREEN),
            ("image", "à", "intra-modality negative", "τ_hard(t)", ORANGE),
            ("image", "ä", "intra-modality negative", "τ_hard(t)", ORANGE),
            ("text", "“… a with acute”", "inter-modality negative", "τ", BLUE),
            ("image + text", "á  + facts", "inter-modality negative", "τ", BLUE)]
    query = "Find a picture of this character. latin small letter a with acute"
    parts = [write(16, 26, f"query i: “{query}”", anchor="start", weight="bold"),
             *(write(x, 56, name, size=12, colour=GREY, anchor="start") for x, name in (
                 (16, "target j"), (142, "modality"), (242, "what it is to the query"),
                 (420, "temperature")))]
    for row, (modality, shown, kind, tau, colour) in enumerate(rows):
        y = 70 + 46 * row
        parts += [box(12, y, 504, 38, colour=colour),
                  write(72, y + 19, shown, size=22 if len(shown) == 1 else 12),
                  write(142, y + 19, modality, anchor="start"),
                  write(242, y + 19, kind, anchor="start", colour=colour, weight="bold"),
                  write(466, y + 19, tau, weight="bold", size=14)]
    left, top, width, height = 582, 70, 176, 190  # t from 0 to 1, temperatures from 0 to tau
    curve = [(left + width * t / 40, top + height * (1 - hard_temperature(1, t / 40)))
             for t in range(41)]
    end = curve[-1][1]
    parts += [
        arrow((left, top + height), (left, top - 22)), write(left - 8, top, "τ", anchor="end"),
        arrow((left, top + height), (left + width + 16, top + height)),
        write(left - 8, end, f"{hard_temperature(1, 1):.2f} τ", anchor="end", size=12),
        write(left - 8, top + height, "0", anchor="end", size=12),
        arrow((left, end), curve[20], colour="#bbb", dashed=True, head=False),
        arrow((left + width / 2, top + height - 5), (left + width / 2, top + height), head=False),
        arrow((left, top), (left + width, top), colour=BLUE, head=False),
        arrow(*curve, colour=ORANGE, head=False),
        write(left + width / 2, top - 14, "inter-modality: τ", colour=BLUE),
        write(left + 8, end + 48, "positive, intra-modality:\nτ_hard(t) = τ e^(−λ min(1, 2t)),\n"
              "here λ = 0.5", colour=ORANGE, size=12, anchor="start"),
        *(write(left + width * t, top + height + 16, name, size=12)
          for t, name in ((0, "0"), (0.5, "½"), (1, "1"))),
        write(left + width / 2, top + height + 34, "training progress t", size=12),
        write(16, 322, "As τ_hard falls, similar negatives of the positive's modality get a harder "
              "push; those of others get less.", anchor="start"),
    ]
    return page(344, "Which temperature meets which target in MAC-Loss", *parts)


DIAGRAMS = {"way.svg": way, "teach.svg": teach, "temperatures.svg": temperatures}
CLIP = "F", TEST_QUERY_FACES[0], "left"  # neither typeface nor motion of the F is in training


def main():
    for name, draw in DIAGRAMS.items():
        (DOCS / name).write_text(draw(), encoding="utf-8")
    with Image.open(DOCS / "gallery.png") as gallery:  # ten rows, drawn by train.py
        width, height = gallery.width, (gallery.height - 12) // 10
        rows = Image.new("RGB", (width, 3 * height))
        for place, row in enumerate((2, 4, 8)):
            rows.paste(gallery.crop((0, row * height + 6, width, (row + 1) * height + 6)),
                       (0, place * height))
        rows.save(DOCS / "gallery_top.png")
    first, *rest = draw_clip(*CLIP)
    first.save(DOCS / "clip.gif", save_all=True, append_images=rest, duration=150, loop=0)


if __name__ == "__main__":
    main()
