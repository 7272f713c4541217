"""The continuous function: planes and coordinates, bilinear read-out, the CFC MLP, surfaces, rays.

    p^i = gamma(c; Xi^i)                      bilinear look-up of basis field i at c, Section 3.1
    h = Block_1(p^1);  h = Block_i([h; p^i])  coarse-to-fine conditioning (CFC), Section 3.1
    phi_ij(s) = phi_ij A(s)_j / sqrt(sum_k (phi_ik A(s)_k)^2 + eps)       scale injection, Eq. 13
    C = sum_k w_k c_k + (1 - sum_k w_k)                          a ray through a radiance field,
    w_k = exp(-sum_{j<k} sigma_j delta_j) (1 - exp(-sigma_k delta_k))        Mildenhall et al., 2020

Coordinates lie in [-1, 1], in the order (x, y[, z or t]). A field of n cells along an axis holds
its values at the cells' centres; beyond the last centre it is constant (`align_corners=False` and
border padding). Other modules take from `PLANES` which coordinates a plane has.
"""
import copy
import math
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn

from common import fitting, load_checkpoint, load_weights, require, save_checkpoint

# plane name -> (coordinate along the width, coordinate along the height), in packing order
PLANES = {
    'image': dict(xy=(0, 1)),
    'shape': dict(xy=(0, 1), yz=(1, 2), xz=(0, 2)),
    'nerf': dict(xy=(0, 1), yz=(1, 2), xz=(0, 2)),
    'video': dict(xy=(0, 1), yt=(1, 2), xt=(0, 2)),
}


# ---- planes and coordinates ------------------------------------------------------------------

def plane_sizes(domain, cells):
    """Plane name -> (H, W); `cells` has the number of cells along each coordinate, x first."""
    return {name: (cells[v], cells[u]) for name, (u, v) in PLANES[domain].items()}


def pack(planes):
    """Dict of planes (B,C,H,W) -> one tensor (B,C,L), L = sum of H*W, in the dict's order."""
    flat = [p.flatten(2) for p in planes.values()]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=2)


def unpack(z, sizes):
    """Inverse of `pack`: (B,C,L) -> dict of planes (B,C,H,W). ValueError if `sizes` do not fit."""
    lengths = [h * w for h, w in sizes.values()]
    require(z.shape[2] == sum(lengths),
            f'latent of length {z.shape[2]} does not fill planes {sizes}')
    return {name: part.unflatten(2, size)
            for (name, size), part in zip(sizes.items(), z.split(lengths, dim=2))}


def make_grid(*size, box=None, device=None):
    """Centres of the cells of a regular grid: (*size, D), the last axis in order (x, y[, z or t]).

    `size` is (H, W), (T, H, W) or (Z, Y, X), so the x of the points changes fastest. The grid
    covers `box`, a pair (lo, hi) for each coordinate, x first; by default [-1, 1] for each.
    ValueError for a size below 1 or a box with another number of coordinates.
    """
    box = [(-1.0, 1.0)] * len(size) if box is None else box
    require(min(size, default=0) >= 1 and len(box) == len(size),
            f'no grid of size {size} over {len(box)} intervals: sizes must be at least 1, with one '
            '(lo, hi) for each coordinate')
    axes = [cell_centres(n, torch.as_tensor(b, device=device, dtype=torch.float32))
            for n, b in zip(size, reversed(list(box)))]
    return torch.stack(torch.meshgrid(*axes, indexing='ij')[::-1], dim=-1)


def cell_centres(n, interval):
    """Centres (..., n) of the n equal cells that an interval (..., 2) = (lo, hi) is cut into."""
    lo, hi = interval[..., :1], interval[..., 1:]
    return lo + (hi - lo) * (torch.arange(n, device=interval.device) + 0.5) / n


def grid_scale(resolution, size, box=None):
    """Sampling period s of a grid of `size` (h, w) over `box`, as a tensor.

    s = r / sqrt(H W), where r is `resolution` and H x W would be the size of a grid of the same
    pitch over the whole of [-1, 1]^2: 1 for an r x r picture, 1/2 for one of twice its sides.
    `box` (..., 2, 2) holds (lo, hi) for x and y, by default [-1, 1]; s has the shape (...).
    """
    h, w = size
    if box is None:
        return torch.tensor(resolution / math.sqrt(h * w))
    extent = (box[..., 1] - box[..., 0]) / 2  # (..., 2) share of the full width and height
    return resolution * (extent.prod(-1) / (h * w)).sqrt()


@torch.no_grad()
def scale_of_points(resolution, coords):
    """Sampling period s of the points (B,N,D) of a plane grid, see `grid_scale`; 1 of other points.

    A grid is regular, listed row by row, and has two or more rows and columns; D = 2. For other
    points s = 1, the period of training. () where it is the same for all items, otherwise (B,).
    """
    one = coords.new_ones(())
    if coords.shape[2] != 2 or not coords.shape[1]:
        return one
    if len(coords) > 1 and not torch.equal(coords, coords[:1].expand_as(coords)):
        each = torch.stack([scale_of_points(resolution, own[None]) for own in coords])
        return each[0] if (each == each[0]).all() else each
    x, y = coords[0].unbind(-1)
    width = int((y == y[0]).sum())
    if width < 2 or len(x) % width or len(x) == width:
        return one
    size = len(x) // width, width
    half = [(c[-1] - c[0]) / (n - 1) / 2 for c, n in zip((x, y), size[::-1])]  # sides of a cell / 2
    box = [(c[0] - h, c[-1] + h) for c, h in zip((x, y), half)]
    grid = make_grid(*size, box=box, device=coords.device).flatten(0, 1)
    if not torch.allclose(coords, grid.to(coords).expand_as(coords), atol=1e-5):
        return one
    return (4 * half[0] * half[1]).abs().sqrt() * resolution / 2


# ---- gamma: bilinear look-up -------------------------------------------------------------------

def sample_field(field, coords, align_corners=False):
    """gamma(c; Xi): values (B,N,C) of a field (B,C,H,W) at any points coords (B,N,2) in [-1,1].

    -1 and 1 are the edges of the outer cells or, with `align_corners`, their centres.
    """
    p = F.grid_sample(field.to(coords.dtype), coords[:, None], mode='bilinear',
                      padding_mode='border', align_corners=align_corners)  # (B, C, 1, N)
    return p[:, :, 0].transpose(1, 2)


def hat_matrix(n, coords):
    """Matrix (..., m, n) that interpolates the values of n cells linearly at coords (..., m)."""
    position = (((coords + 1) * n - 1) / 2).clamp(0, n - 1)
    return (1 - (position[..., None] - torch.arange(n, device=coords.device)).abs()).relu()


