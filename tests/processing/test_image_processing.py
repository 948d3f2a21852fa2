"""The image processor: a letterbox that masks share, exact pixel values, every kind of image, and its options."""

import base64
import io
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import GEOMETRIES, centroid, disc
from conftest import REPOSITORY
from PIL import Image
from transformers import AutoImageProcessor

from processing_sera import SeraImageProcessor
from processing_sera.image_processing_sera import letterbox_box, letterbox_masks, read_masks, to_rgb_image


def denormalised(pixel_values: np.ndarray, processor: SeraImageProcessor) -> np.ndarray:
    std, mean = (np.array(v)[:, None, None] for v in (processor.image_std, processor.image_mean))
    return pixel_values * std + mean


# geometry
# --------


@pytest.mark.parametrize("original, frame", [*GEOMETRIES, ((40, 10_000), (448, 448)), ((1, 1), (7, 9))])
def test_the_box_fits_is_centred_and_keeps_the_aspect(original, frame):
    box = letterbox_box(original, frame)
    assert box.height == frame[0] or box.width == frame[1]
    assert 1 <= box.height <= frame[0] and 1 <= box.width <= frame[1]
    assert 0 <= frame[0] - box.height - 2 * box.top <= 1 and 0 <= frame[1] - box.width - 2 * box.left <= 1
    scale = min(frame[0] / original[0], frame[1] / original[1])
    assert abs(box.height - original[0] * scale) <= 0.5 and abs(box.width - original[1] * scale) <= 0.5


def test_a_side_never_vanishes():
    assert letterbox_box((1, 10_000), (448, 448))[2:] == (1, 448)


@pytest.mark.parametrize("original, frame", GEOMETRIES)
def test_image_and_mask_stay_aligned(original, frame):
    height, width = original
    mask = disc(original, (height * 0.55, width * 0.45), min(original) * 0.3)
    image_processor = SeraImageProcessor(size={"height": frame[0], "width": frame[1]})
    pixel_values = image_processor(Image.fromarray(mask.astype(np.uint8) * 255))["pixel_values"][0]
    label = image_processor.preprocess_masks([mask])[0]
    box = letterbox_box(original, frame)
    content = np.s_[box.top : box.top + box.height, box.left : box.left + box.width]
    seen, labelled = (
        centroid(denormalised(pixel_values, image_processor)[0][content]),
        centroid(label[content]),
    )
    expected = centroid(mask) * (box.height / height, box.width / width)
    assert np.abs(labelled - expected).max() < 0.01
    assert np.abs(seen - expected).max() < 0.05
    assert label[content].mean() == pytest.approx(mask.mean(), rel=1e-4)
    assert label.sum() == pytest.approx(label[content].sum())


@pytest.mark.parametrize("original, frame", [((6, 10), (4, 4)), ((5, 3), (7, 7)), ((9, 9), (6, 6))])
def test_labels_are_exact_area_averages(original, frame):
    mask = np.random.default_rng(0).random(original) < 0.5
    box = letterbox_box(original, frame)
    # repeat pixels until the label's pixels are whole blocks of them
    fine = np.kron(mask, np.ones((box.height, box.width)))
    blocks = fine.reshape(box.height, original[0], box.width, original[1]).mean((1, 3))
    label = letterbox_masks([mask], frame)[0]
    content = label[box.top : box.top + box.height, box.left : box.left + box.width]
    assert np.allclose(content, blocks, atol=1e-6)


def test_negative_pixels_are_left_out_and_change_no_other():
    mask = np.zeros((40, 60), np.int8)
    mask[5:30, 10:33] = 1
    plain = letterbox_masks([mask == 1], (24, 24))[0]
    mask[:, 40:] = -1  # two thirds across: column 16 of the frame
    label = letterbox_masks([mask], (24, 24))[0]
    top, left, height, width = letterbox_box(mask.shape, (24, 24))
    left_out = np.zeros((24, 24), bool)
    left_out[top : top + height, left + 16 : left + width] = True
    assert (label[left_out] == -1).all() and (label[~left_out] == plain[~left_out]).all()
    assert plain.max() == 1 and left_out.sum() == 8 * 16


