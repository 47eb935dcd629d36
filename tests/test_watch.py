("A run seen from outside: "
 "while it works, when it has ended, when its process is gone, and where there is none.")
import json, math, os, re, signal, subprocess, sys, threading, time
from contextlib import contextmanager
from dataclasses import asdict
import pytest
from deepcluster_nb import experiments
from deepcluster_nb.experiments import dashboard, log_numbers, look_at, main, sparkline, watch, watch_figure
from deepcluster_nb.runs import Guard, Progress, RunFolder
from deepcluster_nb.fit import Config, describe

EPOCHS = 4

def row(epoch, loss=None): # a line of the log
    first = epoch == 0
    return dict(epoch=epoch, loss=loss or 2.3 - .4*epoch, ln_k=math.log(10),
                seconds=dict(features=1., pca=.5, kmeans=.25, training=3.), objective=9.,
                nmi_prev=None if first else .5 + .1*epoch, nmi_prev_chance=None if first else .2,
                ami_prev=None if first else .4, nmi_labels=.3 + .02*epoch, ami_labels=.2,
                n_empty=2 if first else 0, cluster_sizes=dict(min=1, median=9., max=40 - epoch, entropy=2.1))

def made(path, rows=0, **files): # a run folder as fit leaves it
    folder = RunFolder(path, asdict(Config(k=10, pca=8, epochs=EPOCHS)))
    for epoch in range(rows): folder.append(row(epoch))
    for name,content in files.items(): (path/name.replace('_', '.')).write_text(content)
    return folder

def aged(path, seconds): # every file as if written so long ago
    for p in path.rglob('*'):
        if p.is_file(): os.utime(p, (time.time() - seconds,)*2)

@contextmanager
def working(folder, pause=.05, after=None): # a run in another thread: an epoch every `pause` seconds
    ready = threading.Event()
    def work():
        with Guard(folder).held():
            ready.set()
            show = Progress(EPOCHS, folder=folder.path)
            for epoch in range(EPOCHS):
                show.show(dict(epoch=epoch, epochs=EPOCHS, phase='training', done=1, total=2,
                               fraction=epoch/EPOCHS, seconds_left=8.))
                time.sleep(pause)
                folder.append(row(epoch))
                if after: after(epoch)
            time.sleep(pause)
            (folder.path/'progress.json').unlink()
            for name,text in (('clusters.csv', 'path,cluster\n'),
                              ('metrics.json', json.dumps(dict(knn=dict(random=40., deepcluster=72.))))):
                (folder.path/name).write_text(text)
    thread = threading.Thread(target=work)
    thread.start(); ready.wait(10)
    try: yield
    finally: thread.join()

class Screen: # a terminal that keeps what it was sent
    def __init__(self): self.text = ''
    def write(self, text): self.text += text
    def flush(self): pass
    def isatty(self): return True

def test_lines_of_a_growing_log(tmp_path, capsys):
    with working(made(tmp_path/'r')): assert main(['watch', str(tmp_path/'r'), '--every', '.01']) == 0
    assert (capsys.readouterr().out.splitlines() == [describe(row(e), EPOCHS) for e in range(EPOCHS)]
            + ['finished'])

def test_a_run_that_ends_while_it_is_looked_at(tmp_path, monkeypatch):
    # between the question for its lock and the next one
    folder, asked = made(tmp_path/'r').path, []
    def lets_go(path): # as it writes its last files
        for name,text in (('clusters.csv', ''), ('metrics.json', '{"knn": {}}')):
            (folder/name).write_text(text)
        asked.append(path); return ''
    monkeypatch.setattr(experiments, 'held_by', lets_go)
    assert look_at(folder).words == 'finished' and asked

def test_a_terminal_is_refreshed_in_place(tmp_path, monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, 'stdout', screen)
    monkeypatch.setenv('COLUMNS', '60')
    monkeypatch.setenv('LINES', '40')
    with working(made(tmp_path/'r'), pause=.1): assert watch(tmp_path/'r', every=.02) == 0
    first, *rest = re.split(r'\033\[(\d+)F\033\[J', screen.text)
    shown, ups = [first, *rest[1::2]], [int(n) for n in rest[::2]]
    assert ups == [len(s.splitlines()) for s in shown[:-1]]      # each time back to where the last look began
    assert all(len(l) < 60 for s in shown for l in s.splitlines()) and '\033' not in ''.join(shown)
    assert (any('epoch 2/4 · training 1/2 · time left: 8 s'[:30] in s for s in shown)
            and 'no epoch is finished yet' in first)
    assert 'finished' in shown[-1] and 'epoch 4 of 4' in shown[-1] and '72.0' in shown[-1]

