"""PUMA's model: an item becomes a prompt, and the prompt's last hidden state is its embedding.

    from puma import PUMA
    model = PUMA.from_pretrained("toy/tiny-qwen2-vl", keep_layers=4)   # or "Qwen/Qwen2-VL-2B-Instruct"
    vectors = model.encode(["latin small letter a", {"image": "glyph.png", "text": "make it capital"}])
    vectors @ vectors.T                                                # (2, 2) cosine similarities

One item is `[image or video] [instruction + text] [alignment prompt] [RET]` in the model's own chat
template (Section "Universal Multimodal Embedding" of the paper, arXiv 2507.08064):

    <|im_start|>user
    <|vision_start|><|image_pad|>...<|vision_end|>make it capital
    Summarize above image and sentence in one word: <|im_end|>
    <|im_start|>assistant
    [RET]

Attention is causal, so `[RET]` must come last to see everything. The one-word question makes the model
prepare, at that position, the distribution over words that would sum the item up: a text-like state
whatever the modality, which is why images and texts can be compared at all.

`PUMA` holds the transformers model without its LM head. The vision tower and the embedding table are
frozen, as in the paper; only the `[RET]` row is trained (the official code leaves it frozen too).
Shapes: B items, L tokens, D width, V visual tokens of the whole batch.
"""

import contextlib
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import logging

RET = "[RET]"
PROMPT = "\nSummarize above {} in one word: "


def as_item(item):
    """A string, PIL image, path or dictionary -> {"text", "image", "video", "instruction"}.

    A string is a text; a `pathlib.Path` is an image file. Raises ValueError on anything else, on
    unknown keys and on an item without content.
    """
    if isinstance(item, str):
        item = {"text": item}
    elif isinstance(item, Image.Image | Path):
        item = {"image": item}
    elif not isinstance(item, dict):
        raise ValueError(f"an item is a str, PIL image, Path or dict, got {type(item).__name__}")
    unknown = set(item) - {"text", "image", "video", "instruction"}
    if unknown:
        raise ValueError(
            f"unknown keys {sorted(unknown)} in item; known: text image video instruction"
        )
    if not any(item.get(key) for key in ("text", "image", "video")):
        raise ValueError(f"empty item {item!r}: it needs a text, an image or a video")
    if item.get("image") and item.get("video"):
        raise ValueError("an item has an image or a video, not both")
    return item


def load_image(image):
    """A path or PIL image -> RGB image, upright. Raises ValueError that names an unreadable file."""
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(image)
            # Pillow itself only warns up to twice its limit; a bomb of 170 megapixels is refused here.
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")  # transparent pixels become white, not black
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        name = getattr(image, "filename", None) or image
        raise ValueError(f"cannot read image {name}: {error}") from error


def load_video(video):
    """A list of frames, or an animated GIF, WebP or PNG file -> list of an even number of RGB images.

    Other containers need a decoder, which this project does without: pass the frames.
    """
    if isinstance(video, list | tuple):
        frames = list(video)
    else:
        try:
            with Image.open(video) as file:
                frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"cannot read video {video}: {error}; pass a list of frames"
            ) from error
    return frames + frames[-1:] * (len(frames) % 2)  # Qwen2-VL merges frames in pairs


