"A share of the labels: which images have one, all layers learning on them, and the experiment around it."
import json
from dataclasses import replace
import pytest, torch
from deepcluster_nb import few_labels
from deepcluster_nb.experiments import gather, main
from deepcluster_nb.few_labels import (enough_epochs, even_batch, finetune, frozen_accuracies, labeled_share,
                                       stairs, top_accuracies, with_new_head)
from deepcluster_nb.fit import Config, fit
from deepcluster_nb.model import convnet
from deepcluster_nb.probes import ProbeConfig, resolve_probe
from deepcluster_nb.released import random_twin
from deepcluster_nb.sources import load_images
import made_runs
from made_runs import same_format, shape

pytestmark = pytest.mark.usefixtures('in_process')

@pytest.fixture(scope='module')
def digits(): return load_images('digits', n_images=60), load_images('digits', split='test', n_images=40)

SMALL = resolve_probe(ProbeConfig(size=32, epochs=3, batch_size=16, lr=.01, weight_decay=1e-4, min_scale=.5,
                                  dropout=0., device='cpu', precision='float32'))

def same(a, b): # two networks, bit for bit
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())

@pytest.mark.parametrize('seed', range(5))
def test_each_class_gives_its_share(seed):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(7, (200,), generator=g)
    last = set()
    for share in (.001, .01, .1, .3, .5, 1.):
        rows = labeled_share(y, share, seed)
        assert (rows.diff() > 0).all()
        for c in y.unique():
            assert (y[rows] == c).sum() == max(1, round(share * int((y == c).sum())))
        assert last <= set(rows.tolist())
        last = set(rows.tolist())
    assert last == set(range(200))
    assert not torch.equal(labeled_share(y, .1, seed), labeled_share(y, .1, seed + 1))

@pytest.mark.parametrize('share', [0., -.1, 1.5])
def test_impossible_shares(share):
    with pytest.raises(ValueError, match='share: expected above 0 and at most 1'):
        labeled_share(torch.zeros(3, dtype=torch.long), share)

def test_images_without_labels():
    with pytest.raises(ValueError, match='labels: a probe needs them'): labeled_share(None, .1)

def test_mmselfsups_rates_and_batches():
    for preset in ('finetune_imagenet_1percent', 'finetune_imagenet_10percent'):
        given = gather('finetune', preset)[1]
        assert (given['epochs'], given['batch_size'], given['lrs']) == (20, 256, [.01])
        rates = stairs(.01, 20)
        assert rates == pytest.approx([.01]*12 + [.002]*4 + [.0004]*4)

