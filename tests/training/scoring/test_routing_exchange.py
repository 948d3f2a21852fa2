"""The functional test of the routers: exchanged weights cost nothing where they are constant, and something where they decide."""

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from stand_ins import make_processor, make_rows, tiny_model

from training.evaluation import score_sentences
from training.examples.batches import image_as_annotated
from training.experts import route, scores_with_other_weights
from training.learning.routing_health import routers_of
from training.scoring.routing_exchange import EXCHANGES, asked_samples, other_samples
from training.sources.masks import encode_mask

PARTS = {"batch_size": 2, "max_expressions": 3}  # several batches, and several parts of each
FULL, LEFT = np.ones((64, 64), bool), np.repeat(np.arange(64)[None] < 32, 64, axis=0)


@pytest.mark.parametrize("images", [[0, 0, 1, 2, 2, 2], [5, 1, 5, 1], [0, 0, 0, 1], [3], list(range(9))])
def test_every_sample_gets_another_ones_weights_once(images):
    images = np.array(images)
    others = other_samples(images)
    assert sorted(others) == list(range(len(images)))
    assert len(images) == 1 or (others != np.arange(len(images))).all()
    if 2 * np.unique(images, return_counts=True)[1].max() <= len(images):
        assert (images[others] != images).all()
    assert np.array_equal(others, other_samples(images, seed=0))


def rows_of(num_scenes: int, num_sentences: int) -> datasets.Dataset:
    """Rows with their first sentences."""
    names = ("sentences", "sentence_kinds")
    return make_rows(num_scenes).map(lambda row: {name: row[name][:num_sentences] for name in names})


def shuffled_rows() -> datasets.Dataset:
    """Rows of three scenes; those of an image stand apart."""
    return rows_of(3, 2).shuffle(seed=1)


@pytest.mark.parametrize(
    "options",
    [{"num_selected_experts": 2}, {"expression_aware_routing": False}, {"routing": "uniform"}],
    ids=lambda options: next(iter(options)),
)
def test_with_its_own_weights_each_sample_has_its_own_score(options):
    model, processor, rows = tiny_model(**options), make_processor(), shuffled_rows()
    routed = route(model, processor, rows, **PARTS)
    with routed.exchange.give(routed.exchange.weights):
        again = score_sentences(model, processor, rows, Accelerator(), **PARTS)
    assert again == routed.scores
    fewer = {name: weights[:-1] for name, weights in routed.exchange.weights.items()}
    with pytest.raises(ValueError, match="the pass has more"), routed.exchange.give(fewer):
        score_sentences(model, processor, rows, Accelerator(), **PARTS)
    assert score_sentences(model, processor, rows, Accelerator(), **PARTS) == routed.scores  # no hook is left


@pytest.mark.parametrize("aware", [True, False])
def test_the_recorded_weights_are_those_that_the_model_returns(aware):
    model, processor, rows = tiny_model(expression_aware_routing=aware), make_processor(), shuffled_rows()
    routed = route(model, processor, rows, **PARTS)
    sources, _ = asked_samples(rows)
    assert [(score.row, score.sentence) for score in routed.scores] == sorted(sources) != sources
    for name, weights in routed.exchange.weights.items():
        assert len(weights) == (3 if name in routed.exchange.per_image else len(sources))
    first = model.model.vision.first_adapted
    early = {f"adapter {first}", *(f"tap {depth}" for depth in model.config.tap_layers if depth <= first)}
    assert routed.exchange.per_image == (set() if aware else early)
    for i, score in enumerate(routed.scores):
        row = rows[score.row]
        inputs = processor(
            images=[image_as_annotated(row)], text=[[row["sentences"][score.sentence]]], return_tensors="pt"
        )
        with torch.inference_mode():
            outputs = model(**inputs, output_router_weights=True)
        alone = [*outputs.fusion_router_weights, *outputs.adapter_router_weights]
        for found, one in zip(routed.weights.values(), alone, strict=True):
            assert np.abs(found[i] - one[0].numpy()).max() < 1e-4


def test_where_the_weights_are_constant_other_sentences_weights_cost_nothing():
    model, processor, rows = tiny_model(), make_processor(), rows_of(3, 1)
    for name, router in routers_of(model).items():
        logits = torch.linspace(0, 1, 4 if name.startswith("tap") else 2)
        with torch.no_grad():
            router.score.weight.zero_()
            router.score.bias.copy_(logits)
            if not name.startswith("tap"):
                router.score_sentence.weight.zero_()
    routed = route(model, processor, rows, **PARTS)
    found = scores_with_other_weights(model, processor, rows, routed, **PARTS)
    assert list(found) == list(EXCHANGES)
    assert found["weights of another sentence"]["mIoU"]["difference"] == 0
    assert found["mean weights"]["mIoU"]["difference"] == pytest.approx(0, abs=1e-3)


def test_where_the_weights_decide_the_mask_their_exchange_costs_what_it_must():
    """The mask is the whole image with the first expert's weight above 1/2, and its left half otherwise. So is the truth."""
    model, processor = tiny_model(), make_processor()
    rows = rows_of(4, 1)
    first = next(iter(routers_of(model)))
    values = route(model, processor, rows, **PARTS).weights[first][:, 0]
    border = float(np.median(values))

    def decide(module, args, result):
        chosen = (result.weights[:, 0] <= border).long()  # expert 0 or 1
        return result._replace(weights=torch.eye(4)[chosen])

    def draw(module, args, kwargs, outputs):
        is_left = outputs.fusion_router_weights[0][:, 0] <= 0.5
        logits = torch.full_like(outputs.logits, 9.0)
        logits[is_left, :, logits.shape[2] // 2 :] = -9.0
        outputs.logits = logits
        return outputs

    routers_of(model)[first].register_forward_hook(decide)
    model.register_forward_pre_hook(
        lambda m, args, inputs: (args, inputs | {"output_router_weights": True}), with_kwargs=True
    )
    model.register_forward_hook(draw, with_kwargs=True)
    is_full = values > border
    masks = [encode_mask(FULL if full else LEFT) for full in is_full]
    rows = rows.map(lambda row, i: {"mask": masks[i]}, with_indices=True)

    routed = route(model, processor, rows, **PARTS)
    assert all(score.iou == 1 for score in routed.scores) and 0.3 < is_full.mean() < 0.7
    found = scores_with_other_weights(model, processor, rows, routed, **PARTS)
    sources, images = asked_samples(rows)
    assert sources == sorted(sources)
    exchanged = is_full[other_samples(images)] != is_full
    given = is_full.mean() > 0.5  # what everyone has with mean weights
    cost = {"weights of another sentence": exchanged.mean(), "mean weights": (is_full != given).mean()}
    cost["equal weights"] = is_full.mean()
    assert all(share > 0 for share in cost.values())
    for kind, share in cost.items():
        low, high = found[kind]["mIoU"]["interval"]
        assert found[kind]["mIoU"]["difference"] == pytest.approx(-0.5 * share)
        assert low <= -0.5 * share <= high <= 0
