"Each switch changes what it says and nothing else, and a run with it goes on in the same bits."
import itertools, json, math
from dataclasses import fields, replace
from pathlib import Path
import numpy as np, pytest, torch, yaml
from torch import nn
from deepcluster_nb.fast import training as fast
from deepcluster_nb.data import generator
from deepcluster_nb import fit as around
from deepcluster_nb.fit import PARTS
from deepcluster_nb.clustering import lloyd, starting_points
from deepcluster_nb.switches import by_lloyd, color_factors, config_factors, new_head, with_switches
from deepcluster_nb.fast import crops
from deepcluster_nb.fast.crops import center_crop
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.sources import load_images
from deepcluster_nb.model import ARCHS, SIZES, calibrate_bn, conv_stack, convnet
from deepcluster_nb.runs import load_checkpoint
from deepcluster_nb.sobel import Sobel, normalize
from deepcluster_nb.fit import (Config, fit, load_assignments, load_run, network, optimizers, predict,
                                prepare, resolve)
from deepcluster_nb.experiments import main
from deepcluster_nb.fast.features import compute_features
from deepcluster_nb.probes import knn_accuracy
from deepcluster_nb.sampling import SAMPLERS
from survive import sha256

def tiny(planes, dropout): # (features, classifier): a network that trains in no time
    wide = [m for _ in range(2) for m in (nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(inplace=True))]
    return (conv_stack([(8, 3, 2, 1), (16, 3, 2, 1), nn.AdaptiveMaxPool2d(2)], planes),
            nn.Sequential(nn.Linear(64, 32), *wide[1:]))

@pytest.fixture(autouse=True, scope='module')
def architecture():
    with pytest.MonkeyPatch.context() as m:
        m.setitem(ARCHS, 'tiny', tiny); m.setitem(SIZES, 'tiny', (8, 64))
        yield

TINY = Config(dataset='digits', arch='tiny', n_images=120, k=6, pca=8, epochs=2, passes=1, batch_size=40,
              precision='float32', device='cpu', checkpoint_minutes=0.)
NEW = ('lr_schedule', 'border', 'relu', 'calibrate', 'head', 'head_momentum', 'clusterer', 'jitter', 'gray',
       'recluster', 'reset_every', 'reset_keep')

