"Several runs in one notebook: what differs, seeds, published numbers, and runs that are not finished."
import json, re, shutil, statistics
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
import matplotlib.pyplot as plt, pytest, torch, yaml
from PIL import Image
from deepcluster_nb.data import generator, pick
from deepcluster_nb.experiments import find_runs, main, run_params
from deepcluster_nb.fast.features import compute_features
from deepcluster_nb.runs import RunFolder
from deepcluster_nb.fit import Config, fit, load_assignments, load_run, network
from deepcluster_nb.sources import load_images
from in_process import names_of

pytestmark = pytest.mark.usefixtures('in_process')

LAYERS = [f'conv{i}' for i in range(1, 6)]
SMALL = dict(dataset='digits', n_images=60, n_test=40, k=5, pca=8, epochs=2, passes=1, batch_size=30,
             device='cpu', threads=1)

def measured(path, level, **more): # metrics.json with this mean of the probes over random's 50
    probes = dict(random={l: 50. for l in LAYERS}, random_calibrated={l: 49. for l in LAYERS},
                  deepcluster={l: level + i - 2 for i,l in enumerate(LAYERS)})
    metrics = dict(n_images=60, classes=10, probes=probes,
                   knn=dict(random=30., random_calibrated=35., deepcluster=level - 10),
                   seconds=dict(probes=3., total=9.)) | more
    (Path(path)/'metrics.json').write_text(json.dumps(metrics))

@pytest.fixture(scope='module')
def runs(tmp_path_factory): # three that are finished, and one that was stopped
    top = tmp_path_factory.mktemp('runs')
    for name,change,level in (('seed0', {}, 60.), ('seed1', dict(seed=1), 61.), ('ten', dict(k=6), 62.)):
        fit(Config(**SMALL | change, run_dir=str(top/name)), echo=None)
        measured(top/name, level)
    shutil.copytree(top/'seed0', top/'stopped')
    params = yaml.safe_load((top/'stopped'/'params.yaml').read_text())
    (top/'stopped'/'params.yaml').write_text(yaml.safe_dump(params | dict(lr=.01)))
    for name in ('metrics.json', 'clusters.csv', 'assignments/epoch_002.npy'): (top/'stopped'/name).unlink()
    log = (top/'stopped'/'log.jsonl').read_text().splitlines()
    (top/'stopped'/'log.jsonl').write_text(log[0] + '\n')
    (top/'another').mkdir(); (top/'another'/'params.yaml').write_text('protocol: paper\n')
    return top

def everything(where): # what the notebook shows, as text
    cells = json.loads((where/'notebook.ipynb').read_text())['cells']
    outputs = [o for c in cells if c['cell_type'] == 'code' for o in c['outputs']]
    return '\n'.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in outputs), outputs

