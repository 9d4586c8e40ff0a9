"""PUMA's model: an item becomes a prompt, and the prompt's last hidden state is its embedding.

    from puma import PUMA
    model = PUMA.from_pretrained("toy/tiny-qwen2-vl", keep_layers=4)  # or Qwen/Qwen2-VL-2B-Instruct
    vectors = model.encode(["latin small letter a", {"image": "a.png", "text": "make it capital"}])
    vectors @ vectors.T                                               # (2, 2) cosine similarities

One item is `[image or video] [instruction + text] [alignment prompt] [RET]` in the model's own chat
template (PUMA, arXiv 2507.08064):

    <|im_start|>user
    <|vision_start|><|image_pad|>...<|vision_end|>make it capital
    Summarize above image and sentence in one word: <|im_end|>
    <|im_start|>assistant
    [RET]

Attention is causal, so `[RET]` must come last to see everything. The one-word question makes the
model prepare there the distribution over the words that would sum the item up: a text-like state,
whatever the modality. That is why images and texts can be compared at all.

`PUMA` holds the transformers model without LM head. Vision tower and embedding table are frozen,
as in the paper; the `[RET]` row is trained (official code: frozen).
Shapes: B items, L tokens, D width, V visual tokens and P patches of the whole batch.
"""

import contextlib
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import is_flash_attn_2_available, logging

from items import as_item, image_size, load_image, load_video

RET = "[RET]"
PROMPT = "\nSummarize above {} in one word: "


