"""Variants of stage 1 for pictures, each trained alone for equal time: PSNR, rFID, KL.

    python tests/ablate_vae.py baseline gradient-1 features+lr-2e-3 --data DIR [flags of train_vae]
    python tests/ablate_vae.py baseline --data DIR --seed 1 --steps 1800
    python tests/ablate_vae.py l2 --data DIR --steps 250 --init RUN --kl_start 0.05 --sn_start 0.1

The last goes on from a trained run, where fewer steps tell what a loss does to detail. Names come
before flags; those joined by + act together. A run is ablate_vae/NAME-SEED-STEPS below runs/ and
continues where it was stopped. A step of a variant is first timed against one of the baseline, and
--steps divided by the quotient. PSNR and KL are of all held-out pictures; rFID of 512 training
pictures and their own reconstructions, from draws of the posterior. One JSON line follows each row.
"""
import itertools
import json
import statistics
import sys
import time
import zlib
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import metrics
import train_vae
import vae
from ablate import parse, parser_of, real_features, rows_of

FOLDER, ROUNDS = common.RUNS / 'ablate_vae', 10


# ---- terms of the loss: of values and truth, (B,3,h,w) each --------------------------------------

def pooled(values, truth):
    """L1 of means over 2 x 2 pixels plus that over 4 x 4."""
    return sum(F.avg_pool2d(values - truth, side).abs().mean() for side in (2, 4))


@cache
def filters(widths=(3, 32, 64, 64)):
    """Random 3 x 3 filters that keep the variance through ReLUs, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, m, 3, 3, generator=generator) * (2 / (9 * m)) ** 0.5
            for m, n in itertools.pairwise(widths)]


def random_features(x):
    """What ReLUs give after each of `filters`; all but the first halve height and width."""
    found = []
    for i, weight in enumerate(filters()):
        x = F.conv2d(x, weight.to(x.device), stride=1 if i == 0 else 2).relu()
        found.append(x)
    return found


def features(values, truth):
    """L1 of random features, summed over layers."""
    return sum(map(F.l1_loss, random_features(values), random_features(truth)))


def low_passed(truth, sides):
    """Pictures (B,3,h,w), each averaged down to about its own number of pixels a side and back."""
    size = truth.shape[2:]
    return torch.cat([F.interpolate(F.interpolate(x[None], (side, side), mode='area'), size,
                                    mode='bilinear') for x, side in zip(truth, sides)])


class Equivariant(vae.PictureVAE):
    """In half of the steps the latent is averaged down, and so is the truth (EQ-VAE).

    Kouzelis et al. (2025); only that latents of smaller pictures are smaller latents is asked for,
    not that they turn with them. The latent has 1/4 to all of its cells a side.
    """
    share = 1.0

    def decode(self, z, sizes=None):
        height, width = (sizes or self.latent_sizes())['xy']
        smaller, self.share = (height, width), 1.0
        if self.training and torch.rand(()) < 0.5:
            side = torch.randint(-(-height // 4), height + 1, ()).item()
            self.share = side / height
            smaller = side, round(width * self.share)
            z = F.interpolate(z.unflatten(2, (height, width)), smaller, mode='area').flatten(2)
        return super().decode(z, dict(xy=smaller))

    def predict(self, xi, batch):
        values, truth = super().predict(xi, batch)
        if self.share < 1:  # an item of scale s has s of its pixels for one at r
            pixels = self.share * truth.shape[2] * batch['scale']
            truth = low_passed(truth, [max(1, round(n)) for n in pixels.tolist()])
        return values, truth


def with_terms(loss, terms):
    """A loss plus (weight, term) pairs."""
    return lambda *pair: loss(*pair) + sum(weight * term(*pair) for weight, term in terms)


VARIANTS = {  # name -> (weight, term) pairs, and flags of train_vae.py
    'baseline': ((), ''),
    # More terms make the KL count for less: its weight grows as the loss does.
    'features': (((0.5, features),), '--kl_weight 0.1'),
    'gradient-0.5': ((), '--gradient_weight 0.5 --kl_weight 0.085'),
    'gradient-1': ((), '--gradient_weight 1 --kl_weight 0.125'),
    'multi-scale': (((0.5, pooled),), '--kl_weight 0.085'), 'l2': ((), '--loss l2'),
    'lr-2e-3': ((), '--lr 2e-3'), 'lr-3e-3': ((), '--lr 3e-3'), 'lr_min': ((), '--lr_min 1e-5'),
    'mlp-96': ((), '--mlp_width 96'), 'mlp-128': ((), '--mlp_width 128'),
    'mlp-3-layers': ((), '--mlp_layers 3'), 'fields-48': ((), '--field_channels 48'),
    'decoder-48': ((), '--decoder_ch 48'), 'scale-1': ((), '--scale_probs 0.6,0.2,0.2'),
    'kl-0.15': ((), '--kl_weight 0.15'), 'kl-0.3': ((), '--kl_weight 0.3'),
    'sn-1': ((), '--sn_start 1'), 'eq': ((), ''),
}


def combined(name):
    """The terms and flags of a name or of several, joined by +."""
    terms, flags = zip(*rows_of(name, VARIANTS))
    return sum(terms, ()), ' '.join(flags).split()


@contextmanager
def variant(name):
    """Context in which the losses have the terms of a variant, and new networks are its own."""
    terms, _ = combined(name)
    network = Equivariant if 'eq' in name.split('+') else vae.PictureVAE
    losses = {k: with_terms(vae.LOSSES[k], terms) for k in ('l1', 'l2')}
    with mock.patch.dict(vae.LOSSES, losses), mock.patch.dict(vae.DOMAINS, image=network):
        yield


# ---- cost of a step ------------------------------------------------------------------------------

def a_step(name, flags):
    """A function that makes a step of a variant, always on the same items: its seconds.

    Of the CPU, for which other work does not count, or of CUDA.
    """
    args = train_vae.build_parser().parse_preset(train_vae.PRESETS, 'image',
                                                 [*combined(name)[1], *flags])
    process, train = common.start_process(args.device, args.amp), train_vae.open_data(args, 'train')
    with variant(name):
        model = vae.D2CVAE(common.from_flags(args, vae.VAEConfig, **train.settles()))
    device = process.device
    model = model.to(device)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = common.move(default_collate(
        [train.item(i, common.seeded('cost', i)) for i in range(args.batch)]), device)

    def now():
        if device.type != 'cuda':
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def step():
        since = now()
        with variant(name):
            with process.autocast():
                total = model(batch)['total']
            opt.zero_grad()
            total.backward()
            opt.step()
        return now() - since
    return step


def cost(name, flags, path):
    """Seconds of a step of the baseline and of a variant, in turn; kept in a file."""
    if not path.exists():
        steps = [a_step(n, flags) for n in ('baseline', name)]
        pairs = [[step() for step in steps] for _ in range(ROUNDS)][2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([*map(statistics.median, zip(*pairs))]))
    return json.loads(path.read_text())


# ---- measuring -----------------------------------------------------------------------------------

def rfid(run, net):
    """rFID of 512 training pictures."""
    return metrics.frechet_distance_features(
        real_features(net, run, 'train'), metrics.features(net, run.reconstructions()))


@torch.no_grad()
def held_out(run):
    """Means over all held-out pictures: PSNR, from the posterior's mean, and KL."""
    dataset, psnr, kl = run.data('test'), [], []
    for part in metrics.pieces(range(len(dataset)), 32):
        batch = default_collate([dataset.view(i, 0) for i in part])
        posterior = run.vae.encode(common.move(batch, run.args.device))
        psnr.append(metrics.psnr_each(
            *run.compared(posterior.mean, dataset, part, run.R).unbind(1)))
        kl.append(posterior.kl())
    return dict(psnr=torch.cat(psnr).mean().item(), kl=torch.cat(kl).mean().item())


