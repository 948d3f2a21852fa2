"""Score a model on every sentence of a split, at every picture's own size.

As a command: `python training/evaluation.py RUN/model --split test`; prints a table, writes `evaluation.json`.
"""

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader, Subset

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training.batches import Collator, EvaluationExamples, shuffled_sentences
from training.configuration import load_settings
from training.figures import draw_sheet
from training.files import write_text
from training.metric import SentenceScore, format_table, summarize
from training.splits import load_splits

logger = logging.getLogger(__name__)


def score_sentences(
    model: SeraForReferringSegmentation,
    processor: SeraProcessor,
    rows: datasets.Dataset,
    accelerator: Accelerator,
    *,
    batch_size: int = 8,
    shuffle: bool = False,
    threshold: float | None = None,
    num_workers: int = 0,
) -> list[SentenceScore]:
    """Ask the model for the mask of every sentence of every row; each once, whatever the number of processes.

    Args:
        model: The model, on the accelerator's device.
        processor: Its processor.
        rows: A split (one referred object per row).
        accelerator: Says which pictures are this process's.
        batch_size: Pictures per forward pass.
        shuffle: Ask each object another picture's sentences: what a model reaches that ignores the text.
        threshold: Probability above which a pixel is in the mask. `None`: the processor's own.
        num_workers: Processes that prepare batches.

    Returns:
        One score per sentence, in the order of the rows; the same list in every process.
    """
    examples = EvaluationExamples(rows, shuffled_sentences(rows) if shuffle else None)
    mine = Subset(examples, range(accelerator.process_index, len(examples), accelerator.num_processes))
    loader = DataLoader(mine, batch_size, collate_fn=Collator(processor, with_labels=False), num_workers=num_workers)
    kinds = rows["sentence_kinds"]
    was_training = model.training
    model.eval()
    scores = []
    for inputs, batch in tqdm(loader, desc="evaluating", leave=False):
        with torch.inference_mode(), accelerator.autocast():
            outputs = model(**inputs.to(accelerator.device))
        results = processor.post_process_referring_segmentation(outputs, inputs, threshold=threshold)
        truths = [mask for example in batch for mask in example.masks]
        sources = [source for example in batch for source in example.sources]
        for result, truth, (row, sentence) in zip(results, truths, sources, strict=True):
            predicted = result["mask"].cpu().numpy()
            intersection = int(np.count_nonzero(predicted & truth))
            union = int(np.count_nonzero(predicted)) + int(np.count_nonzero(truth)) - intersection
            scores.append(SentenceScore(row, sentence, kinds[row][sentence], intersection, union))
    model.train(was_training)
    return sorted(gather_object(scores), key=lambda score: (score.row, score.sentence))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = ArgumentParser(description="Score a saved SERA on every sentence of a split.")
    parser.add_argument("model", type=str, help="folder or Hub id of a SERA")
    parser.add_argument(
        "--settings", type=str, default=None, help="settings of the run, for its data; default: beside the model"
    )
    parser.add_argument("--split", type=str, default="test", help="split to score")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures per forward pass")
    parser.add_argument(
        "--threshold", type=float | None, default=None, help="probability at the mask's edge; default: processor's"
    )
    parser.add_argument(
        "--output", type=str | None, default=None, help="JSON file; default: evaluation-SPLIT.json by the model"
    )
    parser.add_argument("--sheet", type=str | None, default=None, help="also draw examples to this PNG file")
    options = parser.parse_args(arguments)

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings_file = Path(options.settings) if options.settings else Path(options.model).parent / "settings.yaml"
    if not settings_file.is_file():
        parser.error(f"{settings_file} is not there; name the run's settings with --settings.")
    accelerator = Accelerator()
    (rows,) = load_splits(load_settings(settings_file).data, [options.split])
    model = SeraForReferringSegmentation.from_pretrained(options.model).to(accelerator.device)
    processor = SeraProcessor.from_pretrained(options.model)

    ask = {"batch_size": options.batch_size, "threshold": options.threshold}
    scores = score_sentences(model, processor, rows, accelerator, **ask)
    shuffled = score_sentences(model, processor, rows, accelerator, shuffle=True, **ask)
    if not accelerator.is_main_process:
        return
    summaries = {"as written": summarize(scores), "shuffled": summarize(shuffled)}
    logger.info(format_table(summaries))
    output = Path(options.output) if options.output else Path(options.model).parent / f"evaluation-{options.split}.json"
    record = {"split": options.split, "summary": summaries, "scores": [asdict(score) for score in scores]}
    write_text(output, json.dumps(record, indent=1))
    if options.sheet:
        draw_sheet(model, processor, rows, scores, Path(options.sheet))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        logging.getLogger(__name__).debug("the error's traceback", exc_info=True)
        sys.exit(f"error: {error}")
