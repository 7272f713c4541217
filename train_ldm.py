"""Train stage 2, the latent diffusion model (ldm.py), on the latents of a stage 1.

    python train_ldm.py                          # continues the newest stage-1 run
    python train_ldm.py --vae runs/NAME          # or that of this run
    torchrun --nproc_per_node=8 train_ldm.py
    python train_ldm.py --vae runs/NAME --slim small.pt    # what sampling needs, in half precision

Encoder, decoder and MLP are frozen. The result is runs/NAME/ldm.pt, which holds both
stages; the same command continues it from its last checkpoint.
"""
import io
import json
import math
import os
import re
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
from encoders import StoredReader, text_reader
from ldm import LDM, LDMConfig, STRUCTURE, first_stage, generate, open_checkpoint

# Differences from LDMConfig, LatentConfig and RunConfig only, by the name of stage 1's preset. What
# follows a preset was measured, see RESULTS.md; those without were not run. Their micro_batch is
# for cards of 24 GB, by what tests/test_presets.py counts.
BETAS = dict(weight_decay=0.0, beta2=0.999)
PAPER = dict(BETAS, eval_every=5000, save_every=5000, micro_batch=20)
SHAPES = dict(PAPER, weight_decay=0.01, lr=2e-4, batch=400, micro_batch=50)
SMALL = dict(BETAS, ch=64, ch_mult=(1, 2, 2), num_res_blocks=1, attn_factors=(2, 4),
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
    'celebahq': dict(PAPER, batch=200, micro_batch=25, steps=225_000),
    'lsun_church': dict(PAPER, batch=200, micro_batch=50, steps=225_000),
    'cifar10': dict(PAPER, ch=128, attn_factors=(2, 4), batch=160, micro_batch=0,
                    steps=200_000),
    'afhq_cat_code': dict(PAPER, ch=224, ch_mult=(1, 2, 4, 6), batch=160, steps=47_000),
    'afhq_dog_code': dict(PAPER, ch=224, ch_mult=(1, 2, 4, 6), batch=160, steps=47_000),
    'celebahq_code': dict(PAPER, ch_mult=(1, 2, 4, 8), batch=200, micro_batch=4, steps=225_000),
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
                         batch=16, steps=225_000),
    'skytimelapse_code': dict(PAPER, weight_decay=0.01, ch_mult=(1, 2, 4, 6), head_channels=64,
                              plane_embed=False, batch=16, steps=225_000),
    'toy_nerf': dict(TOY, triplane='concat', steps=1000, eval_every=1000),  # 3.1 minutes
    'nerf_small': dict(SMALL, triplane='concat', lr=1e-3, steps=2400,
                       eval_every=800),  # 1 core 13 minutes
    'srn_cars': dict(SHAPES, lr=1e-4, batch=1280, micro_batch=40, steps=5_800, eval_every=500,
                     save_every=500),
}
PRESETS.update(image=PRESETS['image_64'], shape=PRESETS['shape_small'],
               video=PRESETS['video_small'], nerf=PRESETS['nerf_small'])


@dataclass
class LatentConfig:
    """How stage 2 is fed and averaged."""
    posterior: str = flag('sample', 'latents to learn: samples of q(z|x), or its mean',
                          choices=('sample', 'mean'))
    target: str = flag('drawn', 'noise that the loss compares with: as drawn, or expected of z_t '
                       'by q(z|x), which varies less', choices=('drawn', 'expected'))
    cache: str = flag('auto', 'keep the means and deviations of all latents; auto = memory or '
                      'disk, if there is room, else none',
                      choices=('auto', 'none', 'memory', 'disk'))
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


def without_folders(flags):
    """Flags whose absolute paths have become names: nobody else has the folders."""
    return {k: Path(v).name if isinstance(v, str) and os.path.isabs(v) else v
            for k, v in flags.items()}


def write_slim(path, target):
    """Copy ldm.pt without optimiser, raw weights and folders, floats in half precision."""
    state = open_checkpoint(path, 'ldm')
    common.try_checkpoint('--slim', target)
    half = {part: {k: v.half() if v.is_floating_point() else v for k, v in state[part].items()}
            for part in ('vae', 'ema')}
    kept = {k: v for k, v in state.items() if k not in ('opt', 'model')}
    flags = {part: without_folders(state[part]) for part in ('args', 'vae_args', 'ldm_config')}
    common.save_checkpoint(target, {**kept, **half, **flags})
    print(f'{target}: {Path(target).stat().st_size / 2 ** 20:.1f} MiB, step {state["step"]}')


# ---- latents -----------------------------------------------------------------------------------

