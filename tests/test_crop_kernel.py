"Crops in one Triton kernel: compiled and run without a GPU, and left alone where they can't be used."
import os, subprocess, sys, warnings
from importlib.util import find_spec
from pathlib import Path
import pytest, torch
from deepcluster_nb.augment import crop_boxes
from deepcluster_nb.data import generator
from deepcluster_nb.fast import crops
from deepcluster_nb.fast.feeding import Ragged, seconds

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
TRITON = pytest.mark.skipif(not find_spec('triton'), reason='no Triton here')
pytestmark = pytest.mark.usefixtures('one_thread')

@TRITON
@pytest.mark.parametrize('where', ['interpreter', pytest.param('gpu', marks=[pytest.mark.cuda, NO_GPU])])
def test_the_kernel_against_the_plain_crops(where):
    env = {k: v for k,v in os.environ.items() if not k.startswith(('PYTEST_', 'TRITON_'))}
    if where == 'interpreter': env['TRITON_INTERPRET'] = '1'
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
                           str(Path(__file__).with_name('crop_kernel.py'))],
                          env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and 'skipped' not in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from deepcluster_nb.fast import crops
kernel = crops.jitted()
def compiled(out, capability, **fixed):
    kinds = {n: 'fp32' if n.startswith('sh') else 'i32' for n in kernel.arg_names}
    kinds |= dict(pixels='*u8', table='*fp64', out=out) | {n: 'constexpr' for n in fixed}
    return triton.compile(ASTSource(kernel, kinds, fixed), target=GPUTarget('cuda', capability, 32),
                          options=dict(enable_fp_fusion=False)).asm
for capability,out,planes,outs,summed in ((90, '*bf16', 1, 1, 1), (80, '*fp32', 3, 1, 3),
                                          (90, '*bf16', 3, 3, 1)):
    asm = compiled(out, capability, planes=planes, outs=outs, summed=summed, rows=8, columns=32)
    assert asm['cubin'] and 'fma' not in asm['ptx'] and 'local' not in asm['ptx']
print('compiled')
"""

@TRITON
def test_it_compiles_for_gpus_that_are_not_there(tmp_path): # and nothing is spilled or fused
    env = os.environ | dict(TRITON_CACHE_DIR=str(tmp_path))
    out = subprocess.run([sys.executable, '-c', COMPILE], env=env, capture_output=True, text=True)
    assert out.stdout == 'compiled\n', out.stderr[-3000:]

def test_triton_is_not_imported_with_the_kit():
    code = ("import sys; from deepcluster_nb.fast import crops; import deepcluster_nb.fit, torch; "
            "crops.center_crop(torch.zeros(1, 3, 8, 8).byte(), 4); print('triton' in sys.modules)")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          check=True).stdout == 'False\n'

@pytest.mark.parametrize('breaks', ['there is none', 'a wrong result'])
def test_where_it_fails_products_cut_and_one_warning_says_so(monkeypatch, breaks):
    def jitted():
        if breaks == 'there is none': raise ModuleNotFoundError("No module named 'triton'")
    monkeypatch.setattr(crops, 'jitted', jitted)
    monkeypatch.setattr(crops, 'cut_crops', lambda *args: torch.zeros(1, 1, 2, 2))
    monkeypatch.setattr(torch.Tensor, 'cuda', lambda x: x)
    crops.crop_kernel.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        assert crops.crop_kernel() is crops.crop_kernel() is None
    crops.crop_kernel.cache_clear()
    (w,) = [str(w.message) for w in said]
    assert w.startswith("crops: Triton can't be used here, so matrix products cut the crops") and (
        'triton' in w.lower() and ("No module named" in w or 'expected' in w))

def test_what_it_takes():
    byte = torch.zeros(2, 3, 4, 4).byte()
    for images in (byte, list(byte), Ragged.of(list(byte)), crops.to_grey(list(byte)), byte.float()):
        assert not crops.kernel_takes(images)                                    # on a CPU
    with pytest.raises(ValueError, match='images: expected 1 or 3 planes, got 2'): crops.colors(2, 'grey')
    with pytest.raises(ValueError, match='size: expected at least 1 pixel, got 0'):
        crops.Uncut(byte).crops(torch.zeros(2, 4), 0)

@pytest.mark.cuda
@NO_GPU
@pytest.mark.parametrize('ragged', [False, True])
def test_a_gpu_crops_as_a_cpu_does(ragged): # photographs' sizes, within the level that DESIGN.md allows
    g = generator(0, 'gpu')
    sizes = [(500, 375), (333, 500), (400, 400), (256, 256)] if ragged else [(333, 500)]*4
    images = [torch.randint(256, (1, *s), generator=g).byte() for s in sizes]
    there = Ragged.of([im.cuda() for im in images]) if ragged else torch.stack(images).cuda()
    boxes, flip = crop_boxes(crops.image_sizes(images), g), torch.arange(4) > 1
    plain = crops.resample(images, boxes, 224, flip)
    assert crops.kernel_takes(there)
    torch.testing.assert_close(crops.resample(there, boxes, 224, flip).cpu(), plain, rtol=0, atol=.06)

@pytest.mark.cuda
@NO_GPU
def test_it_can_be_captured(): # in a CUDA graph, with the next batch's table in the same memory
    g = generator(0, 'graph')
    flat = torch.randint(256, (64*100*120,), generator=g).byte()
    images = flat.view(64, 1, 100, 120)
    def table(): return crops.crop_table(images, crop_boxes(crops.image_sizes(images), g), 64).cuda()
    kernel, there, first, second = crops.crop_kernel(), flat.cuda(), table(), table()
    def cut(t, **how): return crops.cut_crops(kernel, there, t, 64, 1, 'grey', torch.bfloat16, **how)
    wanted, fixed, out = [cut(t).clone() for t in (first, second)], first.clone(), cut(first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): cut(fixed, out=out)
    for t,w in zip((first, second), wanted):
        fixed.copy_(t)
        graph.replay()
        assert torch.equal(out, w)

@pytest.mark.cuda
@NO_GPU
def test_one_launch_is_faster_than_many(monkeypatch):
    images = torch.randint(256, (256, 1, 300, 400), dtype=torch.uint8, generator=generator(0)).cuda()
    def view(im): return crops.random_resized_crop(im, 224, generator(0))
    def once(): crops.network_input(images, view, True)
    def median(): return sorted(seconds(once, 'cuda') for _ in range(11))[5]
    kernel = (once(), median())[1]
    monkeypatch.setattr(crops, 'kernel_takes', lambda images: False)
    assert kernel < (once(), median())[1]