def test_a_flipped_image_gives_the_flipped_frame(image):
    image_processor = SeraImageProcessor(size={"height": 40, "width": 56})  # even padding
    plain = image_processor(image)["pixel_values"]
    flipped = image_processor(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))["pixel_values"]
    assert np.array_equal(flipped, plain[..., ::-1])


# without padding
# ---------------


@pytest.mark.parametrize("original", [(480, 640), (640, 480), (333, 500), (61, 37), (1, 3000), (2000, 2000)])
def test_without_padding_a_single_image_fills_its_frame(original):
    image_processor = SeraImageProcessor(size={"height": 112, "width": 140}, do_pad=False)
    image = Image.fromarray(np.full((*original, 3), 200, np.uint8))
    pixel_values = image_processor(image)["pixel_values"]
    height, width = frame = pixel_values.shape[-2:]
    assert image_processor.box(original, frame) == (0, 0, height, width)
    assert height % 14 == 0 and width % 14 == 0 and height <= 112 and width <= 140
    assert height == 112 or width == 140
    scale = min(112 / original[0], 140 / original[1])  # each side is at most half a patch off, or one patch long
    assert abs(height - original[0] * scale) <= 7 or height == 14
    assert abs(width - original[1] * scale) <= 7 or width == 14
    assert np.allclose(denormalised(pixel_values[0], image_processor), 200 / 255, atol=1e-5)


def test_without_padding_images_of_a_batch_keep_their_pixels_on_the_grid_of_patches(image):
    image_processor = SeraImageProcessor(size=112, do_pad=False)
    upright = image.transpose(Image.Transpose.ROTATE_90)
    alone = [image_processor(one)["pixel_values"][0] for one in (image, upright)]
    together = image_processor([image, upright])
    for values, own, size in zip(together["pixel_values"], alone, together["original_sizes"], strict=True):
        top, left, height, width = image_processor.box(tuple(size), values.shape[-2:])
        assert top % 14 == 0 and left % 14 == 0 and (height, width) == own.shape[-2:]
        assert np.array_equal(values[:, top : top + height, left : left + width], own)
        assert np.count_nonzero(values) == np.count_nonzero(own)  # the rest is padding


def test_without_padding_labels_lie_where_their_images_do():
    image_processor = SeraImageProcessor(size=112, do_pad=False)
    masks = [disc((60, 90), (30, 50), 20), disc((90, 60), (40, 30), 20)]
    alone = [image_processor.preprocess_masks([mask])[0] for mask in masks]
    frame = image_processor.frame_of([mask.shape for mask in masks])
    together = image_processor.preprocess_masks(masks, [mask.shape for mask in masks], frame)
    assert together.shape == (2, 112, 112)
    for label, own, mask in zip(together, alone, masks, strict=True):
        top, left, height, width = image_processor.box(mask.shape, frame)
        assert np.array_equal(label[top : top + height, left : left + width], own)
        assert label.sum() == own.sum()


def test_a_size_that_is_no_multiple_of_the_patch_is_refused_without_padding():
    with pytest.raises(ValueError, match=r"100.*multiples of the patch, 14"):
        SeraImageProcessor(size=100, do_pad=False)


def test_masks_of_every_type_that_hold_zero_and_one_are_the_same_mask(recwarn):
    mask = np.random.default_rng(0).random((40, 30)) < 0.3
    expected = letterbox_masks([mask], (56, 56))
    whole = [mask.astype(kind) for kind in (np.uint8, np.int64, np.float32, np.float64, np.float16)]
    kinds = [*whole, *(kind * 255 for kind in whole[:1]), mask.astype(np.float32) * 255, Image.fromarray(mask)]
    kinds += [Image.fromarray(whole[0]), torch.from_numpy(mask), torch.from_numpy(mask).bfloat16()]
    kinds += [mask[..., None], whole[2][..., None], mask[None], torch.from_numpy(whole[2])[None], mask.tolist()]
    for kind in kinds:
        assert np.array_equal(letterbox_masks([kind], (56, 56)), expected)
    assert not recwarn.list


