"deepcluster-nb predict, as people call it."
import csv, shutil, subprocess, sys, tempfile
from unittest.mock import patch
import numpy as np, pytest, torch
from PIL import Image
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.sources import load_images
from deepcluster_nb.experiments import predict_folder
from deepcluster_nb.fit import Config, fit, load_run, predict

def command(*args, cwd): # → (exit status, stdout, stderr)
    p = subprocess.run([sys.executable,
                        '-c', 'import sys; from deepcluster_nb.experiments import main; sys.exit(main())',
                        'predict', *map(str, args)],
                       capture_output=True, text=True, cwd=cwd, timeout=300)
    return p.returncode, p.stdout, p.stderr

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def room(tmp_path_factory): # photos (flat), tree (ImageFolder), run (trained on the tree)
    top, g = tmp_path_factory.mktemp('predict'), np.random.default_rng(0)
    (top/'photos').mkdir()
    for c in ('bird', 'cat'):
        (top/'tree'/c).mkdir(parents=True)
        for i in range(9):
            Image.fromarray(g.integers(0, 256, (34 + i, 40 - i, 3),
                                       dtype=np.uint8)).save(top/'tree'/c/f'{i}.png')
    for i in range(70):
        Image.fromarray(g.integers(0, 256, (20, 20 + i % 3),
                                   dtype=np.uint8)).save(top/'photos'/f'{i:02d}.png')
    fit(Config(dataset='folder', root=str(top/'tree'), k=4, pca=4, epochs=1, passes=1, batch_size=8,
               device='cpu', precision='float32', run_dir=str(top/'run')),
        echo=None)
    return top

def rows(path): return list(csv.reader(path.open()))

def test_a_tree_gets_the_clusters_that_the_run_gave_it(room, tmp_path):
    status, out, err = command(room/'run', room/'tree', '--out', 'c.csv', cwd=tmp_path)
    assert (status, err) == (0, ''), err
    assert (tmp_path/'c.csv').read_text() == (room/'run'/'clusters.csv').read_text()
    found = rows(tmp_path/'c.csv')
    assert (found[0] == ['path', 'cluster']
            and [p for p,_ in found[1:]] == [f'{c}/{i}.png' for c in ('bird', 'cat') for i in range(9)])
    assert (out == f"18 images in {len({c for _,c in found[1:]})} clusters: c.csv\n"
            and [p.name for p in tmp_path.iterdir()] == ['c.csv'])

def test_a_flat_folder_in_several_chunks(room, tmp_path):
    found, broken = predict_folder(room/'run', room/'photos', tmp_path/'c.csv', chunk=32)
    images = load_images('folder', room/'photos')
    wanted = predict(load_run(room/'run'), images).tolist()
    assert (not broken and found == [(f'{i:02d}.png', c) for i,c in enumerate(wanted)]
            and rows(tmp_path/'c.csv')[1:] == [[p, str(c)] for p,c in found])

def test_the_file_is_replaced_only_when_asked(room, tmp_path):
    (tmp_path/'clusters.csv').write_text('mine')
    status, out, err = command(room/'run', room/'tree', cwd=tmp_path)
    assert (status == 2 and "out: 'clusters.csv' exists already" in err and len(err.splitlines()) == 1
            and (tmp_path/'clusters.csv').read_text() == 'mine')
    assert command(room/'run', room/'tree',
                   '--force', cwd=tmp_path)[0] == 0 and len(rows(tmp_path/'clusters.csv')) == 19

def test_broken_images_stop_it_or_are_left_out(room, tmp_path):
    photos = tmp_path/'photos'
    photos.mkdir()
    for i in range(8):
        (photos/f'{i}.png').write_bytes(
            (room/'photos'/f'{i:02d}.png').read_bytes()[:None if i not in (2, 5) else 60])
    status, out, err = command(room/'run', photos, cwd=tmp_path)
    assert (status == 2 and "2 of 8 images can't be read" in err and '2.png: ' in err and '5.png: ' in err
            and '3.png' not in err and not (tmp_path/'clusters.csv').exists())
    status, out, err = command(room/'run', photos, '--skip-broken', cwd=tmp_path)
    assert (status == 0 and out.startswith('6 images in')
            and "2 images can't be read and were left out:\n  2.png: " in out)
    assert [p for p,_ in rows(tmp_path/'clusters.csv')[1:]] == [f'{i}.png' for i in (0, 1, 3, 4, 6, 7)]
    for i in (0, 1, 3, 4, 6, 7): (photos/f'{i}.png').write_bytes(b'')
    with pytest.raises(ValueError, match="8 of 8 images can't be read, and nothing was written"):
        predict_folder(room/'run', photos, tmp_path/'d.csv', skip_broken=True)
    assert not (tmp_path/'d.csv').exists()

