"""Try to break PUMA with hostile inputs, and with kills at random moments.

    python tests/break_it.py                                      # 10,000 cases and 50 kills
    python tests/break_it.py --sample                             # 300 and 2
    python tests/break_it.py --kind texts --seed 17 --cases 1     # that case again, with its log

A case ends well if the result is right, or if one line `error: ...` says what is wrong. Failing
are: a crash, a hang, a traceback, a wrong result, and any file changed or deleted that is not the
case's own output. Each runs in a forked child, in a folder of its own, on a copy of the repository.
A function named after a kind of case gets `rng`, from which all that is random follows, and `base`,
the folder of what cases share; it returns 0 if the result is right, else the exit status.
"""

import argparse
import contextlib
import faulthandler
import functools
import gc
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
               "TOKENIZERS_PARALLELISM": "false"}  # a process that forks must have one thread

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["train.py", "evaluate.py", "data.py", "toy/glyph_beir.py", "toy/pretrain.py",
           "toy/evidence.py"]
TINY = ["--model", "model", "--data", "data", "--keep-layers", 1, "--batch-size", 4, "--lr", 1e-3,
        "--checkpoint-every", 1, "--keep-checkpoints", 9]
SHORT = [*TINY, "--stage1-steps", 1, "--stage2-steps", 1, "--no-eval", "--workers", 0]
LONG = [*TINY, "--stage1-steps", 3, "--stage2-steps", 3, "--workers", 1, "--out", "run"]
EVALUATE = ["evaluate.py", "model", "--data", "data", "--out", "results"]


def module_of(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def snapshot(folder):
    """{path: (size, time of last change)} of all files below; caches may change."""
    found = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("cache", "__pycache__")]
        for path in (os.path.join(parent, name) for name in files):
            status = os.lstat(path)
            found[path] = status.st_size, status.st_mtime_ns
    return found


def command(script, *argv, changes=None, encoding="utf-8"):
    """Run a script's main() in this process -> (exit status, what it printed).

    AssertionError if it ends neither well nor with one line `error: ` (the checker: with a list of
    problems), or if a file that was there has changed, those below `changes` apart.
    """
    module, folder, status = module_of(script), os.getcwd(), 0
    before = snapshot(folder)
    sys.argv, sys.modules["__main__"] = [script, *map(str, argv)], module
    print("$", script, *(ascii(word[:99]) for word in sys.argv[1:]), flush=True)
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            module.main()
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        printed, said = [(s.flush(), s.buffer.getvalue().decode(encoding))[1] for s in (out, err)]
        print(printed, said, sep="\n", flush=True)
    errors = re.findall(r"(?:^|\r)((?:\w+\.py: )?error: .+)", said, re.MULTILINE)
    assert status in (0, 1, 2) and "Traceback" not in said, f"{script}: exit status {status}"
    if status and (script, status) != ("data.py", 1):
        assert len(errors) == 1, f"{script}: {len(errors)} lines `error: `, exit status {status}"
    os.chdir(folder)
    now, own = snapshot(folder), f"{folder}/{changes}"
    harmed = [path for path in before if now.get(path) != before[path] and not (
        changes and path.startswith(own))]
    assert not harmed, f"{script}: changed or deleted {harmed[0]}"
    return status, "\n".join([printed, *errors])


