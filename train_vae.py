"""Train stage 1, the D2C-VAE (vae.py), on any data set of data.py.

    python train_vae.py                                        # built-in pictures, minutes on CPU
    python train_vae.py --dataset image --data DIR --group REGEX
    python train_vae.py --dataset shape --data DIR             # what python data.py mesh writes
    python train_vae.py --dataset nerf --data DIR              # posed pictures of scenes
    torchrun --nproc_per_node=8 train_vae.py --dataset celebahq --data DIR

The run lands in runs/NAME; the same command continues it from its last checkpoint.
"""
import json
import signal
import time
from functools import partial

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import torch

import common
import data
import metrics
from ldm import open_checkpoint
from vae import D2CVAE, STRUCTURE, VAEConfig, annealed

# Differences from VAEConfig and RunConfig only. The paper gives no batch sizes or step counts: for
# AFHQ, CelebA-HQ, ShapeNet, SkyTimelapse and SRN cars they are the authors' on 8 processes. What
# follows a preset was measured, see RESULTS.md; those without were not run. Their micro_batch is
# for cards of 24 GB, by what tests/test_presets.py counts.
RARELY = dict(eval_every=5000, save_every=5000)
PAPER = dict(RARELY, scales=(1.0, 1.5, 2.0), scale_probs=(0.3, 0.3, 0.4), flip=True, micro_batch=8)
AUTHORS = dict(PAPER, decoder_ch=128, mlp_layers=3, sn_start=5.0, micro_batch=5)
TINY = dict(num_res_blocks=1, decoder_ch=32, z_channels=16, field_channels=32, mlp_width=64,
            batch=16, lr=1e-3, warmup=100)
SMALL = dict(TINY, ch=32)
# Points: Table 9, and the authors' code where the paper is silent (PointNet, n_ref, KL weight).
POINTS = dict(resolution=64, ch=64, coord_input=True, scale_injection=False, point_hidden=256,
              point_blocks=7)
SMALL_POINTS = dict(POINTS, resolution=32, ch=32, ch_mult=(1, 2), decoder_mult=(2, 1),
                    fields=(1, 2), num_res_blocks=1, decoder_ch=32, z_channels=16,
                    field_channels=32, mlp_width=64, point_hidden=32, point_blocks=3,
                    point_local=True, batch=8, micro_batch=0, warmup=100, eval_every=1000,
                    save_every=500)
SHAPES = dict(POINTS, **RARELY, decoder_ch=32, plane_merge='sum', loss='bce', n_ref=2048,
              kl_weight=0.01, threshold=0.2, batch=480, micro_batch=60)
SMALL_SHAPES = SHAPES | SMALL_POINTS | dict(threshold=0.5, plane_merge='concat', near=0.5,
                                            queries=1536)
# Radiance fields, of which Tables 9 and 10 have no column: the authors' code, which sums 20 |error|
# of colours in [0, 1], 0.05 KL and 0.1 SN. Colours in [-1, 1] have twice the error, so over 10.
FIELDS = dict(POINTS, **RARELY, decoder_ch=64, field_channels=32, coord_octaves=10,
              kl_weight=0.005, sn_start=0.01, sn_end=0.01, lr=5e-5, points=2048, rays=5000,
              ray_samples=256, batch=80, micro_batch=1)
SMALL_FIELDS = dict(SMALL_POINTS, coord_octaves=4, colour_width=64, sn_start=0.1, across=True,
                    loss='l2', kl_weight=0.0005, points=2000, rays=160, ray_samples=48, side=64,
                    focus=0.75, batch=2, lr=2e-3)
# Videos: Table 9 with the authors' basis fields, which are those that reach 256. The small presets
# take squared errors, or a boat of few pixels comes last, and many steps of two clips.
VIDEOS = dict(RARELY, resolution=256, decoder_mult=(8, 4, 2, 1), fields=(2, 4, 8), across=True,
              scale_injection=False, kl_weight=0.1, pixels=65_536, micro_batch=1)
SMALL_VIDEOS = dict(TINY, vit_width=96, vit_depth=2, vit_heads=2, plane_depth=1,
                    plane_hidden=192, across=True, scale_injection=False, loss='l2', batch=2)
