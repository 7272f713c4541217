"""Every data set: closed-form toys, pictures, videos, CIFAR-10, shapes and meshes, posed pictures.

    python data.py check DATASET_OR_PATH        # counts, sizes, bad files, a preview
    python data.py pack DATASET_OR_PATH --size 512 --out FILE   # pictures or frames, decoded once
    python data.py mesh FOLDER --out FOLDER     # points and occupancies of .obj, .ply, .off, .stl

`Items` is what every data set offers; `Pictures`, `Videos`, `Shapes` and `Scenes` say what an item
of their domain is, their subclasses where it comes from. `DATASETS` at the end names them all.

Pictures are uint8 outside and float32 in [-1, 1] inside; a box ((x_lo, x_hi), (y_lo, y_hi)) is the
extent of a crop of the frame [-1, 1]^2, y down.
"""
import codecs
import contextlib
import copy
import csv
import glob
import hashlib
import io
import json
import math
import os
import pickle
import posixpath
import re
import shutil
import signal
import struct
import subprocess
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import partial
from itertools import accumulate, product
from operator import attrgetter
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import numpy as np
import torch
from PIL import Image, ImageDraw, UnidentifiedImageError
from scipy import interpolate, ndimage
from torch.utils.data import Dataset, get_worker_info
from tqdm import tqdm

import common
from common import flag, require
from inr import UPWARDS, box_range, focal_length, orbit, rays_through, render_points

# ---- pictures in and out -----------------------------------------------------------------------