def sample_grid(field, xs, ys):
    """`sample_field` at all points of the grid ys x xs: (B, h*w, C), row by row.

    field (B,C,H,W); xs (b,w) and ys (b,h) with b = B or 1. Interpolating the rows, then the
    columns, takes two matrix products, which are faster than a look-up of single points.
    """
    B, C, H, W = field.shape
    # In bfloat16 the weights do not sum to 1, which costs the toy pictures 1.4 dB.
    with torch.autocast(field.device.type, enabled=False):
        rows, columns = hat_matrix(H, ys), hat_matrix(W, xs)  # (b, h, H), (b, w, W)
        p = rows @ field.to(rows.dtype).permute(0, 2, 3, 1).reshape(B, H, W * C)  # (B, h, W*C)
        p = columns[:, None] @ p.unflatten(2, (W, C))  # (B, h, w, C)
    return p.flatten(1, 2)


# ---- the MLP -----------------------------------------------------------------------------------

class ModulatedLinear(nn.Module):
    """Linear layer with scale injection: a style changes its weights, Eq. 13.

    forward(x (B,N,in), style (B,style_features) or (1,style_features)) -> (B,N,out). The style
    becomes a factor A(s)_j for each input, which starts at about 1; then the weights of each output
    are brought to length 1, unless `demodulate` is off. `gain` multiplies the result.
    """

    def __init__(self, in_features, out_features, style_features, demodulate=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features ** 0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.affine = nn.Linear(style_features, in_features)
        nn.init.ones_(self.affine.bias)
        self.demodulate = demodulate

    def modulated(self, style):
        """The matrix phi(s) of each style, (B,out,in), in the precision of the weights."""
        with torch.autocast(style.device.type, enabled=False):
            weight = self.weight * self.affine(style.to(self.weight.dtype))[:, None]
            if self.demodulate:
                weight = weight * (weight.square().sum(2, keepdim=True) + 1e-8).rsqrt()
        return weight

    def forward(self, x, style, gain=1.0):
        # Scaling x before and after the product would give the same, but there are far more points
        # than channels, so it is the matrix that is scaled.
        weight = self.modulated(style) * gain
        if len(style) == 1:
            return F.linear(x, weight[0], self.bias * gain)
        return torch.baddbmm(self.bias * gain, x, weight.transpose(1, 2))


class ScaledLinear(nn.Linear):
    """Linear layer for networks without scale injection, called like `ModulatedLinear`."""

    def __init__(self, in_features, out_features, style_features=0, demodulate=True):
        super().__init__(in_features, out_features)
        nn.init.normal_(self.weight, std=in_features ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x, style=None, gain=1.0):
        return F.linear(x, self.weight * gain, self.bias * gain)


class ScaleEmbedding(nn.Module):
    """s (B,) -> style (B,features): two layers on n sines and cosines of s * 10000^(-k/(n-1))."""

    def __init__(self, features, n=32):
        super().__init__()
        k = torch.arange(n) / (n - 1)
        self.register_buffer('frequencies', 10000.0 ** -k, persistent=False)
        self.net = nn.Sequential(nn.Linear(2 * n, features), nn.GELU(),
                                 nn.Linear(features, features))

    def forward(self, s):
        with torch.autocast(s.device.type, enabled=False):
            angles = s.to(self.frequencies)[:, None] * self.frequencies
            return self.net(torch.cat([angles.sin(), angles.cos()], dim=1))


class MLPBlock(nn.Module):
    """Residual block of `layers` linear layers, (B,N,in) -> (B,N,width).

    (f(x) + skip(x)) / sqrt(2), where each layer of f is sqrt(2) leaky_relu(linear(x)); the factors
    keep the variance of the features. A factor may enter a leaky ReLU, so it goes into the linear
    layer as its gain, and that of the last layer cancels against the 1 / sqrt(2).
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


class PointBlock(nn.Module):
    """skip(x) + fc1(relu(fc0(relu(x)))), (...,in) -> (...,out); fc1's weights start at zero."""

    def __init__(self, in_features, out_features):
        super().__init__()
        hidden = min(in_features, out_features)
        self.fc0, self.fc1 = nn.Linear(in_features, hidden), nn.Linear(hidden, out_features)
        nn.init.zeros_(self.fc1.weight)
        self.skip = (nn.Linear(in_features, out_features, bias=False)
                     if in_features != out_features else nn.Identity())

    def forward(self, x, style=None):
        return self.skip(x) + self.fc1(F.relu(self.fc0(F.relu(x))))


def with_octaves(x, count):
    """x, then sin 2^k x and cos 2^k x for k = 0 .. count - 1: (...,D) -> (...,D + 2 D count)."""
    angles = x[..., None, :] * 2.0 ** torch.arange(count, device=x.device)[:, None]
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (..., count, 2D)
    return torch.cat([x, waves.flatten(-2)], dim=-1)


class LowerBound(torch.autograd.Function):
    """max(x, bound), with gradients also below the bound where descent would raise x."""

    @staticmethod
    def forward(ctx, x, bound):
        ctx.save_for_backward(x >= bound)
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx, gradient):
        above, = ctx.saved_tensors
        return gradient * (above | (gradient < 0)), None


