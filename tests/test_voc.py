("VOC 2007: what the files say, average precision by three rules, SVMs, fine-tuning, "
 "and the experiment through the command.")
import json, math
from types import SimpleNamespace
import numpy as np, pytest, torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC
from torch import nn
from deepcluster_nb import voc
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.experiments import main
from deepcluster_nb.model import calibrate_bn, convnet
from deepcluster_nb.released import random_twin
from deepcluster_nb.voc import (COSTS, average_precision, crop_scores, finetune, learning_rate, linear_svm,
                                low_shot, made_voc, mean_ap, read_voc, shot_rows, transfer_net, unit_rows,
                                voc_folder, voc_labels, voc_loss, voc_objects)
import made_runs
from made_runs import same_format

pytestmark = pytest.mark.usefixtures('one_thread', 'in_process')

@pytest.fixture(scope='module')
def top(tmp_path_factory): return made_voc(tmp_path_factory.mktemp('voc'), 20)

@pytest.fixture(scope='module')
def train(top): return read_voc(top, 'train')

class Away(torch.Tensor): # stands for a tensor on a GPU
    def numpy(self, *args, **kwargs): raise TypeError('on a GPU')
    def cpu(self): return self.as_subclass(torch.Tensor)

def test_features_come_from_wherever_they_are(points):
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)).half()
    assert (unit_rows(x.as_subclass(Away)) == unit_rows(x)).all()

# --- the files

def test_lists_and_annotations_say_the_same(top):
    for split, n in (('train', 20), ('val', 20), ('trainval', 40), ('test', 20)):
        names, classes, truth = voc_labels(top, split)
        assert (len(names) == n and truth.shape == (n, 5)
                and classes == ['cross', 'disc', 'ring', 'square', 'triangle'])
        for name, row in zip(names, truth.tolist()):
            found = voc_objects(top/'Annotations'/f'{name}.xml')
            assert row == [max([1 - d for c,_,d in found if c == k], default=-1) for k in classes]
            assert all(1 <= l < r and 1 <= t < b for _,(l, t, r, b),_ in found)
    assert (truth == 0).any() and (truth == 1).any()                   # there is something to ignore

def test_the_folder_is_found_from_above(top):
    assert voc_folder(top) == voc_folder(top.parent) == voc_folder(top.parent.parent) == top
    assert read_voc(top.parent.parent, 'test', n_images=7).labels.shape == (7, 5)

def test_files_as_they_should_be_read(tmp_path): # written by hand, with the publisher's two blanks
    main = tmp_path/'ImageSets'/'Main'
    main.mkdir(parents=True)
    (main/'val.txt').write_text('000005\n000007\n000009\n')
    (main/'cat_val.txt').write_text('000005 -1\n000007  1\n000009  0\n')
    (main/'aeroplane_val.txt').write_text('000005  0\n000007 -1\n000009 -1\n')
    (main/'cat_trainval.txt').write_text('000001  1\n')                # of another split
    names, classes, truth = voc_labels(tmp_path, 'val')
    assert (names, classes, truth.tolist()) == (['000005', '000007', '000009'], ['aeroplane', 'cat'],
                                                [[0, -1], [-1, 1], [-1, 0]])
    (main/'cat_val.txt').write_text('000005 -1\n000007  1\n')          # cut off
    with pytest.raises(ValueError, match='split: .*cat_val.txt.*got 2 lines'): voc_labels(tmp_path, 'val')
    (main/'cat_val.txt').write_text('000005 -1\n000007  1\n000009  2\n')
    with pytest.raises(ValueError, match='split: expected -1, 0 or 1'): voc_labels(tmp_path, 'val')

def test_missing_data_say_how_to_get_them(tmp_path, top):
    with pytest.raises(FileNotFoundError, match='root: .*get_data.py voc2007'): read_voc(tmp_path, 'test')
    with pytest.raises(FileNotFoundError, match="split: expected train.*'dev'"): read_voc(top, 'dev')

