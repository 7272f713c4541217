"""What takes a GPU to show: that it computes what a CPU does, and what the paper's runs cost.

    python tests/gpu.py                                  # under 8 minutes on one card, no data
    python tests/gpu.py table --presets celebahq,cifar10
    python tests/gpu.py --train --data DIR               # toy_image, image_64: their full steps
    python tests/gpu.py --device cpu --small             # the same code on small networks

A failed check prints FAILED and makes the exit code 1. The table, in Markdown, is measured on
random data. Parts of a step are timed one by one until the device has finished, so that their sum
is at least what a step takes, but for waiting for data and for other processes. One round is
measured, and a step takes as long as its number of items says. The micro-batches that fit lie on
the line through the peaks of two of them, and are at most a card's items of a step.
"""
import argparse
import contextlib
import copy
import gc
import math
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import bench
import common
import data
import encoders
import inr
import ldm
import sample
import test_presets
import test_scripts
import train_ldm
import train_vae
import vae

TOYS = dict(image='toy_image', shape='toy_shape', video='toy_video', nerf='toy_nerf')
PAPER = ('celebahq', 'afhq_cat', 'image_256', 'lsun_church', 'cifar10', 'celebahq_code',
         'shapenet', 'text2shape', 'skytimelapse', 'srn_cars')
MEMORIES = 24, 40, 80  # GB, of 1e9 bytes
RESERVED = 1.5e9  # bytes that CUDA, its libraries and gaps between tensors take
# Largest differences in float32, over the largest value of the tensor. On a CPU two ways differ by
# 4e-6 and, where a kink of an activation or a loss is met from two sides, 3e-3.
VALUES, GRADIENTS = 1e-4, 2e-2
FAINT = 1e-4  # gradients so far below the largest of all are mostly rounding
HALF = 0.02  # losses in bfloat16
RESUMED = 0.05  # on CUDA, where sums may come in another order and AdamW magnifies it; on a CPU 0


def run(section):
    """Print what a section yields, lines and checks (name, value, limit): how many checks failed.

    An exception ends the section and counts as one.
    """
    failed = 0
    try:
        for found in section():
            if isinstance(found, tuple):
                name, value, limit = found
                good = value <= limit  # NaN is not
                failed += not good
                found = f'{"ok" if good else "FAILED":6s} {name}: {value:.2g}, at most {limit:g}'
            print(found, flush=True)
    except Exception as error:
        traceback.print_exc()
        print(f'FAILED {type(error).__name__}: {common.one_line(error)}', flush=True)
        failed += 1
    release()
    return failed


