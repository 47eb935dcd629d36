"The estimate: what it multiplies, what it refuses, what it prints. Times are never compared with a clock."
from dataclasses import replace
import re, shutil
import pytest, torch
from deepcluster_nb import estimate as module
from deepcluster_nb.data import generator
from deepcluster_nb.estimate import Estimate, estimate, kept_bytes, long, material, sample, sample_clustering
from deepcluster_nb.experiments import forecast, main
from deepcluster_nb.runs import amount
from deepcluster_nb.sources import load_images
from deepcluster_nb.fit import Config, resolve

KINDS = dict(features=[2., 3., 4.], pca=[.1, .1], axes=[5.], kmeans=[1.], training=[6., 8.], books=[.01],
             packing=[1e-3], saving=[2e-3], probe=[.5], pair=[.002])
FACTS = dict(n=1000, n_test=100, classes=10, real=True, decoded=False, listing=0., loading=7.,
             image_bytes=3072., probes=[9600, 9216], dim=4096, activations=100., network=1200,
             gradients=400, checkpoint=800)
PHASES = ['loading', 'features', 'pca', 'kmeans', 'training', 'bookkeeping', 'probes']
TINY = Config(dataset='shapes', n_images=200, k=5, pca=8, epochs=2, passes=1, batch_size=16, device='cpu',
              precision='float32')

pytestmark = pytest.mark.usefixtures('one_thread')

def fake(samples=KINDS, facts=FACTS, **change):
    return Estimate(resolve(replace(TINY, **change)), samples, facts)

def test_a_reassignment_by_hand():
    e = fake(passes=3).epoch()
    assert e == pytest.approx(dict(features=3000, pca=105, kmeans=1000, training=3*7000, bookkeeping=10.8))

def test_training_waits_for_the_copy_and_for_a_disk_that_is_slower_than_an_epoch():
    seldom = fake(checkpoint_epochs=4).epoch()
    assert seldom['bookkeeping'] == pytest.approx(10 + 800*1e-3/4)
    slow, work = fake(KINDS | dict(saving=[20.])).epoch(), 3000 + 105 + 1000 + 7000
    assert slow['bookkeeping'] == pytest.approx(10 + .8 + (800*20 - .8 - 10 - work))
    assert sum(slow.values()) == pytest.approx(800*20)               # an epoch takes as long as the disk

def test_a_whole_run_by_hand():
    found = fake(epochs=4)
    probes = 3*(2*1100*3 + 2*100*1000*.5 + 1000*100*.002)      # 8 steps a pass, so 100 passes
    assert found.totals() == pytest.approx(dict(loading=7, features=5*3000, pca=5*105, kmeans=5*1000,
                                                training=4*7000, bookkeeping=4*10.8, probes=probes))
    assert found.seconds == pytest.approx(sum(found.totals().values())) and list(found.totals()) == PHASES

def test_linear_in_images_epochs_and_passes():
    base, more = fake(), fake(facts=FACTS | dict(n=7000))
    for p in ('features', 'kmeans', 'training'): assert more.epoch()[p] == pytest.approx(7*base.epoch()[p])
    # the eigenvectors cost the same
    assert more.epoch()['pca'] - 5 == pytest.approx(7*(base.epoch()['pca'] - 5))
    a, b, c = (fake(epochs=n).seconds for n in (0, 10, 20))
    assert c - b == pytest.approx(b - a) == pytest.approx(10*sum(base.epoch().values()))
    assert fake(passes=5).epoch()['training'] == pytest.approx(5*base.epoch()['training'])

