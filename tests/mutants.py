"""Mutation check: make one small mistake at a time in a file, and see whether a test notices it.

    python tests/mutants.py mac_loss.py                    # with tests/test_mac_loss.py
    python tests/mutants.py support/files.py --tests tests/test_data.py
    python tests/mutants.py mac_loss.py --list             # only say what would be changed

Run it in the repository's root, on Linux. It prints each mistake that no test notices as
file:line:column and `old -> new`: a test is missing, or the change makes no difference. Raise
statements, `main` and what stands under `if __name__ == "__main__"` stay as they are. The tests run
in a temporary copy of the files that git does not ignore; the working tree is never written to.
"""

import argparse
import ast
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXACT = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In,
         ast.Is: ast.IsNot, ast.IsNot: ast.Is}  # where to swap is to negate
SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Add: ast.Sub,
         ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
         ast.Pow: ast.Mult, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
         ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, **EXACT}


def mistakes(node):
    """Pairs (old node, new node): what can be done wrong at this node of a tree and under it."""
    def changed(**fields):
        return node, type(node)(**vars(node) | fields)

    script = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    if script or isinstance(node, ast.Raise) or getattr(node, "name", None) == "main":
        return
    for i, op in enumerate(getattr(node, "ops", [])):  # a comparison, maybe a < b < c
        yield changed(ops=[*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1 :]])
    op = type(getattr(node, "op", None))
    if op in SWAPS:
        yield changed(op=SWAPS[op]())
    if op in (ast.Not, ast.USub, ast.Invert):
        yield node, node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield changed(value=not node.value if isinstance(node.value, bool) else node.value + 1)
    if isinstance(node, ast.Return) and node.value and getattr(node.value, "value", 0) is not None:
        yield changed(value=ast.Constant(None))
    for field in ("id", "attr", "arg"):  # min(x), x.min(), x.clamp(min=0)
        if getattr(node, field, None) in ("min", "max"):
            yield changed(**{field: "max" if getattr(node, field) == "min" else "min"})
    conditions = [node.test] if isinstance(node, ast.If | ast.IfExp) else getattr(node, "ifs", [])
    for test in conditions:
        operators = getattr(test, "ops", [getattr(test, "op", None)])
        if not isinstance(operators[0], (ast.Not, *EXACT)):  # those are negated above
            yield test, ast.UnaryOp(ast.Not(), test)
    for child in ast.iter_child_nodes(node):
        yield from mistakes(child)


def replace(tree, old, new):
    """Put the node `new` where `old` is in the tree; return the tree."""
    transformer = ast.NodeTransformer()
    transformer.visit = lambda node: new if node is old else transformer.generic_visit(node)
    return transformer.visit(tree)


def tests_pass(folder, tests, limit):
    """Whether the tests pass in the copy `folder`; after `limit` seconds they have failed.

    A forked process runs them: it has the slow packages already, and none of the project's files.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()  # a process group, so that what the tests start is ended with them
            signal.setitimer(signal.ITIMER_REAL, limit)  # then the system ends this process
            resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))  # a mistake may be greedy
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            os.chdir(folder)
            sys.path[:1] = [str(folder), str(folder / "tests")]  # instead of this script's folder
            options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}.tmp"]
            code = importlib.import_module("pytest").main([*options, *tests])
        finally:
            os._exit(code)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    finally:
        os.killpg(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="the file to make mistakes in")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="default: tests/test_SOURCE")
    parser.add_argument("--list", action="store_true", help="only list the mistakes")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th one")
    parser.add_argument("--only", metavar="FUNCTION", help="only those in this function")
    args = parser.parse_args()
    tests = args.tests or [f"tests/test_{Path(args.source).name}"]
    tree = ast.parse(Path(args.source).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if getattr(node, "name", None) == args.only]
    pairs = [pair for root in (functions if args.only else [tree]) for pair in mistakes(root)]
    mutants = [(f"{args.source}:{old.lineno}:{old.col_offset + 1}: "
                f"{ast.unparse(old)} -> {ast.unparse(new)}", old, new)
               for old, new in pairs[:: args.every]]
    if args.list:
        print(*[name for name, *_ in mutants], f"{len(mutants)} mutants", sep="\n")
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True  # or a .pyc of the mutant before might be taken for this one's
    for name in ("torch", "transformers", "matplotlib.pyplot", "pytest"):  # slow: done only once
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "copy"
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.check_output(command, text=True).split("\0")
        for name in filter(os.path.isfile, listed):  # what was deleted is listed too
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, folder / name)
        copied, started = folder / args.source, time.monotonic()
        copied.write_text(ast.unparse(tree), encoding="utf-8")
        if not tests_pass(folder, tests, limit=3600):
            sys.exit(f"{' '.join(tests)}: must pass with {args.source} unchanged (in a copy of the "
                     "files that git does not ignore, its comments left out), but do not")
        limit, survivors = 10 + 5 * (time.monotonic() - started), 0
        for number, (name, old, new) in enumerate(mutants, start=1):
            copied.write_text(ast.unparse(replace(tree, old, new)), encoding="utf-8")
            replace(tree, new, old)
            if tests_pass(folder, tests, limit):
                survivors += 1
                print("survived", name, flush=True)
            print(f"{number} of {len(mutants)}", end="\r", file=sys.stderr, flush=True)
    print(f"killed {len(mutants) - survivors} of {len(mutants)}")


if __name__ == "__main__":
    main()
