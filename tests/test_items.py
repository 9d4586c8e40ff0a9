"""support/items.py: what can be read, as which picture, and what is refused by name."""

import os

import numpy as np
import pytest
from PIL import Image, ImageOps

from support.items import (Folder, Item, as_item, image_size, load_frames, load_image, load_video,
                           open_image)

RAMP = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)  # each of 256 brightnesses


@pytest.mark.parametrize("item, message", [
    ({"txt": "a"}, r"unknown keys \{'txt'\}; an item has text image video instruction"),
    ({"instruction": "Find it."}, "empty item .* needs a text, an image or a video"),
    ("", "empty item"),
    ({"image": "a.png", "video": ["a.png"]}, "an image or a video, not both"),
    (3, "an image is a path or PIL image, got int"),
    ({"text": 3}, "text: expected valid Unicode, got 3"),
    ({"text": "a", "instruction": ["b"]}, r"instruction: expected valid Unicode, got \['b'\]"),
    ({"text": "\ud800"}, r"text: expected valid Unicode, got '\\ud800'"),
])
def test_what_is_no_item_is_refused_with_the_offending_value(item, message):
    with pytest.raises(ValueError, match=message):
        as_item(item)


def test_a_text_an_image_and_a_path_alone_are_items(tmp_path):
    assert as_item("a") == {"text": "a"}
    assert as_item(tmp_path) == {"image": tmp_path}
    assert as_item({"text": None, "image": "a.png"}) == {"text": None, "image": "a.png"}


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_a_picture_of_any_mode_becomes_rgb_as_pillow_shows_it(mode):
    picture = Image.linear_gradient("L").resize((32, 32))
    if mode in ("LAB", "HSV"):
        picture = Image.merge(mode, [picture, picture.rotate(90), picture])
    picture = picture.convert(mode)
    image = load_image(picture)
    assert image.mode == "RGB" and image.tobytes() == picture.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "PA"])
def test_what_is_transparent_is_white_and_what_is_not_keeps_its_colour(mode):
    image = Image.new(mode, (2, 1))
    if mode == "PA":
        image.putpalette([grey for grey in range(256) for _ in range(3)])
    image.putpixel((1, 0), (70, 255) if mode in ("LA", "PA") else (70, 70, 70, 255))
    shown = load_image(image)
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (70,) * 3]


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    shown = load_image(tmp_path / "a.png")
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (9,) * 3]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.ppm"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_a_ramp_of_16_bits_keeps_all_its_brightnesses(tmp_path, name, order):
    Image.fromarray(RAMP.astype(order) if name == "a.tif" else RAMP).save(tmp_path / name)
    shown = np.asarray(load_image(tmp_path / name))
    assert shown.dtype == np.uint8
    assert (shown == np.arange(256).reshape(16, 16, 1)).all()


@pytest.mark.parametrize("mode", ["I", "F", "La"])
def test_a_mode_without_a_defined_brightness_is_refused_by_name(tmp_path, mode):
    with pytest.raises(ValueError, match=f"cannot read image given in memory: .*{mode}"):
        load_image(Image.new(mode, (4, 4)))
    if mode != "La":
        Image.new(mode, (4, 4)).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match=f"a.tif: mode {mode} has no fixed range"):
            load_image(tmp_path / "a.tif")


def test_an_image_is_turned_upright_and_the_given_one_stays_as_it_was(tmp_path):
    image = Image.linear_gradient("L").resize((8, 4)).convert("RGB")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "a.png", exif=exif)
        opened = Image.open(tmp_path / "a.png")
        upright = load_image(opened)
        assert upright.size == ((8, 4) if orientation < 5 else (4, 8)) and opened.size == (8, 4)
        assert upright.tobytes() == ImageOps.exif_transpose(opened).tobytes()


