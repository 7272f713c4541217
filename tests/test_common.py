"""What the scripts share: keyed randomness, positions, schedules, EMA, checkpoints, log, flags."""
import contextlib
import ctypes
import errno
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
import data
import metrics
import sample
import train_ldm
import train_vae


def arguments(**changes):
    return SimpleNamespace(**{**dict(steps=100, batch=12, micro_batch=0, lr=2.0, lr_min=0.5, seed=0,
                                     warmup=10, lr_schedule='cosine', workers=0, ch_mult=(1, 2),
                                     beta2=0.99),
                              **changes})


def processes(world):
    return [common.Process(rank, world, torch.device('cpu'), False) for rank in range(world)]


ALONE, = processes(1)


class Numbers:
    """A data set of `n` numbers whose augmentation is a uniform draw."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def item(self, i, rng):
        return dict(i=i, u=rng.random())


# ---- randomness by position --------------------------------------------------------------------

@pytest.mark.mutation('common.py', 'isinstance(k, str) else int(k)', 'isinstance(k, str) else 0')
@pytest.mark.mutation('common.py', "zlib.crc32(k.encode('utf-8', 'surrogatepass')) if", '0 if')
@pytest.mark.mutation('common.py', '[len(key), *numbers]', 'numbers')
def test_seeded_depends_on_its_key_alone():
    keys = [(name, i, j) for name in ('order', 'item') for i in (0, 1, 2 ** 31) for j in (0, 1)]
    keys += [('order',), ('order', 0)]  # zeros at the end count
    draws = [common.seeded(*k).random() for k in keys]
    np.random.default_rng(1).random(5)
    assert draws == [common.seeded(*k).random() for k in keys] and len(set(draws)) == len(keys)
    assert common.seeded('a', 3).random() == common.seeded('a', np.int64(3)).random()
    assert common.seeded('\udce9').random() != common.seeded('\udce8').random()  # no UTF-8
    # golden: a change here would change every run and every sample
    assert common.seeded('item', 0, 7).random() == pytest.approx(0.5577051452911159, abs=1e-15)


@pytest.mark.mutation('common.py', 'int(seeded(*key).integers(2 ** 63))', '0')
def test_torch_seeded_depends_on_its_key_alone():
    def draw(*key):
        return torch.randn(4, generator=common.torch_seeded(*key))
    first = draw('noise', 0, 5)
    torch.manual_seed(3)
    assert torch.equal(first, draw('noise', 0, 5))
    others = [draw('noise', 0, 6), draw('noise', 1, 5), draw('z_T', 0, 5)]
    assert not any(torch.equal(first, x) for x in others)


@pytest.mark.mutation('common.py', "seeded('item', self.seed, k)", "seeded('item', self.seed)")
@pytest.mark.mutation('common.py', "('order', self.seed, epoch)", "('order', self.seed)")
@pytest.mark.mutation('common.py', 'if self.order[0] != epoch:', 'if self.order[0] is None:')
@pytest.mark.mutation('common.py', 'int(self.order[1][i])', 'i')
def test_stream_is_a_new_permutation_each_epoch_keyed_by_position():
    n = 50
    stream = common.Stream(Numbers(n), seed=3)
    items = [stream[k] for k in range(3 * n)]
    epochs = [[x['i'] for x in items[n * e:n * (e + 1)]] for e in range(3)]
    assert all(sorted(e) == list(range(n)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != list(range(n))
    assert len({x['u'] for x in items}) == 3 * n
    again = common.Stream(Numbers(n), seed=3)
    for k in (149, 0, 50, 99, 7):  # in any order, from any process
        assert again[k] == items[k]
    assert [common.Stream(Numbers(n), seed=4)[k]['i'] for k in range(n)] != epochs[0]


@pytest.mark.mutation('common.py', '+ rank * (batch // world)', '')
@pytest.mark.mutation('common.py', 'start = step * batch + rank', 'start = rank')
@pytest.mark.mutation('common.py', '            start += count\n', '')
@pytest.mark.mutation('common.py', '        step += 1\n\n\ndef stream', '\n\n\ndef stream')
@pytest.mark.mutation('common.py', 'local // count + (i < local % count)', 'local // count')
def test_ranks_and_rounds_divide_the_batch_in_order():
    """At every step, rank by rank and round by round, the positions make up one batch."""
    batch = 24
    for world in (1, 2, 3):
        for micro in (3, 5, batch // world):
            rows = common.rounds(batch, micro, world)
            assert sum(rows) * world == batch and max(rows) <= micro
            assert max(rows) - min(rows) <= 1 and len(rows) == math.ceil(batch / world / micro)
            for first in (0, 5):
                ranks = [common.positions(first, batch, micro, r, world) for r in range(world)]
                for step in (first, first + 1):
                    seen = [[next(rank) for _ in rows] for rank in ranks]
                    assert [[len(part) for part in own] for own in seen] == [rows] * world
                    assert sum(sum(seen, []), []) == [*range(step * batch, (step + 1) * batch)]


@pytest.mark.mutation('common.py', 'torch_seeded(*key, k, device=device)',
                      'torch_seeded(*key, device=device)')
@pytest.mark.mutation('common.py', 'torch_seeded(*key, k, device=device)',
                      'torch_seeded(k, device=device)')
@pytest.mark.mutation('common.py', 'u[i].uniform_(generator=generator)', 'u[i].zero_()')
@pytest.mark.mutation('common.py', 'z[i].normal_(generator', 'z[i].uniform_(generator')
def test_noise_of_a_row_depends_on_its_position_alone():
    z, u = common.row_noise(range(40), ('a', 3), torch.device('cpu'), (6, 50), 9)
    assert z.shape == (40, 6, 50) and u.shape == (40, 9)
    again = common.row_noise([17, 3], ('a', 3), torch.device('cpu'), (6, 50), 9)
    assert torch.equal(again[0], z[[17, 3]]) and torch.equal(again[1], u[[17, 3]])
    assert abs(z.mean()) < 0.04 and abs(z.std() - 1) < 0.04 and 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.06
    assert torch.corrcoef(z.flatten(1)).fill_diagonal_(0).abs().max() < 0.3
    other, _ = common.row_noise(range(40), ('a', 4), torch.device('cpu'), (6, 50))
    assert not torch.equal(other, z)


@pytest.mark.mutation('common.py', 'Stream(dataset, args.seed), batch', 'Stream(dataset, 0), batch')
@pytest.mark.mutation('common.py', 'own = positions(step,', 'own = positions(0,')
@pytest.mark.mutation('common.py', 'dict(item, position=k)', 'dict(item, position=0)')
def test_stream_resumes_at_a_step_with_any_workers():
    args = arguments(batch=6, seed=9)
    straight = common.stream(Numbers(20), args, 0, ALONE, 3)
    batches = [next(straight) for _ in range(12)]  # six steps
    resumed = common.stream(Numbers(20), arguments(**{**vars(args), 'workers': 2}), 4, ALONE, 3)
    others = [next(resumed) for _ in batches[8:]]
    del resumed  # stop its workers: the frames of a failure would keep them, and stop them slowly
    for (at, batch), (same, other) in zip(batches[8:], others):
        assert torch.equal(batch['i'], other['i']) and torch.equal(batch['u'], other['u'])
        assert at == same and batch.keys() == {'i', 'u'}
    assert sum((at for at, _ in batches), []) == [*range(36)]
    assert batches[0][1]['u'][0] == common.Stream(Numbers(20), 9)[0]['u']


@pytest.mark.mutation('common.py', "return 0 if device.type == 'cpu' else", 'return')
@pytest.mark.mutation('common.py', 'min(cores // local, 8)', 'min(cores, 8)')
@pytest.mark.mutation('common.py', "if args.workers != 'auto':", 'if True:')
def test_workers_share_the_cores(monkeypatch):
    cuda, cpu = torch.device('cuda', 0), torch.device('cpu')
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(32), raising=False)
    for local, expected in (1, 8), (8, 4), (64, 0):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', str(local))
        assert common.loading_workers(arguments(workers='auto'), cuda) == expected
    monkeypatch.delenv('LOCAL_WORLD_SIZE')
    assert common.loading_workers(arguments(workers='auto'), cpu) == 0
    assert common.loading_workers(arguments(workers=3), cpu) == 3


@pytest.mark.mutation('common.py', "and 'allocate' not in str(error)", '')
@pytest.mark.mutation('common.py', 'n = -(-n // 2)', 'n = n // 2')
@pytest.mark.mutation('common.py', 'for _ in range(3)]', 'for _ in range(2)]')
@pytest.mark.mutation('common.py', 'model.zero_grad(set_to_none=True)\n        if', 'if')
@pytest.mark.mutation('common.py', 'min(args.micro_batch or n, n)', 'args.micro_batch or n')
def test_micro_batch_is_found_by_trying(monkeypatch):
    model, tried, room = nn.Linear(3, 1), [], []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, 'empty_like', lambda p: room.append(p.numel()) or empty_like(p))

    def loss_of(n):
        tried.append(n)
        if n > 20:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        if n > 7:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return model(torch.ones(n, 3)).sum()

    def found(micro, process=ALONE):
        return common.micro_batch(arguments(batch=50, micro_batch=micro), process, model, loss_of)
    try:
        assert found('auto') == 7 and tried == [50, 25, 13, 7]
    except RuntimeError as error:
        pytest.fail(str(error))
    assert sum(room) == 4 * 3 * 4 and model.weight.grad is None
    assert [found(m, processes(2)[1]) for m in (0, 10, 99)] == [25, 10, 25]
    with pytest.raises(RuntimeError, match='a fault'):
        common.fits(ALONE, model, mock.Mock(side_effect=RuntimeError('a fault')))


# ---- optimisation ------------------------------------------------------------------------------

@pytest.mark.mutation('common.py', '(step + 1) / args.warmup', 'step / args.warmup')
@pytest.mark.mutation('common.py', '(step - args.warmup) / max', 'step / max')
@pytest.mark.mutation('common.py', '0.5 * (1 + math.cos', '0.5 * (1 - math.cos')
def test_learning_rate_closed_form():
    args = arguments()
    rates = [common.lr_at(n, args) for n in range(101)]
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10)
    assert rates[10] == pytest.approx(2.0) and rates[100] == pytest.approx(0.5)
    assert rates[55] == pytest.approx((2.0 + 0.5) / 2)  # half-way down the cosine
    expected = 0.5 + 1.5 * np.cos(np.pi / 2 * np.arange(91) / 90) ** 2
    np.testing.assert_allclose(rates[10:], expected)
    assert common.lr_at(10 ** 6, args) == pytest.approx(0.5)
    constant = arguments(lr_schedule='constant', warmup=0)
    assert {common.lr_at(n, constant) for n in (0, 1, 99, 500)} == {2.0}


@pytest.mark.mutation('common.py', '(1 + math.cos(math.pi * progress))',
                      '(1 + np.cos(np.pi * progress))')
def test_learning_rate_is_a_plain_float():
    """The optimiser's state holds it, and numpy scalars cannot be loaded with weights_only."""
    assert {type(common.lr_at(n, arguments())) for n in (0, 9, 10, 50, 100)} == {float}


