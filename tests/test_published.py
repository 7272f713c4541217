"""Checkpoints of the authors' code: our networks compute what theirs compute.

The reference is written from the formulae of their networks, on their state dicts, with no module
of ours. `image_checkpoint` and `shape_checkpoint` make small files in their layout, in which every
tensor is random.
"""
import argparse
import collections
import contextlib
import itertools
import math
import os
import re
import sys
import types
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import data
import inr
import ldm
import vae
from test_scripts import done

AUTHORS = Path(__file__).parent.parent.parent / 'shared/data/authors'
PAIRS = 'xy', 'yz', 'xz'  # as their first stage joins planes as channels
LATENT = 'xy', 'xz', 'yz'  # as their second stage does
AXES = dict(xy=[0, 1], yz=[1, 2], xz=[0, 2])
HALF_BOX = 0.550005  # of the box in which they pool points, (1 + 0.1 + 1e-5) / 2


# ---- checkpoints in their layout ---------------------------------------------------------------

def layer(name, *shape):
    return {f'{name}.weight': shape, f'{name}.bias': shape[:1]}


def block_shapes(name, i, o, names='norm1 conv1 norm2 conv2 nin_shortcut'):
    first, conv1, second, conv2, skip = (f'{name}.{n}' for n in names.split())
    return {**layer(first, i), **layer(conv1, o, i, 3, 3), **layer(second, o),
            **layer(conv2, o, o, 3, 3), **(layer(skip, o, i, 1, 1) if i != o else {})}


def attention_shapes(name, c, inner=None, kernel=(1, 1)):
    """`inner`: the width of all heads together, by default c."""
    shapes = layer(f'{name}.norm', c) | layer(f'{name}.proj_out', c, inner or c, *kernel)
    for n in 'qkv':
        shapes |= layer(f'{name}.{n}', inner or c, c, *kernel)
    return shapes


def stack_shapes(block1, attention, block2, c):
    return block_shapes(block1, c, c) | attention_shapes(attention, c) | block_shapes(block2, c, c)


def middle_shapes(name, c, planes):
    shapes = stack_shapes(f'{name}.mid.block_1', f'{name}.mid.attn_1', f'{name}.mid.block_2', c)
    if planes > 1:
        shapes |= stack_shapes(f'{name}.mid.block_3', f'{name}.mid_attn', f'{name}.mid.block_4',
                               planes * c)
    return shapes


def level_shapes(ch, mult, blocks, field, join):
    """The decoder after its middle; `join(i, c)` is what follows the blocks of level i."""
    shapes, c = {}, ch * mult[-1]
    for i, m in reversed(list(enumerate(mult))):
        for j in range(blocks + 1):
            shapes |= block_shapes(f'decoder.up.{i}.block.{j}', c, ch * m)
            c = ch * m
        shapes |= join(i, c)
        if i in (1, 2):  # the read-out takes three fields
            shapes |= layer(f'decoder.up.{i}.hdbf.0', field, c, 1, 1)
        if i > 0:
            shapes |= layer(f'decoder.up.{i}.upsample.conv', c, c, 3, 3)
    return shapes | layer('decoder.norm_out', c) | layer('decoder.conv_out', field, c, 3, 3)


def autoencoder_shapes(c_in, ch, mult, blocks, z, E, field, planes=1, joined=()):
    """`joined`: the levels, 0 = finest, with a stack across the planes."""
    def join(n, i, c):
        names = (f'{n}.{i}.inter_attn.{k}' for k in range(3))
        return stack_shapes(*names, planes * c) if i in joined else {}

    widths = [ch * m for m in mult]
    shapes, c = layer('encoder.conv_in', ch, c_in, 3, 3), ch
    for i, width in enumerate(widths):
        for j in range(blocks):
            shapes |= block_shapes(f'encoder.down.{i}.block.{j}', c, width)
            c = width
        shapes |= join('encoder.down', i, c)
        if i < len(widths) - 1:
            shapes |= layer(f'encoder.down.{i}.downsample.conv', c, c, 3, 3)
    shapes |= middle_shapes('encoder', c, planes) | layer('encoder.norm_out', c)
    shapes |= layer('encoder.conv_out', 2 * z, c, 3, 3) | layer('decoder.conv_in', c, z, 3, 3)
    shapes |= middle_shapes('decoder', c, planes)
    shapes |= level_shapes(ch, mult, blocks, field, lambda i, c: join('decoder.up', i, c))
    for suffix in [f'_{p}' for p in PAIRS] if planes > 1 else ['']:
        shapes |= layer(f'quant_conv{suffix}', 2 * E, 2 * z, 1, 1)
        shapes |= layer(f'post_quant_conv{suffix}', z, E, 1, 1)
    return shapes


def modulated_shapes(name, i, o, W):
    return {f'{name}.weight': (1, o, i, 1, 1), **layer(f'{name}.modulation', i, W)}


