("The paper's probes against a second implementation, the other measures against scikit-learn, "
 "and the experiment.")
import json, math, shutil, subprocess
from dataclasses import asdict, replace
import numpy as np, pytest, torch, yaml
from PIL import Image
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2
from deepcluster_nb import probes
from deepcluster_nb.augment import random_resized_crop
from deepcluster_nb.fast.crops import center_crop, ten_crop
from deepcluster_nb.data import generator, pick
from deepcluster_nb.sources import load_images
from deepcluster_nb.experiments import experiments_folder, gather, main, parameters
from deepcluster_nb.fast.features import PCA, compute_features
from deepcluster_nb.features import l2_normalize
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.fast.kmeans import kmeans
from deepcluster_nb.model import calibrate_bn, convnet
from deepcluster_nb.probes import (Heads, ProbeConfig, cluster_measures, conv_activations, evaluate, held_out,
                                   knn_accuracy, linear_probe, linear_probes, measure, pool_activation,
                                   pooled, probe_crop, probe_features, probe_lr, resolve_probe, supervised,
                                   train_on_labels, train_probes)
from deepcluster_nb.released import load_weights, random_twin
from deepcluster_nb.runs import load_checkpoint
from deepcluster_nb.sobel import normalize
from deepcluster_nb.fit import Config, fit
import made_runs
from made_runs import same_format, shape

QUICK = resolve_probe(ProbeConfig(size=32, epochs=3, batch_size=16, lr=.1, weight_decay=.01,
                                  layers='conv2 conv5', device='cpu', precision='float32'))

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def data():
    return (convnet('alexnet_small', 4, dropout=0., seed=1).eval(), load_images('digits', n_images=50),
            load_images('digits', split='test', n_images=20))

# the views

