"""What can be embedded, and the one place that decides what can be read.

An item is a text, an image, a video, or one of these with a text. Bad input raises a ValueError.

    {"text": "make it capital", "image": "glyph.png", "instruction": "Find the changed character."}
"""

import contextlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MODALITIES = ("text", "image", "image,text", "video", "video,text")  # index = modality class
SUFFIXES = (".txt", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
UNREADABLE = Exception  # Pillow raises errors of every kind on a broken file


class Item(dict):
    """An item whose errors name its `place`, a file and line."""


def as_item(item):
    """A str (text), PIL image or Path (image), or dict -> dict of text, image, video, instruction.

    Raises ValueError on other types, unknown keys, text that is no Unicode, an empty item.
    """
    if not isinstance(item, dict):
        item = {"text" if isinstance(item, str) else "image": item}
    if unknown := set(item) - {"text", "image", "video", "instruction"}:
        raise ValueError(f"unknown keys {unknown}; an item has text image video instruction")
    check_text(item.get("text"), "text")
    check_text(item.get("instruction"), "instruction")
    image, video = item.get("image"), item.get("video")
    if not (item.get("text") or image or video):
        raise ValueError(f"empty item {item!r}: it needs a text, an image or a video")
    if image and video:
        raise ValueError("an item has an image or a video, not both")
    if image and not isinstance(image, str | Path | Image.Image):
        raise ValueError(f"an image is a path or PIL image, got {type(image).__name__}")
    return item


def check_text(text, name):
    """Raise ValueError unless `text` is None or a string that UTF-8 can hold."""
    try:
        ("" if text is None else text).encode()
    except (AttributeError, UnicodeEncodeError):  # no string at all; half a surrogate pair
        raise ValueError(f"{name}: expected valid Unicode, got {text!r:.80}") from None


def regular(path):
    """The path; ValueError if there is something else than a file: a pipe would block for ever."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path}: expected a regular file")
    return Path(path)


def open_image(image):
    """A path or PIL image -> PIL image, its header checked, its pixels not yet decoded.

    Raises ValueError (or whatever Pillow raises) if it is no regular file, too large, or
    more than 200 times as long as wide, which Qwen2-VL's image processor refuses.
    """
    if not isinstance(image, Image.Image):
        image = Image.open(regular(image))
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels are too many")
    if max(width, height) > 200 * min(width, height):
        raise ValueError(f"{width} x {height} pixels: one side is over 200 times the other")
    return image


def load_image(image):
    """A path or PIL image -> the 8-bit RGB picture that a person sees, upright.

    Raises ValueError naming a file that is unreadable, or in a mode that defines no brightness.
    """
    name = "given in memory" if isinstance(image, Image.Image) else image
    try:
        image = open_image(image)
        deep = image.mode[:2] == "I;" or image.mode == "I" and image.format in ("PNG", "PPM")
        with contextlib.suppress(Exception):  # malformed EXIF: the picture itself may be fine
            image = ImageOps.exif_transpose(image)
        if deep:  # 16 bits a pixel: convert() would turn all above 255 white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"mode {image.mode} has no fixed range of brightness: save 8 bits")
        if image.mode[-1] in "Aa" or "transparency" in image.info:
            image = image.convert("RGBA")  # what is transparent becomes white, not black
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except UNREADABLE as error:
        raise ValueError(f"cannot read image {name}: {error}") from error


def load_video(video, max_frames=8):
    """A list of frames, or an animated GIF, WebP or PNG file -> an even number of RGB frames.

    At most `max_frames`, in even steps from the first to the last; a still is shown twice.
    ValueError naming the file if it is unreadable; if there is no frame or their sizes differ.
    """
    def places(count):
        return np.linspace(0, count - 1, min(count, max_frames)).round().astype(int).tolist()

    name = "given as frames" if isinstance(video, list | tuple) else video
    if name is not video:
        frames = [load_image(video[i]) for i in places(len(video))]
    else:
        try:
            with open_image(video) as file:  # seek() may decode all before a frame, but keeps none
                frames = [load_image(file.seek(i) or file.copy())
                          for i in places(getattr(file, "n_frames", 1))]
        except UNREADABLE as error:
            raise ValueError(f"cannot read video {name}: {error}; "
                             "pass its frames, or an animated GIF, WebP or PNG") from error
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) != 1:
        raise ValueError(f"the video {name} needs frames of one size, got {sizes or 'no frame'}")
    return [*frames, *frames[-1:]] if len(frames) % 2 else frames  # Qwen2-VL merges them in pairs


def load_frames(item, max_frames=8):
    """An item's picture, or those of its video; an error names the item's place, if it has one."""
    try:
        if item.get("image"):
            return [load_image(item["image"])]
        return load_video(item["video"], max_frames)
    except ValueError as error:
        place = getattr(item, "place", None)
        raise ValueError(f"{place}: {error}" if place else str(error)) from error


def image_size(image):
    """(width, height) by the header alone; (1, 1) if it is broken: loading names the file."""
    try:
        return open_image(image).size
    except UNREADABLE:
        return 1, 1


def is_animated(path):
    """Whether a file is an animated GIF, WebP or PNG; at most two frames are read."""
    # Pages of a TIFF, and what a camera adds to a JPEG, are no frames; a broken file is "an image".
    with contextlib.suppress(UNREADABLE), open_image(path) as file:
        return file.format in ("GIF", "PNG", "WEBP") and file.is_animated


class Folder:
    """The images, videos (GIF, WebP and PNG files that are animated) and .txt files below a folder
    as items; hidden ones are left out. `modality[i]` is item i's class. Raises ValueError if there
    are none, or on an empty text."""

    def __init__(self, root):
        self.root = Path(root)
        self.files = sorted(path for path in self.root.rglob("*")
                            if path.suffix.lower() in SUFFIXES and path.is_file()
                            and "/." not in f"/{path.relative_to(self.root).as_posix()}")
        if not self.files:
            raise ValueError(f"--pool {root}: expected a folder with files {' '.join(SUFFIXES)}")
        self.modality = np.array([MODALITIES.index(
            "text" if path.suffix.lower() == ".txt" else "video" if is_animated(path) else "image")
            for path in self.files])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        kind = MODALITIES[self.modality[i]]
        if kind != "text":
            return {"text": None, "image": None, kind: str(self.files[i])}
        text = self.files[i].read_text(encoding="utf-8", errors="replace").strip()
        if not text:
            raise ValueError(f"the text file {self.files[i]} is empty")
        return {"text": text, "image": None}

    def name(self, i):
        return str(self.files[i].relative_to(self.root))