def test_a_lost_photograph_is_named(tmp_path):
    where = made_voc(tmp_path, 3)
    (where/'JPEGImages'/'000002.jpg').unlink()
    with pytest.raises(ValueError, match='(?s)1 of 3 images.*000002.jpg'): read_voc(tmp_path, 'train')

# --- average precision

T = torch.tensor
@pytest.mark.parametrize('scores, truth, step, interpolated, eleven', [
    ([3, 2, 1], [1, -1, -1], 1, 1, 1),
    ([3, 2, 1], [-1, -1, 1], 1/3, 1/3, 1/3),
    ([4, 3, 2, 1], [1, -1, 1, -1], (1 + 2/3)/2, (1 + 2/3)/2, (6 + 5*2/3)/11),
    # the precision rises again: only `step` sees the dip
    ([4, 3, 2, 1], [-1, 1, 1, -1], (1/2 + 2/3)/2, 2/3, 2/3),
    ([5, 4, 3, 2], [0, 1, 0, -1], 1, 1, 1),  # difficult ones first: as if they were not there
    ([1, 1, 1, 1], [1, -1, -1, -1], 1/4, 1/4, 1/4),  # all equal: they enter together
    ([2, 2, 1], [1, -1, 1], (1/2 + 2/3)/2, 2/3, 2/3),
    ([1], [1], 1, 1, 1),
])
def test_average_precision_by_hand(scores, truth, step, interpolated, eleven):
    found = [average_precision(T(scores).float(), T(truth), rule)
             for rule in ('step', 'interpolated', '11-point')]
    assert found == pytest.approx([step, interpolated, eleven], abs=1e-9)

def test_average_precision_is_scikit_learns():
    g = np.random.default_rng(0)
    for n, levels in ((1, 2), (7, 3), (50, 10), (200, 10**6)):
        for _ in range(20):
            s, y = g.integers(0, levels, n) / levels, g.integers(-1, 2, n)
            if not (y == 1).any(): assert math.isnan(average_precision(T(s), T(y))); continue
            assert average_precision(T(s), T(y)) == pytest.approx(
                average_precision_score(y[y != 0] > 0, s[y != 0]), abs=1e-9)

def test_average_precision_does_not_depend_on_order_or_scale():
    g = torch.Generator().manual_seed(0)
    s, y, p = (torch.rand(60, generator=g), torch.randint(-1, 2, (60,), generator=g),
               torch.randperm(60, generator=g))
    for rule in ('step', 'interpolated', '11-point'):
        assert average_precision(s[p], y[p], rule) == pytest.approx(average_precision(7*s - 3, y, rule))
    assert average_precision(s, y, 'interpolated') >= average_precision(s, y)

def test_eleven_points_at_round_recalls():
    # ten positives: recall 3/10 must count as .3, whatever the floats say
    y = torch.ones(20).long(); y[1::2] = -1
    s = -torch.arange(20.)
    p = [(i + 1) / (2*i + 1) for i in range(10)]                # precision at recall (i+1)/10: 1, 2/3, 3/5, …
    assert average_precision(s, y, '11-point') == pytest.approx((1 + sum(p)) / 11)

def test_mean_leaves_out_what_is_not_there():
    s, y = T([[2., 1.], [1., 2.]]), T([[1, -1], [-1, -1]])
    m, aps = mean_ap(s, y)
    assert m == 100 and aps[0] == 100 and math.isnan(aps[1])

@pytest.mark.parametrize('args, message', [
    ((torch.zeros(3), torch.ones(2)), 'scores: expected one for each'),
    ((T([1., math.nan]), T([1, -1])), 'scores: expected finite'),
    ((torch.zeros(2), T([1, 2])), 'truth: expected -1, 0 or 1'),
    ((torch.zeros(2), T([1, -1]), 'area'), 'rule: expected one of')])
def test_wrong_scores(args, message):
    with pytest.raises(ValueError, match=message): average_precision(*args)

# --- SVMs

