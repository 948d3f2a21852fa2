"""A saved SERA as an ONNX graph, checked in ONNX Runtime against the model that it came from.

`python training/export.py MODEL --output DIR` writes `model.onnx`, its weights beside it and the processor's files. Images,
expressions, their length and the images' sides may be of any number and size. `--int8` also writes `model_int8.onnx`, with
most weights in eight bits; `--evaluate test` scores the model and the graphs on a split of the run's data: what that costs.
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
from training.evaluation import model_name, score_sentences
from training.examples.splits import load_splits
from training.learning.building import load_whole
from training.scoring.metric import format_value, summarize
from training.support.commands import run_command
from training.support.environment import command_line, describe_hardware, library_versions
from training.support.files import partial_folder, replace_folder, write_text, writing

if TYPE_CHECKING:
    import onnx_ir

logger = logging.getLogger(__name__)

REQUIRED = ("onnx", "onnxruntime", "onnxscript")  # the export extra; imported where they are used, since optional
TOLERANCE = 1e-4  # largest difference of any logit from the model's own, as a share of the largest logit
CHECKED = (  # rows of images that expressions are about, patches down and across, tokens: none as traced
    ([0], (3, 3), 77),
    ([0, 0, 0], (2, 5), 4),
    ([1, 0, 2, 2], (6, 1), 9),
)


class OnnxSegmentation(nn.Module):
    """A graph in ONNX Runtime, called as [`SeraForReferringSegmentation`] is; on the CPU, in inference alone."""

    def __init__(self, path: str | Path):
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, **inputs: Tensor) -> SeraReferringSegmentationOutput:
        """What the processor returns to `logits` and, where the model has them, `presence_logits`."""
        inputs.setdefault("image_index", torch.arange(len(inputs["input_ids"])))  # the graph always needs it
        feed = {node.name: inputs[node.name].numpy() for node in self.session.get_inputs()}
        names = [node.name for node in self.session.get_outputs()]
        found = zip(names, self.session.run(names, feed), strict=True)
        return SeraReferringSegmentationOutput(**{name: torch.from_numpy(values) for name, values in found})


def sample_inputs(config: SeraConfig, image_index: list[int], grid: tuple[int, int], length: int) -> dict[str, Tensor]:
    """Random inputs of the given sizes: images of `grid` patches down and across, expressions of up to `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    text, number = config.text_config, len(image_index)
    ids = torch.randint(0, text.vocab_size, (number, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(number):
        end = max(length - row, 1)  # paddings of different lengths
        ids[row, end - 1 :] = text.eos_token_id
        mask[row, end:] = 0
    sides = [side * config.patch_size for side in grid]
    return {
        "pixel_values": torch.randn(max(image_index) + 1, 3, *sides, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "image_index": torch.tensor(image_index),
    }


def dynamic_shapes(config: SeraConfig) -> dict[str, dict[int, Any]]:
    """The axes of the inputs that are free, for `torch.export` and ONNX; axes of one name have one size."""
    expressions, rows, columns = Dim("expressions"), Dim("rows"), Dim("columns")
    text = {0: expressions, 1: Dim("tokens", max=config.text_config.max_position_embeddings)}
    return {
        "pixel_values": {0: Dim("images"), 2: config.patch_size * rows, 3: config.patch_size * columns},
        "input_ids": text,
        "attention_mask": text,
        "image_index": {0: expressions},
    }


def export_onnx(model: SeraForReferringSegmentation) -> "onnx_ir.Model":
    """The ONNX graph of a model in eval mode and float32, with the free axes of [`dynamic_shapes`]."""
    config = OnnxConfig(dynamic_shapes=dynamic_shapes(model.config))
    # No two sizes are equal: equal ones would be taken for one axis.
    exported = OnnxExporter().export(model, sample_inputs(model.config, [0, 0, 1, 2, 2], (4, 6), 7), config)
    # transformers 5.20, the last for Python 3.10, returns PyTorch's own ONNXProgram
    graph = exported.program if hasattr(exported, "program") else exported.model
    for part in (graph, graph.graph, *graph.graph.all_nodes()):
        part.metadata_props.clear()  # traces of the code, with this machine's folders: several times the graph's own size
    return graph


def quantize(graph: "onnx_ir.Model") -> "onnx_ir.Model":
    """The graph with the weights of linear layers and embeddings in eight bits, a scale per output channel.

    Activations are rounded to eight bits as they come (dynamic quantisation), so no data is needed. Convolutions, which hold few
    of the weights, and products of two activations stay as they are.
    """
    config = OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul", "Gemm", "Gather"], per_channel=True)
    return OnnxRuntimeQuantizer(config).quantize(graph, {}, ExportFormat.ONNX)


def save_graph(graph: "onnx_ir.Model", path: Path) -> None:
    """Write a graph and, beside it as `path`.data, its weights (one file of both could not exceed 2 GB)."""
    import onnx_ir

    onnx_ir.save(graph, path, external_data=f"{path.name}.data")


def largest_difference(model: SeraForReferringSegmentation, other: nn.Module) -> float:
    """Largest difference of any logit, as a share of the largest logit, over inputs of other sizes than those traced."""
    differences = []
    for image_index, grid, length in CHECKED:
        tokens = min(length, model.config.text_config.max_position_embeddings)
        inputs = sample_inputs(model.config, image_index, grid, tokens)
        with torch.inference_mode():
            expected, found = model(**inputs).logits, other(**inputs).logits
        differences.append(float((found - expected).abs().max() / expected.abs().max()))
    return max(differences)


class Timed(nn.Module):
    """A model that counts the seconds of its calls."""

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
    """Of each candidate, its scores over all sentences of a split and the `seconds` that it computed for them."""
    measured = {}
    for name, candidate in candidates.items():
        timed = Timed(candidate).eval()
        scores = score_sentences(timed, processor, rows, accelerator)
        measured[name] = summarize(scores)["all"] | {"seconds": timed.seconds}
    return measured


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = ArgumentParser(description="Write a saved SERA as an ONNX graph and check it in ONNX Runtime.")
    parser.add_argument("model", type=str, help="folder or Hub id of a SERA")
    parser.add_argument("--output", type=str, required=True, help="folder to write, new or of an earlier export")
    parser.add_argument(
        "--int8", action="store_true", help="also write model_int8.onnx, with most weights in eight bits"
    )
    parser.add_argument(
        "--evaluate",
        type=str | None,
        default=None,
        metavar="SPLIT",
        help="score the model and the graphs on this split of the data in the settings.yaml beside the model",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output, settings_file = Path(options.output), Path(options.model).parent / "settings.yaml"
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not found; the command needs pip install '.[export]'.")
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / "model.onnx").is_file())):
        parser.error(f"--output {output} holds something else than an export; name a new folder.")
    if options.evaluate and not settings_file.is_file():
        parser.error(f"--evaluate {options.evaluate}: {settings_file}, which would name the data, is not there.")
    accelerator = Accelerator(cpu=True)  # before the data ask for one, which would choose a GPU for the whole process
    try:
        rows = load_splits(load_settings(settings_file).data, [options.evaluate])[0] if options.evaluate else None
        model, processor = load_whole(options.model, torch.float32)
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
            f"the graph differs from the model by {difference:.1e} of its largest logit, more than {TOLERANCE:g}; it is left in "
            f"{folder} to look at."
        )
    sizes = {"model": sum(parameter.nbytes for parameter in model.parameters())} | {
        name: sum(file.stat().st_size for file in folder.glob(f"{name}*")) for name in candidates if name != "model"
    }
    if rows is not None:
        measured = measure(candidates, processor, rows, accelerator)
        record = {
            "model": model_name(options.model),
            "split": options.evaluate,
            "scores": {name: figures | {"bytes": sizes[name]} for name, figures in measured.items()},
            "command": command_line("training/export.py", arguments),
            "hardware": describe_hardware() | {"threads": torch.get_num_threads()},
            "versions": library_versions() | {name: importlib.metadata.version(name) for name in REQUIRED},
        }
        write_text(folder / f"evaluation-{options.evaluate}.json", json.dumps(record, indent=1))
        for name, figures in measured.items():
            logger.info(f"{name}: mIoU {format_value(figures['mIoU'])}, {figures['seconds']:.1f} s of computing")
    replace_folder(output)
    logger.info(f"{output}: model.onnx within {difference:.1e} of the model's largest logit at sizes not traced")
    logger.info(", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()))


if __name__ == "__main__":
    run_command(main)
