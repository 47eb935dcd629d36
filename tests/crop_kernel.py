"""Triton's crops against the plain ones, in Triton's interpreter. That changes the process it runs in, so \
test_crop_kernel.py runs these in one of their own; where there is a GPU, once more on that.

Tolerances are those of test_fast_crops.py: both compute in the whole image's coordinates, so only sums are
rounded; a last place in bfloat16, whose 8 digits the interpreter cuts off where a GPU rounds."""
import os
import pytest, torch
from deepcluster_nb import augment, sobel
from deepcluster_nb.data import generator
from deepcluster_nb.fast import crops
from deepcluster_nb.fast.feeding import Ragged

DEVICE = 'cpu' if os.environ.get('TRITON_INTERPRET') == '1' else 'cuda'
SUMS = 256 * 1e-5

@pytest.fixture(scope='module')
def kernel(): return crops.jitted()

def noise(h, w, planes=3):
    g = generator(0, 'noise', h, w, planes)
    return torch.randint(256, (planes, h, w), dtype=torch.uint8, generator=g)

def cut(kernel, images, boxes, size, flip=None, what='same', dtype=torch.float32):
    ragged = isinstance(images, list)
    table = crops.crop_table(Ragged.of(images) if ragged else images, boxes, size, flip)
    flat = Ragged.of(images).flat if ragged else images.reshape(-1)
    planes = images[0].shape[0]
    return crops.cut_crops(kernel, flat.to(DEVICE), table.to(DEVICE), size, planes, what, dtype).cpu()

def close(a, b, atol=SUMS): torch.testing.assert_close(a, b, rtol=0, atol=atol)
def drawn(images): # boxes of all sizes, every second one mirrored
    sizes = augment.image_sizes(images)
    return augment.crop_boxes(sizes, generator(1, 'boxes')), torch.arange(len(sizes)) % 2 > 0

@pytest.mark.parametrize('size', [1, 7, 33])            # less than a block of 8 × 32, and a pixel more
def test_ragged(kernel, size):
    images = [noise(h, w) for h,w in ((8, 5), (1, 1), (1, 9))]
    boxes, flip = drawn(images)
    close(cut(kernel, images, boxes, size, flip), augment.resample(images, boxes, size, flip))

@pytest.mark.parametrize('planes', [1, 2, 3, 4])
def test_one_size(kernel, planes):
    images = torch.stack([noise(9, 14 + i, planes)[..., :14] for i in range(2)])
    boxes, flip = drawn(images)
    close(cut(kernel, images, boxes, 6, flip), augment.resample(images, boxes, 6, flip))

PLACES = dict(all=[0, 0, 10, 8], first_pixel=[0, 0, 1, 1], last_pixel=[9, 7, 1, 1], last_row=[0, 7, 10, 1],
              to_the_corner=[.3, .6, 9.7, 7.4], half_a_pixel=[7.25, 3.5, 2.75, .5])

@pytest.mark.parametrize('box', PLACES.values(), ids=PLACES)
@pytest.mark.parametrize('size', [3, 10, 20])           # smaller, as large as the image is wide, up-scaled
def test_every_place(kernel, box, size):
    image, boxes = noise(8, 10, 1)[None], torch.tensor([box], dtype=torch.float32)
    for flip in (None, torch.tensor([True])):
        close(cut(kernel, image, boxes, size, flip), augment.resample(image, boxes, size, flip))

def test_nothing_to_do(kernel): # the image itself, and its mirror image
    image, box = noise(16, 16)[None], torch.tensor([[0., 0, 16, 16]])
    assert torch.equal(cut(kernel, image, box, 16), image.float())
    assert torch.equal(cut(kernel, image, box, 16, torch.tensor([True])), image.flip(3).float())

@pytest.mark.parametrize('planes', [1, 3])
@pytest.mark.parametrize('what', ['grey', 'normal'])
def test_as_the_network_takes_them(kernel, planes, what):
    images = [noise(h, w, planes) for h,w in ((8, 13), (12, 5))]
    boxes, flip = drawn(images)
    plain = sobel.normalize(augment.resample(images, boxes, 7, flip))
    if what == 'grey': plain = sobel.Sobel()[0](plain)
    ours = cut(kernel, images, boxes, 7, flip, what)
    close(ours, plain, SUMS / 255 / min(sobel.STD) + 1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    half = cut(kernel, images, boxes, 7, flip, what, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), ours, rtol=2**-7, atol=0)           # one place of eight
    if DEVICE == 'cuda': assert torch.equal(half, ours.bfloat16())

def test_starts_beyond_32_bits(kernel, monkeypatch): # 64 bits, from a table of exact float64
    image = noise(9, 9)[None]
    entry = crops.crop_table(Ragged(image.view(-1), torch.tensor([2**40 + 1]), torch.tensor([[3, 9, 9]])),
                             torch.tensor([[0., 0, 9, 9]]), 9)
    assert int(entry[0, 0]) == 2**40 + 1

@pytest.mark.parametrize('ragged', [False, True])
@pytest.mark.parametrize('sobel_first', [False, True])
def test_all_the_way(kernel, monkeypatch, ragged, sobel_first): # from network_input, as training calls it
    images = [noise(8, 12 - 3*i*ragged) for i in range(2)]
    given = Ragged.of(images) if ragged else torch.stack(images)
    views = dict(random=lambda x: crops.random_resized_crop(x, 5, generator(2, 'view')),
                 center=lambda x: crops.center_crop(x, 5))
    if sobel_first: views['ten'] = lambda x: crops.ten_crop(x, 5).flatten(0, 1)
    plain = {n: crops.network_input(images, v, sobel_first) for n,v in views.items()}
    if DEVICE == 'cuda': # as it is
        given = Ragged(given.flat.cuda(), given.starts, given.shapes) if ragged else given.cuda()
    else:
        monkeypatch.setattr(crops, 'crop_kernel', lambda: kernel)
        monkeypatch.setattr(crops, 'kernel_takes', lambda x: not isinstance(x, crops.Views))
    for n,v in views.items():
        ours = crops.network_input(given, v, sobel_first).cpu()
        close(ours, plain[n], 255*2e-4 / 255 / min(sobel.STD) + 1e-5)            # which cut windows first
