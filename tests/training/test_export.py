"""Export: ONNX at all sizes, eight-bit weights, torch.export and torch.compile, and input that the command refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from builders import iou, tiny_tokenizer
from conftest import REPOSITORY, make_inputs, make_model
from documents import commands
from torch.nn.functional import pad
from towers import text_values

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.fusion_sera import SeraFixedFilters
from processing_sera import SeraImageProcessor, SeraProcessor
from training import export
from training.configuration import DataSettings, TrainingSettings, dump_settings
from training.export import (
    TOLERANCE,
    OnnxSegmentation,
    dynamic_shapes,
    export_onnx,
    largest_difference,
    sample_inputs,
    save_graph,
)

needs_onnx = pytest.mark.skipif(
    any(export.importlib.util.find_spec(name) is None for name in export.REQUIRED),
    reason="the export extra (onnx, onnxscript, onnxruntime) is not installed",
)

# images, image of each expression, size in pixels, tokens
SIZES = [
    (1, [0], (56, 56), 5),  # one of each, at the size of the position embedding
    (2, [0, 1], (56, 56), 7),
    (2, [1, 0, 1, 1], (84, 28), 12),
    (1, [0, 0, 0], (14, 42), 77),
    (4, [3, 1, 0, 2], (112, 98), 4),
    (3, [0, 1, 2, 2, 1, 0, 0], (28, 28), 20),
]
LEARNT = (2, [0, 0, 1, 1])  # images and expressions that the exported model has learnt


def text_config() -> dict[str, int]:
    """The tiny tokenizer's special tokens."""
    tokenizer = tiny_tokenizer()
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def differences(model, other, sizes=SIZES) -> list[float]:
    """Largest difference of the logits at each of the sizes, as a share of the largest logit."""
    found = []
    for arguments in sizes:
        inputs = make_inputs(*arguments)
        with torch.inference_mode():
            expected, logits = model(**inputs).logits, other(**inputs).logits
        assert logits.shape == expected.shape
        found.append(float((logits - expected).abs().max() / expected.abs().max()))
    return found


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run's folder: a small model that has learnt four masks, its processor, and settings that name its data."""
    folder = tmp_path_factory.mktemp("readme") / "outputs" / "demo"
    shorter = {"adapter_layers": [1], "tap_layers": [1, 2], "predict_presence": True}
    model = make_model(vision_config={"num_hidden_layers": 2}, text_config=text_config(), **shorter).train()
    labels = torch.zeros(4, 56, 56)
    for expression, (top, left) in enumerate([(0, 0), (20, 30), (28, 6), (4, 24)]):
        labels[expression, top : top + 26, left : left + 24] = 1
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**make_inputs(*LEARNT), labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    image_processor = SeraImageProcessor(size={"height": 56, "width": 56})
    selection = {"mask_threshold": "expected_iou", "keep_largest_component": True}
    SeraProcessor(image_processor, tiny_tokenizer(), **selection).save_pretrained(folder / "model")
    data = DataSettings(source="scenes", num_scenes=(1, 1, 2), scene_size=64)
    (folder / "settings.yaml").write_text(dump_settings(TrainingSettings(data=data)))
    return folder


