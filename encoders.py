"""Data -> features, and the convolutional blocks of which the networks are made.

The blocks follow DDPM (Ho et al., 2020) and latent diffusion (Rombach et al., 2022). `ConvEncoder`
makes of a picture, or of any plane of features, those from which mean and variance of q(z|x) come
(Section 3.2, Appendix A). `LocalPoolPointNet` (Convolutional Occupancy Networks, Peng et al., 2020)
makes planes of features of a point cloud, `VideoEncoder` (TimeSformer, Bertasius et al., 2021;
PVDM, Yu et al., 2023) of a clip. Texts become features for cross-attention: those of CLIP
(Radford et al., 2021) from its published files, those stored in an .npz, or those of a small
transformer over bytes that is trained with the diffusion model.
"""
import argparse
import gzip
import html
import json
import math
import re
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import parse_json, regular, require, salvaged
from inr import PLANES, PointBlock


class GroupNorm(nn.GroupNorm):
    """Group norm in the precision of its weights, also under autocast: bfloat16 is slow on CPU."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def norm(channels):
    """GroupNorm in 32, 16, 8, .. groups of at least 4 channels: smaller ones are slow on CPU."""
    groups = math.gcd(32, channels)
    while groups > 1 and channels < 4 * groups:
        groups //= 2
    return GroupNorm(groups, channels, eps=1e-6)


def regroup(module, groups, eps):
    """Give all group norms of a module so many groups, 0 for as many as they have, and this eps."""
    for layer in module.modules():
        if isinstance(layer, GroupNorm):
            layer.eps, layer.num_groups = eps, groups or layer.num_groups
            require(layer.num_channels % layer.num_groups == 0, f'a group norm of '
                    f'{layer.num_channels} channels has no {layer.num_groups} groups')


def conv3x3(in_channels, out_channels, stride=1):
    """3x3 convolution; at stride 1 it keeps the size, at others it does not pad."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1 if stride == 1 else 0)


def zeroed(layer):
    """The layer, with all parameters set to 0, so that a residual block starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x))) + emb))), (B,C,H,W) -> (B,out_channels,H,W).

    With `emb_channels`, a linear map of SiLU(emb) is added between the convolutions, where emb
    (B, emb_channels) is the time embedding, and the second one starts at zero, as in DDPM's U-Net.
    """

    def __init__(self, in_channels, out_channels, emb_channels=0):
        super().__init__()
        self.norm1, self.conv1 = norm(in_channels), conv3x3(in_channels, out_channels)
        self.norm2, self.conv2 = norm(out_channels), conv3x3(out_channels, out_channels)
        self.emb = nn.Linear(emb_channels, out_channels) if emb_channels else None
        if emb_channels:
            zeroed(self.conv2)
        self.skip = (nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels
                     else nn.Identity())

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        if self.emb is not None:
            h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return self.skip(x) + h


class Attention(nn.Module):
    """x + linear(attention(norm(x))) over N tokens, x (B,C,N) -> (B,C,N).

    A layer built with `context_channels` attends to `context` (B,M,context_channels), which gives
    the keys and values, any other layer to x itself. A head has `head_channels` channels, or its
    share of C. `zero_init` makes it start as the identity.
    """

    def __init__(self, channels, heads=1, context_channels=0, zero_init=False, head_channels=0):
        super().__init__()
        self.heads, width = heads, heads * head_channels or channels
        self.norm = norm(channels)
        self.q = nn.Linear(channels, width)
        self.kv = nn.Linear(context_channels or channels, 2 * width)
        self.out = nn.Linear(width, channels)
        if zero_init:
            zeroed(self.out)

    def forward(self, x, context=None):
        h = self.norm(x).transpose(1, 2)  # (B, N, C)
        kv = self.kv(h if context is None else context)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2)  # each (B, heads, N or M, d)
                   for t in (self.q(h), *kv.chunk(2, dim=2)))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(h).transpose(1, 2)


def across(attention, xs, batch, *context):
    """`attention` over the tokens of all planes at once, a list like xs.

    xs has a tensor (B*P,C,H,W) for each shape of planes, the P planes of an item side by side.
    """
    shapes = [(len(x) // batch, *x.shape[2:]) for x in xs]  # (P, H, W) each
    tokens = [x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2) for x in xs]
    tokens = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=2)  # (B, C, N)
    parts = attention(tokens, *context).split([math.prod(s) for s in shapes], dim=2)
    return [part.unflatten(2, shape).transpose(1, 2).flatten(0, 1)
            for part, shape in zip(parts, shapes)]