def test_lines_in_a_file_hold_nothing_for_a_terminal(tmp_path, monkeypatch, capsys): # run … > FILE
    made(tmp_path/'r', 2)
    monkeypatch.setattr(sys, 'stderr', Screen())
    experiments.Watcher(tmp_path/'r').look()
    experiments.Passing().write('a word\n')
    lines = [describe(row(e), EPOCHS) for e in range(2)] + ['a word']
    assert capsys.readouterr().out.splitlines() == lines
    assert sys.stderr.text.endswith('working · 0 s\033[K\r\033[K')

def test_one_look(tmp_path, capsys):
    with Guard(made(tmp_path/'r', 3)).held():
        assert main(['watch', str(tmp_path/'r'), '--once']) == 0
        out = capsys.readouterr().out
        assert f'process {os.getpid()} on' in out and 'epoch 3 of 4' in out and '\033' not in out
    lines = {l.split()[0]: l for l in out.splitlines() if l.startswith('  ')}
    assert '1.50' in lines['loss'] and 'ln k = 2.30' in lines['loss'] and 'nothing' not in lines['loss']
    assert re.search(r'NMI, last +0.70 .*chance 0.20', out) and re.search(r'NMI, labels +0.340', out)
    assert ('of 10 clusters' in lines['empty'] and 'median 9, smallest 1' in lines['largest']
            and '4.8' in lines['seconds'])

def test_a_loss_that_stays_at_ln_k_is_called_that(tmp_path):
    folder = made(tmp_path/'r')
    for e in range(3): folder.append(row(e, loss=2.29))
    assert 'next to nothing is learned' in dashboard(look_at(tmp_path/'r'))

def test_where_a_run_stands(tmp_path):
    state, words = lambda name: look_at(tmp_path/name).state, lambda name: look_at(tmp_path/name).words
    made(tmp_path/'stopped', 2)
    assert (state('stopped') == 'stopped' and 'after 2 of 4 epochs' in words('stopped')
            and 'the same command goes on' in words('stopped'))
    made(tmp_path/'fit', 4, clusters_csv='path,cluster\n')
    assert state('fit') == 'finished' and 'nothing was measured' in words('fit')
    notebook = lambda **kwargs: json.dumps(dict(cells=[], metadata=dict(papermill=kwargs)))
    made(tmp_path/'probing', 4, clusters_csv='', notebook_ipynb=notebook(exception=None))
    assert state('probing') == 'probing' and not look_at(tmp_path/'probing').ended
    aged(tmp_path/'probing', 900)
    assert state('probing') == 'probing' and 'nothing was written for 15 min' in words('probing')
    aged(tmp_path/'probing', 9000)
    assert state('probing') == 'stopped' and 'probes and report are missing' in words('probing')
    made(tmp_path/'failed', 4, clusters_csv='', notebook_ipynb=notebook(exception=True))
    assert state('failed') == 'failed' and watch(tmp_path/'failed') == 1
    made(tmp_path/'far', 2, progress_json='{}')
    (tmp_path/'far'/'checkpoint'/'holder').write_text('process 7 on another-machine since yesterday')
    assert state('far') == 'running'
    aged(tmp_path/'far', 900)
    assert state('far') == 'stopped'

def test_a_run_that_works_but_is_silent_says_since_when(tmp_path):
    with Guard(made(tmp_path/'r', 1)).held():
        aged(tmp_path/'r', 1200)
        look = look_at(tmp_path/'r')
    assert look.state == 'running' and look.words.endswith('nothing was written for 20 min 00 s')

def test_a_lock_that_we_may_not_touch_is_not_taken_for_a_dead_run(tmp_path, monkeypatch):
    def refused(path): raise PermissionError(13, 'Permission denied')
    with Guard(made(tmp_path/'r', 1)).held():
        monkeypatch.setattr(experiments, 'held_by', refused)
        assert look_at(tmp_path/'r').state == 'running'
        aged(tmp_path/'r', 900)
        assert look_at(tmp_path/'r').state == 'stopped'

