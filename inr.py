"""The continuous function: planes and coordinates, bilinear read-out, the CFC MLP, surfaces.

    p^i = gamma(c; Xi^i)                    bilinear look-up of basis field i at coordinate c
    h = Block_1(p^1);  h = Block_i([h; p^i])  coarse-to-fine conditioning (CFC), Section 3.2
    phi_ij(s) = phi_ij A(s)_j / sqrt(sum_k (phi_ik A(s)_k)^2 + eps)       scale injection, Eq. 13

Coordinates lie in [-1, 1], order (x, y[, z or t]), at cell centres; fields are read with
`align_corners=False` and border padding. Nothing else in the project knows about axes.
"""
import copy
import functools
import itertools
import math
from functools import partial

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

def plane_sizes(domain, cells):
    """Plane name -> (H, W) for a latent with `cells` (X, Y, ...) along the coordinates."""
    return {name: (cells[v], cells[u]) for name, (u, v) in PLANES[domain].items()}


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
def scale_of_points(resolution, coords):
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
    coord_features: D where a linear map of the coordinate itself is added after the first block.
    """

    def __init__(self, pe_channels, out_channels, width=256, blocks=4, layers=2,
                 conditioning='cfc', merge='concat', scale_injection=True, resolution=256,
                 coord_features=0):
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
        self.coords = nn.Linear(coord_features, width) if coord_features else None
        self.out = linear(width, out_channels, width, demodulate=False)

    @torch.no_grad()
    def fixed_scale(self, scale):
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
                scale = scale_of_points(self.resolution, coords)[None]
            style = self.style(scale)
        first = {'cfc': pe[0], 'single': pe[-1]}.get(self.conditioning)
        h = self.blocks[0](torch.cat(pe, -1) if first is None else first, style)
        if self.coords is not None:
            with torch.autocast(h.device.type, enabled=False):  # bfloat16 has 8 bits for a place
                h = h + self.coords(coords)
        for i, block in enumerate(self.blocks[1:], start=1):
            h = block(self.join(h, pe, i), style)
        return self.out(h, style)


# ---- iso-surfaces ------------------------------------------------------------------------------

CORNERS = torch.tensor([[k & 1, k >> 1 & 1, k >> 2] for k in range(8)])  # offsets (x, y, z)


def cube_edges():
    """The 12 edges of a cell as (corner, corner), the first the lower in the edge's direction."""
    return [(a, a | 1 << axis) for axis in range(3) for a in range(8) if not a & 1 << axis]


def cube_faces():
    """The 6 faces of a cell as corners in order round the face, counterclockwise from outside."""
    faces = []
    for axis in range(3):
        u, v, w = 1 << (axis + 1) % 3, 1 << (axis + 2) % 3, 1 << axis
        faces += [[w, w | u, w | u | v, w | v], [0, v, u | v, u]]
    return faces


def surface_loops(inside):
    """Closed polygons, as lists of edge numbers, between inside and outside corners of a cell.

    On every face each inside corner, or run of them, is cut off by one segment. The rule looks at
    the face's own corners only, so that two cells agree on the face they share and no hole is left.
    """
    number = {frozenset(e): i for i, e in enumerate(cube_edges())}
    following = {}
    for face in cube_faces():
        for k, a in enumerate(face):
            if inside[a] and not inside[face[k - 1]]:  # a run of inside corners begins at a
                end = k
                while inside[face[(end + 1) % 4]]:
                    end += 1
                leave = face[end % 4], face[(end + 1) % 4]
                following[number[frozenset((face[k - 1], a))]] = number[frozenset(leave)]
    loops = []
    while following:
        loop = [next(iter(following))]
        while following[loop[-1]] != loop[0]:
            loop.append(following[loop[-1]])
        for edge in loop:
            del following[edge]
        loops.append(loop)
    return loops


def triangulations(loop):
    """All ways to cut a polygon into triangles of its own vertices."""
    if len(loop) < 3:
        yield []
    for k in range(1, len(loop) - 1):
        for left in triangulations(loop[:k + 1]):
            for right in triangulations(loop[k:]):
                yield [(loop[0], loop[k], loop[-1]), *left, *right]


def flat(triangles, loop):
    """Whether a triangulated loop has a cut that lies in a face of the cell."""
    edges, sides = [{*e} for e in cube_edges()], [{*s} for s in zip(loop, loop[1:] + loop[:1])]
    cuts = [c for t in triangles for c in itertools.combinations(t, 2) if {*c} not in sides]
    return any(edges[a] | edges[b] <= {*face} for a, b in cuts for face in cube_faces())


