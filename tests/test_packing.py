("Packing: whatever happens to the process, the disk or the files, the result is whole and the same, "
 "or there is one clear error.")
import errno, json, os, random, runpy, subprocess, sys, time, warnings
from pathlib import Path
from unittest.mock import patch
import numpy as np, pytest, torch
from PIL import Image
from deepcluster_nb.fast import packing
from deepcluster_nb.fast.crops import center_crop, crop_batch, image_sizes, resample
from deepcluster_nb.augment import crop_boxes
from deepcluster_nb.fast.images import PackedImages, center_path
from deepcluster_nb.data import generator
from deepcluster_nb.sources import image_files, load_images
from deepcluster_nb.fast.packing import Journal, PackedWriter, pack_folder, read_like, verify_packed

SCRIPTS = Path(__file__).parent.parent/'data_scripts'
FEW = dict(workers=0, echo=None)

def make_tree(folder, n=12, sides=(30, 90), seed=0): # n JPEGs in three classes
    rng = np.random.default_rng(seed)
    for i in range(n):
        w, h = rng.integers(*sides, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        path = folder/f'class {i % 3}'/f'{i:04d}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((int(w), int(h)), Image.BICUBIC).save(path, quality=92)
    return folder

@pytest.fixture(scope='module')
def tree(tmp_path_factory): return make_tree(tmp_path_factory.mktemp('images'))

def left(folder, name='x'): return sorted(p.name for p in folder.glob(f'{name}*'))

# a run of pack_images.py that syncs after every few images
DRIVER = ("import runpy, sys, deepcluster_nb.fast.packing as p; p.SYNC, p.CHUNK = 0, 4; "
          "sys.argv = sys.argv[1:]; "
          "runpy.run_path(sys.argv[0], run_name='__main__')")
def command(*args): return [sys.executable, '-c', DRIVER, str(SCRIPTS/'pack_images.py'), *map(str, args)]

def children(pid): # of a process, and the state of each
    found = {}
    for p in Path('/proc').glob('[0-9]*/stat'):
        try: state, parent = p.read_text().rsplit(')', 1)[1].split()[:2]
        except OSError: continue
        if int(parent) == pid: found[int(p.parent.name)] = state
    return found

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] not in 'ZX'
    except OSError: return False

