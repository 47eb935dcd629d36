("data_scripts/get_data.py as people call it, "
 "against a small web server and archives built like the publishers' own.")
import fcntl, hashlib, http.server, io, json, os, pickle, re, shutil, signal, subprocess, sys, tarfile, \
       threading, time
from pathlib import Path
import numpy as np, pytest, yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT/'data_scripts'/'get_data.py'
TABLE = yaml.safe_load((ROOT/'data_scripts'/'sources.yaml').read_text())

# ---------------------------------------------------------------- archives of the true inner structure

def jpeg(i): # different bytes for every i
    f = io.BytesIO()
    Image.new('RGB', (8 + i % 3, 8), (i % 256, i // 256, 7)).save(f, 'JPEG')
    return f.getvalue()

def member(name, data=b'', **fields):
    # (TarInfo, content); fields such as type=tarfile.SYMTYPE, linkname=…, size=…
    m = tarfile.TarInfo(name)
    m.size = len(data)
    for k, v in fields.items(): setattr(m, k, v)
    return m, data

def pack(members, mode='w')->bytes: # members: pairs from `member`, or (name, bytes)
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode=mode) as tar:
        for m, data in members:
            m, data = member(m, data) if isinstance(m, str) else (m, data)
            tar.addfile(m, io.BytesIO(data) if m.isreg() and m.size == len(data) else None)
    return f.getvalue()

def cifar(top, train, key, meta):
    g = np.random.default_rng(0)
    batch = lambda: pickle.dumps({'data': g.integers(0, 256, (5, 3072), dtype=np.uint8),
                                  key: [0, 1, 2, 3, 4]})
    names = [*train, 'test_batch' if 'data_batch_1' in train else 'test']
    return [(f'{top}/{n}', batch()) for n in names] + [(f'{top}/{meta[0]}',
                                                        pickle.dumps({meta[1]: list('abcdefghij')}))]

def stl10():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3*96*96), dtype=np.uint8)
    parts = dict(train_X=pixels[:4], train_y=np.arange(1, 5, dtype=np.uint8), test_X=pixels[4:6],
                 test_y=np.ones(2, np.uint8), unlabeled_X=pixels[6:])
    return [(f'stl10_binary/{k}.bin', v.tobytes()) for k,v in parts.items()] + [
        ('stl10_binary/class_names.txt', b'\n'.join(b'abcdefghij'[i:i+1] for i in range(10))),
        ('stl10_binary/fold_indices.txt', b'0 1\n')]

def voc(ids, split):
    xml = ('<annotation><object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin>'
           '<xmax>3</xmax><ymax>3</ymax></bndbox></object></annotation>')
    top = 'VOCdevkit/VOC2007'
    return ([member('VOCdevkit', type=tarfile.DIRTYPE),
             (f'{top}/ImageSets/Main/{split}.txt', '\n'.join(ids).encode())]
            + [x for i in ids for x in ((f'{top}/JPEGImages/{i}.jpg', jpeg(int(i))),
                                        (f'{top}/Annotations/{i}.xml', xml.encode()))])

WNIDS = ['n01440764', 'n01443537', 'n02099601']

def train_tar(per_class=3, wnids=WNIDS, image=jpeg):
    return [(f'{w}.tar', pack([(f'{w}_{i}.JPEG', image(1000*c + i)) for i in range(per_class)]))
            for c,w in enumerate(wnids)]

def devkit(): # class numbers are not in the order of the names, and one group of classes has a number too
    from scipy.io import savemat
    rows = [(2, WNIDS[0], 'tench', 'a fish', 0),
            (3, WNIDS[1], 'goldfish', 'another', 0),
            (1, WNIDS[2], 'retriever', 'a dog', 0),
            (4, 'n00001740', 'entity', 'all', 3)]
    synsets = np.array(rows, dtype=[('ILSVRC2012_ID', object), ('WNID', object), ('words', object),
                                    ('gloss', object), ('num_children', object)])
    f = io.BytesIO(); savemat(f, dict(synsets=synsets[:, None]))
    top = 'ILSVRC2012_devkit_t12'
    return [(f'{top}/readme.txt', b'hello'),
            (f'{top}/data/meta.mat', f.getvalue()),
            (f'{top}/data/ILSVRC2012_validation_ground_truth.txt', b'3\n1\n2\n2\n')]

