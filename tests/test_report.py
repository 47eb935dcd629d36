"The paper's tables beside runs: what a folder is, where its numbers go, and what is missing."
import json, re, shlex
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
import matplotlib.pyplot as plt, pytest, yaml
from deepcluster_nb.experiments import (check_parameters, experiments_folder, find_runs, gather, main,
                                        parse_pairs)
from deepcluster_nb.fit import Config
from deepcluster_nb.report import (KINDS, LAYERS, PUBLISHED, SURE, TABLES, about, commands, data_of,
                                   differences, measured, nmi_curves, published, published_table,
                                   read_finished, report_page)
from made_runs import epochs, made, probe, retrieval, train, tuned, voc

def rows_of(*paths, table, net='deepcluster'):
    return [r for r in measured([read_finished(p) for p in paths]) if (r.table, r.net) == (table, net)]

# the published numbers

def test_each_published_row_fits_its_table():
    assert all(len(p.values) == len(TABLES[p.table].columns) and p.sure in SURE and p.source
               for p in PUBLISHED)
    assert len({(p.table, p.who, p.source, p.how) for p in PUBLISHED}) == len(PUBLISHED)

def test_published_numbers_stand_in_one_place(): # in the module's own chapter, not as literals elsewhere
    numbers = {f'{v}' for p in PUBLISHED if p.table in ('imagenet', 'mm_svm', 'mm_shots', 'mm_places')
               for v in p.values if v is not None and round(v*100) % 10}
    folder = experiments_folder()
    code = {p.name: ''.join(''.join(c['source']) for c in json.loads(p.read_text())['cells'])
            for p in [*folder.glob('*.ipynb'), *folder.parent.glob('*_probes.ipynb'),
                      *folder.parent.glob('*_voc.ipynb')]}
    assert numbers and {name: n for name,text in code.items() for n in numbers if n in text} == {}
    assert not any('13.4, 32.3' in text or '44.2, 48.3' in text for text in code.values())

def test_a_markdown_table_of_published_numbers():
    head, dashes, line, _, note = published_table('mm_svm').splitlines()
    assert 'SVM' in head and set(dashes) <= set('|- ') and note.startswith('1. MMSelfSup')
    assert '74.26' in line and 'pub\N{NO-BREAK SPACE}(1)' in line
    assert '| 70.00 |' in published_table('mm_shots')
    assert '| 41.0 |' in published_table('imagenet')

def test_unknown_table():
    with pytest.raises(ValueError, match="table: expected one of imagenet.*got 'tabel'"): published('tabel')

# what a folder is

def test_folders_are_told_by_their_files_alone(tmp_path):
    paths = dict(train=train(tmp_path/'probe-voc'), probe=probe(tmp_path/'train'),
                 voc=voc(tmp_path/'retrieval'),
                 retrieval=made(tmp_path/'x', 'retrieval', dict(mAP=dict(random=5.)), data='paris6k'),
                 finetune=tuned(tmp_path/'retrieval2'))
    assert {kind: read_finished(p).kind for kind,p in paths.items()} == {kind: kind for kind in paths}
    assert set(KINDS) == set(paths)

def test_what_is_no_run_or_another_experiment(tmp_path):
    with pytest.raises(FileNotFoundError, match='no params.yaml'): read_finished(tmp_path)
    other = made(tmp_path/'c', 'choices')
    with pytest.raises(ValueError, match='expected the folder of train, probe, voc, .*another'):
        read_finished(other)
    (tmp_path/'d').mkdir(); (tmp_path/'d'/'params.yaml').write_text('- a list')
    with pytest.raises(ValueError, match='names and values in .*got a list'): read_finished(tmp_path/'d')

@pytest.mark.parametrize('params, metrics, name', [
    (dict(dataset='cifar10'), dict(classes=10, n_images=50_000), 'cifar10'),
    (dict(dataset='packed'), dict(n_images=1_281_167), 'imagenet'),
    (dict(dataset='folder'), dict(n_images=9000, classes=1000), 'imagenet'),
    (dict(dataset='folder'), dict(n_images=9000, classes=205), 'places'),
    (dict(dataset='folder'), dict(n_images=437_513), 'inat'),
    (dict(dataset='folder'), dict(n_images=73_257, classes=10), 'svhn'),
    (dict(dataset='packed'), dict(n_images=3000, classes=10), '')])
def test_which_images(tmp_path, params, metrics, name):
    made(tmp_path/'r', 'probe', metrics, **params)
    assert data_of(read_finished(tmp_path/'r')) == name

# where numbers go

