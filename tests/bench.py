"""Speed and memory, measured in pairs: each case against the first of its table, in one run.

    python tests/bench.py                        # everything; about twenty minutes on 2 idle cores
    python tests/bench.py readout --sizes 128 --repeats 1 --threads 1        # a quick look

The cases of a table take turns, together with a float32 matrix product, so that a change in the
machine's load falls on all of them. Printed are the median seconds, the median of the speeds
relative to the first case in the same round, floating-point operations counted over time, and that
as a share of the best rate the matrix product reached. Peak memory is that of a fresh process in
which only this case ran, less that of one which only imports. On CUDA the same code waits for the
device and reports its memory. One JSON line follows each row.
"""
import argparse
import contextlib
import io
import json
import math
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import data
import encoders
import inr
import ldm
import metrics
import train_ldm
import train_vae
import vae

# Quoted, not measured here: the authors' code, float32, 2 cores with a matrix product of about
# 200 GFLOP/s. Printed in the row of the first case of each table.
QUOTED = {'readout 256': '3.2 s', 'readout 512': '13.6 s, 1.8 GiB', 'vae': '1.59 s',
          'readout 1024': '55 s, 6.2 GiB', 'unet step': '0.57 s', 'unet evaluation': '0.138 s',
          'video encoder': '15.8 s', 'video decoder': '73.9 s', 'video read-out': '30.3 s, 8.4 GiB',
          'video evaluation': '5.0 s with 768 M parameters'}


# ---- measuring -------------------------------------------------------------------------------

def seconds(f, device):
    """Wall-clock seconds of one call, the device's work included."""
    start = time.perf_counter()
    f()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_rate(device):
    """Best FLOP/s of a float32 matrix product over a few sizes, now."""
    rates = []
    for n in (1024, 2048) if device.type == 'cpu' else (4096, 8192):
        a, b = torch.randn(2, n, n, device=device)
        rates += [2 * n ** 3 / seconds(lambda: a @ b, device) for _ in range(4)]
    return max(rates)


def paired(cases, repeats, device):
    """Seconds of each case (name -> call) in each round, after a warm-up; best product rate."""
    for f in cases.values():
        f()
    times, rate = {name: [] for name in cases}, 0.0
    for _ in range(repeats):
        rate = max(rate, product_rate(device))
        for name, f in cases.items():
            times[name].append(seconds(f, device))
    return times, max(rate, product_rate(device))


def peak(device):
    """Largest memory of this process so far, bytes; on CUDA the largest allocated there.

    Linux's VmHWM, because ru_maxrss survives exec: a child begins with its parent's peak.
    """
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    status = Path('/proc/self/status')
    if not status.exists():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(status.read_text().split('VmHWM:')[1].split()[0])