def places(): # a class folder inside another, a file that no split names, and both splits in one class
    names = ['a/abbey/gsun_1.jpg', 'a/abbey/gsun_2.jpg', 'b/bakery/shop/gsun_3.jpg', 'a/abbey/gsun_4.jpg',
             'b/bakery/shop/gsun_5.jpg']
    csv = lambda rows: ''.join(f"{n} {int('bakery' in n)}\n" for n in rows).encode()
    images = [(f'data/vision/torralba/deeplearning/images256/{n}', jpeg(i))
              for i,n in enumerate([*names, 'z/zoo/gsun_6.jpg'])]
    split = [('trainvalsplit_places205/train_places205.csv', csv(names[:3])),
             ('trainvalsplit_places205/val_places205.csv', csv(names[3:]))]
    return images, split

def archives(name): # file name → bytes
    if name == 'imagenet':
        made = [pack(train_tar()), pack([(f'ILSVRC2012_val_{i:08}.JPEG', jpeg(i)) for i in (2, 1, 3, 4)]),
                pack(devkit(), 'w:gz')]
    elif name == 'places205':
        made = [pack(a, 'w:gz') for a in places()]
    elif name == 'voc2007':
        made = [pack(voc(['000005', '000007'], 'trainval')), pack(voc(['000001'], 'test'))]
    elif name == 'stl10':
        made = [pack(stl10(), 'w:gz')]
    elif name == 'cifar10':
        made = [pack(cifar('cifar-10-batches-py', [f'data_batch_{i}' for i in range(1, 6)], 'labels',
                           ('batches.meta', 'label_names')), 'w:gz')]
    else:
        made = [pack(cifar('cifar-100-python', ['train'], 'fine_labels', ('meta', 'fine_label_names')),
                     'w:gz')]
    return dict(zip(TABLE[name]['files'], made))

TREES = dict(imagenet={f'train/{w}/{w}_{i}.JPEG' for w in WNIDS for i in range(3)}
                      | {f'val/{w}/ILSVRC2012_val_{i:08}.JPEG'
                         for i,w in enumerate([WNIDS[1], WNIDS[2], WNIDS[0], WNIDS[0]], 1)},
             places205={'train/abbey/gsun_1.jpg', 'train/abbey/gsun_2.jpg', 'train/bakery-shop/gsun_3.jpg',
                        'val/abbey/gsun_4.jpg', 'val/bakery-shop/gsun_5.jpg'})

# ---------------------------------------------------------------- the server and the command

class Server(http.server.ThreadingHTTPServer):
    ("Serves `files`; `mode`: "
     "good, drop (the first answer breaks off), no_range, slow, wrong_range, or a status such as 404.")
    daemon_threads = True
    def __init__(self):
        self.files, self.mode, self.asked = {}, 'good', []
        super().__init__(('127.0.0.1', 0), Handler)

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_GET(self):
        s, name = self.server, self.path.lstrip('/')
        s.asked.append((name, self.headers.get('Range')))
        if s.mode.isdigit() or name not in s.files:
            return self.send_error(int(s.mode) if s.mode.isdigit() else 404)
        data, start, m = s.files[name], 0, re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if m and s.mode != 'no_range':
            start = int(m[1])
            if start >= len(data):
                self.send_response(416)
                self.send_header('Content-Range', f'bytes */{len(data)}')
                self.send_header('Content-Length', '0')
                return self.end_headers()
            self.send_response(206)
            self.send_header('Content-Range',
                             f"bytes {start + (s.mode == 'wrong_range')}-{len(data)-1}/{len(data)}")
        else: self.send_response(200)
        self.send_header('Content-Length', str(len(data) - start)); self.end_headers()
        body = data[start:]
        if s.mode == 'drop' or s.mode == 'no_range' and len(s.asked) == 1:
            body = body[:len(body)//2]
            s.mode = {'drop': 'good'}.get(s.mode, s.mode)
        if s.mode != 'slow': return self.wfile.write(body)
        try:
            for i in range(0, len(body), 1 << 16): self.wfile.write(body[i:i + (1 << 16)]); time.sleep(.06)
        except OSError: pass

@pytest.fixture
def server():
    s = Server()
    threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
    yield s
    s.shutdown(); s.server_close()

@pytest.fixture
def out(tmp_path): return tmp_path/'out'

def table(tmp_path, name, files, server=None, **changes):
    # sources.yaml with the tiny archives' own sizes and checksums
    entry = {f: dict(size=len(b), md5=hashlib.md5(b).hexdigest())
                | (dict(url=f'http://127.0.0.1:{server.server_port}/{f}') if server else {})
             for f,b in files.items()}
    if server: server.files = dict(files)
    for e in entry.values(): e.update(changes)
    path = tmp_path/'sources.yaml'
    path.write_text(yaml.safe_dump({name: {
        **TABLE[name], 'files': {f: {k: v for k,v in e.items() if v is not None} for f,e in entry.items()}}}))
    return path

def store(folder, files): # the archives as somebody put them there
    folder.mkdir(parents=True, exist_ok=True)
    for f, b in files.items(): (folder/f).write_bytes(b)
    return folder

def call(*args, **env):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True,
                          timeout=60, env={**os.environ, 'GET_DATA_WAIT': '.01', **env})