class PUMA(nn.Module):
    """A (pruned) Qwen2-VL that embeds items: see the module's docstring.

    `backbone` is the transformers model without LM head (`.visual`, `.language_model`),
    `ret_embedding` (D,) the trained input embedding of `[RET]`. Build it with `from_pretrained`.
    """

    def __init__(self, backbone, tokenizer, image_processor, max_text_tokens=450):
        super().__init__()
        if RET not in tokenizer.get_vocab():
            raise ValueError(f"the tokenizer has no {RET} token; PUMA.from_pretrained adds it")
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_text_tokens = max_text_tokens
        self.ret_id = tokenizer.convert_tokens_to_ids(RET)
        table = backbone.get_input_embeddings().weight
        self.ret_embedding = nn.Parameter(table[self.ret_id].detach().clone())
        table.requires_grad_(False)
        backbone.visual.requires_grad_(False)

        # The chat template is rendered once; what stands before and after the item never changes.
        turn = [{"role": "user", "content": "<item>"}]
        rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        before, after = rendered.split("<item>")
        self.before_ids = self.tokenize([before], special=True)[0]
        self.after_ids = self.tokenize([after], special=True)[0]
        self.prompt_ids = {
            kind: self.tokenize([PROMPT.format(kind)])[0]
            for kind in ("image", "video", "sentence", "image and sentence", "video and sentence")
        }
        self._positions = {}  # (tokens before, grid, is video) -> M-RoPE positions

    @classmethod
    def from_pretrained(
        cls,
        name_or_path,
        keep_layers=None,
        *,
        max_visual_tokens=300,
        max_text_tokens=450,
        dtype=None,
        device="cpu",
    ):
        """Load a checkpoint folder or hub id, only its first `keep_layers` decoder layers.

        The dropped layers are never read into memory. `max_visual_tokens` caps the image size of the
        checkpoint's image processor (a token is 28 x 28 pixels; paper: 4 to 300), `max_text_tokens`
        cuts instruction + text (paper: 450). `dtype`: float32 on a CPU, bfloat16 on a GPU.
        Raises ValueError if `keep_layers` is out of range or the folder is not a complete model.
        """
        _check_folder(name_or_path)
        config = AutoConfig.from_pretrained(name_or_path)
        text_config = config.get_text_config()
        if not hasattr(config, "vision_config"):
            raise ValueError(f"{name_or_path} ({config.model_type}) has no vision tower")
        depth = text_config.num_hidden_layers
        if keep_layers is not None and not 1 <= keep_layers <= depth:
            raise ValueError(f"keep_layers must be in 1..{depth}, got {keep_layers}")
        text_config.num_hidden_layers = keep_layers or depth
        text_config.layer_types = text_config.layer_types[: text_config.num_hidden_layers]
        dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
        with _quiet():  # transformers would list every weight of a dropped layer as unexpected
            backbone = AutoModel.from_pretrained(name_or_path, config=config, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        image_processor = AutoImageProcessor.from_pretrained(name_or_path)
        limit = max_visual_tokens * (image_processor.patch_size * image_processor.merge_size) ** 2
        size = image_processor.size
        image_processor.size = {
            edge: min(size[edge], limit) for edge in ("shortest_edge", "longest_edge")
        }
        _add_ret_token(tokenizer, backbone)
        return cls(backbone, tokenizer, image_processor, max_text_tokens).to(device)

    def save_pretrained(self, folder):
        """Write an ordinary transformers checkpoint, which the stock classes load without this file.

        Holds weights (safetensors), config with the true number of layers, tokenizer with `[RET]`,
        image processor and a model card. Written beside `folder` and renamed, so that a killed save
        leaves no half folder; an existing `folder` is replaced.
        """
        folder = Path(folder)
        temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        with torch.no_grad():  # the trained row goes back into the table
            self.backbone.get_input_embeddings().weight[self.ret_id] = self.ret_embedding
        try:
            self.backbone.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            self.image_processor.save_pretrained(temporary)
            (temporary / "README.md").write_text(self._model_card(), encoding="utf-8")
            if folder.exists():
                folder.rename(temporary.with_suffix(".old"))
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(temporary.with_suffix(".old"), ignore_errors=True)

    def _model_card(self):
        layers = self.backbone.config.get_text_config().num_hidden_layers
        parameters = sum(p.numel() for p in self.backbone.parameters())
        return (
            f"# PUMA retrieval model\n\n{self.backbone.config.model_type}, {layers} decoder layers, "
            f"{parameters:,} parameters. The embedding of an item is the last hidden state at "
            f"`{RET}`, the last token of:\n\n```\n[image] instruction and text\n"
            "Summarize above image and sentence in one word: \n```\n\nin the chat template, "
            f"followed by `{RET}`, normalised. Method: PUMA, arXiv 2507.08064.\n"
        )

    @property
    def device(self):
        return self.ret_embedding.device

    # ---- items -> batch ------------------------------------------------------------------------

    def tokenize(self, texts, special=False):
        """Token ids of each text. Text from users never turns into special tokens: `[RET]` in a
        caption stays five characters, so nobody can move the embedding position."""
        return self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=not special, return_attention_mask=False
        )["input_ids"]  # fmt: skip

    def patches(self, visuals):
        """Lists of frames (one frame, an image or its path: a still) -> patches (P, 3 * 2 * 14 * 14)
        and their grids.

        A grid (T, H, W) counts patches; 2 x 2 of them become one visual token. The image processor
        repeats a still to fill the two-frame patch; a video takes its second half from the next frame.
        """
        pixels, grids = [], []
        stills = [load_image(frame) for frames in visuals for frame in frames]
        out = self.image_processor(images=stills, return_tensors="pt")
        sizes = out["image_grid_thw"].prod(-1).tolist()
        frames_patches = iter(zip(out["pixel_values"].split(sizes), out["image_grid_thw"].tolist()))
        for frames in visuals:
            if len(frames) == 1:
                patch, grid = next(frames_patches)
                pixels.append(patch)
                grids.append(grid)
                continue
            parts = [next(frames_patches) for _ in frames]
            for (first, _), (second, _) in zip(parts[::2], parts[1::2]):
                pair = first.view(len(first), 3, 2, -1).clone()  # colour, frame of the pair, pixels
                pair[:, :, 1] = second.view(len(second), 3, 2, -1)[:, :, 1]
                pixels.append(pair.flatten(1))
            grids.append([len(frames) // 2, *parts[0][1][1:]])
        return torch.cat(pixels), torch.tensor(grids)

    def summary_tail(self, item):
        """Token ids that end an item's row: alignment prompt, end of the user's turn, `[RET]`."""
        sentence = "sentence" if item.get("text") or item.get("instruction") else None
        visual = "image" if item.get("image") else "video" if item.get("video") else None
        asked = " and ".join(filter(None, (visual, sentence)))
        return [*self.prompt_ids[asked], *self.after_ids, self.ret_id]

    def collate(self, items, tails=None):
        """Items -> batch on the CPU: `input_ids`, `attention_mask` (B, L), `position_ids` (3, B, L),
        and where there are visuals `pixel_values` (P, 1176) and `grid_thw` (visuals, 3).

        Padding is on the left, so that `[RET]` is the last column of every row. `tails` (for
        pre-training) replaces the alignment prompt, the template's end and `[RET]` by own token ids.
        """
        items = [as_item(item) for item in items]
        texts = ["\n".join(filter(None, (i.get("instruction"), i.get("text")))) for i in items]
        text_ids = self.tokenize(texts)
        visuals = [
            [i["image"]] if i.get("image") else load_video(i["video"])
            for i in items if i.get("image") or i.get("video")
        ]  # fmt: skip
        batch = {}
        if visuals:
            batch["pixel_values"], batch["grid_thw"] = self.patches(visuals)
        grids = iter(batch["grid_thw"].tolist() if visuals else [])
        config = self.backbone.config
        rows, positions = [], []
        for index, item in enumerate(items):
            kind = "image" if item.get("image") else "video" if item.get("video") else None
            ids = list(self.before_ids)
            grid = None
            if kind:
                grid = tuple(next(grids))
                pad = config.image_token_id if kind == "image" else config.video_token_id
                count = grid[0] * grid[1] * grid[2] // self.image_processor.merge_size**2
                ids += [config.vision_start_token_id] + [pad] * count + [config.vision_end_token_id]
            ids += text_ids[index][: self.max_text_tokens]
            ids += self.summary_tail(item) if tails is None else tails[index]
            rows.append(ids)
            positions.append(self._position_ids(len(ids), grid, kind == "video"))
        length = max(map(len, rows))
        pad = [self.tokenizer.pad_token_id or 0]
        batch["input_ids"] = torch.tensor([pad * (length - len(r)) + r for r in rows])
        batch["attention_mask"] = torch.tensor(
            [[0] * (length - len(r)) + [1] * len(r) for r in rows]
        )
        batch["position_ids"] = torch.stack(
            [F.pad(p, (length - p.shape[1], 0)) for p in positions], dim=1
        )  # fmt: skip
        return batch

    def _position_ids(self, length, grid, video):
        """M-RoPE positions (3, L) of one row: the stock ones (the official code uses 1-D positions).

        The model's own routine loops over tokens, so it is asked once for each image size, for the
        tokens up to the first one after the image; from there all three axes count on together.
        """
        if grid is None:
            return torch.arange(length).expand(3, length)
        before = len(self.before_ids) + 1  # + <|vision_start|>
        key = (grid, video)
        if key not in self._positions:
            visual = grid[0] * grid[1] * grid[2] // self.image_processor.merge_size**2
            types = torch.tensor([[0] * before + [2 if video else 1] * visual + [0]])
            sizes = {"video_grid_thw" if video else "image_grid_thw": torch.tensor([grid])}
            ids = torch.zeros_like(types)
            self._positions[key] = self.backbone.get_rope_index(ids, types, **sizes)[0][:, 0]
        head = self._positions[key]
        return torch.cat([head, head[:, -1:] + torch.arange(1, length - head.shape[1] + 1)], dim=1)

    # ---- batch -> embeddings -------------------------------------------------------------------

    def visual_tokens(self, batch):
        """The frozen tower's output (V, D) for all visuals of a batch, or None; no gradient.

        Compute it once and pass it to teacher and student: they share the tower.
        """
        if "pixel_values" not in batch:
            return None
        with torch.no_grad():
            visual = self.backbone.visual
            pixels = batch["pixel_values"].to(visual.dtype)
            return visual(pixels, grid_thw=batch["grid_thw"]).pooler_output

    def inputs_embeds(self, batch, visual=None):
        """Token embeddings (B, L, D) with visual tokens and the trained `[RET]` row put in."""
        ids = batch["input_ids"]
        embeds = self.backbone.get_input_embeddings()(ids)
        visual = self.visual_tokens(batch) if visual is None else visual
        if visual is not None:
            config = self.backbone.config
            slots = (ids == config.image_token_id) | (ids == config.video_token_id)
            embeds = embeds.masked_scatter(slots[..., None], visual.to(embeds.dtype))
        return torch.where(
            (ids == self.ret_id)[..., None], self.ret_embedding.to(embeds.dtype), embeds
        )

    def forward(self, batch, visual=None):
        """batch of `collate` on this device -> (B, D) un-normalised `[RET]` states, final norm applied.

        Raises ValueError if a row does not end in `[RET]` (official code: reads position 0 silently).
        """
        if not bool((batch["input_ids"][:, -1] == self.ret_id).all()):
            raise ValueError(f"every row must end in {RET}: pad on the left, and never cut the end")
        hidden = self.backbone.language_model(
            inputs_embeds=self.inputs_embeds(batch, visual),
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
        ).last_hidden_state
        return hidden[:, -1]

    def length(self, item):
        """Roughly how many tokens an item takes, without tokenising it: four characters each."""
        item = as_item(item)
        characters = len(item.get("text") or "") + len(item.get("instruction") or "")
        if not item.get("image"):
            return characters / 4 + 10_000 * bool(item.get("video"))
        image = item["image"]
        if isinstance(image, Image.Image):
            width, height = image.size
        else:
            with contextlib.suppress(OSError, SyntaxError), Image.open(image) as file:
                image = file  # only the header is read; a broken file is named when it is loaded
            width, height = getattr(image, "size", (1, 1))
        patches = self.image_processor.get_number_of_image_patches(height, width)
        return characters / 4 + patches / self.image_processor.merge_size**2

    @torch.inference_mode()
    def encode(self, items, batch_size=64, normalize=True, show_progress=True, forward=None):
        """Items (str, PIL image, Path or dict, mixed) -> (N, D) float32 embeddings on the CPU.

        Items are sorted by length, so that no batch is mostly padding, and returned in input order.
        `forward` replaces the model as the function of a batch; if it returns (..., B, D), for example
        the states of several depths, so does this. Raises ValueError on an unreadable image or an
        empty item.
        """
        items = list(items)
        order = sorted(range(len(items)), key=lambda i: self.length(items[i]), reverse=True)
        training = self.training
        self.eval()
        parts = [torch.empty(0, self.backbone.config.get_text_config().hidden_size)][: not items]
        starts = range(0, len(items), batch_size)
        for start in tqdm(
            starts, desc="encode", unit="batch", disable=not show_progress, leave=False
        ):
            batch = self.collate([items[i] for i in order[start : start + batch_size]])
            parts.append((forward or self)(to_device(batch, self.device)).float().cpu())
        self.train(training)
        out = torch.cat(parts, dim=-2)[..., torch.tensor(order, dtype=torch.long).argsort(), :]
        return F.normalize(out, dim=-1) if normalize else out


def to_device(batch, device):
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _check_folder(name_or_path):
    """ValueError if a local folder lacks a part of a model. (Hub ids are checked by the hub.)"""
    folder = Path(name_or_path)
    if not folder.exists() and (folder.is_absolute() or str(name_or_path).count("/") != 1):
        raise ValueError(f"model folder {name_or_path} does not exist")
    if folder.exists():
        parts = {"config.json": "configuration", "tokenizer.json": "tokenizer",
                 "preprocessor_config.json": "image processor"}  # fmt: skip
        for file, part in parts.items():
            if not (folder / file).is_file():
                raise ValueError(f"{folder} has no {part}: expected the file {folder / file}")


def _add_ret_token(tokenizer, backbone):
    """`[RET]` takes a spare row of the embedding table, or a new one, and starts as the mean row."""
    if RET in tokenizer.get_vocab():
        return
    table = backbone.get_input_embeddings().weight
    mean = table[: len(tokenizer)].float().mean(0)
    tokenizer.add_special_tokens({"additional_special_tokens": [RET]})
    if len(tokenizer) > table.shape[0]:
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        row = tokenizer.convert_tokens_to_ids(RET)
        backbone.get_input_embeddings().weight[row] = mean.to(table.dtype)


@contextlib.contextmanager
def _quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
