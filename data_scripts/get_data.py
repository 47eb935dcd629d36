("Fetch a data set from its publisher, check it, and leave the folder that deepcluster-nb reads: "
 "python data_scripts/get_data.py NAME OUT")
import argparse, io, os, re, shutil, signal, sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
import yaml
from archives import (Failed, Hostile, Progress, Record, Wrong, alone, check_space, download, free_bytes, gb,
                      hidden, members, opened, publish, read_member, say, size_of, unpack_member)

@dataclass
class Job:
    "Archives that together make one or more folders."
    targets:list  # folders, visible when they are whole
    archives:list # names of the files it takes
    # (paths of the archives, hidden folders or None where it
    # is there already) → a line that says what came out
    fill:callable

def full(folder:Path)->bool: return folder.is_dir() and any(folder.iterdir())

# ---------------------------------------------------------------- what stands in the archives

def expect(ok, tar, m, what): # a member that does not belong
    if not ok: raise Hostile(f"{tar.where}: member {m.name!r} is not {what}; nothing of it is kept")

def subtree(*top): # every file of the archives below `top`
    def fill(archives, parts):
        n = 0
        for archive in archives:
            with opened(archive) as tar:
                show, size = Progress(f"unpacking {archive.name}"), archive.stat().st_size
                for m, path in members(tar):
                    expect(path[:len(top)] == top and len(path) > len(top), tar, m, f"below {'/'.join(top)}")
                    unpack_member(tar, m, parts[0].joinpath(*path[len(top):]))
                    show(tar.raw.tell(), size); n += 1
        return f"{n:,} files"
    return fill

def imagenet_train(archives, parts): # a tar of 1,000 tars, n01440764.tar → n01440764/*.JPEG
    n, classes, size, show = 0, 0, archives[0].stat().st_size, Progress(f"unpacking {archives[0].name}")
    with opened(archives[0]) as outer:
        for o, path in members(outer):
            expect(len(path) == 1 and re.fullmatch(r'n\d{8}\.tar', path[0]), outer, o,
                   "an archive of one class such as n01440764.tar")
            wnid = path[0][:-4]
            with opened(f"{archives[0]}: {path[0]}", outer.extractfile(o)) as inner:
                for m, path in members(inner):
                    expect(len(path) == 1 and re.fullmatch(wnid + r'_\d+\.JPEG', path[0]), inner, m,
                           f"an image such as {wnid}_18.JPEG")
                    unpack_member(inner, m, parts[0]/wnid/path[0])
                    show(outer.raw.tell(), size); n += 1
            classes += 1
    return f"{n:,} images in {classes:,} classes"

def val_classes(devkit:Path)->list: # wnid of validation image 1, 2, …
    ("The development kit numbers the classes; "
     "meta.mat says which number is which (MATLAB's format: arrays, no code).")
    from scipy.io import loadmat
    synsets = loadmat(io.BytesIO(read_member(devkit, 'data/meta.mat', 50_000_000)),
                      squeeze_me=True)['synsets']
    wnid = {int(s['ILSVRC2012_ID']): str(s['WNID']) for s in synsets if int(s['num_children']) == 0}
    wrong = [w for w in wnid.values() if not re.fullmatch(r'n\d{8}', w)]
    if wrong: raise Hostile(f"{devkit}: {wrong[0]!r} is no class name such as n01440764")
    numbers = read_member(devkit, 'data/ILSVRC2012_validation_ground_truth.txt', 50_000_000).split()
    try:
        return [wnid[int(i)] for i in numbers]
    except (KeyError, ValueError) as e:
        raise Failed(f"{devkit}: its ground truth names a class {e} that it does not define") from None

def imagenet_val(archives, parts): # 50,000 flat files, sorted by the development kit's list
    val, devkit = archives
    truth, size, show, n = val_classes(devkit), val.stat().st_size, Progress(f"unpacking {val.name}"), 0
    with opened(val) as tar:
        for m, path in members(tar):
            number = re.fullmatch(r'ILSVRC2012_val_(\d{8})\.JPEG', path[0]) if len(path) == 1 else None
            expect(number and 1 <= int(number[1]) <= len(truth), tar, m,
                   f"an image such as ILSVRC2012_val_00000001.JPEG, up to {len(truth):,}")
            unpack_member(tar, m, parts[0]/truth[int(number[1]) - 1]/path[0])
            show(tar.raw.tell(), size); n += 1
    if n != len(truth):
        raise Failed(f"{val}: {n:,} images, but {devkit.name} has the classes of {len(truth):,}")
    return f"{n:,} images in {len(set(truth)):,} classes"

