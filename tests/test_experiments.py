"The command, papermill, and the folder that they leave."
import ast, io, json, math, os, re, signal, subprocess, sys, time
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch, yaml
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from deepcluster_nb.experiments import (SPINS, experiments_folder, gather, kernel_environment, main,
                                        parameters, parse_pair, summary)
from deepcluster_nb.data import generator, pick
from deepcluster_nb.runs import Guard, RunFolder, held_by
from deepcluster_nb.fit import Config, network, resolve
from deepcluster_nb.model import alexnet_small
from deepcluster_nb.sources import load_images
import made_runs, survive
from in_process import names_of
from made_runs import same_format, shape
from survive import sha256

def table_and_folder(out, where):
    assert 'linear probe conv5' in out and 'kNN' in out and str(where/'report.html') in out
    names = {p.name for p in where.iterdir()}
    assert names == {'params.yaml', 'data.json', 'log.jsonl', 'metrics.json', 'assignments', 'clusters.csv',
                     'checkpoint', 'figures', 'notebook.ipynb', 'report.html'}
    m = json.loads((where/'metrics.json').read_text())
    assert (list(m['probes']['random']) == list(m['probes']['deepcluster'])
            == [f'conv{i}' for i in range(1, 6)])
    assert (all(0 <= v <= 100 for net in m['probes'].values() for v in net.values())
            and set(m['knn']) == {'random', 'random_calibrated', 'deepcluster'})
    assert ({p.name for p in (where/'figures').iterdir()}
            == {'curves.png', 'clusters_before.png', 'clusters.png', 'neighbors_before.png',
                'neighbors.png', 'probes.png'})
    html = (where/'report.html').read_text()
    assert (html.count('<img') == 6 and m['verdict']
            and all(line in html and line in out for line in m['verdict'])
            and 'The answer comes here' not in html)
    assert '<title>DeepCluster, start to finish</title>' in html and 'cluster_montage(' not in html
    code = [c for c in json.loads((where/'notebook.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    assert all(c['metadata']['jupyter']['source_hidden'] for c in code)         # the notebook is a report too

SAVING = ['--preset', 'digits', '-p', 'n_images=100', '-p', 'n_test=40', '-p', 'k=10', '-p', 'pca=16',
          '-p', 'epochs=3', '-p', 'passes=2', '-p', 'checkpoint_minutes=0']

def outcome(run_dir): # all that must not depend on a stop
    metrics = {k: v for k,v in json.loads((run_dir/'metrics.json').read_text()).items() if k != 'seconds'}
    cells = json.loads((run_dir/'notebook.ipynb').read_text())['cells']
    return (metrics, sha256(run_dir), [c['execution_count'] for c in cells if c['cell_type'] == 'code'],
            [{o['output_type'] for o in c.get('outputs', [])} for c in cells])

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory): # (folder, what the command printed)
    where, printed = tmp_path_factory.mktemp('run')/'r', io.StringIO()
    with redirect_stdout(printed): assert main(['run', 'train', '--out', str(where), *SAVING]) == 0
    return where, printed.getvalue()

def test_command_runs_and_can_be_repeated(undisturbed, tmp_path, capsys):
    where, out = undisturbed
    true, mine = same_format(where, made_runs.train(tmp_path/'made'))
    assert shape(true['probes']) == shape(mine['probes'])
    before = outcome(where)
    table_and_folder(out, where)
    assert main(['run', 'train', '--out', str(where), *SAVING]) == 0
    table_and_folder(capsys.readouterr().out, where)
    assert outcome(where) == before and len((where/'log.jsonl').read_text().splitlines()) == 3

def test_plain_papermill(tmp_path):
    nb, preset = experiments_folder()/'train.ipynb', experiments_folder()/'presets'/'digits.yaml'
    tiny = [x for p in ('n_images 60', 'n_test 40', 'k 5', 'pca 8', 'epochs 1', 'passes 1')
            for x in ('-p', *p.split())]
    subprocess.run(['papermill', str(nb), str(tmp_path/'out.ipynb'), '-f', str(preset), *tiny,
                    '-p', 'run_dir', str(tmp_path/'run'), '--no-progress-bar'],
                   check=True, capture_output=True)
    assert (tmp_path/'run'/'metrics.json').exists()
    cells = json.loads((tmp_path/'out.ipynb').read_text())['cells']
    # no flood of progress
    assert sum(len(''.join(o.get('text', ''))) for c in cells if c['cell_type'] == 'code'
               for o in c['outputs']) < 2000

def test_own_photographs_without_labels(tmp_path, capsys, in_process):
    g = np.random.default_rng(0)
    (tmp_path/'photos').mkdir()
    for i in range(24):
        Image.fromarray(g.integers(0, 256, (40 + i, 36, 3), dtype=np.uint8)).save(
            tmp_path/'photos'/f'{i:02d}.png')
    own = ['-p', 'dataset=folder', '-p', f'root={tmp_path}/photos', '-p', 'k=3', '-p', 'pca=4',
           '-p', 'epochs=1', '-p', 'batch_size=8']
    assert main(['run', 'train', '--out', str(tmp_path/'run'), *own]) == 0
    assert (json.loads((tmp_path/'run'/'metrics.json').read_text())['probes'] == {}
            and 'linear probe' not in capsys.readouterr().out)
    assert 'no probes' in (tmp_path/'run'/'report.html').read_text()
    assert (tmp_path/'run'/'clusters.csv').read_text().splitlines()[1].startswith('00.png,')

@pytest.mark.parametrize('which, names', [
    ('recipe', ['base', 'k = 10', 'k = 25', 'one pass, batch 256', 'dropout .5', 'crops from 8 %',
                'no batch norm in linear layers']),
    ('averages', ['base', 'mean of 100 steps', 'a quarter as often, k = 50', 'the same, mean of 100 steps',
                  'half as many channels more'])])
def test_choices(tmp_path, in_process, which, names):
    tiny = [x for p in ('n_images=60', 'n_test=40', 'k=5', 'pca=8', 'epochs=1', 'seeds=1', f'which={which}')
            for x in ('-p', p)]
    # where it is called twice, the second finds everything done
    for _ in range(1 + (which == 'recipe')):
        assert main(['run', 'choices', '--out', str(tmp_path/'run'), *tiny]) == 0
    m = json.loads((tmp_path/'run'/'metrics.json').read_text())
    assert list(m) == ['random', 'random, calibrated', *names, 'seconds']
    assert all(0 <= m[name]['conv3']['mean'] <= 100 for name in names)

def test_choices_hand_everything_on(tmp_path, monkeypatch, in_process): # nothing is trained or measured
    fits, asked, levels = [], [], {0: 10., 1: 13.}
    def fit(config, images, echo, parts):
        fits.append((config, images, parts))
        log = [dict(loss=l, ln_k=2., nmi_labels=l/8) for l in (4., 1.)]
        return SimpleNamespace(net=network(config), log=log)
    def evaluate(net, train, test, size, device, precision, seed):
        asked.append((net, train, test, seed))
        return dict(probes={f'conv{i}': dict(last=levels[seed] + i, best=99.) for i in range(1, 6)}, knn=50.)
    monkeypatch.setattr('deepcluster_nb.fit.fit', fit)
    monkeypatch.setattr('deepcluster_nb.probes.evaluate', evaluate)
    tiny = dict(n_images=60, n_test=40, k=5, pca=7, epochs=1, seeds=2, min_scale=.3)
    for which in ('averages', 'recipe'):
        given = [x for n,v in (tiny | dict(which=which)).items() for x in ('-p', f'{n}={v}')]
        assert main(['run', 'choices', '--out', str(tmp_path/which), *given]) == 0
    m = json.loads((tmp_path/'recipe'/'metrics.json').read_text())
    assert m['base']['conv3'] == dict(mean=14.5, std=pytest.approx(4.5**.5))
    assert m['base']['loss']['mean'] == .5 and m['base']['nmi_labels']['mean'] == .125
    assert '14.5\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}2.1' in (tmp_path/'recipe'/'report.html').read_text()
    assert [c.seed for c,*_ in fits] == [0]*5 + [1]*5 + [0]*7 + [1]*7
    assert all((c.pca, c.min_scale) == (7, .3) for c,*_ in fits[:10])
    assert [getattr(p, 'decay', 0) for *_,p in fits[:5]] == [0, .99, 0, .99, 0]
    for net,train,test,seed in asked[-9:]:
        wanted = [load_images('digits', None, *s, 1) for s in (('train', 60), ('test', 40))]
        assert seed == 1 and all(torch.equal(a.labels, b.labels) for a,b in zip((train, test), wanted))
    plain, calibrated = (net.features[1].running_mean.abs().sum() for net,*_ in asked[-9:-7])
    assert plain == 0 < calibrated

SAYS = [('RGB', dict(sobel=False)), ('jitter', dict(jitter=.4)), ('RGB, jitter', dict(gray=.2)),
        ('stay', dict(recluster=1)), ('last quarter', dict(lr_schedule='last_quarter')),
        ('cosine learning rate', dict(lr_schedule='cosine')), ('a step back', dict(reset_every=2)),
        ('half as often', dict(epochs=4, passes=8)), ('a quarter as often', dict(epochs=2, passes=16)),
        ('twice the size', dict(size=64, passes=2)), ('half as many channels more', dict(arch='wider')),
        ('no batch norm in linear', dict(arch='without_bn')), ('one pass', dict(passes=1, epochs=32)),
        ('crops from 8 %', dict(min_scale=.08)), ('mean of 100 steps', dict(decay=.99)),
        ('released sampler', dict(sampler='released')), ('weighted loss', dict(sampler='weighted')),
        ('PIC', dict(clusterer='pic')), ('PIC, released', dict(clusterer='pic_released')),
        ('head with momentum', dict(head_momentum=.9)), ('head kept', dict(head='kept')),
        ('head from centroids', dict(head='centroids')), ('border replicated', dict(border='replicate')),
        ('after the ReLU', dict(relu=True)), ('calibrated', dict(calibrate=True))]
NUMBERS = dict(k='k = ', batch_size='batch ', lr='lr ', weight_decay='weight decay ', dropout='dropout ')

def test_a_variant_changes_what_its_name_says():
    space = names_of('choices', 'recipes = {', k=20, epochs=8, n_images=0)
    counts = dict(recipe=7, method=12, samplers=5, tuning=18, averages=5)
    assert {which: len(space['known'][which]) for which in counts} == counts
    for variants in (space['known'][which] for which in counts):
        last = ''
        for name,changed in variants.items():
            last = full = name.replace('the same', last)
            wanted = {n: v for words,how in SAYS if words in full for n,v in how.items()}
            for n,words in NUMBERS.items():
                if found := re.search(rf'\b{words}([\d.e-]+)', full): wanted[n] = float(found[1])
            assert changed == wanted, name
    large = dict(size=64, passes=15)                    # beside the preset's k
    assert space['known']['colors'] == {'base': large, 'Sobel, jitter': large | dict(jitter=.4)}
    # k of 600 and 200 are no fewer than the images
    space = names_of('choices', 'recipes = {', n_images=200)
    assert len(space['known']['tuning']) == 17 and 'they stay, k = 600' not in space['known']['tuning']

def test_the_networks_of_the_choices():
    archs, plain = {}, alexnet_small(2, .3)
    names_of('choices', 'def without_bn(', ARCHS=archs, SIZES=dict(alexnet_small=(31, 134)))
    def sizes(part, kind, *names): return [[getattr(m, n) for n in names]
                                           for m in part if isinstance(m, kind)]
    conv = nn.Conv2d, 'out_channels', 'kernel_size', 'stride', 'padding'
    linear = nn.Linear, 'in_features', 'out_features'
    for name,more,norms in (('wider', 1.5, 2), ('without_bn', 1, 0)):
        features, classifier = archs[name](2, .3)
        assert sizes(features, *conv) == [[more*c, *how] for c,*how in sizes(plain[0], *conv)]
        (first, *rest), (f, *r) = sizes(classifier, *linear), sizes(plain[1], *linear)
        assert rest == r and first == [more*f[0], f[1]] and len(sizes(classifier, nn.BatchNorm1d)) == norms
        x = torch.zeros(2, 2, 32, 32)
        assert classifier.eval()(features.eval()(x).flatten(1)).shape == (2, 1024)
        assert sizes(classifier, nn.Dropout, 'p') == [[.3]]*2

def values(x): # all numbers in it
    if isinstance(x, dict): return [v for part in x.values() for v in values(part)]
    return [v for part in x for v in values(part)] if isinstance(x, list) else [x]

@pytest.mark.parametrize('name, tiny', [
    ('epoch', 'n_images=32 k=5 pca=4 n_points=100 batch_size=8 steps=1 of=1000 device=cpu'),
    ('speed', 'n_images=16 epoch_images=16 batch_size=8 n_points=200 ks=[5] pca=4 niter=1 workers=0 '
              'rounds=1')])
def test_what_measures_time_runs(tmp_path, in_process, monkeypatch, name, tiny):
    from deepcluster_nb.fast import feeding
    took = feeding.seconds
    def three(work, device): took(work, device); return 3.      # whatever is timed takes as long
    if name == 'epoch': monkeypatch.setattr(feeding, 'seconds', three)
    tiny = [x for p in tiny.split() for x in ('-p', p)]
    assert main(['run', name, '--out', str(tmp_path/'run'), *tiny]) == 0
    m = json.loads((tmp_path/'run'/'metrics.json').read_text())
    numbers = [v for v in values(m) if isinstance(v, float)]
    assert len(numbers) > 5 and all(map(math.isfinite, numbers))
    assert (tmp_path/'run'/'report.html').is_file()
    if name != 'epoch': return
    # of 32 photographs, of 100 points, and of 2,048 features, which PCA takes and then projects
    images, points, rows = 3*1000/32, 3*1000/100, 3*1000/2048
    e, machine = m['epoch']['file'], m['machine']
    assert e['seconds'] == pytest.approx({'k-means': points, 'bookkeeping': points, 'extraction': images,
                                          'PCA': 2*rows, 'solve': 3., 'training': images})
    assert e['whole'] == pytest.approx(2*points + 2*images + 2*rows + 3)
    shares = {'k-means': points, 'extraction': images, 'PCA': 2*rows, 'training': images}
    assert e['busy'].keys() == shares.keys()            # what was not watched counts as idle
    assert e['busy_whole']*e['whole'] == pytest.approx(sum(e['busy'][p]*s for p,s in shares.items()))
    assert machine['TFLOP_per_second'] == round(2*2048**3/3e12, 2)
    net = network(resolve(Config(k=5, device='cpu')))
    with FlopCounterMode(display=False) as count: net.eval()(torch.zeros(1, 1, 32, 32))
    forward = count.get_total_flops() / (2*2048**3/3)   # seconds an image
    assert e['of_floor'] == pytest.approx(dict(extraction=32*forward/3, training=3*32*forward/3))

@pytest.mark.parametrize('which', ['tuning', 'averages', 'colors'])
def test_choices_are_tuned_on_images_that_are_held_out(tmp_path, capsys, in_process, which):
    tiny = [x for p in (f'which={which}', 'n_images=700', 'n_test=700', 'k=5', 'pca=8', 'epochs=1', 'seeds=1')
            for x in ('-p', p)]
    # of 1,438 training images more are asked for than there are
    assert main(['run', 'choices', '--out', str(tmp_path/'r'), *tiny, '-p', 'n_test=800']) != 0
    assert 'n_images, n_test: expected at most 1,438 together' in capsys.readouterr().err
    cells = json.loads((experiments_folder()/'choices.ipynb').read_text())['cells']
    source = next(s for s in (''.join(c['source']) for c in cells) if 'def splits(' in s)
    space = dict(which=which, n_images=700, n_test=700, dataset='digits', root='',
                 load_images=load_images, generator=generator, pick=pick, torch=torch)
    body = ast.parse(source).body
    alone = ast.Module([f for f in body if getattr(f, 'name', '') == 'splits'], [])
    exec(compile(alone, 'splits', 'exec'), space)
    train, held = space['splits'](0)
    assert len(train) == len(held) == 700 and not set(train.paths or []) & set(held.paths or [])
    pixels = [{im.numpy().tobytes() for im in images} for images in (train, held)]
    assert not pixels[0] & pixels[1]
    assert torch.equal(train.labels, load_images('digits', n_images=700).labels)     # as `train` draws them

def test_list(capsys):
    assert main(['list']) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ('train', 'digits', 'cifar10_small', 'cifar10', 'imagenet_alexnet',
                                        'imagenet_vgg16', 'imagenet_resnet50', 'weight_decay'))

def test_list_of_one_experiment(capsys):
    assert main(['list', 'voc']) == 0
    out = capsys.readouterr().out
    assert ('voc_small' in out and 'train_bn' in out and 'imagenet_alexnet' not in out
            and 'checkpoint_minutes' not in out)
    assert (main(['list', 'train']) == 0 and 'imagenet_alexnet' in (out := capsys.readouterr().out)
            and 'voc_small' not in out)
    assert all(line[0] == ' ' for line in out.splitlines()[1:] if line != 'presets:')
    assert main(['list', 'trane']) == 2 and "got 'trane'" in capsys.readouterr().err

@pytest.mark.parametrize('notebook', sorted(experiments_folder().glob('*.ipynb')), ids=lambda p: p.stem)
def test_every_parameter_says_what_it_is(notebook):
    from papermill import inspect_notebook
    found = inspect_notebook(str(notebook)).values()
    assert 1 < len(found) and [p['name'] for p in found if len(p['help']) < 5 or p['inferred_type_name']
                               not in ('str', 'int', 'float', 'bool', 'list')] == []

def test_papermills_own_help(tmp_path):
    out = subprocess.run(['papermill', '--help-notebook', str(experiments_folder()/'train.ipynb')],
                         capture_output=True, text=True).stdout
    assert (re.search(r"k: int \(default 100\) +clusters\n", out)
            and re.search(r"passes: int \(default 4\)\s+training passes", out))

@pytest.mark.parametrize('command', ['list', 'run', 'estimate', 'predict', 'watch', 'report'])
def test_every_argument_of_the_command_says_what_it_is(command, capsys):
    with pytest.raises(SystemExit): main([command, '--help'])
    lines = capsys.readouterr().out.splitlines()
    named = [(l, after) for l,after in zip(lines, lines[1:] + ['']) if re.match(r'  \S', l)]
    # the text stands behind, or on the next line
    assert len(named) > 1 and [l for l,after in named
                               if not re.search(r'\S  +\S', l) and not after.startswith(' '*20)] == []

@pytest.mark.parametrize('args, message', [
    (['trane'], "experiment: expected one of .*train.*'trane'"),
    (['train', '--preset', 'mnist'], "preset: expected one of .*digits.*'mnist'"),
    (['train', '-p', 'clusters=3'], "parameter: expected one of .*'clusters'"),
    (['train', '-p', 'k'], "-p: expected key=value, got 'k'"),
    (['train', '-p', 'k=1'], 'k: expected at least 2, got 1'),
    (['train', '-p', 'k=many'], "k: .*'many'"),
    (['train', '-p', 'lr=-1'], 'lr: .*-1'),
    (['train', '-p', 'n_images=150', '-p', 'k=151'], 'k: expected at most 150'),
    (['train', '-p', 'n_images=150', '-p', 'n_test=5000'], 'n_test: expected 0 .* 359.* 5,000'),
    (['train', '-p', 'dataset=folder', '-p', 'root=/no/such/place'], "root: no folder '/no/such/place'"),
])
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, capsys, args, message):
    assert main(['run', *args, '--out', str(tmp_path/'run')]) != 0
    err = capsys.readouterr().err.strip()
    assert re.search(message, err) and len(err.splitlines()) == 1
    assert not (tmp_path/'run').exists()