@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
def test_killed_anywhere_it_ends_in_the_same_bytes(tmp_path):
    src, rng = make_tree(tmp_path/'src', 240), random.Random(time.time_ns())
    with patch.object(packing, 'CHUNK', 7):
        pack_folder(src, tmp_path/'plain.safetensors', max_side=80, center=32, **FEW)
    out = tmp_path/'x.safetensors'
    total, stops = os.path.getsize(tmp_path/'plain.safetensors'), []
    for workers in (1, 2, 1):
        goal = rng.uniform(.05, .95) * total
        p = subprocess.Popen(command(src, out, '--max-side', 80, '--center', 32, '--workers', workers),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        part = Path(f'{out}.part')
        while p.poll() is None and not (part.exists() and part.stat().st_size > goal): time.sleep(.001)
        workers_of_it = children(p.pid)
        p.kill(); p.communicate()
        stops.append(part.stat().st_size if part.exists() else 'finished')
        deadline = time.time() + 10
        while any(alive(c) for c in workers_of_it) and time.time() < deadline: time.sleep(.05)
        assert not any(alive(c) for c in workers_of_it), 'a worker outlives its parent'
    done = subprocess.run(command(src, out, '--max-side', 80, '--center', 32, '--workers', 1),
                          capture_output=True, text=True)
    assert done.returncode == 0, (stops, done.stderr)
    for a in (out, center_path(out, 32)):
        assert a.read_bytes() == (tmp_path/a.name.replace('x', 'plain', 1)).read_bytes(), stops
    assert left(tmp_path) == ['x-center32.safetensors', 'x.safetensors']

def test_several_processes_make_the_same_file(tree, tmp_path):
    one = pack_folder(tree, tmp_path/'one', size=24, **FEW)
    with patch.object(packing, 'CHUNK', 2): pack_folder(tree, tmp_path/'two', size=24, workers=2, echo=None)
    assert ((tmp_path/'one').read_bytes() == (tmp_path/'two').read_bytes()
            and verify_packed(tmp_path/'two') == [])
    for im, f in zip(one, image_files(tree)[0]):
        exact = center_crop(torch.from_numpy(packing.grey_plane(Image.open(f)))[None, None], 24)[0]
        assert (im - exact).abs().max() <= .5 + 1e-3

def test_a_worker_that_dies_is_an_error_and_no_hang():
    with pytest.raises(packing.BrokenProcessPool): list(packing.in_order(os._exit, [(3,)], 2))

def test_the_central_crops_are_those_packed_alone(tree, tmp_path):
    both = pack_folder(tree, tmp_path/'x.safetensors', short_side=40, center=24, grey=False, **FEW)
    pack_folder(tree, tmp_path/'alone', size=24, grey=False, **FEW)
    assert (tmp_path/'x-center24.safetensors').read_bytes() == (tmp_path/'alone').read_bytes()
    assert both.size is None and both.center.size == (3, 24, 24) and both.shapes[:, 1:].amin() <= 40

def stop_after(n, exc): # let the n-th chunk fail
    count, real = iter(range(999)), packing.pack_chunk
    def failing(*args):
        if next(count) == n: raise exc
        return real(*args)
    return patch.multiple(packing, pack_chunk=failing, CHUNK=3)

@pytest.mark.parametrize('exc, seen', [
    (KeyboardInterrupt(), KeyboardInterrupt),
    (OSError(errno.ENOSPC, 'full'), ValueError)])
def test_stopped_or_out_of_space_it_goes_on(tree, tmp_path, exc, seen):
    pack_folder(tree, tmp_path/'plain', **FEW)
    with stop_after(2, exc), pytest.raises(seen,
                                           match='full; free some space' if seen is ValueError else None):
        pack_folder(tree, tmp_path/'x', **FEW)
    assert left(tmp_path) == ['x.journal', 'x.part']
    with patch.object(packing, 'CHUNK', 5): pack_folder(tree, tmp_path/'x', **FEW)
    assert (tmp_path/'x').read_bytes() == (tmp_path/'plain').read_bytes() and left(tmp_path) == ['x']

def test_killed_between_the_last_steps(tree, tmp_path):
    pack_folder(tree, tmp_path/'plain.safetensors', center=24, **FEW)
    out, real = tmp_path/'x.safetensors', PackedWriter.rename
    def only_the_crops(self):
        if self.path == out: raise KeyboardInterrupt
        real(self)
    with patch.object(PackedWriter, 'rename', only_the_crops), pytest.raises(KeyboardInterrupt):
        pack_folder(tree, out, center=24, **FEW)
    assert left(tmp_path) == ['x-center24.safetensors', 'x.safetensors.journal', 'x.safetensors.part']
    pack_folder(tree, out, center=24, **FEW)
    for name in ('.safetensors', '-center24.safetensors'):
        assert (tmp_path/f'x{name}').read_bytes() == (tmp_path/f'plain{name}').read_bytes()
    (tmp_path/'x.safetensors.journal').write_text('')            # as if killed before the journal was removed
    pack_folder(tree, out, center=24, **FEW)
    assert left(tmp_path) == ['x-center24.safetensors', 'x.safetensors']

def test_other_work_is_never_overwritten(tree, tmp_path):
    out = tmp_path/'x.safetensors'
    with stop_after(1, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt): pack_folder(tree, out, **FEW)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match='max_side: None there, 50 now'):
        pack_folder(tree, out, max_side=50, **FEW)
    with pytest.raises(ValueError, match='source: '): pack_folder(image_files(tree)[0][1:], out, **FEW)
    journal = Journal(f'{out}.journal', json.loads(Path(f'{out}.journal').read_text().splitlines()[0]))
    with pytest.raises(ValueError, match='another process is packing it'): pack_folder(tree, out, **FEW)
    journal.file.close()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    pack_folder(tree, out, **FEW)
    with pytest.raises(ValueError, match='exists and has other settings'):
        pack_folder(tree, out, grey=False, **FEW)
    (tmp_path/'y-center24.safetensors').write_text('mine')
    with pytest.raises(ValueError, match='exists already'):
        pack_folder(tree, tmp_path/'y.safetensors', center=24, **FEW)
    assert (left(tmp_path, 'y') == ['y-center24.safetensors']
            and (tmp_path/'y-center24.safetensors').read_text() == 'mine')

