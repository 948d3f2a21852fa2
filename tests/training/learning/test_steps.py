"""The gradients of a step: every expression weighs the same, in whatever batch of whatever process it stands."""

import pytest
import torch
from accelerate import Accelerator
from weighing import (
    assert_same_gradients,
    expected_gradients,
    gradients_of,
    gradients_of_trainer,
    resting_model,
    uneven_batches,
)

from training.learning.steps import accumulate_gradients, batches_of_steps


@pytest.mark.parametrize("numbers", [(1, 4, 2), (3, 3), (5,)])
def test_a_step_of_several_batches_has_the_gradients_of_one_large_batch(numbers):
    expected, loss = expected_gradients(uneven_batches(numbers))
    model = resting_model()
    losses = accumulate_gradients(model, uneven_batches(numbers), Accelerator(cpu=True))
    assert_same_gradients(gradients_of(model), expected)
    torch.testing.assert_close(losses, torch.stack([loss, torch.zeros(())]))


def test_transformers_trainer_accumulates_the_same_gradients(tmp_path):
    expected, _ = expected_gradients(uneven_batches())
    assert_same_gradients(gradients_of_trainer(resting_model(), uneven_batches(), tmp_path), expected)


def test_the_last_step_of_an_epoch_may_be_shorter():
    assert list(batches_of_steps(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batches_of_steps([], 2)) == []
