"Whole runs: killed and continued, wrong input, folders of images."
import io, json, shutil, signal, subprocess, sys, time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch, yaml
from PIL import Image
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.clustering import Clustering, ami, chance_nmi, nmi
from deepcluster_nb.sources import load_images
from deepcluster_nb.runs import drop_damaged, load_checkpoint, save_checkpoint
from survive import sha256
from deepcluster_nb import fit as around
from deepcluster_nb.model import convnet
from deepcluster_nb.fit import (PARTS, Averaged, Config, Hooks, as_npy, fit, load_assignments, load_run,
                                predict, resolve)

ROOT = Path(__file__).parent.parent

TINY = Config(dataset='digits', n_images=200, k=10, pca=16, epochs=3, passes=1, batch_size=50,
              precision='float32', device='cpu')

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    where = tmp_path_factory.mktemp('run')/'a'
    return where, fit(replace(TINY, run_dir=str(where)), echo=None)

def test_run_folder(finished):
    where, run = finished
    assert {p.name for p in where.iterdir()} == {'params.yaml', 'data.json', 'log.jsonl', 'checkpoint',
                                                 'assignments', 'figures', 'clusters.csv'}
    log = [json.loads(l) for l in (where/'log.jsonl').read_text().splitlines()]
    keys = ('epoch loss ln_k seconds objective nmi_prev nmi_prev_chance ami_prev nmi_labels ami_labels '
            'n_empty cluster_sizes'.split())
    assert [list(r) for r in log] == [keys]*3 and [r['epoch'] for r in log] == [0, 1, 2]
    kept = [torch.from_numpy(np.load(f)).long() for f in sorted((where/'assignments').iterdir())]
    for r,(prev,now) in zip(log[1:], zip(kept, kept[1:])):
        assert (r['nmi_prev'], r['nmi_prev_chance']) == (nmi(now, prev), chance_nmi(now, prev))
        assert r['ami_prev'] == (r['nmi_prev'] - r['nmi_prev_chance']) / (1 - r['nmi_prev_chance']) > 0
        y = run.images.labels
        assert (r['nmi_labels'], r['ami_labels']) == (nmi(now, y), ami(now, y))
        assert r['cluster_sizes']['max'] == int(now.bincount().max())
        assert r['n_empty'] == run.config.k - len(now.unique())
    files = sorted((where/'assignments').iterdir())
    assert len(files) == 4                                # one before each epoch, one of the finished network
    last = np.load(files[-1])
    assert last.dtype == np.uint8 and (last == run.clustering.assign.numpy()).all()
    rows = (where/'clusters.csv').read_text().splitlines()
    assert rows[0] == 'path,cluster' and len(rows) == 201 and rows[1].split(',')[1] == str(last[0])

@pytest.mark.parametrize('k, kind', [(2, 'uint8'), (256, 'uint8'), (257, 'uint16'), (65_536, 'uint16'),
                                     (65_537, 'int32')])
def test_assignments_have_the_smallest_type(k, kind):
    ids = torch.tensor([0, k - 1, 1])
    found = np.load(io.BytesIO(as_npy(Clustering(ids, torch.empty(k, 0), []))))
    assert found.dtype == kind and found.tolist() == ids.tolist()

def test_assignments_of_before_are_read_too(finished, tmp_path):
    where, run = finished
    shutil.copytree(where, tmp_path/'old')
    for f in (tmp_path/'old'/'assignments').iterdir(): np.save(f, np.load(f).astype(np.int32))
    for epoch in (0, 2, -1):
        new, old = (load_assignments(p, epoch) for p in (where, tmp_path/'old'))
        assert new.dtype == old.dtype == torch.int64 and torch.equal(new, old)
    assert torch.equal(old, run.clustering.assign)
    with pytest.raises(FileNotFoundError, match='run_dir: no assignments of epoch 7 in'):
        load_assignments(where, 7)

def test_same_seed_same_bits_other_seed_other_sha256(finished, tmp_path):
    for seed, same in ((0, True), (1, False)):
        fit(replace(TINY, run_dir=str(tmp_path/str(seed)), seed=seed), echo=None)
        assert (sha256(tmp_path/str(seed)) == sha256(finished[0])) == same

def test_global_random_state_does_not_matter_and_is_not_touched(finished, tmp_path):
    torch.manual_seed(5); np.random.seed(5)
    before = torch.random.get_rng_state()
    fit(replace(TINY, run_dir=str(tmp_path/'r')), echo=None)
    assert sha256(tmp_path/'r') == sha256(finished[0]) and torch.equal(before, torch.random.get_rng_state())

