"""The pipeline: every way to call it, with a model whose answer is known."""

import io

import numpy as np
import pandas
import pytest
import torch
from conftest import make_model
from datasets import Dataset
from datasets import Image as Features
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel, pipeline
from transformers.utils import ModelOutput

from modeling_sera import SeraForReferringSegmentation
from processing_sera import ReferringImageSegmentationPipeline, SeraImageProcessor, SeraProcessor


class BrightnessConfig(PreTrainedConfig):
    model_type = "brightness"


class BrightnessModel(PreTrainedModel):
    """An expression that begins with "d" refers to the dark part of its image, any other to the bright part."""

    config: BrightnessConfig
    main_input_name = "pixel_values"

    def __init__(self, config: BrightnessConfig, dark: int = 0):
        super().__init__(config)
        self.gain = torch.nn.Parameter(torch.tensor(4.0))
        self.dark = dark
        self.calls = []  # numbers of images, of expressions, and of expressions at once
        self.post_init()

    def forward(self, pixel_values, input_ids, attention_mask, image_index, original_sizes, max_expressions):
        self.calls.append((len(pixel_values), len(input_ids), max_expressions))
        assert pixel_values.dtype == self.gain.dtype
        assert input_ids.shape == attention_mask.shape and len(original_sizes) == len(pixel_values)
        grey = torch.nn.functional.avg_pool2d(pixel_values.mean(1, keepdim=True), 2)[:, 0]
        sign = torch.where(input_ids[:, 1] == self.dark, -1.0, 1.0).to(grey.dtype)
        # longer expressions have larger logits, so that a wrong padding mask changes the result
        return ModelOutput(logits=self.gain * (sign * attention_mask.sum(1))[:, None, None] * grey[image_index])


@pytest.fixture
def model(processor: SeraProcessor) -> BrightnessModel:
    return BrightnessModel(BrightnessConfig(), dark=processor.tokenizer.convert_tokens_to_ids("d"))


@pytest.fixture
def pipe(model: BrightnessModel, processor: SeraProcessor) -> ReferringImageSegmentationPipeline:
    return ReferringImageSegmentationPipeline(model=model, processor=processor)


