"""The paper's run on ImageNet, rehearsed in small: `python tests/rehearse.py DIR`.

Made photographs, packed as ImageNet is; what `estimate` says of the run; the preset imagenet_alexnet \
with two reassignments through the command, killed (SIGKILL) once inside the second, and continued with \
the same command; then the seconds of each phase beside the estimate, into DIR/rehearsal.json. The \
defaults are for a GPU; for two CPU cores:

    python tests/rehearse.py DIR --images 600 --n-test 60 -p k=20 -p pca=32 -p batch_size=64

The photographs in DIR are used again."""
import argparse, json, os, signal, subprocess, sys, time
from pathlib import Path
from deepcluster_nb.experiments import gather, parse_pairs, sleeping_threads
from deepcluster_nb.runs import amount, held_by

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, '-c', 'import sys; from deepcluster_nb.experiments import main; sys.exit(main())']
PHASES = 'features', 'pca', 'kmeans', 'training'

def photographs(folder, images, n_test, workers): # ImageNet's mean number of pixels, drawn for each image
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, n) in enumerate(dict(train=images, val=n_test).items()):
        if (folder/f'{split}.safetensors').exists(): continue
        how = ['-n', n, '--size', 500, '--ragged', '--center', 224, '--seed', seed, '--workers', workers]
        subprocess.run([sys.executable, ROOT/'data_scripts'/'make_synthetic.py',
                        folder/f'{split}.safetensors', *map(str, how)], check=True)

# in processes of their own: a GPU's memory is for the run

ESTIMATE = '''
import json, sys
from deepcluster_nb.estimate import estimate
from deepcluster_nb.fit import Config
found = estimate(Config(**json.loads(sys.argv[1])), seconds=float(sys.argv[2]))
print(found, file=sys.stderr)
print(json.dumps(dict(epoch=found.epoch(), totals=found.totals(), memory=found.memory, disk=found.disk)))
'''

CHECKPOINT = '''
import json, sys, tempfile, time
from deepcluster_nb.fit import load_run, network, optimizers, restore, snapshot, State
from deepcluster_nb.runs import load_checkpoint, pack_checkpoint, write_checkpoint
run, took = load_run(sys.argv[1]), []
tensors = load_checkpoint(sys.argv[1] + '/checkpoint')[2]
net = network(run.config)
state = State(net, restore(net, run.config, tensors), clustering=run.clustering, pca=run.pca)
with tempfile.TemporaryDirectory(dir=sys.argv[1]) as tmp:
    for _ in range(int(sys.argv[2])):
        times = [time.perf_counter()]
        packed = pack_checkpoint(0, snapshot(state), {})
        times.append(time.perf_counter())
        write_checkpoint(tmp, *packed)
        times.append(time.perf_counter())
        took.append((times[1] - times[0], times[2] - times[1]))
held_up, written = (sorted(t)[len(t)//2] for t in zip(*took))
print(json.dumps(dict(bytes=len(packed[1]), held_up=held_up, written=written)))
'''

def told(code, *args): # what it prints, as JSON
    env = os.environ | sleeping_threads(os.environ)
    done = subprocess.run([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE, text=True,
                          check=True, env=env)
    return json.loads(done.stdout)

def progress(run): # of a run: (epoch, phase, steps done), or None
    try: p = json.loads((run/'progress.json').read_text())
    except (OSError, ValueError): return None
    return p['epoch'], p['phase'], p['done']

def killed(command, run): # inside the training of the second reassignment → seconds
    start, p = time.time(), subprocess.Popen(command)
    while p.poll() is None:
        at = progress(run)
        if at and at[:2] == (1, 'training') and at[2] > 1: break
        time.sleep(.005)
    assert p.poll() is None, 'the run was through before it could be killed'
    os.kill(int(held_by(run).split()[1]), signal.SIGKILL)
    p.kill(); p.wait()
    took = time.time() - start
    while held_by(run): time.sleep(.1)                 # a large process takes a while to die
    assert not (run/'clusters.csv').exists()
    return took

def rehearse(top, params, images=50_000, n_test=2000, seconds=90., workers=os.cpu_count(), writes=3,
             say=print):
    "Make, estimate, run, kill, continue; return what is in rehearsal.json."
    top = Path(top).resolve()
    run = top/'run'
    assert not run.exists(), f'{run} is there already; remove it, or choose another folder'
    begin = time.time()
    photographs(top/'packed', images, n_test, workers)
    took = dict(making=time.time() - begin)
    params = dict(epochs=2) | params | dict(root=str(top/'packed'))
    found = told(ESTIMATE, json.dumps(gather('train', 'imagenet_alexnet', params)[1]), seconds)
    command = [*COMMAND, 'run', 'train', '--preset', 'imagenet_alexnet', '--out', str(run),
               *[x for k,v in params.items() for x in ('-p', f'{k}={v}')]]
    took['until it was killed'] = killed(command, run)
    begin = time.time()
    subprocess.run(command, check=True)
    took['continued, to the report'] = time.time() - begin
    log = [json.loads(l)['seconds'] for l in (run/'log.jsonl').read_text().splitlines()]
    result = dict(images=images, params=params, took=took, estimate=found, measured=log,
                  ratio={p: log[-1][p] / found['epoch'][p] for p in PHASES},
                  checkpoint=told(CHECKPOINT, run, writes), cores=os.cpu_count(), load=os.getloadavg())
    (top/'rehearsal.json').write_text(json.dumps(result, indent=1))
    say(table(result))
    return result

def table(r):
    rows = [f"{'seconds a reassignment':24}{'estimated':>10}{'first':>10}{'second':>10}{'ratio':>8}"]
    for p in PHASES:
        first, second = (e[p] for e in r['measured'])
        rows.append(f"{p:24}{r['estimate']['epoch'][p]:10.2f}{first:10.2f}{second:10.2f}{r['ratio'][p]:8.2f}")
    c = r['checkpoint']
    return '\n'.join([*rows, f"a checkpoint of {amount(c['bytes'])}: training waits {c['held_up']:.2f} s, "
                             f"the disk takes {c['written']:.2f} s behind it"])

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('dir')
    p.add_argument('--images', type=int, default=50_000)
    p.add_argument('--n-test', type=int, default=2000, help='test images, for the probes')
    p.add_argument('--seconds', type=float, default=90., help='of the estimate')
    p.add_argument('--workers', type=int, default=os.cpu_count(), help='processes that make photographs')
    p.add_argument('-p', action='append', default=[], metavar='key=value', help='a parameter of train')
    a = p.parse_args()
    rehearse(a.dir, parse_pairs('train', a.p), a.images, a.n_test, a.seconds, a.workers)
