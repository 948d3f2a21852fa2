"""Every expert, router and auxiliary loss against its equation, recomputed in numpy."""

import numpy as np
import pytest
import torch
from conftest import make_model
from reference import conv2d, layer_norm, softmax

from modeling_sera import SeraConfig
from modeling_sera.layers_sera import SeraSampleNorm
from modeling_sera.routing_sera import SeraRouting, SeraTopKRouter, router_auxiliary_loss


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def batch_norm(x: np.ndarray, norm: torch.nn.BatchNorm2d) -> np.ndarray:
    shape = (1, -1, 1, 1)
    mean, var = array(norm.running_mean).reshape(shape), array(norm.running_var).reshape(shape)
    normed = (x - mean) / np.sqrt(var + norm.eps)
    return normed * array(norm.weight).reshape(shape) + array(norm.bias).reshape(shape)


def standardized(x: np.ndarray, norm: SeraSampleNorm) -> np.ndarray:
    """What a norm over samples gives in inference."""
    return (x - array(norm.running_mean)) / np.sqrt(array(norm.running_var) + norm.EPSILON)


def agree(module: torch.nn.Module, grid: torch.Tensor, expected: np.ndarray) -> None:
    with torch.no_grad():
        assert np.abs(array(module(grid)) - expected).max() < 1e-4


@pytest.fixture
def adapter(model):
    return model.model.vision.adapted_blocks["1"].adapter


@pytest.fixture
def fusion(model):
    return model.model.fusions[0]


@pytest.fixture
def grid():
    return torch.randn(2, 16, 5, 7, generator=torch.Generator().manual_seed(0))


def test_multi_scale_convolution(adapter, grid):
    x, enrich = array(grid), adapter.enrich
    branches = [conv2d(x, array(c.weight), array(c.bias)) for c in (enrich.conv1, enrich.conv3, enrich.conv5)]
    assert [b.shape[1] for b in branches] == [8, 4, 4]
    rich = x + np.concatenate(branches, axis=1)
    centred = rich - rich.mean(axis=1, keepdims=True)
    agree(enrich, grid, centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5))


def test_adapter_spatial_expert(adapter, grid):
    x, expert = array(grid), adapter.spatial_expert
    conv, norm, _ = expert.unit
    expected = np.maximum(batch_norm(conv2d(x, array(conv.weight), groups=16), norm), 0) + 0.3 * x
    agree(expert, grid, expected)


def test_adapter_boundary_expert(adapter, grid):
    x, expert = array(grid), adapter.boundary_expert
    expected = np.maximum(batch_norm(x + 0.1 * conv2d(x, array(expert.conv.weight), groups=16), expert.norm), 0)
    agree(expert, grid, expected)


def test_adapter_router_is_a_softmax_of_the_pooled_map_and_the_sentence(adapter, grid):
    router, sentence = adapter.router, torch.randn(3, 24)
    pooled = standardized(array(grid).mean(axis=(2, 3)), router.norm)
    scores = pooled @ array(router.score.weight).T + array(router.score.bias)
    scores = scores[[1, 0, 1]] + array(sentence) @ array(router.score_sentence.weight).T
    with torch.no_grad():
        weights = router(grid, sentence, torch.tensor([1, 0, 1]))
    assert np.abs(array(weights) - softmax(scores)).max() < 1e-5
    image_alone = make_model(expression_aware_routing=False).model.vision.adapted_blocks["1"].adapter.router
    pooled = standardized(array(grid).mean(axis=(2, 3)), image_alone.norm)
    agree(image_alone, grid, softmax(pooled @ array(image_alone.score.weight).T + array(image_alone.score.bias)))


def test_adapter_corrects_the_map_as_the_equation_says(adapter):
    """G_corr, read as what the attention to the text is added to, with that attention silenced."""
    with torch.no_grad():
        adapter.text_attention.o_proj.weight.zero_()
        adapter.text_attention.o_proj.bias.zero_()
        patches = torch.randn(2, 35, 32)
        sentence = torch.randn(2, 24)
        rich = adapter.enrich(adapter.down_proj(patches).transpose(1, 2).reshape(2, 16, 5, 7))
        weights = adapter.router(rich, sentence)
        spatial, boundary = array(adapter.spatial_expert(rich)), array(adapter.boundary_expert(rich))
        got, routed = adapter(
            patches,
            grid_size=(5, 7),
            text_states=torch.randn(2, 3, 32),
            text_mask=None,
            sentence=sentence,
        )
    w_s, w_b = (array(weights)[:, i].reshape(2, 1, 1, 1) for i in (0, 1))
    corrected = (array(rich) + 0.25 * w_s * spatial + 0.15 * w_b * boundary).reshape(2, 16, 35).transpose(0, 2, 1)
    expected = corrected @ array(adapter.up_proj.weight).T + array(adapter.up_proj.bias)
    assert np.abs(array(got) - expected).max() < 1e-4
    assert torch.equal(routed, weights)


