"Folders as people have them: a row each, with what reading must make of it."
import json, os, re, runpy, subprocess, sys, warnings
from pathlib import Path
from unittest.mock import patch
import numpy as np, pytest, torch
from PIL import Image, ImageOps
from deepcluster_nb.data import Images
from deepcluster_nb.fit import Config, fit
from deepcluster_nb.sources import (EXTENSIONS, check_color, check_sizes, decode, find_folder, has_split,
                                    image_files, list_broken, load_images, read_images)
from deepcluster_nb.fast.images import PackedImages
from deepcluster_nb.fast.packing import pack_folder, packing_of, read_like, verify_packed

SCRIPTS = Path(__file__).parent.parent/'data_scripts'
FEW = dict(workers=0, echo=None)

def picture(path, seed=0, size=(24, 16), **kwargs): # (width, height)
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **kwargs)

def make(top, files, links=()): # files end in / for an empty folder; links: (name, where it leads)
    for i, name in enumerate(files.split()):
        path = top/name
        if name.endswith('/'): path.mkdir(parents=True, exist_ok=True)
        elif path.suffix.lower() in ('.jpg', '.png', '.gif', '.avif', '.jfif'):
            picture(path, i, **(dict(format='JPEG') if path.suffix == '.jfif' else {}))
        else: path.parent.mkdir(parents=True, exist_ok=True); path.write_text('x')
    for name, to in links: (top/name).parent.mkdir(parents=True, exist_ok=True); (top/name).symlink_to(to)
    return top

def read(root, **kwargs): # images, and the lines that were said
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        images = load_images('folder', root, **kwargs)
    assert images.notes == [str(w.message) for w in said]
    return images, images.notes

# ---------------------------------------------------------------- which files and classes, and what is said

def test_an_image_beside_the_classes_costs_the_labels_and_is_named(tmp_path):
    images, lines = read(make(tmp_path/'photos', PHOTOS + ' stray.jpg'))
    assert images.labels is None and len(images) == 4
    assert len(lines) == 1 and re.search("no labels: 1 of 4 images .* such as 'stray.jpg'", lines[0])

@pytest.mark.parametrize('test', ['val', 'valid', 'validation', 'Test'])
def test_names_of_the_test_split(tmp_path, test):
    make(tmp_path/'photos', f'Train/a/1.jpg Train/b/2.jpg {test}/a/3.jpg')
    assert load_images('folder', tmp_path/'photos', 'test').paths == ['a/3.jpg']
    assert has_split('folder', tmp_path/'photos', 'test') and not has_split('folder', tmp_path, 'test')

def test_grey_packs_are_no_color(tmp_path):
    images = load_images('folder', make(tmp_path/'photos', PHOTOS))
    for grey in (True, False):
        pack_folder(tmp_path/'photos', tmp_path/f'{grey}.safetensors', grey=grey, workers=0, echo=None)
        packed = PackedImages.load(tmp_path/f'{grey}.safetensors')
        check_color(packed, sobel=True)
        if grey:
            with pytest.raises(ValueError, match='root: expected images in color.*--rgb'):
                check_color(packed, False)
            with pytest.raises(ValueError, match='root: expected images in color'):
                fit(Config(sobel=False, k=2, pca=1, device='cpu'), packed, echo=None)
        else: check_color(packed, False)
    check_color(images, False); check_color(Images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), False)

