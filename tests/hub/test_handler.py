"""The endpoint's handler, loaded from a saved folder as the inference toolkit loads it."""

import base64
import importlib.util
import io
import json
import re
import shutil
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import image_bytes
from conftest import REPOSITORY
from PIL import Image
from stand_ins import make_processor, tiny_model

EXPRESSIONS = ["left zebra", "the cup", "right"]


def load_handler(folder: Path):
    """The module `handler.py` of a folder, found by its path alone."""
    name = "handler.EndpointHandler"
    spec = importlib.util.spec_from_file_location(name, folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repository") / "model"
    tiny_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    shutil.copy(REPOSITORY / "hub" / "handler.py", folder)
    return folder


@pytest.fixture(scope="module")
def module(folder):
    return load_handler(folder)


@pytest.fixture(scope="module")
def handler(module, folder):
    return module.EndpointHandler(str(folder))


PNG = image_bytes("PNG")


def encoded(content: bytes = PNG) -> str:
    return base64.b64encode(content).decode()


def request(text="left zebra", image=None, **parameters) -> dict:
    return {"inputs": {"image": encoded() if image is None else image, "text": text}, "parameters": parameters}


def masks(answers: list[dict]) -> list[np.ndarray]:
    """The answers' masks as bool arrays; each must be a PNG of mode "L" with nothing but 0 and 255."""
    arrays = []
    for answer in answers:
        with Image.open(io.BytesIO(base64.b64decode(answer["mask"], validate=True))) as opened:
            assert opened.format == "PNG" and opened.mode == "L"
            arrays.append(np.asarray(opened))
        assert set(np.unique(arrays[-1])) <= {0, 255}
    return [array > 0 for array in arrays]


def expected(image: Image.Image, expressions: list[str], threshold: float | None = None) -> list[dict]:
    """The answer of model and processor about one image, in one pass."""
    processor = make_processor()
    inputs = processor(images=[image], text=[expressions], return_tensors="pt")
    with torch.inference_mode():
        return processor.post_process_referring_segmentation(tiny_model()(**inputs), inputs, threshold=threshold)


def middle_threshold(image: Image.Image) -> float:
    """A threshold with pixels on both sides, for a model that was never trained."""
    processor = make_processor()
    inputs = processor(images=[image], text=[EXPRESSIONS], return_tensors="pt")
    with torch.inference_mode():
        return tiny_model()(**inputs).logits.sigmoid().median().item()


def test_masks_and_scores_are_those_of_the_processor(handler):
    image = Image.open(io.BytesIO(PNG))
    threshold = middle_threshold(image)
    answers = handler(json.loads(json.dumps(request(EXPRESSIONS, threshold=threshold))))
    assert [answer["label"] for answer in answers] == EXPRESSIONS
    for answer, mask, truth in zip(answers, masks(answers), expected(image, EXPRESSIONS, threshold), strict=True):
        assert set(answer) == {"label", "score", "mask"}
        assert 0 < mask.sum() < mask.size
        assert np.array_equal(mask, truth["mask"].numpy()) and answer["score"] == truth["score"]
    json.dumps(answers)


def test_expressions_in_groups_are_answered_as_those_at_once(handler, module, monkeypatch):
    image = Image.open(io.BytesIO(PNG))
    threshold = middle_threshold(image)
    expressions = [f"{text} {i}" for i in range(3) for text in EXPRESSIONS]
    monkeypatch.setattr(module, "EXPRESSIONS_AT_ONCE", 2)
    answers = handler(request(expressions, threshold=threshold))
    truths = expected(image, expressions, threshold)
    assert [answer["label"] for answer in answers] == expressions
    for answer, mask, truth in zip(answers, masks(answers), truths, strict=True):
        assert (mask != truth["mask"].numpy()).mean() < 1e-3
        assert answer["score"] == pytest.approx(truth["score"], abs=1e-5)


def test_every_way_to_send_a_request_is_the_same_request(handler):
    text, image = ["left zebra", "the cup"], encoded()
    lines = "\n".join(re.findall(".{1,76}", image))
    ways = [
        request(text),
        request(text, image=f"data:image/png;base64,{image}"),
        request(text, image=lines),
        {"inputs": {"image": image, "expressions": text}},
        {"inputs": {"image": image}, "parameters": {"text": text}},
        {"inputs": image, "parameters": {"expressions": text}},
        {"inputs": PNG, "parameters": {"text": text}},
        {"inputs": Image.open(io.BytesIO(PNG)), "parameters": {"text": text}},
        {"inputs": {"image": image, "text": text}, "parameters": None},
    ]
    first, *others = [handler(way) for way in ways]
    assert all(other == first for other in others)
    assert handler(request(text[0])) == handler(request(text[:1]))


def test_a_threshold_of_a_query_string_is_a_number_and_matters(handler):
    threshold = middle_threshold(Image.open(io.BytesIO(PNG)))
    assert handler(request(threshold=str(threshold))) == handler(request(threshold=threshold))
    (low,), (high,) = (masks(handler(request(threshold=t))) for t in (0.9 * threshold, 1.1 * threshold))
    assert low.sum() > high.sum() and not (high & ~low).any()


def test_masks_lie_on_the_image_as_it_is_shown(handler):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = image_bytes("JPEG", exif=exif)
    (mask,) = masks(handler(request(image=encoded(turned))))
    assert mask.shape == (60, 40)  # the file has 40 rows of 60 pixels


@pytest.fixture
def counting(module, folder, monkeypatch):
    """A handler with an empty cache, and the list of the shapes of what its model encoded."""
    handler, calls = module.EndpointHandler(str(folder)), []
    encode = handler.model.get_image_features

    def count(pixel_values):
        calls.append(tuple(pixel_values.shape))
        return encode(pixel_values)

    monkeypatch.setattr(handler.model, "get_image_features", count)
    return handler, calls


def coloured(colour: str, size: tuple[int, int] = (30, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_further_request_about_an_image_does_not_encode_it_again(counting, monkeypatch):
    handler, calls = counting
    first = handler(request(EXPRESSIONS))
    assert len(calls) == 1
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was decoded again"))
    assert handler(request(EXPRESSIONS)) == first and handler(request("right"))[0]["label"] == "right"
    assert handler({"inputs": bytearray(PNG), "parameters": {"text": EXPRESSIONS}}) == first
    with pytest.raises(ValueError, match="text is empty"):
        handler(request(""))
    assert len(calls) == 1


def test_images_without_a_file_are_known_by_what_the_model_gets(counting):
    handler, calls = counting
    opened = [Image.open(io.BytesIO(PNG)), Image.open(io.BytesIO(PNG)), Image.new("RGB", (60, 40), "red")]
    answers = [handler({"inputs": image, "parameters": {"text": "cup"}}) for image in opened]
    assert len(calls) == 2 and answers[0] == answers[1] != answers[2]
    (mask,) = masks(handler({"inputs": Image.new("RGB", (120, 80), "red"), "parameters": {"text": "cup"}}))
    assert len(calls) == 3 and mask.shape == (80, 120)  # the model gets the same, but the mask has another size


def test_what_is_kept_is_bounded(counting):
    handler, calls = counting
    handler(request(image=encoded_image(0)))
    size = handler.kept.num_bytes
    handler.kept.max_bytes = 2 * size
    for n in (1, 0, 2, 0, 1):  # of 0, 1 and 2, image 1 was not used for longest when 2 came
        handler(request(image=encoded_image(n)))
        assert handler.kept.num_bytes <= 2 * size and len(handler.kept) <= 2
    assert len(calls) == 4
    handler.kept.max_bytes = 0
    before = handler(request(image=encoded_image(3)))
    assert handler(request(image=encoded_image(3))) == before and len(calls) == 6


def encoded_image(number: int) -> str:
    return encoded(coloured(["red", "green", "blue", "white"][number]))


def test_threads_get_the_answers_about_their_own_images(counting):
    handler, _ = counting
    alone = [handler(request(image=encoded_image(n))) for n in range(4)]
    handler.kept.max_bytes = 2 * handler.kept.num_bytes // 4
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda n: handler(request(image=encoded_image(n % 4))), range(16)))
    assert together == [alone[n % 4] for n in range(16)]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats(handler, form):
    (mask,) = masks(handler(request(image=encoded(image_bytes(form)))))
    assert mask.shape == (40, 60)


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000)])
def test_images_of_any_shape(handler, size):
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    (mask,) = masks(handler(request(image=encoded(buffer.getvalue()))))
    assert mask.shape == size[::-1]


