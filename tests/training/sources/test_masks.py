"""Masks and images of the training data: run-length codes, polygons, and files that open or say why not."""

import json

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from builders import image_bytes
from reference import distance_to_outline, fill_even_odd

from training.sources.images import open_image
from training.sources.masks import decode_mask, encode_mask, segmentation_to_rle


def rasterise(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    return decode_mask(segmentation_to_rle(polygons, height, width))


def column_runs(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed counts: lengths of runs down the columns, zeros first."""
    runs, current = [0], False
    for pixel in mask.ravel(order="F"):
        if pixel != current:
            runs.append(0)
            current = pixel
        runs[-1] += 1
    return [int(run) for run in runs]


# Masks


def masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (1, 37), (37, 1), (5, 7), (64, 48), (33, 90)]
    random = [rng.random(shape) < share for shape in shapes for share in (0.02, 0.5, 0.98)]
    blocks = [np.kron(rng.random((4, 5)) < 0.5, np.ones((40, 30))).astype(bool)]
    return random + blocks + [np.zeros((9, 4), bool), np.ones((9, 4), bool), np.zeros((1, 8), bool)]


@pytest.mark.parametrize("mask", masks(), ids=lambda mask: f"{mask.shape}-{mask.sum()}")
def test_masks_survive_every_run_length_form(mask):
    rle = encode_mask(mask)
    assert rle["size"] == list(mask.shape) and isinstance(rle["counts"], str)
    assert json.loads(json.dumps(rle)) == rle
    uncompressed = {"size": list(mask.shape), "counts": column_runs(mask)}
    as_bytes = {"size": list(mask.shape), "counts": rle["counts"].encode()}
    for code in (rle, uncompressed, as_bytes, segmentation_to_rle(uncompressed, *mask.shape)):
        decoded = decode_mask(code)
        assert decoded.dtype == bool and np.array_equal(decoded, mask)
        assert segmentation_to_rle(code, *mask.shape) == rle


def test_a_transposed_or_strided_mask_is_encoded_as_it_looks():
    mask = np.random.default_rng(1).random((20, 31)) < 0.4
    for view in (mask.T, mask[::2, ::-3], np.asfortranarray(mask)):
        assert np.array_equal(decode_mask(encode_mask(view)), view)


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (0, 0), (255, 255)])
@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_a_mask_of_whole_numbers_counts_as_object_where_it_is_not_zero(values, kind):
    inside = np.random.default_rng(4).random((20, 31)) < 0.4
    mask = np.where(inside, values[1], values[0]).astype(kind)
    assert np.array_equal(decode_mask(encode_mask(mask)), mask > 0)


@pytest.mark.parametrize("value", [2, 127, 254, -1])
def test_a_grey_mask_is_refused_with_what_to_do(value):
    mask = np.zeros((4, 5), np.int16)
    mask[1:3], mask[0, 0] = 255, value
    with pytest.raises(ValueError, match=f"1 of 20 pixels have other values, for example {value}. Cut it at half"):
        encode_mask(mask)


@pytest.mark.parametrize(
    "mask",
    [np.zeros((3, 4)), np.zeros((1, 3, 4), bool), np.zeros((0, 4), bool), [[True]]],
    ids=["float", "three axes", "no pixel", "list"],
)
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(ValueError, match=r"array .* of bools or whole numbers"):
        encode_mask(mask)


@pytest.mark.parametrize("seed", range(40))
def test_polygons_agree_with_even_odd_filling_up_to_their_outline(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(60, 160, 2)
    centre, angles = rng.uniform(20, 60, 2), np.sort(rng.uniform(0, 2 * np.pi, 9))
    radius = rng.uniform(5, 90, 9)  # reaches outside the image on some sides
    points = centre + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    polygons = [points.ravel().tolist(), (points[::-1] * 0.5 + 40).ravel().tolist()]
    expected = fill_even_odd(polygons, height, width)
    rows, columns = np.nonzero(rasterise(polygons, height, width) != expected)
    centres = np.stack([columns, rows], axis=1) + 0.5
    assert (distance_to_outline(centres, polygons) <= 1).all()


def test_several_polygons_are_a_union_where_they_overlap():
    left, right = [2, 2, 22, 2, 22, 22, 2, 22], [12, 12, 32, 12, 32, 32, 12, 32]
    both = rasterise([left, right], 40, 40)
    assert np.array_equal(both, rasterise([left], 40, 40) | rasterise([right], 40, 40))
    assert both[17, 17] and both.sum() == 400 + 400 - 100


FAR = [50.0, 1e3, 1e5, 1e7, 1e9, 1e14]


@pytest.mark.parametrize("far", FAR)
def test_a_polygon_around_the_image_fills_it(far):
    corners = [-far, -far, 40 + far, -far, 40 + far, 30 + far, -far, 30 + far]
    assert rasterise([corners], 30, 40).all()


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_a_polygon_that_leaves_on_one_side_is_cut_there(side, far):
    x0, y0, x1, y1 = 10, 8, 30, 20
    expected = np.zeros((30, 40), dtype=bool)
    if side == "left":
        x0, rows, columns = -far, slice(8, 20), slice(0, 30)
    elif side == "right":
        x1, rows, columns = 40 + far, slice(8, 20), slice(10, 40)
    elif side == "top":
        y0, rows, columns = -far, slice(0, 20), slice(10, 30)
    else:
        y1, rows, columns = 30 + far, slice(8, 30), slice(10, 30)
    expected[rows, columns] = True
    assert np.array_equal(rasterise([[x0, y0, x1, y0, x1, y1, x0, y1]], 30, 40), expected)


@pytest.mark.parametrize("far", FAR[1:])
def test_slanted_edges_keep_their_slope_when_cut(far):
    mask = rasterise([[-far, -far, far, far, -far, far]], 30, 40)
    rows, columns = np.mgrid[:30, :40]
    assert mask[rows > columns + 1].all() and not mask[rows < columns - 1].any()


def test_a_concave_polygon_cut_into_pieces_has_nothing_between_them():
    # A comb whose back lies to the left of the image: two teeth are all that is seen.
    comb = [-90, 2, 20, 2, 20, 8, -50, 8, -50, 20, 20, 20, 20, 26, -90, 26]
    expected = np.zeros((30, 40), dtype=bool)
    expected[2:8, :20] = expected[20:26, :20] = True
    assert np.array_equal(rasterise([comb], 30, 40), expected)


@pytest.mark.parametrize("shift", [(-500, 0), (500, 0), (0, -500), (0, 500), (1e7, -1e7)])
def test_a_polygon_outside_the_image_leaves_no_pixel(shift):
    square = np.array([[5, 5], [25, 5], [25, 25], [5, 25]]) + shift
    assert rasterise([square.ravel().tolist()], 30, 40).sum() == 0


def test_a_degenerate_polygon_adds_nothing_to_the_others():
    square = [5, 5, 25, 5, 25, 25, 5, 25]
    for degenerate in ([1.0, 1.0, 30.0, 30.0], [3, 3], []):
        for polygons in ([square, degenerate], [degenerate, square]):
            assert np.array_equal(rasterise(polygons, 30, 40), rasterise([square], 30, 40))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 9, 1, 9, 9, 1]], "even number of coordinates, got 7"),
        ([[1, 1, 9, 9]], "at least 3 points"),
        ([[]], "at least 3 points"),
        ([], "at least 3 points"),
        ([1, 1, 9, 1, 9, 9], "flat list of numbers"),
        ([[[1, 1], [9, 1], [9, 9]]], "flat list of numbers"),
        ([["1", "1", "9", "1", "9", "9"]], "flat list of numbers"),
        ([[1, 1, 9, float("nan"), 9, 9]], "finite and sensible, got nan"),
        ([[1, 1, float("inf"), 1, 9, 9]], "finite and sensible, got inf"),
        ([[1, 1, -1e300, 1, 9, 9]], r"finite and sensible, got -1e\+300"),
        (None, "got NoneType"),
        ("abc", "got str"),
        ({"size": [10, 12], "counts": [120]}, r"size \[10, 12\], its image \[12, 10\]"),
        ({"size": [12, 10], "counts": [119]}, "add up to 119"),
        ({"size": [12, 10], "counts": [60, 61]}, "add up to 121"),
        ({"size": [12, 10], "counts": [130, -10]}, ">= 0"),
        ({"size": [12, 10], "counts": []}, "add up to 0"),
        ({"size": [12, 10], "counts": [60.5, 59.5]}, "whole numbers or text"),
        ({"size": [12, 10]}, "whole numbers or text"),
        ({"size": [12, 10], "counts": "000"}, "add up to 0"),
        ({"size": [12, 10], "counts": "0" * 3000 + "l"}, "middle of a number"),
        ({"size": [12, 10], "counts": "o" * 20 + "0"}, "a number that is too large"),
        ({"size": [12, 10], "counts": "zz"}, "character 'z'"),
        ({"size": [12, 10], "counts": b"\xff"}, "character"),
        ({"size": [12, 10], "counts": "é"}, "character"),
        ({"size": [12], "counts": [120]}, r"\[height, width\]"),
        ({"size": [0, 10], "counts": [0]}, r"\[height, width\]"),
        ({"counts": [120]}, r"\[height, width\]"),
    ],
    ids=str,
)
def test_malformed_segmentations_are_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        segmentation_to_rle(segmentation, 12, 10)


def test_a_damaged_code_is_refused_before_it_is_decoded():
    code = encode_mask(np.random.default_rng(2).random((20, 30)) < 0.5)
    for cut in range(len(code["counts"])):
        with pytest.raises(ValueError, match=r"runs|middle"):
            decode_mask({"size": [20, 30], "counts": code["counts"][:cut]})


# Images


@pytest.mark.parametrize(
    ("format_name", "mode"),
    [("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("JPEG", "CMYK"), ("WEBP", "RGB")],
)
def test_images_open_from_path_bytes_and_pil_alike(tmp_path, format_name, mode):
    data = image_bytes(format_name, mode)
    path = tmp_path / "image"
    path.write_bytes(data)
    reference = PIL.Image.open(path)
    for value in ({"path": str(path), "bytes": None}, {"path": None, "bytes": data}, PIL.Image.open(path)):
        image = open_image(value)
        assert image.size == (60, 40) and image.mode == reference.mode
        assert np.array_equal(np.asarray(image), np.asarray(reference))


def test_bytes_come_before_the_path_they_were_read_from():
    assert open_image({"path": "gone.png", "bytes": image_bytes("PNG")}).size == (60, 40)


def test_exif_orientation_is_left_to_the_image_processor():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for format_name in ("JPEG", "PNG", "WEBP", "TIFF"):
        image = open_image({"path": None, "bytes": image_bytes(format_name, exif=exif)})
        if format_name != "TIFF":  # there Pillow turns the image itself, and drops the tag
            assert image.size == (60, 40) and image.getexif()[0x0112] == 6
        assert PIL.ImageOps.exif_transpose(image).size == (40, 60)


@pytest.mark.parametrize(
    "content",
    [
        image_bytes("JPEG")[:-400],
        image_bytes("PNG")[:3000],
        image_bytes("WEBP")[:-400],
        image_bytes("JPEG")[:20],
        image_bytes("PNG")[:2000] + b"\0" * 64 + image_bytes("PNG")[2064:],
        b"",
        b"this is a text, whatever its name says",
    ],
    ids=["cut jpeg", "cut png", "cut webp", "jpeg header", "damaged png", "empty", "text"],
)
def test_a_corrupt_image_names_its_file(tmp_path, content):
    path = tmp_path / "COCO_corrupt.jpg"
    path.write_bytes(content)
    for value in ({"path": str(path), "bytes": None}, {"path": str(path), "bytes": content}):
        with pytest.raises(ValueError, match=r"COCO_corrupt\.jpg") as error:
            open_image(value)
        assert "BytesIO" not in str(error.value)


def test_a_corrupt_image_opened_elsewhere_names_its_file(tmp_path):
    path = tmp_path / "COCO_lazy.jpg"
    path.write_bytes(image_bytes("JPEG")[:-400])
    with PIL.Image.open(path) as image, pytest.raises(ValueError, match=r"COCO_lazy\.jpg"):
        open_image(image)


def test_a_missing_image_a_folder_and_nothing_at_all_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.jpg"):
        open_image({"path": str(tmp_path / "gone.jpg"), "bytes": None})
    with pytest.raises(ValueError, match=tmp_path.name):
        open_image({"path": str(tmp_path), "bytes": None})
    with pytest.raises(ValueError, match="got neither"):
        open_image({"path": None, "bytes": None})


def test_a_decompression_bomb_names_its_file(tmp_path, monkeypatch):
    path = tmp_path / "COCO_bomb.png"
    path.write_bytes(image_bytes("PNG"))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"COCO_bomb\.png.*exceeds limit"):
        open_image({"path": str(path), "bytes": None})