PHOTOS = 'a/1.jpg a/2.jpg b/3.jpg'
SPLIT = 'train/a/1.jpg train/b/2.jpg test/a/3.jpg'
# what there is, links in it → paths read, classes, and a part of each line that is said
FOLDERS = {
    'nothing odd': (PHOTOS, (), PHOTOS, 'a b', []),
    # 3. a class with the name of a split
    'a class train': ('car/1.jpg ship/2.jpg train/3.jpg', (), 'car/1.jpg ship/2.jpg train/3.jpg',
                      'car ship train', ["as classes, train among them"]),
    'a class test': ('car/1.jpg test/2.jpg', (), 'car/1.jpg test/2.jpg', 'car test',
                     ["as classes, test among them"]),
    'a class val and one train': ('car/1.jpg train/3.jpg val/2.jpg', (), 'car/1.jpg train/3.jpg val/2.jpg',
                                  'car train val', ["as classes, train and val among them"]),
    'splits': (SPLIT, (), 'a/1.jpg b/2.jpg', 'a b', []),
    'three splits and a file': (SPLIT + ' valid/a/4.jpg labels.csv', (), 'a/1.jpg b/2.jpg', 'a b', []),
    'splits beside a folder without images': (SPLIT + ' labels/1.txt', (), 'a/1.jpg b/2.jpg', 'a b', []),
    'splits beside previews': (SPLIT + ' @eaDir/1.jpg .cache/1.jpg', (), 'a/1.jpg b/2.jpg', 'a b', []),
    'splits beside a run': (SPLIT + ' runs/r/params.yaml runs/r/log.jsonl runs/r/figures/1.png', (),
                            'a/1.jpg b/2.jpg', 'a b', []),
    'splits beside a link to one': (SPLIT, [('newest', 'train')], 'a/1.jpg b/2.jpg', 'a b', []),
    'splits with other names': ('Training/a/1.jpg Training/b/2.jpg Validation/a/3.jpg', (),
                                'a/1.jpg b/2.jpg', 'a b', []),
    'a class valid': ('invalid/1.jpg valid/2.jpg', (), 'invalid/1.jpg valid/2.jpg', 'invalid valid',
                      ['as classes, valid among them']),
    'train alone': ('train/a/1.jpg', (), 'a/1.jpg', 'a', []),
    'a class train in train': ('train/car/1.jpg train/train/2.jpg test/car/3.jpg', (),
                               'car/1.jpg train/2.jpg', 'car train', []),
    # 4. runs inside the data
    'a run': (PHOTOS + ' r/params.yaml r/log.jsonl r/figures/1.png', (), PHOTOS, 'a b',
              ['folder of a run 1']),
    'a run at its checkpoint': (PHOTOS + ' runs/r/params.yaml runs/r/checkpoint/ runs/r/figures/1.png', (),
                                PHOTOS, 'a b', ['folder of a run 1']),
    'a run that begins': (PHOTOS + ' runs/r/notebook.ipynb', (), PHOTOS, 'a b', ['folder of a run 1']),
    'a comparison and a run in a class': (
        PHOTOS + ' c/notebook.ipynb c/figures/1.png a/r/params.yaml a/r/log.jsonl a/r/x.jpg', (), PHOTOS,
        'a b', ['folder of a run 2']),
    'a class with notes': (PHOTOS + ' a/notebook.ipynb b/params.yaml', (), PHOTOS, 'a b',
                           ['.ipynb 1, .yaml 1']),
    # 5. links and previews
    'a link to itself': (PHOTOS, [('latest', '.')], PHOTOS, 'a b', ['link to what is read already 1']),
    'a link that ends nowhere': (PHOTOS, [('a/loop', 'loop')], PHOTOS, 'a b', ['without ending 1']),
    'two links, no end': (PHOTOS, [('a/to', '../b'), ('b/to', '../a')], PHOTOS, 'a b',
                          ['link to what is read already 2']),
    'a link before what it leads to': ('b/1.jpg c/2.jpg', [('a', 'b')], 'b/1.jpg c/2.jpg', 'b c',
                                       ['link to what is read already 1']),
    'a class that lies elsewhere': ('a/1.jpg', [('b', '../elsewhere')], 'a/1.jpg b/0.jpg', 'a b', []),
    'previews': (PHOTOS + ' a/@eaDir/1.jpg .thumbnails/2.jpg __MACOSX/a/3.jpg b/x.lrdata/4.jpg a/._1.jpg', (),
                 PHOTOS, 'a b', ['folder of previews or hidden 4, hidden file 1']),
    'an empty class': (PHOTOS + ' aa/ .git/', (), PHOTOS, 'a aa b', ['folder of previews or hidden 1']),
    # 12. what is passed over, and what is read
    'films and raw files': (PHOTOS + ' a/1.mp4 a/2.MP4 b/3.cr2 b/notes', (), PHOTOS, 'a b',
                            ['.mp4 2, .cr2 1, without ending 1']),
    'what Pillow reads': ('a/1.jfif a/2.gif b/3.PNG', (), 'a/1.jfif a/2.gif b/3.PNG', 'a b', []),
}