# sizes that Resize(256) meets without rounding
@pytest.mark.parametrize('shape', [(512, 512), (512, 768), (640, 512)])
def test_training_views_are_torchvisions(shape):
    photo = torch.randint(0, 256, (3, shape[0]//32, shape[1]//32), generator=generator(0, 'photo')).float()
    # smooth, as photographs are
    photo = F.interpolate(photo[None], shape, mode='bicubic')[0].clamp(0, 255).byte()
    ours, again = probe_crop([photo]*6, 224, generator(1, 'crop')), generator(1, 'crop')
    shift, flip = torch.randint(33, (6, 2), generator=again), torch.rand(6, generator=again) < .5
    assert len(shift.unique()) > 4 and 0 < flip.sum() < 6
    square = v2.CenterCrop(256)(v2.Resize(256, antialias=True)(photo))
    for crop,(x,y),f in zip(ours, shift.tolist(), flip):
        theirs = square[:, y:y + 224, x:x + 224]
        assert (crop - (theirs.flip(2) if f else theirs)).abs().max() <= 1                 # their rounding

def test_every_place_and_both_sides_are_drawn():
    ramp = torch.arange(256.).expand(1, 256, 256).byte()         # the first column says where the window lies
    views = probe_crop([ramp]*600, 224, generator(0, 'crop'))
    left = views[:, 0, 0].amin(1).round().long()
    assert (sorted(left.unique().tolist()) == list(range(33))
            and .4 < (views[:, 0, 0, 0] > views[:, 0, 0, -1]).float().mean() < .6)

def test_small_images_are_shown_whole():
    x = torch.randint(0, 256, (8, 1, 32, 32), generator=generator(0, 'x')).byte()
    for im,view in zip(x, probe_crop(x, 32, generator(0, 'crop'))):
        assert torch.equal(view, im.float()) or torch.equal(view, im.float().flip(2))

# the law, the pools, the heads

def test_learning_rates(): # by hand
    assert (probe_lr(.01, 1e-7, 0) == .01 and math.isclose(probe_lr(.01, 1e-7, 10**9), .01/2**.5)
            and math.isclose(probe_lr(.1, .01, 15_000), .1/4))

@pytest.mark.parametrize('name, c, side, first', [
    ('conv1', 96, 55, 1/4),
    ('conv3', 384, 13, 4/9),
    ('conv2', 256, 27, 1),
    ('conv5', 256, 13, 1)])
def test_the_border_counts_or_not(name, c, side, first): # a corner window on a map of ones
    a = torch.ones(1, c, side, side)
    assert (math.isclose(pool_activation(name, a)[0, 0], first, rel_tol=1e-6)
            and (pool_activation(name, a, count_padding=False) == 1).all())
    assert pool_activation(name, a).shape == pool_activation(name, a, count_padding=False).shape

@pytest.mark.parametrize('name, c, side', [('conv1', 96, 55), ('conv5', 256, 13), ('conv5', 64, 16)])
def test_the_maximum_of_the_same_windows(name, c, side):
    a = torch.rand(2, c, side, side, generator=generator(0))
    most, mean = (pool_activation(name, a, pool=p).view(2, c, -1) for p in ('maximum', 'average'))
    assert most.shape == mean.shape and (most >= mean).all() and (most > mean).any()
    assert set(most.flatten().tolist()) <= set(a.flatten().tolist())       # each is one of the activations
    if (name, c, side) == ('conv5', 256, 13): # by hand: 2 × 2 windows, the last row and column left out
        windows = a[..., :12, :12].unfold(2, 2, 2).unfold(3, 2, 2)
        assert torch.equal(most.view(2, c, 6, 6), windows.amax((-2, -1)))

def test_how_many_vote_and_what_is_pooled(data):
    net, train, test = data
    c = resolve_probe(ProbeConfig(size=32, pca=8, protocol='cached', layers='conv1', device='cpu',
                                  precision='float32'))
    ours, theirs = (measure(net, train, test, replace(c, **o))
                    for o in ({}, dict(neighbors=3, pool='maximum')))
    f, g = (compute_features(net, im, 32) for im in (train, test))
    assert theirs['knn']['0.1'] == knn_accuracy(f, train.labels, g, test.labels, 3)
    a, b = (probe_features(net, im, 32, pool='maximum')['conv1'] for im in (train, test))
    assert theirs['probes']['conv1']['center'] == linear_probe(a, train.labels, b, test.labels)
    assert ours['probes'] != theirs['probes']
    for wrong in (dict(neighbors=0), dict(pool='max'), dict(lr=.1, protocol='cached'),
                  dict(test_every=2, protocol='cached')):
        with pytest.raises(ValueError, match=next(iter(wrong))): resolve_probe(ProbeConfig(**wrong))

def test_ten_crops_vote_with_their_softmax(monkeypatch): # by logits a single sure crop would outvote nine
    logits = torch.tensor([[0., 1]]*9 + [[30., 0]]).repeat(2, 1)
    class Sure(nn.Module):
        def forward(self, feats): return dict(conv1=logits)
    monkeypatch.setattr(probes, 'pooled', lambda *args: None)
    images = PackedImages(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), labels=[1, 1])
    c = ProbeConfig(size=8, device='cpu')
    assert probes.probe_accuracies(None, Sure(), images, c) == dict(conv1=dict(center=100., ten=100.))

def test_heads_start_as_pytorchs_linear_layers():
    heads = Heads(dict(a=torch.zeros(2, 400), b=torch.zeros(2, 100)), {}, 50)
    for name,d in (('a', 400), ('b', 100)):
        l, theirs = heads.linear[name], nn.Linear(d, 50)
        for p,q in ((l.weight, theirs.weight), (l.bias, theirs.bias)):
            assert (p.abs().max() <= d**-.5 and abs(float(p.detach().std()/q.detach().std()) - 1) < .35
                    and p.shape == q.shape)
    assert (abs(float(heads.linear['a'].weight.detach().std()) - 400**-.5/3**.5) < 1e-3
            and not torch.equal(heads.linear['a'].bias, heads.linear['b'].bias))
    again = Heads(dict(b=torch.zeros(2, 100)), {}, 50)
    assert torch.equal(again.linear['b'].weight, heads.linear['b'].weight)           # whatever else is probed

# training

def by_hand(net, train, test, c, layer):
    # → (weight, bias, [(ten, center) an epoch]); one probe, as the released code trains it
    d = dict(conv2=192*7*7, conv5=256*4*4)[layer]
    def feats(x):
        with torch.no_grad():
            return F.adaptive_avg_pool2d(conv_activations(net, normalize(x))[layer],
                                         {'conv2': 7, 'conv5': 4}[layer]).flatten(1)
    start = Heads({layer: torch.zeros(1, d)}, {}, 10, seed=c.seed).linear[layer]
    w, b = (p.detach().clone().requires_grad_() for p in (start.weight, start.bias))
    velocity, t, found = [torch.zeros_like(w), torch.zeros_like(b)], 0, []
    for epoch in range(c.epochs):
        for step,idx in enumerate(
            torch.randperm(len(train), generator=generator(c.seed, 'probe', epoch)).split(c.batch_size)):
            x = feats(probe_crop(train.batch(idx), c.size, generator(c.seed, 'probe crop', epoch, step)))
            grads = torch.autograd.grad(
                -F.log_softmax(x @ w.T + b, 1)[torch.arange(len(idx)), train.labels[idx]].mean(), (w, b))
            lr = c.lr / (1 + c.lr*c.weight_decay*t)**.5
            for p,v,g in zip((w, b), velocity, grads):
                v.mul_(c.momentum).add_(g + c.weight_decay*p.detach())
                with torch.no_grad(): p -= lr*v
            t += 1
        ten = torch.stack([torch.stack([(feats(view[None]) @ w.T + b).softmax(1)[0] for view in views])
                           .mean(0) for views in ten_crop(test.batch(torch.arange(len(test))), c.size)])
        one = feats(center_crop(test.batch(torch.arange(len(test))), c.size)) @ w.T + b
        found.append([100*float((p.argmax(1) == test.labels).float().mean()) for p in (ten, one)])
    return w, b, found

def test_the_probes_are_those_by_hand(data, tmp_path):
    net, train, test = data
    c = replace(QUICK, epochs=2, weight_decay=.05)
    probes = train_probes(net, train, test, c, tmp_path/'kept')
    saved = load_checkpoint(tmp_path/'kept')[2]
    for layer in ('conv2', 'conv5'):
        w, b, found = by_hand(net, train, test, c, layer)
        torch.testing.assert_close(saved[f'net.linear.{layer}.weight'], w.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(saved[f'net.linear.{layer}.bias'], b.detach(), rtol=1e-3, atol=1e-5)
        for i,crop in enumerate(('ten', 'center')):
            assert (abs(probes[layer][crop]['last'] - found[-1][i]) < 1e-3
                    and abs(probes[layer][crop]['best'] - max(f[i] for f in found)) < 1e-3)

@pytest.mark.parametrize('more', [{}, dict(head_norm=True, nesterov=True, schedule='steps', crops='resized',
                                           ten_crops=False)])
def test_one_probe_learns_the_same_alone_and_the_trunk_stays(data, more):
    net, train, test = data
    before = {n: t.clone() for n,t in net.state_dict().items()}
    together, alone = (train_probes(net, train, test, replace(QUICK, layers=l, **more))
                       for l in ('conv2 conv5', 'conv5'))
    assert (together['conv5'] == alone['conv5'] and list(alone) == ['conv5']
            and set(alone['conv5']) == ({'ten', 'center'} if not more else {'center'}))
    assert (all(torch.equal(t, before[n]) for n,t in net.state_dict().items())
            and all(p.grad is None for p in net.parameters()))

class Stop(Exception): pass

def test_stopped_and_called_again(data, tmp_path):
    net, train, test = data
    def stop(done, n, epoch, *_):
        if (epoch, done) == (2, 2): raise Stop
    whole = train_probes(net, train, test, QUICK)
    with pytest.raises(Stop): train_probes(net, train, test, QUICK, tmp_path/'p', stop)
    epochs = []
    assert train_probes(net, train, test, QUICK, tmp_path/'p',
                        lambda done, n, epoch, tests: epochs.append(epoch)) == whole and set(epochs) == {2}
    c = replace(QUICK, arch='alexnet_small', sobel=True, supervised=3, dropout=0.)
    whole = supervised(train, c)
    with pytest.raises(Stop): supervised(train, c, tmp_path/'s', stop)
    again = supervised(train, c, tmp_path/'s')
    assert all(torch.equal(a, b) for a,b in zip(whole.state_dict().values(), again.state_dict().values()))

def test_steps_of_the_rate(data, monkeypatch):
    net, train, test = data
    rates = []
    class Spy(torch.optim.SGD):
        def step(self): rates.append(self.param_groups[0]['lr']); return super().step()
    monkeypatch.setattr(torch.optim, 'SGD', Spy)
    train_probes(net, train, test, replace(QUICK, epochs=6, batch_size=64, lr=1., schedule='steps',
                                           layers='conv5', ten_crops=False))
    assert np.allclose(rates, [1, 1, .1, .1, .01, .01])

def test_resnets_five_places_and_their_average():
    net, x = convnet('resnet18', 5).eval(), torch.randn(2, 3, 32, 32, generator=generator(0, 'x'))
    with torch.no_grad():
        acts = conv_activations(net, x, pool_activation, avgpool=True)
        assert list(acts) == [f'conv{i}' for i in range(1, 6)] + ['avgpool']
        torch.testing.assert_close(acts['avgpool'], net.embed(x))
        assert list(conv_activations(net, x)) == [f'conv{i}' for i in range(1, 6)]

def test_a_layer_that_is_not_there_is_named(data):
    net, train, test = data
    with pytest.raises(ValueError, match='layers: expected some of conv1, .*got .conv9'):
        measure(net, train, test, replace(QUICK, protocol='cached', layers='conv9'))

def test_features_that_are_not_finite_are_an_error():
    x = torch.randn(40, 6, generator=generator(0, 'x'))
    x[3, 2] = float('inf')
    with pytest.raises(FloatingPointError, match='in 1 of 6 columns'):
        linear_probe(x, torch.arange(40) % 2, torch.randn(8, 6), torch.arange(8) % 2)

def test_a_loss_that_is_not_finite_is_an_error(data):
    net, train, test = data
    with pytest.raises(FloatingPointError, match='smaller lr'):
        train_probes(net, train, test, replace(QUICK, lr=1e38, momentum=0., weight_decay=0.))

# neighbors and clusters

def test_neighbors_by_hand_at_both_temperatures():
    g = generator(0, 'knn')
    x, q, y = (torch.randn(50, 6, generator=g), torch.randn(15, 6, generator=g),
               torch.randint(0, 4, (50,), generator=g))
    for T in (.07, .1, .002):                      # the last would overflow as exp(1/T)
        s = (q / q.norm(dim=1, keepdim=True)).double() @ (x / x.norm(dim=1, keepdim=True)).double().T
        said = torch.stack([torch.stack(
            [sum(((v - r.max())/T).exp() for v,l in zip(r, y) if l == c and v >= r.sort().values[-9])
             + torch.zeros(()) for c in range(4)]) for r in s]).argmax(1)
        assert knn_accuracy(x, y, q, said, 9, T) == 100

def test_clusters_are_held_against_labels_as_scikit_learn_does():
    f, y = torch.randn(90, 12, generator=generator(0, 'f')), torch.arange(90) % 3
    f[:, 0] += 4*y
    m = cluster_measures(f, y, pca=5, seed=2)
    a = kmeans(l2_normalize(PCA(5).fit(f).transform(f)), 3, 20, 2).assign
    assert math.isclose(m['nmi'], normalized_mutual_info_score(y, a, average_method='geometric'),
                        abs_tol=1e-6)
    assert math.isclose(m['ami'], adjusted_mutual_info_score(y, a, average_method='geometric'), abs_tol=1e-6)
    from itertools import permutations
    assert math.isclose(m['accuracy'], max(100*float((torch.tensor(p)[a] == y).float().mean())
                                           for p in permutations(range(3))),
                        abs_tol=1e-3)
    assert m['k'] == 3 and 30 < m['accuracy_chance'] < 60 and m['nmi_chance'] < .1

def test_few_points_in_many_dimensions_are_the_same_points():
    f, y = torch.randn(30, 40, generator=generator(0, 'f')), torch.arange(30) % 3
    f[:, 0] += 9*y
    # without the turn into their own 30 dimensions
    a = kmeans(l2_normalize(PCA(4).fit(f).transform(f)), 3, 20).assign
    assert math.isclose(cluster_measures(f, y, pca=4)['nmi'],
                        normalized_mutual_info_score(y, a, average_method='geometric'), abs_tol=1e-6)

def test_all_training_images_where_asked(monkeypatch):
    monkeypatch.setattr('deepcluster_nb.probes.MOST_PROBED', 30)
    images, c = load_images('digits', n_images=60), Config(n_test=10)
    assert (len(held_out(c, images)[0]) in (30, 60) and len(held_out(c, images, most=20)[0]) == 20
            and len(held_out(c, images, most=0)[0]) == 60)

# the experiment

def test_the_notebook_takes_the_names_of_probe_config():
    assert parameters(experiments_folder()/'probe.ipynb') == asdict(ProbeConfig())

def test_the_papers_values():
    c = ProbeConfig()
    assert ((c.epochs, c.batch_size, c.lr, c.momentum, c.weight_decay, c.ten_crops, c.count_padding,
             c.schedule)
            == (90, 256, .01, .9, 1e-7, True, True, 'released'))
    for preset in ('probe_imagenet', 'probe_places'):
        given = gather('probe', preset)[1]
        assert ({k: given[k] for k in ('epochs', 'batch_size', 'lr', 'momentum', 'weight_decay', 'ten_crops',
                                       'count_padding')}
                == {k: getattr(c, k) for k in ('epochs', 'batch_size', 'lr', 'momentum', 'weight_decay',
                                               'ten_crops', 'count_padding')})

TINY = dict(epochs=2, batch_size=16, lr=.1, supervised=1, min_scale=.5, dropout=0., n_images=40, n_test=20,
            layers='conv1 conv5')
def pairs(**more): # cached probes have their own epochs and rate
    values = {k: v for k,v in TINY.items() if more.get('protocol') != 'cached' or k not in ('epochs', 'lr')}
    return [x for k,v in (values | more).items() for x in ('-p', f'{k}={v}')]

@pytest.fixture(scope='module')
def run_of_train(tmp_path_factory):
    where = tmp_path_factory.mktemp('train')/'r'
    fit(Config(n_images=40, k=4, pca=8, epochs=1, passes=1, batch_size=16, device='cpu', precision='float32',
               threads=1, run_dir=str(where)),
        echo=None)
    return where

def test_a_run_beside_its_neighbors(run_of_train, tmp_path, capsys):
    where, names = tmp_path/'probe', ['random', 'random_calibrated', 'supervised', 'deepcluster']
    assert main(['run', 'probe', '--out', str(where), *pairs(weights=run_of_train)]) == 0
    out, text = capsys.readouterr().out, (where/'metrics.json').read_text()
    m, mine = same_format(where, made_runs.probe(tmp_path/'made', ('conv1', 'conv5')))
    assert m == json.loads(text) and shape(m['knn']) == shape(mine['knn'])
    for key in ('probes', 'probes_best', 'probes_center', 'probes_center_best'):
        assert shape(m[key]) == shape(mine[key])
        assert (list(m[key]) == names
                and all(list(v) == ['conv1', 'conv5'] and all(0 <= x <= 100 for x in v.values())
                        for v in m[key].values()))
    assert all(m['probes_best'][n][l] >= m['probes'][n][l] for n in names for l in ('conv1', 'conv5'))
    assert (all(list(m[k]) == names for k in ('knn', 'knn_007'))
            and all(set(v) == {'k', 'accuracy', 'accuracy_chance', 'nmi', 'nmi_chance', 'ami'}
                    for v in m['clusters'].values()))
    assert ('random, calibrated: conv1' in out and 'linear probe conv5' in out and 'DeepCluster' in out
            and 'labels' in out)
    assert not list((where/'checkpoint').glob('*/*')) and (where/'figures'/'probes.png').exists()
    html = (where/'report.html').read_text()
    assert all(w in html for w in ('Ten crops', 'Central crop', 'random, calibrated', 'T = 0.07', 'T = 0.1',
                                   'k-means accuracy', 'AMI'))
    assert m['probes']['random'] != m['probes']['random_calibrated']
    results = json.loads((where/'results.json').read_text())
    for key,T in dict(knn='0.1', knn_007='0.07').items():
        assert m[key] == {n: results[n]['knn'][T] for n in names}
    for r in results.values(): # results that tell the last epoch from the best one, and the crops apart
        for i,p in enumerate(r['probes'].values()):
            p |= dict(ten=dict(last=10. + i, best=20. + i), center=dict(last=30. + i, best=40. + i))
    (where/'results.json').write_text(json.dumps(results))
    subprocess.run(['papermill', str(experiments_folder()/'probe.ipynb'), str(tmp_path/'out.ipynb'),
                    *[x for k,v in (TINY | dict(weights=run_of_train, run_dir=where)).items()
                      for x in ('-p', k, str(v))], '--no-progress-bar'],
                   check=True, capture_output=True)
    # plain papermill, in the same folder: everything is done, and nothing measured anew
    again = json.loads((where/'metrics.json').read_text())
    for key,first in dict(probes=10., probes_best=20., probes_center=30., probes_center_best=40.).items():
        assert again.pop(key) == {n: dict(conv1=first, conv5=first + 1) for n in names}
    assert again == {k: v for k,v in m.items() if not k.startswith('probes')}
    text = (tmp_path/'out.ipynb').read_text()
    assert r'| conv5 | 11.0\u00a0(21.0)' in text or '| conv5 | 11.0\N{NO-BREAK SPACE}(21.0)' in text

def same_state(a, b):
    return all(torch.equal(v, b.state_dict()[n]) for n,v in a.state_dict().items())

@pytest.mark.parametrize('given', ['weights', 'nothing'])
def test_no_network_is_made_of_test_images(run_of_train, tmp_path, monkeypatch, in_process, given):
    seen, taught = [], []
    levels = [30., 35., 60., 40.]                       # random, calibrated, on labels, DeepCluster
    def measured(net, train, test, config, *more):
        seen.append((net, train, test, config))
        level = levels[len(seen) - 1]
        return dict(probes=dict(conv5=dict(center=dict(last=level, best=level + 2))),
                    knn={'0.07': 1., '0.1': 2.},
                    clusters=dict(k=10, accuracy=20., accuracy_chance=11., nmi=.3, nmi_chance=.1, ami=.2))
    def labels(images, *more):
        taught.append((images, convnet('alexnet_small', 10)))
        return taught[0][1]
    monkeypatch.setattr(probes, 'measure', measured)
    monkeypatch.setattr(probes, 'supervised', labels)
    more = dict(weights=run_of_train) if given == 'weights' else dict(sobel=False)
    assert main(['run', 'probe', '--out', str(tmp_path/'r'),
                 *pairs(protocol='cached', device='cpu', seed=3, **more)]) == 0
    train, test = (load_images('digits', None, s, n, 3) for s,n in (('train', 40), ('test', 20)))
    ours = load_weights(run_of_train)[0]
    twin = random_twin(ours, 3) if given == 'weights' else convnet('alexnet_small', 10, False, 0., 3).eval()
    nets = [net for net,*_ in seen]
    assert same_state(nets[0], twin) and not nets[0].training
    calibrate_bn(twin, train, 32)
    assert same_state(nets[1], twin) and nets[2] is taught[0][1]
    for images in (taught[0][0], *(x for _,x,_,_ in seen)): assert torch.equal(images.labels, train.labels)
    assert all(torch.equal(x.labels, test.labels) for _,_,x,_ in seen)
    assert all((c.seed, c.size, c.sobel) == (3, 32, given == 'weights') for *_,c in seen)
    text = (tmp_path/'r'/'notebook.ipynb').read_text().replace('\N{NO-BREAK SPACE}', ' ')
    row = '| conv5 | 30.0 (32.0) | 35.0 (37.0) | 60.0 (62.0) |'
    assert (row + ' 40.0 (42.0) | +5.0 |' if given == 'weights' else row) in text
    if given == 'weights': assert same_state(nets[3], ours)
    assert len(nets) == 3 + (given == 'weights')

def test_a_folder_from_before_a_parameter_goes_on(run_of_train, tmp_path, capsys, in_process):
    where = tmp_path/'probe'
    small = pairs(weights=run_of_train, protocol='cached', supervised=0, layers='conv5')
    assert main(['run', 'probe', '--out', str(where), *small]) == 0
    text = (where/'metrics.json').read_text()
    params = yaml.safe_load((where/'params.yaml').read_text())
    older = {k: v for k,v in params.items() if k not in ('pool', 'neighbors')}
    (where/'params.yaml').write_text(yaml.safe_dump(older, sort_keys=False))
    assert main(['run', 'probe', '--out', str(where), *small]) == 0         # they have their defaults
    assert (where/'metrics.json').read_text() == text
    capsys.readouterr()
    assert main(['run', 'probe', '--out', str(where), *small, '-p', 'neighbors=10']) == 2
    assert 'neighbors' in capsys.readouterr().err

def test_other_weights_in_the_same_place_are_refused(tmp_path, capsys, in_process):
    def trained(seed):
        fit(Config(n_images=40, k=4, pca=8, epochs=1, passes=1, batch_size=16, device='cpu',
                   precision='float32', threads=1, seed=seed, relu=True,
                   run_dir=str(tmp_path/'run')), echo=None)
    small = ['run', 'probe', '--out', str(tmp_path/'probe'),
             *pairs(weights=tmp_path/'run', protocol='cached', supervised=0, layers='conv5')]
    trained(0)
    for _ in range(2): assert main(small) == 0
    text = (tmp_path/'probe'/'metrics.json').read_text()
    shutil.rmtree(tmp_path/'run')
    trained(1)
    capsys.readouterr()
    assert main(small) != 0
    assert 'weights: expected those that the run' in capsys.readouterr().err
    assert (tmp_path/'probe'/'metrics.json').read_text() == text

def test_a_released_file_on_a_folder_with_train_and_val(tmp_path, in_process):
    from test_released import authors_state, write
    g = np.random.default_rng(0)
    for split,n in (('train', 6), ('val', 3)):
        for c in 'ab':
            (tmp_path/'photos'/split/c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(g.integers(0, 256, (40, 36 + i, 3), dtype=np.uint8)).save(
                    tmp_path/'photos'/split/c/f'{i}.png')
    path = write(tmp_path/'checkpoint.pth.tar', authors_state('alexnet'))
    assert main(['run', 'probe', '--out', str(tmp_path/'run'),
                 *pairs(weights=path, dataset='folder', root=tmp_path/'photos', n_images=0, n_test=0,
                        protocol='cached', supervised=0, layers='conv5')]) == 0
    m = json.loads((tmp_path/'run'/'metrics.json').read_text())
    assert ((m['arch'], m['size'], m['n_images'], m['n_test'], m['crops'])
            == ('alexnet', 224, 12, 6, 'center')
            and list(m['probes']) == ['random', 'random_calibrated', 'deepcluster'])
    assert (tmp_path/'checkpoint.pth.tar.sha256').exists()

@pytest.mark.parametrize('pair, message', [
    ('weights=nowhere', "weights: no run and no file at 'nowhere'"),
    ('schedule=cosine', "schedule: expected one of released, steps, got 'cosine'"),
    ('epochs=0', 'epochs: expected at least 1, got 0'),
    ('size=8', 'size: expected 31 to 134'),
    ('arch=lenet', "arch: expected one of .*'lenet'"),
    ('nesterov=1', "nesterov: expected a value of type bool"),
    ('sha256=abc', "sha256: expected none, for weights is not a file"),
    ('root=/no/such', "root: no folder '/no/such'")])
def test_wrong_input_is_found_before_a_kernel_starts(tmp_path, capsys, monkeypatch, pair, message):
    import re, papermill
    monkeypatch.setattr(papermill, 'execute_notebook', None)
    assert main(['run', 'probe', '--out', str(tmp_path/'run'), '-p', pair,
                 *(['-p', 'dataset=folder'] if 'root' in pair else [])]) == 2
    err = capsys.readouterr().err.strip()
    assert re.search(message, err) and len(err.splitlines()) == 1 and not (tmp_path/'run').exists()

@pytest.mark.parametrize('protocol', ['paper', 'cached'])
def test_a_wrong_layer_leaves_no_folder(tmp_path, capsys, in_process, protocol):
    assert main(['run', 'probe', '--out', str(tmp_path/'run'),
                 *pairs(protocol=protocol, layers='conv5 conv9')]) != 0
    assert 'layers: expected some of conv1, conv2' in capsys.readouterr().err
    assert not (tmp_path/'run'/'params.yaml').exists()

def test_evaluate_learns_on_one_set_and_tests_on_another(data):
    net, train, test = data
    found = evaluate(net, train, test, 32)
    a, b = (probe_features(net, im, 32) for im in (train, test))
    assert found['probes'] == linear_probes(a, train.labels, b, test.labels)
    f, g = (compute_features(net, im, 32) for im in (train, test))
    assert found['knn'] == knn_accuracy(f, train.labels, g, test.labels, min(200, len(f)))
    wrong = test.subset(torch.arange(len(test)))
    wrong.labels = (test.labels + 1) % 10
    shifted = evaluate(net, train, wrong, 32)
    assert shifted['knn'] < found['knn'] and shifted['probes']['conv5'] != found['probes']['conv5']

def test_as_many_neighbors_vote_as_elsewhere(monkeypatch):
    net, asked = convnet('alexnet_small', 5).eval(), []
    monkeypatch.setattr('deepcluster_nb.probes.knn_accuracy',
                        lambda f, y, g, t, k, T=.1: asked.append(k) or 0.)
    monkeypatch.setattr('deepcluster_nb.probes.linear_probes', lambda *a, **how: {})
    images = load_images('digits', n_images=230)
    evaluate(net, images, images.subset([1, 2]), 32)
    assert asked == [200]

def test_what_is_held_out_is_not_trained_on(tmp_path):
    for i in range(23):
        (tmp_path/f'class {i % 2}').mkdir(exist_ok=True)
        Image.new('RGB', (30, 30)).save(tmp_path/f'class {i % 2}'/f'{i}.png')
    images = load_images('folder', tmp_path)
    for n_test in (0, 2):
        train, test = held_out(Config(dataset='folder', root=str(tmp_path), n_test=n_test), images)
        parts = [set(map(str, part.paths)) for part in (train, test)]
        assert not parts[0] & parts[1] and parts[0] | parts[1] == set(map(str, images.paths))
        assert len(test) == (n_test or 4)

def test_steps_of_a_cached_probe(monkeypatch): # by hand
    seen, learn = [], probes.Probe.learn
    def noted(self, idx, y, rate):
        seen.append((idx, rate, {n: self.opt.param_groups[0][n] for n in ('momentum', 'weight_decay')}))
        learn(self, idx, y, rate)
    monkeypatch.setattr(probes.Probe, 'learn', noted)
    x, y = torch.randn(50, 6, generator=generator(0, 'x')), torch.arange(50) % 5
    linear_probe(x, y, x, y, epochs=3, batch_size=20, seed=4)
    order = [torch.randperm(50, generator=generator(4, 'probe', epoch)) for epoch in range(3)]
    idx, rates, constants = zip(*seen)
    assert torch.equal(torch.cat(idx), torch.cat(order)) and len(idx) == 9
    assert rates == pytest.approx([5*(1 + math.cos(math.pi*t/9))/2 for t in range(9)])
    assert constants == (dict(momentum=.9, weight_decay=1e-5),)*9
    # a thousand steps, but 15 to 100 epochs
    assert [probes.probe_epochs(n) for n in (100, 1281, 5000, 50_000)] == [100, 91, 25, 15]

def test_probes_leave_batch_norm_as_it_is(data):
    net, train, test = data
    before = {n: t.clone() for n,t in net.state_dict().items()}
    one = train_probes(net.eval(), train, test, replace(QUICK, layers='conv5', epochs=1))
    assert train_probes(net.train(), train, test, replace(QUICK, layers='conv5', epochs=1)) == one
    assert all(torch.equal(t, before[n]) for n,t in net.state_dict().items())
    net.eval()

def test_the_supervised_rate_falls_like_a_cosine(monkeypatch, data):
    _, train, _ = data
    seen = []
    monkeypatch.setattr('deepcluster_nb.probes.train_on_labels',
                        lambda net, images, config, rates, *more: seen.extend(rates) or net)
    supervised(train, replace(QUICK, supervised=4))
    assert np.allclose(np.array(seen)/seen[0], [(1 + np.cos(np.pi*t/4))/2 for t in range(4)])

def test_mmselfsups_probe_is_that_by_hand(data, tmp_path):
    net, train, test = data
    c = replace(QUICK, layers='conv5', lr=.05, head_norm=True, nesterov=True, schedule='steps',
                crops='resized', min_scale=.5, ten_crops=False)
    found, saved = train_probes(net, train, test, c, tmp_path), load_checkpoint(tmp_path)[2]
    heads = Heads(dict(conv5=torch.zeros(1, 4096)), dict(conv5=256), 10, True, c.seed)
    opt = torch.optim.SGD(heads.parameters(), c.lr, .9, weight_decay=c.weight_decay, nesterov=True)
    def logits(x):
        with torch.no_grad(): a = conv_activations(net, normalize(x))['conv5'].flatten(1)
        return heads(dict(conv5=a))['conv5']
    for epoch in range(3):
        opt.param_groups[0]['lr'] = c.lr * .1**epoch
        order = torch.randperm(50, generator=generator(c.seed, 'probe', epoch))
        for step,idx in enumerate(order.split(16)):
            g = generator(c.seed, 'probe crop', epoch, step)
            x = random_resized_crop(train.batch(idx), 32, g, (.5, 1.))
            opt.zero_grad()
            F.cross_entropy(logits(x), train.labels[idx]).backward()
            opt.step()
    for name,t in heads.state_dict().items():
        torch.testing.assert_close(saved[f'net.{name}'], t, rtol=1e-3, atol=1e-5)
    heads.eval()
    right = logits(center_crop(test.batch(torch.arange(20)), 32)).argmax(1) == test.labels
    assert found['conv5']['center']['last'] == pytest.approx(100*float(right.float().mean()))

@pytest.mark.parametrize('how', [dict(count_padding=False), dict(pool='maximum')])
def test_pools_are_as_asked(data, monkeypatch, how): # by both protocols
    net, x = convnet('alexnet', 2).eval(), torch.randn(1, 3, 224, 224, generator=generator(0, 'x'))
    c = replace(QUICK, size=224, layers='conv1', **how)
    with torch.no_grad(): a = conv_activations(net, x)['conv1']
    torch.testing.assert_close(pooled(net, x, c)['conv1'], pool_activation('conv1', a, **how))
    seen, real = [], probes.probe_features
    def noted(*args, **how): seen.append(how); return real(*args, **how)
    monkeypatch.setattr(probes, 'probe_features', noted)
    measure(*data, replace(c, size=32, pca=8, protocol='cached'))
    _, *measured = seen                                                # the first one lists the layers
    assert len(measured) == 2 and all(how.items() <= s.items() for s in measured)

def test_labels_are_learned_as_the_configuration_says(data, monkeypatch):
    seen, c = [], replace(QUICK, min_scale=.9, seed=2)
    def noted(net, images, order, y, opts, config, epoch, **how):
        group = {k: opts[0].param_groups[0][k] for k in ('momentum', 'weight_decay')}
        seen.append((order, y, opts[0].defaults['lr'], group, config.min_scale, config.seed,
                     config.batch_size))
    monkeypatch.setattr(probes, 'train_epoch', noted)
    train_on_labels(convnet('alexnet_small', 10, seed=3), data[1], c, [.02, .01], weight_decay=.1)
    for epoch,(order, y, *more) in enumerate(seen):
        assert torch.equal(order, torch.randperm(50, generator=generator(2, 'supervised', epoch)))
        assert torch.equal(y, data[1].labels)
        assert more == [[.02, .01][epoch], dict(momentum=.9, weight_decay=.1), .9, 2, 16]

def test_the_supervised_network_has_its_dropout_and_decay(monkeypatch, data):
    made = []
    monkeypatch.setattr(probes, 'train_on_labels', lambda *args: made.append(args) or args[0])
    supervised(data[1], replace(QUICK, supervised=4, dropout=.3, batch_size=256))
    (net, _, c, *_, decay), = made
    assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {.3}
    assert (c.batch_size, decay) == (128, 1e-4)

def test_a_part_of_the_images_votes_at_both_temperatures(data, monkeypatch):
    net, train, test = data
    asked, real = [], probes.knn_accuracy
    def noted(*args): asked.append(args[4:]); return real(*args)
    monkeypatch.setattr(probes, 'knn_accuracy', noted)
    c = replace(QUICK, protocol='cached', layers='conv1', pca=8, n_bank=30, seed=1)
    found, rows = measure(net, train, test, c), pick(50, 30, 1)
    f, g = (compute_features(net, im, 32) for im in (train.subset(rows), test))
    y = train.labels[rows]
    assert asked == [(30, .07), (30, .1)]
    assert found['knn'] == {f'{T:g}': real(f, y, g, test.labels, 30, T) for T in (.07, .1)}
    assert found['clusters'] == cluster_measures(f, y, 8, 1)
