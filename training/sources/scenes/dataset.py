"""The embedded data sets: scenes drawn from a seed, with expressions that each denote exactly one object, or none.

`generate_scenes` and `load_scenes` give scenes the columns of REFER_FEATURES. `train_tokenizer` builds the small CLIP vocabulary
for them. Nothing is downloaded. The other modules in the order to read them: `semantics` (what an expression means),
`expressions` (the search for one), `wording`; `shapes`, `drawing`, `nuisances`; `demo` and `benchmark` (the scenes themselves),
`rows`. The design of the scenes is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from training.sources.refer import REFER_FEATURES
from training.sources.scenes.benchmark import VERSION
from training.sources.scenes.drawing import MAX_SIZE, MIN_SIZE
from training.sources.scenes.rows import MAX_SCENES, SPLITS, draw_rows

SCENES_PER_CHUNK = 100
VOCABULARY = 1000  # entries of the tokenizer at most


# -------------------------------------------------------------------------------------------------- Data sets


def generate_scenes(
    num_scenes: int,
    seed: int,
    image_size: int = 96,
    *,
    split: str = "train",
    num_workers: int = 1,
    scene_set: str = "demo",
    no_target: bool = False,
) -> datasets.Dataset:
    """A data set of drawn scenes with the columns REFER_FEATURES: one row per object, a scene's rows adjacent.

    A scene depends on (seed, split, its number, image_size) alone: a larger data set begins with the smaller one, and the number of
    workers changes nothing. The ids of the splits are disjoint. Rows are kept in memory, each with its scene's image.

    - "demo": scene i of split number s is `draw_scene(SeedSequence(seed, spawn_key=(s, i)), image_size)`, as lossless WebP (about
      60 kB per scene at 96 pixels). Every object has a row; `sentence_kinds` are "location", "appearance" and "relation".
    - "location", "appearance", "relation": the benchmark (`benchmark.py`), as JPEG (about 30 kB per scene at 112 pixels), with
      sentences of that kind. `sentence_kinds` are the scene's level of difficulty. "mixed" has all three kinds about the same
      scenes, with the same sentences and ids. Its `sentence_kinds` name kind and level, for example "relation, hard". Targets of
      val and test are objects of compositions that training never shows. Targets of "test_seen" have the compositions of training.
      A target without a clear sentence of the kind has no row.

    Args:
        num_scenes: how many scenes, 1 to 10 million.
        seed: any non-negative integer.
        image_size: side of the images in pixels, 64..512.
        split: "train", "val", "test" or, for the benchmark, "test_seen"; no two splits share a scene.
        num_workers: processes that draw; above 1, a script needs its `if __name__ == "__main__"` guard.
        scene_set: one of those above.
        no_target: add to every scene of the benchmark a row about a composition that is not in it.

    Raises:
        ValueError: for an argument out of range.
    """
    check_scenes(scene_set, split, no_target)
    _check_numbers(seed, image_size, {split: num_scenes})
    chunks = _chunks(num_scenes)
    draw = partial(draw_rows, scene_set, seed, split, image_size, no_target)
    if num_workers > 1:
        with ProcessPoolExecutor(num_workers) as pool:
            parts = [_to_dataset(rows) for rows in pool.map(draw, chunks)]
    else:
        parts = [_to_dataset(draw(chunk)) for chunk in chunks]
    return datasets.concatenate_datasets(parts)


def load_scenes(
    num_scenes: int,
    seed: int,
    image_size: int,
    *,
    split: str,
    scene_set: str,
    no_target: bool = False,
    num_workers: int = 1,
) -> datasets.Dataset:
    """The benchmark's rows as `generate_scenes` gives them, drawn once into the cache of `datasets`.

    Rows are read from the disk when they are needed. Other processes and later runs find them there. Processes that need the same
    rows at the same time wait for the one that draws them.

    Raises:
        ValueError: for an argument out of range, or where so few scenes give no row.
    """
    check_scenes(scene_set, split, no_target)
    _check_numbers(seed, image_size, {split: num_scenes})
    chunks = _chunks(num_scenes)
    named = [scene_set, VERSION, split, num_scenes, image_size, seed, "absent" if no_target else "present"]
    draw = partial(draw_rows, scene_set, seed, split, image_size, no_target)
    try:
        return datasets.Dataset.from_generator(
            _generate_rows,
            features=REFER_FEATURES,
            gen_kwargs={"draw": draw, "chunks": chunks},
            num_proc=min(num_workers, len(chunks)) if num_workers > 1 else None,
            split=datasets.NamedSplit(split),
            fingerprint="-".join(map(str, ("scenes", *named))),
        )
    except ValueError as error:  # there is no row
        raise ValueError(f"Nothing clear can be said about the {num_scenes} {split} scenes; ask for more.") from error


def _generate_rows(draw: Callable[[range], list[dict[str, Any]]], chunks: list[range]) -> Iterator[dict[str, Any]]:
    for chunk in chunks:
        yield from draw(chunk)


def _chunks(num_scenes: int) -> list[range]:
    return [range(i, min(i + SCENES_PER_CHUNK, num_scenes)) for i in range(0, num_scenes, SCENES_PER_CHUNK)]


def check_scenes(scene_set: str, split: str, no_target: bool = False) -> None:
    """ValueError where there is no such set of scenes, or where the set has no such split or no expressions without a target."""
    if scene_set not in SPLITS:
        raise ValueError(f"The set of scenes must be one of {', '.join(SPLITS)}, got {scene_set!r}.")
    if split not in SPLITS[scene_set]:
        raise ValueError(f"The {scene_set} scenes have no split {split!r}; they have {', '.join(SPLITS[scene_set])}.")
    if no_target and scene_set == "demo":
        others = ", ".join(name for name in SPLITS if name != "demo")
        raise ValueError(f"The demo scenes have no expressions without a target; {others} have.")


def _check_numbers(seed: int, image_size: int, counts: dict[str, int]) -> None:
    if seed < 0:
        raise ValueError(f"The seed must not be negative, got {seed}.")
    if not MIN_SIZE <= image_size <= MAX_SIZE:
        raise ValueError(f"image_size must be between {MIN_SIZE} and {MAX_SIZE} pixels, got {image_size}.")
    for split, count in counts.items():
        if not 1 <= count <= MAX_SCENES:
            raise ValueError(f"The {split} split must have between 1 and {MAX_SCENES} scenes, got {count}.")


def _to_dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    columns = {name: [row[name] for row in rows] for name in REFER_FEATURES}
    return datasets.Dataset.from_dict(columns, features=REFER_FEATURES)


# ------------------------------------------------------------------------------------------------- Vocabulary


def train_tokenizer(sentences: Iterable[str], directory: str | Path | None = None) -> CLIPTokenizer:
    """A CLIPTokenizer whose byte-pair merges are learned from the sentences, instead of CLIP's 49,408 entries.

    As in CLIP, the vocabulary holds the 256 bytes, the same at a word's end ("</w>"), one entry per merge, then
    "<|startoftext|>" and "<|endoftext|>", so that no text is unknown. On the scenes' sentences every word becomes one
    token.

    Args:
        sentences: training text, which is lower-cased first; 1,000 entries at most are kept.
        directory: where to save the tokenizer, if given.

    Raises:
        ValueError: if there is no sentence.
    """
    sentences = list(sentences)
    if not sentences:
        raise ValueError("A tokenizer needs at least one sentence to be trained on.")
    symbols = sorted(ByteLevel.alphabet())
    symbols += [symbol + "</w>" for symbol in symbols]
    pipeline = CLIPTokenizer().backend_tokenizer
    model = Tokenizer(BPE(end_of_word_suffix="</w>"))
    model.normalizer, model.pre_tokenizer = pipeline.normalizer, pipeline.pre_tokenizer
    # The trainer breaks ties by the symbols' numbers. All are given to it beforehand, or it would number them as it meets them,
    # in another order in every process.
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - 2, special_tokens=symbols, end_of_word_suffix="</w>", show_progress=False
    )
    model.train_from_iterator(sentences, trainer)
    merges = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    vocabulary = [*symbols, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, model_max_length=77
    )
    if directory is not None:
        tokenizer.save_pretrained(directory)
    return tokenizer