def release():
    """Give memory that is not used back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def timed(f, device, end=math.inf, repeats=5):
    """Median seconds of a call, after one to warm up; after time `end`, no more than one."""
    bench.seconds(f, device)
    times = [bench.seconds(f, device)]
    while len(times) < repeats and time.perf_counter() < end:
        times.append(bench.seconds(f, device))
    return sorted(times)[len(times) // 2]


# ---- one device against another ----------------------------------------------------------------

@contextlib.contextmanager
def exact():
    """float32 products without TF32, and convolutions that are the same each time."""
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.allow_tf32, cudnn.deterministic
    torch.set_float32_matmul_precision('highest')
    cudnn.allow_tf32, cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32, cudnn.deterministic = before


def difference(a, b, faint=0.0):
    """Largest difference of two trees of tensors, each over the largest value of that in the first.

    Or over `faint` times the largest of all, if that is more. NaN if there is one.
    """
    pairs = [(x.double().cpu(), y.double().cpu())
             for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)]
    largest = torch.stack([x.abs().max() for x, _ in pairs])
    found = torch.stack([(x - y).abs().max() for x, y in pairs])
    return (found / largest.clamp(min=max(faint * largest.max().item(), 1e-30))).max().item()


def compared(what, expected, found):
    """Checks of two dicts of trees by name, of which gradients are called so."""
    for name, tree in expected.items():
        faint, limit = (FAINT, GRADIENTS) if name.endswith('gradients') else (0.0, VALUES)
        yield f'{what} {name}', difference(tree, found[name], faint), limit


def moved(tree, device):
    """The tree with its tensors on the device."""
    return tree_map(lambda x: x.to(device) if torch.is_tensor(x) else x, tree)


def twin(model, device):
    """A copy of a network on the device."""
    return copy.deepcopy(model).to(device)


def toy(domain, steps=1, **flags):
    """Both stages of a toy preset with random weights, and inputs of so many steps: dict."""
    first, second = test_presets.flags_of(TOYS[domain])
    vars(first).update(flags)
    items = train_vae.open_data(first, 'train')
    torch.manual_seed(0)
    one = vae.D2CVAE(common.from_flags(first, vae.VAEConfig, **items.settles()))
    text, second.num_classes = ('bytes', 0) if domain == 'shape' else ('', 3)
    two = test_presets.second_stage(second, one, text)
    for p in (*one.parameters(), *two.parameters()):
        p.data += 0.02 * torch.randn_like(p)  # layers that begin at zero hide those before them
    two.mixing_logit.data.zero_()  # half of eps is the network's
    one.spectral(rounds=40)
    cond = encoders.text_reader(text)(['a chair', 'a lamp']) if text else torch.tensor([0, 2])
    given = dict(cond=cond, z=torch.randn(2, *two.shape), points=torch.rand(2, 500, 3) * 2 - 1,
                 vae=[], ldm=[])
    for rows in train_ldm.blocks(2 * steps, 2):
        batch = [items.item(k, common.seeded('gpu', k)) for k in rows]
        noise, drawn = two.draw(rows, 'gpu')
        given['vae'].append((torch.utils.data.default_collate(batch),
                             torch.tensor([one.config.kl_weight, one.config.sn_end]), noise))
        given['ldm'].append((given['z'], cond, drawn['noise'], drawn['t'],
                             torch.tensor([True, False])))
    return one, two, given


SIGNALS = dict(image=lambda model, xi, points: model.signal(xi, 48),
               shape=lambda model, xi, points: model.inside(xi, points),
               video=lambda model, xi, points: model.signal(xi, 32, frames=3),
               nerf=lambda model, xi, points: model.signal(xi, 12, views=2))


@torch.no_grad()
def values_of(one, two, given):
    """What both stages make of what they are given: tensors by name."""
    z, cond = given['z'], given['cond']
    t = torch.tensor([20, 700], device=z.device)
    posterior, xi = one.eval().encode(given['vae'][0][0]), one.decode(z)
    return dict(encode=[posterior.mean, posterior.logvar], decode=xi,
                signal=SIGNALS[one.domain](one, xi, given['points']),
                eps=[two.eps(z, t), two.eps(z, t, cond)],
                sampling=ldm.generate(one, two, range(2), cond, 1.5, 'dpmpp', 5))


WRITING = dict(image='--res 8 --zoom 0,0,2', shape='--res 12 --turntable',
               video='--res 8 --frames 3', nerf='--res 6 --views 2 --turntable --mesh 8')


def unwritten(model, z):
    """How many of two latents sample.py leaves unwritten."""
    with tempfile.TemporaryDirectory() as out:
        args = sample.build_parser().parse_args(['--out', out, *WRITING[model.domain].split()])
        sample.OUTPUTS[model.domain].write(model, zip(z, 'ab'), sample.parse_sizes(args.res), args,
                                           None)
        return len({'a', 'b'} - {path.stem for path in Path(out).rglob('*')})


def step_of(model, network, inputs):
    """Losses and gradients, by name, of a step of `network`, whose weights are `model`'s."""
    model.train().zero_grad(set_to_none=True)
    losses = network(*inputs)
    losses = losses if isinstance(losses, dict) else dict(total=losses)
    losses['total'].backward()
    return dict(losses={k: v.detach() for k, v in losses.items()},
                gradients={k: p.grad.clone() for k, p in model.named_parameters()})


