"""A page that segments what phrases refer to in an image, and shows masks, scores and the shares of the experts.

`SERA_MODEL=user/name python app.py`, with a folder or a Hub id; on a Space, `SERA_MODEL` is one of its variables. This file needs
no other file of the repository: the model's code lies beside the weights. (Ours.)
"""

import hashlib
import html
import json
import logging
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image, ImageFilter
from pycocotools import mask as coco_mask
from transformers import AutoModel, AutoProcessor

logger = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 20 * 2**20
MAX_PIXELS = 25_000_000  # of the image; its masks are as large
MAX_CHARACTERS = 1000  # of one expression; the model reads at most 77 tokens of them
NUM_BYTES = 256  # a CLIP tokenizer's vocabulary holds all of them
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow has more; some of them start other programs
SHOWN_SIDES = (640, 1024)  # least and most pixels of the longer side of what is shown; files have the image's own
KEPT_SECONDS = 3600  # of a visitor's results in memory and files on the disk
MAX_KEPT = 100  # results in memory, of a few MB each
# Of the last images, for all visitors: features on the model's device, and what is shown.
MAX_FEATURE_BYTES = 256 * 2**20
MAX_WAITING = 20  # visitors who wait for the model
EXAMPLES = "examples/examples.json"

COLORS = (  # of the masks; neighbours in the list differ most
    (229, 57, 70),
    (33, 111, 237),
    (20, 160, 95),
    (247, 140, 20),
    (140, 70, 215),
    (0, 178, 200),
    (225, 45, 160),
    (235, 200, 20),
    (125, 85, 65),
    (130, 185, 45),
    (250, 150, 170),
    (70, 85, 110),
)
MAX_EXPRESSIONS = len(COLORS)
FUSION_EXPERTS = {"spatial": "#4c6ef5", "context": "#12a594", "boundary": "#e8730c", "shape": "#b14aa8"}
ADAPTER_EXPERTS = {name: FUSION_EXPERTS[name] for name in ("spatial", "boundary")}

HEADER = """<h1>Referring image segmentation</h1>
<p>Describe a thing in an image with a phrase. SERA marks its pixels.</p>"""
ROUTING_NOTE = """The shares of SERA's experts. Each tap of the vision tower has four experts; its number is the number of blocks \
before it. Each adapter has two experts; its number is the number of its block, counted from 0."""
CSS = (
    """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important; }
#header h1 { font-size: clamp(1.15rem, 4.6vw, 1.7rem); font-weight: 650; margin: 0.6rem 0 0.1rem; }
#header p { margin: 0 0 0.4rem; color: var(--body-text-color-subdued); }
#shown label { flex: 1 1 100%; min-width: 0; white-space: normal; }
#shown label span { overflow-wrap: anywhere; }
.routing { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)); gap: 14px; }
.routing section { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 14px; min-width: 0; }
.routing h3 { font-size: 0.95rem; font-weight: 600; margin: 0 0 8px; overflow-wrap: anywhere; }
.routing h3 i { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 3px; margin-right: 0.5em; }
.routing .row { display: flex; align-items: center; gap: 8px; margin: 3px 0; font-size: 0.8rem; }
.routing .row > span { flex: 0 0 4.8rem; color: var(--body-text-color-subdued); }
.routing .bar { flex: 1; display: flex; gap: 1px; height: 20px; border-radius: 4px; overflow: hidden; min-width: 0; }
.routing .bar b { min-width: 0; overflow: hidden; color: white; font-weight: 600; font-size: 0.72rem; line-height: 20px;
  text-align: center; white-space: nowrap; }
.experts { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 10px; font-size: 0.85rem; }
.experts i { display: inline-block; width: 0.75em; height: 0.75em; border-radius: 50%; margin-right: 0.4em; }
"""
    # each expression's box has the colour of its mask, so that the boxes are the legend
    + "\n".join(
        f"#shown label:nth-of-type({i}) input {{ --checkbox-background-color-selected: rgb{color}; "
        f"--checkbox-border-color-selected: rgb{color}; border: 2px solid rgb{color}; }}"
        for i, color in enumerate(COLORS, start=1)
    )
)