@pytest.mark.parametrize('row', FOLDERS.values(), ids=FOLDERS.keys())
def test_folders(row, tmp_path):
    files, links, paths, classes, said = row
    picture(tmp_path/'elsewhere'/'0.jpg')
    images, lines = read(make(tmp_path/'photos', files, links))
    assert images.paths == paths.split() and images.classes == classes.split()
    assert [images.classes[l] for l in images.labels] == [p.split('/')[0] for p in images.paths]
    assert len(lines) == len(said), lines
    for line, part in zip(lines, said): assert part in line, line

def test_a_split_beside_classes_can_be_had(tmp_path):
    root = make(tmp_path/'x', 'car/1.jpg train/a/2.jpg')
    assert f"for the split alone: root={str(root/'train')!r}" in read(root)[1][0]
    assert read(root/'train')[0].paths == ['a/2.jpg']
    assert find_folder('folder', root, 'test') is None

def test_packing_says_that_splits_become_classes(tmp_path):
    root = make(tmp_path/'x', SPLIT)
    with pytest.warns(UserWarning, match='is read whole, with test, train as its classes; for a split'):
        assert pack_folder(root, tmp_path/'p', **FEW).classes == ['test', 'train']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert pack_folder(root/'train', tmp_path/'q', **FEW).classes == ['a', 'b']

def test_a_folder_that_may_not_be_opened_is_said(tmp_path, monkeypatch):
    root, real = make(tmp_path/'x', PHOTOS), os.scandir
    def scandir(path):
        if Path(path).name == 'b': raise PermissionError(13, 'denied', str(path))
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    images, said = read(root)
    assert images.paths == ['a/1.jpg', 'a/2.jpg'] and 'folder that may not be opened 1' in said[0]

@pytest.mark.filterwarnings('ignore:passed over')
def test_runs_inside_the_data_never_see_each_other(tmp_path):
    from deepcluster_nb.fit import Config, fit
    for i in range(12): picture(tmp_path/'p'/'ab'[i % 2]/f'{i:02}.png', i, (32, 32))
    def paths(run_dir):
        fit(Config(dataset='folder', root=str(tmp_path/'p'), k=3, pca=4, epochs=1, passes=1, batch_size=4,
                   device='cpu', precision='float32', run_dir=str(run_dir)), echo=None)
        picture(run_dir/'figures'/'curves.png')
        return [l.rsplit(',', 1)[0] for l in (run_dir/'clusters.csv').read_text().splitlines()[1:]]
    first = paths(tmp_path/'p'/'runs'/'one')
    assert len(first) == 12 and first == paths(tmp_path/'p'/'two') == paths(tmp_path/'p'/'a'/'three')
    assert load_images('folder', tmp_path/'p').classes == ['a', 'b']

def test_a_link_to_the_folder_itself_gives_40_files(tmp_path):
    root = make(tmp_path/'x', ' '.join(f'{i}.png' for i in range(40)), [('latest', '.')])
    with pytest.warns(UserWarning, match='link to what is read already 1'):
        assert len(image_files(root)[0]) == 40
    with pytest.warns(UserWarning): assert len(pack_folder(root, tmp_path/'p', **FEW)) == 40

def test_all_read_formats_decode_and_an_animation_is_its_first_picture(tmp_path):
    first, second = (Image.new('RGB', (16, 16), c) for c in ('red', 'blue'))
    first.save(tmp_path/'a.gif', save_all=True, append_images=[second])
    assert torch.equal(decode(tmp_path/'a.gif')[:, 0, 0], torch.tensor([255, 0, 0]))
    assert {'.jfif', '.gif', '.jpg', '.tif'} <= EXTENSIONS and '.mp4' not in EXTENSIONS
    for e in EXTENSIONS - {'.heic', '.heif'}:                           # those only with a plugin
        first.save(tmp_path/f'b{e}', format='JPEG' if e == '.jfif' else None)
        assert decode(tmp_path/f'b{e}').shape == (3, 16, 16), e