def picture_mlp_shapes(W, fields):
    shapes = layer('time_mlp.1', W, W // 4) | layer('time_mlp.3', W, W)
    for b, i in enumerate([fields[0] + 2, *(W + f + 2 for f in fields[1:]), W], start=1):
        for j in (1, 2, 3):
            n = f'net_res{b}.conv{j}'
            shapes |= modulated_shapes(f'{n}.conv', i if j == 1 else W, W, W)
            shapes |= {f'{n}.noise.weight': (1,), f'{n}.activate.bias': (W,)}
        if i != W:
            shapes[f'net_res{b}.skip.0.weight'] = (W, i, 1, 1)
    return shapes | modulated_shapes('torgb.conv', W, 3, W) | {'torgb.bias': (1, 3, 1, 1)}


def point_block_shapes(name, i, o):
    hidden = min(i, o)
    skip = {f'{name}.shortcut.weight': (o, i)} if i != o else {}
    return layer(f'{name}.fc_0', hidden, i) | layer(f'{name}.fc_1', o, hidden) | skip


def shape_mlp_shapes(W, fields):
    shapes = layer('net_p', W, 3) | layer('net_out', 1, W)
    for b, i in enumerate([fields[0], *(W + f for f in fields[1:]), W], start=1):
        shapes |= point_block_shapes(f'net_res{b}', i, W)
    return shapes


def pointnet_shapes(hidden, blocks, channels, dim=3):
    shapes = layer('fc_pos', 2 * hidden, dim) | layer('fc_c', channels, hidden)
    for b in range(blocks):
        shapes |= point_block_shapes(f'blocks.{b}', 2 * hidden, hidden)
    return shapes


def unet_shapes(c, M, mult, blocks, factors, across=False):
    """`across`: with attention across planes after every block."""
    def block(name, i, o):
        names = 'in_layers.0 in_layers.2 out_layers.0 out_layers.3 skip_connection'
        return block_shapes(name, i, o, names) | layer(f'{name}.emb_layers.1', o, 4 * M)

    def attention(name, c):
        return (layer(f'{name}.norm', c) | layer(f'{name}.qkv', 3 * c, c, 1)
                | layer(f'{name}.proj_out', c, c, 1))

    shapes = layer('time_embed.0', 4 * M, M) | layer('time_embed.2', 4 * M, 4 * M)
    shapes |= layer('input_blocks.0.0', M, c, 3, 3)
    k, h, skips = 1, M, [M]
    for i, m in enumerate(mult):
        for _ in range(blocks):
            shapes |= block(f'input_blocks.{k}.0', h, m * M)
            h = m * M
            if 2 ** i in factors:
                shapes |= attention(f'input_blocks.{k}.1', h)
            k += 1
            skips.append(h)
        if i < len(mult) - 1:
            shapes |= layer(f'input_blocks.{k}.0.op', h, h, 3, 3)
            k += 1
            skips.append(h)
    shapes |= block('middle_block.0', h, h) | attention('middle_block.1', h)
    shapes |= block('middle_block.2', h, h)
    widths = {f'input_attns.{i}': width for i, width in enumerate(skips) if i} | dict(mid_attn=h)
    k = 0
    for i, m in reversed(list(enumerate(mult))):
        for j in range(blocks + 1):
            shapes |= block(f'output_blocks.{k}.0', h + skips.pop(), m * M)
            h = m * M
            if 2 ** i in factors:
                shapes |= attention(f'output_blocks.{k}.1', h)
            if i > 0 and j == blocks:
                n = f'output_blocks.{k}.{2 if 2 ** i in factors else 1}.conv'
                shapes |= layer(n, h, h, 3, 3)
            widths[f'output_attns.{k}'] = h
            k += 1
    for name, width in widths.items() if across else ():
        shapes |= attention_shapes(name, width, kernel=(1,))
    return shapes | layer('out.0', M) | layer('out.2', c, M, 3, 3)


# What the first norms see, those of the decoder's middle among them, is so small that eps shows.
SMALL = ('encoder.conv_in', 'encoder.to_patch', 'decoder.conv_in', 'decoder.mid.*(conv2|proj_out)',
         'decoder.up.3.block.*conv2', 'input_blocks.0.0', 'input_blocks.1.0.out_layers.3')


def random_tensors(shapes, seed):
    """Weights that keep the variance; those of equalised layers are of variance 1."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        equalised = len(shape) == 5 or 'modulation' in name or 'skip.0' in name
        if len(shape) > 1 and not equalised and name.endswith('weight'):
            x = x / math.prod(shape[1:]) ** 0.5
        if len(shape) == 1:
            x = 0.3 * x + name.endswith(('modulation.bias', '.weight'))
        tensors[name] = 0.03 * x if re.match('|'.join(SMALL), name) else x
    return tensors


def diffusion_state(c, seed, **unet):
    state = {f'model.{k}': v for k, v in random_tensors(unet_shapes(c, **unet), seed).items()}
    generator = torch.Generator().manual_seed(seed)
    places = [1] if unet.get('across') else [1, 1]
    state['mixing_logit'] = torch.randn(1, c, *places, generator=generator)
    bar = alpha_bars().float()
    beta = 1 - alpha_bars() / F.pad(alpha_bars()[:-1], (1, 0), value=1)
    return state | dict(betas=beta.float(), alphas_cumprod=bar, sqrt_alphas_cumprod=bar.sqrt(),
                        sqrt_one_minus_alphas_cumprod=(1 - bar).sqrt())


def second_stage(diffusion, averaged, **others):
    """What is around the networks in their ldm-last.pt."""
    ema = {'initted': torch.tensor(True), 'step': torch.tensor(7)}
    ema |= {f'online_model.{k}': v for k, v in diffusion.items()}
    ema |= {f'ema_model.{k}': v for k, v in averaged.items()}
    return dict(step=3, current_iters=99, diffusion=diffusion, ema=ema, scaler=None,
                dae_opt=dict(state={}, param_groups=[dict(lr=1e-4, params=[0, 1])]), **others)


IMAGE_UNET = dict(M=64, mult=(1, 2), blocks=2, factors=(2,))  # 128 channels: 4 heads of 32
SHAPE_UNET = dict(M=64, mult=(1,), blocks=1, factors=())


def image_checkpoint():
    shapes = autoencoder_shapes(3, ch=64, mult=(1, 2, 2), blocks=2, z=12, E=8, field=16)
    return second_stage(diffusion_state(8, 3, **IMAGE_UNET), diffusion_state(8, 4, **IMAGE_UNET),
                        vaemodel=random_tensors(shapes, 1),
                        mlp=random_tensors(picture_mlp_shapes(48, [16, 16, 16]), 2))


def shape_checkpoint():
    shapes = autoencoder_shapes(20, ch=32, mult=(1, 1, 2, 2), blocks=2, z=12, E=8, field=16,
                                planes=3, joined=(1,))
    return second_stage(diffusion_state(24, 8, **SHAPE_UNET), diffusion_state(24, 9, **SHAPE_UNET),
                        vaemodel=random_tensors(shapes, 5),
                        mlp=random_tensors(shape_mlp_shapes(40, [16, 16, 16]), 6),
                        pointnet=random_tensors(pointnet_shapes(12, 3, 20), 7))


def first_stage(state):
    """Their model-last.pt of the same networks."""
    others = {} if 'pointnet' in state else dict(opt_d={}, criterion_2d={})
    name = 'vaemodel' if 'quant_conv.weight' not in state['vaemodel'] else 'model'
    kept = {k: state[k] for k in ('pointnet', 'mlp') if k in state}
    sn = {torch.Size([64, 3]): torch.randn(2, 3)}
    return dict(step=1, current_iters=5, opt={}, scaler=None, opt_sched={}, sn=sn, **others,
                **{name: state['vaemodel']}, **kept)


CONFIG_CLASSES = {'base': ('ContainerMetadata', 'Metadata'), 'dictconfig': ('DictConfig',),
                  'listconfig': ('ListConfig',), 'nodes': ('AnyNode',)}


@contextlib.contextmanager
def omegaconf():
    """OmegaConf as far as a pickle names it, while it lasts: a function to wrap values with."""
    classes, modules = {}, {'omegaconf': types.ModuleType('omegaconf')}
    for part, names in CONFIG_CLASSES.items():
        module = modules[f'omegaconf.{part}'] = types.ModuleType(f'omegaconf.{part}')
        for name in names:
            classes[name] = type(name, (), dict(__module__=module.__name__))
            setattr(module, name, classes[name])

    def wrapped(value, parent=None):
        kind = {dict: 'DictConfig', list: 'ListConfig'}.get(type(value), 'AnyNode')
        node = classes[kind]()
        node._metadata = classes['Metadata' if kind == 'AnyNode' else 'ContainerMetadata']()
        node._metadata.resolver_cache = collections.defaultdict(dict)
        node._parent = parent
        if isinstance(value, dict):
            node._content = {k: wrapped(v, node) for k, v in value.items()}
        elif isinstance(value, list):
            node._content = [wrapped(v, node) for v in value]
        else:
            node._val = value
        return node

    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield wrapped
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def save(path, state, head=None, resolution=None):
    """Write a checkpoint; with a resolution, it has args as theirs, maybe the width of a head."""
    with omegaconf() as wrapped:
        if resolution:
            heads = dict(num_head_channels=head) if head else {}
            root = wrapped(dict(unetconfig=dict(channel_mult=[1, 2], kind=typing.Any, **heads),
                                ddconfig=dict(resolution=resolution, attn_type='vanilla')))
            state = dict(state, args=argparse.Namespace(
                exp='ldm', resolution=resolution, unetconfig=root._content['unetconfig'],
                ddconfig=root._content['ddconfig']))
        torch.save(state, path)
    return path


# ---- their networks ----------------------------------------------------------------------------

def count(s, pattern):
    return next(n for n in itertools.count() if pattern.format(n) not in s)


def conv(s, name, x, padding=None, **options):
    w = s[f'{name}.weight']
    padding = w.shape[-1] // 2 if padding is None else padding
    return F.conv2d(x, w, s[f'{name}.bias'], padding=padding, **options)


def linear(s, name, x):
    return F.linear(x, s[f'{name}.weight'], s.get(f'{name}.bias'))


def normed(s, name, x, eps=1e-6):
    return F.group_norm(x, 32, s[f'{name}.weight'], s[f'{name}.bias'], eps)


def residual(s, name, x):
    h = conv(s, f'{name}.conv1', F.silu(normed(s, f'{name}.norm1', x)))
    h = conv(s, f'{name}.conv2', F.silu(normed(s, f'{name}.norm2', h)))
    return h + (conv(s, f'{name}.nin_shortcut', x) if f'{name}.nin_shortcut.bias' in s else x)


def pointwise(s, name, x):
    return F.conv1d(x, s[f'{name}.weight'].flatten(2), s[f'{name}.bias'])


def attention(s, name, x, heads=1):
    """Over all places of x (B,C,...); the eps of the norm is 1e-6."""
    h = normed(s, f'{name}.norm', x).flatten(2)
    q, k, v = (pointwise(s, f'{name}.{n}', h).unflatten(1, (heads, -1)) for n in 'qkv')
    weights = (q.mT @ k / q.shape[2] ** 0.5).softmax(-1)  # (B, heads, to, from)
    return x + pointwise(s, f'{name}.proj_out', (v @ weights.mT).flatten(1, 2)).view_as(x)


def each(f, planes):
    return {name: f(p) for name, p in planes.items()}


def joint(planes, order=None):
    return torch.cat([planes[p].flatten(2) for p in order or planes], 2)


def split(z, sizes):
    """The planes of a joint latent (B,C,L); without `sizes` z is the only one."""
    if not sizes:
        return {'': z}
    parts = z.split([h * w for h, w in sizes.values()], 2)
    return {name: x.unflatten(2, size) for (name, size), x in zip(sizes.items(), parts)}


def across(s, name, planes, heads):
    """Attention over the places of all planes, in their order, if there are such weights."""
    if f'{name}.q.weight' not in s:
        return planes
    return split(attention(s, name, joint(planes), heads),
                 {n: p.shape[2:] for n, p in planes.items()})


def joined(s, block1, attn, block2, planes):
    """Across the planes, if there are such weights; `planes` are in the order of PAIRS."""
    if f'{block1}.norm1.weight' not in s:
        return planes
    h = residual(s, block1, torch.cat([planes[p] for p in PAIRS], 1))
    h = residual(s, block2, attention(s, attn, h))
    return dict(zip(PAIRS, h.chunk(3, 1)))


def middle(s, name, planes):
    for layer_, part in ((residual, 'block_1'), (attention, 'attn_1'), (residual, 'block_2')):
        planes = each(lambda x: layer_(s, f'{name}.mid.{part}', x), planes)
    return joined(s, f'{name}.mid.block_3', f'{name}.mid_attn', f'{name}.mid.block_4', planes)


def moments(s, planes):
    """{plane: (mean, log variance)} of a dict of planes, {'': pictures} for pictures."""
    planes = each(lambda x: conv(s, 'encoder.conv_in', x), planes)
    for i in range(count(s, 'encoder.down.{}.block.0.norm1.weight')):
        n = f'encoder.down.{i}'
        for j in range(count(s, n + '.block.{}.norm1.weight')):
            planes = each(lambda x: residual(s, f'{n}.block.{j}', x), planes)
        planes = joined(s, *(f'{n}.inter_attn.{k}' for k in range(3)), planes)
        if f'{n}.downsample.conv.weight' in s:
            planes = each(lambda x: conv(s, f'{n}.downsample.conv', F.pad(x, (0, 1, 0, 1)), 0,
                                         stride=2), planes)
    planes = each(lambda x: conv(s, 'encoder.conv_out', F.silu(normed(s, 'encoder.norm_out', x))),
                  middle(s, 'encoder', planes))
    both = {p: conv(s, f'quant_conv{"_" * bool(p)}{p}', x) for p, x in planes.items()}
    return {p: (m.chunk(2, 1)[0], m.chunk(2, 1)[1].clamp(-30, 20)) for p, m in both.items()}


def decoded(s, z):
    """Fields, coarse to fine, a list for each plane, of latent planes."""
    planes = {p: conv(s, f'post_quant_conv{"_" * bool(p)}{p}', x) for p, x in z.items()}
    planes = middle(s, 'decoder', each(lambda x: conv(s, 'decoder.conv_in', x), planes))
    return levels(s, planes, lambda n, planes: joined(s, *(f'{n}.{k}' for k in range(3)), planes))


def levels(s, planes, join, flat=()):
    """The decoder after its middle; planes in `flat` are not enlarged along the height."""
    fields = {p: [] for p in planes}
    for i in reversed(range(count(s, 'decoder.up.{}.block.0.norm1.weight'))):
        n = f'decoder.up.{i}'
        for j in range(count(s, n + '.block.{}.norm1.weight')):
            planes = each(lambda x: residual(s, f'{n}.block.{j}', x), planes)
        planes = join(f'{n}.inter_attn', planes)
        for p, x in planes.items():
            if f'{n}.hdbf.0.weight' in s:
                fields[p].append(conv(s, f'{n}.hdbf.0', x))
            if i == 0:
                h = F.silu(normed(s, 'decoder.norm_out', x))
                fields[p].append(conv(s, 'decoder.conv_out', h))
        if i > 0:
            planes = {p: conv(s, f'{n}.upsample.conv', x.repeat_interleave(2, 3)
                              .repeat_interleave(1 if p in flat else 2, 2))
                      for p, x in planes.items()}
    return fields


def look_up(fields, coords, align_corners):
    """(B,N,C) of each field at coords (1,N,2) or (B,N,2)."""
    return [F.grid_sample(f, coords.expand(len(f), -1, -1)[:, None], padding_mode='border',
                          align_corners=align_corners)[:, :, 0].mT for f in fields]


def style_of(s, scale):
    W = s['time_mlp.1.weight'].shape[0]
    angles = scale * 10000 ** (-torch.arange(W // 8) / (W // 8 - 1))
    x = torch.cat([angles.sin(), angles.cos()])[None]
    return linear(s, 'time_mlp.3', F.gelu(linear(s, 'time_mlp.1', x)))


def modulated(s, name, x, style, demodulate=True):
    v, n = s[f'{name}.weight'][0, :, :, 0, 0], x.shape[-1]
    a = F.linear(style, s[f'{name}.modulation.weight'] / style.shape[1] ** 0.5,
                 s[f'{name}.modulation.bias'])
    u = v * a / n ** 0.5
    if demodulate:
        u = u / ((v * a).square().sum(1, keepdim=True) / n + 1e-8).sqrt()
    return x @ u.T


def colours(s, fields, coords, scale):
    """(B,N,3) of the fields of pictures, and the hidden states."""
    style, states = style_of(s, scale), []
    pe = [torch.cat([p, torch.full_like(p[..., :2], scale)], -1)
          for p in look_up(fields, coords, False)]
    for b in range(1, len(pe) + 2):
        x = torch.cat(states[-1:] + pe[b - 1:b], -1)
        h = x
        for j in (1, 2, 3):
            h = modulated(s, f'net_res{b}.conv{j}.conv', h, style)
            h = 2 ** 0.5 * F.leaky_relu(h + s[f'net_res{b}.conv{j}.activate.bias'], 0.2)
        skip = s.get(f'net_res{b}.skip.0.weight')
        if skip is not None:
            x = x @ skip[:, :, 0, 0].T / x.shape[-1] ** 0.5
        states.append((h + x) / 2 ** 0.5)
    rgb = modulated(s, 'torgb.conv', states[-1], style, demodulate=False)
    return rgb + s['torgb.bias'].view(3), states


def point_block(s, name, x):
    h = linear(s, f'{name}.fc_1', linear(s, f'{name}.fc_0', x.relu()).relu())
    return h + (linear(s, f'{name}.shortcut', x) if f'{name}.shortcut.weight' in s else x)


def point_planes(s, points, R):
    """Planes (B,C,R,R) of points in [-0.5, 0.5]."""
    u = (points / (2 * HALF_BOX) + 0.5).clamp(0, 1 - 1e-5)
    cell = (u * R).floor().long()
    cells = {p: cell[..., a] + R * cell[..., b] for p, (a, b) in AXES.items()}
    h = point_block(s, 'blocks.0', linear(s, 'fc_pos', points))
    for b in range(1, count(s, 'blocks.{}.fc_0.weight')):
        pooled = torch.zeros_like(h)
        for item, index in itertools.product(range(len(h)), cells.values()):
            for c in index[item].unique():
                here = index[item] == c
                pooled[item, here] += h[item, here].amax(0)
        h = point_block(s, f'blocks.{b}', torch.cat([h, pooled], -1))
    h = linear(s, 'fc_c', h)
    planes = {p: h.new_zeros(len(h), R * R, h.shape[2]) for p in AXES}
    for p, item in itertools.product(AXES, range(len(h))):
        for c in cells[p][item].unique():
            planes[p][item, c] = h[item, cells[p][item] == c].mean(0)
    return {p: x.mT.unflatten(2, (R, R)) for p, x in planes.items()}


def logits(s, fields, points):
    """(B,N) at points in [-0.55, 0.55]."""
    u = (points / (2 * HALF_BOX) + 0.5).clamp(0, 1 - 1e-5)
    pe = [sum(level) for level in zip(*(look_up(fields[p], 2 * u[..., AXES[p]] - 1, True)
                                        for p in PAIRS))]
    h = point_block(s, 'net_res1', pe[0]) + linear(s, 'net_p', points)
    for b, p in enumerate(pe[1:], start=2):
        h = point_block(s, f'net_res{b}', torch.cat([h, p], -1))
    return linear(s, 'net_out', point_block(s, f'net_res{len(pe) + 1}', h))[..., 0]


def unet(s, z, t, head, sizes=None):
    """F(z, t) for times t (B,), with attention heads of `head` channels; keys without `model.`

    `sizes` of the planes if z joins several, which go through it each for itself, but for `across`.
    """
    M = s['time_embed.0.weight'].shape[1]
    angles = t[:, None] * 10000 ** (-torch.arange(M // 2) / (M / 2))
    emb = linear(s, 'time_embed.0', torch.cat([angles.cos(), angles.sin()], 1))
    emb = linear(s, 'time_embed.2', F.silu(emb))

    def one(name, h):
        if f'{name}.in_layers.0.weight' in s:
            x = conv(s, f'{name}.in_layers.2', F.silu(normed(s, f'{name}.in_layers.0', h, 1e-5)))
            x = x + linear(s, f'{name}.emb_layers.1', F.silu(emb))[..., None, None]
            x = conv(s, f'{name}.out_layers.3', F.silu(normed(s, f'{name}.out_layers.0', x, 1e-5)))
            skip = f'{name}.skip_connection'
            return x + (conv(s, skip, h) if f'{skip}.weight' in s else h)
        if f'{name}.qkv.weight' in s:
            x = F.conv1d(normed(s, f'{name}.norm', h, 1e-5).flatten(2), s[f'{name}.qkv.weight'],
                         s[f'{name}.qkv.bias'])
            q, k, v = x.unflatten(1, (-1, 3, head)).unbind(2)  # (B, heads, head, tokens)
            x = v @ (q.mT @ k / head ** 0.5).softmax(-1).mT
            x = F.conv1d(x.flatten(1, 2), s[f'{name}.proj_out.weight'], s[f'{name}.proj_out.bias'])
            return h + x.view_as(h)
        if f'{name}.op.weight' in s:
            return conv(s, f'{name}.op', h, stride=2)
        if f'{name}.conv.weight' in s:
            return conv(s, f'{name}.conv', h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return conv(s, name, h) if f'{name}.weight' in s else h

    def block(name, attn, planes):
        for j in range(3):
            planes = each(lambda x: one(f'{name}.{j}', x), planes)
        return across(s, attn, planes, 16)

    planes, skips = split(z, sizes), []
    names = {k.rsplit('.', 1)[0] for k in s}
    for k in range(1 + max(int(n.split('.')[1]) for n in names if n.startswith('input_blocks'))):
        planes = block(f'input_blocks.{k}', f'input_attns.{k}', planes)
        skips.append(planes)
    planes = block('middle_block', 'mid_attn', planes)
    for k in range(len(skips)):
        skip = skips.pop()
        planes = {p: torch.cat([x, skip[p]], 1) for p, x in planes.items()}
        planes = block(f'output_blocks.{k}', f'output_attns.{k}', planes)
    planes = each(lambda x: conv(s, 'out.2', F.silu(normed(s, 'out.0', x, 1e-5))), planes)
    return joint(planes).view_as(z)


def alpha_bars():
    a, b = 0.0015 ** 0.5, 0.0195 ** 0.5
    return (1 - (a + (b - a) * torch.arange(1000, dtype=torch.float64) / 999) ** 2).cumprod(0)


def prediction(s, z, t, *form):
    """F and eps of the state of a diffusion process; `form` is what `unet` takes besides."""
    f = unet({k.removeprefix('model.'): v for k, v in s.items() if k.startswith('model.')}, z, t,
             *form)
    c = s['mixing_logit'].sigmoid()
    sigma = (1 - alpha_bars()[t]).sqrt().float().view(-1, *[1] * (z.dim() - 1))
    return f, (1 - c) * sigma * z + c * f


def ddim(s, z, calls, *form):
    bars = F.pad(alpha_bars(), (1, 0), value=1).float()  # of -1, ..., 999
    times = [1000 * i // calls - 1 for i in range(calls, -1, -1)]
    for t, after in itertools.pairwise(times):
        _, eps = prediction(s, z, torch.full((len(z),), t), *form)
        z_0 = (z - (1 - bars[t + 1]).sqrt() * eps) / bars[t + 1].sqrt()
        z = bars[after + 1].sqrt() * z_0 + (1 - bars[after + 1]).sqrt() * eps
    return z


# ---- the first stage ---------------------------------------------------------------------------

def close(ours, theirs, tolerance=1e-4):
    """Equal to so much of the largest value."""
    assert ours.shape == theirs.shape
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= tolerance * scale, f'{error:.3g} of {scale:.3g}'


def loaded(load, path):
    """What `load` makes of a file of theirs, which must not be refused."""
    try:
        return load(path)
    except ValueError as error:
        pytest.fail(f'refused: {error}')


def averaged(state):
    return {k.removeprefix('ema_model.'): v for k, v in state['ema'].items()
            if k.startswith('ema_model.')}


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A checkpoint of pictures with heads of 32 channels: its state and its file."""
    state = image_checkpoint()
    path = save(tmp_path_factory.mktemp('pictures') / 'ldm-last.pt', state, resolution=32)
    return types.SimpleNamespace(state=state, path=path)


@pytest.fixture(scope='module')
def solids(tmp_path_factory):
    """A checkpoint of shapes with heads of 16 channels: its state and its file."""
    state = shape_checkpoint()
    path = save(tmp_path_factory.mktemp('solids') / 'ldm-last.pt', state, 16, 32)
    return types.SimpleNamespace(state=state, path=path)


def random_input(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid(h, w):
    """Centres of h x w pixels, (h,w,2), x first."""
    y, x = (((2 * torch.arange(n) + 1) / n - 1) for n in (h, w))
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1)


@pytest.mark.mutation('ldm.py', "field_channels=state['decoder.conv_out.weight'].shape[0], "
                      'norm_groups=32', "field_channels=state['decoder.conv_out.weight'].shape[0], "
                      'norm_groups=0')
@pytest.mark.mutation('vae.py', 'regroup(self, c.norm_groups, 1e-6)',
                      'regroup(self, c.norm_groups, 1e-5)')
@pytest.mark.mutation('encoders.py', '(x.shape[3] % 2, x.shape[2] % 2)', '(1, 1)')
@pytest.mark.mutation('ldm.py', "torch.cat([found[name], value]) if layer == 'v'",
                      "torch.cat([value, found[name]]) if layer == 'v'")
@pytest.mark.mutation('ldm.py', 'inner_channels=inner', 'inner_channels=0')
@pytest.mark.mutation('ldm.py', "[f'block.{j}' for j in range(blocks)]\n    if",
                      "[f'block.{j and blocks - j}' for j in range(blocks)]\n    if")
@torch.no_grad()
def test_pictures_are_encoded_and_decoded_as_theirs(pictures):
    model, _ = loaded(ldm.load_vae, pictures.path)
    weights = pictures.state['vaemodel']
    for x in (random_input(2, 3, 32, 32), random_input(1, 3, 16, 28)):
        posterior = model.encode(x)
        mean, logvar = moments(weights, {'': x})['']
        close(posterior.mean, mean.flatten(2))
        close(posterior.logvar, logvar.flatten(2))
        noise = random_input(*mean.shape, seed=1)
        z = mean + (logvar / 2).exp() * noise
        close(posterior.sample(noise.flatten(2)), z.flatten(2))
        kl = (mean ** 2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)) / 2
        close(posterior.kl(), kl)
        xi = model.decode(z.flatten(2), posterior.sizes)
        for ours, theirs in zip(xi, decoded(weights, {'': z})[''], strict=True):
            close(ours['xy'], theirs)