def domain(name, args, process):
    """The device against the CPU, then a step in bfloat16 against that in float32."""
    here = *models, given = toy(name)
    there = *(twin(model, process.device) for model in models), moved(given, process.device)
    with exact():
        yield from compared(name, values_of(*here), values_of(*there))
        yield f'{name} latents not written', unwritten(there[0], there[2]['z']), 0
        for stage, a, b in zip(('vae', 'ldm'), here, there):
            inputs, other = given[stage][0], there[2][stage][0]
            found = step_of(b, b, other)
            yield from compared(f'{name} {stage}', step_of(a, a, inputs), found)
            with torch.autocast(process.device.type, torch.bfloat16):
                half = step_of(b, b, other)['losses']
            yield f'{name} {stage} losses in bfloat16', difference(found['losses'], half), HALF


def compiler(device):
    """Context in which torch.compile finds graphs and, on a CPU, leaves them as they are."""
    if device.type == 'cuda':
        return contextlib.nullcontext()
    return mock.patch.object(torch, 'compile', partial(torch.compile, backend='eager'))


def compiled(args, process):
    """Steps of both stages with and without torch.compile, over targets of three scales."""
    one, two, given = toy('image', 3, scales=(1.0, 1.5, 2.0), scale_probs=(0.3, 0.3, 0.4))
    for stage, model in ('vae', one), ('ldm', two):
        torch._dynamo.reset()
        counters.clear()
        plain, fast = (twin(model, process.device) for _ in range(2))
        steps = moved(given[stage], process.device)
        with exact(), compiler(process.device):
            network = common.compiled(fast, argparse.Namespace(compile='on'), process)
            for k, inputs in enumerate(steps):
                yield from compared(f'compiled {stage} {k}', step_of(plain, plain, inputs),
                                    step_of(fast, network, inputs))
        yield f'compiled {stage}: graphs', counters['stats']['unique_graphs'], 1
        yield f'compiled {stage}: graph breaks', sum(counters['graph_break'].values()), 0


def resume(args, process):
    """Six steps at once against a stop after four of them and the rest, in both scripts."""
    with tempfile.TemporaryDirectory() as folder, exact():
        for script, flags in (('train_vae.py', test_scripts.VAE),
                              ('train_ldm.py', f'{test_scripts.LDM} --vae runs/straight')):
            flags += f' --device {process.device} --compile off --workers 0 --name'
            test_scripts.done(folder, script, flags, 'straight')
            test_scripts.stopped(folder, script, f'{flags} resumed', 5)
            assert 'continues at step 4' in test_scripts.done(folder, script, flags, 'resumed').out
            straight, resumed = (
                [v for v in test_scripts.trained(Path(folder, 'runs', run, f'{script[6:9]}.pt'))
                 .values() if torch.is_tensor(v)] for run in ('straight', 'resumed'))
            yield (f'{script} resumed; 0 is bit for bit', difference(straight, resumed, FAINT),
                   RESUMED if process.device.type == 'cuda' else 0)


# ---- what the paper's presets cost -------------------------------------------------------------

def flags_of(name, small, compile='off'):
    """The flags of both stages of a preset; if `small`, of a toy with the preset's batch, steps."""
    flags = test_presets.flags_of(name)
    if small:
        toys = test_presets.flags_of(TOYS[data.DATASETS[flags[0].dataset][0].domain])
        flags = [argparse.Namespace(**dict(vars(toy), batch=own.batch, steps=own.steps,
                                           micro_batch=1)) for toy, own in zip(toys, flags)]
    return [argparse.Namespace(**dict(vars(own), compile=compile)) for own in flags]


def random_batch(args, n, device):
    """n items like those of the flags' data set, in the memory from which loaders copy."""
    batch = {k: torch.rand(v.shape) * 2 - 1 for k, v in test_presets.batch_of(args, n).items()}
    if 'box' in batch:
        batch.update(box=torch.tensor([[-1.0, 1.0]] * 2).repeat(n, 1, 1), scale=torch.ones(n))
    if 'rays_d' in batch:
        rays_d = F.normalize(batch['rays_d'], dim=2)
        batch.update(rays_d=rays_d, rays_o=-3 * rays_d)  # through the centre of the box
    return {k: v.pin_memory() if device.type == 'cuda' else v for k, v in batch.items()}


