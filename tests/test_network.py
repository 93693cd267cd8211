"""network.py: shapes, parameters, gradients, the whitened stem, and how the net is stepped."""

import ast
import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import network
from loss import CrossEntropyLoss


def net(seed=0, **options):
    torch.manual_seed(seed)
    return network.ConvNet(**options)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(count):
    """Images whose neighbouring pixels and whose channels are alike, as in photographs."""
    smooth = F.interpolate(noise(count, 3, 6, 6), size=(12, 12), mode="bilinear")
    mix = torch.tensor([[1.0, 0.5, 0.2], [0.8, 1.0, 0.3], [0.7, 0.6, 1.0]])
    return torch.einsum("ij,njhw->nihw", mix, smooth) + 0.2 * noise(count, 3, 12, 12, seed=1) + 0.5


def covariance(outputs):
    """(N, C, H, W) -> (C, C)"""
    return np.cov(outputs.detach().double().transpose(0, 1).flatten(1))


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("widths", [(32, 64, 128), (8, 8, 8), (5, 12), (4,)])
@pytest.mark.parametrize("num_classes", [10, 3])
def test_one_logit_a_class(batch, widths, num_classes):
    assert net(widths=widths, num_classes=num_classes)(noise(batch, 3, 32, 32)).shape == (batch, num_classes)


def test_shapes_are_those_of_the_docstring():
    model, shapes = net(), []
    for part in (model.stem, *model.groups, model.head):
        part.register_forward_hook(lambda part, inputs, output: shapes.append(tuple(output.shape[1:])))
    model(noise(2, 3, 32, 32))
    assert shapes == [(24, 31, 31), (32, 15, 15), (80, 7, 7), (160, 3, 3), (10,)]
    for shape in shapes[:4]:
        assert "(B, {:>3}, {:>2}, {:>2})".format(*shape) in network.ConvNet.__doc__


def test_head_takes_the_maximum_over_the_pixels():
    model, features = net().eval(), []
    model.groups.register_forward_hook(lambda part, inputs, output: features.append(output))
    logits = model(noise(4, 3, 32, 32))
    largest = F.adaptive_max_pool2d(features[0], 1).flatten(1)
    torch.testing.assert_close(logits, largest @ model.head.weight.T + model.head.bias)


def test_number_of_parameters():
    stem = 3 * 2 * 2 * 24 + 24
    groups = sum(9 * a * b + 9 * b * b + 2 * (b + b) for a, b in [(24, 32), (32, 80), (80, 160)])  # no biases; 2 norms
    head = 160 * 10 + 10
    assert sum(parameter.numel() for parameter in net().parameters()) == stem + groups + head == 445_378


def test_gradients_reach_every_parameter():
    model = net()
    F.cross_entropy(model(noise(16, 3, 32, 32)), torch.arange(16) % 10).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_seed_decides_the_initial_weights():
    first, again, other = (torch.cat([p.flatten() for p in net(seed).parameters()]) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_images_do_not_mix_in_eval_mode():
    model, order = net(), torch.tensor([3, 1, 6, 0, 7, 2, 4, 5])
    images = noise(8, 3, 32, 32) * torch.arange(8).view(8, 1, 1, 1)
    for _ in range(3):
        model(2 * images + 1)  # running statistics that are not the initial ones
    model.eval()
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(model(images[order]), logits[order], rtol=0, atol=1e-5)
        torch.testing.assert_close(model(images[:1]), logits[:1], rtol=0, atol=1e-5)
        assert not torch.allclose(logits[order], logits, atol=1e-3)


@pytest.mark.parametrize("eps", [1e-9, 0.1])
def test_whitened_stem_decorrelates(eps):
    model, images = net(), correlated(200)
    patches = torch.cat([images[:, :, y : y + 11, x : x + 11] for y in (0, 1) for x in (0, 1)], dim=1)
    variances = np.linalg.eigvalsh(covariance(patches))
    assert variances[-1] > 10 * variances[0]  # there is something to whiten

    model.whiten(images, eps)
    outputs = model.stem(images)
    np.testing.assert_allclose(covariance(outputs[:, :12]), np.diag(variances / (variances + eps)), atol=2e-3)
    torch.testing.assert_close(outputs[:, 12:], -outputs[:, :12], rtol=0, atol=1e-5)


def test_whitened_filters_are_frozen_and_start_without_bias():
    model = net()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.whiten(correlated(20))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"stem.weight"} and changed == {"stem.weight", "stem.bias"}
    assert not model.stem.bias.any()
    model(noise(4, 3, 32, 32)).sum().backward()
    assert model.stem.weight.grad is None and model.head.weight.grad is not None