def test_no_space_no_start(tree, tmp_path):
    usage = type('usage', (), dict(free=9000))
    with patch('shutil.disk_usage', lambda p: usage), pytest.raises(ValueError, match='9 kB are free'):
        pack_folder(tree, tmp_path/'x', **FEW)
    assert left(tmp_path) == []

def test_the_estimate_is_near(tree, tmp_path):
    for kwargs in (dict(max_side=50), dict(short_side=33, grey=False, center=16), {}):
        out = tmp_path/f'{len(kwargs)}.safetensors'
        pack_folder(tree, out, **kwargs, **FEW)
        size = sum(p.stat().st_size for p in tmp_path.glob(f'{out.stem}*'))
        assert abs(packing.estimate(image_files(tree)[0], packing.Recipe(**kwargs)) - size) < 8192*2 + 100*12

BROKEN = {'half.jpg': 'truncated', 'half.png': 'truncated', 'empty.jpg': 'cannot identify',
          'text.jpg': 'cannot identify', 'deep.png': 'do not fit into 8 bits', 'huge.png': 'limit of',
          'gone.jpg': 'No such file', 'folder.jpg': 'Is a directory'}
WHOLE = ['0000 whole.jpg', 'alpha.png', 'cmyk.jpg', 'grey.jpg', 'moving.webp', 'palette.png', 'turned.jpg']

@pytest.fixture
def odd(tmp_path): # every kind of file, whole and broken, as a list
    folder, rng = tmp_path/'odd', np.random.default_rng(0)
    folder.mkdir()
    im = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48), Image.BICUBIC)
    im.save(folder/WHOLE[0])
    im.save(folder/'half.png')
    im.convert('RGBA').save(folder/'alpha.png')
    im.convert('CMYK').save(folder/'cmyk.jpg')
    im.convert('L').save(folder/'grey.jpg'); im.convert('P').save(folder/'palette.png', transparency=0)
    im.save(folder/'moving.webp', save_all=True, append_images=[im.rotate(180)])
    exif = Image.Exif(); exif[0x112] = 6
    im.save(folder/'turned.jpg', exif=exif)
    for name,source in (('half.jpg', WHOLE[0]), ('half.png', 'half.png')):
        (folder/name).write_bytes((folder/source).read_bytes()[:1000])
    (folder/'empty.jpg').touch()
    (folder/'text.jpg').write_text('no image')
    (folder/'gone.jpg').symlink_to('nowhere')
    (folder/'folder.jpg').mkdir()
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(folder/'deep.png')
    Image.new('1', (10000, 9000)).save(folder/'huge.png')
    return sorted(folder.iterdir())

def test_broken_files_are_listed_and_stop_or_are_left_out(odd, tmp_path):
    with pytest.raises(ValueError, match='8 of 15 images can.t be read'):
        pack_folder(odd, tmp_path/'x', **FEW)
    report = dict(line.split(': ', 1) for line in (tmp_path/'x.broken.txt').read_text().splitlines())
    assert report.keys() == BROKEN.keys()
    for name,why in BROKEN.items(): assert why in report[name], (name, report[name])
    assert not (tmp_path/'x').exists()
    said = []
    images = pack_folder(odd, tmp_path/'x', skip_broken=True, workers=0, echo=said.append)
    assert images.paths == WHOLE and said[-1].startswith('8 images can\'t be read and were left out')
    assert verify_packed(tmp_path/'x') == []
    again = pack_folder(odd, tmp_path/'y', skip_broken=True, upright=True, grey=False, **FEW)
    sizes = {p: tuple(s) for p,s in zip(again.paths, again.shapes.tolist())}
    assert sizes.pop('turned.jpg') == (3, 64, 48) and set(sizes.values()) == {(3, 48, 64)}

