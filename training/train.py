"""Train SERA: `accelerate launch training/train.py --config training/configs/demo.yaml [--option value ...]`.

`train` runs from top to bottom: data, model, tuned weights, optimizer, epochs. Each epoch ends with a checkpoint. The model
with the best mIoU on the validation split is kept in a folder that `from_pretrained` loads. The same command continues a run
that was stopped; on the CPU the result is the same to the last bit.
"""

import logging
import math
import os
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
    tqdm,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from training.configuration import (
    OptimizationSettings,
    TrainingSettings,
    check_settings,
    dump_settings,
    load_settings,
    read_settings,
)
from training.evaluation import score_sentences
from training.examples.batches import Collator, TrainingExamples
from training.examples.feature_cache import CachedCollator, CachedExamples, FeatureCache
from training.examples.shapes import ShapeBatches
from training.examples.splits import load_training_splits
from training.examples.streaming import StreamedExamples, streamed_loader
from training.learning.building import build_model, build_processor
from training.learning.checkpoints import Checkpoints, Progress, check_same_run, clear_output
from training.learning.losses import FiniteLogits, LossLog
from training.learning.optimizers import build_optimizer
from training.learning.routing_health import RoutingHealth, routing_warnings
from training.learning.steps import accumulate_gradients, batches_of_steps
from training.learning.tuning import apply_tuning, checkpoint_activations
from training.learning.whitening import whiten_projections
from training.scoring.metric import summarize
from training.support.commands import describe_error, run_command
from training.support.files import recover_folder, save_model, write_json, write_text
from training.support.locks import locked_folder
from training.support.workers import end_with_parent

logger = get_logger(__name__)


def main() -> None:
    """Train as the command line says."""
    settings = check_settings(read_settings())
    accelerator = start_accelerator(settings)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it names every file of every checkpoint
    with alone_in(Path(settings.output_dir), accelerator):
        try:
            train(settings, accelerator)
        except FloatingPointError as error:  # in every process
            traceback.clear_frames(error.__traceback__)  # they hold the model
            end(accelerator)
            raise
        end(accelerator)


