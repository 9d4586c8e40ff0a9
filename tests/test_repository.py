"""The promises of README.md and of the house style, kept by a test."""

import ast
import io
import re
import shlex
import subprocess
import sys
import tokenize

import pytest
import yaml  # transformers needs it, too
from conftest import MODEL, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [" ".join(line.split()) for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.replace("\\\n", " ").splitlines() if line.strip()]
BUDGETS = {"mac_loss.py": 140, "prune_distill.py": 170, "puma.py": 400, "data.py": 410,
           "settings.py": 145, "train.py": 375, "evaluate.py": 384}
TOP, SUPPORT, TOY = (sorted(ROOT.glob(glob)) for glob in ("*.py", "support/*.py", "toy/*.py"))
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
           for path in [*TOP, *SUPPORT, *TOY]}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
METHOD = [name for name in SOURCES if not name.startswith("toy/")]  # with its plumbing


def lines(name):
    return len(SOURCES[name].splitlines())


# ---- length and looks ----------------------------------------------------------------------------


def test_a_handful_of_files_of_the_promised_length():
    assert {path.name for path in TOP} == set(BUDGETS) and len(SUPPORT) <= 10  # with __init__.py
    too_long = {name: lines(name) for name, most in BUDGETS.items() if lines(name) > most}
    assert not too_long
    assert sum(lines(name) for name in METHOD if name.startswith("support/")) <= 1_564
    assert sum(map(lines, METHOD)) <= 3_536


@pytest.mark.parametrize("name", SOURCES)
def test_lines_fit_the_page_and_functions_a_screen(name):
    assert max(map(len, SOURCES[name].splitlines())) <= 100
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{node.name} has more than 50 lines"


@pytest.mark.parametrize("name", METHOD)
def test_public_functions_have_docstrings(name):
    assert ast.get_docstring(TREES[name])
    for node in TREES[name].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            trivial = node.name == "main" or node.end_lineno - node.lineno <= 5
            assert ast.get_docstring(node) or trivial, node.name