# ---------------------------------------------------------------- 6. upright

@pytest.mark.parametrize('turn', range(1, 9))
@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp', 'tif'])
def test_photographs_stand_upright_everywhere(turn, ending, tmp_path):
    exif = Image.Exif(); exif[0x112] = turn
    file = tmp_path/'photos'/f'1.{ending}'
    picture(file, exif=exif)
    with Image.open(file) as im: stored, wanted = np.asarray(im), np.asarray(ImageOps.exif_transpose(im))
    assert wanted.shape == ((16, 24, 3) if turn < 5 else (24, 16, 3))
    packed = pack_folder(file.parent, tmp_path/'p.safetensors', grey=False, **FEW)
    for images in (read(file.parent)[0], packed, read_like([file], packed.recipe),
                   read_like([file], read(file.parent)[0].recipe)):
        assert np.array_equal(images[0].permute(1, 2, 0), wanted)
    if ending == 'tif': return                                          # Pillow turns those itself
    flat = pack_folder(file.parent, tmp_path/'q.safetensors', grey=False, upright=False, **FEW)
    for images in (read(file.parent, upright=False)[0], flat, read_like([file], flat.recipe),
                   read_like([file], {})):                          # {}: of a run before there was a recipe
        assert np.array_equal(images[0].permute(1, 2, 0), stored)

@pytest.mark.filterwarnings('ignore:Corrupt EXIF data')
def test_a_note_that_cannot_be_read_is_none(tmp_path):
    picture(tmp_path/'a.jpg', exif=b'Exif\0\0MM\0*\0\0\0\x08\0\x09garbage')
    picture(tmp_path/'b.jpg')
    assert torch.equal(decode(tmp_path/'a.jpg'), decode(tmp_path/'b.jpg'))

RECIPES = [dict(), dict(grey=False), dict(max_side=20), dict(size=12), dict(short_side=10, center=8),
           dict(max_side=20, center=8, upright=False)]

@pytest.mark.parametrize('recipe', RECIPES, ids=str)
def test_a_recipe_travels(recipe, tmp_path):
    make(tmp_path/'photos', PHOTOS)
    exif = Image.Exif(); exif[0x112] = 6
    picture(tmp_path/'photos'/'a'/'4.jpg', exif=exif)
    packed = pack_folder(tmp_path/'photos', tmp_path/'p.safetensors', **recipe, **FEW)
    again = PackedImages.load(tmp_path/'p.safetensors')
    assert packed.recipe == again.recipe == packing_of(tmp_path/'p.safetensors')
    files, labels, classes = image_files(tmp_path/'photos')
    like = read_like(files, json.loads(json.dumps(again.recipe)), labels, classes, tmp_path/'photos')
    assert (like.center is None) == (packed.center is None)
    for a, b in ((like, packed), (like.center or like, packed.center or packed)):
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.shapes, b.shapes) and a.paths == b.paths
        assert torch.equal(a.labels, b.labels) and a.classes == b.classes
    packed.subset([1, 2]).save(tmp_path/'few.safetensors')             # without the crops
    assert PackedImages.load(tmp_path/'few.safetensors').recipe == again.recipe | dict(center=None)

def test_the_script_packs_upright_unless_told_not_to(tmp_path):
    exif = Image.Exif(); exif[0x112] = 6
    picture(tmp_path/'photos'/'1.jpg', exif=exif)
    script = runpy.run_path(str(SCRIPTS/'pack_images.py'))
    def packed(*args):
        argv = ['pack_images.py', tmp_path/'photos', tmp_path/f'{len(args)}{args[:1]}', '--workers', 0, *args]
        with patch.object(sys, 'argv', [str(a) for a in argv]): script['main']()
        return tuple(PackedImages.load(argv[2])[0].shape)
    assert [packed(), packed('--upright'), packed('--no-upright')] == [(1, 24, 16), (1, 24, 16), (1, 16, 24)]