def test_another_run_in_the_folder_is_left_as_it_was(undisturbed, capsys):
    where = undisturbed[0]
    before = {p: p.read_bytes() for p in where.rglob('*') if p.is_file()}
    assert main(['run', 'train', '--out', str(where), *SAVING, '-p', 'k=11']) == 2
    assert 'k: 10 there, 11 now' in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in where.rglob('*') if p.is_file()}

@pytest.mark.parametrize('text, value', [
    ('k=200', 200),
    ('lr=1e-5', 1e-5),
    ('lr=.05', .05),
    ('sobel=false', False),
    ('root=/a=b', '/a=b'),
    ('arch=alexnet', 'alexnet')])
def test_pairs(text, value): assert parse_pair(text, asdict(Config()))[1] == value

def test_stopped_and_called_again(tmp_path, undisturbed): # twice, one run; SIGTERM: test_situations_runs
    where, saved = tmp_path/'r', lambda: {p.name for p in where.glob('checkpoint/*.json')}
    stopped = 'deepcluster-nb: stopped; the state is saved'
    killed = ("deepcluster-nb: the notebook's process has ended without a word, as one does that is killed, "
              "by the system too when memory is full; ([123] of 3 epochs are|the training is) finished and "
              "kept in")
    for number, status, epoch, says in ((signal.SIGINT, 130, 0, stopped), (signal.SIGKILL, 1, 1, killed)):
        before = saved()
        p = subprocess.Popen([sys.executable, '-c',
                              'import sys; from deepcluster_nb.experiments import main; sys.exit(main())',
                              'run', 'train', '--out', str(where), *SAVING],
                             stderr=subprocess.PIPE, text=True)
        end = time.time() + 120
        while max(saved() - before, default='') < f'{epoch:05d}' and p.poll() is None and time.time() < end:
            time.sleep(.005)
        assert p.poll() is None, p.communicate()
        # SIGKILL as from a system without memory: for the kernel, at once
        os.kill(p.pid if number != signal.SIGKILL else int(held_by(where).split()[1]), number)
        err = p.communicate(timeout=120)[1]
        assert p.returncode == status and not held_by(where), err
        assert re.search(says, err) and len(err.strip().splitlines()) == 1
    assert not (where/'metrics.json').exists()
    assert main(['run', 'train', '--out', str(where), *SAVING]) == 0
    assert outcome(where) == outcome(undisturbed[0])

