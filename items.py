"""What can be embedded: an item is a text, an image, a video, or one of these with a text.

    {"text": "make it capital", "image": "glyph.png", "instruction": "Find the changed character."}

`as_item` checks, `load_image` and `load_video` open files. Bad input raises a ValueError naming it.
"""

from pathlib import Path

from PIL import Image, ImageOps, ImageSequence

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # Pillow's errors


def as_item(item):
    """A str (text), PIL image or Path (image), or dict -> dict of text, image, video, instruction.

    Raises ValueError on other types, unknown keys, and an item without content.
    """
    if not isinstance(item, dict):
        item = {"text" if isinstance(item, str) else "image": item}
    unknown = set(item) - {"text", "image", "video", "instruction"}
    if unknown:
        raise ValueError(
            f"unknown keys {sorted(unknown)}; an item has text image video instruction"
        )
    if not any(item.get(key) for key in ("text", "image", "video")):
        raise ValueError(f"empty item {item!r}: it needs a text, an image or a video")
    if item.get("image") and item.get("video"):
        raise ValueError("an item has an image or a video, not both")
    if not isinstance(item.get("image") or "", str | Path | Image.Image):
        raise ValueError(f"an image is a path or PIL image, got {type(item['image']).__name__}")
    return item


def load_image(image):
    """A path or PIL image -> RGB image, upright. Raises ValueError naming an unreadable file."""
    name = image if not isinstance(image, Image.Image) else "given in memory"
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(image)
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")  # transparent pixels become white, not black
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except UNREADABLE as error:
        raise ValueError(f"cannot read image {name}: {error}") from error


def load_video(video):
    """A list of frames, or an animated GIF, WebP or PNG file -> an even number of frames.

    Other containers need a decoder, which this project does without: pass the frames.
    """
    if not isinstance(video, list | tuple):
        try:
            with Image.open(video) as file:
                video = [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
        except UNREADABLE as error:
            raise ValueError(f"cannot read video {video}: {error}; pass its frames") from error
    return [*video, *video[-1:]] if len(video) % 2 else list(video)  # Qwen2-VL merges them in pairs


def image_size(image):
    """(width, height) of a path or PIL image; of a path only the header is read. (1, 1) if broken:
    the file is named when it is loaded."""
    if isinstance(image, Image.Image):
        return image.size
    try:
        with Image.open(image) as file:
            return file.size
    except UNREADABLE:
        return 1, 1
