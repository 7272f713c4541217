"""What the README's first command must reach, measured on its run; without one, trained anew.

    python -m pytest -m slow -s          # prints the figures
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import ldm
import metrics

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a finished toy run."""
    found = ROOT / 'runs' / 'toy_image'
    if (found / 'ldm.pt').exists():
        return found
    folder = tmp_path_factory.mktemp('toy')
    for script in ('train_vae.py', 'train_ldm.py'):
        subprocess.run([sys.executable, ROOT / script], cwd=folder, check=True)
    return folder / 'runs' / 'toy_image'


def psnr(run, capsys, *flags):
    metrics.main(['psnr', str(run), *flags])
    out = capsys.readouterr().out.splitlines()
    with capsys.disabled():
        print(*flags, out[-2])
    return json.loads(out[-1])


def test_reconstructions_beat_enlargement(run, capsys):
    at_r, at_2r, enlarged = (psnr(run, capsys, *flags) for flags in (
        ('--res', '32'), ('--res', '64'), ('--res', '64', '--bicubic')))
    assert at_r['psnr'] >= 30 and at_2r['psnr'] >= enlarged['psnr'] + 0.5
    assert max(at_r['mean_picture'], at_r['white_picture']) < 20


def test_samples_are_as_near_to_the_truth_as_held_out_pictures(run, capsys):
    """Median distance to the nearest of 20,000 pictures that nobody has seen."""
    vae, model, _ = ldm.load(run)
    with torch.no_grad():
        z = ldm.generate(vae, model, range(500), batch=100)
        samples = data.to_float(data.to_uint8(vae.render(vae.decode(z), (32, 32))))
    seeds = [data.toy_seeds('fresh', k) for k in range(20_000)]
    fresh = torch.cat([data.toy_image(part, 32).flatten(1) for part in metrics.pieces(seeds, 500)])
    held_out = data.toy_image([data.toy_seeds('test', k) for k in range(500)], 32)
    near = [metrics.nearest_neighbours(x.flatten(1), fresh, 1)[0].median().item()
            for x in (samples, held_out)]
    with capsys.disabled():
        print(f'median distance of samples {near[0]:.3f}, of held-out pictures {near[1]:.3f}, '
              f'ratio {near[0] / near[1]:.3f}')
    assert near[0] <= 1.2 * near[1]