def test_spatial_expert(fusion, grid):
    expert = fusion.experts["spatial"]
    y, x = np.meshgrid((np.arange(5) + 0.5) / 5 * 2 - 1, (np.arange(7) + 0.5) / 7 * 2 - 1, indexing="ij")
    weight, bias = array(expert.conv.weight)[:, :, 0, 0], array(expert.conv.bias)
    added = np.einsum("oc,chw->ohw", weight, np.stack([x, y])) + bias[:, None, None]
    assert float(expert.alpha.detach()) == 1.0
    with torch.no_grad():
        expert.alpha.fill_(0.7)
    agree(expert, grid, array(grid) + 0.7 * added)


def test_context_expert(fusion, grid):
    expert = fusion.experts["context"]
    tokens = array(grid).reshape(2, 16, 35).transpose(0, 2, 1)

    def linear(layer, x):
        return x @ array(layer.weight).T + array(layer.bias)

    def heads(x):
        return x.reshape(2, 35, 4, 4).transpose(0, 2, 1, 3)

    normed = layer_norm(tokens, array(expert.attention_norm.weight), array(expert.attention_norm.bias))
    attention = expert.attention
    q, k, v = (heads(linear(layer, normed)) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    mixed = softmax(q @ k.transpose(0, 1, 3, 2) / 2) @ v
    tokens = tokens + linear(attention.o_proj, mixed.transpose(0, 2, 1, 3).reshape(2, 35, 16))
    normed = layer_norm(tokens, array(expert.ffn_norm.weight), array(expert.ffn_norm.bias))
    hidden = torch.nn.functional.gelu(torch.tensor(linear(expert.ffn[0], normed))).numpy()
    tokens = tokens + linear(expert.ffn[2], hidden)
    agree(expert, grid, tokens.transpose(0, 2, 1).reshape(2, 16, 5, 7))


SOBEL_X = np.outer([1, 2, 1], [-1, 0, 1])


def filtered(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """One kernel on every channel, borders replicated."""
    radius = len(kernel) // 2
    padded = np.pad(x, ((0, 0), (0, 0), (radius, radius), (radius, radius)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape, axis=(2, 3))
    return np.einsum("bchwij,ij->bchw", windows, kernel)


def test_boundary_expert(fusion, grid):
    expert = fusion.experts["boundary"]
    x = array(grid)
    gx, gy = filtered(x, SOBEL_X), filtered(x, SOBEL_X.T)
    joined = np.concatenate([x, np.hypot(gx, gy), gx + gy], axis=1)
    conv, norm, _ = expert.mix
    agree(expert, grid, x + np.maximum(batch_norm(conv2d(joined, array(conv.weight)), norm), 0))


def test_boundary_expert_sees_no_edge_on_a_flat_map(fusion):
    for along in fusion.experts["boundary"].sobel(torch.full((1, 16, 4, 4), 3.0)):
        assert along.abs().max() < 1e-5


def test_shape_expert(fusion, grid):
    expert = fusion.experts["shape"]
    x = array(grid)
    low = filtered(x, np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256)
    high = filtered(x, np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]]) / 4)
    mixed = conv2d(np.concatenate([low, high], axis=1), array(expert.mix.weight), array(expert.mix.bias))
    agree(expert, grid, x + mixed)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("training", [False, True])
def test_router_weights_sum_to_one_and_keep_k(k, training):
    torch.manual_seed(0)
    router = SeraTopKRouter(SeraConfig.tiny(num_selected_experts=k)).train(training)
    routing = router(torch.randn(50, 16), torch.randn(50, 24))
    assert torch.allclose(routing.weights.sum(dim=1), torch.ones(50))
    assert ((routing.weights > 0).sum(dim=1) <= k).all()
    assert (routing.selected.sum(dim=1) == k).all()
    assert not (routing.weights[~routing.selected] > 0).any()


def test_router_equals_its_equation():
    torch.manual_seed(0)
    router = SeraTopKRouter(SeraConfig.tiny(num_selected_experts=2)).eval()
    router.norm.running_mean.normal_()
    router.norm.running_var.uniform_(0.5, 2.0)
    z, sentence, index = torch.randn(4, 16), torch.randn(9, 24), torch.tensor([0, 1, 1, 3, 2, 2, 2, 0, 1])
    hidden = standardized(array(z), router.norm) @ array(router.hidden.weight).T + array(router.hidden.bias)
    hidden = hidden[index.numpy()] + array(sentence) @ array(router.hidden_sentence.weight).T
    hidden = torch.nn.functional.gelu(torch.tensor(hidden)).numpy()
    logits = hidden @ array(router.score.weight).T + array(router.score.bias)
    expected = np.zeros_like(logits)
    for row, r in enumerate(logits):
        kept = np.argsort(r)[-2:]
        expected[row, kept] = softmax(r[kept])
    assert np.abs(array(router(z, sentence, index).weights) - expected).max() < 1e-5


