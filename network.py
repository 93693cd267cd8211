"""A small convolutional network for CIFAR-10 from basic torch.nn layers, and its training step (assignment 2, 2 a)."""

import math
import timeit

import torch
from torch import nn
from torch.nn import functional as F


def mirror_channels(tensor, dim):
    """The channels along `dim` in the order that a mirrored image has them in: of each four, 2 and 4 swap."""
    order = torch.arange(tensor.shape[dim], device=tensor.device).view(-1, 4)[:, [0, 3, 2, 1]]
    return tensor.index_select(dim, order.flatten())


@torch.no_grad()
def symmetrize(filters):
    """Make filters (outputs, inputs, 3, 3), or their gradients, treat an image and its mirror image alike, in place.

    Mirror the input of such a convolution, and its output is mirrored too, with the channels in the order of
    `mirror_channels`. So what a net learns from an image, it knows of its mirror image. Two channels that swap have
    filters that are mirror images of each other, and one that stays has symmetric filters. The mean of filters and
    what a mirror makes of them is of this kind.
    (T. Cohen and M. Welling, "Group Equivariant Convolutional Networks", 2016, for the group of two elements.)
    """
    filters.add_(mirror_channels(mirror_channels(filters, 0), 1).flip(3)).div_(2)


def group(inputs, outputs, mirror):
    """(B, inputs, H, W) -> (B, outputs, H // 2, W // 2)

    Pooling comes straight after the first convolution: batch norm, SiLU and the second convolution then work on a
    quarter of the pixels. The convolutions have no bias, as the batch norm behind them has one (beta).
    """
    # Overlapping windows of 3x3 cover an odd picture from edge to edge, so mirroring the picture does not shift them
    pool = nn.MaxPool2d(3, stride=2) if mirror else nn.MaxPool2d(2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), pool, nn.BatchNorm2d(outputs), nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(),
    )  # fmt: skip


class ConvNet(nn.Module):
    """(B, 3, 32, 32) normalized images -> (B, 10) logits.

    With the default widths (32, 64, 128), those of the baseline, the shapes are

        stem    2x2 convolution, SiLU           (B,  24, 31, 31)
        groups  the first                       (B,  32, 15, 15)
                the second                      (B,  64,  7,  7)
                the third                       (B, 128,  3,  3)
        head    maximum over the pixels         (B, 128)
                linear                          (B,  10)

    Args:
        widths: channels of each group; the convolutions of a group with C channels cost about C * C.
        mirror: the convolutions treat an image and its mirror image alike (see `symmetrize`). 4 must divide the widths,
            and the net must start from `whiten`.
    """

    def __init__(self, widths=(32, 64, 128), mirror=False):
        super().__init__()
        channels = (24, *widths)
        self.stem = nn.Conv2d(3, channels[0], kernel_size=2)
        self.groups = nn.Sequential(*(group(*pair, mirror) for pair in zip(channels, widths, strict=False)))
        self.head = nn.Linear(widths[-1], 10)
        self.mirror = mirror

    def forward(self, images):
        features = self.groups(F.silu(self.stem(images))).amax(dim=(2, 3))
        if self.mirror:  # the mean of what it sees in an image and in its mirror image
            features = (features + mirror_channels(features, 1)) / 2
        return self.head(features)

    def filters(self):
        """The weights of the 3x3 convolutions."""
        return [layer.weight for layer in self.groups.modules() if isinstance(layer, nn.Conv2d)]

    @torch.no_grad()
    def whiten(self, images):
        """Start from a frozen stem that decorrelates 2x2 patches of `images`, and from layers that let them through.

        Neighboring pixels are nearly equal, so a filter sees almost the same number four times; with the patches
        rotated to their principal axes and scaled to equal variance, the net learns faster from the first step on.
        There are 12 such filters. As photographs are as likely as their mirror images, 6 are symmetric, and mirroring
        changes only the sign of the others. Their negatives are added, as SiLU drops most of a negative output.

        The first filters of each 3x3 convolution start as the identity of its input channels. So the image and the
        gradients pass every layer from the first step on; random filters would blur both a little more in each layer
        (K. Jordan, arXiv:2404.00498, section 3.3).

        Args:
            images: (N, 3, H, W) normalized images, a sample of the training set (a thousand are plenty).
        """
        images = torch.cat([images, images.flip(3)])
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1)  # (N, 3, H - 1, W - 1, 2, 2)
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        variances, axes = torch.linalg.eigh(torch.cov(patches.T).cpu())  # MPS has no eigh
        filters = (axes / (variances + 5e-4).sqrt()).T.reshape(-1, 3, 2, 2)  # 5e-4: do not amplify pure noise
        symmetry = (filters * filters.flip(3)).sum((1, 2, 3))  # positive or negative
        even, odd = filters[symmetry.argsort(descending=True)].chunk(2)
        self.stem.weight.copy_(torch.stack([even, odd, -even, -odd], dim=1).flatten(0, 1))  # as mirror_channels has it
        # SiLU drops most of what is below 0, so shift up. Trained biases are no better, and their gradient is the
        # costliest of all.
        self.stem.bias.fill_(0.8)
        self.stem.requires_grad_(False)
        for filters in self.filters():
            nn.init.dirac_(filters[: filters.shape[1]])
            if self.mirror:
                symmetrize(filters)

    @torch.no_grad()
    def fix_scales(self):
        """Freeze the scales and the last bias, for training at large rates.

        The scale of batch norm stays 1: the filters behind it are normalized anyway. The linear layer starts small
        (its logits are nearly 0, every class as likely as any other) and without a bias. The running statistics
        follow the last few batches, as the net changes much in a step.
        """
        for layer in self.groups.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.requires_grad_(False)
                layer.momentum = 0.2
        nn.init.normal_(self.head.weight, std=1 / self.head.in_features)
        nn.init.zeros_(self.head.bias).requires_grad_(False)


