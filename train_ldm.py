"""Train stage 2, the latent diffusion model (ldm.py), on the latents of a finished stage 1.

    python train_ldm.py                          # continues the newest stage-1 run
    python train_ldm.py --vae runs/NAME          # or that of this run
    torchrun --nproc_per_node=8 train_ldm.py
    python train_ldm.py --vae runs/NAME --slim small.pt    # what sampling needs, in half precision

Encoder, decoder and MLP are frozen. The result is runs/NAME/ldm.pt, which holds both
stages; the same command continues it from its last checkpoint.
"""
import math
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import numpy as np
import torch
import torch.distributed as dist

import common
import data
from common import flag
from encoders import text_reader
from ldm import LDM, LDMConfig, first_stage, generate

# Differences from LDMConfig, LatentConfig and RunConfig only, by the name of stage 1's preset. What
# follows a preset was measured, see RESULTS.md; those without were not run.
PAPER = dict(weight_decay=0.0, beta2=0.999, accumulate=5)
SHAPES = dict(PAPER, weight_decay=0.01, lr=2e-4, batch=400)
SMALL = dict(PAPER, accumulate=1, ch=64, ch_mult=(1, 2, 2), num_res_blocks=1, attn_factors=(2, 4),
             mixing_init=-3.0, mixing_lr_mult=10.0, latent_norm='channel', batch=32, lr=5e-4,
             warmup=200, ema=0.999)
# Short runs: a high rate, for which AdamW's second moments must follow sooner and the mixing logits
# must not run ahead; with SMALL's beta2 and multiplier some such runs stay where they begin.
TOY = dict(SMALL, lr=2e-3, beta2=0.99, mixing_lr_mult=2.5, ema=0.995)
PRESETS = {
    'toy_image': dict(TOY, ch=48, mixing_init=-1.5, steps=1000, save_every=250),  # 1.3 minutes
    'image_64': dict(SMALL, ch_mult=(1, 2, 4), steps=9000),  # 2 cores 64 minutes, FID 97.5
    'image_256': dict(PAPER, batch=160, steps=50_000),
    'afhq_cat': dict(PAPER, batch=160, steps=47_000),
    'afhq_dog': dict(PAPER, batch=160, steps=47_000),
    'celebahq': dict(PAPER, batch=200, steps=225_000),
    'lsun_church': dict(PAPER, batch=200, steps=225_000),
    'cifar10': dict(PAPER, ch=128, attn_factors=(2, 4), batch=160, steps=200_000),
    'afhq_cat_code': dict(PAPER, ch=224, ch_mult=(1, 2, 4, 6), batch=160, steps=47_000),
    'afhq_dog_code': dict(PAPER, ch=224, ch_mult=(1, 2, 4, 6), batch=160, steps=47_000),
    'celebahq_code': dict(PAPER, ch_mult=(1, 2, 4, 8), batch=200, steps=225_000),
    'toy_shape': dict(TOY, triplane='concat', steps=1100, eval_every=1100),  # 3.6 minutes
    'shape_small': dict(SMALL, triplane='concat', steps=3600, eval_every=1000),  # 32 minutes
    'shapenet_chair': dict(SHAPES, steps=36_000),
    'shapenet': dict(SHAPES, steps=270_000),
    'text2shape': dict(SHAPES, steps=100_000),
    'shapenet_chair_code': dict(SHAPES, ch_mult=(1, 2, 4, 6), triplane='concat', lr=1e-4,
                                steps=36_000),
    'toy_video': dict(TOY, steps=900),  # 2.4 minutes
    'video_small': dict(TOY, lr=1e-3, ema=0.999, steps=3000),  # 1 core 22 minutes
    'skytimelapse': dict(PAPER, weight_decay=0.01, attn_factors=(1, 2, 4, 8), head_channels=64,
                         accumulate=1, batch=16, steps=225_000),
    'toy_nerf': dict(TOY, triplane='concat', steps=1000, eval_every=1000),  # 3.1 minutes
    'nerf_small': dict(SMALL, triplane='concat', lr=1e-3, steps=2400,
                       eval_every=800),  # 1 core 13 minutes
    'srn_cars': dict(SHAPES, batch=160, steps=100_000),
}
PRESETS.update(image=PRESETS['image_64'], shape=PRESETS['shape_small'],
               video=PRESETS['video_small'], nerf=PRESETS['nerf_small'])


