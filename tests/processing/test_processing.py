"""The processor: clean expressions, grouped by image; masks to labels, and logits to masks of full size."""

import copy
import json
import math
import time

import datasets
import numpy as np
import pandas
import pytest
import torch
from builders import GEOMETRIES, centroid, disc, iou
from PIL import Image, ImageDraw
from towers import word_tokenizer
from transformers import AutoProcessor, Siglip2Tokenizer

from processing_sera import SeraImageProcessor, SeraProcessor
from processing_sera.image_processing_sera import letterbox_masks
from processing_sera.processing_sera import clean_expression

# expressions
# -----------


def misread(text: str, encoding: str) -> str:
    return text.encode("utf-8").decode(encoding)


@pytest.mark.parametrize(
    "dirty, clean",
    [
        ("  left \t\n zebra ", "left zebra"),
        ("left&nbsp;zebra &amp; cup", "left zebra & cup"),
        ("&amp;lt;zebra&amp;gt; &amp;amp;quot;x&amp;amp;quot;", '<zebra> "x"'),
        ("AT&T &copyright", "AT&T &copyright"),
        ("“left” zebra’s — cup…", '"left" zebra\'s - cup...'),
        ("le\u0301zard", "l\u00e9zard"),
        ("ze\u200bbra\ufeff \x07cup\x00", "zebra cup"),
        ("left\u3000zebra\u2028cup", "left zebra cup"),
        ("zebra \ud800", "zebra"),
        (misread("café", "cp1252"), "café"),
        (misread("café à côté", "latin-1"), "café à côté"),
        (misread(misread("café", "cp1252"), "cp1252"), "café"),
        (misread("zebra’s – “cup”", "latin-1"), 'zebra\'s - "cup"'),
        (misread("zebra’s", "cp1252"), "zebra's"),
        (misread("🦓", "cp1252"), "🦓"),
        ("&acirc;€™s", "'s"),
        ("&am\u200bp;lt;", "<"),
        ("«CAFÉ» GRÜ“ à la carte, 斑马 зебра", '«CAFÉ» GRÜ" à la carte, 斑马 зебра'),
        ("Left Zebra", "Left Zebra"),
        ("\u200b&#x200b;", ""),
    ],
)
def test_expressions_are_cleaned(dirty, clean):
    assert clean_expression(dirty) == clean


def test_cleaning_twice_changes_nothing():
    pieces = [
        "&",
        "amp;",
        "lt;",
        "#x27;",
        "Ã",
        "©",
        "â",
        "€",
        "™",
        "\u200b",
        " ",
        "e",
        "\u0301",
        "\u00a0",
        "“",
        "\x85",
    ]
    generator = np.random.default_rng(0)
    for _ in range(2000):
        once = clean_expression("".join(generator.choice(pieces, 8)))
        assert clean_expression(once) == once


@pytest.mark.parametrize(
    "text, clean",
    [
        ("&" + "amp;" * 20_000, "&"),
        ("&" + "#38;" * 20_000 + "lt;", "<"),
        ("&#" + "9" * 5000 + ";", "\ufffd"),
        ("&#" + "0" * 5000 + "65;", "A"),
        ("&" + "amp" * 20_000, None),
        ("&am&#112;;" * 100_000, None),
        ("&am&#x2" * 10_000 + "00b;p;" * 10_000, None),
        ("Ã" + "ƒ" * 100_000, None),
        ("zebra " * 166_667, None),
        ("z" * 10**6, None),
        ("&" * 10**6, None),
        ("\u200b" * 10**6, ""),
        (" " * 10**6 + "zebra", "zebra"),
        ("e" + "\u0301" * 10**6, None),
    ],
    ids=range(14),
)
def test_the_time_of_cleaning_is_bounded_by_the_tokens_that_are_read(text, clean):
    """Seconds allow for a busy machine; the work is of milliseconds, and was of minutes."""
    start = time.process_time()
    cleaned = clean_expression(text)
    assert time.process_time() - start < 2
    assert len(cleaned) <= 77 * 128 and cleaned in (clean, cleaned if clean is None else clean)
    assert clean_expression(cleaned) == cleaned