def train(settings: TrainingSettings, accelerator: Accelerator) -> None:
    """Do the whole run, or the rest of a run that was stopped.

    Raises:
        FloatingPointError: In every process, where a loss, a gradient or an answer in the validation is not finite.
    """
    output = Path(settings.output_dir)
    set_seed(settings.seed)

    # Data and model. Each row is one object; an example is one image with some of its rows.
    train_rows, val_rows = load_training_splits(settings.data)
    processor = build_processor(settings, train_rows)
    model = build_model(settings, processor)
    collator = Collator(processor, with_labels=True)
    batch_size = settings.optimization.batch_size
    drawing = {
        "objects_per_image": settings.data.objects_per_image,
        "sentences_per_object": settings.data.sentences_per_object,
        "augmentation": settings.augmentation,
        "seed": settings.seed,
    }
    shapes = None  # batches of one shape
    if settings.data.streaming:
        place = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
        examples = StreamedExamples(train_rows, batch_size=batch_size, **drawing, **place)
        loader = streamed_loader(examples, collator, settings.num_workers, accelerator)
    else:
        if settings.data.cached_versions:
            store = FeatureCache(settings, train_rows, model, processor, accelerator)
            if settings.model.whitened_start:
                whiten_projections(model, store.sample())
            examples = CachedExamples(store, settings)
            collator = CachedCollator(processor)
        else:
            examples = TrainingExamples(train_rows, **drawing)
        if settings.data.cached_versions and not processor.image_processor.do_pad:
            shapes = ShapeBatches(lambda: examples.frames, batch_size, shuffle=True, seed=settings.seed)
            batching = {"batch_sampler": shapes}
        else:
            # batch norm needs full batches; a set smaller than one batch for each process is filled up
            drop_last = len(examples) >= batch_size * accelerator.num_processes
            batching = {"batch_size": batch_size, "shuffle": True, "drop_last": drop_last}
        loader = accelerator.prepare(
            DataLoader(
                examples,
                **batching,
                collate_fn=collator,
                num_workers=settings.num_workers,
                worker_init_fn=end_with_parent,
                generator=torch.Generator(),  # its own: a run that goes on would else change the numbers that dropout draws
            )
        )
    logger.info(f"training on {len(examples)} groups of objects, validating on {len(val_rows)} objects")

    # Which weights are tuned.
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif accelerator.num_processes > 1:
        logger.info(
            f"each process has its own batch norm statistics: {accelerator.device.type} cannot synchronise them"
        )
    report = apply_tuning(model, vision=settings.model.vision_tuning, text=settings.model.text_tuning)
    logger.info(str(report))
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    if settings.compile:
        model.compile()

    # Optimizer and schedule.
    optimization = settings.optimization
    checkpoints = Checkpoints(accelerator, model, output / "checkpoint", settings)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, optimization))

    def choose_epoch(epoch: int) -> None:
        examples.set_epoch(epoch)
        loader.set_epoch(epoch)
        if shapes is not None:  # Accelerate does not reach it
            shapes.set_epoch(epoch)

    total_steps = 0
    for epoch in range(optimization.epochs):
        choose_epoch(epoch)  # the number of batches of one shape differs between epochs
        total_steps += math.ceil(len(loader) / optimization.gradient_accumulation_steps)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(step / total_steps, optimization))
    accelerator.register_for_checkpointing(scheduler)

    # The checkpoint of a run that was stopped, or a new run.
    if checkpoints.exist():
        check_same_run(settings, load_settings(output / "settings.yaml"))
        progress = checkpoints.load()
        if accelerator.is_main_process:
            recover_folder(output / "model")
        logger.info(
            f"{checkpoints.folder} is there: going on after epoch {progress.epoch} of {optimization.epochs}, step {progress.step}"
        )
    else:
        clear_output(settings, accelerator)
        progress = Progress()
        set_seed(settings.seed, device_specific=True)  # every process draws its own dropout and routing noise
        if accelerator.is_main_process:
            write_text(output / "settings.yaml", dump_settings(settings))
            write_json(output / "tuning.json", vars(report) | {"tower_share": report.tower_share})
    losses = LossLog(accelerator, output / "losses.jsonl", settings, partial(name_row, train_rows))
    losses.go_on_after(progress.step)
    if settings.tracker != "none":
        # TensorBoard then hides what the stopped run wrote after its last checkpoint
        accelerator.init_trackers("sera", init_kwargs={"tensorboard": {"purge_step": progress.step + 1}})

    with tqdm(total=total_steps, initial=progress.step, desc="training", unit="step") as bar:

        def write_losses() -> None:
            for record in losses.write(progress):
                accelerator.log(flat({"train": record}), step=record["step"])
                bar.set_postfix(loss=f"{record['loss']:.3f}", epoch=record["epoch"])

        for epoch in range(progress.epoch, optimization.epochs):
            choose_epoch(epoch)
            model.train()
            batches = loader
            if progress.batch and settings.data.streaming:
                examples.start_at(epoch, progress.batch)
            elif progress.batch:
                batches = accelerator.skip_first_batches(loader, progress.batch)
            for step in batches_of_steps(batches, optimization.gradient_accumulation_steps):
                step_losses = accumulate_gradients(model, [inputs for inputs, _ in step], accelerator)
                # without a limit this only measures the norm
                norm = accelerator.clip_grad_norm_(model.parameters(), optimization.max_grad_norm or math.inf)
                optimizer.step()
                optimizer.zero_grad()
                progress.batch += len(step)
                progress.step += 1
                losses.add(
                    {"step": progress.step, "epoch": epoch + 1, "learning_rate": scheduler.get_last_lr()[0]},
                    step_losses,
                    norm,
                    [
                        (number, text)
                        for _, drawn in step
                        for example in drawn
                        for (number, _), text in zip(example.sources, example.text, strict=True)
                    ],
                )
                scheduler.step()
                bar.update()
                is_due = settings.checkpoint_every and progress.step % settings.checkpoint_every == 0
                is_due = is_due and progress.batch < len(loader)  # the end of the epoch has its own checkpoint
                if is_due or progress.step % settings.log_every == 0:
                    write_losses()
                if is_due:
                    checkpoints.save(progress)
            write_losses()
            record = progress.end_epoch()

            if (epoch + 1) % settings.evaluate_every == 0 or epoch + 1 == optimization.epochs:
                unwrapped = accelerator.unwrap_model(model)
                if accelerator.num_processes > 1:
                    # the running statistics of batch norms differ where they cannot be synchronised
                    for buffer in unwrapped.buffers():
                        torch.distributed.broadcast(buffer, src=0)
                health, logits = RoutingHealth(unwrapped), FiniteLogits(unwrapped)
                uncompiled = torch.compiler.set_stance("force_eager") if settings.compile else nullcontext()
                with health.watch(), logits.watch(), uncompiled:
                    scores = score_sentences(
                        unwrapped, processor, val_rows, accelerator, num_workers=settings.num_workers
                    )
                logits.check(accelerator, settings, progress)
                record["val"] = summarize(scores)["all"]
                record["routing"] = health.summary(accelerator)
                for warning in routing_warnings(record["routing"]):
                    logger.warning(warning)
                accelerator.log(flat({name: record[name] for name in ("val", "routing")}), step=progress.step)
                if record["val"]["mIoU"] > progress.best_miou:
                    progress.best_miou = record["val"]["mIoU"]
                    if accelerator.is_main_process:
                        save_model(unwrapped, processor, output / "model", getattr(torch, settings.stored_weights))
                logger.info(f"epoch {epoch + 1}: loss {record['loss']:.4f}, val mIoU {record['val']['mIoU']:.4f}")

            progress.history.append(record)
            if accelerator.is_main_process:
                write_json(output / "history.json", progress.history)
            checkpoints.save(progress)
    logger.info(f"best val mIoU {progress.best_miou:.4f}; the model is in {output / 'model'}")


