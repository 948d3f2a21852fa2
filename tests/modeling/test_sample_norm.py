"""The norm over samples: batch statistics or running ones, small steps, several processes, half precision, copies."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modeling_sera import SeraConfig, layers_sera
from modeling_sera.layers_sera import SeraSampleNorm, SeraSampleStatistics
from modeling_sera.routing_sera import SeraTopKRouter, mean_router_loss


def samples(count: int, seed: int = 0) -> torch.Tensor:
    """Channels of different means and spreads."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator) * torch.tensor([0.1, 1.0, 9.0]) + torch.tensor([0.5, 0.0, -40.0])


@pytest.mark.parametrize("count", [8, 50])
def test_a_large_step_is_normalised_as_batch_norm_does_it(count):
    ours, theirs = SeraSampleNorm(3), torch.nn.BatchNorm1d(3, affine=False)
    rows = samples(count).requires_grad_()
    weights = torch.randn(count, 3, generator=torch.Generator().manual_seed(1))
    gradients = []
    for norm in (ours, theirs):
        (norm(rows) * weights).sum().backward()
        gradients.append(rows.grad)
        rows.grad = None
    assert torch.allclose(ours(rows), theirs(rows), atol=1e-4)
    assert torch.allclose(*gradients, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_small_step_is_normalised_by_the_running_statistics(count):
    norm = SeraSampleNorm(3)
    for seed in range(30):
        norm(samples(20, seed))
    rows = samples(count, 99).requires_grad_()
    got = norm(rows)
    assert torch.allclose(got, norm.eval()(rows))  # which it has moved before
    weights = torch.randn(count, 3)
    (got * weights).sum().backward()
    assert torch.allclose(rows.grad, weights / (norm.running_var + norm.EPSILON).sqrt())  # as of constants


@pytest.mark.parametrize("count", [1, 2, 5, 8, 40])
def test_steps_of_any_size_find_the_samples_mean_and_variance(count):
    norm = SeraSampleNorm(3)
    for seed in range(4000 // count):
        norm(samples(count, seed))
    expected = torch.tensor([0.1, 1.0, 9.0]).square()
    assert norm.num_samples == 4000 // count * count
    assert ((norm.running_var / expected).log().abs() < 0.5).all()
    assert ((norm.running_mean - torch.tensor([0.5, 0.0, -40.0])).abs() < 0.4 * expected.sqrt()).all()


def test_the_first_steps_count_alike():
    norm = SeraSampleStatistics(3)
    rows = samples(12)
    for row in rows[:, None]:
        norm.observe(row)
    assert torch.allclose(norm.running_mean, rows.mean(dim=0), atol=1e-4)
    assert torch.allclose(norm.running_var, rows.var(dim=0, unbiased=False), rtol=1e-3)


def test_expressions_about_few_images_are_few_samples():
    norm = SeraSampleNorm(3)
    norm(samples(20))
    before = norm.running_mean.clone()
    rows = samples(20, 1)
    got = norm(rows, num_samples=3)
    assert not torch.equal(norm.running_mean, before)
    assert torch.allclose(got, norm.eval()(rows))
    assert not torch.allclose(got, norm.train()(rows), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_in_float32(dtype, tmp_path):
    norm = SeraSampleNorm(3)
    norm(samples(2000))
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.to(dtype).eval()
    assert all(torch.equal(value, state[name]) for name, value in norm.state_dict().items())
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in norm.buffers())
    got = norm(samples(10).to(dtype))
    assert got.dtype == dtype and (got.float() - norm(samples(10).to(dtype).float())).abs().max() < 0.02
    norm.train()
    for _ in range(200):  # steps this small are nothing in half precision
        norm(samples(1, 3).to(dtype) + 1)
    assert (norm.running_mean - state["running_mean"]).abs().min() > 0.1


def test_it_moves_between_devices():
    norm = SeraSampleNorm(3)
    norm(samples(20))
    assert {buffer.device.type for buffer in norm.to("meta").buffers()} == {"meta"}
    empty = norm.to_empty(device="cpu")
    empty.reset()
    assert not empty.running_mean.any() and (empty.running_var == 1).all() and empty.num_samples == 0


def test_it_compiles_in_training_for_any_number_of_samples():
    plain, norm = SeraSampleNorm(3), SeraSampleNorm(3)
    compiled = torch.compile(norm, fullgraph=True, backend="eager", dynamic=True)
    for count in (20, 3, 1, 9):
        assert torch.allclose(compiled(samples(count, count)), plain(samples(count, count)), atol=1e-5)
    assert all(torch.allclose(a, b) for a, b in zip(norm.buffers(), plain.buffers(), strict=True))


def of_two_processes(monkeypatch, work: Callable[[int], tuple]) -> list[tuple]:
    """What two processes get that work at once; here they are threads, whose tensors are summed as `all_reduce` does it."""
    barrier, given = threading.Barrier(2, timeout=60), {}

    def all_reduce(tensor: torch.Tensor) -> None:
        given[threading.get_ident()] = tensor.clone()
        barrier.wait()
        total = sum(given.values())
        barrier.wait()
        tensor.copy_(total)

    stand_ins = {"is_available": lambda: True, "is_initialized": lambda: True, "get_world_size": lambda: 2}
    for name, stand_in in (stand_ins | {"all_reduce": all_reduce}).items():
        monkeypatch.setattr(layers_sera.distributed, name, stand_in)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, range(2)))
    monkeypatch.undo()
    return results


