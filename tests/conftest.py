"""Shared fixtures: the committed tiny MLLM and a GlyphBEIR directory, each made once a session."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a network

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import support  # noqa: E402, F401  before torch: it says how threads wait

MODEL = ROOT / "toy/tiny-qwen2-vl"


@pytest.fixture(scope="session")
def glyph_beir(tmp_path_factory):
    """A freshly written GlyphBEIR directory. Tests read it only."""
    from toy.glyph_beir import build

    folder = tmp_path_factory.mktemp("data") / "glyph_beir"
    build(folder)
    return folder


@pytest.fixture
def puma():
    """The tiny MLLM at full depth, in evaluation mode."""
    from puma import PUMA

    return PUMA.from_pretrained(MODEL).eval()
