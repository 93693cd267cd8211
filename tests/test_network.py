"""network.py: the net against its docstring, what it starts from, its mirror symmetry, and how it is stepped."""

import re

import pytest
import torch
from conftest import seeded
from torch.nn import functional as F

import network


def make_net(widths=(8, 8), **options):
    torch.manual_seed(0)
    return network.ConvNet(widths, **options)


def noise(*shape, seed=0, **options):
    return torch.randn(shape, generator=seeded(seed), **options)


def photos(count):
    """Images whose neighboring pixels and whose channels are alike, as in photographs."""
    smooth = F.interpolate(noise(count, 3, 6, 6), size=(12, 12), mode="bilinear")
    return smooth + 2 * smooth.mean(1, keepdim=True) + 0.2 * noise(count, 3, 12, 12, seed=1) + 0.5


def test_the_net_has_the_layers_and_shapes_of_its_docstring():
    net, images = make_net(widths=(32, 64, 128)), noise(4, 3, 32, 32)
    maps = F.silu(F.conv2d(images, net.stem.weight, net.stem.bias))
    shapes = [images.shape, maps.shape]
    for first, second in zip(net.filters()[::2], net.filters()[1::2], strict=True):
        maps = F.max_pool2d(F.conv2d(maps, first, padding=1), 2)
        maps = F.conv2d(F.silu(F.batch_norm(maps, None, None, training=True)), second, padding=1)
        maps = F.silu(F.batch_norm(maps, None, None, training=True))
        shapes.append(maps.shape)
    logits = net(images)
    torch.testing.assert_close(logits, F.linear(maps.flatten(2).max(2).values, net.head.weight, net.head.bias))
    documented = re.findall(r"\(B, +(\d+), +(\d+), +(\d+)\)", network.ConvNet.__doc__)
    assert [(4, *map(int, shape)) for shape in documented] == shapes and logits.shape == (4, 10)
    assert all(layer.bias is None for layer in net.layers(torch.nn.Conv2d))


def test_the_whitened_stem_is_frozen_and_its_outputs_are_uncorrelated():
    net, images = make_net(), photos(200) / 10  # the variance of their noise is 4e-4
    net.whiten(images)
    assert not net.stem.weight.requires_grad and not net.stem.bias.requires_grad
    images = torch.cat([images, images.flip(3)]).double()  # mirror images are just as likely
    outputs, mirrored = net.double().stem(images), net.stem(images.flip(3)).flip(3)
    patches = torch.cat([images[:, :, y : y + 11, x : x + 11] for y in (0, 1) for x in (0, 1)], dim=1)
    variances = torch.linalg.eigvalsh(torch.cov(patches.transpose(0, 1).flatten(1)))
    even, odd, negative_even, negative_odd = (outputs[:, first::4] for first in range(4))
    covariance = torch.cov(torch.cat([even, odd], 1).transpose(0, 1).flatten(1))
    torch.testing.assert_close(covariance.diag().sort().values, variances / (variances + 5e-4), rtol=0, atol=2e-3)
    torch.testing.assert_close(covariance, covariance.diag().diag(), rtol=0, atol=2e-3)
    for one, other in [(1.6 - even, negative_even), (even, mirrored[:, ::4]), (negative_odd, mirrored[:, 1::4])]:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)  # 1.6, because all are shifted up by 0.8


@pytest.mark.parametrize("mirror", [True, False])
def test_filters_start_as_the_identity_and_a_step_keeps_those_of_a_mirror_net_symmetric(mirror):
    net = make_net(widths=(32, 16), mirror=mirror)
    net.start_as_identity()
    for filters in net.filters():
        maps, same = noise(2, filters.shape[1], 5, 5), min(filters.shape[:2])
        outputs = F.conv2d(maps, filters, padding=1)
        torch.testing.assert_close(outputs[:, :same], maps[:, :same])
        assert (outputs[:, same:].abs().mean((0, 2, 3)) > 0.1).all()  # the others stay random
    network.backpropagate(net, F.cross_entropy, noise(6, 3, 16, 16), torch.arange(6), "fp32")
    network.Muon(net.parameters(), 0.1, 20).step()
    for filters in net.filters():
        network.symmetrize(symmetric := filters.detach().clone())
        assert torch.allclose(filters, symmetric, atol=1e-6) == mirror


def test_muons_net_starts_undecided_with_scales_at_1_and_quick_running_statistics():
    net = make_net(widths=(32, 64, 128))
    net.start_undecided()
    net.freeze_scales()
    net.follow_faster()
    assert net.head.weight.std().item() * 128 == pytest.approx(1, rel=0.1)
    assert not net.head.bias.any() and not net.head.bias.requires_grad
    for norm in net.layers(torch.nn.BatchNorm2d):
        assert norm.weight.eq(1).all() and not norm.weight.requires_grad and norm.bias.requires_grad
        maps = noise(8, norm.num_features, 3, 3) + 1
        norm(maps)
        torch.testing.assert_close(norm.running_mean, 0.2 * maps.mean((0, 2, 3)))  # PyTorch's default is 0.1


