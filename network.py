"""A small convolutional network for CIFAR-10 from basic torch.nn layers, and how it is stepped (assignment 2, 2 a)."""

import math

import torch
from torch import nn
from torch.nn import functional as F

PART = 250  # images that batch norm sees at once, at most, see `backpropagate`
FILTER_MOMENTUM = 0.65  # Muon's constants, close to those of its author's speed-run airbench94
OTHER_MOMENTUM = 0.85
WEIGHT_DECAY = 1e-5
BIAS_SCALE = 0.25  # biases learn at this multiple of the rate, summed over the batch
HEAD_SCALE = 3.3  # and the linear layer at this one over the square of its number of inputs


# -------------------------------------------------------------------------------------------------- mirror symmetry
def mirror_channels(tensor, dim):
    """The channels along `dim` as mirroring an image reorders them: of each four, the second and the fourth swap.

    The stem has fours of filters: even, odd, -even, -odd (`ConvNet.whiten`). Mirroring an image turns the output of an
    odd filter into that of -odd, and leaves those of even and -even in place.
    """
    channels = torch.arange(tensor.shape[dim], device=tensor.device)
    order = channels.view(-1, 4)[:, [0, 3, 2, 1]].flatten()
    return tensor.index_select(dim, order)


@torch.no_grad()
def symmetrize(filters):
    """Make filters (outputs, inputs, 3, 3), or their gradients, mirror-symmetric, in place.

    Mirror the input of such a convolution and put its channels in the order of `mirror_channels`: then the output is
    mirrored too, with its channels in that order. So the net learns from each image's mirror image as well. The filters
    of two channels that swap are mirror images of each other, once their input channels are swapped as well.
    (T. Cohen and M. Welling, "Group Equivariant Convolutional Networks", 2016, for the group of two elements.)
    """
    mirrored = mirror_channels(mirror_channels(filters, 0), 1).flip(3)
    filters.add_(mirrored).div_(2)  # the mean of both is symmetric