class PlaneAttention(Attention):
    """Self-attention over the pixels of one plane, (B,C,H,W) -> (B,C,H,W)."""

    def forward(self, x):
        return super().forward(x.flatten(2)).unflatten(2, x.shape[2:])


class JoinedPlanes(nn.Sequential):
    """ResBlock, attention, ResBlock on `planes` planes as the channels of one.

    (B*P,C,H,W), the P planes of an item side by side -> the same shape.
    """

    def __init__(self, channels, planes=3):
        width = planes * channels
        super().__init__(ResBlock(width, width), PlaneAttention(width), ResBlock(width, width))
        self.planes = planes

    def forward(self, x):
        h = super().forward(x.unflatten(0, (-1, self.planes)).flatten(1, 2))  # (B, P*C, H, W)
        return h.unflatten(1, (self.planes, -1)).flatten(0, 1)


class Downsample(nn.Module):
    """3x3 convolution of stride 2: (B,C,H,W) -> (B,C,ceil(H/2),ceil(W/2)).

    Zeros are added to the right and below, as in latent diffusion, or on all sides (`symmetric`).
    """

    def __init__(self, channels, symmetric=False):
        super().__init__()
        self.conv, self.symmetric = conv3x3(channels, channels, stride=2), symmetric

    def forward(self, x):
        # Odd sizes are padded on both sides, or a row would be lost.
        left, top = (1, 1) if self.symmetric else (x.shape[3] % 2, x.shape[2] % 2)
        return self.conv(F.pad(x, (left, 1, top, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour copy (B,C,*size) of planes (B,C,H,W), then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode='nearest'))


class ConvEncoder(nn.Module):
    """Plane (B,in_channels,H,W) -> (B,2*z_channels,h,w), where h = H / 2^(levels-1) rounded up.

    As in latent diffusion: a 3x3 convolution; for each mult of `ch_mult`, a level of
    `num_res_blocks` ResBlocks of width ch * mult, with `Downsample` between levels; then ResBlock,
    attention, ResBlock and a 3x3 convolution. The VAE makes mean and log variance of the result.
    `joined`: the downsampling factors after whose level `JoinedPlanes` follow, 0 for after the last
    attention.
    """

    def __init__(self, in_channels, ch, ch_mult, num_res_blocks, z_channels, joined=()):
        super().__init__()
        layers, width = [conv3x3(in_channels, ch)], ch
        for level, mult in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                layers.append(ResBlock(width, ch * mult))
                width = ch * mult
            if 2 ** level in joined:
                layers.append(JoinedPlanes(width))
            if level < len(ch_mult) - 1:
                layers.append(Downsample(width))
        layers += [ResBlock(width, width), PlaneAttention(width), ResBlock(width, width)]
        if 0 in joined:
            layers.append(JoinedPlanes(width))
        layers += [norm(width), nn.SiLU(inplace=True), conv3x3(width, 2 * z_channels)]
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x)


# ---- point clouds ------------------------------------------------------------------------------

def pool_cells(features, cell, count, reduce):
    """Maximum ('amax') or 'mean' of features (M,C) by cell (M,): (count,C), 0 for empty cells."""
    return features.new_zeros(count, features.shape[1]).scatter_reduce(
        0, cell[:, None].expand_as(features), features, reduce, include_self=False)


class LocalPoolPointNet(nn.Module):
    """Point cloud (B,N,3 or more) -> features on planes, name -> (B,out_channels,R,R).

    The first three columns are positions in [-1,1], others are features such as colour. `planes`
    maps names to (coordinate along the width, along the height) of planes of R = `resolution`
    cells a side. Each of the `blocks` blocks but the first reads a point's `hidden` features and,
    for its neighbourhood, their maximum over the points in its cell of each plane, summed over the
    planes. The result is the mean over the points of each cell, 0 in empty cells. With `local`,
    points are also given their place in their cell, which later convolutions cannot know otherwise.
    """

    def __init__(self, planes, in_features, resolution, hidden, blocks, out_channels, local):
        super().__init__()
        self.planes, self.resolution, self.local = planes, resolution, local
        self.proj_in = nn.Linear(in_features + 3 * local, 2 * hidden)
        self.blocks = nn.ModuleList(PointBlock(2 * hidden, hidden) for _ in range(blocks))
        self.proj_out = nn.Linear(hidden, out_channels)

    def forward(self, points):
        batch, R = len(points), self.resolution
        place = (points[..., :3] + 1) * (R / 2)  # in units of cells
        cell = place.floor().clamp(0, R - 1).long()  # points outside count to the nearest one
        if self.local:  # from -1 to 1 within the cell
            points = torch.cat([points, 2 * (place - cell) - 1], dim=2)
        item = torch.arange(batch, device=points.device)[:, None]
        cells = {name: ((item * R + cell[..., v]) * R + cell[..., u]).flatten()  # (B*N,) numbers
                 for name, (u, v) in self.planes.items()}
        with torch.autocast(points.device.type, enabled=False):  # bfloat16 blurs places
            h = self.proj_in(points.flatten(0, 1))  # (B*N, 2*hidden)
        for i, block in enumerate(self.blocks):
            if i > 0:
                pooled = [pool_cells(h, c, batch * R * R, 'amax').index_select(0, c)
                          for c in cells.values()]
                h = torch.cat([h, sum(pooled)], dim=1)
            h = block(h)
        h = self.proj_out(h).float()  # bfloat16 cannot count beyond 256
        return {name: pool_cells(h, c, batch * R * R, 'mean').view(batch, R, R, -1).permute(
            0, 3, 1, 2) for name, c in cells.items()}


