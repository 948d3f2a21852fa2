"""Export a saved SERA as an ONNX graph, and compare the graph in ONNX Runtime with the model.

`python training/export.py RUN --output DIR` writes `model.onnx`, a file with its weights, and the processor's files. The graph
takes any number and size of images, and any number and length of expressions. `--int8` also writes `model_int8.onnx`, with most
weights in eight bits. `--evaluate test` scores the model and the graphs on a split of the run's data.
"""

import importlib.metadata
import importlib.util
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate import Accelerator
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.export import Dim
from transformers.exporters import (
    ExportFormat,
    OnnxConfig,
    OnnxExporter,
    OnnxRuntimeDynamicConfig,
    OnnxRuntimeQuantizer,
)

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from modeling_sera.modeling_sera import SeraReferringSegmentationOutput
from processing_sera import SeraProcessor
from training.configuration import load_settings
from training.evaluation import score_sentences
from training.examples.splits import load_splits
from training.learning.building import load_whole
from training.scoring.metric import format_value, summarize
from training.support.commands import run_command
from training.support.environment import command_line, describe_hardware, library_versions
from training.support.files import partial_folder, replace_folder, write_text, writing
from training.support.model_location import locate_model

if TYPE_CHECKING:
    import onnx_ir

logger = logging.getLogger(__name__)

REQUIRED = (
    "onnx",
    "onnxruntime",
    "onnxscript",
)  # the extra "export"; optional, so they are imported where they are used
TOLERANCE = 1e-4  # largest difference of any logit from the model's own, as a share of the largest logit
CHECKED = (  # image of each expression, patches down and across, tokens; all differ from the traced sizes
    ([0], (3, 3), 77),
    ([0, 0, 0], (2, 5), 4),
    ([1, 0, 2, 2], (6, 1), 9),
)


class OnnxSegmentation(nn.Module):
    """A graph in ONNX Runtime, called like [`SeraForReferringSegmentation`]. For inference on the CPU only."""

    def __init__(self, path: str | Path):
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, **inputs: Tensor) -> SeraReferringSegmentationOutput:
        """Map the processor's outputs to `logits` and, if the model has them, `presence_logits`."""
        inputs.setdefault("image_index", torch.arange(len(inputs["input_ids"])))  # the graph always needs it
        feed = {node.name: inputs[node.name].numpy() for node in self.session.get_inputs()}
        names = [node.name for node in self.session.get_outputs()]
        found = zip(names, self.session.run(names, feed), strict=True)
        return SeraReferringSegmentationOutput(**{name: torch.from_numpy(values) for name, values in found})


