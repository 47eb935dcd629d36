import os
import pytest, torch
from deepcluster_nb.runs import Stopped

@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    # a run that stops, on a disk that is really full for one, fails
    # its own test; as a KeyboardInterrupt it would end all of them
    try: return (yield)
    except Stopped as e: pytest.fail(f'Stopped: {e}')

pytest_runtest_setup = pytest_runtest_call                          # in a fixture too

# the files that take longest come first, so that no processor waits for one of them at the end
LONGEST = ['experiments', 'full_scale', 'survival', 'probe', 'situations_runs', 'learning', 'findings',
           'distributed', 'site', 'book']

def pytest_collection_modifyitems(items):
    order = {f'test_{name}.py': i for i,name in enumerate(LONGEST)}
    items.sort(key=lambda i: order.get(i.path.name, len(order)))

@pytest.fixture(autouse=True, scope='session')
def threads(): # beside others one each: they would wait for one another
    torch.set_num_threads(1 if 'PYTEST_XDIST_WORKER' in os.environ else 2)

@pytest.fixture
def in_process(monkeypatch): # for tests of what an experiment computes and leaves
    import in_process
    from deepcluster_nb import experiments
    monkeypatch.setattr(experiments, 'execute', in_process.execute)
    # up to 100 passes over few images are half of a tiny run; train and probe with their kernels make them
    monkeypatch.setattr('deepcluster_nb.probes.probe_epochs', lambda *a: 3)

@pytest.fixture(scope='module')
def one_thread(): # for inputs so small that threads would mostly wait for each other
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture
def cifar_root():
    "The data root with CIFAR-10 as a folder of JPEGs, where there is one."
    root = os.environ.get('DEEPCLUSTER_DATA')
    if not root or not os.path.isdir(os.path.join(root, 'cifar10', 'train')):
        pytest.skip('DEEPCLUSTER_DATA has no cifar10/train')
    return root
