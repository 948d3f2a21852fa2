"""Make a small CLIP text tower of a sentence encoder: `python training/distil_text.py --teacher FOLDER --tokenizer FOLDER
--data.root REFER --output FOLDER`.

A text tower that starts fresh knows the words of its training sentences alone. Here one learns from text what a trained encoder
(any BERT-like model of transformers with mean pooling, as sentence-transformers publishes them) makes of words and phrases: its
token embeddings are the teacher's features of the tokens, which stay, and its layers learn to give, at the end of a text, the
teacher's sentence feature through the text projection and, at each token, the teacher's feature of that piece of text. The phrases
are the training split's sentences with some words exchanged for others of the vocabulary. The folder is an ordinary CLIP text tower
with its tokenizer, for `--model.text_model`. (Ours.)
"""

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

EXCHANGED = (0.0, 0.2, 0.2, 0.5)  # shares of a phrase's words that are exchanged, one drawn for each phrase
MADE_UP = 0.1  # share of phrases of random words alone
WORDS = 12_000  # of the vocabulary, the most frequent ones, from which words are drawn
WORD_BATCH = 256
LOG_EVERY = 50  # steps


@dataclass
class DistillationSettings:
    """Make a small CLIP text tower of a sentence encoder.

    Args:
        teacher: Folder or Hub id of the sentence encoder.
        tokenizer: Folder or Hub id of the CLIP tokenizer.
        output: Folder for the text tower.
        data: The training split gives the sentences; nothing else is read.
        layers: Layers of the tower; its width is the teacher's.
        heads: Attention heads.
        intermediate_size: Hidden width of its feed-forward parts.
        steps: Steps of the optimiser.
        batch_size: Phrases in a step.
        learning_rate: After warm-up; it falls to zero as a cosine.
        seed: Seed of everything random.
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
    seed: NonNegativeInt = 0


class Teacher:
    """A sentence encoder: features of pieces of text and of whole texts, both of about unit size in each channel."""

    def __init__(self, source: str):
        self.model = AutoModel.from_pretrained(source).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.width = self.model.config.hidden_size
        self.token_scale = 1.0

    def measure(self, texts: Sequence[str]) -> None:
        """Take the size of token features from some texts."""
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
    """Draws phrases: sentences with words exchanged."""

    def __init__(self, sentences: Sequence[str], tokenizer: CLIPTokenizer, seed: int):
        self.sentences = [sentence.lower().split() for sentence in sentences]
        self.words = frequent_words(tokenizer)
        self.rng = np.random.default_rng(seed)
        weights = (np.arange(len(self.words)) + 50.0) ** -0.7  # a flattened law of Zipf: common words come more often
        self.cumulative = np.cumsum(weights / weights.sum())

    def draw(self, number: int) -> list[str]:
        """So many phrases of about one length, which leaves little padding."""
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
    """Whole words of the vocabulary, most frequent first: byte-pair merges are learned in that order."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    words = [token.removesuffix("</w>") for token, _ in entries if token.endswith("</w>")]
    return [word for word in words if len(word) > 2 and word.isascii() and word.isalpha()][:WORDS]


def token_embeddings(teacher: Teacher, tokenizer: CLIPTokenizer) -> Tensor:
    """The teacher's sentence features of the text of every token, centred: (vocabulary, width)."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    texts = [tokenizer.decode([number]).strip() or name for number, name in enumerate(names)]
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    embeddings = torch.zeros(len(texts), teacher.width)
    for start in tqdm(range(0, len(order), WORD_BATCH), desc="words", unit="batch"):
        numbers = order[start : start + WORD_BATCH]
        embeddings[numbers] = teacher([texts[number] for number in numbers])[3]
    return embeddings - embeddings.mean(dim=0)


def build_student(teacher: Teacher, tokenizer: CLIPTokenizer, settings: DistillationSettings) -> PreTrainedModel:
    """A CLIP text tower as wide as the teacher, its token embeddings the teacher's, and frozen."""
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
    """Features of other pieces of the same texts, averaged by how many characters they share.

    Args:
        features: (N, L, width).
        spans: (N, L, 2) their first character and the one after their last.
        mask: (N, L), 0 for padding.
        onto: (N, M, 2) spans of the other pieces.

    Returns:
        (N, M, width), and (N, M) whether a piece shares any character; special tokens do not.
    """
    shared = torch.minimum(onto[:, :, None, 1], spans[:, None, :, 1])
    shared = (shared - torch.maximum(onto[:, :, None, 0], spans[:, None, :, 0])).clamp(min=0) * mask[:, None]
    total = shared.sum(dim=-1, keepdim=True)
    return (shared / total.clamp(min=1)) @ features, total[..., 0] > 0


def distillation_loss(
    student: nn.Module, tokenizer: CLIPTokenizer, teacher: Teacher, texts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Mean squared errors of token and of sentence features, summed; and the mean cosine of sentence features, for the log."""
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