PRESETS = {
    'toy_image': dict(SMALL, dataset='toy_image', resolution=32, ch=24, decoder_ch=24,
                      ch_mult=(1, 2, 3), decoder_mult=(3, 2, 1), kl_weight=0.01, lr=3e-3,
                      warmup=200, steps=1400, eval_every=700,
                      save_every=250),  # 2 cores 2.6 minutes, held-out PSNR 31.4 dB
    'image_64': dict(SMALL, dataset='image', resolution=64, scale_probs=(0.3, 0.3, 0.4),
                     kl_weight=0.05, steps=2500),  # 3,054 emoji, 2 cores 31 minutes, 31.4 dB
    'image_256': dict(PAPER, dataset='image', batch=80, steps=20_000),
    'afhq_cat': dict(PAPER, dataset='afhq_cat', batch=160, steps=6_300),
    'afhq_dog': dict(PAPER, dataset='afhq_dog', batch=160, steps=6_300),
    'celebahq': dict(PAPER, dataset='celebahq', batch=400, steps=15_000),
    'lsun_church': dict(PAPER, dataset='lsun_church', resolution=128, kl_weight=0.1, batch=160,
                        micro_batch=20, steps=40_000),
    'cifar10': dict(PAPER, dataset='cifar10', resolution=32, scales=(1.0,), scale_probs=(),
                    ch_mult=(1, 2), decoder_mult=(2, 1), fields=(2,), kl_weight=0.05, batch=160,
                    micro_batch=0, steps=40_000),
    'afhq_cat_code': dict(AUTHORS, dataset='afhq_cat', batch=160, steps=6_300),
    'afhq_dog_code': dict(AUTHORS, dataset='afhq_dog', batch=160, steps=6_300),
    'celebahq_code': dict(AUTHORS, dataset='celebahq', num_res_blocks=3, batch=400, steps=15_000),
    'toy_shape': dict(SMALL_SHAPES, dataset='toy_shape', points=1000, clouds=1, lr=3e-3,
                      kl_weight=0.001, threshold=0.4,
                      steps=1800),  # 2 cores 6.2 minutes, held-out IoU 0.953
    'shape_small': dict(SMALL_SHAPES, dataset='shape', points=2000, lr=2e-3, kl_weight=0.004,
                        steps=7000),  # 390 furniture meshes, 2 cores 44 minutes, IoU 0.532
    'shapenet_chair': dict(SHAPES, dataset='shapenet_chair', steps=3_000),
    'shapenet': dict(SHAPES, dataset='shapenet', steps=23_000),
    'text2shape': dict(SHAPES, dataset='text2shape', steps=8_000),
    'shapenet_chair_code': dict(SHAPES, dataset='shapenet_chair', decoder_ch=64, sn_start=5.0,
                                steps=3_000),
    'toy_video': dict(SMALL_VIDEOS, dataset='toy_video', resolution=32, frames=8, patch=4,
                      vit_width=64, vit_depth=1, plane_hidden=96, decoder_ch=24,
                      decoder_mult=(3, 2, 1), kl_weight=0.003, pixels=1024, lr=3e-3,
                      warmup=200, steps=6000, eval_every=6000),  # 2 cores 6.6 minutes, 28.9 dB
    'video_small': dict(SMALL_VIDEOS, dataset='video', resolution=64, decoder_mult=(4, 3, 2, 1),
                        fields=(2, 4, 8), pixels=2048, kl_weight=0.003, lr=2e-3, steps=10_000,
                        eval_every=2500),  # 152 clips, 1 core 46 minutes, 24.8 dB
    'skytimelapse': dict(VIDEOS, dataset='skytimelapse', batch=80, steps=6_000),
    'skytimelapse_code': dict(VIDEOS, dataset='skytimelapse', sn_start=5.0, batch=80, steps=6_000),
    'toy_nerf': dict(SMALL_FIELDS, dataset='toy_nerf', side=32, clouds=1, points=1500,
                     view_dirs=False,  # its colours are the same from all sides
                     z_channels=32, ray_samples=32, rays=128, colour_points=128, lr=3e-3,
                     warmup=200, workers=2, steps=4800,
                     eval_every=4800),  # 2 cores 11.1 minutes, 24.7 dB
    'nerf_small': dict(SMALL_FIELDS, dataset='nerf', steps=9000,
                       eval_every=3000),  # 138 scenes, 1 core 40 minutes, 17.6 dB
    'srn_cars': dict(FIELDS, dataset='srn_cars', steps=123_000),
}
PRESETS.update(image=PRESETS['image_64'], shape=PRESETS['shape_small'],
               video=PRESETS['video_small'], nerf=PRESETS['nerf_small'])


