"""Cross entropy written out from tensor operations (assignment 2, task 2 b)."""

import torch
from torch import nn


class CrossEntropyLoss(nn.Module):
    """Cross entropy between logits and targets. It takes torch.nn.CrossEntropyLoss's keyword arguments.

    With p = softmax(logits) over the C classes, the loss of one sample is

        targets are classes y             -w[y] log p[y]
        targets are probabilities t       -sum_c w[c] t[c] log p[c]

    Args:
        weight: (C,) tensor w of class weights; None weighs every class 1.
        ignore_index: samples of this class do not count (class targets only).
        reduction: "none" keeps the loss of each sample; "sum" adds them up; "mean" divides the sum by the total weight
            w[y] (classes) or the number of samples (probabilities).
        label_smoothing: a share in [0, 1] of each target that is spread evenly over all classes, so that the net is
            not overconfident (C. Szegedy et al., arXiv:1512.00567, section 7). At 0.2 with 10 classes, the right
            class's target is 0.82 and the others' 0.02.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
        super().__init__()
        if reduction not in ("none", "sum", "mean"):
            raise ValueError(f'reduction must be "none", "sum" or "mean", got {reduction!r}')
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
        self.register_buffer("weight", weight)  # a buffer moves along with .to(device)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, logits, targets):
        """The loss of logits (N, C), (N, C, d1, ...) or (C,), floating point.

        Control flow depends only on shapes and dtypes, so a GPU never has to synchronize, and torch.compile and
        torch.func.vmap work.

        Args:
            targets: either classes in [0, C) or ignore_index, int64 or uint8, in the logits' shape without C; or
                probabilities, floating point, in the logits' shape.

        Returns:
            A scalar, or with reduction "none" the losses in the logits' shape without C; of the logits' dtype.

        Raises:
            ValueError: the shapes or dtypes do not fit together.
            RuntimeError: a class is outside [0, C) and not ignore_index (torch.gather raises it).
        """
        if logits.ndim == 0 or not logits.is_floating_point():
            raise ValueError(f"logits must be floating point (N, C, ...), got {logits.dtype} {tuple(logits.shape)}")
        dim = min(1, logits.ndim - 1)  # the dimension of the classes, which moves to the end
        z = logits.movedim(dim, -1)
        classes = z.shape[-1]
        if self.weight is not None and self.weight.shape != (classes,):
            raise ValueError(f"weight must have shape ({classes},), got {tuple(self.weight.shape)}")

        # log p = z - log sum exp z holds for logits z shifted by any constant. With the largest one shifted to 0, exp
        # cannot overflow and log p keeps its digits however large the logits are.
        if z.dtype in (torch.float16, torch.bfloat16):
            z = z.float()  # sums need more digits
        z = z - z.detach().amax(-1, keepdim=True)
        log_p = z - z.exp().sum(-1, keepdim=True).log()
        weight = log_p.new_ones(classes) if self.weight is None else self.weight.to(log_p.dtype)
        weighted = weight * log_p
        smoothing = self.label_smoothing

        if targets.shape == logits.shape and targets.is_floating_point():
            if self.ignore_index >= 0:
                raise ValueError(f"leave ignore_index at -100 with probabilities, got {self.ignore_index}")
            targets = (1 - smoothing) * targets.movedim(dim, -1) + smoothing / classes
            losses = -(targets * weighted).sum(-1)
            divisor = losses.numel()
        elif targets.shape == z.shape[:-1] and targets.dtype in (torch.uint8, torch.int64):  # as in PyTorch
            targets = targets.long()  # first: in a byte, -100 would be class 156
            ignored = targets == self.ignore_index
            index = targets.masked_fill(ignored, 0).unsqueeze(-1)  # any class will do where the loss is dropped
            losses = -weighted.gather(-1, index).squeeze(-1)
            if smoothing:
                losses = (1 - smoothing) * losses - smoothing / classes * weighted.sum(-1)
            losses = losses.masked_fill(ignored, 0)
            sample_weights = weight[index].squeeze(-1)
            divisor = sample_weights.masked_fill(ignored, 0).sum()
        else:
            raise ValueError(
                f"targets must be classes, int64 or uint8 of shape {tuple(z.shape[:-1])}, or probabilities, floating "
                f"point of shape {tuple(logits.shape)}, got {targets.dtype} {tuple(targets.shape)}"
            )
        if self.reduction == "sum":
            losses = losses.sum()
        elif self.reduction == "mean":
            losses = losses.sum() / divisor
        return losses.to(logits.dtype)