@pytest.mark.mutation('inr.py', 'pe = [torch.cat([p, s.expand', 'pe = [torch.cat([p, 0 * s.expand')
@pytest.mark.mutation('inr.py', 'plain.style, plain.fixed = None, scale',
                      'plain.style, plain.fixed = None, torch.ones_like(scale)')
@pytest.mark.mutation('inr.py', 'if self.demodulate:', 'if not self.demodulate:')
@pytest.mark.mutation('inr.py', 'k = torch.arange(n) / (n - 1)', 'k = torch.arange(n) / n')
@pytest.mark.mutation('inr.py', 'torch.cat([angles.sin(), angles.cos()], dim=1)',
                      'torch.cat([angles.cos(), angles.sin()], dim=1)')
@pytest.mark.mutation('ldm.py', "f'{new}.weight': weight / weight.shape[1] ** 0.5",
                      "f'{new}.weight': weight")
@pytest.mark.mutation('ldm.py', "skip.weight'] = weight / weight.shape[1] ** 0.5",
                      "skip.weight'] = weight")
@pytest.mark.mutation('ldm.py', "state[f'{old}.modulation.weight'] / width ** 0.5",
                      "state[f'{old}.modulation.weight']")
@pytest.mark.mutation('ldm.py', "put('torgb.conv', 'mlp.out', state['torgb.bias'].flatten())",
                      "put('torgb.conv', 'mlp.out', 0 * state['torgb.bias'].flatten())")