@pytest.fixture(scope="module")
def exported(run_folder):
    """The folder that the command in docs/deployment.md wrote, as it is written there."""
    place = run_folder.parents[1]
    for name in ("modeling_sera", "processing_sera", "training"):
        (place / name).symlink_to(REPOSITORY / name)
    (command,) = commands("Export")
    environment = os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(command, shell=True, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return place / "exported"


@pytest.fixture(scope="module")
def trained(run_folder):
    return SeraForReferringSegmentation.from_pretrained(run_folder / "model").eval()


@needs_onnx
def test_the_graphs_masks_are_the_models(run_folder, trained, exported):
    """With the mask selection of the processor, which the export has too."""
    own, processor = (SeraProcessor.from_pretrained(folder) for folder in (run_folder / "model", exported))
    assert (processor.mask_threshold, processor.keep_largest_component) == ("expected_iou", True)
    inputs = make_inputs(*LEARNT) | {"original_sizes": torch.tensor([[300, 200], [150, 150]])}
    graph = OnnxSegmentation(exported / "model.onnx")
    with torch.inference_mode():
        expected = own.post_process_referring_segmentation(trained(**inputs), inputs)
    for result, reference in zip(
        processor.post_process_referring_segmentation(graph(**inputs), inputs), expected, strict=True
    ):
        assert reference["mask"].any() and iou(result["mask"].numpy(), reference["mask"].numpy()) >= 0.999
        assert result["score"] == pytest.approx(reference["score"], abs=1e-4)


@needs_onnx
def test_the_graph_computes_what_the_model_does_at_every_size(trained, exported):
    graph = OnnxSegmentation(exported / "model.onnx")
    assert max(differences(trained, graph)) < 1e-4
    inputs = make_inputs(2, [0, 1, 1])
    with torch.inference_mode():
        assert torch.allclose(graph(**inputs).presence_logits, trained(**inputs).presence_logits, atol=1e-4)


@needs_onnx
def test_the_graph_needs_onnx_runtime_and_the_processor_alone(trained, exported, image):
    import onnxruntime

    processor = SeraProcessor.from_pretrained(exported)
    inputs = processor(images=[image, image], text=[["red cup", "left"], ["girl"]], return_tensors="np")
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    (logits,) = session.run(["logits"], {node.name: inputs[node.name] for node in session.get_inputs()})
    with torch.inference_mode():
        expected = trained(**inputs.convert_to_tensors("pt")).logits.numpy()
    assert abs(logits - expected).max() < 1e-4 * abs(expected).max()


@needs_onnx
def test_eight_bits_hardly_move_the_masks_of_a_trained_model(trained, exported):
    inputs = make_inputs(*LEARNT)
    with torch.inference_mode():
        logits = trained(**inputs).logits
    found = OnnxSegmentation(exported / "model_int8.onnx")(**inputs).logits
    assert 0.1 < (logits > 0).float().mean() < 0.5
    assert found.isfinite().all() and not torch.allclose(found, logits, rtol=1e-4, atol=1e-4)
    assert ((found > 0) == (logits > 0)).float().mean() > 0.97
    small, large = ((exported / f"{name}.onnx.data").stat().st_size for name in ("model_int8", "model"))
    assert small < 0.6 * large


@needs_onnx
def test_the_model_and_its_graphs_are_scored(exported):
    scores = json.loads((exported / "evaluation-test.json").read_text())["scores"]
    assert set(scores) == {"model", "model.onnx", "model_int8.onnx"}
    assert scores["model.onnx"]["mIoU"] == pytest.approx(scores["model"]["mIoU"], abs=1e-3)
    assert len({figures["num_expressions"] for figures in scores.values()}) == 1
    assert all(figures["seconds"] > 0 for figures in scores.values())
    for name in ("model.onnx", "model_int8.onnx"):
        written = [(exported / file).stat().st_size for file in (name, f"{name}.data")]
        assert scores[name]["bytes"] == sum(written)


@needs_onnx
def test_no_file_names_a_folder_of_the_machine(exported, run_folder):
    folders = [str(run_folder.parents[1]), str(REPOSITORY), sys.prefix]
    for file in exported.iterdir():
        assert not [folder for folder in folders if folder.encode() in file.read_bytes()], file.name
    assert not list(exported.parent.glob(".*"))


def test_torch_export_with_free_sizes():
    """Another kind of model: no registers, routers that see the sentence, some experts left out."""
    kind = {"expression_aware_routing": True, "num_selected_experts": 2}
    vision = {"model_type": "dinov2", "num_hidden_layers": 2}
    model = make_model(vision_config=vision, adapter_layers=[0], tap_layers=[2], **kind)
    traced = sample_inputs(model.config, [0, 0, 1, 2, 2], (4, 6), 7)
    with torch.no_grad():
        program = torch.export.export(model, (), traced, dynamic_shapes=dynamic_shapes(model.config))
    sides_of_two_patches = [arguments for arguments in SIZES if min(arguments[2]) >= 28]  # what torch.export guards for
    assert max(differences(model, program.module(), sides_of_two_patches)) < 1e-4


@needs_onnx
def test_towers_of_other_families_are_exported_too(tmp_path):
    """Rotary positions of any grid, and expressions of the one length that the text tower reads."""
    vision, text = {"model_type": "dinov3_vit", "num_hidden_layers": 2}, text_values("siglip_text_model")
    model = make_model(vision_config=vision, text_config=text, adapter_layers=[0], tap_layers=[2])
    assert set(dynamic_shapes(model.config)["input_ids"]) == {0}
    save_graph(export_onnx(model), tmp_path / "model.onnx")
    assert largest_difference(model, OnnxSegmentation(tmp_path / "model.onnx")) < TOLERANCE


def test_compiled_whole():
    """With `fullgraph`, the inference path must compile to one graph, without a fallback to Python."""
    shorter = {"adapter_layers": [1], "tap_layers": [1, 2]}
    model = make_model(vision_config={"num_hidden_layers": 2}, num_selected_experts=2, **shorter)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for arguments in SIZES[1:3]:
        inputs = make_inputs(*arguments)
        with torch.inference_mode():
            assert torch.allclose(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's code generator for the CPU needs a C++ compiler")
def test_compiled_filters_have_a_backward_pass():
    filters = SeraFixedFilters([[[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]])
    grid = torch.randn(2, 3, 5, 6, requires_grad=True)
    torch.compile(lambda grid: filters(grid)[0].square().sum(), fullgraph=True)(grid).backward()
    found, grid.grad = grid.grad, None
    filters(grid)[0].square().sum().backward()
    assert torch.allclose(found, grid.grad, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 6), (1, 4), (1, 1)])
@pytest.mark.parametrize("radius", [1, 2])
def test_the_filters_padding_repeats_the_border(size, radius):
    centre = torch.zeros(2 * radius + 1, 2 * radius + 1)
    kernels = []
    for row in range(2 * radius + 1):
        for column in range(2 * radius + 1):
            kernels.append(centre.clone())
            kernels[-1][row, column] = 1
    grid = torch.randn(2, 3, *size)
    padded = pad(grid, (radius,) * 4, mode="replicate")
    shifted = iter(SeraFixedFilters([kernel.tolist() for kernel in kernels])(grid))
    for row in range(2 * radius + 1):
        for column in range(2 * radius + 1):
            assert torch.equal(next(shifted), padded[..., row : row + size[0], column : column + size[1]])


def refusal(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        export.main([*map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@needs_onnx
def test_what_it_cannot_use_is_named_before_any_work(run_folder, tmp_path, monkeypatch, capsys):
    def work(*arguments, **options):
        raise AssertionError("export began")

    monkeypatch.setattr(export, "export_onnx", work)
    model, output = run_folder / "model", tmp_path / "new"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert "holds other files than an export" in refusal(capsys, model, "--output", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    assert "'nope'" in refusal(capsys, model, "--output", output, "--evaluate", "nope")
    moved = tmp_path / "alone" / "model"
    shutil.copytree(model, moved)
    assert "settings.yaml" in refusal(capsys, moved, "--output", output, "--evaluate", "test")
    assert "nowhere" in refusal(capsys, tmp_path / "nowhere", "--output", output)
    assert not output.exists()


@needs_onnx
def test_a_gpu_is_left_alone(run_folder, tmp_path, monkeypatch, capsys):
    """The graph runs on the CPU, so loading the data must not choose a GPU for the process."""

    def load(*arguments):
        raise ValueError(f"device: {PartialState().device}")

    monkeypatch.setattr(export, "load_splits", load)
    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        said = refusal(capsys, run_folder / "model", "--output", tmp_path / "new", "--evaluate", "test")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "device: cpu" in said


def test_a_missing_library_is_named(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "REQUIRED", ("onnx", "no_such_library"))
    said = refusal(capsys, run_folder / "model", "--output", tmp_path / "new")
    assert "no_such_library" in said and ".[export]" in said


@needs_onnx
def test_a_graph_that_computes_something_else_is_refused(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "export_onnx", lambda model: None)
    monkeypatch.setattr(export, "save_graph", lambda graph, path: path.touch())
    monkeypatch.setattr(export, "OnnxSegmentation", lambda path: make_model(seed=1))
    with pytest.raises(ValueError, match="largest logit"):
        export.main([str(run_folder / "model"), "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_the_check_sees_a_difference():
    assert largest_difference(make_model(), make_model(seed=1)) > 1e-2
