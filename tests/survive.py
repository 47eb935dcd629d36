"""Kill a small run at random moments and see that it ends in the same bits: `python tests/survive.py \
--kills 50`.

Every run saves after each step, is killed once with SIGKILL (every second one while a checkpoint is \
being written), and is started again with the same call."""
import argparse, hashlib, json, os, random, shutil, signal, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
# what a run imports when it comes to it: once, not in each child
import sklearn.datasets, torch, torch._dynamo
from deepcluster_nb.runs import load_checkpoint
from deepcluster_nb.fit import Config, fit

SMALL = Config(dataset='digits', n_images=80, k=8, pca=16, epochs=2, passes=1, batch_size=20,
               precision='float32', device='cpu', checkpoint_minutes=0.)

def sha256(run_dir):
    # of weights, momentum, PCA, centroids, all assignments, clusters, and the log without its clock
    tensors = load_checkpoint(Path(run_dir)/'checkpoint')[2]
    log = [{k: v for k,v in json.loads(l).items() if k != 'seconds'}
           for l in (Path(run_dir)/'log.jsonl').read_text().splitlines()]
    assert [r['epoch']
            for r in log] == list(range(len(log))), 'an epoch is missing in the log, or there twice'
    h = hashlib.sha256(json.dumps(log).encode())
    for name in sorted(tensors):
        h.update(name.encode())
        h.update(tensors[name].contiguous().numpy().tobytes())
    for f in [*sorted((Path(run_dir)/'assignments').iterdir()), Path(run_dir)/'clusters.csv']:
        h.update(f.name.encode())
        h.update(f.read_bytes())
    return h.hexdigest()

def child(config): # a process that runs it; forked, since importing PyTorch takes longer than the run
    pid = os.fork()
    if pid: return pid
    status = 1
    try: torch.set_num_threads(1); fit(config, echo=None); status = 0
    finally: os._exit(status)

def finish(config):
    status = os.waitpid(child(config), 0)[1]
    assert status == 0, f'a run that was continued ended with status {status}'

def writing(run_dir): # is a checkpoint half there?
    names = [p.name for p in (run_dir/'checkpoint').glob('[0-9]*')] if (run_dir/'checkpoint').exists() else []
    whole = {n[:13] for n in names if n.endswith('.json')}
    return any(n.endswith('.tmp') or n[:13] not in whole for n in names)

def kill(config, after, in_write): # → was a checkpoint being written?
    start, pid, where = time.time(), child(config), Path(config.run_dir)
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.time() - start > after and (not in_write or writing(where)):
            os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
            return writing(where)
    return False                                                   # it was through before its time came

def survive(kills, seed=0, say=print):
    ("Number of kills, of those in the middle of a write, "
     "and of runs that ended in the bits of the undisturbed one.")
    top, draw = Path(tempfile.mkdtemp()), random.Random(seed)
    try:
        start = time.time()
        finish(replace(SMALL, run_dir=str(top/'whole')))
        seconds, expected = time.time() - start, sha256(top/'whole')
        say(f"undisturbed: {seconds:.1f} s, {expected[:16]}")
        in_write = same = 0
        for i in range(kills):
            config = replace(SMALL, run_dir=str(top/str(i)))
            in_write += (hit := kill(config, draw.uniform(0, .9*seconds), i % 2))
            finish(config)
            found = sha256(config.run_dir)
            same += found == expected
            say(f"kill {i+1}/{kills}{' in a write' if hit else ''}: "
                f"{found[:16]} {'the same' if found == expected else 'DIFFERENT'}")
            shutil.rmtree(config.run_dir)
        return kills, in_write, same
    finally: shutil.rmtree(top)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--kills', type=int, default=50)
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    kills, in_write, same = survive(args.kills, args.seed)
    print(f"{same} of {kills} runs ended in the same bits; "
          f"{in_write} were killed while a checkpoint was being written")
    sys.exit(same != kills)