def test_probes_of_alexnet_on_imagenet(tmp_path):
    best, last, one_best, one_last = rows_of(probe(tmp_path/'p'), table='imagenet')
    assert [r.values['conv1'] for r in (best, last, one_best, one_last)] == [40.1, 40., 40.3, 40.2]
    assert [r.how for r in (best, last, one_best, one_last)] == [
        'best epoch, ten crops', 'last epoch, ten crops', 'best epoch, one crop', 'last epoch, one crop']
    assert differences(best) == [] and 'kNN' not in best.values
    assert [r.values['conv5'] for r in rows_of(tmp_path/'p', table='imagenet', net='random')] == [14.1]
    assert [r.values for r in rows_of(tmp_path/'p', table='knn')] == [dict(kNN=33.)]

def test_a_share_of_the_labels(tmp_path):
    learned, frozen = rows_of(tuned(tmp_path/'f'), table='mm_share')
    assert (learned.values, frozen.values) == ({'1 %': 30., '10 %': 31.}, {'1 %': 32., '10 %': 33.})
    assert differences(learned) == [] and 'all layers learn' in learned.how and 'frozen' in frozen.how
    shorter = rows_of(tuned(tmp_path/'g', epochs=5), table='mm_share')[0]
    assert differences(shorter) == ['epochs 5 (source: 20)']
    here = [learned, frozen]
    assert commands(TABLES['mm_share'], here, [learned.run]) == []
    only = replace(learned, values={'1 %': 30.})
    ((empty, lines),) = commands(TABLES['mm_share'], [only], [learned.run])
    assert empty == ['10 %'] and 'finetune_imagenet_10percent' in lines[-1]
    (cifar, _) = rows_of(tuned(tmp_path/'h', dataset='cifar10'), table='')
    assert cifar.values == learned.values

def test_every_setting_of_a_probe_is_held_against_the_source(tmp_path):
    other = dict(momentum=.5, weight_decay=1e-3, nesterov=True, head_norm=True, crops='resized',
                 count_padding=False)
    row = rows_of(probe(tmp_path/'p', metrics=dict(n_test=10_000)), table='imagenet')[0]
    assert differences(row) == ['n_test 10,000 (source: 50,000)']
    params = yaml.safe_load((tmp_path/'p'/'params.yaml').read_text()) | other
    (tmp_path/'p'/'params.yaml').write_text(yaml.safe_dump(params))
    named = [d.split()[0] for d in differences(rows_of(tmp_path/'p', table='imagenet')[0])]
    assert sorted(named) == sorted([*other, 'n_test'])

def test_neighbors_of_a_part_are_called_that(tmp_path):
    (row,) = rows_of(train(tmp_path/'t'), table='knn')
    assert row.how == 'kNN, T = 0.1 among at most 50,000 training images'
    (row,) = rows_of(probe(tmp_path/'p', neighbors=10), table='knn')
    assert row.how == 'kNN, T = 0.1, 10 neighbors'

def test_a_network_is_described_by_its_own_training(tmp_path):
    train(tmp_path/'t', seed=3)
    run = read_finished(probe(tmp_path/'p', weights=str(tmp_path/'t')))
    assert about(run) == 'alexnet, Sobel, k = 10,000, 2 of 500 reassignments, trained with seed 3, seed 0'
    whole = read_finished(train(tmp_path/'whole', epochs=2))
    assert about(whole) == 'alexnet, Sobel, k = 10,000, 2 reassignments, seed 0'

def test_clusters_that_were_found_are_counted(tmp_path): # PIC is given no k
    for k in (5, 10): train(tmp_path/f'k{k}', dict(k=11), k=k, clusterer='pic')
    assert rows_of(tmp_path/'k5', tmp_path/'k10', table='clusters') == []
    assert 'k = 11' in about(read_finished(tmp_path/'k5'))

def test_what_differs_is_named(tmp_path):
    path = probe(tmp_path/'p', crops='center', metrics=dict(n_images=50_000, classes=1000), epochs=20,
                 ten_crops=False)
    best, last = rows_of(path, table='imagenet')
    assert differences(best) == ['epochs 20 (source: 90)', 'n_images 50,000 (source: 1,281,167)',
                                 'ten_crops False (source: True)']
    assert best.how == 'best epoch, one crop'
    page = report_page([read_finished(path)])
    assert 'epochs 20 (source: 90)' in page

@pytest.mark.parametrize('metrics, table', [
    (dict(arch='resnet50', classes=1000), 'mm_imagenet'),
    (dict(arch='resnet50', n_images=2_448_873), 'mm_places'),
    (dict(arch='resnet50', n_images=437_513), 'mm_inat'),
    (dict(n_images=2_448_873), 'places'),
    (dict(arch='vgg16'), ''),
    (dict(n_images=3000, classes=10), '')])