def test_a_million_characters_are_read_as_their_beginning(processor):
    words = "the left zebra " * 66_667
    start = time.process_time()
    with pytest.warns(UserWarning, match="tokens and is cut to 77") as warned:
        batch = processor(text=words)
    assert time.process_time() - start < 2 and len(str(warned[0].message)) < 200
    with pytest.warns(UserWarning):
        assert np.array_equal(batch["input_ids"], processor(text="the left zebra " * 100)["input_ids"])
    assert processor.count_tokens(words) > processor.max_tokens
    with pytest.raises(ValueError, match="is an empty expression") as error:
        processor(text=" " * 10**6)
    assert len(str(error.value)) < 200


def test_the_tokenizer_gets_the_cleaned_text(processor):
    plain = processor(text="the zebra's cup")["input_ids"]
    assert np.array_equal(processor(text=" The zebra&rsquo;s \u200bCUP ")["input_ids"], plain)


def test_no_character_is_unknown(processor):
    ids = processor(text="斑马 🦓 zebra")["input_ids"][0]
    end = processor.tokenizer.eos_token_id
    assert (ids == end).sum() == 1 and processor.tokenizer.unk_token_id == end
    assert "斑马 🦓 zebra" in processor.tokenizer.decode(ids)


def test_a_special_token_in_an_expression_is_text(processor):
    ids = processor(text="left <|endoftext|> zebra")["input_ids"][0]
    assert np.flatnonzero(ids == processor.tokenizer.eos_token_id).tolist() == [len(ids) - 1]


def test_the_mask_covers_the_padding_alone(processor):
    batch = processor(text=["left zebra", "the zebra left", "cup"], return_tensors="pt")
    start, end = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert (batch["input_ids"][:, 0] == start).all()
    for row, length in zip(batch["input_ids"], batch["attention_mask"].sum(1), strict=True):
        assert row[length - 1] == end and (row[length:] == end).all() and end not in row[: length - 1]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_a_long_expression_warns_and_keeps_its_end(processor):
    text = "zebra " * 100
    with pytest.warns(UserWarning, match=r"'zebra zebra.*has 102 tokens and is cut to 77"):
        batch = processor(text=[text, "cup"])
    word = processor.tokenizer.convert_tokens_to_ids("zebra</w>")
    assert batch["input_ids"].shape == (2, 77)
    assert batch["input_ids"][0, 1:-1].tolist() == [word] * 75
    assert batch["input_ids"][0, -1] == processor.tokenizer.eos_token_id


def test_the_limit_is_the_tokenizers(processor, recwarn):
    processor(text="zebra " * 75)
    assert not recwarn.list
    processor.tokenizer.model_max_length = 8
    with pytest.warns(UserWarning, match="cut to 8"):
        assert processor(text="zebra " * 7)["input_ids"].shape == (1, 8)
    processor.tokenizer.model_max_length = int(1e30)
    with pytest.warns(UserWarning, match="cut to 77"):
        processor(text="zebra " * 76)


# images with expressions
# -------------------------


def test_every_nesting(processor, image):
    other = Image.new("RGB", (20, 10), "red")
    cases = [
        (image, "zebra", [0]),
        ([image], ["zebra"], [0]),
        (image, [["zebra", "left zebra"]], [0, 0]),
        ([image, other], ["zebra", "cup"], [0, 1]),
        ([image, other], [["left zebra", "zebra left"], ["cup"]], [0, 0, 1]),
        ([image, other], (("cup",), ("left zebra", "the cup", "cup")), [0, 1, 1, 1]),
        ([image, other], [["zebra"], ["cup"]], [0, 1]),
    ]
    for images, text, index in cases:
        batch = processor(images=images, text=text, return_tensors="pt")
        assert len(batch["input_ids"]) == len(index)
        is_one_each = index == list(range(len(index)))
        assert set(batch) == set(processor.model_input_names) - ({"image_index"} if is_one_each else set())
        if not is_one_each:
            assert batch["image_index"].tolist() == index and batch["image_index"].dtype == torch.int64
    assert set(processor(images=image)) == {"pixel_values", "original_sizes"}
    assert processor(text=[["cup", "zebra"], ["left"]])["image_index"].tolist() == [0, 0, 1]


