"""network.py: the net against its docstring, the whitened stem, and how the net is built and stepped."""

import copy

import numpy as np
import pytest
import torch
from conftest import seeded
from torch.nn import functional as F

import data
import network
import train
from loss import CrossEntropyLoss


def net(**options):
    torch.manual_seed(0)
    return network.ConvNet(**options)


def noise(*shape, seed=0, **options):
    return torch.randn(shape, generator=seeded(seed), **options)


def correlated(count):
    """Images whose neighboring pixels and whose channels are alike, as in photographs."""
    smooth = F.interpolate(noise(count, 3, 6, 6), size=(12, 12), mode="bilinear")
    mix = torch.tensor([[1.0, 0.5, 0.2], [0.8, 1.0, 0.3], [0.7, 0.6, 1.0]])
    return torch.einsum("ij,njhw->nihw", mix, smooth) + 0.2 * noise(count, 3, 12, 12, seed=1) + 0.5


def covariance(outputs):  # (N, C, H, W) -> (C, C)
    return np.cov(outputs.detach().double().transpose(0, 1).flatten(1))


def test_shapes_match_the_docstring_and_every_parameter_gets_a_gradient():
    model, images = net(), noise(4, 3, 32, 32)
    x = F.silu(F.conv2d(images, model.stem.weight, model.stem.bias))
    shapes = [x.shape[1:]]
    for group in model.groups:
        first, second = (layer.weight for layer in group if isinstance(layer, torch.nn.Conv2d))
        x = F.max_pool2d(F.conv2d(x, first, padding=1), 2)
        x = F.conv2d(F.silu(F.batch_norm(x, None, None, training=True)), second, padding=1)
        x = F.silu(F.batch_norm(x, None, None, training=True))
        shapes.append(x.shape[1:])
    expected = F.adaptive_max_pool2d(x, 1).flatten(1) @ model.head.weight.T + model.head.bias
    logits = model(images)
    torch.testing.assert_close(logits, expected)
    assert shapes == [(24, 31, 31), (32, 15, 15), (64, 7, 7), (128, 3, 3)]
    for shape in shapes:
        assert "(B, {:>3}, {:>2}, {:>2})".format(*shape) in network.ConvNet.__doc__
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    stem, head = 3 * 2 * 2 * 24 + 24, 128 * 10 + 10
    groups = sum(9 * a * b + 9 * b * b + 2 * (b + b) for a, b in [(24, 32), (32, 64), (64, 128)])  # no biases; 2 norms
    assert sum(parameter.numel() for parameter in model.parameters()) == stem + groups + head == 295_106


@pytest.mark.parametrize("widths", [(32, 64, 128), (8, 8, 8), (5, 12), (4,)])
def test_eval_logits_do_not_depend_on_the_rest_of_the_batch(widths):
    model = net(widths=widths).double()
    images = noise(8, 3, 32, 32, dtype=torch.float64) * torch.arange(8).view(8, 1, 1, 1)
    for _ in range(3):
        model(2 * images + 1)  # running statistics that are not the initial ones
    logits = model.eval()(images)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), logits, rtol=0, atol=1e-9)
    assert logits.shape == (8, 10) and logits.std(0).min() > 1e-5


@pytest.mark.parametrize("contrast", [1, 0.01])  # little contrast is amplified less
def test_outputs_of_the_whitened_stem_are_uncorrelated(contrast):
    model, images = net(), contrast * correlated(200)
    model.whiten(images)
    images = torch.cat([images, images.flip(3)])  # it takes mirror images for just as likely
    patches = torch.cat([images[:, :, y : y + 11, x : x + 11] for y in (0, 1) for x in (0, 1)], dim=1)
    variances = np.linalg.eigvalsh(covariance(patches))
    assert variances[-1] > 10 * variances[0]  # there is something to whiten
    outputs = model.stem(images)
    even, odd, not_even, not_odd = (outputs[:, first::4] for first in range(4))
    cov = covariance(torch.cat([even, odd], 1))
    expected = variances / (variances + 5e-4)
    np.testing.assert_allclose(sorted(np.diag(cov)), sorted(expected), atol=2e-3)
    np.testing.assert_allclose(cov, np.diag(np.diag(cov)), atol=2e-3)
    torch.testing.assert_close(not_even - 0.8, 0.8 - even, rtol=0, atol=1e-5)
    torch.testing.assert_close(not_odd - 0.8, 0.8 - odd, rtol=0, atol=1e-5)
    swapped = network.mirror_channels(model.stem(images.flip(3)), 1)
    torch.testing.assert_close(swapped, outputs.flip(3), rtol=0, atol=1e-5)