def test_a_file_that_was_repaired(tmp_path):
    tree, out = make_tree(tmp_path/'tree', 4), tmp_path/'x'
    path = sorted(tree.rglob('*.jpg'))[1]
    whole = path.read_bytes()
    path.write_bytes(b'?'*len(whole))
    with pytest.raises(ValueError, match='1 of 4 images can.t be read'): pack_folder(tree, out, **FEW)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match='1 files that could not be read can be now.*start anew'):
        pack_folder(tree, out, **FEW)
    assert len(pack_folder(tree, out, skip_broken=True, **FEW)) == 3
    with pytest.raises(ValueError, match='lacks 1 images that could not be read'):
        pack_folder(tree, out, **FEW)
    assert len(pack_folder(tree, out, skip_broken=True, **FEW)) == 3
    for p in tmp_path.glob('x*'): p.unlink()
    assert len(pack_folder(tree, out, **FEW)) == 4

def test_enormous_images_are_refused_by_every_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 400)
    for i in range(200): Image.new('L', (21, 20) if i % 2 else (20, 20)).save(tmp_path/f'{i:03d}.png')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)
        before = list(warnings.filters)
        images = read_like(sorted(tmp_path.glob('*.png')), dict(grey=True, upright=True), skip_broken=True)
        assert len(images) == 100 and warnings.filters == before

def test_an_interrupt_between_write_and_note_writes_nothing_twice(tmp_path):
    journal = Journal(tmp_path/'j', {})
    journal.add(dict(n=64))
    class Interrupted:
        def __init__(self, file): self.file = file
        def write(self, text): self.file.write(text); raise KeyboardInterrupt
        def __getattr__(self, name): return getattr(self.file, name)
    file, journal.file = journal.file, Interrupted(journal.file)
    with pytest.raises(KeyboardInterrupt): journal.sync()
    journal.file = file
    journal.sync()
    assert (tmp_path/'j').read_text().splitlines() == ['{}', '{"n": 64}']

def test_nothing_but_broken_files(tmp_path):
    (tmp_path/'a').mkdir(); (tmp_path/'a'/'b.jpg').touch()
    with pytest.raises(ValueError, match='1 of 1 images'):
        pack_folder(tmp_path/'a', tmp_path/'x', skip_broken=True, **FEW)
    assert not (tmp_path/'x').exists()

def test_a_file_larger_than_the_memory_is_mapped(tmp_path):
    if sys.platform != 'linux': pytest.skip('asks Linux for the size of its memory')
    info = {l.split(':')[0]: int(l.split()[1]) for l in Path('/proc/meminfo').read_text().splitlines()}
    n = (info['MemTotal'] + info['SwapTotal'] >> 20) + 2                   # images of 1 GiB
    writer = PackedWriter(tmp_path/'x', dict(classes='[]'))
    try:
        # holes: nothing is written
        writer.file.seek(n << 30, 1)
        writer.note([(1, 1 << 15, 1 << 15)]*n, [0]*n)
        writer.finish()
    except OSError:
        pytest.skip('no sparse files here')
    writer.rename()
    images = PackedImages.load(tmp_path/'x')
    assert (images.size == (1, 1 << 15, 1 << 15) and len(images.pixels) > (info['MemTotal'] << 10)
            and int(images[n-1][0, -1, -1]) == 0)

