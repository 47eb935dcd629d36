"""Peak memory of whole processes against the number of images: `python tests/memory.py`.

Each N is a process of its own: one epoch of a small network on N made images of 16 × 16 pixels that lie in a memory-mapped file. The slope is held against 4 bytes × d, what the points of k-means take,
and 2 bytes × D, what the features would take in half precision (4 × D in single)."""
import argparse, json, os, resource, subprocess, sys, tempfile
from pathlib import Path

def one(n, folder): # peak resident bytes of this process, of which the mapped file; D and d
    import torch
    from deepcluster_nb.data import PackedImages
    from deepcluster_nb.training import Config, fit
    torch.set_num_threads(2)
    images = PackedImages.load(folder/f'{n}.safetensors')
    status = lambda key: int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1]) * 1024
    start = status('VmHWM')
    run = fit(Config(size=32, k=50, pca=256, epochs=1, passes=1, batch_size=512, run_dir=str(folder/f'run{n}'), precision='auto'), images, echo=None)
    return dict(n=n, start=start, peak=status('VmHWM'), file=n * 16 * 16, features=run.net.dim, points=256)

def make(n, folder):
    import torch
    from deepcluster_nb.data import PackedImages, generator
    PackedImages(torch.randint(256, (n, 1, 16, 16), dtype=torch.uint8, generator=generator(0, 'memory')), labels=torch.arange(n) % 10, classes=list('0123456789')).save(folder/f'{n}.safetensors')

def main(sizes, say=print):
    with tempfile.TemporaryDirectory() as tmp:
        rows = []
        for n in sizes:
            for what in ('make', 'one'):
                out = subprocess.run([sys.executable, __file__, what, str(n), tmp], check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(out))
            say(f"N = {n:,}: peak {rows[-1]['peak']/2**20:,.0f} MiB, at the start of fit {rows[-1]['start']/2**20:,.0f} MiB", flush=True)
    a, b = rows[0], rows[-1]
    slope = (b['peak'] - a['peak']) / (b['n'] - a['n'])
    say(f"slope: {slope:,.0f} bytes an image. Points of k-means {4*a['points']:,}, the mapped image {a['file']//a['n']:,}, features in half precision {2*a['features']:,}, in single {4*a['features']:,}")
    return slope, rows

if __name__ == '__main__':
    if len(sys.argv) == 4: print(json.dumps(one(int(sys.argv[2]), Path(sys.argv[3]))) if sys.argv[1] == 'one' else make(int(sys.argv[2]), Path(sys.argv[3])))
    else:
        p = argparse.ArgumentParser(description=__doc__); p.add_argument('sizes', type=int, nargs='*', default=[10_000, 50_000, 200_000])
        main(p.parse_args().sizes)