def test_malformed_exif_is_ignored_and_the_picture_used(tmp_path):
    picture = Image.linear_gradient("L").convert("RGB")
    for tag, kind, value in ((0x0128, 11, b"\0\0\x80\x3f"),  # ResolutionUnit as FLOAT
                             (0x0112, 2, b"six\0"), (0x0112, 12, b"\xff\xff\xff\xff")):
        entry = tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + b"\1\0\0\0" + value
        exif = b"Exif\0\0II*\0\x08\0\0\0\1\0" + entry + bytes(4)
        picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
        assert load_image(tmp_path / "a.jpg").size == (256, 256)
        picture.save(tmp_path / "a.png", exif=exif)
        assert load_image(tmp_path / "a.png").tobytes() == picture.tobytes()


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path, monkeypatch):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no image")
    # Pillow knows this format in general; on a strange pixel format it raises no OSError.
    (tmp_path / "a.dds").write_bytes(b"DDS |\0\0\0" + bytes(120))
    Image.new("L", (1, 201)).save(tmp_path / "long.png")
    Image.new("L", (1, 200)).save(tmp_path / "just.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (("cut", "truncated"), ("text", "cannot identify"),
                         ("missing", "No such file"), ("pipe", "expected a regular file"),
                         ("long", "1 x 201 pixels: one side is over 200 times the other")):
        path = tmp_path / f"{name}.png"
        with pytest.raises(ValueError, match=f"cannot read image .*{name}.png: .*{reason}"):
            load_image(path)
        assert image_size(path) == {"cut": (64, 64)}.get(name, (1, 1))
    with pytest.raises(ValueError, match="a.dds"):
        load_image(tmp_path / "a.dds")
    assert load_image(tmp_path / "just.png").size == image_size(tmp_path / "just.png") == (1, 200)
    assert open_image(tmp_path / "cut.png").size == (64, 64), "only the header is read"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4095)
    with pytest.raises(ValueError, match="64 x 64 pixels are too many"):
        load_image(tmp_path / "whole.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4096)
    assert load_image(tmp_path / "whole.png").mode == "RGB"


@pytest.mark.parametrize("kind", ["image", "video"])
def test_what_cannot_be_read_of_an_item_that_knows_its_place_is_named_with_it(kind):
    item = Item({kind: "missing.gif"})
    with pytest.raises(ValueError, match=f"^cannot read {kind} missing.gif: .*No such file"):
        load_frames(item)
    item.place = "pool.jsonl:7"
    with pytest.raises(ValueError, match=f"^pool.jsonl:7: cannot read {kind} missing.gif: "):
        load_frames(as_item(item))


@pytest.mark.parametrize("name", ["clip.gif", "clip.png", "clip.webp"])
def test_a_video_of_a_file_or_of_frames_is_an_even_number_of_rgb_frames(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    shown = [frame.getpixel((0, 0)) for frame in load_video(tmp_path / name)]
    assert shown == [(0, 0, 0), (60, 0, 0), (120, 0, 0), (120, 0, 0)]
    assert [frame.getpixel((0, 0)) for frame in load_video(frames)] == shown
    assert len(load_video(frames[:2])) == 2


def test_transparent_frames_of_a_video_are_white_as_well(tmp_path):
    frames = [Image.new("RGBA", (8, 8), (200, 0, 0, alpha)) for alpha in (0, 255)]
    frames[0].save(tmp_path / "clip.png", save_all=True, append_images=frames[1:])
    assert load_video(tmp_path / "clip.png")[0].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["clip.gif", "clip.png", "clip.webp"])
def test_of_a_long_video_max_frames_are_read_evenly_from_the_first_to_the_last(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), (10 * i, 0, 0)) for i in range(22)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    for most, expected in ((8, [0, 3, 6, 9, 12, 15, 18, 21]), (4, [0, 7, 14, 21]), (2, [0, 21])):
        for video in (tmp_path / name, frames):
            shown = load_video(video, most)
            assert [frame.getpixel((0, 0))[0] // 10 for frame in shown] == expected
    assert len(load_video(tmp_path / name)) == 8 and len(load_video(frames, 30)) == 22


def test_of_10_000_frames_only_those_that_are_sampled_are_opened(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    paths = [tmp_path / "missing.png"] * 10_000
    for i in (0, 3333, 6666, 9999):
        paths[i] = tmp_path / "a.png"
    assert len(load_video(paths, 4)) == 4
    with pytest.raises(ValueError, match="missing.png"):
        load_video(paths, 6)


def test_a_still_or_one_frame_is_a_video_of_two_equal_frames(tmp_path):
    picture = Image.linear_gradient("L").resize((8, 8))
    picture.save(tmp_path / "still.png")
    for video in (tmp_path / "still.png", [picture], [tmp_path / "still.png"]):
        first, second = load_video(video)
        assert first.tobytes() == second.tobytes() == picture.convert("RGB").tobytes()


def refused(video):
    with pytest.raises(ValueError) as error:
        load_video(video)
    return str(error.value)


def test_a_video_without_frames_of_unequal_sizes_or_unreadable_is_refused_by_name(tmp_path):
    frames = [Image.effect_noise((size, size), 50) for size in (8, 4, 8)]
    unequal = "needs frames of one size, got [(4, 4), (8, 8)]"
    assert refused(frames) == f"the video given as frames {unequal}"
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert refused(tmp_path / "a.tif") == f"the video {tmp_path / 'a.tif'} {unequal}"
    assert refused([]) == "the video given as frames needs frames of one size, got no frame"
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0 ftypisom")
    for name in ("clip.gif", "clip.png", "clip.webp"):
        frames = [Image.effect_noise((32, 32), 50) for _ in range(5)]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-500])  # within the last one
    for name in ("clip.gif", "clip.png", "clip.webp", "film.mp4", "missing.gif"):
        error = refused(tmp_path / name)
        assert error.startswith(f"cannot read video {tmp_path / name}: ") and "\n" not in error
        assert error.endswith("; pass its frames, or an animated GIF, WebP or PNG")


def test_a_folders_images_and_texts_are_its_items_without_hidden_ones(tmp_path):
    for name in ("b/one.JPG", "a.txt", "empty.txt", "ignored.csv", ".hidden/c.txt", ".d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n" if name == "empty.txt" else " a text\n")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    pool = Folder(tmp_path)
    assert [pool.name(i) for i in range(len(pool))] == ["a.txt", "b/one.JPG", "empty.txt"]
    assert pool.modality.tolist() == [0, 1, 0]
    assert pool[0] == {"text": "a text", "image": None}
    assert pool[1] == {"text": None, "image": str(tmp_path / "b/one.JPG")}
    with pytest.raises(ValueError, match="empty.txt is empty"):
        pool[2]


def test_of_a_folders_files_those_are_videos_that_are_animated_in_a_format_for_it(tmp_path):
    frames = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(3)]
    for name in ("a.gif", "b.png", "c.WEBP", "pages.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=frames[1:])
    for name in ("still.gif", "still.png", "still.webp"):
        frames[0].save(tmp_path / name)
    (tmp_path / "x.gif").write_bytes(b"no image")
    pool = Folder(tmp_path)
    videos = [pool.name(i) for i in range(len(pool)) if pool.modality[i] == 3]
    assert videos == ["a.gif", "b.png", "c.WEBP"] and set(pool.modality) == {1, 3}
    assert pool[0] == {"text": None, "image": None, "video": str(tmp_path / "a.gif")}


def test_a_folder_without_items_or_none_at_all_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"--pool {folder}: expected a folder with"):
            Folder(folder)
