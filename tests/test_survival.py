("What a long run meets: kills, signals, a full disk, damage, a second start, numbers that are none. "
 "`python tests/survive.py` is the long version.")
import errno, json, os, pickle, random, re, signal, subprocess, sys, threading, time, warnings
from dataclasses import asdict, replace
from pathlib import Path
import pytest, torch
from deepcluster_nb import runs
from deepcluster_nb.fast import features
from deepcluster_nb.runs import load_checkpoint, save_checkpoint
from deepcluster_nb.fit import Hooks, disk_space, fit
from survive import SMALL, sha256

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    where = tmp_path_factory.mktemp('run')/'whole'
    fit(replace(SMALL, run_dir=str(where)), echo=None)
    return sha256(where)

def log_epochs(run_dir):
    return [json.loads(l)['epoch'] for l in (Path(run_dir)/'log.jsonl').read_text().splitlines()]

def test_killed_at_random_moments():
    out = subprocess.run([sys.executable, Path(__file__).with_name('survive.py'), '--kills', '4'],
                         capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert out.returncode == 0 and '4 of 4 runs ended in the same bits' in out.stdout, out.stdout + out.stderr

@pytest.fixture
def two_checkpoints(tmp_path): # of epochs 3 and 4; 1 MB of tensors each
    for e in (3, 4): save_checkpoint(tmp_path/'c', e, dict(x=torch.full((2**18,), float(e))), dict(note=e))
    return tmp_path/'c', next((tmp_path/'c').glob('00004-*.safetensors')), tmp_path/'c'/'00004-0000000.json'

def test_truncated_checkpoints_are_refused(two_checkpoints):
    folder, tensors, record = two_checkpoints
    refused = 0
    for file in (tensors, record):
        data = file.read_bytes()
        for i in range(10):
            file.write_bytes(data[:len(data)*i//10])
            with pytest.warns(UserWarning, match=r'00004-0000000\.json.*going on from .*00003-0000000\.json'):
                epoch, _, t, state = load_checkpoint(folder)
            refused += epoch == 3 and state == dict(note=3) and bool((t['x'] == 3).all())
        file.write_bytes(data)
    assert refused == 20 and load_checkpoint(folder)[0] == 4

def test_flipped_bits_are_refused(two_checkpoints):
    folder, tensors, record = two_checkpoints
    draw, refused = random.Random(0), 0
    for i in range(200):
        file = record if i % 10 == 0 else tensors
        data = file.read_bytes()
        at = draw.randrange(len(data) if i % 3 else min(200, len(data)))                 # often in the header
        spoilt = bytearray(data); spoilt[at] ^= 1 << draw.randrange(8); file.write_bytes(spoilt)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            epoch, _, t, state = load_checkpoint(folder)
        refused += (epoch == 3 and bool((t['x'] == 3).all()) and len(said) == 1
                    and '00004-0000000.json' in str(said[0].message)
                    and '00003-0000000.json' in str(said[0].message))
        file.write_bytes(data)
    assert refused == 200

def test_a_pickle_in_a_checkpoints_place_is_not_executed(two_checkpoints, tmp_path):
    class Bomb:
        def __reduce__(self): return Path.touch, (tmp_path/'boom',)
    folder, tensors, record = two_checkpoints
    for file in (tensors, record):
        file.write_bytes(pickle.dumps(Bomb()))
        with pytest.warns(UserWarning, match='00004'): assert load_checkpoint(folder)[0] == 3
    assert not (tmp_path/'boom').exists()

def start(config, more='pass'): # in a process of its own
    code = (f"import torch; torch.set_num_threads({torch.get_num_threads()}); "
            f"from deepcluster_nb.fit import *; {more}; fit(Config(**{asdict(config)!r}), echo=None)")
    return subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True)

def wait_for(run_dir, pattern, p, seconds=60):
    end = time.time() + seconds
    while not list(Path(run_dir).glob(pattern)) and p.poll() is None and time.time() < end: time.sleep(.002)
    assert list(Path(run_dir).glob(pattern)), p.communicate()

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end(tmp_path, whole, number):
    config = replace(SMALL, run_dir=str(tmp_path/'r'))
    p = start(config)
    wait_for(tmp_path/'r', 'checkpoint/00000-0000001.json', p)
    p.send_signal(number)
    err = p.communicate(timeout=60)[1]
    assert p.returncode and f'{number.name} came: the state is saved' in err, err
    epoch, step = load_checkpoint(tmp_path/'r'/'checkpoint')[:2]
    assert (epoch, step) > (0, 0) and not (tmp_path/'r'/'checkpoint'/'reserve').exists()
    fit(config, echo=None)
    assert sha256(tmp_path/'r') == whole

def test_the_second_start_is_told_who_holds_the_run(tmp_path, whole):
    config = replace(SMALL, epochs=1, run_dir=str(tmp_path/'r'))
    p = start(config, "import deepcluster_nb.fit as f, time; parts = f.PARTS['fast']; "
                      "slow = parts.train_epoch; "
                      "parts.train_epoch = lambda *a, **k: (time.sleep(30), slow(*a, **k))[1]")
    try:
        wait_for(tmp_path/'r', 'assignments/epoch_000.npy', p)
        with pytest.raises(ValueError, match=rf"run_dir: .* is in use by process {p.pid} on .* since 20\d\d"):
            fit(config, echo=None)
    finally: p.kill(); p.communicate()
    fit(config, echo=None)                                                # the lock died with its process
    assert log_epochs(tmp_path/'r') == [0]

@pytest.mark.parametrize('name', ['log.jsonl', r'epoch_001.npy', r'00000-0000002\.json',
                                  r'00001-0000000-.*safetensors', 'clusters.csv'])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, whole, name):
    config, write, full = replace(SMALL, run_dir=str(tmp_path/'r')), runs.write_atomic, []
    def fails(path, data, sync=True): # from here on nothing fits but what the reserve leaves room for
        if not full and re.search(name, str(path)): full.append(path)
        if full and (Path(config.run_dir)/'checkpoint'/'reserve').exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data, sync)
    monkeypatch.setattr(runs, 'write_atomic', fails)
    # a step saves; what a clustering or the end of the run finds has no newer state to save
    kept = 'last checkpoint is' if name[:5] in ('00001', 'clust') else 'state is saved'
    with pytest.raises(KeyboardInterrupt, match=f'the disk is full: the {kept} in'):
        fit(config, echo=None)
    assert load_checkpoint(tmp_path/'r'/'checkpoint')[:2] >= ((2, 0) if name == 'clusters.csv' else (0, 2))
    monkeypatch.undo()
    fit(config, echo=None)
    assert sha256(tmp_path/'r') == whole