def test_a_killed_run_is_dead(tmp_path, capsys):
    made(tmp_path/'r', 2)
    code = ("import sys, time; from pathlib import Path; from deepcluster_nb.runs import Guard\nclass Here: "
            "path = Path(sys.argv[1]); reserve = path/'reserve'\nwith Guard(Here).held(): "
            "print('in', flush=True); time.sleep(60)")
    p = subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'r')], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline().strip() == 'in'
    assert look_at(tmp_path/'r').words.startswith(f'process {p.pid} on')
    p.send_signal(signal.SIGKILL); p.wait(); p.stdout.close()
    assert main(['watch', str(tmp_path/'r')]) == 1
    assert (f'process {p.pid} on' in (out := capsys.readouterr().out)
            and 'was killed after 2 of 4 epochs' in out)

@pytest.mark.parametrize('content, message', [
    (None, r"no run in '.*' \(no params.yaml\)"),
    ('dataset: digits\nprotocol: paper\n', 'another experiment than train'),
    ('a: [', 'params.yaml. is no YAML')])
def test_what_is_no_run_is_one_line(tmp_path, capsys, content, message):
    if content: (tmp_path/'params.yaml').write_text(content)
    assert main(['watch', str(tmp_path)]) == 2
    err = capsys.readouterr().err.strip()
    assert re.search(message, err) and len(err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == (['params.yaml'] if content else [])

def test_ctrl_c_ends_the_watching_alone(tmp_path, capsys, monkeypatch):
    def interrupt(seconds): raise KeyboardInterrupt
    monkeypatch.setattr(experiments.time, 'sleep', interrupt)
    with Guard(made(tmp_path/'r', 1)).held(): assert main(['watch', str(tmp_path/'r')]) == 130
    assert 'the run is not touched' in capsys.readouterr().err

def test_sparkline():
    assert sparkline([0, 1, 2, 3], 0, 3) == '▁▃▆█' and sparkline([None, 5.], 0, 10) == ' ▅'
    assert (len(sparkline(list(range(1000)), 0, 1000, 10)) == 10 and sparkline([-9, 99], 0, 1) == '▁█'
            and sparkline([0, 0], 0, 0) == '▁▁')

class Events: # what a SummaryWriter is asked to write
    def __init__(self): self.points, self.closed = [], False
    def add_scalar(self, *point): self.points.append(point)
    def flush(self): pass
    def close(self): self.closed = True

def test_every_number_becomes_one_event(tmp_path, monkeypatch, capsys):
    events = Events()
    monkeypatch.setattr(experiments, 'event_writer',
                        lambda folder: events if folder == tmp_path/'tb'/'r' else 1/0)
    with working(made(tmp_path/'r')): watch(tmp_path/'r', every=.01, tensorboard=tmp_path/'tb')
    assert (events.closed and sorted(events.points)
            == sorted((name, v, e) for e in range(EPOCHS) for name,v in log_numbers(row(e)).items()))
    assert ('seconds/training', 3.,
            0) in events.points and not any(name == 'nmi_prev' and e == 0 for name,_,e in events.points)

def test_tensorboard_files(tmp_path, capsys):
    made(tmp_path/'r', EPOCHS, clusters_csv='', metrics_json='{}')
    status = main(['watch', str(tmp_path/'r'), '--tensorboard', str(tmp_path/'tb')])
    try: from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        err = capsys.readouterr().err.strip()
        assert (status == 2 and 'tensorboard is not installed' in err and len(err.splitlines()) == 1
                and not (tmp_path/'tb').exists())
        return
    found = EventAccumulator(str(tmp_path/'tb'/'r')).Reload()
    assert status == 0 and [(s.step, s.value) for s in found.Scalars('loss')] == [
        (e, pytest.approx(row(e)['loss'])) for e in range(EPOCHS)]
    assert set(found.Tags()['scalars']) == set(log_numbers(row(1)))

def test_in_a_notebook_text_and_curves_refresh(tmp_path, monkeypatch):
    import IPython.display, matplotlib.pyplot          # now: they take longer than the first epoch
    class Handle:
        def __init__(self, data): self.seen = [data]
        def update(self, data, raw): self.seen.append(data)
    handles = []
    def display(data, raw, display_id): handles.append(Handle(data)); return handles[-1]
    monkeypatch.setattr(IPython.display, 'display', display)
    with working(made(tmp_path/'r'), pause=.6): assert watch_figure(tmp_path/'r', every=.05) == 'finished'
    text, curves = handles
    assert ('no epoch is finished yet' in text.seen[0]['text/plain']
            and 'epoch 4 of 4' in text.seen[-1]['text/plain'])
    assert (1 < len({c['image/png'] for c in curves.seen}) <= EPOCHS
            and len(curves.seen) <= EPOCHS < len(text.seen))