def test_tables_of_probes(tmp_path, metrics, table):
    rows = rows_of(probe(tmp_path/'p', metrics=metrics, crops='center'), table=table)
    assert len(rows) == 2 and ('kNN' in rows[0].values) == (table == '')
    knn = [r.values for r in rows_of(tmp_path/'p', table='') if r.how.startswith('kNN')]
    assert knn == ([dict(kNN=33.)] if table else [])                      # no number is lost

def test_the_average_pool_of_a_resnet(tmp_path):
    path = probe(tmp_path/'p', LAYERS + ('avgpool',), dict(arch='resnet50'), 'center')
    assert rows_of(path, table='mm_imagenet')[0].values['avgpool'] == 45.1

def test_quick_probes_are_called_that(tmp_path):
    (row,) = rows_of(train(tmp_path/'t'), table='imagenet')
    assert 'quick' in row.how and row.values['conv3'] == 32.
    (row,) = rows_of(train(tmp_path/'c', dict(n_images=10_000, classes=10), dataset='cifar10',
                           arch='alexnet_small', size=32), table='cifar10')
    assert row.values['kNN'] == 3. and 'n_images 10,000 (source: 50,000)' in differences(row)

def test_logs(tmp_path):
    path = train(tmp_path/'t')
    (row,) = rows_of(path, table='nmi')
    assert list(row.values.values()) == ['0.150', '0.250', '0.500'] and 'after 2 of 500' in row.how
    (row,) = rows_of(path, table='cost')
    assert row.values['reassignments'] == 2 and row.values['clustering'] == '33%'
    assert '<img alt=' in report_page([read_finished(path)])

def test_a_run_without_labels_and_without_an_end(tmp_path):
    log = [r | dict(nmi_labels=None) for r in epochs(.3)]
    path = made(tmp_path/'t', 'train', None, log, dataset='packed', arch='alexnet')
    (row,) = rows_of(path, table='nmi')
    assert list(row.values.values()) == ['', '', '']
    page = report_page([read_finished(path)])
    assert 'Not finished, shown with what is there: t.' in page

def test_numbers_of_clusters_need_two(tmp_path):
    a, b = train(tmp_path/'a', k=100), train(tmp_path/'b', k=1000, seed=1)
    other = train(tmp_path/'c', k=10, lr=.01)
    assert rows_of(a, table='clusters') == [] == rows_of(a, other, table='clusters')
    assert [r.values['k'] for r in rows_of(a, b, other, table='clusters')] == [100, 1000]

def test_voc_by_the_rule_of_each_source(tmp_path):
    path = voc(tmp_path/'v')
    (row,) = rows_of(path, table='voc')
    assert row.values == {'classification, fc6-8': 41., 'classification, all': 42.}         # by `step`
    assert '80,000 steps, fc6-8 with batch norm frozen' in row.how and differences(row) == []
    assert [r.values for r in rows_of(path, table='mm_svm')] == [dict(SVM=41.)]      # interpolated
    shots, honest = rows_of(path, table='mm_shots')
    assert honest.values == {'k = 1': 5., 'k = 96': 5.} and 'chosen on other training images' in honest.how
    assert shots.values == {'k = 1': 8., 'k = 96': 8.} and 'best on the test images' in shots.how
    assert differences(shots) == ['arch alexnet (source: resnet50)']
    assert rows_of(voc(tmp_path/'made', data='made'), table='voc') == []

def test_photographs_without_classes(tmp_path):
    weights = train(tmp_path/'t', dict(classes=0, n_images=900_000, probes={}, knn={}))
    path = voc(tmp_path/'v', weights=str(weights))
    assert len(rows_of(path, table='yfcc')) == 1 and rows_of(path, table='voc') == []
    runs = [read_finished(p) for p in (weights, path)]
    assert any(str(weights) in l for _,lines in commands(TABLES['yfcc'], [], runs) for l in lines)

def test_retrieval(tmp_path):
    found = dict(mAP=dict(random=5., deepcluster=60., blind=1.), arch='vgg16')
    path = made(tmp_path/'r', 'retrieval', found, data='oxford5k', arch='vgg16')
    (row,) = rows_of(path, table='retrieval')
    assert row.values == dict(oxford5k=60.) and differences(row) == []
    ((empty, lines),) = commands(TABLES['retrieval'], [row], [row.run])
    assert empty == ['paris6k'] and 'retrieval_paris6k' in lines[-1]