@dataclass
class Answer:
    """The model's answer about one image, small enough to be kept for every visitor.

    Attributes:
        expressions: The N expressions.
        image: uint8 (h, w, 3), the upright image at the size that is shown.
        size: (height, width) of the upright image itself.
        logits: float32 (N, ·, ·) mask logits, at the model's own resolution.
        presence_logits: float32 (N,), from a model that predicts presence; else `None`.
        fusion: Per tap, the number of blocks before it and the experts' shares (N, 4).
        adapter: Per adapted block, its number and the experts' shares (N, 2).
    """

    expressions: list[str]
    image: np.ndarray
    size: tuple[int, int]
    logits: torch.Tensor
    presence_logits: torch.Tensor | None
    fusion: list[tuple[int, np.ndarray]]
    adapter: list[tuple[int, np.ndarray]]


class Segmenter:
    """A model with its processor. A further answer about one of the last images computes only the expressions."""

    def __init__(self, name: str):
        """
        Args:
            name: Folder or Hub id. Its code is run.

        Raises:
            ValueError: Where it does not hold a complete SERA.
            OSError: Where it is not found.
        """
        # a Space has the model's code from beside the weights alone
        model = AutoModel.from_pretrained(name, trust_remote_code=True)
        if model.config.model_type != "sera":
            raise ValueError(f"{name} holds a model of the type {model.config.model_type!r}, not a SERA.")
        self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
        # Where a file is missing, transformers creates an empty tokenizer, or returns the tokenizer as the processor.
        if len(getattr(self.processor, "tokenizer", ())) < NUM_BYTES:
            raise ValueError(f"{name} has no complete processor; is its tokenizer.json missing?")
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.kept = sys.modules[type(model).__module__].SeraFeatureCache(MAX_FEATURE_BYTES)
        self.to_rgb_image = sys.modules[type(self.processor.image_processor).__module__].to_rgb_image

    def answer(self, path: str, expressions: list[str]) -> Answer:
        """Run the model on the image in a file.

        Raises:
            ValueError: Where the image or an expression cannot be used; the message says what to change.
        """
        key = content_key(path)
        kept = self.kept.get(key)
        image = self.to_rgb_image(open_image(path), name="The image") if kept is None else None
        for expression in expressions:
            self._check_expression(expression)
        with torch.inference_mode():
            features, shown, size = kept or self._encode(image, key)
            text = self.processor(text=[expressions], return_tensors="pt").to(self.model.device)
            outputs = self.model(image_features=features, **text, output_router_weights=True)
        presence, config = outputs.presence_logits, self.model.config
        return Answer(
            expressions=expressions,
            image=shown,
            size=size,
            logits=outputs.logits.float().cpu(),
            presence_logits=None if presence is None else presence.float().cpu(),
            fusion=_by_depth(config.tap_layers, outputs.fusion_router_weights),
            adapter=_by_depth(config.adapter_layers, outputs.adapter_router_weights),
        )

    def _encode(self, image: Image.Image, key: tuple[str, int]) -> tuple[Any, np.ndarray, tuple[int, int]]:
        """The model's features of an upright image, the image as it is shown, and its (height, width); they are kept."""
        size = (image.height, image.width)
        shown = np.asarray(image.resize(shown_size(size)[::-1], Image.Resampling.LANCZOS))
        pixel_values = self.processor(images=[image], return_tensors="pt")["pixel_values"]
        features = self.model.get_image_features(pixel_values.to(self.model.device))
        self.kept.put(key, (features, shown, size), features.nbytes + shown.nbytes)
        return features, shown, size

    def results(self, answer: Answer, threshold: float | None, size: tuple[int, int]) -> list[dict[str, Any]]:
        """Masks from an answer, without another run of the model.

        Args:
            answer: The model's answer.
            threshold: Probability in (0, 1) above which a pixel is in a mask. `None`: the processor's mask selection.
            size: (height, width) of the masks, in the image's proportions.

        Returns:
            Per expression {"mask": bool (height, width), "score": float} and, where predicted, {"no_target": float}.
        """
        outputs = {"logits": answer.logits, "presence_logits": answer.presence_logits}
        index = torch.zeros(len(answer.expressions), dtype=torch.long)
        inputs = {"original_sizes": torch.tensor([size]), "image_index": index}
        results = self.processor.post_process_referring_segmentation(outputs, inputs, threshold=threshold)
        return [result | {"mask": result["mask"].numpy()} for result in results]

    def _check_expression(self, expression: str) -> None:
        try:
            count = self.processor.count_tokens(expression)
        except ValueError:
            raise ValueError(f"The phrase {expression!r} has no visible character.") from None
        if count > self.processor.max_tokens:
            raise ValueError(f"“{expression[:60]}…” is longer than the model reads; shorten it.")


