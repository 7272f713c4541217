"""What the scripts share whatever the data are: flags, start-up, positions, checkpoints, the log.

Randomness is a function of position, never of history: which item stands at stream position k, how
it is augmented, and the noise that it meets depend on (seed, k) alone. Each process draws for its
own rows, on the device where that has generators. A resumed run, and a run on more processes or in
smaller pieces, therefore see what one undisturbed process would have seen.
"""
import argparse
import collections
import contextlib
import ctypes
import dataclasses
import errno
import gc
import hashlib
import inspect
import json
import math
import os
import platform
import re
import secrets
import shutil
import signal
import sys
import tempfile
import typing
import warnings
import zlib
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # not a Unix: runs are not locked
    fcntl = None


# ---- flags -----------------------------------------------------------------------------------

def flag(default, help, **metadata):
    """A dataclass field that becomes a command-line flag with this help text."""
    return dataclasses.field(default=default, metadata=dict(metadata, help=help))


def parse_bool(text):
    """'1', 'true', 'yes', 'on' or '0', 'false', 'no', 'off' -> bool."""
    if text.lower() in ('1', 'true', 'yes', 'on'):
        return True
    if text.lower() in ('0', 'false', 'no', 'off'):
        return False
    raise argparse.ArgumentTypeError(f'{text!r} is neither true nor false; before what is no flag '
                                     'it needs a value, as in --FLAG=on')


def at_least(low, kind, high=None):
    """Parser of a number from `low` to `high`, by default the largest that a tensor can hold."""
    largest = high or (2 ** 63 - 1 if kind is int else sys.float_info.max)

    def parse(text):
        value = kind(text)
        if not low <= value <= largest:
            raise argparse.ArgumentTypeError(f'{text} is out of range: at least {low}'
                                             + f' and at most {largest:g}' * (value > largest))
        return value
    parse.__name__ = kind.__name__  # for argparse's "invalid int value"
    return parse


def or_auto(kind):
    """Parser of what `kind` parses, or of the word auto."""
    def parse(text):
        return text if text == 'auto' else kind(text)
    parse.__name__ = kind.__name__
    return parse


