"""Batches of one shape: every example once, none mixed, another order in every epoch, the same for the same seed."""

import pytest
from accelerate.data_loader import BatchSamplerShard

from training.examples.shapes import ShapeBatches

SHAPES = [(2, 3), (3, 2), (2, 3), (2, 3), (3, 2), (2, 2), (2, 3), (2, 3)]


def test_batches_have_one_shape_and_hold_every_example_once():
    batches = ShapeBatches(lambda: SHAPES, 2, shuffle=True, seed=3)
    drawn = list(batches)
    assert len(drawn) == len(batches) == 5
    assert sorted(number for batch in drawn for number in batch) == list(range(len(SHAPES)))
    assert all(len({SHAPES[number] for number in batch}) == 1 and len(batch) <= 2 for batch in drawn)


def test_the_order_depends_on_seed_and_epoch_alone():
    batches, same = (ShapeBatches(lambda: SHAPES, 2, shuffle=True, seed=3) for _ in range(2))
    first = list(batches)
    assert list(batches) == first == list(same)
    batches.set_epoch(1)
    assert list(batches) != first
    assert list(ShapeBatches(lambda: SHAPES, 2, shuffle=False)) == [[0, 2], [3, 6], [7], [1, 4], [5]]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_share_the_batches_and_have_equally_many(size):
    whole = list(ShapeBatches(lambda: SHAPES, size, shuffle=True))
    shares = [
        list(
            BatchSamplerShard(ShapeBatches(lambda: SHAPES, size, shuffle=True), num_processes=2, process_index=process)
        )
        for process in range(2)
    ]
    assert len(shares[0]) == len(shares[1])
    given = [batch for pair in zip(*shares, strict=True) for batch in pair]
    assert given[: len(whole)] == whole and len(given) <= len(whole) + 1
