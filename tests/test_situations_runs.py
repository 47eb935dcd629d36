"Situations that outsiders reported, kind by kind: data, words, names, what can't be measured."
import csv, io, json, os, re, shutil, signal, subprocess, sys, time, warnings
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np, pytest, torch, yaml
from PIL import Image
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook
from deepcluster_nb import experiments, pictures
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.sources import load_images
from deepcluster_nb.experiments import (experiments_folder, find_runs, gather, kept, main, parse_pairs,
                                        predict_folder, read_preset, run_experiment)
from deepcluster_nb.pictures import in_markdown, readable
from deepcluster_nb.probes import measurable
from deepcluster_nb.runs import Hold, RunFolder, held_by, same_data
from deepcluster_nb.fit import Config, fit, resolve

pytestmark = pytest.mark.usefixtures('one_thread')
ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, '-c', 'import sys; from deepcluster_nb.experiments import main; sys.exit(main())']
TINY = dict(k=5, pca=8, epochs=1, passes=1, batch_size=16)
T = [x for k,v in TINY.items() for x in ('-p', f'{k}={v}')]
TRAIN = Config(dataset='folder', device='cpu', precision='float32', threads=1, **TINY)

def photographs(folder, classes, n=5, seed=0): # n small JPEGs in each class folder
    g = np.random.default_rng(seed)
    for c in classes:
        (folder/c).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            pixels = g.integers(0, 256, (33, 36 + i % 2, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder/c/f'{i}.jpg')
    return folder

def files(folder): return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.name != 'lock'}

# ------------------------------------------------------------ one run of the command, with all that is odd

RAW = b'caf\xe9, "2".jpg'            # no UTF-8, and what CSV quotes
ODD = ['$5_$10', '_draft', '汽车', '<b>&x']

@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    top = tmp_path_factory.mktemp('odd')
    root = photographs(top/'Photos #2'/'train', ODD)
    os.rename(root/'$5_$10'/'0.jpg', os.path.join(os.fsencode(root/'$5_$10'), RAW))
    photographs(top/'Photos #2'/'test', [*ODD, 'only here'], n=3, seed=1)
    env = dict(os.environ, MPLBACKEND='TkAgg', PYTHONIOENCODING='ascii', OMP_NUM_THREADS='1')
    own = ['-p', 'dataset=folder', '-p', 'root=Photos #2', '--out', 'runs #7']
    p = subprocess.run([*COMMAND, 'run', 'train', *T, *own], capture_output=True, cwd=top, env=env)
    assert p.returncode == 0, p.stderr.decode()
    return top, p.stdout.decode('ascii'), p.stderr.decode('ascii')

def test_a_run_with_all_of_it_is_finished(odd):
    top, out, err = odd
    run, lines = top/'runs #7', out.splitlines()
    assert err == '' and 'epoch 1/1 ? loss' in out                           # ASCII alone, and no traceback
    assert yaml.safe_load((run/'params.yaml').read_text('utf-8'))['root'] == 'Photos #2'
    # what is doubtful and what can't be measured is said before the training
    assert lines.pop(0).startswith('pca = 8 is much for 20 images')
    assert lines[0] == 'probes for 4 of 5 classes: only here has images in one of training and test only'
    assert lines[1].startswith('epoch 1/1')
    html = (run/'report.html').read_text('utf-8')
    assert html.count('<img') == 6 == len(list((run/'figures').iterdir())) and lines[0] in html
    m = json.loads((run/'metrics.json').read_text('utf-8'))
    assert set(m['probes']) == {'random', 'random_calibrated', 'deepcluster'} and m['unmeasured'] == lines[0]

