"""Everything that only a GPU can decide, most important first, within ten minutes and without a network:

    python tests/gpu.py --out runs/gpu            (or make gpu)

The tests marked cuda; a training step and an extraction's batch, launched kernel by kernel and recorded:
milliseconds, launches and the share of time in which the device works; probes; then the experiments epoch,
speed and train. Each part is guarded and timed; what is left when time is up is named. Results go into
gpu.json and gpu.txt."""
import argparse, json, subprocess, sys, time, traceback
from pathlib import Path
import torch

ROOT = Path(__file__).resolve().parent.parent

def covered(spans): # microseconds that at least one of the (start, end) covers
    total, end = 0., float('-inf')
    for a,b in sorted(spans):
        total += max(0., b - max(a, end))
        end = max(end, b)
    return total

def profiled(work, steps): # of which work does so many
    "Milliseconds and launches a step, and the share of time in which the device works, of a second call."
    from torch.profiler import ProfilerActivity, profile
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    took = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
        work()
        torch.cuda.synchronize()
    events = p.events()
    launches = sum(e.name in ('cudaLaunchKernel', 'cudaLaunchKernelExC', 'cuLaunchKernel', 'cuLaunchKernelEx',
                              'cudaGraphLaunch', 'cudaMemcpyAsync', 'cudaMemsetAsync') for e in events)
    spans = [(e.time_range.start, e.time_range.end) for e in events
             if e.device_type == torch.autograd.DeviceType.CUDA
             and not getattr(e, 'is_user_annotation', False)]          # those only have a name
    return dict(ms=round(1e3*took/steps, 3), launches=round(launches/steps, 1),
                device_ms=round(covered(spans)/1e3/steps, 3), busy=round(covered(spans)/1e6/took, 3))