@contextmanager
def alone_in(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep every other run out of a folder. The main process holds the lock, for all processes of the run.

    Raises:
        OSError: In every process, where another run is at work in the folder or it cannot be written.
    """
    with ExitStack() as lock:
        refusal = [None]
        if accelerator.is_main_process:
            try:
                lock.enter_context(locked_folder(folder, "choose another output_dir, or wait until it has ended"))
            except OSError as error:
                refusal = [str(error)]
        if broadcast_object_list(refusal)[0]:
            raise OSError(refusal[0])
        yield


def end(accelerator: Accelerator) -> None:
    """End the trackers and the group of processes.

    The wrapper that averages gradients must be gone before. If it is the last to hold the group, it waits for a thread of gloo
    while it holds the interpreter's lock, and that thread may wait for this lock.
    """
    accelerator.free_memory()
    accelerator.end_training()


def name_row(rows: datasets.Dataset | datasets.IterableDataset, number: int) -> str:
    """The name of a training row in a message.

    Args:
        rows: The training rows.
        number: The place of the row; in a stream the id of its ref; -1 for a copy-paste image.
    """
    if number < 0:
        return "a copy-paste image"
    if isinstance(rows, datasets.IterableDataset):
        return f"ref {number}"
    row = rows.select_columns(["image_id", "ref_id"])[number]
    return f"row {number} (image {row['image_id']}, ref {row['ref_id']})"


def start_accelerator(settings: TrainingSettings) -> Accelerator:
    """Processes, devices, precision and tracker of the training.

    Raises:
        ValueError: Where the tracker is not installed, or the launcher's processes cannot be used.
    """
    tracker = None if settings.tracker == "none" else settings.tracker
    if tracker and tracker not in map(str, get_available_trackers()):
        raise ValueError(f"tracker is {tracker!r}, but the package {tracker} is not installed.")
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=settings.seed),
        step_scheduler_with_optimizer=False,
        log_with=tracker,
        project_config=ProjectConfiguration(settings.output_dir, logging_dir=str(Path(settings.output_dir, "logs"))),
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"The launcher started {launched} processes, but each of them sees {accelerator.num_processes}. Without GPUs, set "
            "ACCELERATE_USE_CPU=true in the environment."
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"The launcher asks for {accelerator.distributed_type.value}, but every process needs the whole model. Choose data "
            "parallelism."
        )
    return accelerator


def learning_rate_factor(done: float, optimization: OptimizationSettings) -> float:
    """Factor on the learning rate, in [0, 1], when the share `done` of training, in [0, 1], is done."""
    if done < optimization.warmup:
        return max(done / optimization.warmup, 1e-3)
    if optimization.schedule == "multistep":
        return 0.1 ** sum(done >= milestone for milestone in optimization.milestones)
    return 0.5 * (1 + math.cos(math.pi * min((done - optimization.warmup) / max(1 - optimization.warmup, 1e-9), 1.0)))


def flat(tree: dict) -> dict[str, float]:
    """The numbers of nested dicts, with names such as "val/mIoU" and "val/Pr_at_0.5". MLflow takes no "@" in a name."""
    leaves = {}
    for key, value in tree.items():
        name = key.replace("@", "_at_")
        leaves |= {f"{name}/{k}": v for k, v in flat(value).items()} if isinstance(value, dict) else {name: value}
    return leaves


def message(error: Exception) -> str | None:
    """One sentence about an error; `None` where the code is at fault, not the input."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU's memory is too small ({text.splitlines()[0]}). Lower optimization.batch_size and raise "
            "optimization.gradient_accumulation_steps by the same factor, or set activation_checkpointing."
        )
    if isinstance(error, (ConnectionError, EOFError)) or text.startswith("DataLoader worker"):
        return f"a process was lost that prepares batches ({text or 'no answer'}). The same command goes on from the checkpoint."
    return describe_error(error)


if __name__ == "__main__":
    run_command(main, message, also=(EOFError, FloatingPointError, RuntimeError))