def test_names_are_written_as_the_file_system_has_them(odd, tmp_path, monkeypatch):
    top, run = odd[0], odd[0]/'runs #7'
    text = (run/'clusters.csv').read_text('utf-8', 'surrogateescape')
    names = [row[0] for row in csv.reader(io.StringIO(text))][1:]
    assert set(names) == {str(p.relative_to(top/'Photos #2'/'train'))
                          for p in (top/'Photos #2'/'train').rglob('*.jpg')} and len(names) == 20
    rows, _ = predict_folder(run, top/'Photos #2'/'train', tmp_path/'c.csv')
    assert [p for p,_ in rows] == names
    assert (tmp_path/'c.csv').read_bytes() == (run/'clusters.csv').read_bytes()
    (tmp_path/'photos').mkdir()
    with open(os.path.join(os.fsencode(tmp_path), b'photos', RAW), 'wb') as f: f.write(b'no image')
    shutil.copy(top/'Photos #2'/'train'/'汽车'/'0.jpg', tmp_path/'photos')
    predicts = ['predict', str(run), str(tmp_path/'photos'), '--skip-broken', '--out', str(tmp_path/'d.csv')]
    for args, said in ((predicts, "1 images can't be read"), (['watch', str(run), '--once'], 'finished')):
        monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding='ascii'))
        assert main(args) == 0
        sys.stdout.flush()
        assert said in sys.stdout.buffer.getvalue().decode('ascii')

def test_other_data_is_refused_by_the_command(odd, capsys, monkeypatch):
    top, run = odd[0], odd[0]/'runs #7'
    monkeypatch.chdir(top)
    photographs(top/'B'/'train', ODD, seed=7)
    before = files(run)
    assert main(['run', 'train', '-p', 'dataset=folder', '-p', 'root=B', *T, '--out', 'runs #7']) == 2
    err = capsys.readouterr().err.strip()
    assert re.search(r"root: expected the train .* but 5 of 20 images have other paths, from '\$5_",
                     err) and len(err.splitlines()) == 1
    assert files(run) == before                                  # nothing of A's results is overwritten

def test_compare_leaves_out_what_is_gone(odd, tmp_path, capsys, in_process):
    top = odd[0]
    shutil.copytree(top/'runs #7', top/'one more')
    params = yaml.safe_load((top/'one more'/'params.yaml').read_text('utf-8'))
    shutil.copytree(top/'Photos #2', top/'fewer')
    (top/'fewer'/'train'/'_draft'/'3.jpg').unlink()
    for name,root in (('runs #7', 'Photos #2'), ('one more', 'fewer')):
        (top/name/'params.yaml').write_text(yaml.safe_dump(params | dict(root=str(top/root))), 'utf-8')
    args = ['run', 'compare', '-p', f"runs={top}/runs #7 {top}/one more", '-p', 'n_images=0']
    assert main([*args, '--out', str(tmp_path/'c')]) == 0
    assert {p.name for p in (tmp_path/'c'/'figures').iterdir()} == {
        'curves.png', 'probes.png', 'clusters_0_before.png', 'clusters_0_after.png'}
    html = (tmp_path/'c'/'report.html').read_text('utf-8')
    assert 'it had 20 images and now there are 19' in html and 'so there are no pictures' in html

# ---------------------------------------------------------------- 1: a run knows its data

@pytest.fixture(scope='module')
def trained(tmp_path_factory): # (data, its run)
    top = tmp_path_factory.mktemp('trained')
    photographs(top/'A', ['cat', 'dog'], n=10)
    fit(replace(TRAIN, root=str(top/'A'), run_dir=str(top/'run')), echo=None)
    return top/'A', top/'run'

def edit(root): # one file, its size and its shape stay
    Image.fromarray(np.zeros((33, 36, 3), dtype=np.uint8)).save(root/'dog'/'4.jpg')

