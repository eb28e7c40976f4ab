"""What encoders of images and of audio share: fused convolutions, and summaries of all tokens."""

# Letters: B batch, N tokens, D width, Q queries

import itertools
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from openm6.codecs.external import Encoder
from openm6.core.config import Config


class Convolution(nn.Sequential):
    """A convolution with batch norm and ReLU."""

    def __init__(self, convolution: nn.Conv1d | nn.Conv2d) -> None:
        norm = nn.BatchNorm1d if isinstance(convolution, nn.Conv1d) else nn.BatchNorm2d
        super().__init__(convolution, norm(convolution.out_channels), nn.ReLU())

    def fuse(self) -> None:
        """Make the batch norm a part of the convolution, as its running means no longer change."""
        convolution, norm = self[0], self[1]
        if isinstance(norm, nn.Identity):
            return
        assert isinstance(convolution, (nn.Conv1d, nn.Conv2d)) and isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
        assert norm.running_mean is not None and norm.running_var is not None
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        self[1] = nn.Identity()


class ConvEncoder(Encoder):
    """Convolutions whose features are tokens, and `queries` of which each sums up all of them."""

    kind: ClassVar[str]
    config: Config
    queries: nn.Conv1d

    def features(self, inputs: Tensor) -> Tensor:
        """Features of inputs of equal size.  # B ... -> B D N"""
        raise NotImplementedError

    def summaries(self, features: Tensor) -> Tensor:
        """Means of the features, with weights of each query.  # B D N -> B D Q"""
        weights = self.queries(features).float().softmax(2)  # B Q N
        return torch.einsum("bdn,bqn->bdq", features.float(), weights)

    def fuse(self) -> None:
        """Make batch norms a part of the convolutions: after the training."""
        for module in list(self.modules()):
            if isinstance(module, Convolution):
                module.fuse()


def halvings(channels: tuple[int, ...]) -> nn.Sequential:
    """Convolutions to each number of channels after the first, at half the rows and columns of the one before."""
    return nn.Sequential(*(
        Convolution(nn.Conv2d(old if stride == 2 else new, new, 3, stride, padding=1, bias=False))
        for old, new in itertools.pairwise(channels)
        for stride in (2, 1)
    ))  # fmt: skip
