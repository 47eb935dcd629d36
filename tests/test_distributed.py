"Several ranks: the same clusters in the same bits, gradients of the whole batch, and an end that is never a hang."
import json, os, signal, sys, time
from dataclasses import replace
from pathlib import Path
import pytest, torch

os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get('PYTHONPATH'))))
import rank_tasks as tasks
from rank_tasks import SMALL, made_images, sha256
from deepcluster_nb.data import generator
from deepcluster_nb.fast import distributed, features, kmeans, training
from deepcluster_nb.fast.distributed import bounds, in_ranks
from deepcluster_nb.fit import fit, load_run, network, optimizers, resolve

pytestmark = [pytest.mark.usefixtures('one_thread'),
              pytest.mark.skipif(not sys.platform.startswith('linux'), reason='gloo in forked processes')]

# ------------------------------------------------------------------------------------------------ clustering

def test_every_image_is_in_one_share():
    for n in (1, 7, 512, 513, 5000):
        for shares in (1, 2, 3, 4, 9):
            for unit in (1, 512):
                b = bounds(n, shares, unit)
                sizes = [j - i for i,j in zip(b, b[1:])]
                assert b[0] == 0 and b[-1] == n and len(sizes) == shares and sizes[0] > 0 and min(sizes) >= 0
                assert all(i % unit == 0 or i == n for i in b) and max(sizes) - min(sizes) < 2*unit

def cases():
    noise = torch.randn(1003, 24, generator=generator(0, 'ranks'))
    bad = noise[:40].clone()
    bad[20:] += 100                                                    # nobody's: half of the clusters are empty
    sides = torch.cat([torch.randn(200, 4, generator=generator(1, 'ranks')) + 50*s for s in range(3)])
    few = torch.tensor([[0., -0.], [1., 0], [-0., 1]])
    return {'even shares': (noise, 40, None, {}),
            'uneven shares': (noise, 40, {1: [0, 1003], 2: [0, 7, 1003], 3: [0, 900, 901, 1003], 4: [0, 1, 500, 502, 1003]}, {}),
            'a rank without points': (noise, 40, {1: [0, 1003], 2: [0, 1003, 1003], 3: [0, 0, 1003, 1003], 4: [0, 5, 5, 5, 1003]}, {}),
            'empty clusters': (noise, 40, None, dict(init=bad, niter=3)),
            "the paper's repair": (noise, 40, None, dict(init=bad, repair='paper')),
            'clusters on some ranks only': (sides, 30, None, {}),
            'as many clusters as points, fewer points than ranks': (few, 3, None, {}),
            'one cluster': (noise, 1, None, dict(seed=3, epoch=2))}

@pytest.fixture(scope='module')
def alone():
    found = {}
    for name,(x, k, _, more) in cases().items():
        c = kmeans.kmeans(x, k, **more)
        found[name] = sha256(c.assign, c.centroids), c.objective[-1], c.n_empty
    return found

@pytest.mark.parametrize('world', [1, 2, 3, 4])
def test_the_same_bits_for_any_number_of_ranks(world, alone):
    answers = in_ranks(world, tasks.kmeans, list(cases().values()))
    for found in answers:
        assert [f[0] for f in found] == [f[0] for f in alone.values()]
        assert [f[2] for f in found] == [f[2] for f in alone.values()]
        assert [f[1] for f in found] == pytest.approx([f[1] for f in alone.values()], rel=1e-9, abs=1e-9)