def test_a_run_in_use_is_refused_at_once(tmp_path, capsys):
    where = tmp_path/'r'
    with Guard(RunFolder(where, {})).held():
        assert main(['run', 'train', '--out', str(where), *SAVING]) == 2
    assert (f'is in use by process {os.getpid()}' in capsys.readouterr().err
            and not (where/'notebook.ipynb').exists())

def test_what_measures_no_seconds_has_a_summary(tmp_path): # `speed`, for one
    (tmp_path/'metrics.json').write_text('{"speed": {}}')
    assert summary(tmp_path) == ''

# ---------------------------------------------------------------- threads that sleep while they wait

@pytest.mark.parametrize('mine, set_', [({}, dict(GOMP_SPINCOUNT=SPINS)), (dict(GOMP_SPINCOUNT='7'), {}),
                                        (dict(OMP_WAIT_POLICY='active'), {})])
def test_kernels_sleep_unless_the_user_chose(monkeypatch, mine, set_):
    for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'): monkeypatch.delenv(name, raising=False)
    for name,v in mine.items(): monkeypatch.setenv(name, v)
    before = dict(os.environ)
    with kernel_environment():
        assert {k: v for k,v in os.environ.items() if before.get(k) != v and k != 'MPLBACKEND'} == set_
    assert dict(os.environ) == before