def ok(p): assert p.returncode == 0, p.stderr; return p.stdout
def tree(folder, skip=('archives', '.archives.json')): # path → bytes, without what is ours
    files = ([f for f in Path(folder).rglob('*') if not f.is_dir() or f.is_symlink()] if Path(folder).exists()
             else [])
    return {str(f.relative_to(folder)): f.read_bytes()
            for f in files if f.relative_to(folder).parts[0] not in skip}

# ---------------------------------------------------------------- every data set

@pytest.mark.parametrize('name', list(TABLE))
def test_fetch_check_unpack_and_be_quick_the_second_time(name, tmp_path, out, server):
    files = archives(name)
    args = name, out, '--sources', table(tmp_path, name, files, server)
    said = ok(call(*args, '--dry-run'))
    assert (TABLE[name]['page'] in said and TABLE[name]['terms'] in said and all(f in said for f in files)
            and 'free' in said)
    assert not out.exists() and not server.asked, 'a dry run touches nothing'
    said = ok(call(*args))
    assert 'next    ' in said and str(out) in said.split('next    ')[1]
    made, asked = tree(out), len(server.asked)
    assert set(made) == TREES[name] if name in TREES else made
    shutil.rmtree(out/'archives')                                     # not needed any more
    assert 'is there already' in ok(call(*args)) and made == tree(out) and len(server.asked) == asked
    if name == 'imagenet': assert made[f'val/{WNIDS[1]}/ILSVRC2012_val_00000001.JPEG'] == jpeg(1)

def md5(path): return hashlib.md5(path.read_bytes()).hexdigest()

@pytest.mark.parametrize('name', ['cifar10', 'cifar100', 'stl10'])
def test_load_images_reads_it(name, tmp_path, out, monkeypatch):
    from torchvision import datasets
    from deepcluster_nb.sources import load_images
    files = archives(name)
    ok(call(name, out, '--sources', table(tmp_path, name, files), '--archives', store(tmp_path/'a', files)))
    cls = dict(cifar10=datasets.CIFAR10, cifar100=datasets.CIFAR100, stl10=datasets.STL10)[name]
    for which in ('train_list', 'test_list'):                    # torchvision's checksums are the real files'
        monkeypatch.setattr(cls, which, [[f, md5(out/cls.base_folder/f)] for f,_ in getattr(cls, which)])
    if name != 'stl10':
        monkeypatch.setattr(cls, 'meta', {**cls.meta, 'md5': md5(out/cls.base_folder/cls.meta['filename'])})
    train, test = load_images(name, out), load_images(name, out, 'test')
    assert (len(train), len(test)) == dict(cifar10=(25, 5), cifar100=(5, 5),
                                           stl10=(4, 2))[name] and train.labels is not None

def test_torchvision_reads_voc2007(tmp_path, out):
    from torchvision.datasets import VOCDetection
    files = archives('voc2007')
    (out/'VOCdevkit'/'VOC2012').mkdir(parents=True)                   # another year beside it stays
    ok(call('voc2007', out, '--sources', table(tmp_path, 'voc2007', files),
            '--archives', store(tmp_path/'a', files)))
    assert ([len(VOCDetection(out, '2007', s)) for s in ('trainval', 'test')] == [2, 1]
            and (out/'VOCdevkit'/'VOC2012').is_dir())
    assert VOCDetection(out, '2007', 'test')[0][1]['annotation']['object'][0]['name'] == 'dog'

