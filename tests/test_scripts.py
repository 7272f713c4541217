"""The scripts as a user runs them: train, stop, resume, several processes, sample, misuse.

Most runs happen inside this process, which spares the start of Python; a script that is killed is a
fork of it, and one that torchrun starts a process of its own.
"""
import contextlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import inr
import ldm
import metrics
import sample
import train_ldm
import vae

ROOT = Path(__file__).parent.parent
TINY = ('--device cpu --amp off --batch 4 --steps 6 --eval_every 3 --save_every 2 --log_every 1 '
        '--warmup 2')
VAE = (f'{TINY} --resolution 16 --ch 8 --decoder_ch 8 --field_channels 4 --mlp_width 16 '
       '--z_channels 4')
LDM = f'{TINY} --ch 16 --ch_mult 1,2 --ema 0.9 --cache none'


class ScriptCrashed(Exception):
    """A script ended with a traceback: no assertion of a test, so no mutant dies of it."""


@contextlib.contextmanager
def default(function, **values):
    """Other defaults of a function's parameters, for a while."""
    function = inspect.unwrap(function)
    before, parameters = function.__defaults__, inspect.signature(function).parameters.values()
    function.__defaults__ = tuple(values.get(p.name, p.default) for p in parameters
                                  if p.default is not p.empty)
    try:
        yield
    finally:
        function.__defaults__ = before


def call(folder, script, *flags, repo=ROOT):
    """Run a script in `folder`: exit code, output, errors. Each of `flags` may hold several.

    What training draws to look at is coarse. ScriptCrashed if the script ends with an exception.
    """
    argv = [str(repo / script), *' '.join(map(str, flags)).split()]
    out, err, code, before = io.StringIO(), io.StringIO(), 0, (os.getcwd(), sys.argv)
    os.chdir(folder)
    sys.argv = argv
    try:
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
              default(vae.ShapeVAE.show, cells=16), default(ldm.generate, steps=2)):
            runpy.run_path(argv[0], run_name='__main__')
    except SystemExit as stop:
        code = stop.code or 0
    except Exception as error:
        raise ScriptCrashed(' '.join(argv)) from error
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def done(folder, script, *flags, repo=ROOT):
    """The same for a script that must not refuse what it is asked."""
    result = call(folder, script, *flags, repo=repo)
    assert result.code == 0, result.err[-2000:]
    return result


def tensors(tree, path=''):
    """Every tensor and number of a nested state as {path: value}."""
    if isinstance(tree, dict):
        tree = tree.items()
    elif isinstance(tree, (list, tuple)):
        tree = enumerate(tree)
    else:
        return {path: tree}
    return {k: v for name, part in tree for k, v in tensors(part, f'{path}/{name}').items()}


def trained(path):
    """What training has made of a checkpoint: weights, averages, optimiser, step."""
    state = common.load_checkpoint(path)
    return tensors({k: state[k] for k in ('vae', 'model', 'ema', 'opt', 'step') if k in state})


def equal(a, b):
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same(a, b):
    a, b = trained(a), trained(b)
    assert a.keys() == b.keys()
    assert [k for k in a if not equal(a[k], b[k])] == []


def log_of(folder, stage):
    """Training lines of a run's log."""
    lines = [json.loads(s) for s in (folder / 'log.jsonl').read_text().splitlines()]
    return [v for v in lines if v['stage'] == stage and 'lr' in v]


