"""Batch norm against torch in float64 and against finite differences; and Figure 1 of the assignment."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bn

cases = given(
    batch=st.integers(2, 12),
    channels=st.integers(1, 6),
    eps=st.sampled_from([1e-5, 1e-3, 0.1]),
    momentum=st.sampled_from([0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)


def pair(channels, eps, momentum, rng):
    """A BatchNorm and torch's, in float64, with the same random gamma and beta."""
    ours = bn.BatchNorm(channels, eps, momentum)
    theirs = torch.nn.BatchNorm1d(channels, eps, momentum, dtype=torch.float64)
    ours.gamma, ours.beta = rng.normal(size=(2, channels))
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(ours.gamma))
        theirs.bias.copy_(torch.from_numpy(ours.beta))
    return ours, theirs


@cases
def test_forward_backward_and_inference_are_torchs(batch, channels, eps, momentum, seed):
    rng = np.random.default_rng(seed)
    ours, theirs = pair(channels, eps, momentum, rng)
    for _ in range(3):
        x, dy = rng.normal(rng.normal(), 3, (batch, channels)), rng.normal(size=(batch, channels))
        tx = torch.tensor(x, requires_grad=True)
        ty = theirs(tx)
        theirs.zero_grad()
        ty.backward(torch.from_numpy(dy))
        np.testing.assert_allclose(ours.forward(x), ty.detach(), atol=1e-9)
        for gradient, expected in zip(ours.backward(dy), (tx, theirs.weight, theirs.bias), strict=True):
            np.testing.assert_allclose(gradient, expected.grad, atol=1e-8)
    np.testing.assert_allclose(ours.running_mean, theirs.running_mean, atol=1e-12)
    np.testing.assert_allclose(ours.running_var, theirs.running_var, rtol=1e-9)
    ours.eval()
    for rows in (1, batch):
        x = rng.normal(size=(rows, channels))
        np.testing.assert_allclose(ours.forward(x), theirs.eval()(torch.from_numpy(x)).detach(), atol=1e-9)
    np.testing.assert_allclose(ours.running_mean, theirs.running_mean, atol=1e-12)  # inference changes nothing


def test_defaults_are_torchs():
    ours, theirs = bn.BatchNorm(2), torch.nn.BatchNorm1d(2, dtype=torch.float64)
    x = np.random.default_rng(0).normal(5, 0.01, (6, 2))
    np.testing.assert_allclose(ours.forward(x), theirs(torch.from_numpy(x)).detach(), atol=1e-12)
    np.testing.assert_allclose(ours.running_mean, theirs.running_mean, rtol=1e-12)
    np.testing.assert_allclose(ours.running_var, theirs.running_var, rtol=1e-12)


@cases
def test_gradients_are_those_of_finite_differences(batch, channels, eps, momentum, seed):
    rng = np.random.default_rng(seed)
    layer, _ = pair(channels, max(eps, 1e-3), momentum, rng)
    x, dy = rng.normal(size=(2, batch, channels))
    layer.forward(x)
    for name, gradient in zip(("x", "gamma", "beta"), layer.backward(dy), strict=True):
        value = x if name == "x" else getattr(layer, name)
        step = 1e-6 * rng.normal(size=value.shape)

        def loss(moved, name=name, value=value):
            if name == "x":
                return np.sum(dy * layer.forward(moved))
            setattr(layer, name, moved)
            result = np.sum(dy * layer.forward(x))
            setattr(layer, name, value)
            return result

        slope = (loss(value + step) - loss(value - step)) / 2
        assert slope == pytest.approx(np.sum(gradient * step), rel=2e-4, abs=1e-10)


@cases
def test_float32_stays_float32_and_is_close_to_torch_in_float64(batch, channels, eps, momentum, seed):
    rng = np.random.default_rng(seed)
    layer, reference = pair(channels, max(eps, 1e-2), momentum, rng)
    x, dy = rng.normal(size=(2, batch, channels)).astype(np.float32)
    tx = torch.from_numpy(x).double().requires_grad_()
    ty = reference(tx)
    ty.backward(torch.from_numpy(dy).double())
    results = layer.forward(x), *layer.backward(dy), layer.eval().forward(x)
    expected = ty, tx.grad, reference.weight.grad, reference.bias.grad, reference.eval()(tx)
    for result, exact in zip(results, expected, strict=True):
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, exact.detach(), rtol=1e-4, atol=1e-4)


