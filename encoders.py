"""Data -> features, and the convolutional blocks every network here is made of.

The blocks follow DDPM (Ho et al., 2020) and its latent-diffusion descendants: group norm, SiLU,
3x3 convolution, twice. `ConvEncoder` maps a picture, or any plane of features, to the moments of
q(z|x), Section 3.1 of the paper; it has no skip connections into the decoder. `LocalPoolPointNet`
(Convolutional Occupancy Networks, Peng et al., 2020) makes such planes of a point cloud.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


class GroupNorm(nn.GroupNorm):
    """Group norm in the precision of its weights, float32 also under autocast."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def norm(channels):
    """GroupNorm in 32 groups, or in fewer where a narrow layer would have under 4 channels in one.

    (On CPU the backward pass over channels-last groups of a single channel is also 3x slower.)
    """
    groups = math.gcd(32, channels)
    while groups > 1 and channels < 4 * groups:
        groups //= 2
    return GroupNorm(groups, channels, eps=1e-6)


def conv3x3(in_channels, out_channels, stride=1):
    """3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1 if stride == 1 else 0)


def zeroed(layer):
    """The layer with all parameters zero, so that a residual branch starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x))) + emb))), (B,C,H,W) -> (B,out_channels,H,W).

    With `emb_channels`, a vector (B, emb_channels) such as the time embedding is added between the
    convolutions and the second one starts at zero, as in DDPM's U-Net.
    """

    def __init__(self, in_channels, out_channels, emb_channels=0):
        super().__init__()
        self.norm1, self.conv1 = norm(in_channels), conv3x3(in_channels, out_channels)
        self.norm2, self.conv2 = norm(out_channels), conv3x3(out_channels, out_channels)
        self.emb = nn.Linear(emb_channels, out_channels) if emb_channels else None
        if emb_channels:
            zeroed(self.conv2)
        self.skip = nn.Identity()
        if in_channels != out_channels:
            self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        if self.emb is not None:
            h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return self.skip(x) + h


class Attention(nn.Module):
    """x + project(attention(norm(x))) over N tokens, x (B,C,N) -> (B,C,N).

    Queries come from x; keys and values from `context` (B,M,context_channels) where the layer was
    built with `context_channels`, else from x as well.
    """

    def __init__(self, channels, heads=1, context_channels=0, zero_init=False):
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(context_channels or channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        if zero_init:
            zeroed(self.out)

    def forward(self, x, context=None):
        h = self.norm(x).transpose(1, 2)  # (B, N, C)
        kv = self.kv(h if context is None else context)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2)  # each (B, heads, N or M, d)
                   for t in (self.q(h), *kv.chunk(2, dim=2)))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(h).transpose(1, 2)


class PlaneAttention(Attention):
    """Self-attention over the pixels of one plane, (B,C,H,W) -> (B,C,H,W)."""

    def forward(self, x):
        return super().forward(x.flatten(2)).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """3x3 convolution of stride 2: (B,C,H,W) -> (B,C,ceil(H/2),ceil(W/2)).

    Pads right and bottom by one as the LDM autoencoder does; odd sizes get a row on the left and
    top as well, so that no pixel is lost and even a single row survives.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = conv3x3(channels, channels, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (x.shape[3] % 2, 1, x.shape[2] % 2, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to `size`, twice the input if not given, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x, size=None):
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size=size, mode='nearest'))


class ConvEncoder(nn.Module):
    """Plane (B,in_channels,H,W) -> (B,2*z_channels,h,w), h = H / 2^(levels-1) rounded up.

    LDM-style: stem, `num_res_blocks` ResBlocks a level with a stride-2 convolution between levels,
    then ResBlock, single-head attention, ResBlock, and a 3x3 head. A 1x1 convolution, one for each
    plane of a tri-plane, makes mean and log variance of it.
    """

    def __init__(self, in_channels, ch, ch_mult, num_res_blocks, z_channels):
        super().__init__()
        layers, width = [conv3x3(in_channels, ch)], ch
        for level, mult in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                layers.append(ResBlock(width, ch * mult))
                width = ch * mult
            if level < len(ch_mult) - 1:
                layers.append(Downsample(width))
        layers += [ResBlock(width, width), PlaneAttention(width), ResBlock(width, width)]
        layers += [norm(width), nn.SiLU(inplace=True), conv3x3(width, 2 * z_channels)]
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x)


# ---- point clouds ------------------------------------------------------------------------------

def cells_of_points(points, axes, resolution):
    """Which of the R x R cells of a plane each point (B,N,D) in [-1,1]^D falls into: (B*N,).

    axes = (coordinate along the width, along the height); cells are counted row by row, item after
    item, so that one number names a cell of the whole batch.
    """
    cell = ((points[..., list(axes)] + 1) * (resolution / 2)).long().clamp(0, resolution - 1)
    item = torch.arange(len(points), device=points.device)[:, None]
    return ((item * resolution + cell[..., 1]) * resolution + cell[..., 0]).flatten()


def pool_cells(features, cell, count, reduce):
    """'amax' or 'mean' of the features (M,C) in each of `count` cells, 0 in empty ones: (count,C)."""
    return features.new_zeros(count, features.shape[1]).scatter_reduce(
        0, cell[:, None].expand_as(features), features, reduce, include_self=False)


class PointBlock(nn.Module):
    """skip(x) + fc1(relu(fc0(relu(x)))) on the last axis; fc1 starts at zero."""

    def __init__(self, in_features, out_features):
        super().__init__()
        hidden = min(in_features, out_features)
        self.fc0, self.fc1 = nn.Linear(in_features, hidden), nn.Linear(hidden, out_features)
        nn.init.zeros_(self.fc1.weight)
        self.skip = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x):
        return self.skip(x) + self.fc1(F.relu(self.fc0(F.relu(x))))


class LocalPoolPointNet(nn.Module):
    """Point cloud (B,N,3 or more) -> features on planes, name -> (B,out_channels,R,R).

    Positions, the first three columns, lie in [-1,1]; further ones are features such as colour.
    `planes` maps names to (coordinate along the width, along the height). Between its `blocks`
    blocks, a point gets, beside its own `hidden` features, their maxima over the points in its cell
    of each plane, summed over the planes. The result is the mean over each cell, 0 in empty ones.
    Any N; the order of the points does not matter.
    """

    def __init__(self, planes, in_features, resolution, hidden=32, blocks=5, out_channels=32):
        super().__init__()
        self.planes, self.resolution = planes, resolution
        self.enter = nn.Linear(in_features, 2 * hidden)
        self.blocks = nn.ModuleList(PointBlock(2 * hidden, hidden) for _ in range(blocks))
        self.leave = nn.Linear(hidden, out_channels)

    def forward(self, points):
        batch, R = len(points), self.resolution
        cells = {name: cells_of_points(points, axes, R) for name, axes in self.planes.items()}
        h = self.enter(points.flatten(0, 1))  # (B*N, 2*hidden)
        for i, block in enumerate(self.blocks):
            if i > 0:
                pooled = [pool_cells(h, c, batch * R * R, 'amax').index_select(0, c)
                          for c in cells.values()]
                h = torch.cat([h, sum(pooled)], dim=1)
            h = block(h)
        h = self.leave(h)
        return {name: pool_cells(h, c, batch * R * R, 'mean').view(batch, R, R, -1).permute(
            0, 3, 1, 2) for name, c in cells.items()}
