"""The Space: its parts by themselves, and its page as a visitor's browser shows it.

The page's tests drive a Chromium of the system's. The documentation's images of the page come from

    SERA_MODEL=checkpoints/sera-scenes SERA_SCREENSHOTS=docs python -m pytest tests/hub/test_space.py -k screenshots

They show the benchmark's first test scene of seed 0 and the first expression about each of its first three objects; they were not
chosen by the result. Without the two variables, the model is a tiny random one and the images go to a temporary folder.
"""

import importlib.util
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from builders import disc, image_bytes
from conftest import REPOSITORY, save_tiny_model
from PIL import Image
from pycocotools import mask as coco_mask

from training.prediction import write_prediction
from training.sources.scenes.dataset import generate_scenes

pytest.importorskip("gradio", reason="the Space's page is made with gradio")
SPACE = REPOSITORY / "hub" / "space"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
DESKTOP, PHONE = {"width": 1180, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 120_000  # milliseconds; a busy machine may be slow
TEXTS = ["left zebra", "the cup", "zebra"]

# `sitecustomize` of the app's process: writes down every host that its Python looks up or connects to
WATCH = """
import os, sys
def note(event, arguments):
    address = arguments[0] if event == "socket.getaddrinfo" else None
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        address = arguments[1][0]
    if address is not None:
        with open(os.environ["CONTACTED"], "a") as file:
            file.write(f"{address}\\n")
sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def app() -> ModuleType:
    """The Space's file, imported."""
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["space_app"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["space_app"]


def save_tiny(folder: Path, **overrides) -> Path:
    """A tiny random model with its processor, as training saves them, and one example beside it."""
    save_tiny_model(folder, **overrides)
    (folder / "examples").mkdir()
    (folder / "examples" / "1-image.png").write_bytes(image_bytes("PNG"))
    example = {"image": "1-image.png", "text": ["right cup", "zebra"]}
    (folder / "examples" / "examples.json").write_text(json.dumps([example]))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("space") / "model")


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A JPEG with an orientation tag: 60 wide and 40 high in the file, 40 wide and 60 high when shown."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    path.write_bytes(image_bytes("JPEG", exif=exif))
    return path


# The parts


def test_expressions_are_lines(app):
    assert app.parse_expressions("  left zebra \n\n the cup\r\nleft zebra\n") == ["left zebra", "the cup"]
    assert len(app.parse_expressions("\n".join(f"cup {i}" for i in range(app.MAX_EXPRESSIONS)))) == app.MAX_EXPRESSIONS


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "Say what to find"),
        (None, "Say what to find"),
        (" \n\t\n", "Say what to find"),
        ("\n".join(map(str, range(500))), "500 phrases; give at most"),
        ("cup\n" + "x" * 2000, "has 2000 characters"),
    ],
)
def test_expressions_that_are_refused(app, text, message):
    with pytest.raises(ValueError, match=message):
        app.parse_expressions(text)


def claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size."""
    content = image_bytes("PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (image_bytes("JPEG")[:1500], "cannot be decoded to its end"),
        (image_bytes("PNG")[:1500], "cannot be decoded to its end"),
        (claiming(6000, 6000), "6000 × 6000 pixels"),
        (claiming(60000, 60000), "too many pixels"),
        (image_bytes("PNG") + bytes(21 * 2**20), "at most 20 MB"),
    ],
)
def test_images_that_are_refused(app, tmp_path, content, message):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        app.open_image(str(path))
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("size", [(40, 60), (1, 500), (480, 640), (3000, 4000), (700, 700), (5000, 1)])
def test_what_is_shown_is_neither_tiny_nor_huge_and_keeps_its_proportions(app, size):
    height, width = app.shown_size(size)
    assert 640 <= max(height, width) <= 1024 and min(height, width) >= 1
    assert abs(width - size[1] * height / size[0]) <= max(1, size[1] / size[0])


def test_colours_are_told_apart(app):
    colors = np.array(app.COLORS, float)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 1000 * np.eye(len(colors))
    assert distances.min() > 50 and np.linalg.norm(np.diff(colors[:6], axis=0), axis=-1).min() > 120


def test_an_overlay_tints_each_mask_in_its_colour_and_dims_the_rest(app):
    image = np.full((640, 640, 3), 128, np.uint8)
    masks = {i: disc((640, 640), (320, 160 + 320 * (i == 4)), 100) for i in (1, 4)}
    drawn = np.asarray(app.draw_overlay(image, masks), float)
    for i, column in ((1, 160), (4, 480)):
        towards = drawn[320, column] - 128
        assert np.dot(towards, np.subtract(app.COLORS[i], 128)) > 0.9 * np.linalg.norm(towards) * np.linalg.norm(
            np.subtract(app.COLORS[i], 128)
        )
        assert {tuple(color) for color in drawn[masks[i]].astype(int).tolist()} >= {(255, 255, 255), app.COLORS[i]}
    assert (drawn[~(masks[1] | masks[4])] < 128).all()
    assert np.array_equal(app.draw_overlay(image, {}), image)
    assert (np.asarray(app.draw_overlay(image, {0: np.zeros((640, 640), bool)})) < 128).all()


def test_the_legend_says_when_nothing_is_meant(app):
    full, empty = np.ones((2, 2), bool), np.zeros((2, 2), bool)
    results = [
        {"mask": full, "score": 0.876},
        {"mask": full, "score": 0.5, "no_target": 0.4},
        {"mask": empty, "score": 0.5, "no_target": 0.93},
        {"mask": empty, "score": 0.25, "no_target": 0.1},
        {"mask": empty, "score": 0.25},
    ]
    said = ["score 0.88", "score 0.50", "not in the image (93%)", *["no pixel above the threshold"] * 2]
    assert app.legend(list("abcde"), results, 0.5) == [(f"{'abcde'[i]} · {text}", i) for i, text in enumerate(said)]


def test_bars_show_the_shares_of_the_chosen_expressions(app):
    fusion = [(4, np.array([[0.1, 0.2, 0.3, 0.4], [0.0, 0.75, 0.25, 0.0]]))]
    adapter = [(1, np.array([[0.5, 0.5], [0.999, 0.001]]))]
    answer = app.Answer(["<b>cup</b>", "zebra"], None, (1, 1), None, None, fusion, adapter)
    both, second = app.routing_bars(answer, [0, 1]), app.routing_bars(answer, [1])
    assert both.count("<section>") == 2 and "&lt;b&gt;cup" in both and "<b>cup" not in both
    assert "cup" not in second and second.count("<b ") == 3  # no expert without a share
    assert [second.count(f'title="{name}"') for name in ("context: 75.0%", "boundary: 25.0%", "spatial: 99.9%")] == [
        1
    ] * 3
    assert app.routing_bars(answer, []) == ""
    assert app.routing_bars(app.Answer(["cup"], None, (1, 1), None, None, [], []), [0]) == ""


def test_files_equal_those_of_the_command_line(app, tmp_path):
    masks = [disc((40, 60), (20, 30), 11), np.zeros((40, 60), bool), np.ones((40, 60), bool)]
    numbers = [{"score": 0.75}, {"score": 0.25, "no_target": 0.875}, {"score": 0.5, "no_target": 0.125}]
    results = [{"mask": mask} | number for mask, number in zip(masks, numbers, strict=True)]
    app.write_files(TEXTS, results, tmp_path)
    images = [Image.fromarray(mask.astype(np.uint8) * 255) for mask in masks]
    given = [{"label": text, "mask": mask} | number for text, mask, number in zip(TEXTS, images, numbers, strict=True)]
    write_prediction(Image.new("RGB", (60, 40)), given, tmp_path / "command")
    assert (tmp_path / "prediction.json").read_text() == (tmp_path / "command" / "prediction.json").read_text()
    with zipfile.ZipFile(tmp_path / "masks.zip") as archive:
        assert archive.namelist() == ["mask-1.png", "mask-2.png", "mask-3.png"]
        for name, mask in zip(archive.namelist(), masks, strict=True):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(archive.read(name)))), 255 * mask)


def test_masks_are_the_models_own_and_another_threshold_does_not_run_it_again(app, tmp_path, photo, monkeypatch):
    segmenter = app.Segmenter(str(save_tiny(tmp_path / "model", predict_presence=True)))
    answer = segmenter.answer(str(photo), TEXTS)
    assert answer.size == (60, 40) and answer.image.shape == (640, 427, 3)
    model, processor = segmenter.model, segmenter.processor
    inputs = processor(images=[str(photo)], text=[TEXTS], return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs, output_router_weights=True)
    monkeypatch.setattr(model, "forward", lambda *arguments, **options: pytest.fail("it ran again"))
    for threshold in (0.3, 0.5, 0.55):
        expected = processor.post_process_referring_segmentation(outputs, inputs, threshold=threshold)
        for result, reference in zip(segmenter.results(answer, threshold, (60, 40)), expected, strict=True):
            assert np.array_equal(result["mask"], reference["mask"].numpy())
            assert (result["score"], result["no_target"]) == (reference["score"], reference["no_target"])
    shares = np.array([weights.numpy() for weights in outputs.fusion_router_weights])
    assert np.array_equal(np.array([shares for _, shares in answer.fusion]), shares)
    assert [depth for depth, _ in answer.fusion] == model.config.tap_layers
    assert [block for block, _ in answer.adapter] == model.config.adapter_layers


def test_a_further_answer_about_an_image_does_not_encode_it_again(app, folder, photo, tmp_path, monkeypatch):
    segmenter, calls = app.Segmenter(str(folder)), []
    encode = segmenter.model.get_image_features
    monkeypatch.setattr(segmenter.model, "get_image_features", lambda images: calls.append(None) or encode(images))
    first = segmenter.answer(str(photo), TEXTS)
    copied = shutil.copy(photo, tmp_path / "renamed.jpg")
    for path in (photo, copied):
        again = segmenter.answer(str(path), TEXTS)
        assert torch.equal(again.logits, first.logits) and again.size == first.size
        assert np.array_equal(again.image, first.image) and len(calls) == 1
    size = segmenter.kept.num_bytes
    assert size > first.image.nbytes
    segmenter.kept.max_bytes = 2 * size
    for width in (50, 51, 52):
        Image.new("RGB", (width, 40)).save(tmp_path / "image.png")
        segmenter.answer(str(tmp_path / "image.png"), TEXTS)
        assert segmenter.kept.num_bytes <= 2 * size and len(segmenter.kept) <= 3
    assert len(calls) == 4
    segmenter.answer(str(photo), TEXTS)
    assert len(calls) == 5  # it was not used for longest


def test_expressions_that_the_model_cannot_read_whole(app, folder, photo):
    segmenter = app.Segmenter(str(folder))
    for text, message in (("\u200b", "no visible character"), ("zebra " * 100, "longer than the model reads")):
        with pytest.raises(ValueError, match=message):
            segmenter.answer(str(photo), ["left zebra", text])


def test_examples_lie_beside_the_weights(app, folder, tmp_path):
    assert app.find_examples(str(folder)) == [[str(folder / "examples" / "1-image.png"), "right cup\nzebra"]]
    assert app.find_examples(str(tmp_path)) == []
    (tmp_path / "examples").mkdir()
    for content in ("{", '{"a": 1}', '[{"image": "x.png"}]'):
        (tmp_path / "examples" / "examples.json").write_text(content)
        assert app.find_examples(str(tmp_path)) == []


@pytest.mark.parametrize(
    "name, message",
    [(None, "SERA_MODEL is not set"), (" ", "SERA_MODEL is not set"), ("{tmp_path}/none", "which cannot be used")],
)
def test_without_a_model_it_says_so_and_ends(app, tmp_path, monkeypatch, name, message):
    monkeypatch.delenv("SERA_MODEL", raising=False)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    if name is not None:
        monkeypatch.setenv("SERA_MODEL", name.format(tmp_path=tmp_path))
    with pytest.raises(SystemExit) as error:
        app.main()
    assert str(error.value.code).startswith("error: ") and message in error.value.code
    assert "\n" not in error.value.code


def test_the_readme_is_a_spaces():
    metadata = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    assert metadata["sdk"] == "gradio" and (SPACE / metadata["app_file"]).is_file()
    assert {"title", "sdk_version", "license", "models"} <= set(metadata) and len(metadata["short_description"]) <= 60


# The page


class Server:
    """The app in a process of its own, as a Space runs it, on a port of this machine."""

    def __init__(self, model: Path, place: Path):
        place.mkdir()
        (place / "sitecustomize.py").write_text(WATCH)
        self.contacted, self.log = place / "contacted", place / "log"
        self.port = free_port()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GRADIO_", "HF_"))}
        settings = {"SERA_MODEL": str(model), "GRADIO_SERVER_PORT": str(self.port), "CONTACTED": str(self.contacted)}
        settings |= {"GRADIO_TEMP_DIR": str(place / "files"), "HF_HOME": str(place / "home"), "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SPACE / "app.py")],
                env=inherited | settings | {"PYTHONPATH": str(place)},
                cwd=place,
                stdout=log,
                stderr=log,
            )
        self.url = f"http://127.0.0.1:{self.port}/"

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()
            try:
                urllib.request.urlopen(self.url).close()
                return
            except urllib.error.URLError:
                time.sleep(0.2)
        pytest.fail(f"it does not answer: {self.log.read_text()}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[Server]:
    server = Server(folder, tmp_path_factory.mktemp("server") / "place")
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """One visitor's page.

    Attributes:
        page: Playwright's.
        url: The app's.
        requested: The URLs of all requests that the page made.
    """

    def __init__(self, browser, server: Server, viewport: dict[str, int]):
        self.context = browser.new_context(viewport=viewport)
        self.context.set_default_timeout(PATIENCE)
        self.page, self.requested, self.url = self.context.new_page(), [], server.url
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(server.url)
        self.button = self.page.locator("#segment")
        self.button.wait_for()

    def close(self) -> None:
        """End the visit; it sent requests to the app alone."""
        self.context.close()
        assert len(self.requested) > 10
        assert [url for url in self.requested if not url.startswith((self.url, "data:", "blob:"))] == []

    def upload(self, path: Path) -> None:
        self.page.locator("#image input[type=file]").set_input_files(str(path))
        self.page.locator("#image img").wait_for()

    def remove_image(self) -> None:
        self.page.get_by_label("Remove Image").click()
        self.page.locator("#image img").wait_for(state="detached")

    def ask(self, *texts: str) -> np.ndarray:
        """Type expressions, press the button, and wait for the overlay: uint8 (h, w, 3)."""
        self.page.locator("#expressions textarea").fill("\n".join(texts))
        return self.after(self.button.click)

    def after(self, act) -> np.ndarray:
        """The overlay that an action brings."""
        before = self._source()
        act()
        for _ in range(PATIENCE // 50):
            if self._source() not in (None, before):
                return self.overlay()
            self.page.wait_for_timeout(50)
        pytest.fail("no other overlay appeared")

    def _source(self) -> str | None:
        image = self.page.locator("#overlay img")
        return image.get_attribute("src") if image.count() else None

    def overlay(self) -> np.ndarray:
        response = self.context.request.get(self._source())
        return np.asarray(Image.open(io.BytesIO(response.body())).convert("RGB"))

    def message(self) -> str:
        """What the next message says; it is closed."""
        toast = self.page.locator(".toast-body").first
        toast.wait_for()
        text = toast.inner_text()
        toast.locator(".toast-close").click()
        toast.wait_for(state="detached")
        return text

    def set_threshold(self, value: float) -> None:
        field = self.page.locator("#threshold input[type=number]")
        field.fill(str(value))
        field.press("Enter")

    def labels(self) -> list[str]:
        return self.page.locator("#shown label").all_inner_texts()


@pytest.fixture
def visit(browser, server) -> Iterator[Visit]:
    visit = Visit(browser, server, DESKTOP)
    yield visit
    visit.close()


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two images differ by more than compression changes."""
    return a.shape != b.shape or np.abs(a.astype(int) - b.astype(int)).max() > 40


