"""Are the stored outputs those of today's code? Runs notebooks in a copy of the repository and \
compares: `python tests/outputs.py` for all, or name some. The nightly workflow does this.

A hash of each notebook's code beside its outputs would be cheaper, but it can lie: outputs change with \
the modules that a chapter imports, and a hash is as easily renewed without running anything."""
import argparse, base64, io, json, os, re, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NUMBER = re.compile(r'(?<![\w.])[-+−]?\d[\d,_]*(?:\.\d*)?(?:e[-+]?\d+)?|(?<![\w.])[-+−]?\.\d+(?:e[-+]?\d+)?')
# what such a cell shows depends on the machine: only its form is compared
TIMED = re.compile(r'perf_counter|time\.time|\btimeit\b|seconds|estimate|duration')

# Here the numbers are the machine's, or follow from training, which takes another course with other
# threads or another processor: only what kinds of outputs a cell has is compared.
MEASURED = ['index.ipynb', '07_training.ipynb', '08_switches.ipynb', '09_probes.ipynb', '10_pictures.ipynb',
            '11_voc.ipynb', '15_experiments.ipynb', '18_fit.ipynb', 'fast/19_images.ipynb',
            'fast/20_feeding.ipynb', 'fast/21_crops.ipynb', 'fast/22_features.ipynb', 'fast/23_kmeans.ipynb',
            'fast/24_small_maps.ipynb', 'fast/25_training.ipynb', 'fast/27_graph.ipynb', '29_estimate.ipynb',
            'experiments/']

def outputs_of(cell): # kind → contents: streams joined, the richest form of the rest in order
    text = ''.join(''.join(o['text']) for o in cell['outputs'] if o['output_type'] == 'stream')
    rich = [next((k, ''.join(o['data'][k]))
                 for k in ('image/png', 'image/svg+xml', 'text/html', 'text/markdown', 'text/plain',
                           *o['data']) if k in o['data']) for o in cell['outputs'] if o.get('data')]
    errors = [('error', o['ename']) for o in cell['outputs'] if o['output_type'] == 'error']
    return ([('stream', text)] if text else []) + rich + errors

def number(text): return float(re.sub('[,_]', '', text).replace('−', '-'))
def close(a, b): # other processors round and draw a little differently
    return abs(a - b) <= .1 * max(abs(a), abs(b)) + 1e-3

def same_text(a, b, timed):
    a, b = (re.sub(r'\s+', ' ', t).strip() for t in (a, b))
    if NUMBER.sub('#', a) != NUMBER.sub('#', b): return False
    return timed or all(close(number(x), number(y)) for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)))

def same_picture(a, b, timed):
    "At 32 × 32 grey pixels: what is drawn, not how its letters are."
    from PIL import Image, ImageChops, ImageStat
    a, b = (Image.open(io.BytesIO(base64.b64decode(p))).convert('RGBA') for p in (a, b))
    if any(abs(x - y) > .1 * max(x, y) for x, y in zip(a.size, b.size)): return False
    small = [Image.alpha_composite(Image.new('RGBA', i.size, 'white'), i).convert('L')
             .resize((32, 32), Image.Resampling.BOX) for i in (a, b)]
    return timed or ImageStat.Stat(ImageChops.difference(*small)).mean[0] < 8

def differences(stored, fresh, kinds_only=False):
    "One line for each code cell (by place) whose fresh outputs are not those stored."
    code = [[c for c in cells if c['cell_type'] == 'code'] for cells in (stored, fresh)]
    found = ([f'{len(code[0])} code cells are stored and {len(code[1])} were run']
             if len(code[0]) != len(code[1]) else [])
    for s, f in zip(*code):
        was, is_, timed = outputs_of(s), outputs_of(f), bool(TIMED.search(''.join(s['source'])))
        if [k for k,_ in was] != [k for k,_ in is_]:
            found.append(f"{s['id']}: shows {[k for k,_ in is_]}, stored are {[k for k,_ in was]}")
        elif not kinds_only:
            for (kind, a), (_, b) in zip(was, is_):
                same = same_picture if kind == 'image/png' else same_text
                if kind != 'image/svg+xml' and not same(a, b, timed):
                    found.append(f"{s['id']}: other {kind}"
                                 + ('' if kind == 'image/png' else f': {a[:200]!r}, now {b[:200]!r}'))
    return found

def run(path, copy):
    "The cells of a notebook of the copy, freshly run and cleaned like the stored ones."
    from nbdev.clean import clean_nb
    out = copy/'fresh.ipynb'
    # stored outputs need no data set
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(copy)); env.pop('DEEPCLUSTER_DATA', None)
    command = [sys.executable, '-m', 'nbconvert', '--to', 'notebook',
               '--execute', '--allow-errors', '--output', str(out), path.name]
    done = subprocess.run(command, cwd=path.parent, env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(f'{path.name} could not be run:\n{done.stderr[-3000:]}')
    nb = json.loads(out.read_text())
    clean_nb(nb)
    return nb['cells']

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('notebooks', nargs='*', help='paths; all of nbs and its folders if there are none')
    names = parser.parse_args(argv).notebooks
    paths = ([Path(n).resolve().relative_to(ROOT) for n in names]
             or sorted(p.relative_to(ROOT) for p in (ROOT/'nbs').rglob('*.ipynb')
                       if '.ipynb_checkpoints' not in p.parts))
    stale = 0
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/'copy'
        shutil.copytree(ROOT, copy, symlinks=True,
                        ignore=shutil.ignore_patterns('.venv', '.git', 'runs', 'data', '_proc', '_docs',
                                                      '*.egg-info'))
        for p in paths:
            stored = json.loads((ROOT/p).read_text())['cells']
            if not any(c.get('outputs') for c in stored):
                print(f'{p}: keeps no outputs', flush=True)
                continue
            found = differences(stored, run(copy/p, copy),
                                any(str(p).startswith(f'nbs/{m}') for m in MEASURED))
            stale += bool(found)
            print(f'{p}: ' + ('as stored' if not found else 'stale\n  ' + '\n  '.join(found)), flush=True)
    if stale:
        sys.exit(f'{stale} of {len(paths)} notebooks show other outputs than those stored: '
                 'run them anew (jupyter nbconvert --execute --inplace, then nbdev_clean)')

if __name__ == '__main__': main()