def fork(function, log, limit):
    """Call function() in a child with its own process group -> its pid. It exits with 0 for 0, 3
    for another status, 1 after an exception; after `limit` seconds SIGALRM ends it."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))  # more memory is an error
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", 1, errors="backslashreplace", closefd=False)
                                  for number in (1, 2))
        faulthandler.enable()
        faulthandler.register(signal.SIGALRM, chain=True)  # says where it hangs, then ends it
        signal.alarm(limit)
        status = 3 if function() else 0
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:  # whatever came, a child never goes on with its parent's code
        os._exit(status)


def copy(base, *names):
    for name in names:
        shutil.copytree(base / name, name, ignore=shutil.ignore_patterns("cache"))


# ---- faults --------------------------------------------------------------------------------------

JUNK = [None, True, 0, -1, 7, 10**400, float("inf"), float("nan"), 0.5, "", " ", "x", "$x_$", "\0",
        "\ud800", "\x1b[31m", "text", "video", "10:1", "10:99", "1:" + "9" * 30, "../out.png",
        "/etc/passwd", [], ["10:1", 5], ["10:999"], {}, {"did": "10:1"}]
BYTES = [b"", b"\n", b"[]", b"{}", b"null", b"x", b"-1", b"0", b"1e9", b"9" * 30, b"\xff", b"10:99",
         b"text", b"video", b"[" * 9999, b"\0", b"\xef\xbb\xbf{}"]


def damage(rng, data):
    """Bytes that are cut, have bits flipped, a piece repeated, or zeros at the end."""
    place, flipped = rng.randrange(len(data) + 1), bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        flipped[rng.randrange(rng.choice([len(data), min(len(data), 64)]))] ^= 1 << rng.randrange(8)
    return rng.choice([data[:place], bytes(flipped), bytes(flipped),
                       data[:place] + data[place // 2 :], data[:place] + bytes(len(data) - place)])


def change_json(rng, data):
    """JSON with one value, anywhere in it, replaced, removed or added."""
    value = whole = json.loads(data)
    while isinstance(value, dict) and value:
        key = rng.choice([*value])
        parent, value = value, value[key]
    if rng.random() < 0.2:
        del parent[key]
    parent[rng.choice([key, key, key, "auto_map", "unknown"])] = rng.choice(JUNK)
    return json.dumps(whole).encode() + b"\n"


def change_weights(rng, path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = rng.choice([*tensors])
    tensor = tensors.pop(name)
    save_file(tensors | rng.choice([{}, {f"{name}x": tensor}, {name: tensor[..., :-1].clone()},
                                    {name: tensor * float("nan")}]), path, {"format": "pt"})


def harm(rng, path):
    """One fault in a file, whatever it is: in a value, a line, some bytes, or the whole of it."""
    print("fault in", path)
    data, kind = path.read_bytes(), path.suffix
    if rng.random() < 0.1:  # something else of that name, or nothing
        path.unlink()
        rng.choice([lambda: None, path.mkdir, lambda: os.mkfifo(path), path.touch,
                    lambda: path.symlink_to("/etc/passwd")])()
    elif kind == ".png":
        path.unlink()
        write_image(rng, path)
    elif kind == ".safetensors" and rng.random() < 0.7:
        change_weights(rng, path)
    elif kind in (".json", ".jsonl", ".txt", ".tsv"):
        lines = [data] if kind == ".json" else data.splitlines(keepends=True)
        place, part = rng.randrange(len(lines)), rng.random()
        line = lines[place]
        if part < 0.15:
            lines[place] = rng.choice([damage(rng, line), line + line, b"\xff" + line])
        elif part < 0.3:
            lines[place] = rng.choice(BYTES) + b"\n"
        elif kind in (".json", ".jsonl"):
            lines[place] = change_json(rng, line)
        else:
            fields = re.split(rb"([\t ])", line.rstrip(b"\n"))
            fields[rng.randrange(len(fields))] = rng.choice(BYTES)
            lines[place] = b"".join(fields) + b"\n"
        path.write_bytes(b"".join(lines))
    else:
        path.write_bytes(damage(rng, data))


# ---- images and texts ----------------------------------------------------------------------------


def picture(rng):
    """An image of a random mode and size, and whether it shows a ramp of grey, mean 128."""
    size = rng.choice([(28, 28)] * 6 + [(1, 1), (1, 300), (57, 11), (28, 5600), (5601, 28)])
    mode, grey = rng.choice(Image.MODES), Image.linear_gradient("L").resize(size)
    if size == (1, 1):  # one pixel is no ramp: a palette, say, has no middle grey
        return grey.convert("RGB"), False
    if mode.startswith("I;16"):
        deep = np.asarray(grey).astype(">u2" if mode == "I;16B" else "<u2") * 257
        return Image.frombytes(mode, size, deep.tobytes()), True
    with contextlib.suppress(ValueError):  # some modes have no conversion; some grey means nothing
        if rng.random() < 0.8:
            return grey.convert("RGB").convert(mode), mode not in ("I", "F", "HSV", "LAB")
    return Image.new(mode, size), False


def exif(rng):
    """EXIF data whose tags have random types, counts and values."""
    tags = [274, 282, 296, 306, 34665, 34853, 36864, 40962, rng.randrange(65536)]
    rows = [struct.pack("<HHII", tag, rng.randrange(14), rng.choice([0, 1, 1, 2, 9, 1 << 31]),
                        rng.choice([0, 1, 3, 6, 8, 26, 1 << 31]))
            for tag in sorted(rng.sample(tags, rng.randint(1, 6)))]
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(rows)) + b"".join(rows) + bytes(40)


def write_image(rng, path):
    """A hostile image, or something else of that name -> whether it shows the ramp."""
    if rng.random() < 0.07:
        outside = Path("outside.png").resolve()
        Image.new("RGB", (28, 28)).save(outside)
        rng.choice([path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path.name),
                    lambda: path.symlink_to(outside), lambda: path.symlink_to("/dev/zero"),
                    lambda: socket.socket(socket.AF_UNIX).bind(str(path))])()
        return False
    (image, grey), more, buffer = picture(rng), {}, io.BytesIO()
    if rng.random() < 0.3:
        more = {"exif": exif(rng)}
    elif rng.random() < 0.2:
        frames = [image.copy(), Image.new(image.mode, rng.choice([image.size, (3, 3)]))]
        more, grey = {"save_all": True, "append_images": frames}, False
    kinds = ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"] * 4 + sorted(Image.SAVE)
    for kind in [*rng.sample(kinds, 20), "PNG"]:
        buffer.seek(0), buffer.truncate()
        with contextlib.suppress(Exception):  # this format cannot hold this picture
            image.save(buffer, kind, **more)
            break
    if image.mode.startswith("I;16") and kind not in ("PNG", "TIFF"):
        grey = False  # Pillow clips what is above 255 when it writes
    data = buffer.getvalue()
    if kind == "PNG" and rng.random() < 0.2:  # an enormous size, or none, in the header
        size = [rng.choice([0, 1, 9000, 60000, (1 << 31) - 1]) for _ in range(2)]
        head = b"IHDR" + struct.pack(">II", *size) + data[24:29]
        data, grey = data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:], False
    elif rng.random() < 0.5:
        data, grey = damage(rng, data), False
    path.write_bytes(data)
    return grey


def images(rng, base):
    """`load_image` reads or names a file; the checker, training and `encode` agree with it."""
    from support.items import load_image, load_video

    copy(base, "data")
    path, image, status = Path("data/mbeir_images/0.png"), None, 0
    path.unlink()
    grey = write_image(rng, path)
    with contextlib.suppress(ValueError):
        image = load_image(path)
        means = np.asarray(image).mean((0, 1))
        assert image.mode == "RGB" and (not grey or abs(means - 128).max() < 25), means
        assert abs(PUMA_BASE.encode(path).norm() - 1) < 1e-3
    for load in (load_image, load_video):
        try:
            load(path)
        except ValueError as error:
            assert str(path) in str(error), f"{load.__name__} names no file: {error}"
    readable = image is not None and path.resolve().is_relative_to(Path("data").resolve())
    status, text = command("data.py", "data", "--images", "full")
    assert (status == 0) == readable, f"read: {readable}, but the checker: {text[-200:]}"
    assert not readable or command("data.py", "data")[0] == 0, "its header was called bad"
    if rng.random() < 0.15:
        status, text = command("train.py", *SHORT, "--model", base / "model", "--batch-size", 18,
                               "--workers", rng.randrange(2), "--out", "run")
        assert (status == 0) == readable, f"read: {readable}, but the training: {text[-200:]}"
        assert readable or "0.png" in text, f"no file is named: {text[-200:]}"
    return status


def hostile_text(rng):
    """Pieces that have broken something somewhere, and any characters."""
    pieces = ["a red square", "$", "$x_{$", "\\frac", "\x1b[31m", "\x1b]0;t\x07", "\0", "\r",
              "\x85", "\u1e19", "\ud800", "\udcff", "\u202e", "\u2028", "\ufeff", "\n", "\t", "|",
              "<|im_end|>", "<|image_pad|>", "[RET]", "<b>", "`", "{}", "%s", "--help", "\uffff",
              "e\u0301" * 9, "\U0001f469\u200d\U0001f680", "\u0627\u0644", "\x9b1m", "\"'", "~/.."]
    parts = rng.choices(pieces, k=rng.randint(0, 4))
    parts += [chr(rng.randrange(0x110000)) for _ in range(rng.randint(0, 5))]
    rng.shuffle(parts)
    return "".join(parts) * rng.choice([1] * 12 + [30, 3000])


def texts(rng, base):
    """A text gives a unit vector or a ValueError; the gallery, a search, a console survive it."""
    from support.pictures import draw_gallery

    text, status = hostile_text(rng), 0
    try:
        image = Image.new("RGB", (28, 28))
        vector = PUMA_BASE.encode(rng.choice([text, {"text": text}, {"text": text, "image": image},
                                              {"text": "a", "instruction": text}]))
        assert abs(vector.norm() - 1) < 1e-3, vector
    except ValueError:
        status = 2
    if rng.random() < 0.25:
        draw_gallery("a.png", [("query", {"text": text}, [("0.9", {"text": text}, None)])])
    if rng.random() < 0.4:
        raw = text.encode("utf-8", "surrogatepass").replace(b"\0", b"")
        name = raw.replace(b"/", b"_")[: rng.choice([20, 200])] + b".txt"
        Path("pool").mkdir()
        Path("pool/b.txt").write_text("b")
        Path("pool", os.fsdecode(name)).write_bytes(rng.choice([raw, b"c", b"\xff" + raw]))
        query = rng.choice(["b", text.replace("\0", "")])
        _, shown = command("evaluate.py", base / "model", f"--query={query}", "--pool", "pool",
                           "--out", "found", *rng.choice([[], ["--skip-bad"]]),
                           encoding=rng.choice(["utf-8", "ascii", "latin-1", "cp1252"]))
        assert "codec can" not in shown, f"the console's encoding lost it: {shown[-200:]}"
        raw = [letter for letter in shown if not letter.isprintable() and letter != "\n"]
        assert not raw, f"control characters on the terminal: {raw[:5]}"
    return status


# ---- folders: M-BEIR, models, runs ---------------------------------------------------------------


def write_data(folder):
    """A small M-BEIR directory: six things as text, image and both; tasks 0, 3 and 8."""
    kinds, lines = ["text", "image", "image,text"], {}
    tasks = {0: ("text", "image"), 3: ("image", "text"), 8: ("image,text", "image,text")}

    def content(i, kind, text, image):
        return {text: f"thing {i}" if "text" in kind else None,
                image: f"mbeir_images/{i}.png" if "image" in kind else None}

    def did(i, kind):
        return f"10:{6 * kinds.index(kind) + i + 1}"

    pool = [{**content(i, kind, "txt", "img_path"), "modality": kind, "did": did(i, kind)}
            for kind in kinds for i in range(6)]
    every, prompts = [], ["query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1"]
    for task, (kind, target) in tasks.items():
        rows = [{**content(i, kind, "query_txt", "query_img_path"), "query_modality": kind,
                 "qid": f"10:{10 * task + i + 1}", "neg_cand_list": [], "task_id": task,
                 "pos_cand_list": [did(i, target)]} for i in range(6)]
        every += rows
        name = f"mbeir_glyph_task{task}"
        lines[f"query/test/{name}_test.jsonl"] = map(json.dumps, rows)
        lines[f"cand_pool/local/{name}_cand_pool.jsonl"] = [
            json.dumps(row) for row in pool if row["modality"] == target]
        lines[f"qrels/test/{name}_test_qrels.txt"] = [
            f"{row['qid']} 0 {row['pos_cand_list'][0]} 1 {task}" for row in rows]
        prompts.append(f"{kind}\t{target}\tGlyphBEIR\t10\tFind it")
    for split in ("train", "test"):
        lines[f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl"] = map(json.dumps, pool)
    lines["query/union_train/mbeir_union_up_train.jsonl"] = map(json.dumps, every)
    lines["instructions/query_instructions.tsv"] = prompts
    for path, rows in lines.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(row + "\n" for row in rows))
    (folder / "mbeir_images").mkdir()
    for i in range(6):
        image = Image.linear_gradient("L").resize((28, 28)).rotate(60 * i)
        image.save(folder / f"mbeir_images/{i}.png")


def directories(rng, base):
    """What the checker calls right can be trained and evaluated on; else a file is named."""
    copy(base, "data")
    for path in rng.sample(sorted(Path("data").rglob("*.*")), rng.choice([1, 1, 1, 2])):
        harm(rng, path)
    status, text = command("data.py", "data", "--images", "full")
    assert status != 1 or re.search(r"^data/\S*: ", text, re.MULTILINE), "no file is named"
    if status == 0 or rng.random() < 0.05:
        trained, _ = command("train.py", *SHORT, "--model", base / "model", "--out", "run")
        scored, _ = command("evaluate.py", base / "model", *EVALUATE[2:])
        assert status or not trained and not scored, "0 problems, but then an error"
    return status


def run_folders(rng, base):
    """--resume refuses a run's folder with a fault, or gives the undisturbed run's bits."""
    copy(base, "run", "data", "model")
    files = [path for path in sorted(Path("run").rglob("*.*")) if path.is_file()]
    path = rng.choice([Path("run/config.json"), Path("run/metrics.jsonl"), *files])
    if "checkpoints" in path.parts and rng.random() < 0.3:
        shutil.copy(base / "other" / path.relative_to("run"), path)  # of a run with another seed
    elif "checkpoints" in path.parts and rng.random() < 0.1:
        shutil.rmtree(path.parent)
    else:
        harm(rng, path)
    status, _ = command("train.py", "--resume", "run", changes="run/")
    if status == 0:
        wanted = (base / "right/model.safetensors").read_bytes()
        same = Path("run/model/model.safetensors").read_bytes() == wanted
        assert same, f"another result, silently: fault in {path}"
    return status


def model_folders(rng, base):
    """A model's folder with a fault is refused, wherever it is used."""
    copy(base, "model", "data")
    harm(rng, rng.choice([Path("model/model.safetensors"), *sorted(Path("model").iterdir())]))
    other = ["--model", base / "model", "--teacher", "model"]
    return command(*rng.choice([EVALUATE, [*EVALUATE, "--query", "thing 1"], [
        "train.py", *SHORT, "--out", "out"], ["train.py", *SHORT, *other, "--out", "out"]]))[0]