def test_masks_change_with_the_expression_the_threshold_and_what_is_shown(visit, photo):
    visit.upload(photo)
    first = visit.ask("left zebra")
    upright = Image.open(photo).transpose(Image.Transpose.ROTATE_270).resize((427, 640))
    assert first.shape == (640, 427, 3) and differ(first, np.asarray(upright))
    two = visit.ask("the cup", "zebra")
    assert differ(first, two)
    labels = visit.labels()
    assert [label.split(" · ")[0].strip() for label in labels] == ["the cup", "zebra"]
    assert visit.page.locator("#routing section").count() == 2 and visit.page.locator("#routing b").count() > 4

    none = visit.after(lambda: visit.set_threshold(0.99))
    assert differ(two, none) and all("no pixel above" in label for label in visit.labels())
    everything = visit.after(lambda: visit.set_threshold(0.01))
    assert differ(none, everything) and all("score" in label for label in visit.labels())

    one = visit.after(lambda: visit.page.locator("#shown label").nth(1).click())
    assert differ(everything, one) and visit.page.locator("#routing section h3").all_inner_texts() == ["the cup"]


def test_what_is_downloaded_is_the_masks_at_the_images_own_size(visit, photo, tmp_path):
    visit.upload(photo)
    visit.ask("left zebra", "the cup")
    visit.page.locator("#make").click()
    for name in ("masks.zip", "prediction.json"):
        with visit.page.expect_download() as download:
            visit.page.locator(f'#files a[download="{name}"]').first.click()
        download.value.save_as(tmp_path / name)
    records = json.loads((tmp_path / "prediction.json").read_text())
    assert [record["expression"] for record in records] == ["left zebra", "the cup"]
    with zipfile.ZipFile(tmp_path / "masks.zip") as archive:
        for record in records:
            mask = np.asarray(Image.open(io.BytesIO(archive.read(record["mask"]))))
            assert mask.shape == (60, 40) and set(np.unique(mask)) <= {0, 255}
            assert np.array_equal(coco_mask.decode(record["rle"]), mask > 0)
            assert f"score {record['score']:.1f}"[:-1] in "".join(visit.labels())
    visit.after(lambda: visit.set_threshold(0.01))
    visit.page.locator("#files").wait_for(state="hidden")  # they were another threshold's