@pytest.mark.parametrize('name, change, says', [
    ('moved', lambda root: None, None),
    ('fewer', lambda root: (root/'cat'/'7.jpg').unlink(),
     "it had 20 images and now there are 19, other ones from 'cat/8.jpg' on"),
    ('more', lambda root: shutil.copy(root/'dog'/'1.jpg', root/'dog'/'x.jpg'),
     "it had 20 images and now there are 21, other ones from 'dog/x.jpg' on"),
    ('renamed', lambda root: (root/'dog'/'9.jpg').rename(root/'dog'/'y.jpg'),
     "1 of 20 images have other paths, from 'dog/y.jpg' on"),
    ('edited', edit, "1 of 20 images have other contents, the first is 'dog/4.jpg'"),
    ('another', lambda root: photographs(root, ['cat', 'dog'], n=10, seed=5),
     "20 of 20 images have other contents, the first is 'cat/0.jpg'"),
])
def test_a_run_goes_on_with_the_images_it_began_with(trained, tmp_path, name, change, says):
    data, run = trained
    shutil.copytree(data, tmp_path/'data'); shutil.copytree(run, tmp_path/'run')
    change(tmp_path/'data')
    config = replace(TRAIN, root=str(tmp_path/'data'), run_dir=str(tmp_path/'run'))
    before = files(tmp_path/'run')
    if says is None: fit(config, echo=None)
    else:
        with pytest.raises(ValueError, match='^root: expected the train images .*' + re.escape(says)):
            fit(config, echo=None)
    assert files(tmp_path/'run')[tmp_path/'run'/'clusters.csv'] == before[tmp_path/'run'/'clusters.csv']
    if says: assert files(tmp_path/'run') == before

def test_a_stopped_run_too(trained, tmp_path):
    data, _ = trained
    shutil.copytree(data, tmp_path/'data')
    config = replace(TRAIN, epochs=2, root=str(tmp_path/'data'), run_dir=str(tmp_path/'run'))
    class Stop(Exception): pass
    def stop(line):
        if line.startswith('epoch'): raise Stop
    with pytest.raises(Stop): fit(config, echo=stop)
    edit(tmp_path/'data')
    with pytest.raises(ValueError, match='1 of 20 images have other contents'): fit(config, echo=None)

def test_images_of_every_source_have_a_fingerprint(tmp_path):
    images = load_images('digits', n_images=30)
    images.save(tmp_path/'train.safetensors')
    config = replace(TRAIN, dataset='packed', root=str(tmp_path), run_dir=str(tmp_path/'run'))
    fit(config, echo=None)
    other = images.subset(torch.arange(30))
    other.pixels = images.pixels.clone()
    other.pixels[other.starts[11] + 5] ^= 1
    other.save(tmp_path/'train.safetensors')
    with pytest.raises(ValueError, match="1 of 30 images have other contents, the first is '11'|contents"):
        fit(config, echo=None)
    with pytest.raises(ValueError, match='it had 30 images and now there are 29'):
        fit(config, other.subset(torch.arange(29)), echo=None)

def test_of_more_pixels_than_are_read_shapes_and_paths_still_count(monkeypatch):
    from deepcluster_nb import runs
    monkeypatch.setattr(runs, 'SEEN', 64*8)              # about eight of 200 digits
    images = load_images('digits', n_images=200)
    mine = runs.fingerprint(images)
    noise = PackedImages(torch.randint(256, (200, 1, 8, 8)).byte(), paths=images.paths)
    taller = PackedImages(torch.zeros(200, 1, 16, 4).byte(), paths=images.paths)
    assert mine == runs.fingerprint(images)
    count = lambda other: int(runs.difference(mine, runs.fingerprint(other), images.paths).split()[0])
    assert 1 <= count(noise) <= 25 and count(taller) == 200

def test_a_run_of_before_goes_on_and_is_told(trained, tmp_path):
    data, run = trained
    shutil.copytree(run, tmp_path/'run'); (tmp_path/'run'/'data.json').unlink()
    config = replace(TRAIN, root=str(data), run_dir=str(tmp_path/'run'))
    with pytest.warns(UserWarning, match='kept no fingerprint of its data'): fit(config, echo=None)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(config, echo=None)
    assert (tmp_path/'run'/'data.json').read_bytes() == (run/'data.json').read_bytes()