def test_runs_side_by_side(runs, tmp_path, capsys, monkeypatch):
    from deepcluster_nb import pictures
    montage, drawn = pictures.cluster_montage, []
    monkeypatch.setattr(pictures, 'cluster_montage',
                        lambda images, assign, **how: drawn.append(assign) or montage(images, assign, **how))
    lines, save = {}, plt.Figure.savefig
    def saved(fig, file, **how):
        lines[getattr(file, 'stem', '')] = {ax.get_title('left'): [
            (l.get_label(), l.get_xydata().tolist()) for l in ax.lines] for ax in fig.axes}
        return save(fig, file, **how)
    monkeypatch.setattr(plt.Figure, 'savefig', saved)
    before = {p: p.read_bytes() for p in runs.rglob('*') if p.is_file() and p.name != 'lock'}
    assert main(['run', 'compare', '-p', f'runs={runs}/*', '-p', 'n_images=0', '-p', 'most=4',
                 '--out', str(tmp_path/'out')]) == 0
    out, (text, _) = capsys.readouterr().out, everything(tmp_path/'out')
    assert before == {p: p.read_bytes() for p in runs.rglob('*') if p.is_file() and p.name != 'lock'}
    m = json.loads((tmp_path/'out'/'metrics.json').read_text())
    assert (set(m['runs']) == {'seed0', 'seed1', 'ten', 'stopped'} and m['runs']['stopped']['state']
            == 'stopped' and m['runs']['ten']['settings'] == dict(k=6, lr=.05, seed=0))
    (means,) = m['means'].values()
    both = means['k = 5, lr = 0.05']['conv3']
    assert (both == dict(mean=60.5, std=pytest.approx(statistics.stdev([60., 61.])), n=2)
            and means['k = 6, lr = 0.05']['conv3'] == dict(mean=62., std=None, n=1)
            and means['random']['kNN']['n'] == 2)
    assert '60.5\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.7' in text
    assert 'ours, 2 seeds' in text and 'ours, one seed' in text
    verdict = ' '.join(m['verdict'])
    assert ('4 runs, 3 finished; stopped is stopped after 1 of 2 epochs' in verdict
            and 'k = 6, lr = 0.05 leads with 62.0 %, +12.0 points' in verdict)
    assert ('differ by 0.7 points' in verdict and '1.5 behind: more than twice that; three seeds' in verdict
            and 'Among neighbors it has 52.0 %, +17.0 points' in verdict
            and verdict in text and all(line in out for line in m['verdict']))
    curves, levels = lines['curves'], dict(seed0=60, seed1=61, ten=62)
    for i,(name,r) in enumerate(m['runs'].items()):
        log = [json.loads(l) for l in (runs/name/'log.jsonl').read_text().splitlines()]
        last, knn = log[-1], f'{levels[name] - 10}.0' if name in levels else ''
        assert (f"| {r['state']} | {len(log)} of 2 | {last['loss']/last['ln_k']:.2f} | "
                + ('' if last['nmi_prev'] is None else f"{last['nmi_prev']:.2f}")
                + f" | {last['nmi_labels']:.3f} | {last['n_empty']} | {knn} |"
                ) in next(l for l in text.splitlines() if l.startswith(f'| {name} |'))
        def points(of): return [[r['epoch'] + 1, of(r)] for r in log if of(r) is not None]
        even = points(lambda r: r['cluster_sizes']['entropy']/r['ln_k'])
        assert (name, even) in curves['Evenness of the clusters']
        assert (name, points(lambda r: r['loss']/r['ln_k'])) in curves['Training loss']
        assert (name, points(lambda r: r['nmi_labels'])) in curves['Agreement with the labels']
        for key in ('nmi_prev', 'nmi_prev_chance') if name != 'stopped' else ():
            assert points(lambda r: r[key]) in [v for _,v in curves['Agreement with the previous clustering']]
        for p,s in r['seconds'].items():
            assert s == pytest.approx(3. if p == 'probes' else sum(e['seconds'][p] for e in log), abs=.006)
        for assign, epoch in zip(drawn[2*i:2*i + 2], (0, len(log) if name != 'stopped' else 1)):
            assert torch.equal(assign, load_assignments(runs/name, epoch))           # before and after
    (drawn_probes,) = lines['probes'].values()
    shown = {name: [y for _,y in v] for name,v in drawn_probes if not name.startswith('_')}
    assert shown == {'random': [50.]*5, 'random, calibrated': [49.]*5,
                     'k = 5, lr = 0.05': [58.5, 59.5, 60.5, 61.5, 62.5],
                     'k = 6, lr = 0.05': [60., 61., 62., 63., 64.]}
    assert 'not running: it was stopped after 1 of 2 epochs' in text and 'published' not in text
    figures = {p.name for p in (tmp_path/'out'/'figures').iterdir()}
    assert figures == {'curves.png', 'probes.png'} | {f'clusters_{i}_{when}.png' for i in range(4)
                                                      for when in ('before', 'after')}
    html = (tmp_path/'out'/'report.html').read_text()
    assert (html.count('<img') == 10 and '<title>Runs side by side</title>' in html
            and 'def curves' not in html)

def test_other_images_are_no_other_seeds_and_a_copy_is_no_second_run(runs, tmp_path):
    for name in 'ab': (tmp_path/name).mkdir()
    for i in range(60):
        for name in 'ab':
            im = torch.randint(256, (36, 36), dtype=torch.uint8, generator=generator(i, name)).numpy()
            Image.fromarray(im).save(tmp_path/name/f'{i:02d}.png')
    for name,root,seed in (('one', 'a', 0), ('two', 'a', 1), ('three', 'b', 1)):
        given = SMALL | dict(dataset='folder', root=str(tmp_path/root), n_images=0, seed=seed)
        fit(Config(**given, size=32, run_dir=str(tmp_path/'runs'/name)), echo=None)
        measured(tmp_path/'runs'/name, 60.)
    shutil.copytree(tmp_path/'runs'/'one', tmp_path/'runs'/'copy')
    where = tmp_path/'c'
    args = ['-p', f"runs={tmp_path/'runs'}/*", '-p', 'most=0', '-p', 'n_images=1']
    assert main(['run', 'compare', '--out', str(where), *args]) == 0
    text, _ = everything(where)
    assert 'The runs have different images.' in text and 'the two count as one' in text
    found = json.loads((where/'metrics.json').read_text())
    counts = sorted(v['conv1']['n'] for rows in found['means'].values() for name,v in rows.items()
                    if not name.startswith('random'))
    assert counts == [1, 2]

