"The loop in the open, and fit with plain and with fast parts: the same algorithm."
import os, signal
from dataclasses import replace
import pytest, torch
from deepcluster_nb import fit as around, training
from deepcluster_nb.data import digits
from deepcluster_nb.fast import training as fast
from deepcluster_nb.fit import Config, Hooks, fit, load_run, predict, resolve
from deepcluster_nb.runs import Stopped

pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = Config(dataset='digits', n_images=200, k=10, pca=16, epochs=2, passes=1, batch_size=40, min_scale=.5,
               precision='float32', device='cpu', parts='plain')
IMAGES = digits('train').subset(range(200))

def same(a, b): return all(torch.equal(p, q) for p,q in zip(a.state_dict().values(), b.state_dict().values()))

@pytest.fixture(scope='module')
def plain():
    torch.set_num_threads(1)
    return fit(SMALL, IMAGES, echo=None)

def test_fit_with_plain_parts_is_the_loop_in_the_open(plain):
    net, clustering, log = training.deepcluster(IMAGES, resolve(SMALL), labels=IMAGES.labels)
    assert same(net, plain.net) and torch.equal(clustering.assign, plain.clustering.assign)
    assert [r['loss'] for r in log] == [r['loss'] for r in plain.log]
    assert [r['nmi_labels'] for r in log] == [r['nmi_labels'] for r in plain.log]

def test_the_first_clusters_of_fast_parts_are_the_same():
    c = resolve(replace(SMALL, parts='fast'))
    net = training.convnet(c.arch, c.k, dropout=0., seed=c.seed)
    (a, p), (b, q) = training.cluster(net, IMAGES, c, 0), fast.cluster(net, IMAGES, c, 0)
    # features rest as float16 between the two passes
    assert (a.assign == b.assign).float().mean() > .98
    assert abs(a.objective[-1] - b.objective[-1]) < 1e-3 * a.objective[-1]
    assert torch.allclose(p.mean.double(), q.mean.double(), atol=1e-3)

@pytest.mark.parametrize('weights', [None, torch.linspace(.5, 1.5, 10)])
@pytest.mark.parametrize('sobel, dropout', [(True, 0.), (False, .5)])
def test_an_epoch_of_fast_parts_is_the_same_to_rounding(weights, sobel, dropout):
    c, losses = resolve(replace(SMALL, sobel=sobel, dropout=dropout, lr=1e-4, parts='fast')), []
    assign, idx = torch.arange(200) % 10, torch.arange(200)
    for train_epoch in (training.train_epoch, fast.train_epoch):
        net, seen = training.convnet(c.arch, c.k, sobel, dropout, seed=1), []
        opts = (training.sgd(training.trunk_parameters(net), c, .9),
                training.sgd(net.top_layer.parameters(), c))
        mean = train_epoch(net, IMAGES, idx, assign, opts, c, 3, weights,
                           lambda done, n, total, *_: seen.append((done, n, float(total))))
        assert [s[:2] for s in seen] == [(i + 1, 5) for i in range(5)] and abs(mean - seen[-1][2]/200) < 1e-6
        losses.append(torch.tensor([s[2] for s in seen]).diff(prepend=torch.zeros(1)) / 40)
    # float32 sums of other orders; a small learning rate keeps them from growing
    assert torch.allclose(*losses, rtol=2e-4)

def test_a_last_image_alone_joins_the_batch_before():
    assert [len(b) for b in training.batches(torch.arange(81), 40)] == [40, 41]
    assert [len(b) for b in training.batches(torch.arange(82), 40)] == [40, 40, 2]
    assert [len(b) for b in training.batches(torch.arange(1), 40)] == [1]