@pytest.fixture(scope='module')
def points(): # 90 rows, three classes that lie in three directions, a few difficult ones
    g = torch.Generator().manual_seed(1)
    y = torch.full((90, 3), -1)
    y[torch.arange(90), torch.arange(90) % 3] = 1
    x = torch.randn(90, 40, generator=g) + 1.5 * torch.cat([(y == 1).float(), torch.zeros(90, 37)], 1)
    y[:3] = 0
    return x[:60], y[:60], x[60:], y[60:]

def test_grid():
    assert len(COSTS) == 19 and COSTS[0] == 2**-19 and COSTS[15] == 2**-4 and COSTS[16:] == (1, 10, 100)

def test_svm_is_scikit_learns_without_difficult_rows(points):
    x, y, z, _ = points
    scores, chosen = linear_svm(x, y, z, costs=(.1,))
    assert chosen == [.1]*3
    for c in range(3):
        keep = y[:, c] != 0
        clf = LinearSVC(C=.1, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000,
                        random_state=0).fit(unit_rows(x)[keep], y[keep, c])
        assert np.abs(clf.decision_function(unit_rows(z)) - scores[:, c].numpy()).max() < 1e-9
    # what is difficult for every class
    moved = x.clone(); moved[:3] = 100*torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(linear_svm(moved, y, z, costs=(.1,))[0], scores)

def test_more_columns_than_rows_change_nothing(points): # the basis of the rows is exact
    x, y, z, _ = points
    # 40 orthonormal rows in 300 dimensions
    wide = torch.linalg.qr(torch.randn(300, 300, generator=torch.Generator().manual_seed(3)))[0][:40]
    a, b = (linear_svm(v @ r, y, w @ r, costs=(.1,))[0] for v,w,r in ((x, z, torch.eye(40)), (x, z, wide)))
    assert torch.allclose(a, b, atol=1e-3)

def test_cost_is_chosen_on_training_images_alone(points):
    x, y, z, _ = points
    costs = (2**-19, .1)
    assert linear_svm(x, y, z, costs)[1] == linear_svm(x, y, torch.randn(5, 40), costs)[1]

def test_shot_rows():
    y = T([1]*6 + [0]*5 + [-1]*30)
    rows = shot_rows(y, 2, 4, torch.Generator().manual_seed(0))
    assert (y[rows] == 1).sum() == 2 and (y[rows] == -1).sum() == 8 and len(rows.unique()) == 10
    assert len(shot_rows(y, 6, 19, torch.Generator())) == 36           # as far as there are
    with pytest.raises(ValueError, match='shots: expected 1 to 6'): shot_rows(y, 7, 1, torch.Generator())

def test_low_shot_learns_and_does_not_peek(points):
    x, y, z, t = points
    r = low_shot(x, y, z, t, shots=(1, 8), samples=3, costs=(.1, 1.))
    assert (list(r) == [1, 8] and r[8]['mean'] > r[1]['mean']
            and all(v['best'] >= v['mean'] and v['std'] >= 0 and v['cost'] in (.1, 1.) for v in r.values()))
    assert r == low_shot(x, y, z, t, shots=(1, 8), samples=3, costs=(.1, 1.))
    wrong = low_shot(x, y, z, -t, shots=(1, 8), samples=3, costs=(.1, 1.))
    # other test labels, the same costs
    assert [v['cost'] for v in wrong.values()] == [v['cost'] for v in r.values()]
    with pytest.raises(ValueError, match='shots: expected 1 to'): low_shot(x, y, z, t, shots=(40,))
    few, done = torch.where(torch.eye(5).repeat(4, 1) > 0, 1, -1), []        # four positives each
    with pytest.raises(ValueError, match='shots: 4 leaves no positive image outside'):
        low_shot(torch.randn(20, 6), few, z, t, shots=(1, 4), samples=1, costs=(1.,), progress=done.append)
    assert not done

# --- fine-tuning

def test_loss_by_hand():
    x, y = T([[2., -1., 9.]]), T([[1, -1, 0]])
    assert float(voc_loss(x, y)) == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)))
    # a mean over the batch
    assert float(voc_loss(x.expand(4, 3), y.expand(4, 3))) == pytest.approx(float(voc_loss(x, y)))