@pytest.mark.parametrize('wait_for', ['assignments/epoch_001.npy', 'checkpoint/00002-0000000-*.safetensors'])
def test_killed_and_continued_ends_in_the_same_sha256(finished, tmp_path, wait_for):
    config = replace(TINY, run_dir=str(tmp_path/'k'))
    code = (f"import torch; torch.set_num_threads({torch.get_num_threads()}); "
            f"from deepcluster_nb.fit import *; fit(Config(**{asdict(config)!r}), echo=None)")
    p = subprocess.Popen([sys.executable, '-c', code])
    end = time.time() + 120
    while not list((tmp_path/'k').glob(wait_for)) and p.poll() is None and time.time() < end: time.sleep(.002)
    p.send_signal(signal.SIGKILL); p.wait()
    fit(config, echo=None)
    assert sha256(tmp_path/'k') == sha256(finished[0])

def damage(folder, epoch): # flip a bit in the middle
    newest = next(folder.glob(f'{epoch:05d}-*.safetensors'))
    data = bytearray(newest.read_bytes()); data[len(data)//2] ^= 1; newest.write_bytes(data)

def stopped_and_damaged(config): # after two epochs, of which the second one's checkpoint is no longer whole
    class Stop(Exception): pass
    def stop(line):
        if line.startswith('epoch 2'): raise Stop
    with pytest.raises(Stop): fit(config, echo=stop)
    damage(Path(config.run_dir)/'checkpoint', 2)

def test_damaged_checkpoint_is_passed_over(finished, tmp_path):
    config = replace(TINY, run_dir=str(tmp_path/'d'))
    stopped_and_damaged(config)
    with pytest.warns(UserWarning, match='00002'): fit(config, echo=None)
    assert sha256(tmp_path/'d') == sha256(finished[0])

def test_a_damaged_checkpoint_does_not_displace_a_whole_one(tmp_path):
    for epoch in (1, 2): save_checkpoint(tmp_path, epoch, dict(t=torch.ones(9)), {})
    damage(tmp_path, 2)
    with pytest.warns(UserWarning, match='00002'): assert load_checkpoint(tmp_path)[0] == 1
    drop_damaged(tmp_path, 1)
    save_checkpoint(tmp_path, 3, dict(t=torch.ones(9)), {})
    damage(tmp_path, 3)
    with pytest.warns(UserWarning, match='00003'): assert load_checkpoint(tmp_path)[0] == 1

def test_stopped_before_the_first_checkpoint(finished, tmp_path, monkeypatch): # its epoch is logged once
    config = replace(TINY, run_dir=str(tmp_path/'r'))
    def fails(*args, **kwargs): raise ZeroDivisionError
    monkeypatch.setattr(Hooks, 'save', fails)
    with pytest.raises(ZeroDivisionError): fit(config, echo=None)
    monkeypatch.undo()
    assert [r['epoch'] for r in fit(config, echo=None).log] == [0, 1, 2]
    assert sha256(tmp_path/'r') == sha256(finished[0])

def test_epochs_are_ordered_by_their_numbers(tmp_path):
    (tmp_path/'assignments').mkdir()
    for epoch in (0, 999, 1000): np.save(tmp_path/'assignments'/f'epoch_{epoch:03d}.npy', np.full(3, epoch))
    assert load_assignments(tmp_path).tolist() == [1000]*3

def test_another_precision_is_said(tmp_path, monkeypatch):
    config = replace(TINY, precision='auto', run_dir=str(tmp_path/'r'))
    class Stop(Exception): pass
    def stop(line): raise Stop
    for here in (True, False):
        monkeypatch.setattr('deepcluster_nb.fit.has_bfloat16', lambda device: here)
        if here:
            with pytest.raises(Stop): fit(config, echo=stop)
        else:
            with pytest.warns(UserWarning, match='began in bfloat16 and goes on in float32'):
                fit(config, echo=None)

def test_labels_start_at_0(tmp_path):
    images = load_images('digits', n_images=200)
    images.labels = images.labels.clone()
    images.labels[7] = -1
    with pytest.raises(ValueError, match='labels: expected class ids from 0.*got -1'):
        fit(replace(TINY, run_dir=str(tmp_path/'r')), images, echo=None)
    assert not (tmp_path/'r').exists()

def test_predict_gives_the_training_images_their_clusters(finished):
    where, run = finished
    assert torch.equal(predict(load_run(where), run.images), run.clustering.assign)

def test_another_run_in_the_folder(finished):
    with pytest.raises(ValueError, match=r"k: 10 there, 11 now"):
        fit(replace(TINY, k=11, run_dir=str(finished[0])))

@pytest.mark.parametrize('change, message', [
    (dict(dataset='imagnet'), r"dataset: expected one of digits.*'imagnet'"),
    (dict(k=1), 'k: expected at least 2, got 1'),
    (dict(k=201), 'k: expected at most 200'),
    (dict(k='ten'), "k: expected a value of type int, got 'ten'"),
    (dict(epochs=-1), 'epochs: .*-1'),
    (dict(lr=0.), 'lr: .*0.0'),
    (dict(lr=float('nan')), 'lr'),
    (dict(size=8), 'size: expected'),
    (dict(precision='half'), "precision: .*'half'"),
    (dict(device='tpu'), "device: .*'tpu'"),
    (dict(arch='lenet'), "arch: .*'lenet'"),
    (dict(sampler='x'), 'sampler'),
    (dict(backend='x'), 'backend'),
    (dict(n_images=5000), 'n_images: .*5,000'),
    (dict(pca=5000), 'pca: .*5000'),
    (dict(batch_size=1), 'batch_size'),
    (dict(min_scale=0.), 'min_scale'),
    (dict(threads=-2), 'threads: expected at least -1'),
    (dict(checkpoint_minutes=-1.), 'checkpoint_minutes'),
    (dict(sobel=1), 'sobel: expected a value of type bool, got 1'),
    (dict(dropout=1.), 'dropout'),
    (dict(momentum=1.), 'momentum'),
    (dict(seed=-1), 'seed'), (dict(seed=2**32), 'seed'),
    (dict(clusterer='lloyd', backend='faiss'), 'backend'),
])
def test_impossible_values_are_errors_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message): fit(replace(TINY, run_dir=str(tmp_path/'r'), **change))
    assert not (tmp_path/'r').exists()

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device here')
def test_no_cuda(tmp_path):
    with pytest.raises(ValueError, match="device: .*'cuda'"):
        fit(replace(TINY, device='cuda', run_dir=str(tmp_path/'r')))