def test_load_images_reads_imagenet(tmp_path, out):
    from deepcluster_nb.sources import load_images
    files = archives('imagenet')
    ok(call('imagenet', out, '--sources', table(tmp_path, 'imagenet', files),
            '--archives', store(tmp_path/'a', files)))
    train, test = load_images('folder', out), load_images('folder', out, 'test')
    assert len(train) == 9 and len(test) == 4 and train.classes == test.classes == sorted(WNIDS)

def test_one_split_of_imagenet_needs_only_its_archives(tmp_path, out):
    files = archives('imagenet')
    args = ('imagenet', out, '--sources', table(tmp_path, 'imagenet', files),
            '--archives', store(tmp_path/'a', {k: v for k,v in files.items() if 'train' not in k}))
    assert (not tree(out)
            and 'ILSVRC2012_img_train.tar: get from https://image-net.org' in (p := call(*args)).stderr
            and p.returncode == 2 and not out.exists())
    ok(call(*args, '--only', 'val'))
    assert {k.split('/')[0] for k in tree(out)} == {'val'}

def test_published_checksums_are_torchvisions():
    from torchvision import datasets
    from torchvision.datasets import imagenet, voc
    known = dict(imagenet.ARCHIVE_META.values())
    for d in (datasets.CIFAR10, datasets.CIFAR100, datasets.STL10): known[d.filename] = d.tgz_md5
    for year in ('2007', '2007-test'):
        known[voc.DATASET_YEAR_DICT[year]['filename']] = voc.DATASET_YEAR_DICT[year]['md5']
    ours = {f: e['md5'] for t in TABLE.values() for f,e in t['files'].items() if 'md5' in e}
    assert ours == known
    assert all(set(e) <= {'url', 'size', 'unpacked', 'md5', 'sha256'} for t in TABLE.values()
               for e in t['files'].values())

# -------------------------------------------------------- a file for which nobody published a checksum

def test_places205_has_no_published_checksum(tmp_path, out):
    files = archives('places205')
    a = store(tmp_path/'a', files)
    args = 'places205', out, '--sources', table(tmp_path, 'places205', files, md5=None), '--archives', a
    p = call(*args)
    assert p.returncode == 2 and 'no checksum' in p.stderr and '--unchecked' in p.stderr and not out.exists()
    sums = [f'--sha256={f}={hashlib.sha256(b).hexdigest()}' for f,b in files.items()]
    p = call(*args, sums[0], sums[1][:-4] + '0000')
    assert (p.returncode == 1 and 'trainvalsplit' in p.stderr and 'was not opened' in p.stderr
            and not tree(out))
    ok(call(*args, *sums))
    assert set(tree(out)) == TREES['places205']
    shutil.rmtree(out)
    said = ok(call(*args, '--unchecked'))
    record = json.loads((out/'.archives.json').read_text())
    assert all(record[f]['sha256'] == hashlib.sha256(b).hexdigest() and record[f]['sha256'] in said
               for f,b in files.items())
    shutil.rmtree(out/'train'); shutil.rmtree(out/'val')
    first = next(iter(files))
    store(a, {first: files[first][:-1] + b'x'})
    p = call(*args, '--unchecked')
    assert p.returncode == 1 and 'recorded here before' in p.stderr