@functools.cache
def triangle_table():
    """Triangles of the 256 sign patterns, (256, 5, 3) edge numbers, -1 where there are fewer.

    Bit k of the pattern is set where corner k is inside. No cut lies in a face of the cell: the
    neighbour may have the same one, and an edge would belong to four triangles.
    """
    table = torch.full((256, 5, 3), -1)
    for pattern in range(256):
        loops = surface_loops([bool(pattern >> k & 1) for k in range(8)])
        triangles = [t for loop in loops
                     for t in next(c for c in triangulations(loop) if not flat(c, loop))]
        if triangles:
            table[pattern, :len(triangles)] = torch.tensor(triangles)
    return table


class Nodes:
    """A field on the (n+1)^3 nodes of a grid over `box`, minus infinity outside of it.

    Nodes are named by integers (..., 3), order x, y, z. Infinity is what closes the surface where
    it leaves the box: on its faces.
    """

    def __init__(self, logit_fn, n, level, box, chunk, device):
        self.logit_fn, self.n, self.level, self.chunk = logit_fn, n, level, chunk
        self.lo, self.hi = torch.as_tensor(box, dtype=torch.float64, device=device).unbind(1)

    def position(self, nodes):
        return self.lo + (self.hi - self.lo) * nodes / self.n

    def inside_box(self, nodes):
        return ((nodes >= 0) & (nodes <= self.n)).all(-1)

    def key(self, nodes):
        """One integer for each node, also those a step outside."""
        x, y, z = (nodes + self.n).unbind(-1)
        return (z * 3 * self.n + y) * 3 * self.n + x

    @torch.no_grad()
    def values(self, nodes):
        """Field minus level at nodes (M,3): (M,)."""
        parts = [self.logit_fn(self.position(part).float()).float().reshape(-1)
                 for part in nodes.split(self.chunk)]
        values = torch.cat(parts) - self.level if parts else nodes.new_empty(0, dtype=torch.float)
        if not values.isfinite().all():
            raise ValueError('the field is not finite everywhere: no surface can be drawn')
        return values

    def corners(self, cells, step):
        """Values (M,8) at the corners of cells (M,3), named by their lowest node, `step` wide."""
        nodes = cells[:, None] + CORNERS.to(cells.device) * step
        keys, inverse = self.key(nodes).unique(return_inverse=True)
        first = torch.empty_like(keys).scatter_(
            0, inverse.flatten(), torch.arange(inverse.numel(), device=keys.device))
        nodes = nodes.flatten(0, 1)[first]
        values = torch.full(keys.shape, -math.inf, device=keys.device)
        inside = self.inside_box(nodes)
        values[inside] = self.values(nodes[inside])
        return values[inverse]


def first_cells(grid, step):
    """Cells of the first, dense grid that may hold surface: lowest nodes (M,3) and reach (M,).

    A cell is kept if its corners have two signs, or if one of them is within `reach` of the level:
    half the change of the field over the cell and its neighbours. That is enough for a slab, a rod
    or a ball of any thickness between the corners, where the field is a distance.
    """
    line = torch.arange(0, grid.n + 1, step, device=grid.lo.device)
    nodes = torch.cartesian_prod(line, line, line).flip(1)  # x fastest
    inner = grid.values(nodes).reshape(1, 1, *[len(line)] * 3)
    del nodes
    pool = partial(F.max_pool3d, kernel_size=2, stride=1)
    v = F.pad(inner, [1] * 6, value=-math.inf)
    mixed, near = (pool(v) > 0) & (pool(-v) >= 0), -pool(-v.abs())
    wide = partial(F.max_pool3d, kernel_size=4, stride=1, padding=2)
    change = wide(inner) + wide(-inner)
    reach = 0.5 * change if step > 1 else torch.zeros_like(near)
    cells = (mixed | (near <= reach) & (step > 1))[0, 0].nonzero().flip(1)
    return (cells - 1) * step, reach[0, 0][tuple((cells.flip(1)).T)]


