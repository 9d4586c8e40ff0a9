"""LoRA, as in the paper (r 128, alpha 256): the package peft's adapters on a decoder's linears.

    adapters = add_lora(decoder, rank=128, alpha=256, dropout=0.1)    # W becomes W + alpha/r * B A
    adapters.merge_and_unload()                                       # trained: an ordinary model
"""

from torch import nn


def add_lora(decoder, rank, alpha, dropout=0.0):
    """Freeze `decoder` and put adapters on every linear map of its `.layers`, in place.

    Returns peft's tuner; its `merge_and_unload()` adds the adapters to the weights and removes
    them. Raises ValueError if peft is not installed or the rank is above the narrowest layer's.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ValueError("LoRA (--lora-rank) needs peft: pip install peft") from error
    linears = {name.split(".")[-1]: module for name, module in decoder.layers.named_modules()
               if isinstance(module, nn.Linear)}
    most = min(min(linear.weight.shape) for linear in linears.values())
    if rank > most:
        raise ValueError(f"--lora-rank must be in 1..{most}, the width of a layer, got {rank}")
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout,
                        target_modules=sorted(linears))
    adapters = LoraModel(decoder, config, "default")  # freezes all of the decoder but its adapters
    for name, weight in decoder.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()  # trained in float32, whatever the model's dtype
    return adapters


def set_dropout(decoder, dropout):
    """The two stages of the paper use different LoRA dropout (0.05, 0.1)."""
    for module in decoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
