"""Routing as a whole: what the sentence reaches, what the losses count, what a fresh model and a gate do, what it costs."""

import pytest
import torch
from conftest import REPOSITORY, make_inputs, make_model

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from modeling_sera.layers_sera import SeraSampleStatistics
from modeling_sera.routing_sera import SeraRouting, mean_router_loss

GATES = ("none", "linear", "standardized")


def fresh_model(**overrides) -> SeraForReferringSegmentation:
    torch.manual_seed(0)
    return SeraForReferringSegmentation(SeraConfig.tiny(**overrides)).eval()


def test_expressions_about_one_image_are_routed_differently_by_default():
    outputs = make_model()(**make_inputs(2, [0, 0, 1]), output_router_weights=True)
    for weights in (*outputs.adapter_router_weights, *outputs.fusion_router_weights):
        assert (weights[0] - weights[1]).abs().max() > 1e-3


def test_routers_of_the_image_alone_see_the_expression_only_in_what_adapters_changed():
    model = make_model(expression_aware_routing=False, adapter_layers=[1, 3], tap_layers=[1, 4])
    outputs = model(**make_inputs(1, [0, 0]), output_router_weights=True)
    before, after = ([outputs.adapter_router_weights[i], outputs.fusion_router_weights[i]] for i in (0, 1))
    assert all(torch.equal(*weights) for weights in before)
    assert all((weights[0] - weights[1]).abs().max() > 1e-4 for weights in after)


def test_a_fresh_model_weighs_all_experts_alike():
    outputs = fresh_model()(**make_inputs(3), output_router_weights=True)
    for weights in (*outputs.adapter_router_weights, *outputs.fusion_router_weights):
        assert (weights == 1 / weights.shape[1]).all()


# Gates


def test_each_kind_of_gate_has_the_parameters_it_needs():
    added = {}
    for kind in GATES:
        names = set(make_model(sentence_gate=kind).state_dict())
        added[kind] = names - set(make_model(sentence_gate="none").state_dict())
    parameters = {f"decoder.merge.gates.{i}.{name}" for i in range(3) for name in ("weight", "bias")}
    buffers = {f"decoder.merge.sentence_norm.{name}" for name in SeraSampleStatistics(1).state_dict()}
    assert added == {"none": set(), "linear": parameters, "standardized": parameters | buffers}
    with pytest.raises(Exception, match=r"sentence_gate.*'standardized'.*'linear'.*'none'"):
        SeraConfig.tiny(sentence_gate="sigmoid")


def test_a_fresh_standardized_gate_lets_everything_through_and_learns():
    gated, plain = (
        fresh_model(sentence_gate=kind, decoder_dropout=0.0, router_noise_std=0.0) for kind in ("standardized", "none")
    )
    weights = gated.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    inputs = make_inputs(2, [0, 0, 1])
    with torch.no_grad():
        assert torch.equal(gated(**inputs).logits, plain(**inputs).logits)
        assert torch.equal(gated.train()(**inputs).logits, plain.train()(**inputs).logits)
    gated(**inputs, labels=torch.rand(3, 56, 56)).loss.backward()
    assert all(gate.weight.grad.abs().max() > 0 for gate in gated.decoder.merge.gates)


@pytest.mark.parametrize("kind", GATES)
def test_a_model_with_any_gate_is_saved_and_loaded(kind, tmp_path):
    model, inputs = make_model(sentence_gate=kind), make_inputs(2, [0, 1, 1])
    model.save_pretrained(tmp_path)
    loaded, info = SeraForReferringSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and loaded.config.sentence_gate == kind
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)


# Statistics


def statistics_of(model: SeraForReferringSegmentation) -> dict[str, SeraSampleStatistics]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SeraSampleStatistics)}


def test_every_training_step_counts_images_where_images_are_the_samples_and_expressions_elsewhere():
    model = fresh_model(adapter_layers=[1, 3], tap_layers=[1, 4], sentence_gate="standardized").train()
    model(**make_inputs(2, [0, 0, 1, 1, 1]))
    model(**make_inputs(1))
    counts = {name: int(found.num_samples) for name, found in statistics_of(model).items()}
    assert counts == {
        "model.sentence_norm": 6,
        "model.vision.adapted_blocks.1.adapter.router.norm": 3,
        "model.vision.adapted_blocks.3.adapter.router.norm": 3,
        "model.fusions.0.router.norm": 3,
        "model.fusions.0.router.usage": 6,
        "model.fusions.1.router.norm": 3,
        "model.fusions.1.router.usage": 6,
        "decoder.merge.sentence_norm": 6,
    }


