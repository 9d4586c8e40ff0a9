"""Every setting of a training run, with its reason, and the presets; `train.py`'s command line.

    python train.py --help                              # each field, its default, its reason
    python train.py --preset paper-2b --keep-layers 8   # the paper's numbers, one of them changed
"""

import argparse
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args, get_origin

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from support.files import MANY, check_option

DEFAULT_DATA = "data/glyph_beir"


def arg(default, why):
    return HfArg(default=default, help=why)


RANGES = {  # of numbers, and of a text's length; otherwise 0..1,000,000
    (2, MANY): ("batch_size", "stage1_batch_size"),
    (1, MANY): ("model", "data", "keep_layers", "max_visual_tokens", "max_text_tokens",
                "checkpoint_every", "keep_checkpoints"),
    (0, 1): ("warmup", "weight_decay", "distill_weight"),
    (0, 0.99): ("lora_dropout", "stage1_lora_dropout"),
    (1e-12, 1): ("lr", "stage1_lr"), (1e-6, MANY): ("lora_alpha",),
    (1e-3, 100): ("temperature", "stage1_temperature"),
    (0, 10): ("decay",), (0, 100): ("intra_offset",), (0, 1024): ("workers",),
    (0, 2**31): ("seed",),
}


@dataclass
class Config:
    """The settings of a run. `PRESETS["toy"]` is these defaults."""

    preset: Literal["toy", "paper-2b", "paper-7b"] = arg("toy", "where the other defaults are from")
    model: str = arg("toy/tiny-qwen2-vl", "MLLM to prune: folder or hub id (paper: Qwen2-VL-7B)")
    data: str = arg(DEFAULT_DATA, "M-BEIR directory; GlyphBEIR is written there if absent")
    out: str = arg("", "run folder, a new one; default: the next free runs/puma-N")
    keep_layers: int = arg(4, "decoder layers to keep (paper: 12 of 28; here: 4 of 8)")
    keep_last: bool = arg(False, "keep layers 1..k-1 and the last (a comment of the official code)")
    # the two stages
    stage1_steps: int = arg(120, "distillation steps; 0 skips stage 1 (paper: 2 epochs)")
    stage2_steps: int = arg(360, "steps of stage 2 (paper: 2 epochs of M-BEIR)")
    batch_size: int = arg(128, "pairs a step, of all processes together (paper: 600)")
    stage1_batch_size: int | None = arg(None, "the same for stage 1 (paper: 288)")
    chunk_size: int = arg(0, "GradCache: items a forward pass, whatever the batch size; 0: off")
    tasks_per_batch: int = arg(0, "so many tasks mixed in a batch, in equal parts; 0: all")
    lr: float = arg(3e-3, "peak learning rate (paper, LoRA: 3e-4; here all weights)")
    stage1_lr: float | None = arg(None, "the same for stage 1 (paper: 2e-4)")
    warmup: float = arg(0.03, "share of a stage's steps with a rising lr (paper: 0.03)")
    weight_decay: float = arg(0.0, "AdamW's weight decay (paper: 0)")
    labels: int = arg(0, "use only so many labelled queries (pure distillation: all); 0: all")
    # the losses
    stage1_temperature: float = arg(0.05, "InfoNCE temperature of stage 1 (paper: 0.05)")
    temperature: float = arg(0.12, "tau of stage 2 (paper: 0.03; infonce here: 0.08)")
    decay: float = arg(0.5, "lambda: tau_hard falls to tau * exp(-lambda) (paper: 0.5)")
    schedule: bool = arg(True, "tau_hard falls with training progress; off: low from the start")
    loss: Literal["mac", "infonce"] = arg("mac", "stage 2; infonce keeps tau_hard = tau")
    positive_temperature: Literal["hard", "base"] = arg("hard", "positive's tau (official: hard)")
    intra_offset: float = arg(0.0, "m added to intra-modality logits (not in the paper)")
    mask_duplicates: bool = arg(True, "another right target is no negative (official: it is one)")
    teacher: str = arg("", "teacher of stage 1; default: the unpruned model, as in the paper")
    distill_weight: float = arg(0.1, "w: share of L_distill in stage 1 (paper: 0.1)")
    distill_scale: float = arg(10.0, "factor in L_distill (official: 0.05, too little to act here)")
    distill_modalities: Literal["all", "text"] = arg("all", "text: items without image (official)")
    # memory: what is trained, what is kept
    lora_rank: int = arg(0, "LoRA on every linear of the decoder (paper: 128); 0: all its weights")
    lora_alpha: float = arg(256, "LoRA's scale: alpha / rank (paper: 256)")
    lora_dropout: float = arg(0.1, "LoRA's dropout in stage 2 (paper: 0.1)")
    stage1_lora_dropout: float = arg(0.05, "LoRA's dropout in stage 1 (paper: 0.05)")
    max_visual_tokens: int = arg(300, "image budget, tokens of 28 x 28 pixels (paper: 300)")
    max_text_tokens: int = arg(450, "instruction + text are cut there (paper: 450)")
    visual_memory: int = arg(512, "MiB for the visual tokens of all images, if they fit; 0: off")
    # the run
    workers: int = arg(1, "processes that prepare batches; on a GPU one a core")
    checkpoint_every: int = arg(200, "steps between checkpoints")
    keep_checkpoints: int = arg(2, "so many of the newest are kept")
    seed: int = arg(0, "batches, instructions, choice of positives follow from it")
    resume: str = arg("", "run folder to continue; all else comes from its config.json")
    device: str = arg("", "torch device; default: cuda if there is one")
    compile: bool = arg(False, "torch.compile the layers: faster on a GPU, after a minute or two")
    eval: bool = arg(True, "evaluate at the end: the MLLM, the pruned MLLM and PUMA")

    def of_stage(self, stage, name):
        """The value of `name` in stage 1 or 2: stage 1 may have its own."""
        own = getattr(self, f"stage1_{name}") if stage == 1 else None
        return getattr(self, name) if own is None else own

    def decisive(self):
        """{name: value} of those that the trained weights depend on: a checkpoint goes with them.
        """
        free = "out resume device compile workers eval checkpoint_every keep_checkpoints".split()
        return {name: value for name, value in asdict(self).items() if name not in free}

    def check(self):
        """ValueError, naming the option and its value, if one has a wrong type or range."""
        ranges = {name: limits for limits, names in RANGES.items() for name in names}
        for field in fields(self):
            value, kind = getattr(self, field.name), Config.__annotations__[field.name]
            option = f"--{field.name.replace('_', '-')}"
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    raise ValueError(f"{option} must be of {get_args(kind)}, got {value!r}")
            else:
                check_option(option, value, kind, *ranges.get(field.name, (0, MANY)))
        for stage in (1, 2):
            pairs = getattr(self, f"stage{stage}_steps") * self.of_stage(stage, "batch_size")
            check_option(f"--stage{stage}-steps times --batch-size", pairs, int, 0, 100 * MANY)
        if self.labels == 1:
            raise ValueError("--labels must be 0 (all) or at least 2, got 1: nothing to tell apart")


