"The page of findings: verdicts from numbers whose truth is known, and small runs of its rows."
import json, re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from PIL import Image
from sklearn.metrics import (adjusted_mutual_info_score, average_precision_score,
                             normalized_mutual_info_score)
from deepcluster_nb.data import shapes
from deepcluster_nb.experiments import main
from deepcluster_nb.features import PCA, l2_normalize
from deepcluster_nb.fit import Config, network, resolve
from deepcluster_nb.runs import load_checkpoint
from in_process import names_of

pytestmark = pytest.mark.usefixtures('in_process')

LAYERS = ['conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'kNN']
RECIPE = dict(dataset='shapes', n_images=1000, n_test=100, size=32, k=20, epochs=5)
SEEN, NOT, OPEN = 'seen here', 'not seen here', "can't be decided at this size"

def judged(level, slope=0.): return {m: level + slope*i for i,m in enumerate(LAYERS)}

def run_of(level, slope, seed, **more): # what a run of fit leaves behind
    log = dict(loss=[2., 1.8, 1.6, 1.4, 1.2], ln_k=[3.]*5, nmi_prev=[None, .3, .5, .6, .62 + .01*seed],
               nmi_prev_chance=[None] + [.2]*4, nmi_labels=[.1, .2, .25, .3, .3],
               ami_labels=[0., .1, .15, .2, .2 + .01*seed])
    return dict(judged(level + seed, slope), log=log, largest=.05, effective=18. + .1*seed, empty=0, nmi=.3,
                ami=.2 + .01*seed, ami_color=.1, purity=.5, purity_chance=.2, fewest=3,
                top=dict(conv1=.3, conv3=.4, conv5=.6 + .01*seed)) | more

def made(seeds=3): # results of every row
    runs = {}
    for s in range(seeds):
        more = dict(random=judged(40. + s) | dict(top=dict(conv1=.3, conv3=.3, conv5=.3)))
        more['random, rgb'], more['supervised'] = judged(45. + s), judged(50. + s, 6.)
        more['base'] = run_of(45., 2., s)
        more['shuffled'] = run_of(44., 2., s, largest=.6 + .1*s, effective=14.)
        more['k=200'], more['no repair'] = run_of(49., 2. + .1*s, s), run_of(49., 2., s, empty=9 + s)
        for k in (2, 6, 60, 600): more[f'k={k}'] = run_of(40. + k/100, 2., s)
        more['rgb'] = run_of(50., 1., s, ami_color=.4 + .01*s, ami=.1)
        more['rgb, jitter'] = run_of(45., 2. + .1*s*(s - 1), s, ami_color=.2)
        # a cost of .9 is less than a point, but not for sure
        for n,cost in ((1, 5.), (2, .2), (4, .9 + .15*(s - 1))):
            more[f'stop after {n}'] = run_of(45. - cost, 2., s)
        for n,level,found in (('other, random', 30., 24.), ('other', 50., 40. + s),
                              ('other, supervised', 60., 50.)):
            # errors for one of the supervised network, on its own images and on shapes: DeepCluster's 5/4
            # and 1, those of random features 7/4 and 9/5
            more[n] = dict(own=judged(level + s), shapes=judged((10. if level == 30 else 50.) + s), map=found,
                           digits=judged(90. if n == 'other' else 95.))
        runs |= {f'{n}/{s}': dict(images=1000, test=100, classes=5, seconds=60) | r for n,r in more.items()}
    return runs

def page(folder, runs, *more): # the page of these runs, none of which is made anew
    folder.mkdir()
    (folder/'results.json').write_text(json.dumps(dict(recipe=RECIPE, runs=runs)))
    given = [x for n,v in RECIPE.items() for x in ('-p', f'{n}={v}')]
    assert main(['run', 'findings', '--out', str(folder), *given, *more]) == 0
    found = json.loads((folder/'metrics.json').read_text())
    return {int(n): [f['verdict'] for f in row['found']] for n,row in found.items() if n.isdigit()}

TRUTH = {1: [SEEN], 2: [SEEN]*3, 3: [SEEN]*3, 4: [SEEN]*6, 5: [SEEN]*3 + [OPEN], 6: [NOT]*2 + [SEEN]*3,
         7: [SEEN]*2, 8: [SEEN]*2, 9: [SEEN]*2 + [NOT]*2, 10: [SEEN]*2, 11: [NOT, SEEN, OPEN]}
FIGURES = {1: '+21.0 ± 1.0', 2: '70.0 ± 10.0, −4.1 ± 0.1, 10.0 ± 1.0',
           3: '+5.3 ± 0.1, +5.2 ± 0.1, +0.3 ± 0.1',
           4: '+0.210 ± 0.010, +0.110 ± 0.010, +0.330 ± 0.010, +0.030 ± 0.010, 0.63 ± 0.01, 1.20 ± 0.00',
           5: '+0.310 ± 0.010, +0.110 ± 0.010, +0.210 ± 0.010, +0.2 ± 0.3',
           6: '−4.0 ± 0.0, −2.0 ± 0.0, +5.0 ± 0.0, +8.0 ± 0.0, +16.0 ± 0.0',
           7: '50.0 ± 0.0, 20.0 ± 0.0, 3.0 ± 0.0, +0.210 ± 0.010', 8: '+31.0 ± 1.0, +31.0 ± 1.0',
           9: '1.26 ± 0.01, 1.00 ± 0.00, 1.77 ± 0.02, 1.82 ± 0.02, 1.26 ± 0.01, 2.00 ± 0.00, 1.77 ± 0.02, '
              '1.00 ± 0.00',
           10: '+17.0 ± 1.0, +4.0 ± 0.0, +21.0 ± 1.0', 11: '−5.0 ± 0.0, −0.2 ± 0.0, −0.9 ± 0.2'}
# of the page's tables: what stands first in a row, and how the row goes on
ROWS = ['random | 41.0 ± 1.0 | 41.0 ± 1.0', 'random, rgb | 46.0 ± 1.0', 'chance | 20.0 | 20.0',
        'shuffled | 0.700 ± 0.100 | 14.0 ± 0.0 | 0.0 ± 0.0 | 53.0 ± 1.0 | 55.0 ± 1.0',
        'no repair | 0.050 ± 0.000 | 18.1 ± 0.1 | 10.0 ± 1.0 | 58.0 ± 1.0 | 60.0 ± 1.0',
        '200 | 50.0 ± 1.0 | 52.1 ± 1.1 | 54.2 ± 1.2 | 56.3 ± 1.3 | 58.4 ± 1.4 | 60.5 ± 1.5 | 0.30 | 0.21',
        'rgb | 0.410 | 0.100 | 51.0 ± 1.0 | 52.0 ± 1.0', 'supervised | 51.0 ± 1.0 | 57.0 ± 1.0',
        'base | 30.0 ± 0.0 | 40.0 ± 0.0 | 61.0 ± 1.0', 'DeepCluster, own images | 51.0 ± 1.0',
        'random, shapes | 11.0 ± 1.0', 'DeepCluster, digits | 90.0 ± 0.0', 'random | 24.0 ± 0.0',
        'DeepCluster | 41.0 ± 1.0', 'chance, about | 20.0',
        'stop after 1 | 41.0 ± 1.0 | 43.0 ± 1.0 | 45.0 ± 1.0 | 47.0 ± 1.0 | 49.0 ± 1.0 | 51.0 ± 1.0 | '
        '−5.0 ± 0.0']

def test_verdicts_of_known_truth(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    bars, real = {}, Axes.errorbar
    monkeypatch.setattr(Axes, 'errorbar', lambda ax, x, y, spread, label, **how: bars.update(
        {label: (x, y, spread)}) or real(ax, x, y, spread, label=label, **how))
    assert page(tmp_path/'r', made()) == TRUTH
    rows = {n: r for n,r in json.loads((tmp_path/'r'/'metrics.json').read_text()).items() if n != 'seconds'}
    plain = lambda text: text.replace('\N{NO-BREAK SPACE}', ' ')
    assert FIGURES == {int(n): ', '.join(re.findall(r'[+−]?\d+\.\d+ ± \d+\.\d+', plain(' '.join(
        f['figures'] for f in r['found'])))) for n,r in rows.items()}
    cells = json.loads((tmp_path/'r'/'notebook.ipynb').read_text())['cells']
    text = plain('\n'.join(''.join(o['data'].get('text/markdown', '')) for c in cells
                           for o in c.get('outputs', []) if 'data' in o))
    assert [r for r in ROWS if f'\n| {r} |' not in text] == []
    x, y, spread = bars['conv3']
    assert x == [2, 6, 20, 60, 200, 600] and y == pytest.approx([45.02, 45.06, 50, 45.6, 54.2, 51])
    assert spread == pytest.approx([1, 1, 1, 1, 1.2, 1])

def test_the_rule_at_its_bounds():
    space = names_of('findings', 'def verdict(')
    def around(mean): return [mean - 1, mean, mean + 1]                # three seeds, deviation 1
    # 2.92 of Student's t with two degrees of freedom, one-sided, over the root of three: 1.686
    assert [space['verdict'](around(m)) for m in (1.70, 1.67, -1.17, -1.20)] == [SEEN, OPEN, OPEN, NOT]
    assert [space['verdict'](around(m), least=0.) for m in (-1.67, -1.70)] == [OPEN, NOT]

def test_a_row_is_judged_by_the_runs_it_asks_for():
    needs = names_of('findings', 'def changes(', epochs=5)['needs'](20, 5)
    for row,names in needs.items():
        runs = {n: r for n,r in made().items() if n.rpartition('/')[0] in names}
        space = names_of('findings', 'def verdict(', 'def get(', 'say(', 'logs =', R=runs, Rows=needs, K=20,
                         recipe=RECIPE, display=lambda shown: None)
        assert [said for _,said,_ in space['answers'][row][1]] == TRUTH[row]

def test_verdicts_of_the_opposite(tmp_path):
    runs = made()
    for name,r in runs.items():
        if 'log' not in r: continue
        r['log'] |= dict(ami_labels=r['log']['ami_labels'][::-1], nmi_prev=[None, .6, .62, .7, .9],
                         loss=[4.]*5)
        r |= dict(largest=.1, effective=18., empty=0, ami_color=.1, ami=.1, purity=.2,
                  top=dict(conv1=.6, conv3=.4, conv5=.2))
        if name[:-2] in ('k=60', 'k=200', 'k=600'): r |= judged(30.)
    rows = page(tmp_path/'r', runs)
    assert rows[2] == [NOT]*3 and rows[3] == [NOT]*3
    assert rows[4] == [NOT, NOT, SEEN, NOT, NOT, NOT] and rows[5][:3] == [NOT]*3
    assert rows[7] == [NOT]*2 and rows[8] == [NOT]*2

def test_what_is_missing_decides_nothing(tmp_path):
    runs = {n: r for n,r in made().items() if n != 'other/2' and not n.startswith('supervised')}
    rows = page(tmp_path/'r', runs, '-p', 'row=1')
    assert rows[9] == [OPEN]*4 and rows[10] == [OPEN]*2 and 6 not in rows and rows[1] == [SEEN]
    assert 'row=6' in (tmp_path/'r'/'report.html').read_text()

def test_differences_are_within_a_seed(tmp_path):
    page(tmp_path/'r', {n: r for n,r in made(4).items() if n != 'rgb/0'}, '-p', 'row=1')
    found = json.loads((tmp_path/'r'/'metrics.json').read_text())['6']['found']
    assert found[2]['figures'].startswith('+5.0')                # color, at conv1, of three seeds

def test_numbers_of_retrieval_and_of_the_best_nine():
    space = names_of('findings', 'def retrieved(', excitement=lambda net, im, *_: im.feats)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(30) % 3
    train, test = (SimpleNamespace(labels=y, feats=torch.randn(30, 6, generator=g) + y[:, None])
                   for _ in range(2))
    z = l2_normalize(PCA(4).fit(train.feats).transform(test.feats))
    rest = [[j for j in range(30) if j != i] for i in range(30)]
    aps = [average_precision_score(y[r] == y[i], z[r] @ z[i]) for i,r in enumerate(rest)]
    found = space['retrieved'](None, train, test, SimpleNamespace(pca=4, size=32))
    assert found == pytest.approx(100*sum(aps)/30, abs=1e-3)
    high = SimpleNamespace(labels=(torch.arange(30) >= 21).long(), feats=torch.arange(30.)[:, None] % 30)
    assert space['top_nine'](None, high, SimpleNamespace(size=32)) == {f'conv{i}': [1.] for i in (1, 3, 5)}
    high.labels[29] = 0
    assert space['top_nine'](None, high, SimpleNamespace(size=32))['conv1'] == [8/9]

def test_a_runs_name_says_what_it_changes():
    space = names_of('findings', 'def changes(', 'def config_of(', epochs=5, other='photographs')
    base = Config(dataset='shapes', n_images=200, size=32, k=20, pca=128, epochs=5, threads=-1, seed=3)
    names = {n for row in space['needs'](20, 5).values() for n in row}
    wanted = {n: {} for n in ('random', 'base', 'supervised')}
    wanted |= {n: dict(sobel=False) for n in ('random, rgb', 'rgb')}
    wanted |= {'shuffled': dict(sampler='shuffled'), 'no repair': dict(k=200, clusterer='lloyd'),
               'rgb, jitter': dict(sobel=False, jitter=.4, gray=.2)}
    wanted |= {f'k={k}': dict(k=k) for k in (2, 6, 60, 200, 600)}
    wanted |= {f'stop after {n}': dict(recluster=n) for n in (1, 2, 4)}
    wanted |= {n: dict(dataset='folder', root='photographs', n_images=0, size=64)
               for n in ('other', 'other, random', 'other, supervised')}
    assert names == wanted.keys()
    for name,changed in wanted.items(): assert space['config_of'](name, 3) == replace(base, **changed), name

class Images: # eighty that know where they are from
    classes = 'abcd'
    def __init__(self, *where): self.where = where
    def __len__(self): return 80

def test_every_run_is_made_and_measured_as_its_name_says(tmp_path):
    fits, asked, taught, found, drawn = [], [], [], [], []
    def fit(config, images, echo):
        fits.append((config, images.where))
        return SimpleNamespace(net='trained', log=[dict(seconds=dict(training=60.))])
    def evaluate(net, train, test, *how):
        asked.append((net, train.where, test.where, *how))
        return dict(probes={m: dict(last=float(i), best=9.) for i,m in enumerate(LAYERS[:5])}, knn=50.)
    def labels(images, config, folder):
        taught.append((config, images.where, folder))
        return 'labeled'
    space = names_of('findings', 'def changes(', 'def colors(', 'def draw(', 'def config_of(', fit=fit,
                     evaluate=evaluate, supervised=labels, load_images=Images, other='photographs',
                     same_data=lambda folder, **sets: found.append([s.where for s in sets.values()]))
    space |= dict(described=lambda run, by_color: dict(by_color=by_color),
                  top_nine=lambda net, images, config: {images.where[2]: [.2, .4]},
                  retrieved=lambda net, train, test, config: [net, train.where, test.where],
                  draw=lambda run, folder: drawn.append(folder))
    folder = SimpleNamespace(path=tmp_path)
    def pair(*where, n=(0, 0)): return [(*where, s, k, 2) for s,k in zip(('train', 'test'), n)]
    train, test = own = pair('shapes', None, n=(200, 100))
    c = resolve(Config(seed=2))
    how = c.device, c.precision, 2
    def made(name): return space['measured'](name, 2, folder)

    m = made('base')
    assert [m[n] for n in LAYERS] == [0., 1., 2., 3., 4., 50.]
    assert m['by_color'] and m['top'] == dict(train=.3)
    assert (m['images'], m['test'], m['classes']) == (80, 80, 4) and m['seconds'] == pytest.approx(60, abs=1)
    (config, images), = fits
    assert images == train and (config.seed, config.pca) == (2, 10)     # of 80 images an eighth
    assert Path(config.run_dir) == tmp_path/'runs'/'base-2'
    assert asked == [('trained', train, test, 32, *how)] and found == [own] and not drawn
    m = made('shuffled')
    assert m['by_color'] is False and 'top' not in m and fits[1][0].sampler == 'shuffled'
    assert [made(n)['by_color'] for n in ('rgb', 'rgb, jitter')] == [True]*2
    made('random'); m = made('random, rgb')
    (net, *given), (colored, *_) = asked[-2:]
    assert given == [train, test, 32, *how] and 'top' not in m and len(fits) == 4
    for net,sobel in ((net, True), (colored, False)):
        same = network(resolve(Config(k=20, sobel=sobel, seed=2)))
        assert all(torch.equal(a, b) for a,b in zip(net.parameters(), same.parameters(), strict=True))
    made('supervised')
    (config, images, place), = taught
    assert asked[-1] == ('labeled', train, test, 32, *how) and images == train
    # as many passes as the others make: three reassignments of four
    assert (config.supervised, config.seed, config.size) == (12, 2, 32)
    assert place == tmp_path/'runs'/'supervised-2'
    asked.clear()
    m = made('other, supervised')
    there = pair('folder', 'photographs')
    assert asked == [('labeled', *there, 64, *how), ('labeled', *own, 64, *how),
                     ('labeled', *pair('digits', None), 64, *how)]
    assert m['map'] == ['labeled', *there] and taught[1][1] == there[0] and taught[1][0].size == 64
    assert {'own', 'shapes', 'digits'} < m.keys() and found[-1] == there
    space['measured']('base', 0, folder)
    assert drawn == [tmp_path/'figures']

def test_what_is_said_of_clusters_by_hand():
    space = names_of('findings', 'def described(')
    assign = torch.tensor([0]*60 + [2]*20)                  # the second cluster is empty
    labels = torch.tensor([0]*50 + [2]*10 + [2]*5 + [1]*15)
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    images = type('Painted', (list,), dict(labels=labels, classes='abcd'))([red, red.flip(0)]*40)
    log = [dict(loss=2.00004, ln_k=1.1, nmi_prev=None, nmi_prev_chance=None, nmi_labels=.1, ami_labels=.2)]
    clustering = SimpleNamespace(assign=assign, sizes=torch.tensor([60, 0, 20]), n_empty=1)
    run = SimpleNamespace(clustering=clustering, images=images, log=log, config=SimpleNamespace(seed=0, k=2))
    m = space['described'](run, True)
    # 50 of 60 and 15 of 20 images are of their cluster's class; no cluster is mostly of the last two
    assert m['purity'] == .8125 > m['purity_chance'] + .1 and m['purity_chance'] >= 50/80
    assert (m['largest'], m['empty'], m['fewest']) == (.75, 1, 0)
    assert m['effective'] == pytest.approx(4/27**.25, abs=1e-4)          # exp of the entropy of 3/4 and 1/4
    by = dict(average_method='geometric')
    assert m['nmi'] == pytest.approx(normalized_mutual_info_score(labels, assign, **by), abs=1e-4)
    assert m['ami'] == pytest.approx(adjusted_mutual_info_score(labels, assign, **by), abs=1e-4)
    assert m['ami_color'] == pytest.approx(adjusted_mutual_info_score([0, 1]*40, assign, **by), abs=1e-4)
    assert m['log'] == {n: [v if v is None else round(v, 4)] for n,v in log[0].items()}
    assert 'ami_color' not in space['described'](run, False)
    run.clustering = SimpleNamespace(assign=labels, sizes=torch.bincount(labels, minlength=4), n_empty=1)
    images.classes = 'abc'
    m = space['described'](run, False)
    assert m['purity'] == 1 and m['fewest'] == 1

def test_pictures_are_chosen_by_rule(tmp_path):
    # of 20 images in each of eleven clusters 3, 4, … 13 are of one class; another cluster has nine images
    labels = torch.tensor([c for n in range(3, 14) for c in [0]*n + [*range(1, 21 - n)]] + [0]*9)
    assign = torch.cat([torch.arange(11).repeat_interleave(20), torch.full((9,), 11)])
    found = SimpleNamespace(assign=assign, sizes=torch.bincount(assign, minlength=13))
    run = SimpleNamespace(images=SimpleNamespace(labels=labels), config=SimpleNamespace(k=13, size=32),
                          net='net', clustering=found)
    space, seen = names_of('findings', 'def draw('), []
    space |= dict(top_nine=lambda *args: dict(conv1=[.2, .9, .5, .4, .6]),
                  save=lambda fig, file: seen.append(file),
                  cluster_montage=lambda images, assign, which: seen.append(which),
                  gradient_ascent=lambda net, layer, channels, size: (layer, channels),
                  top_images=lambda net, images, layer, channels, size, made: seen.append(made))
    space['draw'](run, tmp_path)
    assert seen == [[10, 9, 8, 6, 5, 4, 2, 1, 0], tmp_path/'subgroups.png',
                    ('conv1', [1, 2, 0]), tmp_path/'conv1.png']

def photographs(folder): # of five classes, as ImageNet is laid out
    for split, n in (('train', 30), ('val', 15)):
        images = shapes('train' if split == 'train' else 'test', n)
        for i,(im,y) in enumerate(zip(images, images.labels.tolist())):
            file = folder/split/str(y)/f'{i:03d}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(im.permute(1, 2, 0).numpy()).resize((72 + i % 3, 72)).save(file)

def test_rows_share_their_runs_and_go_on(tmp_path, capsys):
    photographs(tmp_path/'other')
    tiny = [x for p in ('dataset=digits', 'n_images=190', 'n_test=40', 'k=20', 'seeds=1',
                        f'other={tmp_path}/other') for x in ('-p', p)]
    def run(rows):
        assert main(['run', 'findings', '--out', str(tmp_path/'r'), *tiny, '-p', f'row={rows}']) == 0
    def kept(): return json.loads((tmp_path/'r'/'results.json').read_text())['runs']
    run('7,2')
    first = kept()
    assert {n for n,r in first.items() if 'skipped' not in r} == {'base/0', 'shuffled/0'}
    # more clusters than images: said, not run
    assert {n for n,r in first.items() if 'skipped' in r} == {'k=200/0', 'no repair/0'}
    assert {f.name for f in (tmp_path/'r'/'figures').iterdir()} == {'subgroups.png', 'conv1.png', 'conv3.png',
                                                                    'conv5.png'}
    run('8, 9')
    later = kept()
    assert {n: later[n] for n in first} == first
    assert later.keys() - first.keys() == {'random/0', 'other/0', 'other, random/0', 'other, supervised/0'}
    far = later['other, supervised/0']
    assert set(far) >= {'own', 'digits', 'map'} and 0 < far['map'] <= 100
    # as many passes as DeepCluster makes: three reassignments of four
    assert load_checkpoint(tmp_path/'r'/'runs'/'other_supervised-0')[0] == 12

@pytest.mark.parametrize('given, says', [
    ('row=13', 'row: expected some of 1, 2'), ('k=10', 'k: expected at least 20'),
    ('epochs=2', 'epochs: expected at least 3'), ('seeds=0', 'seeds: expected at least 1')])
def test_impossible_values(tmp_path, capsys, given, says):
    assert main(['run', 'findings', '--out', str(tmp_path/'r'), '-p', given]) != 0
    assert says in capsys.readouterr().err