def test_probes_hold_on_to_training_and_test_images(tmp_path):
    folder = RunFolder(tmp_path/'probe', dict(k=2))
    a, b, c = (load_images('digits', split=s, n_images=20, seed=i)
               for s,i in (('train', 0), ('test', 0), ('test', 1)))
    same_data(folder, train=a, test=b)
    same_data(folder, train=a, test=b)
    with pytest.raises(ValueError, match='root: expected the test images'): same_data(folder, train=a, test=c)

@pytest.mark.parametrize('name', ['probe', 'voc', 'choices'])
def test_every_experiment_that_goes_on_asks(name):
    text = (experiments_folder()/f'{name}.ipynb').read_text('utf-8')
    assert 'same_data(folder, train=train, test=test)' in text

# ---------------------------------------------------------------- 2: text is text

@pytest.mark.parametrize('name, text, value', [
    *[('train', f'root={t}', t)
      for t in ('Photos #2', '2024', 'yes', 'no', '12:30', '1e5', '&a', '*', '~', 'null', 'Trip: Rome',
                ' two  spaces ', '', "it's", '"q"', '[a]', '{b}', 'a=b', '007')],
    ('train', 'run_dir=runs #7', 'runs #7'), ('compare', 'runs=2024', '2024'), ('voc', 'root=1_000', '1_000'),
    ('train', 'k=200', 200), ('train', 'k=1e3', 1000), ('train', 'seed=007', 7),
    ('train', 'lr=1e-5', 1e-5), ('train', 'lr=1', 1.), ('train', 'lr=.05', .05),
    *[('train', f'sobel={t}', t in ('true', 'True', 'yes', 'on'))
      for t in ('true', 'True', 'yes', 'on', 'false', 'False', 'no', 'off')],
    ('speed', 'ks=[100, 200]', [100, 200]), ('voc', 'layers=[conv4]', ['conv4'])])
def test_a_value_is_read_by_its_parameter(name, text, value):
    found = parse_pairs(name, [text])[text.partition('=')[0]]
    assert found == value and type(found) is type(value)

@pytest.mark.parametrize('text, message', [
    ('k=many', "k: expected a value of type int, got 'many'"),
    ('k=1.5', "k: expected a value of type int, got '1.5'"),
    ('lr=fast', "lr: expected a value of type float, got 'fast'"),
    ('sobel=2', r"sobel: expected a value of type bool \(true or false\), got '2'")])
def test_what_is_no_number_is_one_line(text, message):
    with pytest.raises(ValueError, match=message): parse_pairs('train', [text])

def test_presets_are_read_by_the_same_types(tmp_path):
    (tmp_path/'p.yaml').write_text('root: 2024\nrun_dir: yes\nprecision: float32 # a comment\nlr: 1e-5\n'
                                   'k: 20\nsobel: no\ndataset: "Trip: Rome"\n', 'utf-8')
    assert read_preset(tmp_path/'p.yaml', asdict(Config())) == dict(
        root='2024', run_dir='yes', precision='float32', lr=1e-5, k=20, sobel=False, dataset='Trip: Rome')
    (tmp_path/'p.yaml').write_text('root: Trip: Rome\n')
    with pytest.raises(ValueError, match="^preset: '.*p.yaml' is no YAML"): read_preset(tmp_path/'p.yaml', {})

def test_plain_papermill_is_told_how_to_keep_text():
    # its -p root 2024 gives the notebook a number, and 007 or 1e5 could not be had back
    with pytest.raises(ValueError, match=r'^root: expected .* type str .*-r root in place of -p\), got 2024'):
        resolve(Config(root=2024))