def two_sided(size: tuple[int, int]) -> Image.Image:
    """White on the left, black on the right; size is (width, height)."""
    array = np.zeros((size[1], size[0]), np.uint8)
    array[:, : size[0] // 2] = 255
    return Image.fromarray(array)


def check(result: dict, image: Image.Image, label: str) -> None:
    bright = np.asarray(image) > 127
    mask = result["mask"]
    assert set(result) == {"label", "score", "mask"} and result["label"] == label
    assert mask.mode == "L" and mask.size == image.size and set(np.unique(mask)) <= {0, 255}
    expected = ~bright if label.startswith("d") else bright
    assert ((np.asarray(mask) == 255) == expected).mean() > 0.97
    assert isinstance(result["score"], float) and 0.8 < result["score"] <= 1


def test_one_expression_and_several(pipe):
    image = two_sided((100, 60))
    for (result,) in (pipe(image, text="bright part"), pipe(image, "bright part")):
        check(result, image, "bright part")
    texts = ["dark", "bright part", "dark part of it"]
    for results in (
        pipe(image, text=texts),
        pipe({"image": image, "text": texts}),
        pipe(image, text=tuple(texts)),
    ):
        assert len(results) == 3
        for result, text in zip(results, texts, strict=True):
            check(result, image, text)


def test_images_of_every_form(pipe, tmp_path):
    image = two_sided((100, 60))
    image.save(tmp_path / "image.png")
    path = tmp_path / "image.png"
    content = path.read_bytes()
    undecoded = [{"bytes": content, "path": None}, {"bytes": None, "path": str(path)}]
    arrays = [np.asarray(image), torch.from_numpy(np.array(image))]
    for form in (path, str(path), content, io.BytesIO(content), *undecoded, *arrays):
        check(pipe(form, text="dark")[0], image, "dark")
        check(pipe({"image": form, "text": np.array(["dark"])})[0], image, "dark")


def test_several_images_in_whatever_holds_them(pipe, tmp_path):
    images = [two_sided((100, 60)), two_sided((30, 50))]
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    rows = Dataset.from_dict({"image": paths, "text": [["dark"], ["dark"]]}).cast_column("image", Features())
    in_memory = [paths, tuple(paths), np.array(paths), pandas.Series(paths, index=[4, 2]), tuple(rows)]
    lazy = [
        rows,
        rows["image"],
        rows.to_iterable_dataset(),
        iter(paths),
        (path for path in paths),
        LengthAndItems(paths),
    ]
    for several in in_memory + lazy:
        found = pipe(several, text=pandas.Series(["dark"]))
        assert isinstance(found, list) == any(several is held for held in in_memory)
        for image, results in zip(images, found, strict=True):
            check(results[0], image, "dark")


class LengthAndItems:
    """The least that a data set may be."""

    def __init__(self, items: list):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> str:
        return self.items[index]


def examples() -> list[dict]:
    sizes_and_texts = [((100, 60), "bright"), ((40, 90), ["dark thing", "bright"]), ((64, 64), ["dark"])]
    return [{"image": two_sided(size), "text": text} for size, text in sizes_and_texts]


def check_all(results: list[list[dict]]) -> None:
    assert len(results) == 3
    for example, found in zip(examples(), results, strict=True):
        texts = [example["text"]] if isinstance(example["text"], str) else example["text"]
        assert len(found) == len(texts)
        for result, text in zip(found, texts, strict=True):
            check(result, example["image"], text)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_lists_and_generators_in_batches(pipe, batch_size):
    from_list = pipe(examples(), batch_size=batch_size)
    from_generator = list(pipe((example for example in examples()), batch_size=batch_size))
    check_all(from_list)
    check_all(from_generator)
    rows = [row | {"text": [row["text"]] if isinstance(row["text"], str) else row["text"]} for row in examples()]
    check_all(list(pipe(Dataset.from_list(rows), batch_size=batch_size)))
    alone = [pipe(example) for example in examples()]
    for batched, single in zip(from_list, alone, strict=True):
        for a, b in zip(batched, single, strict=True):
            assert a["score"] == pytest.approx(b["score"], abs=1e-6)
            assert np.array_equal(a["mask"], b["mask"])


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_batch_size_is_that_of_images_whose_expressions_go_together(pipe, batch_size):
    pipe(examples(), batch_size=batch_size)
    counts = [1, 2, 1]
    groups = [counts[i : i + batch_size] for i in range(0, 3, batch_size)]
    assert pipe.model.calls == [(len(group), sum(group), 32) for group in groups]


def test_500_expressions_about_one_image_are_one_call_of_the_model(pipe):
    image, texts = two_sided((40, 30)), ["dark " * (1 + i % 3) if i % 2 else f"bright {i}" for i in range(500)]
    results = pipe(image, texts)
    assert len(results) == 500 and pipe.model.calls == [(1, 500, 32)]
    for result, text in zip(results, texts, strict=True):
        check(result, image, text)


@pytest.mark.parametrize("max_expressions", [1, 2, 3])
def test_the_caller_says_how_many_expressions_go_through_the_model_at_once(pipe, max_expressions):
    check_all(pipe(examples(), batch_size=3, max_expressions=max_expressions))
    assert pipe.model.calls == [(3, 4, max_expressions)]


def test_several_images_with_the_same_expressions(pipe):
    images = [two_sided((100, 60)), two_sided((30, 50))]
    for image, results in zip(images, pipe(images, text=["dark", "bright"]), strict=True):
        check(results[0], image, "dark")
        check(results[1], image, "bright")


def test_text_given_at_construction(model, processor):
    image = two_sided((100, 60))
    pipe = ReferringImageSegmentationPipeline(model=model, processor=processor, text="dark", threshold=0.6)
    check(pipe(image)[0], image, "dark")
    check(pipe(image, text="bright")[0], image, "bright")
    check(pipe({"image": image, "text": "bright"})[0], image, "bright")


def test_a_dictionary_without_a_text_takes_the_text_of_the_call(pipe):
    image = two_sided((100, 60))
    for given in ({"image": image}, {"image": image, "text": None}):
        (result,) = pipe(given, "dark")
        check(result, image, "dark")


def test_a_model_out_of_training_is_ready_to_answer(model, processor):
    pipe = ReferringImageSegmentationPipeline(model=model.train(), processor=processor)
    assert not pipe.model.training


def test_threshold(pipe):
    ramp = Image.fromarray(np.tile(np.linspace(60, 180, 80).astype(np.uint8), (80, 1)))
    shares = [np.asarray(pipe(ramp, text="b", threshold=t)[0]["mask"]).mean() for t in (0.1, 0.5, 0.9)]
    assert shares[0] > shares[1] > shares[2]
    pipe.processor.mask_threshold = 0.9
    assert np.asarray(pipe(ramp, text="b")[0]["mask"]).mean() == shares[2]


def test_half_precision(model, processor):
    image = two_sided((100, 60))
    pipe = ReferringImageSegmentationPipeline(model=model.to(torch.bfloat16), processor=processor)
    check(pipe(image, text="dark")[0], image, "dark")


def test_through_the_library_factory(model, processor):
    pipe = pipeline(
        "image-segmentation",
        model=model,
        processor=processor,
        pipeline_class=ReferringImageSegmentationPipeline,
        device="cpu",
    )
    image = two_sided((100, 60))
    assert type(pipe) is ReferringImageSegmentationPipeline
    check(pipe(image, text="dark")[0], image, "dark")


def test_what_is_missing_is_named(pipe, model):
    image = two_sided((100, 60))
    for call in (lambda: pipe(image), lambda: pipe({"image": image}), lambda: pipe([image, image])):
        with pytest.raises(ValueError, match="argument text is missing"):
            call()
    for call in (lambda: pipe({"text": "dark"}), lambda: pipe(None, text="dark")):
        with pytest.raises(ValueError, match="argument image is missing"):
            call()
    with pytest.raises(ValueError, match="argument processor is missing"):
        ReferringImageSegmentationPipeline(model=model)
    with pytest.raises(TypeError, match="treshold"):
        pipe(image, text="dark", treshold=0.4)


def test_bad_options_and_types_are_named_before_the_model_runs(pipe):
    image = two_sided((100, 60))
    for threshold in (0, 1, 1.5, "0.5", float("nan")):
        with pytest.raises(ValueError, match=f"threshold must be a number between 0 and 1, got {threshold!r}"):
            pipe(image, "dark", threshold=threshold)
    for number in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match=f"max_expressions must be a positive integer, got {number!r}"):
            pipe(image, "dark", max_expressions=number)
    for text, name in ((5, "int"), ({"a": 1}, "dict"), (b"dark", "bytes")):
        with pytest.raises(TypeError, match=f"text must be a string or a list of strings, got {name}"):
            pipe(image, text)
    with pytest.raises(TypeError, match=r"text\[0\]\[1\] must be a string, got int"):
        pipe(image, ["dark", 5])
    with pytest.raises(TypeError, match=r"must be a PIL image.*got int"):
        pipe(5, "dark")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        pipe("nowhere.png", "dark")
    assert pipe.model.calls == []