def build_parser():
    """Every flag, with its default and help."""
    parser = common.Parser(__doc__)
    parser.add_argument('--dataset', default='toy_image', choices=data.NAMES, help='what to learn')
    parser.add_argument('--data', default='', help='where the data are; empty = data/DATASET')
    parser.add_argument('--preset', default='', help='settings to start from; empty = those of '
                        f'--dataset. One of {", ".join(PRESETS)}')
    parser.add_argument('--name', default='', help='run folder below runs/; empty = the preset')
    parser.add_argument('--split', default='', help='held-out fraction, or a file of names; '
                        "empty = the data set's own split, 0.1 where it has none")
    parser.add_argument('--group', default='', help='regular expression: names that become equal '
                        'when it is deleted stay on one side (--group=REGEX if it begins with -)')
    parser.add_argument('--captions', default='', help='CSV with a column file, id or modelId and '
                        'one of description, caption, text, name')
    parser.add_argument('--flip', type=common.parse_bool, default=False, nargs='?', const=True,
                        help='mirror half of the training items, left and right')
    for config in (*data.CONFIGS, VAEConfig, common.RunConfig):
        parser.add_config(config)
    return parser


def open_data(args, split):
    """The training or held-out data set that the flags ask for."""
    options = dict(data.options_of(vars(args)), flip=args.flip and split == 'train')
    return data.make_dataset(args.dataset, args.data or None, split, args.split,
                             args.group or None, **options)


@torch.no_grad()
def latent_statistics(vae, batch, noise):
    """Extreme deviations of a channel over a batch, and how many channels are active."""
    posterior = vae.encode(batch)
    std = posterior.sample(noise).transpose(0, 1).flatten(1).std(1)
    active = (posterior.mean.transpose(0, 1).flatten(1).std(1) > 0.1).sum()
    return dict(z_std_min=std.min(), z_std_max=std.max(), z_active=active)


def structure_of(state):
    """What no flag says of the network of a checkpoint, or of None, a dict of its config."""
    about = state['vae_config'] if state else {}
    return {k: about[k] for k in STRUCTURE if k in about}


def loss_of(model, dataset, n):
    """The loss of n copies of a training item."""
    item = dataset.item(0, common.seeded('micro batch'))
    batch = torch.utils.data.default_collate([item] * n)
    return model(common.move(batch, next(model.parameters()).device), penalty=0.0)['total']


def save(path, step, args, model, opt, dataset):
    """Write vae.pt: weights, optimiser, flags and split, all that continuing needs."""
    common.save_checkpoint(path, dict(
        kind='vae', step=step, args=vars(args), vae_config=vars(model.config),
        vae=model.state_dict(), opt=opt.state_dict(), splits=dataset.splits()))


