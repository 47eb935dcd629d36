"""What waiting threads cost: training steps a second, alone and beside a process that only counts,
for several values of GOMP_SPINCOUNT in turn.
`python tests/waiting.py [ROUNDS]`; a round takes two minutes on two cores."""
import os, subprocess, sys, time

VALUES = None, 100_000, 10_000, 1_000

def steps_a_second(seconds=6., batch_size=64):
    import torch
    from deepcluster_nb.fast.images import PackedImages
    from deepcluster_nb.fast.training import train_epoch
    from deepcluster_nb.fit import Config, network, optimizers, resolve
    g = torch.Generator().manual_seed(0)
    images = PackedImages(torch.randint(0, 256, (1024, 3, 32, 32), generator=g).byte())
    assign, idx = (torch.randint(0, n, (m,), generator=g) for n,m in ((50, 1024), (1024, 8*batch_size)))
    config = resolve(Config(k=50, passes=1, batch_size=batch_size, device='cpu'))
    net = network(config)
    opts, done = optimizers(net, config), 0
    def go(): train_epoch(net, images, idx, assign, opts, config, 0)
    go()
    start = time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        go()
        done += 8
    return done / took

def measured(spins): # in a process of its own, for OpenMP reads it once
    env = {k: v for k,v in os.environ.items() if k not in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')}
    if spins is not None: env['GOMP_SPINCOUNT'] = str(spins)
    out = subprocess.run([sys.executable, __file__, 'step'], env=env, capture_output=True, text=True,
                         check=True)
    return float(out.stdout)

def main(rounds):
    for i in range(rounds):
        for spins in VALUES:
            quiet = measured(spins)
            counting = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
            try: busy = measured(spins)
            finally: counting.kill(); counting.wait()
            print(f"round {i + 1}, {spins or 'as it is'}: {quiet:.1f} steps/s, busy {busy:.1f}", flush=True)

if __name__ == '__main__':
    if sys.argv[1:] == ['step']: print(steps_a_second())
    else: main(int(sys.argv[1]) if sys.argv[1:] else 2)
