"""A training run's folder: config.json, metrics.jsonl, checkpoints/, and its stop signals.

`train.py` writes through this; nothing here knows the method. Of several processes (torchrun) only
the first one writes. A checkpoint is written beside its final name and renamed when whole, so that
neither a kill nor a full disk harms the one before.
"""

import contextlib
import json
import shutil
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import distributed


class Run:
    """One run's folder, opened or made. `stopping` is True after Ctrl-C or SIGTERM."""

    def __init__(self, folder, device, keep_checkpoints=2):
        self.folder, self.keep_checkpoints = Path(folder), keep_checkpoints
        self.writes = distributed.rank() == 0
        self.checkpoints = self.folder / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.metrics = self.folder / "metrics.jsonl"
        self.peak = measure_peak(device)
        self.flops = {}  # stage -> operations an item, counted once
        self.stopping = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, number, _frame):
        if self.stopping:  # asked twice: do not wait for the step
            raise SystemExit(128 + number)
        self.stopping = True

    def count(self, stage, items, step):
        """Has torch count the operations of one more `step()`, forward and backward.

        Once a stage, and beside the training: under the counter some kernels are replaced by others
        that round differently, so a counted step would make a resumed run differ from a whole one.
        """
        if stage not in self.flops:
            with torch.random.fork_rng(own_gpu()), sdpa_kernel(SDPBackend.MATH):  # countable
                with FlopCounterMode(display=False) as counter:
                    step()
            self.flops[stage] = counter.get_total_flops() / (items / distributed.world_size())

    def log(self, row, items, started, bar):
        """One line in metrics.jsonl; loss, items a second and MFU on the progress bar.

        `items`: of all processes. MFU (model FLOPs utilisation): operations a second over those of
        a large matrix product.
        """
        if not self.writes:
            return
        row = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
        row["samples_per_s"] = items / (time.perf_counter() - started)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        peak = self.peak * distributed.world_size()
        mfu = self.flops[row["stage"]] * row["samples_per_s"] / peak
        bar.set_postfix(
            loss=f"{row['loss']:.3f}", samples_s=f"{row['samples_per_s']:.0f}", mfu=f"{mfu:.0%}"
        )

    def rows(self):
        """metrics.jsonl as dictionaries; a line cut off by a kill is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def save(self, model, optimizer, schedule, stage, step):
        """Trainable weights (safetensors), optimizer, schedule, each process's random state."""
        states = distributed.gather_objects(random_state())
        if not self.writes:
            return
        name = f"stage{stage}-step{step:06d}"
        temporary = self.checkpoints / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        save_file(weights, temporary / "model.safetensors")
        state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save({**state, "random": states}, temporary / "state.pt")
        shutil.rmtree(self.checkpoints / name, ignore_errors=True)
        temporary.rename(self.checkpoints / name)
        for old in self._saved()[: -self.keep_checkpoints]:
            shutil.rmtree(old)

    def _saved(self):
        return sorted(self.checkpoints.glob("stage?-step??????"))

    def position(self):
        """(stage, steps done in it) of the last checkpoint, (1, 0) without one.

        Drops later lines of metrics.jsonl: those steps will be done again.
        """
        stage, step = 1, 0
        if self._saved():
            name = self._saved()[-1].name
            stage, step = int(name[5]), int(name[-6:])
        kept = [row for row in self.rows() if (row["stage"], row["step"]) <= (stage, step)]
        if self.writes:
            temporary = self.metrics.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            temporary.replace(self.metrics)
        return stage, step

    def load_weights(self, model):
        model.load_state_dict(load_file(self._saved()[-1] / "model.safetensors"), strict=False)

    def load_state(self, optimizer, schedule):
        state = torch.load(self._saved()[-1] / "state.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        set_random_state(state["random"][distributed.rank() % len(state["random"])])


def own_gpu():
    """[this process's GPU] or []. A process that asks for the others' states opens them, too."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def random_state():
    """The state of torch's random numbers, on the CPU and on this process's GPU."""
    return torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in own_gpu()]


def set_random_state(state):
    torch.set_rng_state(state[0])
    for gpu, saved in zip(own_gpu(), state[1]):  # either is empty without a GPU
        torch.cuda.set_rng_state(saved, gpu)


@contextlib.contextmanager
def replayed(state):
    """Inside, random draws repeat those made after `random_state()` was taken."""
    with torch.random.fork_rng(own_gpu()):
        set_random_state(state)
        yield


def measure_peak(device, size=2048):
    """Operations a second of a large matrix product: the practical peak of this machine."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
