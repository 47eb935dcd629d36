("Fetch an archive, check it, unpack it: "
 "each can be stopped anywhere and goes on, and nothing is ever written outside its folder.")
import errno, gzip, hashlib, http.client, json, lzma, os, shutil, sys, tarfile, time, urllib.error, \
       urllib.request, zlib
from contextlib import contextmanager
from pathlib import Path

class Wrong(Exception):   "What was asked for can't be done as it stands: exit status 2."
class Failed(Exception):  "It was tried and did not work: exit status 1."
class Hostile(Failed):    "An archive with a member that has no business there."

def gb(n)->str: # bytes → '1.5 GB'
    for unit, size in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if n >= size: return f"{n/size:,.1f} {unit}"
    return f"{n} bytes"

class Progress:
    "How far a long work is: twice a second on a terminal, once a minute in a log."
    def __init__(self, what, unit=gb):
        self.what, self.unit, self.start, self.next, self.tty = (what, unit, time.time(), time.time() + 1,
                                                                 sys.stderr.isatty())
    def __call__(self, done, total=None):
        if time.time() < self.next: return
        self.next = time.time() + (.5 if self.tty else 60)
        share = f" of {self.unit(total)}, {100*done/total:.0f} %" if total else ''
        say(f"{self.what}: {self.unit(done)}{share} · {time.time() - self.start:.0f} s", sys.stderr,
            end='\r' if self.tty else '\n')

def say(line, file=None, end='\n'):
    "One line, in the place of a progress line where there is one."
    print(('\033[K' if sys.stderr.isatty() else '') + line, file=file, end=end, flush=True)

# ---------------------------------------------------------------- space

SPARE = 100_000_000     # bytes left free on the disk, whatever an archive wants

def free_bytes(path:Path)->int: # on the disk of `path`, which need not exist yet
    if 'GET_DATA_FREE' in os.environ: return int(os.environ['GET_DATA_FREE'])       # for the tests
    return shutil.disk_usage(existing(path)).free

def existing(path:Path)->Path: # the nearest folder above that exists
    path = Path(path).absolute()
    while not path.exists(): path = path.parent
    return path

def check_space(needs): # [(folder, bytes), …]; folders on one disk share it
    disks = {}
    for folder, n in needs:
        disk = disks.setdefault(os.stat(existing(folder)).st_dev, [folder, 0])
        disk[1] += n
    for folder, n in disks.values():
        if n > 0 and n + SPARE > free_bytes(folder):
            raise Failed(f"{folder}: needs {gb(n + SPARE)} of disk, but {gb(free_bytes(folder))} are free")

def size_of(folder:Path)->int: # bytes of the files below
    return sum(os.path.getsize(os.path.join(d, f)) for d,_,names in os.walk(folder) for f in names)

# ---------------------------------------------------------------- one at a time

@contextmanager
def alone(*folders):
    ("No second copy works in these folders at the same time. "
     "The lock is on the folder itself: nothing is left behind, however we end.")
    try: import fcntl
    except ImportError: yield; return            # Windows
    held = []
    try:
        for folder in {Path(f).resolve() for f in folders}:
            held.append(os.open(folder, os.O_RDONLY))
            try: fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError: raise Failed(f"{folder}: another get_data.py is at work here") from None
            except OSError: pass                 # a network disk without locks
        yield
    finally:
        for fd in held: os.close(fd)

# ---------------------------------------------------------------- download

def fetch(url:str, part:Path, size, show)->bool: # False where the connection ended early
    "One request: goes on at the end of `part` where the server can, and starts again where it can't."
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'User-Agent': 'deepcluster-nb',
                                                   **({'Range': f'bytes={have}-'} if have else {})})
    with urllib.request.urlopen(request, timeout=60) as r:
        goes_on = (have > 0 and r.status == 206
                   and r.headers.get('Content-Range', '').startswith(f'bytes {have}-'))
        if r.status == 206 and not goes_on:
            raise Failed(f"{url}: the server sent another piece than the one asked for")
        have = have if goes_on else 0
        length = r.headers.get('Content-Length')
        total = have + int(length) if length else size
        if size and total != size:
            raise Failed(f"{url}: {total:,} bytes there, {size:,} expected; "
                         "it is not the file that was published")
        if total: check_space([(part.parent, total - have)])
        with open(part, 'ab' if goes_on else 'wb') as f:
            while block := r.read(1 << 20):
                have += len(block)
                if total and have > total:
                    raise Failed(f"{url}: sends more than the {total:,} bytes it announced")
                if not total: check_space([(part.parent, len(block))])
                f.write(block)
                show(have, total)
            f.flush(); os.fsync(f.fileno())
    return total is None or have == total

def download(url:str, part:Path, size=None, tries:int=5):
    ("Fetch `url` into `part`, again where the connection fails; "
     "gives up after `tries` times without a new byte.")
    show, failures, length = Progress(part.name[:-5]), 0, lambda: part.stat().st_size if part.exists() else 0
    if size and length() > size: part.unlink()
    while not (size and length() == size):
        before = length()
        try:
            if fetch(url, part, size, show): return
            problem = 'the connection ended early'
        except urllib.error.HTTPError as e:
            if e.code == 416 and before:                                     # nothing beyond what we have
                if e.headers.get('Content-Range') == f'bytes */{before}': return
                part.unlink()
            elif 400 <= e.code < 500 and e.code not in (408, 429):
                raise Failed(f"{url}: the server says {e.code} {e.reason}") from None
            problem = f"{e.code} {e.reason}"
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise Failed(f"{part}: {e.strerror}") from None
            problem = str(getattr(e, 'reason', e)) or type(e).__name__
        failures = 0 if length() > before else failures + 1
        if failures >= tries:
            raise Failed(f"{url}: {problem}; gave up after {tries} tries, "
                         f"the same command goes on at {gb(length())}")
        say(f"{part.name[:-5]}: {problem} at {gb(length())}; trying again", sys.stderr)
        time.sleep(min(60, float(os.environ.get('GET_DATA_WAIT', .5)) * 2**failures))