@dataclass
class LatentConfig:
    """How stage 2 is fed and averaged."""
    posterior: str = flag('sample', 'latents to learn: samples of q(z|x), or its mean',
                          choices=('sample', 'mean'))
    cache: str = flag('auto', 'keep the means and deviations of all latents; auto = memory below '
                      '2 GiB, else none', choices=('auto', 'none', 'memory', 'disk'))
    ema: float = flag(0.9999, 'decay of the averaged weights that sampling uses')
    mixing_lr_mult: float = flag(1.0, "the mixing logit's learning rate over --lr")


def build_parser():
    """Every flag, with its default and help."""
    parser = common.Parser(__doc__)
    parser.add_argument('--vae', default='', help='run folder or vae.pt of stage 1; empty = newest')
    parser.add_argument('--data', default='', help='where the data are now, if they have moved')
    parser.add_argument('--captions', default='', help='CSV of captions; empty = those of stage 1')
    parser.add_argument('--preset', default='', help='settings to start from; empty = as stage 1. '
                        f'One of {", ".join(PRESETS)}')
    parser.add_argument('--name', default='', help="run folder below runs/; empty = stage 1's")
    parser.add_argument('--slim', default='', metavar='FILE',
                        help='write the run to FILE without what only training needs, and stop')
    parser.add_config(LDMConfig)
    parser.add_config(LatentConfig)
    parser.add_config(common.RunConfig)
    return parser


def write_slim(path, target):
    """Copy ldm.pt without optimiser and raw weights, floats in half precision."""
    state = common.load_checkpoint(path, 'ldm')
    common.try_checkpoint('--slim', target)
    half = {part: {k: v.half() if v.is_floating_point() else v for k, v in state[part].items()}
            for part in ('vae', 'ema')}
    kept = {k: v for k, v in state.items() if k not in ('opt', 'model')}
    common.save_checkpoint(target, {**kept, **half})
    print(f'{target}: {Path(target).stat().st_size / 2 ** 20:.1f} MiB, step {state["step"]}')


# ---- latents -----------------------------------------------------------------------------------

class Latents:
    """A data set's latents as (mean, std), encoded once in each of its views.

    In memory, rows are shared out over the processes and gathered; a file is written by the first
    process. `item` draws a view as the data set's own does, so that pictures train alike with and
    without the cache; of a shape it knows no other clouds than those kept.
    """

    def __init__(self, dataset, vae, file=None):
        self.dataset, self.views = dataset, dataset.views
        shape = (len(dataset) * self.views, 2, *latent_shape(vae))
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if file is None:
            self.table = torch.zeros(shape)
            self.fill(vae, range(rank, shape[0], world))
            if world > 1:
                dist.all_reduce(self.table)
        else:
            if rank == 0 and not file.exists():
                common.replace(file, partial(self.write, vae, shape))
            if world > 1:
                dist.barrier()
            self.table = np.load(file, mmap_mode='c')  # torch warns of read-only arrays

    def write(self, vae, shape, path):
        size, free = 4 * math.prod(shape), shutil.disk_usage(path.parent).free
        common.require(size < free, f'--cache disk: needs {size / 2 ** 20:.1f} MiB in {path.parent}'
                       f', {free / 2 ** 20:.1f} MiB are free; try --cache none')
        self.table = np.lib.format.open_memmap(path, 'w+', 'float32', shape)
        self.fill(vae, range(shape[0]))
        self.table.flush()

    @torch.no_grad()
    def fill(self, vae, rows, batch=64):
        device = next(vae.parameters()).device
        for start in common.tqdm(range(0, len(rows), batch), desc='encoding', unit='batch',
                                 disable=rows.start > 0):
            part = rows[start:start + batch]
            seen = [self.dataset.view(*divmod(k, self.views)) for k in part]
            posterior = vae.encode(common.move(torch.utils.data.default_collate(seen), device))
            moments = torch.stack([posterior.mean, (0.5 * posterior.logvar).exp()], dim=1).cpu()
            for k, m in zip(part, moments):
                self.table[k] = m

    def __len__(self):
        return len(self.dataset)

    def item(self, i, rng=None):
        mean, std = torch.as_tensor(self.table[i * self.views + self.dataset.draw_view(rng)])
        return dict(mean=mean, std=std, **self.dataset.known(i, rng))


