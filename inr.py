"""The continuous function: planes and coordinates, bilinear read-out, the CFC MLP.

    p^i = gamma(c; Xi^i)                    bilinear look-up of basis field i at coordinate c
    h = Block_1(p^1);  h = Block_i([h; p^i])  coarse-to-fine conditioning (CFC), Section 3.2
    phi_ij(s) = phi_ij A(s)_j / sqrt(sum_k (phi_ik A(s)_k)^2 + eps)       scale injection, Eq. 13

Coordinates lie in [-1, 1], order (x, y[, z or t]), at cell centres; fields are read with
`align_corners=False` and border padding. Nothing else in the project knows about axes.
"""
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

# plane name -> (coordinate along the width, coordinate along the height), in packing order
PLANES = {
    'image': dict(xy=(0, 1)),
    'shape': dict(xy=(0, 1), yz=(1, 2), xz=(0, 2)),
    'nerf': dict(xy=(0, 1), yz=(1, 2), xz=(0, 2)),
    'video': dict(xy=(0, 1), yt=(1, 2), xt=(0, 2)),
}


# ---- planes and coordinates ------------------------------------------------------------------

def plane_sizes(domain, extent):
    """Plane name -> (H, W) for a latent of `extent` cells along each coordinate (X, Y, ...)."""
    return {name: (extent[v], extent[u]) for name, (u, v) in PLANES[domain].items()}


def pack(planes):
    """Dict of planes (B,C,H,W) -> one tensor (B,C,L), L = sum of H*W; a view for one plane."""
    flat = [p.flatten(2) for p in planes.values()]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=2)


def unpack(z, sizes):
    """Inverse of `pack`: (B,C,L) and name -> (H, W) give views (B,C,H,W), same order."""
    lengths = [h * w for h, w in sizes.values()]
    if z.shape[2] != sum(lengths):
        raise ValueError(f'latent of length {z.shape[2]} does not fill planes {sizes}')
    return {name: part.unflatten(2, size)
            for (name, size), part in zip(sizes.items(), z.split(lengths, dim=2))}


def make_grid(*size, box=None, device=None):
    """Cell centres of a regular grid, (*size, D), last axis in order (x, y[, z or t]).

    `size` is slowest axis first: (H, W), (T, H, W) or (Z, Y, X). `box` holds (lo, hi) for each
    coordinate, x first; default [-1, 1] in all.
    """
    box = [(-1.0, 1.0)] * len(size) if box is None else box
    if min(size, default=0) < 1 or len(box) != len(size):
        raise ValueError(f'no grid of size {size} over {len(box)} intervals: sizes must be at '
                         'least 1, with one (lo, hi) for each coordinate')
    axes = [cell_centres(n, torch.as_tensor(b, device=device, dtype=torch.float32))
            for n, b in zip(size, reversed(list(box)))]
    return torch.stack(torch.meshgrid(*axes, indexing='ij')[::-1], dim=-1)


def cell_centres(n, interval):
    """Centres of n equal cells of intervals (..., 2), as (..., n)."""
    lo, hi = interval[..., :1], interval[..., 1:]
    return lo + (hi - lo) * (torch.arange(n, device=interval.device) + 0.5) / n


def grid_scale(resolution, size, box=None):
    """Sampling period s = r / sqrt(H_eq W_eq) of an (h, w) grid over `box`; 1 at the training grid.

    H_eq, W_eq are the pixels a full extent would have. `box` (..., 2, 2) gives s of shape (...).
    """
    h, w = size
    if box is None:
        return torch.tensor(resolution / math.sqrt(h * w))
    extent = (box[..., 1] - box[..., 0]) / 2  # (..., 2) share of the full width and height
    return resolution * (extent.prod(-1) / (h * w)).sqrt()


@torch.no_grad()
def points_scale(resolution, coords):
    """s of points (B,N,2) that are a flattened regular grid; 1, the training period, of others.

    A grid has at least two rows and columns, and the same points for every item.
    """
    x, y = coords[0].unbind(-1)
    width = int((y == y[0]).sum())
    one = coords.new_ones(())
    if width < 2 or len(x) % width or len(x) == width:
        return one
    size = len(x) // width, width
    pitch = [(c[-1] - c[0]) / (n - 1) / 2 for c, n in zip((x, y), size[::-1])]
    box = [(c[0] - h, c[-1] + h) for c, h in zip((x, y), pitch)]
    grid = make_grid(*size, box=box, device=coords.device).flatten(0, 1)
    same = torch.allclose(coords, grid.to(coords).expand_as(coords), atol=1e-5)
    return (4 * pitch[0] * pitch[1]).abs().sqrt() * resolution / 2 if same else one