def test_the_schedules_script_passes_text_on(tmp_path):
    fake = tmp_path/'bin'/'deepcluster-nb'
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor a in "$@"; do echo "<$a>"; done >"$HEARD"; mkdir "$a"\n')
    fake.chmod(0o755)
    env = dict(os.environ, PATH=f"{fake.parent}:{os.environ['PATH']}", HEARD=str(tmp_path/'heard'))
    script = experiments_folder()/'schedule'/'run.sh'
    args = ['train', '-p', 'root=Photos #2', '-p', 'root=a  "$HOME" *']
    p = subprocess.run([script, f'{tmp_path}/runs #7', *args], env=env, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    assert (tmp_path/'heard').read_text().splitlines() == [
        '<run>', '<train>', '<-p>', '<root=Photos #2>', '<-p>', '<root=a  "$HOME" *>', '<--out>',
        f'<{tmp_path}/runs #7>']

@pytest.mark.parametrize('text, found', [
    ('a b', ['a b']), ('a b c', ['a b', 'c']), ('c a b', ['c', 'a b']), ('a*', ['a b']), ('c  c', ['c']),
    ('a b *', ['a b', 'c']), ('* b', ['a b'])])
def test_paths_with_spaces(trained, tmp_path, monkeypatch, text, found):
    for name in ('a b', 'c'): shutil.copytree(trained[1], tmp_path/name)
    monkeypatch.chdir(tmp_path)
    assert sorted(p.name for p in find_runs(text)) == found if text != 'c a b' else len(find_runs(text)) == 2

@pytest.mark.parametrize('text, message', [
    ('a', "no run in 'a'"), ('nowhere*', "no run of train at 'nowhere"),
    ('c nowhere', "no run in 'nowhere'")])
def test_a_path_that_is_no_run_is_named(trained, tmp_path, monkeypatch, text, message):
    shutil.copytree(trained[1], tmp_path/'c')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(message)): find_runs(text)

# ---------------------------------------------------------------- 7: names in figures, pages and files

@pytest.mark.parametrize('name, drawn', [
    ('$5_$10', r'\$5_\$10'), ('_draft', ' _draft'), ('cat', 'cat'), (3, '3'), ('a\nb', 'a b'),
    ('caf\udce9', 'caf?'), ('x'*60, 'x'*39 + '…')])
def test_names_in_figures(name, drawn): assert readable([name]) == [drawn]

def test_a_legend_shows_every_name_as_it_is():
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    for n in readable(['$5_$10', '_draft', '$x^2$']): ax.plot([0, 1], label=n)
    texts = ax.legend().get_texts()
    fig.canvas.draw()
    plt.close(fig)
    # as matplotlib draws them: no formula, the backslash gone
    assert [t._preprocess_math(t.get_text()) for t in texts] == [
        ('$5_$10', False), (' _draft', False), ('$x^2$', False)]

def test_characters_without_a_font_are_said_in_one_line(monkeypatch):
    import matplotlib.pyplot as plt
    monkeypatch.setattr(pictures, 'has_characters', lambda path, wanted: wanted <= set('é'))
    with plt.rc_context(), pytest.warns(UserWarning, match='no installed font has 汽 车: question') as said:
        assert readable(['汽车', 'é汽']) == ['??', 'é?']
    assert len(said) == 1

def test_a_font_that_has_the_characters_is_taken(monkeypatch):
    import matplotlib.pyplot as plt
    from matplotlib.font_manager import fontManager
    font = next(f for f in fontManager.ttflist if f.name == 'STIXGeneral')
    monkeypatch.setattr(pictures, 'has_characters', lambda path, wanted: path == font.fname)
    with plt.rc_context():
        assert readable(['汽车']) == ['汽车'] and plt.rcParams['font.family'][-1] == 'STIXGeneral'

@pytest.mark.parametrize('name, text', [
    ('a|b', 'a&#124;b'), ('<b>&x', '&#60;b&#62;&#38;x'), ('*x* _y_', '&#42;x&#42; &#95;y&#95;'), ('汽车', '汽车'),
    ('caf\udce9', 'caf&#63;'), ('$5_$10', '<span>$</span>5&#95;<span>$</span>10'),
    ('k = 5, lr = .1', 'k = 5, lr = .1')])