def finer_cells(grid, cells, reach, step, block=2 ** 15):
    """Halves of cells (M,3), `step` wide, that may hold surface; with the reach, halved as well."""
    kept = []
    for part, near in zip(cells.split(block), reach.split(block)):
        halves = (part[:, None] + CORNERS.to(part.device) * step).flatten(0, 1)
        near = near.repeat_interleave(8) / 2
        touches = ((halves + step >= 0) & (halves <= grid.n)).all(1)
        halves, near = halves[touches], near[touches]
        v = grid.corners(halves, step)
        inside = v > 0
        keep = inside.any(1) & ~inside.all(1)
        if step > 1:
            keep |= v.abs().amin(1) <= near
        kept.append((halves[keep], near[keep]))
    return map(torch.cat, zip(*kept))


def triangulate(grid, cells, v):
    """Vertices (V,3) and faces (F,3) of the surface in cells (M,3) of one step; v (M,8) values."""
    weights = 2 ** torch.arange(8, device=cells.device)
    table = triangle_table().to(cells.device)[((v > 0) * weights).sum(1)]  # (M, 5, 3)
    cell, triangle = (table[:, :, 0] >= 0).nonzero(as_tuple=True)
    a, b = torch.tensor(cube_edges(), device=cells.device)[table[cell, triangle]].unbind(-1)
    lower = cells[cell][:, None] + CORNERS.to(cells.device)[a]  # (F, 3 vertices, 3)
    axis = (b - a).log2().long()
    keys, faces = (3 * grid.key(lower) + axis).unique(return_inverse=True)
    first = torch.empty_like(keys).scatter_(
        0, faces.flatten(), torch.arange(faces.numel(), device=keys.device))
    va, vb = v[cell].gather(1, a), v[cell].gather(1, b)
    t = (va / (va - vb)).nan_to_num(1.0).flatten()[first].double()  # nan: inf / inf, va outside
    direction = torch.eye(3, device=cells.device, dtype=torch.float64)[axis.flatten()[first]]
    nodes = lower.flatten(0, 1)[first] + t[:, None] * direction
    return grid.position(nodes).float(), faces


def extract_mesh(logit_fn, resolution, level=0.0, box=None, coarse=64, chunk=65536, device=None):
    """Vertices (V,3) float32 and faces (F,3) int64 of the surface logit_fn = level: marching cubes.

    logit_fn maps points (N,3) to (N,), higher inside. `resolution` is cells an axis over `box`
    ((lo, hi) for x, y, z; default [-1, 1]), with nodes on its faces. Closed, also where the shape
    leaves the box, each edge in two triangles, normals outwards; empty for an empty field.

    The field is evaluated on a grid of about `coarse` cells an axis, then only where surface may
    be (see `first_cells`); `coarse=resolution` evaluates everything. `chunk` points go to logit_fn
    at a time. ValueError for a field that is not finite.
    """
    box = [(-1.0, 1.0)] * 3 if box is None else box
    if resolution < 1 or coarse < 1 or len(box) != 3 or any(lo >= hi for lo, hi in box):
        raise ValueError(f'no surface at resolution {resolution}, coarse {coarse} over {box}')
    grid = Nodes(logit_fn, resolution, level, box, chunk, device)
    step = 2 ** max(0, int(math.log2(resolution / coarse)))
    cells, reach = first_cells(grid, step)
    while step > 1:
        step //= 2
        cells, reach = finer_cells(grid, cells, reach, step)
    return triangulate(grid, cells, grid.corners(cells, 1))


# ---- drawing meshes ----------------------------------------------------------------------------

def vertex_normals(vertices, faces):
    """Unit normals (V,3): those of the faces round each vertex (F,3), weighted by area."""
    a, b, c = vertices[faces].unbind(1)
    normals = torch.linalg.cross(b - a, c - a).repeat_interleave(3, 0)
    return F.normalize(torch.zeros_like(vertices).index_add_(0, faces.flatten(), normals), dim=1)


def camera_axes(elevation, azimuth):
    """Right, up and backwards (3,3) of a camera that looks at the origin; angles in degrees.

    y is up; the camera stands towards +z at azimuth 0 and towards +x at 90.
    """
    e, a = math.radians(elevation), math.radians(azimuth)
    back = torch.tensor([math.cos(e) * math.sin(a), math.sin(e), math.cos(e) * math.cos(a)])
    right = torch.tensor([math.cos(a), 0.0, -math.sin(a)])
    return torch.stack([right, torch.linalg.cross(back, right), back])


