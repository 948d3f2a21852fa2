"""Steps of several batches, and the gradients that they should have."""

from collections.abc import Sequence
from pathlib import Path

import torch
from conftest import make_inputs, make_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.layers_sera import SeraSampleStatistics
from training.learning.tuning import apply_tuning

Inputs = dict[str, torch.Tensor]

# what depends on the other members of a batch is at rest
AT_REST = {"router_logit_loss_weight": 0.0, "router_balance_loss_weight": 0.0, "router_token_loss_weight": 0.0}
AT_REST |= {"router_noise_std": 0.0, "decoder_dropout": 0.0, "predict_presence": True}


def resting_model() -> SeraForReferringSegmentation:
    """A model in training mode whose norms over samples keep their running statistics."""
    model = make_model(**AT_REST).train()
    apply_tuning(model, vision="full", text="full")  # what nothing reads would stall several processes
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, SeraSampleStatistics)):
            module.eval()
            module.train = lambda mode=True, module=module: module
    return model


def uneven_batches(numbers: Sequence[int] = (1, 4, 2)) -> list[Inputs]:
    """Batches of one image each with so many expressions; some pixels are left out of the loss."""
    batches = []
    for seed, number in enumerate(numbers):
        inputs = make_inputs(1, [0] * number)
        generator = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = torch.randn(1, 3, 56, 56, generator=generator)
        labels = (torch.rand(number, 56, 56, generator=generator) > 0.6).float()
        labels[0, :, : 20 * seed] = -1
        batches.append(inputs | {"labels": labels})
    return batches


def one_batch(batches: Sequence[Inputs]) -> Inputs:
    """The same as one batch."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    whole["image_index"] = torch.cat([torch.full_like(batch["image_index"], i) for i, batch in enumerate(batches)])
    return whole


def gradients_of(model: torch.nn.Module) -> Inputs:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def expected_gradients(batches: Sequence[Inputs]) -> tuple[Inputs, torch.Tensor]:
    model = resting_model()
    outputs = model(**one_batch(batches))
    outputs.loss.backward()
    return gradients_of(model), outputs.loss.detach()


def assert_same_gradients(found: Inputs, expected: Inputs) -> None:
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale.item(), msg=name)


class Keep(TrainerCallback):
    """Keeps the gradients of a step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.gradients = {name: gradient.clone() for name, gradient in gradients_of(model).items()}


def gradients_of_trainer(
    model: SeraForReferringSegmentation, batches: Sequence[Inputs], folder: Path, processes: int = 1
) -> Inputs:
    """Those of transformers' Trainer, which makes one step of all batches in as many processes as there are."""
    keep = Keep()
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(batches) // processes,
        max_steps=1,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, lambda items: items[0], list(batches), callbacks=[keep]).train()
    return {name.removeprefix("module."): gradient for name, gradient in keep.gradients.items()}