# ---------------------------------------------------------------- 7. names

NAMES = ['plain.jpg', 'caf\udce9.jpg', '图片.jpg', '$5_$10.jpg', '_x.jpg', 'a\nb.jpg', 'a\u2028b.jpg',
         'a"\'&<.jpg']

def test_names_are_carried_as_the_file_system_has_them(tmp_path):
    root = tmp_path/'fotos\udcff'
    for name in NAMES: picture(root/'k\udce4se'/name)
    there = {os.fsencode(p) for p in (root/'k\udce4se').iterdir()}
    assert len(there) == len(NAMES)
    images = read(root)[0]
    packed = pack_folder(root, tmp_path/'p\udcff.safetensors', max_side=20, center=8, **FEW)
    images.save(tmp_path/'s\udcff.safetensors')
    saved = PackedImages.load(tmp_path/'s\udcff.safetensors')
    for i in (images, packed, packed.center, saved, PackedImages.load(tmp_path/'p\udcff.safetensors')):
        assert {os.fsencode(root/p) for p in i.paths} == there and i.classes == ['k\udce4se']
    assert verify_packed(tmp_path/'p\udcff.safetensors') == []

def test_the_script_bears_any_name_and_any_terminal(tmp_path):
    root, names = tmp_path/'fotos\udcff', [n for n in NAMES if '\n' not in n]
    for name in names: picture(root/name)
    (root/'broken\udcff.jpg').touch()
    listed = tmp_path/'list\udcff.txt'
    files = sorted(map(str, root.iterdir()))
    listed.write_bytes(b'\xef\xbb\xbf' + b'\r\n'.join(map(os.fsencode, files)))       # as Windows writes it
    def run(*args):
        return subprocess.run([sys.executable, SCRIPTS/'pack_images.py', *args], capture_output=True,
                              timeout=100, env=os.environ | dict(PYTHONIOENCODING='ascii', LC_ALL='C'))
    for src in (root, listed):
        out = tmp_path/f'{src.stem} ×\udcff.safetensors'
        p = run(src, out, '--workers', '1')
        assert p.returncode == 1, p.stderr
        assert b'1 of 8 images' in p.stderr and b'broken\\udcff.jpg' in p.stderr
        assert os.fsencode('broken\udcff.jpg') in Path(f'{out}.broken.txt').read_bytes()
        p = run(src, out, '--workers', '1', '--skip-broken')
        assert p.returncode == 0 and b'Traceback' not in p.stderr, p.stderr
        assert sorted(PackedImages.load(out).paths) == sorted(names)
        p = run('--verify', out)
        assert p.returncode == 0 and b'every image is as it was packed' in p.stdout, p.stderr

# ---------------------------------------------------------------- 12. broken files

@pytest.fixture
def with_gaps(tmp_path): # 30 images of which 25 are broken
    for i in range(30): picture(tmp_path/'x'/'ab'[i % 2]/f'{i:02}.png', i)
    for i in range(25): (tmp_path/'x'/'ab'[i % 2]/f'{i:02}.png').write_bytes(b'no image')
    return tmp_path/'x'

