"""The cross entropy against PyTorch's in float64 and numbers worked out by hand, and what it refuses."""

import math
import re

import pytest
import torch
from conftest import seeded

from loss import CrossEntropyLoss

LOGITS, CLASSES = torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.1, 0.6]]), torch.tensor([0, 2])
OPTIONS = {"weight": torch.tensor([0.5, 1.0, 2.0]), "label_smoothing": 0.1}
KINDS = [(torch.tensor([-100, 2]), {}), (CLASSES, {**OPTIONS, "ignore_index": 2}), (LOGITS, OPTIONS)]
each_kind = pytest.mark.parametrize("targets, arguments", KINDS)


def assert_same_as_pytorch(logits, targets, **arguments):
    """The loss and its gradients, if the caller weighs the losses of the samples differently."""
    leaves = [leaf.requires_grad_() for leaf in (logits, targets) if leaf.is_floating_point()]
    results = []
    for kind in (CrossEntropyLoss, torch.nn.CrossEntropyLoss):
        loss = kind(**arguments)(logits, targets)
        weights = 1.0 + torch.arange(loss.numel(), dtype=loss.dtype).view(loss.shape)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves, weights)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(4,), (5, 4), (5, 4, 3), (2, 4, 3, 2), (0, 4)], ids=str)
def test_loss_and_gradients_are_those_of_pytorch_for_every_argument(shape, weighted, smoothing, reduction):
    logits, noise = 3 * torch.randn(2, *shape, generator=seeded(), dtype=torch.float64)
    dim = min(1, len(shape) - 1)
    weight = torch.tensor([0.5, 1.0, 2.0, 0.1]).double() if weighted else None
    arguments = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    assert_same_as_pytorch(logits, noise.softmax(dim), **arguments)
    for ignore_index in (-100, -1, 0, 2):
        classes = torch.randint(4, noise.select(dim, 0).shape, generator=seeded())
        classes.view(-1)[1::3] = ignore_index
        assert_same_as_pytorch(logits, classes, ignore_index=ignore_index, **arguments)


def test_smoothing_of_0_2_over_10_classes_gives_targets_0_82_and_0_02():
    logits = torch.randn(10, generator=seeded()).requires_grad_()
    CrossEntropyLoss(label_smoothing=0.2)(logits, torch.tensor(0)).backward()
    targets = logits.detach().softmax(0) - logits.grad  # because the gradient is p - t
    torch.testing.assert_close(targets, torch.tensor([0.82] + 9 * [0.02]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_huge_logits_and_many_samples_give_the_exact_loss_in_every_dtype(dtype):
    logits = torch.tensor([[1e4, 1e4, 0], [1e4, 0, -math.inf], [0, 1e4, 0]], dtype=dtype)
    losses = CrossEntropyLoss(reduction="none")(logits, torch.zeros(3, dtype=torch.long))
    assert torch.equal(losses, torch.tensor([math.log(2), 0, 1e4], dtype=dtype))
    logits, weight = torch.zeros(70_000, 2, dtype=dtype), torch.ones(2, dtype=dtype)
    for targets in (torch.zeros(70_000, dtype=torch.long), torch.full_like(logits, 0.5)):
        torch.testing.assert_close(CrossEntropyLoss(weight)(logits, targets), torch.tensor(math.log(2), dtype=dtype))


def test_a_class_as_a_byte_is_never_taken_for_ignore_index():
    loss = CrossEntropyLoss()(torch.zeros(1, 200), torch.tensor([156], dtype=torch.uint8))  # -100 as a byte is 156
    assert loss.item() == pytest.approx(math.log(200))


def test_class_weights_are_saved_and_converted_along_with_the_net():
    saved = torch.nn.Sequential(CrossEntropyLoss(OPTIONS["weight"])).double().state_dict()
    torch.testing.assert_close(dict(saved), {"0.weight": OPTIONS["weight"].double()})


@each_kind
def test_loss_works_under_vmap_and_compile_and_on_meta_tensors(targets, arguments):
    ours, theirs = CrossEntropyLoss(**arguments), torch.nn.CrossEntropyLoss(**arguments)
    gradients = [torch.func.vmap(torch.func.grad(loss))(LOGITS, targets) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, equal_nan=True)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(LOGITS, targets), theirs(LOGITS, targets))
    assert CrossEntropyLoss(**arguments).to("meta")(LOGITS.to("meta"), targets.to("meta")).is_meta


@each_kind
def test_loss_calls_no_built_in_loss_and_never_waits_for_a_gpu(targets, arguments):
    with torch.autograd.profiler.profile() as profile:
        CrossEntropyLoss(**arguments)(LOGITS, targets)
    names = {event.name for event in profile.function_events}  # also of the operations inside operations
    assert "aten::amax" in names
    assert not [name for name in names if re.search("loss|entropy|softmax|kl_div|_local_scalar_dense", name)]


def test_bad_arguments_are_refused_by_name():
    bad = [("reduction", "median"), ("label_smoothing", 1.1), ("label_smoothing", -0.1), ("weight", torch.ones(3, 1))]
    for name, value in bad:
        with pytest.raises(ValueError, match=name):
            CrossEntropyLoss(**{name: value})(LOGITS, CLASSES)
    for targets in (CLASSES[:1], CLASSES.float(), CLASSES.int(), LOGITS.long()):
        with pytest.raises(ValueError, match=rf"targets .*{targets.dtype}"):
            CrossEntropyLoss()(LOGITS, targets)
    for logits in (LOGITS.long(), LOGITS[0, 0]):
        with pytest.raises(ValueError, match="logits"):
            CrossEntropyLoss()(logits, CLASSES)
    with pytest.raises(ValueError, match="ignore_index"):
        CrossEntropyLoss(ignore_index=0)(LOGITS, LOGITS)
    with pytest.raises(RuntimeError, match="3"):
        CrossEntropyLoss()(LOGITS, CLASSES + 1)