# ---- options -------------------------------------------------------------------------------------

VALUES = ["0", "-1", "nan", "inf", "-inf", "1e9", "1000000000", "1" + "0" * 400, "", " ", "x",
          "file", "file/x", "none/x", "/proc/x", "\udcff", "1e-300", "0.5", "1,2", "0,", ",",
          "\x1b[31m", "a" * 5000, "data", "model", "cuda", "cuda:99", "meta", "..", "/", "None"]
STARTS = {"train.py": [*SHORT, "--out", "run"], "evaluate.py": [*EVALUATE[1:], "--limit", 2],
          "data.py": ["data"]}
WRONG = {  # what would be right here takes minutes: one bad value always
    "toy/glyph_beir.py": ["--seed=x", "--out=file", "--out=/proc/x", "--seed=nan"],
    "toy/evidence.py": ["--workers=0", "--workers=-1", "--workers=x", "--work=file",
                        "--work=/proc/x", "x"],
    "toy/pretrain.py": ["--steps=0", "--steps=-1", "--batch-size=0", "--lr=nan", "--lr=inf",
                        "--lr=-1", "--data=", "--data=file", "--out=model", "--work=/proc/x"]}


def options(rng, base):
    """Random values: an error that leaves nothing, within seconds, or a run that works."""
    copy(base, "data", "model")
    Path("file").touch()
    script = rng.choice(["train.py", "evaluate.py"] * 4 + SCRIPTS)
    module, out = module_of(script), io.StringIO()
    sys.argv = [script, "--help"]
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        module.main()
    names = re.findall(r"^  (--[\w-]+)( [A-Z{])?", out.getvalue(), re.MULTILINE)
    argv = STARTS.get(script, ["--out=out"] if script != "toy/evidence.py" else [])
    for name, value in rng.sample(names, min(len(names), rng.choice([1, 1, 2, 3]))):
        argv = [*argv, f"{name}={rng.choice(VALUES)}" if value else name]
    argv = argv + [rng.choice(WRONG[script])] if script in WRONG else argv
    before = set(snapshot("."))
    status, _ = command(script, *argv)
    left = sorted(set(snapshot(".")) - before)
    stopped = any(path.endswith("metrics.jsonl") for path in left)  # later: by a loss, say
    assert status == 0 or not left or stopped, f"an error, but it left {left[0]}"
    return status


