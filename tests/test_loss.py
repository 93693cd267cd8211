"""The cross entropy against torch's in float64, against finite differences and against cases worked out by hand."""

import ast
import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import loss as loss_module
from loss import CrossEntropyLoss

shapes = st.one_of(
    st.tuples(st.integers(1, 6)),
    st.tuples(st.integers(1, 5), st.integers(1, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
)
reductions = st.sampled_from(["none", "sum", "mean"])
smoothings = st.sampled_from([0.0, 0.1, 0.5, 1.0])


def random_case(shape, weighted, seed):
    """Logits, the shape of class targets, class weights or None, and the generator that drew them."""
    generator = torch.Generator().manual_seed(seed)
    classes = shape[0] if len(shape) == 1 else shape[1]
    logits = 3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    weight = torch.rand(classes, dtype=torch.float64, generator=generator) + 0.1 if weighted else None
    return logits, (shape[0], *shape[2:]) if len(shape) > 1 else (), classes, weight, generator


def compare(logits, targets, **arguments):
    """The same value and gradients as torch.nn.CrossEntropyLoss, for a random mix of the unreduced losses."""
    results = []
    for loss_class in (CrossEntropyLoss, torch.nn.CrossEntropyLoss):
        inputs = [logits.clone().requires_grad_()]
        if targets.is_floating_point():
            inputs.append(targets.clone().requires_grad_())
        loss = loss_class(**arguments)(inputs[0], inputs[-1] if len(inputs) == 2 else targets)
        mix = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        results.append((loss.detach(), *torch.autograd.grad((loss * mix).sum(), inputs)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, equal_nan=True)


@given(shapes, reductions, smoothings, st.booleans(), st.sampled_from([-100, -1, 0, 2]), st.integers(0, 10**6))
def test_class_targets_are_torchs(shape, reduction, smoothing, weighted, ignore_index, seed):
    logits, target_shape, classes, weight, generator = random_case(shape, weighted, seed)
    targets = torch.randint(classes, target_shape, generator=generator)
    ignored = torch.rand(target_shape, generator=generator) < 0.3
    targets = torch.where(ignored, ignore_index, targets)
    compare(logits, targets, weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing)


@given(shapes, reductions, smoothings, st.booleans(), st.integers(0, 10**6))
def test_probability_targets_are_torchs(shape, reduction, smoothing, weighted, seed):
    logits, _, _, weight, generator = random_case(shape, weighted, seed)
    targets = torch.randn(shape, dtype=torch.float64, generator=generator).softmax(0 if len(shape) == 1 else 1)
    compare(logits, targets, weight=weight, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_gradients_are_those_of_finite_differences(smoothing):
    logits, _, _, weight, generator = random_case((3, 4, 2), True, 0)
    targets = torch.randint(4, (3, 2), generator=generator)
    loss = CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    assert torch.autograd.gradcheck(lambda z: loss(z, targets), logits.requires_grad_())
    probabilities = torch.rand((3, 4, 2), dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(loss, (logits, probabilities))


def test_by_hand():
    half = CrossEntropyLoss()(torch.zeros(1, 2), torch.tensor([0]))
    assert half.item() == pytest.approx(math.log(2))
    logits = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]])  # probabilities 1/4, 3/4 and 3/4, 1/4
    weighted = CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))(logits, torch.tensor([0, 1]))
    assert weighted.item() == pytest.approx((1 * math.log(4) + 2 * math.log(4)) / 3)
    mixed = CrossEntropyLoss()(logits[:1], torch.tensor([[0.5, 0.5]]))
    assert mixed.item() == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(4 / 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_huge_logits_stay_finite_and_exact(dtype, smoothing):
    logits = torch.tensor([[1e4, 1e4, -1e4], [1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [-1e4, -1e4, -2e4]])
    logits, targets = logits.to(dtype).requires_grad_(), torch.zeros(4, dtype=torch.long)
    loss = CrossEntropyLoss(reduction="none", label_smoothing=smoothing)(logits, targets)
    (gradient,) = torch.autograd.grad(loss.float().sum(), logits)
    precise = logits.detach().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(precise, targets, reduction="none", label_smoothing=smoothing)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), precise)
    tolerance = dict.fromkeys(("rtol", "atol"), 1e-2 if dtype.itemsize == 2 else 1e-6)
    assert loss.dtype == gradient.dtype == dtype and gradient.isfinite().all()
    torch.testing.assert_close(loss.double(), exact, **tolerance)
    torch.testing.assert_close(gradient.double(), exact_gradient, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_result_has_the_dtype_of_the_logits(dtype, reduction):
    loss = CrossEntropyLoss(weight=torch.ones(3), reduction=reduction)
    for targets in (torch.tensor([0, 2]), torch.full((2, 3), 1 / 3)):
        assert loss(torch.zeros(2, 3, dtype=dtype), targets).dtype == dtype


def test_ten_half_precision_classes_do_not_overflow_on_the_way():
    logits = torch.full((1, 10), -1e4, dtype=torch.float16)
    logits[0, 0] = 1e4  # the ten losses of 2e4 that smoothing adds up are more than float16 holds
    loss = CrossEntropyLoss(label_smoothing=0.5)(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(0.05 * 9 * 2e4, rel=1e-2)


def test_the_summed_weights_of_half_precision_do_not_overflow():
    loss = CrossEntropyLoss(weight=torch.ones(2, dtype=torch.float16))
    logits, targets = torch.zeros(70_000, 2, dtype=torch.float16), torch.zeros(70_000, dtype=torch.long)
    assert loss(logits, targets).item() == pytest.approx(math.log(2), rel=1e-3)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_sample_at_all(reduction):
    logits = torch.zeros(0, 3, dtype=torch.float64)
    compare(logits, torch.zeros(0, dtype=torch.long), reduction=reduction)
    compare(logits, logits, reduction=reduction)


def test_ignore_index_may_be_one_more_than_the_last_class():
    compare(torch.randn(3, 4, dtype=torch.float64), torch.tensor([1, 4, 3]), ignore_index=4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_all_ignored_is_nan_for_the_mean_and_zero_for_the_sum(smoothing):
    logits, targets = torch.zeros(4, 3), torch.full((4,), -100)
    for reduction, expected in (("mean", math.nan), ("sum", 0.0), ("none", [0.0] * 4)):
        arguments = {"reduction": reduction, "label_smoothing": smoothing}
        torch.testing.assert_close(
            CrossEntropyLoss(**arguments)(logits, targets), torch.tensor(expected), equal_nan=True
        )
        compare(logits, targets, **arguments)  # the gradients too


def test_a_drop_in_in_its_other_ways():
    loss = CrossEntropyLoss(weight=torch.ones(3))
    assert loss.double().weight.dtype == torch.float64  # the weight moves along with the module
    assert loss.to("meta").weight.is_meta
    assert loss.state_dict().keys() == torch.nn.CrossEntropyLoss(weight=torch.ones(3)).state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_classes_may_be_integers_of_any_size(dtype):
    logits, targets = torch.tensor([[0.0, 1.0, 2.0], [5.0, 3.0, 4.0]]), torch.tensor([2, 1])
    arguments = {"ignore_index": 2, "reduction": "none"}
    expected = torch.nn.CrossEntropyLoss(**arguments)(logits, targets)
    torch.testing.assert_close(CrossEntropyLoss(**arguments)(logits, targets.to(dtype)), expected)


def test_small_integers_do_not_wrap_round_to_ignore_index():
    loss = CrossEntropyLoss()(torch.zeros(1, 200), torch.tensor([156], dtype=torch.uint8))  # -100 as a byte
    assert loss.item() == pytest.approx(math.log(200))


@pytest.mark.parametrize("bad", [3, -1, 10**12])
def test_a_class_that_does_not_exist_is_an_error_of_gather(bad):
    with pytest.raises(RuntimeError, match=f"index {bad} is out of bounds"):
        CrossEntropyLoss()(torch.zeros(2, 3), torch.tensor([0, bad]))


ARGUMENTS = ({}, {"label_smoothing": 0.1}, {"weight": torch.tensor([0.5, 1, 2, 1])}, {"ignore_index": 2})


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_it_reads_no_data_and_so_works_under_vmap_and_compile_and_without_data(arguments):
    logits, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 2, 1])
    ours, theirs = CrossEntropyLoss(**arguments), torch.nn.CrossEntropyLoss(**arguments)
    if "ignore_index" not in arguments:  # alone, an ignored sample has no mean
        gradients = [torch.func.vmap(torch.func.grad(loss))(logits, targets) for loss in (ours, theirs)]
        torch.testing.assert_close(*gradients)
    for own in (targets, logits.softmax(1)) if "ignore_index" not in arguments else (targets,):
        compiled = torch.compile(ours, fullgraph=True, backend="eager")  # a graph that breaks is an error
        torch.testing.assert_close(compiled(logits, own), theirs(logits, own))
        assert ours.to("meta")(logits.to("meta"), own.to("meta")).is_meta
        ours = CrossEntropyLoss(**arguments)


def test_impossible_classes_do_not_spoil_the_others():
    logits = torch.tensor([[1.0, -math.inf, 2.0]]).requires_grad_()
    compare(logits.detach().double(), torch.tensor([2]))


@pytest.mark.parametrize(
    "logits, targets, says",
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), r"\(2,\).*\(2, 3\).*\(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2), "float32"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool), "bool"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long), "int64"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long), "int64"),
        (torch.tensor(0.0), torch.tensor(0), r"\(\)"),
    ],
)
def test_what_does_not_go_together_is_named(logits, targets, says):
    with pytest.raises(ValueError, match=says):
        CrossEntropyLoss()(logits, targets)


def test_arguments_out_of_range_are_named():
    for name, value in (("reduction", "median"), ("label_smoothing", 1.5), ("label_smoothing", -0.1)):
        with pytest.raises(ValueError, match=f"{name}.*{value}"):
            CrossEntropyLoss(**{name: value})
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        CrossEntropyLoss(weight=torch.ones(2))(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
    for index in (0, 1):
        with pytest.raises(ValueError, match=f"ignore_index {index} goes"):
            CrossEntropyLoss(ignore_index=index)(torch.zeros(4, 3), torch.ones(4, 3) / 3)


def test_the_loss_is_written_out_and_not_torchs_own():
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(loss_module))):
        names |= {getattr(node, field, None) for field in ("id", "attr", "name", "asname")}
    assert "amax" in names  # names are found at all
    assert not names & {"cross_entropy", "nll_loss", "NLLLoss", "cross_entropy_loss"}
    assert CrossEntropyLoss.__bases__ == (torch.nn.Module,)