# The recipe of the paper (its table of settings; 4 x 80 GB) for one GPU: `chunk_size` is ours and
# changes no result. Steps are 2 epochs: of 275,000 NLI pairs at 288 a step, of 1.3 M M-BEIR queries
# at 600. Stage 1 takes M-BEIR's queries, too, and distils images as well: NLI is another data set.
PAPER = {
    "data": "M-BEIR", "keep_layers": 12, "stage1_steps": 1900, "stage2_steps": 4300,
    "batch_size": 600, "stage1_batch_size": 288, "chunk_size": 16, "lr": 3e-4, "stage1_lr": 2e-4,
    "temperature": 0.03, "distill_scale": 0.05, "lora_rank": 128, "workers": 8,
}
PRESETS = {
    "toy": {},
    "paper-2b": {"model": "Qwen/Qwen2-VL-2B-Instruct", **PAPER},
    "paper-7b": {"model": "Qwen/Qwen2-VL-7B-Instruct", **PAPER},
}


def parse(argv=None, description=""):
    """The command line (default: this process's) -> Config. Exits with status 2 on a bad option."""
    lines = [f"{name}: " + (" ".join(f"{k}={v}" for k, v in preset.items()) or "the defaults above")
             for name, preset in PRESETS.items()]
    epilog = "presets (each value can be overridden) -- " + "; ".join(lines)
    parser = HfArgumentParser(Config, description=description, epilog=epilog)
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, default="toy")
    parser.set_defaults(**PRESETS[first.parse_known_args(argv)[0].preset])
    config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return config