class Views(torch.utils.data.Dataset):
    """What the encoder reads of a data set: each view of item 0, then of item 1, .."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, k):
        return self.dataset.view(*divmod(k, self.dataset.views))


class Latents:
    """A data set's latents as (mean, std) in half precision, encoded once in each of its views.

    Blocks of rows are shared out over the processes: in memory the table is gathered, in a file
    each writes its own, and what a kill has stopped goes on. `item` draws a view as the data set's
    own does, so that pictures train alike with and without the cache; of a shape it knows no other
    clouds than those kept.
    """

    def __init__(self, dataset, encode, shape, args, process, file=None):
        self.dataset, self.views = dataset, dataset.views
        size = len(dataset) * self.views, 2, *shape
        if file:
            write_rows(file, size, process, partial(encoded, dataset, encode, args, process))
            self.table = np.load(file, mmap_mode='c')  # torch warns of read-only arrays
            return
        self.table = np.zeros(size, np.float16)
        own = [*blocks(size[0])][process.rank::process.world]
        for rows, values in zip(own, encoded(dataset, encode, args, process, own)):
            self.table[rows.start:rows.stop] = values
        if process.world > 1:
            dist.all_reduce(torch.from_numpy(self.table))

    def __getstate__(self):  # processes that do not fork map the file themselves
        mapped = isinstance(self.table, np.memmap)
        return dict(vars(self), table=Path(self.table.filename) if mapped else self.table)

    def __setstate__(self, state):
        vars(self).update(state)
        if isinstance(self.table, Path):
            self.table = np.load(self.table, mmap_mode='c')

    def __len__(self):
        return len(self.dataset)

    def item(self, i, rng=None):
        mean, std = torch.as_tensor(self.table[i * self.views + self.dataset.draw_view(rng)])
        return dict(mean=mean, std=std, **self.dataset.known(i, rng))


def blocks(count, size=16):
    """The rows 0..count-1 as ranges of up to `size`, which are encoded together."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def encoded(dataset, encode, args, process, parts):
    """Yield means and deviations of `Views`, (n,2,C,L) float16, for each of the ranges `parts`."""
    workers = common.loading_workers(args, process.device)
    loader = torch.utils.data.DataLoader(
        Views(dataset), batch_sampler=parts, pin_memory=process.device.type == 'cuda',
        num_workers=workers, multiprocessing_context=common.start_method(workers))
    for batch in common.tqdm(loader, 'encoding', unit='batch', disable=not process.is_first):
        yield torch.stack(encode(common.move(batch, process.device)), dim=1).half().cpu().numpy()


