"""The diagrams in docs/ are what docs/draw.py draws, and legible at the width of a page."""

import xml.etree.ElementTree as ElementTree

import pytest
from conftest import ROOT

from docs.draw import CLIP, DIAGRAMS
from support.items import load_video
from toy.glyph_beir import World, draw_clip


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_diagram_is_what_its_script_draws_byte_by_byte(name):
    assert (ROOT / "docs" / name).read_bytes() == DIAGRAMS[name]().encode()
    assert f"docs/{name}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_diagram_is_legible_on_light_and_dark_pages(name):
    root = ElementTree.fromstring(DIAGRAMS[name]())
    assert root.get("width") == "800"
    ground = root.find("{*}rect")
    assert (ground.get("width"), ground.get("height")) == ("800", root.get("height"))
    assert ground.get("fill") == "#fff"
    texts = root.findall(".//{*}text")
    assert len(texts) > 10 and min(float(text.get("font-size")) for text in texts) >= 12
    assert all(0 < float(text.get("x")) < 800 for text in texts)


def test_the_clip_that_the_readme_searches_with_is_one_that_training_never_saw():
    frames = load_video(ROOT / "docs/clip.gif")
    assert [f.convert("L").tobytes() for f in frames] == [f.tobytes() for f in draw_clip(*CLIP)]
    assert World().motion_split[CLIP[0], CLIP[2]] == "test"