def test_a_telephones_jpeg_of_two_images_is_accepted(handler):
    first, second = (Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
    buffer = io.BytesIO()
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    (mask,) = masks(handler(request(image=encoded(buffer.getvalue()))))
    assert mask.shape == (20, 30)


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG: it gives a size and has no pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"")


def eps() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    return buffer.getvalue()


class AnOutsideFile(Image.Image):
    """An image of a format that the endpoint does not read, not decoded yet."""

    format = "EPS"

    def load(self):
        raise AssertionError("it was decoded")


BAD = {
    "nothing": ({}, "has no inputs"),
    "no object": ("left zebra", "has no inputs"),
    "no inputs": ({"parameters": {"text": "cup"}}, "has no inputs"),
    "null inputs": ({"inputs": None}, "has no inputs"),
    "no image": ({"inputs": {"text": "cup"}}, "has no image"),
    "no text": ({"inputs": {"image": encoded()}}, "has no text"),
    "bare image": ({"inputs": PNG}, "has no text"),
    "text twice": ({"inputs": {"image": encoded(), "text": "a"}, "parameters": {"text": "b"}}, "several places"),
    "misspelt input": ({"inputs": {"image": encoded(), "txt": "cup"}}, "unknown name 'txt'"),
    "misspelt parameter": (request(treshold=0.5), "unknown name 'treshold'"),
    "parameters no object": ({"inputs": {"image": encoded(), "text": "cup"}, "parameters": [1]}, "must be an object"),
    "empty text": (request(""), "text is empty"),
    "blank text": (request(["cup", " \t "]), r"text\[1\] is empty"),
    "text of invisible signs": (request(["cup", "\u200b\u200d"]), r"text\[1\] is empty"),
    "no expressions": (request([]), "empty list"),
    "500 expressions": (request(["cup"] * 500), "500 expressions; send at most 100"),
    "long expression": (request("cup " * 1000), "4000 characters; send at most 1000"),
    "expression of too many tokens": (request("cup " * 200), r"text\[0\] has more tokens"),
    "text a number": (request(7), "got a number"),
    "text of numbers": (request(["cup", 7]), r"text\[1\] must be a string, got a number"),
    "nested text": (request([["cup"]]), r"text\[0\] must be a string, got a list"),
    "text of bytes": (request(b"\xff\xfe"), "got bytes"),
    "half a surrogate pair": (request(["cup", "\ud83d cup"]), r"text\[1\] is not valid UTF-8"),
    "threshold 0": (request(threshold=0), "between 0 and 1"),
    "threshold 1": (request(threshold=1), "between 0 and 1"),
    "threshold NaN": (request(threshold=float("nan")), "between 0 and 1"),
    "threshold a word": (request(threshold="half"), "between 0 and 1"),
    "threshold true": (request(threshold=True), "between 0 and 1"),
    "threshold a list": (request(threshold=[0.5]), "between 0 and 1"),
    "image a number": (request(image=5), "got a number"),
    "image a list": (request(image=[encoded()]), "got a list"),
    "image an object": (request(image={"url": "x"}), "got an object"),
    "image a URL": (request(image="https://example.com/cat.png"), "is a URL"),
    "image a path": (request(image="/etc/passwd"), "not (valid base64|an image)"),
    "image in no base64": (request(image="kätzchen"), "not valid base64"),
    "data URL without base64": (request(image="data:image/svg+xml,<svg/>"), "data URL without base64"),
    "base64 cut off": (request(image=encoded()[:-3]), "not valid base64"),
    "base64 of half an image": (request(image=encoded(PNG[: len(PNG) // 2])), "cannot be decoded to its end"),
    "base64 of half a JPEG": (request(image=encoded(image_bytes("JPEG")[:900])), "cannot be decoded to its end"),
    "base64 of a few bytes": (request(image=encoded(PNG[:20])), "not an image"),
    "empty image": (request(image=""), "not an image"),
    "base64 of text": (request(image=encoded(b"left zebra")), "not an image"),
    "damaged image": (request(image=encoded(PNG[:300] + bytes(50) + PNG[350:])), "cannot be decoded to its end"),
    "format that starts a program": (request(image=encoded(eps())), "one of these formats"),
    "opened image of such a format": (
        {"inputs": AnOutsideFile(), "parameters": {"text": "cup"}},
        "EPS image is not",
    ),
    "too many pixels": (request(image=encoded(png_header(6000, 5000))), "6000 x 5000 pixels; send at most 25000000"),
    "far too many pixels": (request(image=encoded(png_header(2**30, 2**30))), "too many pixels"),
    "opened image of too many pixels": (
        {"inputs": Image.open(io.BytesIO(png_header(6000, 5000))), "parameters": {"text": "cup"}},
        "6000 x 5000 pixels",
    ),
    "too many bytes": ({"inputs": PNG + bytes(20 * 2**20), "parameters": {"text": "cup"}}, "send at most 20971520"),
    "too much base64": (request(image="A" * (32 * 2**20)), "characters of base64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_what_to_change_and_nothing_else(handler, folder, name):
    data, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        handler(data)
    answer = str(error.value)
    assert answer[-1] in ".?" and "\n" not in answer and len(answer) < 250
    assert str(folder) not in answer and "Traceback" not in answer and ".py" not in answer
    assert error.value.__cause__ is None and (error.value.__context__ is None or error.value.__suppress_context__)


def test_values_that_are_not_colours(handler):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(buffer, "TIFF")
    with pytest.raises(ValueError, match="values are not colours"):
        handler(request(image=encoded(buffer.getvalue())))


def test_as_many_expressions_as_are_allowed(handler):
    assert len(handler(request(["cup"] * 100))) == 100


def test_a_failure_of_the_model_stays_in_the_log(handler, monkeypatch, caplog):
    def fail(**inputs):
        raise RuntimeError("CUDA error in /opt/secret/kernel.cu")

    monkeypatch.setattr(handler.model, "forward", fail)
    with pytest.raises(
        RuntimeError, match=r"^The model could not answer this request; the endpoint's log says why\.$"
    ) as e:
        handler(request())
    assert e.value.__suppress_context__ and "/opt/secret/kernel.cu" in caplog.text


def test_after_a_bad_request_the_next_is_answered(handler):
    before = handler(request())
    for data, _ in BAD.values():
        with pytest.raises(ValueError):
            handler(data)
    assert handler(request()) == before


@pytest.mark.parametrize(
    "missing",
    ["model.safetensors", "config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"],
)
def test_a_folder_that_lacks_a_file_does_not_start(module, folder, tmp_path, missing):
    partial = shutil.copytree(folder, tmp_path / "model")
    (partial / missing).unlink()
    with pytest.raises((OSError, ValueError)):
        module.EndpointHandler(str(partial))


def test_requirements_are_those_of_the_package():
    project = (REPOSITORY / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0]
    needed = (REPOSITORY / "hub" / "requirements.txt").read_text().split()
    assert set(needed) <= set(re.findall('"(.*?)"', project))
    assert {re.split("[>=]", line)[0] for line in needed} == {"torch", "transformers", "pillow"}
