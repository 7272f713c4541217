"""Variants of stage 2, each trained alone on one stage 1: FID, held-out loss, seconds a step.

    python tests/ablate.py baseline v min-snr:5 --vae RUN --data DIR [flags of train_ldm.py]
    python tests/ablate.py logit-normal:-1+min-snr:5 --vae RUN --seed 1 --steps 3000
    python tests/ablate.py baseline --vae RUN --sigma_rel 0.05,0.15     # averages beside its own

Names come before flags; those joined by + act together. A run is ablate/NAME-SEED below runs/, and
behind that the averages beside it, and continues where it was stopped; one of that name with other
flags is replaced with --restart. Every row is of 512 samples, against as many training pictures
and, the first of them, against all held-out ones. The held-out loss is without the weights of a
variant, but that of `v` is of v, and that of `expected` of the expected noise. One JSON line
follows each row.
"""
import argparse
import itertools
import json
import sys
import zlib
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import ldm
import metrics
import train_ldm
from encoders import ResBlock

FOLDER, AVERAGES = common.RUNS / 'ablate', 'averages.pt'
LOG_SNR = ldm.LOG_ALPHA_BAR - torch.log(-torch.expm1(ldm.LOG_ALPHA_BAR))  # of t = 0..999


# ---- losses and parametrisations ---------------------------------------------------------------

class Weighted(ldm.LDM):
    """An LDM whose training loss is the mean of weight(t) |eps - eps_theta|^2; t (B,) integers.

    In evaluation mode it is not weighted.
    """

    def weight(self, t):
        """(B,) float32."""
        return torch.ones(len(t), device=t.device)

    def error_scale(self, t):
        return self.weight(t).sqrt()[:, None, None] if self.training else 1.0


def by_time(values):
    """A subclass's `weight`, of a value for each of t = 0..999."""
    return lambda self, t: values.to(t.device, torch.float32)[t]


def min_snr(gamma):
    """Hang et al. (2023): min(SNR, gamma) / SNR."""
    return type('MinSNR', (Weighted,), dict(
        weight=by_time((gamma * (-LOG_SNR).exp()).clamp(max=1))))


def sigmoid(bias):
    """Kingma & Gao (2023), Hoogeboom et al. (2024): -dlambda/dt sigmoid(bias - lambda), mean 1."""
    weight = -torch.gradient(LOG_SNR)[0] * (bias - LOG_SNR).sigmoid()
    return type('Sigmoid', (Weighted,), dict(weight=by_time(weight / weight.mean())))


class Z0(Weighted):
    """The network gives z_0; eps = (z_t - alpha z_0) / sigma, and the loss is min(SNR, 5) of it."""
    weight = min_snr(5).weight

    def eps(self, z_t, t, cond=None):
        alpha, sigma = self.scales(t)
        return (z_t.float() - alpha * super().eps(z_t, t, cond)) / sigma


class ByLoss(ldm.LDM):
    """Times drawn in proportion to the root of the mean square of their loss; weighted, unbiased.

    Nichol & Dhariwal (2021). The square is a moving average for each of BINS spans of time.
    """
    BINS, SHARE = 50, 0.1  # of a new square in the average of its span

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer('square', torch.ones(self.BINS))

    def probability(self):
        """(BINS,) float32; a hundredth of the draws are of all times alike."""
        root = self.square.sqrt()
        return 0.99 * root / root.sum() + 0.01 / self.BINS

    def times(self, u):
        if not self.training:
            return super().times(u)
        ends = F.pad(self.probability().double().cumsum(0), (1, 0))
        span = torch.searchsorted(ends[1:-1], u.double(), right=True)
        place = (u - ends[span]) / (ends[span + 1] - ends[span])
        return super().times(((span + place) / self.BINS).clamp(max=1))

    def error_scale(self, t):
        if not self.training:
            return super().error_scale(t)
        span = t * self.BINS // ldm.T
        weight = 1 / (self.BINS * self.probability()[span])
        scale = weight.sqrt().requires_grad_()
        # Of a loss sum_i scale_i^2 loss_i / B the derivative by scale_i tells loss_i.
        scale.register_hook(lambda slope: self.note(span, len(t) * slope / (2 * scale.detach())))
        return scale[:, None, None] * super().error_scale(t)

    def note(self, spans, losses):
        """Take the losses (B,) of spans (B,) into their averages, one after another."""
        for span, loss in zip(spans, losses):
            self.square[span].lerp_(loss.square(), self.SHARE)