def assert_close(a, b, file, stage, atol=2e-4):
    """Two runs that differ in the order of summation only: to rounding until Adam magnifies it."""
    for i, (x, y) in enumerate(zip(log_of(a, stage), log_of(b, stage), strict=True)):
        for k in set(x) - {'items_per_s', 'stage'}:
            assert x[k] == pytest.approx(y[k], rel=1e-3 if i else 1e-5), (x['step'], k)
    x, y = trained(a / file), trained(b / file)
    for k in x:
        if k.startswith(('/vae', '/model', '/ema')):  # Adam magnifies the noise of tiny gradients
            torch.testing.assert_close(x[k], y[k], rtol=1e-3, atol=atol, msg=k)


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """The same order of summation here and in processes that torchrun starts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def toy(tmp_path_factory, one_thread):
    """A folder with runs/toy_image, both stages trained for 6 steps without a break."""
    folder = tmp_path_factory.mktemp('toy')
    first = done(folder, 'train_vae.py', VAE)
    second = done(folder, 'train_ldm.py', LDM)
    return SimpleNamespace(folder=folder, run=folder / 'runs' / 'toy_image', printed=(
        first.out, second.out))


@pytest.fixture(scope='module')
def photos(tmp_path_factory, one_thread):
    """A folder with twelve odd-sized pictures in `set`, and a stage-1 run on them, with flips."""
    folder = tmp_path_factory.mktemp('photos')
    (folder / 'set').mkdir()
    for k in range(12):
        pixels = data.toy_image([k], (33 + k, 21 + 2 * k))[0]
        data.save_png(folder / 'set' / f'{k}.png', pixels)
    done(folder, 'train_vae.py', VAE, '--preset toy_image --dataset image --data set --flip',
         '--name photos --steps 2 --split 0.3')
    return folder


@pytest.fixture
def copy(toy, tmp_path):
    """A copy of the toy folder that a test may change."""
    return Path(shutil.copytree(toy.folder, tmp_path / 'copy'))


# ---- training ----------------------------------------------------------------------------------

def test_both_stages_end_to_end(toy):
    files = {p.name for p in toy.run.iterdir()}
    assert files == {'vae.pt', 'ldm.pt', 'args.json', 'log.jsonl', 'splits.json', 'samples',
                     'curves.png', 'lock'}
    assert Image.open(toy.run / 'curves.png').size == (960, 400)  # three axes for each stage
    names = {p.name for p in (toy.run / 'samples').iterdir()}
    assert names == {f'{k}_{n:07d}.png' for k in ('reconstruction', 'sample') for n in (3, 6)}
    assert Image.open(toy.run / 'samples' / 'sample_0000006.png').size == (9 * 18 + 2, 4 * 18 + 2)
    args = json.loads((toy.run / 'args.json').read_text())
    assert set(args) == {'vae', 'ldm'} and args['vae']['z_channels'] == 4
    for stage, printed in zip(('vae', 'ldm'), toy.printed):
        assert [v['step'] for v in log_of(toy.run, stage)] == [1, 2, 3, 4, 5, 6]
        first_line = printed.splitlines()[0]
        assert all(s in first_line for s in ('runs/toy_image', '20000', 'CPU', 'float32', ' M '))
    state = common.load_checkpoint(toy.run / 'ldm.pt', 'ldm')
    assert state['vae_hash'] and state['splits'] and state['vae_args']['resolution'] == 16
    lines = [json.loads(s) for s in (toy.run / 'log.jsonl').read_text().splitlines()]
    assert [v['step'] for v in lines if 'psnr_32' in v] == [3, 6]
    assert [v['step'] for v in lines if 'held_out_loss' in v] == [3, 6]


STAGES = {'train_vae.py': ('vae.pt', VAE), 'train_ldm.py': ('ldm.pt', LDM)}


def stopped(folder, script, flags, at, repo=ROOT):
    """Train until Ctrl-C in step `at`."""
    update = common.FiniteGuard.update

    def stop(self, step, *values):
        if step == at:
            raise KeyboardInterrupt
        update(self, step, *values)
    with mock.patch.object(common.FiniteGuard, 'update', stop):
        result = call(folder, script, flags, repo=repo)
    assert result.code == 130 and result.err.splitlines()[-1].startswith('stopped;')


def interrupted(folder, script, flags, at, repo):
    """The same, then the command again to the end: the keys of its noise, its result."""
    stopped(folder, script, flags, at, repo)
    keys, seeded = [], common.torch_seeded
    with mock.patch.object(common, 'torch_seeded', lambda *k, **more: keys.append(k)
                           or seeded(*k, **more)):
        return keys, done(folder, script, flags, '--workers 2', repo=repo)


@pytest.mark.mutation('train_vae.py', "('posterior', args.seed)", "('posterior', step)")
@pytest.mark.mutation('train_vae.py', "opt.load_state_dict(state['opt'])", 'pass')
@pytest.mark.mutation('train_vae.py', 'stream(train, args, step,', 'stream(train, args, 0,')
@pytest.mark.mutation('train_vae.py', 'common.lr_at(step, args))\n', 'common.lr_at(0, args))\n')
@pytest.mark.mutation('vae.py', "owner.register_buffer(f'sn_u_{rows}x{columns}', u)",
                      "owner.register_buffer(f'sn_u_{rows}x{columns}', u, persistent=False)")
def test_stage_1_resumes_bit_by_bit(toy, tmp_path, repo):
    keys, result = interrupted(tmp_path, 'train_vae.py', VAE, 5, repo)
    assert 'continues at step 4 of 6' in result.out.splitlines()[0]
    assert [k for k in keys if k[0] == 'posterior'] == [
        ('posterior', 0, k) for k in range(4 * 4, 6 * 4)]
    run = tmp_path / 'runs' / 'toy_image'
    assert_same(run / 'vae.pt', toy.run / 'vae.pt')
    same = set(log_of(run, 'vae')[0]) - {'items_per_s'}
    for a, b in zip(log_of(run, 'vae'), log_of(toy.run, 'vae'), strict=True):
        assert {k: a[k] for k in same} == {k: b[k] for k in same}


@pytest.mark.mutation('train_ldm.py', "'diffusion', args.seed)", "'diffusion', step)")
@pytest.mark.mutation('train_ldm.py', "ema.load_state_dict(state['ema'])", 'pass')
@pytest.mark.mutation('train_ldm.py', 'stream(latents, args, step,', 'stream(latents, args, 0,')
def test_stage_2_resumes_bit_by_bit(toy, copy, repo):
    run = copy / 'runs' / 'toy_image'
    (run / 'ldm.pt').unlink()
    keys, result = interrupted(copy, 'train_ldm.py', LDM, 5, repo)
    assert 'continues at step 4 of 6' in result.out.splitlines()[0]
    assert [k for k in keys if k[0] == 'diffusion'] == [
        ('diffusion', 0, k) for k in range(4 * 4, 6 * 4)]
    assert_same(run / 'ldm.pt', toy.run / 'ldm.pt')
    assert [v['step'] for v in log_of(run, 'vae')] == [1, 2, 3, 4, 5, 6]  # left alone


def killed(folder, script, flags, repo, owner, name, at, last):
    """Run a script in a fork that dies by kill -9: in call `at` of owner.name, after `last`."""
    function, calls = getattr(owner, name), itertools.count(1)

    def fatal(*args, **more):
        if next(calls) == at:
            last(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **more)
    child = os.fork()
    if not child:
        try:
            with mock.patch.object(owner, name, fatal):
                call(folder, script, flags, repo=repo)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise ScriptCrashed(f'{script} {flags}')
    assert os.WIFSIGNALED(status), 'ended before it was killed'


def half_a_checkpoint(state, file):
    file.write(b'PK half a checkpoint')
    file.flush()


def half_a_line(log):
    with log.path.open('a') as file:
        file.write('{"stage": "')


def step_of(path):
    """The step of a checkpoint, None if it cannot be read."""
    try:
        return common.load_checkpoint(path)['step']
    except (ValueError, OSError):
        return None


@pytest.mark.mutation('common.py', 'start = step * batch + rank', 'start = rank')
@pytest.mark.mutation('common.py', 'except (ValueError, RecursionError):', 'except KeyError:')
@pytest.mark.mutation('common.py', 'new name\n    replace(path, write)', 'new name\n    write(path)')
@pytest.mark.parametrize('script', STAGES)
def test_a_kill_loses_nothing(script, toy, copy, repo):
    """kill -9 while a checkpoint is written, again within a line of the log, then to the end.

    Bit by bit, this is the run that nobody killed.
    """
    file, flags = STAGES[script]
    run, stage = copy / 'runs' / 'toy_image', Path(file).stem
    (run / file).unlink()
    killed(copy, script, flags, repo, torch, 'save', 2, half_a_checkpoint)  # that of step 4
    assert step_of(run / file) == 2
    killed(copy, script, flags, repo, common.Log, 'write', 4, half_a_line)  # in step 5
    assert step_of(run / file) == 4
    result = done(copy, script, flags, repo=repo)
    assert 'continues at step 4 of 6' in result.out
    assert_same(run / file, toy.run / file)
    assert [v['step'] for v in log_of(run, stage)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.mutation('common.py', "state['step'] >= args.steps", "state['step'] == args.steps")
@pytest.mark.mutation('train_vae.py', "if common.finished(folder / 'vae.pt'", "if '' and (folder")
@pytest.mark.mutation('train_ldm.py', "if common.finished(folder / 'ldm.pt'", "if '' and (folder")
def test_finished_runs_and_longer_ones(copy, repo):
    before = snapshot(copy)
    for script, flags, step in (('train_vae.py', VAE, 6), ('train_ldm.py', LDM, 6),
                                ('train_vae.py', f'{VAE} --steps 3', 3)):
        said = done(copy, script, flags, repo=repo).out
        assert f'is at step 6, nothing to do for --steps {step}' in said and said.count('\n') == 1
    assert snapshot(copy) == before
    assert 'continues at step 6 of 8' in done(copy, 'train_ldm.py', LDM, '--steps 8').out
    assert common.load_checkpoint(copy / 'runs/toy_image/ldm.pt')['step'] == 8
    assert 'starts of 2' in done(copy, 'train_vae.py', VAE, '--steps 2 --restart').out


@pytest.mark.mutation('train_ldm.py', '(loss * share).backward()', 'loss.backward()')
@pytest.mark.mutation('train_vae.py', "(losses['total'] * share).backward()",
                      "losses['total'].backward()")
@pytest.mark.mutation('train_vae.py', 'noise, last / share)', 'noise)')
@pytest.mark.mutation('common.py', "'micro_batch', 'restart'", "'restart'")
def test_rounds_change_nothing(toy, copy, repo):
    """Three items, then one; stage 1 is resumed with rounds of two, which it did not begin with."""
    try:
        for script, (file, flags) in STAGES.items():
            more = ['--vae toy_image'] if file == 'ldm.pt' else []
            named = ' '.join([flags, '--name rounds', *more])
            stopped(copy, script, f'{named} --micro_batch 3', 5, repo)
            done(copy, script, named, '--micro_batch 2', repo=repo)
    except ValueError as error:
        pytest.fail(str(error))
    run = copy / 'runs' / 'rounds'
    for stage in ('vae', 'ldm'):
        for x, y in zip(log_of(run, stage), log_of(toy.run, stage), strict=True):
            assert x['norm'] == pytest.approx(y['norm'], rel=1e-3)
            assert x.get('sn', 0) == pytest.approx(y.get('sn', 0), rel=1e-4)


def assert_half(half, full, stage, step):
    """A run in bfloat16 is near that in float32, and is another one; its losses are in float32."""
    a, b = (log_of(run, stage)[step - 1] for run in (half, full))
    for k in ('reconstruction' if stage == 'vae' else 'loss', 'norm'):
        assert a[k] == pytest.approx(b[k], rel=0.02)
    assert a['norm'] != b['norm']  # stage 2's first losses hardly depend on the network
    if stage == 'vae':
        assert a['sn'] == pytest.approx(b['sn'], rel=1e-5)


@pytest.mark.mutation('train_vae.py', 'with process.autocast():', 'if True:')
@pytest.mark.mutation('train_ldm.py', 'with process.autocast():\n                    loss',
                      'if True:\n                    loss')
def test_bfloat16_is_near_float32(toy, copy, repo):
    """And the U-Net computes in it while it learns, in float32 when it is measured."""
    seen, forward = [], ldm.UNet.forward

    def watched(*args):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled('cpu')))
        return forward(*args)
    with mock.patch.object(ldm.UNet, 'forward', watched):
        for script, (file, flags) in STAGES.items():
            done(copy, script, flags, '--name half --amp on --steps 2', *(
                ['--vae toy_image'] if file == 'ldm.pt' else []), repo=repo)
    assert {*seen} == {(True, True), (False, False)}
    runs = copy / 'runs'
    assert_half(runs / 'half', runs / 'toy_image', 'vae', 1)
    assert_half(runs / 'half', runs / 'toy_image', 'ldm', 2)  # starts from an output of zero


@pytest.mark.mutation('vae.py', 'with torch.autocast(values.device.type, enabled=False):',
                      'if True:')
@pytest.mark.mutation('common.py', 'enabled=self.amp', 'enabled=False')
def test_bfloat16_of_shapes_and_text_is_near_float32(shapes, tmp_path, repo):
    folder = Path(shutil.copytree(shapes.folder, tmp_path / 'copy'))
    done(folder, 'train_vae.py', THINGS, '--name half --amp on --steps 2', repo=repo)
    done(folder, 'train_ldm.py', WORDS, '--vae things --name half --amp on --steps 2', repo=repo)
    assert_half(folder / 'runs' / 'half', shapes.run, 'vae', 1)
    assert_half(folder / 'runs' / 'half', shapes.run, 'ldm', 2)


def first_batch(args, r, largest):
    """The first pictures of training at continuous scales: image, target, R, corner, anew."""
    order = common.seeded('order', 0, 0).permutation(20_000)
    for k in range(args.batch):
        rng = common.seeded('item', 0, k)
        R = int(rng.integers(r, largest + 1))
        top, left = map(int, rng.integers(0, R - r + 1, 2)) if R > r else (0, 0)
        whole = data.toy_image([order[k]], R)[0]
        yield data.toy_image([order[k]], r), whole[:, top:top + r, left:left + r], R, (top, left)


@pytest.mark.mutation('data.py', 'if self.continuous:\n            return int',
                      'if False:\n            return int')
@pytest.mark.mutation('vae.py', "self.mlp(pe, scale=batch['scale'])",
                      "self.mlp(pe, scale=batch['scale'] ** 0)")
@pytest.mark.mutation('vae.py', 'else posterior.mean[0].numel()', 'else c.n_ref')
def test_continuous_scales_and_the_balance_of_the_paper(tmp_path, repo):
    """Both terms of the first loss, from new pictures and the network that the seed makes.

    The mean of |omega(c) - x| at the cell centres of each crop, with s = r/R; and the mean over the
    latent of KL(q || N(0, I)), as `--kl_mode paper` has it.
    """
    done(tmp_path, 'train_vae.py', VAE, '--continuous --scales 1,2 --kl_mode paper --kl_start 0.3 '
         '--kl_weight 0.3 --sn_start 0 --steps 1', repo=repo)
    line, = log_of(tmp_path / 'runs' / 'toy_image', 'vae')
    state = common.load_checkpoint(tmp_path / 'runs' / 'toy_image' / 'vae.pt')
    args, config = SimpleNamespace(**state['args']), vae.VAEConfig(**state['vae_config'])
    torch.manual_seed(0)
    model = vae.D2CVAE(config)
    noise, _ = common.row_noise(range(args.batch), ('posterior', 0), torch.device('cpu'), (4, 16))
    errors, divergences, sizes = [], [], set()
    for (image, target, R, (top, left)), own in zip(first_batch(args, 16, 32), noise):
        with torch.no_grad():
            q = model.encode(image)
            y, x = torch.meshgrid(*(2 * (torch.arange(16) + first + 0.5) / R - 1
                                    for first in (top, left)), indexing='ij')
            values = model.query(model.decode(q.mean + (q.logvar / 2).exp() * own),
                                 torch.stack([x, y], dim=-1)[None], scale=16 / R)
        errors.append((values[0] - target.permute(1, 2, 0)).abs().mean())
        normal = torch.distributions.Normal(q.mean, (q.logvar / 2).exp())
        divergences.append(torch.distributions.kl_divergence(
            normal, torch.distributions.Normal(0.0, 1.0)).mean())
        sizes.add(R)
    assert len(sizes - {16, 24, 32}) > 1
    assert line['reconstruction'] == pytest.approx(np.mean(errors), rel=1e-5)
    assert line['total'] == pytest.approx(np.mean(errors) + 0.3 * np.mean(divergences), rel=1e-5)


def test_fine_tuning_starts_from_the_given_weights(toy, copy):
    done(copy, 'train_vae.py', VAE, '--name fine --steps 1 --lr 1e-12 --init toy_image')
    old, new = (common.load_checkpoint(copy / 'runs' / n / 'vae.pt')['vae']
                for n in ('toy_image', 'fine'))
    for name in (k for k in old if not k.startswith('sn_')):
        torch.testing.assert_close(new[name], old[name], rtol=1e-6, atol=1e-8)


DRIVER = '''
import functools, json, sys
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist, common, metrics, train_ldm, train_vae, vae
torch.compile = functools.partial(torch.compile, backend='aot_eager_decomp_partition')
vae.ShapeVAE.show.__defaults__ = 128, 16
train_ldm.generate = functools.partial(train_ldm.generate, steps=2)
for script, *argv in json.loads(sys.argv[2]):
    sys.argv = [script, *argv]
    dict(train_vae=train_vae, train_ldm=train_ldm, metrics=metrics)[script].main()
    if '--compile' in argv:
        from torch._dynamo.utils import counters
        print(f'{script}: graphs {counters["stats"]["unique_graphs"]}, '
              f'breaks {sum(counters["graph_break"].values())}', flush=True, file=sys.__stdout__)
        counters.clear()
common.run(lambda: None)
'''


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def two_processes(folder, jobs, tmp_path, repo, nodes=1):
    """The jobs (script, flag, ...) under torchrun, begun here; at the end `said` is the output.

    Two processes of one machine or, for two nodes, of two, which are both this one.
    """
    (tmp_path / 'driver.py').write_text(DRIVER)
    port, said, running = free_port(), [], []
    for rank in range(nodes):
        command = [sys.executable, '-m', 'torch.distributed.run', f'--nnodes={nodes}',
                   f'--node_rank={rank}', f'--nproc_per_node={2 // nodes}',
                   '--master_addr=127.0.0.1', f'--master_port={port}',
                   tmp_path / 'driver.py', repo, json.dumps(jobs)]
        running.append(subprocess.Popen(
            command, cwd=folder, env=dict(os.environ, OMP_NUM_THREADS='1'), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    yield said
    for process in running:
        out, err = process.communicate()
        if process.returncode:
            raise ScriptCrashed(err[-3000:])
        assert 'Warning' not in err
        said += out.splitlines()


@pytest.mark.mutation('common.py', '+ rank * (batch // world)', '')
@pytest.mark.mutation('common.py', 'start = step * batch + rank',
                      'start = step * (batch // world) + rank')
@pytest.mark.mutation('common.py', 'if last or not hasattr', 'if not hasattr')
@pytest.mark.mutation('vae.py', 'total = reconstruction + weights[0] * kl / n',
                      'total = reconstruction + weights[0].item() * kl / n')
def test_two_processes_equal_one(toy, photos, shapes, tmp_path, mutation, repo):
    """torchrun on two nodes, both stages: compiled, resumed after one process, with rounds, latents
    in memory and in a file, shapes, text. A compiled step is one graph for all scales."""
    folder = Path(shutil.copytree(toy.folder, tmp_path / 'one'))
    shutil.copytree(photos / 'set', folder / 'set')
    shutil.copytree(photos / 'runs' / 'photos', folder / 'runs' / 'photos')
    shutil.copytree(shapes.folder / 'set', folder / 'solid_set')
    shutil.copy(shapes.folder / 'captions.csv', folder)
    gently = f'{VAE} --eval_every 6 --warmup 100'  # Adam turns noise into steps of size lr
    small = f'{gently} --ch_mult 1 --decoder_mult 1 --fields 1 --mlp_blocks 1'
    diffusion = f'{LDM} --eval_every 6'
    cached = f'{diffusion} --vae photos --cache disk --micro_batch 1'
    things = f'{SHAPE} --dataset shape --data solid_set --steps 4 --warmup 1000'
    said = (f'{TINY} --eval_every 6 --ch 16 --ch_mult 1,2 --vae {shapes.run} --data solid_set '
            '--captions captions.csv --text bytes --steps 4 --warmup 1000')
    runs = {('train_vae', 'small'): small, ('train_vae', 'twice'): f'{gently} --micro_batch 1',
            ('train_ldm', 'small'): f'{diffusion} --vae {toy.run} --ch_mult 1,1 --num_res_blocks 1',
            ('train_ldm', 'resumed'): f'{diffusion} --vae {toy.run}',
            ('train_ldm', 'photos'): cached, ('train_vae', 'solids'): things,
            ('train_ldm', 'solids'): said}
    if mutation:  # one run is enough
        name = 'small' if mutation[0] == 'vae.py' else 'twice'
        runs = {('train_vae', name): runs['train_vae', name]}
    two = Path(shutil.copytree(folder, tmp_path / 'two'))
    jobs = []
    for (script, name), flags in runs.items():
        jobs.append([script, *flags.split(), '--name', name])
        if name in ('twice', 'resumed'):
            stopped(two, f'{script}.py', f'{flags} --name {name}', 5)
        else:
            jobs[-1] += ['--restart', '--compile', 'on' if name == 'small' else 'off']
    with two_processes(two, jobs, tmp_path, repo, nodes=2) as printed:
        for (script, name), flags in runs.items():
            done(folder, f'{script}.py', flags, '--name', name, '--restart')
    assert sum('2 x CPU' in line for line in printed) == len(runs)
    for (script, name), flags in runs.items():
        stage = script.removeprefix('train_')
        assert_close(two / 'runs' / name, folder / 'runs' / name, f'{stage}.pt', stage,
                     2e-5 if name in ('small', 'twice') else 2e-4)  # weights move by 2e-4 in all
        if name == 'small':
            graphs = dict(vae=1, ldm=3)[stage]  # the encoder's batches are of two sizes
            assert printed.count(f'{script}: graphs {graphs}, breaks 0') == 2
        if name in ('twice', 'resumed'):
            assert sum(f'runs/{name}: ' in line and 'continues at step 4 of 6' in line
                       for line in printed) == 1


@pytest.mark.filterwarnings('error')
@pytest.mark.mutation('data.py', '0, 0, k == 1))', '0, 0, False))')
@pytest.mark.mutation('train_ldm.py', 'self.table[i * self.views', 'self.table[i')
def test_cached_latents_change_nothing(photos, tmp_path, repo):
    folder = Path(shutil.copytree(photos, tmp_path / 'copy'))
    for cache in ('none', 'memory', 'disk'):
        done(folder, 'train_ldm.py', LDM, f'--name {cache} --cache {cache} --steps 3', repo=repo)
    for x, y in zip(*(log_of(folder / 'runs' / cache, 'ldm') for cache in ('memory', 'none'))):
        assert x['loss'] == pytest.approx(y['loss'], rel=1e-3)  # in half precision
    memory, disk = (trained(folder / 'runs' / cache / 'ldm.pt') for cache in ('memory', 'disk'))
    assert all(torch.equal(memory[k], disk[k]) for k in memory if torch.is_tensor(memory[k]))
    file, = (folder / 'runs' / 'disk').glob('latents_*.npy')
    written, former = file.stat().st_mtime_ns, file.with_name('latents_of_another.npy')
    assert np.load(file).shape[1:] == (2, 4, 16)
    former.touch()
    done(folder, 'train_ldm.py', LDM, '--name disk --cache disk --restart --steps 1')
    assert file.stat().st_mtime_ns == written and not former.exists()  # read, not made again


@pytest.mark.mutation('train_ldm.py', "'posterior'] = moments if args", "'posterior'] = () if args")
@pytest.mark.mutation('train_ldm.py', 'posterior=moments if args', 'posterior=() if args')
def test_expected_noise_lowers_the_losses(photos, tmp_path, repo):
    """Of a network that gives next to nothing, eps = sigma z_t, every loss is smaller."""
    folder, losses = Path(shutil.copytree(photos, tmp_path / 'copy')), {}
    for name, flags in dict(drawn='', expected='--target expected').items():
        done(folder, 'train_ldm.py', LDM, f'--name {name} --mixing_init=-30 --steps 1 {flags}',
             repo=repo)
        text = (folder / 'runs' / name / 'log.jsonl').read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        losses[name] = [line[key] for key in ('loss', 'held_out_loss') for line in lines
                        if line['stage'] == 'ldm' and key in line]
    for drawn, expected in zip(losses['drawn'], losses['expected'], strict=True):
        assert 0 < expected < 0.9 * drawn


@pytest.mark.mutation('train_ldm.py', '(0.5 * posterior.logvar).exp()', 'posterior.logvar.exp()')
@pytest.mark.mutation('train_ldm.py', "mean if posterior == 'mean' else", '')
@pytest.mark.mutation('train_ldm.py', 'std * noise, (mean, std)', 'std * noise, (mean, noise)')
def test_latents_are_samples_of_the_posterior(toy):
    vae, _ = ldm.load_vae(toy.run)
    encode = train_ldm.encoder(vae, SimpleNamespace(compile='off'), common.start_process('cpu'))
    batch, noise = dict(image=torch.rand(3, 3, 16, 16) * 2 - 1), torch.randn(3, 4, 16)
    posterior = vae.encode(batch)
    z, moments = train_ldm.latents_of(batch, encode, noise)
    torch.testing.assert_close(z, posterior.sample(noise))
    torch.testing.assert_close(moments, (posterior.mean, (posterior.logvar / 2).exp()))
    cached = dict(zip(('mean', 'std'), (m.half() for m in encode(batch))))
    z, _ = train_ldm.latents_of(cached, None, noise)
    torch.testing.assert_close(z, posterior.sample(noise), atol=5e-3, rtol=2e-3)
    assert z.dtype == torch.float32
    assert torch.equal(train_ldm.latents_of(batch, encode, noise, 'mean')[0], posterior.mean)


@pytest.mark.mutation('train_ldm.py', 'if not done[b]]', ']')
@pytest.mark.mutation('train_ldm.py', 'file.seek(first + row * parts[b].start)', 'file.seek(first)')
@pytest.mark.mutation('train_ldm.py', 'range(len(parts))[process.rank::process.world]',
                      'range(len(parts))')
@pytest.mark.mutation('train_ldm.py', 'path.stat().st_size == end', 'True')
def test_a_file_of_latents_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Two processes, one after the other, of which the second is stopped after two blocks."""
    whole = np.random.default_rng(0).normal(size=(100, 2, 3, 5)).astype('float16')
    path, made = tmp_path / 'latents.npy', []
    monkeypatch.setattr(train_ldm, 'barrier', lambda process: None)

    def run(rank, most=99):
        def values_of(parts):
            for k, rows in enumerate(parts):
                if k == most:
                    raise KeyboardInterrupt
                made.append(rows.start)
                yield whole[rows.start:rows.stop]
        process = common.Process(rank, 2, torch.device('cpu'), False)
        try:
            train_ldm.write_rows(path, whole.shape, process, values_of)
        except IndexError as error:
            pytest.fail(str(error))
    path.write_bytes(b'latents of another form')
    run(0)
    with pytest.raises(KeyboardInterrupt):
        run(1, most=2)
    assert made == [0, 32, 64, 96, 16, 48]
    run(0)
    run(1)
    assert made[6:] == [80]
    np.testing.assert_array_equal(np.load(path, mmap_mode='r'), whole)