def test_texts_and_masks_in_what_the_ecosystem_holds_them_in(processor, image):
    flat, nested = ["left zebra", "cup"], [["left zebra", "cup"], ["the cup"]]
    columns = datasets.Dataset.from_dict({"flat": flat, "nested": nested})
    images, masks = [image, image], [np.ones((40, 30), bool), np.eye(40, 30, dtype=bool)]
    expected = processor(images=images, text=flat, masks=masks)
    for text in (
        columns["flat"],
        np.array(flat),
        np.array(flat, object),
        pandas.Series(flat, index=[5, 3]),
        tuple(flat),
    ):
        for given in (masks, np.stack(masks), pandas.Series(masks, index=[1, 0]), torch.from_numpy(np.stack(masks))):
            batch = processor(images=images, text=text, masks=given)
            assert all(np.array_equal(batch[name], expected[name]) for name in expected)
    expected = processor(images=images, text=nested)
    frame = pandas.DataFrame({"nested": [np.array(group) for group in nested]})
    for text in (columns["nested"], frame["nested"], [pandas.Series(group) for group in nested], nested):
        batch = processor(images=images, text=text)
        assert all(np.array_equal(batch[name], expected[name]) for name in expected)
    square = np.array([["left", "cup"], ["zebra", "the"]])
    assert processor(images=images, text=square)["image_index"].tolist() == [0, 0, 1, 1]
    for text in (frame, {"a": 1}, {"left"}, b"left", columns):
        with pytest.raises(TypeError, match=r"text.* must be a string"):
            processor(text=text)


def test_the_options_of_every_processor(processor, image):
    text = ["left zebra", "cup"]
    default = processor(text=text)
    for options in (
        {"padding": True},
        {"padding": "longest", "truncation": True},
        {"truncation": "longest_first", "max_length": 77, "return_attention_mask": True},
        {"text_kwargs": {"padding": "longest"}},
        {"padding": None, "truncation": None, "max_length": None, "return_attention_mask": None},
    ):
        batch = processor(text=text, **options)
        assert all(np.array_equal(batch[name], default[name]) for name in default)
    padded = processor(images=[image, image], text=text, padding="max_length", max_length=9, return_tensors="pt")
    assert padded["input_ids"].shape == (2, 9) and padded["attention_mask"].sum(1).tolist() == [4, 3]
    assert (padded["input_ids"][:, 4:] == processor.tokenizer.pad_token_id).all()
    assert processor(text=text, padding="max_length")["input_ids"].shape == (2, 77)
    ragged = processor(text=text, padding=False)
    assert [len(row) for row in ragged["input_ids"]] == [len(row) for row in ragged["attention_mask"]] == [4, 3]
    assert set(processor(text=text, return_attention_mask=False)) == {"input_ids"}
    with pytest.warns(UserWarning, match="'left zebra' has 4 tokens and is cut to 3"):
        assert processor(text=text, max_length=3)["input_ids"].shape == (2, 3)
    assert processor(text="zebra " * 80, truncation=False)["input_ids"].shape == (1, 82)
    assert isinstance(processor(text=text, common_kwargs={"return_tensors": "pt"})["input_ids"], torch.Tensor)
    processor.tokenizer.backend_tokenizer.enable_padding(length=9)  # another caller's, which is not this one's
    assert np.array_equal(processor(text=text)["input_ids"], default["input_ids"])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"do_resize": False}, TypeError, "no option 'do_resize'; it has padding, truncation, max_length"),
        ({"text_kwargs": {"stride": 3}}, TypeError, "no option 'stride'"),
        ({"images_kwargs": {"size": 3}}, TypeError, "no option 'size'"),
        ({"videos": 3}, TypeError, "no option 'videos'"),
        ({"max_length": 78}, ValueError, "max_length must be an integer from 2 to 77, got 78"),
        ({"max_length": 1}, ValueError, "got 1"),
        ({"max_length": 0}, ValueError, "got 0"),
        ({"max_length": "9"}, (TypeError, ValueError), "max_length"),
        ({"padding": "left"}, ValueError, "left is not a valid PaddingStrategy"),
        ({"truncation": "only_second"}, ValueError, "needs pairs of texts"),
    ],
)
def test_options_that_cannot_be_kept_are_named(processor, options, error, message):
    with pytest.raises(error, match=message):
        processor(text="cup", **options)


