"""Distil a sentence encoder into a small CLIP text tower: `python training/distil_text.py --teacher FOLDER --tokenizer FOLDER
--data.root REFER --output FOLDER`.

A text tower with random weights learns only the words of its training sentences. Here a text tower learns from a teacher: a
trained sentence encoder, which is a BERT-like model of transformers with mean pooling, such as those of sentence-transformers.
The token embeddings are the teacher's features of the tokens, and are not trained. The layers learn two things. At the end of a
text, the text projection gives the teacher's sentence feature. At each token, the tower gives the teacher's feature of this
piece of text. The texts are the sentences of the training split, in which some words are replaced by other words of the
vocabulary. The output folder is an ordinary CLIP text tower with its tokenizer, for `--model.text_model`. (Ours.)
"""

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed, tqdm
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss, normalize
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
)

from processing_sera.processing_sera import token_limit
from training.configuration import DataSettings, read_settings_of
from training.examples.splits import load_training_splits
from training.learning.optimizers import cosine_schedule
from training.support.commands import run_command
from training.support.files import save_model
from training.support.hub_ids import folder_or_id

logger = logging.getLogger(__name__)

EXCHANGED = (0.0, 0.2, 0.2, 0.5)  # shares of words that are replaced; one of them is drawn for each phrase
MADE_UP = 0.1  # share of phrases that consist of random words
WORDS = 12_000  # words are drawn from this many, the most frequent ones of the vocabulary
WORD_BATCH = 256
LOG_EVERY = 50  # steps


@dataclass
class DistillationSettings:
    """Distil a sentence encoder into a small CLIP text tower.

    Args:
        teacher: Folder or Hub id of the sentence encoder.
        tokenizer: Folder or Hub id of the CLIP tokenizer.
        output: Folder for the text tower.
        data: The data. Only the sentences of the training split are used.
        layers: Layers of the tower. Its width is the teacher's.
        heads: Attention heads; they divide the teacher's width.
        intermediate_size: Hidden width of its feed-forward layers.
        steps: Steps of the optimizer.
        batch_size: Phrases in a step.
        learning_rate: Learning rate after the warm-up; it then falls to zero as a cosine.
        vocabulary: Entries of the vocabulary that stay: bytes, and the merges that CLIP's tokenizer learned first. Rare words then
            have more tokens. None: all.
        seed: Seed of all random numbers.
    """

    teacher: str
    tokenizer: str
    output: str
    data: DataSettings = field(default_factory=DataSettings)
    layers: PositiveInt = 2
    heads: PositiveInt = 6
    intermediate_size: PositiveInt = 1024
    steps: PositiveInt = 500
    batch_size: PositiveInt = 96
    learning_rate: PositiveFloat = 1e-3
    vocabulary: PositiveInt | None = None
    seed: NonNegativeInt = 0


class Teacher:
    """A sentence encoder. It gives features of pieces of text and of whole texts, with a deviation of about 1 in each channel."""

    def __init__(self, source: str):
        """
        Args:
            source: Folder or Hub id.
        """
        self.model = AutoModel.from_pretrained(source).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.width = self.model.config.hidden_size
        self.token_scale = 1.0

    def measure(self, texts: Sequence[str]) -> None:
        """Measure the deviation of token features on some texts; token features are divided by it from then on."""
        features, _, mask, _ = self(texts)
        self.token_scale = 1 / features[mask.bool()].std().item()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token features (N, L, width), their character spans (N, L, 2), mask (N, L) and sentence features (N, width)."""
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, return_tensors="pt", return_offsets_mapping=True
        )
        spans = inputs.pop("offset_mapping")
        features = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"]
        pooled = (features * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return features * self.token_scale, spans, mask, normalize(pooled, dim=-1) * math.sqrt(self.width)


class Phrases:
    """Draws phrases: sentences in which some words are replaced."""

    def __init__(self, sentences: Sequence[str], tokenizer: CLIPTokenizer, seed: int):
        """
        Args:
            sentences: The sentences.
            tokenizer: Its vocabulary gives the words that replace others.
            seed: Seed of all random numbers.
        """
        self.sentences = [sentence.lower().split() for sentence in sentences]
        self.words = frequent_words(tokenizer)
        self.rng = np.random.default_rng(seed)
        weights = (np.arange(len(self.words)) + 50.0) ** -0.7  # a flattened law of Zipf: common words come more often
        self.cumulative = np.cumsum(weights / weights.sum())

    def draw(self, number: int) -> list[str]:
        """A number of phrases of similar lengths, so that there is little padding."""
        drawn = sorted((self._phrase() for _ in range(4 * number)), key=len)
        start = number * int(self.rng.integers(4))
        return drawn[start : start + number]

    def _phrase(self) -> str:
        rng = self.rng
        if rng.random() < MADE_UP:
            return " ".join(self._word() for _ in range(rng.integers(1, 5)))
        share = EXCHANGED[rng.integers(len(EXCHANGED))]
        words = self.sentences[rng.integers(len(self.sentences))]
        return " ".join(self._word() if rng.random() < share else word for word in words)

    def _word(self) -> str:
        return self.words[min(int(np.searchsorted(self.cumulative, self.rng.random())), len(self.words) - 1)]


def frequent_words(tokenizer: CLIPTokenizer) -> list[str]:
    """Whole words of the vocabulary, the most frequent first, since byte-pair merges are learned in that order."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    words = [token.removesuffix("</w>") for token, _ in entries if token.endswith("</w>")]
    return [word for word in words if len(word) > 2 and word.isascii() and word.isalpha()][:WORDS]