def test_inference_leaves_the_statistics_alone():
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(**make_inputs(9))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_keeps_its_statistics(dtype, tmp_path):
    model = make_model()
    expected = {name: found.running_mean.clone() for name, found in statistics_of(model).items()}
    model.save_pretrained(tmp_path)
    loaded = SeraForReferringSegmentation.from_pretrained(tmp_path, dtype=dtype).eval()
    for half in (model.to(dtype), loaded):
        for name, found in statistics_of(half).items():
            assert found.running_mean.dtype == torch.float32 and torch.equal(found.running_mean, expected[name])
    inputs = make_inputs(2)
    exact = make_model()(**inputs, output_router_weights=True)
    rough = loaded(**inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}, output_router_weights=True)
    for a, b in zip(rough.fusion_router_weights, exact.fusion_router_weights, strict=True):
        assert (a - b).abs().max() < 0.1


# Auxiliary losses


def test_an_image_counts_once_however_many_expressions_are_about_it():
    """Where the routing is of the image alone; and every expression counts where it sees the sentence."""
    for aware, rows in ((False, [2, 5]), (True, [5, 5])):
        model = make_model(expression_aware_routing=aware, adapter_layers=[3], tap_layers=[1, 4])
        model.train()
        inputs = make_inputs(2, [0, 0, 0, 0, 1])
        encoded = model.model(**inputs)
        assert [len(routing.weights) for routing in encoded.decided_routings] == rows
        assert [len(routing.weights) for routing in encoded.fusion_routings] == [5, 5]
        if not aware:
            image = encoded.decided_routings[0]
            assert torch.equal(encoded.fusion_routings[0].weights, image.weights[inputs["image_index"]])
            assert torch.allclose(image.usage[0], image.weights.mean(dim=0), atol=1e-6)


def test_specialised_samples_cost_nothing_as_long_as_all_experts_are_used():
    """One sample in a step, each all for one expert, in turns: the balance is that of many steps."""
    model = fresh_model(router_noise_std=0.0)
    router = model.model.fusions[0].router.train()
    with torch.no_grad():
        router.hidden_sentence.weight.zero_()
        router.score.weight.copy_(3 * torch.eye(4, 8))
    directions = torch.linalg.lstsq(router.hidden.weight, 40 * torch.eye(8)).solution.T[
        :4
    ]  # each wakes one hidden unit
    router.norm.is_kept = True
    losses = []
    for step in range(200):
        routing = router(directions[step % 4][None], torch.zeros(1, 24))
        assert routing.weights.max() > 0.99
        losses.append(mean_router_loss([routing], SeraConfig.tiny(router_logit_loss_weight=0.0)).item())
    assert losses[0] == pytest.approx(1e-2 * 3, rel=0.05)  # all that was seen so far went to one of four
    assert max(losses[-20:]) < 1e-2 * 0.02


def test_the_balance_of_a_step_has_a_gradient_towards_what_is_used_too_little():
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1]], requires_grad=True)
    router = fresh_model().model.fusions[0].router.train()
    for _ in range(100):
        router._count(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.ones(1, 4, dtype=torch.bool))
    usage = router._count(weights, torch.ones(1, 4, dtype=torch.bool))
    routing = SeraRouting(weights, torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), usage)
    mean_router_loss([routing], SeraConfig.tiny()).backward()
    assert weights.grad[0].diff().min() > 0  # the first expert, which this step uses most, is lifted most


@pytest.mark.parametrize("k", [2, 4])
def test_the_token_term_stands_where_experts_are_left_out_alone(k):
    routing = SeraRouting(torch.full((3, 4), 0.25), torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool))
    losses = [
        float(mean_router_loss([routing], SeraConfig.tiny(num_selected_experts=k, router_token_loss_weight=weight)))
        for weight in (0.0, 1.0)
    ]
    assert (losses[0] != losses[1]) == (k < 4)


# Price


def test_routing_costs_sera_b_next_to_nothing(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from subjects import count_flops

    before = {1: 263_205_563_392, 2: 489_303_440_896}  # counted before routers saw the sentence
    for expressions, count in before.items():
        assert count_flops("sera", 1, expressions, False) <= 1.001 * count
    # a further expression about an image where adapters come late: without the blocks, and without the experts, before them
    first, second = (count_flops("late", 1, n, False) for n in (1, 2))
    assert second - first < 0.3 * first