def sample_inputs(config: SeraConfig, image_index: list[int], grid: tuple[int, int], length: int) -> dict[str, Tensor]:
    """Random inputs of the given sizes: images of `grid` patches down and across, expressions of up to `length` tokens.

    A text tower of a fixed length, or of fewer tokens, has its own length.
    """
    generator = torch.Generator().manual_seed(0)
    text, number = config.text_family, len(image_index)
    length = text.fixed_length or min(length, text.max_tokens)
    ids = torch.randint(0, config.text_config.vocab_size, (number, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(number):
        end = max(length - row, 1)  # paddings of different lengths
        ids[row, end - 1 :] = text.last_token
        mask[row, end:] = 0
    sides = [side * config.patch_size for side in grid]
    return {
        "pixel_values": torch.randn(max(image_index) + 1, 3, *sides, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "image_index": torch.tensor(image_index),
    }


def dynamic_shapes(config: SeraConfig) -> dict[str, dict[int, Any]]:
    """The axes of the inputs that may have any size, for `torch.export` and ONNX. Axes of the same name have the same size."""
    expressions, rows, columns = Dim("expressions"), Dim("rows"), Dim("columns")
    text = {0: expressions}
    if config.text_family.fixed_length is None:
        text[1] = Dim("tokens", max=config.text_family.max_tokens)
    return {
        "pixel_values": {0: Dim("images"), 2: config.patch_size * rows, 3: config.patch_size * columns},
        "input_ids": text,
        "attention_mask": text,
        "image_index": {0: expressions},
    }


def export_onnx(model: SeraForReferringSegmentation) -> "onnx_ir.Model":
    """The ONNX graph of a model in eval mode and float32, with the free axes of [`dynamic_shapes`]."""
    config = OnnxConfig(dynamic_shapes=dynamic_shapes(model.config))
    # No two sizes are equal: torch would treat equal sizes as one axis.
    exported = OnnxExporter().export(model, sample_inputs(model.config, [0, 0, 1, 2, 2], (4, 6), 7), config)
    # transformers 5.20, the last for Python 3.10, returns PyTorch's own ONNXProgram
    graph = exported.program if hasattr(exported, "program") else exported.model
    for part in (graph, graph.graph, *graph.graph.all_nodes()):
        part.metadata_props.clear()  # traces of the code: they name this machine's folders and are larger than the graph
    return graph


def quantize(graph: "onnx_ir.Model") -> "onnx_ir.Model":
    """The graph with the weights of linear layers and embeddings in eight bits, with one scale per output channel.

    Activations are rounded to eight bits when they are computed (dynamic quantisation), so no data is needed. Convolutions hold few
    weights and stay as they are, and so do products of two activations.
    """
    config = OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul", "Gemm", "Gather"], per_channel=True)
    return OnnxRuntimeQuantizer(config).quantize(graph, {}, ExportFormat.ONNX)


def save_graph(graph: "onnx_ir.Model", path: Path) -> None:
    """Write a graph to `path` and its weights to `path`.data. One file for both could not exceed 2 GB."""
    import onnx_ir

    onnx_ir.save(graph, path, external_data=f"{path.name}.data")


def largest_difference(model: SeraForReferringSegmentation, other: nn.Module) -> float:
    """Largest difference of any logit, as a share of the largest logit, over inputs of sizes that were not traced."""
    differences = []
    for image_index, grid, length in CHECKED:
        inputs = sample_inputs(model.config, image_index, grid, length)
        with torch.inference_mode():
            expected, found = model(**inputs).logits, other(**inputs).logits
        differences.append(float((found - expected).abs().max() / expected.abs().max()))
    return max(differences)


class Timed(nn.Module):
    """A model that adds up the seconds of its calls."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.seconds = 0.0

    def forward(self, **inputs: Tensor) -> SeraReferringSegmentationOutput:
        start = time.perf_counter()
        outputs = self.model(**inputs)
        self.seconds += time.perf_counter() - start
        return outputs


def measure(
    candidates: Mapping[str, nn.Module], processor: SeraProcessor, rows: datasets.Dataset, accelerator: Accelerator
) -> dict[str, dict[str, float]]:
    """The scores of each candidate over all sentences of a split, and the `seconds` that it computed."""
    measured = {}
    for name, candidate in candidates.items():
        timed = Timed(candidate).eval()
        scores = score_sentences(timed, processor, rows, accelerator)
        measured[name] = summarize(scores)["all"] | {"seconds": timed.seconds}
    return measured


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = ArgumentParser(description="Export a saved SERA as an ONNX graph and check it in ONNX Runtime.")
    parser.add_argument("model", type=str, help="a run's folder, the model's own, or an id on the Hub")
    parser.add_argument(
        "--output", type=str, required=True, help="folder for the files: a new one, or an earlier export's"
    )
    parser.add_argument(
        "--int8", action="store_true", help="also write model_int8.onnx, with most weights in eight bits"
    )
    parser.add_argument(
        "--evaluate",
        type=str | None,
        default=None,
        metavar="SPLIT",
        help="score the model and the graphs on this split of the data in the model's settings.yaml",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = Path(options.output)
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not found; the command needs pip install '.[export]'.")
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / "model.onnx").is_file())):
        parser.error(f"--output {output} holds other files than an export's; name a new folder.")
    try:
        location = locate_model(options.model)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.evaluate and (location.settings is None or not location.settings.is_file()):
        missing = location.settings or f"the settings.yaml of {location.name}"
        parser.error(f"--evaluate {options.evaluate}: {missing} is not there; it names the data.")
    accelerator = Accelerator(cpu=True)  # before the data ask for one, which would choose a GPU for the whole process
    try:
        rows = load_splits(load_settings(location.settings).data, [options.evaluate])[0] if options.evaluate else None
        model, processor = load_whole(location.source, torch.float32)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    with writing(output):
        folder = partial_folder(output)
        processor.save_pretrained(folder)
        graph = export_onnx(model)
        save_graph(graph, folder / "model.onnx")
        candidates = {"model": model, "model.onnx": OnnxSegmentation(folder / "model.onnx")}
        if options.int8:
            save_graph(quantize(graph), folder / "model_int8.onnx")
            candidates["model_int8.onnx"] = OnnxSegmentation(folder / "model_int8.onnx")
    difference = largest_difference(model, candidates["model.onnx"])
    if not difference < TOLERANCE:
        raise ValueError(
            f"The graph differs from the model by {difference:.1e} of the largest logit, more than {TOLERANCE:g}. It stays in "
            f"{folder}."
        )
    sizes = {"model": sum(parameter.nbytes for parameter in model.parameters())} | {
        name: sum(file.stat().st_size for file in folder.glob(f"{name}*")) for name in candidates if name != "model"
    }
    if rows is not None:
        measured = measure(candidates, processor, rows, accelerator)
        record = {
            "model": location.name,
            "split": options.evaluate,
            "scores": {name: figures | {"bytes": sizes[name]} for name, figures in measured.items()},
            "command": command_line("training/export.py", arguments),
            "hardware": describe_hardware() | {"threads": torch.get_num_threads()},
            "versions": library_versions() | {name: importlib.metadata.version(name) for name in REQUIRED},
        }
        write_text(folder / f"evaluation-{options.evaluate}.json", json.dumps(record, indent=1))
        for name, figures in measured.items():
            logger.info(f"{name}: mIoU {format_value(figures['mIoU'])}, {figures['seconds']:.1f} s of computation")
    replace_folder(output)
    logger.info(
        f"{output}: at sizes that were not traced, model.onnx differs by at most {difference:.1e} of the largest logit"
    )
    logger.info(", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()))


if __name__ == "__main__":
    run_command(main)