def main():
    """The command line: read the flags, then train from where the run stands."""
    parser = build_parser()
    args = parser.parse_preset(PRESETS, parser.known().dataset)
    args.name = args.name or args.preset
    process = common.start_process(args.device, args.amp)
    common.check_run_flags(args, process.world)
    common.require(args.anneal > 0 and (args.sn_end > 0 or not args.sn_start),
                   '--anneal and --sn_end: must be positive')
    common.resolved('--captions', args.captions)

    # 1. what to start from; then data and model
    folder = common.run_folder(args.name)
    state = common.resume(folder / 'vae.pt', args, 'vae')
    step, init = state['step'] if state else 0, None
    if process.is_first and step < args.steps:
        common.try_writing('--name', folder)
    common.agree_on_flags(args, step=step)
    if args.init and not state:
        path = common.the_checkpoint(args.init, 'vae.pt', 'ldm.pt')
        init = open_checkpoint(path, 'vae')
    base = data.DATASETS[args.dataset][0]
    with torch.device('meta'):  # what cannot be is refused before the data are read
        D2CVAE(common.from_flags(args, VAEConfig, domain=base.domain, channels=base.channels))
    train, held_out = open_data(args, 'train'), open_data(args, 'test')
    common.agree_on_data(train)
    config = common.from_flags(args, VAEConfig, **train.settles(), **structure_of(state or init))
    torch.manual_seed(args.seed)
    model = D2CVAE(config).to(process.device)
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, args.beta2),
                            weight_decay=args.weight_decay, fused=True)

    # 2. continue if there is something to continue
    if state:
        before, now = ([{*names} for names in splits.values()]  # listed in any order
                       for splits in (state['splits'], train.splits()))
        common.require(before == now, f'{folder}/vae.pt was made with other '
                       'data: files have come or gone; start over with --restart or another --name')
        if common.finished(folder / 'vae.pt', state, args, process):
            return
        common.load_weights(model, state['vae'], folder / 'vae.pt')
        with common.fitting(folder / 'vae.pt'):
            opt.load_state_dict(state['opt'])
    else:
        if args.init:
            common.load_weights(model, init['vae'], path)
        model.spectral(rounds=40)
    log = common.start_run(folder, 'vae', args, process, step, [
        f'{len(train)} training items', common.parameters_of(model),
        f'latent {config.z_channels} x {model.latent_sizes()}', f'N_ref {config.n_ref}'])
    if process.is_first:
        common.list_notes(train.notes, train.bad + held_out.bad)
        if not state:
            common.write_text(folder / 'splits.json', json.dumps(train.splits()))
    state = None  # what it holds is copied
    micro = common.micro_batch(args, process, model, partial(loss_of, model, train))
    rows = common.rounds(args.batch, micro, process.world)
    ddp = common.parallel(model, args, process)
    batches = common.stream(train, args, step, process, micro)
    guard, bar = common.FiniteGuard(process.device), common.progress(args, step, process)
    shape = config.z_channels, sum(h * w for h, w in model.latent_sizes().values())
    weights = torch.empty(2, device=process.device)

    # 3. train
    started, since = time.time(), step
    while step < args.steps:
        common.set_lr(opt, common.lr_at(step, args))
        for weight, value in zip(weights, annealed(step, args.steps, config)):
            weight.fill_(value)  # without waiting for the device, as a copy from the CPU would
        opt.zero_grad(set_to_none=True)
        totals = {}
        for i, count in enumerate(rows):
            positions, batch = next(batches)
            noise, _ = common.row_noise(positions, ('posterior', args.seed), process.device, shape)
            share, last = count / sum(rows), i == len(rows) - 1
            with common.accumulating(ddp, last):
                with process.autocast():  # the spectral term, which no item changes, comes once
                    losses = ddp(batch, weights, noise, last / share)
                (losses['total'] * share).backward()
            for k, v in losses.items():
                totals[k] = totals.get(k, 0) + v.detach() * share
        norm = common.clip_gradients(model, args.clip)
        opt.step()
        step += 1
        guard.update(step, totals['total'], norm)
        bar.update()

        if step % args.log_every == 0 or step == args.steps:
            guard.check()
            values = common.mean_over_ranks(totals)
            rate = (step - since) * args.batch / (time.time() - started)
            bar.set_postfix(loss=f'{values["total"]:.4f}', items_per_s=f'{rate:.0f}')
            if process.is_first:
                log.write(step=step, **values, norm=norm, lr=common.lr_at(step - 1, args),
                          items_per_s=rate)
        if process.is_first and (step % args.eval_every == 0 or step == args.steps):
            guard.check()
            model.eval()
            result, pictures = metrics.held_out(model, held_out)
            model.train()
            stats = latent_statistics(model, batch, noise)
            log.write(step=step, **result, **stats)
            common.draw_curves(folder)
            data.save_grid(folder / 'samples' / f'reconstruction_{step:07d}.png', pictures, room=8)
            bar.write(f'step {step}: held out, ' + ', '.join(
                f'{k} {v:.4g}' for k, v in result.items())
                + f'; latent std {stats["z_std_min"]:.2f} to {stats["z_std_max"]:.2f}')
        if process.is_first and (step % args.save_every == 0 or step == args.steps):
            guard.check()
            save(folder / 'vae.pt', step, args, model, opt, train)
    bar.close()


if __name__ == '__main__':
    common.run(main, common.STOPPED)