def test_truncated_without_a_checksum_is_still_found(tmp_path, out):
    files = archives('places205')
    cut = {f: b[:len(b)*2//3] if 'images' in f else b for f,b in files.items()}
    p = call('places205', out, '--sources', table(tmp_path, 'places205', files, md5=None, size=None),
             '--archives', store(tmp_path/'a', cut), '--unchecked')
    assert (p.returncode == 1 and 'truncated' in p.stderr and not (out/'train').exists()
            and not (out/'val').exists())

@pytest.mark.parametrize('cut', [512, 700, 1024 + 100])
def test_plain_tar_that_breaks_off(tmp_path, out, cut):
    # 512: a header alone; 700: in the data; else: in the next header
    whole = pack([('stl10_binary/a', b'x'*300), ('stl10_binary/b', b'y'*300)])
    p = call('stl10', out, '--sources', table(tmp_path, 'stl10', {'stl10_binary.tar.gz': whole[:cut]}),
             '--archives', store(tmp_path/'a', {'stl10_binary.tar.gz': whole[:cut]}))
    assert p.returncode == 1 and 'truncated' in p.stderr and not (out/'stl10_binary').exists()

def test_garbage_in_the_middle_is_no_end(tmp_path, out):
    whole = bytearray(pack([('stl10_binary/a', b'x'*300), ('stl10_binary/b', b'y'*300)]))
    whole[1024:1536] = b'z'*512                                       # where the second header was
    files = {'stl10_binary.tar.gz': bytes(whole)}
    p = call('stl10', out, '--sources', table(tmp_path, 'stl10', files),
             '--archives', store(tmp_path/'a', files))
    assert p.returncode == 1 and 'damaged' in p.stderr and not (out/'stl10_binary').exists()

def test_missing_images_of_places_are_counted(tmp_path, out):
    images, split = places()
    files = dict(zip(TABLE['places205']['files'], (pack(images[1:], 'w:gz'), pack(split, 'w:gz'))))
    p = call('places205', out, '--sources', table(tmp_path, 'places205', files),
             '--archives', store(tmp_path/'a', files))
    assert p.returncode == 0 and 'missing 1 images' in p.stderr and 'a/abbey/gsun_1.jpg' in p.stderr

# ---------------------------------------------------------------- wrong and hostile archives

def test_wrong_checksum_is_not_opened(tmp_path, out, server):
    files = archives('cifar10')
    sources = table(tmp_path, 'cifar10', files, server)
    bad = {f: b[:-1] + bytes([b[-1] ^ 1]) for f,b in files.items()}
    mine = store(tmp_path/'a', bad)
    p = call('cifar10', out, '--sources', sources, '--archives', mine)
    assert p.returncode == 1 and 'was published; it was not opened' in p.stderr and not tree(out)
    assert ((mine/'cifar-10-python.tar.gz').read_bytes()
            == bad['cifar-10-python.tar.gz']), "somebody's own file stays"
    server.files = bad
    p = call('cifar10', out, '--sources', sources)
    assert (p.returncode == 1 and 'it was not opened' in p.stderr and not tree(out)
            and not list((out/'archives').iterdir()))
    server.files = files
    ok(call('cifar10', out, '--sources', sources))

def test_truncated_archive_is_told_by_its_size(tmp_path, out):
    files = archives('imagenet')
    sources = table(tmp_path, 'imagenet', files)
    cut = {f: b[:-1000] if 'train' in f else b for f,b in files.items()}
    p = call('imagenet', out, '--sources', sources, '--archives', store(tmp_path/'a', cut))
    assert p.returncode == 1 and 'truncated' in p.stderr and not out.exists()

TOP = 'cifar-10-batches-py'
HOSTILE = dict(
    up=[member('../escaped', b'x')], deep=[member(f'{TOP}/a/../../../escaped', b'x')],
    absolute=[member('/tmp/escaped-get-data', b'x')], backslash=[member(f'{TOP}\\..\\escaped', b'x')],
    symlink=[member(f'{TOP}/l', type=tarfile.SYMTYPE, linkname='../..'), member(f'{TOP}/l/escaped', b'x')],
    top_symlink=[member(TOP, type=tarfile.SYMTYPE, linkname='/tmp')],
    hardlink=[member(f'{TOP}/h', type=tarfile.LNKTYPE, linkname='/etc/passwd')],
    device=[member(f'{TOP}/d', type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
    fifo=[member(f'{TOP}/f', type=tarfile.FIFOTYPE)],
    sparse=[member(f'{TOP}/s', type=tarfile.GNUTYPE_SPARSE)],
    both=[member(f'{TOP}/x', b'x'), member(f'{TOP}/x/y', b'y')], elsewhere=[member('other/x', b'x')],
    updir=[member('../escaped', type=tarfile.DIRTYPE)])

@pytest.mark.parametrize('what', list(HOSTILE))
def test_hostile_archive(what, tmp_path, out):
    files = {'cifar-10-python.tar.gz': pack([member(f'{TOP}/good', b'good'), *HOSTILE[what],
                                             member(f'{TOP}/late', b'late')], 'w:gz')}
    a, before = store(tmp_path/'a', files), set(Path('/tmp').iterdir())
    sources = table(tmp_path, 'cifar10', files)
    p = call('cifar10', out, '--sources', sources, '--archives', a)
    assert (p.returncode == 1 and 'nothing of it is kept' in p.stderr
            and len(p.stderr.strip().splitlines()) == 1)
    assert (not [f for f in out.rglob('*') if f.name != '.archives.json']
            and {f.name for f in tmp_path.iterdir()} == {'a', 'out', 'sources.yaml'})
    assert not any(f.name.startswith('escaped') for f in set(Path('/tmp').iterdir()) - before)

@pytest.mark.parametrize('what', ['outer_link', 'outer_name', 'inner_up', 'inner_class', 'inner_link',
                                  'val_name', 'val_number'])
def test_hostile_imagenet(what, tmp_path, out):
    files, w = archives('imagenet'), WNIDS[0]
    train, val, _ = files
    inner = dict(inner_up=('../x.JPEG', b'x'), inner_class=(f'{WNIDS[1]}_1.JPEG', b'x'),
                 inner_link=member(f'{w}_1.JPEG', type=tarfile.SYMTYPE, linkname='/etc/passwd'))
    if what in inner: files[train] = pack([(f'{w}.tar', pack([(f'{w}_0.JPEG', jpeg(0)), inner[what]]))])
    if what == 'outer_link':
        files[train] = pack([*train_tar(),
                             member('n01440765.tar', type=tarfile.SYMTYPE, linkname='n01440764.tar')])
    if what == 'outer_name': files[train] = pack([*train_tar(), ('notes.txt', b'x')])
    if what == 'val_name': files[val] = pack([('a/ILSVRC2012_val_00000001.JPEG', b'x')])
    if what == 'val_number': files[val] = pack([('ILSVRC2012_val_00000005.JPEG', b'x')])
    p = call('imagenet', out, '--sources', table(tmp_path, 'imagenet', files),
             '--archives', store(tmp_path/'a', files))
    assert p.returncode == 1 and 'nothing of it is kept' in p.stderr
    assert set(k.split('/')[0] for k in tree(out)) == (set() if not what.startswith('val') else {'train'})

def test_a_member_larger_than_the_disk(tmp_path, out):
    header = member(f'{TOP}/huge', size=10**15)[0].tobuf(tarfile.GNU_FORMAT)
    files = {'cifar-10-python.tar.gz': header + bytes(1024)}
    p = call('cifar10', out, '--sources', table(tmp_path, 'cifar10', files, unpacked=0),
             '--archives', store(tmp_path/'a', files))
    assert (p.returncode == 1 and '1,000,000.0 GB' in p.stderr and 'are free' in p.stderr
            and not (out/TOP).exists() and not tree(out))

# ---------------------------------------------------------------- interruptions

def big():
    return {'cifar-10-python.tar.gz': pack([(f'{TOP}/a', np.random.default_rng(0).bytes(3 << 20)),
                                            (f'{TOP}/b', b'b')], 'w:gz')}

@pytest.mark.parametrize('mode, ranges', [('drop', [None, 'bytes=']), ('no_range', [None, 'bytes='])])
def test_connection_breaks_off(mode, ranges, tmp_path, out, server):
    files = big()
    server.mode = mode
    ok(call('cifar10', out, '--sources', table(tmp_path, 'cifar10', files, server)))
    assert [r and r[:6] for _,r in server.asked] == ranges and set(tree(out)) == {f'{TOP}/a', f'{TOP}/b'}

def wait_for(condition, process, seconds=20):
    for _ in range(int(seconds*500)):
        if condition(): return
        assert process.poll() is None, process.communicate()
        time.sleep(.002)
    raise AssertionError('it did not come so far')

@pytest.mark.parametrize('how, status', [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_killed_in_a_download(how, status, tmp_path, out, server):
    files, part = big(), out/'archives'/'cifar-10-python.tar.gz.part'
    server.mode = 'slow'
    args = [str(SCRIPT), 'cifar10', str(out), '--sources', str(table(tmp_path, 'cifar10', files, server))]
    p = subprocess.Popen([sys.executable, *args], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                         text=True)
    wait_for(lambda: part.exists() and part.stat().st_size >= 1 << 20, p)
    assert 'another get_data.py is at work' in call(*args[1:]).stderr
    p.send_signal(how)
    assert p.wait(20) == status and ('goes on' in p.communicate()[1]) == (how != signal.SIGKILL)
    assert not (out/TOP).exists() and not part.with_suffix('').exists()
    had, server.mode = part.stat().st_size, 'good'
    ok(call(*args[1:]))
    assert server.asked[-1][1] == f'bytes={had}-' and tree(out)[f'{TOP}/b'] == b'b'

def test_killed_while_unpacking(tmp_path, out):
    wnids = [f'n{i:08}' for i in range(60)]
    files = archives('imagenet') | {
        'ILSVRC2012_img_train.tar': pack(train_tar(80, wnids, lambda i: b'%d' % i * 500))}
    args = ('imagenet', out, '--sources', table(tmp_path, 'imagenet', files),
            '--archives', store(tmp_path/'a', files), '--only', 'train')
    p = subprocess.Popen([sys.executable, SCRIPT, *map(str, args)], stderr=subprocess.PIPE,
                         stdout=subprocess.DEVNULL)
    part = out/'.train.part'
    wait_for((part/wnids[10]).exists, p)
    p.kill(); p.wait(20); p.communicate()
    assert part.is_dir() and not (out/'train').exists(), 'half a data set is never seen'
    written = {f: f.stat().st_mtime_ns for f in part.rglob('*.JPEG')}
    # the last one may be half there, and the clock is coarse
    whole = sorted((f for f,t in written.items() if t < max(written.values())), key=written.get)
    whole[3].write_bytes(whole[3].read_bytes()[:10])         # as if the kill had come in the middle of a file
    stamps = {f.relative_to(part): f.stat().st_mtime_ns for f in whole if f != whole[3]}
    assert 'goes on' in ok(call(*args))
    assert tree(out) == {f'train/{w}/{w}_{i}.JPEG': b'%d' % (1000*c + i) * 500 for c,w in enumerate(wnids)
                         for i in range(80)}
    assert all((out/'train'/f).stat().st_mtime_ns == t for f,t in stamps.items()), 'what was there is kept'

@pytest.mark.parametrize('mode, message', [('404', '404'), ('500', 'gave up after 5 tries')])
def test_server_that_does_not_answer(mode, message, tmp_path, out, server):
    server.mode = mode
    p = call('cifar10', out, '--sources', table(tmp_path, 'cifar10', archives('cifar10'), server))
    assert (p.returncode == 1 and message in p.stderr and len(server.asked) == (1 if mode == '404' else 5)
            and not tree(out))

def test_server_with_another_file_or_piece(tmp_path, out, server):
    files = big()
    sources = table(tmp_path, 'cifar10', files, server)
    server.files = {f: b + b'more' for f,b in files.items()}
    p = call('cifar10', out, '--sources', sources)
    assert p.returncode == 1 and 'not the file that was published' in p.stderr
    server.files, server.mode = files, 'wrong_range'
    store(out/'archives', {f + '.part': b[:1000] for f,b in files.items()})
    p = call('cifar10', out, '--sources', sources)
    assert p.returncode == 1 and 'another piece' in p.stderr

def test_part_that_is_whole_already(tmp_path, out, server):
    # killed between the last byte and the checksum; once with and once without a known size
    files = big()
    for size in ({}, dict(size=None)):
        store(out/'archives', {f + '.part': b for f,b in files.items()})
        ok(call('cifar10', out, '--sources', table(tmp_path, 'cifar10', files, server, **size)))
        assert set(tree(out)) == {f'{TOP}/a', f'{TOP}/b'}
        shutil.rmtree(out)
    assert len(server.asked) == 1

# ---------------------------------------------------------------- space, and wrong input

def test_too_little_space_is_found_before_any_work(tmp_path, out, server):
    files = archives('cifar10')
    sources = table(tmp_path, 'cifar10', files, server)
    p = call('cifar10', out, '--sources', sources, GET_DATA_FREE='100000000')
    assert p.returncode == 1 and 'are free' in p.stderr and not out.exists() and not server.asked
    p = call('imagenet', out, '--archives', store(tmp_path/'a', archives('imagenet')),
             '--sources', table(tmp_path, 'imagenet', archives('imagenet')), GET_DATA_FREE='100000000')
    assert p.returncode == 1 and 'needs' in p.stderr and not out.exists()

@pytest.mark.parametrize('args, message', [
    (('mnist', 'OUT'), "NAME: expected one of imagenet, .*folder, got 'mnist'"),
    (('cifar10', 'FILE'), "OUT: expected a folder, but .* is a file"),
    (('imagenet', 'OUT'), 'ILSVRC2012_img_train.tar.*: get from https://image-net.org'),
    (('cifar10', 'OUT', '--only', 'train'), '--only: .*cifar10'),
    (('cifar10', 'OUT', '--url', 'cifar-10-python.tar.gz=file:///etc/passwd'), '--url: expected an http'),
    (('cifar10', 'OUT', '--sha256', 'other=00'), '--sha256: expected FILE=VALUE'),
    (('cifar10', 'OUT', '--sha256', 'cifar-10-python.tar.gz=00'), '--sha256: expected 64'),
    (('folder', 'OUT'), 'OUT: expected a folder of images'),
    (('folder', 'EMPTY'), 'OUT: no images in')])
def test_wrong_input_is_one_line_and_leaves_nothing(args, message, tmp_path):
    (tmp_path/'FILE').write_text('x'); (tmp_path/'EMPTY').mkdir()
    p = call(args[0], tmp_path/args[1], *args[2:])
    assert p.returncode == 2 and re.search(message, p.stderr) and len(p.stderr.strip().splitlines()) == 1
    assert {f.name for f in tmp_path.iterdir()} == {'FILE', 'EMPTY'}

@pytest.mark.parametrize('name', list(TABLE))
def test_dry_run_of_the_real_table(name, tmp_path):
    said = ok(call(name, tmp_path/'out', '--dry-run'))
    assert (
        all(word in said for word in (TABLE[name]['page'], 'terms', 'needed', 'would', *TABLE[name]['files']))
        and not list(tmp_path.iterdir()))
    assert ('first   ' in said) == (name in ('imagenet', 'places205'))

def test_locked_folder(tmp_path, out):
    files = archives('cifar10')
    out.mkdir()
    fd = os.open(out, os.O_RDONLY); fcntl.flock(fd, fcntl.LOCK_EX)
    p = call('cifar10', out, '--sources', table(tmp_path, 'cifar10', files),
             '--archives', store(tmp_path/'a', files))
    os.close(fd)
    assert p.returncode == 1 and 'another get_data.py is at work' in p.stderr and not list(out.iterdir())

# ---------------------------------------------------------------- any folder

def test_folder_of_images(tmp_path):
    from deepcluster_nb.sources import load_images
    for i, path in enumerate(['train/cat/1.jpg', 'train/cat/2.JPG', 'train/dog/1.jpg', 'val/cat/9.jpg',
                              'train/cat/.hidden/1.jpg']):
        (tmp_path/path).parent.mkdir(parents=True, exist_ok=True); (tmp_path/path).write_bytes(jpeg(i))
    (tmp_path/'train'/'cat'/'notes.txt').write_text('x')
    before = tree(tmp_path)
    said = ok(call('folder', tmp_path))
    assert (f'train/       {len(load_images("folder", tmp_path))} images, 2 classes of 1 to 2' in said
            and 'val/         1 images, 1 classes' in said)
    assert ('.txt 1' in said and '2 files share their name' in said
            and f'-p dataset=folder -p root={tmp_path}' in said and before == tree(tmp_path))
    cut = tmp_path/'train'/'dog'/'3.jpg'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-200]); ok(call('folder', tmp_path))      # the header is fine
    p = call('folder', tmp_path, '--decode')
    assert p.returncode == 1 and str(cut) in p.stderr and '1 of 5 images' in p.stderr
    cut.write_bytes(b'')
    assert call('folder', tmp_path).returncode == 1

def test_folder_counts_what_load_images_reads(tmp_path):
    from deepcluster_nb.sources import EXTENSIONS, load_images
    for i, name in enumerate([*(f'cat/{e[1:]}{e}' for e in sorted(EXTENSIONS)), 'train/a.jpg',
                              'cat/@eaDir/b.jpg', 'runs/a/params.yaml', 'runs/a/log.jsonl',
                              'runs/a/figures/c.jpg', '.thumbnails/d.jpg', 'cat/e.mp4']):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True); (tmp_path/name).write_bytes(jpeg(i))
    (tmp_path/'latest').symlink_to('.')
    said = ok(call('folder', tmp_path))
    with pytest.warns(UserWarning): images = load_images('folder', tmp_path)
    assert len(images) == len(EXTENSIONS) + 1 and images.classes == ['cat', 'train']
    assert f'/ {len(images)} images, 2 classes of 1 to {len(EXTENSIONS)}' in said
    assert ".mp4 1" in said and 'folder of a run 1' in said and 'is read as classes, train among them' in said
    heavy = (f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import get_data; "
             "print('torch' in sys.modules)")
    assert subprocess.run([sys.executable, '-c', heavy], capture_output=True, text=True,
                          check=True).stdout.strip() == 'False'