class PUMA(nn.Module):
    """A (pruned) Qwen2-VL or Qwen2.5-VL that embeds items: see the module's docstring.

    `backbone` is the transformers model without LM head (`.visual`, `.language_model`),
    `ret_embedding` (D,) the trained input embedding of `[RET]`. Build it with `from_pretrained`.
    """

    def __init__(self, backbone, tokenizer, image_processor, max_text_tokens=450):
        super().__init__()
        if RET not in tokenizer.get_vocab():
            raise ValueError(f"the tokenizer has no {RET} token; PUMA.from_pretrained adds it")
        self.backbone, self.tokenizer, self.image_processor = backbone, tokenizer, image_processor
        self.max_text_tokens = max_text_tokens
        self.ret_id = tokenizer.convert_tokens_to_ids(RET)
        table = backbone.get_input_embeddings().weight.requires_grad_(False)
        self.ret_embedding = nn.Parameter(table[self.ret_id].detach().clone())
        backbone.visual.requires_grad_(False)

        # The chat template is rendered once; what stands before and after the item never changes.
        turn = [{"role": "user", "content": "<item>"}]
        rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        self.before_ids, self.after_ids = self.tokenize(rendered.split("<item>"), special=True)
        kinds = ("image", "video", "sentence", "image and sentence", "video and sentence")
        self.prompt_ids = dict(zip(kinds, self.tokenize([PROMPT.format(kind) for kind in kinds])))
        self._positions = {}  # (grid, is video) -> M-RoPE positions up to the end of the visual

    @classmethod
    def from_pretrained(cls, name_or_path, keep_layers=None, *, max_visual_tokens=300,
                        max_text_tokens=450, dtype=None, device="cpu"):
        """Load a checkpoint folder or hub id, only its first `keep_layers` decoder layers.

        Dropped layers are never read into memory. `max_visual_tokens` caps the image size of the
        checkpoint's image processor (a token is 28 x 28 pixels; paper: 4 to 300), `max_text_tokens`
        cuts instruction + text (450). `dtype`: float32 on a CPU, bfloat16 on a GPU, there with
        FlashAttention if installed. Raises ValueError on a bad depth or an incomplete folder.
        """
        check_folder(name_or_path)
        config = AutoConfig.from_pretrained(name_or_path)
        if config.model_type not in ("qwen2_vl", "qwen2_5_vl"):
            raise ValueError(f"{name_or_path} is a {config.model_type}, not Qwen2-VL or Qwen2.5-VL")
        text_config = config.get_text_config()
        depth = text_config.num_hidden_layers
        if keep_layers is not None and not 1 <= keep_layers <= depth:
            raise ValueError(f"keep_layers must be in 1..{depth}, got {keep_layers}")
        text_config.num_hidden_layers = keep_layers or depth
        text_config.layer_types = text_config.layer_types[:keep_layers]
        dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
        fast = dtype in (torch.bfloat16, torch.float16) and is_flash_attn_2_available()
        with _quiet():  # transformers would list every weight of a dropped layer as unexpected
            backbone = AutoModel.from_pretrained(
                name_or_path, config=config, dtype=dtype,
                attn_implementation="flash_attention_2" if fast else "sdpa")
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        processor = AutoImageProcessor.from_pretrained(name_or_path)
        pixels = max_visual_tokens * (processor.patch_size * processor.merge_size) ** 2
        # "shortest_edge" and "longest_edge" are the least and the most pixels of an image, oddly.
        processor.size = {edge: min(n, pixels) for edge, n in dict(processor.size).items() if n}
        _add_ret_token(tokenizer, backbone)
        return cls(backbone, tokenizer, processor, max_text_tokens).to(device)

    def save_pretrained(self, folder):
        """Write an ordinary transformers checkpoint; the stock classes load it without this file.

        Holds weights (safetensors), config with the true number of layers, tokenizer with `[RET]`,
        image processor and a model card. Written beside `folder` and renamed, so that a killed save
        leaves no half folder; an existing `folder` is replaced.
        """
        folder = Path(folder)
        temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
        with torch.no_grad():  # the trained row goes back into the table
            self.backbone.get_input_embeddings().weight[self.ret_id] = self.ret_embedding
        try:
            for part in (self.backbone, self.tokenizer, self.image_processor):
                part.save_pretrained(temporary)
            (temporary / "README.md").write_text(self._card(), encoding="utf-8")
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    def _card(self):
        layers = self.backbone.config.get_text_config().num_hidden_layers
        return (f"# PUMA retrieval model\n\n{layers} decoder layers, "
                f"{self.backbone.num_parameters():,} parameters. An item's embedding is the "
                f"normalised last hidden state at `{RET}`, the last token of\n\n    [image] "
                "[instruction, text]\n    Summarize above image and sentence in one word: \n\n"
                "in the chat template. Method: PUMA, arXiv 2507.08064.\n")

    @property
    def device(self):
        return self.ret_embedding.device

    # ---- items -> batch --------------------------------------------------------------------------

    def tokenize(self, texts, special=False):
        """Token ids of each text. A user's text never turns into special tokens: a `[RET]` in a
        caption stays five characters, so that nobody can move the embedding's position."""
        options = {"add_special_tokens": False, "split_special_tokens": not special}
        return self.tokenizer(texts, **options)["input_ids"]

    def patches(self, visuals):
        """Lists of frames (one frame: a still) -> patches (P, 3 * 2 * 14 * 14), grids (visuals, 3).

        A grid (T, H, W) counts patches; 2 x 2 of them become one visual token. A patch spans two
        frames: the image processor repeats a still, a video puts its next frame there.
        """
        stills = [load_image(frame) for frames in visuals for frame in frames]
        out = self.image_processor(images=stills, return_tensors="pt")
        grids = out["image_grid_thw"]
        parts = iter(out["pixel_values"].split(grids.prod(-1).tolist()))
        sizes = iter(grids.tolist())
        pixels, grids = [], []
        for frames in visuals:
            _, height, width = [next(sizes) for _ in frames][0]
            own = [next(parts) for _ in frames]
            for first, second in zip(own[::2], own[1::2]):
                half = first[0].numel() // 6  # a row is (colour, frame of the pair, pixel)
                first.view(-1, 3, 2, half)[:, :, 1] = second.view(-1, 3, 2, half)[:, :, 1]
            pixels += own[::2]
            grids.append([len(own[::2]), height, width])
        return torch.cat(pixels), torch.tensor(grids)

    def collate(self, items, tails=None):
        """Items -> batch on the CPU: `input_ids`, `attention_mask` (B, L), `position_ids` (3, B, L)
        and, where there are visuals, `pixel_values` (P, 1176) and `grid_thw` (visuals, 3).

        Padding is on the left, so that `[RET]` is the last column of every row. `tails` (for
        pre-training) replaces alignment prompt, template end and `[RET]` by other token ids.
        """
        items = [as_item(item) for item in items]
        texts = ["\n".join(filter(None, (i.get("instruction"), i.get("text")))) for i in items]
        kinds = ["image" if i.get("image") else "video" if i.get("video") else None for i in items]
        visuals = [[item["image"]] if kind == "image" else load_video(item["video"])
                   for item, kind in zip(items, kinds) if kind]
        batch = {}
        if visuals:
            batch["pixel_values"], batch["grid_thw"] = self.patches(visuals)
        grids = iter(batch["grid_thw"].tolist() if visuals else ())
        tails = tails or [self.summary_tail(item) for item in items]
        config = self.backbone.config
        rows, positions = [], []
        for kind, text_ids, tail in zip(kinds, self.tokenize(texts), tails):
            grid = tuple(next(grids)) if kind else None
            visual = []
            if kind:
                pad = config.image_token_id if kind == "image" else config.video_token_id
                pads = [pad] * self._visual_length(grid)
                visual = [config.vision_start_token_id, *pads, config.vision_end_token_id]
            rows.append([*self.before_ids, *visual, *text_ids[: self.max_text_tokens], *tail])
            positions.append(self._position_ids(len(rows[-1]), grid, kind == "video"))
        width = max(map(len, rows))
        pad = [self.tokenizer.pad_token_id or 0]
        batch["input_ids"] = torch.tensor([pad * (width - len(row)) + row for row in rows])
        masks = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        batch["attention_mask"] = torch.tensor(masks)
        positions = [F.pad(row, (width - row.shape[1], 0)) for row in positions]
        return batch | {"position_ids": torch.stack(positions, dim=1)}

    def summary_tail(self, item):
        """Token ids that end an item's row: alignment prompt, end of the user's turn, `[RET]`."""
        visual = "image" if item.get("image") else "video" if item.get("video") else None
        sentence = "sentence" if item.get("text") or item.get("instruction") else None
        kind = " and ".join(filter(None, (visual, sentence)))
        return [*self.prompt_ids[kind], *self.after_ids, self.ret_id]

    def _visual_length(self, grid):
        return grid[0] * grid[1] * grid[2] // self.image_processor.merge_size**2

    def _position_ids(self, length, grid, video):
        """M-RoPE positions (3, L) of one row: the stock ones (official code: 1-D positions).

        The model's own routine loops over tokens, so it is asked once for each image size, up to
        the first token after the image; from there all three axes count on together.
        """
        if grid is None:
            return torch.arange(length).expand(3, length)
        if (grid, video) not in self._positions:
            before = len(self.before_ids) + 1  # + <|vision_start|>
            types = torch.tensor([[0] * before + [1 + video] * self._visual_length(grid) + [0]])
            sizes = {"video_grid_thw" if video else "image_grid_thw": torch.tensor([grid])}
            positions, _ = self.backbone.get_rope_index(torch.zeros_like(types), types, **sizes)
            self._positions[grid, video] = positions[:, 0]
        head = self._positions[grid, video]
        rest = torch.arange(1, length - head.shape[1] + 1)
        return torch.cat([head, head[:, -1:] + rest], dim=1)

    def length(self, item):
        """Roughly how many tokens an item takes: four characters each, and those of its image."""
        item = as_item(item)
        tokens = len((item.get("text") or "") + (item.get("instruction") or "")) / 4
        if item.get("image"):
            width, height = image_size(item["image"])
            patches = self.image_processor.get_number_of_image_patches(height, width)
            tokens += patches / self.image_processor.merge_size**2
        return tokens + 10_000 * bool(item.get("video"))

    # ---- batch -> embeddings ---------------------------------------------------------------------

    @torch.no_grad()
    def visual_tokens(self, batch):
        """The frozen tower's output (V, D) for all visuals of a batch, or None; no gradient.
        Compute it once and pass it to teacher and student, which share the tower."""
        if "pixel_values" not in batch:
            return None
        pixels = batch["pixel_values"].to(self.backbone.visual.dtype)
        return self.backbone.visual(pixels, grid_thw=batch["grid_thw"]).pooler_output

    def forward(self, batch, visual=None):
        """A batch of `collate`, on this device -> (B, D) un-normalised, normed `[RET]` states.

        `visual`: the batch's `visual_tokens`, where they are known already. Raises ValueError if a
        row does not end in `[RET]` (official code: position 0 is read silently).
        """
        ids, config = batch["input_ids"], self.backbone.config
        if not (ids[:, -1] == self.ret_id).all():
            raise ValueError(f"every row must end in {RET}: pad on the left, never cut the end")
        embeds = self.backbone.get_input_embeddings()(ids)
        visual = self.visual_tokens(batch) if visual is None else visual
        if visual is not None:
            slots = (ids == config.image_token_id) | (ids == config.video_token_id)
            embeds = embeds.masked_scatter(slots[..., None], visual.to(embeds.dtype))
        ret = (ids == self.ret_id)[..., None]
        embeds = torch.where(ret, self.ret_embedding.to(embeds.dtype), embeds)  # (B, L, D)
        decoder = self.backbone.language_model
        with _last_token_only(decoder.layers[-1]):
            hidden = decoder(
                inputs_embeds=embeds, attention_mask=batch["attention_mask"],
                position_ids=batch["position_ids"], use_cache=False,
            ).last_hidden_state
        return hidden[:, -1].clone()  # a view would keep the states of all positions alive

    @torch.inference_mode()
    def encode(self, items, batch_size=64, normalize=True, show_progress=True, forward=None):
        """Items (str, PIL image, Path or dict, mixed) -> (N, D) float32 embeddings on the CPU.

        Items are sorted by length, so that no batch is mostly padding, and returned in input order.
        `forward` replaces the model as the function of a batch; if it returns (..., B, D), for
        example the states of several depths, so does this. Raises ValueError on a bad item.
        """
        items = list(items)
        order = sorted(range(len(items)), key=lambda i: self.length(items[i]), reverse=True)
        training = self.training
        self.eval()
        parts = [] if items else [torch.empty(0, self.ret_embedding.numel())]
        bar = {"leave": False} if show_progress else {"disable": True}  # or TQDM_DISABLE
        for start in tqdm(range(0, len(items), batch_size), desc="encode", **bar):
            batch = self.collate([items[i] for i in order[start : start + batch_size]])
            parts.append((forward or self)(to_device(batch, self.device)).float().cpu())
        self.train(training)
        out = torch.cat(parts, dim=-2)[..., torch.tensor(order, dtype=torch.long).argsort(), :]
        return F.normalize(out, dim=-1) if normalize else out


