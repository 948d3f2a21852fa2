"""Processor outputs kept row by row, shuffled and batched again: every expression stays with its own image."""

import re

import datasets
import numpy as np
import pytest
import torch
from builders import special_ids
from conftest import REPOSITORY, make_model
from PIL import Image
from transformers import Trainer, TrainingArguments, default_data_collator

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraDataCollator

WORDS = ["left", "right", "zebra", "cup", "the"]


def colour(number: int) -> int:
    """The grey of the image that the expressions with this word are about."""
    return 40 * number + 20


def image_of(number: int) -> Image.Image:
    return Image.new("L", (40, 40), colour(number))


def mask_of(number: int) -> np.ndarray:
    mask = np.zeros((40, 40), bool)
    mask[:, : 8 * number + 4] = True
    return mask


def check_pairs(batch: dict, processor) -> int:
    """Each expression's first word is that of its image, and so is its label; the number of expressions."""
    image_processor = processor.image_processor
    index = batch.get("image_index")
    index = torch.arange(len(batch["input_ids"])) if index is None else index
    first = batch["pixel_values"][:, 0, 28, 28] * image_processor.image_std[0] + image_processor.image_mean[0]
    numbers = ((first * 255 - 20) / 40).round().long()[index]
    assert batch["input_ids"][:, 1].tolist() == [
        processor.tokenizer.convert_tokens_to_ids(f"{WORDS[number]}</w>") for number in numbers.tolist()
    ]
    widths = batch["labels"].mean(dim=(1, 2)) * 40
    assert torch.allclose(widths, 8.0 * numbers + 4, atol=1e-4)
    return len(index)


def tiny_model_for(processor) -> SeraForReferringSegmentation:
    return make_model(text_config={"vocab_size": len(processor.tokenizer), **special_ids(processor.tokenizer)})


def train(rows: datasets.Dataset, collator, processor, folder) -> list[dict]:
    """What the model was given in one epoch of a `Trainer`."""
    model = tiny_model_for(processor)
    given: list[dict] = []
    model.register_forward_pre_hook(lambda module, args, inputs: given.append(inputs), with_kwargs=True)
    arguments = TrainingArguments(
        str(folder), num_train_epochs=1, per_device_train_batch_size=3, use_cpu=True, report_to=[], save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=rows.shuffle(seed=0), data_collator=collator).train()
    return given


def test_a_trainer_on_a_mapped_data_set_of_one_expression_each(processor, tmp_path):
    numbers = [0, 1, 2, 3, 4, 2, 0]
    rows = datasets.Dataset.from_dict({"number": numbers, "text": [WORDS[n] + " the" * (n % 2) for n in numbers]})

    def prepare(batch: dict) -> dict:
        return processor(
            images=[image_of(n) for n in batch["number"]],
            text=batch["text"],
            masks=[mask_of(n) for n in batch["number"]],
            padding="max_length",
            max_length=6,
        )

    mapped = rows.map(prepare, batched=True, batch_size=4, remove_columns=rows.column_names)
    assert set(mapped.column_names) == {"pixel_values", "original_sizes", "input_ids", "attention_mask", "labels"}
    given = train(mapped, default_data_collator, processor, tmp_path)
    assert sum(check_pairs(batch, processor) for batch in given) == len(numbers) and len(given) == 3


def test_a_trainer_on_a_mapped_data_set_of_several_expressions(processor, tmp_path):
    counts = [1, 3, 2, 1, 2]
    rows = datasets.Dataset.from_dict(
        {"number": range(5), "text": [[WORDS[n] + " the" * i for i in range(count)] for n, count in enumerate(counts)]}
    )

    def prepare(row: dict) -> dict:
        masks = [[mask_of(row["number"])] * len(row["text"])]
        return processor(images=image_of(row["number"]), text=[row["text"]], masks=masks)

    mapped = rows.map(prepare, remove_columns=rows.column_names)
    given = train(mapped, SeraDataCollator(processor), processor, tmp_path)
    assert sum(check_pairs(batch, processor) for batch in given) == sum(counts) and len(given) == 2
    assert all("image_index" in batch for batch in given)