class Muon:
    """Gradient descent with momentum; the step of a convolution is made orthogonal: every direction moves as far.

    A gradient is mostly a few strong directions. Replacing its singular values by ones lets the weak ones learn too,
    which takes far fewer steps than SGD or Adam. (K. Jordan et al., "Muon: an optimizer for hidden layers in neural
    networks", 2024; the constants here are those of his speed-run airbench94, or close.) The filters themselves are
    kept at a fixed norm: batch norm undoes their scale anyway, and so one rate suits all layers. The biases and
    the linear layer are stepped along their own gradients (SGD, with a little weight decay), summed over the batch so
    that an epoch goes as far in large batches as in small ones.

    It has no base class: making a first optimizer of torch.optim imports more than PyTorch itself.
    """

    def __init__(self, parameters, lr, batch_size):
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.velocities = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.lr = lr
        self.batch_size = batch_size

    @torch.no_grad()
    def step(self):
        for parameter, velocity in zip(self.parameters, self.velocities, strict=True):
            momentum = 0.65 if parameter.ndim == 4 else 0.85
            velocity.mul_(momentum).add_(parameter.grad)
            direction = parameter.grad + momentum * velocity  # Nesterov: look one step ahead
            if parameter.ndim == 4:
                parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
                parameter.sub_(self.lr * orthogonalize(direction.flatten(1)).view_as(parameter))
            else:
                # airbench94 divides the logits by their n inputs; to divide the rate by n ** 2 does the same
                factor = 1 / 4 if parameter.ndim == 1 else 3.3 / parameter.shape[1] ** 2
                rate = self.lr * self.batch_size
                parameter.mul_(1 - 1e-5 * rate)
                parameter.sub_(rate * factor * direction)

    def state_dict(self):
        return {"velocities": self.velocities}

    def load_state_dict(self, state):
        for velocity, saved in zip(self.velocities, state["velocities"], strict=True):
            velocity.copy_(saved)


