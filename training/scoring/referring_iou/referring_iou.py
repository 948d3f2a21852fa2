"""The metrics of referring segmentation as a local `evaluate` module: `evaluate.load("training/scoring/referring_iou")`."""

import math

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Scores of predicted masks from three pixel counts per expression.

- mIoU: mean over expressions of intersection / union.
- oIoU: sum of all intersections / sum of all unions.
- Pr@X: share of expressions whose IoU is greater than X.

An expression with an empty union (no target, nothing predicted) counts as IoU 1. If some expressions have no target (an empty
truth), there are also the scores of generalised referring segmentation (Liu et al., "GRES", 2023):

- gIoU: mean IoU. An expression without a target counts 1 if the prediction is empty and 0 if not. By the rule above it equals
  mIoU.
- cIoU: cumulative IoU, over all expressions. It equals oIoU.
- N-acc: share of the expressions without a target whose prediction is empty.
- T-acc: share of the expressions with a target whose prediction is not empty.
"""

_INPUTS = """
Args:
    intersections (`list[int]`): pixels in both the prediction and the truth.
    predicted_areas (`list[int]`): pixels in the prediction; 0 predicts that there is no target.
    truth_areas (`list[int]`): pixels in the truth; 0 if there is no target.
Returns:
    mIoU, oIoU, Pr@0.5, Pr@0.6, Pr@0.7, Pr@0.8, Pr@0.9 (`float`, in [0, 1]) and num_expressions (`int`). If some truths are
    empty, also gIoU, cIoU and N-acc; and T-acc, if not all are empty.
"""

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)

# every metric is one sum over expressions divided by another: the two summands of each expression, arrays (N,)
Terms = dict[str, tuple[np.ndarray, np.ndarray]]


def ratio_terms(intersections: np.ndarray, predicted_areas: np.ndarray, truth_areas: np.ndarray) -> Terms:
    """Numerators and denominators of the metrics, from (N,) whole numbers of pixels. A metric is the ratio of their sums.

    Raises:
        ValueError: There are no expressions, or no two masks can have such counts.
    """
    inter, predicted, truth = (np.asarray(c, dtype=np.int64) for c in (intersections, predicted_areas, truth_areas))
    if not inter.size:
        raise ValueError("There are no expressions to score.")
    wrong = np.flatnonzero((inter < 0) | (inter > np.minimum(predicted, truth)))
    if wrong.size:
        i = int(wrong[0])
        raise ValueError(
            f"Expression {i} has intersection {inter[i]}, predicted area {predicted[i]} and true area {truth[i]}; "
            "0 <= intersection <= either area must hold."
        )
    union = predicted + truth - inter
    iou, each = np.where(union > 0, inter / np.maximum(union, 1), 1.0), np.ones_like(inter)
    terms: Terms = {"mIoU": (iou, each), "oIoU": (inter, union)}
    terms |= {f"Pr@{x}": (iou > x, each) for x in THRESHOLDS}
    absent = truth == 0
    if absent.any():
        terms |= {"gIoU": (iou, each), "cIoU": (inter, union), "N-acc": (absent & (predicted == 0), absent)}
        if not absent.all():
            terms["T-acc"] = (~absent & (predicted > 0), ~absent)
    return terms


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> float:
    """The metric of these terms. It is 1 if the denominators sum to 0: only unions can, and then all masks are correctly empty.

    The sums are exact, so the order of the expressions does not matter.
    """
    total = math.fsum(denominators)
    return math.fsum(numerators) / total if total else 1.0


class ReferringIoU(evaluate.Metric):
    """mIoU, oIoU, Pr@X and, with expressions without a target, gIoU, cIoU, N-acc and T-acc."""

    def _info(self) -> evaluate.MetricInfo:
        counts = ("intersections", "predicted_areas", "truth_areas")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({name: datasets.Value("int64") for name in counts}),
        )

    def _compute(
        self, intersections: list[int], predicted_areas: list[int], truth_areas: list[int]
    ) -> dict[str, float | int]:
        terms = ratio_terms(intersections, predicted_areas, truth_areas)
        return {name: ratio(*pair) for name, pair in terms.items()} | {"num_expressions": len(intersections)}