def to_uint8(x):
    """[-1, 1] -> 0..255, floor(127.5 x + 128) as Karras et al.; uint8 comes back as it is.

    ValueError if x is not finite.
    """
    common.require_finite(x, 'a picture')
    return x if x.dtype == torch.uint8 else (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_float(x):
    """0..255 -> float32 in [-1, 1]; to_uint8 takes it back exactly."""
    return x.float() / 127.5 - 1


def save_png(path, x):
    """Write one picture (3,H,W), float in [-1, 1] or uint8; missing folders are made."""
    save_image(path, Image.fromarray(to_uint8(x.detach().cpu()).permute(1, 2, 0).numpy()))


def save_image(path, im, **options):
    """Write a PIL picture in the format of its suffix, complete or not at all; see Image.save."""
    kind = picture_kind(path)
    common.replace(path, lambda temporary: im.save(temporary, kind, **options))


def picture_kind(path):
    """The format, as Pillow calls it, in which a picture is written to `path`; or ValueError."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    require(kind in Image.SAVE, f'{path}: a picture is written as .png, .webp, .gif, ...')
    return kind


def image_grid(x, columns=None, pad=2, room=None):
    """(B,3,H,W) -> one uint8 picture (3,H',W'), row by row, white between.

    Without `columns`, a row has room for `room` squares, by default such that the whole is about
    one; a strip of S squares takes the room of S.
    """
    x = to_uint8(x.detach().cpu())
    squares = room or int(np.ceil(np.sqrt(len(x))))
    columns = columns or max(squares // max(x.shape[3] // x.shape[2], 1), 1)
    columns = min(columns, len(x))
    rows = -(-len(x) // columns)
    height, width = x.shape[2] + pad, x.shape[3] + pad
    grid = torch.full((3, rows * height + pad, columns * width + pad), 255, dtype=torch.uint8)
    for k, picture in enumerate(x):
        top, left = k // columns * height + pad, k % columns * width + pad
        grid[:, top:top + x.shape[2], left:left + x.shape[3]] = picture
    return grid


def save_grid(path, x, columns=None, pad=2, room=None):
    """Write pictures (B,3,H,W) as one PNG; see image_grid."""
    save_png(path, image_grid(x, columns, pad, room))


def save_animation(path, frames, seconds=0.1):
    """Write uint8 frames (3,H,W), an iterable, as an endless .webp or .png, exact, or .gif."""
    first, *rest = [Image.fromarray(x.cpu().permute(1, 2, 0).numpy()) for x in frames]
    tick = 10 if Path(path).suffix == '.gif' else 1  # milliseconds, in which formats count
    ends = [tick * round(1000 / tick * seconds * k) for k in range(len(rest) + 2)]
    save_image(path, first, save_all=True, append_images=rest, loop=0, lossless=True,
               duration=[b - a for a, b in zip(ends, ends[1:])])


# ---- toy_image, toy_video: a boat off a hilly shore, as a function of (x, y) and of (x, y, t) ----

def colours(*rows):
    """'rrggbb ...' strings -> float32 (rows, colours, 3) in [-1, 1]."""
    return np.array([[[int(c[i:i + 2], 16) / 127.5 - 1 for i in (0, 2, 4)] for c in row.split()]
                     for row in rows], 'float32')


TOY_EDGE = 2 / 128  # width of every edge: 1/128 of the box
TOY_SEEDS = dict(train=(0, 20_000), test=(2 ** 30, 1_000))  # first seed, how many
TOY_HOURS = colours('8fb2e6 ffd9c9 fff3dc a79fce 7c96a0 b4c4e4',  # dawn: top of the sky, horizon,
                    '4c97e2 d6eef8 fffbe2 7fa6c8 6cab58 62acd4',  # day   sun, mountains, hill, sea
                    '86a8d4 ffd795 fff6c8 bd918c 939a48 c8ae8c',  # afternoon
                    '5c4d90 ff9d70 ffe7a4 7d5482 57456a a4667f',  # sunset
                    '18264a 52679c f4f1de 34466f 26405a 304876')  # night
TOY_PAINT = colours('f6efe0 7a4034', 'e2725b 4a3340',  # sail, hull
                    'f0c05a 3c4a6b', '5fa8a0 6b4a36')
TOY_RANGES = dict(  # each drawn uniformly; hour and paint run round closed loops
    hour=(0, 1), shore=(0.15, 0.45), sun_x=(-0.8, 0.8), sun_y=(-0.75, -0.2), sun_r=(0.14, 0.26),
    peak=(0.28, 0.5), peak_amp=(0.06, 0.16), peak_phase=(0, 6.28), peak_phase2=(0, 6.28),
    hill=(0.06, 0.2), hill_amp=(0.1, 0.22), hill_phase=(0, 6.28), terrace_tilt=(-0.35, 0.35),
    terrace_phase=(0, 6.28), ripple_phase=(0, 6.28), boat_x=(-0.6, 0.6), boat_y=(0.16, 0.4),
    boat_size=(0.42, 0.62), boat_lean=(-0.16, 0.16), paint=(0, 1))
TOY_CLIPS = dict(train=(0, 2_000), test=(2 ** 30, 200))
TOY_MOTION = dict(  # toy_video has these besides, or in place of those; speeds are per unit of t
    hour=(0.25, 0.6), hours=(0.08, 0.16), sun_fall=(0.15, 0.3), boat_x=(-0.2, 0.2),
    heading=(-1, 1), boat_speed=(0.3, 0.7), swell=(4, 8), swell_phase=(0, 6.28), waves=(4, 8),
    cloud_x=(-0.6, 0.6), cloud_y=(0, 1), cloud_r=(0, 1), wind=(0.2, 0.5))


def round_loop(table, u):
    """Linear interpolation of (K, n, 3) colours at u (B,) in [0, 1], once round: n x (B,3,1,1)."""
    k, f = np.divmod(u * len(table), 1)
    k, f = k.astype(int) % len(table), f[:, None, None]
    mixed = table[k] * (1 - f) + table[(k + 1) % len(table)] * f
    return mixed.astype('float32').transpose(1, 0, 2)[..., None, None]


def cover(distance):
    """Opacity (B,H,W) of a region with this signed distance, negative inside: a smoothstep."""
    t = np.clip(0.5 - distance / TOY_EDGE, 0, 1)
    return t * t * (3 - 2 * t)


def paint(picture, alpha, colour):
    """Blend `colour` over `picture` (B,3,H,W), in place, with opacity alpha (B,H,W)."""
    picture += alpha[:, None] * (colour - picture)


def ridge(x, y, level, *waves):
    """Signed distance, nearly, to the ground below the line y = level + sum a sin(k x + p)."""
    height = level + sum(a * np.sin(k * x + p) for a, k, p in waves)
    slope = sum(a * k * np.cos(k * x + p) for a, k, p in waves)
    return (height - y) / np.sqrt(1 + slope * slope)


def polygon(x, y, *corners):
    """Signed distance (inside exact) to a convex polygon; corners clockwise on the screen."""
    edges = zip(corners, corners[1:] + corners[:1])
    return np.maximum.reduce([((d - b) * (x - a) - (c - a) * (y - b)) / np.hypot(c - a, d - b)
                              for (a, b), (c, d) in edges])


def cloud(x, y, r):
    """Opacity (B,H,W) of a soft cloud about the origin, r to either side and flat below."""
    u, v = x / r, y / r
    v = np.where(v > 0, 3 * v, v)
    puffs = sum(np.exp(-((u - a) ** 2 + (v - b) ** 2) / c) for a, b, c in (
        (-0.75, -0.05, 0.1), (-0.25, -0.3, 0.16), (0.3, -0.15, 0.2), (0.75, -0.05, 0.08)))
    t = np.clip(1.4 * puffs - 0.3, 0, 1)
    return 0.85 * t * t * (3 - 2 * t)


def toy_shore(p, x, y, sky, horizon, sunlight, mountain, green, sea):
    """Sky, sun, clouds, mountains, terraced hill and rippled sea: (B,3,H,W)."""
    down = np.clip((y + 1) / (p.shore + 1) + 0 * x, 0, 1)[:, None]
    picture = sky + (horizon - sky) * down * (2 - down)
    sun = np.hypot(x - p.sun_x, y - p.sun_y)
    paint(picture, 0.55 * np.exp(-(sun / (2.2 * p.sun_r)) ** 2), sunlight)
    paint(picture, cover(sun - p.sun_r), sunlight)
    for cloud_x, cloud_y, cloud_r in p.clouds:
        paint(picture, cloud(x - cloud_x, y - cloud_y, cloud_r), 0.5 * (horizon + sunlight))
    height = np.clip(1.2 * (p.shore - y), 0, 1)[:, None]  # mountains fade into haze at their feet
    peaks = ridge(x, y, p.shore - p.peak, (p.peak_amp, 3.3, p.peak_phase),
                  (0.05, 7.1, p.peak_phase2))
    paint(picture, cover(peaks), horizon + (mountain - horizon) * (0.45 + 0.55 * height))
    hill = ridge(x, y, p.shore - p.hill, (p.hill_amp, 2.1, p.hill_phase))
    terraces = np.sin(23.3 * (0.8 * hill + p.terrace_tilt * x) + p.terrace_phase)
    paint(picture, cover(hill), green + 0.1 * terraces[:, None])
    depth = np.maximum(y - p.shore, 0)
    ripples = np.sin(24.2 * depth + 0.8 * np.sin(3 * x + p.ripple_phase) - p.roll)
    water = sea + (0.35 * (sky - sea)) * depth[:, None] + 0.05 * ripples[:, None]
    glitter = np.exp(-((x - p.sun_x) / (p.sun_r + 0.5 * depth)) ** 2)
    paint(water, glitter * (0.45 + 0.2 * ripples), sunlight)
    paint(picture, cover(p.shore - y), water)
    return picture


def toy_boat(p, x, y, picture, sail, wood):
    """Paint a sailing boat with its shade on the water; the mast is 1/29 of the box wide."""
    size = p.boat_size
    dx, dy = x - p.boat_x, y - p.shore - p.boat_y
    u = p.heading * (np.cos(p.boat_lean) * dx + np.sin(p.boat_lean) * dy) / size
    v = (np.cos(p.boat_lean) * dy - np.sin(p.boat_lean) * dx) / size
    shade = 1.6 - 1.6 * np.hypot(u / 0.62, (v - 0.3) / 0.2)
    paint(picture, 0.35 * np.clip(shade, 0, 1), wood)
    main = polygon(u, v, (0.02, -1.25), (0.62, -0.12), (0.02, -0.12))
    jib = polygon(u, v, (-0.04, -1.05), (-0.04, -0.12), (-0.52, -0.12))
    hull = polygon(u, v, (-0.62, -0.02), (0.7, -0.02), (0.48, 0.24), (-0.46, 0.24))
    mast = np.maximum(size * np.abs(u + 0.015) - 0.034, size * (np.abs(v + 0.62) - 0.72))
    paint(picture, cover(size * main), sail)
    paint(picture, cover(size * jib), 0.75 * sail + 0.22)
    paint(picture, cover(mast), wood)
    paint(picture, cover(size * hull), wood)


def toy_values(name, seeds, ranges):
    """What is drawn for each seed, uniformly from `ranges`: their keys -> float32 (B,1,1)."""
    drawn = np.stack([common.seeded(name, s).random(len(ranges)) for s in seeds])
    low, high = np.array([*ranges.values()]).T
    values = (low + (high - low) * drawn).astype('float32').T  # (parameters, B)
    return SimpleNamespace(**{k: v[:, None, None] for k, v in zip(ranges, values)})


def toy_picture(p, size, box):
    """(B,3,H,W): exact colours at centres of size or (H, W) cells of box or frame."""
    height, width = (size, size) if np.ndim(size) == 0 else size
    (x0, x1), (y0, y1) = np.array([[-1, 1], [-1, 1]] if box is None else box, float)
    x = (x0 + (x1 - x0) * (np.arange(width) + 0.5) / width).astype('float32')
    y = (y0 + (y1 - y0) * (np.arange(height) + 0.5) / height).astype('float32')[:, None]
    return toy_painted(p, x, y)


def toy_painted(p, x, y):
    """(B,3,H,W): exact colours at x and y, both broadcast to (B,H,W)."""
    picture = toy_shore(p, x, y, *round_loop(TOY_HOURS, p.hour[:, 0, 0]))
    toy_boat(p, x, y, picture, *round_loop(TOY_PAINT, p.paint[:, 0, 0]))
    return torch.from_numpy(picture.clip(-1, 1))


def toy_image(seeds, size, box=None):
    """(B,3,H,W), one a seed: a still sea without clouds, see `toy_picture`."""
    p = toy_values('toy_image', seeds, TOY_RANGES)
    p.clouds, p.roll, p.heading = (), 0, 1
    return toy_picture(p, size, box)


def toy_video(seeds, size, times, box=None):
    """(B,3,T,H,W), one a seed, at T times of [-1, 1]: the sun sets, boat, clouds and waves move."""
    t = np.tile(np.asarray(times, 'float32'), len(seeds))
    p = toy_moments(seeds, len(times), t)
    return toy_picture(p, size, box).unflatten(0, (len(seeds), -1)).transpose(1, 2)


def toy_colours(seed, points):
    """(N,3): exact colours of a toy video at points (N,3), rows (x, y, t)."""
    x, y, t = points.astype('float32').T
    painted = toy_painted(toy_moments([seed], len(t), t), x[:, None, None], y[:, None, None])
    return painted[..., 0, 0]


def toy_moments(seeds, count, t):
    """What toy_picture paints `count` moments of each video from: those of video b follow in t."""
    drawn = toy_values('toy_video', seeds, TOY_RANGES | TOY_MOTION)
    p = SimpleNamespace(**{k: v.repeat(count, 0) for k, v in vars(drawn).items()})
    t = t[:, None, None]  # like all of p
    p.hour, p.sun_y = p.hour + p.hours * t, p.sun_y + p.sun_fall * t
    p.heading, p.roll = np.sign(p.heading), p.waves * t
    way, swell = -p.heading * t, p.swell * t + p.swell_phase  # the bow of heading 1 is on the left
    p.boat_x, p.boat_y = p.boat_x + p.boat_speed * way, p.boat_y + 0.03 * np.sin(swell)
    p.boat_lean = p.boat_lean + 0.1 * np.cos(swell)
    p.clouds = [(p.cloud_x + 0.8 * k + p.wind * way, 0.4 * ((p.cloud_y + 0.618 * k) % 1) - 0.85,
                 0.16 + 0.1 * ((p.cloud_r + 0.618 * k) % 1)) for k in (-1, 0, 1)]
    return p


# ---- toy_shape: five families of solids, as functions of (x, y, z), y up ------------------------

def interval(*pairs):
    """Where all pairs (t from, t to) of (N,) overlap at t >= 0; (inf, -inf) where they do not."""
    start = np.maximum.reduce([np.minimum(a, b) for a, b in pairs]).clip(0)
    end = np.minimum.reduce([np.maximum(a, b) for a, b in pairs])
    met = start < end
    return np.where(met, start, np.inf), np.where(met, end, -np.inf)


def not_zero(x):
    """x with a sign and at least 1e-9 away from 0, to divide by."""
    return np.where(np.abs(x) < 1e-9, 1e-9, x).astype(x.dtype)


class Block:
    """Box with its sides along the axes: `area` of its surface, and the three methods of Lathe."""

    def __init__(self, centre, half):
        self.centre, self.half = np.array(centre, float), np.array(half, float)
        self.sides = 8 * np.prod(self.half) / self.half  # both faces across each axis
        self.area = self.sides.sum()

    def distance(self, p):
        q = np.abs(p - self.centre) - self.half
        return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0)

    def crossing(self, o, d, margin):
        near, far = ((self.centre + side * (self.half + margin) - o) / not_zero(d)
                     for side in (-1, 1))
        return interval(*zip(near.T, far.T))

    def surface(self, n, rng):
        p, rows = rng.uniform(-1, 1, (n, 3)), np.arange(n)
        k = rng.choice(3, n, p=self.sides / self.area)
        p[rows, k] = np.sign(p[rows, k])
        return self.centre + p * self.half


class Lathe:
    """Solid that a polygon of (radius, height), counterclockwise, sweeps out round an axis."""

    def __init__(self, profile, foot=(0, 0, 0), axis=(0, 1, 0)):
        self.profile, self.foot = np.array(profile, float), np.array(foot, float)
        self.side = np.roll(self.profile, -1, axis=0) - self.profile
        self.axis = np.array(axis, float) / np.linalg.norm(axis)
        across = np.cross(self.axis, np.eye(3)[np.abs(self.axis).argmin()])
        across /= np.linalg.norm(across)
        self.across = np.stack([across, np.cross(self.axis, across)])
        radii = 2 * self.profile[:, 0] + self.side[:, 0]
        self.areas = np.pi * radii * np.linalg.norm(self.side, axis=1)  # on the axis 0: no surface
        self.area = self.areas.sum()
        self.reach = self.profile[:, 1].min(), self.profile[:, 1].max()

    def distance(self, p):
        """Signed distance (N,) of points (N,3), negative inside."""
        height = (p - self.foot) @ self.axis
        radius = np.linalg.norm(p - self.foot - height[:, None] * self.axis, axis=1)
        radius = np.maximum(radius, 1e-9)  # the axis itself is inside, too
        (r, h), (dr, dh) = self.profile.T, self.side.T  # (K,)
        x, y = radius[:, None] - r, height[:, None] - h  # (N, K)
        t = ((x * dr + y * dh) / (dr ** 2 + dh ** 2)).clip(0, 1)
        squared = ((x - t * dr) ** 2 + (y - t * dh) ** 2)[:, self.areas > 0].min(1)
        above = height[:, None] >= h
        crossed, left = above != np.roll(above, -1, axis=1), dr * y > dh * x
        inside = (crossed & (left == (dh > 0))).sum(1) % 2 == 1
        return np.where(inside, -1, 1).astype(p.dtype) * np.sqrt(squared)

    def crossing(self, o, d, margin):
        """From which t to which rays o + t d (N,3) are in the cylinder about it, `margin` wider."""
        rise, slope = (o - self.foot) @ self.axis, d @ self.axis
        start = o - self.foot - rise[:, None] * self.axis
        step = d - slope[:, None] * self.axis
        a, b = np.maximum((step ** 2).sum(1), 1e-12), (start * step).sum(1)
        radius, (low, high) = self.profile[:, 0].max() + margin, self.reach
        squared = b ** 2 - a * ((start ** 2).sum(1) - radius ** 2)
        half = np.where(squared > 0, np.sqrt(np.maximum(squared, 0)), -1)  # -1: they pass it by
        return interval(((-b - half) / a, np.where(half < 0, -np.inf, (half - b) / a)),
                        ((low - margin - rise) / not_zero(slope),
                         (high + margin - rise) / not_zero(slope)))

    def surface(self, n, rng):
        """n points uniform on the surface, (n,3)."""
        k, u = rng.choice(len(self.profile), n, p=self.areas / self.area), rng.random(n)
        start, step = self.profile[k, 0], self.side[k, 0]
        radius = np.sqrt(start ** 2 + u * ((start + step) ** 2 - start ** 2))
        sloped = np.abs(step) > 1e-9
        t = np.where(sloped, (radius - start) / np.where(sloped, step, 1), u)
        turn = 2 * np.pi * rng.random((n, 1))
        height = (self.profile[k, 1] + t * self.side[k, 1])[:, None]
        around = np.cos(turn) * self.across[0] + np.sin(turn) * self.across[1]
        return self.foot + height * self.axis + radius[:, None] * around


def rod(start, end, radius, end_radius=None):
    """Round bar between two points, or a cone cut off where the radii at its ends differ."""
    axis, wide = np.subtract(end, start), radius if end_radius is None else end_radius
    length = np.linalg.norm(axis)
    return Lathe([(0, 0), (radius, 0), (wide, length), (0, length)], start, axis)


def toy_table(u, rng):
    """(parts, caption) of a table (u = rng.uniform); its legs are 1/25 to 1/21 of the box thick."""
    is_round, height, splay = rng.random() < 0.5, u(0.5, 0.8), u(0, 0.35)
    legs, reach, thick = int(rng.integers(3, 5)) if is_round else 4, u(0.55, 0.85), u(0.08, 0.095)
    depth, top = reach if is_round else u(0.5, 0.8), height - u(0.18, 0.26)
    slab = (rod((0, top, 0), (0, height, 0), reach) if is_round else
            Block((0, (top + height) / 2, 0), (reach, (height - top) / 2, depth)))
    turns = 2 * np.pi * (np.arange(legs) + 0.5) / legs
    feet = np.stack([reach * np.cos(turns), 0 * turns, depth * np.sin(turns)], axis=1)
    feet *= 0.8 if is_round else 1.2
    parts = [rod((1 - splay) * f + (0, top + 0.02, 0), f - (0, height, 0), thick / 2) for f in feet]
    words = 'round' if is_round else 'square', ('three', 'four')[legs - 3], \
        'slanted' if splay > 0.15 else 'straight'
    return [slab, *parts], 'a {} table with {} {} legs'.format(*words)


def toy_lamp(u, rng):
    """(parts, caption) of a lamp; its pole is 1/25 to 1/21 of the box thick."""
    foot, wide, narrow, drop = u(0.3, 0.5), u(0.35, 0.6), u(0.12, 0.3), u(0.35, 0.6)
    lean, height, thick = u(-0.3, 0.3), u(0.7, 0.9), u(0.08, 0.095)
    parts = [rod((0, -height, 0), (0, -height + u(0.18, 0.26), 0), foot, 0.8 * foot),
             rod((0, -height + 0.05, 0), (lean, height - drop + 0.05, 0), thick / 2),
             rod((lean, height - drop, 0), (lean, height, 0), wide, narrow)]
    words = 'leaning' if abs(lean) > 0.12 else 'upright', 'wide' if wide > 0.47 else 'small'
    return parts, f'{"an" if words[0][0] == "u" else "a"} {words[0]} lamp with a {words[1]} shade'


def toy_chair(u, rng):
    """(parts, caption) of a chair; all its parts are 1/11 to 1/9 of the box thick."""
    seat, half, back, deep = u(-0.15, 0.1), u(0.5, 0.65), u(0.75, 0.9), u(0.5, 0.65)
    thick, slats, arms = u(0.18, 0.22), rng.random() < 0.5, rng.random() < 0.5
    t = thick / 2
    parts = [Block((0, seat, 0), (half, t, deep))]
    parts += [Block((x * (half - t), (seat - 0.9) / 2, z * (deep - t)), (t, (seat + 0.9) / 2, t))
              for x in (-1, 1) for z in (-1, 1)]
    middle, tall = (seat + back) / 2, (back - seat) / 2
    bars = [-1, 0, 1] if slats else [0]
    parts += [Block((x * (half - t), middle, t - deep), (t if slats else half, tall, t))
              for x in bars]
    if slats:
        parts.append(Block((0, back - t, t - deep), (half, t, t)))
    if arms:
        parts += [Block((x * (half - t), seat + 0.4, 0), (t, t, deep)) for x in (-1, 1)]
        parts += [Block((x * (half - t), seat + 0.2, deep - t), (t, 0.2, t)) for x in (-1, 1)]
    return parts, (f'a chair with a {"slatted" if slats else "solid"} back'
                   + (' and arms' if arms else ''))


def toy_vase(u, rng):
    """(parts, caption) of a vase: hollow, open at the top, with up to two handles."""
    height, belly, neck, lip = u(0.6, 0.9), u(0.42, 0.58), u(0.34, 0.42), u(0.36, 0.46)
    handles, wall = int(rng.integers(0, 3)), 0.2
    width = interpolate.PchipInterpolator([-1, u(-0.4, 0), 0.6, 1], [0.6 * belly, belly, neck, lip])
    y = np.linspace(-1, 1, 16)
    outer = np.stack([width(y), y * height], axis=1)
    inner = (outer - (wall, 0))[y * height > 0.2 - height][::-1]
    parts = [Lathe([(0, -height), *outer, *inner, (0, inner[-1, 1])])]
    for side in (-1, 1)[:handles]:
        out, low, high = side * (belly + 0.24), 0.05, 0.75
        ends = [((side * (width(at) - wall / 2), at * height, 0), (out, at * height, 0))
                for at in (low, high)]
        parts += [rod(*ends[0], 0.09), rod(*ends[1], 0.09),
                  rod((out, low * height - 0.09, 0), (out, high * height + 0.09, 0), 0.09)]
    number = ('no handles', 'one handle', 'two handles')[handles]
    return parts, f'a {"slim" if belly < 0.5 else "round"} vase with {number}'


def toy_wheel(u, rng):
    """(parts, caption) of a wheel: a tyre, a hub and three to six spokes."""
    spokes, lying = int(rng.integers(3, 7)), rng.random() < 0.5
    radius, thick, hub, phase = u(0.65, 0.75), u(0.24, 0.32), u(0.22, 0.28), u(0, 2 * np.pi)
    x, y, axis = np.eye(3)[[0, 2, 1] if lying else [0, 1, 2]]
    turn = np.arange(24) * np.pi / 12
    tyre = np.stack([np.cos(turn), np.sin(turn)], axis=1) * thick / 2 + (radius, 0)
    parts = [Lathe(tyre, axis=axis), rod(-0.14 * axis, 0.14 * axis, hub)]
    parts += [rod((0, 0, 0), radius * (np.cos(a) * x + np.sin(a) * y), 0.08)
              for a in phase + 2 * np.pi * np.arange(spokes) / spokes]
    number = ('three', 'four', 'five', 'six')[spokes - 3]
    return parts, f'a {"lying" if lying else "standing"} wheel with {number} spokes'


TOY_FAMILIES = dict(table=toy_table, lamp=toy_lamp, chair=toy_chair, vase=toy_vase,
                    wheel=toy_wheel)
TOY_SOLIDS = dict(train=(0, 5_000), test=(2 ** 30, 500))  # first seed, how many


def toy_shape(seed):
    """The solid of a seed, with family (a key of TOY_FAMILIES), caption and parts."""
    rng = common.seeded('toy_shape', seed)
    family = list(TOY_FAMILIES)[rng.integers(len(TOY_FAMILIES))]
    parts, caption = TOY_FAMILIES[family](rng.uniform, rng)
    return SimpleNamespace(family=family, caption=caption, parts=parts)


def toy_distance(shape, points):
    """Signed distance (N,) of points (N,3) to a toy solid: exact outside, negative inside."""
    return np.minimum.reduce([part.distance(points) for part in shape.parts])


def toy_surface(shape, n, rng):
    """n points uniform on the surface of a toy solid, (n,3)."""
    areas, found = np.array([part.area for part in shape.parts]), []
    while sum(map(len, found)) < n:
        counts = rng.multinomial(n + n // 3, areas / areas.sum())
        p = np.concatenate([part.surface(k, rng) for part, k in zip(shape.parts, counts)])
        found.append(rng.permutation(p[toy_distance(shape, p) > -1e-6]))
    return np.concatenate(found)[:n]


# ---- toy_nerf: the same solids in colours, as a density and a colour of (x, y, z) ---------------

TOY_SCENES = dict(train=(0, 400), test=(2 ** 30, 100))
TOY_DENSITY = 200.0  # per unit of length within a solid: 1/50 of the box hides all but 1/2980
TOY_CAMERA = dict(distance=4.0, fov=36.0)
TOY_COLOURS = (colours('d1495b edae49 30638e 00a0a0 8d5a97 6a994e f2784b 6c757d c9a27e 3d5a80')[0]
               + 1) / 2
TOY_LIGHT = np.array([0.4, 0.8, 0.45], 'float32') / np.float32(1.0025)
TOY_POINTS = 8192  # of a scene, out of which items draw
TOY_RENDERS = Path('cache/toy_nerf')


def single(part):
    """A part of a solid whose arrays are float32, which takes half the time."""
    made = copy.copy(part)
    vars(made).update({k: v.astype('float32') for k, v in vars(part).items()
                       if isinstance(v, np.ndarray)})
    return made


def toy_scene(seed):
    """The `solid` of a seed, its parts in single precision, their colours `paint` (parts,3).

    Colours are in [0, 1]; parts of the same area, such as legs, have the same.
    """
    solid, rng = toy_shape(seed), common.seeded('toy_nerf', seed)
    kinds = np.unique([round(part.area, 4) for part in solid.parts], return_inverse=True)[1]
    paint = TOY_COLOURS[rng.permutation(len(TOY_COLOURS))][kinds]
    return SimpleNamespace(solid=solid, parts=[*map(single, solid.parts)], paint=paint,
                           bands=rng.uniform(0, 2 * np.pi))


def toy_field(scene, p, active=None):
    """Density (N,) per unit of length and colour (N,3) in [0, 1] at p (N,3).

    The density is TOY_DENSITY inside, with the edges of `cover`. Where parts overlap, so do their
    colours, which are lit from TOY_LIGHT and have bands in y. active (N,parts): which are asked,
    by default all.
    """
    p, reach = p.astype('float32'), np.float32(0.06)
    active = np.ones((len(p), len(scene.parts)), bool) if active is None else active
    near = toy_distances(scene, p, active)
    rise = (toy_distances(scene, p + reach * TOY_LIGHT, active) - near) / reach  # 1: faces light
    weight = cover(near)
    bands = 0.9 + 0.1 * np.sin(20 * p[:, 1:2] + scene.bands)
    colour = bands * (weight * (0.72 + 0.28 * rise.clip(-1, 1))) @ scene.paint
    return TOY_DENSITY * weight.max(1), colour / np.maximum(weight.sum(1), 1e-12)[:, None]


def toy_distances(scene, p, active):
    """Distances (N,parts) of p (N,3) to the parts, 9 to those that are not active."""
    found = np.full(active.shape, 9, 'float32')
    for k, part in enumerate(scene.parts):
        rows = np.flatnonzero(active[:, k])
        found[rows, k] = part.distance(p[rows])
    return found


def toy_stride(scene, o, d, t, enter, leave, step):
    """The next stretch of each ray: its length h (N,), where to sample it, whether to (N,) bool.

    A stretch is either empty and ends where matter may begin, or inside a solid, where the density
    is constant and samples lie at the middle of what is seen of it, or one `step` through an edge.
    """
    at = t + step / 2
    active = (enter <= at[:, None]) & (leave >= at[:, None])
    free = toy_distances(scene, o + at[:, None] * d, active) - TOY_EDGE / 2
    free = np.where(at[:, None] < enter, enter - at[:, None], free).min(1)
    deep = -free - TOY_EDGE
    empty, solid = free > step / 2, deep > step / 2
    h = np.where(empty, step / 2 + free, np.where(solid, np.minimum(step / 2 + deep, 0.01), step))
    x = TOY_DENSITY * np.where(empty, step, h)
    return h, np.where(solid, h * (1 / x - 1 / np.expm1(x)), h / 2), ~empty


def toy_render(scene, o, d, step=TOY_EDGE / 6):
    """The volume rendering integral of rays o + t d, unit d, (N,3) each, over white.

    dict of rgb (N,3) in [0, 1], depth (N,) = integral of w t + (1 - opacity) t_far, where a ray
    leaves the box [-1,1]^3, and opacity (N,); their errors are below 1/1000.
    """
    o, d = np.asarray(o, 'float32'), np.asarray(d, 'float32')
    bounds = [part.crossing(o, d, TOY_EDGE / 2) for part in scene.parts]
    enter, leave = (np.stack(b, 1).astype('float32') for b in zip(*bounds))
    far = box_range(torch.from_numpy(o), torch.from_numpy(d))[1].numpy()
    t, last = enter.min(1), leave.max(1)
    rgb, depth, clear = np.zeros_like(o), np.zeros_like(t), np.ones_like(t)
    rows = np.flatnonzero(t < last)
    while len(rows):
        a, b = enter[rows], leave[rows]
        h, middle, matter = toy_stride(scene, o[rows], d[rows], t[rows], a, b, step)
        on, at = rows[matter], (t[rows] + middle)[matter]
        active = (a[matter] <= at[:, None]) & (b[matter] >= at[:, None])
        density, colour = toy_field(scene, o[on] + at[:, None] * d[on], active)
        seen = clear[on] * -np.expm1(-density * h[matter])
        rgb[on] += seen[:, None] * colour
        depth[on] += seen * at
        clear[on] -= seen
        t[rows] += h
        rows = rows[(t[rows] < last[rows]) & (clear[rows] > 1e-4)]
    return dict(rgb=rgb + clear[:, None], depth=depth + clear * far, opacity=1 - clear)


def toy_pose(seed, k):
    """Pose (4,4) of view k: 17 degrees below to 64 above the horizon, views in a row far apart."""
    u, v = (common.seeded('toy_nerf pose', seed).random(2) + k * np.array([0.4142, 0.618])) % 1
    elevation = np.degrees(np.arcsin(-0.3 + 1.2 * u))
    return orbit(360 * v, elevation, TOY_CAMERA['distance']).double().numpy()


def toy_lens(size):
    """The lens of a square picture of `size` pixels; see pixel_rays."""
    focal = focal_length(TOY_CAMERA['fov'], (size, size))
    return np.array([focal, focal, size / 2, size / 2, 0, 0, 0, 0])


# ---- cameras ------------------------------------------------------------------------------------

def bent(x, y, bend):
    """Where a lens (k1, k2, p1, p2) shows directions (x, y, 1): OpenCV's radial and tangential."""
    k1, k2, p1, p2 = bend
    r2 = x * x + y * y
    grow = 1 + r2 * (k1 + r2 * k2)
    return (x * grow + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * grow + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y)


def straight(x, y, bend, rounds=30):
    """The inverse of `bent`, by iteration; it converges for lenses without a fold."""
    u, v = x, y
    for _ in range(rounds if np.any(bend) else 0):
        a, b = bent(u, v, bend)
        u, v = u + x - a, v + y - b
    return u, v


def pixel_rays(pose, lens, x, y):
    """Origins and unit directions, (...,3) each, of rays through places x, y (...) of a picture.

    x and y count pixels from the top left corner, so that the first one's centre is (0.5, 0.5);
    pose (4,4) is camera to world in OpenCV axes; lens (8,): fx, fy, cx, cy in pixels, then k1, k2,
    p1, p2.
    """
    fx, fy, cx, cy, *bend = lens
    ahead = straight((x - cx) / fx, (y - cy) / fy, bend)
    return [r.numpy() for r in rays_through(*map(torch.from_numpy, (pose, *ahead)))]


def project_points(pose, lens, points):
    """Places x, y in the picture and depths along the view, (N,) each, of points (N,3) in space.

    The inverse of `pixel_rays`; what is not in front of the camera has a depth <= 0 and no place.
    """
    fx, fy, cx, cy, *bend = lens
    a, b, depth = ((points - pose[:3, 3]) @ pose[:3, :3]).T
    front = np.where(depth > 1e-9, depth, np.inf)
    x, y = bent(a / front, b / front, bend)
    return x * fx + cx, y * fy + cy, depth


def pixels_of(pose, lens, size, points):
    """Row, column and depth (N,) of points (N,3), whether they are in the picture of (w, h)."""
    x, y, depth = project_points(pose, lens, points)
    framed = (depth > 1e-9) & (x >= 0) & (x < size[0]) & (y >= 0) & (y < size[1])
    column, row = (np.where(framed, v, 0).astype(int) for v in (x, y))
    return row, column, depth, framed


def resized_lens(lens, size, new, corner=(0, 0), part=None):
    """The lens (...,8) of a picture of `size` cropped to `part` from a corner, then made `new`.

    All sizes are (w, h), or (...,2) of them.
    """
    factor = np.divide(new, size if part is None else part)
    return np.concatenate([lens[..., :2] * factor, (lens[..., 2:4] - corner) * factor,
                           lens[..., 4:]], axis=-1)


def fitted_lens(lens, told, size):
    """The lens of a picture of `told` pixels, (w, h), as it is stored; ValueError if that was cut.

    Sides may be off by one and a half pixels and 2 %, by rounding.
    """
    width = told[0] * size[1] / told[1]
    require(abs(width - size[0]) <= 1.5 + 0.02 * size[0], f'the cameras are of {told[0]:g} x '
            f'{told[1]:g} pixels, a picture has {size[0]} x {size[1]}: it was cropped, or turned '
            'by its EXIF orientation; store it as the cameras saw it')
    return resized_lens(lens, told, size)


@dataclass
class Cameras:
    """The views of one scene: poses (V,4,4), lenses (V,8) (see pixel_rays), sizes (V,2) (w, h).

    A lens (8,) or a size (2,) is that of all views.
    """
    poses: np.ndarray
    lenses: np.ndarray
    sizes: np.ndarray

    def __post_init__(self):
        self.lenses = np.broadcast_to(self.lenses, (len(self), 8))
        self.sizes = np.broadcast_to(self.sizes, (len(self), 2))

    def __len__(self):
        return len(self.poses)

    def reduced(self, side):
        """The same for pictures whose longest side is at most `side`."""
        factor = np.minimum(1, side / self.sizes.max(1, keepdims=True))
        sizes = np.maximum(np.round(self.sizes * factor), 1).astype(int)
        return Cameras(self.poses, resized_lens(self.lenses, self.sizes, sizes), sizes)

    def square(self, k, R):
        """The lens of the centred square of view k, made R pixels a side."""
        side = min(self.sizes[k])
        corner = (self.sizes[k] - side) // 2
        return resized_lens(self.lenses[k], self.sizes[k], (R, R), corner, (side, side))


def common_ball(many):
    """Centre (3,) and radius of the ball that many `Cameras` look at: what the median one shows.

    The centre is the place closest to all their axes. ValueError if they have none, or look away.
    """
    poses = np.concatenate([c.poses for c in many])
    eye, ahead = poses[:, :3, 3], poses[:, :3, 2]
    across = np.eye(3) - ahead[:, :, None] * ahead[:, None]  # projection along each axis
    if np.linalg.eigvalsh(across.mean(0))[0] < 1e-3:
        raise ValueError('the cameras look the same way, past no common object; give the box of '
                         'the scene with --box')
    require(np.ptp(eye, axis=0).max() > 1e-9 * np.abs(eye).max(), 'the cameras stand at one place: '
            'of a panorama no shape can be had')
    centre = np.linalg.solve(across.sum(0), (across @ eye[:, :, None]).sum(0)[:, 0])
    if np.mean(((centre - eye) * ahead).sum(1) > 0) < 0.5:
        raise ValueError('the cameras look away from where their axes meet: their axes are not '
                         'what this layout has; try --axes opencv or --axes opengl')
    half = np.concatenate([(c.sizes / c.lenses[:, :2]).min(1) / 2 for c in many])  # tan of angles
    radius = np.median(np.linalg.norm(centre - eye, axis=1) * half / np.hypot(1, half))
    return centre, float(radius)


def upwards(many):
    """Which of `inr.UPWARDS` is above in the pictures of many `Cameras`, on the whole."""
    above = -np.concatenate([c.poses for c in many])[:, :3, 1].mean(0)
    return max(UPWARDS, key=lambda name: above @ np.array(UPWARDS[name])[:, 1])


# ---- files of pictures ---------------------------------------------------------------------------

SUFFIXES = tuple('.png .apng .jpg .jpeg .jpe .jfif .webp .avif .bmp .gif .tif .tiff .ppm .pgm .pbm '
                 '.pnm'.split())
MIN_SIDE = 8  # pixels; anything smaller is no picture
warnings.filterwarnings('ignore', category=UserWarning, module='PIL')  # about odd metadata


def natural(name):
    """Sort key in which a2 comes before a10."""
    parts = re.split('([0-9]+)', name)  # odd parts are numbers
    return [int(p) if k % 2 else p for k, p in enumerate(parts)], name


def is_hidden(name):
    """Whether a relative path is one of .thumbs/x.png, __MACOSX/x.png and the like."""
    return re.search(r'(^|/)(\.|__MACOSX/|lost\+found/|@eaDir/|\$RECYCLE\.BIN/)', name)


def picture_names(names, suffixes=SUFFIXES):
    """Those that end like a picture and are not hidden, in order."""
    return sorted((n for n in names if n.lower().endswith(suffixes) and not is_hidden(n)),
                  key=natural)


def identity(path):
    """What all names of one file or folder, by links of any kind, have in common."""
    try:
        about = os.stat(path)
    except OSError:
        return str(path)
    number = about.st_ino or str(path)  # not every system has numbers, or has no two alike
    return about.st_dev, number, about.st_size, about.st_mtime_ns


def first_names(names, path_of):
    """{identity: name} of files by the name that is no link, or else the first."""
    found = {}
    for name in sorted(names, key=lambda n: os.path.islink(path_of(n))):
        found.setdefault(identity(path_of(name)), name)
    return found


def png_parts(data, start):
    """Yield names and bytes of a PNG's chunks, '' for what all pictures need; others if sound."""
    while start < len(data):
        size, = struct.unpack('>I', data[start:start + 4].ljust(4, b'\0'))
        part, start = data[start:start + size + 12], start + size + 12
        needed = not part[4:5].islower()
        if needed or zlib.crc32(part[4:-4]).to_bytes(4, 'big') == part[-4:]:
            yield '' if needed else part[4:8].decode('latin1'), part


def jpeg_parts(data, start):
    """Yield names and bytes of a JPEG's segments: the marker if it is APPn or COM, else ''."""
    while marker := re.compile(b'\xff+([^\xff\0])').search(data, start):
        kind, end = marker[1].hex(), marker.end()
        size = max(int.from_bytes(data[end:end + 2], 'big'), 2)
        start = len(data) if kind == 'da' else end + size  # the picture itself goes on to the end
        yield kind if kind[0] == 'e' or kind == 'fe' else '', data[end - 2:start]


# How a file begins: what splits it, and the metadata kept in the first, second, .. attempt to read
# it, of those that change how the picture looks.
WITHOUT_METADATA = {
    b'\x89PNG\r\n\x1a\n': (png_parts, ('tRNS eXIf acTL fcTL fdAT', 'tRNS eXIf', 'eXIf')),
    b'\xff\xd8': (jpeg_parts, ('e0 e1 ee', 'e1 ee', 'e0 e1', 'e1'))}


def without_metadata(data):
    """Yield a PNG or JPEG, given as bytes, with ever less of its metadata; no other file."""
    for magic, (parts, choices) in WITHOUT_METADATA.items():
        if data.startswith(magic):
            found = [*parts(data, len(magic))]
            for kept in choices:
                yield magic + b''.join(part for name, part in found if name in kept)


def explained(data, error):
    """The error or, if all it says is that Pillow cannot identify the bytes, one that says why."""
    if not isinstance(error, UnidentifiedImageError):
        return error
    if not data:
        return OSError('an empty file')
    for kind, (make, accepts) in Image.OPEN.items():
        try:
            if accepts and accepts(data[:16].ljust(16, b'\0')) is True:
                make(io.BytesIO(data), '')
        except Exception as why:  # a decoder may raise anything on a broken file
            return OSError(f'{kind}: {why}')
    return OSError(f'no picture: it begins with {data[:16]}')


def open_picture(file, use=None):
    """use(PIL picture) of a path or a binary stream; without `use` the picture itself, left open.

    Metadata that Pillow stumbles over are left out: what a browser shows is a picture. Of a broken
    file, whatever error a decoder raises.
    """
    def attempt(file):
        im = Image.open(file)
        if not use:
            return im
        with im:
            return use(im)
    on_disk = isinstance(file, Path) and common.regular(file)
    try:
        return attempt(file)
    except Exception as failed:  # a decoder may raise anything on a broken file
        error = failed
    data = file.read_bytes() if on_disk else file.seek(0) or file.read()
    for data in without_metadata(data):
        try:
            return attempt(io.BytesIO(data))
        except Exception as failed:
            error = failed
    raise explained(data, error)


class Files:
    """Pictures of relative `names`; a Counter `passed` of the suffixes of what else is there.

    `lost` are pairs: a folder that cannot be listed, and why. What else may be known beside the
    files: `labels` and `captions`, {name: label, list of texts}, the `official` split, and `clips`,
    the `VideoFile`s where that is what they are.
    """

    passed, lost = Counter(), ()
    labels = captions = official = clips = None

    def pick(self, names, suffixes):
        """Set `names` to the pictures; the others are passed over."""
        self.names = picture_names(names, suffixes)
        picked = {*self.names}
        self.passed += Counter(os.path.splitext(n)[1].lower() or 'files without suffix'
                               for n in names if n not in picked and not is_hidden(n))

    def others(self):
        """What was passed over, in words, or ''."""
        text = ', '.join(f'{count} {what}' for what, count in self.passed.most_common())
        hint = ' (to read a zip, name the zip itself)' if '.zip' in self.passed else ''
        return text and f'passed over: {text}{hint}'

    def refuse_lost(self):
        """OSError if there may be more in folders that cannot be listed."""
        for inner, why in self.lost:
            raise OSError(f'{self.root / inner}: {why}; make it readable, or move it elsewhere')

    def digest(self, names):
        """Of these names and the fingerprints of their files, in hexadecimal."""
        found = threaded(self.fingerprint, names, 'looking at files')
        return f'{zlib.crc32(repr([*zip(names, found)]).encode()):08x}'

    def look(self, name):
        """((width, height), mode) of a picture, by its header."""
        with self.open(name) as im:
            return im.size, im.mode

    def frames(self, video, numbers):
        """The frames of these numbers, ascending, one after another, as PIL RGB."""
        read = reader(video.name)[1] if video.animated else still_frames
        return map(to_rgb, read(self, video, numbers))


class Folder(Files):
    """Pictures below a folder, at any depth, links followed; names are relative, with '/'."""

    def __init__(self, root, names=None, suffixes=SUFFIXES):
        self.root, self.passed, self.lost = root, Counter(), []
        self.pick(names or [*self.walk()], suffixes)

    def walk(self):
        """Yield the names of the files, each folder once; links to folders wait to the last."""
        seen, todo = set(), deque([''])
        while todo:
            inner = todo.popleft()
            place = identity(self.root / inner)
            if place in seen:
                self.passed['folders under a second name'] += 1
                continue
            seen.add(place)
            try:
                entries = sorted(os.scandir(self.root / inner), key=attrgetter('name'))
            except OSError as error:
                self.lost.append((inner, f'cannot be listed: {error.strerror}'))
                continue
            for entry in entries:
                name, link = inner + entry.name, entry.is_symlink()
                if not (os.path.isdir(entry) if link else entry.is_dir()):
                    yield name
                elif not is_hidden(f'{name}/'):
                    (todo.append if link else todo.appendleft)(f'{name}/')

    def open(self, name, use=None):
        return open_picture(self.root / name, use)

    def stream(self, name):
        return open(common.regular(self.root / name), 'rb')

    def fingerprint(self, name):
        try:  # its size, and the checksum of how it begins and ends
            with self.stream(name) as file:
                begins, size = file.read(2 ** 16), file.seek(0, os.SEEK_END)
                file.seek(max(size - 2 ** 16, 0))
                return size, zlib.crc32(begins + file.read())
        except OSError:
            return None


class Zip(Files):
    """Pictures in a zip, at any depth; every process opens the file anew."""

    def __init__(self, root, suffixes=SUFFIXES):
        self.root, self.opened, self.passed = root, (None, None), Counter()
        inside = [n for n in self.file().namelist() if not n.endswith('/')]
        self.entries = {posixpath.normpath(n): n for n in inside}  # of equal ones the last is read
        if len(self.entries) < len(inside):
            self.passed['entries listed again'] = len(inside) - len(self.entries)
        self.pick([*self.entries], suffixes)

    def __getstate__(self):
        return dict(vars(self), opened=(None, None))

    def file(self):
        if self.opened[0] != os.getpid():  # processes that share a descriptor share its position
            try:
                self.opened = os.getpid(), zipfile.ZipFile(self.root)
            except zipfile.BadZipFile as error:
                raise ValueError(f'{self.root}: neither a folder nor a zip that can be read '
                                 f'({error}); if data.py packed it, pack it again') from None
        return self.opened[1]

    def open(self, name, use=None):
        return open_picture(self.stream(name), use)

    def stream(self, name):
        return self.file().open(self.entries[name])

    def fingerprint(self, name):
        return self.file().getinfo(self.entries[name]).CRC


PACKED = b'DDMIpak1'  # how a packed file begins and ends
PACKED_END = struct.Struct('<QI8s')  # bytes of the JSON before it, their checksum, PACKED


def is_packed(path):
    """Whether `python data.py pack` began to write this file."""
    if not Path(path).is_file():
        return False
    with open(path, 'rb') as file:
        return file.read(len(PACKED)) == PACKED


def packed_starts(entries):
    """Where the squares of each entry of a packed file begin, and where the last ones end."""
    return accumulate((3 * e['side'] ** 2 * e.get('frames', 1) for e in entries),
                      initial=len(PACKED))


class Packed(Files):
    """Centre squares as `python data.py pack` wrote them, mapped into memory by every process.

    The file: PACKED, the squares, uint8 (side, side, 3) each, in the order of the entries, a JSON
    of the entries and of what they have in common, PACKED_END. An entry has a name and a side (0
    if there was no picture) and may have a label, captions and a `fault`, why it is of no use; that
    of a video has the number of its frames, the name of the first and their rate. ValueError if
    the file is not whole.
    """

    def __init__(self, root):
        self.root, self.seen = root, identity(root)
        about, self.mapped = self.read_about(), self.map()
        entries = about['entries']
        self.names = [e['name'] for e in entries]
        self.sides = {e['name']: e['side'] for e in entries}
        self.starts = dict(zip(self.names, packed_starts(entries)))
        self.faults = {e['name']: f'not packed, {e["fault"]}' for e in entries if 'fault' in e}
        self.labels, self.captions = ({e['name']: e[key] for e in entries if key in e} or None
                                      for key in ('label', 'captions'))
        self.official, self.size = about['split'], about['size']
        if about['kind'] == 'videos':
            self.clips = [self.clip(e) for e in entries]

    def read_about(self):
        """The JSON, a dict with `kind`, `size`, `split` and `entries`."""
        try:
            with open(self.root, 'rb') as file:
                file.seek(-PACKED_END.size, os.SEEK_END)
                size, checksum, last = PACKED_END.unpack(file.read())
                end = file.seek(-PACKED_END.size - size, os.SEEK_END)
                text = file.read(size)
            require(last == PACKED and zlib.crc32(text) == checksum, 'damaged')
            about = json.loads(text)
            require([*packed_starts(about['entries'])][-1] == end, 'something is missing')
            return about
        except Exception:  # of bytes that are not what they were, anything
            raise ValueError(f'{self.root}: a packed file that was cut short or damaged; pack it '
                             'again (python data.py pack)') from None

    def map(self):
        """The bytes of the file; what replaces it later leaves them as they are."""
        mapped = np.asarray(np.memmap(self.root, 'uint8', 'r'))
        require(self.seen == identity(self.root), f'{self.root}: has been packed anew, or changed, '
                'since it was opened; repeat the command')
        return mapped

    def clip(self, entry):
        """An entry as a VideoFile."""
        name, side, rate = entry['name'], entry['side'], entry.get('rate')
        if name in self.faults:
            return VideoFile(name, [], True, fault=self.faults[name])
        return VideoFile(name, [entry['first']] * entry['frames'], True, (side, side),
                         rate and Fraction(rate))

    def __getstate__(self):
        return dict(vars(self), mapped=None)

    def fingerprint(self, name):
        return self.seen[2:]  # the file's size and time: nothing else tells of its pixels

    def others(self):
        return f'packed with at most {self.size} pixels a side'

    def square(self, name, k=0):
        """The picture, or frame k of the video, of this name, PIL RGB."""
        if self.mapped is None:  # in a process that does not share the memory of the first
            self.mapped = self.map()
        side = self.sides[name]
        start = self.starts[name] + k * 3 * side ** 2
        return Image.fromarray(self.mapped[start:start + 3 * side ** 2].reshape(side, side, 3))

    def look(self, name):
        require(self.clips is None, 'packed as videos, where pictures are needed')
        require(name not in self.faults, self.faults.get(name))
        return (self.sides[name],) * 2, 'RGB'

    def open(self, name, use=lambda im: im):
        self.look(name)
        return use(self.square(name))

    def frames(self, video, numbers):
        if self.clips is None:  # each is a picture
            return super().frames(video, numbers)
        return (self.square(video.name, k) for k in numbers)


def find_files(root, suffixes=SUFFIXES):
    """Folder (of one file if `root` is a picture), Zip or Packed.

    FileNotFoundError or ValueError if there are no pictures.

    suffixes: SUFFIXES, or VIDEO_SUFFIXES where each file may hold a video.
    """
    root = Path(root)
    if not root.exists() and root.with_name(root.name + '.zip').exists():
        root = root.with_name(root.name + '.zip')
    if not root.exists():
        raise FileNotFoundError(f'{root}: no such folder or zip')
    require(root.is_dir() or root.is_file(), f'{root}: neither a folder nor a file')
    if is_packed(root):
        return Packed(root)
    if root.is_file() and root.suffix.lower() in suffixes:
        return Folder(root.parent, [root.name], suffixes)
    files = Folder(root, suffixes=suffixes) if root.is_dir() else Zip(root, suffixes)
    if files.names:
        return files
    for folder, why in files.lost:
        raise ValueError(f'{root / folder}: {why}; make it readable to you')
    if '.mdb' in files.passed:
        raise ValueError(f'{root}: an lmdb; the data.py of the LSUN repository writes its pictures '
                         'into a folder: python data.py export LMDB --out_dir FOLDER')
    meshes = {*MESH_READERS} & {*files.passed} and 'meshes are prepared by python data.py mesh'
    none = f'{root}: no pictures ({" ".join(suffixes)}) in it'
    raise ValueError('; '.join(filter(None, (none, files.others(), meshes))))


def reason(error):
    """One line about an exception."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickled dicts of numpy arrays and nothing else: a pickle may otherwise run any code."""

    def find_class(self, module, name):
        known = {'numpy.core.multiarray._reconstruct': np._core.multiarray._reconstruct,
                 'numpy.ndarray': np.ndarray, 'numpy.dtype': np.dtype,
                 '_codecs.encode': lambda text, encoding: text.encode(encoding)}
        key = f'{module}.{name}'.replace('_core', 'core')
        if key in known:
            return known[key]
        raise pickle.UnpicklingError(f'refused to load {module}.{name}')


class Cifar(Files):
    """cifar-10-batches-py: the folder, its parent or the .tar.gz. names 'train/0'.., labels."""

    def __init__(self, root):
        root = Path(root)
        candidates = [root, root / 'cifar-10-batches-py', root / 'cifar-10-python.tar.gz',
                      root.parent / 'cifar-10-python.tar.gz']
        place = next((p for p in candidates if p.is_file() or (p / 'test_batch').exists()), None)
        if place is None:
            raise FileNotFoundError(f'{root}: no cifar-10-batches-py folder and no '
                                    'cifar-10-python.tar.gz; name the place with --data PATH')
        self.pixels, self.labels = {}, {}
        try:
            if place.is_dir():
                files = {path.name: common.regular(path).read_bytes()
                         for path in place.glob('*_batch*')}
            else:
                with tarfile.open(place) as tar:
                    files = {Path(m.name).name: tar.extractfile(m).read()
                             for m in tar if m.isfile()}
            for k, file in enumerate(['test_batch', *(f'data_batch_{n}' for n in range(1, 6))]):
                if file not in files:
                    continue
                batch = ArrayUnpickler(io.BytesIO(files[file]), encoding='latin1').load()
                side, first = ('train', 10_000 * (k - 1)) if k else ('test', 0)
                names = [f'{side}/{first + n}' for n in range(len(batch['labels']))]
                pictures = batch['data'].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                self.pixels |= zip(names, pictures)
                self.labels |= zip(names, batch['labels'])
        except Exception as error:  # a foreign pickle or a cut archive may raise anything
            raise ValueError(f'{place}: not CIFAR-10 as published ({reason(error)}); '
                             'fetch cifar-10-python.tar.gz again') from None
        self.names = sorted(self.pixels, key=natural)

    def open(self, name, use=lambda im: im):
        return use(Image.fromarray(self.pixels[name]))


TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # by EXIF's number of how it is stored


def upright(im):
    """The PIL picture turned as its EXIF says, which is read and never written."""
    for key in ('xmp', 'XML:com.adobe.xmp'):  # where Pillow, but no browser, looks, too
        im.info.pop(key, None)
    im.load()  # which turns a TIFF
    try:
        turn = im.getexif().get(0x112)
    except Exception:  # Pillow raises anything on odd metadata
        turn = None
    return im.transpose(TURNS[turn]) if isinstance(turn, int) and turn in TURNS else im


def stored_as(im):
    """How the file has the pixels of a PIL picture, not yet loaded: Pillow's raw mode, or ''."""
    stored = im.tile[0][3] if getattr(im, 'tile', 0) else ''
    return stored[0] if isinstance(stored, tuple) else stored


def clear_colour(im):
    """What a PIL picture, not yet loaded, calls transparent, in the numbers of its pixels."""
    clear, stored = im.info.get('transparency'), stored_as(im)
    if isinstance(clear, bytes):  # opacities of a palette's colours
        return clear
    if isinstance(clear, tuple) and stored == 'RGB;16B':
        return tuple(value >> 8 for value in clear)
    return clear if clear is None else clear * {'L;2': 85, 'L;4': 17}.get(stored, 1)


def eight_bit(im, clear, stored=''):
    """A PIL picture of mode I;16*, I or F, which Pillow would clip at 255, as L or LA.

    clear: the value that is transparent, or None; stored: see `stored_as`.
    """
    values = np.nan_to_num(np.asarray(im, 'float64'))
    peak = values.max()
    scale = 255 if im.mode == 'F' and peak < 2 else 1  # of [0, 1], which resampling overshoots
    if im.mode.startswith('I;16') or peak > 255:
        scale = 255 / (2 ** 12 - 1 if stored == 'I;12' else 2 ** 16 - 1)
    grey = Image.fromarray((values * scale).round().clip(0, 255).astype('uint8'))
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype('uint8')))
    return grey


