"""Packed sets of any number and size with known structure, for measurements of speed and of clusterings.

    python data_scripts/make_synthetic.py packed/train.safetensors -n 100000 --size 224 --classes 100

A class is an orientation and a frequency of a grating. Place, contrast, brightness and noise are drawn \
for each image, from (seed, number of the image) alone:
image i is the same in a set of any length. The classes are taken in turn. With --center the central \
crops stand beside, as pack_images.py leaves them:

    python data_scripts/make_synthetic.py packed/train.safetensors -n 50000 --size 375 500 --ragged \\
        --center 224
"""
import argparse, json, math, os, sys, zlib
from contextlib import contextmanager
from functools import partial
from multiprocessing import Pool
from pathlib import Path
import numpy as np

def grating(label:int, classes:int)->tuple: # (cycles across the image, orientation in radians)
    "Orientations fill half a turn, evenly; four frequencies, each 1.6 times the last."
    turns = -(-classes // 4)
    return 6 * 1.6**(label % 4), math.pi * (label // 4) / turns

def synthetic(i:int, seed:int, size:tuple, classes:int, ragged=False, rgb=False
             )->np.ndarray: # (C, H, W) uint8
    "Image i: its class's grating, with a random phase, contrast and noise (and color)."
    g = np.random.Generator(np.random.Philox(key=[seed, i]))
    h, w = (int(s * g.uniform(.5, 1) + .5) if ragged else s for s in size)
    cycles, turn = grating(i % classes, classes)
    k = 2*math.pi * cycles / max(size)                            # radians a pixel: the same whatever the cut
    x = np.float32(k * math.cos(turn)) * np.arange(w, dtype=np.float32) + np.float32(g.uniform(0, 2*math.pi))
    y = np.float32(k * math.sin(turn)) * np.arange(h, dtype=np.float32)
    # sin(x + y), without a sine for every pixel
    wave = np.multiply.outer(np.cos(y), np.sin(x)) + np.multiply.outer(np.sin(y), np.cos(x))
    wave *= np.float32(g.uniform(20, 60))
    noise = g.integers(0, 64, (2, h, w), dtype=np.uint8)     # two dice: a triangle of standard deviation 26
    wave += noise[0]; wave += noise[1]
    wave += np.float32(g.uniform(60, 69))                    # 60 + 126 + 60 and 60 - 60: always within a byte
    grey = wave.astype(np.uint8)
    if not rgb: return grey[None]
    tint = g.uniform(.4, 1, 3).astype(np.float32)            # color tells nothing of the class
    return (grey[None] * tint[:, None, None]).astype(np.uint8)

def with_center(i:int, center:int, **how)->list: # of (C, H, W) uint8
    "Image i, and its central crop where one is wanted."
    im = synthetic(i, **how)
    if not center: return [im]
    from deepcluster_nb.fast.packing import central
    return [im, central(list(im.astype(np.float32)), center)]

@contextmanager
def in_order(f, n:int, workers:int): # → iterator of f(0), f(1), …
    "Call f in processes, or here where one is enough."
    if workers < 2: yield map(f, range(n)); return
    with Pool(workers) as pool: yield pool.imap(f, range(n), chunksize=16)

def make(out, n:int, size, classes:int, seed:int=0, ragged=False, rgb=False, show=False, center:int=0,
         workers:int=1):
    "Stream n images into a packed file; a few images are in memory at a time."
    from tqdm import tqdm
    from deepcluster_nb.fast.images import center_path
    from deepcluster_nb.fast.packing import PackedWriter, check_space
    from deepcluster_nb.runs import amount
    size = tuple(size) if len(size) == 2 else (size[0],)*2
    for name,v,low in (('n', n, 1), ('size', min(size), 8), ('classes', classes, 1)):
        if v < low: raise ValueError(f"{name}: expected at least {low}, got {v}")
    if not 0 <= seed < 2**63: raise ValueError(f"seed: expected 0 to 2**63 - 1, got {seed}")
    out = Path(out)
    if out.exists(): raise ValueError(f"out: {str(out)!r} exists; remove it or choose another name")
    if not out.parent.is_dir(): raise FileNotFoundError(f"out: no folder {str(out.parent)!r}")
    pixels = size[0]*size[1] * (.5625 if ragged else 1) + center**2
    space = check_space(out, n * ((3 if rgb else 1) * pixels + 48))
    if show: print(f"{n:,} images, {space}", flush=True)
    meta = dict(classes=json.dumps([f'class {c}' for c in range(classes)]),
                synthetic=json.dumps(dict(seed=seed, size=size, classes=classes, ragged=ragged, rgb=rgb)))
    writers = [PackedWriter(out, meta | (dict(packing=json.dumps(dict(center=center))) if center else {}))]
    if center: writers.append(PackedWriter(center_path(out, center), meta))
    one = partial(with_center, center=center, seed=seed, size=size, classes=classes, ragged=ragged, rgb=rgb)
    try:
        with in_order(one, n, workers) as images:
            for some in tqdm(images, total=n, unit=' images', disable=not show,
                             mininterval=.5 if sys.stderr.isatty() else 30):
                for w, im in zip(writers, some): w.add(np.ascontiguousarray(im), [im.shape], [zlib.crc32(im)])
        for w in writers: w.finish(np.arange(n) % classes)
        for w in reversed(writers): w.rename()
    except BaseException:
        for w in writers: w.file.close(); w.part.unlink(missing_ok=True)
        raise
    if show: print(f"{out}: {n:,} images, {amount(os.path.getsize(out))}")

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', help="the file to make")
    p.add_argument('-n', type=int, required=True, help="images")
    p.add_argument('--size', type=int, nargs='+', default=[224], metavar='PX',
                   help="height and width, or one number for both (default 224)")
    p.add_argument('--ragged', action='store_true',
                   help="sides between half of that and all of it, drawn for each image")
    p.add_argument('--classes', type=int, default=100, metavar='C',
                   help="gratings to tell apart (default 100)")
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--rgb', action='store_true', help="three channels, in a random tint")
    p.add_argument('--center', type=int, default=0, metavar='PX',
                   help="the central crops of this size too, in a file of their own")
    p.add_argument('--workers', type=int, default=1, help="processes that draw (default 1)")
    a = p.parse_args()
    if len(a.size) > 2: p.error("--size: expected one number or two")
    make(a.out, a.n, a.size, a.classes, a.seed, a.ragged, a.rgb, True, a.center, a.workers)

if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')
    try: main()
    except (ValueError, OSError) as e: sys.exit(f"make_synthetic: {e}")
    except KeyboardInterrupt: sys.exit(130)