@torch.no_grad()
def test_colours_are_theirs_at_every_period(pictures):
    model, _ = loaded(ldm.load_vae, pictures.path)
    weights = pictures.state['mlp']
    fields = [random_input(2, 16, n, n, seed=n) for n in (8, 16, 32)]
    xi = [{'xy': f} for f in fields]

    def theirs(coords, scale):
        points = coords.reshape(1, -1, 2)
        return colours(weights, fields, points, scale)[0].unflatten(1, coords.shape[:-1])
    for size, scale in ((32, 1), (48, 2 / 3), (64, 1 / 2), (16, 2)):
        expected = theirs(grid(size, size), scale)
        close(model.query(xi, grid(size, size), scale), expected)
        close(model.query(xi, grid(size, size)), expected)
        picture = model.render(xi, (size, size), antialias=False)
        close(picture, expected.permute(0, 3, 1, 2))
    crop = grid(64, 64)[5:20, 11:47]
    close(model.query(xi, crop, 0.5), theirs(crop, 0.5))
    box = ((2 * 11 / 64 - 1, 2 * 47 / 64 - 1), (2 * 5 / 64 - 1, 2 * 20 / 64 - 1))
    close(model.render(xi, (15, 36), box, antialias=False),
          theirs(crop, 0.5).permute(0, 3, 1, 2))
    points = 2.2 * torch.rand(100, 2) - 1.1
    close(model.query(xi, points, 0.7), theirs(points, 0.7))
    with pytest.raises(AssertionError):  # the period matters
        close(model.query(xi, points, 0.7), theirs(points, 1.0))
    first = model.function([{'xy': f[:1]} for f in fields])
    close(first(points, 0.7), theirs(points, 0.7)[0])