def test_luck_and_losses_are_called_that(runs, tmp_path, monkeypatch):
    maps = []
    def umap(feats, images, **how): maps.append((feats, images, how)); return plt.figure()
    monkeypatch.setattr('deepcluster_nb.pictures.umap_plot', umap)
    # the standard deviation between two seeds is 2.1, and what is luck lies between one and two of them
    for name,seed,level in (('a', 0, 50.), ('b', 1, 53.)):
        shutil.copytree(runs/f'seed{seed}', tmp_path/name)
        measured(tmp_path/name, level)
    shutil.copytree(runs/'ten', tmp_path/'c'); measured(tmp_path/'c', 53.8)
    for name,share in dict(a=.5, b=.8, c=.97).items():
        rows = [json.loads(l) for l in (tmp_path/name/'log.jsonl').read_text().splitlines()]
        (tmp_path/name/'log.jsonl').write_text(''.join(json.dumps(r | dict(loss=share*r['ln_k'],
                                                                         seconds=dict(pca=1.5, training=5.)))
                                                       + '\n' for r in rows))
    assert main(['run', 'compare', '-p', f'runs={tmp_path}/a {tmp_path}/b {tmp_path}/c', '-p', 'most=1',
                 '-p', 'n_images=55', '-p', 'seed=4', '--out', str(tmp_path/'out')]) == 0
    verdict = ' '.join(json.loads((tmp_path/'out'/'metrics.json').read_text())['verdict'])
    assert ('k = 6 leads with 53.8 %, +3.8 points from the better of the random features, '
            'not more than twice the spread between seeds (2.1), so it may be luck' in verdict
            and '2.3 behind: not more than twice that, so it may be luck' in verdict
            and 'stayed near ln k in c:' in verdict)
    assert '| a | 3 s | 10 s | 3 s | 16 s | 6.5 s |' in everything(tmp_path/'out')[0]
    ((feats, images, how),), run = maps, load_run(tmp_path/'a')
    some = load_images('digits', n_images=60).subset(pick(60, 55, 4))
    assert torch.equal(images.labels, some.labels) and how == dict(thumbnails=2, seed=4)
    for (title, f), wanted, net in zip(feats.items(), ('random', 'a'), (network(run.config), run.net)):
        assert title == wanted and torch.equal(
            f, compute_features(net, some, 32, precision=run.config.precision))

def row(name, *seeds, is_random=False): # a row of a table, from its values in three measures for each seed
    return name, {m: list(v) for m,v in zip(('conv1', 'conv2', 'kNN'), zip(*seeds))}, [name], is_random

def verdict_of(*rows):
    space = names_of('compare', 'words = [', tables=[('digits', rows, [])], looks={}, in_markdown=str,
                     spread=list, count=lambda n, thing: '', answer=SimpleNamespace(update=lambda text: None))
    return space['words'][1:]

def test_what_is_said_of_gaps_and_spreads():
    floor = row('random', (49, 51, 30), is_random=True), row('calibrated', (47, 51, 35), is_random=True)
    # means of the probes: random 50; ours 60, 61, 62 and 63, 64, 65, whose deviations are 1
    a = row('a', (59, 61, 40), (60, 62, 40), (61, 63, 40))
    b = row('b', (62, 64, 30), (63, 65, 31), (64, 66, 32))
    assert verdict_of(*floor, a, b) == [
        'On the mean of the linear probes b leads with 64.0 %, '
        '+14.0 points from the better of the random features.',
        'Among neighbors it has 31.0 %, −4.0 points from the better of them.',
        'Between seeds the same settings differ by 1.0 points (standard deviation).',
        'a is 3.0 behind: more than twice that, so hardly luck.']
    varied = row('random', (44, 46, 30), (54, 56, 30), is_random=True)
    said = verdict_of(varied, a, b)
    assert said[0].endswith('not more than twice the spread between seeds (7.1), so it may be luck.')
    assert said[2].endswith('differ by 1.0 points (standard deviation).') and 'hardly luck' in said[3]
    two = row('a', (59, 61, 40), (60, 62, 40))
    assert verdict_of(*floor, two, b)[-1].endswith('more than twice that; three seeds of each would tell.')
    one, below = row('a', (59, 61, 40)), row('below', (45, 55, 30))
    assert verdict_of(*floor, one, below)[-2:] == [
        'Not above random features: below.',
        'below is 10.0 behind: no seed was repeated, so a gap below two points may be luck.']
    assert 'a comes with 60.0 %' in verdict_of(*floor, one)[0]

