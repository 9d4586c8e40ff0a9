"""A training run's folder: config.json, metrics.jsonl, checkpoints/, and its stop signals.

Of several processes only the first one writes. A checkpoint is written beside its final name and
renamed when whole, so that neither a kill nor a full disk harms the one before.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from timeit import repeat

import torch
from filelock import FileLock, Timeout  # a package that torch itself needs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.backends.cuda import flash_sdp_enabled
from torch.compiler import set_stance
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from support import distributed
from support.files import new_folder, parse_lines, read_json, refuse, write_json, write_text
from support.items import regular

UNUSED = {".lock", "config.json", "config.json.tmp", "checkpoints"}  # a killed run's, with no step


class Run:
    """A run's folder, made or opened again: `with Run("runs/a", settings, decisive) as run: ...`

    name: "" takes the first free runs/puma-N. settings: what config.json is to hold; decisive:
    those of them that the result depends on; a begun run is continued only with the same. Until
    the end no other process can open the folder. A ValueError or OSError before the first step
    removes a folder made here. Raises ValueError if it is taken.
    """

    def __init__(self, name, settings=None, decisive=None, keep_checkpoints=2):
        self.decisive, self.keep_checkpoints = decisive or {}, keep_checkpoints
        self.writes, self.made = distributed.rank() == 0, False
        folder = self._claim(name, settings) if self.writes else None
        self.folder = distributed.gather_objects(folder)[0]
        self.metrics, self.checkpoints = self.folder / "metrics.jsonl", self.folder / "checkpoints"
        self.peak = float("inf")  # operations a second, for the MFU; see `measure_peak`
        # Within a stage, a stop waits for the end of the step, which is then saved.
        self.training = self.stopping = False
        self.how_to_continue = f"continue with: python train.py --resume {self.folder}"
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _claim(self, name, settings):
        for number in itertools.count(1):
            folder = Path(name or f"runs/puma-{number}")
            with contextlib.suppress(FileExistsError):  # of two processes, one makes it
                folder.mkdir(parents=True)
                self.made = True
            if self.made or name:
                break
        found = {path.name for path in folder.iterdir()} - UNUSED
        if found and not (folder / "config.json").exists():
            raise ValueError(f"--out {folder} exists and is no run: choose another")
        if found:  # a step is done
            old = read_json(folder / "config.json")
            self._compare(old, f"--out {folder} exists with another", "choose another folder")
        # A killed process has no lock any more; its workers may have it for 5 s, then they end.
        self.lock = FileLock(folder / ".lock", timeout=6)
        try:
            self.lock.acquire()
        except Timeout:
            raise ValueError(f"--out {folder} is in use by another process") from None
        if not found:
            write_json(folder / "config.json", settings or {})
        for left in (folder / "checkpoints").glob("*.tmp-*"):  # of a process that was killed
            shutil.rmtree(left)
        (folder / "checkpoints").mkdir(exist_ok=True)
        return folder

    def _compare(self, old, where, way_out):
        """ValueError naming the first of the decisive settings that differs from `old`."""
        for name, value in self.decisive.items():
            was = old.get(name, "missing") if isinstance(old, dict) else old
            if was != value:
                raise ValueError(f"{where} {name}: {was!r:.80}, now {value!r:.80}; {way_out}")

    def __enter__(self):
        return self

    def __exit__(self, _kind, error, _traceback):
        if self.writes:
            self.lock.release()
            if self.made and isinstance(error, ValueError | OSError) and not self.metrics.exists():
                shutil.rmtree(self.folder)

    def _stop(self, _number, _frame):
        if not self.training or self.stopping:  # asked twice: at once
            raise KeyboardInterrupt(f"; {self.how_to_continue}")
        self.stopping = True

    def log(self, row, items, flops, started, bar):
        """One line in metrics.jsonl; loss, items a second and MFU on the progress bar. MFU (model
        FLOPs utilisation): this process's `flops` of the step a second, over its `peak`."""
        if not self.writes:
            return
        row = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
        seconds = time.perf_counter() - started
        row["samples_per_s"] = speed = items / seconds
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        bar.set_postfix(loss=f"{row['loss']:.3f}", samples_s=f"{speed:.0f}",
                        mfu=f"{flops / seconds / self.peak:.0%}")

    def rows(self):
        """metrics.jsonl as dictionaries; a line cut off by a kill is left out."""

        def parse(line):
            row = json.loads(line)
            numbers = [row[name] for name in ("stage", "step", "contrastive", "hard_temperature")]
            if not all(isinstance(n, int | float) for n in [*numbers, row["distill"] or 0]):
                raise ValueError("some of them are no numbers")
            return row

        if not self.metrics.exists():
            return []
        whole = regular(self.metrics).read_bytes().count(b"\n")
        lines = parse_lines(self.metrics, parse, "a step of training, a JSON object",
                            lambda path, number, text: number > whole or refuse(path, number, text))
        return [row for *_, row in lines]

    def save(self, model, optimizer, schedule, stage, step):
        """Trainable weights (safetensors), optimizer, schedule, each process's random state.
        OSError if the disk is full; the checkpoints before stay."""
        random = [torch.get_rng_state(), torch.cuda.get_rng_state_all()]  # [] without a GPU
        state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                 "random": distributed.gather_objects(random)}
        folder = self.checkpoints / f"stage{stage}-step{step:06d}"
        if not self.writes or folder.exists():
            return
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        try:
            with new_folder(folder) as temporary:
                save_file(weights, temporary / "model.safetensors")
                torch.save(state, temporary / "state.pt")
                facts = {"settings": self.decisive, "sha256": _digest(temporary)}
                write_json(temporary / "checkpoint.json", facts)
        except (OSError, RuntimeError, SafetensorError) as error:
            text = str(error).splitlines()[0]
            raise OSError(f"cannot write {folder}: {text}; those before are whole") from error
        for old in self._saved()[: -self.keep_checkpoints]:
            shutil.rmtree(old)

    def _saved(self):
        return sorted(self.checkpoints.glob("stage[12]-step" + 6 * "[0-9]"))

    def position(self):
        """(stage, steps done in it) of the last checkpoint, (1, 0) without one. Drops later lines
        of metrics.jsonl: those steps will be done again. ValueError if the checkpoint is not, to
        the bit, what a run with these settings wrote."""
        done = 1, 0
        for folder in self._saved()[-1:]:
            way_out = f"delete {folder} to continue from the one before"
            facts = read_json(folder / "checkpoint.json")
            if facts.get("sha256") != _digest(folder):
                raise ValueError(f"{folder} is damaged: {way_out}")
            self._compare(facts.get("settings"), f"{folder} was trained with another", way_out)
            done = int(folder.name[5]), int(folder.name[-6:])
        if self.writes and self.metrics.exists():
            kept = [row for row in self.rows() if (row["stage"], row["step"]) <= done]
            write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        return done

    def load_weights(self, model):
        """The last checkpoint's weights into those of the model that are trained."""
        weights = load_file(self._saved()[-1] / "model.safetensors")
        model.load_state_dict(weights, strict=False)  # frozen weights are not in it

    def load_state(self, optimizer, schedule):
        """Bring optimizer, schedule and random numbers to where the last checkpoint left them."""
        state = torch.load(self._saved()[-1] / "state.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        cpu, gpu = state["random"][distributed.rank() % len(state["random"])]
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(gpu[: torch.cuda.device_count()])


def _digest(folder):
    """A checksum of a checkpoint's weights and state."""
    found = hashlib.sha256()
    for name in ("model.safetensors", "state.pt"):
        with regular(folder / name).open("rb") as file:
            hashlib.file_digest(file, lambda: found)  # goes on with `found`, block by block
    return found.hexdigest()


def prepared(make, steps, workers):
    """Yield make(step) of each of `steps`, prepared by `workers` processes. A ValueError of make is
    raised here as it was there; ChildProcessError if a worker is killed, for its memory, say."""
    # Its own generator: the loader's seeds would be drawn from the one that makes the dropout.
    loader = DataLoader(steps, batch_size=None, collate_fn=partial(_returned, make),
                        num_workers=workers, worker_init_fn=_ignore_stops,
                        generator=torch.Generator())
    found = iter(loader)
    if workers:  # torch's own handler would raise in the middle of a step when a worker dies
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for value in found:
            if isinstance(value, ValueError):
                raise value
            yield value
    except RuntimeError as error:
        raise ChildProcessError(str(error).splitlines()[0]) from error
    finally:
        del found  # ends the workers: they ignore what Python sends them at its exit, and waits for


def _returned(make, step):
    """make(step), or its ValueError: raised in a worker, a traceback would be wrapped around it."""
    try:
        return make(step)
    except ValueError as error:
        return error


def _ignore_stops(_worker):
    """A signal to all of a run's processes stops the first one, and that one its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def count_flops(function, *args):
    """Floating-point operations of a call, forward and backward; a multiply-add is 2."""
    # torch does not count the fused attention of a CPU. The plain one rounds differently, so a
    # counted step must not be one of the training. Nor does it look into compiled layers.
    with (sdpa_kernel(SDPBackend.MATH), set_stance("force_eager"),
          FlopCounterMode(display=False) as counter):
        function(*args)
    return counter.get_total_flops()


def autocast(device):
    """Matrix products in bfloat16 (weights stay float32): on GPUs, and on CPUs that have them in
    hardware (AVX-512 BF16), where a product takes a quarter of the time."""
    hardware = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=hardware)


def float32_attention(layer, query, key, value, attention_mask, **options):
    """PyTorch's own attention, in float32 even where autocast asks for bfloat16."""
    # The backward pass of a CPU's fused attention is seven times slower in bfloat16, and would eat
    # up all that the matrix products gain there.
    states = query.float(), key.float(), value.float()
    with torch.autocast(query.device.type, enabled=False):
        out, weights = sdpa_attention_forward(layer, *states, attention_mask, **options)
    return out.to(query.dtype), weights


def packed_attention(layer, query, key, value, attention_mask, *, cu_seq_lens_q, max_length_q, **_):
    """The vision tower's: a patch looks at those of its own frame, whose ends `cu_seq_lens_q` are.
    PyTorch's FlashAttention takes all frames in one call; transformers alone makes one a frame."""
    packed = (states[0].transpose(0, 1) for states in (query, key, value))  # (P, heads, width)
    lengths = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    return varlen_attn(*packed, *lengths)[None], None


def choose_attention(tower):
    """Let a vision tower use the fastest attention that there is for it, here and now."""
    kind, name = tower.device.type, "sdpa"
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tower.dtype
    if kind == "cuda" and dtype.itemsize == 2 and flash_sdp_enabled() and (
            torch.cuda.get_device_capability(tower.device) >= (8, 0)):  # none for older GPUs
        name = "packed_flash"  # by "flash" transformers knows that it takes the frames' ends
    # Not by set_attn_implementation: that looks for a package behind a name with "flash" in it.
    tower.config._attn_implementation = "float32" if kind == "cpu" else name


def compile_layers(model):
    """Let torch fuse what a layer does between its products; -> the model. A first batch then takes
    half a minute. Not the last layer: hooks let it do the last position alone."""
    if not any(map(shutil.which, ("cc", "gcc", "clang", "cl"))):
        raise ValueError("--compile needs a C compiler, such as gcc, on the PATH")
    # One program for batches of any shape, another with gradient, autocast, mask: torch ends at 8.
    torch._dynamo.config.recompile_limit = 64
    for layer in [*model.backbone.visual.blocks, *model.backbone.language_model.layers[:-1]]:
        layer.compile(dynamic=True)
    return model


AttentionInterface.register("packed_flash", packed_attention)
AttentionInterface.register("float32", float32_attention)
AttentionMaskInterface.register("float32", sdpa_mask)  # a name that puma.py loads models with


def measure_peak(device, size=2048):
    """Operations a second of a large matrix product: the practical peak of this machine."""
    with autocast(device):  # in the precision of the training
        a = torch.eye(size, device=device) @ torch.randn(size, size, device=device)
    seconds = repeat(lambda: (a @ a).sum().item(), number=1, repeat=4)  # item() waits for a GPU
    return 2 * size**3 / min(seconds)