def fresh(args, table='', case=''):
    """(peak bytes, seconds) of a process that runs this case once; case '' is the imports alone."""
    command = [sys.executable, __file__, '--child', table, case, '--threads', str(args.threads),
               '--device', args.device, *['--trim'] * args.trim]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def counted(f):
    """Floating-point operations of a call, convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def report(args, table, only=None, flops=None):
    """Measure a table's cases (or those in `only`), print a row and a JSON line for each: the rows.

    `flops` is what one call must compute; counted case by case if not given.
    """
    device = torch.device(args.device)
    builders = TABLES[table.split()[0]](table, device)
    cases = {name: builders[name]() for name in only or builders}
    flops = {name: flops or counted(f) for name, f in cases.items()}
    times, rate = paired(cases, args.repeats, device)
    base, first = fresh(args)[0], next(iter(times.values()))
    rows = []
    print(f'\n{table}: matrix product {rate / 1e9:.0f} GFLOP/s, {args.threads} threads, {device}, '
          f'{args.repeats} rounds\n{"case":30s}   seconds  speed  GFLOP/s % of mm peak MiB  '
          "authors' code, quoted")
    for name, t in times.items():
        speed = flops[name] / statistics.median(t)
        row = dict(table=table, case=name, seconds=statistics.median(t),
                   speed=statistics.median(a / b for a, b in zip(first, t)), gflops=speed / 1e9,
                   share=100 * speed / rate, product=rate / 1e9,
                   mib=(fresh(args, table, name)[0] - base) / 2 ** 20,
                   quoted=QUOTED.get(table, '') if t is first else '')
        print('{case:30s} {seconds:9.4f} {speed:6.2f} {gflops:8.1f} {share:7.1f} {mib:8.0f}  '
              '{quoted}\n'.format(**row) + json.dumps(row), flush=True)
        rows.append(row)
    return rows


# ---- the read-out ----------------------------------------------------------------------------

def plain_layer(layer, x, style):
    """Eq. 13 as a grouped 1x1 convolution with a matrix for each sample, (B,C,H,W)."""
    weight = layer.weight * layer.affine(style)[:, None]
    if layer.demodulate:
        weight = weight / (weight.square().sum(2, keepdim=True) + 1e-8).sqrt()
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.reshape(-1, x.shape[1], 1, 1),
                 groups=len(x))
    return y.view(len(x), -1, *x.shape[2:]) + layer.bias[:, None, None]


def plain_readout(model, xi, size):
    """The whole picture at once, layer by layer as the formulas stand: (B,3,size,size)."""
    mlp, h = model.mlp, None
    coords = inr.make_grid(size, size, device=xi[0]['xy'].device)
    coords = coords.expand(len(xi[0]['xy']), -1, -1, -1)
    pe = [F.grid_sample(level['xy'], coords, padding_mode='border', align_corners=False)
          for level in xi]
    style = mlp.style(torch.full((len(coords),), model.config.resolution / size,
                                 device=coords.device))
    for i, block in enumerate(mlp.blocks):
        x = pe[0] if i == 0 else torch.cat([h, pe[i]], dim=1) if i < len(pe) else h
        h = x
        for layer in block.layers:
            h = math.sqrt(2) * F.leaky_relu(plain_layer(layer, h, style), 0.2)
        skip = x if block.skip is None else F.conv2d(x, block.skip.weight[..., None, None])
        h = (h + skip) / math.sqrt(2)
    return plain_layer(mlp.out, h, style)


def scaled_input(self, x, style, gain=1.0):
    """ModulatedLinear with the style on x and the norm on the result; the matrix stays as it is."""
    y = F.linear(x * self.affine(style)[:, None], self.weight)
    if self.demodulate:
        y = y * (self.affine(style).square() @ self.weight.T.square() + 1e-8).rsqrt()[:, None]
    return gain * (y + self.bias)


def channels_first(self, x, style, gain=1.0):
    """ModulatedLinear on memory in the order (B,C,N), by matrix products."""
    return torch.baddbmm(self.bias[:, None] * gain, self.modulated(style) * gain, x.mT).mT


def grouped(self, x, style, gain=1.0):
    """ModulatedLinear on memory in the order (B,C,N), by a grouped convolution."""
    weight = self.modulated(style.expand(len(x), -1)) * gain  # (B, out, in)
    y = F.conv1d(x.mT.reshape(1, -1, x.shape[1]), weight.flatten(0, 1)[..., None], groups=len(x))
    return y.view(len(x), -1, x.shape[1]).mT + self.bias * gain


def separable(field, coords, align_corners=False):
    """`inr.sample_field` on a strip of a grid by two matrix products."""
    width = int((coords[0, :, 1] == coords[0, 0, 1]).sum())
    return inr.sample_grid(field, coords[:1, :width, 0], coords[:1, ::width, 1])


leaky_relu = F.leaky_relu

# One thing changed at a time: case -> (object, attribute, replacement), ...
LAYER = inr.ModulatedLinear, 'forward'
UNFOLDED = inr.CFCMLP, 'fixed_scale', lambda self, scale: partial(self, scale=scale)
ABLATION = {
    'modulated anew in each chunk': [UNFOLDED],
    'x scaled, not the matrix': [UNFOLDED, (*LAYER, scaled_input)],
    'channels-first memory': [UNFOLDED, (*LAYER, channels_first)],
    'channels-first, grouped conv': [UNFOLDED, (*LAYER, grouped)],
    'separable look-up': [(inr, 'sample_field', separable)],
    'activation not in place': [(F, 'leaky_relu', lambda x, slope, inplace: leaky_relu(x, slope))],
}
CHUNKS = {f'chunks of {n}': n for n in (1024, 2048, 4096, 8192, 16384, 32768)}


def readout_cases(table, device):
    """'readout SIZE': ways to the same picture."""
    size = int(table.split()[1])
    torch.manual_seed(0)
    # The networks before the read-out are kept small: only the MLP and the fields matter here.
    model = vae.D2CVAE(vae.VAEConfig(ch=32, decoder_ch=32, num_res_blocks=1, z_channels=4,
                                     mlp_layers=3)).to(device).requires_grad_(False)
    for p in model.mlp.parameters():
        p.add_(0.01 * torch.randn_like(p))  # so that no bias is zero
    xi = [dict(xy=torch.randn(1, 64, n, n, device=device).contiguous(
        memory_format=torch.channels_last)) for n in (64, 128, 256)]  # as the decoder leaves them

    def render(chunk=None):
        return model.render(xi, (size, size), antialias=False, chunk=chunk)

    def changed(changes):
        with contextlib.ExitStack() as stack:
            for change in changes:
                stack.enter_context(mock.patch.object(*change))
            return render()

    calls = {'plain': lambda: plain_readout(model, xi, size), 'render': render,
             'whole picture at once': lambda: render(size * size)}
    calls.update({name: partial(changed, changes) for name, changes in ABLATION.items()})
    calls.update({name: partial(render, chunk) for name, chunk in CHUNKS.items()})
    return {name: lambda f=f: f for name, f in calls.items()}


def readout_flops(size):
    """FLOPs of the layers at size x size points; look-ups and modulation are overhead."""
    named = inr.CFCMLP([64] * 3, 3, layers=3).named_parameters()
    layers = [p for name, p in named if p.dim() == 2 and not re.search('affine|style', name)]
    return 2 * size ** 2 * sum(p.numel() for p in layers)


def readout(args):
    """One picture, width 256, 4 blocks of 3 modulated layers, 3 fields of 64 channels."""
    device = torch.device(args.device)
    for size in args.sizes:
        big = device.type == 'cpu' and size > 512 and not args.full
        if not big:
            cases = readout_cases(f'readout {size}', device)
            plain = cases['plain']()()
            for name in ['render', *ABLATION] if size == args.sizes[0] else ['render']:
                torch.testing.assert_close(cases[name]()(), plain, rtol=1e-4, atol=1e-4)
        report(args, f'readout {size}', ['render'] if big else ['plain', 'render'],
               readout_flops(size))
    size = args.sizes[0]
    for only in ([*ABLATION, 'whole picture at once'], CHUNKS):
        report(args, f'readout {size}', ['render', *only], readout_flops(size))


# ---- the networks ----------------------------------------------------------------------------

def small_vae(device):
    """A VAE of about 3 M parameters and a batch of 16 pictures at 64."""
    torch.manual_seed(0)
    model = vae.D2CVAE(vae.VAEConfig(
        resolution=64, ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, z_channels=16, decoder_ch=32,
        field_channels=16, mlp_width=64, mlp_layers=3)).to(device)
    image = torch.rand(16, 3, 64, 64, device=device) * 2 - 1
    box = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]], device=device).expand(16, 2, 2)
    return model, dict(image=image, target=image, box=box, scale=torch.ones(16, device=device))


def small_unet(device):
    """A diffusion model of about 11 M parameters and 32 latents."""
    torch.manual_seed(0)
    model = ldm.LDM(ldm.LDMConfig(z_channels=16, planes=dict(xy=[16, 16]), ch=64,
                                  ch_mult=(1, 2, 4), num_res_blocks=1, attn_factors=(2, 4)))
    return model.to(device), torch.randn(32, *model.shape, device=device)


def training_step(model, loss, device, bf16):
    """A call that does forward (`loss()`, under autocast if bf16), backward and AdamW."""
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            value = loss()
        opt.zero_grad(set_to_none=True)
        value.backward()
        opt.step()
    return step


def vae_cases(table, device):
    """Training steps of the small VAE."""
    def build(bf16, channels_last):
        model, batch = small_vae(device)
        weights = torch.tensor([0.1, 1.0], device=device)
        if not channels_last:
            model.to(memory_format=torch.contiguous_format)
            model.encoder.register_forward_pre_hook(lambda _, x: x[0].contiguous())
            model.decoder.register_forward_pre_hook(
                lambda _, x: ([plane.contiguous() for plane in x[0]], *x[1:]))
        return training_step(model, lambda: model(batch, weights)['total'], device, bf16)
    return {'float32': partial(build, False, True), 'bfloat16': partial(build, True, True),
            'float32, contiguous': partial(build, False, False)}


def unet_cases(table, device):
    """'unet step' and 'unet evaluation' of the small U-Net."""
    def build(bf16, channels_last):
        model, z = small_unet(device)
        if not channels_last:
            model.to(memory_format=torch.contiguous_format)
        t = torch.arange(len(z), device=device) * 31
        if 'step' in table:
            return training_step(model, lambda: model(z), device, bf16)

        def evaluate():
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                model.eps(z, t)
        return evaluate
    return {'float32': partial(build, False, True), 'bfloat16': partial(build, True, True),
            'float32, contiguous': partial(build, False, False),
            'bfloat16, contiguous': partial(build, True, False)}


def stage_cases(table, device):
    """What else a run spends its time on."""
    model, batch = small_vae(device)
    unet, _ = small_unet(device)
    pictures = data.make_dataset('toy_image', None, 'train', resolution=64, scales=(1, 1.5, 2))

    def decode_and_render():
        model.render(model.decode(torch.randn(16, *unet.shape, device=device)), (64, 64))

    calls = {'sample 16, 20 calls': lambda: ldm.generate(model, unet, range(16)),
             'read 16 toy_image items': lambda: [pictures.item(k, common.seeded('bench', k))
                                                 for k in range(16)],
             'encode 16': lambda: model.encode(batch),
             'decode and render 16 at 64': decode_and_render}
    return {name: lambda f=f: torch.no_grad()(f) for name, f in calls.items()}


READ_ITEMS = 32


def grainy_pictures(folder, suffix, count=8):
    """Toy pictures of 1024 x 1024 with grain, so that their files are as large as photographs'."""
    for k in range(count):
        x = data.toy_image([k], 1024)[0]
        x = data.to_uint8((x + 4 / 127.5 * torch.randn(x.shape)).clamp(-1, 1))
        data.save_image(folder / f'{k}{suffix}', Image.fromarray(x.permute(1, 2, 0).numpy()),
                        quality=95)


