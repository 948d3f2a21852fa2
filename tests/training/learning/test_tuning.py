"""Tuning: which of the towers' parameters are trained, how many, and that a step of training moves those and no others."""

import itertools

import pytest
import torch
from conftest import make_inputs, make_model
from torch import nn

from modeling_sera import SeraConfig, SeraForReferringSegmentation
from training.configuration import OptimizationSettings
from training.learning.optimizers import Muon, build_optimizer
from training.learning.tuning import apply_tuning

TOWERS = {"vision": "model.vision.tower.", "text": "model.text_tower."}
MODES = ("frozen", "norm_bias", "full")


def parameters_of(model: nn.Module, tower: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.startswith(TOWERS[tower])}


def added_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if not name.startswith(tuple(TOWERS.values()))}


def norms_and_biases(model: nn.Module, tower: str) -> set[str]:
    """Names of all that layer norms hold and of what any other layer holds under the name `bias`, found layer by layer."""
    found = set()
    for place, module in model.named_modules():
        if (place + ".").startswith(TOWERS[tower]):
            own = module._parameters
            found |= {f"{place}.{name}" for name in own if type(module) is nn.LayerNorm or name == "bias"}
    return found


def expected_names(model: nn.Module, tower: str, mode: str) -> set[str]:
    everything = set(parameters_of(model, tower))
    unused = {name for name in everything if name.endswith("embeddings.mask_token")}
    return {"frozen": set(), "norm_bias": norms_and_biases(model, tower), "full": everything - unused}[mode]


def trained_names(parameters: dict[str, nn.Parameter]) -> set[str]:
    return {name for name, p in parameters.items() if p.requires_grad}


@pytest.mark.parametrize("model_type", ["dinov2", "dinov2_with_registers"])
@pytest.mark.parametrize(("vision", "text"), itertools.product(MODES, MODES))
def test_each_mode_trains_what_it_says(model_type, vision, text):
    model = make_model(vision_config={"model_type": model_type})
    report = apply_tuning(model, vision=vision, text=text)
    for tower, mode in (("vision", vision), ("text", text)):
        parameters, expected = parameters_of(model, tower), expected_names(model, tower, mode)
        assert trained_names(parameters) == expected
        assert getattr(report, f"{tower}_trained") == sum(parameters[name].numel() for name in expected)
        assert getattr(report, f"{tower}_total") == sum(p.numel() for p in parameters.values())
    added = added_parameters(model)
    assert trained_names(added) == set(added)
    assert report.added == sum(p.numel() for p in added.values())


def test_norm_and_bias_tuning_leaves_tokens_scales_and_matrices_alone():
    model = make_model()
    apply_tuning(model, vision="norm_bias", text="norm_bias")
    frozen = {name for tower in TOWERS for name, p in parameters_of(model, tower).items() if not p.requires_grad}
    for part in ("cls_token", "register_tokens", "mask_token", "position_embeddings", "lambda1", "token_embedding"):
        assert any(part in name for name in frozen), part
    assert {name for name in frozen if name.endswith("bias") or "norm" in name} == set()