def test_a_row_does_not_depend_on_its_batch(processor, image):
    other = Image.new("RGB", (20, 10), "red")
    batch = processor(images=[other, image], text=[["the left cup", "cup"], ["zebra"]])
    alone = processor(images=image, text="zebra")
    length = alone["input_ids"].shape[1]
    assert np.array_equal(batch["pixel_values"][1], alone["pixel_values"][0])
    assert np.array_equal(batch["original_sizes"][1], alone["original_sizes"][0])
    assert np.array_equal(batch["input_ids"][2, :length], alone["input_ids"][0])
    assert batch["attention_mask"][2].sum() == alone["attention_mask"][0].sum() == length


@pytest.mark.parametrize(
    "count, text, error, message",
    [
        (1, ["zebra", "cup"], ValueError, r"more texts than images: 2 for 1 image.*nest them.*\[\["),
        (2, ["zebra", "cup", "left"], ValueError, "more texts than images: 3 for 2"),
        (2, "zebra", ValueError, "fewer texts than images: 1 for 2"),
        (1, [["zebra"], ["cup"]], ValueError, "more texts than images: 2 for 1"),
        (2, [["zebra"], []], ValueError, r"text\[1\] is empty: every image needs"),
        (1, [], ValueError, "text is empty"),
        (1, "  ", ValueError, "text is an empty expression: '  '"),
        (2, ["zebra", "\u200b"], ValueError, r"text\[1\] is an empty expression"),
        (2, [["zebra"], ["cup", ""]], ValueError, r"text\[1\]\[1\] is an empty expression"),
        (1, 5, TypeError, "got int"),
        (2, ["zebra", None], TypeError, r"text\[1\] must be a string, got NoneType"),
        (2, ["zebra", ["cup"]], TypeError, r"text\[1\] must be a string, got list"),
        (1, [["zebra", b"cup"]], TypeError, r"text\[0\]\[1\] must be a string, got bytes"),
    ],
)
def test_texts_that_do_not_fit(processor, count, text, error, message):
    with pytest.raises(error, match=message):
        processor(images=["not yet opened.png"] * count, text=text)  # refused before any image is read


def test_nothing_at_all(processor):
    with pytest.raises(ValueError, match="give images, text or both"):
        processor()


def test_masks_become_labels(processor, image):
    other = Image.new("RGB", (20, 10), "red")
    generator = np.random.default_rng(0)
    first, second = (generator.random((40, 30)) < 0.5 for _ in range(2))
    third = generator.random((10, 20)) < 0.5
    expected = letterbox_masks([first, second, third], (56, 56))
    nested = {"images": [image, other], "text": [["zebra", "left"], ["cup"]]}
    for masks in (
        [[first, second], [third]],
        [np.stack([first, second]) * 255, torch.from_numpy(third)[None]],
    ):
        batch = processor(**nested, masks=masks, return_tensors="pt")
        assert batch["labels"].dtype == torch.float32 and np.array_equal(batch["labels"], expected)
    flat = processor(images=[image, other], text=["zebra", "cup"], masks=[first, Image.fromarray(third)])
    assert np.array_equal(flat["labels"], expected[[0, 2]])
    assert np.array_equal(processor(images=image, text="zebra", masks=first)["labels"], expected[:1])


def test_masks_that_do_not_fit(processor, image):
    good, turned = np.ones((40, 30), bool), np.ones((30, 40), bool)
    with pytest.raises(ValueError, match=r"masks\[0\] has shape \(30, 40\), its image is \(40, 30\)"):
        processor(images=image, text="zebra", masks=turned)
    with pytest.raises(ValueError, match="2 masks for 1 expressions"):
        processor(images=image, text=["zebra"], masks=[good, good])
    with pytest.raises(ValueError, match="nested like text"):
        processor(images=image, text=[["zebra", "cup"]], masks=[[good]])
    with pytest.raises(ValueError, match=r"masks\[0\] must be a boolean or integer array"):
        processor(images=image, text="zebra", masks=good / 2)
    with pytest.raises(TypeError, match="masks must be a list like text, got dict"):
        processor(images=image, text=["zebra"], masks={0: good})
    with pytest.raises(ValueError, match="masks need"):
        processor(images=image, masks=[good])


# saving
# ------


