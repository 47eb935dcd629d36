"The way of ImageNet at 224 pixels, on a handful of photographs: packed files → the preset → the report."
import json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from deepcluster_nb.sources import load_images
from deepcluster_nb.fast.features import compute_features
from deepcluster_nb.fit import load_assignments
from deepcluster_nb.model import convnet
from deepcluster_nb.runs import load_checkpoint
from rehearse import PHASES, rehearse

ROOT = Path(__file__).parent.parent

def photographs(top, per_class=dict(train=6, val=2), classes=3):
    "ImageNet's own where they are at hand, else cuts of scikit-learn's two photographs."
    source = Path(os.environ.get('DEEPCLUSTER_DATA', 'nowhere'))/'imagenette'
    for split, n in per_class.items():
        if source.is_dir():
            for d in sorted((source/split).iterdir())[:classes]:
                (top/split/d.name).mkdir(parents=True)
                for f in sorted(d.iterdir())[:n]: (top/split/d.name/f.name).write_bytes(f.read_bytes())
            continue
        from sklearn.datasets import load_sample_images
        g = np.random.default_rng(len(split))
        for c in range(classes):
            (top/split/f'n{c:08d}').mkdir(parents=True)
            for i in range(n):
                im = load_sample_images().images[c % 2]
                y, x = g.integers(0, 427 - 240), g.integers(0, 640 - 300)
                Image.fromarray(im[y:y + 240, x:x + 240 + 20*c]).save(top/split/f'n{c:08d}'/f'{i}.JPEG',
                                                                      quality=95)

@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    top = tmp_path_factory.mktemp('imagenet')
    photographs(top/'folder')
    for split in ('train', 'val'):
        out = subprocess.run([sys.executable, ROOT/'data_scripts'/'pack_images.py', top/'folder'/split,
                              top/'packed'/f'{split}.safetensors', '--max-side', '500',
                              '--grey', '--center', '224', '--workers', '1'],
                             capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
    return top

def test_features_of_the_packed_file_are_those_of_the_folder(packed):
    net = convnet('alexnet', 4, dropout=0.)
    a, b = (compute_features(net, load_images(name, packed/where), 224, 6)
            for name,where in (('folder', 'folder'), ('packed', 'packed')))
    assert float((a - b).norm() / a.norm()) < .02            # the exact central crops, rounded to grey levels

def test_the_run_on_imagenet_rehearsed(tmp_path, capfd):
    "Two reassignments of made photographs, estimated, killed once inside the second, continued."
    small = dict(k=4, pca=8, batch_size=4, lr=.005, device='cpu')
    r = rehearse(tmp_path, small, images=24, n_test=8, seconds=1., workers=1, writes=1)
    run, images = tmp_path/'run', load_images('packed', tmp_path/'packed')
    assert len(images) == 24 and images.center.size == (1, 224, 224)
    assert load_checkpoint(run/'checkpoint')[:2] == (2, 0) and len(r['measured']) == 2
    assert [len(load_assignments(run, e)) for e in range(3)] == [24]*3
    m = json.loads((run/'metrics.json').read_text())
    assert set(m['probes']) == {'random', 'random_calibrated', 'deepcluster'}
    assert all(list(net) == [f'conv{i}' for i in range(1, 6)] for net in m['probes'].values())
    paths = [l.split(',')[0] for l in (run/'clusters.csv').read_text().splitlines()[1:]]
    assert len(set(paths)) == 24 and paths == images.paths
    assert (run/'report.html').exists() and (run/'figures'/'curves.png').exists()
    # seconds are recorded, never asserted
    assert json.loads((tmp_path/'rehearsal.json').read_text())['ratio'].keys() == set(PHASES)
    assert all(v > 0 for v in [*r['ratio'].values(), *r['checkpoint'].values()])
    out = capfd.readouterr().out
    assert 'training waits' in out and 'linear probe conv5' in out