class RadianceHead(nn.Module):
    """Features h (B,N,width) -> density and colours, (B,N,channels), of which the first is density.

    Density, per unit of length in the box [-1, 1], is `scale` times the softplus of a linear map,
    which starts at -4, or the scene would be fog that hides itself; less the softplus of -6, below
    which it is 0. Most rays meet nothing, and their L1 loss would otherwise drive all densities to
    where softplus has no gradient, before the network can tell one place from another.

    Colours in [0, 1] come from one layer of `hidden` features, which also reads the direction of
    sight, of length 1, with sines and cosines of so many `octaves`; None leaves directions out.
    dirs (B,K,3) has one direction for each N / K successive points, such as those of a ray. Where
    dirs is None, the colours are the mean of those along the six directions of the axes.
    """

    lowest = -6.0

    def __init__(self, width, channels, hidden, octaves, scale):
        super().__init__()
        self.octaves, self.scale = octaves, scale
        self.raw = nn.Linear(width, 1)
        nn.init.constant_(self.raw.bias, -4.0)
        self.features = nn.Linear(width, hidden)
        self.directions = None
        if octaves is not None:
            self.directions = nn.Linear(3 + 6 * octaves, hidden, bias=False)
        self.colour = nn.Linear(hidden, channels - 1)

    def density(self, h):
        """Of features (B,N,width), (B,N,1)."""
        raw = LowerBound.apply(self.raw(h).float(), self.lowest)
        return self.scale * (F.softplus(raw) - math.log1p(math.exp(self.lowest)))

    def colours_along(self, h, dirs):
        """Of the hidden layer's sums h (B,N,hidden), without the directions' part."""
        if dirs is not None:
            seen = self.directions(with_octaves(dirs, self.octaves))  # (B, K, hidden)
            each = h.shape[1] // max(seen.shape[1], 1)  # points along each ray
            h = (h.unflatten(1, (seen.shape[1], each)) + seen[:, :, None]).flatten(1, 2)
        return self.colour(F.leaky_relu(h, 0.2)).float().sigmoid()

    def forward(self, h, dirs=None):
        density, h = self.density(h), self.features(h)
        if self.directions is None:
            colours = self.colours_along(h, None)
        elif dirs is not None:
            colours = self.colours_along(h, dirs)
        else:
            axes = torch.cat([torch.eye(3), -torch.eye(3)]).to(density).view(6, 1, 1, 3)
            colours = sum(self.colours_along(h, axis) for axis in axes) / len(axes)
        return torch.cat([density, colours], dim=-1)


class CFCMLP(nn.Module):
    """The read-out pi_theta: look-ups of all basis fields -> signal values (B,N,out_channels).

    forward(pe, coords, scale, dirs): pe is the list of look-ups p^1..p^n (B,N,C_i), coarse to fine;
    scale (B,) or (1,) is the sampling period s, by default that of the points coords (B,N,D). A
    network needs coords for this default and for `coord_features`, and scale only for scale
    injection; dirs (B,K,3) are for the `RadianceHead` alone.

    conditioning: 'cfc' feeds p^i to block i, 'concat' feeds all of them to the first block and
    'single' only the finest (rows 3, 2 and 1 of Table 8). merge: how 'cfc' joins p^i to the state
    h, by 'concat' or 'sum'. coord_features: D to add a linear map of the coordinates, and of sines
    and cosines of `coord_octaves` of them, after the first block; 0 for none. radiance: hidden,
    octaves and scale of a `RadianceHead` in the place of the last layer. scale_channels: how many
    constant channels, equal to s, join each look-up; scale_frequencies: of s in the style. block:
    'post' for `MLPBlock`, 'pre' for `PointBlock`, whose activations come first; out_slope: of a
    leaky ReLU before the last layer, 1 for none. ValueError if there are more look-ups than blocks.
    """

    def __init__(self, pe_channels, out_channels, width=256, blocks=4, layers=2,
                 conditioning='cfc', merge='concat', scale_injection=True, resolution=256,
                 coord_features=0, coord_octaves=0, radiance=None, scale_channels=0,
                 scale_frequencies=32, block='post', out_slope=1.0):
        super().__init__()
        pe_channels = [n + scale_channels for n in pe_channels]
        pe_channels = dict(cfc=pe_channels, concat=[sum(pe_channels)],
                           single=pe_channels[-1:])[conditioning]
        require(blocks >= len(pe_channels), f'{blocks} MLP blocks cannot take {len(pe_channels)} '
                'basis fields; raise --mlp_blocks')
        self.conditioning, self.merge, self.resolution = conditioning, merge, resolution
        self.style = ScaleEmbedding(width, scale_frequencies) if scale_injection else None
        self.scale_channels, self.fixed, self.out_slope = scale_channels, None, out_slope
        linear = ModulatedLinear if scale_injection else ScaledLinear
        first, *later = pe_channels
        joined = [width + c if merge == 'concat' else width for c in later]
        inputs = [first, *joined] + [width] * (blocks - len(pe_channels))
        self.blocks = nn.ModuleList(
            PointBlock(n, width) if block == 'pre' else MLPBlock(linear, n, width, width, layers)
            for n in inputs)
        self.project = nn.ModuleList(nn.Linear(c, width) for c in later if merge == 'sum')
        self.coord_octaves = coord_octaves
        self.coords = None
        if coord_features:
            self.coords = nn.Linear(coord_features * (1 + 2 * coord_octaves), width)
        self.radiance = RadianceHead(width, out_channels, **radiance) if radiance else None
        self.out = None if radiance else linear(width, out_channels, width, demodulate=False)

    @torch.no_grad()
    def fixed_scale(self, scale):
        """A frozen copy for one period, scale (1,), with the modulation in its weights, or self."""
        if self.style is None:
            return self
        plain, style = copy.deepcopy(self), self.style(scale)
        plain.style, plain.fixed = None, scale
        for parent in list(plain.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, ModulatedLinear):
                    out_features, in_features = layer.weight.shape
                    folded = ScaledLinear(in_features, out_features).to(layer.weight)
                    folded.weight.copy_(layer.modulated(style)[0])
                    folded.bias.copy_(layer.bias)
                    setattr(parent, name, folded)
        return plain.requires_grad_(False)

    def forward(self, pe, coords=None, scale=None, dirs=None):
        h, style = self.features(pe, coords, scale)
        return self.radiance(h, dirs) if self.radiance is not None else self.out(h, style)

    def density(self, pe, coords):
        """The density alone, (B,N), of a network with a `RadianceHead`."""
        return self.radiance.density(self.features(pe, coords)[0])[..., 0]

    def features(self, pe, coords=None, scale=None):
        """What the last layer reads: features (B,N,width) and the style, None without."""
        if self.style is not None and scale is None:
            scale = scale_of_points(self.resolution, coords).reshape(-1)
        style = None if self.style is None else self.style(scale)
        if self.scale_channels:
            s = (self.fixed if style is None else scale).to(pe[0]).view(-1, 1, 1)
            pe = [torch.cat([p, s.expand(*p.shape[:2], self.scale_channels)], dim=2) for p in pe]
        if self.conditioning == 'concat':
            pe = [torch.cat(pe, dim=-1)]
        elif self.conditioning == 'single':
            pe = pe[-1:]
        h = self.blocks[0](pe[0], style)
        if self.coords is not None:
            with torch.autocast(h.device.type, enabled=False):  # bfloat16 blurs places
                h = h + self.coords(with_octaves(coords, self.coord_octaves))
        for i, block in enumerate(self.blocks[1:], start=1):
            if i < len(pe) and self.merge == 'sum':
                h = h + self.project[i - 1](pe[i])
            elif i < len(pe):
                h = torch.cat([h, pe[i]], dim=-1)
            h = block(h, style)
        return h if self.out_slope == 1 else F.leaky_relu(h, self.out_slope), style


