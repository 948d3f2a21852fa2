"""Everything a training run can be told, in one place: a YAML file under `configs/`, overridden on the command line."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Settings = TypeVar("Settings")
Tuning = Literal["frozen", "norm_bias", "full"]
Orientation = Literal["by_source", "upright", "stored"]


@dataclass
class ModelSettings:
    """What is trained.

    Args:
        pretrained: Folder or Hub id of a whole SERA to go on from; the towers below are then not needed.
        vision_model: Folder or Hub id of a DINOv2, or of a SERA, whose tower is taken. None: a fresh tower as `config` has it.
        text_model: Folder or Hub id of a CLIP, of its text tower, or of a SERA, whose tower is taken. None: a fresh tower as
            `config` has it.
        tokenizer: Folder or Hub id of a CLIP tokenizer. None: the one beside `text_model`, or, for scenes, one trained on them.
        config: Fields of SeraConfig that differ from its defaults or, going on from a whole SERA, from what that was saved with.
            It may gain decoder layers, adapters, sentences for its routers and a presence head, which begin without effect; it
            loses nothing.
        vision_tuning: What of the vision tower is trained.
        text_tuning: What of the text tower is trained.
        whitened_start: Begin with projections of the vision tower's features that give their principal directions, all equally
            strong; a small set then takes fewer steps. With `data.cached_versions`, whose states it reads.
    """

    pretrained: str | None = None
    vision_model: str | None = None
    text_model: str | None = None
    tokenizer: str | None = None
    config: dict = field(default_factory=dict)
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
    """

    source: Literal["refer", "folder"] = "refer"
    root: str | None = None
    dataset: str = "refcoco"
    split_by: str = "unc"
    image_dir: str | None = None
    weight: PositiveFloat | None = None


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
        image_size: Height and width in pixels that images are letterboxed to. None: 448×448 or, going on from a whole SERA, its
            own.
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
    objects_per_image: PositiveInt = 1
    sentences_per_object: PositiveInt = 1
    cached_versions: NonNegativeInt = 0
    copy_paste: NonNegativeInt = 0


@dataclass
class AugmentationSettings:
    """How training images and sentences are varied. Zeros leave them as they are.

    Args:
        flip: Probability of flipping an image horizontally, with "left" and "right" swapped in its sentences.
        min_crop: Smallest share of each side that a random crop around the objects keeps; 0 crops nothing.
        color_jitter: Largest relative change of brightness, contrast and saturation.
        word_dropout: Probability of dropping each word of a sentence (at least one stays).
        feature_dropout: Probability, below 1, of silencing each channel of an image's cached states; with `data.cached_versions`.
    """

    flip: ClosedUnitInterval = 0.0
    min_crop: ClosedUnitInterval = 0.0
    color_jitter: ClosedUnitInterval = 0.0
    word_dropout: ClosedUnitInterval = 0.0
    feature_dropout: ClosedUnitInterval = 0.0


@dataclass
class OptimizationSettings:
    """How it is trained. The defaults are the paper's recipe where it states one.

    Args:
        epochs: Passes over the training objects.
        batch_size: Images in a batch of one process.
        optimizer: "adamw", or "muon": Muon on the matrices, AdamW on the rest. It takes fewer steps for small models from nothing.
        learning_rate: The learning rate after warm-up.
        schedule: "multistep" multiplies the rate by 0.1 at each milestone, "cosine" lowers it to zero.
        milestones: Shares of training at which "multistep" acts.
        warmup: Share of training in which the rate rises linearly.
        weight_decay: Decoupled weight decay on matrices and kernels.
        max_grad_norm: Norm that gradients are clipped to; 0 clips nothing.
        gradient_accumulation_steps: Batches whose gradients are averaged before a step.
    """

    epochs: PositiveInt = 50
    batch_size: PositiveInt = 16
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: PositiveFloat = 1e-4
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
        output_dir: Folder for everything the run writes; a run that was interrupted goes on from what it finds there.
        model: What is trained.
        data: What it is trained and scored on.
        augmentation: How training examples are varied.
        optimization: How it is trained.
        seed: Seed of everything random.
        mixed_precision: Arithmetic of the forward pass; "fp16" scales the loss and needs a GPU.
        activation_checkpointing: Keep few activations of the towers' blocks and compute the others again in the backward pass:
            less memory, more time.
        compile: Compile the model with torch.compile; evaluation stays uncompiled, since its sizes change with every batch.
        num_workers: Processes per process that prepare batches.
        evaluate_every: Epochs between evaluations on the validation split.
        checkpoint_every: Steps of the optimiser between checkpoints; 0 for none but the one at each epoch's end.
        checkpoint_contents: "trained" keeps what training changes, with a reference to the towers and a checksum of what is
            frozen; "all" keeps every weight.
        log_every: Steps between writes to `losses.jsonl`, which holds every step's loss; a write waits for the device.
        cache_dir: Folder of the feature cache, about 0.7 MB for a version of 224×224 pixels with a ViT-S; runs share it.
        tracker: Where losses, scores and routing are sent beside the run's own files; its package must be installed.
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
    log_every: PositiveInt = 10
    cache_dir: str = "outputs/feature-cache"
    tracker: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"


def settings_parser(kind: type = TrainingSettings) -> ArgumentParser:
    """The command line of a program whose settings are the fields of a dataclass (of `train.py`'s), and `--config FILE`."""
    parser = ArgumentParser(description=kind.__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="YAML file of settings; options after it override it")
    parser.add_class_arguments(kind)
    return parser


def read_settings_of(kind: type[Settings], arguments: list[str] | None = None) -> Settings:
    """A dataclass from command-line arguments (`None`: the process's own). Exits with a message where one is not accepted."""
    parser = settings_parser(kind)
    parsed = parser.instantiate(parser.parse_args(arguments))
    return kind(**{name: parsed[name] for name in kind.__dataclass_fields__})


def read_settings(arguments: list[str] | None = None) -> TrainingSettings:
    """[`read_settings_of`] a training run."""
    settings = read_settings_of(TrainingSettings, arguments)
    fields = settings.model.config  # a free dict: what the command line gave for one of its fields is still text
    fields.update({name: yaml.safe_load(value) for name, value in fields.items() if isinstance(value, str)})
    return settings


def load_settings(path: Path) -> TrainingSettings:
    """Settings from a YAML file alone."""
    return read_settings(["--config", str(path)])


def default_data(parser: ArgumentParser, path: Path) -> None:
    """Make the data of a YAML file of settings the defaults of a parser's options `--data.…`."""
    parser.set_defaults({f"data.{name}": value for name, value in asdict(load_settings(path).data).items()})


def dump_settings(settings: TrainingSettings) -> str:
    """Settings as YAML that [`load_settings`] reads back to the same settings."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(settings))), sort_keys=False)  # JSON turns tuples to lists