def covered_pixels(corners, size):
    """Pairs (face, pixel), two (K,), of which the centre may lie in the face (F,3,2), in pixels."""
    lo = (corners.amin(1) - 0.5).ceil().clamp(0, size).long()  # pixel k has its centre at k + 0.5
    hi = (corners.amax(1) - 0.5).floor().clamp(-1, size - 1).long()
    span = (hi - lo + 1).clamp(min=0)  # (F, 2)
    count = span.prod(1)
    face = torch.arange(len(corners), device=corners.device).repeat_interleave(count)
    k = torch.arange(len(face), device=face.device) - (count.cumsum(0) - count)[face]
    x, y = lo[face, 0] + k % span[face, 0], lo[face, 1] + k // span[face, 0]
    return face, y * size + x


def rasterise(points, faces, size, block=2 ** 14):
    """The nearest face at each pixel of a square, (size^2,), -1 where none is, and its weights.

    points (V,3) are column and row in pixels and 1 / distance, which is linear on the screen and
    positive in front of the camera; faces with a corner behind it are left out. The weights
    (size^2,3) are barycentric on the screen.
    """
    faces_left = (points[faces, 2] > 0).all(1).nonzero()[:, 0]
    nearest = points.new_zeros(size * size)
    winner, weights = faces.new_full((size * size,), -1), points.new_zeros(size * size, 3)
    for part in faces_left.split(block):
        corners = points[faces[part]]  # (F, 3, 3)
        face, pixel = covered_pixels(corners[..., :2], size)
        centre = torch.stack([pixel % size, pixel // size], dim=1) + 0.5
        a, b, c = corners[face, :, :2].unbind(1)
        w = torch.stack([cross2(c - b, centre - b), cross2(a - c, centre - c),
                         cross2(b - a, centre - a)], dim=1)
        w = w / w.sum(1, keepdim=True)  # a face seen edge-on gives nan, which is outside
        inside = (w >= 0).all(1)
        face, pixel, w = face[inside], pixel[inside], w[inside]
        inverse = (w * corners[face, :, 2]).sum(1)
        nearest.scatter_reduce_(0, pixel, inverse, 'amax')
        front = inverse == nearest[pixel]
        winner[pixel[front]], weights[pixel[front]] = part[face[front]], w[front]
    return winner, weights


def cross2(a, b):
    """Cross product of plane vectors (..., 2)."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def project(points, axes, distance, fov, size):
    """Columns, rows and 1 / distance (N,3), see `rasterise`, of points in a perspective view."""
    view = points @ axes.T - points.new_tensor([0, 0, distance])
    inverse = -1 / view[:, 2:]
    focal = size / 2 / math.tan(math.radians(fov) / 2)
    screen = view[:, :2] * inverse * points.new_tensor([focal, -focal]) + size / 2
    return torch.cat([screen, inverse], dim=1)


def render_points(points, size=256, elevation=20.0, azimuth=30.0, distance=4.0, fov=40.0):
    """A point cloud (N,3) seen as by `render_mesh`: (S,S), near points dark, far ones light."""
    column, row, inverse = project(points, camera_axes(elevation, azimuth).to(points), distance,
                                   fov, size).unbind(1)
    seen = (inverse > 0) & (column >= 0) & (column < size) & (row >= 0) & (row < size)
    pixel = (row.long() * size + column.long())[seen]
    shade = ((1 / inverse[seen] - distance) / 2 + 0.5).clamp(0, 0.9)
    return points.new_ones(size * size).scatter_reduce(0, pixel, shade, 'amin').view(size, size)


def render_mesh(vertices, faces, size=256, elevation=20.0, azimuth=30.0, distance=2.5, fov=40.0,
                normals=None):
    """A mesh seen in perspective: dict(shade (S,S), normal (S,S,3), depth (S,S)), S = size.

    The camera looks at the origin from `distance`, see `camera_axes`; `fov` degrees fill the
    picture. shade is in [0, 1], white where there is nothing, by a light beside the camera;
    normals are in the camera's axes, 0 for none; depth is the distance along the view, infinite
    for none. `normals` (V,3) default to `vertex_normals`.
    """
    axes = camera_axes(elevation, azimuth).to(vertices)
    normals = vertex_normals(vertices, faces) if normals is None else normals
    screen = project(vertices, axes, distance, fov, size)
    inverse = screen[:, 2:]
    winner, w = rasterise(screen, faces, size)
    seen = winner >= 0
    corner, w = faces[winner[seen]], w[seen]
    w = w * inverse[corner, 0]
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
