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
        ignore_index: samples of this class count for nothing (class targets only).
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

        Args:
            targets: classes, integers in [0, C) or ignore_index, of the logits' shape without C; or probabilities,
                floating point, of the logits' own shape.

        Returns:
            A scalar; with reduction "none" the logits' shape without C. Of the logits' dtype.

        Raises:
            ValueError: shapes or dtypes that do not go together.
            IndexError: a class outside [0, C) that is not ignore_index.
        """
        if logits.ndim == 0 or not logits.is_floating_point():
            raise ValueError(f"logits must be floating point (N, C, ...), got {logits.dtype} {tuple(logits.shape)}")
        losses, divisor = self._losses(logits, targets, dim=min(1, logits.ndim - 1))
        if self.reduction == "sum":
            losses = losses.sum()
        elif self.reduction == "mean":
            losses = losses.sum() / divisor
        return losses.to(logits.dtype)

    def _losses(self, logits, targets, dim):
        """The loss of each sample (N, d1, ...) and what the mean divides their sum by; `dim` is that of the classes."""
        classes = logits.shape[dim]
        weight, smoothing = self.weight, self.label_smoothing
        if weight is not None and weight.shape != (classes,):
            raise ValueError(f"weight must have shape ({classes},) for {classes} classes, got {tuple(weight.shape)}")
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()  # sums of half precision numbers overflow, or lose most of their digits
        # log p = z - log sum exp z holds for logits z shifted by any constant. With the largest one shifted to 0, exp
        # cannot overflow and log p keeps its digits however large the logits are.
        shifted = logits - logits.detach().amax(dim, keepdim=True)
        log_sum = shifted.exp().sum(dim).log()

        if targets.shape == logits.shape:
            return self._probability_losses(shifted, log_sum, targets, dim)
        if targets.shape != log_sum.shape:
            raise ValueError(
                f"targets must be classes of shape {tuple(log_sum.shape)} or probabilities of shape "
                f"{tuple(logits.shape)}, got {tuple(targets.shape)}"
            )
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise ValueError(f"classes must be integers, got {targets.dtype}")

        targets = targets.long()  # first: in a byte, -100 would be class 156
        ignored = None
        if targets.numel():
            low, high = map(int, targets.aminmax())
            if low < 0 or high >= classes or 0 <= self.ignore_index < classes:  # else none can be ignored: spare masks
                ignored = targets == self.ignore_index
                targets = targets.masked_fill(ignored, 0)  # any valid class will do where the loss is dropped
                low, high = map(int, targets.aminmax())
            if low < 0 or high >= classes:
                raise IndexError(f"class {low if low < 0 else high} is outside [0, {classes})")
        losses, divisor = log_sum - shifted.gather(dim, targets.unsqueeze(dim)).squeeze(dim), targets.numel()
        if weight is not None or ignored is not None:
            of_class = torch.ones_like(log_sum) if weight is None else weight.to(log_sum.dtype)[targets]
            losses = of_class * losses
            divisor = (of_class if ignored is None else of_class.masked_fill(ignored, 0)).sum()
        if smoothing:
            # Without weights the sum over the classes needs no (N, C) of its own
            plain = weight is None
            of_all = classes * log_sum - shifted.sum(dim) if plain else self._minus_log_p(shifted, log_sum, 1, dim)
            losses = (1 - smoothing) * losses + smoothing / classes * of_all
        return losses if ignored is None else losses.masked_fill(ignored, 0), divisor

    def _probability_losses(self, shifted, log_sum, targets, dim):
        if not targets.is_floating_point():
            raise ValueError(f"probabilities must be floating point, got {targets.dtype}")
        if self.ignore_index >= 0:
            raise ValueError(f"ignore_index {self.ignore_index} goes with classes, got probabilities")
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / shifted.shape[dim]
        return self._minus_log_p(shifted, log_sum, targets, dim), log_sum.numel()

    def _minus_log_p(self, shifted, log_sum, targets, dim):
        """-sum_c w[c] targets[c] log p[c] of each sample."""
        terms = targets * (log_sum.unsqueeze(dim) - shifted)
        if self.weight is not None:
            terms = terms * self.weight.view(-1, *[1] * (shifted.ndim - 1 - dim))
        return terms.sum(dim)