def places_split(split:Path)->dict: # 'a/abbey/gsun_1.jpg' → (0 for train or 1 for val, 'abbey')
    ("Lines such as `a/abbey/gsun_1.jpg 0`. "
     "Folders may be two deep: b/bakery/shop becomes the class bakery-shop.")
    where, labels, kept = {}, {}, {}
    for s, name in enumerate(('train', 'val')):
        for line in io.TextIOWrapper(io.BytesIO(read_member(split, f'{name}_places205.csv'))):
            path, _, label = line.strip().rpartition(' ')
            _, *middle, _ = path.split('/') if '/' in path else ('', '')
            if not middle or not label.isdigit() or any(p[:1] in ('', '.') for p in middle):
                raise Failed(f"{split}: {line!r} is not like 'a/abbey/gsun_1.jpg 0'")
            cls = '-'.join(middle)
            if labels.setdefault(cls, label) != label:
                raise Failed(f"{split}: folder {cls!r} has the labels {labels[cls]} and {label}")
            where[path] = kept.setdefault((s, cls), (s, cls))
    if len(set(labels.values())) != len(labels): raise Failed(f"{split}: two folders share one label")
    return where

def places(archives, parts): # data/vision/torralba/deeplearning/images256/a/abbey/gsun_1.jpg
    images, split = archives
    where, size, show, n, other = (places_split(split), images.stat().st_size,
                                   Progress(f"unpacking {images.name}"), [0, 0], 0)
    with opened(images) as tar:
        for m, path in members(tar):
            inside = path[path.index('images256') + 1:] if 'images256' in path else path
            s, cls = where.pop('/'.join(inside), (None, None))
            if s is None: other += 1; continue
            if parts[s]: unpack_member(tar, m, parts[s]/cls/path[-1])
            n[s] += 1
            show(tar.raw.tell(), size)
    if not all(n):
        raise Failed(f"{images}: {n[0]:,} training and {n[1]:,} validation images of those that "
                     f"{split.name} names")
    if where:
        say(f"missing {len(where):,} images that {split.name} names are not in the archive: "
            f"{', '.join([*where][:5])}{' …' if len(where) > 5 else ''}", sys.stderr)
    return (f"{n[0]:,} training and {n[1]:,} validation images"
            + (f"; {other:,} files that the split does not name left out" if other else ''))

def jobs(name:str, out:Path, files:list)->list:
    def named(*words): return [f for w in words for f in files if w in f]
    if name == 'imagenet':
        return [Job([out/'train'], named('img_train'), imagenet_train),
                Job([out/'val'], named('img_val', 'devkit'), imagenet_val)]
    if name == 'places205': return [Job([out/'train', out/'val'], named('images', 'split'), places)]
    top = dict(cifar10=('cifar-10-batches-py',), cifar100=('cifar-100-python',), stl10=('stl10_binary',),
               voc2007=('VOCdevkit', 'VOC2007'))[name]
    return [Job([out.joinpath(*top)], files, subtree(*top))]

# ---------------------------------------------------------------- any folder of images

def check_folder(root:Path, decode:bool):
    "Count, open every header (or every pixel), and say how to use the folder; nothing is copied or changed."
    from PIL import Image
    from deepcluster_nb.sources import EXTENSIONS, beside_splits, find_images, list_broken, read_as
    if not root.is_dir(): raise Wrong(f"OUT: expected a folder of images, and there is none at {str(root)!r}")
    images, _, _, other = find_images(root)
    if not images: raise Wrong(f"OUT: no images in {str(root)!r} (looked for {' '.join(sorted(EXTENSIONS))})")
    broken, sizes, modes, show = [], [], Counter(), Progress('looking at images', '{:,}'.format)
    for i, f in enumerate(images):
        try:
            with Image.open(f) as im:
                if decode: im.load()
                sizes.append(im.size); modes[im.mode] += 1
        except Exception as e: broken.append(f"{f}: {e}")
        show(i, len(images))
    classes = beside_splits(root)                       # then a folder called train is one of them
    splits = [root/s for s in ('train', 'test', 'val') if (root/s).is_dir() and not classes] or [root]
    for s in splits:
        inside = [f.relative_to(s).parts for f in images if s in f.parents]
        per = Counter(p[0] for p in inside if len(p) > 1)
        loose = sum(len(p) == 1 for p in inside)
        classes = (f"{len(per):,} classes of {min(per.values()):,} to {max(per.values()):,}" if per
                   else 'no classes')
        print(f"{s.name + '/':12} {len(inside):,} images, {classes}"
              + (f"; {loose:,} outside any class, so that none gets a label" if loose and per else ''))
    if sizes:
        print(f"pixels       {min(s[0] for s in sizes)} to {max(s[0] for s in sizes)} wide, "
              f"{min(s[1] for s in sizes)} to {max(s[1] for s in sizes)} high; "
              f"modes {', '.join(f'{k} {v:,}' for k,v in modes.most_common())}")
    print("endings      "
          f"{', '.join(f'{k} {v:,}' for k,v in Counter(f.suffix for f in images).most_common())}")
    if other:
        print(f"not images   {', '.join(f'{k} {v:,}' for k,v in other.most_common(12))}: "
              "these are passed over")
    for line in read_as(root): print(f"classes      {line}")
    twice = Counter(f.name.lower() for f in images)
    again = [f for f in images if twice[f.name.lower()] > 1]
    if again:
        print(
            f"same names   {len(again):,} files share their name with another, such as "
            f"{', '.join(str(f.relative_to(root)) for f in again if f.name.lower() == again[0].name.lower())[:150]}")
    if broken: raise Failed(list_broken(broken, len(images), '; repair or remove them'))
    print(f"next         deepcluster-nb run train -p dataset=folder -p root={root}")