def reading_cases(table, device):
    """Items as the preset celebahq trains on them, none of them kept in memory."""
    flags = train_vae.build_parser().parse_preset(train_vae.PRESETS, 'celebahq', [])

    def build(suffix, size=0):
        place = tempfile.TemporaryDirectory()
        folder = Path(place.name) / 'set'
        grainy_pictures(folder, suffix)
        if size:
            with contextlib.redirect_stdout(io.StringIO()):
                data.pack(argparse.Namespace(dataset=str(folder), data='', captions='', split='',
                                             group='', size=size, out=f'{folder}.pack'))
            folder = folder.with_suffix('.pack')
        pictures = data.make_dataset('celebahq', folder, 'all', cache_bytes=0,
                                     **data.options_of(vars(flags)))

        def read(place=place):  # which is removed when nobody holds it
            for k in range(READ_ITEMS):
                pictures.item(k % len(pictures), common.seeded('bench', k))
        return read
    return {'PNG, 1024': partial(build, '.png'), 'JPEG of quality 95, 1024': partial(build, '.jpg'),
            'packed at 512': partial(build, '.png', 512),
            'packed at 256, first scale only': partial(build, '.png', 256)}


def reading(args):
    """Items a second that one core reads at r = 256, as each of the loader's workers does."""
    torch.set_num_threads(1)
    rows = report(argparse.Namespace(**dict(vars(args), threads=1)), 'reading')
    torch.set_num_threads(args.threads)
    print(', '.join(f'{row["case"]} {READ_ITEMS / row["seconds"]:,.0f} items a second'
                    for row in rows))