def dropout(p):
    """Dropout before the second convolution of each ResBlock, in training."""
    def __init__(self, config):
        super(cls, self).__init__(config)
        for block in self.unet.modules():
            if isinstance(block, ResBlock):
                block.conv2.register_forward_pre_hook(
                    lambda conv, x: F.dropout(x[0], p, conv.training))
    cls = type('Dropout', (ldm.LDM,), dict(__init__=__init__))
    return cls


UNMIXED = '--mixed', 'off'
VARIANTS = {  # name -> class, or none for LDM itself, and flags of train_ldm.py
    'baseline': (None, ()), 'dropout': (dropout(0.1), ()), 'by-loss': (ByLoss, ()),
    **{f'min-snr:{gamma}': (min_snr(gamma), ()) for gamma in (1, 5)},
    **{f'sigmoid:{bias}': (sigmoid(bias), ()) for bias in (-3, -1, 2)},
    **{f'logit-normal:{mean}': (None, (f'--t_mean={mean}', '--t_std=1'))
       for mean in (0.5, -0.5, -1, -1.5)},
    'v': (None, ('--predict', 'v', *UNMIXED)), 'v-mixed': (None, ('--predict', 'v')),
    'expected': (None, ('--target', 'expected')), 'z0': (Z0, UNMIXED),
    'deep': (None, ('--ch', '48', '--num_res_blocks', '2')), 'wide': (None, ('--ch', '96')),
}


def rows_of(name, variants):
    """The entries in a dict of variants of a name or of several, joined by +."""
    parts = name.split('+')
    unknown = [part for part in parts if part not in variants]
    common.require(not unknown, f'no variant {", ".join(unknown)}; of {", ".join(variants)}')
    return [variants[part] for part in parts]


def combined(name):
    """The class and flags of a name or of several, joined by +."""
    rows = rows_of(name, VARIANTS)
    classes, flags = [cls for cls, _ in rows if cls], [flag for _, own in rows for flag in own]
    return type('Variant', (*classes, ldm.LDM)[:max(len(classes), 1)], {}), flags


# ---- averages of the weights -------------------------------------------------------------------

def power(sigma_rel):
    """The gamma at which weights proportional to t^gamma have this deviation over the run's length.

    Karras et al. (2024): sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    roots = np.roots([1, 7, 16 - sigma_rel ** -2, 12 - sigma_rel ** -2])
    return roots.real.max().item()


class PowerEMA(common.EMA):
    """Average of a module's parameters with weights that grow as a power of the step."""

    def __init__(self, module, sigma_rel):
        super().__init__(module)
        self.gamma = power(sigma_rel)

    @torch.no_grad()
    def update(self, n):
        decay = (1 - 1 / n) ** (self.gamma + 1)
        torch._foreach_lerp_(self.shadow, list(self.module.parameters()), 1 - decay)


class Averages(common.EMA):
    """The average of training and PowerEMAs beside it, which `path` keeps at each checkpoint."""

    def __init__(self, path, sigma_rels, module, decay):
        super().__init__(module, decay)
        self.path, self.others = path, {s: PowerEMA(module, s) for s in sigma_rels}

    def update(self, n):
        for average in (super(), *self.others.values()):
            average.update(n)

    def state_dict(self):
        common.save_checkpoint(self.path, dict(
            kind='averages', **{str(s): e.state_dict() for s, e in self.others.items()}))
        return super().state_dict()

    def load_state_dict(self, state):
        super().load_state_dict(state)
        kept = common.load_checkpoint(self.path, 'averages')
        for s, average in self.others.items():
            average.load_state_dict(kept[str(s)])


# ---- measuring ---------------------------------------------------------------------------------