class FirstStage:
    """The parts of a step of train_vae.py; `once` comes once in a step, the others each round."""

    title, parts = 'VAE', ('host', 'train', 'once')

    def __init__(self, flags, process):
        self.first, self.args, self.process = flags[0], flags[0], process
        self.model = test_presets.first_stage(self.args).to(process.device)
        self.network = common.compiled(self.model, self.args, process)
        self.spectral = common.compiled(lambda: self.model.spectral(), self.args, process)
        self.opt = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.weights = torch.empty(2, device=process.device)

    def load(self, n):
        """Have n items ready."""
        self.rows, self.held = range(n), random_batch(self.first, n, self.process.device)

    def host(self):
        """Noise, schedules, the batch on the device."""
        c, device = self.model.config, self.process.device
        common.set_lr(self.opt, common.lr_at(0, self.args))
        for weight, value in zip(self.weights, vae.annealed(0, self.args.steps, c)):
            weight.fill_(value)
        shape = c.z_channels, sum(h * w for h, w in self.model.latent_sizes().values())
        self.noise, _ = common.row_noise(self.rows, ('posterior', 0), device, shape)
        self.batch = common.move(self.held, device)

    def train(self):
        """Forward and backward without the spectral term; gradients add up, as over rounds."""
        with self.process.autocast():
            losses = self.network(self.batch, self.weights, self.noise, 0.0)
        losses['total'].backward()

    def once(self):
        """The spectral term, clipping, AdamW."""
        (self.weights[1] * self.spectral() / self.model.config.n_ref).backward()
        common.clip_gradients(self.model, self.args.clip)
        self.opt.step()


class SecondStage(FirstStage):
    """The same of train_ldm.py without a cache of latents."""

    title, parts = 'LDM', ('host', 'encode', 'train', 'once')

    def __init__(self, flags, process):
        (self.first, self.args), self.process = flags, process
        self.vae = test_presets.first_stage(self.first).to(process.device).requires_grad_(False)
        with torch.device(process.device):  # a CPU would draw its weights for long
            self.model = test_presets.second_stage(self.args, self.vae).to(process.device)
        self.encoder = train_ldm.encoder(self.vae.eval(), self.args, process)
        self.network = common.compiled(self.model, self.args, process)
        self.opt = torch.optim.AdamW(self.model.param_groups(
            self.args.lr, self.args.weight_decay, self.args.mixing_lr_mult), fused=True)
        self.ema = common.EMA(self.model)

    def host(self):
        common.set_lr(self.opt, common.lr_at(0, self.args))
        self.noise, self.drawn = self.model.draw(self.rows, 'diffusion', 0)
        read = {self.vae.reads: self.held[self.vae.reads]}
        self.batch = common.move(read, self.process.device)

    def encode(self):
        """Latents of the batch."""
        self.z, _ = train_ldm.latents_of(self.batch, self.encoder, self.noise)

    def train(self):
        with self.process.autocast():
            loss = self.network(self.z, None, **self.drawn)
        loss.backward()

    def once(self):
        """Clipping, AdamW, the average."""
        common.clip_gradients(self.model, self.args.clip)
        self.opt.step()
        self.ema.update(1)


def peak_of(stage, n):
    """Largest memory of a step of one round of n items, of which the second has all moments."""
    stage.load(n)
    for _ in range(2):
        if stage.process.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        for part in stage.parts:
            getattr(stage, part)()
    return bench.peak(stage.process.device)