@pytest.mark.mutation('common.py', "lr * group.get('lr_mult', 1.0)", 'lr')
def test_set_lr_respects_each_groups_factor():
    opt = SimpleNamespace(param_groups=[dict(lr=1.0), dict(lr=1.0, lr_mult=10.0)])
    common.set_lr(opt, 0.25)
    assert [g['lr'] for g in opt.param_groups] == [0.25, 2.5]


@pytest.mark.mutation('common.py', 'min(self.decay, (1 + n) / (10 + n))', 'self.decay')
@pytest.mark.mutation('common.py', 'min(self.decay, (1 + n) / (10 + n))', '(1 + n) / (10 + n)')
@pytest.mark.mutation('common.py', 'parameters()), 1 - decay', 'parameters()), decay')
def test_ema_against_a_slow_loop():
    module = nn.BatchNorm1d(3)
    ema, weights, expected = common.EMA(module, 0.9), [], 1.0
    for n in range(1, 200):
        weights.append(math.sin(n))
        with torch.no_grad():
            module.weight.fill_(weights[-1])
        ema.update(n)
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * weights[-1]
        assert ema.state_dict()['weight'][0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.mutation('common.py', '            s.copy_(state[name])', '            pass')
@pytest.mark.mutation('common.py', 'p.detach().clone() for p', 'p.detach() for p')
def test_ema_state_loads_into_the_module_and_back():
    module = nn.BatchNorm1d(3)
    ema = common.EMA(module)
    with torch.no_grad():
        module.weight.fill_(5.0)
        module.running_mean.fill_(2.0)
    ema.update(1)
    state = {k: v.clone() for k, v in ema.state_dict().items()}
    assert state['weight'][0] == pytest.approx(1 + 4 * 9 / 11)  # decay 2/11
    assert state['running_mean'][0] == 2.0  # buffers are the current ones
    other = nn.BatchNorm1d(3)
    other.load_state_dict(state)
    resumed = common.EMA(nn.BatchNorm1d(3))
    resumed.load_state_dict(state)
    assert torch.equal(resumed.state_dict()['weight'], state['weight'])


@pytest.mark.mutation('common.py', 'p.data, self.shadow[i] = self.shadow[i], p.data', 'pass')
@pytest.mark.mutation('common.py', '        finally:\n            self.swap()\n', '        finally:\n')
@pytest.mark.mutation('common.py', 'yield self.module.eval()', 'yield self.module')
def test_averaged_weights_are_swapped_in_and_out():
    module = nn.Linear(2, 1)
    ema = common.EMA(module, 0.5)
    first = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(2.0)
    now, memory = module.weight.detach().clone(), module.weight.data_ptr()
    with pytest.raises(KeyboardInterrupt), ema.applied() as averaged:
        assert averaged is module and not module.training
        assert torch.equal(module.weight, first)
        raise KeyboardInterrupt
    assert module.training and torch.equal(module.weight, now)
    assert module.weight.data_ptr() == memory  # no copy: what refers to the weights still does
    ema.update(1)
    assert not torch.equal(ema.state_dict()['weight'], first)


@pytest.mark.mutation('common.py', 'bad & (self.first_bad < 0)', 'bad')
@pytest.mark.mutation('common.py', 'bad = ~torch.isfinite(', 'bad = torch.isnan(')
def test_guard_names_the_first_bad_step():
    guard = common.FiniteGuard('cpu')
    one, inf, nan = torch.tensor(1.0), torch.tensor(math.inf), torch.tensor(math.nan)
    for step, values in ((1, (one, one)), (2, (one, one.bfloat16()))):
        guard.update(step, *values)
        guard.check()
    for step, values in ((3, (one, inf)), (4, (one, one)), (5, (nan, one))):
        guard.update(step, *values)
    with pytest.raises(ValueError) as caught:
        guard.check()
    assert 'at step 3;' in str(caught.value) and '--lr' in str(caught.value)


@pytest.mark.mutation('common.py', "limit or float('inf')", 'limit or 1.0')
def test_clipping():
    for limit, after in ((0.5, 0.5), (0.0, 10.0), (20.0, 10.0)):
        p = nn.Parameter(torch.zeros(2))
        p.grad = torch.tensor([6.0, 8.0])
        assert common.clip_gradients(nn.ParameterList([p]), limit).item() == pytest.approx(10)
        assert p.grad.norm().item() == pytest.approx(after, rel=1e-4)


# ---- checkpoints and log -----------------------------------------------------------------------

def checkpoint(kind='vae', **changes):
    """A checkpoint that holds all it must, but for the weights."""
    flags, splits = dict(dataset='d', preset='p', data='', flip=False, steps=9,
                         resolution=8), dict(train=['a'], test=['b'])
    return dict(kind=kind, step=1, args=flags, vae_args=flags, vae_config={}, vae={}, opt={},
                splits=splits, ldm_config={}, ema={}, model={}, vae_hash='0') | changes


@pytest.mark.mutation('common.py', "path.with_name(f'{path.name}.{secrets.token_hex(4)}.tmp')", 'path')
@pytest.mark.mutation('common.py', '(errno.ENOSPC, errno.EDQUOT)', '()')
@pytest.mark.mutation('common.py', 'error = error.__context__', 'pass')
@pytest.mark.mutation('common.py', '/ 2 ** 20\n            why', '\n            why')
@pytest.mark.mutation('common.py', 'temporary.unlink(missing_ok=True)', 'pass')
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / 'a' / 'vae.pt'
    common.save_checkpoint(path, checkpoint(x=torch.ones(3)))  # makes the folder

    def torn(state, file):
        file.write(b'PK')
        try:
            raise OSError(errno.ENOSPC, 'No space left on device')
        finally:
            if state['step'] == 3:  # as torch does
                raise RuntimeError('unexpected pos 64 vs 0')
    monkeypatch.setattr(torch, 'save', torn)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=2 ** 20 * 3 // 2))
    for step in (2, 3):
        with pytest.raises((OSError, RuntimeError)) as caught:
            common.save_checkpoint(path, checkpoint(step=step))
        assert str(caught.value) == f'{path}: not written, the disk is full (1.5 MiB free)'
    state = load_or_none(path)
    assert state is not None and state['step'] == 1 and torch.equal(state['x'], torch.ones(3))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.mutation('common.py', "path.with_name(f'{path.name}.{secrets.token_hex(4)}.tmp')",
                      "path.with_name(path.name + '.tmp')")
def test_two_writers_of_a_file_never_tear_it(tmp_path):
    """The second begins and ends while the first is writing."""
    path = tmp_path / 'vae.pt'

    def slowly(temporary):
        with open(temporary, 'w') as file:
            file.write('first, ')
            file.flush()
            common.write_text(path, 'second')
            assert path.read_text() == 'second'
            file.write('whole')
    try:
        common.replace(path, slowly)
    except OSError as error:
        pytest.fail(str(error))
    assert path.read_text() == 'first, whole' and list(tmp_path.iterdir()) == [path]


@contextlib.contextmanager
def other_process(work):
    """Another process that has done work() and still lives."""
    done, say = os.pipe()
    child = os.fork()
    if not child:
        try:
            work()
            os.write(say, b'.')
            signal.pause()
        finally:
            os._exit(1)
    os.close(say)
    os.read(done, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.mutation('common.py', 'fcntl and fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)',
                      'pass')
@pytest.mark.mutation('common.py', 'if not process.is_first:\n        return\n    lock',
                      'if False:\n        return\n    lock')
@pytest.mark.mutation('common.py', "folder.glob('*.tmp')", "folder.glob('*.pt')")
@pytest.mark.mutation('common.py', " *folder.glob('samples/*.tmp')", '')
@pytest.mark.mutation('common.py', '    folder.mkdir(parents=True, exist_ok=True)  # by all',
                      '    if process.is_first:  folder.mkdir(parents=True, exist_ok=True)  #')
def test_one_process_trains_a_run(tmp_path):
    run, second = tmp_path / 'runs' / 'a', processes(2)[1]
    left = [run / 'ldm.pt.0123abcd.tmp', run / 'samples' / 'sample_7.png.0123abcd.tmp']
    common.lock_run(run.with_name('b'), second)  # the disk of its folder may be looked at now
    assert run.with_name('b').is_dir()
    with other_process(lambda: common.lock_run(run, ALONE)) as number:
        try:
            common.lock_run(run, ALONE)
            pytest.fail('DID NOT RAISE')
        except ValueError as error:
            assert f'{run}: another process trains there (number {number} on ' in str(error)
        try:
            common.lock_run(run, second)  # the others of a job do not write
        except ValueError as error:
            pytest.fail(str(error))
        left[1].parent.mkdir()
        for file in left:
            file.touch()
    common.lock_run(run, ALONE)  # that of a process which was killed is no lock
    assert not any(file.exists() for file in left)


def load_or_none(path):
    try:
        return common.load_checkpoint(path)
    except (ValueError, OSError):
        return None


@pytest.mark.mutation('common.py', 'except OSError as error:\n        raise ValueError(f\'{path}: cannot',
                      'except KeyError as error:\n        raise ValueError(f\'{path}: cannot')
def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    common.save_checkpoint(tmp_path / 'a.pt', checkpoint())
    monkeypatch.setattr(torch, 'load', mock.Mock(side_effect=PermissionError(13, 'not allowed')))
    with pytest.raises(ValueError, match='a.pt: cannot be read .not allowed.'):
        common.load_checkpoint(tmp_path / 'a.pt')


@pytest.mark.mutation('common.py', 'if isinstance(error, KeyboardInterrupt):', 'if False:')
def test_ctrl_c_while_a_checkpoint_is_written(tmp_path):
    def write(path):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError('unexpected pos')  # as torch.save does
    with pytest.raises(BaseException) as caught:
        common.replace(tmp_path / 'a.pt', write)
    assert caught.type is KeyboardInterrupt


@pytest.mark.mutation('common.py', "if kind and state['kind'] != kind", 'if False')
@pytest.mark.mutation('common.py', "or 'kind' not in state", 'or False')
def test_checkpoints_that_cannot_be_used(tmp_path):
    good, cut, empty = (tmp_path / f'{n}.pt' for n in ('good', 'cut', 'empty'))
    common.save_checkpoint(good, checkpoint(x=torch.zeros(1000)))
    cut.write_bytes(good.read_bytes()[:2000])
    empty.write_bytes(b'')
    torch.save(dict(weights=torch.zeros(2)), tmp_path / 'foreign.pt')
    torch.save(nn.Linear(2, 2), tmp_path / 'pickled.pt')
    (tmp_path / 'text.pt').write_text('hello')
    cases = [('nothing.pt', None, 'no such'), ('cut.pt', None, 'truncated'),
             ('empty.pt', None, 'truncated'), ('text.pt', None, 'truncated'),
             ('pickled.pt', None, 'not a checkpoint'), ('foreign.pt', None, 'some other program'),
             ('good.pt', 'ldm', 'holds a vae checkpoint where ldm is needed')]
    for name, kind, message in cases:
        try:
            common.load_checkpoint(tmp_path / name, kind)
            pytest.fail(f'{name}: DID NOT RAISE')
        except (ValueError, FileNotFoundError) as error:
            assert message in str(error) and name in str(error) and '\n' not in str(error)
        except KeyError:
            pytest.fail(f'{name}: a KeyError')
    assert common.load_checkpoint(good, 'vae')['step'] == 1


@pytest.mark.mutation('common.py', "missing = lacking(state, CONTENTS.get(str(state['kind']), {}))",
                      'missing = []')
@pytest.mark.mutation('common.py', "[] if isinstance(found, wanted) else [name]", '[]')
@pytest.mark.mutation('common.py', "state.get('step', 0) < 0", 'False')
@pytest.mark.mutation('common.py', "    if not isinstance(found, dict):\n        return [name]\n",
                      '    if not isinstance(found, dict):\n        return []\n')
def test_incomplete_checkpoints_name_what_they_lack(tmp_path):
    """Each part of them in turn is absent, a list or a number."""
    stats = dict(dim=1, n=1, **{k: torch.ones(1) for k in ('shift', 'sum', 'outer')})
    wholes = dict(vae=checkpoint(), ldm=checkpoint('ldm'),
                  function=dict(kind='function', about=dict(read_out={}), mlp={}, xi=[]),
                  reference=dict(kind='reference', about={}, stats=stats))
    path, tried = tmp_path / 'x.pt', 0
    for kind, whole in wholes.items():
        common.save_checkpoint(path, whole)
        assert common.load_checkpoint(path, kind).keys() == whole.keys()
        for name in common.CONTENTS[kind]:
            others = [{k: v for k, v in whole.items() if k != name}]
            others += [whole | {name: wrong} for wrong in ([], 1.5, 'x')
                       if type(wrong) is not type(whole[name])]
            others += [whole | {name: {}}] * isinstance(common.CONTENTS[kind][name], dict)
            for state in others:
                torch.save(state, path)
                with pytest.raises(ValueError) as caught:
                    common.load_checkpoint(path)
                assert f'{path}: damaged, without {name}' in str(caught.value)
                assert '--restart' in str(caught.value) and '\n' not in str(caught.value)
                tried += 1
    assert tried > 60
    torch.save(checkpoint(step=-5), path)
    with pytest.raises(ValueError, match='damaged, without a step that counts'):
        common.load_checkpoint(path)


@pytest.mark.mutation('common.py', 'except Exception as error:\n        reason',
                      'except RuntimeError as error:\n        reason')
def test_whatever_does_not_fit_is_one_line_with_the_file():
    """Weights and states of the optimiser that are cut, of other shapes or no tensors at all."""
    layer = nn.Linear(2, 2)
    opt, good = torch.optim.AdamW(layer.parameters()), layer.state_dict()

    def message(load, *what):
        try:
            load(*what)
            return ''
        except ValueError as error:
            return str(error)
        except Exception as error:
            pytest.fail(repr(error))

    def restore(state):
        with common.fitting('a.pt'):
            opt.load_state_dict(state)
    assert message(common.load_weights, layer, good, 'a.pt') == ''
    assert message(restore, opt.state_dict()) == ''
    for bad in ({}, dict(good, bias=torch.zeros(3)), dict(good, bias=[1]), dict(good, more=good), [1]):
        assert message(common.load_weights, layer, bad, 'a.pt').startswith('a.pt does not fit')
    for bad in ({}, [], dict(opt.state_dict(), param_groups=[]), dict(state={}, param_groups=3)):
        found = message(restore, bad)
        assert found.startswith('a.pt does not fit') and '\n' not in found


@pytest.mark.mutation('common.py', "'data', 'vae', 'name'}", "'data', 'vae'}")
@pytest.mark.mutation('common.py', 'not (k in MAY_MOVE and', 'not (False and')
@pytest.mark.mutation('common.py', 'os.path.realpath(str(before)) == ', 'False and ')
@pytest.mark.mutation('common.py', 'return (Path(str(before)).name ==', 'return (True or')
def test_runs_and_files_may_move(tmp_path):
    path, args = tmp_path / 'vae.pt', arguments(name='a', captions='/old/c.csv', restart=False)
    common.save_checkpoint(path, checkpoint(args=checkpoint()['args'] | vars(args)))
    try:
        moved = arguments(name='b/c', captions='new/c.csv', restart=False)
        assert common.resume(path, moved, 'vae')['step'] == 1
    except ValueError as error:
        pytest.fail(str(error))
    other = arguments(name='a', captions='/old/d.csv', restart=False)
    with pytest.raises(ValueError, match='--captions /old/c.csv .now /old/d.csv'):
        common.resume(path, other, 'vae')
    (tmp_path / 'link.csv').symlink_to(tmp_path / 'c.csv')
    assert common.same_file(tmp_path / 'link.csv', tmp_path / 'c.csv')


@pytest.mark.mutation('common.py', 'lacking(state, TO_TRAIN[kind])', '[]')
def test_what_sampling_needs_is_too_little_to_continue(tmp_path):
    for kind, parts in dict(vae=['opt'], ldm=['opt', 'model', 'vae_hash']).items():
        for part in parts:
            for state in (checkpoint(kind, **{part: []}),
                          {k: v for k, v in checkpoint(kind).items() if k != part}):
                common.save_checkpoint(tmp_path / 'x.pt', state)
                with pytest.raises(ValueError, match=f'x.pt is slim or damaged, without {part} '):
                    common.resume(tmp_path / 'x.pt', arguments(restart=False), kind)


@pytest.mark.mutation('common.py', 'k not in MAY_CHANGE and saved[k] != v', 'False')
@pytest.mark.mutation('common.py', "MAY_CHANGE = {'steps', ", "MAY_CHANGE = {")
@pytest.mark.mutation('common.py', 'if args.restart or not path.exists():', 'if not path.exists():')
def test_resume_names_what_differs(tmp_path):
    path, args = tmp_path / 'vae.pt', arguments(restart=False, log_every=1, ch_mult=(1, 2))
    assert common.resume(path, args, 'vae') is None
    common.save_checkpoint(path, checkpoint(step=7, args=checkpoint()['args'] | vars(args)))
    allowed = arguments(restart=False, log_every=9, steps=999, workers=4, ch_mult=(1, 2))
    try:
        assert common.resume(path, allowed, 'vae')['step'] == 7
    except ValueError as error:
        pytest.fail(str(error))
    changed = arguments(restart=False, log_every=1, ch_mult=(1, 4), lr=3.0)
    with pytest.raises(ValueError) as caught:
        common.resume(path, changed, 'vae')
    assert '--lr 2.0 (now 3.0), --ch_mult (1, 2) (now (1, 4))' in str(caught.value)
    assert '--batch' not in str(caught.value) and '\n' not in str(caught.value)
    allowed.restart = True
    assert common.resume(path, allowed, 'vae') is None
    new_flag = arguments(restart=False, log_every=1, ch_mult=(1, 2), added_later=3)
    assert common.resume(path, new_flag, 'vae')['step'] == 7


@pytest.mark.mutation('common.py', "v['stage'] != stage or v['step'] <= step", "v['step'] <= step")
@pytest.mark.mutation('common.py', "v['stage'] != stage or v['step'] <= step", 'True')
@pytest.mark.mutation('common.py', 'map(parse_json, salvaged(path).splitlines())',
                      'map(parse_json, salvaged(path).splitlines()[:-1])')
def test_log_drops_its_own_stages_later_lines(tmp_path):
    path = tmp_path / 'log.jsonl'
    first, second = common.Log(path, 'vae', 0), common.Log(path, 'ldm', 0)
    for step in range(1, 7):
        first.write(step=step, loss=torch.tensor(0.5), psnr=np.float32(2))
        second.write(step=step, loss=1.0)
    common.Log(path, 'vae', 4).write(step=5, loss=0.25)
    lines = [json.loads(s) for s in path.read_text().splitlines()]
    assert [v['step'] for v in lines if v['stage'] == 'ldm'] == [1, 2, 3, 4, 5, 6]
    assert [v['step'] for v in lines if v['stage'] == 'vae'] == [1, 2, 3, 4, 5]
    assert lines[0] == dict(stage='vae', step=1, loss=0.5, psnr=2.0) and lines[-1]['loss'] == 0.25


@pytest.mark.mutation('common.py', 'map(parse_json, salvaged(path).splitlines())',
                      'map(parse_json, salvaged(path).splitlines()[:-1])')
@pytest.mark.mutation('common.py', 'isinstance(x, str if', 'isinstance(x, object if')
@pytest.mark.mutation('common.py', 'if lost := len(', 'if lost := 0 * len(')
def test_log_survives_a_damaged_last_line(tmp_path, capsys):
    path = tmp_path / 'log.jsonl'
    whole = '{"stage": "vae", "step": 1, "loss": 1.0}\n'
    for torn in ('{"stage": "va', '{"stage": "vae", "step": 2', '', '"step"}', '[1]', '{"a": 1}',
                 '{"stage": "vae", "step": "2", "loss": 1}', '{"stage": [], "step": 2, "loss": 1}',
                 '{"stage": "vae", "step": 2, "loss": null}', '[' * 10 ** 5, '\udcff\udcfe',
                 whole.strip()):
        path.write_text(whole + torn, errors='surrogateescape')
        common.Log(path, 'vae', 5).write(step=6)
        lines = [json.loads(s) for s in path.read_text().splitlines()]
        assert [v['step'] for v in lines] == ([1, 1, 6] if torn == whole.strip() else [1, 6])
        said = capsys.readouterr().out
        assert said == '' if torn in ('', whole.strip()) else f'note: {path}: 1 damaged' in said


@pytest.fixture
def two_runs(tmp_path):
    """Two runs of one preset and one of another, of which only one has a second stage."""
    for k, (name, preset) in enumerate((('new', 'p'), ('old', 'p'), ('other', 'q'))):
        log = common.Log(tmp_path / name / 'log.jsonl', 'vae', 0)
        (tmp_path / name / 'args.json').write_text(json.dumps(
            dict(vae=dict(preset=preset)) | (dict(ldm=dict(preset=preset)) if k == 0 else {})))
        for step in (0, 50, 100):
            log.write(step=step, total=10.0 ** (step / 50), kl=7.0, norm=1.0, lr=2.0 + k)
        log.write(step=50, psnr_32=10.0, psnr_64=3.0)
        log.write(step=100, psnr_32=20.0 + 10 * k, psnr_64=3.0)
    common.Log(tmp_path / 'new' / 'log.jsonl', 'ldm', 0).write(step=1, loss=1.0, lr=0.1)
    return tmp_path


@pytest.mark.mutation('common.py', "name not in ('stage', 'step')", "name not in ('stage', 'step', 'total')")
@pytest.mark.mutation('common.py', "if line['stage'] == stage", "if line['stage']")
@pytest.mark.mutation('common.py', 'c[np.isfinite(c).all(1)]', 'c')
def test_curves_of_a_run(two_runs):
    common.Log(two_runs / 'new' / 'log.jsonl', 'vae', 100).write(step=100, psnr_32=math.inf)
    found = common.curves(two_runs / 'new', 'vae')
    assert set(found) == {'total', 'lr', 'psnr_32'}
    assert found['total'].tolist() == [[0, 1], [50, 10], [100, 100]]
    assert found['lr'].tolist() == [[0, 2], [50, 2], [100, 2]]
    assert found['psnr_32'].tolist() == [[50, 10], [100, 20]]


BLUE, GREY = (31, 95, 191), (200, 200, 200)


@pytest.mark.mutation('common.py', 'np.log10(c[:, 1].clip(1e-9)) if', 'c[:, 1] if')
@pytest.mark.mutation('common.py', 'size * (1, -1)', 'size * (1, -0.9)')
@pytest.mark.mutation('common.py', "stages[stage]['preset'] == args['preset']", 'True')
@pytest.mark.mutation('common.py', 'if not lacking(args, dict(preset=str))', 'if not lacking(args, dict)')
def test_curves_are_drawn_with_those_of_the_same_preset(two_runs):
    """The axes are 254 x 150 pixels, from (54, 24) to (308, 174) of the 320 x 200 of each."""
    for k, damaged in enumerate((b'', b'{"vae": {"pre', b'[]', b'{"vae": []}', b'{"vae": {}}', b'\xff')):
        (two_runs / f'{k}').mkdir()
        (two_runs / f'{k}' / 'args.json').write_bytes(damaged)
    with (two_runs / 'old' / 'log.jsonl').open('a') as log:
        log.write('{"stage": }\n')
    try:
        common.draw_curves(two_runs / 'new')
    except KeyError as error:
        pytest.fail(repr(error))
    picture = Image.open(two_runs / 'new' / 'curves.png')
    assert picture.size == (960, 400)

    def near(x, y):  # the darkest of the pixels about there
        return min(picture.getpixel((x + i, y + j)) for i in (-1, 0, 1) for j in (-1, 0, 1))
    assert near(54 + 64, 174 - 37) == near(54 + 190, 174 - 112) == BLUE  # a line on log axes
    assert near(640 + 54 + 127, 174 - 37) == BLUE  # the PSNR, from 10 to 20 of 10 to 30
    assert near(640 + 54 + 127, 174 - 75) == GREY  # of the other run of this preset, from 10 to 30


@pytest.mark.mutation('common.py', 'if not runs.setdefault(folder, read_stages(folder)):\n        return',
                      'if False:\n        return')
def test_curves_of_a_run_without_flags_are_left_as_they_are(two_runs):
    common.draw_curves(two_runs / 'new')
    before = (two_runs / 'new/curves.png').read_bytes()
    (two_runs / 'new/args.json').unlink()
    try:
        common.draw_curves(two_runs / 'new')
    except KeyError as error:
        pytest.fail(repr(error))
    assert (two_runs / 'new/curves.png').read_bytes() == before


@pytest.mark.mutation('common.py', 'return [Path(text), RUNS / text] if',
                      'return [RUNS / text, Path(text)] if')
@pytest.mark.mutation('common.py', "Path(path).suffix in SUFFIXES and", "True and")
@pytest.mark.mutation('common.py', 'p.stat().st_mtime', 'p')
@pytest.mark.mutation('common.py', 'run.rglob(file) if p.is_file()', 'run.glob(file) if p.is_file()')
@pytest.mark.mutation('common.py', 'run.rglob(file) if p.is_file()', 'run.rglob(file)')
@pytest.mark.mutation('common.py', "startswith(('./', '../', '/'))", "startswith('/')")
def test_which_run_is_meant(tmp_path, monkeypatch):
    """A file, a folder, a run's name, or nothing for the newest run; None if there is none.

    Folders and files beside runs/ that are called as runs are and hold no checkpoint do not matter.
    """
    monkeypatch.chdir(tmp_path)
    assert common.find_checkpoint('', 'vae.pt') is None
    files = ('b/ldm.pt', 'runs/b/ldm.pt', 'runs/b/vae.pt', 'runs/a/vae.pt', 'runs/c/note.txt',
             'runs/d.pt/vae.pt', 'a/photo.png', 'e', 'runs/e/vae.pt', 'runs/e/f/vae.pt')
    for k, file in enumerate(files):
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1000 * k,) * 2)
    both = ('ldm.pt', 'vae.pt')
    for text, wanted, expected in (
            ('a', both, 'runs/a/vae.pt'), ('a', both[:1], None), ('b', both, 'b/ldm.pt'),
            ('runs/b', both, 'runs/b/ldm.pt'), ('runs/b', both[::-1], 'runs/b/vae.pt'),
            ('runs/b/vae.pt', both, 'runs/b/vae.pt'), ('nowhere', both, None),
            ('runs/c/note.txt', both, None), ('', both, 'runs/b/ldm.pt'),
            ('d.pt', both, 'runs/d.pt/vae.pt'), ('e', both, 'runs/e/vae.pt'), ('./e', both, None),
            ('./runs/e', both, 'runs/e/vae.pt'), ('e/f', both, 'runs/e/f/vae.pt'),
            ('', both[1:], 'runs/e/f/vae.pt')):
        found = common.find_checkpoint(text, *wanted)
        assert found == (expected and Path(expected)), (text, wanted)
    Path('runs/e/g/vae.pt').mkdir(parents=True)  # newer, but no file
    assert common.find_checkpoint('', 'vae.pt') == Path('runs/e/f/vae.pt')