def test_symmetrized_filters_mirror_their_output_when_the_image_is_mirrored():
    filters, images = noise(12, 8, 3, 3).double(), noise(2, 8, 5, 7).double()
    before = filters.clone()
    network.symmetrize(filters)
    swapped = [[4 * (c // 4) + (0, 3, 2, 1)[c % 4] for c in range(count)] for count in (8, 12)]
    assert all(network.mirror_channels(torch.arange(len(order)), 0).tolist() == order for order in swapped)
    outputs = F.conv2d(images, filters, padding=1)
    mirrored = F.conv2d(images[:, swapped[0]].flip(3), filters, padding=1)
    torch.testing.assert_close(mirrored, outputs[:, swapped[1]].flip(3))
    for c in range(12):
        for d in range(8):
            other = before[swapped[1][c], swapped[0][d]].flip(1)
            torch.testing.assert_close(filters[c, d], (before[c, d] + other) / 2)


def test_a_mirror_net_averages_the_features_of_an_image_and_its_mirror_image():
    model, images = net(widths=(8,), mirror=True).eval(), noise(4, 3, 32, 32)
    maps = model.groups(F.silu(model.stem(images)))
    features = maps.flatten(2).max(2).values
    mean = (features + features[:, [0, 3, 2, 1, 4, 7, 6, 5]]) / 2
    torch.testing.assert_close(model(images), mean @ model.head.weight.T + model.head.bias)


def step_three_times(model, optimizer, size):
    for seed in range(3):
        images, targets = noise(6, 3, size, size, seed=seed), torch.arange(6) + seed
        network.train_step(model, optimizer, CrossEntropyLoss(), images, targets, "fp32")


def trained_net(mirror, size=32, optimizer="muon"):
    """A whitened net after three steps."""
    model = net(widths=(24, 32, 20), mirror=mirror)
    model.whiten(correlated(20))
    if optimizer == "muon":
        model.prepare_for_muon()
        stepper = network.Muon(model.parameters(), lr=0.1, batch_size=20)
    else:
        stepper = torch.optim.Adam(model.parameters(), lr=0.1)
    step_three_times(model, stepper, size)
    return model


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_steps_keep_mirrored_filters_symmetric(optimizer, mirror):
    for filters in trained_net(mirror, optimizer=optimizer).filters():
        network.symmetrize(same := filters.detach().clone())
        assert ((same - filters).abs().max() < 1e-6) == mirror
        assert (filters - filters.flip(3)).abs().max() > 1e-2  # there are pairs


SIZES = sorted({data.SIZE, 40, *(size for recipe in train.RECIPES.values() for size in recipe.get("sizes", {}))})


@pytest.mark.parametrize(
    "size, mirror, exact", [(22, True, False), (32, False, False), *((s, True, True) for s in SIZES)]
)
def test_a_mirrored_net_gives_mirror_images_the_same_logits_at_every_size_in_recipes(size, mirror, exact):
    model, images = trained_net(mirror, size).double(), noise(6, 3, size, size).double()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_parameters()  # each channel has learned a shift of its own
    torch.nn.init.normal_(model.head.weight)
    logits = model.eval()(images)
    assert logits.std(0).min() > 0.01
    difference = (model(images.flip(3)) - logits).abs().max() / logits.std()
    assert (difference < 1e-3) if exact else (difference > 1e-2)


def test_an_ensemble_averages_the_logits_of_its_nets():
    nets, images = [net(), net()], noise(4, 3, 32, 32)
    torch.nn.init.normal_(nets[1].head.weight)
    expected = (nets[0](images) + nets[1](images)) / 2
    torch.testing.assert_close(network.Ensemble(nets)(images), expected)


@pytest.mark.parametrize("shape", [(8, 8), (5, 30), (30, 5)])
def test_orthogonalize_keeps_singular_vectors_and_equalizes_singular_values(shape):
    matrix = noise(*shape, dtype=torch.float64)
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    values /= matrix.norm()
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert values.min() > 0.3 and values.max() < 1.3
    torch.testing.assert_close(network.orthogonalize(matrix), u * values @ vh, rtol=1e-6, atol=1e-6)
    assert not network.orthogonalize(0 * matrix).any()


def test_muon_keeps_the_norm_of_filters_and_orthogonalizes_their_nesterov_gradient():
    filters = noise(4, 3, 3, 3).requires_grad_()
    optimizer = network.Muon([filters], lr=0.1, batch_size=20)
    velocity = torch.zeros(4, 27)
    for seed in range(1, 4):
        expected = filters.detach().flatten(1) * 2 / filters.detach().norm()
        filters.grad = noise(4, 3, 3, 3, seed=seed)
        velocity = 0.65 * velocity + filters.grad.flatten(1)
        expected -= 0.1 * network.orthogonalize(filters.grad.flatten(1) + 0.65 * velocity)
        optimizer.step()
        torch.testing.assert_close(filters.detach().flatten(1), expected)


@pytest.mark.parametrize("shape, factor", [((4,), 1 / 4), ((2, 5), 3.3 / 25)])
def test_muon_updates_biases_and_the_head_like_sgd_with_weight_decay(shape, factor):
    ours, theirs = noise(*shape).requires_grad_(), noise(*shape).requires_grad_()
    optimizer = network.Muon([torch.randn(4), ours], lr=0.1, batch_size=20)
    sgd = torch.optim.SGD([theirs], lr=0.1 * 20 * factor, momentum=0.85, nesterov=True)
    for seed in range(1, 4):
        ours.grad = noise(*shape, seed=seed)
        theirs.grad = ours.grad.clone()
        theirs.data.mul_(1 - 2e-5)
        optimizer.step()
        sgd.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_muon_uses_the_rate_of_its_param_group():
    bias = torch.zeros(1).requires_grad_()
    optimizer = network.Muon([bias], lr=0.1, batch_size=1)
    optimizer.param_groups[0]["lr"] = 0
    bias.grad = torch.ones(1)
    optimizer.step()
    assert bias.item() == 0


def test_muon_continues_from_its_saved_state():
    ends = []
    for saved in (False, True):
        parameter = noise(4, 3, 3, 3).requires_grad_()
        optimizer = network.Muon([parameter], lr=0.1, batch_size=20)
        for seed in range(1, 4):
            if saved:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = network.Muon([parameter], lr=0.1, batch_size=20)
                optimizer.load_state_dict(state)
            parameter.grad = noise(4, 3, 3, 3, seed=seed)
            optimizer.step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_a_step_in_parts_equals_a_step_of_the_whole_batch(precision, tolerance):
    images, labels, sizes = noise(502, 3, 32, 32), torch.arange(502) % 10, []
    labels[336:] = 0  # a part of another kind, which is smaller and so counts for less
    model = net(widths=(8, 8)).eval()  # in training, batch norm sees one part at a time
    torch.nn.init.normal_(model.head.weight)
    expected = model(images)
    expected_loss = F.cross_entropy(expected, labels)
    gradients = torch.autograd.grad(expected_loss, list(model.parameters()))
    moved = [old.detach() - 0.5 * gradient for old, gradient in zip(model.parameters(), gradients, strict=True)]
    model.head.weight.grad = torch.ones(10, 8)  # left over from a step before
    model.head.register_forward_hook(lambda module, inputs, outputs: sizes.append(len(outputs)))
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    logits, loss = network.train_step(model, sgd, CrossEntropyLoss(), images, labels, precision)
    assert sizes == [168, 168, 166] and not logits.requires_grad
    torch.testing.assert_close(logits, expected.detach(), rtol=tolerance, atol=tolerance)
    assert torch.equal(logits, logits.bfloat16().float()) == (precision == "bf16")
    assert loss == pytest.approx(expected_loss.item(), rel=tolerance)
    torch.testing.assert_close([*model.parameters()], moved, rtol=tolerance, atol=tolerance)