# ---- one sample as a function ------------------------------------------------------------------

def look_up(xi, points, axes, plane_merge, align_corners=False):
    """p^1..p^n at points (B,N,D): a list of (B,N,C), coarse to fine.

    xi: basis fields, coarse to fine, each a dict plane name -> (B,C,H,W). axes: which coordinates
    each is read at, as in `PLANES`. plane_merge: what is looked up in the planes of one field is
    joined by 'concat', in the order of axes, or by 'sum'.
    """
    parts = [[sample_field(level[name], points[..., along], align_corners)
              for name, along in axes.items()] for level in xi]
    return [sum(p) if plane_merge == 'sum' else torch.cat(p, dim=-1) for p in parts]


class Function(nn.Module):
    """One sample, omega(c) = pi(gamma(c; Xi)): f(coords (...,D)) -> values (...,C), float32.

    Coordinates lie in [-1, 1], which stands for `extent` times as much in the units of the data,
    around `centre`. Values are what the MLP gives: colours that fill [-1, 1], the logit of
    occupancy, or density (per unit of length in [-1, 1]) and three colours in [0, 1], for which
    `dirs` (...,3) are the directions of sight, see `RadianceHead`. Gradients come by autograd.
    `scale` is the sampling period s; None derives it from a regular grid (H,W,2) and takes the
    training period 1 for other points.

    about: `domain`, `extent`, `centre`, how to `look_up`, and `read_out`, the MLP's arguments.
    """

    def __init__(self, about, xi, mlp):
        super().__init__()
        self.about, self.xi, self.mlp, self.extent = about, xi, mlp, about['extent']
        self.centre = about.get('centre', (0.0, 0.0, 0.0))

    def _apply(self, fn, recurse=True):
        """What moves or converts the MLP does so with the fields."""
        self.xi = [{name: fn(field) for name, field in level.items()} for level in self.xi]
        return super()._apply(fn, recurse)

    def move(self, loc, scale):
        """Give new units to the data: what was at place p (3,) will be at p * scale + loc."""
        self.centre = tuple(float(p) for p in torch.as_tensor(self.centre) * scale
                            + torch.as_tensor(loc))
        self.extent = float(self.extent * scale)
        self.about |= dict(centre=self.centre, extent=self.extent)

    def forward(self, coords, scale=None, dirs=None):
        points = coords.reshape(1, -1, coords.shape[-1])
        scale = None if scale is None else points.new_tensor([scale])
        dirs = None if dirs is None else dirs.expand(*coords.shape[:-1], 3).reshape(1, -1, 3)
        axes = self.about.get('axes') or PLANES[self.about['domain']]
        p = look_up(self.xi, points, axes, self.about['plane_merge'],
                    self.about.get('align_corners', False))
        values = self.mlp(p, points, scale, dirs)
        return values.view(*coords.shape[:-1], values.shape[-1])


def save_function(path, f):
    """Write a `Function` to a file, its fields and its MLP in half precision."""
    save_checkpoint(path, dict(
        kind='function', about=f.about, mlp={k: v.half() for k, v in f.mlp.state_dict().items()},
        xi=[{name: field.half().clone() for name, field in level.items()} for level in f.xi]))


def load_function(path, device='cpu'):
    """The `Function` that `python sample.py --export FILE` wrote, frozen.

    ValueError or FileNotFoundError, one line, for any other file.
    """
    state = load_checkpoint(path, 'function', device)
    with fitting(path):
        mlp = CFCMLP(**state['about']['read_out'])
        xi = [{name: field.float() for name, field in level.items()} for level in state['xi']]
        f = Function(state['about'], xi, mlp.to(device)).requires_grad_(False)
    load_weights(mlp, state['mlp'], path)
    return f


# ---- iso-surfaces ------------------------------------------------------------------------------

# The cell of the marching cubes. Corner k lies at the offset whose coordinates are the bits of k.
CORNERS = torch.tensor([[k & 1, k >> 1 & 1, k >> 2] for k in range(8)])  # (8, 3), order x, y, z
EDGES = [(a, a | 1 << axis) for axis in range(3) for a in range(8) if not a & 1 << axis]
FACES = [face for u, v, w in ((2, 4, 1), (4, 1, 2), (1, 2, 4))  # counterclockwise from outside
         for face in ([w, w | u, w | u | v, w | v], [0, v, u | v, u])]


def surface_loops(inside):
    """Closed polygons that part the inside corners of a cell from the others; inside (8,) bools.

    A polygon is a list of edge numbers: it has a vertex on each of these edges.
    """
    number = {frozenset(edge): i for i, edge in enumerate(EDGES)}
    following = {}  # the edge of a vertex -> that of the next vertex
    for face in FACES:
        sides = zip(face[-1:] + face[:-1], face)
        crossed = [side for side in sides if inside[side[0]] != inside[side[1]]]
        # The way round the face enters the shape and leaves it by turns. A segment joins each entry
        # to the next exit. It depends on the face's own corners alone, so the two cells at a face
        # draw the same segments there and leave no hole.
        for side, next_side in zip(crossed, crossed[1:] + crossed[:1]):
            if inside[side[1]]:
                following[number[frozenset(side)]] = number[frozenset(next_side)]
    loops = []
    while following:
        edge, loop = next(iter(following)), []
        while edge in following:
            loop.append(edge)
            edge = following.pop(edge)
        loops.append(loop)
    return loops


def triangulations(loop):
    """All ways to cut a polygon of `surface_loops` into triangles, without cuts inside a face.

    The neighbouring cell might have the same cut there: one edge would belong to four triangles.
    """
    if len(loop) < 3:
        yield []
    for k in range(1, len(loop) - 1):  # the triangle at the side from the last vertex to the first
        cuts = [(0, k)] * (k > 1) + [(k, -1)] * (k < len(loop) - 2)
        if any({*EDGES[loop[i]], *EDGES[loop[j]]} <= {*face} for i, j in cuts for face in FACES):
            continue
        for left in triangulations(loop[:k + 1]):
            for right in triangulations(loop[k:]):
                yield [(loop[0], loop[k], loop[-1]), *left, *right]


@cache
def triangle_table():
    """Triangles (256,5,3), as edge numbers or -1, by pattern: bit k tells if corner k is inside."""
    table = torch.full((256, 5, 3), -1)
    for pattern in range(256):
        loops = surface_loops([bool(pattern >> k & 1) for k in range(8)])
        triangles = [t for loop in loops for t in next(triangulations(loop))]
        if triangles:
            table[pattern, :len(triangles)] = torch.tensor(triangles)
    return table


