"""Every way in which an image comes ends in one decoder, and no URL holds a program up."""

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from processing_sera import image_decoding_sera
from processing_sera.image_decoding_sera import as_image_list, to_rgb_image

MODES = {"L": "png", "LA": "png", "P": "png", "RGBA": "png", "CMYK": "jpg", "I;16": "png", "F": "tif"}


def image_of(mode: str) -> Image.Image:
    """Smooth content of every value that the mode has, with transparency where it has any."""
    rows, columns = np.mgrid[0:20, 0:30]
    colours = Image.fromarray(np.stack([12 * rows, 8 * columns, 255 - 8 * columns], -1).astype(np.uint8))
    if mode in ("I;16", "F"):
        ramp = np.linspace(0, 65535, 600).reshape(20, 30)
        return Image.fromarray(ramp.astype(np.uint16) if mode == "I;16" else (ramp / 65535).astype(np.float32))
    if mode == "P":
        return colours.quantize(16)
    image = colours.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray((8 * columns).astype(np.uint8)))
    return image


class Files(BaseHTTPRequestHandler):
    """Sends the server's files, and for `/slow` one byte now and then."""

    def do_GET(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client may leave before the end
            self.answer()

    def answer(self) -> None:
        self.send_response(200 if self.path in self.server.files else 404)
        self.end_headers()
        if self.path == "/slow":
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.02)
        self.wfile.write(self.server.files.get(self.path, b""))

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    """A server on this machine; `files` holds the content of each path."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        server.files, server.url = {}, f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("mode", MODES)
def test_one_image_gives_the_same_pixels_by_every_way_in(tmp_path, server, processor, mode):
    path = tmp_path / f"image.{MODES[mode]}"
    image_of(mode).save(path)
    assert Image.open(path).mode == mode
    content = path.read_bytes()
    server.files["/an%20image"] = content
    column = datasets.Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image())
    undecoded = column.cast_column("image", datasets.Image(decode=False))[0]["image"]
    used_up = io.BytesIO(content)
    used_up.read()
    ways = {
        "path": str(path),
        "bytes": content,
        "bytearray": bytearray(content),
        "BytesIO": io.BytesIO(content),
        "BytesIO at its end": used_up,
        "data URL": "data:image/any;base64," + base64.b64encode(content).decode(),
        "http": f"{server.url}/an image",
        "opened": Image.open(path),
        "row of a data set": column[0]["image"],
        "undecoded row, path": undecoded,
        "undecoded row, bytes": {"bytes": content, "path": "image.png"},
    }
    expected = np.asarray(to_rgb_image(path))
    assert expected.std() > 20
    for way, image in ways.items():
        assert np.array_equal(np.asarray(to_rgb_image(image)), expected), way
        batch = processor(images=image, text="zebra")
        assert batch["original_sizes"].tolist() == [[20, 30]], way
    with open(path, "rb") as file:
        assert np.array_equal(np.asarray(to_rgb_image(file)), expected)
    for several in (column["image"], pandas.Series([str(path)], index=[7]), np.array([str(path)]), (path,)):
        assert np.array_equal(processor(images=several)["pixel_values"], processor(images=[path])["pixel_values"])


def test_a_url_that_never_answers_ends_in_an_error_that_names_it(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert image_decoding_sera.SECONDS_WITHOUT_ANSWER == 10
    monkeypatch.setattr(image_decoding_sera, "SECONDS_WITHOUT_ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system accepts for it, and nobody ever answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/image.png"
        start = time.monotonic()
        with pytest.raises(ValueError, match=rf"^{url} gave no answer within 0\.2 s\.$"):
            to_rgb_image(url)
        assert time.monotonic() - start < 5


def test_a_url_of_too_many_bytes_or_too_few_a_second_ends_in_an_error_that_names_it(server, monkeypatch):
    assert image_decoding_sera.DOWNLOAD_BYTES == 50_000_000
    monkeypatch.setattr(image_decoding_sera, "DOWNLOAD_BYTES", 10**6)
    server.files |= {"/large": bytes(10**6 + 1), "/slow": b""}
    with pytest.raises(ValueError, match=rf"^{server.url}/large holds more than 1 MB"):
        to_rgb_image(f"{server.url}/large")
    monkeypatch.setattr(image_decoding_sera, "DOWNLOAD_SECONDS", 0.1)
    with pytest.raises(ValueError, match=rf"^{server.url}/slow was not fetched within 0\.1 s"):
        to_rgb_image(f"{server.url}/slow")


def test_a_url_that_fails_or_holds_no_image_is_named(server):
    server.files["/text"] = b"not an image"
    for url, message in (
        (f"{server.url}/nowhere", "cannot be fetched: .*404"),
        (f"{server.url}/text", "is not a readable image"),
        ("http://127.0.0.1:1/x", "cannot be fetched"),
        ("http://[", "cannot be fetched"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            to_rgb_image(url)
        assert str(error.value).startswith(url)


def test_what_is_no_image_is_told_what_is(tmp_path):
    for value in ({"bytes": None, "path": None}, {"pixels": 3}, {}, 5, None):
        with pytest.raises(TypeError, match="must be a PIL image, a path or URL, the bytes of a file"):
            to_rgb_image(value)
    with pytest.raises(ValueError, match="image is not a readable image"):
        to_rgb_image(b"\x89PNG")
    with pytest.raises(ValueError, match=r"zebra\.png is not a readable image"):
        to_rgb_image({"bytes": b"\x89PNG", "path": "zebra.png"})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        to_rgb_image({"bytes": None, "path": str(tmp_path / "nowhere")})


def test_a_data_url_may_be_quoted_instead_of_base64(tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(content, "PNG")
    quoted = "".join(f"%{byte:02x}" for byte in content.getvalue())
    assert to_rgb_image(f"data:image/png,{quoted}").size == (3, 2)


def test_a_batch_of_images_is_several_and_an_image_is_one():
    assert len(as_image_list(np.zeros((5, 4, 4, 3)))) == len(as_image_list(torch.zeros(5, 3, 4, 4))) == 5
    for one in (
        np.zeros((3, 4)),
        np.zeros((4, 4, 3)),
        torch.zeros(3, 4, 4),
        "a.png",
        Path("a.png"),
        b"",
        {"path": "a"},
    ):
        assert as_image_list(one) == [one] or as_image_list(one)[0] is one