# ------------------------------------------------------------------------------------------------------ the network
def group(inputs, outputs, mirror):
    """(B, inputs, S, S) -> (B, outputs, S // 2, S // 2); with `mirror`, odd S only, for an exact mirror symmetry.

    Pooling comes straight after the first convolution: batch norm, SiLU and the second convolution then work on a
    quarter of the pixels. The convolutions need no bias, because batch norm adds one (beta).
    """
    # Windows of 3 overlap and reach from edge to edge of an odd map, so mirroring does not shift them.
    pool = nn.MaxPool2d(3 if mirror else 2, stride=2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        pool,
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


class ConvNet(nn.Module):
    """(B, 3, 32, 32) normalized images -> (B, 10) logits.

    With the baseline's widths, (32, 64, 128), the shapes are

        stem    2x2 convolution, SiLU           (B,  24, 31, 31)
        groups  the first                       (B,  32, 15, 15)
                the second                      (B,  64,  7,  7)
                the third                       (B, 128,  3,  3)
        head    maximum over the pixels         (B, 128)
                linear                          (B,  10)

    Args:
        widths: channels of each group; the convolutions of a group with C channels cost about C * C.
        mirror: the convolutions treat an image and its mirror image alike (see `symmetrize`). The net must start from
            `whiten` and `start_as_identity`. Widths must be divisible by 4, and the sides of images by 8: then no
            pooling meets an even map, and the symmetry is exact.
    """

    def __init__(self, widths=(32, 64, 128), mirror=False):
        super().__init__()
        channels = 24
        self.stem = nn.Conv2d(3, channels, kernel_size=2)
        self.groups = nn.Sequential()
        for width in widths:
            self.groups.append(group(channels, width, mirror))
            channels = width
        self.head = nn.Linear(channels, 10)
        self.mirror = mirror

    def forward(self, images):
        maps = F.silu(self.stem(images))
        features = self.groups(maps).amax(dim=(2, 3))
        if self.mirror:  # the mean of the features of an image and of its mirror image
            features = (features + mirror_channels(features, 1)) / 2
        return self.head(features)

    def layers(self, kind):
        """All layers of one kind, such as nn.BatchNorm2d, in the groups."""
        return [layer for layer in self.groups.modules() if isinstance(layer, kind)]

    def filters(self):
        """The weights of the 3x3 convolutions."""
        return [layer.weight for layer in self.layers(nn.Conv2d)]

    @torch.no_grad()
    def whiten(self, images):
        """Start from a frozen stem that decorrelates 2x2 patches of `images`.

        Neighboring pixels are nearly equal, so a filter sees almost the same number four times. With the patches
        rotated to their principal axes and scaled to equal variance, the net learns faster from the first step on.
        The 12 axes are the filters. Photographs are as likely as their mirror images, so 6 filters are symmetric
        (even), and mirroring changes only the sign of the others (odd). The negatives of all 12 are added, because
        SiLU drops most of a negative output.

        Args:
            images: (N, 3, H, W) normalized images, a sample of the training set (a thousand are plenty).
        """
        patches = F.unfold(images, kernel_size=2)  # (N, 12, all places of the patch)
        patches = patches.transpose(1, 2).reshape(-1, 12)
        # In float32, eigh would mix a symmetric axis with another of nearly equal variance. (And MPS has no eigh.)
        covariance = torch.cov(patches.T).cpu().double()
        mirrored = covariance.view(3, 2, 2, 3, 2, 2).flip(2, 5).reshape(12, 12)
        variances, axes = torch.linalg.eigh((covariance + mirrored) / 2)
        whitening = axes / (variances + 5e-4).sqrt()  # 5e-4: do not amplify pure noise
        filters = whitening.T.reshape(-1, 3, 2, 2)
        symmetry = (filters * filters.flip(3)).sum((1, 2, 3))  # positive for even filters, negative for odd ones
        order = symmetry.argsort(descending=True)
        even, odd = filters[order].chunk(2)
        fours = torch.stack([even, odd, -even, -odd], dim=1)
        self.stem.weight.copy_(fours.flatten(0, 1))
        # SiLU drops most of a value below 0, so shift up. Trained biases are no better, and their gradient costs more
        # than any other.
        self.stem.bias.fill_(0.8)
        self.stem.requires_grad_(False)

    def start_as_identity(self):
        """Start each 3x3 convolution with the identity of its input channels as its first filters.

        So the image and the gradients pass every layer from the first step on. Random filters would blur both a little
        more in each layer (K. Jordan, arXiv:2404.00498, section 3.3).
        """
        for filters in self.filters():
            inputs = filters.shape[1]
            nn.init.dirac_(filters[:inputs])
            if self.mirror:
                symmetrize(filters)

    def freeze_scales(self):
        """Keep the scales of batch norm at 1. Trained at Muon's rates, they cost `quick` 1.6 points of accuracy."""
        for layer in self.layers(nn.BatchNorm2d):
            layer.weight.requires_grad_(False)

    def follow_faster(self):
        """Take running statistics from the last few batches, because each of Muon's steps changes the net a lot."""
        for layer in self.layers(nn.BatchNorm2d):
            layer.momentum = 0.2

    def start_undecided(self):
        """Start with logits that are nearly 0: all classes are equally likely. The head's bias stays at 0."""
        nn.init.normal_(self.head.weight, std=1 / self.head.in_features)
        nn.init.zeros_(self.head.bias).requires_grad_(False)


class Ensemble(nn.Module):
    """(B, 3, 32, 32) normalized images -> (B, 10) logits: the mean of the logits of several networks.

    Networks that start from different weights and see different batches make different mistakes, and some of these
    cancel out. (L. Hansen and P. Salamon, "Neural network ensembles", 1990.)
    """

    def __init__(self, nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, images):
        logits = [net(images).float() for net in self.nets]
        return torch.stack(logits).mean(0)


def compute_logits(model, images, precision):
    """The logits (B, 10) of normalized images, computed in "fp32" or "bf16" and returned as float32."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(images).float()


# --------------------------------------------------------------------------------------------------- a training step
def backpropagate(net, criterion, images, labels, precision):
    """Add the gradients of a batch's mean loss to those of the parameters. Returns the logits (B, 10).

    Batch norm sees parts of at most 250 images ("ghost batch norm": E. Hoffer et al., arXiv:1705.08741). Each part's
    activations are still in the processor's cache for its backward pass: a batch of 1,000 images is a quarter faster
    and takes a quarter of the memory. The parts' losses, weighted by their sizes, add up to the loss of the batch.
    """
    count = math.ceil(len(images) / PART)
    parts = zip(images.chunk(count), labels.chunk(count), strict=True)
    logits = []
    for part, targets in parts:
        outputs = compute_logits(net, part, precision)
        share = len(targets) / len(labels)
        loss = criterion(outputs, targets) * share
        loss.backward()
        logits.append(outputs.detach())
    if net.mirror:  # symmetric steps keep the filters symmetric
        for filters in net.filters():
            symmetrize(filters.grad)
    return torch.cat(logits)


class Muon:
    """Gradient descent with momentum, where the steps of convolutions are orthogonalized.

    A gradient is mostly a few strong directions. `orthogonalize` makes all directions about equally strong, so the weak
    ones learn too, and training needs far fewer steps than with SGD or Adam. (K. Jordan et al., "Muon: an optimizer for
    hidden layers in neural networks", 2024.)

    It has no base class, because the first torch.optim optimizer triggers slow imports.
    """

    def __init__(self, parameters, lr, batch_size):
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.velocities = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.param_groups = [{"lr": lr}]  # the place where torch.optim's optimizers keep their rate
        self.batch_size = batch_size

    @torch.no_grad()
    def step(self):
        lr = self.param_groups[0]["lr"]
        for parameter, velocity in zip(self.parameters, self.velocities, strict=True):
            if parameter.ndim == 4:
                self.step_filters(parameter, velocity, lr)
            else:
                self.step_other(parameter, velocity, lr)

    def step_filters(self, filters, velocity, lr):
        """Step the filters of a convolution, which are kept at a fixed norm, so that one rate suits all layers.

        (Batch norm undoes the scale of a filter anyway; only a trained stem has none.)
        """
        direction = look_ahead(filters.grad, velocity, FILTER_MOMENTUM)
        norm = len(filters) ** 0.5
        filters.mul_(norm / filters.norm())
        step = orthogonalize(direction.flatten(1))
        filters.sub_(lr * step.view_as(filters))

    def step_other(self, parameter, velocity, lr):
        """Step biases or the linear layer along their own gradient (SGD, with a little weight decay).

        The gradient is summed over the batch, so that an epoch goes as far in large batches as in small ones.
        """
        direction = look_ahead(parameter.grad, velocity, OTHER_MOMENTUM)
        rate = lr * self.batch_size
        parameter.mul_(1 - WEIGHT_DECAY * rate)
        # airbench94 divides the logits by their n inputs; dividing the rate by n ** 2 does the same
        scale = BIAS_SCALE if parameter.ndim == 1 else HEAD_SCALE / parameter.shape[1] ** 2
        parameter.sub_(rate * scale * direction)

    def state_dict(self):
        return {"velocities": self.velocities}

    def load_state_dict(self, state):
        for velocity, saved in zip(self.velocities, state["velocities"], strict=True):
            velocity.copy_(saved)


def look_ahead(gradient, velocity, momentum):
    """Update the velocity, in place, and return Nesterov's direction, which looks one step ahead."""
    velocity.mul_(momentum).add_(gradient)
    return gradient + momentum * velocity


def orthogonalize(matrix):
    """Roughly U V^T of the singular value decomposition U S V^T of a matrix, by Newton-Schulz iteration.

    Each step applies an odd polynomial to the singular values. Most of them end between 0.7 and 1.2. It needs only
    matrix products, so it is far faster than an SVD. (The polynomial comes from Muon's authors.)
    """
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(3):
        square = x @ x.T
        polynomial = -4.7750 * square + 2.0315 * square @ square
        x = 3.4445 * x + polynomial @ x
    return x