# ---------------------------------------------------------------- the command

def pairs(texts, option, known)->dict: # ['FILE=VALUE'] → {FILE: VALUE}
    out = dict(t.partition('=')[::2] for t in texts)
    for k, v in out.items():
        if k not in known or not v:
            raise Wrong(f"{option}: expected FILE=VALUE with FILE one of {', '.join(known)}, "
                        f"got {k + '=' + v!r}")
    return out

def overrides(files:dict, args)->dict: # the table's files with what the command line knows better
    files = {k: dict(v or {}) for k,v in files.items()}
    for k, v in pairs(args.url, '--url', files).items():
        if not v.startswith(('http://', 'https://')):
            raise Wrong(f"--url: expected an http or https address, got {v!r}")
        files[k]['url'] = v
    for k, v in pairs(args.sha256, '--sha256', files).items():
        if not re.fullmatch('[0-9a-fA-F]{64}', v):
            raise Wrong(f"--sha256: expected 64 hexadecimal digits, got {v!r}")
        files[k]['sha256'] = v
    return files

def checksum(f:dict)->tuple: # (algorithm, value or None); a SHA-256 goes before an MD5
    return ('sha256', f['sha256']) if 'sha256' in f else ('md5', f['md5']) if 'md5' in f else ('sha256', None)

def look(files:dict, used:list, store:Path, out:Path
        )->tuple: # (names to fetch, names that are missing, [(folder, bytes it will take), …])
    "A line for every archive: its size, its checksum, and whether it is here."
    fetched, missing, needs = [], [], []
    for name in used:
        f, path, part = files[name], store/name, store/f'{name}.part'
        have = path.stat().st_size if path.is_file() else None
        size, (algorithm, value) = f.get('size') or have, checksum(f)
        if have is not None: state = f"in {store}"
        elif 'url' in f: state = f"to be fetched from {f['url']}"; fetched.append(name)
        else: state = "missing"; missing.append(name)
        print(f"file    {name}, {gb(size) if size else 'size not published'}, "
              f"{algorithm + ' ' + value if value else 'no published checksum'}: {state}")
        if have is not None and have != size:
            raise Failed(f"{path}: {have:,} bytes, but {size:,} were published; "
                         "truncated? It was not opened: remove it and get it again")
        if name in fetched:
            needs.append((store, max(0, (size or 0) - (part.stat().st_size if part.exists() else 0))))
        needs.append((out, f.get('unpacked', int(1.03 * (size or 0)))))
    return fetched, missing, needs

def get_data(args):
    table, out = yaml.safe_load(Path(args.sources).read_text(encoding='utf-8')), Path(args.out)
    if args.name not in [*table, 'folder']:
        raise Wrong(f"NAME: expected one of {', '.join([*table, 'folder'])}, got {args.name!r}")
    if args.name == 'folder': return check_folder(out, args.decode)
    if out.exists() and not out.is_dir(): raise Wrong(f"OUT: expected a folder, but {str(out)!r} is a file")
    source = table[args.name]
    files, store = overrides(source['files'], args), Path(args.archives or out/'archives')
    work = [j for j in jobs(args.name, out, list(files))
            if args.only in (None, *([j.targets[0].name] if args.name == 'imagenet' else []))]
    if not work:
        raise Wrong(f"--only: expected train or val, for imagenet, got {args.only!r} for {args.name}")
    print(source['title'], f"source  {source['page']}", f"terms   {source['terms']}", sep='\n')
    for t in [t for j in work for t in j.targets]:
        print(f"folder  {t}: "
              f"{'is there already' if full(t) else 'goes on' if hidden(t).exists() else 'to be made'}")
    left = [j for j in work if not all(map(full, j.targets))]
    used = [f for j in left for f in j.archives]
    fetched, missing, needs = look(files, used, store, out)
    needs.append((out, -sum(size_of(hidden(t)) for j in left for t in j.targets)))
    unknown = any('size' not in files[f] and not (store/f).is_file() and files[f].get('unpacked') != 0
                  for f in used)
    print(f"disk    {'at least ' if unknown else ''}{gb(max(0, sum(n for _,n in needs)))} needed, "
          f"{gb(free_bytes(out))} free")
    unsure = [f for f in used if checksum(files[f])[1] is None and not args.unchecked]
    first = (f"{', '.join(missing)}: get from {source['page']} (the terms above apply) and put into {store}"
             if missing else f"{', '.join(unsure)}: the publisher prints no checksum; "
                             "pass --sha256 FILE=… if you know it, or --unchecked to take it as it is"
                             f" (its SHA-256 is recorded in {out/'.archives.json'})" if unsure else None)
    if args.dry_run:
        steps = ([f"fetch {f}" for f in fetched] + [f"check {f}" for f in used]
                 + [f"unpack into {t}" for j in left for t in j.targets])
        print("would   " + (', '.join(steps) or 'do nothing: all is there'),
              *[f"first   {first}"] * bool(first), sep='\n')
        return
    if first: raise Wrong(first)
    if left: carry_out(out, store, left, files, fetched, needs)
    print(f"next    {source['next'].format(out=out)}")