@given(
    batch=st.integers(2, 40),
    channels=st.integers(1, 5),
    spread=st.sampled_from([1e-42, 1e-20, 1e-3, 1.0, 1e15]),  # of which float32 can hold the squares
    offset=st.sampled_from([0.0, 1.0, -30.0, 1e4]),
    repeated=st.integers(1, 3),
    layout=st.sampled_from([np.ascontiguousarray, np.asfortranarray, lambda a: np.repeat(a, 2, axis=0)[::2]]),
    seed=st.integers(0, 2**32 - 1),
)
def test_float32_of_any_size_and_layout_is_close_to_torch_in_float64(
    batch, channels, spread, offset, repeated, layout, seed
):
    rng = np.random.default_rng(seed)
    layer = bn.BatchNorm(channels, momentum=1.0)
    layer.gamma, layer.beta = rng.normal(size=(2, channels))
    x = rng.normal(size=(batch, channels)) + offset
    x = layout((x * spread).astype(np.float32)[np.arange(batch) // repeated * repeated])
    dy = layout(rng.normal(size=(batch, channels)).astype(np.float32))
    y, (dx, dgamma, dbeta) = layer.forward(x), layer.backward(dy)
    # In float64, by the definition. (torch's own goes by x * scale + shift, and those two cancel where x is huge.)
    leaves = [torch.tensor(array.astype(np.float64), requires_grad=True) for array in (x, layer.gamma, layer.beta)]
    tx, gamma, beta = leaves
    centered = tx - tx.mean(0)
    var = (centered**2).mean(0)
    inv_std = (var + 1e-5) ** -0.5
    ty = gamma * centered * inv_std + beta
    exact = torch.autograd.grad(ty, leaves, torch.tensor(dy.astype(np.float64)))
    tolerance = 1e-5 * max(1, abs(offset))  # next to a large offset, float32 has so many digits less for the spread
    np.testing.assert_allclose(y, ty.detach(), atol=tolerance)
    np.testing.assert_allclose(dx / inv_std.detach().numpy(), exact[0] / inv_std.detach(), atol=tolerance * 4)
    np.testing.assert_allclose(dgamma, exact[1], atol=tolerance * batch)
    np.testing.assert_allclose(dbeta, exact[2], atol=tolerance * batch)
    unbiased = var.detach() * batch / (batch - 1)
    np.testing.assert_allclose(layer.running_var, unbiased, rtol=tolerance, atol=1e-36)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_have_the_dtype_of_the_input(dtype):
    layer, x = bn.BatchNorm(3), np.random.default_rng(0).normal(size=(4, 3)).astype(dtype)
    results = layer.forward(x), *layer.backward(x.astype(np.float64)), layer.eval().forward(x)
    assert [result.dtype for result in results] == [dtype] * 5


@pytest.mark.parametrize("layout", [np.asfortranarray, lambda a: np.repeat(a, 2, axis=1)[:, ::2]])
def test_inputs_are_never_modified_whatever_their_layout(layout):
    rng = np.random.default_rng(0)
    plain_x, plain_dy = rng.normal(size=(2, 7, 3))
    x, dy = layout(plain_x), layout(plain_dy)
    layer, other = bn.BatchNorm(3), bn.BatchNorm(3)
    np.testing.assert_allclose(layer.forward(x), other.forward(plain_x), atol=1e-12)
    for result, expected in zip(layer.backward(dy), other.backward(plain_dy), strict=True):
        np.testing.assert_allclose(result, expected, atol=1e-12)
    layer.eval().forward(x)
    assert np.array_equal(x, plain_x) and np.array_equal(dy, plain_dy)


@pytest.mark.parametrize("offset", [0, 1e8, -1e8])
def test_data_far_from_zero_is_still_normalised(offset):
    spread = np.random.default_rng(0).normal(size=(5000, 4))
    layer = bn.BatchNorm(4, eps=0, momentum=1)
    y = layer.forward(spread + offset)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(y.var(0), 1, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, spread.var(0, ddof=1), rtol=1e-6)


def test_the_running_mean_has_more_digits_than_a_sum_in_float32():
    x = np.random.default_rng(0).normal(1e4, 1, (5000, 4)).astype(np.float32)
    layer = bn.BatchNorm(4, momentum=1)
    layer.forward(x)
    np.testing.assert_allclose(layer.running_mean, x.mean(0, dtype=np.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1e8, 0.1])
def test_a_constant_channel_gives_beta_and_finite_gradients(value):
    layer = bn.BatchNorm(2)
    layer.beta = np.array([3.0, -1.0])
    np.testing.assert_allclose(layer.forward(np.full((6, 2), value)), np.tile(layer.beta, (6, 1)), atol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in layer.backward(np.arange(12.0).reshape(6, 2)))


def test_backward_belongs_to_the_last_forward_in_training():
    rng = np.random.default_rng(0)
    layer, x, dy = bn.BatchNorm(3), *rng.normal(size=(2, 5, 3))
    layer.forward(rng.normal(size=(6, 3)))
    layer.forward(x).fill(np.nan)  # the result is the caller's, whatever becomes of it
    other = bn.BatchNorm(3)
    other.forward(x)
    expected = other.backward(dy)
    layer.eval().forward(rng.normal(size=(4, 3)))
    assert layer.training is False and layer.train().training is True
    for result, before in zip(layer.backward(dy), expected, strict=True):
        assert np.array_equal(result, before)


@pytest.mark.parametrize("shape", [(3,), (4, 2), (2, 3, 4)])
def test_a_wrong_shape_is_named_with_the_right_one(shape):
    layer = bn.BatchNorm(3)
    layer.forward(np.zeros((4, 3)))
    for name, call in (("x", layer.forward), ("dy", layer.backward), ("x", layer.eval().forward)):
        with pytest.raises(ValueError, match=f"^{name} must " + re.escape("have shape (B, 3), got " + str(shape))):
            call(np.zeros(shape))


@pytest.mark.parametrize("rows", [0, 1])
def test_training_needs_two_rows_and_inference_does_not(rows):
    layer, x = bn.BatchNorm(3, eps=0), np.ones((rows, 3))
    with pytest.raises(ValueError, match=re.escape(f"({rows}, 3)")):
        layer.forward(x)
    np.testing.assert_array_equal(layer.eval().forward(x), x)  # running statistics are still 0 and 1


@pytest.mark.parametrize(
    "arguments",
    [{"momentum": None}, {"momentum": 1.5}, {"momentum": -0.1}, {"eps": None}, {"eps": -1}, {"eps": np.nan}],
)
def test_eps_and_momentum_out_of_range_are_named(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=f"^{name} must be a number from 0 to .*, got {value}$"):
        bn.BatchNorm(2, **arguments)


def test_other_misuse_is_named():
    layer = bn.BatchNorm(3)
    layer.eval().forward(np.zeros((4, 3)))
    with pytest.raises(RuntimeError, match=r"^backward needs a forward in training mode first$"):
        layer.train().backward(np.zeros((4, 3)))
    for dtype in (np.int64, np.float16, complex):
        with pytest.raises(ValueError, match=f"^x must .* got {np.dtype(dtype).name}"):
            layer.forward(np.zeros((4, 3), dtype))
    layer.forward(np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(5, 3\)"):
        layer.backward(np.zeros((5, 3)))


def test_bn_py_prints_figure_1(tmp_path):
    command = [sys.executable, "-W", "error", Path(bn.__file__)]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    printed = dict(line.rsplit(": ", 1) for line in outcome.stdout.splitlines())
    assert list(printed) == [*(f"iteration: {number}, loss" for number in range(1, 51)), "validation loss"]
    figure = (Path(bn.__file__).parent / "results" / "figure1_assignment.txt").read_text().splitlines()
    assert len(figure) == 20
    for line in figure:
        start, loss = line.rsplit(": ", 1)
        assert printed[start].startswith(loss)  # the figure cuts two of them short
    assert printed["validation loss"] == loss  # the last, in full


def test_bn_py_imports_nothing_but_numpy_and_the_standard_library():
    imported = set()
    for node in ast.walk(ast.parse(Path(bn.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy"}