@pytest.mark.parametrize("taps", [[1, 2], [1, 4]])
def test_every_trained_parameter_has_a_gradient(taps):
    model = make_model(adapter_layers=[1], tap_layers=taps).train()
    apply_tuning(model, vision="full", text="full")
    model(**make_inputs(3), labels=torch.rand(3, 56, 56)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_modes_can_be_changed():
    model = make_model()
    apply_tuning(model, vision="full", text="full")
    again = apply_tuning(model, vision="frozen", text="norm_bias")
    assert again == apply_tuning(make_model(), vision="frozen", text="norm_bias")
    assert trained_names(parameters_of(model, "vision")) == set()


def test_norm_and_bias_tuning_of_sera_b_trains_less_than_a_percent_of_the_towers():
    with torch.device("meta"):
        model = SeraForReferringSegmentation(SeraConfig())
    report = apply_tuning(model, vision="norm_bias", text="norm_bias")
    # counted on paper from the towers' dimensions, block: norms 4, q k v out biases 4, two feed-forward biases 4 + 1
    vision, text = 768, 512
    assert report.vision_trained == 12 * 13 * vision + 2 * vision + vision  # final norm, patch embedding's bias
    assert report.text_trained == 12 * 13 * text + 2 * text
    block = 12 * vision**2 + 13 * vision + 2 * vision  # two layer scales
    prefix = 1 + 1 + 4 + (518 // 14) ** 2 + 1  # class, mask and register tokens, positions
    assert report.vision_total == 12 * block + 2 * vision + prefix * vision + 3 * 14 * 14 * vision + vision
    assert report.text_total == 12 * (12 * text**2 + 13 * text) + 2 * text + (49408 + 77) * text
    share = (report.vision_trained + report.text_trained) / (report.vision_total + report.text_total)
    assert report.tower_share == share and 0 < share < 0.01
    for number in (report.vision_trained, report.vision_total, report.text_trained, report.text_total, report.added):
        assert f"{number:,}" in str(report)
    assert f"{share:.3%}" in str(report)


@pytest.mark.parametrize(
    ("vision", "text"), [("norm_bias", "norm_bias"), ("frozen", "full"), ("full", "frozen"), ("full", "full")]
)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_of_training_moves_exactly_what_is_tuned(vision, text, name):
    model = make_model().train()
    apply_tuning(model, vision=vision, text=text)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizationSettings(optimizer=name, learning_rate=1e-2, weight_decay=0.05))
    torch.manual_seed(0)
    model(**make_inputs(3), labels=torch.rand(3, 56, 56)).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    expected = expected_names(model, "vision", vision) | expected_names(model, "text", text)
    assert moved == expected | set(added_parameters(model))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_acts_on_matrices_and_kernels_alone(name):
    model = make_model()
    apply_tuning(model, vision="full", text="norm_bias")
    groups = build_optimizer(model, OptimizationSettings(optimizer=name, weight_decay=0.05)).param_groups
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)):
            for name, p in module._parameters.items():
                decays = [group["weight_decay"] for group in groups if any(p is member for member in group["params"])]
                is_kernel = name == "weight" and isinstance(module, (nn.Linear, nn.Conv2d))
                assert p is None or decays in ([], [0.05 if is_kernel else 0.0])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_routers_are_adamws_at_a_rate_of_their_own(name):
    model = make_model()
    apply_tuning(model, vision="norm_bias", text="norm_bias")
    settings = OptimizationSettings(optimizer=name, learning_rate=1e-2, weight_decay=0.05, router_rate=0.3)
    optimizer = build_optimizer(model, settings)
    routers = {n: p for n, p in model.named_parameters() if ".router." in n}
    assert {n.split(".router.")[1] for n in routers} == {
        *("score.weight", "score.bias", "score_sentence.weight"),
        *("hidden.weight", "hidden.bias", "hidden_sentence.weight"),
    }
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for parameter_name, p in model.named_parameters():
        if p.requires_grad:
            assert rates[id(p)] == pytest.approx(0.3e-2 if parameter_name in routers else 1e-2), parameter_name
    muon = [part for part in getattr(optimizer, "parts", []) if isinstance(part, Muon)]
    assert len(muon) == (name == "muon")
    orthogonalised = {id(p) for part in muon for group in part.param_groups for p in group["params"]}
    assert not orthogonalised & {id(p) for p in routers.values()}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert sorted({round(rate, 6) for rate in schedule.get_last_lr()}) == [0.0015, 0.005]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_towers_learn_at_a_rate_of_their_own(name):
    model = make_model()
    apply_tuning(model, vision="full", text="norm_bias")
    settings = OptimizationSettings(optimizer=name, learning_rate=1e-2, router_rate=0.3, tower_rate=0.1)
    rates = {id(p): group["lr"] for group in build_optimizer(model, settings).param_groups for p in group["params"]}
    towers = {id(p) for tower in (model.model.vision.tower, model.model.text_tower) for p in tower.parameters()}
    for parameter_name, p in model.named_parameters():
        if p.requires_grad:
            factor = 0.1 if id(p) in towers else 0.3 if ".router." in parameter_name else 1.0
            assert rates[id(p)] == pytest.approx(factor * 1e-2), parameter_name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_goes_on_from_its_saved_state(name, tmp_path):
    def start() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        model = make_model()  # in eval mode, so that nothing is drawn
        optimizer = build_optimizer(model, OptimizationSettings(optimizer=name, learning_rate=1e-2, weight_decay=0.05))
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def train(model, optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(**make_inputs(3), labels=torch.ones(3, 56, 56)).loss.backward()
            optimizer.step()
            scheduler.step()

    whole = start()
    train(*whole, 4)
    first, second = start(), start()
    train(*first, 2)
    torch.save([part.state_dict() for part in first], tmp_path / "state")
    states = torch.load(tmp_path / "state", weights_only=True)
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    train(*second, 2)
    assert [group["lr"] for group in second[1].param_groups] == [group["lr"] for group in whole[1].param_groups]
    for (key, value), other in zip(second[0].state_dict().items(), whole[0].state_dict().values(), strict=True):
        assert torch.equal(value, other), key


def test_muon_orthogonalises_matrices_of_any_shape():
    torch.manual_seed(0)
    for shape in ((3, 24, 40), (2, 40, 24), (1, 16, 16)):
        matrices = torch.randn(shape) * torch.tensor([1e-4, 1.0, 1e4])[: shape[0], None, None]
        left, values, right = torch.linalg.svd(Muon.orthogonalized(matrices), full_matrices=False)
        expected_left, _, expected_right = torch.linalg.svd(matrices, full_matrices=False)
        assert values.min() > 0.6 and values.max() < 1.3
        # the polar factor of both is the same, since only the singular values were changed
        assert torch.allclose(left @ right, expected_left @ expected_right, atol=2e-3)


def test_muon_takes_the_steps_of_torchs_up_to_its_rounding():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon to compare with")
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((24, 40), (40, 24), (24, 40))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = [Muon(ours, **settings), torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")]
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, atol=1e-3)  # a step moves a weight by 2e-3; theirs is computed in bfloat16


def test_muon_leaves_a_matrix_without_a_gradient_alone():
    still, moving = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moving.grad = torch.eye(4)
    Muon([still, moving], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(still, torch.ones(4, 4)) and not torch.equal(moving, torch.ones(4, 4))