def write_rows(path, shape, process, values_of):
    """Fill a .npy of float16 values, some blocks of rows by each process.

    values_of(blocks) yields the values of each. Behind them stands a byte for each block, 1 if it
    is there, by which another call goes on where one was stopped.
    """
    header, parts = io.BytesIO(), [*blocks(shape[0])]
    about = dict(descr='<f2', fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(header, about)
    first, row = header.tell(), 2 * math.prod(shape[1:])
    marks, end = first + row * shape[0], first + row * shape[0] + len(parts)
    if process.is_first and not (path.exists() and path.stat().st_size == end):
        free = shutil.disk_usage(path.parent).free
        common.require(end < free, f'--cache disk: needs {end / 2 ** 20:.1f} MiB in {path.parent}, '
                       f'{free / 2 ** 20:.1f} MiB are free; try --cache none')
        with common.writing(path), open(path, 'wb') as file:
            file.write(header.getvalue())
            file.truncate(end)
    barrier(process)
    # Written through, or an NFS client may write whole pages, over what others have written there.
    with open(path, 'r+b', opener=lambda path, flags: os.open(
            path, flags | getattr(os, 'O_DSYNC', 0))) as file:
        file.seek(marks)
        done = file.read()
        own = [b for b in range(len(parts))[process.rank::process.world] if not done[b]]
        for b, values in zip(own, values_of([parts[b] for b in own])):
            with common.writing(path):
                file.seek(first + row * parts[b].start)
                file.write(values.tobytes())
                file.flush()
                os.fsync(file.fileno())  # a mark must not be on the disk before the values
                file.seek(marks + b)
                file.write(b'\1')
                file.flush()
    barrier(process)


def barrier(process):
    """Wait for all processes."""
    if process.world > 1:
        dist.barrier()


def free_memory():
    """Bytes of memory that can be had without swapping, 0 if the system does not tell."""
    found = re.search(r'MemAvailable: *(\d+) kB', common.salvaged(Path('/proc/meminfo')))
    return 1024 * int(found[1]) if found else 0


def choose_cache(choice, size, path):
    """--cache without 'auto' for latents of `size` bytes, by the memory and disk that are free.

    In memory each process of this machine has its own; a quarter of it, or half of the disk, may be
    filled. What an earlier start keeps at `path` stays there.
    """
    if choice != 'auto':
        return choice
    free = dict(memory=free_memory() // (4 * common.local_processes()),
                disk=shutil.disk_usage(path.parent).free // 2)
    fits = next((place for place in free if size < free[place]), 'none')
    choice = ['disk' if path.is_file() else fits]
    if dist.is_initialized():
        dist.broadcast_object_list(choice)
    room = ', '.join(f'{place} has room for {n / 2 ** 20:.0f}' for place, n in free.items())
    print(f'--cache auto: {choice[0]}, for {size / 2 ** 20:.0f} MiB of latents ({room}); with '
          'none, each step encodes its items')
    return choice[0]


def open_latents(dataset, encode, shape, args, process, path):
    """What to stream from: the data set's `Latents` or, without a cache, the data set itself.

    path: the file of latents, if they are kept in one; those of another first stage are removed.
    """
    if process.is_first:
        for old in {*path.parent.glob('latents_*.npy')} - {path}:
            old.unlink()
    size = 4 * math.prod(shape) * len(dataset) * dataset.views
    cache = choose_cache(args.cache, size, path)
    if cache == 'none':
        return dataset
    return Latents(dataset, encode, shape, args, process, path if cache == 'disk' else None)


def encoder(vae, args, process):
    """Function: batch of items -> mean and deviation of q(z|x), (B,C,L) each, without gradients."""
    def moments(x):
        posterior = vae.encode(x)
        return posterior.mean, (0.5 * posterior.logvar).exp()
    network = common.compiled(moments, args, process)

    @torch.no_grad()
    def encode(batch):
        with process.autocast():
            return network(batch[vae.reads])
    return encode


def latents_of(batch, encode, noise, posterior='sample'):
    """z (B,C,L) of a batch of cached moments or of items, and mean and deviation of its q(z|x).

    `noise` (B,C,L) draws from q(z|x); z is its mean if `posterior` is 'mean'.
    """
    mean, std = (batch[k].float() for k in ('mean', 'std')) if 'mean' in batch else encode(batch)
    return mean if posterior == 'mean' else mean + std * noise, (mean, std)


def measure_latents(latents, encode, shape, args, process, batches=16):
    """Mean and deviation of each channel over the first training batches, some on each process."""
    stream = common.Stream(latents, args.seed)
    count = min(batches * args.batch, len(latents))
    total = torch.zeros(2, shape[0], dtype=torch.float64, device=process.device)
    for part in [*blocks(count)][process.rank::process.world]:
        batch = torch.utils.data.default_collate([stream[k] for k in part])
        noise, _ = common.row_noise(part, ('statistics', args.seed), process.device, shape)
        z, _ = latents_of(common.move(batch, process.device), encode, noise, args.posterior)
        z = z.double()
        total += torch.stack([z.mean(2).sum(0), z.square().mean(2).sum(0)])
    if process.world > 1:
        dist.all_reduce(total)
    mean, square = total / count
    return mean.float(), (square - mean.square()).sqrt().float()


# ---- measurements while training ---------------------------------------------------------------

def condition_of(batch, args, reader):
    """The condition that a batch's items come with, labels or text, or None."""
    if args.num_classes:
        return batch['label']
    return reader(batch['text']) if reader else None


@torch.no_grad()
def evaluate(model, vae, encode, held_out, args, reader, count=128, together=16):
    """Held-out loss at fixed noises and times, and pictures of 36 samples.

    Their conditions are all classes in turn, or texts of held-out items. `together`: items that
    are in memory at once.
    """
    device, total, conds = model.z_mean.device, 0, []
    index = common.evenly_spaced(len(held_out), count)
    times = torch.linspace(0, 999, len(index), device=device).long()
    for rows in blocks(len(index), together):
        items = [held_out.view(index[k], 0) | held_out.known(index[k]) for k in rows]
        batch = common.move(torch.utils.data.default_collate(items), device)
        noise, drawn = model.draw(rows, 'held out', args.seed)
        cond = condition_of(batch, args, reader)
        conds += [] if cond is None else cond
        z, moments = latents_of(batch, encode, noise, args.posterior)
        drawn.update(t=times[rows.start:rows.stop],
                     posterior=moments if args.target == 'expected' else None)
        total += len(rows) * model(z, cond, **drawn)
    cond = None
    if conds:
        own = torch.arange(36, device=device)
        cond = own % args.num_classes if args.num_classes else torch.stack(conds)[own % len(conds)]
    z = generate(vae, model, range(36), cond=cond, batch=together)
    pictures = [vae.show(vae.decode(part)).cpu() for part in z.split(4)]
    return dict(held_out_loss=total / len(index)), torch.cat(pictures)


def loss_of(model, dataset, args, reader, n):
    """The loss of n latents and, if the model has any, conditions."""
    batch = torch.utils.data.default_collate([dict(dataset.known(0), position=0)] * n)
    device = model.z_mean.device
    cond = condition_of(common.move(batch, device), args, reader)
    return model(torch.zeros(n, *model.shape, device=device), cond)


def parse(argv=None):
    """Arguments and the stage-1 checkpoint they are for: (args, path, state)."""
    parser = build_parser()
    vae = parser.known(argv).vae
    try:
        common.require(vae or common.find_checkpoint('', 'vae.pt'),
                       'no stage-1 run in runs/: train one with python train_vae.py')
        path = common.the_checkpoint(vae, 'vae.pt')
        state = open_checkpoint(path, 'vae')
    except (ValueError, OSError):
        parser.description += ' Defaults are those of no preset, for lack of a stage 1.'
        parser.parse_known_args(argv)  # -h works without a stage 1
        raise
    args = parser.parse_preset(PRESETS, state['args']['preset'], argv)
    args.vae = str(path)
    if not args.name:
        args.name = common.run_name(path)
        own = common.run_folder(args.name) / 'vae.pt'
        common.require(args.slim or not own.exists()
                       or common.file_digest(own) == common.file_digest(path),
                       f'{own} is another file than {path}: train on the former with --vae '
                       f'{args.name}, or give the run of stage 2 a --name')
    args.dataset = state['args']['dataset']
    return args, path, state


def open_data(info, args, reader=None):
    """The training and held-out data of stage 1, by its info, with what conditions stage 2."""
    options = data.DATASETS[args.dataset][0].encoder_only
    train, held_out = (data.open_run_data(info, split, args.data, args.captions or None, **options)
                       for split in ('train', 'test'))
    common.require(not args.num_classes or train.labels is not None,
                   f'--num_classes {args.num_classes}: {args.dataset} has no labels')
    last = max(train.labels + held_out.labels) if args.num_classes else -1
    common.require(last < args.num_classes, f'--num_classes {args.num_classes}: there are labels '
                   f'up to {last}')
    cure = 'leave it out' if train.computed else 'name them with --captions'
    common.require(not args.text or train.captions, f'--text {args.text}: {args.dataset} has no '
                   f'captions; {cure}')
    if isinstance(reader, StoredReader):
        for texts in train.captions + held_out.captions:
            reader.check(texts)
    if train.captions and not args.text:
        train.notes.append('captions are not used without --text')
    return train, held_out


def main():
    """The command line: read the flags, then train from where the run stands."""
    args, vae_path, first = parse()
    folder, digest = common.run_folder(args.name), common.file_digest(vae_path)
    if args.slim:
        own = args.name == common.run_name(vae_path)  # of a file of both stages, its second
        both = own and 'ldm_config' in first
        return write_slim(vae_path if both else folder / 'ldm.pt', args.slim)
    process = common.start_process(args.device, args.amp)
    device = process.device
    common.check_run_flags(args, process.world)
    common.require(args.ema < 1, f'--ema {args.ema}: must be below 1')
    common.require(args.posterior == 'sample' or args.target == 'drawn', '--target expected: has '
                   'no effect with --posterior mean')
    args.captions = common.resolved('--captions', args.captions)
    reader = text_reader(args.text, device, args.text_length) if args.text else None
    if args.text not in ('', 'bytes'):
        args.text = os.path.abspath(args.text)  # of a link: what is beside it is read, too
    state = common.resume(folder / 'ldm.pt', args, 'ldm')
    step = state['step'] if state else 0
    common.agree_on_flags(args, step=step, stage_1=digest)
    began = f' ({state["args"]["vae"]})' if state else ''
    common.require(not state or state['vae_hash'] == digest, f'{vae_path} is not what stage 2 '
                   f'in {folder} began on{began}, or has changed; give that to --vae, or another '
                   '--name, or --restart')
    if common.finished(folder / 'ldm.pt', state, args, process):
        return
    if process.is_first:
        common.try_writing('--name', folder)

    # 1. the frozen first stage, the model, what it starts from; last, the data
    vae, info = first_stage(first, device, vae_path)
    start = state
    if args.init and not state:
        path = common.the_checkpoint(args.init, 'ldm.pt')
        start = open_checkpoint(path, 'ldm')
    about = start['ldm_config'] if start else {}
    config = common.from_flags(args, LDMConfig, domain=vae.domain, planes=vae.latent_sizes(),
                               z_channels=vae.config.z_channels,
                               context_channels=reader.channels if reader else 0,
                               **{k: about[k] for k in STRUCTURE if k in about})
    torch.manual_seed(args.seed)
    model = LDM(config).to(device)
    opt = torch.optim.AdamW(model.param_groups(args.lr, args.weight_decay, args.mixing_lr_mult),
                            lr=args.lr, betas=(0.9, args.beta2), fused=True)
    if state:
        common.load_weights(model, state['model'], folder / 'ldm.pt')
        with common.fitting(folder / 'ldm.pt'):
            opt.load_state_dict(state['opt'])
    elif args.init:
        common.load_weights(model, start['ema'], path)
    train, held_out = open_data(info, args, reader)
    common.agree_on_data(train)

    # 2. continue, or measure the latents
    log = common.start_run(folder, 'ldm', args, process, step, [
        f'{len(train)} training items', common.parameters_of(model),
        f'stage 1 at step {first["step"]} of {first["args"]["steps"]}'])
    if process.is_first and not (folder / 'vae.pt').exists():  # stage 1 is another run's
        common.write_text(folder / 'splits.json', json.dumps(train.splits()))
    encode = encoder(vae, args, process)
    latents = open_latents(train, encode, model.shape, args, process,
                           folder / f'latents_{digest[:16]}.npy')
    if not state:
        model.set_latent_stats(*measure_latents(latents, encode, model.shape, args, process))
        if reader and model.text is None:
            model.set_null_context(reader([''])[0])
    ema = common.EMA(model, args.ema) if process.is_first else None
    if state and ema:
        with common.fitting(folder / 'ldm.pt'):
            ema.load_state_dict(state['ema'])
    state = start = None  # what they hold is copied
    low, high = model.z_std.min().item(), model.z_std.max().item()
    print(f'latent std {low:.2f} to {high:.2f}')
    if (low < 0.7 or high > 1.3) and config.latent_norm == 'none':
        train.notes.append('latents far from unit deviation; --latent_norm channel or more KL '
                           'would help')
    if process.is_first:
        common.list_notes(train.notes, train.bad + held_out.bad)
    micro = common.micro_batch(args, process, model,
                               partial(loss_of, model, train, args, reader))
    rows = common.rounds(args.batch, micro, process.world)
    ddp = common.parallel(model, args, process)
    batches = common.stream(latents, args, step, process, micro)
    guard, bar = common.FiniteGuard(device), common.progress(args, step, process)

    # 3. train
    started, since = time.time(), step
    while step < args.steps:
        common.set_lr(opt, common.lr_at(step, args))
        opt.zero_grad(set_to_none=True)
        total = 0
        for i, count in enumerate(rows):
            positions, batch = next(batches)
            noise, drawn = model.draw(positions, 'diffusion', args.seed)
            z, moments = latents_of(batch, encode, noise, args.posterior)
            drawn['posterior'] = moments if args.target == 'expected' else None
            cond, share = condition_of(batch, args, reader), count / sum(rows)
            with common.accumulating(ddp, i == len(rows) - 1):
                with process.autocast():
                    loss = ddp(z, cond, **drawn)
                (loss * share).backward()
            total = total + loss.detach() * share
        norm = common.clip_gradients(model, args.clip)
        opt.step()
        step += 1
        if ema:
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
            with ema.applied():
                result, pictures = evaluate(model, vae, encode, held_out, args, reader)
            log.write(step=step, **result)
            common.draw_curves(folder)
            data.save_grid(folder / 'samples' / f'sample_{step:07d}.png', pictures, room=9)
            bar.write(f'step {step}: held-out loss {result["held_out_loss"]:.4f}')
        if process.is_first and (step % args.save_every == 0 or step == args.steps):
            guard.check()
            common.save_checkpoint(folder / 'ldm.pt', dict(
                kind='ldm', step=step, args=vars(args), vae_args=first['args'],
                vae_step=first['step'], vae_config=info['vae_config'], vae=vae.state_dict(),
                vae_hash=digest, splits=train.splits(), ldm_config=asdict(config),
                model=model.state_dict(), ema=ema.state_dict(), opt=opt.state_dict()))
    bar.close()


if __name__ == '__main__':
    common.run(main, common.STOPPED)