def evaluation_cases(table, device):
    """Stage 1 of celebahq on 64 pictures, by how many are in memory at once."""
    flags = train_vae.build_parser().parse_preset(train_vae.PRESETS, 'celebahq', [])

    @torch.no_grad()
    def build(together):
        model = vae.D2CVAE(common.from_flags(flags, vae.VAEConfig)).to(device).eval()
        pictures = torch.rand(64, 3, 256, 256, device=device) * 2 - 1

        @torch.no_grad()
        def reconstruct():
            for part in pictures.split(together):
                model.show(model.decode(model.encode(part).mean))
        return reconstruct
    return {f'{n} together': partial(build, n) for n in (64, 16, 8)}


def once(args, table):
    """Each case of a table once, in a process of its own: seconds and all of its memory."""
    print(f'\n{table}: matrix product {product_rate(torch.device(args.device)) / 1e9:.0f} GFLOP/s, '
          f'{args.threads} threads, {args.device}')
    for name in TABLES[table](table, torch.device(args.device)):
        memory, taken = fresh(args, table, name)
        print(f'{name:40s} {taken:7.1f} s {memory / 2 ** 20:8.0f} MiB\n' + json.dumps(
            dict(table=table, case=name, seconds=taken, mib=memory / 2 ** 20)), flush=True)


