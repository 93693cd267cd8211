"""The cross entropy against torch's in float64, and what it refuses."""

import ast
import math

import pytest
import torch
from conftest import ROOT, seeded
from hypothesis import given
from hypothesis import strategies as st

from loss import CrossEntropyLoss

shapes = st.one_of(
    st.tuples(st.integers(1, 6)),
    st.tuples(st.integers(0, 5), st.integers(1, 6)),
    st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
)
reductions = st.sampled_from(["none", "sum", "mean"])
smoothings = st.sampled_from([0.0, 0.1, 0.5, 1.0])
seeds = st.integers(0, 10**6)
LOGITS, CLASSES = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)


def random_case(shape, weighted, seed):
    """Logits, class targets and probabilities to go with them, class weights or None, and their generator."""
    generator = seeded(seed)
    dim = min(1, len(shape) - 1)
    logits = 3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    classes = torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :], generator=generator)
    probabilities = torch.randn(shape, dtype=torch.float64, generator=generator).softmax(dim)
    weight = torch.rand(shape[dim], dtype=torch.float64, generator=generator) + 0.1 if weighted else None
    return logits, classes, probabilities, weight, generator


def compare(logits, targets, **arguments):
    """The same value and gradients as torch.nn.CrossEntropyLoss, for a random mix of the unreduced losses."""
    leaves, results = [logits.requires_grad_()], []
    if targets.is_floating_point():
        leaves.append(targets.requires_grad_())
    for kind in (CrossEntropyLoss, torch.nn.CrossEntropyLoss):
        loss = kind(**arguments)(logits, targets)
        mix = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        results.append((loss.detach(), *torch.autograd.grad((loss * mix).sum(), leaves)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10, equal_nan=True)


@given(shapes, reductions, smoothings, st.booleans(), st.sampled_from([-100, -1, 0, 2]), seeds)
def test_class_targets_are_torchs(shape, reduction, smoothing, weighted, ignore_index, seed):
    logits, targets, _, weight, generator = random_case(shape, weighted, seed)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = ignore_index
    compare(logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing)


@given(shapes, reductions, smoothings, st.booleans(), st.sampled_from([-100, -1]), seeds)
def test_probability_targets_are_torchs(shape, reduction, smoothing, weighted, ignore_index, seed):
    logits, _, targets, weight, _ = random_case(shape, weighted, seed)
    compare(logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing)


def test_an_impossible_class_does_not_spoil_the_others():
    compare(torch.tensor([[1.0, -math.inf, 2.0]], dtype=torch.float64), torch.tensor([2]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_of_huge_logits_the_loss_is_finite_and_exact_and_of_their_dtype(dtype, smoothing):
    logits = torch.tensor([[1e4, 1e4, -1e4], [1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [8.0, 0.0, 0.0]])  # the last: 0.0007
    logits, targets = logits.to(dtype).requires_grad_(), torch.zeros(4, dtype=torch.long)
    loss = CrossEntropyLoss(reduction="none", label_smoothing=smoothing)(logits, targets)
    (gradient,) = torch.autograd.grad(loss.float().sum(), logits)
    precise = logits.detach().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(precise, targets, reduction="none", label_smoothing=smoothing)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), precise)
    tolerance = {"rtol": 5e-3 if dtype.itemsize == 2 else 1e-6, "atol": 1e-6}
    assert gradient.dtype == dtype and gradient.isfinite().all()
    for reduction in ("none", "sum", "mean"):
        criterion = CrossEntropyLoss(weight=torch.ones(3), reduction=reduction)
        assert criterion(logits, targets).dtype == criterion(logits, logits).dtype == dtype
    torch.testing.assert_close(loss.double(), exact, **tolerance)
    torch.testing.assert_close(gradient.double(), exact_gradient, **tolerance)


def test_a_class_in_a_byte_is_not_the_default_ignore_index():
    loss = CrossEntropyLoss()(torch.zeros(1, 200), torch.tensor([156], dtype=torch.uint8))  # -100 as a byte
    assert loss.item() == pytest.approx(math.log(200))


@pytest.mark.parametrize("bad", [3, -1, 10**12])
def test_a_class_that_does_not_exist_is_an_error_of_gather(bad):
    with pytest.raises(RuntimeError, match=f"index {bad} is out of bounds"):
        CrossEntropyLoss()(torch.zeros(2, 3), torch.tensor([0, bad]))


@pytest.mark.parametrize(
    "arguments", [{}, {"label_smoothing": 0.1}, {"weight": torch.tensor([0.5, 1, 2, 1])}, {"ignore_index": 2}]
)
def test_it_reads_no_data_and_so_works_under_vmap_and_compile_and_without_data(arguments):
    logits, targets = torch.randn(6, 4, generator=seeded()), torch.tensor([0, 1, 2, 3, 2, 1])
    ours, theirs = CrossEntropyLoss(**arguments), torch.nn.CrossEntropyLoss(**arguments)
    both = [targets]
    if "ignore_index" not in arguments:  # it does not go with probabilities; and alone, an ignored sample has no mean
        gradients = [torch.func.vmap(torch.func.grad(loss))(logits, targets) for loss in (ours, theirs)]
        torch.testing.assert_close(*gradients)
        both.append(logits.softmax(1))
    compiled = torch.compile(ours, fullgraph=True, backend="eager")  # a graph that breaks is an error
    torch.testing.assert_close([compiled(logits, own) for own in both], [theirs(logits, own) for own in both])
    ours.to("meta")
    assert all(ours(logits.to("meta"), own.to("meta")).is_meta for own in both)


@pytest.mark.parametrize(
    "logits, targets, arguments, says",
    [
        (LOGITS, torch.zeros(3, dtype=torch.long), {}, r"\(2,\).*\(2, 3\).*\(3,\)"),
        (LOGITS, torch.zeros(2), {}, "float32"),
        (LOGITS, CLASSES.int(), {}, "int32"),
        (LOGITS, LOGITS.long(), {}, "int64"),
        (LOGITS.long(), CLASSES, {}, "int64"),
        (torch.tensor(0.0), torch.tensor(0), {}, r"\(\)"),
        (LOGITS, CLASSES, {"weight": torch.ones(2)}, r"\(3,\).*\(2,\)"),
        (LOGITS, LOGITS, {"ignore_index": 0}, "ignore_index 0 goes"),
        (LOGITS, CLASSES, {"reduction": "median"}, "reduction.*median"),
        (LOGITS, CLASSES, {"label_smoothing": 1.5}, "label_smoothing.*1.5"),
        (LOGITS, CLASSES, {"label_smoothing": -0.1}, "label_smoothing.*-0.1"),
    ],
)
def test_what_is_out_of_range_or_does_not_go_together_is_named(logits, targets, arguments, says):
    with pytest.raises(ValueError, match=says):
        CrossEntropyLoss(**arguments)(logits, targets)


def test_the_loss_is_written_out_and_not_torchs_own():
    nodes = [*ast.walk(ast.parse((ROOT / "loss.py").read_text(encoding="utf-8")))]
    names = {getattr(node, field, None) for node in nodes for field in ("id", "attr", "name", "asname")}
    assert "amax" in names  # names are found at all
    assert not names & {"cross_entropy", "nll_loss", "NLLLoss", "cross_entropy_loss"}
    assert CrossEntropyLoss.__bases__ == (torch.nn.Module,)