def fetch_and_check(files, used, fetched, store, out):
    "Every archive whole and checked, before the first is opened."
    record = Record(out)
    for name in used:
        path, part = store/name, store/f'{name}.part'
        if name in fetched:
            download(files[name]['url'], part, files[name].get('size'))
            try: record.check(part, name, *checksum(files[name]))
            except Failed: part.unlink(); raise
            os.replace(part, path)
        else: record.check(path, name, *checksum(files[name]))
        if checksum(files[name])[1] is None:
            say(f"sha256  {record.known[name]['sha256']}  {name}: computed here, nobody vouches for it")

def carry_out(out, store, left, files, fetched, needs):
    check_space(needs)
    out.mkdir(parents=True, exist_ok=True)
    if fetched: store.mkdir(parents=True, exist_ok=True)
    with alone(out, *([store] if fetched else [])):
        fetch_and_check(files, [f for j in left for f in j.archives], fetched, store, out)
        for j in left:
            parts = [None if full(t) else hidden(t) for t in j.targets]
            for p in filter(None, parts): p.mkdir(parents=True, exist_ok=True)
            try: line = j.fill([store/f for f in j.archives], parts)
            except Hostile:
                for p in filter(None, parts):
                    shutil.rmtree(p)
                    if p.parent != out and not any(p.parent.iterdir()): p.parent.rmdir()
                raise
            for t, p in zip(j.targets, parts):
                if p: publish(t)
            say(f"done    {', '.join(map(str, j.targets))}: {line}")
    if fetched: print(f"        the archives in {store} are not needed any more")

def main(argv=None)->int: # exit status: 0 done, 1 failed, 2 wrong input, 130 or 143 stopped
    p = argparse.ArgumentParser('get_data.py', description=__doc__)
    p.add_argument('name', metavar='NAME', help='imagenet, places205, cifar10, cifar100, stl10, voc2007, '
                                                'or folder for images of your own')
    p.add_argument('out', metavar='OUT',
                   help='the folder to make, one for each data set; for `folder`, the one to look at')
    p.add_argument('--dry-run', action='store_true', help='say what would be done, and do nothing')
    p.add_argument('--archives', metavar='DIR',
                   help='where the archives are, or go; OUT/archives where not given')
    p.add_argument('--only', metavar='SPLIT', help='imagenet: train or val alone')
    p.add_argument('--url', action='append', default=[], metavar='FILE=URL',
                   help='fetch FILE from here, such as a mirror or a personal link')
    p.add_argument('--sha256', action='append', default=[], metavar='FILE=HEX',
                   help='check FILE against this')
    p.add_argument('--unchecked', action='store_true',
                   help='take files for which nobody published a checksum as they are')
    p.add_argument('--decode', action='store_true',
                   help='folder: decode every image instead of opening its header')
    p.add_argument('--sources', default=Path(__file__).with_name('sources.yaml'), metavar='YAML',
                   help='another table than sources.yaml')
    args = p.parse_args(argv)
    def stop(number, frame): raise KeyboardInterrupt(number)
    signal.signal(signal.SIGTERM, stop)
    # a job in the background inherits that Ctrl-C is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try: get_data(args)
    except Wrong as e: say(f"get_data.py: {e}", sys.stderr); return 2
    except (Failed, OSError) as e: say(f"get_data.py: {e}", sys.stderr); return 1
    except KeyboardInterrupt as e:
        say("get_data.py: stopped; the same command goes on", sys.stderr)
        return 143 if e.args else 130
    return 0

if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')    # a name that the terminal can't show stops nothing
    sys.exit(main())