def checkpoint(args):
    """Seconds to write what stage 2 of celebahq saves, on this disk, and its size."""
    flags = train_ldm.build_parser().parse_preset(train_ldm.PRESETS, 'celebahq', [])
    with torch.device('meta'):
        unet = ldm.LDM(common.from_flags(flags, ldm.LDMConfig))
    n = sum(p.numel() for p in unet.parameters())
    state = {k: torch.zeros(n) for k in ('model', 'ema', 'first moments', 'second moments')}
    with tempfile.TemporaryDirectory(dir='.') as folder:
        path = Path(folder) / 'ldm.pt'
        taken = [seconds(lambda: common.save_checkpoint(path, state), torch.device('cpu'))
                 for _ in range(2)]
        print(f'\ncheckpoint: {path.stat().st_size / 2 ** 30:.2f} GiB, {max(taken):.1f} s')


SHARE = dict(vae=50, ldm=25)  # items of a step of celebahq for each of eight processes


def host_cases(table, device):
    """'host vae' and 'host ldm': the random numbers of a step of celebahq on one of 8 processes."""
    stage = table.split()[1]
    share, shape = SHARE[stage], (dict(vae=1, ldm=2)[stage], 64, 4096)
    cases = {'of the whole batch': lambda: torch.randn(8 * share, *shape),
             'of its own rows': lambda: common.row_noise(range(share), ('bench',), device, shape)}
    return {name: lambda call=call: call for name, call in cases.items()}


def host(args):
    """Seconds of a step of celebahq beside the network, on one of 8 processes and one thread.

    Items come from JPEG files, read by the process itself, or packed, by four workers, whose rate
    is four times that of one.
    """
    torch.set_num_threads(1)
    alone = argparse.Namespace(**dict(vars(args), threads=1))
    read = {row['case']: row['seconds'] / READ_ITEMS for row in report(alone, 'reading')}
    for stage, share in SHARE.items():
        whole, own = (row['seconds'] for row in report(alone, f'host {stage}'))
        jpeg, packed = (share * read[case] if stage == 'vae' else 0
                        for case in ('JPEG of quality 95, 1024', 'packed at 512'))
        print(f'{stage}: noise of the whole batch {whole:.2f} s, items of JPEG files {jpeg:.2f}, '
              f'{whole + jpeg:.2f} in all; noise of its own rows {own:.3f} and, beside it, packed '
              f'items {packed / 4:.3f}')
    torch.set_num_threads(args.threads)


def video_cases(table, device):
    """One clip of 16 x 256 x 256 through a part of the networks of the preset skytimelapse."""
    first, second = (script.build_parser().parse_preset(script.PRESETS, 'skytimelapse', [])
                     for script in (train_vae, train_ldm))
    model = vae.D2CVAE(common.from_flags(first, vae.VAEConfig, domain='video')).to(device).eval()
    clip = torch.rand(1, 3, 16, 256, 256, device=device) * 2 - 1
    z = torch.randn(1, 64, 32 * 32 + 2 * 16 * 32, device=device)
    part = table.split()[1]
    if part == 'evaluation':
        unet = ldm.LDM(common.from_flags(second, ldm.LDMConfig, domain='video', z_channels=64,
                                         planes=model.latent_sizes())).to(device).eval()
    calls = dict(
        encoder=lambda: model.encode(dict(video=clip)), decoder=lambda: model.decode(z),
        evaluation=lambda: unet.eps(z, torch.tensor([500], device=device)))
    if part == 'read-out':
        xi = torch.no_grad()(model.decode)(z)
        calls[part] = lambda: model.signal(xi, 256)

    def build(bf16):
        def call():
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                calls[part]()
        return call
    return {'float32': partial(build, False), 'bfloat16': partial(build, True)}