def measure(folder, args):
    """What a row says of a run: psnr, kl, rfid."""
    options = metrics.build_parser().parse_args(
        ['rfid', str(folder), '--num', '512', '--posterior', 'sample', '--data', args.data,
         '--weights', args.weights])
    options.device = common.start_process(options.device).device
    net, run = metrics.open_network(options), metrics.open_run(folder, options)
    return dict(held_out(run), rfid=rfid(run, net))


def ablate(name, args, flags):
    """Train a variant, or finish it, and print its row."""
    folder = FOLDER / f'{name}-{args.seed}-{args.steps}'
    flags = ['--dataset', 'image', '--data', args.data, *flags]
    digest = zlib.crc32(' '.join(flags).encode())
    seconds = cost(name, flags, FOLDER / f'{name}-{digest:08x}.json')
    steps = args.steps if name == 'baseline' else round(args.steps * seconds[0] / seconds[1])
    command = ['train_vae.py', *combined(name)[1], *flags, '--seed', str(args.seed), '--steps',
               str(steps), '--name', str(folder.relative_to(common.RUNS))]
    with variant(name), mock.patch.object(sys, 'argv', command):
        train_vae.main()
    row = dict(variant=name, seed=args.seed, steps=steps, **measure(folder, args),
               s_per_step=seconds[1], ratio=seconds[1] / seconds[0], command=' '.join(command))
    print(f'{name:24s} seed {args.seed}, {steps} steps: PSNR {row["psnr"]:.2f}, rFID '
          f'{row["rfid"]:.1f}, KL {row["kl"]:.0f}, {seconds[1]:.3f} s a step\n{json.dumps(row)}',
          flush=True)


def main(argv):
    parser = parser_of(__doc__)
    parser.add_argument('--steps', type=int, default=900, help='of the baseline')
    names, args, flags = parse(parser, argv)
    for name in names:
        ablate(name, args, flags)


if __name__ == '__main__':
    common.run(lambda: main(sys.argv[1:]))
