"""The metrics of referring segmentation as a local `evaluate` module: `evaluate.load("training/referring_iou")`."""

import math

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Scores of predicted masks from whole pixel counts, one intersection and one union per expression.

- mIoU: mean over expressions of intersection / union.
- oIoU: sum of all intersections / sum of all unions.
- Pr@X: share of expressions whose IoU is greater than X.

An expression with an empty union (nothing there, nothing predicted) counts as IoU 1.
"""

_INPUTS = """
Args:
    intersections (`list[int]`): pixels in both the prediction and the truth.
    unions (`list[int]`): pixels in either.
Returns:
    mIoU, oIoU, Pr@0.5, Pr@0.6, Pr@0.7, Pr@0.8, Pr@0.9 (`float`, in [0, 1]) and num_expressions (`int`).
"""

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


class ReferringIoU(evaluate.Metric):
    """mIoU, oIoU and Pr@X. Fed with integers, so that adding batches in any order gives the same scores exactly."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"intersections": datasets.Value("int64"), "unions": datasets.Value("int64")}),
        )

    def _compute(self, intersections: list[int], unions: list[int]) -> dict[str, float | int]:
        inter, union = np.asarray(intersections, dtype=np.int64), np.asarray(unions, dtype=np.int64)
        wrong = np.flatnonzero((inter < 0) | (inter > union))
        if wrong.size:
            i = int(wrong[0])
            raise ValueError(
                f"Expression {i} has intersection {inter[i]} and union {union[i]}; 0 <= intersection <= union must hold."
            )
        iou = np.where(union > 0, inter / np.maximum(union, 1), 1.0)
        total = int(union.sum())
        scores = {"mIoU": math.fsum(iou) / inter.size, "oIoU": int(inter.sum()) / total if total else 1.0}
        scores |= {f"Pr@{x}": float((iou > x).mean()) for x in THRESHOLDS}
        return scores | {"num_expressions": int(inter.size)}