def orthogonalize(matrix, steps=3):
    """Roughly U V^T of the singular value decomposition U S V^T of a matrix, by Newton-Schulz iteration.

    Each step applies an odd polynomial to the singular values that pushes those in (0, 1] towards 1. It needs nothing
    but matrix products, which an SVD cannot compete with; the polynomial is that of Muon's authors.
    """
    x = matrix / (matrix.norm() + 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


def build(settings, images):
    """A new network and its optimizer, as the settings of a run say, on the device of `images`.

    Args:
        settings: a row of train.RECIPES, and a seed.
        images: (N, 3, H, W) normalized images, a sample of the training set, for `whiten`.
    """
    torch.manual_seed(settings["seed"])
    # Channels last: the CPU's convolutions are 1.4 to 2 times as fast with an image's channels next to each other.
    model = ConvNet(settings["widths"], settings["mirror"]).to(images.device, memory_format=torch.channels_last)
    if settings["whiten"]:
        model.whiten(images)
    if settings["muon"]:
        model.fix_scales()
        return model, Muon(model.parameters(), settings["lr"], settings["batch_size"])
    return model, torch.optim.Adam(model.parameters(), lr=settings["lr"])


def forward(model, images, precision):
    """The logits (B, 10) of normalized images, float32 whatever the precision they are computed in."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(images).float()


def train_step(model, optimizer, criterion, images, labels, precision):
    """One step of gradient descent. Returns the logits (B, 10), and the loss that was minimized as a float.

    The batch is split into parts of at most 250 images, whose losses, weighted by their sizes, add up to that of the
    batch. What a part computes forward is still in the processor's cache when its gradients need it: a step of 1,000
    is a quarter faster and takes a quarter of the memory. (Batch norm sees one part at a time.)
    """
    model.zero_grad()
    count = math.ceil(len(images) / 250)
    logits, loss = [], 0
    for part, targets in zip(images.chunk(count), labels.chunk(count), strict=True):
        outputs = forward(model, part, precision)
        weighted = criterion(outputs, targets) * (len(targets) / len(labels))
        weighted.backward()
        logits.append(outputs.detach())
        loss += weighted.item()
    if model.mirror:  # symmetric steps keep the filters symmetric
        for filters in model.filters():
            symmetrize(filters.grad)
    optimizer.step()
    return torch.cat(logits), loss


class UsageError(Exception):
    """What was asked for cannot be done; the message says why and what to ask for instead."""


def find_device(name):
    """The device of that name, "cpu", "cuda" or "mps"; for "auto" the fastest that works."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    for device in filter(there.get, there) if name == "auto" else [name]:
        try:
            if not there[device]:
                raise RuntimeError(f"PyTorch sees only {', '.join(filter(there.get, there))}")
            F.conv2d(*torch.zeros(2, 1, 1, 1, 1, device=device)).item()
            return device
        except RuntimeError as problem:  # such as a card that this PyTorch does not support
            reason = str(problem).strip().splitlines()[0]
            if name == "auto":
                print(f"{device} cannot be used ({reason}): continuing without it", flush=True)
    raise UsageError(f"--device {name} cannot be used: {reason}; try --device auto")


def choose_precision(device):
    """ "bf16" where matrix products in it are faster than in fp32, else "fp32"."""
    if device != "cpu":  # older cards only emulate it
        return "bf16" if device == "cuda" and torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    # Half as many bytes can mean twice the speed, but only with the right instructions: on a CPU without them, and on
    # some that have them, bf16 is the slower one. So both are timed, on a product small enough to take no time, and in
    # turns, so that a moment in which the machine is busy slows both.
    matrices = [torch.ones(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    times = [[timeit.timeit("a @ a", globals={"a": a}, number=1) for a in matrices] for _ in range(30)]
    fp32, bf16 = map(min, zip(*times, strict=True))
    return "bf16" if bf16 < 0.75 * fp32 else "fp32"
