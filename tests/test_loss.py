"""The cross entropy against PyTorch's in float64, and what it refuses."""

import math
import re

import pytest
import torch
from conftest import seeded
from hypothesis import given
from hypothesis import strategies as st

from loss import CrossEntropyLoss

shapes = st.one_of(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([[0, 3], [0, 3, 2]]))
options = st.fixed_dictionaries(
    {"reduction": st.sampled_from(["none", "sum", "mean"]), "label_smoothing": st.sampled_from([0.0, 0.1, 0.5, 1.0])}
)
seeds = st.integers(0, 10**6)
LOGITS, CLASSES = torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.1, 0.6]]), torch.tensor([0, 2])
OPTIONS = {"weight": torch.tensor([0.5, 1.0, 2.0]), "label_smoothing": 0.1}
KINDS = [(CLASSES, {}), (CLASSES, {**OPTIONS, "ignore_index": 2}), (LOGITS, OPTIONS)]
each_kind = pytest.mark.parametrize("targets, arguments", KINDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])


def random_case(shape, seed):
    """Random logits, classes, probabilities and class weights."""
    options = {"dtype": torch.float64, "generator": seeded(seed)}
    dim = min(1, len(shape) - 1)
    classes = torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :], generator=options["generator"])
    logits, noise = 3 * torch.randn(2, *shape, **options)
    return logits, classes, noise.softmax(dim), 0.1 + torch.rand(shape[dim], **options)