@contextlib.contextmanager
def _last_token_only(layer):
    """Inside, a decoder layer computes output projection and MLP for the last position alone.

    Only `[RET]` is read after the last layer, and it needs the others' keys and values but not
    their outputs. Its residual additions broadcast the one position over all: right at the last
    position, meaningless elsewhere. Saves most of one layer in k, in training and encoding.
    """

    def cut(_module, inputs):
        return (inputs[0][:, -1:],)

    with contextlib.ExitStack() as hooks:
        for part in (layer.self_attn.o_proj, layer.post_attention_layernorm):
            hooks.callback(part.register_forward_pre_hook(cut).remove)
        yield


def to_device(batch, device):
    return {key: value.to(device) for key, value in batch.items()}


def check_folder(name_or_path):
    """ValueError if a local folder lacks a part of a model. A hub id looks like "Qwen/Qwen2-VL"."""
    folder = Path(name_or_path)
    if not folder.exists() and (len(folder.parts) != 2 or folder.parent.exists()):
        raise ValueError(f"model folder {name_or_path} does not exist")
    for file in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        if folder.exists() and not (folder / file).is_file():
            hint = f"; did you mean {folder / 'model'}?" if (folder / "model").is_dir() else ""
            raise ValueError(f"{folder} is no complete model: expected {folder / file}{hint}")


def _add_ret_token(tokenizer, backbone):
    """`[RET]` takes a spare row of the embedding table, or a new one; it starts as the mean row."""
    if RET in tokenizer.get_vocab():
        return
    mean = backbone.get_input_embeddings().weight[: len(tokenizer)].float().mean(0)
    tokenizer.add_special_tokens({"additional_special_tokens": [RET]})
    if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        backbone.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(RET)] = mean


@contextlib.contextmanager
def _quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)
