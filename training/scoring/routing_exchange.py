"""What the routers' decisions are worth: the same pass over a split with the routing weights of other samples (ours).

A router whose weights vary is not yet a router that matters. It matters if the answers get worse with weights that were decided for
another sentence, or with the same weights for all.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from modeling_sera import SeraForReferringSegmentation
from modeling_sera.routing_sera import SeraRouting
from training.examples.batches import group_by_image
from training.learning.routing_health import routers_of

EXCHANGES = ("weights of another sentence", "mean weights", "equal weights")


def asked_samples(rows: datasets.Dataset) -> tuple[list[tuple[int, int]], np.ndarray]:
    """The (row, sentence) of all N expressions of a split in the order of an evaluation, and the number of each one's image, (N,).

    Images are numbered in the order in which an evaluation meets them.
    """
    groups, sentences = group_by_image(rows, None), rows["sentences"][:]
    sources = [(row, i) for group in groups for row in group for i in range(len(sentences[row]))]
    image_of_row = {row: image for image, group in enumerate(groups) for row in group}
    return sources, np.array([image_of_row[row] for row, _ in sources])


def other_samples(images: Sequence[int] | np.ndarray, seed: int = 0) -> np.ndarray:
    """For each of N samples the number of another one, (N,): of another image, unless one image has more than half of all samples.

    Samples are moved by one rotation of a random order of the images, so each is used exactly once.

    Args:
        images: (N,) the image of each sample, any integers.
        seed: Seed of the order.
    """
    _, image = np.unique(np.asarray(images), return_inverse=True)
    rank = np.random.default_rng(seed).permutation(image.max() + 1)
    places = np.argsort(rank[image], kind="stable")
    shift = min(np.bincount(image).max(), len(places) - 1)  # past every sample of the own image
    others = np.empty_like(places)
    others[places] = np.roll(places, -shift)
    return others


class RoutingExchange:
    """Records the weights that routers decide in one pass over a split, and gives the routers other weights in the same pass.

    The pass must meet the same samples in the same order, in inference. A sample of a router is an image where the router's input
    does not depend on the text, and an expression elsewhere.

    Attributes:
        weights: By the names of `routers_of` the weights of a router's M samples, (M, experts), in the order of the pass.
        per_image: The routers whose samples are images.
    """

    def __init__(self, model: SeraForReferringSegmentation):
        """
        Args:
            model: The model whose routers are recorded.
        """
        self.model = model
        self.routers = routers_of(model)
        first = model.model.vision.first_adapted
        self.per_image = {
            name
            for name, router in self.routers.items()
            if not router.sees_sentence
            and (int(name.split()[1]) <= first if name.startswith("tap") else int(name.split()[1]) == first)
        }
        self.weights: dict[str, Tensor] = {}

    @contextmanager
    def record(self) -> Iterator[None]:
        """Keep every weight of one pass in `weights`."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.routers}

        def keep(name: str, place: int, decision: SeraRouting | Tensor) -> None:
            if place == sum(map(len, found[name])):  # else: a further part of the expressions about the same images
                found[name].append(_weights_of(decision).float().cpu())

        with self._listen(keep):
            yield
        self.weights = {name: torch.cat(parts) for name, parts in found.items() if parts}

    @contextmanager
    def give(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Let the routers decide `weights`, of the form of the recorded ones, in one pass.

        Raises:
            ValueError: The pass has more samples than there are weights.
        """

        def replace(name: str, place: int, decision: SeraRouting | Tensor) -> SeraRouting | Tensor:
            decided = _weights_of(decision)
            given = weights[name][place : place + len(decided)].to(decided)
            if len(given) < len(decided):
                raise ValueError(
                    f"There are routing weights of {len(weights[name])} samples for {name}, and the pass has more."
                )
            if isinstance(decision, SeraRouting):
                return decision._replace(weights=given, selected=given > 0)
            return given

        with self._listen(replace):
            yield

    @contextmanager
    def _listen(self, answer) -> Iterator[None]:
        """Call `answer(router, number of its first sample, decision)` at every decision; its result replaces the decision."""
        images = {"before": 0, "now": 0}
        expressions = dict.fromkeys(self.routers, 0)

        def begin(module: nn.Module, args: tuple, inputs: dict) -> None:
            images["before"] += images["now"]
            images["now"] = len(inputs["pixel_values"])

        def decide(name: str, decision: SeraRouting | Tensor) -> SeraRouting | Tensor | None:
            place = images["before"] if name in self.per_image else expressions[name]
            expressions[name] += len(_weights_of(decision))
            return answer(name, place, decision)

        with ExitStack() as stack:
            stack.enter_context(self.model.register_forward_pre_hook(begin, with_kwargs=True))
            for name, router in self.routers.items():
                hook = router.register_forward_hook(lambda module, args, decision, name=name: decide(name, decision))
                stack.enter_context(hook)
            yield

    def exchanged(self, images: np.ndarray, seed: int = 0) -> dict[str, dict[str, Tensor]]:
        """The recorded weights, exchanged in each way of EXCHANGES. They are for [`give`].

        Args:
            images: (N,) the image of each expression, see [`asked_samples`].
            seed: Decides which other sample's weights a sample gets.
        """
        others = {True: other_samples(np.unique(images), seed), False: other_samples(images, seed)}
        ways = (
            lambda name, weights: weights[torch.from_numpy(others[name in self.per_image])],
            lambda name, weights: weights.mean(dim=0, keepdim=True).expand_as(weights),
            lambda name, weights: torch.full_like(weights, 1 / weights.shape[1]),
        )
        return {
            kind: {name: way(name, weights) for name, weights in self.weights.items()}
            for kind, way in zip(EXCHANGES, ways, strict=True)
        }

    def by_expression(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The recorded weights of every router for each of the N expressions, (N, experts) in float64.

        Args:
            images: (N,) the image of each expression, see [`asked_samples`].
        """
        return {
            name: (weights[torch.from_numpy(images)] if name in self.per_image else weights).double().numpy()
            for name, weights in self.weights.items()
        }


def _weights_of(decision: SeraRouting | Tensor) -> Tensor:
    return decision.weights if isinstance(decision, SeraRouting) else decision


__all__ = ["EXCHANGES", "RoutingExchange", "asked_samples", "other_samples"]
