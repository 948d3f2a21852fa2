"""All settings of a training run. They stand in a YAML file, such as those in `configs/`; the command line overrides them."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from training.support.hub_ids import folder_or_id

Settings = TypeVar("Settings")
Tuning = Literal["frozen", "norm_bias", "full"]
Orientation = Literal["by_source", "upright", "stored"]


@dataclass
class ModelSettings:
    """The model that is trained.

    Args:
        pretrained: Folder or Hub id of a whole SERA that training starts from. It brings its towers and its tokenizer.
        vision_model: Folder or Hub id of the vision tower: a DINOv2, a DINOv3, or a SERA whose vision tower is taken. None: a new
            tower with random weights, as `config` describes it.
        text_model: Folder or Hub id of the text tower: a CLIP or SigLIP, the text tower of one, a BERT, or a SERA whose text
            tower is taken. None: a new tower with random weights, as `config` describes it.
        tokenizer: Folder or Hub id of the text tower's tokenizer. None: the tokenizer in `text_model` or, for scenes, one of CLIP's
            kind that is trained on their sentences.
        config: Fields of SeraConfig that differ from its defaults. With `pretrained`, fields that differ from the saved model's:
            it may gain decoder layers, adapters, routers that see the sentence, and a presence head. These begin without effect.
            No weight of the saved model may be dropped.
        processor: Fields of SeraProcessor that differ from its defaults: how the masks of this model are selected, for example
            `mask_threshold: expected_iou`. With `pretrained`, fields that differ from the saved processor's.
        vision_tuning: Which weights of the vision tower are trained: none ("frozen"), LayerNorm weights and all biases
            ("norm_bias"), or all ("full").
        text_tuning: The same for the text tower.
        whitened_start: Set the layers that read the vision tower to the principal directions of its features, all with equal
            strength. Training on a small set then takes fewer steps. It needs `data.cached_versions`.
    """

    pretrained: str | None = None
    vision_model: str | None = None
    text_model: str | None = None
    tokenizer: str | None = None
    config: dict = field(default_factory=dict)
    processor: dict = field(default_factory=dict)
    vision_tuning: Tuning = "norm_bias"
    text_tuning: Tuning = "norm_bias"
    whitened_start: bool = False


@dataclass
class MixedSet:
    """A further set to train on, see `DataSettings.mix`.

    Args:
        source: "refer" for a folder in the REFER layout, "folder" for one that `preparation.py` made or a copy of RefCOCO on the
            Hub.
        root: The REFER folder; or the prepared folder, or the Hub's "owner/name". None: `data.root`.
        dataset: Name of the REFER set.
        split_by: Whose split of the REFER set.
        image_dir: Folder of the images, where they do not lie under `root`. None: without a `root` of its own `data.image_dir`.
        weight: Share of this set in the draws of an epoch, relative to the other weights. None: every object once an epoch.
        absent: As `DataSettings.absent`.
    """

    source: Literal["refer", "folder"] = "refer"
    root: str | None = None
    dataset: str = "refcoco"
    split_by: str = "unc"
    image_dir: str | None = None
    weight: PositiveFloat | None = None
    absent: NonNegativeInt = 0


@dataclass
class DataSettings:
    """What it is trained and scored on.

    Args:
        source: "refer" for a folder in the REFER layout, "folder" for one that `preparation.py` made or a copy of RefCOCO on the
            Hub, "scenes" for the embedded scenes, which need no files.
        root: The REFER folder; or the prepared folder, or the Hub's "owner/name".
        image_dir: Folder of the images, where they do not lie under `root`.
        dataset: Name of the REFER set, such as "refcoco" or "refcoco+".
        split_by: Whose split, such as "unc" or "umd".
        weight: Share of the set above in the draws of an epoch, where `mix` names further sets. Either all sets have a weight or
            none has one: then an epoch draws every object once.
        mix: Further sets to train on. Images that stand in another split of any of the sets are then left out of training.
        absent: Sentences about absent things that each image of a REFER set also gets, in a row without a target. They are other
            images' sentences about categories that the image has none of, so every object of the image must be annotated.
        held_out: Share of the training images, from 0 to 1, that no run trains on. They are the split "held_out", for choices and
            for fitting scores.
        orientation: Which pixels masks are drawn on where an image has an orientation tag: "upright" for the image as viewers and
            annotation programs show it, "stored" for the pixels as the file holds them. "by_source": stored for images with one of
            COCO's file names, as COCO's annotations mean them, and upright for all others.
        streaming: Read the training rows of folders as they are needed, instead of copying them to the cache first.
        train_split: Split that is trained on.
        val_split: Split that chooses the best epoch; the only one that training looks at.
        hide_sentences: Replace every sentence by the same word. This control shows what can be learnt from the images alone.
        scene_set: Which embedded scenes: "demo" for easy ones, or the benchmark's (`docs/scenes.md`): "location" (location words
            allowed), "appearance" (excluded), "relation" (long), "mixed" (all three about the same scenes).
        scene_no_target: Add to every scene of the benchmark expressions about something that is not in it.
        num_scenes: Number of embedded scenes for training, validation and test.
        scene_size: Side in pixels of the embedded scenes.
        scene_seed: Seed of the embedded scenes.
        image_size: Height and width in pixels that images are scaled to fit. None: 448×448 or, going on from a whole SERA, its
            own.
        padding: Pad every image to `image_size`. Without, each image has its own shape, and in the feature cache batches are of one
            shape. None: padded or, going on from a whole SERA, as it is.
        objects_per_image: Objects of one image that share a forward pass. 1 is the field's usual way: one object, one image.
        sentences_per_object: Sentences drawn for an object in each epoch.
        cached_versions: Versions of every training image in the feature cache: the image, the flipped image (where
            `augmentation.flip` is above zero), then variations of both in turns. They are drawn once for all epochs and runs, with
            the hidden states of the frozen vision tower below the first adapter. It needs `model.vision_tuning` "frozen". 0: no
            cache, every epoch draws anew.
        copy_paste: Number of copy-paste images in an epoch, added to the others: cut-out training objects on a blurred background,
            with sentences that are true by construction (`examples/copy_paste.py`). They are kept in the feature cache too.
    """

    source: Literal["refer", "folder", "scenes"] = "refer"
    root: str | None = None
    image_dir: str | None = None
    dataset: str = "refcoco"
    split_by: str = "unc"
    weight: PositiveFloat | None = None
    mix: list[MixedSet] = field(default_factory=list)
    absent: NonNegativeInt = 0
    held_out: ClosedUnitInterval = 0.0
    orientation: Orientation = "by_source"
    streaming: bool = False
    train_split: str = "train"
    val_split: str = "val"
    hide_sentences: bool = False
    scene_set: Literal["demo", "location", "appearance", "relation", "mixed"] = "demo"
    scene_no_target: bool = False
    num_scenes: tuple[int, int, int] = (4000, 200, 200)
    scene_size: PositiveInt = 96
    scene_seed: NonNegativeInt = 0
    image_size: tuple[int, int] | None = None
    padding: bool | None = None
    objects_per_image: PositiveInt = 1
    sentences_per_object: PositiveInt = 1
    cached_versions: NonNegativeInt = 0
    copy_paste: NonNegativeInt = 0


@dataclass
class AugmentationSettings:
    """How training images and sentences are varied. With 0, nothing is.

    Args:
        flip: Probability that an image is flipped horizontally. "left" and "right" are then swapped in its sentences.
        min_crop: Smallest share of each side that a random crop around the objects keeps. 0: no crop.
        color_jitter: Largest relative change of brightness, contrast and saturation.
        word_dropout: Probability that a word of a sentence is dropped. At least one word stays.
        feature_dropout: Probability, below 1, that a channel of an image's cached features is set to zero. It needs
            `data.cached_versions`.
    """

    flip: ClosedUnitInterval = 0.0
    min_crop: ClosedUnitInterval = 0.0
    color_jitter: ClosedUnitInterval = 0.0
    word_dropout: ClosedUnitInterval = 0.0
    feature_dropout: ClosedUnitInterval = 0.0


@dataclass
class OptimizationSettings:
    """The optimization. The defaults are the paper's recipe, where the paper states one.

    Args:
        epochs: Passes over the training objects.
        batch_size: Images in a batch of one process.
        optimizer: "adamw", or "muon": Muon for the matrices and AdamW for the rest. Small models that start from random weights
            need fewer steps with Muon.
        learning_rate: Learning rate after the warm-up.
        router_rate: Factor on the learning rate of the routers, which AdamW trains with either optimizer.
        tower_rate: Factor on the learning rate of what is trained in the two towers. Below 1, fine-tuning on a small set changes
            them less than the rest.
        schedule: "multistep" multiplies the learning rate by 0.1 at each milestone, "cosine" lowers it to zero.
        milestones: Shares of training, from 0 to 1, at which "multistep" lowers the learning rate.
        warmup: Share of training, from 0 to 1, in which the learning rate rises linearly.
        weight_decay: Decoupled weight decay of matrices and convolution kernels.
        max_grad_norm: Largest norm of the gradients; larger ones are scaled down to it. 0: no limit.
        gradient_accumulation_steps: Batches of one process that make one step. Every expression of a step weighs the same, and the
            inputs of all its batches are in memory together.
    """

    epochs: PositiveInt = 50
    batch_size: PositiveInt = 16
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: PositiveFloat = 1e-4
    router_rate: PositiveFloat = 1.0
    tower_rate: PositiveFloat = 1.0
    schedule: Literal["multistep", "cosine"] = "multistep"
    milestones: list[float] = field(default_factory=lambda: [0.7])
    warmup: ClosedUnitInterval = 0.0
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: NonNegativeFloat = 1.0
    gradient_accumulation_steps: PositiveInt = 1


@dataclass
class TrainingSettings:
    """Train SERA. Run with `accelerate launch training/train.py --config FILE [--option value ...]`.

    Args:
        output_dir: Folder of the run. A run that was interrupted goes on from the checkpoint in it. One run at a time may use it.
        model: The model that is trained.
        data: The data for training and validation.
        augmentation: How training images and sentences are varied.
        optimization: The optimization.
        seed: Seed of all random numbers.
        mixed_precision: Precision of the forward pass. "fp16" scales the loss and needs a GPU.
        activation_checkpointing: Keep few activations of the towers' blocks, and compute the others again in the backward pass.
            This takes less memory and more time. The gradients are the same.
        compile: Compile the model with torch.compile for training. Validation runs uncompiled, since its sizes change with every
            batch.
        num_workers: Processes that prepare batches, for each process that trains.
        evaluate_every: Epochs between two evaluations on the validation split.
        checkpoint_every: Steps between two checkpoints. 0: one checkpoint at the end of each epoch only.
        checkpoint_contents: "trained" keeps the weights that training changes, with the names of the towers and a checksum of the
            frozen weights. "all" keeps every weight.
        stored_weights: Type of the weights in the saved model. "float16" halves the file; the model still runs in float32.
        log_every: Steps between two writes to `losses.jsonl`. The file holds the loss of every step. Each write waits for the
            device, and looks for numbers that are not finite.
        cache_dir: Folder of the feature cache. Runs share it. One version of an image of 224×224 pixels takes about 0.7 MB with a
            ViT-S.
        tracker: Where losses, scores and routing are also sent. The tracker's package must be installed.
    """

    output_dir: str = "outputs/run"
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    seed: NonNegativeInt = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    activation_checkpointing: bool = False
    compile: bool = False
    num_workers: NonNegativeInt = 1
    evaluate_every: PositiveInt = 1
    checkpoint_every: NonNegativeInt = 0
    checkpoint_contents: Literal["trained", "all"] = "trained"
    stored_weights: Literal["float32", "float16"] = "float32"
    log_every: PositiveInt = 10
    cache_dir: str = "outputs/feature-cache"
    tracker: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"


def check_settings(settings: TrainingSettings) -> TrainingSettings:
    """Refuse settings that make no sense, or not together, before any work.

    Returns:
        The settings, with "~" in the folders of `model` replaced by the home folder.

    Raises:
        ValueError: Names the settings.
        OSError: Where a folder that is named is not there.
    """
    model, data, optimization = settings.model, settings.data, settings.optimization
    if Path(settings.output_dir).is_file():
        raise ValueError(f"output_dir is {settings.output_dir}, a file; name a folder.")
    for name in ("learning_rate", "weight_decay", "max_grad_norm"):
        if not math.isfinite(getattr(optimization, name)):
            raise ValueError(f"optimization.{name} is {getattr(optimization, name)}; it must be a finite number.")
    if not all(0 <= milestone <= 1 for milestone in optimization.milestones):
        raise ValueError(
            f"optimization.milestones are {optimization.milestones}; they are shares of training, from 0 to 1."
        )
    if data.image_size is not None and min(data.image_size) < 1:
        raise ValueError(f"data.image_size is {list(data.image_size)}; both sides must be 1 or more.")
    if settings.augmentation.feature_dropout >= 1:
        raise ValueError("augmentation.feature_dropout is 1; nothing of the images would be left.")
    if settings.compile and settings.activation_checkpointing:
        raise ValueError("compile and activation_checkpointing cannot be combined; choose one.")
    wanting = {
        "data.copy_paste": data.copy_paste,
        "model.whitened_start": model.whitened_start,
        "augmentation.feature_dropout": settings.augmentation.feature_dropout,
    }
    for name, value in wanting.items():
        if value and not data.cached_versions:
            raise ValueError(f"{name} needs the feature cache; set data.cached_versions to 1 or more.")
    if data.cached_versions and model.vision_tuning != "frozen":
        raise ValueError(
            f"data.cached_versions needs a frozen vision tower, but model.vision_tuning is {model.vision_tuning!r}."
        )
    if data.cached_versions and data.streaming:
        raise ValueError(
            "data.cached_versions and data.streaming exclude each other: the feature cache needs all rows."
        )
    if model.pretrained:
        for name in ("vision_model", "text_model", "tokenizer", "whitened_start"):
            if getattr(model, name):
                raise ValueError(
                    f"model.{name} is for a fresh model; model.pretrained brings all of one. Leave one of them out."
                )
    names = ("pretrained", "vision_model", "text_model", "tokenizer")
    given = {name: getattr(model, name) for name in names if getattr(model, name)}
    found = {name: folder_or_id(source, f"model.{name}") for name, source in given.items()}
    return replace(settings, model=replace(model, **found))


def settings_parser(kind: type = TrainingSettings) -> ArgumentParser:
    """A parser whose options are the fields of a dataclass (default: the settings of `train.py`), and `--config FILE`."""
    parser = ArgumentParser(description=kind.__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="YAML file of settings; options after it override them")
    parser.add_class_arguments(kind)
    return parser


def read_settings_of(kind: type[Settings], arguments: list[str] | None = None) -> Settings:
    """Settings from command-line arguments (`None`: those of this process).

    A message ends the process where an argument is not accepted.
    """
    parser = settings_parser(kind)
    parsed = parser.instantiate(parser.parse_args(arguments))
    return kind(**{name: parsed[name] for name in kind.__dataclass_fields__})


def read_settings(arguments: list[str] | None = None) -> TrainingSettings:
    """[`read_settings_of`] a training run."""
    settings = read_settings_of(TrainingSettings, arguments)
    for fields in (settings.model.config, settings.model.processor):
        # dicts without types: values from the command line are still text
        fields.update({name: yaml.safe_load(value) for name, value in fields.items() if isinstance(value, str)})
    return settings


def load_settings(path: Path) -> TrainingSettings:
    """Settings from a YAML file."""
    return read_settings(["--config", str(path)])


def default_data(parser: ArgumentParser, path: Path) -> None:
    """Take the defaults of a parser's options `--data.…` from a YAML file of settings."""
    parser.set_defaults({f"data.{name}": value for name, value in asdict(load_settings(path).data).items()})


def dump_settings(settings: TrainingSettings) -> str:
    """Settings as YAML that [`load_settings`] reads back to the same settings."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(settings))), sort_keys=False)  # JSON turns tuples to lists
