"""The promises of README.md and of the house style, kept by a test."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MODEL, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BUDGETS = {"mac_loss.py": 150, "prune_distill.py": 220, "puma.py": 350, "data.py": 300,
           "train.py": 380, "evaluate.py": 380}
COMMANDS = [" ".join(line.split()) for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("name", BUDGETS)
def test_files_keep_their_length_and_functions_fit_a_screen(name):
    source = (ROOT / name).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= BUDGETS[name]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{node.name} has more than 50 lines"


@pytest.mark.parametrize("name", BUDGETS)
def test_public_functions_have_docstrings(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    trivial = {"main", "arg", "move", "random_state", "load", "pool", "device", "train"}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            short = len(node.body) == 1
            assert ast.get_docstring(node) or short or node.name in trivial, node.name


def test_the_readmes_two_commands_set_everything_up_and_ci_runs_the_second():
    setup = "python -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    assert COMMANDS[0] == setup + "python train.py"
    assert COMMANDS[1] == setup + "python -m pytest -q tests"
    assert COMMANDS[1] in (ROOT / ".ci/run").read_text().splitlines()


def test_every_script_and_option_of_the_readme_exists():
    helps = {}
    used = 0
    for command in COMMANDS:
        for part in command.split("&&"):
            words = shlex.split(part)
            script = next((word for word in words if word.endswith(".py")), None)
            if script is None:
                continue
            if script not in helps:
                run = subprocess.run([sys.executable, str(ROOT / script), "--help"],
                                     capture_output=True, text=True, check=True)
                helps[script] = run.stdout
            for word in words[words.index(script) :]:  # what stands before is torchrun's
                if word.startswith("--"):
                    used += 1
                    assert word in helps[script], f"{script} has no option {word}"
    assert set(helps) == {"train.py", "evaluate.py", "data.py", "prune_distill.py"} and used > 8


def test_every_option_named_in_the_text_exists():
    from train import Config

    names = {f"--{name.replace('_', '-')}" for name in Config.__dataclass_fields__}
    known = names | {f"--no-{name[2:]}" for name in names}
    for script in ("evaluate.py", "data.py"):
        run = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True,
                             text=True, check=True)
        known |= set(re.findall(r"--[a-z0-9-]+", run.stdout))
    for option in re.findall(r"`(--[a-z0-9-]+)", README):
        assert option in known, option


def test_every_link_of_the_readme_leads_to_a_file():
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    links = [link for link in links if "://" not in link]
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_committed_model_is_small_and_safe():
    assert (MODEL / "model.safetensors").stat().st_size <= 6_000_000
    assert not [path for path in MODEL.iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]
    assert "python toy/pretrain.py" in (MODEL / "README.md").read_text()


def test_nothing_unsafe_is_loaded():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("toy/*.py"), *ROOT.glob("tests/*.py")]:
        if path.name == Path(__file__).name:
            continue
        source = path.read_text(encoding="utf-8")
        assert source.count("torch.load(") == source.count("weights_only=True"), path
        assert "trust_remote_code" not in source and "import pickle" not in source, path


def test_importing_a_file_has_no_side_effect(tmp_path):
    modules = [path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("toy/*.py")]]
    code = "import " + ", ".join(f"toy.{m}" if (ROOT / "toy" / f"{m}.py").exists() else m
                                 for m in modules)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "MPLCONFIGDIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "" and not [p for p in tmp_path.iterdir() if p.suffix != ".json"]


def test_row_19_nothing_imports_deepspeed_flashattention_or_needs_cuda():
    imported = set()
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert {"torch", "transformers"} <= imported
    assert not imported & {"deepspeed", "flash_attn", "accelerate", "torchvision", "triton"}


def test_every_row_of_the_fidelity_table_has_a_test_of_its_name():
    rows = set(re.findall(r"^\| (\d+) \|", README, re.M))
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert rows == {str(n) for n in range(1, 20)}
    assert rows == set(re.findall(r"def test_row_(\d+)_", tests))