def parse_expressions(text: str) -> list[str]:
    """The expressions in a text, one on each line, without empty lines and repetitions.

    Raises:
        ValueError: Where there are none or too many, or one is too long.
    """
    expressions = list(dict.fromkeys(line.strip() for line in (text or "").splitlines() if line.strip()))
    if not expressions:
        raise ValueError("Say what to find: one phrase on each line.")
    if len(expressions) > MAX_EXPRESSIONS:
        raise ValueError(f"These are {len(expressions)} phrases; give at most {MAX_EXPRESSIONS} at once.")
    for expression in expressions:
        if len(expression) > MAX_CHARACTERS:
            raise ValueError(f"“{expression[:60]}…” has {len(expression)} characters; at most {MAX_CHARACTERS} work.")
    return expressions


def content_key(path: str) -> tuple[str, int]:
    """What tells images apart: the checksum and the number of bytes of a file. A file that is too large is refused first."""
    check_size(path)
    content = Path(path).read_bytes()
    return hashlib.sha256(content).hexdigest(), len(content)


def check_size(path: str) -> None:
    """Raise a `ValueError` for a file that is too large."""
    if os.path.getsize(path) > MAX_IMAGE_BYTES:
        raise ValueError(f"The file is too large; choose one of at most {MAX_IMAGE_BYTES // 2**20} MB.")


def open_image(path: str) -> Image.Image:
    """Decode the image in a file, after a check of its size in its header.

    Raises:
        ValueError: Where it is not an image, too large, cut off, or of a format that is not accepted.
    """
    check_size(path)
    try:
        image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"The image has too many pixels; at most {MAX_PIXELS // 10**6} million work.") from None
    except Exception:  # Pillow raises errors of many kinds on a broken header
        raise ValueError(f"This file is not an image that can be read; choose {', '.join(FORMATS)}.") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"The image has {width} × {height} pixels; at most {MAX_PIXELS // 10**6} million work.")
    try:
        image.load()
    except Exception:
        raise ValueError("The image cannot be decoded to its end; is the file damaged?") from None
    return image


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) at which an image of a (height, width) is shown: its longer side within [`SHOWN_SIDES`]."""
    longer = max(size)
    scale = min(max(longer, SHOWN_SIDES[0]), SHOWN_SIDES[1]) / longer
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def draw_overlay(image: np.ndarray, masks: dict[int, np.ndarray]) -> Image.Image:
    """Draw masks over an image: each tinted and outlined in its colour, the rest greyer and darker.

    Args:
        image: uint8 (h, w, 3).
        masks: bool (h, w), by the number of the expression; the number chooses the colour.
    """
    canvas = image.astype(np.float32)
    if masks:
        outside = 0.6 * canvas + 0.3 * canvas.mean(axis=2, keepdims=True)
        canvas = np.where(np.any(list(masks.values()), axis=0)[..., None], canvas, outside)
    for i, mask in masks.items():
        canvas[mask] += 0.45 * (np.float32(COLORS[i]) - canvas[mask])
    width = round(max(image.shape) / 320)
    for i, mask in masks.items():
        inside = _shrunk(mask, width)
        canvas[mask & ~inside] = 255
        canvas[inside & ~_shrunk(inside, width)] = COLORS[i]
    return Image.fromarray(canvas.round().astype(np.uint8))


def _shrunk(mask: np.ndarray, pixels: int) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MinFilter(2 * pixels + 1))) > 0


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths {"size": [height, width], "counts"} of a bool (height, width) mask."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def legend(expressions: list[str], results: list[dict[str, Any]], no_target_threshold: float) -> list[tuple[str, int]]:
    """For each expression, the text beside its box and its number.

    Args:
        expressions: The expressions.
        results: Their results.
        no_target_threshold: Probability of absence above which the processor leaves a mask empty.
    """
    choices = []
    for i, (expression, result) in enumerate(zip(expressions, results, strict=True)):
        if result["mask"].any():
            said = f"score {result['score']:.2f}"
        elif result.get("no_target", 0.0) > no_target_threshold:
            said = f"not in the image ({result['no_target']:.0%})"
        else:
            said = "no pixel above the threshold"
        choices.append((f"{expression} · {said}", i))
    return choices


def routing_bars(answer: Answer, chosen: Iterable[int]) -> str:
    """HTML with a panel for each chosen expression: the experts' shares at every tap and in every adapted block."""
    panels = []
    for i in chosen:
        rows = [_bar(f"tap {depth}", shares[i], FUSION_EXPERTS) for depth, shares in answer.fusion]
        rows += [_bar(f"adapter {block}", shares[i], ADAPTER_EXPERTS) for block, shares in answer.adapter]
        title = f'<h3><i style="background: rgb{COLORS[i]}"></i>{html.escape(answer.expressions[i])}</h3>'
        panels.append(f"<section>{title}{''.join(rows)}</section>")
    if not panels or not (answer.fusion or answer.adapter):
        return ""
    names = [f'<span><i style="background: {color}"></i>{name}</span>' for name, color in FUSION_EXPERTS.items()]
    return f'<div class="experts">{"".join(names)}</div><div class="routing">{"".join(panels)}</div>'