def test_two_writes_find_the_disk_full_at_once(tmp_path): # a checkpoint in its thread, and a small file
    folder, tried = runs.RunFolder(tmp_path/'r', {}), []
    folder.reserve.write_bytes(b'room')
    def fails(name, meanwhile=None):
        tried.append(name)
        if tried.count(name) > 1: return
        if meanwhile: meanwhile()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    folder.safely(fails, 'checkpoint', lambda: folder.safely(fails, 'file'))
    assert tried == ['checkpoint', 'file', 'file', 'checkpoint']
    assert folder.full and not folder.reserve.exists()

# ------------------------------------------- a checkpoint is written while the next step is computed

SELDOM = replace(SMALL, checkpoint_minutes=1e6)            # at the end of each epoch

@pytest.mark.parametrize('parts', ['fast', 'plain'])
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch, parts):
    config, write, on = replace(SELDOM, parts=parts), runs.write_checkpoint, threading.Event()
    fit(replace(config, run_dir=str(tmp_path/'whole')), echo=None)
    after_step, seen = Hooks.after_step, []
    def step(self, *args):
        after_step(self, *args)
        if self.state.epoch == 1: on.set()
    def waits(folder, name, *more): # the first one, until the next epoch has done a step
        seen.append((name, on.wait(60)))
        write(folder, name, *more)
    monkeypatch.setattr(Hooks, 'after_step', step)
    monkeypatch.setattr(runs, 'write_checkpoint', waits)
    fit(replace(config, run_dir=str(tmp_path/'r')), echo=None)
    assert seen == [('00001-0000000', True), ('00002-0000000', True), ('00002-0000000', True)]
    assert sha256(tmp_path/'r') == sha256(tmp_path/'whole')

def test_a_failed_write_is_one_error_of_the_training(tmp_path, monkeypatch, whole):
    config, write = replace(SELDOM, run_dir=str(tmp_path/'r')), runs.write_atomic
    def fails(path, data, sync=True):
        if '00002-0000000-' in str(path): raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        write(path, data, sync)
    monkeypatch.setattr(runs, 'write_atomic', fails)
    with pytest.raises(OSError, match=r"run_dir: checkpoint 00002-0000000 can't be written into .* "
                                      r'\(Input/output error\); what was saved before is whole'):
        fit(config, echo=None)
    assert load_checkpoint(tmp_path/'r'/'checkpoint')[:2] == (1, 0) and not runs.held_by(tmp_path/'r')
    monkeypatch.undo()
    fit(config, echo=None)
    assert sha256(tmp_path/'r') == whole