def distinct(keys):
    """Where in keys.flatten() each of the K distinct `keys` occurs, (K,), and the inverse.

    The inverse has the shape of keys and says which of the K each one is.
    """
    values, inverse = keys.unique(return_inverse=True)
    index = torch.arange(inverse.numel(), device=keys.device)
    return torch.empty_like(values).scatter_(0, inverse.flatten(), index), inverse


class Nodes:
    """A field on the (n+1)^3 nodes of a grid over `box`, minus infinity outside of the box.

    Nodes are named by integers (..., 3), order x, y, z. Because of the infinity, a shape that
    reaches beyond the box is closed by a surface on the faces of the box.
    """

    def __init__(self, logit_fn, n, level, box, chunk, device):
        self.logit_fn, self.n, self.level, self.chunk = logit_fn, n, level, chunk
        self.lo, self.hi = torch.as_tensor(box, dtype=torch.float64, device=device).unbind(1)

    def position(self, nodes):
        """Coordinates (..., 3) of nodes, float64; nodes may be fractions, too."""
        return self.lo + (self.hi - self.lo) * nodes / self.n

    def key(self, nodes):
        """One integer (...) for each node with coordinates from -n to 2n."""
        x, y, z = (nodes + self.n).unbind(-1)
        base = 3 * self.n + 1
        return (z * base + y) * base + x

    @torch.no_grad()
    def values(self, nodes):
        """Field minus level (M,) at nodes (M,3) of the box; ValueError if it is not finite."""
        parts = [self.logit_fn(self.position(part).float()).float().reshape(-1)
                 for part in nodes.split(self.chunk)]
        values = torch.cat(parts) - self.level
        require(values.isfinite().all(),
                'the field is not finite everywhere: no surface can be drawn')
        return values

    def of_cells(self, cells, offsets):
        """Values (M,K) at `offsets` (K,3) from the lowest nodes of cells, (M,3)."""
        nodes = cells[:, None] + offsets.to(cells.device)
        index, inverse = distinct(self.key(nodes))  # cells share corners: evaluate each once
        nodes = nodes.flatten(0, 1)[index]
        values = torch.full(index.shape, -math.inf, device=cells.device)
        inside = ((nodes >= 0) & (nodes <= self.n)).all(1)
        values[inside] = self.values(nodes[inside])
        return values[inverse]


def changes_inside(grid, cells, step, positive):
    """Whether cells (M,3), `step` wide, whose corners have one sign hold the other one: (M,) bool.

    positive (M,): the corners' sign. One node is looked at in each plane of nodes across each axis.
    """
    k = torch.arange(1, step)[:, None]
    offsets = k * torch.tensor([1, 3, 5]) % step
    parts = [grid.of_cells(part, offsets) > 0 for part in cells.split(2 ** 15)]  # to save memory
    return (torch.cat(parts) != positive[:, None]).any(1)


def may_hold_surface(highest, lowest, nearest, reach, step):
    """Whether cells `step` wide may hold surface, (...) bool, by the values at their corners.

    Given are the highest, the lowest and the smallest absolute value of each cell. Two signs mean
    surface. At step > 1 a shape thinner than the cell may also pass between the corners. Then a
    corner is near it, with a value below `reach`: half the change of the field over the cell and
    its neighbours. If the field is a distance, this finds every slab, rod and ball; for others,
    such as steep logits, there is `changes_inside`.
    """
    two_signs = (highest > 0) & (lowest <= 0)
    return two_signs | (nearest <= reach) if step > 1 else two_signs


def first_cells(grid, step):
    """Cells that may hold surface, of all in the box and round it: lowest nodes (M,3), reach (M,).

    `step` is the cells' width in nodes; for the reach see `may_hold_surface`.
    """
    line = torch.arange(0, grid.n + 1, step, device=grid.lo.device)
    values = grid.values(torch.cartesian_prod(line, line, line).flip(1))
    values = values.reshape(1, 1, *[len(line)] * 3)  # (1, 1, z, y, x)
    closed = F.pad(values, [1] * 6, value=-math.inf)  # with the nodes just outside the box
    of_cell = partial(F.max_pool3d, kernel_size=2, stride=1)  # maximum over the 8 corners
    of_neighbours = partial(F.max_pool3d, kernel_size=4, stride=1, padding=2)  # and those around
    reach = 0.5 * (of_neighbours(values) + of_neighbours(-values))
    nearest = -of_cell(-closed.abs())
    highest = of_cell(closed)
    keep = may_hold_surface(highest, -of_cell(-closed), nearest, reach, step)
    if step > 1:
        others = (~keep[0, 0]).nonzero().flip(1)
        keep[~keep] = changes_inside(grid, (others - 1) * step, step, highest[~keep] > 0)
    cells = keep[0, 0].nonzero().flip(1)  # x first
    return (cells - 1) * step, reach[keep]  # - 1: the first cells lie outside the box


def finer_cells(grid, cells, reach, step):
    """Those eighths of `cells`, `step` wide, that may hold surface: nodes (M,3) and reach (M,)."""
    kept = []
    for part, near in zip(cells.split(2 ** 15), reach.split(2 ** 15)):  # to save memory
        eighths = (part[:, None] + CORNERS.to(part.device) * step).flatten(0, 1)
        near = near.repeat_interleave(8) / 2  # as the step
        touching = ((eighths + step >= 0) & (eighths <= grid.n)).all(1)  # the box
        eighths, near = eighths[touching], near[touching]
        v = grid.of_cells(eighths, CORNERS * step)
        keep = may_hold_surface(v.amax(1), v.amin(1), v.abs().amin(1), near, step)
        if step > 1:
            keep[~keep] = changes_inside(grid, eighths[~keep], step, v[~keep, 0] > 0)
        kept.append((eighths[keep], near[keep]))
    return map(torch.cat, zip(*kept))


def followed(grid, cells):
    """`cells` (M,3) of step 1, with all cells that their surfaces lead to, and their corners (M,8).

    Where a face of a cell has corners of both signs, the surface goes on in the cell behind it.
    """
    steps = torch.cat([torch.eye(3), -torch.eye(3)]).long().to(cells.device)
    side = torch.stack([(CORNERS.to(cells.device) * step).sum(1) == step.sum().clamp(min=0)
                        for step in steps])  # (6, 8): the corners of the face towards each step
    found, v = cells, grid.of_cells(cells, CORNERS)
    new, inside = found, v > 0
    while len(new):
        there = inside[:, None] & side
        crossed = there.any(2) & (there != side).any(2)  # (M, 6)
        cell, face = crossed.nonzero(as_tuple=True)
        new = new[cell] + steps[face]
        new = new[distinct(grid.key(new))[0]]
        new = new[~torch.isin(grid.key(new), grid.key(found))]
        corners = grid.of_cells(new, CORNERS)
        found, v, inside = torch.cat([found, new]), torch.cat([v, corners]), corners > 0
    return found, v


