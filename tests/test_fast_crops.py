"""Crops, plain and fast: the same draws and, but for rounding, the same views.

Tolerances, of 256 grey levels. Where both compute in the whole image's coordinates only sums are rounded:
a hundred roundings of 1e-7 of the range. Where the fast way first cuts a window, places are rounded
otherwise, by 2e-5 of a pixel in images of up to 160, and a weight's slope is at most 1: 2e-4 in all."""
import pytest, torch
from deepcluster_nb import augment, sobel
from deepcluster_nb.data import generator
from deepcluster_nb.fast import crops
from deepcluster_nb.fast.feeding import Ragged
from deepcluster_nb.switches import CENTER_BOXES

pytestmark = pytest.mark.usefixtures('one_thread')
SUMS, CUT = 256 * 1e-5, 255 * 2e-4

def noise(*shape, stream='noise'):
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator(0, stream))

SIZES = [(40, 70), (130, 97), (64, 64), (12, 160), (33, 33), (1, 9), (150, 8)]
LIST = [noise(3, h, w, stream=str(h)) for h,w in SIZES]
BATCH = noise(6, 3, 45, 60)
VIEWS = dict(random=lambda m, x, n: m.random_resized_crop(x, n, generator(1, 'view')),
             narrow=lambda m, x, n: m.random_resized_crop(x, n, generator(2, 'view'), (.3, .5), (1., 1.)),
             center=lambda m, x, n: m.center_crop(x, n),
             ten=lambda m, x, n: m.ten_crop(x, n))

def close(a, b, atol):
    assert a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=0, atol=atol)

def torchvision_view(images, size): # the plain functions' crop of the box that torchvision cuts
    return augment.resample(images, CENTER_BOXES['torchvision'](augment.image_sizes(images), size), size)

@pytest.mark.parametrize('size', [1, 8, 33, 96])
@pytest.mark.parametrize('images', [LIST[:5], BATCH], ids=['list', 'batch'])
def test_torchvisions_box(images, size):
    fast = crops.center_crop(images, size, 'torchvision')
    close(fast, torchvision_view(images, size), CUT if isinstance(images, list) else SUMS)

@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize('size', [1, 8, 33, 96])
@pytest.mark.parametrize('planes', [1, 3])
def test_every_view(view, size, planes):
    listed, batch = [im[:planes] for im in LIST], BATCH[:, :planes]
    plain, whole = view(augment, listed, size), view(augment, batch, size)
    close(view(crops, listed, size), plain, CUT)
    close(view(crops, Ragged.of(listed), size), plain, CUT)
    close(view(crops, batch, size), whole, SUMS)
    close(view(crops, list(batch), size), whole, CUT)
    close(view(augment, list(batch), size), whole, SUMS)

@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32, torch.float64])
def test_every_type_of_pixels(dtype):
    close(crops.center_crop(BATCH.to(dtype), 20), augment.center_crop(BATCH.to(dtype), 20), SUMS)
    frac = torch.tensor([[3.25, 7.5, 30.3, 20.1]]).repeat(6, 1)
    flip = torch.arange(6) % 2 > 0
    plain, fast = (m.resample(BATCH.to(dtype), frac, 13, flip) for m in (augment, crops))
    close(fast, plain, SUMS)

def test_the_same_draws():
    for m in (augment, crops):
        g = generator(3, 'draws')
        m.random_resized_crop(BATCH, 8, g)
        if m is augment: after = torch.rand(5, generator=g)
    assert torch.equal(torch.rand(5, generator=g), after)

def test_the_first_try_that_fits_is_taken(): # of such long images most don't
    sizes, u = torch.tensor([[30, 100]]*64), torch.rand(4, 64, 10, generator=generator(5, 'tries'))
    area, aspect = 3000*(.08 + .92*u[0]), (3/4 * (16/9)**u[1])
    w, h = (area*aspect).sqrt().round(), (area/aspect).sqrt().round()
    later = 0
    for i,box in enumerate(augment.crop_boxes(sizes, generator(5, 'tries'))):
        if not (fit := [t for t in range(10) if h[i, t] <= 30]): continue
        t, later = fit[0], later + (fit[0] > 0 and len(fit) > 1)
        x, y = (u[2, i, t]*(101 - w[i, t])).floor(), (u[3, i, t]*(31 - h[i, t])).floor()
        assert box.tolist() == [x, y, w[i, t], h[i, t]]
    assert later > 5

@pytest.mark.parametrize('n_in, n_out', [(6, 3), (3, 6), (50, 7), (1, 4)])
def test_matrices(n_in, n_out):
    args = (torch.tensor([0., n_in/3]), torch.tensor([float(n_in), n_in/2]), n_in, n_out,
            torch.tensor([True, False]))
    dense = augment.resize_weights(*args)
    assert torch.equal(crops.resize_weights(*args), dense)
    frame = crops.resize_weights(*args, columns=n_in + 5)                # no weight beyond the image
    assert torch.equal(frame[..., :n_in], dense) and not frame[..., n_in:].any()
    pixels, weights = crops.resize_taps(*args)
    close(torch.zeros_like(dense).scatter_add_(2, pixels.long(), weights), dense, 1e-6)

@pytest.mark.parametrize('bad', [
    lambda m: m.resample(BATCH, torch.zeros(6, 4), 8), lambda m: m.resample(BATCH, torch.ones(5, 4), 8),
    lambda m: m.center_crop(BATCH, 0), lambda m: m.center_crop(BATCH[0], 8), lambda m: m.ten_crop(BATCH, -1),
    lambda m: m.center_crop([BATCH[0], BATCH[0, 0]], 8),
    lambda m: m.random_resized_crop(BATCH, 8, generator(0), (0, 1)),
    lambda m: m.resample(BATCH, torch.ones(6, 4), 8, torch.tensor([True]))])
def test_the_same_errors(bad):
    said = []
    for m in (augment, crops):
        with pytest.raises(ValueError) as e: bad(m)
        said.append(str(e.value))
    assert said[0] == said[1]

@pytest.mark.parametrize('images', [LIST, BATCH, Ragged.of(LIST)], ids=['list', 'batch', 'ragged'])
@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
def test_grey_before_the_crop_is_grey_after_it(images, view): # SCALE, or 1/255/STD: a grey level
    net, plain = sobel.Sobel(), LIST if isinstance(images, Ragged) else images
    crop = lambda m, x: (y := view(m, x, 24)).reshape(-1, *y.shape[-3:])
    grey = crops.network_input(images, lambda x: crop(crops, x), True)
    after = sobel.normalize(crop(augment, plain))
    assert grey.shape[1] == 1
    torch.testing.assert_close(grey, net[0](after), rtol=0, atol=CUT * crops.SCALE + 1e-5)
    colors = crops.network_input(images, lambda x: crop(crops, x), False)
    close(colors, after, CUT / 255 / min(sobel.STD) + 1e-5)

def test_normalize_is_the_same(): # also of one plane, which becomes three equal ones
    for x in (BATCH, BATCH[:, :1], BATCH.float()): assert torch.equal(crops.normalize(x), sobel.normalize(x))
    one = sobel.normalize(BATCH[:, :1])
    assert torch.equal(one, sobel.normalize(BATCH[:, :1].expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match='1 or 3'): sobel.normalize(BATCH[:, :2])