COARSE = (256, 128, 64, 32)  # the first is the dense evaluation


@torch.no_grad()
def held_out_fields(run, count, device):
    """A shape run's first stage and the basis fields of `count` held-out shapes."""
    model, info = ldm.load_vae(run, device)
    shapes = data.open_run_data(info, 'test')
    return model, [model.decode(model.encode(shapes.item(i)['points'][None].to(device)).mean)
                   for i in common.evenly_spaced(len(shapes), count)]


def mesh_cases(table, device):
    """'mesh RUN': the surface of one held-out shape at 256, from several first grids."""
    model, (xi,) = held_out_fields(table.split(maxsplit=1)[1], 1, device)
    return {f'coarse {n}': lambda n=n: torch.no_grad()(partial(model.signal, xi, 256, coarse=n))
            for n in COARSE}


@torch.no_grad()
def missed(run, device, count=8):
    """Share of the dense surface's vertices that each first grid misses, over some shapes."""
    model, shapes = held_out_fields(run, count, device)
    found = {n: [{*map(tuple, model.signal(xi, 256, coarse=n)[0][0].tolist())} for xi in shapes]
             for n in COARSE}
    total = sum(map(len, found[256]))
    return {n: sum(len(a - b) for a, b in zip(found[256], found[n])) / total for n in COARSE[1:]}


def mesh(args):
    """Iso-surface extraction from the field of --run, and what it misses."""
    if args.run:
        report(args, f'mesh {args.run}')
        print('missed of the dense surface: ' + ', '.join(
            f'{share:.3%} from {n}' for n, share in missed(args.run, args.device).items()))


# A network as wide as that of a small run of radiance fields.
SMALL_FIELD = dict(
    domain='nerf', channels=4, resolution=32, point_blocks=3, ch=32, ch_mult=(1, 2),
    num_res_blocks=1, z_channels=16, decoder_ch=32, decoder_mult=(2, 1), fields=(1, 2),
    field_channels=32, mlp_width=64, colour_width=64, coord_input=True, coord_octaves=6,
    scale_injection=False)
STEP_ITEMS, STEP_RAYS = 8, 512


def chair(points):
    """Signed distance (...) from a chair of six boxes, at points (...,3), negative inside."""
    boxes = [((0, 0, 0), (0.45, 0.06, 0.45)), ((0, 0.4, -0.4), (0.45, 0.4, 0.05))]
    boxes += [((x, -0.4, z), (0.06, 0.4, 0.06)) for x in (-0.38, 0.38) for z in (-0.38, 0.38)]
    return torch.stack([((points - points.new_tensor(middle)).abs() - points.new_tensor(
        half)).amax(-1) for middle, half in boxes]).amin(0)


def field_model(device):
    """A network with random weights, whose density is that of a chair, in place of its own."""
    torch.manual_seed(0)
    model = vae.D2CVAE(vae.VAEConfig(**SMALL_FIELD)).to(device)
    density, field = model.density, model.field

    def solid(points):
        return 100 * (-60 * chair(points)).sigmoid()
    model.density = lambda xi, p: 0 * density(xi, p) + solid(p)
    model.field = lambda xi, p, dirs=None: (solid(p), field(xi, p, dirs)[1])
    return model


def field_cases(table, device, size=512):
    """'rays training', a step, and 'rays rendering RUN', a picture of a scene, without RUN a chair.
    """
    _, kind, *run = table.split(maxsplit=2)

    def training(bf16):
        torch.manual_seed(0)
        model = vae.D2CVAE(vae.VAEConfig(**SMALL_FIELD)).to(device)
        rays_d = F.normalize(torch.randn(STEP_ITEMS, STEP_RAYS, 3, device=device), dim=2)
        batch = dict(points=torch.rand(STEP_ITEMS, 2048, 6, device=device) * 2 - 1, rays_d=rays_d,
                     rays_o=-3 * rays_d, target=torch.rand_like(rays_d))
        return training_step(model, lambda: model(batch)['total'], device, bf16)

    def rendering(skip):
        model = field_model(device) if not run else None
        with torch.no_grad():
            if run:
                model, (xi,) = held_out_fields(run[0], 1, device)
            else:
                sizes = model.latent_sizes().values()
                xi = model.decode(torch.randn(1, 16, sum(h * w for h, w in sizes), device=device))
        pose = [inr.orbit(30.0, 20.0, 4.0, model.config.up)]
        return lambda: model.render_views(xi, pose, (size, size), skip=skip)
    if kind == 'training':
        return {'float32': partial(training, False), 'bfloat16': partial(training, True)}
    return {'dense': partial(rendering, False), 'skipping': partial(rendering, True)}