# ---- kills ---------------------------------------------------------------------------------------

COMMANDS = {"train": ["train.py", *LONG], "train with LoRA": ["train.py", *LONG, "--lora-rank", 4],
            "evaluate": EVALUATE, "write data": ["toy/glyph_beir.py", "--out", "glyph"]}
PHASES = [  # the command, what it has written when it is killed, seconds after that at most
    ("train", "started", 0.6), ("train", "run/metrics.jsonl", 0.2),
    ("train", "run/checkpoints/stage2*", 0.3), ("train", "run/checkpoints/*.tmp*", 0.01),
    ("train", "run/model.tmp*", 0.03), ("train", "run/model/config.json", 0.8),
    ("evaluate", "started", 0.6), ("evaluate", "model/cache/*", 0.1), ("evaluate", "results", 0.1),
    ("write data", "glyph*", 4.0)]


def results_of(folder):
    """{file: what a kill may not change}: bits, but of results.json all except times."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder)
        if path.name == "results.json":
            found[name] = re.sub(r'"(items_per_s|latency_ms)": [\d.e-]+', "", path.read_text())
        elif name.match("run/model/*.safetensors") or name.parts[0] == "glyph" and path.is_file():
            found[name] = zlib.crc32(path.read_bytes())
    return found


def kills(rng, base):
    """Kill a command at a random moment and give it again: the result is the undisturbed one's."""
    name, marker, wait = rng.choice(PHASES)
    if name == "train" and importlib.util.find_spec("peft"):
        name = rng.choice(["train", "train with LoRA"])
    script, number = COMMANDS[name][0], rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    kill, about = rng.choice([os.kill, os.killpg]), f"{name}, {number.name} at {marker}"
    copy(base, "data", "model")
    first = Path(f"{Path.cwd()}.first.log")
    pid = fork(lambda: (Path("started").touch(), command(*COMMANDS[name]))[1][0], first, 60)
    while not any(Path().glob(marker)) and os.waitid(
            os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)
    time.sleep(0.02 + wait * rng.random())
    kill(pid, number)
    status = os.waitpid(pid, 0)[1]
    log = first.read_text(errors="replace")
    print(f"{about}, by {kill.__name__}: status {status:#x}", log, flush=True)
    assert os.WTERMSIG(status) != signal.SIGALRM, f"{about}: it went on"
    changes = {"train.py": "run/", "evaluate.py": "results"}.get(script, "glyph.tmp")
    status, text = command(*COMMANDS[name], changes=changes)
    if status and "--resume" in text:
        status, text = command(script, "--resume", "run", changes=changes)
    found, right = results_of("."), results_of(base / "undisturbed" / name)
    assert status == 0 or "exists" in text and found == right, f"{about}, then {text[-200:]}"
    wrong = [str(path) for path in right if found.get(path) != right[path]]
    assert not wrong, f"{about}: not the undisturbed result: {wrong}"
    left = [str(path) for path in Path().rglob("*.tmp*")]
    assert not left, f"{about}: left behind {left[0]}"
    shown = number != signal.SIGKILL and re.search(r"Traceback.*?/repository/", log, re.DOTALL)
    assert not shown, f"{about}: a traceback"
    return 0