def images_like(long_side, n): # made: grey and ragged like ImageNet's, or 32 × 32 in color like CIFAR's
    from deepcluster_nb.fast.images import PackedImages
    g = torch.Generator().manual_seed(0)
    if not long_side:
        return PackedImages(torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=g))
    short = torch.randint(long_side//2, long_side*17//20, (n,), generator=g).tolist()
    shapes = torch.tensor([(1, s, long_side) if i % 2 else (1, long_side, s) for i,s in enumerate(short)])
    total = int(shapes.prod(1).sum())
    return PackedImages(torch.randint(256, (total,), dtype=torch.uint8, generator=g), shapes)

STEPS = {'cifar10': dict(arch='alexnet_small', size=64, k=256, batch_size=128, dropout=0., min_scale=.2),
         'AlexNet, 224 px': dict(arch='alexnet', size=224, k=10_000, batch_size=256, dropout=.5,
                                 min_scale=.08)}

def step(name, steps=60, **more): # of one of STEPS
    from deepcluster_nb.fast import graph
    from deepcluster_nb.fast.feeding import resident
    from deepcluster_nb.fit import Config, network, optimizers, resolve
    c = resolve(Config(dataset='digits', device='cuda', **STEPS[name], **more))
    images = resident(images_like(500 if c.size > 200 else 0, 3000), 'cuda')
    net, idx = network(c), torch.arange(steps*c.batch_size) % len(images)
    opts, assign = optimizers(net, c), torch.arange(len(images)) % c.k
    return profiled(lambda: graph.train_epoch(net, images, idx, assign, opts, c, 0), steps)

def extraction(name, on, batches=60): # of 512 images; nothing is kept
    from deepcluster_nb.fast.features import feature_batches
    from deepcluster_nb.fast.feeding import resident
    from deepcluster_nb.fast.graph import prepared_on
    from deepcluster_nb.fit import Config, network, resolve
    c = resolve(Config(dataset='digits', device='cuda', **STEPS[name]))
    images = resident(images_like(500 if c.size > 200 else 0, 3000), 'cuda')
    net, many = network(c), images.subset(torch.arange(batches*512) % len(images))
    how = c.size, 512, 'cuda', c.precision
    def work():
        for _ in feature_batches(net, many, *how, prepare=prepared_on('cuda', on)): pass
    return profiled(work, batches)

def cifar_probes(): # one network's five, and neighbors, on made images: seconds
    from deepcluster_nb.fit import Config, network, resolve
    from deepcluster_nb.probes import evaluate
    c = resolve(Config(dataset='digits', device='cuda', **STEPS['cifar10']))
    train, test = images_like(0, 50_000), images_like(0, 10_000)
    for im in (train, test): im.labels = torch.arange(len(im)) % 10
    net, took = network(c), []
    for _ in range(2):
        start = time.perf_counter()
        evaluate(net, train, test, c.size, 'cuda', c.precision)
        took.append(round(time.perf_counter() - start, 2))
    return dict(first=took[0], then=took[1])

def command(*args, limit): # seconds; output's last lines
    try:
        done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, text=True, timeout=limit,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as e:
        text = e.stdout or ''                                   # bytes, in spite of text
        text = text if isinstance(text, str) else text.decode(errors='replace')
        raise RuntimeError(f'stopped after {limit:.0f} s\n{text[-3000:]}') from None
    if done.returncode: raise RuntimeError(done.stdout[-3000:])
    return done.stdout.strip().splitlines()[-12:]

def run(name, preset, out, limit, *more):
    code = "from deepcluster_nb.experiments import main; import sys; sys.exit(main(sys.argv[1:]))"
    return command('-c', code, 'run', name, '--preset', preset, '--out', out/name, *more, limit=limit)

def step_alone(name, limit, **more): # in a process of its own: what cuDNN has tried out, it keeps
    code = ("import sys; sys.path.insert(0, 'tests'); import gpu; "
            "print(gpu.step(sys.argv[1], **eval(sys.argv[2])))")
    return command('-c', code, name, repr(more), limit=limit)[-1]

def parts(out): # name → (seconds that it may take, what does it)
    # only files with such tests: the others may import what a bare machine lacks
    tests = [p for p in sorted((ROOT/'tests').glob('test_*.py')) if 'mark.cuda' in p.read_text('utf-8')]
    found = {'tests': (270, lambda s: command('-m', 'pytest', '-v', '-m', 'cuda', '-p', 'no:cacheprovider',
                                              *tests, limit=s))}
    kinds = {'launched': dict(graph=False), 'recorded': {}, 'recorded, compiled': dict(compile=True)}
    for name in STEPS:
        for how,more in kinds.items():
            found[f'step, {name}, {how}'] = 60, lambda s, name=name, more=more: step(name, **more)
        for on in (False, True):
            found[f"extraction, {name}, {'recorded' if on else 'launched'}"] = \
                30, lambda s, name=name, on=on: extraction(name, on)
    tried = dict(benchmark=True), dict(benchmark=True, compile=True)
    for name in STEPS:
        for more in tried:
            found[f"step, {name}, recorded, {' and '.join(more)}"] = \
                80, lambda s, name=name, more=more: step_alone(name, s, **more)
    options = [x for n in tried[1] for x in ('-p', f'{n}=True')]
    return found | {
        'epoch': (150, lambda s: run('epoch', 'epoch_gpu', out, s)),
        'epoch, benchmark and compile': (150, lambda s: run('epoch', 'epoch_gpu', out/'tried', s, *options)),
        'probes, cifar10': (60, lambda s: cifar_probes()),
        'train, cifar10': (150, lambda s: run('train', 'cifar10', out, s, '-p', 'epochs=10')),
        # the plain recipe takes minutes at full size; needs faiss
        'speed': (120, lambda s: run('speed', 'gpu', out, s, *(
            x for p in ('sizes=[64]', 'n_images=1024', 'epoch_images=4096', 'n_points=50000', 'ks=[1000]',
                        'rounds=1', 'compile=False') for x in ('-p', p))))}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, default=Path('runs/gpu'))
    p.add_argument('--seconds', type=float, default=570)
    p.add_argument('--only', default='', help='parts whose names begin so')
    args = p.parse_args()
    if not torch.cuda.is_available(): sys.exit('no CUDA device here: nothing to measure')
    out, begun = args.out.resolve(), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    found = dict(card=torch.cuda.get_device_name(), torch=torch.__version__, cuda=torch.version.cuda,
                 parts={})
    def say(line):
        print(line, flush=True)
        with open(out/'gpu.txt', 'a', encoding='utf-8') as f: f.write(line + '\n')
    say(f"{found['card']}, torch {found['torch']}, CUDA {found['cuda']}")
    for name,(limit,do) in parts(out).items():
        left = args.seconds - (time.perf_counter() - begun)
        if not name.startswith(args.only): continue
        if left < 20: say(f'-- {name}: no time left'); continue
        start = time.perf_counter()
        try: r = dict(result=do(min(limit, left)))
        except Exception as e: r = dict(error=''.join(traceback.format_exception_only(e))[-3000:])
        found['parts'][name] = dict(r, seconds=round(time.perf_counter() - start, 1))
        shown = r.get('result', r.get('error'))
        lines = '\n'.join(shown) if isinstance(shown, list) else str(shown)
        say(f"-- {name}, {found['parts'][name]['seconds']} s\n{lines}")
        (out/'gpu.json').write_text(json.dumps(found, indent=1))
        torch.cuda.empty_cache()

if __name__ == '__main__': main()