# ---- gamma: bilinear look-up -------------------------------------------------------------------

def sample_field(field, coords):
    """gamma(c; Xi): field (B,C,H,W) at any points coords (B,N,2) in [-1,1] -> (B,N,C)."""
    p = F.grid_sample(field.to(coords.dtype), coords[:, None], mode='bilinear',
                      padding_mode='border', align_corners=False)  # (B, C, 1, N)
    return p[:, :, 0].transpose(1, 2)


def hat_matrix(n, coords):
    """Linear interpolation of n cells at coords (..., m) as a matrix (..., m, n)."""
    position = (((coords + 1) * n - 1) / 2).clamp(0, n - 1)
    return (1 - (position[..., None] - torch.arange(n, device=coords.device)).abs()).relu()


def sample_grid(field, xs, ys):
    """`sample_field` on the grid ys x xs, separably: (B,C,H,W), (b,w), (b,h) -> (B, h*w, C).

    b is B or 1. Two matrix products instead of a gather: no index arithmetic, no scatter in the
    backward pass, and rows come out in the layout the MLP reads.
    """
    B, C, H, W = field.shape
    with torch.autocast(field.device.type, enabled=False):  # bfloat16 weights would not sum to 1
        rows, columns = hat_matrix(H, ys), hat_matrix(W, xs)  # (b, h, H), (b, w, W)
        p = rows @ field.to(rows.dtype).permute(0, 2, 3, 1).reshape(B, H, W * C)  # (B, h, W*C)
        p = columns[:, None] @ p.unflatten(2, (W, C))  # (B, h, w, C)
    return p.flatten(1, 2)


# ---- the MLP -----------------------------------------------------------------------------------