def test_no_images_no_results(pipe):
    assert pipe([], text="dark") == []
    assert list(pipe(example for example in [])) == []


def test_an_image_too_large_to_decode_is_refused(pipe, tmp_path, monkeypatch):
    two_sided((100, 60)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png is not a readable image.*exceeds limit"):
        pipe(tmp_path / "bomb.png", text="dark")
    assert pipe.model.calls == []


def test_bad_expressions_are_named(pipe, tmp_path):
    image = two_sided((100, 60))
    with pytest.raises(ValueError, match=r"text\[0\]\[1\] is an empty expression"):
        pipe(image, text=["dark", " "])
    with pytest.raises(ValueError, match="every image needs at least one expression"):
        pipe(image, text=[])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"broken\.png is not a readable image"):
        pipe(tmp_path / "broken.png", text="dark")


def make_sera(processor: SeraProcessor, **overrides) -> SeraForReferringSegmentation:
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return make_model(text_config={"vocab_size": len(tokenizer), **ids}, **overrides)


IMAGES, TEXTS = [two_sided((100, 60)), two_sided((33, 47))], [["dark", "the bright one", "zebra"], ["left"]]


def expected_of(model: SeraForReferringSegmentation, processor: SeraProcessor) -> list[dict]:
    """The results of model and processor without the pipeline."""
    inputs = processor(images=IMAGES, text=TEXTS, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    return processor.post_process_referring_segmentation(outputs, inputs)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"batch_size": 2, "max_expressions": 2}])