def test_smallest_and_largest_samples_frame_the_estimate():
    found = fake()
    low, middle, high = (sum(found.totals(of).values()) for of in (min, lambda v: sorted(v)[len(v)//2], max))
    assert low < found.seconds < high
    even = fake({k: v[:1] for k,v in KINDS.items()})
    assert even.totals(min) == even.totals(max) and '± 0%' in str(even)

def test_images_that_are_decoded_are_loaded_one_by_one():
    assert fake(facts=FACTS | dict(decoded=True, listing=3.)).totals()['loading'] == 7*1000 + 3

@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_probes_are_sampled_as_they_are_fitted_there(device, monkeypatch): # the GPU is made up
    seen, to = [], torch.Tensor.to
    def fitted(train, train_y, test, test_y, epochs, device):
        assert [len(f) for f in test.values()] == [len(test_y)]*len(test)
        seen.append((device, [f.shape[1] for f in train.values()], len(train_y), epochs))
    monkeypatch.setattr(module, 'linear_probes', fitted)
    def once(work, most, *_, **how): work(most); return [float(most)], most
    monkeypatch.setattr(module, 'sample', once)
    monkeypatch.setattr(torch.Tensor, 'to', lambda t, *a, **k: t if a == ('cuda',) else to(t, *a, **k))
    found = module.sample_probes(FACTS, device, 1.)
    if device == 'cpu': # one layer of mean width, 4 passes; a unit is a pass over an image
        assert seen == [('cpu', [9408], 1024, 4)] and found['probe'] == [1024/4]
    else: # all layers, steps enough for a recording; the unit of the amount is a pass of all
        assert seen == [('cuda', [9600, 9216], 1024, 208)] and found['probe'] == [208/(2*1024)]
    assert len(found['pair']) == 1

def test_without_labels_no_probes():
    found = fake({k: v for k,v in KINDS.items() if k not in ('probe', 'pair')},
                 FACTS | dict(classes=0, probes=[]))
    assert found.totals()['probes'] == 0 and 'probes' not in str(found)

def test_disk_and_memory_by_hand():
    found = fake(epochs=3)
    assert found.disk == {'three checkpoints and the reserve': 3200,
                          'features in half precision': 2*1000*4096, 'assignments': 1000*4}
    assert found.stays == 2*800 + 4000 + 20*1000 and '25.6 kB stay when the run has ended' in str(found)
    for k, kind in ((256, 1), (257, 2), (65_537, 4)): # bytes for each number
        assert fake(facts=FACTS | dict(n=70_000), epochs=499, k=k).assignments == kind*70_000*500
    assert found.memory == {'images': 3072e3, 'weights, gradients, momentum': 1200,
                            'activations of 16 images': 1600,
                            'copies of the state to be written': 1600, 'features after PCA': 4*1000*8,
                            'features of the probes': 1100*(2*18816 + 4*4096)}
    packed = Estimate(replace(found.config, dataset='packed'), KINDS, FACTS)
    assert packed.disk['packed images'] == 3072e3 and 'images' not in packed.memory

@pytest.mark.parametrize('kind, word', [
    ('features', 'a GPU'),
    ('training', 'a GPU; fewer epochs'),
    ('kmeans', 'clusters'),
    ('axes', 'fewer features'),
    ('probe', 'come once'),
    ('saving', 'disk')])
def test_advice_names_what_takes_the_time(kind, word):
    found = fake(KINDS | {kind: [1e6]}, epochs=50)
    assert (word in found.advice()
            and f'goes into {max(found.totals(), key=found.totals().get)}:' in found.advice())

def test_advice_on_passes_and_on_what_does_not_fit():
    assert 'fewer passes' in fake(KINDS | dict(training=[1e6]), passes=2).advice()
    assert fake(facts=FACTS | dict(ram=1e6)).advice().startswith(
        'memory first: 1 MB are here, and features of the probes alone')
    assert fake(facts=FACTS | dict(ram=1e12, free=1e3)).advice().startswith('disk first')

def test_no_epochs_no_division_by_zero():
    found = fake({k: [0.] for k in KINDS}, FACTS | dict(loading=0.), epochs=0)
    assert found.seconds == 0 and 'in all' in str(found)

@pytest.mark.parametrize('n, text', [
    (0, '0 bytes'),
    (999, '999 bytes'),
    (1500, '1.5 kB'),
    (123e6, '123 MB'),
    (2.4e11, '240 GB'),
    (1.341e9, '1.34 GB'),
    (5e15, '5,000 TB')])
def test_bytes(n, text): assert amount(n) == text

@pytest.mark.parametrize('s, text', [
    (0, '0.0 s'),
    (9.94, '9.9 s'),
    (10, '10 s'),
    (3*3600, '3 h 00 min'),
    (86400*500, '500.0 days')])
def test_long(s, text): assert long(s) == text

def test_sample_counts_units_and_leaves_the_first_call_out():
    now, calls = [0.], []
    def work(n): now[0] += 100 if not calls else n; calls.append(n)
    times, n = sample(work, most=8, seconds=50, clock=lambda: now[0])
    assert times == [1., 1., 1.] and n == 4 and calls == [2, 2, 4, 4, 4, 4]

def test_kept_bytes_of_a_known_graph():
    net = torch.nn.Sequential(torch.nn.Linear(5, 2), torch.nn.Sigmoid())
    assert kept_bytes(net, torch.randn(4, 5, generator=generator(0, 'x'))) == 4*(5 + 2)

def test_material(tmp_path, monkeypatch):
    monkeypatch.delenv('DEEPCLUSTER_DATA', raising=False)
    images, facts = material(Config(dataset='cifar100'))
    assert ((facts['n'], facts['n_test'], facts['classes'], facts['real']) == (50_000, 10_000, 100, False)
            and images.size == (3, 32, 32))
    assert (material(Config(dataset='folder'))[1]['n'] == 1_281_167
            and material(Config(dataset='folder'), 5000)[1]['n'] == 5000)
    from PIL import Image
    for i in range(12):
        d = tmp_path/('train' if i < 9 else 'val')/f'c{i % 2}'
        d.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40 + i, 30)).save(d/f'{i}.png')
    images, facts = material(Config(dataset='folder', root=str(tmp_path)))
    assert ((facts['n'], facts['n_test'], facts['classes'], facts['real'], facts['decoded'], len(images))
            == (9, 3, 2, True, True, 9))
    assert facts['image_bytes'] == pytest.approx(sum(3*30*(40 + i) for i in range(9))/9)

def test_pic_needs_no_k(): # which a run does not ask for either
    assert estimate(replace(TINY, k=300, clusterer='pic'), seconds=.1).seconds > 0

@pytest.mark.parametrize('power', [1., 1.7])
def test_a_clusterer_that_is_not_k_means_is_timed_itself(monkeypatch, power):
    asked = []
    def clusters(x, config, epoch): asked.append(len(x))
    def timed(f, n, seconds, **_): # a clock that shows what theory says
        f(n)
        return [1e-6*asked[-1]**power], 1
    monkeypatch.setitem(module.CLUSTERERS, 'pic', clusters)
    monkeypatch.setattr(module, 'sample', timed)
    x, c = torch.zeros(8192, 4), replace(TINY, clusterer='pic')
    for n in (8192, 81920):
        assert module.sample_clusters(x, c, n, 1.)[0]*n == pytest.approx(1e-6*n**power)
    assert set(asked) == {4096, 8192}

def test_a_look_at_the_neighbors_takes_time():
    seldom, never = fake(epochs=4, knn_every=2), fake(epochs=4)
    assert seldom.seconds - never.seconds == pytest.approx(2*(1000*3 + 800*200*.002))
    assert 'knn' in str(seldom) and 'knn' not in str(never)

def test_an_rgb_network_is_estimated_on_three_planes(monkeypatch):
    monkeypatch.delenv('DEEPCLUSTER_DATA', raising=False)
    grey, color = (material(Config(dataset='packed', sobel=sobel))[1]['image_bytes']
                   for sobel in (True, False))
    assert color == 3*grey == 3*375*500

def test_free_space_is_that_of_the_runs_disk(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module.shutil, 'disk_usage',
                        lambda p: asked.append(p) or shutil._ntuple_diskusage(9, 1, 8))
    estimate(replace(TINY, run_dir=str(tmp_path/'not'/'yet')), seconds=.1)
    assert asked == [tmp_path]

def test_packed_images_without_a_test_file(tmp_path, monkeypatch): # a run holds a fifth out
    load_images('shapes', n_images=40).save(tmp_path/'train.safetensors')
    monkeypatch.setenv('DEEPCLUSTER_DATA', str(tmp_path))
    for root in (str(tmp_path), ''):
        facts = material(Config(dataset='packed', root=root))[1]
        assert facts['real'] and (facts['n'], facts['n_test']) == (40, 8)

@pytest.mark.parametrize('change, n_images, seconds, message', [
    (dict(k=1), None, 1, 'k: expected at least 2'),
    ({}, 1, 1, 'n_images: expected at least 2 images, got 1'),
    ({}, None, 0, 'seconds: .*0'),
    (dict(k=300), None, 1, 'k: expected at most 200'),
    (dict(pca=1025), None, 1, 'pca: expected at most 1024'),
    (dict(n_images=5000), None, 1, 'n_images: .*1,200'),
    (dict(size=8), None, 1, 'size'),
    (dict(dataset='imagnet'), None, 1, 'dataset')])
def test_wrong_input(change, n_images, seconds, message):
    with pytest.raises(ValueError, match=message): estimate(replace(TINY, **change), n_images, seconds)

def test_a_root_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="/no/such/place"):
        estimate(replace(TINY, dataset='folder', root='/no/such/place'))