AT_NODE = 1e-4  # in cells: how near to a node a vertex counts as lying there


def triangulate(grid, cells, v):
    """Vertices (V,3) and faces (F,3) of the surface in cells (M,3) of step 1 with corners v (M,8).

    Every vertex lies on an edge of the grid, named by its lower node and its axis, or at a node.
    Cells that share the edge or the node share the vertex; triangles without area are left out.
    """
    pattern = ((v > 0) * 2 ** torch.arange(8, device=cells.device)).sum(1)
    table = triangle_table().to(cells.device)[pattern]  # (M, 5, 3)
    cell, triangle = (table[:, :, 0] >= 0).nonzero(as_tuple=True)  # (F,) each
    edges = torch.tensor(EDGES, device=cells.device)[table[cell, triangle]]  # (F, 3 vertices, 2)
    a, b = edges.unbind(-1)  # the lower and the upper corner of each
    lower, axis = cells[cell][:, None] + CORNERS.to(cells.device)[a], (b - a).log2().long()
    va, vb = v[cell].gather(1, a), v[cell].gather(1, b)
    # Where the line from va to vb is 0. If a is outside the box, -inf / -inf = nan stands for b.
    t = (va / (va - vb)).nan_to_num(1.0).double()
    at_node = (t - t.round()).abs() < AT_NODE
    t = torch.where(at_node, t.round(), t)
    nodes = lower + t[..., None] * F.one_hot(axis, 3)  # (F, 3 vertices, 3)
    names = torch.where(at_node, 4 * grid.key(nodes.round().long()) + 3, 4 * grid.key(lower) + axis)
    whole = (names != names.roll(1, dims=1)).all(1)
    index, faces = distinct(names[whole])
    return grid.position(nodes[whole].flatten(0, 1)[index]).float(), faces


def extract_mesh(logit_fn, resolution, level=0.0, box=None, coarse=64, chunk=65536, device=None):
    """Vertices (V,3) float32 and faces (F,3) int64 of the surface logit_fn = level: marching cubes.

    logit_fn maps points (N,3) to (N,), higher inside; it gets at most `chunk` points at a time. The
    grid has `resolution` cells along each axis of `box`, (lo, hi) for x, y and z, by default
    [-1, 1], and nodes on its faces. Every edge of the surface has two triangles (four where the
    surface touches itself along nodes), also where the shape leaves the box; normals point
    outwards; V = F = 0 for a field without surface.

    The field is evaluated on a grid of about `coarse` cells along each axis, then only where there
    may be surface (see `may_hold_surface`); with `coarse=resolution` everywhere. Surface that is
    found is followed to its end. ValueError for a field that is not finite, an empty box or less
    than one cell.
    """
    box = [(-1.0, 1.0)] * 3 if box is None else box
    require(resolution >= 1 and coarse >= 1 and len(box) == 3 and all(lo < hi for lo, hi in box),
            f'no surface at resolution {resolution}, coarse {coarse} over {box}')
    grid = Nodes(logit_fn, resolution, level, box, chunk, device)
    step = 2 ** max(0, int(math.log2(resolution / coarse)))
    cells, reach = first_cells(grid, step)
    while step > 1:
        step //= 2
        cells, reach = finer_cells(grid, cells, reach, step)
    return triangulate(grid, *followed(grid, cells))


# ---- drawing meshes ----------------------------------------------------------------------------

def camera_axes(elevation, azimuth):
    """The axes of a camera that looks at the origin, the rows of (3,3): right, up and backwards.

    Angles are in degrees. y is up; the camera stands at +z for azimuth 0 and at +x for 90.
    """
    e, a = math.radians(elevation), math.radians(azimuth)
    back = torch.tensor([math.cos(e) * math.sin(a), math.sin(e), math.cos(e) * math.cos(a)])
    right = torch.tensor([math.cos(a), 0.0, -math.sin(a)])
    return torch.stack([right, torch.linalg.cross(back, right), back])


def rasterise(points, faces, size):
    """The nearest face at each pixel, (size^2,), -1 for none, and barycentric weights (size^2,3).

    points (V,3) hold column and row in pixels and 1 / distance, which is linear on the screen and
    positive in front of the camera; faces with a corner behind the camera are left out. The weights
    are those of the face's corners at the pixel's centre, on the screen.
    """
    in_front = (points[faces, 2] > 0).all(1).nonzero()[:, 0]
    nearest = points.new_zeros(size * size)
    winner, weights = faces.new_full((size * size,), -1), points.new_zeros(size * size, 3)
    for part in in_front.split(2 ** 14):
        corners = points[faces[part]]  # (F, 3, 3)
        # All K pairs of a face and a pixel x, y with its centre in the face's bounding box.
        lo = (corners[..., :2].amin(1) - 0.5).ceil().clamp(0, size).long()
        hi = (corners[..., :2].amax(1) - 0.5).floor().clamp(-1, size - 1).long()
        width, height = (hi - lo + 1).clamp(min=0).unbind(1)
        count = width * height
        face = torch.arange(len(part), device=part.device).repeat_interleave(count)  # (K,)
        start = count.cumsum(0) - count  # where the pairs of each face begin
        k = torch.arange(len(face), device=face.device) - start[face]  # 0, 1, .. within each box
        x, y = lo[face, 0] + k % width[face], lo[face, 1] + k // width[face]
        pixel, centre = y * size + x, torch.stack([x, y], dim=1) + 0.5
        # Keep the pairs where the pixel's centre is inside the face, then the nearest of a pixel.
        a, b, c = corners[face, :, :2].unbind(1)
        sides = (b, c), (c, a), (a, b)
        w = torch.stack([(q - p) * (centre - p).flip(1) for p, q in sides], dim=1)
        w = w[..., 0] - w[..., 1]  # cross products, (K, 3)
        w = w / w.sum(1, keepdim=True)  # a face seen edge-on gives nan, which is outside
        inside = (w >= 0).all(1)
        face, pixel, w = face[inside], pixel[inside], w[inside]
        inverse = (w * corners[face, :, 2]).sum(1)
        nearest.scatter_reduce_(0, pixel, inverse, 'amax')
        front = inverse == nearest[pixel]
        winner[pixel[front]], weights[pixel[front]] = part[face[front]], w[front]
    return winner, weights


