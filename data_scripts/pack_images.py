"""A folder of images, decoded once into one file that every run maps (chapter 26).

    python data_scripts/pack_images.py imagenet/train packed/train.safetensors --max-side 500 --center 224
    python data_scripts/pack_images.py --verify packed/train.safetensors

Stopped or killed, the same command goes on where it was, to the same bytes.
"""
import argparse, sys, warnings
from pathlib import Path

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('src', help="a folder of images, one sub-folder a class where there are labels; "
                               "or a .txt file with the path of an image on each line")
    p.add_argument('out', nargs='?', help="the file to make, such as packed/train.safetensors")
    sides = p.add_mutually_exclusive_group()
    sides.add_argument('--max-side', type=int, metavar='PX',
                       help="longest side at most this (500 for ImageNet); "
                            "images stay as they are where no size is given")
    sides.add_argument('--short-side', type=int, metavar='PX',
                       help="shorter side at most this: smaller files, less detail")
    sides.add_argument('--size', type=int, metavar='PX',
                       help="the exact central crop that the clustering sees, square")
    color = p.add_mutually_exclusive_group()
    color.add_argument('--grey', dest='grey', action='store_true', default=True,
                        help="the Sobel layer's grey, one byte a pixel (default)")
    color.add_argument('--rgb', dest='grey', action='store_false',
                        help="three bytes a pixel, for networks without Sobel")
    p.add_argument('--center', type=int, metavar='PX',
                   help="also the exact central crops (224), into a second file beside OUT, "
                        "for the clustering")
    p.add_argument('--upright', action=argparse.BooleanOptionalAction, default=True,
                   help="turn images as their EXIF note says (default); "
                        "--no-upright leaves them as stored, as torchvision reads them")
    p.add_argument('--skip-broken', action='store_true',
                   help="leave out files that can't be read; "
                        "without it they stop the run (after all are listed in OUT.broken.txt)")
    p.add_argument('--workers', type=int, metavar='N',
                   help="processes; as many as there are cores where not given")
    p.add_argument('--verify', action='store_true',
                   help="compare a packed file (given in place of SRC) with its checksums")
    a = p.parse_args()
    if a.verify == (a.out is not None): p.error("expected SRC and OUT, or --verify and one packed file")
    return a

def listed(file): # paths, a line each, to the byte: names need not be UTF-8, nor free of odd separators
    text = Path(file).read_bytes().decode('utf-8-sig', 'surrogateescape')
    return [line.removesuffix('\r') for line in text.split('\n') if line.strip()]

def main():
    a = arguments()
    from deepcluster_nb.fast.packing import pack_folder, verify_packed
    if a.verify:
        bad = verify_packed(a.src, show=True)
        for path in bad: print(path)
        sys.exit(f"{a.src}: {len(bad):,} images have changed since they were packed" if bad else
                 print(f"{a.src}: every image is as it was packed"))
    src = a.src
    if Path(src).is_file():
        src = listed(src) if src.endswith('.txt') else [src]
    if isinstance(src, list) or Path(src).is_dir(): Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    pack_folder(src, a.out, a.max_side, a.short_side, a.size, a.grey, a.center, a.upright, a.skip_broken,
                a.workers, echo=lambda line: print(line, flush=True))

if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')    # a name that the terminal can't show stops nothing
    warnings.formatwarning = lambda message, *_, **__: f'{message}\n'
    try:
        main()
    except (ValueError, OSError, RuntimeError) as e:
        sys.exit(f"pack_images: {e}")
    except KeyboardInterrupt:
        print("pack_images: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