# ---- clips -------------------------------------------------------------------------------------

def time_angles(frames, channels, device=None, code=False):
    """Rotary angles (frames,channels): t 10000^(-2k/channels) for the pair k of channels.

    The authors' code (`code`) gives the two channels of a pair the angles of k = 2j and 2j + 1,
    which is no rotation and makes attention depend on more than the difference of two times.
    """
    rate = 10000 ** (-2 * torch.arange(channels // 2, device=device) / channels)
    angles = torch.arange(frames, device=device)[:, None] * rate
    return angles.repeat(1, 2) if code else angles.repeat_interleave(2, dim=1)


def space_angles(h, w, channels, device=None, code=False):
    """Rotary angles (h*w,channels): pi * scale * place, of the row, then of the column.

    Scales lie between 1 and 5, evenly in the logarithm. Places are centres of cells in [-1,1], so a
    frame has the same angles at each resolution; the authors' first and last (`code`) are the ends.
    """
    scale = torch.logspace(0, math.log10(5), channels // 4, device=device)
    y, x = (torch.linspace(-1, 1, n, device=device)[:, None] * (1 if code else 1 - 1 / n) * scale
            for n in (h, w))
    pairs = torch.cat([y[:, None].expand(h, w, -1), x.expand(h, w, -1)], dim=2)
    return math.pi * pairs.flatten(0, 1).repeat_interleave(2, dim=1)


def rotate(x, angles):
    """x (...,n,d) with each pair of neighbouring channels turned by its angle, angles (n,d)."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)  # by 90 degrees
    return (x * angles.cos() + turned * angles.sin()).to(x.dtype)


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v over n tokens, each (...,n,d).

    Of short lines the weights take no more memory than q, and plain products are up to nine times
    as fast as the fused kernel's backward pass on a CPU in bfloat16.
    """
    n, d = q.shape[-2:]
    if n > d:
        return F.scaled_dot_product_attention(q, k, v)
    return (q @ k.transpose(-1, -2) * d ** -0.5).softmax(-1) @ v


class TokenAttention(nn.Module):
    """x + linear(attention(norm(x))) over n tokens (N,n,width), with rotary `angles` (n,d) or none.

    There are `heads` heads of d = `head_channels` channels, for rotary angles a multiple of 4.
    """

    def __init__(self, width, heads, head_channels):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * head_channels, bias=False)
        self.out = nn.Linear(heads * head_channels, width)

    def forward(self, x, angles=None):
        qkv = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, n, d)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class Residual(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x):
        return x + super().forward(x)


class GEGLU(nn.Module):
    """The first half of the channels times the GELU of the second."""

    def forward(self, x):
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class SpaceTimeLayer(nn.Module):
    """TimeSformer's layer, tokens (B,T,S,width) -> the same shape, S places in each of T frames.

    Attention over time at each place, over the places of each frame, and a feed-forward network.
    """

    def __init__(self, width, heads, head_channels):
        super().__init__()
        self.time = TokenAttention(width, heads, head_channels)
        self.space = TokenAttention(width, heads, head_channels)
        self.mlp = Residual(nn.LayerNorm(width), nn.Linear(width, 8 * width), GEGLU(),
                            nn.Linear(4 * width, width))

    def forward(self, x, of_time, of_space):
        size = x.shape[:2]
        x = self.time(x.transpose(1, 2).flatten(0, 1), of_time)  # (B*S, T, width)
        x = x.unflatten(0, (size[0], -1)).transpose(1, 2)
        return self.mlp(self.space(x.flatten(0, 1), of_space).unflatten(0, size))


class PlaneTransformer(nn.Module):
    """Reads the lines of a volume: (B,H,W,n,width) -> plane (B,width,H,W), from n tokens each.

    A learned summary token joins the n, goes with them through `depth` pre-norm layers, and is what
    is returned; the authors' code (`code`) returns the first of the n. Learned positions of `cells`
    tokens are interpolated linearly for other n.
    """

    def __init__(self, cells, width, depth, heads, hidden, code=False):
        super().__init__()
        self.returned = 0 if code else -1
        self.position = nn.Parameter(torch.randn(cells, width))
        self.summary = nn.Parameter(torch.randn(width))
        self.layers = nn.Sequential(*(layer for _ in range(depth) for layer in (
            TokenAttention(width, heads, width // 8), Residual(
                nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(),
                nn.Linear(hidden, width)))))

    def positions(self, n):
        """Positions (n,width) of n tokens at the centres of equal parts of the trained line."""
        return F.interpolate(self.position.T[None], n, mode='linear', align_corners=False)[0].T

    def forward(self, x):
        size = x.shape[:3]
        x = (x + self.positions(x.shape[3])).flatten(0, 2)  # (B*H*W, n, width)
        x = torch.cat([x, self.summary.expand(len(x), 1, -1)], dim=1)
        return self.layers(x)[:, self.returned].unflatten(0, size).permute(0, 3, 1, 2)


class VideoEncoder(nn.Module):
    """Clip (B,channels,T,H,W) -> dict of planes: xy (B,width,h,w), yt (..,T,h), xt (..,T,w).

    h = H / patch and w = W / patch, rounded up: frames are stretched to whole patches. As in
    TimeSformer (Bertasius et al., 2021) and PVDM (Yu et al., 2023): patches become tokens, these go
    through `depth` `SpaceTimeLayer`s, and each plane has a `PlaneTransformer` that reads along the
    coordinate which the plane lacks. `cells` = (w, h, T) are the sizes of training; any others will
    do.
    `code`: angles and returned tokens are those of the authors' code.
    """

    def __init__(self, channels=3, cells=(32, 32, 16), patch=8, width=384, depth=8, heads=8,
                 head_channels=64, plane_depth=4, plane_hidden=512, code=False):
        super().__init__()
        self.patch, self.head_channels, self.code = patch, head_channels, code
        self.embed = nn.Linear(patch * patch * channels, width)
        self.layers = nn.ModuleList(SpaceTimeLayer(width, heads, head_channels)
                                    for _ in range(depth))
        self.planes = nn.ModuleDict({
            name: PlaneTransformer(cells[3 - u - v], width, plane_depth, 4, plane_hidden, code)
            for name, (u, v) in PLANES['video'].items()})  # 0 + 1 + 2 = 3: the third coordinate

    def tokens(self, video):
        """Features (B,T,h,w,width) of the patches, before the planes."""
        T, H, W = video.shape[2:]
        p, h, w = self.patch, -(-H // self.patch), -(-W // self.patch)
        if (h * p, w * p) != (H, W):
            video = F.interpolate(video, (T, h * p, w * p), mode='trilinear')
        x = video.unflatten(4, (w, p)).unflatten(3, (h, p))  # (B, channels, T, h, p, w, p)
        x = self.embed(x.permute(0, 2, 3, 5, 4, 6, 1).flatten(4))
        x = x.flatten(2, 3).float()  # bfloat16 would round the sum anew in each layer
        of_time = time_angles(T, self.head_channels, x.device, self.code)
        of_space = space_angles(h, w, self.head_channels, x.device, self.code)
        for layer in self.layers:
            x = layer(x, of_time, of_space)
        return x.unflatten(2, (h, w))

    def forward(self, video):
        x = self.tokens(video)  # the coordinate c along axis 3 - c
        return {name: self.planes[name](x.movedim(u + v, 3))
                for name, (u, v) in PLANES['video'].items()}


# ---- weight files that others publish ------------------------------------------------------------

def is_torchscript(path):
    """Whether it is a zip with <root>/constants.pkl and <root>/code/."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        inside = [name.split('/')[1:] for name in archive.namelist()]
    return ['constants.pkl'] in inside and any(parts[:1] == ['code'] for parts in inside)


def read_safetensors(path):
    """The tensors of a safetensors file: a length, a JSON of places, the numbers."""
    with open(path, 'rb') as file:
        places = json.loads(file.read(int.from_bytes(file.read(8), 'little')))
        body = bytearray(file.read())
    kinds = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
                 I64=torch.int64, I32=torch.int32, U8=torch.uint8, BOOL=torch.bool)
    return {name: torch.frombuffer(body, dtype=kinds[v['dtype']], offset=v['data_offsets'][0],
                                   count=math.prod(v['shape'])).reshape(v['shape'])
            for name, v in places.items() if name != '__metadata__'}


def read_tensors(path, wanted):
    """The tensors of a weight file by name, floats as float32, whatever wraps them.

    A state dict, a TorchScript archive or safetensors. ValueError, which ends in `wanted`, if it
    holds none.
    """
    try:
        if regular(path).suffix == '.safetensors':
            state = read_safetensors(path)
        elif is_torchscript(path):
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # torch.jit is deprecated; tensors are all we take
                state = torch.jit.load(str(path), map_location='cpu').state_dict()
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # flags, as some save them
                state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # half a dozen types; all mean the same to a user
        raise ValueError(f'{path}: truncated or not a weight file ({type(error).__name__}); '
                         f'{wanted}') from None
    for wrapper in ('model', 'state_dict'):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f'{path}: holds no state dict; {wanted}')
    for prefix in ('module.', 'net.'):
        if state and all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


# ---- text --------------------------------------------------------------------------------------

class TextBlock(nn.Module):
    """Pre-norm transformer block (B,N,width) with CLIP's names and its GELU, x sigmoid(1.702 x)."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(width, 4 * width),
                                      c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, mask=None):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        h = self.mlp['c_fc'](self.ln_2(x))
        return x + self.mlp['c_proj'](h * torch.sigmoid(1.702 * h))


class ByteText(nn.Module):
    """A small transformer over the bytes of texts: tokens (B,length) -> (B,length,width).

    To a byte it adds a vector for each of the groups of 2 to `ngrams` bytes that end there, found
    in one table by a hash, as Pagnoni et al. (2024) do: so a word is told from others at once, even
    one that occurs in few texts.
    """

    def __init__(self, width=128, layers=3, heads=4, length=96, ngrams=0, rows=4093):
        super().__init__()
        self.ngrams = ngrams
        self.embedding = nn.Embedding(257, width)
        self.groups = nn.Embedding(rows, width) if ngrams else None
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def tokenise(self, texts):
        """Tokens (B,length) of a list of texts: UTF-8 bytes + 1, cut or filled up with 0."""
        tokens = torch.zeros(len(texts), len(self.position), dtype=torch.long)
        for row, text in zip(tokens, texts):
            data = torch.tensor(list(text.encode()[:len(row)]), dtype=torch.long) + 1
            row[:len(data)] = data
        return tokens

    def hashed(self, tokens, n):
        """Rows (B,length) of the table for the n bytes that end at each token."""
        key = torch.full_like(tokens, n)  # the same bytes in a longer group have another row
        for back in reversed(range(n)):
            key = key * 257 + F.pad(tokens, (back, 0))[:, :tokens.shape[1]]
        return key % self.groups.num_embeddings

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position
        for n in range(2, self.ngrams + 1):
            x = x + self.groups(self.hashed(tokens, n)) * (tokens > 0)[..., None]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class CLIPText(nn.Module):
    """CLIP's text encoder, with OpenAI's names: tokens (B,77) -> last hidden states (B,77,width).

    These states, after the final layer norm, are what latent diffusion conditions on.
    """

    def __init__(self, width=512, layers=12, heads=8, length=77, vocabulary=49408, embed=512):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(length, width))
        self.transformer = nn.ModuleDict(dict(resblocks=nn.ModuleList(
            TextBlock(width, heads) for _ in range(layers))))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed) / width ** 0.5)

    def forward(self, tokens):
        n = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:n]
        mask = torch.full((n, n), -math.inf, device=x.device).triu(1)
        for block in self.transformer['resblocks']:
            x = block(x, mask)
        return self.ln_final(x)

    def pooled(self, tokens):
        """Texts in the space CLIP shares with pictures, (B,embed): the state at the end token."""
        return self(tokens)[torch.arange(len(tokens)), tokens.argmax(1)] @ self.text_projection