def test_names_in_pages(name, text): assert in_markdown(name) == text

def test_every_file_of_ours_names_its_encoding():
    bare = []
    for p in [*(ROOT/'deepcluster_nb').glob('*.py'), *(ROOT/'data_scripts').glob('*.py')]:
        for line in p.read_text('utf-8').splitlines():
            # what Linux writes is ASCII
            if '/proc/' in line or '/sys/' in line: continue
            if re.search(r"read_text\(\)|write_text\((?!.*(encoding|'utf-8'))", line):
                bare.append(f'{p.name}: {line.strip()}')
    assert bare == []

# ------------------------------------------------------ 8: what can't be measured does not stop the training

def flat(root):
    for p in list((root/'test').rglob('*.jpg')): p.rename(root/'test'/f'{p.parent.name}{p.name}')
    for c in ('cat', 'dog', 'hen'): (root/'test'/c).rmdir()

@pytest.mark.parametrize('name, change, probed, says', [
    ('both', lambda root: None, (15, 9), '^$'),
    ('flat', flat, None, 'no probes: labels: the test images have none'),
    ('only in test', lambda root: photographs(root/'test', ['pig'], 2), (15, 9),
     'for 3 of 4 classes: pig has'),
    ('only in train', lambda root: shutil.rmtree(root/'test'/'cat'), (10, 6), 'for 2 of 3 classes: cat has'),
    ('empty in train', lambda root: (root/'train'/'ant').mkdir(), (15, 9), '^$'),
    ('empty in test', lambda root: (root/'test'/'ant').mkdir(), (15, 9), '^$'),
    ('nothing shared',
     lambda root: [(root/'test'/c).rename(root/'test'/f'{c}s') for c in ('cat', 'dog', 'hen')], None,
     'no probes: classes: expected at least two that training and test images share'),
    ('broken', lambda root: (root/'test'/'cat'/'0.jpg').write_bytes(b'no'), None,
     "no probes: .*can't be read"),
    ('no test', lambda root: shutil.rmtree(root/'test'), (12, 3),
     '^no test split, so 3 of 15 training images are held out from the probes$'),
    ('empty test', lambda root: [p.unlink() for p in (root/'test').rglob('*.jpg')], None,
     'no probes: root: no images in'),
    ('one class',
     lambda root: [shutil.rmtree(root/s/c) for s in ('train', 'test') for c in ('dog', 'hen')], None,
     'no probes: classes: expected at least two')])
def test_what_can_be_measured(tmp_path, name, change, probed, says):
    photographs(tmp_path/'train', ['cat', 'dog', 'hen'], 5)
    photographs(tmp_path/'test', ['cat', 'dog', 'hen'], 3, seed=1)
    change(tmp_path)
    if name == 'no test': os.rename(tmp_path/'train', tmp_path/'all')
    config = replace(TRAIN, root=str(tmp_path/'all' if name == 'no test' else tmp_path))
    train = load_images('folder', config.root)
    splits, note = measurable(config, train)
    assert re.search(says, note) and (splits is None) == (probed is None)
    if not splits: return
    assert tuple(map(len, splits)) == probed
    for im in splits: # the same name for the same number, as the folder has it
        assert [im.classes[y] for y in im.labels.tolist()] == [p.split('/')[0] for p in im.paths]
    # a bit-identical start for data sets that were measured before
    if name == 'both':
        assert torch.equal(splits[0].labels, train.labels) and splits[0].classes == train.classes

def test_fewer_can_be_held_out(tmp_path):
    photographs(tmp_path, ['cat', 'dog'], 5)
    for n_test, held in ((1, 1), (0, 2), (9, 2)):
        config = replace(TRAIN, root=str(tmp_path), n_test=n_test)
        splits, note = measurable(config, load_images('folder', config.root))
        assert tuple(map(len, splits)) == (10 - held, held) and f'{held} of 10' in note