def to_rgb(im):
    """Any PIL picture -> RGB: EXIF turned, transparency over white, 16 bit and float to 8 bit."""
    clear, stored = clear_colour(im), stored_as(im)
    im = upright(im)
    if im.mode[0] in 'IF':
        im = eight_bit(im, clear, stored)
    elif clear is not None:
        im.info['transparency'] = clear
    im = whitened(im.convert('RGBA')) if has_opacity(im) else im.convert('RGB')
    im.info = {}  # it is turned, and nothing of it transparent
    return im


def has_opacity(im):
    """Whether the pixels of a PIL picture may be transparent."""
    return im.mode in ('RGBA', 'LA', 'PA') or 'transparency' in im.info


def whitened(im):
    """PIL RGBA laid over white: RGB."""
    return Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')


def square(im):
    """The largest centred square of a picture."""
    width, height = im.size
    side = min(im.size)
    left, top = (width - side) // 2, (height - side) // 2
    return im if width == height else im.crop((left, top, left + side, top + side))


def resized(im, size):
    """A PIL picture of `size` (w, h), by PIL's bicubic, which widens to antialias."""
    return im if im.size == size else im.resize(size, Image.Resampling.BICUBIC)


def resize(im, R):
    """Square PIL picture -> uint8 (R,R,3)."""
    return np.asarray(resized(im, (R, R)))


def threaded(function, items, what, workers=8):
    """[function(i) for i in items] in threads, with a bar when that takes more than a second."""
    with ThreadPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(function, items), what, len(items), unit='file', delay=1,
                         leave=False, disable=not common.is_first()))


# ---- videos -------------------------------------------------------------------------------------

FILMS = tuple('.mp4 .m4v .webm .mov .avi .mkv'.split())  # what ffmpeg reads
MOVING = ('.apng', '.npy', *FILMS)  # a video each, whatever lies beside them
ANIMATED = 'GIF', 'WEBP', 'PNG', 'AVIF'  # formats, as Pillow calls them
VIDEO_SUFFIXES = tuple(dict.fromkeys(SUFFIXES + MOVING))


@dataclass
class VideoFile:
    """Where the frames of one video lie: a file for each, or one animated file for all."""
    name: str
    frames: list
    animated: bool
    size: tuple = None  # (width, height), None where it is not known
    rate: Fraction = None  # frames a second
    fault: str = ''  # why it cannot be opened

    def __len__(self):
        return len(self.frames)


def find_videos(files):
    """The videos in `Files`, in order; a file that cannot be opened has no frames.

    A folder where one of the first three files moves holds animated files (GIF, WebP, APNG), any
    other that holds pictures is one video. What has about as many frames or fewer (formats join
    equal ones) beside a folder of its name is that video again, and left out. ValueError if ffmpeg
    is needed and not there.
    """
    if files.clips is not None:
        return files.clips
    films, groups = [n for n in files.names if n.lower().endswith(FILMS)], {}
    require(not films or shutil.which('ffmpeg') and shutil.which('ffprobe'), 'ffmpeg and ffprobe, '
            f'which read {", ".join(films[:1])}, are not on the PATH: install them, or extract the '
            'frames elsewhere (mkdir -p frames/clip; ffmpeg -i clip.mp4 frames/clip/%06d.png)')
    for name in files.names:
        alone = name.lower().endswith(MOVING)
        groups.setdefault(name if alone else os.path.dirname(name), []).append(name)
    first = [n for names in groups.values() for n in names[:3]]
    seen = dict(zip(first, threaded(partial(glance, files), first, 'looking for videos')))
    still = {g for g, names in groups.items()
             if g not in seen and all(len(seen[n]) < 2 for n in names[:3])}
    more = [n for g, names in groups.items() if g not in still for n in names[3:]]
    seen |= zip(more, threaded(partial(glance, files), more, 'looking at videos'))
    videos = []
    for group, names in groups.items():
        if group in still:
            size = next((seen[n].size for n in names[:3] if seen[n].size), None)
            videos.append(VideoFile(group, names, False, size))
            continue
        again = {n for n in names if (stem := os.path.splitext(n)[0]) in still
                 and len(seen[n]) <= len(groups[stem]) + 2}
        videos += [seen[n] for n in names if n not in again]
        if again:
            files.passed['animations of the frames in a folder'] += len(again)
    return videos


def glance(files, name):
    """A file as a VideoFile; a still picture has one frame, what cannot be opened none."""
    try:
        count, size, rate = reader(name)[0](files, name)
        return VideoFile(name, [name] * count, True, size, rate)
    except Exception as error:  # a decoder may raise anything on a broken file
        return VideoFile(name, [], True, fault=reason(error))


def reader(name):
    """(look, read) for an animated file: its count, size and rate; its frames of some numbers."""
    suffix = os.path.splitext(name)[1].lower()
    films = dict.fromkeys(FILMS, (look_film, film_frames))
    return {'.npy': (look_array, array_frames), **films}.get(suffix, (look_picture, moving_frames))


def look_picture(files, name):
    """Frames, (width, height) and frames a second, or None, of a file that Pillow reads.

    What else has several pictures, a camera's preview or the pages of a TIFF, is no animation.
    """
    with files.open(name) as image:
        count = getattr(image, 'n_frames', 1) if image.format in ANIMATED else 1
        count -= first_frame(image)
        if count > 1:
            image.load()  # WebP tells the duration of a frame with its pixels
        duration = image.info.get('duration')
        return count, image.size, Fraction(1000) / Fraction(duration) if duration else None


def first_frame(image):
    """Number of an animation's first frame for Pillow: 0 of an APNG is what old viewers show."""
    return int(getattr(image, 'default_image', False))


def moving_frames(files, video, numbers):
    """Yields the frames of these numbers of an animated file, PIL pictures."""
    with files.open(video.name) as image:
        for k in numbers:
            image.seek(k + first_frame(image))
            yield image.copy()


def still_frames(files, video, numbers):
    """Yields those of a folder of pictures."""
    for k in numbers:
        yield files.open(video.frames[k], to_rgb)


def array_shape(stream):
    """(T, H, W) of a .npy of uint8 (T,H,W,3); leaves the stream where its values begin."""
    np.lib.format.read_magic(stream)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    require(dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and not fortran,
            f'{dtype} {shape} where uint8 (T, H, W, 3) in C order is needed')
    return shape[:3]


def look_array(files, name):
    """Frames and (width, height) of a .npy file, which names no rate."""
    with files.stream(name) as stream:
        count, height, width = array_shape(stream)
        return count, (width, height), None


def array_frames(files, video, numbers):
    """Yields the frames of these numbers of a .npy file, reading no others."""
    with files.stream(video.name) as stream:
        _, height, width = array_shape(stream)
        start = stream.tell()
        for k in numbers:
            stream.seek(start + 3 * width * height * k)
            yield Image.frombytes('RGB', (width, height), stream.read(3 * width * height))


