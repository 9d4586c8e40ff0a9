"""Make a big model fit one GPU: say first what a run will take, and train less of it with LoRA.

`plan` builds the model's shapes without memory (torch's meta device) and counts: parameters kept,
dropped and trainable, and the bytes of weights, gradients, optimizer and teacher. What a forward
pass takes on top depends on the items and is bounded by `--chunk-size`.

LoRA, as in the paper (r 128, alpha 256), is the package peft's (optional; nothing else needs it):

    student = PUMA.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", keep_layers=12)
    adapters = add_lora(student, rank=128, alpha=256, dropout=0.1)    # W becomes W + alpha/r * B A
    ...                                                               # train A, B, the [RET] row
    adapters.merge_and_unload()                                       # an ordinary model again
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from prune_distill import find_decoder
from puma import check_folder


def plan(config, device):
    """A `settings.Config` -> dict of counts: `kept`, `dropped`, `trainable` (parameters), and
    `weights`, `gradients`, `optimizer`, `teacher`, `total` (bytes). Nothing is loaded."""
    check_folder(config.model)
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(config.model))
    layers = find_decoder(model).layers
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    if not 1 <= config.keep_layers <= len(sizes):
        raise ValueError(f"--keep-layers must be in 1..{len(sizes)}, got {config.keep_layers}")
    whole = model.num_parameters()
    dropped = sum(sizes[config.keep_layers :])
    width = model.get_input_embeddings().embedding_dim
    trainable = sum(sizes[: config.keep_layers])
    trainable += sum(p.numel() for p in find_decoder(model).norm.parameters())
    if config.lora_rank:
        linears = [m for m in layers[0].modules() if isinstance(m, nn.Linear)]
        ends = sum(m.in_features + m.out_features for m in linears)
        trainable = config.keep_layers * config.lora_rank * ends
    half = 2 if device.type == "cuda" else 4  # bytes of a weight that is not trained
    kept = whole - dropped
    weights = kept * half if config.lora_rank else kept * 4
    counts = {
        "kept": kept, "dropped": dropped, "trainable": trainable + width,  # + the [RET] row
        "weights": weights + (4 * trainable if config.lora_rank else 0),
        "gradients": 4 * (trainable + width),
        "optimizer": 8 * (trainable + width),  # AdamW: two float32 moments a weight
        # The teacher shares vision tower and embedding table with the student.
        "teacher": half * sum(sizes) if config.stage1_steps and config.distill_weight else 0,
    }
    parts = ("weights", "gradients", "optimizer", "teacher")
    return {**counts, "total": sum(counts[part] for part in parts)}


def report(config, device):
    """Print the plan; ValueError if it alone exceeds the GPU's memory."""
    counts = plan(config, device)
    millions = {key: f"{counts[key] / 1e6:,.1f} M" for key in ("kept", "dropped", "trainable")}
    bytes_ = {key: f"{counts[key] / 2**30:.2f}" for key in
              ("weights", "gradients", "optimizer", "teacher", "total")}
    print(f"parameters: {millions['kept']} kept, {millions['dropped']} dropped, "
          f"{millions['trainable']} trainable", flush=True)
    print(f"memory, GiB: weights {bytes_['weights']}, gradients {bytes_['gradients']}, optimizer "
          f"{bytes_['optimizer']}, teacher {bytes_['teacher']}: {bytes_['total']}, and what a "
          "chunk of items takes", flush=True)
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory
        if counts["total"] > room:
            raise ValueError(
                f"{bytes_['total']} GiB are more than the {room / 2**30:.1f} GiB of {device}: try "
                "--lora-rank 128, fewer --keep-layers, or --stage1-steps 0 (no teacher)"
            )


def add_lora(student, rank, alpha, dropout=0.0):
    """Freeze the decoder and put LoRA adapters on every linear map of its layers, in place.

    student: `puma.PUMA`. Returns peft's tuner; its `merge_and_unload()` adds the adapters to the
    weights and removes them. Raises ValueError if peft is not installed.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ValueError("LoRA (--lora-rank) needs peft: pip install peft") from error
    decoder = find_decoder(student)
    linears = {name.split(".")[-1] for name, module in decoder.layers.named_modules()
               if isinstance(module, nn.Linear)}
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout,
                        target_modules=sorted(linears))
    adapters = LoraModel(decoder, config, "default")  # freezes all of the decoder but its adapters
    for name, weight in decoder.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()  # trained in float32, whatever the model's dtype
    return adapters


def set_dropout(student, dropout):
    """The two stages of the paper use different LoRA dropout (0.05, 0.1)."""
    for module in find_decoder(student).modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