def open_latents(dataset, vae, args, vae_path, folder):
    """What to stream from: the data set's `Latents` or, without a cache, the data set itself."""
    size = 8 * math.prod(latent_shape(vae)) * len(dataset) * dataset.views
    if args.cache == 'none' or args.cache == 'auto' and size >= 2 ** 31:
        return dataset
    if args.cache != 'disk':
        return Latents(dataset, vae)
    return Latents(dataset, vae, folder / f'latents_{common.file_digest(vae_path)[:16]}.npy')


@torch.no_grad()
def latents_of(batch, vae, noise, posterior='sample'):
    """z (B,C,L) of a batch of cached moments or of items; `noise` (B,C,L) draws from q(z|x)."""
    if 'mean' in batch:
        mean, std = batch['mean'], batch['std']
    else:
        q = vae.encode(batch)
        mean, std = q.mean, (0.5 * q.logvar).exp()
    return mean if posterior == 'mean' else mean + std * noise


@torch.no_grad()
def measure_latents(latents, vae, args, device, batches=16):
    """Mean and deviation of each channel over the first training batches, seen by every process."""
    stream = common.Stream(latents, args.seed)
    count = min(batches * args.batch, len(latents))
    total = 0
    for start in range(0, count, 16):
        items = [stream[k] for k in range(start, min(start + 16, count))]
        batch = common.move(torch.utils.data.default_collate(items), device)
        noise = torch.randn(len(items), *latent_shape(vae),
                            generator=common.torch_seeded('statistics', args.seed, start))
        z = latents_of(batch, vae, noise.to(device), args.posterior).double()
        total = total + torch.stack([z.mean(2).sum(0), z.square().mean(2).sum(0)])
    mean, square = total / count
    return mean.float(), (square - mean.square()).sqrt().float()


def latent_shape(vae):
    """(C, L) of a first stage's latents."""
    return vae.config.z_channels, sum(h * w for h, w in vae.latent_sizes().values())


# ---- measurements while training ---------------------------------------------------------------

def condition_of(batch, args, reader):
    """The condition that a batch's items come with, labels or text, or None."""
    if args.num_classes:
        return batch['label']
    return reader(batch['text']) if reader else None


@torch.no_grad()
def evaluate(ema_model, vae, held_out, args, reader, device, count=128):
    """Held-out loss at fixed noises and times, and pictures of 36 samples.

    Their conditions are all classes in turn, or the first held-out texts.
    """
    ema_model.eval()
    items = [held_out.view(i, 0) | held_out.known(i)
             for i in common.evenly_spaced(len(held_out), count)]
    batch = common.move(torch.utils.data.default_collate(items), device)
    generator = common.torch_seeded('held out', args.seed)
    z = latents_of(batch, vae, torch.randn(len(items), *ema_model.shape, generator=generator)
                   .to(device), args.posterior)
    drawn = ema_model.draw(len(items), generator)
    drawn['t'] = torch.linspace(0, 999, len(items)).long()
    cond = condition_of(batch, args, reader)
    loss = ema_model(z, cond, **common.move(drawn, device))
    if cond is not None:
        own = torch.arange(36, device=device)
        cond = own % args.num_classes if args.num_classes else cond[own % len(cond)]
    z = generate(vae, ema_model, range(36), cond=cond, batch=36)
    return dict(held_out_loss=loss), vae.show(vae.decode(z))


