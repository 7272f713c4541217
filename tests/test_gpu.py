"""tests/gpu.py on the CPU with small networks: it runs, and its checks can fail."""
import re
from unittest import mock

import pytest
import torch

import data
from conftest import program


@pytest.fixture
def gpu(mutation):
    """The program as a module, with the edit of this run."""
    return program('gpu', mutation)


def run(gpu, capsys, flags):
    """Lines that it prints, and the exit code."""
    with pytest.raises(SystemExit) as stop:
        gpu.main(f'--device cpu --small --seconds 0 {flags}'.split())
    return capsys.readouterr().out.splitlines(), int(stop.value.code)


def verdicts(lines):
    """{check: whether it is ok} of printed lines."""
    found = [re.fullmatch(r'(ok|FAILED) +(.*): .*, at most .*', line) for line in lines]
    return {match[2]: match[1] == 'ok' for match in found if match}


@pytest.mark.mutation('tests/gpu.py', "f'| {\" | \".join(cells)} |'", "f'| {\" | \".join(cells)}'")
@pytest.mark.mutation('tests/gpu.py', 'if key not in known:', 'if True:')
def test_it_runs_on_a_cpu(gpu, capsys, monkeypatch):
    """Checks, comparisons and rows; two presets of the same networks are measured once."""
    measured, measure = [], gpu.measure
    monkeypatch.setattr(gpu, 'measure', lambda *args: measured.append(args) or measure(*args))
    lines, code = run(gpu, capsys, 'video look_up table --presets celebahq,cifar10 --compile ,')
    checks = verdicts(lines)
    assert code == 0 and lines[-1].startswith('0 failed, ')
    assert len(checks) == 12 and all(checks.values())
    assert sum('is faster' in line for line in lines) == 6
    table = [line.split('|') for line in lines if line.startswith('|')]
    assert [cells[1:5] for cells in table[2:]] == [
        [f' `{name}` ', f' {stage} ', ' off ', f' {items}, 1 ']
        for name, stage, items in (('celebahq', 'VAE', 50), ('celebahq', 'LDM', 25),
                                   ('cifar10', 'VAE', 20), ('cifar10', 'LDM', 20))]
    assert {len(cells) for cells in table} == {15}
    assert len(measured) == 2


@pytest.mark.mutation('tests/gpu.py', "return len({'a', 'b'} - {", "return len({'a', 'b'} & {")
def test_what_sample_py_does_not_write_fails(gpu, capsys, monkeypatch):
    for name, missing in (('image', 'save_animation'), ('shape', 'write_mesh'),
                          ('video', 'save_png'), ('nerf', 'write_mesh')):
        lines, code = run(gpu, capsys, name)
        assert code == 0 and verdicts(lines)[f'{name} latents not written']
        with monkeypatch.context() as patch:
            patch.setattr(data, missing, mock.Mock(side_effect=TypeError('of another device')))
            lines, code = run(gpu, capsys, name)
        assert code == 1 and 'FAILED TypeError: of another device' in lines


@pytest.mark.mutation('tests/gpu.py', 'values_of(*there)', 'values_of(*here)')
@pytest.mark.mutation('tests/gpu.py', 'found = step_of(b, b, other)',
                      'found = step_of(a, a, inputs)')
@pytest.mark.mutation('tests/gpu.py', 'failed += not good', 'failed += 0')
@pytest.mark.mutation('tests/gpu.py', 'sys.exit(failed > 0)', 'sys.exit(0)')
def test_a_weight_that_is_off_fails(gpu, capsys, monkeypatch):
    """One number of stage 1's read-out, one of the diffusion's last layer, on the other device."""
    twin = gpu.twin

    def off(model, device):
        model = twin(model, device)
        last = model.mlp.out if hasattr(model, 'mlp') else model.unet.out
        last.bias.data[0] += 0.1
        return model
    monkeypatch.setattr(gpu, 'twin', off)
    lines, code = run(gpu, capsys, 'image')
    assert code == 1
    assert [name for name, good in verdicts(lines).items() if not good] == [
        f'image {part}' for part in ('signal', 'eps', 'sampling', 'vae losses', 'vae gradients',
                                     'ldm losses', 'ldm gradients')]