HF_NAMES = [('text_model.', ''), ('vision_model.', 'visual.'),
            ('embeddings.token_embedding', 'token_embedding'),
            ('embeddings.position_embedding.weight', 'positional_embedding'),
            ('embeddings.class_embedding', 'class_embedding'),
            ('embeddings.patch_embedding', 'conv1'), ('pre_layrnorm', 'ln_pre'),
            ('post_layernorm', 'ln_post'), ('encoder.layers.', 'transformer.resblocks.'),
            ('self_attn.', 'attn.'), ('layer_norm1', 'ln_1'), ('layer_norm2', 'ln_2'),
            ('mlp.fc1', 'mlp.c_fc'), ('mlp.fc2', 'mlp.c_proj'), ('final_layer_norm', 'ln_final')]


def from_hugging_face(state):
    """CLIP's weights, name -> tensor, from Hugging Face's names and layout to OpenAI's."""
    renamed = {}
    for key, value in state.items():
        if key.endswith('position_ids'):
            continue
        if key in ('text_projection.weight', 'visual_projection.weight'):
            key, value = key.replace('visual_projection', 'visual.proj')[:-7], value.T
        else:
            for old, new in HF_NAMES:
                key = key.replace(old, new)
        renamed[key] = value
    for key in [k for k in renamed if '.q_proj.' in k]:
        parts = [renamed.pop(key.replace('q_proj', f'{part}_proj')) for part in 'qkv']
        renamed[key.replace('q_proj.', 'in_proj_')] = torch.cat(parts)
    return renamed