@pytest.mark.mutation('common.py', 'if found or os.path.isfile(text):', 'if True:')
@pytest.mark.mutation('common.py', '" or ".join(map(str, places(text)))', 'text')
def test_a_checkpoint_that_is_nowhere_names_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('cats').mkdir()
    Path('cats.png').touch()
    for text, seen in (('cats', 'cats or runs/cats'), ('./cats', 'cats')):
        try:
            common.the_checkpoint(text, 'ldm.pt', 'vae.pt')
            pytest.fail('DID NOT RAISE')
        except FileNotFoundError as error:
            assert str(error) == f'{text}: no such checkpoint, nor ldm.pt or vae.pt in {seen}'
    assert common.the_checkpoint('cats.png', 'vae.pt') == Path('cats.png')


@pytest.mark.mutation('common.py', 'str(path.relative_to(runs))', 'path.name')
@pytest.mark.mutation('common.py', '(RUNS.absolute(), folder), (RUNS',
                      '(RUNS.resolve(), folder.resolve()), (RUNS')
@pytest.mark.mutation('common.py', '(RUNS.resolve(), folder.resolve())', '(RUNS.absolute(), folder)')
def test_names_of_runs(tmp_path, monkeypatch):
    """Below runs/ all of the path, as it is typed, or by the real path of both."""
    monkeypatch.chdir(tmp_path)
    for folder in ('runs/exp/a', 'disk/real/b', 'elsewhere/c'):
        Path(folder).mkdir(parents=True)
    Path('runs/link').symlink_to(tmp_path / 'disk/real')
    Path('here').symlink_to(tmp_path / 'runs')
    for folder, name in (('runs/exp/a', 'exp/a'), (tmp_path / 'runs/exp', 'exp'), ('runs/link', 'link'),
                         ('runs/link/b', 'link/b'), ('here/exp/a', 'exp/a'), ('elsewhere/c', 'c'),
                         ('runs/exp/../exp/a', 'exp/a')):
        assert common.run_name(Path(folder) / 'vae.pt') == name