@pytest.mark.mutation('tests/gpu.py', 'good = value <= limit', 'good = not value > limit')
@pytest.mark.mutation('tests/gpu.py', 'found = torch.stack([(x - y).abs().max()',
                      'found = torch.stack([(x - y).max()')
@pytest.mark.mutation('tests/gpu.py', 'max(faint * largest.max().item(), 1e-30)', '1e-30')
@pytest.mark.mutation('tests/gpu.py', 'strict=True)]\n    largest = torch.stack([x.abs()',
                      'strict=True)]\n    largest = torch.stack([x[:1].abs()')
def test_difference_is_the_largest_over_the_largest(gpu, capsys):
    a = dict(x=[torch.tensor([1.0, -4.0])], y=torch.tensor([0.01]))
    b = dict(x=[torch.tensor([1.5, -4.0])], y=torch.tensor([0.013]))
    assert gpu.difference(a, b) == pytest.approx(0.3)
    assert gpu.difference(a, b, faint=0.1) == pytest.approx(0.125)
    a['y'][0] = torch.nan
    assert gpu.run(lambda: gpu.compared('nan', a, a)) == 1
    assert verdicts(capsys.readouterr().out.splitlines()) == {'nan x': True, 'nan y': False}


@pytest.mark.mutation('tests/gpu.py', 'torch.set_float32_matmul_precision(precision)', 'pass')
@pytest.mark.mutation('tests/gpu.py', "matmul_precision('highest')", "matmul_precision('high')")
def test_exact_products_are_for_a_while(gpu):
    def state():
        cudnn = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic
    precision, cudnn_before = torch.get_float32_matmul_precision(), state()[1:]
    torch.set_float32_matmul_precision('high')
    try:
        with gpu.exact():
            assert state() == ('highest', False, True)
        assert state() == ('high', *cudnn_before)
    finally:
        torch.set_float32_matmul_precision(precision)


def broken():
    yield 'sum', 2.0, 2.0
    raise ValueError('of two\nlines')


@pytest.mark.mutation('tests/gpu.py', 'failed += 1', 'failed += 0')
def test_an_exception_is_a_failed_check(gpu, capsys):
    assert gpu.run(broken) == 1
    assert capsys.readouterr().out.splitlines() == [
        'ok     sum: 2, at most 2', 'FAILED ValueError: of two lines']


@pytest.mark.mutation('tests/gpu.py', "v if k == 'once' else v * items / n", 'v * items / n')
@pytest.mark.mutation('tests/gpu.py', '1e9 * memory - RESERVED', '1e9 * memory')
@pytest.mark.mutation('tests/gpu.py', 'math.floor(a + (room', 'math.floor((room')
@pytest.mark.mutation('tests/gpu.py', 'seconds_of(times, n, args.batch)',
                      'seconds_of(times, n, share)')
def test_what_a_run_costs(gpu):
    """400 items on 8 cards are 50 each, in rounds of 10; peaks of 5 and 10 say 4 + 2 n GB."""
    args = gpu.argparse.Namespace(batch=400, micro_batch=10, steps=3600, compile='off')
    times = dict(host=0.1, train=0.4, once=0.25)
    cells = gpu.row('name', 'VAE', args, times, {10: 24e9, 5: 14e9}).split(' | ')
    assert cells == ['| `name`', 'VAE', 'off', '50, 10', '0.500', '-', '2.000', '0.250', '2.750',
                     '24.0', '9 / 17 / 37', '20.2', '2.8 |']
    assert gpu.row('name', 'VAE', args, times, {10: 24e9}).split(' | ')[10] == '-'


@pytest.mark.mutation('tests/gpu.py', 'with contextlib.suppress(torch.OutOfMemoryError):',
                      'with contextlib.suppress(ZeroDivisionError):')
def test_what_does_not_fit_says_so(gpu, capsys, monkeypatch):
    def train(self):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(gpu.FirstStage, 'train', train)
    lines, code = run(gpu, capsys, 'table --presets cifar10 --compile ,')
    assert code == 0 and len(lines[-4].split('|')) == len(lines[-5].split('|')) == 15
    assert [('does not fit this card' in line) for line in lines[-4:-2]] == [True, False]