def in_box(points):
    """Places of the data in units of our box."""
    return points / HALF_BOX


def cloud(seed=0, n=150):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, n, 3, generator=generator) - 0.5


@pytest.mark.mutation('ldm.py', 'PUBLISHED_BOX = 0.550005', 'PUBLISHED_BOX = 0.5')
@pytest.mark.mutation('ldm.py', "('points.proj_in.weight', 'mlp.coords.weight')",
                      "('mlp.coords.weight',)")
@pytest.mark.mutation('encoders.py', 'x.unflatten(0, (-1, self.planes)).flatten(1, 2)',
                      'x.unflatten(0, (-1, self.planes)).flip(1).flatten(1, 2)')
@pytest.mark.mutation('encoders.py', 'return h.unflatten(1, (self.planes, -1)).flatten(0, 1)',
                      'return x')
@pytest.mark.mutation('ldm.py', "'decoder', stem, 'decoder.stem')",
                      "'encoder', stem, 'decoder.stem')")
@pytest.mark.mutation('ldm.py', 'joined=(*[0] * len(middle), *', 'joined=(*[0] * 0, *')
@pytest.mark.mutation('ldm.py', "'_yz': 'yz', '_xz': 'xz'", "'_yz': 'xz', '_xz': 'yz'")
@torch.no_grad()
def test_clouds_become_their_moments(solids):
    model, _ = loaded(ldm.load_vae, solids.path)
    points = cloud()
    planes = point_planes(solids.state['pointnet'], points, 32)
    for name, ours in model.points(in_box(points)).items():
        close(ours, planes[name])
    posterior, theirs = model.encode(in_box(points)), moments(solids.state['vaemodel'], planes)
    for i, values in enumerate((posterior.mean, posterior.logvar)):
        for name, ours in zip(PAIRS, values.unflatten(2, (3, 4, 4)).unbind(2)):
            close(ours, theirs[name][i])
    z = {name: random_input(2, 8, 4, 4, seed=n) for n, name in enumerate(PAIRS)}
    xi = model.decode(inr.pack(z))
    for name, fields in decoded(solids.state['vaemodel'], z).items():
        for ours, field in zip(xi, fields, strict=True):
            close(ours[name], field)


@pytest.mark.mutation('ldm.py', "align_corners=True, mlp_block='pre'",
                      "align_corners=False, mlp_block='pre'")
@pytest.mark.mutation('ldm.py', "('points.proj_in.weight', 'mlp.coords.weight')",
                      "('points.proj_in.weight',)")
@pytest.mark.mutation('inr.py', 'return self.skip(x) + self.fc1(F.relu(self.fc0(F.relu(x))))',
                      'return self.skip(x) + self.fc1(F.relu(self.fc0(x)))')
@pytest.mark.mutation('ldm.py', 'PUBLISHED_BOX = 0.550005', 'PUBLISHED_BOX = 0.55')
@pytest.mark.mutation('vae.py', 'align_corners=self.config.align_corners)', 'align_corners=False)')
@pytest.mark.mutation('ldm.py', 'threshold=0.2', 'threshold=0.5')
@torch.no_grad()
def test_logits_are_theirs(solids):
    model, info = loaded(ldm.load_vae, solids.path)
    assert (model.config.extent, model.config.threshold) == (HALF_BOX, 0.2)
    fields = {p: [random_input(2, 16, n, n, seed=n + i) for n in (8, 16, 32)]
              for i, p in enumerate(PAIRS)}
    xi = [{p: fields[p][level] for p in PAIRS} for level in range(3)]
    points = 1.1 * torch.rand(2, 300, 3) - 0.55
    theirs = logits(solids.state['mlp'], fields, points)
    close(model.query(xi, in_box(points))[..., 0], theirs)
    close(model.inside(xi, in_box(points)), theirs)
    first = model.function([{p: f[:1] for p, f in level.items()} for level in xi])
    close(first(in_box(points[0]))[..., 0], theirs[0])


# ---- the second stage --------------------------------------------------------------------------

def as_ours(z):
    """Their joint latent (B,C,h,w) or (B,3C,h,w), in the order of LATENT, as ours (B,C,L)."""
    if z.shape[1] == 8:
        return z.flatten(2)
    planes = dict(zip(LATENT, z.chunk(3, 1)))
    return torch.stack([planes[p] for p in PAIRS], 2).flatten(2)


def assert_predictions(model, state, shape, *form):
    """F, eps and five calls of DDIM are those of the state of a diffusion process."""
    z = random_input(2, *shape)
    for t in (torch.tensor([0, 250]), torch.tensor([999, 999])):
        f, eps = prediction(state, z, t, *form)
        close(model.unet(as_ours(z), t), as_ours(f))
        close(model.eps(as_ours(z), t), as_ours(eps))
    made, calls = ldm.sample(model.eps, as_ours(z), 'ddim', 5)
    assert calls == 5
    close(made, as_ours(ddim(state, z, 5, *form)))


@pytest.mark.mutation('ldm.py', 'symmetric_pad=True', 'symmetric_pad=False')
@pytest.mark.mutation('ldm.py', 'norm_groups=32,\n        norm_eps=1e-5',
                      'norm_groups=0, norm_eps=1e-5')
@pytest.mark.mutation('ldm.py', 'norm_eps=1e-5, across_heads', 'norm_eps=1e-6, across_heads')
@pytest.mark.mutation('ldm.py', "'video' else 32))", "'video' else 16))")
@pytest.mark.mutation('ldm.py', "'video' else 32))", "'video' else 64))")
@pytest.mark.mutation('ldm.py', '(heads, 3, -1)).unbind(1)', '(3, heads, -1)).unbind(0)')
@pytest.mark.mutation('ldm.py', 'torch.cat(kv).flatten(0, 1)', 'torch.cat(kv[::-1]).flatten(0, 1)')
@pytest.mark.mutation('ldm.py', 'torch.cat([angles.cos(), angles.sin()], dim=1)',
                      'torch.cat([angles.sin(), angles.cos()], dim=1)')
@pytest.mark.mutation('ldm.py', 'torch.cat([x, skip], dim=1)', 'torch.cat([skip, x], dim=1)')
@pytest.mark.mutation('ldm.py', "'ema_model.')", "'online_model.')")
@pytest.mark.mutation('ldm.py', "logit = state['mixing_logit'].flatten()",
                      "logit = -state['mixing_logit'].flatten()")
@pytest.mark.mutation('ldm.py', '- 1 for i in range(steps, 0, -1)', 'for i in range(steps, 0, -1)')
@torch.no_grad()
def test_noise_in_latents_of_pictures_is_theirs(pictures):
    _, model, _ = loaded(ldm.load, pictures.path)
    assert_predictions(model, averaged(pictures.state), (8, 8, 8), 32)


