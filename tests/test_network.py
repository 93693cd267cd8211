"""network.py: the net against its docstring, the whitened stem, and how the net is built and stepped."""

import copy

import numpy as np
import pytest
import torch
from conftest import seeded
from torch.nn import functional as F

import network
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


def test_the_net_is_that_of_its_docstring_and_every_parameter_learns():
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
def test_every_image_has_a_logit_for_each_class_that_depends_on_no_other_image_in_eval_mode(widths):
    model = net(widths=widths).double()
    images = noise(8, 3, 32, 32, dtype=torch.float64) * torch.arange(8).view(8, 1, 1, 1)
    for _ in range(3):
        model(2 * images + 1)  # running statistics that are not the initial ones
    logits = model.eval()(images)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), logits, rtol=0, atol=1e-9)
    assert logits.shape == (8, 10) and logits.std(0).min() > 1e-5


@pytest.mark.parametrize("contrast", [1, 0.01])  # little contrast is amplified less
def test_whitened_stem_decorrelates(contrast):
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
    torch.testing.assert_close(model.stem(images.flip(3))[:, [0, 3, 2, 1]], outputs.flip(3)[:, :4], rtol=0, atol=1e-3)


def test_symmetrized_filters_mirror_the_outputs_of_a_mirrored_image_with_swapped_channels():
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


@pytest.mark.parametrize("size, muon", [(32, True), (24, True), (32, False)])
def test_filters_of_a_mirror_net_stay_symmetric_so_that_it_gives_mirror_images_the_same_logits(size, muon):
    images = noise(6, 3, size, size)
    for mirror in (True, False):
        model, optimizer = build(widths=(24, 32, 20), whiten=True, muon=muon, mirror=mirror)
        for step in range(3):
            batch, targets = noise(6, 3, size, size, seed=step), torch.arange(6) + step
            network.train_step(model, optimizer, CrossEntropyLoss(), batch, targets, "fp32")
        for filters in model.filters():
            network.symmetrize(same := filters.detach().clone())
            assert ((same - filters).abs().max() < 1e-6) == mirror
            assert (filters - filters.flip(3)).abs().max() > 1e-2  # there are pairs
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.reset_parameters()  # each channel has learned a shift of its own
        torch.nn.init.normal_(model.head.weight)
        logits = model.eval()(images)
        assert logits.std(0).min() > 0.01
        difference = (model(images.flip(3)) - logits).abs().max() / logits.std()
        assert difference < 1e-2 if mirror else difference > 0.1


def build(**tricks):
    settings = {"seed": 3, "widths": (24, 30, 20), "lr": 0.1, "batch_size": 20}
    settings |= {"whiten": False, "mirror": False, "muon": False}
    return network.build(settings | tricks, correlated(20))


def test_without_tricks_build_gives_a_random_net_and_adam():
    (model, adam), (again, _) = build(), build()
    assert isinstance(adam, torch.optim.Adam) and adam.defaults["lr"] == 0.1
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.head.weight, again.head.weight) and model.head.in_features == 20
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU


def test_with_tricks_build_whitens_passes_through_fixes_scales_and_gives_muon():
    model, muon = build(whiten=True, muon=True)
    norms = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert len(norms) == 6 and frozen == {
        "stem.weight",
        "stem.bias",
        "head.bias",
        *(f"{name}.weight" for name in norms),
    }
    assert all((layer.weight == 1).all() and layer.momentum == 0.2 for layer in norms.values())
    assert not model.head.bias.any()
    assert model.head.weight.std().item() == pytest.approx(1 / 20, rel=0.2)
    assert torch.equal(model.stem.weight[2::4], -model.stem.weight[::4])
    (first, second, third), x = (group[0] for group in model.groups), noise(2, 24, 8, 8)
    assert torch.equal(first(x), x)
    assert torch.equal(second(x)[:, :24], x) and second(x)[:, 24:].std() > 0.1  # the other filters stay random
    assert torch.equal(third(second(x)), second(x)[:, :20])
    assert (muon.lr, muon.batch_size, len(muon.state_dict()["velocities"])) == (0.1, 20, 13)