def parse_tuple(kind):
    """Parser of comma-separated values, '1,2,4' -> (1, 2, 4)."""
    def parse(text):
        try:
            return tuple(kind(part) for part in text.split(',') if part.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(f'{text!r} is not a comma-separated list of numbers')
    return parse


class Help(argparse.HelpFormatter):
    """Help that shows each default as one would type it, if there is one, and examples as lines."""

    def _fill_text(self, text, width, indent):
        return text if text.startswith(' ') else super()._fill_text(text, width, indent)

    def _get_help_string(self, action):
        default = action.default
        if isinstance(default, tuple):
            default = ','.join(map(str, default))
        if default in (None, '', argparse.SUPPRESS):
            return action.help
        return f'{action.help} (default: {default})'


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are one line and whose flags can come from dataclasses.

    Of a `description` of several lines, -h shows the first above the flags and those that are
    indented, which are examples, below.
    """

    def __init__(self, description, **options):
        first, *lines = description.splitlines()
        examples = '\n'.join(line for line in lines if line.startswith(' '))
        super().__init__(description=first, epilog=examples, allow_abbrev=False,
                         formatter_class=Help, **options)
        self.set_defaults(parser=self)

    def error(self, message):
        if message.endswith('expected one argument'):
            message += ', and one that begins with - as in --FLAG=-1,1'
        raise ValueError(f'{message} (flags: python {self.prog} -h)')

    def parse_args(self, args=None, namespace=None):
        """As argparse's own; the subcommand's parser, which has the flags, refuses unknown ones."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            found.parser.error(f'unrecognized arguments: {" ".join(unknown)}')
        del found.parser
        return found

    def add_config(self, config):
        """One flag for each field of dataclass `config` that carries help text.

        Numbers are at least 0, integers and members of tuples at least 1, unless the default is
        less or the field's metadata has `low`; `high` is the most that they may be. Configs may
        share a flag, with one default.
        """
        group = self.add_argument_group(config.__name__)
        there = {a.dest: a.default for a in self._actions}
        for field in dataclasses.fields(config):
            if field.name in there:
                assert there[field.name] == field.default, f'{field.name}: one flag, two defaults'
            if 'help' not in field.metadata or field.name in there:
                continue
            kind, default, more = type(field.default), field.default, {}
            if 'auto' in field.metadata:
                kind = or_auto(at_least(0, int, field.metadata.get('high')))
            elif kind is bool:
                kind, more = parse_bool, dict(nargs='?', const=True)
            elif kind is tuple:
                low = field.metadata.get('low', 1)
                kind = parse_tuple(at_least(low, type(default[0]) if default else float))
            elif kind in (int, float) and (default >= 0 or 'low' in field.metadata):
                low = field.metadata.get('low', min(int(kind is int), default))
                kind = at_least(low, kind, field.metadata.get('high'))
            group.add_argument(f'--{field.name}', type=kind, default=default, **more,
                               help=field.metadata['help'], choices=field.metadata.get('choices'))

    def known(self, argv=None):
        """The flags as typed, before any preset; neither unknown flags nor -h end the program."""
        argv = sys.argv[1:] if argv is None else argv
        return self.parse_known_args([a for a in argv if a not in ('-h', '--help')])[0]

    def parse_preset(self, presets, default, argv=None):
        """Arguments: typed flags over the preset (--preset, else `default`) over the defaults."""
        name = self.known(argv).preset or default
        if name not in presets:
            raise ValueError(f'--preset {name}: unknown; one of {", ".join(presets)}')
        actions = {a.dest for a in self._actions}
        unknown = sorted(set(presets[name]) - actions)
        if unknown:
            raise ValueError(f'preset {name} has unknown keys: {", ".join(unknown)}')
        self.set_defaults(**presets[name])
        self.description += f' Defaults are those of the preset {name}; --preset NAME shows others.'
        args = self.parse_args(argv)
        args.preset = name
        return args


def from_flags(args, config, **more):
    """An instance of dataclass `config` from the flags of the same names, and `more` fields."""
    names = {f.name for f in dataclasses.fields(config)} - set(more)
    return config(**{k: v for k, v in vars(args).items() if k in names}, **more)


def require(condition, message):
    """Raise ValueError(message) unless `condition` holds; for what a user typed."""
    if not condition:
        raise ValueError(message)


def printable(text):
    """The text with control characters, which would command a terminal, as escapes."""
    return re.sub('[\x00-\x1f\x7f-\x9f]', lambda match: repr(match[0])[1:-1], text)


def one_line(error):
    """The message of an exception, without the traceback that a loader's worker puts before it."""
    text = str(error)
    if 'Original Traceback' in text:
        text = text.rpartition(f'\n{type(error).__name__}: ')[2]
    return printable(' '.join(text.split()))


def cure_of(error):
    """What to try where an exception says that the machine is too small, '' of any other."""
    text = str(error)
    if any(s in text for s in ('DataLoader worker (pid', 'shared memory', '/torch_')):
        return '--workers 0, or give /dev/shm more room'
    if type(error).__module__.startswith(('torch._dynamo', 'torch._inductor')):
        return '--compile off'
    too_large = not isinstance(error, RuntimeError) or 'allocate' in text or 'overflow' in text
    return 'a smaller size, --batch or, in training, --micro_batch' if too_large else ''


def run(main, stopped='stopped'):
    """Call `main()`; an error that a user can mend becomes one line on stderr and exit code 2.

    `stopped` is the line for Ctrl-C, which exits with 130. What the terminal cannot encode, such as
    parts of a file's name, is printed as escapes.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as the scripts have it until here
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    try:
        main()
        if dist.is_initialized():  # after an error NCCL would wait here for the other processes
            dist.destroy_process_group()
        return
    except (ValueError, OSError) as error:
        message, code = f'error: {one_line(error)}', 2
    except (RuntimeError, MemoryError, OverflowError) as error:
        if not cure_of(error):
            raise
        message, code = f'error: {one_line(error) or "out of memory"}; try {cure_of(error)}', 2
    except KeyboardInterrupt:
        message, code = stopped, 130
    finally:
        HELD.close()
    gc.collect()  # the exception's frames, and with them progress bars that are still open
    print(message, file=sys.stderr)
    sys.exit(code)


# ---- start-up --------------------------------------------------------------------------------

@dataclasses.dataclass
class RunConfig:
    """Flags that both training scripts have."""
    steps: int = flag(100_000, 'optimiser steps in all')
    batch: int = flag(64, 'items a step, over all processes and rounds')
    micro_batch: int = flag(0, 'items a device sees at once, a step in rounds of so many; 0 = its '
                            'whole share of --batch, auto = as many as fit, by trying', auto=True)
    lr: float = flag(1e-4, 'peak learning rate of AdamW')
    lr_min: float = flag(1e-6, 'learning rate at the end of the cosine')
    lr_schedule: str = flag('cosine', 'after the warm-up', choices=('cosine', 'constant'))
    warmup: int = flag(500, 'steps of linear warm-up', low=0)
    beta2: float = flag(0.99, "AdamW's second-moment decay")
    weight_decay: float = flag(0.01, 'decoupled weight decay')
    clip: float = flag(1.0, 'largest norm of the gradient, 0 = no clipping')
    seed: int = flag(0, 'of everything random')
    amp: str = flag('auto', 'bfloat16 autocast; auto = where that is faster by the hardware',
                    choices=('auto', 'on', 'off'))
    compile: str = flag('auto', 'torch.compile; auto = on CUDA, if it works',
                        choices=('auto', 'on', 'off'))
    device: str = flag('auto', 'cpu, cuda, cuda:1, ...; auto = CUDA if there is one')
    workers: str = flag('auto', 'data loading processes for each training process; auto = none on '
                        'CPU, else the cores over the processes, at most 8', auto=True, high=1024)
    log_every: int = flag(50, 'steps between lines of log.jsonl')
    eval_every: int = flag(500, 'steps between held-out measurements and sample pictures')
    save_every: int = flag(500, 'steps between checkpoints')
    restart: bool = flag(False, 'start over instead of continuing the run of this name')
    init: str = flag('', 'checkpoint whose weights to start from (fine-tuning)')


@dataclasses.dataclass(frozen=True)
class Process:
    """Where this process runs: its number, how many there are, its device, bfloat16 or not."""
    rank: int
    world: int
    device: torch.device
    amp: bool

    @property
    def is_first(self):
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def autocast(self):
        """Context in which networks compute in bfloat16, if `amp`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def describe(self):
        """'8 x NVIDIA H100, bfloat16'."""
        cuda = self.device.type == 'cuda'
        name = torch.cuda.get_device_name(self.device) if cuda else self.device.type.upper()
        return f'{self.world} x {name}, {"bfloat16" if self.amp else "float32"}'


def start_process(device='auto', amp='off'):
    """The Process that this is: the same path for CPU, one GPU and torchrun.

    `device` and `amp` are the flags of those names. ValueError for a device that is not there.
    """
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    local = local_processes()
    require(':' not in device or local == 1, f'--device {device}: one for {local} processes; leave '
            'out which')
    if device == 'cuda' and 'RANK' in os.environ:
        require('LOCAL_RANK' in os.environ, 'RANK is set, but not LOCAL_RANK: start the processes '
                'with torchrun')
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'--device {device}: not to be had here '
                         f'({str(error).splitlines()[0]})') from None
    require(device[:4] != 'meta', f'--device {device}: holds no numbers; take cpu')
    require(device[:3] != 'mps', f'--device {device}: has no float64, which the noise schedule '
            'needs; take cpu')
    if device[:4] == 'cuda':
        torch.set_float32_matmul_precision('high')  # TF32 where autocast leaves float32
        torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()
    rank, world = 0, 1
    if 'RANK' in os.environ:
        if device.startswith('cuda:'):
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group('cpu:gloo,cuda:nccl' if device[:4] == 'cuda' else 'gloo')
        rank, world = dist.get_rank(), dist.get_world_size()
    if rank:  # one speaks for all
        sys.stdout = open(os.devnull, 'w')
    device = torch.device(device)
    bfloat16 = resolve(amp, multiplies_bfloat16(device))
    agree(device=device.type, bfloat16=bfloat16)
    return Process(rank, world, device, bfloat16)