@pytest.mark.mutation('common.py', 'require(RUNS in folder.parents', 'require(True')
def test_runs_stay_below_their_folder():
    for name, folder in (('a', 'a'), ('exp/a', 'exp/a'), ('exp/a/', 'exp/a'), ('./a', 'a'),
                         ('exp/../b', 'b'), ('..a', '..a')):
        assert common.run_folder(name) == Path('runs') / folder
    for name in ('', '.', '..', 'a/..', '../a', '/tmp/a', 'a/../../runs2/b'):
        with pytest.raises(ValueError, match='--name'):
            common.run_folder(name)


# ---- flags -------------------------------------------------------------------------------------

@dataclass
class Config:
    width: int = common.flag(8, 'at least 1')
    classes: int = common.flag(0, 'at least 0')
    warmup: int = common.flag(5, 'at least 0', low=0)
    rate: float = common.flag(0.5, 'at least 0')
    logit: float = common.flag(-1.0, 'any')
    sizes: tuple = common.flag((1, 2), 'each at least 1')
    few: int = common.flag(2, 'at most 4', high=4)
    fast: bool = common.flag(False, 'with or without a value')
    mode: str = common.flag('a', 'one of two', choices=('a', 'b'))
    inner: str = 'no help, no flag'


def tiny_parser():
    parser = common.Parser('for a test')
    parser.add_argument('--preset', default='', help='.')
    parser.add_config(Config)
    return parser


