"""Very small trainings: their settings, the commands that start them, and the files that they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from builders import Folder, special_ids, tiny_tokenizer
from conftest import REPOSITORY
from transformers import CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model

from training.configuration import (
    AugmentationSettings,
    DataSettings,
    ModelSettings,
    OptimizationSettings,
    TrainingSettings,
    dump_settings,
)

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
TRAIN = [sys.executable, "training/train.py"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]

VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 64}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL = {"adapter_dim": 16, "adapter_num_heads": 2, "fusion_dim": 16, "fusion_num_heads": 2, "router_hidden_dim": 8}
SMALL |= {"decoder_dim": 32, "decoder_num_layers": 1, "decoder_num_heads": 2, "decoder_ffn_dim": 32}
SMALL |= {"bce_loss_weight": 0.0}  # Dice alone: with cross-entropy, a training this short ends at empty masks
TINY = TrainingSettings(
    model=ModelSettings(
        config=SMALL
        | {
            "vision_config": VISION | {"model_type": "dinov2", "patch_size": 16},
            "text_config": TEXT,
            "projection_dim": 24,
        },
        vision_tuning="full",
        text_tuning="full",
    ),
    data=DataSettings(source="scenes", num_scenes=(8, 3, 2), scene_size=64, image_size=(64, 64), objects_per_image=8),
    augmentation=AugmentationSettings(flip=0.5, min_crop=0.8, color_jitter=0.1, word_dropout=0.1),
    optimization=OptimizationSettings(epochs=3, batch_size=2, learning_rate=2e-3, schedule="cosine", warmup=0.1),
    num_workers=0,
)


def written(settings: TrainingSettings, path: Path) -> str:
    """The path of a file that holds the settings."""
    path.write_text(dump_settings(settings))
    return str(path)


def run(arguments: list[str], **environment: str) -> subprocess.Popen:
    """A process that was started in the repository."""
    return subprocess.Popen(
        arguments,
        cwd=REPOSITORY,
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen) -> str:
    """The output of a run that ended well."""
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def refer_settings(root: Path) -> TrainingSettings:
    """A made-up REFER folder with large objects, and towers as folders."""
    folder = Folder(root)
    for annotation in folder.annotations:
        annotation.update(segmentation=[[4, 2, 58, 2, 58, 38, 4, 38]], bbox=[4, 2, 54, 36])
    folder.load()
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**VISION, patch_size=14)).save_pretrained(root / "vision")
    tokenizer = tiny_tokenizer()
    special = special_ids(tokenizer)
    text = CLIPTextConfig(**TEXT, **special, vocab_size=len(tokenizer), projection_dim=24)
    CLIPTextModel(text).save_pretrained(root / "text")
    tokenizer.save_pretrained(root / "text")
    return TrainingSettings(
        model=ModelSettings(vision_model=str(root / "vision"), text_model=str(root / "text"), config=SMALL),
        data=DataSettings(root=str(root), image_size=(42, 56), sentences_per_object=2),
        optimization=OptimizationSettings(epochs=4, batch_size=1, learning_rate=2e-2),
        evaluate_every=2,
        num_workers=1,
    )


def history_of(folder: Path) -> list[dict]:
    """The records of a run's epochs."""
    return json.loads((folder / "history.json").read_text())


VARIANTS = {
    "baseline": {"model.config.adapter_experts": False, "model.config.fusion_experts": False},
    "full": None,
    "k2": {"model.config.num_selected_experts": 2},
}


def write_grid(folder: Path, **changes) -> Path:
    """A grid of variants of the tiny training."""
    written(TINY, folder / "base.yaml")
    content = {
        "config": "base.yaml",
        "options": {"optimization.epochs": 1},
        "split": "test",
        "baseline": "baseline",
        "seeds": [0, 1],
        "variants": VARIANTS,
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path