# ---------------------------------------------------------------- checksums

def digest(path:Path, algorithm:str)->str:
    h, size, show = hashlib.new(algorithm), path.stat().st_size, Progress(f"checking {path.name}")
    with open(path, 'rb') as f:
        while block := f.read(1 << 22): h.update(block); show(f.tell(), size)
    return h.hexdigest()

class Record:
    "What was checked, in OUT/.archives.json: an archive that did not change since is not read again."
    def __init__(self, out:Path):
        self.path = Path(out)/'.archives.json'
        try: self.known = json.loads(self.path.read_text(encoding='utf-8'))
        except (OSError, ValueError): self.known = {}

    def check(self, path:Path, name:str, algorithm:str, published):
        # `published` None: what it was when it was first seen here
        stat, was = path.stat(), self.known.get(name, {})
        now, expected = (dict(size=stat.st_size, mtime_ns=stat.st_mtime_ns),
                         (published or was.get(algorithm, '')).lower())
        if expected and {**now, algorithm: expected} == was: return
        found = digest(path, algorithm)
        if expected and found != expected:
            raise Failed(f"{path}: its {algorithm} is {found}, but {expected} was "
                         f"{'published' if published else 'recorded here before'}; it was not opened")
        self.known[name] = {**now, algorithm: found}
        tmp = self.path.with_suffix('.tmp')
        tmp.write_text(json.dumps(self.known, indent=1), encoding='utf-8')
        os.replace(tmp, self.path)

# ---------------------------------------------------------------- unpacking

def safe_parts(name:str, archive)->tuple: # ('a', 'b.jpg')
    "A member's path, if it stays inside the folder on every system."
    parts = tuple(p for p in name.split('/') if p not in ('', '.'))
    if name.startswith('/') or '..' in parts or any(c in name for c in '\\:\0'):
        raise Hostile(f"{archive}: member {name!r} leaves the folder; nothing of it is kept")
    return parts

class Member(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tar):
        "tarfile takes a header that it can't read for the end of the archive; here it is an error."
        try:
            return super().fromtarfile(tar)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as e:
            raise tarfile.ReadError(f"it breaks off: {e}") from None

@contextmanager
def opened(path, fileobj=None): # a tar, compressed or not; one inside another by its `fileobj`
    "Every way in which a tar can be broken is one error."
    try:
        with (fileobj or open(path, 'rb') as f,
              tarfile.open(fileobj=f, mode='r:' if fileobj else 'r:*', tarinfo=Member) as tar):
            tar.where, tar.raw = path, f
            yield tar
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as e: 
        raise Failed(f"{path}: a damaged or truncated archive ({' '.join(str(e).split())})") from None

def members(tar): # (TarInfo, path as a tuple) of every file
    "Plain files alone; a link, a device, a sparse file or a path that leaves the folder ends the work."
    while (m := tar.next()) is not None:
        tar.members.clear()                                        # 2.4 million of them would fill the memory
        parts = safe_parts(m.name, tar.where)
        if m.isdir(): continue
        if not m.isreg() or m.sparse is not None or not parts:
            kind = 'a link' if m.islnk() or m.issym() else 'a device' if m.isdev() else 'no plain file'
            raise Hostile(f"{tar.where}: member {m.name!r} is {kind}; nothing of it is kept")
        yield m, parts
    while tar.fileobj.read(1 << 20): pass                            # to the checksum at the end of a gzip

def unpack_member(tar, m, target:Path):
    "One file; a whole one from an earlier try is kept."
    if target.is_file() and target.stat().st_size == m.size: return
    if m.size + SPARE > free_bytes(target):
        raise Failed(f"{tar.where}: member {m.name!r} has {gb(m.size)}, "
                     f"but {gb(free_bytes(target))} are free")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tar.extractfile(m) as src, open(target, 'wb') as f:
            shutil.copyfileobj(src, f, 1 << 20)
            if f.tell() != m.size: raise tarfile.ReadError(f"{m.name!r} stops in the middle")
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise Hostile(f"{tar.where}: member {m.name!r} is a file and a folder at once; "
                      "nothing of it is kept") from None

def read_member(archive:Path, ending:str, limit:int=1 << 30)->bytes: # the one small file whose path ends so
    with opened(archive) as tar:
        for m, parts in members(tar):
            if not '/'.join(parts).endswith(ending): continue
            if m.size > limit:
                raise Failed(f"{archive}: member {m.name!r} has {gb(m.size)}, at most {gb(limit)} expected")
            with tar.extractfile(m) as f: return f.read()
    raise Failed(f"{archive}: no {ending} in it")

def hidden(target:Path)->Path: # where a folder grows until it is whole
    return target.with_name(f'.{target.name}.part')

def publish(target:Path):
    "Everything on the disk first, then the name that counts."
    if hasattr(os, 'sync'): os.sync()
    if target.is_dir(): target.rmdir()                              # an empty one; Windows doesn't replace it
    os.replace(hidden(target), target)