def refused(parser, *argv):
    """The message with which a parser refuses its arguments, or '' if it takes them."""
    try:
        parser.parse_args(argv)
        return ''
    except ValueError as error:
        return str(error)


@pytest.mark.mutation('common.py', 'self.set_defaults(**presets[name])', 'pass')
@pytest.mark.mutation('common.py', 'set(presets[name]) - actions', 'set() - actions')
@pytest.mark.mutation('common.py', 'self.known(argv).preset or default', 'default')
def test_typed_over_preset_over_default():
    presets = dict(one=dict(width=16, rate=0.25), two=dict(width=32), bad=dict(widht=3))

    def parse(*argv):
        return tiny_parser().parse_preset(presets, 'one', argv)
    args = parse('--width=64')
    assert (args.width, args.rate, args.classes, args.preset) == (64, 0.25, 0, 'one')
    assert parse('--preset', 'two').width == 32 and parse().width == 16
    assert parse('--preset=two', '--width', '8').width == 8  # typing the default counts too
    for name, message in (('bad', 'widht'), ('three', 'one, two, bad')):
        with pytest.raises(ValueError, match=message):
            parse('--preset', name)


@pytest.mark.mutation('common.py', 'if not low <= value <', 'if value < low and value <')
@pytest.mark.mutation('common.py', 'min(int(kind is int), default)', '0')
@pytest.mark.mutation('common.py', 'at_least(low, type(default[0]) if default else float)', 'float')
@pytest.mark.mutation('common.py', "nargs='?', const=True", "nargs='?', const=False")
@pytest.mark.mutation('common.py', 'allow_abbrev=False', 'allow_abbrev=True')
def test_flags_of_a_dataclass():
    typed = '--sizes=4,2 --fast --logit=-3 --warmup=0 --mode=b'.split()
    args = tiny_parser().parse_args(typed)
    expected = dict(sizes=(4, 2), fast=True, logit=-3.0, warmup=0, mode='b', width=8)
    assert {k: getattr(args, k) for k in expected} == expected and type(args.sizes[0]) is int
    assert tiny_parser().parse_args(['--fast', 'no']).fast is False
    for text in ('--width=0', '--width=1.5', '--classes=-1', '--warmup=-1', '--rate=-1',
                 '--rate=nan', '--rate=inf', '--sizes=0', '--sizes=a', '--fast=maybe', '--mode=c',
                 '--unknown=1', '--widt=3', '--inner=x'):
        message = refused(tiny_parser(), text)
        assert text.split('=')[0] in message and '\n' not in message and ' -h)' in message, text
    config = common.from_flags(args, Config, inner='set')
    assert (config.sizes, config.fast, config.inner) == ((4, 2), True, 'set')


