"""Batch norm against PyTorch in float64, finite differences and a sum done by hand; Figure 1 against the assignment."""

import ast
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import bn


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("rows, channels", [(2, 1), (7, 3), (40, 5)])
@pytest.mark.parametrize("options", [{}, {"eps": 0.01, "momentum": 0.3}])
def test_outputs_gradients_and_running_statistics_are_those_of_pytorch(rows, channels, options):
    ours, theirs = bn.BatchNorm(channels, **options), torch.nn.BatchNorm1d(channels, **options, dtype=torch.float64)
    ours.gamma, ours.beta = normal(2, channels)
    theirs.weight.data, theirs.bias.data = torch.tensor(ours.gamma), torch.tensor(ours.beta)
    for seed in range(1, 4):
        x, dy = 3 * normal(2, rows, channels, seed=seed) + seed
        x.flags.writeable = dy.flags.writeable = False  # whoever modifies them raises
        leaf = torch.tensor(x, requires_grad=True)
        y = theirs.train()(leaf)
        gradients = torch.autograd.grad(y, (leaf, theirs.weight, theirs.bias), torch.tensor(dy))
        results = ours.train().forward(x), *ours.backward(dy), ours.eval().forward(x)
        for result, expected in zip(results, (y, *gradients, theirs.eval()(leaf)), strict=True):
            assert result.dtype == np.float64
            np.testing.assert_allclose(result, expected.detach(), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose([ours.running_mean, ours.running_var], [theirs.running_mean, theirs.running_var])


def test_gradients_are_the_slopes_of_the_loss():
    layer, x, dy = bn.BatchNorm(3), *normal(2, 5, 3)
    layer.gamma, layer.beta = normal(2, 3, seed=1)
    layer.forward(x)
    for parameter, gradient in zip((x, layer.gamma, layer.beta), layer.backward(dy), strict=True):
        for place in np.ndindex(parameter.shape):
            losses = []
            for step in (1e-6, -2e-6, 1e-6):  # up, down, and back again
                parameter[place] += step
                losses.append(np.sum(dy * layer.forward(x)))
            assert gradient[place] == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("offset", [0, 1e4, 1e6])
def test_float32_stays_float32_and_is_accurate_far_from_zero(offset):
    x, dy = normal(2, 64, 3).astype(np.float32)
    x += np.float32(offset)
    near = torch.tensor(x.astype(np.float64) - offset, requires_grad=True)  # moved to zero, where nothing is lost
    y = torch.nn.functional.batch_norm(near, None, None, training=True)
    (dx,) = torch.autograd.grad(y, near, torch.tensor(dy, dtype=torch.float64))
    layer = bn.BatchNorm(3)
    for result, expected in [(layer.forward(x), y), (layer.backward(dy)[0], dx)]:
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected.detach(), rtol=1e-6, atol=1e-6)


def test_gradients_are_summed_in_float64():
    layer, x, dy = bn.BatchNorm(2), normal(131_072, 2).astype(np.float32), np.full((131_072, 2), 0.1, np.float32)
    layer.forward(x)
    np.testing.assert_allclose(layer.backward(dy)[2], 13107.2, rtol=1e-7)  # a sum in float32 ends at 13093.6


def test_backward_is_that_of_the_last_training_forward_whatever_came_after_it():
    layer, x, dy = bn.BatchNorm(3), *normal(2, 5, 3)
    with pytest.raises(RuntimeError, match="forward"):
        layer.backward(dy)
    y = layer.forward(x)
    expected = layer.backward(dy)
    y.fill(np.nan)
    layer.gamma *= 0
    layer.eval().forward(normal(4, 3))
    np.testing.assert_equal(layer.backward(dy), expected)


def test_a_single_row_is_refused_in_training_and_taken_in_inference():
    layer, x = bn.BatchNorm(3, eps=0), normal(1, 3)
    with pytest.raises(ValueError, match="2 rows"):
        layer.forward(x)
    np.testing.assert_array_equal(layer.eval().forward(x), x)  # the running statistics are still 0 and 1


def test_bad_shapes_and_dtypes_are_refused_by_name():
    layer, x = bn.BatchNorm(3), normal(4, 3)
    for bad in (x[0], x[:, :2], x.astype(int), x.astype(np.float16)):
        with pytest.raises(ValueError, match="x must be"):
            layer.forward(bad)
    layer.forward(x)
    with pytest.raises(ValueError, match="dy must"):
        layer.backward(x[:1])
    for name in ("gamma", "beta"):
        setattr(layer := bn.BatchNorm(3), name, np.ones((4, 3)))
        with pytest.raises(ValueError, match=name):
            layer.forward(x)


def test_the_class_has_no_loop():
    tree = ast.parse((ROOT / "bn.py").read_text(encoding="utf-8"))
    (batch_norm,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    assert not [node for node in ast.walk(batch_norm) if isinstance(node, (ast.For, ast.While, ast.comprehension))]


def test_bn_py_prints_figure_1_with_every_loss_that_the_assignment_shows(tmp_path):
    figure = subprocess.check_output([sys.executable, "-W", "error", ROOT / "bn.py"], cwd=tmp_path, text=True)
    assert figure == (ROOT / "results" / "figure1.txt").read_text()
    shown = (ROOT / "results" / "figure1_assignment.txt").read_text().splitlines()
    assert len(shown) == 20 and all(f"\n{line}" in f"\n{figure}" for line in shown)  # two of them are cut short
