"""Mask selection: threshold, component and score on the logits' grid, and the masks at full size that follow."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from builders import GEOMETRIES, iou
from conftest import REPOSITORY
from scipy import ndimage
from scipy.special import expit

from processing_sera import SeraImageProcessor, SeraProcessor
from processing_sera.mask_selection_sera import (
    calibrated,
    connected_components,
    diagonal_links,
    expected_iou,
    expected_iou_threshold,
    largest_component,
    select_on_grid,
)
from processing_sera.resampling_sera import image_axis, resampled_bands

SELECTED = {"threshold": "expected_iou", "keep_largest_component": True}

# The expected-IoU threshold


def test_no_mask_has_a_larger_expected_iou():
    probabilities = np.random.default_rng(0).random((3, 4)) ** 2
    found = expected_iou(probabilities > expected_iou_threshold(probabilities), probabilities)
    every_mask = ((np.arange(1, 2**12)[:, None] >> np.arange(12)) & 1).astype(bool).reshape(-1, 3, 4)
    assert found == pytest.approx(max(expected_iou(mask, probabilities) for mask in every_mask))


@pytest.mark.parametrize("power", [0.3, 1, 4])
def test_the_threshold_follows_from_the_ratio_and_is_at_most_a_half(power):
    probabilities = np.random.default_rng(1).random((40, 50)) ** power
    probabilities = probabilities.round(2)  # many are equal
    threshold = expected_iou_threshold(probabilities)
    mask = probabilities > threshold
    ratio = probabilities[mask].sum() / (mask.sum() + probabilities[~mask].sum())
    assert expected_iou(mask, probabilities) == pytest.approx(ratio)
    assert threshold == pytest.approx(ratio / (1 + ratio)) and 0 < threshold <= 0.5


def test_sure_probabilities_are_the_mask_and_zeros_give_no_mask():
    sure = np.random.default_rng(0).random((20, 30)) > 0.7
    assert np.array_equal(sure > expected_iou_threshold(sure.astype(float)), sure)
    assert expected_iou_threshold(np.zeros((20, 30))) == 0
    assert 0 < expected_iou_threshold(np.full((2, 2), 0.01)) < 0.01
    assert expected_iou(np.zeros((2, 2), bool), np.ones((2, 2))) == 0


# The largest connected component


def masks_to_label() -> list[np.ndarray]:
    """Noise of many densities, stripes, a checkerboard, a spiral, and masks that are empty, full or thin."""
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (1, 40), (40, 1), (23, 31), (64, 64), (112, 96)]
    masks = [rng.random(shape) < share for shape in shapes for share in (0.0, 0.3, 0.5, 0.6, 0.9, 1.0)]
    rows, columns = np.mgrid[0:50, 0:50]
    angle, radius = np.arctan2(rows - 25, columns - 25), np.hypot(rows - 25, columns - 25)
    spiral = (angle + radius) % (2 * np.pi) < 2.5
    return [*masks, (rows + columns) % 2 == 0, columns % 3 > 0, spiral]


@pytest.mark.parametrize("mask", masks_to_label(), ids=str)
def test_components_are_those_of_scipy(mask):
    reference, number = ndimage.label(mask)
    labels = connected_components(mask)
    assert np.array_equal(labels >= 0, mask)
    pairs = set(zip(labels[mask].tolist(), reference[mask].tolist(), strict=True))
    assert len(pairs) == number == len({label for label, _ in pairs})
    assert [there for _, there in sorted(pairs)] == list(range(1, number + 1))  # in the same order


@pytest.mark.parametrize("mask", masks_to_label(), ids=str)
@pytest.mark.parametrize("levels", [None, 2])
def test_the_component_with_the_largest_sum_is_that_of_scipy(mask, levels):
    """With few levels many sums are equal: the first component is kept."""
    probabilities = np.random.default_rng(1).random(mask.shape)
    if levels is not None:
        probabilities = np.ceil(probabilities * levels) / levels
    reference, number = ndimage.label(mask)
    kept = largest_component(mask, probabilities)
    if number:
        sums = ndimage.sum_labels(probabilities, reference, np.arange(1, number + 1))
        assert np.array_equal(kept, reference == 1 + sums.argmax())
    else:
        assert not kept.any()


def test_a_large_component_beats_a_small_sure_one_and_corners_do_not_connect():
    probabilities = np.array([[0.9, 0.0, 0.0], [0.0, 0.6, 0.6], [0.0, 0.0, 0.0]])
    kept = largest_component(probabilities > 0.5, probabilities)
    assert kept.tolist() == [[False, False, False], [False, True, True], [False, False, False]]


def smooth_logits(seed: int, size: tuple[int, int] = (24, 20), knots: int = 6, scale: float = 4.0) -> torch.Tensor:
    """Random logits (1, h, w) with several blobs."""
    noise = torch.randn(1, 1, knots, knots, generator=torch.Generator().manual_seed(seed))
    return scale * torch.nn.functional.interpolate(noise, size, mode="bicubic")[0]


def test_corners_connect_where_the_interpolated_image_does():
    """Every pair of cells that touch at a corner alone, against the components of a fine interpolation."""
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        cells = np.array([[1, -1], [-1, 1]]) * rng.random((2, 2))
        cells = cells if rng.random() < 0.5 else cells[::-1].copy()
        if abs(cells[0, 0] * cells[1, 1] - cells[0, 1] * cells[1, 0]) < 0.02:
            continue  # the saddle is too near to the threshold to be seen on pixels
        links = diagonal_links(cells)
        labels = connected_components(cells > 0, links)
        fine = torch.nn.functional.interpolate(
            torch.from_numpy(cells)[None, None], (301, 301), mode="bilinear", align_corners=True
        )
        number = ndimage.label(fine[0, 0].numpy() > 0, structure=np.ones((3, 3)))[1]
        assert len(np.unique(labels[labels >= 0])) == number
        seen.add((number, bool(links[0].any()), bool(links[1].any())))
    assert seen == {(2, False, False), (1, True, False), (1, False, True)}


# Masks at full size


def processor_of(processor: SeraProcessor, frame: tuple[int, int] = (96, 80), **settings) -> SeraProcessor:
    image_processor = SeraImageProcessor(size={"height": frame[0], "width": frame[1]})
    return SeraProcessor(image_processor, processor.tokenizer, **settings)


def inputs_of(size: tuple[int, int], frame: tuple[int, int] = (96, 80)) -> dict[str, torch.Tensor]:
    """The inputs that post-processing looks at."""
    return {"original_sizes": torch.tensor([size]), "pixel_values": torch.empty(1, 3, *frame)}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [(300, 250), (250, 300), (61, 97)])
def test_the_mask_is_what_a_search_on_the_images_pixels_finds(processor, seed, size):
    """The way that does not scale: threshold and component of the probabilities at full size."""
    processor = processor_of(processor)
    logits, inputs = smooth_logits(seed), inputs_of(size)
    (result,) = processor.post_process_referring_segmentation(logits, inputs, return_probabilities=True, **SELECTED)
    probabilities = result["probabilities"].double().numpy()
    mask = probabilities > expected_iou_threshold(probabilities)
    labels, number = ndimage.label(mask)
    sums = ndimage.sum_labels(probabilities, labels, np.arange(1, number + 1))
    assert iou(result["mask"].numpy(), labels == 1 + sums.argmax()) > 0.98
    assert result["score"] == pytest.approx(probabilities[result["mask"].numpy()].mean(), abs=1e-2)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, "expected_iou"])
@pytest.mark.parametrize("seed", range(4))
def test_the_kept_part_is_a_connected_part_of_the_mask(processor, threshold, seed):
    processor = processor_of(processor)
    logits, inputs = smooth_logits(seed, knots=12), inputs_of((480, 400))
    whole, kept = (
        processor.post_process_referring_segmentation(logits, inputs, threshold, keep_largest_component=keep)[0]["mask"]
        for keep in (False, True)
    )
    whole, kept = whole.numpy(), kept.numpy()
    labels, number = ndimage.label(whole, structure=np.ones((3, 3)))
    assert number > 1 and kept.any() and not (kept & ~whole).any()
    (label,) = set(np.unique(labels[kept]))
    assert iou(kept, labels == label) > 0.99


def test_a_component_that_touches_the_kept_one_at_a_corner_goes_whole(processor):
    logits = torch.full((1, 8, 8), -4.0)
    logits[0, :4, :4], logits[0, 4:6, 4:6] = 3.0, 3.0
    processor, inputs = processor_of(processor, (64, 64)), inputs_of((640, 640), (64, 64))
    (result,) = processor.post_process_referring_segmentation(logits, inputs, keep_largest_component=True)
    mask = result["mask"].numpy()
    assert mask[:310, :310].mean() > 0.95 and not mask[330:, :].any() and not mask[:, 330:].any()


@pytest.mark.parametrize("original, frame", GEOMETRIES)
@pytest.mark.parametrize("value", [-20.0, 20.0])
def test_the_padding_counts_for_nothing(processor, original, frame, value):
    """Neither for the threshold, nor for the component, nor for the score."""
    processor = processor_of(processor, frame, score_calibration=[[0.0, 0.0], [1.0, 1.0]])
    cells = (frame[0] // 4, frame[1] // 4)
    logits, inputs = smooth_logits(0, cells), inputs_of(original, frame)
    box = processor.image_processor.box(original, frame)
    rows = image_axis(cells[0], original[0], box.top / frame[0], box.height / frame[0]).cells
    columns = image_axis(cells[1], original[1], box.left / frame[1], box.width / frame[1]).cells
    padded = torch.full_like(logits, value)
    padded[:, rows, columns] = logits[:, rows, columns]
    one, other = (
        processor.post_process_referring_segmentation(given, inputs, **SELECTED)[0] for given in (logits, padded)
    )
    assert torch.equal(one["mask"], other["mask"]) and one["score"] == other["score"]


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 900), (900, 5), (20, 17)])
def test_small_and_thin_images_have_masks(processor, size):
    processor = processor_of(processor)
    (result,) = processor.post_process_referring_segmentation(smooth_logits(0) + 30, inputs_of(size), **SELECTED)
    assert result["mask"].shape == size and result["mask"].all()


@pytest.mark.parametrize("size", [(300, 250), (17, 11), (1, 400)])
def test_bands_change_nothing_but_rounding(processor, monkeypatch, size):
    processor = processor_of(processor)
    logits, inputs = smooth_logits(0), inputs_of(size)
    results = []
    for pixels in (2**30, 500, 1):
        monkeypatch.setattr("processing_sera.resampling_sera.BAND_PIXELS", pixels)
        results += processor.post_process_referring_segmentation(logits, inputs, return_probabilities=True, **SELECTED)
    for result in results[1:]:
        assert (result["mask"] != results[0]["mask"]).float().mean() < 1e-4
        assert torch.allclose(result["probabilities"], results[0]["probabilities"], atol=1e-6)
        assert result["score"] == pytest.approx(results[0]["score"], abs=1e-6)


def test_bands_are_the_rows_of_the_image():
    rows, columns = image_axis(7, 100, 0.0, 1.0), image_axis(5, 30, 0.2, 0.6)
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    bands = list(resampled_bands(values[:, columns.cells], rows, columns))
    assert torch.cat([band for _, band in bands]).shape == (100, 30)
    assert columns.cells == slice(1, 4)


def test_logits_that_need_a_gradient_are_taken(processor):
    logits = smooth_logits(0).requires_grad_()
    (result,) = processor_of(processor).post_process_referring_segmentation(logits, inputs_of((50, 40)), **SELECTED)
    assert result["mask"].any()


def test_a_mask_for_a_large_photograph_takes_little_memory():
    """48 million pixels: one array of their probabilities alone would take 192 MB."""
    script = f"""