@pytest.mark.mutation('common.py', '2 ** 63 - 1 if kind is int', '2 ** 64 if kind is int')
@pytest.mark.mutation('common.py', "kind = at_least(low, kind, field.metadata.get('high'))",
                      'kind = at_least(low, kind)')
@pytest.mark.mutation('common.py', 'value <= largest', 'value < largest')
def test_numbers_that_no_tensor_holds_are_out_of_range():
    assert refused(tiny_parser(), f'--classes={2 ** 63 - 1}', '--few=4') == ''
    for text, words in ((f'--classes={2 ** 63}', 'at most 9.22337e+18'), ('--few=5', 'at most 4'),
                        ('--classes=1e9', 'invalid int'), ('--width=0', 'range: at least 1 (')):
        message = refused(tiny_parser(), text)
        assert text.split('=')[0] in message and words in message, message
    for module in (train_vae, train_ldm, sample):
        assert '--seed' in refused(module.build_parser(), '--seed', '100000000000000000000')


def helps(capsys):
    """What -h shows of every script and of each of its commands: {'metrics.py fid': text, ...}."""
    shown = {}
    for script in (train_vae, train_ldm, sample, metrics, data):
        main = f'{script.__name__}.py'
        for command in ('', *(metrics.COMMANDS if script is metrics else ()),
                        *(('check', 'mesh') if script is data else ())):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
                patch.setattr('sys.argv', [main, *command.split(), '-h'])
                script.main()
            assert caught.value.code == 0
            shown[f'{main} {command}'.strip()] = capsys.readouterr().out
    return shown