def is_hugging_face(state):
    """Whether the tensors of a CLIP have the names that Hugging Face gives them."""
    return any(k.startswith('text_model.') for k in state)


def vocabulary_beside(path):
    """The file of CLIP's byte pairs in the folder of its weights, OpenAI's or Hugging Face's."""
    files = (path.parent / name for name in ('bpe_simple_vocab_16e6.txt.gz', 'merges.txt'))
    return next((file for file in files if file.exists()), None)


def require_clip(state, path):
    """ValueError if the config.json of Hugging Face's CLIP tells of another network than OpenAI's.

    The tensors of those with an exact GELU, or with other heads, have the same names and shapes.
    """
    about = parse_json(salvaged(Path(path).with_name('config.json'))) if is_hugging_face(
        state) else {}
    for part in (about, about.get('text_config'), about.get('vision_config')):
        told = part if isinstance(part, dict) else {}
        act, width = told.get('hidden_act', 'quick_gelu'), told.get('hidden_size')
        heads = told.get('num_attention_heads')
        require(act == 'quick_gelu' and (not heads or width == 64 * heads), f'{path}: a CLIP with '
                f'{act} and heads of {width and heads and width // heads} channels, as its '
                "config.json says; OpenAI's has quick_gelu and 64")


def layers_of(state, prefix):
    """The number of blocks of a transformer whose names in the state dict begin with `prefix`."""
    return len({k.removeprefix(prefix).split('.')[0] for k in state if k.startswith(prefix)})