import resource, sys, torch
sys.path.insert(0, {str(REPOSITORY / "tests")!r})
from stand_ins import make_processor
processor = make_processor()
logits = torch.nn.functional.interpolate(torch.randn(1, 1, 9, 9), (128, 128), mode="bicubic")[0]
def ask(size):
    inputs = {{"original_sizes": torch.tensor([size]), "pixel_values": torch.empty(1, 3, 448, 448)}}
    processor.post_process_referring_segmentation(logits, inputs, "expected_iou", keep_largest_component=True)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
unit = 2**20 if sys.platform == "darwin" else 2**10
print((-ask((1000, 1000)) + ask((6000, 8000))) / unit)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150  # MB; the mask itself has 48


# Settings


def test_the_selection_is_a_setting_of_the_processor(processor, tmp_path):
    logits, inputs = smooth_logits(1), inputs_of((120, 100))
    plain = processor_of(processor)
    assert (plain.mask_threshold, plain.keep_largest_component, plain.no_target_threshold) == (0.5, False, 0.5)
    assert plain.score_calibration is None
    settings = {
        "mask_threshold": "expected_iou",
        "keep_largest_component": True,
        "no_target_threshold": 0.7,
        "score_calibration": [[0.0, 0.0], [0.4, 0.5], [1.0, 0.9]],
    }
    processor_of(processor, **settings).save_pretrained(tmp_path)
    loaded = SeraProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in settings} == settings
    own = loaded.post_process_referring_segmentation(logits, inputs)[0]["mask"]
    asked = plain.post_process_referring_segmentation(logits, inputs, **SELECTED)[0]["mask"]
    assert torch.equal(own, asked)
    given = loaded.post_process_referring_segmentation(logits, inputs, threshold=0.5)[0]["mask"]
    kept = plain.post_process_referring_segmentation(logits, inputs, keep_largest_component=True)[0]["mask"]
    whole = plain.post_process_referring_segmentation(logits, inputs)[0]["mask"]
    assert torch.equal(given, kept) and not torch.equal(given, own) and not torch.equal(kept, whole)
    off = loaded.post_process_referring_segmentation(logits, inputs, threshold=0.5, keep_largest_component=False)
    assert torch.equal(off[0]["mask"], whole)