@pytest.mark.mutation('common.py', "default in (None, '', argparse.SUPPRESS)", 'default is None')
@pytest.mark.mutation('common.py', "default = ','.join(map(str, default))", 'pass')
@pytest.mark.mutation('common.py', 'epilog=examples', "epilog=''")
@pytest.mark.mutation('common.py', "text if text.startswith(' ') else", '')
@pytest.mark.mutation('train_ldm.py', 'for lack of a stage 1', '')
@pytest.mark.mutation('metrics.py', "'clip', REBUILT_SETS", "'clip', SETS")
@pytest.mark.mutation('metrics.py', 'res=flag(128, CELLS)', 'res=128')
def test_help_says_what_holds(capsys, tmp_path, monkeypatch):
    """No empty defaults, defaults as they are typed, whose they are, examples, its own command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('COLUMNS', '80')
    raw = helps(capsys)
    shown = {name: ' '.join(text.split()) for name, text in raw.items()}
    for name, text in shown.items():
        assert f'usage: {name} [-h]' in text
        assert not any(f'(default: {s})' in text for s in ('', 'None', '()', '==SUPPRESS==')), name
        assert '(default: (' not in text
    assert 'Defaults are those of the preset toy_image' in shown['train_vae.py']
    assert '(default: 1,2,3)' in shown['train_vae.py']
    assert 'no preset, for lack of a stage 1' in shown['train_ldm.py']
    for script in (train_vae, train_ldm, sample, metrics, data):
        examples = [line for line in script.__doc__.splitlines() if line.startswith('    ')]
        assert raw[f'{script.__name__}.py'].splitlines()[-len(examples):] == examples
    for name, made in (('psnr', 'reconstructions'), ('rfid', 'reconstructions'),
                       ('rfvd', 'reconstructions'), ('fid', 'samples'), ('shapes', 'samples')):
        assert f'and its {made} are compared' in shown[f'metrics.py {name}']
    assert 'paired with those of A' in shown['metrics.py psnr']
    for name in ('shapes', 'text'):
        assert '--res RES cells along' in shown[f'metrics.py {name}']
    assert 'RES cells' not in shown['metrics.py psnr'] and 'caption' not in shown['metrics.py psnr']


@pytest.mark.mutation('common.py', 'python {self.prog} -h', 'python metrics.py -h')
@pytest.mark.mutation('common.py', 'found.parser.error(', 'self.error(')
def test_errors_name_the_help_that_lists_the_flags(monkeypatch):
    for argv, end in ((['metrics.py', 'psnr', 'A', '--num', 'x'], 'metrics.py psnr'),
                      (['metrics.py', 'psnr', 'A', '--nonsense'], 'metrics.py psnr'),
                      (['metrics.py', 'psnr'], 'metrics.py psnr'), (['metrics.py'], 'metrics.py'),
                      (['metrics.py', 'nonsense'], 'metrics.py'),
                      (['data.py', 'mesh', 'A', '--nonsense'], 'data.py mesh'),
                      (['data.py', 'mesh', 'A', '--seed', '-1'], 'data.py mesh'),
                      (['sample.py', '--nonsense'], 'sample.py')):
        monkeypatch.setattr('sys.argv', argv)
        with pytest.raises(ValueError) as caught:
            dict(metrics=metrics, data=data, sample=sample)[argv[0].removesuffix('.py')].main()
        assert str(caught.value).endswith(f' (flags: python {end} -h)'), argv


@pytest.mark.mutation('common.py', "flag(0, 'of everything random')", "flag(0, '')")
def test_every_flag_has_help_and_help_exits_0(capsys):
    for module in (train_vae, train_ldm, sample):
        parser = module.build_parser()
        assert [a.dest for a in parser._actions if not a.help] == []
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(['-h'])
        shown = capsys.readouterr().out
        assert caught.value.code == 0 and all(f'--{a.dest}' in shown for a in parser._actions)


def test_presets_fit_both_scripts():
    for presets, module in ((train_vae.PRESETS, train_vae), (train_ldm.PRESETS, train_ldm)):
        for name in presets:
            args = module.build_parser().parse_preset(presets, 'image', ['--preset', name])
            assert all(getattr(args, k) == v for k, v in presets[name].items())
            common.check_run_flags(args, min(8, args.batch))
    assert set(data.NAMES) <= set(train_vae.PRESETS) == set(train_ldm.PRESETS)
    assert all(train_vae.PRESETS[n]['dataset'] == n for n in data.NAMES)


@pytest.mark.mutation('common.py', 'args.batch % world == 0', 'True')
@pytest.mark.mutation('common.py', 'require(args.lr > 0,', 'require(args.lr >= 0,')
@pytest.mark.mutation('common.py', 'require(args.beta2 < 1,', 'require(args.beta2 <= 1,')
def test_run_flags_no_run_can_have():
    common.check_run_flags(arguments(batch=12), 2)
    for flag, changes in (('batch', dict(batch=13)), ('lr', dict(lr=0.0)),
                          ('beta2', dict(beta2=1.0)), ('ch_mult', dict(ch_mult=()))):
        with pytest.raises(ValueError, match=f'--{flag}'):
            common.check_run_flags(arguments(**changes), 2)


@pytest.mark.mutation('common.py', "message, code = f'error: {one_line(error)}', 2",
                      "message, code = f'error: {error}', 2")
@pytest.mark.mutation('common.py', "one_line(error)}', 2\n", "one_line(error)}', 1\n")
def test_run_makes_one_line_of_an_error(capsys):
    bars = []

    def main():
        bar = common.progress(SimpleNamespace(steps=3, name='bar'), 0, ALONE)
        bars.append(bar.n)
        raise ValueError('first\n  second')
    with pytest.raises(SystemExit) as caught:
        common.run(main)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.endswith('\nerror: first second\n')  # on a line of its own, below the bar


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        raise ValueError('3 of 4 files: ValueError: inside')


@pytest.mark.mutation('common.py', "if 'Original Traceback' in text", 'if False')
@pytest.mark.mutation('common.py', "'allocate' in text or", '')
def test_errors_of_workers_and_of_memory_are_one_line(capsys):
    def huge():
        try:
            torch.empty(2 ** 60)
        except RuntimeError as error:
            raise error

    def broken():
        batches = iter(torch.utils.data.DataLoader(Broken(), num_workers=1))
        try:
            next(batches)
        finally:
            batches._shutdown_workers()  # the frames of the error would keep them
    for main, message in ((broken, 'error: 3 of 4 files: ValueError: inside'),
                          (huge, 'try a smaller size, --batch or')):
        try:
            common.run(main)
        except SystemExit as caught:
            assert caught.code == 2
        except RuntimeError:
            pytest.fail('a traceback')
        err = capsys.readouterr().err.strip()
        assert message in err and '\n' not in err


@pytest.mark.mutation('common.py', "'shared memory', '/torch_'", "'shared memory',")
@pytest.mark.mutation('common.py', "'DataLoader worker (pid', ", '')
@pytest.mark.mutation('common.py', "'shared memory', '/torch_'", "'/torch_'")
@pytest.mark.mutation('common.py', 'not isinstance(error, RuntimeError) or', '')
def test_what_to_try_on_a_small_machine(capsys):
    """The errors are PyTorch's, NumPy's and Python's, as they word them."""
    shm = '--workers 0, or give /dev/shm more room'
    size = 'a smaller size, --batch or, in training, --micro_batch'
    for error, cure in (
            (RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error. It is '
                          "possible that dataloader's workers are out of shared memory."), shm),
            (RuntimeError('DataLoader worker (pid(s) 7, 8) exited unexpectedly'), shm),
            (RuntimeError('Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback '
                          '(most recent call last):\n  x\nRuntimeError: unable to write to file '
                          '</torch_7_8_0>: No space left on device (28)\n'), shm),
            (RuntimeError('unable to allocate shared memory(shm) for file </t>: Success (0)'), shm),
            (MemoryError(), size), (OverflowError('Python int too large'), size),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory"), size)):
        try:
            common.run(mock.Mock(side_effect=error))
        except SystemExit as caught:
            assert caught.code == 2
        except Exception:
            pytest.fail('a traceback')
        err = capsys.readouterr().err
        assert err.startswith('error: ') and err.endswith(f'; try {cure}\n'), err
        assert err.count('\n') == 1 and 'Traceback' not in err and 'error: ;' not in err
    with pytest.raises(RuntimeError, match='a fault in DataLoader worker process 0'):
        common.run(mock.Mock(side_effect=RuntimeError('a fault in DataLoader worker process 0')))


@pytest.mark.mutation('common.py', '        if dist.is_initialized():  # after',
                      '        if False:  # after')
@pytest.mark.mutation('common.py', '        HELD.close()\n    gc',
                      '        HELD.close()\n        dist.destroy_process_group()\n    gc')