def test_precision_that_the_device_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr('deepcluster_nb.fit.has_bfloat16', lambda device: False)
    with pytest.raises(ValueError, match="precision: expected 'float32' or 'auto', .* no bfloat16"):
        fit(replace(TINY, precision='bfloat16', run_dir=str(tmp_path/'r')))
    assert resolve(replace(TINY, precision='auto')).precision == 'float32' and not (tmp_path/'r').exists()

def test_images_too_small(tmp_path):
    folder_of_images(tmp_path/'photos', n=12, size=(4, 4))
    with pytest.raises(ValueError, match=r'12 of 12 images are too small.*ant/000.jpg \(4 × 4\)'):
        fit(replace(TINY, dataset='folder', root=str(tmp_path/'photos'), n_images=0, k=4, pca=8,
                    run_dir=str(tmp_path/'run')))
    assert not (tmp_path/'run').exists()

def test_unknown_parameter():
    with pytest.raises(TypeError, match='clusters'): Config(clusters=3)

def folder_of_images(root, n=30, classes=('ant', 'bee'), size=(40, 36)):
    g = np.random.default_rng(0)
    for i in range(n):
        d = root/classes[i % len(classes)] if classes else root
        d.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 256, (size[0] + i, size[1], 3), dtype=np.uint8)).save(d/f'{i:03d}.jpg')

def test_own_images_without_labels(tmp_path):
    folder_of_images(tmp_path/'photos', classes=())
    c = replace(TINY, dataset='folder', root=str(tmp_path/'photos'), n_images=0, k=4, pca=8, epochs=1,
                batch_size=10, run_dir=str(tmp_path/'run'))
    run = fit(c, echo=None)
    assert run.images.labels is None and run.log[0]['nmi_labels'] is None
    assert (tmp_path/'run'/'clusters.csv').read_text().splitlines()[1].startswith('000.jpg,')