def parse(argv=None):
    """Arguments and the stage-1 checkpoint they are for: (args, path, state)."""
    parser = build_parser()
    vae = parser.known(argv).vae
    try:
        common.require(vae or common.find_checkpoint('', 'vae.pt'),
                       'no stage-1 run in runs/: train one with python train_vae.py')
        path = common.the_checkpoint(vae, 'vae.pt')
        state = common.load_checkpoint(path, 'vae')
    except (ValueError, OSError):
        parser.description += ' Defaults are those of no preset, for lack of a stage 1.'
        parser.parse_known_args(argv)  # -h works without a stage 1
        raise
    args = parser.parse_preset(PRESETS, state['args']['preset'], argv)
    args.vae = str(path)
    if not args.name:
        args.name = common.run_name(path)
        own = common.run_folder(args.name) / 'vae.pt'
        common.require(not own.exists() or common.file_digest(own) == common.file_digest(path),
                       f'{own} is another stage 1 than {path}; give the run of stage 2 a --name')
    args.dataset = state['args']['dataset']
    return args, path, state


def open_data(info, args):
    """The training and held-out data of stage 1, by its info, with what conditions stage 2."""
    options = dict(data.DATASETS[args.dataset][0].encoder_only)
    if args.captions:
        options['captions'] = args.captions
    train, held_out = (data.open_run_data(info, split, args.data, **options)
                       for split in ('train', 'test'))
    common.require(not args.num_classes or train.labels is not None,
                   f'--num_classes {args.num_classes}: {args.dataset} has no labels')
    common.require(not args.num_classes or max(train.labels) < args.num_classes,
                   f'--num_classes {args.num_classes}: there are labels up to '
                   f'{max(train.labels or [0])}')
    cure = 'leave it out' if train.computed else 'name them with --captions'
    common.require(not args.text or train.captions, f'--text {args.text}: {args.dataset} has no '
                   f'captions; {cure}')
    if train.captions and not args.text:
        train.notes.append('captions are not used without --text')
    return train, held_out


