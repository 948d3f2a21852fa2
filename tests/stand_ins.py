"""Models that stand in for a trained one, a processor and rows for them, and their answers."""

import datasets
import numpy as np
import torch
from builders import special_ids, tiny_tokenizer
from conftest import make_model
from PIL import Image

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.outputs_sera import SeraReferringSegmentationOutput
from processing_sera import SeraImageProcessor, SeraProcessor
from training.scoring.metric import SentenceScore
from training.sources.scenes.dataset import generate_scenes


class StandIn(torch.nn.Module):
    """Logits from the image and the expression. Each batch gives the same bits."""

    def forward(self, pixel_values, input_ids, attention_mask, image_index=None, **kwargs):
        brightness = pixel_values.double().mean(dim=1)[:, 3::7, 3::7]
        word = (input_ids * attention_mask * torch.arange(1, input_ids.shape[1] + 1)).sum(dim=1) % 11 / 5 - 1
        about = brightness if image_index is None else brightness[image_index]  # absent: one expression for each image
        return SeraReferringSegmentationOutput(logits=(about * word[:, None, None]).float())


def make_processor() -> SeraProcessor:
    """A processor for images of 56×56 pixels."""
    return SeraProcessor(SeraImageProcessor(size={"height": 56, "width": 56}), tiny_tokenizer())


def make_rows(num_scenes: int = 5) -> datasets.Dataset:
    """Rows of scenes of 64×64 pixels."""
    return generate_scenes(num_scenes, seed=3, image_size=64)


def tiny_model(**overrides) -> SeraForReferringSegmentation:
    """A tiny model with the vocabulary of `make_processor`."""
    tokenizer = tiny_tokenizer()
    special = special_ids(tokenizer)
    return make_model(text_config={"vocab_size": len(tokenizer), **special}, **overrides)


def counts_of(score: SentenceScore) -> tuple[int, int, int]:
    """Pixels in the intersection, in the predicted mask and in the true mask."""
    return score.intersection, score.predicted, score.truth


def places(rows: datasets.Dataset) -> list[tuple[int, int, str]]:
    """(row, sentence, kind) of every sentence."""
    return [(n, i, kind) for n, kinds in enumerate(rows["sentence_kinds"]) for i, kind in enumerate(kinds)]


class Presence(StandIn):
    """The stand-in, which also predicts presence."""

    def forward(self, input_ids, attention_mask, **kwargs):
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        outputs["presence_logits"] = ((input_ids * attention_mask).sum(dim=1) % 7 - 2.0).float()
        return outputs


class Lopsided(StandIn):
    """The stand-in with larger logits at the right: the answer for a flipped image is not the flipped answer."""

    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        outputs.logits += torch.linspace(-1, 1, outputs.logits.shape[-1])
        return outputs


class LopsidedPresence(Lopsided, Presence):
    """The lopsided stand-in, which also predicts presence."""


def probabilities_of(model, processor, image: Image.Image, sentence: str) -> tuple[np.ndarray, float]:
    """The answer to one sentence alone: probabilities (H, W), and the probability of no target (or 0)."""
    inputs = processor(images=[image], text=[[sentence]], return_tensors="pt")
    (result,) = processor.post_process_referring_segmentation(model(**inputs), inputs, return_probabilities=True)
    return result["probabilities"].numpy(), result.get("no_target", 0.0)


def swapped(sentence: str) -> str:
    """The sentence with "left" and "right" exchanged."""
    return sentence.replace("left", "#").replace("right", "left").replace("#", "right")