def seen(monkeypatch, config): # what every epoch of training begins with, its learning rates, and the Run
    epochs, rates, train, step = [], [], fast.train_epoch, torch.optim.SGD.step
    def spy(net, images, idx, assign, opts, *args):
        epochs.append(dict(start={n: t.clone() for n,t in net.state_dict().items()}, idx=idx, assign=assign,
                           momentum=[o.defaults['momentum'] for o in opts], opts=opts,
                           buffers=[o.state[next(iter(net.top_layer.parameters()))].get('momentum_buffer')
                                    is not None for o in opts[1:]]))
        out = train(net, images, idx, assign, opts, *args)
        epochs[-1]['end'] = {n: t.clone() for n,t in net.state_dict().items()}
        return out
    def note(self, *args, **kwargs):
        rates.append(self.param_groups[0]['lr'])
        return step(self, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setitem(PARTS, 'fast', replace(PARTS['fast'], train_epoch=spy))
        m.setattr(torch.optim.SGD, 'step', note)
        run = fit(config, echo=None)
    return epochs, rates, run

@pytest.fixture(scope='module')
def base(architecture):
    with pytest.MonkeyPatch.context() as m: return seen(m, TINY)

def same(a, b, *but): # names of the tensors that differ, but for those that begin so
    return {n for n in a if not n.startswith(but or ('-',)) and not torch.equal(a[n], b[n])}

def test_defaults_are_the_papers(base):
    epochs, rates, run = base
    assert {n: getattr(TINY, n) for n in NEW} == dict(lr_schedule='constant', border='zeros', relu=False,
                                                      calibrate=False, head='fresh', head_momentum=0.,
                                                      clusterer='kmeans', jitter=0., gray=0., recluster=0,
                                                      reset_every=0, reset_keep=.7)
    assert [e['momentum'] for e in epochs] == [[.9, 0.]]*2 and set(rates) == {.05}
    assert epochs[0]['opts'][0] is epochs[1]['opts'][0] and epochs[0]['opts'][1] is not epochs[1]['opts'][1]

def test_lr_schedule(monkeypatch, base):
    epochs, rates, run = seen(monkeypatch, replace(TINY, lr_schedule='cosine'))
    # 120 images in batches of 40, two reassignments
    expected = [.05*(1 + math.cos(math.pi*s/3))/2 for s in range(3)]*2
    assert rates[::2] == rates[1::2] and np.allclose(rates[::2], expected, rtol=1e-12)
    assert not same(epochs[0]['start'], base[0][0]['start']) and same(epochs[0]['end'], base[0][0]['end'])

def test_the_last_quarter_of_the_run(monkeypatch):
    _, rates, _ = seen(monkeypatch, replace(TINY, lr_schedule='last_quarter'))
    # six steps in all: the run is through 0, 1/6, … 5/6 of them
    expected = [.05*min(1, 4*(1 - s/6)) for s in range(6)]
    assert rates[::2] == rates[1::2] and np.allclose(rates[::2], expected, rtol=1e-12)
    assert expected[4] == .05 > expected[5] > 0

def test_clusters_that_stay(tmp_path):
    run = fit(replace(TINY, epochs=3, recluster=1, run_dir=str(tmp_path/'r')), echo=None)
    first, *later = [load_assignments(tmp_path/'r', e) for e in range(3)]
    assert all(torch.equal(first, a) for a in later) and [r['nmi_prev'] for r in run.log] == [None, 1., 1.]
    # the same head learns on, and only the first reassignment clusters
    assert run.log[2]['loss'] < run.log[1]['loss'] < run.log[0]['loss']
    assert ['features' in r['seconds'] for r in run.log] == [True, False, False]
    assert [r['objective'] is None for r in run.log] == [False, True, True]

def test_a_step_back_to_fresh_weights(monkeypatch, base):
    epochs, _, run = seen(monkeypatch, replace(TINY, reset_every=1, reset_keep=.5))
    assert not same(epochs[0]['start'], base[0][0]['start'])                 # not before the first epoch
    c = resolve(TINY)
    fresh = network(replace(c, seed=generator(c.seed, 'reset', 1).initial_seed())).state_dict()
    name = 'features.0.weight'
    halfway = (base[0][0]['end'][name] + fresh[name])/2
    assert torch.allclose(epochs[1]['start'][name], halfway, atol=1e-6)
    # batch norm knows the mixed weights, not the old ones
    statistics = 'features.1.running_mean'
    assert not torch.allclose(epochs[1]['start'][statistics], base[0][0]['end'][statistics], rtol=1e-2)

def test_each_step_back_is_to_weights_of_its_own(monkeypatch):
    c, seen = resolve(replace(TINY, epochs=3, reset_every=1)), []
    monkeypatch.setattr(around, 'step_back', lambda net, fresh, keep: seen.append(fresh.state_dict()))
    fit(c, echo=None)
    own = [network(replace(c, seed=generator(c.seed, 'reset', e).initial_seed())) for e in (1, 2)]
    assert [same(a, b.state_dict()) for a,b in zip(seen, own, strict=True)] == [set(), set()]

def test_without_balance_large_clusters_count_more():
    assign = torch.tensor([0]*90 + [1]*10)
    for name, share in dict(shuffled=.1, uniform=.5).items():
        drawn = assign[SAMPLERS[name](assign, 1000, 0, 0)]
        assert abs(float((drawn == 1).float().mean()) - share) < .01

def test_colors_change_and_nothing_else_is_drawn_anew(monkeypatch):
    def crops_of(config): # of the first step: the windows, and the loss after the epoch
        cut, found = crops.crop_inside, []
        def spy(images, boxes, size, flip=None):
            found.append((boxes, flip))
            return cut(images, boxes, size, flip)
        with monkeypatch.context() as m:
            m.setattr(crops, 'crop_inside', spy)
            run = fit(config, echo=None)
        return [f for f in found if f[1] is not None][0], run.log[0]['loss']
    (boxes, flip), first = crops_of(TINY)
    for more in (dict(jitter=.4), dict(gray=1.)):
        (b, f), loss = crops_of(replace(TINY, **more))
        assert torch.equal(b, boxes) and torch.equal(f, flip)
        # digits are grey already: there is no color to lose
        assert np.isclose(loss, first, rtol=1e-4) == ('gray' in more)

def test_a_kept_head_goes_on(monkeypatch, base):
    epochs, _, run = seen(monkeypatch, replace(TINY, head='kept', head_momentum=.5))
    assert not same(epochs[0]['start'], base[0][0]['start'])               # the first one is as fresh as ever
    assert not same(epochs[0]['end'], epochs[1]['start'])
    assert (epochs[0]['opts'][1] is epochs[1]['opts'][1]
            and [e['buffers'] for e in epochs] == [[False], [True]])

def test_head_momentum(monkeypatch, base):
    epochs, rates, run = seen(monkeypatch, replace(TINY, head_momentum=.5))
    assert ([e['momentum'] for e in epochs] == [[.9, .5]]*2
            and [e['buffers'] for e in epochs] == [[False], [False]])
    assert (not same(epochs[0]['start'], base[0][0]['start']) and same(epochs[0]['end'], base[0][0]['end'])
            and set(rates) == {.05})

@pytest.mark.parametrize('arch, relu', [
    ('alexnet_small', False),
    ('alexnet_small', True),
    ('resnet18', False)])
def test_a_head_from_centroids_knows_its_clusters(arch, relu):
    c = resolve(replace(TINY, arch=arch, head='centroids', relu=relu))
    images, net = load_images('digits', n_images=120), network(c)
    clustering, pca = fast.cluster(net, images, c, 0)
    before = {n: t.clone() for n,t in net.state_dict().items()}
    new_head(net, optimizers(net, c), clustering, pca, c, 1)
    assert {n[:9] for n in same(net.state_dict(), before)} == {'top_layer'}
    with torch.no_grad(): logits = net.eval()(normalize(center_crop(images.batch(torch.arange(120)), c.size)))
    right = float((logits.argmax(1) == clustering.assign).float().mean())
    assert right > (.95 if relu or arch == 'resnet18' else .6)  # exact where the head sees what was clustered

@pytest.mark.parametrize('relu', [False, True])
def test_a_head_from_centroids_is_as_long_as_a_fresh_one(relu):
    c = resolve(replace(TINY, head='centroids', relu=relu))
    net = network(c)
    new_head(net, optimizers(net, c), *fast.cluster(net, load_images('digits', n_images=120), c, 0), c, 1)
    # of 32 numbers with a standard deviation of .01
    assert float(net.top_layer.weight.detach().norm(dim=1).mean()) == pytest.approx(.01 * 32**.5, rel=1e-5)

def test_the_first_head_is_fresh_where_batch_norm_has_no_statistics(monkeypatch, base):
    epochs, _, run = seen(monkeypatch, replace(TINY, head='centroids'))
    assert (not same(epochs[0]['end'], base[0][0]['end'])
            and {n[:9] for n in same(epochs[1]['start'], base[0][1]['start'])} == {'top_layer'})
    epochs, _, run = seen(monkeypatch, replace(TINY, head='centroids', calibrate=True, epochs=1))
    fresh, _, _ = seen(monkeypatch, replace(TINY, calibrate=True, epochs=1))
    assert {n[:9] for n in same(epochs[0]['start'], fresh[0]['start'])} == {'top_layer'}

def test_relu_is_clustered_and_no_more(monkeypatch, base):
    epochs, _, run = seen(monkeypatch, replace(TINY, relu=True))
    assert not same(epochs[0]['start'], base[0][0]['start'])
    assert not torch.equal(epochs[0]['assign'], base[0][0]['assign'])
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    a, b = (convnet('alexnet_small', 5, dropout=0.).eval(),
            with_switches(convnet('alexnet_small', 5, dropout=0.), relu=True).eval())
    with torch.no_grad():
        assert torch.equal(b.embed(x), a.embed(x).relu()) and torch.equal(a(x), b(x))
    b.train()(x).sum().backward()                             # nothing is changed in place under the gradient

def test_border():
    a, b = network(resolve(TINY)), network(resolve(replace(TINY, border='replicate')))
    assert not same(a.state_dict(), b.state_dict())
    x = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    differ = (a.sobel(x) - b.sobel(x)).abs().amax((0, 1)) > 1e-6
    assert differ[[0, -1]].all() and differ[:, [0, -1]].all() and not differ[1:-1, 1:-1].any()
    assert torch.allclose(b.sobel(x),
                          Sobel()(torch.nn.functional.pad(x, (1,)*4, mode='replicate'))[..., 1:-1, 1:-1],
                          atol=1e-6)

def test_calibrate(monkeypatch, base):
    epochs, _, run = seen(monkeypatch, replace(TINY, calibrate=True))
    by_hand = network(resolve(TINY))
    calibrate_bn(by_hand, load_images('digits', n_images=120), 32)
    assert not same(epochs[0]['start'], by_hand.state_dict(), 'top_layer')
    changed = same(epochs[0]['start'], base[0][0]['start'])
    assert changed and all(n.split('.')[-1] in ('running_mean', 'running_var', 'num_batches_tracked')
                           for n in changed)

def test_clusters_that_differ_in_number(monkeypatch, tmp_path):
    config = replace(TINY, clusterer='pic', k=2, run_dir=str(tmp_path/'r'))
    epochs, _, run = seen(monkeypatch, config)
    ks = [int(e['assign'].max()) + 1 for e in epochs]
    # seed 0: two different numbers
    assert [len(e['start']['top_layer.bias']) for e in epochs] == ks and len(set(ks)) == 2 and min(ks) > 2
    assert ([r['ln_k'] for r in run.log] == [math.log(k) for k in ks]
            and all(r['n_empty'] == 0 for r in run.log))
    again = load_run(tmp_path/'r')
    assert not same(again.net.state_dict(), run.net.state_dict()) and len(again.net.top_layer.bias) == ks[-1]
    assert (len(again.clustering.centroids) == len(run.clustering.centroids)
            == int(run.clustering.assign.max()) + 1)
    found = predict(again, run.images)
    # new images go to the nearest centroid
    assert float((found == run.clustering.assign).float().mean()) > .5

def test_stopped_before_a_step_back_and_continued(monkeypatch, tmp_path):
    config = replace(TINY, reset_every=1)
    fit(replace(config, run_dir=str(tmp_path/'whole')), echo=None)
    def stop(*_): raise RuntimeError('stopped here')
    with monkeypatch.context() as m:
        m.setattr(around, 'step_back', stop)
        with pytest.raises(RuntimeError, match='stopped here'):
            fit(replace(config, run_dir=str(tmp_path/'r')), echo=None)
    assert load_checkpoint(tmp_path/'r'/'checkpoint')[:2] == (1, 0)
    fit(replace(config, run_dir=str(tmp_path/'r')), echo=None)
    assert sha256(tmp_path/'r') == sha256(tmp_path/'whole')

@pytest.mark.parametrize('sampler', ['uniform', 'released', 'weighted'])
def test_samplers_take_pic(sampler):
    assert len(fit(replace(TINY, clusterer='pic', sampler=sampler, epochs=1), echo=None).log) == 1

@pytest.mark.parametrize('change', [dict(head='kept', head_momentum=.9, lr_schedule='cosine'),
                                    dict(head='centroids', head_momentum=.5, relu=True, calibrate=True),
                                    dict(clusterer='pic', head_momentum=.5),
                                    dict(recluster=1, jitter=.4, gray=.2, head_momentum=.5, reset_every=1)],
                         ids=['kept', 'centroids', 'pic', 'recluster'])
def test_stopped_and_continued(monkeypatch, tmp_path, change):
    config, batch, reads = replace(TINY, **change), PackedImages.batch, []
    fit(replace(config, run_dir=str(tmp_path/'whole')), echo=None)
    class Stop(Exception): pass
    def stops(images, idx):
        reads.append(len(idx))
        if len(reads) == stop: raise Stop
        return batch(images, idx)
    # the second step of the second epoch; statistics for batch norm read once more, clusters that stay do not
    stop = 7 + ('calibrate' in change) + ('reset_every' in change) - ('recluster' in change)
    with monkeypatch.context() as m:
        m.setattr(PackedImages, 'batch', stops)
        with pytest.raises(Stop): fit(replace(config, run_dir=str(tmp_path/'r')), echo=None)
    epoch, step, tensors, _ = load_checkpoint(tmp_path/'r'/'checkpoint')
    assert (epoch, step) == (1, 1) and {'head_momentum.0', 'head_momentum.1'} <= set(tensors)
    fit(replace(config, run_dir=str(tmp_path/'r')), echo=None)
    assert sha256(tmp_path/'r') == sha256(tmp_path/'whole')

def test_a_run_from_before_the_switches(tmp_path):
    config = replace(TINY, epochs=1, run_dir=str(tmp_path/'r'))
    fit(config, echo=None)
    done, params = sha256(tmp_path/'r'), tmp_path/'r'/'params.yaml'
    old = {n: v for n,v in yaml.safe_load(params.read_text()).items() if n not in NEW}
    params.write_text(yaml.safe_dump(old))
    assert load_run(tmp_path/'r').config.head == 'fresh'
    with pytest.raises(ValueError, match="lr_schedule: None there, 'cosine' now"):
        fit(replace(config, lr_schedule='cosine'), echo=None)
    fit(config, echo=None)
    assert sha256(tmp_path/'r') == done

@pytest.mark.parametrize('change, message', [
    (dict(lr_schedule='linear'), "lr_schedule: expected one of constant, cosine, last_quarter, got 'linear'"),
    (dict(lr_schedule=1), 'lr_schedule: .*str'),
    (dict(jitter=1.5), 'jitter: expected at least 0 and at most 1, got 1.5'),
    (dict(gray=-.1), 'gray: expected at least 0 and at most 1, got -0.1'),
    (dict(recluster=-1), 'recluster: expected at least 0, got -1'),
    (dict(reset_keep=1.1), 'reset_keep: expected at least 0 and at most 1, got 1.1'),
    (dict(head='old'), "head: expected one of fresh, kept, centroids, got 'old'"),
    (dict(head_momentum=1.), 'head_momentum: expected at least 0 and below 1'),
    (dict(border='black'), "border: expected one of zeros, replicate, got 'black'"),
    (dict(relu=1), 'relu: expected a value of type bool'),
    (dict(calibrate='yes'), 'calibrate: .*bool'),
    (dict(clusterer='dbscan'), "clusterer: expected one of kmeans.*'dbscan'"),
    (dict(clusterer='pic', head='kept'), "head: expected 'fresh' or 'centroids', for pic .*'kept'"),
])
def test_impossible_values(tmp_path, change, message):
    with pytest.raises(ValueError, match=message): fit(replace(TINY, run_dir=str(tmp_path/'r'), **change))
    assert not (tmp_path/'r').exists()

def test_a_look_at_the_neighbors_changes_nothing(tmp_path):
    c = replace(TINY, epochs=3)
    images = prepare(c)[1]
    without, looked = fit(c, images, echo=None), fit(replace(c, knn_every=2), images, echo=None)
    assert all(torch.equal(a, b) for a,b in zip(without.net.state_dict().values(),
                                                looked.net.state_dict().values()))
    assert [r.get('knn') is not None for r in looked.log] == [False, True, True]
    # the last one by hand
    order = torch.randperm(len(images), generator=generator(c.seed, 'neighbors'))
    f, y, n = compute_features(looked.net, images, c.size)[order], images.labels[order], len(images)*4//5
    assert looked.log[-1]['knn'] == knn_accuracy(f[:n], y[:n], f[n:], y[n:], min(200, n))
    images.labels = None
    assert 'knn' not in fit(replace(c, knn_every=1, epochs=1), images, echo=None).log[0]

def test_train_with_clusters_that_stay(tmp_path, in_process):
    # and so without a time for every phase in every epoch
    assert main(['run', 'train', '--preset', 'digits', '--out', str(tmp_path/'r'), *[
        a for p in ('n_images=60', 'n_test=20', 'k=5', 'pca=8', 'epochs=2', 'passes=1', 'recluster=1',
                    'knn_every=1') for a in ('-p', p)]]) == 0
    seconds = json.loads((tmp_path/'r'/'metrics.json').read_text())['seconds']
    assert seconds['features'] > 0 and seconds['knn'] > 0

def test_the_preset_released_names_every_switch():
    given = yaml.safe_load(
        (Path(__file__).parent.parent/'nbs'/'experiments'/'presets'/'released.yaml').read_text())
    left = {f.name for f in fields(Config)} - set(given)
    assert left == {'root', 'n_images', 'n_test', 'device', 'seed', 'run_dir', 'checkpoint_minutes',
                    'checkpoint_epochs', 'knn_every', 'threads', 'compile', 'benchmark', 'graph', 'parts',
                    'sync_bn', 'compress_gradients'}
    assert given['sampler'] == 'released' and all(given[n] == getattr(Config(), n) for n in NEW)
    resolve(Config(**given))

def test_the_command_knows_pic(tmp_path):
    from deepcluster_nb.experiments import check_parameters, gather
    check_parameters(*gather('train', 'digits', dict(clusterer='pic')), tmp_path/'r')
    with pytest.raises(ValueError,
                       match="clusterer: expected one of kmeans, lloyd, pic, pic_released, got 'dbscan'"):
        check_parameters(*gather('train', 'digits', dict(clusterer='dbscan')), tmp_path/'r')

def test_the_command_continues_a_run_from_before_the_switches(tmp_path):
    from deepcluster_nb.experiments import check_parameters, gather, parameters
    notebook, given = gather('train', 'digits')
    old = {n: v for n,v in (parameters(notebook) | given).items() if n not in NEW}
    (tmp_path/'params.yaml').write_text(yaml.safe_dump(old))
    check_parameters(notebook, given, tmp_path)
    with pytest.raises(ValueError, match='relu: None there, True now'):
        check_parameters(notebook, given | dict(relu=True), tmp_path)

def test_every_draw_has_its_own_seed_epoch_and_step():
    c = resolve(Config(k=5, jitter=.4, gray=.3, seed=2, clusterer='lloyd', device='cpu'))
    assert torch.equal(config_factors(6, c, 3, 4)[0],
                       color_factors(6, generator(2, 'color', 3, 4), .4, .4, .4, .2, .3))
    x = torch.randn(60, 4, generator=generator(0, 'x'))
    for e in (0, 1):
        assert torch.equal(by_lloyd(x, c, e).centroids, lloyd(x, starting_points(x, 5, 2, e)).centroids)
    for name,sampler in SAMPLERS.items():
        drawn = [sampler(torch.arange(60) % 5, 60, seed, e).tolist() for seed,e in ((0, 0), (1, 0), (0, 1))]
        assert all(a != b for a,b in itertools.combinations(drawn, 2)), name
