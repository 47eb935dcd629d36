"""Two machines in one, ranks in two network namespaces with a virtual cable: `python tests/two_nodes.py`.

The run of two nodes must end in the bits of two ranks on one machine. Then one node is killed, the other, and
at last the cable is cut, each time in the middle of a run: the ranks that are left must end by themselves
within a minute, and the same command, on both nodes again, in the same bits. A launcher that can't reach the
first node waits on, for as long as TCP does; it is killed. Needs Linux, root and the command ip."""
import argparse, os, shutil, signal, subprocess, sys, tempfile, time
from contextlib import suppress
from pathlib import Path
from survive import sha256

NODES = {'dc-a': '10.77.0.1', 'dc-b': '10.77.0.2'}             # name of a namespace → its address
RUN = ['run', 'train', *(x for p in ('dataset=digits', 'n_images=400', 'n_test=100', 'k=10', 'pca=16',
                                     'epochs=6', 'passes=1', 'batch_size=32', 'checkpoint_minutes=0',
                                     'threads=1', 'device=cpu') for x in ('-p', p))]

def ip(*words, node=None):
    subprocess.run(['ip', *(('-n', node) if node else ()), *words], check=True)

def connect(): # two namespaces and a cable between them
    a, b = NODES
    for node in NODES: ip('netns', 'add', node)
    ip('link', 'add', 'cable', 'netns', a, 'type', 'veth', 'peer', 'name', 'cable', 'netns', b)
    for node,address in NODES.items():
        ip('addr', 'add', f'{address}/24', 'dev', 'cable', node=node)
        for device in ('lo', 'cable'): ip('link', 'set', device, 'up', node=node)

def disconnect():
    for node in NODES: subprocess.run(['ip', 'netns', 'del', node], stderr=subprocess.DEVNULL)

def processes(node): # pid → command line
    pids = subprocess.run(['ip', 'netns', 'pids', node], capture_output=True, text=True).stdout.split()
    found = {}
    for pid in pids:
        with suppress(OSError): found[int(pid)] = Path(f'/proc/{pid}/cmdline').read_text()
    return found

def kill(node): # all of its processes, at once
    while pids := processes(node):
        for pid in pids:
            with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        time.sleep(.1)

def start(node, out): # its torchrun
    address, master = NODES[node], next(iter(NODES.values()))
    return subprocess.Popen(
        ['ip', 'netns', 'exec', node, sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2',
         '--nproc-per-node', '1', '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'{master}:29500',
         # the addresses are not the host name's, so neither would think that the store is its own
         '--rdzv-conf', f'is_host={int(address == master)}', '--local-addr', address,
         '-m', 'deepcluster_nb', *RUN, '--out', str(out)],
        env=os.environ | dict(GLOO_SOCKET_IFNAME='cable', OMP_NUM_THREADS='1'),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

def ranks_on(node): # whether there are any
    return any('python' in c and 'torch.distributed.run' not in c for c in processes(node).values())

def said_by(nodes, within): # what each launcher said; one that waits on is killed
    said = []
    for node,p in zip(NODES, nodes):
        try: said.append(p.communicate(timeout=within)[1])
        except subprocess.TimeoutExpired:
            kill(node)
            said.append(p.communicate()[1] + f'{node}: its launcher waited on and was killed\n')
    return said

def without_ranks(within): # seconds until no rank was left
    begun = time.time()
    while any(map(ranks_on, NODES)) and time.time() - begun < within: time.sleep(.1)
    return time.time() - begun

def both(out): return [start(node, out) for node in NODES]

def wait_for_epoch(folder, epoch, nodes, within=120.):
    end = time.time() + within
    while not list(folder.glob(f'checkpoint/{epoch:05d}-*.json')):
        if time.time() > end or any(p.poll() is not None for p in nodes):
            raise SystemExit(f'the run did not come to epoch {epoch}:\n' + ''.join(said_by(nodes, 1.)))
        time.sleep(.05)

def main():
    top = Path(tempfile.mkdtemp())
    try:
        connect()
        one = subprocess.run([sys.executable, '-m', 'deepcluster_nb', *RUN, '--out', str(top/'one'),
                              '--nproc', '2'], env=os.environ | dict(OMP_NUM_THREADS='1'),
                             capture_output=True, text=True)
        if one.returncode: raise SystemExit(one.stderr)
        expected, good = sha256(top/'one'), True
        print(f'two ranks on one machine: {expected[:16]}', flush=True)
        for what in ('undisturbed', 'the second node killed', 'the first node killed', 'the cable cut'):
            out = top/what.replace(' ', '_')
            nodes = both(out)
            if what != 'undisturbed':
                wait_for_epoch(out, 2, nodes)
                if what == 'the cable cut': ip('link', 'set', 'cable', 'down', node='dc-b')
                else: kill(list(NODES)['second' in what])
                seconds = without_ranks(60.)
                said = said_by(nodes, 10.)
                good &= seconds < 60
                ip('link', 'set', 'cable', 'up', node='dc-b')
                print(f"{what}: no rank was left after {seconds:.1f} s", flush=True)
                for l in ''.join(said).splitlines():
                    if l.startswith(('deepcluster-nb: ', 'dc-')): print('   ', l, flush=True)
                nodes = both(out)
            said = said_by(nodes, 300.)
            found = sha256(out) if all(p.returncode == 0 for p in nodes) else 'failed\n' + ''.join(said)
            good &= found == expected
            print(f"{what}: {found[:16] if found == expected else found}, "
                  f"{'the same' if found == expected else 'DIFFERENT'}", flush=True)
        return good
    finally:
        for node in NODES: kill(node)
        disconnect()
        shutil.rmtree(top)

if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__).parse_args()
    if os.geteuid() or not shutil.which('ip'): sys.exit('needs root and the command ip')
    sys.exit(not main())