@pytest.mark.parametrize("shape", [(8, 8), (5, 30), (30, 5)])
def test_orthogonalize_keeps_singular_vectors_and_evens_out_singular_values(shape):
    matrix = noise(*shape, dtype=torch.float64)
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    values /= matrix.norm()
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert values.min() > 0.3 and values.max() < 1.3
    torch.testing.assert_close(network.orthogonalize(matrix), u * values @ vh, rtol=1e-6, atol=1e-6)
    assert not network.orthogonalize(0 * matrix).any()


def test_muon_steps_filters_along_the_orthogonalized_nesterov_gradient_at_a_fixed_norm_and_the_rest_as_sgd_does():
    shapes = (4, 3, 3, 3), (4,), (2, 5)
    filters, shift, linear = (noise(*shape).requires_grad_() for shape in shapes)
    optimizer = network.Muon([filters, torch.randn(4), shift, linear], lr=0.1, batch_size=20)
    references = [parameter.detach().clone().requires_grad_() for parameter in (shift, linear)]
    rates = [{"params": references[0], "lr": 2 / 4}, {"params": references[1], "lr": 2 * 3.3 / 25}]
    sgd = torch.optim.SGD(rates, momentum=0.85, nesterov=True)
    velocity = torch.zeros(4, 27)
    for seed in range(1, 4):
        state = copy.deepcopy(optimizer.state_dict())  # a stopped run goes on with it
        optimizer = network.Muon([filters, shift, linear], lr=0.1, batch_size=20)
        optimizer.load_state_dict(state)
        expected = filters.detach().flatten(1) * 2 / filters.detach().norm()
        filters.grad, shift.grad, linear.grad = (noise(*shape, seed=seed) for shape in shapes)
        velocity = 0.65 * velocity + filters.grad.flatten(1)
        expected -= 0.1 * network.orthogonalize(filters.grad.flatten(1) + 0.65 * velocity)
        for parameter, reference in zip((shift, linear), references, strict=True):
            reference.grad = parameter.grad.clone()
            reference.data.mul_(1 - 2e-5)
        optimizer.step()
        sgd.step()
        torch.testing.assert_close(filters.detach().flatten(1), expected)
        torch.testing.assert_close([shift, linear], references, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(precision, tolerance):
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


def test_a_card_that_this_pytorch_cannot_use_is_passed_over_or_named(monkeypatch, capsys):
    def fail_on_cuda(*shape, device):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nMore lines")
        return zeros(*shape)

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", fail_on_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert network.find_device("auto") == network.find_device("cpu") == "cpu"
    reason = (
        "cannot be used (CUDA error: no kernel image is available for execution on the device): continuing without it"
    )
    assert capsys.readouterr().out.splitlines() == [f"cuda {reason}"]
    for name, says in (("cuda", "no kernel image"), ("mps", "PyTorch sees only cuda, cpu")):
        with pytest.raises(network.UsageError, match=rf"^--device {name} cannot be used: .*{says}.*$"):
            network.find_device(name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("busy", [range(0), range(20, 45)])  # products during which the machine does something else
@pytest.mark.parametrize("bf16, expected", [(0.5, "bf16"), (0.9, "fp32"), (14, "fp32")])
def test_precision_is_the_faster_one_even_if_the_machine_is_busy_for_a_moment(busy, bf16, expected, monkeypatch):
    products = []

    def time_product(statement, globals, number):
        products.append(globals["a"].dtype)
        seconds = {torch.float32: 1, torch.bfloat16: bf16}[globals["a"].dtype]
        return seconds * (30 if len(products) - 1 in busy else 1)

    monkeypatch.setattr(network.timeit, "timeit", time_product)
    assert network.choose_precision("cpu") == expected and len(products) > 20