def clip_text(state, path):
    """Frozen CLIPText with the weights of a CLIP file, OpenAI's or Hugging Face's.

    `state` holds the tensors, `path` is for the ValueError if one is missing or has another shape.
    """
    require_clip(state, path)
    try:
        if is_hugging_face(state):
            state = from_hugging_face(state)
        embedding, position = state['token_embedding.weight'], state['positional_embedding']
        layers, width = layers_of(state, 'transformer.resblocks.'), embedding.shape[1]
        # Hugging Face's text model by itself has no projection, and features need none.
        projection = state.get('text_projection', torch.eye(width))
        with torch.device('meta'):
            tower = CLIPText(width, layers, width // 64, len(position), len(embedding),
                             projection.shape[1])
        own = {k: state.get(k) for k in tower.state_dict()} | dict(text_projection=projection)
        tower.load_state_dict(own, assign=True)
    except (KeyError, RuntimeError, AttributeError, AssertionError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: not the weights of a CLIP text tower "
                         f"({' '.join(str(error).split())[:200]})") from None
    return tower.eval().requires_grad_(False)


# Windows-1252: the character of each byte, and of the five bytes that it lacks that of Latin-1.
WINDOWS = ''.join(bytes([b]).decode('cp1252', 'ignore') or chr(b) for b in range(256))
BYTES = {chr(b): b for b in range(256)} | {c: b for b, c in enumerate(WINDOWS)}
LATER = f'[{WINDOWS[128:192]}\x80-\x9f]'  # what the bytes of a character after its first look like
MOJIBAKE = re.compile('|'.join((  # UTF-8 read as Windows-1252, where that is no word of a language
    f'[ÂÃ](?![…’]){LATER}', '[Ä-ß][\x80-\x9f]', '[Ä-ÖØ-Þ][¢-¨¬¯±µ¶¸¼-¾†‡ˆ‰‹›ƒ€˜‚„]',
    f'(?<=[a-z])[Ä-ß]{LATER}', f'[ÄÅ]{LATER}(?=[a-z])', f'(?:[Ä-ß]{LATER}){{2,}}',
    f'[âï]{LATER}{{2}}', f'[à-ï](?!\xa0){LATER}(?![\xa0«»‘’“”–—…•®™°¹²³]){LATER}',
    f'ð{LATER}{{3}}')))