def test_rows_of_any_kind_give_what_the_processor_gives_for_all_at_once(processor):
    texts = [["left the cup", "left"], ["right"], ["zebra", "zebra the", "zebra"]]
    masks = [[mask_of(n)] * len(group) for n, group in enumerate(texts)]
    expected = processor(images=[image_of(n) for n in range(3)], text=texts, masks=masks, return_tensors="pt")

    def rows(**options) -> list[dict]:
        return [dict(processor(images=image_of(n), text=[texts[n]], masks=[masks[n]], **options)) for n in range(3)]

    lists = [{name: np.asarray(values).tolist() for name, values in row.items()} for row in rows()]
    stale = [row | {"image_index": [2] * len(row["input_ids"])} for row in rows()]
    joined = processor(images=[image_of(0), image_of(1)], text=texts[:2], masks=masks[:2])
    without_axis = [
        {
            name: values[0] if name in ("pixel_values", "original_sizes") or len(texts[n]) == 1 else values
            for name, values in row.items()
        }
        for n, row in enumerate(rows())
    ]
    unpadded = rows(padding=False)
    no_mask = [{name: values for name, values in row.items() if name != "attention_mask"} for row in unpadded]
    del no_mask[0], no_mask[1]
    for given in (rows(), rows(return_tensors="pt"), lists, stale, [joined, rows()[2]], without_axis):
        batch = SeraDataCollator(processor)([dict(row, name="zebra") for row in given])
        assert set(batch) == set(expected)
        for name, values in expected.items():
            assert batch[name].dtype == values.dtype and torch.allclose(batch[name], values), name
    assert SeraDataCollator(processor)(no_mask)["attention_mask"].tolist() == [[1, 1, 1]]


def test_one_expression_each_needs_no_index(processor):
    rows = [processor(images=image_of(n), text=WORDS[n]) for n in range(3)]
    assert "image_index" not in SeraDataCollator(processor)(rows)


def test_rows_that_cannot_be_batched_are_named(processor):
    collate = SeraDataCollator(processor)
    whole = dict(processor(images=[image_of(0)] * 2, text=[["left"], ["cup", "zebra"]]))
    with pytest.raises(ValueError, match="no rows"):
        collate([])
    with pytest.raises(ValueError, match=r"rows\[1\] has no pixel_values; it has input_ids"):
        collate([whole, {"input_ids": [[1, 2]]}])
    for index in ([0, 1, 2], [0, -1, 1], [0], None):
        with pytest.raises(ValueError, match=r"rows\[0\] has 3 expressions about 2 images and the image_index"):
            collate([whole | {"image_index": index}])


def test_the_code_of_the_documentation_trains(processor, tmp_path):
    """The properties of its two ways are those of the tests above."""
    code = re.findall(
        r"^```python\n(.*?)^```", (REPOSITORY / "docs" / "inputs.md").read_text(), re.DOTALL | re.MULTILINE
    )
    masks = [Image.fromarray(mask_of(n)) for n in range(3)]
    row_of_images = datasets.Dataset.from_dict(
        {"image": [image_of(n) for n in range(3)], "mask": masks},
        features=datasets.Features(image=datasets.Image(), mask=datasets.Image()),
    )
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    names = {
        "processor": processor,
        "model": tiny_model_for(processor),
        "arguments": arguments,
        "one_each": row_of_images.add_column("text", WORDS[:3]),
        "several_each": row_of_images.map(
            lambda row, n: {"texts": WORDS[n : n + 2], "masks": [row["mask"]] * 2}, with_indices=True
        ),
        "Trainer": Trainer,
        "default_data_collator": default_data_collator,
        "SeraDataCollator": SeraDataCollator,
    }
    for block in code:
        exec(block, names)
    assert len(code) == 2 and len(names["rows"]) == 3