def test_broken_image_is_named_and_nothing_is_left(tmp_path):
    folder_of_images(tmp_path/'photos')
    whole = (tmp_path/'photos'/'bee'/'003.jpg').read_bytes()
    (tmp_path/'photos'/'bee'/'003.jpg').write_bytes(whole[:len(whole)//2])
    c = replace(TINY, dataset='folder', root=str(tmp_path/'photos'), n_images=0, k=4, pca=8,
                run_dir=str(tmp_path/'run'))
    with pytest.raises(ValueError, match=r"(?s)1 of 30 images.*003\.jpg"): fit(c, echo=None)
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('root, error', [('nowhere', 'no folder'), ('.', 'no images|no train')])
def test_roots_without_images(tmp_path, root, error):
    with pytest.raises(FileNotFoundError, match=error):
        fit(replace(TINY, dataset='folder', root=str(tmp_path/root), run_dir=str(tmp_path/'run')))
    assert not (tmp_path/'run').exists()

def test_cifar_folder_form(cifar_root):
    images = load_images('cifar10', cifar_root, 'test', 300, seed=1)
    assert images.size == (3, 32, 32) and len(images.classes) == 10 and len(images.labels.unique()) == 10
    assert images.paths == sorted(images.paths)

def test_a_last_batch_of_one_image(tmp_path):
    config = replace(TINY, n_images=33, batch_size=16, k=4, pca=8, epochs=1, run_dir=str(tmp_path/'r'))
    fit(config, echo=None)                                    # 33 = 16 + 16 + 1: batch norm can't do with one
    assert load_checkpoint(tmp_path/'r'/'checkpoint')[:2] == (1, 0)

def test_reading_ahead_changes_nothing(monkeypatch): # as for a GPU, but on the CPU
    from functools import partial
    from deepcluster_nb.fast import features, training
    config = Config(n_images=120, k=5, pca=8, epochs=1, passes=1, batch_size=40, precision='float32',
                    device='cpu')
    plain = fit(config, echo=None)
    ahead = partial(features.fetch_ahead, ahead=3)
    for module in (features, training): monkeypatch.setattr(module, 'fetch_ahead', ahead)
    run = fit(config, echo=None)
    assert torch.equal(run.clustering.assign, plain.clustering.assign)
    assert all(torch.equal(a, b) for a,b in zip(run.net.state_dict().values(),
                                                plain.net.state_dict().values()))

def test_an_error_while_reading_ahead_is_raised():
    from deepcluster_nb.fast.feeding import fetch_ahead
    class Broken(PackedImages):
        def batch(self, idx):
            if 7 in idx: raise OSError('the disk is gone')
            return super().batch(idx)
    images, got = Broken(torch.zeros(12, 1, 4, 4, dtype=torch.uint8)), []
    with pytest.raises(OSError, match='the disk is gone'):
        for idx,x in fetch_ahead(images, torch.arange(12).split(3), 'cpu', 2): got.append(idx.tolist())
    assert got == [[0, 1, 2], [3, 4, 5]]

SETTINGS = ("from torch.backends import cuda, cudnn; "
            "print(cudnn.deterministic, cudnn.allow_tf32, cuda.matmul.allow_tf32, "
            "cuda.matmul.allow_bf16_reduced_precision_reduction, "
            "cuda.matmul.allow_fp16_reduced_precision_reduction, "
            "torch.get_default_dtype(), torch.get_num_threads(), "
            "torch.are_deterministic_algorithms_enabled(), cudnn.benchmark)")

def settings(code):
    return subprocess.run([sys.executable, '-W', 'error', '-c', f'import torch; {code}; {SETTINGS}'],
                          check=True, capture_output=True, text=True).stdout.split()

def test_importing_the_kit_changes_no_setting():
    modules = [p.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')
               for p in (ROOT/'deepcluster_nb').rglob('[a-z]*.py')]
    assert settings('import ' + ', '.join(modules)) == settings('pass')

def test_a_gpu_is_asked_for_the_same_bits_again():
    code = ('torch.backends.cudnn.benchmark = True; '
            'from deepcluster_nb.fast.feeding import same_bits; same_bits()')
    found = settings(code)
    assert found[:5] == ['True', 'False', 'False', 'False', 'False'] and found[-1] == 'False'
    fastest = settings(code.replace('same_bits()', 'same_bits(True)'))        # as asked
    assert fastest == ['False', *found[1:-1], 'True']

@pytest.mark.parametrize('parts', ['fast', 'plain'])
def test_a_finished_run_is_made_longer(tmp_path, parts):
    images = load_images('digits', n_images=120)
    c = Config(n_images=120, k=8, pca=16, epochs=1, passes=1, batch_size=32, min_scale=.5, device='cpu',
               precision='float32', parts=parts, run_dir=str(tmp_path/'r'))
    fit(c, images, echo=None)
    (tmp_path/'r'/'metrics.json').write_text('{}')                # of the shorter run
    longer = fit(replace(c, epochs=3), images, echo=None)
    once = fit(replace(c, epochs=3, run_dir=str(tmp_path/'once')), images, echo=None)
    for a,b in zip(longer.net.state_dict().values(), once.net.state_dict().values()): assert torch.equal(a, b)
    numbers = [[{k: v for k,v in r.items() if k != 'seconds'} for r in run.log] for run in (longer, once)]
    assert numbers[0] == numbers[1] and not (tmp_path/'r'/'metrics.json').exists()
    assert (tmp_path/'r'/'clusters.csv').read_bytes() == (tmp_path/'once'/'clusters.csv').read_bytes()
    assert yaml.safe_load((tmp_path/'r'/'params.yaml').read_text())['epochs'] == 3
    last = [dict(epochs=4, lr_schedule='last_quarter')] if parts == 'fast' else []    # plain parts have none
    for more in (dict(epochs=2), dict(epochs=4, recluster=1), *last):
        with pytest.raises(ValueError, match='epochs: 3 there'): fit(replace(c, **more), images, echo=None)

def test_what_may_differ_changes_no_number(tmp_path):
    params = asdict(Config())
    (tmp_path/'params.yaml').write_text(yaml.safe_dump(params))
    assert set(around.may_differ(tmp_path, params)) == {'run_dir', 'root', 'checkpoint_minutes', 'threads',
                                                        'checkpoint_epochs', 'knn_every', 'precision'}

@pytest.mark.parametrize('benchmark', [False, True])
def test_a_network_on_a_gpu_asks_for_the_same_bits(monkeypatch, benchmark):
    class Asked(Exception): pass
    def same_bits(benchmark): raise Asked(benchmark)
    monkeypatch.setattr(around, 'same_bits', same_bits)
    with pytest.raises(Asked, match=str(benchmark)):
        around.network(replace(TINY, device='cuda', benchmark=benchmark))

def test_what_auto_was_can_be_asked_for(tmp_path):
    images = load_images('digits', n_images=60)
    c = Config(n_images=60, k=4, pca=8, epochs=1, passes=1, batch_size=32, device='cpu', parts='plain',
               run_dir=str(tmp_path/'r'))
    fit(c, images, echo=None)
    fit(replace(c, precision='float32', epochs=2), images, echo=None)
    with pytest.raises(ValueError, match='lr: 0.05 there'): fit(replace(c, lr=.1), images, echo=None)

def test_whitened_directions_are_fewer_than_images():
    said, images = [], load_images('digits', n_images=30)
    c = Config(k=4, pca=29, epochs=0, device='cpu')
    with pytest.raises(ValueError, match='pca: expected well below 30.*an eighth, 3'): fit(c, images)
    fit(replace(c, pca=16), images, echo=said.append)
    assert any(s.startswith('pca = 16 is much for 30 images') for s in said)

def test_what_is_damaged_goes_as_the_run_goes_on(tmp_path, monkeypatch):
    config = replace(TINY, run_dir=str(tmp_path/'r'))
    stopped_and_damaged(config)
    monkeypatch.setattr(around, 'run_loop', lambda *args: None) # nothing is saved later
    with pytest.warns(UserWarning, match='00002'): fit(config, echo=None)
    assert [p.stem for p in (tmp_path/'r'/'checkpoint').glob('*.json')] == ['00001-0000000']

def test_the_mean_of_the_weights():
    net = convnet('alexnet_small', 5, dropout=0.)
    def work(net, *given): # two steps, each adds 1 to everything
        *_, after, first, total = given
        for _ in range(2):
            with torch.no_grad():
                for t in net.state_dict().values(): t.add_(1)
            after(1, 2, 0., None)
        return 0.
    parts = Averaged(replace(PARTS['fast'], train_epoch=work), decay=.75)
    start = {n: t.clone() for n,t in net.state_dict().items()}
    parts.averaging_epoch(net, *[None]*8, lambda *args: None, 0, 0.)
    mean = parts.judged(net).state_dict()    # of the first step, then .75 of that and .25 of the next
    for n in ('features.0.weight', 'features.1.running_mean'):
        torch.testing.assert_close(mean[n], start[n] + 1.25)

def test_ranks_keep_checkpoints_as_often(tmp_path, monkeypatch):
    class Seen(Exception): pass
    def guard(ranks, folder, minutes): raise Seen(minutes)
    monkeypatch.setattr(around, 'joined', lambda: nullcontext(SimpleNamespace(rank=0)))
    monkeypatch.setattr(around, 'rank_parts', lambda *args: PARTS['fast'])
    monkeypatch.setattr(around, 'RankGuard', guard)
    with pytest.raises(Seen, match='3.5'):
        fit(replace(TINY, run_dir=str(tmp_path/'r'), checkpoint_minutes=3.5), echo=None)
