"""A small convolutional network for CIFAR-10, from basic torch.nn layers (assignment 2, task 2 a)."""

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs, outputs):
    """A 3x3 convolution that keeps height and width. The batch norm behind it has a shift, so it needs no bias."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)


def group(inputs, outputs):
    """(B, inputs, H, W) -> (B, outputs, H // 2, W // 2)

    Pooling comes straight after the first convolution: batch norm, GELU and the second convolution then work on a
    quarter of the pixels.
    """
    return nn.Sequential(
        conv(inputs, outputs), nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.GELU(),
        conv(outputs, outputs), nn.BatchNorm2d(outputs), nn.GELU(),
    )  # fmt: skip


class ConvNet(nn.Module):
    """(B, 3, 32, 32) normalised images -> (B, 10) logits.

    With the default widths (32, 80, 160), those of the baseline, the shapes are

        stem    2x2 convolution, GELU           (B,  24, 31, 31)
        groups  the first                       (B,  32, 15, 15)
                the second                      (B,  80,  7,  7)
                the third                       (B, 160,  3,  3)
        head    maximum over the pixels         (B, 160)
                linear                          (B,  10)

    Args:
        widths: channels of each group; the convolutions of a group with C channels cost about C * C.
        num_classes: number of logits.
    """

    def __init__(self, widths=(32, 80, 160), num_classes=10):
        super().__init__()
        channels = (24, *widths)
        self.stem = nn.Conv2d(3, channels[0], kernel_size=2)
        self.groups = nn.Sequential(*(group(*pair) for pair in zip(channels, widths, strict=False)))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images):
        features = self.groups(F.gelu(self.stem(images)))
        return self.head(features.amax(dim=(2, 3)))

    @torch.no_grad()
    def whiten(self, images, eps=5e-4):
        """Set the stem to filters that decorrelate 2x2 patches of `images`, and freeze them.

        Neighbouring pixels are nearly equal, so what a filter learns of one it must unlearn for the next; with the
        patches rotated to their principal axes and scaled to equal variance, the net learns faster from the first
        step on. There are 12 such filters; with their negatives, no half of their range is lost in the activation.

        Args:
            images: (N, 3, H, W) normalised images, a sample of the training set (a few thousand are plenty).
            eps: added to the variances, so that axes that hold nearly nothing but noise are not blown up.
        """
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1)  # (N, 3, H - 1, W - 1, 2, 2)
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        variances, axes = torch.linalg.eigh(torch.cov(patches.T).cpu())  # MPS has no eigh
        filters = (axes / (variances + eps).sqrt()).T.reshape(-1, 3, 2, 2)
        self.stem.weight.copy_(torch.cat([filters, -filters]))
        self.stem.weight.requires_grad_(False)
        self.stem.bias.zero_()

    @torch.no_grad()
    def pass_through(self):
        """Let the first filters of each 3x3 convolution start as the identity of its input channels.

        What the stem has whitened then reaches every layer from the first step on, and so do the gradients, where
        random filters would blur both a little more in each layer (K. Jordan, arXiv:2404.00498, section 3.3).
        """
        for layer in self.groups.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.dirac_(layer.weight[: layer.in_channels])

    @torch.no_grad()
    def fix_scales(self):
        """Take out of the net what only scales, for training at large rates.

        The scale of batch norm stays 1: the filters behind it are normalised anyway. The linear layer starts small
        (its logits are nearly 0, every class as likely as any other) and without a shift of its own. The running
        statistics follow the last few batches, as the net changes much in a step.
        """
        for layer in self.groups.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.requires_grad_(False)
                layer.momentum = 0.2
        nn.init.normal_(self.head.weight, std=1 / self.head.in_features)
        nn.init.zeros_(self.head.bias).requires_grad_(False)