SPELT = {c: unicodedata.normalize('NFKC', chr(c)) for c in (  # ligatures, full and half width
    0x132, 0x133, 0x149, *range(0x1c4, 0x1cd), *range(0x1f1, 0x1f4), 0x3000, *range(0xfb00, 0xfb07),
    *range(0xff01, 0xfff0))}
SPELT |= {b: WINDOWS[b] for b in range(128, 160)}
SPELT |= dict.fromkeys((0x2bc, *range(0x2018, 0x201c)), "'")
SPELT |= dict.fromkeys(range(0x201c, 0x2020), '"')
SPELT |= dict.fromkeys((*range(9), 11, *range(14, 32), 127, *range(0x206a, 0x2070), 0xfeff,
                        *range(0xfff9, 0xfffd)))  # control characters


def as_utf8(text):
    """The text before its UTF-8 was read as Windows-1252; as it is if it cannot be that."""
    try:
        return bytes(BYTES[c] for c in text).decode()
    except (KeyError, UnicodeDecodeError):
        return text


def without_mojibake(text):
    """The text, all of it or the pieces that match MOJIBAKE, `as_utf8`."""
    text = re.sub(r'(?<![^\W\d_a-z])([ÂÃ]) ', '\\1\xa0 ', text)  # whose second byte is \xa0
    whole = as_utf8(text) if MOJIBAKE.search(text) else text
    return MOJIBAKE.sub(lambda match: as_utf8(match[0]), text) if whole == text else whole


def settled(change, text):
    """The text after as many changes as make a difference."""
    while (changed := change(text)) != text:
        text = changed
    return text


def fix_text(text):
    """The text as ftfy mends it, which CLIP's captions went through.

    Straight quotes, ligatures and full-width letters spelt out, NFC, neither control characters nor
    HTML entities (where there is no <), and UTF-8 that was read as Latin-1 or Windows-1252, the
    commonest of the mistakes that ftfy undoes.
    """
    unescape = str if '<' in text else html.unescape

    def mend(text):
        text = settled(without_mojibake, unescape(text))
        text = re.sub(r'\x1b\[[\d;]*[a-zA-Z]', '', text).translate(SPELT)
        text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
        return unicodedata.normalize('NFC', text)
    return settled(mend, text)