def _bar(name: str, shares: np.ndarray, experts: dict[str, str]) -> str:
    parts = [
        f'<b title="{expert}: {share:.1%}" style="flex: {100 * share:.2f} 1 0; background: {color}">'
        f"{f'{share:.0%}' if share >= 0.1 else ''}</b>"
        for (expert, color), share in zip(experts.items(), shares.tolist(), strict=True)
        if share >= 0.005  # less is not a pixel wide
    ]
    return f'<div class="row"><span>{name}</span><div class="bar">{"".join(parts)}</div></div>'


def _by_depth(depths: list[int], weights: tuple[torch.Tensor, ...] | None) -> list[tuple[int, np.ndarray]]:
    # a model without experts in a place routes nothing there
    return [(depth, shares.float().cpu().numpy()) for depth, shares in zip(depths, weights or (), strict=False)]


def write_files(expressions: list[str], results: list[dict[str, Any]], folder: Path) -> list[str]:
    """Write `masks.zip` (PNG files of 0 and 255) and `prediction.json` (scores and COCO run lengths); their paths."""
    records = []
    with zipfile.ZipFile(folder / "masks.zip", "w") as archive:
        for i, (expression, result) in enumerate(zip(expressions, results, strict=True), start=1):
            name = f"mask-{i}.png"
            with archive.open(name, "w") as file:
                Image.fromarray(result["mask"].astype(np.uint8) * 255).save(file, format="png")
            numbers = {key: result[key] for key in ("score", "no_target") if key in result}
            records.append({"expression": expression} | numbers | {"mask": name, "rle": encode_rle(result["mask"])})
    text = json.dumps(records, indent=1, ensure_ascii=False)
    (folder / "prediction.json").write_text(text, encoding="utf-8")
    return [str(folder / "masks.zip"), str(folder / "prediction.json")]


