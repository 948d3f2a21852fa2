"""Train SERA: `accelerate launch training/train.py --config training/configs/demo.yaml [--option value ...]`.

Reads from top to bottom: data, model, what of it is tuned, optimiser, then epochs, each ending with a checkpoint and the best
model by mIoU on the validation split kept as a folder that `from_pretrained` loads.
"""

import json
import logging
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, set_seed, tqdm
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from modeling_sera import SeraForReferringSegmentation
from processing_sera import SeraProcessor
from training.batches import Collator, TrainingExamples
from training.building import build_model, build_processor
from training.configuration import (
    OptimizationSettings,
    TrainingSettings,
    dump_settings,
    load_settings,
    read_settings,
)
from training.evaluation import score_sentences
from training.files import partial_folder, recover_folder, replace_folder, write_text
from training.metric import summarize
from training.splits import load_splits
from training.tuning import apply_tuning

logger = get_logger(__name__)


def main() -> None:
    """Train as the command line says."""
    settings = read_settings()
    output = Path(settings.output_dir)
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.optimization.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        step_scheduler_with_optimizer=False,
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    set_seed(settings.seed)

    # Data: rows of one referred object each, grouped to pictures.
    train_rows, val_rows = load_splits(settings.data, [settings.data.train_split, settings.data.val_split])
    processor = build_processor(settings, train_rows)
    examples = TrainingExamples(
        train_rows,
        objects_per_picture=settings.data.objects_per_picture,
        sentences_per_object=settings.data.sentences_per_object,
        augmentation=settings.augmentation,
        seed=settings.seed,
    )
    loader = DataLoader(
        examples,
        settings.optimization.batch_size,
        shuffle=True,
        drop_last=len(examples) >= settings.optimization.batch_size,  # batch norm wants full batches
        collate_fn=Collator(processor, with_labels=True),
        num_workers=settings.num_workers,
    )
    logger.info(
        f"training on {len(train_rows)} objects in {len(examples)} groups, validating on {len(val_rows)} objects"
    )

    # Model, and what of it is tuned.
    model = build_model(settings, processor)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif accelerator.num_processes > 1:
        logger.info(f"batch norm statistics are each process's own: {accelerator.device.type} cannot synchronise them")
    report = apply_tuning(model, vision=settings.model.vision_tuning, text=settings.model.text_tuning)
    logger.info(str(report))

    # Optimiser and schedule.
    optimization = settings.optimization
    # plain floats: checkpoints admit nothing else
    groups = parameter_groups(model, float(optimization.weight_decay))
    optimizer = torch.optim.AdamW(groups, lr=float(optimization.learning_rate), fused=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps_per_epoch = math.ceil(len(loader) / optimization.gradient_accumulation_steps)
    total_steps = optimization.epochs * steps_per_epoch
    scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(step / total_steps, optimization))

    # What an interrupted run left behind.
    progress = Progress()
    accelerator.register_for_checkpointing(progress, scheduler)
    checkpoint = output / "checkpoint"
    if recover_folder(checkpoint):
        check_same_run(settings, load_settings(output / "settings.yaml"))
        accelerator.load_state(str(checkpoint))
        logger.info(f"{checkpoint} is there: going on after epoch {progress.epoch} of {optimization.epochs}")
    elif accelerator.is_main_process:
        write_text(output / "settings.yaml", dump_settings(settings))
        write_text(output / "tuning.json", json.dumps(vars(report) | {"tower_share": report.tower_share}, indent=1))

    bar = tqdm(total=total_steps, initial=progress.epoch * steps_per_epoch, desc="training", unit="step")
    for epoch in range(progress.epoch, optimization.epochs):
        examples.set_epoch(epoch)
        loader.set_epoch(epoch)
        model.train()
        losses = []
        for inputs, _ in loader:
            with accelerator.accumulate(model):
                outputs = model(**inputs)
                accelerator.backward(outputs.loss)
                if accelerator.sync_gradients and optimization.max_grad_norm:
                    accelerator.clip_grad_norm_(model.parameters(), optimization.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    scheduler.step()
                    bar.update()
            losses.append(outputs.loss.detach())
            if len(losses) % 20 == 1:
                bar.set_postfix(loss=f"{losses[-1].item():.3f}", epoch=epoch + 1)
        progress.epoch = epoch + 1
        record = {"epoch": epoch + 1, "loss": accelerator.reduce(torch.stack(losses).mean(), "mean").item()}

        if (epoch + 1) % settings.evaluate_every == 0 or epoch + 1 == optimization.epochs:
            unwrapped = accelerator.unwrap_model(model)
            if accelerator.num_processes > 1:
                # batch norm's running statistics differ where they cannot be synchronised
                for buffer in unwrapped.buffers():
                    torch.distributed.broadcast(buffer, src=0)
            scores = score_sentences(unwrapped, processor, val_rows, accelerator, num_workers=settings.num_workers)
            summary = summarize(scores)
            record["val"] = summary["all"]
            if summary["all"]["mIoU"] > progress.best_miou:
                progress.best_miou = summary["all"]["mIoU"]
                if accelerator.is_main_process:
                    save_model(unwrapped, processor, output / "model")
            logger.info(f"epoch {epoch + 1}: loss {record['loss']:.4f}, val mIoU {summary['all']['mIoU']:.4f}")

        progress.history.append(record)
        if accelerator.is_main_process:
            write_text(output / "history.json", json.dumps(progress.history, indent=1))
        save_checkpoint(accelerator, checkpoint)
    bar.close()
    logger.info(f"best val mIoU {progress.best_miou:.4f}; the model is in {output / 'model'}")
    accelerator.end_training()


def check_same_run(now: TrainingSettings, before: TrainingSettings) -> None:
    """`ValueError` where a run would go on under other settings than it began with; how fast it runs may change."""
    free = {"output_dir", "num_workers"}
    for name, value in asdict(now).items():
        if name not in free and value != asdict(before)[name]:
            raise ValueError(
                f"{now.output_dir} holds a run begun with other settings: {name} was {asdict(before)[name]}, now it is {value}. "
                "Choose another output_dir, or remove that one."
            )


class Progress:
    """What a checkpoint keeps of the run beside model, optimiser, schedule and random states."""

    def __init__(self):
        self.epoch = 0
        self.best_miou = -1.0
        self.history: list[dict] = []

    def state_dict(self) -> dict:
        """Plain values."""
        return vars(self)

    def load_state_dict(self, state: dict) -> None:
        """The values that [`state_dict`] gave."""
        vars(self).update(state)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trained parameters in two groups: matrices and kernels decay, vectors (biases, norms, gains) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate_factor(done: float, optimization: OptimizationSettings) -> float:
    """Factor on the learning rate after a share `done` of training, in [0, 1]."""
    if done < optimization.warmup:
        return max(done / optimization.warmup, 1e-3)
    if optimization.schedule == "multistep":
        return 0.1 ** sum(done >= milestone for milestone in optimization.milestones)
    return 0.5 * (1 + math.cos(math.pi * min((done - optimization.warmup) / max(1 - optimization.warmup, 1e-9), 1.0)))


def save_model(model: SeraForReferringSegmentation, processor: SeraProcessor, folder: Path) -> None:
    """Weights and processor as one folder that `from_pretrained` loads; whole or, if interrupted, as it was before."""
    partial = partial_folder(folder)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    replace_folder(folder)


def save_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Everything the run needs to go on, as one folder; whole or, if interrupted, as it was before."""
    if accelerator.is_main_process:
        partial_folder(folder)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(folder.with_name(f".{folder.name}.partial")))  # every process adds its random states
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        replace_folder(folder)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        logging.getLogger(__name__).debug("the error's traceback", exc_info=True)
        sys.exit(f"error: {error}")