# what is missing

def test_a_command_names_the_run_that_fits(tmp_path):
    fits, rgb = train(tmp_path/'fits'), train(tmp_path/'rgb', sobel=False)
    of = lambda *paths: commands(TABLES['imagenet'], [], [read_finished(p) for p in paths])[0][1]
    assert of(rgb, fits) == [f'deepcluster-nb run probe --preset probe_imagenet -p weights={fits}']
    spaced = train(tmp_path/'a b')
    assert shlex.split(of(spaced)[0])[-1] == f'weights={spaced}'
    assert len(of(rgb)) == 2 and of(rgb)[0].endswith('--out runs/imagenet_alexnet')

def all_commands():
    return [line for table in TABLES.values() for _,lines in commands(table, [], []) for line in lines
            if line.startswith('deepcluster-nb')]

@pytest.mark.parametrize('line', sorted(set(all_commands())))
def test_commands_have_names_that_exist(line):
    words = shlex.split(line, comments=True)
    assert words[:2] == ['deepcluster-nb', 'run']
    pairs = [w for before,w in zip(words, words[1:]) if before == '-p' and not re.search('=[A-Z]+$', w)]
    preset = words[words.index('--preset') + 1]
    says = re.match(r'# for (\w+):', (experiments_folder()/'presets'/f'{preset}.yaml').read_text())
    notebook, given = gather(words[2], preset, parse_pairs(words[2], pairs))
    assert notebook.stem == words[2] == (says[1] if says else 'train')
    # what is made first is not there yet
    check_parameters(notebook, {k: v for k,v in given.items() if k != 'weights'} | dict(device='auto'),
                     Path('nowhere'))

def test_each_table_has_a_command_or_says_that_there_is_none():
    for table in TABLES.values():
        assert table.fill
        for columns,text in table.fill.items():
            assert set(columns) <= set(table.columns)
            assert text.startswith(('deepcluster-nb', 'not here: the kit has no', 'no numbers'))

# the page and the command

def test_every_table_is_on_the_page(tmp_path):
    page = report_page([])
    assert all(escape(t.title) in page for t in TABLES.values())
    assert all(escape(p.source) in page and escape(p.who) in page for p in PUBLISHED)
    assert page.count('not run') == sum(1 for t in TABLES.values() if t.columns)
    for line in set(all_commands()): assert escape(line) in page
    assert 'http' not in page and '<script' not in page

def test_names_are_escaped_and_two_of_a_name_told_apart(tmp_path):
    a, b = probe(tmp_path/'<b>'/'p'), probe(tmp_path/'x'/'p')
    page = report_page([read_finished(a), read_finished(b)])
    assert '<b>' not in page and '&lt;b&gt;' in page and escape(str(b)) in page

def test_the_command(tmp_path, capsys):
    path, out = probe(tmp_path/'p'), tmp_path/'page.html'
    before = sorted((p, p.read_bytes()) for p in path.iterdir())
    assert main(['report', str(path), '--out', str(out)]) == 0 and str(out) in capsys.readouterr().out
    assert before == sorted((p, p.read_bytes()) for p in path.iterdir())
    first = out.read_bytes()
    assert main(['report', str(path), '--out', str(out)]) == 2
    assert 'exists already' in capsys.readouterr().err
    assert main(['report', str(path), '--out', str(out), '--force']) == 0 and out.read_bytes() == first

@pytest.mark.parametrize('args, message', [
    (['{0}/nothing'], 'no run in .*nothing'),
    (['{0}'], 'no params.yaml'),
    (['{0}', '--out', '{0}'], 'out: expected a file in an existing folder')])
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, capsys, args, message):
    args = [a.format(tmp_path) for a in args]
    out = [] if '--out' in args else ['--out', str(tmp_path/'page.html')]
    assert main(['report', *args, *out]) == 2
    err = capsys.readouterr().err.strip()
    assert re.search(message, err) and len(err.splitlines()) == 1 and list(tmp_path.iterdir()) == []

def test_finding_runs_of_all_kinds(tmp_path):
    for name,make in dict(p=probe, t=train, v=voc).items(): make(tmp_path/name)
    made(tmp_path/'c', 'choices')
    assert [p.name for p in find_runs(f'{tmp_path}/*', read_finished)] == ['p', 't', 'v']
    assert [p.name for p in find_runs(f'{tmp_path}/*')] == ['t']