def test_grey_masks_are_cut_at_half_with_one_warning():
    """JPEG and resizing spread a mask's edge; what they add does not count as the object."""
    mask = disc((64, 64), (30, 34), 17)
    drawn = Image.fromarray(mask.astype(np.uint8) * 255)
    file = io.BytesIO()
    drawn.save(file, "JPEG", quality=60)
    large = disc((256, 256), (120, 136), 68)
    resized = Image.fromarray(large.astype(np.uint8) * 255).resize((64, 64), Image.Resampling.BILINEAR)
    deep = np.asarray(resized).astype(np.uint16) * 257
    kinds = [np.asarray(Image.open(file)), np.asarray(resized), resized, deep, np.asarray(resized).astype(np.float32)]
    assert all(np.mean(np.asarray(kind) > 0) > 1.04 * mask.mean() for kind in kinds)
    with pytest.warns(UserWarning) as warned:
        read = read_masks([mask, *kinds])
    (warning,) = warned
    assert re.search(r"masks\[1\] \(and 4 more masks\).* pixels above 127.5 are the object", str(warning.message))
    for found in read:
        assert found.dtype == bool and (found & mask).sum() / (found | mask).sum() > 0.98
    left_out = np.asarray(resized).astype(np.int16)
    left_out[:4] = -1
    with pytest.warns(UserWarning, match="above 127.5"):
        (found,) = read_masks([left_out])
    assert (found[:4] == -1).all() and ((found == 1) == read[2])[4:].all()


def test_a_mask_with_one_other_value_has_nothing_to_cut():
    mask = disc((64, 64), (30, 34), 17)
    with pytest.warns(UserWarning, match="other values than 0 and 1"):
        (found,) = read_masks([mask.astype(np.uint8) * 7])
    assert np.array_equal(found, mask)


@pytest.mark.parametrize(
    "mask, message",
    [
        (
            np.arange(12).reshape(3, 4),
            "11 values above 0, up to 11: these are no grey values.*one mask for each object",
        ),
        (np.arange(12).reshape(3, 4) * 1000, "up to 11000"),
        (np.full((3, 4), 10**6) * (np.arange(4) + 1), "up to 4000000"),
        (np.full((3, 4), 0.37), r"must be a boolean or integer array, or floats of 0 and 1; it has the value 0\.37"),
        (np.full((3, 4), np.nan), "NaN"),
        (np.zeros((3, 4, 3), np.uint8), r"shape \(3, 4, 3\)"),
        (np.zeros((0, 4), bool), r"shape \(0, 4\)"),
        ("mask.png", "must be a boolean or integer array"),
    ],
)
def test_masks_that_are_no_masks(mask, message):
    with pytest.raises(ValueError, match=rf"masks\[1\].*{message}"):
        read_masks([np.ones((2, 2), bool), mask])


# pixel values
# ------------