def test_noise_moves_training_only():
    torch.manual_seed(0)
    router = SeraTopKRouter(SeraConfig.tiny(router_noise_std=0.5))
    seen = torch.randn(4, 16), torch.randn(4, 24)
    assert not torch.equal(router.train()(*seen).weights, router(*seen).weights)
    assert torch.equal(router.eval()(*seen).weights, router(*seen).weights)
    router.norm.is_kept = True  # or the samples would move what they are normalised by
    assert torch.equal(router.train()(*seen).logits, router.eval()(*seen).logits)


def test_fusion_is_the_weighted_sum_of_the_chosen_experts(fusion):
    tokens = torch.randn(3, 35, 32)
    with torch.no_grad():
        fused, routing = fusion(tokens, grid_size=(5, 7), sentence=torch.randn(3, 24))
        assert routing.weights.std(dim=0).min() > 0.01
        grid = fusion.norm(fusion.project(tokens)).transpose(1, 2).reshape(3, 16, 5, 7)
        outputs = np.stack([array(expert(grid)) for expert in fusion.experts.values()], axis=1)
    expected = np.einsum("ne,nechw->nchw", array(routing.weights), outputs)
    assert np.abs(array(fused) - expected).max() < 1e-4


def test_an_expert_that_nobody_chose_is_not_run_in_inference_and_is_in_training():
    model = make_model(num_selected_experts=1)
    fusion = model.model.fusions[0]
    with torch.no_grad():
        fusion.router.score.weight.zero_()
        fusion.router.score.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    ran = []
    for name, expert in fusion.experts.items():
        expert.register_forward_hook(lambda *_, name=name: ran.append(name))
    arguments = {"grid_size": (2, 2), "sentence": torch.randn(2, 24)}
    fusion(torch.randn(2, 4, 32), **arguments)
    assert ran == ["boundary"]
    ran.clear()
    fusion.train()(torch.randn(2, 4, 32), **arguments)
    assert sorted(ran) == ["boundary", "context", "shape", "spatial"]


def random_routing(k: int) -> SeraRouting:
    rng = np.random.default_rng(k)
    logits = rng.normal(size=(11, 4))
    weights, selected = np.zeros((11, 4)), np.zeros((11, 4), dtype=bool)
    for row in range(11):
        kept = rng.permutation(4)[:k]
        weights[row, kept] = rng.dirichlet(np.ones(k))
        selected[row, kept] = True
    return SeraRouting(torch.tensor(weights), torch.tensor(logits), torch.tensor(selected))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_auxiliary_losses_equal_a_numpy_computation(k):
    routing = random_routing(k)
    weights, logits, selected = (field.numpy() for field in routing[:3])

    def loss(z, b, t, bound=0.0):
        weights = {"logit_weight": z, "balance_weight": b, "token_weight": t}
        return float(router_auxiliary_loss(routing, logit_bound=bound, **weights))

    assert loss(2, 0, 0) == pytest.approx(2 * (logits**2).mean())
    assert loss(2, 0, 0, bound=0.5) == pytest.approx(2 * (np.maximum(np.abs(logits) - 0.5, 0) ** 2).mean())
    usage = weights.mean(axis=0)
    assert loss(0, 3, 0) == pytest.approx(3 * (np.std(usage) / np.mean(usage)) ** 2)
    f, p = selected.mean(axis=0), softmax(logits).mean(axis=0)
    assert loss(0, 0, 5) == pytest.approx(5 * 4 * np.sum(f * p))
    assert loss(2, 3, 5) == pytest.approx(loss(2, 0, 0) + loss(0, 3, 0) + loss(0, 0, 5))


def test_balance_loss_is_least_when_experts_are_used_alike():
    even = SeraRouting(torch.full((8, 4), 0.25), torch.zeros(8, 4), torch.ones(8, 4, dtype=torch.bool))
    arguments = {"logit_weight": 0.0, "logit_bound": 0.0, "balance_weight": 1.0, "token_weight": 0.0}
    assert float(router_auxiliary_loss(even, **arguments)) == 0.0
    assert float(router_auxiliary_loss(random_routing(1), **arguments)) > 0


def test_projector_convolves_each_image_with_its_own_kernel(model):
    rng = np.random.default_rng(0)
    grid, kernel = rng.normal(size=(2, 3, 5, 6)), rng.normal(size=(2, 9, 3))
    got = model.decoder.projector._convolve(torch.tensor(grid), torch.tensor(kernel)).numpy()
    for row in range(2):
        weight = kernel[row].T.reshape(1, 3, 3, 3)[..., ::-1, ::-1]  # convolution: correlation, kernel turned round
        assert np.abs(got[row] - conv2d(grid[row : row + 1], weight)[0, 0]).max() < 1e-12