def project(points, axes, distance, fov, size):
    """Points (N,3) in perspective: column and row in pixels and 1 / distance, (N,3).

    The camera has these `axes` (see `camera_axes`), stands at `distance` from the origin and fills
    a picture of `size` pixels with `fov` degrees.
    """
    view = points @ axes.T - points.new_tensor([0, 0, distance])
    inverse = -1 / view[:, 2:]
    focal = size / 2 / math.tan(math.radians(fov) / 2)
    screen = view[:, :2] * inverse * points.new_tensor([focal, -focal]) + size / 2
    return torch.cat([screen, inverse], dim=1)


def render_points(points, size):
    """A picture (S,S), in [0,1], of points (N,3) within [-1,1]^3, near ones dark; S = size."""
    axes, distance = camera_axes(20.0, 30.0).to(points), 4.0
    column, row, inverse = project(points, axes, distance, 40.0, size).unbind(1)
    seen = (inverse > 0) & (column >= 0) & (column < size) & (row >= 0) & (row < size)
    pixel = (row.long() * size + column.long())[seen]
    shade = ((1 / inverse[seen] - distance) / 2 + 0.5).clamp(0, 0.9)
    return points.new_ones(size * size).scatter_reduce(0, pixel, shade, 'amin').view(size, size)


def render_mesh(vertices, faces, size=256, elevation=20.0, azimuth=30.0, distance=2.5, fov=40.0):
    """Pictures of a mesh in perspective: dict(shade (S,S), normal (S,S,3), depth (S,S)), S = size.

    The camera is that of `project`, with angles in degrees. shade is in [0, 1], lit from beside the
    camera, 1 where there is nothing; the normal has the camera's axes and is 0 where there is
    nothing; depth is the distance along the view, infinite where there is nothing.
    """
    axes = camera_axes(elevation, azimuth).to(vertices)
    a, b, c = vertices[faces].unbind(1)
    normals = torch.linalg.cross(b - a, c - a).repeat_interleave(3, 0)  # as long as the area
    normals = torch.zeros_like(vertices).index_add_(0, faces.flatten(), normals)
    normals = F.normalize(normals, dim=1)  # (V, 3)
    screen = project(vertices, axes, distance, fov, size)
    winner, w = rasterise(screen, faces, size)
    seen = winner >= 0
    corner, w = faces[winner[seen]], w[seen]
    w = w * screen[corner, 2]  # in space instead of on the screen, but for their sum
    depth = vertices.new_full((size * size,), math.inf)
    depth[seen] = 1 / w.sum(1)
    n = F.normalize(((w / w.sum(1, keepdim=True))[..., None] * normals[corner]).sum(1), dim=1)
    normal = vertices.new_zeros(size * size, 3)
    normal[seen] = n @ axes.T
    light = F.normalize(vertices.new_tensor([0.4, 0.6, 0.7]), dim=0)
    shade = vertices.new_ones(size * size)
    shade[seen] = 0.2 + 0.6 * (normal[seen] @ light).relu() + 0.15 * normal[seen, 2].abs()
    return dict(shade=shade.view(size, size), normal=normal.view(size, size, 3),
                depth=depth.view(size, size))


def draw_mesh(vertices, faces, size=128, azimuth=30.0):
    """A picture (3,S,S), in [-1,1], of a mesh within [-1,1]^3."""
    shade = render_mesh(vertices, faces, size, azimuth=azimuth, distance=4.0)['shade']
    return shade.expand(3, -1, -1) * 2 - 1


# ---- radiance fields ---------------------------------------------------------------------------

def box_range(rays_o, rays_d):
    """Where rays (...,3) enter and leave the box [-1, 1]^3: near, far (...), in lengths of rays_d.

    near is at least 0, where the ray begins. For a ray that misses the box far = near.
    """
    inverse = 1 / torch.where(rays_d.abs() < 1e-12, 1e-12, rays_d)
    ends = torch.stack([(-1 - rays_o) * inverse, (1 - rays_o) * inverse])
    near, far = ends.amin(0).amax(-1).clamp(min=0), ends.amax(0).amin(-1)
    return near, torch.maximum(near, far)


def bin_edges(near, far, samples):
    """Edges (...,samples + 1) of equal bins between near and far (...)."""
    return near[..., None] + (far - near)[..., None] * torch.linspace(
        0, 1, samples + 1, device=near.device)


def ray_weights(sigma, t):
    """Share (...,S) of a ray that ends in each bin; sigma (...,S) and edges t (...,S+1)."""
    thickness = sigma * t.diff(dim=-1)
    before = F.pad(thickness.cumsum(-1)[..., :-1], (1, 0))  # a difference would round
    return (-before).exp() * -torch.expm1(-thickness)


def finer_edges(t, weights, count):
    """The edges t (...,S+1) and `count` more, where the `weights` (...,S) are: (...,S+1+count).

    The new ones lie at equal steps of the sum of the weights, taken as constant in each bin; a
    hundredth of the sum is spread evenly, so that nothing is missed for good.
    """
    share = weights + 0.01 * weights.mean(-1, keepdim=True) + 1e-6
    total = F.pad((share / share.sum(-1, keepdim=True)).cumsum(-1), (1, 0))  # (..., S+1)
    u = ((torch.arange(count, device=t.device) + 0.5) / count).expand(*t.shape[:-1], count)
    k = torch.searchsorted(total, u.contiguous()).clamp(1, weights.shape[-1])
    (a, b), (lo, hi) = ((x.gather(-1, k - 1), x.gather(-1, k)) for x in (t, total))
    return torch.cat([t, a + (b - a) * (u - lo) / (hi - lo)], dim=-1).sort(-1).values


def volume_render(sigma, rgb, t, white_background=True):
    """dict(rgb (R,3), depth (R,), opacity (R,)) of rays cut into S bins of constant density.

    sigma (R,S) is density per unit of t, at least 0, rgb (R,S,3) in [0, 1], and t (R,S+1) are the
    bins' edges along directions of length 1. What passes all bins sees white, or black without
    `white_background`, at the depth of the last edge: there is no infinite last bin, which would
    make every ray opaque. Any other leading shape than (R) will do. ValueError for other counts of
    edges than S + 1.
    """
    require(t.shape[-1] == sigma.shape[-1] + 1, f'{t.shape[-1]} edges of {sigma.shape[-1]} bins')
    w = ray_weights(sigma, t)
    opacity = -torch.expm1(-(sigma * t.diff(dim=-1)).sum(-1))
    centres = (t[..., 1:] + t[..., :-1]) / 2
    background = float(white_background) * (1 - opacity)[..., None]
    return dict(rgb=(w[..., None] * rgb).sum(-2) + background, opacity=opacity,
                depth=(w * centres).sum(-1) + (1 - opacity) * t[..., -1])


