"The page of findings: verdicts from numbers whose truth is known, and small runs of its rows."
import json
from types import SimpleNamespace
import pytest, torch
from PIL import Image
from sklearn.metrics import average_precision_score
from deepcluster_nb.data import shapes
from deepcluster_nb.experiments import main
from deepcluster_nb.features import PCA, l2_normalize
from deepcluster_nb.runs import load_checkpoint

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

def test_verdicts_of_known_truth(tmp_path):
    assert page(tmp_path/'r', made()) == {
        1: [SEEN], 2: [SEEN]*3, 3: [SEEN]*3, 4: [SEEN]*6, 5: [SEEN]*3 + [OPEN], 6: [NOT]*2 + [SEEN]*3,
        7: [SEEN]*2, 8: [SEEN]*2, 9: [SEEN]*2 + [NOT]*2, 10: [SEEN]*2, 11: [NOT, SEEN, OPEN]}

def test_the_rule_at_its_bounds():
    from deepcluster_nb.experiments import experiments_folder
    nb = json.loads((experiments_folder()/'findings.ipynb').read_text())
    source = next(s for s in (''.join(c['source']) for c in nb['cells']) if 'def verdict(' in s)
    exec('import numpy as np\nfrom scipy import stats\n' + source, space := {})
    def around(mean): return [mean - 1, mean, mean + 1]                # three seeds, deviation 1
    # 2.92 of Student's t with two degrees of freedom, one-sided, over the root of three: 1.686
    assert [space['verdict'](around(m)) for m in (1.70, 1.67, -1.17, -1.20)] == [SEEN, OPEN, OPEN, NOT]
    assert [space['verdict'](around(m), least=0.) for m in (-1.67, -1.70)] == [OPEN, NOT]

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
    from deepcluster_nb.experiments import experiments_folder
    nb = json.loads((experiments_folder()/'findings.ipynb').read_text())
    source = next(s for s in (''.join(c['source']) for c in nb['cells']) if 'def retrieved(' in s)
    space = dict(torch=torch, PCA=PCA, l2_normalize=l2_normalize, excitement=lambda net, im, *_: im.feats)
    exec(source, space)
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
