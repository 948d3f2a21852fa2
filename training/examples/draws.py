"""Which examples an epoch draws of a weighted mixture, so that every set has its share (ours)."""

from collections.abc import Sequence

import datasets
import numpy as np

# Rows of a weighted mixture have these columns beside those of REFER_FEATURES.
SET_COLUMN = "mixed_set"  # number of the row's set in the mixture
WEIGHT_COLUMN = "set_weight"  # weight of that set


class WeightedDraws:
    """The examples of each epoch, by their numbers.

    An epoch draws as many examples as there are. Every set has its share of them, after its weight. Within a set the examples come
    in a random order, each once, then all in another order and so on through the epochs. So all have their turn, whether a set has
    more or fewer examples than an epoch draws of it. The draws depend on (seed, epoch) alone.
    """

    def __init__(self, sets: Sequence[int], weights: dict[int, float], seed: int):
        """
        Args:
            sets: The set of each example.
            weights: The weight of each set.
            seed: Of the random orders.

        Raises:
            ValueError: Where a weight is so small that an epoch would draw nothing of its set.
        """
        self.seed = seed
        self.members = {number: np.flatnonzero(np.equal(sets, number)) for number in sorted(weights)}
        exact = len(sets) * np.array([weights[number] for number in self.members]) / sum(weights.values())
        counts = np.floor(exact).astype(int)
        counts[np.argsort(counts - exact, kind="stable")[: len(sets) - counts.sum()]] += 1  # the largest remainders
        self.counts = dict(zip(self.members, counts.tolist(), strict=True))
        for number, count in self.counts.items():
            if not count:
                raise ValueError(
                    f"data.mix: the weight {weights[number]:g} of set {number} gives it no draw in an epoch of {len(sets)}; raise "
                    "it, or leave the set out."
                )

    def epoch(self, epoch: int) -> np.ndarray:
        """The numbers of an epoch's examples, set by set."""
        drawn = []
        for number, members in self.members.items():
            count = self.counts[number]
            rounds, places = np.divmod(np.arange(epoch * count, (epoch + 1) * count), len(members))
            for turn in np.unique(rounds):
                order = np.random.default_rng((self.seed, number, int(turn))).permutation(members)
                drawn.append(order[places[rounds == turn]])
        return np.concatenate(drawn)


def weighted_draws(rows: datasets.Dataset, groups: list[list[int]], seed: int) -> WeightedDraws | None:
    """The draws of examples made of these groups of rows; None where the rows are no weighted mixture."""
    if SET_COLUMN not in rows.column_names:
        return None
    sets, weights = rows[SET_COLUMN][:], rows[WEIGHT_COLUMN][:]
    return WeightedDraws([sets[group[0]] for group in groups], dict(zip(sets, weights, strict=True)), seed)