@pytest.mark.parametrize("predict_presence", [False, True])
def test_with_sera_itself(processor, predict_presence, options):
    """The masks are those without the pipeline, and empty where the model predicts that nothing is meant."""
    model = make_sera(processor, predict_presence=predict_presence)
    if predict_presence:
        with torch.no_grad():  # absent for some of the expressions, present for others
            presence = model(**processor(images=IMAGES, text=TEXTS, return_tensors="pt")).presence_logits
            bias = [parameter for name, parameter in model.named_parameters() if "presence" in name and "bias" in name]
            bias[-1] -= (
                presence.sort().values[len(presence) // 2 - 1 :][:2].mean()
            )  # between two, or rounding would decide
    pipe = ReferringImageSegmentationPipeline(model=model, processor=processor)
    found = pipe([{"image": i, "text": t} for i, t in zip(IMAGES, TEXTS, strict=True)], **options)
    results = [result for results in found for result in results]
    assert [result["label"] for result in results] == [text for group in TEXTS for text in group]
    for result, reference in zip(results, expected_of(model, processor), strict=True):
        mask = np.asarray(result["mask"]) == 255
        assert result["score"] == pytest.approx(reference["score"], abs=1e-5)
        assert (mask == reference["mask"].numpy()).mean() > 0.999
        assert set(result) - {"no_target"} == {"label", "score", "mask"}
        assert ("no_target" in result) == predict_presence
        if predict_presence:
            assert result["no_target"] == pytest.approx(reference["no_target"], abs=1e-5)
            assert mask.any() <= (result["no_target"] <= 0.5)
    if predict_presence:
        assert len({result["no_target"] > 0.5 for result in results}) == 2


@pytest.mark.parametrize("options", [{}, {"tta": "flip"}])
def test_without_padding_an_answer_does_not_depend_on_the_batch(processor, options):
    unpadded = SeraProcessor(SeraImageProcessor(size=70, do_pad=False), processor.tokenizer)
    pipe = ReferringImageSegmentationPipeline(model=make_sera(processor), processor=unpadded)
    asked = [{"image": image, "text": text} for image, text in zip(IMAGES * 2, TEXTS * 2, strict=True)]
    alone, together = pipe(asked, **options), pipe(asked, batch_size=4, **options)
    for one, other in zip(alone, together, strict=True):
        for single, batched in zip(one, other, strict=True):
            assert batched["score"] == pytest.approx(single["score"], abs=1e-5)
            assert (np.asarray(single["mask"]) == np.asarray(batched["mask"])).mean() > 0.999


@pytest.mark.parametrize("do_pad", [True, False])
@pytest.mark.parametrize("options", [{}, {"tta": "flip"}, {"max_expressions": 2, "threshold": 0.4}])
def test_a_prepared_image_gives_the_masks_of_the_image(processor, do_pad, options):
    """It is encoded once, and once more if the flipped image is needed, for all calls and in every place of an image."""
    processor = SeraProcessor(SeraImageProcessor(size=56 if do_pad else 70, do_pad=do_pad), processor.tokenizer)
    model = make_sera(processor, predict_presence=True)
    pipe = ReferringImageSegmentationPipeline(model=model, processor=processor)
    expected = [pipe(image, texts, **options) for image, texts in zip(IMAGES, TEXTS, strict=True)]
    encoded = []
    model.model.vision.tower.embeddings.register_forward_hook(lambda *_: encoded.append(None))
    prepared = [pipe.prepare(image) for image in IMAGES]
    asked = [{"image": image, "text": texts} for image, texts in zip(prepared, TEXTS, strict=True)]
    found = [
        [pipe(image, texts, **options) for image, texts in zip(prepared, TEXTS, strict=True)],
        pipe(asked, **options),
        pipe(asked, batch_size=2, **options),
        list(pipe((one for one in asked), batch_size=2, **options)),
    ]
    assert all(results == expected for results in found)
    assert len(encoded) == 2 * (1 + ("tta" in options))


def test_prepared_images_and_others_in_one_batch(processor):
    model = make_sera(processor)
    pipe = ReferringImageSegmentationPipeline(model=model, processor=processor)
    images = [pipe.prepare(IMAGES[0]), IMAGES[1], pipe.prepare(IMAGES[1])]
    first, second, third = pipe(images, text=["dark", "left"], batch_size=3)
    assert first == pipe(IMAGES[0], ["dark", "left"]) and second == third == pipe(IMAGES[1], ["dark", "left"])


def test_an_image_that_cannot_be_prepared_is_named(processor):
    pipe = ReferringImageSegmentationPipeline(model=make_sera(processor), processor=processor)
    with pytest.raises(TypeError, match=r"must be a PIL image.*got int"):
        pipe.prepare(5)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        pipe.prepare("nowhere.png")
    with pytest.raises(ValueError, match="argument text is missing"):
        pipe(pipe.prepare(IMAGES[0]))


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16, "float16"])
def test_device_and_dtype_pass_through_the_library_factory(processor, tmp_path, dtype):
    model = make_sera(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline(
        "referring-image-segmentation",
        model=str(tmp_path),
        pipeline_class=ReferringImageSegmentationPipeline,
        dtype=dtype,
        device="cpu",
        threshold=0.5,
    )
    assert {parameter.dtype for parameter in pipe.model.parameters()} == {getattr(torch, str(dtype).split(".")[-1])}
    assert pipe.device == pipe.model.device == torch.device("cpu")
    results = [result for image, texts in zip(IMAGES, TEXTS, strict=True) for result in pipe(image, texts)]
    for result, reference in zip(results, expected_of(model, processor), strict=True):
        assert result["score"] == pytest.approx(reference["score"], abs=0.02)
        assert ((np.asarray(result["mask"]) == 255) == reference["mask"].numpy()).mean() > 0.9