def test_a_signal_waits_for_the_checkpoint_that_is_being_written(tmp_path, monkeypatch, whole):
    config, write, done = replace(SELDOM, run_dir=str(tmp_path/'r')), runs.write_checkpoint, []
    def slow(folder, name, *more):
        if not done: os.kill(os.getpid(), signal.SIGTERM); time.sleep(.5)
        write(folder, name, *more)
        done.append((name, runs.held_by(tmp_path/'r') != ''))
    monkeypatch.setattr(runs, 'write_checkpoint', slow)
    with pytest.raises(KeyboardInterrupt, match='SIGTERM came: the state is saved'): fit(config, echo=None)
    assert done[0] == ('00001-0000000', True) and all(held for _,held in done)
    assert load_checkpoint(tmp_path/'r'/'checkpoint')[:2] >= (1, 0) and not runs.held_by(tmp_path/'r')
    monkeypatch.undo()
    fit(config, echo=None)
    assert sha256(tmp_path/'r') == whole

def test_an_error_of_the_training_waits_for_it_too(tmp_path, monkeypatch):
    config, write, done = replace(SELDOM, run_dir=str(tmp_path/'r')), runs.write_checkpoint, []
    def slow(*args): time.sleep(.5); write(*args); done.append(args)
    monkeypatch.setattr(runs, 'write_checkpoint', slow)
    def stop(line): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): fit(config, echo=stop)
    assert len(done) == 1 and load_checkpoint(tmp_path/'r'/'checkpoint')[:2] == (1, 0)

def test_checkpoints_of_every_third_epoch(tmp_path, monkeypatch):
    config, save, saved = replace(SELDOM, epochs=5, checkpoint_epochs=3), runs.RunFolder.save, []
    fit(replace(config, checkpoint_epochs=1, run_dir=str(tmp_path/'whole')), echo=None)
    def noted(self, epoch, *args): saved.append(epoch); save(self, epoch, *args)
    monkeypatch.setattr(runs.RunFolder, 'save', noted)
    def stop(line): assert not line.startswith('epoch 5')
    with pytest.raises(AssertionError): fit(replace(config, epochs=6, run_dir=str(tmp_path/'r')), echo=stop)
    assert saved == [3] and log_epochs(tmp_path/'r') == [0, 1, 2, 3, 4]
    saved.clear(); fit(replace(config, run_dir=str(tmp_path/'s')), echo=None)
    assert saved == [3, 5, 5] and sha256(tmp_path/'s') == sha256(tmp_path/'whole')
    saved.clear(); fit(replace(config, epochs=6, run_dir=str(tmp_path/'r')), echo=None)
    assert saved == [6, 6] and log_epochs(tmp_path/'r') == [0, 1, 2, 3, 4, 5]

def test_a_stop_in_a_clustering_says_what_is_kept(tmp_path, monkeypatch): # between two checkpoints
    config = replace(SELDOM, epochs=4, checkpoint_epochs=3, run_dir=str(tmp_path/'r'))
    clustering = Hooks.clustering
    def asked(self, done, n):
        if self.state.epoch == 2: os.kill(os.getpid(), signal.SIGTERM)
        clustering(self, done, n)
    monkeypatch.setattr(Hooks, 'clustering', asked)
    with pytest.raises(KeyboardInterrupt, match='SIGTERM came: the last checkpoint is in'):
        fit(config, echo=None)

def test_no_room_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.shutil, 'disk_usage', lambda path: type('U', (), dict(free=10**7)))
    with pytest.raises(ValueError, match=r"run_dir: this run needs [\d.]+ MB more in .*, but 10 MB are free"):
        fit(replace(SMALL, run_dir=str(tmp_path/'r')), echo=None)
    assert not list((tmp_path/'r').glob('checkpoint/0*'))

def test_what_a_stopped_run_left_needs_no_new_room(tmp_path, monkeypatch):
    folder = runs.RunFolder(tmp_path/'r', {})
    folder.write('assignments/epoch_000.npy', bytes(1_000_000))
    monkeypatch.setattr(runs.shutil, 'disk_usage', lambda path: type('U', (), dict(free=500_000)))
    with runs.Guard(folder).held(more=1_400_000): pass
    with pytest.raises(ValueError, match='this run needs 600 kB more in .*, but 500 kB are free'):
        with runs.Guard(folder).held(more=1_600_000): pass

