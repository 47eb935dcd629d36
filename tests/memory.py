"""Peak memory of whole processes against the number of images: `python tests/memory.py`.

Each N is a process of its own: one epoch of a small network on N made images of 16 × 16 pixels that lie \
in a memory-mapped file. The slope is held against 4 bytes × d, what the points of k-means take,
and 2 bytes × D, what the features would take in half precision (4 × D in single)."""
import argparse, json, subprocess, sys, tempfile
from dataclasses import replace
from pathlib import Path

def one(n, folder): # resident bytes before, and the peaks of the two phases
    import torch
    from deepcluster_nb import fit as whole
    from deepcluster_nb.fast.images import PackedImages
    torch.set_num_threads(2)
    images = PackedImages.load(folder/f'{n}.safetensors')
    status = lambda key: (
        int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1]) * 1024)
    start, parts, peaks = status('VmRSS'), whole.PARTS['fast'], []
    def note(): # the peak since the last note
        peaks.append(status('VmHWM')); Path('/proc/self/clear_refs').write_text('5')
    def watched(*args, **kwargs):
        note(); res = parts.cluster(*args, **kwargs); note()
        return res
    whole.PARTS['fast'] = replace(parts, cluster=watched)
    run = whole.fit(whole.Config(size=32, k=50, pca=256, epochs=1, passes=1, batch_size=64,
                                       run_dir=str(folder/f'run{n}')),
                       images, echo=None)
    return dict(n=n, start=start, clustering=max(peaks[1], peaks[3]), training=peaks[2], file=n * 16 * 16,
                features=run.net.dim, points=256)

def make(n, folder):
    import torch
    from deepcluster_nb.fast.images import PackedImages
    from deepcluster_nb.data import generator
    PackedImages(torch.randint(256, (n, 1, 16, 16), dtype=torch.uint8, generator=generator(0, 'memory')),
                 labels=torch.arange(n) % 10, classes=list('0123456789')).save(folder/f'{n}.safetensors')

def main(sizes, say=print):
    with tempfile.TemporaryDirectory() as tmp:
        rows = []
        for n in sizes:
            for what in ('make', 'one'):
                out = subprocess.run([sys.executable, __file__, what, str(n), tmp], check=True,
                                     capture_output=True, text=True).stdout
            rows.append(json.loads(out))
            say(f"N = {n:,}: " + ', '.join(f"{name} {rows[-1][name]/2**20:,.0f} MiB"
                                           for name in ('start', 'clustering', 'training')),
                flush=True)
    a, b = rows[0], rows[-1]
    slope = {phase: (b[phase] - a[phase]) / (b['n'] - a['n'])
             for phase in ('start', 'clustering', 'training')}
    for phase, value in slope.items(): say(f"{phase}: {value:,.0f} bytes an image")
    say(f"points of k-means {4*a['points']:,}, the mapped image {a['file']//a['n']:,}, "
        f"features in half precision {2*a['features']:,}, in single {4*a['features']:,}")
    # the points, and as much again for the mapped image, labels, paths and what a phase leaves behind
    most = 2*4*a['points']
    if max(slope.values()) > most:
        sys.exit(f"memory: expected at most {most:,} bytes an image, "
                 f"got {', '.join(f'{name} {value:,.0f}' for name, value in slope.items())}")

if __name__ == '__main__':
    if sys.argv[1:2] in (['make'], ['one']):
        print(json.dumps(one(int(sys.argv[2]), Path(sys.argv[3]))) if sys.argv[1] == 'one' else
              make(int(sys.argv[2]), Path(sys.argv[3])))
    else:
        p = argparse.ArgumentParser(description=__doc__)
        p.add_argument('sizes', type=int, nargs='*', default=[10_000, 50_000, 200_000])
        main(p.parse_args().sizes)