@pytest.mark.parametrize('what, step, lr', [
    ('fc6-8', 0, .003),
    ('fc6-8', 4_999, .003),
    ('fc6-8', 5_000, .0015),
    ('fc6-8', 79_999, .003/2**15),
    ('all', 19_999, .001),
    ('all', 20_000, .0005),
    ('all', 79_999, .001/8)])
def test_learning_rate(what, step, lr): assert learning_rate(what, step) == pytest.approx(lr)

def test_the_released_scripts_constants(small, train, monkeypatch):
    import inspect
    from deepcluster_nb import voc
    how = {n: p.default for n,p in inspect.signature(finetune).parameters.items()}
    assert (how['n'], how['batch_size'], how['weight_decay'], how['clip']) == (80_000, 16, 1e-6, 10.)
    made, boxes, real = [], [], voc.random_resized_crop
    class Spy(torch.optim.SGD):
        def __init__(self, params, lr, momentum, weight_decay):
            made.append((momentum, weight_decay))
            super().__init__(params, lr, momentum, weight_decay=weight_decay)
    monkeypatch.setattr(torch.optim, 'SGD', Spy)
    monkeypatch.setattr(voc, 'random_resized_crop', lambda *a: boxes.append(a[3:]) or real(*a))
    finetune(transfer_net(small, 5), train, n=1, size=32)
    crop_scores(transfer_net(small, 5), train.subset([0]), 32, crops=1)
    assert made == [(.9, 1e-6)] and boxes == [((.1, .5), (1., 1.))]*2