def test_too_many_test_images_are_still_an_error():
    with pytest.raises(ValueError, match='^n_test: '):
        measurable(Config(n_test=5000), load_images('digits', n_images=20))

# ---------------------------------------------------------------- 9: a report holds its figures

class Executed: # in the place of papermill: draws two figures, shows some
    PapermillExecutionError = RuntimeError
    def __init__(self, shown): self.shown = shown
    def execute_notebook(self, notebook, out, given, stdout_file, **kwargs):
        import nbformat
        stdout_file.write('one part is finished\n')
        folder = RunFolder(given['run_dir'], dict(k=2)).path
        for name in 'ab': (folder/'figures'/f'{name}.png').write_bytes(b'')
        shown = [nbformat.v4.new_output('display_data', {'image/png': 'AAAA'}) for _ in range(self.shown)]
        cell = nbformat.v4.new_code_cell('x', outputs=shown)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), out)
        self.backend = os.environ['MPLBACKEND']

@pytest.mark.parametrize('shown, whole', [(2, True), (0, False)])
def test_a_report_without_its_figures_is_an_error(tmp_path, monkeypatch, capsys, shown, whole):
    pm = Executed(shown)
    monkeypatch.setitem(sys.modules, 'papermill', pm)
    monkeypatch.setattr(experiments, 'gather', lambda name, preset, params: (Path('train.ipynb'), {}))
    monkeypatch.setattr(experiments, 'check_parameters', lambda *args: None)
    monkeypatch.setenv('MPLBACKEND', 'Agg')
    if whole: assert run_experiment('train', {}, tmp_path/'r') == tmp_path/'r'
    else:
        with pytest.raises(RuntimeError, match='^report: 2 figures were drawn, but report.html holds 0'):
            run_experiment('train', {}, tmp_path/'r')
    assert pm.backend == 'module://matplotlib_inline.backend_inline' and os.environ['MPLBACKEND'] == 'Agg'
    # 13: a line each, where there is no terminal
    assert capsys.readouterr().out == 'one part is finished\n'

@pytest.mark.parametrize('notebook', sorted(experiments_folder().glob('*.ipynb')), ids=lambda p: p.stem)
def test_every_experiment_draws_into_its_notebook(notebook): # also where plain papermill runs it
    cells = [''.join(c['source']) for c in json.loads(notebook.read_text('utf-8'))['cells']]
    assert sum('%matplotlib inline' in c for c in cells) == 1

# ---------------------------------------------------------------- 13: stops, locks, types

def test_while_it_is_measured_a_run_is_held_and_a_stop_says_what_is_kept(tmp_path, capsys):
    where = tmp_path/'r'
    args = ['run', 'train', *T, '-p', 'n_images=300', '-p', 'n_test=60', '--out', str(where)]
    p = subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env=dict(os.environ, OMP_NUM_THREADS='1'))
    try:
        end, note = time.time() + 90, where/'checkpoint'/'holder'
        def measuring():
            try: return note.read_text('utf-8').endswith(', measuring')
            except OSError: return False
        while not measuring() and p.poll() is None and time.time() < end: time.sleep(.01)
        assert p.poll() is None and measuring()
        assert experiments.look_at(where).state == 'probing'
        assert main(args) == 2 and 'is in use by process' in capsys.readouterr().err
        p.send_signal(signal.SIGTERM)
        out, err = p.communicate(timeout=60)
    finally: p.kill()
    assert err == ("deepcluster-nb: stopped; the training is finished and kept in "
                   f"{str(where)!r}; the same command goes on from there\n") and p.returncode == 143
    assert held_by(where) == '' and (where/'clusters.csv').exists() and not (where/'metrics.json').exists()