def test_processor_round_trip(tmp_path, processor, image):
    processor = SeraProcessor(processor.image_processor, processor.tokenizer, mask_threshold=0.35)
    arguments = {"images": [image, image], "text": [["left zebra", "cup"], ["the left zebra"]]}
    before = processor(**arguments)
    # a tokenizer would write these settings into its file
    processor.tokenizer(["cup"], padding="max_length", truncation=True, max_length=3)
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    assert settings["padding"] is None and settings["truncation"] is None
    for loaded in (SeraProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is SeraProcessor and loaded.mask_threshold == 0.35
        after = loaded(**arguments)
        assert list(after) == list(before) and all(np.array_equal(after[key], before[key]) for key in before)


def test_a_tokenizers_own_settings_do_not_cut(processor):
    expected = processor(text="the left zebra")
    processor.tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    processor.tokenizer.backend_tokenizer.enable_padding(length=9)
    assert np.array_equal(processor(text="the left zebra")["input_ids"], expected["input_ids"])


# back to masks
# -------------


def perfect_logits(masks: list[np.ndarray], frame: tuple[int, int], cells: tuple[int, int]) -> torch.Tensor:
    """Logits of the share of each cell that the object covers."""
    labels = torch.from_numpy(letterbox_masks(masks, frame))[:, None]
    return torch.nn.functional.adaptive_avg_pool2d(labels, cells)[:, 0].clamp(1e-4, 1 - 1e-4).logit()


@pytest.mark.parametrize("original, frame", GEOMETRIES)
def test_a_perfect_prediction_comes_back(processor, original, frame):
    height, width = original
    mask = disc(original, (height * 0.53, width * 0.46), min(original) * 0.4)
    processor.image_processor = SeraImageProcessor(size={"height": frame[0], "width": frame[1]})
    inputs = processor(images=mask, text="zebra", return_tensors="pt")
    logits = perfect_logits([mask], frame, (frame[0] // 2, frame[1] // 2))
    (result,) = processor.post_process_referring_segmentation({"logits": logits}, inputs)
    predicted = result["mask"]
    assert predicted.dtype == torch.bool and tuple(predicted.shape) == original
    assert iou(predicted.numpy(), mask) > 0.97
    assert np.abs(centroid(predicted.numpy()) - centroid(mask)).max() < 0.002 * max(original)


@pytest.mark.parametrize("original", [(480, 640), (640, 427)])
def test_a_perfect_prediction_at_quarter_resolution(processor, original):
    mask = disc(original, (original[0] * 0.53, original[1] * 0.46), min(original) * 0.3)
    processor.image_processor = SeraImageProcessor()
    inputs = processor(images=mask, text="zebra", return_tensors="pt")
    logits = perfect_logits([mask], (448, 448), (112, 112))
    (result,) = processor.post_process_referring_segmentation({"logits": logits}, inputs)
    assert iou(result["mask"].numpy(), mask) > 0.97
    assert np.abs(centroid(result["mask"].numpy()) - centroid(mask)).max() < 0.5


@pytest.mark.parametrize("original", [(333, 500), (386, 500), (500, 333), (480, 640), (61, 37)])
def test_the_logits_of_the_padding_have_no_effect(processor, original):
    processor.image_processor = SeraImageProcessor(size=448)
    inputs = processor(images=np.zeros(original), text="zebra", return_tensors="pt")
    inside = perfect_logits([np.ones(original, bool)], (448, 448), (128, 128)) > 9  # cells completely in the image
    assert 0 < inside.float().mean() < 1
    logits = torch.randn(1, 128, 128, generator=torch.Generator().manual_seed(0))
    results = [
        processor.post_process_referring_segmentation(
            torch.where(inside, logits, value), inputs, return_probabilities=True
        )[0]["probabilities"]
        for value in (-9.0, 9.0)
    ]
    assert torch.equal(*results)


def test_a_small_image_takes_averages(processor):
    logits = torch.randn(1, 14, 14, generator=torch.Generator().manual_seed(0))
    inputs = processor(images=np.zeros((2, 2)), text="zebra", return_tensors="pt")
    (result,) = processor.post_process_referring_segmentation(logits, inputs, return_probabilities=True)
    expected = logits[0].reshape(2, 7, 2, 7).mean((1, 3)).sigmoid()
    assert torch.allclose(result["probabilities"], expected, atol=1e-6)


def test_it_is_the_usual_bilinear_interpolation(processor):
    logits = torch.randn(1, 14, 14, generator=torch.Generator().manual_seed(0))
    inputs = processor(images=Image.new("RGB", (131, 131)), text="zebra", return_tensors="pt")
    (result,) = processor.post_process_referring_segmentation(logits, inputs, return_probabilities=True)
    expected = torch.nn.functional.interpolate(logits[None], (131, 131), mode="bilinear", align_corners=False)
    assert torch.allclose(result["probabilities"], expected[0, 0].sigmoid(), atol=1e-5)


def test_extreme_shapes_come_back(processor):
    images = [Image.new("RGB", (10_000, 40)), Image.new("RGB", (1, 1)), Image.new("RGB", (3, 2))]
    inputs = processor(images=images, text=["zebra"] * 3, return_tensors="pt")
    logits = torch.full((3, 14, 14), -5.0)
    logits[:, :, :7] = 5.0
    logits[1] = 5.0
    results = processor.post_process_referring_segmentation(logits, inputs)
    assert [tuple(result["mask"].shape) for result in results] == [(40, 10_000), (1, 1), (2, 3)]
    columns = results[0]["mask"].float().mean(0)
    assert (columns[:4900] == 1).all() and (columns[5100:] == 0).all()
    assert results[1]["mask"].item() and results[2]["mask"][:, 0].all() and not results[2]["mask"][:, 2].any()


def test_each_expression_takes_its_own_images_size(processor, image):
    images = [Image.new("RGB", (20, 10)), image]
    inputs = processor(images=images, text=[["zebra"], ["cup", "left"]], return_tensors="pt")
    logits = torch.stack([torch.full((14, 14), value) for value in (3.0, -3.0, 0.5)])
    results = processor.post_process_referring_segmentation({"logits": logits}, inputs)
    assert [tuple(result["mask"].shape) for result in results] == [(10, 20), (40, 30), (40, 30)]
    assert [result["mask"].any().item() for result in results] == [True, False, True]
    reordered = inputs.copy()
    reordered["image_index"] = torch.tensor([1, 0, 0])
    results = processor.post_process_referring_segmentation({"logits": logits}, reordered)
    assert [tuple(result["mask"].shape) for result in results] == [(40, 30), (10, 20), (10, 20)]


def test_threshold_and_score(processor, image):
    inputs = processor(images=[image, image], text=["zebra", "cup"], return_tensors="pt")
    logits = torch.randn(2, 14, 14, generator=torch.Generator().manual_seed(0))
    for threshold in (None, 0.3, 0.7):
        for result in processor.post_process_referring_segmentation(
            logits, inputs, threshold=threshold, return_probabilities=True
        ):
            probabilities = result["probabilities"].numpy()
            mask = probabilities > (0.5 if threshold is None else threshold)
            assert np.array_equal(result["mask"], mask)
            assert result["score"] == pytest.approx(probabilities[mask].mean(), abs=1e-5)
    (result, _) = processor.post_process_referring_segmentation(
        logits, inputs, threshold=0.999, return_probabilities=True
    )
    assert not result["mask"].any() and result["score"] == result["probabilities"].max().item()
    processor.mask_threshold = 0.3
    by_attribute = processor.post_process_referring_segmentation(logits, inputs)
    by_argument = processor.post_process_referring_segmentation(logits, inputs, threshold=0.3)
    assert all(torch.equal(a["mask"], b["mask"]) for a, b in zip(by_attribute, by_argument, strict=True))


def test_half_precision_logits_and_numpy_inputs(processor, image):
    inputs = processor(images=image, text="zebra")
    logits = torch.randn(1, 14, 14, generator=torch.Generator().manual_seed(0))
    (full,) = processor.post_process_referring_segmentation(logits, inputs)
    (half,) = processor.post_process_referring_segmentation(logits.bfloat16(), inputs)
    assert iou(full["mask"].numpy(), half["mask"].numpy()) > 0.95 and "probabilities" not in full


def test_post_processing_without_an_index_means_one_each(processor, image):
    inputs = processor(images=[image, Image.new("L", (5, 6))], text=["zebra", "cup"], return_tensors="pt")
    results = processor.post_process_referring_segmentation(torch.zeros(2, 14, 14), inputs)
    assert [tuple(result["mask"].shape) for result in results] == [(40, 30), (6, 5)]


def test_outputs_and_inputs_that_do_not_fit(processor, image):
    inputs = processor(images=image, text="zebra", return_tensors="pt")
    post_process = processor.post_process_referring_segmentation
    with pytest.raises(ValueError, match="2 logits do not fit"):
        post_process(torch.zeros(2, 14, 14), inputs)
    with pytest.raises(ValueError, match=r"got \(1, 1, 14, 14\)"):
        post_process(torch.zeros(1, 1, 14, 14), inputs)
    with pytest.raises(ValueError, match="no original_sizes"):
        post_process(torch.zeros(1, 14, 14), processor(text="zebra", return_tensors="pt"))
    with pytest.raises(ValueError, match=r"do not fit image_index \[3\]"):
        post_process(torch.zeros(1, 14, 14), {**inputs, "image_index": torch.tensor([3])})
    for threshold in (0, 1, 50, math.nan):
        with pytest.raises(ValueError, match="mask threshold must lie between 0 and 1"):
            post_process(torch.zeros(1, 14, 14), inputs, threshold=threshold)


def test_labels_and_post_processing_are_inverse_on_a_drawing(processor):
    """Drawn shapes, also thin ones, to labels at full resolution and back."""
    drawing = Image.new("1", (300, 200))
    pen = ImageDraw.Draw(drawing)
    pen.rectangle((0, 150, 90, 199), fill=1)
    pen.line((20, 20, 280, 120), fill=1, width=6)
    pen.ellipse((180, 110, 280, 190), outline=1, width=9)
    mask = np.asarray(drawing)
    processor.image_processor = SeraImageProcessor()
    inputs = processor(images=mask, text="zebra", masks=mask, return_tensors="pt")
    logits = inputs["labels"].clamp(1e-4, 1 - 1e-4).logit()
    (result,) = processor.post_process_referring_segmentation(logits, inputs)
    assert iou(result["mask"].numpy(), mask) > 0.99


def test_a_tokenizer_without_a_padding_token_is_refused(processor):
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no padding token.*tokenizer_config\.json"):
        SeraProcessor(processor.image_processor, tokenizer)


def test_a_tokenizer_of_a_tower_that_reads_padding_pads_to_its_one_length(tmp_path):
    image_processor = SeraImageProcessor(size=56)
    tokenizer = word_tokenizer(is_siglip=True, model_max_length=16)
    processor = SeraProcessor(image_processor, tokenizer)
    assert processor.text_padding == "max_length"
    batch = processor(text=["Left ZEBRA", "the cup right"], return_tensors="pt")
    assert batch["input_ids"].shape == (2, 16) and batch["attention_mask"].sum(1).tolist() == [3, 4]
    assert batch["input_ids"][0].tolist() == [4, 6, 1] + [0] * 13  # in lower case, end token, then padding
    assert processor(text="the cup", padding=True)["input_ids"].shape == (1, 3)  # what a call says comes first
    with pytest.warns(UserWarning, match="has 21 tokens and is cut to 16"):
        assert processor(text="cup " * 20)["input_ids"][0, -1] == 1
    processor.save_pretrained(tmp_path)
    assert SeraProcessor.from_pretrained(tmp_path)(text="the cup")["input_ids"].shape == (1, 16)


def test_who_says_how_expressions_are_padded():
    """The caller, or else the tokenizer: SigLIP's own class, or one that takes no attention mask."""
    image_processor, plain = SeraImageProcessor(size=56), word_tokenizer(is_siglip=False)
    assert SeraProcessor(image_processor, plain).text_padding == "longest"
    assert SeraProcessor(image_processor, plain, text_padding="max_length").text_padding == "max_length"
    assert SeraProcessor(image_processor, Siglip2Tokenizer()).text_padding == "max_length"
    with pytest.raises(ValueError, match=r"text_padding is 'right'.*longest.*max_length"):
        SeraProcessor(image_processor, plain, text_padding="right")


def test_tokens_are_counted_before_an_expression_is_cut(processor):
    assert processor.count_tokens("  left zebra ") == len(processor(text="left zebra")["input_ids"][0])
    assert processor.count_tokens("a " * 200) > processor.max_tokens
    with pytest.raises(ValueError, match="empty"):
        processor.count_tokens(" ")