def test_a_short_training_has_the_same_stairs():
    assert [learning_rate('all', s, 8) for s in range(8)] == pytest.approx(
        [.001/2**(s // 2) for s in range(8)])

def test_new_layers():
    net = convnet('alexnet_small', 7, dropout=0.)
    new = transfer_net(net, 20)
    linear = [m for m in (*new.classifier, new.top_layer) if isinstance(m, nn.Linear)]
    assert len(linear) == 3 and new.top_layer.out_features == 20 and net.top_layer.out_features == 7
    for m in linear:
        assert ((m.bias == .1).all() and abs(m.weight.std().item() - .01) < 3e-4
                and abs(m.weight.mean().item()) < 3e-4)
    assert {m.p for m in new.classifier if isinstance(m, nn.Dropout)} == {.5}
    def learns(**how):
        bn = {f'features.{i}' for i,m in enumerate(net.features) if isinstance(m, nn.BatchNorm2d)}
        names = [n for n,p in transfer_net(net, 20, **how).named_parameters() if p.requires_grad]
        return {n.split('.')[0] + ('.bn' if n.rpartition('.')[0] in bn else '') for n in names}
    assert learns() == {'classifier', 'top_layer'}
    assert learns(train_bn=True) == {'classifier', 'top_layer', 'features.bn'}
    assert learns(what='all') == {'classifier', 'top_layer', 'features', 'features.bn'}
    with pytest.raises(ValueError, match="what: expected one of fc6-8, all, got 'fc7'"):
        transfer_net(net, 20, 'fc7')

@pytest.fixture(scope='module')
def small(): return convnet('alexnet_small', 5, dropout=0.).eval()

@pytest.mark.parametrize('what', ['fc6-8', 'all'])
def test_what_moves_and_what_stands_still(small, train, what):
    before = {k: v.clone() for k,v in small.state_dict().items()}
    start = transfer_net(small, 5, what)
    net = finetune(transfer_net(small, 5, what), train, what, n=2, size=32)
    assert all(torch.equal(v, before[k]) for k,v in small.state_dict().items())    # the tested network itself
    same = {k: torch.equal(v, start.state_dict()[k]) for k,v in net.state_dict().items()}
    assert all(v for k,v in same.items()
               if k.startswith(('features', 'sobel')) and ('running' in k or what == 'fc6-8' or 'sobel' in k))
    assert (not same['top_layer.weight'] and not same['classifier.1.weight']
            and same['features.0.weight'] == (what == 'fc6-8'))

def test_gradients_are_clipped(small, train): # with next to no gradient left, next to nothing moves
    start = transfer_net(small, 5)
    def moved(clip):
        net = finetune(transfer_net(small, 5), train, n=1, size=32, clip=clip, weight_decay=0.)
        return float((net.top_layer.weight - start.top_layer.weight).detach().norm())
    assert moved(1e-4) <= .003 * 1.01e-4 < moved(10.)

def test_stopped_and_continued_is_the_same(small, train):
    kept = {}
    def after(done, n, state):
        if done == 2: kept.update({k: v.clone() for k,v in state().items()})
    whole = finetune(transfer_net(small, 5), train, n=4, size=32, after=after)
    again = finetune(transfer_net(small, 5), train, n=4, size=32, start=(2, kept))
    assert all(torch.equal(a, b) for a,b in zip(whole.state_dict().values(), again.state_dict().values()))

def test_a_loss_that_is_not_finite_is_an_error(small, train):
    net = transfer_net(small, 5)
    net.top_layer.bias.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match='step 0'): finetune(net, train, n=2, size=32)

def test_bad_weights_are_neither_saved_nor_returned(small, train):
    def spoiled(at): # after so many steps
        net = transfer_net(small, 5)
        def after(done, n, state):
            if done == at: net.top_layer.bias.data.fill_(math.inf)
            if done > at: state()
        finetune(net, train, n=4, size=32, after=after)
    with pytest.raises(FloatingPointError, match='by step 2'): spoiled(2)
    with pytest.raises(FloatingPointError, match='by step 3'): spoiled(4)

def test_ten_crops_are_a_sum(small): # of an image of one color every crop is the same
    net = transfer_net(small, 5)
    flat = PackedImages(torch.full((3, 3, 60, 70), 90, dtype=torch.uint8))
    one, ten = crop_scores(net, flat, 32, crops=1), crop_scores(net, flat, 32, crops=10)
    assert torch.allclose(10*one, ten, rtol=1e-4) and torch.allclose(ten[0], ten[2], rtol=1e-5)
    assert torch.equal(ten, crop_scores(net, flat, 32, crops=10))

# --- the experiment

TINY = ['-p', 'steps=3', '-p', 'epochs=1', '-p', 'k=5', '-p', 'n_images=40', '-p', 'shots=[1, 4]',
        '-p', 'samples=2', '-p', 'costs=[0.1, 1.0]', '-p', 'parts=[all]']

def test_command_and_again(tmp_path, capsys):
    where = tmp_path/'run'
    assert main(['run', 'voc', '--preset', 'voc_small', '--out', str(where), *TINY]) == 0
    m = json.loads((where/'metrics.json').read_text())
    assert (set(m) == {'SVM conv5', 'low-shot conv5', 'all', 'blind', 'arch', 'size', 'n_images', 'n_test',
                      'seconds'}
            and (m['arch'], m['n_images'], m['n_test']) == ('alexnet_small', 40, 40))
    # of those that were asked for
    assert set(m['SVM conv5']['random']['costs'].values()) <= {.1, 1.}
    for part in ('SVM conv5', 'all'):
        assert set(m[part]) == {'random', 'random, calibrated', 'deepcluster'}
        assert all(0 <= r[rule] <= 100 for r in m[part].values()
                   for rule in ('step', 'interpolated', '11-point'))
    same_format(where, made_runs.voc(tmp_path/'made'), but=['fc6-8'])
    assert set(m['low-shot conv5']['random']['1']) == {'mean', 'std', 'best', 'cost'}
    assert set(m['low-shot conv5']['random']) == {'1', '4'} and (where/'figures'/'voc.png').exists()
    html = (where/'report.html').read_text()
    assert 'blind' in html and 'machinery runs' in html and '72.0' in html
    assert '40 photographs of trainval to learn from, 40 of test to be tested on' in html
    done = json.loads((where/'runs.json').read_text())
    del done['all/deepcluster']                               # as if it had been stopped before the last part
    (where/'runs.json').write_text(json.dumps(done))
    assert main(['run', 'voc', '--preset', 'voc_small', '--out', str(where), *TINY]) == 0
    assert ({k: v for k,v in json.loads((where/'metrics.json').read_text()).items() if k != 'seconds'}
            == {k: v for k,v in m.items() if k != 'seconds'})

def test_parts_learn_on_one_split_and_are_tested_on_the_other(tmp_path, monkeypatch):
    trained, sets, fits, svms, shots, tuned = convnet('alexnet_small', 5, seed=9).eval(), [], [], [], [], []
    def read(root, *asked):
        assert asked == (('train', 'val')[len(sets)], 15, 2)
        sets.append(read_voc(root, *asked))
        return sets[-1]
    def fit(config, images, echo):
        fits.append((config, images.pixels))
        return SimpleNamespace(net=trained)
    def svm(learned, y, tested, costs, seed, **how): # which is always wrong
        svms.append((learned, y, tested, costs, seed))
        return -tested[1].labels.double(), [.1, .5, .1, .1, .1]
    def low(learned, y, tested, t, *more, seed, **how):
        shots.append((learned, y, tested, t, *more, seed))
        return {n: dict(mean=10.*n, std=1.*n, best=11.*n, cost=.1) for n in (1, 2)}
    def tune(net, images, part, steps, size, seed, **how):
        tuned.append((net, images, part, steps, size, seed))
        return net
    def crops(net, images, size, seed, **how): # which are always right
        tuned[-1] += images, size, seed
        return images.labels.double()
    for name,f in {'fit.fit': fit, 'voc.read_voc': read, 'voc.linear_svm': svm, 'voc.low_shot': low,
                   'voc.transfer_net': lambda net, classes, part, bn, seed: (net, classes, part, bn, seed),
                   'voc.finetune': tune, 'voc.crop_scores': crops,
                   'probes.probe_features': lambda net, im, size, **how: dict(conv4=(net, im, size))}.items():
        monkeypatch.setattr(f'deepcluster_nb.{name}', f)
    given = dict(split='train', n_images=15, seed=2, k=6, epochs=1, size=33, layers=['conv4'], shots=[1, 2],
                 samples=4, costs=[.1, .5], parts=['fc6-8', 'all'], steps=7, train_bn=True, device='cpu')
    assert main(['run', 'voc', '--out', str(tmp_path/'r'),
                 *(x for n,v in given.items() for x in ('-p', f'{n}={v}'))]) == 0
    (train, test), ((config, pixels),) = sets, fits
    assert (config.k, config.epochs, config.size, config.seed) == (6, 1, 33, 2)
    assert torch.equal(pixels, train.pixels)
    nets, twin = [learned[0] for learned,*_ in svms], random_twin(trained, 2)
    assert all(torch.equal(v, twin.state_dict()[n]) for n,v in nets[0].state_dict().items())
    calibrate_bn(twin, train, 33)
    assert all(torch.allclose(v, twin.state_dict()[n]) for n,v in nets[1].state_dict().items())
    assert len(nets) == 3 and nets[2] is trained
    def sides(net): return ((net, train, 33), train.labels, (net, test, 33))
    assert svms == [(*sides(net), [.1, .5], 2) for net in nets]
    assert shots == [(*sides(net), test.labels, [1, 2], 4, [.1, .5], 2) for net in nets]
    assert tuned == [((net, 5, part, True, 2), train, part, 7, 33, 2, test, 33, 2)
                     for net in nets for part in ('fc6-8', 'all')]
    m = json.loads((tmp_path/'r'/'metrics.json').read_text())
    assert m['all']['random']['step'] == 100 and m['low-shot conv4']['random']['2']['best'] == 22
    assert m['SVM conv4']['deepcluster']['costs']['disc'] == .5
    assert m['SVM conv4']['deepcluster']['step'] < m['blind']
    # the share of those that show a class, without what is difficult
    right = [[int(v == 1) for v in y if v != 0] for y in test.labels.T]
    assert m['blind'] == pytest.approx(100*sum(sum(y)/len(y) for y in right)/5)

def test_missing_tree_is_one_line_and_leaves_nothing(tmp_path, capsys):
    assert main(['run', 'voc', '--preset', 'voc2007', '-p', f'root={tmp_path}',
                 '--out', str(tmp_path/'run')]) != 0
    err = capsys.readouterr().err.strip()
    assert 'get_data.py voc2007' in err and len(err.splitlines()) == 1 and not (tmp_path/'run').exists()

@pytest.mark.parametrize('pair', ['costs=[0, 1]', 'costs=.1', "costs=['a']", 'shots=[1.5]', 'layers=[conv9]',
                                  'samples=0', 'seed=4294967296'])
def test_wrong_numbers_are_found_before_any_work(tmp_path, capsys, monkeypatch, pair):
    monkeypatch.setattr('deepcluster_nb.fit.fit', None)
    assert main(['run', 'voc', '--preset', 'voc_small', '-p', pair, '--out', str(tmp_path/'run')]) != 0
    assert f"{pair.split('=')[0]}: expected" in capsys.readouterr().err
    assert not (tmp_path/'run'/'params.yaml').exists()

def test_every_step_and_every_epoch_draw_anew(small, train, monkeypatch):
    read, seeds, batch, crop = [], [], PackedImages.batch, voc.random_resized_crop
    monkeypatch.setattr(PackedImages, 'batch',
                        lambda self, idx: read.append(idx.tolist()) or batch(self, idx))
    monkeypatch.setattr(voc, 'random_resized_crop',
                        lambda im, size, g, *more: seeds.append(g.initial_seed()) or crop(im, size, g, *more))
    finetune(transfer_net(small, 5), train, n=4, size=32, batch_size=10)          # two epochs of two
    first, second = read[0] + read[1], read[2] + read[3]
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert len(set(seeds)) == 4

def test_what_an_svm_was_trained_on_is_not_asked_again(points, monkeypatch):
    x, y, z, t = points
    asked, real = [], voc.mean_ap
    monkeypatch.setattr(voc, 'mean_ap', lambda s, truth, rule: asked.append(truth) or real(s, truth, rule))
    low_shot(x, y, z, t, shots=(4,), samples=1, costs=(1.,))
    outside, tested = asked
    assert torch.equal(tested, t)
    assert [((y == v).sum(0) - (outside == v).sum(0)).tolist() for v in (1, -1)] == [[4]*3, [8]*3]

def test_the_numbers_of_low_shot_by_hand(points, monkeypatch):
    # of three samples at two costs: outside of the sample, and on the test images
    outside, tested = np.array([[5., 6], [1, 9], [3, 3]]), np.array([[90., 10], [20, 40], [10, 40]])
    found = iter(np.stack([outside, tested], 2).ravel().tolist())
    monkeypatch.setattr(voc, 'mean_ap', lambda *args: (next(found), []))
    r = low_shot(*points, shots=(1,), samples=3, costs=(.1, 1.))[1]
    assert r == pytest.approx(dict(mean=30, std=300**.5, best=40, cost=1.))      # the mean over samples first

def test_the_cost_is_the_one_of_the_best_average_precision(points):
    x, y, z, _ = points
    costs = (2**-19, 2**-7, .1, 10., 100.)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(60, 40, generator=g) + .3*torch.cat([(y == 1).float(), torch.zeros(60, 37)], 1)
    for c,chosen in enumerate(linear_svm(x, y, z, costs)[1]):
        keep = y[:, c] != 0
        rows, truth = unit_rows(x)[keep], y[keep, c].numpy()
        ap = {cost: cross_val_score(voc.svm(cost), rows, truth, scoring='average_precision', cv=3).mean()
              for cost in costs}
        assert ap[chosen] == pytest.approx(max(ap.values()), abs=1e-6)