@pytest.mark.parametrize('n, most', [(70, 32), (10, 32), (500, 64), (5000, 64), (1, 8), (128_117, 256)])
def test_batches_of_nearly_equal_size(n, most):
    size = even_batch(n, most)
    parts = [len(b) for b in torch.arange(n).split(size)]
    assert size <= most and len(parts) == -(-n // most) and max(parts) - min(parts) < len(parts)
    c = replace(SMALL, batch_size=most)
    assert enough_epochs(n, c, 500) * len(parts) >= 500 and enough_epochs(n, c, 500) >= c.epochs

def test_a_new_head_and_the_old_network_untouched(digits):
    net = convnet('alexnet_small', 7, dropout=.5)
    before = {k: v.clone() for k,v in net.state_dict().items()}
    tuned = finetune(net, digits[0], 10, SMALL)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert tuned.top_layer.out_features == 10 and not tuned.training
    moved = [n for n,p in tuned.named_parameters() if n in before and before[n].shape == p.shape
             and not torch.equal(before[n], p)]
    learning = {n for n,p in net.named_parameters() if p.requires_grad and not n.startswith('top_layer')}
    assert set(moved) == learning                  # all layers, and the Sobel filter stays
    assert same(tuned, finetune(net, digits[0], 10, SMALL))
    start = with_new_head(net, 10)
    assert float(start.top_layer.weight.detach().std()) == pytest.approx(.01, rel=.05)
    assert {m.p for m in start.modules() if isinstance(m, torch.nn.Dropout)} == {0.}

def test_stopped_and_called_again(digits, tmp_path):
    net, seen = convnet('alexnet_small', 7, dropout=0.), []
    whole = finetune(net, digits[0], 10, SMALL)
    def stop(done, n, epoch):
        seen.append((epoch, done))
        if (epoch, done) == (1, 2): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        finetune(net, digits[0], 10, SMALL, folder=tmp_path, after=stop, pause=0.)
    again = finetune(net, digits[0], 10, SMALL, folder=tmp_path, after=lambda *a: seen.append(a[::-2]))
    assert same(whole, again)
    assert seen[6] == (1, 1)                       # from the start of the second epoch

def test_the_classes_of_few_outputs(digits): # fewer than five
    two = digits[1].subset((digits[1].labels < 2).nonzero().flatten())
    found = top_accuracies(with_new_head(convnet('alexnet_small', 7), 2), two, SMALL)
    assert found['top5'] == 100. and 0 <= found['top1'] <= 100

def test_frozen_layers_on_several_sets(digits):
    net = convnet('alexnet_small', 7)
    both = frozen_accuracies(net, digits[0], dict(a=digits[1], b=digits[0]), SMALL)
    assert list(both) == ['a', 'b'] and list(both['a']) == [f'conv{i}' for i in range(1, 6)]
    assert both['a'] == frozen_accuracies(net, digits[0], dict(x=digits[1]), SMALL)['x']
    assert all(both['b'][l] >= both['a'][l] for l in both['a'])     # what was trained on is known better

TINY = dict(n_images=200, n_test=40, shares=[.02, .1], epochs=2, steps=3, batch_size=16, n_val=30,
            min_scale=.5, lrs=[.01, .03])
def pairs(**more): return [x for k,v in (TINY | more).items() for x in ('-p', f'{k}={v}')]

@pytest.fixture(scope='module')
def run_of_train(tmp_path_factory):
    where = tmp_path_factory.mktemp('train')/'r'
    fit(Config(n_images=40, k=4, pca=8, epochs=1, passes=1, batch_size=16, device='cpu', precision='float32',
               threads=1, run_dir=str(where)), echo=None)
    return where

def test_the_command_on_digits(run_of_train, tmp_path, capsys):
    where = tmp_path/'run'
    assert main(['run', 'finetune', '--out', str(where), *pairs(weights=run_of_train)]) == 0
    m, r = (json.loads((where/f'{n}.json').read_text()) for n in ('metrics', 'results'))
    assert len(r) == 2*2*3 and m['labels'] == {'0.02': 10, '0.1': 20}
    for net in ('random', 'deepcluster'):
        for share in ('0.02', '0.1'):
            rates = {lr: r[f'{net} {share} {lr}'] for lr in TINY['lrs']}
            best = max(rates, key=lambda lr: rates[lr]['val']['top1'])      # by other training images
            assert m['rates'][net][share] == best and m['top1'][net][share] == rates[best]['test']['top1']
            frozen = r[f'{net} {share} frozen']
            layer = max(frozen['val'], key=frozen['val'].get)
            assert (m['layers'][net][share], m['frozen'][net][share]) == (layer, frozen['test'][layer])
    assert not list((where/'checkpoint').glob('*/*')) and (where/'figures'/'few_labels.png').exists()
    html = (where/'report.html').read_text()
    assert 'labels alone, all layers learn' in html and 'DeepCluster, frozen' in html
    true, mine = same_format(where, made_runs.tuned(tmp_path/'made'))
    assert all(shape(true[part]) == {n: {'0.02': float, '0.1': float} for n in mine[part]}
               for part in ('top1', 'frozen'))
    # half of it is lost: only that is done again
    kept = {k: v for k,v in r.items() if k.startswith('random')}
    for i,lr in enumerate(TINY['lrs']): # the rate that is worse on the test images
        kept[f'random 0.1 {lr}'] |= dict(val=dict(top1=90. - i, top5=95.),
                                           test=dict(top1=10. + i, top5=30. + i))
    (where/'results.json').write_text(json.dumps(kept))
    assert main(['run', 'finetune', '--out', str(where), *pairs(weights=run_of_train)]) == 0
    again = json.loads((where/'results.json').read_text())
    free = lambda found: {k: {p: v for p,v in f.items() if p != 'seconds'} for k,f in found.items()}
    m = json.loads((where/'metrics.json').read_text())
    assert [m[part]['random']['0.1'] for part in ('rates', 'top1', 'top5')] == [.01, 10., 30.]
    assert '10.0\N{NO-BREAK SPACE}(30.0), rate\N{NO-BREAK SPACE}0.01' in (where/'report.html').read_text()
    assert free(again) == free(r) and {k: again[k] for k in kept} == kept
    capsys.readouterr()
    assert main(['run', 'finetune', '--out', str(where), *pairs(weights=run_of_train, seed=1)]) == 2
    assert 'seed' in capsys.readouterr().err

@pytest.mark.parametrize('given, message', [
    (dict(shares=[]), 'shares: expected different numbers above 0'),
    (dict(shares=[0.1, 2.0]), 'shares: expected different numbers above 0'),
    (dict(shares=[1.0]), 'shares: expected different numbers above 0 and below 1, got [1.0]'),
    (dict(lrs=[-1.0]), 'lrs: expected different learning rates above 0'),
    (dict(n_val=0), 'n_val: expected at least 1'),
    (dict(weights='nowhere'), "weights: no run and no file at 'nowhere'"),
    (dict(epochs=0), 'epochs: expected at least 1, got 0')])
def test_wrong_input_is_found_before_a_kernel_starts(tmp_path, capsys, monkeypatch, given, message):
    monkeypatch.setattr('deepcluster_nb.experiments.execute', None)
    assert main(['run', 'finetune', '--out', str(tmp_path/'run'), *pairs(**given)]) == 2
    err = capsys.readouterr().err
    assert message in err and not (tmp_path/'run').exists()

def test_rates_are_chosen_on_images_whose_labels_were_not_used(run_of_train, tmp_path, monkeypatch):
    from deepcluster_nb import few_labels
    seen, finetune, top = dict(learned=set(), asked=[]), few_labels.finetune, few_labels.top_accuracies
    def pixels(images): return {images[i].numpy().tobytes() for i in range(len(images))}
    frozen, how, few, nets = few_labels.frozen_accuracies, [], [], []
    def learning(net, images, classes, config, steps, *more):
        seen['learned'] |= pixels(images)
        how.append((len(images), config.lr, config.min_scale, config.dropout, steps))
        nets.append(net)
        more = classes, config, steps, *more
        return finetune(net, images, *more)
    def asking(net, images, config):
        seen['asked'].append(pixels(images))
        return top(net, images, config)
    def probing(net, images, *more):
        few.append(len(images))
        return frozen(net, images, *more)
    monkeypatch.setattr(few_labels, 'frozen_accuracies', probing)
    monkeypatch.setattr(few_labels, 'finetune', learning)
    monkeypatch.setattr(few_labels, 'top_accuracies', asking)
    given = pairs(weights=run_of_train, seed=1, dropout=.25, n_val=25)
    assert main(['run', 'finetune', '--out', str(tmp_path/'run'), *given]) == 0
    assert how == [(n, lr, .5, .25, 3) for n in (10, 20) for _ in range(2) for lr in TINY['lrs']]
    assert few == [10, 10, 20, 20] and same(nets[0], random_twin(nets[2], 1))
    images = load_images('digits', None, 'train', 200, 1)
    assert seen['learned'] == pixels(images.subset(labeled_share(images.labels, .1, 1)))
    val, test = seen['asked'][:2]
    assert seen['asked'] == [val, test]*(len(seen['asked']) // 2) and len(seen['learned']) > 10
    assert len(val) == 25 and not seen['learned'] & val and not seen['learned'] & test and not val & test

def test_fine_tuning_passes_its_weight_decay_on(monkeypatch, digits):
    made = []
    monkeypatch.setattr(few_labels, 'train_on_labels', lambda *args: made.append(args))
    for seed in (0, 1):
        finetune(convnet('alexnet_small', 4), digits[0], 10, replace(SMALL, weight_decay=.3, seed=seed))
    assert [args[6] for args in made] == [.3, .3]
    assert not torch.equal(*(args[0].top_layer.weight for args in made))       # another seed, another head

def test_frozen_layers_have_their_last_accuracy(monkeypatch, digits):
    monkeypatch.setattr(few_labels, 'linear_probes', lambda *a, **how: dict(conv5=dict(last=1., best=2.)))
    net, (train, test) = convnet('alexnet_small', 4), digits
    assert frozen_accuracies(net, train, dict(a=test), SMALL) == dict(a=dict(conv5=1.))
