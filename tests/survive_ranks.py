"""Kill one of two ranks at random moments and see that the run ends in the same bits: \
`python tests/survive_ranks.py --kills 20`.

Every run saves after each step. One rank, by turns, gets SIGKILL; the other one must end by itself, and the
same call, with two ranks again, must end in the bits of the undisturbed run."""
import argparse, os, random, shutil, sys, tempfile, time
from dataclasses import replace
from pathlib import Path

HERE = str(Path(__file__).parent)                          # where the processes find rank_tasks
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, (HERE, os.environ.get('PYTHONPATH'))))
import rank_tasks as tasks
from survive import sha256
from deepcluster_nb.fast.distributed import in_ranks

def survive(kills, seed=0, say=print):
    "Kills that met a running rank, runs that ended in the same bits, and seconds to an end at most."
    top, draw = Path(tempfile.mkdtemp()), random.Random(seed)
    try:
        in_ranks(2, tasks.run, tasks.SMALL)                                  # starts the server of processes
        seconds = max(in_ranks(2, tasks.timed, replace(tasks.SMALL, run_dir=str(top/'whole'))))
        expected, met, same, longest = sha256(top/'whole'), 0, 0, 0.
        say(f"undisturbed: {seconds:.1f} s, {expected[:16]}", flush=True)
        for i in range(kills):
            config, said = replace(tasks.SMALL, run_dir=str(top/f'{i}'/'run')), ''
            (top/f'{i}').mkdir()
            try: in_ranks(2, tasks.killed, config, i % 2, draw.uniform(0, .9*seconds))
            except RuntimeError as e: said = str(e)
            if hit := f'rank {i % 2}: it ended with status -9' in said:
                took = time.time() - float((top/f'{i}'/'when').read_text())
                met, longest = met + 1, max(longest, took)
                assert f'rank {1 - i % 2}: Lost: rank {i % 2}: it is gone' in said, said
            in_ranks(2, tasks.run, config)
            same += (found := sha256(config.run_dir)) == expected
            how = f'all ended in {took:.1f} s' if hit else 'which had ended'
            say(f"kill {i+1}/{kills} of rank {i % 2}, {how}: "
                f"{found[:16]} {'the same' if found == expected else 'DIFFERENT'}", flush=True)
            shutil.rmtree(top/f'{i}')
        return met, same, longest
    finally: shutil.rmtree(top)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--kills', type=int, default=20)
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    met, same, longest = survive(args.kills, args.seed)
    print(f"{same} of {args.kills} runs ended in the same bits; {met} kills met a running rank, "
          f"and the other had ended after {longest:.1f} s at most")
    sys.exit(same != args.kills)