def test_two_processes_have_one_statistic(monkeypatch):
    def work(rank: int) -> tuple:
        norm = SeraSampleNorm(3)
        rows = samples(12)[[slice(5), slice(5, None)][rank]].requires_grad_()
        got = norm(rows)
        (got * torch.arange(got.numel()).view_as(got).sin()).sum().backward()
        few = norm(samples(2, 7))  # four in both
        return got.detach(), rows.grad, few, norm.running_var

    first, second = of_two_processes(monkeypatch, work)
    norm, rows = SeraSampleNorm(3), samples(12).requires_grad_()
    got = norm(rows)
    factors = torch.cat([torch.arange(3 * n).view(n, 3).sin() for n in (5, 7)])
    (got * factors).sum().backward()
    few = norm(samples(2, 7).repeat(2, 1))
    assert torch.allclose(torch.cat([first[0], second[0]]), got, atol=1e-4)
    assert torch.allclose(torch.cat([first[1], second[1]]), rows.grad, atol=1e-3)
    assert torch.allclose(torch.cat([first[2], second[2]]), few, atol=1e-4)
    assert torch.equal(first[3], second[3]) and torch.allclose(first[3], norm.running_var, rtol=1e-4)


def test_the_experts_use_is_counted_over_all_processes(monkeypatch):
    """And so is its gradient, of which training takes the processes' mean."""
    config = SeraConfig.tiny(router_noise_std=0.0)

    def balance(ranks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        router = SeraTopKRouter(config)
        generator = torch.Generator().manual_seed(3)
        for parameter in router.parameters():
            parameter.data.normal_(generator=generator)
        pooled, sentence = (
            torch.cat([torch.randn(6, n, generator=torch.Generator().manual_seed(i)) for i in ranks]) for n in (16, 24)
        )
        loss = mean_router_loss([router(pooled, sentence)], SeraConfig.tiny(router_logit_loss_weight=0.0))
        loss.backward()
        return loss.detach(), router.score.weight.grad

    (loss, gradient), (other_loss, other_gradient) = of_two_processes(monkeypatch, lambda rank: balance([rank]))
    expected_loss, expected = balance([0, 1])
    assert loss > 1e-4 and torch.equal(loss, other_loss) and torch.allclose(loss, expected_loss, rtol=1e-3)
    assert torch.allclose((gradient + other_gradient) / 2, expected, rtol=1e-3, atol=1e-6)