class BPETokenizer:
    """CLIP's byte-pair encoding: list of B texts -> tokens (B,length).

    `path` is bpe_simple_vocab_16e6.txt.gz or Hugging Face's merges.txt; ValueError for other files.
    """

    # Of \w, letters are what is neither _ nor a number, be it a digit \d or of these two kinds.
    numbers = ''.join(c for c in map(chr, range(0x20000)) if unicodedata.category(c) in 'Nl No')
    pattern = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
                         rf"|[^\W\d_{numbers}]+|[\d{numbers}]|(?:[^\s\w]|_)+", re.IGNORECASE)

    def __init__(self, path, length=77):
        path = Path(path)
        try:
            opener = gzip.open if path.suffix == '.gz' else open
            with opener(regular(path), 'rt', encoding='utf-8') as file:
                merges = [tuple(line.split()) for line in file.read().splitlines()[1:48895]]
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f'{path}: not the merges of a BPE vocabulary ({error})') from None
        require(len(merges) == 48894 and all(len(m) == 2 for m in merges),
                f"{path}: {len(merges)} merges where CLIP's vocabulary has 48894")
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        order = [chr(b) for b in printable] + [chr(256 + k) for k in range(len(others))]
        self.symbols = dict(zip(printable + others, order))  # what is printed for each byte
        words = order + [s + '</w>' for s in order] + [''.join(m) for m in merges]
        self.number = {w: k for k, w in enumerate(words)}
        self.rank, self.length = {m: k for k, m in enumerate(merges)}, length
        self.start, self.end = len(words), len(words) + 1
        self.cache = {'<|startoftext|>': [self.start], '<|endoftext|>': [self.end]}

    def merge(self, word):
        """Numbers of the tokens of one word, given as the symbols of its bytes.

        Again and again, the pair of neighbours with the lowest rank is joined wherever it occurs.
        """
        parts = [*word[:-1], word[-1] + '</w>']
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:]))
            best = min(pairs, key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            joined, k = [], 0
            while k < len(parts):
                both = tuple(parts[k:k + 2]) == best
                joined.append(''.join(best) if both else parts[k])
                k += 1 + both
            parts = joined
        return [self.number[p] for p in parts]

    def encode(self, text):
        """Numbers of the tokens of a text, without those of start and end."""
        text = ' '.join(html.unescape(html.unescape(fix_text(text))).split()).lower()
        numbers = []
        for word in self.pattern.findall(text):
            if word not in self.cache:
                self.cache[word] = self.merge(''.join(self.symbols[b] for b in word.encode()))
            numbers += self.cache[word]
        return numbers

    def __call__(self, texts):
        """Tokens (B,length) with start and end; texts are cut or filled up with 0."""
        tokens = torch.zeros(len(texts), self.length, dtype=torch.long)
        for row, text in zip(tokens, texts):
            numbers = [self.start, *self.encode(text)[:self.length - 2], self.end]
            row[:len(numbers)] = torch.tensor(numbers)
        return tokens


class CLIPReader:
    """Reader that gives the last hidden states (B,77,channels) of CLIP's frozen text encoder.

    `path` is CLIP's file, or a folder with it, beside its vocabulary; ValueError without them.
    """

    def __init__(self, path, device='cpu'):
        path = Path(path)
        names = 'ViT-L-14.pt', 'ViT-B-32.pt', 'model.safetensors', 'pytorch_model.bin', '*.pt'
        files = [path] if path.is_file() else [p for name in names
                                               for p in sorted(path.glob(name))]
        wanted = ("wanted: OpenAI's ViT-L-14.pt or ViT-B-32.pt, or Hugging Face's "
                  'model.safetensors or pytorch_model.bin of CLIP')
        require(files, f'{path}: no weights there; {wanted}')
        folder, merges = files[0].parent, vocabulary_beside(files[0])
        require(merges, f'{path}: CLIP needs its vocabulary beside the weights: '
                f'{folder}/bpe_simple_vocab_16e6.txt.gz or {folder}/merges.txt')
        self.tower = clip_text(read_tensors(files[0], wanted), files[0]).to(device)
        self.tokenise = BPETokenizer(merges, len(self.tower.positional_embedding))
        self.channels, self.device = self.tower.ln_final.weight.shape[0], device

    @torch.no_grad()
    def __call__(self, texts):
        return self.tower(self.tokenise(texts).to(self.device))


class StoredReader:
    """Reader of an .npz of `texts` (N,) and their `features` (N,M,channels): gives (B,M,channels).

    '' must be among the texts: it stands for no condition. ValueError for other files and texts.
    """

    def __init__(self, path, device='cpu'):
        try:
            with np.load(regular(path)) as file:
                texts, features = file['texts'].tolist(), file['features']
        except Exception as error:  # half a dozen types; all mean the same to a user
            raise ValueError(f'{path}: not an .npz of texts and features ({error})') from None
        require(features.ndim == 3 and len(features) == len(texts) and '' in texts,
                f"{path}: needs texts (N,) with '' among them and features "
                f'(N,tokens,channels); has {len(texts)} and {features.shape}')
        self.row, self.path = {t: k for k, t in enumerate(texts)}, path
        self.features, self.device = torch.from_numpy(features), device  # as stored: maybe large
        self.channels = features.shape[2]

    def check(self, texts):
        """ValueError if there are no features of one of these texts."""
        unknown = [t for t in texts if t not in self.row]
        require(not unknown, f'{self.path}: no features of {unknown[:1]}; it can say nothing of '
                'other texts')

    def __call__(self, texts):
        self.check(texts)
        return self.features[[self.row[t] for t in texts]].float().to(self.device)


class ByteReader:
    """Reader that gives the tokens (B,length) which a model's own `ByteText` reads."""

    def __init__(self, device, length):
        network = ByteText(length=length)
        self.tokenise, self.device = network.tokenise, device
        self.channels = network.norm.weight.shape[0]

    def __call__(self, texts):
        return self.tokenise(texts).to(self.device)


def text_reader(text, device='cpu', length=96):
    """What turns a list of B texts into a condition (B,...): a reader, by the value of --text.

    `text` is 'bytes', of which `length` are read, an .npz or CLIP's file or folder; ValueError for
    others. The attribute `channels` of a reader is the width of the features that the diffusion
    model gets.
    """
    if text == 'bytes':
        return ByteReader(device, length)
    require(Path(text).exists(), f'{text}: the text encoder is neither bytes nor a file or folder; '
            'sample.py and metrics.py take a new place of it as --reader')
    return (StoredReader if text.endswith('.npz') else CLIPReader)(text, device)
