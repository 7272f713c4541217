"""Train stage 1, the D2C-VAE (vae.py), on pictures.

    python train_vae.py                                        # built-in pictures, minutes on CPU
    python train_vae.py --dataset image --data DIR --group REGEX
    torchrun --nproc_per_node=8 train_vae.py --dataset celebahq --data DIR

The run lands in runs/NAME; the same command continues it from its last checkpoint.
"""
import json
import time

import torch
from torch.nn.parallel import DistributedDataParallel

import common
import data
import metrics
from vae import D2CVAE, VAEConfig, annealed

# Differences from VAEConfig and RunConfig only. The paper gives no batch sizes or step counts: for
# AFHQ and CelebA-HQ they are the authors' configurations on 8 processes, who published no others.
PAPER = dict(scales=(1.0, 1.5, 2.0), scale_probs=(0.3, 0.3, 0.4), flip=True, accumulate=5)
AUTHORS = dict(PAPER, decoder_ch=128, mlp_layers=3, sn_start=5.0)
SMALL = dict(num_res_blocks=1, ch=32, decoder_ch=32, z_channels=16, field_channels=32,
             mlp_width=64, batch=16, lr=1e-3, warmup=100)
PRESETS = {
    'toy_image': dict(SMALL, dataset='toy_image', resolution=32, ch=24, decoder_ch=24,
                      ch_mult=(1, 2, 3), decoder_mult=(3, 2, 1), kl_weight=0.01, steps=1850,
                      save_every=250),
    'image_64': dict(SMALL, dataset='image', resolution=64, scale_probs=(0.3, 0.3, 0.4),
                     kl_weight=0.05, steps=2500),
    'image_256': dict(PAPER, dataset='image', batch=80, steps=20_000),
    'afhq_cat': dict(PAPER, dataset='afhq_cat', batch=160, steps=6_300),
    'afhq_dog': dict(PAPER, dataset='afhq_dog', batch=160, steps=6_300),
    'celebahq': dict(PAPER, dataset='celebahq', batch=400, steps=15_000),
    'lsun_church': dict(PAPER, dataset='lsun_church', resolution=128, kl_weight=0.1, batch=160,
                        steps=40_000),
    'cifar10': dict(PAPER, dataset='cifar10', resolution=32, scales=(1.0,), scale_probs=(),
                    ch_mult=(1, 2), decoder_mult=(2, 1), fields=(2,), kl_weight=0.05, batch=160,
                    steps=40_000),
    'afhq_cat_code': dict(AUTHORS, dataset='afhq_cat', batch=160, steps=6_300),
    'afhq_dog_code': dict(AUTHORS, dataset='afhq_dog', batch=160, steps=6_300),
    'celebahq_code': dict(AUTHORS, dataset='celebahq', num_res_blocks=3, batch=400, steps=15_000),
}
PRESETS['image'] = PRESETS['image_64']


def build_parser():
    """Every flag, with its default and help."""
    parser = common.Parser(__doc__.split('\n')[0])
    parser.add_argument('--dataset', default='toy_image', choices=data.NAMES, help='what to learn')
    parser.add_argument('--data', default='', help='where the data are; empty = data/DATASET')
    parser.add_argument('--preset', default='', help='settings to start from; empty = those of '
                        f'--dataset. One of {", ".join(PRESETS)}')
    parser.add_argument('--name', default='', help='run folder below runs/; empty = the preset')
    parser.add_argument('--split', default='', help='held-out fraction, or a file of names; '
                        "empty = the data set's own split, 0.1 where it has none")
    parser.add_argument('--group', default='', help='regular expression: names equal without what '
                        'it matches stay on one side (--group=REGEX if it begins with -)')
    parser.add_argument('--scales', type=common.parse_tuple(float), default=(1.0, 1.5, 2.0),
                        help='target resolutions over r, for multi-scale training')
    parser.add_argument('--scale_probs', type=common.parse_tuple(float), default=(),
                        help='probability of each scale; empty = equal')
    parser.add_argument('--continuous', type=common.parse_bool, nargs='?', const=True,
                        default=False,
                        help='draw the target resolution uniformly up to the largest of --scales')
    parser.add_argument('--flip', type=common.parse_bool, default=False, nargs='?', const=True,
                        help='mirror half of the training pictures')
    parser.add_config(VAEConfig)
    parser.add_config(common.RunConfig)
    return parser


def open_data(args, split):
    """The training or held-out data set, at every scale asked for."""
    return data.make_dataset(
        args.dataset, args.data or None, split, resolution=args.resolution, scales=args.scales,
        scale_probs=None if args.continuous else args.scale_probs, continuous=args.continuous,
        flip=args.flip and split == 'train', holdout=args.split, group=args.group or None,
        seed=args.seed)


@torch.no_grad()
def evaluate(vae, held_out, args, count=64):
    """Held-out PSNR in dB at r and at the largest scale, posterior mean, and a picture of both.

    Only pictures that are no smaller than a scale count there.
    """
    vae.eval()
    device = next(vae.parameters()).device
    index = common.spread(len(held_out), count)
    result, r = {}, args.resolution
    x = torch.stack([held_out.picture(i, r) for i in index]).to(device)
    xi = vae.decode(torch.cat([vae.encode(part).mean for part in x.split(16)]))
    for R in sorted({r, round(max(args.scales) * r)}):
        fit = [k for k, i in enumerate(index) if R == r or held_out.largest(i) >= R]
        if not fit:
            continue
        truth = torch.stack([held_out.picture(index[k], R) for k in fit]).to(device)
        y = vae.render([{n: f[fit] for n, f in level.items()} for level in xi], (R, R)).clamp(-1, 1)
        result[f'psnr_{R}'] = metrics.psnr(truth / 2 + 0.5, y / 2 + 0.5)
    vae.train()
    return result, torch.stack([truth[:16], y[:16]], dim=1).flatten(0, 1)