# ---- all of it -----------------------------------------------------------------------------------

SHARES = {texts: 44, images: 16, directories: 12, options: 20, model_folders: 5, run_folders: 3}
KINDS = {kind.__name__: kind for kind in (*SHARES, kills)}


def prepare(work, killing):
    """Copy the repository, import it from there, make what cases share -> its folder."""
    global PUMA_BASE
    base, repository = work / "shared/base", work / "shared/repository"
    shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(
        ".*", "runs", "results", "data", "cache", "__pycache__", "shared"))
    sys.path.insert(0, str(repository))
    import torch

    torch.set_num_threads(1)
    for script in SCRIPTS:
        module_of(script)
    from puma import PUMA
    from support import run

    run.measure_peak = lambda device, size=0: 1e12  # a second of matrix products, just for the MFU
    torch.compile = functools.partial(torch.compile, backend="eager")  # C++ takes a minute
    Image.init()
    write_data(base / "data")
    shutil.copytree(base / "data", repository / "data/glyph_beir")
    tiny = PUMA.from_pretrained(repository / "toy/tiny-qwen2-vl", keep_layers=2)
    tiny.save_pretrained(base / "model")
    PUMA_BASE = PUMA.from_pretrained(base / "model").eval()

    def make():
        os.chdir(base)
        for name, seed in (("run", 0), ("other", 1)):  # as if killed before the last step
            argv = [*SHORT, "--stage2-steps", 2, "--seed", seed, "--out", name]
            assert command("train.py", *argv)[0] == 0
            Path(name, "model").rename("right" if seed == 0 else "wrong")
            shutil.rmtree(f"{name}/checkpoints/stage2-step000002")
        for name in COMMANDS if killing else ():
            if "LoRA" in name and not importlib.util.find_spec("peft"):
                continue
            (base / "undisturbed" / name).mkdir(parents=True)
            os.chdir(base / "undisturbed" / name)
            copy(base, "data", "model")
            assert command(*COMMANDS[name])[0] == 0

    if os.waitpid(fork(make, work / "base.log", 300), 0)[1]:  # a child: autograd starts threads
        sys.exit((work / "base.log").read_text())
    shutil.copytree(work / "shared", work / "intact")  # with the files' times
    return base