def test_what_cannot_be_answered_is_said(visit, photo, tmp_path):
    visit.button.click()
    assert "Say what to find" in visit.message()
    visit.page.locator("#expressions textarea").fill("left zebra")
    visit.button.click()
    assert "Choose an image" in visit.message()
    for name, content, message in (("a.txt", b"text", "Invalid file type"), ("a.png", bytes(21 * 2**20), "20.0 Mb")):
        (tmp_path / name).write_bytes(content)
        visit.page.locator("#image input[type=file]").set_input_files(str(tmp_path / name))
        assert message in visit.message()
    broken = tmp_path / "photo.png"
    broken.write_bytes(b"no image at all")
    visit.upload(broken)
    visit.button.click()
    assert "not an image" in visit.message()
    broken.write_bytes(image_bytes("PNG"))
    visit.remove_image()
    visit.upload(broken)
    visit.ask("left zebra")  # and goes on
    visit.page.locator("#expressions textarea").fill("\n".join(f"cup {i}" for i in range(13)))
    visit.button.click()
    assert "13 phrases; give at most 12" in visit.message()
    visit.page.locator("#expressions textarea").fill("<img src=x onerror=alert(1)> " * 40)
    visit.button.click()
    assert "<img src=x" in visit.message()  # as text


def test_an_example_is_tried(visit):
    visit.page.get_by_text("right cup").first.click()
    visit.page.locator("#image img").wait_for()
    drawn = visit.after(visit.button.click)
    assert drawn.shape == (427, 640, 3) and len(visit.labels()) == 2