def rays(args):
    """Rays a second in training and in rendering, and by how much skipping changes a picture."""
    run = args.run if 'rays' in args.names else ''  # the other tables take runs of other kinds
    rendering = f'rays rendering {run}'.strip()
    for table, count in (('rays training', STEP_ITEMS * STEP_RAYS), (rendering, 512 ** 2)):
        print(', '.join(f'{row["case"]} {count / row["seconds"]:,.0f} rays a second'
                        for row in report(args, table)))
    dense, skipping = (build()()['rgb'] for build in field_cases(
        rendering, torch.device(args.device), size=128).values())
    print(f'mean difference {(dense - skipping).abs().mean() * 255:.3f} / 255')


def metric_cases(table, device):
    """The metrics at full size; no time depends on the values of weights, pictures or features."""
    def fid():
        net = metrics.InceptionV3(head=False).eval().requires_grad_(False).to(device)
        pictures = metrics.Source(range(10_000), lambda part: [torch.randint(
            256, (len(part), 3, 64, 64), dtype=torch.uint8)], dict(source='', kind='pictures'), 32)
        return lambda: metrics.stats_distance(*[metrics.feature_stats(net, pictures)] * 2)

    def neighbours(n):
        real, fake = (torch.randn(n, 4096, device=device) for _ in range(2))
        return lambda: metrics.precision_recall(real, fake)

    def clouds():
        refs, samples = (torch.rand(200, 2048, 3, device=device) for _ in range(2))
        return lambda: metrics.mmd_cov(refs, samples)
    return {'FID, 10,000 pictures of 64 x 64': fid,
            'precision, recall, 20,000 each of 4,096': partial(neighbours, 20_000),
            'precision, recall, 50,000 each of 4,096': partial(neighbours, 50_000),
            'MMD, COV, 1-NNA, 200 clouds each': clouds}


def even(steps, last):
    """Times from 999 to `last`, evenly spaced: with `last` 1000 / steps - 1 ldm.even_times."""
    return np.linspace(999, last, steps).tolist()


def bent(steps, last, first=999):
    """Times with (sigma / alpha)^(1 / 7) evenly spaced (Karras et al. 2022); before `first`, 999."""
    ends = torch.logit(ldm.alpha_bar(torch.tensor([first, last])))  # ln (alpha / sigma)^2
    roots = np.linspace(*(-ends / 14).exp().tolist(), steps - (first < 999))
    return [999] * (first < 999) + ldm.matched_time(-np.log1p(roots ** 14)).tolist()


GRIDS = [(even, (20, 49), eta) for eta in (0, 1, 1.5, 2)] + [(even, (20, 100), 1.5)]
GRIDS += [(bent, grid, 1.5) for grid in ((20, 49), (20, 120), (20, 49, 800))]


def samplers(args):
    """FID of a run of pictures, --run, by where the calls of sde-dpmpp lie and by its eta."""
    if 'samplers' not in args.names:  # it takes an hour, data and weights
        return
    for spacing, grid, eta in GRIDS:
        print(f'{spacing.__name__} {grid}, eta {eta:g}', flush=True)
        for split, num in (('train', '512'), ('test', '272')):
            with mock.patch.object(ldm, 'even_times', lambda steps: spacing(*grid)):
                metrics.main(['fid', args.run, '--data', args.data, '--split', split, '--num', num,
                              '--num_real', '512', '--samplers', f'sde-dpmpp:{grid[0]}:{eta}'])