def real_features(net, run, split):
    """Features (N,D) of up to 512 of a run's pictures, kept in a file for the other variants."""
    about = run.args.data or run.info['args']['data'], run.R, run.info['splits'][split]
    path = FOLDER / f'{split}-{zlib.crc32(json.dumps(about).encode()):08x}.pt'
    if not path.exists():
        common.save_checkpoint(path, metrics.features(net, run.reals(split, 512)))
    return torch.load(path)


def measure(folder, args):
    """Yield FID of a run to training and held-out pictures, by the average of its weights.

    First of training's own, '', then of those in its averages.pt.
    """
    options = metrics.build_parser().parse_args(
        ['fid', str(folder), '--num', '512', '--data', args.data, '--weights', args.weights])
    options.sampler = metrics.parse_sampler(options.sampler)
    options.device = common.start_process(options.device).device
    net, run = metrics.open_network(options), metrics.open_run(folder, options, stage=2)
    kept = common.load_checkpoint(folder / AVERAGES, 'averages') if args.sigma_rel else {}
    for average in ('', *map(str, args.sigma_rel)):
        if average:
            common.load_weights(run.ldm, kept[average], folder / AVERAGES)
        fake = metrics.features(net, run.samples())
        reals = [real_features(net, run, split) for split in ('train', 'test')]
        yield average, *(metrics.frechet_distance_features(real, fake[:len(real)])
                         for real in reals)


def ablate(name, args, flags):
    """Train a variant, or finish it, and print its rows."""
    cls, own = combined(name)
    folder = FOLDER / '-'.join(map(str, (name, args.seed, *args.sigma_rel)))
    command = ['train_ldm.py', '--vae', args.vae, '--data', args.data, '--seed', str(args.seed),
               '--name', str(folder.relative_to(common.RUNS)), *own, *flags]
    averages = partial(Averages, folder / AVERAGES, args.sigma_rel)
    with ExitStack() as patches:
        for target, attribute, value in (
                (sys, 'argv', command), (ldm, 'LDM', cls), (train_ldm, 'LDM', cls),
                (common, 'EMA', averages if args.sigma_rel else common.EMA),
                (train_ldm, 'evaluate', partial(train_ldm.evaluate, count=10 ** 6))):
            patches.enter_context(mock.patch.object(target, attribute, value))
        train_ldm.main()
        log = common.read_log(folder / 'log.jsonl')
        speed = [line['items_per_s'] for line in log if 'items_per_s' in line][-1]
        row = dict(variant=name, seed=args.seed, step=log[-1]['step'],
                   held_out_loss=log[-1]['held_out_loss'], command=' '.join(command),
                   s_per_step=common.read_stages(folder)['ldm']['batch'] / speed)
        for average, train, test in measure(folder, args):
            print('{variant:24s} {average:5s} seed {seed}, {step} steps: FID {fid:.1f}, held out '
                  '{held_out:.1f}, held-out loss {held_out_loss:.4f}, {s_per_step:.3f} s a step'
                  .format(**row, average=average, fid=train, held_out=test))
            print(json.dumps(dict(row, sigma_rel=average, fid=train, held_out=test)), flush=True)


def parser_of(doc):
    """The flags that both programs have."""
    parser = argparse.ArgumentParser(description=doc.split('\n')[0], allow_abbrev=False)
    parser.add_argument('--data', default='', help='where the data are')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--weights', default='weights', help='of the network of FID')
    return parser


def parse(parser, argv):
    """The names in front, if any, the flags of `parser`, and those of the training script."""
    names = [*itertools.takewhile(lambda text: not text.startswith('-'), argv)]
    return names or ['baseline'], *parser.parse_known_args(argv[len(names):])


def main(argv):
    parser = parser_of(__doc__)
    parser.add_argument('--vae', required=True, help='run of stage 1')
    parser.add_argument('--sigma_rel', type=common.parse_tuple(float), default=(),
                        help='deviations of power-function averages, as shares of the run')
    names, args, flags = parse(parser, argv)
    for name in names:
        ablate(name, args, ['--steps', '1500', *flags])


if __name__ == '__main__':
    common.run(lambda: main(sys.argv[1:]))