def test_a_stop_between_two_cells_waits_for_the_next(tmp_path):
    RunFolder(tmp_path, {})
    hold = ('from deepcluster_nb.runs import Hold; import os, time; '
            f'Hold({str(tmp_path)!r}, "kept"); os.getpid()')
    cells = [new_code_cell(hold), new_code_cell('time.sleep(20)')]
    client = NotebookClient(new_notebook(cells=cells), kernel_name='python3')
    with client.setup_kernel():
        client.execute_cell(cells[0], 0)
        os.kill(int(cells[0].outputs[0].data['text/plain']), signal.SIGTERM)
        time.sleep(.5)
        with pytest.raises(CellExecutionError) as e: client.execute_cell(cells[1], 1)
    assert (e.value.ename, e.value.evalue) == ('Stopped', 'SIGTERM came: kept')

def test_a_hold_is_one_processes_and_can_be_let_go(tmp_path):
    RunFolder(tmp_path, {})
    hold = Hold(tmp_path, 'kept')
    with pytest.raises(ValueError, match='is in use by process'): Hold(tmp_path, 'kept')
    hold.let_go(); hold.let_go()
    assert held_by(tmp_path) == '' and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    Hold(tmp_path, 'kept').let_go()

def test_a_stop_says_what_is_kept(trained, tmp_path):
    said = kept(trained[1])
    assert 'the training is finished and kept in' in said and 'the same command goes on' in said
    assert kept(tmp_path) == 'nothing was finished yet; the same command begins again'
    RunFolder(tmp_path/'begun', asdict(replace(TRAIN, epochs=4)))
    assert kept(tmp_path/'begun').startswith('0 of 4 epochs are finished and kept in')
    RunFolder(tmp_path/'choices', dict(seeds=2)).write('runs.json', '{}')
    assert kept(tmp_path/'choices').startswith('what was finished is kept in')

def test_pic_needs_no_import_and_ascii_alone_ends_no_training(tmp_path):
    code = ("import sys; from deepcluster_nb.fit import Config, fit, load_run; "
            "fit(Config(clusterer='pic', n_images=60, pca=8, epochs=1, passes=1, run_dir=sys.argv[1])); "
            "assert sys.modules.pop('deepcluster_nb.pic'); "
            "print(load_run(sys.argv[1]).config.clusterer)")
    p = subprocess.run([sys.executable, '-c', code, tmp_path/'r'], capture_output=True, text=True,
                       env=dict(os.environ, PYTHONIOENCODING='ascii'))
    lines = p.stdout.splitlines()
    assert p.returncode == 0 and lines[0].startswith('epoch 1/1 ? loss') and lines[-1] == 'pic', p.stderr
    with pytest.raises(ValueError, match='clusterer: expected one of kmeans, lloyd, pic, pic_released'):
        resolve(Config(clusterer='dbscan'))

def test_numbers_of_numpy_and_paths_are_taken(tmp_path):
    c = resolve(Config(k=np.int64(5), lr=np.float64(.1), sobel=np.bool_(False), root=Path('a b'),
                       seed=np.int32(3)))
    assert (c.k, c.lr, c.sobel, c.root, c.seed) == (5, .1, False, 'a b', 3)
    assert [type(v) for v in (c.k, c.lr, c.sobel, c.root)] == [int, float, bool, str]
    _, given = gather('train', params=dict(root=tmp_path, k=np.int64(7)))
    assert given == dict(root=str(tmp_path), k=7)
    with pytest.raises(ValueError, match='k: expected a value of type int, got True'): resolve(Config(k=True))

def test_broken_images_are_left_out_only_where_asked(monkeypatch, tmp_path):
    asked = []
    def loads(name, root, split, n, seed, **more):
        asked.append(more)
        return load_images('digits', n_images=30)
    monkeypatch.setattr('deepcluster_nb.fit.load_images', loads)
    for skip in (False, True): fit(Config(skip_broken=skip, **TINY | dict(epochs=0)), echo=None)
    assert asked == [dict(skip_broken=False), dict(skip_broken=True)]