def find_examples(name: str) -> list[list[str]]:
    """The path of the image and the expressions of each example beside the weights of a folder or Hub id; often none."""

    def find(file: str) -> Path:
        return Path(name, file) if os.path.isdir(name) else Path(hf_hub_download(name, file))

    try:
        listed = json.loads(find(EXAMPLES).read_text(encoding="utf-8"))
        return [[str(find(f"examples/{Path(item['image']).name}")), "\n".join(item["text"])] for item in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.info(f"no examples: {error}")
        return []


def build_app(segmenter: Segmenter, examples: list[list[str]]) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="SERA", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as app:
        answered = gr.State(None, time_to_live=KEPT_SECONDS)
        gr.HTML(HEADER, elem_id="header")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=300,
                    elem_id="image",
                )
                # gradio's own decodes the file before its size is known, and its error does not say what is wrong
                image.preprocess = lambda payload: payload and payload.path
                expressions = gr.Textbox(
                    label="Phrases, one on each line",
                    placeholder="left zebra\nthe zebra drinking",
                    lines=3,
                    max_lines=MAX_EXPRESSIONS,
                    elem_id="expressions",
                )
                run = gr.Button("Segment", variant="primary", elem_id="segment")
                if examples:
                    gr.Examples(examples, [image, expressions], cache_examples=False, label="Examples")
            with gr.Column(scale=3, min_width=300):
                overlay = gr.Image(
                    label="Masks", interactive=False, buttons=["download", "fullscreen"], elem_id="overlay"
                )
                with gr.Column(visible=False) as details:
                    shown = gr.CheckboxGroup(label="Shown", type="value", elem_id="shown")
                    threshold = gr.Slider(
                        0,
                        0.99,
                        value=0,
                        step=0.01,
                        label="Threshold",
                        info="0: the model's own",
                        elem_id="threshold",
                    )
                    make = gr.Button("Prepare files to download", size="sm", elem_id="make")
                    files = gr.File(label="Masks (PNG) and COCO run lengths (JSON)", visible=False, elem_id="files")
        with gr.Accordion("Experts", visible=False) as experts:
            gr.Markdown(ROUTING_NOTE)
            routing = gr.HTML(elem_id="routing")

        def segment(path: str | None, text: str, threshold: float) -> dict[Any, Any]:
            try:
                asked = parse_expressions(text)
                if not path:
                    raise ValueError("Choose an image first.")
                answer = segmenter.answer(path, asked)
            except ValueError as error:
                raise gr.Error(html.escape(str(error)), print_exception=False) from None
            except Exception:
                logger.exception("an image failed")
                raise gr.Error("The model could not answer; the log says why.", print_exception=False) from None
            everything = list(range(len(asked)))
            drawn = draw(answer, everything, threshold)
            visible = gr.update(visible=bool(answer.fusion or answer.adapter))
            drawn[shown] = gr.update(choices=drawn[shown]["choices"], value=everything)
            return drawn | {answered: answer, details: gr.update(visible=True), experts: visible}

        def draw(answer: Answer | None, chosen: list[int], threshold: float) -> dict[Any, Any]:
            check_kept(answer)
            results = segmenter.results(answer, threshold or None, answer.image.shape[:2])
            masks = {i: results[i]["mask"] for i in sorted(chosen)}
            return {
                overlay: draw_overlay(answer.image, masks),
                shown: gr.update(choices=legend(answer.expressions, results, segmenter.processor.no_target_threshold)),
                routing: routing_bars(answer, masks),
                files: gr.update(value=None, visible=False),  # they belong to another threshold
            }

        def check_kept(answer: Answer | None) -> None:
            if answer is None:
                raise gr.Error("This result is no longer kept; segment again.", print_exception=False)

        def make_files(answer: Answer | None, threshold: float) -> dict[str, Any]:
            check_kept(answer)
            results = segmenter.results(answer, threshold or None, answer.size)
            place = Path(files.GRADIO_CACHE)  # where gradio deletes them after a while
            place.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=place))
            return gr.update(value=write_files(answer.expressions, results, folder), visible=True)

        drawn = [overlay, shown, routing, files]
        run.click(
            segment,
            [image, expressions, threshold],
            [*drawn, answered, details, experts],
            concurrency_limit=1,
            api_visibility="private",
        )
        gr.on(
            [threshold.input, shown.input],
            draw,
            [answered, shown, threshold],
            drawn,
            trigger_mode="always_last",
            show_progress="hidden",
            concurrency_limit=2,
            api_visibility="private",
        )
        make.click(make_files, [answered, threshold], files, concurrency_limit=2, api_visibility="private")
    return app.queue(max_size=MAX_WAITING)


def make_theme() -> gr.themes.Base:
    """Fonts of the visitor's own system: none is fetched."""
    font = [gr.themes.Font(family) for family in ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")]
    mono = [gr.themes.Font(family) for family in ("ui-monospace", "Consolas", "monospace")]
    theme = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=font, font_mono=mono)
    plain = {"background_fill": "transparent", "text_color": "*body_text_color"}
    return theme.set(
        background_fill_primary="*neutral_50",  # Soft's own, which `set` forgets
        **{f"block_title_{name}{mode}": value for name, value in plain.items() for mode in ("", "_dark")},
        block_title_padding="0",
        **{f"checkbox_label_background_fill_selected{mode}": "*background_fill_secondary" for mode in ("", "_dark")},
        **{f"checkbox_label_text_color_selected{mode}": "*body_text_color" for mode in ("", "_dark")},
    )


def main() -> None:
    """Serve the model that the environment variable `SERA_MODEL` names."""
    logging.basicConfig(format="%(message)s")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    name = os.environ.get("SERA_MODEL", "").strip()
    if not name:
        sys.exit("error: SERA_MODEL is not set; set it to the folder or the Hub id of a SERA, for example user/name.")
    try:
        segmenter = Segmenter(name)
    except Exception as error:  # transformers raises errors of many kinds on a damaged folder
        logger.debug("the error's traceback", exc_info=True)
        sys.exit(f"error: SERA_MODEL is {name!r}, which cannot be used: {' '.join(str(error).split())}")
    build_app(segmenter, find_examples(name)).launch(
        theme=make_theme(),
        css=CSS,
        max_file_size=MAX_IMAGE_BYTES,
        state_session_capacity=MAX_KEPT,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )


if __name__ == "__main__":
    main()
