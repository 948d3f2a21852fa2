"""That routers learn: the right expert is found where it depends on the sentence alone, and where on the image alone."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from modeling_sera.routing_sera import mean_router_loss
from training.configuration import OptimizationSettings
from training.learning.optimizers import build_optimizer

GRID, WIDTH, SENTENCE = (3, 3), 32, 24
BATCH, STEPS, TESTED = 16, 200, 200
CAUSES = ("sentence", "image")


class Parts(nn.Module):
    """A tap's fusion and an adapter up to its attention to the text, side by side."""

    def __init__(self, **overrides):
        super().__init__()
        torch.manual_seed(0)
        self.config = SeraConfig.tiny(router_noise_std=0.1, **overrides)
        model = SeraForReferringSegmentation(self.config)
        self.fusion, self.norm = model.model.fusions[0], model.model.sentence_norm
        self.adapter = model.model.vision.adapted_blocks["1"].adapter

    def forward(self, tokens: Tensor, sentence: Tensor, choice: Tensor | None = None) -> dict[str, tuple]:
        """Per router the map that it leads to and its weights, which are one and zero where there is a choice (N,)."""
        sentence = sentence if self.norm is None else self.norm(sentence)
        found = {}
        for name, router in (("fusion", self.fusion.router), ("adapter", self.adapter.router)):

            def choose(module: nn.Module, args: tuple, decided: object, count: int = {"fusion": 4, "adapter": 2}[name]):
                weights = nn.functional.one_hot(choice % count, count).float()
                return weights if count == 2 else decided._replace(weights=weights)

            handle = None if choice is None else router.register_forward_hook(choose)
            if name == "fusion":
                fused, routing = self.fusion(tokens, grid_size=GRID, sentence=sentence)
                found[name] = fused, routing.weights, routing
            else:
                grid, *experts = self.adapter.look(tokens, GRID)
                weights = router(grid, sentence)
                corrected = sum(weights[:, i, None, None, None] * expert for i, expert in enumerate(experts))
                found[name] = grid + corrected, weights
            if handle is not None:
                handle.remove()
        return found


def draw(cause: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, sentences and which expert is right for each; one of both inputs says so, in a way of many."""
    directions = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1))  # the same in every step
    choice = torch.randint(4, (count,), generator=generator)
    hints = {name: choice if name == cause else torch.randint(4, (count,), generator=generator) for name in CAUSES}
    # pooled features of different samples have most in common, and so have sentences, whose features are large
    tokens = 2 + 0.5 * directions[0, hints["image"]][:, None] + torch.randn(count, 9, WIDTH, generator=generator)
    sentence = 4 + directions[1, hints["sentence"], :SENTENCE] + torch.randn(count, SENTENCE, generator=generator) / 2
    return tokens, sentence, choice


def right_choices(parts: Parts, cause: str) -> dict[str, float]:
    """Per router the share of new samples whose right expert has the greatest weight."""
    tokens, sentence, choice = draw(cause, TESTED, torch.Generator().manual_seed(99))
    with torch.no_grad():
        found = parts.eval()(tokens, sentence)
    return {
        name: (weights.argmax(dim=1) == choice % weights.shape[1]).float().mean().item()
        for name, (_, weights, *_) in found.items()
    }


def learn(cause: str, optimizer_name: str, **overrides) -> Parts:
    """Parts that have learnt, with all their parameters, to give what their start gives with the right expert alone."""
    parts = Parts(**overrides)
    teacher = deepcopy(parts).eval().requires_grad_(False)
    optimizer = build_optimizer(parts.train(), OptimizationSettings(optimizer=optimizer_name, learning_rate=3e-3))
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        tokens, sentence, choice = draw(cause, BATCH, generator)
        wanted, found = teacher(tokens, sentence, choice), parts(tokens, sentence)
        # the adapter's experts stand with factors of a quarter and less
        loss = sum(
            weight * (found[name][0] - wanted[name][0]).square().mean()
            for name, weight in (("fusion", 1), ("adapter", 30))
        )
        loss = loss + mean_router_loss([found["fusion"][2]], parts.config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return parts


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("cause", CAUSES)
def test_routers_find_the_right_expert(cause, optimizer):
    found = right_choices(learn(cause, optimizer), cause)
    assert set(found) == {"fusion", "adapter"} and min(found.values()) > 0.9, found


def test_routers_of_the_image_alone_find_what_the_image_says_and_not_what_the_sentence_says():
    found = {cause: right_choices(learn(cause, "adamw", expression_aware_routing=False), cause) for cause in CAUSES}
    assert min(found["image"].values()) > 0.9, found
    assert found["sentence"]["fusion"] < 0.5 and found["sentence"]["adapter"] < 0.7, found


def test_a_fresh_router_prefers_no_expert():
    tokens, sentence, _ = draw("image", 20, torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = Parts().eval()(tokens, sentence)
    assert all((weights == 1 / weights.shape[1]).all() for _, weights, *_ in found.values())