@torch.no_grad()
def latent_statistics(vae, batch, noise):
    """Extreme deviations of a channel over a batch, and how many channels are active."""
    posterior = vae.encode(batch)
    std = posterior.sample(noise).transpose(0, 1).flatten(1).std(1)
    active = (posterior.mean.transpose(0, 1).flatten(1).std(1) > 0.1).sum()
    return dict(z_std_min=std.min(), z_std_max=std.max(), z_active=active)


def save(path, step, args, model, opt, dataset):
    """Write vae.pt: weights, optimiser, flags and split, all that continuing needs."""
    common.save_checkpoint(path, dict(
        kind='vae', step=step, args=vars(args), vae_config=vars(model.config),
        vae=model.state_dict(), opt=opt.state_dict(), splits=dataset.splits()))


def main():
    parser = build_parser()
    args = parser.parse_preset(PRESETS, parser.known().dataset)
    args.name = args.name or args.preset
    rank, world, device = common.dist_init(args.device)
    common.check_run_flags(args, world)
    common.require(args.ch_mult, '--ch_mult: name the width of at least one level')
    common.require(args.anneal > 0 and (args.sn_end > 0 or not args.sn_start),
                   '--anneal and --sn_end: must be positive')
    common.require(not args.data or not args.dataset.startswith('toy_'), f'--data {args.data}: '
                   f'{args.dataset} is computed; say what the data are, as in --dataset image')

    # 1. data and model
    train, held_out = open_data(args, 'train'), open_data(args, 'test')
    config = common.pick(args, VAEConfig)
    torch.manual_seed(args.seed)
    model = D2CVAE(config).to(device)
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, args.beta2),
                            weight_decay=args.weight_decay, fused=True)

    # 2. continue if there is something to continue
    folder, step = common.RUNS / args.name, 0
    state = common.resume(folder / 'vae.pt', args, 'vae')
    if state:
        common.require(state['splits'] == train.splits(), f'{folder}/vae.pt was made with other '
                       'data: files have come or gone; start over with --restart or another --name')
        common.load_weights(model, state['vae'], folder / 'vae.pt')
        opt.load_state_dict(state['opt'])
        step = state['step']
    else:
        if args.init:
            common.load_weights(model, common.load_checkpoint(args.init)['vae'], args.init)
        model.spectral(rounds=40)
    amp = common.switch(args.amp, device)
    log = common.start(folder, 'vae', args, step, rank, world, device, amp, train, held_out, model,
                       f'latent {config.z_channels} x {config.latent_sizes()["xy"]}, '
                       f'{config.n_ref} values a picture')
    if rank == 0 and not state:
        (folder / 'splits.json').write_text(json.dumps(train.splits()))
    network = torch.compile(model) if common.switch(args.compile, device) else model
    ddp = DistributedDataParallel(network, broadcast_buffers=False) if world > 1 else network
    batches = common.stream(train, args, step, rank, world)
    guard, bar = common.FiniteGuard(device), common.progress(args, step, rank)
    sizes = config.latent_sizes()
    length = sum(h * w for h, w in sizes.values())

    # 3. train
    started, since = time.time(), step
    while step < args.steps:
        common.set_lr(opt, common.lr_at(step, args))
        weights = annealed(step, args.steps, config).to(device)
        noise = torch.randn(args.batch, config.z_channels, length,
                            generator=common.torch_seeded('posterior', args.seed, step))
        opt.zero_grad(set_to_none=True)
        totals = {}
        for i in range(args.accumulate):
            batch = common.to(next(batches), device)
            own = common.rows(noise, args, i, rank, world).to(device)
            with common.sync(ddp, i == args.accumulate - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    losses = ddp(batch, weights, own)
                (losses['total'] / args.accumulate).backward()
            totals = {k: totals.get(k, 0) + v.detach() / args.accumulate for k, v in losses.items()}
        norm = common.clip(model, args.clip)
        opt.step()
        step += 1
        guard.update(step, totals['total'], norm)
        bar.update()

        if step % args.log_every == 0 or step == args.steps:
            guard.check()
            values = common.mean_over_ranks(totals)
            rate = (step - since) * args.batch / (time.time() - started)
            bar.set_postfix(loss=f'{values["total"]:.4f}', items_per_s=f'{rate:.0f}')
            if rank == 0:
                log.write(step=step, **values, norm=norm, lr=common.lr_at(step - 1, args),
                          items_per_s=rate)
        if rank == 0 and (step % args.eval_every == 0 or step == args.steps):
            result, pictures = evaluate(model, held_out, args)
            stats = latent_statistics(model, batch, own)
            log.write(step=step, **result, **stats)
            data.save_grid(folder / 'samples' / f'reconstruction_{step:07d}.png', pictures, 8)
            bar.write(f'step {step}: held-out PSNR ' + ', '.join(
                f'{v:.2f} dB at {k[5:]}' for k, v in result.items())
                + f', latent std {stats["z_std_min"]:.2f} to {stats["z_std_max"]:.2f}')
        if rank == 0 and (step % args.save_every == 0 or step == args.steps):
            guard.check()
            save(folder / 'vae.pt', step, args, model, opt, train)
    bar.close()


if __name__ == '__main__':
    common.run(main)