def compare(logits, targets, **arguments):
    """Compare value and gradients with torch.nn.CrossEntropyLoss. Each unreduced loss gets a weight of its own."""
    leaves, results = [logits.requires_grad_()], []
    if targets.is_floating_point():
        leaves.append(targets.requires_grad_())
    for kind in (CrossEntropyLoss, torch.nn.CrossEntropyLoss):
        loss = kind(**arguments)(logits, targets)
        mix = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        results.append((loss.detach(), *torch.autograd.grad((loss * mix).sum(), leaves)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10, equal_nan=True)


@given(shapes, options, st.booleans(), st.sampled_from([-100, -1, 0, 2]), seeds)
def test_class_targets_give_pytorchs_loss_and_gradient(shape, options, weighted, ignore_index, seed):
    logits, targets, _, weight = random_case(shape, seed)
    targets.view(-1)[seed % 3 :: 3] = ignore_index
    compare(logits, targets, weight=weight if weighted else None, ignore_index=ignore_index, **options)


@given(shapes, options, st.booleans(), st.sampled_from([-100, -1]), seeds)
def test_probability_targets_give_pytorchs_loss_and_gradients(shape, options, weighted, ignore_index, seed):
    logits, _, targets, weight = random_case(shape, seed)
    compare(logits, targets, weight=weight if weighted else None, ignore_index=ignore_index, **options)


def test_a_minus_infinity_logit_leaves_the_loss_of_other_classes_right():
    compare(torch.tensor([[1.0, -math.inf, 2.0]], dtype=torch.float64), torch.tensor([2]))


@each_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_exact_for_huge_logits(dtype, smoothing):
    logits = torch.tensor([[1e4, 1e4, -1e4], [1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [8.0, 0.0, 0.0]], dtype=dtype)
    results, targets = [], torch.zeros(4, dtype=torch.long)
    for kind, leaf in ((CrossEntropyLoss, logits), (torch.nn.CrossEntropyLoss, logits.double())):
        loss = kind(reduction="none", label_smoothing=smoothing)(leaf.requires_grad_(), targets)
        results.append((loss.double(), torch.autograd.grad(loss.double().sum(), leaf)[0].double()))
    torch.testing.assert_close(*results, rtol=5e-3 if dtype.itemsize == 2 else 1e-6, atol=1e-6)


@each_dtype
def test_mean_over_70000_samples_is_accurate_in_every_dtype(dtype):
    logits, weight = torch.zeros(70_000, 2, dtype=dtype), torch.ones(2, dtype=dtype)
    for targets in (torch.zeros(70_000, dtype=torch.long), torch.full_like(logits, 0.5)):
        torch.testing.assert_close(CrossEntropyLoss(weight)(logits, targets), torch.tensor(math.log(2), dtype=dtype))


def test_smoothing_of_0_2_over_10_classes_gives_targets_0_82_and_0_02():
    logits = torch.randn(10, generator=seeded()).requires_grad_()
    CrossEntropyLoss(label_smoothing=0.2)(logits, torch.tensor(0)).backward()
    targets = logits.detach().softmax(0) - logits.grad  # because the gradient is p - t
    torch.testing.assert_close(targets, torch.tensor([0.82] + 9 * [0.02]))


def test_uint8_class_156_is_not_mistaken_for_ignore_index():  # -100 as a byte is 156
    loss = CrossEntropyLoss()(torch.zeros(1, 200), torch.tensor([156], dtype=torch.uint8))
    assert loss.item() == pytest.approx(math.log(200))


@pytest.mark.parametrize("bad", [3, -1, 10**12])
def test_class_out_of_range_error_names_the_index(bad):
    with pytest.raises(RuntimeError, match=f"index {bad} is out of bounds"):
        CrossEntropyLoss()(LOGITS, torch.tensor([0, bad]))


@each_kind
def test_vmap_computes_per_sample_gradients(targets, arguments):
    losses = CrossEntropyLoss(**arguments), torch.nn.CrossEntropyLoss(**arguments)
    gradients = [torch.func.vmap(torch.func.grad(loss))(LOGITS, targets) for loss in losses]
    torch.testing.assert_close(*gradients, equal_nan=True)


@each_kind
def test_torch_compile_needs_only_one_graph(targets, arguments):
    compiled = torch.compile(CrossEntropyLoss(**arguments), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(LOGITS, targets), torch.nn.CrossEntropyLoss(**arguments)(LOGITS, targets))


@each_kind
def test_meta_tensors_give_a_meta_loss(targets, arguments):
    assert CrossEntropyLoss(**arguments).to("meta")(LOGITS.to("meta"), targets.to("meta")).is_meta


@each_kind
def test_loss_calls_no_built_in_loss_and_never_waits_for_a_gpu(targets, arguments):
    with torch.autograd.profiler.profile() as profile:
        CrossEntropyLoss(**arguments)(LOGITS, targets)
    names = {event.name for event in profile.function_events}  # also of the operations inside operations
    assert "aten::amax" in names and CrossEntropyLoss.__bases__ == (torch.nn.Module,)
    assert [name for name in names if re.search("loss|entropy|softmax|kl_div|_local_scalar_dense", name)] == []


@pytest.mark.parametrize(
    "logits, targets, arguments, says",
    [
        (LOGITS, torch.zeros(3, dtype=torch.long), {}, r"\(2,\).*\(2, 3\).*\(3,\)"),
        (LOGITS, torch.zeros(2), {}, "float32"),
        (LOGITS, CLASSES.int(), {}, "int32"),
        (LOGITS, LOGITS.long(), {}, "int64"),
        (LOGITS.long(), CLASSES, {}, "int64"),
        (torch.tensor(0.0), torch.tensor(0), {}, r"\(\)"),
        (LOGITS, CLASSES, {"weight": torch.ones(3, 1)}, r"\(3,\).*\(3, 1\)"),
        (LOGITS, LOGITS, {"ignore_index": 0}, "leave ignore_index at -100 .*got 0"),
        (LOGITS, CLASSES, {"reduction": "median"}, "reduction.*median"),
        (LOGITS, CLASSES, {"label_smoothing": 1.5}, "label_smoothing.*1.5"),
        (LOGITS, CLASSES, {"label_smoothing": -0.1}, "label_smoothing.*-0.1"),
    ],
)
def test_every_bad_argument_raises_an_error_that_names_it(logits, targets, arguments, says):
    with pytest.raises(ValueError, match=says):
        CrossEntropyLoss(**arguments)(logits, targets)
