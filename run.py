"""A training run's folder: config.json, metrics.jsonl, checkpoints/, and its stop signals.

`train.py` writes through this; nothing here knows the method. A checkpoint is written beside its
final name and renamed when whole, so that neither a kill nor a full disk harms the one before.
"""

import json
import shutil
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Run:
    """One run's folder, opened or made. `stopping` is True after Ctrl-C or SIGTERM."""

    def __init__(self, folder, device):
        self.folder = Path(folder)
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
            with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):  # the one it can count
                with FlopCounterMode(display=False) as counter:
                    step()
            self.flops[stage] = counter.get_total_flops() / items

    def log(self, row, items, started, bar):
        """One line in metrics.jsonl; loss, items a second and MFU on the progress bar.

        MFU (model FLOPs utilisation): operations a second over those of a large matrix product.
        """
        row = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
        row["samples_per_s"] = items / (time.perf_counter() - started)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        mfu = self.flops[row["stage"]] * row["samples_per_s"] / self.peak
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
        """Trainable weights (safetensors), optimizer, schedule, random state. Keeps two."""
        name = f"stage{stage}-step{step:06d}"
        temporary = self.checkpoints / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        save_file(weights, temporary / "model.safetensors")
        state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save({**state, "random": torch.get_rng_state()}, temporary / "state.pt")
        shutil.rmtree(self.checkpoints / name, ignore_errors=True)
        temporary.rename(self.checkpoints / name)
        for old in self._saved()[:-2]:
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
        self.metrics.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        return stage, step

    def load_weights(self, model):
        model.load_state_dict(load_file(self._saved()[-1] / "model.safetensors"), strict=False)

    def load_state(self, optimizer, schedule):
        state = torch.load(self._saved()[-1] / "state.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])


def pick_device(name):
    """The torch device of that name; cuda or else cpu for "". ValueError if it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


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