def case(kind, seed, base, before, folder):
    """One case, in its folder; it may not change what cases share, nor the repository."""
    folder.mkdir()
    os.chdir(folder)
    random.seed(seed)
    try:
        return kind(random.Random(f"{kind.__name__} {seed}"), base)
    finally:
        now = snapshot(base.parent)
        harmed = [path for path in before if now.get(path) != before[path]]
        for path in map(Path, harmed):  # for the cases to come
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(base.parents[1] / "intact" / path.relative_to(base.parent), path)
        assert not harmed, f"changed or deleted {harmed[0]}"


def run_cases(kinds, first_seed, work):
    """Run the cases, one a core at a time -> Counter of (kind, how it ended), failing lines."""
    base = prepare(work, kills in kinds)
    before = snapshot(base.parent)
    gc.collect(), gc.freeze()  # children share these objects' memory
    jobs, counts, failing, running = enumerate(kinds, first_seed), Counter(), [], {}
    while True:
        while len(running) < os.cpu_count() and (job := next(jobs, None)):
            seed, kind = job
            folder = work / f"case-{seed}"
            call = functools.partial(case, kind, seed, base, before, folder)
            running[fork(call, f"{folder}.log", 240 if kind is kills else 60)] = kind, seed, folder
        if not running:
            return counts, failing
        pid, status = os.wait()
        kind, seed, folder = running.pop(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # whatever it has left running
        end = {0: "right", 3: "clear error"}.get(os.waitstatus_to_exitcode(status), "failing")
        counts[kind, end] += 1
        log = Path(f"{folder}.log").read_text(errors="replace").strip()
        if len(kinds) == 1:
            print(log)
        if end == "failing":
            reason = log.splitlines()[-1] if log else ""
            if os.WIFSIGNALED(status):  # SIGALRM: it hung
                commands = [line for line in log.splitlines() if line.startswith("$")]
                reason = f"{signal.Signals(os.WTERMSIG(status)).name} in {commands[-1:]}"
            failing.append(f"--kind {kind.__name__} --seed {seed} --cases 1 --kills 1: {reason}")
        shutil.rmtree(folder, ignore_errors=True)
        os.unlink(f"{folder}.log")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="hostile inputs")
    parser.add_argument("--kills", type=int, default=50, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; then 1 more each")
    parser.add_argument("--kind", choices=KINDS, help="only these")
    parser.add_argument("--sample", action="store_true", help="--cases 300 --kills 2")
    args = parser.parse_args()
    count, killed = (300, 2) if args.sample else (args.cases, args.kills)
    kinds = random.Random(args.seed).choices([*SHARES], [*SHARES.values()], k=count)
    kinds += [kills] * killed
    if args.kind:
        kinds = [KINDS[args.kind]] * (killed if args.kind == "kills" else count)
    work, started = Path(tempfile.mkdtemp(prefix="break_it_")), time.perf_counter()
    try:
        counts, failing = run_cases(kinds, args.seed, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{'kind':<16}{'tried':>8}{'clear error':>13}{'right':>8}{'failing':>9}")
    for kind in dict.fromkeys(kinds):
        ends = [counts[kind, end] for end in ("clear error", "right", "failing")]
        print(f"{kind.__name__:<16}{sum(ends):>8}{ends[0]:>13}{ends[1]:>8}{ends[2]:>9}")
    print(*sorted(line[:300] for line in failing), sep="\n")
    print(f"{len(failing)} failing of {len(kinds)}, {time.perf_counter() - started:.0f} s")
    sys.exit(1 if failing else 0)


if __name__ == "__main__":
    main()