def look_film(files, name):
    """Frames, (width, height) and frames a second of a film, by ffprobe; ValueError if none."""
    require(isinstance(files, Folder), 'a film in a zip cannot be read; unpack the zip')
    common.regular(files.root / name)
    done = subprocess.run(
        ['ffprobe', '-v', 'error', '-select_streams', 'v:0', '-count_packets', '-show_entries',
         'stream=width,height,avg_frame_rate,nb_read_packets,duration', '-of', 'json',
         f'file:{files.root / name}'], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    streams = json.loads(done.stdout or '{}').get('streams')
    require(streams, ([*done.stderr.splitlines()] or ['no video in it'])[-1])
    about, = streams
    count, rate = int(about['nb_read_packets']), Fraction(about['avg_frame_rate'])
    if 'duration' in about:  # cuts keep packets that are not shown
        count = min(count, int(float(about['duration']) * rate + 0.01))
    return count, (about['width'], about['height']), rate


def film_frames(files, video, numbers):
    """Frames of ascending numbers, at a constant rate, read one by one from ffmpeg.

    Where films of a wavering rate end up to four frames early, their last one is repeated.
    """
    first, last = numbers[0], numbers[-1]
    seconds = float(max(first - Fraction(1, 4), 0) / video.rate)  # shortly before the frame
    steady = f'fps={video.rate},tpad=stop=4:stop_mode=clone'
    command = ['ffmpeg', '-v', 'error', '-ss', f'{seconds:.6f}', '-i',
               f'file:{files.root / video.name}', '-map', '0:v:0', '-vf', steady,
               '-frames:v', str(last - first + 1), '-f', 'image2pipe', '-c:v', 'ppm',
               '-pix_fmt', 'rgb24', '-']  # or films of 10 bits come with 16
    quiet = dict(stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, **quiet) as process:
        for k in range(first, last + 1):
            _, size, _ = (process.stdout.readline() for _ in range(3))  # P6, width height, 255
            require(size, f'it ends before frame {k}')
            width, height = map(int, size.split())
            pixels = process.stdout.read(3 * width * height)
            if k in numbers:
                yield Image.frombytes('RGB', (width, height), pixels)


def read_frames(files, video, numbers, resolution=0):
    """uint8 (T,H,W,3): the frames of these numbers, with a resolution the centre squares, reduced.

    OSError if one cannot be read, or if they differ in size; ValueError if they are smaller.
    """
    try:
        frames = list(files.frames(video, numbers))
        whole = np.stack([np.asarray(f) for f in frames])
    except Exception as error:  # a decoder may raise anything on a broken file
        raise OSError(f'{video.name}: cannot be read ({reason(error)})') from None
    if not resolution:
        return whole
    width, height = frames[0].size
    require(min(width, height) >= resolution, f'{video.name}: frames of {width} x {height} pixels '
            f'are less than {resolution} a side')
    return np.stack([resize(square(f), resolution) for f in frames])


# ---- splits -------------------------------------------------------------------------------------

def read_split(path):
    """A split file as dict(train=names, test=names), or dict(test=names) of a plain list."""
    try:
        text = common.read_text(path)
        if Path(path).suffix != '.json':
            return dict(test=[line for line in text.split('\n') if line.strip()])
        given = json.loads(text)
    except FileNotFoundError:
        raise FileNotFoundError(f'--split {path}: neither a fraction nor a file') from None
    except ValueError as error:
        raise ValueError(f'--split {path}: not readable ({error})') from None
    require(isinstance(given, dict) and 'test' in given and set(given) <= {'train', 'test'}
            and all(isinstance(names, list) and all(isinstance(n, str) for n in names)
                    for names in given.values()),
            f'--split {path}: must be {{"train": [names], "test": [names]}}')
    return given


def divide(names, holdout=None, group=None, seed=0, official=None):
    """{'train': names, 'test': names}.

    holdout: None -> `official` if the data set has a split, else 0.1; a fraction: a name is held
    out if its hash with `seed` is below it, so that adding files moves no other; a file for
    read_split or such a dict, without 'train' if that is the rest. group: regular expression; names
    that become equal when it is deleted stay on one side, so that it goes with no list of both.
    """
    try:
        key = partial(re.compile(group).sub, '') if group else str
    except re.error as error:
        raise ValueError(f'--group {group}: not a regular expression ({error})') from None
    if holdout in (None, ''):
        holdout = official or 0.1
    if isinstance(holdout, (str, Path)):
        try:
            holdout = float(str(holdout))
        except ValueError:
            holdout = read_split(holdout)
    if isinstance(holdout, dict) and 'train' in holdout:
        twice = {*holdout['train']} & {*holdout['test']}
        require(not twice, f'--split: {len(twice)} names are on both sides, e.g. '
                + min(twice, default=''))
        require(not group, f'--group {group}: the split lists both sides; give a fraction as '
                '--split, or leave --group out')
        return {side: list(holdout[side]) for side in ('train', 'test')}
    if isinstance(holdout, dict):
        known = {os.path.splitext(n)[0]: n for n in names} | {n: n for n in names}
        listed = [n if n in known else n.strip() for n in holdout['test']]
        unknown = [n for n in listed if n not in known]
        require(not unknown, f'--split: {len(unknown)} of {len(listed)} held-out names are not in '
                f'the data, e.g. {", ".join(unknown[:1])}')
        held = {key(known[n]) for n in listed}
    else:
        held = drawn_groups({key(n) for n in names}, holdout, seed)
    return {'train': [n for n in names if key(n) not in held],
            'test': [n for n in names if key(n) in held]}


def drawn_groups(keys, fraction, seed):
    """About this fraction of the keys, by their hashes; of a small set neither none nor all."""
    require(0 <= fraction < 1, f'--split {fraction}: the held-out fraction must be in [0, 1)')
    digests = {k: hashlib.blake2b(repr((seed, k)).encode(), digest_size=6) for k in sorted(keys)}
    hashes = {k: int.from_bytes(d.digest(), 'big') / 2 ** 48 for k, d in digests.items()}
    held = {k for k, u in hashes.items() if u < fraction}
    if fraction and len(hashes) > 1:
        held = (held or {min(hashes, key=hashes.get)}) - {max(hashes, key=hashes.get)}
    return held


# ---- what a data set is --------------------------------------------------------------------------

class Cache:
    """Keeps what fits in `limit` bytes, shared out among the loader's workers.

    Nothing is thrown out: a shuffled epoch asks once for every key, whichever of them are kept.
    """

    def __init__(self, limit):
        self.limit, self.used, self.kept = limit, 0, {}

    def get(self, key, make, size_of=attrgetter('nbytes')):
        if key in self.kept:
            return self.kept[key]
        value, worker = make(), get_worker_info()
        if self.used + size_of(value) <= self.limit // (worker.num_workers if worker else 1):
            self.kept[key] = value
            self.used += size_of(value)
        return value


@dataclass
class Selection:
    """Which items of a data set are wanted; for holdout, group and seed see `divide`."""
    split: str = 'train'  # or 'test', 'all'
    holdout: object = None
    group: str = None
    seed: int = 0
    tolerant: bool = False  # broken files are listed, however many, if any is left
    captions: str = ''  # a CSV, see `read_captions`


class Items(Dataset):
    """What every data set is: `names`, and for index i an item, its views, its truth, a picture.

    A subclass for a domain says what an item holds:
        item(i, rng)     what training sees: the encoder's input, where the function is compared,
                         and `target`, what with; all draws come from the numpy Generator `rng`,
                         those of draw_view and `known` first where the views are all there is
        view(i, k)       the encoder's input alone, in one of `views` ways: stage 2 keeps a latent
                         of each, and draw_view(rng) is the number of the one `item` would show
        truth(i, n)      what a reconstruction is measured against: the picture at n x n pixels,
                         the frames of a clip at that, n points of the box and whether they are
                         inside, views of a scene that were held out and where it covers them
        picture(i, size) (3,size,size) in [-1, 1], to look at; preview(i, size) may be several side
                         by side, (3,size,k size)
        facts()          lines for `python data.py check`
        lies_at(path)    whether a user's folder holds data of this domain; static, raises nothing
    and, as class attributes, its domain, what its items are called (`kind`), the `channels` of the
    signal, half the side of the data's box (`extent`), its `centre` and what points `up` in it, the
    dataclass of its flags (`config`), `encoder_only`, options with which no more is read than the
    encoder needs, and `packing`, options with which all of it can be packed, None if it cannot.
    """

    domain = kind = config = None
    channels, extent, centre, up = 1, 1.0, (0.0, 0.0, 0.0), 'y'
    encoder_only, packing = {}, None
    computed = False  # from a seed and nothing else
    labels = captions = None  # a class number, a list of texts, for each item

    def __init__(self, flip=False, cache_bytes=2 ** 30):
        """flip: mirror half of the items. cache_bytes: memory for what was read, per process."""
        self.flip, self.cache = flip, Cache(cache_bytes)
        self.views = 2 if flip else 1  # as it is, and mirrored
        self.bad, self.notes = [], []

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self.item(i)

    @classmethod
    def options_from(cls, flags):
        """Those of the flags (a dict) that such a data set takes, for `make_dataset`."""
        names = ['flip', 'seed', 'captions', *(f.name for f in fields(cls.config))]
        return {k: flags[k] for k in names if k in flags}

    def settles(self):
        """What these data decide of `vae.VAEConfig`, a dict of its fields."""
        return {k: getattr(self, k) for k in ('domain', 'channels', 'extent', 'centre', 'up')}

    @staticmethod
    def options_of_run(info):
        """And what a run (see `ldm.load_vae`) decides of its data, where it is opened: options."""
        return {}

    def largest(self, i):
        """The greatest n for which truth(i, n) is the truth and not enlarged."""
        return np.inf

    def preview(self, i, size):
        return self.picture(i, size)

    def inspect(self, i, size):
        """What `python data.py check` draws of an item."""
        return self.preview(i, size)

    def draw_view(self, rng):
        """The number of a view; of the first without an rng."""
        return int(rng.integers(self.views)) if rng else 0

    def stand_in(self, i):
        """i, or where item i cannot be read the index of the item that takes its place."""
        return i

    def readable(self, index):
        """The indices whose files can be read; no neighbour is substituted."""
        return [i for i in index if self.stand_in(i) == i]

    def known(self, i, rng=None):
        """dict of item i's `label`, and of one of its captions as `text` ('' for none), if any."""
        if self.labels is None and self.captions is None:
            return {}
        i = self.stand_in(i)
        found = {} if self.labels is None else dict(label=self.labels[i])
        if self.captions is not None:
            texts = self.captions[i] or ['']
            found['text'] = texts[int(rng.integers(len(texts))) if rng else 0]
        return found

    def describe(self):
        """Lines about the data set: counts, its own facts, notes, bad files."""
        sides = self.splits()
        yield f'{self.kind:9} {len(sides["train"])} train, {len(sides["test"])} test'
        yield from self.facts()
        if self.captions:
            yield f'captions  {sum(map(len, self.captions))}'
        yield from (f'note      {line}' for line in self.notes)
        yield f'bad       {len(self.bad)} files'
        yield from (f'  {name}: {why}' for name, why in self.bad)


class Computed(Items):
    """Items that are functions of a seed: nothing to read, and a fixed split."""

    computed, packing = True, None
    seeds = {}  # side: (first seed, how many)

    def __init__(self, name, root, selection, **options):
        """`names`, and `numbers`, their seeds. ValueError for what a fixed split cannot honour."""
        super().__init__(**options)
        divided = selection.holdout and not isinstance(selection.holdout, dict)
        require(not (selection.group or selection.captions or divided), f'{name}: it is computed, '
                'with a fixed split; leave --split, --group and --captions out')
        sides = self.seeds if selection.split == 'all' else (selection.split,)
        self.numbers = [first + k for first, count in map(self.seeds.get, sides)
                        for k in range(count)]
        self.names = [f'seed {s}' for s in self.numbers]

    def splits(self):
        """One line for each side, since no list is needed."""
        return {side: [f'seeds {first} to {first + count - 1}']
                for side, (first, count) in self.seeds.items()}


class FileItems(Items):
    """Items from files; broken ones go to `bad`, and the next good one stands in.

    ValueError when none is left or, unless the selection is tolerant, when they are at least three
    and more than 1 %; `spared` of them are whole, of no use all the same, and do not count. A
    subclass has `header(name)`, which returns what is known from a glance or a text that says what
    is wrong, `decode(i)`, which reads a file and raises if it cannot, and `bytes_kept` of what it
    made, for the cache. Those from `Files` have them as `files`.
    """

    files = Files()

    def select(self, names, place, selection, official=None):
        """Divide the names and keep those wanted; the headers of the good ones."""
        self.place, self.tolerant, known = str(place), selection.tolerant, {*names}
        if self.files.official:
            official = {side: [n for n in listed if n in known]
                        for side, listed in self.files.official.items()}
        self.official = official  # the split that comes with the data
        sides = divide(names, selection.holdout, selection.group, selection.seed, official)
        self.sides, self.apart = self.distinct(sides), len(known - {*sum(sides.values(), [])})
        chosen = ('train', 'test') if selection.split == 'all' else (selection.split,)
        wanted = sorted((n for side in chosen for n in self.sides[side]), key=natural)
        if selection.split != 'all':
            self.refuse_one()
        require(wanted, f'{place}: no {self.kind} in the {selection.split} part; change --split'
                + ' or --group' * bool(selection.group))
        headers = dict(zip(wanted, threaded(lambda n: self.header(n) if n in known else
                                            'not there', wanted, 'reading headers')))
        self.bad = [*self.files.lost, *((n, h) for n, h in headers.items() if isinstance(h, str))]
        self.names = [n for n, h in headers.items() if not isinstance(h, str)]
        self.total, self.last, self.spared = len(wanted) + len(self.files.lost), (None, None), 0
        self.broken = torch.zeros(len(self.names), dtype=torch.bool)
        with contextlib.suppress(RuntimeError):  # some containers have no shared memory
            self.broken.share_memory_()
        self.notes += filter(None, [self.files.others()])
        if self.apart:
            self.notes.append(f'{self.apart} {self.kind} of neither train nor test are left alone')
        self.sound = {}  # index -> whether the file could be read, of those that were tried
        self.refuse_bad()
        if selection.captions:
            self.add_captions(read_captions(selection.captions))
        elif self.files.captions:
            self.add_captions(self.files.captions)
        return [headers[n] for n in self.names]

    def path_of(self, name):
        """The file or folder that an item is, if it is one: names of the same are of one item."""
        return Path(self.place) / name

    def distinct(self, sides):
        """The two sides without names of what is there under another name, by links, or again.

        A name that is held out is preferred, then one that is no link.
        """
        first = {place: (side, name) for side in ('train', 'test')
                 for place, name in first_names(sides[side], self.path_of).items()}
        used = {*first.values()}
        kept = {side: [n for n in dict.fromkeys(names) if (side, n) in used]
                for side, names in sides.items()}
        if again := sum(map(len, sides.values())) - sum(map(len, kept.values())):
            self.notes.append(f'{again} {self.kind} left out: other names (links) of those there')
        return kept

    def refuse_one(self):
        """ValueError if all there is cannot be divided."""
        one = len(self.sides['train'] + self.sides['test']) == 1
        require(not one, f'{self.place}: a single {self.kind[:-1]}, so that none is held out from '
                'training; add others')

    def add_captions(self, texts):
        """Join captions {key: [texts]} by the items' names, see `captions_by_name`."""
        captions_of = captions_by_name(texts)
        self.captions = [captions_of(name) for name in self.names]
        require(any(map(captions_of, self.sides['train'] + self.sides['test'])),
                f'--captions: none of {len(texts)} names is that of an item, e.g. '
                f'{next(iter(texts), "")} and {self.names[0]}')
        if missing := sum(not c for c in self.captions):
            self.notes.append(f'{missing} {self.kind} have no caption')

    def refuse_bad(self):
        """ValueError if too many of the files are of no use."""
        broken = self.broken.nonzero().flatten().tolist()  # first: threads add to `bad` before
        known = [name for name, _ in self.bad]
        others = {self.names[i] for i in broken} - {*known}
        bad, total = len(known) + len(others) - self.spared, self.total - self.spared
        if bad == total or not self.tolerant and bad >= 3 and bad > total / 100:
            if self.tolerant:  # `check`, which lists them where some are left
                print(*(common.printable(f'{name}: {why}') for name, why in self.bad), sep='\n')
            name, why = self.bad[0]
            raise ValueError(f'{self.place}: {bad} of {total} {self.kind} cannot be used, '
                             f'e.g. {name}: {why}; all of them: python data.py check {self.place}')

    def splits(self):
        """{'train': names, 'test': names} of the whole data set, for splits.json."""
        return self.sides

    def stand_in(self, i):
        """i or, where that cannot be read, the next index that can, the first after the last."""
        while not self.can_read(i):
            i = (i + 1) % len(self)
        return i

    def source(self, i):
        """What `decode` makes of item i; the last one is kept, as an item asks several times."""
        last = self.last  # threads may replace it
        if last[0] != i:
            last = self.last = i, self.cache.get((i, 'source'), lambda: self.decode(i),
                                                 self.bytes_kept)
        return last[1]

    def can_read(self, i):
        """Whether item i can be read; a file that cannot is broken from then on."""
        if i not in self.sound:
            why = self.fault(i, self.source)
            self.sound[i] = not why
            if why:
                self.skip(i, why)
        return self.sound[i]

    def skip(self, i, why):
        """Count item i as bad and say so; ValueError if that makes too many.

        What other workers found counts, too: `broken` is in memory that they share.
        """
        self.bad.append((self.names[i], why))
        self.broken[i] = True
        tqdm.write(common.printable(f'skipped: {self.names[i]}: {why}'))
        self.refuse_bad()

    @staticmethod
    def fault(i, read):
        """Why read(i) fails, or None."""
        try:
            read(i)
        except Exception as error:  # a decoder may raise anything on a broken file
            return reason(error)

    def verify(self):
        """Decode every file now; those that fail join `bad`."""
        faults = threaded(partial(self.fault, read=self.decode), range(len(self)), 'decoding')
        self.bad += [(self.names[i], why) for i, why in enumerate(faults)
                     if why and self.sound.get(i, True)]
        self.sound = {i: not why for i, why in enumerate(faults)}
        self.refuse_bad()


def read_captions(path):
    """{key: [texts]} of a CSV, empty ones left out; FileNotFoundError or ValueError, one line."""
    rows = read_table(path, '--captions')
    columns = {c.lower(): c for c in rows[0] if c} if rows else {}
    key, text = (next((columns[c] for c in wanted if c in columns), None) for wanted in (
        ('file', 'modelid', 'model_id', 'id'), ('description', 'caption', 'text', 'name')))
    require(key and text, f'--captions {path}: needs a column file, id or modelId and one of '
            f'description, caption, text, name; has {", ".join(columns) or "no rows"}')
    found = {}
    for row in rows:
        if row[key] and row[text] and row[text].strip():
            found.setdefault(row[key], []).append(' '.join(row[text].split()))
    return found


def captions_by_name(texts):
    """Function: an item's name -> its captions, of {key: [texts]}; [] if there are none.

    A key may lack the name's suffix, and either may begin in a folder above the other's. The key
    that shares most folders counts; where several that are longer than the name share all of them,
    it is not known which is meant, and none counts.
    """
    longer = {}
    for key in texts:
        for folders in range(1, key.count('/') + 1):
            longer.setdefault(key.split('/', folders)[-1], []).append(key)

    def captions_of(name):
        whole = name, os.path.splitext(name)[0]
        above = next((longer[form] for form in whole if form in longer), [])
        if above and not texts.keys() & {*whole}:
            return texts[above[0]] if len(above) == 1 else []
        tails = (form.split('/', folders)[-1] for folders in range(name.count('/') + 1)
                 for form in whole)
        return next((texts[tail] for tail in tails if tail in texts), [])
    return captions_of


def read_table(path, flag):
    """The rows of a CSV in UTF-8 as dicts; its errors name the flag."""
    try:
        rows = [*csv.DictReader(io.StringIO(common.read_text(path)), skipinitialspace=True)]
        wrong = next((k for k, row in enumerate(rows, 1) if any(row.get(None, ()))), 0)
        require(not wrong, f'{path}: row {wrong} has more fields than the header; put texts with '
                'commas into quotes')
        return rows
    except FileNotFoundError:
        raise FileNotFoundError(f'{flag} {path}: no such file') from None
    except ValueError as error:
        raise ValueError(f'{flag} {error}') from None
    except csv.Error as error:
        raise ValueError(f'{flag} {path}: not a CSV ({error})') from None


# ---- data sets of pictures ----------------------------------------------------------------------

@dataclass
class PictureConfig:
    """Which parts of a picture stage 1 learns from."""
    scales: tuple = flag((1.0, 1.5, 2.0), 'target resolutions over r, for multi-scale training')
    scale_probs: tuple = flag((), 'probability of each scale; empty = equal', low=0)
    continuous: bool = flag(False, 'draw the target resolution uniformly up to the largest of '
                            '--scales')


class Pictures(Items):
    """What all picture sets share: multi-scale training (Appendix B.1 of the paper), flips.

    The encoder sees the full frame at r x r, the loss an r x r crop, at known coordinates, of the
    same picture at R >= r. Departures: the last crop position is drawn too, R may be continuous in
    [r, max(scales) r], and a picture is never enlarged to serve as the truth: scales beyond its
    short side are dropped for that picture.
    """

    domain, kind, channels, config = 'image', 'pictures', 3, PictureConfig
    encoder_only = dict(scales=(1.0,), scale_probs=None, continuous=False)
    packing = dict(resolution=MIN_SIDE)

    def __init__(self, resolution=64, scales=(1.0,), scale_probs=None, continuous=False,
                 **options):
        super().__init__(**options)
        scales = tuple(scales)
        require(resolution >= 4, f'--resolution {resolution}: must be at least 4')
        require(scales and all(1 <= s < np.inf for s in scales),
                f'--scales {scales}: factors of the resolution, each at least 1')
        probs = tuple(scale_probs or [1 / len(scales)] * len(scales))
        require(len(probs) == len(scales) and min(probs) >= 0 and sum(probs) > 0,
                f'--scale_probs {probs}: one weight >= 0 for each of {scales}')
        require(not (continuous and scale_probs), '--scale_probs: a continuous scale is uniform; '
                'leave one of them out')
        self.resolution, self.continuous = int(resolution), continuous
        self.sizes = [round(s * resolution) for s in scales]
        self.probs = np.array(probs, float)

    @classmethod
    def options_from(cls, flags):
        found = dict(super().options_from(flags), resolution=flags['resolution'])
        if found.get('continuous'):
            found['scale_probs'] = None
        return found

    @staticmethod
    def lies_at(path):
        return True

    def draw_view(self, rng):
        return int(rng is not None and self.flip and rng.random() < 0.5)

    def draw_size(self, i, rng):
        r, largest = self.resolution, self.largest(i)
        if self.continuous:
            return int(rng.integers(r, max(r, min(max(self.sizes), largest)) + 1))
        probs = np.array([p * (R <= largest) for R, p in zip(self.sizes, self.probs)])
        return int(rng.choice(self.sizes, p=probs / probs.sum())) if probs.sum() else r

    def item(self, i, rng=None):
        """image (3,r,r), target (3,r,r), a crop of it at R, box (2,2), scale () = r/R, and `known`.

        Without an rng the target is the image.
        """
        i, r = self.stand_in(i), self.resolution
        flip, known = self.draw_view(rng) == 1, self.known(i, rng)
        R = r if rng is None else self.draw_size(i, rng)
        top, left = (0, 0) if R == r else map(int, rng.integers(0, R - r + 1, 2))  # the last too
        image = self.crop(i, r, 0, 0, flip)
        target = image if R == r else self.crop(i, R, top, left, flip)
        corner = np.array([[left, left + r], [top, top + r]], 'float32')
        return dict(image=image, target=target, scale=torch.tensor(r / R),
                    box=torch.from_numpy(2 * corner / R - 1), **known)

    def view(self, i, k):
        return dict(image=self.crop(self.stand_in(i), self.resolution, 0, 0, k == 1))

    def picture(self, i, size):
        return self.truth(i, size)


class ToyPictures(Computed, Pictures):
    """toy_image; the truth is exact at every resolution."""

    seeds = TOY_SEEDS

    def crop(self, i, R, top, left, flip):
        seeds, r = [self.numbers[i]], self.resolution
        x0 = R - left - r if flip else left
        box = 2 * np.array([[x0, x0 + r], [top, top + r]]) / R - 1
        part = (self.cache.get(i, lambda: toy_image(seeds, r)[0]) if R == r else
                toy_image(seeds, r, box)[0])
        return part.flip(-1) if flip else part

    def truth(self, i, R):
        """Picture i at R x R cells, whole: float32 (3,R,R) in [-1, 1]."""
        return toy_image([self.numbers[i]], R)[0]


class FilePictures(FileItems, Pictures):
    """Pictures from `Files`: centre square, antialiased to R x R."""

    def __init__(self, files, place, selection, official=None, **options):
        super().__init__(**options)
        self.files = files
        headers = self.select(files.names, place, selection, official)
        self.shapes, self.modes = [h[0] for h in headers], [h[1] for h in headers]
        if files.labels:
            self.labels = [files.labels[n] for n in self.names]
        if small := sum(min(shape) < self.resolution for shape in self.shapes):
            self.notes.append(f'{small} pictures smaller than {self.resolution} are enlarged')

    def header(self, name):
        """((width, height), mode), or why the file is of no use."""
        try:
            size, mode = self.files.look(name)
            return (size, mode) if min(size) >= MIN_SIDE else f'only {size[0]} x {size[1]} pixels'
        except Exception as error:  # a decoder may raise anything on a broken file
            return reason(error)

    def bytes_kept(self, im):
        """Sources are kept where sizes hardly recur; elsewhere the sizes are, see `pixels`."""
        return 3 * im.width * im.height if self.continuous else math.inf

    def decode(self, i):
        """The centre square of picture i as it is on disk, PIL RGB."""
        return square(self.files.open(self.names[i], to_rgb))

    def squares(self, i):
        """Yields what `decode` returns."""
        yield self.decode(i)

    def entry(self, i):
        """What a packed file has to know of picture i."""
        return {}

    def largest(self, i):
        return min(self.shapes[i])

    def pixels(self, i, R):
        """uint8 (R,R,3), kept if R is a size that training asks for."""
        if R != self.resolution and (self.continuous or R not in self.sizes):
            return resize(self.source(i), R)
        return self.cache.get((i, R), lambda: resize(self.source(i), R))

    def crop(self, i, R, top, left, flip):
        whole, r = self.pixels(i, R), self.resolution
        part = (whole[:, ::-1] if flip else whole)[top:top + r, left:left + r]
        return to_float(torch.from_numpy(part.transpose(2, 0, 1).copy()))

    def truth(self, i, R):
        """Picture i at R x R, whole, enlarged if need be: float32 (3,R,R) in [-1, 1]."""
        i = self.stand_in(i)
        return to_float(torch.from_numpy(self.pixels(i, R).transpose(2, 0, 1).copy()))

    def facts(self):
        modes = ', '.join(f'{self.modes.count(m)} {m}' for m in sorted(set(self.modes)))
        yield (f'sizes     short side {spread(map(min, self.shapes))}; '
               f'{len(set(self.shapes))} different shapes')
        yield f'modes     {modes}'
        if self.labels:
            yield f'labels    {len(set(self.labels))} classes'


def spread(values):
    """'3 min, 5 median, 9 max' of numbers."""
    values = sorted(values)
    return f'{values[0]} min, {values[len(values) // 2]} median, {values[-1]} max'


def files_of_data(root, suffixes=SUFFIXES):
    """`find_files` for a data set: its errors say which flag names another place."""
    try:
        return find_files(root, suffixes)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f'{error}; put the pictures there or name the place with --data PATH'
                          ) from None


def picture_files(name, root, selection, **options):
    """Any folder or zip of pictures."""
    return FilePictures(files_of_data(root), root, selection, **options)


AFHQ = ('cat', 'dog', 'wild')


def afhq(name, root, selection, **options):
    """One animal of AFHQ: {train,test}/{cat,dog,wild} or the folder of one class."""
    files, animal = files_of_data(root), name.removeprefix('afhq_')
    parts = {n: (Path(root).name, *n.split('/')[:-1]) for n in files.names}
    if any(a in p for p in parts.values() for a in AFHQ):
        files.names = [n for n in files.names if animal in parts[n]]
    require(files.names, f'{root}: no folder {animal} in it; name the place with --data PATH')
    test = [n for n in files.names if {'test', 'val'} & {*parts[n][1:]}]
    train = [n for n in files.names if 'train' in parts[n][1:]]
    official = dict(train=train, test=test) if train and test else None
    return FilePictures(files, root, selection, official, **options)


def cifar10(name, root, selection, **options):
    """CIFAR-10 with its official split and labels."""
    files = Packed(root) if is_packed(root) else Cifar(root)
    official = {s: [n for n in files.names if n.startswith(s)] for s in ('train', 'test')}
    return FilePictures(files, root, selection, official, **options)


# ---- data sets of videos ------------------------------------------------------------------------

@dataclass
class VideoConfig:
    """What stage 1 sees of a video at a time."""
    frames: int = flag(16, 'T: frames of a clip')
    interval: int = flag(1, 'every n-th frame of a video makes the clip')
    pixels: int = flag(1024, 'pixels of the clip whose colour is asked for')
    clips: int = flag(4, 'clips of each video that stage 2 keeps latents of, where it is longer')