def test_convolutions_pass_their_input_through():
    model = net(widths=(24, 30, 20))
    model.pass_through()
    images = noise(2, 24, 8, 8)
    outputs = model.groups[0][0](images)
    assert torch.equal(outputs, images)
    outputs = model.groups[1][0](images)
    assert torch.equal(outputs[:, :24], images) and outputs[:, 24:].std() > 0.1  # the other filters stay random
    assert torch.equal(model.groups[2][0](noise(2, 30, 8, 8)), noise(2, 30, 8, 8)[:, :20])


def test_scales_are_fixed_where_they_do_no_more_than_scale():
    model = net(widths=(24, 30, 1000))
    model.fix_scales()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    norms = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)}
    assert len(norms) == 6
    assert frozen == {f"{name}.weight" for name in norms} | {"head.bias"}
    assert all((model.get_submodule(name).weight == 1).all() for name in norms)
    assert {model.get_submodule(name).momentum for name in norms} == {0.2}
    assert not model.head.bias.any()
    assert model.head.weight.std().item() == pytest.approx(1 / 1000, rel=0.05)


@pytest.mark.parametrize("shape", [(8, 8), (5, 30), (30, 5)])
def test_orthogonalize_keeps_singular_vectors_and_evens_out_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ network.orthogonalize(matrix, steps=5) @ vh.T
    values = core.diagonal()
    assert (core - torch.diag(values)).abs().max() < 1e-9
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_steps_filters_along_the_orthogonalized_nesterov_gradient_at_a_fixed_norm_and_the_rest_as_sgd_does():
    filters, shift, linear = (torch.randn(shape, requires_grad=True) for shape in ((4, 3, 3, 3), (4,), (2, 5)))
    frozen = torch.randn(4)
    optimizer = network.Muon([filters, frozen, shift, linear], lr=0.1, batch_size=20)
    references = [parameter.detach().clone().requires_grad_() for parameter in (shift, linear)]
    groups = [
        {"params": reference, "lr": 2 * factor} for reference, factor in zip(references, (1 / 4, 3.3 / 25), strict=True)
    ]
    sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
    velocity = torch.zeros(4, 27)
    for _ in range(3):
        expected = filters.detach().flatten(1) * 2 / filters.detach().norm()
        filters.grad, shift.grad, linear.grad = torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(2, 5)
        gradient = filters.grad.flatten(1)
        velocity = 0.6 * velocity + gradient
        expected -= 0.1 * network.orthogonalize(gradient + 0.6 * velocity)
        for parameter, reference in zip((shift, linear), references, strict=True):
            reference.grad = parameter.grad.clone()
            reference.data.mul_(1 - 2e-5)
        optimizer.step()
        sgd.step()
        torch.testing.assert_close(filters.detach().flatten(1), expected)
        torch.testing.assert_close([shift, linear], references, rtol=1e-6, atol=1e-7)
    filters.grad, shift.grad, before = torch.randn(4, 3, 3, 3), None, shift.clone()
    optimizer.step()
    assert torch.equal(shift, before)  # without a gradient nothing moves, whatever the velocity


def test_a_step_in_parts_is_the_step_of_the_whole_batch():
    generator, sizes = torch.Generator().manual_seed(0), []
    images, labels = torch.randn(501, 3, 2, 2, generator=generator), torch.arange(501) % 10
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
    reference = copy.deepcopy(model)
    model.register_forward_hook(lambda module, inputs, outputs: sizes.append(len(outputs)))
    sgd, reference_sgd = (torch.optim.SGD(net.parameters(), lr=0.5) for net in (model, reference))
    for _ in range(2):  # the second step shows whether gradients of the first are left over
        logits, loss = network.train_step(model, sgd, CrossEntropyLoss(), images, labels, "fp32")
        expected_logits = reference(images)
        expected_loss = torch.nn.functional.cross_entropy(expected_logits, labels)
        reference_sgd.zero_grad()
        expected_loss.backward()
        reference_sgd.step()
        torch.testing.assert_close(logits, expected_logits.detach(), rtol=1e-5, atol=1e-6)
        assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
        torch.testing.assert_close([*model.parameters()], [*reference.parameters()], rtol=1e-5, atol=1e-6)
    assert sizes == [167] * 6


def test_no_torchvision():
    tree = ast.parse(Path(network.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}