def test_cuts_change_nothing_but_the_last_digits():
    g = generator(0, 'cuts')
    images = [torch.randint(256, (3, h, w), generator=g, dtype=torch.uint8)
              for h,w in torch.randint(8, 160, (20, 2), generator=g).tolist()]
    boxes, flip = crop_boxes(image_sizes(images), g), torch.rand(20, generator=g) < .5
    # some between the pixels
    boxes[::2, :2] += torch.rand(10, 2, generator=g) * (image_sizes(images).flip(1)[::2] - boxes[::2, :2]
                                                        - boxes[::2, 2:])
    for size in (8, 90):
        whole = torch.cat([crop_batch(im[None], b[None], size, f[None])
                           for im,b,f in zip(images, boxes, flip)])
        # a place on 160 pixels is rounded to 2e-5 at most, and a weight's slope is 1
        assert (resample(images, boxes, size, flip) - whole).abs().max() < 255 * 2e-4

def test_packed_is_a_data_set(tree, tmp_path):
    for name in ('train', 'val'):
        pack_folder(tree, tmp_path/f'{name}.safetensors', max_side=50, center=24, **FEW)
    some = load_images('packed', tmp_path, n_images=5, seed=1)
    assert some.paths == load_images('folder', tree, n_images=5, seed=1).paths == some.center.paths
    assert (len(load_images('packed', tmp_path, 'test'))
            == len(load_images('packed', tmp_path/'val.safetensors')) == 12)
    with pytest.raises(FileNotFoundError, match='make it with `python data_scripts/pack_images.py'):
        load_images('packed', tmp_path/'val.safetensors', 'test')
    pack_folder(image_files(tree)[0][1:], tmp_path/'few.safetensors', size=24, **FEW)
    os.replace(tmp_path/'few.safetensors', tmp_path/'val-center24.safetensors')
    with pytest.raises(ValueError, match='holds other images'): load_images('packed', tmp_path, 'test')
    (tmp_path/'val-center24.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='val-center24'): load_images('packed', tmp_path, 'test')

def test_a_tree_larger_than_memory_is_refused_before_decoding(tree):
    with (patch('deepcluster_nb.sources.free_memory', lambda: 1000),
          patch('deepcluster_nb.sources.decode', side_effect=AssertionError)):
        with pytest.raises(ValueError, match='pack_images.py'): load_images('folder', tree)

def test_the_script_verifies(tree, tmp_path):
    script = runpy.run_path(str(SCRIPTS/'pack_images.py'))
    (tmp_path/'list.txt').write_text('\n'.join(map(str, image_files(tree)[0])))
    def call(*args):
        with patch.object(sys, 'argv', ['pack_images.py', *map(str, args)]): script['main']()
    call(tmp_path/'list.txt', tmp_path/'x', '--size', 24, '--rgb', '--workers', 0)
    images = PackedImages.load(tmp_path/'x')
    assert images.size == (3, 24, 24) and images.labels is None and images.paths[0] == 'class 0/0000.jpg'
    with pytest.raises(SystemExit) as e: call('--verify', tmp_path/'x')
    assert not e.value.code
    with open(tmp_path/'x', 'r+b') as f:
        f.seek(4096 + 1728*3 + 5)
        b = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([b ^ 128]))
    with pytest.raises(SystemExit, match='1 images have changed'): call('--verify', tmp_path/'x')
    assert verify_packed(tmp_path/'x') == [images.paths[3]]

def test_real_images_are_torchvision_s(cifar_root, tmp_path):
    from torchvision.datasets import ImageFolder
    root = Path(cifar_root)/'imagenette'/'val'
    if not root.is_dir(): pytest.skip('no imagenette')
    theirs = ImageFolder(root)
    files = [p for p,_ in theirs.samples[::20]]
    for im, f in zip(pack_folder(files, tmp_path/'x', grey=False, **FEW), files):
        assert np.array_equal(im.permute(1, 2, 0), np.asarray(theirs.loader(f)))
    assert [str(f) for f in packing.list_source(root)[0]] == [f for f,_ in theirs.samples]

@pytest.fixture(scope='module')
def synthetic(): return runpy.run_path(str(SCRIPTS/'make_synthetic.py'))

