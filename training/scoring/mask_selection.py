"""How an evaluation selects masks: the processor's own mask selection, and what takes its place."""

from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from processing_sera import SeraProcessor
from processing_sera.mask_selection_sera import EXPECTED_IOU


@dataclass(frozen=True)
class MaskSelection:
    """How masks are selected. The default is the processor's own mask selection. The processor has the code for all of it.

    Attributes:
        threshold: Probability in (0, 1) above which a pixel is in the mask, or "expected_iou". `None`: the processor's.
        keep_largest_component: Whether one component of each mask is kept. `None`: the processor's.
        flip: Test-time augmentation: average the answer with that for the horizontally flipped image.
    """

    threshold: float | Literal["expected_iou"] | None = None
    keep_largest_component: bool | None = None
    flip: bool = False

    def completed(self, processor: SeraProcessor) -> "MaskSelection":
        """The same selection with the processor's own settings where there were none."""
        keep = self.keep_largest_component
        return replace(
            self,
            threshold=processor.mask_threshold if self.threshold is None else self.threshold,
            keep_largest_component=processor.keep_largest_component if keep is None else keep,
        )

    def ask(
        self, model: nn.Module, processor: SeraProcessor, inputs: dict[str, Any], text: list[str], **options: Any
    ) -> tuple[dict[str, Tensor], Any]:
        """Run the model.

        Args:
            model: The model.
            processor: Its processor.
            inputs: What the processor returned, on the model's device.
            text: The expressions, in the order of `input_ids`.
            options: Further arguments of the model.

        Returns:
            `logits` and, if the model predicts it, `presence_logits`; and the model's whole output for the unflipped images.
        """
        outputs = model(**inputs, **options)
        if self.flip:
            flipped = model(**processor.flipped_inputs(inputs, text), **options)
            return processor.average_flipped(outputs, flipped), outputs
        names = ("logits", "presence_logits")
        return {name: outputs[name] for name in names if outputs.get(name) is not None}, outputs

    def results(
        self, processor: SeraProcessor, answers: dict[str, Tensor], inputs: dict[str, Any], **options: Any
    ) -> list[dict[str, Any]]:
        """Masks and scores from the answers of `ask`, see `post_process_referring_segmentation`."""
        return processor.post_process_referring_segmentation(
            answers, inputs, self.threshold, keep_largest_component=self.keep_largest_component, **options
        )


PROCESSORS_OWN = MaskSelection()


def selection_of(options: Namespace, processor: SeraProcessor) -> MaskSelection:
    """The selection that a command's options `threshold`, `expected_iou`, `largest_component` and `tta` ask for, completed."""
    return MaskSelection(
        threshold=EXPECTED_IOU if options.expected_iou else options.threshold,
        keep_largest_component=options.largest_component,
        flip=options.tta == "flip",
    ).completed(processor)


__all__ = ["PROCESSORS_OWN", "MaskSelection", "selection_of"]
