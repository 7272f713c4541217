"""tests/bench.py: the cases of a table do the same work, and `denoising` prints what it says."""
from types import SimpleNamespace

import pytest
import torch

import data
import encoders
import ldm
from conftest import program

FILE, CPU = 'tests/bench.py', torch.device('cpu')


@pytest.fixture
def bench(mutation):
    """The program as a module, with the edit of this run."""
    return program('bench', mutation)


@pytest.mark.mutation(FILE, 'return gain * (y + self.bias)', 'return gain * y + self.bias')
@pytest.mark.mutation(FILE, 'coords[:1, ::width, 1])', 'coords[:1, :width, 1])')
@pytest.mark.mutation(FILE, "self.bias[:, None] * gain,", "self.bias[:, None],")
def test_ways_to_read_out_give_one_picture(bench):
    cases = bench.readout_cases('readout 40', CPU)
    plain = cases['plain']()()
    for name in cases:
        torch.testing.assert_close(cases[name]()(), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.mutation(FILE, 'plane.contiguous() for', '2 * plane.contiguous() for')
@pytest.mark.mutation(FILE, 'lambda _, x: x[0].contiguous()', 'lambda _, x: 2 * x[0].contiguous()')
def test_steps_in_either_order_of_memory_have_the_same_gradients(bench, monkeypatch):
    monkeypatch.setattr(torch, 'randn_like', lambda x: torch.randn(x.shape))
    for table, maker in (('vae', 'small_vae'), ('unet step', 'small_unet')):
        make, models = getattr(bench, maker), []

        def small(device):
            model, batch = make(device)
            models.append(model)
            return model, {k: v[:2] for k, v in batch.items()} if table == 'vae' else batch[:2]
        monkeypatch.setattr(bench, maker, small)
        cases = bench.TABLES[table.split()[0]](table, CPU)
        for name in ('float32', 'float32, contiguous'):
            step = cases[name]()
            torch.manual_seed(0)
            step()
        for a, b in zip(*(model.parameters() for model in models)):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-3 * a.grad.abs().max())


class Captioned(data.Items):
    """Items whose picture is their number, and whose text names it."""

    def __init__(self):
        self.names = [str(i) for i in range(64)]

    def view(self, i, k):
        return dict(image=torch.tensor(i))

    def known(self, i):
        return dict(text=f'number {i}')


@pytest.mark.mutation(FILE, ' - noise[:, 1]) / alpha', ' - noise[:, 1])')
@pytest.mark.mutation(FILE, 'own.roll(len(own) // 2, 0)', 'own')
def test_denoising_tells_whether_a_condition_is_heeded(bench, monkeypatch, capsys):
    """A network that knows z_0 with an item's own text, and else gives v = 0, whose error is 1."""
    model = ldm.LDM(ldm.LDMConfig(z_channels=4, planes=dict(xy=[8, 8]), ch=8, ch_mult=(1,),
                                  num_res_blocks=1, attn_factors=(), text='bytes', text_length=16,
                                  context_channels=8))
    texts = encoders.text_reader('bytes', 'cpu', 16)([f'number {i}' for i in range(64)])
    drawn = []

    def sample(noise):
        drawn.append(noise)
        return noise

    def eps(z_t, t, cond):
        alpha, sigma = model.scales(t)
        known = cond is not None and torch.equal(cond, texts)
        return (z_t - alpha * drawn[-1]) / sigma if known else sigma * z_t
    model.eps = eps
    vae = SimpleNamespace(reads='image', encode=lambda x: SimpleNamespace(sample=sample))
    monkeypatch.setattr(ldm, 'load', lambda run, device: (vae, model, {}))
    monkeypatch.setattr(data, 'open_run_data', lambda info, split, root: Captioned())
    bench.denoising(SimpleNamespace(names=['denoising'], run='run', data=None, device='cpu'))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [[split, name] for split in ('train', 'test')
                                         for name in ('own', 'other', 'none')]
    for _, name, *errors in rows:
        for error in errors:
            assert float(error) == pytest.approx(0 if name == 'own' else 1, abs=0.1)