def test_a_pattern_of_the_shell_finds_other_folders_too(tmp_path, capsys):
    other, mine = made(tmp_path/'runs'/'c', 'compare'), probe(tmp_path/'runs'/'p')
    (tmp_path/'runs'/'empty').mkdir()
    everything, out = sorted(map(str, (tmp_path/'runs').iterdir())), tmp_path/'page.html'
    with pytest.warns(UserWarning, match='passed over.*/c.*/empty'):
        assert main(['report', *everything, '--out', str(out)]) == 0
    assert out.read_text() == report_page([read_finished(mine)])
    assert main(['report', *everything, str(tmp_path/'nothing'), '--out', str(out), '--force']) == 2
    assert main(['report', str(other), '--out', str(out), '--force']) == 2
    assert 'of another experiment' in capsys.readouterr().err

@pytest.fixture
def small(tmp_path): # runs of every kind on digits and made images
    return [f(tmp_path/'runs'/n, **more) for n,f,more in (
        ('train', train, dict(dataset='digits')), ('probe', probe, dict(dataset='digits')),
        ('voc', voc, dict(data='made')), ('retrieval', retrieval, dict(data='made')),
        ('finetune', tuned, dict(dataset='digits')))]

def test_small_runs_on_the_page(small):
    runs = [read_finished(p) for p in small]
    rows = measured(runs)
    assert {r.table for r in rows} == {'', 'nmi', 'cost'}       # digits and made images are in none
    kinds = {r.run.kind for r in rows if r.table == ''}
    assert kinds == {'train', 'probe', 'voc', 'retrieval', 'finetune'}
    page = report_page(runs)
    assert page.count('<h2') == len(TABLES) + 1 and 'In none of the tables' in page

def test_the_notebook(small, tmp_path, in_process):
    assert main(['run', 'report', '-p', f'runs={tmp_path}/runs/*', '--out', str(tmp_path/'out')]) == 0
    m = json.loads((tmp_path/'out'/'metrics.json').read_text())
    assert {Path(r['run']).name for r in m['rows']} == {'train', 'probe', 'voc', 'retrieval', 'finetune'}
    page, html = (tmp_path/'out'/'page.html').read_text(), (tmp_path/'out'/'report.html').read_text()
    assert all(escape(t.title) in html and escape(t.title) in page for t in TABLES.values())

def test_config_has_what_a_run_of_train_is_told_by(): assert KINDS['train'] <= asdict(Config()).keys()

def test_published_numbers_are_those_of_the_second_copy():
    copy = yaml.safe_load((Path(__file__).parent/'copies'/'published.yaml').read_text(encoding='utf-8'))
    assert [[p.table, p.who, *p.values] for p in PUBLISHED] == copy

def test_a_command_takes_the_run_that_it_asks_for(tmp_path):
    how, log = dict(dataset='packed', arch='alexnet', sobel=True), [dict(r) for r in epochs(2)]
    def run(name, k, metrics): return made(tmp_path/name, 'train', metrics, log, k=k, **how)
    done = dict(classes=1000, n_images=1_281_167)
    runs = [read_finished(p) for p in (run('k100', 100, done), run('half', 10_000, None),
                                       run('paper', 10_000, done))]
    for some,wanted in ((runs, 'paper'), (runs[:2], 'k100')): # unfinished, it is not known to be ImageNet's
        lines = [line for _,lines in commands(TABLES['imagenet'], [], some) for line in lines]
        assert (f'-p weights={tmp_path}/paper' in lines[-1]) == (wanted == 'paper')
        assert not any('/k100' in line for line in lines)

def test_every_cell_of_a_log_by_hand(tmp_path):
    log = [r | dict(seconds=r['seconds'] | dict(knn=90.)) for r in epochs(.3, .5)]
    paths = [train(tmp_path/f'k{k}', log=log, k=k) for k in (100, 1000)]
    rows = [r.values for r in measured([read_finished(p) for p in paths])
            if r.table in ('cost', 'clusters')]
    cost = {'reassignments': 2, 'an epoch': '1 min 39 s', 'in all': '3 min 18 s', 'clustering': '3%'}
    cells = {'NMI with labels': '0.250', 'conv3': 32., 'conv5': 34., 'kNN': 3.}
    assert rows == [dict(k=100) | cells, cost, dict(k=1000) | cells, cost]

def test_each_curve_in_its_panel(tmp_path):
    run = read_finished(train(tmp_path/'t'))
    with_labels, last = nmi_curves([run]).axes
    plt.close()
    assert [l.get_ydata()[-1] for l in with_labels.lines] == [.25]
    assert [l.get_ydata()[-1] for l in last.lines] == [.5, .01] and list(last.lines[0].get_xdata()) == [1, 2]