def main():
    """The command line: read the flags, then train from where the run stands."""
    args, vae_path, first = parse()
    folder, digest = common.run_folder(args.name), common.file_digest(vae_path)
    if args.slim:
        return write_slim(folder / 'ldm.pt', args.slim)
    process = common.start_process(args.device, args.amp)
    device = process.device
    common.check_run_flags(args, process.world)
    common.require(args.ema < 1, f'--ema {args.ema}: must be below 1')
    args.captions = common.resolved('--captions', args.captions)
    reader = text_reader(args.text, device) if args.text else None
    if args.text not in ('', 'bytes'):
        args.text = str(Path(args.text).resolve())
    state = common.resume(folder / 'ldm.pt', args, 'ldm')
    step = state['step'] if state else 0
    common.require(not state or state['vae_hash'] == digest, f'{vae_path} is not what stage 2 '
                   f'in {folder} began on, or has changed; give another --name, or --restart')
    if common.finished(folder / 'ldm.pt', state, args, process):
        return

    # 1. the frozen first stage, the model, what it starts from; last, the data
    vae, info = first_stage(first, device, vae_path)
    config = common.from_flags(args, LDMConfig, domain=vae.domain, planes=vae.latent_sizes(),
                               z_channels=vae.config.z_channels,
                               context_channels=reader.channels if reader else 0)
    torch.manual_seed(args.seed)
    model = LDM(config).to(device)
    average = LDM(config).to(device).requires_grad_(False)
    opt = torch.optim.AdamW(model.param_groups(args.lr, args.weight_decay, args.mixing_lr_mult),
                            lr=args.lr, betas=(0.9, args.beta2), fused=True)
    if state:
        common.load_weights(model, state['model'], folder / 'ldm.pt')
        with common.fitting(folder / 'ldm.pt'):
            opt.load_state_dict(state['opt'])
    elif args.init:
        path = common.the_checkpoint(args.init, 'ldm.pt')
        common.load_weights(model, common.load_checkpoint(path, 'ldm')['ema'], path)
    train, held_out = open_data(info, args)

    # 2. continue, or measure the latents
    common.lock_run(folder, process)
    latents = open_latents(train, vae, args, vae_path, folder)
    if not state:
        model.set_latent_stats(*measure_latents(latents, vae, args, device))
        if reader and model.text is None:
            model.set_null_context(reader([''])[0])
    ema = common.EMA(model, args.ema)
    if state:
        with common.fitting(folder / 'ldm.pt'):
            ema.load_state_dict(state['ema'])
    low, high = model.z_std.min().item(), model.z_std.max().item()
    log = common.start_run(folder, 'ldm', args, process, step, [
        f'{len(train)} training items', common.parameters_of(model),
        f'stage 1 at step {first["step"]} of {first["args"]["steps"]}',
        f'latent std {low:.2f} to {high:.2f}'])
    if (low < 0.7 or high > 1.3) and config.latent_norm == 'none':
        train.notes.append('latents far from unit deviation; --latent_norm channel or more KL '
                           'would help')
    if process.is_first:
        common.list_notes(train.notes, train.bad + held_out.bad)
    ddp = common.parallel(model, args, process)
    batches = common.stream(latents, args, step, process)
    guard, bar = common.FiniteGuard(device), common.progress(args, step, process)

    # 3. train
    started, since = time.time(), step
    while step < args.steps:
        common.set_lr(opt, common.lr_at(step, args))
        generator = common.torch_seeded('diffusion', args.seed, step)
        z_noise = torch.randn(args.batch, *model.shape, generator=generator)
        drawn = model.draw(args.batch, generator)
        opt.zero_grad(set_to_none=True)
        total = 0
        for i in range(args.accumulate):
            batch = common.move(next(batches), device)
            own = {k: common.own_rows(v, args, i, process).to(device)
                   for k, v in dict(drawn, z=z_noise).items()}
            z = latents_of(batch, vae, own.pop('z'), args.posterior)
            cond = condition_of(batch, args, reader)
            with common.accumulating(ddp, i == args.accumulate - 1):
                with process.autocast():
                    loss = ddp(z, cond, **own)
                (loss / args.accumulate).backward()
            total = total + loss.detach() / args.accumulate
        norm = common.clip_gradients(model, args.clip)
        opt.step()
        step += 1
        ema.update(step)
        guard.update(step, total, norm)
        bar.update()

        if step % args.log_every == 0 or step == args.steps:
            guard.check()
            values = common.mean_over_ranks(dict(loss=total))
            rate = (step - since) * args.batch / (time.time() - started)
            bar.set_postfix(loss=f'{values["loss"]:.4f}', items_per_s=f'{rate:.0f}')
            if process.is_first:
                log.write(step=step, **values, norm=norm, lr=common.lr_at(step - 1, args),
                          items_per_s=rate)
        if process.is_first and (step % args.eval_every == 0 or step == args.steps):
            guard.check()
            average.load_state_dict(ema.state_dict())
            result, pictures = evaluate(average, vae, held_out, args, reader, device)
            log.write(step=step, **result)
            common.draw_curves(folder)
            data.save_grid(folder / 'samples' / f'sample_{step:07d}.png', pictures, 9)
            bar.write(f'step {step}: held-out loss {result["held_out_loss"]:.4f}')
        if process.is_first and (step % args.save_every == 0 or step == args.steps):
            guard.check()
            common.save_checkpoint(folder / 'ldm.pt', dict(
                kind='ldm', step=step, args=vars(args), vae_args=first['args'],
                splits=first['splits'], vae_hash=digest, vae_config=info['vae_config'],
                vae=first['vae'], ldm_config=asdict(config), model=model.state_dict(),
                ema=ema.state_dict(), opt=opt.state_dict()))
    bar.close()


if __name__ == '__main__':
    common.run(main, common.STOPPED)