def test_wrong_input_is_one_line_before_any_work(room, tmp_path, monkeypatch):
    for name, text in (('empty', None), ('begun', 'k: 4'), ('other', 'seeds: 4'), ('typo', 'k: [4'),
                       ('bare', '')):
        (tmp_path/name).mkdir()
        if text is not None: (tmp_path/name/'params.yaml').write_text(text)
    monkeypatch.chdir(tmp_path)
    tree = room/'tree'
    for args, message in [(('nowhere', tree), "no run in 'nowhere'"),
                          (('begun', tree), 'no whole checkpoint yet'),
                          (('other', tree), 'of another experiment'),
                          (('typo', tree), 'params.yaml. is no YAML'),
                          (('bare', tree), 'names and values in .*got a NoneType'),
                          ((room/'run', 'nowhere'), "folder: no folder 'nowhere'"),
                          ((room/'run', 'empty'), "folder: no images in 'empty'"),
                          ((room/'run', tree, 'no/such/c.csv'), 'out: expected a file in an existing folder'),
                          ((room/'run', tree, 'empty'), 'out: expected a file')]:
        with pytest.raises((ValueError, FileNotFoundError), match=message): predict_folder(*args)
    status, out, err = command('nowhere', tree, cwd=tmp_path)
    assert (status == 2 and err.startswith("deepcluster-nb: run_dir: no run in 'nowhere'")
            and len(err.splitlines()) == 1 and not (tmp_path/'clusters.csv').exists())

def test_a_stop_writes_nothing(room, tmp_path, monkeypatch):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr('deepcluster_nb.experiments.predict', stop)
    with pytest.raises(KeyboardInterrupt): predict_folder(room/'run', room/'tree', tmp_path/'c.csv')
    assert not list(tmp_path.iterdir())

def test_a_run_under_way_is_said_to_be(room, tmp_path, capsys):
    (room/'run'/'clusters.csv').rename(tmp_path/'kept.csv')
    try: predict_folder(room/'run', room/'tree', tmp_path/'c.csv')
    finally: (tmp_path/'kept.csv').rename(room/'run'/'clusters.csv')
    assert 'not finished' in capsys.readouterr().err

def test_color_is_missing_in_a_grey_pack(tmp_path):
    images, how = load_images('shapes', n_images=24), dict(k=3, pca=4, epochs=1, passes=1, batch_size=8,
                                                           device='cpu', precision='float32')
    run = fit(Config(sobel=False, **how), images, echo=None)
    assert len(predict(run, images)) == 24
    images.recipe = dict(grey=True)
    with pytest.raises(ValueError, match='expected images in color'): predict(run, images)
    small = PackedImages(torch.zeros(2, 3, 6, 40, dtype=torch.uint8))
    with pytest.raises(ValueError, match='images: 2 of 2 images are too small'): predict(run, small)

def test_a_run_opens_where_its_device_is_missing(room, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    copy = shutil.copytree(room/'run', tmp_path/'copy')
    text = (copy/'params.yaml').read_text()
    assert 'device: cpu\n' in text
    (copy/'params.yaml').write_text(text.replace('device: cpu\n', 'device: cuda\n'))
    shutil.rmtree(copy/'figures')
    images, here = load_images('folder', room/'photos'), load_run(copy)
    assert torch.equal(predict(here, images), predict(load_run(room/'run'), images))
    assert not (copy/'figures').exists()                              # to open is not to write
    with patch('deepcluster_nb.fit.has_bfloat16', lambda device: False):
        (copy/'params.yaml').write_text(text.replace('precision: float32', 'precision: bfloat16'))
        assert load_run(copy).config.precision == 'float32'

def test_a_run_whose_backend_was_never_used_opens_and_goes_on(tmp_path):
    c = Config(n_images=40, clusterer='pic', pca=4, epochs=1, passes=1, batch_size=8, device='cpu',
               precision='float32', run_dir=str(tmp_path/'r'))
    run = fit(c, echo=None)
    params = tmp_path/'r'/'params.yaml'
    params.write_text(params.read_text().replace('backend: torch', 'backend: faiss'))
    assert torch.equal(load_run(tmp_path/'r').clustering.assign, run.clustering.assign)
    assert fit(c, echo=None).log == run.log

def test_another_experiments_folder_is_no_run(tmp_path):
    (tmp_path/'params.yaml').write_text('shots: [1]\n')
    with pytest.raises(ValueError, match='folder of another experiment than train'): load_run(tmp_path)

def test_a_chunk_of_broken_files(room, tmp_path, monkeypatch):
    photos, made = tmp_path/'photos', []
    photos.mkdir()
    for i in range(40): (photos/f'{i:02d}.png').write_bytes(b'no image')
    Image.new('RGB', (30, 30)).save(photos/'x.png')
    monkeypatch.setattr(tempfile, 'NamedTemporaryFile', lambda *a, **how: made.append(a))
    found, broken = predict_folder(room/'run', photos, tmp_path/'c.csv', skip_broken=True, chunk=32)
    assert len(found) == 1 and len(broken) == 40 and not made
    assert all(line.startswith(f'{i:02d}.png: cannot identify') for i,line in enumerate(broken))