@torch.no_grad()
def denoising(args, count=128):
    """Mean |v error|^2 by time of a run, --run, with the condition of an item, none, another's.

    Of latents of training and held-out items; 1 is what v = 0 gets of latents of unit deviation.
    What the condition gains says whether it is heeded, and at which times.
    """
    if 'denoising' not in args.names:  # it takes a run and its data
        return
    vae, model, info = ldm.load(args.run, args.device)
    config, times = model.config, (60, 150, 270, 400, 500, 600, 700, 800, 900, 980)
    reader = config.text and encoders.text_reader(config.text, args.device, config.text_length)
    print(f'{"t":12s}', *(f'{t:6d}' for t in times))
    for split in ('train', 'test'):
        dataset = data.open_run_data(info, split, args.data)
        index = common.evenly_spaced(len(dataset), count)
        batch = common.move(torch.utils.data.default_collate(
            [dataset.view(i, 0) | dataset.known(i) for i in index]), torch.device(args.device))
        noise, _ = common.row_noise(range(len(index)), ('denoising',), args.device,
                                    (2, *model.shape))
        posterior = vae.encode(batch[vae.reads])
        z0, own = posterior.sample(noise[:, 0]), train_ldm.condition_of(batch, config, reader)
        others = {} if own is None else dict(own=own, other=own.roll(len(own) // 2, 0))
        for name, cond in dict(others, none=None).items():
            errors = []
            for t in times:
                at = torch.full((len(z0),), t, device=z0.device)
                alpha, sigma = model.scales(at)
                z_t = alpha * model.normalise(z0) + sigma * noise[:, 1]
                error = (model.eps(z_t, at, cond) - noise[:, 1]) / alpha
                errors.append(error.square().mean().item())
            print(f'{split:6s}{name:6s}', *(f'{e:.4f}' for e in errors), flush=True)


TABLES = dict(readout=readout_cases, vae=vae_cases, unet=unet_cases, stage=stage_cases,
              mesh=mesh_cases, metrics=metric_cases, video=video_cases, rays=field_cases,
              reading=reading_cases, host=host_cases, evaluation=evaluation_cases)
BENCHES = dict(readout=readout, vae=lambda args: report(args, 'vae'),
               unet=lambda args: [report(args, t) for t in ('unet step', 'unet evaluation')],
               stage=lambda args: report(args, 'stage'), mesh=mesh,
               metrics=lambda args: once(args, 'metrics'),
               video=lambda args: [report(args, f'video {part}') for part in (
                   'encoder', 'decoder', 'read-out', 'evaluation')], samplers=samplers, rays=rays,
               denoising=denoising, reading=reading, host=host, checkpoint=checkpoint,
               evaluation=lambda args: once(args, 'evaluation'))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('names', nargs='*', help=f'of {", ".join(BENCHES)}; none = all')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--repeats', type=int, default=5, help='rounds the medians are over')
    parser.add_argument('--sizes', type=common.parse_tuple(int), default=(256, 512, 1024),
                        help='sides of the pictures read out')
    parser.add_argument('--data', default='', help='where the data of --run are, if they '
                        'moved, for samplers and denoising')
    parser.add_argument('--run', default='', help='run of shapes for mesh, of pictures for '
                        'samplers, of radiance fields for rays, of any domain for '
                        'denoising, if this is named')
    parser.add_argument('--full', action='store_true', help='the plain form above 512 on CPU, too')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--child', nargs=2, metavar=('TABLE', 'CASE'), help='run this case once '
                        'and print [peak memory of this process, seconds]')
    parser.add_argument('--trim', action='store_true', help='give freed memory back to the '
                        'system, which the scripts do not (common.keep_freed_memory)')
    args = parser.parse_args()
    if not args.trim:
        common.keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # as for matrix products, with which it is compared
    if torch.device(args.device).index is not None:
        torch.cuda.set_device(args.device)
    unknown = set(args.names) - set(BENCHES)
    common.require(not unknown, f'no bench {", ".join(unknown)}; one of {", ".join(BENCHES)}')
    if args.child:
        (table, case), device, taken = args.child, torch.device(args.device), 0.0
        if case:
            taken = seconds(TABLES[table.split()[0]](table, device)[case](), device)
        print(json.dumps([peak(device), taken]))
        return
    for name in args.names or BENCHES:
        BENCHES[name](args)


if __name__ == '__main__':
    common.run(main)
