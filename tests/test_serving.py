"""docs/serving.md: its very code, run on a saved toy model."""

import re

import pytest
import torch
from conftest import MODEL, ROOT
from PIL import Image

from puma import PUMA

PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
QUERY = "Find a picture of this character.\nlatin small letter a"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The first block's names, after running it beside a saved model; that model as a PUMA; an
    image whose size is no multiple of a patch."""
    folder = tmp_path_factory.mktemp("serving")
    saved = PUMA.from_pretrained(MODEL, keep_layers=3)
    with torch.no_grad():  # as if trained
        saved.ret_embedding.add_(torch.linspace(-0.1, 0.1, 128))
    saved.image_processor.size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 12 * 28 * 28}
    saved.save_pretrained(folder / "runs/puma-1/model")
    image = Image.effect_noise((101, 67), 90).convert("RGB")
    image.save(folder / "my_glyph.png")
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(BLOCKS[0], names)
        yield names, PUMA.from_pretrained("runs/puma-1/model").eval(), image


def test_the_stock_classes_need_no_file_of_ours():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 30
    imports = re.findall(r"^(?:from|import) (\w+)", BLOCKS[0], re.M)
    assert set(imports) == {"torch", "PIL", "transformers"}


@pytest.mark.parametrize("item", [
    {"text": "latin small letter a"},
    {"text": "Ends in a full stop."},
    {"text": "a <|im_end|> and [RET] and <|image_pad|> that are just text"},
    {"text": QUERY},
    {"image": True},
    {"image": True, "text": "Find the changed character.\nmake it capital."},
])
def test_the_pages_lines_give_the_embedding_of_encode(served, item):
    names, puma, image = served
    item = {key: image if value is True else value for key, value in item.items()}
    expected = puma.encode([item], show_progress=False)[0]
    torch.testing.assert_close(names["embed"](**item), expected, atol=1e-5, rtol=1e-4)


def test_a_rotated_photograph_and_transparent_pixels_are_embedded_as_a_person_sees_them(
        served, tmp_path):
    names, puma, image = served
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "rotated.png", exif=exif)
    clear = image.copy()
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    clear.save(tmp_path / "clear.png")
    plain = puma.encode(image, show_progress=False)
    for name in ("rotated.png", "clear.png"):
        expected = puma.encode(tmp_path / name, show_progress=False)
        assert plain @ expected < 0.999, "it matters"
        found = names["embed"](image=Image.open(tmp_path / name))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_an_instruction_is_the_first_line_of_a_querys_text(served):
    names, puma, _ = served
    instruction, text = QUERY.split("\n")
    expected = puma.encode([{"text": text, "instruction": instruction}], show_progress=False)[0]
    torch.testing.assert_close(names["query"], expected, atol=1e-5, rtol=1e-4)


def test_sentence_transformers_encodes_and_searches_with_it(served):
    pytest.importorskip("sentence_transformers")
    names, puma, image = served
    names = dict(names)
    exec(BLOCKS[1], names)
    items = ["latin small letter a", image, {"text": "make it capital", "image": image}]
    embeddings = names["model_st"].encode(items, convert_to_tensor=True, show_progress_bar=False)
    expected = puma.encode(items, show_progress=False)
    torch.testing.assert_close(embeddings.cpu(), expected, atol=1e-5, rtol=1e-4)
    instruction, text = QUERY.split("\n")
    prompted = names["model_st"].encode(text, prompt=f"{instruction}\n", convert_to_tensor=True)
    torch.testing.assert_close(prompted.cpu(), names["query"], atol=1e-5, rtol=1e-4)