def comment_lines(source):
    """-> numbers of the lines that are docstrings, and of those that hold a comment."""
    told, documented = set(), (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node):
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return told, {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


@pytest.mark.parametrize("name", ["mac_loss.py", "prune_distill.py", "puma.py", "train.py"])
def test_what_a_student_reads_is_explained_in_the_bodies_too(name):
    told, comments = comment_lines(SOURCES[name])
    written = {number for number, line in enumerate(SOURCES[name].splitlines(), 1) if line.strip()}
    share = len((told | comments) & written) / len(written)
    assert 0.30 <= share <= 0.45
    assert len(comments) >= len((told | comments) & written) / 3


# ---- who imports whom ----------------------------------------------------------------------------


def imports(tree, own):
    """The files of `own` that a module imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {f"{name.replace('.', '/')}.py" for name in names}
    return files & own, {name.split(".")[0] for name in names}


def level(name):
    """Arrows go from a higher number to a lower one, or stay in support/ or toy/."""
    return {"support": 0, "settings.py": 1, "mac_loss.py": 2, "prune_distill.py": 2, "puma.py": 2,
            "data.py": 2, "evaluate.py": 3, "train.py": 4, "toy": 5}[name.split("/")[0]]


LEAF = ("evaluate.py", "toy/glyph_beir.py")  # the default data, written when it is absent


def wrong_arrows(trees):
    """What is wrong in the graph of imports, as text: arrows upwards or sideways, and circles."""
    graph = {name: imports(tree, set(trees))[0] for name, tree in trees.items()}
    wrong = []
    for name, found in graph.items():
        for other in found - {name}:
            together = "/" in name and name.split("/")[0] == other.split("/")[0]
            if (name, other) != LEAF and not together and level(other) >= level(name):
                wrong.append(f"{name} imports {other}")
    left = dict(graph)
    while free := [name for name, found in left.items() if not found & left.keys()]:
        left = {name: found for name, found in left.items() if name not in free}
    return wrong + [f"in a circle or above one: {name}" for name in left]


def test_imports_go_one_way_and_in_no_circle_those_in_functions_included():
    assert wrong_arrows(TREES) == []
    assert not re.search("__import__|import_module", "".join(SOURCES.values()))  # unseen by it
    at_the_top = ast.Module([node for node in TREES["evaluate.py"].body
                             if not isinstance(node, ast.FunctionDef)], [])
    assert LEAF[1] not in imports(at_the_top, set(TREES))[0]  # only when it is needed
    for name in ("mac_loss.py", "prune_distill.py"):  # made to be copied
        assert imports(TREES[name], set())[1] - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("name, line", [
    ("support/files.py", "import puma"),
    ("support/files.py", "def f():\n    from support.index import search"),  # which imports it back
    ("prune_distill.py", "from puma import PUMA"),
    ("puma.py", "def f():\n    def g():\n        from data import Benchmark"),
    ("data.py", "import evaluate"),
    ("evaluate.py", "def f():\n    import train"),
    ("evaluate.py", "from toy import pretrain"),
    ("toy/glyph_beir.py", "def f():\n    from evaluate import ensure_data"),
])
def test_an_arrow_upwards_or_a_circle_is_found(name, line):
    trees = {**TREES, name: ast.parse(f"{SOURCES[name]}\n{line}\n")}
    if name == "support/files.py" and "index" in line:
        trees["support/index.py"] = ast.parse("from support import files")
    assert wrong_arrows(trees)


def test_importing_a_file_has_no_side_effect(tmp_path):
    modules = [name.removesuffix(".py").replace("/", ".") for name in SOURCES]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "MPLCONFIGDIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", f"import {', '.join(modules)}"], cwd=tmp_path,
                         env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "" and not [p for p in tmp_path.iterdir() if p.suffix != ".json"]


def test_row_19_nothing_imports_deepspeed_flashattention_or_needs_cuda():
    imported = set.union(*(imports(tree, set())[1] for tree in TREES.values()))
    assert {"torch", "transformers"} <= imported
    assert not imported & {"deepspeed", "flash_attn", "accelerate", "torchvision", "triton"}


def test_nothing_unsafe_is_loaded():
    for path in [*TOP, *SUPPORT, *TOY, *ROOT.glob("tests/*.py")]:
        if path.name == "test_repository.py":
            continue
        source = path.read_text(encoding="utf-8")
        assert source.count("torch.load(") == source.count("weights_only=True"), path
        assert "trust_remote_code=True" not in source and "import pickle" not in source, path


def test_the_committed_model_is_small_and_safe():
    assert (MODEL / "model.safetensors").stat().st_size <= 6_000_000
    assert not [path for path in MODEL.iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]
    assert "python toy/pretrain.py" in (MODEL / "README.md").read_text()


# ---- the README ----------------------------------------------------------------------------------


def test_the_readmes_two_commands_set_everything_up_and_ci_runs_both():
    setup = "python -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    assert COMMANDS[:2] == [setup + "python train.py", setup + "python -m pytest -q tests"]
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert [line for line in ci if "requirements.txt &&" in line] == COMMANDS[:2]


@pytest.fixture(scope="module")
def options():
    """-> function of a script: the options that its --help names."""
    known = {}

    def of(script):
        if script not in known:
            run = subprocess.run([sys.executable, str(ROOT / script), "--help"],
                                 capture_output=True, text=True, check=True)
            known[script] = set(re.findall(r"--[a-z0-9-]+", run.stdout))
        return known[script]

    return of


def test_every_script_and_option_of_the_readmes_commands_exists(options):
    scripts, used = set(), 0
    for command in COMMANDS:
        for part in command.split("&&"):
            words = shlex.split(part)
            script = next((word for word in words if word.endswith(".py")), None)
            if script is not None:
                scripts.add(script)
                asked = [word for word in words[words.index(script) :] if word.startswith("--")]
                used += len(asked)
                assert set(asked) <= options(script), command
    assert {"train.py", "evaluate.py", "data.py"} <= scripts and used > 8


def test_every_option_named_in_the_readmes_text_exists(options):
    known = set.union(*map(options, ("train.py", "evaluate.py", "data.py", "toy/glyph_beir.py")))
    named = set(re.findall(r"`(--[a-z0-9-]+)", README))
    assert len(named) > 5 and named <= known, named - known


def test_every_link_of_the_readme_leads_to_a_file():
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    links = [link for link in links if "://" not in link]
    assert len(links) > 10
    for link in links:
        path, _, section = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not section or f"\n## {section.capitalize()}\n" in (ROOT / path).read_text(), link


def test_every_row_of_the_fidelity_table_has_a_test_of_its_name():
    rows = set(re.findall(r"^\| (\d+) \|", README, re.M))
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert rows == {str(n) for n in range(1, 22)}
    assert rows == set(re.findall(r"def test_row_(\d+)_", tests))


def test_what_is_to_be_cited_is_the_paper_that_the_readme_links():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # required by its format
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors", "year"} <= set(paper) and len(paper["authors"]) == 6
    assert paper["url"] == re.search(r"https://arxiv.org/\S+(?=\))", README)[0]
    assert paper["title"].startswith("PUMA: Layer-Pruned ") and "\n" not in paper["title"]
    assert citation["title"] == README.splitlines()[0].removeprefix("# ")
