"""Cross entropy written out from tensor operations (assignment 2, task 2 b)."""

import torch
from torch import nn


class CrossEntropyLoss(nn.Module):
    """Cross entropy between logits and targets: a drop-in for torch.nn.CrossEntropyLoss.

    With p = softmax(logits) over the C classes, the loss of one sample is

        targets are classes y             -w[y] log p[y]
        targets are probabilities t       -sum_c w[c] t[c] log p[c]

    Args:
        weight: (C,) tensor w of class weights; None weighs every class 1.
        ignore_index: samples of this class do not count (class targets only).
        reduction: "none" keeps a loss for each sample; "sum" adds them up; "mean" also divides, by the summed weights
            w[y] of the samples for class targets, by the number of samples for probabilities.
        label_smoothing: a share in [0, 1] of each target that is spread evenly over all classes, so that the net is
            not driven to be ever more certain (C. Szegedy et al., arXiv:1512.00567, section 7).

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
        super().__init__()
        if reduction not in ("none", "sum", "mean"):
            raise ValueError(f'reduction must be "none", "sum" or "mean", got {reduction!r}')
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
        self.register_buffer("weight", weight)  # a buffer moves along with .to(device)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, logits, targets):
        """The loss of logits (N, C), (N, C, d1, ...) or (C,), floating point.

        No step looks at the values, only at shapes and dtypes: so a GPU never has to wait for an answer, and
        torch.compile and torch.func.vmap see the whole of it.

        Args:
            targets: classes, int64 or uint8 in [0, C) or ignore_index, of the logits' shape without C; or
                probabilities, floating point, of the logits' own shape.

        Returns:
            A scalar; with reduction "none" the logits' shape without C. Of the logits' dtype.

        Raises:
            ValueError: shapes or dtypes that do not go together.
            RuntimeError: a class outside [0, C) that is not ignore_index (torch.gather's own error).
        """
        if logits.ndim == 0 or not logits.is_floating_point():
            raise ValueError(f"logits must be floating point (N, C, ...), got {logits.dtype} {tuple(logits.shape)}")
        dim = min(1, logits.ndim - 1)  # that of the classes
        classes, smoothing = logits.shape[dim], self.label_smoothing
        if self.weight is not None and self.weight.shape != (classes,):
            raise ValueError(f"weight must have shape ({classes},), got {tuple(self.weight.shape)}")

        # log p = z - log sum exp z holds for logits z shifted by any constant. With the largest one shifted to 0, exp
        # cannot overflow and log p keeps its digits however large the logits are.
        z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits  # sums need more digits
        z = z - z.detach().amax(dim, keepdim=True)
        log_p = z - z.exp().sum(dim, keepdim=True).log()
        weight = log_p.new_ones(classes) if self.weight is None else self.weight.to(log_p.dtype)
        weight = weight.view(-1, *[1] * (logits.ndim - 1 - dim)).expand_as(log_p)
        weighted = weight * log_p

        sample_shape = logits.shape[:dim] + logits.shape[dim + 1 :]
        if targets.shape == logits.shape and targets.is_floating_point():
            if self.ignore_index >= 0:
                raise ValueError(f"ignore_index {self.ignore_index} goes with classes, got probabilities")
            targets = (1 - smoothing) * targets + smoothing / classes
            losses = -(targets * weighted).sum(dim)
            divisor = losses.numel()
        elif targets.shape == sample_shape and targets.dtype in (torch.uint8, torch.int64):  # as torch's
            targets = targets.long()  # first: in a byte, -100 would be class 156
            ignored = targets == self.ignore_index
            index = targets.masked_fill(ignored, 0).unsqueeze(dim)  # any class will do where the loss is dropped
            losses = -weighted.gather(dim, index).squeeze(dim)
            if smoothing:
                losses = (1 - smoothing) * losses - smoothing / classes * weighted.sum(dim)
            losses = losses.masked_fill(ignored, 0)
            divisor = weight.gather(dim, index).squeeze(dim).masked_fill(ignored, 0).sum()
        else:
            raise ValueError(
                f"targets must be classes, int64 or uint8 of shape {tuple(sample_shape)}, or probabilities, floating "
                f"point of shape {tuple(logits.shape)}, got {targets.dtype} {tuple(targets.shape)}"
            )
        if self.reduction == "sum":
            losses = losses.sum()
        elif self.reduction == "mean":
            losses = losses.sum() / divisor
        return losses.to(logits.dtype)