class Videos(Items):
    """What all video sets share: a clip of `frames` frames for the encoder, pixels of it, flips.

    Cell k of T lies at time t = (2 k + 1) / T - 1, the third coordinate; the clip takes up
    frames * interval frames of its video and shows the middle one of each `interval`. A data set
    has `starts(i)`, how many places the clip may start at, and `clip(i, start)`, float32 (3,T,r,r).
    The clip that starts at the middle one is that of `truth`, the pictures, and items without rng.
    """

    domain, kind, channels, config = 'video', 'videos', 3, VideoConfig
    encoder_only, packing = dict(pixels=1), dict(resolution=MIN_SIDE, frames=1)

    def __init__(self, resolution=64, frames=16, interval=1, pixels=1024, clips=4, **options):
        super().__init__(**options)
        require(min(frames, interval, pixels, clips, resolution - 3) >= 1, '--frames, --interval, '
                '--pixels and --clips: at least 1; --resolution: at least 4')
        self.resolution, self.frames, self.interval = int(resolution), frames, interval
        self.pixels, self.clips, self.span = pixels, clips, frames * interval

    @classmethod
    def options_from(cls, flags):
        return dict(super().options_from(flags), resolution=flags['resolution'])

    @staticmethod
    def lies_at(path):
        """Whether one of the first three files moves: folders of frames are pictures, too."""
        try:
            files = find_files(path, VIDEO_SUFFIXES)
        except (ValueError, OSError):
            return False
        return files.clips is not None or any(
            n.lower().endswith(MOVING) or len(glance(files, n)) > 1 for n in files.names[:3])

    def start(self, i, j):
        """Where the j-th of `clips` clips starts: evenly spaced, round from the middle."""
        return int(self.starts(i) * ((0.5 + j / self.clips) % 1))

    def item(self, i, rng=None):
        """video (3,T,r,r), coords (M,3) in [-1,1], target (M,3), the colours there, and `known`.

        The clip starts anywhere. Without an rng the points depend on the video's name alone.
        """
        i, mirrored = self.stand_in(i), self.draw_view(rng) % (1 + self.flip)
        known = self.known(i, rng)
        start = int(rng.integers(self.starts(i))) if rng else self.start(i, 0)
        video, rng = self.clip(i, start), rng or common.seeded('video', self.names[i])
        coords, target = self.points(i, video, rng)
        if mirrored:
            video, coords = video.flip(-1), coords * torch.tensor([-1.0, 1.0, 1.0])
        return dict(video=video, coords=coords, target=target, **known)

    def points(self, i, video, rng):
        """Coordinates (M,3) and colours (M,3) of random cells of a clip, none twice."""
        _, *size = video.shape
        cells = rng.choice(math.prod(size), min(self.pixels, math.prod(size)), replace=False)
        places = np.stack(np.unravel_index(cells, size)[::-1], axis=1)  # (M,3): x, y, t
        coords = ((2 * places + 1) / size[::-1] - 1).astype('float32')
        return torch.from_numpy(coords), video.flatten(1)[:, cells].T.contiguous()

    def view(self, i, k):
        i, (j, mirrored) = self.stand_in(i), divmod(k, 1 + self.flip)
        video = self.clip(i, self.start(i, j))
        return dict(video=video.flip(-1) if mirrored else video)

    def picture(self, i, size):
        """The middle frame."""
        return self.truth(i, size)[:, self.frames // 2]

    def preview(self, i, size):
        """Up to eight frames, evenly spaced."""
        shown = self.truth(i, size)[:, common.evenly_spaced(self.frames, 8)]  # (3,k,size,size)
        return shown.transpose(1, 2).flatten(2)


class ToyVideos(Computed, Videos):
    """toy_video; the truth is exact at every resolution and at all times."""

    seeds = TOY_CLIPS

    def __init__(self, name, root, selection, **options):
        super().__init__(name, root, selection, **options)
        require(self.interval == 1, f'--interval {self.interval}: {name} is known at all times; '
                'change --frames')

    def starts(self, i):
        return 1

    def clip(self, i, start):
        return self.cache.get(i, lambda: self.truth(i, self.resolution))

    def points(self, i, video, rng):
        """Coordinates anywhere in the clip and the exact colours there."""
        coords = rng.uniform(-1, 1, (self.pixels, 3)).astype('float32')
        return torch.from_numpy(coords), toy_colours(self.numbers[i], coords)

    def truth(self, i, R, frames=None, start=None):
        """Video i at R x R cells and T or other `frames` times, all of it: (3,frames,R,R)."""
        frames = frames or self.frames
        return toy_video([self.numbers[i]], R, (2 * np.arange(frames) + 1) / frames - 1)[0]


class FileVideos(FileItems, Videos):
    """Videos that `find_videos` found in `Files`: centre square, antialiased to R x R."""

    def __init__(self, files, found, place, selection, official=None, **options):
        super().__init__(**options)
        self.files, self.found = files, {v.name: v for v in found}
        videos = self.select([*self.found], place, selection, official)
        long = [k for k, v in enumerate(videos) if len(v) >= self.span]
        short = [(v.name, f'only {len(v)} frames') for v in videos if len(v) < self.span]
        require(long, f'{place}: no {self.kind} of {self.span} frames; train with a smaller '
                '--frames')
        self.bad, self.spared = self.bad + short, len(short)
        self.names, self.videos = ([of[k] for k in long] for of in (self.names, videos))
        self.captions = self.captions and [self.captions[k] for k in long]
        self.views = min(self.clips, max(map(self.starts, range(len(self))))) * (1 + self.flip)
        if small := sum(min(v.size) < self.resolution for v in self.videos):
            self.notes.append(f'{small} videos smaller than {self.resolution} are enlarged')

    def header(self, name):
        """The VideoFile, or why it is of no use."""
        video = self.found[name]
        if video.fault or not video.size:
            return video.fault or 'its first frames cannot be opened'
        width, height = video.size
        return video if min(video.size) >= MIN_SIDE else f'only {width} x {height} pixels'

    def starts(self, i):
        return len(self.videos[i]) - self.span + 1

    def frame_numbers(self, i, start, frames=None):
        """The frames of the clip; or of another count over the same time, if there are such."""
        F = frames or self.frames
        number, rest = np.divmod((2 * np.arange(F) + 1) * self.span - F, 2 * F)
        require(F == self.frames or not rest.any(), f'{self.names[i]}: {F} frames over '
                f'{self.span} of the video would lie between its frames')
        return (start + number).tolist()

    def read(self, i, numbers, R):
        """uint8 (T,R,R,3): these frames of video i, each kept for the next time."""
        frames = {n: self.cache.kept.get((i, n, R)) for n in numbers}
        missing = [n for n in numbers if frames[n] is None]
        read = self.files.frames(self.videos[i], missing) if missing else ()
        for n, image in zip(missing, read):
            frames[n] = self.cache.get((i, n, R), lambda: resize(square(image), R))
        return np.stack([frames[n] for n in numbers])

    def source(self, i):
        """The middle clip, uint8 (T,r,r,3): a video is sound if this can be read."""
        return self.read(i, self.frame_numbers(i, self.start(i, 0)), self.resolution)

    def decode(self, i):
        """Read all frames, one after another, and keep none."""
        for _ in self.files.frames(self.videos[i], range(len(self.videos[i]))):
            pass

    def squares(self, i):
        """Yields the centre squares of all frames of video i, PIL RGB."""
        yield from map(square, self.files.frames(self.videos[i], range(len(self.videos[i]))))

    def entry(self, i):
        """What a packed file has to know of video i."""
        video = self.videos[i]
        return dict(frames=len(video), first=video.frames[0], rate=video.rate and str(video.rate))

    def clip(self, i, start):
        """One that cannot be read is replaced by the middle one."""
        try:
            frames = self.read(i, self.frame_numbers(i, start), self.resolution)
        except Exception as error:  # a decoder may raise anything on a broken file
            if self.names[i] not in dict(self.bad):
                self.skip(i, reason(error))
            frames = self.source(i)
        return as_video(frames)

    def largest(self, i):
        return min(self.videos[i].size)

    def truth(self, i, R, frames=None, start=None):
        """The clip from a start, or the middle one, at R x R, enlarged if need be: (3,T,R,R).

        With `frames` that many over the same time, if its video has them, see `frame_numbers`. From
        a start raises what reading raises, if the frames cannot be read.
        """
        if start is None:
            i = self.stand_in(i)
            start = self.start(i, 0)
        return as_video(self.read(i, self.frame_numbers(i, start, frames), R))

    def facts(self):
        sizes, rates = [v.size for v in self.videos], [v.rate for v in self.videos if v.rate]
        yield f'frames    {spread(map(len, self.videos))}'
        yield f'sizes     short side {spread(map(min, sizes))}; {len(set(sizes))} different shapes'
        if rates:
            yield f'rates     {spread(round(float(r), 2) for r in rates)} frames a second'


def as_video(frames):
    """uint8 (T,H,W,3) -> float32 (3,T,H,W) in [-1, 1]."""
    return to_float(torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous())


def video_files(name, root, selection, **options):
    """Any folder or zip of frame folders, animated pictures, arrays and films."""
    files = files_of_data(root, VIDEO_SUFFIXES)
    return FileVideos(files, find_videos(files), root, selection, **options)


def skytimelapse(name, root, selection, **options):
    """SkyTimelapse: frame folders at any depth below [sky_]train and [sky_]test or [sky_]val."""
    files = files_of_data(root, VIDEO_SUFFIXES)
    videos = find_videos(files)
    parts = {v.name: {p.removeprefix('sky_') for p in v.name.split('/')} for v in videos}
    test = [n for n, p in parts.items() if p & {'test', 'val'}]
    train = [n for n, p in parts.items() if 'train' in p]
    official = dict(train=train, test=test) if train and test else None
    return FileVideos(files, videos, root, selection, official, **options)


# ---- mesh files ---------------------------------------------------------------------------------

class Lines:
    """The lines of a text, as words: without comments, empty lines, byte order marks, NUL behind.

    joined: a line that ends in a backslash goes on in the next. comment: what begins one. In a
    `with` statement any error becomes a ValueError that names the line.
    """

    def __init__(self, data, joined=False, comment='#'):
        text = data.rstrip(b'\0').decode('utf-8', 'replace').replace('\ufeff', '')
        lines = re.sub(f'{comment}.*', '', re.sub('\r\n?', '\n', text)).split('\n')
        self.number, self.rows = 0, self.split(lines, joined)

    def split(self, lines, joined):
        numbered = enumerate(lines, 1)
        for self.number, line in numbered:
            while joined and line.endswith('\\'):
                line = line[:-1] + ' ' + next(numbered, (0, ''))[1]
            if words := line.split():
                yield words

    def take(self, count=1, words=()):
        """`words` and those of the next lines, as many lines as it takes to have `count` words."""
        words = list(words)
        while len(words) < count:
            line = next(self.rows, None)
            require(line, 'the file is cut short')
            words += line
        return words

    def end(self):
        require(not next(self.rows, None), 'more lines than the header counts')

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception):
            raise ValueError(f'line {self.number}: {error}') from None


def numbers(words, kind=float):
    """Words as numbers; ValueError for what only Python takes for one."""
    require(not any('_' in w for w in words), f'{" ".join(words)}: not numbers')
    return [kind(w) for w in words]


def read_obj(data):
    """Wavefront `v` and `f` lines; numbers count from 1, negative ones from the last vertex."""
    vertices, polygons = [], []
    with Lines(data, joined=True) as lines:
        for key, *words in lines.rows:
            require(key.isascii() and key.isprintable(), f'{key!r}: no keyword; a damaged file')
            if key == 'v':
                x, y, z = numbers(words[:3])
                vertices.append((x, y, z))
            elif key == 'f':
                corners = numbers([w.split('/')[0] for w in words], int)
                require(0 not in corners, 'vertex 0: they count from 1')
                polygons.append([c - 1 if c > 0 else len(vertices) + c for c in corners])
    return vertices, polygons


def read_off(data):
    """OFF; the counts may stand on the header's line, and more behind a vertex or a face."""
    with Lines(data) as lines:
        header = re.match(r'(?:((?:ST|[CN4])*)OFF)?(.*)', ' '.join(lines.take()), re.I)
        counts = iter(numbers(lines.take(2, header[2].split())[:2], int))
        size = 4 if '4' in (header[1] or '') else 3  # the fourth divides the others
        vertices, polygons = np.empty((next(counts), size)), []
        for place in vertices:
            place[:] = numbers(lines.take(size)[:size])
        for _ in range(next(counts)):
            words = lines.take()
            end = 1 + int(words[0])
            polygons.append(numbers(lines.take(end, words)[1:end], int))
        lines.end()
        require(size == 3 or vertices[:, 3].all(), 'vertices divided by 0')
    return vertices[:, :3] / (vertices[:, 3:] if size == 4 else 1), polygons


STL_ROW = np.dtype([('normal', '<f4', 3), ('corners', '<f4', (3, 3)), ('attribute', '<u2')])
STL_FACET = ('facet normal * * * outer loop vertex 0 0 0 vertex 0 0 0 vertex 0 0 0 endloop '
             'endfacet').split()


def text_corners(data):
    """Corners (F,3,3) of a text STL, one or several solids."""
    places, place, inside = [], 0, False
    with Lines(data, comment='$^') as lines:
        for words in lines.rows:
            if words[0].lower() == ('endsolid' if inside else 'solid') and not place:
                inside, words = not inside, ()  # a name may follow
            for word in words:
                wanted = STL_FACET[place]
                require(inside and wanted in ('*', '0', word.lower()), f'{word} is out of place')
                if wanted == '0':
                    places += numbers([word])
                place = (place + 1) % len(STL_FACET)
        require(not inside, 'the file is cut short')
    return np.reshape(places, (-1, 3, 3))


def read_stl(data):
    """STL, binary or text; corners at the same place become one vertex."""
    count = int.from_bytes(data[80:84], 'little')
    size = 84 + count * STL_ROW.itemsize
    if len(data) == size:  # text may begin with any 80 bytes, too
        corners = np.frombuffer(data, STL_ROW, count, 84)['corners']
    else:
        require(b'\0' not in data.rstrip(b'\0'), f'{len(data)} bytes, where a binary STL of '
                f'{count} facets has {size}')
        corners = text_corners(data)
    vertices, index = np.unique(corners.reshape(-1, 3), axis=0, return_inverse=True)
    return vertices, index.reshape(-1, 3).tolist()


PLY_TYPES = dict(char='i1', int8='i1', uchar='u1', uint8='u1', short='i2', int16='i2',
                 ushort='u2', uint16='u2', int='i4', int32='i4', uint='u4', uint32='u4',
                 float='f4', float32='f4', double='f8', float64='f8')


def ply_row(properties, take):
    """{property: numbers} of a row; take(type, count) returns the next numbers or fails."""
    return {name: take(kind, int(*take(*length, 1)) if length else 1)
            for name, (*length, kind) in properties}


def text_table(lines, count, properties):
    """[{property: numbers}] of `count` lines."""
    def take(kind, count):
        found, words[:] = numbers(words[:count]), words[count:]
        require(len(found) == count, 'fewer numbers than the header names')
        return found
    rows = []
    for _ in range(count):
        words = lines.take()
        rows.append(ply_row(properties, take))
        require(not words, 'more numbers than the header names')
    return rows


def binary_table(stream, order, count, properties):
    """`text_table` of a binary stream; order: '<' or '>'. Without lists, an array of records."""
    def read(kind, count):
        data = stream.read(count * kind.itemsize)
        require(len(data) == count * kind.itemsize, 'the file is cut short')
        return np.frombuffer(data, kind)

    def take(kind, count):
        return read(np.dtype(order + kind), count).tolist()
    if all(len(types) == 1 for _, types in properties):
        return read(np.dtype([(name, order + kind, (1,)) for name, (kind,) in properties]), count)
    return [ply_row(properties, take) for _ in range(count)]


def ply_header(data):
    """Format, [(element, count, [(property, types)])] and the length of the header."""
    # Where lines end in \r alone, a \n behind the header belongs to the numbers.
    found = re.match(rb'(?s)ply[ \t]*(?:(\r)(?!\n)|\r?\n)(.*?[\r\n])??'
                     rb'end_header[ \t]*(?(1)\r|\r?\n)', data)
    require(found, 'no PLY header')
    form, elements = '', []
    for line in re.split('[\r\n]+', (found[2] or b'').decode('ascii', 'replace')):
        match line.split():
            case 'format', form, *_:
                pass
            case 'element', name, count:
                elements.append((name, int(count), []))
            case 'property', *types, name:
                elements[-1][2].append((name, [PLY_TYPES[t] for t in types if t != 'list']))
    return form, elements, found.end()


def strip_triangles(corners):
    """Triangles of strips: each has the last two corners of the one before, -1 starts anew."""
    turned = False
    for a, b, c in zip(corners, corners[1:], corners[2:]):
        if -1 in (a, b, c):
            turned = False
        else:
            yield (b, a, c) if turned else (a, b, c)
            turned = not turned


def read_ply(data):
    """PLY, text or binary of either byte order; only positions, faces and strips are kept."""
    data = data.removeprefix(codecs.BOM_UTF8)
    form, elements, start = ply_header(data)
    lists = {element: [name for name, types in properties if len(types) == 2
                       and name in ('vertex_indices', 'vertex_index')]
             for element, count, properties in elements
             if element in ('face', 'tristrips') and count}
    require(all(lists.values()), 'faces without vertex_indices')
    if form == 'ascii':
        with Lines(re.sub(rb'[^\r\n]', b'', data[:start]) + data[start:]) as lines:
            tables = {name: text_table(lines, *rest) for name, *rest in elements}
            lines.end()
    else:
        stream = io.BytesIO(data[start:])
        order = dict(binary_little_endian='<', binary_big_endian='>')[form]
        tables = {name: binary_table(stream, order, *rest) for name, *rest in elements}
        require(not stream.read().strip(), 'more bytes than the header counts')
    vertices = np.array([[row[axis][0] for row in tables['vertex']] for axis in 'xyz']).T
    faces, strips = ([row[lists[name][0]] for row in tables[name]] if name in lists else []
                     for name in ('face', 'tristrips'))
    return vertices, faces + [t for strip in strips for t in strip_triangles(strip)]


def read_array(data):
    """Points of an array (..., 3 or more), .npy or named `points` in an .npz: the first three."""
    loaded = np.load(io.BytesIO(data))
    points = loaded if isinstance(loaded, np.ndarray) else loaded['points']
    *rows, columns = points.shape
    require(rows and 3 <= columns <= max(3, min([POINT_COLUMNS, *(n for n in rows if n > 1)])),
            f'an array of shape {points.shape}, where (..., 3) is needed')
    return points.reshape(-1, columns)[:, :3], []


def read_text(data):
    """Points as text, a line each, that begins with three numbers, between spaces, , or ;."""
    points = []
    with Lines(data) as lines:
        for words in lines.rows:
            line = ' '.join(words)
            separator = next((c for c in ';,' if c in line), None)
            x, y, z = numbers((line.split(separator) + [''] * 3)[:3])
            points.append((x, y, z))
    return points, []


POINT_COLUMNS = 16  # places, normals, colours and the like; more are another axis
MESH_READERS = {'.obj': read_obj, '.off': read_off, '.ply': read_ply, '.stl': read_stl}
CLOUD_READERS = {'.npz': read_array, '.npy': read_array, '.xyz': read_text, '.txt': read_text}


def turn(a, b, c):
    """Twice the signed area (...) of triangles with corners (...,2), positive counterclockwise."""
    return ((b - a)[..., ::-1] * (c - b) * [-1, 1]).sum(-1)


def turns(p):
    """How polygons p (...,n,2) `turn` at each corner, (...,n)."""
    return turn(np.roll(p, 1, -2), p, np.roll(p, -1, -2))


def flattened(p):
    """Polygons p (m,n,3) in their best planes, (m,n,2), seen counterclockwise, about unit size.

    The normal of the plane is the sum of the cross products of successive corners (Newell).
    """
    p = p - p[:, :1]
    p = p / np.maximum(np.abs(p).max((1, 2), keepdims=True), 1e-300)
    normal = np.cross(p, np.roll(p, -1, 1)).sum(1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-300)
    first = np.cross(normal, np.eye(3)[np.abs(normal).argmin(1)])
    axes = np.stack([first, np.cross(normal, first)], axis=2)
    return p @ axes


def clip_ears(p):
    """Triangles, n - 2 triples of indices, of a simple polygon p (n,2), seen counterclockwise.

    An ear is a corner that does not turn right and whose triangle has no other corner inside or on
    the cut; it is cut off until three corners are left (Meisters, 1975).
    """
    left, triangles = list(range(len(p))), []

    def corners(k):
        return left[k - 1], left[k], left[(k + 1) % len(left)]

    def is_ear(k):
        a, b, c = p[[*corners(k)]]
        within = (turn(a, b, p[left]) > 1e-12) & (turn(b, c, p[left]) > 1e-12)
        return turn(a, b, c) >= 0 and not (within & (turn(c, a, p[left]) > -1e-12)).any()
    k = 0
    while (n := len(left)) > 3:
        tried = (j % n for j in range(k - 1, k - 1 + n))  # from where the last ear was
        k = next(filter(is_ear, tried), 0)  # every simple polygon has ears
        triangles.append(corners(k))
        del left[k]
    return [*triangles, left]


def cut_polygons(vertices, polygons):
    """Triangles (F,3) of polygons (lists of indices): convex ones as fans, others by their ears.

    ValueError if an index is not that of a vertex.
    """
    corners = [k for polygon in polygons for k in polygon]
    require(not corners or 0 <= min(corners) and max(corners) < len(vertices),
            'a face names a vertex that is not there')
    sizes, found = np.array([len(p) for p in polygons]), [np.empty((0, 4), 'int64')]
    for n in {*sizes.tolist()} - {0, 1, 2}:
        which = (sizes == n).nonzero()[0]
        p = np.array([polygons[k] for k in which], 'int64')
        fans = np.stack([p[:, [0, k, k + 1]] for k in range(1, n - 1)], axis=1)
        if n > 3:
            flat = flattened(vertices[p])
            for k in (turns(flat) < -1e-9).any(1).nonzero()[0]:
                fans[k] = p[k][clip_ears(flat[k])]
        found.append(np.insert(fans.reshape(-1, 3), 0, which.repeat(n - 2), axis=1))
    found = np.concatenate(found)
    return found[found[:, 0].argsort(kind='stable'), 1:]


def read_geometry(path):
    """(vertices (V,3) float64, triangles (F,3) int64, maybe none) of a file of a mesh or of points.

    All else is passed over. ValueError for a file that cannot be read.
    """
    path, readers = Path(path), MESH_READERS | CLOUD_READERS
    suffix = path.suffix.lower()
    require(suffix in readers, f'{path}: neither a mesh ({" ".join(MESH_READERS)}) nor points '
            f'({" ".join(CLOUD_READERS)})')
    data = common.regular(path).read_bytes()
    try:
        vertices, polygons = readers[suffix](data)
        vertices = np.asarray(vertices, 'float64').reshape(-1, 3)
        return vertices, cut_polygons(vertices, polygons)
    except Exception as error:  # a file of some other kind may fail in any line of a reader
        kind = 'mesh' if suffix in MESH_READERS else 'point cloud'
        raise ValueError(f'{path}: not a readable {kind} ({reason(error)})') from None


def finite_extent(points, path):
    """The points (N,3), if they have a place and a size; otherwise ValueError."""
    if not len(points) or not np.isfinite(points).all() or not np.ptp(points, axis=0).any():
        raise ValueError(f'{path}: no finite extent')
    return points


def read_mesh(path):
    """`read_geometry` without the vertices that no face has; ValueError if there is no surface."""
    vertices, faces = read_geometry(path)
    require(len(faces), f'{path}: no faces')
    used, faces = np.unique(faces, return_inverse=True)
    vertices, faces = finite_extent(vertices[used], path), faces.reshape(-1, 3)
    a, b, c = vertices[faces].transpose(1, 0, 2)
    require(np.cross(b - a, c - a).any(), f'{path}: no face has an area')
    return vertices, faces


def some_points(points, n, rng):
    """n of the points (m,D), float64; none twice unless there are too few."""
    return points[rng.choice(len(points), n, replace=len(points) < n)].astype(float)


def read_cloud(path, n):
    """n points (n,3) on the faces of a file or, if it has none, out of its points; ValueError."""
    if not Path(path).exists():
        raise FileNotFoundError(f'{path}: no such file')
    rng = common.seeded('cloud file', 0)
    points, faces = read_geometry(path)
    if len(faces):
        return surface_points(*read_mesh(path), n, rng)[0]
    points = finite_extent(points[np.isfinite(points).all(1)], path)
    return some_points(points, n, rng)


def farness(points):
    """How many times as far from the origin as across points (N,3) are, at least 1."""
    size = np.ptp(points, axis=0).max() if len(points) else 0
    return max(1.0, np.abs(points).max() / size) if size else 1.0


def obj_bytes(vertices, faces, normals):
    """A mesh as the bytes of an .obj file."""
    file = io.BytesIO()
    digits = 7 + max(0, math.ceil(math.log10(farness(vertices))))
    np.savetxt(file, vertices, f'v %.{digits}g %.{digits}g %.{digits}g')
    if normals is None:
        np.savetxt(file, faces + 1, 'f %d %d %d')
    else:
        np.savetxt(file, normals, 'vn %.5g %.5g %.5g')
        np.savetxt(file, np.repeat(faces + 1, 2, axis=1), 'f %d//%d %d//%d %d//%d')
    return file.getvalue()


def ply_bytes(vertices, faces, normals, colours=None):
    """A mesh as the bytes of a binary .ply file; colours (V,3) in [0, 1]."""
    place = ('double', '<f8') if farness(vertices) > 2 else ('float', '<f4')
    columns = [(axis, *place, vertices[:, k]) for k, axis in enumerate('xyz')]
    if normals is not None:
        columns += [(f'n{axis}', 'float', '<f4', normals[:, k]) for k, axis in enumerate('xyz')]
    if colours is not None:
        columns += [(paint, 'uchar', 'u1', (255 * colours[:, k]).round())
                    for k, paint in enumerate(('red', 'green', 'blue'))]
    points = np.empty(len(vertices), [(axis, stored) for axis, _, stored, _ in columns])
    for axis, *_, values in columns:
        points[axis] = values
    rows = np.empty(len(faces), [('count', 'u1'), ('corners', '<i4', 3)])
    rows['count'], rows['corners'] = 3, faces
    header = ['ply', 'format binary_little_endian 1.0', f'element vertex {len(vertices)}',
              *(f'property {kind} {axis}' for axis, kind, *_ in columns),
              f'element face {len(faces)}', 'property list uchar int vertex_indices',
              'end_header\n']
    return '\n'.join(header).encode() + points.tobytes() + rows.tobytes()


def stl_bytes(vertices, faces, normals):
    """A mesh as the bytes of a binary .stl file, whose normals are those of the faces."""
    require(farness(vertices) < 1e4, 'too far from the origin for the float32 of an STL file; '
            'write .obj or .ply')
    rows = np.zeros(len(faces), STL_ROW)
    a, b, c = rows['corners'].transpose(1, 0, 2)
    rows['corners'] = vertices[faces]
    across = np.cross(b - a, c - a)
    rows['normal'] = across / np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 1e-30)
    return b'\0' * 80 + len(faces).to_bytes(4, 'little') + rows.tobytes()


MESH_WRITERS = {'.obj': obj_bytes, '.ply': ply_bytes, '.stl': stl_bytes}


def write_mesh(path, vertices, faces, normals=None, **more):
    """Write vertices (V,3), triangles (F,3) and maybe normals (V,3; not to .stl) by the suffix.

    To .ply, `colours` (V,3) in [0, 1], too.
    """
    path = Path(path)
    if path.suffix.lower() not in MESH_WRITERS:
        raise ValueError(f'{path}: a mesh is written as one of {" ".join(MESH_WRITERS)}')
    arrays = (None if a is None else np.asarray(a) for a in (vertices, faces, normals))
    data = MESH_WRITERS[path.suffix.lower()](*arrays, **{k: np.asarray(a) for k, a in more.items()})
    common.replace(path, lambda temporary: temporary.write_bytes(data))


# ---- inside or outside a mesh -------------------------------------------------------------------

def cells_of(points, size):
    """Indices (2^d, m) of points (N,3) in cells of at most `size`, and which of them are spare.

    All points are cut in two at the median of their longest side, then each half, and so on d
    times: cell k becomes cells 2k and 2k + 1, a tree. For all cells to hold m indices, some points
    stand in two of the 2^d m places; the second is called spare.
    """
    depth = max(0, math.ceil(math.log2(len(points) / size)))
    full = math.ceil(len(points) / 2 ** depth)
    cells = torch.arange(2 ** depth * full)[None]           # N, N + 1, ...: points 0, 1, ... again
    for _ in range(depth):
        p = points[cells % len(points)]                     # (cells, m, 3)
        longest = (p.amax(1) - p.amin(1)).argmax(1)         # axis of each cell
        along = p[torch.arange(len(p)), :, longest]         # (cells, m)
        cells = cells.gather(1, along.argsort(1)).reshape(2 * len(cells), -1)
    return cells % len(points), cells >= len(points)


def solid_angles(a, b, c):
    """Signed solid angles W of triangles with corners a, b, c (...,3), seen from the origin.

    tan(W / 2) = a . (b x c) / (|a||b||c| + a.b |c| + b.c |a| + c.a |b|), van Oosterom (1983).
    """
    la, lb, lc = (x.norm(dim=-1) for x in (a, b, c))
    volume = (a * torch.linalg.cross(b, c)).sum(-1)
    rest = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
    return 2 * torch.atan2(volume, rest)


def cluster_moments(triangles):
    """Centre, radius, moments N (K,3), S (K,3,3), C (K,3,3,3), T (K,3) of triangles (K,m,3,3).

    N, S, C are the integrals of n_i, n_i x_j, n_i x_j x_l over the area, where n is the unit normal
    and x the position relative to the centre, the area's centroid; T_l = sum_i 2 C_iil + C_lii.
    """
    a, b, c = triangles.unbind(2)                           # (K, m, 3)
    normals = torch.linalg.cross(b - a, c - a) / 2          # as long as the area is large
    areas = normals.norm(dim=2, keepdim=True) + 1e-30       # not 0, even for points
    middles = triangles.mean(2)
    centre = (areas * middles).sum(1) / areas.sum(1)
    middles, corners = middles - centre[:, None], triangles - centre[:, None, None]
    radius = corners.norm(dim=3).flatten(1).amax(1)
    squares = (9 * middles[..., None] * middles[..., None, :] + corners.mT @ corners) / 12
    C = torch.einsum('kmi,kmjl->kijl', normals, squares)    # squares: mean x x^T of a triangle
    T = 2 * torch.einsum('kiil->kl', C) + torch.einsum('klii->kl', C)
    return centre, radius, normals.sum(1), normals.mT @ middles, C, T