def test_all_broken_files_are_listed(with_gaps, tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    with pytest.raises(ValueError, match='25 of 30 images can.t be read; skip_broken') as e: read(with_gaps)
    first, *listed, last = str(e.value).split('\n  ')
    assert len(listed) == 20 and last.startswith('5 more; all are listed in ')
    report = Path(last.split('listed in ')[1]).read_text(encoding='utf-8').splitlines()
    assert report[:20] == listed
    assert {Path(l.split(': ')[0]) for l in report} == {p for p in with_gaps.rglob('*.png') if p.stem < '25'}
    with pytest.raises(ValueError) as e: pack_folder(with_gaps, tmp_path/'p', **FEW)
    first, *listed, last = str(e.value).split('\n  ')
    assert first.startswith('src: 25 of 30 images') and len(listed) == 20
    assert last == f"5 more; all are listed in {tmp_path/'p.broken.txt'}"

def test_a_few_broken_files_are_named_and_no_file_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    text = list_broken(['a: x', 'b\udcff: y'], 3, '; z')
    assert text == "2 of 3 images can't be read; z:\n  a: x\n  b\\udcff: y" and not list(tmp_path.iterdir())

def test_broken_files_are_left_out_when_asked(with_gaps):
    images, said = read(with_gaps, skip_broken=True)
    kept = ['a/26.png', 'a/28.png', 'b/25.png', 'b/27.png', 'b/29.png']
    assert images.paths == kept and images.labels.tolist() == [0, 0, 1, 1, 1] and len(images.left_out) == 25
    assert len(said) == 1 and said[0].startswith("25 of 30 images can't be read and were left out: ")
    assert images[0].equal(decode(with_gaps/'a'/'26.png'))
    for p in kept: (with_gaps/p).unlink()
    with pytest.raises(ValueError, match="25 of 25 images can't be read:"): read(with_gaps, skip_broken=True)

def test_an_image_too_small_is_named(tmp_path):
    picture(tmp_path/'a.png'); picture(tmp_path/'t\udcff.png', size=(1, 9))
    images = read_images(sorted(tmp_path.glob('*.png')), root=tmp_path)
    with pytest.raises(ValueError, match=r'dataset: 1 of 2 images are too small, expected at least 8 pixels '
                                         r'a side: t\\udcff\.png \(1 × 9\)'): check_sizes(images)
    with pytest.raises(ValueError, match='folder: 1 of 2 images'): check_sizes(images, name='folder')
    check_sizes(images.subset([0]))

def test_nothing_but_other_files(tmp_path):
    make(tmp_path, 'a/1.mp4 a/2.doc')
    with pytest.raises(FileNotFoundError, match=r'no images in .*passed over in .*\.mp4 1, \.doc 1'):
        read(tmp_path)

# ---------------------------------------------------------------- a run, and new images for it

def photographs(folder, n=24): # half of them stored lying, with a note to turn them
    folder.mkdir()
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        im = Image.fromarray(pixels).resize((72, 48), Image.BICUBIC)
        note = Image.Exif()
        if i % 2:
            note[0x112] = 6                                                     # lies on its left side
            im = im.transpose(Image.Transpose.ROTATE_90)
        im.save(folder/f'{i:02}.png', exif=note)

@pytest.mark.parametrize('packed', [False, True])
def test_predict_reads_new_images_as_the_run_read_its_own(tmp_path, packed):
    from deepcluster_nb.experiments import predict_folder
    from deepcluster_nb.fit import Config, fit
    photographs(tmp_path/'photos')
    root = tmp_path/'photos'
    if packed:
        (tmp_path/'packed').mkdir()
        root = tmp_path/'packed'
        pack_folder(tmp_path/'photos', root/'train.safetensors', max_side=40)
    config = Config(dataset='packed' if packed else 'folder', root=str(root), k=4, pca=4, epochs=1, passes=1,
                    batch_size=8, device='cpu', precision='float32', run_dir=str(tmp_path/'run'))
    run = fit(config, echo=None)
    rows, broken = predict_folder(tmp_path/'run', tmp_path/'photos', tmp_path/'c.csv')
    assert broken == [] and [c for _, c in rows] == run.clustering.assign.tolist()

def test_how_a_folder_was_read_is_echoed(tmp_path):
    from deepcluster_nb.fit import Config, fit
    photographs(tmp_path/'photos')
    (tmp_path/'photos'/'notes.txt').write_text('x')
    (tmp_path/'photos'/'film.mp4').write_text('x')
    lines = []
    with pytest.warns(UserWarning):
        fit(Config(dataset='folder', root=str(tmp_path/'photos'), k=4, pca=4, epochs=0, batch_size=8,
                   device='cpu'), echo=lines.append)
    assert any('.mp4' in l for l in lines)