def test_the_makefile_says_the_same():
    text = (Path(__file__).parent.parent/'Makefile').read_text()
    assert f'ifndef OMP_WAIT_POLICY\nexport GOMP_SPINCOUNT ?= {SPINS}\nendif\n' in text

def fitted(run_dir, spins): # (what OpenMP says it was told, SHA-256)
    env = {k: v for k,v in os.environ.items() if k not in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')}
    config = replace(survive.SMALL, epochs=1, run_dir=str(run_dir))
    code = ('import torch; torch.set_num_threads(2); from deepcluster_nb.fit import *; '
            f'fit(Config(**{asdict(config)!r}), echo=None)')
    more = {} if spins is None else dict(GOMP_SPINCOUNT=spins)
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                       env=env | more | dict(OMP_DISPLAY_ENV='verbose'))
    assert p.returncode == 0, p.stderr
    return set(re.findall("GOMP_SPINCOUNT = '(.*)'", p.stderr)), sha256(run_dir)

@pytest.mark.skipif(sys.platform != 'linux', reason="GNU OpenMP is Linux's")
def test_how_threads_wait_changes_no_bit(tmp_path):
    told, bits = zip(*[fitted(tmp_path/str(spins), spins) for spins in (None, SPINS)])
    assert told[1] == {SPINS} and SPINS not in told[0]
    assert len(set(bits)) == 1

