"""Batch norm against torch in float64 and against finite differences; and Figure 1 of the assignment."""

import ast
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import bn

seeds = st.integers(0, 2**32 - 1)


@given(
    batch=st.integers(2, 12),
    channels=st.integers(1, 6),
    arguments=st.sampled_from([(), (1e-3,), (1e-5, 0.5), (np.float64(0.1), 1.0)]),  # eps and momentum
    dtype=st.sampled_from([np.float32, np.float64]),
    layout=st.sampled_from([np.array, np.asfortranarray, lambda a: a.repeat(2, 0).repeat(2, 1)[::2, ::2]]),
    seed=seeds,
)
def test_results_are_torchs_of_the_inputs_dtype_and_the_input_stays(batch, channels, arguments, dtype, layout, seed):
    rng = np.random.default_rng(seed)
    tolerance = 1e-8
    if dtype == np.float32:
        tolerance, arguments = 1e-4, (np.float64(0.1), 0.5)  # for a small variance it has no digits left
    ours = bn.BatchNorm(channels, *arguments)
    theirs = torch.nn.BatchNorm1d(channels, *arguments, dtype=torch.float64)
    ours.gamma, ours.beta = rng.normal(size=(2, channels))
    theirs.load_state_dict({"weight": torch.tensor(ours.gamma), "bias": torch.tensor(ours.beta)}, strict=False)
    for _ in range(3):
        x = layout(rng.normal(rng.normal(), 3, (batch, channels)).astype(dtype))
        dy = layout(rng.normal(size=(batch, channels)))
        before = x.copy(), dy.copy()
        tx = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        ty = theirs.train()(tx)
        gradients = torch.autograd.grad(ty, (tx, theirs.weight, theirs.bias), torch.tensor(dy))
        results = ours.train().forward(x), *ours.backward(dy), ours.eval().forward(x)
        for result, exact in zip(results, (ty, *gradients, theirs.eval()(tx)), strict=True):
            assert result.dtype == dtype
            np.testing.assert_allclose(result, exact.detach(), rtol=tolerance, atol=tolerance)
        assert np.array_equal(x, before[0]) and np.array_equal(dy, before[1])
    np.testing.assert_allclose(ours.running_mean, theirs.running_mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(ours.running_var, theirs.running_var, rtol=tolerance)


@given(batch=st.integers(2, 12), channels=st.integers(1, 6), eps=st.sampled_from([1e-3, 0.1]), seed=seeds)
def test_gradients_are_those_of_finite_differences(batch, channels, eps, seed):
    rng = np.random.default_rng(seed)
    layer = bn.BatchNorm(channels, eps)
    x, dy = rng.normal(size=(2, batch, channels))
    point = x, *rng.normal(size=(2, channels))

    def loss(x, gamma, beta):
        layer.gamma, layer.beta = gamma, beta
        return np.sum(dy * layer.forward(x))

    loss(*point)
    for place, gradient in enumerate(layer.backward(dy)):
        step = 1e-6 * rng.normal(size=gradient.shape)
        ahead, behind = list(point), list(point)
        ahead[place], behind[place] = point[place] + step, point[place] - step
        slope = (loss(*ahead) - loss(*behind)) / 2
        assert slope == pytest.approx(np.sum(gradient * step), rel=2e-4, abs=1e-10)


@given(
    batch=st.integers(2, 40),
    channels=st.integers(1, 5),
    spread=st.sampled_from([1e-42, 1e-20, 1e-3, 1.0, 1e15]),  # of which float32 can hold the squares
    offset=st.sampled_from([0.0, 1.0, -30.0, 1e4]),
    repeated=st.sampled_from([1, 2, 40]),  # 40: every channel is constant
    seed=seeds,
)
def test_float32_of_any_size_is_close_to_the_definition_in_float64(batch, channels, spread, offset, repeated, seed):
    rng = np.random.default_rng(seed)
    layer = bn.BatchNorm(channels, momentum=1.0)
    layer.gamma, layer.beta = rng.normal(size=(2, channels))
    x = rng.normal(size=(batch, channels)) + offset
    x = (x * spread).astype(np.float32)[np.arange(batch) // repeated * repeated]
    dy = rng.normal(size=(batch, channels)).astype(np.float32)
    y, (dx, dgamma, dbeta) = layer.forward(x), layer.backward(dy)
    # Not torch's own, which goes by x * scale + shift: those two cancel where x is huge.
    leaves = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (x, layer.gamma, layer.beta)]
    tx, gamma, beta = leaves
    centered = tx - tx.mean(0)
    var = (centered**2).mean(0)
    inv_std = (var + 1e-5) ** -0.5
    ty = gamma * centered * inv_std + beta
    exact = torch.autograd.grad(ty, leaves, torch.tensor(dy, dtype=torch.float64))
    tolerance = 1e-5 * max(1, abs(offset))  # next to a large offset, float32 has so many digits less for the spread
    np.testing.assert_allclose(y, ty.detach(), atol=tolerance)
    np.testing.assert_allclose(dx / inv_std.detach().numpy(), exact[0] / inv_std.detach(), atol=tolerance * 4)
    np.testing.assert_allclose(dgamma, exact[1], atol=tolerance * batch)
    np.testing.assert_allclose(dbeta, exact[2], atol=tolerance * batch)
    # The running mean has more digits than a sum in float32 has.
    np.testing.assert_allclose(layer.running_mean, tx.detach().mean(0), rtol=0, atol=1e-5 * spread + 1e-36)
    unbiased = var.detach() * batch / (batch - 1)
    np.testing.assert_allclose(layer.running_var, unbiased, rtol=tolerance, atol=(tolerance * spread) ** 2 + 1e-36)


def test_data_far_from_zero_is_still_normalized():
    spread = np.random.default_rng(0).normal(size=(5000, 4))
    y = bn.BatchNorm(4, eps=0).forward(spread + 1e8)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(y.var(0), 1, rtol=1e-12)


def test_backward_belongs_to_the_last_forward_in_training():
    rng = np.random.default_rng(0)
    layer, x, dy = bn.BatchNorm(3), *rng.normal(size=(2, 5, 3))
    layer.eval().forward(x)
    with pytest.raises(RuntimeError, match=r"^backward needs a forward in training mode first$"):
        layer.train().backward(dy)
    layer.forward(rng.normal(size=(6, 3)))
    layer.forward(x)
    expected = layer.backward(dy)
    layer.forward(x).fill(np.nan)  # the result is the caller's, whatever becomes of it
    layer.gamma = np.zeros(3)  # and so is what it has made of gamma since
    layer.eval().forward(rng.normal(size=(4, 3)))
    assert layer.training is False and layer.train().training is True
    for result, before in zip(layer.backward(dy), expected, strict=True):
        np.testing.assert_array_equal(result, before)


def test_a_wrong_shape_or_dtype_is_named():
    layer = bn.BatchNorm(3)
    for dtype in (np.int64, np.float16, complex):
        with pytest.raises(ValueError, match=rf"^x must be float32 or float64, \(B, 3\), got {np.dtype(dtype).name}, "):
            layer.forward(np.zeros((4, 3), dtype))
    layer.forward(np.zeros((4, 3)))
    for shape in ((3,), (4, 2), (2, 3, 4)):
        for forward in (layer.forward, bn.BatchNorm(3).eval().forward):
            with pytest.raises(ValueError, match="^x must .*got float64, " + re.escape(str(shape))):
                forward(np.zeros(shape))
        with pytest.raises(ValueError, match=r"^dy must have the shape .*\(4, 3\), got " + re.escape(str(shape))):
            layer.backward(np.zeros(shape))


@pytest.mark.parametrize("rows", [0, 1])
def test_training_needs_two_rows_and_inference_does_not(rows):
    layer, x = bn.BatchNorm(3, eps=0), np.ones((rows, 3))
    with pytest.raises(ValueError, match=re.escape(f"({rows}, 3)")):
        layer.forward(x)
    np.testing.assert_array_equal(layer.eval().forward(x), x)  # running statistics are still 0 and 1


def test_eps_and_momentum_out_of_range_are_named():
    for name, value in zip(["momentum"] * 3 + ["eps"] * 3, (None, 1.5, -0.1, None, -1, np.nan), strict=True):
        with pytest.raises(ValueError, match=f"^{name} must be a number from 0 to .*, got {value}$"):
            bn.BatchNorm(2, **{name: value})


def test_bn_py_prints_figure_1(tmp_path):
    command = [sys.executable, "-W", "error", ROOT / "bn.py"]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    printed = dict(line.rsplit(": ", 1) for line in outcome.stdout.splitlines())
    assert list(printed) == [*(f"iteration: {number}, loss" for number in range(1, 51)), "validation loss"]
    figure = (ROOT / "results" / "figure1_assignment.txt").read_text().splitlines()
    assert len(figure) == 20
    for line in figure:
        start, loss = line.rsplit(": ", 1)
        assert printed[start].startswith(loss)  # the figure cuts two of them short
    assert printed["validation loss"] == loss  # the last, in full


@pytest.mark.parametrize("script, packages", [("bn.py", {"numpy"}), ("network.py", {"torch"})])
def test_a_script_imports_nothing_but_its_package_and_the_standard_library(script, packages):
    nodes = [*ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8")))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == packages