def test_measured():
    before = torch.random.get_rng_state()
    found = estimate(replace(TINY, arch='resnet18'), 10_000, seconds=.5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (found.facts['n'] == 10_000 and list(found.totals()) == PHASES
            and all(v > 0 for v in found.totals().values()))
    assert all(len(v) >= 3 and min(v) >= 0 for v in found.samples.values()) and found.facts['activations'] > 0
    for word in (*PHASES, 'in all', 'disk:', 'memory:', 'what would help most:', '10,000 images'):
        assert word in str(found)

def test_points_more_than_images_are_never_needed():
    c = resolve(replace(TINY, k=150, pca=4))
    assert set(sample_clustering(c, 200, 64, .5)) == {'pca', 'axes', 'kmeans', 'books'}

def test_command(capsys):
    assert main(['estimate', '--preset', 'digits', '-p', 'epochs=3', '-p', 'arch=resnet18', '--images', '700',
                 '--seconds', '.5']) == 0
    out, err = capsys.readouterr()
    assert ('700 images' in out and '3 reassignments' in out and 'what would help most' in out
            and 'measuring' in err and 'measuring' not in out)
    assert (main(['estimate', '--preset', 'digits', '-p', 'k=1']) == 2
            and re.search('k: expected at least 2, got 1', capsys.readouterr().err))
    assert (main(['estimate', '--preset', 'imagenet']) == 2
            and 'preset: expected one of' in capsys.readouterr().err)

@pytest.mark.parametrize('args, message', [
    (['--nproc', '512'], 'batch_size: expected at least 1024'),
    (['--nproc', '2', '-p', 'clusterer=pic'], "clusterer: expected 'kmeans' with several ranks"),
    (['--nproc', '2', '--bandwidth=-1'], '--bandwidth: expected GB/s, at least 0'),
    (['--nproc', '2', '--bandwidth=nan'], '--bandwidth: expected GB/s, at least 0'),
    (['--bandwidth', '5'], '--bandwidth: expected none with one rank')])
def test_what_ranks_can_not_do_is_said_before_anything_is_measured(args, message, capsys, monkeypatch):
    monkeypatch.setattr(module, 'estimate', None)
    assert main(['estimate', '--preset', 'digits', *args]) == 2
    assert message in capsys.readouterr().err

def test_samples_of_a_clustering_are_scaled_to_the_run(monkeypatch): # seconds that a clock would show
    c = resolve(Config(dataset='shapes', k=5, pca=8, device='cpu', precision='float32'))
    # PCA of 256 and of 4,096 rows; project, k-means, books
    shown = iter([2 + 256e-5, 2 + 4096e-5, .25, 3., 8.])
    monkeypatch.setattr(module, 'sample', lambda *a, **how: ([next(shown)], 1))
    found = module.sample_clustering(c, 16, 64, 1.)        # 16 images of 64 numbers
    assert found['axes'] == pytest.approx([2*(16/64)**3])
    assert found['pca'] == pytest.approx([1e-5*16/64 + .25])
    # two iterations and a last assignment were timed, of 20 and one
    assert found['kmeans'] == pytest.approx([3*(21/3)/16])
    assert found['books'] == pytest.approx([8/16])

def test_bandwidth_is_in_billions_of_bytes(monkeypatch):
    monkeypatch.setattr(module, 'estimate', lambda *args: 'the estimate')
    monkeypatch.setattr(module, 'rank_table', lambda e, world, sent: f'{world} ranks, {sent:g} a second')
    assert forecast('digits', {}, nproc=2, bandwidth=1.5) == 'the estimate\n\n2 ranks, 1.5e+09 a second'