@pytest.mark.mutation('train_ldm.py', '(4 * common.local_processes())', '4')
@pytest.mark.mutation('train_ldm.py', "shutil.disk_usage(path.parent).free // 2", '10 ** 20')
@pytest.mark.mutation('train_ldm.py', "if choice != 'auto':", "if False:")
@pytest.mark.mutation('train_ldm.py', "'disk' if path.is_file() else fits", 'fits')
def test_where_latents_are_kept(monkeypatch, capsys, tmp_path):
    """A quarter of the memory, shared by a machine's processes, then half of the disk.

    What an earlier start began to fill no longer needs to fit.
    """
    path = tmp_path / 'latents.npy'
    monkeypatch.setattr(train_ldm, 'free_memory', lambda: 800)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=600))
    for local, size, place in ((1, 199, 'memory'), (1, 200, 'disk'), (2, 99, 'memory'),
                               (2, 100, 'disk'), (1, 299, 'disk'), (1, 300, 'none')):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', str(local))
        assert train_ldm.choose_cache('auto', size, path) == place
        assert f'--cache auto: {place}, for' in capsys.readouterr().out
        assert train_ldm.choose_cache('disk', size, path) == 'disk'
    path.touch()
    assert train_ldm.choose_cache('auto', 10 ** 6, path) == 'disk'
    monkeypatch.undo()
    assert train_ldm.free_memory() > 2 ** 20 or not Path('/proc/meminfo').exists()


# ---- sampling ----------------------------------------------------------------------------------

def pictures(folder, out='out'):
    """{path below out: uint8 (H,W,3) as int} of what a script has written."""
    return {p.relative_to(folder / out).as_posix(): np.asarray(Image.open(p)).astype(int)
            for p in (folder / out).rglob('*.*')}


def assert_alike(a, b, levels=1):
    assert a.shape == b.shape and np.abs(a - b).max() <= levels


@pytest.mark.mutation('ldm.py', "torch_seeded('z_T', s)) for s in seeds",
                      "torch_seeded('z_T', 0)) for s in seeds")
@pytest.mark.mutation('sample.py', 'seeds = [args.seed + k for k in numbers]',
                      'seeds = [args.seed + k for k in range(len(numbers))]')
def test_a_sample_is_the_same_in_any_batch(toy, tmp_path, repo):
    run = f'--run {toy.run} --device cpu --steps 4'
    ode = f'{run} --sampler dpmpp'  # nothing but z_T tells its samples apart
    done(tmp_path, 'sample.py', ode, '--num 5 --seed 3 --batch 4 --out a', repo=repo)
    done(tmp_path, 'sample.py', ode, '--num 2 --seed 6 --batch 1 --out b', repo=repo)
    a, b = pictures(tmp_path, 'a'), pictures(tmp_path, 'b')
    assert set(a) == {*(f'16x16/{s:06d}.png' for s in range(3, 8)), 'grid_16x16.png'}
    assert not np.array_equal(a['16x16/000003.png'], a['16x16/000004.png'])
    for name in ('16x16/000006.png', '16x16/000007.png'):
        assert_alike(a[name], b[name])
    made = {}
    for k, sampler in enumerate(('--sampler ddpm', '', '--eta 0')):
        flags = f'{run} {sampler} --seed 5'
        done(tmp_path, 'sample.py', flags, f'--num 2 --batch 2 --out c{k}', repo=repo)
        done(tmp_path, 'sample.py', flags, f'--num 2 --batch 1 --out d{k}', repo=repo)
        made[k], alone = (pictures(tmp_path, f'{out}{k}')['16x16/000006.png'] for out in 'cd')
        assert_alike(made[k], alone)
    assert_alike(made[2], a['16x16/000006.png'])
    assert not np.array_equal(made[1], made[2])


@pytest.mark.mutation('sample.py', 'int(match[2] or match[1])))', 'int(match[1])))')
@pytest.mark.mutation('sample.py', '(h, w), box, args.antialias)[0])',
                      '(h, w), None, args.antialias)[0])')
def test_sizes_sweep_and_zoom(toy, copy, tmp_path, repo):
    """Every size, and every part of a picture, is read from the same function."""
    flags = '--device cpu --num 2 --steps 4'
    done(copy, 'sample.py', flags, '--res 20x24 --out a', repo=repo)  # the newest run
    done(copy, 'sample.py', flags, '--run toy_image --sweep 16,32,64x96 --out b', repo=repo)
    a, b = pictures(copy, 'a'), pictures(copy, 'b')
    assert '20x24/000001.png' in a and a['20x24/000001.png'].shape == (20, 24, 3)
    assert set(b) == {n for s in ('16x16', '32x32', '64x96')
                      for n in (f'{s}/000000.png', f'{s}/000001.png', f'grid_{s}.png')}
    assert b['64x96/000001.png'].shape == (64, 96, 3)
    halved = b['64x96/000001.png'].reshape(32, 2, 32, 3, 3).mean((1, 3))
    assert np.abs(halved - b['32x32/000001.png']).mean() < 3
    done(copy, 'sample.py', flags, '--res 32 --out c --box=0,1,-1,0', repo=repo)
    done(copy, 'sample.py', flags, '--res 64 --out d', repo=repo)
    assert_alike(pictures(copy, 'c')['32x32/000001.png'],
                 pictures(copy, 'd')['64x64/000001.png'][:32, 32:])


@pytest.mark.mutation('sample.py', 'vae.decode(z[0][None])', 'vae.decode(0 * z[0][None])')
@pytest.mark.mutation('sample.py', 'zoom(vae, xi, sizes[0], args)',
                      'zoom(vae, xi, sizes[0][::-1], args)')
def test_export_and_animated_zoom(toy, tmp_path, repo):
    run = f'--run {toy.run} --device cpu --steps 2 --seed 5'
    printed = done(tmp_path, 'sample.py', run, '--num 1 --res 12x16,16 --out a --export f.pt',
                   '--zoom=0.5,-0.25,4', repo=repo).out
    f, shown = inr.load_function(tmp_path / 'f.pt'), Image.open(tmp_path / 'a/zoom_000005.gif')
    assert 'f.pt: 0.' in printed and shown.n_frames == 33 and shown.size == (16, 12)
    picture = data.to_uint8(f(inr.make_grid(16, 16)).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    assert_alike(pictures(tmp_path, 'a')['16x16/000005.png'], picture.numpy().astype(int), 2)
    box = '--box=0.25,0.75,-0.5,0'
    done(tmp_path, 'sample.py', run, box, '--num 1 --res 12x16 --out b', repo=repo)
    for frame, out in ((0, 'a'), (32, 'b')):  # a GIF has 256 colours
        shown.seek(frame)
        drawn = np.asarray(shown.convert('RGB')).astype(int)
        assert np.abs(drawn - pictures(tmp_path, out)['12x16/000005.png']).mean() < 6
    for flags, word in (('--num 2 --export g.pt', '--num 1'), ('--num 1 --zoom=0,0,1', '--zoom'),
                        ('--num 1 --zoom=0,2,3', '--zoom'), ('--num 1 --zoom=0,1', '--zoom')):
        assert_refused(call(tmp_path, 'sample.py', run, flags), word)
    assert not (tmp_path / 'g.pt').exists()


@pytest.mark.mutation('sample.py', 'require(process.world == 1', 'require(True')
def test_sampling_is_one_process(tmp_path, repo):
    two = common.Process(0, 2, torch.device('cpu'), False)
    with mock.patch.object(common, 'start_process', lambda device: two):
        assert_refused(call(tmp_path, 'sample.py', '--num 1 --steps 1 --res 8', repo=repo),
                       'one process')


@pytest.mark.mutation('sample.py', 'there.stem not in names', 'there.name not in names')
@pytest.mark.mutation('sample.py', '{there, there.parent}', '{there}')
def test_what_is_encoded_is_not_written_over(tmp_path):
    for name in ('out/64x64/000000/0.png', 'out/128/a.obj', 'out/64x64/000000.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    out = tmp_path / 'out'
    for path, name in (('64x64/000000', '000000'), ('128/a.obj', 'a'), ('64x64', '000000')):
        with pytest.raises(ValueError, match='name another --out'):
            sample.refuse_overwriting(out / path, out, [name])
    for path, name in (('64x64/000000.png', '000000_png'), ('a.obj', 'a'), ('../a.obj', 'a')):
        sample.refuse_overwriting(out / path, out, [name])


@pytest.mark.mutation('sample.py', 'factor ** (-k / count)', '1 - (1 - 1 / factor) * k / count')
@pytest.mark.mutation('sample.py', 'max(min(c, 1 - 1 / factor), 1 / factor - 1)', 'c')
def test_a_zoom_grows_evenly_and_stays_inside():
    seen = []
    fake = SimpleNamespace(signal=lambda xi, size, box, antialias: seen.append(box) or [
        torch.zeros(3, *size)])
    list(sample.zoom(fake, None, (2, 3), SimpleNamespace(zoom=(0.97, -0.2, 10.0), antialias=True)))
    boxes = torch.tensor(seen)  # (frames, x and y, (lo, hi))
    lo, hi = boxes.unbind(2)
    size = (hi - lo)[:, 0]
    torch.testing.assert_close(hi - lo, size[:, None].expand(-1, 2))
    torch.testing.assert_close(size.log().diff(), -(math.log(10) / 54 * torch.ones(54)))
    assert (lo.diff(dim=0) >= -1e-6).all() and (hi.diff(dim=0) <= 1e-6).all()
    torch.testing.assert_close(boxes[0], torch.tensor([[-1.0, 1], [-1, 1]]))
    torch.testing.assert_close(boxes[-1], torch.tensor([[0.8, 1], [-0.3, -0.1]]))


@pytest.mark.mutation('sample.py', 'slerp(a, b, weights[k % K])', 'slerp(b, a, weights[k % K])')
@pytest.mark.mutation('sample.py', 'first + k // K + 1]', 'first + 1]')
def test_interpolation_ends_at_the_samples(toy, tmp_path, repo):
    run = f'--run {toy.run} --device cpu --num 3 --seed 2'
    done(tmp_path, 'sample.py', run, '--interpolate 3 --batch 4 --out a', repo=repo)
    done(tmp_path, 'sample.py', run, '--sampler dpmpp --out b', repo=repo)
    a, b = pictures(tmp_path, 'a'), pictures(tmp_path, 'b')
    assert len(a) == 7  # two stretches of three, and the grid
    for between, end in (('000002_000', '000002'), ('000002_002', '000003'),
                         ('000003_000', '000003'), ('000003_002', '000004')):
        assert_alike(a[f'16x16/{between}.png'], b[f'16x16/{end}.png'])


@pytest.mark.mutation('train_ldm.py', 'ddp(z, cond, **drawn)', 'ddp(z, None, **drawn)')
@pytest.mark.mutation('sample.py', 'cond, guidance, sampler', 'None, 1.0, sampler')
@pytest.mark.mutation('train_ldm.py', 'train.labels + held_out.labels', 'train.labels')
def test_class_labels_reach_the_samples(tmp_path, repo):
    """CIFAR-10's labels train their embedding in stage 2, and --label, --guidance use it."""
    place = tmp_path / 'data' / 'cifar10' / 'cifar-10-batches-py'
    place.mkdir(parents=True)
    for name in [f'data_batch_{k}' for k in range(1, 6)] + ['test_batch']:
        pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), 'uint8')
        last = 2 if name == 'test_batch' else 1  # which no training picture has
        (place / name).write_bytes(pickle.dumps(dict(data=pixels, labels=[0, 1, 0, last])))
    done(tmp_path, 'train_vae.py', VAE, '--dataset cifar10 --resolution 8 --fields 1,2 --steps 1',
         repo=repo)
    assert_refused(call(tmp_path, 'train_ldm.py', LDM, '--num_classes 2', repo=repo),
                   'labels up to 2')
    done(tmp_path, 'train_ldm.py', LDM, '--num_classes 3 --lr 1e-2', repo=repo)
    vae, model, _ = ldm.load(tmp_path / 'runs/cifar10')
    torch.manual_seed(0)  # as the script begins
    start, end = ldm.LDM(model.config).unet.label.weight, model.unet.label.weight
    moved = (start - end).abs().amax(1) > 1e-4
    assert moved[:2].all() and not moved[2]  # class 2 has no pictures
    done(tmp_path, 'sample.py', '--label 1 --guidance 200 --num 2 --device cpu', repo=repo)
    z = ldm.generate(vae, model, range(2), torch.full((2,), 1), guidance=200.0)
    expected = data.to_uint8(vae.render(vae.decode(z), (8, 8)))
    for k in range(2):
        assert_alike(pictures(tmp_path)[f'8x8/00000{k}.png'],
                     expected[k].permute(1, 2, 0).numpy().astype(int))
    plain = data.to_uint8(vae.render(vae.decode(ldm.generate(vae, model, range(2))), (8, 8)))
    assert (plain.int() - expected.int()).abs().max() > 2


