"""The picture of a search: the query and what was found, with scores, modalities and names.

Drawn with Pillow alone: importing matplotlib would take longer than the search.
"""

import textwrap
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from items import load_image

CELL, HEAD, GAP = 180, 34, 10  # pixels: a thumbnail's side, its two lines of text, between cells


def _font(size):
    """DejaVu Sans, which matplotlib's package brings along: it has more letters than Pillow's."""
    package = find_spec("matplotlib")
    file = package and Path(package.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(file, size) if file and file.is_file() else (
        ImageFont.load_default(size))


def draw_search(path, query, found, columns=5):
    """Write a PNG: the query, framed blue, and its results, [(score, item, modality, name)]."""
    lines = max(1, -(-len(found) // columns))
    size = (GAP + (columns + 1) * (CELL + GAP), GAP + lines * (CELL + HEAD + GAP))
    canvas = Image.new("RGB", size, "white")
    _draw(canvas, (GAP, GAP), query, "query", query.get("instruction") or "", "#1f77b4")
    for rank, (score, item, modality, name) in enumerate(found):
        line, column = divmod(rank, columns)
        corner = (GAP + (column + 1) * (CELL + GAP), GAP + line * (CELL + HEAD + GAP))
        name = name if len(name) < 27 else "..." + name[-23:]
        _draw(canvas, corner, item, f"{rank + 1}.  {score:.3f}  {modality}", name, "#cccccc")
    canvas.save(path)


def _draw(canvas, corner, item, first, second, colour):
    """One item below two lines of text: its image, its text, or the one above the other."""
    draw, (left, top) = ImageDraw.Draw(canvas), corner
    draw.text((left, top), first, "black", _font(12))
    second = second if len(second) < 28 else second[:26] + "..."
    draw.text((left, top + 16), second, "#555555", _font(11))
    top += HEAD
    draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline=colour, width=2)
    text, room = item.get("text") or "", CELL - 12
    if item.get("image"):
        image = load_image(item["image"])
        scale = min(room / image.width, (room - 50 * bool(text)) / image.height)
        image = image.resize([max(1, round(scale * side)) for side in image.size])
        down = 6 if text else (CELL - image.height) // 2
        canvas.paste(image, (left + (CELL - image.width) // 2, top + down))
        top, room = top + CELL - 56, 50
    wrapped = textwrap.wrap(text, 25, max_lines=3 if item.get("image") else 9, placeholder=" ...")
    draw.multiline_text((left + 8, top + 6), "\n".join(wrapped), "black", _font(12))