def local_processes():
    """How many processes torchrun has started on this machine; 1 without it."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def agree(**values):
    """ValueError if these are not the same in all processes, by which each would go its own way."""
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, values)
        other = [k for k, v in values.items() if any(f[k] != found[0][k] for f in found)]
        require(not other, 'the processes differ: '
                + '; '.join(sorted({' '.join(f'{k} {f[k]}' for k in other) for f in found})))


def agree_on_flags(args, **values):
    """The same for `values` and all flags, but for PLACES and how many items are held at once."""
    rounds = 'auto' if args.micro_batch == 'auto' else 'a number'  # numbers may differ
    told = vars(args) | dict(micro_batch=rounds)
    agree(**values, **{f'--{k}': Path(v).name if k in MAY_MOVE and v else v
                       for k, v in told.items() if k not in PLACES})


def agree_on_data(dataset):
    """The same for the items of a data set, which the stream numbers."""
    agree(items=len(dataset), digest=zlib.crc32(repr(dataset.names).encode()))


def resolve(choice, auto):
    """A flag of 'on', 'off' or 'auto' as a bool; 'auto' is `auto`."""
    return auto if choice == 'auto' else choice == 'on'


def multiplies_bfloat16(device):
    """Whether matrix products are faster in bfloat16: CUDA from 8.0, AMX, AVX512-BF16 but Intel's.

    Intel's cores without AMX have one unit for bfloat16, so that float32 is twice as fast there.
    """
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != 'cpu':
        return False
    tiles, dots = (getattr(torch.cpu, name, lambda: False)() for name in (
        '_is_amx_tile_supported', '_is_avx512_bf16_supported'))
    return tiles or dots and 'GenuineIntel' not in processor()


def processor():
    """The system's description of its CPU."""
    info = Path('/proc/cpuinfo')
    return info.read_text() if info.exists() else platform.processor()


def keep_freed_memory():
    """Make glibc keep freed memory, because every step asks for the same large blocks again.

    By default it returns them to the system, which then clears every page anew. Without glibc this
    does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if os.name == 'posix' else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: bytes to keep at its end


def check_run_flags(args, world):
    """ValueError for flag values that no run can have."""
    require(args.ch_mult, '--ch_mult: name the width of at least one level')
    require(args.lr > 0, f'--lr {args.lr}: must be positive')
    require(args.beta2 < 1, f'--beta2 {args.beta2}: must be below 1')
    require(args.batch % world == 0, f'--batch {args.batch}: must be a multiple of the '
            f'{world} processes')


# ---- randomness by position and the data stream -----------------------------------------------

def seeded(*key):
    """numpy Generator that depends on `key` (integers and strings) alone."""
    numbers = [zlib.crc32(k.encode('utf-8', 'surrogatepass')) if isinstance(k, str) else int(k)
               for k in key]  # a file's name may hold surrogates
    return np.random.default_rng([len(key), *numbers])  # numpy ignores zeros at the end


def torch_seeded(*key, device='cpu'):
    """torch Generator that depends on `key` alone; its numbers are those of its kind of device."""
    return torch.Generator(device).manual_seed(int(seeded(*key).integers(2 ** 63)))


def row_noise(positions, key, device, normal, uniform=0):
    """Noise of rows: normal numbers (B,*normal) and uniform ones in [0, 1), (B,uniform).

    Row i comes from the tuple `key` and positions[i] alone, by a generator of the device.
    """
    z = torch.empty(len(positions), *normal, device=device)
    u = torch.empty(len(positions), uniform, device=device)
    for i, k in enumerate(positions):
        generator = torch_seeded(*key, k, device=device)
        z[i].normal_(generator=generator)
        u[i].uniform_(generator=generator)
    return z, u


class Stream(Dataset):
    """Endless data set over positions: k -> item of a shuffled epoch, augmented by (seed, k).

    The item says its `position`.
    """

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed
        self.order = None, None  # the last epoch's permutation

    def __getitem__(self, k):
        epoch, i = divmod(k, len(self.dataset))
        if self.order[0] != epoch:
            self.order = epoch, seeded('order', self.seed, epoch).permutation(len(self.dataset))
        item = self.dataset.item(int(self.order[1][i]), seeded('item', self.seed, k))
        return dict(item, position=k)


def rounds(batch, micro, world):
    """How many rows a process has in each round of a step: at most `micro`, all about alike."""
    local = batch // world
    count = -(-local // micro)
    return [local // count + (i < local % count) for i in range(count)]


def positions(step, batch, micro, rank, world):
    """The positions that one process reads, a list for each round, from `step` on."""
    while True:
        start = step * batch + rank * (batch // world)
        for count in rounds(batch, micro, world):
            yield list(range(start, start + count))
            start += count
        step += 1


def stream(dataset, args, step, process, micro):
    """Yield (positions, batch on the device) of this process's rounds, from `step` on."""
    workers, cuda = loading_workers(args, process.device), process.device.type == 'cuda'
    own = positions(step, args.batch, micro, process.rank, process.world)
    for batch in DataLoader(Stream(dataset, args.seed), batch_sampler=own, num_workers=workers,
                            persistent_workers=workers > 0, pin_memory=cuda,
                            multiprocessing_context=start_method(workers)):
        yield batch.pop('position').tolist(), move(batch, process.device)