def test_random_features_are_of_the_same_images_and_network():
    def tables_of(**other): # of a run and of one that differs in this
        looks = {}
        for i,name in enumerate('ab'):
            found = dict(probes=dict(random=dict(conv1=50. + i), deepcluster=dict(conv1=60.)),
                         knn=dict(random=30., deepcluster=40.))
            looks[name] = SimpleNamespace(params=asdict(Config(n_images=60, seed=i)) | (other if i else {}),
                                          path=name, log=[], state='finished', metrics=found)
        space = names_of('compare', 'differ = [', 'def settings(', 'SAME = ', looks=looks,
                         **{n: lambda *args: None for n in ('keep', 'display', 'table', 'read_finished',
                                                            'probe_table')})
        plt.close('all')
        return [[name for name,_,_,is_random in rows if not is_random] for _,rows,_ in space['tables']], space
    for name,value in dict(n_test=40, n_images=50, dataset='shapes', size=40, sobel=False, arch='resnet18',
                           border='replicate', relu=True, center_box='torchvision').items():
        assert len(tables_of(**{name: value})[0]) == 2, name
    for name,value in dict(k=7, lr=.2, epochs=9, pca=8).items():
        (rows,), space = tables_of(**{name: value})
        assert len(rows) == 2 and space['tables'][0][1][0][1]['conv1'] == [50., 51.], name
    (rows,), _ = tables_of()                                   # another seed, and nothing else
    assert len(rows) == 1

def test_published_numbers_stand_beside_the_papers_network(tmp_path):
    c = Config(dataset='packed', root=str(tmp_path/'gone'), size=224, arch='alexnet', k=10_000, pca=256,
               epochs=500, passes=1, batch_size=256, dropout=.5)
    folder = RunFolder(tmp_path/'paper', asdict(c))
    measured(folder.path, 38., n_images=1_281_167, classes=1000)
    assert main(['run', 'compare', '-p', f'runs={folder.path}', '--out', str(tmp_path/'out')]) == 0
    text, _ = everything(tmp_path/'out')
    row = next(l for l in text.splitlines() if 'ECCV' in l)
    # FACTS: printed by others
    assert ([c.strip() for c in row.split('|')[2:8]] == ['13.4', '32.3', '41.0', '39.6', '38.2', '26.8']
            and 'pub: ' in row and 'as others print it' in row and 'arXiv' not in text)
    assert 'no clusters yet' in text and 'one seed' in text

@pytest.mark.parametrize('given, message', [
    ('{0}/nothing', 'no run in .*nothing'),
    ('{0}/seed0 {0}/another', 'another experiment than train'),
    ('{0}/no*', "no run of train at .*no\\*'")])
def test_a_folder_that_is_no_run(runs, tmp_path, capsys, given, message):
    assert main(['run', 'compare', '-p', 'runs=' + given.format(runs), '--out', str(tmp_path/'out')]) == 2
    err = capsys.readouterr().err.strip()
    assert re.search(message, err) and len(err.splitlines()) == 1 and not (tmp_path/'out').exists()

def test_finding_runs(runs, monkeypatch):
    monkeypatch.chdir(runs)
    assert [p.name for p in find_runs('seed? seed0')] == ['seed0', 'seed1'] and find_runs('') == []
    assert {p.name for p in find_runs('*')} == {'seed0', 'seed1', 'ten', 'stopped'}    # `another` is left out
    spaced = runs/'with a space'
    shutil.copytree(runs/'seed0', spaced)
    try: assert find_runs(str(spaced)) == [spaced]
    finally: shutil.rmtree(spaced)

def test_a_run_from_before_a_setting_came(tmp_path):
    old = {k: v for k,v in asdict(Config()).items() if k not in ('relu', 'head')}
    (tmp_path/'params.yaml').write_text(yaml.safe_dump(old | dict(k=7)))
    assert run_params(tmp_path) == asdict(Config(k=7))