@pytest.mark.parametrize("threshold", ["expected-iou", 0, 1.0, None, [0.5]])
def test_a_threshold_that_is_none_is_named(processor, threshold):
    with pytest.raises(ValueError, match='mask threshold must lie between 0 and 1, or be "expected_iou", got'):
        processor_of(processor, mask_threshold=threshold)


@pytest.mark.parametrize("limit, is_empty", [(0.2, True), (0.4, False)])
def test_the_threshold_of_absence_is_a_setting(processor, limit, is_empty):
    processor = processor_of(processor, no_target_threshold=limit)
    outputs = {"logits": smooth_logits(0) + 30, "presence_logits": torch.tensor([np.log(0.7 / 0.3)])}
    (result,) = processor.post_process_referring_segmentation(outputs, inputs_of((50, 40)))
    assert result["mask"].any() != is_empty and result["no_target"] == pytest.approx(0.3)


# Scores


KNOTS = [[0.1, 0.0], [0.5, 0.6], [0.9, 0.8]]


def test_a_calibrated_score_is_the_iou_that_the_expected_iou_stands_for(processor):
    assert [calibrated(raw, KNOTS) for raw in (0, 0.1, 0.3, 0.7, 1)] == pytest.approx([0, 0, 0.3, 0.7, 0.8])
    processor = processor_of(processor, (96, 80), score_calibration=KNOTS)
    logits, inputs = smooth_logits(2), inputs_of((96, 80))
    for options in ({}, SELECTED, {"threshold": 0.2}):
        (result,) = processor.post_process_referring_segmentation(logits, inputs, **options)
        selected = select_on_grid(
            logits[0].numpy(), options.get("threshold", 0.5), options.get("keep_largest_component", False)
        )
        assert result["score"] == pytest.approx(calibrated(selected.expected_iou, KNOTS))
    mask, probabilities = logits[0].numpy() > 0, expit(logits[0].double().numpy())
    (result,) = processor.post_process_referring_segmentation(logits, inputs)
    assert result["score"] == pytest.approx(calibrated(expected_iou(mask, probabilities), KNOTS))


def test_presence_counts_in_a_calibrated_score(processor):
    processor = processor_of(processor, score_calibration=[[0.0, 0.0], [1.0, 1.0]])
    logits, inputs = smooth_logits(2), inputs_of((120, 100))
    (sure,) = processor.post_process_referring_segmentation(logits, inputs)
    for absence in (0.1, 0.4, 0.8):
        outputs = {"logits": logits, "presence_logits": torch.tensor([np.log((1 - absence) / absence)])}
        (result,) = processor.post_process_referring_segmentation(outputs, inputs)
        assert result["score"] == pytest.approx(absence if absence > 0.5 else (1 - absence) * sure["score"], abs=1e-6)


@pytest.mark.parametrize(
    "knots",
    [
        [],
        [[0.2, 0.3], [0.2, 0.4]],
        [[0.1, 0.5], [0.6, 0.4]],
        [[0.0, 0.0], [1.0, 1.2]],
        [[0.1]],
        "high",
        3,
        [[0.0, None]],
    ],
    ids=str,
)
def test_a_calibration_that_is_not_monotone_is_refused(processor, knots):
    with pytest.raises(ValueError, match="score_calibration must be a list of pairs"):
        processor_of(processor, score_calibration=knots)