@pytest.mark.mutation('ldm.py', "def side_by_side(x, order=('xy', 'xz', 'yz'))",
                      "def side_by_side(x, order=('xy', 'yz', 'xz'))")
@pytest.mark.mutation('ldm.py', 'stem = side_by_side(weights', "stem = (lambda x: x.unflatten(0, "
                      "(3, -1)).transpose(0, 1))(weights")
@pytest.mark.mutation('ldm.py', 'by_channel(weights), side_by_side(logit)',
                      "by_channel(weights), side_by_side(logit, ('xy', 'yz', 'xz'))")
@pytest.mark.mutation('ldm.py', "('out.weight', 'out.bias')}", "('out.weight',)}")
@pytest.mark.mutation('ldm.py', "('out.weight', 'out.bias')}", "('out.bias',)}")
@pytest.mark.mutation('ldm.py', 'for s, n in zip(share.split(1, 2), self.cells)]',
                      'for s, n in zip(share.split(1, 2)[::-1], self.cells)]')
@torch.no_grad()
def test_noise_in_latents_of_shapes_is_theirs(solids):
    _, model, _ = loaded(ldm.load, solids.path)
    assert_predictions(model, averaged(solids.state), (24, 4, 4), 16)


# ---- files -------------------------------------------------------------------------------------

def without(state, name, **changes):
    return {k: v for k, v in {**state, **changes}.items() if k != name}


@pytest.mark.mutation('ldm.py', " or state.get('diffusion')", '')
@pytest.mark.mutation('common.py', "'ldm': 'diffusion'}", "'ldm': 'other'}")
@pytest.mark.mutation('common.py', "for name in ('vae', 'mlp', 'ldm', 'pointnet')",
                      "for name in ('vae', 'mlp', 'ldm')")
@torch.no_grad()
def test_files_without_averages_and_with_prefixes(solids, tmp_path):
    """Loaded are the last weights; parts may be prefixes in one dict."""
    state = solids.state
    parts = dict(vae='vaemodel', mlp='mlp', ldm='diffusion', pointnet='pointnet')
    flat = {f'{a}.{k}': v for a, b in parts.items() for k, v in state[b].items()}
    plain = without(state, 'ema')
    for name, content in (('plain', plain), ('flat', flat)):
        path = save(tmp_path / f'{name}.pt', content)
        _, model, _ = loaded(ldm.load, path)
        weights = {k.removeprefix('model.'): v for k, v in state['diffusion'].items()}
        torch.testing.assert_close(model.unet.time[0].weight, weights['time_embed.0.weight'])
        close(model.mixing_logit, as_ours(state['diffusion']['mixing_logit']))
    path = save(tmp_path / 'raw.pt', plain, 16, 32)
    assert_predictions(loaded(ldm.load, path)[1], state['diffusion'], (24, 4, 4), 16)


