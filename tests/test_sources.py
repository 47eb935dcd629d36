"CIFAR-10, CIFAR-100 and STL-10 as torchvision downloads them: tiny files of the same form, no network."
import hashlib, pickle
from unittest.mock import patch
import numpy as np, pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.data import pick
from deepcluster_nb.sources import DATASETS, load_images

RNG = np.random.default_rng(0)

def batch_of(n, name='labels'):
    return {'data': RNG.integers(0, 256, (n, 3072), dtype=np.uint8),
            name: RNG.integers(0, 10, n).tolist()}

def write(path, content): # → (name, checksum), as torchvision lists its files
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return path.name, hashlib.md5(path.read_bytes()).hexdigest()

def same(ours, theirs):
    assert len(ours) == len(theirs)
    for im, label, (x, y) in zip(ours, ours.labels, theirs):
        assert (im.permute(1, 2, 0).numpy() == np.array(x)).all() and int(label) == y

def test_cifar10(tmp_path):
    base = tmp_path/CIFAR10.base_folder
    train = [write(base/f, batch_of(4)) for f,_ in CIFAR10.train_list]
    test = [write(base/f, batch_of(3)) for f,_ in CIFAR10.test_list]
    names = dict(label_names=[f'class {i}' for i in range(10)])
    meta = CIFAR10.meta | dict(md5=write(base/'batches.meta', names)[1])
    with patch.multiple(CIFAR10, train_list=train, test_list=test, meta=meta):
        ours = load_images('cifar10', tmp_path)
        same(ours, CIFAR10(tmp_path))
        same(load_images('cifar10', tmp_path, 'test'), CIFAR10(tmp_path, train=False))
        some = load_images('cifar10', tmp_path, n_images=6, seed=1)
    assert some.paths == [str(i) for i in pick(20, 6, 1).tolist()]
    assert len(ours) == 20 and ours.classes == names['label_names'] and ours.size == (3, 32, 32)
    # outside the patch torchvision's own checksums hold, and it refuses our files unopened
    with pytest.raises(FileNotFoundError, match='root: no cifar10 in'): load_images('cifar10', tmp_path)

def test_cifar100(tmp_path):
    base = tmp_path/CIFAR100.base_folder
    lists = dict(train_list=[write(base/'train', batch_of(5, 'fine_labels'))],
                 test_list=[write(base/'test', batch_of(2, 'fine_labels'))])
    names = dict(fine_label_names=[f'class {i}' for i in range(100)])
    meta = CIFAR100.meta | dict(md5=write(base/'meta', names)[1])
    with patch.multiple(CIFAR100, meta=meta, **lists):
        same(load_images('cifar100', tmp_path, 'test'), CIFAR100(tmp_path, train=False))

def test_stl10(tmp_path):
    base = tmp_path/STL10.base_folder
    pixels = lambda n: RNG.integers(0, 256, n*3*96*96, dtype=np.uint8).tobytes()
    lists = dict(train_list=[write(base/'train_X.bin', pixels(2)),
                             write(base/'train_y.bin', bytes([1, 10])),
                             write(base/'unlabeled_X.bin', pixels(1))],
                 test_list=[write(base/'test_X.bin', pixels(1)), write(base/'test_y.bin', bytes([3]))])
    (base/'class_names.txt').write_text('\n'.join(f'class {i}' for i in range(10)))
    with patch.multiple(STL10, **lists):
        ours = load_images('stl10', tmp_path)
        same(ours, STL10(tmp_path, 'train'))
    assert ours.labels.tolist() == [0, 9]

@pytest.mark.parametrize('name', ['digits', 'shapes'])
def test_what_is_made_here_is_packed_too(name):
    images = load_images(name, n_images=20, seed=3)
    assert type(images) is PackedImages and len(images) == 20 and name in DATASETS

def tree(root, *names):
    for n in names:
        (root/n).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (30, 30)).save(root/n)

@pytest.mark.parametrize('name, n', [('cifar10', 10), ('cifar100', 100), ('stl10', 10)])
def test_other_images_are_not_taken_for_a_known_set(tmp_path, name, n):
    tree(tmp_path, 'train/cats/1.png', 'train/dogs/2.png')
    with pytest.raises(ValueError, match=f'root: expected the {n} classes of {name} .* got 2; .* folder'):
        load_images(name, tmp_path)
    tree(tmp_path/name, *(f'train/{i:03d}/1.png' for i in range(n)))
    assert len(load_images(name, tmp_path)) == n
    tree(tmp_path/name, 'train/loose.png')
    with pytest.warns(UserWarning, match='no labels: 1 of'): assert len(load_images(name, tmp_path)) == n + 1
    (tmp_path/'empty'/'train').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='no images in'): load_images(name, tmp_path/'empty')

def test_images_beside_a_split_are_counted(tmp_path):
    tree(tmp_path, 'train/cat/1.png', 'test/cat/2.png', '3.png', '4.png')
    with pytest.warns(UserWarning, match="not read: 2 images in .* beside train, such as '3.png'"):
        images = load_images('folder', tmp_path)
    assert [str(p) for p in images.paths] == ['cat/1.png']

def test_another_seed_is_another_part_of_the_images(tmp_path):
    load_images('digits', n_images=30).save(tmp_path/'train.safetensors')
    for i in range(30):
        d = tmp_path/'photos'/'ab'[i % 2]; d.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (20, 20), (i, i, i)).save(d/f'{i:02d}.png')
    for name,root in (('digits', None), ('packed', tmp_path), ('folder', tmp_path/'photos')):
        whole = load_images(name, root).paths
        a, b = (load_images(name, root, n_images=9, seed=s).paths for s in (0, 1))
        assert a != b and b == [whole[i] for i in pick(len(whole), 9, 1)]
