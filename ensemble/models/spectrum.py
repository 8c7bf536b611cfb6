"""A timm architecture without pretrained weights: a linear head on the log-energies of a block DCT of the brightness.

Upsampling inside a generator leaves traces in the spectrum (Frank et al., "Leveraging Frequency Analysis for Deep Fake
Image Recognition", 2020). timm builds it by name once this module is imported.
"""

import math
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as JPEG has it
FAINT, FAINTEST = 0.5, 0.005  # levels of 255, added to a magnitude and to a mean of many before the log

default_cfgs = generate_default_cfgs(
    {
        "dct_spectrum.untrained": {
            "input_size": (3, 256, 256),
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "crop_pct": 1.0,
            "classifier": "head",
        }
    }
)


class Spectrum(nn.Module):
    """Pixels [N, 3, H, W] in 0..1 -> block * (block + 1) features -> `num_classes` scores.

    Overlapping square blocks are transformed by an orthonormal DCT-II; over blocks, each
    magnitude gives the log of its mean and the mean of its log, averaged with the transposed
    frequency, so that flips and quarter turns change almost nothing. An odd stride lets blocks
    meet the 8x8 grid of JPEG at every phase.
    """

    luma: torch.Tensor
    basis: torch.Tensor
    upper: torch.Tensor

    def __init__(self, block: int = 32, stride: int = 15, num_classes: int = 2, in_chans: int = 3) -> None:
        super().__init__()
        if in_chans != len(LUMA) or block < 2 or stride < 1:
            raise ValueError(
                "a spectrum is taken of red, green and blue, in blocks of 2 or more, at a stride of 1 or more"
            )
        self.stride = stride
        self.num_classes = num_classes
        self.num_features = block * (block + 1)
        # Kept in the file: from_pretrained builds networks without memory, and fills them from it alone.
        self.register_buffer("luma", torch.tensor(LUMA).view(1, 3, 1, 1))
        self.register_buffer("basis", dct_basis(block))
        down, across = torch.triu_indices(block, block)
        self.register_buffer("upper", down * block + across)
        self.head = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """float [N, 3, H, W] -> float [N, 2, block * (block + 1) / 2]."""
        block = self.basis.shape[0]
        grey = (x * (255.0 * self.luma)).sum(dim=1, keepdim=True)
        columns = nn.functional.conv2d(grey, self.basis.view(block, 1, block, 1), stride=(self.stride, 1))
        n, _, rows, width = columns.shape
        lines = columns.transpose(1, 2).reshape(n * rows * block, 1, 1, width)
        both = nn.functional.conv2d(lines, self.basis.view(block, 1, 1, block), stride=(1, self.stride))
        size = both.view(n, rows, block, block, -1).abs()  # [N, rows, frequency down, frequency across, columns]
        mean = (size.mean(dim=(1, 4)) + FAINTEST).log()
        energies = torch.stack((mean, (size + FAINT).log().mean(dim=(1, 4))), dim=1)
        return ((energies + energies.transpose(2, 3)) / 2).flatten(2)[:, :, self.upper]

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward_features` gives -> float [N, num_classes]."""
        scores: torch.Tensor = self.head(x.flatten(1))
        return scores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float [N, 3, H, W] in 0..1 -> float [N, num_classes]."""
        return self.forward_head(self.forward_features(x))


def dct_basis(size: int) -> torch.Tensor:
    """float32 [size, size]: row k is the k-th cosine of the orthonormal DCT-II."""
    angle = (torch.arange(size, dtype=torch.float64) + 0.5) * (math.pi / size)
    waves = torch.cos(torch.arange(size, dtype=torch.float64)[:, None] * angle) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves.float()


@register_model  # type: ignore[untyped-decorator]  # timm has no types for it
def dct_spectrum(pretrained: bool = False, **arguments: Any) -> Spectrum:
    """timm's entry: `timm.create_model("dct_spectrum", block=32, stride=15)`. There are no weights to load."""
    network: Spectrum = build_model_with_cfg(Spectrum, "dct_spectrum", pretrained, **arguments)
    return network