def equal_networks(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.mutation('common.py', "state.get('vaemodel', state.get('model'))",
                      "state.get('vaemodel')")
@pytest.mark.mutation('ldm.py', '64 if points else 256))', '256))')
@pytest.mark.mutation('ldm.py', '64 if points else 256))', '64))')
def test_first_stages_are_the_same_networks(pictures, solids, tmp_path):
    """model-last.pt, which has no configuration, holds what ldm-last.pt holds."""
    for run, resolution in ((pictures, 256), (solids, 64)):
        path = save(tmp_path / 'model-last.pt', first_stage(run.state))
        one, info = loaded(ldm.load_vae, path)
        two, _ = loaded(ldm.load_vae, run.path)
        assert equal_networks(one, two)
        assert one.config.resolution == info['args']['resolution'] == resolution
        assert ldm.open_checkpoint(run.path, 'vae')['kind'] == 'vae'
        with pytest.raises(ValueError, match='stage 1 only'):
            ldm.load(path)


@pytest.mark.mutation('ldm.py', "return int(getattr(value, '_val', value))", 'return int(default)')
@pytest.mark.mutation('common.py', "'listconfig.ListConfig', 'nodes.AnyNode'", "'nodes.AnyNode'")
@pytest.mark.mutation('common.py', "(typing.Any, 'typing.Any'), *(", '*(')
@pytest.mark.parametrize('flag', [dict(initted=torch.tensor(1.0), step=torch.tensor([7])), {}])
def test_configurations_load_without_their_package(pictures, tmp_path, flag):
    """What no tensor says is read from them; an EMA may be of either form."""
    ema = {**pictures.state['ema'], **flag}
    path = save(tmp_path / 'ldm-last.pt', {**pictures.state, 'ema': ema}, 16, 48)
    assert b'omegaconf' in path.read_bytes() and 'omegaconf' not in sys.modules
    model, network, _ = loaded(ldm.load, path)
    assert model.config.resolution == 48 and network.config.head_channels == 16
    assert network.config.planes == dict(xy=[12, 12])
    path = save(tmp_path / 'bare.pt', pictures.state)
    assert loaded(ldm.load, path)[1].config.head_channels == 32


@pytest.mark.mutation('ldm.py', "['vae_config']['scale_injection']:",
                      "['vae_config']['coord_input']:")
@pytest.mark.mutation('ldm.py', "kind != 'ldm' and state['vae_config']", "state['vae_config']")
def test_what_is_left_out_is_said_once(pictures, solids, capsys):
    for run, times in ((pictures, 1), (solids, 0)):
        ldm.load(run.path)
        assert capsys.readouterr().out.count('noise of its read-out is left out') == times
        for kind in ('vae', 'ldm'):  # as train_ldm.py reads its --vae and its --init
            ldm.open_checkpoint(run.path, kind)
        assert capsys.readouterr().out.count('noise of its read-out is left out') == times


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def refused(path, *words):
    """Loading gives one line that has all words."""
    for load in (ldm.load, ldm.load_vae):
        with pytest.raises((ValueError, OSError)) as error:
            load(path)
        assert '\n' not in str(error.value)
        for word in (str(path), *words):
            assert word in str(error.value)


@pytest.mark.mutation('common.py', 'map_location=device, weights_only=True',
                      'map_location=device, weights_only=False')
@pytest.mark.parametrize('function', [os.system, exec, Path.touch, getattr])
def test_nothing_in_a_file_is_executed(pictures, tmp_path, function):
    marker = tmp_path / 'executed'
    args = {os.system: (f'touch {marker}',), exec: (f'open({str(marker)!r}, "w")',),
            Path.touch: (marker,), getattr: (Call(exec, f'open({str(marker)!r}, "w")'), 'x')}
    bad = Call(function, *args[function])
    for n, content in enumerate((dict(pictures.state, args=bad), dict(pictures.state, step=bad))):
        torch.save(content, tmp_path / f'{n}.pt')
        with contextlib.suppress(ValueError):
            ldm.load(tmp_path / f'{n}.pt')
            pytest.fail('it loads')
        assert not marker.exists()
        refused(tmp_path / f'{n}.pt', 'not a checkpoint')


def test_truncated_and_foreign_files_are_refused(pictures, tmp_path):
    data = pictures.path.read_bytes()
    for n, share in enumerate((0.0, 0.3, 0.999)):
        (tmp_path / f'{n}.pt').write_bytes(data[:int(share * len(data))])
        refused(tmp_path / f'{n}.pt', 'not a checkpoint')
    for content in ({}, dict(model={}), dict(state_dict=pictures.state['vaemodel']), [1],
                    dict(vaemodel=torch.ones(2), mlp={}), pictures.state['vaemodel'],
                    dict(pictures.state, vaemodel={1: 2}), dict(pictures.state, pointnet=[]),
                    dict(pictures.state, pointnet={'fc_pos.weight': 5})):
        torch.save(content, tmp_path / 'foreign.pt')
        refused(tmp_path / 'foreign.pt')
    torch.save(dict(pictures.state, vaemodel={}, mlp={}), tmp_path / 'empty.pt')
    refused(tmp_path / 'empty.pt')


MISSING = [
    ('pictures', 'vaemodel', 'encoder.down.1.block.1.conv2.bias', 'conv2.bias'),
    ('pictures', 'vaemodel', 'decoder.up.1.hdbf.0.weight', 'heads.2.weight'),
    ('pictures', 'vaemodel', 'encoder.conv_in.weight', 'encoder.conv_in.weight'),
    ('pictures', 'vaemodel', 'quant_conv.weight', 'quant.xy.weight'),
    ('pictures', 'mlp', 'net_res2.skip.0.weight', 'mlp.blocks.1.skip.weight'),
    ('pictures', 'mlp', 'net_res1.conv3.activate.bias', 'net_res1.conv3.activate.bias'),
    ('pictures', 'mlp', 'torgb.conv.modulation.bias', 'torgb.conv.modulation.bias'),
    ('pictures', 'ema', 'ema_model.model.input_blocks.1.0.emb_layers.1.weight', 'emb.weight'),
    ('pictures', 'ema', 'ema_model.model.middle_block.1.qkv.bias', 'attention.q.bias'),
    ('pictures', 'ema', 'ema_model.model.out.0.bias', 'out_norm.bias'),
    ('pictures', 'ema', 'ema_model.mixing_logit', 'mixing_logit'),
    ('solids', 'vaemodel', 'encoder.mid.block_3.norm1.weight', 'norm1.weight'),
    ('solids', 'vaemodel', 'decoder.up.1.inter_attn.1.norm.bias', 'norm.bias'),
    ('solids', 'pointnet', 'fc_pos.weight', 'proj_in.weight'),
    ('solids', 'mlp', 'net_p.bias', 'coords.bias')]


@pytest.mark.parametrize('run, part, name, word', MISSING, ids=[m[2] for m in MISSING])
def test_a_missing_tensor_is_named(request, tmp_path, run, part, name, word):
    state = request.getfixturevalue(run).state
    assert name in state[part]
    torch.save({**state, part: without(state[part], name)}, tmp_path / 'ldm-last.pt')
    with pytest.raises(ValueError) as error:
        ldm.load(tmp_path / 'ldm-last.pt')
    assert '\n' not in str(error.value)
    assert word in str(error.value) and 'ldm-last.pt' in str(error.value)


@pytest.mark.mutation('ldm.py', ".shape[1] == 3, f'{path}: a radiance",
                      ".shape[1] > 0, f'{path}: a radiance")
def test_other_domains_are_refused_with_the_reason(solids, tmp_path):
    points = random_tensors(pointnet_shapes(12, 3, 20, dim=6), 0)
    torch.save(dict(solids.state, pointnet=points), tmp_path / 'nerf.pt')
    refused(tmp_path / 'nerf.pt', 'radiance field', 'linear')


# ---- use ---------------------------------------------------------------------------------------

def picture(path):
    return np.asarray(Image.open(path).convert('RGB')).astype(float)


@pytest.fixture
def at_work(pictures, tmp_path):
    """A folder with the file of pictures and some data."""
    (tmp_path / 'set').mkdir()
    for n in range(8):
        noise = (255 * torch.rand(32, 32, 3)).byte().numpy()
        Image.fromarray(noise).save(tmp_path / f'set/{n}.png')
    (tmp_path / 'ldm-last.pt').symlink_to(pictures.path)
    return tmp_path


FAST = '--device cpu --amp off --batch 2 --steps 1 --warmup 1'


def rendered(state, z):
    """Bytes of the pictures (B,32,32,3) of latents (B,8,8,8)."""
    fields = decoded(state['vaemodel'], {'': z})['']
    rgb, _ = colours(state['mlp'], fields, grid(32, 32).view(1, -1, 2), 1.0)
    return 127.5 * (rgb.clamp(-1, 1) + 1).unflatten(1, (32, 32)).numpy()


def assert_pictures(folder, expected, bound):
    """The pictures of one item in a folder, in the order of their names, are these to `bound`."""
    made = [picture(p) for p in sorted(folder.rglob('*.png'))]
    made = [p for p in made if p.shape == expected[0].shape]
    for ours, theirs in zip(made, expected, strict=True):
        assert theirs.std() > 20 and np.abs(ours - theirs).max() < bound


@pytest.mark.mutation('train_ldm.py', "for part in ('vae', 'ema')}", "for part in ('vae',)}")
@torch.no_grad()
def test_files_of_theirs_are_sampled_and_made_slim(at_work, pictures, repo):
    state, sampling = pictures.state, '--num 2 --res 32 --steps 2 --device cpu --sampler ddim'
    done(at_work, 'train_ldm.py', '--vae ldm-last.pt --slim small.pt', repo=repo)
    model, network, _ = ldm.load(pictures.path)
    values = sum(v.numel() for part in (model, network) for v in part.state_dict().values())
    assert 2 * values < (at_work / 'small.pt').stat().st_size < 2.2 * values
    noise = ldm.initial_noise([0, 1], (8, 64)).unflatten(2, (8, 8))
    expected = rendered(state, ddim(averaged(state), noise, 2, 32))
    for name, bound in (('ldm-last', 1), ('small', 6)):  # halves
        done(at_work, 'sample.py', f'--run {name}.pt --out {name} {sampling}', repo=repo)
        assert_pictures(at_work / name, expected, bound)


@pytest.mark.mutation('encoders.py', '(x.shape[3] % 2, x.shape[2] % 2)', '(1, 1)')
@torch.no_grad()
def test_pictures_are_reconstructed_by_files_of_theirs(at_work, pictures, repo):
    done(at_work, 'sample.py', '--run ldm-last.pt --reconstruct set/3.png --res 32 --out back '
         '--device cpu', repo=repo)
    x = torch.from_numpy(picture(at_work / 'set/3.png')).float().permute(2, 0, 1) / 127.5 - 1
    mean, _ = moments(pictures.state['vaemodel'], {'': x[None]})['']
    assert_pictures(at_work / 'back', rendered(pictures.state, mean), 1)


@pytest.mark.mutation('ldm.py', 'extent=PUBLISHED_BOX', 'extent=0.5')
@pytest.mark.mutation('ldm.py', 'threshold=0.2', 'threshold=0.5')
@torch.no_grad()
def test_surfaces_lie_where_theirs_do(solids, tmp_path, repo):
    """Vertices of a sample are in their units, where the occupancy of the same latent is 0.2."""
    noise = ldm.initial_noise([0], (8, 48)).unflatten(2, (3, 4, 4)).unbind(2)
    noise = torch.cat([dict(zip(PAIRS, noise))[p] for p in LATENT], 1)
    z = ddim(averaged(solids.state), noise, 2, 16)
    fields = decoded(solids.state['vaemodel'], dict(zip(LATENT, z.chunk(3, 1))))
    places = 1.1 * torch.rand(1, 1000, 3) - 0.55
    values = logits(solids.state['mlp'], fields, places)
    mlp = dict(solids.state['mlp'])  # half of the box is inside
    mlp['net_out.bias'] = mlp['net_out.bias'] + math.log(0.2 / 0.8) - values.median()
    path = save(tmp_path / 'half.pt', {**solids.state, 'mlp': mlp}, 16, 32)
    done(tmp_path, 'sample.py', f'--run {path} --num 1 --res 24 --steps 2 --device cpu '
         '--sampler ddim', repo=repo)
    vertices = torch.from_numpy(data.read_mesh(tmp_path / 'out/24/000000.obj')[0]).float()
    inner = vertices[vertices.abs().amax(1) < 0.54]  # the box closes the surface
    assert len(inner) > 500
    off = logits(mlp, fields, inner[None]) - math.log(0.2 / 0.8)
    assert off.abs().mean() < 0.1 * values.std()


VAE_FLAGS = ('--resolution 32 --ch 64 --ch_mult 1,2,2 --decoder_ch 64 --decoder_mult 2,2,1 '
             '--field_channels 16 --mlp_width 48 --mlp_layers 3 --z_channels 8 --num_res_blocks 2')
LDM_FLAGS = '--ch 64 --ch_mult 1,2 --num_res_blocks 2 --attn_factors 2 --head_channels 32'


def largest_change(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a if not k.startswith(('sn_u', 'z_')))


@pytest.mark.mutation('train_ldm.py', '**{k: about[k] for k in STRUCTURE if k in about})', ')')
@pytest.mark.mutation('train_ldm.py', 'splits=train.splits()', "splits=first['splits']")
@pytest.mark.mutation('train_ldm.py', "common.load_weights(model, start['ema'], path)", 'pass')
@pytest.mark.mutation('train_vae.py', '**structure_of(state or init)', '**structure_of(state)')
@pytest.mark.mutation('train_vae.py', "common.load_weights(model, init['vae'], path)", 'pass')
@pytest.mark.mutation('data.py', "info['splits'] if any(info['splits'].values()) else None",
                      "info['splits']")
def test_files_of_theirs_train_on(at_work, repo):
    """A step of a tiny rate leaves the weights; the result is a run like any other."""
    before, prior, _ = ldm.load(at_work / 'ldm-last.pt')
    done(at_work, 'train_vae.py', f'{FAST} {VAE_FLAGS} --dataset image --data set --name fine '
         '--init ldm-last.pt --lr 1e-9', repo=repo)
    after, _ = ldm.load_vae(at_work / 'runs/fine/vae.pt')
    assert largest_change(before, after) < 1e-6
    flags = f'{FAST} {LDM_FLAGS} --cache none --init ldm-last.pt --lr 1e-9'
    done(at_work, 'train_ldm.py', f'{flags} --vae ldm-last.pt --data set --name on', repo=repo)
    done(at_work, 'train_ldm.py', f'{flags} --vae fine', repo=repo)
    for name in ('on', 'fine'):
        model, network, info = ldm.load(at_work / f'runs/{name}/ldm.pt')
        assert largest_change(before, model) < 1e-6 and largest_change(prior, network) < 1e-6
        for ours, old, names in ((model, before, vae.STRUCTURE), (network, prior, ldm.STRUCTURE)):
            assert all(getattr(ours.config, k) == getattr(old.config, k) for k in names)
        assert len(info['splits']['train']) > 4
        done(at_work, 'sample.py', f'--run runs/{name} --num 1 --res 32 --steps 1 --device cpu '
             f'--out {name}', repo=repo)


# ---- their own numbers -------------------------------------------------------------------------

def published_io(domain, tmp_path):
    """Their inputs and outputs, {name: (vae, ldm)} for both sets of weights, as we load them."""
    with torch.serialization.safe_globals(common.HARMLESS):
        state = torch.load(AUTHORS / domain / 'ldm-last.pt', weights_only=True)
    raw = save(tmp_path / 'raw.pt', without(without(state, 'ema'), 'args'), 16,
               dict(image=32, shapes=16, video=32)[domain])
    models = {name: ldm.load(path)[:2] for name, path in (
        ('ema', AUTHORS / domain / 'ldm-last.pt'), ('diffusion', raw))}
    io = torch.load(AUTHORS / domain / 'io.pt', weights_only=True)
    return io['inputs'], io['outputs'], models


def ancestral_step(z, eps, t):
    """Mean and variance of q(z_(t-1) | z_t, z_0) where eps is the noise in z."""
    bar = float(ldm.alpha_bar(torch.tensor(t)))
    before = float(ldm.alpha_bar(torch.tensor(t - 1))) if t else 1.0
    alpha = bar / before
    z_0 = (z - (1 - bar) ** 0.5 * eps) / bar ** 0.5
    mean = (before ** 0.5 * (1 - alpha) * z_0 + alpha ** 0.5 * (1 - before) * z) / (1 - bar)
    return mean, torch.tensor((1 - alpha) * (1 - before) / (1 - bar))


def assert_io_of_diffusion(inputs, outputs, models, as_ours):
    times = {f't{t}': torch.full((2,), t) for t in (0, 250, 999)} | dict(t_pair=inputs['t_pair'])
    z = as_ours(inputs['z_t'])
    for (name, (_, model)), (suffix, t) in itertools.product(models.items(), times.items()):
        eps = model.eps(z, t)
        close(model.unet(z, t), as_ours(outputs[f'F.{name}.{suffix}']))
        close(eps, as_ours(outputs[f'eps.{name}.{suffix}']))
        if name == 'ema' and suffix != 't_pair':
            mean, variance = ancestral_step(z, eps, int(t[0]))
            close(mean, as_ours(outputs[f'posterior_mean.ema.{suffix}']))
            close(variance, outputs[f'posterior_variance.{suffix}'])
    z_T, bar = inputs['z_T'], ldm.alpha_bar(torch.tensor(250)).float()
    noisy = bar.sqrt() * z_T + (1 - bar).sqrt() * inputs['z_t'][:len(z_T)]
    close(noisy, outputs['q_sample.t250'])
    made, _ = ldm.sample(models['ema'][1].eps, as_ours(z_T), 'ddim', 5)
    close(made, as_ours(outputs['ddim5.z0']))
    for calls in (5, 25, 50, 200, 1000):
        expected = sorted(outputs[f'ddim{calls}.times'].tolist(), reverse=True)
        assert [*ldm.even_times(calls), -1] == expected
    return made


needs_authors = pytest.mark.skipif(not AUTHORS.exists(), reason=f'{AUTHORS} is absent')


@pytest.mark.slow
@needs_authors
@torch.no_grad()
def test_pictures_have_the_published_numbers(tmp_path):
    inputs, outputs, models = published_io('image', tmp_path)
    model = models['ema'][0]
    posterior = model.encode(inputs['x'])
    close(posterior.mean, outputs['mean'].flatten(2))
    close(posterior.logvar, outputs['logvar'].flatten(2))
    close(posterior.kl(), outputs['kl'])
    close(posterior.sample(inputs['noise'].flatten(2)), outputs['z'].flatten(2))
    for ours, theirs in zip(model.decode(outputs['z'].flatten(2)), outputs['fields'], strict=True):
        close(ours['xy'], theirs)
    xi = [{'xy': field} for field in outputs['fields']]
    for name, s in dict(s1=1, s2_3=2 / 3, s1_2=1 / 2, s2=2, crop=1 / 2).items():
        places = outputs[f'coords.{name}'][0].permute(1, 2, 0)
        for scale in (s, None):
            ours = model.query(xi, places, scale).permute(0, 3, 1, 2)
            close(ours, outputs[f'rgb.{name}'])
        if name != 'crop':
            close(model.render(xi, places.shape[:2], antialias=False), outputs[f'rgb.{name}'])
    states = []
    for block in model.mlp.blocks:
        block.register_forward_hook(lambda _, x, y: states.append(y))
    close(model.query(xi, inputs['points'], 0.7), outputs['points.rgb'])
    close(model.mlp.style(torch.tensor([0.7])), outputs['points.style'])
    for ours, theirs in zip([*model.look_up(xi, inputs['points'].expand(2, -1, -1)), *states],
                            [*outputs['points.pe'], *outputs['points.h']], strict=True):
        close(ours, theirs)
    posterior = model.encode(inputs['x_rect'])
    close(posterior.mean, outputs['rect.mean'].flatten(2))
    close(posterior.logvar, outputs['rect.logvar'].flatten(2))
    xi = model.decode(posterior.mean, posterior.sizes)
    for ours, theirs in zip(xi, outputs['rect.fields'], strict=True):
        close(ours['xy'], theirs)
    rgb = model.query(xi, outputs['rect.coords'][0].permute(1, 2, 0), 1)
    close(rgb.permute(0, 3, 1, 2), outputs['rect.rgb'])
    made = assert_io_of_diffusion(inputs, outputs, models, lambda z: z.flatten(2))
    close(model.render(model.decode(made), (32, 32)), outputs['ddim5.rgb'])


@pytest.mark.slow
@needs_authors
@torch.no_grad()
def test_shapes_have_the_published_numbers(tmp_path):
    inputs, outputs, models = published_io('shapes', tmp_path)
    model = models['ema'][0]
    for name, ours in model.points(in_box(inputs['cloud'])).items():
        close(ours, outputs['planes'][name])
    posterior = model.encode(in_box(inputs['cloud']))
    close(posterior.mean, joint(outputs['mean'], PAIRS))
    close(posterior.logvar, joint(outputs['logvar'], PAIRS))
    close(posterior.kl(), outputs['kl'])
    z = posterior.sample(joint(inputs['noise'], PAIRS))
    close(z, joint(outputs['z'], PAIRS))
    close(z, as_ours(outputs['latent.straight']))
    xy, yz, xz = z.chunk(3, 2)
    for way, latent in (('straight', z), ('swapped', torch.cat([xy, xz, yz], 2))):
        close(latent, as_ours(outputs[f'latent.{way}']))
        xi = model.decode(latent)
        for plane, fields in outputs[f'fields.{way}'].items():
            for ours, theirs in zip(xi, fields, strict=True):
                close(ours[plane], theirs)
        close(model.inside(xi, in_box(inputs['points'])), outputs[f'logits.{way}'])
    made = assert_io_of_diffusion(inputs, outputs, models, as_ours)
    close(model.inside(model.decode(made), in_box(inputs['points'])), outputs['ddim5.logits'])