@pytest.mark.parametrize('args, message', [
    (['train', '-p', 'n_images=99999'], 'n_images: expected'),
    (['voc', '-p', 'data=voc2007', '-p', 'root=/no/such'], 'root: '),
    (['voc', '-p', 'root=/no/such'], 'root: expected nothing where the photographs are made'),
    (['retrieval', '-p', 'sides=[]'], 'sides: expected'),
    (['retrieval', '-p', 'data=oxford5k', '-p', 'root=/no/such'], 'root: ')])
def test_wrong_input_that_the_notebook_finds_is_wrong_input(args, message, tmp_path, capsys, in_process):
    assert main(['run', *args, '--out', str(tmp_path/'r')]) == 2
    assert capsys.readouterr().err.startswith(f'deepcluster-nb: {message}') and not (tmp_path/'r').exists()

def test_ranks_are_for_train_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('deepcluster_nb.experiments.launch', None)
    assert main(['run', 'voc', '--nproc', '2', '--out', str(tmp_path/'r')]) == 2
    assert "expected train with several ranks, got 'voc'" in capsys.readouterr().err
    assert not (tmp_path/'r').exists()

def test_a_data_root_may_move_and_newer_parameters_have_their_defaults(tmp_path):
    from deepcluster_nb.experiments import check_parameters, parameters
    notebook = experiments_folder()/'voc.ipynb'
    known = parameters(notebook) | dict(data='voc2007', root='/then', run_dir=str(tmp_path/'r'))
    RunFolder(tmp_path/'r', {k: v for k,v in known.items() if k != 'train_bn'})
    moved = dict(data='voc2007', root=str(tmp_path), run_dir=str(tmp_path/'r'))
    check_parameters(notebook, moved, tmp_path/'r')
    for name,v in dict(train_bn=True, steps=7).items():
        with pytest.raises(ValueError, match=f'{name}: '):
            check_parameters(notebook, moved | {name: v}, tmp_path/'r')