def march(field, rays_o, rays_d, samples, importance=0, place=0.5):
    """`volume_render` of rays (...,3), of unit directions, through a field in the box [-1, 1]^3.

    field(points (...,S,3), dirs (...,1,3)) -> sigma (...,S), rgb (...,S,3). It is read once in each
    of the `samples` bins of a ray, at the share `place` of the bin, a number or (...,samples +
    importance) of them. With `importance`, a first reading, without gradients, tells where so many
    further edges lie.
    """
    def read(t, place):
        depth = t[..., :-1] + place * t.diff(dim=-1)
        dirs = rays_d[..., None, :]
        return field(rays_o[..., None, :] + depth[..., None] * dirs, dirs)

    t = bin_edges(*box_range(rays_o, rays_d), samples)
    if importance:
        with torch.no_grad():
            sigma, _ = read(t, 0.5)
        t = finer_edges(t, ray_weights(sigma, t), importance)
    return volume_render(*read(t, place), t)


def scattered(rays_d, count):
    """Numbers (B,R,count) evenly spread over [0, 1), which look random, for rays_d (B,R,3).

    They are a function of the bits of the item's directions alone. Items are drawn by their
    position in the stream of data, so these numbers are the same after a resume and on any number
    of processes, which a device's own generator would not give. A 32-bit integer hash.
    """
    key = rays_d.contiguous().view(torch.int32).long().sum((1, 2))[:, None, None]
    number = torch.arange(rays_d.shape[1] * count, device=rays_d.device).view(-1, count)
    x = (key * 0x9E3779B1 + number) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x >> 16 ^ x) * 0x45D9F3B) & 0xFFFFFFFF
    return (x >> 16 ^ x).double().mul(2.0 ** -32).float().clamp(max=1 - 2.0 ** -24)


@torch.no_grad()
def occupied_cells(density, cells, least=0.1, chunk=65536, device=None):
    """Which cells of a grid over [-1, 1]^3 may hold a density above `least`: (z, y, x) bools.

    density maps points (N,3) to (N,) and gets `chunk` of them at a time. It is read at the nodes of
    the grid, `cells` a side, and a cell is empty only if all nodes of it and its neighbours are.
    Of what a trained field leaves in the air, 0.1 keeps pictures to half a grey level in the mean
    (`python tests/bench.py rays --run toy_nerf`).
    """
    line = torch.linspace(-1, 1, cells + 1, device=device)
    nodes = torch.cartesian_prod(line, line, line).flip(1)  # x first, changing fastest
    values = torch.cat([density(part) for part in nodes.split(chunk)])
    values = values.float().view(1, 1, *[cells + 1] * 3)
    return ~(F.max_pool3d(values, kernel_size=4, stride=1, padding=1)[0, 0] <= least)  # or NaN


def where_occupied(field, occupied):
    """The `field` of `march`, read in the occupied cells (z, y, x) of the box only, 0 elsewhere."""
    cells = len(occupied)

    def sparse(points, dirs):
        x, y, z = ((points + 1) * (cells / 2)).long().clamp(0, cells - 1).unbind(-1)
        keep = occupied[z, y, x] & (points.abs() <= 1).all(-1)
        sigma, rgb = points.new_zeros(keep.shape), torch.zeros_like(points)
        if keep.any():
            sigma[keep], rgb[keep] = field(points[keep], dirs.expand_as(points)[keep])
        return sigma, rgb
    return sparse


# ---- cameras -----------------------------------------------------------------------------------

# What the world of `camera_axes`, where y is up, is turned by: columns are where x, y, z come.
UPWARDS = {'y': [[1, 0, 0], [0, 1, 0], [0, 0, 1]], 'z': [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
           '-y': [[1, 0, 0], [0, -1, 0], [0, 0, -1]], '-z': [[1, 0, 0], [0, 0, 1], [0, -1, 0]]}


def orbit(azimuth, elevation=20.0, distance=4.0, up='y'):
    """Pose (4,4), camera to world, of a camera that looks at the origin; angles in degrees.

    The camera's axes are those of OpenCV: x right, y down, z forwards. With y upwards it stands at
    +z for azimuth 0 and at +x for 90, as in `render_mesh`; `up` is one of `UPWARDS`.
    """
    axes = camera_axes(elevation, azimuth) @ torch.tensor(UPWARDS[up]).float().T
    pose = torch.eye(4)
    pose[:3, :3] = (axes * torch.tensor([[1.0], [-1.0], [-1.0]])).T
    pose[:3, 3] = distance * axes[2]
    return pose


def focal_length(fov, size):
    """In pixels, of a camera that sees `fov` degrees along the shorter side of (height, width)."""
    return min(size) / 2 / math.tan(math.radians(fov) / 2)


def rays_through(pose, x, y):
    """Rays through the places (x, y, 1) before a camera, x and y (...): rays_o, rays_d (...,3).

    pose (4,4) takes the camera's axes, OpenCV's (x right, y down, z forwards), to the world; poses
    of OpenGL and Blender are multiplied by diag(1, -1, -1, 1) from the right first. Directions have
    length 1.
    """
    rays_d = F.normalize(torch.stack([x, y, torch.ones_like(x)], dim=-1) @ pose[:3, :3].T, dim=-1)
    return pose[:3, 3].expand_as(rays_d), rays_d


def camera_rays(pose, focal, size, centre=None):
    """`rays_through` the centres of the pixels of a pinhole camera: rays_o, rays_d (H,W,3).

    focal, a number or (fx, fy), and centre, (cx, cy), by default the middle, are in pixels; `size`
    is (H, W). The corner of the first pixel is at (0, 0), its centre at (0.5, 0.5).
    """
    (h, w), pose = size, torch.as_tensor(pose, dtype=torch.float32)
    fx, fy = (focal, focal) if isinstance(focal, (int, float)) else focal
    cx, cy = (w / 2, h / 2) if centre is None else centre
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing='ij')
    return rays_through(pose, *(v.to(pose.device) for v in ((x - cx) / fx, (y - cy) / fy)))