def far_angles(r, N, S, C, T):
    """Solid angles (K,m) of clusters with these moments, whose centres are seen at r (K,m,3).

    The first three terms of their Taylor expansion (Barill et al., 2018), with f_i = r_i / |r|^3:
    sum_i N_i f_i + sum_ij S_ij df_i/dr_j + 1/2 sum_ijl C_ijl d2f_i/dr_j dr_l, where df_i/dr_j =
    (delta_ij - 3 r_i r_j / |r|^2) / |r|^3. The last line takes |r|^3 out of all three.
    """
    squared = r.square().sum(2)
    first, linear = (r @ torch.stack([N, T], dim=2)).unbind(2)
    trace = S.diagonal(dim1=1, dim2=2).sum(1)[:, None]
    outer = (r[..., None] * r[..., None, :]).flatten(2)     # (K, m, 9)
    second = trace - 3 * (outer @ S.flatten(1)[..., None]).squeeze(2) / squared
    cubic = (r * (outer @ C.flatten(2).mT)).sum(2)
    third = 7.5 * cubic / squared - 1.5 * linear
    return (first + second + third / squared) / squared ** 1.5


@torch.no_grad()
def winding_number(points, vertices, faces, beta=2.0, leaf=4, block=16, chunk=512):
    """w (N,) of a mesh at points (N,3): 1 inside, 0 outside, between them near holes; error < 0.01.

    w = sum of the solid angles of all triangles / 4 pi (Jacobson et al., 2013). Blocks of points
    go down the tree of triangles: a cluster `beta` radii away or more counts as a whole, others by
    their halves, and leaves triangle by triangle (Barill et al., 2018).
    """
    corners = torch.as_tensor(vertices, dtype=torch.float32)[torch.as_tensor(faces)]
    cells, spare = cells_of(corners.mean(1), leaf)
    leaves = corners[cells]                                 # (2^d, m, corner, 3)
    leaves[spare] = leaves[spare].mean(1, keepdim=True)     # twice there, but one without area
    points = torch.as_tensor(points, dtype=torch.float32)
    order, _ = cells_of(points, block)
    blocks = points[order]                                  # (B, n, 3)
    middle = (blocks.amax(1) + blocks.amin(1)) / 2
    reach = (blocks - middle[:, None]).norm(dim=2).amax(1)
    angles = torch.zeros(order.shape)                       # (B, n)
    pairs = torch.stack([torch.arange(len(blocks)), torch.zeros(len(blocks), dtype=torch.long)])
    for level in range(int(math.log2(len(leaves)))):
        centre, radius, *moments = cluster_moments(leaves.reshape(2 ** level, -1, 3, 3))
        b, k = pairs                                        # a block and a cluster that it sees
        far = (middle[b] - centre[k]).norm(dim=1) - reach[b] > beta * radius[k]
        for b, k in pairs[:, far].split(chunk, dim=1):      # in chunks that stay in the cache
            seen = centre[k, None] - blocks[b]              # (chunk, n, 3)
            angles.index_add_(0, b, far_angles(seen, *(m[k] for m in moments)))
        b, k = pairs[:, ~far]
        pairs = torch.stack([b, 2 * k, b, 2 * k + 1], dim=1).reshape(-1, 2).T
    for b, k in pairs.split(chunk, dim=1):
        seen = leaves[k, None] - blocks[b, :, None, None]   # (chunk, n, m, corner, 3)
        angles.index_add_(0, b, solid_angles(*seen.unbind(3)).sum(2))
    w = torch.empty(len(points))
    w[order] = angles / (4 * math.pi)
    return w


# ---- python data.py mesh: a folder of meshes -> the layout of Occupancy Networks -----------------

SHAPENET = {'02691156': 'airplane', '02828884': 'bench', '02933112': 'cabinet', '02958343': 'car',
            '03001627': 'chair', '03211117': 'display', '03636649': 'lamp', '03691459': 'speaker',
            '04090263': 'rifle', '04256520': 'sofa', '04379243': 'table', '04401088': 'telephone',
            '04530566': 'watercraft'}
HALF_BOX = 0.55  # volume points lie in [-0.55, 0.55]^3 around a mesh in the unit cube
AMBIGUOUS, HOLLOW = 0.05, 0.005  # largest share with 0.1 < |w| < 0.9, smallest share inside


def unit_cube(vertices):
    """(vertices, loc (3,), scale): box centred on 0, longest side 1; old = new * scale + loc."""
    lo, hi = vertices.min(0), vertices.max(0)
    loc, scale = (lo + hi) / 2, (hi - lo).max()
    return (vertices - loc) / scale, loc, scale


def surface_points(vertices, faces, n, rng):
    """n points uniform on the surface and the unit normals of their faces, (n,3) each."""
    a, b, c = vertices[faces].transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    area = np.linalg.norm(normals, axis=1)
    k = rng.choice(len(faces), n, p=area / area.sum())
    u, v = np.sqrt(rng.random((n, 1))), rng.random((n, 1))
    return (1 - u) * a[k] + u * (1 - v) * b[k] + u * v * c[k], normals[k] / area[k, None]


def save_npz(path, compressed=False, **arrays):
    """np.savez to `path`, complete or not at all."""
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    common.replace(path, lambda temporary: temporary.write_bytes(file.getvalue()))


def sample_mesh(path, folder, recipe):
    """Write pointcloud.npz, near.npz (if any) and points.npz of one mesh, see `mesh_recipe`.

    Returns the shares of points inside and of ambiguous ones.
    """
    vertices, faces = read_mesh(path)
    vertices, loc, scale = unit_cube(vertices)
    n, near = recipe['points'], recipe['near']
    rng = common.seeded('mesh', recipe['seed'], folder.name)
    points, normals = surface_points(vertices, faces, n, rng)
    for part in ('points', 'near'):  # what is stopped here is made again
        (folder / f'{part}.npz').unlink(missing_ok=True)
    volume = rng.uniform(-HALF_BOX, HALF_BOX, (n, 3)).astype('float16')
    close = near_points(points[:near], HALF_BOX, rng).astype('float16')
    w = winding_number(np.concatenate([volume, close]).astype('float32'), vertices, faces)
    w, w_near = np.split(w.abs().numpy(), [n])  # a mesh turned inside out is the same solid
    save_npz(folder / 'pointcloud.npz', points=points.astype('float16'),
             normals=normals.astype('float16'), loc=loc, scale=scale)
    if near:
        save_npz(folder / 'near.npz', points=close, occupancies=np.packbits(w_near > 0.5))
    inside, ambiguous = w > 0.5, np.mean((w > 0.1) & (w < 0.9))
    save_npz(folder / 'points.npz', points=volume, occupancies=np.packbits(inside), loc=loc,
             scale=scale, ambiguous=ambiguous, recipe=json.dumps(recipe))  # last: all are there
    return inside.mean(), float(ambiguous)


def mesh_recipe(path, args):
    """What the points of a mesh depend on: its bytes, and how many are drawn with which seed."""
    return dict(mesh=hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest(),
                points=args.points, near=round(args.near * args.points), seed=args.seed)


def solid_shares(folder, recipe):
    """Shares of points inside and of ambiguous ones, if what `recipe` makes is there, or None."""
    try:
        for part in ['pointcloud'] + ['near'] * bool(recipe['near']):
            np.load(folder / f'{part}.npz')['points']
        with np.load(folder / 'points.npz') as stored:
            if str(stored['recipe']) == json.dumps(recipe):
                inside = np.unpackbits(stored['occupancies'])[:len(stored['points'])]
                return inside.mean(), float(stored['ambiguous'])
    except Exception:  # nothing there, or what a broken file makes a reader raise
        return None


def read_classes(path):
    """{id: class} from the columns id and category (or class) of a CSV; {} without a path."""
    rows = read_table(path, '--classes') if path else []
    column = 'category' if rows and 'category' in rows[0] else 'class'
    require(not path or rows and {'id', column} <= {*rows[0]},
            f'--classes {path}: not a CSV with the columns id and category, and rows')
    return {row['id']: re.sub(r'[^\w-]+', '_', row[column]) for row in rows if row[column]}


def find_meshes(root, classes):
    """{(class, id): path} of the meshes below a folder, and in words what else is there.

    The class is that of `classes`, or that folder. The id is what lies below the class, less the
    parts that all paths of its depth share: the ID of SYNSET/ID/models/model_normalized.obj.
    """
    root = Path(root)
    require(root.is_dir(), f'{root}: not a folder')
    files = Folder(root, suffixes=tuple(MESH_READERS))
    there = [n for n in files.names if (root / n).is_file()]
    names = sorted(first_names(there, root.joinpath).values(), key=natural)
    files.passed += {'links that lead nowhere, or pipes': len(files.names) - len(there),
                     'other names (links) of those there': len(there) - len(names)}
    files.refuse_lost()
    require(names, f'{root}: no meshes ({" ".join(MESH_READERS)}) in it')
    found = {}
    for name, key in zip(names, telling_parts([n.split('/') for n in names])):
        parts = name.split('/')
        group = parts[0] if len(parts) > 1 else root.resolve().name
        told = (name, key, Path(name).name, Path(name).stem)
        key = next((classes[k] for k in told if k in classes), group), key
        if key in found:
            raise ValueError(f'{root / name} and {found[key]} would get the same name; rename one '
                             'of them')
        found[key] = root / name
    return found, files.others()


def telling_parts(paths):
    """Ids of paths, lists of parts: those behind the first in which they differ, joined by '__'.

    Paths of one depth are compared: a stray one, which keeps all its parts, renames no others.
    """
    paths = [[*parts[1:-1], os.path.splitext(parts[-1])[0]] for parts in paths]
    telling = {}
    for depth in {*map(len, paths)}:
        alike = [parts for parts in paths if len(parts) == depth]
        stray = len(alike) == 1 < len(paths)
        telling[depth] = [k for k, column in enumerate(zip(*alike))
                          if stray or len({*column}) > 1] or [0]
    ids = ['__'.join(parts[k] for k in telling[len(parts)]) for parts in paths]
    return [re.sub(r'[\r\n\ud800-\udfff]', '_', i) for i in ids]  # they become lines of lists


def doubt(inside, ambiguous):
    """Why a mesh with these shares of its points is a doubtful solid, or ''."""
    if ambiguous > AMBIGUOUS:
        return f'{ambiguous:.1%} of the points neither in nor out: holes, or faces turned both ways'
    return f'{inside:.2%} of the box inside: hardly a solid' if inside < HOLLOW else ''


def mesh_sides(keys, args):
    """{'train', 'val', 'test': names} of meshes; ValueError unless --split is a fraction."""
    try:
        float(args.split)
    except ValueError:
        raise ValueError(f'--split {args.split}: must be a fraction') from None
    first = divide(['/'.join(k) for k in keys], args.split, args.group, args.seed)
    second = divide(first['train'], args.split, args.group, args.seed + 1)
    return dict(train=second['train'], val=second['test'], test=first['test'])


def write_lists(out, keys, args):
    """Write {train,val,test}.lst of each class and metadata.yaml, as JSON; 'how many side, ...'.

    Classes that an earlier call made of the same folder, and that are not there any more, lose
    their lists.
    """
    sides = mesh_sides(keys, args)
    groups = sorted({group for group, _ in keys})
    for group in groups:
        for side, members in sides.items():
            ids = [n.removeprefix(f'{group}/') for n in members if n.startswith(f'{group}/')]
            text = ''.join(f'{i}\n' for i in ids)
            common.write_text(out / group / f'{side}.lst', text)
    about, source = out / 'metadata.yaml', str(Path(args.folder).resolve())
    before = common.parse_json(common.salvaged(about))
    for group, entry in before.items():
        place = entry.get('folder') if isinstance(entry, dict) else None
        if group not in groups and place == source:
            for side in sides:
                (out / group / f'{side}.lst').unlink(missing_ok=True)
        elif group in groups and place not in (None, source):
            print(common.printable(f'note: {out / group} was made of {place} before, whose meshes '
                                   'are in no list any more'))
    made = {g: dict(id=g, name=SHAPENET.get(g, g), folder=source) for g in groups}
    kept = {g: entry for g, entry in before.items() if [*(out / g).glob('*.lst')]}
    common.write_text(about, json.dumps(kept | made, indent=1))
    return ', '.join(f'{len(members)} {side}' for side, members in sides.items())


def mesh(args):
    """What `python data.py mesh` does; a second call goes on where the first one was stopped."""
    require(args.near <= 1, f'--near {args.near}: a share, from 0 to 1')
    (found, others), out = find_meshes(args.folder, read_classes(args.classes)), Path(args.out)
    common.try_writing('--out', out)
    mesh_sides(list(found), args)  # what is wrong with --split or --group is said first

    def convert(key):
        """Shares of points inside and of ambiguous ones, or why the mesh cannot be read."""
        path, folder = found[key], out.joinpath(*key)
        try:
            recipe = mesh_recipe(path, args)
        except OSError as error:  # those of writing, below, are no fault of the mesh
            return str(error)
        try:
            return solid_shares(folder, recipe) or sample_mesh(path, folder, recipe)
        except ValueError as error:
            return str(error)
    common.keep_freed_memory()
    workers = torch.get_num_threads()
    torch.set_num_threads(1)  # the products are small: a mesh a core beats all cores on each mesh
    results = dict(zip(found, threaded(convert, list(found), 'sampling meshes', workers)))
    torch.set_num_threads(workers)
    bad = {k: r for k, r in results.items() if isinstance(r, str)}
    doubts = {k: doubt(*r) for k, r in results.items() if k not in bad and doubt(*r)}
    for key, why in (bad | doubts).items():
        print(common.printable(f'{"/".join(key)}: {why}'))
    keys = [k for k in results if k not in bad and (args.keep or k not in doubts)]
    if not keys or len(bad) >= 3 and len(bad) > len(results) / 100:
        raise ValueError(f'{args.folder}: {len(bad)} of {len(results)} meshes cannot be read, '
                         f'{len(doubts)} are doubtful: mend or remove them, or try --keep')
    sides = write_lists(out, keys, args)
    print('; '.join(filter(None, (
        f'{out}: {sides}', f'{len(bad)} unreadable, {len(doubts)} doubtful, '
        + ('kept' if args.keep else 'left out of the lists'), common.printable(others)))))


# ---- data sets of shapes -------------------------------------------------------------------------

@dataclass
class ShapeConfig:
    """What stage 1 sees of a shape at a time."""
    points: int = flag(3000, 'points of the surface that the encoder sees')
    queries: int = flag(2048, 'points of the box whose occupancy is asked for')
    near: float = flag(0.0, 'share of the queries drawn close to the surface (the others: uniform)')
    noise: float = flag(0.005, "deviation of the surface points, in the data's units")
    clouds: int = flag(4, 'point clouds of each shape that stage 2 keeps latents of')


class Shapes(Items):
    """What all shape sets share: what is drawn of a shape, and flips along x.

    Coordinates are in the data's units, within [-extent, extent]^3, until an item leaves, divided
    by `extent`. A data set has `draw_surface(i, n, rng)` -> points and `draw(i, part, n, rng)` ->
    points and their occupancy, where `part` is 'points', of the whole box, or 'near' the surface.
    """

    domain, kind, config = 'shape', 'shapes', ShapeConfig
    encoder_only = dict(queries=1, near=0.0)

    def __init__(self, points=3000, queries=2048, near=0.0, noise=0.005, clouds=4, **options):
        super().__init__(**options)
        require(0 <= near <= 1, f'--near {near}: a share, from 0 to 1')
        self.points, self.queries, self.noise, self.views = points, queries, noise, clouds
        self.near = round(near * queries)

    @staticmethod
    def lies_at(path):
        return any(Path(path).glob('**/pointcloud.npz'))

    def voxels(self, i):
        """Item i as a grid of bools, axes x, y, z, if one is stored, or None."""

    def cloud(self, i, rng):
        """Input of the encoder, (points,3) in [-1,1], and the sign that x was multiplied by."""
        p = self.draw_surface(i, self.points, rng)
        p = p + self.noise * rng.standard_normal(p.shape)
        sign = [1 - 2 * int(self.flip and rng.random() < 0.5), 1, 1]
        return torch.from_numpy((p * sign / self.extent).astype('float32')), sign

    def item(self, i, rng=None):
        """points (N,3), coords (M,3), target (M,), which is their occupancy, and `known`.

        Without an rng the draws depend on the shape's name alone.
        """
        i = self.stand_in(i)
        rng = rng or common.seeded('shape', self.names[i])
        cloud, sign = self.cloud(i, rng)
        c, occupancy = self.draw(i, 'points', self.queries - self.near, rng)
        if self.near:
            close, inside = self.draw(i, 'near', self.near, rng)
            c, occupancy = np.concatenate([c, close]), np.concatenate([occupancy, inside])
        coords = torch.from_numpy((c * sign / self.extent).astype('float32'))
        return dict(points=cloud, coords=coords, **self.known(i, rng),
                    target=torch.from_numpy(occupancy.astype('float32')))

    def view(self, i, k):
        i = self.stand_in(i)
        return dict(points=self.cloud(i, common.seeded('cloud', self.names[i], k))[0])

    def picture(self, i, size):
        """The point cloud that the encoder sees."""
        return render_points(self.view(i, 0)['points'], size).expand(3, -1, -1) * 2 - 1


def near_points(surface, extent, rng):
    """Points (N,3) a normal step away from a surface: deviation 1/50 or 1/10 of `extent`."""
    step = rng.choice([extent / 50, extent / 10], (len(surface), 1))
    return (surface + step * rng.standard_normal(surface.shape)).clip(-extent, extent)


class ToyShapes(Computed, Shapes):
    """toy_shape, with the family as label; occupancy goes from 1 to 0 over 1/128 of the box."""

    seeds = TOY_SOLIDS

    def __init__(self, name, root, selection, **options):
        super().__init__(name, root, selection, **options)
        self.solids = [toy_shape(s) for s in self.numbers]
        self.groups = self.titles = list(TOY_FAMILIES)
        self.labels = [self.groups.index(solid.family) for solid in self.solids]
        self.captions = [[solid.caption] for solid in self.solids]

    def draw_surface(self, i, n, rng):
        return toy_surface(self.solids[i], n, rng)

    def draw(self, i, part, n, rng):
        points = (near_points(self.draw_surface(i, n, rng), self.extent, rng) if part == 'near' else
                  rng.uniform(-1, 1, (n, 3)))
        return points, cover(toy_distance(self.solids[i], points))

    def truth(self, i, n=100_000):
        """n points of the box in [-1,1] and whether they are inside, the same in every call."""
        points, occupancy = self.draw(i, 'points', n, common.seeded('volume', self.names[i]))
        return torch.from_numpy(points.astype('float32')), torch.from_numpy(occupancy > 0.5)