def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser, server, photo):
    visit = Visit(browser, server, PHONE)
    visit.upload(photo)
    visit.ask("left zebra", "zebra " * 12 + "x" * 60, "the cup")
    visit.page.locator("#make").click()
    visit.page.locator('#files a[download="masks.zip"]').first.wait_for()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for name in ("segment", "overlay", "threshold", "shown", "make", "files", "routing"):
        place = visit.page.locator(f"#{name}")
        place.scroll_into_view_if_needed()
        box = place.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"] and box["height"] > 20, name
    visit.close()


def test_the_app_talks_to_nobody(server):
    hosts = set(server.contacted.read_text().split())
    assert hosts and hosts <= {"127.0.0.1", "localhost", "::1", "0.0.0.0"}


def test_screenshots(browser, request, tmp_path):
    """See the top of this file."""
    target = Path(os.environ.get("SERA_SCREENSHOTS", tmp_path))
    rows = generate_scenes(1, seed=0, image_size=448, split="test", scene_set="mixed").select(range(3))
    image = tmp_path / "scene.jpg"
    image.write_bytes(rows[0]["image"]["bytes"])
    if "SERA_MODEL" in os.environ:
        server = Server(Path(os.environ["SERA_MODEL"]).absolute(), tmp_path / "place")
        request.addfinalizer(server.stop)
        server.wait()
    else:
        server = request.getfixturevalue("server")
    for name, viewport in (("space", DESKTOP), ("space_phone", PHONE)):
        visit = Visit(browser, server, viewport)
        visit.upload(image)
        visit.ask(*(row["sentences"][0] for row in rows))
        visit.page.mouse.move(0, 0)
        visit.page.wait_for_timeout(500)  # animations end
        screenshot = Image.open(io.BytesIO(visit.page.screenshot(full_page=True))).convert("RGB")
        colors = screenshot.resize([side // 3 for side in screenshot.size], Image.Resampling.NEAREST).quantize(
            256, kmeans=1
        )
        small = screenshot.quantize(palette=colors, dither=Image.Dither.NONE)
        small.save(target / f"{name}.png", optimize=True)
        assert screenshot.width == viewport["width"] and screenshot.height > viewport["height"]
        assert len(np.unique(np.asarray(screenshot.convert("L")))) > 50
        visit.close()