class ModulatedLinear(nn.Module):
    """Linear layer whose weights the style scales per input and normalises per output, Eq. 13.

    forward(x (B,N,in), style (B,style_features) or (1,style_features)) -> (B,N,out). `gain`
    multiplies the result: a leaky ReLU is homogeneous, so its usual gain costs nothing here.
    `weight` (out,in) and `affine` (style -> in, bias one) carry no hidden scaling.
    """

    def __init__(self, in_features, out_features, style_features, demodulate=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features ** 0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.affine = nn.Linear(style_features, in_features)
        nn.init.ones_(self.affine.bias)
        self.demodulate = demodulate

    def modulated(self, style):
        """phi(s) for each style, (B,out,in), in the precision of the weights."""
        with torch.autocast(style.device.type, enabled=False):
            weight = self.weight * self.affine(style.to(self.weight.dtype))[:, None]
            if self.demodulate:
                weight = weight * (weight.square().sum(2, keepdim=True) + 1e-8).rsqrt()
        return weight

    def forward(self, x, style, gain=1.0):
        # The matrix is formed once for each scale, not x scaled before and after the product: the
        # points outnumber the channels by far.
        weight = self.modulated(style) * gain
        if len(style) == 1:
            return F.linear(x, weight[0], self.bias * gain)
        return torch.baddbmm(self.bias * gain, x, weight.transpose(1, 2))


class ScaledLinear(nn.Linear):
    """Linear with `ModulatedLinear`'s call, for networks without scale injection."""

    def __init__(self, in_features, out_features, style_features=0, demodulate=True):
        super().__init__(in_features, out_features)
        nn.init.normal_(self.weight, std=in_features ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x, style=None, gain=1.0):
        return F.linear(x, self.weight * gain, self.bias * gain)


class ScaleEmbedding(nn.Module):
    """s (B,) -> style (B,features): 32 sines and cosines of s * 10000^(-k/31), then two layers."""

    def __init__(self, features, frequencies=32):
        super().__init__()
        k = torch.arange(frequencies) / (frequencies - 1)
        self.register_buffer('frequencies', 10000.0 ** -k, persistent=False)
        self.net = nn.Sequential(nn.Linear(2 * frequencies, features), nn.GELU(),
                                 nn.Linear(features, features))

    def forward(self, s):
        with torch.autocast(s.device.type, enabled=False):
            angles = s.to(self.frequencies)[:, None] * self.frequencies
            return self.net(torch.cat([angles.sin(), angles.cos()], dim=1))


class MLPBlock(nn.Module):
    """Residual block of `layers` linear layers with leaky ReLU, (B,N,in) -> (B,N,width).

    (sqrt(2) lrelu(...) + skip(x)) / sqrt(2), with the outer factor already multiplied out, so that
    inputs of unit variance stay so.
    """

    def __init__(self, linear, in_features, width, style_features, layers):
        super().__init__()
        self.layers = nn.ModuleList(linear(in_features if i == 0 else width, width, style_features)
                                    for i in range(layers))
        self.skip = nn.Linear(in_features, width, bias=False) if in_features != width else None
        if self.skip is not None:
            nn.init.normal_(self.skip.weight, std=in_features ** -0.5)

    def forward(self, x, style):
        h = x
        for i, layer in enumerate(self.layers):
            gain = 1.0 if i == len(self.layers) - 1 else math.sqrt(2)
            h = F.leaky_relu(layer(h, style, gain), 0.2, inplace=True)
        skip = x if self.skip is None else self.skip(x)
        return torch.add(h, skip, alpha=math.sqrt(0.5))


class CFCMLP(nn.Module):
    """The read-out pi_theta: look-ups of all basis fields -> signal value, for every domain.

    forward(pe, coords, scale): pe is a list, coarse to fine, of (B,N,C_l); coords (B,N,D) serve to
    derive `scale` (B,) or (1,), the sampling period s, where it is None on a scale-injected model.
    Returns (B,N,out_channels).

    conditioning: 'cfc' feeds p^i to block i; 'concat' feeds all of them to the first block;
    'single' feeds the finest only (the ablation of Table 8). merge: how 'cfc' joins p^i to h.
    """

    def __init__(self, pe_channels, out_channels, width=256, blocks=4, layers=2,
                 conditioning='cfc', merge='concat', scale_injection=True, resolution=256):
        super().__init__()
        if conditioning == 'cfc' and blocks < len(pe_channels):
            raise ValueError(f'{blocks} MLP blocks cannot take {len(pe_channels)} basis fields; '
                             'raise --mlp_blocks')
        self.conditioning, self.merge, self.resolution = conditioning, merge, resolution
        self.style = ScaleEmbedding(width) if scale_injection else None
        linear = ModulatedLinear if scale_injection else ScaledLinear
        first, later = pe_channels[0], pe_channels[1:]
        if conditioning != 'cfc':
            first, later = sum(pe_channels) if conditioning == 'concat' else pe_channels[-1], []
        joined = [width + c if merge == 'concat' else width for c in later]
        inputs = [first, *joined] + [width] * (blocks - 1 - len(later))
        self.blocks = nn.ModuleList(MLPBlock(linear, n, width, width, layers) for n in inputs)
        self.project = nn.ModuleList(nn.Linear(c, width) for c in later if merge == 'sum')
        self.out = linear(width, out_channels, width, demodulate=False)

    @torch.no_grad()
    def at(self, scale):
        """The network of one period, scale (1,): a copy with the modulation multiplied into it."""
        if self.style is None:
            return self
        plain, style = copy.deepcopy(self), self.style(scale)
        plain.style = None
        for parent in list(plain.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, ModulatedLinear):
                    out_features, in_features = layer.weight.shape
                    folded = ScaledLinear(in_features, out_features).to(layer.weight)
                    folded.weight.copy_(layer.modulated(style)[0])
                    folded.bias.copy_(layer.bias)
                    parent._modules[name] = folded  # also where parent is a ModuleList
        return plain.requires_grad_(False)

    def join(self, h, pe, i):
        """Input of block i > 0."""
        if self.conditioning != 'cfc' or i >= len(pe):
            return h
        if self.merge == 'sum':
            return h + self.project[i - 1](pe[i])
        return torch.cat([h, pe[i]], dim=-1)

    def forward(self, pe, coords=None, scale=None):
        style = None
        if self.style is not None:
            if scale is None:
                scale = points_scale(self.resolution, coords)[None]
            style = self.style(scale)
        first = {'cfc': pe[0], 'single': pe[-1]}.get(self.conditioning)
        h = self.blocks[0](torch.cat(pe, -1) if first is None else first, style)
        for i, block in enumerate(self.blocks[1:], start=1):
            h = block(self.join(h, pe, i), style)
        return self.out(h, style)