def shortened(tokenizer: CLIPTokenizer, entries: int) -> CLIPTokenizer:
    """The tokenizer with its first merges alone. They make the most frequent words; every text still has tokens.

    Args:
        tokenizer: A CLIP tokenizer.
        entries: Entries of the vocabulary that stay.

    Raises:
        ValueError: Where the vocabulary is smaller, or bytes and special tokens alone are more.
    """
    merges = [tuple(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    fixed = len(tokenizer) - len(merges)
    if not fixed <= entries <= len(tokenizer):
        raise ValueError(f"vocabulary is {entries}; the tokenizer allows {fixed} to {len(tokenizer)}.")
    kept = merges[: entries - fixed]
    dropped = {first + second for first, second in merges[len(kept) :]} - {first + second for first, second in kept}
    names = [
        token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]) if token not in dropped
    ]
    vocabulary = {token: number for number, token in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=kept, model_max_length=token_limit(tokenizer))


def token_embeddings(teacher: Teacher, tokenizer: CLIPTokenizer) -> Tensor:
    """(vocabulary, width): the teacher's sentence features of the texts of all tokens, less their mean."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    texts = [tokenizer.decode([number]).strip() or name for number, name in enumerate(names)]
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    embeddings = torch.zeros(len(texts), teacher.width)
    for start in tqdm(range(0, len(order), WORD_BATCH), desc="words", unit="batch"):
        numbers = order[start : start + WORD_BATCH]
        embeddings[numbers] = teacher([texts[number] for number in numbers])[3]
    return embeddings - embeddings.mean(dim=0)


def build_student(teacher: Teacher, tokenizer: CLIPTokenizer, settings: DistillationSettings) -> PreTrainedModel:
    """A CLIP text tower of the teacher's width. Its token embeddings come from the teacher and are frozen."""
    config = CLIPTextConfig(
        hidden_size=teacher.width,
        projection_dim=teacher.width,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=token_limit(tokenizer),
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )
    student = CLIPTextModelWithProjection(config)
    embedding = student.get_input_embeddings()
    embedding.weight.requires_grad_(False).copy_(token_embeddings(teacher, tokenizer))
    return student


def aligned(features: Tensor, spans: Tensor, mask: Tensor, onto: Tensor) -> tuple[Tensor, Tensor]:
    """Features of pieces of texts, averaged onto other pieces of the same texts by the number of characters that they share.

    Args:
        features: (N, L, width) features of the pieces.
        spans: (N, L, 2) first character of each piece, and the character after its last.
        mask: (N, L), 0 for padding.
        onto: (N, M, 2) spans of the other pieces.

    Returns:
        (N, M, width) features of the other pieces, and (N, M) whether each shares any character. Special tokens share none.
    """
    shared = torch.minimum(onto[:, :, None, 1], spans[:, None, :, 1])
    shared = (shared - torch.maximum(onto[:, :, None, 0], spans[:, None, :, 0])).clamp(min=0) * mask[:, None]
    total = shared.sum(dim=-1, keepdim=True)
    return (shared / total.clamp(min=1)) @ features, total[..., 0] > 0


def distillation_loss(
    student: nn.Module, tokenizer: CLIPTokenizer, teacher: Teacher, texts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """The mean squared errors of token features and of sentence features, added; and the mean cosine of sentence features."""
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt", return_offsets_mapping=True)
    onto = inputs.pop("offset_mapping")
    features, spans, mask, sentences = teacher(texts)
    targets, counted = aligned(features, spans, mask, onto)
    counted &= inputs["attention_mask"].bool()
    outputs = student(**inputs)
    loss = mse_loss(outputs.last_hidden_state[counted], targets[counted]) + mse_loss(outputs.text_embeds, sentences)
    return loss, cosine_similarity(outputs.text_embeds, sentences).mean().detach()


def distil(settings: DistillationSettings) -> None:
    """Train the tower and save it with its tokenizer.

    Raises:
        ValueError, OSError: Where the settings name something that is not there or does not fit.
        FloatingPointError: Where the loss is no longer finite.
    """
    output = Path(settings.output)
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file())):
        raise ValueError(f"output {output} holds something else than a text tower; name a new folder.")
    set_seed(settings.seed)
    teacher = Teacher(folder_or_id(settings.teacher, "teacher"))
    tokenizer = CLIPTokenizer.from_pretrained(folder_or_id(settings.tokenizer, "tokenizer"))
    if settings.vocabulary is not None:
        tokenizer = shortened(tokenizer, settings.vocabulary)
    rows, _ = load_training_splits(replace(settings.data, streaming=False))
    phrases = Phrases([sentence for group in rows["sentences"] for sentence in group], tokenizer, settings.seed)
    teacher.measure(phrases.draw(settings.batch_size))
    with torch.no_grad():
        student = build_student(teacher, tokenizer, settings)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=0.01)
    schedule = cosine_schedule(optimizer, settings.steps)
    began = time.monotonic()
    for step in range(settings.steps):
        loss, cosine = distillation_loss(student, tokenizer, teacher, phrases.draw(settings.batch_size))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == settings.steps:
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {step + 1}, and nothing is saved. Lower learning_rate (it is "
                    f"{float(settings.learning_rate):g})."
                )
            seconds = time.monotonic() - began
            logger.info(f"step {step + 1}: loss {loss.item():.3f}, cosine {cosine.item():.3f}, {seconds:.0f} s")
    save_model(student, tokenizer, output)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    distil(read_settings_of(DistillationSettings, arguments))


if __name__ == "__main__":
    run_command(main, also=(FloatingPointError,))