def find_shapes(root, classes=None):
    """{'class/id': folder} of the shapes below a ShapeNet folder, or in the folder of one class."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f'{root}: no such folder; put the shapes there, make them of '
                                'meshes with python data.py mesh, or name the place with --data')
    if any((root / f'{side}.lst').exists() for side in ('train', 'test')):
        root, classes = root.resolve().parent, [root.resolve().name]
    groups = [g for g in sorted(root.iterdir())
              if g.is_dir() and (not classes or g.name in classes)]
    found = {f'{g.name}/{p.name}': p for g in groups for p in sorted(g.iterdir())
             if p.is_dir()}
    require(found, f'{root}: no folders {"/".join(classes or ["CLASS"])}/ID in it, each with '
            'points.npz and pointcloud.npz; python data.py mesh makes them of meshes')
    return root, found


def finite_points(points):
    """The points, if they are (N,3), N > 0, and finite; otherwise ValueError."""
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise ValueError(f'points of shape {points.shape}, where (N, 3) is needed')
    require(np.isfinite(points).all(), 'points that are not finite')
    return points


def packed_occupancies(occupancies, n):
    """np.packbits of the occupancies of n points, which may be stored packed or one by one.

    One by one they are bool or numbers from 0 to 1, inside above 1/2. ValueError for another count
    or other values.
    """
    values = np.ravel(occupancies)
    if len(values) == n:
        require(values.dtype == bool or ((values >= 0) & (values <= 1)).all(),
                'occupancies outside of [0, 1]')
        return np.packbits(values > 0.5)
    require(values.dtype == np.uint8 and len(values) == math.ceil(n / 8),
            f'{len(values)} occupancies, {values.dtype}, for {n} points')
    return values


def read_binvox(path):
    """A grid of bools, axes x, y, z, from a binvox file; ValueError if it is none.

    A header in text, then pairs of bytes: a value, and in how many cells in a row; y changes
    fastest, then z.
    """
    header, _, runs = common.regular(path).read_bytes().partition(b'\ndata\n')
    try:
        x, z, y = map(int, re.search(rb'\ndim +(\d+) +(\d+) +(\d+)', header).groups())
        values, counts = np.frombuffer(runs, 'uint8').reshape(-1, 2).T
        return np.repeat(values > 0, counts).reshape(x, z, y).swapaxes(1, 2).copy()
    except (AttributeError, ValueError):
        raise ValueError(f'{path}: damaged, or not a binvox file') from None


class FileShapes(FileItems, Shapes):
    """Shapes in the layout of Occupancy Networks (ShapeNet as they publish it).

    ROOT/CLASS/ID/points.npz (points, packed occupancies), pointcloud.npz, and {train,val,test}.lst
    in each class; those of val.lst belong to neither side. The label is the class's number.
    """

    extent = HALF_BOX

    def __init__(self, name, root, selection, classes=None, **options):
        super().__init__(**options)
        place, self.folders = find_shapes(root, classes)
        lists = {'train': [], 'val': [], 'test': []}
        for side, group in product(lists, sorted({n.split('/')[0] for n in self.folders})):
            file = place / group / f'{side}.lst'
            lines = common.read_text(file).split('\n') if file.exists() else []
            lists[side] += [f'{group}/{n if f"{group}/{n}" in self.folders else n.strip()}'
                            for n in lines if n.strip()]
        given = lists['train'] and lists['test']
        listed = {*sum(lists.values(), [])} or self.folders
        official = {side: lists[side] for side in ('train', 'test')} if given else None
        told = selection.holdout if isinstance(selection.holdout, dict) else {}
        if 'train' in told:  # of a run, which has its labels whatever has come since
            listed = {*sum(told.values(), [])}
        self.groups = sorted({n.split('/')[0] for n in listed})
        try:  # metadata.yaml if it is JSON, as ours
            known = json.loads(common.read_text(place / 'metadata.yaml'))
            self.titles = [known[g]['name'].split(',')[0] for g in self.groups]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.titles = self.groups
        self.select([n for n in self.folders if n in listed], root, selection, official)
        self.labels = [self.groups.index(n.split('/')[0]) for n in self.names]

    def path_of(self, name):
        return self.folders.get(name, name)

    def header(self, name):
        """None, or why the shape is of no use."""
        missing = [f for f in ('points.npz', 'pointcloud.npz', *['near.npz'] * bool(self.near))
                   if name not in self.folders or not (self.folders[name] / f).is_file()]
        hint = '; use --near 0' if missing == ['near.npz'] else ''
        return f'no {missing[0]}{hint}' if missing else None

    def decode(self, i):
        """What is stored: 'surface', 'points' and maybe 'near', with packed occupancies 'bits'."""
        folder, stored = self.folders[self.names[i]], {}
        for part in ('points', *['near'] * bool(self.near)):
            with np.load(folder / f'{part}.npz') as file:
                points = self.in_box(finite_points(file['points']))
                stored |= {part: points,
                           f'{part} bits': packed_occupancies(file['occupancies'], len(points))}
        with np.load(folder / 'pointcloud.npz') as file:
            return dict(stored, surface=self.in_box(finite_points(file['points'])))

    def in_box(self, points):
        """The points; ValueError if they leave the box by more than a fifth, as clouds may do."""
        reach = abs(points).max()
        require(reach <= 1.2 * self.extent, f'points reach {reach:.3g}, where the box is '
                f'+-{self.extent:g}: scale them')
        return points

    def bytes_kept(self, arrays):
        return sum(a.nbytes for a in arrays.values())

    def voxels(self, i):
        try:
            return read_binvox(self.folders[self.names[i]] / 'model.binvox')
        except (OSError, ValueError):  # the stored points say the same
            return None

    def draw(self, i, part, n, rng):
        """n of the stored points, with replacement, and their occupancies."""
        stored, bits = (self.source(i)[key] for key in (part, f'{part} bits'))
        k = rng.integers(len(stored), size=n)
        p = stored[k].astype('float64')
        if stored.dtype == np.float16:  # off the lattice of half precision
            p = p + 1e-4 * rng.standard_normal(p.shape)
        # Bit k of np.packbits: in byte k // 8, counted from its high end. Unpacking all would cost
        # more than the few that are asked for.
        return p, bits[k // 8] >> (7 - k % 8) & 1

    def draw_surface(self, i, n, rng):
        surface = self.source(self.stand_in(i))['surface']
        return surface[rng.integers(len(surface), size=n)].astype('float64')

    def truth(self, i, n=100_000):
        """The first n stored points in [-1,1] and whether they are inside."""
        stored = self.source(self.stand_in(i))
        inside = np.unpackbits(stored['points bits'])[:len(stored['points'])][:n]
        points = stored['points'][:n].astype('float32') / self.extent
        return torch.from_numpy(points), torch.from_numpy(inside.astype(bool))

    def facts(self):
        good = self.readable(range(len(self)))
        share = sorted(self.truth(i)[1].float().mean().item() for i in good)
        counts = (f'{self.labels.count(k)} {title}' for k, title in enumerate(self.titles))
        yield f'classes   {", ".join(counts)}'
        yield (f'inside    {share[0]:.2%} of the box min, {share[len(share) // 2]:.2%} median, '
               f'{share[-1]:.2%} max')


def text2shape(name, root, selection, **options):
    """The chairs and tables of ShapeNet with captions.tablechair.csv, by default in ROOT."""
    own = Path(root) / 'captions.tablechair.csv'
    captions = selection.captions or (str(own) if own.exists() else '')
    found = FileShapes(name, root, replace(selection, captions=captions),
                       ['03001627', '04379243'], **options)
    found.notes += [f'{own}: not there, so without captions'] * (not captions)
    return found


# ---- files of posed pictures --------------------------------------------------------------------

WHITE = 250  # channels above are background where neither opacity nor a mask says what is


def with_opacity(im, mask, where):
    """A picture as RGBA whose opacity is that of the object; `mask`: a PIL picture of it, or None.

    Without either, all that is not white is object; ValueError if most of the border is not.
    """
    if mask is not None:
        im, values = im.convert('RGB'), np.asarray(mask.convert('L'))
        coloured = mask.mode == 'P' and np.ptp(np.reshape(mask.getpalette(), (-1, 3)), 1).any()
        if coloured or values.max() == 1:  # numbers of objects, of which 0 is none
            values = np.where(np.asarray(mask), 255, 0).astype('uint8')
        shape = values.shape[1] * im.height / (values.shape[0] * im.width)
        require(0.98 < shape < 1.02, f'{where}: of another shape than its mask')
        im.putalpha(Image.fromarray(values).resize(im.size))
        return im
    if has_opacity(im) and (rgba := im.convert('RGBA')).getextrema()[3][0] < 255:
        return rgba
    rgb = im.convert('RGB')
    white = (np.asarray(rgb) > WHITE).all(2)
    border = np.concatenate([white[0], white[-1], white[:, 0], white[:, -1]])
    require(border.mean() > 0.5, f'{where}: no transparency, no mask and no white background, so '
            'no silhouette can be had; give RGBA pictures, mask_path or masks/NAME.png')
    rgb.putalpha(Image.fromarray(np.where(white, 0, 255).astype('uint8')))
    return rgb


def as_pose(values, axes, where):
    """Camera to world (4,4) in OpenCV axes, of a matrix in `axes`; ValueError if it is none."""
    try:
        pose = np.eye(4)
        pose[:3] = np.asarray(values, float).reshape(-1, 4)[:3]
    except (ValueError, TypeError):
        raise ValueError(f'{where}: not a matrix of 4 x 4 numbers; export it again') from None
    require(np.isfinite(pose).all(), f'{where}: not finite; leave this view out')
    turn = pose[:3, :3]
    scale = np.linalg.norm(turn, axis=0).mean()
    unit = turn / max(scale, 1e-12)
    require(np.abs(unit.T @ unit - np.eye(3)).max() < 0.02 and np.linalg.det(unit) > 0,
            f'{where}: not a rotation and a place; export it again')
    pose[:3, :3] = unit * (1, -1, -1) if axes == 'opengl' else unit
    return pose


class SceneFiles:
    """One scene on disk, told by a file that matches `pattern`; a layout is a subclass.

    `axes` are those of its poses; cameras(axes) returns the `Cameras` or raises ValueError naming
    what is not as it should be, and sets `files` and their `masks`, paths or None, that pictures
    come from; cloud(), or None, is its own coloured points.
    """
    pattern = axes = cloud = None

    def __init__(self, path):
        self.file, self.folder = path, path.parent
        self.place = path if isinstance(self, ArrayScene) else path.parent

    @staticmethod
    def applies(path):
        return True

    def pictures(self, numbers):
        """Yield these pictures as PIL RGBA, see `with_opacity`."""
        for k in numbers:
            mask = self.masks[k] and open_picture(self.masks[k], Image.Image.copy)
            yield open_picture(self.files[k], lambda im: with_opacity(im, mask, self.files[k].name))


class SrnScene(SceneFiles):
    """SCENE/{rgb/NAME.png,pose/NAME.txt,intrinsics.txt}, as scene representation networks have it.

    intrinsics.txt: `focal cx cy 0.` in the first line, `height width` in the last.
    """

    pattern, axes = 'intrinsics.txt', 'opencv'

    @staticmethod
    def applies(path):
        return (path.parent / 'pose').is_dir()

    @staticmethod
    def numbers(path):
        try:
            lines = common.read_text(path).split('\n')
            return [[float(w) for w in line.split()] for line in lines if line.strip()]
        except (OSError, ValueError):
            raise ValueError(f'{path.parent.name}/{path.name}: missing, or not numbers; unpack '
                             'the data again') from None

    def cameras(self, axes):
        names = picture_names(p.name for p in self.folder.glob('rgb/*'))
        require(names, 'rgb: no pictures in it')
        self.files, self.masks = [self.folder / 'rgb' / n for n in names], [None] * len(names)
        rows = self.numbers(self.file)
        require(len(rows) > 1 and len(rows[0]) > 2 and len(rows[-1]) == 2 and rows[0][0] > 0
                and min(rows[-1]) > 0, 'intrinsics.txt: not `focal cx cy 0.` and `height width`')
        focal, cx, cy = rows[0][:3]
        size = open_picture(self.files[0], attrgetter('size'))
        lens = fitted_lens(np.array([focal, focal, cx, cy, 0, 0, 0, 0]), rows[-1][::-1], size)
        texts = [self.folder / 'pose' / f'{f.stem}.txt' for f in self.files]
        poses = [as_pose(sum(self.numbers(t), []), axes, f'pose/{t.name}') for t in texts]
        return Cameras(np.stack(poses), lens, size)


class ArrayScene(SceneFiles):
    """A .npz of points2nerf: images (n,H,W,3 or 4), cam_poses (n,4,4), data (m,6) = xyz, rgb."""

    pattern, axes, angle = '*.npz', 'opengl', 0.6911112070083618

    @staticmethod
    def applies(path):
        try:
            with zipfile.ZipFile(common.regular(path)) as file:
                return {'images.npy', 'cam_poses.npy', 'data.npy'} <= {*file.namelist()}
        except (OSError, zipfile.BadZipFile):
            return False

    def cameras(self, axes):
        with zipfile.ZipFile(self.file) as file, file.open('images.npy') as stream:
            np.lib.format.read_magic(stream)
            count, height, width = np.lib.format.read_array_header_1_0(stream)[0][:3]
        matrices = self.array('cam_poses')
        require(len(matrices) == count, f'{len(matrices)} cam_poses for {count} images')
        poses = [as_pose(m, axes, f'cam_poses[{k}]') for k, m in enumerate(matrices)]
        focal = width / 2 / np.tan(self.angle / 2)
        lens = np.array([focal, focal, width / 2, height / 2, 0, 0, 0, 0])
        return Cameras(np.stack(poses), lens, (width, height))

    def array(self, name):
        with np.load(self.file) as file:
            return file[name]

    def pictures(self, numbers):
        images = self.array('images')
        most = images.max()
        white = 1 if images.dtype.kind == 'f' and most < 128 else 255
        require(white == 1 or most < 256, f'images: values up to {most:g}, where 255 is white')
        for k in numbers:
            im = (images[k] * (255 / white)).round().clip(0, 255)
            yield with_opacity(Image.fromarray(im.astype('uint8')), None, f'images[{k}]')

    def cloud(self):
        """(m,6): places in the units of the poses, and colours in [-1, 1]."""
        points = self.array('data').astype(float)
        require(points.ndim == 2 and points.shape[1] == 6 and np.isfinite(points).all(),
                f'data: {points.shape} where finite (points, 6) are needed')
        colour = points[:, 3:] / (255 if points[:, 3:].max() > 1 else 1)
        return np.hstack([points[:, :3], 2 * colour - 1])


class JsonScene(SceneFiles):
    """SCENE/transforms.json, as instant-ngp and nerfstudio write it."""

    pattern, axes = 'transforms.json', 'opengl'
    FOCAL = ('fl_x', 'camera_angle_x', 'fl_y', 'camera_angle_y')
    REFUSED = ('k3', 'k4', 'k5', 'k6', 'is_fisheye')

    def read(self, file):
        """The dict in a JSON file, with a list `frames` of dicts; ValueError otherwise."""
        try:
            about = json.loads(common.read_text(file))
        except (OSError, ValueError) as error:
            raise ValueError(f'{file.name}: not JSON ({reason(error)}); export it again') from None
        frames = about.get('frames') if isinstance(about, dict) else None
        require(isinstance(frames, list) and frames and all(isinstance(f, dict) for f in frames),
                f'{file.name}: no list `frames`; export it again')
        return about

    def about(self):
        """What is known of all frames, and the list of them, `frames`."""
        return self.read(self.file)

    def cameras(self, axes):
        about, views, once = self.about(), [], {}
        frames = about['frames']
        for k, frame in enumerate(frames):  # a picture that is listed again adds nothing
            file = self.find(frame.get('file_path'), k)
            once.setdefault(identity(file), (k, frame, file))
        self.files = [file for _, _, file in once.values()]
        self.masks = [self.find_mask(frame, file) for _, frame, file in once.values()]
        for k, frame, file in once.values():
            size = open_picture(file, attrgetter('size'))
            first = next((k // 2 * 2 for k, key in enumerate(self.FOCAL) if key in frame), 4)
            shared = {key: v for key, v in about.items() if key not in self.FOCAL[first:]}
            views.append((as_pose(frame.get('transform_matrix'), axes,
                                  f'{self.pattern}: transform_matrix of frame {k}'),
                          self.lens(shared | frame, size), size))
        return Cameras(*map(np.array, zip(*views)))

    def find(self, name, k):
        """The file that frame k calls `name`, with or without a suffix."""
        require(isinstance(name, str) and name, f'{self.pattern}: frame {k} has no file_path')
        path = self.folder / name.replace('\\', '/')
        known = (path.with_name(path.name + suffix) for suffix in ('', *SUFFIXES))
        found = next((p for p in known if p.is_file()), None)
        require(found, f'{self.pattern}: no picture {name} (frame {k}); put it there, or leave the '
                'frame out')
        return found

    def find_mask(self, frame, file):
        if frame.get('mask_path'):
            return self.find(frame['mask_path'], 'mask_path')
        return next((p for folder in ('masks', 'mask') for p in (
            self.folder / folder / f'{file.stem}.png', self.folder / folder / f'{file.name}.png')
            if p.is_file()), None)

    def lens(self, about, size):
        """The lens (8,) for a picture of this size, see pixel_rays."""
        def number(key, default=None):
            value = about.get(key, default)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f'{self.pattern}: {key} is {value}, not a number; give '
                                 'camera_angle_x, or fl_x in pixels')
            return value
        refused = [key for key in self.REFUSED if about.get(key)]
        model = str(about.get('camera_model', ''))
        require(not refused and 'FISHEYE' not in model and 'EQUI' not in model,
                f'{self.pattern}: lens {model} {" ".join(refused)} is more than k1, k2, p1, p2; '
                'undistort the pictures first')
        width, height = number('w', size[0]), number('h', size[1])

        def focal(side, key, angle, default=None):
            if key in about or angle not in about:
                return number(key, default)
            return side / 2 / math.tan(number(angle) / 2)
        fx = focal(width, 'fl_x', 'camera_angle_x')
        fy = focal(height, 'fl_y', 'camera_angle_y', fx)
        require(min(fx, fy, width, height) > 0, f'{self.pattern}: fl_x, fl_y, w, h: above 0')
        lens = np.array([fx, fy, number('cx', width / 2), number('cy', height / 2),
                         *(number(key, 0) for key in ('k1', 'k2', 'p1', 'p2'))], float)
        self.check_bend(lens, (width, height))
        return fitted_lens(lens, (width, height), size)

    def check_bend(self, lens, size):
        """ValueError unless `straight` finds the corners' directions."""
        corner = (np.array([[0, 0, 1, 1], [0, 1, 0, 1]]).T * size - lens[2:4]) / lens[:2]
        with np.errstate(over='ignore', invalid='ignore'):
            again = bent(*straight(*corner.T, lens[4:]), lens[4:])
        require(np.allclose(again, corner.T, atol=1e-4), f'{self.pattern}: the lens k1, k2, p1, p2 '
                'folds the picture over and cannot be undone; undistort the pictures first')


class BlenderScene(JsonScene):
    """SCENE/transforms_{train,val,test}.json, as the scenes that NeRF was shown on have them.

    Their views in this order are one list, of which --test_views are the last.
    """

    pattern, SIDES = 'transforms_train.json', ('train', 'val', 'test')

    @staticmethod
    def applies(path):
        return not (path.parent / JsonScene.pattern).is_file()

    def about(self):
        self.pattern = 'transforms_*.json'  # as errors call it
        files = (self.folder / f'transforms_{side}.json' for side in self.SIDES)
        parts = [self.read(file) for file in files if file.is_file()]
        return dict(frames=[part | frame for part in parts for frame in part['frames']])


LAYOUTS = JsonScene, BlenderScene, SrnScene, ArrayScene


def scenes_at(root, glance=False):
    """Yield name and scene of what lies at, in or two folders below a folder, or is one .npz.

    With a glance only the first file of each kind tells whether it is a scene.
    """
    if root.is_file() and ArrayScene.applies(root):
        yield root.stem, ArrayScene(root)
    for layout, depth in product(LAYOUTS, range(3)):
        for path in sorted(root.glob('*/' * depth + layout.pattern)):
            if path.is_file() and layout.applies(path):
                place = path.relative_to(root).with_suffix('')
                yield (place if layout is ArrayScene else place.parent).as_posix(), layout(path)
            elif glance:
                break


