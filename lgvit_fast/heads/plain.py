"""The rivals' heads: what the compared early-exit methods put at an exit (paper section 4.2).

linear: SDN (Kaya et al., ICML 2019), PABEE (Zhou et al., NeurIPS 2020), BERxiT (Xin et al., EACL 2021)
and PCEE (Zhang et al., NAACL 2022). vit_ee: ViT-EE (Bakhtiarnia et al., BMVC 2021). mlp, conv and
attention are the plain alternatives to the local and global heads.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from lgvit_fast.heads.affine import batchnorm_tokens
from lgvit_fast.ops.lph import LPHWeights, lph_pool

__all__ = ["AttentionHead", "BlockHead", "ConvHead", "LinearHead", "MLPHead"]


class LinearHead(nn.Module):
    """Nothing before the readout: the tokens as they are."""

    whole = True

    def forward(self, tokens: Tensor, patch_grid: tuple[int, int]) -> Tensor:
        """Tokens `[B, P + N, C]`, unchanged."""
        return tokens

    def start_plain(self) -> None:
        """Nothing to do: there is no transformation."""


class BlockHead(nn.Module):
    """A transformer block on all tokens (ViT-EE).

    Args:
        width: C.
        num_heads: attention heads, must divide C.
        mlp_ratio: hidden width of its perceptron over C.
    """

    whole = True

    def __init__(self, width: int, num_heads: int = 8, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.block = Block(width, num_heads, mlp_ratio, qkv_bias=True)

    def forward(self, tokens: Tensor, patch_grid: tuple[int, int]) -> Tensor:
        """Tokens `[B, P + N, C]` to tokens of the same shape."""
        out: Tensor = self.block(tokens)
        return out

    def start_plain(self) -> None:
        """Make the tokens pass unchanged (`ExitHead.start_plain`)."""
        for last in ("attn.proj", "mlp.fc2"):
            _zero(self.block.get_submodule(last))


class ConvHead(nn.Module):
    """A plain 3x3 convolution on the patch grid: `y = BN(gelu(conv3x3 x))`."""

    whole = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, patches: Tensor, patch_grid: tuple[int, int]) -> Tensor:
        """Patches `[B, N, C]` to the feature `[B, N, C]`."""
        grid = patches.unflatten(1, patch_grid).permute(0, 3, 1, 2)
        hidden = F.gelu(self.conv(grid)).permute(0, 2, 3, 1).flatten(1, 2)
        return batchnorm_tokens(self.norm, hidden)

    def start_plain(self) -> None:
        """Make the feature zero (`ExitHead.start_plain`)."""
        _zero(self.norm)


class AttentionHead(nn.Module):
    """Full self-attention over all patches, with biases: no residual, no norm."""

    whole = False

    def __init__(self, width: int, num_heads: int = 8) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, patches: Tensor, patch_grid: tuple[int, int]) -> Tensor:
        """Patches `[B, N, C]` to the feature `[B, N, C]`."""
        q, k, v = self.qkv(patches).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        feature: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return feature

    def start_plain(self) -> None:
        """Make the feature the patches, averaged by the attention (`ExitHead.start_plain`)."""
        with torch.no_grad():
            nn.init.eye_(self.qkv.weight[2 * self.proj.in_features :])
        nn.init.zeros_(self.qkv.bias)
        nn.init.eye_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)


class MLPHead(nn.Module):
    """A perceptron on every patch: `y = W2 gelu(W1 x)`. Its pooled form is the light head's kernel."""

    whole = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, patches: Tensor, patch_grid: tuple[int, int]) -> Tensor:
        """Patches `[B, N, C]` to the feature `[B, N, C]`."""
        feature: Tensor = self.fc2(F.gelu(self.fc1(patches)))
        return feature

    def start_plain(self) -> None:
        """Make the feature zero (`ExitHead.start_plain`)."""
        _zero(self.fc2)

    def fold(self, dtype: torch.dtype, classifier: Tensor) -> tuple[LPHWeights, Tensor, Tensor]:
        """Weights of `pool`, matrix `[K, 2C]` and offset `[K]` from pooled to the logits."""
        vectors = torch.promote_types(dtype, torch.float32)
        weights = LPHWeights(self.fc1.weight.to(dtype), self.fc1.bias.to(vectors))
        matrix = classifier @ self.fc2.weight.double()
        unused = torch.zeros_like(matrix)  # the mean token: there is no residual
        return weights, torch.cat((matrix, unused), dim=1), classifier @ self.fc2.bias.double()

    def pool(
        self,
        tokens: Tensor,
        patch_grid: tuple[int, int],
        num_prefix_tokens: int,
        weights: LPHWeights,
    ) -> Tensor:
        """The inference form: tokens `[B, P + N, C]` to pooled vectors `[B, 2, C]`."""
        return lph_pool(tokens, patch_grid, num_prefix_tokens, weights)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
