"""A small convolutional network for CIFAR-10 from basic torch.nn layers, and its training step (assignment 2, 2 a)."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def mirror_channels(tensor, dim):
    """The channels along `dim` as mirroring an image reorders them: of each four, the second and the fourth swap."""
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


def group(inputs, outputs, mirror):
    """(B, inputs, S, S) -> (B, outputs, S // 2, S // 2); with `mirror`, odd S only, for an exact mirror symmetry.

    Pooling comes straight after the first convolution: batch norm, SiLU and the second convolution then work on a
    quarter of the pixels. The convolutions need no bias, because batch norm adds one (beta).
    """
    pool = nn.MaxPool2d(2)
    if mirror:  # these windows overlap and reach from edge to edge of an odd map, so mirroring does not shift them
        pool = nn.MaxPool2d(3, stride=2)
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
            `whiten`. Widths must be divisible by 4, and the sides of images by 8: then no pooling meets an even map,
            and the symmetry is exact.
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

    def filters(self):
        """The weights of the 3x3 convolutions."""
        return [layer.weight for layer in self.groups.modules() if isinstance(layer, nn.Conv2d)]

    @torch.no_grad()
    def whiten(self, images):
        """Start from a frozen stem that decorrelates 2x2 patches of `images`, and from layers close to the identity.

        Neighboring pixels are nearly equal, so a filter sees almost the same number four times. With the patches
        rotated to their principal axes and scaled to equal variance, the net learns faster from the first step on.
        The 12 axes are the filters. Photographs are as likely as their mirror images, so 6 filters are symmetric, and
        mirroring changes only the sign of the others. The negatives of all 12 are added, because SiLU drops most of a
        negative output.

        The first filters of each 3x3 convolution start as the identity of its input channels. So the image and the
        gradients pass every layer from the first step on. Random filters would blur both a little more in each layer
        (K. Jordan, arXiv:2404.00498, section 3.3).

        Args:
            images: (N, 3, H, W) normalized images, a sample of the training set (a thousand are plenty).
        """
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1)  # (N, 3, H - 1, W - 1, 2, 2)
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        # In float32, eigh would mix a symmetric axis with another of nearly equal variance. (And MPS has no eigh.)
        covariance = torch.cov(patches.T).cpu().double()
        mirrored = covariance.view(3, 2, 2, 3, 2, 2).flip(2, 5).reshape(12, 12)
        variances, axes = torch.linalg.eigh((covariance + mirrored) / 2)
        whitening = axes / (variances + 5e-4).sqrt()  # 5e-4: do not amplify pure noise
        filters = whitening.T.reshape(-1, 3, 2, 2)
        symmetry = (filters * filters.flip(3)).sum((1, 2, 3))  # positive or negative
        order = symmetry.argsort(descending=True)
        even, odd = filters[order].chunk(2)
        fours = torch.stack([even, odd, -even, -odd], dim=1)  # the order of mirror_channels
        self.stem.weight.copy_(fours.flatten(0, 1))
        # SiLU drops most of a value below 0, so shift up. Trained biases are no better, and their gradient costs more
        # than any other.
        self.stem.bias.fill_(0.8)
        self.stem.requires_grad_(False)
        for filters in self.filters():
            inputs = filters.shape[1]
            nn.init.dirac_(filters[:inputs])
            if self.mirror:
                symmetrize(filters)

    @torch.no_grad()
    def prepare_for_muon(self):
        """Make the net fit for Muon's large steps.

        The scales of batch norm are frozen at 1 and the bias of the head at 0. (Trained at such rates, the scales cost
        `quick` 1.6 points on held-out images, mean of 3 seeds.) The running statistics follow the last few batches,
        because each step changes the weights a lot. The head starts small: its logits are nearly 0, and all classes
        equally likely.
        """
        for layer in self.groups.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.requires_grad_(False)
                layer.momentum = 0.2
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


class Muon:
    """Gradient descent with momentum, where the steps of convolutions are orthogonalized.

    A gradient is mostly a few strong directions. `orthogonalize` makes all directions about equally strong, so the weak
    ones learn too, and training needs far fewer steps than with SGD or Adam. (K. Jordan et al., "Muon: an optimizer for
    hidden layers in neural networks", 2024. The constants here are close to his in the speed-run airbench94.) The
    filters are kept at a fixed norm, so one rate suits all layers. (Nothing is lost: batch norm undoes the scale of a
    filter anyway.) The biases and the linear layer follow their own gradients (SGD, with a little weight decay), summed
    over the batch, so that an epoch goes as far in large batches as in small ones.

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
            convolution = parameter.ndim == 4
            momentum = 0.65 if convolution else 0.85
            velocity.mul_(momentum).add_(parameter.grad)
            direction = parameter.grad + momentum * velocity  # Nesterov: look one step ahead
            if convolution:
                norm = len(parameter) ** 0.5
                parameter.mul_(norm / parameter.norm())
                step = orthogonalize(direction.flatten(1))
                parameter.sub_(lr * step.view_as(parameter))
            else:
                # airbench94 divides the logits by their n inputs; dividing the rate by n ** 2 does the same
                factor = 1 / 4 if parameter.ndim == 1 else 3.3 / parameter.shape[1] ** 2
                rate = lr * self.batch_size
                parameter.mul_(1 - 1e-5 * rate)
                parameter.sub_(rate * factor * direction)

    def state_dict(self):
        return {"velocities": self.velocities}

    def load_state_dict(self, state):
        for velocity, saved in zip(self.velocities, state["velocities"], strict=True):
            velocity.copy_(saved)


def orthogonalize(matrix, steps=3):
    """Roughly U V^T of the singular value decomposition U S V^T of a matrix, by Newton-Schulz iteration.

    Each step applies an odd polynomial to the singular values. Most of them end between 0.7 and 1.2. It needs only
    matrix products, so it is far faster than an SVD. (The polynomial comes from Muon's authors.)
    """
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        square = x @ x.T
        polynomial = -4.7750 * square + 2.0315 * square @ square
        x = 3.4445 * x + polynomial @ x
    return x.T if tall else x


def forward(model, images, precision):
    """The logits (B, 10) of normalized images, computed in "fp32" or "bf16" and returned as float32."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(images).float()


def train_step(model, optimizer, criterion, images, labels, precision):
    """One step of gradient descent. Returns the logits (B, 10), and the minimized loss as a float.

    The batch is split into parts of at most 250 images. The parts' losses, weighted by their sizes, add up to the loss
    of the batch. Each part's activations are still in the processor's cache for its backward pass: a step of 1,000
    images is a quarter faster and takes a quarter of the memory. (Batch norm sees one part at a time.)
    """
    model.zero_grad()
    count = math.ceil(len(images) / 250)
    parts = zip(images.chunk(count), labels.chunk(count), strict=True)
    logits, loss = [], 0
    for part, targets in parts:
        outputs = forward(model, part, precision)
        share = len(targets) / len(labels)
        weighted = criterion(outputs, targets) * share
        weighted.backward()
        logits.append(outputs.detach())
        loss += weighted.item()
    if model.mirror:  # symmetric steps keep the filters symmetric
        for filters in model.filters():
            symmetrize(filters.grad)
    optimizer.step()
    return torch.cat(logits), loss