def start_method(workers):
    """How loading processes start, for a DataLoader: on Linux by fork, which copies no latents."""
    return 'fork' if workers and sys.platform == 'linux' else None


def loading_workers(args, device):
    """--workers as a number."""
    if args.workers != 'auto':
        return args.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    local = local_processes()
    return 0 if device.type == 'cpu' else min(cores // local, 8)


def micro_batch(args, process, model, loss_of):
    """--micro_batch as a number, at most the process's share of --batch.

    For 'auto' the share, or its half, quarter, .. for which no process runs out of memory in the
    gradient of loss_of(n), the loss of n items.
    """
    n = share = args.batch // process.world
    if args.micro_batch != 'auto':
        return min(args.micro_batch or n, n)
    while n > 1 and not fits(process, model, partial(loss_of, n)):
        n = -(-n // 2)
    least = torch.tensor(n, device=process.device)
    if process.world > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    print(f'--micro_batch auto: {int(least)} of {share} at once')
    return int(least)


def fits(process, model, loss_of):
    """Whether there is memory for the gradient of loss_of(), beside what training keeps."""
    try:  # the gradient that DDP sums, and AdamW's two moments
        room = [torch.empty_like(p) for p in model.parameters() for _ in range(3)]
        with process.autocast():
            loss = loss_of()
        loss.backward()
        del room
        return True
    except RuntimeError as error:  # on the CPU it has no type of its own
        if not isinstance(error, torch.OutOfMemoryError) and 'allocate' not in str(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if process.device.type == 'cuda':
            torch.cuda.empty_cache()


def evenly_spaced(n, count):
    """Up to `count` of the indices 0..n-1, evenly spaced: neighbours in a folder look alike."""
    count = min(n, count)
    return [i * n // count for i in range(count)]


# ---- optimisation ----------------------------------------------------------------------------

def lr_at(step, args):
    """Learning rate of `step`: linear warm-up, then cosine to lr_min, or constant."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.lr_schedule == 'constant':
        return args.lr
    progress = min((step - args.warmup) / max(args.steps - args.warmup, 1), 1)
    return args.lr_min + (args.lr - args.lr_min) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(opt, lr):
    """Give every parameter group lr times its own `lr_mult`."""
    for group in opt.param_groups:
        group['lr'] = lr * group.get('lr_mult', 1.0)


class FiniteGuard:
    """Notes the first step with a value that is not finite, without waiting for the device.

    `update` takes the values of a step; `check` raises ValueError if one of them was not finite.
    """

    def __init__(self, device):
        self.first_bad = torch.full((), -1, device=device)

    def update(self, step, *values):
        bad = ~torch.isfinite(torch.stack([v.detach().float() for v in values])).all()
        self.first_bad = torch.where(bad & (self.first_bad < 0), step, self.first_bad)

    def check(self):
        if self.first_bad >= 0:
            raise ValueError(f'loss or gradient is not finite at step {int(self.first_bad)}; the '
                             'last checkpoint is untouched: with --init and another --name, or '
                             'with --restart, try a lower --lr, a longer --warmup, a smaller '
                             '--clip or --amp off')


class EMA:
    """Exponential moving average of a module's parameters, decay min(decay, (1+n)/(10+n))."""

    def __init__(self, module, decay=0.9999):
        self.module, self.decay = module, decay
        self.shadow = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self, n):
        """After optimiser step n = 1, 2, ..."""
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.shadow, list(self.module.parameters()), 1 - decay)

    @contextlib.contextmanager
    def applied(self):
        """In a `with` statement, the module, in evaluation mode and with the averaged weights."""
        self.swap()
        try:
            yield self.module.eval()
        finally:
            self.swap()
            self.module.train()

    def swap(self):
        """Exchange the averaged weights and those of the module, without a copy."""
        for i, p in enumerate(self.module.parameters()):
            p.data, self.shadow[i] = self.shadow[i], p.data

    def state_dict(self):
        """A full state dict of the module: averaged parameters, current buffers."""
        names = [name for name, _ in self.module.named_parameters()]
        return {**self.module.state_dict(), **dict(zip(names, self.shadow))}

    @torch.no_grad()
    def load_state_dict(self, state):
        for (name, _), s in zip(self.module.named_parameters(), self.shadow):
            s.copy_(state[name])


# ---- runs, checkpoints, log ------------------------------------------------------------------

RUNS = Path('runs')
SUFFIXES = ('.pt', '.pth', '.ckpt')  # of checkpoints
STOPPED = 'stopped; the same command, without --restart, continues from the last checkpoint'
PLACES = {'workers', 'device', 'data', 'vae', 'name'}  # flags that say where and how, not what
MAY_CHANGE = {'steps', 'log_every', 'eval_every', 'save_every', 'micro_batch', 'restart', 'slim',
              'compile', *PLACES}
MAY_MOVE = {'captions', 'text', 'init', 'split'}  # of files, the folder may change
STAGE_1 = dict(dataset=str, preset=str, data=str, flip=bool, steps=int, resolution=int)  # flags
MODEL = dict(step=int, args=dict, vae_config=dict, vae=dict, splits=dict(train=list, test=list))
CONTENTS = dict(  # by kind, what a checkpoint must hold: types by name, nested
    vae=dict(MODEL, args=STAGE_1),
    ldm=dict(MODEL, vae_args=STAGE_1, ldm_config=dict, ema=dict),
    function=dict(about=dict(read_out=dict), mlp=dict, xi=list),
    reference=dict(about=dict, stats=dict(
        dim=int, n=int, shift=torch.Tensor, sum=torch.Tensor, outer=torch.Tensor)))
TO_TRAIN = dict(vae=dict(opt=dict), ldm=dict(opt=dict, model=dict, vae_hash=str))


def run_folder(name):
    """The folder of the run `name`, such as exp or exp/a; ValueError if that is not below runs/."""
    folder = Path(os.path.normpath(RUNS / name))
    require(RUNS in folder.parents, f'--name {name}: not a folder below {RUNS}/')
    return folder


def resolved(flag, path):
    """The absolute form of a file's path, '' of ''; ValueError if it is not there."""
    require(not path or Path(path).is_file(), f'{flag} {path}: no such file')
    return path and str(Path(path).resolve())


def run_name(checkpoint):
    """The name, below runs/, of the run in which a checkpoint lies; elsewhere its folder's."""
    folder = Path(os.path.abspath(checkpoint)).parent
    for runs, path in (RUNS.absolute(), folder), (RUNS.resolve(), folder.resolve()):
        if runs in path.parents:
            return str(path.relative_to(runs))
    return folder.name


def save_checkpoint(path, state):
    """Write a dict of tensors and builtins to `path`; see `replace`."""
    def write(temporary):
        with open(temporary, 'wb') as file:  # a path would be named in the file, and errors not
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave an empty file of the new name
    replace(path, write)


def write_text(path, text):
    """Write a text file; see `replace`."""
    replace(path, lambda temporary: temporary.write_text(text, encoding='utf-8'))


@contextlib.contextmanager
def writing(path):
    """OSErrors name the file `path`; those of a full disk say so, and how much is free."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError):
            error = error.__context__  # torch.save ends in another error than that of the disk
        if isinstance(error, KeyboardInterrupt):
            raise error from None
        if not isinstance(error, OSError):
            raise
        why = one_line(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(Path(path).parent).free / 2 ** 20
            why = f'the disk is full ({free:.1f} MiB free)'
        raise OSError(f'{path}: not written, {why}') from None


def replace(path, write):
    """Call write(temporary path), then move into place: a kill leaves the old file or the new.

    Failures are those of `writing`, and leave nothing behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.{secrets.token_hex(4)}.tmp')  # no other writer's
    with writing(path):
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


HELD = contextlib.ExitStack()  # open files: the locks of the runs that this process trains


def lock_run(folder, process):
    """Make a run's folder and keep other processes from training there until `run` has ended.

    ValueError, which names the other, if there is one. What killed writers left is removed. On a
    file system without locks, and in processes that do not write, it makes the folder and no more.
    """
    folder.mkdir(parents=True, exist_ok=True)  # by all: none waits for the first
    if not process.is_first:
        return
    lock = HELD.enter_context(open(folder / 'lock', 'a+'))
    try:
        fcntl and fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise ValueError(f'{folder}: another process trains there ({lock.read()}); wait for it, or '
                         'give another --name') from None
    except OSError:
        pass
    lock.truncate(0)
    print(f'number {os.getpid()} on {platform.node()}', end='', file=lock, flush=True)
    for left in (*folder.glob('*.tmp'), *folder.glob('samples/*.tmp')):
        left.unlink()


def regular(path):
    """The path; OSError if what is there is no file: to read a pipe would wait for ever."""
    if not Path(path).is_file() and Path(path).exists():
        raise OSError(f'{path}: a folder, pipe or device where a file is needed')
    return Path(path)


def read_text(path):
    """The text of a file in UTF-8, without byte order marks, where files were joined, too.

    ValueError, which names it, if it is in another encoding.
    """
    try:
        return regular(path).read_text(encoding='utf-8').replace('\ufeff', '')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: not in UTF-8 ({error})') from None


def try_writing(flag, folder):
    """ValueError, before the work and not after it, unless a file can be written in `folder`.

    Folders that the trial makes are removed. Returns the time in seconds that a file gets there.
    """
    folder, made = Path(folder), []
    try:
        made += [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError as error:
        raise ValueError(f'{flag}: nothing can be written in {folder} ({error.strerror}); name '
                         'another place') from None
    finally:
        with contextlib.suppress(OSError):
            for p in made:
                p.rmdir()


def try_file(flag, path):
    """The same for a file that `path` shall name; it must not be one that training continues."""
    require(not Path(path).is_dir(), f'{flag} {path}: a folder; name a file')
    require(not trains(path), f'{flag} {path}: a checkpoint that training continues; name another')
    try_writing(flag, Path(path).parent)


def try_checkpoint(flag, path):
    """The same for a checkpoint, which is found again, and hits no other file, by its suffix."""
    try_file(flag, path)
    require(Path(path).suffix in SUFFIXES, f'{flag} {path}: must end in {", ".join(SUFFIXES)}')


def trains(path):
    """Whether a file is a checkpoint that training can continue, rather than a slim one."""
    try:
        return is_checkpoint(path) and 'opt' in load_checkpoint(path)
    except ValueError:
        return False


class StandIn:
    """An object of a configuration of the authors' code, which is not imported: its attributes."""


# What their files hold beside tensors: nothing that can do anything.
HARMLESS = [argparse.Namespace, collections.defaultdict, dict, int, list,
            (typing.Any, 'typing.Any'), *((StandIn, f'omegaconf.{name}') for name in (
                'base.ContainerMetadata', 'base.Metadata', 'dictconfig.DictConfig',
                'listconfig.ListConfig', 'nodes.AnyNode'))]


def published(state):
    """A dict of the authors' code, with the kind 'published', its parts under the same names.

    They are vaemodel, mlp, and, if there, pointnet, diffusion, ema, current_iters and args. Any
    other dict is returned as it is.
    """
    flat = {'vae': 'vaemodel', 'ldm': 'diffusion'}  # parts as prefixes, in one dict
    for name in ('vae', 'mlp', 'ldm', 'pointnet'):
        start = f'{name}.'
        part = {k.removeprefix(start): v for k, v in state.items() if str(k).startswith(start)}
        state = {**state, **{flat.get(name, name): part}} if part else state
    autoencoder = state.get('vaemodel', state.get('model'))
    parts = autoencoder, state.get('mlp'), state.get('pointnet', {})
    if not all(isinstance(part, dict) and all(map(torch.is_tensor, part.values()))
               for part in parts):
        return state
    return {**state, 'vaemodel': autoencoder, 'kind': 'published'}


def load_checkpoint(path, kind=None, device='cpu'):
    """A checkpoint's dict. ValueError if it is truncated, not one of ours, or of another kind.

    Those of the authors' code, see `ldm.translated`, have the kind 'published'.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such checkpoint')
    try:
        with torch.serialization.safe_globals(HARMLESS):
            state = torch.load(path, map_location=device, weights_only=True,
                               mmap=os.name == 'posix')  # Windows replaces no mapped file
    except OSError as error:
        raise ValueError(f'{path}: cannot be read ({error.strerror})') from None
    except MemoryError:
        raise
    except Exception as error:  # torch raises half a dozen types here; all mean the same to a user
        raise ValueError(f'{path}: truncated or not a checkpoint ({type(error).__name__}); '
                         'name another, or train it again with --restart') from None
    if isinstance(state, dict) and 'kind' not in state:
        state = published(state)
    if not isinstance(state, dict) or 'kind' not in state:
        raise ValueError(f'{path}: a file of some other program, not a checkpoint of this one')
    if kind and state['kind'] != kind:
        raise ValueError(f'{path}: holds a {state["kind"]} checkpoint where {kind} is needed')
    missing = lacking(state, CONTENTS.get(str(state['kind']), {}))
    missing += ['a step that counts'] * (not missing and state.get('step', 0) < 0)
    if missing:
        raise ValueError(f'{path}: damaged, without {", ".join(missing)}; take a copy of it, or '
                         'make it anew, a run with --restart')
    return state


def lacking(found, wanted, name=''):
    """Names of what a dict lacks or has as another type; `wanted`: types by name, nested."""
    if not isinstance(wanted, dict):
        return [] if isinstance(found, wanted) else [name]
    if not isinstance(found, dict):
        return [name]
    return [lost for key, kind in wanted.items()
            for lost in lacking(found.get(key), kind, f'{name} {key}'.strip())]


@contextlib.contextmanager
def fitting(path):
    """Whatever loading parts of a checkpoint raises becomes a ValueError that names `path`."""
    try:
        with warnings.catch_warnings(action='ignore'):  # of layers without weights
            yield
    except Exception as error:
        reason = (str(error).splitlines() or [''])[-1].strip()[:200]
        raise ValueError(f'{path} does not fit this model, or is of another version of this code: '
                         f'{type(error).__name__}, {reason}') from None


def file_digest(path):
    """sha256 of a file, in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def find_checkpoint(text, *files):
    """The checkpoint file that a user means by `text`, or None if there is none.

    text: a .pt, .pth or .ckpt file, a run's folder, the name of a run in runs/, or '' for the
    newest run. Of a run the first of `files` ('vae.pt', 'ldm.pt') that it has; the newest is that
    with the newest first file, or if none has it, the next. What begins with ./ is no name.
    """
    if not text:
        found = [[p for run in RUNS.glob('*') for p in run.rglob(file) if p.is_file()]
                 for file in files]
        return next((max(p, key=lambda p: p.stat().st_mtime) for p in found if p), None)
    for path in places(text):
        for candidate in (path, *(path / file for file in files)):
            if is_checkpoint(candidate):
                return candidate
    return None


def is_checkpoint(path):
    """Whether this is a file that is called as checkpoints are."""
    return Path(path).suffix in SUFFIXES and os.path.isfile(path)


def places(text):
    """Where a checkpoint that a user calls `text` may lie: there, or in the run of this name."""
    relative = not str(text).startswith(('./', '../', '/'))
    return [Path(text), RUNS / text] if relative else [Path(text)]


def the_checkpoint(text, *files):
    """`find_checkpoint` where there must be one: FileNotFoundError names where it was looked for.

    Any other file is taken as it is, for `load_checkpoint` to say what is wrong with it.
    """
    found = find_checkpoint(text, *files)
    if found or os.path.isfile(text):
        return found or Path(text)
    raise FileNotFoundError(f'{text}: no such checkpoint, nor {" or ".join(files)} in '
                            f'{" or ".join(map(str, places(text)))}')


def same_file(before, now):
    """Whether paths name one file, which may have moved: of one name, or links to it."""
    return (Path(str(before)).name == Path(str(now)).name
            or os.path.realpath(str(before)) == os.path.realpath(str(now)))


def resume(path, args, kind):
    """The checkpoint a run continues from, or None; ValueError naming flags that differ."""
    if args.restart or not path.exists():
        return None
    state = load_checkpoint(path, kind)
    missing = lacking(state, TO_TRAIN[kind])
    require(not missing, f'{path} is slim or damaged, without {", ".join(missing)} that training '
            'needs; start from it with --init and another --name')
    saved = {**vars(args), **state['args']}
    changed = [k for k, v in vars(args).items() if k not in MAY_CHANGE and saved[k] != v
               and not (k in MAY_MOVE and same_file(saved[k], v))]
    if changed:
        raise ValueError(f'{path} was made with other flags: ' + ', '.join(
            f'--{k} {saved[k]} (now {getattr(args, k)})' for k in changed)
            + '; repeat them, or use --restart or another --name')
    return state


def parse_json(text):
    """A JSON object as a dict; {} of anything else, such as what a kill has torn."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def salvaged(path):
    """The text of a file that may be damaged; '' if there is none."""
    return path.read_text('utf-8-sig', 'replace') if path.is_file() else ''


def read_log(path):
    """The lines of a log.jsonl as dicts, but for damaged ones."""
    return [v for v in map(parse_json, salvaged(path).splitlines())
            if {'stage', 'step'} < {*v} and all(
                isinstance(x, str if k == 'stage' else (int, float)) for k, x in v.items())]


def read_stages(folder):
    """The flags of each stage of a run, from args.json, by the stage's name; not damaged ones."""
    return {stage: args for stage, args in parse_json(salvaged(folder / 'args.json')).items()
            if not lacking(args, dict(preset=str))}


class Log:
    """log.jsonl of a run; this stage's lines after the step it continues from are dropped."""

    def __init__(self, path, stage, step):
        self.path, self.stage = path, stage
        lines = read_log(path)
        if lost := len(salvaged(path).splitlines()) - len(lines):
            print(f'note: {path}: {lost} damaged lines are left out')
        kept = [v for v in lines if v['stage'] != stage or v['step'] <= step]
        write_text(path, ''.join(json.dumps(v) + '\n' for v in kept))

    def write(self, **values):
        values = {k: v.item() if hasattr(v, 'item') else v for k, v in values.items()}
        with writing(self.path), self.path.open('a') as file:
            file.write(json.dumps(dict(stage=self.stage, **values)) + '\n')


def curves(folder, stage):
    """A run's loss, learning rate and first held-out figure by name, each (N,2): step and value."""
    found = {}
    for line in read_log(folder / 'log.jsonl'):
        if line['stage'] == stage:
            first = next(name for name in line if name not in ('stage', 'step'))
            for name in [first] + ['lr'] * ('lr' in line):
                found.setdefault(name, []).append((line['step'], line[name]))
    found = {name: np.array(points) for name, points in found.items()}
    return {name: c[np.isfinite(c).all(1)] for name, c in found.items()}


def draw_curves(folder):
    """Write curves.png: loss, learning rate and held-out figure of each stage against the steps.

    Runs of the same preset beside this one are drawn faintly behind it.
    """
    runs = {path.parent: read_stages(path.parent) for path in folder.parent.glob('*/args.json')}
    if not runs.setdefault(folder, read_stages(folder)):
        return
    picture = Image.new('RGB', (3 * PANEL[0], len(runs[folder]) * PANEL[1]), 'white')
    draw = ImageDraw.Draw(picture)
    for row, (stage, args) in enumerate(runs[folder].items()):
        others = [curves(other, stage) for other, stages in runs.items() if other != folder
                  and stage in stages and stages[stage]['preset'] == args['preset']]
        for column, (name, own) in enumerate(curves(folder, stage).items()):
            draw_panel(draw, np.array([column, row]) * PANEL, f'{stage} {name}', own,
                       [other[name] for other in others if name in other])
    replace(folder / 'curves.png', lambda temporary: picture.save(temporary, 'png'))


PANEL = 320, 200  # pixels of a set of axes, with what is written beside it


def draw_panel(draw, corner, title, own, faint):
    """Curves (N,2) over others in one set of axes; that of a loss is logarithmic."""
    logarithmic = title.endswith(('loss', 'total'))
    lines = [np.stack([c[:, 0], np.log10(c[:, 1].clip(1e-9)) if logarithmic else c[:, 1]], 1)
             for c in (*faint, own) if len(c)]
    if not len(own):
        return
    low, high = (edge(np.concatenate(lines), axis=0) for edge in (np.min, np.max))
    zero, size = corner + (54, PANEL[1] - 26), np.array(PANEL) - (66, 50)
    draw.rectangle([*(zero + size * (0, -1)), *(zero + size * (1, 0))], outline='#888888')
    for k, line in enumerate(lines):
        points = zero + (line - low) / np.maximum(high - low, 1e-12) * size * (1, -1)
        colour = '#1f5fbf' if k == len(lines) - 1 else '#c8c8c8'
        draw.line([tuple(p) for p in points], colour, 2)
        draw.rectangle([*(points[-1] - 2), *(points[-1] + 2)], colour)
    draw.text(zero + (0, -size[1] - 16), f'{title}: {own[-1, 1]:.4g} at {own[-1, 0]:.0f}', 'black')
    for value, y in (high[1], -size[1]), (low[1], -10):
        draw.text(zero + (-50, y), f'{10 ** value if logarithmic else value:.3g}', 'black')
    for value, x in (low[0], 0), (high[0], size[0] - 30):
        draw.text(zero + (x, 6), f'{value:.0f}', 'black')


def finished(path, state, args, process):
    """Whether a checkpoint's run has all its --steps; the first process says so."""
    done = bool(state) and state['step'] >= args.steps
    if done and process.is_first:
        print(f'{path}: is at step {state["step"]}, nothing to do for --steps {args.steps}')
    return done


def start_run(folder, stage, args, process, step, facts):
    """Make the run's folder, write args.json and print the first line; the run's Log.

    `facts` are what the line says between device and progress. Other processes get None.
    """
    lock_run(folder, process)
    if not process.is_first:
        return None
    saved = folder / f'{stage}.pt'
    there = load_checkpoint(saved, stage)['step'] if saved.exists() and not args.restart else 0
    require(there == step, f'{saved} has changed since it was read: another process has trained '
            'there; repeat the command')
    (folder / 'samples').mkdir(parents=True, exist_ok=True)
    path, stages = folder / 'args.json', read_stages(folder)
    if path.exists() and not stages:
        print(f'note: {path}: damaged; written anew, with the flags of this stage alone')
    write_text(path, json.dumps({**stages, stage: vars(args)}, indent=1))
    progress = f'continues at step {step}' if step else 'starts'
    print(', '.join([f'{folder}: {args.dataset}', process.describe(), *facts,
                     f'{progress} of {args.steps}']), flush=True)
    return Log(folder / 'log.jsonl', stage, step)


def list_notes(notes, bad):
    """Print a data set's notes, the first 20 of its broken files, and how many more there are."""
    for line in notes:
        print(printable(f'note: {line}'))
    for file, why in bad[:20]:
        print(printable(f'skipped: {file}: {why}'))
    if len(bad) > 20:
        print(f'skipped: {len(bad) - 20} more, which python data.py check lists')


def require_finite(values, what):
    """ValueError, which says that `what` holds them, if there are NaN or infinities in a tensor."""
    require(values.isfinite().all(), f'{what} holds NaN or infinity: the run has diverged; train '
            'it again with --restart and a lower --lr')


def load_weights(module, weights, path):
    """Load a state dict (any float precision).

    ValueError naming `path` if it does not fit, or holds NaN or infinity.
    """
    with fitting(path):
        module.load_state_dict({k: v.float() if v.is_floating_point() else v
                                for k, v in weights.items()})
    for value in weights.values():
        require_finite(value, path)


def move(batch, device):
    """A batch with its tensors on the device; the copy from pinned memory is not waited for."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v
            for k, v in batch.items()}


def accumulating(ddp, last):
    """Context of one round of a step: DDP averages gradients in the last one only."""
    return contextlib.nullcontext() if last or not hasattr(ddp, 'no_sync') else ddp.no_sync()


def clip_gradients(model, limit):
    """Norm of the gradient, which is scaled down to `limit` unless that is 0."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit or float('inf'))


@cache
def compiles(device):
    """Whether torch.compile works for the device in all processes, by trying; says so if not.

    It needs a C compiler, for example.
    """
    why = ''
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:
        why = one_line(error)[:200]
    share = mean_over_ranks(dict(works=torch.tensor(0.0 if why else 1.0)))['works']
    if share < 1:
        print(f'note: torch.compile does not work ({why or "in another process"}); going on '
              'without')
    return share == 1


def compiled(network, args, process):
    """A module or function, compiled if --compile says so; `auto`: on CUDA, where it works."""
    auto = args.compile == 'auto' and process.device.type == 'cuda' and compiles(process.device)
    return torch.compile(network) if resolve(args.compile, auto) else network


def parallel(model, args, process):
    """The model as training calls it: compiled if --compile says so, in DDP if there are others."""
    network = compiled(model, args, process)
    if process.world == 1:
        return network
    for p in model.parameters():
        if p.shape[2:] == (1, 1):  # the strides that its gradient has, whatever the memory format
            p.data = p.data.flatten(1)[..., None, None]
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'
    return DistributedDataParallel(network, gradient_as_bucket_view=True, **{buffers: False})


def is_first():
    """Whether this process is the one that prints and writes, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def mean_over_ranks(values):
    """Dict of scalar tensors averaged over processes, as floats."""
    stacked = torch.stack([v.detach().float() for v in values.values()])
    if dist.is_initialized():
        dist.all_reduce(stacked)
        stacked /= dist.get_world_size()
    return dict(zip(values, stacked.tolist()))


def progress(args, step, process):
    """tqdm bar of a training run that goes on at `step`; shown by the first process alone."""
    return tqdm(total=args.steps, initial=step, desc=args.name, unit='step', dynamic_ncols=True,
                disable=not process.is_first, mininterval=1.0)


def parameters_of(module):
    """'1.95 M parameters'."""
    return f'{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters'