def test_only_success_waits_for_other_processes(monkeypatch, capsys):
    left = mock.Mock()
    monkeypatch.setattr(common.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(common.dist, 'destroy_process_group', left)
    for error in (ValueError('gone'), KeyboardInterrupt()):
        with pytest.raises(SystemExit):
            common.run(mock.Mock(side_effect=error))
    assert not left.called and capsys.readouterr().err == 'error: gone\nstopped\n'
    common.run(lambda: None)
    assert left.call_count == 1


@pytest.mark.mutation('common.py', 'any(f[k] != found[0][k] for f in found)', 'False')
@pytest.mark.mutation('common.py', 'zlib.crc32(repr(dataset.names).encode())', '0')
@pytest.mark.mutation('common.py', 'for k, v in told.items() if k not in PLACES', 'for k, v in told.items()')
@pytest.mark.mutation('common.py', 'Path(v).name if k in MAY_MOVE and v else v', 'v')
def test_processes_that_differ_are_refused(monkeypatch):
    def gather(found, values):
        found[:] = [values, others]
    monkeypatch.setattr(common.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(common.dist, 'get_world_size', lambda: 2)
    monkeypatch.setattr(common.dist, 'all_gather_object', gather)
    others = dict(step=0)
    common.agree(step=0)
    with pytest.raises(ValueError, match='the processes differ: step 0; step 400'):
        common.agree(step=400)
    others = dict(step=0, **{'--lr': 2e-4, '--captions': 'rows.csv', '--micro_batch': 'a number'})
    try:
        common.agree_on_flags(SimpleNamespace(lr=2e-4, captions='/here/rows.csv', data='here',
                                              micro_batch=8), step=0)
    except (KeyError, ValueError) as error:
        pytest.fail(str(error))
    with pytest.raises(ValueError, match='the processes differ: --lr 0.0001; --lr 0.0002$'):
        common.agree_on_flags(SimpleNamespace(lr=1e-4, captions='rows.csv', micro_batch=4), step=0)
    files = mock.MagicMock(names=['a', 'b'], __len__=lambda self: 2)
    others = dict(items=2, digest=zlib.crc32(b"['a', 'b']"))
    try:
        common.agree_on_data(files)
    except ValueError as error:
        pytest.fail(str(error))
    files.names = ['a', 'c']
    with pytest.raises(ValueError, match='the processes differ: digest'):
        common.agree_on_data(files)


@pytest.mark.mutation('common.py', "and compiles(process.device)", '')
@pytest.mark.mutation('common.py', '0.0 if why else 1.0', '1.0')
@pytest.mark.mutation('common.py', "        return '--compile off'\n", '        pass\n')
def test_where_nothing_can_be_compiled_it_is_left_out(monkeypatch, capsys):
    def compile(network):
        def fails(x):
            raise torch._dynamo.exc.InternalTorchDynamoError('Failed to find\nC compiler')
        return fails
    common.compiles.cache_clear()
    monkeypatch.setattr(torch, 'compile', compile)
    monkeypatch.setattr(torch, 'ones', lambda *shape, device: None)
    cuda, network = common.Process(0, 1, torch.device('cuda'), False), nn.Linear(1, 1)
    assert common.compiled(network, arguments(compile='auto'), cuda) is network
    assert capsys.readouterr().out.startswith('note: torch.compile does not work (Failed to ')
    assert common.compiled(network, arguments(compile='off'), cuda) is network
    forced = common.compiled(network, arguments(compile='on'), cuda)
    with pytest.raises(SystemExit):
        try:
            common.run(lambda: forced(None))
        except RuntimeError:
            pytest.fail('a traceback')
    assert capsys.readouterr().err == 'error: Failed to find C compiler; try --compile off\n'
    common.compiles.cache_clear()


@pytest.mark.mutation('common.py', "require(':' not in device or local == 1", 'require(True')
def test_a_card_of_many_processes_is_refused(monkeypatch):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='--device cuda:1: one for 2 processes'):
        common.start_process('cuda:1')


@pytest.mark.mutation('common.py', "require('LOCAL_RANK' in os.environ", 'require(True')
def test_processes_that_torchrun_did_not_start(monkeypatch):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    try:
        with pytest.raises(ValueError, match='torchrun'):
            common.start_process('cuda')
    except KeyError:
        pytest.fail('a traceback')


class Fixed:
    """A data set that no other process can be sent."""

    def __init__(self):
        self.item = lambda i, rng: dict(value=torch.tensor(float(i)))

    def __len__(self):
        return 4


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux forks')
@pytest.mark.mutation('common.py', "return 'fork' if workers", "return 'spawn' if workers")
def test_loading_processes_are_sent_nothing():
    args = SimpleNamespace(workers=1, batch=4, seed=0)
    rows = common.stream(Fixed(), args, 0, common.start_process('cpu'), 4)
    try:
        found = next(rows)[1]['value']
    except (AttributeError, pickle.PicklingError) as error:
        pytest.fail(str(error))
    assert sorted(found.tolist()) == [0, 1, 2, 3]


@pytest.mark.mutation('common.py', "stream.reconfigure(errors='backslashreplace')", 'pass')
def test_names_that_the_terminal_cannot_encode(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr('sys.stdout', io.TextIOWrapper(written, 'ascii', write_through=True))
    try:
        common.run(lambda: common.list_notes([], [('b\u00e4r\udcff.png', 'broken'), ('c', 'gone')]))
    except SystemExit:
        pytest.fail('the list has ended the program')
    assert written.getvalue() == b'skipped: b\\xe4r\\udcff.png: broken\nskipped: c: gone\n'


@pytest.mark.mutation('common.py', 'if len(bad) > 20:', 'if False:')
def test_broken_files_that_are_not_listed_are_counted(capsys):
    common.list_notes([], [(f'{k}.png', 'broken') for k in range(23)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21 and lines[-1].startswith('skipped: 3 more')


@pytest.mark.mutation('common.py', "return printable(' '.join(text.split()))",
                      "return ' '.join(text.split())")
@pytest.mark.mutation('common.py', "printable(f'skipped", "(f'skipped")
@pytest.mark.mutation('common.py', "printable(f'note", "(f'note")
def test_names_do_not_command_the_terminal(capsys):
    with pytest.raises(SystemExit):
        common.run(mock.Mock(side_effect=ValueError('a\x1b[31m\x9b1m\rb.png: gone')))
    common.list_notes(['\x1b[2J'], [('\x07\x1b]0;', 'x')])
    out, err = capsys.readouterr()
    assert err == 'error: a\\x1b[31m\\x9b1m b.png: gone\n'
    assert out == 'note: \\x1b[2J\nskipped: \\x07\\x1b]0;: x\n'


@pytest.mark.mutation('common.py', 'with tempfile.TemporaryFile(dir=folder) as file:',
                      'with tempfile.TemporaryFile() as file:')
@pytest.mark.mutation('common.py', 'p.rmdir()', 'pass')
@pytest.mark.mutation('common.py', 'require(not Path(path).is_dir()', 'require(True')
def test_places_are_tried_before_the_work(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    made = common.try_writing('--out', tmp_path / 'a' / 'b')
    assert abs(made - (tmp_path / 'file').stat().st_mtime) < 60
    common.try_file('--out', tmp_path / 'c' / 'x.json')
    with pytest.raises(ValueError, match='--out .*: a folder; name a file'):
        common.try_file('--out', tmp_path)
    for place in ('file', 'file/a', '/proc/nowhere', 'x' * 300):
        with pytest.raises(ValueError, match='--out: nothing can be written in .*; name another'):
            common.try_writing('--out', tmp_path / place)
    assert [p.name for p in tmp_path.iterdir()] == ['file']

    def full(dir=None, **options):
        raise OSError(28, 'No space left on device') if dir == tmp_path else AssertionError(dir)
    monkeypatch.setattr(common.tempfile, 'TemporaryFile', full)
    with pytest.raises(ValueError, match='No space left on device'):
        common.try_writing('--out', tmp_path)


@pytest.mark.mutation('common.py', 'require(values.isfinite().all()',
                      'require(not values.isnan().any()')
@pytest.mark.mutation('common.py', 'require_finite(value, path)', 'pass')
def test_weights_that_are_not_finite():
    for value in (math.nan, math.inf):
        module = nn.BatchNorm1d(2)  # its count of batches is an integer
        weights = module.state_dict()
        common.load_weights(module, weights, 'run/vae.pt')
        weights['running_mean'] = torch.tensor([0.0, value])
        with pytest.raises(ValueError, match='run/vae.pt holds NaN or infinity: .* lower --lr'):
            common.load_weights(module, weights, 'run/vae.pt')


def test_device_that_is_not_there():
    for device in ('nonsense', 'cuda:99', 'meta'):
        with pytest.raises(ValueError, match=f'--device {device}'):
            common.start_process(device)


PROBE = '''
import ast, ctypes, os, sys
tree = ast.parse(open(sys.argv[1]).read())
exec(ast.unparse(next(n for n in tree.body if getattr(n, 'name', '') == 'keep_freed_memory')))
libc, size, names = ctypes.CDLL(None), 2 ** 26, 'arena a b c mapped d e f g h'.split()
Info = type('Info', (ctypes.Structure,), dict(_fields_=[(n, ctypes.c_size_t) for n in names]))
libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
keep_freed_memory()
before = libc.mallinfo2().mapped
block = libc.malloc(ctypes.c_size_t(size))
print('from the system', libc.mallinfo2().mapped > before)
libc.free(ctypes.c_void_p(block))
print('back to the system', libc.mallinfo2().arena < size)
'''


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallinfo2'), reason='is for glibc')
@pytest.mark.mutation('common.py', 'mallopt(-4, 0)', 'pass')
@pytest.mark.mutation('common.py', 'mallopt(-1, 2 ** 31 - 1)', 'mallopt(-1, 2 ** 20)')
def test_large_blocks_stay_in_the_process(repo):
    said = subprocess.check_output([sys.executable, '-c', PROBE, repo / 'common.py'], text=True)
    assert said.splitlines() == ['from the system False', 'back to the system False']


@pytest.mark.mutation('common.py', "auto if choice == 'auto' else", '')
@pytest.mark.mutation('common.py', '>= (8, 0)', '>= (7, 0)')
@pytest.mark.mutation('common.py', "tiles or dots and 'Gen", "tiles or dots or 'Gen")
@pytest.mark.mutation('common.py', "'GenuineIntel' not in processor()", 'True')
def test_bfloat16_where_it_is_faster(monkeypatch):
    def choice(tiles, dots, vendor, device='cpu'):
        monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: tiles, raising=False)
        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: dots, raising=False)
        monkeypatch.setattr(common, 'processor', lambda: f'vendor_id : {vendor}')
        faster = bool(common.multiplies_bfloat16(torch.device(device)))
        if device == 'cpu':  # what a run does with --amp auto, on and off
            assert [common.start_process(device, amp).amp for amp in ('auto', 'on', 'off')] == [
                faster, True, False]
        return faster
    intel, amd = 'GenuineIntel', 'AuthenticAMD'
    assert choice(True, True, intel) and choice(False, True, amd)
    assert not choice(False, True, intel) and not choice(False, False, amd)
    assert not choice(True, True, intel, 'mps')
    for capability, faster in ((7, 5), False), ((8, 0), True), ((9, 0), True):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        assert choice(False, False, intel, 'cuda') == faster