@pytest.mark.mutation('data.py', 'for i in index if self.stand_in(i) == i]', 'for i in index]')
def test_reconstructions(photos, tmp_path, repo):
    run = f'--run {photos}/runs/photos --device cpu'
    done(tmp_path, 'sample.py', run, f'--reconstruct {photos}/set/3.png --res 24x20 --out a',
         repo=repo)
    a = pictures(tmp_path, 'a')
    assert len(a) == 2 and a['24x20/3_png.png'].shape == (24, 20, 3)
    vae, _ = ldm.load_vae(photos / 'runs/photos/vae.pt')
    x = data.make_dataset('image', photos / 'set/3.png', 'all', resolution=16).picture(0, 16)
    y = data.to_uint8(vae.render(vae.decode(vae.encode(x[None]).mean), (24, 20))[0])
    assert_alike(a['24x20/3_png.png'], y.permute(1, 2, 0).numpy().astype(int))
    folder = Path(shutil.copytree(photos / 'set', tmp_path / 'some'))
    cut = (folder / '5.png').read_bytes()
    (folder / '5.png').write_bytes(cut[:len(cut) // 2])  # a header that opens, pixels that do not
    result = done(tmp_path, 'sample.py', run, f'--reconstruct {folder} --out b', repo=repo)
    assert 'skipped: 5.png' in result.out
    names = {f'16x16/{k}_png.png' for k in range(12) if k != 5}
    assert set(pictures(tmp_path, 'b')) == names | {'grid_16x16.png'}


@pytest.mark.mutation('sample.py', "f'{k:06d}_{n}'", "f'{n}_{k}'")
@pytest.mark.mutation('sample.py', 'or ordered != names:', 'or False:')
@pytest.mark.mutation('sample.py', "'__') or place)", "'__'))")
def test_reconstructions_have_names_of_their_own(tmp_path):
    class Named(data.Items):
        place, bad, notes = tmp_path / 'a clip', [], []

        def __init__(self, names):
            self.names = names

        def verify(self):
            pass
    for names, files in ((['a/b', 'c'], ['a__b', 'c']), ([''], ['a_clip']),
                         (['p1.png', 'p1A.png'], ['000000_p1_png', '000001_p1A_png']),
                         (['a b', 'a_b', 'a_b_1'], ['000000_a_b', '000001_a_b', '000002_a_b_1'])):
        assert sample.encode_items(Named(names), None, None)[0] == files


@pytest.mark.mutation('sample.py', 'zip(z, names)', 'zip(list(z), names)')
@pytest.mark.mutation('data.py', 'common.replace(path, lambda temporary: im.save(temporary, kind,',
                      '(lambda f: f(path))(lambda temporary: im.save(temporary, kind,')
@pytest.mark.mutation('common.py', "message, code = stopped, 130", "message, code = STOPPED, 130")
def test_what_is_written_when_sampling_is_stopped_is_complete(toy, tmp_path, repo):
    """Ctrl-C while the fifth picture is written: batches of two, of ever so many, lie there."""
    calls, save = itertools.count(1), Image.Image.save

    def slow(image, file, *args, **options):
        if next(calls) == 5:
            Path(file).write_bytes(b'half a picture')
            raise KeyboardInterrupt
        save(image, file, *args, **options)
    drawn, generate = [], ldm.generate
    with (mock.patch.object(Image.Image, 'save', slow), mock.patch.object(
            ldm, 'generate', lambda vae, model, seeds, *a, **k: drawn.append(seeds) or generate(
                vae, model, seeds, *a, **k))):
        result = call(tmp_path, 'sample.py', f'--run {toy.run} --device cpu --batch 2 --num 50',
                      repo=repo)
    assert result.code == 130
    last = re.split('[\r\n]', result.err.strip())[-1]
    assert last == 'stopped; every file written so far is complete'
    assert drawn == [[0, 1], [2, 3], [4, 5]]
    found = {p.name: p for p in (tmp_path / 'out' / '16x16').glob('*.png')}
    assert set(found) == {f'{k:06d}.png' for k in range(4)}
    for path in found.values():
        Image.open(path).load()


@pytest.mark.mutation('sample.py', 'note_leftovers(Path(args.out), since)', 'pass')
@pytest.mark.mutation('sample.py', 'any(old) and not all(old)', 'any(old)')
@pytest.mark.mutation('sample.py', 'st_mtime < since', 'st_mtime > 0')
def test_older_pictures_in_out_are_pointed_out(toy, clips, tmp_path, repo):
    def notes(*flags):
        return [s for s in done(tmp_path, 'sample.py', '--device cpu --steps 2', *flags, repo=repo)
                .out.splitlines() if s.startswith('note: ')]

    def age():  # by a minute
        for p in (tmp_path / 'out').rglob('*'):
            os.utime(p, (p.stat().st_atime, p.stat().st_mtime - 60))
    assert notes(f'--run {toy.run} --num 3') == []
    age()
    (tmp_path / 'out' / 'mine').mkdir()
    assert notes(f'--run {toy.run} --num 3 --seed 1 --sweep 16,8') == [
        'note: out/16x16 holds 1 older files, too, which metrics.py would count; remove them or '
        'name another --out']
    age()
    assert notes(f'--run {toy.run} --num 3 --res 8 --seed 1') == []  # all written anew
    shutil.rmtree(tmp_path / 'out')
    assert notes(f'--run {clips.run} --num 1 --frames 6') == []
    age()
    assert '/8x8 holds 2 older files' in notes(f'--run {clips.run} --num 1 --frames 4')[0]


@pytest.mark.mutation('sample.py', "common.try_writing('--out', args.out)", '0')
@pytest.mark.mutation('sample.py', "common.try_checkpoint('--export', args.export)", 'pass')
@pytest.mark.mutation('data.py', "common.try_file('--out', out)", 'pass')
def test_places_are_tried_before_anything_is_made(toy, tmp_path, repo):
    (tmp_path / 'file').touch()
    (tmp_path / 'folder').mkdir()
    with mock.patch.object(ldm, 'generate', lambda *a, **k: pytest.fail('sampled')):
        for flags, words in (('--out file', '--out: nothing can be written in file'),
                             ('--out file/x', '--out: nothing can be written in file/x'),
                             ('--num 1 --export folder', '--export folder: a folder'),
                             ('--num 1 --export file/x', '--export: nothing')):
            assert_refused(call(tmp_path, 'sample.py', f'--run {toy.run} {flags}', repo=repo), words)
    with mock.patch.object(data, 'make_dataset', lambda *a, **k: pytest.fail('read')):
        with contextlib.chdir(tmp_path), mock.patch('sys.argv', [
                'data.py', 'check', 'toy_image', '--out', 'file/x.png']):
            with pytest.raises(ValueError, match='--out: nothing can be written in file'):
                data.main()
    assert {p.name for p in tmp_path.iterdir()} <= {'file', 'folder', 'mutant'}


def spoilt(path, part, name, value, target):
    """A copy of a checkpoint in which state[part][name] is `value`, in one place or everywhere."""
    state = common.load_checkpoint(path)
    weights = state[part][name]
    weights[(0,) * weights.ndim if math.isnan(value) else ...] = value
    common.save_checkpoint(target, state)


@pytest.mark.mutation('common.py', 'require_finite(value, path)', 'pass')
@pytest.mark.mutation('ldm.py', "require_finite(z, 'what the model generates')", 'pass')
@pytest.mark.mutation('data.py', "common.require_finite(x, 'a picture')", 'pass')
def test_a_diverged_model_makes_nothing(toy, tmp_path, repo):
    """Weights with NaN or an infinity are refused as such, what overflows where it comes out."""
    for part, name, value, words in (
            ('ema', 'unet.out.weight', math.nan, 'ldm.pt holds NaN or infinity'),
            ('ema', 'z_std', math.nan, 'ldm.pt holds NaN or infinity'),
            ('vae', 'mlp.out.bias', math.nan, 'ldm.pt holds NaN or infinity'),
            ('ema', 'unet.out.weight', math.inf, 'ldm.pt holds NaN or infinity'),
            ('ema', 'unet.out.weight', 3e38, 'what the model generates holds'),
            ('vae', 'decoder.ups.0.conv.bias', 3e38, 'a picture holds NaN')):
        spoilt(toy.run / 'ldm.pt', part, name, value, tmp_path / 'ldm.pt')
        result = call(tmp_path, 'sample.py', '--run ldm.pt --device cpu --num 2', repo=repo)
        lines = re.split('[\r\n]', result.err.strip())
        assert result.code == 2 and 'Traceback' not in result.err, (part, name, value)
        assert lines[-1].startswith('error: ') and words in lines[-1] and '--lr' in lines[-1]
        assert not [*tmp_path.glob('out/**/*.png')]
    spoilt(toy.run / 'vae.pt', 'vae', 'mlp.out.bias', math.nan, tmp_path / 'runs/nan/vae.pt')
    data.save_png(tmp_path / 'x.png', torch.zeros(3, 16, 16))
    for script, flags in (('sample.py', '--run nan --reconstruct x.png'), ('train_ldm.py', LDM),
                          ('metrics.py', 'psnr nan'), ('train_vae.py', f'{VAE} --init nan')):
        assert_refused(call(tmp_path, script, flags, repo=repo), 'nan/vae.pt holds NaN')


@pytest.mark.mutation('train_ldm.py', "('args', 'vae_args', 'ldm", "('args', 'args', 'ldm")
@pytest.mark.mutation('train_ldm.py', "'vae_args', 'ldm_config')}", "'vae_args')}")
@pytest.mark.mutation('train_ldm.py', 'and os.path.isabs(v)', '')
@pytest.mark.mutation('train_ldm.py', 'v.half() if v', 'v if v')
@pytest.mark.mutation('train_ldm.py', "not in ('opt', 'model')", "not in ('opt',)")
def test_slim_checkpoint_samples_like_the_full_one(toy, copy, repo):
    done(copy, 'train_ldm.py', LDM, '--slim new/small.pt', repo=repo)
    full, small = toy.run / 'ldm.pt', copy / 'new' / 'small.pt'
    state = common.load_checkpoint(full)
    for flags in (state['args'], state['vae_args'], state['ldm_config']):
        flags |= dict(captions=str(copy / 'words.csv'), data='here/data')
    common.save_checkpoint(copy / 'words.pt', state)
    train_ldm.write_slim(copy / 'words.pt', copy / 'words_small.pt')
    state = common.load_checkpoint(copy / 'words_small.pt')
    for flags in (state['args'], state['vae_args'], state['ldm_config']):
        assert (flags['captions'], flags['data']) == ('words.csv', 'here/data')
    assert small.stat().st_size < full.stat().st_size / 4
    state = common.load_checkpoint(small, 'ldm')
    assert {v.dtype for v in state['ema'].values() if v.is_floating_point()} == {torch.float16}
    for path, out in ((full, 'a'), (small, 'b')):
        done(copy, 'sample.py', f'--run {path} --device cpu --num 2 --out {out}')
    for name, picture in pictures(copy, 'a').items():
        assert_alike(picture, pictures(copy, 'b')[name], levels=2)
    shutil.copy(small, copy / 'runs' / 'toy_image' / 'ldm.pt')
    result = call(copy, 'train_ldm.py', LDM)
    assert result.code == 2 and 'slim' in result.err


# ---- shapes ------------------------------------------------------------------------------------

SHAPE = (f'{TINY} --preset shape_small --resolution 8 --ch 8 --ch_mult 1,2 --decoder_mult 2,1 '
         '--fields 1,2 --decoder_ch 8 --field_channels 4 --mlp_width 16 --z_channels 4 '
         '--points 100 --queries 256 --point_hidden 8 --clouds 2 --steps 60 --eval_every 30 '
         '--save_every 30 --lr 1e-2')
THINGS = f'{SHAPE} --dataset shape --data set --flip'
WORDS = (f'{TINY} --ch 16 --ch_mult 1,2 --ema 0.9 --captions captions.csv --text bytes '
         '--text_length 20')


def solid_mesh(seed):
    """(vertices, faces) of a toy solid, coarsely, with a hole in no place."""
    solid = data.toy_shape(seed)
    return inr.extract_mesh(lambda p: torch.from_numpy(-data.toy_distance(
        solid, p.double().numpy())).float(), 24, coarse=24)


@pytest.fixture(scope='module')
def shapes(tmp_path_factory, one_thread):
    """A folder with meshes in two classes, their samples, captions, and a run of both stages."""
    folder = tmp_path_factory.mktemp('shapes')
    rows = ['id,caption']
    for k in range(8):
        name = f'm{k}'
        data.write_mesh(folder / 'raw' / ('a', 'b')[k % 2] / f'{name}.obj', *solid_mesh(k))
        rows.append(f'{name},thing number {k}')
    (folder / 'captions.csv').write_text('\n'.join(rows))
    done(folder, 'data.py', 'mesh raw --out set --points 800 --split 0.25')
    first = done(folder, 'train_vae.py', THINGS, '--name things')
    second = done(folder, 'train_ldm.py', WORDS, '--vae things')
    return SimpleNamespace(folder=folder, run=folder / 'runs' / 'things', printed=(first, second))


def test_shapes_end_to_end(shapes):
    lines = [json.loads(s) for s in (shapes.run / 'log.jsonl').read_text().splitlines()]
    assert [v['step'] for v in lines if 'iou' in v] == [30, 60]
    assert all(0 <= v['iou'] <= 1 for v in lines if 'iou' in v)
    assert {p.name for p in (shapes.run / 'samples').iterdir()} == {
        f'{k}_{n:07d}.png' for k, steps in (('reconstruction', (30, 60)), ('sample', (3, 6)))
        for n in steps}
    first = shapes.printed[0].out.splitlines()[0]
    assert 'shape' in first and "'xz': (4, 4)" in first and 'N_ref 2048' in first
    vae, model, info = ldm.load(shapes.run)
    assert vae.config.domain == 'shape' and vae.config.extent == 0.55
    assert model.config.text == 'bytes' and list(model.config.planes) == ['xy', 'yz', 'xz']


@pytest.mark.mutation('common.py', 'start = step * batch + rank', 'start = rank')
@pytest.mark.mutation('train_ldm.py', "opt.load_state_dict(state['opt'])", 'pass')
def test_shapes_resume_bit_by_bit(shapes, tmp_path, repo):
    """Clouds, queries, flips, captions and the text encoder go on where they were."""
    folder = Path(shutil.copytree(shapes.folder, tmp_path / 'copy'))
    solids, words = f'{THINGS} --steps 6 --save_every 2', f'{WORDS} --vae things'
    done(folder, 'train_vae.py', solids, '--name whole')
    interrupted(folder, 'train_vae.py', f'{solids} --name broken', 5, repo)
    assert_same(folder / 'runs/broken/vae.pt', folder / 'runs/whole/vae.pt')
    interrupted(folder, 'train_ldm.py', f'{words} --name broken', 5, repo)
    assert_same(folder / 'runs/broken/ldm.pt', folder / 'runs/things/ldm.pt')


@pytest.mark.mutation(
    'sample.py',
    'vertices.double().cpu().numpy() * scale + loc',
    'vertices.double().cpu().numpy()')
@pytest.mark.mutation('sample.py', 'function.move(*place)', 'pass')
def test_meshes_out_of_samples_and_reconstructions(shapes, tmp_path, repo):
    """Every format, all resolutions from the same latents, and a mesh back in its own place."""
    run = f'--run {shapes.run} --device cpu --threshold 0.1'
    done(tmp_path, 'sample.py', run, '--num 2 --steps 3 --sweep 12,24 --format ply --turntable',
         repo=repo)
    for size in (12, 24):
        assert Image.open(tmp_path / 'out' / f'grid_{size}.png').size[0] > 256
        assert {p.name for p in (tmp_path / 'out' / str(size)).iterdir()} == {
            '000000.ply', '000001.ply'}
    assert Image.open(tmp_path / 'out' / 'turntable.gif').n_frames == 36
    vertices, faces = data.read_mesh(shapes.folder / 'raw/a/m0.obj')
    moved = vertices * 10 + (100, 0, -50)
    data.write_mesh(tmp_path / 'moved.obj', moved, faces)
    np.savez(tmp_path / 'moved.npz', points=moved)
    model, _ = ldm.load_vae(shapes.run)
    for name in ('moved.obj', 'moved.npz'):
        points, loc, scale = data.unit_cube(data.read_cloud(tmp_path / name, 100))
        points += 0.005 * common.seeded('cloud noise').standard_normal(points.shape)  # as trained
        cloud = torch.from_numpy(points / 0.55).float()[None]
        (expected, _), = model.signal(model.decode(model.encode(cloud).mean), 16, 0.1)
        done(tmp_path, 'sample.py', run, f'--reconstruct {name} --res 16 --out back',
             '--export f.pt', repo=repo)
        assert len(expected) > 10
        found, _ = data.read_mesh(tmp_path / 'back' / '16' / 'moved.obj')
        np.testing.assert_allclose(found, expected.double().numpy() * scale + loc, atol=1e-2)
        assert np.abs(found.mean(0) - (100, 0, -50)).max() < 30
        f = inr.load_function(tmp_path / 'f.pt')  # in the same units as its surface
        np.testing.assert_allclose([*f.centre, f.extent], [*loc, 0.55 * scale], atol=1e-6)


@pytest.mark.mutation('sample.py', '3.0 if args.text else 1.0', '1.0')
@pytest.mark.mutation('sample.py', 'c.text_length)([args.text])', "c.text_length)([''])")
def test_text_reaches_the_shapes(shapes, tmp_path, repo, monkeypatch):
    state = common.load_checkpoint(shapes.run / 'ldm.pt')
    for name in [k for k in state['ema'] if k.endswith(('.proj_out.weight', 'unet.out.weight'))]:
        state['ema'][name] = 0.3 * torch.randn_like(state['ema'][name])  # they start at zero
    common.save_checkpoint(tmp_path / 'ldm.pt', state)
    vae, model, _ = ldm.load(tmp_path / 'ldm.pt')
    made, generate = [], ldm.generate
    monkeypatch.setattr(ldm, 'generate', lambda *a, **k: made.append(generate(*a, **k)) or made[-1])
    done(tmp_path, 'sample.py', '--run ldm.pt --device cpu --steps 3 --num 2 --res 8',
         '--text thing', repo=repo)
    tokens = model.text.tokenise(['thing'] * 2)
    expected = generate(vae, model, range(2), tokens, 3.0, steps=3)
    torch.testing.assert_close(made[0][0], expected)
    for text, w in (('thing', 1.0), ('', 3.0)):
        other = generate(vae, model, range(2), model.text.tokenise([text] * 2), w, steps=3)
        assert (other - expected).abs().max() > 1e-3


def test_metrics_of_shapes(shapes, tmp_path):
    flags = f'{shapes.run} --device cpu'
    out = done(shapes.folder, 'metrics.py', 'iou', flags).out.splitlines()
    result, held_out = json.loads(out[-1]), data.make_dataset('shape', shapes.folder / 'set', 'test')
    model, _ = ldm.load_vae(shapes.run)
    own = []
    for i in range(len(held_out)):
        cloud = data.open_run_data(ldm.load_vae(shapes.run)[1], 'test', shapes.folder / 'set')
        xi = model.decode(model.encode(cloud.view(i, 0)['points'][None]).mean)
        points, inside = held_out.truth(i)
        predicted = model.query(xi, points)[0, :, 0] > 0
        own.append(((predicted & inside).sum() / max((predicted | inside).sum(), 1)).item())
    assert result['iou'] == pytest.approx(np.mean(own), abs=1e-6) and len(own) == result['n']
    for fakes in ('samples', 'train', 'reconstructions'):
        how = '--res 12 --sampler dpmpp:2 --threshold 0.1' if fakes != 'train' else ''
        out = done(shapes.folder, 'metrics.py', 'shapes', flags, f'--fakes {fakes} --points 50',
                   how).out.splitlines()
        rows = [json.loads(s) for s in out if s.startswith('{')]
        assert [(r['radius'], r['squared']) for r in rows] == list(
            itertools.product((1, 0.5), (True, False)))
        kind = dict(train='data').get(fakes, fakes)
        assert all(r['fake']['kind'] == kind and r['mmd'] > 0 for r in rows)
        assert rows[0]['fake'].get('split') == dict(train='train', reconstructions='test').get(fakes)
        assert rows[0]['fake']['threshold'] == (0.1 if how else model.config.threshold)
    same = done(shapes.folder, 'metrics.py', 'shapes raw/a raw/a --points 40').out.splitlines()
    assert json.loads(same[1])['mmd'] > 0 and json.loads(same[1])['cov'] == 1
    few = json.loads(done(shapes.folder, 'metrics.py', 'shapes raw raw --num 3 --points 30').out
                     .splitlines()[1])
    assert few['real']['found'] == 8 and few['n_ref'] == 3 and few['seed'] == 0
    for wrong in ('raw/a raw/b --fakes train', f'{shapes.run} raw/a --fakes reconstructions',
                  f'{shapes.run} --fakes train --split train'):
        assert_refused(call(shapes.folder, 'metrics.py', 'shapes', wrong), '--')
    nothing = done(shapes.folder, 'metrics.py', 'shapes', flags, '--res 8 --sampler dpmpp:1 --points 20',
                   '--threshold 0.999').out.splitlines()  # no sample has a surface
    assert json.loads(nothing[-1])['empty'] == json.loads(nothing[-1])['n_fake'] > 0
    done(shapes.folder, 'metrics.py', 'classifier', flags, '--steps 3 --classifier c.pt')
    state = common.load_checkpoint(shapes.run / 'vae.pt')  # says which class is which
    saved = torch.load(shapes.folder / 'c.pt', weights_only=True)
    assert saved['classes'] == ['a', 'b'] and state['args']['dataset'] == 'shape'
    for answer in (0, 1):  # a classifier that always gives this class
        saved['model']['projection.7.weight'].zero_()
        saved['model']['projection.7.bias'].copy_(torch.tensor([1.0 - answer, answer]))
        torch.save(saved, shapes.folder / 'c.pt')
        row = json.loads(done(shapes.folder, 'metrics.py', 'text', flags, '--each 2 --sampler dpmpp:2',
                              '--res 8 --classifier c.pt').out.splitlines()[-1])
        truth = 100 * np.mean([label == answer for label in held_out.labels])
        assert row['accuracy'] == pytest.approx(truth) and row['captions'] == len(held_out)
        assert row['clip_s'] is None and 0 <= row['tmd'] <= 1
        assert (row['nfe'], row['forwards'], row['guidance']) == (2, 4, 3)
    torch.save(dict(saved, classes=['c', 'd']), shapes.folder / 'c.pt')
    assert_refused(call(shapes.folder, 'metrics.py', 'text', flags, '--classifier c.pt'),
                   'does not know the class')
    for command in ('fid', 'psnr'):
        assert_refused(call(shapes.folder, 'metrics.py', command, flags), 'has no pictures',
                       'nfe, iou, shapes, classifier, text')
    moved = shapes.folder / 'moved'
    (shapes.folder / 'set').rename(moved)
    assert_refused(call(shapes.folder, 'metrics.py', 'iou', flags), 'are gone')
    again = done(shapes.folder, 'metrics.py', 'iou', flags, '--data moved').out.splitlines()
    moved.rename(shapes.folder / 'set')
    assert json.loads(again[-1]) == result


@pytest.mark.mutation('metrics.py', 'if self.captioned() else', 'if True else')
@pytest.mark.mutation('metrics.py', '(self.args.captions or None)', 'None')
@pytest.mark.mutation('metrics.py', "are read\n    resolved('--captions', args.captions)\n",
                      'are read\n')
def test_captions_that_have_moved(shapes, tmp_path, repo):
    """What reads none does without them; the rest is told where they are."""
    folder, flags = Path(shutil.copytree(shapes.folder, tmp_path / 'copy')), '--device cpu'
    state = common.load_checkpoint(folder / 'runs' / 'things' / 'ldm.pt')
    state['args']['captions'] = str(folder / 'gone.csv')
    common.save_checkpoint(folder / 'runs' / 'things' / 'ldm.pt', state)
    text = f'text things {flags} --each 2 --sampler dpmpp:2 --res 8 --num 1'
    done(folder, 'metrics.py', f'shapes things {flags} --res 8 --sampler dpmpp:1 --points 9',
         repo=repo)
    assert_refused(call(folder, 'metrics.py', text, repo=repo), '--captions', 'gone.csv')
    row = json.loads(done(folder, 'metrics.py', text, '--captions captions.csv', repo=repo)
                     .out.splitlines()[-1])
    assert row['captions'] == 1 and 0 <= row['tmd'] <= 1
    with mock.patch.object(data, 'make_dataset', lambda *args, **more: pytest.fail('read')):
        assert_refused(call(folder, 'metrics.py', text, '--captions none.csv', repo=repo),
                       '--captions none.csv')


# ---- videos --------------------------------------------------------------------------------------

CLIPS = (f'{TINY} --resolution 8 --frames 5 --pixels 60 --patch 2 --vit_width 16 --vit_depth 1 '
         '--vit_heads 1 --plane_depth 1 --plane_hidden 16 --decoder_ch 8 --field_channels 4 '
         '--mlp_width 16 --z_channels 4 --dataset video --data set --flip')


@pytest.fixture(scope='module')
def clips(tmp_path_factory, one_thread):
    """A folder with videos of 5 to 12 frames, and a run of both stages on them."""
    folder = tmp_path_factory.mktemp('clips')
    for k in range(8):
        film = data.toy_video([k], (12, 10 + k), np.linspace(-1, 1, 5 + k))[0]
        data.save_animation(folder / 'set' / f'{k}.webp', data.to_uint8(film).unbind(1))
    done(folder, 'train_vae.py', CLIPS, '--name films')
    done(folder, 'train_ldm.py', LDM, '--vae films')
    return SimpleNamespace(folder=folder, run=folder / 'runs' / 'films')


@pytest.mark.mutation('vae.py', "domain, reads = 'video', 'video'", "domain, reads = 'video', 'image'")
@pytest.mark.mutation('sample.py', 'eight, within(256, h, w), mode', 'eight, (h, w), mode')
def test_videos_end_to_end(clips, tmp_path, repo):
    """Training, resuming, samples longer and larger than it, reconstructions, PSNR."""
    folder = Path(shutil.copytree(clips.folder, tmp_path / 'copy'))
    try:
        interrupted(folder, 'train_vae.py', f'{CLIPS} --name broken', 5, repo)
        done(tmp_path, 'sample.py', f'--run {clips.run} --num 2 --steps 2 --sweep 8,12x10,4x300 '
             '--frames 7 --slow 2 --animation png', repo=repo)
        done(tmp_path, 'sample.py', f'--run {clips.run} --reconstruct {clips.folder}/set --res 16 '
             '--out back', repo=repo)
    except ScriptCrashed as error:
        pytest.fail(str(error))
    assert_same(folder / 'runs/broken/vae.pt', clips.run / 'vae.pt')
    for size in ('8x8', '12x10'):
        assert len([*(tmp_path / 'out' / size / '000001').iterdir()]) == 14
        assert (tmp_path / 'out' / size / '000001.png').is_file()
    assert Image.open(tmp_path / 'out/grid_4x300.png').size == (8 * 258 + 2, 2 * 5 + 2)
    with Image.open(tmp_path / 'out/grid_8x8.png') as grid:
        frame = np.asarray(Image.open(tmp_path / 'out/8x8/000001/00007.png'))  # the fifth of eight
        assert (np.asarray(grid)[12:20, 42:50] == frame).all()
    assert {p.name for p in (tmp_path / 'back' / '16x16').iterdir() if p.is_dir()} == {
        f'{k}_webp' for k in range(8)}
    with contextlib.chdir(clips.folder), contextlib.redirect_stdout(io.StringIO()) as out:
        metrics.main(['psnr', str(clips.run)])
    found = json.loads(out.getvalue().splitlines()[-1])
    lines = map(json.loads, (clips.run / 'log.jsonl').read_text().splitlines())
    last = [v['psnr_8'] for v in lines if 'psnr_8' in v][-1]
    assert found['psnr'] == pytest.approx(last, abs=1e-3)


# ---- radiance fields -----------------------------------------------------------------------------

SCENES = (f'{TINY} --preset toy_nerf --dataset nerf --data set --split 0.34 --flip --resolution 8 '
          '--side 12 --ch 8 --decoder_ch 8 --field_channels 4 --mlp_width 8 --colour_width 8 '
          '--z_channels 4 --points 60 --point_hidden 8 --point_blocks 2 --point_channels 8 '
          '--rays 40 --ray_samples 8 --ray_views 2')


@pytest.fixture(scope='module')
def scenes(tmp_path_factory, one_thread):
    """A folder with posed pictures of six toy scenes, and a run of both stages on them."""
    folder = tmp_path_factory.mktemp('scenes')
    with mock.patch.object(data, 'TOY_RENDERS', folder / 'renders'):
        toys = data.make_dataset('toy_nerf', side=12, toy_views=6)
        for k in range(6):
            for part in ('rgb', 'pose'):
                (folder / 'set' / f's{k}' / part).mkdir(parents=True)
            for v, pose in enumerate(toys.cameras(k).poses):
                Image.fromarray(toys.shot(k, v)[..., :3]).save(folder / f'set/s{k}/rgb/{v}.png')
                pose[:3, 3] = 0.5 * pose[:3, 3] + (3, 0, 1)  # of another box than [-1, 1]
                np.savetxt(folder / f'set/s{k}/pose/{v}.txt', pose)
            focal = data.toy_lens(12)[0]
            (folder / f'set/s{k}/intrinsics.txt').write_text(f'{focal} 6 6 0\n12 12\n')
    done(folder, 'train_vae.py', SCENES, '--name fields')
    done(folder, 'train_ldm.py', LDM, '--vae fields')
    return SimpleNamespace(folder=folder, run=folder / 'runs' / 'fields')


@pytest.mark.mutation('data.py', "return dict(box=(*info['vae_config']", "return dict() and dict("
                      "box=(*info['vae_config']")
@pytest.mark.mutation('inr.py', 'number = torch.arange(rays_d.shape[1] * count, device=rays_d.device)',
                      'number = torch.randint(2 ** 30, (rays_d.shape[1] * count,))')
def test_fields_resume_bit_by_bit(scenes, tmp_path, repo):
    folder = Path(shutil.copytree(scenes.folder, tmp_path / 'copy'))
    interrupted(folder, 'train_vae.py', f'{SCENES} --name broken', 5, repo)
    assert_same(folder / 'runs/broken/vae.pt', scenes.run / 'vae.pt')
    with mock.patch.object(data, 'common_ball', lambda many: (np.zeros(3), 9.0)):
        done(folder, 'train_ldm.py', LDM, '--vae broken', repo=repo)  # in the box of stage 1, found no other
    assert_same(folder / 'runs/broken/ldm.pt', scenes.run / 'ldm.pt')


@pytest.mark.mutation('train_vae.py', '**train.settles()', "domain='nerf', channels=4")
def test_fields_know_the_box_of_their_scenes(scenes, tmp_path, repo):
    done(scenes.folder, 'train_vae.py', SCENES, f'--name box{repo == ROOT} --steps 2', repo=repo)
    config = ldm.load_vae(scenes.folder / f'runs/box{repo == ROOT}')[0].config
    np.testing.assert_allclose(config.centre, (3, 0, 1), atol=1e-3)
    assert config.extent == pytest.approx(2 * math.sin(math.radians(18)), abs=1e-3)
    assert config.up == 'y' and config.side == 12


@pytest.mark.mutation('sample.py', 'args.azimuth + 360 * k / count', 'args.azimuth')
@pytest.mark.mutation('sample.py', 'places[:, :3, 3] = vae.in_data(places[:, :3, 3])', 'pass')
@pytest.mark.mutation('sample.py', 'depth=depth * c.extent', 'depth=depth')
@pytest.mark.mutation('sample.py', "mode='area'))", "mode='area').mT)")
@pytest.mark.mutation('sample.py', 'return max(1, round(h * shrink))', 'return round(h * shrink)')
@pytest.mark.mutation('sample.py', 'in enumerate(zip(rgb, near[:, None], opacity',
                      'in enumerate(zip(rgb, opacity[:, None], opacity')
@pytest.mark.mutation('sample.py', 'render_views(xi, [pose], size', 'render_views(xi, [pose], (9, 9)')
def test_fields_are_seen_from_anywhere(scenes, tmp_path, repo):
    """Views, their maps and cameras, a turntable, a coloured mesh and a function of one sample."""
    flags = ('--num 2 --steps 2 --sweep 8x10,6,1x400 --views 3 --elevation 35 --azimuth 10 --fov 50 '
             '--distance 3 --turntable --mesh 8 --level 0.5')
    done(tmp_path, 'sample.py', f'--run {scenes.run} {flags}', repo=repo)
    done(tmp_path, 'sample.py', f'--run {scenes.run} --num 1 --steps 2 --export f.pt --out one '
         '--views 1', repo=repo)
    f, (vae, model, _) = inr.load_function(tmp_path / 'f.pt'), ldm.load(scenes.run)
    xi = vae.decode(ldm.generate(vae, model, [0], steps=2))
    kept = np.load(tmp_path / 'out/8x10/000000/views.npz')
    o, d = (torch.stack(r) for r in zip(*(
        inr.camera_rays(pose, float(kept['focal']), (8, 10)) for pose in kept['poses'])))
    seen = vae.render_pictures(xi, vae.in_box(o)[None], d[None])
    np.testing.assert_allclose(kept['depth'], seen['depth'][0] * f.extent, atol=1e-4)
    np.testing.assert_allclose(kept['opacity'], seen['opacity'][0], atol=1e-4)
    assert len({*map(tuple, kept['poses'][:, :3, 3])}) == 3
    np.testing.assert_allclose(kept['poses'][:, 1, 3],
                               3 * f.extent * math.sin(math.radians(35)), atol=1e-4)
    for kind, x in (('', seen['rgb'][0, 1]), ('_opacity', seen['opacity'][0, 1]),
                    ('_depth', seen['opacity'][0, 1] * (
                        0.5 - (seen['depth'][0, 1] - 3) / math.sqrt(12)))):
        shown = np.asarray(Image.open(tmp_path / f'out/8x10{kind}/000000/01.png')) / 255
        np.testing.assert_allclose(shown, x.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1),
                                   atol=4e-3)
    assert Image.open(tmp_path / 'out/grid_6x6.png').size == (3 * 8 + 2, 2 * 8 + 2)
    assert Image.open(tmp_path / 'out/grid_1x400.png').size == (3 * 130 + 2, 2 * 3 + 2)
    with Image.open(tmp_path / 'out/turntable.gif') as film:
        assert film.n_frames == 36 and film.size == (26, 12)
    assert f(torch.zeros(5, 3), dirs=torch.tensor([0.0, 0, 1])).shape == (5, 4)
    header = (tmp_path / 'out/000001.ply').read_bytes().split(b'end_header')[0]
    assert b'property uchar blue' in header
    assert len(data.read_mesh(tmp_path / 'out/000001.ply')[1]) > 0


@pytest.mark.mutation('sample.py', "options['box'] = (*vae.config.centre, vae.config.extent)", '')
@pytest.mark.mutation('sample.py', "options['toy_views'] = data.NerfConfig.toy_views", '')
@pytest.mark.mutation('sample.py', 'if name not in encoded', '')
@pytest.mark.mutation('sample.py', 'if name in encoded', 'if False')
def test_scenes_are_reconstructed_in_the_box_of_the_run(scenes, tmp_path, repo):
    shutil.copytree(scenes.folder / 'set/s0', tmp_path / 'more/s0')
    lens = tmp_path / 'more/s0/intrinsics.txt'
    lens.write_text(f'{2 * float(lens.read_text().split()[0])} 6 6 0\n12 12\n')  # they see less
    made, find_box, hull, load = [], data.FileScenes.find_box, data.FileScenes.hull, ldm.load_vae

    def of_toys(*args):  # with as many views as its flags say
        vae, info = load(*args)
        info['args']['toy_views'] = 9
        return vae, info
    with (mock.patch.object(data.FileScenes, 'find_box', lambda *args: made.append(
            find_box(*args)) or made[-1]), mock.patch.object(ldm, 'load_vae', of_toys),
          mock.patch.object(data.FileScenes, 'hull', lambda *args: dict(hull(*args), share=0.2))):
        out = done(tmp_path, 'sample.py', f'--run {scenes.run} --reconstruct more --res 8 '
                   '--views 2', repo=repo).out
    assert 'note: s0: no place of the box is in more than 20%' in out and 'skipped' not in out
    config = ldm.load_vae(scenes.run)[0].config
    assert made == [(tuple(config.centre), config.extent, 'y')]
    assert (tmp_path / 'out/8x8/s0/01.png').is_file()


@pytest.mark.mutation('data.py', 'self.toy_views == NerfConfig.toy_views', 'True')
def test_misuse_of_fields_is_one_line(scenes):
    run = f'--run {scenes.run} --num 1 --steps 2'
    (scenes.folder / 'nothing').mkdir()
    for script, flags, *words in (
            ('sample.py', f'{run} --fov 180', '--fov 180'),
            ('sample.py', f'{run} --views 0', '--views'),
            ('sample.py', f'{run} --elevation 91', '--elevation 91'),
            ('sample.py', f'{run} --level 3', '--level', '--mesh'),
            ('sample.py', f'{run} --zoom 0,0,2', '--zoom', 'radiance fields'),
            ('sample.py', f'--run {scenes.run} --reconstruct nowhere', 'nowhere: no such'),
            ('sample.py', f'--run {scenes.run} --reconstruct nothing', 'no scenes'),
            ('metrics.py', f'spectrum {scenes.run}', 'no pictures to measure', 'fid, rfid, nfe, pr'),
            ('train_vae.py', f'{SCENES} --name new --box 1,2', '--box'),
            ('train_vae.py', f'{SCENES} --name new --axes opengl', '--axes'),
            ('train_vae.py', f'{SCENES} --name new --toy_views 9', '--toy_views'),
            ('train_vae.py', f'{SCENES} --name new --focus 2', '--focus'),
            ('train_vae.py', f'{SCENES} --name new --near 0.5', '--near'),
            ('train_vae.py', f'{SCENES} --name new --threshold 0.2', '--threshold'),
            ('train_vae.py', f'{SCENES} --name new --data nothing', 'no scenes'),
            ('train_vae.py', f'{SCENES} --name new --dataset toy_nerf --data= --box 1', '--box'),
            ('train_vae.py', f'{SCENES} --name new --scale_injection', '--scale_injection')):
        assert_refused(call(scenes.folder, script, flags), *words)
    assert not (scenes.folder / 'runs/new').exists() and not (scenes.folder / 'out').exists()


class MeanColour(torch.nn.Module):
    """In the place of Inception: the mean colour."""
    dim, source = 3, dict(kind='inception', weights='w', sha256='s', publisher='p')

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x.float().mean((2, 3))


def measured(folder, *argv):
    """The JSON line that metrics.py prints in a folder."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        metrics.main([*map(str, argv), '--device', 'cpu'])
    return json.loads(out.getvalue().splitlines()[-1])


@pytest.mark.mutation('metrics.py', "covered_{k}': psnr_each(v, x, where)",
                      "covered_{k}': psnr_each(v, x)")
@pytest.mark.mutation('metrics.py', 'return quantise(dataset.truth(i, self.R)[0])',
                      'return quantise(dataset.truth(i, self.R)[0][:1])')
def test_metrics_of_fields(scenes):
    """Held-out views, all of them and where they are covered, are as in training; FID of renders."""
    found = measured(scenes.folder, 'psnr', scenes.run)
    lines = map(json.loads, (scenes.run / 'log.jsonl').read_text().splitlines())
    last = [v['covered_psnr_12'] for v in lines if 'covered_psnr_12' in v][-1]
    assert found['covered_psnr'] == pytest.approx(last, abs=1e-3)
    _, info = ldm.load_vae(scenes.run)
    held_out = data.open_run_data(info, 'test', scenes.folder / 'set')
    errors = [((1 - pictures[v]) / 2)[:, covered[v]] for pictures, covered in
              (held_out.truth(i, 12) for i in range(len(held_out))) for v in range(2)]
    assert found['n'] == len(errors)
    white = -10 * np.log10([e.square().mean().item() for e in errors])
    assert found['covered_white_picture'] == pytest.approx(white.mean(), abs=1e-3)
    with mock.patch.object(metrics, 'load_network', lambda kind, path: MeanColour()):
        fid = measured(scenes.folder, 'fid', scenes.run, '--num', 3, '--samplers', 'dpmpp:2')
    assert (fid['n_real'], fid['n_fake'], fid['real']['resolution']) == (
        2 * len(info['splits']['train']), 6, 12)


def test_metrics_of_two_processes_are_those_of_one(toy, shapes, tmp_path):
    """What runs make is shared out; line for line the manifests are the same."""
    solid = [shapes.run, '--device', 'cpu']
    jobs = [['shapes', *solid, *'--res 12 --points 50 --sampler dpmpp:2 --batch 1 --threshold 0.1'.split()],
            ['shapes', *solid, *'--fakes reconstructions --res 12 --points 50 --threshold 0.1'.split()],
            ['iou', *solid], ['text', *solid, *'--each 2 --sampler dpmpp:2 --res 8'.split()],
            ['psnr', toy.run, *'--device cpu --batch 2 --num 5'.split()],
            ['nfe', toy.run, *'--device cpu --num 3 --batch 2 --samplers rk45:1e-1'.split()]]
    jobs = [['metrics', *map(str, job)] for job in jobs]
    with two_processes(shapes.folder, jobs, tmp_path, ROOT) as printed:
        alone = [line for script, *job in jobs
                 for line in done(shapes.folder, f'{script}.py', *job).out.splitlines()]
    assert [s for s in printed if s.startswith('{')] == [s for s in alone if s.startswith('{')]


# ---- misuse ------------------------------------------------------------------------------------

def assert_refused(result, *words):
    assert result.code == 2, result.err[-2000:]
    assert result.err.startswith('error: ') and result.err.count('\n') == 1, result.err[-2000:]
    assert all(w in result.err for w in words), result.err


@pytest.fixture(scope='module')
def broken(toy, tmp_path_factory):
    """The toy folder and, beside it, every kind of file that is not what it should be."""
    folder = Path(shutil.copytree(toy.folder, tmp_path_factory.mktemp('broken') / 'copy'))
    (folder / 'empty').mkdir()
    for side in ('train', 'test'):
        data.save_png(folder / 'afhq' / side / 'cat' / '0.png', torch.zeros(3, 16, 16))
    (folder / 'notes').mkdir()
    (folder / 'notes' / 'a.txt').write_text('no picture')
    for name in ('tiny.png', 'other.png'):
        (folder / 'notes' / name).write_bytes(b'')
    for name, file in (('cut1', 'vae.pt'), ('cut2', 'ldm.pt')):
        (folder / 'runs' / name).mkdir()
        whole = (toy.run / file).read_bytes()
        (folder / 'runs' / name / file).write_bytes(whole[:len(whole) // 3])
    (folder / 'runs' / 'first').mkdir()
    shutil.copy(toy.run / 'vae.pt', folder / 'runs' / 'first')
    torch.save(dict(weights=torch.zeros(3)), folder / 'foreign.pt')
    torch.save(dict(kind='function', about=dict(read_out={}), mlp={}, xi=[]),
               folder / 'function.pt')
    data.save_png(folder / 'photo.png', torch.zeros(3, 16, 16))
    os.utime(toy.run / 'vae.pt')
    return folder


NEW = f'{VAE} --name new'
TOY = f'{LDM} --vae toy_image'
MISUSE = [
    ('train_vae.py', f'{NEW} --dataset image --data nowhere', 'nowhere', '--data'),
    ('train_vae.py', f'{NEW} --dataset image --data empty', 'empty', '--data'),
    ('train_vae.py', f'{NEW} --dataset image --data notes', 'notes', 'tiny.png'),
    ('train_vae.py', f'{NEW} --dataset image', 'data/image'),
    ('train_vae.py', f'{NEW} --preset toy_image --dataset afhq_dog', 'data/afhq_dog',
     '--data PATH'),
    ('train_vae.py', f'{NEW} --dataset nonsense', '--dataset', 'nonsense', 'toy_image'),
    ('train_vae.py', f'{NEW} --preset nonsense', '--preset', 'nonsense', 'image_64'),
    ('train_vae.py', f'{NEW} --data empty', '--data', '--dataset'),
    ('train_vae.py', f'{NEW} --nonsense 3', '--nonsense'),
    ('train_vae.py', f'{NEW} --micro_batch x', '--micro_batch', 'int'),
    ('train_vae.py', f'{NEW} --batch 0', '--batch'),
    ('train_vae.py', f'{NEW} --batch x', '--batch', 'int'),
    ('train_vae.py', f'{NEW} --lr 0', '--lr'),
    ('train_vae.py', f'{NEW} --lr nan', '--lr'),
    ('train_vae.py', f'{NEW} --beta2 1.5', '--beta2 1.5'),
    ('train_vae.py', f'{NEW} --device meta', '--device meta'),
    ('train_vae.py', f'{NEW} --dataset toy_video --vit_width 4', '--vit_width'),
    ('train_vae.py', f'{NEW} --name toy_image/vae.pt/new', '--name', 'nothing can be written'),
    ('train_ldm.py', f'{LDM} --vae toy_image --name toy_image/vae.pt/new', 'nothing can be'),
    ('train_ldm.py', '--vae toy_image --name new --mixing_init nan', '--mixing_init'),
    ('train_vae.py', '--flip toy_image', 'toy_image', '--FLAG=on'),
    ('sample.py', '--run toy_image --zoom -0.3,0.2,16', '--zoom', '--FLAG=-1,1'),
    ('metrics.py', 'fid', 'required'),
    ('data.py', 'check notes --data empty', '--data empty', 'path'),
    ('train_vae.py', f'{NEW} --steps 0', '--steps'),
    ('train_vae.py', f'{NEW} --seed -1', '--seed'),
    ('train_vae.py', f'{NEW} --resolution 2', '--resolution'),
    ('train_vae.py', f'{NEW} --resolution 4 --ch_mult 1,1,1,1', '--resolution 4'),
    ('train_vae.py', f'{NEW} --ch_mult=', '--ch_mult'),
    ('train_vae.py', f'{NEW} --ch_mult 1,a', '--ch_mult'),
    ('train_vae.py', f'{NEW} --anneal 0', '--anneal'),
    ('train_vae.py', f'{NEW} --anneal 1.5', '--anneal', 'at most 1'),
    ('train_vae.py', f'{NEW} --device nonsense', '--device nonsense'),
    ('train_vae.py', f'{NEW} --init foreign.pt', 'foreign.pt', 'not a checkpoint of this'),
    ('train_vae.py', f'{NEW} --init nowhere.pt', 'nowhere.pt'),
    ('train_vae.py', f'{NEW} --init function.pt', 'a function checkpoint where vae is needed'),
    ('metrics.py', 'psnr function.pt', 'a function checkpoint where vae is needed'),
    ('train_vae.py', f'{NEW} --z_channels 8 --init runs/toy_image/vae.pt', 'does not fit'),
    ('train_vae.py', f'{VAE} --lr 0.25', '--lr', 'now 0.25', '--restart'),
    ('train_vae.py', f'{VAE} --batch 8 --ch 16', '--batch 4 (now 8)', '--ch 8 (now 16)'),
    ('train_vae.py', f'{VAE} --name cut1', 'cut1/vae.pt', 'truncated'),
    ('train_vae.py', f'{NEW} --scales 1,inf', '--scales'),
    ('train_vae.py', f'{NEW} --dataset afhq_cat --data afhq --group x', '--group x'),
    ('metrics.py', 'psnr toy_image --device nonsense', '--device nonsense'),
    ('metrics.py', 'iou toy_image', 'has no clouds'),
    ('metrics.py', 'shapes nowhere', 'not a run'),
    ('metrics.py', 'shapes toy_image --threshold 1', '--threshold'),
    ('train_vae.py', f'{NEW} --point_hidden 8', '--point_hidden'),
    ('train_vae.py', f'{NEW} --points 8', '--points', 'pictures, which have no such flag'),
    ('train_vae.py', f'{SHAPE} --name new --dataset shape', 'data/shape', 'data.py mesh'),
    ('train_vae.py', f'{SHAPE} --name new --dataset shape --data empty', 'CLASS/ID'),
    ('train_vae.py', f'{SHAPE} --name new --dataset toy_shape --captions a', '--captions'),
    ('train_vae.py', f'{SHAPE} --name new --dataset toy_shape --scales 1,2', '--scales'),
    ('train_vae.py', f'{SHAPE} --name new --dataset toy_shape --loss l1', '--loss l1', 'bce'),
    ('train_vae.py', f'{SHAPE} --name new --dataset toy_shape --near 2', '--near 2'),
    ('train_ldm.py', f'{TOY} --posterior mean --target expected', '--target expected'),
    ('train_ldm.py', f'{TOY} --name new --text bytes', 'no captions', 'leave it out'),
    ('train_ldm.py', f'{TOY} --name new --captions a.csv', '--captions'),
    ('train_ldm.py', f'{TOY} --name new --text nowhere', 'nowhere', 'bytes'),
    ('train_ldm.py', f'{TOY} --lr 0.25', 'now 0.25'),
    ('train_ldm.py', f'{LDM} --vae nowhere', 'nowhere'),
    ('train_ldm.py', f'{LDM} --vae cut1', 'cut1/vae.pt', 'truncated'),
    ('train_ldm.py', f'{LDM} --vae foreign.pt', 'foreign.pt'),
    ('train_ldm.py', f'{TOY} --name cut2', 'cut2/ldm.pt', 'truncated'),
    ('train_ldm.py', f'{TOY} --name new --preset nonsense', 'nonsense', 'image_64'),
    ('train_ldm.py', f'{TOY} --name new --num_classes 3', '--num_classes 3', 'no labels'),
    ('train_ldm.py', f'{TOY} --name new --ema 1', '--ema'),
    ('train_ldm.py', f'{TOY} --name new --cond_dropout 1.5', '--cond_dropout', 'at most 1'),
    ('train_ldm.py', f'{LDM} --vae runs/toy_image/ldm.pt', 'another file', '--vae toy_image'),
    ('train_ldm.py', f'{TOY} --name new --cache nonsense', '--cache'),
    ('train_ldm.py', f'{TOY} --name new --init runs/toy_image/vae.pt', 'ldm is needed'),
    ('train_ldm.py', f'{LDM} --vae first --slim small.pt', 'first/ldm.pt'),
    ('sample.py', '--run first', 'stage 1 only', 'python train_ldm.py --vae'),
    ('sample.py', '--run runs/first/vae.pt', 'stage 1 only'),
    ('sample.py', '--run cut2', 'truncated'),
    ('sample.py', '--run foreign.pt', 'foreign.pt'),
    ('sample.py', '--run photo.png', 'not a checkpoint', 'name another'),
    ('sample.py', '--run toy_image --num 1000000000', '--num 1000000000', '1,000,000'),
    ('sample.py', '--run toy_image --num 2 --interpolate 100000000', '--num', '1,000,000'),
    ('sample.py', '--run toy_image --seed 100000000000000000000', '--seed'),
    ('sample.py', '--run toy_image --sampler rk45 --tol 1e-9', '--tol', 'at least 2e-06'),
    ('sample.py', '--run toy_image --tol 1e-3', '--tol 0.001: for rk45 alone'),
    ('sample.py', '--run toy_image --sampler rk45 --steps 9', '--steps 9: rk45 takes as many'),
    ('sample.py', '--run toy_image --reconstruct photo.png --sampler ddim --amp',
     'leave --sampler, --amp out'),
    ('sample.py', '--run toy_image --reconstruct photo.png --eta 0', 'leave --eta out'),
    ('sample.py', '--run toy_image --reconstruct photo.png --num 4 --seed 1 --batch 2',
     'leave --num, --seed, --batch out'),
    ('sample.py', '--run toy_image --guidance nan --text x', '--guidance'),
    ('train_vae.py', f'{NEW} --seed 100000000000000000000', '--seed'),
    ('sample.py', '--run nowhere', 'nowhere'),
    ('sample.py', '--run toy_image --res 12y', '12y', '256x384'),
    ('sample.py', '--run toy_image --res 0', '--res'),
    ('sample.py', '--run toy_image --res 16x99999', '65535'),
    ('sample.py', '--run toy_image --res 16 --sweep 32', '--res', '--sweep'),
    ('sample.py', '--run toy_image --box=0,1', '--box'),
    ('sample.py', '--run toy_image --box=1,0,0,1', '--box'),
    ('sample.py', '--run toy_image --box=-2,0,0,1', '--box'),
    ('sample.py', '--run toy_image --label 1', '--label 1', '0 classes'),
    ('sample.py', '--run toy_image --guidance 2', '--guidance'),
    ('sample.py', '--run toy_image --text chair', 'reads no text'),
    ('sample.py', '--run toy_image --turntable', '--turntable', 'pictures'),
    ('sample.py', '--run toy_image --format stl', '--format', 'surfaces'),
    ('sample.py', '--run toy_image --threshold 0.3', '--threshold', 'surfaces'),
    ('sample.py', '--run toy_image --reader x', '--reader'),
    ('sample.py', '--run toy_image --reconstruct empty --label 1', '--reconstruct', '--label'),
    ('sample.py', '--run toy_image --steps 0', '--steps'),
    ('sample.py', '--run toy_image --steps 1001', '1000'),
    ('sample.py', '--run toy_image --num 0', '--num'),
    ('sample.py', '--run toy_image --batch 0', '--batch'),
    ('sample.py', '--run toy_image --seed -3', '--seed'),
    ('sample.py', '--run toy_image --sampler nonsense', '--sampler'),
    ('sample.py', '--run toy_image --sampler rk45 --tol 0', '--tol'),
    ('sample.py', '--run toy_image --interpolate 3 --num 1', '--interpolate'),
    ('sample.py', '--run toy_image --interpolate 3 --sampler ddpm', '--interpolate'),
    ('sample.py', '--run toy_image --interpolate 3 --eta 1', '--interpolate'),
    ('sample.py', '--run toy_image --sampler ddim --eta 1', '--eta'),
    ('sample.py', '--run toy_image --eta=-1', '--eta'),
    ('sample.py', '--run toy_image --reconstruct nowhere.png', 'nowhere.png'),
    ('sample.py', '--run toy_image --reconstruct empty', 'empty'),
    ('sample.py', '--run toy_image --reconstruct notes/tiny.png', 'tiny.png'),
]


@pytest.mark.parametrize('script, flags, words', [
    pytest.param(s, f, w, id=f'{s}-{f.replace(VAE, "").replace(LDM, "")}') for s, f, *w in MISUSE])
def test_misuse_is_one_line_and_writes_nothing(script, flags, words, broken):
    before = snapshot(broken)
    assert_refused(call(broken, script, flags), *words)
    assert snapshot(broken) == before


@pytest.mark.mutation('common.py', "{one_line(error)}', 2", "{one_line(error)}', 1")
@pytest.mark.mutation('common.py', "return printable(' '.join(text.split()))", "return text + '\\n'")
@pytest.mark.mutation('common.py', 'print(message, file=sys.stderr)', 'print(message)')
def test_errors_are_one_line_on_stderr_and_exit_with_2(broken, repo):
    for script, flags, *words in (MISUSE[0], MISUSE[-1]):
        assert_refused(call(broken, script, flags, repo=repo), *words)


@pytest.mark.mutation('sample.py', "SAMPLING = ('num', 'seed', 'batch', ", 'SAMPLING = (')
def test_flags_without_effect_are_refused(broken, repo):
    flags = '--run toy_image --reconstruct photo.png --num 4'
    assert_refused(call(broken, 'sample.py', flags, repo=repo), 'leave --num out')


def test_no_run_at_all(tmp_path):
    assert_refused(call(tmp_path, 'train_ldm.py'), 'python train_vae.py')
    assert call(tmp_path, 'train_ldm.py', '-h').code == 0  # help needs no run
    assert list(tmp_path.iterdir()) == []


def test_the_bundled_model(tmp_path):
    """Sampling works before any training, from a model that knows what it has made, and words."""
    out = done(tmp_path, 'sample.py', '--num 2 --res 24 --device cpu').out
    assert 'bundled' in out and len(pictures(tmp_path)) == 3
    done(tmp_path, 'sample.py', '--num 2 --res 24 --device cpu --out red --text=apple')
    plain, asked = (pictures(tmp_path, out)['grid_24x24.png'] for out in ('out', 'red'))
    assert np.abs(plain - asked).mean() > 5
    vae, model, info = ldm.load(ROOT / 'assets' / 'demo.pt')
    with torch.no_grad():
        x = vae.render(vae.decode(ldm.generate(vae, model, range(4))), (64, 64)).clamp(-1, 1)
        y = vae.render(vae.decode(vae.encode(x).mean), (64, 64)).clamp(-1, 1)
    assert metrics.psnr_each(y / 2 + 0.5, x / 2 + 0.5).mean() > 25
    assert x[:, :, :4, :4].mean() > 0.9 and (x - x.mean(0)).abs().mean() > 0.1  # on white, unlike
    texts = [v for part in ('args', 'ldm_args') for v in info[part].values() if isinstance(v, str)]
    assert not any(v.startswith('/') for v in texts)


INTERRUPTED = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
print('goes on')
os._exit(0)
"""
SCRIPTS = 'train_vae', 'train_ldm', 'sample', 'metrics', 'data'


@pytest.mark.mutation('data.py', 'signal.signal(signal.SIGINT, signal.SIG_DFL)', 'pass')
@pytest.mark.mutation('metrics.py', 'signal.signal(signal.SIGINT, signal.SIG_DFL)', 'pass')
@pytest.mark.mutation('sample.py', 'signal.signal(signal.SIGINT, signal.SIG_DFL)', 'pass')
@pytest.mark.mutation('train_ldm.py', 'signal.signal(signal.SIGINT, signal.SIG_DFL)', 'pass')
@pytest.mark.mutation('train_vae.py', 'signal.signal(signal.SIGINT, signal.SIG_DFL)', 'pass')
@pytest.mark.mutation('sample.py', ' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN', '')
def test_ctrl_c_while_libraries_are_imported(tmp_path, repo):
    """It ends a script without a word, unless the shell has it ignored."""
    for library in ('numpy', 'torch'):
        (tmp_path / f'{library}.py').write_text(INTERRUPTED)
    for script, ignored in itertools.product(SCRIPTS, (False, True)):
        done = subprocess.run(
            [sys.executable, repo / f'{script}.py'], capture_output=True, text=True,
            env=dict(os.environ, PYTHONPATH=str(tmp_path)),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else
                                             signal.SIG_DFL))
        assert (done.returncode, done.stdout, done.stderr) == (
            (0, 'goes on\n', '') if ignored else (-signal.SIGINT, '', '')), script