def test_a_runs_last_numbers_are_of_test_images_and_the_last_epoch(tmp_path, in_process, monkeypatch):
    from deepcluster_nb import pictures
    drawn, montage, nearest = [], pictures.cluster_montage, pictures.nearest_images
    monkeypatch.setattr(pictures, 'cluster_montage',
                        lambda ims, assign, **how: drawn.append(assign) or montage(ims, assign, **how))
    monkeypatch.setattr(pictures, 'nearest_images', lambda f, *more: drawn.append(f) or nearest(f, *more))
    from deepcluster_nb.fast.features import compute_features
    from deepcluster_nb.fit import load_assignments, load_run
    from deepcluster_nb.model import calibrate_bn
    from deepcluster_nb.probes import cluster_accuracy, evaluate
    where, n = tmp_path/'r', dict(n_images=90, n_test=50)
    pairs = [x for p in dict(k=5, pca=8, epochs=1, passes=1, batch_size=16, precision='float32', device='cpu',
                             **n).items()
             for x in ('-p', '='.join(map(str, p)))]
    assert main(['run', 'train', '--out', str(where), *pairs]) == 0
    m, run = json.loads((where/'metrics.json').read_text()), load_run(where)
    train, test = (load_images('digits', None, s, k, run.config.seed)
                   for s,k in (('train', n['n_images']), ('test', n['n_test'])))
    nets = dict(random=network(run.config), random_calibrated=network(run.config), deepcluster=run.net)
    calibrate_bn(nets['random_calibrated'], train, run.config.size)
    for name,net in nets.items():
        found = evaluate(net, train, test, run.config.size, 'cpu', 'float32', run.config.seed)
        for key,what in dict(probes='last', probes_best='best').items():
            assert m[key][name] == {layer: p[what] for layer,p in found['probes'].items()}
        assert m['knn'][name] == found['knn']
    assert m['probes']['random'] != m['probes']['random_calibrated']
    assert [torch.equal(a, load_assignments(where, e)) for e,a in enumerate(drawn[:2])] == [True]*2
    for net,feats in ((nets['random'], drawn[2]), (run.net, drawn[3])):
        assert torch.equal(feats, compute_features(net, train, run.config.size))
    log = [json.loads(l) for l in (where/'log.jsonl').read_text().splitlines()]
    for p,s in log[0]['seconds'].items(): assert m['seconds'][p] == pytest.approx(s, abs=.01)
    assert m['n_test'] == 50
    assert m['cluster_accuracy'] == cluster_accuracy(run.clustering.assign, train.labels)
    columns = [[*m['probes'][name].values(), m['knn'][name]] for name in nets]
    gains = [d - max(r, c) for r,c,d in zip(*columns)]
    verdict, text = ' '.join(m['verdict']), (where/'report.html').read_text()
    assert f'{sum(g > 0 for g in gains)} of 6 measures' in verdict
    assert f'({max(gains):+.1f} points)' in verdict
    assert f"NMI {log[0]['nmi_labels']:.3f} (random features) to {m['nmi_labels']:.3f}" in verdict
    cells = re.findall(r'<td[^>]*>([^<]*)</td>', text)
    assert cells[cells.index('kNN') + 4] == f'{gains[-1]:+.1f}'
    assert [l.split()[-1] for l in summary(where).splitlines()[1:7]] == [f'{g:+.1f}' for g in gains]

COPIES = Path(__file__).parent/'copies'     # of constants: a change there is meant

def test_full_reproductions_have_the_papers_and_the_scripts_constants():
    for preset,wanted in yaml.safe_load((COPIES/'presets.yaml').read_text()).items():
        assert gather(wanted.pop('experiment'), preset)[1] == wanted, preset

def test_the_reports_commands_measure_as_its_sources_do():
    from deepcluster_nb.report import TABLES
    commands = {(key, line) for key,t in TABLES.items() for line in t.fill.values()}
    checked = set()
    for key,line in commands:
        for name,preset in re.findall(r'run (\w+) --preset (\w+)', line):
            values = parameters(experiments_folder()/f'{name}.ipynb') | gather(name, preset)[1]
            for p in values.keys() & TABLES[key].protocol.keys() - {'n_images', 'n_test', 'arch'}:
                assert values[p] == TABLES[key].protocol[p], (key, preset, p)
                checked.add((key, p))
    assert {('imagenet', 'epochs'), ('mm_imagenet', 'lr'), ('mm_places', 'epochs'), ('mm_shots', 'samples'),
            ('mm_share', 'epochs')} <= checked