@pytest.mark.parametrize('at', [(0, 2), (1, 0), (1, 3)])
def test_a_plain_run_goes_on_in_the_same_bits(tmp_path, monkeypatch, plain, at):
    c, real = replace(SMALL, run_dir=str(tmp_path/'r')), Hooks.after_step
    def after_step(self, done, n, *more): # SIGTERM in that step; 0: with the first features of the epoch
        if (self.state.epoch, done) == at: os.kill(os.getpid(), signal.SIGTERM)
        real(self, done, n, *more)
    with monkeypatch.context() as m:
        m.setattr(Hooks, 'after_step', after_step)
        if not at[1]:
            cluster = training.cluster
            def stopped(net, images, config, epoch):
                if epoch == at[0]: os.kill(os.getpid(), signal.SIGTERM)
                return cluster(net, images, config, epoch)
            m.setattr(training, 'cluster', stopped)
        with pytest.raises(Stopped, match='SIGTERM came'): fit(c, IMAGES, echo=None)
    run = fit(c, IMAGES, echo=None)
    assert same(run.net, plain.net) and [r['loss'] for r in run.log] == [r['loss'] for r in plain.log]
    assert torch.equal(load_run(c.run_dir).clustering.assign, plain.clustering.assign)
    assert torch.equal(predict(load_run(c.run_dir), IMAGES), plain.clustering.assign)

def test_a_plain_loss_that_is_no_number_ends_the_run(monkeypatch):
    with pytest.raises(FloatingPointError, match='loss is not finite in epoch 0'):
        fit(replace(SMALL, lr=1e30), IMAGES, echo=None)

@pytest.mark.parametrize('name, value', [('clusterer', 'pic'), ('backend', 'faiss'), ('compile', True),
                                         ('lr_schedule', 'cosine'), ('precision', 'bfloat16'),
                                         ('center_box', 'torchvision'), ('jitter', .4), ('gray', .2)])
def test_what_plain_parts_do_not_have_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .* with parts='plain', got {value!r}"):
        resolve(replace(SMALL, **{name: value}))

@pytest.mark.parametrize('more', [dict(sampler='weighted'), dict(sampler='released'), dict(head='kept'),
                                  dict(head='centroids', calibrate=True), dict(head_momentum=.5),
                                  dict(border='replicate'), dict(relu=True), dict(sampler='shuffled'),
                                  dict(recluster=1, epochs=2)])
def test_every_other_switch_works_with_plain_parts(more):
    run = fit(replace(SMALL, **dict(epochs=1) | more), IMAGES, echo=None)
    assert run.log[0]['loss'] > 0 and len(run.clustering.assign) == 200

def test_parts_are_handed_in(monkeypatch):
    seen, parts = [], around.PARTS['fast']
    def cluster(*args): seen.append('cluster'); return parts.cluster(*args)
    def train_epoch(*args): seen.append('train'); return parts.train_epoch(*args)
    monkeypatch.setitem(around.PARTS, 'mine', replace(parts, cluster=cluster, train_epoch=train_epoch))
    fit(replace(SMALL, parts='mine'), IMAGES, echo=None)
    assert seen == ['cluster', 'train']*2 + ['cluster']

def test_a_step_by_hand(): # sgd is shared by all parts, so their equality does not see its constants
    c = resolve(replace(SMALL, lr=.1, weight_decay=.02))
    p = torch.tensor([1., -2.], requires_grad=True)
    opt = training.sgd([p], c, .9)
    steps, momentum, by_hand = torch.tensor([[.5, 0.], [.5, 1.]]), torch.zeros(2), p.detach().clone()
    for g in steps:
        p.grad = g.clone()
        opt.step()
        momentum = .9*momentum + g + .02*by_hand
        by_hand = by_hand - .1*momentum
    torch.testing.assert_close(p.detach(), by_hand)

def test_passes_are_passes():
    c, steps = replace(SMALL, passes=2, epochs=1), []
    real = training.train_epoch
    def counted(net, images, idx, *more): steps.append(len(idx)); return real(net, images, idx, *more)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(training, 'train_epoch', counted)
        run = fit(c, IMAGES, echo=None)
    assert steps == [2*len(IMAGES)]
    net, _, log = training.deepcluster(IMAGES, resolve(c), labels=IMAGES.labels)
    assert same(net, run.net) and log[0]['loss'] == run.log[0]['loss']