def measure(kind, flags, process, seconds):
    """Seconds by part of a round of a card's items, and peak bytes by items.

    Both are empty if the items do not fit. The second peak is of half of them or, for one, of two.
    Compiled networks would be compiled anew for a second number of items: they have one peak.
    """
    end, times, peaks = time.perf_counter() + seconds, {}, {}
    with contextlib.suppress(torch.OutOfMemoryError):
        stage = kind(flags, process)
        n = test_presets.items_of(stage.args)
        peaks[n] = peak_of(stage, n)
        times = {k: timed(getattr(stage, k), process.device, end) for k in stage.parts}
        if stage.args.compile == 'off':
            peaks[n // 2 or 2] = peak_of(stage, n // 2 or 2)
    return times, peaks


def largest(peaks, room):
    """Items at once in so many bytes, by the line through two peaks."""
    (a, low), (b, high) = sorted(peaks.items())
    return max(0, math.floor(a + (room - low) * (b - a) / max(high - low, 1)))


def seconds_of(times, n, items):
    """Seconds by part of a step of so many items, by those of a round of n."""
    return {k: v if k == 'once' else v * items / n for k, v in times.items()}


HEADER = ('| preset | stage | compile | items, micro-batch | host | encode | forward, backward | '
          'optimiser | seconds a step | peak GB | micro-batch in 24 / 40 / 80 GB | hours, 1 card | '
          '8 cards |\n' + '|---' * 13 + '|')


def row(name, title, args, times, peaks):
    """The table's line of a stage, by what `measure` found."""
    n, share = test_presets.items_of(args), max(args.batch // test_presets.GPUS, 1)
    cells = [f'`{name}`', title, args.compile, f'{share}, {n}']
    if not times:
        return ' | '.join(['', *cells, 'does not fit this card', *[''] * 9]).strip()
    parts, alone = seconds_of(times, n, share), seconds_of(times, n, args.batch)
    step, fits = sum(parts.values()), '-'
    if len(peaks) == 2:
        fits = ' / '.join(str(min(share, largest(peaks, 1e9 * memory - RESERVED)))
                          for memory in MEMORIES)
    cells += [f'{parts[k]:.3f}' if k in parts else '-'
              for k in ('host', 'encode', 'train', 'once')]
    cells += [f'{step:.3f}', f'{peaks[n] / 1e9:.1f}', fits]
    cells += [f'{args.steps / 3600 * seconds:.1f}' for seconds in (sum(alone.values()), step)]
    return f'| {" | ".join(cells)} |'


def rows(name, compile, known, args, process):
    """Both lines of a preset; `known` keeps what was measured of the same networks."""
    flags = flags_of(name, args.small, compile)
    same = next(names for names in test_presets.PARAMETERS if flags[0].preset in names)
    for kind, own in zip((FirstStage, SecondStage), flags):
        key = same, kind, compile, test_presets.items_of(own)
        if key not in known:
            torch._dynamo.reset()
            release()
            with compiler(process.device):
                known[key] = measure(kind, flags, process, args.seconds)
        yield row(name, kind.title, own, *known[key])


def product_rate(device, dtype):
    """TFLOP/s of a product of two matrices."""
    n = 8192 if device.type == 'cuda' else 512
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2e-12 * n ** 3 / timed(lambda: a @ b, device)


def head(args, process):
    """What the table was measured on, and its first lines."""
    rates = [product_rate(process.device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    yield (f'\n{process.describe()}, torch {torch.__version__}, {rates[0]:.1f} TFLOP/s of float32 '
           f'products as training has them, {rates[1]:.1f} of bfloat16:\n\n{HEADER}')


# ---- which way is faster -----------------------------------------------------------------------

def faster(what, times):
    """The line that says which of the named seconds are least."""
    return (f'       {what}: ' + ', '.join(f'{k} {1e3 * v:.2f} ms' for k, v in times.items())
            + f'; {min(times, key=times.get)} is faster')


def look_up(args, process):
    """The look-up of picture presets, with its gradient, by two products and by grid_sample."""
    device = process.device
    for name in ('celebahq', 'lsun_church', 'cifar10'):
        c, _ = flags_of(name, args.small)
        n, r = test_presets.items_of(c), c.resolution
        line = inr.cell_centres(r, torch.tensor([[-1.0, 1.0]] * n, device=device))  # (n, r)
        grid = inr.make_grid(r, r, device=device).flatten(0, 1).expand(n, -1, -1)
        for dtype in torch.float32, torch.bfloat16:
            sides = [r * f // c.fields[-1] for f in c.fields]
            xi = [torch.randn(n, c.field_channels, side, side, device=device, dtype=dtype)
                  .to(memory_format=torch.channels_last).requires_grad_() for side in sides]
            ways = {'two products': lambda: [inr.sample_grid(x, line, line) for x in xi],
                    'grid_sample': lambda: [inr.sample_field(x, grid) for x in xi]}
            slopes = [torch.randn_like(p) for p in ways['grid_sample']()]
            yield faster(f'look-up of {name}, {n} x {r} x {r}, {dtype}', {
                way: timed(lambda: torch.autograd.grad(f(), xi, slopes), device)
                for way, f in ways.items()})


def layout(args, process):
    """A round of celebahq with weights and activations in either order, not compiled."""
    for kind in FirstStage, SecondStage:
        times = {}
        for order in torch.channels_last, torch.contiguous_format:
            stage = kind(flags_of('celebahq', args.small), process)
            stage.model.to(memory_format=order)
            if kind is FirstStage and order == torch.contiguous_format:  # it is fed the other
                stage.model.encoder.register_forward_pre_hook(lambda _, x: x[0].contiguous())
                stage.model.decoder.register_forward_pre_hook(
                    lambda _, x: ([plane.contiguous() for plane in x[0]], *x[1:]))
            stage.load(4)
            for part in stage.parts[:-2]:
                getattr(stage, part)()
            times[str(order)] = timed(stage.train, process.device)
            del stage
            release()
        yield faster(f'{kind.title} of celebahq, forward and backward of 4', times)


# ---- the command -------------------------------------------------------------------------------

def train(args, process):
    """Both scripts on toy_image and, if there are data, image_64: minutes and last figures."""
    for name in ['toy_image', *['image_64'] * bool(args.data)]:
        run_name, own = f'{name}_gpu', ['--dataset', 'image', '--data', args.data]
        for stage, flags in (('vae', ['--preset', name, *own * (name == 'image_64')]),
                             ('ldm', ['--vae', run_name])):
            start = time.perf_counter()
            subprocess.run([sys.executable, ROOT / f'train_{stage}.py', *flags, '--name', run_name,
                            '--device', args.device, '--restart'], check=True)
            minutes = (time.perf_counter() - start) / 60
            log = common.read_log(common.run_folder(run_name) / 'log.jsonl')
            last = [v for v in log if v['stage'] == stage and 'lr' not in v][-1]
            yield f'       {name}, {minutes:.1f} minutes: {last}'


CHECKS = dict({name: partial(domain, name) for name in TOYS}, compiled=compiled, resume=resume,
              look_up=look_up, layout=layout)


def sections(args):
    """The generators that the flags ask for, of (args, process)."""
    if args.train:
        return [train]
    found, known = [CHECKS[name] for name in args.names or CHECKS if name != 'table'], {}
    if 'table' in args.names or not args.names:
        found += [head, *(partial(rows, name, 'off', known) for name in args.presets),
                  *(partial(rows, name, 'on', known) for name in args.compile)]
    return found


def build_parser():
    """Every flag."""
    def names(text):
        return [name for name in text.split(',') if name]
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('names', nargs='*', help=f'of {", ".join(CHECKS)}, table; none = all')
    parser.add_argument('--device', default='cuda', help='what is checked against the CPU')
    parser.add_argument('--small', action='store_true', help='toy networks in the table')
    parser.add_argument('--presets', type=names, default=PAPER, help='rows of the table')
    parser.add_argument('--compile', type=names, default=['celebahq'],
                        help='presets that come once more, compiled')
    parser.add_argument('--seconds', type=float, default=10, help='time after which parts of a '
                        'stage are not repeated')
    parser.add_argument('--train', action='store_true', help='only train toy_image and, with '
                        '--data, image_64 to their full steps')
    parser.add_argument('--data', default='', help='the pictures of image_64')
    return parser


def main(argv=None):
    args, start = build_parser().parse_args(argv), time.perf_counter()
    for given, known in ((args.names, [*CHECKS, 'table']),
                         ([*args.presets, *args.compile], [*train_vae.PRESETS])):
        common.require({*given} <= {*known}, f'{", ".join(given)}: of {", ".join(known)}')
    process = common.start_process(args.device, 'auto')
    if process.device.index is not None:
        torch.cuda.set_device(process.device)
    print(f'{process.describe()}, torch {torch.__version__}', flush=True)
    failed = sum(run(partial(section, args, process)) for section in sections(args))
    print(f'\n{failed} failed, {time.perf_counter() - start:.0f} seconds')
    sys.exit(failed > 0)


if __name__ == '__main__':
    common.run(main)