def test_symmetrized_filters_mirror_their_output_when_the_image_is_mirrored():
    filters, maps = noise(12, 8, 3, 3).double(), noise(2, 8, 5, 7).double()
    with torch.device("meta"):  # what it makes is on the device of the filters, and not on the default one
        network.symmetrize(filters)
    outputs, inputs = [0, 3, 2, 1, 4, 7, 6, 5, 8, 11, 10, 9], [0, 3, 2, 1, 4, 7, 6, 5]  # see mirror_channels
    mirrored = F.conv2d(maps[:, inputs].flip(3), filters, padding=1)
    torch.testing.assert_close(mirrored, F.conv2d(maps, filters, padding=1)[:, outputs].flip(3))


@pytest.mark.parametrize("size, mirror, same", [(16, 1, 1), (24, 1, 1), (32, 1, 1), (22, 1, 0), (32, 0, 0)])
def test_a_mirror_net_gives_mirror_images_the_same_logits(size, mirror, same):
    net, images = make_net((32, 40, 44), mirror=mirror).double().eval(), noise(6, 3, size, size).double()
    net.whiten(photos(20))
    net.start_as_identity()
    logits = torch.stack([net(images), net(images.flip(3))])
    net.mirror = False  # each image on its own
    mean = (net(images) + net(images.flip(3))) / 2
    difference = (logits - mean).abs().max() / mean.std(0).min()
    assert (difference < 1e-3) if same else (difference > 1e-2)


def test_an_ensemble_averages_the_logits_of_its_nets_in_either_precision():
    nets, images = [make_net(), make_net((4,))], noise(4, 3, 32, 32)
    for precision, tolerance in [("fp32", 1e-6), ("bf16", 0.05)]:
        one, other = (network.compute_logits(net, images, precision) for net in nets)
        torch.testing.assert_close([one, other], [net(images) for net in nets], rtol=tolerance, atol=tolerance)
        assert torch.equal(one, one.bfloat16().float()) == (precision == "bf16")
        torch.testing.assert_close(network.compute_logits(network.Ensemble(nets), images, precision), (one + other) / 2)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 0.05)])
def test_backpropagate_adds_the_gradients_of_the_mean_loss_with_batch_norm_in_parts(precision, tolerance):
    net, images, labels = make_net(), noise(502, 3, 16, 16), torch.arange(502) % 10
    labels[336:] = 0  # the last part has other labels, and is smaller and so counts for less
    expected = torch.cat([net(part) for part in images.split([168, 168, 166])])  # parts of at most 250, nearly equal
    gradients = torch.autograd.grad(F.cross_entropy(expected, labels), [*net.parameters()])
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    logits = network.backpropagate(net, F.cross_entropy, images, labels, precision)
    torch.testing.assert_close(logits, expected.detach(), rtol=tolerance, atol=tolerance)
    added = [parameter.grad - 1 for parameter in net.parameters()]
    torch.testing.assert_close(added, [*gradients], rtol=tolerance, atol=tolerance)


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


def start_muon(*shape):
    parameter, frozen = noise(*shape).requires_grad_(), torch.ones(4)
    optimizer = network.Muon([frozen, parameter], lr=7, batch_size=20)
    optimizer.param_groups[0]["lr"] = 0.1  # the rate has fallen since
    return parameter, optimizer


def test_muon_keeps_the_norm_of_filters_and_orthogonalizes_their_nesterov_direction():
    (filters, optimizer), velocity = start_muon(4, 3, 3, 3), 0
    for seed in range(1, 4):
        filters.grad = noise(4, 3, 3, 3, seed=seed)
        velocity = 0.65 * velocity + filters.grad.flatten(1)
        step = 0.1 * network.orthogonalize(filters.grad.flatten(1) + 0.65 * velocity)
        expected = 2 * F.normalize(filters.detach().flatten(), dim=0).view(4, 27) - step  # 2: the root of 4 filters
        optimizer.step()
        torch.testing.assert_close(filters.detach().flatten(1), expected)


@pytest.mark.parametrize("shape, factor", [((4,), 1 / 4), ((2, 5), 3.3 / 25)])
def test_muon_steps_biases_and_the_head_like_sgd_with_weight_decay(shape, factor):
    (ours, optimizer), theirs = start_muon(*shape), noise(*shape).requires_grad_()
    sgd = torch.optim.SGD([theirs], lr=0.1 * 20 * factor, momentum=0.85, nesterov=True)
    for seed in range(1, 4):
        ours.grad = theirs.grad = noise(*shape, seed=seed)
        theirs.data.mul_(1 - 0.1 * 20 * 1e-5)
        optimizer.step()
        sgd.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_muon_goes_on_from_its_saved_state():
    (ours, optimizer), (theirs, fresh) = start_muon(4, 3, 3, 3), start_muon(4, 3, 3, 3)
    ours.grad = noise(4, 3, 3, 3, seed=1)
    optimizer.step()
    theirs.data.copy_(ours)
    fresh.load_state_dict(optimizer.state_dict())
    ours.grad = theirs.grad = noise(4, 3, 3, 3, seed=2)
    optimizer.step()
    fresh.step()
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError):
        fresh.load_state_dict({"velocities": []})  # of another net
