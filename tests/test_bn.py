"""Batch norm against PyTorch in float64 and finite differences; Figure 1 against the assignment and PyTorch."""

import ast
import base64
import math
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import bn

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(2, 40), st.integers(1, 5))
FIGURE = (ROOT / "results" / "figure1.txt").read_text()


@given(shapes, st.sampled_from([(), (1e-3, 0.0), (1e-5, 0.5), (np.float64(0.1), 1.0)]), seeds)
def test_float64_gives_pytorchs_results_in_training_and_inference(shape, eps_and_momentum, seed):
    rng = np.random.default_rng(seed)
    ours = bn.BatchNorm(shape[1], *eps_and_momentum)
    theirs = torch.nn.BatchNorm1d(shape[1], *eps_and_momentum, dtype=torch.float64)
    ours.gamma, ours.beta = rng.normal(size=(2, shape[1]))
    theirs.load_state_dict({"weight": torch.tensor(ours.gamma), "bias": torch.tensor(ours.beta)}, strict=False)
    for _ in range(3):
        x = rng.normal(rng.normal(), 3, shape)
        dy = rng.normal(size=shape)
        x.flags.writeable = dy.flags.writeable = False
        tx = torch.tensor(x, requires_grad=True)
        ty = theirs.train()(tx)
        gradients = torch.autograd.grad(ty, (tx, theirs.weight, theirs.bias), torch.tensor(dy))
        results = ours.train().forward(x), *ours.backward(dy), ours.eval().forward(x)
        for result, exact in zip(results, (ty, *gradients, theirs.eval()(tx)), strict=True):
            assert result.dtype == np.float64
            np.testing.assert_allclose(result, exact.detach(), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(ours.running_mean, theirs.running_mean, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(ours.running_var, theirs.running_var, rtol=1e-8)


@given(shapes, seeds)
def test_gradients_match_finite_differences(shape, seed):
    rng = np.random.default_rng(seed)
    layer = bn.BatchNorm(shape[1], eps=0.1)
    x, dy, step_x = rng.normal(size=(3, *shape))
    gamma, beta, step_gamma, step_beta = rng.normal(size=(4, shape[1]))

    def loss(step):
        layer.gamma, layer.beta = gamma + step * step_gamma, beta + step * step_beta
        return np.sum(dy * layer.forward(x + step * step_x))

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    loss(0)
    slopes = map(np.vdot, layer.backward(dy), (step_x, step_gamma, step_beta))
    assert slope == pytest.approx(sum(slopes), rel=2e-4, abs=1e-4)


@given(shapes, st.sampled_from([1e-42, 1e-3, 1.0, 1e30]), st.sampled_from([0, 1e6]), st.sampled_from([1, 2, 40]), seeds)
def test_float32_stays_accurate_at_any_size_and_offset(shape, spread, offset, repeated, seed):
    rng = np.random.default_rng(seed)
    layer = bn.BatchNorm(shape[1], momentum=1.0)
    layer.gamma, layer.beta = rng.normal(size=(2, shape[1]))
    x = (spread * rng.normal(offset, size=shape)).astype(np.float32)
    x = x[np.arange(len(x)) // repeated * repeated]
    dy = rng.normal(size=shape)
    results = layer.forward(x), *layer.backward(dy), layer.eval().forward(x)
    # PyTorch's own layer computes x * scale + shift, which cancel where x is huge. So here is the definition.
    leaves = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (x, layer.gamma, layer.beta)]
    tx, gamma, beta = leaves
    std = (tx.var(0, unbiased=False) + 1e-5).sqrt()
    y = gamma * (tx - tx.mean(0)) / std + beta
    gradients = torch.autograd.grad(y, leaves, torch.tensor(dy), retain_graph=True)
    inference = gamma * (tx - tx.mean(0)) / (tx.var(0) + 1e-5).sqrt() + beta
    for result, exact, unit in zip(results, (y, *gradients, inference), (1, 1 / std, 1, 1, 1), strict=True):
        assert result.dtype == np.float32
        torch.testing.assert_close(torch.tensor(result) / unit, exact / unit, rtol=1e-6, atol=1e-5, check_dtype=False)
    np.testing.assert_allclose(layer.running_mean, tx.mean(0).detach(), rtol=1e-12, atol=1e-12 * spread)
    np.testing.assert_allclose(layer.running_var, tx.var(0).detach(), rtol=1e-8)


def test_variance_of_float64_rows_near_1e8_is_accurate():
    x = np.random.default_rng(0).normal(size=(5000, 4)) + 1e8
    layer = bn.BatchNorm(4, momentum=1)
    near = torch.tensor(x - 1e8)  # exact
    np.testing.assert_allclose(layer.forward(x), functional.batch_norm(near, None, None, training=True), atol=1e-6)
    np.testing.assert_allclose(layer.running_var, near.var(0), rtol=1e-10)


def test_backward_before_a_training_forward_raises():
    layer = bn.BatchNorm(3)
    layer.eval().forward(np.zeros((5, 3)))
    with pytest.raises(RuntimeError, match=r"^backward needs a forward in training mode first$"):
        layer.train().backward(np.zeros((5, 3)))


def test_backward_uses_the_last_training_forward_even_after_inference():
    rng = np.random.default_rng(0)
    layer, x, dy = bn.BatchNorm(3), *rng.normal(size=(2, 5, 3))
    layer.forward(rng.normal(size=(6, 3)))
    y = layer.forward(x)
    expected = layer.backward(dy)
    y.fill(np.nan)
    layer.gamma *= 0
    layer.eval().forward(rng.normal(size=(4, 3)))
    for result, before in zip(layer.backward(dy), expected, strict=True):
        np.testing.assert_array_equal(result, before)


@pytest.mark.parametrize("x", [np.zeros((4, 3), int), np.zeros((4, 3), np.float16), np.zeros(3), np.zeros((4, 2))])
def test_error_names_x_of_bad_dtype_or_shape(x):
    for layer in (bn.BatchNorm(3), bn.BatchNorm(3).eval()):
        with pytest.raises(ValueError, match=re.escape(f"float32 or float64, (B, 3), got {x.dtype}, {x.shape}")):
            layer.forward(x)


def test_error_names_dy_of_bad_shape():
    layer = bn.BatchNorm(3)
    layer.forward(np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"^dy must have the shape .*\(4, 3\), got \(1, 3\)$"):
        layer.backward(np.zeros((1, 3)))


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize("shape", [(3, 1), (1,), ()])
def test_error_names_gamma_and_beta_of_bad_shape(name, shape):
    layer = bn.BatchNorm(3)
    setattr(layer, name, np.ones(shape))
    for mode in (layer.train, layer.eval):
        with pytest.raises(ValueError, match=rf"^{name} must have the shape \(3,\), got {re.escape(str(shape))}$"):
            mode().forward(np.zeros((3, 3)))


@pytest.mark.parametrize("rows", [0, 1])
def test_training_needs_two_rows_but_inference_takes_one(rows):
    layer, x = bn.BatchNorm(3, eps=0), np.ones((rows, 3))
    with pytest.raises(ValueError, match=re.escape(f"({rows}, 3)")):
        layer.forward(x)
    np.testing.assert_array_equal(layer.eval().forward(x), x)  # running statistics are still 0 and 1


@pytest.mark.parametrize("name, says", [("eps", "0 or more"), ("momentum", "from 0 to 1")])
def test_error_names_eps_and_momentum_out_of_range(name, says):
    for bad in (-0.1, None, math.nan, *([1.1] if name == "momentum" else [])):
        with pytest.raises(ValueError, match=f"^{name} must be {says}, got {bad}$"):
            bn.BatchNorm(2, **{name: bad})


def test_batch_norm_class_has_no_loop():
    tree = ast.parse((ROOT / "bn.py").read_text(encoding="utf-8"))
    nodes = [node for part in tree.body if isinstance(part, ast.ClassDef) for node in ast.walk(part)]
    loops = ast.For, ast.AsyncFor, ast.While, ast.comprehension, ast.Lambda
    assert [ast.unparse(node) for node in nodes if isinstance(node, loops)] == []
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    known = {"len", "ValueError", "RuntimeError", "np.ones", "np.zeros", "np.array", "np.asarray", "np.sqrt"}
    assert {call for call in calls if call.removeprefix("np.").isidentifier()} == known  # no map, no np.vectorize


@pytest.mark.parametrize("logit, target, loss", [(1e3, 0, 1e3), (-1e3, 1, 1e3), (1e3, 1, 0), (-40, 0, math.exp(-40))])
def test_binary_cross_entropy_is_exact_for_huge_logits(logit, target, loss):
    assert bn.binary_cross_entropy(np.array([logit]), np.array([target])) == pytest.approx(loss, rel=1e-12, abs=0)


def test_output_of_bn_py_equals_figure1_txt(tmp_path):
    command = [sys.executable, "-W", "error", ROOT / "bn.py"]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (outcome.returncode, outcome.stderr, outcome.stdout) == (0, "", FIGURE)


def test_figure1_txt_has_every_loss_shown_in_the_assignment():
    lines = (ROOT / "results" / "figure1_assignment.txt").read_text().splitlines()
    assert len(lines) == 20
    assert [line for line in lines if f"\n{line}" not in f"\n{FIGURE}"] == []  # two of the losses are cut short


def test_pytorchs_batch_norm_gives_the_same_losses_and_validation_loss_0_028781():
    pixels = np.frombuffer(zlib.decompress(base64.b85decode(bn.DIGITS.replace("\n", ""))), dtype=np.uint8)
    images, targets = torch.tensor(pixels.reshape(10, 784) / 255), torch.eye(10, 1, dtype=torch.float64)
    draw = np.random.RandomState(14).randn
    parameters = [torch.tensor(draw(*shape)).requires_grad_() for shape in ((784, 16), (16, 1), (16,), (16,))]
    w1, w2, gamma, beta = parameters
    running = torch.zeros(16, dtype=torch.float64), torch.ones(16, dtype=torch.float64)  # averages, momentum 0.1

    def loss(part, training):
        hidden = functional.batch_norm(images[part] @ w1, *running, gamma, beta, training).sigmoid()
        return functional.binary_cross_entropy_with_logits(hidden @ w2, targets[part], reduction="sum")

    for line in FIGURE.splitlines()[:50]:
        value = loss(slice(9), training=True)
        assert line.endswith(f"loss: {value:.6f}")
        for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            parameter.data -= 0.1 * gradient
    assert f"{loss(slice(9, 10), training=False):.6f}" == "0.028781"  # and with bn.py's plain averages 0.028552


@pytest.mark.parametrize("script, packages", [("bn.py", {"numpy"}), ("network.py", {"torch"})])
def test_bn_py_needs_only_numpy_and_loss_py_only_torch(script, packages):
    nodes = [*ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8")))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == packages