def test_synthetic_sets(synthetic, tmp_path):
    make = synthetic['make']
    make(tmp_path/'20', 20, [40, 60], 8)
    make(tmp_path/'9', 9, [40, 60], 8)
    make(tmp_path/'other', 9, [40, 60], 8, seed=1)
    a, b, c = (PackedImages.load(tmp_path/n) for n in ('20', '9', 'other'))
    assert (a.size == (1, 40, 60) and torch.equal(a.batch(torch.arange(9)), b.batch(torch.arange(9)))
            and not torch.equal(b.pixels, c.pixels))
    assert a.labels.tolist() == [i % 8 for i in range(20)] and verify_packed(tmp_path/'20') == []
    make(tmp_path/'ragged', 30, [64], 8, ragged=True, rgb=True)
    r = PackedImages.load(tmp_path/'ragged')
    assert (r.size is None and (r.shapes[:, 0] == 3).all() and 32 <= r.shapes[:, 1:].min()
            and r.shapes[:, 1:].max() <= 64)
    with pytest.raises(ValueError, match='exists'): make(tmp_path/'9', 3, [40], 2)
    with pytest.raises(ValueError, match='n: expected'): make(tmp_path/'none', 0, [40], 2)
    assert not (tmp_path/'none').exists() and not (tmp_path/'none.part').exists()

def test_synthetic_sets_have_their_central_crops(synthetic, tmp_path):
    synthetic['make'](tmp_path/'a.safetensors', 6, [90, 120], 3, ragged=True, center=32)
    images = PackedImages.load(tmp_path/'a.safetensors')
    crops = center_crop(images.batch(torch.arange(6)), 32)
    assert images.center.size == (1, 32, 32) and images.center.paths == images.paths
    assert (crops - images.center.batch(torch.arange(6))).abs().max() <= .51       # rounded to grey levels
    for p in tmp_path.iterdir(): assert verify_packed(p) == []
    by_two = [sys.executable, SCRIPTS/'make_synthetic.py', tmp_path/'b.safetensors', '-n', '6', '--size',
              '90', '120', '--ragged', '--classes', '3', '--center', '32', '--workers', '2']
    subprocess.run(by_two, check=True, capture_output=True)
    for name in ('', '-center32'):
        a, b = (tmp_path/f'{n}{name}.safetensors' for n in 'ab')
        assert a.read_bytes() == b.read_bytes()

def test_synthetic_classes_are_there_to_be_found(synthetic):
    C, S = 12, 96
    y, x = np.mgrid[:S, :S]
    def waves(c):
        cycles, turn = synthetic['grating'](c, C)
        k = 2*np.pi*cycles/S
        return np.exp(1j*k*(np.cos(turn)*x + np.sin(turn)*y))
    bank = np.stack([waves(c) for c in range(C)]).reshape(C, -1)
    ims = np.stack([synthetic['synthetic'](i, 3, (S, S), C)[0]
                    for i in range(60)]).reshape(60, -1).astype(float)
    assert 0 < ims.min() + 1 and ims.max() <= 255
    found = abs((ims - ims.mean(1, keepdims=True)) @ bank.conj().T).argmax(1)
    assert (found == np.arange(60) % C).all()

@pytest.mark.parametrize('workers', [0, 2])
def test_what_is_left_out_moves_nothing_else(tmp_path, workers): # in later chunks, too
    src = make_tree(tmp_path/'src', 11)
    files = sorted(src.rglob('*.jpg'), key=lambda p: (p.parent.name, p.name))
    broken = {files[i] for i in (3, 4, 8)}
    for p in broken: p.write_bytes(b'no image')
    with patch.object(packing, 'CHUNK', 2):
        images = pack_folder(src, tmp_path/'x', size=24, skip_broken=True, workers=workers, echo=None)
    kept = [p for p in files if p not in broken]
    assert [str(p) for p in images.paths] == [str(p.relative_to(src)) for p in kept]
    assert [images.classes[y] for y in images.labels.tolist()] == [p.parent.name for p in kept]
    for im,p in zip(images, kept):
        assert torch.equal(im.byte(), torch.from_numpy(packing.prepare_image(p, packing.Recipe(size=24))[0]))