def test_pixels_are_normalised_and_the_padding_is_zero():
    colour = (200, 100, 50)
    image_processor = SeraImageProcessor(size={"height": 28, "width": 28})
    batch = image_processor(Image.new("RGB", (40, 20), colour), return_tensors="pt")
    values = batch["pixel_values"]
    assert values.dtype == torch.float32 and values.shape == (1, 3, 28, 28)
    assert batch["original_sizes"].dtype == torch.int64 and batch["original_sizes"].tolist() == [[20, 40]]
    for channel, (value, mean, std) in enumerate(
        zip(colour, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    ):
        assert torch.allclose(values[0, channel, 7:21], torch.tensor((value / 255 - mean) / std), atol=1e-5)
    assert (values[0, :, :7] == 0).all() and (values[0, :, 21:] == 0).all()


def test_an_image_of_the_frames_size_is_not_resampled(image):
    image_processor = SeraImageProcessor(size={"height": 40, "width": 30})
    values = denormalised(image_processor(image)["pixel_values"][0], image_processor)
    assert np.allclose(values * 255, np.asarray(image).transpose(2, 0, 1), atol=1e-3)


def test_large_reductions_are_anti_aliased():
    checkerboard = np.indices((1500, 2000)).sum(0) % 2 * 255
    image_processor = SeraImageProcessor(size=112)
    values = denormalised(image_processor(checkerboard.astype(np.uint8))["pixel_values"][0], image_processor)
    assert np.abs(values[:, 20:-20, 5:-5] - 0.5).max() < 0.03


def test_extreme_shapes(processor):
    batch = processor.image_processor([Image.new("RGB", (10_000, 40), "red"), Image.new("L", (1, 1), 255)])
    assert batch["original_sizes"].tolist() == [[40, 10_000], [1, 1]]
    assert (batch["pixel_values"][0, 0] > 0).sum() == 56  # one row of red
    assert (batch["pixel_values"][1] > 0).all()


# kinds of images
# -----------------


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def test_modes_that_hold_the_same_image_give_the_same_values(tmp_path, processor, image):
    reference = processor.image_processor(image)["pixel_values"]
    opaque = image.copy()
    opaque.putalpha(255)
    few_colours = image.quantize(16)
    same = [
        (saved(tmp_path / "rgb.png", image), reference, 0),
        (saved(tmp_path / "rgba.png", opaque), reference, 0),
        (saved(tmp_path / "cmyk.tif", image.convert("CMYK")), reference, 0.05),
        (saved(tmp_path / "cmyk.jpg", image.convert("CMYK"), quality=95), reference, 0.2),
        (
            saved(tmp_path / "palette.png", few_colours),
            processor.image_processor(few_colours.convert("RGB"))["pixel_values"],
            0,
        ),
    ]
    for path, expected, tolerance in same:
        for given in (path, str(path), Image.open(path)):
            values = processor.image_processor(given)["pixel_values"]
            assert np.abs(values - expected).max() <= tolerance, path.name


def test_grey_images_of_every_depth(tmp_path, processor):
    grey = np.linspace(0, 255, 40 * 30).astype(np.uint8).reshape(40, 30)
    expected = processor.image_processor(np.stack([grey] * 3, -1))["pixel_values"]
    deep = grey.astype(np.uint16) * 257
    kinds = {
        "8-bit": Image.fromarray(grey),
        "8-bit file": saved(tmp_path / "grey.png", Image.fromarray(grey)),
        "with alpha": Image.merge("LA", [Image.fromarray(grey), Image.new("L", (30, 40), 255)]),
        "16-bit file": saved(tmp_path / "deep.png", Image.fromarray(deep)),
        "16-bit array": deep,
        "16-bit array, other byte order": deep.astype(">u2"),
        "32-bit, 8 used": Image.fromarray(grey.astype(np.int32)),
        "32-bit, 16 used": Image.fromarray(deep.astype(np.int32)),
        "float of 255": Image.fromarray(grey.astype(np.float32)),
        "float of 1": Image.fromarray(grey.astype(np.float32) / 255),
        "float array": grey / 255,
        "one channel": grey[..., None],
        "one channel first": torch.from_numpy(grey)[None],
    }
    for kind, image in kinds.items():
        assert np.array_equal(processor.image_processor(image)["pixel_values"], expected), kind


def test_a_dark_16_bit_image_that_uses_its_16_bits_stays_dark(recwarn):
    dark = np.full((3, 4), 200)
    dark[2, 3] = 65535
    for image in (dark.astype("<u2"), dark.astype(">u2"), Image.fromarray(dark.astype("<u2"))):
        assert to_rgb_image(image).getpixel((0, 0)) == (1, 1, 1)
    assert not recwarn.list


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_a_16_bit_image_of_fewer_bits_has_its_full_brightness_however_it_comes(tmp_path, bits):
    ramp = np.linspace(0, 2**bits - 1, 256).round().astype(np.uint16).reshape(16, 16)
    tiff, png = tmp_path / "ramp.tif", tmp_path / "ramp.png"
    saved(tiff, Image.fromarray(ramp))
    saved(png, Image.fromarray(ramp))
    kinds = [ramp, ramp.astype(">u2"), torch.from_numpy(ramp), tiff, png, Image.open(png), png.read_bytes()]
    kinds += [np.asarray(Image.open(tiff)), ramp[..., None], np.stack([ramp] * 3, -1)]
    for kind in kinds:
        with pytest.warns(UserWarning, match=rf"none above {2**bits - 1}.*an image of {bits} bits"):
            image = to_rgb_image(kind)
        assert np.array_equal(np.asarray(image)[..., 0], np.arange(256).reshape(16, 16))
    if bits > 8:  # wider integers of 8 bits are usual, and no reason to warn
        with pytest.warns(UserWarning, match=f"an image of {bits} bits"):
            assert to_rgb_image(ramp.astype(np.int32)).getpixel((15, 15)) == (255, 255, 255)


def test_bilevel_images(processor):
    bits = disc((40, 30), (20, 15), 9)
    expected = processor.image_processor(bits.astype(np.uint8) * 255)["pixel_values"]
    for image in (bits, Image.fromarray(bits), torch.from_numpy(bits)):
        assert np.array_equal(processor.image_processor(image)["pixel_values"], expected)


def test_transparency_is_composited_on_white(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([10, 20, 30] * 256)
    hidden = saved(tmp_path / "hidden.png", palette, transparency=3)
    key_colour = saved(tmp_path / "key.png", Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
    for image in (clear, np.asarray(clear), hidden, key_colour, Image.new("LA", (4, 4), (0, 0))):
        assert to_rgb_image(image).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb_image(half).getpixel((0, 0)) == (127, 127, 127)


def test_exif_rotation_is_applied(tmp_path, processor, image):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    path = saved(tmp_path / "turned.jpg", image, exif=exif, quality=95)
    upright = np.rot90(np.asarray(Image.open(path)), -1)
    for given in (path, Image.open(path)):
        batch = processor.image_processor(given)
        assert batch["original_sizes"].tolist() == [[30, 40]]
        assert np.array_equal(batch["pixel_values"], processor.image_processor(upright)["pixel_values"])


def test_arrays_and_tensors_of_every_layout(processor, image):
    expected = processor.image_processor(image)["pixel_values"]
    array = np.asarray(image)
    opaque = np.concatenate([array, np.full((40, 30, 1), 255, np.uint8)], -1)
    layouts = [
        array,
        array.transpose(2, 0, 1),
        array / 255,
        (array / 255).astype(np.float32),
        array.astype(np.int64),
        opaque,
        opaque.transpose(2, 0, 1),
        torch.from_numpy(array.copy()),
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        torch.from_numpy(array / 255).permute(2, 0, 1).requires_grad_(),
        array[None],
        torch.from_numpy(array.copy()).permute(2, 0, 1)[None],
    ]
    for given in layouts:
        assert np.array_equal(processor.image_processor(given)["pixel_values"], expected)
    half = torch.from_numpy(array / 255).permute(2, 0, 1).bfloat16()
    assert np.abs(processor.image_processor(half)["pixel_values"] - expected).max() < 0.02


def test_ambiguous_layouts_follow_each_librarys_convention():
    values = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    assert np.array_equal(np.asarray(to_rgb_image(values)), values)
    assert np.array_equal(np.asarray(to_rgb_image(torch.from_numpy(values))), values.transpose(1, 2, 0))


def test_the_callers_image_is_left_alone(processor, image):
    before = np.array(image)
    processor.image_processor(image)
    assert np.array_equal(np.asarray(image), before)


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((0, 4, 3), np.uint8), "image is empty"),
        (np.zeros((5, 6, 7), np.uint8), r"1, 3 or 4 channels, its shape is \(5, 6, 7\)"),
        (np.zeros(5, np.uint8), "its shape is"),
        (np.full((4, 4), np.nan), "nan"),
        (np.full((4, 4), 3.5), "from 3.5 to 3.5"),
        (np.full((4, 4), -1), "from -1 to -1"),
        (np.full((4, 4), 70_000), "70000"),
        (np.full((4, 4), 1j), "complex"),
        (Image.new("F", (4, 4), math.nan), "nan"),
        ([], "at least one image"),
        ([Image.new("L", (2, 2)), np.zeros((0, 1))], r"images\[1\] is empty"),
    ],
)
def test_values_that_are_no_image(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor.image_processor(image)


def test_a_rounding_error_above_white_does_not_turn_an_image_black():
    values = np.full((4, 4), 0.9, np.float32)
    expected = np.asarray(to_rgb_image(Image.fromarray(values)))
    values[0, 0] = 1.0005
    assert np.array_equal(np.asarray(to_rgb_image(Image.fromarray(values)))[1:], expected[1:])
    assert expected.mean() > 200


def test_types_that_are_no_image(processor):
    with pytest.raises(TypeError, match="got int"):
        processor.image_processor(5)
    with pytest.raises(TypeError, match=r"images\[1\] must be a PIL image.* got NoneType"):
        processor.image_processor([Image.new("L", (2, 2)), None])


def test_a_corrupt_image_names_its_file(tmp_path, processor, image):
    whole = saved(tmp_path / "whole.jpg", image.resize((300, 400))).read_bytes()
    truncated, text = tmp_path / "truncated.jpg", tmp_path / "text.png"
    truncated.write_bytes(whole[: len(whole) // 2])
    text.write_text("not an image")
    for images, name in (
        (truncated, "truncated.jpg"),
        (Image.open(truncated), "truncated.jpg"),
        (text, "text.png"),
    ):
        with pytest.raises(ValueError, match=rf"{name} is not a readable image"):
            processor.image_processor([image, images])
    url = "data:image/jpeg;base64," + base64.b64encode(whole).decode()
    from_url, from_file = (
        processor.image_processor(source)["pixel_values"] for source in (url, tmp_path / "whole.jpg")
    )
    assert np.array_equal(from_url, from_file)
    with pytest.raises(ValueError, match="the data URL is not a readable image") as error:
        processor.image_processor("data:image/png;base64," + 10_000 * "AAAA")
    assert len(str(error.value)) < 200
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        processor.image_processor(str(tmp_path / "nowhere.png"))


# the image processor's options
# -----------------------------


@pytest.mark.parametrize(
    "size", [0, -3, {"height": 448}, {"height": 0, "width": 4}, {"shortest_edge": 4, "width": 3}, 4.5, "448"]
)
def test_impossible_sizes(size):
    with pytest.raises(ValueError, match="size must be"):
        SeraImageProcessor(size=size)


def test_other_impossible_options():
    with pytest.raises(ValueError, match="image_std"):
        SeraImageProcessor(image_std=[0.2, 0.2, 0.0])
    with pytest.raises(ValueError, match="image_mean"):
        SeraImageProcessor(image_mean=[0.5])
    with pytest.raises(TypeError, match="no option 'do_center_crop'"):
        SeraImageProcessor(do_center_crop=True)


def test_image_processor_round_trip(tmp_path, image):
    options = {
        "size": {"height": 42, "width": 28},
        "resample": 2,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1, 2, 3],
    }
    original = SeraImageProcessor(**options)
    original.save_pretrained(tmp_path)
    expected = original(image)["pixel_values"]
    for loaded in (
        SeraImageProcessor.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path),
    ):
        assert type(loaded) is SeraImageProcessor and loaded.to_dict() == original.to_dict()
        assert np.array_equal(loaded(image)["pixel_values"], expected)
    assert SeraImageProcessor.from_pretrained(tmp_path, size={"height": 14, "width": 14}).frame_size == (
        14,
        14,
    )


def test_torchvision_is_not_needed():
    code = "import sys; sys.modules['torchvision'] = None; import processing_sera as p; p.SeraImageProcessor()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