def test_no_run_takes_more_room_than_it_asked_for(tmp_path, monkeypatch):
    config, rename, most = replace(SMALL, run_dir=str(tmp_path/'r')), os.replace, []
    def measured(new, old): # when the new file is whole and the old ones are there still
        most.append(sum(p.stat().st_size for p in (tmp_path/'r').rglob('*') if p.is_file()))
        rename(new, old)
    monkeypatch.setattr(runs.os, 'replace', measured)
    run = fit(config, echo=None)
    size, more = disk_space(run.net, run.config, len(run.images))
    assert 3.9*size < max(most) <= 4*size + more

def test_a_full_disk_under_the_features(tmp_path, monkeypatch, whole):
    config = replace(SMALL, run_dir=str(tmp_path/'r'))
    class Full:
        def write(self, data): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        def close(self): pass
    monkeypatch.setattr(features.tempfile, 'TemporaryFile', lambda dir: Full())
    monkeypatch.setattr('deepcluster_nb.fast.training.HalfFeatures',
                        lambda n, folder: features.HalfFeatures(n, folder, room=0))
    with pytest.raises(OSError, match='run_dir: the disk of .* is full; what was saved is whole'):
        fit(config, echo=None)
    monkeypatch.undo()
    fit(config, echo=None)
    assert sha256(tmp_path/'r') == whole

@pytest.mark.parametrize('spoil', ['loss', 'gradient'])
def test_not_a_number_stops_before_the_update(tmp_path, monkeypatch, spoil):
    config = replace(SMALL, run_dir=str(tmp_path/'r'))
    from deepcluster_nb.fast import training
    calls, cross_entropy = [], training.F.cross_entropy
    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x * float('nan') if spoil == 'loss' else x.clone()
        @staticmethod
        def backward(ctx, g): return g * float('inf')
    def third_is_bad(logits, y, **kwargs):
        calls.append(y)
        return cross_entropy(Spoilt.apply(logits) if len(calls) == 7 else logits, y, **kwargs)
    monkeypatch.setattr(training.F, 'cross_entropy', third_is_bad)
    with pytest.raises(FloatingPointError, match=r'loss or gradient is not finite in epoch 1, step 2, '
                                                 r'images \[\d+, .*nothing was updated'):
        fit(config, echo=None)
    epoch, step, tensors, _ = load_checkpoint(tmp_path/'r'/'checkpoint')
    assert (epoch, step) == (1, 2) and all(t.isfinite().all()
                                           for t in tensors.values() if t.is_floating_point())
    assert log_epochs(tmp_path/'r') == [0]

def test_between_two_looks_nothing_is_updated_or_saved(tmp_path, monkeypatch):
    "As on a GPU, which is asked only now and then: the bad step is the second of four."
    from deepcluster_nb.fast import training
    flag, calls = training.nonfinite_flag, []
    def second_is_bad(loss, params):
        params = list(params)
        calls.append([p.detach().clone() for p in params])
        return flag(loss, params) + (len(calls) == 2)
    monkeypatch.setattr(training, 'nonfinite_flag', second_is_bad)
    config = replace(SMALL, epochs=1, checkpoint_minutes=1e6, run_dir=str(tmp_path/'seldom'))
    monkeypatch.setitem(training.CHECK_EVERY, 'cpu', 50)
    with pytest.raises(FloatingPointError, match='epoch 0, step 1, images'): fit(config, echo=None)
    assert (len(calls) == 4 and all(torch.equal(a, b) for a,b in zip(calls[1], calls[3]))
            and not all(torch.equal(a, b) for a,b in zip(calls[0], calls[1])))
    calls.clear()
    with pytest.raises(FloatingPointError, match='epoch 0, step 1, images'):
        fit(replace(config, checkpoint_minutes=0., run_dir=str(tmp_path/'often')), echo=None)
    assert load_checkpoint(tmp_path/'often'/'checkpoint')[:2] == (0, 1)          # the one before the bad step

def test_another_number_of_threads(tmp_path):
    config, threads = replace(SMALL, epochs=1, run_dir=str(tmp_path/'r')), torch.get_num_threads()
    fit(config, echo=None)
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(ValueError, match=rf'threads: expected {threads} CPU threads.*pass '
                                             rf'threads={threads} .* threads=-1 .* got {threads + 1}'):
            fit(config, echo=None)
        fit(replace(config, threads=threads), echo=None)
        assert torch.get_num_threads() == threads
        torch.set_num_threads(threads + 1)
        fit(replace(config, threads=-1), echo=None)
    finally: torch.set_num_threads(threads)
