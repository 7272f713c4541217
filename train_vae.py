"""Train stage 1, the D2C-VAE (vae.py), on pictures or on shapes.

    python train_vae.py                                        # built-in pictures, minutes on CPU
    python train_vae.py --dataset image --data DIR --group REGEX
    python train_vae.py --dataset shape --data DIR             # what python data.py mesh writes
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
from inr import render_points
from vae import D2CVAE, VAEConfig, annealed

# Differences from VAEConfig and RunConfig only. The paper gives no batch sizes or step counts: for
# AFHQ and CelebA-HQ they are the authors' configurations on 8 processes, who published no others.
PAPER = dict(scales=(1.0, 1.5, 2.0), scale_probs=(0.3, 0.3, 0.4), flip=True, accumulate=5)
AUTHORS = dict(PAPER, decoder_ch=128, mlp_layers=3, sn_start=5.0)
SMALL = dict(num_res_blocks=1, ch=32, decoder_ch=32, z_channels=16, field_channels=32,
             mlp_width=64, batch=16, lr=1e-3, warmup=100)
# Shapes: Table 9, and the authors' code where the paper is silent (PointNet, n_ref, KL weight).
SHAPES = dict(resolution=64, ch=64, decoder_ch=32, plane_merge='sum', coord_input=True,
              scale_injection=False, loss='bce', n_ref=2048, kl_weight=0.01, threshold=0.2,
              point_hidden=256, point_blocks=7, accumulate=5, batch=480)
SMALL_SHAPES = dict(SHAPES, resolution=32, ch=32, ch_mult=(1, 2), decoder_mult=(2, 1),
                    fields=(1, 2), threshold=0.5, num_res_blocks=1, z_channels=16,
                    field_channels=32, mlp_width=64, point_hidden=32, point_blocks=3,
                    point_local=True, plane_merge='concat', near=0.5, queries=1536, accumulate=1,
                    batch=8, warmup=100, eval_every=1000)
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
    'toy_shape': dict(SMALL_SHAPES, dataset='toy_shape', points=1000, clouds=1, lr=3e-3,
                      kl_weight=0.002, steps=2200),
    'shape_small': dict(SMALL_SHAPES, dataset='shape', points=2000, lr=2e-3, kl_weight=0.004,
                        steps=7000),
    'shapenet_chair': dict(SHAPES, dataset='shapenet_chair', steps=3_000),
    'shapenet': dict(SHAPES, dataset='shapenet', steps=23_000),
    'text2shape': dict(SHAPES, dataset='text2shape', steps=8_000),
    'shapenet_chair_code': dict(SHAPES, dataset='shapenet_chair', decoder_ch=64, sn_start=5.0,
                                steps=3_000),
}
PRESETS.update(image=PRESETS['image_64'], shape=PRESETS['shape_small'])


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
    parser.add_argument('--flip', type=common.parse_bool, default=False, nargs='?', const=True,
                        help='mirror half of the training items, left and right')
    parser.add_config(data.PictureConfig)
    parser.add_config(data.ShapeConfig)
    parser.add_config(VAEConfig)
    parser.add_config(common.RunConfig)
    return parser


def open_data(args, split):
    """The training or held-out data set, as the flags ask."""
    options = dict(data.options_of(vars(args)), flip=args.flip and split == 'train')
    return data.make_dataset(args.dataset, args.data or None, split, holdout=args.split,
                             group=args.group or None, **options)


@torch.no_grad()
def measure_pictures(vae, held_out, args, count=64):
    """Held-out PSNR in dB at r and at the largest scale, posterior mean, and a picture of both.

    Only pictures that are no smaller than a scale count there.
    """
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
    return result, torch.stack([truth[:16], y[:16]], dim=1).flatten(0, 1)


@torch.no_grad()
def measure_shapes(vae, held_out, args, count=64, points=20_000):
    """Held-out IoU of the posterior mean, and a picture of point clouds and what became of them."""
    device, ious, tiles = next(vae.parameters()).device, [], []
    for k, i in enumerate(common.spread(len(held_out), count)):
        cloud = held_out.item(i)['points'].to(device)
        xi = vae.decode(vae.encode(cloud[None]).mean)
        coords, inside = held_out.volume(i, points)
        ious.append(metrics.iou(vae.query(xi, coords.to(device))[..., 0] > 0,
                                inside.to(device)[None]))
        if k < 16:
            drawn = render_points(cloud, 128).expand(1, 3, -1, -1) * 2 - 1
            tiles += [drawn, vae.preview(xi)]
    return dict(iou=torch.cat(ious).mean()), torch.cat(tiles)


def evaluate(vae, held_out, args):
    """What the domain is measured by, held out, as {name: value}, and a picture to look at."""
    vae.eval()
    measure = dict(image=measure_pictures, shape=measure_shapes)[vae.config.domain]
    result = measure(vae, held_out, args)
    vae.train()
    return result


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
    config = common.pick(args, VAEConfig, domain=train.domain, channels=train.channels,
                         extent=train.extent)
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
    amp = common.switch(args.amp, common.multiplies_bfloat16(device))
    log = common.start(folder, 'vae', args, step, rank, world, device, amp, train, held_out, model,
                       f'latent {config.z_channels} x {config.latent_sizes()}, '
                       f'N_ref {config.n_ref}')
    if rank == 0 and not state:
        (folder / 'splits.json').write_text(json.dumps(train.splits()))
    network = torch.compile(model) if common.switch(args.compile, device.type == 'cuda') else model
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
            bar.write(f'step {step}: held out, ' + ', '.join(
                f'{k} {v:.4g}' for k, v in result.items())
                + f'; latent std {stats["z_std_min"]:.2f} to {stats["z_std_max"]:.2f}')
        if rank == 0 and (step % args.save_every == 0 or step == args.steps):
            guard.check()
            save(folder / 'vae.pt', step, args, model, opt, train)
    bar.close()


if __name__ == '__main__':
    common.run(main)