@pytest.mark.mutation('common.py', 'signal.signal(signal.SIGINT, signal.default_int_handler)', 'pass')
def test_ctrl_c_is_a_line_when_the_script_has_begun():
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    handlers = []
    try:
        common.run(lambda: handlers.append(signal.getsignal(signal.SIGINT)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert handlers == [signal.default_int_handler]


def test_a_process_says_nothing_else(broken):
    """No warning, no traceback beside the one line; help exits 0."""
    cases, pipe = (('sample.py', '--run first', 2), ('train_vae.py', '-h', 0)), subprocess.PIPE
    started = [subprocess.Popen([sys.executable, ROOT / script, *flags.split()], cwd=broken,
                                stdout=pipe, stderr=pipe, text=True) for script, flags, _ in cases]
    for process, (_, _, code) in zip(started, cases):
        _, err = process.communicate()
        assert process.returncode == code
        assert re.fullmatch(r'error: [^\n]*\n' if code else '', err), err


@pytest.mark.mutation('train_ldm.py', "common.try_checkpoint('--slim', target)", 'pass')
@pytest.mark.mutation('common.py', 'require(Path(path).suffix in SUFFIXES,', 'require(True,')
@pytest.mark.mutation('common.py', "    try_file(flag, path)\n", '')
@pytest.mark.mutation('common.py', "'opt' in load_checkpoint(path)", 'False')
@pytest.mark.mutation('common.py', "is_checkpoint(path) and 'opt' in load_checkpoint(path)",
                      'is_checkpoint(path)')
def test_nothing_is_written_over_what_training_continues(copy, repo):
    """By its name, by a link and by that of another run; over a slim checkpoint, all may write."""
    run = copy / 'runs' / 'toy_image'
    before = snapshot(run)
    (copy / 'link.pt').symlink_to(run / 'ldm.pt')
    for path in (run / 'ldm.pt', 'runs/../runs/toy_image/ldm.pt', copy / 'link.pt', run / 'vae.pt'):
        assert_refused(call(copy, 'train_ldm.py', f'--slim {path}', repo=repo), f'--slim {path}')
    assert_refused(call(copy, 'train_ldm.py', f'--slim {run}', repo=repo), 'a folder')
    for name in ('args.json', 'curves.png'):
        assert_refused(call(copy, 'train_ldm.py', f'--slim {run}/{name}', repo=repo), 'end in .pt')
    assert_refused(call(copy, 'sample.py', f'--device cpu --num 1 --export {run}/vae.pt', repo=repo),
                   '--export')
    assert snapshot(run) == before
    for k in range(2):
        done(copy, 'train_ldm.py', '--slim small.pt', repo=repo)


@pytest.mark.mutation('common.py', "'data', 'vae', 'name'}", "'data', 'vae'}")
@pytest.mark.mutation('train_ldm.py', 'args.name = common.run_name(path)',
                      'args.name = path.resolve().parent.name')
@pytest.mark.mutation('train_ldm.py', 'or common.file_digest(own) ==',
                      'or True or common.file_digest(own) ==')
def test_runs_are_copied_renamed_and_nested(toy, copy, repo):
    runs = copy / 'runs'
    for name in ('toy_image', 'data', 'exp/b', 'exp/a'):  # runs like a folder beside runs/, and nested
        if name != 'toy_image':
            shutil.copytree(toy.run, runs / name)
        (copy / name).mkdir(parents=True)
    (runs / 'exp' / 'b' / 'vae.pt').unlink()
    os.utime(runs / 'exp' / 'a' / 'vae.pt')  # the newest
    for flags, name in (('', 'exp/a'), ('--vae data', 'data'), (f'--vae {runs}/exp/a', 'exp/a')):
        result = done(copy, 'train_ldm.py', LDM, flags, '--steps 7', repo=repo)
        assert step_of(runs / name / 'ldm.pt') == 7 and f'runs/{name}' in result.out
    assert step_of(runs / 'toy_image' / 'ldm.pt') == 6 and not (runs / 'a').exists()
    assert 'runs/data' in done(copy, 'train_vae.py', VAE, '--name data --steps 7', repo=repo).out
    assert step_of(runs / 'data' / 'vae.pt') == 7
    shutil.copytree(runs / 'data', copy / 'elsewhere' / 'exp' / 'toy_image')
    assert_refused(call(copy, 'train_ldm.py', LDM, '--vae elsewhere/exp/toy_image', repo=repo),
                   'runs/toy_image/vae.pt is another file', '--name')
    missing = call(copy, 'sample.py', '--run exp', repo=repo)
    assert_refused(missing, 'exp or runs/exp', 'ldm.pt')


@pytest.mark.mutation('common.py', '    lock_run(folder, process)\n    if', '    if')
@pytest.mark.mutation('common.py', 'HELD.close()\n    gc', 'pass\n    gc')
def test_a_run_that_is_trained_is_left_alone(copy, repo):
    run = copy / 'runs' / 'toy_image'
    child = subprocess.Popen([sys.executable, '-c', 'import fcntl, sys, time\n'
                              f'lock = open("{run}/lock", "a")\nfcntl.lockf(lock, fcntl.LOCK_EX)\n'
                              'print("ready", flush=True)\nsys.stdin.read()'],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    before = snapshot(run)
    try:
        for script, (_, flags) in STAGES.items():
            assert_refused(call(copy, script, flags, '--steps 7', repo=repo),
                           'runs/toy_image: another process trains there', '--name')
    finally:
        child.communicate()
    assert snapshot(run) == before
    done(copy, 'train_vae.py', VAE, '--steps 7', repo=repo)
    with open(run / 'lock', 'a') as lock:  # this process has let go of it
        free = 'import fcntl, sys; fcntl.lockf(sys.stdin, fcntl.LOCK_EX | fcntl.LOCK_NB)'
        assert not subprocess.run([sys.executable, '-c', free], stdin=lock).returncode


@pytest.mark.mutation('common.py', 'require(there == step', 'require(True')
@pytest.mark.mutation('common.py', 'saved.exists() and not args.restart', 'saved.exists()')
def test_what_was_trained_while_a_start_read_is_not_lost(copy, mutation):
    run, alone = copy / 'runs' / 'toy_image', common.Process(0, 1, torch.device('cpu'), False)
    args = SimpleNamespace(restart=False, dataset='toy_image', steps=9)
    for stage in ('vae', 'ldm'):
        before = snapshot(run)
        with pytest.raises(ValueError, match=f'{stage}.pt has changed since it was read'):
            common.start_run(run, stage, args, alone, 4, [])
        assert {k: v for k, v in snapshot(run).items() if k != 'lock'} == {
            k: v for k, v in before.items() if k != 'lock'}
        try:
            common.start_run(run, stage, args, alone, 6, [])
            common.start_run(run, stage, SimpleNamespace(**vars(args) | dict(restart=True)), alone,
                             0, [])
        except ValueError as error:
            pytest.fail(str(error))


@pytest.mark.mutation('train_ldm.py', "table=Path(self.table.filename) if mapped else", 'table=')
def test_a_process_that_does_not_fork_maps_the_latents_itself(tmp_path):
    np.save(tmp_path / 'table.npy', np.random.randn(50, 2, 8, 16).astype('float16'))
    latents = train_ldm.Latents.__new__(train_ldm.Latents)
    vars(latents).update(dataset=None, views=1, table=np.load(tmp_path / 'table.npy', mmap_mode='c'))
    sent = pickle.dumps(latents)
    assert len(sent) < 2000
    assert np.array_equal(pickle.loads(sent).table, latents.table)


@pytest.mark.mutation('train_ldm.py', '            reader.check(texts)', '            pass')
def test_features_of_all_captions_are_needed_before_training(shapes, repo):
    np.savez(shapes.folder / 'few.npz', texts=['', 'thing number 0'], features=np.zeros((2, 3, 5)))
    flags = WORDS.replace('--text bytes --text_length 20', '--text few.npz')
    result = call(shapes.folder, 'train_ldm.py', f'{flags} --vae things --name few', repo=repo)
    assert_refused(result, 'no features of')
    assert not (shapes.folder / 'runs/few').exists()


@pytest.mark.mutation('train_ldm.py', 'common.require(end < free', 'common.require(True')
def test_latents_need_room_on_the_disk(copy, repo):
    """20,000 latents of 4 x 16 halves, means and deviations: 4.9 MiB, which a map cannot ask for."""
    flags, usage = f'{LDM.replace("none", "disk")} --name new', SimpleNamespace(free=4 * 2 ** 20)
    with mock.patch.object(shutil, 'disk_usage', lambda path: usage):
        assert_refused(call(copy, 'train_ldm.py', flags, repo=repo), '--cache disk: needs 4.9 MiB',
                       '4.0 MiB are free')
    assert not [*(copy / 'runs/new').glob('latents*'), *(copy / 'runs/new').glob('*.pt')]


@pytest.mark.mutation('common.py', "if path.exists() and not stages:", 'if False:')
@pytest.mark.mutation('train_ldm.py', "    with common.fitting(folder / 'ldm.pt'):\n            ema",
                      "    with common.fitting(folder / 'x'):\n            ema")
def test_small_damaged_files_of_a_run(copy, repo):
    run = copy / 'runs' / 'toy_image'
    for k, damaged in enumerate((b'', b'[]', b'{"vae": 3}', b'\xff\xfe')):
        (run / 'args.json').write_bytes(damaged)
        (run / 'log.jsonl').write_bytes((run / 'log.jsonl').read_bytes() + b'\xff\n[1]\n')
        out = done(copy, 'train_ldm.py', LDM, f'--steps {8 + k}', repo=repo).out
        assert 'note: runs/toy_image/args.json: damaged' in out and 'log.jsonl: 2 damaged' in out
        assert set(json.loads((run / 'args.json').read_text())) == {'ldm'}
        assert log_of(run, 'vae')[-1]['step'] == 6
    state = common.load_checkpoint(run / 'ldm.pt')
    for part in ('opt', 'ema', 'model'):
        common.save_checkpoint(run / 'ldm.pt', state | {part: dict(list(state[part].items())[1:])})
        assert_refused(call(copy, 'train_ldm.py', LDM, '--steps 99', repo=repo),
                       'toy_image/ldm.pt does not fit')


@pytest.mark.mutation('train_vae.py', '        path = common.the_checkpoint(args.init',
                      '        open_data(args, "train")\n        path = common.the_checkpoint(args.init')
@pytest.mark.mutation('train_vae.py', "    with torch.device('meta'):", '    if False:')
@pytest.mark.mutation('train_ldm.py', '    vae, info = first_stage(first, device, vae_path)\n',
                      '    vae, info = first_stage(first, device, vae_path)\n    open_data(info, args)\n')
def test_flags_are_checked_before_the_data_are_read(copy, repo):
    """What to start from, what a run was made with, and which networks can be."""
    with mock.patch.object(data, 'make_dataset', lambda *args, **more: pytest.fail('read')):
        for script, flags, *words in (
                ('train_vae.py', f'{VAE} --name new --init nowhere', 'nowhere or runs/nowhere'),
                ('train_vae.py', f'{VAE} --name new --captions none.csv', '--captions none.csv'),
                ('train_vae.py', f'{VAE} --name new --resolution 4 --ch_mult 1,1,1,1', '--resolution'),
                ('train_vae.py', f'{VAE} --name ../new', '--name ../new'),
                ('train_vae.py', f'{VAE} --lr 0.25', 'now 0.25'),
                ('train_ldm.py', f'{LDM} --name new --init nowhere', 'nowhere or runs/nowhere'),
                ('train_ldm.py', f'{LDM} --name new --captions none.csv', '--captions none.csv'),
                ('train_ldm.py', f'{LDM} --name new --num_classes 3 --text bytes', 'not both'),
                ('train_ldm.py', f'{LDM} --name /new', '--name /new'),
                ('train_ldm.py', f'{LDM} --lr 0.25', 'now 0.25')):
            assert_refused(call(copy, script, flags, repo=repo), *words)
    assert not (copy / 'runs' / 'new').exists()


@pytest.mark.mutation('train_ldm.py', "state['vae_hash'] == digest", "state['vae_hash']")
def test_a_changed_stage_1_is_noticed(copy, repo):
    done(copy, 'train_vae.py', VAE, '--steps 7')
    assert_refused(call(copy, 'train_ldm.py', LDM, repo=repo), 'changed', '--restart')


@pytest.mark.mutation('ldm.py', "step=state.get('vae_step', args['steps']))", 'step=0)')
@pytest.mark.mutation('ldm.py', "state.get('vae_step', args['steps'])", "args['steps']")
@pytest.mark.mutation('train_ldm.py', 'args.slim or not own.exists()', 'not own.exists()')
@pytest.mark.mutation('train_ldm.py', "both = own and 'ldm_config' in first",
                      "both = 'ldm_config' in first")
def test_a_second_stage_on_the_first_of_another(copy, repo):
    """Of a file of both stages, slim or not; its own second stage is no matter."""
    done(copy, 'train_ldm.py', TOY, '--slim small.pt')
    old = common.load_checkpoint(copy / 'runs/toy_image/ldm.pt')
    for k, file in enumerate(('small.pt', 'runs/toy_image/ldm.pt')):
        result = done(copy, 'train_ldm.py', LDM, f'--vae {file} --name new{k}', repo=repo)
        assert 'stage 1 at step 6 of 6' in result.out
        assert json.loads((copy / f'runs/new{k}/splits.json').read_text()) == old['splits']
        state = common.load_checkpoint(copy / f'runs/new{k}/ldm.pt')
        assert {k: state[k] for k in ('vae_args', 'vae_config', 'splits')} == {
            k: old[k] for k in ('vae_args', 'vae_config', 'splits')}
    common.save_checkpoint(copy / 'part.pt', old | dict(vae_step=3))
    done(copy, 'train_ldm.py', LDM, '--vae part.pt --name part', repo=repo)
    result = done(copy, 'train_ldm.py', LDM, '--vae runs/part/ldm.pt --name more', repo=repo)
    assert 'stage 1 at step 3 of 6' in result.out
    assert_same(copy / 'runs/new1/ldm.pt', copy / 'runs/toy_image/ldm.pt')
    for flags, run in (('--vae small.pt --name new0', 'new0'), ('--vae runs/new0/ldm.pt', 'new0'),
                       ('--vae runs/toy_image/ldm.pt', 'toy_image')):
        done(copy, 'train_ldm.py', flags, '--slim again.pt', repo=repo)
        again, full = (common.load_checkpoint(path)['ema']['unet.out.weight']
                       for path in (copy / 'again.pt', copy / 'runs' / run / 'ldm.pt'))
        assert torch.equal(again, full.half())


@pytest.mark.mutation('sample.py', "('vae.pt', 'ldm.pt') if args.reconstruct",
                      "('ldm.pt', 'vae.pt') if args.reconstruct")
def test_reconstructions_are_by_the_newest_first_stage(copy, repo):
    """Not by the one that the second stage was trained on."""
    done(copy, 'train_vae.py', VAE, '--steps 2 --restart')
    data.save_png(copy / 'x.png', data.toy_image([3], 16)[0])
    for run, out in (('toy_image', 'a'), ('runs/toy_image/vae.pt', 'b')):
        done(copy, 'sample.py', f'--run {run} --device cpu --reconstruct x.png --out {out}', repo=repo)
    a, b = (pictures(copy, out)['16x16/x_png.png'] for out in 'ab')
    assert np.array_equal(a, b)


@pytest.mark.mutation('train_ldm.py', "if train.computed else", 'if True else')
def test_captions_are_advised_where_they_can_be_given(photos, repo):
    """Not for computed data, see MISUSE, where --captions is refused."""
    assert_refused(call(photos, 'train_ldm.py', LDM, '--vae photos --name new --text bytes',
                        repo=repo), '--text bytes', 'has no captions', 'name them with --captions')


@pytest.mark.mutation('train_vae.py', 'before == now', 'True')
@pytest.mark.mutation('train_vae.py', '[{*names} for names', '[names for names')
def test_other_data_is_noticed(photos, tmp_path, repo):
    folder = Path(shutil.copytree(photos, tmp_path / 'copy'))
    flags = (f'{VAE} --preset toy_image --dataset image --data set --flip --name photos --steps 2 '
             '--split 0.3')
    file = folder / 'runs/photos/vae.pt'
    state = torch.load(file)
    state['splits'] = {side: names[::-1] for side, names in state['splits'].items()}
    torch.save(state, file)  # as another file system may list a folder
    assert 'is at step 2' in done(folder, 'train_vae.py', flags, repo=repo).out
    shutil.copy(folder / 'set' / '3.png', folder / 'set' / 'new.png')
    assert_refused(call(folder, 'train_vae.py', flags, repo=repo), 'other data', '--restart')


@pytest.mark.parametrize('script', STAGES)
def test_a_loss_that_is_not_finite(script, copy):
    """The last good checkpoint stays, and the message says what to try."""
    file, flags = STAGES[script]
    path = copy / 'runs' / 'toy_image' / file
    before = path.read_bytes()
    bad = '--lr 1e30' if file == 'vae.pt' else '--lr 1e30 --mixed no'
    result = call(copy, script, flags, bad, '--restart --save_every 4 --log_every 5')
    assert result.code == 2
    last = re.split('[\r\n]', result.err.strip())[-1]
    assert re.match(r'error: .*not finite at step [23];.*--lr', last), result.err[-1000:]
    assert path.read_bytes() == before