def find_scenes(root):
    """{name: scene} at a folder, and its official split or None; FileNotFoundError, ValueError."""
    if not root.exists():
        raise FileNotFoundError(f'{root}: no such folder; put the scenes there or name the place '
                                'with --data PATH')
    for folder in (root, *root.glob('*/'), *root.glob('*/*/')):
        hidden = is_hidden(f'{folder.relative_to(root).as_posix()}/') and folder != root
        require(hidden or not folder.is_dir() or os.access(folder, os.R_OK | os.X_OK),
                f'{folder}: cannot be listed; make it readable, or move it elsewhere')
    found = {root.resolve().name if name == '.' else name: s for name, s in scenes_at(root)}
    require(found, f'{root}: no scenes; each is a folder with transforms.json, or '
            'transforms_train.json and its likes, or with rgb, pose and intrinsics.txt, or an .npz '
            'of images, cam_poses and data')
    names = sorted(found, key=natural)
    sides = {side: [n for n in names if n.split('/')[0].endswith(f'_{side}')]
             for side in ('train', 'test')}
    if all(isinstance(s, ArrayScene) for s in found.values()) and len(found) > 1:
        order = sorted(names, key=lambda n: n.split('/')[-1].split('_')[-1])
        sides = dict(train=order[:len(order) * 4 // 5], test=order[len(order) * 4 // 5:])
    return found, sides if all(sides.values()) else None


# ---- points from silhouettes: a visual hull -----------------------------------------------------

HULL_CELLS = 32, 4  # cells a side of the box, and how many a side each of those left is cut into
HULL_SHARE = 0.98  # of the silhouettes, in which a cell must lie
HULL_POINTS = 8192  # that are kept


def away(mask):
    """Distance in pixels, (h,w), to the nearest pixel of a mask; inf if it is empty."""
    return ndimage.distance_transform_edt(~mask) if mask.any() else np.full(mask.shape, np.inf)


def silhouette_share(p, reach, cameras, distances):
    """Share (N,) of the views that show p (N,3) in which it is within `reach` of the silhouette.

    distances: `away` of each. Places behind a camera count as outside, those beside the picture
    not at all; 0 where fewer than half of the views tell.
    """
    told, hits = np.zeros(len(p)), np.zeros(len(p))
    for pose, lens, size, distance in zip(cameras.poses, cameras.lenses, cameras.sizes, distances):
        row, column, depth, framed = pixels_of(pose, lens, size, p)
        pixels = reach * lens[0] / np.where(framed, depth, 1)
        told += framed | (depth <= 0)
        hits += framed & (distance[row, column] <= pixels)
    return np.where(told >= len(cameras) / 2, hits / np.maximum(told, 1), 0)


def visual_hull(cameras, masks, centre, extent):
    """The cells of the box whose middles lie in nearly all silhouettes.

    (cells (n,3) of integers, cells a side, the share of the silhouettes that they lie in). Where
    no cell is in HULL_SHARE of them, those in the most of them stand in.
    """
    distances, (coarse, parts) = [away(m) for m in masks], HULL_CELLS
    cells = np.stack(np.indices((coarse,) * 3), -1).reshape(-1, 3)
    for n, reach in ((coarse, math.sqrt(3) * extent / coarse), (coarse * parts, 0)):
        if n > coarse:
            inner = np.stack(np.indices((parts,) * 3), -1).reshape(-1, 3)
            cells = (cells[:, None] * parts + inner).reshape(-1, 3)
        p = ((cells + 0.5) * 2 / n - 1) * extent + centre
        share = silhouette_share(p, reach, cameras, distances)
        needed = min(HULL_SHARE, share.max(initial=0))
        cells = cells[(share >= needed) & (share > 0)]
    return cells, n, needed


def hull_skin(cells, n):
    """Those of the cells (m,3) of n a side that have a neighbour which is not one."""
    full = np.zeros((n,) * 3, bool)
    full[tuple(cells.T)] = True
    return np.argwhere(full & ~ndimage.binary_erosion(full))


def projected_colours(p, cell, cameras, pictures):
    """Mean colour (N,3), of pictures (h,w,4), where p (N,3) are visible; and weights (N,), 0: none.

    Visible is what no other point is in front of, by 3 cells; pixels deep inside of a silhouette
    count more, as those at its border show something else besides.
    """
    total, weights = np.zeros((len(p), 3)), np.zeros(len(p))
    for pose, lens, size, shot in zip(cameras.poses, cameras.lenses, cameras.sizes, pictures):
        row, column, depth, framed = pixels_of(pose, lens, size, p)
        nearest = np.full(shot.shape[:2], np.inf)
        np.minimum.at(nearest, (row[framed], column[framed]), depth[framed])
        nearest = ndimage.minimum_filter(nearest, 3)
        inside = ndimage.distance_transform_edt(np.pad(shot[..., 3] > 127, 1))[1:-1, 1:-1]
        seen = framed & (depth <= nearest[row, column] + 3 * cell)
        weight = seen * np.minimum(inside[row, column], 3) ** 2
        total += weight[:, None] * shot[row, column, :3]
        weights += weight
    return total / np.maximum(weights, 1e-9)[:, None], weights


def hull_points(cameras, pictures, centre, extent, rng):
    """Coloured points (n,6), all in [-1,1], of the hull in the box, and the share of `visual_hull`.

    pictures: uint8 (h,w,4) each, colours over white and opacity. ValueError if there is no hull.
    """
    cells, n, share = visual_hull(cameras, [s[..., 3] > 127 for s in pictures], centre, extent)
    require(len(cells), 'no place of the box is in a silhouette: wrong --axes or --box, or empty '
            'pictures')
    skin = hull_skin(cells, n)
    p = (skin + rng.random(skin.shape)) * 2 / n - 1
    colour, weights = projected_colours(p * extent + centre, 2 * extent / n, cameras, pictures)
    points = np.hstack([p, colour / 127.5 - 1])[weights > 0]
    return points[rng.permutation(len(points))[:HULL_POINTS]], share


# ---- data sets of scenes ------------------------------------------------------------------------

@dataclass
class NerfConfig:
    """What stage 1 sees of a scene at a time."""
    points: int = flag(3000, 'coloured points that the encoder sees')
    clouds: int = flag(4, 'point clouds of each scene that stage 2 keeps latents of')
    rays: int = flag(1024, 'rays whose colour is asked for')
    ray_views: int = flag(4, 'views of a scene that these rays are taken from')
    focus: float = flag(0.0, 'share of the rays drawn where the object is; the others anywhere')
    test_views: int = flag(2, 'last views of each scene, which neither rays nor points come from')
    side: int = flag(128, 'longest side of the pictures that rays are taken from; larger ones are '
                     'reduced', low=4)
    toy_views: int = flag(32, 'views of a scene of toy_nerf', low=2)
    box: tuple = flag((), 'box of the scenes in the units of their poses: half its side, or x, y, '
                      'z of its centre and that; empty = the ball that all cameras look at',
                      low=-math.inf)
    axes: str = flag('', "axes of the poses, if not those of the data's layout",
                     choices=('', 'opencv', 'opengl'))


class Scenes(Items):
    """What all sets of posed pictures share: coloured points for the encoder, rays, flips along x.

    Points and rays leave in coordinates of the scene box, which is [-1,1]^3 and stands for `extent`
    to each side of `centre` in the data's units; it is the same for all scenes. A data set has
        cameras(i)        the `Cameras` of scene i, in the data's units
        shot(i, k)        its view k as uint8 (h,w,4): colours over white, and opacity; of the size
                          that cameras(i).reduced(side) has
        square(i, k, R)   the centred square of that at R x R, float32 (R,R,4) in [0, 1]
        draw_surface(i, n, rng)    n coloured points (n,6), all in [-1,1]
    The last `test_views` views of a scene are for `truth` alone.
    """

    domain, kind, channels, config = 'nerf', 'scenes', 4, NerfConfig
    encoder_only, view = dict(rays=1, ray_views=1), Shapes.view

    def __init__(self, points=3000, clouds=4, rays=1024, ray_views=4, focus=0.0, test_views=2,
                 side=128, toy_views=32, box=(), axes='', **options):
        super().__init__(**options)
        require(0 <= focus <= 1, f'--focus {focus}: a share, from 0 to 1')
        require(min(points, clouds, rays, ray_views, test_views) >= 1, '--points, --clouds, '
                '--rays, --ray_views and --test_views: at least 1')
        require(len(box) in (0, 1, 4) and all(b > 0 for b in box[-1:]), f'--box {box}: half a side '
                'above 0, or x,y,z of the centre and half a side (--box=X,Y,Z,HALF)')
        self.points, self.views, self.ray_count, self.side = points, clouds, rays, side
        self.ray_views, self.test_views, self.toy_views = ray_views, test_views, toy_views
        self.box, self.axes, self.focus = tuple(map(float, box)), axes, focus

    @staticmethod
    def lies_at(path):
        return any(True for _ in scenes_at(Path(path), glance=True))

    def settles(self):
        return dict(super().settles(), side=self.side)

    @staticmethod
    def options_of_run(info):
        return dict(box=(*info['vae_config']['centre'], info['vae_config']['extent']))

    def to_box(self, places):
        """The data's units -> [-1,1] in the scene box, (...,3) each."""
        return (places - np.array(self.centre)) / self.extent

    def from_box(self, places):
        return places * self.extent + np.array(self.centre)

    def cloud(self, i, rng):
        """Input of the encoder, (points,6) in [-1,1], and the sign that x was multiplied by."""
        p = self.draw_surface(i, self.points, rng)
        sign = np.array([1 - 2 * int(self.flip and rng.random() < 0.5), 1, 1])
        return torch.from_numpy(np.hstack([p[:, :3] * sign, p[:, 3:]]).astype('float32')), sign

    def draw_pixels(self, opacity, n, rng):
        """Rows and columns of n pixels, `focus` of them where the opacity (h,w) is not 0."""
        pixels, on = rng.integers(opacity.size, size=n), np.flatnonzero(opacity)
        focused = round(self.focus * n) if len(on) else 0
        pixels[:focused] = on[pixels[:focused] * len(on) // opacity.size]
        return np.divmod(pixels, opacity.shape[1])

    def draw_rays(self, i, rng):
        """Origins and directions in the data's units, colours in 0..255, (rays,3) each."""
        cameras, found = self.cameras(i).reduced(self.side), []
        trained = len(cameras) - self.test_views
        chosen = rng.choice(trained, min(self.ray_views, trained), replace=False)
        for k, part in zip(chosen, np.array_split(np.arange(self.ray_count), len(chosen))):
            shot = self.shot(i, k)
            y, x = self.draw_pixels(shot[..., 3], len(part), rng)
            rays = pixel_rays(cameras.poses[k], cameras.lenses[k], x + 0.5, y + 0.5)
            found.append((*rays, shot[y, x, :3]))
        return map(np.concatenate, zip(*found))

    def item(self, i, rng=None):
        """points (N,6), rays_o and rays_d (R,3), in the box, target (R,3) in [-1,1], and `known`.

        Without an rng the draws depend on the scene's name alone.
        """
        i = self.stand_in(i)
        rng = rng or common.seeded('scene', self.names[i])
        cloud, sign = self.cloud(i, rng)
        o, d, colour = self.draw_rays(i, rng)
        o, d = (torch.from_numpy((v * sign).astype('float32')) for v in (self.to_box(o), d))
        return dict(points=cloud, rays_o=o, rays_d=d, **self.known(i, rng),
                    target=to_float(torch.from_numpy(colour)))

    def held_out(self, i):
        """The numbers of the views that training does not see."""
        count = len(self.cameras(i))
        return range(count - self.test_views, count)

    def square_rays(self, i, k, R):
        """Origins and directions of the pixels of `square`, (R,R,3) each, in the box."""
        x, y = np.meshgrid(np.arange(R) + 0.5, np.arange(R) + 0.5)
        cameras = self.cameras(i)
        o, d = pixel_rays(cameras.poses[k], cameras.square(k, R), x, y)
        return self.to_box(o).astype('float32'), d.astype('float32')

    def rays(self, i, R, views=None):
        """Origins and directions (V,R,R,3), in the box, of the pixels of `truth`."""
        i = self.stand_in(i)
        views = self.held_out(i) if views is None else views
        return [torch.from_numpy(np.stack(r))
                for r in zip(*(self.square_rays(i, k, R) for k in views))]

    def truth(self, i, R, views=None):
        """Views at R x R that were held out, or those numbered `views`: V of them.

        pictures (V,3,R,R) in [-1,1], and where the object covers more than half of a pixel, bool
        (V,R,R).
        """
        i = self.stand_in(i)
        views = self.held_out(i) if views is None else views
        shown = torch.from_numpy(np.stack([self.square(i, k, R) for k in views]))
        return shown[..., :3].permute(0, 3, 1, 2).contiguous() * 2 - 1, shown[..., 3] > 0.5

    def picture(self, i, size):
        """The first held-out view."""
        return self.truth(i, size, self.held_out(self.stand_in(i))[:1])[0][0]

    def shown(self, i):
        """The numbers of four views, evenly spaced."""
        count = len(self.cameras(self.stand_in(i)))
        return [k * count // 4 for k in range(4)]

    def preview(self, i, size):
        """Four views side by side."""
        return torch.cat([*self.truth(i, size, self.shown(i))[0]], dim=2)

    def inspect(self, i, size):
        """Two views, each also with the points on it, red off the object; cameras along y and z."""
        i = self.stand_in(i)
        points = self.draw_surface(i, 2000, common.seeded('inspect', self.names[i]))[:, :3]
        cameras = self.cameras(i)
        tiles = [tile for k in common.evenly_spaced(len(cameras), 2) for tile in
                 over_picture(self.square(i, k, size), cameras.poses[k], cameras.square(k, size),
                              self.from_box(points))]
        eye, ahead = self.to_box(cameras.poses[:, :3, 3]), cameras.poses[:, :3, 2]
        tiles += [plan(points[:, a], eye[:, a], ahead[:, a], size) for a in ([0, 2], [0, 1])]
        return torch.from_numpy(np.concatenate(tiles, 1)).permute(2, 0, 1).float() * 2 - 1

    def agreement(self, i):
        """Shares, over eight views: of the points on the object, of the object near to points.

        A hull's points always fall on it, but fill it only if the poses are right.
        """
        i, shares = self.stand_in(i), []
        cameras = self.cameras(i).reduced(self.side)
        points = self.draw_surface(i, 2000, common.seeded('inspect', self.names[i]))[:, :3]
        for k in common.evenly_spaced(len(cameras), 8):
            row, column, _, framed = pixels_of(cameras.poses[k], cameras.lenses[k],
                                               cameras.sizes[k], self.from_box(points))
            mask = self.shot(i, k)[..., 3] > 127
            shown = np.zeros_like(mask)
            shown[row[framed], column[framed]] = True
            near = away(shown) <= max(mask.shape) / 32
            filled = (near & mask).sum() / max(mask.sum(), 1)
            shares.append(((framed & mask[row, column]).mean(), filled))
        return np.mean(shares, axis=0)

    def facts(self):
        good = self.readable(range(len(self)))
        counts = [len(self.cameras(i)) for i in good]
        sizes = np.concatenate([self.cameras(i).sizes for i in good])
        yield f'views     {spread(counts)} a scene; the last {self.test_views} are held out'
        yield f'sizes     short side {spread(sizes.min(1))}'
        yield f'box       {", ".join(f"{c:.4g}" for c in self.centre)} +- {self.extent:.4g}'
        shares = np.stack([self.agreement(good[k]) for k in common.evenly_spaced(len(good), 24)])
        low, middle = shares.min(0), np.median(shares, axis=0)
        yield f'points    {low[0]:.0%} min, {middle[0]:.0%} median fall into the silhouettes'
        yield f'          and cover {low[1]:.0%} min, {middle[1]:.0%} median of these'
        for part, (least, what) in enumerate(((0.5, 'fewer than half of the points do'),
                                              (0.8, 'they leave much uncovered'))):
            if few := sum(shares[:, part] < least):
                yield (f'warning   in {few} of {len(shares)} scenes {what}: other axes than the '
                       'layout has (--axes), or a wrong --box?')


def over_picture(shown, pose, lens, points):
    """A picture (S,S,4) in [0, 1] without and with points (N,3) over it, red off the object."""
    row, column, _, framed = pixels_of(pose, lens, shown.shape[:2], points)
    row, column = row[framed], column[framed]
    over = 0.5 + 0.5 * shown[..., :3]
    over[row, column] = np.where(shown[row, column, 3:] > 0.5, (0.1, 0.3, 0.8), (0.9, 0.1, 0.1))
    return shown[..., :3], over


def plan(points, eye, ahead, size):
    """Points (N,2), the box [-1,1]^2 and cameras that look `ahead`, second axis up: (S,S,3)."""
    scale = size / 2 / max(1.1, 1.2 * np.abs(eye).max())
    im = Image.new('RGB', (size, size), 'white')
    draw = ImageDraw.Draw(im)

    def place(p):
        return [tuple(q) for q in p * (scale, -scale) + size / 2]
    draw.rectangle(place(np.array([[-1, 1], [1, -1]])), outline='silver')
    draw.point(place(points), 'gray')
    for start, end in zip(place(eye), place(eye + 0.12 * size / scale * ahead)):
        draw.line([start, end], 'steelblue')
        draw.point(start, 'black')
    return np.asarray(im) / 255


class ToyScenes(Computed, Scenes):
    """toy_nerf, with the family as label; the truth is exact at every resolution and pose."""

    seeds = TOY_SCENES
    options_of_run = Items.options_of_run

    def __init__(self, name, root, selection, box=(), axes='', **options):
        require(not (box or axes), f'--box, --axes: {name} has its own')
        super().__init__(name, root, selection, **options)
        require(self.toy_views > self.test_views, f'--test_views {self.test_views}: leaves none of '
                f'{self.toy_views} views to train on')
        self.scenes = [toy_scene(s) for s in self.numbers]
        self.groups = self.titles = list(TOY_FAMILIES)
        self.labels = [self.groups.index(scene.solid.family) for scene in self.scenes]
        self.captions = [[scene.solid.caption] for scene in self.scenes]

    def cameras(self, i):
        n, seed = self.toy_views, self.numbers[i]
        poses = self.cache.get((i, 'poses'), lambda: np.stack([toy_pose(seed, k)
                                                               for k in range(n)]))
        return Cameras(poses, toy_lens(self.side), (self.side,) * 2)

    def surface(self, i):
        """TOY_POINTS coloured points (n,6) of the surface, float32."""
        p = toy_surface(self.scenes[i].solid, TOY_POINTS, common.seeded('surface', self.names[i]))
        return np.hstack([p, 2 * toy_field(self.scenes[i], p)[1] - 1]).astype('float32')

    def draw_surface(self, i, n, rng):
        return some_points(self.cache.get((i, 'points'), lambda: self.surface(i)), n, rng)

    def render(self, i, R, views):
        """Views at R x R, exact: dict of rgb (V,R,R,3) and opacity in [0, 1], depth (V,R,R)."""
        found = toy_render(self.scenes[i], *(r.view(-1, 3).numpy() for r in self.rays(i, R, views)))
        return {k: v.reshape(len(views), R, R, *v.shape[1:]) for k, v in found.items()}

    def squares(self, i, R, views):
        shown = self.render(i, R, views)
        return np.concatenate([shown['rgb'], shown['opacity'][..., None]], -1)

    def square(self, i, k, R):
        return self.squares(i, R, [k])[0]

    def shot(self, i, k):
        """All views are rendered once and kept, in memory and in a file that this program made."""
        def make():
            digest = common.file_digest(__file__)[:12]
            path = TOY_RENDERS / f'{digest}_{self.toy_views}_{self.side}/{self.numbers[i]}.npz'
            return kept(path, lambda: dict(shots=(255 * self.squares(
                i, self.side, range(self.toy_views))).round().astype('uint8')))['shots']
        return self.cache.get(i, make)[k]


def kept(path, make):
    """dict of arrays: what an .npz holds or, if it is not there, make() does, and then it is.

    Where it cannot be written, it is made anew by each process.
    """
    try:
        with np.load(path) as file:
            return dict(file)
    except Exception:  # not there, or cut short
        arrays = make()
    try:
        save_npz(path, **arrays)
    except OSError:
        pass
    return arrays


class FileScenes(FileItems, Scenes):
    """Scenes in one of the LAYOUTS; points that are not given are those of a visual hull."""

    def __init__(self, name, root, selection, **options):
        super().__init__(**options)
        require(self.toy_views == NerfConfig.toy_views, f'--toy_views: {name} has its own views')
        self.scenes, official = find_scenes(root)
        self.shares, self.digests = {}, {}  # index -> of the silhouettes, that the hull lies in
        known = sorted(self.scenes, key=natural)
        self.views_of = self.select(known, root, selection, official)
        self.centre, self.extent, self.up = self.find_box(known)
        self.side = min(self.side, int(np.median([c.sizes.min() for c in self.views_of])))

    def path_of(self, name):
        return self.scenes[name].place if name in self.scenes else name

    def read_cameras(self, name):
        scene = self.scenes[name]
        return scene.cameras(self.axes or scene.axes)

    def header(self, name):
        """The cameras, or why the scene is of no use."""
        try:
            cameras = self.read_cameras(name)
            require(len(cameras) > self.test_views, f'only {len(cameras)} views, of which '
                    f'--test_views {self.test_views} are held out')
            return cameras
        except ValueError as error:
            return str(error)
        except Exception as error:  # a decoder may raise anything on a broken file
            return reason(error)

    def find_box(self, names):
        """Centre (3 floats), half side and what points up, of all scenes alike.

        The box is --box or, without, what the cameras look at.
        """
        some = [names[k] for k in common.evenly_spaced(len(names), 16)]
        found = [c for c in map(self.header, some) if not isinstance(c, str)] or self.views_of
        if self.box:
            return (*(0.0, 0.0, 0.0), *self.box)[-4:-1], self.box[-1], upwards(found)
        try:
            centre, extent = common_ball(found)
        except ValueError as error:
            raise ValueError(f'{self.place}: {error}') from None
        centre = tuple(round(float(c), 4) + 0.0 for c in centre)
        return centre, round(extent, 4), upwards(found)

    def cameras(self, i):
        return self.views_of[i]

    def read(self, i, views):
        """[uint8 (h,w,4)] of these views, reduced to `side`, each kept for the next time."""
        missing = [k for k in views if (i, k) not in self.cache.kept]
        made, sizes = {}, self.cameras(i).reduced(self.side).sizes
        for k, im in zip(missing, self.scenes[self.names[i]].pictures(missing) if missing else ()):
            require(im.size == (*self.cameras(i).sizes[k],), f'view {k} has {im.width} x '
                    f'{im.height} pixels, unlike the first')
            made[k] = over_white(im, (*map(int, sizes[k]),))
        return [self.cache.get((i, k), lambda: made[k]) for k in views]

    def shot(self, i, k):
        return self.read(i, [int(k)])[0]

    def square(self, i, k, R):
        im, = self.scenes[self.names[i]].pictures([k])
        return over_white(square(im), (R, R)).astype('float32') / 255

    def largest(self, i):
        return int(self.cameras(i).sizes.min())

    def decode(self, i):
        """The coloured points (n,6) of scene i in the box; ValueError if they cannot be had."""
        scene = self.scenes[self.names[i]]
        if i not in self.digests:  # for the first time: the pictures, too, must be whole
            self.digests[i] = self.digest(i)
        if scene.cloud:
            p = scene.cloud()
            return np.hstack([self.to_box(p[:, :3]), p[:, 3:]]).astype('float32')
        stored = kept(scene.folder / f'points-{self.digests[i]}.npz', lambda: self.hull(i))
        self.shares[i] = float(stored['share'])
        require(self.shares[i] >= 0.5 or self.tolerant, self.doubt(i))
        return stored['points']

    def digest(self, i):
        """Of all that the hull of scene i depends on, cameras and pictures, in hexadecimal."""
        key = self.centre, self.extent, self.axes, self.side, self.test_views
        found = hashlib.blake2b(repr(key).encode(), digest_size=6)
        for array in (*vars(self.cameras(i)).values(), *self.read(i, range(len(self.cameras(i))))):
            found.update(np.ascontiguousarray(array))
        return found.hexdigest()

    def doubt(self, i):
        return (f'no place of the box is in more than {self.shares[i]:.0%} of the silhouettes: '
                'other axes than the layout has (--axes), or a wrong --box?')

    def verify(self):
        """Decode every file; what training would refuse joins `bad`, but can be looked at."""
        super().verify()
        self.bad += [(self.names[i], self.doubt(i)) for i, share in sorted(self.shares.items())
                     if share < 0.5]

    def hull(self, i):
        """dict of the points (n,6) and their `share`, see `visual_hull`."""
        trained = range(len(self.cameras(i)) - self.test_views)
        cameras = self.cameras(i).reduced(self.side)
        cameras = Cameras(*(v[:len(trained)] for v in vars(cameras).values()))
        points, share = hull_points(cameras, self.read(i, trained), np.array(self.centre),
                                    self.extent, common.seeded('hull', self.names[i]))
        return dict(points=points.astype('float32'), share=share)

    def bytes_kept(self, points):
        return points.nbytes

    def draw_surface(self, i, n, rng):
        return some_points(self.source(self.stand_in(i)), n, rng)


def over_white(im, size):
    """PIL RGBA -> uint8 (h,w,4) of `size` (w, h): colours over white, and opacity."""
    im = resized(im, size)
    white = whitened(im)
    white.putalpha(im.getchannel('A'))
    return np.asarray(white)


# ---- the table of data sets ---------------------------------------------------------------------

# name: (base class, what opens it: (name, root, selection, **options) -> the data set); a user's
# own files are opened under the name of their domain.
DATASETS = {
    'toy_image': (ToyPictures, ToyPictures),
    'image': (Pictures, picture_files),
    'celebahq': (Pictures, picture_files),
    'afhq_cat': (Pictures, afhq),
    'afhq_dog': (Pictures, afhq),
    'cifar10': (Pictures, cifar10),
    'lsun_church': (Pictures, picture_files),
    'toy_shape': (ToyShapes, ToyShapes),
    'shape': (Shapes, FileShapes),
    'shapenet': (Shapes, FileShapes),
    'shapenet_chair': (Shapes, partial(FileShapes, classes=['03001627'])),
    'text2shape': (Shapes, text2shape),
    'toy_video': (ToyVideos, ToyVideos),
    'video': (Videos, video_files),
    'skytimelapse': (Videos, skytimelapse),
    'toy_nerf': (ToyScenes, ToyScenes),
    'nerf': (Scenes, FileScenes),
    'srn_cars': (Scenes, FileScenes),
}
NAMES = tuple(DATASETS)
CONFIGS = tuple({base.config: None for base, _ in DATASETS.values()})  # each once, in order


def options_of(flags):
    """Options for `make_dataset` from the flags, a dict; ValueError for those of other data."""
    base, _ = DATASETS[flags['dataset']]
    own = [f.name for f in fields(base.config)]
    for f in [f for config in CONFIGS for f in fields(config) if f.name not in own]:
        require(flags.get(f.name, f.default) == f.default,
                f'--{f.name}: {flags["dataset"]} holds {base.kind}, which have no such flag')
    return base.options_from(flags)


def make_dataset(name, root=None, split='train', holdout=None, group=None, seed=0, tolerant=False,
                 captions='', **options):
    """The data set `name` at `root` (default data/NAME), an `Items`; for the split see `Selection`.

    options: flip, cache_bytes, what the `config` of its kind has; of pictures and clips also
    `resolution`, by default 64.
    FileNotFoundError or ValueError, one line, if the data are missing or bad.
    """
    require(name in DATASETS, f'--dataset {name}: unknown; one of {", ".join(NAMES)}')
    require(split in ('train', 'test', 'all'), f'split {split}: one of train, test, all')
    require(not root or not DATASETS[name][0].computed, f'--data {root}: {name} is computed; say '
            'what the data are, as in --dataset image')
    selection = Selection(split, holdout, group, seed, tolerant, captions)
    return DATASETS[name][1](name, Path(root or Path('data') / name), selection, **options)


def open_run_data(info, split, root=None, captions=None, **options):
    """The data set of a run, by its info (see `ldm.load_vae`); root: where it is, if it moved.

    captions: '' for none, None for those of stage 2 or, if it names none, of stage 1.
    """
    args = info['args']
    if captions is None:
        captions = info.get('ldm_args', {}).get('captions') or args.get('captions', '')
    settled = DATASETS[args['dataset']][0].options_of_run(info)
    listed = info['splits'] if any(info['splits'].values()) else None  # some runs know of no data
    options = {**options_of(args), **settled, 'flip': args['flip'] and split == 'train',
               'captions': captions, **options}
    try:
        return make_dataset(args['dataset'], root or args['data'], split, listed,
                            **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'the data this run was trained on are gone: {error}') from None


# ---- python data.py check -----------------------------------------------------------------------

def meant(args):
    """The data set's name and its place that a command's flags mean; a path tells its domain."""
    name, root = args.dataset, args.data
    if name not in NAMES:
        require(Path(name).exists(), f'{name}: neither a data set ({", ".join(NAMES)}) nor a path')
        require(not root, f'--data {root}: {name} is a path already; give one of them')
        root = name
        own = [base for key, (base, _) in DATASETS.items() if key == base.domain]  # pictures first
        name = next(base.domain for base in reversed(own) if base.lies_at(args.dataset))
    return name, root


def check(args):
    """What `python data.py check` prints; ends in an error if training would refuse the data."""
    name, root = meant(args)
    out = args.out or f'out/check_{name}.png'
    picture_kind(out)
    common.try_file('--out', out)
    options = options_of(dict(vars(args), dataset=name, resolution=args.res, seed=0))
    dataset = make_dataset(name, root, 'all', args.split, args.group, tolerant=True, **options)
    if dataset.computed:
        print(f'{name}: computed; ' + ', '.join(f'{k} {v[0]}' for k, v in dataset.splits().items()))
    else:
        dataset.verify()
        print(f'{name} at {dataset.place}', *map(common.printable, dataset.describe()), sep='\n')
    wide = dataset.inspect(0, args.res).shape[2] // args.res
    shown = common.evenly_spaced(len(dataset), max(48 // wide, 12))
    save_grid(out, torch.stack([dataset.inspect(i, args.res) for i in shown]), room=8)
    print(f'preview   {out}')
    if not dataset.computed:
        dataset.tolerant = False
        dataset.refuse_one()
        dataset.refuse_bad()


# ---- python data.py pack: pictures and frames, decoded once -------------------------------------

def packed_entries(dataset, size):
    """The entries of a packed file, see `Packed`, with squares of at most `size` a side."""
    index, bad = {n: i for i, n in enumerate(dataset.names)}, dict(dataset.bad)

    def entry(name):
        if name not in index:
            return dict(name=name, side=0, fault=bad[name])
        i = index[name]
        about = dict(label=dataset.labels, captions=dataset.captions)
        return dict(name=name, side=min(size, dataset.largest(i)), **dataset.entry(i),
                    **{key: values[i] for key, values in about.items() if values})
    return [*map(entry, sorted(sum(dataset.splits().values(), []), key=natural))]


def write_packed(path, dataset, about):
    """Write a packed file; items that cannot be read become faulty, ValueError if too many do."""
    entries, lock = {e['name']: e for e in about['entries']}, Lock()
    *starts, end = packed_starts(about['entries'])
    starts, free = dict(zip(entries, starts)), shutil.disk_usage(path.parent).free
    require(end < free, f'--out: needs {end / 2 ** 20:.1f} MiB in {path.parent}, '
            f'{free / 2 ** 20:.1f} MiB are free; try a smaller --size, or another place')

    def squares(i):
        for im in dataset.squares(i):
            values = resize(im, min(about['size'], im.width))
            require(len(values) == entries[dataset.names[i]]['side'], 'its frames differ in size')
            yield values

    def store(i):
        """Write the squares of item i in their place, or skip it; errors of writing are raised."""
        start, found = starts[dataset.names[i]], squares(i)
        while True:
            try:
                values = next(found, None)
            except Exception as error:  # a decoder may raise anything on a broken file
                entries[dataset.names[i]]['fault'] = reason(error)
                return dataset.skip(i, reason(error))
            if values is None:
                return
            with lock:
                file.seek(start)
                file.write(values)
            start += values.nbytes
    with open(path, 'wb') as file:
        file.write(PACKED)
        threaded(store, range(len(dataset)), 'packing')
        text = json.dumps(about).encode()
        file.seek(end)
        file.write(text + PACKED_END.pack(len(text), zlib.crc32(text), PACKED))


def pack(args):
    """What `python data.py pack` does."""
    name, root = meant(args)
    base, _ = DATASETS[name]
    require(base.packing, f'{args.dataset}: only pictures and videos in files are packed')
    common.try_file('--out', args.out)
    for left in Path(args.out).parent.glob(f'{glob.escape(Path(args.out).name)}.*.tmp'):
        print(f'note: {left}, {left.stat().st_size / 2 ** 20:.1f} MiB: another process writes it, '
              'or one that was killed left it; then remove it')
    require(not Path(args.out).exists() or is_packed(args.out),
            f'--out {args.out}: a file that data.py did not pack is there; name another')
    dataset = make_dataset(name, root, 'all', args.split, args.group, captions=args.captions,
                           **base.packing)
    common.list_notes(dataset.notes, dataset.bad)
    told = dataset.official or args.split or args.group
    about = dict(kind=base.kind, size=args.size, split=dataset.splits() if told else None,
                 entries=packed_entries(dataset, args.size))
    write = partial(write_packed, dataset=dataset, about=about)
    common.replace(args.out, write)
    bad = dict(dataset.bad)
    good = [i for i in range(len(dataset)) if dataset.names[i] not in bad]
    larger = sum(dataset.largest(i) > args.size for i in good)
    print(f'{args.out}: {len(good)} {base.kind}, {Path(args.out).stat().st_size / 2 ** 20:.1f} MiB'
          f'; at sizes up to {args.size} they come out equal to unpacked ones'
          + f', {larger} that were larger up to the resize to {args.size}' * bool(larger))


def main():
    """The command line: `check`, `pack` or `mesh`."""
    parser = common.Parser('Look at data sets before training on them.\n' + __doc__)
    commands = parser.add_subparsers(dest='command', required=True)

    def command(name, run, what):
        flags = commands.add_parser(name, help=what, description=what)
        flags.set_defaults(run=run)
        return flags, flags.add_argument
    looking, add = command('check', check, 'decode everything, print counts, write a preview')
    add('--res', type=common.at_least(8, int), default=64, help='side of the preview pictures')
    add('--out', default='', help='preview, default out/check_DATASET.png')
    packing, add = command('pack', pack, 'write the centre squares of pictures or of the frames of '
                           'videos, decoded, into one file that --data takes')
    add('--size', type=common.at_least(MIN_SIDE, int), required=True, help='pixels a side to which '
        'larger ones are reduced: the greatest of --scales times --resolution')
    add('--out', required=True, help='file to write')
    for flags in (looking, packing):
        add = flags.add_argument
        add('dataset', help=f'one of {", ".join(NAMES)}, or a folder, zip or packed file')
        add('--captions', default='', help='CSV with a column file, id or modelId and one of '
            'description, caption, text, name')
        add('--data', default='', help='where the data are, default data/DATASET')
        add('--split', default='', help='held-out fraction, or a file of the split')
        add('--group', default='', help='regular expression: names that become equal when it is '
            'deleted stay on one side (--group=REGEX if it begins with -)')
    for config in CONFIGS:
        looking.add_config(config)
    _, add = command('mesh', mesh, 'sample meshes into the files that shapes are trained on')
    add('folder', help='folder of .obj, .ply, .off or .stl files; each folder in it is a class')
    add('--classes', default='', help="CSV with the columns id (the file's name) and category, "
        'where folders do not tell')
    add('--out', default='data/shape', help='folder to write')
    add('--points', type=common.at_least(8, int), default=100_000, help='points on the surface '
        'and in the box, each')
    add('--near', type=common.at_least(0, float), default=0.5, help='points close to the surface, '
        'for train_vae.py --near, as a share of --points, at most 1')
    add('--split', default='0.1', help='fraction for val.lst and again for test.lst')
    add('--group', default='', help='as for check')
    add('--seed', type=common.at_least(0, int), default=0, help='of the points and the split')
    add('--keep', action='store_true', help='list doubtful meshes for training, too')
    args = parser.parse_args()
    args.run(args)


if __name__ == '__main__':
    common.run(main)
